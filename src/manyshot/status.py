"""How far a run is, from its folder alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from manyshot.errors import RunFolderError
from manyshot.rundir import RunFolder, read_json, read_lines


def run_status(path: Path) -> dict[str, Any]:
    """Rounds and steps done, the next step, losses and scores of every finished round.

    Raises RunFolderError where the folder holds no run.
    """
    folder = RunFolder(path)
    if not folder.recipe.exists():
        raise RunFolderError(f"{path}: holds no run (no recipe.yaml)")
    recipe = yaml.safe_load(folder.recipe.read_text("utf-8"))
    tasks, rounds = list(recipe["tasks"]), int(recipe["protocol"]["rounds"])
    steps = planned_steps(folder, tasks, rounds, recipe["evaluation"])
    pending = [name for name, marker in steps if not marker.exists()]
    lines = read_lines(folder.metrics)
    return {
        "folder": str(path),
        "tasks": tasks,
        "rounds": rounds,
        "rounds_done": sum((folder.round(r) / "DONE.json").exists() for r in range(1, rounds + 1)),
        "steps_done": len(steps) - len(pending),
        "steps": len(steps),
        "next": pending[0] if pending else None,
        "finished": bool(lines) and lines[-1].get("kind") == "end",
        "last_activity": lines[-1]["time"] if lines else None,
        "merged": str(folder.merged) if folder.merged.exists() else None,
        "measured": measured_models(folder, rounds),
    }


def planned_steps(
    folder: RunFolder, tasks: list[str], rounds: int, evaluation: dict[str, Any]
) -> list[tuple[str, Path]]:
    """(name, the record that says it is done) of every step of a run, in order."""
    steps = [("measure pretrained", folder.round(0) / "scores.json")]
    if evaluation["experts"]:
        steps += [(f"expert {task}", folder.expert(task) / "local_update.json") for task in tasks]
        steps += [(f"measure expert {task}", folder.expert(task) / "scores.json") for task in tasks]
    if evaluation["post_hoc"]:
        steps.append(("merge post-hoc", folder.post_hoc / "merge.json"))
        steps.append(("measure post-hoc", folder.post_hoc / "scores.json"))
    for r in range(1, rounds + 1):
        steps += [(f"round {r}: {task}", folder.local_update(r, task) / "local_update.json") for task in tasks]
        steps.append((f"round {r}: merge", folder.round(r) / "merge.json"))
        steps.append((f"round {r}: measure", folder.round(r) / "scores.json"))
    return steps


def measured_models(folder: RunFolder, rounds: int) -> dict[str, Any]:
    """Losses, scores and weights of every model that has been measured."""
    places = {"pretrained": folder.round(0), "post_hoc": folder.post_hoc}
    places |= {f"round {r}": folder.round(r) for r in range(1, rounds + 1)}
    found: dict[str, Any] = {}
    for name, place in places.items():
        if (place / "scores.json").exists():
            found[name] = {"scores": read_json(place / "scores.json"), "losses": read_json(place / "losses.json")}
            if (place / "loss_gap.json").exists():
                found[name]["weights"] = read_json(place / "loss_gap.json")["weights"]
    return found
