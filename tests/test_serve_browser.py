"""The served page in a real browser: it follows the run, keeps its place, and nothing of it is blocked or broken."""

from __future__ import annotations

import shutil
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from manyshot.report_build import build_report
from manyshot.report_html import render
from manyshot.serve import LivePage, PageServer
from report_helpers import HOSTILE, FakeRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None, reason="needs playwright and a chromium on the PATH"
)

PATIENCE = 120_000  # milliseconds: a machine with other work is slow, not wrong
OPENED = "[...document.querySelectorAll('details')].map((one) => one.open)"
VERSION = "document.querySelector('script[data-version]')?.dataset.version"


def until(page: Any, condition: str) -> None:
    """Wait in the page, through loading it again: Playwright's own way is an eval, which the page's policy forbids."""
    for _ in range(600):
        try:
            if page.evaluate(f"Boolean({condition})"):
                return
        except Exception as error:  # noqa: BLE001 - the page is being loaded again at this moment
            assert "Execution context was destroyed" in str(error) or "navigation" in str(error)
        page.wait_for_timeout(100)
    pytest.fail(f"never in the page: {condition}")


def test_page_in_a_browser_follows_the_run_and_keeps_its_place(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    # names that would break a page which does not escape them
    run = FakeRun(tmp_path / "run", ["math", HOSTILE], rounds=2, done=1)
    folder = run.write()
    live = LivePage(folder, lambda path: render(build_report([path]).page, "0"))
    said: list[str] = []
    with PageServer(live, 0) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=PATIENCE)
        page = browser.new_page(viewport={"width": 900, "height": 600})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        until(page, "document.documentElement.dataset.drawn && document.querySelector('output')?.textContent")
        assert "steps" in page.evaluate("document.querySelector('output').textContent")
        page.evaluate("document.querySelectorAll('details').forEach((one, i) => { one.open = i % 2 === 1; })")
        page.evaluate("scrollTo({ top: 700, behavior: 'instant' })")
        version, opened = page.evaluate(VERSION), page.evaluate(OPENED)
        run.write_round(2)
        until(page, f"{VERSION} !== '{version}' && document.querySelector('output')?.textContent")
        until(page, "scrollY === 700")
        assert page.evaluate(OPENED)[: len(opened)] == opened
        assert "2 rounds" in page.evaluate("document.body.textContent")
        browser.close()
        server.shutdown()
    assert said == []
