"""Numbers: what operators and weights do with any finite input, and that nothing else gets past a merge.

Shapes: T = tasks, P = entries.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyshot import kernels
from manyshot.errors import DataError, MergeError, ModelError
from manyshot.gap_weights import TaskLosses, choose_weights, gap_weights, normalized_weights
from manyshot.loss_gap import TokenSums, mean_loss
from manyshot.operators import BUILT_IN, MatrixOperator, Mean, Metis, Operator, Ties
from manyshot.optimizer_state import write_state
from manyshot.round_merge import merge_weights
from manyshot.rundir import read_json, write_json
from manyshot.task_vector import FACTORS_NAME, AdapterUpdate, ModelUpdate
from manyshot.tasks import Encoded
from manyshot.tensor_writer import write_tensors
from merge_helpers import SHAPES, make_adapter, make_base, read_model, write_model
from test_operators import CASES, bits, merge, refer, streamed, tile_for

quick = settings(deadline=None, database=None, derandomize=True, max_examples=15)
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
ELEMENTWISE = [case for case in CASES if not issubclass(BUILT_IN[case[0]], MatrixOperator)]
elementwise = pytest.mark.parametrize(("name", "options"), ELEMENTWISE, ids=str)


def is_drawn(operator: Operator) -> bool:
    return operator.name == "dare"


@st.composite
def vectors(draw: Any, *, num_tasks: tuple[int, ...] = (1, 2, 3, 4), spread: int = 30) -> torch.Tensor:
    """(T, P) float32: whole numbers up to 8 times powers of two, many of them equal, opposite or zero."""
    tasks, size = draw(st.sampled_from(num_tasks)), draw(st.integers(1, 24))
    whole = st.lists(st.integers(-8, 8), min_size=tasks * size, max_size=tasks * size)
    powers = draw(st.lists(st.integers(-spread, spread), min_size=size, max_size=size))
    rows = torch.tensor(draw(whole), dtype=torch.float32).reshape(tasks, size)
    return rows * torch.tensor(powers, dtype=torch.float32).exp2()


def eighths(num_tasks: int) -> torch.Tensor:
    """Weights whose products with the drawn numbers are exact, and so are their sums."""
    return torch.tensor([1.0, 0.5, 0.25, 0.125][:num_tasks])


# ---- every operator --------------------------------------------------------------------------------------------------


@elementwise
@quick
@given(rows_TP=vectors())
def test_operators_agree_with_the_reference_on_numbers_of_any_size(
    name: str, options: dict[str, Any], rows_TP: torch.Tensor
) -> None:
    weights_T, tile = eighths(len(rows_TP)), tile_for(len(rows_TP))
    found = merge(BUILT_IN[name](**options), rows_TP, weights_T, tile)
    assert bits(found) == refer(name, rows_TP, weights_T, tile, **options)
    assert bool(torch.isfinite(found).all())


@elementwise
@quick
@given(rows_TP=vectors(), size=st.integers(1, 25))
def test_operators_give_any_cut_the_bits_of_the_whole(
    name: str, options: dict[str, Any], rows_TP: torch.Tensor, size: int
) -> None:
    operator, weights_T, tile = BUILT_IN[name](**options), eighths(len(rows_TP)), tile_for(len(rows_TP))
    assert bits(streamed(operator, rows_TP, weights_T, tile, size)) == bits(merge(operator, rows_TP, weights_T, tile))


@elementwise
@quick
@given(rows_TP=vectors(), power=st.integers(-30, 30))
def test_operators_of_vectors_times_a_power_of_two_are_that_much_larger_to_the_bit(
    name: str, options: dict[str, Any], rows_TP: torch.Tensor, power: int
) -> None:
    operator, weights_T, factor = BUILT_IN[name](**options), eighths(len(rows_TP)), 2.0**power
    tile = tile_for(len(rows_TP))
    expected = merge(operator, rows_TP, weights_T, tile) * factor
    assert torch.equal(merge(operator, rows_TP * factor, weights_T, tile), expected)


@elementwise
@quick
@given(rows_TP=vectors(num_tasks=(2, 3, 4), spread=4), random=st.randoms(use_true_random=False))
def test_operators_do_not_care_in_which_order_tasks_come(
    name: str, options: dict[str, Any], rows_TP: torch.Tensor, random: Any
) -> None:
    operator, weights_T, tile = BUILT_IN[name](**options), eighths(len(rows_TP)), tile_for(len(rows_TP))
    order = random.sample(range(len(rows_TP)), len(rows_TP))
    moved = replace(tile, keys=tuple(tile.keys[task] for task in order))
    expected, found = (
        merge(operator, rows_TP, weights_T, tile),
        merge(operator, rows_TP[order], weights_T[order], moved),
    )
    if is_drawn(operator):  # divided by its density, an entry is no round number any more, and sums are rounded
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@every_case
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_operators_of_nothing_are_nothing(name: str, options: dict[str, Any], num_tasks: int) -> None:
    operator = BUILT_IN[name](**options)
    weights_T = torch.full((num_tasks,), 1 / num_tasks)
    assert not merge(operator, torch.zeros(num_tasks, 12), weights_T).any()
    if isinstance(operator, MatrixOperator):
        merged = operator.merge_matrix((torch.zeros(3, 4) for _ in range(num_tasks)), weights_T)
        assert merged.shape == (3, 4) and not merged.any()


IDENTITIES: list[Operator] = [
    Mean(),
    Metis(mask=False),
    Metis(min_agreement=1),
    Metis(mask="soft", min_agreement=1),
    Metis(min_agreement=1, vote="unweighted", rescale="norm"),
    Ties(density=1.0),
    BUILT_IN["task_arithmetic"](scaling=1.0),
    BUILT_IN["consensus_ta"](scaling=1.0, min_agreement=1),
    BUILT_IN["dare"](scaling=1.0, density=1.0),
    BUILT_IN["dare"](scaling=1.0, density=1.0, then="ties"),
]


@pytest.mark.parametrize("operator", IDENTITIES, ids=str)
@quick
@given(row_1P=vectors(num_tasks=(1,)))
def test_operators_of_one_task_that_weighs_one_are_that_task(operator: Operator, row_1P: torch.Tensor) -> None:
    assert torch.equal(merge(operator, row_1P, [1.0]), row_1P[0])


CONVEX: list[Operator] = [
    Mean(),
    Metis(),
    Metis(mask="soft"),
    Metis(vote="unweighted"),
    Metis(rescale="norm"),
    Metis(mask=False),
    Ties(density=0.4),
    Ties(density=0.4, trim_scope="model"),
]


@pytest.mark.parametrize("operator", CONVEX, ids=str)
@quick
@given(rows_TP=vectors(num_tasks=(2, 4)))
def test_operators_that_average_leave_what_all_tasks_share_alone(operator: Operator, rows_TP: torch.Tensor) -> None:
    """M(u, …, u) = u for what M itself has made, at weights 1/T: a second merge changes nothing."""
    weights_T = torch.full((len(rows_TP),), 1 / len(rows_TP))
    once = merge(operator, rows_TP[:1].expand_as(rows_TP).contiguous(), weights_T)
    if operator.name != "ties":  # which has trimmed it
        assert torch.equal(once, rows_TP[0])
    assert torch.equal(merge(operator, once.expand_as(rows_TP).contiguous(), weights_T), once)


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
@quick
@given(seed=st.integers(0, 99), power=st.integers(-20, 20))
def test_matrix_operators_of_matrices_times_a_number_and_in_any_order(name: str, seed: int, power: int) -> None:
    operator, generator = BUILT_IN[name](), torch.Generator().manual_seed(seed)
    assert isinstance(operator, MatrixOperator)
    matrices = [torch.randn(5, 4, generator=generator) for _ in range(3)]
    weights_T, factor = torch.ones(3), 2.0**power
    expected = operator.merge_matrix((one.clone() for one in matrices), weights_T)
    larger = operator.merge_matrix((one * factor for one in matrices), weights_T)
    torch.testing.assert_close(larger / factor, expected, rtol=1e-4, atol=1e-5)
    turned = operator.merge_matrix((one.clone() for one in matrices[::-1]), weights_T)
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-5)


# ---- stored numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_merges_have_the_same_bits_from_every_stored_type(name: str, tmp_path: Path) -> None:
    """Numbers that bfloat16, float16 and float32 hold alike give the same task vector from each, on any threads."""
    operator, found = BUILT_IN[name](), {}
    generator = torch.Generator().manual_seed(1)
    models = [
        {key: torch.randint(-8, 9, shape, generator=generator) / 8 for key, shape in SHAPES.items()} for _ in range(4)
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        places = [
            write_model(tmp_path / f"{dtype}_{i}", {key: one.to(dtype) for key, one in model.items()})
            for i, model in enumerate(models)
        ]
        updates = [ModelUpdate(tmp_path / f"{dtype}_{i}") for i in (1, 2, 3)]
        for threads in (1, 3):
            output = tmp_path / f"{dtype}_{threads}.safetensors"
            merge_weights(
                places[0], None, ("x", "y", "z"), updates, operator, [0.5, 0.25, 0.25], output, threads=threads
            )
            found[dtype, threads] = output.read_bytes()
    assert len(set(found.values())) == 1


BAD = {
    "nan": (float("nan"), 1.0),
    "inf": (float("inf"), 1.0),
    "a product beyond float32": (1e30, 1e30),
    "a scaling beyond float32": (0.0, 1e39),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["mean", "metis", "ties", "dare"])
@pytest.mark.parametrize("bad", BAD)
def test_adapters_whose_numbers_or_products_are_not_finite_never_pass(
    bad: str, name: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask would drop such a coordinate, and nobody would know."""
    if not compiled:
        monkeypatch.setattr(kernels, "compiled", lambda: False)
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / task, task) for task in ("x", "y")]
    entry, factor = BAD[bad]
    stored = read_model(adapters[1] / "adapter_model.safetensors")
    stored["a.weight.A"][0, 1] = entry
    if factor == 1e30:
        stored["a.weight.B"][2, 0] = factor
    write_tensors(adapters[1] / "adapter_model.safetensors", stored)
    if factor == 1e39:
        table = read_json(adapters[1] / FACTORS_NAME)
        table["a.weight"]["scaling"] = factor
        write_json(adapters[1] / FACTORS_NAME, table)
    updates, output = [AdapterUpdate(adapter) for adapter in adapters], tmp_path / "out.safetensors"
    with pytest.raises(MergeError, match=r"task 'y', tensor 'a\.weight': the expert holds NaN or Inf, or factors"):
        merge_weights(base, None, ("x", "y"), updates, BUILT_IN[name](), [0.5, 0.5], output)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_merge_of_experts_that_changed_nothing_is_the_base(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    updates, output = [ModelUpdate(tmp_path / "base") for _ in range(3)], tmp_path / "out.safetensors"
    report = merge_weights(base, None, ("x", "y", "z"), updates, BUILT_IN[name](), [1 / 3] * 3, output).to_json()
    assert all(not tensor.any() for tensor in read_model(output).values())
    assert report["kept_share"] == report["update_norm"] == report["merged_norm"] == 0
    assert set(map(float, np.ravel(report["task_vector_cosines"]))) == {0.0}


def test_optimizer_state_that_overflowed_is_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    (layer(torch.tensor([[1e25, 0.0]])).sum()).backward()  # its square is beyond float32
    optimizer.step()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in layer.parameters())
    with pytest.raises(ModelError, match=r"optimizer state 'weight\.exp_avg_sq' holds NaN or Inf"):
        write_state(optimizer, layer, tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


# ---- losses, gaps, weights -------------------------------------------------------------------------------------------

GAPS = st.one_of(
    st.floats(-1e30, 1e30),
    st.builds(lambda power, sign: sign * 10.0**power, st.integers(-30, 30), st.sampled_from([-1, 0, 1])),
)
KINDS: list[Metis] = [
    *(Metis(gap=kind) for kind in ("absolute", "relative", "over_expert", "over_start", "none")),  # type: ignore[arg-type]
    Metis(temperature="auto"),
    Metis(temperature="auto", gap="relative", effective_tasks=1.5),
    Metis(weight_memory=0.9),
    Metis(temperature=1e-30),
    Metis(temperature=1e30),
]


@pytest.mark.parametrize("operator", KINDS, ids=str)
@quick
@given(gaps=st.lists(GAPS, min_size=2, max_size=6), expert=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
def test_weights_of_gaps_of_any_size_sum_to_one_and_follow_them(
    operator: Metis, gaps: list[float], expert: float
) -> None:
    experts = tuple(expert for _ in gaps)
    losses = TaskLosses(tuple(expert + gap for gap in gaps), experts, tuple(expert + 1.0 for _ in gaps))
    before = [1 / len(gaps)] * len(gaps)
    weights, _ = choose_weights(operator, losses, before)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12) and all(0 <= weight <= 1 for weight in weights)
    assert normalized_weights(weights) == pytest.approx(weights, abs=1e-12)
    by_gap = [weight for _, weight in sorted(zip(losses.gaps, weights, strict=True))]
    if operator.gap in ("absolute", "over_expert"):
        assert all(low <= high or math.isclose(low, high, rel_tol=1e-9) for low, high in pairwise(by_gap))
    if len(set(losses.gaps)) == 1 and len(set(losses.start)) == 1:
        assert weights == pytest.approx(before)


@pytest.mark.parametrize("power", [-323, -300, -30, 0, 30, 300])
def test_auto_temperature_follows_gaps_of_any_size(power: int) -> None:
    gaps = (0.0, 10.0**power, 2 * 10.0**power)
    losses = TaskLosses(gaps, (0.0,) * 3, (1.0,) * 3)
    weights, details = choose_weights(Metis(temperature="auto"), losses)
    assert details["temperature"] > 0 and math.fsum(weights) == pytest.approx(1)
    if power > -300:  # below, the differences have too few digits to tell tasks apart
        expected, _ = choose_weights(Metis(temperature="auto"), TaskLosses((0.0, 1.0, 2.0), (0.0,) * 3, (1.0,) * 3))
        assert weights == pytest.approx(expected, rel=1e-6)


def test_gap_of_a_task_whose_expert_got_worse_lowers_its_weight() -> None:
    losses = TaskLosses((2.0, 2.0, 2.0), (1.5, 1.5, 2.5), (2.0, 2.0, 2.0))
    for operator in (Metis(), Metis(gap="relative"), Metis(gap="over_expert"), Metis(gap="over_start")):
        weights, _ = choose_weights(operator, losses)
        assert weights[2] < 1 / 3 < weights[0] == weights[1]
    uniform, _ = choose_weights(Metis(gap="none"), losses)
    assert uniform == [1 / 3] * 3


@pytest.mark.parametrize("which", ["start", "expert", "pretrained"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operator", [Metis(gap="relative"), Metis(), Metis(temperature="auto")], ids=str)
def test_losses_that_are_not_finite_give_no_weights(operator: Operator, bad: float, which: str) -> None:
    losses = replace(TaskLosses((1.0, 2.0), (0.5, 1.5), (2.0, 2.0)), **{which: (1.0, bad)})
    with pytest.raises(MergeError, match=rf"validation losses must be finite, found .* \({which}\)"):
        choose_weights(operator, losses)


def test_gaps_so_far_apart_that_their_difference_is_not_finite_are_refused() -> None:
    with pytest.raises(MergeError, match="and so must their differences"):
        gap_weights([1e308, -1e308], 1.0)
    with pytest.raises(MergeError, match="and so must their differences"):
        choose_weights(Metis(temperature="auto"), TaskLosses((1e308, 0.0), (0.0, 1e308), (1.0, 1.0)))


def test_validation_loss_in_a_unit_that_float64_cannot_hold_is_refused() -> None:
    encoded = [Encoded(0, (1, 2, 3), 1, False)]
    assert mean_loss(encoded, [TokenSums(4.0, 0)], 1e300).loss == 2e300
    with pytest.raises(DataError, match=r"a validation loss of inf with loss_scale 1e\+308; give"):
        mean_loss(encoded, [TokenSums(4.0, 0)], 1e308)


def test_every_property_has_a_case_for_every_operator() -> None:
    assert {name for name, _ in CASES} == set(BUILT_IN)
    assert {operator.name for operator in IDENTITIES} | {"iso_c", "tsv_m"} == set(BUILT_IN)
    averages = {name for name, kind in BUILT_IN.items() if not kind().sums} - {"tsv_m"}
    assert {operator.name for operator in CONVEX} == averages
