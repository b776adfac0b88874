"""Mean of the task vectors: model soups (arXiv 2203.05482) and, in rounds, federated averaging (arXiv 1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from manyshot.operators._base import Operator, sum_in_order, weighted_task_vectors


@dataclass(frozen=True, kw_only=True)
class Mean(Operator):
    """M(v) = Σ_τ w_τ v_τ, with w_τ = 1/T."""

    name: Literal["mean"] = "mean"

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(T, P) float32 task vectors and (T,) weights -> (P,) float32."""
        return sum_in_order(weighted_task_vectors(task_vectors_TP, weights_T))
