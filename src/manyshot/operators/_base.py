"""What an operator is: a frozen dataclass of hyper-parameters with one pure function from task vectors to one vector.

Shapes: T = tasks, P = entries of a tile. An operator never sees a model, a file or a worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Self

import torch
from annotated_types import Gt, Lt

Positive = Annotated[float, Gt(0), Lt(math.inf)]
# one value, or one per round (METHOD: βʳ)
PerRound = Positive | tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Base of every merging operator M(v_1 … v_T).

    `merge` must be elementwise along P (a tile gives the same bits as the whole tensor), must not change its inputs,
    and must take randomness from `generator` only.
    """

    # pydantic reads this: an unknown hyper-parameter is an error, never ignored
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    uses_loss_gaps: ClassVar[bool] = False

    name: str

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Merge (T, P) float32 task vectors with (T,) float32 weights that sum to 1 into a (P,) float32 vector."""
        raise TypeError(f"{type(self).__name__} does not define merge()")

    def at_round(self, round_index: int) -> Self:
        """This operator with every per-round value replaced by its value for the round (1-based)."""
        chosen = {
            field.name: value[round_index - 1]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), tuple)
        }
        return replace(self, **chosen) if chosen else self

    def problems(self, num_tasks: int, rounds: int) -> list[tuple[str, str]]:
        """(field, message) for each hyper-parameter that does not fit the number of tasks or rounds."""
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != rounds:
                found.append((field.name, f"has {len(value)} values for {rounds} rounds; give one, or one per round"))
        return found


def weighted_task_vectors(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """α_τ v_τ for every task, (T, P)."""
    return task_vectors_TP * weights_T[:, None]


def sum_in_order(rows_TP: torch.Tensor) -> torch.Tensor:
    """Σ over tasks in recipe order, one addition at a time.

    torch.sum may regroup additions depending on the size of P; a loop over T gives the same bits for every tile.
    """
    total_P = rows_TP[0].clone()
    for row_P in rows_TP[1:]:
        total_P += row_P
    return total_P
