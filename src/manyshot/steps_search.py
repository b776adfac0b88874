"""The line search of one merge (`scaling: auto`): merged models along a line, measured on validation data.

`line_search/` holds what it works with until the merge is recorded: the merged update, one task vector at a time, and
the losses of every β. What was measured before an interruption is read back, so nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from manyshot.evaluate import MeasureJob
from manyshot.gap_weights import TaskLosses
from manyshot.line_search import best_scaling, next_scaling, objective
from manyshot.measure_parts import measure_model
from manyshot.rundir import read_json, remove
from manyshot.steps import Expert, Json, Run

WORK_FOLDER = "line_search"


def search_scaling(
    run: Run,
    folder: Path,
    round_index: int,
    experts: Sequence[Expert],
    write: Callable[[float, Path], None],
) -> Json:
    """The best β, and everything that was tried; `write(β, file)` writes the task vector of the model to measure."""
    pretrained = read_json(run.folder.round(0) / "losses.json")
    kind = run.recipe.merge.search_objective
    unit = 1 / len(run.tasks) if run.recipe.method.sums else 1.0
    tried: dict[float, float] = {}
    points: list[Json] = []
    while (scaling := next_scaling(tried, unit)) is not None:
        losses = _losses(run, folder / WORK_FOLDER, round_index, scaling, write)
        known = TaskLosses(
            *(
                tuple(found[expert.task]["loss"] for expert in experts)
                for found in (losses, {expert.task: expert.record["validation"] for expert in experts}, pretrained)
            )
        )
        tried[scaling] = objective(known, kind)
        points.append(
            {
                "scaling": scaling,
                "objective": tried[scaling],
                "losses": {task: entry["loss"] for task, entry in losses.items()},
            }
        )
    record = {"objective": kind, "scaling": best_scaling(tried), "points": points}
    run.progress.record("line_search", round=round_index, **record)
    return record


def _losses(run: Run, work: Path, round_index: int, scaling: float, write: Callable[[float, Path], None]) -> Json:
    """Validation losses of the model with one β; those that are there already are read back."""
    place = work / f"scaling_{scaling:g}"
    job = MeasureJob(run.recipe, run.tasks, run.pretrained, place, round_index, scores=False)
    if not (place / "losses.json").exists():
        task_vector = work / "task_vector.safetensors"
        remove(task_vector)  # there is never more than one
        with run.progress.timed("merge", round_index):
            write(scaling, task_vector)
        job = replace(job, state=replace(run.pretrained, task_vector=task_vector))
    found: Json = measure_model(run.executor, job, run.progress)["losses"]
    return found
