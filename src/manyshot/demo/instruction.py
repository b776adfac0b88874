"""Short requests with one or two constraints, in the manner of IFEval but far smaller."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from manyshot.demo.checks import passes
from manyshot.demo.instruction_topics import LISTS, SAYINGS, THINGS, table
from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
ENDINGS = (
    "That is all.", "Have a nice day.", "The end.", "Hope this helps!", "Any questions?", "See you soon!",
    "Over and out.", "Believe me.",
)  # fmt: skip
OPENERS = ("Okay", "Gladly", "Listen", "Look", "Wow", "Yes", "Indeed", "Hey", "Right", "Fine")
AFTERTHOUGHTS = ("Have fun.", "Stay well.", "Write back soon.", "Take care.", "Smile today.")
MARKS = (";", "|")

WORDINGS: dict[str, tuple[str, ...]] = {
    "lowercase": ("Use only lowercase letters.", "Write everything in lowercase."),
    "uppercase": ("Use only capital letters.", "Write everything in capitals."),
    "bullets": (
        'Use exactly {count} bullet points starting with "* ".',
        'Give {count} lines, each starting with "* ".',
    ),
    "quoted": ("Wrap the whole answer in double quotes.", "Put double quotes around your reply."),
    "ends_with": ("End with this phrase: {phrase}", 'Your last words must be "{phrase}"'),
    "starts_with": ('Start with the word "{word}".', 'Begin with "{word}".'),
    "no_commas": ("Do not use any commas.", "Avoid commas."),
    "keyword": ('Use the word "{word}" exactly {count} times.', 'Write "{word}" {count} times.'),
    "title": ("Begin with a title in <<double angle brackets>>.", "Put a title like <<Title>> on top."),
    "word_count": ("Use exactly {count} words.", "Answer in exactly {count} words."),
    "separator": ('Separate them with "{mark}".', 'Put "{mark}" between them.'),
    "postscript": ('Add a line starting with "P.S." at the end.', 'Close with a "P.S." line.'),
}

# Constraints that show in the form of a reply are easy to learn; those that need counting are rare.
_WRAPS: tuple[tuple[str, ...], ...] = (
    ("lowercase",), ("uppercase",), ("quoted",), ("ends_with",), ("starts_with",), ("title",), ("postscript",),
)  # fmt: skip
# Drawn from evenly: about four in five recipes have one check. A check that plain prose passes anyway
# (no_commas) only ever comes with a second one.
RECIPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "thing": (
        *_WRAPS, *_WRAPS, ("bullets",), ("bullets",), ("keyword",), ("keyword",),
        ("word_count",), ("quoted", "uppercase"), ("ends_with", "lowercase"), ("title", "lowercase"),
        ("bullets", "title"),
    ),
    "list": (
        *_WRAPS, *_WRAPS, ("bullets",), ("bullets",), ("separator",), ("separator",), ("separator",), ("separator",),
        ("separator", "uppercase"), ("bullets", "lowercase"), ("no_commas", "uppercase"), ("no_commas", "quoted"),
        ("no_commas", "starts_with"),
    ),
    "saying": (
        *_WRAPS, *_WRAPS, ("word_count",),
        ("quoted", "uppercase"), ("quoted", "lowercase"), ("ends_with", "lowercase"), ("title", "uppercase"),
    ),
}  # fmt: skip
# The order in which constraints shape the text: the inner ones first, case and quotes last.
ORDER = (
    "no_commas", "separator", "bullets", "word_count", "keyword", "starts_with", "ends_with", "postscript",
    "title", "lowercase", "uppercase", "quoted",
)  # fmt: skip


@dataclass
class Draft:
    """A reply in the making, with the material that constraints may draw on."""

    request: str
    text: str
    title: str
    items: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    keyword: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows whose topics (things, lists, sayings) are held out between splits."""
    rng = family_rng(seed, "instruction")
    return split_by_content(_candidates(rng), rng)


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    makers: tuple[tuple[str, str, Callable[[list[str], random.Random], Draft]], ...] = (
        ("thing", THINGS, _thing), ("list", LISTS, _list), ("saying", SAYINGS, _saying),
    )  # fmt: skip
    for kind, text, make in makers:
        for cells in table(text):
            for recipe in RECIPES[kind]:
                draft = make(cells, rng)
                for step in sorted(recipe, key=ORDER.index):
                    draft.checks.append({"kind": step, **_APPLY[step](draft, rng)})
                yield Candidate(kind, f"{kind}: {cells[0]}", _row(draft, recipe, rng))


def _row(draft: Draft, recipe: tuple[str, ...], rng: random.Random) -> Row:
    assert passes(draft.text, draft.checks), (draft.text, draft.checks)
    parts = [draft.request]
    for step in recipe:
        check = next(check for check in draft.checks if check["kind"] == step)
        shown = {name: NUMBERS[value] if isinstance(value, int) else value for name, value in check.items()}
        parts.append(rng.choice(WORDINGS[step]).format(**shown))
    # An ending phrase is shown last, so that its own full stop closes the prompt.
    parts[1:] = sorted(parts[1:], key=lambda part: part.startswith(("End with", "Your last")))
    return {"prompt": " ".join(parts), "completion": draft.text, "meta": {"checks": draft.checks}}


def _thing(cells: list[str], rng: random.Random) -> Draft:
    thing, verb, words = cells
    traits = rng.sample(words.split(), 3)
    capital = _capital(thing)
    text = rng.choice(
        (
            f"{capital} {verb} {traits[0]} and {traits[1]}.",
            f"{capital} {verb} very {traits[0]}.",
        )
    )
    request = rng.choice(("Describe {}.", "Tell me about {}.", "Write about {}.", "Say something about {}."))
    return Draft(
        request=request.format(thing),
        text=text,
        title=capital.title(),
        items=[f"It {verb} {trait}." for trait in traits],
        sentences=[f"{capital} {verb} {trait}." for trait in traits],
        keyword=thing.split()[-1],
    )


def _list(cells: list[str], rng: random.Random) -> Draft:
    plural, members = cells
    count = rng.randrange(2, 4)
    items = rng.sample(members.split(), count)
    request = rng.choice(("Name {} {}.", "List {} {}.", "Give me {} {}.", "What are {} {}?"))
    return Draft(
        request=request.format(NUMBERS[count], plural),
        text=_capital(", ".join(items)),
        title=_capital(plural),
        items=items,
    )


def _saying(cells: list[str], rng: random.Random) -> Draft:
    request, text, title = cells
    return Draft(request=request, text=text, title=title)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _lowercase(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = draft.text.lower()
    return {}


def _uppercase(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = draft.text.upper()
    return {}


def _bullets(draft: Draft, rng: random.Random) -> dict[str, Any]:
    # A list names its own number; two lines are enough to describe a thing.
    count = 2 if draft.sentences else len(draft.items)
    draft.text = "\n".join(f"* {_capital(item)}" for item in draft.items[:count])
    return {"count": count}


def _quoted(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = f'"{draft.text}"'
    return {}


def _ends_with(draft: Draft, rng: random.Random) -> dict[str, Any]:
    phrase = rng.choice(ENDINGS)
    # Bulleted or listed text has no full stop of its own to part it from the phrase.
    gap = " " if draft.text[-1] in ".?!" and "* " not in draft.text else "\n"
    draft.text = f"{draft.text}{gap}{phrase}"
    return {"phrase": phrase}


def _starts_with(draft: Draft, rng: random.Random) -> dict[str, Any]:
    word = rng.choice(OPENERS)
    draft.text = f"{word}! {draft.text}"
    return {"word": word}


def _no_commas(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = _capital(" and ".join(draft.items))
    return {}


def _keyword(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = " ".join(draft.sentences[:2])
    return {"word": draft.keyword, "count": 2}


def _title(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = f"<<{draft.title}>>\n{draft.text}"
    return {}


def _word_count(draft: Draft, rng: random.Random) -> dict[str, Any]:
    return {"count": len(draft.text.split())}


def _separator(draft: Draft, rng: random.Random) -> dict[str, Any]:
    mark = rng.choice(MARKS)
    draft.text = ("; " if mark == ";" else f" {mark} ").join(draft.items)
    draft.text = _capital(draft.text)
    return {"mark": mark, "count": len(draft.items)}


def _postscript(draft: Draft, rng: random.Random) -> dict[str, Any]:
    draft.text = f"{draft.text}\nP.S. {rng.choice(AFTERTHOUGHTS)}"
    return {}


_APPLY: dict[str, Callable[[Draft, random.Random], dict[str, Any]]] = {
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "bullets": _bullets,
    "quoted": _quoted,
    "ends_with": _ends_with,
    "starts_with": _starts_with,
    "no_commas": _no_commas,
    "keyword": _keyword,
    "title": _title,
    "word_count": _word_count,
    "separator": _separator,
    "postscript": _postscript,
}
