"""As much of Go's text/template as a chat template needs, to see what one of ours says before Ollama does.

Actions: `.`, fields, `$` and variables, strings, numbers, `eq`, `and`, `len`, `slice`; `if`, `else if`, `else`,
`range`, `end`, `:=` and `=`. Everything else is an error, so nothing is ever rendered in another way than Go would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{((?:\"(?:\\.|[^\"\\])*\"|[^\"{}])*)\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|\d+|\$?\.[A-Za-z]\w*|\.|\$\w*|[A-Za-z]\w*|:=|=|,|\(|\))')
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda one, other: one == other,
    "and": lambda one, other: other if one else one,
    "len": len,
    "slice": lambda values, start: values[start:],
}


class GoTemplateError(ValueError):
    """A template that this reader does not know."""


@dataclass
class Node:
    """Literal text, an action, or a block with what is in it and in its else branch."""

    kind: str
    text: str
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def literal(text: str) -> str:
    """Text as it stands in a template; where a brace could be taken for an action's, as a string inside one."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{" in text else text


def render(template: str, data: Mapping[str, Any]) -> str:
    """What the template says of `data`. Raises GoTemplateError for what it does not know."""
    nodes = list(_lex(template))
    root, rest = _parse(nodes)
    if rest:
        raise GoTemplateError("'end' or 'else' without a block")
    return "".join(_run(root, data, {"$": data}))


def ollama_prompt(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a conversation: all system messages joined are .System, neighbours of one role are one."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    return render(template, {"System": system, "Messages": collated})


def _lex(template: str) -> Iterator[Node]:
    position = 0
    while (start := template.find("{{", position)) >= 0:
        if start > position:
            yield Node("text", template[position:start])
        match = ACTION.match(template, start)
        if match is None or match[1].startswith("-") or match[1].endswith("-"):
            raise GoTemplateError(f"not an action that is known: {template[start : start + 40]!r}")
        yield Node("action", match[1].strip())
        position = match.end()
    if position < len(template):
        yield Node("text", template[position:])


def _parse(nodes: list[Node]) -> tuple[list[Node], list[Node]]:
    """Nodes up to the `end` or `else` that closes them, and what follows from there on."""
    found: list[Node] = []
    while nodes:
        node, word = nodes[0], nodes[0].text.split(" ", 1)[0]
        if node.kind == "action" and word in ("end", "else"):
            return found, nodes
        nodes = nodes[1:]
        if node.kind == "action" and word in ("if", "range"):
            block, nodes = _parse_block(word, node.text[len(word) :], nodes)
            found.append(block)
        else:
            found.append(node)
    return found, []


def _parse_block(kind: str, condition: str, nodes: list[Node]) -> tuple[Node, list[Node]]:
    block = Node(kind, condition)
    block.body, nodes = _parse(nodes)
    if not nodes:
        raise GoTemplateError(f"'{kind}' without an end")
    closing, nodes = nodes[0].text, nodes[1:]
    if closing == "end":
        return block, nodes
    if closing.startswith("else if "):
        inner, nodes = _parse_block("if", closing[len("else if") :], nodes)
        block.otherwise = [inner]
        return block, nodes
    block.otherwise, nodes = _parse(nodes)
    if closing != "else" or not nodes or nodes[0].text != "end":
        raise GoTemplateError(f"'{kind}' without an end")
    return block, nodes[1:]


def _run(nodes: Sequence[Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if node.kind == "text":
            yield node.text
        elif node.kind == "if":
            yield from _run(
                node.body if _evaluate(_tokens(node.text), dot, variables) else node.otherwise, dot, variables
            )
        elif node.kind == "range":
            yield from _run_range(node, dot, variables)
        else:
            tokens = _tokens(node.text)
            if len(tokens) > 2 and tokens[1] in (":=", "="):
                variables[tokens[0]] = _evaluate(tokens[2:], dot, variables)
            else:
                yield str(_evaluate(tokens, dot, variables))


def _run_range(node: Node, dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    tokens, names = _tokens(node.text), []
    if ":=" in tokens:
        at = tokens.index(":=")
        names, tokens = [token for token in tokens[:at] if token != ","], tokens[at + 1 :]
    values = _evaluate(tokens, dot, variables)
    for position, value in enumerate(values):
        variables |= dict(zip(names, (position, value) if len(names) == 2 else (value,), strict=False))
        yield from _run(node.body, value, variables)
    if not values:
        yield from _run(node.otherwise, dot, variables)


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    text = text.strip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise GoTemplateError(f"cannot be read: {text[position:]!r}")
        found.append(match[1])
        position = match.end()
    return found


def _evaluate(tokens: list[str], dot: Any, variables: Mapping[str, Any]) -> Any:
    value, rest = _command(tokens, dot, variables)
    if rest:
        raise GoTemplateError(f"too many words: {' '.join(rest)}")
    return value


def _command(tokens: list[str], dot: Any, variables: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A function with its operands, or one operand."""
    if not tokens:
        raise GoTemplateError("an empty action")
    if tokens[0] not in FUNCTIONS:
        return _operand(tokens, dot, variables)
    function, tokens, operands = FUNCTIONS[tokens[0]], tokens[1:], []
    while tokens and tokens[0] != ")":
        operand, tokens = _operand(tokens, dot, variables)
        operands.append(operand)
    return function(*operands), tokens


def _operand(tokens: list[str], dot: Any, variables: Mapping[str, Any]) -> tuple[Any, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        value, rest = _command(rest, dot, variables)
        if not rest or rest[0] != ")":
            raise GoTemplateError("a bracket is not closed")
        return value, rest[1:]
    if token.startswith('"'):
        return json.loads(token), rest
    if token.isdecimal():
        return int(token), rest
    name, _, attribute = token.partition(".")
    if name and name not in variables:
        raise GoTemplateError(f"unknown: {name}")
    holder = variables[name] if name else dot
    if attribute and attribute not in holder:
        raise GoTemplateError(f"no field {token}")
    return (holder[attribute] if attribute else holder), rest
