"""The rounds that were added to a run that had finished, and tasks that came with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from manyshot.evaluate import MeasureJob, run_measure
from manyshot.manifest import MANIFEST
from manyshot.models import ModelState
from manyshot.normalize import multi_task_loss
from manyshot.older_recipe import run_as_now
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.segments import read_segments
from manyshot.steps import Json, Run, seal_step
from manyshot.steps_train import train_experts
from manyshot.training_spec import Protocol


def measure_added(run: Run, earlier: Run, summary: Json) -> None:
    """Measure the models so far on tasks that were not there before, train their experts, and put it in the summary."""
    rounds = earlier.recipe.protocol.rounds
    added = tuple(task for task in run.tasks if task.name not in earlier.names)
    if not added:
        return
    places, jobs = [], []
    for entry, state, name, round_index in _models(earlier, summary):
        folder = run.folder.path / f"extended_{rounds:03d}" / name
        places.append((entry, folder))
        jobs.append(MeasureJob(run.recipe, added, state, folder, round_index))
    for (entry, _), found in zip(places, run.executor.map(run_measure, jobs, run.progress), strict=True):
        for key in ("losses", "scores"):
            entry[key] = entry[key] | found[key]
        entry["multi_task_loss"] = multi_task_loss(entry["losses"])
    manifests = [folder / MANIFEST for _, folder in places]
    if "experts" in summary:
        # with as many steps as the others' experts took
        alone = replace(run, tasks=added, recipe=_with_protocol(run.recipe, _first(earlier).recipe.protocol))
        experts = train_experts(alone)
        summary["experts"] = {key: summary["experts"][key] | experts[key] for key in ("losses", "scores")}
        manifests += [run.folder.expert(task.name) / MANIFEST for task in added]
    summary["tasks"] = list(run.names)
    seal_step(run, run.folder.path, f"tasks added after round {rounds}", *manifests)


def _models(earlier: Run, summary: Json) -> Iterator[tuple[Json, ModelState, str, int]]:
    """Every model that has been measured: its entry in the summary, its state, its folder's name, its round."""
    folder = earlier.folder
    yield summary["pretrained"], earlier.pretrained, folder.round(0).name, 0
    places = [("post_hoc", folder.post_hoc, 0)] if "post_hoc" in summary else []
    places += [(str(r), folder.round(r), r) for r in range(1, earlier.recipe.protocol.rounds + 1)]
    for name, place, round_index in places:
        entry = summary["post_hoc"] if name == "post_hoc" else summary["rounds"][name]
        yield entry, _merged(earlier, place), place.name, round_index


def _merged(run: Run, place: Path) -> ModelState:
    return replace(run.pretrained, task_vector=place / "task_vector.safetensors")


def earlier_run(run: Run) -> Run | None:
    """The run that this one goes on from, as it was when it ended; None for one that was never extended."""
    earlier: Run | None = None
    for segment in read_segments(run.folder.path):
        begun = recipe_from_mapping(run_as_now(segment.recipe))
        recipe = begun.on_device(run.recipe.local_update.device).model_copy(update={"keep": run.recipe.keep})
        tasks = tuple(task for task in run.tasks if task.name in segment.tasks)
        earlier = replace(run, recipe=recipe, begun=begun, tasks=tasks, earlier=earlier, goes_on=True)
    return earlier


def _first(run: Run) -> Run:
    return run if run.earlier is None else _first(run.earlier)


def _with_protocol(recipe: Recipe, protocol: Protocol) -> Recipe:
    changed: dict[str, Any] = {"protocol": protocol}
    return recipe.model_copy(update=changed)
