"""`manyshot run --verify-determinism`: the first round twice, from nothing, and what of the second is not as the first.

Steps are compared in the order in which they happen, file by file and tensor by tensor; the first that differs is where
two runs part, and the others follow from it.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from manyshot.disk import disk_errors
from manyshot.executors import LocalExecutor
from manyshot.inputs import check_inputs, check_space
from manyshot.progress import Listener, Progress
from manyshot.recipe import Recipe
from manyshot.rounds import run_round
from manyshot.run_identity import unlike_leaves
from manyshot.rundir import MEASURED, ROLLBACK, RunFolder, read_json
from manyshot.seeding import preserved_random_state
from manyshot.steps import Json, Run, measure
from manyshot.tensors import Checkpoint

# differences shown of one file
SHOWN = 3


@dataclass(frozen=True)
class Difference:
    """A file of a step that is not the same twice; `task` is empty for steps of all tasks."""

    step: str
    task: str
    file: str
    details: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        where = f"{self.step}, task '{self.task}'" if self.task else self.step
        return f"{where}: {self.file}: {'; '.join(self.details)}"


@dataclass(frozen=True)
class DeterminismReport:
    """What was compared, and all that differs, in the order of steps."""

    num_files: int
    differences: tuple[Difference, ...]

    def to_json(self) -> Json:
        return {"same": not self.differences, "files": self.num_files} | {
            "differences": [asdict(one) for one in self.differences]
        }

    def lines(self) -> list[str]:
        """The report for people: the step where the two part first, then what follows from it."""
        if not self.differences:
            return [f"the first round is the same twice: {self.num_files} files, to the bit"]
        first = self.differences[0]
        own = [one for one in self.differences if (one.step, one.task) == (first.step, first.task)]
        rest = [one for one in self.differences if one not in own]
        lines = ["the first round is not the same twice; the first step that differs:"]
        lines += [f"  {one.describe()}" for one in own]
        if rest:
            lines += ["after it, or beside it:", *(f"  {one.describe()}" for one in rest)]
        advice = (
            "on a GPU try local_update.attn_implementation=eager, CUBLAS_WORKSPACE_CONFIG=:4096:8 and dtype float32"
        )
        return [*lines, f"{advice}; on a CPU, one thread (OMP_NUM_THREADS=1)"]


def verify_determinism(recipe: Recipe, output: Path, listener: Listener | None = None) -> DeterminismReport:
    """Run the first round of a recipe twice, in a folder beside `output` that is removed afterwards, and compare.

    Raises what a run raises, for inputs that cannot be used and for a round that fails.
    """
    with disk_errors(output.parent, resumable=False), preserved_random_state():
        inputs = check_inputs(recipe)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}-twice-") as scratch:
            places = [Path(scratch) / name for name in ("first", "second")]
            check_space(recipe, RunFolder(places[0]), inputs)
            for place in places:
                folder, progress = RunFolder(place), Progress(listener)
                progress.message(f"the first round, for the {place.name} time")
                run = Run(recipe, folder, inputs.base, inputs.tasks, LocalExecutor(), progress)
                start = measure(run, run.pretrained, folder.round(0), round_index=0)
                summary: Json = {"tasks": list(run.names), "rounds": {}, "pretrained": start}
                run_round(run, 1, run.pretrained, summary)
            return compare_rounds(places[0], places[1], tuple(recipe.tasks))


def compare_rounds(first: Path, second: Path, tasks: tuple[str, ...]) -> DeterminismReport:
    """The files of two first rounds, by step."""
    num_files, found = 0, []
    for step, task, names in _steps(first, second, tasks):
        for name in names:
            num_files += 1
            if details := compare_files(first / name, second / name):
                found.append(Difference(step, task, name, tuple(details[:SHOWN]) + _more(details)))
    return DeterminismReport(num_files, tuple(found))


def _more(details: list[str]) -> tuple[str, ...]:
    return (f"and {len(details) - SHOWN} more",) if len(details) > SHOWN else ()


def _steps(first: Path, second: Path, tasks: tuple[str, ...]) -> Iterator[tuple[str, str, list[str]]]:
    """(step, task, files) in the order in which a round goes on."""

    def files(*patterns: str) -> list[str]:
        found = {
            file.relative_to(place).as_posix()
            for place in (first, second)
            for pattern in patterns
            for file in place.glob(pattern)
            if file.is_file() and file.name not in ("manifest.json", "README.md")
        }
        # what a training begins with comes before what it leads to: weights, then the record that names their digests
        return sorted(found, key=lambda name: (name.endswith(".json"), name))

    yield "measure the pretrained model", "", files(*(f"round_000/{name}" for name in MEASURED))
    for task in tasks:
        yield "local update", task, files(f"round_001/{task}/**/*")
    yield "weigh", "", files("round_001/loss_gap.json")
    merged = ("task_vector.safetensors", "outer_state.safetensors", "merge.json", ROLLBACK)
    yield "merge", "", files(*(f"round_001/{name}" for name in merged))
    yield "write the merged model", "", files("round_001/merged/**/*")
    yield "measure the merged model", "", files(*(f"round_001/{name}" for name in (*MEASURED, "guards.json")))
    yield "carry adapters on", "", files("round_001/carried_adapter/**/*")


# ---- two files -------------------------------------------------------------------------------------------------------


def compare_files(first: Path, second: Path) -> list[str]:
    """What differs between two files, tensor by tensor or value by value; nothing where their bytes are the same."""
    for here, there in ((first, "first"), (second, "second")):
        if not here.is_file():
            return [f"was not written the {there} time"]
    if filecmp.cmp(first, second, shallow=False):
        return []
    if first.suffix == ".safetensors":
        found = compare_tensors(Checkpoint(first), Checkpoint(second))
    elif first.suffix == ".json":
        values = unlike_leaves(read_json(first), read_json(second))
        found = [f"{key}: {_short(one)}, then {_short(two)}" for key, one, two in values]
    else:
        found = []
    return found or ["other bytes"]


def compare_tensors(first: Checkpoint, second: Checkpoint) -> list[str]:
    """One line for each tensor whose bits are not the same: how many entries, and by how much."""
    found = []
    for name in sorted({*first.names, *second.names}):
        if not (name in first and name in second) or first.info(name) != second.info(name):
            found.append(f"tensor '{name}' is another, or in one of the two only")
            continue
        one, two = first.read(name).reshape(-1), second.read(name).reshape(-1)
        unlike = one.view(torch.uint8).reshape(len(one), -1) != two.view(torch.uint8).reshape(len(two), -1)
        if count := int(unlike.any(1).sum()) if len(one) else 0:
            largest = float((one.double() - two.double()).abs().max())
            found.append(f"tensor '{name}': {count} of {len(one)} entries differ, by up to {largest:.3g}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
