"""What an operator is: a frozen dataclass of hyper-parameters with one pure function from task vectors to one vector.

Shapes: T = tasks, P = entries of a tile, O × I = a whole matrix. An operator never sees a model, a file or a worker.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from manyshot import kernels

if TYPE_CHECKING:
    import torch

Positive = Annotated[float, Gt(0), Lt(math.inf)]
Fraction = Annotated[float, Gt(0), Le(1)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Memory = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1), Le(2**53)]
# one value, or one per round (METHOD: βʳ)
PerRound = Positive | tuple[Positive, ...]
FractionPerRound = Fraction | tuple[Fraction, ...]
ThresholdPerRound = NonNegative | tuple[NonNegative, ...]
CountPerRound = Count | tuple[Count, ...]
MemoryPerRound = Memory | tuple[Memory, ...]

if TYPE_CHECKING:
    import numpy as np

    Counts = np.ndarray[Any, np.dtype[np.int64]]

Weighting = Literal["normalized", "multiplier"]
Number = TypeVar("Number", int, float)


def tile_key(*parts: str | int) -> int:
    """64 bits from named parts: (seed, round, task, tensor)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Scan(Protocol):
    """Integer counts over whole tensors that an operator needs before it merges; one pass over the tiles at a time.

    Integers, so that the order in which tiles are counted does not matter.
    """

    done: bool

    @property
    def per_tile(self) -> bool:
        """Whether the pass that is due needs, in each tile, the sum over the tiles before it."""

    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts (int64) of the pass that is due."""

    def observe(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, counts: Counts) -> None:
        """Add one tile's counts, in place."""

    def advance(self, counts: Counts) -> None:
        """Take the sum over all tiles and go on to the next pass, or be done."""


@dataclass(frozen=True)
class Tile:
    """Where a tile lies, and what may be drawn for it.

    `keys` has one 64-bit number per task, from (seed, round, task, tensor); `offset` is the tile's first entry in its
    tensor. Draws depend on both alone, so every cut into tiles gives the same ones. `scan` holds what an operator
    counted before it merges; `preceding`, per task, what its last pass counted in earlier tiles.
    """

    keys: tuple[int, ...] = ()
    offset: int = 0
    scan: Scan | None = None
    preceding: tuple[int, ...] = ()

    @classmethod
    def of(cls, tasks: Sequence[str], tensor: str = "", *, seed: int = 0, round_index: int = 1) -> Tile:
        """The first tile of a tensor, with the keys that a run with this seed uses in this round."""
        return cls(keys=tuple(tile_key(seed, "operator", round_index, task, tensor) for task in tasks))

    def uniform(self, task_index: int, count: int) -> torch.Tensor:
        """(count,) float32 in [0, 1) for one task, one per entry of the tile."""
        return kernels.uniform(self.keys[task_index], self.offset, count)


def setting(default: Any, description: str) -> Any:
    """A hyper-parameter: its default, and what it is, for the commented recipe and for the documentation."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Base of every merging operator M(v_1 … v_T).

    `merge` must be elementwise along P (a tile gives the same bits as the whole tensor), must not change its inputs,
    and must take randomness from `tile` only.

    `weighting` says what `weights_T` is: "normalized" weights sum to 1 (a mean), "multiplier" weights are 1 each unless
    the user gives others (a sum).
    """

    # pydantic reads this: an unknown hyper-parameter is an error, never ignored
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    uses_loss_gaps: ClassVar[bool] = False
    weighting: ClassVar[Weighting] = "normalized"
    # whether M(v, …, v) = β·T·v: such a sum multiplies what all tasks share by β·T in every round
    sums: ClassVar[bool] = False

    name: str

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Merge (T, P) float32 task vectors with (T,) float32 weights into a (P,) float32 vector.

        An operator defines this, or `operation`, or (a MatrixOperator) `merge_matrix`.
        """
        operation = self.operation()
        if operation is None:
            raise TypeError(f"{type(self).__name__} defines neither merge() nor operation()")
        return kernels.apply(operation, task_vectors_TP, weights_T, keys=tile.keys, offset=tile.offset)

    def operation(self) -> kernels.Operation | None:
        """The same as steps that the compiled kernels do in one go; None for an operator they do not know."""
        return None

    def start_scan(self, num_tasks: int, num_entries: int) -> Scan | None:
        """What must be counted over `num_entries` entries before `merge`; None for an operator that needs nothing."""
        return None

    @property
    def scan_scope(self) -> Literal["tensor", "model"]:
        """Over what a scan runs."""
        return "tensor"

    def at_round(self, round_index: int) -> Self:
        """This operator with every per-round value replaced by its value for the round (1-based)."""
        chosen = {
            entry.name: value[round_index - 1]
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), tuple)
        }
        return replace(self, **chosen) if chosen else self

    def problems(self, num_tasks: int, rounds: int) -> list[tuple[str, str]]:
        """(field, message) for each hyper-parameter that does not fit the number of tasks or rounds."""
        found = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, tuple) and len(value) != rounds:
                found.append((entry.name, f"has {len(value)} values for {rounds} rounds; give one, or one per round"))
        return found

    @property
    def searches_scaling(self) -> bool:
        """Whether a line search finds β in every merge (`scaling: auto`)."""
        return getattr(self, "scaling", None) == "auto"

    def with_scaling(self, scaling: float) -> Self:
        """This operator with a number for `scaling: auto`."""
        chosen: dict[str, Any] = {"scaling": scaling}
        return replace(self, **chosen) if self.searches_scaling else self

    def growth(self, num_tasks: int) -> float:
        """The factor by which a round multiplies what all task vectors share: β·T for a sum, β for a mean.

        1 where a line search chooses β: it stops where the losses rise.
        """
        scaling = getattr(self, "scaling", 1.0)
        if self.searches_scaling:
            return 1.0
        largest = max(scaling, default=0.0) if isinstance(scaling, tuple) else scaling
        return float(largest) * (num_tasks if self.sums else 1)

    def warnings(self, num_tasks: int) -> list[str]:
        """What is allowed for this many tasks and still likely to disappoint."""
        return []


@dataclass(frozen=True, kw_only=True)
class MatrixOperator(Operator):
    """An operator on whole matrices. What is not a matrix is averaged (and scaled), as the papers do."""

    scaling: PerRound | Literal["auto"] = setting(1.0, "β: multiplies the merged matrix")

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The tensors that are not matrices: β Σ_τ w_τ v_τ / T."""
        return kernels.weighted_sum(task_vectors_TP, weights_T / len(weights_T), one(self.scaling))

    def merge_matrix(self, task_vectors: Iterable[torch.Tensor], weights_T: torch.Tensor) -> torch.Tensor:
        """Merge T float32 matrices (O, I) into one (O, I). They come one at a time, each overwritten by the next."""
        raise TypeError(f"{type(self).__name__} does not define merge_matrix()")


def one(value: Number | tuple[Number, ...] | Literal["auto"]) -> Number:
    """A hyper-parameter of which at_round() has chosen this round's value, or a line search."""
    if isinstance(value, tuple):
        raise TypeError("a per-round hyper-parameter: call at_round() before merge()")
    if isinstance(value, str):
        raise TypeError("scaling: auto is found in a run: call with_scaling() before merge()")
    return value


def merge_whole(
    operator: Operator, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """Scan, then merge, one whole tensor at once: what the streaming engine does tile by tile."""
    tile = tile or Tile.of([str(task) for task in range(len(task_vectors_TP))])
    import numpy as np

    scan = operator.start_scan(*task_vectors_TP.shape)
    while scan is not None and not scan.done:
        counts = np.zeros(scan.counts_shape(), np.int64)
        scan.observe(task_vectors_TP, weights_T, counts)
        scan.advance(counts)
    return operator.merge(task_vectors_TP, weights_T, replace(tile, scan=scan, preceding=(0,) * len(weights_T)))
