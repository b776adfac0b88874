"""What is wrong with a recipe file, as lines that name file and line, key, what was found and what is allowed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from manyshot.benchmark_spec import Benchmark
from manyshot.compare_recipe import Method, TaskSet
from manyshot.errors import suggestion
from manyshot.executor_spec import EXECUTORS
from manyshot.merge_recipe import ExpertSpec
from manyshot.operators import OPERATORS
from manyshot.recipe import Recipe, SourceSpec, TaskSpec
from manyshot.tune_recipe import Range

# sections that hold one entry per name: their entries' declaration, and which of their keys are paths
NAMED: dict[str, tuple[type[BaseModel], tuple[str, ...]]] = {
    "tasks": (TaskSpec, ("data", "train", "validation", "test", "expert")),
    "retention": (TaskSpec, ("data", "train", "validation", "test", "expert")),
    "experts": (ExpertSpec, ("path", "validation")),
    "benchmarks": (Benchmark, ("data",)),
    "methods": (Method, ()),
    "task_sets": (TaskSet, ()),
}

Key = tuple[str | int, ...]


@dataclass
class Source:
    """Where the raw values came from, to say file and line in an error."""

    file: str
    lines: dict[Key, int] = field(default_factory=dict)
    overridden: set[Key] = field(default_factory=set)

    def place(self, key: Key) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.overridden:
                return "command line"
            if key[:length] in self.lines:
                return f"{self.file}:{self.lines[key[:length]]}"
        return self.file


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def explain(details: Mapping[str, Any], raw: dict[str, Any], source: Source, root: type[BaseModel]) -> list[str]:
    """One pydantic error as lines of `place: key: message`."""
    if details["type"] == "cross":
        found_problems = [(_split(key, raw), text) for key, text in details["ctx"]["problems"]]
        return [f"{source.place(key)}: {dotted(key)}: {text}" for key, text in found_problems]
    key = _real_key(details["loc"], raw)
    kind, message = details["type"], details["msg"]
    found = f", found {details['input']!r}" if isinstance(details["input"], str | int | float | bool) else ""
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        message, found = f"unknown key{suggestion(str(key[-1]), _allowed(key[:-1], raw, root))}", ""
    elif kind == "union_tag_invalid":
        tag, executor = details["ctx"]["tag"], key[:1] == ("executor",)
        names: Iterable[str] = EXECUTORS if executor else OPERATORS
        message, found = f"unknown {'executor' if executor else 'operator'} '{tag}'{suggestion(tag, names)}", ""
    elif kind == "union_tag_not_found":
        message = f"needs 'name'; there are: {', '.join(sorted(OPERATORS))}"
    elif kind == "string_pattern_mismatch" and key[:1] and key[0] in (*NAMED, "models"):
        what = "a task name" if key[0] == "tasks" else "a name"
        message, found = f"{what} starts with a letter or digit and holds only letters, digits, '_', '-', '.'", ""
    elif kind in ("starved", "micro_batch", "task_data"):
        found = ""
    return [f"{source.place(key)}: {dotted(key)}: {message}{found}"]


def _split(name: str, raw: object) -> Key:
    """The parts of a dotted key that stand in the file: names of tasks, and patterns, may have dots of their own."""
    parts, key, node = name.split("."), [], raw
    while parts:
        names = node if isinstance(node, dict) else {}
        length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in names), 1)
        name, parts = ".".join(parts[:length]), parts[length:]
        key.append(name)
        node = names.get(name)
    return tuple(key)


def one_per_key(error: ValidationError, raw: dict[str, Any]) -> list[Any]:
    """One error for each key: a value that may be of several types fails for each of them."""
    by_key: dict[Key, Any] = {}
    for details in error.errors(include_url=False):
        first = by_key.setdefault(_real_key(details["loc"], raw), dict(details))
        if details is not first and details["type"] == "literal_error" and first["type"] != "literal_error":
            first["msg"] += f", or {details['ctx']['expected']}"
    return list(by_key.values())


def _real_key(location: Sequence[str | int], raw: object) -> Key:
    """Drop what pydantic adds to a location (union tags, '[key]') and keep what stands in the file."""
    key: list[str | int] = []
    node: Any = raw
    for i, part in enumerate(location):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            key.append(part)
            node = node[part]
        elif i == len(location) - 1 and part != "[key]" and isinstance(node, dict):
            key.append(part)  # a missing key: name it
    return tuple(key)


def _allowed(section: Key, raw: dict[str, Any], root: type[BaseModel]) -> list[str]:
    """The keys that a section of the recipe may have."""
    if section[-1:] == ("operator",):
        node: Any = raw
        for part in section:
            node = node[part]
        name = node.get("name")
        known = isinstance(name, str) and name in OPERATORS
        return [field.name for field in dataclasses.fields(OPERATORS[name])] if known else ["name"]
    if section[:1] == ("executor",):
        chosen = raw["executor"].get("name", "local") if isinstance(raw["executor"], dict) else raw["executor"]
        return list(EXECUTORS[chosen].model_fields)
    if section[:2] == ("search", "parameters"):
        return list(Range.model_fields)
    if section[:1] == ("methods",):
        root, section = Method, section[2:]
    if len(section) == 2 and section[0] in NAMED:
        return list(NAMED[str(section[0])][0].model_fields)
    if section[:1] in (("tasks",), ("retention",)):  # a source of one of a task's splits
        return list(SourceSpec.model_fields)
    model = root
    for part in section:
        annotation = model.model_fields[str(part)].annotation
        options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)


def cross_problems_of_broken(raw: dict[str, Any], source: Source, error: ValidationError) -> list[str]:
    """Cross-section problems of a recipe that also fails elsewhere, so that all errors come at once.

    What is broken is left out, so that its default takes its place; what then still does not fit is a problem of its
    own, unless it may come from a default that stands for a broken value.
    """
    kept = copy.deepcopy({key: value for key, value in raw.items() if key in Recipe.model_fields})
    removed = {_real_key(details["loc"], raw) for details in error.errors(include_url=False)}
    tasks = kept.get("tasks")
    if not isinstance(tasks, dict) or any(details["type"] == "cross" for details in error.errors(include_url=False)):
        return []
    num_tasks = len(tasks)
    for key in removed:
        _leave_out(kept, key)
    if any(key[:1] == ("tasks",) for key in removed):
        kept["tasks"] = {f"task{i}": {"data": "unknown"} for i in range(num_tasks)}
    kept["model"] = "unknown"
    try:
        Recipe.model_validate(kept)
    except ValidationError as rest:
        found = [details["ctx"]["problems"] for details in rest.errors(include_url=False) if details["type"] == "cross"]
        doubtful: set[Key] = {("tasks",)} if num_tasks > 1 else set()  # may compare with a default rank
        if removed & {("protocol",), ("protocol", "rounds")}:  # how many rounds were meant is not known
            settings = kept.get("operator")
            settings = settings if isinstance(settings, dict) else {}
            doubtful |= {("operator", key) for key, value in settings.items() if isinstance(value, list)}
        problems = [(_split(key, raw), text) for one in found for key, text in one]
        return [f"{source.place(key)}: {dotted(key)}: {text}" for key, text in problems if key not in doubtful]
    return []


def _leave_out(raw: dict[str, Any], key: Key) -> None:
    """Remove what stands at `key`; of a list, all of it."""
    node: Any = raw
    for part in key[:-1]:
        if not isinstance(node.get(part), dict):
            node.pop(part, None)
            return
        node = node[part]
    for part in key[-1:]:
        node.pop(part, None)
