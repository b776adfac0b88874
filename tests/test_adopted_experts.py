"""`tasks.<name>.expert`: experts that exist already take the place of the first round's training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TASKS
from manyshot.errors import ModelError, RecipeError, RunFolderError
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json, remove
from manyshot.runner import RunResult, run
from manyshot.tensor_writer import write_tensors
from run_helpers import Runs, Tensors, distance, load_tensors, phases, round_folder, unlike, weights, with_adapter

ADOPTED = {"letters": "adapter", "numbers": "dense"}


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(base_folder, tmp_path_factory.mktemp("adopted"))
    found.mapping["protocol"] = {"rounds": 2, "local_steps": 2}
    found.mapping["operator"] = {"name": "metis", "mask": False}
    found.mapping["local_update"]["warmup_steps"] = 0
    found.mapping["evaluation"] |= {"experts": True, "validation_examples": 3, "test_examples": 3}
    return found


@pytest.fixture(scope="module")
def experts(runs: Runs) -> dict[str, Path]:
    """An adapter and a dense folder that another run trained: letters and numbers."""
    trained = runs.get("evaluation.experts=false", "protocol.rounds=1", "seed=9")
    folder = runs.folder / "experts"
    folder.mkdir()
    shutil.copytree(round_folder(trained, 1) / "letters" / "adapter", folder / "adapter")
    base = Path(runs.mapping["model"])
    shutil.copytree(base, folder / "dense")
    dense = with_adapter(base, round_folder(trained, 1) / "numbers" / "adapter")
    write_tensors(folder / "dense" / "model.safetensors", {name: dense[name].contiguous() for name in sorted(dense)})
    return {task: folder / name for task, name in ADOPTED.items()}


def adopting(runs: Runs, experts: dict[str, Path], *overrides: str) -> Recipe:
    mapping = copy.deepcopy(runs.mapping)
    for task, path in experts.items():
        mapping["tasks"][task]["expert"] = str(path)
    return recipe_from_mapping(mapping, overrides)


@pytest.fixture(scope="module")
def result(runs: Runs, experts: dict[str, Path]) -> RunResult:
    folder = runs.new_folder()
    folder.mkdir()
    return run(adopting(runs, experts, "evaluation.post_hoc=true"), folder)


def models(runs: Runs, experts: dict[str, Path], result: RunResult) -> dict[str, Tensors]:
    """The three models of round 1, as PEFT and safetensors read them: two adopted, one trained."""
    base = Path(runs.mapping["model"])
    return {
        "letters": with_adapter(base, experts["letters"]),
        "numbers": load_tensors(experts["numbers"]),
        "words": with_adapter(base, round_folder(result, 1) / "words" / "adapter"),
    }


# ---- what a run does with them ---------------------------------------------------------------------------------------


def test_adopted_experts_are_not_trained_in_round_one_and_are_in_later_rounds(result: RunResult) -> None:
    trained = phases(result.folder, "local_update")
    assert [entry for entry in trained if entry[0] == 2] == [(2, task) for task in TASKS]
    assert {task for r, task in trained if r == 1} == {"words"}
    for task in TASKS:
        record = read_json(round_folder(result, 1) / task / "local_update.json")
        assert record["steps"] == (0 if task in ADOPTED else 1)
        assert (round_folder(result, 1) / task / "adapter").exists() == (task not in ADOPTED)
        assert (round_folder(result, 2) / task / "adapter").is_dir()
        assert read_json(round_folder(result, 2) / task / "local_update.json")["steps"] == 1


def test_adopted_experts_are_what_round_one_merges(runs: Runs, experts: dict[str, Path], result: RunResult) -> None:
    base = load_tensors(Path(runs.mapping["model"]))
    found = models(runs, experts, result)
    alphas = weights(result, 1)
    expected = {
        name: sum(
            (alphas[task] * (found[task][name].double() - base[name].double()) for task in TASKS), base[name].double()
        )
        for name in base
    }
    assert distance(load_tensors(round_folder(result, 1) / "merged"), expected) < 1e-6
    assert distance(expected, base) > 1e-3


def test_adopted_experts_losses_are_measured_as_any_models_are(
    runs: Runs, experts: dict[str, Path], result: RunResult
) -> None:
    """The loss of the adopted model on its task is what a run measures on it as its pretrained model."""
    dense = runs.folder / "as_base"
    if not dense.exists():
        folder = runs.new_folder()
        recipe = recipe_from_mapping(
            runs.mapping | {"model": str(experts["numbers"])}, ["evaluation.experts=false", "protocol.rounds=1"]
        )
        run(recipe, folder)
        dense = folder
    measured = read_json(dense / "round_000" / "losses.json")["numbers"]
    record = read_json(round_folder(result, 1) / "loss_gap.json")
    assert record["expert_losses"]["numbers"] == pytest.approx(measured, rel=1e-6)
    before = read_json(result.folder / "round_000" / "losses.json")
    for task in TASKS:
        gap = before[task]["loss"] - record["expert_losses"][task]["loss"]
        assert record["loss_gaps"][task] == pytest.approx(gap, rel=1e-12)
    own = read_json(dense / "round_000" / "scores.json")["numbers"]["score"]
    assert result.scores["experts"]["scores"]["numbers"]["score"] == own


def test_adopted_experts_scores_are_the_denominators_of_normalized_performance(result: RunResult) -> None:
    own = {task: entry["score"] for task, entry in result.scores["experts"]["scores"].items()}
    for r in ("1", "2"):
        entry = result.scores["rounds"][r]
        for task in TASKS:
            ratio = entry["scores"][task]["score"] / own[task] if own[task] else None
            assert entry["normalized"]["tasks"][task] == pytest.approx(ratio)
    for task in TASKS:
        record = read_json(result.folder / "experts" / task / "local_update.json")
        assert record["steps"] == (0 if task in ADOPTED else 2)


def test_adopted_experts_are_merged_post_hoc_too(runs: Runs, experts: dict[str, Path], result: RunResult) -> None:
    base = load_tensors(Path(runs.mapping["model"]))
    found = models(runs, experts, result)
    found["words"] = with_adapter(Path(runs.mapping["model"]), result.folder / "experts" / "words" / "adapter")
    alphas = read_json(result.folder / "post_hoc" / "loss_gap.json")["weights"]
    merged = load_tensors(result.folder / "post_hoc" / "task_vector.safetensors")
    for name, change in merged.items():
        expected = sum((alphas[task] * (found[task][name] - base[name]).double() for task in TASKS), torch.zeros(()))
        assert float((change - expected).abs().max()) < 1e-6, name


def test_adopted_experts_alone_need_no_training_in_one_round(runs: Runs, experts: dict[str, Path]) -> None:
    mapping = copy.deepcopy(runs.mapping)
    mapping["tasks"].pop("words")
    for task, path in experts.items():
        mapping["tasks"][task]["expert"] = str(path)
    folder = runs.new_folder()
    done = run(recipe_from_mapping(mapping, ["protocol.rounds=1", "protocol.local_steps=1"]), folder)
    assert phases(folder, "local_update") == []
    assert sum(weights(done, 1).values()) == pytest.approx(1)


# ---- going on --------------------------------------------------------------------------------------------------------

LOST = (
    ("round_002",),
    ("round_001", "round_002", "post_hoc"),
    ("round_001/numbers", "round_001/merge.json", "round_001/DONE.json", "round_001/merged", "round_002"),
)


@pytest.mark.parametrize("lost", LOST)
def test_adopted_experts_run_resumes_to_the_same_bytes(
    runs: Runs, experts: dict[str, Path], result: RunResult, lost: tuple[str, ...]
) -> None:
    folder = runs.new_folder()
    shutil.copytree(result.folder, folder, symlinks=True)
    for name in ("scores.json", "merged", *lost):
        remove(folder / name)
    run(adopting(runs, experts, "evaluation.post_hoc=true"), folder, resume=True, repair=True)
    assert unlike(result.folder, folder) == []


def test_adopted_expert_of_other_content_is_refused_on_resume(
    runs: Runs, experts: dict[str, Path], result: RunResult, tmp_path: Path
) -> None:
    copies = {task: Path(shutil.copytree(path, tmp_path / path.name)) for task, path in experts.items()}
    overrides = ("evaluation.experts=false",)
    folder = runs.new_folder()
    run(adopting(runs, copies, *overrides), folder)
    remove(folder / "round_002")
    remove(folder / "scores.json")
    weights_file = copies["numbers"] / "model.safetensors"
    tensors = load_tensors(weights_file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    write_tensors(weights_file, tensors)
    before = (folder / "round_001" / "loss_gap.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"tasks.numbers.expert: the content of .* changed since the run began"):
        run(adopting(runs, copies, *overrides), folder, resume=True, repair=True)
    assert (folder / "round_001" / "loss_gap.json").read_bytes() == before


# ---- refusals --------------------------------------------------------------------------------------------------------


def wide(experts: dict[str, Path], folder: Path) -> Path:
    shutil.copytree(experts["numbers"], folder)
    tensors = {name: torch.cat([tensor, tensor]) for name, tensor in load_tensors(folder).items()}
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def other_adapter(experts: dict[str, Path], folder: Path) -> Path:
    """An adapter with a module that the base has not."""
    shutil.copytree(experts["letters"], folder)
    stored = load_tensors(folder / "adapter_model.safetensors")
    write_tensors(
        folder / "adapter_model.safetensors", {name.replace("layers.1.", "layers.7."): t for name, t in stored.items()}
    )
    return folder


@pytest.mark.parametrize(("make", "message"), [(wide, "has shape"), (other_adapter, "layers.7.")])
def test_adopted_expert_of_another_base_is_refused_before_anything_is_written(
    runs: Runs, experts: dict[str, Path], tmp_path: Path, make: Any, message: str
) -> None:
    broken = {"letters": make(experts, tmp_path / "expert")}
    with pytest.raises(ModelError, match="model 'letters'") as caught:
        run(adopting(runs, broken), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_adopted_expert_that_is_not_there_is_refused_with_its_key(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tasks.letters.expert: no such file or folder: \./nowhere"):
        adopting(runs, {"letters": Path("./nowhere")}, "tasks.letters.expert=./nowhere")
    with pytest.raises(ModelError, match="model 'letters': no such folder: some/model"):
        run(adopting(runs, {"letters": Path("some/model")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["merge.space=factors", "local_update.adapter_start=averaged"])
def test_adopted_expert_is_refused_where_factors_are_shared(
    runs: Runs, experts: dict[str, Path], override: str
) -> None:
    with pytest.raises(RecipeError, match="an expert that exists already needs space: weights and adapter_start"):
        adopting(runs, experts, override)
