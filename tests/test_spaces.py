"""Where things are merged and what rounds start from: every variant is exact, or wrong by what is said of it."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TASKS
from manyshot import local_update
from manyshot.errors import RecipeError
from manyshot.models import ModelState, Placement, load_model
from manyshot.rundir import read_json
from manyshot.runner import RunResult, run
from manyshot.task_vector import AdapterFactors, AdapterUpdate, read_dense
from run_helpers import Runs, Tensors, combine, distance, load_tensors, phases, round_folder, weights, with_adapter

PAIR = TASKS[:2]
IDS = torch.tensor([[6, 7, 8, 9, 10, 11, 12, 33], [13, 14, 6, 1, 2, 3, 40, 41]])
STARTS = {
    "fresh": (),
    "averaged": ("local_update.adapter_start=averaged",),
    "svd": ("local_update.adapter_start=svd",),
    "own": ("local_update.adapter_start=own",),
    "factors": ("merge.space=factors",),
    "full": ("local_update.method=full", "local_update.learning_rate=0.002"),
}
ONE_ROUND = ("protocol.rounds=1", "protocol.local_steps=2", "operator=mean")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("spaces"), tasks=PAIR)


@pytest.fixture(scope="module")
def started(runs: Runs) -> dict[str, tuple[RunResult, list[torch.Tensor]]]:
    """For each way to start a round: a run of two rounds, and the logits of every model that a training began with."""
    found = {}
    make_trainer = local_update.make_trainer
    for name, overrides in STARTS.items():
        logits: list[torch.Tensor] = []

        def note_logits(model: Any, *args: Any, kept: list[torch.Tensor] = logits, **options: Any) -> Any:
            kept.append(logits_of(model))
            return make_trainer(model, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_update, "make_trainer", note_logits)
            found[name] = (run(runs.recipe("operator=mean", *overrides), runs.new_folder()), logits)
    return found


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits.clone()


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def products(adapter: Path) -> Tensors:
    """s·B·A of every tensor, computed here from the adapter's files."""
    stored, table = load_tensors(adapter / "adapter_model.safetensors"), read_json(adapter / "factors.json")
    return {
        name: stored[entry["lora_b"]].double() @ stored[entry["lora_a"]].double() * entry["scaling"]
        for name, entry in table.items()
    }


def adapters(result: RunResult, r: int) -> list[Path]:
    return [round_folder(result, r) / task / "adapter" for task in PAIR]


# ---- how a round starts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", STARTS)
def test_round_two_trains_from_exactly_the_merged_model(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]], how: str
) -> None:
    result, logits = started[how]
    merged, pretrained = plain_model(round_folder(result, 1) / "merged"), plain_model(Path(result_base(result)))
    assert len(logits) == 4
    for first in logits[:2]:
        assert float((first - logits_of(pretrained)).abs().max()) < 1e-5
    for second in logits[2:]:
        assert float((second - logits_of(merged)).abs().max()) < 1e-5
    assert float((logits_of(merged) - logits_of(pretrained)).abs().max()) > 1e-2


def result_base(result: RunResult) -> str:
    base: str = read_json(result.folder / "environment.json")["base_model"]["path"]
    return base


@pytest.mark.parametrize("how", ["averaged", "svd", "factors"])
def test_round_two_merges_what_its_experts_are(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]], how: str
) -> None:
    """θ = Θ¹ − s·B₀·A₀ + s·B·A for adapters that start at (B₀, A₀); Θ² = Θ⁰ + mean(θ − Θ⁰), not so in factor space."""
    result, _ = started[how]
    start = products(round_folder(result, 1) / "carried_adapter")
    before = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    ends = [products(adapter) for adapter in adapters(result, 2)]
    experts = [{name: before[name] - start[name] + end[name] for name in start} for end in ends]
    found = load_tensors(round_folder(result, 2) / "task_vector.safetensors")
    error = distance(found, combine(experts, [1 / 2] * 2))
    assert error > 1e-4 if how == "factors" else error < 1e-6
    # and the expert that is measured is that model
    pretrained = load_tensors(Path(result_base(result)))
    state = ModelState(
        Path(result_base(result)),
        round_folder(result, 1) / "task_vector.safetensors",
        round_folder(result, 1) / "carried_adapter",
        adapters(result, 2)[0],
    )
    model = plain_model(Path(result_base(result)))
    for name, tensor in experts[0].items():
        model.get_parameter(name).data.copy_(pretrained[name] + tensor)
    measured = load_model(state, Placement("cpu", torch.float32))
    assert float((logits_of(measured) - logits_of(model)).abs().max()) < 1e-5


def test_adapter_start_fresh_leaves_no_adapter_to_carry(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    carried = {how: (round_folder(result, 1) / "carried_adapter").is_dir() for how, (result, _) in started.items()}
    assert carried == {"fresh": False, "averaged": True, "svd": True, "own": False, "factors": True, "full": False}


def test_adapter_start_averaged_carries_the_weighted_mean_of_the_factors(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    result, _ = started["averaged"]
    factors = [load_tensors(adapter / "adapter_model.safetensors") for adapter in adapters(result, 1)]
    carried = load_tensors(round_folder(result, 1) / "carried_adapter" / "adapter_model.safetensors")
    assert distance(carried, combine(factors, [1 / 2] * 2)) < 1e-7


def test_adapter_start_svd_carries_the_best_low_rank_part_of_the_task_vector(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    result, _ = started["svd"]
    task_vector = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    for name, product in products(round_folder(result, 1) / "carried_adapter").items():
        values = torch.linalg.svdvals(task_vector[name].double())
        left = torch.linalg.matrix_norm(task_vector[name].double() - product)
        assert float(left) == pytest.approx(float(values[2:].square().sum().sqrt()), rel=1e-4), name
        assert values[2] > 1e-4  # two tasks of rank 2: something is left out


# ---- spaces ----------------------------------------------------------------------------------------------------------


def test_space_factors_merges_the_factors_and_misses_the_mean_of_the_products(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    """Θ¹ − Θ⁰ = s·(mean B)(mean A); the cross terms make it another matrix than mean s·B·A."""
    result, _ = started["factors"]
    for r in (1, 2):
        factors = [load_tensors(adapter / "adapter_model.safetensors") for adapter in adapters(result, r)]
        carried = round_folder(result, r) / "carried_adapter"
        assert distance(load_tensors(carried / "adapter_model.safetensors"), combine(factors, [1 / 2] * 2)) < 1e-7
        dense = load_tensors(round_folder(result, r) / "task_vector.safetensors")
        assert distance(dense, {name: value.float() for name, value in products(carried).items()}) < 1e-6
        exact = combine([products(adapter) for adapter in adapters(result, r)], [1 / 2] * 2)
        missed = sum(float((dense[name] - exact[name]).square().sum()) for name in exact)
        whole = sum(float(value.square().sum()) for value in exact.values())
        assert math.sqrt(missed / whole) > 0.01  # little here, where all adapters start from the same A


def test_space_factors_masks_entries_of_the_factors(runs: Runs) -> None:
    result = runs.get("merge.space=factors", "operator.mask_threshold=0.8", "protocol.rounds=1")
    factors = [load_tensors(adapter / "adapter_model.safetensors") for adapter in adapters(result, 1)]
    carried = load_tensors(round_folder(result, 1) / "carried_adapter" / "adapter_model.safetensors")
    alphas = list(weights(result, 1).values())
    num_zero = num_all = 0
    for name, found in carried.items():
        weighted = torch.stack([alpha * factor[name] for alpha, factor in zip(alphas, factors, strict=True)])
        total = weighted.sum(0)
        votes = (weighted.abs() >= 0.8 * (total - weighted).abs()).sum(0)
        torch.testing.assert_close(found, torch.where(votes >= 2, total, 0.0), atol=1e-6, rtol=0)
        num_zero, num_all = num_zero + int((found == 0).sum()), num_all + found.numel()
    assert 0.1 < num_zero / num_all < 0.9


def test_method_full_merges_every_tensor_of_the_model(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    result, _ = started["full"]
    base = load_tensors(Path(result_base(result)))
    for r in (1, 2):
        experts = [load_tensors(round_folder(result, r) / task / "model") for task in PAIR]
        merged = load_tensors(round_folder(result, r) / "merged")
        assert merged.keys() == base.keys()
        assert distance(merged, combine(experts, [1 / 2] * 2)) < 1e-6
        assert all(float((merged[name] - base[name]).abs().max()) > 1e-5 for name in base)
        assert not (round_folder(result, r) / PAIR[0] / "adapter").exists()


def test_reference_start_merges_the_rounds_own_updates(runs: Runs) -> None:
    """Θ² = Θ¹ + M(θ − Θ¹): METIS' mask compares this round's updates, not the whole task vectors."""
    overrides = ("merge.reference=start", "operator.mask_threshold=0.6")
    result = runs.get(*overrides)
    start = round_folder(result, 1) / "merged"
    before = load_tensors(start)
    experts = [with_adapter(start, adapter) for adapter in adapters(result, 2)]
    alphas = list(weights(result, 2).values())
    merged = load_tensors(round_folder(result, 2) / "merged")
    num_off = num_masked = num_all = 0
    for name in load_tensors(round_folder(result, 2) / "task_vector.safetensors"):
        weighted = torch.stack([a * (e[name] - before[name]).double() for a, e in zip(alphas, experts, strict=True)])
        total = weighted.sum(0)
        keep = (weighted.abs() >= 0.6 * (total - weighted).abs()).sum(0) >= 2
        expected = before[name] + torch.where(keep, total, 0.0)
        num_off += int(((merged[name] - expected).abs() > 1e-6).sum())
        num_masked += int((merged[name] == before[name]).sum())
        num_all += total.numel()
    assert num_off <= num_all * 1e-3
    assert num_all * 0.1 < num_masked < num_all * 0.9
    paper = runs.get("operator.mask_threshold=0.6")
    assert distance(load_tensors(round_folder(paper, 1) / "merged"), before) == 0  # round 1 is the same
    assert distance(load_tensors(round_folder(paper, 2) / "merged"), merged) > 1e-4


# ---- the scaling of adapters -----------------------------------------------------------------------------------------


SCALINGS: dict[str, tuple[tuple[str, ...], dict[str, dict[str, tuple[int, float]]]]] = {
    "plain": ((), {}),
    "rslora": (("local_update.rslora=true", "local_update.rank=3"), {"*": {"*": (3, 4 / math.sqrt(3))}}),
    "patterns": (
        ("local_update.rank_pattern={q_proj: 3}", "local_update.alpha_pattern={layers.0.self_attn.v_proj: 7.0}"),
        {"*": {"q_proj": (3, 4 / 3), "layers.0.self_attn.v_proj": (2, 7 / 2)}},
    ),
    "unlike": (
        ("tasks.letters.rank=5", "tasks.numbers.alpha=9.0"),
        {"letters": {"*": (5, 4 / 5)}, "numbers": {"*": (2, 9 / 2)}},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_adapter_scaling_is_recorded_as_peft_applies_it(runs: Runs, name: str) -> None:
    """factors.json holds rank and scaling as computed by hand, and s·B·A is PEFT's own ΔW."""
    overrides, special = SCALINGS[name]
    result = runs.get(*ONE_ROUND, *overrides)
    total = None
    for task, adapter in zip(PAIR, adapters(result, 1), strict=True):
        table, update = read_json(adapter / "factors.json"), AdapterUpdate(adapter)
        deltas = peft_deltas(Path(runs.mapping["model"]), adapter)
        assert update.names == tuple(sorted(deltas)) and len(deltas) == 8
        by_hand = special.get(task, special.get("*", {}))
        for tensor, delta in deltas.items():
            keys = [key for key in by_hand if key == "*" or tensor.endswith(f"{key}.weight")]
            rank, scaling = by_hand[keys[0]] if keys else (2, 4 / 2)
            assert AdapterFactors(adapter).weights.info(table[tensor]["lora_a"]).shape[0] == rank
            assert table[tensor]["scaling"] == pytest.approx(scaling, rel=1e-12)
            torch.testing.assert_close(read_dense(update, tensor), delta, atol=1e-7, rtol=1e-5)
            assert torch.equal(AdapterFactors(adapter).rows(tensor, 3, 5), read_dense(update, tensor)[3:5])
            assert float(delta.abs().max()) > 1e-3
        total = deltas if total is None else {key: total[key] + delta for key, delta in deltas.items()}
    assert total is not None
    merged = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    assert distance(merged, {key: value / 2 for key, value in total.items()}) < 1e-6


def peft_deltas(base: Path, adapter: Path) -> Tensors:
    """ΔW of every tensor from PEFT's get_delta_weight."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(plain_model(base), str(adapter))
    return {
        f"{path.removeprefix('base_model.model.')}.weight": layer.get_delta_weight("default").detach()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("overrides", [("merge.space=factors",), ("local_update.adapter_start=svd",)])
def test_unlike_ranks_are_refused_where_factors_are_shared(runs: Runs, overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="tasks differ in rank or alpha; that needs space: weights"):
        runs.recipe("tasks.letters.rank=5", *overrides)


# ---- types -----------------------------------------------------------------------------------------------------------


def test_output_dtype_casts_the_written_model_once_and_nothing_else(runs: Runs) -> None:
    result, usual = runs.get("operator=mean", "merge.output_dtype=bfloat16"), runs.get("operator=mean")
    base = load_tensors(Path(runs.mapping["model"]))
    for r in (1, 2):
        file = round_folder(result, r) / "task_vector.safetensors"
        assert file.read_bytes() == (round_folder(usual, r) / "task_vector.safetensors").read_bytes()
        merged, task_vector = load_tensors(round_folder(result, r) / "merged"), load_tensors(file)
        assert {tensor.dtype for tensor in task_vector.values()} == {torch.float32}
        for name, tensor in base.items():
            exact = tensor + task_vector[name] if name in task_vector else tensor
            assert torch.equal(merged[name], exact.to(torch.bfloat16)), name
        config = json.loads((round_folder(result, r) / "merged" / "config.json").read_text("utf-8"))
        assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert result.scores["rounds"] == usual.scores["rounds"]


def test_bfloat16_base_keeps_its_type_while_rounds_add_in_float32(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bf16")
    model = plain_model(Path(runs.mapping["model"])).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    for file in Path(runs.mapping["model"]).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    template = Path(runs.mapping["model"]) / "chat_template.jinja"
    (folder / template.name).write_bytes(template.read_bytes())
    result = run(runs.recipe("operator=mean", f"model={folder}"), runs.new_folder())
    base = load_tensors(folder)
    total: Tensors = {}
    for r in (1, 2):
        steps = combine([products(adapter) for adapter in adapters(result, r)], [1 / 2] * 2)
        total = {name: step + total.get(name, 0.0) for name, step in steps.items()}
        task_vector = load_tensors(round_folder(result, r) / "task_vector.safetensors")
        assert distance(task_vector, total) < 1e-6  # nothing was rounded to bfloat16 between the rounds
        merged = load_tensors(round_folder(result, r) / "merged")
        assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
        for name, delta in task_vector.items():
            assert torch.equal(merged[name], (base[name].float() + delta).to(torch.bfloat16)), name


# ---- settings reach the training -------------------------------------------------------------------------------------


def test_micro_batches_give_the_same_merged_model(runs: Runs) -> None:
    whole, parts = runs.get("operator=mean"), runs.get("operator=mean", "local_update.micro_batch_size=2")
    assert phases(whole.folder, "local_update") == phases(parts.folder, "local_update")
    assert distance(load_tensors(whole.merged), load_tensors(parts.merged)) < 1e-4


def test_trainer_arguments_change_the_result(runs: Runs) -> None:
    decayed = runs.get("operator=mean", "local_update.trainer={weight_decay: 5.0}")
    assert distance(load_tensors(runs.get("operator=mean").merged), load_tensors(decayed.merged)) > 1e-4


def test_loss_on_whole_text_changes_training_and_evaluation_changes_only_the_gaps(runs: Runs) -> None:
    usual = runs.get(*ONE_ROUND)
    trained = runs.get(*ONE_ROUND, "local_update.loss_on=whole_text")
    measured = runs.get(*ONE_ROUND, "evaluation.loss_on=whole_text")
    files = [r.folder / "round_001" / "letters" / "adapter" / "adapter_model.safetensors" for r in (usual, measured)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = round_folder(trained, 1) / "letters" / "adapter" / "adapter_model.safetensors"
    assert other.read_bytes() != files[0].read_bytes()
    counts = {
        name: read_json(round_folder(result, 1) / "losses.json")["letters"]["num_tokens"]
        for name, result in (("usual", usual), ("trained", trained), ("measured", measured))
    }
    assert counts["usual"] == counts["trained"] < counts["measured"]


def test_start_of_the_first_round_is_the_pretrained_model_in_every_setting(
    started: dict[str, tuple[RunResult, list[torch.Tensor]]],
) -> None:
    losses = [read_json(result.folder / "round_000" / "losses.json") for result, _ in started.values()]
    assert all(one == losses[0] for one in losses)
