"""Test examples side by side: what was asked, what the data answers, what every model answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, Protocol

from manyshot.report_data import Answer, Details, Example, Role, mapping, number

# bytes of all prompts and answers of a page, as they stand in HTML; where there are more, the longest texts are cut
MOST_BYTES = 2_000_000
# examples of a page; where there are more, as of many runs of many tasks, each task shows fewer of them
MOST_EXAMPLES = 600

# model -> its role, and task -> the folder of its outputs.json
Answering = Mapping[str, tuple[Role, Mapping[str, Path]]]


class Read(Protocol):
    """Reads a JSON file, or nothing where it cannot be read."""

    def __call__(self, path: Path, *, expected: bool) -> dict[str, Any]: ...


def read_examples(
    asked: Mapping[str, Any], read: Read, tasks: Sequence[str], answering: Answering
) -> dict[str, list[Example]]:
    """Examples by task; `asked` is examples.json, which a run that began before prompts were kept does not have."""
    found = {}
    for task in tasks:
        kept = mapping(asked.get(task))
        outputs = {
            name: (role, _outputs(read(places[task] / "outputs.json", expected=False), task))
            for name, (role, places) in answering.items()
            if task in places
        }
        entries = kept.get("examples") if isinstance(kept.get("examples"), list) else []
        if entries:
            found[task] = [_example(mapping(one), i, str(kept.get("kind")), outputs) for i, one in enumerate(entries)]
    return found


def _outputs(found: Mapping[str, Any], task: str) -> list[Any]:
    value = found.get(task)
    return value if isinstance(value, list) else []


def _example(
    asked: Mapping[str, Any], position: int, kind: str, outputs: Mapping[str, tuple[Role, list[Any]]]
) -> Example:
    answers = []
    for name, (role, said) in outputs.items():
        one = mapping(said[position]) if position < len(said) else {}
        # the same place of the test split, unless the file is another run's
        if "output" in one and one.get("row") == asked.get("row"):
            text = answer_text(str(one["output"]), kind, asked.get("choices"))
            answers.append(Answer(name, role, text, number(one.get("score"))))
    row = asked.get("row")
    return Example(
        row=row if isinstance(row, int) else None,
        prompt=_messages(asked.get("prompt")),
        reference=str(asked.get("reference") or ""),
        answers=answers,
    )


def answer_text(output: str, kind: str, choices: object) -> str:
    """What a person reads: a generated text, the choice that is most likely, or the share of tokens foreseen."""
    if kind == "likelihood" and isinstance(choices, list) and output.isdigit() and int(output) < len(choices):
        return str(choices[int(output)])
    if kind == "teacher_forced":
        share = number(_float(output))
        return output if share is None else f"{share:.3f} of the reference's tokens are the model's own first choice"
    return output


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _messages(prompt: object) -> list[tuple[str, str]]:
    """(role, text) of a prompt; a plain text has no role."""
    if isinstance(prompt, list):
        return [(str(mapping(one).get("role") or ""), str(mapping(one).get("content") or "")) for one in prompt]
    return [("", str(prompt or ""))]


def fitted(details: Sequence[Details]) -> list[Details]:
    """The same, with so few examples and so short texts that all fit into a page: no text is longer than its share."""
    fewer = _fewer(details)
    texts = [text for one in fewer for found in one.examples.values() for example in found for text in _texts(example)]
    if sum(map(_num_bytes, texts)) <= MOST_BYTES:
        return fewer
    longest = MOST_BYTES // len(texts)
    return [
        replace(
            one, examples={task: [_cut(example, longest) for example in found] for task, found in one.examples.items()}
        )
        for one in fewer
    ]


def _fewer(details: Sequence[Details]) -> list[Details]:
    """The first examples of every task: all, or as many as leave room for those of the others, at least one."""
    tasks = sum(len(one.examples) for one in details)
    if sum(len(found) for one in details for found in one.examples.values()) <= MOST_EXAMPLES:
        return list(details)
    most = max(1, MOST_EXAMPLES // tasks)
    return [replace(one, examples={task: found[:most] for task, found in one.examples.items()}) for one in details]


def _num_bytes(text: str) -> int:
    """Its size in the page."""
    return len(escape(text).encode("utf-8", "replace"))


def _texts(example: Example) -> list[str]:
    return [*(text for _, text in example.prompt), example.reference, *(answer.text for answer in example.answers)]


def _cut(example: Example, longest: int) -> Example:
    def cut(text: str) -> str:
        size = _num_bytes(text)
        return text if size <= longest else f"{text[: longest * len(text) // size]} … ({len(text)} characters)"

    return replace(
        example,
        prompt=[(role, cut(text)) for role, text in example.prompt],
        reference=cut(example.reference),
        answers=[replace(answer, text=cut(answer.text)) for answer in example.answers],
    )
