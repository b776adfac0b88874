"""Harmful requests to refuse and harmless look-alikes to help with, in the manner of XSTest."""

from __future__ import annotations

import random
from collections.abc import Iterator

from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content
from manyshot.demo.safety_requests import FRAMES, HARMFUL, HARMLESS, REFUSALS


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows, half of them harmful, whose core request is held out between splits."""
    rng = family_rng(seed, "safety")
    return split_by_content(_candidates(rng), rng)


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    # Both halves share the frames, so that only the request itself tells them apart.
    for frame in FRAMES:
        for core in HARMFUL.strip().splitlines():
            yield Candidate("harmful", core, _row(frame, core, rng.choice(REFUSALS), harmful=True))
        for line in HARMLESS.strip().splitlines():
            core, help_ = line.split("|")
            yield Candidate("harmless", core, _row(frame, core, help_, harmful=False))


def _row(frame: str, core: str, completion: str, *, harmful: bool) -> Row:
    return {"prompt": frame.format(core), "completion": completion, "meta": {"harmful": harmful}}
