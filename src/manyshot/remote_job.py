"""A job in another process: what it tells goes through a file, what it prints into its log, its error comes as a value.

The files are in the run folder, so it does not matter where the process is, as long as it has that folder. The caller
alone writes metrics.jsonl; it reads what its jobs tell, and passes it on as if they ran here.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from manyshot.disk import DISK_ERRORS
from manyshot.errors import ManyshotError, WorkerError
from manyshot.memory import bound_caches
from manyshot.progress import Progress, Telling, pass_on
from manyshot.rundir import PARTIAL, remove
from manyshot.secret_text import redacted

Job = TypeVar("Job")
Result = TypeVar("Result")
# what jobs tell is read here while they run; left by a run that was killed, it is removed as what is half written
TOLD = f".told{PARTIAL}"
LOGS = "logs"


@dataclass(frozen=True)
class Place:
    """Where one job tells and prints, and the threads that it computes with."""

    told: Path
    log: Path
    threads: int


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What came of a job: its result, or the error that ended it."""

    result: Result | None = None
    error: Exception | None = None


def label_of(job: object, position: int) -> str:
    """What a job is called in messages and in the name of its log."""
    return str(getattr(job, "label", f"job {position + 1}"))


def places_of(folder: Path, jobs: Sequence[object], threads: int) -> list[Place]:
    """The files of jobs that go on at once, of the run or comparison in `folder`."""
    names = [re.sub(r"[^\w.-]+", "_", label_of(job, i)).strip("_") for i, job in enumerate(jobs)]
    logs = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    return [Place(folder / TOLD / f"{i}.jsonl", folder / LOGS / f"{log}.log", threads) for i, log in enumerate(logs)]


# ---- where the job runs ----------------------------------------------------------------------------------------------


def run_job(function: Callable[[Job, Progress], Result], job: Job, label: str, place: Place) -> Outcome[Result]:
    """Call function(job, progress), with as many threads as its place says. The log stays where it fails.

    Errors that a user can act on come back as they are, all others as a WorkerError that names job and log.
    """
    place.told.parent.mkdir(parents=True, exist_ok=True)
    place.log.parent.mkdir(parents=True, exist_ok=True)
    with printed_to(place.log), open(place.told, "a", encoding="utf-8") as told:
        try:
            bound_caches()
            _use_threads(place.threads)
            outcome = Outcome(function(job, Telling(told)))
        except (ManyshotError, *DISK_ERRORS) as error:
            traceback.print_exc()
            error.__cause__ = None  # it is in the log, and may be of a kind that cannot be sent
            return Outcome(error=error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this job and no other
            traceback.print_exc()
            text = redacted(f"{label}: {type(error).__name__}: {error}".strip().rstrip(":."))
            return Outcome(error=WorkerError(f"{text}; {place.log} has the traceback"))
    remove(place.log)  # what a job printed that came to its end is of no use to anyone
    return outcome


def _use_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # where torch comes later
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def printed_to(log: Path) -> Iterator[None]:
    """All that this process, its libraries and its children print goes to the end of a file."""
    with open(log, "ab", buffering=0) as stream:
        kept = [os.dup(number) for number in (1, 2)]
        _flush()
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        try:
            yield
        finally:
            _flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


# ---- where the jobs come from ----------------------------------------------------------------------------------------


class Relay:
    """Reads what the jobs of a map tell, and passes it on."""

    def __init__(self, folder: Path, places: Sequence[Place], progress: Progress) -> None:
        remove(folder / TOLD)
        self.folder, self.progress = folder, progress
        self._files = {position: place.told for position, place in enumerate(places)}
        self._read = dict.fromkeys(self._files, 0)

    def poll(self) -> None:
        """Pass on what is new. A line that is not all there yet waits."""
        for position, file in self._files.items():
            self._read[position] = pass_on(file, self._read[position], self.progress, job=position)

    def close(self) -> None:
        """All jobs have ended: nothing is left but the logs of those that failed."""
        self.poll()
        remove(self.folder / TOLD)
        logs = self.folder / LOGS
        if logs.is_dir() and not any(logs.iterdir()):
            logs.rmdir()


def results_of(outcomes: dict[int, Outcome[Result]], progress: Progress) -> list[Result]:
    """The results in the order of the jobs; raises the first error when all have ended, and tells of the others."""
    errors = [error for _, outcome in sorted(outcomes.items()) if (error := outcome.error) is not None]
    for error in errors[1:]:
        progress.message(f"also failed: {error}")
    if errors:
        raise errors[0]
    results: list[Any] = [outcome.result for _, outcome in sorted(outcomes.items())]
    return results
