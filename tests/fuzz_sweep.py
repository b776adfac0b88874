"""Every change of one place of the inputs of a target, one after the other: what drawing at random may never come to.

A place is a key, or an item of a list, of the tree that an input stands for. Each is given every odd value and every
odd name that fuzz_mutate.py knows, and is left out. Places alike (items of a list after its second; the same key of
another seed, or of another file of that name) are taken once.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from fuzz_mutate import VALUES, mutate_json, mutate_lines, mutate_safetensors, mutate_yaml
from fuzz_targets import Target

NAMES = ("", "a" * 5000, "..", "../../outside", "\x00", "\ud800", "1", "nan", "null")
# what is done to a place: another value, another name for it, and it is gone
CHANGES: tuple[tuple[str, Any], ...] = (
    *(("value", value) for value in VALUES),
    *(("name", name) for name in NAMES),
    ("gone", None),
)
Way = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """A tree inside of an input, and how the input is put together around another one."""

    kind: str  # parts of one kind have the same places
    tree: Any
    around: Callable[[Any], bytes]


class Sweep(Sequence[bytes]):
    """The inputs, by number, of a target whose seeds stand for trees; none of one whose seeds do not."""

    def __init__(self, target: Target) -> None:
        self._places: list[tuple[Part, Way]] = []
        seen = set()
        for data in target.seeds:
            for part in parts_of(data, target.mutate):
                for way in ways(part.tree):
                    key = (part.kind, tuple("#" if isinstance(step, int) else step for step in way))
                    if key not in seen:
                        seen.add(key)
                        self._places.append((part, way))

    def __len__(self) -> int:
        return len(self._places) * len(CHANGES)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, change = divmod(index, len(CHANGES))
        part, way = self._places[place]
        return part.around(changed(part.tree, way, *CHANGES[change]))


def ways(tree: Any, before: Way = ()) -> Iterator[Way]:
    """The way to the tree itself and to every place below it; of a list to two items."""
    yield before
    keys = list(tree) if isinstance(tree, dict) else range(min(2, len(tree))) if isinstance(tree, list) else ()
    for key in keys:
        yield from ways(tree[key], (*before, key))


def changed(tree: Any, way: Way, what: str, new: Any) -> Any:
    """A copy of the tree with one place changed. The tree itself, and items of lists, have no name to change."""
    if not way:
        return copy.deepcopy(new)
    found = copy.deepcopy(tree)
    holder = found
    for step in way[:-1]:
        holder = holder[step]
    if what == "value":
        holder[way[-1]] = copy.deepcopy(new)
    elif what == "gone":
        del holder[way[-1]]
    elif isinstance(holder, dict):
        holder[new] = holder.pop(way[-1])
    return found


# ---- what trees an input stands for ----------------------------------------------------------------------------------


def parts_of(data: bytes, mutate: Callable[..., bytes]) -> list[Part]:
    """By the way that the target's inputs are changed at random; bytes stand for nothing."""
    if (inner := getattr(mutate, "inner", None)) is not None:
        head, _, body = data.partition(b"\n")
        name = PurePosixPath(head.decode()).name
        return [
            Part(f"{name} {part.kind}", part.tree, lambda tree, part=part: head + b"\n" + part.around(tree))
            for part in parts_of(body, inner)
        ]
    read = {mutate_json: _json, mutate_yaml: _yaml, mutate_lines: _lines, mutate_safetensors: _header}.get(mutate)
    return read(data) if read else []


def _json(data: bytes) -> list[Part]:
    return [Part("", json.loads(data), _dumped)]


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _yaml(data: bytes) -> list[Part]:
    """A document, or the one at the head of a model card. What YAML cannot say is left as it was."""
    found = re.fullmatch(rb"(---\n)?(.*?\n)(---\n.*)?", data, re.DOTALL)
    before, text, after = found.groups(b"") if found else (b"", data, b"")

    def around(tree: Any) -> bytes:
        try:
            made = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
            return before + made + after
        except (yaml.YAMLError, ValueError, RecursionError):
            return data

    return [Part("", yaml.safe_load(text), around)]


def _lines(data: bytes) -> list[Part]:
    lines = data.split(b"\n")
    return [
        Part(str(sorted(tree)), tree, lambda new, i=i: b"\n".join([*lines[:i], _dumped(new), *lines[i + 1 :]]))
        for i, tree in enumerate(json.loads(line) for line in lines if line)
    ]


def _header(data: bytes) -> list[Part]:
    (length,) = struct.unpack("<Q", data[:8])

    def around(tree: Any) -> bytes:
        header = _dumped(tree)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return [Part("", json.loads(data[8 : 8 + length]), around)]
