"""The one reader of YAML: plain values out of text that may come from anyone, or a YAMLError.

YAML can say in a few lines what would fill the memory (aliases of aliases, merge keys of merge keys), nest deeper than
the parser can follow, and name types to be built. Text, depth and what aliases stand for are bounded here, and a value
that its type cannot hold (a date of month 13, a number of thousands of digits) is an error like every other.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# a recipe with every default written out has 400 bytes for a task; the parser reads about 150 kB in a second
MAX_CHARACTERS = 300_000
MAX_DEPTH = 40
# brackets that stand open at once, before anything is parsed: the parser's time grows with their square
MAX_OPEN = 400
# values and keys, those behind every alias counted each time it stands somewhere
MAX_NODES = 100_000
_HALVES = re.compile("[\ud800-\udfff]")
_BRACKETS = re.compile(r"[][{}]")


def read_yaml(text: str) -> Any:
    """The value of a YAML text with one document. Raises yaml.YAMLError for everything that cannot be read or used."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"the text has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    if _most_open(text) > MAX_OPEN:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _Size().measure(root)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # what the constructors of numbers, dates and the like let through
        raise yaml.YAMLError(f"holds a value that cannot be read ({error})") from None


def _most_open(text: str) -> int:
    """The most brackets that are open at one place, those inside of words and quotes included."""
    now = most = 0
    for found in _BRACKETS.finditer(text):
        now = now + 1 if found[0] in "[{" else max(now - 1, 0)
        most = max(most, now)
    return most


class _Size:
    """How many values a document stands for, without making them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """(values, levels) of a node and of all below it. Raises YAMLError where there are too many, or no end."""
        if id(node) in self._known:
            return self._known[id(node)]
        if id(node) in self._open:
            raise yaml.YAMLError(f"an alias stands inside of what it names{_place(node)}")
        if isinstance(node, yaml.ScalarNode) and _HALVES.search(node.value):
            raise yaml.YAMLError(f"holds half a character (\\ud800 to \\udfff), which no file can{_place(node)}")
        self._open.add(id(node))
        count, levels = 1, 0
        for part in _parts(node):
            below = self.measure(part)
            count, levels = count + below[0], max(levels, below[1])
            if count > MAX_NODES:
                raise yaml.YAMLError(f"its aliases stand for more than {MAX_NODES} values{_place(node)}")
            if levels >= MAX_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep{_place(node)}")
        self._open.discard(id(node))
        self._known[id(node)] = count, levels + 1
        return self._known[id(node)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _place(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}"
