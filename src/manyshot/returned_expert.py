"""An expert that others trained, taken back: a PEFT adapter or a model folder, checked against the base, then kept.

What is kept is what the merge reads: factors or tensors, and a configuration that names the run's own base.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from manyshot.errors import ModelError
from manyshot.folder_links import refuse_links_out
from manyshot.match import open_experts
from manyshot.peft_adapter import CONFIG_NAME, is_adapter
from manyshot.rundir import atomic_folder, read_json, write_json
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, FACTORS_NAME, AdapterUpdate, Update
from manyshot.tensors import INDEX_NAME, Checkpoint, find_weight_files

Kind = Literal["adapter", "model"]
Transfer = Callable[[Path, Path], object]


def find_result(output: Path) -> Path:
    """The folder that holds the adapter or the model: `output`, or the only folder in it that does.

    Raises ModelError that says what there is instead.
    """
    if _holds_result(output):
        return output
    below = sorted(path for path in output.iterdir() if path.is_dir() and not path.name.startswith("checkpoint-"))
    found = [path for path in below if _holds_result(path)]
    if len(found) == 1:
        return found[0]
    wanted = "expected a PEFT adapter (adapter_config.json) or a model folder (config.json, *.safetensors)"
    if found:
        raise ModelError(f"several results are there: {', '.join(path.name for path in found)}; {wanted} in one place")
    names = sorted(path.name for path in output.iterdir())
    raise ModelError(f"{wanted}, found {', '.join(names[:10]) if names else 'nothing'}")


def _holds_result(folder: Path) -> bool:
    return is_adapter(folder) or next(folder.glob("*.safetensors"), None) is not None


def take_expert(
    found: Path, base: Checkpoint, task: str, folder: Path, *, base_name: str, trained_on: Iterable[str], move: bool
) -> Kind:
    """Check what was trained, and keep it as `folder`/adapter or `folder`/model.

    `trained_on`: names of the model that an adapter may say it was trained on; none: whatever it says. Raises
    ModelError naming task and tensor for another base, wrong shapes, NaN and Inf, and what is not exact.
    """
    refuse_links_out(found)
    update = open_experts(base, {task: found})[0]
    _refuse_not_finite(update, base, f"model '{task}' ({found})")
    if isinstance(update, AdapterUpdate):
        _keep_adapter(found, update, task, folder / "adapter", base_name, tuple(trained_on))
        return "adapter"
    _keep_model(found, base, folder / "model", os.replace if move else shutil.copyfile)
    return "model"


def _refuse_not_finite(update: Update, base: Checkpoint, where: str) -> None:
    import torch

    for name in update.names:
        if isinstance(update, AdapterUpdate):
            bad = name in update.end.factors and update.end.wide(name)[2]
        else:
            stored = update.model.read(update.stored_name(name))  # type: ignore[attr-defined]
            bad = not bool(torch.isfinite(stored).all())
        if bad:
            raise ModelError(f"{where}: tensor '{name}' holds NaN or Inf; the training diverged")


def _keep_adapter(
    found: Path, update: AdapterUpdate, task: str, folder: Path, base_name: str, trained_on: tuple[str, ...]
) -> None:
    where = f"model '{task}' ({found})"
    if update.end.whole:
        raise ModelError(
            f"{where}: tensor '{min(update.end.whole)}' was trained whole beside low-rank factors (modules_to_save, "
            "bias), which an adapter of a round cannot hold; merge it into its model, and give the model folder"
        )
    if embeddings := [name for name, factor in update.end.factors.items() if "lora_embedding" in factor.lora_a]:
        raise ModelError(f"{where}: tensor '{embeddings[0]}': adapters on embeddings are refused; use linear layers")
    config = read_json(found / CONFIG_NAME)
    said = config.get("base_model_name_or_path")
    if said and trained_on and str(said) not in trained_on and not _same_place(str(said), trained_on):
        raise ModelError(
            f"{where}: {CONFIG_NAME} says that it was trained on '{said}', and the round's model is '{trained_on[0]}'"
        )
    if isinstance(config.get("target_modules"), list):  # PEFT writes it from a set, in any order
        config["target_modules"] = sorted(config["target_modules"])
    with atomic_folder(folder) as partial:
        shutil.copyfile(found / ADAPTER_WEIGHTS_NAME, partial / ADAPTER_WEIGHTS_NAME)
        write_json(partial / CONFIG_NAME, config | {"base_model_name_or_path": base_name, "inference_mode": True})
        write_json(partial / FACTORS_NAME, {name: vars(factor) for name, factor in update.end.factors.items()})


def _same_place(said: str, names: tuple[str, ...]) -> bool:
    """Whether a path leads to one of the folders by another way."""
    path = Path(said)
    return path.exists() and any(os.path.exists(name) and path.samefile(name) for name in names)


def _keep_model(found: Path, base: Checkpoint, folder: Path, transfer: Transfer) -> None:
    """Weights of what was trained, configuration of the base: nothing else in the folder has a say in how it loads."""
    files = find_weight_files(found)
    index = found / INDEX_NAME
    with atomic_folder(folder) as partial:
        for file in [*files, *([index] if index.is_file() else [])]:
            transfer(file, partial / file.name)
        for name in ("config.json", "generation_config.json"):
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, partial / name)
