"""Whole runs on the tiny model: what they leave, and that the numbers in it are the method's."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import TASKS
from manyshot.rundir import read_json, read_lines
from manyshot.runner import run
from manyshot.tensors import file_digest
from run_helpers import (
    Runs,
    combine,
    contents,
    distance,
    load_tensors,
    phases,
    round_folder,
    uneven_rows,
    unlike,
    weights,
    with_adapter,
)

MANY_SHOT = ("evaluation.experts=true", "evaluation.post_hoc=true", "local_update.dropout=0.1")
POST_HOC = ("evaluation.experts=true", "local_update.dropout=0.1", "protocol.rounds=1")
MEAN = ("operator=mean",)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("runs"), uneven_rows)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_run_leaves_exactly_the_files_of_the_run_folder(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    update = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/factors.json"]
    update.append("local_update.json")
    measured = ["losses.json", "outputs.json", "scores.json"]
    merge = ["guards.json", "loss_gap.json", "merge.json", "task_vector.safetensors"]
    base = [file.name for file in Path(runs.mapping["model"]).iterdir()]
    expected = {"recipe.yaml", "environment.json", "splits.json", "scores.json", "merged"}
    expected |= {f"round_000/{name}" for name in (*measured, "examples.json")}
    expected |= {f"post_hoc/{name}" for name in (*measured, *merge)}
    for task in TASKS:
        expected |= {f"experts/{task}/{name}" for name in (*update, "outputs.json", "scores.json")}
        expected |= {f"round_00{r}/{task}/{name}" for r in (1, 2) for name in update}
    expected |= {f"round_00{r}/{name}" for r in (1, 2) for name in (*measured, *merge, "DONE.json", "merged/README.md")}
    expected |= {f"round_00{r}/merged/{name}" for r in (1, 2) for name in base}
    steps = [*(f"experts/{task}" for task in TASKS), *(f"round_00{r}/{task}" for r in (1, 2) for task in TASKS)]
    expected |= {f"{folder}/manifest.json" for folder in ("round_000", "post_hoc", "round_001", "round_002", *steps)}
    assert set(contents(result.folder)) == expected | {"manifest.json"}
    assert (result.folder / "metrics.jsonl").is_file()
    assert (result.folder / "merged").readlink() == Path("round_002/merged")
    assert result.merged.resolve() == result.folder / "round_002" / "merged"


def test_run_scores_json_holds_what_every_round_measured(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    scores = read_json(result.folder / "scores.json")
    assert scores == result.scores
    assert list(scores["rounds"]) == ["1", "2"] and scores["tasks"] == list(TASKS)
    for r in (1, 2):
        folder, entry = round_folder(result, r), scores["rounds"][str(r)]
        assert entry["losses"] == read_json(folder / "losses.json")
        assert entry["scores"] == read_json(folder / "scores.json")
        assert entry["weights"] == weights(result, r)
        losses = [entry["losses"][task]["loss"] for task in TASKS]
        assert entry["multi_task_loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)
        for task in TASKS:
            own = read_json(result.folder / "experts" / task / "scores.json")[task]["score"]
            ratio = entry["scores"][task]["score"] / own if own else None
            assert entry["normalized"]["tasks"][task] == pytest.approx(ratio)
    assert result.normalized == scores["rounds"]["2"]["normalized"]


def test_run_seconds_are_those_of_the_phases_and_the_rest_is_overhead(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    seconds = result.seconds
    work = seconds["local_update"] + seconds["validation"] + seconds["score"]
    assert 0 < work < seconds["wall"]
    # phases are kept to a tenth of a millisecond, so neighbours may overlap by that much, which overhead counts once
    rounding = 1e-4 * len(read_lines(result.folder / "metrics.jsonl"))
    assert seconds["overhead"] == pytest.approx(seconds["wall"] - work, abs=rounding)
    assert seconds["overhead_share"] == pytest.approx(1 - work / seconds["wall"], abs=rounding / seconds["wall"])


def test_run_merged_folder_loads_in_plain_transformers_with_the_base_files(runs: Runs) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = runs.get(*MANY_SHOT)
    base = Path(runs.mapping["model"])
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (result.merged / file.name).read_bytes() == file.read_bytes(), file.name
    model, report = AutoModelForCausalLM.from_pretrained(str(result.merged), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(str(result.merged))
    plain = AutoModelForCausalLM.from_pretrained(str(base))
    ids = torch.tensor([tokenizer.encode("a b c")])
    with torch.no_grad():
        difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert 1e-4 < float(difference) < 100
    stored, task_vector = load_tensors(result.merged), load_tensors(round_folder(result, 2) / "task_vector.safetensors")
    for name, tensor in load_tensors(base).items():
        assert torch.equal(stored[name], tensor + task_vector[name] if name in task_vector else tensor), name


def test_run_model_card_names_base_relation_weights_and_recipe(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    text = (result.merged / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in metadata and Path(runs.mapping["model"]).name in text  # a local folder has no Hub id
    assert metadata["base_model_relation"] == "merge"
    assert {"merge", "manyshot-metis"} <= set(metadata["tags"])
    for task, weight in weights(result, 2).items():
        score = result.scores["rounds"]["2"]["scores"][task]["score"]
        assert f"| {task} | choice\\_accuracy |" in text and f"| {score:.3f} ± " in text
        assert f"| {weight:.4f} |" in text
    assert str(runs.folder) not in text and str(Path(runs.mapping["model"]).parent) not in text  # no paths of here
    shown, stored = yaml.safe_load(text.split("```yaml")[1].split("```")[0]), (result.folder / "recipe.yaml")
    assert shown["tasks"]["letters"]["train"] == "letters.train.jsonl"
    assert shown["protocol"] == yaml.safe_load(stored.read_text("utf-8"))["protocol"]


# ---- post-hoc is one round -------------------------------------------------------------------------------------------


def test_run_with_one_round_trains_each_task_once_and_its_experts_are_the_local_updates(runs: Runs) -> None:
    result = runs.get(*POST_HOC)
    assert phases(result.folder, "local_update") == [(1, task) for task in TASKS]
    for task in TASKS:
        for name in ("adapter/adapter_model.safetensors", "adapter/factors.json", "local_update.json"):
            expert = (result.folder / "experts" / task / name).read_bytes()
            assert (round_folder(result, 1) / task / name).read_bytes() == expert, (task, name)
    assert len({file_digest(result.folder / "experts" / t / "adapter/adapter_model.safetensors") for t in TASKS}) == 3


def test_run_post_hoc_result_is_the_only_round_of_a_run_with_rounds_one(runs: Runs) -> None:
    many, one = runs.get(*MANY_SHOT), runs.get(*POST_HOC)
    assert phases(many.folder, "local_update") == [(r, task) for r in (1, 1, 2) for task in TASKS]
    for name in ("task_vector.safetensors", "losses.json", "scores.json", "outputs.json", "loss_gap.json"):
        assert (many.folder / "post_hoc" / name).read_bytes() == (round_folder(one, 1) / name).read_bytes(), name
    assert many.scores["post_hoc"]["losses"] == one.scores["rounds"]["1"]["losses"]


def test_run_rounds_together_see_what_an_expert_sees(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    for task in TASKS:
        expert = read_json(result.folder / "experts" / task / "local_update.json")
        updates = [read_json(round_folder(result, r) / task / "local_update.json") for r in (1, 2)]
        assert [update["steps"] for update in updates] == [2, 2] and expert["steps"] == 4
        assert [update["steps_before"] for update in updates] == [0, 2] and expert["steps_before"] == 0
        for count in ("num_tokens", "num_counted_tokens"):
            assert sum(update[count] for update in updates) == expert[count]
        # the first round's two steps are the expert's first two: same start, same examples, same random numbers
        assert updates[0]["train_losses"] == expert["train_losses"][:2]
        assert updates[1]["train_losses"] != expert["train_losses"][2:]


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_run_twice_gives_the_same_bytes_whatever_the_global_random_state_is(runs: Runs) -> None:
    first = runs.get(*MANY_SHOT)
    torch.manual_seed(987)  # what a caller may have done: the run must not depend on it, dropout included
    random.seed(654)
    np.random.seed(321)  # noqa: NPY002 - the global state is the point here
    again = run(runs.recipe(*MANY_SHOT), runs.new_folder())
    assert unlike(first.folder, again.folder) == []


def test_run_leaves_the_global_random_state_as_it_was(runs: Runs) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1])  # noqa: NPY002
    run(runs.recipe("protocol.rounds=1", "protocol.local_steps=1"), runs.new_folder())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def test_run_with_another_seed_gives_other_bytes(runs: Runs) -> None:
    first, other = runs.get(*POST_HOC), run(runs.recipe(*POST_HOC, "seed=1"), runs.new_folder())
    differing = unlike(first.folder, other.folder)
    for task in TASKS:
        assert f"round_001/{task}/adapter/adapter_model.safetensors" in differing
        assert f"round_001/{task}/local_update.json" in differing
    assert "round_001/task_vector.safetensors" in differing and "splits.json" not in differing


# ---- the numbers are the method's ------------------------------------------------------------------------------------


def test_run_metis_weights_are_the_softmax_of_the_recorded_gaps(runs: Runs) -> None:
    result = runs.get(*MANY_SHOT)
    for r in (1, 2):
        record = read_json(round_folder(result, r) / "loss_gap.json")
        before = read_json(result.folder / f"round_00{r - 1}" / "losses.json")
        assert record["start_losses"] == before
        for task in TASKS:
            expert = read_json(round_folder(result, r) / task / "local_update.json")["validation"]
            assert record["loss_gaps"][task] == before[task]["loss"] - expert["loss"]
        raised = {task: math.exp(gap / 2.0) for task, gap in record["loss_gaps"].items()}
        expected = {task: value / sum(raised.values()) for task, value in raised.items()}
        assert record["weights"] == pytest.approx(expected, rel=1e-12)
        assert len(set(expected.values())) == 3


def test_run_mean_weights_are_uniform(runs: Runs) -> None:
    for r in (1, 2):
        assert weights(runs.get(*MEAN), r) == dict.fromkeys(TASKS, 1 / 3)


@pytest.mark.parametrize("r", [1, 2])
def test_run_mean_merges_what_peft_itself_merges(runs: Runs, r: int) -> None:
    """Θʳ = Θ⁰ + (1/T) Σ (θ_τ − Θ⁰), with θ_τ from PEFT's merge_and_unload on the round's start model."""
    result, base = runs.get(*MEAN), Path(runs.mapping["model"])
    start = base if r == 1 else round_folder(result, r - 1) / "merged"
    experts = [with_adapter(start, round_folder(result, r) / task / "adapter") for task in TASKS]
    merged = load_tensors(round_folder(result, r) / "merged")
    assert distance(merged, combine(experts, [1 / 3] * 3)) < 1e-6
    assert distance(merged, load_tensors(start)) > 1e-3


@pytest.mark.parametrize("r", [1, 2])
def test_run_metis_merges_by_the_formula_over_dense_experts(runs: Runs, r: int) -> None:
    result, base = runs.get(*MANY_SHOT), load_tensors(Path(runs.mapping["model"]))
    start = Path(runs.mapping["model"]) if r == 1 else round_folder(result, r - 1) / "merged"
    experts = [with_adapter(start, round_folder(result, r) / task / "adapter") for task in TASKS]
    alphas = [weights(result, r)[task] for task in TASKS]
    merged = load_tensors(round_folder(result, r) / "task_vector.safetensors")
    num_off = num_masked = 0
    for name, found in merged.items():
        weighted = [a * (expert[name] - base[name]).double() for a, expert in zip(alphas, experts, strict=True)]
        total = sum(weighted, torch.zeros_like(weighted[0]))
        votes = sum(((v.abs() >= 0.3 * (total - v).abs()).int() for v in weighted), torch.zeros_like(total).int())
        expected = torch.where(votes >= 2, total, torch.zeros_like(total))
        num_masked += int((expected == 0).sum())
        # a vote may flip by rounding where both sides are all but equal; nowhere else may anything differ
        num_off += int(((found.double() - expected).abs() > 1e-6).sum())
    num_all = sum(tensor.numel() for tensor in merged.values())
    assert num_off <= num_all * 1e-3
    assert num_all * 0.01 < num_masked < num_all * 0.9
