"""Change an input a little: bytes, lines, or the tree that a JSON or YAML text stands for. Everything follows the seed.

Blind changes of bytes mostly end in the parser. What is behind it meets values that no program writes only where the
text stays well-formed, so most changes are made to the tree.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import yaml

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]

DEEP: Any = None
for _ in range(60):
    DEEP = [DEEP]
# what readers do not expect where another value stood
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**60, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "a", "0", "-1", "nan", "1e999", "true", "null", "auto", ".", "..", "/", "~", "\x00", "\ud800", "\u202e"),
    *("../../outside", "/etc/passwd", "/dev/zero", "a/../../b", "..\\b", "file:///etc/passwd", "http://127.0.0.1:1/x"),
    *("a" * 5000, "{" * 50, "{prompt}", "{{ 7 * 7 }}", "<script>alert(1)</script>", "(a+)+$", "(.*)*x", "[", "\\"),
    *("metis", "F32", "BF16", "LORA", "2023-13-45", "1:2:3"),
    *([], {}, [[]], {"": None}, [None], [0] * 500, {"a": {"a": {}}}, DEEP),
)
TOKENS = (
    *(
        b"\x00",
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\n",
        b"\r",
        b"\r\n",
        b"\t",
        b",",
        b'"',
        b"'",
        b"\\",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b": ",
        b"- ",
        b"? ",
        b"#",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!set ",
        b"|",
        b">",
        b"%",
        b"---\n",
    ),
    *(b"!!python/object/apply:os.system [true]", b"!!binary ", b"!!timestamp x", b"2023-13-45", b"NaN", b"-Infinity"),
    *(
        b"1e999",
        b"9" * 5000,
        b"-1",
        b"0x_",
        b'"\\ud800"',
        b"[" * 2000,
        b'{"a":' * 500,
        b"../",
        b"/",
        b"=",
        b"\xe2\x80\xae",
    ),
)


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of bytes: flip, remove, insert, repeat, cut off, put in a piece of another input."""
    blob = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randint(0, len(blob)), rng.choice((1, 2, 4, 8, 50))
        kind = rng.randrange(7)
        if kind == 0 and blob:
            blob[at - 1] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del blob[at : at + length]
        elif kind == 2:
            blob[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            blob[at:at] = blob[at : at + length] * rng.choice((1, 2, 100))
        elif kind == 4:
            del blob[at:]
        elif kind == 5:
            other = rng.choice(others)
            begin = rng.randint(0, len(other))
            blob[at : at + length] = other[begin : begin + rng.choice((4, 40, 400))]
        else:
            blob[at : at + length] = rng.randbytes(length)
    return bytes(blob[:200_000])


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One to three changes of nodes: another value, another key, one away, one twice, two in each other's place."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 1:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 2:
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            names = [str(key) for _, key in places] + [str(value)[:40] for value in VALUES]
            holder[rng.choice(names)] = holder[key] if rng.random() < 0.5 else holder.pop(key)
        elif kind == 4 and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * rng.choice((1, 2, 50)))
        else:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) below a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < 3000:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutate_json(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The tree of a JSON text three times out of four, its bytes otherwise."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng, others)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng, others)
    return _text(mutate_tree(tree, rng))


def mutate_lines(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Some lines of JSON lines, as JSON; or lines in another order, or twice."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        if rng.random() < 0.2:
            lines.insert(at, lines[rng.randrange(len(lines))])
        else:
            lines[at] = mutate_json(lines[at], rng, others)
    return b"\n".join(lines)


def mutate_yaml(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The tree of a YAML text three times out of four, its bytes otherwise."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng, others)
    try:
        tree = yaml.load(data.decode(), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    except (ValueError, yaml.YAMLError, RecursionError, TypeError, AttributeError, LookupError):
        return mutate_bytes(data, rng, others)
    tree = mutate_tree(tree, rng)
    try:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError, RecursionError, TypeError):
        return mutate_bytes(data, rng, others)


def mutate_safetensors(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The header as JSON with its length made right again; or another length, up to 2⁶⁴ − 1."""
    choice = rng.random()
    if choice < 0.2 or len(data) < 8:
        return mutate_bytes(data, rng, others)
    (length,) = struct.unpack("<Q", data[:8])
    if choice < 0.3:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 10**8 + 1, 2**60, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong % 2**64) + data[8:]
    header = mutate_json(data[8 : 8 + length], rng, others)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def headed(mutate: Mutator) -> Mutator:
    """For inputs whose first line says which file they are: it stays, and the rest changes."""

    def change(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
        head, _, body = data.partition(b"\n")
        return head + b"\n" + mutate(body, rng, [other.partition(b"\n")[2] for other in others])

    change.inner = mutate  # type: ignore[attr-defined]
    return change
