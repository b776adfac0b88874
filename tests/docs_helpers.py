"""The documentation as its reader follows it: commands, Python and YAML page by page, and a folder to follow it in."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from typer.main import get_command

from conftest import make_rows
from manyshot.cli import app

ROOT = Path(__file__).parents[1]
# the study's tables are parts of its report
DOCS = [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "tables"]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS])
PROGRAMS = ("manyshot", "make", "pip", "python", "tensorboard", "cd")
# what a reader types stands in an indented block, or in a fence of a shell
COMMAND = re.compile(rf"^    ((?:{'|'.join(PROGRAMS)}) [^ ,]+(?: .*)?)$")
TASK_FILES = ("letters", "numbers")


@dataclass(frozen=True)
class Step:
    """One thing that a page asks its reader to do."""

    kind: Literal["shell", "python", "yaml"]
    text: str


def steps(page: Path) -> Iterator[Step]:
    """Commands, Python and YAML of a page, from its top to its end."""
    fence, lines = None, []
    held = ""
    for line in page.read_text("utf-8").splitlines():
        if fence is not None:
            if line.startswith("```"):
                if fence in ("python", "yaml"):
                    yield Step(fence, "\n".join(lines) + "\n")
                fence, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            fence = line[3:].strip()
        elif found := COMMAND.match(f"    {held} {line.strip()}" if held else line):
            held = found[1].removesuffix("\\") if found[1].endswith("\\") else ""
            if not held:
                yield from (Step("shell", one) for one in split_commands(found[1]))


def split_commands(line: str) -> list[str]:
    """The commands of a line, without what is said of them after a `#`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        found.append([]) if word == "&&" else found[-1].append(word)
    return [shlex.join(words) for words in found if words]


def commands(page: Path) -> list[str]:
    return [step.text for step in steps(page) if step.kind == "shell"]


def parse(command: str) -> None:
    """Take a `manyshot` command as its program would, without doing it. Raises click's UsageError."""
    group: Any = get_command(app)
    words = shlex.split(command)[1:]
    known = {flag for option in group.params for flag in option.opts}
    while words[0] in known:
        words.pop(0)
    group.commands[words[0]].make_context(f"manyshot {words[0]}", words[1:])


# ---- a folder in which pages can be followed -------------------------------------------------------------------------


def tiny_recipe(base: str, tasks: tuple[str, ...] = TASK_FILES) -> dict[str, Any]:
    """A run of a second or two; the tasks' files are in data/."""
    return {
        "model": base,
        "tasks": {task: {"train": f"data/{task}.jsonl", "metric": "choice_accuracy"} for task in tasks},
        "protocol": {"rounds": 2, "local_steps": 4},
        "preset": "paper",
        "operator": {"name": "metis", "mask": False},
        "local_update": {"rank": 2, "alpha": 4, "batch_size": 2, "learning_rate": 0.01, "max_length": 32},
        "evaluation": {
            "validation_examples": 2,
            "test_examples": 2,
            "max_new_tokens": 2,
            "batch_size": 4,
        },
    }


def make_world(folder: Path, base: Path) -> None:
    """Data, recipes and the base model, by the names that the pages use."""
    (folder / "data").mkdir(parents=True)
    for task in ("letters", "numbers"):
        write_rows(folder / "data" / f"{task}.jsonl", task)
    for name, task in (("test", "letters"), ("math", "letters"), ("code", "numbers")):
        write_rows(folder / f"{name}.jsonl", task)
    for name in ("base", "base-model", "models/base"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(base)
    recipe = tiny_recipe("base")
    dump(folder / "recipe.yaml", recipe)
    shared = {key: value for key, value in recipe.items() if key not in ("model", "operator")}
    methods = {"mean": {"operator": "mean", "protocols": ["post_hoc"]}}
    dump(folder / "grid.yaml", shared | {"models": {"tiny": "base"}, "seeds": [0], "methods": methods})
    search = {"sampler": "grid", "parameters": {"operator.temperature": [1.0, 2.0]}}
    dump(folder / "search.yaml", recipe | {"search": search})


def add_models(folder: Path) -> None:
    """What the run in runs/first left, under the names of models and adapters that the pages merge and ask."""
    for name in ("math-model", "models/math"):
        (folder / name).symlink_to(folder / "runs/first/round_001/merged")
    for name in ("safety-adapter", "my-lora", "models/code-lora"):
        (folder / name).symlink_to(folder / "runs/first/round_001/numbers/adapter")
    for name in ("runs/second", "runs/recipe"):
        shutil.copytree(folder / "runs/first", folder / name, symlinks=True)
    experts = {"math": {"path": "models/math", "weight": 1.0}, "code": {"path": "models/code-lora", "weight": 0.5}}
    dump(folder / "merge.yaml", {"base": "models/base", "experts": experts, "operator": "ties"})


def write_rows(path: Path, task: str, count: int = 12) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(task, count)), "utf-8")


def dump(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False), "utf-8")
