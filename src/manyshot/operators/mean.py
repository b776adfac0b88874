"""Mean of the task vectors: model soups (arXiv 2203.05482) and, in rounds, federated averaging (arXiv 1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyshot import kernels
from manyshot.operators._base import Operator


@dataclass(frozen=True, kw_only=True)
class Mean(Operator):
    """M(v) = Σ_τ w_τ v_τ, with w_τ = 1/T."""

    name: Literal["mean"] = "mean"

    def operation(self) -> kernels.Operation:
        return kernels.Operation("sum")
