"""Tiny reading questions in five languages, each answered by one word of the text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from manyshot.demo.lexicon import FACTS, GRAMMAR, LANGUAGES
from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content

# Which second fact goes with the one asked for, where both are about one person.
PARTNERS = {
    "eats": "drinks", "drinks": "eats", "buys": "eats", "lives": "works", "works": "lives", "arrives": "buys",
    "has": "lives",
}  # fmt: skip
STORIES_PER_KIND = 60

# A story is its facts (whose order does not matter), its text, a question on it, and the answer.
_Story = tuple[tuple[str, ...], str, str, str]


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows whose combination of names and facts is held out between splits."""
    rng = family_rng(seed, "multilingual")
    return split_by_content(_candidates(rng), rng)


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    makers: dict[str, Callable[[str, random.Random], _Story]] = {"colour": _colour, "number": _number, "who": _who}
    for language in LANGUAGES:
        # Over all kinds: the same facts asked for in two ways must not land in two splits.
        seen: set[str] = set()
        for kind in (*PARTNERS, *makers):
            made = 0
            while made < STORIES_PER_KIND:
                story = makers[kind](language, rng) if kind in makers else _fact(language, kind, rng)
                facts, text, question, answer = story
                # Sorted by words: neither the order of two facts nor swapping their people makes new content.
                content = f"{language}: {' '.join(sorted(' '.join(facts).split()))}"
                if content in seen:
                    continue
                seen.add(content)
                made += 1
                meta = {"language": language, "question": kind}
                row: Row = {"prompt": f"{text} {question}", "completion": answer, "answer": answer, "meta": meta}
                # The kind comes first, so that rows left over by the quotas go to every language alike.
                yield Candidate(f"{kind}/{language}", content, row)


def _fact(language: str, kind: str, rng: random.Random) -> _Story:
    """Two people who do the same, or one person who does two things; one of the facts is asked for."""
    if rng.random() < 0.5:
        name, item, facts, text = _two_people(language, kind, rng)
    else:
        name = rng.choice(GRAMMAR[language].names)
        partner = PARTNERS[kind]
        item, other = rng.choice(FACTS[language][kind].items), rng.choice(FACTS[language][partner].items)
        clauses = [FACTS[language][kind].clause.format(x=item), FACTS[language][partner].clause.format(x=other)]
        facts = tuple(f"{name} {clause}" for clause in clauses)
        rng.shuffle(clauses)
        text = f"{name} {clauses[0]} {GRAMMAR[language].conjunction} {clauses[1]}."
    return facts, text, FACTS[language][kind].question.format(n=name), item.split()[-1]


def _who(language: str, rng: random.Random) -> _Story:
    kind = rng.choice(list(PARTNERS))
    name, item, facts, text = _two_people(language, kind, rng)
    clause = FACTS[language][kind].clause.format(x=item)
    return facts, text, GRAMMAR[language].who.format(clause=clause), name


def _two_people(language: str, kind: str, rng: random.Random) -> tuple[str, str, tuple[str, ...], str]:
    """The person to ask about and their item, who come first or last in the text, with its facts and the text."""
    fact = FACTS[language][kind]
    names, items = rng.sample(GRAMMAR[language].names, 2), rng.sample(fact.items, 2)
    facts = tuple(f"{name} {fact.clause.format(x=item)}" for name, item in zip(names, items, strict=True))
    return names[0], items[0], facts, _join(language, facts, rng)


def _join(language: str, clauses: tuple[str, ...], rng: random.Random) -> str:
    first, second = rng.sample(clauses, 2)
    return rng.choice((f"{first} {GRAMMAR[language].conjunction} {second}.", f"{first}. {second}."))


def _colour(language: str, rng: random.Random) -> _Story:
    """Two things of one person, each with its colour in the gender of the thing."""
    grammar = GRAMMAR[language]
    name = rng.choice(grammar.names)
    things = [thing.split("/") for thing in rng.sample(grammar.things, 2)]
    colours = [
        colour.split("/")[-1] if gender == "f" else colour.split("/")[0]
        for (_, gender), colour in zip(things, rng.sample(grammar.colours, 2), strict=True)
    ]
    definite = [f"{grammar.definite[gender]} {noun}" for noun, gender in things]
    indefinite = [f"{grammar.indefinite.get(gender, '')} {noun}" for noun, gender in things]
    facts = tuple(f"{name} {noun} {colour}" for (noun, _), colour in zip(things, colours, strict=True))
    text = rng.choice(grammar.coloured).format(
        n=name, a=indefinite[0], b=indefinite[1], the_a=definite[0], the_b=definite[1], p=colours[0], q=colours[1],
    )  # fmt: skip
    asked = rng.randrange(2)
    return facts, text, grammar.colour_question.format(the_a=definite[asked]), colours[asked]


def _number(language: str, rng: random.Random) -> _Story:
    """Two counts of one person, or of one kind of thing."""
    grammar = GRAMMAR[language]
    numbers, names = rng.sample(grammar.numbers, 2), rng.sample(grammar.names, 2)
    plurals = rng.sample(grammar.plurals, 2)
    asked, other = names[0], plurals[1].partition("/")[0]
    noun, _, gender = plurals[0].partition("/")
    if rng.random() < 0.5:
        facts = tuple(
            grammar.counted.format(n=asked, number=number, plural=plural)
            for number, plural in ((numbers[0], noun), (numbers[1], other))
        )
        parts = [f"{numbers[0]} {noun}", f"{numbers[1]} {other}"]
        rng.shuffle(parts)
        text = grammar.counted.format(n=asked, number=parts[0], plural=f"{grammar.conjunction} {parts[1]}") + "."
    else:
        facts = tuple(
            grammar.counted.format(n=name, number=number, plural=noun)
            for name, number in zip(names, numbers, strict=True)
        )
        text = _join(language, facts, rng)
    return facts, text, grammar.count_question[gender].format(plural=noun, n=asked), numbers[0]
