"""Experts with all weights: what a round reads and writes of them is pieces and single tensors, never whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manyshot import kernels
from manyshot.engine import tile_entries
from manyshot.operators import Mean
from manyshot.optimizer_state import write_state
from manyshot.round_merge import merge_weights
from manyshot.task_vector import ModelUpdate
from manyshot.tensor_writer import SafetensorsWriter
from manyshot.tensors import Checkpoint
from merge_helpers import draw, same_bits, write_model

SHAPES = {"a.weight": (1024, 600), "b.weight": (600, 1024)}
TASKS = ("one", "two", "three")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Checkpoint]:
    """A base and three experts, each of two matrices that are larger than a tile."""
    return {
        model: write_model(tmp_path / model, {name: draw(model, name, shape=shape) for name, shape in SHAPES.items()})
        for model in ("base", *TASKS)
    }


def merge(models: dict[str, Checkpoint], output: Path) -> None:
    updates = [ModelUpdate(models[task]) for task in TASKS]
    merge_weights(models["base"], None, TASKS, updates, Mean(), [1 / 3] * 3, output, threads=2)


def test_full_merge_reads_experts_in_pieces(
    models: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever route is taken: without the compiled kernels every read is seen here."""
    merge(models, tmp_path / "compiled.safetensors")
    read, sizes = Checkpoint.read_bytes, list[int]()

    def watched(checkpoint: Checkpoint, name: str, start: int, left: memoryview) -> None:
        sizes.append(left.nbytes)
        read(checkpoint, name, start, left)

    def refuse(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"tensor {name} was read as a whole")

    monkeypatch.setattr(kernels, "compiled", lambda: False)
    monkeypatch.setattr(Checkpoint, "read_bytes", watched)
    monkeypatch.setattr(Checkpoint, "read", refuse)
    merge(models, tmp_path / "tiles.safetensors")
    monkeypatch.undo()
    whole = 4 * 1024 * 600
    assert max(sizes) <= 4 * tile_entries(len(TASKS)) < whole / 4
    assert sum(sizes) == 2 * len(models) * whole  # everything once
    assert same_bits(read_file(tmp_path / "compiled.safetensors"), read_file(tmp_path / "tiles.safetensors"))


class Parameters(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(draw(name, shape=(8, 4))) for name in ("first", "second"))


def trained(model: Parameters, *names: str) -> torch.optim.AdamW:
    """One step of AdamW on some of the parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW(model.parameters())
    sum((getattr(model, name).square().sum() for name in names), torch.zeros(())).backward()
    optimizer.step()
    return optimizer


def test_optimizer_state_is_written_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was carried is read when its turn comes, and what trained since stands in its place."""
    model, held = Parameters(), list[tuple[str, int]]()
    write_state(trained(model, "first"), model, tmp_path / "one.safetensors")
    written: list[str] = []
    write: Callable[..., None] = SafetensorsWriter.write
    read: Callable[..., torch.Tensor] = Checkpoint.read

    def watched_write(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        written.append(name)
        write(writer, name, tensor)

    def watched_read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        held.append((name, len(written)))
        return read(checkpoint, name)

    optimizer = trained(model, "second")
    monkeypatch.setattr(SafetensorsWriter, "write", watched_write)
    monkeypatch.setattr(Checkpoint, "read", watched_read)
    write_state(optimizer, model, tmp_path / "two.safetensors", tmp_path / "one.safetensors")
    monkeypatch.undo()
    assert [(written[before], name) for name, before in held] == [(name, name) for name, _ in held]
    both = read_file(tmp_path / "two.safetensors")
    assert sorted({name.split(".")[0] for name in both}) == ["first", "second"]
    assert all(torch.equal(both[name], value) for name, value in read_file(tmp_path / "one.safetensors").items())


def read_file(file: Path) -> dict[str, torch.Tensor]:
    stored = Checkpoint(file)
    return {name: stored.read(name).clone() for name in stored.names}
