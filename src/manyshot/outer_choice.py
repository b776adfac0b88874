"""The outer optimizer of a round, as `merge` asks for it, with what the rounds before it have left."""

from __future__ import annotations

from pathlib import Path

from manyshot.outer import MEMORIES, Outer
from manyshot.recipe import Merge
from manyshot.task_vector import StoredTaskVector


def make_outer(
    merge: Merge,
    round_index: int,
    *,
    before: Path | None,
    state: Path | None,
    leaves: Path | None,
    anew: int = 0,
    last: bool = False,
) -> Outer:
    """The outer optimizer of a round; 0, post-hoc, steps as round 1 does.

    `before` (Θʳ⁻² − Θ⁰), `state` and `leaves` are where files are, or go, for an optimizer that has such; None: there
    is no such round. `anew` is the round after which it began anew; 0: it never did. The `last` round is the one that
    the run was to end with; rounds may have been added since, which go on from where it did.
    """
    step_size, optimizer = merge.outer_step_size, merge.outer_optimizer
    remembers = bool(MEMORIES[optimizer])
    counted = max(1, round_index - anew)
    momentum = merge.momentum_of(counted)
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
        look_ahead=merge.looks_ahead(last=last),
    )
