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

from manyshot.base_model import BaseModel, find_base_model
from manyshot.check_merged import check_merged
from manyshot.errors import DataError, RunFolderError
from manyshot.executors import Executor, LocalExecutor
from manyshot.metrics import check_metric, find_metric
from manyshot.models import check_target_modules, choose_placement, load_tokenizer, meta_model, quiet_transformers
from manyshot.progress import WORK_PHASES, Listener, Progress
from manyshot.recipe import Recipe
from manyshot.recipe_file import to_yaml
from manyshot.rounds import run_rounds
from manyshot.rundir import RunFolder, read_json, read_lines, remove, write_json, write_text
from manyshot.steps import Run
from manyshot.tasks import Task, load_task
from manyshot.tensors import Checkpoint
from manyshot.trainer import check_trainer_arguments

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


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, loaded and checked."""

    base: BaseModel
    tasks: tuple[Task, ...]


def check_inputs(recipe: Recipe) -> Inputs:
    """Load tasks, tokenizer and model config for real, and check them against the recipe and each other.

    Raises DataError for every task that cannot be used, all at once, then ModelError for the model.
    """
    check_trainer_arguments(recipe.local_update)
    choose_placement(recipe.local_update)
    tasks, problems = [], []
    for name in recipe.tasks:
        try:
            task = load_task(recipe, name)
            check_metric(find_metric(task.spec.metric, name), task.test, name)
            tasks.append(task)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    base = find_base_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    with quiet_transformers():
        load_tokenizer(base.path, trust_remote_code=recipe.trust_remote_code)
        model = meta_model(base.path, trust_remote_code=recipe.trust_remote_code)
    if recipe.local_update.method == "lora":
        check_target_modules(model, recipe.local_update)
    check_shapes(base, model)
    return Inputs(base, tuple(tasks))


def check_shapes(base: BaseModel, model: torch.nn.Module) -> None:
    """Every tensor of the checkpoint that the architecture knows has the shape that its config asks for."""
    from manyshot.errors import ModelError

    checkpoint = Checkpoint(base.path)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in checkpoint.names:
        if name in expected and checkpoint.info(name).shape != expected[name]:
            raise ModelError(
                f"{base.path}: tensor '{name}' has shape {checkpoint.info(name).shape}, "
                f"its config asks for {expected[name]}"
            )


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
    claim_folder(folder, resume=resume, force=force)
    progress = Progress(listener, folder.metrics)
    began = time.time()
    inputs = check_inputs(recipe)
    describe(recipe, folder, inputs, command)
    progress.record("begin", began=round(began, 3), resumed=resume)
    progress.message(f"computing in {choose_placement(recipe.local_update).text}")
    current = Run(recipe, folder, inputs.base, inputs.tasks, executor or LocalExecutor(), progress)
    scores = run_rounds(current)
    check_merged(current, scores)
    progress.record("end")
    seconds = phase_seconds(folder)
    return RunResult(output, folder.merged, scores, seconds)


def claim_folder(folder: RunFolder, *, resume: bool, force: bool) -> None:
    """Refuse a folder with something in it unless a flag says what to do with that."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: is a file, not a folder")
    occupied = path.is_dir() and any(path.iterdir())
    if occupied and not (resume or force):
        raise RunFolderError(f"{path}: is not empty; --resume goes on with the run in it, --force deletes it first")
    if occupied and force and not resume:
        if not folder.recipe.exists():
            raise RunFolderError(f"{path}: --force deletes runs only, and this folder holds no recipe.yaml of a run")
        remove(path)
    if resume and not folder.recipe.exists() and occupied:
        raise RunFolderError(f"{path}: --resume needs a run, and this folder holds no recipe.yaml of one")
    path.mkdir(parents=True, exist_ok=True)


def describe(recipe: Recipe, folder: RunFolder, inputs: Inputs, command: str | None) -> None:
    """Write recipe.yaml, splits.json and environment.json; on resume, refuse what would change the results."""
    identity = {"base": inputs.base.digest, "tasks": {task.name: task.digest() for task in inputs.tasks}}
    text = to_yaml(recipe)
    if folder.environment.exists():
        old = yaml.safe_load(folder.recipe.read_text("utf-8"))
        changed = differences(old, yaml.safe_load(text))
        if changed:
            raise RunFolderError(
                f"{folder.path}: the recipe differs from the run's: {'; '.join(changed)}; use --force to start over"
            )
        before = read_json(folder.environment)["identity"]
        for key in differences(before, identity):
            raise RunFolderError(
                f"{folder.path}: the content of {key.split(':')[0]} changed since the run began; use --force"
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
    wall, began, last = 0.0, None, 0.0
    for line in read_lines(folder.metrics):
        if line.get("kind") == "begin":  # a resumed run begins again; the pause does not count
            wall += last - began if began is not None else 0.0
            began = line["began"]
        if line.get("kind") == "phase":
            totals[line["phase"]] = totals.get(line["phase"], 0.0) + line["seconds"]
        last = line["time"]
    wall += last - began if began is not None else 0.0
    work = sum(totals.get(phase, 0.0) for phase in WORK_PHASES)
    return totals | {"wall": wall, "overhead": wall - work, "overhead_share": (wall - work) / wall if wall else 0.0}
