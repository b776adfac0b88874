"""What the crash harness does to `manyshot run`, and the recipes that other commands begin with."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from conftest import TASKS, write_base
from crash_check import Case, scores_left, steps_left
from crash_life import Life, import_what_lives_import, live
from run_helpers import small_mapping, write_data

PAIR = TASKS[:2]
# every kind of artefact that a run writes: experts, a post-hoc merge, adapters and optimizers that go on, an outer
# optimizer's state, steps shared out by weights; all weights trained, a line search
RECIPES: dict[str, dict[str, Any]] = {
    "adapters": {
        "protocol": {"rounds": 2, "local_steps": 4, "allocation": "gap"},
        "merge": {"reference": "start", "outer_optimizer": "nesterov", "outer_momentum": 0.5},
        "local_update": {"adapter_start": "own", "optimizer_state": "kept"},
        "evaluation": {"experts": True, "post_hoc": True},
    },
    "all weights": {
        "protocol": {"rounds": 2, "local_steps": 4},
        "operator": {"name": "task_arithmetic", "scaling": "auto"},
        "local_update": {"method": "full", "optimizer_state": "kept"},
    },
}


def small_recipe(work: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of two tasks as plain data, with a base model and data of its own in `work`."""
    base = work / "base"
    if not base.exists():
        write_base(base)
        for task in TASKS:
            write_data(work / "data", task)
    mapping = small_mapping(base, work / "data", PAIR)
    mapping["evaluation"] |= {"validation_examples": 2, "test_examples": 2}
    for key, value in settings.items():
        mapping[key] = mapping.get(key, {}) | value if isinstance(value, Mapping) and key != "operator" else value
    return mapping


def write_recipe(file: Path, mapping: Mapping[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(dict(mapping), sort_keys=False), "utf-8")
    return file


def begin_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def unbroken_life(work: Path, folder: Path, command: Callable[[Path], list[str]]) -> tuple[Path, Life]:
    """The command when nothing stops it: what it leaves, which is put aside, and its life.

    It is made where others are killed, as folders write down what they are called and how they were made.
    """
    log, aside = work / "unbroken", work / f"{folder.name}, unbroken"
    life = live(command(folder), folder, log)
    if life.status != 0:
        raise SystemExit(f"{folder.name}: the unbroken life failed: {life.errors}")
    folder.rename(aside)
    import_what_lives_import(log)
    return aside, life


def cases(work: Path) -> list[Callable[[], Case]]:
    """What makes the case of every recipe; its unbroken run takes a while."""
    return [partial(case, work, name, settings) for name, settings in RECIPES.items()]


def case(work: Path, name: str, settings: Mapping[str, Any]) -> Case:
    recipe, folder = write_recipe(work / f"{name}.yaml", small_recipe(work, settings)), work / name

    def command(folder: Path) -> list[str]:
        return ["run", str(recipe), "--output", str(folder), "--resume", "--quiet"]

    unbroken, life = unbroken_life(work, folder, command)

    def left(folder: Path) -> Counter[str]:
        return Counter(steps=steps_left(unbroken, folder), scores=scores_left(unbroken, folder))

    return Case(name, folder, unbroken, life, begin_empty, command, left)
