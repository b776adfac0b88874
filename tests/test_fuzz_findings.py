"""Inputs that fuzzing found, or that were found while looking for what it would find: each now ends in an error."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from conftest import write_base
from manyshot import data_files
from manyshot.data_files import read_file
from manyshot.errors import DataError, ManyshotError, ModelError, RecipeError, RunFolderError
from manyshot.export_source import open_source
from manyshot.inspect_input import open_round
from manyshot.live_metrics import MetricsTail
from manyshot.live_state import LiveRun
from manyshot.manifest import check_files
from manyshot.mergekit_yaml import from_mergekit
from manyshot.model_guard import as_one_error
from manyshot.models import load_config, load_tokenizer, meta_model
from manyshot.operator_choice import operator_adapter
from manyshot.peft_adapter import PATTERN, read_adapter
from manyshot.push import plan_upload
from manyshot.recipe_file import merge_recipe_from_mapping, recipe_from_mapping
from manyshot.removed import finish_removing
from manyshot.report_build import build_report
from manyshot.rundir import RunFolder, is_below, read_json, read_lines
from manyshot.status import read_outline, run_status
from manyshot.task_vector import AdapterFactors
from manyshot.tensors import Checkpoint
from merge_helpers import make_adapter, make_base, make_peft_adapter
from report_helpers import FakeRun, write

READERS: tuple[Callable[[Path], object], ...] = (
    run_status,
    lambda run: LiveRun(run).read(),
    lambda run: build_report([run]),
    open_round,
)
# values that json.loads refuses with another error than JSONDecodeError
UNREADABLE = ("1" * 5000, "[" * 100_000)


@pytest.mark.parametrize("text", UNREADABLE)
def test_read_json_names_a_file_with_endless_numbers_or_brackets(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(f'{{"a": {text}}}', "utf-8")
    with pytest.raises(RunFolderError, match=r"scores\.json: damaged JSON"):
        read_json(tmp_path / "scores.json")


@pytest.mark.parametrize("text", UNREADABLE)
def test_lines_with_endless_numbers_or_brackets_are_left_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"time": 1}}\n{{"time": {text}}}\n{{"time": 2}}\n', "utf-8")
    assert [line["time"] for line in read_lines(path)] == [1, 2]
    assert [line["time"] for line in MetricsTail(path).read()] == [1, 2]


# ---- run folders -----------------------------------------------------------------------------------------------------


def with_recipe(folder: Path, old: str, new: str) -> Path:
    run = FakeRun(folder / "run", ["a", "b"], rounds=1).write()
    text = (run / "recipe.yaml").read_text("utf-8")
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new), "utf-8")
    return run


@pytest.mark.parametrize("rounds", ["1000000000", "1" + "0" * 400, "0", "-3", ".inf"])
def test_a_run_of_no_end_of_rounds_is_refused_at_once(tmp_path: Path, rounds: str) -> None:
    run, began = with_recipe(tmp_path, "rounds: 1", f"rounds: {rounds}"), time.process_time()
    with pytest.raises(RunFolderError, match="is not the recipe of a run"):
        read_outline(RunFolder(run))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "1", '"a\\0b"', '""'])
@pytest.mark.parametrize(
    "read", [run_status, lambda run: LiveRun(run).read(), lambda run: build_report([run]), open_round]
)
def test_a_run_whose_task_is_a_path_is_refused(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    run = with_recipe(tmp_path, "\n  a:", f"\n  {name}:")
    with pytest.raises(RunFolderError, match="is no name of a task"):
        read(run)


@pytest.mark.parametrize(
    ("record", "value"),
    [
        ("round_001/guards.json", {"findings": 3}),
        ("round_001/scores.json", {"a": 1.5, "b": []}),
        ("round_001/losses.json", {"a": "low"}),
        ("round_001/loss_gap.json", {"weights": None, "loss_gaps": [1]}),
        ("round_001/merge.json", {"tasks": 5, "kept_by_tensor": [1], "task_vector_cosines": "x"}),
        ("round_000/examples.json", {"a": [], "b": {"examples": [7]}}),
        ("round_001/outputs.json", {"a": {"row": 1}, "b": [None]}),
        ("environment.json", {"base_model": [1], "packages": "all", "command": {}}),
    ],
)
def test_records_of_another_shape_are_shown_or_named_by_whatever_reads_them(
    tmp_path: Path, record: str, value: Any
) -> None:
    run = FakeRun(tmp_path / "run", ["a", "b"], rounds=1).write()
    write(run / record, value)
    for read in READERS:
        try:
            assert read(run)
        except ManyshotError as error:
            assert str(run) in str(error)
    with pytest.raises(ManyshotError):
        plan_upload(run, "me/model", private=True)


@pytest.mark.parametrize("place", ["a" * 256, "a/" * 2000, "a\0b", "\ud800", "é" * 128])
def test_a_record_of_a_place_that_no_system_can_have_is_damaged(tmp_path: Path, place: str) -> None:
    assert not is_below(place) and is_below("é" * 127) and is_below("a/" * 1000)
    entry = {"step": "merge", "bytes": 1, "sha256": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {place: entry}}), "utf-8")
    with pytest.raises(RunFolderError, match=r"manifest\.json: is damaged"):
        check_files(tmp_path, lambda text: None, repair=True, how="--repair")
    (tmp_path / "removed.json").write_text(
        json.dumps({"removed": {f"round_001/{place}": "keep.adapters: last"}}), "utf-8"
    )
    with pytest.raises(RunFolderError, match=r"removed\.json: is damaged"):
        finish_removing(tmp_path)


@pytest.mark.parametrize("path", ["a" * 5000, "/", "a\0b", "\ud800"])
def test_a_run_whose_pretrained_model_can_be_nowhere_is_refused_at_once(tmp_path: Path, path: str) -> None:
    run, began = FakeRun(tmp_path / "run", ["a"], rounds=1).write(), time.process_time()
    said = {"base_model": {"path": path, "name": "m"}, "identity": {"model": "0"}}
    (run / "environment.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(ManyshotError, match=r"its pretrained model is gone|/ has no config\.json"):
        open_source(run, None)
    with pytest.raises(ManyshotError):
        open_round(run)
    with pytest.raises(ModelError, match=r"no such model folder|without weights"):
        Checkpoint(Path(path))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe"])
@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "round_001/losses.json", "experts/math/scores.json"])
def test_records_that_are_no_files_are_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    run = FakeRun(tmp_path / "run", ["math"], rounds=1).write()
    file = run / name
    file.unlink()
    {"folder": file.mkdir, "loop": lambda: file.symlink_to(file.name), "pipe": lambda: os.mkfifo(file)}[kind]()
    refused = 0
    for read in READERS[:3]:
        try:
            read(run)
        except ManyshotError as error:
            assert str(run) in str(error)
            refused += 1
    assert refused == 3 or name != "recipe.yaml"  # what else cannot be read, a report names


def test_metrics_of_another_shape_are_named(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", ["a", "b"], rounds=1).write()
    lines = [{"kind": kind, "time": 1.0} for kind in ("begin", "start", "phase", "advance", "plan")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for read in READERS[:3]:
        try:
            assert read(run)
        except RunFolderError as error:
            assert f"{run}: " in str(error)


# ---- recipes and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a" * 5000, "~nobody-of-that-name/x", "a\0b.jsonl", "../" * 3000 + "x.jsonl"])
def test_a_path_that_no_file_can_have_is_no_such_file(value: str) -> None:
    try:
        recipe_from_mapping({"model": value, "tasks": {"a": {"data": value}, "b": {"data": "x/y"}}})
    except RecipeError as error:
        assert "no such file or folder" in str(error)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_data_that_has_no_end_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    for name in ("zero", "pipe"):
        with pytest.raises(DataError, match="is no regular file"):
            read_file(tmp_path / f"{name}.{suffix}", "a")


@pytest.mark.parametrize("columns", [{"prompt": "a" * 1000, "completion": "b"}, {}])
def test_a_packed_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, columns: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "UNPACKED_BYTES", 10_000)
    monkeypatch.setattr(data_files, "UNPACKED_TIMES", 2)
    path = tmp_path / "bomb.parquet"
    if columns:
        table = pyarrow.Table.from_pydict({name: [value] * 5000 for name, value in columns.items()})
    else:
        table = pyarrow.table({"a": pyarrow.nulls(5000)})
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"bomb\.parquet: unpacks to more than 0\.0 GB, 2 times its size"):
        read_file(path, "a")


@pytest.mark.parametrize(
    "operator", [{"density": 0.5}, {"name": None, "a": 1}, {"name": ["ties"], "a": 1}, {"name": 7}]
)
def test_an_operator_without_a_name_of_its_own_is_explained(operator: dict[str, Any]) -> None:
    experts = {"one": {"path": "a/b"}, "two": {"path": "a/c"}}
    with pytest.raises(RecipeError, match="operator"):
        merge_recipe_from_mapping({"base": "a/d", "experts": experts, "operator": operator})


@pytest.mark.parametrize("operator", ["nobody's", 7, None])
def test_an_unknown_operator_beside_unknown_rounds_is_explained(operator: Any) -> None:
    recipe = {"model": "a/b", "tasks": {"one": {"data": "a/c"}}, "protocol": {"rounds": "many"}, "operator": operator}
    with pytest.raises(RecipeError, match=r"operator[^$]*protocol\.rounds|protocol\.rounds[^$]*operator"):
        recipe_from_mapping(recipe)


@pytest.mark.parametrize("levels", [41, 2000])
def test_an_override_of_endless_levels_is_refused(levels: int) -> None:
    with pytest.raises(RecipeError, match=f"^command line: 'a.a.*…': a key of {levels} levels; there are at most 40$"):
        recipe_from_mapping({"model": "m"}, [".".join("a" * levels) + "=1"])


def test_a_count_beyond_whole_numbers_of_floats_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"protocol\.local_steps: Input should be less than or equal to 90071992547409"
    ):
        recipe_from_mapping({"model": "m", "tasks": {}}, [f"protocol.local_steps={10**400}"])


@pytest.mark.parametrize(("suffix", "text"), [("jsonl", '{"prompt": "a\\ud83d"}\n'), ("json", '[{"\\uDC00": 1}]')])
def test_data_with_half_a_character_is_refused(tmp_path: Path, suffix: str, text: str) -> None:
    file = tmp_path / f"rows.{suffix}"
    file.write_text(text, "utf-8")
    with pytest.raises(DataError, match=rf"rows\.{suffix}.*: cannot be read \(half a character, .u[0-9a-f]{{4}},"):
        read_file(file, "task")
    file.write_text(text.replace("\\ud83d", "\\ud83d\\ude00").replace("\\uDC00", "\\\\uDC00"), "utf-8")
    assert read_file(file, "task")  # a whole one, and a text about one


def test_numbers_beyond_floats_are_refused_where_they_stand(tmp_path: Path) -> None:
    models = [{"model": "a", "parameters": {"weight": 10**400}}, {"model": "b", "parameters": {"weight": 1.0}}]
    with pytest.raises(RecipeError, match=r"weight: is beyond the numbers that a merge can hold"):
        merge_recipe_from_mapping(from_mergekit({"merge_method": "linear", "models": models}, "file"))


@pytest.mark.parametrize("setting", ["min_agreement", "scaling"])
def test_an_empty_list_of_values_per_round_is_refused_by_its_length(setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"operator\.{setting}: has 0 values for 5 rounds"):
        recipe_from_mapping(
            {"model": "m", "tasks": {"a": {"data": "demo:math"}, "b": {"data": "demo:safety"}}},
            [f"operator.{setting}=[]"],
        )


def test_the_reader_of_operators_is_made_once() -> None:
    """Made for every operator that a comparison looks at, it took the paper's recipes more than 5 s."""
    assert operator_adapter() is operator_adapter()


# ---- models and adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_base(tmp_path / "tensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": "4"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"a": None}},
        {"alpha_pattern": {"a[": 1.0}},
        {"init_lora_weights": [1]},
        {"peft_type": {}},
    ],
)
def test_an_adapter_with_a_setting_of_another_kind_is_refused(
    base: Checkpoint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = make_peft_adapter(tmp_path / "adapter", "one")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    write(folder / "adapter_config.json", config | changes)
    with pytest.raises(ModelError, match=r"model 'one'|adapter_config"):
        read_adapter(folder, base, "one")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", ".*.*.*x", "(.*)*", "a{1,9999}", "(a?){9}"])
def test_an_adapter_with_a_pattern_that_takes_ages_is_refused(base: Checkpoint, tmp_path: Path, pattern: str) -> None:
    folder = make_peft_adapter(tmp_path / "adapter", "one")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    write(folder / "adapter_config.json", config | {"alpha_pattern": {pattern: 2.0}})
    with pytest.raises(ModelError, match="is no pattern for names of modules"):
        read_adapter(folder, base, "one")


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r"layers\.\d+\.(q|k)_proj",
        r".*\.[0-9]+\.mlp",
        "layers.1[0-9].o",
    ],
)
def test_patterns_that_adapters_have_are_taken(pattern: str) -> None:
    assert PATTERN.fullmatch(pattern)


@pytest.mark.parametrize("shard", [[0] * 500, {"a": "b"}, None, "a" * 5000, "a\0b", "\ud800"])
def test_a_shard_whose_name_no_file_can_have_is_refused(tmp_path: Path, shard: Any) -> None:
    make_base(tmp_path / "model")
    index = {"weight_map": {"a.weight": shard}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelError, match=r"no name of a file|not a file of this folder|missing from"):
        Checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    "entry",
    [
        *(3, "x", [], {}, {"lora_a": "a.weight.A"}),
        {"lora_a": 1, "lora_b": "a.weight.B", "scaling": 2.0, "transposed": False},
        {"lora_a": "a.weight.A", "lora_b": "a.weight.B", "scaling": float("inf"), "transposed": False},
        {"lora_a": "a.weight.A", "lora_b": "a.weight.B", "scaling": 10**400, "transposed": False},
        {"lora_a": "a.weight.A", "lora_b": "a.weight.B", "scaling": "2", "transposed": False},
        {"lora_a": "a.weight.A", "lora_b": "a.weight.B", "scaling": 2.0, "transposed": False, "more": 1},
        {"lora_a": "a.weight.B", "lora_b": "a.weight.B", "scaling": 2.0, "transposed": False},
    ],
)
def test_factors_of_another_shape_are_refused(tmp_path: Path, entry: Any) -> None:
    folder = make_adapter(tmp_path / "adapter", "one")
    (folder / "factors.json").write_text(json.dumps({"a.weight": entry}), "utf-8")
    with pytest.raises(ModelError, match=r"'a\.weight'"):
        AdapterFactors(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "tie_word_embeddings", [[]]),
        ("config.json", "initializer_range", 0),
        ("config.json", "num_attention_heads", 0),
        ("config.json", "model_type", 7),
        ("config.json", "num_hidden_layers", 2**53 + 1),
        ("config.json", "num_hidden_layers", 10**400),
        ("config.json", "text_config", {"num_local_experts": 1e300}),
        ("tokenizer.json", "model", {"type": "none of them"}),
        ("tokenizer.json", "added_tokens", [{}]),
        ("tokenizer_config.json", "tokenizer_class", 3),
        ("tokenizer_config.json", "eos_token", {"a": 1}),
        ("tokenizer_config.json", "model_max_length", "long"),
    ],
)
def test_what_transformers_cannot_read_is_an_error_that_names_the_folder(
    base_folder: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    write(folder / file, json.loads((folder / file).read_text("utf-8")) | {key: value})
    with pytest.raises(ModelError, match=str(folder)):
        load_config(folder)
        meta_model(folder)
        load_tokenizer(folder)


def test_a_library_that_panics_is_an_error_and_an_interrupt_stays_one() -> None:
    panic = type("PanicException", (BaseException,), {})  # what the Rust libraries raise
    with (
        pytest.raises(ModelError, match="its tokenizer cannot be loaded \\(index out of bounds"),
        as_one_error("its tokenizer cannot be loaded"),
    ):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), as_one_error("its tokenizer cannot be loaded"):
        raise KeyboardInterrupt


def test_the_tiny_model_itself_is_fine(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "model")
    assert load_config(folder) and meta_model(folder) and load_tokenizer(folder)
