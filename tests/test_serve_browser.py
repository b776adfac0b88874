"""The served page in a real browser: it follows the run, keeps its place, and nothing of it is blocked or broken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from browser_helpers import NEEDS_A_BROWSER, OPEN_ALL, Seen, barriers, until
from manyshot.report_build import build_report
from manyshot.report_html import render
from manyshot.serve import LivePage, PageServer
from report_helpers import HOSTILE, FakeRun

pytestmark = NEEDS_A_BROWSER

OPENED = "[...document.querySelectorAll('details')].map((one) => one.open)"
VERSION = "document.querySelector('script[data-version]')?.dataset.version"
FOLLOWS = "document.documentElement.dataset.drawn && document.querySelector('output')?.textContent"
PLACE = 700


def test_page_in_a_browser_follows_the_run_and_keeps_its_place(tmp_path: Path, browser: Any) -> None:
    run = FakeRun(tmp_path / "run", ["math", "safety"], rounds=2, done=1)
    live = LivePage(run.write(), lambda path: render(build_report([path]).page, "0"))
    with PageServer(live, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        seen = Seen(browser.new_page(viewport={"width": 900, "height": 600}))
        page = seen.page
        page.goto(server.url)
        until(page, FOLLOWS)
        assert "steps" in page.evaluate("document.querySelector('output').textContent")
        assert page.title() == "run – manyshot report"
        assert page.locator("img").count() == 0
        assert HOSTILE in page.evaluate("[...document.querySelectorAll('.said')].map((one) => one.textContent)")
        page.evaluate("document.querySelectorAll('details').forEach((one, i) => { one.open = i % 2 === 1; })")
        page.evaluate(f"scrollTo({{ top: {PLACE}, behavior: 'instant' }})")
        opened = page.evaluate(OPENED)
        run.write_round(2)
        # it may be loaded several times while the round is written; after this version nothing changes any more
        until(page, f"{VERSION} === '{live.version()}' && {FOLLOWS}")
        until(page, f"Math.abs(scrollY - {PLACE}) < 2")
        assert page.evaluate(OPENED)[: len(opened)] == opened
        assert "2 rounds" in page.evaluate("document.body.textContent")
        page.evaluate(OPEN_ALL)
        assert barriers(page) == []
        page.close()
        server.shutdown()
    assert seen.said == []
    assert all(asked.startswith(server.url) for asked in seen.asked)
