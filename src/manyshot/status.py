"""How far a run is, from its folder alone. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from manyshot.errors import RunFolderError
from manyshot.misshapen import misshapen
from manyshot.rundir import FAILURE, RunFolder, read_json, read_lines, require_regular
from manyshot.segments import first_rounds
from manyshot.task_spec import ELSEWHERE
from manyshot.yaml_text import read_yaml

# as recipe.TASK_NAME: names of tasks are names of folders, and no path
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# of all tasks and rounds together: every step is looked for in the folder
MAX_STEPS = 100_000


@dataclass(frozen=True)
class Step:
    """One step of a run: `model` is the row it belongs to, `record` the file that says that it is done."""

    name: str
    model: str
    kind: Literal["train", "merge", "measure"]
    record: Path
    task: str = ""  # of all tasks


@dataclass(frozen=True)
class Outline:
    """What a run's recipe says of its course, as plain values: a recipe of another version is read too."""

    tasks: list[str]
    rounds: int
    operator: str
    evaluation: dict[str, Any]
    by_hand: bool = False  # the data is with teams, who tell losses and no scores


def task_names(found: Iterable[object]) -> list[str]:
    """Names of tasks, which are names of folders. Raises ValueError for one that is no such name."""
    names = []
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a task")
        names.append(name)
    return names


def read_outline(folder: RunFolder) -> Outline:
    """The outline of the run in a folder. Raises RunFolderError where it holds none, or a damaged recipe."""
    if not folder.recipe.exists():
        raise RunFolderError(f"{folder.path}: holds no run (no recipe.yaml)")
    require_regular(folder.recipe)
    try:
        recipe = read_yaml(folder.recipe.read_text("utf-8"))
        evaluation = {"experts": True, "post_hoc": False} | recipe["evaluation"]
        tasks, rounds = task_names(recipe["tasks"]), int(recipe["protocol"]["rounds"])
        if not 0 < rounds * max(len(tasks), 1) <= MAX_STEPS:
            raise ValueError(f"{rounds} rounds of {len(tasks)} tasks")
        specs = list(recipe["tasks"].values()) if isinstance(recipe["tasks"], dict) else []
        by_hand = bool(specs) and all(isinstance(spec, dict) and spec.get("data") == ELSEWHERE for spec in specs)
        return Outline(tasks, rounds, str(recipe["operator"]["name"]), evaluation, by_hand)
    except (UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise RunFolderError(f"{folder.recipe}: is not the recipe of a run ({type(error).__name__}: {error})") from None


@misshapen(RunFolderError, "its records cannot be read")
def run_status(path: Path) -> dict[str, Any]:
    """Rounds and steps done, the next step, losses and scores of every finished round.

    Raises RunFolderError where the folder holds no run.
    """
    folder = RunFolder(path)
    outline = read_outline(folder)
    steps = planned_steps(folder, outline)
    pending = [step.name for step in steps if not step.record.exists()]
    lines = read_lines(folder.metrics)
    return {
        "folder": str(path),
        "tasks": outline.tasks,
        "rounds": outline.rounds,
        "rounds_done": sum((folder.round(r) / "DONE.json").exists() for r in range(1, outline.rounds + 1)),
        "steps_done": len(steps) - len(pending),
        "steps": len(steps),
        "next": pending[0] if pending else None,
        "finished": bool(lines) and lines[-1].get("kind") == "end",
        "last_activity": lines[-1]["time"] if lines else None,
        "merged": str(folder.merged) if folder.merged.exists() else None,
        "measured": measured_models(folder, outline.rounds),
        "findings": guard_findings(folder, outline.rounds),
    }


def planned_steps(folder: RunFolder, outline: Outline) -> list[Step]:
    """Every step of a run, in order."""
    tasks, evaluation = outline.tasks, outline.evaluation
    measured = "losses.json" if outline.by_hand else "scores.json"
    steps = [Step("measure pretrained", "pretrained", "measure", folder.round(0) / measured)]
    if evaluation["experts"]:
        places = {task: folder.expert(task) for task in tasks}
        steps += [
            Step(f"expert {task}", "experts", "train", place / "local_update.json", task)
            for task, place in places.items()
        ]
        steps += [
            Step(f"measure expert {task}", "experts", "measure", place / "scores.json", task)
            for task, place in places.items()
        ]
    if evaluation["post_hoc"]:
        steps.append(Step("merge post-hoc", "post_hoc", "merge", folder.post_hoc / "merge.json"))
        steps.append(Step("measure post-hoc", "post_hoc", "measure", folder.post_hoc / "scores.json"))
    since = first_rounds(folder.path, tasks)
    for r in range(1, outline.rounds + 1):
        model, there = f"round {r}", [task for task in tasks if r >= since.get(task, 1)]
        steps += [Step(f"{model}: {task}", model, "train", _update_record(folder, r, task), task) for task in there]
        steps.append(Step(f"{model}: merge", model, "merge", folder.round(r) / "merge.json"))
        steps.append(Step(f"{model}: measure", model, "measure", folder.round(r) / measured))
    return steps


def _update_record(folder: RunFolder, round_index: int, task: str) -> Path:
    """What says that a task is done with in a round: its local update's record, or why the round went on without it."""
    failure = folder.local_update(round_index, task) / FAILURE
    weighed = folder.round(round_index) / "loss_gap.json"
    if failure.exists() and weighed.exists() and task in read_json(weighed).get("skipped", {}):
        return failure
    return failure.with_name("local_update.json")


def model_folders(folder: RunFolder, rounds: int) -> dict[str, Path]:
    """Where the records of every measured model are, by the name of its row."""
    places = {"pretrained": folder.round(0), "post_hoc": folder.post_hoc}
    return places | {f"round {r}": folder.round(r) for r in range(1, rounds + 1)}


def measured_models(folder: RunFolder, rounds: int) -> dict[str, Any]:
    """Losses, scores and weights of every model that has been measured."""
    found: dict[str, Any] = {}
    for name, place in model_folders(folder, rounds).items():
        if (place / "scores.json").exists():
            found[name] = {"scores": read_json(place / "scores.json"), "losses": read_json(place / "losses.json")}
            if (place / "loss_gap.json").exists():
                found[name]["weights"] = read_json(place / "loss_gap.json")["weights"]
    return found


def guard_findings(folder: RunFolder, rounds: int) -> list[dict[str, Any]]:
    """What guards have found in every merge so far, in order: a merge that failed has none but these records."""
    places = (place / "guards.json" for place in model_folders(folder, rounds).values())
    return [finding for place in places if place.exists() for finding in read_json(place)["findings"]]


def resume_command(path: Path) -> str:
    """How to go on with a run: its own resolved recipe is what it was started with."""
    return f"manyshot run {shlex.quote(str(path / 'recipe.yaml'))} --resume --output {shlex.quote(str(path))}"
