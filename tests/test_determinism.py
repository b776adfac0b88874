"""The first round twice: nothing to say where it is the same, else the step, the task, the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import TASKS
from manyshot import determinism, local_failure
from manyshot.cli import app
from manyshot.determinism import DeterminismReport, Difference, compare_files, verify_determinism
from manyshot.progress import Event
from manyshot.rundir import write_json
from manyshot.tensor_writer import write_tensors
from run_helpers import Runs, load_tensors

CHEAP = ("protocol.local_steps=2", "evaluation.validation_examples=3", "evaluation.test_examples=1")
run_local_update = local_failure.run_local_update


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("twice"), tasks=TASKS[:2])


def test_determinism_of_a_round_that_is_the_same_twice(runs: Runs) -> None:
    output, told, state = runs.folder / "same" / "out", list[str](), torch.get_rng_state()
    recipe = runs.recipe(*CHEAP, "local_update.adapter_start=averaged", "local_update.dropout=0.1")
    found = verify_determinism(recipe, output, lambda event: told.append(event.text))
    assert found.differences == () and found.to_json()["same"]
    assert found.lines() == [f"the first round is the same twice: {found.num_files} files, to the bit"]
    assert found.num_files > 15 and "the first round, for the second time" in told
    assert list(output.parent.iterdir()) == [] and torch.equal(torch.get_rng_state(), state)


def test_determinism_names_the_first_step_that_differs_and_what_follows(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def update(job: Any, progress: Any) -> Any:
        record = run_local_update(job, progress)
        if "second" in str(job.folder) and job.task.name == "numbers":
            file = job.folder / "adapter" / "adapter_model.safetensors"
            tensors = {key: tensor.clone() for key, tensor in load_tensors(file).items()}
            tensors[name].view(-1)[3] += 0.5
            write_tensors(file, tensors)
        return record

    monkeypatch.setattr(local_failure, "run_local_update", update)
    found = verify_determinism(runs.recipe(*CHEAP), runs.folder / "other" / "out")
    first = found.differences[0]
    assert (first.step, first.task) == ("local update", "numbers")
    assert first.file == "round_001/numbers/adapter/adapter_model.safetensors"
    assert first.details == (f"tensor '{name}': 1 of 64 entries differ, by up to 0.5",)
    assert {one.step for one in found.differences} >= {"local update", "merge", "write the merged model"}
    assert not any(one.task == "letters" or one.step == "measure the pretrained model" for one in found.differences)
    lines = found.lines()
    assert lines[1] == f"  {first.describe()}" and lines[2] == "after it, or beside it:"


# ---- two files -------------------------------------------------------------------------------------------------------


def test_compare_files_of_tensors_tells_which_entries_by_bits(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    first = {"a": torch.tensor([[1.0, 0.0], [float("nan"), 2.0]]), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(one, first)
    write_tensors(two, first)
    assert compare_files(one, two) == []  # NaN is the same as itself
    write_tensors(two, first | {"a": torch.tensor([[1.0, -0.0], [float("nan"), 2.5]])})
    (line,) = compare_files(one, two)
    assert line.startswith("tensor 'a': 2 of 4 entries differ")
    write_tensors(two, {"a": first["a"], "c": first["b"]})
    assert compare_files(one, two) == [f"tensor '{name}' is another, or in one of the two only" for name in "bc"]
    assert compare_files(one, tmp_path / "none.safetensors") == ["was not written the second time"]


def test_compare_files_of_records_tells_which_values(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"losses": [1.0, 2.0], "same": {"deep": None}})
    write_json(tmp_path / "two.json", {"losses": [1.0, 2.5], "same": {"deep": None}, "more": "x" * 100})
    assert compare_files(tmp_path / "one.json", tmp_path / "two.json") == [
        "losses.1: 2.0, then 2.5",
        f"more: None, then '{'x' * 56}…",
    ]
    write_json(tmp_path / "two.json", {"losses": [1.0], "same": {"deep": None}})
    assert compare_files(tmp_path / "one.json", tmp_path / "two.json") == ["losses: [1.0, 2.0], then [1.0]"]
    (tmp_path / "one.txt").write_text("a", "utf-8")
    (tmp_path / "two.txt").write_text("b", "utf-8")
    assert compare_files(tmp_path / "one.txt", tmp_path / "two.txt") == ["other bytes"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differs", [False, True])
def test_run_verify_determinism_ends_with_an_exit_code(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: bool
) -> None:
    differences = (Difference("local update", "math", "adapter.safetensors", ("tensor 'a'",)),) if differs else ()
    asked: list[Path] = []

    def verify(recipe: Any, output: Path, listen: Any) -> DeterminismReport:
        asked.append(output)
        listen(Event("message", "", text="hello"))
        return DeterminismReport(7, differences)

    monkeypatch.setattr(determinism, "verify_determinism", verify)
    file = tmp_path / "recipe.yaml"
    write_json(file, runs.mapping)  # JSON is YAML
    arguments = ["run", str(file), "--output", str(tmp_path / "out"), "--verify-determinism"]
    plain = CliRunner().invoke(app, arguments)
    assert (plain.exit_code, asked) == (int(differs), [tmp_path / "out"])
    assert ("local update, task 'math': adapter.safetensors: tensor 'a'" in plain.stdout) == differs
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(as_json.stdout.splitlines()[-1])
    assert as_json.exit_code == int(differs) and found["same"] is not differs and found["files"] == 7
    assert not (tmp_path / "out").exists()
