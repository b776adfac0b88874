"""What README and docs claim of the recipes and operators that they show; and that links lead somewhere.

tests/test_docs_commands.py runs what they show, tests/test_docs_site.py makes the site.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import manyshot
from conftest import TASKS
from manyshot.compare_plan import all_cells
from manyshot.recipe_file import compare_recipe_from_mapping, recipe_from_mapping, tune_recipe_from_mapping
from manyshot.tune_plan import plan_tune

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    """Fenced code of one language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def make_data(folder: Path, *names: str) -> None:
    (folder / "data").mkdir()
    for name in names:
        (folder / "data" / name).write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")


def test_the_recipe_in_the_readme_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path, "math.jsonl", "safety.jsonl", "safety.test.jsonl")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_from_mapping(yaml.safe_load(blocks("README.md", "yaml")[0]))
    assert (recipe.protocol.rounds, list(recipe.tasks)) == (5, ["math", "safety"])


def test_the_operator_in_the_docs_is_a_median() -> None:
    namespace: dict[str, object] = {}
    (own,) = blocks("docs/operators.md", "python")
    exec(own, namespace)
    vectors = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, 3.0]])
    median = namespace["Median"]
    assert isinstance(median, type)
    merged = median(scaling=2.0).merge(vectors, torch.ones(3), manyshot.Tile())
    assert merged.tolist() == [4.0, 8.0]
    (pure,) = blocks("docs/reference/python.md", "python")
    exec(pure, namespace)
    assert namespace["merged_P"].shape == (1000,)  # type: ignore[attr-defined]


def test_the_comparison_in_the_docs_loads_and_has_the_cells_it_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, "math.jsonl", "safety.jsonl", "code.jsonl", "reading.jsonl")
    monkeypatch.chdir(tmp_path)
    recipe = compare_recipe_from_mapping(yaml.safe_load(blocks("docs/compare.md", "yaml")[0]))
    # ties, fedavg and metis post-hoc and in rounds, an ablation in rounds, joint; two tasks × 3 seeds, three × 1
    assert len(all_cells(recipe)) == 8 * 4


def test_the_search_in_the_docs_loads_and_searches_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, "math.jsonl", "safety.jsonl", "code.jsonl")
    monkeypatch.chdir(tmp_path)
    recipe = tune_recipe_from_mapping(yaml.safe_load(blocks("docs/tune.md", "yaml")[0]))
    assert [one.whole for one in recipe.dimensions] == [False, False, True]
    plan = plan_tune(recipe)
    assert plan["searches"] == [{"round": index, "trials": 24} for index in range(1, 6)]
    # three tasks: an expert each, and no more than one run trains
    assert plan["steps"] == {"experts": 180, "first_round": 36, "later_rounds": 144}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- docs/run_folder.md ----------------------------------------------------------------------------------------------

TREE_LINE = re.compile(r"^    ((?:│   |    )*)[├└]── (\S+)", re.M)


def tree(page: str) -> list[tuple[str, re.Pattern[str]]]:
    """The paths of the tree of files in a page, each as a pattern; of a folder without entries, all that is in it."""
    found: list[tuple[str, int]] = []
    above: list[str] = []
    for indent, name in TREE_LINE.findall((ROOT / page).read_text("utf-8")):
        depth = len(indent) // 4
        above[depth:] = [name]
        found.append(("".join(above), depth))
    paths = [path for (path, _), after in itertools.zip_longest(found, found[1:]) if not after or path not in after[0]]
    return [(path, re.compile(pattern(path))) for path in paths]


def pattern(path: str) -> str:
    text = re.escape(path).replace(r"round_00r", r"round_00[1-9]").replace("<task>", f"({'|'.join(TASKS)})")
    return f"{text}.+" if path.endswith("/") else text


def test_the_run_folder_is_as_its_page_says(recipe_mapping: dict[str, Any], tmp_path: Path) -> None:
    recipe_mapping["evaluation"]["post_hoc"] = True
    folder = manyshot.run(recipe_mapping, tmp_path / "run").folder
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() or file.is_symlink()]
    entries = tree("docs/run_folder.md")
    untold = [file for file in files if not any(one.fullmatch(file) for _, one in entries)]
    missing = [path for path, one in entries if not any(one.fullmatch(file) for file in files)]
    assert (sorted(untold), missing) == ([], [])
