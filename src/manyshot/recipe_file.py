"""Recipe files: YAML and `key.sub=value` overrides in, a Recipe or one error with every problem out; YAML back out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from manyshot.compare_recipe import CompareRecipe
from manyshot.errors import RecipeError
from manyshot.federated_recipe import FederatedRecipe
from manyshot.merge_recipe import MergeRecipe
from manyshot.mergekit_yaml import from_mergekit, is_mergekit
from manyshot.operators import Operator
from manyshot.recipe import Recipe
from manyshot.recipe_problems import NAMED, Key, Source, cross_problems_of_broken, dotted, explain, one_per_key
from manyshot.secret_text import find_secrets, redacted
from manyshot.tune_recipe import TuneRecipe
from manyshot.yaml_text import MAX_DEPTH, read_yaml

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

SPLITS = ("train", "validation", "test")

# keys whose value may be a name alone, where they are sections with a key `name`
NAMED_CHOICES = ("operator", "executor")

AnyRecipe = TypeVar("AnyRecipe", Recipe, MergeRecipe, CompareRecipe, TuneRecipe, FederatedRecipe)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key.sub=value` overrides.

    Raises RecipeError with one line per problem: file and line, key, what was found, what is allowed.
    """
    raw, source, problems = _read(path)
    return _build(Recipe, raw, source, overrides, problems, path.resolve().parent)


def load_merge_recipe(path: Path, overrides: Sequence[str] = ()) -> MergeRecipe:
    """Read a merge recipe, ours or mergekit's; as load_recipe()."""
    raw, source, problems = _read(path)
    if is_mergekit(raw):
        raw = from_mergekit(raw, str(path))
    return _build(MergeRecipe, raw, source, overrides, problems, path.resolve().parent)


def load_compare_recipe(path: Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Read the recipe of a comparison; as load_recipe()."""
    raw, source, problems = _read(path)
    return _build(CompareRecipe, raw, source, overrides, problems, path.resolve().parent)


def load_tune_recipe(path: Path, overrides: Sequence[str] = ()) -> TuneRecipe:
    """Read the recipe of a search; as load_recipe()."""
    raw, source, problems = _read(path)
    return _build(TuneRecipe, raw, source, overrides, problems, path.resolve().parent)


def load_federated_recipe(path: Path, overrides: Sequence[str] = ()) -> FederatedRecipe:
    """Read what a federation's server needs. Raises RecipeError, each line naming file, line and key."""
    raw, source, problems = _read(path)
    return _build(FederatedRecipe, raw, source, overrides, problems, path.resolve().parent)


def _read(path: Path) -> tuple[dict[str, Any], Source, list[str]]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error})") from None
    source = Source(str(path))
    try:
        raw = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys; found {type(raw).__name__}")
    return raw, source, _scan(text, source)


def recipe_from_mapping(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from Python data; relative paths are seen from the current folder."""
    return _build(Recipe, copy.deepcopy(dict(raw)), Source("recipe"), overrides, [], Path.cwd())


def merge_recipe_from_mapping(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> MergeRecipe:
    """A merge recipe from Python data or from flags; relative paths are seen from the current folder."""
    return _build(MergeRecipe, copy.deepcopy(dict(raw)), Source("merge"), overrides, [], Path.cwd())


def compare_recipe_from_mapping(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> CompareRecipe:
    """The recipe of a comparison from Python data; relative paths are seen from the current folder."""
    return _build(CompareRecipe, copy.deepcopy(dict(raw)), Source("compare"), overrides, [], Path.cwd())


def tune_recipe_from_mapping(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> TuneRecipe:
    """The recipe of a search from Python data; relative paths are seen from the current folder."""
    return _build(TuneRecipe, copy.deepcopy(dict(raw)), Source("tune"), overrides, [], Path.cwd())


def federated_recipe_from_mapping(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> FederatedRecipe:
    """The recipe of a federation from Python data; relative paths are seen from the current folder."""
    return _build(FederatedRecipe, copy.deepcopy(dict(raw)), Source("federation"), overrides, [], Path.cwd())


def _build(
    kind: type[AnyRecipe],
    raw: dict[str, Any],
    source: Source,
    overrides: Sequence[str],
    problems: list[str],
    folder: Path,
) -> AnyRecipe:
    field = kind.model_fields.get("operator")
    if isinstance(default := field and field.default, Operator) and any(o.startswith("operator.") for o in overrides):
        raw.setdefault("operator", default.name)  # they are settings of the operator that is there unasked
    for override in overrides:
        _apply_override(raw, override, source)
    for key in find_secrets(raw):
        what = "holds a token or a password, which would stand in every folder and report; leave it to the environment"
        problems.append(f"{source.place(key)}: {dotted(key)}: {what} (HF_TOKEN, WANDB_API_KEY, …)")
    problems += _resolve_paths(raw, source, folder)
    recipe: AnyRecipe | None = None
    try:
        recipe = kind.model_validate(raw)
    except ValidationError as error:
        details = one_per_key(error, raw)
        problems += [line for one in details for line in explain(one, raw, source, kind)]
        if kind is Recipe:
            problems += cross_problems_of_broken(raw, source, error)
    if problems or recipe is None:
        raise RecipeError(redacted("\n".join(dict.fromkeys(problems))))
    return recipe


def _scan(text: str, source: Source) -> list[str]:
    """Note the line of every key, and report keys that stand twice (YAML would silently keep the last)."""
    problems: list[str] = []
    walked: set[int] = set()  # an alias stands for a node that was seen already, or that is being walked

    def walk(node: yaml.Node, key: Key) -> None:
        source.lines.setdefault(key, node.start_mark.line + 1)
        if id(node) in walked:
            return
        walked.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for name_node, value in node.value:
                name, line = str(name_node.value), name_node.start_mark.line + 1
                if name in seen:
                    what = "two tasks have the same name" if key == ("tasks",) else "the same key twice"
                    problems.append(f"{source.file}:{line}: {dotted((*key, name))}: {what}; first on line {seen[name]}")
                seen.setdefault(name, line)
                source.lines[(*key, name)] = line
                walk(value, (*key, name))
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                walk(item, (*key, i))

    root = yaml.compose(text, Loader=yaml.SafeLoader)  # what read_yaml() has read
    assert root is not None
    walk(root, ())
    return problems


def _apply_override(raw: dict[str, Any], override: str, source: Source) -> None:
    target_key, equals, text = override.partition("=")
    if not equals or not target_key:
        raise RecipeError(f"command line: '{override}' is not of the form key.sub=value")
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"command line: '{override}': the value is not valid YAML") from None
    keys = target_key.split(".")
    if len(keys) > MAX_DEPTH:
        text = f"'{override[:80]}…': a key of {len(keys)} levels; there are at most {MAX_DEPTH}"
        raise RecipeError(f"command line: {text}")
    target = raw
    for i, name in enumerate(keys[:-1]):
        inner = target.setdefault(name, {})
        if isinstance(inner, str) and name in NAMED_CHOICES and i == len(keys) - 2:
            inner = target[name] = {"name": inner}  # `operator: metis` is short for `operator: {name: metis}`
        if not isinstance(inner, dict):
            raise RecipeError(f"command line: '{override}': {dotted(tuple(keys[: i + 1]))} is not a section")
        target = inner
    target[keys[-1]] = value
    source.overridden.add(tuple(keys))


def _resolve_paths(raw: dict[str, Any], source: Source, folder: Path) -> list[str]:
    """Make local paths absolute (seen from the recipe's folder, else the current one) and report missing ones."""
    problems = []
    for key, holder in _path_holders(raw):
        value = holder[str(key[-1])]
        if not isinstance(value, str) or value.startswith("demo:"):
            continue
        found = _find(value, folder)
        if found is not None:
            holder[str(key[-1])] = str(found.resolve())
        elif _looks_local(value):
            problems.append(f"{source.place(key)}: {dotted(key)}: no such file or folder: {value}")
    return problems


def _find(value: str, folder: Path) -> Path | None:
    """The file or folder that a value names; None where there is none, or can be none of that name."""
    try:
        path = Path(value).expanduser()
        return next((base / path for base in (folder, Path.cwd()) if (base / path).exists()), None)
    except (OSError, RuntimeError, ValueError):  # too long, no home of that user, a zero byte
        return None


def _path_holders(raw: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    for key in ("model", "base"):
        if key in raw:
            yield (key,), raw
    if isinstance(raw.get("search"), dict) and "reuse" in raw["search"]:
        raw["search"] = dict(raw["search"])
        yield ("search", "reuse"), raw["search"]
    if isinstance(raw.get("models"), dict):
        raw["models"] = dict(raw["models"])
        yield from ((("models", name), raw["models"]) for name in raw["models"])
    for section, (_, path_keys) in NAMED.items():
        entries = raw.get(section)
        if not isinstance(entries, dict):
            continue
        raw[section] = own = {name: dict(spec) if isinstance(spec, dict) else spec for name, spec in entries.items()}
        for name, spec in own.items():
            if isinstance(spec, dict):
                yield from (((section, name, key), spec) for key in path_keys if key in spec)
                yield from _source_holders((section, name), spec)


def _source_holders(task: Key, spec: dict[str, Any]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """The sources, one or a list of them, that a task's splits are made of."""
    for split in SPLITS:
        given = spec.get(split)
        if isinstance(given, dict):
            spec[split] = given = dict(given)
            if "data" in given:
                yield (*task, split, "data"), given
        elif isinstance(given, list):
            spec[split] = given = [dict(source) if isinstance(source, dict) else source for source in given]
            for i, source in enumerate(given):
                if isinstance(source, dict) and "data" in source:
                    yield (*task, split, i, "data"), source


def _looks_local(value: str) -> bool:
    """A Hub id is `name` or `owner/name`; everything else is meant as a path."""
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or value.endswith((*DATA_SUFFIXES, ".gguf", ".safetensors"))
    )


def to_yaml(recipe: Recipe | MergeRecipe | CompareRecipe | FederatedRecipe) -> str:
    """The resolved recipe, every default written out."""
    text: str = yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text


__all__ = [
    "compare_recipe_from_mapping",
    "federated_recipe_from_mapping",
    "load_compare_recipe",
    "load_federated_recipe",
    "load_merge_recipe",
    "load_recipe",
    "load_tune_recipe",
    "merge_recipe_from_mapping",
    "recipe_from_mapping",
    "to_yaml",
    "tune_recipe_from_mapping",
]
