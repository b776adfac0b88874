"""What the cells of a place share: the pretrained model and the experts, measured; local updates, trained once.

A place is one backbone, task set and seed. Everything has a name made of what it depends on, so what two methods have
in common is found by both, and no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyshot.compare_benchmarks import BenchmarkJob
from manyshot.compare_folder import CompareFolder
from manyshot.compare_inputs import with_tasks
from manyshot.compare_jobs import ReferenceJob, run_asked, run_reference, run_update
from manyshot.compare_methods import SECTIONS, Candidate
from manyshot.compare_plan import Place
from manyshot.compare_recipe import CompareRecipe
from manyshot.content import keyed
from manyshot.executors import Executor
from manyshot.inputs import Inputs
from manyshot.local_update import RECORD, LocalUpdateJob, expert_state
from manyshot.models import ModelState
from manyshot.progress import Progress
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder, content_key, read_json
from manyshot.steps import Run
from manyshot.steps_train import first_updates, shared_update
from manyshot.tasks import Task

Json = dict[str, Any]


@dataclass
class Comparison:
    """A comparison that is running."""

    recipe: CompareRecipe
    folder: CompareFolder
    inputs: dict[tuple[str, int], Inputs]
    executor: Executor
    progress: Progress
    chosen: dict[tuple[str, str, str], Candidate] = field(default_factory=dict)  # model, method, protocol
    tuning: list[Json] = field(default_factory=list)
    trials: dict[str, Json] = field(default_factory=dict)  # cell name -> folder, status, settings
    ready: set[Place] = field(default_factory=set)
    broken: dict[Place, str] = field(default_factory=dict)  # where an expert or a reference failed, and how
    updates: dict[tuple[Place, str, str], list[LocalUpdateJob]] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)  # shared local updates that failed, and how

    def tasks(self, place: Place, names: tuple[str, ...]) -> tuple[Task, ...]:
        known = {task.name: task for task in self.inputs[place.model, place.seed].tasks}
        return tuple(known[name] for name in names)

    def set_tasks(self, place: Place) -> tuple[str, ...]:
        return self.recipe.sets[place.task_set].tasks


# ---- models that cells are compared with -----------------------------------------------------------------------------


def prepare(run: Comparison, place: Place) -> None:
    """The experts, trained as the recipe says for all; the pretrained model and the experts, measured.

    Where one of them fails no cell of the place can be run: `broken` says so, and other places go on.
    """
    if place in run.ready or place in run.broken:
        return
    # benchmarks that cannot be asked show before anything is trained
    errors = failures(run.executor.map(run_asked, pretrained_benchmarks(run, place), run.progress))
    if not errors:
        errors = failures(run.executor.map(run_update, shared_experts(run, place), run.progress))
    if not errors:
        references = [*pretrained_jobs(run, place), *expert_jobs(run, place)]
        errors = failures(run.executor.map(run_reference, references, run.progress))
        errors += failures(run.executor.map(run_asked, expert_benchmarks(run, place), run.progress))
    if errors:
        run.broken[place] = "; ".join(dict.fromkeys(errors))
        where = f"{place.model}/{place.task_set}/seed {place.seed}"
        run.progress.message(f"{where}: failed before its first cell: {run.broken[place]}")
    else:
        run.ready.add(place)


def failures(found: Sequence[Json]) -> list[str]:
    return [one["error"] for one in found if one.get("status") == "failed"]


def shared_experts(run: Comparison, place: Place) -> list[LocalUpdateJob]:
    """The experts whose scores and losses every cell of the place is divided by."""
    return shared_jobs(run, place, run.recipe.shared, "post_hoc")


def shared_jobs(run: Comparison, place: Place, candidate: Candidate, shot: str) -> list[LocalUpdateJob]:
    """The local updates from the pretrained model: all steps at once (`post_hoc`), or those of the first round.

    They depend on no operator: methods that train in the same way share them.
    """
    trained = [getattr(candidate, name).model_dump(mode="json") for name in SECTIONS]
    name = (place, shot, content_key(trained))
    if (known := run.updates.get(name)) is not None:
        return known
    current = as_run(run, place, candidate, shot, run.folder.path)
    jobs = first_updates(current, [Path() for _ in current.tasks])
    shared = [dataclasses.replace(job, folder=shared_update(run.folder.updates, job)) for job in jobs]
    run.updates[name] = shared
    return shared


def train_shared(run: Comparison, place: Place, wanted: Iterable[tuple[Candidate, str]]) -> None:
    """What runs (a candidate, once or in rounds) begin with, trained before them so that it is trained once.

    A local update that fails does so for the runs that need it: `failed` says which, and how.
    """
    jobs = {job.folder: job for candidate, shot in wanted for job in shared_jobs(run, place, candidate, shot)}
    found = run.executor.map(run_update, list(jobs.values()), run.progress)
    for folder, one in zip(jobs, found, strict=True):
        if one.get("status") == "failed":
            run.failed[folder] = one["error"]


def why_not(run: Comparison, place: Place, candidate: Candidate, shot: str) -> str | None:
    """The error that keeps a run from beginning; None where there is none."""
    errors = [run.failed[job.folder] for job in shared_jobs(run, place, candidate, shot) if job.folder in run.failed]
    return "; ".join(dict.fromkeys(errors)) or None


def as_run(run: Comparison, place: Place, candidate: Candidate, shot: str, folder: Path) -> Run:
    names = run.set_tasks(place)
    recipe = run.recipe.run_recipe(place.model, names, place.seed, candidate, shot)
    base = run.inputs[place.model, place.seed].base
    tasks = run.tasks(place, names)
    return Run(recipe, RunFolder(folder), base, tasks, run.executor, run.progress, shared=run.folder.updates)


def pretrained_jobs(run: Comparison, place: Place) -> list[ReferenceJob]:
    """The pretrained model on every task of the place, and on what was never trained."""
    base = run.inputs[place.model, place.seed].base
    state = ModelState(base.path, trust_remote_code=run.recipe.trust_remote_code)
    recipe, trained = measuring_recipe(run, place), run.set_tasks(place)
    return [
        ReferenceJob(recipe, task, state, pretrained_folder(run, place, task), validation=task.name in trained)
        for task in run.tasks(place, (*trained, *run.recipe.retention))
    ]


def pretrained_folder(run: Comparison, place: Place, task: Task) -> Path:
    """Named after what the measurement depends on."""
    base = run.inputs[place.model, place.seed].base
    key = content_key(base.digest, task.digest(), task.settings(), how_measured(run.recipe))
    return run.folder.references / f"{task.name}-{key[:16]}"


def expert_folder(run: Comparison, job: LocalUpdateJob) -> Path:
    """Where an expert's scores are: what its training does not depend on, they may."""
    key = content_key(job.key, how_measured(run.recipe))
    return run.folder.references / f"{job.task.name}-expert-{key[:16]}"


def how_measured(recipe: CompareRecipe) -> list[Any]:
    update = recipe.local_update
    placement = (update.dtype, update.device, update.attn_implementation)
    return [keyed("evaluation", recipe.evaluation.model_dump(mode="json")), update.max_length, *placement]


def expert_jobs(run: Comparison, place: Place) -> list[ReferenceJob]:
    """Every task's own expert on its own task."""
    recipe = measuring_recipe(run, place)
    return [
        ReferenceJob(recipe, job.task, expert_state(job.start, job.folder), expert_folder(run, job), validation=False)
        for job in shared_experts(run, place)
    ]


def pretrained_benchmarks(run: Comparison, place: Place) -> list[BenchmarkJob]:
    """The pretrained model on all benchmarks of a place: they depend on no seed."""
    recipe, base = run.recipe, run.inputs[place.model, place.seed].base
    update, asked = recipe.local_update, recipe.asked(place.task_set)
    state = ModelState(base.path, trust_remote_code=recipe.trust_remote_code)
    key = content_key(base.digest, update.dtype, update.device, update.attn_implementation)
    folder = run.folder.references / f"pretrained-{key[:16]}"
    return [BenchmarkJob(update, state, folder, asked, recipe.harness)] if asked else []


def expert_benchmarks(run: Comparison, place: Place) -> list[BenchmarkJob]:
    """Every expert on the benchmarks of its own task."""
    recipe, asked = run.recipe, run.recipe.asked(place.task_set)
    found = []
    for job in shared_experts(run, place):
        own = {name: one for name, one in asked.items() if one.task == job.task.name}
        state, folder = expert_state(job.start, job.folder), expert_folder(run, job)
        found.append(BenchmarkJob(recipe.local_update, state, folder, own, recipe.harness))
    return found


def measuring_recipe(run: Comparison, place: Place) -> Recipe:
    recipe = run.recipe.run_recipe(place.model, run.set_tasks(place), place.seed, run.recipe.shared, "post_hoc")
    return with_tasks(recipe, run.recipe, (*run.set_tasks(place), *run.recipe.retention))


def pretrained_losses(run: Comparison, place: Place) -> Json:
    found: Json = {}
    for task in run.tasks(place, run.set_tasks(place)):
        found |= read_json(pretrained_folder(run, place, task) / "validation" / "losses.json")
    return found


def expert_losses(run: Comparison, place: Place) -> Json:
    """What each task's own expert reached on its validation split."""
    return {job.task.name: read_json(job.folder / RECORD)["validation"] for job in shared_experts(run, place)}


def pretrained_folders(run: Comparison, place: Place) -> dict[str, Path]:
    tasks = run.tasks(place, (*run.set_tasks(place), *run.recipe.retention))
    return {task.name: pretrained_folder(run, place, task) for task in tasks}


def expert_folders(run: Comparison, place: Place) -> dict[str, Path]:
    return {job.task.name: expert_folder(run, job) for job in shared_experts(run, place)}
