"""Validation losses: the evaluator against full logits, one example at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyshot import loss_gap
from manyshot.errors import DataError
from manyshot.loss_gap import (
    IGNORED,
    ValidationLoss,
    counted_logits,
    make_batches,
    mean_loss,
    pad_right,
    token_sums,
)
from manyshot.models import ModelState, Placement, load_model, quiet_transformers
from manyshot.seeding import make_generator
from manyshot.tasks import Encoded

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    with quiet_transformers():
        return load_model(ModelState(base_folder), Placement("cpu", torch.float32))


def negative_log_likelihoods(model: Any, encoded: Sequence[Encoded], **options: Any) -> list[float]:
    return [one.nats for one in token_sums(model, encoded, **options)]


def validation_loss(model: Any, encoded: Sequence[Encoded], **options: Any) -> ValidationLoss:
    return mean_loss(encoded, token_sums(model, encoded, **options))


def draw_examples(lengths: Sequence[tuple[int, int]]) -> list[Encoded]:
    """(length, context) -> examples with drawn tokens."""
    examples = []
    for i, (length, context) in enumerate(lengths):
        ids = torch.randint(2, 40, (length,), generator=make_generator("loss_gap", i)).tolist()
        examples.append(Encoded(i, tuple(ids), context, truncated=i == 0))
    return examples


EXAMPLES = draw_examples([(9, 5), (3, 1), (20, 19), (9, 1), (14, 7), (2, 1), (6, 3)])


def naive_sum(model: Any, example: Encoded) -> float:
    """Σ −log p over the counted tokens, from the full logits of this example alone, in float64."""
    with torch.no_grad():
        logits_LV = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    total = 0.0
    for position in range(example.num_context, len(example.input_ids)):
        scores = logits_LV[position - 1]
        total += float(torch.logsumexp(scores, 0) - scores[example.input_ids[position]])
    return total


# ---- the evaluator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_negative_log_likelihoods_equal_the_full_logits_of_each_example_alone(model: Any, batch_size: int) -> None:
    expected = [naive_sum(model, example) for example in EXAMPLES]
    found = negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=batch_size, where="here")
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(found)) == len(EXAMPLES)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_token_sums_count_where_the_true_token_is_the_most_likely(model: Any, batch_size: int) -> None:
    examples = []
    for example in EXAMPLES:  # every other counted token becomes the model's own choice
        ids = list(example.input_ids)
        for position in range(example.num_context, len(ids), 2):
            with torch.no_grad():
                ids[position] = int(model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].argmax())
        examples.append(replace(example, input_ids=tuple(ids)))
    expected = []
    for example in examples:
        with torch.no_grad():
            best = model(input_ids=torch.tensor([example.input_ids])).logits[0].argmax(-1).tolist()
        counted = range(example.num_context, len(example.input_ids))
        expected.append(sum(best[i - 1] == example.input_ids[i] for i in counted))
    found = [one.num_correct for one in token_sums(model, examples, pad_id=0, batch_size=batch_size, where="here")]
    assert found == expected
    assert all(2 * hits >= example.num_counted for hits, example in zip(found, examples, strict=True))
    assert any(hits < example.num_counted for hits, example in zip(found, examples, strict=True))


def test_token_sums_refuse_nan_and_name_the_row(base_folder: Path) -> None:
    model = load_model(ModelState(base_folder), Placement("cpu", torch.float32))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"^here, row 1: the loss is nan"):
        token_sums(model, EXAMPLES[:1], pad_id=0, batch_size=4, where="here")


def test_negative_log_likelihoods_do_not_depend_on_padding_or_order(model: Any) -> None:
    expected = negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=3, where="here")
    other_pad = negative_log_likelihoods(model, EXAMPLES, pad_id=17, batch_size=3, where="here")
    turned = negative_log_likelihoods(model, EXAMPLES[::-1], pad_id=0, batch_size=3, where="here")[::-1]
    assert other_pad == expected
    assert turned == pytest.approx(expected, rel=1e-5)


def test_validation_loss_is_weighted_by_tokens_not_examples(model: Any) -> None:
    found = validation_loss(model, EXAMPLES, pad_id=0, batch_size=4, where="here")
    counted = [len(e.input_ids) - e.num_context for e in EXAMPLES]
    assert found.num_tokens == sum(counted) == 26
    assert found.num_examples == 7
    assert found.truncated_share == pytest.approx(1 / 7)
    assert found.loss == pytest.approx(sum(naive_sum(model, e) for e in EXAMPLES) / 26, rel=1e-5)
    assert found.to_json() == {
        "loss": found.loss,
        "num_tokens": 26,
        "num_examples": 7,
        "truncated_share": found.truncated_share,
    }


def test_validation_loss_of_a_uniform_model_is_the_log_of_the_vocabulary(base_folder: Path) -> None:
    model = load_model(ModelState(base_folder), Placement("cpu", torch.float32))
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = validation_loss(model, EXAMPLES, pad_id=0, batch_size=4, where="here")
    assert found.loss == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)


def test_negative_log_likelihoods_name_the_row_of_a_nan_and_restore_training_mode(base_folder: Path) -> None:
    model = load_model(ModelState(base_folder), Placement("cpu", torch.float32))
    model.train()
    negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=2, where="here")
    assert model.training
    with torch.no_grad():
        model.get_input_embeddings().weight[41] = torch.nan
    broken = [*EXAMPLES[:2], Encoded(11, (5, 41, 7), 1, truncated=False)]
    # embeddings are tied, so a NaN row of the vocabulary reaches every logit; the longest example comes first
    with pytest.raises(DataError, match=r"round 2, task 'math', row 1: the loss is nan"):
        negative_log_likelihoods(model, broken, pad_id=0, batch_size=1, where="round 2, task 'math'")
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_negative_log_likelihoods_leave_the_model_and_global_randomness_unchanged(model: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    one = negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=2, where="here")
    assert one == negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=2, where="here")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_negative_log_likelihoods_tick_once_per_batch(model: Any) -> None:
    ticks: list[int] = []
    negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=3, where="here", tick=ticks.append)
    assert ticks == [3, 3, 1]


def test_counted_logits_are_those_of_the_full_forward_and_only_those(model: Any) -> None:
    batch = pad_right(EXAMPLES[:3], pad_id=0)
    head = model.get_output_embeddings()
    seen: list[tuple[int, ...]] = []
    watch = head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        logits_NV, labels_N, rows_N = counted_logits(model, head, batch)
        watch.remove()
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert seen == [(1, 7, model.config.vocab_size)]  # 4 + 2 + 1 counted tokens, nothing else went through the head
    assert rows_N.tolist() == [0] * 4 + [1] * 2 + [2]
    expected = torch.cat([full[0, 4:8], full[1, 0:2], full[2, 18:19]])
    torch.testing.assert_close(logits_NV, expected, rtol=1e-5, atol=1e-5)
    wanted = [*EXAMPLES[0].input_ids[5:], *EXAMPLES[1].input_ids[1:], *EXAMPLES[2].input_ids[19:]]
    assert labels_N.tolist() == wanted


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_pad_right_by_hand() -> None:
    batch = pad_right([Encoded(0, (5, 6, 7), 2, False), Encoded(1, (8, 9), 1, False)], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]


def test_make_batches_by_hand() -> None:
    assert list(make_batches(EXAMPLES, 3)) == [[2, 4, 0], [3, 6, 1], [5]]  # longest first, ties in order


@quick
@given(st.lists(st.tuples(st.integers(2, 60), st.integers(1, 60)), max_size=20), st.integers(1, 6))
def test_make_batches_hold_every_example_once_within_both_limits(sizes: list[tuple[int, int]], batch_size: int) -> None:
    examples = [Encoded(i, (1,) * length, min(context, length - 1), False) for i, (length, context) in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_gap, "MAX_LOGIT_POSITIONS", 40)
        batches = list(make_batches(examples, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) == 1 or sum(examples[i].num_counted for i in batch) <= 40


def test_make_batches_of_few_logits_give_the_same_losses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=7, where="here")
    monkeypatch.setattr(loss_gap, "MAX_LOGIT_POSITIONS", 8)
    assert negative_log_likelihoods(model, EXAMPLES, pad_id=0, batch_size=7, where="here") == pytest.approx(whole, 1e-5)


# ---- gaps and weights ------------------------------------------------------------------------------------------------
