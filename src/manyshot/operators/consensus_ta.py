"""Consensus Task Arithmetic: sum what enough tasks agree on (Wang et al. 2024, arXiv 2405.07813)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from manyshot import kernels
from manyshot.operators._base import CountPerRound, Operator, PerRound, ThresholdPerRound, Weighting, one, setting
from manyshot.operators.metis import agreement_problems, consensus_warnings


@dataclass(frozen=True, kw_only=True)
class ConsensusTA(Operator):
    """V = Σ_τ w_τ v_τ;  m_τ = 1[|w_τ v_τ| ≥ δ|V − w_τ v_τ|];  M(v) = β (1[Σ_τ m_τ ≥ k] ⊙ V), with w_τ = 1 unless given.

    δ is `mask_threshold` (searched in 0.2 … 0.6), k is `min_agreement`, β is `scaling`.
    """

    name: Literal["consensus_ta"] = "consensus_ta"
    mask_threshold: ThresholdPerRound = setting(
        0.4, "δ: how strongly a task must stand against the rest; 0 keeps every coordinate"
    )
    min_agreement: CountPerRound = setting(2, "k: tasks that must vote for a coordinate; at most all of them")
    scaling: PerRound | Literal["auto"] = setting(0.4, "β: multiplies the merged vector")

    weighting: ClassVar[Weighting] = "multiplier"
    sums: ClassVar[bool] = True

    def operation(self) -> kernels.Operation:
        return kernels.Operation(
            "consensus", one(self.scaling), threshold=one(self.mask_threshold), agreement=one(self.min_agreement)
        )

    def warnings(self, num_tasks: int) -> list[str]:
        return consensus_warnings(self.name, self.mask_threshold, num_tasks)

    def problems(self, num_tasks: int, rounds: int) -> list[tuple[str, str]]:
        return super().problems(num_tasks, rounds) + agreement_problems(self.min_agreement, num_tasks)
