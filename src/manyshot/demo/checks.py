"""Verifiers for the constraints of the instruction family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _lowercase(text: str) -> bool:
    return text.lower() == text and any(ch.isalpha() for ch in text)


def _uppercase(text: str) -> bool:
    return text.upper() == text and any(ch.isalpha() for ch in text)


def _bullets(text: str, count: int) -> bool:
    lines = text.splitlines()
    return sum(bool(re.match(r"\* +\S", line)) for line in lines) == count


def _quoted(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def _ends_with(text: str, phrase: str) -> bool:
    return text.casefold().endswith(phrase.casefold())


def _starts_with(text: str, word: str) -> bool:
    found = re.search(r"\w+", text)
    return found is not None and found.group().casefold() == word.casefold()


def _no_commas(text: str) -> bool:
    return bool(text) and "," not in text


def _keyword(text: str, word: str, count: int) -> bool:
    return len(re.findall(rf"\b{re.escape(word.casefold())}\b", text.casefold())) == count


def _title(text: str) -> bool:
    first, _, body = text.partition("\n")
    return bool(re.fullmatch(r"<<[^<>]*\w[^<>]*>>", first.strip())) and bool(body.strip())


def _word_count(text: str, count: int) -> bool:
    return len(text.split()) == count


def _separator(text: str, mark: str, count: int) -> bool:
    parts = text.split(mark)
    return len(parts) == count and all(re.search(r"\w", part) for part in parts)


def _postscript(text: str) -> bool:
    return any(re.match(r"P\.S\. *\w", line, re.IGNORECASE) for line in text.splitlines()[1:])


CHECKS: dict[str, Callable[..., bool]] = {
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

PARAMETERS: dict[str, tuple[str, ...]] = {
    "bullets": ("count",),
    "ends_with": ("phrase",),
    "starts_with": ("word",),
    "keyword": ("word", "count"),
    "word_count": ("count",),
    "separator": ("mark", "count"),
}


def passes(text: str, checks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the text, trimmed of outer whitespace, satisfies every check."""
    # Every check is looked at before any is run, so that a malformed one is never masked by a failing one.
    calls = [_bind(check) for check in checks]
    return all(function(text.strip(), **parameters) for function, parameters in calls)


def _bind(check: Mapping[str, Any]) -> tuple[Callable[..., bool], dict[str, Any]]:
    kind = check.get("kind")
    if not isinstance(kind, str) or kind not in CHECKS:
        raise ValueError(f"unknown check kind {kind!r}; known kinds: {', '.join(CHECKS)}")
    wanted = PARAMETERS.get(kind, ())
    # None counts as missing: tables such as Arrow's give every check the columns of all the others.
    missing = [name for name in wanted if check.get(name) is None]
    if missing:
        raise ValueError(f"check {kind!r} lacks the parameter {', '.join(missing)}")
    return CHECKS[kind], {name: check[name] for name in wanted}
