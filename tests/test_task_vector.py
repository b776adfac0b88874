"""Updates: s·B·A entry by entry, exact, for fresh and carried adapters, transposed layers and whole models."""

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
    Scratch,
    StoredTaskVector,
    Update,
    read_dense,
)
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import SHAPES, dense, draw, make_adapter, make_base


def entries(update: Update, name: str, start: int, stop: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """Entries start..stop of an update, read on their own."""
    out_P = torch.full((stop - start,), torch.nan)
    assert not update.read(name, start, None if before is None else before.reshape(-1)[start:stop], out_P, Scratch())
    return out_P


def assert_reads_like_the_whole(update: Update, name: str, before: torch.Tensor | None = None) -> None:
    """Every cut gives the bits of the whole tensor."""
    whole = read_dense(update, name, before).reshape(-1)
    for width in (1, 3, 5, len(whole)):
        parts = [entries(update, name, i, min(i + width, len(whole)), before) for i in range(0, len(whole), width)]
        assert torch.equal(torch.cat(parts), whole), width


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
        assert not update.is_dense(name)
        torch.testing.assert_close(read_dense(update, name), expected, rtol=0, atol=1e-6)
        assert_reads_like_the_whole(update, name)


def test_adapter_update_takes_the_start_factors_off(tmp_path: Path) -> None:
    start, end = make_adapter(tmp_path / "s", "s"), make_adapter(tmp_path / "e", "e")
    update = AdapterUpdate(end, start)
    expected = dense(end, "a.weight") - dense(start, "a.weight")
    torch.testing.assert_close(read_dense(update, "a.weight"), expected, rtol=0, atol=1e-6)
    assert_reads_like_the_whole(update, "a.weight")
    unchanged = AdapterUpdate(end, end)
    assert not read_dense(unchanged, "a.weight").any()


def test_adapter_update_is_float32_for_factors_in_bfloat16(tmp_path: Path) -> None:
    a, b = draw("a", shape=(2, 4)).bfloat16(), draw("b", shape=(6, 2)).bfloat16()
    write_tensors(tmp_path / ADAPTER_WEIGHTS_NAME, {"A": a, "B": b})
    write_json(tmp_path / FACTORS_NAME, {"x": {"lora_a": "A", "lora_b": "B", "scaling": 1.0, "transposed": False}})
    product = read_dense(AdapterUpdate(tmp_path), "x")
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, b.float() @ a.float(), rtol=0, atol=1e-6)


def test_model_update_is_the_models_difference(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    trained = {name: base.read(name) + draw("full", name, shape=shape) for name, shape in SHAPES.items()}
    write_tensors(tmp_path / "full" / "model.safetensors", trained)
    update = ModelUpdate(tmp_path / "full")
    assert update.names == tuple(sorted(SHAPES))
    for name in SHAPES:
        assert update.is_dense(name)
        for before in (base.read(name), base.read(name) + draw("start", name, shape=SHAPES[name])):
            for _ in range(2):  # reading must not change what is read
                assert torch.equal(read_dense(update, name, before), trained[name] - before)
            assert_reads_like_the_whole(update, name, before)
        assert torch.equal(read_dense(update, name), trained[name])  # Θ⁰ counts as zero where none is given


def test_model_update_subtracts_in_float32_from_every_stored_type(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        stored = {"w": draw(str(dtype), shape=(4, 3)).to(dtype)}
        write_tensors(tmp_path / str(dtype) / "model.safetensors", stored)
        before = draw("before", shape=(4, 3))
        assert torch.equal(read_dense(ModelUpdate(tmp_path / str(dtype)), "w", before), stored["w"].float() - before)


def test_model_update_reads_a_tensor_stored_under_another_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    update = ModelUpdate(base, {"tied.weight": "a.weight", "norm.weight": "norm.weight"})
    assert update.names == ("norm.weight", "tied.weight")
    assert update.shape("tied.weight") == (6, 4)
    assert torch.equal(read_dense(update, "tied.weight"), base.read("a.weight"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_updates_say_where_they_hold_nan_or_inf(bad: float, tmp_path: Path) -> None:
    tensor = draw("t", shape=(6, 4))
    tensor[3, 2] = bad
    write_tensors(tmp_path / "full" / "model.safetensors", {"w": tensor})
    update, out_P = ModelUpdate(tmp_path / "full"), torch.empty(4)
    found = [update.read("w", start, torch.zeros(4), out_P, Scratch()) for start in (0, 8, 12, 16, 20)]
    assert found == [False, False, True, False, False]
    adapter = make_adapter(tmp_path / "t", "t", names=("a.weight",))
    factors = Checkpoint(adapter / ADAPTER_WEIGHTS_NAME)
    factor = factors.read("a.weight.A").clone()
    factor[1, 2] = bad
    write_tensors(
        adapter / ADAPTER_WEIGHTS_NAME, {"a.weight.A": factor, "a.weight.B": factors.read("a.weight.B").clone()}
    )
    assert AdapterUpdate(adapter).read("a.weight", 0, None, out_P, Scratch())


def test_stored_task_vector_has_only_what_changed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "v.safetensors", {"a.weight": torch.ones(6, 4)})
    stored = StoredTaskVector(tmp_path / "v.safetensors")
    assert stored.names == ("a.weight",)
    assert "b.weight" not in stored
    stored.read_entries("a.weight", 8, out_P := torch.empty(8))
    assert out_P.sum() == 8
    assert torch.equal(stored.read("a.weight"), torch.ones(6, 4))


def test_adapter_factors_refuse_a_table_that_names_absent_weights(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", names=("a.weight",))
    entry = {"lora_a": "gone.A", "lora_b": "a.weight.B", "scaling": 1.0, "transposed": False}
    write_json(adapter / FACTORS_NAME, {"a.weight": entry})
    with pytest.raises(ModelError, match=r"factors.json names 'gone.A' for 'a.weight'"):
        AdapterFactors(adapter)
    (adapter / FACTORS_NAME).unlink()
    with pytest.raises(RunFolderError, match=r"factors\.json: no such file"):
        AdapterFactors(adapter)
