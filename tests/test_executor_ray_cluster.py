"""A Ray cluster of four nodes on this machine that loses one in every round, and no task with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from executor_jobs import Named, rest
from manyshot.executor_spec import RayExecution
from manyshot.progress import Progress
from manyshot.ray_executor import import_ray, open_ray

ray: Any = pytest.importorskip("ray", reason="ray is not installed (pip install 'manyshot[ray]')")
# a minute of processes that are started and killed on two idle cores; threads and sockets of ray's own are closed late
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
NODES, TASKS, ROUNDS = 4, 16, 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, where the driver is, and four nodes with two each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        import_ray(3)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(NODES):
            made.add_node(num_cpus=2)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


def kill_one(cluster: Any, folder: Path) -> None:
    """When the first tasks are running, lose the node that is oldest, and get a new one."""
    while len(list(folder.glob("try*"))) < NODES:
        time.sleep(0.1)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    cluster.add_node(num_cpus=2)


def test_no_task_is_lost_with_a_node_in_every_round(cluster: Any, tmp_path: Path) -> None:
    tries = 0
    with open_ray(RayExecution(name="ray"), tmp_path / "run", [], 1, Progress()) as executor:
        assert executor.at_once == 2 * NODES
        for r in range(ROUNDS):
            folder = tmp_path / f"round{r}"
            folder.mkdir()
            # in a thread, since Ray adds nodes in the main one alone
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(executor.map, rest, [Named(i, folder) for i in range(TASKS)], Progress())
                kill_one(cluster, folder)
                assert found.result() == list(range(TASKS))
            tries += len(list(folder.glob("try*")))
    assert tries > TASKS * ROUNDS  # the nodes that were lost had tasks
