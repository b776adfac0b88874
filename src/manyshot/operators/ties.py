"""TIES: trim, elect a sign, average what agrees with it (Yadav et al. 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from manyshot import kernels
from manyshot.operators._base import FractionPerRound, Operator, PerRound, Scan, Tile, Weighting, one, setting
from manyshot.operators._trim import TrimScan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Ties(Operator):
    """Keep each v_τ's `density` largest magnitudes, t_τ; s = sign(Σ_τ w_τ t_τ); M(v) = β · mean of w_τ t_τ of sign s.

    The mean is Σ w_τ t_τ / Σ w_τ over the tasks that agree. `trim_scope`: the largest of each tensor, or of the whole
    model. Exactly ⌊density · n⌋ entries stay; among equal magnitudes the first ones in order.
    """

    name: Literal["ties"] = "ties"
    density: FractionPerRound = setting(0.2, "share of each task vector's entries that stay")
    scaling: PerRound | Literal["auto"] = setting(1.0, "β: multiplies the merged vector")
    trim_scope: Literal["tensor", "model"] = setting("tensor", "the largest of each tensor, or of all together")

    weighting: ClassVar[Weighting] = "multiplier"

    @property
    def scan_scope(self) -> Literal["tensor", "model"]:
        return self.trim_scope

    def start_scan(self, num_tasks: int, num_entries: int) -> Scan:
        return TrimScan(num_tasks, num_entries, one(self.density))

    def operation(self) -> kernels.Operation:
        return kernels.Operation("elect", one(self.scaling), prepare="trim")

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
        """(T, P) float32 task vectors and (T,) multipliers -> (P,) float32; `tile.scan` holds the thresholds."""
        if not isinstance(tile.scan, TrimScan):
            raise TypeError("TIES needs its scan before it merges; merge_whole() does both")
        thresholds, allowed = tile.scan.thresholds, tile.scan.allowed(tile.preceding)
        return kernels.apply(self.operation(), task_vectors_TP, weights_T, thresholds=thresholds, allowed=allowed)
