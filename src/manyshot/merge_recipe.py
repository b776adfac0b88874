"""What to merge, once: a base, experts that exist already, an operator. Every default is stated here."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from manyshot.gap_weights import needs_gaps
from manyshot.operator_choice import OperatorChoice, WithOperator, make_plan, override_problems
from manyshot.operators import OperatorPlan, TaskArithmetic
from manyshot.presets import WithPreset
from manyshot.recipe import TASK_NAME, Problems, Section, refuse_together

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?[bB]?)\s*$")


def parse_size(text: object) -> object:
    """`5GB`, `500MB` or a number of bytes -> bytes."""
    if isinstance(text, str) and (match := SIZE.match(text)):
        unit = match[2].upper()
        unit = f"{unit}B" if unit in ("K", "M", "G", "T") else unit
        return int(float(match[1]) * UNITS[unit])
    return text


class ExpertSpec(Section):
    """One model to merge: a folder (with its own weights), or a PEFT adapter on the base."""

    path: str = Field(description="Hub id, model folder, adapter folder or .gguf file")
    weight: float | None = Field(None, description="a share for mean and metis, a multiplier for the others")
    validation: str | None = Field(None, description="examples for the loss gap, where the operator wants one")
    columns: dict[str, str] = Field(default_factory=dict, description="our column name: the name in the file")
    format: Literal["auto", "chat", "plain"] = Field("auto", description="as in a task of a recipe")
    system_prompt: str | None = Field(None, description="as in a task of a recipe")


class MergeRecipe(WithOperator, WithPreset):
    """Everything a merge depends on."""

    base: str = Field(description="Hub id, local folder or .gguf file that the experts were trained from")
    experts: dict[Annotated[str, Field(pattern=TASK_NAME, max_length=200)], ExpertSpec] = Field(
        min_length=1, description="what is merged, each by its name"
    )
    operator: OperatorChoice = Field(TaskArithmetic(), description="as in a recipe")
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict, description="as in a recipe")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="as in the base when not given")
    shard_size: Annotated[int, Field(ge=1), BeforeValidator(parse_size)] = Field(
        5_000_000_000, description="largest file of weights, such as 5GB"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens of a validation example")
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="validation examples at once")
    loss_on: Literal["completion", "whole_text"] = Field("completion", description="which tokens loss gaps count")
    seed: int = Field(0, ge=0, description="draws DARE's masks")
    notes: tuple[str, ...] = Field((), description="what the file this was read from means in a slightly other way")

    @model_validator(mode="after")
    def _fits_together(self) -> MergeRecipe:
        refuse_together(merge_problems(self))
        return self

    @cached_property
    def plan(self) -> OperatorPlan:
        """The operator of every tensor, in the only round there is."""
        return make_plan(self.method, self.overrides).at_round(1)

    @property
    def needs_gaps(self) -> bool:
        """Whether the weights have to be made from loss gaps."""
        return needs_gaps(self.method) and all(expert.weight is None for expert in self.experts.values())

    def given_weights(self) -> list[float]:
        """The experts' weights where no loss gap is needed: those given, or equal ones; shares sum to 1."""
        multiplier = self.method.weighting == "multiplier"
        weights = [1.0 if expert.weight is None else expert.weight for expert in self.experts.values()]
        total = 1.0 if multiplier else sum(weights)
        return [weight / total for weight in weights]


def merge_problems(recipe: MergeRecipe) -> Problems:
    """(key, message) for settings that are fine alone but not together."""
    num = len(recipe.experts)
    found = [(f"operator.{key}", text) for key, text in recipe.method.problems(num, 1)]
    found += override_problems(recipe.method, recipe.overrides, num, 1)
    if recipe.method.searches_scaling:
        text = (
            "auto measures merged models while they are made, and a merge writes one model; give a number, or let "
            "`manyshot run` do it: rounds: 1, and each model as its task's `expert`"
        )
        found.append(("operator.scaling", text))
    given = {name: expert.weight for name, expert in recipe.experts.items() if expert.weight is not None}
    if given and len(given) < num:
        missing = next(name for name in recipe.experts if name not in given)
        found.append((f"experts.{missing}.weight", "is missing; give every expert a weight, or none"))
    shares = recipe.method.weighting == "normalized"
    negative = [name for name, weight in given.items() if shares and weight < 0]
    if negative:
        text = f"{given[negative[0]]:g} is negative, and {recipe.method.name} takes shares"
        found.append((f"experts.{negative[0]}.weight", text))
    elif given and shares and sum(given.values()) == 0:
        found.append(("experts", f"the weights sum to 0; {recipe.method.name} divides by their sum"))
    elif given and all(weight == 0 for weight in given.values()):
        found.append(("experts", "every weight is 0, so nothing would be merged"))
    if recipe.needs_gaps:
        missing_data = [name for name, expert in recipe.experts.items() if expert.validation is None]
        if missing_data:
            text = f"{recipe.method.name} weighs by loss gaps: give each expert validation data, or each a weight"
            found.append((f"experts.{missing_data[0]}.validation", text))
    return found
