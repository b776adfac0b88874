"""One model measured on several tasks at once: a job for each task, then the same files as one job for all leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from manyshot.evaluate import MeasureJob, is_measured, run_measure, seal_measurement
from manyshot.executors import Executor
from manyshot.progress import Progress
from manyshot.rundir import PARTIAL, read_json, remove, write_json

# while the tasks are measured; left by a run that was killed, it is removed as what is half written
PARTS = f"parts{PARTIAL}"


def measure_model(executor: Executor, job: MeasureJob, progress: Progress) -> dict[str, Any]:
    """What run_measure() returns, by jobs of one task each where the executor splits measurements."""
    if is_measured(job):
        return run_measure(job, progress)
    if not executor.splits or len(job.tasks) == 1:
        return executor.map(run_measure, [job], progress)[0]
    folder = job.folder / PARTS
    remove(folder)
    parts = [replace(job, tasks=(task,), folder=folder / task.name) for task in job.tasks]
    executor.map(run_measure, parts, progress)
    _join(job, parts)
    remove(folder)
    return run_measure(job, progress)


def _join(job: MeasureJob, parts: list[MeasureJob]) -> None:
    """Write the files of the whole measurement, the one that says that it is done last."""
    files = ("losses.json", "outputs.json", "examples.json", "scores.json")
    for name in sorted(files, key=lambda name: name == job.record.name):
        found: dict[str, Any] = {}
        for part in parts:
            if (part.folder / name).exists():
                found |= read_json(part.folder / name)
        if found:
            write_json(job.folder / name, found)
    seal_measurement(job)
