"""Whole runs on the tiny model, made once and shared by the tests of a module; and what reads them independently."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conftest import TASKS, make_rows
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json, read_lines
from manyshot.runner import RunResult, run

MakeRows = Callable[[str, int, int], list[dict[str, Any]]]
Tensors = dict[str, torch.Tensor]
ROWS = {"train": 24, "validation": 6, "test": 6}


def uneven_rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Completions of one to six tokens: a mean over examples then differs from a mean over tokens."""
    rng = random.Random(f"uneven/{task}/{seed}")
    rows = make_rows(task, count, seed)
    return [row | {"completion": " ".join(rng.choices("abcdefghij", k=rng.randint(1, 6)))} for row in rows]


def write_data(folder: Path, task: str, rows: MakeRows = make_rows) -> None:
    """train, validation and test files of one task."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(ROWS.items()):
        lines = [json.dumps(row) for row in rows(task, count, seed)]
        (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def small_mapping(base: Path, data: Path, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """A recipe as plain data: a run of it takes one to two seconds."""
    return {
        "model": str(base),
        "tasks": {
            task: {split: str(data / f"{task}.{split}.jsonl") for split in ROWS} | {"metric": "choice_accuracy"}
            for task in tasks
        },
        "protocol": {"rounds": 2, "local_steps": 4},
        "preset": "paper",
        "operator": {"name": "metis"},
        "local_update": {"rank": 2, "alpha": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 32},
        "evaluation": {"experts": False, "validation_examples": 6, "test_examples": 6, "max_new_tokens": 4},
        "seed": 0,
    }


class Runs:
    """Finished runs, one folder for each set of overrides, made when first asked for."""

    def __init__(self, base: Path, folder: Path, rows: MakeRows = make_rows, tasks: tuple[str, ...] = TASKS) -> None:
        self.folder = folder
        for task in tasks:
            write_data(folder / "data", task, rows)
        self.mapping = small_mapping(base, folder / "data", tasks)
        self._done: dict[tuple[str, ...], RunResult] = {}

    def recipe(self, *overrides: str) -> Recipe:
        return recipe_from_mapping(copy.deepcopy(self.mapping), overrides)

    def new_folder(self) -> Path:
        return self.folder / f"run_{len(list(self.folder.glob('run_*')))}"

    def get(self, *overrides: str) -> RunResult:
        if overrides not in self._done:
            folder = self.new_folder()
            folder.mkdir()
            self._done[overrides] = run(self.recipe(*overrides), folder)
        return self._done[overrides]


def load_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, or of a model folder with one, read by the safetensors library itself."""
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def weights(result: RunResult, round_index: int) -> dict[str, float]:
    found: dict[str, float] = read_json(result.folder / f"round_{round_index:03d}" / "loss_gap.json")["weights"]
    return found


def round_folder(result: RunResult, round_index: int) -> Path:
    return result.folder / f"round_{round_index:03d}"


def with_adapter(start: Path, adapter: Path) -> Tensors:
    """All weights of the model folder `start` with an adapter merged into them by PEFT itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(start), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a property that peft asks transformers for by its old name
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    names = set(load_tensors(start))
    return {name: tensor.detach() for name, tensor in merged.state_dict().items() if name in names}


def combine(rows: list[Tensors], coefficients: list[float]) -> Tensors:
    return {
        name: sum((row[name].double() * c for row, c in zip(rows, coefficients, strict=True)), torch.zeros(()).double())
        for name in rows[0]
    }


def distance(left: Tensors, right: Tensors) -> float:
    """Largest absolute difference; both must have the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def phases(folder: Path, phase: str) -> list[tuple[int, str]]:
    """(round, task) of every finished phase of this name, as metrics.jsonl tells it."""
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["round"], line["task"]) for line in lines if line["kind"] == "phase" and line["phase"] == phase]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run by name, links as what they point at; times, the command line and the report that tells of
    them are left out.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = str(file.readlink()).encode()
        elif file.is_file() and name not in ("metrics.jsonl", "report.html", "report.md", "report.json"):
            found[name] = file.read_bytes()
    if "environment.json" in found:
        with contextlib.suppress(ValueError):  # a damaged one is compared as it is
            described = json.loads(found["environment.json"])
            found["environment.json"] = json.dumps(described | {"command": ""}).encode()
    return found


def unlike(left: Path, right: Path, *, manifests: bool = True) -> list[str]:
    """Names of the files in which two run folders differ; the manifests beside such files differ with them."""
    ours, theirs = contents(left), contents(right)
    found = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return [name for name in found if manifests or Path(name).name != "manifest.json"]
