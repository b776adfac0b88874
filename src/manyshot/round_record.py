"""What a round left in its records, and the numbers that tell how it went. Reads no file, imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

from manyshot.gap_weights import effective_tasks

Losses = Mapping[str, float]

# with ‖Θʳ⁻¹ − Θ⁰‖ this many times ‖u‖, float32 task vectors still give inner products of updates to 0.1 % or so
MOST_CANCELLED = 100.0


@dataclass(frozen=True)
class RoundRecord:
    """One round (0: the post-hoc merge), from loss_gap.json, and from merge.json and losses.json where they are there.

    `drift` is ‖u_τ‖ = ‖θ_τ − Θʳ⁻¹‖, `products` the inner products v_τ·v_σ of the task vectors that were merged. Norms
    are None, and both are empty, where nothing has been merged yet. In the space of factors the products are not those
    of weights and left out, and so are norms in the records of older versions.
    """

    round_index: int
    start_losses: Losses
    weights: Losses
    expert_losses: Losses = field(default_factory=dict)
    merged_losses: Losses = field(default_factory=dict)
    kept_share: float | None = None
    update_norm: float | None = None
    merged_norm: float | None = None
    drift: Losses = field(default_factory=dict)
    products: Mapping[tuple[str, str], float] = field(default_factory=dict)
    # why tasks were left out of the round, by task; the losses of a merge that was taken back
    skipped: Mapping[str, str] = field(default_factory=dict)
    rejected_losses: Losses = field(default_factory=dict)

    @classmethod
    def from_json(
        cls,
        round_index: int,
        loss_gap: Mapping[str, Any],
        merge: Mapping[str, Any] | None = None,
        losses: Mapping[str, Any] | None = None,
        *,
        space: str = "weights",
    ) -> RoundRecord:
        """The record from what the round's files say."""
        merge = merge or {}
        in_weights = merge if space == "weights" else {}
        norms = in_weights or merge.get("in_weights", {})
        drift = merge.get("drift", {}) if norms else {}
        return cls(
            round_index,
            start_losses=_only_losses(loss_gap["start_losses"]),
            weights=loss_gap["weights"],
            expert_losses=_only_losses(loss_gap.get("expert_losses", {})),
            merged_losses=_only_losses(losses or {}),
            kept_share=merge.get("kept_share"),
            update_norm=norms.get("update_norm"),
            merged_norm=norms.get("merged_norm"),
            # those of fully trained experts are not known where the merge was relative to the pretrained model
            drift={} if None in drift.values() else drift,
            products=_products(in_weights),
            skipped=loss_gap.get("skipped", {}),
            rejected_losses=merge.get("rolled_back", {}).get("losses", {}),
        )

    @property
    def gaps(self) -> dict[str, float]:
        """G_τ = L_τ(Θʳ⁻¹) − L_τ(θ_τ), of the tasks whose experts were measured."""
        return {task: self.start_losses[task] - loss for task, loss in self.expert_losses.items()}

    @property
    def changes(self) -> dict[str, float]:
        """L_τ(Θʳ) − L_τ(Θʳ⁻¹)."""
        return {task: loss - self.start_losses[task] for task, loss in self.merged_losses.items()}

    @property
    def mean_drift(self) -> float | None:
        """(1/T) Σ_τ ‖u_τ‖."""
        return fmean(self.drift.values()) if self.drift else None

    @property
    def reach(self) -> float | None:
        """‖Θʳ − Θʳ⁻¹‖ / (1/T) Σ_τ ‖u_τ‖: about 1/√T for the mean of T updates that have nothing in common."""
        return ratio(self.update_norm, self.mean_drift)


def _only_losses(measured: Mapping[str, Any]) -> dict[str, float]:
    return {task: entry["loss"] for task, entry in measured.items()}


def _products(merge: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """v_τ·v_σ for every pair of tasks, each with itself too, out of norms and cosines."""
    norms, cosines = merge.get("task_vector_norms"), merge.get("task_vector_cosines")
    if not norms or not cosines or None in norms.values():
        return {}
    tasks = merge["tasks"]
    return {
        (one, other): (cosines[i][j] if i != j else 1.0) * norms[one] * norms[other]
        for i, one in enumerate(tasks)
        for j, other in enumerate(tasks)
    }


def ratio(value: float | None, by: float | None) -> float | None:
    """value / by; None where one of them is not known, or there is nothing to divide by."""
    return value / by if value is not None and by else None


def predicted_changes(record: RoundRecord) -> dict[str, float]:
    """−ᾱ_τ G_τ with ᾱ = α / Σα: what a convex combination of the experts promises each task.

    For a convex L_τ, L_τ(Σ_σ ᾱ_σ θ_σ) ≤ Σ_σ ᾱ_σ L_τ(θ_σ) (Jensen). Where the other tasks' experts neither help nor
    hurt, L_τ(θ_σ) = L_τ(Θʳ⁻¹), the right side is L_τ(Θʳ⁻¹) − ᾱ_τ G_τ. A loss that falls further was steeper at the
    start, or tasks help each other; one that falls less, or rises, says that they hurt each other or that the operator
    went beyond a convex combination (a sum, a mask, momentum).
    """
    total = math.fsum(abs(weight) for weight in record.weights.values())
    return {task: -abs(record.weights[task]) / total * gap for task, gap in record.gaps.items()}


def update_cosine(record: RoundRecord, before: RoundRecord | None, reference: str) -> float | None:
    """Mean cosine of two tasks' updates u_τ = θ_τ − Θʳ⁻¹, over all pairs of unlike tasks.

    With reference `pretrained` the task vectors are v_τ = s + u_τ with s = Θʳ⁻¹ − Θ⁰ in all of them. |v_τ|² gives
    s·u_τ = (|v_τ|² − |s|² − |u_τ|²)/2, so u_τ·u_σ = v_τ·v_σ − |s|² − s·u_τ − s·u_σ. None where |s| is so much larger
    that the difference would be rounding.
    """
    norms = record.drift
    if not record.products or not norms or min(norms.values()) == 0:
        return None
    shared = 0.0
    if before is not None and reference == "pretrained":
        if before.merged_norm is None or before.merged_norm > MOST_CANCELLED * min(norms.values()):
            return None
        shared = before.merged_norm**2
    along = {task: (record.products[task, task] - shared - norms[task] ** 2) / 2 for task in norms} if shared else {}
    return fmean(
        (record.products[one, other] - shared - along.get(one, 0.0) - along.get(other, 0.0))
        / (norms[one] * norms[other])
        for one, other in combinations(norms, 2)
    )


def growth(now: RoundRecord, before: RoundRecord) -> float | None:
    """By what the merged update grew from one round to the next that the tasks' own updates do not explain.

    The smaller of the growth of ‖Θʳ − Θʳ⁻¹‖ and of its ratio to the tasks' own norms: more steps in a round lengthen
    both updates, and a learning rate that decays shortens both.
    """
    grown, by_reach = ratio(now.update_norm, before.update_norm), ratio(now.reach, before.reach)
    return min(grown, by_reach) if grown is not None and by_reach is not None else None


def measures(history: Sequence[RoundRecord], reference: str) -> dict[str, Any]:
    """The numbers of the last round of `history`, null where they are not known (yet)."""
    now, before = history[-1], history[-2] if len(history) > 1 else None
    predicted = predicted_changes(now)
    return {
        "effective_tasks": effective_tasks(list(now.weights.values())),
        "kept_share": now.kept_share,
        "update_norm": now.update_norm,
        "update_growth": ratio(now.update_norm, before.update_norm) if before else None,
        "mean_drift": now.mean_drift,
        "update_over_drift": now.reach,
        "mean_cosine": update_cosine(now, before, reference),
        "predicted_change": predicted,
        "mean_predicted_change": fmean(predicted.values()) if predicted else None,
        "realised_change": now.changes,
        "mean_realised_change": fmean(now.changes.values()) if now.changes else None,
    }
