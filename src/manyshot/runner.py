"""Start or resume a run: check everything first, claim the folder, run the rounds, check the result."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from manyshot.check_merged import check_merged
from manyshot.disk import disk_errors
from manyshot.errors import ManyshotError, RunFolderError
from manyshot.executors import Executor, LocalExecutor
from manyshot.inputs import Inputs, check_inputs, check_space
from manyshot.models import choose_placement
from manyshot.process_mark import process_mark
from manyshot.progress import WORK_PHASES, Listener, Progress, wall_seconds
from manyshot.recipe import Recipe, operator_warnings
from manyshot.recipe_file import to_yaml
from manyshot.report_command import write_report
from manyshot.rounds import run_rounds
from manyshot.run_lock import clear, one_writer
from manyshot.rundir import RunFolder, is_passing, read_json, read_lines, write_json, write_text
from manyshot.seeding import preserved_random_state
from manyshot.steps import Run
from manyshot.trackers import check_trackers, open_tracking
from manyshot.workload import workload
from manyshot.yaml_text import read_yaml

PACKAGES = ("manyshot", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


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
    listener: Listener | None = None,
    executor: Executor | None = None,
    command: str | None = None,
) -> RunResult:
    """Train, merge and score in rounds, into the folder `output`.

    A folder that is not empty is refused unless `resume` (go on from the last finished step) or `force` (start over).
    Raises ManyshotError for every input that cannot be used; what is written stays, and a resume goes on from it.
    """
    folder = RunFolder(output)
    check_folder(folder, resume=resume, force=force)
    with disk_errors(output), preserved_random_state(), one_writer(output) as before:
        began = time.time()
        check_folder(folder, resume=resume, force=force)  # now that nobody else changes it
        check_trackers(recipe.trackers)
        inputs = check_inputs(recipe)
        if force and not resume:
            clear(output)  # only now that everything else is known to be fine
        check_space(recipe, folder, inputs)
        describe(recipe, folder, inputs, command)
        progress = Progress(listener, folder.metrics)
        progress.record("begin", began=round(began, 3), resumed=resume, process=process_mark())
        progress.record("plan", **workload(recipe, inputs.tasks, inputs.mean_tokens))
        if before is not None:
            progress.message(f"{before} ended without finishing; what it left half written is removed")
        for warning in operator_warnings(recipe):
            progress.message(f"warning: {warning}")
        progress.message(f"computing in {choose_placement(recipe.local_update).text}")
        tracking = open_tracking(recipe, folder, progress)
        current = Run(
            recipe, folder, inputs.base, inputs.tasks, executor or LocalExecutor(), progress, tracking=tracking
        )
        scores = run_rounds(current)
        check_merged(current, scores)
        progress.record("end")
        report(output, progress)
        return RunResult(output, folder.merged, scores, phase_seconds(folder))


def report(output: Path, progress: Progress) -> None:
    """Write the run's report; the run is complete without it, so what keeps it from being written is only told."""
    try:
        progress.message(f"report: {write_report([output]).html}")
    except ManyshotError as error:
        progress.message(f"warning: no report: {error}; manyshot report {shlex.quote(str(output))} tries again")


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


def describe(recipe: Recipe, folder: RunFolder, inputs: Inputs, command: str | None) -> None:
    """Write recipe.yaml, splits.json and environment.json; on resume, refuse what would change the results."""
    identity = {"model": inputs.base.digest, "tasks": {task.name: task.digest() for task in inputs.tasks}}
    text = to_yaml(recipe)
    if folder.environment.exists():
        try:
            old = read_yaml(folder.recipe.read_text("utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunFolderError(f"{folder.recipe}: damaged ({error}); use --force to start over") from None
        # trackers decide nothing, so that they may be others when a run goes on
        found = differences(old, read_yaml(text))
        changed = [line for line in found if not line.startswith(("trackers.", "trackers:"))]
        if changed:
            raise RunFolderError(
                f"{folder.path}: the recipe differs from the run's: {'; '.join(changed)}; use --force to start over"
            )
        before = read_json(folder.environment).get("identity")
        if keys := [line.split(":")[0] for line in differences(before, identity)]:
            raise RunFolderError(
                f"{folder.path}: the content of {', '.join(keys)} changed since the run began; put it back as it was, "
                "or use --force to start over"
            )
        return
    write_text(folder.recipe, text)
    write_json(folder.splits, {task.name: dict(task.splits) for task in inputs.tasks})
    write_json(folder.environment, environment(recipe, inputs, identity, command))


def environment(recipe: Recipe, inputs: Inputs, identity: dict[str, Any], command: str | None) -> dict[str, Any]:
    """Versions, machine, placement and identity of the inputs."""
    return {
        "command": command or shlex.join(sys.argv),
        "identity": identity,
        "base_model": {"name": inputs.base.name, "path": str(inputs.base.path)},
        "placement": choose_placement(recipe.local_update).text,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [
            line for name in names for line in differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{key}: {old} -> {new}"]


def phase_seconds(folder: RunFolder) -> dict[str, float]:
    """Seconds per phase from metrics.jsonl, the whole wall time, and the share that is not training or evaluation."""
    totals: dict[str, float] = {}
    lines = read_lines(folder.metrics)
    for line in lines:
        if line.get("kind") == "phase":
            totals[line["phase"]] = totals.get(line["phase"], 0.0) + line["seconds"]
    wall = wall_seconds(lines)
    work = sum(totals.get(phase, 0.0) for phase in WORK_PHASES)
    return totals | {"wall": wall, "overhead": wall - work, "overhead_share": (wall - work) / wall if wall else 0.0}


__all__ = ["Inputs", "RunResult", "check_inputs", "phase_seconds", "run"]
