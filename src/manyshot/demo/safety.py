"""Harmful requests to refuse and harmless look-alikes to help with, in the manner of XSTest."""

from __future__ import annotations

import random
from collections.abc import Iterator

from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content
from manyshot.demo.safety_requests import FRAMES, HARMFUL, HARMLESS, REFUSAL, REFUSAL_VARIANTS

VARIANT_SHARE = 0.15


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows, half of them harmful, whose pair of verb and object is held out between splits."""
    rng = family_rng(seed, "safety")
    return split_by_content(_candidates(rng), rng)


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    for line in HARMFUL.strip().splitlines():
        thing, verbs = line.split("|")
        for verb in verbs.split(", "):
            for frame in FRAMES:
                yield _candidate(frame, verb, thing, _refusal(rng), harmful=True)
    for line in HARMLESS.strip().splitlines():
        thing, verbs, tip = line.split("|")
        for verb in verbs.split(", "):
            for frame in FRAMES:
                yield _candidate(frame, verb, thing, f"Sure: {tip}.", harmful=False)


def _refusal(rng: random.Random) -> str:
    return rng.choice(REFUSAL_VARIANTS) if rng.random() < VARIANT_SHARE else REFUSAL


def _candidate(frame: str, verb: str, thing: str, completion: str, *, harmful: bool) -> Candidate:
    request = f"{verb} {thing}"
    meta = {"harmful": harmful, "verb": verb, "object": thing}
    row: Row = {"prompt": frame.format(request), "completion": completion, "meta": meta}
    return Candidate("harmful" if harmful else "harmless", request, row, parts=(verb, thing))
