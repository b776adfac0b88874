"""Executors: the same results in the same order, one after the other or several at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyshot.errors import DataError, WorkerError
from manyshot.executors import LocalExecutor, ProcessExecutor
from manyshot.progress import Event, Progress

THREADS = "MANYSHOT_TEST_THREADS"


def note_threads(threads: int) -> None:
    os.environ[THREADS] = str(threads)


def square(job: int, progress: Progress) -> tuple[int, int, str]:
    """The first job takes longest, so that it ends last."""
    time.sleep(0.2 if job == 0 else 0)
    with progress.timed("work", job):
        progress.message(f"job {job}")
    return job * job, os.getpid(), os.environ.get(THREADS, "")


def refuse(job: int, progress: Progress) -> int:
    if job == 1:
        raise DataError(f"job {job} is bad")
    return job


def end_abruptly(job: int, progress: Progress) -> None:
    os._exit(7)


def fail_or_sleep(folder: Path, progress: Progress) -> None:
    """One job sleeps; the other fails as soon as it does."""
    try:
        (folder / "failing").mkdir()
    except FileExistsError:
        (folder / "partial").write_text(str(os.getpid()))
        (folder / "partial").rename(folder / "sleeping")
        time.sleep(60)
    while not (folder / "sleeping").exists():
        time.sleep(0.01)
    raise DataError("a mistake")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessExecutor]:
    with ProcessExecutor(2, note_threads) as executor:
        yield executor


def test_process_executor_returns_what_the_local_one_does_in_order_of_jobs(pool: ProcessExecutor) -> None:
    jobs = [0, 1, 2, 3]
    found, expected = (executor.map(square, jobs, Progress()) for executor in (pool, LocalExecutor()))
    assert [one[0] for one in found] == [one[0] for one in expected] == [0, 1, 4, 9]
    assert os.getpid() not in {one[1] for one in found}
    share = max(1, (os.cpu_count() or 1) // 2)
    assert {one[2] for one in found} == {str(share)}


def test_process_executor_passes_messages_on_as_jobs_end(pool: ProcessExecutor) -> None:
    heard: list[Event] = []
    pool.map(square, [0, 1, 2], Progress(heard.append))
    assert sorted(event.text for event in heard) == ["job 0", "job 1", "job 2"]
    assert all(event.kind == "message" for event in heard)


def test_process_executor_raises_what_a_job_raised(pool: ProcessExecutor) -> None:
    with pytest.raises(DataError, match="job 1 is bad"):
        pool.map(refuse, [0, 1, 2], Progress())
    assert pool.map(refuse, [0, 2], Progress()) == [0, 2]


def test_process_executor_says_what_a_worker_that_died_may_mean() -> None:
    with ProcessExecutor(1, note_threads) as executor:
        for _ in range(2):  # the pool stays broken
            with pytest.raises(WorkerError, match="too little memory"):
                executor.map(end_abruptly, [0], Progress())


def test_process_executor_leaves_no_process_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a mistake"), ProcessExecutor(2, note_threads) as executor:
        executor.map(fail_or_sleep, [tmp_path, tmp_path], Progress())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "sleeping").read_text()), 0)


# a file, so that its worker can import it; the worker's number is its first line, told before it sleeps
PARENT = """
import os, time
def begin(threads): pass
def sleep(job, progress):
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    from manyshot.executors import ProcessExecutor
    from manyshot.progress import Progress
    with ProcessExecutor(1, begin) as executor:
        executor.map(sleep, [0], Progress())
"""


def test_process_executor_leaves_no_worker_when_its_own_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.stdout.read()  # ends when the worker, which has it too, has ended
    mark = Path(f"/proc/{worker}/stat")
    assert not mark.exists() or mark.read_text().rpartition(")")[2].split()[0] == "Z"  # ended, if not yet taken note of
