"""METIS: loss-gap weights and a consensus mask (Im et al., ICML 2026, arXiv 2606.16501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge

from manyshot.operators._base import Operator, PerRound, Positive, sum_in_order, weighted_task_vectors
from manyshot.operators._masks import consensus_mask


@dataclass(frozen=True, kw_only=True)
class Metis(Operator):
    """V = Σ_τ α_τ v_τ;  m_τ = 1[α_τ|v_τ| ≥ δ|V − α_τ v_τ|];  M(v) = β (1[Σ_τ m_τ ≥ k] ⊙ V).

    α = softmax(G / `temperature`) comes from the loss gaps G (manyshot.loss_gap) and reaches `merge` as `weights_T`;
    δ is `mask_threshold`, k is `min_agreement`, β is `scaling`. The defaults are the paper's.
    """

    name: Literal["metis"] = "metis"
    temperature: Positive = 2.0
    mask_threshold: Annotated[float, Ge(0)] = 0.3
    min_agreement: Annotated[int, Ge(1)] = 2
    scaling: PerRound = 1.0

    uses_loss_gaps: ClassVar[bool] = True

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(T, P) float32 task vectors and (T,) gap weights -> (P,) float32."""
        assert isinstance(self.scaling, int | float)  # at_round() has chosen this round's value
        weighted_TP = weighted_task_vectors(task_vectors_TP, weights_T)
        total_P = sum_in_order(weighted_TP)
        keep_P = consensus_mask(weighted_TP, total_P, self.mask_threshold, self.min_agreement)
        return torch.where(keep_P, total_P, 0.0) * self.scaling

    def problems(self, num_tasks: int, rounds: int) -> list[tuple[str, str]]:
        found = super().problems(num_tasks, rounds)
        if self.min_agreement > num_tasks:
            found.append(
                ("min_agreement", f"{self.min_agreement} tasks can never agree among {num_tasks}; at most {num_tasks}")
            )
        return found
