"""results.json of a comparison: everything its tables and figures say, gathered from the files of finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from manyshot.compare_benchmarks import BenchmarkJob, read_benchmarks
from manyshot.compare_folder import CompareFolder
from manyshot.compare_gain import example_losses, shares
from manyshot.compare_jobs import TEST, TRIAL
from manyshot.compare_plan import Cell, Place, cells_at, count_steps, num_steps, places
from manyshot.compare_recipe import CompareRecipe
from manyshot.normalize import multi_task_loss, ratio, summary
from manyshot.rundir import read_json

Json = dict[str, Any]
Folders = Mapping[str, Path]


@dataclass(frozen=True)
class References:
    """Where the models of a place that others are compared with were measured: folders by task, and benchmarks."""

    pretrained: Folders
    experts: Folders
    expert_validation: Json  # task -> what its expert reached on its validation split
    pretrained_asked: Sequence[BenchmarkJob] = ()
    experts_asked: Sequence[BenchmarkJob] = ()


def collect(
    recipe: CompareRecipe,
    folder: CompareFolder,
    measured: Mapping[Place, References],
    trials: Mapping[str, Json],
    tuning: Sequence[Json],
) -> Json:
    """What is finished of a comparison.

    `measured` has every place whose pretrained model and experts were; `trials` say where cells are, and how they
    ended.
    """
    references = {place: _reference(recipe, place, found) for place, found in measured.items()}
    cells = [
        _cell(recipe, cell, trials.get(cell.name), references.get(place))
        for place in places(recipe)
        for cell in cells_at(recipe, place)
    ]
    return {
        "format": 1,
        "name": folder.path.resolve().name,
        "models": list(recipe.models),
        # JSON files have their keys sorted; rows and columns come in the recipe's order
        "order": {"methods": [*recipe.methods], "task_sets": [*recipe.sets], "categories": [*recipe.categories]},
        "task_sets": {
            name: {
                "tasks": list(one.tasks),
                "seeds": list(recipe.seeds_of(name)),
                "scored": list(recipe.scored(name)),
                "against": one.against,
            }
            for name, one in recipe.sets.items()
        },
        "categories": {name: list(tasks) for name, tasks in recipe.categories.items()},
        "retention": recipe.kept,
        **_benchmarks(recipe),
        "task_notes": {name: spec.notes for name, spec in recipe.tasks.items() if spec.notes},
        "rounds": recipe.protocol.rounds,
        "local_steps": recipe.protocol.local_steps,
        "methods": {name: _method(recipe, name) for name in recipe.methods},
        "baseline": recipe.paired_with,
        "references": [vars(place) | found for place, found in references.items()],
        "cells": [cell | _share_of_joint(cell, cells, references) for cell in cells],
        "tuning": list(tuning),
        "steps": count_steps(recipe),
    }


def _benchmarks(recipe: CompareRecipe) -> Json:
    """What is asked through the harness, and how; nothing where no benchmark is."""
    if not recipe.benchmarks:
        return {}
    asked = {
        name: one.model_dump(mode="json", exclude={"data"})
        | {"harness": one.harness or (None if one.data else name), "data": Path(one.data).name if one.data else None}
        for name, one in recipe.benchmarks.items()
    }
    return {"benchmarks": asked, "harness": recipe.harness.model_dump(mode="json")}


def _method(recipe: CompareRecipe, name: str) -> Json:
    method = recipe.methods[name]
    return {
        "label": recipe.label(name),
        "operator": method.operator.name if method.operator else None,
        "reference": recipe.own(name).merge.reference,
        "rounds": recipe.own(name).protocol.rounds,
        "protocols": list(recipe.protocols(name)),
        "ablation_of": method.ablation_of,
        "removes": method.removes,
    }


def _reference(recipe: CompareRecipe, place: Place, measured: References) -> Json:
    """The pretrained model on everything, and each task's expert on its own."""
    tasks, scored = recipe.sets[place.task_set].tasks, recipe.scored(place.task_set)
    losses, scores, _ = _measured(measured.pretrained)
    expert_losses, expert_scores, _ = _measured(measured.experts)
    scores |= _scores(_asked(measured.pretrained_asked))
    expert_scores |= _scores(_asked(measured.experts_asked))
    validation = {task: read_json(measured.pretrained[task] / "validation" / "losses.json")[task] for task in tasks}
    return {
        "pretrained": {
            "validation_losses": {task: validation[task]["loss"] for task in tasks},
            "multi_task_validation_loss": multi_task_loss(validation),
            "losses": {task: losses[task]["loss"] for task in tasks},
            "multi_task_loss": multi_task_loss({task: losses[task] for task in tasks}),
            "scores": {name: scores[name] for name in scored},
            "retention": {name: scores[name] for name in recipe.kept},
            "normalized": _normalized(recipe, scores, expert_scores, scored),
        },
        "experts": {
            "validation_losses": {task: measured.expert_validation[task]["loss"] for task in tasks},
            "losses": {task: expert_losses[task]["loss"] for task in tasks},
            "multi_task_loss": multi_task_loss(expert_losses),
            "scores": {name: expert_scores[name] for name in scored},
        },
    }


def _asked(jobs: Sequence[BenchmarkJob]) -> Json:
    """Name -> what a model said to a benchmark."""
    found: Json = {}
    for job in jobs:
        found |= read_benchmarks(job.folder, job.benchmarks, job.harness)
    return found


def _scores(asked: Json) -> Json:
    return {name: one["score"] for name, one in asked.items()}


def _normalized(recipe: CompareRecipe, scores: Json, experts: Json, scored: Mapping[str, str]) -> Json:
    """Normalized performance per task; with benchmarks, a task's is the mean of its benchmarks', which are there too.

    What an expert scores 0 on has no ratio and stays out of every mean.
    """
    ratios = {name: ratio(scores[name]["score"], experts[name]["score"]) for name in scored}
    by_task: dict[str, list[float]] = {task: [] for task in scored.values()}
    for name, task in scored.items():
        if (found := ratios[name]) is not None:
            by_task[task].append(found)
    means = {task: fmean(found) if found else None for task, found in by_task.items()}
    return summary(means) | ({"scored": ratios} if recipe.benchmarks else {})


def _measured(folders: Folders) -> tuple[Json, Json, Json]:
    """Test losses, scores and outputs by task, of models that were measured on one task each."""
    losses: Json = {}
    scores: Json = {}
    outputs: Json = {}
    for folder in folders.values():
        losses |= read_json(folder / TEST / "losses.json")
        scores |= read_json(folder / TEST / "scores.json")
        outputs |= read_json(folder / TEST / "outputs.json")
    return losses, scores, outputs


def _cell(recipe: CompareRecipe, cell: Cell, trial: Json | None, reference: Json | None) -> Json:
    found = vars(cell.place) | {"method": cell.method, "protocol": cell.protocol}
    if trial is not None and trial.get("status") == "failed":
        return found | {"status": "failed", "error": trial["error"]}
    if trial is None or reference is None or "status" not in trial:
        return found | {"status": "missing"}
    tasks, scored = recipe.sets[cell.place.task_set].tasks, recipe.scored(cell.place.task_set)
    losses, scores, outputs = _measured({"": trial["folder"]})
    own = {task: losses[task]["loss"] for task in tasks}
    rounds = read_json(trial["folder"] / TRIAL)["rounds"]
    examples = {task: [said["score"] for said in outputs[task]] for task in tasks}
    asked = read_benchmarks(trial["folder"] / TEST, recipe.asked(cell.place.task_set), recipe.harness)
    scores |= (read_json(trial["retention"] / "scores.json") if recipe.retention else {}) | _scores(asked)
    examples |= {name: one["examples"] for name, one in asked.items()}
    return found | {
        "status": "done",
        "folder": trial["folder"].name,
        "settings": trial["settings"],
        "losses": own,
        "multi_task_loss": fmean(own.values()),
        "scores": {name: scores[name] for name in scored},
        "retention": {name: scores[name] for name in recipe.kept},
        "normalized": _normalized(recipe, scores, reference["experts"]["scores"], scored),
        "share": shares(reference["pretrained"]["losses"], own, reference["experts"]["losses"]),
        "example_scores": {name: examples[name] for name in scored},
        "example_losses": {task: example_losses(outputs[task]) for task in tasks},
        "validation_share": _validation_share(rounds, reference),
        "rounds": rounds,
        "train_steps": num_steps(recipe, cell),
    }


def _validation_share(rounds: Sequence[Json], reference: Json) -> Json | None:
    """Of the last round, on validation: what may be looked at to choose a method. Joint fine-tuning is not measured."""
    before, best = (reference[key]["validation_losses"] for key in ("pretrained", "experts"))
    return shares(before, rounds[-1]["validation_losses"], best) if rounds else None


def _share_of_joint(cell: Json, cells: Sequence[Json], references: Mapping[Place, Json]) -> Json:
    """The same beside joint fine-tuning, the first method that is, of the cell's place."""
    place = Place(cell["model"], cell["task_set"], cell["seed"])
    done = (one for one in cells if one["status"] == "done" and one["protocol"] == "joint")
    joint = next((one for one in done if (one["model"], one["task_set"], one["seed"]) == astuple(place)), None)
    if joint is None or cell["status"] != "done":
        return {}
    before = references[place]["pretrained"]["losses"]
    return {"share_of_joint": shares(before, cell["losses"], joint["losses"])}
