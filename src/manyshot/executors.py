"""Executors run the independent jobs of a round. Jobs and results are paths and small values, never tensors."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import Protocol, Self, TypeVar

from manyshot.errors import WorkerError
from manyshot.memory import bound_caches
from manyshot.progress import Event, Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs `function(job, progress)` for every job and returns the results in the order of the jobs.

    `splits`: it runs jobs elsewhere, so that one measurement of several tasks is made a job of each; `at_once`: how
    many jobs it runs at a time; `far`: on machines of their own, which a large merge is worth sending to.
    """

    @property
    def splits(self) -> bool: ...

    @property
    def at_once(self) -> int: ...

    @property
    def far(self) -> bool: ...

    def map(
        self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress
    ) -> list[Result]: ...


class LocalExecutor:
    """One job after the other, in this process: the default, and what other executors are tested against."""

    splits, at_once, far = False, 1, False

    def map(self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress) -> list[Result]:
        return [function(job, progress) for job in jobs]


def map_unfinished(
    executor: Executor,
    function: Callable[[Job, Progress], Result],
    jobs: Sequence[Job],
    progress: Progress,
    is_finished: Callable[[Job], bool],
) -> list[Result]:
    """The same as executor.map(); jobs whose results only have to be read are sent nowhere for that."""
    finished = [is_finished(job) for job in jobs]
    pending = [job for job, done in zip(jobs, finished, strict=True) if not done]
    found = iter(executor.map(function, pending, progress) if pending else [])
    return [function(job, progress) if done else next(found) for job, done in zip(jobs, finished, strict=True)]


class ProcessExecutor:
    """Several jobs at once on this machine, each in a process of its own.

    A worker begins by calling `start` with its share of the processors. Workers tell the caller's progress their
    messages, when their job is done; what else they tell is not heard.
    """

    splits, far = False, False

    def __init__(self, workers: int, start: Callable[[int], None]) -> None:
        self.at_once = workers
        threads = max(1, (os.cpu_count() or 1) // workers)
        # a fresh interpreter for each: forked ones hang in the thread pools that torch has started
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(start, threads))

    def map(self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress) -> list[Result]:
        results: dict[int, Result] = {}
        try:
            futures = {self._pool.submit(_run_job, function, job): i for i, job in enumerate(jobs)}
            for future in as_completed(futures):
                results[futures[future]], messages = future.result()
                for text in messages:
                    progress.message(text)
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process ended in the middle of a job: most often there is too little memory for so many, so "
                "use fewer workers; or a script that starts them has no `if __name__ == '__main__':` around it. What "
                "was finished stays, and a resume goes on from there"
            ) from error
        return [results[i] for i in range(len(jobs))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # after an error nobody wants what still runs, and Python would wait for it before it ends
        for process in list((self._pool._processes or {}).values()) if kind is not None else []:
            process.terminate()
        self._pool.shutdown(cancel_futures=True)


def _begin(start: Callable[[int], None], threads: int) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    bound_caches()
    start(threads)


def end_with_parent() -> None:
    """A killed parent's lock is free for others, so its workers may not go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_job(function: Callable[[Job, Progress], Result], job: Job) -> tuple[Result, list[str]]:
    messages: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "message":
            messages.append(event.text)

    return function(job, Progress(listen)), messages
