"""Word problems small enough for a 135M model, answered by a worked line."""

from __future__ import annotations

import random
from collections.abc import Iterator

from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content

NAMES = (
    ("Ana", "she"), ("Ben", "he"), ("Clara", "she"), ("Dan", "he"), ("Emma", "she"), ("Finn", "he"),
    ("Grace", "she"), ("Hugo", "he"), ("Ivy", "she"), ("Jack", "he"), ("Kate", "she"), ("Leo", "he"),
    ("Mia", "she"), ("Noah", "he"), ("Olga", "she"), ("Paul", "he"), ("Rosa", "she"), ("Sam", "he"),
    ("Tina", "she"), ("Victor", "he"),
)  # fmt: skip
OBJECTS = (
    "stickers", "marbles", "books", "pencils", "shells", "coins", "stamps", "cards", "buttons", "balloons",
    "toys", "beads", "stones", "crayons", "ribbons", "magnets",
)  # fmt: skip
FRUITS = ("apples", "oranges", "plums", "pears", "peaches", "lemons", "figs", "cherries")
BAKED = ("muffins", "cookies", "rolls", "pies", "cakes", "waffles", "tarts", "buns")
HOLDERS = ("boxes", "bags", "baskets", "jars", "trays", "packs", "tins")

# Shape -> wordings. The letters a, b, c are the operands in the order of the worked line.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "a + b": (
        "{n} has {a} {o} and finds {b} more. How many {o} does {n} have now?",
        "{n} picks {a} {f} in the morning and {b} in the afternoon. How many {f} is that in total?",
        "There are {a} birds on a fence. {b} more land there. How many birds are on the fence?",
        "A shelf holds {a} red {o} and {b} blue ones. How many {o} are on the shelf?",
        "{n} walks {a} miles on Monday and {b} miles on Tuesday. How many miles does {he} walk?",
        "{n} is {a} years old. How old will {he} be in {b} years?",
    ),
    "a - b": (
        "{n} has {a} {o} and gives {b} to {m}. How many {o} does {n} have left?",
        "There were {a} people on a bus. {b} got off. How many are still on the bus?",
        "{n} bakes {a} {w} and sells {b} of them. How many {w} are left?",
        "A book has {a} pages. {n} has read {b} of them. How many pages remain?",
        "{n} has {a} dollars and spends {b} dollars on lunch. How many dollars are left?",
        "{n} has {a} {o}. {m} has {b} fewer. How many {o} does {m} have?",
    ),
    "a * b": (
        "{n} buys {a} {k} with {b} {o} in each. How many {o} are there?",
        "There are {a} rows of {b} chairs in a room. How many chairs is that?",
        "{n} buys {a} tickets for {b} dollars each. How much does {he} pay?",
        "For {a} days {n} reads {b} pages a day. How many pages does {he} read?",
        "At a party {a} children each hold {b} {o}. How many {o} are there?",
        "{n} sets {a} tables with {b} plates each. How many plates does {he} need?",
    ),
    "a + b - c": (
        "{n} has {a} {o}, buys {b} more and then loses {c}. How many {o} are left?",
        "A bus has {a} riders. {b} get on and {c} get off. How many riders are there now?",
        "{n} picks {a} {f}, {m} picks {b}, and they eat {c}. How many {f} are left?",
        "There are {a} ducks on a pond. {b} arrive and {c} fly away. How many ducks remain?",
        "{n} saves {a} dollars, earns {b} dollars and spends {c}. How many dollars are left?",
    ),
    "a + b + c": (
        "{n} saw {a} cats, {b} dogs and {c} birds at the park. How many animals did {he} see?",
        "{n} scored {a}, {b} and {c} points in three games. What was the total?",
        "{n} spent {a} dollars on bread, {b} on milk and {c} on fruit. How much did {he} spend?",
        "{n} put {a}, {b} and {c} {o} into one box. How many {o} are in the box?",
    ),
    "a * b + c": (
        "{n} has {a} {k} of {b} {o} and {c} loose ones. How many {o} does {he} have?",
        "{n} buys {a} pens for {b} dollars each and a book for {c} dollars. How much does {he} pay?",
        "For {a} days {n} swims {b} laps a day, then {c} more on Sunday. How many laps is that?",
        "A room has {a} rows of {b} seats and {c} extra seats. How many seats are there?",
    ),
    "a * b - c": (
        "{n} fills {a} {k} with {b} {o} each, then gives away {c}. How many {o} are left?",
        "A farm packs {a} boxes of {b} eggs, but {c} eggs break. How many eggs are whole?",
        "{n} works {a} hours for {b} dollars an hour and spends {c} dollars. How much is left?",
        "{n} bakes {a} trays of {b} {w} and eats {c}. How many {w} remain?",
    ),
    "(a + b) * c": (
        "A class has {a} girls and {b} boys. Each child gets {c} {o}. How many {o} are needed?",
        "{n} does {a} push-ups and {b} sit-ups a day. How many exercises is that in {c} days?",
        "{n} puts {a} red and {b} green {o} in each of {c} bags. How many {o} does {he} use?",
    ),
    "(a - b) * c": (
        "{n} had {a} {w}, ate {b} and sold the rest for {c} dollars each. How much did {he} earn?",
        "Of {a} children, {b} stayed home. Each of the others got {c} {o}. How many {o} is that?",
        "A hall has {a} tables but {b} are broken. Each good one seats {c}. How many people can sit?",
    ),
}

# Largest operands (the least is 2): big enough for variety, small enough to be worked in the head.
LIMITS: dict[str, tuple[int, ...]] = {
    "a + b": (18, 12), "a - b": (20, 12), "a * b": (10, 10), "a + b - c": (12, 9, 9), "a + b + c": (9, 9, 9),
    "a * b + c": (5, 9, 9), "a * b - c": (5, 9, 9), "(a + b) * c": (9, 7, 5), "(a - b) * c": (12, 9, 5),
}  # fmt: skip
# Three rows in five take one step, since every stratum gets as many rows as the others.
STRATA: dict[str, str] = {
    "a + b": "add", "a - b": "subtract", "a * b": "multiply", "a + b - c": "sums", "a + b + c": "sums",
    "a * b + c": "product", "a * b - c": "product", "(a + b) * c": "product",
    "(a - b) * c": "product",
}  # fmt: skip
KEYS_PER_SHAPE = 150


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows whose operand combinations, for each shape of problem, are held out between splits."""
    rng = family_rng(seed, "math")
    return split_by_content(_candidates(rng), rng)


def work(shape: str, operands: tuple[int, ...]) -> list[tuple[int, str, int, int]]:
    """The worked steps of a shape, each as (left, operator, right, result)."""
    signs = [ch for ch in shape if ch in "+-*"]
    value, steps = operands[0], []
    for sign, right in zip(signs, operands[1:], strict=True):
        result = {"+": value + right, "-": value - right, "*": value * right}[sign]
        steps.append((value, sign, right, result))
        value = result
    return steps


def _combinations(shape: str) -> list[tuple[int, ...]]:
    """Operands whose every intermediate result lies between 1 and 99."""
    grid: list[tuple[int, ...]] = [()]
    for limit in LIMITS[shape]:
        grid = [(*head, number) for head in grid for number in range(2, limit + 1)]
    return [ops for ops in grid if all(1 <= step[3] < 100 for step in work(shape, ops))]


def _content(shape: str, operands: tuple[int, ...]) -> str:
    """Problems that differ only in the order of a sum or product count as one content."""
    swappable = 1 if "a - b" in shape else 3 if shape == "a + b + c" else 2
    operands = (*sorted(operands[:swappable]), *operands[swappable:])
    return f"{shape}: {','.join(map(str, operands))}"


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    for shape, templates in TEMPLATES.items():
        combinations = _combinations(shape)
        for operands in rng.sample(combinations, min(KEYS_PER_SHAPE, len(combinations))):
            for template in rng.sample(templates, len(templates)):
                yield Candidate(STRATA[shape], _content(shape, operands), _row(shape, operands, template, rng))


def _row(shape: str, operands: tuple[int, ...], template: str, rng: random.Random) -> Row:
    (name, he), (other, _) = rng.sample(NAMES, 2)
    words = {
        "n": name, "m": other, "he": he, "o": rng.choice(OBJECTS), "f": rng.choice(FRUITS),
        "w": rng.choice(BAKED), "k": rng.choice(HOLDERS),
    }  # fmt: skip
    prompt = template.format(**words, **dict(zip("abc", map(str, operands), strict=False)))
    steps = work(shape, operands)
    worked = " ".join(f"{left} {sign} {right} = {result}." for left, sign, right, result in steps)
    answer = str(steps[-1][3])
    meta = {"shape": shape, "operands": list(operands)}
    return {"prompt": prompt, "completion": f"{worked} #### {answer}", "answer": answer, "meta": meta}
