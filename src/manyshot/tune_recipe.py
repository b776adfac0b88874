"""The recipe of a search: a run's recipe, and under `search` which of its merge-time settings to try, and how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from manyshot.errors import RecipeError, suggestion
from manyshot.recipe import Merge, Problems, Recipe, Section, refuse_together
from manyshot.task_spec import Count
from manyshot.tune_space import Dimension, Settings, grid_size, same

Positive = Annotated[float, Field(gt=0)]
# how many settings are tried where the recipe names no budget at all
DEFAULT_TRIALS = 20
# settings of `merge` that change what is trained, or nothing that validation could see
NOT_SEARCHED = ("space", "output_dtype")
# a point inside a range that is no whole number, whatever whole numbers the ends are
INSIDE = 0.3819660113


class Range(Section):
    """Numbers to search in."""

    low: float = Field(description="the least value")
    high: float = Field(description="the largest value")
    log: bool = Field(False, description="search in the logarithm")
    step: Positive | None = Field(None, description="only low, low + step, …")


def _form_of_values(value: object) -> str:
    return "choices" if isinstance(value, list | tuple) else "range"


Values = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[Any, ...], Field(min_length=1), Tag("choices")],
    Discriminator(_form_of_values),
]


class Search(Section):
    """What is searched for what, and for how long. Only validation splits are looked at."""

    parameters: dict[str, Values] = Field(
        min_length=1, description="operator.<setting> or merge.<setting>: {low, high, log, step}, or a list of choices"
    )
    rounds: Literal["post_hoc", "first", "each", "all"] = Field(
        "post_hoc",
        description="what a trial merges: the experts, once; round 1; every round in turn, the best one fixed; a whole "
        "run of all rounds",
    )
    objective: Literal["multi_task_loss", "share", "worst_share"] = Field(
        "multi_task_loss", description="share: of the experts' loss improvement that is kept, mean or worst task"
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="tpe: from what trials have shown so far (Optuna); random; grid: every combination"
    )
    trials: Count | None = Field(
        None, description="how many settings are tried, with rounds: each in every round; default 20, or all of a grid"
    )
    seconds: Positive | None = Field(
        None, description="no further trial begins after this time, with rounds: each of every round"
    )
    reuse: str | None = Field(
        None, description="a run or comparison whose local updates are taken where nothing about them differs"
    )

    @property
    def maximize(self) -> bool:
        return self.objective != "multi_task_loss"


class TuneRecipe(Recipe):
    """Everything a search depends on: a run, and what to try in it."""

    search: Search = Field(description="what to try")

    @model_validator(mode="after")
    def _can_be_searched(self) -> TuneRecipe:
        refuse_together(_names_problems(self) or _values_problems(self))
        return self

    @property
    def base_recipe(self) -> Recipe:
        """The run as the recipe says it, with one round where the experts are merged once."""
        protocol = {"protocol": self.protocol.model_copy(update={"rounds": 1}).model_dump(mode="json")}
        return _recipe(_raw(self) | (protocol if self.search.rounds == "post_hoc" else {}))

    @property
    def trial_recipe(self) -> Recipe:
        """The same without what a trial need not see: experts' scores, and the other way to merge."""
        recipe = self.base_recipe
        return recipe.model_copy(
            update={"evaluation": recipe.evaluation.model_copy(update={"experts": False, "post_hoc": False})}
        )

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The space, in the recipe's order."""
        return tuple(_dimension(self, name, values) for name, values in self.search.parameters.items())

    @property
    def num_trials(self) -> int | None:
        """How many trials a search has at most; None where time alone ends it."""
        if self.search.sampler == "grid":
            size = grid_size(self.dimensions)
            return min(size, self.search.trials or size)
        return self.search.trials or (None if self.search.seconds else DEFAULT_TRIALS)

    @property
    def searched_rounds(self) -> tuple[int, ...]:
        """Rounds whose merge is searched, one after the other; 0 stands for a whole run."""
        rounds = {"post_hoc": 1, "first": 1, "each": self.protocol.rounds}
        return (0,) if self.search.rounds == "all" else tuple(range(1, rounds[self.search.rounds] + 1))

    @property
    def needs_experts(self) -> bool:
        """Whether every task is also trained alone, with all its steps."""
        return self.search.rounds == "post_hoc" or self.search.objective != "multi_task_loss"


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The run with some settings (`operator.scaling`, …) replaced. Raises RecipeError where that is no run."""
    try:
        return _changed(recipe, settings)
    except ValidationError as error:
        raise RecipeError(_message(error)) from None


def _changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    raw = _raw(recipe)
    for name, value in settings.items():
        section, setting = name.split(".", 1)
        raw[section] = raw[section] | {setting: value}
    return _recipe(raw)


def setting_of(recipe: Recipe, name: str, round_index: int) -> Any:
    """The recipe's own value of a setting, that of the round where there is one per round."""
    section, setting = name.split(".", 1)
    value = _raw(recipe)[section].get(setting)
    return value[round_index - 1] if isinstance(value, list) and len(value) >= round_index > 0 else value


def own_settings(recipe: Recipe, dimensions: tuple[Dimension, ...], round_index: int) -> Settings | None:
    """The recipe's own values of what is searched; None where the space does not hold them."""
    found = {dimension.name: setting_of(recipe, dimension.name, round_index) for dimension in dimensions}
    return found if all(dimension.holds(found[dimension.name]) for dimension in dimensions) else None


def per_round(chosen: Mapping[int, Settings], settings: Settings, rounds: int) -> Settings:
    """One value per round: those that are chosen, and for the rounds after them those of `settings`."""
    return {
        name: [chosen.get(index, settings)[name] for index in range(1, rounds + 1)] if rounds > 1 else value
        for name, value in settings.items()
    }


def _message(error: ValidationError) -> str:
    """The first problem of a run that cannot be: which setting, and why."""
    details = error.errors(include_url=False)[0]
    if details["type"] == "cross":
        return "; ".join(f"{key} {text}" for key, text in details["ctx"]["problems"])
    found = f", found {details['input']!r}" if isinstance(details["input"], str | int | float | bool) else ""
    return f"{details['msg']}{found}"


def _raw(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=set(Recipe.model_fields))


def _recipe(raw: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(raw)


def _dimension(recipe: Recipe, name: str, values: Range | tuple[Any, ...]) -> Dimension:
    if not isinstance(values, Range):
        return Dimension(name, choices=values)
    return Dimension(
        name,
        low=values.low,
        high=values.high,
        log=values.log,
        step=values.step,
        whole=_takes_whole_numbers(recipe, name, values),
    )


def _takes_whole_numbers(recipe: Recipe, name: str, values: Range) -> bool:
    """Whether the setting refuses a number for having a fraction; then only whole numbers are searched."""
    if any(number is not None and not number.is_integer() for number in (values.low, values.high, values.step)):
        return False
    try:
        _changed(recipe, {name: values.low + INSIDE * (values.high - values.low)})
    except ValidationError as error:
        return any(details["type"] == "int_from_float" for details in error.errors(include_url=False))
    return False


# ---- what cannot be searched -----------------------------------------------------------------------------------------


def _names_problems(recipe: TuneRecipe) -> Problems:
    """Settings that there are not, ranges and lists that say nothing, and a grid without an end."""
    found: Problems = []
    known = {
        "operator": [field.name for field in dataclasses.fields(recipe.method) if field.name != "name"],
        "merge": [name for name in Merge.model_fields if name not in NOT_SEARCHED],
    }
    for name, values in recipe.search.parameters.items():
        key = f"search.parameters.{name}"
        section, _, setting = name.partition(".")
        if section not in known or not setting:
            found.append((key, "is no setting of a merge; give operator.<setting> or merge.<setting>"))
        elif setting not in known[section]:
            what = f"operator {recipe.method.name}" if section == "operator" else "what is searched of merge"
            others = suggestion(setting, known[section]) if known[section] else "; it has no settings"
            found.append((key, f"{what} has no '{setting}'{others}"))
        elif isinstance(values, Range):
            found += _range_problems(key, values) or _grid_problems(recipe, name, values)
        elif twice := [one for i, one in enumerate(values) if any(same(one, other) for other in values[:i])]:
            found.append((key, f"names {twice[0]!r} twice"))
    return found


def _range_problems(key: str, values: Range) -> Problems:
    found: Problems = []
    if values.low >= values.high:
        found.append((f"{key}.low", f"{values.low:g} is not below high, {values.high:g}"))
    if values.log and values.low <= 0:
        found.append((f"{key}.low", f"{values.low:g} has no logarithm; with log: true low must be above 0"))
    if values.log and values.step is not None:
        found.append((f"{key}.step", "steps are even, which log: true is not; give one of both"))
    elif values.step is not None and values.step > values.high - values.low > 0:
        found.append((f"{key}.step", f"{values.step:g} is more than the range, {values.high - values.low:g}"))
    return found


def _grid_problems(recipe: TuneRecipe, name: str, values: Range) -> Problems:
    finite = not values.log and (values.step is not None or _takes_whole_numbers(recipe, name, values))
    if recipe.search.sampler != "grid" or finite:
        return []
    return [(f"search.parameters.{name}", "a grid needs a list of choices, or a range with a step")]


def _values_problems(recipe: TuneRecipe) -> Problems:
    """Values that the run would refuse: alone, and beside the first ones of all other settings."""
    try:
        base = recipe.base_recipe
    except ValidationError as error:
        return [("search.rounds", f"post_hoc merges once, and then {_message(error)}")]
    points = [
        (dimension.name, where, value) for dimension in recipe.dimensions for where, value in _outermost(dimension)
    ]
    found: Problems = []
    rounds = base.protocol.rounds
    for name, where, value in points:
        if (problem := _problem(base, {name: value}, alone=True)) is not None:
            found.append((where, problem))
        elif recipe.search.rounds == "each" and _problem(base, per_round({}, {name: value}, rounds), alone=True):
            found.append((where, "cannot be set round by round; search it with rounds: first or all"))
    if found:
        return list(dict.fromkeys(found))
    first = {dimension.name: _outermost(dimension)[0][1] for dimension in recipe.dimensions}
    if (problem := _problem(base, first)) is not None:
        return [("search.parameters", f"the first values of all settings together: {problem}")]
    for name, where, value in points:
        if (problem := _problem(base, first | {name: value})) is not None:
            found.append((where, f"{value!r} beside the first values of the others: {problem}"))
    return found


def _outermost(dimension: Dimension) -> list[tuple[str, Any]]:
    """Where in the recipe each choice stands, or each end of the range, and what it is."""
    key = f"search.parameters.{dimension.name}"
    if dimension.choices:
        return [(key, choice) for choice in dimension.choices]
    ends = {"low": dimension.low, "high": dimension.high}
    return [(f"{key}.{end}", dimension.number(number)) for end, number in ends.items()]


def _problem(base: Recipe, settings: Settings, alone: bool = False) -> str | None:
    """Why a run with these settings cannot be; `alone`: whatever the other sections say."""
    try:
        _changed(base, settings)
    except ValidationError as error:
        cross = error.errors(include_url=False)[0]["type"] == "cross"
        return None if cross and alone else _message(error)
    return None
