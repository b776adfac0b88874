"""What an elementwise operator does, as steps that the kernels know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KEY_BITS = 32  # of a draw


def draw_limit(density: float) -> int:
    """The number that a draw stays below with this probability."""
    return round(density * (1 << KEY_BITS))


@dataclass(frozen=True)
class Operation:
    """`prepare` each task vector, then `combine` them.

    prepare: `drop` draws entries with probability `density` and divides by `rescale`; `trim` keeps each task's largest.
    combine: `sum` is scaling · Σ w v; `consensus` keeps of it what `agreement` tasks vote for at `threshold`, voting on
    w v, or on v where they vote `unweighted`, and where it is `soft` the share votes / agreement of what fewer vote
    for; `elect` averages what has the elected sign.
    """

    combine: Literal["sum", "consensus", "elect"]
    scaling: float = 1.0
    prepare: Literal["plain", "drop", "trim"] = "plain"
    density: float = 1.0
    rescale: float = 1.0
    threshold: float = 0.0
    agreement: int = 1
    unweighted: bool = False
    soft: bool = False
