"""DARE: drop entries at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from manyshot import kernels
from manyshot.operators._base import FractionPerRound, Operator, PerRound, Weighting, one, setting


@dataclass(frozen=True, kw_only=True)
class Dare(Operator):
    """d_τ = (z_τ ⊙ v_τ)/p, z ~ Bernoulli(p), p = `density`; then M(v) = β Σ_τ w_τ d_τ, or TIES' sign election on d.

    The draws depend on (seed, round, task, tensor, position) alone.
    """

    name: Literal["dare"] = "dare"
    density: FractionPerRound = setting(0.2, "p: share of the entries that stay; DARE's drop rate is 1 − p")
    scaling: PerRound | Literal["auto"] = setting(0.4, "β: multiplies the merged vector")
    then: Literal["task_arithmetic", "ties"] = setting("task_arithmetic", "how the thinned vectors are put together")
    rescale: bool = setting(True, "divide by p, so that every entry keeps its expectation")

    weighting: ClassVar[Weighting] = "multiplier"

    @property
    def sums(self) -> bool:  # type: ignore[override]
        return self.then == "task_arithmetic"

    def operation(self) -> kernels.Operation:
        density = one(self.density)
        return kernels.Operation(
            "elect" if self.then == "ties" else "sum",
            one(self.scaling),
            prepare="drop",
            density=density,
            rescale=density if self.rescale else 1.0,
        )
