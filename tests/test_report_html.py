"""The page and its Markdown as text: what is in them, and that nothing of a run's data is ever markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from manyshot.report_build import build_report
from manyshot.report_command import write_report
from manyshot.report_html import LIBRARY, asset, embedded, render
from manyshot.report_markdown import render_markdown
from report_helpers import HOSTILE, RIGHT_TO_LEFT, FakeRun, task_names, write

ASSETS = Path(__file__).parents[1] / "src" / "manyshot" / "report_assets"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the texts inside of scripts and styles, and outside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FakeRun(tmp_path_factory.mktemp("run") / "first", task_names(11), rounds=5, layers=30).write()


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return render(build_report([folder]).page, "0.1.0")


@pytest.fixture(scope="module")
def page(html: str) -> Elements:
    return Elements(html)


# ---- nothing from outside, nothing that runs but ours ----------------------------------------------------------------


def test_nothing_in_the_page_is_loaded_from_anywhere(page: Elements) -> None:
    for tag, attributes in page.found:
        assert not {"src", "srcset", "action", "data", "poster", "background"} & set(attributes), tag
        assert all(not name.startswith("on") and name != "style" for name in attributes), tag
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#"), tag
    assert not page.all("link") + page.all("img") + page.all("iframe") + page.all("base")
    assert "@import" not in page.inside["style"][0] and "url(" not in page.inside["style"][0]


def test_the_policy_names_every_script_and_style_by_its_hash(page: Elements) -> None:
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    kinds = [one.get("type") for one in page.all("script")]
    assert kinds == ["application/json", None, None]
    for text in (*page.inside["script"][1:], *page.inside["style"]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_library_is_the_one_that_its_note_speaks_of() -> None:
    note = (ASSETS / "echarts" / "README.md").read_text("utf-8")
    digest = hashlib.sha256((ASSETS / LIBRARY).read_bytes()).hexdigest()
    assert digest in note
    assert 'version="6.1.0"' in asset(LIBRARY).replace("t.version=", "version=") and "6.1.0" in note
    assert "6.1.0" in asset("page.html.j2")
    assert "Apache License" in (ASSETS / "echarts" / "LICENSE").read_text("utf-8")
    for name in ("NOTICE", "LICENSE-d3"):
        assert (ASSETS / "echarts" / name).read_text("utf-8").strip()


def test_no_code_of_the_page_could_end_its_element_or_make_code_of_text() -> None:
    for name in (LIBRARY, "theme.js", "charts.js", "page.js"):
        assert "</script" not in asset(name).lower() and "<!--" not in asset(name)
    for name in ("theme.js", "charts.js", "page.js"):
        code = asset(name)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|fetch|http:",
            code.replace('"http://www.w3.org/2000/svg"', ""),
        ), name
    for name in ("page.html.j2", "parts.html.j2"):
        assert "safe" not in asset(name) and "autoescape" not in asset(name)


def test_assets_keep_within_their_budgets() -> None:
    for file in (*ASSETS.glob("*.js"), *ASSETS.glob("*.css"), *ASSETS.glob("*.j2")):
        assert file.read_text("utf-8").count("\n") <= 400, file.name


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028\u2029", "&amp;", "]]>", "\x00\x1f", '"\\'])
def test_embedded_json_cannot_end_its_element_and_reads_back(text: str) -> None:
    found = embedded({text: [text]})
    assert not set(found) & set("<>&\u2028\u2029")
    assert json.loads(found) == {text: [text]}


def test_embedded_json_holds_no_number_that_is_none() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded({"x": float("nan")})


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_every_chart_has_its_data_its_label_and_its_table(page: Elements) -> None:
    data = json.loads(page.inside["script"][0])
    charts = {chart["id"]: chart for figure in data["figures"] for chart in figure["charts"]}
    drawn = [one for one in page.all("div") if one.get("role") == "img"]
    assert {one["id"] for one in drawn} == set(charts)
    assert {chart["kind"] for chart in charts.values()} == {"radar", "lines", "stack", "heat", "points", "bars"}
    assert all(len(one["aria-label"] or "") > 20 for one in drawn)
    tables = [one for one in page.all("div") if one.get("role") == "region"]
    assert len(tables) >= len(data["figures"])
    assert all(one.get("tabindex") == "0" and one.get("aria-label") for one in tables)
    assert len(page.all("caption")) == len(page.all("table"))


def test_the_page_has_landmarks_a_language_and_one_heading_of_each_first_level(page: Elements) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(page.all(tag)) == 1 for tag in ("header", "nav", "main", "footer", "h1", "title"))
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [(one["href"] or "")[1:] for one in page.all("a")]
    assert set(targets) <= set(ids)
    named = [attributes["aria-labelledby"] for _, attributes in page.found if "aria-labelledby" in attributes]
    assert named and set(named) <= set(ids)


def test_prompts_and_answers_are_text_whatever_they_hold(page: Elements, html: str) -> None:
    assert HOSTILE in page.words
    assert RIGHT_TO_LEFT in page.words
    assert "<img" not in html.replace(asset(LIBRARY), "")
    said = [attributes for tag, attributes in page.found if attributes.get("class") == "said"]
    assert said and all(one["dir"] == "auto" for one in said)


def test_names_and_records_from_files_are_text_too(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", ["a", "b", "c"], rounds=1)
    run.write()
    recipe = (run.folder / "recipe.yaml").read_text("utf-8")
    (run.folder / "recipe.yaml").write_text(recipe + f"# {HOSTILE}\n", "utf-8")
    environment = {"command": HOSTILE, "base_model": {"name": HOSTILE}, "packages": {HOSTILE: HOSTILE}}
    write(run.folder / "environment.json", environment)
    finding = {"found": HOSTILE, "means": HOSTILE, "tasks": [HOSTILE], "suggestions": [HOSTILE]}
    write(run.folder / "round_001" / "guards.json", {"findings": [finding]})
    scores: dict[str, Any] = {task: {"metric": HOSTILE, "score": 0.5, "num_examples": 9} for task in run.tasks}
    write(run.folder / "round_001" / "scores.json", scores)
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(run.phase(HOSTILE, 1, "a", 1.0)) + "\n")
    text = render(build_report([run.folder]).page, "0.1.0")
    page = Elements(text)
    assert not page.all("img") and len(page.all("script")) == 3
    assert "\n".join(page.words).count("onerror=") >= 8


def test_half_a_surrogate_pair_does_not_keep_a_report_from_being_written(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", num_test=4).write()
    outputs = (folder / "round_003" / "outputs.json").read_text("utf-8")
    (folder / "round_003" / "outputs.json").write_text(outputs.replace("round_003 says math", "\\ud83d half"), "utf-8")
    result = write_report([folder])
    assert "\ufffd half" in result.html.read_text("utf-8")


def test_a_report_of_the_same_folder_is_the_same_bytes(folder: Path) -> None:
    result = write_report([folder])
    assert result.markdown is not None
    files = (result.html, result.markdown, result.data)
    before = [file.read_bytes() for file in files]
    write_report([folder])
    assert [file.read_bytes() for file in files] == before
    assert len(before[0]) < 6e6


# ---- the other two ---------------------------------------------------------------------------------------------------


def test_markdown_says_the_same_and_escapes_what_it_quotes(folder: Path) -> None:
    page = build_report([folder]).page
    text = render_markdown(page)
    assert page.verdict in text
    for title in ("All models", "Tasks", "Losses over the rounds", "Weights and loss gaps", "Coordinates kept"):
        assert f"## {title}\n" in text
    for title in ("Drift and cosines", "Scores", "Examples", "Guards", "Recipe, versions, command"):
        assert f"## {title}\n" in text
    assert "<img" not in text and "&lt;img src=x" in text
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    assert len(tables) > 15
    for table in tables:  # as many cells in every row as in the head
        rows = [re.sub(r"\\.", "", row).count("|") for row in table.splitlines()]
        assert len(set(rows)) == 1, table[:200]
    assert "!" not in [line[:1] for line in text.splitlines()]  # no pictures


def test_json_is_for_programs(folder: Path) -> None:
    found = json.loads(write_report([folder]).data.read_text("utf-8"))
    assert (found["format"], found["kind"], found["title"]) == (1, "run", "first")
    (block,) = found["blocks"]
    merged = block["subjects"][0]
    assert merged["model"]["label"] == "merged in 5 rounds"
    assert set(merged["rounds"][0]["weights"]) == set(block["tasks"])
    assert "example_scores" not in json.dumps(found)
    assert found["details"][0]["examples"]["math"][1]["prompt"] == [["", HOSTILE]]
