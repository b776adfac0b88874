"""What the crash harness does to `manyshot extend`: rounds, or a task with them, added to a run that has finished."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conftest import TASKS
from crash_check import Case, scores_left, steps_left
from crash_run import RECIPES, small_recipe, unbroken_life, write_recipe

SHORT = {"rounds": 1, "local_steps": 2}
# a merge that is made again, to leave the outer optimizer's state; adapters and optimizers that go on
AHEAD = {"outer_look_ahead": "between_rounds"}
ADAPTERS = RECIPES["adapters"] | {"protocol": SHORT, "merge": RECIPES["adapters"]["merge"] | AHEAD}
EXPERTS = {"protocol": SHORT, "evaluation": {"experts": True}}
# files that say what the run is now, and so are written anew when it becomes another
OF_THE_RUN = ("recipe.yaml", "extended.json", "environment.json", "splits.json", "scores.json")
OF_THE_LAST_MERGE = ("round_001/merge.json", "round_001/task_vector.safetensors", "round_001/DONE.json")


def cases(work: Path) -> list[Callable[[], Case]]:
    """Two more rounds; one more with a task that all models so far are measured on, and that gets an expert."""
    task, data = TASKS[2], work / "data"
    splits = [f"tasks.{task}.{split}={data / f'{task}.{split}.jsonl'}" for split in ("train", "validation", "test")]
    return [
        partial(case, work, "more rounds", ADAPTERS, ["--rounds", "2"]),
        partial(case, work, "another task", EXPERTS, ["--steps", "3", *splits, f"tasks.{task}.metric=choice_accuracy"]),
    ]


def case(work: Path, name: str, settings: Mapping[str, Any], added: Sequence[str]) -> Case:
    recipe, folder = write_recipe(work / f"{name}.yaml", small_recipe(work, settings)), work / name
    finished, _ = unbroken_life(work, folder, lambda folder: ["run", str(recipe), "--output", str(folder), "--quiet"])
    finished = finished.rename(work / f"{name}, before")

    def begin(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder, symlinks=True)

    def command(folder: Path) -> list[str]:
        """The same command again, until the run's recipe is the longer one; then that is a run to go on with."""
        now = folder / "recipe.yaml"
        if now.read_bytes() == (finished / "recipe.yaml").read_bytes():
            return ["extend", str(folder), *added, "--quiet"]
        return ["run", str(now), "--output", str(folder), "--resume", "--quiet"]

    begin(folder)
    unbroken, life = unbroken_life(work, folder, command)

    def left(folder: Path) -> Counter[str]:
        return Counter(steps=steps_left(unbroken, folder), scores=scores_left(unbroken, folder))

    return Case(name, folder, unbroken, life, begin, command, left, OF_THE_RUN + OF_THE_LAST_MERGE)
