"""From losses to weights: gaps, their units, softmax, memory; what no unit of a loss, no task of noise may change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyshot.errors import MergeError, RunFolderError
from manyshot.gap_weights import (
    LARGEST_OVER_EXPERT,
    SMALLEST_GAIN,
    TaskLosses,
    auto_temperature,
    choose_weights,
    effective_tasks,
    gap_weights,
    gaps_over_expert,
    gaps_over_start,
    loss_gaps,
    memory_of,
    needs_gaps,
    normalized_weights,
    relative_gaps,
    remember,
    uniform_weights,
)
from manyshot.models import ModelState
from manyshot.operators import ConsensusTA, Dare, IsoC, Mean, Metis, TaskArithmetic, Ties, TsvM
from manyshot.rundir import RunFolder
from manyshot.steps import Expert, Run
from manyshot.steps_merge import weigh

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)
GAPS = st.lists(st.floats(-50, 50), min_size=1, max_size=8)


def test_loss_gaps_are_start_minus_expert_and_need_equal_lengths() -> None:
    assert loss_gaps([2.0, 1.0], [0.5, 1.25]) == [1.5, -0.25]
    with pytest.raises(ValueError, match="zip"):
        loss_gaps([1.0], [1.0, 2.0])


def test_gap_weights_by_hand() -> None:
    # λ = 2, G = (2 ln 3, 0): e^{ln 3} : 1 = 3 : 1
    assert gap_weights([2 * math.log(3), 0.0], 2.0) == pytest.approx([0.75, 0.25])
    assert gap_weights([0.3, 0.3, 0.3], 2.0) == pytest.approx([1 / 3] * 3)
    assert gap_weights([5.0], 0.1) == [1.0]


def test_gap_weights_temperature_goes_from_winner_takes_all_to_uniform() -> None:
    gaps = [1.0, 0.9, 0.1]
    assert gap_weights(gaps, 1e-3)[0] == pytest.approx(1.0)
    assert gap_weights(gaps, 1e6) == pytest.approx(uniform_weights(3), abs=1e-6)


@quick
@given(GAPS, st.floats(0.01, 100))
def test_gap_weights_sum_to_one_and_follow_the_gaps(gaps: list[float], temperature: float) -> None:
    weights = gap_weights(gaps, temperature)
    assert math.fsum(weights) == pytest.approx(1.0)
    assert all(0 <= weight <= 1 for weight in weights)
    for one, alpha in zip(gaps, weights, strict=True):
        for two, beta in zip(gaps, weights, strict=True):
            assert one < two or alpha >= beta


@quick
@given(GAPS, st.floats(-20, 20), st.floats(0.1, 10))
def test_gap_weights_do_not_change_with_a_shift(gaps: list[float], shift: float, temperature: float) -> None:
    assert gap_weights([gap + shift for gap in gaps], temperature) == pytest.approx(
        gap_weights(gaps, temperature), rel=1e-6, abs=1e-12
    )


@quick
@given(GAPS, st.randoms(use_true_random=False))
def test_gap_weights_follow_a_permutation_of_the_tasks(gaps: list[float], random: Any) -> None:
    order = list(range(len(gaps)))
    random.shuffle(order)
    weights, permuted = gap_weights(gaps, 2.0), gap_weights([gaps[i] for i in order], 2.0)
    assert permuted == pytest.approx([weights[i] for i in order], rel=1e-12)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 2.0, 1e300])
@pytest.mark.parametrize("gaps", [[8e307, -8e307], [1e308, 1e308], [-1e308, -1e308, 0.0], [800.0, -800.0], [1e-320, 0]])
def test_gap_weights_never_overflow(gaps: list[float], temperature: float) -> None:
    weights = gap_weights(gaps, temperature)
    assert all(math.isfinite(weight) for weight in weights)
    assert math.fsum(weights) == pytest.approx(1.0)
    assert weights[gaps.index(max(gaps))] == max(weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gap_weights_refuse_gaps_that_are_not_finite(bad: float) -> None:
    with pytest.raises(MergeError, match="loss gaps must be finite"):
        gap_weights([1.0, bad], 2.0)


def test_normalized_weights_sum_to_one_and_leave_what_does_alone() -> None:
    assert normalized_weights([1.0, 1.0, 2.0]) == [0.25, 0.25, 0.5]
    weights = gap_weights([0.1, 0.7, -0.3], 0.5)
    assert normalized_weights(weights) == weights
    for bad in ([0.0, 0.0], [math.inf, 1.0], [math.nan], [1.0, -1.0]):
        with pytest.raises(MergeError, match="sum to more than 0"):
            normalized_weights(bad)


def test_effective_tasks_counts_tasks() -> None:
    assert effective_tasks(uniform_weights(4)) == pytest.approx(4.0)
    assert effective_tasks([1.0, 0.0, 0.0]) == 1.0
    assert effective_tasks([0.5, 0.5, 0.0]) == pytest.approx(2.0)
    # H(¾, ¼) = ¾ ln(4/3) + ¼ ln 4 = 0.562335…
    assert effective_tasks([0.75, 0.25]) == pytest.approx(math.exp(0.5623351446))


@quick
@given(GAPS, st.floats(0.05, 20))
def test_effective_tasks_lies_between_one_and_the_number_of_tasks(gaps: list[float], temperature: float) -> None:
    assert 1 - 1e-9 <= effective_tasks(gap_weights(gaps, temperature)) <= len(gaps) + 1e-9


# ---- what a gap is measured in ---------------------------------------------------------------------------------------

UNITS: dict[str, Callable[[TaskLosses], list[float]]] = {
    "relative": relative_gaps,
    "over_expert": gaps_over_expert,
    "over_start": gaps_over_start,
}
LOSSES = st.lists(st.tuples(*[st.floats(0, 20)] * 3), min_size=2, max_size=6)


def losses_of(*tasks: tuple[float, float, float]) -> TaskLosses:
    """(start, expert, pretrained) of each task."""
    start, expert, pretrained = zip(*tasks, strict=True)
    return TaskLosses(start, expert, pretrained)


def in_units(losses: TaskLosses, task: int, unit: float) -> TaskLosses:
    """The same losses, those of one task counted in other units."""
    return TaskLosses(
        *(
            tuple(loss * unit if i == task else loss for i, loss in enumerate(one))
            for one in (losses.start, losses.expert, losses.pretrained)
        )
    )


def test_relative_gaps_by_hand() -> None:
    """Of gains of 1, 1, 1 and 0.1 nats the start lacks half, all, more than all and less than nothing."""
    losses = losses_of((2.5, 2.0, 3.0), (3.0, 2.0, 3.0), (3.5, 2.0, 3.0), (0.25, 0.3, 0.4))
    assert relative_gaps(losses) == pytest.approx([0.5, 1.0, 1.0, -0.5])
    # a gain of 0.005 of 1 nat counts as 0.01
    assert relative_gaps(losses_of((0.998, 0.995, 1.0))) == pytest.approx([0.003 / SMALLEST_GAIN])


def test_gaps_over_expert_and_over_start_by_hand() -> None:
    losses = losses_of((3.0, 2.0, 9.0), (1.0, 2.0, 9.0), (8.0, 1.0, 9.0), (1.0, 4.0, 9.0))
    assert gaps_over_expert(losses) == pytest.approx([0.5, -0.5, LARGEST_OVER_EXPERT, -0.75])
    assert gaps_over_start(losses) == pytest.approx([1 / 3, -1.0, 7 / 8, -1.0])


@pytest.mark.parametrize("gap", UNITS)
def test_gaps_of_losses_of_zero_are_all_or_nothing(gap: str) -> None:
    largest = LARGEST_OVER_EXPERT if gap == "over_expert" else 1.0
    start, expert = losses_of((0.0, 0.5, 0.0)), losses_of((0.5, 0.0, 0.5))
    assert UNITS[gap](losses_of((0.0, 0.0, 0.0))) == [0.0]
    assert UNITS[gap](start) == [-1.0]
    assert UNITS[gap](expert) == [largest]


@pytest.mark.parametrize("gap", UNITS)
@quick
@given(LOSSES)
def test_gaps_that_are_shares_stay_in_their_range(gap: str, tasks: list[tuple[float, float, float]]) -> None:
    found = UNITS[gap](losses_of(*tasks))
    assert all(-1 <= share <= (LARGEST_OVER_EXPERT if gap == "over_expert" else 1.0) for share in found)


@pytest.mark.parametrize("gap", UNITS)
@quick
@given(LOSSES, st.integers(0, 5), st.sampled_from([2.0**-6, 2.0, 2.0**7]))
def test_weights_are_exactly_the_same_when_a_task_counts_its_loss_in_other_units(
    gap: Any, tasks: list[tuple[float, float, float]], task: int, unit: float
) -> None:
    """By a power of two no rounding differs, so no bit of a weight may."""
    tasks = [(start + 1e-3, expert + 1e-3, pretrained + 1e-3) for start, expert, pretrained in tasks]
    losses, operator = losses_of(*tasks), Metis(gap=gap, temperature=0.5)
    assert choose_weights(operator, in_units(losses, task % len(tasks), unit)) == choose_weights(operator, losses)


@pytest.mark.parametrize("gap", UNITS)
@quick
@given(LOSSES, st.integers(0, 5))
def test_weights_are_the_same_when_a_task_counts_its_loss_a_hundredfold(
    gap: Any, tasks: list[tuple[float, float, float]], task: int
) -> None:
    losses, operator = losses_of(*tasks), Metis(gap=gap, temperature=0.5)
    found, _ = choose_weights(operator, in_units(losses, task % len(tasks), 100.0))
    assert found == pytest.approx(choose_weights(operator, losses)[0], rel=1e-9, abs=1e-12)


def test_weights_of_absolute_gaps_follow_the_units_of_a_loss() -> None:
    losses = losses_of((2.5, 2.0, 3.0), (2.5, 2.0, 3.0))
    assert choose_weights(Metis(), in_units(losses, 0, 100.0))[0] == pytest.approx([1.0, 0.0], abs=1e-9)


# a task that nothing can be learned of: the merged model has moved away from it, and its expert is no better than Θ⁰
NOISE = {
    "gained nothing": (7.3, 7.0, 7.0),
    "got worse": (7.3, 7.05, 7.0),
    "got far worse": (7.3, 9.0, 7.0),
    "gained by chance": (7.3, 6.98, 7.0),
}


@pytest.mark.parametrize("gap", UNITS)
@pytest.mark.parametrize("noise", NOISE)
def test_weights_do_not_go_to_a_task_of_noise(noise: str, gap: Any) -> None:
    real = [(2.0, 1.6, 3.5), (1.3, 1.0, 2.0), (2.6, 2.2, 3.0)]
    weights, _ = choose_weights(Metis(gap=gap, temperature=0.5), losses_of(*real, NOISE[noise]))
    assert weights[3] < 1 / 4
    assert weights[3] == min(weights) or noise == "gained by chance"


def test_weights_of_a_first_round_with_relative_gaps_are_uniform_but_for_noise() -> None:
    """Where the start is the pretrained model, a gap is all that its expert gained, however much that is."""
    losses = losses_of((3.5, 1.6, 3.5), (200.0, 100.0, 200.0), (0.1, 0.09, 0.1), (7.0, 7.1, 7.0))
    weights, details = choose_weights(Metis(gap="relative", temperature=0.5), losses)
    assert details["relative_gaps"] == pytest.approx([1.0, 1.0, 1.0, -1.0])
    assert weights[:3] == pytest.approx([weights[0]] * 3)
    assert weights[3] < 0.01


# ---- temperature -----------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8, unique=True), st.floats(0.05, 0.95))
def test_auto_temperature_gives_the_effective_tasks_asked_for(gaps: list[int], share: float) -> None:
    wanted = 1 + share * (len(gaps) - 1)
    found = auto_temperature([float(gap) for gap in gaps], wanted)
    assert effective_tasks(gap_weights([float(gap) for gap in gaps], found)) == pytest.approx(wanted, rel=1e-6)


def test_auto_temperature_follows_the_scale_of_the_gaps() -> None:
    gaps = [0.1, 0.5, 0.2]
    assert auto_temperature([7 * gap for gap in gaps], 2.0) == pytest.approx(7 * auto_temperature(gaps, 2.0))
    assert auto_temperature([gap + 3 for gap in gaps], 2.0) == pytest.approx(auto_temperature(gaps, 2.0))


def test_auto_temperature_of_gaps_that_cannot_be_told_apart() -> None:
    assert auto_temperature([0.3, 0.3], 1.5) == 1.0  # uniform whatever it is
    shared = gap_weights([0.3, 0.3, 0.1], auto_temperature([0.3, 0.3, 0.1], 1.2))
    assert shared == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)  # two tasks share the largest gap: not fewer than two


# ---- an operator's choice --------------------------------------------------------------------------------------------

BY_HAND = losses_of((3.0, 2.5, 3.0), (0.4, 0.3, 0.4))  # gaps 0.5 and 0.1


def test_choose_weights_of_operators_that_need_no_gaps() -> None:
    assert choose_weights(Mean(), BY_HAND) == ([0.5, 0.5], {})
    assert choose_weights(Metis(gap="none", weight_memory=0.5), BY_HAND, [0.9, 0.1]) == ([0.5, 0.5], {})
    for operator in (TaskArithmetic(), Dare(), Ties(), ConsensusTA(), IsoC(), TsvM()):
        assert choose_weights(operator, BY_HAND) == ([1.0, 1.0], {}), operator.name


def test_choose_weights_of_metis_by_hand() -> None:
    absolute, details = choose_weights(Metis(temperature=0.4), BY_HAND)
    assert absolute == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)])
    assert details == {"temperature": 0.4}
    relative, details = choose_weights(Metis(temperature=0.4, gap="relative"), BY_HAND)
    assert relative == pytest.approx([0.5, 0.5])
    assert details["relative_gaps"] == pytest.approx([1.0, 1.0])
    auto, details = choose_weights(Metis(temperature="auto", effective_tasks=1.25), BY_HAND)
    assert effective_tasks(auto) == pytest.approx(1.25, rel=1e-6)
    assert auto == pytest.approx(gap_weights(BY_HAND.gaps, details["temperature"]))
    assert effective_tasks(choose_weights(Metis(temperature="auto"), BY_HAND)[0]) == pytest.approx(1.5, rel=1e-6)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_remember_by_hand() -> None:
    # √(¼ : ¾) · (½ : ½) = 1 : √3
    assert remember([0.5, 0.5], [0.25, 0.75], 0.5) == pytest.approx([1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5)])
    assert remember([0.2, 0.8], [0.5, 0.5], 0.9) == pytest.approx([0.2, 0.8])  # uniform weights say nothing


@quick
@given(st.lists(st.tuples(*[st.floats(0.01, 20)] * 2), min_size=1, max_size=5), st.floats(0, 0.95), st.floats(0.3, 5))
def test_remember_adds_up_the_gaps_of_all_rounds_with_fading_weight(
    rounds: list[tuple[float, float]], memory: float, temperature: float
) -> None:
    """α_R ∝ exp(Σ_r μ^(R−r) G_r / λ), from uniform weights before the first round."""
    operator = Metis(temperature=temperature, weight_memory=memory)
    weights: list[float] | None = None
    for gaps in rounds:
        weights, _ = choose_weights(operator, losses_of(*((gap + 1.0, 1.0, 3.0) for gap in gaps)), weights)
    faded = [sum(memory ** (len(rounds) - 1 - r) * gaps[task] for r, gaps in enumerate(rounds)) for task in (0, 1)]
    assert weights == pytest.approx(gap_weights(faded, temperature), rel=1e-6, abs=1e-9)


def test_remember_lets_a_task_that_had_no_weight_come_back() -> None:
    weights = remember([1e-300, 1.0], [0.0, 1.0], 0.5)
    assert weights == pytest.approx([0.0, 1.0])
    for _ in range(60):
        weights = remember([0.999, 0.001], weights, 0.5)
    assert weights[0] > 0.999


def test_memory_of_operators_without_gaps_is_none() -> None:
    assert memory_of(Metis(weight_memory=0.7)) == 0.7
    assert memory_of(Metis()) == memory_of(Metis(weight_memory=0.7, gap="none")) == memory_of(Mean()) == 0.0
    assert memory_of(Metis(weight_memory=(0.0, 0.5)).at_round(2)) == 0.5
    assert not needs_gaps(Metis(gap="none"))


def weigh_round(folder: Path, round_index: int, losses: TaskLosses, **settings: Any) -> dict[str, Any]:
    """What steps_merge.weigh makes of one round, for tasks a, b, …"""
    names = tuple("abcdef"[: len(losses.start)])
    recipe = SimpleNamespace(method=Metis(**settings))
    run = cast(Run, SimpleNamespace(recipe=recipe, names=names, tasks=names, folder=RunFolder(folder)))
    place = run.folder.round(round_index) if round_index else run.folder.post_hoc
    start, pretrained = (
        {name: {"loss": loss} for name, loss in zip(names, one, strict=True)}
        for one in (losses.start, losses.pretrained)
    )
    experts = [
        Expert(name, ModelState(folder), {"validation": {"loss": loss}})
        for name, loss in zip(names, losses.expert, strict=True)
    ]
    return weigh(run, place, round_index, start, pretrained, experts)


def test_weigh_remembers_the_round_before_and_nothing_in_the_first_or_post_hoc(tmp_path: Path) -> None:
    rounds = [losses_of((3.0, 1.0, 3.0), (2.0, 1.5, 2.0)), losses_of((1.4, 1.0, 3.0), (2.0, 1.5, 2.0))]
    plain = [gap_weights(losses.gaps, 1.0) for losses in rounds]
    settings = {"temperature": 1.0, "weight_memory": (0.5, 0.5)}
    first = weigh_round(tmp_path, 1, rounds[0], **settings)
    assert list(first["weights"].values()) == plain[0]
    second = weigh_round(tmp_path, 2, rounds[1], **settings)
    expected = [now * before**0.5 for now, before in zip(plain[1], plain[0], strict=True)]
    assert list(second["weights"].values()) == pytest.approx([value / sum(expected) for value in expected])
    assert json.loads((tmp_path / "round_002" / "loss_gap.json").read_text())["weights"] == second["weights"]
    assert list(weigh_round(tmp_path, 0, rounds[1], **settings)["weights"].values()) == plain[1]
    # without memory the bits are those of the softmax, whatever the round before says
    assert list(weigh_round(tmp_path, 2, rounds[1], temperature=1.0)["weights"].values()) == plain[1]


def test_weigh_takes_the_weights_of_the_round_before_by_task_name(tmp_path: Path) -> None:
    losses = losses_of((3.0, 1.0, 3.0), (2.0, 1.5, 2.0))
    weigh_round(tmp_path, 1, losses, weight_memory=0.5)
    path = tmp_path / "round_001" / "loss_gap.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"weights": {"b": 0.9, "a": 0.1}}))
    assert weigh_round(tmp_path, 2, losses, weight_memory=0.5)["weights"]["b"] > 0.5
    for weights, found in (({"a": 1.0}, "holds weights of a, and"), ({}, "holds weights of no task, and")):
        path.write_text(json.dumps(record | {"weights": weights}))
        with pytest.raises(RunFolderError, match=rf"round_001/loss_gap\.json: {found} .*needs those of a, b;"):
            weigh_round(tmp_path, 2, losses, weight_memory=0.5)
    path.unlink()
    with pytest.raises(RunFolderError, match=r"loss_gap\.json: no such file"):
        weigh_round(tmp_path, 2, losses, weight_memory=0.5)
    assert weigh_round(tmp_path, 2, losses)["weights"]["a"] > 0.5  # it is not even opened without memory
