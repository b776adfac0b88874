"""`scaling: auto`: the search finds the lowest point in few tries, and what it finds is what one would set by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import TASKS, MakeRecipe
from manyshot import steps_search
from manyshot.errors import RecipeError
from manyshot.executors import LocalExecutor
from manyshot.gap_weights import TaskLosses
from manyshot.inputs import check_inputs
from manyshot.line_search import MOST_TRIES, SOFTNESS, best_scaling, lowest, next_scaling, objective
from manyshot.operator_choice import make_plan
from manyshot.operators import BUILT_IN, MatrixOperator, OperatorPlan
from manyshot.outer import Outer
from manyshot.progress import Progress
from manyshot.recipe import operator_warnings
from manyshot.recipe_file import merge_recipe_from_mapping, recipe_from_mapping
from manyshot.round_merge import merge_weights, scale_update, write_update
from manyshot.rounds import run_rounds
from manyshot.rundir import RunFolder, read_json, read_lines, remove, write_json
from manyshot.runner import run
from manyshot.steps import Run
from manyshot.task_vector import AdapterUpdate, StoredTaskVector
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import SHAPES, draw, make_adapter, make_base
from run_helpers import Runs, phases, round_folder, uneven_rows, unlike

SCALED = [name for name, kind in BUILT_IN.items() if "scaling" in kind.__dataclass_fields__]
quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def search(value: Callable[[float], float], unit: float = 1.0) -> dict[float, float]:
    """The whole search, over a function of log₂(β/unit)."""
    tried: dict[float, float] = {}
    while (scaling := next_scaling(tried, unit)) is not None:
        assert scaling not in tried
        tried[scaling] = value(math.log2(scaling / unit))
    return tried


# ---- where to look ---------------------------------------------------------------------------------------------------


@quick
@given(st.floats(-2, 2), st.floats(0.01, 100), st.sampled_from([1.0, 0.25, 1 / 3]))
def test_search_finds_the_lowest_point_of_a_parabola(bottom: float, width: float, unit: float) -> None:
    tried = search(lambda x: width * (x - bottom) ** 2, unit)
    assert len(tried) <= MOST_TRIES
    assert abs(math.log2(best_scaling(tried) / unit) - bottom) < 0.08


@quick
@given(st.floats(-2, 2), st.floats(0.3, 3), st.floats(0.3, 3))
def test_search_comes_close_where_losses_rise_unevenly(bottom: float, left: float, right: float) -> None:
    def value(x: float) -> float:
        return math.exp(left * (bottom - x)) / left + math.exp(right * (x - bottom)) / right

    tried = search(value)
    assert len(tried) <= MOST_TRIES
    # of what half or twice the best β would cost, next to nothing
    cost = min(value(bottom - 1), value(bottom + 1)) - value(bottom)
    assert min(tried.values()) - value(bottom) < 0.1 * cost


def test_search_begins_at_the_mean_and_its_double_and_goes_downhill() -> None:
    assert list(search(lambda x: (x - 0.6) ** 2)) == [1.0, 2.0, 4.0, 1.52]  # then by a parabola
    assert list(search(lambda x: (x + 1.2) ** 2))[:5] == [1.0, 2.0, 0.5, 0.25, 0.435]
    # the parabola says that the best is there already: a look into the wide gaps on either side
    assert list(search(lambda x: (x - 2.0) ** 2, 0.5)) == [0.5, 1.0, 2.0, 4.0, 1.53, 2.61]
    assert list(search(lambda x: -x)) == [1.0, 2.0, 4.0, 8.0]  # no lower point to be seen: the end of the range
    assert list(search(lambda x: x)) == [1.0, 2.0, 0.5, 0.25, 0.125]


def test_search_of_what_is_flat_ends_at_the_smallest_that_was_tried() -> None:
    tried = search(lambda x: 1.0)
    assert len(tried) <= MOST_TRIES
    assert best_scaling(tried) == min(tried)


def test_search_depends_on_what_was_tried_not_on_when() -> None:
    tried = search(lambda x: (x - 0.6) ** 2)
    early = dict(list(tried.items())[:3])
    again = dict(sorted(early.items(), reverse=True))
    assert next_scaling(early, 1.0) == next_scaling(again, 1.0) == list(tried)[3]
    assert all(scaling == float(f"{scaling:.3g}") for scaling in tried)


def test_lowest_is_where_the_parabola_is_flat() -> None:
    points = [(-1.0, 10.0), (0.5, 1.0), (2.0, 4.0)]
    x = lowest(points)
    (_, a), (_, b), (_, c) = points
    second = (a - 2 * b + c) / 1.5**2
    slope = (c - a) / 3
    assert slope + second * (x - 0.5) == pytest.approx(0, abs=1e-12)
    assert lowest([(0.0, 1.0), (1.0, 1.0), (3.0, 1.0)]) == 1.0


# ---- what is minimised -----------------------------------------------------------------------------------------------


def losses(start: tuple[float, ...], scale: float = 1.0) -> TaskLosses:
    """Two tasks whose experts gained 2 and 1; the losses of the first in units of their own."""
    return TaskLosses((start[0] * scale, start[1]), (1.0 * scale, 1.0), (3.0 * scale, 2.0))


def test_objective_is_the_mean_share_of_the_gains_that_is_lacking() -> None:
    assert objective(losses((2.0, 1.25)), "average") == pytest.approx((0.5 + 0.25) / 2)
    assert objective(losses((2.0, 1.25), 100.0), "average") == pytest.approx((0.5 + 0.25) / 2)


def test_objective_worst_is_softly_that_of_the_worst_task() -> None:
    for start in ((2.0, 1.25), (1.1, 1.9), (1.4, 1.2)):
        lacking = [(start[0] - 1) / 2, start[1] - 1]
        found = objective(losses(start), "worst")
        assert max(lacking) - SOFTNESS * math.log(2) <= found <= max(lacking) + 1e-12
        assert found == pytest.approx(objective(losses(start, 50.0), "worst"))
    # a little for the worst task is worth more than as much for the other
    assert objective(losses((1.8, 1.2)), "worst") < objective(losses((2.0, 1.1)), "worst")
    assert objective(losses((1.8, 1.2)), "average") == pytest.approx(objective(losses((2.0, 1.1)), "average"))


# ---- the line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(tmp_path: Path) -> tuple[Checkpoint, StoredTaskVector, tuple[str, ...], list[AdapterUpdate]]:
    """A base, a start, and three tasks' adapters."""
    write_tensors(tmp_path / "start", {name: draw("start", name, shape=shape) for name, shape in SHAPES.items()})
    updates = [AdapterUpdate(make_adapter(tmp_path / task, task)) for task in TASKS]
    return make_base(tmp_path / "base"), StoredTaskVector(tmp_path / "start"), TASKS, updates


@pytest.mark.parametrize("reference", ["pretrained", "start"])
@pytest.mark.parametrize("name", SCALED)
def test_line_is_what_the_operator_gives_with_that_scaling(
    name: str, reference: str, line: tuple[Any, ...], tmp_path: Path
) -> None:
    operator = BUILT_IN[name](scaling="auto", **({"mask_threshold": 0.05} if name == "metis" else {}))  # type: ignore[call-arg]
    own = {"a.*": {"scaling": 0.3}, "norm*": {"name": "mean"}}
    plan = OperatorPlan(operator) if isinstance(operator, MatrixOperator) else make_plan(operator, own)
    weights = [0.5, 0.3, 0.2]
    options: dict[str, Any] = {"reference": reference}
    write_update(*line, plan, weights, tmp_path / "D", **options)
    options["outer"] = Outer(0.7, 0.4) if reference == "start" else None
    for scaling in (0.125, 1.7):
        scale_update(*line[:2], tmp_path / "D", plan, scaling, tmp_path / "found", **options)
        merge_weights(*line, plan.with_scaling(scaling), weights, tmp_path / "hand", **options)
        found, hand = load_file(tmp_path / "found"), load_file(tmp_path / "hand")
        assert found.keys() == hand.keys()
        for tensor, value in hand.items():
            if isinstance(operator, MatrixOperator):
                torch.testing.assert_close(found[tensor], value, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(found[tensor], value), tensor
            assert value.any() or tensor == "norm.weight"


def test_plan_with_scaling_leaves_overrides_their_own() -> None:
    plan = make_plan(BUILT_IN["ties"](scaling="auto"), {"a*": {"scaling": 0.5}, "b*": {"density": 0.5}})  # type: ignore[call-arg]
    assert plan.searches_scaling and plan.at_round(3) == plan
    found = plan.with_scaling(1.5)
    assert [found.for_tensor(name).scaling for name in ("a", "b", "c")] == [0.5, 1.5, 1.5]  # type: ignore[attr-defined]
    assert not found.searches_scaling
    with pytest.raises(TypeError, match="with_scaling"):
        plan.default.operation()


# ---- recipes ---------------------------------------------------------------------------------------------------------

AUTO = "operator.scaling=auto"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            (AUTO, "merge.space=factors"),
            "operator.scaling: auto searches along a line of weights; it needs merge.space",
        ),
        (
            (AUTO, "merge.reference=start", "merge.outer_optimizer=adam", "merge.outer_step_size=1e-4"),
            "operator.scaling: auto has no effect on adam's step",
        ),
        (("operator=mean", AUTO), "operator.scaling: unknown key"),
        (("operator.scaling=automatic",), "operator.scaling: Input should be"),
        (("merge.outer_optimizer=nesterov",), "merge.outer_optimizer: is part of the outer optimizer, which needs"),
        (("merge.reference=start", "merge.outer_beta1=0.5"), "merge.outer_beta1: is adam's; set merge.outer_optimizer"),
        (("merge.reference=start", "merge.outer_optimizer=nesterov"), "merge.outer_momentum: is 0, and nesterov is"),
        (
            ("merge.reference=start", "merge.outer_optimizer=adam"),
            "merge.outer_step_size: with adam every weight moves",
        ),
        (
            (
                "merge.reference=start",
                "merge.outer_optimizer=adam",
                "merge.outer_step_size=1e-4",
                "merge.outer_momentum=0.5",
            ),
            "merge.outer_momentum: adam has outer_beta1 in its place",
        ),
        (
            (
                *("merge.reference=start", "merge.outer_optimizer=adam", "merge.outer_step_size=1e-4"),
                "merge.outer_momentum_schedule=ramp",
            ),
            "merge.outer_momentum_schedule: adam has outer_beta1 in its place",
        ),
        (
            ("merge.reference=start", "merge.outer_momentum_schedule=ramp"),
            "merge.outer_momentum_schedule: is of a momentum, and merge.outer_momentum is 0",
        ),
        (
            ("merge.reference=start", "merge.outer_momentum=0.5", "merge.outer_look_ahead=between_rounds"),
            "merge.outer_look_ahead: is nesterov's; set merge.outer_optimizer: nesterov",
        ),
        (("merge.outer_momentum_schedule=ramp",), "merge.outer_momentum_schedule: is part of the outer optimizer"),
    ],
)
def test_recipe_refuses_searches_and_optimizers_that_do_not_fit(
    make_recipe: MakeRecipe, overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(*overrides)
    assert problem in str(caught.value)


def test_recipe_refuses_a_search_of_an_override_alone(recipe_mapping: dict[str, Any]) -> None:
    own = {"overrides": {"*k_proj*": {"scaling": "auto"}}}
    with pytest.raises(RecipeError, match="auto is one search for the whole merge; set it under operator"):
        recipe_from_mapping(recipe_mapping | own)
    recipe = recipe_from_mapping(recipe_mapping | own | {"operator": {"name": "metis", "scaling": "auto"}})
    assert recipe.plan.for_tensor("x.k_proj.weight").searches_scaling
    assert operator_warnings(recipe) == []  # it does not grow where the losses say how far to go


def test_merge_of_models_that_exist_refuses_a_search_and_says_what_does_it() -> None:
    raw = {"base": "some/model", "experts": {"one": {"path": "a/b"}}, "operator": {"name": "ties", "scaling": "auto"}}
    with pytest.raises(RecipeError, match=r"operator\.scaling: auto measures merged models.*`manyshot run` do it"):
        merge_recipe_from_mapping(raw)


# ---- runs ------------------------------------------------------------------------------------------------------------

SEARCHED = ("operator=metis", "operator.mask=false", AUTO, "merge.reference=start", "merge.outer_momentum=0.5")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two rounds of a step, measured on next to nothing: what is looked at here are merges."""
    found = Runs(base_folder, tmp_path_factory.mktemp("line"), uneven_rows, TASKS[:2])
    found.mapping["protocol"] = {"rounds": 2, "local_steps": 2}
    found.mapping["local_update"]["warmup_steps"] = 0
    found.mapping["evaluation"] |= {"validation_examples": 3, "test_examples": 1}
    return found


def test_search_in_a_run_ends_with_the_bytes_of_the_scaling_set_by_hand(runs: Runs) -> None:
    result = runs.get(*SEARCHED)
    records = [read_json(round_folder(result, r) / "merge.json")["line_search"] for r in (1, 2)]
    pretrained = read_json(result.folder / "round_000" / "losses.json")
    for r, record in enumerate(records, start=1):
        folder = round_folder(result, r)
        experts = read_json(folder / "loss_gap.json")["expert_losses"]
        assert record["objective"] == "average" and 3 <= len(record["points"]) <= MOST_TRIES
        for point in record["points"]:
            known = TaskLosses(
                *(
                    tuple(found[task] if found is point["losses"] else found[task]["loss"] for task in TASKS[:2])
                    for found in (point["losses"], experts, pretrained)
                )
            )
            assert point["objective"] == objective(known, "average")
        best = min(record["points"], key=lambda point: point["objective"])
        assert record["scaling"] == best["scaling"]
        # the merged model is the one that was measured
        assert {task: entry["loss"] for task, entry in read_json(folder / "losses.json").items()} == best["losses"]
        assert not (folder / "line_search").exists()
    hand = runs.get(*SEARCHED[:2], f"operator.scaling={[record['scaling'] for record in records]}", *SEARCHED[3:])
    merged = [f"round_00{r}/{name}" for r in (1, 2) for name in ("merge.json", "merged/README.md")]
    assert unlike(result.folder, hand.folder, manifests=False) == ["recipe.yaml", *merged]
    told = [line for line in read_lines(result.folder / "metrics.jsonl") if line["kind"] == "line_search"]
    assert [(line["round"], line["scaling"]) for line in told] == [(r, records[r - 1]["scaling"]) for r in (1, 2)]


def test_search_that_was_interrupted_measures_nothing_twice(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = runs.get(*SEARCHED), runs.new_folder()
    tries = len(read_json(round_folder(result, 1) / "merge.json")["line_search"]["points"])
    measured: list[float] = []
    real = steps_search.objective

    def stop(losses: TaskLosses, kind: Any) -> float:
        measured.append(1.0)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(losses, kind)

    monkeypatch.setattr(steps_search, "objective", stop)
    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*SEARCHED), folder)
    monkeypatch.setattr(steps_search, "objective", real)
    assert {file.name for file in (folder / "round_001" / "line_search").glob("*.safetensors")} == {
        "task_vector.safetensors",  # never more than the last one
        "update.safetensors",
    }
    before = len(phases(folder, "validation"))
    run(runs.recipe(*SEARCHED), folder, resume=True)
    assert unlike(result.folder, folder) == []
    whole = len(phases(result.folder, "validation"))
    assert before + len(phases(folder, "validation")[before:]) == whole
    assert tries >= 3


def test_search_post_hoc_and_in_a_trial_weighs_operators_that_need_no_losses(runs: Runs) -> None:
    """A trial measures experts for the search alone; half the sum is the mean, so the search begins at 1/T."""
    recipe = runs.recipe("operator=task_arithmetic", AUTO, "merge.search_objective=worst", "protocol.rounds=1")
    folder, inputs = RunFolder(runs.new_folder()), check_inputs(recipe)
    folder.path.mkdir()
    trial = Run(recipe, folder, inputs.base, inputs.tasks, LocalExecutor(), Progress(), trial=True)
    summary = run_rounds(trial)
    record = read_json(folder.round(1) / "merge.json")["line_search"]
    assert [point["scaling"] for point in record["points"]][:2] == [0.5, 1.0] and record["objective"] == "worst"
    assert summary["rounds"]["1"]["weights"] == dict.fromkeys(TASKS[:2], 1.0)
    assert not (folder.round(1) / "merged").exists()
    # what was measured is what counts, whatever it is: here that four times as much is best
    remove(folder.round(1) / "merge.json")
    for scaling, loss in ((0.5, 3.0), (1.0, 2.0), (2.0, 1.0), (4.0, 2.0)):
        told = {task: entry | {"loss": loss} for task, entry in summary["rounds"]["1"]["losses"].items()}
        write_json(folder.round(1) / "line_search" / f"scaling_{scaling:g}" / "losses.json", told)
    known = read_json(folder.round(0) / "losses.json")
    write_json(folder.round(0) / "losses.json", {task: entry | {"loss": 9.0} for task, entry in known.items()})
    run_rounds(trial)
    assert read_json(folder.round(1) / "merge.json")["line_search"]["scaling"] == 2.0
