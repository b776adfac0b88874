"""Names of finished work: a setting that came later changes none of them until it is used."""

from __future__ import annotations

import pytest
import torch

from manyshot import content
from manyshot.content import LATER, keyed, keyed_recipe
from manyshot.gap_weights import TaskLosses, choose_weights
from manyshot.operators import OPERATORS, merge_whole
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import content_key
from manyshot.task_spec import TaskSpec

TASKS = {"math": {"data": "owner/math", "metric": "exact_match"}, "code": {"data": "owner/code"}}


def named(operator: str) -> str:
    """What a trial with this operator and nothing else said is named after."""
    recipe = recipe_from_mapping({"model": "some/model", "tasks": TASKS, "preset": "paper", "operator": operator})
    return content_key(keyed_recipe(recipe.model_dump(mode="json", exclude={"model", "tasks"})))[:12]


# as they were when the first studies began, which find their finished work by these names
FIRST = {
    "mean": "0c39e450df44",
    "task_arithmetic": "ebf01985ed1a",
    "dare": "604f63cf38bb",
    "ties": "45f71ed80e26",
    "consensus_ta": "828050795893",
    "metis": "51e5dc8f74b5",
    "iso_c": "1800d5be0d37",
    "tsv_m": "66426b7d48ce",
}


@pytest.mark.parametrize("operator", FIRST)
def test_content_of_a_trial_keeps_its_name(operator: str) -> None:
    assert operator in OPERATORS
    assert named(operator) == FIRST[operator], "add the new setting to LATER in content.py"


def test_content_has_no_part_of_trackers() -> None:
    settings = {"trackers": {"names": ["wandb"]}, "seed": 1}
    assert keyed_recipe(settings) == {"seed": 1}


def test_content_has_no_part_of_where_tasks_run() -> None:
    assert keyed_recipe({"executor": {"name": "local", "workers": 4}, "seed": 1}) == {"seed": 1}


def test_content_of_a_local_update_a_measurement_and_a_task_keeps_its_name() -> None:
    recipe = recipe_from_mapping({"model": "some/model", "tasks": TASKS})
    update, evaluation = recipe.local_update.model_dump(mode="json"), recipe.evaluation.model_dump(mode="json")
    assert content_key(keyed("local_update", update))[:12] == "d5f6d4973b47"
    assert content_key(keyed("evaluation", evaluation))[:12] == "933e5356e23d"
    where = {"data", "train", "validation", "test", "subset", "where", "columns"}
    task = recipe.tasks["math"].model_dump(mode="json", exclude=where)
    assert content_key(keyed("tasks", task))[:12] == "c40a317baf84"


def test_content_counts_a_later_setting_only_where_it_says_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LATER, "merge", {"lookahead": 0})
    assert keyed_recipe({"merge": {"space": "weights", "lookahead": 0}, "seed": 1}) == {
        "merge": {"space": "weights"},
        "seed": 1,
    }
    assert keyed("merge", {"lookahead": 2}) == {"lookahead": 2}


def test_content_lists_only_settings_that_there_are() -> None:
    sections = {"tasks": TaskSpec, "protocol": Protocol, "merge": Merge, "local_update": LocalUpdate}
    known = {name: set(section.model_fields) for name, section in (sections | {"evaluation": Evaluation}).items()}
    known["operator"] = {name for operator in OPERATORS.values() for name in operator.__dataclass_fields__}
    assert known.keys() == LATER.keys() <= {*Recipe.model_fields}
    for section, later in LATER.items():
        assert later.keys() <= known[section], section


# ---- what operators compute under their names ------------------------------------------------------------------------

VECTORS = (
    (0.5, -1.0, 2.0, 0.25, -0.75, 0.1, 3.0, -0.2),
    (0.4, 1.5, 1.0, -0.5, -0.25, 0.2, -1.0, 0.3),
    (-0.1, 0.5, 0.75, 1.25, -2.0, -0.3, 0.6, 0.05),
)
MERGED = {
    "mean": [0.35, 0.05, 1.45, 0.225, -0.85, 0.05, 1.32, 0.0],
    "task_arithmetic": [0.14, 0.02, 0.58, 0.09, -0.34, 0.02, 0.528, 0.0],
    "dare": [-0.04, -1.0, 0.0, 0.0, 0.0, 0.0, 0.24, 0.0],
    "ties": [0.0, 1.5, 0.0, 0.0, -2.0, 0.0, 3.0, 0.0],
    "consensus_ta": [0.14, 0.02, 0.0, 0.09, -0.34, 0.02, 0.0, 0.0],
    "metis": [0.35, 0.05, 0.0, 0.225, -0.85, 0.05, 0.0, 0.0],
    "iso_c": [0.1167, 0.0167, 0.4833, 0.075, -0.2833, 0.0167, 0.44, 0.0],
    "tsv_m": [0.1167, 0.0167, 0.4833, 0.075, -0.2833, 0.0167, 0.44, 0.0],
}
LOSSES = TaskLosses(start=(2.0, 1.5, 3.0), expert=(1.0, 1.4, 2.9), pretrained=(2.5, 1.6, 2.8))
WEIGHTS = {
    "absolute": [0.439511, 0.280245, 0.280245],
    "relative": [0.37928, 0.348954, 0.271766],
    "over_expert": [0.445303, 0.27991, 0.274787],
    "over_start": [0.385047, 0.310039, 0.304914],
    "none": [1 / 3, 1 / 3, 1 / 3],
}
RENAME = "finished work with these settings is something else now: add them to MEANINGS in content.py"


@pytest.mark.parametrize("name", MERGED)
def test_content_names_of_an_operator_stand_for_the_same_merge(name: str) -> None:
    merged = merge_whole(OPERATORS[name](), torch.tensor(VECTORS), torch.tensor([0.5, 0.3, 0.2]))
    assert merged.tolist() == pytest.approx(MERGED[name], abs=1e-4), RENAME


@pytest.mark.parametrize("gap", WEIGHTS)
def test_content_names_of_a_gap_stand_for_the_same_weights(gap: str) -> None:
    operator = OPERATORS["metis"](gap=gap)  # type: ignore[call-arg]
    assert choose_weights(operator, LOSSES)[0] == pytest.approx(WEIGHTS[gap], abs=1e-6), RENAME


def test_content_of_an_operator_that_means_something_else_now_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"name": "metis", "gap": "relative"}
    before = keyed("operator", where)
    monkeypatch.setattr(content, "MEANINGS", ((where, 2), (where, 3)))
    assert keyed("operator", where) == before | {"meaning": 3}
    assert keyed("operator", where | {"gap": "absolute"}) == where | {"gap": "absolute"}
