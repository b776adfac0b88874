"""Tasks that a mix should survive: noise that looks like a task; a task twice, with no leak between the two."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.tasks import Task, load_task, shared_rows


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": f"a {i}", "completion": f"b {i}", "choices": [f"b {i}", "z"], "answer": 0} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(tmp_path / "rows.jsonl")


def make(tasks: dict[str, Any], seed: int = 0) -> Recipe:
    evaluation = {"validation_examples": 6, "test_examples": 9}
    return recipe_from_mapping({"model": "some/model", "tasks": tasks, "evaluation": evaluation, "seed": seed})


def texts(task: Task, split: str) -> list[tuple[str, str]]:
    return [(str(example.prompt), example.completion_text) for example in getattr(task, split)]


def rows(task: Task, split: str) -> set[int]:
    return {example.index for example in getattr(task, split)}


def test_shuffle_completions_gives_each_prompt_anothers_answer(file: str) -> None:
    recipe = make({"noise": {"train": {"data": file, "shuffle_completions": True}}, "fine": {"train": file}})
    noise, fine = load_task(recipe, "noise"), load_task(recipe, "fine")
    for split in ("train", "validation", "test"):
        ours, theirs = texts(noise, split), texts(fine, split)
        # the same prompts and the same answers, but not to each other
        assert Counter(prompt for prompt, _ in ours) == Counter(prompt for prompt, _ in theirs)
        assert Counter(answer for _, answer in ours) == Counter(answer for _, answer in theirs)
        assert set(ours) != set(theirs)
    assert len(set(texts(noise, "train")) & set(texts(fine, "train"))) < 0.2 * len(fine.train)
    for example in noise.train:
        assert example.choices[0] == example.completion  # the choices stay with their answer


def test_shuffle_completions_follows_the_seed(file: str) -> None:
    spec = {"noise": {"train": {"data": file, "shuffle_completions": True}}, "fine": {"train": file}}
    first, again, other = (load_task(make(spec, seed), "noise") for seed in (0, 0, 1))
    assert first.train == again.train
    assert first.digest() == again.digest() != other.digest()


def test_shuffle_completions_leaves_other_sources_of_a_split_alone(file: str, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(Path(file).read_text("utf-8"), "utf-8")
    both = [{"data": file, "shuffle_completions": True}, {"data": str(tmp_path / "more.jsonl")}]
    task = load_task(make({"half": {"train": both, "test": file}, "fine": {"train": file}}), "half")
    kept = [prompt[2:] == answer[2:] for prompt, answer in texts(task, "train")]
    by_source = {example.source: [] for example in task.train}  # type: dict[str, list[bool]]
    for example, same in zip(task.train, kept, strict=True):
        by_source[example.source].append(same)
    assert all(by_source[str(tmp_path / "more.jsonl")])
    assert sum(by_source[file]) < 0.5 * len(by_source[file])


def test_a_task_twice_has_the_same_splits_under_both_names(file: str) -> None:
    recipe = make({"math": {"train": file}, "code": {"data": file, "where": {"answer": 0}}, "again": {"train": file}})
    math, again = load_task(recipe, "math"), load_task(recipe, "again")
    for split in ("train", "validation", "test"):
        assert rows(math, split) == rows(again, split)
    assert not rows(again, "train") & (rows(math, "test") | rows(math, "validation"))
    assert shared_rows([math, again]) == []


def test_tasks_that_read_the_same_rows_in_another_way_are_split_alike(file: str) -> None:
    there = {"train": file, "columns": {"prompt": "prompt", "completion": "completion"}}
    back = {"train": file, "columns": {"prompt": "completion", "completion": "prompt"}}
    noise = {"train": {"data": file, "shuffle_completions": True}}
    recipe = make({"there": there, "back": back, "noise": noise})
    tasks = [load_task(recipe, name) for name in recipe.tasks]
    assert len({frozenset(rows(task, "test")) for task in tasks}) == 1
    for one in tasks:
        for other in tasks:
            assert not rows(one, "train") & rows(other, "test")


def test_tasks_with_other_rows_keep_the_splits_of_their_own_names(file: str) -> None:
    alone = load_task(make({"code": {"train": file}, "fine": {"data": "owner/fine"}}), "code")
    beside = load_task(make({"math": {"train": file, "where": {"answer": 0}}, "code": {"train": file}}), "code")
    assert rows(alone, "test") == rows(beside, "test")
    assert alone.digest() == beside.digest()


def test_shared_rows_names_who_trains_on_whose_test_examples(file: str) -> None:
    recipe = make({"math": {"train": file, "where": {"answer": 0}}, "code": {"train": file}})
    math, code = load_task(recipe, "math"), load_task(recipe, "code")
    both = len(rows(math, "train") & rows(code, "test"))
    assert both > 0
    assert f"tasks.math: is trained on {both} of the 9 test examples of code" in shared_rows([math, code])
