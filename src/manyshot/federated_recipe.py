"""What a server needs to know to merge the experts of clients that keep their data. Every default is stated here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from manyshot.operator_choice import OperatorChoice, WithOperator, override_problems
from manyshot.operators import Metis
from manyshot.recipe import (
    RESERVED_TASK_ENDINGS,
    TASK_NAME,
    Merge,
    Problems,
    outer_problems,
    refuse_together,
)
from manyshot.task_spec import Count, Section

TaskName = Annotated[str, Field(pattern=TASK_NAME, max_length=64)]
# settings of a merge for which somebody would have to measure merged models, and the server has no data
MEASURED = ("search_objective", "on_regression", "regression_tolerance")


class FederatedRecipe(WithOperator, Section):
    """What the server of a federation merges, and how."""

    model: str = Field(description="the pretrained model, as in a recipe; every client has the same, or is sent it")
    tasks: tuple[TaskName, ...] = Field(min_length=2, description="names that clients may give; one client each")
    rounds: Count = Field(5, description="merging rounds R")
    operator: OperatorChoice = Field(Metis(), description="as in a recipe")
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict, description="as in a recipe")
    merge: Merge = Field(Merge(), description="as in a recipe, in the space of weights")
    sends: Literal["delta", "weights"] = Field(
        "delta", description="what clients get: delta is Θʳ⁻¹ − Θ⁰ of the tensors that changed, weights the whole Θʳ⁻¹"
    )
    on_failure: Literal["stop", "skip_task_this_round"] = Field(
        "skip_task_this_round", description="when a client fails, is silent, or sends what cannot be used"
    )
    min_tasks: Annotated[int, Field(ge=1)] = Field(2, description="a round with fewer usable clients ends the run")
    seed: int = Field(0, ge=0, description="draws random masks")

    @model_validator(mode="after")
    def _fits_together(self) -> FederatedRecipe:
        refuse_together(_problems(self))
        return self


def _problems(recipe: FederatedRecipe) -> Problems:
    """(key, message) for settings that are fine alone but not together."""
    num_tasks, merge = len(recipe.tasks), recipe.merge
    found = [(f"operator.{key}", text) for key, text in recipe.method.problems(num_tasks, recipe.rounds)]
    found += override_problems(recipe.method, recipe.overrides, num_tasks, recipe.rounds)
    found += outer_problems(merge, recipe.rounds)
    if recipe.method.searches_scaling:
        text = "auto measures merged models while they are made, and the server has no data; give a number"
        found.append(("operator.scaling", text))
    if merge.space != "weights":
        found.append(("merge.space", "factors that are averaged are not ΔW; the server merges s·B·A itself"))
    for key in MEASURED:
        if getattr(merge, key) != Merge.model_fields[key].default:
            found.append((f"merge.{key}", "needs measurements of merged models, and the server has no data"))
    for name in recipe.tasks:
        if name.endswith(RESERVED_TASK_ENDINGS):
            found.append(("tasks", f"'{name}' is taken by a file or folder of the run"))
    if twice := [name for name in recipe.tasks if recipe.tasks.count(name) > 1]:
        found.append(("tasks", f"'{twice[0]}' stands there twice"))
    if recipe.min_tasks > num_tasks:
        found.append(("min_tasks", f"{recipe.min_tasks} of {num_tasks} tasks; give 1 … {num_tasks}"))
    return found
