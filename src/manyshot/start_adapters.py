"""What a task's adapters start a round from, and which of their two factors train in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyshot.recipe import Recipe
from manyshot.removed import refuse_removed
from manyshot.rundir import ROLLBACK, RunFolder
from manyshot.training_spec import LocalUpdate


def last_update(folder: RunFolder, round_index: int, task: str) -> Path | None:
    """The task's last local update before a round that still counts; None where there is none.

    The one of the round before, unless the task was not in that round, or the round was rolled back.
    """
    for earlier in range(round_index - 1, 0, -1):
        place = folder.local_update(earlier, task)
        if (place / "local_update.json").exists() and not (folder.round(earlier) / ROLLBACK).exists():
            return place
    return None


def own_adapter(recipe: Recipe, folder: RunFolder, round_index: int, task: str) -> Path | None:
    """The adapter that the task ended its last round with, where it goes on from that (`adapter_start: own`)."""
    if recipe.local_update.adapter_start != "own":
        return None
    place = last_update(folder, round_index, task)
    return place / "adapter" if place is not None else None


def start_factors(adapter_start: str, folder: RunFolder, round_index: int, task: str) -> Path | None:
    """What a task's adapter of a round that is there began with: its own factors, or what was carried on to all tasks.

    None where it drew fresh ones. `adapter_start` is the recipe's. Raises RunFolderError where `keep` had it removed.
    """
    wanted = f"the expert of task '{task}' in round {round_index}"
    if adapter_start == "own" and (place := last_update(folder, round_index, task)) is not None:
        refuse_removed(folder.path, place / "adapter", wanted)
        return place / "adapter"
    carried = folder.round(round_index - 1) / "carried_adapter"
    refuse_removed(folder.path, carried, wanted)
    return carried if carried.is_dir() else None


def adapter_seed(recipe: Recipe, round_index: int, task: str) -> tuple[str | int, ...]:
    """What the first A of a task is drawn from: factors that are averaged, or that all tasks share, start equal."""
    update = recipe.local_update
    if update.train_factors != "both":
        return (recipe.seed, "adapter")
    averaged = recipe.merge.space == "factors" or update.adapter_start in ("averaged", "svd")
    return (recipe.seed, "adapter", round_index) + (() if averaged else (task,))


def freeze_factor(adapted: Any, update: LocalUpdate, round_index: int) -> None:
    """Leave out of this round's training the factor that `train_factors` says is to stay.

    b: A (FFA-LoRA, arXiv 2403.12313). alternate: A in odd rounds, B in even ones (RoLoRA, arXiv 2502.01755).
    """
    if update.train_factors == "both":
        return
    frozen = "lora_B" if update.train_factors == "alternate" and round_index % 2 == 0 else "lora_A"
    for name, parameter in adapted.named_parameters():
        if f".{frozen}." in name:
            parameter.requires_grad_(False)
