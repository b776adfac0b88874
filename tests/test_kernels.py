"""Kernels: the compiled ones and those in torch give the same bits, on shapes and numbers that are hard to get right.

Shapes: T = tasks, P = entries of a tile, N = rows, R = rank, I = columns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from manyshot import kernels
from manyshot.kernels import Operation, _torch
from manyshot.seeding import make_generator

needs_compiled = pytest.mark.skipif(
    not kernels.compiled(), reason="the kernels are not compiled, so torch is all there is"
)
# around the lengths at which the compiled loops change: 64 and 512 entries at once, 4096 counted at once
SIZES = [0, 1, 2, 63, 64, 65, 511, 512, 513, 1024, 4095, 4097]
every_size = pytest.mark.parametrize("size", SIZES)
quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)

# zeros, ones, a tie for bfloat16, the smallest denormal and normal, the largest number
HARD = [0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-45, -1e-45, 2.0**-126, 1e-39, 3.4028235e38, -3.4028235e38]
NONFINITE = [float("inf"), float("-inf"), float("nan")]


def bits(tensor: torch.Tensor) -> list[int]:
    views = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return tensor.contiguous().view(views.get(tensor.dtype, tensor.dtype)).tolist()  # type: ignore[no-any-return]


def draw(*shape: int, seed: int = 0, hard: bool = True) -> torch.Tensor:
    """Normal numbers on a coarse grid (many equal ones); with `hard`, one in five from HARD."""
    generator = make_generator("test_kernels", *shape, seed)
    numbers = torch.randn(shape, generator=generator).mul(8).round() / 8
    if hard:
        chosen = torch.tensor(HARD)[torch.randint(len(HARD), shape, generator=generator)]
        numbers = torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, numbers)
    return numbers


def rows_of(tasks: int, size: int, *, seed: int = 0, hard: bool = True) -> torch.Tensor:
    """(T, P) that is a window of longer rows, as a tile of a cache is."""
    return draw(tasks, size + 7, seed=seed, hard=hard)[:, 3 : size + 3]


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """in_torch(function, …): what it gives without the compiled kernels."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels._native, "CALL", {})
            assert not kernels.compiled()
            return function(*arguments, **options)

    return call


InTorch = Callable[..., Any]


def same(in_torch: InTorch, function: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
    """The result of the compiled kernel, equal in every bit to torch's; the inputs are as before."""
    tensors = [(each, each.clone()) for each in arguments if isinstance(each, torch.Tensor)]
    found = function(*arguments, **options)
    expected = in_torch(function, *arguments, **options)
    assert found.dtype == expected.dtype
    assert bits(found) == bits(expected)
    assert all(bits(tensor) == bits(before) for tensor, before in tensors)
    return found


def written(function: Callable[..., Any], *arguments: torch.Tensor, dtype: torch.dtype, size: int) -> tuple[Any, Any]:
    """What a kernel with an output answers and writes; what lies around the output stays."""
    around = torch.full((size + 4,), 7.0).to(dtype)
    answer = function(*arguments, around[2 : size + 2])
    assert around[[0, 1, -2, -1]].tolist() == [7.0] * 4
    return answer, bits(around[2 : size + 2])


# ---- stored types ----------------------------------------------------------------------------------------------------


@needs_compiled
@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_widen_and_subtract_same_bits(size: int, dtype: torch.dtype, in_torch: InTorch) -> None:
    stored_P, before_P = draw(size).clamp(-60_000, 60_000).to(dtype), draw(size, seed=1)
    for function, arguments in ((kernels.widen, (stored_P,)), (kernels.subtract, (stored_P, before_P))):
        found = written(function, *arguments, dtype=torch.float32, size=size)
        assert found == in_torch(written, function, *arguments, dtype=torch.float32, size=size)
        assert found[0] is False


@needs_compiled
@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_add_to_same_bits(size: int, dtype: torch.dtype, in_torch: InTorch) -> None:
    before_P = draw(size)
    # beside a tie: half a unit in the last place of bfloat16, give or take
    merged_P = torch.where(torch.arange(size) % 2 == 0, draw(size, seed=1, hard=False), before_P * 2.0**-9)
    found = written(kernels.add_to, before_P, merged_P, dtype=dtype, size=size)
    assert found == in_torch(written, kernels.add_to, before_P, merged_P, dtype=dtype, size=size)


@needs_compiled
def test_kernels_add_to_rounds_every_bfloat16_tie_to_even(in_torch: InTorch) -> None:
    # all 2¹⁶ bfloat16 numbers, and what lies just below, on and just above the middle to the next one
    words = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = torch.from_numpy((words | low).view(np.float32))
        numbers = numbers[numbers.isfinite()]
        zeros = torch.full_like(numbers, -0.0)  # x + −0.0 is x, also for −0.0
        found = written(kernels.add_to, numbers, zeros, dtype=torch.bfloat16, size=len(numbers))
        assert found == in_torch(written, kernels.add_to, numbers, zeros, dtype=torch.bfloat16, size=len(numbers))
        assert found[1] == bits(numbers.to(torch.bfloat16))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("position", [0, 1, 511, 512, 599])
def test_kernels_flag_nan_and_inf_wherever_they_are(
    position: int, value: float, compiled: bool, in_torch: InTorch
) -> None:
    if compiled and not kernels.compiled():
        pytest.skip("the kernels are not compiled")
    call = in_torch if not compiled else lambda function, *arguments: function(*arguments)
    zeros, out = torch.zeros(600), torch.empty(600)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = torch.zeros(600, dtype=dtype)
        assert call(kernels.widen, stored, out) is False
        stored[position] = value
        assert call(kernels.widen, stored, out) is True
        assert call(kernels.subtract, stored, zeros, out) is True
        assert call(kernels.add_to, stored.float(), zeros, torch.empty(600, dtype=dtype)) is True
        assert call(kernels.add_to, zeros, stored.float(), torch.empty(600, dtype=dtype)) is True
    # what is subtracted has been checked before
    assert call(kernels.subtract, zeros, torch.full((600,), 3e38), out) is False


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    # the middle between the largest number of a type and 2¹²⁸ (or 2¹⁶) rounds up to Inf
    [
        (torch.bfloat16, (2 - 2**-8) * 2.0**127 - 2.0**104, (2 - 2**-8) * 2.0**127),
        (torch.float16, 65519.0, 65520.0),
        (torch.float32, 3.4028235e38, None),
    ],
)
def test_kernels_flag_overflow_of_the_stored_type(
    dtype: torch.dtype, largest: float, too_large: float | None, compiled: bool, in_torch: InTorch
) -> None:
    if compiled and not kernels.compiled():
        pytest.skip("the kernels are not compiled")
    call = in_torch if not compiled else lambda function, *arguments: function(*arguments)
    out = torch.empty(1, dtype=dtype)
    for sign in (1.0, -1.0):
        assert call(kernels.add_to, torch.tensor([sign * largest]), torch.zeros(1), out) is False
        assert out.isfinite().all()
        before, merged = (sign * largest,) * 2 if too_large is None else (sign * too_large, 0.0)
        assert call(kernels.add_to, torch.tensor([before]), torch.tensor([merged]), out) is True


# ---- low-rank factors ------------------------------------------------------------------------------------------------


@needs_compiled
@quick
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 140), st.booleans(), st.booleans(), st.booleans(), st.data()
)
def test_kernels_low_rank_same_bits_for_any_layout_and_span(
    rows: int, rank: int, columns: int, b_turned: bool, a_turned: bool, a_wide: bool, data: st.DataObject
) -> None:
    b_NR = draw(rank, rows, hard=False).T if b_turned else draw(rows, rank, hard=False)
    a_RI = draw(columns, rank, seed=1, hard=False).T if a_turned else draw(rank, columns, seed=1, hard=False)
    if a_wide:  # a window of a wider matrix
        a_RI = draw(rank, columns + 5, seed=1, hard=False)[:, 2 : columns + 2]
    start = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(0, rows * columns - start))
    found, expected = torch.full((count + 2,), 7.0), torch.full((count + 2,), 7.0)
    kernels.low_rank(b_NR, a_RI, 0.7, start, found[1 : count + 1])
    _torch.low_rank(b_NR, a_RI, 0.7, start, expected[1 : count + 1])
    assert bits(found) == bits(expected)
    assert found[[0, -1]].tolist() == [7.0, 7.0]
    exact = (b_NR.double() @ a_RI.double() * 0.7).reshape(-1)[start : start + count]
    torch.testing.assert_close(found[1 : count + 1].double(), exact, rtol=1e-5, atol=1e-5)


# ---- operators -------------------------------------------------------------------------------------------------------


@needs_compiled
@every_size
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_kernels_combine_same_bits(tasks: int, size: int, in_torch: InTorch) -> None:
    vectors_TP = rows_of(tasks, size)
    # no weight above one: sums of the largest number would be Inf, and Inf − Inf has no certain sign
    for weights_T in (torch.full((tasks,), 1 / tasks), torch.linspace(0.0, 1.0, tasks) / tasks):
        same(in_torch, kernels.weighted_sum, vectors_TP, weights_T, 0.3)
        same(in_torch, kernels.elect_and_average, vectors_TP, weights_T, 0.3)
        for threshold, agreement in ((0.0, 1), (0.3, 2), (1.0, tasks)):
            same(in_torch, kernels.consensus, vectors_TP, weights_T, threshold, agreement, 0.3)
            # votes that are not weighted are on sums that are not either
            plain_TP, how = vectors_TP.clamp(-8, 8), {"unweighted": True}
            same(in_torch, kernels.consensus, plain_TP, weights_T, threshold, agreement, 0.3, **how)
            same(in_torch, kernels.consensus, vectors_TP, weights_T, threshold, agreement, 0.3, soft=True)
            same(in_torch, kernels.consensus, plain_TP, weights_T, threshold, agreement, 0.3, soft=True, **how)


@needs_compiled
def test_kernels_combine_same_bits_with_negative_and_zero_weights(in_torch: InTorch) -> None:
    vectors_TP = rows_of(3, 700, hard=False)
    for weights in ([1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]):
        weights_T = torch.tensor(weights)
        for function, more in (
            (kernels.weighted_sum, (1.0,)),
            (kernels.elect_and_average, (1.0,)),
            (kernels.consensus, (0.4, 2, 1.0)),
        ):
            assert same(in_torch, function, vectors_TP, weights_T, *more).isfinite().all()


def test_kernels_agree_with_the_reference_on_denormals_and_negative_zeros() -> None:
    tiny = 1e-45
    rows = [[-0.0, tiny, -tiny, 5 * tiny, 1e-38], [-0.0, -tiny, -tiny, 0.0, -1e-38]]
    vectors_TP, weights_T = torch.tensor(rows), torch.ones(2)
    for found, expected in (
        (kernels.weighted_sum(vectors_TP, weights_T), reference.mean(rows, [1.0, 1.0])),
        (kernels.elect_and_average(vectors_TP, weights_T, 1.0), reference.elect(rows, [1.0, 1.0], 1.0)),
        (kernels.consensus(vectors_TP, weights_T, 0.5, 2, 1.0), reference.metis(rows, [1.0, 1.0], mask_threshold=0.5)),
    ):
        assert bits(found) == np.array(expected, dtype=np.float32).view(np.int32).tolist()


@needs_compiled
@quick
@given(
    st.lists(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    st.floats(0, 2),
    st.integers(1, 5),
    st.sampled_from(["sum", "consensus", "elect"]),
    st.booleans(),
    st.booleans(),
)
def test_kernels_apply_same_bits_everywhere(
    rows: list[list[float]],
    weights: list[float],
    threshold: float,
    agreement: int,
    combine: Any,
    unweighted: bool,
    soft: bool,
) -> None:
    vectors_TP, weights_T = torch.tensor(rows), torch.tensor(weights[: len(rows)])
    how = {"unweighted": unweighted, "soft": soft}
    operation = Operation(combine, 0.9, threshold=threshold, agreement=agreement, **how)
    functions = {
        "sum": lambda: _torch.weighted_sum(vectors_TP, weights_T, 0.9),
        "consensus": lambda: _torch.consensus(vectors_TP, weights_T, threshold, agreement, 0.9, **how),
        "elect": lambda: _torch.elect_and_average(vectors_TP, weights_T, 0.9),
    }
    assert bits(kernels.apply(operation, vectors_TP, weights_T)) == bits(functions[combine]())


@needs_compiled
@pytest.mark.parametrize("combine", ["sum", "consensus", "elect"])
@pytest.mark.parametrize("prepare", ["plain", "drop", "trim"])
def test_kernels_apply_same_bits_for_every_pair_of_steps(prepare: Any, combine: Any, in_torch: InTorch) -> None:
    vectors_TP, weights_T = rows_of(3, 1100), torch.full((3,), 0.25)
    operation = Operation(combine, 0.9, prepare, density=0.4, rescale=0.4 if prepare == "drop" else 1.0)
    if prepare == "drop":  # the largest number divided by 0.4 would be Inf
        vectors_TP = vectors_TP.clamp(-8, 8)
    merged = same(
        *(in_torch, kernels.apply, operation, vectors_TP, weights_T),
        **{"keys": (1, 2**64 - 1, 2**63 + 5), "offset": 2**32 - 600},
        **{"thresholds": (0x3F800000, 0, 1), "allowed": (50, 0, 3)},
    )
    assert merged.any()


def test_kernels_leave_to_torch_what_does_not_lie_as_they_read_it() -> None:
    rows_PT, weights_T = draw(100, 3, hard=False), torch.tensor([0.5, 0.25, 0.25])
    rows_TP, words = rows_PT.T.contiguous(), (0x3F800000,) * 3
    expected = bits(kernels.weighted_sum(rows_TP, weights_T))
    # columns of a (P, T) matrix; weights of another type; weights that are not side by side
    assert bits(kernels.weighted_sum(rows_PT.T, weights_T)) == expected
    assert bits(kernels.weighted_sum(rows_TP, weights_T.double())) == expected
    assert bits(kernels.weighted_sum(rows_TP, torch.stack([weights_T, weights_T], dim=1)[:, 0])) == expected
    assert bits(kernels.trim(rows_PT.T, words, (1,) * 3)) == bits(kernels.trim(rows_TP, words, (1,) * 3))
    assert bits(kernels.drop(rows_PT.T, (1, 2, 3), 0, 0.5, 0.5)) == bits(kernels.drop(rows_TP, (1, 2, 3), 0, 0.5, 0.5))
    kept_P = rows_PT[:, 0]
    assert kernels.tally(rows_PT.T, kept_P, pairs=False)[:2] == kernels.tally(rows_TP, kept_P.clone(), pairs=False)[:2]
    wide_P = kernels.weighted_sum(rows_TP.double(), weights_T.double())
    torch.testing.assert_close(wide_P.float(), kernels.weighted_sum(rows_TP, weights_T))


# ---- draws -----------------------------------------------------------------------------------------------------------

KEYS = (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**64 - 1)


@needs_compiled
@every_size
@pytest.mark.parametrize("offset", [0, 5, 2**31 - 100, 2**32 - 300, 2**32, 7 * 2**32 - 1, 2**40 + 3])
def test_kernels_drop_same_bits(size: int, offset: int, in_torch: InTorch) -> None:
    vectors_TP = rows_of(len(KEYS), size).clamp(-8, 8)
    for density, rescale in ((1e-12, 1.0), (0.2, 0.2), (0.7, 1.0), (1.0, 1.0)):
        dropped = same(in_torch, kernels.drop, vectors_TP, KEYS, offset, density, rescale)
        assert dropped.is_contiguous()
    assert bits(dropped) == bits(vectors_TP)  # density 1 drops nothing


@pytest.mark.parametrize("key", KEYS)
def test_kernels_drop_keeps_what_is_drawn_below_the_density(key: int) -> None:
    ones, offset = torch.ones(1, 200), 2**32 - 100
    for density in (0.1, 0.5, 0.99):
        kept = kernels.drop(ones, (key,), offset, density, 1.0)[0]
        assert kept.tolist() == [
            float(reference.draw(key, offset + i) < kernels.draw_limit(density)) for i in range(200)
        ]


@pytest.mark.parametrize("key", KEYS)
def test_kernels_uniform_is_the_draw_with_24_bits(key: int) -> None:
    for offset in (0, 3 * 2**32 - 50):
        found = kernels.uniform(key, offset, 100)
        assert found.tolist() == [(reference.draw(key, offset + i) >> 8) / 2**24 for i in range(100)]
        assert kernels.uniform(key, offset + 40, 60).tolist() == found[40:].tolist()
    assert kernels.uniform(key, 0, 0).shape == (0,)
    many = kernels.uniform(key, 0, 10_000)
    assert 0 <= float(many.min()) <= float(many.max()) < 1


def test_kernels_finaliser_is_the_published_one() -> None:
    # MurmurHash3's fmix32: fixed point 0, and values that its authors' code gives
    assert reference.finalise(0) == 0
    assert reference.finalise(1) == 0x514E28B7
    assert _torch._mix(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]


def test_kernels_draw_limit_covers_both_ends() -> None:
    assert kernels.draw_limit(1.0) == 2**32
    assert kernels.draw_limit(0.5) == 2**31
    assert kernels.draw_limit(1e-12) == 0


# ---- trimming --------------------------------------------------------------------------------------------------------


def with_ties(tasks: int, size: int, levels: int) -> torch.Tensor:
    """Rows with few magnitudes, of both signs; row 1, where there is one, is all one number."""
    generator = make_generator("ties", tasks, size, levels)
    magnitudes = 1 + torch.randint(levels, (tasks, size + 3), generator=generator) * 2.0**-23
    rows = magnitudes * torch.where(torch.rand(tasks, size + 3, generator=generator) < 0.5, 1.0, -1.0)
    rows[1:2] = 1.0
    return rows[:, 1 : size + 1]


ROWS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(rows_of, id="hard"),
        pytest.param(lambda tasks, size: with_ties(tasks, size, 2), id="two magnitudes"),
        pytest.param(lambda tasks, size: with_ties(tasks, size, 40), id="forty magnitudes"),
    ],
)


@needs_compiled
@every_size
@ROWS
def test_kernels_histograms_and_counts_same_numbers(make: Any, size: int, in_torch: InTorch) -> None:
    vectors_TP = make(3, size)
    magnitudes = vectors_TP.contiguous().view(torch.int32) & 0x7FFFFFFF
    highs, thresholds = (0x3F80, 0x3F80, 0), (0x3F800000, 0x3F800001, 0)

    def counted(function: Callable[..., None], shape: tuple[int, ...], *arguments: Any) -> torch.Tensor:
        counts = torch.ones(shape, dtype=torch.int64)  # they are added to what is there
        function(vectors_TP, *arguments, counts)
        return counts - 1

    high = counted(kernels.histogram_high, (3, 1 << 15))
    assert torch.equal(high, in_torch(counted, kernels.histogram_high, (3, 1 << 15)))
    assert high.sum(1).tolist() == [size] * 3
    low = counted(kernels.histogram_low, (3, 1 << 16), highs)
    assert torch.equal(low, in_torch(counted, kernels.histogram_low, (3, 1 << 16), highs))
    assert low.sum(1).tolist() == [int((row >> 16 == each).sum()) for row, each in zip(magnitudes, highs, strict=True)]
    equal = counted(kernels.count_equal, (3,), thresholds)
    assert torch.equal(equal, in_torch(counted, kernels.count_equal, (3,), thresholds))
    assert equal.tolist() == [int((row == each).sum()) for row, each in zip(magnitudes, thresholds, strict=True)]


@needs_compiled
@every_size
@ROWS
def test_kernels_trim_same_bits(make: Any, size: int, in_torch: InTorch) -> None:
    vectors_TP = make(4, size)
    for thresholds in ((0x3F800000, 0x3F800001, 0x3F800000, 0), (0, 1, 0x7F7FFFFF, 0x3F800027)):
        for allowed in ((0, 1, 2, 3), (-5, size, 511, 512), (513, size // 2, size + 9, 0)):
            trimmed = same(in_torch, kernels.trim, vectors_TP, thresholds, allowed)
            for row, out, threshold, left in zip(vectors_TP, trimmed, thresholds, allowed, strict=True):
                magnitudes = row.contiguous().view(torch.int32) & 0x7FFFFFFF
                equal = (magnitudes == threshold).nonzero().flatten()[: max(0, left)]
                keep = magnitudes > threshold
                keep[equal] = True
                assert bits(out) == bits(torch.where(keep, row, 0.0))


# ---- sums for reports ------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("pairs", [True, False])
def test_kernels_tally_counts_exactly_and_sums_closely(size: int, pairs: bool, in_torch: InTorch) -> None:
    vectors_TP = rows_of(3, size, hard=False)
    vectors_TP[:, ::3] = torch.tensor([0.0, -0.0, 0.0])[:, None]  # entries that no task changed
    kept_P = torch.where(torch.arange(size) % 2 == 0, vectors_TP[0], -0.0)
    expected_TT = vectors_TP.double() @ vectors_TP.double().T
    expected_TT = expected_TT.tril() if pairs else expected_TT.diag().diag()
    for changed, kept, gram in (
        kernels.tally(vectors_TP, kept_P, pairs=pairs),
        in_torch(kernels.tally, vectors_TP, kept_P, pairs=pairs),
    ):
        assert changed == sum(any(column) for column in vectors_TP.T.tolist())
        assert kept == int(kept_P.count_nonzero())
        torch.testing.assert_close(
            torch.tensor(gram, dtype=torch.float64).reshape(3, 3), expected_TT, rtol=1e-5, atol=1e-3
        )


@every_size
def test_kernels_square_sum_is_close_to_float64(size: int, in_torch: InTorch) -> None:
    vector_P = rows_of(1, size, hard=False)[0]
    expected = float(vector_P.double().square().sum())
    assert kernels.square_sum(vector_P) == pytest.approx(expected, rel=1e-5)
    assert in_torch(kernels.square_sum, vector_P) == pytest.approx(expected, rel=1e-5)


@every_size
def test_kernels_square_bins_same_counts_and_exact(size: int, in_torch: InTorch) -> None:
    """Σ (low + 2²⁴ high) · 2^(2 max(e, 1) − 300) over the exponents e; counts are added to what is there."""
    vector_P = rows_of(1, size)[0].contiguous()
    for vector in (vector_P, torch.cat([vector_P, torch.tensor(NONFINITE)])):
        counts = torch.ones(256, 2, dtype=torch.int64)
        kernels.square_bins(vector, counts)
        again = torch.ones(256, 2, dtype=torch.int64)
        in_torch(kernels.square_bins, vector, again)
        assert torch.equal(counts, again)
        bins = [
            (low - 1 + (high - 1 << 24)) * Fraction(4) ** (max(e, 1) - 150)
            for e, (low, high) in enumerate(counts.tolist())
        ]
        assert sum(bins[:255]) == sum(Fraction(value) ** 2 for value in vector_P.double().tolist())
        assert (bins[255] != 0) == (len(vector) > size)


# ---- which ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"), [("torch", False), pytest.param("", True, marks=needs_compiled)], ids=["torch", "unset"]
)
def test_kernels_environment_variable_switches_the_library_off(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYSHOT_KERNELS", value)
    # a second copy of the module, loaded as at the first import
    spec = importlib.util.spec_from_file_location("native_again", kernels._native.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert (again.LIBRARY is not None) == expected


@pytest.mark.gpu
def test_kernels_on_a_gpu_same_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    vectors_TP, weights_T = rows_of(3, 4097).clamp(-8, 8).contiguous(), torch.tensor([0.5, 0.3, 0.2])
    for prepare in ("plain", "drop", "trim"):
        for combine in ("sum", "consensus", "elect"):
            operation = Operation(combine, 0.9, prepare, density=0.3, rescale=0.3, threshold=0.3, agreement=2)
            places = {"keys": KEYS[:3], "offset": 2**32 - 600, "thresholds": (0x3F800000,) * 3, "allowed": (50,) * 3}
            for how in range(4):
                operation = replace(operation, unweighted=how % 2 == 1, soft=how > 1)
                found = kernels.apply(operation, vectors_TP.cuda(), weights_T.cuda(), **places).cpu()
                assert bits(found) == bits(kernels.apply(operation, vectors_TP, weights_T, **places))
