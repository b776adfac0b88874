"""What the crash harness does to `manyshot tune`: searches of one merge, of every round's merge, and of whole runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from crash_check import Case, merges_left, scores_left, steps_left
from crash_run import begin_empty, small_recipe, unbroken_life, write_recipe
from manyshot import tune_outputs
from manyshot.errors import MissingExtraError
from manyshot.rundir import read_json, read_lines

SPACE = {"operator.temperature": {"low": 0.05, "high": 5.0, "log": True}, "operator.mask": [True, False]}
RECIPES: dict[str, dict[str, Any]] = {
    "one merge": {"evaluation": {"experts": True}, "search": {"parameters": SPACE, "trials": 4}},
    "every round": {
        "search": {
            "parameters": {"operator.temperature": [0.05, 5.0]},
            "rounds": "each",
            "sampler": "grid",
            "objective": "worst_share",
        }
    },
    "whole runs": {
        "search": {"parameters": {"operator.scaling": [0.5, 1.0]}, "rounds": "all", "sampler": "grid"},
    },
}


def cases(work: Path) -> list[Callable[[], Case]]:
    """What makes the case of every search."""
    tune_outputs.require_matplotlib = no_figures
    return [partial(case, work, name, settings) for name, settings in RECIPES.items()]


def no_figures() -> None:
    """Drawing takes longer than all else, and figures are drawn anew from tune.json whenever a life ends."""
    raise MissingExtraError("figures are not drawn here")


def case(work: Path, name: str, settings: Mapping[str, Any]) -> Case:
    recipe, folder = write_recipe(work / f"{name}.yaml", small_recipe(work, settings)), work / name

    def command(folder: Path) -> list[str]:
        return ["tune", str(recipe), "--output", str(folder), "--resume", "--quiet"]

    unbroken, life = unbroken_life(work, folder, command)
    done_once = Counter(steps=steps_left(unbroken, folder), merges=merges_left(unbroken, folder))

    def left(folder: Path) -> Counter[str]:
        found = Counter(steps=steps_left(unbroken, folder), merges=merges_left(unbroken, folder))
        if settings["search"].get("rounds") == "all":
            found += whole_runs_left(unbroken, folder, {key: life.work[key] - done_once[key] for key in done_once})
        return Counter(steps=found["steps"], merges=found["merges"], scores=scores_left(unbroken, folder))

    return Case(name, folder, unbroken, life, begin_empty, command, left)


def whole_runs_left(unbroken: Path, folder: Path, of_all: Mapping[str, int]) -> Counter[str]:
    """What whole runs still have to do; of one that is over its record is left, `of_all` is what they all did."""
    trials = sorted((unbroken / "trials" / "runs").iterdir())
    over = {line["number"] for line in read_lines(folder / "trials.jsonl") if line["kind"] == "trial"}
    found: Counter[str] = Counter()
    for number, trial in enumerate(trials):
        place = folder / trial.relative_to(unbroken)
        if number in over or (place / "trial.json").exists():
            continue
        # the local updates of round 1 are shared, and counted where they are
        steps = sum(read_json(file)["steps"] for file in place.glob("round_002/*/local_update.json"))
        merges = len(list(place.glob("round_*/merge.json")))
        found += Counter(steps=of_all["steps"] // len(trials) - steps, merges=of_all["merges"] // len(trials) - merges)
    return found
