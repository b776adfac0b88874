"""The jobs of a comparison, as an executor runs them: measure a reference, run one trial, score it on the test splits.

A job's files are its state: what is finished is read back, what was interrupted goes on from its last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manyshot.base_model import BaseModel
from manyshot.benchmark_spec import Benchmark, Harness
from manyshot.compare_benchmarks import BenchmarkJob, read_benchmarks, run_benchmarks
from manyshot.errors import ManyshotError
from manyshot.evaluate import MeasureJob, run_measure
from manyshot.executors import LocalExecutor
from manyshot.local_update import LocalUpdateJob, expert_state, run_local_update
from manyshot.manifest import MANIFEST, files_in, seal
from manyshot.models import ModelState
from manyshot.optimizer_state import OPTIMIZER_NAME
from manyshot.outer import STATE_NAME
from manyshot.progress import Listener, Progress
from manyshot.recipe import Recipe
from manyshot.rounds import run_rounds
from manyshot.rundir import RunFolder, content_key, read_json, remove, write_json
from manyshot.secret_text import redacted
from manyshot.seeding import preserved_random_state
from manyshot.steps import Run
from manyshot.tasks import Task

Json = dict[str, Any]
TRIAL = "trial.json"
TEST = "test"
# what a model, its data or torch (out of memory) may do to one job; a full disk is everyone's matter
FAILURES = (ManyshotError, RuntimeError)


@dataclass(frozen=True)
class ReferenceJob:
    """Measure a model that others are compared with on one task: `validation/` and `test/` of `folder`."""

    recipe: Recipe
    task: Task
    state: ModelState
    folder: Path
    validation: bool

    @property
    def label(self) -> str:
        return f"{self.folder.name}: reference"


@dataclass(frozen=True)
class TrialJob:
    """One run of the grid. `scored` trials end with the test splits; candidates of a grid never see them."""

    label: str
    recipe: Recipe
    base: BaseModel
    tasks: tuple[Task, ...]
    retention: tuple[Task, ...]
    folder: Path
    shared: Path
    pretrained_losses: Json
    scored: bool
    joint: bool = False
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    harness: Harness = field(default_factory=Harness)

    @property
    def retention_folder(self) -> Path:
        """Named after the tasks outside the mix: others may be asked for when the trial is long done."""
        tasks = [[task.name, task.digest(), task.settings()] for task in self.retention]
        return self.folder / f"retention-{content_key(tasks)[:12]}"


def failed(error: Exception) -> Json:
    """What a job returns in place of its result; errors that are not ours are named by their type."""
    text = str(error) if isinstance(error, ManyshotError) else f"{type(error).__name__}: {error}"
    return {"status": "failed", "error": redacted(text)}


def run_reference(job: ReferenceJob, progress: Progress) -> Json:
    """Losses and scores of a reference on one task; {"status": "failed", …} where it cannot be measured."""
    try:
        with preserved_random_state():
            test = MeasureJob(job.recipe, (job.task,), job.state, job.folder / TEST, 0, split="test")
            found = run_measure(test, progress)
            if job.validation:
                losses = MeasureJob(job.recipe, (job.task,), job.state, job.folder / "validation", 0, scores=False)
                run_measure(losses, progress)
    except FAILURES as error:
        return failed(error)
    return found


def run_asked(job: BenchmarkJob, progress: Progress) -> Json:
    """Benchmarks of a model that others are compared with; {"status": "failed", …} where one cannot be asked."""
    try:
        with preserved_random_state():
            run_benchmarks(job, progress)
    except FAILURES as error:
        return failed(error)
    return {}


def run_update(job: LocalUpdateJob, progress: Progress) -> Json:
    """A local update that several trials share; {"status": "failed", …} where it cannot be trained."""
    try:
        with preserved_random_state():
            return run_local_update(job, progress)
    except FAILURES as error:
        return failed(error)


def _all_but_messages(listener: Listener) -> Listener:
    """What a run says of its rounds is in its files; of a grid of runs, a person reads how each ended."""
    return lambda event: None if event.kind == "message" else listener(event)


def run_trial(job: TrialJob, progress: Progress) -> Json:
    """{"status": "done"}, or "failed" with the error: one cell that cannot be run does not stop the others."""
    job.folder.mkdir(parents=True, exist_ok=True)
    own = Progress(_all_but_messages(progress.listener), job.folder / "metrics.jsonl")
    own.record("begin")
    try:
        with preserved_random_state():
            if not (job.folder / TRIAL).exists():
                write_json(job.folder / TRIAL, _train_jointly(job, own) if job.joint else _run_rounds(job, own))
            _prune(job)
            seal(job.folder, "trial", files_in(job.folder / TRIAL, _last_task_vector(job)))
            if job.scored:
                _score(job, own)
    except FAILURES as error:
        outcome = failed(error)
        progress.message(f"{job.label}: failed: {outcome['error']}")
        return outcome
    progress.message(f"{job.label}: {_outcome(job)}")
    return {"status": "done"}


def _score(job: TrialJob, progress: Progress) -> None:
    """The test splits of the trial's tasks, those that were never trained, and the benchmarks."""
    state = trained_state(job)
    run_measure(MeasureJob(job.recipe, job.tasks, state, job.folder / TEST, 0, split="test"), progress)
    if job.retention:
        run_measure(MeasureJob(job.recipe, job.retention, state, job.retention_folder, 0, split="test"), progress)
    update = job.recipe.local_update
    run_benchmarks(BenchmarkJob(update, state, job.folder / TEST, job.benchmarks, job.harness), progress)


def trained_state(job: TrialJob) -> ModelState:
    """The model a trial ended with."""
    pretrained = ModelState(job.base.path, trust_remote_code=job.recipe.trust_remote_code)
    if job.joint:
        return expert_state(pretrained, _joint_folder(job))
    return replace(pretrained, task_vector=_last_task_vector(job))


def _last_task_vector(job: TrialJob) -> Path:
    return RunFolder(job.folder).round(job.recipe.protocol.rounds) / "task_vector.safetensors"


def _run_rounds(job: TrialJob, progress: Progress) -> Json:
    """The run itself; the pretrained model's losses are known already."""
    folder = RunFolder(job.folder)
    write_json(folder.round(0) / "losses.json", job.pretrained_losses)
    run = Run(job.recipe, folder, job.base, job.tasks, LocalExecutor(), progress, trial=True, shared=job.shared)
    summary = run_rounds(run)
    rounds = [
        _round_record(index, summary["rounds"][str(index)], read_json(folder.round(index) / "merge.json"))
        | _uneven_steps(folder.round(index))
        for index in range(1, job.recipe.protocol.rounds + 1)
    ]
    return {"rounds": rounds, "multi_task_validation_loss": rounds[-1]["multi_task_validation_loss"]}


def _round_record(index: int, measured: Json, merge: Json) -> Json:
    """What tables and figures say about one round."""
    tasks = merge["tasks"]
    return {
        "round": index,
        "validation_losses": {task: entry["loss"] for task, entry in measured["losses"].items()},
        "multi_task_validation_loss": measured["multi_task_loss"],
        "weights": measured["weights"],
        "loss_gaps": measured["loss_gaps"],
        "kept_share": merge["kept_share"],
        "drift": merge["drift"],
        "distance": merge["merged_norm"],
        "cosines": {
            task: dict(zip(tasks, row, strict=True))
            for task, row in zip(tasks, merge["task_vector_cosines"], strict=True)
        },
        **({"scaling": merge["line_search"]["scaling"]} if "line_search" in merge else {}),
        **({"guards": measured["guards"]} if measured["guards"] else {}),
        **{key: measured[key] for key in ("skipped", "rolled_back") if key in measured},
    }


def _uneven_steps(folder: Path) -> Json:
    """The steps of each task in a round, where they did not all take the protocol's."""
    done = read_json(folder / "DONE.json")
    return {"steps": done["steps"]} if "steps" in done else {}


def _train_jointly(job: TrialJob, progress: Progress) -> Json:
    """One model, fine-tuned on all tasks mixed, with the steps that all local updates together would take."""
    steps = sum(job.recipe.protocol_of(task.name).local_steps for task in job.tasks)
    update = LocalUpdateJob(
        recipe=job.recipe,
        task=replace(job.tasks[0], name="joint"),
        start=ModelState(job.base.path, trust_remote_code=job.recipe.trust_remote_code),
        base_name=job.base.name,
        folder=_joint_folder(job),
        round_index=1,
        num_steps=steps,
        steps_before=0,
        total_steps=steps,
        key=job.folder.name,
        mixed=job.tasks,
        validated=False,  # one model for all tasks is measured as merged models are
    )
    record = run_local_update(update, progress)
    return {"rounds": [], "steps": record["steps"]}


def _joint_folder(job: TrialJob) -> Path:
    return job.folder / "joint"


def _prune(job: TrialJob) -> None:
    """Remove what only a resume would need: experts of every round, and the models before the last."""
    folder = RunFolder(job.folder)
    rounds = job.recipe.protocol.rounds if not job.joint else 0
    for index in range(1, rounds + 1):
        for task in job.tasks:
            remove(folder.local_update(index, task.name) / MANIFEST)  # first: it names what goes
            for kind in ("adapter", "model"):
                remove(folder.local_update(index, task.name) / kind)
            remove(folder.local_update(index, task.name) / OPTIMIZER_NAME)
        remove(folder.round(index) / "carried_adapter")
        if index < rounds:
            remove(folder.round(index) / "task_vector.safetensors")
            remove(folder.round(index) / STATE_NAME)


def _outcome(job: TrialJob) -> str:
    """One line on what came out."""
    trial = read_json(job.folder / TRIAL)
    parts = []
    if "multi_task_validation_loss" in trial:
        parts.append(f"multi-task validation loss {trial['multi_task_validation_loss']:.4f}")
    if job.scored:
        scores = read_json(job.folder / TEST / "scores.json")
        own = [scores[task.name]["score"] for task in job.tasks]
        parts.append(f"mean test score {sum(own) / len(own):.3f}")
        asked = read_benchmarks(job.folder / TEST, job.benchmarks, job.harness)
        parts += [f"{name} {found['score']['score']:.3f}" for name, found in asked.items()]
    return ", ".join(parts)
