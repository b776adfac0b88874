"""The page in a real browser: no error, no request, every chart drawn, readable on a phone, in the dark, on paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compare_table_helpers import make_results
from manyshot.report_command import write_report
from report_helpers import HOSTILE, FakeRun, task_names, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

PATIENCE = 120_000  # milliseconds: a machine with other work is slow, not wrong
DRAWN = "document.documentElement.dataset.drawn === 'yes'"
LONG = "a-task-name-as-long-as-a-recipe-lets-one-be-and-not-a-letter-more"[:64]
# the page's own colour changes at once, a chart is drawn anew a moment later
COLOURS = {
    "page": "getComputedStyle(document.body).backgroundColor",
    "chart": 'document.querySelector("#scores svg text").getAttribute("fill")',
}
# goes to every chart that is shown, and waits until it is drawn
VISIT = """async () => {
  for (const chart of document.querySelectorAll(".panel:not([hidden]) > .chart")) {
    chart.scrollIntoView();
    while (!chart.querySelector("svg")) await new Promise((done) => setTimeout(done, 20));
  }
}"""
# shapes in a chart that are more than its frame
SHAPES = """() => [...document.querySelectorAll(".panel:not([hidden]) > .chart")].map((chart) =>
  [chart.id, chart.querySelectorAll("svg path").length, chart.querySelectorAll("svg text").length])"""


def until(page: Any, condition: str) -> None:
    """Wait in the page; Playwright's own way is an eval, which the page's policy forbids."""
    page.evaluate(f"async () => {{ while (!({condition})) await new Promise((done) => setTimeout(done, 20)); }}")


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


Open = Callable[..., Seen]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name: a run of eleven tasks, one of forty, one of one, one that stopped, two runs, a comparison."""
    folder = tmp_path_factory.mktemp("reports")
    eleven = FakeRun(folder / "eleven", task_names(11), rounds=5, layers=30).write()
    finding = {"round": 2, "tasks": ["math"], "found": "math has it all", "suggestions": ["operator.gap=relative"]}
    write(eleven / "round_002" / "guards.json", {"findings": [finding]})
    other = FakeRun(folder / "other", task_names(5), rounds=2, seed=1).write()
    forty = FakeRun(folder / "forty", [LONG, *task_names(39)], rounds=2).write()
    one = FakeRun(folder / "one", ["math"], rounds=1, post_hoc=False).write()
    half = FakeRun(folder / "half", rounds=5, done=2).write()
    (half / "round_001" / "merge.json").write_text("{", "utf-8")
    write(folder / "grid" / "results.json", make_results())
    found = {path.name: write_report([path]).html for path in (eleven, forty, one, half, folder / "grid")}
    return found | {"two": write_report([eleven, other], folder / "two").html}


@pytest.fixture
def open_page(browser: Any, reports: dict[str, Path]) -> Iterator[Open]:
    contexts = []

    def open_(name: str, width: int = 1200, scheme: str = "light", **more: Any) -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.goto(reports[name].as_uri())
        until(seen.page, DRAWN)
        return seen

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["eleven", "forty", "one", "half", "two", "grid"])
def test_page_draws_every_chart_without_an_error_or_a_request(open_page: Open, name: str, reports: Any) -> None:
    seen = open_page(name)
    seen.page.evaluate(VISIT)
    shapes = seen.page.evaluate(SHAPES)
    assert shapes and all(paths > 2 and texts > 2 for _, paths, texts in shapes), shapes
    assert seen.said == []
    assert seen.asked == [reports[name].as_uri()]


@pytest.mark.parametrize("name", ["eleven", "forty", "half", "grid"])
def test_page_does_not_scroll_sideways_on_a_phone(open_page: Open, name: str) -> None:
    page = open_page(name, width=380, has_touch=True, is_mobile=True, device_scale_factor=2).page
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.evaluate(VISIT)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    # and nothing sticks out that is cut off instead
    wide = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, h3, h4, p, li, figure, svg, dl, button, .card, .answer")]
           .filter((one) => one.closest(".scroll") === null && one.getBoundingClientRect().right > 381)
           .map((one) => one.outerHTML.slice(0, 120))"""
    )
    assert wide == []


@pytest.mark.parametrize(("name", "scheme", "width"), [("eleven", "light", 1200), ("half", "dark", 380)])
def test_page_keeps_nobody_out(open_page: Open, name: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(name, width=width, scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.evaluate(VISIT)
    found = Axe().run(page).response["violations"]
    serious = [
        f"{one['id']} ({one['impact']}): {node['html'][:150]} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical", "moderate")
        for node in one["nodes"]
    ]
    assert serious == []


def test_page_shows_hostile_text_as_text(open_page: Open) -> None:
    seen = open_page("eleven")
    seen.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert seen.page.title() == "eleven – manyshot report"
    assert seen.page.locator("img").count() == 0
    shown = seen.page.locator(".said", has_text="onerror").first
    assert shown.inner_text() == HOSTILE
    right_to_left = seen.page.locator(".said", has_text="فرنسا").first
    assert right_to_left.evaluate("(one) => getComputedStyle(one).direction") == "rtl"
    assert seen.said == []


def test_policy_stops_a_script_that_slipped_through(reports: dict[str, Path], browser: Any, tmp_path: Path) -> None:
    html = reports["one"].read_text("utf-8")
    broken = html.replace("<main", "<script>document.title = 'broken'</script><img src='x.png'><main", 1)
    (tmp_path / "page.html").write_text(broken, "utf-8")
    seen = Seen(browser.new_page())
    seen.page.goto((tmp_path / "page.html").as_uri())
    until(seen.page, DRAWN)
    assert seen.page.title() == "one – manyshot report"
    assert len([line for line in seen.said if "Content Security Policy" in line]) == 2
    seen.page.close()


def test_legend_hides_a_line_in_every_panel_and_says_so(open_page: Open) -> None:
    page = open_page("eleven").page
    button = page.locator("#losses-0-legend button", has_text="pretrained")
    chart = page.locator("#losses-0-chart-0")
    chart.scroll_into_view_if_needed()
    page.wait_for_selector("#losses-0-chart-0 svg")
    before = chart.locator("svg path").count()
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert chart.locator("svg path").count() < before
    assert button.evaluate("(one) => document.activeElement === one")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert chart.locator("svg path").count() == before


def test_rounds_of_the_cosines_are_chosen(open_page: Open) -> None:
    page = open_page("eleven").page
    page.locator("select").select_option("round 2")
    assert page.locator("#drift-1-chart-1").is_visible()
    assert not page.locator("#drift-1-chart-4").is_visible()
    page.locator("#drift-1-chart-1").scroll_into_view_if_needed()
    page.wait_for_selector("#drift-1-chart-1 svg")


def test_tooltip_is_text(open_page: Open) -> None:
    seen = open_page("eleven")
    chart = seen.page.locator("#losses-0-chart-0")
    chart.scroll_into_view_if_needed()
    seen.page.wait_for_selector("#losses-0-chart-0 svg")
    chart.hover()
    tip = seen.page.locator("#losses-0-chart-0 strong")
    tip.wait_for()
    assert tip.inner_text().startswith("round ")
    assert seen.said == []


def test_colours_follow_the_system_while_the_page_is_open(open_page: Open) -> None:
    page = open_page("eleven").page
    page.evaluate(VISIT)
    light = {what: page.evaluate(colour) for what, colour in COLOURS.items()}
    page.emulate_media(color_scheme="dark")
    for what, colour in COLOURS.items():
        until(page, f"{colour} !== '{light[what]}'")
    page.emulate_media(color_scheme="light")
    for what, colour in COLOURS.items():
        until(page, f"{colour} === '{light[what]}'")


def test_paper_has_every_chart_in_light_colours_and_within_its_width(open_page: Open) -> None:
    page = open_page("eleven", scheme="dark").page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate(
        "[...document.querySelectorAll('.panel:not([hidden]) > .chart svg')].map((one) => one.clientWidth)"
    )
    charts = page.locator(".panel:not([hidden]) > .chart").count()
    assert len(widths) == charts and max(widths) <= 44 * 16
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--scheme').trim()") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--scheme').trim()") == "dark"
    assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_without_scripts_the_tables_are_there(open_page: Open, browser: Any, reports: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(reports["eleven"].as_uri())
    assert "switched off" in page.locator("noscript").inner_text()
    assert page.locator("table").count() > 10
    context.close()
