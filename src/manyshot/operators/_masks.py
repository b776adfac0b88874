"""Consensus masks, shared by METIS and ConsensusTA. Shapes: T = tasks, P = entries of a tile."""

from __future__ import annotations

import torch


def consensus_mask(
    weighted_TP: torch.Tensor, total_P: torch.Tensor, threshold: float, min_agreement: int
) -> torch.Tensor:
    """m̄_i = 1[Σ_τ 1[|w_τ,i| ≥ δ · |V_i − w_τ,i|] ≥ k], a (P,) bool tensor; V = Σ_τ w_τ is `total_P`.

    A task votes for a coordinate that the rest does not dominate; the coordinate stays when k tasks vote for it.
    """
    votes_P = torch.zeros_like(total_P, dtype=torch.int32)
    for weighted_P in weighted_TP:
        votes_P += weighted_P.abs() >= threshold * (total_P - weighted_P).abs()
    return votes_P >= min_agreement
