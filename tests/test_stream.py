"""The stream: the same bits whatever the cuts, threads, files and kernels, and they are those of the reference."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from manyshot import engine, kernels, merge_models, reading, stream
from manyshot.engine import Piece, TilePool, imports_frozen
from manyshot.errors import MergeError, ModelError
from manyshot.kernels import pieces
from manyshot.merge_models import MergeSettings
from manyshot.merge_report import MergeReport
from manyshot.operators import BUILT_IN, Dare, Mean, Metis, NormScan, Operator, OperatorPlan, Ties, Tile, tile_key
from manyshot.task_vector import Scratch
from merge_helpers import draw, make_peft_adapter, read_model, same_bits, write_model

TASKS = ("x", "y", "z")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
SHAPES = {"a.weight": (37, 29), "b.weight": (5, 7), "empty": (0, 3), "norm.weight": (61,), "scale": ()}
OPERATORS: dict[str, Operator] = {name: kind() for name, kind in BUILT_IN.items()} | {
    "dare then ties": Dare(then="ties", density=0.5),
    "ties of the model": Ties(trim_scope="model", density=0.3),
    "ties that trims nothing": Ties(density=1.0),
    "metis soft": Metis(mask="soft", vote="unweighted"),
    "metis rescaled": Metis(rescale="norm", mask_threshold=0.6),
    "metis soft rescaled": Metis(mask="soft", min_agreement=3, rescale="norm"),
}
WEIGHTS = (0.5, 0.3, 0.2)


def make_models(folder: Path, dtype: torch.dtype, shard_bytes: int = 1 << 30) -> dict[str, Path]:
    """A base and three experts; `z` is an adapter on one matrix. Values on a grid, so that magnitudes tie."""
    base = {name: (draw("base", name, shape=shape) * 8).round().div(8).to(dtype) for name, shape in SHAPES.items()}
    write_model(folder / "base", base, shard_bytes)
    for task in TASKS[:2]:
        changed = {
            name: (base[name].float() + (draw(task, name, shape=shape) * 8).round() / 64).to(dtype)
            for name, shape in SHAPES.items()
        }
        write_model(folder / task, changed, shard_bytes)
    make_peft_adapter(folder / "z", "z", rank=3, alpha=0.3, names=("a.weight",), shapes=SHAPES)
    return {task: folder / task for task in ("base", *TASKS)}


def merged(
    models: Mapping[str, Path],
    operator: Operator | OperatorPlan,
    output: Path,
    *,
    tasks: Sequence[str] = TASKS,
    weights: Sequence[float] = WEIGHTS,
    settings: MergeSettings | None = None,
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    plan = operator if isinstance(operator, OperatorPlan) else OperatorPlan(operator)
    experts = {task: models[task] for task in tasks}
    settings = settings or MergeSettings(threads=1)
    report = merge_models.merge_models(models["base"], experts, plan, weights, output, settings)
    return read_model(output), report


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return {name: make_models(tmp_path_factory.mktemp(name), dtype) for name, dtype in DTYPES.items()}


Usual = Callable[[str, str], tuple[dict[str, torch.Tensor], MergeReport]]


@pytest.fixture(scope="module")
def usual(models: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Usual:
    """usual(operator, dtype): the merge as it is done by default, on one thread."""
    folder, done = tmp_path_factory.mktemp("usual"), {}

    def merge(operator: str, dtype: str) -> tuple[dict[str, torch.Tensor], MergeReport]:
        if (operator, dtype) not in done:
            done[operator, dtype] = merged(models[dtype], OPERATORS[operator], folder / f"{operator} {dtype}")
        return done[operator, dtype]

    return merge


# ---- one result, however it is computed ------------------------------------------------------------------------------


def cut_finely(patch: pytest.MonkeyPatch, entries: int) -> None:
    patch.setattr(stream, "PIECE_ENTRIES", entries)
    for module in (stream, merge_models):
        patch.setattr(module, "tile_entries", lambda num_tasks: entries)


def step_finely(patch: pytest.MonkeyPatch, entries: int) -> None:
    patch.setattr(pieces, "STEP_FLOATS", entries)
    patch.setattr(pieces, "SMALLEST_STEP", entries)


def use_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kernels._native, "CALL", {})
    assert not kernels.compiled()


def go_step_by_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reading.TaskVectorReader, "compiled_input", lambda self, name: None)


WAYS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "pieces of 17": lambda patch: cut_finely(patch, 17),
    "pieces of 300": lambda patch: cut_finely(patch, 300),
    "steps of 13": lambda patch: step_finely(patch, 13),
    "pieces of 90, steps of 32": lambda patch: (cut_finely(patch, 90), step_finely(patch, 32)),
    "no cache": lambda patch: patch.setattr(stream, "CACHE_ENTRIES", 0),
    "step by step": go_step_by_step,
    "step by step, tiles of 64": lambda patch: (go_step_by_step(patch), cut_finely(patch, 64)),
    "torch": use_torch,
    "torch, tiles of 50": lambda patch: (use_torch(patch), cut_finely(patch, 50)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_stream_gives_the_same_bits_however_it_is_cut_and_computed(
    operator: str,
    way: str,
    models: dict[str, dict[str, Path]],
    usual: Usual,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype in ("bf16", "f32"):
        expected, report = usual(operator, dtype)
        with monkeypatch.context() as patch:
            WAYS[way](patch)
            found, other = merged(models[dtype], OPERATORS[operator], tmp_path / dtype)
        assert same_bits(found, expected)
        assert (other.num_changed, other.num_kept) == (report.num_changed, report.num_kept)
        assert other.kept_by_tensor == report.kept_by_tensor
        for name in ("merged_norm", "update_norm"):
            assert getattr(other, name) == pytest.approx(getattr(report, name), rel=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_stream_gives_the_same_bits_on_any_number_of_threads_and_for_any_shards(
    operator: str, models: dict[str, dict[str, Path]], usual: Usual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, report = usual(operator, "bf16")
    split = make_models(tmp_path / "split", torch.bfloat16, shard_bytes=200)
    assert len(list(split["base"].glob("*.safetensors"))) == 2
    cut_finely(monkeypatch, 80)
    cases = ((2, 1 << 30, models["bf16"], 1), (3, 300, split, 2), (1, 100, split, 4))
    for threads, shard_bytes, inputs, num_files in cases:
        output = tmp_path / f"{threads}"
        how = MergeSettings(threads=threads, shard_bytes=shard_bytes)
        found, other = merged(inputs, OPERATORS[operator], output, settings=how)
        assert len(list(output.glob("*.safetensors"))) == num_files
        assert same_bits(found, expected), threads
        assert other.num_kept == report.num_kept
        assert other.merged_norm == pytest.approx(report.merged_norm, rel=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_stream_report_has_the_same_bits_on_any_number_of_threads(
    threads: int, models: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_finely(monkeypatch, 80)
    reports = [
        merged(models["bf16"], Mean(), tmp_path / f"{number}", settings=MergeSettings(threads=number))[1]
        for number in (2, threads)
    ]
    assert reports[0] == reports[1]


# ---- agreement with the reference ------------------------------------------------------------------------------------


def task_vectors(models: Mapping[str, Path], tasks: Sequence[str], name: str) -> list[np.ndarray[Any, Any]]:
    """v_τ of one tensor, float32, from the files: what is stored less the base."""
    base = read_model(models["base"])[name].float().reshape(-1).numpy()
    return [read_model(models[task])[name].float().reshape(-1).numpy() - base for task in tasks]


def by_reference(operator: str, vectors: list[Any], weights: Sequence[float], **options: Any) -> torch.Tensor:
    found = reference.REFERENCES[operator]([v.tolist() for v in vectors], weights, **options)
    return torch.tensor([float(value) for value in found], dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["mean", "task_arithmetic", "consensus_ta", "metis", "ties", "dare"])
def test_stream_has_the_bits_of_the_reference(
    operator: str, dtype: str, models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """out = round(float32(base) + M(v)), rounded once to the stored type."""
    inputs, pair, weights = models[dtype], TASKS[:2], (0.75, 0.25)
    found, _ = merged(inputs, BUILT_IN[operator](), tmp_path / "out", tasks=pair, weights=weights)
    base = read_model(inputs["base"])
    for name in ("a.weight", "b.weight", "norm.weight", "scale"):
        keys = [reference.tile_key(0, "operator", 1, task, name) for task in pair]
        options = {"keys": keys} if operator == "dare" else {}
        kept_P = by_reference(operator, task_vectors(inputs, pair, name), weights, **options)
        expected = (base[name].float().reshape(-1) + kept_P).to(DTYPES[dtype]).reshape(SHAPES[name])
        assert torch.equal(found[name], expected), name
    assert found["empty"].shape == (0, 3)


def test_stream_trims_over_the_whole_model_like_the_reference(
    models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """`trim_scope: model`: one threshold for all tensors; of equal magnitudes the first by name and position stay."""
    inputs, pair, weights = models["bf16"], TASKS[:2], (1.0, 0.5)
    found, _ = merged(inputs, Ties(trim_scope="model", density=0.31), tmp_path / "out", tasks=pair, weights=weights)
    base, names = read_model(inputs["base"]), sorted(SHAPES)
    whole = [np.concatenate(parts) for parts in zip(*(task_vectors(inputs, pair, n) for n in names), strict=True)]
    magnitudes = np.sort(np.abs(whole[0]))[::-1]
    num_kept = int(0.31 * len(magnitudes))
    assert magnitudes[num_kept - 1] == magnitudes[num_kept]  # the threshold falls among equal ones
    kept_P, begin = by_reference("ties", whole, weights, density=0.31), 0
    for name in names:
        size = base[name].numel()
        expected = base[name].float().reshape(-1) + kept_P[begin : begin + size]
        assert torch.equal(found[name].reshape(-1), expected.bfloat16()), name
        begin += size


@pytest.mark.parametrize("options", [{"mask": "soft"}, {"vote": "unweighted"}, {"rescale": "norm"}], ids=str)
def test_stream_has_the_bits_of_the_reference_for_every_form_of_the_mask(
    options: dict[str, Any], models: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_finely(monkeypatch, 70)  # the norm is that of a whole tensor
    inputs, pair, weights = models["f32"], TASKS[:2], (0.75, 0.25)
    options = options | {"mask_threshold": 0.9}
    found, report = merged(inputs, Metis(**options), tmp_path / "out", tasks=pair, weights=weights)
    base = read_model(inputs["base"])
    for name in ("a.weight", "b.weight", "norm.weight", "scale"):
        kept_P = by_reference("metis", task_vectors(inputs, pair, name), weights, **options)
        assert torch.equal(found[name], (base[name].reshape(-1) + kept_P).reshape(SHAPES[name])), name
    assert 0 < report.kept_share < 1


@pytest.mark.skipif(not kernels.compiled(), reason="needs the compiled kernels")
def test_stream_rescales_in_the_compiled_kernels_alone(
    models: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("goes step by step")

    monkeypatch.setattr(NormScan, "observe", refuse)
    monkeypatch.setattr(reading.TaskVectorReader, "read", refuse)
    merged(models["bf16"], OPERATORS["metis soft rescaled"], tmp_path / "out")


@pytest.mark.parametrize("name", DTYPES)
def test_stream_of_one_task_with_weight_one_gives_the_expert(
    name: str, models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    inputs = models[name]
    found, report = merged(inputs, Mean(), tmp_path / "out", tasks=["x"], weights=[1.0])
    for tensor, expert in read_model(inputs["x"]).items():  # these lie within a few powers of two of the base
        assert torch.equal(found[tensor], expert), tensor
    assert report.kept_share == 1.0


@settings(deadline=None, database=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(*[st.floats(-(2.0**99), 2.0**99, width=32)] * 2), min_size=1, max_size=20))
def test_stream_of_one_float32_task_is_off_by_one_rounding_at_most(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[float, float]]
) -> None:
    """|(θ − Θ⁰) + Θ⁰ − θ| ≤ one unit in the last place of max(|θ|, |Θ⁰|), for numbers that are nothing alike."""
    folder = tmp_path_factory.mktemp("one")
    base, expert = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    inputs = {task: folder / task for task in ("base", "x")}
    write_model(inputs["base"], {"w": base})
    write_model(inputs["x"], {"w": expert})
    if torch.equal(base, expert) or not (expert - base).any():
        return
    found, _ = merged(inputs, Mean(), folder / "out", tasks=["x"], weights=[1.0])
    unit = np.spacing(np.maximum(base.abs().numpy(), expert.abs().numpy()))
    assert (np.abs(found["w"].double().numpy() - expert.double().numpy()) <= unit).all()


# ---- order and draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_stream_depends_on_task_order_by_float_summation_only(
    operator: str, models: dict[str, dict[str, Path]], usual: Usual, tmp_path: Path
) -> None:
    expected, report = usual(operator, "f32")
    reverse = {"tasks": TASKS[::-1], "weights": WEIGHTS[::-1]}
    found, other = merged(models["f32"], OPERATORS[operator], tmp_path / "out", **reverse)  # type: ignore[arg-type]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-5)
    assert abs(other.num_kept - report.num_kept) <= 2  # where a sum of zero rounds to something else


def dare_masks(
    models: Mapping[str, Path], output: Path, tasks: Sequence[str], *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Which entries DARE keeps of the last task, which alone has a weight."""
    weights = [0.0] * (len(tasks) - 1) + [1.0]
    how = MergeSettings(threads=1, seed=seed)
    dare = Dare(density=0.5, scaling=1.0)
    found, _ = merged(models, dare, output, tasks=tasks, weights=weights, settings=how)
    base = read_model(models["base"])
    return {name: found[name] != base[name] for name in found}


def test_stream_draws_from_seed_round_task_and_tensor_alone(
    models: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = dare_masks(models["f32"], tmp_path / "1", ["x"])
    beside = dare_masks(models["f32"], tmp_path / "2", ["z", "y", "x"])
    assert same_bits(alone, beside)  # whatever else is merged, and in whatever order
    cut_finely(monkeypatch, 31)
    assert same_bits(alone, dare_masks(models["f32"], tmp_path / "3", ["x"]))
    assert not same_bits(alone, dare_masks(models["f32"], tmp_path / "4", ["x"], seed=1))
    renamed = {"base": models["f32"]["base"], "other": models["f32"]["x"]}
    assert not same_bits(alone, dare_masks(renamed, tmp_path / "5", ["other"]))
    # by hand: an entry stays when its 32-bit draw lies below density · 2³²
    vector_P = task_vectors(models["f32"], ["x"], "a.weight")[0]
    key = reference.tile_key(0, "operator", 1, "x", "a.weight")
    assert key == tile_key(0, "operator", 1, "x", "a.weight")
    kept = [reference.draw(key, i) < 2**31 and vector_P[i] != 0 for i in range(len(vector_P))]
    assert alone["a.weight"].reshape(-1).tolist() == kept
    assert 0.4 < sum(kept) / np.count_nonzero(vector_P) < 0.6


# ---- overrides, and operators of others ------------------------------------------------------------------------------


def test_stream_merges_each_tensor_with_the_operator_of_its_name(
    models: dict[str, dict[str, Path]], usual: Usual, tmp_path: Path
) -> None:
    scaled = OPERATORS["task_arithmetic"]
    plan = OperatorPlan(scaled, (("*.weight", Ties()), ("norm.*", Dare())))
    found, _ = merged(models["bf16"], plan, tmp_path / "out")
    for name, operator in (("a.weight", "ties"), ("norm.weight", "dare"), ("scale", "task_arithmetic")):
        assert torch.equal(found[name], usual(operator, "bf16")[0][name]), name
    # a mean among multipliers: its weights are made to sum to 1
    plan = OperatorPlan(scaled, (("norm.weight", Mean()),))
    found, _ = merged(models["bf16"], plan, tmp_path / "mean", weights=[2.0, 1.0, 1.0])
    expected, _ = merged(models["bf16"], Mean(), tmp_path / "alone", weights=[0.5, 0.25, 0.25])
    assert torch.equal(found["norm.weight"], expected["norm.weight"])


def test_stream_asks_a_subclass_that_merges_in_its_own_way(models: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    class Largest(Mean):
        def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
            return task_vectors_TP.amax(0)

    found, _ = merged(models["f32"], Largest(), tmp_path / "out", tasks=TASKS[:2], weights=[0.5, 0.5])
    base = read_model(models["f32"]["base"])["norm.weight"]
    largest = np.maximum(*task_vectors(models["f32"], TASKS[:2], "norm.weight"))
    assert torch.equal(found["norm.weight"], base + torch.tensor(largest))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["compiled", "step by step", "torch"])
@pytest.mark.parametrize("operator", ["mean", "ties", "ties of the model", "iso_c", "metis rescaled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_stream_names_task_and_tensor_of_nan_and_leaves_nothing(
    bad: float, operator: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "compiled":
        WAYS[way](monkeypatch)
    cut_finely(monkeypatch, 100)
    inputs = make_models(tmp_path, torch.float32)
    broken = read_model(inputs["y"])
    broken["a.weight"][20, 7] = bad
    write_model(inputs["y"], broken)
    before = sorted(tmp_path.iterdir())
    for threads in (1, 3):
        with pytest.raises(MergeError, match=r"task 'y', tensor 'a\.weight': the expert holds NaN or Inf"):
            merged(inputs, OPERATORS[operator], tmp_path / "out", settings=MergeSettings(threads=threads))
        assert sorted(tmp_path.iterdir()) == before
    base = read_model(inputs["base"])
    base["norm.weight"][3] = bad
    write_model(inputs["base"], base)
    with pytest.raises(ModelError, match=r"base: tensor 'norm\.weight' holds NaN or Inf"):
        merged(inputs, OPERATORS[operator], tmp_path / "out", tasks=["x"], weights=[1.0])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not kernels.compiled(), reason="needs the compiled kernels")
@pytest.mark.parametrize("operator", ["mean", "ties", "metis rescaled"])
def test_stream_names_the_tensor_of_a_file_that_is_cut_off_meanwhile(
    operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_models(tmp_path, torch.float32)
    file = inputs["x"] / "model.safetensors"
    start = merge_models.open_model_folder

    def cut_off(*args: Any) -> Any:
        file.write_bytes(file.read_bytes()[:-300])  # b.weight, norm.weight and scale lie at the end
        return start(*args)

    monkeypatch.setattr(merge_models, "open_model_folder", cut_off)
    with pytest.raises(ModelError, match=r"tensor '(b|norm)\.weight': a file ends within it; it was changed meanwhile"):
        merged(inputs, OPERATORS[operator], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tile_pool_returns_results_in_order_and_raises_the_first_error() -> None:
    queue = [Piece("t", i, i + 1) for i in range(50)]
    assert TilePool(3).map(lambda piece, scratch: piece.start, queue) == list(range(50))
    done: list[int] = []

    def fail(piece: Piece, scratch: Scratch) -> None:
        done.append(piece.start)
        if piece.start in (7, 8, 30):
            raise ValueError(f"piece {piece.start}")

    for threads in (1, 2, 3, 60):
        done.clear()
        with pytest.raises(ValueError, match=r"^piece 7$"):
            TilePool(threads).map(fail, queue)
        assert sorted(done)[:8] == list(range(8))
        if threads == 1:
            assert done == list(range(8))  # an error stops the others


def test_tile_pool_stops_the_others_on_an_error() -> None:
    failed = threading.Event()
    done: list[int] = []

    def work(piece: Piece, scratch: Scratch) -> None:
        done.append(piece.start)
        if piece.start == 0:
            failed.set()
            raise OSError("disk")
        failed.wait(5)
        time.sleep(0.001)

    with pytest.raises(OSError, match="disk"):
        TilePool(2).map(work, [Piece("t", i, i + 1) for i in range(2000)])
    assert len(done) < 200


@pytest.mark.parametrize("when", ["working", "waiting"])
def test_tile_pool_waits_for_its_threads_when_it_is_interrupted(when: str) -> None:
    """The files that they write into are closed next."""
    started, ended, main = threading.Event(), threading.Event(), threading.current_thread()

    def work(piece: Piece, scratch: Scratch) -> None:
        if threading.current_thread() is main:
            started.wait(5)
            if when == "working":
                raise KeyboardInterrupt
            return
        started.set()
        time.sleep(0.02)
        if when == "waiting":
            _thread.interrupt_main()
        time.sleep(0.02)
        ended.set()

    threads = threading.active_count()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        TilePool(2).map(work, [Piece("t", i, i + 1) for i in range(2)])
    signal.signal(signal.SIGINT, before)
    assert ended.is_set()
    assert threading.active_count() == threads


def test_imports_stay_frozen_where_the_caller_froze_them() -> None:
    gc.unfreeze()
    with imports_frozen():
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    gc.freeze()
    with imports_frozen():
        pass
    assert gc.get_freeze_count()


def test_tile_pool_counts_every_entry_and_gives_threads_their_own_buffers() -> None:
    counted: list[int] = []
    scratches: set[int] = set()
    TilePool(2, counted.append).map(lambda piece, scratch: scratches.add(id(scratch)), [Piece("t", 0, 5)] * 9)
    assert sum(counted) == 45
    assert 1 <= len(scratches) <= 2
    with engine.one_torch_thread():
        assert torch.get_num_threads() == 1


def test_tile_entries_bound_the_memory_of_a_thread_whatever_the_number_of_tasks() -> None:
    for num_tasks in (1, 2, 8, 32, 100):
        entries = engine.tile_entries(num_tasks)
        assert entries % engine.SMALLEST_TILE == 0
        assert entries * (num_tasks + engine.OTHER_ROWS) <= engine.THREAD_ENTRIES
    assert engine.tile_entries(10_000) == engine.SMALLEST_TILE


def test_scratch_gives_the_same_memory_again_and_never_to_two_names() -> None:
    scratch = Scratch()
    one, two = scratch.take("one", 8), scratch.take("two", 8)
    assert scratch.take("one", 8).data_ptr() == scratch.take("one", 3).data_ptr() == one.data_ptr()
    assert one.data_ptr() != two.data_ptr()
    assert scratch.take("one", 8, torch.int64).dtype == torch.int64
    assert len(scratch.take("one", 100)) == 100
    assert scratch.take("one", 8).data_ptr() == scratch.take("one", 100).data_ptr()
