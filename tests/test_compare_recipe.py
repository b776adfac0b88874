"""The recipe of a comparison: what is refused, by file, line and key; what a plan counts before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticCustomError
from typer.testing import CliRunner

from manyshot.cli import app
from manyshot.compare_plan import all_cells, count_steps, places, plan_compare
from manyshot.compare_recipe import changed, combinations
from manyshot.errors import RecipeError
from manyshot.operators import Metis
from manyshot.recipe_file import compare_recipe_from_mapping, load_compare_recipe

STUDIES = Path(__file__).parents[1] / "recipes" / "study"
RAW: dict[str, Any] = {
    "models": {"tiny": "some/model"},
    "tasks": {name: {"data": f"owner/{name}"} for name in "abc"},
    "preset": "paper",
    "seeds": [0, 1],
    "protocol": {"rounds": 2, "local_steps": 4},
    "methods": {"ties": {"operator": "ties"}, "metis": {"operator": "metis", "grid": {"temperature": [1.0, 2.0]}}},
}


def lines_of(raw: dict[str, Any], folder: Path) -> list[str]:
    """The problems that loading this as a file reports."""
    (folder / "grid.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_compare_recipe(folder / "grid.yaml")
    return str(caught.value).splitlines()


def with_method(**method: Any) -> dict[str, Any]:
    return {"methods": {"metis": {"operator": "metis"}, "bad": method}}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"methods": {}}, "methods: Dictionary should have at least 1 item"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"models": {}}, "models: Dictionary should have at least 1 item"),
        ({"seeds": [0, 0]}, "seeds: names a seed twice"),
        ({"task_sets": {"two": {"tasks": ["a", "x"]}}}, "task_sets.two.tasks: there is no 'x'; there are: a, b, c"),
        ({"task_sets": {"two": {"tasks": ["a", "a"]}}}, "task_sets.two.tasks: names a task twice"),
        ({"task_sets": {"two": {"tasks": ["a", "b"], "seed": [1]}}}, "task_sets.two.seed: unknown key; did you mean"),
        ({"categories": {"all": ["a", "x"]}}, "categories.all: there is no 'x'"),
        ({"retention": {"a": {"data": "owner/a"}}}, "retention.a: is trained too"),
        ({"tuning": {"seeds": [7]}}, "tuning.seeds: 7 is no seed of task set 'all'"),
        ({"tuning": {"task_set": "x"}}, "tuning.task_set: there is no 'x'; there are: all"),
        (with_method(operator="meti"), "methods.bad.operator: unknown operator 'meti'; did you mean 'metis'?"),
        (with_method(operator={"name": "metis", "temperatur": 1}), "methods.bad.operator.temperatur: unknown key"),
        (with_method(operators="metis"), "methods.bad.operators: unknown key; did you mean 'operator'?"),
        (with_method(), "methods.bad: give one of 'operator', 'joint: true' and 'ablation_of'"),
        (with_method(operator="mean", joint=True), "methods.bad: give one of"),
        (with_method(ablation_of="x", set={"mask": False}), "methods.bad.ablation_of: must name a method with an"),
        (with_method(ablation_of="metis"), "methods.bad.set: is what an ablation changes"),
        (with_method(ablation_of="metis", set={"mask": 3}), "methods.bad.set.mask: Input should be a valid boolean"),
        (with_method(ablation_of="metis", set={"maks": 3}), "methods.bad.set.maks: unknown setting; metis has:"),
        (with_method(operator="dare", grid={"density": [0.2, 7]}), "methods.bad.grid.density: "),
        (with_method(operator="dare", grid={"density": []}), "methods.bad.grid.density: has no value"),
        (with_method(joint=True, grid={"density": [0.1]}), "methods.bad.grid: needs an operator"),
        (with_method(operator="mean", task_sets=["x"]), "methods.bad.task_sets: there is no 'x'; there are: all"),
        (
            with_method(operator={"name": "metis", "min_agreement": 9}),
            "methods.bad.operator.min_agreement: 9 tasks can",
        ),
        (
            with_method(operator="mean", merge={"outer_momentum": 0.5}),
            "methods.bad.merge.outer_momentum: is part of the outer optimizer",
        ),
        (with_method(operator="mean", merge={"referenc": "start"}), "methods.bad.merge.referenc: unknown key"),
        (with_method(operator="mean", protocols=[]), "methods.bad.protocols: names none"),
        (with_method(operator="mean", protocols=["once"]), "methods.bad.protocols.0: Input should be 'post_hoc'"),
    ],
)
def test_a_wrong_key_is_refused_with_its_line(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    found = lines_of(RAW | change, tmp_path)
    assert len(found) == 1
    place, message = found[0].split(": ", 1)
    assert message.startswith(line)
    assert place.startswith(f"{tmp_path}/grid.yaml:")


def test_a_grid_with_no_cell_is_refused(tmp_path: Path) -> None:
    sets = {"two": {"tasks": ["a", "b"]}, "three": {"tasks": ["a", "b", "c"]}}
    nowhere = {"methods": {"ties": {"operator": "ties", "task_sets": []}}, "task_sets": sets}
    assert "the grid has no cell" in lines_of(RAW | nowhere, tmp_path)[0]


def test_grids_of_unlike_sizes_are_refused_unless_allowed(tmp_path: Path) -> None:
    methods = RAW["methods"] | {"dare": {"operator": "dare", "grid": {"scaling": [0.1, 0.2, 0.3]}}}
    (line,) = lines_of(RAW | {"methods": methods}, tmp_path)
    assert "grids of unlike sizes (metis 2, dare 3)" in line
    allowed = compare_recipe_from_mapping(RAW | {"methods": methods, "tuning": {"equal_budgets": False}})
    assert len(allowed.candidates("dare")) == 3


def test_combinations_are_every_choice_the_last_key_fastest() -> None:
    assert list(combinations({"a": [1, 2], "b": [3, 4]})) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    assert list(combinations({})) == [{}]


def test_changed_checks_ranges_and_leaves_the_operator_as_it_is() -> None:
    operator = Metis(temperature=5.0)
    assert changed(operator, {"mask": False}) == Metis(temperature=5.0, mask=False)
    assert operator == Metis(temperature=5.0)
    with pytest.raises(PydanticCustomError, match="greater than 0"):
        changed(operator, {"temperature": 0})


def test_steps_are_counted_by_hand() -> None:
    recipe = compare_recipe_from_mapping(RAW)
    # 3 tasks × 2 seeds × 4 steps; first rounds 3 × 2 × 2; later rounds: ties 2 seeds, metis 2 candidates and 1 seed
    expected = {"experts": 24, "first_rounds": 12, "later_rounds": 5 * 3 * 2, "joint": 0}
    assert count_steps(recipe)["by_part"] == expected
    # a cell alone is 12 steps for its experts, and 12 for each many-shot run
    assert count_steps(recipe)["one_by_one"] == 8 * 12 + 5 * 12


def test_places_begin_where_the_grids_are_searched() -> None:
    sets = {"two": {"tasks": ["a", "b"]}, "three": {"tasks": ["a", "b", "c"], "seeds": [4, 5]}}
    recipe = compare_recipe_from_mapping(RAW | {"task_sets": sets, "tuning": {"task_set": "three", "seeds": [5]}})
    assert [(place.task_set, place.seed) for place in places(recipe)] == [
        ("three", 5),
        ("three", 4),
        ("two", 0),
        ("two", 1),
    ]
    assert len(all_cells(recipe)) == 4 * 4


def merging_methods(file: Path) -> int:
    """How many methods of a study merge, and so may share their steps; joint fine-tuning has its own."""
    return sum(not method.get("joint") for method in yaml.safe_load(file.read_text("utf-8"))["methods"].values())


@pytest.mark.parametrize(
    "file",
    sorted(file for file in STUDIES.glob("*.yaml") if merging_methods(file) > 1),
    ids=lambda file: file.stem,
)
def test_the_studies_share_at_least_half_of_their_steps_and_of_those_of_the_papers_first_table(file: Path) -> None:
    raw = yaml.safe_load(file.read_text("utf-8"))
    for name, task in raw["tasks"].items():  # the data is not part of the project
        raw["tasks"][name] = {"data": f"owner/{name}", "metric": task["metric"]}
    raw["retention"] = {name: {"data": f"owner/{name}"} for name in raw.get("retention", {})}
    assert plan_compare(compare_recipe_from_mapping(raw))["steps"]["ratio"] > 2
    first_table = {"task_arithmetic", "dare", "ties", "consensus_ta"} & set(raw["methods"])
    if file.stem != "laptop":  # the others are not of the paper's table
        return
    raw["methods"] = {name: raw["methods"][name] | {"task_sets": None} for name in sorted(first_table)}
    raw["task_sets"] = dict(list(raw.get("task_sets", {}).items())[:1])
    assert plan_compare(compare_recipe_from_mapping(raw))["steps"]["ratio"] > 2


def test_plan_shows_cells_and_cost_and_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(RAW), "utf-8")
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "grid.yaml"), "--plan"])
    assert shown.exit_code == 0
    assert "model tiny" not in shown.stdout
    assert "tiny, task set all, seed 0: 4 cells" in shown.stdout
    assert "metis many_shot (grid of 2)" in shown.stdout
    assert "training: 66 steps" in shown.stdout
    assert "one by one: 156 steps, 2.36 times as many" in shown.stdout
    probe = """
import sys
from pathlib import Path
from manyshot.compare_plan import plan_compare
from manyshot.recipe_file import load_compare_recipe
plan_compare(load_compare_recipe(Path(sys.argv[1])))
print("transformers" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "grid.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
