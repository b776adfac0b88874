"""The only importer of ray: every job is a Ray task, on a cluster whose nodes share the run folder.

Tasks return small values; weights go through files, which outlive the run's process and every node. A task whose
process or node is lost is done again by Ray; one that raises has failed, and is not. Nothing is uploaded: packages and
files are found on every node as they are here, which is looked at before anything starts.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from manyshot.engine import default_threads
from manyshot.errors import MissingExtraError, WorkerError
from manyshot.executor_spec import RayExecution
from manyshot.progress import Progress
from manyshot.remote_code import CONSENT
from manyshot.remote_job import Outcome, Place, Relay, label_of, places_of, results_of, run_job
from manyshot.rundir import PARTIAL, remove

Job = TypeVar("Job")
Result = TypeVar("Result")
# between two looks at what the tasks tell, in seconds
EVERY = 0.2
# seconds until a node must have answered, an address at once, and a file be seen by those that share its folder
NODE_PATIENCE, ADDRESS_PATIENCE, FILE_PATIENCE = 120.0, 5.0, 10.0


@contextmanager
def open_ray(
    spec: RayExecution, folder: Path, paths: Sequence[Path], threads: int, progress: Progress
) -> Iterator[RayExecutor]:
    """An executor on the recipe's cluster, begun and ended here where it names none.

    Raises MissingExtraError without ray, WorkerError for a cluster that cannot be reached, that no task fits, or whose
    nodes do not share the run folder or lack one of the `paths` that tasks read.
    """
    ray = import_ray(spec.max_retries)
    with _connected(ray, spec):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        refuse_too_large(spec, [node["Resources"] for node in nodes])
        answers = ask_nodes(ray, nodes, folder, paths)
        refuse_unshared(answers, folder)
        progress.message(
            f"Ray cluster of {len(nodes)} node{'s' if len(nodes) > 1 else ''}: {describe(ray.cluster_resources())}; "
            f"each task with {describe(needs(spec))}"
        )
        yield RayExecutor(ray, spec, folder, threads)


def import_ray(max_retries: int) -> Any:
    """The package, told before it is loaded what it is not to do by itself."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # `uv run` would upload the working directory, runs and all
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_task_oom_retries"] = str(max_retries)  # noqa: SIM112 - Ray's own name; for ever, otherwise
    try:
        import ray
    except ImportError:
        raise MissingExtraError("executor: ray is not installed; run: pip install 'manyshot[ray]'") from None
    return ray


@contextmanager
def _connected(ray: Any, spec: RayExecution) -> Iterator[None]:
    """Connected to the recipe's cluster, or to one begun for this run; a connection that is there already stays."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if spec.address is None:
        started = {"address": "local", "num_cpus": default_threads(), "include_dashboard": False} | quiet
    else:
        _refuse_silent(spec.address)
        started = {"address": spec.address} | quiet
    try:
        ray.init(**started)
    except Exception as error:  # noqa: BLE001 - some of Ray's own errors here are of no narrower type
        where = f"address {spec.address}: no cluster that can be used there" if spec.address else "cannot be started"
        raise WorkerError(f"executor.{where} ({' '.join(str(error).split())})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Say at once what Ray says after minutes: nobody answers. Raises WorkerError."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if "://" in address or not colon or not port.isdecimal():
        raise WorkerError(
            f"executor.address: '{address}' is not host:port, nor auto; run on a node of the cluster, which `ray "
            "status` knows, and give the address that `ray start --head` printed"
        )
    try:
        socket.create_connection((host, int(port)), ADDRESS_PATIENCE).close()
    except OSError as error:
        raise WorkerError(
            f"executor.address: nobody answers at {address} ({error.strerror or error}); `ray start --head` starts a "
            "cluster, and without an address one is started for the run"
        ) from None


# ---- what the cluster has --------------------------------------------------------------------------------------------


def needs(spec: RayExecution) -> dict[str, float]:
    """What one task asks for, by Ray's names."""
    asked = {"CPU": spec.num_cpus, "GPU": spec.num_gpus, "memory": spec.memory or 0} | spec.resources
    return {name: amount for name, amount in asked.items() if amount}


def refuse_too_large(spec: RayExecution, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise WorkerError where no node holds a task, naming what there is: Ray would wait for one for ever."""
    asked = needs(spec)
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        return
    there = Counter(describe(node) for node in nodes)
    shown = "; ".join(f"{count} × {node}" for node, count in there.items())
    raise WorkerError(f"executor: a task asks for {describe(asked)}, which no node has; there are: {shown}")


def at_once(asked: Mapping[str, float], there: Mapping[str, float]) -> int:
    """How many tasks the cluster holds at a time."""
    return max(1, min((int(there.get(name, 0) // amount) for name, amount in asked.items()), default=1))


def describe(resources: Mapping[str, float]) -> str:
    """`2 CPU, 1 GPU, 8.0 GB memory`; without what Ray keeps for itself."""
    parts = []
    for name, amount in sorted(resources.items()):
        if name == "memory":
            parts.append(f"{amount / 1e9:.1f} GB memory")
        elif not name.startswith(("node:", "object_store_memory")):
            parts.append(f"{amount:g} {name}")
    return ", ".join(parts) or "nothing"


# ---- whether its nodes have what tasks need --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a node says of the run folder and of the files that tasks read; `error` where it cannot say anything."""

    node: str
    sees: bool = False
    missing: tuple[str, ...] = ()
    error: str = ""


def ask_nodes(ray: Any, nodes: Sequence[Mapping[str, Any]], folder: Path, paths: Sequence[Path]) -> list[Answer]:
    """Let every node read a file in the run folder, and write one that is seen here."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = folder / f".shared{PARTIAL}"
    remove(probe)
    probe.mkdir(parents=True)
    try:
        (probe / "question").write_text(token := os.urandom(8).hex())
        look = ray.remote(num_cpus=0, max_retries=0)(look_around)
        refs = {}
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = look.options(scheduling_strategy=strategy)
            refs[ask.remote(str(probe), token, node["NodeID"], [str(path) for path in paths])] = node
        ray.wait(list(refs), num_returns=len(refs), timeout=NODE_PATIENCE)
        return [_answer(ray, ref, node, probe) for ref, node in refs.items()]
    finally:
        remove(probe)


def look_around(probe: str, token: str, node: str, paths: list[str]) -> tuple[bool, list[str]]:
    """On a node: whether it reads what was written for it, and the paths that are not there."""
    question = Path(probe, "question")
    deadline = time.monotonic() + FILE_PATIENCE
    while not question.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    sees = question.is_file() and question.read_text() == token
    if sees:
        Path(probe, node).touch()
    return sees, [path for path in paths if not Path(path).exists()]


def _answer(ray: Any, ref: Any, node: Mapping[str, Any], probe: Path) -> Answer:
    name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    try:
        sees, missing = ray.get(ref, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        return Answer(name, error=f"no answer in {NODE_PATIENCE:.0f} s")
    except ray.exceptions.RayError as error:
        return Answer(name, error=str(error).strip().splitlines()[-1])
    deadline = time.monotonic() + FILE_PATIENCE
    while sees and not (probe / node["NodeID"]).exists():
        if time.monotonic() > deadline:
            sees = False
        time.sleep(0.1)
    return Answer(name, sees, tuple(missing))


def refuse_unshared(answers: Sequence[Answer], folder: Path) -> None:
    """Raise WorkerError naming every node that does not share the run folder, or lacks a path."""
    found = []
    for answer in answers:
        if answer.error:
            found.append(f"{answer.node}: {answer.error}")
        elif not answer.sees:
            found.append(f"{answer.node}: does not see {folder} as it is here")
        elif answer.missing:
            found.append(f"{answer.node}: has no {', '.join(answer.missing)}")
    if found:
        raise WorkerError(
            f"executor: {len(found)} of {len(answers)} nodes cannot take part: {'; '.join(found)}. The run folder, the "
            "base model and manyshot have to be at the same place on every node; choose an --output on storage that "
            "they share"
        )


# ---- jobs ------------------------------------------------------------------------------------------------------------


class RayExecutor:
    """As many jobs at once as the cluster holds, each a Ray task in a process of its own that ends with it."""

    splits, far = True, True

    def __init__(self, ray: Any, spec: RayExecution, folder: Path, threads: int) -> None:
        self._ray, self.spec, self.folder, self.threads = ray, spec, folder, threads
        self.at_once = at_once(needs(spec), ray.cluster_resources())
        self._task = ray.remote(max_calls=1)(run_task)
        self._options = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "resources": dict(spec.resources),
            "max_retries": spec.max_retries,
            "retry_exceptions": False,
            "scheduling_strategy": "SPREAD",
        } | ({"memory": spec.memory} if spec.memory else {})

    def map(self, function: Callable[[Job, Progress], Result], jobs: Sequence[Job], progress: Progress) -> list[Result]:
        places = places_of(self.folder, jobs, self.threads)
        relay, outcomes = Relay(self.folder, places, progress), dict[int, Outcome[Result]]()
        hidden, consent = self.spec.num_gpus == 0, os.environ.get(CONSENT)
        pending = {}
        for i, job in enumerate(jobs):
            label = label_of(job, i)
            task = self._task.options(name=label, **self._options)
            pending[task.remote(function, job, label, places[i], hidden, consent)] = i
        try:
            while pending:
                # whichever is ready: the order of the jobs would keep results waiting that may be lost with a node
                ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=EVERY)
                for ref in ready:
                    i = pending.pop(ref)
                    outcomes[i] = self._outcome(ref, label_of(jobs[i], i), places[i])
                relay.poll()
        finally:
            for ref in pending:  # after an error here nobody wants them
                self._ray.cancel(ref, force=True)
            relay.close()
        return results_of(outcomes, progress)

    def _outcome(self, ref: Any, label: str, place: Place) -> Outcome[Any]:
        try:
            outcome: Outcome[Any] = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
            more = f"; {place.log} has what it printed" if place.log.exists() else ""
            return Outcome(
                error=WorkerError(
                    f"{label}: was lost, and done again {self.spec.max_retries} times at most: {text}{more}. What was "
                    "finished stays, and a resume goes on from there"
                )
            )
        return outcome


def run_task(
    function: Callable[[Job, Progress], Result], job: Job, label: str, place: Place, hidden: bool, consent: str | None
) -> Outcome[Result]:
    """On a node: the job, without GPUs where it asked for none, with the consent that was given where it comes from."""
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if consent is not None:
        os.environ[CONSENT] = consent
    return run_job(function, job, label, place)
