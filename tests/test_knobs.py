"""Settings of a recipe in whole runs on the tiny model: every operator, schedules, overrides, the outer optimizer."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import TASKS, MakeRecipe
from manyshot.__main__ import main
from manyshot.errors import ModelError
from manyshot.operators import BUILT_IN, MatrixOperator, Operator, Tile, merge_whole
from manyshot.progress import Event
from manyshot.recipe import operator_warnings
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json, remove
from manyshot.runner import RunResult, run
from run_helpers import Runs, Tensors, load_tensors, round_folder, uneven_rows, unlike, weights

PAIR = TASKS[:2]
BOTH = ("evaluation.experts=true", "evaluation.post_hoc=true")
ELEMENTWISE = tuple(name for name, operator in BUILT_IN.items() if not issubclass(operator, MatrixOperator))
OUTER = (
    *("operator=mean", "protocol.rounds=3", "protocol.local_steps=3", "merge.reference=start"),
    *("merge.outer_step_size=[0.5, 1.5, 0.75]", "merge.outer_momentum=0.6"),
)
AUTO = ("operator.temperature=auto", "operator.effective_tasks=1.2", "operator.mask=false")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One step per round, measured on next to nothing: what is looked at here are merges."""
    found = Runs(base_folder, tmp_path_factory.mktemp("knobs"), uneven_rows, PAIR)
    found.mapping["protocol"] = {"rounds": 2, "local_steps": 2}
    found.mapping["local_update"]["warmup_steps"] = 0
    found.mapping["evaluation"] |= {"validation_examples": 3, "test_examples": 1}
    return found


def run_with(runs: Runs, more: Mapping[str, Any], *overrides: str) -> RunResult:
    """A run of the small recipe with whole sections in place of its own: override patterns have dots in them."""
    folder = runs.new_folder()
    folder.mkdir()
    return run(recipe_from_mapping(copy.deepcopy(runs.mapping) | dict(more), overrides), folder)


def products(adapter: Path) -> Tensors:
    """s·B·A of every tensor, in float64 from the adapter's files."""
    stored, table = load_tensors(adapter / "adapter_model.safetensors"), read_json(adapter / "factors.json")
    return {
        name: stored[entry["lora_b"]].double() @ stored[entry["lora_a"]].double() * entry["scaling"]
        for name, entry in table.items()
    }


def task_vector(result: RunResult, r: int) -> Tensors:
    """Θʳ − Θ⁰ as the run stored it; of round 0, and of what was merged post-hoc, it starts from zero."""
    return load_tensors(round_folder(result, r) / "task_vector.safetensors")


def updates(result: RunResult, r: int) -> dict[str, torch.Tensor]:
    """u_τ = s·B·A of round r's experts (0: of those that post-hoc merges), (T, O, I) by tensor, float64."""
    folder = round_folder(result, r) if r else result.folder / "experts"
    found = [products(folder / task / "adapter") for task in PAIR]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def merge_tensor(operator: Operator, name: str, vectors: torch.Tensor, weights_T: torch.Tensor, r: int) -> torch.Tensor:
    """M(v) of one whole tensor, out of the pure function alone."""
    vectors = vectors.float()
    if isinstance(operator, MatrixOperator):
        return operator.merge_matrix(list(vectors), weights_T)
    tile = Tile.of(PAIR, name, seed=0, round_index=max(1, r))
    return merge_whole(operator, vectors.flatten(1), weights_T, tile).reshape(vectors.shape[1:])


def share_off(found: Tensors, expected: Tensors, atol: float = 1e-6) -> float:
    """Share of entries that differ: a mask or a trim may flip by rounding where both sides are all but equal."""
    assert found.keys() == expected.keys()
    num_off = sum(int(((found[name] - expected[name]).abs() > atol).sum()) for name in found)
    return num_off / sum(tensor.numel() for tensor in found.values())


def gaps_of(result: RunResult, r: int) -> dict[str, Any]:
    return read_json(round_folder(result, r) / "loss_gap.json")


def softmax(values: Mapping[str, float], temperature: float) -> dict[str, float]:
    raised = {task: math.exp(value / temperature) for task, value in values.items()}
    return {task: value / sum(raised.values()) for task, value in raised.items()}


def resume_bytes(runs: Runs, overrides: tuple[str, ...], *lost: str) -> list[str]:
    """Files in which a run that lost its last files, and went on from there, differs from the whole one."""
    whole, folder = runs.get(*overrides), runs.new_folder()
    shutil.copytree(whole.folder, folder, symlinks=True)
    for name in ("scores.json", "merged", *lost):
        remove(folder / name)
    run(runs.recipe(*overrides), folder, resume=True, repair=True)
    return unlike(whole.folder, folder)


# ---- every operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_knobs_every_operator_merges_by_its_function_post_hoc_and_in_rounds(runs: Runs, name: str) -> None:
    # what the tasks share has no single place in tsv_m, so the matrix operators merge what a round changed
    reference = "pretrained" if name in ELEMENTWISE else "start"
    result = runs.get(f"operator={name}", f"merge.reference={reference}", *BOTH)
    operator = runs.recipe(f"operator={name}").method
    for r in (0, 1, 2):
        weights_T = torch.tensor(
            list(
                (gaps_of(result, r) if r else read_json(result.folder / "post_hoc" / "loss_gap.json"))[
                    "weights"
                ].values()
            )
        )
        before = task_vector(result, r - 1) if r > 1 else {}
        expected = {}
        for tensor, vectors in updates(result, r).items():
            start = before.get(tensor, torch.zeros(())).double()
            whole = vectors + start if reference == "pretrained" else vectors
            expected[tensor] = merge_tensor(operator, tensor, whole, weights_T, r)
            if reference == "start":
                expected[tensor] = expected[tensor] + start
        found = task_vector(result, r) if r else load_tensors(result.folder / "post_hoc" / "task_vector.safetensors")
        assert share_off(found, expected, atol=1e-5) <= 0.002, r
        assert any(float(tensor.abs().max()) > 1e-4 for tensor in found.values())
    assert result.scores["post_hoc"]["losses"] != result.scores["rounds"]["2"]["losses"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_knobs_elementwise_operators_merge_factors_by_their_function(runs: Runs, name: str) -> None:
    result = runs.get(f"operator={name}", "merge.space=factors")
    operator = runs.recipe(f"operator={name}").method
    for r in (1, 2):
        factors = [
            load_tensors(round_folder(result, r) / task / "adapter" / "adapter_model.safetensors") for task in PAIR
        ]
        weights_T = torch.tensor(list(weights(result, r).values()))
        expected = {
            key: merge_tensor(operator, key, torch.stack([one[key] for one in factors]), weights_T, r)
            for key in factors[0]
        }
        carried = round_folder(result, r) / "carried_adapter"
        assert share_off(load_tensors(carried / "adapter_model.safetensors"), expected) == 0
        dense = {key: value.float() for key, value in products(carried).items()}
        assert share_off(task_vector(result, r), dense) == 0


@pytest.mark.parametrize("name", ["ties", "dare", "iso_c"])
def test_knobs_operators_resume_to_the_same_bytes(runs: Runs, name: str) -> None:
    reference = "pretrained" if name in ELEMENTWISE else "start"
    overrides = (f"operator={name}", f"merge.reference={reference}", *BOTH)
    assert (
        resume_bytes(
            runs,
            overrides,
            "round_002/task_vector.safetensors",
            "round_002/merge.json",
            "round_002/merged",
            "round_002/DONE.json",
        )
        == []
    )


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_knobs_gap_relative_divides_by_what_each_expert_gained(runs: Runs) -> None:
    result = runs.get("operator.gap=relative", "operator.temperature=0.5", "operator.mask=false")
    pretrained = read_json(result.folder / "round_000" / "losses.json")
    for r in (1, 2):
        record = gaps_of(result, r)
        before = {task: pretrained[task]["loss"] for task in PAIR}
        gains = {task: before[task] - record["expert_losses"][task]["loss"] for task in PAIR}
        least = {task: 0.01 * before[task] for task in PAIR}
        lacking = {task: min(record["loss_gaps"][task], max(gains[task], 0.0)) for task in PAIR}
        relative = {task: max(lacking[task] / max(gains[task], least[task]), -1.0) for task in PAIR}
        assert record["relative_gaps"] == pytest.approx(list(relative.values()), rel=1e-12)
        assert record["weights"] == pytest.approx(softmax(relative, 0.5), rel=1e-12)
        if r == 1:  # the start is the pretrained model, so a gap is all that its expert gained
            assert record["relative_gaps"] == pytest.approx([min(1.0, gains[task] / least[task]) for task in PAIR])
            assert any(gains[task] > 0 for task in PAIR)


def test_knobs_temperature_auto_aims_at_the_effective_tasks(runs: Runs) -> None:
    result = runs.get(*AUTO)
    for r in (1, 2):
        record = gaps_of(result, r)
        assert record["effective_tasks"] == pytest.approx(1.2, abs=1e-6)
        assert record["weights"] == pytest.approx(softmax(record["loss_gaps"], record["temperature"]), rel=1e-9)
        entropy = -sum(weight * math.log(weight) for weight in record["weights"].values() if weight)
        assert math.exp(entropy) == pytest.approx(1.2, abs=1e-6)
    assert gaps_of(result, 1)["temperature"] != gaps_of(result, 2)["temperature"]
    assert resume_bytes(runs, AUTO, "round_002/loss_gap.json", "round_002/merge.json", "round_002/DONE.json") == []


MASKED = (
    *("operator.gap=over_start", "operator.temperature=0.05", "operator.weight_memory=0.5"),
    *("operator.mask=soft", "operator.vote=unweighted", "operator.rescale=norm", "operator.mask_threshold=0.8"),
)


def test_knobs_memory_and_soft_rescaled_masks_go_through_a_run_and_its_resume(runs: Runs) -> None:
    result, remembered = runs.get(*MASKED), dict.fromkeys(PAIR, 0.5)
    for r in (1, 2):
        record = gaps_of(result, r)
        shares = {task: record["loss_gaps"][task] / record["start_losses"][task]["loss"] for task in PAIR}
        assert record["relative_gaps"] == pytest.approx(list(shares.values()), rel=1e-12)
        raised = {task: weight * remembered[task] ** 0.5 for task, weight in softmax(shares, 0.05).items()}
        expected = {task: value / sum(raised.values()) for task, value in raised.items()}
        assert record["weights"] == pytest.approx(expected, rel=1e-9)
        remembered = record["weights"]
        before, weights_T = (task_vector(result, r - 1) if r > 1 else {}), torch.tensor(list(remembered.values()))
        merged = {
            name: merge_tensor(
                runs.recipe(*MASKED).method, name, vectors + before.get(name, torch.zeros(())), weights_T, r
            )
            for name, vectors in updates(result, r).items()
        }
        assert share_off(task_vector(result, r), merged, atol=1e-5) <= 0.01, r
    lost = (
        "round_002/loss_gap.json",
        "round_002/merge.json",
        "round_002/task_vector.safetensors",
        "round_002/DONE.json",
    )
    assert resume_bytes(runs, MASKED, *lost) == []


def test_knobs_temperature_auto_aims_at_three_quarters_of_the_tasks_unless_told(runs: Runs) -> None:
    result = runs.get("operator.temperature=auto", "operator.mask=false", "protocol.rounds=1")
    assert gaps_of(result, 1)["effective_tasks"] == pytest.approx(0.75 * 2, abs=1e-6)


def test_knobs_schedules_and_no_mask_give_each_round_its_own_values(runs: Runs) -> None:
    """Θʳ − Θ⁰ = βʳ Σ α_τ v_τ with α = softmax(G/λʳ)."""
    result = runs.get("operator.temperature=[0.05, 5]", "operator.scaling=[1.0, 0.5]", "operator.mask=false")
    for r, temperature, scaling in ((1, 0.05, 1.0), (2, 5.0, 0.5)):
        record = gaps_of(result, r)
        assert record["temperature"] == temperature
        assert record["weights"] == pytest.approx(softmax(record["loss_gaps"], temperature), rel=1e-9)
        alphas = torch.tensor(list(record["weights"].values())).double()[:, None, None]
        before = task_vector(result, 1) if r > 1 else {}
        expected = {
            name: (scaling * ((vectors + before.get(name, torch.zeros(()))) * alphas).sum(0)).float()
            for name, vectors in updates(result, r).items()
        }
        assert share_off(task_vector(result, r), expected) == 0
        assert read_json(round_folder(result, r) / "merge.json")["kept_share"] == 1.0


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_knobs_overrides_give_tensors_other_settings_and_other_operators(runs: Runs) -> None:
    """A multiplier of 1 is a mean's weight of 1/T, whatever the operator of the other tensors takes."""
    overrides = {
        "*_proj.weight": {"scaling": 0.2},
        "*.q_proj.*": {"name": "mean"},
        "*layers.1.*k_proj*": {"scaling": 0.1},
    }
    more = {"operator": {"name": "task_arithmetic", "scaling": 0.3}, "overrides": overrides}
    result = run_with(runs, more)
    for r in (1, 2):
        before = task_vector(result, 1) if r > 1 else {}
        found, expected, factors = task_vector(result, r), {}, set()
        for name, vectors in updates(result, r).items():
            factor = 1 / 2 if ".q_proj." in name else 0.1 if "layers.1." in name and "k_proj" in name else 0.2
            factors.add(factor)
            expected[name] = (factor * (vectors + before.get(name, torch.zeros(()))).sum(0)).float()
        assert factors == {1 / 2, 0.1, 0.2}
        assert share_off(found, expected) == 0


def test_knobs_override_that_fits_no_trained_tensor_is_refused_before_anything_is_written(
    runs: Runs, tmp_path: Path
) -> None:
    recipe = recipe_from_mapping(runs.mapping | {"overrides": {"*.mlp.*": {"scaling": 0.5}}})
    with pytest.raises(ModelError, match=r"overrides: the pattern '\*\.mlp\.\*' fits none of the 8 tensors"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the outer optimizer ---------------------------------------------------------------------------------------------


def test_knobs_outer_optimizer_adds_steps_and_momentum(runs: Runs) -> None:
    """Θʳ = Θʳ⁻¹ + η M(u) + μ (Θʳ⁻¹ − Θʳ⁻²), here with M the mean, η of its own per round and Θ⁻¹ = Θ⁰."""
    result = runs.get(*OUTER)
    last: Tensors = {}
    before: Tensors = {}
    for r, step_size in ((1, 0.5), (2, 1.5), (3, 0.75)):
        found, expected = task_vector(result, r), {}
        for name, vectors in updates(result, r).items():
            start = last.get(name, torch.zeros(())).double()
            velocity = start - before.get(name, torch.zeros(())).double()
            expected[name] = (start + step_size * vectors.mean(0) + 0.6 * velocity).float()
        assert share_off(found, expected, atol=1e-7) == 0, r
        if r > 1:  # momentum is no small part of it
            plain = {name: last[name] + step_size * vectors.mean(0) for name, vectors in updates(result, r).items()}
            assert share_off(found, plain, atol=1e-5) > 0.5
        before, last = last, found


def test_knobs_outer_optimizer_resumes_to_the_same_bytes(runs: Runs) -> None:
    assert resume_bytes(runs, OUTER, "round_003") == []
    assert resume_bytes(runs, OUTER, "round_002", "round_003") == []


def test_knobs_outer_step_of_one_without_momentum_is_the_plain_form(runs: Runs) -> None:
    plain = runs.get("operator=mean", "merge.reference=start")
    same = runs.get(
        "operator=mean", "merge.reference=start", "merge.outer_step_size=[1.0, 1]", "merge.outer_momentum=0"
    )
    assert unlike(plain.folder, same.folder, manifests=False) == [
        "recipe.yaml",
        "round_001/merged/README.md",
        "round_002/merged/README.md",
    ]


# ---- warnings --------------------------------------------------------------------------------------------------------

GROWING = ("operator=task_arithmetic", "operator.scaling=0.5")


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        (GROWING, "1.5"),
        (("operator=dare",), "1.2"),
        (("operator=consensus_ta",), "1.2"),
        (("operator=iso_c",), "3"),
        (("operator=mean", "operator=ties", "operator.scaling=1.5"), "1.5"),
        (("operator=task_arithmetic", "operator.scaling=[0.1, 0.6]"), "1.8"),
        (("operator=task_arithmetic", "operator.scaling=0.3"), None),
        (("operator=dare", "operator.then=ties"), None),
        (("operator=ties",), None),
        (("operator=mean",), None),
        (("operator=metis",), None),
        ((*GROWING, "merge.reference=start"), None),
        ((*GROWING, "protocol.rounds=1"), None),
        ((*GROWING, "merge.space=factors"), "1.5"),
        (("operator=metis", "merge.space=factors"), None),
    ],
)
def test_knobs_growth_of_what_rounds_share_is_warned_of_with_its_factor(
    make_recipe: MakeRecipe, overrides: tuple[str, ...], factor: str | None
) -> None:
    found = [text for text in operator_warnings(make_recipe(*overrides)) if "> 1 in every round" in text]
    assert len(found) == (factor is not None)
    if factor is not None:
        assert found[0].startswith("operator.scaling: ") and f" = {factor} > 1 in every round" in found[0]


def test_knobs_growth_warning_is_a_message_of_the_run_and_stands_in_plan_and_validate(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    recipe = runs.recipe(*GROWING, "operator.scaling=0.75")
    result = run(recipe, tmp_path / "run", listener=events.append)
    warning = operator_warnings(recipe)[0]
    assert next(event.text for event in events if event.kind == "message") == f"warning: {warning}"
    norms = [math.sqrt(sum(float(t.square().sum()) for t in task_vector(result, r).values())) for r in (1, 2)]
    assert norms[1] > 1.3 * norms[0]  # it does grow
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(runs.mapping), "utf-8")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for command in ("plan", "validate"):
            monkeypatch.setattr(
                sys, "argv", ["manyshot", command, str(file), *GROWING, "operator.scaling=0.75", "--json"]
            )
            capfd.readouterr()
            with pytest.raises(SystemExit) as exit_:
                main()
            assert exit_.value.code in (0, None)
            assert warning in json.loads(capfd.readouterr().out)["warnings"]
    finally:
        signal.signal(signal.SIGTERM, handler)
