"""Four small, generated task families for the embedded demo."""

from __future__ import annotations

from pathlib import Path

from manyshot.demo import instruction, math_words, multilingual, safety
from manyshot.demo.checks import CHECKS, passes
from manyshot.demo.refusal import is_refusal
from manyshot.demo.rows import SIZES, Family, Row

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="math",
            title="Small word problems",
            description="One- and two-step problems with small numbers; a worked line ends in '#### N'.",
            metric="exact_match",
            generate=math_words.generate,
        ),
        Family(
            name="instruction",
            title="Verifiable instructions",
            description="Short requests with a constraint, sometimes two, that a program can check.",
            metric="instruction_checks",
            generate=instruction.generate,
        ),
        Family(
            name="multilingual",
            title="Reading in five languages",
            description="A line of French, Spanish, German, Italian or Portuguese; the answer is one of its words.",
            metric="exact_match",
            generate=multilingual.generate,
        ),
        Family(
            name="safety",
            title="Refuse or help",
            description="Harmful requests to refuse, and harmless look-alikes to help with.",
            metric="refusal",
            generate=safety.generate,
        ),
    )
}


# the recipe of `manyshot demo`
RECIPE_FILE = Path(__file__).with_name("recipe.yaml")


def generate(family: str, seed: int = 0) -> dict[str, list[Row]]:
    """The train, validation and test rows of one family; the same for the same seed."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known families: {', '.join(FAMILIES)}")
    return FAMILIES[family].generate(seed)


__all__ = ["CHECKS", "FAMILIES", "RECIPE_FILE", "SIZES", "Family", "Row", "generate", "is_refusal", "passes"]
