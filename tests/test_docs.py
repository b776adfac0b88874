"""What README and docs show is there: recipes load, Python runs, commands and flags exist, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

import manyshot
from manyshot.cli import app
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


def test_the_operator_in_the_readme_is_a_median() -> None:
    namespace: dict[str, object] = {}
    own, _, pure = blocks("README.md", "python")
    exec(own, namespace)
    vectors = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, 3.0]])
    median = namespace["Median"]
    assert isinstance(median, type)
    merged = median(scaling=2.0).merge(vectors, torch.ones(3), manyshot.Tile())
    assert merged.tolist() == [4.0, 8.0]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist_with_their_flags(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^(?:    )?manyshot (.*)$", page.read_text("utf-8"), re.M):
        shown = line.split("#")[0].split()
        if shown[0].startswith("-"):
            continue
        assert shown[0] in commands, f"{page.name}: manyshot {line}"
        known = {flag for option in commands[shown[0]].params for flag in (*option.opts, *option.secondary_opts)}
        used = {word.split("=")[0] for word in shown if word.startswith("-")}
        assert used <= known | {"--help"}, f"{page.name}: manyshot {line}"
