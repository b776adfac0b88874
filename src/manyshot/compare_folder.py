"""The folder of a comparison: names of everything in it, and who may write into it.

compare/<name>/
  compare.yaml  environment.json  metrics.jsonl
  updates/<task>-<key>/        local updates from the pretrained model: experts, first rounds
  references/<task>-…-<key>/   the pretrained model, or the task's expert, on one task
  trials/<operator>-…-<key>/   one run of the grid, trial.json; test/ and retention-<key>/ where it was chosen
  results.json  report.md  tables/  figures/
"""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manyshot.compare_methods import SECTIONS
from manyshot.compare_recipe import CompareRecipe
from manyshot.errors import RecipeError, RunFolderError
from manyshot.inputs import Inputs
from manyshot.models import choose_placement
from manyshot.older_recipe import with_later_keys
from manyshot.recipe_file import compare_recipe_from_mapping, to_yaml
from manyshot.run_identity import PACKAGES, differences, package_version
from manyshot.rundir import is_passing, read_json, write_json, write_text
from manyshot.secret_text import redacted
from manyshot.yaml_text import read_yaml

PLACEMENT_KEYS = ("device", "dtype", "attn_implementation")


@dataclass(frozen=True)
class CompareFolder:
    """Names of everything in a comparison's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "compare.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def updates(self) -> Path:
        return self.path / "updates"

    @property
    def references(self) -> Path:
        return self.path / "references"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def results(self) -> Path:
        return self.path / "results.json"


def claim(folder: CompareFolder, recipe: CompareRecipe, *, resume: bool, extend: bool, force: bool) -> None:
    """Refuse a folder with something in it unless a flag says what to do with that. Nothing is changed yet."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: is a file, not a folder")
    # a kill may have come after the first of the two files that are written first
    if not path.is_dir() or all(is_passing(file) or file == folder.environment for file in path.iterdir()):
        return
    if not (resume or extend or force):
        raise RunFolderError(
            f"{path}: is not empty; --resume goes on with the comparison in it, --extend does so with a changed "
            "recipe, --force deletes it first"
        )
    # both: a file called compare.yaml may well be someone's recipe, beside everything else they have
    if not (folder.recipe.exists() and folder.environment.exists()):
        flag = "--force deletes comparisons only" if force else "there is nothing to go on with"
        raise RunFolderError(f"{path}: {flag}: this folder holds no compare.yaml and environment.json of one")
    if extend or force:
        return
    if changes := differences(_as_now(_read_recipe(folder)), read_yaml(to_yaml(recipe))):
        raise RunFolderError(
            f"{path}: the recipe differs from the comparison's: {'; '.join(changes)}; use --extend to keep the "
            "finished cells that the new recipe still wants, or --force to start over"
        )


def _read_recipe(folder: CompareFolder) -> Any:
    try:
        return read_yaml(folder.recipe.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.recipe}: damaged ({error}); use --force to start over") from None


def _as_now(raw: Any) -> Any:
    """The recipe of a comparison that an older version began, with the keys that have come since."""
    if not isinstance(raw, dict):
        return raw
    raw = with_later_keys(raw, (*SECTIONS, "evaluation"))
    methods = {name: with_later_keys(method, SECTIONS) for name, method in raw.get("methods", {}).items()}
    try:
        return read_yaml(to_yaml(compare_recipe_from_mapping(raw | {"methods": methods})))
    except RecipeError:  # it says what no recipe may any more: let the difference be named
        return raw


def describe(
    folder: CompareFolder, recipe: CompareRecipe, inputs: dict[tuple[str, int], Inputs], command: str | None
) -> None:
    """Write environment.json and compare.yaml; refuse to go on in another type, or on another kind of device."""
    placement = choose_placement(recipe.local_update).text
    if folder.environment.exists() and folder.recipe.exists():
        before, old = read_json(folder.environment).get("placement", placement), _read_recipe(folder)
        asked = recipe.model_dump(mode="json")["local_update"]
        if before != placement and all(old["local_update"][key] == asked[key] for key in PLACEMENT_KEYS):
            raise RunFolderError(
                f"{folder.path}: its cells were computed in {before}, and here they would be in {placement}; say which "
                "by local_update.dtype and local_update.device, and use --extend, or use --force to start over"
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.environment, environment(placement, inputs, command))
    write_text(folder.recipe, to_yaml(recipe))


def environment(placement: str, inputs: dict[tuple[str, int], Inputs], command: str | None) -> dict[str, Any]:
    """Versions, machine, placement and identity of the inputs."""
    return {
        "command": redacted(command or shlex.join(sys.argv)),
        "placement": placement,
        "inputs": {
            f"{model}, seed {seed}": {"base": found.base.digest} | {task.name: task.digest() for task in found.tasks}
            for (model, seed), found in inputs.items()
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
