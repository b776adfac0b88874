"""Pages about the keys of recipe files, and the operators' tables of settings: made from their declarations."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from manyshot.benchmark_spec import Benchmark, Harness
from manyshot.compare_recipe import CompareRecipe, Method, TaskSet, Tuning
from manyshot.executor_spec import LocalExecution, RayExecution
from manyshot.keep_spec import Keep
from manyshot.merge_recipe import ExpertSpec, MergeRecipe
from manyshot.operators import BUILT_IN, Operator
from manyshot.presets import OPERATOR, PRESETS, UNASKED
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, Recipe, SourceSpec, TaskSpec
from manyshot.tracker_spec import Trackers
from manyshot.tune_recipe import Range, Search, TuneRecipe

Kind = type[BaseModel]
# heading -> what it declares, page by page; a section stands on the first page that has it
RECIPE: dict[str, Kind] = {
    "The file": Recipe,
    "tasks.<name>": TaskSpec,
    "A source": SourceSpec,
    "protocol": Protocol,
    "merge": Merge,
    "local_update": LocalUpdate,
    "evaluation": Evaluation,
    "trackers": Trackers,
    "executor: local": LocalExecution,
    "executor: ray": RayExecution,
    "keep": Keep,
}
MERGE: dict[str, Kind] = {"The file": MergeRecipe, "experts.<name>": ExpertSpec}
COMPARE: dict[str, Kind] = {
    "The file": CompareRecipe,
    "task_sets.<name>": TaskSet,
    "methods.<name>": Method,
    "tuning": Tuning,
    "benchmarks.<name>": Benchmark,
    "harness": Harness,
}
TUNE: dict[str, Kind] = {"search": Search, "A range": Range}

MADE = "<!-- made by docs/generate.py; change the descriptions where the keys are declared, in src/manyshot -->\n"
LEADS = {
    "recipe": (
        "Keys of a recipe",
        "What `manyshot run` takes, key by key, as the code declares it. `manyshot init` writes a file with all of "
        "them at their defaults. Every key can be given on the command line too, `protocol.rounds=3`. An unknown key "
        "is an error that says which ones there are.",
    ),
    "merge_recipe": (
        "Keys of a merge",
        "What `manyshot merge FILE` takes ([merge.md](../merge.md)), as the code declares it.",
    ),
    "compare_recipe": (
        "Keys of a comparison",
        "What `manyshot compare` takes ([compare.md](../compare.md)), as the code declares it. The sections `tasks`, "
        "`protocol`, `merge`, `local_update` and `evaluation` are those of [a recipe](recipe.md).",
    ),
    "tune_recipe": (
        "Keys of a search",
        "What `manyshot tune` takes ([tune.md](../tune.md)): all keys of [a recipe](recipe.md), and one more section.",
    ),
}
PAGES = {"recipe": RECIPE, "merge_recipe": MERGE, "compare_recipe": COMPARE, "tune_recipe": TUNE}
COMMON = {"tasks": "tasksname", "retention": "tasksname"} | {
    name: name for name in ("protocol", "merge", "local_update", "evaluation")
}


def key_pages() -> dict[str, str]:
    """Name of a page in docs/reference -> its text."""
    return {f"{name}.md": _page(name) for name in PAGES}


def _page(name: str) -> str:
    title, lead = LEADS[name]
    parts = [MADE, f"# {title}\n", lead + "\n"]
    for heading, kind in PAGES[name].items():
        shown = heading if " " in heading else f"`{heading}`"
        parts += [f"## {shown}\n", f"{first_line(kind)}\n", *_key_table(kind, name)]
        if heading == "protocol" and name == "recipe":
            parts += _operator_sections()
    if name == "tune_recipe":
        parts += ["All other keys are in [a recipe's page](recipe.md).\n"]
    return "\n".join(parts)


def _operator_sections() -> Iterable[str]:
    yield "## `operator`\n"
    yield (
        "One of the names below, alone (`operator: mean`) or with settings. A setting that is marked *per round* also "
        "takes a list with one value per round. What each operator does, and when to use it, is on its page.\n"
    )
    for name, kind in BUILT_IN.items():
        yield f"### `{name}`\n"
        yield f"[What it does](../operators/{name}.md).\n"
        yield parameter_table(kind)
    yield "## `overrides`\n"
    yield (
        "Other settings, or another operator, for tensors whose name fits a pattern: "
        "[how it works](../operators.md#overrides).\n"
    )


def parameter_table(kind: type[Operator]) -> str:
    """An operator's settings: default, range, whether one per round, meaning."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rows, preset = [], filled_in("operator") if kind is BUILT_IN[OPERATOR] else {}
    for field in dataclasses.fields(kind):
        if field.name == "name":
            continue
        default = _default(field.default)
        if field.name in preset:
            default = f"{_default(preset[field.name])} (paper: {default})"
        options = list(_options(hints[field.name]))
        whole = any(get_origin(one) is tuple for one, _ in options)
        words = ", or ".join(
            dict.fromkeys(_words(one, limits) for one, limits in options if get_origin(one) is not tuple)
        )
        rows.append((f"`{field.name}`", default, words, "yes" if whole else "no", field.metadata["description"]))
    if not rows:
        return "It has no settings.\n"
    return table(("parameter", "default", "range", "per round", "meaning"), rows)


def filled_in(section: str) -> dict[str, Any]:
    """What the preset `default` fills in, in one section."""
    return {key: value for fill in PRESETS[UNASKED] if fill.section == section for key, value in fill.values.items()}


def preset_table() -> str:
    """What is other in the two presets, key by key, and why."""
    declared = {
        "operator": {field.name: field.default for field in dataclasses.fields(BUILT_IN[OPERATOR])},
        "merge": {name: field.default for name, field in Merge.model_fields.items()},
        "local_update": {name: field.default for name, field in LocalUpdate.model_fields.items()},
    }
    rows = []
    for fill in PRESETS[UNASKED]:
        for i, (key, value) in enumerate(fill.values.items()):
            why = fill.why if i == 0 else "as above"
            rows.append((f"`{fill.section}.{key}`", _default(value), _default(declared[fill.section][key]), why))
    return table(("key", "`preset: default`", "`preset: paper`", "why"), rows)


def _key_table(kind: Kind, page: str) -> Iterable[str]:
    rows = []
    preset = filled_in({Merge: "merge", LocalUpdate: "local_update"}.get(kind, ""))
    for name, field in kind.model_fields.items():
        if kind is TuneRecipe and name in Recipe.model_fields:
            continue
        with_metis = f"; with `{OPERATOR}` {_default(preset[name])}" if name in preset else ""
        rows.append((f"`{name}`", _default_of(field) + with_metis, values(field), describe(name, field, page)))
    yield table(("key", "default", "values", "meaning"), rows)


def describe(name: str, field: FieldInfo, page: str = "recipe") -> str:
    """What a key means: its own description, or that of the section that it holds. Raises ValueError without one."""
    section = _section(field.annotation)
    text = field.description or (first_line(section).rstrip(".") if section else None)
    if not text:
        raise ValueError(f"key '{name}' has no description where it is declared")
    if name == "operator" and section is None:
        link = "#operator" if page == "recipe" else "recipe.md#operator"
        return f"{text}; [the operators]({link})"
    own = next((heading for heading, kind in PAGES[page].items() if kind is section), None)
    if own is not None and section is not None:
        return f"{text}; [below](#{anchor(own)})"
    if page == "compare_recipe" and name in COMMON:
        return f"{text}; [keys](recipe.md#{COMMON[name]})"
    return text


def anchor(heading: str) -> str:
    """The fragment of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().split("\n")[0]


# ---- values in words -------------------------------------------------------------------------------------------------


def values(field: FieldInfo) -> str:
    """What a key may hold, in words."""
    options = list(_options(field.annotation, tuple(field.metadata)))
    return ", or ".join(dict.fromkeys(_words(one, limits) for one, limits in options)) or "nothing"


def _options(annotation: Any, limits: tuple[Any, ...] = ()) -> Iterable[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a declared type, each with its limits; None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        found = [part for one in more for part in (one.metadata if isinstance(one, FieldInfo) else [one])]
        yield from _options(inner, (*limits, *found))
    elif origin in (typing.Union, types.UnionType):
        for one in get_args(annotation):
            yield from _options(one, limits)
    elif annotation is not type(None):
        yield annotation, limits


def _words(kind: Any, limits: tuple[Any, ...]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin is tuple:
        inner = ", or ".join(dict.fromkeys(_words(one, more) for one, more in _options(arguments[0])))
        fewest = next((one.min_length for one in limits if isinstance(one, MinLen)), 0)
        return f"list of {inner}" + (f", {fewest} or more" if fewest > 1 else "")
    if kind is int:
        return f"whole number {_bounds(limits)}".strip()
    if kind is float:
        return _bounds(limits) or "number"
    return next(
        text for base, text in NAMES.items() if base is origin or (isinstance(kind, type) and issubclass(kind, base))
    )


# what other types are called
NAMES: dict[type, str] = {
    bool: "`true`, `false`",
    str: "text",
    dict: "mapping",
    list: "list",
    BaseModel: "section",
    Operator: "operator",
    object: "any",
}


# limits that keep numbers finite, and say nothing of the setting
UNBOUNDED = (float("inf"), 2**53)


def _bounds(limits: tuple[Any, ...]) -> str:
    signs = ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))
    found = [
        f"{sign} {getattr(one, name):g}"
        for kind, name, sign in signs
        for one in limits
        if isinstance(one, kind) and getattr(one, name) not in UNBOUNDED
    ]
    return ", ".join(found)


def _section(annotation: Any) -> Kind | None:
    """The section that a key holds, be it one, or one for each name, or a list of them."""
    for kind, _ in _options(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        if get_origin(kind) in (dict, tuple) and (
            found := _section(get_args(kind)[-1 if get_origin(kind) is dict else 0])
        ):
            return found
    return None


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _default(field.get_default(call_default_factory=True))


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "–"
    if isinstance(value, BaseModel):
        return "see there"
    if isinstance(value, Operator):
        return f"`{value.name}`"
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False).replace('"', "")
    return f"`{text}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars and angle brackets inside a cell are written so that they stay what they are."""
    lines = [list(head), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    parts = text.split("`")  # what stands between two back-ticks is code already
    return "`".join(
        part if i % 2 else re.sub(r"<(?=[A-Za-z/!])", "&lt;", part) for i, part in enumerate(parts)
    ).replace("|", "\\|")
