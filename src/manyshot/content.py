"""What settings add to the names of finished work: one that comes later leaves older names as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# section -> setting -> the value that says what was done before it could be said. With that value it is no part of a
# name, whatever its default is: a setting is added here when it is added to its section (tests/test_content.py).
LATER: dict[str, dict[str, Any]] = {
    "tasks": {"steps_share": 1.0, "loss_scale": 1.0},
    "protocol": {"allocation": "even", "on_failure": "stop"},
    "operator": {"weight_memory": 0.0, "vote": "weighted", "rescale": "none"},
    "merge": {
        "outer_optimizer": "sgd",
        "outer_momentum_schedule": "constant",
        "outer_look_ahead": "always",
        "outer_beta1": 0.9,
        "outer_beta2": 0.99,
        "outer_epsilon": 1e-5,
        "search_objective": "average",
        "on_regression": "warn",
        "regression_tolerance": 0.02,
    },
    "local_update": {
        **{"train_factors": "both", "optimizer_state": "restart", "proximal": 0.0, "command": None},
        **{"launcher": "none", "launch": {}, "quantization": "none"},
    },
    "evaluation": {},
}
# (settings of an operator, number): with these it computes something else than it did under the same names. The number
# is part of the names from then on, so that what was computed before is not taken for it; a test of what operators
# compute says when one is needed (tests/test_content.py).
MEANINGS: tuple[tuple[dict[str, Any], int], ...] = ()
# sections that decide nothing of what is done
UNNAMED = ("trackers", "executor", "keep")
# settings that decide nothing of what is done, by section
SILENT: dict[str, tuple[str, ...]] = {"local_update": ("time_limit",)}


def keyed(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one section (of `tasks`, of one task) as JSON data, without those that say nothing new."""
    later, silent = LATER[section], SILENT.get(section, ())
    said = {name: value for name, value in settings.items() if name not in silent}
    found = {name: value for name, value in said.items() if name not in later or value != later[name]}
    if section == "operator":
        numbers = [number for where, number in MEANINGS if where.items() <= dict(settings).items()]
        found |= {"meaning": max(numbers)} if numbers else {}
    return found


def keyed_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a run's recipe, by section."""
    return {
        name: keyed(name, part) if name in LATER and name != "tasks" else part
        for name, part in settings.items()
        if name not in UNNAMED
    }
