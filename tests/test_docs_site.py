"""The site of docs/: pages made from the code say what it says, it builds strictly, its pages ask for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from docs_helpers import DOCS, ROOT
from generate import outdated
from generate_keys import describe, key_pages, table
from manyshot.recipe import Recipe
from manyshot.task_spec import Section

pytest.importorskip("sphinx", reason="the site is made with the extra 'docs'")
# the flags of `make docs`
STRICT = ("--fail-on-warning", "--nitpicky", "--keep-going", "--quiet", "-b", "html")


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", *STRICT, str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- made from the code ----------------------------------------------------------------------------------------------


def test_pages_made_from_the_code_say_what_the_code_says() -> None:
    assert outdated() == [], "run python docs/generate.py"


def test_every_key_of_a_recipe_is_on_its_page() -> None:
    text = key_pages()["recipe.md"]
    for name in (*Recipe.model_fields, *Recipe.model_fields["local_update"].default.__class__.model_fields):
        assert f"| `{name}` |" in text, name


def test_a_key_without_a_description_is_an_error() -> None:
    class Silent(Section):
        """A section."""

        told: int = Field(1, description="how many")
        untold: int = 1

    assert describe("told", Silent.model_fields["told"]) == "how many"
    with pytest.raises(ValueError, match="'untold' has no description"):
        describe("untold", Silent.model_fields["untold"])


def test_cells_of_tables_stay_cells_and_text() -> None:
    assert table(("a",), [("x | <b>`<c>` ≥ 0, < 1",)]).splitlines()[2] == "| x \\| &lt;b>`<c>` ≥ 0, < 1 |"


# ---- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made as `make docs` makes it: no warning, no page apart, no link that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    for page in DOCS:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


class Requests(HTMLParser):
    """What a browser asks for when it opens a page, without a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            asks = name in ("src", "srcset", "poster", "data") or (name == "href" and tag == "link")
            if value and asks:
                self.found.append(value)


def test_pages_ask_for_nothing_from_anywhere(site: Path) -> None:
    outside = re.compile(r"^(?:\w+:)?//|^\w+:(?!image/)")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text("utf-8"))
        assert parser.found, page
        assert [one for one in parser.found if outside.match(one)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(['\"]?|@import ['\"])(?:\w+:)?//", sheet.read_text("utf-8")) == [], sheet


def test_a_broken_link_and_a_page_that_no_other_leads_to_fail_the_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path)
    (tmp_path / "index.md").write_text("# Index\n\n[gone](gone.md), [here](#nowhere)\n", "utf-8")
    (tmp_path / "alone.md").write_text("# Alone\n", "utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for said in ("target not found: 'gone.md'", "nowhere", "alone.md: WARNING: document isn't included in any toctree"):
        assert said in done.stderr


# ---- citation --------------------------------------------------------------------------------------------------------


def test_the_citation_is_the_papers_and_the_version_the_packages() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (said["version"], said["license"]) == (project["version"], project["license"])
    paper = said["preferred-citation"]
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for page in ("README.md", "docs/citation.md"):
        entry = (ROOT / page).read_text("utf-8").split("```bibtex\n")[1]
        assert f"{{{paper['title']}}}" in entry and f"{{{names}}}" in entry and str(paper["year"]) in entry
