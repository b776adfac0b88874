"""`manyshot compare`: its flags, and what it shows."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyshot.comparison import CompareResult
    from manyshot.progress import Event

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A comparison's recipe (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as protocol.rounds=3.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Its folder (default: in compare/).")]
Plan = Annotated[bool, typer.Option("--plan", help="Show cells, steps and cost, and stop.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Cells at once, each in a process of its own.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the comparison that is in the folder.")]
Extend = Annotated[bool, typer.Option("--extend", help="Go on with a changed recipe; finished cells stay.")]
Force = Annotated[bool, typer.Option("--force", help="Delete the comparison that is in the folder first.")]
Repair = Annotated[bool, typer.Option("--repair", help="As --resume; what was changed or removed is redone.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the report's path and nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    plan: Plan = False,
    workers: Workers = 1,
    resume: Resume = False,
    extend: Extend = False,
    force: Force = False,
    repair: Repair = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run operators × {post-hoc, many-shot} × seeds × task sets from one file, and write the paper's tables."""
    from manyshot.recipe_file import load_compare_recipe

    loaded = load_compare_recipe(recipe, overrides or [])
    if plan:
        from manyshot.compare_plan import plan_compare

        show_plan(plan_compare(loaded), as_json=as_json)
        return
    folder = output or Path("compare") / recipe.stem
    try:
        from manyshot.comparison import compare as run_compare

        listener = _Lines(quiet or as_json).listen
        result = run_compare(
            loaded,
            folder,
            resume=resume,
            extend=extend,
            force=force,
            repair=repair,
            workers=workers,
            listener=listener,
        )
    except KeyboardInterrupt:
        print(f"manyshot: interrupted; go on with --resume --output {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    show_result(result, quiet=quiet, as_json=as_json)
    if any(cell["status"] != "done" for cell in result.results["cells"]):
        raise typer.Exit(1)


class _Lines:
    """One line for everything a person should read now, with the minutes since the start."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden
        self.began = time.monotonic()

    def listen(self, event: Event) -> None:
        if event.kind == "message" and not self.hidden:
            print(f"[{(time.monotonic() - self.began) / 60:6.1f} min] {event.text}", file=sys.stderr, flush=True)


def show_plan(found: dict[str, Any], *, as_json: bool) -> None:
    """The cells by place, and what they cost."""
    if as_json:
        print(json.dumps(found))
        return
    by_place: dict[str, list[str]] = {}
    for cell in found["cells"]:
        place = "{model}, task set {task_set}, seed {seed}".format(**cell["place"])
        tries = f" (grid of {cell['tries']})" if cell["tries"] > 1 else ""
        by_place.setdefault(place, []).append(f"{cell['method']} {cell['protocol']}{tries}")
    for place, cells in by_place.items():
        print(f"{place}: {len(cells)} cells")
        for cell in cells:
            print(f"  {cell}")
    steps = found["steps"]
    parts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in steps["by_part"].items())
    print(f"{len(found['cells'])} cells")
    print(f"training: {steps['shared']} steps ({parts}), {found['train_examples']} examples")
    print(f"one by one: {steps['one_by_one']} steps, {steps['ratio']:.2f} times as many")
    print(f"evaluation: {found['validation_examples']} validation and {found['test_examples']} test examples")
    if found["benchmarks"]:
        print(f"benchmarks: {found['benchmarks']} times a model is asked one")


def show_result(result: CompareResult, *, quiet: bool, as_json: bool) -> None:
    """How many cells there are, and where the report is."""
    states = Counter(cell["status"] for cell in result.results["cells"])
    if as_json:
        print(
            json.dumps({"folder": str(result.folder), "cells": states, "files": [str(file) for file in result.files]})
        )
        return
    for cell in result.results["cells"]:
        if cell["status"] == "failed":
            where = f"{cell['model']}, {cell['task_set']}, seed {cell['seed']}"
            print(f"failed: {cell['method']} {cell['protocol']} ({where}): {cell['error']}", file=sys.stderr)
    if not quiet:
        print(f"{states['done']} of {sum(states.values())} cells done", file=sys.stderr)
    print(result.folder / "report.md")
