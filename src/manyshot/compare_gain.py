"""The share of an expert's gain that a model keeps: losses of unlike tasks on one scale.

    s_τ = (L_τ(Θ⁰) − L_τ(Θ)) / (L_τ(Θ⁰) − L_τ(θ_τ))        0: as the pretrained model; 1: as the task's own expert

Where the expert gained no more than SMALLEST_GAIN of the pretrained model's loss the share is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from manyshot.gap_weights import SMALLEST_GAIN
from manyshot.normalize import summary

# what decides among candidates on validation: its name in a record, and whether more of it is better
CRITERIA = {
    "multi_task_loss": ("multi_task_validation_loss", False),
    "share": ("validation_share", True),
    "worst_share": ("worst_validation_share", True),
}


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


def example_losses(said: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Numbers, one for each test example, whose mean is the loss L = Σ n_i / Σ t_i of nats n and tokens t.

    z_i = L + (N / Σ t)(n_i − L t_i): a mean of drawn z varies as L of the drawn examples does, to first order, though
    examples differ in length. None where the nats are not known.
    """
    if not said or not all("nats" in one for one in said):
        return None
    nats, tokens = [one["nats"] for one in said], [one["num_tokens"] for one in said]
    loss = math.fsum(nats) / sum(tokens)
    return [loss + len(said) / sum(tokens) * (n - loss * t) for n, t in zip(nats, tokens, strict=True)]
