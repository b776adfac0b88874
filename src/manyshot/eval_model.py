"""Which model `manyshot eval` means: a model, an adapter, a round of a run, or an expert inside one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyshot.base_model import find_base_model
from manyshot.errors import ModelError, RunFolderError
from manyshot.local_update import RECORD, expert_state
from manyshot.misshapen import misshapen
from manyshot.models import ModelState, Placement, load_model
from manyshot.peft_adapter import is_adapter
from manyshot.recipe_file import load_recipe
from manyshot.removed import refuse_removed
from manyshot.rundir import RunFolder, content_key, read_json
from manyshot.start_adapters import start_factors
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME
from manyshot.tensors import Checkpoint, file_digest


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate: what was asked for, what that is, its files, and a digest of their content."""

    name: str
    kind: str
    state: ModelState
    digest: str

    def to_json(self) -> dict[str, Any]:
        files = {
            "base": self.state.pretrained,
            "task_vector": self.state.task_vector,
            "start_adapter": self.state.start_adapter,
            "adapter": self.state.adapter,
            "weights": self.state.full,
        }
        paths = {name: str(path) for name, path in files.items() if path is not None}
        return {"name": self.name, "kind": self.kind, "digest": self.digest, "files": paths}


@misshapen(ModelError, "cannot be used as a model")
def find_model(
    spec: str, *, base: str | None = None, adapter: str | None = None, round_index: int | None = None
) -> EvalModel:
    """Resolve MODEL, --base, --adapter and --round. Raises ManyshotError for what is missing, damaged or contradicts.

    A round of a run is the pretrained model plus that round's task vector, summed in float32: what the run itself
    measured. Round 0 is the pretrained model.
    """
    path = Path(spec)
    if (path.parent / RECORD).is_file():  # an expert's own adapter/ or model/
        path = path.parent
    in_run = (path / "recipe.yaml").is_file()
    if round_index is not None and not in_run:
        raise RunFolderError(f"--round {round_index}: {spec} is no run folder (it has no recipe.yaml)")
    if base is not None and not is_adapter(path):
        raise ModelError(f"--base is for adapters, and {spec} is none (it has no adapter_config.json)")
    if in_run:
        kind, state = _round(RunFolder(path), round_index)
    elif (path / RECORD).is_file():
        kind, state = _expert(path)
    elif path.is_dir() and is_adapter(path):
        kind, state = "adapter", ModelState(_base_of(path, base), adapter=path)
    else:
        kind, state = "model", ModelState(find_base_model(spec).path)
    if adapter is not None:
        kind, state = _with_adapter(kind, state, Path(adapter))
    _check_files(state)
    return EvalModel(spec, kind, state, _digest(state))


def _base_of(adapter: Path, base: str | None) -> Path:
    """The model that an adapter was trained on: --base, or what its configuration says."""
    named = base or read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(f"{adapter}: its adapter_config.json names no base model; give it as --base")
    try:
        return find_base_model(named).path
    except ModelError as error:
        raise ModelError(f"{adapter}: its base model: {error}; another one can be given as --base") from None


def _with_adapter(kind: str, state: ModelState, adapter: Path) -> tuple[str, ModelState]:
    if state.adapter is not None:
        raise ModelError(f"--adapter {adapter}: the model has an adapter already ({state.adapter})")
    if not is_adapter(adapter):
        raise ModelError(f"--adapter {adapter}: not an adapter folder (it has no adapter_config.json)")
    return f"{kind}, with an adapter", replace(state, adapter=adapter)


# ---- inside a run ----------------------------------------------------------------------------------------------------


def _pretrained(folder: RunFolder) -> ModelState:
    return ModelState(folder.pretrained(), trust_remote_code=load_recipe(folder.recipe).trust_remote_code)


def _round(folder: RunFolder, round_index: int | None) -> tuple[str, ModelState]:
    """The model a round ended with; the last finished round's without a number."""
    finished = [0]
    while (folder.round(finished[-1] + 1) / "DONE.json").is_file():
        finished.append(finished[-1] + 1)
    chosen = finished[-1] if round_index is None else round_index
    if chosen not in finished:
        there = ", ".join(map(str, finished))
        raise RunFolderError(f"{folder.path}: round {chosen} is not finished; finished are {there} (0: pretrained)")
    if round_index is None and chosen == 0:
        raise RunFolderError(f"{folder.path}: no round is finished; --round 0 evaluates the pretrained model")
    return f"round {chosen}", _state_after(folder, chosen)


def _state_after(folder: RunFolder, round_index: int) -> ModelState:
    pretrained = _pretrained(folder)
    if round_index == 0:
        return pretrained
    stored = folder.round(round_index) / "task_vector.safetensors"
    if stored.is_file():
        return replace(pretrained, task_vector=stored)
    merged = folder.round(round_index) / "merged"
    if not merged.is_dir():
        raise RunFolderError(
            f"{folder.path}, round {round_index}: neither task_vector.safetensors nor merged/ is there"
        )
    return replace(pretrained, full=merged)


def _expert(path: Path) -> tuple[str, ModelState]:
    """A task's expert: of a round (on top of what the round started from), or one that was trained alone."""
    owner = next((folder for folder in path.resolve().parents if (folder / "recipe.yaml").is_file()), None)
    if owner is None:
        raise RunFolderError(f"{path}: an expert of a run, but no folder above it has a recipe.yaml")
    folder, place = RunFolder(owner), path.resolve().parent.name
    for part in ("adapter", "model"):
        refuse_removed(owner, path.resolve() / part, "evaluating the expert")
    if place == "experts":
        return f"expert {path.name}", expert_state(_pretrained(folder), path)
    if not place.startswith("round_") or not place.removeprefix("round_").isdecimal():
        raise RunFolderError(f"{path}: neither in experts/ nor in a round of {owner}")
    before = int(place.removeprefix("round_")) - 1
    start = _state_after(folder, before)
    how = load_recipe(folder.recipe).local_update.adapter_start
    start = replace(start, start_adapter=start_factors(how, folder, before + 1, path.resolve().name))
    return f"expert {path.name} of round {before + 1}", expert_state(start, path)


# ---- files -----------------------------------------------------------------------------------------------------------


def _check_files(state: ModelState) -> None:
    """Open every file of weights, so that a damaged one is named before anything is loaded."""
    Checkpoint(state.full or state.pretrained)
    if state.adapter is not None:
        weights = state.adapter / ADAPTER_WEIGHTS_NAME
        if not weights.is_file():
            raise ModelError(f"{state.adapter}: has no {ADAPTER_WEIGHTS_NAME} (pickles, .bin, are never read)")
        Checkpoint(weights)


def _digest(state: ModelState) -> str:
    """SHA-256 over everything that decides what the model says."""
    folders = [folder for folder in (state.full or state.pretrained, state.start_adapter, state.adapter) if folder]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix == ".safetensors"]
    files += [file for file in sorted(state.pretrained.iterdir()) if file.suffix in (".json", ".jinja", ".model")]
    files += [state.task_vector] if state.task_vector else []
    return content_key([[file.name, file_digest(file)] for file in files if file.is_file()])


def load(model: EvalModel, placement: Placement) -> Any:
    """The model in memory. Raises ModelError for an adapter that does not fit its base."""
    try:
        return load_model(model.state, placement)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        where = model.state.adapter or model.name
        raise ModelError(f"{where}: cannot be loaded on {model.state.pretrained} ({error})") from None
