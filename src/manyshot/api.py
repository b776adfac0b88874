"""`manyshot.run(recipe)`, and `merge`, `compare`, `tune` in the same way: what the commands do, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.compare_recipe import CompareRecipe
from manyshot.merge_recipe import MergeRecipe
from manyshot.recipe import Recipe
from manyshot.recipe_file import (
    compare_recipe_from_mapping,
    load_compare_recipe,
    load_merge_recipe,
    load_recipe,
    load_tune_recipe,
    merge_recipe_from_mapping,
    recipe_from_mapping,
    tune_recipe_from_mapping,
)
from manyshot.tune_recipe import TuneRecipe

if TYPE_CHECKING:
    from manyshot.comparison import CompareResult
    from manyshot.merge_command import MergeResult
    from manyshot.progress import Listener
    from manyshot.report_command import ReportResult
    from manyshot.runner import RunResult
    from manyshot.tuning import TuneResult


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    repair: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Train, merge and score in rounds; returns the merged model's folder and all scores.

    `recipe` is a Recipe, a mapping with the recipe's keys, or the path of a recipe file. `output` is the run folder
    (default: runs/<name of the file>, or runs/run). Raises manyshot.ManyshotError for input that cannot be used.
    """
    from manyshot.runner import run as run_recipe

    name = "run"
    if isinstance(recipe, str | Path):
        name = Path(recipe).stem
        recipe = load_recipe(Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = recipe_from_mapping(recipe)
    folder = Path(output) if output is not None else Path("runs") / name
    return run_recipe(
        recipe, folder, resume=resume, force=force, repair=repair, listener=listener, command="manyshot.run(…)"
    )


def extend(
    run: str | Path,
    rounds: int = 1,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    *,
    listener: Listener | None = None,
) -> RunResult:
    """Add rounds to the finished run in the folder `run`, and tasks with them; returns the merged model and all scores.

    `steps` local steps of each task in each round (default: as many as so far). `overrides` may add tasks
    (`tasks.poems.data=poems.jsonl`) and give later rounds values. Raises manyshot.ManyshotError for a run that has
    not finished, and for what would change what it has done.
    """
    from manyshot.extend_command import extend as extend_run

    return extend_run(Path(run), rounds, steps, overrides, listener=listener)


def merge(
    recipe: MergeRecipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
) -> MergeResult:
    """Merge models that exist already, once, into the model folder `output`; returns weights and report.

    `recipe` is a MergeRecipe, a mapping with its keys (base, experts, operator, …), or the path of a file, ours or
    mergekit's. Raises manyshot.ManyshotError for input that cannot be used; then nothing is left under `output`.
    """
    from manyshot.merge_command import merge as merge_recipe

    if isinstance(recipe, str | Path):
        recipe = load_merge_recipe(Path(recipe))
    elif not isinstance(recipe, MergeRecipe):
        recipe = merge_recipe_from_mapping(recipe)
    return merge_recipe(recipe, Path(output), device=device, threads=threads, force=force)


def compare(
    recipe: CompareRecipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    extend: bool = False,
    force: bool = False,
    workers: int = 1,
    listener: Listener | None = None,
) -> CompareResult:
    """Run a grid of methods, protocols, seeds and task sets into the folder `output`; returns results.json and files.

    `recipe` is a CompareRecipe, a mapping with its keys, or the path of its file. A cell that fails is in the results
    as such. Raises manyshot.ManyshotError for input that cannot be used.
    """
    from manyshot.comparison import compare as compare_recipe

    if isinstance(recipe, str | Path):
        recipe = load_compare_recipe(Path(recipe))
    elif not isinstance(recipe, CompareRecipe):
        recipe = compare_recipe_from_mapping(recipe)
    return compare_recipe(
        recipe,
        Path(output),
        resume=resume,
        extend=extend,
        force=force,
        workers=workers,
        listener=listener,
        command="manyshot.compare(…)",
    )


def tune(
    recipe: TuneRecipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
) -> TuneResult:
    """Search merge settings on the validation splits into the folder `output`; returns tune.json and best.yaml.

    `recipe` is a TuneRecipe, a mapping with its keys (a run's, and `search`), or the path of its file. Raises
    manyshot.ManyshotError for input that cannot be used.
    """
    from manyshot.tuning import tune as tune_recipe

    if isinstance(recipe, str | Path):
        recipe = load_tune_recipe(Path(recipe))
    elif not isinstance(recipe, TuneRecipe):
        recipe = tune_recipe_from_mapping(recipe)
    return tune_recipe(recipe, Path(output), resume=resume, force=force, listener=listener, command="manyshot.tune(…)")


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> ReportResult:
    """Write report.html, report.md and report.json of a run, of several side by side, or of a comparison's folder.

    They go into the run's own folder, or into `output`; several runs need one. What is missing or damaged is named in
    the report. Raises manyshot.ManyshotError where a folder holds neither a run nor a comparison.
    """
    from manyshot.report_command import write_report

    paths = [runs] if isinstance(runs, str | Path) else runs
    return write_report([Path(path) for path in paths], Path(output) if output is not None else None)
