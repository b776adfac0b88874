"""`manyshot compare`: the grid of a comparison, cell by cell, with everything shared that cells have in common.

For each place (backbone, task set, seed): the pretrained model and the experts are measured once, local updates from
the pretrained model are trained once, then every method is tried. Where grids are searched, candidates are judged on
validation; the chosen ones alone are scored on the test splits, once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.compare_folder import CompareFolder, claim, describe
from manyshot.compare_inputs import check_all_inputs, check_space, runs_of
from manyshot.compare_jobs import TRIAL, TrialJob, run_trial
from manyshot.compare_outputs import write_outputs
from manyshot.compare_place import (
    Comparison,
    expert_benchmarks,
    expert_folders,
    expert_losses,
    prepare,
    pretrained_benchmarks,
    pretrained_folders,
    train_shared,
    why_not,
)
from manyshot.compare_plan import Cell, Place, cells_at, places
from manyshot.compare_recipe import Candidate, CompareRecipe
from manyshot.compare_results import References, collect
from manyshot.compare_trials import candidate_of, settings_of, trial_job, tune
from manyshot.disk import disk_errors
from manyshot.executor_choice import open_cells
from manyshot.manifest import check_files
from manyshot.progress import Listener, Progress
from manyshot.run_lock import clear, one_writer
from manyshot.rundir import write_json

Json = dict[str, Any]


@dataclass(frozen=True)
class CompareResult:
    """What a comparison left: `results` is results.json, `files` the tables and figures."""

    folder: Path
    results: Json
    files: list[Path]


def compare(
    recipe: CompareRecipe,
    output: Path,
    *,
    resume: bool = False,
    extend: bool = False,
    force: bool = False,
    repair: bool = False,
    workers: int = 1,
    listener: Listener | None = None,
    command: str | None = None,
) -> CompareResult:
    """Run every cell of the grid into the folder `output`; write results.json, tables and figures.

    A folder that is not empty is refused unless `resume` (the same recipe), `extend` (a changed one: finished cells
    that are still wanted stay) or `force` (start over); `repair` resumes, and redoes what was changed or removed.
    Raises ManyshotError for inputs that cannot be used; a cell that fails is recorded, and the others go on.
    """
    folder, resume = CompareFolder(output), resume or repair
    claim(folder, recipe, resume=resume, extend=extend, force=force)
    with disk_errors(output), one_writer(output) as before, ExitStack() as stack:
        claim(folder, recipe, resume=resume, extend=extend, force=force)  # now that nobody else changes it
        progress = Progress(listener)
        if before is not None:
            progress.message(f"{before} ended without finishing; what it left half written is removed")
        inputs = check_all_inputs(recipe, progress)
        if force and not (resume or extend):
            clear(output)
        check_space(recipe, output, inputs, workers=workers, finished=len(list(folder.trials.glob(f"*/{TRIAL}"))))
        cells = open_cells(output, workers, recipe.local_update.device, runs_of(recipe, inputs))
        executor = stack.enter_context(cells)
        describe(folder, recipe, inputs, command)
        check_files(output, progress.message, repair=repair, how="--resume --repair")
        progress.metrics = folder.metrics
        run = Comparison(recipe, folder, inputs, executor, progress)
        for model in recipe.models:
            tune(run, model)
            for place in places(recipe):
                if place.model == model:
                    run_place(run, place)
        results = save_results(run)
        return CompareResult(output, results, write_outputs(results, output))


def run_place(run: Comparison, place: Place) -> None:
    """Every cell of a place, scored; results.json is written anew, so that figures are there as they come."""
    prepare(run, place)
    cells = {cell: candidate_of(run, cell) for cell in cells_at(run.recipe, place)}
    if place not in run.broken:
        wanted = [(one, cell.protocol) for cell, one in cells.items() if one is not None and cell.protocol != "joint"]
        train_shared(run, place, wanted)
    jobs: dict[Path, TrialJob] = {}
    for cell, candidate in cells.items():
        error = problem_of(run, cell, candidate)
        if error is not None or candidate is None:
            run.trials[cell.name] = {"status": "failed", "error": error}
            continue
        job = trial_job(run, cell, candidate, scored=True)
        jobs[job.folder] = job
        settings = settings_of(run, cell, candidate)
        run.trials[cell.name] = {"folder": job.folder, "retention": job.retention_folder, "settings": settings}
    outcomes = dict(zip(jobs, run.executor.map(run_trial, list(jobs.values()), run.progress), strict=True))
    for cell in cells:
        trial = run.trials[cell.name]
        if "folder" in trial:
            trial |= outcomes[trial["folder"]]
    save_results(run)


def problem_of(run: Comparison, cell: Cell, candidate: Candidate | None) -> str | None:
    """Why a cell cannot be run; None where it can."""
    if cell.place in run.broken:
        return run.broken[cell.place]
    if candidate is None:
        by = run.recipe.tuning.choose_by
        return "no candidate of its grid could be run" + ("" if by == "multi_task_loss" else f", or none has a {by}")
    return None if cell.protocol == "joint" else why_not(run, cell.place, candidate, cell.protocol)


def save_results(run: Comparison) -> Json:
    """Write results.json: what is there so far."""
    references = {
        place: References(
            pretrained_folders(run, place),
            expert_folders(run, place),
            expert_losses(run, place),
            pretrained_benchmarks(run, place),
            expert_benchmarks(run, place),
        )
        for place in sorted(run.ready)
    }
    results = collect(run.recipe, run.folder, references, run.trials, run.tuning)
    write_json(run.folder.results, results)
    return results
