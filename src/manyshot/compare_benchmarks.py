"""Benchmarks of a comparison, asked of its models through the harness: checked at the start, each asked once.

Every benchmark is a file of its own, named after all that its score depends on beside the model, in whose folder it
lies: what is there is not asked again, and a changed setting is a new file. Benchmarks are opened and asked one by
one, so that no score depends on which others there are (padding does, and the choices that some tasks shuffle).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.benchmark_spec import Benchmark, Harness
from manyshot.errors import DataError, ModelError
from manyshot.harness import (
    HarnessSettings,
    OpenTasks,
    TaskRequest,
    check_tokenizer,
    describe,
    harness_version,
    mean_metrics,
    open_tasks,
    require_harness,
    run_tasks,
)
from manyshot.harness_data import DataTask, make_data_task
from manyshot.hub import hub_answers, without_hub
from manyshot.models import ModelState, choose_placement, load_model, load_tokenizer, quiet_transformers
from manyshot.progress import Progress
from manyshot.recipe import LocalUpdate
from manyshot.rundir import content_key, read_json, write_json
from manyshot.tensors import file_digest

Json = dict[str, Any]
FOLDER = "benchmarks"
# metrics of the harness for rows with choices; a recipe calls the first `choice_accuracy`
BY_CHOICE = ("acc", "acc_norm")


@dataclass(frozen=True)
class BenchmarkJob:
    """Ask one model some benchmarks, by name. Writes a file for each into `benchmarks/` of `folder`."""

    update: LocalUpdate  # says on which device, and in which type
    state: ModelState
    folder: Path
    benchmarks: Mapping[str, Benchmark]
    harness: Harness

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}: benchmarks"


def run_benchmarks(job: BenchmarkJob, progress: Progress) -> None:
    """Ask what was not asked before, with one load of the model; read_benchmarks() has the answers."""
    files = {benchmark_file(job.folder, name, one, job.harness): name for name, one in job.benchmarks.items()}
    left = {file: name for file, name in files.items() if not file.exists()}
    if not left:
        return
    with _hub_asked_once(job.benchmarks), quiet_transformers():
        placement = choose_placement(job.update)
        with progress.timed("load"):
            tokenizer = load_tokenizer(job.state.pretrained, trust_remote_code=job.state.trust_remote_code)
            model = load_model(job.state, placement)
        for file, name in left.items():
            with progress.timed("benchmark", task=name):
                write_json(file, _ask(model, tokenizer, name, job.benchmarks[name], job.harness))


def read_benchmarks(folder: Path, benchmarks: Mapping[str, Benchmark], harness: Harness) -> Json:
    """{name: {"score": SCORE, "examples": the score of every example, …}} of a model that was asked."""
    return {name: read_json(benchmark_file(folder, name, one, harness)) for name, one in benchmarks.items()}


def benchmark_file(folder: Path, name: str, benchmark: Benchmark, harness: Harness) -> Path:
    """Where a benchmark's result is kept. Benchmarks that ask the same share it, whatever they are divided by."""
    asked = file_digest(Path(benchmark.data)) if benchmark.data else benchmark.harness or name
    settings = harness.model_dump(mode="json")
    key = content_key(harness_version(), asked, benchmark.metric, benchmark.few_shot, settings)
    known = name if benchmark.data or not benchmark.harness else benchmark.harness
    safe = "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in known)
    return folder / FOLDER / f"{safe}-{key[:16]}.json"


def _ask(model: Any, tokenizer: Any, name: str, benchmark: Benchmark, harness: Harness) -> Json:
    """One benchmark's score, the score of every example, and everything that these depend on."""
    settings = settings_of(benchmark, harness)
    opened, task, metric = _open(name, benchmark, settings)
    try:
        record = run_tasks(model, tokenizer, opened, settings, {task: metric})["tasks"][task]
    except Exception as error:  # tasks, and what they are scored by, raise anything; one of them must not end the study
        raise ModelError(f"benchmarks.{name}: cannot be asked: {type(error).__name__}: {error}") from error
    values = record.pop("examples")
    if not values:
        raise DataError(f"benchmarks.{name}: no example has the metric '{metric}'")
    score = {
        "metric": metric.removesuffix(",none"),
        "score": record["metrics"][metric]["value"],
        "stderr": record["metrics"][metric]["stderr"],
        "num_examples": len(values),
    }
    whole = [int(value) if value.is_integer() else value for value in values]  # a digit each, of thousands
    return {
        "task": task,
        "score": score,
        "examples": whole,
        "record": record,
        "settings": describe(tokenizer, settings),
    }


def settings_of(benchmark: Benchmark, harness: Harness) -> HarnessSettings:
    """As `manyshot eval` would be told by its flags."""
    return HarnessSettings(
        chat_template=harness.chat_template,
        few_shot=benchmark.few_shot,
        limit=harness.limit,
        batch_size=harness.batch_size,
        generation={"max_gen_toks": harness.max_new_tokens} if harness.max_new_tokens else {},
    )


@contextlib.contextmanager
def _hub_asked_once(benchmarks: Mapping[str, Benchmark]) -> Iterator[None]:
    """Where the Hub does not answer, say so once: every task would wait for it anew."""
    named = any(one.data is None for one in benchmarks.values())
    with without_hub() if named and not hub_answers() else contextlib.nullcontext():
        yield


# ---- before the first step -------------------------------------------------------------------------------------------


def check_benchmarks(benchmarks: Mapping[str, Benchmark], harness: Harness, models: Mapping[str, ModelState]) -> None:
    """Load every benchmark's data and resources, and the models' tokenizers; look for the metrics.

    Raises MissingExtraError without the harness, DataError or ModelError with a line for everything that is wrong.
    """
    require_harness()
    problems = []
    with _hub_asked_once(benchmarks):
        for name, one in benchmarks.items():
            try:
                _open(name, one, settings_of(one, harness))
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    for name, state in models.items():
        with quiet_transformers():
            tokenizer = load_tokenizer(state.pretrained, trust_remote_code=state.trust_remote_code)
        try:
            check_tokenizer(tokenizer, settings_of(next(iter(benchmarks.values())), harness))
        except ModelError as error:
            raise ModelError(
                f"models.{name}: {str(error).replace('--chat-template', 'harness.chat_template')}"
            ) from None


def _open(name: str, benchmark: Benchmark, settings: HarnessSettings) -> tuple[OpenTasks, str, str]:
    """The task with its data, its name in the harness, its metric as name,filter. Raises DataError naming the key."""
    where = f"benchmarks.{name}"
    try:
        data = _data_task(name, benchmark) if benchmark.data else None
        request = TaskRequest(data.name if data else benchmark.harness or name, data=data)
        opened = open_tasks([request], settings)
    except DataError as error:
        text = str(error).removeprefix("--tasks: ").removeprefix("--few-shot: ")
        raise DataError(f"{where}: {text}") from None
    if opened.missing:
        raise DataError("\n".join(f"{where}: {one.what}: {one.reason}" for one in opened.missing))
    if list(opened.tasks) != [request.name]:
        members = ", ".join(list(opened.tasks)[:5])
        raise DataError(f"{where}: '{request.name}' is a group of the harness; ask its tasks one by one: {members}, …")
    metric = _metric(benchmark, data)
    known = mean_metrics(opened.tasks[request.name])
    if metric not in known:
        raise DataError(
            f"{where}.metric: '{request.name}' has no '{metric}' that is a mean over examples and better when higher; "
            f"there are: {', '.join(known) or 'none'}"
        )
    return opened, request.name, metric


def _data_task(name: str, benchmark: Benchmark) -> DataTask:
    assert benchmark.data is not None
    ours = None if benchmark.metric in BY_CHOICE else benchmark.metric
    return make_data_task(Path(benchmark.data), name, ours)


def _metric(benchmark: Benchmark, data: DataTask | None) -> str:
    """The metric with its filter; of a data file, the harness' name for it."""
    metric = benchmark.metric
    if data is not None and metric not in BY_CHOICE:
        metric = BY_CHOICE[0] if data.by_choice else data.metric
    assert metric is not None  # a task of the harness has one
    return metric if "," in metric else f"{metric},none"
