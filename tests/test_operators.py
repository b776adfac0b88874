"""Operators: hand-computed cases, agreement with reference.py, and the contract that every operator keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from manyshot.operators import OPERATORS, Mean, Metis, Operator
from manyshot.operators._masks import consensus_mask
from manyshot.seeding import make_generator

# the contract row of every operator: hyper-parameters that differ from the defaults
CONTRACT: dict[str, dict[str, Any]] = {
    "mean": {},
    "metis": {"temperature": 1.5, "mask_threshold": 0.7, "min_agreement": 3, "scaling": 0.9},
}
NAMES = sorted(CONTRACT)
quick = settings(deadline=None, database=None, derandomize=True, max_examples=40)
floats = st.floats(-8, 8, width=32)


def merge(operator: Operator, vectors: Any, weights: Any) -> torch.Tensor:
    vectors_TP = torch.as_tensor(vectors, dtype=torch.float32)
    return operator.merge(vectors_TP, torch.as_tensor(weights, dtype=torch.float32), make_generator(0))


def draw(num_tasks: int, num_entries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random task vectors on a coarse grid (so that equal sides of a mask happen) and weights that sum to 1."""
    generator = make_generator("test_operators", num_tasks, seed)
    vectors_TP = torch.randn(num_tasks, num_entries, generator=generator).mul(4).round() / 4
    weights_T = torch.rand(num_tasks, generator=generator) + 0.1
    return vectors_TP, weights_T / weights_T.sum()


# ---- every operator --------------------------------------------------------------------------------------------------


def test_operators_table_has_a_contract_row_and_a_reference_for_each() -> None:
    assert set(OPERATORS) == set(CONTRACT) == set(reference.REFERENCES)
    assert all(OPERATORS[name]().name == name for name in OPERATORS)


def test_operators_are_frozen_and_refuse_unknown_hyper_parameters() -> None:
    for name, kind in OPERATORS.items():
        operator = kind(**CONTRACT[name])
        with pytest.raises(dataclasses.FrozenInstanceError):
            operator.name = "other"  # type: ignore[misc]
        with pytest.raises(TypeError, match="unknown_parameter"):
            kind(unknown_parameter=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
@pytest.mark.parametrize("name", NAMES)
def test_operators_agree_with_the_reference_bit_for_bit(name: str, num_tasks: int) -> None:
    vectors_TP, weights_T = draw(num_tasks, 400)
    for options in ({}, CONTRACT[name]):
        expected = reference.REFERENCES[name](vectors_TP.tolist(), weights_T.tolist(), **options)
        found = merge(OPERATORS[name](**options), vectors_TP, weights_T)
        assert found.dtype == torch.float32
        assert found.tolist() == [float(value) for value in expected]


@pytest.mark.parametrize("name", NAMES)
def test_operators_give_a_tile_the_bits_of_the_whole(name: str) -> None:
    vectors_TP, weights_T = draw(5, 1003)
    operator = OPERATORS[name](**CONTRACT[name])
    whole_P = merge(operator, vectors_TP, weights_T)
    for size in (1, 7, 64, 1000):
        parts = [merge(operator, tile_TP, weights_T) for tile_TP in vectors_TP.split(size, dim=1)]
        assert torch.equal(torch.cat(parts), whole_P), size


@pytest.mark.parametrize("name", NAMES)
def test_operators_leave_their_inputs_and_global_randomness_unchanged(name: str) -> None:
    vectors_TP, weights_T = draw(3, 50)
    before, weights_before, state = vectors_TP.clone(), weights_T.clone(), torch.get_rng_state()
    merge(OPERATORS[name](**CONTRACT[name]), vectors_TP, weights_T).add_(1)  # the result is not a view of an input
    assert torch.equal(vectors_TP, before)
    assert torch.equal(weights_T, weights_before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_operators_do_not_depend_on_task_order(name: str) -> None:
    generator = make_generator("order")
    vectors_TP = torch.randn(4, 300, generator=generator)
    weights_T = torch.tensor([0.1, 0.2, 0.3, 0.4])
    operator = OPERATORS[name](**CONTRACT[name])
    expected = merge(operator, vectors_TP, weights_T)
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        torch.testing.assert_close(merge(operator, vectors_TP[order], weights_T[order]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_operators_give_the_same_bits_twice(name: str) -> None:
    vectors_TP, weights_T = draw(3, 100)
    operator = OPERATORS[name](**CONTRACT[name])
    assert torch.equal(merge(operator, vectors_TP, weights_T), merge(operator, vectors_TP, weights_T))


def test_operators_base_class_cannot_merge() -> None:
    with pytest.raises(TypeError, match=r"Operator does not define merge\(\)"):
        merge(Operator(name="none"), [[1.0]], [1.0])


# ---- mean ------------------------------------------------------------------------------------------------------------


def test_mean_of_two_tasks_by_hand() -> None:
    assert merge(Mean(), [[1.0, -2.0, 4.0], [3.0, 2.0, 0.0]], [0.5, 0.5]).tolist() == [2.0, 0.0, 2.0]


def test_mean_of_one_task_with_weight_one_is_that_task() -> None:
    vectors_TP, _ = draw(1, 100)
    assert torch.equal(merge(Mean(), vectors_TP, [1.0]), vectors_TP[0])


# ---- metis -----------------------------------------------------------------------------------------------------------


def test_metis_mask_by_hand() -> None:
    # α = ½ for both, so w = v/2; δ = 0.5, k = 2: both must reach half of what the other one has
    vectors = [[4.0, 4.0, 4.0, 4.0, 0.0], [4.0, 2.0, 1.0, -4.0, 0.0]]
    #          V:  4    3    2.5   0    0
    # coordinate 1: w = (2, 1):   1 ≥ ½·2 holds with equality -> kept;   2: w = (2, ½): ½ ≥ 1 fails -> dropped
    # coordinate 3: w = (2, −2): both agree on magnitude, V = 0;         4: 0 ≥ 0 holds
    found = merge(Metis(mask_threshold=0.5, min_agreement=2), vectors, [0.5, 0.5])
    assert found.tolist() == [4.0, 3.0, 0.0, 0.0, 0.0]


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
def test_metis_threshold_zero_is_the_weighted_sum(num_tasks: int) -> None:
    vectors_TP, weights_T = draw(num_tasks, 200)
    masked = merge(Metis(mask_threshold=0.0, min_agreement=num_tasks), vectors_TP, weights_T)
    assert torch.equal(masked, merge(Mean(), vectors_TP, weights_T))


def test_metis_scaling_multiplies_what_is_kept() -> None:
    vectors_TP, weights_T = draw(3, 100)
    plain = merge(Metis(), vectors_TP, weights_T)
    assert 0 < int((plain != 0).sum()) < 100
    assert torch.equal(merge(Metis(scaling=0.5), vectors_TP, weights_T), plain * 0.5)


def test_metis_uses_the_weights_it_is_given() -> None:
    # α = (0.9, 0.1), v = (1, 9): w = (0.9, 0.9), V = 1.8; uniform weights would give 5
    assert merge(Metis(), [[1.0], [9.0]], [0.9, 0.1]).item() == pytest.approx(1.8)


def test_metis_at_round_chooses_the_value_of_the_round() -> None:
    operator = Metis(scaling=(1.0, 0.5, 0.25))
    assert [operator.at_round(r).scaling for r in (1, 2, 3)] == [1.0, 0.5, 0.25]
    assert operator.scaling == (1.0, 0.5, 0.25)
    single = Metis(scaling=0.5)
    assert single.at_round(7) is single


def test_metis_problems_name_a_wrong_number_of_values_and_an_agreement_out_of_reach() -> None:
    assert Metis().problems(num_tasks=2, rounds=5) == []
    assert Metis(scaling=(1.0, 0.5)).problems(3, 2) == []
    (field, text), (other, more) = Metis(scaling=(1.0, 0.5), min_agreement=4).problems(3, 5)
    assert (field, text) == ("scaling", "has 2 values for 5 rounds; give one, or one per round")
    assert other == "min_agreement"
    assert "4 tasks can never agree among 3" in more


@quick
@given(
    st.lists(st.lists(floats, min_size=3, max_size=3), min_size=2, max_size=4),
    st.floats(0, 2, width=32),
    st.integers(1, 4),
)
def test_metis_stricter_masks_keep_a_subset(rows: list[list[float]], threshold: float, min_agreement: int) -> None:
    vectors_TP = torch.tensor(rows)
    total_P = vectors_TP.sum(0)
    kept = consensus_mask(vectors_TP, total_P, threshold, min_agreement)
    assert not (consensus_mask(vectors_TP, total_P, threshold + 0.5, min_agreement) & ~kept).any()
    assert not (consensus_mask(vectors_TP, total_P, threshold, min_agreement + 1) & ~kept).any()
    assert consensus_mask(vectors_TP, total_P, 0.0, len(rows)).all()


@quick
@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=4), st.floats(0, 2), st.integers(1, 4))
def test_metis_agrees_with_the_reference_everywhere(rows: list[list[float]], threshold: float, k: int) -> None:
    weights = torch.full((len(rows),), 1 / len(rows))
    expected = reference.metis(rows, weights.tolist(), mask_threshold=threshold, min_agreement=k)
    found = merge(Metis(mask_threshold=threshold, min_agreement=k), rows, weights)
    assert found.tolist() == [float(value) for value in expected]
