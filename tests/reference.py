"""Every operator again: slow, obvious, one coordinate at a time, written from METHOD.md and not from the code.

The arithmetic is float32, one operation after the other in recipe order, so that a mask that depends on an equality
comes out the same. `vectors` is a list (tasks) of lists (coordinates).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Vectors = Sequence[Sequence[float]]
f32 = np.float32


def mean(vectors: Vectors, weights: Sequence[float]) -> list[np.float32]:
    """M(v) = Σ_τ w_τ v_τ."""
    merged = []
    for i in range(len(vectors[0])):
        total = f32(weights[0]) * f32(vectors[0][i])
        for task in range(1, len(vectors)):
            total = total + f32(weights[task]) * f32(vectors[task][i])
        merged.append(total)
    return merged


def metis(
    vectors: Vectors,
    weights: Sequence[float],
    *,
    mask_threshold: float = 0.3,
    min_agreement: int = 2,
    scaling: float = 1.0,
    temperature: float = 2.0,  # it made the weights; the merge itself has no use for it
) -> list[np.float32]:
    """V = Σ α_τ v_τ;  m_τ,i = 1[α_τ|v_τ,i| ≥ δ·|V_i − α_τ v_τ,i|];  M(v)_i = β V_i where Σ_τ m_τ,i ≥ k, else 0."""
    totals = mean(vectors, weights)
    merged = []
    for i, total in enumerate(totals):
        votes = 0
        for vector, weight in zip(vectors, weights, strict=True):
            own = f32(weight) * f32(vector[i])
            rest = total - own
            if abs(own) >= f32(mask_threshold) * abs(rest):
                votes += 1
        merged.append(f32(scaling) * total if votes >= min_agreement else f32(0))
    return merged


REFERENCES: dict[str, Callable[..., Any]] = {"mean": mean, "metis": metis}
