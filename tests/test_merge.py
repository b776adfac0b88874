"""Merging the experts of a round: values by hand, streaming, order, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from manyshot import kernels, stream
from manyshot.engine import Piece, cut
from manyshot.errors import MergeError, ModelError
from manyshot.operators import Dare, Mean, Metis, Operator, Ties, Tile, TsvM, tile_key
from manyshot.outer import Outer
from manyshot.reading import TaskVectorReader
from manyshot.round_merge import MergeReport, merge_weights
from manyshot.task_vector import AdapterUpdate, ModelUpdate, StoredTaskVector, Update
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import SHAPES, Dense, dense, draw, make_adapter, make_base

TASKS = ("x", "y", "z")
WEIGHTS = (0.5, 0.3, 0.2)


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
    update = ModelUpdate(tmp_path / "expert")
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


def test_merge_weights_reference_start_votes_on_the_update_and_leaves_earlier_rounds_alone(
    base: Checkpoint, tmp_path: Path
) -> None:
    """Θʳ = Θʳ⁻¹ + m̄(u) ⊙ Σ α u: where this round's updates disagree, what the start holds stays as it is."""
    start = torch.tensor([8.0, 8.0, 8.0, 8.0])
    write_tensors(tmp_path / "start.safetensors", {"norm.weight": start})
    stored = StoredTaskVector(tmp_path / "start.safetensors")
    # δ = 0.5, k = 2: (4, 4) and (4, 2) agree, (4, 1) and (4, 0) do not
    updates = [Dense(norm_weight=torch.tensor(v)) for v in ([4.0, 4.0, 4.0, 4.0], [4.0, 2.0, 1.0, 0.0])]
    for operator, expected in (
        (Metis(mask_threshold=0.5), [12.0, 11.0, 8.0, 8.0]),
        (Metis(mask_threshold=0.5, mask="soft"), [12.0, 11.0, 9.25, 9.0]),
        (Metis(mask_threshold=0.5, vote="unweighted", scaling=0.5), [10.0, 9.5, 8.0, 8.0]),
    ):
        output = tmp_path / "v.safetensors"
        found, _ = merged_of(base, updates, output, operator, [0.5, 0.5], start=stored, reference="start")
        assert found["norm.weight"].tolist() == expected
    # with reference pretrained the votes are on (12, 12), (12, 10), (12, 9) and (12, 8): all of them agree
    found, _ = merged_of(base, updates, tmp_path / "p", Metis(mask_threshold=0.5), [0.5, 0.5], start=stored)
    assert found["norm.weight"].tolist() == [12.0, 11.0, 10.5, 10.0]


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
    update = ModelUpdate(tmp_path / "full")
    found, _ = merged_of(base, [update], tmp_path / "v.safetensors", weights=[1.0])
    assert found["scale"].shape == ()
    assert found["scale"].item() == 1.0
    assert found["empty"].shape == (0, 3)


def test_merge_weights_leaves_integer_tensors_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "b", {"steps": torch.tensor([1, 2])})
    update = Dense(steps=torch.tensor([5, 5]), norm_weight=torch.ones(4))
    found, _ = merged_of(base, [update], tmp_path / "v.safetensors", weights=[1.0])
    assert set(found) == {"norm.weight"}


# ---- merge_weights: the outer optimizer ------------------------------------------------------------------------------


def stored(file: Path, *values: float, name: str = "norm.weight") -> StoredTaskVector:
    write_tensors(file, {name: torch.tensor(values)})
    return StoredTaskVector(file)


@pytest.fixture
def started(tmp_path: Path) -> dict[str, StoredTaskVector]:
    """Θ¹ − Θ⁰ as `start`, and Θ⁰ + something as Θ⁰'s successor before it."""
    return {
        "start": stored(tmp_path / "start", 1.0, 0.0, -1.0, 2.0),
        "before": stored(tmp_path / "before", 0.5, 0.0, -0.5, 1.0),
    }


MEAN_IS_0120 = [[1.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 3.0, 0.0]]


@pytest.mark.parametrize(
    ("step_size", "momentum", "expected"),
    [
        (1.0, 0.0, [1.0, 1.0, 1.0, 2.0]),  # Θ¹ + M(u): ATM
        (0.5, 0.0, [1.0, 0.5, 0.0, 2.0]),
        (2.0, 0.0, [1.0, 2.0, 3.0, 2.0]),
        (1.0, 0.5, [1.25, 1.0, 0.75, 2.5]),  # + ½ · (Θ¹ − Θ⁰ − before) = ½ · (½, 0, −½, 1)
        (0.5, 0.25, [1.125, 0.5, -0.125, 2.25]),
    ],
)
def test_outer_optimizer_by_hand(
    step_size: float,
    momentum: float,
    expected: list[float],
    started: dict[str, StoredTaskVector],
    base: Checkpoint,
    tmp_path: Path,
) -> None:
    """Θ² = Θ¹ + step_size · M(u) + momentum · (Θ¹ − Θ⁰ − (Θ⁰' − Θ⁰))."""
    updates = [Dense(norm_weight=torch.tensor(values)) for values in MEAN_IS_0120]
    outer = Outer(step_size, momentum, started["before"])
    options = {"start": started["start"], "reference": "start", "outer": outer}
    found, report = merged_of(base, updates, tmp_path / "v", weights=[0.5, 0.5], **options)
    assert found["norm.weight"].tolist() == expected
    moved = torch.tensor(expected) - torch.tensor([1.0, 0.0, -1.0, 2.0])
    assert report.update_norm == pytest.approx(float(moved.norm()))
    assert report.merged_norm == pytest.approx(float(torch.tensor(expected).norm()))


def test_outer_optimizer_goes_on_with_tensors_that_nobody_touches_now(
    started: dict[str, StoredTaskVector], base: Checkpoint, tmp_path: Path
) -> None:
    update = Dense(a_weight=torch.ones(6, 4))
    for before, expected in ((started["before"], [1.25, 0.0, -1.25, 2.5]), (None, [1.5, 0.0, -1.5, 3.0])):
        options = {"start": started["start"], "reference": "start", "outer": Outer(0.5, 0.5, before)}
        found, _ = merged_of(base, [update], tmp_path / "v", weights=[1.0], **options)
        assert found["norm.weight"].tolist() == expected
        assert found["a.weight"].unique().tolist() == [0.5]  # it had not moved before: no momentum


def test_outer_optimizer_of_the_first_round_is_the_step_alone(base: Checkpoint, tmp_path: Path) -> None:
    updates = [Dense(norm_weight=torch.tensor(values)) for values in MEAN_IS_0120]
    options = {"reference": "start", "outer": Outer(0.5, 0.9)}
    found, _ = merged_of(base, updates, tmp_path / "v", weights=[0.5, 0.5], **options)
    assert found["norm.weight"].tolist() == [0.0, 0.5, 1.0, 0.0]


# ---- merge_weights: streaming, order, determinism --------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 5, 9, 24])
@pytest.mark.parametrize("operator", [Mean(), Metis()], ids=lambda operator: operator.name)
def test_merge_weights_in_tiles_gives_the_bits_of_the_whole(
    operator: Operator, entries: int, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [Dense(**{"a_weight": draw(t, shape=(6, 4)), "norm_weight": draw(t, "n", shape=(4,))}) for t in TASKS]
    merged_of(base, updates, tmp_path / "whole.safetensors", operator)
    monkeypatch.setattr(stream, "tile_entries", lambda num_tasks: entries)
    _, report = merged_of(base, updates, tmp_path / "tiles.safetensors", operator)
    assert (tmp_path / "tiles.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert report.num_changed == 28


@pytest.mark.parametrize("entries", [1, 5, 9])
def test_merge_weights_in_pieces_gives_the_bits_of_the_whole_for_adapters(
    entries: int, base: Checkpoint, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [AdapterUpdate(a) for a in adapters]
    merged_of(base, updates, tmp_path / "whole.safetensors", Metis())
    monkeypatch.setattr(stream, "PIECE_ENTRIES", entries)
    monkeypatch.setattr(stream, "tile_entries", lambda num_tasks: entries)
    merged_of(base, updates, tmp_path / "parts.safetensors", Metis())
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("reference", ["pretrained", "start"])
@pytest.mark.parametrize(
    "operator",
    [Mean(), Metis(), Ties(density=0.4), Ties(trim_scope="model"), Dare(), TsvM()],
    ids=lambda operator: operator.name,
)
def test_merge_weights_from_a_start_has_the_same_bits_compiled_or_not(
    operator: Operator, reference: str, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model, an adapter and an adapter that started from factors; a start for two of three tensors."""
    write_tensors(
        tmp_path / "s", {name: draw("start", name, shape=SHAPES[name]) for name in ("a.weight", "norm.weight")}
    )
    write_tensors(
        tmp_path / "full", {name: draw("full", name, shape=shape).bfloat16() for name, shape in SHAPES.items()}
    )
    adapter, start = (make_adapter(tmp_path / task, task) for task in ("end", "start"))
    updates = [ModelUpdate(tmp_path / "full"), AdapterUpdate(adapter), AdapterUpdate(adapter, start)]
    outputs: list[bytes] = []
    for chosen in (updates, updates[:2]):  # the compiled kernels do not take a start of factors

        def merge(chosen: list[Update] = chosen, **options: object) -> None:
            begun = {"start": StoredTaskVector(tmp_path / "s"), "reference": reference}
            merged_of(base, chosen, tmp_path / "v", operator, WEIGHTS[: len(chosen)], **begun, **options)
            outputs.append((tmp_path / "v").read_bytes())

        merge()
        merge(threads=3)
        with monkeypatch.context() as patch:
            patch.setattr(stream, "PIECE_ENTRIES", 7)
            patch.setattr(stream, "tile_entries", lambda num_tasks: 5)
            patch.setattr(stream, "CACHE_ENTRIES", 0)
            merge(threads=2)
            patch.setattr(TaskVectorReader, "compiled_input", lambda self, name: None)
            merge()
            patch.setattr(kernels._native, "CALL", {})
            merge()
        assert len(set(outputs)) == 1
        outputs.clear()


def test_cut_covers_every_entry_once() -> None:
    assert cut("t", (7, 4), 10) == [Piece("t", 0, 10), Piece("t", 10, 20), Piece("t", 20, 28)]
    assert cut("t", (23,), 23) == [Piece("t", 0, 23)]
    assert cut("t", (23,), 22) == [Piece("t", 0, 22), Piece("t", 22, 23)]
    assert cut("t", (), 10) == [Piece("t", 0, 1)]
    assert cut("t", (0, 3), 10) == []


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


def test_merge_weights_gives_operators_keys_per_seed_task_and_tensor_and_the_offset(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noise(Mean):
        def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
            return tile.uniform(0, task_vectors_TP.shape[1]) + 2 * tile.uniform(1, task_vectors_TP.shape[1])

        def operation(self) -> None:
            return None

    monkeypatch.setattr(stream, "tile_entries", lambda num_tasks: 7)
    pair = [Dense(a_weight=torch.ones(6, 4), b_weight=torch.ones(4, 6))] * 2
    one, _ = merged_of(base, pair, tmp_path / "1.safetensors", Noise(), [1.0, 1.0], seed_parts=(0, "operator", 1))
    two, _ = merged_of(base, pair, tmp_path / "2.safetensors", Noise(), [1.0, 1.0], seed_parts=(0, "operator", 2))
    keys = tuple(tile_key(0, "operator", 1, task, "a.weight") for task in TASKS[:2])
    whole = Tile(keys)
    assert whole == Tile.of(TASKS[:2], "a.weight", seed=0, round_index=1)
    assert torch.equal(one["a.weight"].reshape(-1), whole.uniform(0, 24) + 2 * whole.uniform(1, 24))
    assert not torch.equal(whole.uniform(0, 24), whole.uniform(1, 24))
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
