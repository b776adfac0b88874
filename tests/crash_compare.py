"""What the crash harness does to `manyshot compare`: a grid with candidates to choose among, and joint fine-tuning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conftest import TASKS
from crash_check import Case, merges_left, scores_left, steps_left
from crash_run import begin_empty, small_recipe, unbroken_life, write_recipe
from manyshot import compare_outputs
from manyshot.errors import MissingExtraError
from run_helpers import ROWS

METHODS: dict[str, Any] = {
    "sum": {"operator": "task_arithmetic", "grid": {"scaling": [0.2, 0.4]}, "protocols": ["many_shot"]},
    "metis": {"operator": {"name": "metis", "temperature": 0.5}},
    "joint": {"joint": True},
}


def cases(work: Path) -> list[Callable[[], Case]]:
    """What makes the one case."""
    compare_outputs.write_figures = no_figures
    return [partial(case, work)]


def case(work: Path) -> Case:
    """Four cells at one place, five runs, which share the experts and the first round; and a task outside the mix."""
    mapping = small_recipe(work, {})
    kept = {key: mapping[key] for key in ("tasks", "preset", "protocol", "local_update", "evaluation")}
    kept["evaluation"].pop("experts")
    outside = {split: str(work / "data" / f"{TASKS[2]}.{split}.jsonl") for split in ROWS}
    kept |= {"models": {"tiny": mapping["model"]}, "seeds": [0], "methods": METHODS}
    kept |= {"retention": {TASKS[2]: outside | {"metric": "choice_accuracy"}}}
    recipe, folder = write_recipe(work / "grid.yaml", kept), work / "grid"

    def command(folder: Path) -> list[str]:
        return ["compare", str(recipe), "--output", str(folder), "--resume", "--quiet"]

    unbroken, life = unbroken_life(work, folder, command)

    def left(folder: Path) -> Counter[str]:
        merges = merges_left(unbroken, folder)
        return Counter(steps=steps_left(unbroken, folder), scores=scores_left(unbroken, folder), merges=merges)

    return Case("grid", folder, unbroken, life, begin_empty, command, left)


def no_figures(*arguments: Any) -> tuple[list[Path], dict[str, str]]:
    """Drawing takes longer than all else, and figures are drawn anew from results.json whenever a life ends."""
    raise MissingExtraError("figures are not drawn here")
