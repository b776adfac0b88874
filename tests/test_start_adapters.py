"""What adapters start a round from, which factors train, and how far they are let go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import TASKS
from manyshot import local_update
from manyshot.adapters import average_adapters
from manyshot.errors import RecipeError
from manyshot.eval_model import find_model
from manyshot.local_update import LocalUpdateJob, run_local_update
from manyshot.models import ModelState
from manyshot.progress import Progress
from manyshot.rundir import read_json
from manyshot.runner import RunResult, run
from manyshot.seeding import preserved_random_state
from manyshot.task_vector import AdapterFactors
from manyshot.tasks import load_task
from run_helpers import Runs, Tensors, combine, distance, load_tensors, round_folder, uneven_rows

PAIR = TASKS[:2]
KINDS = {
    "own": ("local_update.adapter_start=own", f"tasks.{PAIR[1]}.rank=3"),
    "b": ("local_update.train_factors=b",),
    "b averaged": ("local_update.train_factors=b", "local_update.adapter_start=averaged"),
    "alternate": ("local_update.train_factors=alternate", "local_update.adapter_start=averaged"),
}


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("starts"), uneven_rows, tasks=PAIR)


@pytest.fixture(scope="module")
def started(runs: Runs) -> dict[str, tuple[RunResult, list[Tensors]]]:
    """For each kind: a run of two rounds, and the factors that each of its four updates began with."""
    found = {}
    make_trainer = local_update.make_trainer
    for kind, overrides in KINDS.items():
        kept: list[Tensors] = []

        def note_factors(model: Any, *args: Any, kept: list[Tensors] = kept, **options: Any) -> Any:
            lora = {name: parameter for name, parameter in model.named_parameters() if "lora" in name}
            kept.append({name.replace(".default.", "."): one.detach().clone() for name, one in lora.items()})
            return make_trainer(model, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_update, "make_trainer", note_factors)
            found[kind] = (run(runs.recipe("operator=mean", *overrides), runs.new_folder()), kept)
    return found


def ends(result: RunResult, r: int) -> list[Tensors]:
    return [load_tensors(round_folder(result, r) / task / "adapter" / "adapter_model.safetensors") for task in PAIR]


def only(tensors: Tensors, factor: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if factor in name}


# ---- own -------------------------------------------------------------------------------------------------------------


def test_adapter_start_own_goes_on_with_each_tasks_own_factors(
    started: dict[str, tuple[RunResult, list[Tensors]]],
) -> None:
    result, starts = started["own"]
    for start, end in zip(starts[2:], ends(result, 1), strict=True):
        assert distance(start, end) == 0
    shapes = [next(iter(only(start, "lora_A").values())).shape[0] for start in starts[2:]]
    assert shapes == [2, 3]  # a rank of its own is no matter where nothing is averaged


def test_adapter_start_own_merges_what_its_experts_changed(
    started: dict[str, tuple[RunResult, list[Tensors]]],
) -> None:
    """Θ² − Θ⁰ = (Θ¹ − Θ⁰) + mean of s·(BA)_after − s·(BA)_before."""
    result, _ = started["own"]
    before = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    updates = []
    for task in PAIR:
        first, second = (AdapterFactors(round_folder(result, r) / task / "adapter") for r in (1, 2))
        rows = {name: first.shape(name)[0] for name in first.names}
        updates.append({name: second.rows(name, 0, rows[name]) - first.rows(name, 0, rows[name]) for name in rows})
    expected = combine([before, *updates], [1.0, 0.5, 0.5])
    assert distance(load_tensors(round_folder(result, 2) / "task_vector.safetensors"), expected) < 1e-6


def test_eval_finds_what_an_own_adapter_started_from(started: dict[str, tuple[RunResult, list[Tensors]]]) -> None:
    result, _ = started["own"]
    expert = find_model(str(round_folder(result, 2) / PAIR[1]))
    assert expert.state.start_adapter == round_folder(result, 1) / PAIR[1] / "adapter"
    assert find_model(str(round_folder(result, 1) / PAIR[1])).state.start_adapter is None


# ---- one factor ------------------------------------------------------------------------------------------------------


def test_train_factors_b_keeps_one_a_for_all_tasks_and_rounds(
    started: dict[str, tuple[RunResult, list[Tensors]]],
) -> None:
    for kind in ("b", "b averaged"):
        result, starts = started[kind]
        factors = [*starts, *ends(result, 1), *ends(result, 2)]
        assert all(distance(only(one, "lora_A"), only(starts[0], "lora_A")) == 0 for one in factors)
        assert distance(*(only(one, "lora_B") for one in ends(result, 2))) > 1e-3
    fresh = [float(tensor.abs().max()) for start in started["b"][1] for tensor in only(start, "lora_B").values()]
    assert set(fresh) == {0.0}


def test_train_factors_b_makes_the_average_of_factors_exact(
    started: dict[str, tuple[RunResult, list[Tensors]]],
) -> None:
    """Σ α s·B_τ A = s·(Σ α B_τ) A: nothing is left over to fold into the base."""
    result, starts = started["b averaged"]
    carried = AdapterFactors(round_folder(result, 1) / "carried_adapter")
    merged = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    assert distance({name: carried.rows(name, 0, tensor.shape[0]) for name, tensor in merged.items()}, merged) < 1e-6
    assert (
        distance(only(starts[2], "lora_B"), combine([only(one, "lora_B") for one in ends(result, 1)], [0.5] * 2)) < 1e-7
    )


def test_train_factors_alternate_trains_b_then_a(started: dict[str, tuple[RunResult, list[Tensors]]]) -> None:
    result, starts = started["alternate"]
    for first, trained, frozen in ((starts[:2], "lora_B", "lora_A"), (starts[2:], "lora_A", "lora_B")):
        r = 1 if trained == "lora_B" else 2
        assert distance(first[0], first[1]) == 0
        for end in ends(result, r):
            assert distance(only(end, frozen), only(first[0], frozen)) == 0
            assert distance(only(end, trained), only(first[0], trained)) > 1e-3
        assert distance(*(only(end, trained) for end in ends(result, r))) > 1e-3


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties"])
def test_adapter_start_averaged_is_an_average_where_each_task_weighs_one(runs: Runs, operator: str) -> None:
    result = runs.get(f"operator={operator}", "local_update.adapter_start=averaged")
    carried = load_tensors(round_folder(result, 1) / "carried_adapter" / "adapter_model.safetensors")
    assert set(read_json(round_folder(result, 1) / "loss_gap.json")["weights"].values()) == {1.0}
    assert distance(carried, combine(ends(result, 1), [0.5, 0.5])) < 1e-7


# ---- a pull back to the start ----------------------------------------------------------------------------------------


def update_of(runs: Runs, folder: Path, *overrides: str) -> tuple[Tensors, dict[str, Any]]:
    recipe = runs.recipe("local_update.warmup_steps=0", *overrides)
    start = ModelState(Path(recipe.model))
    job = LocalUpdateJob(recipe, load_task(recipe, PAIR[0]), start, "tiny", folder, 1, 3, 0, 4, json.dumps(overrides))
    with preserved_random_state():
        record = run_local_update(job, Progress())
    return load_tensors(folder / "adapter" / "adapter_model.safetensors"), record


def norm(left: Tensors, right: Tensors) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


def test_proximal_adds_half_mu_times_the_squared_distance_to_the_loss(runs: Runs, tmp_path: Path) -> None:
    plain, without = update_of(runs, tmp_path / "plain")
    pulled, record = update_of(runs, tmp_path / "pulled", "local_update.proximal=20")
    start, _ = update_of(runs, tmp_path / "start", "local_update.learning_rate=1e-30")
    assert norm(pulled, start) < 0.9 * norm(plain, start)
    # at the start there is no distance: the first step's loss, and the step itself, are those without the penalty
    assert record["train_losses"][0] == without["train_losses"][0]
    # it moves every entry of B by the learning rate, and none of A, whose gradient is zero while B is
    num_moved = sum(tensor.numel() for tensor in only(plain, "lora_B").values())
    penalty = 20 / 2 * 0.01**2 * num_moved
    assert record["train_losses"][1] - without["train_losses"][1] == pytest.approx(penalty, rel=1e-3)


def test_proximal_is_counted_once_in_a_batch_of_several_parts(runs: Runs, tmp_path: Path) -> None:
    whole, record = update_of(runs, tmp_path / "whole", "local_update.proximal=5")
    parts, other = update_of(runs, tmp_path / "parts", "local_update.proximal=5", "local_update.micro_batch_size=2")
    assert other["train_losses"] == pytest.approx(record["train_losses"], abs=1e-5)
    assert distance(whole, parts) < 1e-4


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("local_update.method=full", "local_update.adapter_start=own"), "local_update.method: full needs"),
        (
            ("merge.space=factors", "local_update.adapter_start=own"),
            "local_update.adapter_start: space: factors always",
        ),
        (("local_update.train_factors=b", "local_update.method=full"), "local_update.train_factors: b is for adapters"),
        (("local_update.train_factors=b", f"tasks.{PAIR[0]}.rank=3"), "give them the same rank"),
        (("local_update.train_factors=b", "local_update.adapter_start=svd"), "svd makes another A in every round"),
        (("local_update.train_factors=alternate",), "which needs adapter_start: averaged"),
        (("local_update.train_factors=alternate", "local_update.adapter_start=own"), "a B that all tasks share"),
        (("local_update.proximal=-1",), "local_update.proximal: Input should be greater than or equal to 0"),
    ],
)
def test_starts_and_factors_that_do_not_fit_are_refused(runs: Runs, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        runs.recipe(*overrides)
    assert message in str(caught.value)


def test_frozen_factors_are_averaged_as_they_are_whatever_the_weights(
    started: dict[str, tuple[RunResult, list[Tensors]]], tmp_path: Path
) -> None:
    result, starts = started["b averaged"]
    folders = [round_folder(result, 1) / task / "adapter" for task in PAIR]
    average_adapters(folders, [1.0, 1.0], tmp_path / "kept", frozen=True)
    average_adapters(folders, [1.0, 1.0], tmp_path / "summed")
    kept, summed = (load_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "summed"))
    assert distance(only(kept, "lora_A"), only(starts[0], "lora_A")) == 0
    assert distance(only(kept, "lora_B"), only(summed, "lora_B")) == 0
    twice = {name: 2 * tensor for name, tensor in only(starts[0], "lora_A").items()}
    assert distance(only(summed, "lora_A"), twice) == 0
