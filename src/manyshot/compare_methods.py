"""The methods of a comparison: what each runs with, and the candidates of its grid."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from manyshot.errors import suggestion
from manyshot.operator_choice import OperatorChoice, operator_adapter
from manyshot.operators import Operator
from manyshot.presets import PresetName
from manyshot.recipe import TASK_NAME, LocalUpdate, Merge, Protocol, Section

Shot = Literal["post_hoc", "many_shot"]
Name = Annotated[str, Field(pattern=TASK_NAME, max_length=64)]
Settings = dict[str, Any]
AnySection = TypeVar("AnySection", Merge, LocalUpdate, Protocol)

# sections of a run's recipe that a method may have of its own; a grid names their keys as section.key
SECTIONS: dict[str, type[Section]] = {"merge": Merge, "local_update": LocalUpdate, "protocol": Protocol}


class Method(Section):
    """One row of the tables: an operator, or joint fine-tuning on all tasks at once."""

    label: str | None = Field(None, description="how tables name it; the method's key when not given")
    operator: OperatorChoice | None = Field(None, description="as in a recipe")
    preset: PresetName | None = Field(None, exclude=True, description="as in a recipe; the comparison's when not given")
    joint: bool = Field(False, description="fine-tune one model on all tasks mixed, at the same total steps")
    protocols: tuple[Shot, ...] = Field(("post_hoc", "many_shot"), description="one merge at the end, or one per round")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="operator settings, or section.key, to choose from on validation: every combination is tried",
    )
    merge: Merge | None = Field(None, description="keys in place of those of the recipe's `merge`, for this method")
    local_update: LocalUpdate | None = Field(None, description="the same for `local_update`")
    protocol: Protocol | None = Field(None, description="the same for `protocol`")
    ablation_of: str | None = Field(None, description="another method; this one is that, as chosen, with `set` changed")
    set: Settings = Field(default_factory=dict, description="operator settings, or section.key, that it changes")
    removes: str | None = Field(None, description="what the ablation takes away, for its caption")
    task_sets: tuple[str, ...] | None = Field(None, description="only in these task sets; in all when not given")


@dataclass(frozen=True)
class Candidate:
    """What a run has beside its tasks and its seed: an operator, and how it merges, trains and goes in rounds."""

    operator: Operator
    merge: Merge
    local_update: LocalUpdate
    protocol: Protocol

    def settings(self) -> Settings:
        """section.key -> value, for all that its sections say."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in SECTIONS}
        return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}

    def differences(self, other: Candidate) -> Settings:
        """The settings that `other` has with another value."""
        theirs = other.settings()
        return {key: value for key, value in self.settings().items() if value != theirs[key]}


def combinations(grid: Mapping[str, list[Any]]) -> Iterator[Settings]:
    """Every combination of a grid's values, the last key fastest; one empty one for an empty grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def choose(candidate: Candidate, settings: Settings) -> Candidate:
    """The candidate with some settings replaced: the operator's by their names, a section's as section.key.

    All are checked as in a recipe. Raises PydanticCustomError naming one.
    """
    plain = {key: value for key, value in settings.items() if "." not in key}
    by_section: dict[str, Settings] = {}
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if dot:
            by_section.setdefault(section, {})[name] = value
    for section, named in by_section.items():
        if section not in SECTIONS:
            key = f"{section}.{next(iter(named))}"
            message = f"there is no section '{section}' to choose in; there are: {', '.join(SECTIONS)}"
            raise _refusal(key, message)
    chosen = dataclasses.replace(candidate, operator=changed(candidate.operator, plain)) if plain else candidate
    return dataclasses.replace(
        chosen, **{name: _section_changed(name, getattr(chosen, name), part) for name, part in by_section.items()}
    )


def changed(operator: Operator, settings: Settings) -> Operator:
    """The operator with some settings replaced, checked as in a recipe. Raises PydanticCustomError naming one."""
    try:
        return operator_adapter().validate_python(dataclasses.asdict(operator) | settings)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        known = [field.name for field in dataclasses.fields(operator)]
        setting = str(next((part for part in reversed(details["loc"]) if part in settings), ""))
        message = f"{details['msg']}, found {settings.get(setting)!r}"
        if details["type"] == "unexpected_keyword_argument":
            message = f"unknown setting; {operator.name} has: {', '.join(sorted(known))}"
        raise _refusal(setting, message) from None


def _section_changed(name: str, section: AnySection, settings: Settings) -> AnySection:
    """A section of a recipe with some keys replaced."""
    try:
        return type(section).model_validate(section.model_dump() | settings)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        # what does not fit together names no key: it is one of those that were changed
        setting = str(next((part for part in details["loc"] if part in settings), next(iter(settings))))
        message = f"{details['msg']}, found {settings[setting]!r}"
        if details["type"] == "extra_forbidden":
            message = f"unknown key{suggestion(setting, type(section).model_fields)}"
        raise _refusal(f"{name}.{setting}", message) from None


def _refusal(setting: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{message}", {"setting": setting, "message": message})
