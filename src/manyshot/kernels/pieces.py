"""Long pieces of a tensor in one compiled call each (tiles.c): read, scan or merge, write.

Only for what the compiled kernels can read, do and write; stream.py goes step by step for the rest, to the same bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manyshot.kernels import _native
from manyshot.kernels._native import Output, Reader, Source, Steps
from manyshot.kernels._operation import Operation, draw_limit

if TYPE_CHECKING:
    import torch

Floats = np.ndarray[Any, np.dtype[np.float32]]
# floats that a step over a piece works on, all rows together: a quarter of a common second-level cache
STEP_FLOATS = 1 << 17
SMALLEST_STEP = 1 << 11
OTHER_ROWS = 5
FACTORS = 3
STORED = _native.STORED
ADD_START_TO_ROWS = 1
ADD_TO_BASE, AS_IT_IS, ADD_TO_START = 0, 1, 2
PREPARE = {"plain": 0, "drop": 1, "trim": 2}
COMBINE = {"sum": 0, "consensus": 1, "elect": 2}


def stored(kind: str, file: int, begin: int) -> Source:
    """A tensor in a file, from byte `begin` on."""
    return Source(type=STORED[kind], file=file, begin=begin)


def factors(b_NR: torch.Tensor, a_RI: torch.Tensor, scaling: float, *, nonfinite: bool) -> Source:
    """scaling · B·A, float32; both tensors must live as long as the source."""
    return Source(
        type=FACTORS,
        **{"b": b_NR.data_ptr(), "b_row": b_NR.stride(0), "b_rank": b_NR.stride(1)},
        **{"a": a_RI.data_ptr(), "a_rank": a_RI.stride(0), "ranks": a_RI.shape[0], "columns": a_RI.shape[1]},
        scaling=scaling,
        nonfinite=nonfinite,
    )


@dataclass(frozen=True)
class Input:
    """The task vectors of one tensor: sources are [base, start, task 1, …], `owners` what must live as long as they do.

    `cache` (T, entries of the tensor) keeps rows from the first pass for the next ones, which say `cached`.
    """

    sources: tuple[Source, ...]
    owners: tuple[object, ...]
    add_start: bool
    cache: Floats | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.sources) - 2

    @property
    def step(self) -> int:
        step = STEP_FLOATS // (self.num_tasks + OTHER_ROWS)
        return max(SMALLEST_STEP, step // SMALLEST_STEP * SMALLEST_STEP)

    @property
    def scratch_floats(self) -> int:
        """Floats of scratch that a call needs."""
        return (2 * self.num_tasks + 6) * self.step

    def _reader(self, scratch: Floats, cached: bool) -> tuple[Reader, object]:
        array = (Source * len(self.sources))(*self.sources)
        cache = self.cache
        reader = Reader(
            sources=ctypes.addressof(array),
            tasks=self.num_tasks,
            step=self.step,
            flags=ADD_START_TO_ROWS if self.add_start else 0,
            cached=cached,
            cache=cache.ctypes.data if cache is not None else None,
            cache_stride=cache.shape[1] if cache is not None else 0,
            scratch=scratch.ctypes.data,
        )
        return reader, array


@dataclass(frozen=True)
class Target:
    """Where a merged tensor goes: what it is added to, its type, the file, and the byte at which the tensor begins."""

    mode: int
    kind: str
    file: int
    begin: int


@dataclass(frozen=True)
class Done:
    """What one call counted: `bad` is for base, tasks and what was written."""

    changed: int
    kept: int
    bad: list[int]
    gram: list[float]
    merged_square: float
    update_square: float


def scan_piece(
    given: Input,
    start: int,
    count: int,
    scratch: Floats,
    *,
    stage: int,
    words: Sequence[int],
    counts: np.ndarray[Any, Any],
) -> list[int]:
    """Add one counting pass of TIES over a piece to `counts`; returns what is bad in base and tasks. Raises OSError."""
    reader, _array = given._reader(scratch, cached=stage > 0 and given.cache is not None)
    bad = (ctypes.c_int64 * (given.num_tasks + 1))()
    packed = (ctypes.c_uint32 * given.num_tasks)(*words)
    _check(_native.CALL["scan_piece"](ctypes.byref(reader), start, count, stage, packed, counts.ctypes.data, bad))
    return bad[:]


def norm_piece(
    given: Input,
    operation: Operation,
    weights_T: Floats,
    start: int,
    count: int,
    scratch: Floats,
    *,
    counts: np.ndarray[Any, Any],
) -> list[int]:
    """Add to `counts` (2, 256, 2) the exact squares, over a piece, of Σ w v and of what an operation makes of it.

    The operation prepares nothing. Returns what is bad in base and tasks. Raises OSError.
    """
    reader, _array = given._reader(scratch, cached=False)
    steps, _owners = _steps(operation, weights_T)
    bad = (ctypes.c_int64 * (given.num_tasks + 1))()
    pointers = ctypes.byref(reader), ctypes.byref(steps)
    _check(_native.CALL["norm_piece"](*pointers, start, count, counts.ctypes.data, bad))
    return bad[:]


def _steps(
    operation: Operation,
    weights_T: Floats,
    keys: Sequence[int] = (),
    thresholds: Sequence[int] = (),
    allowed: Sequence[int] = (),
) -> tuple[Steps, object]:
    """An operation as the compiled kernels take it, and what must live as long."""
    tasks = len(weights_T)
    packed_keys = (ctypes.c_uint64 * tasks)(*keys)
    packed_thresholds = (ctypes.c_uint32 * tasks)(*thresholds)
    packed_allowed = (ctypes.c_int64 * tasks)(*allowed)
    steps = Steps(
        prepare=PREPARE[operation.prepare],
        combine=COMBINE[operation.combine],
        agreement=operation.agreement,
        how=_native.how_agreed(unweighted=operation.unweighted, soft=operation.soft),
        scaling=operation.scaling,
        threshold=operation.threshold,
        density=operation.rescale,
        weights=weights_T.ctypes.data,
        keys=ctypes.addressof(packed_keys),
        limit=draw_limit(operation.density),
        thresholds=ctypes.addressof(packed_thresholds),
        allowed=ctypes.addressof(packed_allowed),
    )
    return steps, (weights_T, packed_keys, packed_thresholds, packed_allowed)


def merge_piece(
    given: Input,
    operation: Operation,
    weights_T: Floats,
    target: Target,
    start: int,
    count: int,
    scratch: Floats,
    *,
    pairs: bool,
    keys: Sequence[int],
    thresholds: Sequence[int] = (),
    allowed: Sequence[int] = (),
) -> Done:
    """Merge a piece and write it. Raises OSError."""
    tasks = given.num_tasks
    reader, _array = given._reader(scratch, cached=given.cache is not None)
    steps, _owners = _steps(operation, weights_T, keys, thresholds, allowed)
    counts, sums = (ctypes.c_int64 * (tasks + 4))(), (ctypes.c_double * (tasks**2 + 2))()
    output = Output(
        **{"mode": target.mode, "type": STORED[target.kind], "file": target.file, "begin": target.begin},
        **{"pairs": pairs, "counts": ctypes.addressof(counts), "sums": ctypes.addressof(sums)},
    )
    _check(_native.CALL["merge_piece"](*(ctypes.byref(one) for one in (reader, steps, output)), start, count))
    return Done(counts[0], counts[1], counts[2:], sums[: tasks**2], sums[tasks**2], sums[tasks**2 + 1])


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
