"""Merging tensors in streams, and the model folder that comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyshot import merge
from manyshot.errors import MergeError, ModelError, RunFolderError
from manyshot.merge import (
    MergeReport,
    average_adapters,
    expand_adapter,
    export_model,
    merge_factors,
    merge_weights,
    tiles,
    truncate_to_adapter,
)
from manyshot.operators import Mean, Metis, Operator
from manyshot.rundir import write_json
from manyshot.seeding import make_generator
from manyshot.task_vector import FACTORS_NAME, AdapterFactors, AdapterUpdate, ModelUpdate, StoredTaskVector, Update
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import SHAPES, dense, draw, make_adapter, make_base

TASKS = ("x", "y", "z")
WEIGHTS = (0.5, 0.3, 0.2)


class Dense:
    """An update that holds its tensors: what a test computes by hand."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
        self.names = tuple(sorted(self.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name][start:stop].clone()


def merged_of(
    base: Checkpoint,
    updates: Sequence[Update],
    output: Path,
    operator: Operator | None = None,
    weights: Sequence[float] = WEIGHTS,
    **options: object,
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    tasks = TASKS[: len(updates)]
    start = options.pop("start", None)
    report = merge_weights(base, start, tasks, updates, operator or Mean(), weights, output, **options)  # type: ignore[arg-type]
    return load_file(output), report


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [make_adapter(tmp_path / task, task) for task in TASKS]


# ---- merge_weights: values -------------------------------------------------------------------------------------------


def test_merge_weights_of_one_task_with_weight_one_gives_the_expert_back(base: Checkpoint, tmp_path: Path) -> None:
    expert = {name: base.read(name) + draw("expert", name, shape=shape) for name, shape in SHAPES.items()}
    write_tensors(tmp_path / "expert" / "model.safetensors", expert)
    update = ModelUpdate(tmp_path / "expert", base, None)
    found, report = merged_of(base, [update], tmp_path / "v.safetensors", weights=[1.0])
    for name, tensor in expert.items():
        assert torch.equal(found[name], tensor - base.read(name))
        torch.testing.assert_close(base.read(name) + found[name], tensor, rtol=0, atol=3e-7)
    assert report.kept_share == 1.0


def test_merge_weights_expands_adapters_to_the_dense_mean(
    base: Checkpoint, adapters: list[Path], tmp_path: Path
) -> None:
    found, _ = merged_of(base, [AdapterUpdate(a) for a in adapters], tmp_path / "v.safetensors")
    assert set(found) == {"a.weight", "b.weight"}
    for name, tensor in found.items():
        expected = sum(w * dense(a, name) for w, a in zip(WEIGHTS, adapters, strict=True))
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_merge_weights_by_hand_with_metis(base: Checkpoint, tmp_path: Path) -> None:
    # w = v/2 and δ = 0.5, k = 2: (4, 4) and (4, 2) agree, (4, 1) does not; nobody touches the fourth
    one, two = (Dense(norm_weight=torch.tensor(v)) for v in ([4.0, 4.0, 4.0, 0.0], [4.0, 2.0, 1.0, 0.0]))
    found, report = merged_of(
        base, [one, two], tmp_path / "v.safetensors", Metis(mask_threshold=0.5), weights=[0.5, 0.5]
    )
    assert found["norm.weight"].tolist() == [4.0, 3.0, 0.0, 0.0]
    assert (report.num_changed, report.num_kept) == (3, 2)
    assert report.kept_share == pytest.approx(2 / 3)
    assert report.kept_by_tensor == {"norm.weight": pytest.approx(2 / 3)}
    assert report.merged_norm == pytest.approx(5.0)
    record = report.to_json()
    assert record["task_vector_norms"] == {"x": pytest.approx(48**0.5), "y": pytest.approx(21**0.5)}
    assert record["task_vector_cosines"][0][1] == pytest.approx(28 / (48 * 21) ** 0.5)
    assert record["task_vector_cosines"][1][1] == pytest.approx(1.0)


def test_merge_weights_reference_pretrained_merges_the_start_too(base: Checkpoint, tmp_path: Path) -> None:
    start = torch.tensor([1.0, 0.0, -1.0, 2.0])
    write_tensors(tmp_path / "start.safetensors", {"norm.weight": start})
    updates = [Dense(norm_weight=torch.tensor(v)) for v in ([1.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 3.0, 0.0])]
    stored = StoredTaskVector(tmp_path / "start.safetensors")
    halved = Metis(mask_threshold=0.0, scaling=0.5)
    # v = start + u; Θʳ − Θ⁰ = ½ · mean(v) = ½ · (start + (0, 1, 2, 0))
    found, report = merged_of(base, updates, tmp_path / "v.safetensors", halved, [0.5, 0.5], start=stored)
    assert found["norm.weight"].tolist() == [0.5, 0.5, 0.5, 1.0]
    assert report.num_changed == 4
    # update norm: |merged − start| = |(−0.5, 0.5, 1.5, −1)|
    assert report.update_norm == pytest.approx((0.25 + 0.25 + 2.25 + 1.0) ** 0.5)


def test_merge_weights_reference_start_scales_the_update_only(base: Checkpoint, tmp_path: Path) -> None:
    start = torch.tensor([1.0, 0.0, -1.0, 2.0])
    write_tensors(tmp_path / "start.safetensors", {"norm.weight": start})
    updates = [Dense(norm_weight=torch.tensor(v)) for v in ([1.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 3.0, 0.0])]
    stored = StoredTaskVector(tmp_path / "start.safetensors")
    halved = Metis(mask_threshold=0.0, scaling=0.5)
    found, report = merged_of(
        base, updates, tmp_path / "v.safetensors", halved, [0.5, 0.5], start=stored, reference="start"
    )
    assert found["norm.weight"].tolist() == [1.0, 0.5, 0.0, 2.0]  # start + ½ · (0, 1, 2, 0)
    assert report.num_changed == 3


def test_merge_weights_references_agree_for_the_mean(base: Checkpoint, adapters: list[Path], tmp_path: Path) -> None:
    write_tensors(tmp_path / "s.safetensors", {n: draw("s", n, shape=SHAPES[n]) for n in ("a.weight", "norm.weight")})
    stored, updates = StoredTaskVector(tmp_path / "s.safetensors"), [AdapterUpdate(a) for a in adapters]
    one, _ = merged_of(base, updates, tmp_path / "1.safetensors", start=stored)
    two, _ = merged_of(base, updates, tmp_path / "2.safetensors", start=stored, reference="start")
    assert set(one) == set(two) == set(SHAPES)  # what the start changed and nobody now touches stays
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_merge_weights_lets_experts_differ_in_rank_and_tensors(base: Checkpoint, tmp_path: Path) -> None:
    wide = make_adapter(tmp_path / "w", "w", rank=4, scaling=0.5)
    narrow = make_adapter(tmp_path / "n", "n", rank=1, scaling=2.0, names=("b.weight",))
    found, report = merged_of(
        base, [AdapterUpdate(wide), AdapterUpdate(narrow)], tmp_path / "v.safetensors", weights=[0.5, 0.5]
    )
    torch.testing.assert_close(found["a.weight"], 0.5 * dense(wide, "a.weight", scaling=0.5), rtol=1e-6, atol=1e-6)
    both = 0.5 * dense(wide, "b.weight", scaling=0.5) + 0.5 * dense(narrow, "b.weight", scaling=2.0)
    torch.testing.assert_close(found["b.weight"], both, rtol=1e-6, atol=1e-6)
    assert report.num_changed == 48


def test_merge_weights_expands_transposed_factors_to_the_stored_shape(base: Checkpoint, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", names=("a.weight",), transposed=("a.weight",))
    found, _ = merged_of(base, [AdapterUpdate(adapter)], tmp_path / "v.safetensors", weights=[1.0])
    assert found["a.weight"].shape == (6, 4)
    torch.testing.assert_close(found["a.weight"], dense(adapter, "a.weight").T, rtol=1e-6, atol=1e-6)


def test_merge_weights_takes_scalar_and_empty_tensors(tmp_path: Path) -> None:
    base = make_base(tmp_path / "b", {"scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)})
    trained = {name: base.read(name) + 1 for name in base.names}
    write_tensors(tmp_path / "full" / "model.safetensors", trained)
    update = ModelUpdate(tmp_path / "full", base, None)
    found, _ = merged_of(base, [update], tmp_path / "v.safetensors", weights=[1.0])
    assert found["scale"].shape == ()
    assert found["scale"].item() == 1.0
    assert found["empty"].shape == (0, 3)


def test_merge_weights_leaves_integer_tensors_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "b", {"steps": torch.tensor([1, 2])})
    update = Dense(steps=torch.tensor([5, 5]), norm_weight=torch.ones(4))
    found, _ = merged_of(base, [update], tmp_path / "v.safetensors", weights=[1.0])
    assert set(found) == {"norm.weight"}


# ---- merge_weights: streaming, order, determinism --------------------------------------------------------------------


@pytest.mark.parametrize("tile_entries", [1, 5, 9, 24])
@pytest.mark.parametrize("operator", [Mean(), Metis()], ids=lambda operator: operator.name)
def test_merge_weights_in_tiles_gives_the_bits_of_the_whole(
    operator: Operator, tile_entries: int, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [Dense(**{"a_weight": draw(t, shape=(6, 4)), "norm_weight": draw(t, "n", shape=(4,))}) for t in TASKS]
    merged_of(base, updates, tmp_path / "whole.safetensors", operator)
    monkeypatch.setattr(merge, "TILE_ENTRIES", tile_entries)
    _, report = merged_of(base, updates, tmp_path / "tiles.safetensors", operator)
    assert (tmp_path / "tiles.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert report.num_changed == 28


def test_merge_weights_in_tiles_agrees_for_adapters(
    base: Checkpoint, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [AdapterUpdate(a) for a in adapters]
    whole, _ = merged_of(base, updates, tmp_path / "whole.safetensors", Metis())
    monkeypatch.setattr(merge, "TILE_ENTRIES", 4)
    parts, _ = merged_of(base, updates, tmp_path / "tiles.safetensors", Metis())
    for name in whole:  # a BLAS product may round differently for other numbers of rows
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_tiles_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "TILE_ENTRIES", 10)
    assert list(tiles((7, 4))) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(tiles((2, 100))) == [(0, 1), (1, 2)]
    assert list(tiles((23,))) == [(0, 10), (10, 20), (20, 23)]
    assert list(tiles(())) == [(0, 1)]
    assert list(tiles((0, 3))) == []


def test_merge_weights_does_not_depend_on_task_order(base: Checkpoint, adapters: list[Path], tmp_path: Path) -> None:
    updates = [AdapterUpdate(a) for a in adapters]
    for operator in (Mean(), Metis(mask_threshold=0.1)):
        one, report = merged_of(base, updates, tmp_path / "1.safetensors", operator)
        two, reversed_report = merged_of(base, updates[::-1], tmp_path / "2.safetensors", operator, WEIGHTS[::-1])
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
        assert report.num_kept == reversed_report.num_kept


def test_merge_weights_twice_gives_equal_bytes_and_leaves_inputs_alone(
    base: Checkpoint, adapters: list[Path], tmp_path: Path
) -> None:
    files = [file for folder in (base.path, *adapters) for file in sorted(folder.iterdir())]
    before = [file.read_bytes() for file in files]
    for name in ("1", "2"):
        merged_of(base, [AdapterUpdate(a) for a in adapters], tmp_path / f"{name}.safetensors", Metis())
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert [file.read_bytes() for file in files] == before


def test_merge_weights_gives_operators_a_generator_per_seed_and_tensor(base: Checkpoint, tmp_path: Path) -> None:
    class Noise(Mean):
        def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, generator: torch.Generator):  # type: ignore[no-untyped-def]
            return torch.rand(task_vectors_TP.shape[1], generator=generator)

    update = Dense(a_weight=torch.ones(6, 4), b_weight=torch.ones(4, 6))
    one, _ = merged_of(base, [update], tmp_path / "1.safetensors", Noise(), [1.0], seed_parts=(0, "operator", 1))
    two, _ = merged_of(base, [update], tmp_path / "2.safetensors", Noise(), [1.0], seed_parts=(0, "operator", 2))
    expected = torch.rand(24, generator=make_generator(0, "operator", 1, "a.weight")).reshape(6, 4)
    assert torch.equal(one["a.weight"], expected)
    assert not torch.equal(one["a.weight"].reshape(-1), one["b.weight"].reshape(-1))
    assert not torch.equal(one["a.weight"], two["a.weight"])


@settings(deadline=None, database=None, derandomize=True, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 1.5), st.integers(1, 3))
def test_merge_weights_kept_share_is_a_share(
    tmp_path_factory: pytest.TempPathFactory, seed: int, threshold: float, k: int
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    base = make_base(folder / "base")
    updates = [Dense(a_weight=draw(t, seed, shape=(6, 4)).round()) for t in TASKS]
    changed = int(torch.stack([update.tensors["a.weight"] != 0 for update in updates]).any(0).sum())
    try:
        found, report = merged_of(base, updates, folder / "v", Metis(mask_threshold=threshold, min_agreement=k))
    except MergeError:
        assert not (folder / "v").exists()
        return
    assert report.num_changed == changed
    assert report.num_kept == int((found["a.weight"] != 0).sum())
    assert 0 < report.kept_share <= 1


# ---- merge_weights: refusals -----------------------------------------------------------------------------------------


def test_merge_weights_refuses_a_tensor_that_the_base_lacks(base: Checkpoint, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", names=("c.weight",), shapes={"c.weight": (2, 2)})
    with pytest.raises(ModelError, match=r"task 'y': its expert changes tensor 'c\.weight', which .*base does not"):
        merged_of(base, [Dense(norm_weight=torch.ones(4)), AdapterUpdate(adapter)], tmp_path / "v", weights=[0.5, 0.5])


def test_merge_weights_refuses_another_shape_and_names_both(base: Checkpoint, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "t", "t", names=("a.weight",), shapes={"a.weight": (6, 5)})
    with pytest.raises(ModelError, match=r"task 'x': tensor 'a\.weight' has shape \(6, 5\), the base .* has \(6, 4\)"):
        merged_of(base, [AdapterUpdate(adapter)], tmp_path / "v", weights=[1.0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "t"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operator", [Mean(), Metis(), Metis(mask_threshold=0.0)], ids=["mean", "metis", "no mask"])
def test_merge_weights_refuses_nan_even_where_a_mask_would_hide_it(
    operator: Operator, bad: float, base: Checkpoint, tmp_path: Path
) -> None:
    good, broken = torch.ones(4), torch.ones(4)
    broken[2] = bad
    with pytest.raises(MergeError, match=r"task 'y', tensor 'norm\.weight': the expert holds NaN or Inf"):
        merged_of(
            base, [Dense(norm_weight=good), Dense(norm_weight=broken)], tmp_path / "v", operator, weights=[0.5, 0.5]
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_merge_weights_refuses_an_operator_that_overflows(base: Checkpoint, tmp_path: Path) -> None:
    huge = Dense(norm_weight=torch.full((4,), 3e38))
    with pytest.raises(MergeError, match=r"tensor 'norm\.weight': the merged task vector holds NaN or Inf"):
        merged_of(base, [huge, huge], tmp_path / "v", Mean(), weights=[1.0, 1.0])


def test_merge_weights_refuses_a_mask_that_keeps_nothing_and_leaves_no_file(base: Checkpoint, tmp_path: Path) -> None:
    disjoint = [Dense(norm_weight=torch.tensor(v)) for v in ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])]
    with pytest.raises(MergeError) as caught:
        merged_of(base, disjoint, tmp_path / "v", Metis(), weights=[0.999, 0.001])
    for part in ("keeps no coordinate", "x 0.999, y 0.001", "raise operator.temperature", "operator.mask_threshold"):
        assert part in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_merge_weights_of_experts_that_changed_nothing_is_zero_and_no_error(base: Checkpoint, tmp_path: Path) -> None:
    found, report = merged_of(base, [Dense(norm_weight=torch.zeros(4))], tmp_path / "v", weights=[1.0])
    assert not found["norm.weight"].any()
    assert report.kept_share == 0.0
    assert report.to_json()["task_vector_cosines"] == [[0.0]]


def test_merge_weights_replaces_an_older_file_only_when_it_succeeds(base: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "v"
    merged_of(base, [Dense(norm_weight=torch.ones(4))], output, weights=[1.0])
    before = output.read_bytes()
    with pytest.raises(MergeError):
        merged_of(base, [Dense(norm_weight=torch.full((4,), torch.nan))], output, weights=[1.0])
    assert output.read_bytes() == before


# ---- factors and adapters --------------------------------------------------------------------------------------------


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


# ---- export_model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(base_folder: Path, tmp_path: Path) -> StoredTaskVector:
    """A task vector on one projection of the tiny Llama."""
    name = "model.layers.0.self_attn.q_proj.weight"
    write_tensors(tmp_path / "v.safetensors", {name: draw("export", shape=(32, 32)) * 0.01})
    return StoredTaskVector(tmp_path / "v.safetensors")


def test_export_model_accounts_for_every_base_tensor(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert found.names == base.names
    assert "lm_head.weight" not in found.names  # tied: stored once, as in the base
    for name in base.names:
        expected = base.read(name) + changed.read(name) if name in changed else base.read(name)
        assert torch.equal(found.read(name), expected), name


def test_export_model_is_read_by_transformers_and_ties_embeddings(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    export_model(Checkpoint(base_folder), changed, tmp_path / "out", shard_bytes=10_000)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(str(base_folder))
    name = changed.names[0]
    assert torch.equal(model.get_parameter(name), plain.get_parameter(name) + changed.read(name))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(str(base_folder)).chat_template


def test_export_model_writes_shards_and_their_index(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(index["weight_map"]) == list(base.names)
    assert index["metadata"]["total_size"] == base.num_bytes
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)


def test_export_model_copies_side_files_byte_for_byte_and_no_weights(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in base_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "model.gguf", "README.md", ".hidden", "pytorch_model.bin.index.json"):
        (source / name).write_bytes(b"not to be copied")
    (source / "added_tokens.json").write_bytes(b'{ "odd" :\t1}\r\n')
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    export_model(Checkpoint(source), changed, tmp_path / "out")
    kept = {file.name for file in base_folder.iterdir()} | {"added_tokens.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept
    for name in kept - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_export_model_casts_floats_once_and_says_so_in_the_config(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out", dtype=torch.bfloat16)
    found = Checkpoint(tmp_path / "out")
    name = changed.names[0]
    assert {found.info(name).dtype for name in found.names} == {torch.bfloat16}
    assert torch.equal(found.read(name), (base.read(name) + changed.read(name)).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto").dtype == torch.bfloat16


def test_export_model_adds_in_float32_to_a_bfloat16_base(tmp_path: Path) -> None:
    # the bfloat16 neighbours 1 and 1 + 2⁻⁷ meet at 1 + 2⁻⁸: a sum just above goes up, but with the task vector cast to
    # bfloat16 first (2⁻⁸ exactly) it would be a tie and go down to the even 1
    (tmp_path / "base").mkdir()
    write_tensors(tmp_path / "base" / "model.safetensors", {"w": torch.ones(4).bfloat16()})
    write_json(tmp_path / "base" / "config.json", {})
    write_tensors(tmp_path / "v.safetensors", {"w": torch.full((4,), 2**-8 + 2**-18)})
    export_model(Checkpoint(tmp_path / "base"), StoredTaskVector(tmp_path / "v.safetensors"), tmp_path / "out")
    assert Checkpoint(tmp_path / "out").read("w").tolist() == [1 + 2**-7] * 4


def test_export_model_copies_tensors_that_are_not_floats(tmp_path: Path) -> None:
    extra = {"ids": torch.arange(5), "flags": torch.tensor([True, False]), "scalar": torch.tensor(3.0)}
    base = make_base(tmp_path / "base", extra)
    write_tensors(tmp_path / "v.safetensors", {"norm.weight": torch.ones(4)})
    export_model(base, StoredTaskVector(tmp_path / "v.safetensors"), tmp_path / "out", dtype=torch.float16)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["ids"], extra["ids"])
    assert torch.equal(found["flags"], extra["flags"])
    assert found["scalar"].dtype == torch.float16
    assert set(found) == set(base.names)


def test_export_model_leaves_nothing_when_it_fails(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "out", finish=fail)
    monkeypatch.setattr(merge, "require_space", lambda *args: (_ for _ in ()).throw(RunFolderError("disk full")))
    with pytest.raises(RunFolderError, match="disk full"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_export_model_refuses_what_the_disk_cannot_hold(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("manyshot.rundir.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(RunFolderError, match=r"the merged model needs 0\.00 GB, the disk has 0\.00 GB free"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_export_model_twice_gives_equal_bytes(base_folder: Path, changed: StoredTaskVector, tmp_path: Path) -> None:
    for name in ("1", "2"):
        export_model(Checkpoint(base_folder), changed, tmp_path / name, shard_bytes=20_000)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_factors_table_of_a_merged_adapter_is_the_first_ones(adapters: list[Path], tmp_path: Path) -> None:
    merge_factors(TASKS, adapters, Mean(), WEIGHTS, tmp_path / "m")
    assert (tmp_path / "m" / FACTORS_NAME).read_bytes() == (adapters[0] / FACTORS_NAME).read_bytes()
