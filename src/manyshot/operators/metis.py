"""METIS: loss-gap weights and a consensus mask (Im et al., ICML 2026, arXiv 2606.16501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from manyshot import kernels
from manyshot.operators._base import (
    Count,
    CountPerRound,
    MemoryPerRound,
    Operator,
    PerRound,
    Positive,
    ThresholdPerRound,
    Tile,
    one,
    setting,
)
from manyshot.operators._norm import NormScan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Metis(Operator):
    """V = Σ_τ α_τ v_τ;  m_τ = 1[α_τ|v_τ| ≥ δ|V − α_τ v_τ|];  M(v) = β (1[Σ_τ m_τ ≥ k] ⊙ V).

    α = softmax(G / `temperature`) comes from the loss gaps G (manyshot.gap_weights) and reaches `merge` as `weights_T`;
    δ is `mask_threshold`, k is `min_agreement`, β is `scaling`. The defaults here are the paper's; what a recipe's
    `operator: metis` means beyond them is in manyshot.presets.

    Beyond the paper: `gap` says what a gap is a share of (what the expert gained on the pretrained model, the expert's
    loss, the start's), or weighs all tasks alike with `none` (the ablation without loss-gap weights);
    `temperature: auto` chooses λ so that exp(H(α)) is `effective_tasks` (three quarters of the tasks when not given);
    `weight_memory` μ keeps some of the round before's weights, log α_r = μ log α_{r−1} + G/λ up to a constant;
    `mask: false` merges V itself, `mask: soft` keeps min(Σ_τ m_τ, k)/k of a coordinate;
    `vote: unweighted` has tasks vote on v_τ, m_τ = 1[|v_τ| ≥ δ|Σ v − v_τ|], whatever their weights;
    `rescale: norm` gives each tensor the norm that β V has.
    """

    name: Literal["metis"] = "metis"
    temperature: PerRound | Literal["auto"] = setting(
        2.0, "λ: small lets the task with the largest loss gap take all weight; auto: see effective_tasks"
    )
    gap: Literal["absolute", "relative", "over_expert", "over_start", "none"] = setting(
        "absolute",
        "relative: as a share of what the expert gained; over_expert, over_start: of a loss; none: all weigh alike",
    )
    effective_tasks: Positive | None = setting(
        None, "with temperature: auto, exp(H(α)) to aim at; 3/4 of the tasks when not given"
    )
    weight_memory: MemoryPerRound = setting(
        0.0, "μ: how much of the round before's weights is kept, log α = μ log α′ + G/λ"
    )
    mask: bool | Literal["soft"] = setting(
        True, "false merges the weighted sum as it is; soft keeps the share of the votes that agree"
    )
    vote: Literal["weighted", "unweighted"] = setting(
        "weighted", "unweighted: tasks vote on their vectors themselves, whatever their weights"
    )
    mask_threshold: ThresholdPerRound = setting(
        0.3, "δ: how strongly a task must stand against the rest; 0 keeps every coordinate"
    )
    min_agreement: CountPerRound = setting(2, "k: tasks that must vote for a coordinate; at most all of them")
    rescale: Literal["none", "norm"] = setting("none", "norm gives each tensor the norm that it had without the mask")
    scaling: PerRound | Literal["auto"] = setting(
        1.0, "β: multiplies the merged task vector; one value, one per round, or auto (a line search)"
    )

    uses_loss_gaps: ClassVar[bool] = True

    def operation(self) -> kernels.Operation:
        if not self.mask:
            return kernels.Operation("sum", one(self.scaling))
        return kernels.Operation(
            "consensus",
            one(self.scaling),
            threshold=one(self.mask_threshold),
            agreement=one(self.min_agreement),
            unweighted=self.vote == "unweighted",
            soft=self.mask == "soft",
        )

    def start_scan(self, num_tasks: int, num_entries: int) -> NormScan | None:
        return NormScan(self.operation()) if self.mask and self.rescale == "norm" else None

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
        """(T, P) float32 task vectors and (T,) weights -> (P,) float32; `tile.scan` holds by how much to rescale."""
        operation = self.operation()
        if self.mask and self.rescale == "norm":
            if not isinstance(tile.scan, NormScan):
                raise TypeError("METIS with rescale needs its scan before it merges; merge_whole() does both")
            operation = tile.scan.rescaled(operation)
        return kernels.apply(operation, task_vectors_TP, weights_T)

    def warnings(self, num_tasks: int) -> list[str]:
        return consensus_warnings(self.name, self.mask_threshold, num_tasks) if self.mask else []

    def problems(self, num_tasks: int, rounds: int) -> list[tuple[str, str]]:
        found = super().problems(num_tasks, rounds)
        if self.mask:
            found += agreement_problems(self.min_agreement, num_tasks)
        if self.effective_tasks is not None and self.temperature != "auto":
            found.append(
                ("effective_tasks", "is what temperature: auto aims at; with a number for temperature drop it")
            )
        elif self.effective_tasks is not None and not 1 <= self.effective_tasks <= num_tasks:
            found.append(("effective_tasks", f"{self.effective_tasks:g} of {num_tasks} tasks; give 1 … {num_tasks}"))
        return found


def consensus_warnings(name: str, mask_threshold: ThresholdPerRound, num_tasks: int) -> list[str]:
    """A threshold that drops even what all tasks agree on: of T equal parts each is 1/(T − 1) of the rest."""
    smallest = min(mask_threshold) if isinstance(mask_threshold, tuple) else mask_threshold
    if num_tasks < 2 or smallest * (num_tasks - 1) <= 1:
        return []
    return [
        f"mask_threshold: {smallest:g} is above 1/(T − 1) = {1 / (num_tasks - 1):.3g} for {num_tasks} tasks, so {name} "
        "drops a coordinate on which all tasks agree alike and, unless merge.reference is start, with it what earlier "
        "rounds put there; lower it"
    ]


def agreement_problems(min_agreement: int | tuple[Count, ...], num_tasks: int) -> list[tuple[str, str]]:
    """More tasks asked to agree than there are."""
    largest = max(min_agreement, default=1) if isinstance(min_agreement, tuple) else min_agreement
    if largest <= num_tasks:
        return []
    return [("min_agreement", f"{largest} tasks can never agree among {num_tasks}; at most {num_tasks}")]
