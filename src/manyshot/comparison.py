"""`manyshot compare`: the grid of a comparison, cell by cell, with everything shared that cells have in common.

For each place (backbone, task set, seed): the pretrained model and the experts are measured once, local updates from
the pretrained model are trained once, then every method is tried. Where grids are searched, candidates are judged on
validation; the chosen ones alone are scored on the test splits, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyshot.compare_benchmarks import BenchmarkJob
from manyshot.compare_folder import CompareFolder, claim, describe
from manyshot.compare_inputs import check_all_inputs, with_tasks
from manyshot.compare_jobs import (
    TRIAL,
    ReferenceJob,
    TrialJob,
    limit_threads,
    run_asked,
    run_reference,
    run_trial,
    run_update,
)
from manyshot.compare_outputs import write_outputs
from manyshot.compare_plan import Cell, Place, cells_at, is_tuned_at, places
from manyshot.compare_recipe import CompareRecipe, changed
from manyshot.compare_results import References, collect
from manyshot.content import keyed, keyed_recipe
from manyshot.disk import disk_errors
from manyshot.executors import Executor, LocalExecutor, ProcessExecutor
from manyshot.inputs import Inputs
from manyshot.local_update import LocalUpdateJob, expert_state
from manyshot.models import ModelState
from manyshot.operators import Mean, Operator
from manyshot.progress import Listener, Progress
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder, content_key, read_json, remove, write_json
from manyshot.steps import Run
from manyshot.steps_train import local_update_jobs, shared_update
from manyshot.tasks import Task

Json = dict[str, Any]


@dataclass(frozen=True)
class CompareResult:
    """What a comparison left: `results` is results.json, `files` the tables and figures."""

    folder: Path
    results: Json
    files: list[Path]


@dataclass
class Comparison:
    """A comparison that is running."""

    recipe: CompareRecipe
    folder: CompareFolder
    inputs: dict[tuple[str, int], Inputs]
    executor: Executor
    progress: Progress
    chosen: dict[tuple[str, str, str], Operator] = field(default_factory=dict)  # model, method, protocol
    tuning: list[Json] = field(default_factory=list)
    trials: dict[str, Json] = field(default_factory=dict)  # cell name -> folder, status, settings
    ready: set[Place] = field(default_factory=set)
    broken: dict[Place, str] = field(default_factory=dict)  # where an expert or a reference failed, and how
    updates: dict[tuple[Place, str], list[LocalUpdateJob]] = field(default_factory=dict)

    def tasks(self, place: Place, names: tuple[str, ...]) -> tuple[Task, ...]:
        known = {task.name: task for task in self.inputs[place.model, place.seed].tasks}
        return tuple(known[name] for name in names)

    def set_tasks(self, place: Place) -> tuple[str, ...]:
        return self.recipe.sets[place.task_set].tasks


def compare(
    recipe: CompareRecipe,
    output: Path,
    *,
    resume: bool = False,
    extend: bool = False,
    force: bool = False,
    workers: int = 1,
    listener: Listener | None = None,
    command: str | None = None,
) -> CompareResult:
    """Run every cell of the grid into the folder `output`; write results.json, tables and figures.

    A folder that is not empty is refused unless `resume` (the same recipe), `extend` (a changed one: finished cells
    that are still wanted stay) or `force` (start over). Raises ManyshotError for inputs that cannot be used; a cell
    that fails is recorded, and the others go on.
    """
    folder = CompareFolder(output)
    claim(folder, recipe, resume=resume, extend=extend, force=force)
    with disk_errors(output), ExitStack() as stack:
        progress = Progress(listener)
        inputs = check_all_inputs(recipe, progress)
        if force and not (resume or extend):
            remove(output)
        describe(folder, recipe, inputs, command)
        progress.metrics = folder.metrics
        executor: Executor = LocalExecutor()
        if workers > 1:
            executor = stack.enter_context(ProcessExecutor(workers, limit_threads))
        run = Comparison(recipe, folder, inputs, executor, progress)
        for model in recipe.models:
            tune(run, model)
            for place in places(recipe):
                if place.model == model:
                    run_place(run, place)
        results = save_results(run)
        return CompareResult(output, results, write_outputs(results, output))


# ---- what the cells of a place share ---------------------------------------------------------------------------------


def prepare(run: Comparison, place: Place) -> None:
    """Local updates from the pretrained model; the pretrained model and the experts, measured.

    Where one of them fails no cell of the place can be run: `broken` says so, and other places go on.
    """
    if place in run.ready or place in run.broken:
        return
    # benchmarks that cannot be asked show before anything is trained
    errors = failures(run.executor.map(run_asked, pretrained_benchmarks(run, place), run.progress))
    if not errors:
        jobs = [job for shot in ("post_hoc", "many_shot") for job in shared_jobs(run, place, shot)]
        updates = list({job.folder: job for job in jobs}.values())
        errors = failures(run.executor.map(run_update, updates, run.progress))
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


def shared_jobs(run: Comparison, place: Place, shot: str) -> list[LocalUpdateJob]:
    """The experts (`post_hoc`), or the first round's local updates: they depend on no operator."""
    if not any(cell.protocol == shot for cell in cells_at(run.recipe, place)) and shot != "post_hoc":
        return []
    if (known := run.updates.get((place, shot))) is not None:
        return known
    current = as_run(run, place, Mean(), shot, run.folder.path)
    protocol = current.recipe.protocol
    nowhere = [Path() for _ in current.tasks]
    jobs = local_update_jobs(current, current.pretrained, 1, protocol.steps_in_round(1), 0, nowhere)
    shared = [dataclasses.replace(job, folder=shared_update(run.folder.updates, job)) for job in jobs]
    run.updates[place, shot] = shared
    return shared


def as_run(
    run: Comparison, place: Place, operator: Operator, shot: str, folder: Path, method: str | None = None
) -> Run:
    names = run.set_tasks(place)
    recipe = run.recipe.run_recipe(place.model, names, place.seed, operator, shot, method)
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
        for job in shared_jobs(run, place, "post_hoc")
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
    for job in shared_jobs(run, place, "post_hoc"):
        own = {name: one for name, one in asked.items() if one.task == job.task.name}
        state, folder = expert_state(job.start, job.folder), expert_folder(run, job)
        found.append(BenchmarkJob(recipe.local_update, state, folder, own, recipe.harness))
    return found


def measuring_recipe(run: Comparison, place: Place) -> Recipe:
    recipe = run.recipe.run_recipe(place.model, run.set_tasks(place), place.seed, Mean(), "post_hoc")
    return with_tasks(recipe, run.recipe, (*run.set_tasks(place), *run.recipe.retention))


# ---- trials ----------------------------------------------------------------------------------------------------------


def tune(run: Comparison, model: str) -> None:
    """Try every candidate of every grid on the tuning seeds, and choose by the multi-task validation loss."""
    recipe = run.recipe
    sites = [place for place in places(recipe) if place.model == model]
    tuned = [(place, cell) for place in sites for cell in cells_at(recipe, place) if is_tuned_at(recipe, cell)]
    for place in dict.fromkeys(place for place, _ in tuned):
        prepare(run, place)
        if place in run.broken:
            continue
        jobs = {
            job.folder: job
            for where, cell in tuned
            if where == place
            for candidate in recipe.candidates(cell.method)
            for job in [trial_job(run, cell, candidate, scored=False)]
        }
        run.executor.map(run_trial, list(jobs.values()), run.progress)
    for method, protocol in dict.fromkeys((cell.method, cell.protocol) for _, cell in tuned):
        cells = [cell for _, cell in tuned if (cell.method, cell.protocol) == (method, protocol)]
        # a seed without experts is no candidate's fault; where no seed has any, all candidates failed
        record = choose(run, [cell for cell in cells if cell.place not in run.broken] or cells)
        run.tuning.append(record)
        if record["chosen"] is not None:
            run.chosen[model, method, protocol] = recipe.candidates(method)[record["chosen"]]


def choose(run: Comparison, cells: list[Cell]) -> Json:
    """The candidate with the lowest mean loss over the tuning seeds; the first of equals, null where none finished."""
    cell = cells[0]
    tried = []
    for candidate in run.recipe.candidates(cell.method):
        found = [candidate_loss(run, one, candidate) for one in cells]
        known = [loss for loss in found if loss is not None]
        mean = sum(known) / len(known) if len(known) == len(found) else None
        tried.append({"settings": settings_of(candidate), "multi_task_validation_loss": mean})
    losses = [(entry["multi_task_validation_loss"], i) for i, entry in enumerate(tried)]
    finite = [one for one in losses if one[0] is not None]
    best = min(finite)[1] if finite else None
    place = cell.place
    seeds = [one.place.seed for one in cells]
    where = {"model": place.model, "task_set": place.task_set, "seeds": seeds}
    return where | {"method": cell.method, "protocol": cell.protocol, "candidates": tried, "chosen": best}


def candidate_loss(run: Comparison, cell: Cell, candidate: Operator) -> float | None:
    if cell.place in run.broken:
        return None
    record = trial_job(run, cell, candidate, scored=False).folder / TRIAL
    loss: float | None = read_json(record)["multi_task_validation_loss"] if record.exists() else None
    return loss


def settings_of(operator: Operator) -> Json:
    return {key: value for key, value in dataclasses.asdict(operator).items() if key != "name"}


def run_place(run: Comparison, place: Place) -> None:
    """Every cell of a place, scored; results.json is written anew, so that figures are there as they come."""
    prepare(run, place)
    jobs: dict[Path, TrialJob] = {}
    for cell in cells_at(run.recipe, place):
        if place in run.broken:
            run.trials[cell.name] = {"status": "failed", "error": run.broken[place]}
            continue
        operator = None if cell.protocol == "joint" else operator_of(run, cell)
        if operator is None and cell.protocol != "joint":
            run.trials[cell.name] = {"status": "failed", "error": "no candidate of its grid could be run"}
            continue
        job = trial_job(run, cell, operator, scored=True)
        jobs[job.folder] = job
        settings = settings_of(operator) if operator else {}
        run.trials[cell.name] = {"folder": job.folder, "retention": job.retention_folder, "settings": settings}
    outcomes = dict(zip(jobs, run.executor.map(run_trial, list(jobs.values()), run.progress), strict=True))
    for cell in cells_at(run.recipe, place):
        trial = run.trials[cell.name]
        if "folder" in trial:
            trial |= outcomes[trial["folder"]]
    save_results(run)


def operator_of(run: Comparison, cell: Cell) -> Operator | None:
    """The method's operator as it was chosen; an ablation's is that of the full method, with its setting changed."""
    method = run.recipe.methods[cell.method]
    if method.ablation_of is not None:
        full = operator_of(run, dataclasses.replace(cell, method=method.ablation_of))
        return None if full is None else changed(full, method.set)
    if method.grid:
        return run.chosen.get((cell.place.model, cell.method, cell.protocol))
    return run.recipe.candidates(cell.method)[0]


def trial_job(run: Comparison, cell: Cell, operator: Operator | None, *, scored: bool) -> TrialJob:
    """The run behind a cell. Its folder is named after its content, so equal trials are one."""
    place = cell.place
    shot = "many_shot" if operator is None else cell.protocol
    current = as_run(run, place, operator or Mean(), shot, Path(), cell.method)
    recipe = current.recipe
    settings = keyed_recipe(recipe.model_dump(mode="json", exclude={"model", "tasks"}))
    # experts that exist already are inputs too: what they hold is in the key of their update
    tasks = [
        [job.task.name, job.task.digest(), job.task.settings(), *([job.key] if job.adopted else [])]
        for job in shared_jobs(run, place, "post_hoc")
    ]
    key = content_key(current.base.digest, settings, tasks, cell.protocol == "joint")
    kind = operator.name if operator else "joint"
    name = f"{kind}-{cell.protocol}-{len(current.tasks)}tasks-seed{place.seed}-{key[:12]}"
    return TrialJob(
        name=cell.name,
        recipe=with_tasks(recipe, run.recipe, (*run.set_tasks(place), *run.recipe.retention)) if scored else recipe,
        base=current.base,
        tasks=current.tasks,
        retention=run.tasks(place, tuple(run.recipe.retention)),
        folder=run.folder.trials / name,
        shared=run.folder.updates,
        pretrained_losses=pretrained_losses(run, place),
        scored=scored,
        joint=operator is None,
        benchmarks=run.recipe.asked(place.task_set) if scored else {},
        harness=run.recipe.harness,
    )


def pretrained_losses(run: Comparison, place: Place) -> Json:
    found: Json = {}
    for task in run.tasks(place, run.set_tasks(place)):
        found |= read_json(pretrained_folder(run, place, task) / "validation" / "losses.json")
    return found


def save_results(run: Comparison) -> Json:
    """Write results.json: what is there so far."""
    references = {
        place: References(
            pretrained_folders(run, place),
            expert_folders(run, place),
            pretrained_benchmarks(run, place),
            expert_benchmarks(run, place),
        )
        for place in sorted(run.ready)
    }
    results = collect(run.recipe, run.folder, references, run.trials, run.tuning)
    write_json(run.folder.results, results)
    return results


def pretrained_folders(run: Comparison, place: Place) -> dict[str, Path]:
    tasks = run.tasks(place, (*run.set_tasks(place), *run.recipe.retention))
    return {task.name: pretrained_folder(run, place, task) for task in tasks}


def expert_folders(run: Comparison, place: Place) -> dict[str, Path]:
    return {job.task.name: expert_folder(run, job) for job in shared_jobs(run, place, "post_hoc")}
