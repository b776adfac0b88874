"""`manyshot init`: a commented recipe, generated from the recipe's own declarations, so that it cannot go stale."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from manyshot.errors import RecipeError, suggestion
from manyshot.executor_spec import LocalExecution
from manyshot.keep_spec import Keep
from manyshot.operators import Metis
from manyshot.presets import OPERATOR, PRESET_HELP, PRESETS, UNASKED, filled
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, TaskSpec
from manyshot.tracker_spec import Trackers

HEAD = """\
# A recipe for manyshot: `manyshot validate` checks it, `manyshot plan` says its cost, `manyshot run` runs it.
# Every key below stands at its default; delete what you do not change. A key after a # does nothing beside the others.
# Paths are seen from this file's folder.

model: demo:smollm2-135m-instruct    # or a Hub id, a local model folder, a .gguf file

# Two tasks or more. A row has messages, or prompt + completion, or instruction + input + output, or text.
tasks:
  math: {data: "demo:math", metric: exact_match}
  safety: {data: "demo:safety", metric: refusal}
  # own:
  #   train: data/own.train.jsonl          # validation and test are cut from it by the seed when not given
  #   metric: exact_match                  # exact_match, choice_accuracy, instruction_checks, refusal
  #   columns: {prompt: question, completion: answer}
"""


def starter_recipe(preset: str = UNASKED) -> str:
    """The text of a recipe that validates as it is, with the settings of a preset. Raises RecipeError for no preset."""
    if preset not in PRESETS:
        raise RecipeError(f"preset '{preset}': there is none of that name{suggestion(preset, PRESETS)}")
    settings = filled({"preset": preset, "operator": OPERATOR})
    # what would ask for another form of METIS, if it were said
    silent = [key for fill in PRESETS[preset] if fill.section == "operator" for key in fill.unless]
    parts = [HEAD, "# further keys of a task:", *_comment(_keys(TaskSpec, skip=("data", "metric")), "  # ")]
    parts += ["", f"preset: {preset}".ljust(44) + f"# {PRESET_HELP}"]
    parts += ["", "protocol:", *_lines(Protocol)]
    parts += ["", "operator:", *_operator_lines(Metis(**settings["operator"]), silent)]
    parts += [
        "",
        "overrides: {}".ljust(44) + "# by tensor name: {'*.mlp.*': {scaling: 0.5}}; the last pattern that fits wins",
    ]
    for name, section in (
        ("merge", Merge),
        ("local_update", LocalUpdate),
        ("evaluation", Evaluation),
        ("trackers", Trackers),
        ("executor", LocalExecution),
        ("keep", Keep),
    ):
        parts += ["", f"{name}:", *_lines(section, settings.get(name, {}))]
    return "\n".join([*parts, "", "seed: 0", ""])


def _lines(section: type[BaseModel], settings: Mapping[str, Any] | None = None) -> list[str]:
    return [f"  {line}" for line in _keys(section, settings=settings)]


def _keys(section: type[BaseModel], skip: tuple[str, ...] = (), settings: Mapping[str, Any] | None = None) -> list[str]:
    """`key: default    # description` for every key of a section; in place of defaults, `settings`."""
    lines = []
    for name, field in section.model_fields.items():
        if name in skip:
            continue
        default = (settings or {}).get(name, field.get_default(call_default_factory=True))
        shown = "" if default is PydanticUndefined else _yaml(default)
        lines.append(
            f"{name}: {shown}".ljust(44) + f"# {field.description}" if field.description else f"{name}: {shown}"
        )
    return lines


def _operator_lines(operator: Metis, silent: Collection[str]) -> list[str]:
    lines = []
    for field in dataclasses.fields(operator):
        line = f"  {'# ' if field.name in silent else ''}{field.name}: {_yaml(getattr(operator, field.name))}"
        note = field.metadata.get("description")
        lines.append(line.ljust(46) + f"# {note}" if note else line)
    return lines


def _comment(lines: list[str], prefix: str) -> list[str]:
    return [prefix + line for line in lines]


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, which for these is JSON without the quotes around words."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return text.replace('"', "")
