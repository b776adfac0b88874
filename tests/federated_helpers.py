"""Clients of a federation as the server sees them: drawn adapters, drawn weights, losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyshot.federated import EXPERT, START, Returned
from manyshot.federated_client import read_expert
from manyshot.federated_recipe import FederatedRecipe
from manyshot.recipe_file import federated_recipe_from_mapping
from merge_helpers import draw, make_peft_adapter, read_model, write_model

TASKS = ("letters", "numbers", "words")
# L(Θʳ⁻¹) and L(θ) of each task: gaps of 1.5, 0.75 and 0.25
LOSSES = {"letters": (3.0, 1.5), "numbers": (2.0, 1.25), "words": (1.0, 0.75)}


def make_federation(base: Path, **settings: Any) -> FederatedRecipe:
    """The recipe of a server of three tasks and two rounds."""
    return federated_recipe_from_mapping({"model": str(base), "tasks": list(TASKS), "rounds": 2} | settings)


def told(task: str) -> dict[str, float]:
    """The losses of a task, by the names they are sent under."""
    start, expert = LOSSES.get(task, (1.0, 0.5))
    return {START: start, EXPERT: expert}


def adapter_of(folder: Path, task: str, losses: Mapping[str, float] | None = None, **shape: Any) -> Returned:
    """What a client sends that has trained an adapter, which is kept in `folder`."""
    path = make_peft_adapter(folder / task, f"{folder.name}/{task}", **shape)
    return Returned(task, *read_expert(path), told(task) if losses is None else losses, client=f"node of {task}")


def model_of(folder: Path, task: str, base: Path) -> Returned:
    """What a client sends that has trained all weights."""
    weights = {name: tensor + draw(task, name, shape=tensor.shape) for name, tensor in read_model(base).items()}
    write_model(folder / task, weights)
    return Returned(task, *read_expert(folder / task), told(task), client=f"node of {task}")
