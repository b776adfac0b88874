"""What executors save and what they cost: one worker beside two, with one core each, and a cluster of four nodes.

    python benchmarks/executors.py workers [steps]     local and Ray: a round's local updates of 4 tasks, 135M model
    python benchmarks/executors.py killed [steps]      the same with a worker that is killed in the middle
    python benchmarks/executors.py cluster [tasks] [rounds]    a run of tiny models on 4 nodes, one lost in every round

Prints seconds, ratios (below 1: two workers are faster) and whether the bytes are the same; of the cluster, the seconds
of every round that its driver neither waits for tasks nor merges.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

from manyshot.demo import RECIPE_FILE
from manyshot.executor_spec import RayExecution
from manyshot.executors import Executor
from manyshot.inputs import Inputs, check_inputs
from manyshot.progress import Event, Progress
from manyshot.ray_executor import RayExecutor, import_ray, open_ray
from manyshot.recipe import Recipe
from manyshot.recipe_file import load_recipe, recipe_from_mapping
from manyshot.rundir import RunFolder
from manyshot.runner import run as run_recipe
from manyshot.steps import Run
from manyshot.steps_train import update_locally
from manyshot.tensors import file_digest
from manyshot.workers import Pin, WorkerExecutor

NODES = 4


# ---- one worker and two ----------------------------------------------------------------------------------------------


def one_round(recipe: Recipe, inputs: Inputs, folder: Path, executor: Executor) -> tuple[float, list[str]]:
    """Seconds of the local updates of round 1, and the digests of what they leave."""
    current = Run(recipe, RunFolder(folder), inputs.base, inputs.tasks, executor, Progress())
    began = time.perf_counter()
    update_locally(current, current.pretrained, 1)
    seconds = time.perf_counter() - began
    return seconds, [file_digest(file) for file in sorted(folder.rglob("*.safetensors"))]


def pins(count: int) -> list[Pin]:
    cores = sorted(os.sched_getaffinity(0))
    return [Pin((cores[i % len(cores)],)) for i in range(count)]


@contextmanager
def on_ray(folder: Path, count: int) -> Iterator[Executor]:
    """A cluster with so many cores, of which a task has one."""
    ray = import_ray(3)
    ray.init(address="local", num_cpus=count, include_dashboard=False, log_to_driver=False)
    try:
        with open_ray(RayExecution(name="ray"), folder, [], 1, Progress()) as executor:
            yield executor
    finally:
        ray.shutdown()


def compare_workers(steps: int) -> None:
    """Local and Ray, each with one worker and with two."""
    recipe = load_recipe(RECIPE_FILE, [f"protocol.local_steps={steps}", "protocol.rounds=1"])
    inputs, digests = check_inputs(recipe), []
    makers: dict[str, Callable[[Path, int], Any]] = {
        "local": lambda folder, count: WorkerExecutor(folder, pins(count), 1, 3),
        "ray": on_ray,
    }
    for name, make in makers.items():
        seconds = {}
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as place, make(Path(place), count) as executor:
                seconds[count], found = one_round(recipe, inputs, Path(place), executor)
            digests.append(found)
            print(f"{name}, {count} worker(s) of one core: {len(inputs.tasks)} tasks in {seconds[count]:.1f} s")
        print(f"{name}: ratio {seconds[2] / seconds[1]:.2f}")
    print(f"bytes the same: {all(found == digests[0] for found in digests)}")


def kill_first(executor: WorkerExecutor) -> None:
    worker = executor._workers[0]
    assert worker is not None
    worker.process.kill()


def compare_killed(steps: int) -> None:
    """Two workers, undisturbed and with one killed half-way: what the kill costs, beside what one task takes."""
    recipe = load_recipe(RECIPE_FILE, [f"protocol.local_steps={steps}", "protocol.rounds=1"])
    inputs, seconds, digests = check_inputs(recipe), {}, []
    for kill in (False, True):
        with tempfile.TemporaryDirectory() as place, WorkerExecutor(Path(place), pins(2), 1, 3) as executor:
            if kill:
                threading.Timer(seconds[False] / 4, kill_first, (executor,)).start()
            seconds[kill], found = one_round(recipe, inputs, Path(place), executor)
        digests.append(found)
    task = seconds[False] / (len(inputs.tasks) / 2)
    print(f"undisturbed {seconds[False]:.1f} s, with a worker killed {seconds[True]:.1f} s; one task {task:.1f} s")
    print(f"bytes the same: {digests[0] == digests[1]}")


# ---- a cluster -------------------------------------------------------------------------------------------------------


class _Clocked:
    """Ray, with the seconds that are spent waiting for tasks."""

    def __init__(self, ray: Any) -> None:
        self._ray, self.waited = ray, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = self._ray.wait(*args, **kwargs)
        self.waited += time.perf_counter() - began
        return found


class _ClockedExecutor(RayExecutor):
    """Notes how long its driver was at work in all maps."""

    own = 0.0

    def map(self, function: Any, jobs: Any, progress: Progress) -> Any:
        began, before = time.perf_counter(), self._ray.waited
        found = super().map(function, jobs, progress)
        self.own += time.perf_counter() - began - (self._ray.waited - before)
        return found


def tiny_recipe(folder: Path, tasks: int, rounds: int) -> Recipe:
    """Tiny models and data, made by the tests' own helpers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import write_base
    from run_helpers import small_mapping, write_data

    names = tuple(f"task{i:02d}" for i in range(tasks))
    for name in names:
        write_data(folder / "data", name)
    (folder / "base").mkdir()
    mapping = small_mapping(write_base(folder / "base"), folder / "data", names)
    mapping["protocol"] = {"rounds": rounds, "local_steps": 2 * rounds}
    return recipe_from_mapping(mapping, ["operator=mean"])


def time_cluster(tasks: int, rounds: int) -> None:
    """A whole run on four nodes of one core, one lost in every round."""
    ray = import_ray(3)
    from ray.cluster_utils import Cluster

    torch.set_num_threads(1)
    cluster, begun = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), Queue[int]()
    for _ in range(NODES):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    seen: set[int] = set()

    def listen(event: Event) -> None:
        if event.kind == "start" and event.phase == "local_update" and event.round_index not in seen:
            seen.add(event.round_index)
            begun.put(event.round_index)

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(1) as thread:
        recipe = tiny_recipe(Path(place), tasks, rounds)
        executor = _ClockedExecutor(_Clocked(ray), RayExecution(name="ray"), Path(place) / "run", 1)
        began = time.perf_counter()
        # in a thread, since Ray adds nodes in the main one alone
        running = thread.submit(run_recipe, recipe, Path(place) / "run", executor=executor, listener=listen)
        lost = 0
        while not running.done():
            try:
                begun.get(timeout=0.2)
            except Empty:
                continue
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=1)
            lost += 1
            print(f"round {max(seen)} has begun, a node is lost: {time.perf_counter() - began:.0f} s", flush=True)
        done, wall = running.result(), time.perf_counter() - began
    print(f"{tasks} tasks × {rounds} rounds on {NODES} nodes, {lost} of them lost: {wall:.0f} s")
    print(f"rounds finished: {len(done.scores['rounds'])}, tasks: {len(done.scores['tasks'])}")
    print(f"driver overhead: {executor.own / rounds:.2f} s a round (all maps, without waiting for tasks)")
    ray.shutdown()
    cluster.shutdown()


def main(what: str, *counts: str) -> None:
    numbers = [int(count) for count in counts]
    if what == "workers":
        compare_workers(*(numbers or [8]))
    elif what == "killed":
        compare_killed(*(numbers or [8]))
    else:
        time_cluster(*(numbers or [16, 5]))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["workers"]))
