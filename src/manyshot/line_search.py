"""The line search of `scaling: auto`: which β to try next, and how good a β is. No model, no file.

The merged model is a point on a line, Θ(β) = A + β D, where D is the operator's output with scaling 1 (`reference:
pretrained`: A = Θ⁰; `start`: A = Θʳ⁻¹ and what the outer momentum adds to it, D times the outer step size). Only losses
on validation data are needed, no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from manyshot.gap_weights import TaskLosses, relative_gaps

# models measured for one merge, at most
MOST_TRIES = 6
# β is searched from 1/8 to 8 times what makes the operator a mean, in powers of two until the best lies inside
MOST_DOUBLINGS = 3
# a β this close (log₂) to one that was tried tells nothing new: about 5 %
CLOSE = 0.07
# a gap this wide (log₂) beside the best β may hide a better one, whatever the parabola says
WIDE = 0.7
GOLDEN = (3 - math.sqrt(5)) / 2
# how far a task must be behind the worst one to count for next to nothing in `worst`
SOFTNESS = 0.1

Objective = Literal["average", "worst"]


def objective(losses: TaskLosses, kind: Objective) -> float:
    """How much of what the experts gained a model lacks, with its losses as `losses.start`: smaller is better.

    g_τ = (L_τ(β) − L_τ(θ_τ)) / (L_τ(Θ⁰) − L_τ(θ_τ)), as `gap: relative` has it (gap_weights.relative_gaps);
    average: (1/T) Σ g_τ;   worst: s · log((1/T) Σ exp(g_τ/s)), which is max g_τ to within s · log T, s = SOFTNESS.
    """
    lacking = relative_gaps(losses)
    if kind == "average":
        return fmean(lacking)
    most = max(lacking)
    return most + SOFTNESS * math.log(fmean(math.exp((one - most) / SOFTNESS) for one in lacking))


def next_scaling(tried: Mapping[float, float], unit: float) -> float | None:
    """The next β to measure after `tried` (β -> objective); None when the search is over.

    `unit` is the β that makes the operator a mean. First it and its double, then on downhill by factors of two until
    a worse β lies on either side of the best, or 1/8 or 8 units are reached; then, again and again, the lowest point
    of the parabola through the best and its neighbours, over log β, or, where that is next to one of them and a gap
    beside the best still wide, the golden section of that gap. The same losses give the same search.
    """
    points = sorted((math.log2(scaling / unit), value) for scaling, value in tried.items())
    if len(points) < 2:
        return _round(unit * 2 ** len(points))
    if len(points) >= MOST_TRIES:
        return None
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best in (0, len(points) - 1):
        further = round(points[best][0]) + (1 if best else -1)
        return _round(unit * 2.0**further) if abs(further) <= MOST_DOUBLINGS else None
    around = points[best - 1 : best + 2]
    position = lowest(around)
    if any(abs(position - x) < CLOSE for x, _ in around):
        # of gaps of the same width, the one on the lower side
        neighbour, _ = max((around[0], around[2]), key=lambda point: (abs(point[0] - points[best][0]), -point[1]))
        if abs(neighbour - points[best][0]) < WIDE:
            return None
        position = points[best][0] + GOLDEN * (neighbour - points[best][0])
    return _round(unit * 2**position)


def lowest(points: Sequence[tuple[float, float]]) -> float:
    """Where the parabola through three points is lowest; the middle one, the best, where they lie on a line."""
    (a, fa), (b, fb), (c, fc) = points
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if left == right:
        return b
    return b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)


def best_scaling(tried: Mapping[float, float]) -> float:
    """The β with the lowest objective; of equal ones the smallest."""
    return min(tried, key=lambda scaling: (tried[scaling], scaling))


def _round(scaling: float) -> float:
    """Three digits, as one would write it into a recipe."""
    return float(f"{scaling:.3g}")
