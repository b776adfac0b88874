"""Names of finished work: a setting that came later changes none of them until it is used."""

from __future__ import annotations

import pytest

from manyshot.content import LATER, keyed, keyed_recipe
from manyshot.operators import OPERATORS
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import content_key
from manyshot.task_spec import TaskSpec

TASKS = {"math": {"data": "owner/math", "metric": "exact_match"}, "code": {"data": "owner/code"}}


def named(operator: str) -> str:
    """What a trial with this operator and nothing else said is named after."""
    recipe = recipe_from_mapping({"model": "some/model", "tasks": TASKS, "operator": operator})
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
