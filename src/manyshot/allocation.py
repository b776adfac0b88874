"""How the steps of a round are shared out among the tasks: evenly, or more to those that the merge erased most.

`protocol.allocation: gap` shares T · n steps out in proportion to (1/T + α_τ)/2, where n is the even share and α
are the weights of the round before. No task gets fewer than one step or more than 2n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# how much of the steps goes by weights; the rest is even, so that no task starves on one round's measurement
BY_WEIGHTS = 0.5
MOST_TIMES_EVEN = 2


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of one local update, and those its task has done before it."""

    num_steps: int
    steps_before: int


def allocate(even: int, weights: Sequence[float]) -> list[int]:
    """Steps of every task, in order; they sum to T · even exactly.

    One after the other, a step goes to the task that is furthest below its quota (largest remainder); the first of
    equals.
    """
    num_tasks, total = len(weights), math.fsum(weights)
    quotas = [
        even * ((1 - BY_WEIGHTS) + BY_WEIGHTS * num_tasks * (weight / total if total else 1 / num_tasks))
        for weight in weights
    ]
    given = [1] * num_tasks
    for _ in range(num_tasks * (even - 1)):
        open_tasks = [task for task in range(num_tasks) if given[task] < MOST_TIMES_EVEN * even]
        given[max(open_tasks, key=lambda task: quotas[task] - given[task])] += 1
    return given
