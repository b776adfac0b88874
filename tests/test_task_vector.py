"""Updates: s·B·A row by row, exact, for fresh and carried adapters, transposed layers and whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyshot.errors import ModelError, RunFolderError
from manyshot.rundir import write_json
from manyshot.task_vector import (
    ADAPTER_WEIGHTS_NAME,
    FACTORS_NAME,
    AdapterFactors,
    AdapterUpdate,
    ModelUpdate,
    StoredTaskVector,
)
from manyshot.tensors import write_tensors
from merge_helpers import SHAPES, dense, draw, make_adapter, make_base


def test_adapter_rows_by_hand(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / ADAPTER_WEIGHTS_NAME, {"A": torch.tensor([[1.0, 2.0, 3.0]]), "B": torch.tensor([[1.0], [-2.0]])}
    )
    entry = {"lora_a": "A", "lora_b": "B", "scaling": 0.5, "transposed": False}
    write_json(tmp_path / FACTORS_NAME, {"x": entry})
    factors = AdapterFactors(tmp_path)
    assert factors.shape("x") == (2, 3)
    assert factors.rows("x", 0, 2).tolist() == [[0.5, 1.0, 1.5], [-1.0, -2.0, -3.0]]
    assert factors.rows("x", 1, 2).tolist() == [[-1.0, -2.0, -3.0]]
    write_json(tmp_path / FACTORS_NAME, {"x": entry | {"transposed": True}})
    factors = AdapterFactors(tmp_path)
    assert factors.shape("x") == (3, 2)
    assert factors.rows("x", 1, 3).tolist() == [[1.0, -2.0], [1.5, -3.0]]


def test_adapter_update_is_the_dense_product(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", rank=3, scaling=1.5)
    update = AdapterUpdate(adapter)
    assert update.names == ("a.weight", "b.weight")
    for name in update.names:
        assert update.shape(name) == SHAPES[name]
        expected = dense(adapter, name, scaling=1.5)
        torch.testing.assert_close(update.rows(name, 0, SHAPES[name][0]), expected, rtol=0, atol=1e-6)
        rows = torch.cat([update.rows(name, i, i + 1) for i in range(SHAPES[name][0])])
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)


def test_adapter_update_takes_the_start_factors_off(tmp_path: Path) -> None:
    start, end = make_adapter(tmp_path / "s", "s"), make_adapter(tmp_path / "e", "e")
    update = AdapterUpdate(end, start)
    expected = dense(end, "a.weight") - dense(start, "a.weight")
    torch.testing.assert_close(update.rows("a.weight", 1, 5), expected[1:5], rtol=0, atol=1e-6)
    unchanged = AdapterUpdate(end, end)
    assert not unchanged.rows("a.weight", 0, 6).any()


def test_adapter_update_is_float32_for_factors_in_bfloat16(tmp_path: Path) -> None:
    a, b = draw("a", shape=(2, 4)).bfloat16(), draw("b", shape=(6, 2)).bfloat16()
    write_tensors(tmp_path / ADAPTER_WEIGHTS_NAME, {"A": a, "B": b})
    write_json(tmp_path / FACTORS_NAME, {"x": {"lora_a": "A", "lora_b": "B", "scaling": 1.0, "transposed": False}})
    rows = AdapterUpdate(tmp_path).rows("x", 0, 6)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, b.float() @ a.float(), rtol=0, atol=1e-6)


def test_model_update_is_the_models_difference(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trained = {name: base.read(name) + draw("full", name, shape=shape) for name, shape in SHAPES.items()}
    write_tensors(tmp_path / "full" / "model.safetensors", trained)
    start = {"a.weight": draw("start", shape=SHAPES["a.weight"])}
    write_tensors(tmp_path / "start.safetensors", start)
    fresh = ModelUpdate(tmp_path / "full", base, None)
    later = ModelUpdate(tmp_path / "full", base, StoredTaskVector(tmp_path / "start.safetensors"))
    assert fresh.names == tuple(sorted(SHAPES))
    for name in SHAPES:
        expected = trained[name] - base.read(name)
        assert torch.equal(fresh.rows(name, 0, SHAPES[name][0]), expected)
        less_start = (expected - start.get(name, torch.tensor(0.0)))[1:3]
        for _ in range(2):  # reading must not change what is read
            torch.testing.assert_close(later.rows(name, 1, 3), less_start, rtol=0, atol=1e-6)


def test_stored_task_vector_has_only_what_changed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "v.safetensors", {"a.weight": torch.ones(6, 4)})
    stored = StoredTaskVector(tmp_path / "v.safetensors")
    assert stored.names == ("a.weight",)
    assert "b.weight" not in stored
    assert stored.rows("a.weight", 2, 4).sum() == 8


def test_adapter_factors_refuse_a_table_that_names_absent_weights(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", names=("a.weight",))
    entry = {"lora_a": "gone.A", "lora_b": "a.weight.B", "scaling": 1.0, "transposed": False}
    write_json(adapter / FACTORS_NAME, {"a.weight": entry})
    with pytest.raises(ModelError, match=r"factors.json names 'gone.A' for 'a.weight'"):
        AdapterFactors(adapter)
    (adapter / FACTORS_NAME).unlink()
    with pytest.raises(RunFolderError, match=r"factors\.json: no such file"):
        AdapterFactors(adapter)
