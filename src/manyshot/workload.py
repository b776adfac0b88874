"""How much a run has to train and to measure, by task: what the time left is estimated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manyshot.recipe import Recipe
from manyshot.tasks import Task


def workload(recipe: Recipe, tasks: Sequence[Task], mean_tokens: Mapping[str, float]) -> dict[str, Any]:
    """Training steps by round and of the experts, tokens of a step, examples of a validation and of a test pass."""
    rounds = range(1, recipe.protocol.rounds + 1)
    protocols = {name: recipe.protocol_of(name) for name in recipe.tasks}
    # an expert that exists already is round 1, and the reference, without a step
    adopted = {name for name, spec in recipe.tasks.items() if spec.expert}
    return {
        "steps": {
            name: [0 if r == 1 and name in adopted else protocol.steps_in_round(r) for r in rounds]
            for name, protocol in protocols.items()
        },
        "expert_steps": {name: 0 if name in adopted else protocol.local_steps for name, protocol in protocols.items()},
        "tokens_per_step": {name: tokens * recipe.local_update.batch_size for name, tokens in mean_tokens.items()},
        "validation": {task.name: len(task.validation) for task in tasks},
        "test": {task.name: len(task.test) for task in tasks},
    }
