"""Operators: hand-computed cases, agreement with reference.py, and the contract that every operator keeps.

Shapes: T = tasks, P = entries, O × I = a matrix.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import reference
from manyshot.operator_choice import make_plan
from manyshot.operators import (
    BUILT_IN,
    GROUP,
    OPERATORS,
    ConsensusTA,
    Dare,
    IsoC,
    MatrixOperator,
    Mean,
    Metis,
    Operator,
    OperatorPlan,
    TaskArithmetic,
    Ties,
    Tile,
    TrimScan,
    TsvM,
    load_operator,
    merge_whole,
    tile_key,
)
from manyshot.operators._norm import _square
from manyshot.operators._trim import num_kept
from manyshot.seeding import make_generator

METIS_MASKS: list[dict[str, Any]] = [
    {"mask": False, "rescale": "norm"},
    {"mask": "soft", "min_agreement": 3},
    {"vote": "unweighted"},
    {"rescale": "norm", "mask_threshold": 0.6},
    {"mask": "soft", "vote": "unweighted", "rescale": "norm", "mask_threshold": 0.6, "scaling": 0.7},
]
# the contract rows of every operator: hyper-parameters that differ from the defaults
CONTRACT: dict[str, list[dict[str, Any]]] = {
    "mean": [],
    "task_arithmetic": [{"scaling": 0.7}],
    "dare": [{"density": 0.6, "scaling": 0.9}, {"density": 0.3, "then": "ties", "rescale": False}],
    "ties": [{"density": 0.55, "scaling": 0.9}, {"density": 1.0}, {"density": 1e-4, "trim_scope": "model"}],
    "consensus_ta": [{"mask_threshold": 0.7, "min_agreement": 3, "scaling": 0.9}],
    "metis": [{"temperature": 1.5, "mask_threshold": 0.7, "min_agreement": 3, "scaling": 0.9}, *METIS_MASKS],
    "iso_c": [{"scaling": 0.9}],
    "tsv_m": [{"scaling": 0.9}],
}
CASES = [(name, options) for name, rows in CONTRACT.items() for options in ({}, *rows)]
MATRIX_NAMES = [name for name, kind in BUILT_IN.items() if issubclass(kind, MatrixOperator)]
WEIGHTING = {name: "normalized" if name in ("mean", "metis") else "multiplier" for name in CONTRACT}
DOCS_FOLDER = Path(__file__).parent.parent / "docs"
DOCS = (DOCS_FOLDER / "operators.md").read_text("utf-8")

quick = settings(deadline=None, database=None, derandomize=True, max_examples=40)
floats = st.floats(-8, 8, width=32)
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
every_operator = pytest.mark.parametrize("name", sorted(CONTRACT))


def tile_for(num_tasks: int) -> Tile:
    return Tile.of([f"task{task}" for task in range(num_tasks)], "layer.weight", seed=3, round_index=2)


def merge(operator: Operator, vectors: Any, weights: Any, tile: Tile | None = None) -> torch.Tensor:
    vectors_TP = torch.as_tensor(vectors, dtype=torch.float32)
    weights_T = torch.as_tensor(weights, dtype=torch.float32)
    return merge_whole(operator, vectors_TP, weights_T, tile or tile_for(len(vectors_TP)))


def draw(num_tasks: int, num_entries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random task vectors on a coarse grid (so that equal sides of a mask happen) and weights that sum to 1."""
    generator = make_generator("test_operators", num_tasks, seed)
    vectors_TP = torch.randn(num_tasks, num_entries, generator=generator).mul(4).round() / 4
    weights_T = torch.rand(num_tasks, generator=generator) + 0.1
    return vectors_TP, weights_T / weights_T.sum()


def draw_matrices(num_tasks: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tasks, rows, columns, generator=make_generator("matrices", num_tasks, rows, seed))


def refer(name: str, vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile, **options: Any) -> list[int]:
    """What reference.py says, as bits."""
    if name == "dare":
        options = options | {"keys": tile.keys, "offset": tile.offset}
    found = reference.REFERENCES[name](vectors_TP.tolist(), weights_T.tolist(), **options)
    return np.array(found, dtype=np.float32).view(np.int32).tolist()  # type: ignore[no-any-return]


def bits(merged_P: torch.Tensor) -> list[int]:
    assert merged_P.dtype == torch.float32
    return merged_P.contiguous().view(torch.int32).tolist()  # type: ignore[no-any-return]


def streamed(
    operator: Operator, vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile, size: int
) -> torch.Tensor:
    """What merge_whole does, one tile of `size` entries after the other, as the engine goes."""
    parts = vectors_TP.split(size, dim=1)
    preceding = [(0,) * len(vectors_TP)] * len(parts)
    scan = operator.start_scan(*vectors_TP.shape)
    while scan is not None and not scan.done:
        counts = torch.zeros(scan.counts_shape(), dtype=torch.int64)
        if scan.per_tile:
            for index, part_TP in enumerate(parts):
                preceding[index] = tuple(counts.tolist())
                scan.observe(part_TP, weights_T, counts)
        else:
            for part_TP in reversed(parts):  # the order does not matter
                scan.observe(part_TP, weights_T, counts)
        scan.advance(counts)
    merged = []
    for index, part_TP in enumerate(parts):
        here = replace(tile, offset=tile.offset + index * size, scan=scan, preceding=preceding[index])
        merged.append(operator.merge(part_TP, weights_T, here))
    return torch.cat(merged)


# ---- every operator --------------------------------------------------------------------------------------------------


def test_operators_table_has_a_contract_row_a_reference_and_a_docs_page_for_each() -> None:
    assert set(BUILT_IN) == set(CONTRACT) == set(reference.REFERENCES)
    assert set(MATRIX_NAMES) == set(reference.MATRIX_REFERENCES)
    assert set(BUILT_IN) == {page.stem for page in (DOCS_FOLDER / "operators").glob("*.md")}
    assert all(BUILT_IN[name]().name == name for name in BUILT_IN)
    assert BUILT_IN.items() <= OPERATORS.items()


@every_case
def test_operators_are_frozen_and_refuse_unknown_hyper_parameters(name: str, options: dict[str, Any]) -> None:
    kind = BUILT_IN[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind(**options).name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="unknown_parameter"):
        kind(unknown_parameter=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="unknown_parameter"):
        TypeAdapter(kind).validate_python(options | {"unknown_parameter": 1})
    assert TypeAdapter(kind).validate_python(options) == kind(**options)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
@every_case
def test_operators_agree_with_the_reference_bit_for_bit(name: str, options: dict[str, Any], num_tasks: int) -> None:
    vectors_TP, weights_T = draw(num_tasks, 200)
    tile = replace(tile_for(num_tasks), offset=2**32 - 100)
    for weights in (weights_T, torch.ones(num_tasks)):
        found = merge(BUILT_IN[name](**options), vectors_TP, weights, tile)
        assert bits(found) == refer(name, vectors_TP, weights, tile, **options)


@every_case
def test_operators_give_a_tile_the_bits_of_the_whole(name: str, options: dict[str, Any]) -> None:
    vectors_TP, weights_T = draw(5, 603)
    operator, tile = BUILT_IN[name](**options), replace(tile_for(5), offset=2**32 - 300)
    whole = bits(merge(operator, vectors_TP, weights_T, tile))
    for size in (1, 7, 64, 600, 1000):
        assert bits(streamed(operator, vectors_TP, weights_T, tile, size)) == whole, size


@every_case
def test_operators_leave_their_inputs_and_global_randomness_unchanged(name: str, options: dict[str, Any]) -> None:
    vectors_TP, weights_T = draw(3, 50)
    before, weights_before, state = vectors_TP.clone(), weights_T.clone(), torch.get_rng_state()
    merge(BUILT_IN[name](**options), vectors_TP, weights_T).add_(1)  # the result is not a view of an input
    assert torch.equal(vectors_TP, before)
    assert torch.equal(weights_T, weights_before)
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_operators_do_not_depend_on_task_order(name: str, options: dict[str, Any]) -> None:
    vectors_TP = torch.randn(4, 300, generator=make_generator("order"))
    weights_T, tile = torch.tensor([0.1, 0.2, 0.3, 0.4]), tile_for(4)
    operator = BUILT_IN[name](**options)
    expected = merge(operator, vectors_TP, weights_T, tile)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        there = replace(tile, keys=tuple(tile.keys[task] for task in order))
        found = merge(operator, vectors_TP[order], weights_T[order], there)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_operators_give_finite_numbers_and_keep_zeros_for_zeros(name: str, options: dict[str, Any]) -> None:
    operator, (vectors_TP, weights_T) = BUILT_IN[name](**options), draw(3, 100)
    assert not merge(operator, torch.zeros(3, 100), weights_T).any()
    assert not merge(operator, vectors_TP, torch.zeros(3)).any()  # TIES divides by the weights that agree
    for scale in (1e-44, 1e-30, 1e30):
        assert merge(operator, vectors_TP * scale, weights_T).isfinite().all()
    assert merge(operator, torch.empty(3, 0), weights_T).shape == (0,)


@every_case
def test_operators_give_the_same_bits_twice(name: str, options: dict[str, Any]) -> None:
    vectors_TP, weights_T = draw(3, 100)
    operator = BUILT_IN[name](**options)
    assert torch.equal(merge(operator, vectors_TP, weights_T), merge(operator, vectors_TP, weights_T))


@every_case
def test_operators_scaling_multiplies_the_merged_vector(name: str, options: dict[str, Any]) -> None:
    if name == "mean":
        pytest.skip("a mean has no scaling")
    vectors_TP, weights_T = draw(3, 100)
    once = merge(BUILT_IN[name](**options | {"scaling": 0.5}), vectors_TP, weights_T)
    twice = merge(BUILT_IN[name](**options | {"scaling": 1.0}), vectors_TP, weights_T)
    assert once.any()
    assert torch.equal(once * 2, twice)


SCHEDULED = [
    (name, entry.name) for name, kind in BUILT_IN.items() for entry in fields(kind) if "PerRound" in str(entry.type)
]


def test_operators_take_a_schedule_for_every_number() -> None:
    numbers = {
        (name, entry.name)
        for name, kind in BUILT_IN.items()
        for entry in fields(kind)
        if isinstance(entry.default, float | int) and not isinstance(entry.default, bool)
    }
    assert numbers == set(SCHEDULED)
    assert len(SCHEDULED) == 15


@pytest.mark.parametrize(("name", "field"), SCHEDULED)
def test_operators_at_round_chooses_the_value_of_the_round(name: str, field: str) -> None:
    default = getattr(BUILT_IN[name](), field)
    schedule = (default, default + 1, default) if isinstance(default, int) else (default, default / 2, default / 4)
    operator = BUILT_IN[name](**{field: schedule})
    assert [operator.at_round(r) for r in (1, 2, 3)] == [BUILT_IN[name](**{field: value}) for value in schedule]
    assert getattr(operator, field) == schedule
    assert BUILT_IN[name]().at_round(7) == BUILT_IN[name]()
    assert TypeAdapter(BUILT_IN[name]).validate_python({field: list(schedule)}) == operator
    assert operator.problems(4, 3) == []
    assert operator.problems(4, 5) == [(field, "has 3 values for 5 rounds; give one, or one per round")]
    if field not in ("temperature", "weight_memory"):  # they make the weights; a merge has no use for them
        with pytest.raises(TypeError, match=r"call at_round\(\) before merge\(\)"):
            merge(operator, [[1.0], [1.0]], [1.0, 1.0])


@every_case
def test_operators_have_no_problem_with_enough_tasks(name: str, options: dict[str, Any]) -> None:
    assert BUILT_IN[name](**options).problems(num_tasks=3, rounds=5) == []


@every_operator
def test_operators_weighting_is_what_reference_and_docs_assume(name: str) -> None:
    operator = BUILT_IN[name]()
    assert operator.weighting == WEIGHTING[name]
    assert operator.uses_loss_gaps == (name == "metis")
    # multipliers of 1 for a sum are 1/T for a mean, and the other way round
    plan = OperatorPlan(Mean(), (("*", operator),))
    expected = (0.25,) * 4 if WEIGHTING[name] == "normalized" else (1.0,) * 4
    assert plan.weights_for(operator, (0.25,) * 4) == expected


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in MATRIX_NAMES])
def test_operators_growth_is_the_factor_for_what_all_tasks_share(name: str) -> None:
    vector_P, num_tasks = draw(1, 50)[0][0], 5
    unmasked = {"density": 1.0, "mask_threshold": 0.0}
    options = {field: value for field, value in unmasked.items() if field in BUILT_IN[name].__dataclass_fields__}
    operator = BUILT_IN[name](**options)
    weights = [1.0 if operator.weighting == "multiplier" else 1 / num_tasks] * num_tasks
    shared = merge(operator, vector_P.expand(num_tasks, -1), weights)
    torch.testing.assert_close(shared, vector_P * operator.growth(num_tasks), rtol=1e-5, atol=0)


def test_operators_growth_by_hand() -> None:
    assert TaskArithmetic(scaling=0.4).growth(5) == 2.0
    assert TaskArithmetic(scaling=(0.1, 0.3, 0.2)).growth(10) == pytest.approx(3.0)  # the worst round
    assert ConsensusTA(scaling=0.25).growth(4) == 1.0
    assert Dare(scaling=0.5).growth(4) == 2.0
    assert Dare(scaling=0.5, then="ties").growth(4) == 0.5  # an average
    assert Metis(scaling=1.5).growth(9) == 1.5
    assert IsoC(scaling=0.5).growth(4) == 2.0
    assert [BUILT_IN[name]().growth(9) for name in ("mean", "ties", "metis", "tsv_m")] == [1.0] * 4


def test_operators_base_classes_cannot_merge() -> None:
    with pytest.raises(TypeError, match=r"Operator defines neither merge\(\) nor operation\(\)"):
        merge(Operator(name="none"), [[1.0]], [1.0])
    with pytest.raises(TypeError, match=r"MatrixOperator does not define merge_matrix\(\)"):
        MatrixOperator(name="none").merge_matrix([torch.zeros(2, 2)], torch.ones(1))


def test_merge_whole_without_a_tile_draws_for_every_task_anew() -> None:
    merged = merge_whole(Dare(density=0.5, scaling=1.0), torch.ones(2, 1000), torch.tensor([1.0, 10.0]))
    assert sorted(set(merged.tolist())) == [0.0, 2.0, 20.0, 22.0]  # neither task, one of them, both


# ---- mean, task arithmetic -------------------------------------------------------------------------------------------


def test_mean_of_two_tasks_by_hand() -> None:
    assert merge(Mean(), [[1.0, -2.0, 4.0], [3.0, 2.0, 0.0]], [0.5, 0.5]).tolist() == [2.0, 0.0, 2.0]


def test_mean_of_one_task_with_weight_one_is_that_task() -> None:
    vectors_TP, _ = draw(1, 100)
    assert torch.equal(merge(Mean(), vectors_TP, [1.0]), vectors_TP[0])


def test_task_arithmetic_of_two_tasks_by_hand() -> None:
    # 0.5 · (1 + 3), 0.5 · (−2 + 2), and with weights (1, 2): 0.5 · (1 + 6), 0.5 · (−2 + 4)
    vectors = [[1.0, -2.0], [3.0, 2.0]]
    assert merge(TaskArithmetic(scaling=0.5), vectors, [1.0, 1.0]).tolist() == [2.0, 0.0]
    assert merge(TaskArithmetic(scaling=0.5), vectors, [1.0, 2.0]).tolist() == [3.5, 1.0]


# ---- dare ------------------------------------------------------------------------------------------------------------


def test_dare_by_hand() -> None:
    # key 0 at position 0 is a fixed point of the finaliser: its draw is 0, kept at every density; the highest draw
    # among the first eight positions goes first when the density falls
    draws = [reference.draw(0, position) / 2**32 for position in range(8)]
    assert draws[0] == 0.0
    density = sorted(draws)[4]  # four draws lie below it
    merged = merge(Dare(density=density, scaling=0.5), [[3.0] * 8], [1.0], Tile(keys=(0,)))
    expected = [0.5 * (np.float32(3.0) / np.float32(density)) if each < density else 0.0 for each in draws]
    assert merged.tolist() == [float(value) for value in expected]
    assert (merged != 0).sum() == 4


def test_dare_density_one_is_task_arithmetic_or_an_election() -> None:
    vectors_TP, weights_T = draw(3, 100)
    summed = merge(TaskArithmetic(scaling=0.7), vectors_TP, weights_T)
    assert torch.equal(merge(Dare(density=1.0, scaling=0.7), vectors_TP, weights_T), summed)
    elected = merge(Ties(density=1.0, scaling=0.7), vectors_TP, weights_T)
    assert torch.equal(merge(Dare(density=1.0, scaling=0.7, then="ties"), vectors_TP, weights_T), elected)


def test_dare_rescale_divides_by_the_density_and_keeps_the_mean() -> None:
    plain = merge(Dare(density=0.25, scaling=1.0, rescale=False), torch.ones(1, 40_000), [1.0])
    rescaled = merge(Dare(density=0.25, scaling=1.0), torch.ones(1, 40_000), [1.0])
    assert torch.equal(rescaled, plain * 4)
    # standard deviation of the mean: √(0.25 · 0.75 / 40 000) · 4 = 0.0087
    assert float(rescaled.mean()) == pytest.approx(1.0, abs=5 * 0.0087)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_dare_keeps_the_share_that_density_says(density: float) -> None:
    for seed in range(3):
        tile = Tile.of(["math"], "q_proj", seed=seed)
        kept = int(merge(Dare(density=density), torch.ones(1, 50_000), [1.0], tile).count_nonzero())
        assert abs(kept - 50_000 * density) < 5 * (50_000 * density * (1 - density)) ** 0.5


def test_dare_draws_of_tasks_tensors_rounds_and_seeds_are_uncorrelated() -> None:
    base = Tile.of(["math", "code"], "q_proj", seed=0, round_index=1)
    others = [
        *(Tile.of(["math"], "k_proj"), Tile.of(["math"], "q_proj", seed=1), Tile.of(["math"], "q_proj", round_index=2)),
        *(replace(base, offset=1), replace(base, offset=64), replace(base, offset=2**32), replace(base, offset=2**33)),
    ]
    rows = [base.uniform(0, 20_000), base.uniform(1, 20_000), *(other.uniform(0, 20_000) for other in others)]
    correlations = torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / 20_000**0.5
    for row in rows:  # uniform: mean 1/2, variance 1/12
        assert float(row.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 20_000) ** 0.5)
        assert float(row.var()) == pytest.approx(1 / 12, abs=0.003)


def test_dare_draws_depend_on_seed_round_task_tensor_and_position_alone() -> None:
    operator, ones = Dare(density=0.5, scaling=1.0), torch.ones(1, 500)
    tile = Tile.of(["math"], "q_proj", seed=4, round_index=2)
    alone = merge(operator, ones, [1.0], tile)
    among = merge(
        operator, torch.ones(3, 500), [0.0, 1.0, 0.0], Tile.of(["a", "math", "b"], "q_proj", seed=4, round_index=2)
    )
    assert torch.equal(alone, among)
    assert (
        tile.keys
        == (reference.tile_key(4, "operator", 2, "math", "q_proj"),)
        == (tile_key(4, "operator", 2, "math", "q_proj"),)
    )
    assert torch.equal(merge(operator, ones[:, 100:], [1.0], replace(tile, offset=100)), alone[100:])
    for other in (
        Tile.of(["math"], "q_proj", seed=5, round_index=2),
        Tile.of(["math"], "q_proj", seed=4, round_index=1),
        Tile.of(["code"], "q_proj", seed=4, round_index=2),
        Tile.of(["math"], "k_proj", seed=4, round_index=2),
        replace(tile, offset=500),
        replace(tile, offset=2**32),
    ):
        assert not torch.equal(merge(operator, ones, [1.0], other), alone)


def test_dare_draws_go_on_beyond_two_to_the_32() -> None:
    key = Tile.of(["math"]).keys[0]
    offset = 3 * 2**32 - 5
    found = Tile(keys=(key,), offset=offset).uniform(0, 10).tolist()
    assert found == [(reference.draw(key, offset + i) >> 8) / 2**24 for i in range(10)]
    assert found[5:] != Tile(keys=(key,)).uniform(0, 5).tolist()
    vectors_TP = torch.ones(1, 10)
    merged = merge(Dare(density=0.5), vectors_TP, [1.0], Tile(keys=(key,), offset=offset))
    assert bits(merged) == refer("dare", vectors_TP, torch.ones(1), Tile(keys=(key,), offset=offset), density=0.5)


# ---- ties ------------------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    # density 0.6 of 5: three stay. task 1: 5, −4, 3; task 2: −6, 5, 4
    vectors = [[5.0, -4.0, 3.0, 1.0, -2.0], [-6.0, 1.0, 5.0, 4.0, 2.0]]
    # sums: −1 -> only −6 agrees; −4 -> −4; 8 -> mean of 3 and 5; 4 -> 4; 0 -> nothing is left of it
    assert merge(Ties(density=0.6), vectors, [1.0, 1.0]).tolist() == [-6.0, -4.0, 4.0, 4.0, 0.0]
    # weights 3 and 1: sums 9, −12, 14, 4, 0; the mean of the third is (3·3 + 5)/4
    assert merge(Ties(density=0.6, scaling=2.0), vectors, [3.0, 1.0]).tolist() == [10.0, -8.0, 7.0, 8.0, 0.0]


def test_ties_elects_plus_where_the_sum_is_zero() -> None:
    assert merge(Ties(density=1.0), [[2.0], [-2.0]], [1.0, 1.0]).tolist() == [2.0]
    assert merge(Ties(density=1.0), [[-2.0, 1.0], [2.0, -3.0]], [1.0, 1.0]).tolist() == [2.0, -3.0]


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_ties_keeps_exactly_k_among_many_equal_magnitudes(levels: int, density: float) -> None:
    vector_P = torch.randint(1, levels + 1, (1000,), generator=make_generator("levels", levels)).float()
    vector_P *= torch.where(torch.arange(1000) % 3 == 0, -1.0, 1.0)
    merged = merge(Ties(density=density), vector_P[None], [1.0])
    expected = max(1, int(density * 1000))
    assert num_kept(density, 1000) == expected == int(merged.count_nonzero())
    # one task: what stays is itself; the smallest that stays is no smaller than the largest that goes
    stays = merged != 0
    assert torch.equal(merged[stays], vector_P[stays])
    if expected < 1000:
        assert merged[stays].abs().min() >= vector_P[~stays].abs().max()
        # of those equal to the smallest that stays, the first ones
        equal = (vector_P.abs() == merged[stays].abs().min()).nonzero()[:, 0]
        number = int(stays[equal].sum())
        assert stays[equal[:number]].all()


def test_ties_thresholds_tell_apart_neighbouring_floats_and_denormals() -> None:
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    tiny = torch.tensor(1e-45)
    vector_P = torch.stack([one, -above, one, tiny, -2 * tiny, torch.tensor(0.0)])
    assert merge(Ties(density=1 / 6), vector_P[None], [1.0]).nonzero().flatten().tolist() == [1]
    assert merge(Ties(density=0.5), vector_P[None], [1.0]).nonzero().flatten().tolist() == [0, 1, 2]
    assert merge(Ties(density=4 / 6), vector_P[None], [1.0]).nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_ties_scan_stops_early_where_nothing_has_to_be_counted() -> None:
    assert TrimScan(2, 10, 1.0).done  # density 1: nothing is trimmed
    apart = TrimScan(1, 4, 0.5)
    vectors_TP, passes = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0
    while not apart.done:
        counts = torch.zeros(apart.counts_shape(), dtype=torch.int64)
        apart.observe(vectors_TP, torch.ones(len(vectors_TP)), counts)
        apart.advance(counts)
        passes += 1
    assert passes == 2  # no equal magnitudes: the third pass, which counts them, is not needed
    assert apart.thresholds == [0x40400000]  # the bits of 3.0


def test_ties_trim_scope_model_takes_the_largest_of_all_tensors_together() -> None:
    small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    per_tensor, model = Ties(density=0.5), Ties(density=0.5, trim_scope="model")
    assert (per_tensor.scan_scope, model.scan_scope) == ("tensor", "model")
    assert merge(per_tensor, small, [1.0]).tolist() == [0.0, 2.0]
    # the engine scans all tensors with one scan, then merges each
    both = streamed(model, torch.cat([small, large], dim=1), torch.ones(1), tile_for(1), size=2)
    assert both.tolist() == [0.0, 0.0, 10.0, 20.0]


def test_ties_without_its_scan_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"merge_whole\(\) does both"):
        Ties().merge(torch.ones(1, 1), torch.ones(1), Tile())


@quick
@given(
    st.lists(st.lists(floats, min_size=9, max_size=9), min_size=1, max_size=3), st.floats(0.01, 1), st.integers(1, 9)
)
def test_ties_agrees_with_the_reference_everywhere(rows: list[list[float]], density: float, size: int) -> None:
    vectors_TP, weights_T = torch.tensor(rows), torch.ones(len(rows))
    expected = refer("ties", vectors_TP, weights_T, Tile(), density=density)
    found = streamed(Ties(density=density), vectors_TP, weights_T, Tile(keys=(0,) * len(rows)), size)
    assert (found == torch.tensor(expected, dtype=torch.int32).view(torch.float32)).all()


# ---- metis, consensus ta ---------------------------------------------------------------------------------------------


def test_metis_mask_by_hand() -> None:
    # α = ½ for both, so w = v/2; δ = 0.5, k = 2: both must reach half of what the other one has
    vectors = [[4.0, 4.0, 4.0, 4.0, 0.0], [4.0, 2.0, 1.0, -4.0, 0.0]]
    #          V:  4    3    2.5   0    0
    # coordinate 1: w = (2, 1):   1 ≥ ½·2 holds with equality -> kept;   2: w = (2, ½): ½ ≥ 1 fails -> dropped
    # coordinate 3: w = (2, −2): both agree on magnitude, V = 0;         4: 0 ≥ 0 holds
    found = merge(Metis(mask_threshold=0.5, min_agreement=2), vectors, [0.5, 0.5])
    assert found.tolist() == [4.0, 3.0, 0.0, 0.0, 0.0]
    assert merge(Metis(mask=False), vectors, [0.5, 0.5]).tolist() == [4.0, 3.0, 2.5, 0.0, 0.0]


def test_consensus_ta_by_hand() -> None:
    # δ = 0.5, k = 2, β = 0.5 on the plain sum: 8 -> 4; 4 + 2: 2 ≥ ½·4 -> 3; 4 + 1: 1 ≥ 2 fails; 4 − 4 = 0
    vectors = [[4.0, 4.0, 4.0, 4.0], [4.0, 2.0, 1.0, -4.0]]
    found = merge(ConsensusTA(mask_threshold=0.5, scaling=0.5), vectors, [1.0, 1.0])
    assert found.tolist() == [4.0, 3.0, 0.0, 0.0]
    # a multiplier of 4 on task 2 makes it 4 + 4 there: kept
    assert merge(ConsensusTA(mask_threshold=0.5, scaling=0.5), [[4.0], [1.0]], [1.0, 4.0]).tolist() == [4.0]


def test_metis_soft_mask_keeps_the_share_of_the_votes_by_hand() -> None:
    # v as w (weights 1), δ = 1: a task votes where it outweighs the rest together; k = 2
    vectors = [[4.0, 2.0, 1.0, -1.0], [4.0, 1.0, 1.0, 1.0], [-4.0, 0.5, 1.0, 3.0]]
    # 0: V = 4, rests 0, 0, 8: two votes -> 4;  1: V = 3.5, rests 1.5, 2.5, 3: one vote -> 1.75
    # 2: V = 3, rests 2, 2, 2: none -> 0;        3: V = 3, rests 4, 2, 0: one -> 1.5
    soft = merge(Metis(mask="soft", mask_threshold=1.0), vectors, [1.0, 1.0, 1.0])
    assert soft.tolist() == [4.0, 1.75, 0.0, 1.5]
    thirds = merge(Metis(mask="soft", mask_threshold=1.0, min_agreement=3), vectors, [1.0, 1.0, 1.0])
    assert thirds.tolist() == pytest.approx([8 / 3, 3.5 / 3, 0.0, 1.0])


@quick
@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=4), st.floats(0, 2), st.integers(1, 4))
def test_metis_soft_mask_lies_between_the_hard_one_and_none(rows: list[list[float]], threshold: float, k: int) -> None:
    ones = [1.0] * len(rows)
    settings = {"mask_threshold": threshold, "min_agreement": k}
    hard, soft, whole = (merge(Metis(mask=mask, **settings), rows, ones) for mask in (True, "soft", False))  # type: ignore[arg-type]
    assert torch.equal(soft[hard != 0], hard[hard != 0])
    assert (soft.abs() <= whole.abs()).all()
    assert (soft * whole >= 0).all()
    if k == 1:
        assert (soft == hard).all()


def test_metis_votes_without_weights_do_not_depend_on_them() -> None:
    # δ = 0.5, k = 2, v = (4, 2): each holds half of the other. With α = (0.9, 0.1) the second task has 0.2 against 3.6
    vectors = [[4.0, 4.0], [2.0, 1.0]]
    assert merge(Metis(mask_threshold=0.5), vectors, [0.9, 0.1]).tolist() == [0.0, 0.0]
    unweighted = merge(Metis(mask_threshold=0.5, vote="unweighted"), vectors, [0.9, 0.1])
    assert unweighted.tolist() == pytest.approx([3.8, 0.0])
    # a task without weight still votes: what it wants is not merged, but what it agrees with stays
    assert merge(Metis(mask_threshold=0.5, vote="unweighted"), vectors, [1.0, 0.0]).tolist() == [4.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"mask": "soft"}], ids=str)
def test_metis_unweighted_votes_are_the_weighted_ones_where_weights_are_powers_of_two_alike(
    options: dict[str, Any],
) -> None:
    vectors_TP, _ = draw(4, 200)
    weights_T = torch.full((4,), 0.25)
    found = merge(Metis(vote="unweighted", **options), vectors_TP, weights_T)
    assert torch.equal(found, merge(Metis(**options), vectors_TP, weights_T))
    assert 0 < int((found != 0).sum()) < 200


def test_metis_rescale_by_hand() -> None:
    # w = v/2, δ = 0.5, k = 2: V = (4, 3, 0, 2.5), and of that (4, 3, 0, 0) stays: 31.25 of 25
    vectors = [[4.0, 4.0, 4.0, 4.0], [4.0, 2.0, -4.0, 1.0]]
    found = merge(Metis(mask_threshold=0.5, rescale="norm"), vectors, [0.5, 0.5])
    assert found.tolist() == pytest.approx([4 * 1.25**0.5, 3 * 1.25**0.5, 0.0, 0.0])
    halved = merge(Metis(mask_threshold=0.5, rescale="norm", scaling=0.5), vectors, [0.5, 0.5])
    assert torch.equal(halved * 2, found)


@pytest.mark.parametrize("options", [{}, {"mask": "soft", "min_agreement": 3}, {"vote": "unweighted"}], ids=str)
def test_metis_rescale_gives_the_norm_without_a_mask_and_the_direction_with_it(options: dict[str, Any]) -> None:
    vectors_TP, weights_T = draw(4, 500)
    masked = merge(Metis(mask_threshold=0.6, **options), vectors_TP, weights_T).double()
    rescaled = merge(Metis(mask_threshold=0.6, rescale="norm", **options), vectors_TP, weights_T).double()
    whole = merge(Metis(mask=False), vectors_TP, weights_T).double()
    assert masked.norm() < 0.95 * whole.norm()
    assert float(rescaled.norm()) == pytest.approx(float(whole.norm()), rel=1e-6)
    torch.testing.assert_close(rescaled / rescaled.norm(), masked / masked.norm(), rtol=1e-6, atol=1e-9)


def test_metis_rescale_of_what_a_mask_drops_altogether_is_zero() -> None:
    assert merge(Metis(mask_threshold=9.0, rescale="norm"), [[1.0, 2.0], [2.0, 1.0]], [0.5, 0.5]).tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match=r"needs its scan before it merges; merge_whole\(\) does both"):
        Metis(rescale="norm").merge(torch.ones(2, 3), torch.ones(2), tile_for(2))
    assert Metis(mask=False, rescale="norm").start_scan(2, 3) is None  # nothing is dropped, and nothing counted


def test_norm_scan_adds_up_squares_exactly() -> None:
    """From the smallest float32 to the largest, 10⁶ times as many small ones as large ones: not a bit is lost."""
    scan = Metis(mask_threshold=0.0, min_agreement=1, rescale="norm").start_scan(1, 1)
    assert scan is not None
    numbers = [3.4028235e38, -1e-45, 1.1754944e-38, 1.0000001, -7.0, 0.0, -0.0] + [1e-30] * 1000
    vectors_TP = torch.tensor([numbers])
    counts = np.zeros(scan.counts_shape(), np.int64)
    scan.observe(vectors_TP, torch.ones(1), counts)
    exact = sum(Fraction(value) ** 2 for value in vectors_TP.double()[0].tolist())
    assert [_square(counts_EH) * Fraction(1, 2**298) for counts_EH in counts] == [exact, exact]
    again = np.zeros_like(counts)
    for part_TP in reversed(vectors_TP.split(37, dim=1)):
        scan.observe(part_TP, torch.ones(1), again)
    assert np.array_equal(counts, again)


def test_metis_rescale_stays_finite_where_next_to_nothing_is_kept() -> None:
    # both agree on the smallest float32 there is, and on nothing else: a factor of 10⁷⁵ would be Inf
    found = merge(Metis(rescale="norm"), [[1e-45, 1e30], [1e-45, 0.0]], [1.0, 1.0])
    assert found.isfinite().all()
    assert found[0] > 0
    assert found[1] == 0


@pytest.mark.parametrize("operator", [Metis(), Metis(mask="soft"), Metis(vote="unweighted"), Metis(rescale="norm")])
def test_consensus_warnings_come_where_what_all_share_is_dropped_and_nowhere_else(operator: Metis) -> None:
    for num_tasks in (2, 3, 4, 5, 8):
        shared = merge(operator, [[1.0, 2.0]] * num_tasks, [1 / num_tasks] * num_tasks)
        dropped = not shared.any()
        assert len(operator.warnings(num_tasks)) == dropped, num_tasks
    assert replace(operator, mask=False).warnings(8) == []
    (text,) = operator.warnings(5)
    assert text.startswith("mask_threshold: 0.3 is above 1/(T − 1) = 0.25 for 5 tasks, so metis drops a coordinate")
    assert text.endswith("unless merge.reference is start, with it what earlier rounds put there; lower it")


def test_metis_task_mask_counts_equality_as_agreement() -> None:
    # w = (1, 2): |w_1| = 1 and δ·|V − w_1| = 0.5·2 = 1 exactly (the paper's ≥; with > it would be dropped)
    equal = merge(Metis(mask_threshold=0.5), [[2.0], [4.0]], [0.5, 0.5])
    below = merge(Metis(mask_threshold=0.5), [[2.0 - 2**-22], [4.0]], [0.5, 0.5])
    assert equal.tolist() == [3.0]
    assert below.tolist() == [0.0]


def test_metis_min_agreement_counts_tasks() -> None:
    # w = v here; δ = 1: a task must outweigh the rest together. V = 3 + 1 + 1 = 5: only task 1 (3 ≥ 2) agrees
    vectors = [[9.0], [3.0], [3.0]]
    third = [1 / 3, 1 / 3, 1 / 3]
    assert merge(Metis(mask_threshold=1.0, min_agreement=1), vectors, third).item() == pytest.approx(5.0)
    assert merge(Metis(mask_threshold=1.0, min_agreement=2), vectors, third).item() == 0.0
    # δ = 0.25: tasks 2 and 3 need 1 ≥ 0.25·4 = 1: all three agree
    assert merge(Metis(mask_threshold=0.25, min_agreement=3), [[3.0], [1.0], [1.0]], [1.0, 1.0, 1.0]).item() == 5.0


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_metis_threshold_zero_or_no_mask_is_the_weighted_sum(num_tasks: int) -> None:
    vectors_TP, weights_T = draw(num_tasks, 200)
    masked = merge(Metis(mask_threshold=0.0, min_agreement=num_tasks), vectors_TP, weights_T)
    assert torch.equal(masked, merge(Mean(), vectors_TP, weights_T))
    assert torch.equal(merge(Metis(mask=False), vectors_TP, weights_T), masked)


def test_consensus_drops_what_tasks_share_evenly_beyond_one_over_the_threshold() -> None:
    # T equal parts: each has 1/(T − 1) of the rest, so δ must not be above that (1/3 for 4 tasks, 1/4 for 5)
    assert [merge(Metis(), [[1.0]] * n, [1 / n] * n).item() for n in (2, 3, 4, 5)] == [
        1.0,
        pytest.approx(1.0),
        1.0,
        0.0,
    ]
    assert merge(Metis(mask_threshold=0.25), [[1.0]] * 5, [0.25] * 5).item() == 1.25
    assert [merge(ConsensusTA(), [[1.0]] * n, [1.0] * n).item() != 0 for n in (2, 3, 4)] == [True, True, False]


def test_metis_uses_the_weights_it_is_given() -> None:
    # α = (0.9, 0.1), v = (1, 9): w = (0.9, 0.9), V = 1.8; uniform weights would give 5
    assert merge(Metis(), [[1.0], [9.0]], [0.9, 0.1]).item() == pytest.approx(1.8)


@pytest.mark.parametrize("kind", [Metis, ConsensusTA])
def test_consensus_problems_name_an_agreement_out_of_reach(kind: Callable[..., Operator]) -> None:
    assert kind().problems(num_tasks=2, rounds=5) == []
    (field, text), (other, more) = kind(scaling=(1.0, 0.5), min_agreement=4).problems(3, 5)
    assert (field, text) == ("scaling", "has 2 values for 5 rounds; give one, or one per round")
    assert other == "min_agreement"
    assert "4 tasks can never agree among 3" in more
    assert kind(min_agreement=(2, 4)).problems(3, 2) == [(other, more)]  # the largest of a schedule
    assert Metis(mask=False, min_agreement=4).problems(3, 1) == []  # without a mask nobody has to agree


def test_metis_problems_with_effective_tasks() -> None:
    assert Metis(temperature="auto").problems(3, 1) == []
    assert Metis(temperature="auto", effective_tasks=2.5).problems(3, 1) == []
    for value in (0.5, 3.5):
        ((field, text),) = Metis(temperature="auto", effective_tasks=value).problems(3, 1)
        assert (field, text) == ("effective_tasks", f"{value} of 3 tasks; give 1 … 3")
    ((field, text),) = Metis(effective_tasks=2).problems(3, 1)
    assert field == "effective_tasks"
    assert "temperature: auto" in text


@quick
@given(
    st.lists(st.lists(floats, min_size=3, max_size=3), min_size=2, max_size=4),
    st.floats(0, 2, width=32),
    st.integers(1, 4),
)
def test_metis_stricter_masks_keep_a_subset(rows: list[list[float]], threshold: float, min_agreement: int) -> None:
    ones = [1.0] * len(rows)

    def kept(threshold: float, min_agreement: int) -> torch.Tensor:
        return merge(Metis(mask_threshold=threshold, min_agreement=min_agreement), rows, ones) != 0

    loose = kept(threshold, min_agreement)
    assert not (kept(threshold + 0.5, min_agreement) & ~loose).any()
    assert not (kept(threshold, min_agreement + 1) & ~loose).any()
    assert torch.equal(kept(0.0, len(rows)), merge(Mean(), rows, ones) != 0)


@quick
@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=4), st.floats(0, 2), st.integers(1, 4))
def test_metis_agrees_with_the_reference_everywhere(rows: list[list[float]], threshold: float, k: int) -> None:
    vectors_TP, weights_T = torch.tensor(rows), torch.full((len(rows),), 1 / len(rows))
    expected = refer("metis", vectors_TP, weights_T, Tile(), mask_threshold=threshold, min_agreement=k)
    assert bits(merge(Metis(mask_threshold=threshold, min_agreement=k), vectors_TP, weights_T)) == expected


# ---- iso-c, tsv-m ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_agree_with_the_reference(name: str, num_tasks: int, shape: tuple[int, int]) -> None:
    matrices_TOI = draw_matrices(num_tasks, *shape)
    weights_T = torch.linspace(0.5, 1.5, num_tasks)
    found = BUILT_IN[name](scaling=0.7).merge_matrix(matrices_TOI, weights_T)
    expected = reference.MATRIX_REFERENCES[name](matrices_TOI.double().numpy(), weights_T.tolist(), scaling=0.7)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_agree_with_the_reference_on_sums_of_adapters(name: str) -> None:
    # rank 2 each, three tasks: rank 6 of 16
    b_TOR, a_TRI = draw_matrices(3, 20, 2, seed=1), draw_matrices(3, 2, 16, seed=2)
    matrices_TOI = b_TOR @ a_TRI
    found = BUILT_IN[name]().merge_matrix(matrices_TOI, torch.ones(3))
    expected = reference.MATRIX_REFERENCES[name](matrices_TOI.double().numpy(), [1.0] * 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-5)) == 6


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_do_not_depend_on_task_order(name: str) -> None:
    matrices_TOI, weights_T = draw_matrices(3, 10, 12), torch.tensor([0.5, 1.0, 1.5])
    expected = BUILT_IN[name]().merge_matrix(matrices_TOI, weights_T)
    order = [2, 0, 1]
    found = BUILT_IN[name]().merge_matrix(matrices_TOI[order], weights_T[order])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_leave_inputs_alone_and_may_be_given_one_buffer(name: str) -> None:
    matrices_TOI, weights_T = draw_matrices(3, 10, 12), torch.tensor([0.5, 1.0, 1.5])
    before = matrices_TOI.clone()
    expected = BUILT_IN[name]().merge_matrix(matrices_TOI, weights_T)
    assert torch.equal(matrices_TOI, before)
    buffer = torch.empty(10, 12)

    def one_after_the_other() -> Iterator[torch.Tensor]:
        for matrix_OI in matrices_TOI:
            yield buffer.copy_(matrix_OI)
        buffer.fill_(torch.nan)

    assert torch.equal(BUILT_IN[name]().merge_matrix(one_after_the_other(), weights_T), expected)


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_of_zeros_are_zero_and_more_tasks_than_directions_stay_finite(name: str) -> None:
    assert not BUILT_IN[name]().merge_matrix(torch.zeros(2, 4, 3), torch.ones(2)).any()
    many = BUILT_IN[name]().merge_matrix(draw_matrices(5, 2, 3), torch.ones(5))
    assert many.shape == (2, 3)
    assert many.isfinite().all()
    matrices_TOI = draw_matrices(2, 4, 3)
    matrices_TOI[1] = 0  # a task that changed nothing here
    assert BUILT_IN[name]().merge_matrix(matrices_TOI, torch.ones(2)).isfinite().all()


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_matrix_operators_average_what_is_no_matrix(name: str) -> None:
    assert merge(BUILT_IN[name](scaling=0.5), [[1.0, -2.0], [3.0, 4.0]], [1.0, 1.0]).tolist() == [1.0, 0.5]


def test_iso_c_by_hand() -> None:
    # diag(3, 1) + diag(1, −1) = diag(4, 0): one direction, its σ stays; diag(3, 1) alone: both get σ̄ = 2
    first, second = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, -1.0]))
    both = IsoC(scaling=0.5).merge_matrix([first, second], torch.ones(2))
    torch.testing.assert_close(both, torch.diag(torch.tensor([2.0, 0.0])))
    torch.testing.assert_close(IsoC().merge_matrix([first], torch.ones(1)), 2 * torch.eye(2))


def test_iso_c_makes_all_singular_values_their_mean() -> None:
    matrices_TOI = draw_matrices(3, 12, 8)
    merged = IsoC(scaling=0.5).merge_matrix(matrices_TOI, torch.ones(3))
    expected = 0.5 * torch.linalg.svdvals(matrices_TOI.sum(0)).mean()
    torch.testing.assert_close(torch.linalg.svdvals(merged), expected.expand(8), rtol=1e-5, atol=0)


def test_iso_c_of_adapters_spreads_over_their_directions_only() -> None:
    total = (draw_matrices(1, 10, 2, seed=1) @ draw_matrices(1, 2, 9, seed=2))[0]
    values = torch.linalg.svdvals(IsoC().merge_matrix([total], torch.ones(1)))
    torch.testing.assert_close(values[:2], torch.linalg.svdvals(total)[:2].mean().expand(2), rtol=1e-5, atol=0)
    assert float(values[2]) < 1e-5


def test_tsv_m_by_hand() -> None:
    # leading half of each: 4·e1 e1ᵀ of task 1, 5·e2 e2ᵀ of task 2; they are orthogonal, so both stay as they are
    tasks = [torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([2.0, 5.0]))]
    merged = TsvM(scaling=0.5).merge_matrix(tasks, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(merged, torch.diag(torch.tensor([2.0, 5.0])))


def test_tsv_m_of_one_task_is_that_task() -> None:
    matrix_OI = draw_matrices(1, 9, 7)[0]
    torch.testing.assert_close(TsvM().merge_matrix([matrix_OI], torch.ones(1)), matrix_OI, rtol=1e-5, atol=1e-5)


def test_tsv_m_keeps_the_leading_singular_values_of_every_task() -> None:
    # U⊥ and V⊥ have orthonormal columns, so the merged singular values are the tasks' own, whatever their overlap
    matrices_TOI = draw_matrices(3, 12, 9)
    merged = TsvM().merge_matrix(matrices_TOI, torch.ones(3))
    leading = torch.cat([torch.linalg.svdvals(matrix_OI)[:3] for matrix_OI in matrices_TOI])
    found = torch.linalg.svdvals(merged)
    torch.testing.assert_close(found, leading.sort(descending=True).values, rtol=1e-5, atol=0)


# ---- operators from elsewhere ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Median(Operator):
    """β times the middle of the weighted task vectors."""

    name: Literal["median"] = "median"
    scaling: float = 1.0

    def merge(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, tile: Tile) -> torch.Tensor:
        return (task_vectors_TP * weights_T[:, None]).median(dim=0).values * self.scaling


@dataclass(frozen=True, kw_only=True)
class Taken(Operator):
    name: Literal["mean"] = "mean"


class NoDataclass(Operator):
    name: Literal["no_dataclass"] = "no_dataclass"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], EntryPoint]:
    """installed(name, attribute): an entry point to something in a module that was not there before."""
    module = types.ModuleType("brought_along")
    module.__dict__.update(Median=Median, Taken=Taken, NoDataclass=NoDataclass, instance=Median(), function=merge)
    monkeypatch.setitem(sys.modules, "brought_along", module)
    return lambda name, attribute: EntryPoint(name, f"brought_along:{attribute}", GROUP)


def test_third_party_operator_needs_merge_only() -> None:
    merged = merge(Median(scaling=2.0), [[1.0], [5.0], [3.0]], [1.0, 1.0, 1.0])
    assert merged.tolist() == [6.0]
    assert (Median().operation(), Median().start_scan(3, 10), Median().growth(3)) == (None, None, 1.0)
    assert Median().weighting == "normalized"


def test_load_operator_gives_the_class(installed: Callable[[str, str], EntryPoint]) -> None:
    assert load_operator(installed("median", "Median")) is Median


@pytest.mark.parametrize("attribute", ["instance", "function", "NoDataclass"])
def test_load_operator_refuses_what_is_no_operator_class(
    attribute: str, installed: Callable[[str, str], EntryPoint]
) -> None:
    with pytest.raises(TypeError) as caught:
        load_operator(installed("no_dataclass", attribute))
    assert f"'no_dataclass = brought_along:{attribute}' (manyshot.operators)" in str(caught.value)
    assert "not a frozen dataclass that derives from manyshot.Operator" in str(caught.value)


def test_load_operator_refuses_a_name_that_differs_or_is_taken(installed: Callable[[str, str], EntryPoint]) -> None:
    with pytest.raises(ValueError, match=r"'middle = brought_along:Median'.*calls itself 'median'"):
        load_operator(installed("middle", "Median"))
    with pytest.raises(ValueError, match=r"'mean = brought_along:Taken'.*of that name already"):
        load_operator(installed("mean", "Taken"))


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_plan_takes_the_last_pattern_that_fits() -> None:
    mlp, late, norm = Ties(density=0.5), TaskArithmetic(), Mean()
    plan = OperatorPlan(Ties(), (("*.mlp.*", mlp), ("layers.1?.*", late), ("*norm*", norm)))
    assert plan.for_tensor("layers.2.mlp.up.weight") is mlp
    assert plan.for_tensor("layers.12.mlp.up.weight") is late
    assert plan.for_tensor("layers.12.norm.weight") is norm
    assert plan.for_tensor("layers.2.attention.weight") is plan.default
    assert plan.for_tensor("layers.2.MLP.up.weight") is plan.default  # case counts


def test_plan_at_round_goes_through_all_operators() -> None:
    plan = OperatorPlan(Ties(density=(0.2, 0.4)), (("*", TaskArithmetic(scaling=(1.0, 0.5))),))
    assert plan.at_round(2) == OperatorPlan(Ties(density=0.4), (("*", TaskArithmetic(scaling=0.5)),))


def test_plan_unused_names_patterns_that_fit_nothing() -> None:
    plan = OperatorPlan(Mean(), (("*.mlp.*", Mean()), ("*.moe.*", Mean()), ("head", Mean())))
    assert plan.unused(iter(["layers.0.mlp.up", "lm_head"])) == ["*.moe.*", "head"]


def test_plan_weights_for_an_operator_of_the_other_kind() -> None:
    mean, total = OperatorPlan(Mean()), OperatorPlan(TaskArithmetic())
    assert mean.weights_for(Metis(), (0.75, 0.25)) == (0.75, 0.25)
    assert mean.weights_for(TaskArithmetic(), (0.75, 0.25)) == (1.5, 0.5)
    assert total.weights_for(Ties(), (1.0, 3.0)) == (1.0, 3.0)
    assert total.weights_for(Mean(), (1.0, 3.0)) == (0.25, 0.75)


# ---- docs/operators.md, docs/operators/ ------------------------------------------------------------------------------


def section(heading: str) -> str:
    return re.split(r"^## ", DOCS.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def table_rows(name: str) -> list[dict[str, str]]:
    """The parameter table of an operator's page, without the line under its head."""
    table = page(name).split("## Parameters\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def page(name: str) -> str:
    return (DOCS_FOLDER / "operators" / f"{name}.md").read_text("utf-8")


# what a range in the docs leaves out
OUTSIDE: dict[str, Sequence[Any]] = {
    "> 0": (0.0, -1.0, float("inf"), float("nan")),
    "> 0, or auto": (0.0, float("inf"), "automatic"),
    "≥ 0": (-0.1, float("inf")),
    "> 0, ≤ 1": (0.0, 1.5, 20),
    "whole number ≥ 1": (0, -1, 1.5),
    "true, false": ("perhaps", 2),
    "≥ 0, < 1": (-0.1, 1.0),
    "absolute, relative, over_expert, over_start, none": ("both",),
    "true, false, or soft": ("perhaps", 2),
    "weighted, unweighted": ("both",),
    "none, norm": ("length",),
    "tensor, model": ("layer",),
    "task_arithmetic, ties": ("metis",),
}


HEADINGS = ("Parameters", "When to use it", "What we saw", "What it costs")


@every_operator
def test_docs_parameter_tables_are_the_fields(name: str) -> None:
    rows = table_rows(name)
    found = {row["parameter"]: row for row in rows}
    declared = {entry.name: entry for entry in fields(BUILT_IN[name]) if entry.name != "name"}
    assert list(found) == list(declared)
    for field, row in found.items():
        # where a preset fills in something else, the page says both
        default = re.sub(r".*\(paper: `(.*)`\)$", r"\1", row["default"])
        assert default == yaml.safe_dump(declared[field].default).split("\n")[0].replace("null", "–")
        assert (row["per round"] == "yes") == ("PerRound" in str(declared[field].type)), field
        for value in OUTSIDE[row["range"].replace("`", "")]:
            with pytest.raises(ValidationError):
                TypeAdapter(BUILT_IN[name]).validate_python({field: value})


@every_operator
def test_docs_pages_name_their_source_and_say_when_and_at_what_cost(name: str) -> None:
    module = importlib.import_module(f"manyshot.operators.{name}")
    identifiers = re.findall(r"arXiv (\d{4}\.\d{5})", str(module.__doc__))
    assert identifiers
    assert all(identifier in page(name) for identifier in identifiers)
    headings = re.findall(r"^## (.*)$", page(name), flags=re.MULTILINE)
    assert [one for one in headings if one in HEADINGS] == list(HEADINGS)
    assert f"| [`{name}`](operators/{name}.md) |" in DOCS


def test_docs_overrides_do_what_they_say() -> None:
    (block,) = code_blocks(DOCS, "yaml")
    recipe = yaml.safe_load(block)
    operator = TypeAdapter(Ties).validate_python(recipe["operator"])
    plan = make_plan(operator, recipe["overrides"])
    assert plan.for_tensor("model.layers.0.self_attn.q_proj.weight") == Ties(density=0.2)
    assert plan.for_tensor("model.layers.0.mlp.up_proj.weight") == Ties(density=0.5)
    assert plan.for_tensor("model.layers.0.input_layernorm.weight") == Mean()


def test_docs_third_party_operator_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,), (project,) = code_blocks(section("Add one"), "python"), code_blocks(section("Add one"), "toml")
    assert code.count("\n") + project.count("\n") < 30
    name, module_name, attribute = re.search(r'^(\w+) = "(\w+):(\w+)"$', project, flags=re.MULTILINE).groups()  # type: ignore[union-attr]
    assert f'[project.entry-points."{GROUP}"]' in project
    module = types.ModuleType(module_name)
    monkeypatch.setitem(sys.modules, module_name, module)
    exec(compile(code, module_name, "exec"), module.__dict__)
    kind = load_operator(EntryPoint(name, f"{module_name}:{attribute}", GROUP))
    operator = TypeAdapter(kind).validate_python({"name": name})
    vectors_TP, weights_T = draw(4, 200)
    merged = merge(operator, vectors_TP, weights_T)
    assert merged.any()
    assert torch.equal(streamed(operator, vectors_TP, weights_T, tile_for(4), 17), merged)
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python({"name": name, "unknown_parameter": 1})
