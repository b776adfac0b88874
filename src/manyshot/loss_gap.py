"""Validation losses: the numbers that METIS' weights are made of.

One evaluator for every model that is compared: fixed order, no packing, eval mode, float32 log-probabilities summed in
float64, mean over counted tokens. Logits are computed only where they are counted.
Shapes: B = examples of a batch, L = padded length, N = counted tokens of the batch, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyshot.errors import DataError
from manyshot.tasks import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions whose logits are held at once: 1024 × a vocabulary of 128 k in float32 is 0.5 GiB.
MAX_LOGIT_POSITIONS = 1024
IGNORED = -100


@dataclass(frozen=True)
class ValidationLoss:
    """Mean token cross-entropy in nats over `num_tokens` counted tokens."""

    loss: float
    num_tokens: int
    num_examples: int
    truncated_share: float

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def pad_right(examples: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of examples, padded on the right: input_ids, attention_mask and labels, (B, L) each."""
    length = max(len(example.input_ids) for example in examples)
    input_ids_BL = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels_BL = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    mask_BL = torch.zeros((len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        input_ids_BL[row, : len(ids)] = ids
        mask_BL[row, : len(ids)] = 1
        labels_BL[row, example.num_context : len(ids)] = ids[example.num_context :]
    return {"input_ids": input_ids_BL, "attention_mask": mask_BL, "labels": labels_BL}


def counted_logits(
    forward: Callable[..., Any], head: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (N, V) that predict the N counted tokens of a batch, those tokens (N,), and their rows (N,).

    The hidden states are thinned out on their way into the output head, so that the model's own forward, with whatever
    it does to its logits (soft-capping, scaling), computes nothing else.
    """
    counted_BL = batch["labels"][:, 1:] != IGNORED

    def keep_counted(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = inputs[0]  # on the head's device, or that of the layer before, where a model is spread over several
        return (states[:, :-1][counted_BL.to(states.device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(keep_counted)
    try:
        output = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    return output.logits[0], batch["labels"][:, 1:][counted_BL], counted_BL.nonzero()[:, 0]


def make_batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Positions of examples in batches of like length: longest first, ties in order. The same for every model."""
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].input_ids), i))
    batch: list[int] = []
    num_counted = 0
    for i in order:
        if batch and (len(batch) == batch_size or num_counted + encoded[i].num_counted > MAX_LOGIT_POSITIONS):
            yield batch
            batch, num_counted = [], 0
        batch.append(i)
        num_counted += encoded[i].num_counted
    if batch:
        yield batch


@dataclass(frozen=True)
class TokenSums:
    """What a model makes of an example's counted tokens: Σ −log p in nats, and how many it would have chosen itself.

    A token is chosen that is the most likely next one after the true ones before it.
    """

    nats: float
    num_correct: int


def token_sums(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    *,
    pad_id: int,
    batch_size: int,
    where: str,
    tick: Callable[[int], None] | None = None,
) -> list[TokenSums]:
    """Both sums for each example, in the order given.

    Raises DataError naming the example for a NaN or Inf. `tick` is told how many examples have been done.
    """
    sums = [TokenSums(0.0, 0)] * len(encoded)
    head = model.get_output_embeddings()
    with evaluating(model), torch.inference_mode():
        for positions in make_batches(encoded, batch_size):
            examples = [encoded[i] for i in positions]
            found = batch_sums(model, head, examples, pad_id=pad_id, device=model.device, where=where)
            for i, one in zip(positions, found, strict=True):
                sums[i] = one
            if tick is not None:
                tick(len(positions))
    return sums


def batch_sums(
    forward: Callable[..., Any],
    head: torch.nn.Module,
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device,
    where: str,
) -> list[TokenSums]:
    """Both sums for each example of one batch. Raises DataError naming the example for a NaN or Inf."""
    batch = {name: tensor.to(device) for name, tensor in pad_right(examples, pad_id).items()}
    logits_NV, labels_N, rows_N = counted_logits(forward, head, batch)
    losses_N = torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="none").double()
    hits_N = (logits_NV.argmax(-1) == labels_N).long()
    nats_B = torch.zeros(len(examples), dtype=torch.float64).index_add_(0, rows_N.cpu(), losses_N.cpu())
    hits_B = torch.zeros(len(examples), dtype=torch.long).index_add_(0, rows_N.cpu(), hits_N.cpu())
    for example, nats in zip(examples, nats_B.tolist(), strict=True):
        if not math.isfinite(nats):
            raise DataError(f"{where}, row {example.index + 1}: the loss is {nats}")
    return [TokenSums(nats, hits) for nats, hits in zip(nats_B.tolist(), hits_B.tolist(), strict=True)]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and back to what the model was in, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def mean_loss(encoded: Sequence[Encoded], sums: Sequence[TokenSums], scale: float = 1.0) -> ValidationLoss:
    """Token-weighted mean cross-entropy of a model on encoded examples, times what the task counts its losses in."""
    num_tokens = sum(example.num_counted for example in encoded)
    loss = math.fsum(one.nats for one in sums) / num_tokens * scale
    if not math.isfinite(loss):
        raise DataError(f"a validation loss of {loss} with loss_scale {scale:g}; give the task a smaller one")
    return ValidationLoss(
        loss=loss,
        num_tokens=num_tokens,
        num_examples=len(encoded),
        truncated_share=sum(example.truncated for example in encoded) / len(encoded),
    )
