"""Every operator again: slow, obvious, one coordinate at a time, written from METHOD.md and not from the code.

The arithmetic is float32, one operation after the other in recipe order, so that a mask that depends on an equality
comes out the same. `vectors` is a list (tasks) of lists (coordinates). The matrix operators are float64; what is no
matrix they average, in float32 like the rest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Vectors = Sequence[Sequence[float]]
Weights = Sequence[float]
Merged = list[np.float32]
f32 = np.float32
ZERO = f32(0)


# ---- sums ------------------------------------------------------------------------------------------------------------


def mean(vectors: Vectors, weights: Weights) -> Merged:
    """M(v) = Σ_τ w_τ v_τ."""
    merged = []
    for i in range(len(vectors[0])):
        total = f32(weights[0]) * f32(vectors[0][i])
        for task in range(1, len(vectors)):
            total = total + f32(weights[task]) * f32(vectors[task][i])
        merged.append(total)
    return merged


def task_arithmetic(vectors: Vectors, weights: Weights, *, scaling: float = 0.4) -> Merged:
    """M(v) = β Σ_τ w_τ v_τ."""
    return [f32(scaling) * total for total in mean(vectors, weights)]


def matrix_operator_elsewhere(vectors: Vectors, weights: Weights, *, scaling: float = 1.0) -> Merged:
    """What a matrix operator does to a bias or a norm: β times the average of w_τ v_τ."""
    return task_arithmetic(vectors, [f32(weight) / f32(len(weights)) for weight in weights], scaling=scaling)


# ---- consensus -------------------------------------------------------------------------------------------------------


def metis(
    vectors: Vectors,
    weights: Weights,
    *,
    mask: bool | str = True,
    vote: str = "weighted",
    mask_threshold: float = 0.3,
    min_agreement: int = 2,
    rescale: str = "none",
    scaling: float = 1.0,
    temperature: float | str = 2.0,  # these four made the weights; the merge itself has no use for them
    gap: str = "absolute",
    weight_memory: float = 0.0,
    effective_tasks: float | None = None,
) -> Merged:
    """V = Σ α_τ v_τ;  m_τ,i = 1[α_τ|v_τ,i| ≥ δ·|V_i − α_τ v_τ,i|];  M(v)_i = β V_i where Σ_τ m_τ,i ≥ k, else 0.

    `soft`: β V_i min(Σ_τ m_τ,i, k)/k. `unweighted`: m_τ,i without the α. `norm`: times ‖V‖/‖M(v)/β‖.
    """
    voices = [1.0] * len(weights) if vote == "unweighted" else weights
    totals = mean(vectors, weights)
    kept = []
    for i, (total, voted) in enumerate(zip(totals, mean(vectors, voices), strict=True)):
        votes = 0
        for vector, voice in zip(vectors, voices, strict=True):
            own = f32(voice) * f32(vector[i])
            rest = voted - own
            if abs(own) >= f32(mask_threshold) * abs(rest):
                votes += 1
        if mask == "soft":
            kept.append(total * (f32(min(votes, min_agreement)) / f32(min_agreement)))
        else:
            kept.append(total if votes >= min_agreement or not mask else ZERO)
    factor = longer(totals, kept) if rescale == "norm" else 1.0
    return [f32(scaling * factor) * value for value in kept]


def longer(one: Merged, other: Merged) -> float:
    """How many times as long the first vector is, rounded once before the root; 1 where the second is zero."""
    squares = [sum(Fraction(float(value)) ** 2 for value in vector) for vector in (one, other)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 1.0


def consensus_ta(
    vectors: Vectors, weights: Weights, *, mask_threshold: float = 0.4, min_agreement: int = 2, scaling: float = 0.4
) -> Merged:
    """The same mask over the plain sum: w_τ = 1 where METIS has α_τ."""
    return metis(vectors, weights, mask_threshold=mask_threshold, min_agreement=min_agreement, scaling=scaling)


# ---- sign election ---------------------------------------------------------------------------------------------------


def elect(vectors: Vectors, weights: Weights, scaling: float) -> Merged:
    """The sign of Σ w_τ v_τ is elected (plus for zero); β times the weighted mean of the entries that have it."""
    merged = []
    for i, total in enumerate(mean(vectors, weights)):
        agreeing, divisor = ZERO, ZERO
        for vector, weight in zip(vectors, weights, strict=True):
            own = f32(weight) * f32(vector[i])
            if (own > 0) if total >= 0 else (own < 0):
                agreeing = agreeing + own
                divisor = divisor + f32(weight)
        merged.append(agreeing / divisor * f32(scaling) if divisor != 0 else ZERO)
    return merged


def trim(vector: Sequence[float], density: float) -> list[float]:
    """The ⌊density · n⌋ largest magnitudes (but one at least), of equal ones the first; zeros elsewhere."""
    num_kept = max(1, int(density * len(vector)))
    by_magnitude = sorted(range(len(vector)), key=lambda i: (-abs(f32(vector[i])), i))
    kept = set(by_magnitude[:num_kept])
    return [value if i in kept else 0.0 for i, value in enumerate(vector)]


def ties(
    vectors: Vectors, weights: Weights, *, density: float = 0.2, scaling: float = 1.0, trim_scope: str = "tensor"
) -> Merged:
    """Trim each task vector, elect signs, average what agrees. `vectors` is the whole scope of the trim."""
    return elect([trim(vector, density) for vector in vectors], weights, scaling)


# ---- DARE ------------------------------------------------------------------------------------------------------------


def tile_key(*parts: str | int) -> int:
    """The first 8 bytes, big-endian, of the SHA-256 of the parts with a unit separator between them."""
    return int(hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16], 16)


def finalise(word: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def draw(key: int, position: int) -> int:
    """A 32-bit word for one coordinate: its position and both halves of the key go through the finaliser twice.

    The page (position // 2³²) goes into both halves.
    """
    page, low = divmod(position, 2**32)
    key_high, key_low = divmod(key, 2**32)
    first = (low + key_low + finalise(page)) % 2**32
    second = key_high ^ (page * 0x9E3779B9 % 2**32)
    return finalise(finalise(first) ^ second)


def dare(
    vectors: Vectors,
    weights: Weights,
    *,
    keys: Sequence[int],
    offset: int = 0,
    density: float = 0.2,
    scaling: float = 0.4,
    then: str = "task_arithmetic",
    rescale: bool = True,
) -> Merged:
    """Keep an entry when its draw lies below density · 2³², divide by density; then a scaled sum or a sign election."""
    limit = round(density * 2**32)
    dropped = []
    for vector, key in zip(vectors, keys, strict=True):
        kept = [value if draw(key, offset + i) < limit else 0.0 for i, value in enumerate(vector)]
        dropped.append([f32(value) / f32(density if rescale else 1.0) for value in kept])
    if then == "ties":
        return elect(dropped, weights, scaling)
    return task_arithmetic(dropped, weights, scaling=scaling)


# ---- matrices --------------------------------------------------------------------------------------------------------

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def decompose(matrix: Matrix) -> list[tuple[float, Matrix, Matrix]]:
    """(σ, u, v) of every direction that is not rounding noise of float32, largest σ first."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    noise = values.max(initial=0.0) * max(matrix.shape) * 2.0**-23
    return [(values[i], left[:, i], right[i]) for i in range(len(values)) if values[i] > noise]


def iso_c(matrices: Sequence[Matrix], weights: Weights, *, scaling: float = 1.0) -> Matrix:
    """The directions of Σ w_τ v_τ, each with the mean of their singular values."""
    total = np.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total = total + weight * matrix
    directions = decompose(total)
    merged = np.zeros_like(total)
    for _, u, v in directions:
        merged += scaling * (sum(value for value, _, _ in directions) / len(directions)) * np.outer(u, v)
    return merged


def orthonormal(columns: Matrix) -> Matrix:
    """The whitening X (XᵀX)^(−½) of linearly independent columns: the nearest matrix with orthonormal ones."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ vectors @ np.diag(values**-0.5) @ vectors.T


def tsv_m(matrices: Sequence[Matrix], weights: Weights, *, scaling: float = 1.0) -> Matrix:
    """Each task's leading K/T directions, all of them made orthonormal together, with the σ they had times w_τ."""
    num_leading = max(1, min(matrices[0].shape) // len(matrices))
    lefts, values, rights = [], [], []
    for matrix, weight in zip(matrices, weights, strict=True):
        for value, u, v in decompose(matrix)[:num_leading]:
            lefts.append(u)
            values.append(weight * value)
            rights.append(v)
    if not values:
        return np.zeros_like(matrices[0])
    left, right = orthonormal(np.stack(lefts, axis=1)), orthonormal(np.stack(rights, axis=1))
    return scaling * left @ np.diag(values) @ right.T


# ---- tables ----------------------------------------------------------------------------------------------------------

# on vectors, float32
REFERENCES: dict[str, Callable[..., Merged]] = {
    "mean": mean,
    "task_arithmetic": task_arithmetic,
    "dare": dare,
    "ties": ties,
    "consensus_ta": consensus_ta,
    "metis": metis,
    "iso_c": matrix_operator_elsewhere,
    "tsv_m": matrix_operator_elsewhere,
}
# on matrices, float64
MATRIX_REFERENCES: dict[str, Callable[..., Matrix]] = {"iso_c": iso_c, "tsv_m": tsv_m}
