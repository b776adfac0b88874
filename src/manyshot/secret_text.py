"""Tokens and passwords in a text: found, so that a recipe with one is refused, and blotted out of all that is written.

A secret is what stands in a variable of the environment that is named as one, and what looks like one wherever it is:
tokens of the services that models come from and go to, the password of an address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

BLOT = "***"
# variables of the environment, and keys, that hold secrets; a tokenizer's pad_token is none
NAMED = re.compile(r"((^|_)TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?)$", re.IGNORECASE)
KEYS = re.compile(r"((hub|hf|auth|access|api|bearer)_?token|secret|passwo?r?d|api_?key|access_?key)$", re.IGNORECASE)
# a shorter value of such a variable is a word that may stand anywhere
SHORTEST = 8
LOOKS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,}                # Hugging Face
    | \bgh[pousr]_[A-Za-z0-9]{30,}         # GitHub
    | \b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}    # OpenAI and others
    | \bAKIA[0-9A-Z]{16}\b                 # Amazon
    | (?<=://)[^/\s@]+(?=@)                # https://user:password@host
    | (?<=[a-z]:/)[^/\s@]+:[^/\s@]+(?=@)   # the same, once it has been a Path
    """,
    re.VERBOSE,
)
# what is said to be one: token=…, --api-key …, Authorization: Bearer …
SAID = re.compile(
    r"((?:token|secret|passwo?r?d|api[_-]?key|access[_-]?key)[\"']?\s*[=:]\s*|bearer\s+)[^\s&\"',;]{8,}", re.IGNORECASE
)


def _values() -> list[str]:
    """The secrets of the environment, the longest first."""
    found = {value for name, value in os.environ.items() if NAMED.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


def redacted(text: str) -> str:
    """The text with *** in the place of every secret."""
    for value in _values():
        text = text.replace(value, BLOT)
    return SAID.sub(rf"\g<1>{BLOT}", LOOKS.sub(BLOT, text))


def find_secrets(tree: Any) -> list[tuple[str | int, ...]]:
    """The keys of plain values that hold a secret, in a name or a text. What only speaks of one is none."""
    return list(_find(tree, (), _values()))


def _find(tree: Any, key: tuple[str | int, ...], values: Sequence[str]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from _find(name, key, values)
            yield from _find(inner, (*key, str(name)), values)
    elif isinstance(tree, list | tuple):
        for i, inner in enumerate(tree):
            yield from _find(inner, (*key, i), values)
    elif isinstance(tree, str):
        kept_as_one = len(tree) >= SHORTEST and bool(key) and KEYS.search(str(key[-1])) is not None
        if kept_as_one or LOOKS.search(tree) or any(value in tree for value in values):
            yield key
