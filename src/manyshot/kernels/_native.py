"""The compiled kernels (kernels.c) through ctypes. Without them, `LIBRARY` is None and torch does the work."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
UINT64, INT32 = ctypes.c_uint64, ctypes.c_int32
ROWS = (POINTER, INT64, INT64)  # first row, number of rows, entries from one row to the next

SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "widen": (INT32, (INT32, POINTER, POINTER, INT64)),
    "subtract": (INT32, (INT32, POINTER, POINTER, POINTER, INT64)),
    "add_to": (INT32, (INT32, POINTER, POINTER, POINTER, INT64)),
    "low_rank": (None, (POINTER, INT64, INT64, POINTER, INT64, INT64, INT64, FLOAT, INT64, INT64, POINTER)),
    "scan_piece": (INT32, (POINTER, INT64, INT64, INT32, POINTER, POINTER, POINTER)),
    "norm_piece": (INT32, (POINTER, POINTER, INT64, INT64, POINTER, POINTER)),
    "merge_piece": (INT32, (POINTER, POINTER, POINTER, INT64, INT64)),
    "weighted_sum": (None, (*ROWS, POINTER, FLOAT, POINTER, INT64)),
    "consensus": (None, (*ROWS, POINTER, FLOAT, INT32, INT32, FLOAT, POINTER, INT64)),
    "elect_and_average": (None, (*ROWS, POINTER, FLOAT, POINTER, INT64)),
    "drop": (None, (*ROWS, POINTER, INT64, UINT64, FLOAT, POINTER, INT64)),
    "histogram_high": (None, (*ROWS, INT64, POINTER)),
    "histogram_low": (None, (*ROWS, INT64, POINTER, POINTER)),
    "count_equal": (None, (*ROWS, INT64, POINTER, POINTER)),
    "trim": (None, (*ROWS, INT64, POINTER, POINTER, POINTER)),
    "tally": (None, (*ROWS, POINTER, INT64, INT32, POINTER, POINTER)),
    "square_sum": (ctypes.c_double, (POINTER, INT64)),
    "square_bins": (None, (POINTER, INT64, POINTER)),
}


class Source(ctypes.Structure):
    """Where the entries of one tensor come from; as in tiles.c."""

    _fields_ = (
        *(("type", INT32), ("file", INT32), ("begin", INT64), ("b", POINTER), ("a", POINTER)),
        *(("b_row", INT64), ("b_rank", INT64), ("a_rank", INT64), ("ranks", INT64), ("columns", INT64)),
        *(("scaling", FLOAT), ("nonfinite", INT32)),
    )


class Reader(ctypes.Structure):
    """The task vectors of one tensor; as in tiles.c."""

    _fields_ = (
        *(("sources", POINTER), ("tasks", INT64), ("step", INT64), ("flags", INT32), ("cached", INT32)),
        *(("cache", POINTER), ("cache_stride", INT64), ("scratch", POINTER)),
    )


class Steps(ctypes.Structure):
    """An operator as steps; `operation` in tiles.c."""

    _fields_ = (
        *(("prepare", INT32), ("combine", INT32), ("agreement", INT32), ("how", INT32)),
        *(("scaling", FLOAT), ("threshold", FLOAT), ("density", FLOAT)),
        *(("weights", POINTER), ("keys", POINTER), ("limit", UINT64), ("thresholds", POINTER), ("allowed", POINTER)),
    )


class Output(ctypes.Structure):
    """Where a merged tensor goes, and what is counted; as in tiles.c."""

    _fields_ = (
        *(("mode", INT32), ("type", INT32), ("file", INT32), ("pairs", INT32), ("begin", INT64)),
        *(("counts", POINTER), ("sums", POINTER)),
    )


def _load() -> ctypes.CDLL | None:
    """The library that the installation compiled; none where no compiler was found, or MANYSHOT_KERNELS=torch."""
    if os.environ.get("MANYSHOT_KERNELS") == "torch":
        return None
    folder = Path(__file__).parent.parent
    for suffix in EXTENSION_SUFFIXES:
        file = folder / f"_kernels{suffix}"
        if file.exists():
            try:
                library = ctypes.CDLL(str(file))
                for name, (result, arguments) in SIGNATURES.items():
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
            except (OSError, AttributeError):  # built for another machine, or from an older source
                continue
            return library
    return None


LIBRARY = _load()
STORED = {"BF16": 1, "F32": 2}  # the stored types that the kernels read and write, as kernels.h has them


def how_agreed(*, unweighted: bool, soft: bool) -> int:
    """How a consensus is reached, as kernels.h has it."""
    return unweighted | soft << 1


# these run thousands of times a second: names are looked up once
CALL: dict[str, Callable[..., Any]] = {name: getattr(LIBRARY, name) for name in SIGNATURES if LIBRARY is not None}
