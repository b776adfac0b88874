"""The threat model of docs/security.md, line by line; what other files test is named there too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import pkgutil
import re
import shutil
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import manyshot
from conftest import TASKS, write_base
from fuzz_driver import WATCH
from manyshot import local_failure
from manyshot.__main__ import main
from manyshot.base_model import find_base_model
from manyshot.cli import app
from manyshot.data_files import read_splits
from manyshot.errors import DataError, ManyshotError, ModelError, PushError, RecipeError, TrainingError
from manyshot.examples import to_example
from manyshot.export_source import ExportSource, open_source
from manyshot.match import open_experts
from manyshot.models import ModelState, Placement, load_config, load_model, load_tokenizer
from manyshot.peft_adapter import read_adapter
from manyshot.progress import Progress
from manyshot.push import plan_upload
from manyshot.recipe_file import load_recipe
from manyshot.remote_code import CONSENT
from manyshot.rundir import FAILURE, RunFolder, read_lines
from manyshot.runner import run
from manyshot.secret_text import find_secrets, redacted
from manyshot.task_spec import TaskSpec
from manyshot.tensors import Checkpoint
from merge_helpers import make_base, make_peft_adapter
from run_helpers import Runs

ROOT = Path(__file__).parent.parent
# made up, in the forms that tokens have
TOKEN = "hf_" + "aB3" * 11
WORD = "correct-horse-battery"


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    table = text.split("## What could happen")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and not line.startswith("| **")]
    written = "\n".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^(?:async )?def (test_\w+)\(", written, re.MULTILINE))
    for cells in rows[2:]:  # below the head and its rule
        named = re.findall(r"`(test_\w+)`", cells[2])
        assert named, cells[0]
        assert set(named) <= there, set(named) - there
    assert len(rows) > 20


# ---- code in files ---------------------------------------------------------------------------------------------------


class Poison:
    """Pickled, a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


PICKLED = (
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("model.ckpt", "model.pkl", "vocab.pkl", "tokenizer.pkl", "cache-1234.arrow.pkl", "train.npy", "train.pickle"),
)


def test_pickles_of_all_kinds_are_never_opened(base_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    poison = pickle.dumps(Poison(marker))
    pickle.loads(poison)
    assert marker.exists()  # it would work
    marker.unlink()
    model, adapter, data = tmp_path / "model", make_peft_adapter(tmp_path / "adapter", "one"), tmp_path / "data"
    shutil.copytree(base_folder, model)
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    for folder in (model, adapter, data):
        for name in PICKLED:
            (folder / name).write_bytes(poison)
    with WATCH.over(tmp_path) as seen:
        find_base_model(str(model))
        load_tokenizer(model)
        import torch

        load_model(ModelState(model), Placement("cpu", torch.float32))
        read_adapter(adapter, make_base(tmp_path / "base"), "one")
        assert read_splits(str(data), None, 0, "a") == {"train": [{"prompt": "a", "completion": "b"}]}
        (model / "model.safetensors").unlink()
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(ModelError, match="never read, since they can run code"):
            Checkpoint(model)
        with pytest.raises(ModelError, match="never read since it can run code"):
            read_adapter(adapter, make_base(tmp_path / "other"), "one")
        for name in ("train.npy", "train.pickle", "model.pkl"):
            with pytest.raises(DataError, match="unknown kind of file"):
                read_splits(str(data / name), None, 0, "a")
    assert not marker.exists() and not [event for event in seen if "pickle" in event]


def test_nothing_of_ours_unpickles() -> None:
    """Beside what test_layers.py reads in the sources: no module has come to hold something of pickle's."""
    kinds = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for module in pkgutil.walk_packages(manyshot.__path__, "manyshot."):
        if module.name.endswith(("__main__", "_kernels")) or ".harness_tasks" in module.name:
            continue
        if module.name == "manyshot.flower" and importlib.util.find_spec("flwr") is None:
            continue  # it begins with the import of Flower, which has an environment of its own
        for name, value in vars(importlib.import_module(module.name)).items():
            owner = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
            assert str(owner).split(".")[0] not in kinds, f"{module.name}.{name}"


def test_code_of_a_model_runs_only_where_recipe_and_flag_say_so(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv(CONSENT, "0")
    folder, marker = tmp_path / "model_with_code", tmp_path / "marker"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    own = {"model_type": "own_kind", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own), "utf-8")
    (folder / "configuration_own.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(marker)!r}).touch()\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own_kind'\n",
        "utf-8",
    )
    with pytest.raises(ModelError):  # neither
        load_config(folder)
    with pytest.raises(ModelError, match="A recipe alone cannot ask for that"):  # the recipe
        load_config(folder, trust_remote_code=True)
    done = CliRunner().invoke(app, ["--trust-remote-code", "init", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0 and os.environ[CONSENT] == "1"
    with pytest.raises(ModelError):  # the flag
        load_config(folder)
    assert not marker.exists()
    load_config(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_prompt_template_evaluates_nothing() -> None:
    row = {"prompt": "a {completion}", "completion": "b"}
    spec = TaskSpec(data="x", template="{prompt} {{ 7 * 7 }} {0} %s $HOME")
    assert to_example(row, 0, spec, "here").prompt == "a {completion} {{ 7 * 7 }} {0} %s $HOME"
    with pytest.raises(DataError, match=r"no column 'prompt\.__class__'"):
        to_example(row, 0, TaskSpec(data="x", template="{prompt.__class__}"), "here")


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "notes.txt", "extra/file.txt"])
def test_links_out_of_a_model_folder_are_refused(base_folder: Path, tmp_path: Path, name: str) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(base_folder, folder)
    secret.write_text("mine", "utf-8")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret" if "/" not in name else "../../secret")
    with pytest.raises(ModelError, match=f"{name} is a link out of the folder, to {secret}"):
        find_base_model(str(folder))
    with pytest.raises(ModelError, match="is a link out of the folder"):
        open_experts(Checkpoint(base_folder), {"one": folder})


def test_links_inside_a_model_folder_and_links_to_it_are_fine(base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "model" / "again.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to("model")
    assert find_base_model(str(tmp_path / "link")).path == tmp_path / "model"


def test_links_of_the_hub_cache_are_fine(base_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert find_base_model(str(snapshot)).digest == find_base_model(str(base_folder)).digest


def test_links_out_of_an_adapter_are_refused(tmp_path: Path) -> None:
    folder = make_peft_adapter(tmp_path / "adapter", "one")
    (folder / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("../other.safetensors")
    with pytest.raises(ModelError, match="is a link out of the folder"):
        read_adapter(folder, make_base(tmp_path / "base"), "one")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("security"), tasks=TASKS[:2])


SHORT = ("protocol.rounds=1", "protocol.local_steps=1", "evaluation.test_examples=2")


def test_a_run_whose_merged_model_is_elsewhere_is_not_handed_on(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.get(*SHORT).folder, folder, symlinks=True)
    assert open_source(folder, None).merged is not None
    private = write_base(tmp_path / "private")
    shutil.rmtree(folder / "round_001" / "merged")
    (folder / "round_001" / "merged").symlink_to(private)
    source: ExportSource = open_source(folder, None)
    assert source.merged is None  # made again from the run's own task vector
    with pytest.raises(PushError, match="points out of the run folder"):
        plan_upload(folder, "me/model", private=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 10**9])
def test_a_header_that_claims_the_memory_is_refused_at_once(tmp_path: Path, length: int) -> None:
    file, began = tmp_path / "model.safetensors", time.process_time()
    file.write_bytes(struct.pack("<Q", length) + b'{"a": {}}')
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint(file)
    for shape, end in (([2**58], 2**60), ([2**31, 2**31], 4), ([2**62, 4], 0)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            Checkpoint(file)
    assert time.process_time() - began < 1


# ---- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"manyshot run r.yaml x={TOKEN}", "manyshot run r.yaml x=***"),
        (f"https://me:{WORD}@host/a b", "https://***@host/a b"),
        (f"GET /x?token={WORD}&n=1", "GET /x?token=***&n=1"),
        (f"Authorization: Bearer {WORD}", "Authorization: Bearer ***"),
        (f"failed for {WORD} twice: {WORD}", "failed for *** twice: ***"),
        (f"HF_TOKEN={TOKEN} manyshot", "HF_TOKEN=*** manyshot"),
        ("max_new_tokens=64 https://host/a@b", "max_new_tokens=64 https://host/a@b"),
    ],
)
def test_secrets_are_blotted_out(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", WORD)
    monkeypatch.setenv("SHORT_TOKEN", "run")  # a word like any other
    assert redacted(text) == expected


def test_secrets_are_found_by_their_form_their_key_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WORD)
    tree = {
        "model": f"https://me:{'x' * 9}@host/m",
        "local_update": {"trainer": {"hub_token": "anything-long", "pad_token": "<|endoftext|>"}},
        "tags": ["a", f"say {WORD}"],
        "tasks": {TOKEN: {"data": "x"}, "b": {"template": "What is the password? token: {prompt}"}},
    }
    assert find_secrets(tree) == [("model",), ("local_update", "trainer", "hub_token"), ("tags", 1), ("tasks",)]


def test_a_recipe_with_a_secret_is_refused_and_does_not_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: owner/name\ntasks: {a: {data: x/y}, b: {data: x/y}}\n", "utf-8")
    for override in (f"trackers.project={TOKEN}", f"model=https://me:{WORD}@host/m", f"tasks.a.data=./{TOKEN}"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [override])
        key = override.partition("=")[0]
        assert f"command line: {key}: holds a token or a password" in str(caught.value)
        assert TOKEN not in str(caught.value) and WORD not in str(caught.value)


def test_a_secret_of_the_command_line_is_not_in_the_run_folder(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WORD)
    folder = runs.new_folder()
    run(runs.recipe(*SHORT), folder, command=f"HF_TOKEN={WORD} manyshot run https://me:{TOKEN}@host/recipe.yaml")
    said = json.loads((folder / "environment.json").read_text("utf-8"))["command"]
    assert said == "HF_TOKEN=*** manyshot run https://***@host/recipe.yaml"
    for file in folder.rglob("*"):
        if file.is_file():
            assert WORD.encode() not in file.read_bytes() and TOKEN.encode() not in file.read_bytes(), file


def test_messages_and_metrics_hold_no_secret(tmp_path: Path) -> None:
    heard: list[str] = []
    progress = Progress(lambda event: heard.append(event.text), tmp_path / "metrics.jsonl")
    progress.message(f"warning: wandb fails (https://me:{WORD}@host)")
    progress.record("failed", error=f"no answer for {TOKEN}")
    assert heard == ["warning: wandb fails (https://***@host)"]
    assert read_lines(RunFolder(tmp_path).metrics)[0]["error"] == "no answer for ***"


def test_the_traceback_of_a_failed_training_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any, progress: Progress) -> None:
        raise OverflowError(f"no answer from https://me:{WORD}@host for {TOKEN}")

    monkeypatch.setattr(local_failure, "finished_update", lambda job: None)
    monkeypatch.setattr(local_failure, "run_local_update", fail)
    job: Any = SimpleNamespace(folder=tmp_path, key="k", task=SimpleNamespace(name="a"), round_index=1)
    with pytest.raises(TrainingError) as caught:
        local_failure.try_local_update(local_failure.Attempt(job), Progress())
    kept = (tmp_path / FAILURE).read_text("utf-8")
    assert "OverflowError: no answer from https://***@host for ***" in kept
    assert WORD not in kept + str(caught.value) and TOKEN not in kept + str(caught.value)


def test_an_error_of_the_system_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "missing" / "recipe.yaml"
    monkeypatch.setattr("signal.signal", lambda *args: None)  # the tests keep their own
    monkeypatch.setattr(sys, "argv", ["manyshot", "init", str(place)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"manyshot: error: {place}: No such file or directory\n"


def test_an_error_with_a_secret_is_printed_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *args: None)  # the tests keep their own
    monkeypatch.setattr(sys, "argv", ["manyshot", "run", f"https://me:{WORD}@host/recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == ManyshotError.exit_code
    assert WORD not in shown and "***@host/recipe.yaml: no such recipe file" in shown


# ---- dependencies ----------------------------------------------------------------------------------------------------


def test_every_dependency_has_one_tested_version() -> None:
    import tomllib

    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==[0-9][\w.!+]*", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    names = [pin[1].lower().replace("_", "-") for pin in pins if pin is not None]
    assert len(names) == len(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    apart = extras.pop("flower")  # tested with older versions than ours, which examples/flower pins
    asked = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    assert {Requirement(one).name.lower().replace("_", "-") for one in asked} <= set(names)
    pinned = (ROOT / "examples" / "flower" / "constraints.txt").read_text("utf-8").splitlines()
    assert {Requirement(one).name for one in apart} <= {line.split("==")[0] for line in pinned}
