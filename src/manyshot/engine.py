"""Tiles and the threads that work on them. Which tile a thread takes, and when, never changes a result.

P = entries of a tile.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from manyshot.task_vector import Scratch

Result = TypeVar("Result")

# float32 entries that one thread holds at once, over all rows of a tile: what fits the processor's caches
THREAD_ENTRIES = 1 << 19
# rows that a tile needs beside its task vectors: base, start, merged, what is written
OTHER_ROWS = 4
SMALLEST_TILE = 1 << 12


@dataclass(frozen=True)
class Piece:
    """Entries start..stop of one flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def tile_entries(num_tasks: int) -> int:
    """Entries of a tile, fewer for more tasks, so that memory does not grow with them."""
    return max(SMALLEST_TILE, THREAD_ENTRIES // (num_tasks + OTHER_ROWS) // SMALLEST_TILE * SMALLEST_TILE)


def cut(name: str, shape: Sequence[int], entries: int) -> list[Piece]:
    """A tensor's pieces in order; a scalar has one entry, an empty tensor no piece."""
    total = math.prod(shape)
    return [Piece(name, start, min(start + entries, total)) for start in range(0, total, entries)]


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own operations on one thread each, in threads begun meanwhile too: the pool's threads are enough."""
    torch = sys.modules.get("torch")  # where nothing has loaded it, nothing is going to use it here
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def imports_frozen() -> Iterator[None]:
    """What imports left need not be searched for garbage again and again while tiles come and go.

    Where the caller has frozen it already, that stays.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class TilePool:
    """Threads that work through pieces, each with its own Scratch.

    The kernels and the reads and writes let go of Python's lock, so the threads do run at once.
    """

    def __init__(self, threads: int | None = None, tick: Callable[[int], None] | None = None) -> None:
        self.threads = threads or default_threads()
        self._tick = tick
        self._scratches = [Scratch() for _ in range(self.threads)]

    def map(self, work: Callable[[Piece, Scratch], Result], pieces: Iterable[Piece]) -> list[Result]:
        """work(piece, scratch) for each piece; results in order. The first error, in order of pieces, is raised."""
        queue = _Queue(list(pieces), work, self._tick)
        others = [
            threading.Thread(target=queue.run, args=(scratch,), daemon=True)
            for scratch in self._scratches[1 : len(queue.pieces)]
        ]
        with one_torch_thread():
            for thread in others:
                thread.start()
            try:
                queue.run(self._scratches[0])
                for thread in others:
                    thread.join()
            except BaseException:  # an interrupt comes here, into the main thread
                queue.stopped = True
                raise
            finally:  # nobody may work on when the files are closed
                for thread in others:
                    thread.join()
        if queue.errors:
            raise queue.errors[min(queue.errors)]
        return [queue.results[position] for position in range(len(queue.pieces))]


class _Queue(Generic[Result]):
    def __init__(
        self, pieces: list[Piece], work: Callable[[Piece, Scratch], Result], tick: Callable[[int], None] | None
    ) -> None:
        self.pieces, self.work, self.tick = pieces, work, tick
        self.results: dict[int, Result] = {}
        self.errors: dict[int, Exception] = {}
        self.stopped = False
        self._next = 0
        self._lock = threading.Lock()

    def _take(self) -> int | None:
        with self._lock:
            if self.stopped or self._next >= len(self.pieces):
                return None
            self._next += 1
            return self._next - 1

    def run(self, scratch: Scratch) -> None:
        while (position := self._take()) is not None:
            try:
                self.results[position] = self.work(self.pieces[position], scratch)
            except Exception as error:  # noqa: BLE001 - raised again by map(), in the caller's thread
                # pieces are handed out in order, so every earlier one has been taken: the first error is well defined
                self.errors[position] = error
                self.stopped = True
            if self.tick is not None:
                self.tick(self.pieces[position].count)
