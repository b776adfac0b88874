"""What the steps of a round work with, and the step that measures; rounds.py is the order in which they happen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.base_model import BaseModel
from manyshot.evaluate import MeasureJob
from manyshot.executors import Executor
from manyshot.manifest import files_in, seal
from manyshot.measure_parts import measure_model
from manyshot.models import ModelState
from manyshot.normalize import multi_task_loss
from manyshot.progress import Progress
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder
from manyshot.tasks import Task
from manyshot.trackers import Tracking

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything a run works with."""

    recipe: Recipe
    folder: RunFolder
    base: BaseModel
    tasks: tuple[Task, ...]
    executor: Executor
    progress: Progress
    # a trial of a comparison sees validation splits only, and writes no model folder
    trial: bool = False
    # local updates from the pretrained model that other runs share, by key
    shared: Path | None = None
    # where the curves are sent
    tracking: Tracking | None = None
    # the recipe under whose names finished work is found, where it is not this one to the letter
    begun: Recipe | None = None
    # of an extended run: the run that it goes on from, as it was when it ended
    earlier: Run | None = None
    # whether rounds follow that are not this recipe's
    goes_on: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def pretrained(self) -> ModelState:
        return ModelState(self.base.path, trust_remote_code=self.recipe.trust_remote_code)


@dataclass(frozen=True)
class Expert:
    """One task's expert of a round: its model and the record of its local update."""

    task: str
    state: ModelState
    record: Json

    @property
    def loss(self) -> float:
        value: float = self.record["validation"]["loss"]
        return value


@dataclass(frozen=True)
class Merged:
    """The model a round ends with."""

    state: ModelState
    kept_share: float
    start_from: str
    digests: dict[str, str]


def seal_step(run: Run, folder: Path, step: str, *places: Path, known: dict[str, str] | None = None) -> None:
    """Name what a step left in the manifest of `folder`; a trial of a comparison keeps too little of it."""
    if not run.trial:
        seal(folder, step, files_in(*places), known)


def measure(run: Run, state: ModelState, folder: Path, round_index: int) -> Json:
    """Validation losses, multi-task loss and test scores of one model on every task."""
    job = MeasureJob(run.recipe, run.tasks, state, folder, round_index, scores=not run.trial)
    measured = measure_model(run.executor, job, run.progress)
    return measured | {"multi_task_loss": multi_task_loss(measured["losses"])}
