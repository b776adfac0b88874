"""The folder of a search: names of everything in it, who may write into it, and the journal of its trials.

tune/<name>/
  tune.yaml  environment.json  metrics.jsonl
  trials.jsonl                 one line per trial, in order: all that a search remembers
  trials/…/<number>/           what was measured of each
  run/                         what every trial shares, and the chosen merges: an ordinary run, as far as it is known
  updates/                     links to local updates, by what they depend on
  tune.json  best.yaml  report.md  figures/
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from manyshot.errors import RunFolderError
from manyshot.inputs import Inputs
from manyshot.models import choose_placement
from manyshot.recipe_file import to_yaml
from manyshot.run_identity import differences, environment
from manyshot.rundir import (
    RunFolder,
    append_line,
    is_passing,
    link_atomically,
    read_json,
    read_lines,
    write_json,
    write_text,
)
from manyshot.tune_recipe import TuneRecipe
from manyshot.tune_sampler import Tried
from manyshot.tune_space import Settings
from manyshot.yaml_text import read_yaml

RECORD = "local_update.json"


@dataclass(frozen=True)
class Trial:
    """One trial of a search: of the merge of round `search`, or of whole runs (0)."""

    search: int
    number: int
    settings: Settings
    value: float | None = None  # of the objective; None where the trial failed
    losses: dict[str, float] = field(default_factory=dict)
    multi_task_loss: float | None = None
    shares: dict[str, float | None] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    @property
    def tried(self) -> Tried:
        return Tried(self.settings, self.value)


@dataclass(frozen=True)
class TuneFolder:
    """Names of everything in a search's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "tune.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path / "run")

    @property
    def updates(self) -> Path:
        return self.path / "updates"

    @property
    def results(self) -> Path:
        return self.path / "tune.json"

    @property
    def best(self) -> Path:
        return self.path / "best.yaml"

    def trial(self, search: int, number: int) -> Path:
        """A trial's own folder."""
        return self.path / "trials" / (f"round_{search:03d}" if search else "runs") / f"{number:04d}"


def claim(folder: TuneFolder, recipe: TuneRecipe, *, resume: bool, force: bool) -> None:
    """Refuse a folder with something in it unless a flag says what to do with that. Nothing is changed yet."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: is a file, not a folder")
    # a kill may have come after the first of the two files that are written first
    if not path.is_dir() or all(is_passing(file) or file == folder.environment for file in path.iterdir()):
        return
    if not (resume or force):
        raise RunFolderError(f"{path}: is not empty; --resume goes on with the search in it, --force deletes it first")
    if not (folder.recipe.exists() and folder.environment.exists()):
        flag = "there is nothing to go on with" if resume else "--force deletes searches only"
        raise RunFolderError(f"{path}: {flag}: this folder holds no tune.yaml and environment.json of one")
    if not resume:
        return
    try:
        old = read_yaml(folder.recipe.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.recipe}: damaged ({error}); use --force to start over") from None
    if changes := differences(old, read_yaml(to_yaml(recipe))):
        raise RunFolderError(
            f"{path}: the recipe differs from the search's: {'; '.join(changes)}; use --force to start over, or "
            "another --output, with search.reuse for what is trained here"
        )


def describe(folder: TuneFolder, recipe: TuneRecipe, inputs: Inputs, command: str | None) -> None:
    """Write environment.json and tune.yaml; on resume, refuse what would change the results."""
    identity = {
        "model": inputs.base.digest,
        "tasks": {task.name: task.digest() for task in inputs.tasks},
        "placement": choose_placement(recipe.local_update).text,
    }
    if folder.environment.exists() and folder.recipe.exists():
        before = read_json(folder.environment).get("identity")
        if keys := [line.split(":")[0] for line in differences(before, identity)]:
            raise RunFolderError(
                f"{folder.path}: {', '.join(keys)} changed since the search began; put it back as it was, or use "
                "--force to start over"
            )
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.environment, environment(recipe, inputs, identity, command))
    write_text(folder.recipe, to_yaml(recipe))


# ---- the journal -----------------------------------------------------------------------------------------------------


def read_trials(folder: TuneFolder, search: int) -> list[Trial]:
    """The finished trials of one search, in order. Raises RunFolderError for a journal that is not one."""
    lines = [line for line in read_lines(folder.journal) if line.get("kind") == "trial"]
    try:
        found = [Trial(**{key: value for key, value in line.items() if key != "kind"}) for line in lines]
    except TypeError as error:
        raise RunFolderError(f"{folder.journal}: damaged ({error}); use --force to start over") from None
    return [trial for trial in found if trial.search == search]


def write_trial(folder: TuneFolder, trial: Trial) -> None:
    append_line(folder.journal, {"kind": "trial"} | asdict(trial))


def read_end(folder: TuneFolder, search: int) -> dict[str, Any] | None:
    """How a search ended, and the number of the trial that was chosen; None while it goes on."""
    ends = [line for line in read_lines(folder.journal) if line.get("kind") == "end" and line.get("search") == search]
    return ends[0] if ends else None


def write_end(folder: TuneFolder, search: int, why: str, chosen: int) -> dict[str, Any]:
    end = {"kind": "end", "search": search, "why": why, "chosen": chosen}
    append_line(folder.journal, end)
    return end


# ---- local updates that are there already ----------------------------------------------------------------------------


def link_updates(folder: TuneFolder, source: Path) -> list[str]:
    """Let trials find the local updates below `source`, a run or a comparison; returns their tasks.

    A link is named as steps_train.shared_update() names what it looks for: after all that the update depends on.
    """
    tasks = []
    for file in sorted(source.rglob(RECORD)):
        record = read_json(file)
        folder.updates.mkdir(parents=True, exist_ok=True)
        link_atomically(folder.updates / f"{record['task']}-{record['key'][:16]}", file.parent)
        tasks.append(record["task"])
    return tasks
