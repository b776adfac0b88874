"""The outer optimizer of `merge.reference: start`: a round's merged update d = M(u) is an outer gradient.

With η = `outer_step_size`, μ = `outer_momentum`, β₁, β₂ and ε = `outer_beta1`, `outer_beta2` and `outer_epsilon`:

    sgd        Θʳ = Θʳ⁻¹ + η d + μ (Θʳ⁻¹ − Θʳ⁻²)                        heavy ball; η = 1, μ = 0 is plain ATM
    nesterov   bʳ = μ bʳ⁻¹ + d        Θʳ = Θʳ⁻¹ + η (d + μ bʳ)           DiLoCo, arXiv 2311.08105
                                      Θᴿ = Θᴿ⁻¹ + η d                    the last, with look_ahead: between_rounds
    adam       mʳ = β₁ mʳ⁻¹ + (1 − β₁) d,   sʳ = β₂ sʳ⁻¹ + (1 − β₂) d²   FedAdam, arXiv 2003.00295, with
               Θʳ = Θʳ⁻¹ + η m̂ / (√ŝ + ε),  m̂ = mʳ/(1 − β₁ʳ), ŝ = sʳ/(1 − β₂ʳ)   Adam's own correction: R is small

Before the first round nothing has moved: Θ⁻¹ = Θ⁰, b⁰ = m⁰ = s⁰ = 0. Its step is η d, or with nesterov η (1 + μ) d, or
with adam η d/(|d| + ε). A tensor that no expert changed before, or not in this round, is one that moved by zero.

P = entries of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from manyshot import kernels
from manyshot.engine import Piece
from manyshot.task_vector import Scratch, StoredTaskVector
from manyshot.tensor_writer import PositionedWriter
from manyshot.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

OuterOptimizer = Literal["sgd", "nesterov", "adam"]
STATE_NAME = "outer_state.safetensors"
# what an optimizer remembers beside the task vectors of the last two rounds, each as large as one of them
MEMORIES: dict[OuterOptimizer, tuple[str, ...]] = {
    "sgd": (),
    "nesterov": ("velocity",),
    "adam": ("first_moment", "second_moment"),
}


@dataclass(frozen=True)
class Outer:
    """The outer optimizer in one round.

    `before` is Θʳ⁻² − Θ⁰, for the momentum of sgd. `state` holds what nesterov and adam remember of the round before
    (None: nothing); `leaves` is where this round writes it for the next one (None: there is none). Without `look_ahead`
    nesterov steps by η d alone, to where the run has come to and not ahead of it.
    """

    step_size: float = 1.0
    momentum: float = 0.0
    before: StoredTaskVector | None = None
    optimizer: OuterOptimizer = "sgd"
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-5
    round_index: int = 1
    state: StoredTaskVector | None = None
    leaves: Path | None = None
    look_ahead: bool = True

    @property
    def plain(self) -> bool:
        """Whether the step is d itself, so that the compiled kernels can take it."""
        return (self.optimizer, self.step_size, self.momentum) == ("sgd", 1, 0)

    def state_infos(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors of the state that this round leaves, for the tensors of its task vector."""
        return {f"{memory}:{name}": info for memory in MEMORIES[self.optimizer] for name, info in infos.items()}

    def step(
        self,
        piece: Piece,
        start_P: torch.Tensor | None,
        update_P: torch.Tensor,
        scratch: Scratch,
        writer: PositionedWriter,
    ) -> None:
        """update ← Θʳ − Θʳ⁻¹, in place of d; every operation rounds once, so tiles do not change the bits.

        `start_P` is Θʳ⁻¹ − Θ⁰, None where it is zero. The state goes to `writer`, where the round leaves one.
        """
        if self.optimizer == "sgd":
            self._heavy_ball(piece, start_P, update_P, scratch)
        elif self.optimizer == "nesterov":
            self._nesterov(piece, update_P, scratch, writer)
        else:
            self._adam(piece, update_P, scratch, writer)

    def _heavy_ball(self, piece: Piece, start_P: torch.Tensor | None, update_P: torch.Tensor, scratch: Scratch) -> None:
        if self.step_size != 1:
            update_P *= self.step_size
        if self.momentum == 0 or start_P is None:
            return
        velocity_P = scratch.take("velocity", piece.count)
        kernels.widen(start_P, velocity_P)
        if self.before is not None and piece.name in self.before:
            before_P = scratch.take("before last", piece.count)
            self.before.read_entries(piece.name, piece.start, before_P)
            velocity_P -= before_P
        velocity_P *= self.momentum
        update_P += velocity_P

    def _nesterov(self, piece: Piece, update_P: torch.Tensor, scratch: Scratch, writer: PositionedWriter) -> None:
        if self.look_ahead or self.leaves is not None:  # else nobody takes the velocity
            velocity_P = self._recall("velocity", piece, scratch)
            velocity_P *= self.momentum
            velocity_P += update_P
            self._remember("velocity", piece, velocity_P, writer)
            if self.look_ahead:
                velocity_P *= self.momentum
                update_P += velocity_P
        update_P *= self.step_size

    def _adam(self, piece: Piece, update_P: torch.Tensor, scratch: Scratch, writer: PositionedWriter) -> None:
        beta1, beta2 = self.betas
        first_P, second_P = (self._recall(memory, piece, scratch) for memory in MEMORIES["adam"])
        part_P = scratch.take("part", piece.count)
        kernels.widen(update_P, part_P)
        part_P *= part_P
        part_P *= 1 - beta2
        second_P *= beta2
        second_P += part_P
        update_P *= 1 - beta1
        first_P *= beta1
        first_P += update_P
        self._remember("first_moment", piece, first_P, writer)
        self._remember("second_moment", piece, second_P, writer)
        second_P.sqrt_()
        second_P *= 1 / math.sqrt(1 - beta2**self.round_index)
        second_P += self.epsilon
        kernels.widen(first_P, update_P)
        update_P /= second_P
        update_P *= self.step_size / (1 - beta1**self.round_index)

    def _recall(self, memory: str, piece: Piece, scratch: Scratch) -> torch.Tensor:
        """What the round before left, zero where it left nothing."""
        found_P, name = scratch.take(memory, piece.count), f"{memory}:{piece.name}"
        if self.state is not None and name in self.state:
            self.state.read_entries(name, piece.start, found_P)
        else:
            found_P.zero_()
        return found_P

    def _remember(self, memory: str, piece: Piece, entries_P: torch.Tensor, writer: PositionedWriter) -> None:
        if self.leaves is not None:
            writer.write(f"{memory}:{piece.name}", piece.start, entries_P)
