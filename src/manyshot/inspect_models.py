"""How task vectors relate before anyone merges them: norms, cosines, sign conflicts, mask overlap, effective ranks.

One pass over the tiles, sums in float64; never more than tiles, and for ranks one matrix, in memory.
Shapes: T = tasks, P = entries of a tile, R = rank of an adapter, O × I = a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from manyshot.engine import Piece, TilePool, cut, tile_entries
from manyshot.errors import ManyshotError, MergeError, RecipeError
from manyshot.inspect_input import Experts
from manyshot.merge_report import cosines
from manyshot.reading import Reference, TaskVectorReader
from manyshot.task_vector import AdapterUpdate, Scratch

Tick = Callable[[int, int], None]
Vector = tuple[float | None, ...]
Matrix = tuple[Vector, ...]


@dataclass(frozen=True)
class InspectSettings:
    """`mask_threshold` δ and `min_agreement` k of the masks; dense matrices above `rank_limit` entries have no rank."""

    mask_threshold: float = 0.3
    min_agreement: int = 2
    ranks: bool = True
    rank_limit: int = 1 << 20
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.mask_threshold < math.inf:
            raise RecipeError(f"mask_threshold is {self.mask_threshold}; it must be a number of at least 0")
        if self.min_agreement < 1:
            raise RecipeError(f"min_agreement is {self.min_agreement}; it must be at least 1")


@dataclass(frozen=True)
class Part:
    """What was found in a part of the model: a layer, or all of it. Vectors and matrices are in the order of tasks.

    norms ‖v_τ‖; changed_shares: coordinates with v_τ ≠ 0, of all coordinates of the part; cosines v_i·v_j/‖v_i‖‖v_j‖.
    sign_conflict: of the `num_shared` coordinates that two tasks or more changed, those with two opposite signs;
    pair_sign_conflicts: the same for each two tasks. Of the `num_changed` coordinates that some task changed:
    vote_shares: those with m_τ = 1[|w v_τ| ≥ δ|V − w v_τ|], w = 1/T, V = Σ w v_τ; kept_share: those with
    m̄ = 1[Σ m_τ ≥ k]; kept_vote_shares: of the kept ones, those with m_τ = 1; mask_overlaps |m_i ∧ m_j| / |m_i ∨ m_j|.
    effective_ranks: mean over the matrices that the task changed of exp(H(σ/Σσ)). None: nothing to divide by.
    """

    name: str
    num_coordinates: int
    num_changed: int
    num_shared: int
    norms: tuple[float, ...]
    changed_shares: Vector
    cosines: Matrix
    sign_conflict: float | None
    pair_sign_conflicts: Matrix
    vote_shares: Vector
    mask_overlaps: Matrix
    kept_share: float | None
    kept_vote_shares: Vector
    effective_ranks: Vector

    def to_json(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Plain data: values by task, matrices as rows in the order of tasks."""
        record: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for key in ("norms", "changed_shares", "vote_shares", "kept_vote_shares", "effective_ranks"):
            record[key] = dict(zip(tasks, record[key], strict=True))
        return record


@dataclass(frozen=True)
class Inspection:
    """What the task vectors of some models look like. `skipped_ranks`: dense matrices above the limit, with shapes."""

    base: Path
    models: Mapping[str, Path]
    run: Path | None
    round_index: int | None
    reference: Reference
    settings: InspectSettings
    total: Part
    layers: tuple[Part, ...]
    skipped_ranks: Mapping[str, tuple[int, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.models)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it; no NaN in it."""
        return {
            "base": str(self.base),
            "models": {task: str(path) for task, path in self.models.items()},
            "run": str(self.run) if self.run else None,
            "round": self.round_index,
            "reference": self.reference,
            "tasks": list(self.tasks),
            "mask_threshold": self.settings.mask_threshold,
            "min_agreement": self.settings.min_agreement,
            "rank_limit": self.settings.rank_limit if self.settings.ranks else None,
            "skipped_ranks": {name: list(shape) for name, shape in self.skipped_ranks.items()},
            "total": self.total.to_json(self.tasks),
            "layers": [layer.to_json(self.tasks) for layer in self.layers],
        }


# ---- what a tile says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileSums:
    """Sums over tiles, float64: v vᵀ; coordinates that both changed, changed apart, voted for (T × T).

    `kept_T`: kept coordinates that a task votes for; `counts`: coordinates changed, shared, in conflict, kept.
    """

    gram_TT: torch.Tensor
    changed_TT: torch.Tensor
    opposed_TT: torch.Tensor
    votes_TT: torch.Tensor
    kept_T: torch.Tensor
    counts: torch.Tensor

    def __add__(self, other: TileSums) -> TileSums:
        return TileSums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def no_sums(num_tasks: int) -> TileSums:
    """The sums of nothing."""
    square, vector = torch.zeros(num_tasks, num_tasks, dtype=torch.float64), torch.zeros(num_tasks, dtype=torch.float64)
    return TileSums(square, square, square, square, vector, torch.zeros(4, dtype=torch.float64))


def sum_tile(rows_TP: torch.Tensor, mask_threshold: float, min_agreement: int) -> TileSums:
    """The sums of one tile. Counts are float32 sums of zeros and ones: exact up to 2²⁴ entries."""
    wide_TP = rows_TP.double()
    signs_TP = rows_TP.sign()
    up_TP, down_TP, changed_TP = signs_TP.clamp(min=0), signs_TP.neg().clamp_(min=0), signs_TP.abs()
    opposed_TT = up_TP @ down_TP.T
    num_changed_P, conflict_P = changed_TP.sum(0), up_TP.amax(0) * down_TP.amax(0)
    some_P = num_changed_P.clamp(max=1)
    # the mask as the operators form it: float32, added in task order
    own_TP = rows_TP * torch.tensor(1 / len(rows_TP), dtype=torch.float32)
    total_P = own_TP[0].clone()
    for own_P in own_TP[1:]:
        total_P += own_P
    rest_TP = torch.sub(total_P, own_TP).abs_().mul_(mask_threshold)
    votes_TP = own_TP.abs_().ge_(rest_TP).mul_(some_P)
    kept_P = votes_TP.sum(0).ge_(min_agreement).mul_(some_P)
    counts = [some_P.sum(), (num_changed_P >= 2).sum(), conflict_P.sum(), kept_P.sum()]
    return TileSums(
        wide_TP @ wide_TP.T,
        (changed_TP @ changed_TP.T).double(),
        (opposed_TT + opposed_TT.T).double(),
        (votes_TP @ votes_TP.T).double(),
        (votes_TP @ kept_P).double(),
        torch.stack([count.double() for count in counts]),
    )


def make_part(name: str, num_coordinates: int, sums: TileSums, effective_ranks: Vector) -> Part:
    """Ratios from sums."""
    gram: list[list[float]] = sums.gram_TT.tolist()
    changed, opposed, votes = sums.changed_TT.tolist(), sums.opposed_TT.tolist(), sums.votes_TT.tolist()
    num_changed, num_shared, num_conflict, num_kept = (int(count) for count in sums.counts.tolist())
    tasks = range(len(gram))
    return Part(
        name=name,
        num_coordinates=num_coordinates,
        num_changed=num_changed,
        num_shared=num_shared,
        norms=tuple(math.sqrt(gram[i][i]) for i in tasks),
        changed_shares=tuple(ratio(changed[i][i], num_coordinates) for i in tasks),
        cosines=tuple(tuple(row) for row in cosines(gram)),
        sign_conflict=ratio(num_conflict, num_shared),
        pair_sign_conflicts=tuple(tuple(ratio(opposed[i][j], changed[i][j]) for j in tasks) for i in tasks),
        vote_shares=tuple(ratio(votes[i][i], num_changed) for i in tasks),
        mask_overlaps=tuple(
            tuple(ratio(votes[i][j], votes[i][i] + votes[j][j] - votes[i][j]) for j in tasks) for i in tasks
        ),
        kept_share=ratio(num_kept, num_changed),
        kept_vote_shares=tuple(ratio(kept, num_kept) for kept in sums.kept_T.tolist()),
        effective_ranks=effective_ranks,
    )


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# ---- effective ranks -------------------------------------------------------------------------------------------------


def effective_rank(values: torch.Tensor) -> float | None:
    """exp(H(σ/Σσ)) of singular values: 1 for one direction, n for n equal ones; None for a zero matrix."""
    values = values[values > 0]
    if not len(values):
        return None
    shares = values / values.sum()
    return math.exp(float(-(shares * shares.log()).sum()))


def singular_values(matrix_OI: torch.Tensor) -> torch.Tensor:
    """σ, float64, from the Gram matrix of the shorter side; what rounding leaves of zeros is zero."""
    short = matrix_OI.double() if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.double().T
    squares = torch.linalg.eigvalsh(short @ short.T)
    return _without_noise(squares, max(matrix_OI.shape)).sqrt()


def factor_values(update: AdapterUpdate, name: str) -> torch.Tensor:
    """σ of s·B·A (− s·B₀·A₀), float64, without forming it: B = Q_B R_B and Aᵀ = Q_A R_A, so σ(BA) = σ(R_B R_Aᵀ)."""
    left, right = [], []
    for adapter, sign in ((update.end, 1), (update.start, -1)):
        if adapter is not None and name in adapter.factors:
            factor = adapter.factors[name]
            left.append(adapter.weights.read(factor.lora_b).double() * (sign * factor.scaling))
            right.append(adapter.weights.read(factor.lora_a).double().T)
    b_OR, a_IR = torch.cat(left, dim=1), torch.cat(right, dim=1)
    values = torch.linalg.svdvals(torch.linalg.qr(b_OR).R @ torch.linalg.qr(a_IR).R.T)
    return _without_noise(values, max(len(b_OR), len(a_IR)))


def _without_noise(values: torch.Tensor, size: int) -> torch.Tensor:
    limit = values.max() * (size * torch.finfo(torch.float64).eps)
    return torch.where(values > limit, values, 0.0)


def tensor_ranks(reader: TaskVectorReader, limit: int, piece: Piece, scratch: Scratch) -> tuple[Vector, bool]:
    """Each task's effective rank of one whole matrix, and whether one is left out, being dense and above the limit.

    A task vector is low-rank where the model it is relative to is the one that the task's adapter was trained on.
    """
    name = piece.name
    moved = reader.start is not None and name in reader.start and reader.reference == "pretrained"
    dense: list[int] = []
    found: list[float | None] = [None] * len(reader.updates)
    for task, update in enumerate(reader.updates):
        if not moved and name not in update.names:
            continue
        if not moved and isinstance(update, AdapterUpdate) and not update.is_dense(name):
            found[task] = effective_rank(factor_values(update, name))
        else:
            dense.append(task)
    if not dense or piece.count > limit:
        return tuple(found), bool(dense)
    before_P, start_P = reader.read_before(piece, scratch)
    out_P = scratch.take("matrix", piece.count)
    for task in dense:
        reader.read_task(task, piece, before_P, start_P, out_P, scratch)
        found[task] = effective_rank(singular_values(out_P.reshape(reader.shape(name))))
    return tuple(found), False


# ---- all of it -------------------------------------------------------------------------------------------------------


def layer_of(name: str) -> tuple[str, int]:
    """The part a tensor belongs to and its number: `model.layers.3`, 3; without a number its module and −1."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1]), int(part)
    return ".".join(parts[:-1]) or name, -1


def inspect(experts: Experts, settings: InspectSettings | None = None, tick: Tick | None = None) -> Inspection:
    """Compare task vectors, layer by layer. `tick(done, total)` counts coordinates.

    Raises MergeError for NaN and Inf, naming run, round, task and tensor.
    """
    settings = settings or InspectSettings()
    try:
        return _Work(experts, settings, tick).run()
    except ManyshotError as error:
        if experts.run is None:
            raise
        raise type(error)(f"{experts.run}, round {experts.round_index}: {error}") from None


class _Work:
    def __init__(self, experts: Experts, settings: InspectSettings, tick: Tick | None) -> None:
        self.experts, self.settings, self.reader = experts, settings, experts.reader
        self.entries = tile_entries(len(self.reader.tasks))
        self.tick, self.done = tick, 0
        self.pool = TilePool(settings.threads, self._count)
        self.skipped: dict[str, tuple[int, ...]] = {}
        self.ranks: dict[str, Vector] = {}
        # layer -> its tensors that somebody changed; layer -> all its coordinates in the base
        self.tensors: dict[tuple[str, int], list[str]] = {}
        self.sizes: dict[tuple[str, int], int] = {}
        for name in self.reader.names():
            self.tensors.setdefault(layer_of(name), []).append(name)
        for name in experts.base.names:
            info = experts.base.info(name)
            if info.is_float and name not in self.reader.left_out:
                self.sizes[layer_of(name)] = self.sizes.get(layer_of(name), 0) + info.num_elements
        passes = 2 if settings.ranks else 1
        self.total = passes * sum(math.prod(self.reader.shape(name)) for name in self.reader.names())

    def run(self) -> Inspection:
        all_sums, layers = no_sums(len(self.reader.tasks)), []
        order = sorted(self.tensors, key=lambda layer: (layer[1] < 0, layer[0].rpartition(".")[0], layer[1], layer[0]))
        for layer in order:
            names = self.tensors[layer]
            sums = self._sum(names)
            self._rank(names)
            layers.append(make_part(layer[0], self.sizes[layer], sums, self._mean_ranks(names)))
            all_sums += sums
        ranks = self._mean_ranks(self.reader.names())
        return Inspection(
            *(self.experts.base.path, self.experts.models, self.experts.run, self.experts.round_index),
            *(self.reader.reference, self.settings),
            make_part("all", sum(self.sizes.values()), all_sums, ranks),
            tuple(layers),
            self.skipped,
        )

    def _sum(self, names: Sequence[str]) -> TileSums:
        def work(piece: Piece, scratch: Scratch) -> TileSums:
            rows_TP = self.reader.read(piece, scratch).task_vectors_TP
            sums = sum_tile(rows_TP, self.settings.mask_threshold, self.settings.min_agreement)
            for task, square in zip(self.reader.tasks, sums.gram_TT.diagonal().tolist(), strict=True):
                if not math.isfinite(square):  # finite weights, and a difference or product that is not
                    raise MergeError(f"task '{task}', tensor '{piece.name}': the task vector holds NaN or Inf")
            return sums

        pieces = [piece for name in names for piece in cut(name, self.reader.shape(name), self.entries)]
        return sum(self.pool.map(work, pieces), no_sums(len(self.reader.tasks)))

    def _rank(self, names: Sequence[str]) -> None:
        if not self.settings.ranks:
            return
        shapes = {name: self.reader.shape(name) for name in names}
        pieces = [
            Piece(name, 0, math.prod(shape)) for name, shape in shapes.items() if len(shape) == 2 and 0 not in shape
        ]
        limit = self.settings.rank_limit
        found = self.pool.map(lambda piece, scratch: tensor_ranks(self.reader, limit, piece, scratch), pieces)
        for piece, (ranks, skipped) in zip(pieces, found, strict=True):
            self.ranks[piece.name] = ranks
            if skipped:
                self.skipped[piece.name] = shapes[piece.name]

    def _mean_ranks(self, names: Sequence[str]) -> Vector:
        rows = [self.ranks[name] for name in names if name in self.ranks]
        columns = [[row[task] for row in rows] for task in range(len(self.reader.tasks))]
        known = [[rank for rank in column if rank is not None] for column in columns]
        return tuple(ratio(sum(ranks), len(ranks)) for ranks in known)

    def _count(self, entries: int) -> None:
        self.done += entries
        if self.tick is not None:
            self.tick(min(self.done, self.total), self.total)
