"""TSV-M: merge the tasks' leading singular vectors, decorrelated (Gargiulo et al. 2025, arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from manyshot.operators._base import MatrixOperator, Weighting, one
from manyshot.operators._spectral import nearest_orthogonal, thin_svd

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TsvM(MatrixOperator):
    """Of each v_τ = U_τ Σ_τ V_τᵀ the leading K/T directions; U = [U_1 … U_T], V likewise, Σ = diag(w_τ Σ_τ).

    M(v) = β U⊥ Σ V⊥ᵀ, U⊥ and V⊥ the nearest matrices with orthonormal columns (the whitening). β is `scaling`.
    """

    name: Literal["tsv_m"] = "tsv_m"

    weighting: ClassVar[Weighting] = "multiplier"

    def merge_matrix(self, task_vectors: Iterable[torch.Tensor], weights_T: torch.Tensor) -> torch.Tensor:
        import torch

        lefts, values, rights = [], [], []
        shape: tuple[int, ...] = (0, 0)
        for vector_OI, weight in zip(task_vectors, weights_T, strict=True):
            shape = tuple(vector_OI.shape)
            left, value, right = thin_svd(vector_OI)
            leading = max(1, min(shape) // len(weights_T))
            lefts.append(left[:, :leading].clone())
            values.append(value[:leading] * weight)
            rights.append(right[:leading].clone())
        values_K = torch.cat(values)
        if not len(values_K):
            return torch.zeros(shape)
        left_OK = nearest_orthogonal(torch.cat(lefts, dim=1))
        right_KI = nearest_orthogonal(torch.cat(rights))
        return (left_OK * (values_K * one(self.scaling))) @ right_KI
