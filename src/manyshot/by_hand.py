"""Rounds by hand: teams that keep their data train the round's model where it is, and send back what they trained.

A coordinator holds a run folder of the ordinary layout. What a local update leaves there is what a team has sent: its
adapter or model, and two numbers, L_τ(Θʳ⁻¹) and L_τ(θᵣτ) on its own validation data, which loss gaps are made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manyshot.base_model import BaseModel, find_base_model
from manyshot.errors import ModelError, RecipeError, RunFolderError, suggestion
from manyshot.executors import LocalExecutor
from manyshot.local_update import RECORD
from manyshot.manifest import MANIFEST, files_in, seal
from manyshot.models import ModelState
from manyshot.peft_adapter import CONFIG_NAME, is_adapter
from manyshot.progress import Listener, Progress
from manyshot.recipe import Recipe
from manyshot.returned_expert import find_result, take_expert
from manyshot.run_identity import describe
from manyshot.run_lock import one_writer
from manyshot.rundir import FAILURE, RunFolder, content_key, is_passing, read_json, remove, write_json
from manyshot.steps import Run
from manyshot.steps_train import steps_of_round
from manyshot.task_spec import ELSEWHERE
from manyshot.tasks import Task
from manyshot.tensors import Checkpoint, file_digest, find_weight_files
from manyshot.yaml_text import read_yaml

Json = dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """What a team sends for a round: a folder, and its validation losses of the round's model and of its own expert."""

    task: str
    folder: Path
    loss_merged: float
    loss_expert: float
    steps: int | None = None  # that it took; the recipe's where it does not say
    loss_pretrained: float | None = None  # of Θ⁰, where that is not the model of its first round


@dataclass(frozen=True)
class Coordinated:
    """What a coordinator reads: the base model; of the tasks the names."""

    base: BaseModel
    tasks: tuple[Task, ...]


# ---- the coordinator's folder ----------------------------------------------------------------------------------------


def start(recipe: Recipe, output: Path, listener: Listener | None = None) -> Json:
    """Begin a run whose tasks are trained elsewhere, or go on with it; returns what round_status() says.

    Raises RecipeError for settings that need data here, RunFolderError for a folder that holds something else.
    """
    refuse_what_needs_data(recipe)
    alone = recipe.evaluation.model_copy(update={"experts": False})
    recipe = recipe.model_copy(update={"evaluation": alone})
    folder = RunFolder(output)
    if output.exists() and not output.is_dir():
        raise RunFolderError(f"{output}: is a file, not a folder")
    occupied = output.is_dir() and not all(is_passing(file) for file in output.iterdir())
    if occupied and not folder.recipe.exists():
        raise RunFolderError(f"{output}: is not empty, and holds no run; choose another folder")
    with one_writer(output):
        base = find_base_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
        progress = Progress(listener)
        for line in describe(recipe, folder, Coordinated(base, _tasks(recipe)), None):
            progress.message(f"since the run was last here: {line}")
    return round_status(output)


def refuse_what_needs_data(recipe: Recipe) -> None:
    """Raises RecipeError naming the key of what a coordinator without data cannot do."""
    here = [name for name, spec in recipe.tasks.items() if spec.data != ELSEWHERE]
    if here:
        raise RecipeError(
            f"tasks.{here[0]}.data: in rounds by hand every task's data is {ELSEWHERE}: write data: {ELSEWHERE}"
        )
    found = []
    if recipe.method.searches_scaling:
        found.append("operator.scaling: auto measures merged models while they are made; give a number")
    if recipe.merge.on_regression != "warn":
        found.append("merge.on_regression: losses of a merged model are known in the next round only; use warn")
    if recipe.merge.space != "weights":
        found.append("merge.space: factors needs adapters that go on from the merged ones; use weights")
    if recipe.local_update.adapter_start != "fresh":
        found.append("local_update.adapter_start: teams start from the merged model itself; use fresh")
    if recipe.evaluation.post_hoc:
        found.append("evaluation.post_hoc: needs experts that are trained here")
    if found:
        raise RecipeError("; ".join(found))


def _tasks(recipe: Recipe) -> tuple[Task, ...]:
    """The tasks without their examples, which are with the teams."""
    return tuple(Task(name, spec, (), (), (), {"dropped": 0}) for name, spec in recipe.tasks.items())


def open_run(path: Path, progress: Progress) -> Run:
    """The run in a coordinator's folder. Raises RunFolderError where there is none, or its base model has changed."""
    folder = RunFolder(path)
    if not folder.recipe.exists():
        raise RunFolderError(f"{path}: holds no run; begin one with manyshot round start {path} RECIPE")
    try:
        recipe = Recipe.model_validate(read_yaml(folder.recipe.read_text("utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.recipe}: is not a recipe of this version ({error})") from None
    if any(spec.data != ELSEWHERE for spec in recipe.tasks.values()):
        raise RunFolderError(f"{path}: is a run with data of its own; manyshot run goes on with it")
    described = read_json(folder.environment)
    base = find_base_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    if base.digest != described.get("identity", {}).get("model"):
        raise RunFolderError(f"{path}: the content of its pretrained model {base.path} changed since the run began")
    return Run(recipe, folder, base, _tasks(recipe), LocalExecutor(), progress)


def current_round(run: Run) -> int:
    """The round that teams train for now; R + 1 where all are over."""
    rounds = range(1, run.recipe.protocol.rounds + 1)
    return next((r for r in rounds if not (run.folder.round(r) / "DONE.json").exists()), len(rounds) + 1)


def start_state(run: Run, round_index: int) -> ModelState:
    """Θʳ⁻¹."""
    if round_index == 1:
        return run.pretrained
    vector = run.folder.round(round_index - 1) / "task_vector.safetensors"
    return ModelState(run.base.path, task_vector=vector, trust_remote_code=run.recipe.trust_remote_code)


def model_for_teams(run: Run, round_index: int) -> Path:
    """The folder of the model that teams train in a round: a plain model folder."""
    return run.base.path if round_index == 1 else run.folder.round(round_index - 1) / "merged"


def round_status(path: Path) -> Json:
    """Where the round stands: the model that teams train, what has been sent, what is missing."""
    run = open_run(path, Progress())
    round_index, rounds = current_round(run), run.recipe.protocol.rounds
    over = round_index > rounds
    found: Json = {"folder": str(path), "round": min(round_index, rounds), "rounds": rounds, "finished": over}
    if over:
        missing = [] if (run.folder.round(rounds) / "losses.json").exists() else list(run.names)
        return found | {"merged": str(run.folder.round(rounds) / "merged"), "sent": {}, "missing": missing}
    steps = dict(zip(run.names, steps_of_round(run, round_index), strict=True))
    sent = {}
    for name in run.names:
        record = run.folder.local_update(round_index, name) / RECORD
        if record.exists():
            said = read_json(record)
            losses = {"loss_merged": said["start"]["loss"], "loss_expert": said["validation"]["loss"]}
            sent[name] = {"returned": said["returned"], "steps": said["steps"], **losses}
    return found | {
        "model": str(model_for_teams(run, round_index)),
        "steps": {name: one.num_steps for name, one in steps.items()},
        "sent": sent,
        "missing": [name for name in run.names if name not in sent],
    }


# ---- what teams send -------------------------------------------------------------------------------------------------


def add(path: Path, sent: Sent, *, replace: bool = False, listener: Listener | None = None) -> str:
    """Take what a team has sent into the current round; returns what came of it, in words.

    The same again is fine; something else in its place needs `replace`. Raises RunFolderError, or ModelError for what
    does not belong to the round's model.
    """
    with one_writer(path):
        progress = Progress(listener)
        run = open_run(path, progress)
        refuse_unknown(run, sent.task)
        round_index = current_round(run)
        losses = {"loss_merged": check_loss(sent.loss_merged, "--loss-merged", sent.task)}
        losses["loss_expert"] = check_loss(sent.loss_expert, "--loss-expert", sent.task)
        if sent.loss_pretrained is not None:
            losses["loss_pretrained"] = check_loss(sent.loss_pretrained, "--loss-pretrained", sent.task)
        where = f"round {round_index}, task '{sent.task}'"
        if not sent.folder.is_dir():
            raise ModelError(f"{where}: no such folder: {sent.folder}")
        found = find_result(sent.folder)
        content = _digest(found)
        if (earlier := _round_of(run, sent.task, content, round_index)) is not None:
            return f"task '{sent.task}': these files are those of round {earlier}, which has been merged; nothing to do"
        if round_index > run.recipe.protocol.rounds:
            raise RunFolderError(f"{path}: all {run.recipe.protocol.rounds} rounds have been merged")
        folder = run.folder.local_update(round_index, sent.task)
        key = content_key(content, losses, sent.steps)
        if (folder / RECORD).exists():
            if read_json(folder / RECORD)["key"] == key:
                return f"{where}: is there already, the same; nothing to do"
            if not replace:
                raise RunFolderError(f"{where}: something else has been sent before; --replace puts this in its place")
        _refuse_pretrained_as_start(found, run.base, run.recipe.model, round_index, where)
        _undo_merge(run.folder.round(round_index))
        remove(folder)
        _take(run, sent, found, round_index, {"key": key, "content": content})
    return f"{where}: taken"


def _undo_merge(folder: Path) -> None:
    """Remove what a merge of other experts left that was interrupted."""
    for name in ("merge.json", "loss_gap.json", "guards.json", "task_vector.safetensors", "merged", MANIFEST):
        remove(folder / name)


def _take(run: Run, sent: Sent, found: Path, round_index: int, names: Mapping[str, str]) -> None:
    """Check and keep what was sent, then its record: what a local update leaves."""
    folder = run.folder.local_update(round_index, sent.task)
    pretrained = Checkpoint(run.base.path)
    kind = take_expert(found, pretrained, sent.task, folder, base_name=run.base.name, trained_on=(), move=False)
    planned = dict(zip(run.names, steps_of_round(run, round_index), strict=True))[sent.task]
    record = dict(names) | {
        "task": sent.task,
        "round": round_index,
        "steps": planned.num_steps if sent.steps is None else sent.steps,
        "steps_before": planned.steps_before,
        "returned": kind,
        "start": {"loss": sent.loss_merged},
        "validation": {"loss": sent.loss_expert},
    }
    if sent.loss_pretrained is not None:
        record["pretrained"] = {"loss": sent.loss_pretrained}
    write_json(folder / RECORD, record)
    seal(folder, "local update", files_in(folder / "adapter", folder / "model", folder / RECORD))


def refuse_unknown(run: Run, task: str) -> None:
    if task not in run.names:
        raise RunFolderError(f"{run.folder.path}: no task '{task}'{suggestion(task, run.names)}")


def check_loss(value: float, flag: str, task: str) -> float:
    """The loss, if it is one: a mean cross-entropy is finite and not negative."""
    if not math.isfinite(value) or value < 0:
        raise RunFolderError(f"task '{task}': {flag} is {value:g}; a mean cross-entropy is a finite number from 0 up")
    return value


def _digest(found: Path) -> str:
    """Of the files that what was sent is taken from."""
    weights = found / "adapter_model.safetensors"
    files = [weights, found / CONFIG_NAME] if is_adapter(found) and weights.is_file() else find_weight_files(found)
    return content_key([[file.name, file_digest(file)] for file in files])


def _round_of(run: Run, task: str, content: str, round_index: int) -> int | None:
    """The earlier round in which the task sent these very files."""
    for earlier in range(1, round_index):
        record = run.folder.local_update(earlier, task) / RECORD
        if record.exists() and read_json(record).get("content") == content:
            return earlier
    return None


def _refuse_pretrained_as_start(found: Path, base: BaseModel, spec: str, round_index: int, where: str) -> None:
    """Refuse an adapter that says that it was trained on the pretrained model when that is not the round's."""
    if round_index == 1 or not is_adapter(found):
        return
    said = read_json(found / CONFIG_NAME).get("base_model_name_or_path")
    if said in (base.name, spec, str(base.path)):
        raise ModelError(
            f"{where}: {found / CONFIG_NAME} says that it was trained on '{said}', the pretrained model; a round's "
            f"adapters are trained on the merged model of round {round_index - 1}"
        )


def missing_tasks(run: Run, round_index: int) -> list[str]:
    """The tasks that have sent nothing for a round."""
    return [name for name in run.names if not (run.folder.local_update(round_index, name) / RECORD).exists()]


def leave_out(run: Run, round_index: int, task: str) -> None:
    """Record that a round goes on without a task, as a local update that failed would be."""
    folder = run.folder.local_update(round_index, task)
    message = f"round {round_index}, task '{task}': nothing was sent"
    told = {"key": "", "task": task, "round": round_index, "message": message, "skipped": True, "traceback": []}
    write_json(folder / FAILURE, told)
    seal(folder, "local update", [folder / FAILURE])
