"""The outer optimizer of a round, as `merge` asks for it, with what the rounds before it have left."""

from __future__ import annotations

from pathlib import Path

from manyshot.outer import MEMORIES, Outer
from manyshot.recipe import Merge
from manyshot.task_vector import StoredTaskVector


def make_outer(
    merge: Merge, round_index: int, *, before: Path | None, state: Path | None, leaves: Path | None, anew: int = 0
) -> Outer:
    """The outer optimizer of a round; 0, post-hoc, steps as round 1 does.

    `before` (Θʳ⁻² − Θ⁰), `state` and `leaves` are where files are, or go, for an optimizer that has such; None: there
    is no such round, so without `leaves` this is the last one. `anew` is the round after which it began anew; 0: it
    never did.
    """
    step_size, optimizer = merge.outer_step_size, merge.outer_optimizer
    remembers = bool(MEMORIES[optimizer])
    counted = max(1, round_index - anew)
    momentum = 0.0 if _arrives(merge, leaves) else merge.momentum_of(counted)
    return Outer(
        step_size[max(1, round_index) - 1] if isinstance(step_size, tuple) else step_size,
        momentum,
        StoredTaskVector(before) if before and momentum and not remembers else None,
        optimizer,
        betas=(merge.outer_beta1, merge.outer_beta2),
        epsilon=merge.outer_epsilon,
        round_index=counted,
        state=StoredTaskVector(state) if state and remembers else None,
        leaves=leaves if remembers else None,
    )


def _arrives(merge: Merge, leaves: Path | None) -> bool:
    """Whether nesterov ends at xʳ = Θʳ⁻¹ + η d, where it has come to, and not ahead of it, where a round would begin.

    Nesterov's method (1983) has these two sequences: gradients are taken at the one, the other is its result.
    """
    return merge.outer_look_ahead == "between_rounds" and leaves is None
