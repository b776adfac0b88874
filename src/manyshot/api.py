"""`manyshot.run(recipe)`: the whole thing from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyshot.progress import Listener
from manyshot.recipe import Recipe
from manyshot.recipe_file import load_recipe, recipe_from_mapping
from manyshot.run import RunResult
from manyshot.run import run as run_recipe


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Train, merge and score in rounds; returns the merged model's folder and all scores.

    `recipe` is a Recipe, a mapping with the recipe's keys, or the path of a recipe file. `output` is the run folder
    (default: runs/<name of the file>, or runs/run). Raises manyshot.ManyshotError for input that cannot be used.
    """
    name = "run"
    if isinstance(recipe, str | Path):
        name = Path(recipe).stem
        recipe = load_recipe(Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = recipe_from_mapping(recipe)
    folder = Path(output) if output is not None else Path("runs") / name
    return run_recipe(recipe, folder, resume=resume, force=force, listener=listener, command="manyshot.run(…)")
