"""Stream task vectors through operators: scan where an operator asks for it, merge, hand on.

A tensor goes through the compiled kernels in long pieces where they can read, merge and write it, else tile by tile and
step by step; the bits are the same. Shapes: T = tasks, P = entries of a tile.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from manyshot import kernels
from manyshot.engine import Piece, TilePool, cut, imports_frozen, one_torch_thread, tile_entries
from manyshot.errors import MergeError, ModelError
from manyshot.kernels.pieces import Input, Target, merge_piece, norm_piece, scan_piece
from manyshot.merge_report import MergeReport, TileSums, add_up
from manyshot.operators import MatrixOperator, NormScan, Operator, OperatorPlan, Scan, Tile, TrimScan, tile_key
from manyshot.reading import TaskVectorReader, TileData
from manyshot.task_vector import Scratch

if TYPE_CHECKING:
    import torch

Floats = np.ndarray[Any, np.dtype[np.float32]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

# entries of a piece that the compiled kernels take at once
PIECE_ENTRIES = 1 << 18
# scans that the compiled kernels can do
COMPILED_SCANS = (NormScan, TrimScan)
# float32 entries of task vectors kept between the passes over one tensor; a larger tensor is read again
CACHE_ENTRIES = 1 << 25


class Sink(Protocol):
    """Where merged entries go."""

    def target(self, name: str) -> Target | None:
        """Where the compiled kernels write a tensor; None where only `write` can do it."""

    def wrote(self, piece: Piece, bad: bool) -> None:
        """The compiled kernels have written a piece; `bad` when NaN or Inf is in it."""

    def write(self, piece: Piece, data: TileData, kept_P: torch.Tensor, scratch: Scratch) -> tuple[float, float]:
        """Take what the operator gave for a tile; say |Θʳ − Θ⁰|² and |Θʳ − Θʳ⁻¹|² of it."""


@dataclass(frozen=True)
class _Route:
    """How one tensor is merged: in one compiled call per piece, or (None) step by step."""

    operator: Operator
    compiled: Input | None = None
    target: Target | None = None


@dataclass
class _Scan:
    """A scan, and what its last pass counted before each piece."""

    state: Scan
    preceding: dict[Piece, tuple[int, ...]] = field(default_factory=dict)


class MergeStream:
    """One merge: a reader, an operator for each tensor, weights, and where the result goes.

    `pairs` also sums the inner products of the task vectors, for their cosines.
    """

    def __init__(
        self,
        reader: TaskVectorReader,
        plan: OperatorPlan,
        weights: Sequence[float],
        seed_parts: Sequence[str | int],
        sink: Sink,
        pool: TilePool,
        *,
        device: str = "cpu",
        pairs: bool = True,
    ) -> None:
        self.reader, self.plan, self.sink, self.pool = reader, plan, sink, pool
        self.weights, self.seed_parts = tuple(weights), tuple(seed_parts)
        self.device, self.pairs = device, pairs
        self.num_tasks = len(reader.tasks)
        if len(weights) != self.num_tasks:
            raise MergeError(f"{len(weights)} weights for {self.num_tasks} tasks")
        self._routes: dict[str, _Route] = {}
        self._arena: Floats | None = None
        self._weights_T: dict[Operator, Floats] = {}

    def run(self) -> MergeReport:
        """Merge every tensor that some expert changed."""
        return add_up(self.reader.tasks, self.tiles(), pairs=self.pairs)

    def tiles(self) -> list[TileSums]:
        """The same; what the report is made of."""
        self._load_torch()
        with one_torch_thread(), imports_frozen():
            return self._run()

    def _load_torch(self) -> None:
        """Where some tensor goes step by step, torch is needed: before the pool sets how many threads it uses."""
        if any(self._route(name).compiled is None for name in self.reader.names()):
            import torch  # noqa: F401

    def _run(self) -> list[TileSums]:
        elementwise, matrices = [], []
        scanned: list[list[str]] = []
        whole: dict[Operator, list[str]] = {}
        for name in self.reader.names():
            operator = self.plan.for_tensor(name)
            if isinstance(operator, MatrixOperator) and len(self.reader.shape(name)) == 2:
                matrices.append(name)
            elif operator.start_scan(self.num_tasks, 1) is None:
                elementwise.append(name)
            elif operator.scan_scope == "model":
                whole.setdefault(operator, []).append(name)
            else:
                scanned.append([name])
        sums = self._merge(elementwise, None)
        for group in (*scanned, *whole.values()):
            sums += self._merge(group, self._scan(group))
            self._routes.clear()
        for name in matrices:
            sums += self._merge_matrix(name)
        return sums

    # ---- routes ------------------------------------------------------------------------------------------------------

    def _route(self, name: str) -> _Route:
        route = self._routes.get(name)
        if route is None:
            route = _Route(operator := self.plan.for_tensor(name))
            target = self.sink.target(name) if _has_steps(operator) and self.device == "cpu" else None
            if target is not None:
                route = _Route(operator, self.reader.compiled_input(name), target)
            self._routes[name] = route
            for old in list(self._routes)[: -4 * self.pool.threads]:  # they hold factors in float32
                self._routes.pop(old, None)
        return route

    def _pieces(self, names: Sequence[str]) -> list[Piece]:
        pieces = []
        for name in names:
            entries = PIECE_ENTRIES if self._route(name).compiled else tile_entries(self.num_tasks)
            pieces += cut(name, self.reader.shape(name), entries)
        return pieces

    def _open_cache(self, group: Sequence[str]) -> None:
        """Keep a tensor's task vectors between the passes over it, where they fit."""
        route, entries = self._route(group[0]), math.prod(self.reader.shape(group[0]))
        if len(group) > 1 or route.compiled is None or self.num_tasks * entries > CACHE_ENTRIES:
            return
        if self._arena is None:
            self._arena = np.empty(CACHE_ENTRIES, np.float32)
        cache = self._arena[: self.num_tasks * entries].reshape(self.num_tasks, entries)
        self._routes[group[0]] = replace(route, compiled=replace(route.compiled, cache=cache))

    # ---- scan --------------------------------------------------------------------------------------------------------

    def _scan(self, group: Sequence[str]) -> _Scan:
        """Run an operator's counting passes over the tensors of a group."""
        pieces = self._pieces(group)
        state = self.plan.for_tensor(group[0]).start_scan(self.num_tasks, sum(piece.count for piece in pieces))
        assert state is not None
        scan = _Scan(state)
        if not state.done and isinstance(state, COMPILED_SCANS):  # whose first pass fills the cache
            self._open_cache(group)
        while not state.done:
            by_thread: dict[int, Counts] = {}

            def count(piece: Piece, scratch: Scratch, by_thread: dict[int, Counts] = by_thread) -> list[int]:
                # counts of each thread's own: integers, so their order does not matter
                counts = None if state.per_tile else by_thread.get(id(scratch))
                if counts is None:
                    shape = state.counts_shape()
                    counts = scratch.array("counts", math.prod(shape), "int64").reshape(shape)
                    counts[...] = 0
                    by_thread[id(scratch)] = counts
                self._observe(piece, scratch, state, counts)
                return counts.tolist() if state.per_tile else []

            tiles = self.pool.map(count, pieces)
            if state.per_tile:
                running = [0] * self.num_tasks
                for piece, counted in zip(pieces, tiles, strict=True):
                    scan.preceding[piece] = tuple(running)
                    running = [total + more for total, more in zip(running, counted, strict=True)]
                state.advance(np.array(running))
            else:
                total = np.zeros(state.counts_shape(), np.int64)  # an empty tensor has no pieces
                for counts in by_thread.values():
                    total += counts
                state.advance(total)
        return scan

    def _observe(self, piece: Piece, scratch: Scratch, state: Scan, counts: Counts) -> None:
        route = self._route(piece.name)
        given, weights_T = route.compiled, self._weights(route.operator)
        if given is None or not isinstance(state, COMPILED_SCANS):
            import torch

            rows_TP = self.reader.read(piece, scratch).task_vectors_TP
            state.observe(rows_TP, torch.from_numpy(weights_T), counts)
            return
        buffer = scratch.array("compiled", given.scratch_floats)
        place = piece.start, piece.count, buffer
        with _input_named(piece):
            if isinstance(state, NormScan):
                bad = norm_piece(given, state.operation, weights_T, *place, counts=counts)
            else:
                bad = scan_piece(given, *place, stage=state.stage, words=state.words, counts=counts)
        self.reader.refuse_nonfinite(piece.name, bad)

    # ---- merge -------------------------------------------------------------------------------------------------------

    def _merge(self, names: Sequence[str], scan: _Scan | None) -> list[TileSums]:
        def work(piece: Piece, scratch: Scratch) -> TileSums:
            route = self._route(piece.name)
            preceding = (0,) * self.num_tasks
            if scan is not None:
                preceding = scan.preceding.get(piece, preceding)
            tile = Tile(self._keys(piece.name), piece.start, scan.state if scan else None, preceding)
            if route.compiled is not None and route.target is not None:
                return self._merge_compiled(piece, scratch, route.operator, route.compiled, route.target, tile)
            data = self.reader.read(piece, scratch)
            weights_T = self._weights_tensor(route.operator)
            kept_P = route.operator.merge(self._move(data.task_vectors_TP), weights_T, tile).cpu()
            return self._finish(piece, data, kept_P, scratch)

        return self.pool.map(work, self._pieces(names))

    def _merge_compiled(
        self, piece: Piece, scratch: Scratch, operator: Operator, given: Input, target: Target, tile: Tile
    ) -> TileSums:
        operation, trim = operator.operation(), tile.scan if isinstance(tile.scan, TrimScan) else None
        assert operation is not None
        if isinstance(tile.scan, NormScan):
            operation = tile.scan.rescaled(operation)
        with _input_named(piece):
            done = merge_piece(
                *(given, operation, self._weights(operator), target, piece.start, piece.count),
                scratch.array("compiled", given.scratch_floats),
                pairs=self.pairs,
                keys=tile.keys,
                thresholds=trim.thresholds if trim else (),
                allowed=trim.allowed(tile.preceding) if trim else (),
            )
        self.reader.refuse_nonfinite(piece.name, done.bad[:-1])
        self.sink.wrote(piece, bool(done.bad[-1]))
        return TileSums(piece, done.changed, done.kept, done.gram, done.merged_square, done.update_square)

    def _merge_matrix(self, name: str) -> list[TileSums]:
        """Merge one whole matrix, then hand it on tile by tile. Each task's matrix is read when its turn comes."""
        operator, shape = self.plan.for_tensor(name), self.reader.shape(name)
        assert isinstance(operator, MatrixOperator)
        pieces = cut(name, shape, tile_entries(self.num_tasks))
        if not pieces:
            return []
        import torch

        buffer = torch.empty(shape)

        def matrix(task: int) -> torch.Tensor:
            def read(piece: Piece, scratch: Scratch) -> None:
                before_P, start_P = self.reader.read_before(piece, scratch)
                out_P = buffer.reshape(-1)[piece.start : piece.stop]
                self.reader.read_task(task, piece, before_P, start_P, out_P, scratch)

            self.pool.map(read, pieces)
            return self._move(buffer)

        # on one thread, since the bits of a decomposition depend on their number
        kept = operator.merge_matrix((matrix(task) for task in range(self.num_tasks)), self._weights_tensor(operator))
        kept_flat = kept.cpu().contiguous().reshape(-1)

        def work(piece: Piece, scratch: Scratch) -> TileSums:
            data = self.reader.read(piece, scratch)
            return self._finish(piece, data, kept_flat[piece.start : piece.stop], scratch)

        return self.pool.map(work, pieces)

    def _finish(self, piece: Piece, data: TileData, kept_P: torch.Tensor, scratch: Scratch) -> TileSums:
        """Hand a merged tile on, and count it."""
        squares = self.sink.write(piece, data, kept_P, scratch)
        return TileSums(piece, *kernels.tally(data.task_vectors_TP, kept_P, pairs=self.pairs), *squares)

    def _weights(self, operator: Operator) -> Floats:
        if operator not in self._weights_T:
            weights = self.plan.weights_for(operator, self.weights)
            self._weights_T[operator] = np.array(weights, np.float32)
        return self._weights_T[operator]

    def _weights_tensor(self, operator: Operator) -> torch.Tensor:
        import torch

        return self._move(torch.from_numpy(self._weights(operator)))

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.device == "cpu" else tensor.to(self.device)

    def _keys(self, name: str) -> tuple[int, ...]:
        return tuple(tile_key(*self.seed_parts, task, name) for task in self.reader.tasks)


@contextmanager
def _input_named(piece: Piece) -> Iterator[None]:
    """An input that ends early is an error of that input, not of the file that is being written."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        raise ModelError(f"tensor '{piece.name}': a file ends within it; it was changed meanwhile") from None


def _has_steps(operator: Operator) -> bool:
    """Whether operation() describes what merge() does; a subclass that defines merge() alone means its own."""
    kinds = (kind for kind in type(operator).__mro__ if "merge" in vars(kind) or "operation" in vars(kind))
    return "operation" in vars(next(kinds)) and operator.operation() is not None
