"""Jobs that need nothing but Python, for executors that run them in other processes: loading torch there takes long."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from manyshot.errors import DataError
from manyshot.progress import Progress


@dataclass(frozen=True)
class Named:
    """A job that is called something."""

    number: int
    folder: Path

    @property
    def label(self) -> str:
        return f"round 1, task 't{self.number}': trying"


class Seen(NamedTuple):
    """What a job saw where it ran."""

    number: int
    pid: int
    cores: tuple[int, ...]
    threads: str
    gpus: str | None


def look(job: Named, progress: Progress) -> Seen:
    """The first job takes longest, so that it ends last."""
    with progress.timed("work", 1, f"t{job.number}", total=2, tokens=7) as timed:
        timed.tick(1, 0.5)
        progress.message(f"job {job.number}")
        time.sleep(0.4 if job.number == 0 else 0.1)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Seen(job.number, os.getpid(), cores, os.environ.get("OMP_NUM_THREADS", ""), gpus)


def meet(job: Named, progress: Progress) -> Seen:
    """Looks when another job has begun as well: two have to run at once."""
    (job.folder / f"here{job.number}").touch()
    deadline = time.monotonic() + 60
    while len(list(job.folder.glob("here*"))) < 2:
        if time.monotonic() > deadline:
            raise DataError("nobody else came")
        time.sleep(0.02)
    return look(job, progress)


def fail_on_one(job: Named, progress: Progress) -> int:
    """Job 1 prints and fails in a way that is no user's fault, job 2 in one that is."""
    sys.stderr.write(f"a word of job {job.number}\n")
    if job.number == 1:
        raise KeyError("gone")
    if job.number == 2:
        raise DataError("task 't2': row 3 is bad")
    time.sleep(0.3)
    (job.folder / f"finished{job.number}").touch()
    return job.number


def die_once(job: Named, progress: Progress) -> int:
    """Job 1 is killed the first time; every job notes each of its tries."""
    tries = len(list(job.folder.glob(f"try{job.number}-*")))
    (job.folder / f"try{job.number}-{tries}").touch()
    if job.number == 1 and tries == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number


def die(job: Named, progress: Progress) -> int:
    """Job 1 is always killed."""
    sys.stdout.write("last words\n")
    sys.stdout.flush()
    if job.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number


def rest(job: Named, progress: Progress) -> int:
    """A job that takes a second, and notes each of its tries."""
    (job.folder / f"try{job.number}-{os.getpid()}").touch()
    time.sleep(1)
    return job.number
