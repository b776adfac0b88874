"""Mergekit files of runs: mergekit itself makes the round's merged model again from what was written."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from manyshot.errors import RunFolderError
from manyshot.export_command import ExportOptions, export
from manyshot.export_mergekit import to_mergekit
from manyshot.export_source import open_source
from manyshot.rundir import read_json, write_json
from manyshot.task_vector import StoredTaskVector
from merge_helpers import read_model
from run_helpers import Runs, distance, round_folder, uneven_rows

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install --no-deps mergekit==0.1.5 immutables")

SHORT = ("protocol.local_steps=2", "evaluation.validation_examples=2", "evaluation.test_examples=2")
TIES = ("operator.name=ties", "operator.density=0.5", "merge.reference=start", "merge.outer_step_size=0.5")
METIS = ("operator.name=metis", "operator.mask=false", "local_update.adapter_start=averaged")
DARE = ("operator.name=dare", "operator.density=1.0", "operator.then=ties", "operator.scaling=0.7")
FULL = ("operator.name=task_arithmetic", "operator.scaling=0.3", "local_update.method=full", "protocol.rounds=1")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("mergekit"), uneven_rows)


def run_mergekit(folder: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of the file in `folder`, by the printed command's options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mergekit asks numpy and transformers for things by their old names
        from mergekit.config import MergeConfiguration
        from mergekit.io.tasks import LoaderCache
        from mergekit.merge import MergeOptions, run_merge

        LoaderCache.loaders.clear()  # it lasts as long as the process, and knows models by their relative paths
        config = MergeConfiguration.model_validate(yaml.safe_load((folder / "mergekit.yml").read_text("utf-8")))
        options = MergeOptions(lora_merge_cache="lora-cache", lora_merge_dtype="float32", quiet=True)
        logging.disable(logging.CRITICAL)
        try:
            run_merge(config, "merged-by-mergekit", options)
        finally:
            logging.disable(logging.NOTSET)
    return read_model(folder / "merged-by-mergekit")


@pytest.mark.parametrize(
    ("settings", "method", "files"),
    [
        (("operator.name=mean",), "task_arithmetic", {"start", "experts"}),
        (METIS, "task_arithmetic", {"start", "experts"}),
        (TIES, "ties", {"start", "experts"}),
        (DARE, "dare_ties", {"start", "experts"}),
        (FULL, "task_arithmetic", {"experts"}),
        (("operator.name=metis",), "task_arithmetic", {"merged"}),
    ],
    ids=["mean", "metis without mask", "ties from the start", "dare then ties", "all weights", "metis"],
)
def test_mergekit_makes_the_merged_model_again(
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    method: str,
    files: set[str],
) -> None:
    run = runs.get(*SHORT, *settings)
    result = export(run.folder, tmp_path / "out", ExportOptions("mergekit"))
    assert {file.name for file in result.output.iterdir()} == files | {"mergekit.yml", "export.json"}
    assert result.record["mergekit"]["method"] == method
    monkeypatch.chdir(result.output)
    found, expected = run_mergekit(result.output), read_model(run.merged)
    assert distance(expected, read_model(Path(result.record["base_model"]["path"]))) > 1e-3
    assert found.keys() == expected.keys()
    differing = sum(int(((found[name] - expected[name]).abs() > 2e-7).sum()) for name in expected)
    # two steps of Adam leave few different magnitudes, so that many are equal at TIES' threshold; see `differences`
    allowed = 0.005 if method == "ties" else 0.0
    assert differing <= allowed * sum(tensor.numel() for tensor in expected.values())


def test_mergekit_file_says_what_differs_and_why_metis_is_not_made_from_experts(runs: Runs, tmp_path: Path) -> None:
    dare = export(runs.get(*SHORT, *DARE).folder, tmp_path / "dare", ExportOptions("mergekit", dtype="bfloat16"))
    text = (dare.output / "mergekit.yml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("draws other entries" in line for line in comments)
    assert any("stored as bfloat16" in line for line in comments)
    assert dare.record["mergekit"]["config"]["out_dtype"] == "bfloat16"
    metis = export(runs.get(*SHORT, "operator.name=metis").folder, tmp_path / "metis", ExportOptions("mergekit"))
    reason = "mergekit has no operator that does what metis with a mask does"
    assert metis.record["mergekit"]["why_not_from_experts"] == reason
    assert f"# Not made from the experts: {reason}." in (metis.output / "mergekit.yml").read_text().splitlines()
    command = metis.record["commands"][0]["lines"][0]
    assert command == f"cd {metis.output} && mergekit-yaml mergekit.yml merged-by-mergekit"


def test_mergekit_adapters_of_averaged_starts_are_the_experts_own_updates(runs: Runs, tmp_path: Path) -> None:
    run = runs.get(*SHORT, *METIS)
    export(run.folder, tmp_path / "out", ExportOptions("mergekit"))
    from manyshot.peft_adapter import read_adapter
    from manyshot.task_vector import AdapterUpdate, read_dense
    from manyshot.tensors import Checkpoint

    folder = round_folder(run, 2)
    base = Checkpoint(Path(read_json(run.folder / "environment.json")["base_model"]["path"]))
    update = read_adapter(tmp_path / "out" / "experts" / "letters", base, "letters")
    own = AdapterUpdate(folder / "letters" / "adapter", round_folder(run, 1) / "carried_adapter")
    assert update.names == own.names
    for name in own.names:
        assert torch.allclose(read_dense(update, name), read_dense(own, name), atol=1e-7), name
        assert not torch.allclose(read_dense(own, name), read_dense(AdapterUpdate(own.end), name), atol=1e-5), name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"overrides": {"*q_proj*": {"scaling": 0.5}}}, "operators by tensor name"),
        ({"merge": {"space": "factors"}}, "merged LoRA factors"),
        ({"merge": {"reference": "start", "outer_momentum": 0.5}}, "outer optimizer"),
        ({"operator": {"name": "iso_c"}}, "what iso_c does"),
        ({"operator": {"name": "ties", "trim_scope": "model"}}, "trim_scope: model"),
        ({"operator": {"name": "metis", "mask": "soft"}}, "metis with a mask"),
    ],
)
def test_mergekit_says_what_it_cannot_say(runs: Runs, settings: dict[str, Any], reason: str) -> None:
    from dataclasses import replace

    from manyshot.recipe import Recipe

    source = open_source(runs.get(*SHORT, "operator.name=mean").folder, None)
    raw = source.recipe.model_dump(mode="json") | {"operator": {"name": "task_arithmetic"}}
    changed = {key: (raw[key] | value if key == "merge" else value) for key, value in settings.items()}
    found = to_mergekit(replace(source, recipe=Recipe.model_validate(raw | changed)))
    assert isinstance(found, str) and reason in found


def test_mergekit_takes_the_merged_model_where_a_merge_was_taken_back(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs.get(*SHORT, "operator.name=mean").folder, copy, symlinks=True)
    record = read_json(copy / "round_002" / "merge.json")
    write_json(copy / "round_002" / "merge.json", record | {"rolled_back": {"losses": {}}})
    found = to_mergekit(open_source(copy, None))
    assert found == "the round's merge was taken back, so the experts had no part in its model"


def test_mergekit_names_the_experts_that_were_merged_alone(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs.get(*SHORT, "operator.name=mean").folder, copy, symlinks=True)
    record = read_json(copy / "round_002" / "merge.json")
    del record["weights"]["numbers"]  # a round may go on without a task
    write_json(copy / "round_002" / "merge.json", record)
    config = export(copy, tmp_path / "out", ExportOptions("mergekit")).record["mergekit"]["config"]
    assert [model["model"] for model in config["models"]] == ["./start+./experts/letters", "./start+./experts/words"]
    assert not (tmp_path / "out" / "experts" / "numbers").exists()


def test_mergekit_refuses_a_base_whose_path_it_would_misread(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    source = open_source(runs.get(*SHORT, "operator.name=mean").folder, None)
    odd = tmp_path / "base+more"
    monkeypatch.setattr("manyshot.export_command.open_source", lambda run, index: replace(source, base=odd))
    with pytest.raises(RunFolderError, match=r"cannot be given a path with '\+'"):
        export(source.folder.path, tmp_path / "out", ExportOptions("mergekit"))
    assert not (tmp_path / "out").exists()


def test_mergekit_start_is_the_model_of_the_round_before_in_float32(runs: Runs, tmp_path: Path) -> None:
    run = runs.get(*SHORT, "operator.name=mean")
    export(run.folder, tmp_path / "out", ExportOptions("mergekit"))
    start, before = read_model(tmp_path / "out" / "start"), round_folder(run, 1)
    vector = StoredTaskVector(before / "task_vector.safetensors")
    base = read_model(Path(read_json(run.folder / "environment.json")["base_model"]["path"]))
    for name, tensor in base.items():
        expected = tensor.float() + vector.read(name) if name in vector else tensor.float()
        assert torch.equal(start[name], expected), name
