"""Runs handed on: model folders, adapters and mergekit files that other libraries read, with what they say of it."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import manyshot
from manyshot.cli import app
from manyshot.errors import DataError, ManyshotError, ModelError, RecipeError, RunFolderError
from manyshot.export_card import adapter_card
from manyshot.export_command import ExportOptions, ExportResult, export
from manyshot.export_folder import check_written
from manyshot.export_hints import model_hints
from manyshot.export_source import open_source
from manyshot.rundir import read_json
from manyshot.runner import RunResult
from manyshot.task_vector import StoredTaskVector
from manyshot.tensors import Checkpoint, TensorInfo, file_digest
from merge_helpers import read_model, same_bits
from run_helpers import Runs, load_tensors, round_folder

NO_EXPERTS = "evaluation.experts=false"
# every linear layer, and nothing else, is trained
MEAN = (NO_EXPERTS, "operator.name=mean")
FULL = (*MEAN, "local_update.method=full", "protocol.rounds=1", "protocol.local_steps=2")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("handoff"))


@pytest.fixture(scope="module")
def run(runs: Runs) -> RunResult:
    return runs.get(*MEAN)


def export_as(format_: str, run: RunResult, output: Path, **options: Any) -> ExportResult:
    return export(run.folder, output, ExportOptions(format_, **options))


def product(folder: Path, name: str) -> torch.Tensor:
    """s·B·A of one module, from the files as they are."""
    config, weights = read_json(folder / "adapter_config.json"), load_tensors(folder / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    scaling: float = config["lora_alpha"] / config["r"]
    return scaling * (weights[f"{key}.lora_B.weight"] @ weights[f"{key}.lora_A.weight"])


# ---- model -----------------------------------------------------------------------------------------------------------


def test_model_is_the_runs_own_with_its_weights_linked(run: RunResult, tmp_path: Path) -> None:
    result = export_as("model", run, tmp_path / "out")
    assert same_bits(read_model(result.output), read_model(run.merged))
    weights = result.output / "model.safetensors"
    assert weights.stat().st_ino == (run.merged.resolve() / "model.safetensors").stat().st_ino
    for name in ("tokenizer.json", "config.json", "generation_config.json", "README.md"):
        file, own = result.output / name, run.merged.resolve() / name
        assert file.read_bytes() == own.read_bytes()
        assert file.stat().st_ino != own.stat().st_ino  # what people edit is a copy
    assert "hard links" in result.record["model"]["weights"]


def test_model_record_names_every_file_with_its_digest(run: RunResult, tmp_path: Path) -> None:
    record = export_as("model", run, tmp_path / "out").record
    found = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert set(record["files"]) == found - {"export.json"}
    for name, entry in record["files"].items():
        assert entry == {
            "bytes": (tmp_path / "out" / name).stat().st_size,
            "sha256": file_digest(tmp_path / "out" / name),
        }
    assert (record["format"], record["round"], record["run"]) == ("model", 2, str(run.folder))


def test_model_of_another_round_and_type_is_the_master_cast_once(run: RunResult, tmp_path: Path) -> None:
    result = export_as("model", run, tmp_path / "out", round_index=1, dtype="bfloat16", max_shard_size="20KB")
    vector = StoredTaskVector(round_folder(run, 1) / "task_vector.safetensors")
    base = read_model(Path(result.record["base_model"]["path"]))
    found = read_model(result.output)
    for name, tensor in base.items():
        expected = tensor + vector.read(name) if name in vector else tensor
        assert torch.equal(found[name], expected.bfloat16()), name
    assert len(list(result.output.glob("model-*.safetensors"))) > 1
    assert read_json(result.output / "config.json")["dtype"] == "bfloat16"
    assert "float32 task vector" in result.record["model"]["weights"]


def test_model_in_the_type_that_it_has_keeps_its_files_apart_when_asked(run: RunResult, tmp_path: Path) -> None:
    result = export_as("model", run, tmp_path / "out", max_shard_size="20KB")
    assert same_bits(read_model(result.output), read_model(run.merged))
    assert all(Checkpoint(file).num_bytes <= 20_000 for file in result.output.glob("model-*.safetensors"))


def test_model_brings_the_subfolders_of_its_base(runs: Runs, base_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    for name in ("additional_chat_templates/tool.jinja", "original/consolidated.pth", "original/params.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("x", "utf-8")
    runs = Runs(base, tmp_path / "runs")
    result = export_as("model", runs.get(*FULL), tmp_path / "out")
    assert (result.output / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert not (result.output / "original").exists()  # the base's weights in another form


def test_model_after_its_merged_folder_was_deleted_comes_from_the_master(
    run: RunResult, base_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, symlinks=True)
    shutil.rmtree(copy / "round_002" / "merged")
    result = export(copy, tmp_path / "out", ExportOptions())
    assert same_bits(read_model(result.output), read_model(run.merged))
    card = (result.output / "README.md").read_text()
    assert "Round 2 of 2" in card and str(base_folder.parent) not in card
    found = ModelCard(card).data.to_dict()
    assert (found["base_model_relation"], found["library_name"]) == ("merge", "transformers")
    assert "base_model" not in found  # a local folder is no id of the Hub


# ---- adapter ---------------------------------------------------------------------------------------------------------


def test_adapter_in_peft_is_the_base_plus_the_truncated_matrices(
    run: RunResult, base_folder: Path, tmp_path: Path
) -> None:
    result = export_as("adapter", run, tmp_path / "out", rank=3, no_measure=True)
    vector = StoredTaskVector(round_folder(run, 2) / "task_vector.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a property that peft asks transformers for by its old name
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base_folder)), str(result.output))
    merged = model.merge_and_unload().state_dict()
    base = read_model(base_folder)
    assert set(result.record["adapter"]["modules"]) == set(vector.names)
    for name, entry in result.record["adapter"]["modules"].items():
        left, values, right = torch.linalg.svd(vector.read(name).double(), full_matrices=False)
        best = (left[:, :3] * values[:3]) @ right[:3]
        assert torch.allclose(product(result.output, name).double(), best, atol=1e-6)
        torch.testing.assert_close(merged[name], base[name] + product(result.output, name))
        off = float(values[3:].square().sum().sqrt() / values.square().sum().sqrt())
        assert entry == {"rank": 3, "relative_error": pytest.approx(off, abs=1e-5)}


def test_adapter_of_high_energy_has_each_modules_rank_and_one_scaling(run: RunResult, tmp_path: Path) -> None:
    found = export_as("adapter", run, tmp_path / "out", energy=0.9, no_measure=True).record["adapter"]
    vector = StoredTaskVector(round_folder(run, 2) / "task_vector.safetensors")
    ranks = {name: entry["rank"] for name, entry in found["modules"].items()}
    for name, rank in ranks.items():
        squares = torch.linalg.svdvals(vector.read(name).double()).square()
        assert float(squares[:rank].sum() / squares.sum()) >= 0.9 - 1e-6
        assert rank == 1 or float(squares[: rank - 1].sum() / squares.sum()) < 0.9
        off = (vector.read(name) - product(tmp_path / "out", name)).norm() / vector.read(name).norm()
        assert float(off) == pytest.approx(found["modules"][name]["relative_error"], abs=1e-5)
    assert len(set(ranks.values())) > 1  # so that some have been filled up with zeros
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_adapter_rank_caps_energy(run: RunResult, tmp_path: Path) -> None:
    found = export_as("adapter", run, tmp_path / "out", energy=0.999, rank=2, no_measure=True).record["adapter"]
    assert max(entry["rank"] for entry in found["modules"].values()) == 2


def test_adapter_losses_are_measured_and_nothing_is_lost_at_full_rank(run: RunResult, tmp_path: Path) -> None:
    losses = export_as("adapter", run, tmp_path / "all", energy=1.0).record["adapter"]["losses"]
    scores = read_json(run.folder / "scores.json")
    for task, entry in losses["tasks"].items():
        assert entry["merged"] == scores["rounds"]["2"]["losses"][task]["loss"]
        assert entry["pretrained"] == scores["pretrained"]["losses"][task]["loss"]
        assert entry["adapter"] == pytest.approx(entry["merged"], abs=1e-5)
    small = export_as("adapter", run, tmp_path / "one", rank=1).record["adapter"]["losses"]
    assert any(abs(cost) > 1e-4 for cost in small["cost"].values())
    assert small["recorded_by_run"]
    assert "| letters |" in (tmp_path / "one" / "README.md").read_text()


def test_adapter_losses_of_all_models_are_measured_where_the_run_computed_elsewhere(
    run: RunResult, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, symlinks=True)
    environment = read_json(copy / "environment.json") | {"placement": "bfloat16 on cuda"}
    (copy / "environment.json").write_text(json.dumps(environment))
    (copy / "round_002" / "losses.json").unlink()
    losses = export(copy, tmp_path / "out", ExportOptions("adapter", energy=1.0)).record["adapter"]["losses"]
    assert not losses["recorded_by_run"]
    recorded = read_json(round_folder(run, 2) / "losses.json")
    for task, entry in losses["tasks"].items():
        assert entry["merged"] == pytest.approx(recorded[task]["loss"], abs=1e-5)
    assert not (copy / "round_002" / "losses.json").exists()  # an export writes nothing into the run


def test_adapter_refuses_what_lora_cannot_express_and_drops_it_when_told(runs: Runs, tmp_path: Path) -> None:
    full = runs.get(*FULL)
    with pytest.raises(ModelError, match=r"6 tensors: model\.embed_tokens\.weight \(Embedding\), .*LlamaRMSNorm"):
        export_as("adapter", full, tmp_path / "out", no_measure=True)
    assert not list(tmp_path.iterdir())
    found = export_as("adapter", full, tmp_path / "out", drop_rest=True).record["adapter"]
    assert found["dropped"]["model.norm.weight"]["reason"] == "LlamaRMSNorm"
    vector = StoredTaskVector(round_folder(full, 1) / "task_vector.safetensors")
    assert found["dropped"]["model.norm.weight"]["norm"] == pytest.approx(
        float(vector.read("model.norm.weight").norm())
    )
    lost = sum(entry["norm"] ** 2 for entry in found["dropped"].values())
    kept = sum(float(vector.read(name).double().square().sum()) for name in found["modules"])
    error = found["relative_error"] ** 2 * kept
    assert found["relative_error_with_dropped"] == pytest.approx(math.sqrt((lost + error) / (lost + kept)), rel=1e-4)
    assert any(abs(cost) > 1e-4 for cost in found["losses"]["cost"].values())
    assert "model.norm.weight" in (tmp_path / "out" / "README.md").read_text()


def test_adapter_leaves_out_modules_that_did_not_change(run: RunResult, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, symlinks=True)
    file = copy / "round_002" / "task_vector.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_tensors(file).items()}
    quiet = "model.layers.1.self_attn.q_proj.weight"
    tensors[quiet].zero_()
    from safetensors.torch import save_file

    save_file(tensors, str(file))
    done = read_json(copy / "round_002" / "DONE.json")
    done["files"]["task_vector.safetensors"] = file_digest(file)
    (copy / "round_002" / "DONE.json").write_text(json.dumps(done))
    found = export(copy, tmp_path / "out", ExportOptions("adapter", rank=1, no_measure=True)).record["adapter"]
    assert set(found["modules"]) == set(tensors) - {quiet}
    targets = read_json(tmp_path / "out" / "adapter_config.json")["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in targets and quiet.removesuffix(".weight") not in targets


def test_card_of_an_adapter_is_one_for_the_hub_and_holds_text_as_text(run: RunResult) -> None:
    hostile = "</script><img src=x onerror=alert(1)>|`"
    source = open_source(run.folder, None)
    losses = dict.fromkeys(("pretrained", "merged", "adapter"), 1.0)
    found = {
        **{"rank": 2, "relative_error_with_dropped": 0.25, "dropped": {hostile: {}}},
        "modules": {hostile: {"rank": 2, "relative_error": 0.5}},
        "losses": {"tasks": {hostile: losses}, "cost": {hostile: 0.0}},
    }
    named = source.recipe.model_copy(update={"model": "owner/base"})
    card = ModelCard(adapter_card(replace(source, recipe=named, base_name=hostile), found))
    values = card.data.to_dict()
    assert (values["base_model"], values["base_model_relation"]) == (["owner/base"], "adapter")
    assert values["library_name"] == "peft" and values["tags"][:2] == ["lora", "merge"]
    assert "<img" not in card.text and "</script" not in card.text and card.text.count("onerror") == 3
    local = adapter_card(replace(source, base_name=named.model), found | {"losses": None})
    assert str(source.base.parent) not in local and "base_model" not in ModelCard(local).data.to_dict()


def test_paths_with_any_sign_in_them_stay_one_string() -> None:
    hint = next(one for one in model_hints(Path('a "b"\\c'), "float32", chat=False) if one.tool == "transformers")
    (line,) = [line for line in hint.lines if line.startswith("tokenizer")]
    assert eval(line.removeprefix("tokenizer = AutoTokenizer.from_pretrained")) == 'a "b"\\c'


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_export_refuses_unfinished_runs_and_missing_rounds(run: RunResult, tmp_path: Path) -> None:
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run.folder, copy, symlinks=True)
    with pytest.raises(RunFolderError, match="round 3 does not exist, the run has 2; finished are: 1, 2"):
        export(copy, out, ExportOptions(round_index=3))
    with pytest.raises(RunFolderError, match="round 0 is the pretrained model"):
        export(copy, out, ExportOptions(round_index=0))
    (copy / "round_002" / "DONE.json").unlink()
    with pytest.raises(RunFolderError, match=r"not finished \(1 of 2 rounds\); --round 1 exports the last finished"):
        export(copy, out, ExportOptions())
    with pytest.raises(RunFolderError, match="round 2 is not finished; finished are: 1"):
        export(copy, out, ExportOptions(round_index=2))
    with pytest.raises(RunFolderError, match="holds no run"):
        export(tmp_path / "nothing", out, ExportOptions())
    assert not out.exists()


def test_export_refuses_outputs_in_the_run_and_with_something_in_them(run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is inside the run folder"):
        export(run.folder, run.folder / "exported", ExportOptions())
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty"):
        export(run.folder, tmp_path / "used", ExportOptions())
    with pytest.raises(RunFolderError, match="is a file"):
        export(run.folder, tmp_path / "used" / "notes.txt", ExportOptions())
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_export_refuses_changed_files(run: RunResult, base_folder: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run.folder, copy, symlinks=True)
    file = copy / "round_002" / "task_vector.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunFolderError, match="is not the file that the round wrote"):
        export(copy, out, ExportOptions())
    environment = read_json(copy / "environment.json")
    environment["identity"]["model"] = "another"
    (copy / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(RunFolderError, match=r"content of its pretrained model .* changed"):
        export(copy, out, ExportOptions())
    environment["base_model"]["path"] = str(tmp_path / "gone")
    (copy / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(RunFolderError, match="pretrained model is gone"):
        export(copy, out, ExportOptions())
    assert not out.exists()


def test_export_refuses_losses_on_other_data(run: RunResult, runs: Runs, tmp_path: Path) -> None:
    file = runs.folder / "data" / "letters.validation.jsonl"
    kept = file.read_text()
    try:
        file.write_text("\n".join(kept.splitlines()[::-1]) + "\n")
        with pytest.raises(RunFolderError, match=r"data of task 'letters' changed .* --no-measure"):
            export_as("adapter", run, tmp_path / "out", rank=1)
        file.unlink()
        with pytest.raises(DataError, match="--no-measure exports without losses"):
            export_as("adapter", run, tmp_path / "out", rank=1)
    finally:
        file.write_text(kept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("gguf"), "there are model, adapter, mergekit"),
        (ExportOptions("model", rank=4), "--rank is for --format adapter, not for model"),
        (ExportOptions("mergekit", drop_rest=True), "--drop-rest is for --format adapter"),
        (ExportOptions("adapter", max_shard_size="1GB"), "--max-shard-size is for --format model"),
        (ExportOptions("model", dtype="int8"), "there are float32, bfloat16, float16"),
        (ExportOptions("model", max_shard_size="many"), "not a size such as 5GB"),
        (ExportOptions("adapter", rank=0), "give 1 or more"),
        (ExportOptions("adapter", energy=1.5), "a share, above 0 and at most 1"),
    ],
)
def test_export_refuses_options_by_name(run: RunResult, tmp_path: Path, options: ExportOptions, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        export(run.folder, tmp_path / "out", options)


def test_export_refuses_a_rank_above_the_matrix(run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--rank 17: '.*k_proj\.weight' is 16 × 32, so its rank is at most 16"):
        export_as("adapter", run, tmp_path / "out", rank=17, no_measure=True)


@pytest.mark.parametrize("format_", ["model", "adapter", "mergekit"])
def test_export_refuses_what_the_disk_cannot_hold(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("manyshot.rundir.shutil.disk_usage", lambda path: Usage)
    options = {"model": {"dtype": "float16"}, "adapter": {"rank": 1, "no_measure": True}, "mergekit": {}}[format_]
    with pytest.raises(ManyshotError, match=r"the disk has 0\.00 GB free"):
        export_as(format_, run, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# ---- what to do next -------------------------------------------------------------------------------------------------


def snippet(record: dict[str, Any], tool: str) -> str:
    return "\n".join(next(hint["lines"] for hint in record["commands"] if hint["tool"] == tool))


@pytest.mark.parametrize(("format_", "tool"), [("model", "transformers"), ("adapter", "transformers and PEFT")])
def test_snippets_of_python_run_as_they_are_printed(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str, tool: str
) -> None:
    options = {"rank": 2, "no_measure": True} if format_ == "adapter" else {}
    record = export_as(format_, run, tmp_path / "out", **options).record
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exec(snippet(record, tool), {})
    assert capsys.readouterr().out.endswith("\n")


def test_commands_of_servers_name_the_export_and_its_rank(run: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "My Model"
    record = export_as("model", run, out).record
    assert snippet(record, "vLLM") == f"vllm serve '{out}' --served-model-name my-model"
    assert f"--outtype f32 --outfile '{out}/my-model.gguf'" in snippet(record, "llama.cpp")
    assert snippet(record, "Ollama").startswith(f"ollama create my-model -f '{out}/Modelfile'")
    record = export_as("adapter", run, tmp_path / "lora", rank=9, no_measure=True).record
    base = record["base_model"]["path"]
    expected = f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules lora={tmp_path}/lora"
    assert snippet(record, "vLLM") == expected


def test_modelfile_reads_what_llama_cpp_writes_and_ends_where_the_model_does(run: RunResult, tmp_path: Path) -> None:
    record = export_as("model", run, tmp_path / "out").record
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./out-Q4_K_M.gguf"
    assert f"{tmp_path}/out/out-Q4_K_M.gguf" in snippet(record, "llama.cpp")
    assert 'PARAMETER stop "<end>"' in lines
    assert record["chat_template"]["text"] is not None
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.chat_template


# ---- the command -----------------------------------------------------------------------------------------------------


def test_export_command_prints_what_comes_next_and_the_folder_last(run: RunResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = CliRunner().invoke(app, ["export", str(run.folder), "-f", "adapter", "--rank", "2", "-o", str(out)])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[-1] == str(out)
    assert any(line.startswith("rank 2, 8 modules; relative error 0.") for line in lines)
    assert any(line.startswith("letters: validation loss ") and " pretrained" in line for line in lines)
    record = read_json(out / "export.json")
    for hint in record["commands"]:
        for line in hint["lines"]:
            assert f"    {line}" in lines
    quiet = CliRunner().invoke(app, ["export", str(run.folder), "-o", str(tmp_path / "model"), "--quiet"])
    assert quiet.stdout == f"{tmp_path / 'model'}\n"
    told = CliRunner().invoke(app, ["export", str(run.folder), "-f", "mergekit", "-o", str(tmp_path / "m"), "--json"])
    assert json.loads(told.stdout)["mergekit"]["method"] == "task_arithmetic"


def test_export_run_does_the_same_from_python(run: RunResult, tmp_path: Path) -> None:
    result = manyshot.export_run(run.folder, tmp_path / "out", "adapter", rank=1, measure=False)
    assert result.record == read_json(tmp_path / "out" / "export.json")
    assert result.record["adapter"]["rank"] == 1
    assert result.record["adapter"]["losses"] is None


def test_export_command_is_refused_by_name(run: RunResult, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["export", str(run.folder), "--round", "7", "-o", str(tmp_path / "out")])
    assert isinstance(refused.exception, RunFolderError)
    assert "round 7 does not exist" in str(refused.exception)


def test_export_that_is_interrupted_leaves_nothing(
    run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Any, tasks: Any, adapter: Path) -> None:
        assert (adapter / "adapter_model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("manyshot.export_command.measure_losses", interrupt)
    done = CliRunner().invoke(app, ["export", str(run.folder), "-f", "adapter", "-o", str(tmp_path / "out")])
    assert done.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_read_again(run: RunResult, tmp_path: Path) -> None:
    wanted = {name: Checkpoint(run.merged).info(name) for name in Checkpoint(run.merged).names}
    check_written(run.merged, wanted)
    with pytest.raises(ModelError, match=r"tensor 'more\.weight' should be .*, written is None"):
        check_written(run.merged, wanted | {"more.weight": TensorInfo((2,), "F32")})
    with pytest.raises(ModelError, match=r"tensor 'model\.norm\.weight' should be .*BF16"):
        check_written(run.merged, wanted | {"model.norm.weight": TensorInfo((32,), "BF16")})


# ---- lm-evaluation-harness, as people call it ------------------------------------------------------------------------


def harness_task(folder: Path, data: Path) -> None:
    """A task file of the harness for a local file with choices."""
    task = {
        "task": "letters_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    folder.mkdir()
    (folder / "letters_choice.yaml").write_text(json.dumps(task))  # JSON is YAML


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lm_eval_reads_model_and_adapter_by_the_printed_commands(run: RunResult, runs: Runs, tmp_path: Path) -> None:
    harness_task(tmp_path / "tasks", runs.folder / "data" / "letters.test.jsonl")
    model = export_as("model", run, tmp_path / "model").record
    adapter = export_as("adapter", run, tmp_path / "adapter", energy=1.0, no_measure=True).record
    found = []
    for record in (model, adapter):
        words = shlex.split(snippet(record, "lm-evaluation-harness"))
        words[words.index("arc_easy")] = "letters_choice"
        words[0] = str(Path(sys.executable).parent / words[0])
        scores = tmp_path / f"{record['format']}-scores"
        words += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(scores)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(words, env=os.environ | offline, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results = next(scores.rglob("results_*.json"))
        found.append(read_json(results)["results"]["letters_choice"]["acc,none"])
    assert found[0] == found[1]
    assert 0 <= found[0] <= 1
