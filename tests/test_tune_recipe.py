"""The recipe of a search: what it takes, what it refuses and how, and the space that it spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyshot.errors import RecipeError
from manyshot.recipe_file import load_tune_recipe, tune_recipe_from_mapping
from manyshot.tune_plan import plan_tune
from manyshot.tune_recipe import TuneRecipe, own_settings, per_round, with_settings
from manyshot.tune_space import grid, same

Json = dict[str, Any]
Make = Callable[..., TuneRecipe]
TEMPERATURE = {"operator.temperature": {"low": 0.1, "high": 10.0, "log": True}}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make({parameters}, rounds="each", …): three tasks, four rounds of two steps, METIS from the round's start."""
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("{}\n", "utf-8")
    raw: Json = {
        "model": "owner/model",
        "tasks": {name: {"data": str(tmp_path / f"{name}.jsonl")} for name in "abc"},
        "protocol": {"rounds": 4, "local_steps": 8},
        "preset": "paper",
        "merge": {"reference": "start"},
    }

    def made(parameters: Json, sections: Json | None = None, **search: Any) -> TuneRecipe:
        return tune_recipe_from_mapping(raw | (sections or {}) | {"search": {"parameters": parameters} | search})

    return made


REFUSED: dict[str, tuple[Json, Json, str]] = {
    "unknown parameter": (
        {"operator.temprature": [1.0]},
        {},
        "search.parameters.operator.temprature: operator metis has no 'temprature'; did you mean 'temperature'?",
    ),
    "parameter that the operator lacks": (
        TEMPERATURE,
        {"sections": {"operator": "mean"}},
        "search.parameters.operator.temperature: operator mean has no 'temperature'",
    ),
    "unknown section": (
        {"local_update.rank": [2, 4]},
        {},
        "search.parameters.local_update.rank: is no setting of a merge; give operator.<setting> or merge.<setting>",
    ),
    "setting that changes the experts": (
        {"merge.space": ["weights", "factors"]},
        {},
        "search.parameters.merge.space: what is searched of merge has no 'space'",
    ),
    "no section": ({"temperature": [1.0]}, {}, "search.parameters.temperature: is no setting of a merge"),
    "low above high": (
        {"operator.temperature": {"low": 3, "high": 1}},
        {},
        "search.parameters.operator.temperature.low: 3 is not below high, 1",
    ),
    "logarithm of zero": (
        {"operator.mask_threshold": {"low": 0, "high": 1, "log": True}},
        {},
        "search.parameters.operator.mask_threshold.low: 0 has no logarithm",
    ),
    "even steps in a logarithm": (
        {"operator.temperature": {"low": 1, "high": 3, "log": True, "step": 1}},
        {},
        "search.parameters.operator.temperature.step: steps are even",
    ),
    "step beyond the range": (
        {"operator.temperature": {"low": 1, "high": 3, "step": 5}},
        {},
        "search.parameters.operator.temperature.step: 5 is more than the range, 2",
    ),
    "end that the operator refuses": (
        {"operator.mask_threshold": {"low": -1, "high": 1}},
        {},
        "search.parameters.operator.mask_threshold.low: Input should be greater than or equal to 0, found -1.0",
    ),
    "choice that the operator refuses": (
        {"operator.gap": ["none", "relatve"]},
        {},
        "search.parameters.operator.gap: Input should be",
    ),
    "choice named twice": ({"operator.scaling": [1, 1.0]}, {}, "search.parameters.operator.scaling: names 1.0 twice"),
    "value that does not fit the tasks": (
        {"operator.min_agreement": {"low": 2, "high": 4}},
        {},
        "search.parameters.operator.min_agreement.high: 4 beside the first values of the others: "
        "operator.min_agreement 4 tasks can never agree among 3",
    ),
    "values that never fit together": (
        {"merge.outer_momentum": [0.5, 0.9], "merge.reference": ["pretrained", "start"]},
        {},
        "search.parameters: the first values of all settings together: merge.outer_momentum is part of",
    ),
    "one value for all rounds": (
        {"operator.gap": ["none", "relative"]},
        {"rounds": "each"},
        "search.parameters.operator.gap: cannot be set round by round; search it with rounds: first or all",
    ),
    "per-round values merged once": (
        TEMPERATURE,
        {"sections": {"operator": {"name": "metis", "scaling": [1, 1, 1, 1]}}},
        "search.rounds: post_hoc merges once, and then operator.scaling has 4 values for 1 rounds",
    ),
    "grid without an end": (TEMPERATURE, {"sampler": "grid"}, "a grid needs a list of choices, or a range with a step"),
    "no trials": (TEMPERATURE, {"trials": 0}, "search.trials: Input should be greater than or equal to 1, found 0"),
    "no time": (TEMPERATURE, {"seconds": 0}, "search.seconds: Input should be greater than 0, found 0"),
    "nothing to search": ({}, {}, "search.parameters: Dictionary should have at least 1 item"),
    "no choice": ({"operator.mask": []}, {}, "search.parameters.operator.mask: Tuple should have at least 1 item"),
    "neither range nor list": ({"operator.mask": True}, {}, "search.parameters.operator.mask: Input should be"),
    "unknown key of a range": (
        {"operator.temperature": {"low": 1, "high": 2, "logs": True}},
        {},
        "search.parameters.operator.temperature.logs: unknown key; did you mean 'log'? there are: high, log, low, step",
    ),
    "unknown key of the search": (TEMPERATURE, {"trial": 3}, "search.trial: unknown key; did you mean 'trials'?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_search_that_cannot_be_meant_names_the_key_and_what_is_allowed(make: Make, case: str) -> None:
    parameters, changes, message = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        make(parameters, **changes)
    assert message in str(caught.value)


def test_all_problems_of_a_search_come_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n", "utf-8")
    path = tmp_path / "search.yaml"
    path.write_text(
        "model: owner/model\n"
        "tasks: {a: {data: a.jsonl}, b: {data: a.jsonl}}\n"
        "search:\n"
        "  parameters:\n"
        "    operator.temperature: {low: 2, high: 1}\n"
        "    operator.sharpness: [1]\n",
        "utf-8",
    )
    with pytest.raises(RecipeError) as caught:
        load_tune_recipe(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:5: search.parameters.operator.temperature.low: ")
    assert second.startswith(f"{path}:6: search.parameters.operator.sharpness: operator metis has no 'sharpness'")


def test_a_setting_that_takes_whole_numbers_is_searched_over_whole_numbers(make: Make) -> None:
    agreement, scaling = make(
        {"operator.min_agreement": {"low": 1, "high": 3}, "operator.scaling": {"low": 1, "high": 3}}
    ).dimensions
    assert (agreement.whole, scaling.whole) == (True, False)
    assert agreement.values() == [1, 2, 3]
    assert [type(value) for value in agreement.values()] == [int, int, int]


def test_a_grid_is_every_combination_and_has_so_many_trials(make: Make) -> None:
    parameters = {"operator.scaling": {"low": 0.1, "high": 0.3, "step": 0.1}, "operator.mask": [True, False]}
    recipe = make(parameters, sampler="grid")
    assert [tuple(settings.values()) for settings in grid(recipe.dimensions)] == [
        (scaling, mask) for scaling in (0.1, 0.2, 0.3) for mask in (True, False)
    ]
    assert recipe.num_trials == 6
    assert make(parameters, sampler="grid", trials=4).num_trials == 4


def test_the_budget_is_trials_or_time_or_twenty_trials(make: Make) -> None:
    assert make(TEMPERATURE).num_trials == 20
    assert make(TEMPERATURE, trials=7, seconds=60).num_trials == 7
    assert make(TEMPERATURE, seconds=60).num_trials is None


def test_the_recipes_own_settings_count_where_the_space_holds_them(make: Make) -> None:
    own = {"sections": {"operator": {"name": "metis", "temperature": [0.2, 0.3, 0.4, 50.0]}}, "rounds": "each"}
    recipe = make(TEMPERATURE, **own)
    found = [own_settings(recipe.base_recipe, recipe.dimensions, index) for index in (1, 2, 3, 4)]
    assert found == [{"operator.temperature": 0.2}, {"operator.temperature": 0.3}, {"operator.temperature": 0.4}, None]
    auto = make(TEMPERATURE, {"operator": {"name": "metis", "temperature": "auto"}})
    assert own_settings(auto.base_recipe, auto.dimensions, 1) is None


def test_a_post_hoc_search_is_of_a_run_with_one_round_and_others_of_the_recipes_run(make: Make) -> None:
    assert make(TEMPERATURE).base_recipe.protocol.rounds == 1
    recipe = make(TEMPERATURE, {"evaluation": {"post_hoc": True}}, rounds="first")
    assert recipe.base_recipe.model_dump() == {k: v for k, v in recipe.model_dump().items() if k != "search"}
    assert (recipe.trial_recipe.evaluation.experts, recipe.trial_recipe.evaluation.post_hoc) == (False, False)


def test_rounds_that_are_not_searched_yet_take_the_value_that_is_tried(make: Make) -> None:
    chosen = {1: {"operator.temperature": 3.0}, 2: {"operator.temperature": 2.0}}
    settings = per_round(chosen, {"operator.temperature": 1.0}, 4)
    assert settings == {"operator.temperature": [3.0, 2.0, 1.0, 1.0]}
    recipe = with_settings(make(TEMPERATURE, rounds="each").base_recipe, settings)
    assert [recipe.method.at_round(index).temperature for index in (1, 2, 3, 4)] == [3.0, 2.0, 1.0, 1.0]


def test_settings_that_are_no_run_together_are_an_error_that_says_why(make: Make) -> None:
    recipe = make({"merge.outer_momentum": [0, 0.9], "merge.reference": ["start", "pretrained"]})
    with pytest.raises(RecipeError, match=r"merge\.outer_momentum is part of the outer optimizer"):
        with_settings(recipe.base_recipe, {"merge.outer_momentum": 0.9, "merge.reference": "pretrained"})


def test_same_tells_true_from_one_and_not_lists_from_tuples() -> None:
    assert same(1, 1.0)
    assert same([1, 2.0], (1.0, 2))
    assert not same(1, True)
    assert not same([1], [True])
    assert not same([1], [1, 2])


def test_plan_counts_what_each_kind_of_search_trains_and_merges(make: Make) -> None:
    # three tasks with 8 steps in 4 rounds of 2
    post_hoc = plan_tune(make(TEMPERATURE, trials=5))
    assert post_hoc["steps"] == {"experts": 24, "first_round": 0}
    assert (post_hoc["merges"], post_hoc["test_examples"]) == (6, 0)
    # the pretrained model, experts, and six merged models, on 100 examples of three tasks
    assert post_hoc["validation_examples"] == (1 + 1 + 6) * 300
    first = plan_tune(make(TEMPERATURE, trials=5, rounds="first"))
    assert first["steps"] == {"experts": 0, "first_round": 6}
    each = plan_tune(make(TEMPERATURE, trials=5, rounds="each", objective="share"))
    assert each["steps"] == {"experts": 24, "first_round": 6, "later_rounds": 18}
    assert [search["round"] for search in each["searches"]] == [1, 2, 3, 4]
    assert each["merges"] == 4 * 6
    whole = plan_tune(make(TEMPERATURE, trials=5, rounds="all"))
    assert whole["steps"] == {"experts": 0, "first_round": 6, "later_rounds": 5 * 18}
    assert whole["merges"] == 5 * 4
    endless = plan_tune(make(TEMPERATURE, seconds=9, rounds="all"))
    assert endless["searches"] == [{"round": 0, "trials": None}]
    assert endless["steps"]["later_rounds"] == 18
