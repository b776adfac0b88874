"""The inner loops of a merge: compiled (kernels.c, tiles.c) where that was possible, else torch, with the same bits.

`compiled()` says which. What works on torch tensors (elementwise.py) is loaded when first used: torch takes seconds to
load, and a merge of stored models through the compiled kernels (pieces.py) does without.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manyshot.kernels import _native
from manyshot.kernels._native import Source
from manyshot.kernels._operation import Operation, draw_limit

if TYPE_CHECKING:
    from manyshot.kernels.elementwise import add_to as add_to
    from manyshot.kernels.elementwise import apply as apply
    from manyshot.kernels.elementwise import consensus as consensus
    from manyshot.kernels.elementwise import count_equal as count_equal
    from manyshot.kernels.elementwise import drop as drop
    from manyshot.kernels.elementwise import elect_and_average as elect_and_average
    from manyshot.kernels.elementwise import histogram_high as histogram_high
    from manyshot.kernels.elementwise import histogram_low as histogram_low
    from manyshot.kernels.elementwise import low_rank as low_rank
    from manyshot.kernels.elementwise import square_bins as square_bins
    from manyshot.kernels.elementwise import square_sum as square_sum
    from manyshot.kernels.elementwise import subtract as subtract
    from manyshot.kernels.elementwise import tally as tally
    from manyshot.kernels.elementwise import trim as trim
    from manyshot.kernels.elementwise import uniform as uniform
    from manyshot.kernels.elementwise import weighted_sum as weighted_sum
    from manyshot.kernels.elementwise import widen as widen

_ON_TENSORS = (
    "add_to",
    "apply",
    "consensus",
    "count_equal",
    "drop",
    "elect_and_average",
    "histogram_high",
    "histogram_low",
    "low_rank",
    "square_bins",
    "square_sum",
    "subtract",
    "tally",
    "trim",
    "uniform",
    "weighted_sum",
    "widen",
)


def compiled() -> bool:
    """Whether the compiled kernels are in use."""
    return bool(_native.CALL)


def __getattr__(name: str) -> Any:
    if name not in _ON_TENSORS:
        raise AttributeError(f"module 'manyshot.kernels' has no attribute '{name}'")
    return getattr(import_module("manyshot.kernels.elementwise"), name)


__all__ = ["Operation", "Source", "compiled", "draw_limit"]
