"""A recipe's operator: any of the table, by its name or with settings, and the others that `overrides` make of it."""

from __future__ import annotations

import dataclasses
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from manyshot.operators import OPERATORS, Operator, OperatorPlan
from manyshot.task_spec import Problems


def _operator_from_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _operator_union() -> Any:
    union: Any = None
    for operator in OPERATORS.values():
        union = operator if union is None else union | operator
    return Annotated[union, Field(discriminator="name"), BeforeValidator(_operator_from_name)]


# any operator of the table, by its name alone or with settings
OperatorChoice: TypeAlias = _operator_union()  # type: ignore[valid-type]

# settings that decide the weights, of which one merge has one set
WEIGHT_SETTINGS = ("temperature", "gap", "effective_tasks", "weight_memory")


@cache
def operator_adapter() -> TypeAdapter[Operator]:
    """Made once: making it takes longer than reading a recipe."""
    return TypeAdapter(OperatorChoice)


def make_plan(operator: Operator, overrides: dict[str, dict[str, Any]]) -> OperatorPlan:
    """The operators that `overrides` make of the recipe's one: its settings with others in their place, or another
    operator where `name` says so. Raises PydanticCustomError that names pattern and setting.
    """
    adapter, made = operator_adapter(), []
    for pattern, settings in overrides.items():
        name = settings.get("name", operator.name)
        same = {} if name != operator.name else dataclasses.asdict(operator)
        try:
            made.append((pattern, adapter.validate_python(same | settings | {"name": name})))
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            setting = next((part for part in reversed(details["loc"]) if part in settings), "name")
            message, found = details["msg"], details["input"]
            if details["type"] == "union_tag_invalid":
                message, found = f"unknown operator; there are: {', '.join(sorted(OPERATORS))}", name
            elif details["type"] == "unexpected_keyword_argument":
                known = sorted(field.name for field in dataclasses.fields(OPERATORS[name]))
                message = f"unknown key; there are: {', '.join(known)}"
            raise PydanticCustomError(
                "override",
                "{setting}: {message}, found {found}",
                {"pattern": pattern, "setting": setting, "message": message, "found": repr(found)},
            ) from None
    return OperatorPlan(operator, tuple(made))


def override_problems(
    operator: Operator, overrides: dict[str, dict[str, Any]], num_tasks: int, rounds: int
) -> Problems:
    """(key, message) for overrides that do not fit the operator, the tasks or the rounds."""
    found: Problems = []
    try:
        plan = make_plan(operator, overrides)
    except PydanticCustomError as error:
        context = error.context or {}
        return [(f"overrides.{context['pattern']}", error.message())]
    for (pattern, settings), (_, made) in zip(overrides.items(), plan.overrides, strict=True):
        key = f"overrides.{pattern}"
        found += [(f"{key}.{name}", text) for name, text in made.problems(num_tasks, rounds)]
        found += [
            (f"{key}.{name}", "decides the weights, of which a merge has one set; set it under operator")
            for name in WEIGHT_SETTINGS
            if name in settings
        ]
        if made.searches_scaling and not operator.searches_scaling:
            found.append((f"{key}.scaling", "auto is one search for the whole merge; set it under operator"))
        if made.uses_loss_gaps and not operator.uses_loss_gaps:
            found.append((key, f"{made.name} takes its weights from loss gaps; make it the operator itself"))
    return found


class WithOperator:
    """A recipe with an operator, and maybe other ones for some tensors."""

    if TYPE_CHECKING:  # declared in each recipe, at their places among its keys
        operator: OperatorChoice
        overrides: dict[str, dict[str, Any]]

    @property
    def method(self) -> Operator:
        """The operator, typed."""
        operator: Operator = self.operator
        return operator

    @cached_property
    def plan(self) -> OperatorPlan:
        """The operator of every tensor."""
        return make_plan(self.method, self.overrides)
