"""Scores beside the experts', and what is told of many tasks at once. Plain numbers, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any


def normalized(scores: Mapping[str, Any], experts: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Score over the expert's score per task; average, worst task, and the drop between them.

    A task whose expert scores 0 has no ratio: it is null and stays out of average and worst.
    """
    return summary({task: ratio(scores[task]["score"], experts[task]["score"]) for task in tasks})


def summary(ratios: Mapping[str, float | None]) -> dict[str, Any]:
    """Average, worst task, and the drop between them, of the tasks that have a ratio."""
    defined = {task: one for task, one in ratios.items() if one is not None}
    tasks = dict(ratios)
    if not defined:
        return {"tasks": tasks, "average": None, "worst": None, "worst_task": None, "drop": None}
    worst_task = min(defined, key=lambda task: defined[task])
    average = fmean(defined.values())
    return {
        "tasks": tasks,
        "average": average,
        "worst": defined[worst_task],
        "worst_task": worst_task,
        "drop": average - defined[worst_task],
    }


def ratio(score: float, expert: float) -> float | None:
    """Score over the expert's; None where that is 0."""
    return score / expert if expert > 0 else None


def multi_task_loss(losses: Mapping[str, Any]) -> float:
    """E(Θ) = (1/T) Σ_τ L_τ(Θ)."""
    return fmean(entry["loss"] for entry in losses.values())
