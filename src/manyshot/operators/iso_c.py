"""Iso-C: the summed task matrix with an isotropic spectrum (Marczak et al. 2025, arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from manyshot.operators._base import MatrixOperator, Weighting, one
from manyshot.operators._spectral import thin_svd

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class IsoC(MatrixOperator):
    """Σ_τ w_τ v_τ = U diag(σ) Vᵀ;  M(v) = β σ̄ U Vᵀ, σ̄ the mean of the K singular values that are not zero.

    β is `scaling`. A sum of low-rank adapters has a K below full rank; there σ̄ is the mean over its own directions.
    """

    name: Literal["iso_c"] = "iso_c"

    weighting: ClassVar[Weighting] = "multiplier"
    sums: ClassVar[bool] = True

    def merge_matrix(self, task_vectors: Iterable[torch.Tensor], weights_T: torch.Tensor) -> torch.Tensor:
        import torch

        total_OI: torch.Tensor | None = None
        for vector_OI, weight in zip(task_vectors, weights_T, strict=True):
            weighted_OI = vector_OI * weight
            total_OI = weighted_OI if total_OI is None else total_OI.add_(weighted_OI)
        assert total_OI is not None
        left_OK, values_K, right_KI = thin_svd(total_OI)
        if not len(values_K):
            return torch.zeros_like(total_OI)
        return (left_OK @ right_KI) * (values_K.mean() * one(self.scaling))
