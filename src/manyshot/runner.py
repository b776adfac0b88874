"""Start or resume a run: check everything first, claim the folder, run the rounds, check the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyshot.check_merged import check_merged
from manyshot.disk import disk_errors
from manyshot.errors import ManyshotError, RunFolderError
from manyshot.executor_choice import computing_threads, open_executor
from manyshot.executors import Executor
from manyshot.inputs import Inputs, check_inputs, check_space
from manyshot.manifest import check_files
from manyshot.models import choose_placement
from manyshot.process_mark import process_mark
from manyshot.progress import WORK_PHASES, Listener, Progress, covered_seconds, wall_seconds
from manyshot.recipe import Recipe, operator_warnings
from manyshot.removed import finish_removing
from manyshot.report_command import write_report
from manyshot.rounds import run_rounds
from manyshot.run_identity import as_begun, describe
from manyshot.run_lock import clear, one_writer
from manyshot.rundir import RunFolder, is_passing, read_lines
from manyshot.seeding import preserved_random_state
from manyshot.steps import Run
from manyshot.steps_extend import earlier_run
from manyshot.trackers import check_trackers, open_tracking
from manyshot.trainer_command import check_command
from manyshot.workload import workload


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: `scores` is scores.json, `merged` the last merged model's folder."""

    folder: Path
    merged: Path
    scores: dict[str, Any]
    seconds: dict[str, float]

    @property
    def normalized(self) -> dict[str, Any] | None:
        """Normalized performance of the last round, where experts were trained."""
        rounds = self.scores["rounds"]
        found: dict[str, Any] | None = rounds[str(len(rounds))].get("normalized")
        return found


def run(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    repair: bool = False,
    listener: Listener | None = None,
    executor: Executor | None = None,
    command: str | None = None,
) -> RunResult:
    """Train, merge and score in rounds, into the folder `output`.

    A folder that is not empty is refused unless `resume` (go on from the last finished step) or `force` (start over).
    `repair` resumes a run whose files were changed, and redoes the steps that had left these.
    Raises ManyshotError for every input that cannot be used; what is written stays, and a resume goes on from it.
    """
    if recipe.executor.name == "ray":
        output = output.absolute()  # tasks on other nodes begin in another folder
    folder, resume = RunFolder(output), resume or repair
    check_folder(folder, resume=resume, force=force)
    with disk_errors(output), preserved_random_state(), one_writer(output) as before, ExitStack() as stack:
        began = time.time()
        check_folder(folder, resume=resume, force=force)  # now that nobody else changes it
        check_trackers(recipe.trackers)
        if recipe.local_update.command is not None:
            check_command(recipe.local_update.command)
        inputs, progress = check_inputs(recipe), Progress(listener)
        if executor is None:
            stack.enter_context(computing_threads(recipe))
            executor = stack.enter_context(open_executor(recipe, output, inputs, progress))
        if force and not resume:
            clear(output)  # only now that everything else is known to be fine
        check_space(recipe, folder, inputs)
        check_left(output, progress, describe(recipe, folder, inputs, command), repair=repair)
        progress.metrics = folder.metrics
        progress.record("begin", began=round(began, 3), resumed=resume, process=process_mark())
        progress.record("plan", **workload(recipe, inputs.tasks, inputs.mean_tokens), at_once=executor.at_once)
        if before is not None:
            progress.message(f"{before} ended without finishing; what it left half written is removed")
        for warning in operator_warnings(recipe):
            progress.message(f"warning: {warning}")
        progress.message(f"computing in {choose_placement(recipe.local_update).text}")
        tracking = open_tracking(recipe, folder, progress)
        current = Run(
            *(recipe, folder, inputs.base, inputs.tasks, executor, progress),
            tracking=tracking,
            begun=as_begun(recipe, folder),
        )
        current = replace(current, earlier=earlier_run(current))
        try:
            scores = run_rounds(current)
            check_merged(current, scores)
        except Exception as error:
            tell_failure(output, progress, error)
            raise
        progress.record("end")
        report(output, progress)
        return RunResult(output, folder.merged, scores, phase_seconds(folder))


def check_left(output: Path, progress: Progress, differing: Sequence[str], *, repair: bool) -> None:
    """Say what is another now, remove what a kill left of what was being removed, and check all else by manifests."""
    for line in differing:
        progress.message(f"since the run was last here: {line}")
    if left := finish_removing(output):
        progress.message(f"removed, as keep says: {', '.join(left)}")
    check_files(output, progress.message, repair=repair, how="--resume --repair")


def report(output: Path, progress: Progress) -> None:
    """Write the run's report; the run is complete without it, so what keeps it from being written is only told."""
    try:
        progress.message(f"report: {write_report([output]).html}")
    except ManyshotError as error:
        progress.message(f"warning: no report: {error}; manyshot report {shlex.quote(str(output))} tries again")


def tell_failure(output: Path, progress: Progress, error: Exception) -> None:
    """Say in the run's records what it ended with, and report what there is of it; a full disk has room for neither."""
    text = str(error) if isinstance(error, ManyshotError) else f"{type(error).__name__}: {error}"
    with suppress(OSError):
        progress.record("failed", error=text)
        report(output, progress)


def check_folder(folder: RunFolder, *, resume: bool, force: bool) -> None:
    """Refuse a folder with something in it unless a flag says what to do with that. Nothing is changed yet."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: is a file, not a folder")
    occupied = path.is_dir() and not all(is_passing(file) for file in path.iterdir())
    if not occupied:
        return
    if not (resume or force):
        raise RunFolderError(f"{path}: is not empty; --resume goes on with the run in it, --force deletes it first")
    if not folder.recipe.exists():
        flag = "--resume needs a run" if resume else "--force deletes runs only"
        raise RunFolderError(f"{path}: {flag}, and this folder holds no recipe.yaml of one")


def phase_seconds(folder: RunFolder) -> dict[str, float]:
    """Seconds per phase from metrics.jsonl, the whole wall time, and the share that is not training or evaluation."""
    totals: dict[str, float] = {}
    lines = read_lines(folder.metrics)
    for line in lines:
        if line.get("kind") == "phase":
            totals[line["phase"]] = totals.get(line["phase"], 0.0) + line["seconds"]
    wall = wall_seconds(lines)
    work = covered_seconds(lines, WORK_PHASES)
    return totals | {"wall": wall, "overhead": wall - work, "overhead_share": (wall - work) / wall if wall else 0.0}


__all__ = ["Inputs", "RunResult", "check_inputs", "phase_seconds", "run"]
