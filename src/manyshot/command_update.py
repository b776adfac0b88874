"""A local update by the user's own trainer: what it is given, and what it is taken back as.

It works in a folder that is gone afterwards; what it trained is checked, and becomes the expert that a round merges as
any other. What it said stays beside it, in trainer.log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.errors import ModelError
from manyshot.export import export_model
from manyshot.models import ModelState, choose_placement
from manyshot.recipe import Recipe
from manyshot.returned_expert import Kind, find_result, take_expert
from manyshot.rundir import PARTIAL, remove, write_json, write_text
from manyshot.seeding import derive_seed
from manyshot.task_vector import StoredTaskVector
from manyshot.tensors import Checkpoint
from manyshot.trainer_command import run_command

LOG = "trainer.log"


@dataclass(frozen=True)
class TrainerCall:
    """One call of a trainer: a task's steps from a start model, on `rows` in their order. `folder` gets the expert."""

    recipe: Recipe
    task: str
    start: ModelState
    base_name: str
    folder: Path
    round_index: int
    steps: int
    steps_before: int
    total_steps: int
    rows: Sequence[Mapping[str, Any]]

    @property
    def where(self) -> str:
        return f"round {self.round_index}, task '{self.task}'"


def update_by_command(call: TrainerCall, beat: Callable[[], None]) -> Kind:
    """Run the recipe's command and keep what it trained as `folder`/adapter or `folder`/model.

    Raises TrainingError where the command fails or takes too long, ModelError for what cannot be taken back; both name
    round, task and the log.
    """
    update, log = call.recipe.local_update, call.folder / LOG
    assert update.command is not None  # the recipe refuses method: command without one
    call.folder.mkdir(parents=True, exist_ok=True)
    # a killed run's trainer may still write into its own folder
    work = (call.folder / f"trainer.{os.getpid()}{PARTIAL}").resolve()
    remove(work)
    try:
        values = _prepare(call, work)
        run_command(update.command, values, log, time_limit=update.time_limit, where=call.where, beat=beat)
        return _take_back(call, work / "output", str(values["start"]), log)
    finally:
        remove(work)


def _take_back(call: TrainerCall, output: Path, start: str, log: Path) -> Kind:
    base = Checkpoint(call.start.pretrained)
    # of an adapter's own words for its base: the folder that it was given, or what the pretrained model is called
    names = (start, call.base_name) if call.start.task_vector is None else (start,)
    try:
        return take_expert(
            find_result(output), base, call.task, call.folder, base_name=call.base_name, trained_on=names, move=True
        )
    except ModelError as error:
        raise ModelError(
            f"{call.where}: what the trainer left in {{output}} cannot be used: {error}; see {log}"
        ) from None


def _prepare(call: TrainerCall, work: Path) -> dict[str, str | int | float]:
    """Write what the command reads; returns what its placeholders stand for."""
    update = call.recipe.local_update
    (work / "output").mkdir(parents=True)
    values: dict[str, str | int | float] = {
        "start": str(_start_folder(call, work)),
        "output": str(work / "output"),
        "data": str(work / "data" / "train.jsonl"),
        "data_folder": str(work / "data"),
        "messages": str(work / "messages" / "train.jsonl"),
        "config": str(work / "config.json"),
        "task": call.task,
        "round": call.round_index,
        "steps": call.steps,
        "steps_before": call.steps_before,
        "total_steps": call.total_steps,
        "seed": derive_seed(call.recipe.seed, "trainer", call.round_index, call.task) % 2**31,
        "batch_size": update.batch_size,
        "max_length": call.recipe.max_length_of(call.task),
        "learning_rate": update.learning_rate,
        "rank": call.recipe.rank_of(call.task),
        "alpha": call.recipe.alpha_of(call.task),
        "device": choose_placement(update).device,
    }
    _write_lines(Path(str(values["data"])), call.rows)
    _write_lines(Path(str(values["messages"])), [{"messages": _messages(row)} for row in call.rows])
    settings = update.model_dump(mode="json", exclude={"method", "command", "time_limit"})
    write_json(work / "config.json", values | {"base": call.base_name, "local_update": settings})
    return values


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _messages(row: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """A row as one conversation; plain texts are what the user and what the assistant says."""
    parts = (("user", row.get("prompt", [])), ("assistant", row.get("completion", row.get("text", []))))
    return [
        message
        for role, part in parts
        for message in ([{"role": role, "content": part}] if isinstance(part, str) else part)
    ]


def _start_folder(call: TrainerCall, work: Path) -> Path:
    """Θʳ⁻¹ as a plain model folder: the pretrained model, the last round's merged/, or one made for this call alone."""
    if call.start.task_vector is None:
        return call.start.pretrained.resolve()
    merged = call.start.task_vector.parent / "merged"
    if (merged / "config.json").is_file():
        return merged.resolve()
    vector = StoredTaskVector(call.start.task_vector)
    export_model(Checkpoint(call.start.pretrained), vector, work / "start", dtype=call.recipe.merge.output_dtype)
    return work / "start"
