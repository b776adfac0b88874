"""`manyshot tune`: its flags, and what it shows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyshot.progress import Event
    from manyshot.tuning import TuneResult

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A run's recipe with a section `search` (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as search.trials=40.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Its folder (default: in tune/).")]
Plan = Annotated[bool, typer.Option("--plan", help="Show trials, steps and cost, and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search that is in the folder.")]
Force = Annotated[bool, typer.Option("--force", help="Delete the search that is in the folder first.")]
Repair = Annotated[bool, typer.Option("--repair", help="As --resume; what was changed or removed is redone.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the path of best.yaml and nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def tune(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    plan: Plan = False,
    resume: Resume = False,
    force: Force = False,
    repair: Repair = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search merge settings on the validation splits, with experts that are trained once."""
    from manyshot.recipe_file import load_tune_recipe

    loaded = load_tune_recipe(recipe, overrides or [])
    if plan:
        from manyshot.tune_plan import plan_tune

        show_plan(plan_tune(loaded), as_json=as_json)
        return
    folder = output or Path("tune") / recipe.stem
    try:
        from manyshot.tuning import tune as run_search

        listener = _Lines(quiet or as_json).listen
        result = run_search(loaded, folder, resume=resume, force=force, repair=repair, listener=listener)
    except KeyboardInterrupt:
        print(f"manyshot: interrupted; go on with --resume --output {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    show_result(result, quiet=quiet, as_json=as_json)


class _Lines:
    """One line for everything a person should read now, with the minutes since the start."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden
        self.began = time.monotonic()

    def listen(self, event: Event) -> None:
        if event.kind == "message" and not self.hidden:
            print(f"[{(time.monotonic() - self.began) / 60:6.1f} min] {event.text}", file=sys.stderr, flush=True)


def show_plan(found: dict[str, Any], *, as_json: bool) -> None:
    """What is tried, and what it costs."""
    if as_json:
        print(json.dumps(found))
        return
    for search in found["searches"]:
        where = f"the merge of round {search['round']}" if search["round"] else "whole runs"
        count = f"{search['trials']} trials" if search["trials"] else "as many trials as the time allows"
        print(f"{where}: {count}" + (f", at most {found['seconds']:g} s" if found["seconds"] else ""))
    print(f"settings: {', '.join(found['parameters'])}; objective: {found['objective']}")
    endless = any(search["trials"] is None for search in found["searches"])
    once = " (with one trial of each search)" if endless else ""
    parts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found["steps"].items())
    print(f"training: {sum(found['steps'].values())} steps ({parts}), {found['train_examples']} examples{once}")
    print(f"merges: {found['merges']}{once}")
    print(f"evaluation: {found['validation_examples']} validation examples{once}, no test examples")


def show_result(result: TuneResult, *, quiet: bool, as_json: bool) -> None:
    """The best settings, and where their recipe is."""
    best = result.results["best"]
    if as_json:
        files = [str(file) for file in result.files]
        print(json.dumps({"folder": str(result.folder), "recipe": str(result.best), "best": best, "files": files}))
        return
    if not quiet:
        print(f"report: {result.folder / 'report.md'}", file=sys.stderr)
    print(result.best)
