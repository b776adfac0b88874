"""Task Arithmetic: the scaled sum of the task vectors (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from manyshot import kernels
from manyshot.operators._base import Operator, PerRound, Weighting, one, setting


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Operator):
    """M(v) = β Σ_τ w_τ v_τ, with w_τ = 1 unless given; β is `scaling`."""

    name: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: PerRound | Literal["auto"] = setting(0.4, "β: multiplies the sum")

    weighting: ClassVar[Weighting] = "multiplier"
    sums: ClassVar[bool] = True

    def operation(self) -> kernels.Operation:
        return kernels.Operation("sum", one(self.scaling))
