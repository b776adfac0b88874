"""Scores: normalized performance by hand, greedy answers independent of the batch, choices by likelihood."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import MakeRecipe
from manyshot.evaluate import (
    MeasureJob,
    choose_answers,
    generate_answers,
    predict_tokens,
    run_measure,
    shown_examples,
)
from manyshot.metrics import METRICS
from manyshot.models import ModelState, Placement, load_model
from manyshot.normalize import multi_task_loss, normalized
from manyshot.progress import Progress
from manyshot.rundir import read_json
from manyshot.tasks import Example, Task, TaskSpec, encode_prompt, load_task


def scores(**values: float) -> dict[str, dict[str, float]]:
    return {task: {"score": value} for task, value in values.items()}


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    return load_model(ModelState(base_folder), Placement("cpu", torch.float32))


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(base_folder))


# ---- normalized ------------------------------------------------------------------------------------------------------


def test_normalized_by_hand() -> None:
    found = normalized(scores(a=0.4, b=0.9, c=0.3), scores(a=0.5, b=0.75, c=0.5), ("a", "b", "c"))
    assert found["tasks"] == pytest.approx({"a": 0.8, "b": 1.2, "c": 0.6})
    assert found["average"] == pytest.approx(2.6 / 3)
    assert (found["worst"], found["worst_task"]) == (pytest.approx(0.6), "c")
    assert found["drop"] == pytest.approx(2.6 / 3 - 0.6)


def test_normalized_keeps_a_task_out_whose_expert_scores_zero() -> None:
    found = normalized(scores(a=0.4, b=0.9), scores(a=0.5, b=0.0), ("a", "b"))
    assert found == {
        "tasks": {"a": pytest.approx(0.8), "b": None},
        "average": pytest.approx(0.8),
        "worst": pytest.approx(0.8),
        "worst_task": "a",
        "drop": pytest.approx(0.0),
    }


def test_normalized_without_any_ratio_is_null() -> None:
    found = normalized(scores(a=0.4), scores(a=0.0), ("a",))
    assert found == {"tasks": {"a": None}, "average": None, "worst": None, "worst_task": None, "drop": None}


def test_normalized_of_a_failed_task_is_zero_and_the_worst() -> None:
    found = normalized(scores(a=0.5, b=0.0), scores(a=0.5, b=0.5), ("a", "b"))
    assert (found["worst"], found["worst_task"], found["drop"]) == (0.0, "b", 0.5)


def test_normalized_takes_the_first_task_of_the_recipe_among_equals() -> None:
    for order in (("a", "b"), ("b", "a")):
        assert normalized(scores(a=0.5, b=0.5), scores(a=1, b=1), order)["worst_task"] == order[0]


def test_multi_task_loss_is_the_mean_over_tasks_not_tokens() -> None:
    losses = {"a": {"loss": 1.0, "num_tokens": 1000}, "b": {"loss": 3.0, "num_tokens": 1}}
    assert multi_task_loss(losses) == 2.0


# ---- answers ---------------------------------------------------------------------------------------------------------


def make_task(examples: tuple[Example, ...], **spec: Any) -> Task:
    return Task("words", TaskSpec(data="x", **spec), (), (), examples, {})


PROMPTS = ("a", "a b c d e f", "b c", "yes no yes", "1 2 3 4", "z")


def test_generate_answers_do_not_depend_on_the_batch(model: Any, tokenizer: Any, make_recipe: MakeRecipe) -> None:
    task = make_task(tuple(Example(i, prompt, "") for i, prompt in enumerate(PROMPTS)))
    ticks: list[int] = []
    alone = generate_answers(model, tokenizer, task, make_recipe("evaluation.batch_size=1"))
    together = generate_answers(model, tokenizer, task, make_recipe("evaluation.batch_size=4"), ticks.append)
    assert together == alone
    assert ticks == [4, 2]
    assert len(set(alone)) > 1


def test_generate_answers_are_greedy(model: Any, tokenizer: Any, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("evaluation.max_new_tokens=3")
    task = make_task((Example(0, "a b", ""),))
    ids = encode_prompt(task.test[0], tokenizer, task.spec, "here")
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 3 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert generate_answers(model, tokenizer, task, recipe) == [tokenizer.decode(ids[start:], skip_special_tokens=True)]


def test_generate_answers_stop_at_the_tasks_own_limit(model: Any, tokenizer: Any, make_recipe: MakeRecipe) -> None:
    examples = tuple(Example(i, prompt, "") for i, prompt in enumerate(PROMPTS))
    long = generate_answers(model, tokenizer, make_task(examples, max_new_tokens=6), make_recipe())
    short = generate_answers(model, tokenizer, make_task(examples, max_new_tokens=1), make_recipe())
    assert max(len(text.split()) for text in long) > 1
    assert max(len(text.split()) for text in short) == 1
    for one, other in zip(short, long, strict=True):
        assert other.startswith(one)


def test_choose_answers_take_the_most_likely_choice(model: Any, tokenizer: Any, make_recipe: MakeRecipe) -> None:
    choices = ("c", "d", "e f", "yes")
    task = make_task(tuple(Example(i, prompt, "c", choices=choices, answer=0) for i, prompt in enumerate(PROMPTS)))
    expected = []
    for example in task.test:
        prompt = encode_prompt(example, tokenizer, task.spec, "here")
        sums = []
        for choice in choices:
            ids = [*prompt, *tokenizer.encode(choice), tokenizer.eos_token_id]  # the template's <end>
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        expected.append(str(sums.index(max(sums))))
    for size in (1, 3, 100):
        found = choose_answers(model, tokenizer, task, make_recipe(f"evaluation.batch_size={size}"))
        assert found == expected
    assert len(set(expected)) > 1


def test_predict_tokens_give_the_share_of_the_completion_that_the_model_would_say(
    model: Any, tokenizer: Any, make_recipe: MakeRecipe
) -> None:
    spec = TaskSpec(data="x", format="plain")
    ids = encode_prompt(Example(0, "a b", ""), tokenizer, spec, "here")
    said: list[int] = []
    with torch.no_grad():
        for _ in range(3):
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in said
    own = tokenizer.decode(said)  # what greedy decoding gives: all but the end, of which it is not asked
    unlike = tokenizer.decode([token + 1 for token in said[:1]])
    task = make_task((Example(0, "a b", own), Example(1, "a b", unlike)), format="plain", metric="token_accuracy")
    first, second = (float(text) for text in predict_tokens(model, tokenizer, task, make_recipe()))
    assert first in (3 / 4, 1.0)
    assert second <= 1 / 2
    assert METRICS["token_accuracy"].score("0.75", task.test[0]) == 0.75


# ---- a whole measurement ---------------------------------------------------------------------------------------------


def test_run_measure_writes_losses_scores_and_outputs_and_reads_them_back(
    base_folder: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe("tasks.letters.metric=exact_match")
    tasks = tuple(load_task(recipe, name) for name in ("letters", "words"))
    job = MeasureJob(recipe, tasks, ModelState(base_folder), tmp_path / "out", 0)
    measured = run_measure(job, Progress())
    assert list(measured["scores"]) == ["letters", "words"]
    for task in tasks:
        score = measured["scores"][task.name]
        said = read_json(tmp_path / "out" / "outputs.json")[task.name]
        asked = read_json(tmp_path / "out" / "examples.json")[task.name]["examples"]
        assert [one["row"] for one in asked] == [entry["row"] for entry in said[:4]]
        values = [entry["score"] for entry in said]
        assert [entry["row"] for entry in said] == [example.index for example in task.test]
        assert score["score"] == pytest.approx(sum(values) / 6)
        mean = sum(values) / 6
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 5)
        assert score["stderr"] == pytest.approx(spread / math.sqrt(6))
        assert (score["metric"], score["num_examples"]) == (task.spec.metric, 6)
        assert measured["losses"][task.name]["num_examples"] == 6
    events: list[str] = []
    again = run_measure(job, Progress(lambda event: events.append(event.phase)))
    assert again == measured
    assert events == []  # nothing was loaded or computed


def test_shown_examples_are_the_first_of_the_test_split_and_no_longer_than_one_reads() -> None:
    prompt = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "x" * 5000})
    examples = tuple(Example(row, prompt, f"answer {row}", choices=("a", "b"), answer=0) for row in (7, 3, 5, 8, 9))
    task = Task("long", TaskSpec(data="rows.jsonl", metric="choice_accuracy"), (), (), examples, {})
    found = shown_examples(task)
    assert found["kind"] == "likelihood"
    assert [one["row"] for one in found["examples"]] == [7, 3, 5, 8]
    first = found["examples"][0]
    assert (first["reference"], first["choices"]) == ("answer 7", ["a", "b"])
    assert first["prompt"][0] == {"role": "system", "content": "be brief"}
    assert first["prompt"][1]["content"] == "x" * 4000 + " … (5000 characters)"


def test_only_the_pretrained_model_is_one_without_an_update(tmp_path: Path) -> None:
    assert ModelState(tmp_path).is_pretrained
    for part in ("task_vector", "start_adapter", "adapter", "full"):
        assert not ModelState(tmp_path, **{part: tmp_path}).is_pretrained  # type: ignore[arg-type]
