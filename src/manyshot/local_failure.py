"""A local update that fails: what is said of it, and what is kept where the round goes on without its task.

failure.json then stands where local_update.json would be, and a resume reads it back as it would that one. What is no
fault of the task (a disk that is full, a damaged run folder, a recipe that cannot be meant) always ends the run.
"""

from __future__ import annotations

import gc
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyshot.disk import DISK_ERRORS
from manyshot.errors import ManyshotError, RecipeError, RunFolderError, TrainingError
from manyshot.local_update import LocalUpdateJob, finished_update, run_local_update
from manyshot.manifest import seal, unseal
from manyshot.progress import Progress
from manyshot.rundir import FAILURE, read_json, remove, write_json
from manyshot.secret_text import redacted

# errors that say nothing about the task
NOT_THE_TASK = (*DISK_ERRORS, RunFolderError, RecipeError)


@dataclass(frozen=True)
class Attempt:
    """A local update to try. With `skips`, one that fails is recorded, and the round goes on without its task."""

    job: LocalUpdateJob
    skips: bool = False

    @property
    def label(self) -> str:
        return self.job.label


def try_local_update(attempt: Attempt, progress: Progress) -> dict[str, Any]:
    """The record of the local update; of one that failed and is left out, {"failed": why}.

    Raises TrainingError naming round, task, why, and the file with the traceback.
    """
    job, file = attempt.job, attempt.job.folder / FAILURE
    if finished_update(job) is None:
        if attempt.skips and (message := skipped_before(job)) is not None:
            seal(job.folder, "local update", [file])
            return {"failed": message}
        if file.exists():
            unseal(job.folder, "local update")
            remove(file)
    try:
        return run_local_update(job, progress)
    except NOT_THE_TASK:
        raise
    except Exception as error:
        message = redacted(describe_failure(error, job))
        record = {"key": job.key, "task": job.task.name, "round": job.round_index, "message": message}
        told = redacted("".join(traceback.format_exception(error))).splitlines()
        write_json(file, record | {"skipped": attempt.skips, "traceback": told})
        if not attempt.skips:
            raise TrainingError(f"{message}; {file} has the traceback") from error
        seal(job.folder, "local update", [file])
    # the error, and with it every frame that held the model, is gone: make room for the next task
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"failed": message}


def skipped_before(job: LocalUpdateJob) -> str | None:
    """Why this job was left out before, with the same inputs; None where it was not."""
    file = job.folder / FAILURE
    if not file.exists():
        return None
    record = read_json(file)
    return str(record["message"]) if record.get("key") == job.key and record.get("skipped") else None


def describe_failure(error: Exception, job: LocalUpdateJob) -> str:
    """One line that names round and task."""
    where = f"round {job.round_index}, task '{job.task.name}'"
    if isinstance(error, ManyshotError):
        text = str(error)
        return text if where in text else f"{where}: {text}"
    reason = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        advice = "give it more memory, or a smaller local_update.micro_batch_size in a new run"
        return f"{where}: the local update ran out of memory{f' ({reason})' if reason else ''}; {advice}"
    return f"{where}: the local update failed ({type(error).__name__}{f': {reason}' if reason else ''})"


def failure_of(folder: Path) -> str:
    """What the record of a local update that was left out says."""
    return str(read_json(folder / FAILURE)["message"])
