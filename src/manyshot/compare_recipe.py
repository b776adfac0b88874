"""The recipe of a comparison: methods × {post-hoc, many-shot} × seeds × task sets × backbones, in one YAML file.

Everything that a run's recipe says about tasks, training and evaluation stands here once and holds for every cell,
unless a method says otherwise.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_validator

from manyshot.compare_checks import cell_problems, method_problems, names_problems
from manyshot.compare_methods import SECTIONS, Candidate, Method, changed, choose, combinations
from manyshot.compare_spec import CompareSpec, TaskSet, Tuning
from manyshot.presets import filled_methods
from manyshot.recipe import Section, refuse_together

# the parts of it that are declared elsewhere are found here too
__all__ = ["Candidate", "CompareRecipe", "Method", "TaskSet", "Tuning", "changed", "choose", "combinations"]


class CompareRecipe(CompareSpec):
    """Everything a comparison depends on, checked."""

    @model_validator(mode="before")
    @classmethod
    def _methods_begin_as_all(cls, raw: Any) -> Any:
        """A method's own sections hold what they say, what its preset fills in, and the recipe's keys for the rest."""
        if not isinstance(raw, dict) or not isinstance(raw.get("methods"), dict):
            return raw
        raw = filled_methods(raw)
        found = {name: one for name, one in raw["methods"].items() if isinstance(one, dict)}
        whole = {name: _whole_sections(one, raw) for name, one in found.items()}
        for name, one in found.items():
            full = whole.get(str(one.get("ablation_of")))
            whole[name] = _whole_sections(one, raw if full is None else raw | _own_sections(full))
        return raw | {"methods": raw["methods"] | whole}

    @model_validator(mode="after")
    def _fits_together(self) -> CompareRecipe:
        refuse_together([*names_problems(self), *method_problems(self)])
        refuse_together(cell_problems(self))
        return self


def _own_sections(method: dict[str, Any]) -> dict[str, Any]:
    return {name: method[name] for name in SECTIONS if isinstance(method.get(name), dict)}


def _whole_sections(method: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A method whose own sections are whole; what is wrong in those of `base` is no fault of its."""
    whole = {}
    for name, own in _own_sections(method).items():
        inherited = base.get(name, {})
        whole[name] = inherited | own if _is_valid(SECTIONS[name], inherited) else own
    return method | whole


def _is_valid(section: type[Section], raw: object) -> bool:
    try:
        section.model_validate(raw)
    except ValidationError:
        return False
    return isinstance(raw, dict)
