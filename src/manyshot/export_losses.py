"""What an adapter costs: validation losses of Θʳ and of the base with the adapter, measured as the run measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from manyshot.errors import DataError, RunFolderError
from manyshot.evaluate import MeasureJob, run_measure
from manyshot.export_source import ExportSource
from manyshot.inputs import check_tasks, without_overlong
from manyshot.models import ModelState, choose_placement, load_tokenizer, quiet_transformers
from manyshot.progress import Progress
from manyshot.rundir import read_json
from manyshot.tasks import Task

Json = dict[str, Any]


def load_tasks(source: ExportSource) -> tuple[Task, ...]:
    """The run's tasks. Raises DataError where their data are gone, RunFolderError where they are not what they were."""
    try:
        tasks = check_tasks(source.recipe)
    except DataError as error:
        raise DataError(f"{error}\n--no-measure exports without losses") from None
    with quiet_transformers():
        tokenizer = load_tokenizer(source.base, trust_remote_code=source.recipe.trust_remote_code)
    tasks = without_overlong(source.recipe, tasks, tokenizer)
    expected = read_json(source.folder.environment)["identity"]["tasks"]
    for task in tasks:
        if task.digest() != expected.get(task.name):
            raise RunFolderError(
                f"{source.folder.path}: the data of task '{task.name}' changed since the run began, so losses "
                "could not be compared; put them back as they were, or export with --no-measure"
            )
    return tasks


def measure_losses(source: ExportSource, tasks: tuple[Task, ...], adapter: Path) -> Json:
    """Validation losses by task: of the pretrained model and of Θʳ as the run recorded them, and with the adapter.

    Where this machine computes in another way than the run did, all three are measured here.
    """
    base = ModelState(source.base, trust_remote_code=source.recipe.trust_remote_code)
    here = choose_placement(source.recipe.local_update).text
    recorded = here == read_json(source.folder.environment).get("placement")
    found = {
        "pretrained": _losses(source, tasks, base, source.folder.round(0) if recorded else None),
        "merged": _losses(
            source, tasks, replace(base, task_vector=source.task_vector), source.round if recorded else None
        ),
        "adapter": _losses(source, tasks, replace(base, adapter=adapter), None),
    }
    merged, after = found["merged"], found["adapter"]
    return {
        "tasks": {task.name: {model: losses[task.name] for model, losses in found.items()} for task in tasks},
        "multi_task": {model: fmean(losses.values()) for model, losses in found.items()},
        "cost": {task.name: after[task.name] - merged[task.name] for task in tasks},
        "recorded_by_run": recorded,
        "placement": here,
    }


def _losses(source: ExportSource, tasks: tuple[Task, ...], state: ModelState, folder: Path | None) -> dict[str, float]:
    """Each task's validation loss; those that the run left in `folder` are read, and nothing is written there."""
    if folder is not None and (folder / "losses.json").is_file():
        found: Mapping[str, Any] = read_json(folder / "losses.json")
    else:
        with TemporaryDirectory() as scratch:
            job = MeasureJob(source.recipe, tasks, state, Path(scratch), source.round_index, scores=False)
            found = run_measure(job, Progress(None))["losses"]
    return {task.name: found[task.name]["loss"] for task in tasks}
