"""Executors run the independent jobs of a round. Jobs and results are paths and small values, never tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from manyshot.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs `function(job, progress)` for every job and returns the results in the order of the jobs."""

    def map(
        self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress
    ) -> list[Result]: ...


class LocalExecutor:
    """One job after the other, in this process: the default, and what other executors are tested against."""

    def map(self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress) -> list[Result]:
        return [function(job, progress) for job in jobs]
