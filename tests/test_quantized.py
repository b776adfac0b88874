"""Adapters that train on weights of 4 or 8 bits: trained on the rounded base, added to and measured on the full one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from manyshot import quantized
from manyshot.content import keyed
from manyshot.errors import MissingExtraError, RecipeError
from manyshot.local_update import LocalUpdateJob, expert_state, run_local_update, task_loss
from manyshot.models import ModelState, Placement, load_model, load_tokenizer
from manyshot.progress import Progress
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json
from manyshot.seeding import preserved_random_state
from manyshot.tasks import load_task
from manyshot.tensor_writer import write_tensors
from run_helpers import Runs, distance, load_tensors, uneven_rows

ON_CPU = Placement("cpu", torch.float32)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("quantized"), uneven_rows)


def update(runs: Runs, folder: Path, quantization: str, base: Path | None = None) -> LocalUpdateJob:
    """A finished local update of the first task."""
    mapping = runs.mapping | ({"model": str(base)} if base else {})
    recipe = recipe_from_mapping(mapping, [f"local_update.quantization={quantization}", "local_update.rank=4"])
    task, start = load_task(recipe, "letters"), ModelState(Path(recipe.model))
    job = LocalUpdateJob(recipe, task, start, "tiny", folder, 1, 3, 0, 3, key=quantization)
    with preserved_random_state():
        run_local_update(job, Progress())
    return job


def adapter(job: LocalUpdateJob) -> dict[str, torch.Tensor]:
    return load_tensors(job.folder / "adapter" / "adapter_model.safetensors")


def losses(job: LocalUpdateJob) -> list[float]:
    found: list[float] = read_json(job.folder / "local_update.json")["train_losses"]
    return found


def rounded_base(base: Path, folder: Path) -> Path:
    """The model folder with every linear layer's weight as 4 bits and back, by bitsandbytes' own functions."""
    functional = pytest.importorskip("bitsandbytes").functional
    shutil.copytree(base, folder)
    tensors: dict[str, Any] = load_tensors(base)
    kind = {"quant_type": "nf4", "compress_statistics": True}
    for name, tensor in tensors.items():
        if "_proj" in name:
            packed, state = functional.quantize_4bit(tensor.contiguous(), **kind)
            tensors[name] = functional.dequantize_4bit(packed, state).reshape(tensor.shape)
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def test_quantization_trains_on_the_rounded_weights_of_4_bits(runs: Runs, base_folder: Path, tmp_path: Path) -> None:
    rounded = update(runs, tmp_path / "ours", "none", rounded_base(base_folder, tmp_path / "base"))
    job = update(runs, tmp_path / "4bit", "4bit")
    assert losses(job) == pytest.approx(losses(rounded), abs=1e-4)
    assert losses(job) != pytest.approx(losses(update(runs, tmp_path / "full", "none")), abs=1e-2)
    assert distance(adapter(job), adapter(rounded)) < 1e-3
    assert {tensor.dtype for tensor in adapter(job).values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_measures_the_expert_on_the_full_weights(quantization: str, runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    job = update(runs, tmp_path / "job", quantization)
    expert = load_model(expert_state(job.start, job.folder), ON_CPU)
    tokenizer = load_tokenizer(job.start.pretrained)
    loss = task_loss(expert, tokenizer, job.task, job.recipe, Progress(), round_index=1, which="expert")
    assert read_json(job.folder / "local_update.json")["validation"] == loss.to_json()
    full = update(runs, tmp_path / "full", "none")
    assert losses(job) == pytest.approx(losses(full), rel=0.1)
    assert 0 < distance(adapter(job), adapter(full)) < 0.05


def test_quantization_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"quantization: 4bit needs .*pip install 'manyshot\[quantization\]'"):
        quantized.check_quantization("4bit")
    quantized.check_quantization("none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=full"], "quantization rounds weights that stay as they are, and method: full trains all"),
        (["launcher=accelerate", "launch={num_processes: 2}"], "quantization is for one process; launcher: accelerate"),
    ],
)
def test_quantization_refuses_what_it_is_not_for(settings: list[str], message: str, runs: Runs) -> None:
    with pytest.raises(RecipeError, match=message):
        runs.recipe("local_update.quantization=4bit", *(f"local_update.{one}" for one in settings))


def test_quantization_is_part_of_the_names_of_finished_work_where_there_is_any(runs: Runs) -> None:
    named = [
        keyed("local_update", runs.recipe(f"local_update.quantization={kind}").local_update.model_dump(mode="json"))
        for kind in ("none", "8bit")
    ]
    assert named[1] == named[0] | {"quantization": "8bit"} and "quantization" not in named[0]
