"""The page in a real browser: no error, no request, every chart drawn, readable on a phone, in the dark, on paper.

Opening a page costs seconds, and looking for barriers in a large one many: each page is opened once for each way in
which it is looked at, and barriers are looked for in small ones that have all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser_helpers import DRAWN, NEEDS_A_BROWSER, OPEN_ALL, VISIT, Seen, barriers, until
from compare_table_helpers import make_results
from manyshot.report_command import write_report
from report_helpers import HOSTILE, FakeRun, task_names, write

pytestmark = NEEDS_A_BROWSER

LONG = "a-task-name-as-long-as-a-recipe-lets-one-be-and-not-a-letter-more"[:64]
# a phone, as the page gets to know of it
PHONE = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
# the page's own colour changes at once, a chart is drawn anew a moment later
COLOURS = {
    "page": "getComputedStyle(document.body).backgroundColor",
    "chart": 'document.querySelector("#scores svg text").getAttribute("fill")',
}
SCHEME = "getComputedStyle(document.documentElement).getPropertyValue('--scheme').trim()"
# shapes in a chart that are more than its frame
SHAPES = """() => [...document.querySelectorAll(".panel:not([hidden]) > .chart")].map((chart) =>
  [chart.id, chart.querySelectorAll("svg path").length, chart.querySelectorAll("svg text").length])"""
# what sticks out of a phone's width and is cut off, so that the page does not scroll
WIDE = """() => [...document.querySelectorAll("h1, h2, h3, h4, p, li, figure, svg, dl, button, .card, .answer")]
  .filter((one) => one.closest(".scroll") === null && one.getBoundingClientRect().right > 381)
  .map((one) => one.outerHTML.slice(0, 120))"""

Report = Callable[[str], Path]
Open = Callable[..., Seen]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Pages by name, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("reports"), dict[str, Path]()

    def eleven() -> Path:
        """Eleven tasks, five rounds: as large as a run of the paper."""
        return write_report([FakeRun(folder / "eleven", task_names(11), rounds=5, layers=30).write()]).html

    def forty() -> Path:
        """Forty tasks, one of them with a long name."""
        return write_report([FakeRun(folder / "forty", [LONG, *task_names(39)], rounds=2).write()]).html

    def one() -> Path:
        """One task, one round."""
        return write_report([FakeRun(folder / "one", ["math"], rounds=1, post_hoc=False).write()]).html

    def half() -> Path:
        """A run that stopped, with a damaged record, and something that guards found."""
        run = FakeRun(folder / "half", rounds=5, done=2).write()
        (run / "round_001" / "merge.json").write_text("{", "utf-8")
        finding = {"round": 2, "tasks": ["math"], "found": "math has it all", "suggestions": ["operator.gap=relative"]}
        write(run / "round_002" / "guards.json", {"findings": [finding]})
        return write_report([run]).html

    def two() -> Path:
        """Two runs, side by side."""
        runs = [FakeRun(folder / "a", task_names(3), rounds=2), FakeRun(folder / "b", task_names(4), rounds=1, seed=1)]
        return write_report([run.write() for run in runs], folder / "two").html

    def grid() -> Path:
        """A comparison."""
        write(folder / "grid" / "results.json", make_results())
        return write_report([folder / "grid"]).html

    makers = {maker.__name__: maker for maker in (eleven, forty, one, half, two, grid)}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    return get


def load(browser: Any, report: Report, name: str, *, width: int = 1200, scheme: str = "light", **more: Any) -> Seen:
    """The page in a window of its own, when it is drawn."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    seen = Seen(context.new_page())
    seen.page.goto(report(name).as_uri())
    until(seen.page, DRAWN)
    return seen


@pytest.fixture
def open_page(browser: Any, report: Report) -> Iterator[Open]:
    opened: list[Seen] = []

    def open_(name: str, **more: Any) -> Seen:
        opened.append(load(browser, report, name, **more))
        return opened[-1]

    yield open_
    for seen in opened:
        seen.page.context.close()


@pytest.fixture(scope="module")
def eleven(browser: Any, report: Report) -> Seen:
    """The page of eleven tasks on a large screen, which tests share and leave as they found it."""
    return load(browser, report, "eleven")


def assert_drawn(seen: Seen, page: Path) -> None:
    """Every chart has shapes and text, nothing went wrong, and nothing but the page itself was asked for."""
    seen.page.evaluate(VISIT)
    shapes = seen.page.evaluate(SHAPES)
    assert shapes and all(paths > 2 and texts > 2 for _, paths, texts in shapes), shapes
    assert seen.said == []
    assert seen.asked == [page.as_uri()]


def assert_fits_a_phone(page: Any) -> None:
    """The page does not scroll sideways, and nothing sticks out that is cut off instead."""
    page.evaluate(OPEN_ALL)
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [380, 380]
    assert page.evaluate(WIDE) == []


# ---- every kind of page ----------------------------------------------------------------------------------------------


def test_page_of_eleven_tasks_draws_every_chart_without_an_error_or_a_request(eleven: Seen, report: Report) -> None:
    assert_drawn(eleven, report("eleven"))


@pytest.mark.parametrize("name", ["eleven", "forty"])
def test_page_of_many_tasks_fits_a_phone(open_page: Open, report: Report, name: str) -> None:
    seen = open_page(name, width=380, **PHONE)
    assert_drawn(seen, report(name))
    assert_fits_a_phone(seen.page)


def test_page_of_one_task_and_round_is_drawn(open_page: Open, report: Report) -> None:
    assert_drawn(open_page("one"), report("one"))


def test_page_of_a_run_keeps_nobody_out_in_the_dark_and_in_the_light(open_page: Open, report: Report) -> None:
    seen = open_page("half", width=380, scheme="dark")
    assert_drawn(seen, report("half"))
    assert_fits_a_phone(seen.page)
    assert barriers(seen.page) == []
    dark = seen.page.evaluate(COLOURS["chart"])
    seen.page.emulate_media(color_scheme="light")
    until(seen.page, f"{COLOURS['chart']} !== '{dark}'")
    assert barriers(seen.page, "color-contrast") == []


def test_page_of_two_runs_is_drawn_and_keeps_nobody_out(open_page: Open, report: Report) -> None:
    seen = open_page("two")
    assert_drawn(seen, report("two"))
    assert barriers(seen.page) == []


def test_page_of_a_comparison_is_drawn_fits_a_phone_and_keeps_nobody_out(open_page: Open, report: Report) -> None:
    seen = open_page("grid", width=380)
    assert_drawn(seen, report("grid"))
    assert barriers(seen.page) == []
    assert_fits_a_phone(seen.page)


# ---- what is text stays text -----------------------------------------------------------------------------------------


def test_page_shows_hostile_text_as_text(eleven: Seen) -> None:
    page = eleven.page
    assert page.title() == "eleven – manyshot report"
    assert page.locator("img").count() == 0
    shown = page.locator(".said", has_text="onerror").first
    assert shown.text_content() == HOSTILE
    right_to_left = page.locator(".said", has_text="فرنسا").first
    assert right_to_left.evaluate("(one) => getComputedStyle(one).direction") == "rtl"
    assert eleven.said == []


def test_policy_stops_a_script_that_slipped_through(report: Report, browser: Any, tmp_path: Path) -> None:
    html = report("one").read_text("utf-8")
    broken = html.replace("<main", "<script>document.title = 'broken'</script><img src='x.png'><main", 1)
    (tmp_path / "page.html").write_text(broken, "utf-8")
    seen = Seen(browser.new_page())
    seen.page.goto((tmp_path / "page.html").as_uri())
    until(seen.page, DRAWN)
    assert seen.page.title() == "one – manyshot report"
    assert len([line for line in seen.said if "Content Security Policy" in line]) == 2
    seen.page.close()


# ---- what people do with it ------------------------------------------------------------------------------------------


def test_legend_hides_a_line_in_every_panel_and_says_so(eleven: Seen) -> None:
    page = eleven.page
    page.evaluate(VISIT)
    button = page.locator("#losses-0-legend button", has_text="pretrained")
    paths = "[0, 10].map((i) => document.querySelectorAll(`#losses-0-chart-${i} svg path`).length)"
    before = page.evaluate(paths)
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert all(now < then for now, then in zip(page.evaluate(paths), before, strict=True))
    assert button.evaluate("(one) => document.activeElement === one")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert page.evaluate(paths) == before


def test_rounds_of_the_cosines_are_chosen(eleven: Seen) -> None:
    page, choice = eleven.page, eleven.page.locator("select")
    choice.select_option("round 2")
    page.locator("#drift-1-chart-1").wait_for(state="visible")
    assert not page.locator("#drift-1-chart-4").is_visible()
    page.evaluate(VISIT)
    until(page, "document.querySelectorAll('#drift-1-chart-1 svg path').length > 100")
    choice.select_option("round 5")
    page.locator("#drift-1-chart-4").wait_for(state="visible")


def test_tooltip_is_text(eleven: Seen) -> None:
    page = eleven.page
    page.evaluate(VISIT)
    page.locator("#losses-0-chart-0").hover()
    until(page, "document.querySelector('#losses-0-chart-0 strong')?.textContent.startsWith('round ')")
    assert eleven.said == []


def test_colours_follow_the_system_while_the_page_is_open(eleven: Seen) -> None:
    page = eleven.page
    page.evaluate(VISIT)
    light = {what: page.evaluate(colour) for what, colour in COLOURS.items()}
    page.emulate_media(color_scheme="dark")
    for what, colour in COLOURS.items():
        until(page, f"{colour} !== '{light[what]}'")
    page.emulate_media(color_scheme="light")
    for what, colour in COLOURS.items():
        until(page, f"{colour} === '{light[what]}'")


def test_paper_has_every_chart_in_light_colours_and_within_its_width(open_page: Open) -> None:
    page = open_page("half", scheme="dark").page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate(
        "[...document.querySelectorAll('.panel:not([hidden]) > .chart svg')].map((one) => one.clientWidth)"
    )
    charts = page.locator(".panel:not([hidden]) > .chart").count()
    assert len(widths) == charts and max(widths) <= 44 * 16
    assert page.evaluate(SCHEME) == "light"
    page.emulate_media(media="print")  # examples and recipe are on paper, folded or not
    seen = "[...document.querySelectorAll('.said, .resolved pre')].map((one) => one.checkVisibility())"
    assert all(page.evaluate(seen))
    page.emulate_media(media="screen")
    assert not all(page.evaluate(seen))
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(SCHEME) == "dark"
    assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_without_scripts_the_tables_are_there(browser: Any, report: Report) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report("half").as_uri())
    assert "switched off" in page.locator("noscript").inner_text()
    assert page.locator("table").count() > 10
    context.close()
