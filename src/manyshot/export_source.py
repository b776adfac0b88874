"""What an export takes out of a run: a finished round's task vector, on the base it belongs to; both as they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manyshot.base_model import find_base_model
from manyshot.errors import RunFolderError
from manyshot.misshapen import misshapen
from manyshot.operators import Operator
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder, read_json
from manyshot.status import read_outline
from manyshot.tensors import Checkpoint, file_digest
from manyshot.yaml_text import read_yaml


@dataclass(frozen=True)
class ExportSource:
    """A finished round of a run: Θ⁰ in `base`, Θʳ − Θ⁰ in `task_vector`."""

    folder: RunFolder
    recipe: Recipe
    base: Path
    base_name: str
    round_index: int

    @property
    def round(self) -> Path:
        return self.folder.round(self.round_index)

    @property
    def task_vector(self) -> Path:
        return self.round / "task_vector.safetensors"

    @property
    def merged(self) -> Path | None:
        """The round's model folder, where it has not been deleted and lies in the run."""
        folder = self.round / "merged"
        if self.folder.path.resolve() not in folder.resolve().parents:
            return None
        return folder if (folder / "config.json").is_file() else None

    @property
    def dtype(self) -> str | None:
        """The type that the run writes its merged models in; None for the base's own."""
        return self.recipe.merge.output_dtype

    @property
    def merge_record(self) -> dict[str, Any]:
        return read_json(self.round / "merge.json")

    @property
    def operator(self) -> Operator:
        """The operator with this round's values, the scaling that a line search found among them."""
        operator = self.recipe.method.at_round(self.round_index)
        if not operator.searches_scaling:
            return operator
        scaling: float = self.merge_record["line_search"]["scaling"]
        return operator.with_scaling(scaling)

    def to_json(self) -> dict[str, Any]:
        base = {"name": self.base_name, "path": str(self.base)}
        return {"run": str(self.folder.path), "round": self.round_index, "base_model": base}


@misshapen(RunFolderError, "its records cannot be read")
def open_source(run: Path, round_index: int | None) -> ExportSource:
    """A round of a run, the last one when no number is given, with everything that it rests on checked by digest.

    Raises RunFolderError for a folder without a run, a run or round that is not finished, a base that is gone or not
    the one that the run was made with, and a task vector that is not what the round wrote.
    """
    folder = RunFolder(run)
    rounds = read_outline(folder).rounds
    chosen = choose_round(folder, rounds, round_index)
    environment = read_json(folder.environment)
    base, name = _base(folder, environment)
    source = ExportSource(folder, _read_recipe(folder), base, name, chosen)
    _check_task_vector(source)
    return source


def choose_round(folder: RunFolder, rounds: int, round_index: int | None) -> int:
    """The round to export. Raises RunFolderError for one that is not there or not finished."""
    done = [r for r in range(1, rounds + 1) if (folder.round(r) / "DONE.json").is_file()]
    if round_index is None:
        if rounds in done:
            return rounds
        finished = f"--round {done[-1]} exports the last finished one" if done else "no round is finished yet"
        raise RunFolderError(
            f"{folder.path}: the run is not finished ({len(done)} of {rounds} rounds); {finished}, and --resume goes on"
        )
    if round_index == 0:
        raise RunFolderError(f"{folder.path}: round 0 is the pretrained model itself; there is nothing to export")
    if round_index not in done:
        there = ", ".join(map(str, done)) or "none"
        what = "is not finished" if round_index <= rounds else f"does not exist, the run has {rounds}"
        raise RunFolderError(f"{folder.path}: round {round_index} {what}; finished are: {there}")
    return round_index


def _read_recipe(folder: RunFolder) -> Recipe:
    """The run's recipe. Its data need not be there any more, which a recipe that is to be run would be asked."""
    try:
        return Recipe.model_validate(read_yaml(folder.recipe.read_text("utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.recipe}: is not a recipe of this version ({error})") from None


def _base(folder: RunFolder, environment: Mapping[str, Any]) -> tuple[Path, str]:
    """The run's pretrained model: its folder and its name."""
    path, identity = folder.pretrained(environment), environment.get("identity")
    if not isinstance(identity, dict):
        raise RunFolderError(f"{folder.environment}: does not say identity")
    if find_base_model(str(path)).digest != identity.get("model"):
        raise RunFolderError(
            f"{folder.path}: the content of its pretrained model {path} changed since the run began; put it back as it "
            "was, since the task vector belongs to that one"
        )
    return path, str(environment["base_model"].get("name"))


def _check_task_vector(source: ExportSource) -> None:
    """The round's master is there, and what its record says."""
    file = source.task_vector
    if not file.is_file():
        raise RunFolderError(f"{source.folder.path}, round {source.round_index}: {file.name} is missing")
    expected = read_json(source.round / "DONE.json").get("files", {}).get(file.name)
    if file_digest(file) != expected:
        raise RunFolderError(f"{file}: is not the file that the round wrote (its SHA-256 is another); it was changed")
    names = Checkpoint(file).names
    if foreign := sorted(set(names) - set(Checkpoint(source.base).names)):
        raise RunFolderError(f"{file}: holds tensor '{foreign[0]}', which {source.base} has not")


def check_output(output: Path, run: Path) -> None:
    """Refuse an output that has something in it, or that lies in the run. Nothing is changed yet."""
    inside, around = output.resolve(), run.resolve()
    if inside == around or inside.is_relative_to(around):
        raise RunFolderError(f"{output}: is inside the run folder {run}, whose content is its state; choose another")
    if output.exists() and not output.is_dir():
        raise RunFolderError(f"{output}: is a file, not a folder")
    if output.is_dir() and any(output.iterdir()):
        raise RunFolderError(f"{output}: is not empty; choose another --output")
