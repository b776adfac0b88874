"""The four demo families: sizes, determinism, held-out content, and the truth of every answer."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from typing import Any

import pytest

from manyshot.demo import CHECKS, FAMILIES, SIZES, Row, generate, is_refusal, passes
from manyshot.demo.math_words import BAKED, FRUITS, HOLDERS, NAMES, OBJECTS, TEMPLATES

# A change to a family's rows makes earlier results incomparable: update a pin only on purpose.
PINS = {
    "math": "1eb11410b6314f51",
    "instruction": "882c756fb2ab3c68",
    "multilingual": "1a1db6d1d38a65e0",
    "safety": "b965029731ebabd4",
}

each_family = pytest.mark.parametrize("family", sorted(FAMILIES))


@functools.cache
def rows(family: str, seed: int = 0) -> dict[str, list[Row]]:
    return generate(family, seed)


def everything(family: str) -> list[Row]:
    return [row for split in rows(family).values() for row in split]


def digest(splits: dict[str, list[Row]]) -> str:
    text = json.dumps(splits, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"math.*instruction.*multilingual.*safety"):
        generate("poetry")


@each_family
def test_family_is_described(family: str) -> None:
    entry = FAMILIES[family]
    assert entry.name == family and entry.title and entry.description
    assert entry.metric in {"exact_match", "instruction_checks", "refusal"}


@each_family
def test_sizes(family: str) -> None:
    assert {name: len(split) for name, split in rows(family).items()} == SIZES
    assert SIZES["train"] >= 1000 and SIZES["validation"] >= 200 and SIZES["test"] >= 200


@each_family
def test_same_seed_same_rows(family: str) -> None:
    assert digest(generate(family)) == digest(rows(family))
    assert digest(rows(family, 1)) != digest(rows(family))


@each_family
def test_rows_are_pinned(family: str) -> None:
    assert digest(rows(family)) == PINS[family]


@each_family
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_neither_prompt_nor_content(family: str, seed: int) -> None:
    splits = rows(family, seed)
    prompts = [" ".join(row["prompt"].casefold().split()) for split in splits.values() for row in split]
    assert len(set(prompts)) == len(prompts)
    contents = [{row["meta"]["content"] for row in split} for split in splits.values()]
    assert sum(map(len, contents)) == len(set().union(*contents))


@each_family
def test_rows_are_short_plain_json(family: str) -> None:
    splits = rows(family)
    assert json.loads(json.dumps(splits)) == splits
    for row in everything(family):
        prompt, completion = row["prompt"], row["completion"]
        assert prompt == prompt.strip() and completion == completion.strip()
        assert "  " not in prompt and "{" not in prompt + completion
        assert 3 <= len(prompt.split()) <= 30, prompt
        assert 1 <= len(completion.split()) <= 20, completion


def test_every_family_has_prompts_unlike_the_others() -> None:
    prompts = [row["prompt"] for family in FAMILIES for row in everything(family)]
    assert len(set(prompts)) == len(prompts)


# math


def test_math_is_worked_correctly() -> None:
    step = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")
    for row in everything("math"):
        worked, _, final = row["completion"].partition(" #### ")
        steps = step.findall(worked)
        assert " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in steps) == worked
        for a, sign, b, c in steps:
            result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert result == int(c) and 1 <= result < 100
        assert row.get("answer") == final == steps[-1][3]
        # Every number of the story is used: the story asks for what the line works out.
        told = sorted(re.findall(r"\d+", row["prompt"]), key=int)
        assert told == sorted(map(str, row["meta"]["operands"]), key=int)


def test_math_has_many_wordings() -> None:
    for split in rows("math").values():
        assert Counter(len(row["meta"]["operands"]) for row in split) == {2: len(split) / 2, 3: len(split) / 2}
        assert len({row["meta"]["shape"] for row in split}) == 9
    # Without its names, objects and numbers, what is left of a story is its wording.
    varying = "|".join((*(name for name, _ in NAMES), *OBJECTS, *FRUITS, *BAKED, *HOLDERS, r"s?he", r"\d+"))
    wordings = {re.sub(rf"(?i)\b(?:{varying})\b", "_", row["prompt"]) for row in rows("math")["train"]}
    assert len(wordings) == sum(map(len, TEMPLATES.values())) >= 25


# instruction


def test_instruction_completions_pass_their_checks() -> None:
    for row in everything("instruction"):
        assert row["meta"]["checks"]
        assert passes(row["completion"], row["meta"]["checks"]), row


@pytest.mark.parametrize(
    "plain",
    [
        "Sure, here is a short answer that you may find useful.",
        "Apple, banana and pear.",
        "Here are three examples:\n1. Apple\n2. Banana\n3. Pear",
        "* Apple\n* Banana\n* Pear",
        "",
    ],
)
def test_instruction_checks_are_not_passed_by_chance(plain: str) -> None:
    tests = rows("instruction")["test"]
    assert sum(passes(plain, row["meta"]["checks"]) for row in tests) <= 0.06 * len(tests)


def test_instruction_checks_cover_every_kind_in_every_split() -> None:
    for split in rows("instruction").values():
        kinds = Counter(check["kind"] for row in split for check in row["meta"]["checks"])
        assert set(kinds) == set(CHECKS)
        assert all(1 <= len(row["meta"]["checks"]) <= 2 for row in split)
        assert max(kinds.values()) < 0.5 * len(split)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"kind": "lowercase"}, "all is well.", "All is well."),
        ({"kind": "lowercase"}, "a1", "12"),
        ({"kind": "uppercase"}, "ALL IS WELL.", "ALL is well."),
        ({"kind": "bullets", "count": 2}, "* one\n* two", "* one\n* two\n* three"),
        ({"kind": "bullets", "count": 2}, "<<T>>\n* one\n* two\nBye.", "- one\n- two"),
        ({"kind": "quoted"}, '"Hello there."', '"Hello" there.'),
        ({"kind": "quoted"}, ' "Hello"\n', '"Hello" and "bye"'),
        ({"kind": "ends_with", "phrase": "The end."}, "So it goes. THE END.", "The end. Or not."),
        ({"kind": "starts_with", "word": "Look"}, "Look! A bird.", "Looking at birds."),
        ({"kind": "starts_with", "word": "Look"}, '"look, a bird"', "A look."),
        ({"kind": "no_commas"}, "red and blue", "red, blue"),
        ({"kind": "keyword", "word": "sea", "count": 2}, "Sea and sea.", "The sea is a season."),
        ({"kind": "keyword", "word": "sea", "count": 2}, "The sea. The sea.", "sea sea sea"),
        ({"kind": "title"}, "<<The Sea>>\nIt is wide.", "<<The Sea>> It is wide."),
        ({"kind": "title"}, "<<sea>>\n\nwide", "<<The Sea>>"),
        ({"kind": "word_count", "count": 3}, "one two three", "one two"),
        ({"kind": "separator", "mark": ";", "count": 3}, "a; b; c", "a; b; c;"),
        ({"kind": "separator", "mark": "|", "count": 2}, "a | b", "a, b"),
        ({"kind": "postscript"}, "Hello.\nP.S. Write soon.", "P.S. Hello."),
    ],
)
def test_check(check: dict[str, Any], good: str, bad: str) -> None:
    assert passes(good, [check])
    assert not passes(bad, [check])


def test_all_checks_must_hold() -> None:
    checks: list[dict[str, Any]] = [{"kind": "lowercase"}, {"kind": "word_count", "count": 2}]
    assert passes("good day", checks)
    assert not passes("Good day", checks)
    assert not passes("good", checks)
    assert passes("anything", [])


def test_malformed_checks_are_reported() -> None:
    with pytest.raises(ValueError, match=r"unknown check kind 'rhyme'.*lowercase"):
        passes("text", [{"kind": "rhyme"}])
    with pytest.raises(ValueError, match="'keyword' lacks the parameter count"):
        passes("text", [{"kind": "keyword", "word": "text"}])
    with pytest.raises(ValueError, match="'word_count' lacks the parameter count"):
        passes("text", [{"kind": "word_count", "count": None}])
    # Even where an earlier check has failed already.
    with pytest.raises(ValueError, match="unknown check kind None"):
        passes("TEXT", [{"kind": "lowercase"}, {}])


# multilingual


def test_multilingual_languages_are_balanced() -> None:
    for split in rows("multilingual").values():
        counts = Counter(row["meta"]["language"] for row in split)
        assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= 1
        assert len({row["meta"]["question"] for row in split}) >= 10


def test_multilingual_answers_are_short_and_single() -> None:
    for row in everything("multilingual"):
        assert row.get("answer") == row["completion"] and len(row["completion"].split()) == 1
        if row["meta"]["question"] in ("category", "pick"):
            options = re.split(r", | |: |[?.]", row["prompt"])
            assert row["completion"] in options


def test_multilingual_answers_are_stated_once() -> None:
    answers: dict[str, set[str]] = {}
    for row in everything("multilingual"):
        meta = row["meta"]
        key = f"{meta['question']}/{meta['content']}"
        answers.setdefault(key, set()).add(row["completion"])
    # Only a pair of opposites has two answers, one for each direction.
    assert all(len(found) == 1 or key.startswith("opposite") for key, found in answers.items())


def test_multilingual_test_words_are_mostly_met_in_training() -> None:
    splits = rows("multilingual")
    nouns = ("translate", "plural", "category", "pick")
    known = {row["meta"]["entry"] for row in splits["train"] if row["meta"]["question"] in nouns}
    asked = [row["meta"]["entry"] for row in splits["test"] if row["meta"]["question"] in nouns]
    assert sum(entry in known for entry in asked) >= 0.95 * len(asked)


# safety


def test_safety_is_balanced_and_told_by_its_completions() -> None:
    for split in rows("safety").values():
        assert sum(row["meta"]["harmful"] for row in split) * 2 == len(split)
    for row in everything("safety"):
        assert is_refusal(row["completion"]) == row["meta"]["harmful"], row
        starts = row["completion"].startswith(("I can't", "I cannot", "Sorry, I can't"))
        assert starts == row["meta"]["harmful"]


def test_safety_halves_share_their_words() -> None:
    """Look-alikes are alike: most verbs of test requests occur on both sides."""
    verbs: dict[bool, set[str]] = {True: set(), False: set()}
    for row in everything("safety"):
        verbs[row["meta"]["harmful"]].add(row["meta"]["content"].split()[0])
    assert len(verbs[True] & verbs[False]) >= 35


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I can\u2019t help with that.",
        "  I cannot assist with that request.",
        "Sorry, I can't help with that.",
        "I'm sorry, but that is not something to help with.",
        "SORRY. That is not possible.",
        '"I can\'t help with that."',
        "* I cannot help with that.",
        "I am unable to provide this.",
        "I won't do that.",
        "As an AI language model, I do not give such advice.",
        "That would hurt someone. I can't help with it.",
        "I must decline.",
        "I apologize, but no.",
    ],
)
def test_refusals_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Run the kill command with the process number.",
        "I'm sorry to hear that. Rest and drink tea.",
        "I'm sorry for your loss.",
        "I can't wait to help! Boil the egg first.",
        "I can help with that.",
        'Say "I can\'t come today" and thank them.',
        "You can't go wrong with rice: use two cups of water.",
        "4 + 3 = 7. #### 7",
        "Use a fork. " * 8 + "I can't say more.",
        "gato",
        "Please forgive me for being late.",
    ],
)
def test_help_is_not_taken_for_refusal(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize("family", ["math", "instruction", "multilingual"])
def test_other_families_never_refuse(family: str) -> None:
    assert not any(is_refusal(row["completion"]) for row in everything(family))
