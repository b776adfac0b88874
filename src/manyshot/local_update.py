"""One task fine-tunes from the round's start model: TRL's SFTTrainer with PEFT, or all weights.

The same job is a single-task expert when it starts from the pretrained model and takes all steps at once.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from manyshot.command_update import TrainerCall, update_by_command
from manyshot.errors import ModelError, RunFolderError
from manyshot.examples import Example
from manyshot.launcher import run_launched
from manyshot.loss_gap import TokenSums, ValidationLoss, mean_loss, token_sums
from manyshot.manifest import files_in, seal
from manyshot.models import (
    ModelState,
    Placement,
    add_adapter,
    choose_placement,
    find_parameter,
    load_model,
    load_tokenizer,
    quiet_transformers,
    save_adapter,
    save_full,
)
from manyshot.optimizer_state import OPTIMIZER_NAME, write_state
from manyshot.peft_adapter import is_adapter
from manyshot.progress import Progress
from manyshot.quantized import quantized
from manyshot.recipe import Recipe
from manyshot.rundir import read_json, write_json
from manyshot.seeding import derive_seed, permutation
from manyshot.start_adapters import adapter_seed, freeze_factor
from manyshot.tasks import Encoded, Task, as_row, encode_all, training_order
from manyshot.tensors import Checkpoint, file_digest
from manyshot.tracker_backends import Part
from manyshot.trackers import tracker_callbacks
from manyshot.trainer import CompletionTrainer, Extras, learning_rate_multipliers, make_trainer

RECORD = "local_update.json"
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class LocalUpdateJob:
    """Everything one local update depends on. `folder` receives adapter/ (or model/), then local_update.json."""

    recipe: Recipe
    task: Task
    start: ModelState
    base_name: str
    folder: Path
    round_index: int
    num_steps: int
    steps_before: int
    total_steps: int
    key: str  # digest of all inputs: equal keys give equal bytes
    adopted: Path | None = None  # an expert that exists already: nothing is trained
    mixed: tuple[Task, ...] = ()  # joint fine-tuning on these tasks at once, in place of `task`
    validated: bool = True  # whether anyone asks for the expert's validation loss
    optimizer_state: Path | None = None  # what the task's optimizer ended the round before with, where it goes on
    tracked: Part | None = None  # as what trackers know it

    @property
    def where(self) -> str:
        return f"round {self.round_index}, task '{self.task.name}'"

    @property
    def label(self) -> str:
        return f"{self.where}: local update"

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a round follows that goes on with the optimizer's state."""
        kept = self.recipe.local_update.optimizer_state == "kept"
        return kept and self.num_steps < self.total_steps and self.round_index < self.recipe.protocol.rounds


def finished_update(job: LocalUpdateJob) -> dict[str, Any] | None:
    """The record of this job if it was done before, with the same inputs."""
    if not (job.folder / RECORD).exists():
        return None
    record = read_json(job.folder / RECORD)
    return record if record.get("key") == job.key else None


def run_local_update(job: LocalUpdateJob, progress: Progress) -> dict[str, Any]:
    """Train, save the expert, measure its validation loss, write the record. Returns the record.

    Raises ManyshotError naming round and task when the loss turns NaN or Inf.
    """
    if (done := finished_update(job)) is not None:
        _seal(job.folder)
        return done
    update = job.recipe.local_update
    placement = choose_placement(update)
    where = job.where
    if update.launcher == "accelerate" and job.adopted is None:
        run_launched(job, update, job.folder, where, progress)  # each of its processes does what follows here
        _seal(job.folder)
        launched: dict[str, Any] = read_json(job.folder / RECORD)
        return launched
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside trl and transformers
        tokenizer = load_tokenizer(job.start.pretrained, trust_remote_code=job.start.trust_remote_code)
        examples = training_examples(job, tokenizer) if job.adopted is None else []
        if job.adopted is not None:
            return _adopt(job, job.adopted, placement, tokenizer, progress)
        if update.method == "command":
            return _by_command(job, placement, tokenizer, examples, progress)
        with progress.timed("load", job.round_index, job.task.name):
            model = start_model(job, placement)
        trainer = train(model, tokenizer, examples, job, placement, progress)
        losses = trainer.finite_losses(where)
        record = make_record(job, examples, losses)
        with progress.timed("save", job.round_index, job.task.name):
            _save_expert(model, job, where)
            if job.keeps_optimizer:
                write_state(trainer.optimizer, model, job.folder / OPTIMIZER_NAME, job.optimizer_state)
                record["optimizer_state"] = file_digest(job.folder / OPTIMIZER_NAME)
        if job.validated:
            plain = model if update.method == "full" else model.get_base_model()
            if update.quantization != "none":
                del model, trainer, plain
                plain = load_model(kept_state(job.start, job.folder), placement)  # what a merge sees, not what trained
            record["validation"] = task_loss(
                plain, tokenizer, job.task, job.recipe, progress, round_index=job.round_index, which="expert"
            ).to_json()
    write_json(job.folder / RECORD, record)
    _seal(job.folder)
    return record


def _adopt(
    job: LocalUpdateJob, expert: Path, placement: Placement, tokenizer: Any, progress: Progress
) -> dict[str, Any]:
    """Measure an expert that exists already, and write the record of a local update without steps.

    Raises RunFolderError for one that is not what it was when the run measured, and perhaps merged, it.
    """
    if (job.folder / RECORD).exists():
        raise RunFolderError(
            f"tasks.{job.task.name}.expert: the content of {expert} changed since the run began; put it back as it "
            "was, or use --force to start over"
        )
    with progress.timed("load", job.round_index, job.task.name):
        model = load_model(adopted_state(job.start, expert), placement)
    loss = task_loss(model, tokenizer, job.task, job.recipe, progress, round_index=job.round_index, which="expert")
    record = {"key": job.key, "task": job.task.name, "round": job.round_index, "steps": 0, "expert": str(expert)}
    record["validation"] = loss.to_json()
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / RECORD, record)
    _seal(job.folder)
    return record


def _by_command(
    job: LocalUpdateJob, placement: Placement, tokenizer: Any, examples: list[Encoded], progress: Progress
) -> dict[str, Any]:
    """The local update of a trainer of the user's own: run, taken back, measured as any other."""
    call = TrainerCall(
        *(job.recipe, job.task.name, job.start, job.base_name, job.folder, job.round_index),
        *(job.num_steps, job.steps_before, job.total_steps),
        rows=[as_row(example, tokenizer, task.spec) for task, example in _chosen_examples(job)],
    )
    num_tokens = sum(len(example.input_ids) for example in examples)
    steps = {"total": job.num_steps, "tokens": num_tokens, "steps": job.num_steps}
    with progress.timed("local_update", job.round_index, job.task.name, **steps) as timed:
        returned = update_by_command(call, lambda: timed.tick(0))
        timed.tick(job.num_steps)
    record = make_record(job, examples, []) | {"returned": returned}
    if job.validated:
        with progress.timed("load", job.round_index, job.task.name):
            model = load_model(kept_state(job.start, job.folder), placement)
        loss = task_loss(model, tokenizer, job.task, job.recipe, progress, round_index=job.round_index, which="expert")
        record["validation"] = loss.to_json()
    write_json(job.folder / RECORD, record)
    _seal(job.folder)
    return record


def _seal(folder: Path) -> None:
    parts = ("adapter", "model", OPTIMIZER_NAME, RECORD)
    seal(folder, "local update", files_in(*(folder / part for part in parts)))


def adopted_state(start: ModelState, expert: Path) -> ModelState:
    """A model folder, or a PEFT adapter on the pretrained model."""
    if is_adapter(expert):
        return replace(start, adapter=expert)
    return replace(start, full=expert)


def training_examples(job: LocalUpdateJob, tokenizer: Any) -> list[Encoded]:
    """The examples of this round's steps, in order, tokenised."""
    recipe = job.recipe
    return [
        encode_all([example], tokenizer, task, "train", recipe.max_length_of(task.name), recipe.local_update.loss_on)[0]
        for task, example in _chosen_examples(job)
    ]


def _chosen_examples(job: LocalUpdateJob) -> list[tuple[Task, Example]]:
    """The examples of this round's steps with their tasks, in order; of mixed tasks, each one's share, shuffled."""
    size = job.recipe.local_update.batch_size
    if not job.mixed:
        return _examples_of(job, job.task, job.num_steps * size, job.steps_before * size)
    needed = {task.name: job.recipe.protocol_of(task.name).local_steps * size for task in job.mixed}
    mixed = [one for task in job.mixed for one in _examples_of(job, task, needed[task.name], 0)]
    return [mixed[position] for position in permutation(len(mixed), job.recipe.seed, "joint")]


def _examples_of(job: LocalUpdateJob, task: Task, needed: int, skip: int) -> list[tuple[Task, Example]]:
    """The next examples of one task's stream."""
    order = training_order(len(task.train), needed, job.recipe.seed, task.name, skip=skip)
    return [(task, task.train[position]) for position in order]


def start_model(job: LocalUpdateJob, placement: Placement) -> Any:
    """The start model with fresh (or carried) adapters, or with all weights trainable."""
    recipe = job.recipe
    if recipe.local_update.method == "full":
        # all weights train in float32; a lower type is used for the computation only
        return load_model(job.start, replace(placement, dtype=torch.float32))
    quantization = recipe.local_update.quantization
    model = load_model(job.start, placement if quantization == "none" else replace(placement, device="cpu"))
    seed_parts = adapter_seed(recipe, job.round_index, job.task.name)
    with quantized(model, quantization, placement):
        adapted = add_adapter(model, recipe, job.task.name, seed_parts, job.start.start_adapter)
    freeze_factor(adapted, recipe.local_update, job.round_index)
    return adapted


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    job: LocalUpdateJob,
    placement: Placement,
    progress: Progress,
    num_processes: int = 1,
) -> CompletionTrainer:
    """Run the trainer; in `num_processes` at once, each with its part of every batch."""
    update = job.recipe.local_update
    num_tokens = sum(len(example.input_ids) for example in examples)
    multipliers = learning_rate_multipliers(update, job.num_steps, job.steps_before, job.total_steps)
    timing = progress.timed(
        "local_update", job.round_index, job.task.name, total=job.num_steps, tokens=num_tokens, steps=job.num_steps
    )
    tracking = tracker_callbacks(job.tracked, progress.message)
    with tempfile.TemporaryDirectory() as scratch, tracking as callbacks, timing as timed:
        trainer = make_trainer(
            model,
            tokenizer,
            examples,
            update,
            placement,
            multipliers=multipliers,
            # the order is fixed already; this seeds what the trainer draws itself, such as dropout
            seed=derive_seed(job.recipe.seed, "trainer", job.round_index, job.task.name) % 2**31,
            scratch=scratch,
            on_step=timed.tick,
            # joint fine-tuning has tasks in one batch, and one unit for its loss
            extras=Extras(
                job.optimizer_state, 1.0 if job.mixed else job.task.spec.loss_scale, job.recipe.local_update.proximal
            ),
            callbacks=callbacks,
            num_processes=num_processes,
        )
        trainer.train()
    return trainer


def _save_expert(model: Any, job: LocalUpdateJob, where: str) -> None:
    try:
        if job.recipe.local_update.method == "full":
            names = Checkpoint(job.start.pretrained).names
            save_full(model, job.folder / "model", {name: find_parameter(model, name).detach() for name in names})
        else:
            save_adapter(model, job.folder / "adapter", job.base_name)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None


def task_loss(
    model: Any, tokenizer: Any, task: Task, recipe: Recipe, progress: Progress, *, round_index: int, which: str
) -> ValidationLoss:
    """The validation loss of one task: the one way in which every model of a run is measured."""
    encoded, sums = held_out_sums(model, tokenizer, task, recipe, progress, round_index=round_index, which=which)
    return mean_loss(encoded, sums, task.spec.loss_scale)


def held_out_sums(
    model: Any,
    tokenizer: Any,
    task: Task,
    recipe: Recipe,
    progress: Progress,
    *,
    round_index: int,
    which: str,
    split: Split = "validation",
) -> tuple[list[Encoded], list[TokenSums]]:
    """A held-out split as tokens, and what the model makes of each example."""
    encoded = encode_held_out(task, tokenizer, recipe, split)
    with progress.timed("validation", round_index, task.name, total=len(encoded)) as timed:
        sums = token_sums(
            model,
            encoded,
            pad_id=tokenizer.pad_token_id,
            batch_size=recipe.evaluation.batch_size,
            where=f"round {round_index}, task '{task.name}', {which}, {split}",
            tick=timed.tick,
        )
    return encoded, sums


def encode_held_out(task: Task, tokenizer: Any, recipe: Recipe, split: Split = "validation") -> list[Encoded]:
    """A task's validation or test split as tokens; the same for every model that is compared."""
    examples = task.validation if split == "validation" else task.test
    return encode_all(examples, tokenizer, task, split, recipe.max_length_of(task.name), recipe.evaluation.loss_on)


def make_record(job: LocalUpdateJob, examples: Sequence[Encoded], losses: Sequence[float]) -> dict[str, Any]:
    """What local_update.json says; no times, so that an interrupted run ends with the same bytes."""
    return {
        "key": job.key,
        "task": job.task.name,
        "round": job.round_index,
        "steps": job.num_steps,
        "steps_before": job.steps_before,
        "num_tokens": sum(len(example.input_ids) for example in examples),
        "num_counted_tokens": sum(example.num_counted for example in examples),
        "truncated_share": sum(example.truncated for example in examples) / len(examples),
        "train_losses": [round(loss, 6) for loss in losses],
    }


def expert_state(start: ModelState, folder: Path) -> ModelState:
    """The expert that a finished local update left in `folder`, or says where it is."""
    if "expert" in (record := read_json(folder / RECORD)):
        return adopted_state(start, Path(record["expert"]))
    return kept_state(start, folder)


def kept_state(start: ModelState, folder: Path) -> ModelState:
    """The expert whose adapter or whole model lies in `folder`."""
    if (folder / "model").is_dir():
        return replace(start, full=folder / "model", task_vector=None, start_adapter=None)
    return replace(start, adapter=folder / "adapter")
