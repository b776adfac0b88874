"""Recipes that an older version wrote down, as this one would: with the keys that have come since.

What says how things were done before there was a key is in content.LATER; all else is as its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from manyshot.content import LATER
from manyshot.errors import RecipeError
from manyshot.operators import OPERATORS
from manyshot.recipe_file import recipe_from_mapping, to_yaml
from manyshot.yaml_text import read_yaml

SECTIONS = ("protocol", "merge", "local_update", "evaluation")


def run_as_now(raw: Any) -> Any:
    """A run's recipe.yaml; as it is where no recipe may say that any more, so that the difference is named."""
    if not isinstance(raw, dict):
        return raw
    try:
        return read_yaml(to_yaml(recipe_from_mapping(with_later_keys(raw, SECTIONS))))
    except RecipeError:
        return raw


def with_later_keys(raw: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Settings with the keys of LATER in those of the sections, the tasks and the operator that are there."""
    found = dict(raw)
    for name in sections:
        if isinstance(raw.get(name), dict):
            found[name] = LATER[name] | raw[name]
    for name in ("tasks", "retention"):
        if isinstance(raw.get(name), dict):
            found[name] = {task: LATER["tasks"] | spec for task, spec in raw[name].items() if isinstance(spec, dict)}
    operator = raw.get("operator")
    if isinstance(operator, dict) and operator.get("name") in OPERATORS:
        known = {field.name for field in fields(OPERATORS[operator["name"]])}
        found["operator"] = {key: old for key, old in LATER["operator"].items() if key in known} | operator
    return found
