"""Several tasks at once on one machine: the same bytes, pinned workers, and what becomes of those that fail or die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor_jobs import Named, die, die_once, fail_on_one, look, meet
from manyshot import executor_choice
from manyshot.errors import RecipeError, WorkerError
from manyshot.executor_choice import check_memory, make_pins, open_cells, open_executor, threads_of
from manyshot.executors import LocalExecutor
from manyshot.inputs import check_inputs
from manyshot.progress import Event, Progress
from manyshot.remote_job import LOGS, TOLD
from manyshot.run_identity import may_change
from manyshot.rundir import read_lines
from manyshot.runner import run
from manyshot.workers import Pin, WorkerExecutor
from run_helpers import Runs, unlike

CORES = sorted(os.sched_getaffinity(0))
PAIR = ("letters", "numbers")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("workers"), tasks=PAIR)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerExecutor]:
    """Two workers, the second with one core."""
    with WorkerExecutor(tmp_path_factory.mktemp("pool"), [Pin(), Pin((CORES[0],), 3)], 1, max_retries=1) as executor:
        yield executor


def named(folder: Path, count: int = 3) -> list[Named]:
    return [Named(number, folder) for number in range(count)]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_two_workers_give_the_bytes_of_one_and_tell_all_that_happens(runs: Runs) -> None:
    overrides = ("protocol.local_steps=2", "evaluation.test_examples=3")
    alone, folder, heard = runs.get(*overrides), runs.new_folder(), list[Event]()
    run(runs.recipe(*overrides, "executor.workers=2", "executor.threads=1"), folder, listener=heard.append)
    assert unlike(alone.folder, folder, manifests=False) == ["recipe.yaml"]
    assert not (folder / TOLD).exists() and not (folder / LOGS).exists()
    for name in ("local_update", "validation", "score", "merge"):
        told = [
            [one for one in read_lines(place / "metrics.jsonl") if one.get("phase") == name]
            for place in (alone.folder, folder)
        ]
        assert sorted((one["round"], one["task"]) for one in told[0] if one["kind"] == "phase") == sorted(
            (one["round"], one["task"]) for one in told[1] if one["kind"] == "phase"
        )
    assert {event.task for event in heard if event.kind == "advance" and event.phase == "local_update"} == set(PAIR)
    assert "2 tasks at once, each with 1 thread" in [event.text for event in heard]


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_worker_executor_keeps_the_order_and_pins_its_workers(pool: WorkerExecutor, tmp_path: Path) -> None:
    heard: list[Event] = []
    progress = Progress(heard.append, tmp_path / "metrics.jsonl")
    found = pool.map(look, named(tmp_path, 6), progress)
    assert [one.number for one in found] == list(range(6))
    assert len({one.pid for one in found}) == 2 and os.getpid() not in {one.pid for one in found}
    assert {one.threads for one in found} == {"1"}
    assert {one.cores for one in found if one.gpus == "3"} == {(CORES[0],)}
    assert {one.cores for one in found if one.gpus != "3"} == {tuple(CORES)}
    assert {event.text for event in heard if event.kind == "message"} == {f"job {i}" for i in range(6)}
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert sorted(line["job"] for line in lines if line["kind"] == "phase" and line["tokens"] == 7) == list(range(6))


def test_worker_executor_runs_two_jobs_at_once(pool: WorkerExecutor, tmp_path: Path) -> None:
    assert len({one.pid for one in pool.map(meet, named(tmp_path, 2), Progress())}) == 2


def test_worker_executor_ends_all_jobs_before_it_reports_those_that_failed(
    pool: WorkerExecutor, tmp_path: Path
) -> None:
    heard: list[Event] = []
    with pytest.raises(
        WorkerError, match=r"round 1, task 't1': trying: KeyError: 'gone'; .*\.log has the traceback"
    ) as seen:
        pool.map(fail_on_one, named(tmp_path, 5), Progress(heard.append))
    assert sorted(file.name for file in tmp_path.glob("finished*")) == ["finished0", "finished3", "finished4"]
    assert [event.text for event in heard] == ["also failed: task 't2': row 3 is bad"]
    log = Path(str(seen.value).split("; ")[1].removesuffix(" has the traceback"))
    assert log == pool.folder / LOGS / "round_1_task_t1_trying.log"
    assert "a word of job 1" in log.read_text() and "KeyError: 'gone'" in log.read_text()
    # what ended well left no log
    assert len(list(log.parent.iterdir())) == 2


def test_worker_executor_does_only_the_job_again_whose_worker_was_killed(pool: WorkerExecutor, tmp_path: Path) -> None:
    heard: list[Event] = []
    assert pool.map(die_once, named(tmp_path, 4), Progress(heard.append)) == [0, 1, 2, 3]
    tries = sorted(file.name for file in tmp_path.glob("try*"))
    assert tries == ["try0-0", "try1-0", "try1-1", "try2-0", "try3-0"]
    assert [event.text for event in heard] == [
        "round 1, task 't1': trying: its worker process was killed (signal 9); it is done again (1 of 1)"
    ]


def test_worker_executor_gives_up_on_a_job_that_is_always_killed(pool: WorkerExecutor, tmp_path: Path) -> None:
    with pytest.raises(
        WorkerError, match=r"'t1': trying: .*signal 9\), 2 times; .*too little memory.* has what it printed"
    ):
        pool.map(die, named(tmp_path), Progress())
    assert pool.map(look, named(tmp_path, 1), Progress())[0].number == 0  # the pool goes on


def test_worker_executor_keeps_a_log_for_each_of_two_jobs_of_one_name(pool: WorkerExecutor, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"trying_1\.log has the traceback"):
        pool.map(fail_on_one, [Named(3, tmp_path), Named(1, tmp_path), Named(1, tmp_path)], Progress())
    logs = {file.name: file.read_text() for file in (pool.folder / LOGS).glob("*trying_*.log")}
    assert {name: text.count("KeyError: 'gone'") for name, text in logs.items()} == {
        f"round_1_task_t1_trying_{i}.log": 1 for i in (1, 2)
    }


# a file, so that its worker can import it
PARENT = """
import os, time
from pathlib import Path
def sleep(job, progress):
    Path("partial").write_text(str(os.getpid()))
    Path("partial").rename("worker")
    time.sleep(60)
if __name__ == "__main__":
    from manyshot.progress import Progress
    from manyshot.workers import Pin, WorkerExecutor
    with WorkerExecutor(Path(), [Pin()], 1, 0) as executor:
        executor.map(sleep, [0], Progress())
"""


def test_worker_executor_leaves_no_worker_when_its_own_process_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, "parent.py"], stdout=subprocess.PIPE, cwd=tmp_path) as parent:
        while not (tmp_path / "worker").exists():
            assert parent.poll() is None
            time.sleep(0.02)
        parent.kill()
        assert parent.stdout is not None
        parent.stdout.read()  # ends when the worker, which has it too, has ended
    mark = Path(f"/proc/{(tmp_path / 'worker').read_text()}/stat")
    assert not mark.exists() or mark.read_text().rpartition(")")[2].split()[0] == "Z"  # ended, if not yet taken note of


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_workers_share_the_cores_and_the_threads_that_there_are(runs: Runs) -> None:
    recipe = runs.recipe("executor.workers=3", "executor.threads=1", "local_update.device=cpu")
    assert [pin.cores for pin in make_pins(recipe, recipe.executor)] == [(CORES[i % len(CORES)],) for i in range(3)]
    assert threads_of(runs.recipe("executor.workers=4")) == 1
    with pytest.raises(RecipeError, match=rf"executor\.threads: 1000 for each task, and .* may use {len(CORES)} cores"):
        recipe = runs.recipe("executor.threads=1000")
        make_pins(recipe, recipe.executor)


def test_workers_take_turns_at_gpus_and_refuse_those_that_are_not_there(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_choice.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    recipe = runs.recipe("executor.workers=3")
    assert [pin.visible for pin in make_pins(recipe, recipe.executor)] == ["4", "6", "4"]
    recipe = runs.recipe("executor.workers=2", "executor.devices=[1]")
    assert [pin.visible for pin in make_pins(recipe, recipe.executor)] == ["6", "6"]
    for wrong, match in (
        (("executor.devices=[2]",), r"executor\.devices: 2, and this machine has GPUs 0 to 1"),
        (("executor.devices=[0]", "local_update.device=cpu"), r"executor\.devices: tasks compute on .*device: cpu"),
    ):
        recipe = runs.recipe("executor.workers=2", *wrong)
        with pytest.raises(RecipeError, match=match):
            make_pins(recipe, recipe.executor)


def test_cells_of_a_comparison_share_threads_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_choice.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(executor_choice.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(executor_choice, "default_threads", lambda: 6)
    with open_cells(tmp_path, 3, "auto", []) as executor:
        assert isinstance(executor, WorkerExecutor) and executor.threads == 2
        assert [pin.device for pin in executor.pins] == [0, 1, 0]
    monkeypatch.setattr(executor_choice, "default_threads", lambda: 16)
    with open_cells(tmp_path, 2, "cuda:1", []) as executor:
        assert isinstance(executor, WorkerExecutor) and executor.threads == 4  # no more than this process was given
        assert isinstance(executor, WorkerExecutor) and [pin.device for pin in executor.pins] == [None, None]
    with open_cells(tmp_path, 1, "auto", []) as executor:
        assert isinstance(executor, LocalExecutor)


def test_workers_that_memory_does_not_hold_are_refused_with_both_numbers(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.recipe("executor.workers=3")
    inputs, pins = check_inputs(recipe), [Pin()] * 3
    monkeypatch.setattr(executor_choice, "available", lambda: 1_100_000_000)
    with pytest.raises(
        WorkerError, match=r"3 workers of about 0\.5 GB need 1\.5 GB of memory, .* has 1\.1 GB free; use "
    ):
        check_memory(recipe, inputs, pins)
    match = r"--workers: 3 workers of about .* free; use --workers=2, or a smaller"
    with pytest.raises(WorkerError, match=match), open_cells(tmp_path, 3, "cpu", [(recipe, inputs)]):
        pass
    monkeypatch.setattr(executor_choice, "available", lambda: None)
    check_memory(recipe, inputs, pins)


def test_ray_tasks_without_gpus_that_compute_on_one_are_refused(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe("executor=ray", "local_update.device=cuda")
    inputs = check_inputs(runs.recipe())
    with (
        pytest.raises(RecipeError, match=r"executor\.num_gpus: 0 hides GPUs from tasks, and .*device is cuda; use 1"),
        open_executor(recipe, tmp_path, inputs, Progress()),
    ):
        pass


def test_executor_is_a_name_or_a_section_and_may_be_another_when_a_run_goes_on(runs: Runs) -> None:
    assert runs.recipe("executor=ray").executor.name == "ray"
    assert runs.recipe("executor=ray", "executor.num_cpus=2").executor.num_cpus == 2
    assert runs.recipe("executor.workers=2").executor.name == "local"
    for override, match in (
        ("executor=slurm", r"executor: unknown executor 'slurm'; there are: local, ray"),
        ("executor.worker=2", r"executor\.worker: unknown key; did you mean 'workers'\?"),
        ("executor.workers=0", r"executor\.workers: Input should be greater than or equal to 1, found 0"),
    ):
        with pytest.raises(RecipeError, match=match):
            runs.recipe(override)
    assert may_change("executor.workers: 1 -> 2") and may_change("executor: None -> {}")
