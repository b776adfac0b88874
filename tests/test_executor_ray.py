"""Jobs as Ray tasks: the same results in the same order, and what becomes of clusters and nodes that do not fit.

One cluster for all tests, of the jobs in executor_jobs.py, which need no torch; what needs it is marked slow.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executor_jobs import Named, die, die_once, fail_on_one, meet
from manyshot.errors import MissingExtraError, WorkerError
from manyshot.executor_spec import RayExecution
from manyshot.progress import Event, Progress
from manyshot.ray_executor import Answer, RayExecutor, import_ray, open_ray, refuse_too_large, refuse_unshared
from manyshot.remote_job import LOGS, TOLD
from manyshot.rundir import read_lines
from manyshot.runner import run
from run_helpers import Runs, unlike

ray: Any = pytest.importorskip("ray", reason="ray is not installed (pip install 'manyshot[ray]')")
# threads and sockets of ray's own that are closed late
pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = RayExecution(name="ray", max_retries=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two cores, begun as a run begins one; its nodes find the jobs of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        import_ray(1)
        started = {"address": "local", "num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}
        try:
            ray.init(**started)
        except Exception:  # noqa: BLE001 - its node has half a minute to come up, which a busy machine exceeds once
            ray.shutdown()
            ray.init(**started)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def executor(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    folder = tmp_path_factory.mktemp("ray")
    with open_ray(SPEC, folder / "run", [folder], 1, Progress()) as opened:
        yield opened


def named(folder: Path, count: int = 3) -> list[Named]:
    return [Named(number, folder) for number in range(count)]


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_ray_executor_keeps_the_order_of_jobs_that_run_at_once_and_hides_gpus(
    executor: RayExecutor, tmp_path: Path
) -> None:
    heard: list[Event] = []
    found = executor.map(meet, named(tmp_path, 2), Progress(heard.append, tmp_path / "metrics.jsonl"))
    assert [one.number for one in found] == [0, 1]
    assert len({one.pid for one in found}) == 2
    assert {(one.threads, one.gpus) for one in found} == {("1", "")}
    assert {event.text for event in heard if event.kind == "message"} == {"job 0", "job 1"}
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert sorted(line["job"] for line in lines if line["kind"] == "phase" and line["tokens"] == 7) == [0, 1]
    assert not (executor.folder / TOLD).exists() and not (executor.folder / LOGS).exists()


def test_ray_executor_ends_all_jobs_before_it_reports_those_that_failed(executor: RayExecutor, tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(WorkerError, match=r"round 1, task 't1': trying: KeyError: 'gone'; .*\.log has the traceback"):
        executor.map(fail_on_one, named(tmp_path), Progress(heard.append))
    assert [file.name for file in tmp_path.glob("finished*")] == ["finished0"]
    assert [event.text for event in heard] == ["also failed: task 't2': row 3 is bad"]
    assert "a word of job 1" in (executor.folder / LOGS / "round_1_task_t1_trying.log").read_text()


def test_ray_executor_does_only_the_job_again_whose_worker_was_killed(executor: RayExecutor, tmp_path: Path) -> None:
    assert executor.map(die_once, named(tmp_path, 2), Progress()) == [0, 1]
    assert sorted(file.name for file in tmp_path.glob("try*")) == ["try0-0", "try1-0", "try1-1"]


def test_ray_executor_gives_up_on_a_job_that_is_always_killed(executor: RayExecutor, tmp_path: Path) -> None:
    message = r"'t1': trying: was lost, and done again 1 times at most: .* has what it printed"
    with pytest.raises(WorkerError, match=message):
        executor.map(die, [Named(1, tmp_path)], Progress())


# ---- clusters and nodes that do not fit ------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed; run: pip install 'manyshot\[ray\]'"):
        import_ray(1)


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("127.0.0.1:{free}", r"nobody answers at 127\.0\.0\.1:\d+ \(Connection refused\)"),
        ("ray://h:1", "is not host:port"),
    ],
)
def test_ray_address_that_cannot_be_used_is_refused_at_once(address: str, match: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    spec = RayExecution(name="ray", address=address.format(free=free))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(WorkerError, match=rf"executor\.address: .*{match}"),
    ):
        patch.setattr(ray, "is_initialized", lambda: False)
        with open_ray(spec, tmp_path, [], 1, Progress()):
            pass


def test_ray_task_that_no_node_holds_is_refused_naming_what_there_is(cluster: None, tmp_path: Path) -> None:
    spec = RayExecution(name="ray", num_gpus=1, resources={"fast": 2})
    match = r"asks for 1 CPU, 1 GPU, 2 fast, which no node has; there are: 1 × 2 CPU, .* GB memory"
    with pytest.raises(WorkerError, match=match), open_ray(spec, tmp_path, [], 1, Progress()):
        pass
    # what the nodes have together is not what one has
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]
    with pytest.raises(WorkerError, match=r"there are: 2 × 2 CPU; 1 × 1 CPU, 1 GPU$"):
        refuse_too_large(RayExecution(name="ray", num_cpus=2, num_gpus=1), nodes)
    refuse_too_large(RayExecution(name="ray", num_cpus=1, num_gpus=1), nodes)


def test_ray_nodes_that_do_not_share_the_run_folder_are_named(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("manyshot.ray_executor.FILE_PATIENCE", 0.5)
    own = Path("/proc/self/cwd/run")  # another folder in every process
    match = rf"1 of 1 nodes cannot take part: {socket.gethostname()} .*: does not see {own} as it is here"
    with pytest.raises(WorkerError, match=match), open_ray(SPEC, own, [], 1, Progress()):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_ray_nodes_that_lack_the_model_are_named(cluster: None, tmp_path: Path) -> None:
    with (
        pytest.raises(WorkerError, match=rf"has no {tmp_path}/model\. The run folder, the base model and manyshot"),
        open_ray(SPEC, tmp_path, [tmp_path / "model"], 1, Progress()),
    ):
        pass
    with pytest.raises(WorkerError, match=r"1 of 2 nodes cannot take part: b: no answer in 120 s"):
        refuse_unshared([Answer("a", sees=True), Answer("b", error="no answer in 120 s")], tmp_path)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # every Ray task loads torch: half a minute on two idle cores
def test_ray_gives_the_bytes_of_a_run_without_it(cluster: None, base_folder: Path, tmp_path: Path) -> None:
    runs = Runs(base_folder, tmp_path, tasks=("letters", "numbers"))
    overrides = ("protocol.rounds=1", "protocol.local_steps=2", "evaluation.test_examples=3")
    alone, folder, heard = runs.get(*overrides), runs.new_folder(), list[Event]()
    run(runs.recipe(*overrides, "executor=ray"), folder, listener=heard.append)
    assert unlike(alone.folder, folder, manifests=False) == ["recipe.yaml"]
    assert any(event.text.startswith("Ray cluster of 1 node: 2 CPU") for event in heard)
    assert {event.task for event in heard if event.phase == "local_update"} == {"letters", "numbers"}
