"""Pages about the Python names, the commands and the source files: made from signatures, docstrings and options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

import manyshot
from generate_keys import table
from manyshot import errors, gap_weights
from manyshot.cli import app
from manyshot.merge_command import MergeResult

MADE = "<!-- made by docs/generate.py; change signatures, docstrings and help texts in src/manyshot -->\n"
SOURCE = Path(manyshot.__file__).parent
# in the order of the page; functions and results that are not named here follow
FUNCTIONS = ("run", "merge", "compare", "tune", "report", "evaluate_model", "export_run", "load_recipe")
RESULTS = ("RunResult", "CompareResult", "TuneResult", "ReportResult", "EvalResult", "ExportResult", "HarnessSettings")
RECIPES = {
    "Recipe": "recipe.md",
    "MergeRecipe": "merge_recipe.md",
    "CompareRecipe": "compare_recipe.md",
    "TuneRecipe": "tune_recipe.md",
}
OPERATOR_NAMES = ("ConsensusTA", "Dare", "IsoC", "Mean", "Metis", "TaskArithmetic", "Ties", "TsvM")
TENSORS = ("Operator", "MatrixOperator", "Tile", "merge_whole")
OTHER = ("OPERATORS", "ManyshotError", "__version__")
WEIGHTS = ("loss_gaps", "relative_gaps", "gap_weights", "auto_temperature", "effective_tasks", "remember")


# ---- Python ----------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Every public name of the package: signature, what it does, what comes back."""
    functions, results = _named(FUNCTIONS, inspect.isfunction), _named(RESULTS, _is_result)
    listed = {*functions, *results, *RECIPES, *OPERATOR_NAMES, *TENSORS, *OTHER}
    if listed != set(manyshot.__all__):
        raise ValueError(f"public names that no section has, or that are gone: {listed ^ set(manyshot.__all__)}")
    parts = [MADE, "# Python\n", LEAD]
    parts += ["## What the commands do\n", *(_function(name, getattr(manyshot, name)) for name in functions)]
    parts += ["## What comes back\n", *(_record(getattr(manyshot, name)) for name in results)]
    parts += [_record(MergeResult, "manyshot.merge_command")]
    parts += ["## Recipes\n", "Frozen, and checked as they are made; fields are the keys of the files.\n"]
    kinds = [
        (f"`manyshot.{name}`", _sentence(getattr(manyshot, name)), f"[keys]({page})") for name, page in RECIPES.items()
    ]
    parts += [table(("class", "", ""), kinds)]
    parts += ["## Operators\n", OPERATORS_LEAD]
    pairs = [(name, getattr(manyshot, name)) for name in OPERATOR_NAMES]
    shown = [(f"`manyshot.{name}`", _page_of(kind), _first_line(kind)) for name, kind in pairs]
    parts += [table(("class", "page", "M(v)"), shown)]
    parts += ["`manyshot.OPERATORS` is the table of all, those of installed packages too: name → class.\n"]
    parts += [_function(name, getattr(manyshot, name)) for name in TENSORS]
    parts += ["## Weights from losses\n", "`manyshot.gap_weights`, without torch:\n"]
    parts += [_function(name, getattr(gap_weights, name), "manyshot.gap_weights") for name in WEIGHTS]
    parts += ["## Errors\n", ERRORS_LEAD]
    kinds = [(f"`manyshot.errors.{kind.__name__}`", _first_line(kind)) for kind in _errors()]
    parts += [table(("class", ""), kinds)]
    return "\n".join(parts)


def _named(first: tuple[str, ...], fits: Callable[[Any], bool]) -> list[str]:
    others = [name for name in manyshot.__all__ if name not in (*first, *TENSORS) and fits(getattr(manyshot, name))]
    return [*first, *others]


def _is_result(thing: Any) -> bool:
    return inspect.isclass(thing) and thing.__name__.endswith("Result")


LEAD = """\
`import manyshot` is light: torch and the rest are loaded when a function first needs them. Recipes may be a path, a
mapping with the file's keys, or an object. `listener` is called with every event of a run (a mapping, as in
`metrics.jsonl`). Names that start with an underscore, and modules that this page does not name, may change.
"""
OPERATORS_LEAD = """\
Frozen dataclasses: their fields are the settings. They are pure functions of tensors, and can be used without a run:

```python
import torch
from manyshot import Ties, merge_whole

task_vectors_TP = torch.randn(4, 1000)  # T tasks × P coordinates
weights_T = torch.ones(4)
merged_P = merge_whole(Ties(density=0.2), task_vectors_TP, weights_T)
```
"""
ERRORS_LEAD = "Each names the file, key, task, round or tensor; the commands print it and end with exit code 2.\n"


def _errors() -> Iterable[type[Exception]]:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, manyshot.ManyshotError):
            yield kind


def _function(name: str, thing: Any, module: str = "manyshot") -> str:
    parts = [f"### `{module}.{name}`\n", f"```text\n{_signature(name, thing)}\n```\n", _text(thing)]
    if inspect.isclass(thing):
        parts += list(_methods(thing))
    return "\n".join(parts)


def _methods(kind: type) -> Iterable[str]:
    for name, member in vars(kind).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            shown = f".{name}" if isinstance(member, property) else _signature(f".{name}", function)
            yield f"- `{' '.join(shown.split())}`: {_first_line(function)}"
    yield ""


def _record(kind: type, module: str = "manyshot") -> str:
    """A result: its fields, each with its type, and what its docstring says."""
    rows = [(f"`{field.name}`", f"`{field.type}`") for field in dataclasses.fields(kind)]
    rows += [
        (f"`{name}`", f"`{member.fget.__annotations__['return']}`: {_first_line(member.fget)}".removesuffix(": "))
        for name, member in vars(kind).items()
        if isinstance(member, property) and not name.startswith("_")
    ]
    return "\n".join([f"### `{module}.{kind.__name__}`\n", _text(kind), table(("field", "type"), rows)])


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    given = [_parameter(one) for one in parameters]
    keyword_only = [i for i, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY]
    if keyword_only:
        given.insert(keyword_only[0], "*")
    returns = signature.return_annotation
    end = "" if inspect.isclass(thing) or returns is signature.empty else f" -> {_plain(returns)}"
    line = f"{name}({', '.join(given)}){end}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(given) + f",\n){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_plain(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        shown = getattr(parameter.default, "__name__", None) or repr(parameter.default)
        text += f" = {shown}" if len(shown) < 60 else " = …"
    return text


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:collections\.abc|typing|pathlib|manyshot(?:\.\w+)*)\.", "", text)


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").replace("<", "&lt;") + "\n"


def _first_line(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").split("\n")[0]


def _sentence(thing: Any) -> str:
    return _first_line(thing)


def _page_of(kind: Any) -> str:
    return f"[{kind.name}](../operators/{kind.name}.md)"


# ---- commands --------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options."""
    group: Any = get_command(app)
    parts = [MADE, "# Commands\n", CLI_LEAD]
    parts += [table(("option before the command", ""), [_option(one) for one in group.params])]
    for name, command in _commands(group):
        context = command.context_class(command, info_name=f"manyshot {name}")
        usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
        parts += [f"## `manyshot {name}`\n", f"{inspect.cleandoc(command.help or '')}\n", f"```text\n{usage}\n```\n"]
        rows = [_option(parameter) for parameter in command.params if "--help" not in parameter.opts]
        parts += [table(("argument or option", ""), rows)]
    return "\n".join(parts)


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its name, those of a group (`round add`) one by one."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


CLI_LEAD = """\
`manyshot COMMAND --help` says the same. Whatever cannot be used ends in one message and exit code 2, an
interruption in 130. Where a command takes `KEY=VALUE`, any key of its recipe can be set: `protocol.rounds=3`,
`operator.name=ties`, `'seeds=[0,1]'`; values are YAML.
"""


def _option(parameter: Any) -> tuple[str, str]:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`", _help(parameter)
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts + parameter.secondary_opts, key=len, reverse=True))
    return names, _help(parameter)


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _help(parameter: Any) -> str:
    return " ".join((getattr(parameter, "help", None) or "").split())


# ---- source files ----------------------------------------------------------------------------------------------------


def source_page() -> str:
    """Every module of the package, in groups, with the first sentence that it says of itself."""
    parts = [MADE, "# Source files\n", SOURCE_LEAD]
    packages = sorted({path.parent for path in SOURCE.rglob("*.py")})
    for package in packages:
        modules = sorted(path for path in package.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
        name = package.relative_to(SOURCE.parent).as_posix()
        parts += [f"## `{name}/`\n", f"{_docstring(package / '__init__.py')}\n"]
        if package == SOURCE:
            parts += [
                table(
                    ("module", ""),
                    [(f"**{group}**", "") if not path else _module(path) for group, path in _groups(modules)],
                )
            ]
        elif modules:
            parts += [table(("module", ""), [_module(path) for path in modules])]
    return "\n".join(parts)


SOURCE_LEAD = """\
The method is `rounds.py`, on one screen; the operators are pure functions in `operators/`; how a run goes from its
command to a tensor, and who may import whom, is in [architecture.md](../architecture.md).
"""
SMALLEST_GROUP = 3


def _groups(modules: list[Path]) -> Iterable[tuple[str, Path | None]]:
    """Modules whose names begin alike, together; what stands alone, at the end."""
    sizes = Counter(path.stem.split("_")[0] for path in modules)
    heads = [name for name in sizes if sizes[name] >= SMALLEST_GROUP]
    for head in heads:
        yield head, None
        yield from ((head, path) for path in modules if path.stem.split("_")[0] == head)
    yield "others", None
    yield from (("", path) for path in modules if path.stem.split("_")[0] not in heads)


def _module(path: Path) -> tuple[str, str]:
    return f"`{path.name}`", _docstring(path)


def _docstring(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
