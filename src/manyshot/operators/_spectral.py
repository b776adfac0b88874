"""Singular value decompositions for the matrix operators. Shapes: O × I = a matrix, K = its numerical rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def thin_svd(matrix_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (O, K), σ (K), Vᵀ (K, I) over the singular values that are not rounding noise.

    The update of a LoRA adapter has rank R; the directions beyond it are arbitrary, so they are cut off.
    """
    import torch

    left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    noise = float(values[0]) * max(matrix_OI.shape) * torch.finfo(matrix_OI.dtype).eps if len(values) else 0.0
    rank = int((values > noise).sum())
    return left[:, :rank], values[:rank], right[:rank]


def nearest_orthogonal(matrix_OK: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns (rows, where it is wide) nearest to the given one: P Qᵀ of P Σ Qᵀ."""
    import torch

    left_OK, _, right_KK = torch.linalg.svd(matrix_OK, full_matrices=False)
    nearest_OK: torch.Tensor = left_OK @ right_KK
    return nearest_OK
