"""Several jobs at once on this machine: worker processes, each with cores and a GPU of its own.

A worker lives as long as its executor, so that torch is loaded once. One that is killed is replaced, and its job alone
is done again. Which worker gets which job changes no result; the number of threads may, so all jobs have the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from manyshot.errors import WorkerError
from manyshot.progress import Progress
from manyshot.remote_job import TOLD, Outcome, Relay, label_of, places_of, results_of, run_job
from manyshot.rundir import remove

Job = TypeVar("Job")
Result = TypeVar("Result")
# between two looks at what the workers tell, in seconds
EVERY = 0.2


@dataclass(frozen=True)
class Pin:
    """What one worker may use: cores and a GPU, by their numbers here; None where it may use all."""

    cores: tuple[int, ...] | None = None
    device: int | None = None

    @property
    def visible(self) -> str | None:
        """What CUDA_VISIBLE_DEVICES says to the worker."""
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.device is None:
            return None
        return known.split(",")[self.device] if known else str(self.device)


class _Worker:
    """One process, and the number of the job that it has."""

    def __init__(self, pin: Pin, threads: int) -> None:
        # a fresh interpreter: a forked one hangs in the thread pools that torch has started
        context = multiprocessing.get_context("spawn")
        self.pin, self.job = pin, -1
        self.connection, other = context.Pipe()
        with _environment({"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": pin.visible}):
            self.process = context.Process(target=_serve, args=(other, pin.cores))
            self.process.start()
        other.close()  # so that its end is seen here

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


class WorkerExecutor:
    """`len(pins)` jobs at once, each in a process of its own. Job and result are pickled, so they hold no tensors."""

    splits, far = True, False

    def __init__(self, folder: Path, pins: Sequence[Pin], threads: int, max_retries: int) -> None:
        self.folder, self.pins, self.threads, self.max_retries = folder, tuple(pins), threads, max_retries
        self.at_once = len(self.pins)
        self._workers: list[_Worker | None] = [None] * len(self.pins)

    def map(self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress) -> list[Result]:
        places = places_of(self.folder, jobs, self.threads)
        relay, waiting, tries = Relay(self.folder, places, progress), deque(range(len(jobs))), [0] * len(jobs)
        outcomes: dict[int, Outcome[Result]] = {}
        for slot in range(min(len(jobs), len(self._workers))):
            self._ready(slot)  # all begin now: what is sent to one waits until it reads

        def lost(i: int, worker: _Worker) -> None:
            """The process has ended in the middle of its job."""
            worker.end()
            tries[i] += 1
            text = f"{label_of(jobs[i], i)}: its worker process {_how(worker.process.exitcode)}"
            if tries[i] > self.max_retries:
                outcomes[i] = Outcome(error=WorkerError(f"{text}, {tries[i]} times; {_advice(places[i].log)}"))
            else:
                progress.message(f"{text}; it is done again ({tries[i]} of {self.max_retries})")
                waiting.appendleft(i)

        while len(outcomes) < len(jobs):
            for slot in range(len(self._workers)):
                if waiting and (worker := self._ready(slot)) is not None:
                    worker.job = waiting.popleft()
                    job = jobs[worker.job]
                    try:
                        worker.connection.send((function, job, label_of(job, worker.job), places[worker.job]))
                    except BrokenPipeError:  # it ended before it began, which is seen below
                        continue
            busy: dict[Any, _Worker] = {w.connection: w for w in self._workers if w is not None and w.job >= 0}
            for connection in wait(list(busy), EVERY):
                worker = busy[connection]
                i, worker.job = worker.job, -1
                try:
                    outcomes[i] = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    self._workers[self._workers.index(worker)] = None
                    lost(i, worker)
            relay.poll()
        relay.close()
        return results_of(outcomes, progress)

    def _ready(self, slot: int) -> _Worker | None:
        """The slot's worker where it has nothing to do, begun when first needed."""
        worker = self._workers[slot] or _Worker(self.pins[slot], self.threads)
        self._workers[slot] = worker
        return worker if worker.job < 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in filter(None, self._workers):
            worker.end()  # one that has a job still has it because of an error here, after which nobody wants it
        remove(self.folder / TOLD)


def _serve(connection: Connection, cores: Sequence[int] | None) -> None:
    """The worker: one job after the other, until nobody has any more for it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the caller ends its workers itself
    if cores is not None:
        os.sched_setaffinity(0, cores)  # before torch counts them
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 - a job that cannot be read, as of a module that is not there
            connection.send(Outcome(error=WorkerError(f"a worker cannot read its job ({error})")))
            continue
        connection.send(run_job(*asked))


def _end_with_parent() -> None:
    """A killed parent's lock is free for others, so its workers may not go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """The environment that a process begins with; None leaves a variable as it is."""
    before = {name: os.environ.get(name) for name, value in values.items() if value is not None}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed (signal {-code})"
    return f"ended (exit code {code})"


def _advice(log: Path) -> str:
    more = f"; {log} has what it printed" if log.exists() else ""
    return (
        "most often there is too little memory for so many, so use fewer workers; or a script that starts them has no "
        f"`if __name__ == '__main__':` around it{more}. What was finished stays, and a resume goes on from there"
    )
