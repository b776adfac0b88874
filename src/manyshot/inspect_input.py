"""What `inspect` compares: models of one base, or the experts of one round of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from manyshot.errors import ModelError, RunFolderError
from manyshot.match import open_experts, tied_duplicates
from manyshot.misshapen import misshapen
from manyshot.reading import Reference, TaskVectorReader, check_updates
from manyshot.removed import refuse_removed
from manyshot.rundir import RunFolder, read_json
from manyshot.start_adapters import start_factors
from manyshot.status import task_names
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, AdapterUpdate, ModelUpdate, StoredTaskVector, Update
from manyshot.tensors import Checkpoint
from manyshot.yaml_text import read_yaml


@dataclass(frozen=True)
class Experts:
    """Models to inspect, opened: where they are, and the reader of their task vectors."""

    base: Checkpoint
    models: Mapping[str, Path]
    reader: TaskVectorReader
    run: Path | None = None
    round_index: int | None = None


def open_inputs(
    paths: Sequence[Path], base: Path | None, round_index: int | None = None, reference: Reference | None = None
) -> Experts:
    """Models of `base`, or without one the run folder that is the only path. Raises ManyshotError for a mix of both."""
    if base is not None:
        if round_index is not None or reference == "start":
            raise RunFolderError("--round and --reference start are for run folders; leave --base out to inspect one")
        return open_models(base, name_models(paths))
    if len(paths) != 1:
        raise ModelError(f"{len(paths)} paths without --base; give one run folder, or the models' base model as --base")
    return open_round(paths[0], round_index, reference)


def name_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names for models: the last parts of their paths, as many as it takes to tell all apart."""
    parts = [path.resolve().parts for path in paths]
    for place, one in enumerate(parts):
        if one in parts[:place]:
            raise ModelError(f"{paths[place]}: is given twice")
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise ModelError("no model is given")


def open_models(base: Path, models: Mapping[str, Path]) -> Experts:
    """Model folders and PEFT adapters of one base; an output head that is tied to the embedding counts once."""
    pretrained = Checkpoint(base)
    updates = open_experts(pretrained, models)
    reader = TaskVectorReader(pretrained, None, tuple(models), updates)
    return Experts(pretrained, models, reader.without(tied_duplicates(pretrained)))


@misshapen(RunFolderError, "its records cannot be read")
def open_round(path: Path, round_index: int | None = None, reference: Reference | None = None) -> Experts:
    """The experts of one round of a run, by default of the last finished one.

    v_τ = θ_τ − Θ⁰ or, with reference `start`, θ_τ − Θʳ⁻¹; by default as the run merges. Raises RunFolderError for a
    folder without a run and a round without experts, naming both.
    """
    folder = RunFolder(path)
    tasks, merged_reference, adapter_start = _read_recipe(folder)
    chosen = _last_round(folder) if round_index is None else round_index
    where = f"{path}, round {chosen}"
    if chosen < 1:
        raise RunFolderError(f"{where}: rounds count from 1; round 0 is the pretrained model and has no experts")
    before = folder.round(chosen - 1)
    start = before / "task_vector.safetensors"
    if chosen > 1 and not start.is_file():
        raise RunFolderError(f"{where}: round {chosen - 1} is not finished ({start} is missing)")
    gaps = folder.round(chosen) / "loss_gap.json"
    left_out = read_json(gaps).get("skipped", {}) if gaps.exists() else {}  # their local update failed
    tasks = [task for task in tasks if task not in left_out]
    models = {task: _expert_path(folder, chosen, task) for task in tasks}
    pretrained = Checkpoint(folder.pretrained())
    updates: list[Update] = []
    for task, model in models.items():
        if model.parent != folder.local_update(chosen, task):  # an expert that was there before the run
            updates += open_experts(pretrained, {task: model})
        elif model.name == "model":
            updates.append(ModelUpdate(model))
        else:
            updates.append(AdapterUpdate(model, start_factors(adapter_start, folder, chosen, task)))
    check_updates(pretrained, tasks, updates)
    stored = StoredTaskVector(start) if chosen > 1 else None
    reader = TaskVectorReader(pretrained, stored, tuple(tasks), tuple(updates), reference or merged_reference)
    return Experts(pretrained, models, reader, path, chosen)


def _read_recipe(folder: RunFolder) -> tuple[list[str], Reference, str]:
    """Task names in order, what the run's task vectors are relative to, and how its adapters start a round."""
    if not folder.recipe.is_file():
        raise RunFolderError(f"{folder.path}: not a run folder (no recipe.yaml); to inspect models give --base")
    try:
        recipe = read_yaml(folder.recipe.read_text("utf-8"))
        tasks = task_names(recipe["tasks"])
        reference = (recipe.get("merge") or {}).get("reference", "pretrained")
        adapter_start = str((recipe.get("local_update") or {}).get("adapter_start", "fresh"))
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise RunFolderError(f"{folder.recipe}: damaged ({type(error).__name__}: {error})") from None
    return tasks, "start" if reference == "start" else "pretrained", adapter_start


def _last_round(folder: RunFolder) -> int:
    finished = 0
    while (folder.round(finished + 1) / "DONE.json").is_file():
        finished += 1
    if not finished:
        raise RunFolderError(f"{folder.path}: no round is finished; --round 1 inspects its experts once they are there")
    return finished


def _expert_path(folder: RunFolder, round_index: int, task: str) -> Path:
    """The folder of an expert that is complete: its local update has a record, which may say where the expert is."""
    place = folder.local_update(round_index, task)
    record, where = place / "local_update.json", f"{folder.path}, round {round_index}, task '{task}'"
    if not record.is_file():
        raise RunFolderError(f"{where}: no expert there yet ({record} is missing)")
    if isinstance(adopted := read_json(record).get("expert"), str):
        return Path(adopted)
    for part in ("adapter", "model"):
        refuse_removed(folder.path, place / part, f"round {round_index}: inspecting its experts")
    if (place / "model").is_dir():
        return place / "model"
    if not (place / "adapter" / ADAPTER_WEIGHTS_NAME).is_file():
        raise RunFolderError(f"{where}: its expert is gone (neither {place / 'adapter'} nor {place / 'model'})")
    return place / "adapter"
