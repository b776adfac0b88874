"""A tokenizer's chat template as Ollama's: found from what it makes of a few conversations, and checked on others.

A template that puts every message between fixed texts, such as ChatML, Llama 3, Gemma, Mistral and Qwen do, is written
down as Go template; one that does anything else is not, since a wrong template is worse than none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from manyshot.go_template import GoTemplateError, literal, ollama_prompt

Messages = list[dict[str, str]]
Render = Callable[..., str]

# what Llama 3's templates write where no date is given; today's would be in the Modelfile for ever
DATE = "26 Jul 2024"
SYSTEM, USER, ANSWER, AGAIN = "SystemText", "FirstQuestion", "FirstAnswer", "SecondQuestion"
# texts that belong together: marks such as <|im_end|> and [/INST], white space, words
UNIT = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|\s|[^<\[\s]+|.", re.DOTALL)
FAMILIES = {
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3",
    "<start_of_turn>": "Gemma",
    "[INST]": "Mistral",
    "<|user|>": "Phi or Zephyr",
}


class UnknownTemplate(ValueError):
    """A chat template that is not messages between fixed texts; says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """Ollama's template for a model, or why there is none; what to know of it; what ends an answer."""

    family: str | None = None
    text: str | None = None
    notes: tuple[str, ...] = ()
    reason: str | None = None
    stop: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, "text": self.text, "notes": list(self.notes), "reason": self.reason}


@dataclass(frozen=True)
class Shape:
    """The fixed texts before and after each message. `system_in`: its own turn, or inside a user's message."""

    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    system: tuple[str, str]
    system_in: Literal["turn", "first", "last", "nowhere"]


def find_template(tokenizer: Any) -> ChatTemplate:
    """Ollama's template for the tokenizer's chat template; without text where that is not one of fixed texts."""
    if not tokenizer.chat_template:
        return ChatTemplate(reason="the tokenizer has no chat template")
    try:
        render, notes = _renderer(tokenizer)
        shape, more = _find_shape(render)
        text = go_text(shape)
        _check(text, render, with_system=_takes_system(render))
    except (UnknownTemplate, GoTemplateError) as error:
        return ChatTemplate(reason=str(error))
    notes += more
    padded = [{"role": "user", "content": "  padded\n"}]
    if _try(render, padded) != ollama_prompt(text, padded):
        notes.append("the model's template strips white space around messages; Ollama's cannot, so send none")
    if '"""' in text:
        return ChatTemplate(reason='it holds """, which ends a text in a Modelfile')
    family = next((name for mark, name in FAMILIES.items() if mark in "".join(shape.user)), "its own")
    ends = UNIT.findall(shape.assistant[1].strip())
    stop = ends[0] if ends and ends[0][0] in "<[" and len(ends[0]) > 1 else None
    return ChatTemplate(family, text, tuple(notes), stop=stop)


def _renderer(tokenizer: Any) -> tuple[Render, list[str]]:
    """The prompt of a conversation as text, without the first token where Ollama's tokenizer adds that itself."""
    source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
    notes = []
    if "strftime_now" in source and "date_string" not in source:
        raise UnknownTemplate("it writes today's date")
    if "date_string" in source:
        notes.append(f"the model's template writes today's date; here it is always {DATE}, the template's own default")
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(messages: Messages, *, generation: bool = True) -> str:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, date_string=DATE
        )
        if not isinstance(text, str):
            raise UnknownTemplate("it does not give a text")
        return text.removeprefix(bos) if adds_bos else text

    return render, notes


def _try(render: Render, messages: Messages, *, generation: bool = True) -> str | None:
    """The rendered conversation; None where the template refuses it."""
    try:
        text: str = render(messages, generation=generation)
    except UnknownTemplate:
        raise
    except Exception:  # noqa: BLE001 - a template is a program, and may fail in any way
        return None
    return text


def _talk(*texts: str, system: str = "") -> Messages:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def _takes_system(render: Render) -> bool:
    return _try(render, _talk(USER, system=SYSTEM)) is not None


# ---- from what it says to the texts it is made of --------------------------------------------------------------------


def _find_shape(render: Render) -> tuple[Shape, list[str]]:
    """The fixed texts, and what to know of them. Raises UnknownTemplate."""
    short = _try(render, _talk(USER))
    long = _try(render, _talk(USER, ANSWER, AGAIN))
    if short is None or long is None:
        raise UnknownTemplate("it refuses a plain conversation of user and assistant")
    before, after = _split(short, USER)
    first, between, back, last = _split(long, USER, ANSWER, AGAIN)
    if (first, last) != (before, after):
        raise UnknownTemplate("what stands around a message depends on the rest of the conversation")
    # without the request for an answer, a conversation ends where a message does
    ended = _end(render, _talk(USER), USER)
    close_user = _common(_common(between, after), ended) if ended else _common(between, after)
    ended = _end(render, _talk(USER, ANSWER), ANSWER)
    rest = back[len(_common(back, ended)) :] if ended else back
    open_user = _common(before, rest, from_end=True)
    shape = Shape(
        opening=before.removesuffix(open_user),
        user=(open_user, close_user),
        assistant=(between.removeprefix(close_user), back.removesuffix(open_user)),
        generation=after.removeprefix(close_user),
        system=("", ""),
        system_in="nowhere",
    )
    return _with_system(render, shape)


def _with_system(render: Render, shape: Shape) -> tuple[Shape, list[str]]:
    """The shape with what the template does with a system message."""
    text = _try(render, _talk(USER, system=SYSTEM))
    before = shape.opening + shape.user[0]
    if text is None:
        note = "the model's template refuses system messages; here one stands before the first user's"
        return _replace(shape, ("", "\n\n"), "first"), [note]
    if SYSTEM not in text:
        return shape, ["the model's template leaves system messages out, and so does this one"]
    ahead, between, after = _split(text, SYSTEM, USER)
    if after != shape.user[1] + shape.generation:
        raise UnknownTemplate("a system message changes what follows the question")
    if not (before and ahead.startswith(before)):
        if not between.endswith(shape.user[0]):
            raise UnknownTemplate("a system message changes what opens the question")
        return _replace(shape, (ahead, between.removesuffix(shape.user[0])), "turn"), []
    inside = (ahead.removeprefix(before), between)
    long = _try(render, _talk(USER, ANSWER, AGAIN, system=SYSTEM))
    if long is None or SYSTEM not in long:
        raise UnknownTemplate("it refuses a longer conversation with a system message")
    return _replace(shape, inside, "first" if long.index(SYSTEM) < long.index(USER) else "last"), []


def _replace(shape: Shape, system: tuple[str, str], where: Literal["turn", "first", "last"]) -> Shape:
    return Shape(shape.opening, shape.user, shape.assistant, shape.generation, system, where)


def _split(text: str, *marks: str) -> list[str]:
    """The texts around the marks, each of which must stand there once, in this order."""
    found = []
    for mark in marks:
        if text.count(mark) != 1:
            raise UnknownTemplate("it does not say every message once, in order")
        ahead, _, text = text.partition(mark)
        found.append(ahead)
    return [*found, text]


def _end(render: Render, messages: Messages, last: str) -> str | None:
    """What follows the last message when no answer is asked for."""
    text = _try(render, messages, generation=False)
    return text.rpartition(last)[2] if text is not None and last in text else None


def _common(one: str, other: str, *, from_end: bool = False) -> str:
    """The longest common beginning (or end) that cuts no mark and no word in two."""
    units = [UNIT.findall(text) for text in (one, other)]
    pairs = zip(*(reversed(unit) if from_end else unit for unit in units), strict=False)
    same = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return "".join(reversed(same) if from_end else same)


# ---- the Go template -------------------------------------------------------------------------------------------------


def go_text(shape: Shape) -> str:
    """The shape as Ollama writes templates; messages of other roles, such as tools, are left out."""
    open_system, close_system = (literal(text) for text in shape.system)
    opening = literal(shape.opening)
    ask = "{{ .Content }}"
    loop = "range .Messages"
    if shape.system_in == "turn":
        opening = (
            f"{{{{ if .System }}}}{open_system}{{{{ .System }}}}{close_system}{{{{ else }}}}{opening}{{{{ end }}}}"
            if opening
            else f"{{{{ if .System }}}}{open_system}{{{{ .System }}}}{close_system}{{{{ end }}}}"
        )
    elif shape.system_in == "first":
        opening += "{{ $system := .System }}"
        ask = (
            f'{{{{ if $system }}}}{open_system}{{{{ $system }}}}{close_system}{{{{ $system = "" }}}}{{{{ end }}}}{ask}'
        )
    elif shape.system_in == "last":
        loop = "range $i, $message := .Messages"
        condition = "and $.System (eq (len (slice $.Messages $i)) 1)"
        ask = f"{{{{ if {condition} }}}}{open_system}{{{{ $.System }}}}{close_system}{{{{ end }}}}{ask}"
    (open_user, close_user), (open_answer, close_answer) = (
        tuple(literal(text) for text in pair) for pair in (shape.user, shape.assistant)
    )
    return (
        f'{opening}{{{{ {loop} }}}}{{{{ if eq .Role "user" }}}}{open_user}{ask}{close_user}'
        f'{{{{ else if eq .Role "assistant" }}}}{open_answer}{{{{ .Content }}}}{close_answer}{{{{ end }}}}{{{{ end }}}}'
        f"{literal(shape.generation)}"
    )


def probes(*, with_system: bool) -> list[Messages]:
    """Conversations to compare on: longer ones, of several lines, with the signs that templates are made of."""
    texts = ("Why?", 'Since\n\n{"a": [1, 2]} and {{ x }} say so.', "<b>Who</b> says \\n?", "I do.", "Et toi, là-bas?")
    found = [_talk(*texts[:count], system=system) for system in ("", "Be kind.\nBe brief.") for count in (1, 3, 5)]
    return found if with_system else found[:3]


def _check(text: str, render: Render, *, with_system: bool) -> None:
    """Ollama's prompt is the tokenizer's, to the character, for every probe. Raises UnknownTemplate."""
    for messages in probes(with_system=with_system):
        if _try(render, messages) != ollama_prompt(text, messages):
            raise UnknownTemplate("messages are not put between fixed texts alone")


# ---- the Modelfile ---------------------------------------------------------------------------------------------------

# generation settings: transformers' name -> Ollama's
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(sources: Sequence[str], template: ChatTemplate, generation: dict[str, Any], stops: Sequence[str]) -> str:
    """A Modelfile: where the weights are, the template or why there is none, generation settings, ends of an answer."""
    lines = [*sources]
    if template.text is None:
        lines.append(f"# no TEMPLATE: {template.reason}; Ollama then takes the one in the GGUF file, if it knows it")
    else:
        lines += [f"# {note}" for note in template.notes]
        lines.append(f'TEMPLATE """{template.text}"""')
    if generation.get("do_sample") is False:
        lines.append("PARAMETER temperature 0")
    else:
        known = {name: generation.get(key) for key, name in SETTINGS.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in known.items() if _is_number(value)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and "\n" not in stop]
    return "\n".join(lines) + "\n"


def _is_number(value: object) -> bool:
    """Whether a setting of a base's file may stand in a Modelfile: a text could bring lines of its own."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
