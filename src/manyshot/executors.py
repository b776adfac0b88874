"""Executors run the independent jobs of a round. Jobs and results are paths and small values, never tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from manyshot.progress import Progress

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
