"""Tasks: formats, splits, tokens that count, and the order of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from conftest import MakeRecipe, make_rows
from manyshot.errors import DataError
from manyshot.recipe import Recipe, TaskSpec
from manyshot.tasks import (
    Encoded,
    Example,
    Task,
    encode,
    encode_all,
    encode_prompt,
    load_task,
    to_example,
    training_order,
)

AUTO = TaskSpec(data="x")
PLAIN = TaskSpec(data="x", format="plain")
CHAT = TaskSpec(data="x", format="chat")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(base_folder))


@pytest.fixture(scope="module")
def bare(base_folder: Path) -> Any:
    """The same tokenizer without a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(str(base_folder))
    tokenizer.chat_template = None
    return tokenizer


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, (user("q"),), (assistant("a"),)),
        ({"messages": [user("q"), assistant("a")]}, (user("q"),), (assistant("a"),)),
        (
            {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]},
            (user("q"), assistant("a"), user("r")),
            (assistant("b"),),
        ),
        ({"text": "a b"}, "", "a b"),
        ({"instruction": "do", "output": "done"}, "do", "done"),
        ({"instruction": "do", "input": " it ", "output": "done"}, "do\n\nit", "done"),
        ({"instruction": "do", "input": None, "output": "done"}, "do", "done"),
        ({"prompt": 3, "completion": 4}, "3", "4"),
        ({"messages": None, "prompt": "q", "completion": "a", "text": "t"}, "q", "a"),
        ({"messages": [user("q"), assistant("a")], "prompt": "p", "completion": "c"}, (user("q"),), (assistant("a"),)),
    ],
)
def test_to_example_reads_every_format(row: dict[str, Any], prompt: object, completion: object) -> None:
    before = json.dumps(row)
    example = to_example(row, 7, AUTO, "here")
    assert (example.index, example.prompt, example.completion) == (7, prompt, completion)
    assert json.dumps(row) == before


def test_to_example_maps_columns_and_suggests_a_missing_one() -> None:
    spec = TaskSpec(data="x", columns={"prompt": "question", "completion": "answer_text"})
    example = to_example({"question": "q", "answer_text": "a", "prompt": "not this"}, 0, spec, "here")
    assert (example.prompt, example.completion) == ("q", "a")
    with pytest.raises(DataError, match=r"^row 3: no column 'question'; did you mean 'questions'\? there are: answer"):
        to_example({"questions": "q", "answer_text": "a"}, 0, spec, "row 3")


def test_to_example_puts_a_system_prompt_first_but_once() -> None:
    spec = TaskSpec(data="x", system_prompt="be short")
    system = {"role": "system", "content": "be short"}
    own = {"role": "system", "content": "be long"}
    assert to_example({"prompt": "q", "completion": "a"}, 0, spec, "here").prompt == (system, user("q"))
    assert to_example({"messages": [user("q"), assistant("a")]}, 0, spec, "here").prompt == (system, user("q"))
    assert to_example({"messages": [own, user("q"), assistant("a")]}, 0, spec, "h").prompt == (own, user("q"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "reply": "a"}, "no usable columns; it has question, reply; needed are messages, or prompt"),
        ({}, "no usable columns; it has none"),
        ({"prompt": "q", "completion": None}, "no usable columns; it has completion, prompt"),
        ({"messages": []}, "'messages' must be a list of messages, found list"),
        ({"messages": "hi"}, "'messages' must be a list of messages, found str"),
        ({"messages": [assistant("a")]}, "the assistant's message is the only one; it needs one before it"),
        ({"messages": [user("q")]}, "the last message must be the assistant's, found role 'user'"),
        ({"messages": [{"role": "user"}]}, "every message in 'messages' needs 'role' and a text 'content'"),
        ({"messages": [{"content": "q"}]}, "every message in 'messages' needs 'role'"),
        ({"messages": [{"role": "user", "content": [1]}]}, "every message in 'messages' needs 'role'"),
        ({"messages": ["q"]}, "every message in 'messages' needs 'role'"),
        ({"prompt": "q", "completion": [assistant("a")]}, "'prompt' must be a list of messages, found str"),
        (
            {"prompt": "q", "completion": "a", "choices": ["a", "b"], "answer": 2},
            "'answer' must be an index into the 2",
        ),
        ({"prompt": "q", "completion": "a", "choices": ["a", "b"], "answer": "a"}, "'answer' must be an index"),
        ({"prompt": "q", "completion": "a", "choices": ["a", "b"]}, "'answer' must be an index"),
        ({"prompt": "q", "completion": "a", "choices": "ab", "answer": 0}, "'choices' must be a list, found str"),
    ],
)
def test_to_example_refuses_a_row_and_says_what_is_there(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        to_example(row, 0, AUTO, "task 'math', train row 1")
    assert str(caught.value).startswith(f"task 'math', train row 1: {message}")


def test_to_example_takes_choices_answers_and_meta_along() -> None:
    row = {"prompt": "q", "completion": "a", "choices": ["a", 2], "answer": 1, "meta": {"harmful": True}}
    example = to_example(row, 0, AUTO, "here")
    assert (example.choices, example.answer, example.meta) == (("a", "2"), 1, {"harmful": True})
    bare = to_example({"prompt": "q", "completion": "a", "answer": 2.5, "meta": "a note"}, 0, AUTO, "here")
    assert (bare.choices, bare.answer, bare.meta) == ((), "2.5", None)


def test_to_example_takes_the_columns_that_the_recipe_names_before_others() -> None:
    messages = [user("q"), assistant("a")]
    row = {"messages": messages, "prompt": "p", "instruction": "i", "output": "o"}
    spec = TaskSpec(data="x", columns={"prompt": "prompt", "completion": "messages.1.content"})
    example = to_example(row, 0, spec, "here")
    assert (example.prompt, example.completion) == ("p", "a")
    assert to_example(row, 0, AUTO, "here").prompt == (user("q"),)
    with pytest.raises(DataError, match=r"^here: no column 'messages\.2\.content'"):
        to_example(row, 0, TaskSpec(data="x", columns={"completion": "messages.2.content"}), "here")


def test_to_example_fills_a_template() -> None:
    row = {
        "story": "S",
        "question": ["a", "{b}"],
        "meta": {"n": 3},
        "reply": "r",
        "messages": [user("q"), assistant("a")],
    }
    spec = TaskSpec(data="x", template="{story}: {question} {meta.n} {not this}\n", columns={"completion": "reply"})
    example = to_example(row, 0, spec, "here")
    assert (example.prompt, example.completion) == ("S: a\n{b} 3 {not this}\n", "r")
    around = TaskSpec(data="x", template="<{prompt}>", columns={"prompt": "story", "completion": "reply"})
    assert to_example(row, 0, around, "here").prompt == "<S>"
    for template, message in (
        ("{storey}", "no column 'storey'; did you mean 'story'"),
        ("{meta}", "'meta' is no text"),
    ):
        with pytest.raises(DataError, match=f"^here: .*{message}"):
            to_example(row, 0, TaskSpec(data="x", template=template), "here")
    with pytest.raises(ValidationError, match="template"):
        TaskSpec(data="x", template="no place for a prompt")


@pytest.mark.parametrize("row", [{"completion": ""}, {"completion": " \n"}, {"completion": None}, {}])
def test_to_example_takes_the_right_choice_for_an_empty_completion(row: dict[str, Any]) -> None:
    example = to_example({"prompt": "q", "choices": ["yes", "no"], "answer": 1} | row, 0, AUTO, "here")
    assert example.completion == "no"
    given = to_example({"prompt": "q", "choices": ["yes", "no"], "answer": 1, "completion": "nope"}, 0, AUTO, "here")
    assert given.completion == "nope"
    with pytest.raises(DataError, match="no usable columns"):
        to_example({"prompt": "q", "answer": 1} | row | {"completion": None}, 0, AUTO, "here")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def words(tokenizer: Any, ids: tuple[int, ...] | list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_encode_marks_the_completion_after_the_chat_template(tokenizer: Any) -> None:
    encoded = encode(Example(4, "a b", "c d"), tokenizer, AUTO, 50, "here")
    assert words(tokenizer, encoded.input_ids) == "<user> a b <end> <assistant> c d <end>"
    assert encoded == Encoded(4, encoded.input_ids, 5, truncated=False)
    assert words(tokenizer, encoded.input_ids[encoded.num_context :]) == "c d <end>"
    assert encoded.num_counted == 3


def test_encode_counts_only_the_last_answer_of_a_conversation(tokenizer: Any) -> None:
    example = Example(0, (user("a"), assistant("b"), user("c")), (assistant("d"),))
    encoded = encode(example, tokenizer, AUTO, 50, "here")
    assert words(tokenizer, encoded.input_ids[encoded.num_context :]) == "d <end>"


def test_encode_plain_joins_prompt_and_completion_and_ends_the_text(tokenizer: Any) -> None:
    encoded = encode(Example(0, "a b", "c"), tokenizer, PLAIN, 50, "here")
    assert words(tokenizer, encoded.input_ids) == "a b c <end>"
    assert encoded.num_context == 2


def test_encode_counts_a_text_from_its_second_token_on(tokenizer: Any) -> None:
    encoded = encode(Example(0, "", "a b c"), tokenizer, AUTO, 50, "here")
    assert words(tokenizer, encoded.input_ids) == "a b c <end>"  # no chat template around a bare text
    assert (encoded.num_context, encoded.num_counted) == (1, 3)


def test_encode_whole_text_counts_the_prompt_too(tokenizer: Any) -> None:
    completion = encode(Example(0, "a b", "c"), tokenizer, AUTO, 50, "here")
    whole = encode(Example(0, "a b", "c"), tokenizer, AUTO, 50, "here", "whole_text")
    assert whole.input_ids == completion.input_ids
    assert (completion.num_counted, whole.num_counted) == (2, 6)


def test_encode_format_decides_about_the_template(tokenizer: Any, bare: Any) -> None:
    example = Example(0, "a", "b")
    assert words(tokenizer, encode(example, tokenizer, CHAT, 50, "h").input_ids).startswith("<user>")
    assert words(bare, encode(example, bare, AUTO, 50, "h").input_ids) == "a b <end>"
    with pytest.raises(DataError, match="row 1: has chat messages, but the model's tokenizer has no chat template"):
        encode(example, bare, CHAT, 50, "row 1")
    with pytest.raises(DataError, match="has no chat template"):
        encode(Example(0, (user("a"),), (assistant("b"),)), bare, AUTO, 50, "row 1")


@pytest.mark.parametrize(("max_length", "kept", "truncated"), [(8, 3, False), (7, 2, True), (6, 1, True)])
def test_encode_cuts_at_the_end(tokenizer: Any, max_length: int, kept: int, truncated: bool) -> None:
    encoded = encode(Example(0, "a b", "c d"), tokenizer, AUTO, max_length, "here")
    assert len(encoded.input_ids) == max_length
    assert (encoded.num_counted, encoded.truncated) == (kept, truncated)


def test_encode_refuses_an_example_without_a_token_to_count(tokenizer: Any) -> None:
    for max_length in (5, 2):
        with pytest.raises(DataError, match="no token left to count: 5 prompt tokens and 3 completion tokens, cut to"):
            encode(Example(0, "a b", "c d"), tokenizer, AUTO, max_length, "here")
    task = Task("math", AUTO, (), (), (), {})
    with pytest.raises(DataError, match=r"^task 'math', validation row 12: no token left .* max_length 5; raise local"):
        encode_all([Example(11, "a b", "c")], tokenizer, task, "validation", 5, "completion")
    assert encode(Example(0, "a b", "c d"), tokenizer, AUTO, 5, "here", "whole_text").num_counted == 4


def test_encode_refuses_a_template_that_rewrites_the_prompt(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(base_folder))
    tokenizer.chat_template = "{% if not add_generation_prompt %}yes {% endif %}{{ messages[0]['content'] }} a b"
    with pytest.raises(
        DataError, match="row 1: the chat template writes the prompt differently once the answer follows"
    ):
        encode(Example(0, "a", "b"), tokenizer, AUTO, 50, "row 1")


def test_encode_takes_another_completion_for_a_choice(tokenizer: Any) -> None:
    for spec, expected in ((AUTO, "e <end>"), (PLAIN, "e <end>")):
        encoded = encode(Example(0, "a", "b"), tokenizer, spec, 50, "here", completion="e")
        assert words(tokenizer, encoded.input_ids[encoded.num_context :]) == expected


def test_encode_prompt_is_where_the_completion_starts(tokenizer: Any) -> None:
    for spec in (AUTO, PLAIN):
        for example in (Example(0, "a b", "c"), Example(0, ({"role": "system", "content": "d"}, user("a")), "c")):
            prompt = encode_prompt(example, tokenizer, spec, "here")
            encoded = encode(example, tokenizer, spec, 50, "here")
            assert list(encoded.input_ids[: encoded.num_context]) == prompt


# ---- splits ----------------------------------------------------------------------------------------------------------

OneFile = Callable[..., Recipe]


@pytest.fixture
def one_file(make_recipe: MakeRecipe, tmp_path: Path) -> OneFile:
    """A recipe whose first task is one file of 50 rows, of which no two are alike."""

    def make(*overrides: str, rows: list[dict[str, Any]] | None = None) -> Recipe:
        rows = rows or [{"prompt": f"a {i}", "completion": "b"} for i in range(50)]
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_recipe(f"tasks.letters={{data: {tmp_path / 'all.jsonl'}}}", *overrides)

    return make


def rows_of(task: Task) -> dict[str, list[int]]:
    """The rows of each split of a task with one source."""
    return {split: rows for split in ("train", "validation", "test") for rows in [task.splits[split][0]["rows"]]}


def test_load_task_cuts_missing_splits_by_seed_and_records_them(one_file: OneFile, tmp_path: Path) -> None:
    task = load_task(one_file("evaluation.test_examples=9"), "letters")
    rows = rows_of(task)
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [35, 6, 9]
    assert sorted(rows["train"] + rows["validation"] + rows["test"]) == list(range(50))  # disjoint, nothing lost
    assert task.splits["dropped"] == 0
    assert [place["source"] for place in task.splits["test"]] == [str(tmp_path / "all.jsonl")]
    for split in rows:
        assert [example.index for example in getattr(task, split)] == rows[split]
        assert [example.prompt for example in getattr(task, split)] == [f"a {i}" for i in rows[split]]
    assert rows_of(load_task(one_file("evaluation.test_examples=9"), "letters")) == rows
    assert rows_of(load_task(one_file("evaluation.test_examples=9", "seed=1"), "letters")) != rows


def test_load_task_cuts_a_fifth_at_most(one_file: OneFile) -> None:
    task = load_task(one_file("evaluation.test_examples=100", "evaluation.validation_examples=100"), "letters")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [30, 10, 10]


def test_load_task_leaves_training_rows_out_that_stand_in_a_cut_split(one_file: OneFile) -> None:
    rows = [{"prompt": f"a {i % 25}", "completion": "b"} for i in range(50)]  # every row twice
    task = load_task(one_file(rows=rows), "letters")
    held_out = {example.prompt for example in (*task.validation, *task.test)}
    assert not held_out & {example.prompt for example in task.train}
    assert task.splits["dropped"] == 50 - len(task.train) - 12 > 0


def test_load_task_samples_a_given_split_that_is_larger_than_asked(make_recipe: MakeRecipe) -> None:
    task = load_task(make_recipe("evaluation.validation_examples=4"), "letters")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [24, 4, 6]
    assert rows_of(task)["validation"] == sorted(set(rows_of(task)["validation"]))
    assert rows_of(task)["test"] == list(range(6))
    assert rows_of(task)["train"] == list(range(24))


def test_load_task_digest_follows_every_example(make_recipe: MakeRecipe, data_folder: Path) -> None:
    before = load_task(make_recipe(), "letters").digest()
    assert load_task(make_recipe("protocol.rounds=1"), "letters").digest() == before
    rows = make_rows("letters", 6, seed=2)
    rows[5]["completion"] = "q"
    (data_folder / "letters.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_task(make_recipe(), "letters").digest() != before
    odd = Task("t", AUTO, (Example(0, "a", "b", meta={"when": date(2026, 1, 1)}),), (), (), {})
    assert len(odd.digest()) == 64


def test_load_task_refuses_an_empty_split_and_too_few_rows(one_file: OneFile) -> None:
    few = [{"prompt": f"a {i}", "completion": "b"} for i in range(4)]
    with pytest.raises(DataError, match="task 'letters': the validation split is empty"):
        load_task(one_file(rows=few), "letters")
    more = [{"prompt": f"a {i}", "completion": "b"} for i in range(5)]
    with pytest.raises(DataError, match=r"task 'letters': 3 training examples are fewer than one batch .*is 4\)"):
        load_task(one_file(rows=more), "letters")


def test_load_task_names_task_split_and_row_of_a_bad_row(one_file: OneFile, data_folder: Path) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b"} for i in range(50)]
    rows[17] = {"question": "q"}
    with pytest.raises(DataError, match=r"^task 'letters', (train|validation|test) row 18: no usable columns"):
        load_task(one_file(rows=rows), "letters")


# ---- order of training -----------------------------------------------------------------------------------------------


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(st.integers(1, 20), st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 3))
def test_training_order_of_rounds_continues_the_stream_of_one_pass(num: int, needs: list[int], seed: int) -> None:
    post_hoc = training_order(num, sum(needs), seed, "math", skip=0)
    many_shot: list[int] = []
    for need in needs:
        many_shot += training_order(num, need, seed, "math", skip=len(many_shot))
    assert many_shot == post_hoc
    assert len(post_hoc) == sum(needs)


def test_training_order_is_a_new_permutation_every_pass() -> None:
    order = training_order(10, 30, 0, "math", skip=0)
    passes = [order[0:10], order[10:20], order[20:30]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_training_order_depends_on_seed_and_task() -> None:
    orders = {tuple(training_order(20, 20, seed, task, 0)) for seed, task in ((0, "a"), (1, "a"), (0, "b"))}
    assert len(orders) == 3
