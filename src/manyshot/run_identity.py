"""What a run was begun with (recipe, data, base model, packages, machine), and what of it differs when it goes on.

What decides results must be what it was; it is told apart by content. What does not is told, and written down.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
import yaml

from manyshot.base_model import BaseModel
from manyshot.errors import RunFolderError
from manyshot.models import choose_placement
from manyshot.older_recipe import run_as_now
from manyshot.recipe import Recipe
from manyshot.recipe_file import to_yaml
from manyshot.rundir import RunFolder, read_json, write_json, write_text
from manyshot.secret_text import redacted
from manyshot.tasks import Task
from manyshot.tensors import file_digest
from manyshot.trainer_command import files_of
from manyshot.yaml_text import read_yaml

Json = dict[str, Any]
PACKAGES = ("manyshot", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
# keys of a recipe that may be others when a run goes on: where it computes, who is told, what stays on disk,
# what happens after a failure
MAY_CHANGE = (
    *("trackers", "executor", "keep", "local_update.device", "local_update.time_limit"),
    *("local_update.launcher", "local_update.launch"),
    *("protocol.on_failure", "merge.on_regression", "merge.regression_tolerance"),
)
# what environment.json says of the machine, which may be another
MACHINE = ("packages", "python", "platform", "placement", "threads", "trainer")
RESUMED = "resumed_with"


class WhatIsRead(Protocol):
    """What decides the results of a run beside its recipe: inputs.Inputs, or the base model alone and empty tasks."""

    @property
    def base(self) -> BaseModel: ...

    @property
    def tasks(self) -> tuple[Task, ...]: ...


def describe(recipe: Recipe, folder: RunFolder, inputs: WhatIsRead, command: str | None) -> list[str]:
    """Write recipe.yaml, splits.json and environment.json; on resume, return what differs and may.

    Raises RunFolderError with every difference in recipe, data or base model that would change the results.
    """
    if not folder.environment.exists():
        write_text(folder.recipe, to_yaml(recipe))
        write_json(folder.splits, {task.name: dict(task.splits) for task in inputs.tasks})
        write_json(folder.environment, environment(recipe, inputs, identity_of(inputs), command))
        return []
    changed = [line for line in differences(recipe_of(folder), read_yaml(to_yaml(recipe))) if not may_change(line)]
    if changed:
        longer = any(line.startswith(("protocol.rounds:", "tasks.")) for line in changed)
        extend = "manyshot extend adds rounds and tasks to a finished run; " if longer else ""
        raise RunFolderError(
            f"{folder.path}: the recipe differs from the run's: {'; '.join(changed)}; {extend}use --force to start over"
        )
    before = _with_added_tasks(folder, read_json(folder.environment), inputs)
    now = environment(recipe, inputs, identity_of(inputs), command)
    if keys := [line.split(":")[0] for line in differences(before.get("identity"), now["identity"])]:
        details = "; ".join(changed_inputs(before.get("inputs", {}), now["inputs"]))
        raise RunFolderError(
            f"{folder.path}: the content of {', '.join(keys)} changed since the run began"
            f"{f' ({details})' if details else ''}; put it back as it was, or use --force to start over"
        )
    return _note_machine(folder, before, now)


def _with_added_tasks(folder: RunFolder, before: Json, inputs: WhatIsRead) -> Json:
    """environment.json with the tasks that an extended run has now; their recipe is the run's own already."""
    known = before.get("identity", {}).get("tasks", {})
    added = [task for task in inputs.tasks if task.name not in known]
    if not added or not known:
        return before
    tasks = known | {task.name: task.digest() for task in added}
    parts = before.get("inputs", {"model": {}, "tasks": {}})
    fingerprints = parts["tasks"] | {task.name: task.fingerprint() for task in added}
    after = before | {
        "identity": before["identity"] | {"tasks": tasks},
        "inputs": parts | {"tasks": fingerprints},
    }
    write_json(folder.splits, {task.name: dict(task.splits) for task in inputs.tasks})
    write_json(folder.environment, after)
    return after


def recipe_of(folder: RunFolder) -> Any:
    """The recipe that a run was begun with, as plain data of this version. Raises RunFolderError for a damaged one."""
    try:
        return run_as_now(read_yaml(folder.recipe.read_text("utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.recipe}: damaged ({error}); use --force to start over") from None


def may_change(line: str) -> bool:
    """Whether a line of differences() is about what may be another when a run goes on."""
    key = line.split(":", maxsplit=1)[0]
    return any(key == one or key.startswith(f"{one}.") for one in MAY_CHANGE)


def as_begun(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe under whose names finished work is found: the run's own, wherever it computes now."""
    begun = recipe_of(folder)["local_update"]
    placed = {"device": begun["device"], "launcher": begun.get("launcher", "none"), "launch": begun.get("launch", {})}
    return recipe.model_copy(update={"local_update": recipe.local_update.model_copy(update=placed)})


def _note_machine(folder: RunFolder, before: Json, now: Json) -> list[str]:
    """What differs from the machine that the run was on last; it is added to environment.json."""
    resumed = before.get(RESUMED, [])
    known = _leaves({key: before.get(key) for key in MACHINE})
    for entry in resumed:
        known |= entry
    found = {
        key: value
        for key, value in _leaves({key: now.get(key, {}) for key in MACHINE}).items()
        if known.get(key) != value
    }
    if found:
        write_json(folder.environment, before | {RESUMED: [*resumed, found]})
    return [f"{key}: {known.get(key)} -> {value}" for key, value in found.items()]


def _leaves(value: Mapping[str, Any], key: str = "") -> Json:
    """{"packages.torch": "2.6.0", …}"""
    found: Json = {}
    for name, part in value.items():
        found |= _leaves(part, f"{key}{name}.") if isinstance(part, Mapping) else {f"{key}{name}": part}
    return found


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def identity_of(inputs: WhatIsRead) -> Json:
    """Digests of all that a run reads: equal digests, equal results."""
    return {"model": inputs.base.digest, "tasks": {task.name: task.digest() for task in inputs.tasks}}


def environment(recipe: Recipe, inputs: WhatIsRead, identity: Json, command: str | None) -> Json:
    """Versions, machine, placement and identity of the inputs, these also in parts: what says which of them changed."""
    return {
        "command": redacted(command or shlex.join(sys.argv)),
        "identity": identity,
        "inputs": {
            "model": dict(inputs.base.files),
            "tasks": {task.name: task.fingerprint() for task in inputs.tasks},
        },
        "base_model": {"name": inputs.base.name, "path": str(inputs.base.path)},
        "placement": choose_placement(recipe.local_update).text,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        **_trainer(recipe),
    }


def _trainer(recipe: Recipe) -> Json:
    """{"trainer": digests of the files that a command of the user's own names}; that they change is told, no more."""
    command = recipe.local_update.command
    return {"trainer": {str(path): file_digest(path) for path in files_of(command)}} if command is not None else {}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def differences(old: Any, new: Any) -> list[str]:
    """`key: old -> new` for every leaf in which two JSON values differ."""
    return [f"{key}: {before} -> {now}" for key, before, now in unlike_leaves(old, new)]


def unlike_leaves(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf in which two JSON values differ; `losses.3` is the fourth entry of a list."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(place), before, now) for place, (before, now) in enumerate(zip(old, new, strict=True))]
    else:
        if old != new:
            yield key, old, new
        return
    for name, before, now in pairs:
        yield from unlike_leaves(before, now, f"{key}.{name}".lstrip("."))


def changed_inputs(before: Json, now: Json) -> list[str]:
    """What changed in the base model's files and the tasks' splits, in words; nothing where it was not written down."""
    found = []
    old, new = before.get("model", {}), now["model"]
    if old and new:
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                found.append(f"{name} of the model {'is gone' if name not in new else _new_or_other(name in old)}")
    for task, parts in now["tasks"].items():
        known = before.get("tasks", {}).get(task, {})
        for split, part in parts.items():
            if split in known and known[split] != part:
                count, was = part["examples"], known[split]["examples"]
                what = f"{was} -> {count} examples" if count != was else f"{count} examples, some of them others"
                found.append(f"{task}, {split}: {what}")
    return found


def _new_or_other(known: bool) -> str:
    return "was changed" if known else "is new"
