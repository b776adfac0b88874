"""Adapter folders made from others: merged factors, averages, the best low-rank part, and s·B·A as a dense file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manyshot.adapters import average_adapters, expand_adapter, truncate_to_adapter
from manyshot.errors import MergeError, ModelError
from manyshot.operators import Mean, Metis
from manyshot.round_merge import merge_factors
from manyshot.task_vector import FACTORS_NAME, AdapterFactors, StoredTaskVector
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import dense, draw, make_adapter, make_base

TASKS = ("x", "y", "z")
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [make_adapter(tmp_path / task, task) for task in TASKS]


def test_merge_factors_merges_a_and_b_entry_by_entry(base: Checkpoint, adapters: list[Path], tmp_path: Path) -> None:
    report = merge_factors(TASKS, adapters, Mean(), WEIGHTS, tmp_path / "m")
    sources = [AdapterFactors(adapter).weights for adapter in adapters]
    merged = AdapterFactors(tmp_path / "m")
    for name in sources[0].names:
        expected = sum(w * source.read(name) for w, source in zip(WEIGHTS, sources, strict=True))
        torch.testing.assert_close(merged.weights.read(name), expected, rtol=1e-6, atol=1e-6)
    assert report.num_changed == 2 * (2 * 6 + 2 * 4)
    # (ΣαB)(ΣαA) is not ΣαBA: the cross terms that METHOD.md speaks of
    expand_adapter(base, tmp_path / "m", tmp_path / "v.safetensors")
    exact = sum(w * dense(a, "a.weight") for w, a in zip(WEIGHTS, adapters, strict=True))
    assert (load_file(tmp_path / "v.safetensors")["a.weight"] - exact).norm() > 0.2 * exact.norm()


def test_merge_factors_of_equal_adapters_is_that_adapter(adapters: list[Path], tmp_path: Path) -> None:
    merge_factors(TASKS, [adapters[0]] * 3, Metis(), [0.25, 0.25, 0.5], tmp_path / "m")
    one, two = AdapterFactors(adapters[0]), AdapterFactors(tmp_path / "m")
    for name in one.weights.names:
        assert torch.equal(one.weights.read(name), two.weights.read(name))
    assert (tmp_path / "m" / "adapter_config.json").read_bytes() == (adapters[0] / "adapter_config.json").read_bytes()


def test_merge_factors_refuses_unequal_ranks_tensors_nan_and_an_empty_mask(
    adapters: list[Path], tmp_path: Path
) -> None:
    wide = make_adapter(tmp_path / "wide", "w", rank=3)
    fewer = make_adapter(tmp_path / "fewer", "f", names=("a.weight",))
    for other in (wide, fewer):
        for pair in ([adapters[0], other], [other, adapters[0]]):
            with pytest.raises(ModelError, match=r"factor '[ab]\.weight\.[AB]' differs .* space: factors needs equal"):
                merge_factors(TASKS[:2], pair, Mean(), [0.5, 0.5], tmp_path / "m")
    broken = make_adapter(tmp_path / "nan", "n")
    factors = load_file(broken / "adapter_model.safetensors")
    factors["a.weight.A"][0, 0] = torch.nan
    write_tensors(broken / "adapter_model.safetensors", factors)
    with pytest.raises(MergeError, match=r"task 'y', tensor 'a\.weight\.A': the expert holds NaN"):
        merge_factors(TASKS[:2], [adapters[0], broken], Metis(), [0.5, 0.5], tmp_path / "m")
    with pytest.raises(MergeError, match="keeps no coordinate"):
        merge_factors(TASKS[:2], adapters[:2], Metis(mask_threshold=1e6), [0.5, 0.5], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_expand_adapter_is_the_dense_product(base: Checkpoint, adapters: list[Path], tmp_path: Path) -> None:
    expand_adapter(base, adapters[0], tmp_path / "v.safetensors")
    for name, tensor in load_file(tmp_path / "v.safetensors").items():
        torch.testing.assert_close(tensor, dense(adapters[0], name), rtol=1e-6, atol=1e-6)


def test_average_adapters_averages_the_factors(adapters: list[Path], tmp_path: Path) -> None:
    average_adapters(adapters[:2], [0.25, 0.75], tmp_path / "avg")
    one, two = (AdapterFactors(a).weights.read("a.weight.A") for a in adapters[:2])
    found = AdapterFactors(tmp_path / "avg").weights.read("a.weight.A")
    torch.testing.assert_close(found, 0.25 * one + 0.75 * two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [(), ("a.weight",)])
def test_truncate_to_adapter_keeps_the_top_singular_vectors(transposed: tuple[str, ...], tmp_path: Path) -> None:
    like = make_adapter(tmp_path / "like", "like", rank=2, scaling=0.5, names=("a.weight",), transposed=transposed)
    matrix = draw("matrix", shape=(6, 4))
    write_tensors(tmp_path / "v.safetensors", {"a.weight": matrix})
    truncate_to_adapter(StoredTaskVector(tmp_path / "v.safetensors"), like, tmp_path / "cut")
    found = AdapterFactors(tmp_path / "cut")
    values = torch.linalg.svdvals(matrix)
    error = (matrix - found.rows("a.weight", 0, 6)).norm()
    assert float(error) == pytest.approx(float(values[2:].norm()), rel=1e-4)  # Eckart–Young: the best of rank 2
    assert found.shape("a.weight") == (6, 4)


def test_truncate_to_adapter_with_more_rank_than_the_tensor_is_exact(tmp_path: Path) -> None:
    like = make_adapter(tmp_path / "like", "like", rank=9, names=("a.weight",))
    write_tensors(tmp_path / "v.safetensors", {"a.weight": (matrix := draw("matrix", shape=(6, 4)))})
    truncate_to_adapter(StoredTaskVector(tmp_path / "v.safetensors"), like, tmp_path / "cut")
    found = AdapterFactors(tmp_path / "cut")
    shapes = [found.weights.info(name).shape for name in ("a.weight.A", "a.weight.B")]
    assert shapes == [(9, 4), (6, 9)]  # the shapes of the adapters that will start from it
    torch.testing.assert_close(found.rows("a.weight", 0, 6), matrix, rtol=1e-4, atol=1e-5)


def test_factors_table_of_a_merged_adapter_is_the_first_ones(adapters: list[Path], tmp_path: Path) -> None:
    merge_factors(TASKS, adapters, Mean(), WEIGHTS, tmp_path / "m")
    assert (tmp_path / "m" / FACTORS_NAME).read_bytes() == (adapters[0] / FACTORS_NAME).read_bytes()
