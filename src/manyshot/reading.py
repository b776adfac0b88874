"""Read what an operator merges: the task vectors of some entries of one tensor, from wherever the experts are stored.

Shapes: T = tasks, P = entries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from manyshot import kernels
from manyshot.engine import Piece
from manyshot.errors import MergeError, ModelError
from manyshot.kernels import Source
from manyshot.kernels.pieces import Input
from manyshot.task_vector import Scratch, StoredTaskVector, TileSource, Update, read_wide, stored_source
from manyshot.tensors import Checkpoint

if TYPE_CHECKING:
    import torch

Reference = Literal["pretrained", "start"]


@dataclass(frozen=True)
class TileData:
    """One tile: the float32 model it adds to (Θʳ⁻¹), its difference to Θ⁰, the task vectors; None where not read."""

    before_P: torch.Tensor | None
    start_P: torch.Tensor | None
    task_vectors_TP: torch.Tensor


@dataclass(frozen=True)
class TaskVectorReader:
    """Task vectors v_τ of a merge. With reference `pretrained` v_τ = θ_τ − Θ⁰, with `start` θ_τ − Θʳ⁻¹.

    `pretrained` is None in the space of factors, where Θ⁰ counts as zero. `keep_base` reads Θʳ⁻¹ even where no expert
    needs it, for whoever adds the merged vector to it.
    """

    pretrained: Checkpoint | None
    start: StoredTaskVector | None
    tasks: tuple[str, ...]
    updates: tuple[Update, ...]
    reference: Reference = "pretrained"
    allow_nonfinite: bool = False
    keep_base: bool = False
    left_out: frozenset[str] = frozenset()

    def without(self, names: Iterable[str]) -> TaskVectorReader:
        """This reader, leaving out some tensors."""
        return replace(self, left_out=frozenset(names))

    def names(self) -> tuple[str, ...]:
        """The tensors that a merge changes: float tensors that an expert or the start changed, sorted."""
        changed = {name for update in self.updates for name in update.names}
        if self.pretrained is not None:
            changed = {name for name in changed if self.pretrained.info(name).is_float}
        return tuple(sorted((changed | set(self.start.names if self.start else ())) - self.left_out))

    def shape(self, name: str) -> tuple[int, ...]:
        if self.pretrained is not None:
            return self.pretrained.info(name).shape
        return self.updates[0].shape(name)

    def compiled_input(self, name: str) -> Input | None:
        """What the compiled kernels read for a tensor; None where they cannot."""
        if not kernels.compiled():
            return None
        zeros = TileSource(Source(), None)
        reads_start = self.start is not None and name in self.start
        found = [
            stored_source(self.pretrained, name) if self.pretrained is not None and self._reads_base(name) else zeros,
            stored_source(self.start.tensors, name) if self.start is not None and reads_start else zeros,
            *(update.source(name) if name in update.names else zeros for update in self.updates),
        ]
        sources = [source for source in found if source is not None]
        if len(sources) < len(found):
            return None
        owners = tuple(one.owner for one in sources)
        return Input(tuple(one.source for one in sources), owners, add_start=self.reference == "pretrained")

    def _reads_base(self, name: str) -> bool:
        return self.keep_base or any(name in update.names and update.is_dense(name) for update in self.updates)

    def read(self, piece: Piece, scratch: Scratch, rows_TP: torch.Tensor | None = None) -> TileData:
        """Every task's vector for one piece, into `rows_TP` or the thread's own buffers."""
        count = piece.count
        if rows_TP is None:
            rows_TP = scratch.take("task vectors", len(self.tasks) * count).reshape(len(self.tasks), count)
        before_P, start_P = self.read_before(piece, scratch)
        for task in range(len(self.tasks)):
            self.read_task(task, piece, before_P, start_P, rows_TP[task], scratch)
        return TileData(before_P, start_P, rows_TP)

    def refuse_nonfinite(self, name: str, bad: Sequence[bool | int]) -> None:
        """Name the first model with NaN or Inf: `bad` is for the base, then for each task."""
        if self.allow_nonfinite:
            return
        if bad[0] and self.pretrained is not None:
            raise ModelError(f"{self.pretrained.path}: tensor '{name}' holds NaN or Inf")
        for task, found in zip(self.tasks, bad[1:], strict=True):
            if found:
                where = f"task '{task}', tensor '{name}'"
                raise MergeError(f"{where}: the expert holds NaN or Inf, or factors whose product does")

    def read_before(self, piece: Piece, scratch: Scratch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Θʳ⁻¹ (where something needs it) and Θʳ⁻¹ − Θ⁰ (where it is not zero)."""
        start_P: torch.Tensor | None = None
        if self.start is not None and piece.name in self.start:
            start_P = scratch.take("start", piece.count)
            self.start.read_entries(piece.name, piece.start, start_P)
        if self.pretrained is None or not self._reads_base(piece.name):
            return None, start_P
        before_P = scratch.take("before", piece.count)
        if read_wide(self.pretrained, piece.name, piece.start, before_P, scratch):
            self.refuse_nonfinite(piece.name, [True, *(False for _ in self.tasks)])
        if start_P is not None:
            before_P += start_P
        return before_P, start_P

    def read_task(
        self,
        task: int,
        piece: Piece,
        before_P: torch.Tensor | None,
        start_P: torch.Tensor | None,
        out_P: torch.Tensor,
        scratch: Scratch,
    ) -> None:
        """One task's vector for one piece."""
        update = self.updates[task]
        if piece.name not in update.names:
            out_P.zero_()
        elif update.read(piece.name, piece.start, before_P, out_P, scratch):
            self.refuse_nonfinite(piece.name, [False, *(other == task for other in range(len(self.tasks)))])
        if start_P is not None and self.reference == "pretrained":
            out_P += start_P


def check_updates(pretrained: Checkpoint, tasks: Sequence[str], updates: Sequence[Update]) -> None:
    """Every changed tensor is one of the base, with the base's shape. Raises ModelError with both shapes."""
    for task, update in zip(tasks, updates, strict=True):
        for name in update.names:
            if name not in pretrained:
                raise ModelError(
                    f"task '{task}': its expert changes tensor '{name}', which {pretrained.path} does not have"
                )
            info = pretrained.info(name)
            if update.shape(name) != info.shape:
                raise ModelError(
                    f"task '{task}': tensor '{name}' has shape {update.shape(name)}, "
                    f"the base {pretrained.path} has {info.shape}"
                )
