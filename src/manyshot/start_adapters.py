"""What a task's adapters start a round from, and which of their two factors train in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder
from manyshot.training_spec import LocalUpdate


def own_adapter(recipe: Recipe, folder: RunFolder, round_index: int, task: str) -> Path | None:
    """The adapter that the task ended the round before with, where it goes on from that (`adapter_start: own`)."""
    if recipe.local_update.adapter_start != "own" or round_index == 1:
        return None
    return folder.local_update(round_index - 1, task) / "adapter"


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
