"""How a row of a data set becomes an example: one of several sets of columns, the names they have, a template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyshot.data_files import MISSING, Row, lookup
from manyshot.errors import DataError, suggestion
from manyshot.task_spec import TaskSpec

Message = dict[str, str]
# one of these sets of columns must be there, in this order of preference
FORMATS = (("messages",), ("prompt", "completion"), ("instruction", "output"), ("text",))
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.-]*)\}")


@dataclass(frozen=True)
class Example:
    """One example. `prompt` and `completion` are chat messages or plain strings; a `text` example has no prompt."""

    index: int  # row number in its source, from 0
    prompt: tuple[Message, ...] | str
    completion: tuple[Message, ...] | str
    choices: tuple[str, ...] = ()
    answer: int | str | None = None
    meta: Mapping[str, Any] | None = None
    source: str = ""  # where the row stands, in a split of several sources

    @property
    def place(self) -> str:
        return f"row {self.index + 1}" + (f" of {self.source}" if self.source else "")

    @property
    def completion_text(self) -> str:
        if isinstance(self.completion, str):
            return self.completion
        return "\n".join(message["content"] for message in self.completion)


def to_example(row: Row, index: int, spec: TaskSpec, where: str, names: Mapping[str, str] | None = None) -> Example:
    """Normalise one row of any accepted format; `names` take the place of the task's `columns`.

    Of the formats that a row has, the one with the most columns that the recipe names is taken, then the first.
    Raises DataError that says which columns are there.
    """
    names = spec.columns if names is None else names
    row = row | {ours: _column(row, theirs, where) for ours, theirs in names.items()}
    if spec.template is not None:
        row["prompt"] = _fill(spec.template, row, where)
    choices, answer = _choices(row, where)
    if choices and isinstance(answer, int) and not str(row.get("completion") or "").strip():
        row["completion"] = choices[answer]  # an empty one would train on nothing but the end of the text
    named = {*names, *(("prompt",) if spec.template is not None else ())}
    there = [columns for columns in FORMATS if all(row.get(column) is not None for column in columns)]
    if not there:
        raise DataError(
            f"{where}: no usable columns; it has {', '.join(sorted(row)) or 'none'}; needed are messages, or prompt "
            "and completion, or instruction and output, or text; map other names with 'columns'"
        )
    columns = max(there, key=lambda columns: len(named.intersection(columns)))
    prompt, completion = _prompt_and_completion(row, columns, where)
    if spec.system_prompt is not None:
        prompt = _with_system(prompt, spec.system_prompt)
    meta = row.get("meta")
    return Example(index, prompt, completion, choices, answer, meta if isinstance(meta, Mapping) else None)


def _choices(row: Row, where: str) -> tuple[tuple[str, ...], int | str | None]:
    """The choices that a row offers, and its answer: the index of the right one, or whatever it says."""
    found, answer = row.get("choices"), row.get("answer")
    if not isinstance(found, list | tuple | None):
        raise DataError(f"{where}: 'choices' must be a list, found {type(found).__name__}")
    choices = tuple(str(choice) for choice in found or ())
    if choices and not (isinstance(answer, int) and 0 <= answer < len(choices)):
        raise DataError(f"{where}: 'answer' must be an index into the {len(choices)} choices, found {answer!r}")
    return choices, answer if isinstance(answer, int | str) or answer is None else str(answer)


def _column(row: Row, name: str, where: str) -> object:
    value = lookup(row, name)
    if value is MISSING:
        raise DataError(f"{where}: no column '{name}'{suggestion(name, row)}")
    return value


def _fill(template: str, row: Row, where: str) -> str:
    """The template with each {column} replaced by the row's text; a list of texts gives one line each."""

    def text_of(match: re.Match[str]) -> str:
        value = _column(row, match[1], where)
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return "\n".join(value)
        if not isinstance(value, str | int | float):
            raise DataError(f"{where}: template: column '{match[1]}' is no text, but {type(value).__name__}")
        return str(value)

    return _PLACEHOLDER.sub(text_of, template)


def _prompt_and_completion(
    row: Row, columns: tuple[str, ...], where: str
) -> tuple[tuple[Message, ...] | str, tuple[Message, ...] | str]:
    if columns == ("messages",):
        messages = _messages(row["messages"], where, "messages")
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's, found role '{messages[-1]['role']}'")
        if len(messages) == 1:
            raise DataError(f"{where}: the assistant's message is the only one; it needs one before it to answer")
        return messages[:-1], messages[-1:]
    if columns == ("text",):
        return "", str(row["text"])
    if columns == ("instruction", "output"):
        extra = str(row.get("input") or "").strip()
        return f"{row['instruction']}\n\n{extra}" if extra else str(row["instruction"]), str(row["output"])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _messages(prompt, where, "prompt"), _messages(completion, where, "completion")
    return str(prompt), str(completion)


def _messages(value: object, where: str, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: '{column}' must be a list of messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise DataError(
                f"{where}: every message in '{column}' needs 'role' and a text 'content', found {message!r}"
            )
    return tuple({"role": str(message["role"]), "content": message["content"]} for message in value)


def _with_system(prompt: tuple[Message, ...] | str, text: str) -> tuple[Message, ...] | str:
    if isinstance(prompt, str):
        return ({"role": "system", "content": text}, {"role": "user", "content": prompt})
    return prompt if prompt[0]["role"] == "system" else ({"role": "system", "content": text}, *prompt)
