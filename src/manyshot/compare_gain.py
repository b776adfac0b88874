"""The share of an expert's gain that a model keeps: losses of unlike tasks on one scale.

    s_τ = (L_τ(Θ⁰) − L_τ(Θ)) / (L_τ(Θ⁰) − L_τ(θ_τ))        0: as the pretrained model; 1: as the task's own expert

Where the expert gained no more than SMALLEST_GAIN of the pretrained model's loss the share is not defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyshot.normalize import summary

SMALLEST_GAIN = 0.01


def share(pretrained: float, loss: float, best: float) -> float | None:
    """(L_pre − L) / (L_pre − L_best); None where L_best is no more than SMALLEST_GAIN · L_pre below L_pre."""
    gain = pretrained - best
    return (pretrained - loss) / gain if gain > SMALLEST_GAIN * pretrained else None


def shares(
    pretrained: Mapping[str, float | None], losses: Mapping[str, float | None], best: Mapping[str, float | None]
) -> dict[str, Any]:
    """The share of every task, with average, worst task and drop over those that have one."""
    found: dict[str, float | None] = {}
    for task in pretrained:
        numbers = pretrained[task], losses[task], best[task]
        found[task] = share(*known) if len(known := [one for one in numbers if one is not None]) == 3 else None
    return summary(found)
