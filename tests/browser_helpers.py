"""A real browser for the pages that are made here: found, opened, listened to, waited for."""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
NEEDS_A_BROWSER = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(900),
]

PATIENCE = 300_000  # milliseconds: a machine with other work is slow, not wrong
DRAWN = "document.documentElement.dataset.drawn === 'yes'"
# goes to every chart that is shown, and comes back when all are drawn
VISIT = """async () => {
  const drawn = (chart) => new Promise((done) => {
    const look = () => chart.querySelector("svg") && done(observer.disconnect());
    const observer = new MutationObserver(look);
    observer.observe(chart, { childList: true, subtree: true });
    chart.scrollIntoView({ behavior: "instant" });
    look();
  });
  for (const chart of document.querySelectorAll(".panel:not([hidden]) > .chart")) await drawn(chart);
}"""
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


class Seen:
    """A page, and what it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.asked.append(request.url))


def until(page: Any, condition: str) -> None:
    """Wait until a condition holds in the page, through loading it again.

    Playwright's own way is an eval, which the page's policy forbids; a promise that is waited for may be lost when the
    page goes away.
    """
    end = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            if page.evaluate(f"Boolean({condition})"):
                return
        except Exception as error:  # the page is being loaded again at this moment
            if not any(said in str(error) for said in ("Execution context was destroyed", "navigation")):
                raise
        assert time.monotonic() < end, f"never in the page: {condition}"
        page.wait_for_timeout(20)  # lets go of the page, and looks again


def barriers(page: Any, *rules: str) -> list[str]:
    """What axe-core finds that keeps people out of the page as it is shown now, by all rules or by these alone."""
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = {"type": "rule", "values": [*rules]}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {node['html'][:150]} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical", "moderate")
        for node in one["nodes"]
    ]
