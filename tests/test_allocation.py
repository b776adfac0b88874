"""Steps that tasks do not share evenly: by the weights of the round before, or a task's own part of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TASKS
from manyshot.allocation import allocate
from manyshot.compare_plan import count_steps
from manyshot.comparison import compare
from manyshot.errors import RecipeError
from manyshot.inspect_recipe import plan_recipe
from manyshot.models import load_tokenizer
from manyshot.optimizer_state import OPTIMIZER_NAME
from manyshot.recipe import Protocol, operator_warnings
from manyshot.recipe_file import compare_recipe_from_mapping
from manyshot.rundir import read_json
from manyshot.runner import RunResult
from manyshot.tasks import encode_all, load_task, training_order
from run_helpers import Runs, round_folder, uneven_rows, weights

PAIR = TASKS[:2]
GAP = ("protocol={rounds: 3, local_steps: 12, allocation: gap}", "operator.temperature=0.05", "operator.mask=false")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("allocation"), uneven_rows, tasks=PAIR)


# ---- sharing out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("even", "shares", "expected"),
    [
        (10, [0.25] * 4, [10, 10, 10, 10]),
        (10, [0.7, 0.1, 0.1, 0.1], [19, 7, 7, 7]),  # 40 · (1/4 + 0.7)/2 = 19, 40 · (1/4 + 0.1)/2 = 7
        (10, [1.0, 0.0, 0.0, 0.0], [20, 7, 7, 6]),  # 25, but at most twice the even share; 20 are left for three
        (1, [0.9, 0.1], [1, 1]),
        (3, [1.0, 1.0, 1.0], [3, 3, 3]),  # multipliers of a sum
        (3, [0.0, 0.0], [3, 3]),
    ],
)
def test_allocate_by_hand(even: int, shares: list[float], expected: list[int]) -> None:
    assert allocate(even, shares) == expected


@settings(deadline=None, database=None, derandomize=True, max_examples=100)
@given(st.integers(1, 60), st.lists(st.floats(0, 1e6), min_size=1, max_size=11))
def test_allocate_gives_every_step_away_within_its_limits(even: int, shares: list[float]) -> None:
    given_steps = allocate(even, shares)
    assert sum(given_steps) == even * len(shares)
    assert all(1 <= steps <= 2 * even for steps in given_steps)
    for one, steps in zip(shares, given_steps, strict=True):
        larger = [more for other, more in zip(shares, given_steps, strict=True) if other > one + 1e-9 * sum(shares)]
        assert all(more >= steps for more in larger)


def test_protocol_share_has_a_step_in_every_round() -> None:
    protocol = Protocol(rounds=5, local_steps=50)
    assert protocol.share(1.0) == protocol
    assert [protocol.share(0.5).steps_in_round(r) for r in range(1, 6)] == [5, 5, 5, 5, 5]
    assert [protocol.share(0.01).steps_in_round(r) for r in range(1, 6)] == [1, 1, 1, 1, 1]
    assert protocol.share(0.24).local_steps == 12


# ---- in a run --------------------------------------------------------------------------------------------------------


def record(result: RunResult, r: int, task: str) -> dict[str, Any]:
    return read_json(round_folder(result, r) / task / "local_update.json")


def num_tokens(runs: Runs, task: str, steps: int, before: int) -> int:
    """The tokens of the examples at this place in the task's stream."""
    recipe = runs.recipe()
    data, tokenizer = load_task(recipe, task), load_tokenizer(Path(recipe.model))
    order = training_order(len(data.train), steps * 4, recipe.seed, task, skip=before * 4)
    encoded = encode_all([data.train[i] for i in order], tokenizer, data, "train", 32, "completion")
    return sum(len(one.input_ids) for one in encoded)


def test_allocation_by_gaps_goes_by_the_weights_of_the_round_before(runs: Runs) -> None:
    result = runs.get(*GAP)
    done = dict.fromkeys(PAIR, 0)
    uneven = False
    for r in (1, 2, 3):
        steps = {task: record(result, r, task)["steps"] for task in PAIR}
        expected = [4, 4] if r == 1 else allocate(4, [weights(result, r - 1)[task] for task in PAIR])
        assert list(steps.values()) == expected
        assert sum(steps.values()) == 8
        assert read_json(round_folder(result, r) / "DONE.json")["steps"] == steps
        for task in PAIR:
            found = record(result, r, task)
            assert found["steps_before"] == done[task]
            assert len(found["train_losses"]) == steps[task]
            assert found["num_tokens"] == num_tokens(runs, task, steps[task], done[task])
            done[task] += steps[task]
        uneven |= len(set(steps.values())) > 1
    assert uneven and sum(done.values()) == 24


def test_allocation_even_says_nothing_new_in_the_rounds_record(runs: Runs) -> None:
    result = runs.get()
    assert set(read_json(round_folder(result, 1) / "DONE.json")) == {"round", "start_from", "files"}
    assert "allocation" not in json.dumps(record(result, 1, PAIR[0]))


def test_steps_share_gives_a_task_fewer_steps_and_its_expert_too(runs: Runs) -> None:
    result = runs.get(f"tasks.{PAIR[0]}.steps_share=0.25", "protocol.local_steps=8", "evaluation.experts=true")
    for r in (1, 2):
        first, second = (record(result, r, task) for task in PAIR)
        assert (first["steps"], first["steps_before"]) == (1, r - 1)
        assert (second["steps"], second["steps_before"]) == (4, 4 * (r - 1))
        assert read_json(round_folder(result, r) / "DONE.json")["steps"] == {PAIR[0]: 1, PAIR[1]: 4}
    alone = [read_json(result.folder / "experts" / task / "local_update.json")["steps"] for task in PAIR]
    assert alone == [2, 8]
    assert "takes 0.25 of the local steps" in (result.merged / "README.md").read_text("utf-8")


def test_plan_counts_shares_and_knows_the_total_of_an_allocation(runs: Runs) -> None:
    even = plan_recipe(runs.recipe())
    shared = plan_recipe(runs.recipe(f"tasks.{PAIR[0]}.steps_share=0.5"))
    by_gap = plan_recipe(runs.recipe("protocol.allocation=gap"))
    assert (even["optimizer_steps"], shared["optimizer_steps"], by_gap["optimizer_steps"]) == (8, 6, 8)
    assert shared["training_examples"] == 24
    assert [entry["own_steps"] for entry in shared["rounds"]] == [{PAIR[0]: 1}, {PAIR[0]: 1}]
    assert by_gap["rounds"] == even["rounds"] and by_gap["allocation"] == "gap"


# ---- losses in other units -------------------------------------------------------------------------------------------


def test_loss_scale_multiplies_every_loss_of_its_task_alone(runs: Runs) -> None:
    """Adam does not ask for the unit of a loss; what limits gradients by their norm does, and is off here."""
    adam = "local_update.trainer={max_grad_norm: 0.0, adam_epsilon: 1.0e-30}"
    unclipped = (adam, "operator=mean", "protocol.rounds=1")
    plain, scaled = runs.get(*unclipped), runs.get(*unclipped, f"tasks.{PAIR[0]}.loss_scale=100")
    for name in ("round_000/losses.json", "round_001/losses.json"):
        before, after = (read_json(result.folder / name) for result in (plain, scaled))
        assert after[PAIR[0]]["loss"] == pytest.approx(100 * before[PAIR[0]]["loss"], rel=1e-4)
        assert after[PAIR[1]]["loss"] == pytest.approx(before[PAIR[1]]["loss"], rel=1e-4)
        assert after[PAIR[0]]["num_tokens"] == before[PAIR[0]]["num_tokens"]
    for task, scale in zip(PAIR, (100, 1), strict=True):
        before, after = record(plain, 1, task), record(scaled, 1, task)
        assert after["train_losses"] == pytest.approx([scale * loss for loss in before["train_losses"]], rel=1e-3)
        assert after["validation"]["loss"] == pytest.approx(scale * before["validation"]["loss"], rel=1e-3)
    gaps = [read_json(round_folder(result, 1) / "loss_gap.json")["loss_gaps"] for result in (plain, scaled)]
    assert gaps[1][PAIR[0]] == pytest.approx(100 * gaps[0][PAIR[0]], rel=1e-3)
    assert "its losses are multiplied by 100" in (scaled.merged / "README.md").read_text("utf-8")


# ---- in a comparison -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures")
def test_a_comparison_counts_what_a_task_of_few_steps_takes(runs: Runs, tmp_path: Path) -> None:
    small = copy.deepcopy(runs.mapping)
    own = {key: small[key] for key in ("tasks", "protocol", "local_update", "evaluation")}
    own["evaluation"].pop("experts")
    own["tasks"][PAIR[0]] |= {"steps_share": 0.5, "loss_scale": 3}
    methods = {"mean": {"operator": "mean", "protocols": ["many_shot"]}, "joint": {"joint": True}}
    own["local_update"] |= {"adapter_start": "own", "optimizer_state": "kept"}
    recipe = compare_recipe_from_mapping(own | {"models": {"tiny": small["model"]}, "seeds": [0], "methods": methods})
    done = compare(recipe, tmp_path / "out")
    cells = {cell["method"]: cell for cell in done.results["cells"]}
    assert {name: cell["train_steps"] for name, cell in cells.items()} == {"mean": 6, "joint": 6}
    assert count_steps(recipe)["by_part"] == {"experts": 6, "first_rounds": 3, "later_rounds": 3, "joint": 6}
    assert [entry["steps"] for entry in cells["mean"]["rounds"]] == [{PAIR[0]: 1, PAIR[1]: 2}] * 2
    trial = done.folder / "trials" / cells["joint"]["folder"] / "joint" / "local_update.json"
    tokens = [num_tokens(runs, task, steps, 0) for task, steps in zip(PAIR, (2, 4), strict=True)]
    assert read_json(trial)["num_tokens"] == sum(tokens)
    # what a resume needs is kept where the first round is shared, and gone where a cell is finished
    stored = [file.relative_to(done.folder).parts[0] for file in done.folder.rglob(OPTIMIZER_NAME)]
    assert stored == ["updates"] * 2
    notes = "takes 0.5 of the local steps; its losses are multiplied by 3"
    assert done.results["task_notes"] == {PAIR[0]: notes.split("; ")}
    assert f"- Task {PAIR[0]} {notes}" in (done.folder / "report.md").read_text("utf-8")


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("local_update.schedule_scope=run",), "protocol.allocation: gap decides the steps round by round"),
        ((f"tasks.{PAIR[1]}.steps_share=0.5",), f"tasks.{PAIR[1]}.steps_share: protocol.allocation: gap decides"),
    ],
)
def test_allocation_refuses_what_needs_the_steps_in_advance(
    runs: Runs, overrides: tuple[str, ...], message: str
) -> None:
    runs.recipe("protocol.allocation=gap")
    with pytest.raises(RecipeError) as caught:
        runs.recipe("protocol.allocation=gap", *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["0", "1.5", "-1"])
def test_steps_share_is_a_part(runs: Runs, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"tasks\.{PAIR[0]}\.steps_share: Input should be"):
        runs.recipe(f"tasks.{PAIR[0]}.steps_share={value}")


def test_allocation_by_gaps_warns_where_there_are_none(runs: Runs) -> None:
    def found(*overrides: str) -> list[str]:
        return [text for text in operator_warnings(runs.recipe(*overrides)) if "allocation" in text]

    assert found("operator=mean", "protocol.allocation=gap") != []
    assert found("operator.gap=none", "protocol.allocation=gap") != []
    assert found("operator=mean") == found("protocol.allocation=gap") == []
