"""The trainer of a local update: TRL's SFTTrainer on examples that are tokenised, ordered and batched already.

Two things differ from a bare SFTTrainer: logits are computed by the same code as in the loss gap, for counted tokens
only, and the learning rate follows a list of multipliers, one per step, so that a schedule can run over all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from manyshot.errors import ManyshotError, RecipeError, suggestion
from manyshot.loss_gap import IGNORED, counted_logits, pad_right
from manyshot.models import Placement
from manyshot.optimizer_state import load_state
from manyshot.recipe import LocalUpdate
from manyshot.tasks import Encoded

# arguments of the trainer that have a place of their own in the recipe, or that the round loop decides
RESERVED = {
    "output_dir": "the run folder",
    "max_steps": "protocol.local_steps",
    "num_train_epochs": "protocol.local_steps",
    "learning_rate": "local_update.learning_rate",
    "lr_scheduler_type": "local_update.lr_schedule",
    "warmup_steps": "local_update.warmup_steps",
    "warmup_ratio": "local_update.warmup_steps",
    "per_device_train_batch_size": "local_update.batch_size",
    "gradient_accumulation_steps": "local_update.micro_batch_size",
    "max_length": "local_update.max_length",
    "bf16": "local_update.dtype",
    "fp16": "local_update.dtype",
    "use_cpu": "local_update.device",
    "completion_only_loss": "local_update.loss_on",
    "seed": "seed",
    "data_seed": "seed",
    "train_sampling_strategy": "seed",
    "save_strategy": "the run folder",
    "packing": "nothing: examples are never packed",
    "padding_free": "nothing: examples are never packed",
    "dataset_kwargs": "tasks",
    "logging_steps": "metrics.jsonl",
    "logging_strategy": "metrics.jsonl",
    "report_to": "trackers",
    "run_name": "trackers",
    "project": "trackers",
}


@dataclass(frozen=True)
class Extras:
    """What a local update adds to plain training: an optimizer that goes on, a unit of loss, a pull back to the start.

    The loss becomes loss_scale · L(θ) + proximal/2 · ‖θ − θ_start‖² over all trained parameters (FedProx, arXiv
    1812.06127).
    """

    optimizer_state: Path | None = None
    loss_scale: float = 1.0
    proximal: float = 0.0


class CompletionTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that computes logits only where they are counted."""

    multipliers: Sequence[float] = ()
    extras = Extras()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.output_head = plain.get_output_embeddings()
        self.step_losses: list[float] = []
        self._started: list[torch.Tensor] = []

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments ask for, going on from a stored state where there is one."""
        if self.optimizer is None:
            self.optimizer: Any = super().create_optimizer(model)
            if self.extras.optimizer_state is not None:
                load_state(self.optimizer, self.model, self.extras.optimizer_state)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """One multiplier of the learning rate per step, as the recipe's schedule gives them."""
        if self.lr_scheduler is None:
            values = self.multipliers
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: values[min(step, len(values) - 1)]
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the counted tokens of the whole batch (accumulation included), with the `extras`."""
        if self.args.loss_type != "nll" or self.label_smoother is not None or self.aux_loss_enabled or return_outputs:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs:
                return loss
        else:
            logits_NV, labels_N, _ = counted_logits(model, self.output_head, inputs)
            total = torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
            loss = total / (labels_N.numel() if num_items_in_batch is None else num_items_in_batch)
            if num_items_in_batch is not None and self.accelerator.num_processes > 1:
                loss = loss * self.accelerator.num_processes  # tokens of all processes, which take a mean over theirs
        if self.extras.loss_scale != 1:
            loss = loss * self.extras.loss_scale
        if self.extras.proximal:
            # the parts of an accumulated batch are added up, so each has its part of the penalty
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self._distance_squared() * (self.extras.proximal / 2 / parts)
        return loss

    def _distance_squared(self) -> torch.Tensor:
        """‖θ − θ_start‖² over all trained parameters."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self._started:
            self._started = [parameter.detach().clone() for parameter in trained]
        pairs = zip(trained, self._started, strict=True)
        return torch.stack([(now - start).float().square().sum() for now, start in pairs]).sum()

    def finite_losses(self, where: str) -> list[float]:
        """The loss of every step. Raises ManyshotError naming the first step whose loss is NaN or Inf."""
        for step, loss in enumerate(self.step_losses, start=1):
            if not math.isfinite(loss):
                raise ManyshotError(
                    f"{where}, step {step}: the training loss is {loss}; lower local_update.learning_rate"
                )
        return self.step_losses


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    """Notes the loss of every step and reports progress."""

    def __init__(self, losses: list[float], on_step: Callable[[int, float | None], None]) -> None:
        self.losses = losses
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.on_step(1, self.losses[-1])


def make_trainer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    update: LocalUpdate,
    placement: Placement,
    *,
    multipliers: Sequence[float],
    seed: int,
    scratch: str,
    on_step: Callable[[int, float | None], None],
    extras: Extras | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    num_processes: int = 1,
) -> CompletionTrainer:
    """A trainer that takes exactly `len(multipliers)` steps over the examples, in their order."""
    trainer = CompletionTrainer(
        model=model,
        args=trainer_arguments(update, len(multipliers), placement, seed, scratch, num_processes),
        train_dataset=_dataset(examples),
        processing_class=tokenizer,
        data_collator=lambda rows: pad_right([_encoded(row) for row in rows], tokenizer.pad_token_id),
    )
    trainer.multipliers = multipliers
    trainer.extras = extras or Extras()
    trainer.remove_callback(PrinterCallback)  # the library never prints
    for callback in (_StepCallback(trainer.step_losses, on_step), *callbacks):
        trainer.add_callback(callback)
    return trainer


def _dataset(examples: Sequence[Encoded]) -> Dataset:
    labels = [[IGNORED] * e.num_context + list(e.input_ids[e.num_context :]) for e in examples]
    return Dataset.from_dict({"input_ids": [list(e.input_ids) for e in examples], "labels": labels})


def _encoded(row: dict[str, list[int]]) -> Encoded:
    return Encoded(0, tuple(row["input_ids"]), row["labels"].count(IGNORED), False)


def trainer_arguments(
    update: LocalUpdate, num_steps: int, placement: Placement, seed: int, scratch: str, num_processes: int = 1
) -> SFTConfig:
    """TRL's arguments from the recipe; `local_update.trainer` passes through what has no place of its own.

    bf16, gradient checkpointing and reporting are set here, since TRL's and transformers' own defaults differ.
    """
    check_trainer_arguments(update)
    micro = update.micro_batch_size or update.batch_size // num_processes
    on_gpu = placement.device.startswith("cuda")
    own: dict[str, Any] = {
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",
        "disable_tqdm": True,
    }
    try:
        return SFTConfig(
            **own
            | update.trainer
            | {
                "output_dir": scratch,
                "max_steps": num_steps,
                "learning_rate": update.learning_rate,
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": update.batch_size // (micro * num_processes),
                "max_length": None,
                "bf16": placement.dtype == torch.bfloat16,
                "fp16": placement.dtype == torch.float16,
                "use_cpu": placement.device == "cpu",
                "seed": seed,
                "train_sampling_strategy": "sequential",
                "save_strategy": "no",
                "logging_steps": 1,
                "logging_nan_inf_filter": False,
                "remove_unused_columns": False,
                "dataset_kwargs": {"skip_prepare_dataset": True},
            }
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"local_update.trainer: {error}") from None


def check_trainer_arguments(update: LocalUpdate) -> None:
    """Refuse trainer arguments that TRL does not have, or that the recipe has a key of its own for."""
    known = {field.name for field in fields(SFTConfig)}
    for name in update.trainer:
        if name in RESERVED:
            raise RecipeError(f"local_update.trainer.{name}: this is decided by {RESERVED[name]}")
        if name not in known:
            raise RecipeError(f"local_update.trainer.{name}: SFTConfig has no such argument{suggestion(name, known)}")


def learning_rate_multipliers(update: LocalUpdate, num_steps: int, steps_before: int, total_steps: int) -> list[float]:
    """The learning rate of each step of a round, as a multiple of `learning_rate`.

    Where the optimizer restarts every round, every round warms up over `warmup_steps`; where its state is kept, only
    the task's first steps of the run do. The decay spans the round (`schedule_scope: round`), or all rounds together
    (`run`), where a round takes its part of the one curve.
    """
    warmed = steps_before if update.optimizer_state == "kept" else 0
    offset, span = (0, num_steps) if update.schedule_scope == "round" else (steps_before, total_steps)
    return [
        min(1.0, (warmed + step + 1) / (update.warmup_steps + 1)) * _decay(update.lr_schedule, (offset + step) / span)
        for step in range(num_steps)
    ]


def _decay(schedule: str, done: float) -> float:
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
