"""Row and family types, and the content-held-out split that every family shares."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

SIZES: dict[str, int] = {"train": 1200, "validation": 240, "test": 300}


class Row(TypedDict):
    """One example; ``answer`` is an index if ``choices`` exist, else the exact-match string."""

    prompt: str
    completion: str
    answer: NotRequired[str | int]
    choices: NotRequired[list[str]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A task family of the demo."""

    name: str
    title: str
    description: str
    metric: str
    generate: Callable[[int], dict[str, list[Row]]]


class Candidate(NamedTuple):
    """A possible row, its balancing stratum, and the content that must stay within one split.

    Parts are what contents are combined from: each is met in training, if only in another combination.
    """

    stratum: str
    content: str
    row: Row
    parts: tuple[str, ...] = ()


def family_rng(seed: int, family: str) -> random.Random:
    """A generator seeded by a string, which is hashed alike in every process."""
    return random.Random(f"{seed}/{family}")


def split_by_content(candidates: Iterable[Candidate], rng: random.Random) -> dict[str, list[Row]]:
    """Give each content key to one split, then fill the splits evenly from every stratum."""
    strata: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    parts: dict[str, tuple[str, ...]] = {}
    for stratum, content, row, parts_of_row in candidates:
        row["meta"]["content"] = content
        parts[content] = parts_of_row
        strata[stratum][content].append(row)
    splits: dict[str, list[Row]] = {name: [] for name in SIZES}
    seen: set[str] = set()  # over all splits: two contents may render to one prompt
    for position, stratum in enumerate(sorted(strata)):
        shares = _share_out(sorted(strata[stratum]), parts, rng)
        for name, size in SIZES.items():
            quota = size // len(strata) + (position < size % len(strata))
            groups = [strata[stratum][content] for content in shares[name]]
            rows = _take(groups, quota, seen, rng)
            if len(rows) < quota:
                raise RuntimeError(f"{stratum}/{name}: only {len(rows)} of {quota} unique rows")
            splits[name] += rows
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _share_out(contents: list[str], parts: dict[str, tuple[str, ...]], rng: random.Random) -> dict[str, list[str]]:
    """Cut the shuffled content keys in proportion to the split sizes."""
    rng.shuffle(contents)
    # Contents with a part not met before go first, into training; the sort keeps the order otherwise.
    met: set[str] = set()
    new: dict[str, bool] = {}
    for content in contents:
        new[content] = not met.issuperset(parts[content])
        met.update(parts[content])
    contents.sort(key=lambda content: not new[content])
    total = sum(SIZES.values())
    shares: dict[str, list[str]] = {}
    start = done = 0
    for name, size in SIZES.items():
        done += size
        end = len(contents) * done // total
        shares[name] = contents[start:end]
        start = end
    return shares


def _take(groups: list[list[Row]], quota: int, seen: set[str], rng: random.Random) -> list[Row]:
    """Take rows one content at a time, so that no content crowds out the others."""
    for group in groups:
        rng.shuffle(group)
    taken: list[Row] = []
    depth = 0
    while len(taken) < quota and any(depth < len(group) for group in groups):
        for group in groups:
            if len(taken) == quota:
                break
            if depth < len(group) and group[depth]["prompt"] not in seen:
                seen.add(group[depth]["prompt"])
                taken.append(group[depth])
        depth += 1
    return taken
