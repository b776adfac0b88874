"""Merging models that exist already: what comes out by hand, what is refused by name, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyshot.errors import ManyshotError, MergeError, ModelError, RunFolderError
from manyshot.merge_models import MergeSettings, check_output, merge_models
from manyshot.merge_report import MergeReport
from manyshot.operators import Mean, Operator, OperatorPlan, TaskArithmetic
from manyshot.rundir import write_json
from merge_helpers import SHAPES, draw, make_peft_adapter, read_model, same_bits, write_model

Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(folder: Path, seed: str, dtype: torch.dtype = torch.float32, **extra: torch.Tensor) -> Path:
    """A model folder with drawn tensors and `extra` ones."""
    drawn = {name: draw(seed, name, shape=shape).to(dtype) for name, shape in SHAPES.items()}
    write_model(folder, drawn | extra)
    return folder


def merge(
    base: Path,
    experts: Mapping[str, Path],
    output: Path,
    operator: Operator | None = None,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> tuple[Tensors, MergeReport]:
    weights = weights or [1 / len(experts)] * len(experts)
    how = MergeSettings(**{"threads": 1} | settings)
    report = merge_models(base, experts, OperatorPlan(operator or Mean()), weights, output, how)
    return read_model(output), report


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model(tmp_path / "base", "base")


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {task: model(tmp_path / task, task) for task in ("x", "y")}


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes: what a failed merge must leave as it was."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before, names = listing(folder), sorted(folder.iterdir())
    yield
    assert sorted(folder.iterdir()) == names
    assert listing(folder) == before


# ---- values ----------------------------------------------------------------------------------------------------------


def test_merge_models_by_hand(base: Path, tmp_path: Path) -> None:
    write_model(base, {"w": torch.tensor([1.0, 2.0, 3.0])})
    for task, values in (("x", [2.0, 2.0, 1.0]), ("y", [1.0, 6.0, 3.0])):
        write_model(tmp_path / task, {"w": torch.tensor(values)})
    experts = {task: tmp_path / task for task in ("x", "y")}
    found, report = merge(base, experts, tmp_path / "mean")
    assert found["w"].tolist() == [1.5, 4.0, 2.0]
    found, _ = merge(base, experts, tmp_path / "sum", TaskArithmetic(scaling=0.5), [1.0, 2.0])
    assert found["w"].tolist() == [1.5, 6.0, 2.0]
    assert (report.num_changed, report.num_kept) == (3, 3)
    assert report.merged_norm == pytest.approx((0.25 + 4 + 1) ** 0.5)


def test_merge_models_mixes_dense_models_and_adapters_of_unlike_ranks(base: Path, tmp_path: Path) -> None:
    experts = {
        "dense": model(tmp_path / "dense", "dense"),
        "narrow": make_peft_adapter(tmp_path / "narrow", "narrow", rank=1, alpha=3.0, names=("b.weight",)),
        "wide": make_peft_adapter(tmp_path / "wide", "wide", rank=3, alpha=6.0),
    }
    found, _ = merge(base, experts, tmp_path / "out", weights=[0.5, 0.3, 0.2])
    before, dense = read_model(base), read_model(experts["dense"])
    products: dict[str, Tensors] = {}
    for task, scaling in (("narrow", 3.0), ("wide", 2.0)):
        factors = read_model(experts[task] / "adapter_model.safetensors")
        modules = {name.split(".lora_")[0] for name in factors}
        products[task] = {
            module.removeprefix("base_model.model.") + ".weight": scaling
            * (factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"])
            for module in modules
        }
    for name in SHAPES:
        expected = before[name] + 0.5 * (dense[name] - before[name])
        expected = expected + 0.3 * products["narrow"].get(name, 0) + 0.2 * products["wide"].get(name, 0)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_merge_models_copies_what_is_no_float_bit_for_bit_and_says_so(base: Path, tmp_path: Path) -> None:
    extra = {"ids": torch.arange(5), "mask": torch.tensor([True, False]), "levels": torch.arange(3, dtype=torch.uint8)}
    base = model(tmp_path / "b", "base", **extra)
    expert = model(tmp_path / "x", "x", **{name: tensor.flip(0) for name, tensor in extra.items()})
    found, _ = merge(base, {"x": expert}, tmp_path / "out", dtype="bfloat16")
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["copied"] == ["ids", "levels", "mask"]
    assert record["tied"] == {}
    assert record["weights"] == {"x": 1.0}
    assert record["num_changed"] == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert "task_vector_cosines" not in record  # nobody computed them


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge_models_casts_the_float32_sum_once_and_says_so_in_the_config(dtype: str, tmp_path: Path) -> None:
    base, expert = (model(tmp_path / task, task, torch.bfloat16) for task in ("base", "x"))
    found, _ = merge(base, {"x": expert}, tmp_path / "out", weights=[0.3], dtype=dtype)
    before, after = read_model(base), read_model(expert)
    for name in SHAPES:
        v_P = (after[name].float() - before[name].float()) * torch.tensor(0.3)
        expected = (before[name].float() + v_P).to(getattr(torch, dtype))
        assert torch.equal(found[name], expected), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_merge_models_twice_gives_equal_bytes_and_leaves_inputs_alone(
    base: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    inputs = [listing(folder) for folder in (base, *pair.values())]
    for output in ("1", "2"):
        merge(base, pair, tmp_path / output, shard_bytes=100)
    assert listing(tmp_path / "1") == listing(tmp_path / "2")
    assert [listing(folder) for folder in (base, *pair.values())] == inputs


def test_merge_models_counts_every_entry_once(base: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    base = model(tmp_path / "b", "base", ids=torch.arange(5))
    ticks: list[tuple[int, int]] = []
    how = MergeSettings(threads=1)
    merge_models(
        base, pair, OperatorPlan(Mean()), [0.5, 0.5], tmp_path / "out", how, tick=lambda *tick: ticks.append(tick)
    )
    assert ticks[-1] == (57, 57)
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)


def test_merge_models_of_the_base_itself_is_the_base(base: Path, tmp_path: Path) -> None:
    found, report = merge(base, {"x": model(tmp_path / "same", "base")}, tmp_path / "out")
    assert same_bits(found, read_model(base))
    assert report.kept_share == 0.0


# ---- tied embeddings -------------------------------------------------------------------------------------------------


def stored_twice(folder: Path, source: Path) -> Path:
    """A copy of a model whose output head is a second tensor with the embedding's bytes."""
    tensors = read_model(source)
    write_model(folder, tensors | {HEAD: tensors[EMBED].clone()})
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("twice", ["neither", "base", "expert", "both"])
def test_merge_models_with_tied_embeddings_writes_them_once(twice: str, base_folder: Path, tmp_path: Path) -> None:
    changed = {
        name: tensor + 0.01 * draw("x", name, shape=tuple(tensor.shape))
        for name, tensor in read_model(base_folder).items()
    }
    write_model(tmp_path / "x", changed)
    base = stored_twice(tmp_path / "base2", base_folder) if twice in ("base", "both") else base_folder
    expert = stored_twice(tmp_path / "x2", tmp_path / "x") if twice in ("expert", "both") else tmp_path / "x"
    found, _ = merge(base, {"x": expert}, tmp_path / "out")
    assert HEAD not in found
    assert found.keys() == changed.keys()
    torch.testing.assert_close(found[EMBED], changed[EMBED], rtol=0, atol=1e-7)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["tied"] == ({HEAD: EMBED} if twice in ("base", "both") else {})
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, found[EMBED])
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out")).chat_template


def test_merge_models_refuses_a_head_that_left_a_tied_embedding(base_folder: Path, tmp_path: Path) -> None:
    base = stored_twice(tmp_path / "base2", base_folder)
    tensors = read_model(base)
    write_model(tmp_path / "x", tensors | {HEAD: tensors[HEAD] + 1})
    for there in (base, base_folder):
        with unchanged(tmp_path), pytest.raises(ModelError, match=r"model 'x'.*'lm_head\.weight'"):
            merge(there, {"x": tmp_path / "x"}, tmp_path / "out")


# ---- models that do not fit ------------------------------------------------------------------------------------------


def test_merge_models_refuses_what_does_not_fit_unless_copies_are_allowed(base: Path, tmp_path: Path) -> None:
    tensors = read_model(model(tmp_path / "x", "x"))
    write_model(tmp_path / "x", tensors | {"a.weight": torch.ones(7, 4), "more.weight": torch.ones(2)})
    with unchanged(tmp_path), pytest.raises(ModelError) as caught:
        merge(base, {"x": tmp_path / "x"}, tmp_path / "out")
    for part in ("model 'x'", "'a.weight'", "(7, 4)", "(6, 4)", "--allow-copy"):
        assert part in str(caught.value)
    found, _ = merge(base, {"x": tmp_path / "x"}, tmp_path / "out", allow_copy=True)
    assert torch.equal(found["a.weight"], read_model(base)["a.weight"])
    assert not torch.equal(found["b.weight"], read_model(base)["b.weight"])
    assert "more.weight" not in found
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["copied"] == ["a.weight"]


def test_merge_models_refuses_an_override_that_fits_nothing_and_unequal_counts(
    base: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    plan = OperatorPlan(Mean(), (("*.weight", Mean()), ("layers.*", TaskArithmetic())))
    with unchanged(tmp_path), pytest.raises(MergeError, match=r"overrides: the pattern 'layers\.\*' fits no tensor"):
        merge_models(base, pair, plan, [0.5, 0.5], tmp_path / "out", MergeSettings())
    with unchanged(tmp_path), pytest.raises(MergeError, match="1 weights for 2 tasks"):
        merge(base, pair, tmp_path / "out", weights=[1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_models_refuses_nan_and_inf_by_name_unless_allowed(
    dtype: torch.dtype, bad: float, tmp_path: Path
) -> None:
    base, expert = (model(tmp_path / task, task, dtype) for task in ("base", "x"))
    tensors = read_model(expert)
    tensors["b.weight"][1, 2] = bad
    write_model(expert, tensors)
    with unchanged(tmp_path), pytest.raises(MergeError, match=r"task 'x', tensor 'b\.weight': the expert holds NaN"):
        merge(base, {"x": expert}, tmp_path / "out")
    found, _ = merge(base, {"x": expert}, tmp_path / "out", allow_nonfinite=True)
    assert torch.isfinite(found["b.weight"]).logical_not().nonzero().tolist() == [[1, 2]]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["merged_norm"] is record["task_vector_norms"]["x"] is None
    adapter = make_peft_adapter(tmp_path / "adapter", "x")
    factors = read_model(adapter / "adapter_model.safetensors")
    factors["base_model.model.a.lora_B.weight"][0, 0] = bad
    write_model(adapter, factors)
    (adapter / "model.safetensors").replace(adapter / "adapter_model.safetensors")
    with unchanged(tmp_path), pytest.raises(MergeError, match=r"task 'y', tensor 'a\.weight': the expert holds NaN"):
        merge(base, {"y": adapter}, tmp_path / "other")


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1e5), ("bfloat16", 3.5e38), ("float32", 3.5e38)])
def test_merge_models_refuses_a_sum_that_its_type_cannot_hold(dtype: str, factor: float, tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"w": torch.zeros(4)})
    write_model(tmp_path / "x", {"w": torch.tensor([1.0, 1.0, 0.5, 1.0])})
    expected = r"tensor 'w': the merged model holds NaN or Inf in .*16; --dtype float32 has a wider range"
    operator = TaskArithmetic(scaling=factor)
    with unchanged(tmp_path), pytest.raises(MergeError, match=expected.replace("16", "(16|32)")):
        merge(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", operator, dtype=dtype)
    if dtype == "float16":
        found, _ = merge(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", operator)
        assert found["w"].tolist() == [1e5, 1e5, 5e4, 1e5]


# ---- damaged inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["base", "x"])
def test_merge_models_names_a_damaged_input(which: str, base: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    file = (base if which == "base" else pair["x"]) / "model.safetensors"
    blob = file.read_bytes()
    for damaged in (b"", blob[:5], b"\xff" * 64, blob[:40], blob[: len(blob) // 2], blob[:-1], blob + b"\0"):
        file.write_bytes(damaged)
        with unchanged(tmp_path), pytest.raises(ModelError, match=rf"{which}/model\.safetensors: not a readable"):
            merge(base, pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "gone.safetensors"}, r"names the shard 'gone\.safetensors', which is missing"),
        (
            {"a.weight": "../base/model.safetensors"},
            r"names '\.\./base/model\.safetensors', which is not a file of this",
        ),
        ({"c.weight": "model.safetensors"}, r"tensor 'c\.weight' is in 'model\.safetensors', which lacks it"),
    ],
)
def test_merge_models_refuses_an_index_that_is_wrong(
    weight_map: dict[str, str], message: str, base: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    write_json(pair["y"] / "model.safetensors.index.json", {"weight_map": weight_map})
    with unchanged(tmp_path), pytest.raises(ModelError, match=rf"y/model\.safetensors\.index\.json: .*{message}"):
        merge(base, pair, tmp_path / "out")


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_merge_models_replaces_merged_models_only_and_only_when_asked(
    base: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    merge(base, {"x": pair["x"]}, output)
    with unchanged(tmp_path), pytest.raises(RunFolderError, match=r"out: is there already; --force replaces it"):
        merge(base, pair, output)
    (output / "notes.txt").write_text("kept until a merge succeeds")
    with unchanged(tmp_path), pytest.raises(ManyshotError):
        merge(base, {"x": tmp_path / "gone"}, output, force=True)
    merge(base, pair, output, force=True)
    assert set(json.loads((output / "merge.json").read_text())["weights"]) == {"x", "y"}
    assert not (output / "notes.txt").exists()
    for other in (tmp_path / "mine", pair["x"]):
        other.mkdir(exist_ok=True)
        with unchanged(tmp_path), pytest.raises(RunFolderError, match=r"holds no merge\.json|is, or holds, one of"):
            merge(base, pair, other, force=True)


def test_check_output_refuses_the_inputs_and_what_holds_them(tmp_path: Path) -> None:
    inside = model(tmp_path / "models" / "x", "x")
    (tmp_path / "link").symlink_to(inside)
    for output in (inside, tmp_path / "models", tmp_path, tmp_path / "link", inside / ".." / "x"):
        with pytest.raises(RunFolderError, match=r"is, or holds, one of the models to merge \(.*models/x\)"):
            check_output(output, [inside], force=True)
    check_output(tmp_path / "models" / "merged", [inside], force=False)


def test_merge_models_refuses_a_disk_that_is_too_small(
    base: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 207  # of 52 · 4 bytes

    monkeypatch.setattr("manyshot.rundir.shutil.disk_usage", lambda path: Usage)
    with unchanged(tmp_path), pytest.raises(RunFolderError, match=r"the merged model needs 0\.00 GB, the disk has"):
        merge(base, pair, tmp_path / "new" / "out")
    Usage.free = 208
    merge(base, pair, tmp_path / "out")


def test_merge_models_names_a_folder_that_cannot_be_written(
    base: Path, pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with unchanged(tmp_path), pytest.raises(OSError, match=r"file/out\.partial"):
        merge(base, pair, tmp_path / "file" / "out")
    make = Path.mkdir

    def read_only(self: Path, *args: Any, **options: Any) -> None:
        if self.name == "out.partial":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        make(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with unchanged(tmp_path), pytest.raises(OSError, match=r"Read-only file system.*out\.partial"):
        merge(base, pair, tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_merge_models_leaves_nothing_when_it_is_interrupted(
    error: type[BaseException], force: bool, base: Path, pair: dict[str, Path], tmp_path: Path
) -> None:
    if force:
        merge(base, {"x": pair["x"]}, tmp_path / "out")
    partial: list[list[str]] = []

    def interrupt(done: int, total: int) -> None:
        partial.append(sorted(file.name for file in (tmp_path / "out.partial").iterdir()))
        if done > total // 2:
            raise error

    how = MergeSettings(threads=1, force=force)
    with unchanged(tmp_path), pytest.raises(error):
        merge_models(base, pair, OperatorPlan(Mean()), [0.5, 0.5], tmp_path / "out", how, tick=interrupt)
    assert partial == [["config.json", "model.safetensors"]] * 2  # it was under way, in another place


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_merge_models_names_the_output_when_a_write_fails_and_leaves_nothing(
    threads: int, dtype: str, tmp_path: Path
) -> None:
    for task in ("base", "x"):
        write_model(tmp_path / task, {name: draw(task, name, shape=(100, 100)) for name in "abcd"})
    with unchanged(tmp_path), small_files(60_000), pytest.raises(OSError, match=r"File too large: .*out") as caught:
        merge(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", threads=threads, dtype=dtype)
    assert caught.value.errno == errno.EFBIG
