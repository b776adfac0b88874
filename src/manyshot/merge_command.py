"""`manyshot merge`: flags or a file to a merge recipe, weights, and one merged model folder with its card."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.base_model import BaseModel, find_base_folder
from manyshot.disk import disk_errors
from manyshot.errors import RecipeError
from manyshot.export import check_space
from manyshot.match import open_experts
from manyshot.merge_models import MergeSettings, check_output, merge_models
from manyshot.merge_recipe import MergeRecipe
from manyshot.merge_report import MergeReport
from manyshot.mergekit_yaml import expert_names
from manyshot.recipe_file import load_merge_recipe, merge_recipe_from_mapping
from manyshot.tensors import Checkpoint
from manyshot.yaml_text import read_yaml


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: the model folder, the experts' weights, the report."""

    output: Path
    weights: dict[str, float]
    report: MergeReport
    notes: tuple[str, ...]

    def norm(self, name: str) -> float:
        """The Frobenius norm of an expert's task vector."""
        position = list(self.weights).index(name)
        return math.sqrt(self.report.gram_TT[position][position])

    def to_json(self) -> dict[str, Any]:
        return {"merged": str(self.output), "weights": self.weights, "kept_share": self.report.kept_share}


def recipe_from_flags(
    models: Sequence[str],
    *,
    base: str | None,
    operator: str | None,
    settings: Mapping[str, object],
    weights: Sequence[float],
    validation: Mapping[str, str],
    top: Mapping[str, object],
) -> MergeRecipe:
    """The merge recipe of a command line: one recipe file, or a base and models. Raises RecipeError."""
    files = [model for model in models if model.endswith((".yaml", ".yml"))]
    if files:
        if len(models) > 1 or base or operator or weights or validation:
            raise RecipeError("give either a recipe file, with key=value in --set, or --base and models")
        changes = {f"operator.{key}": value for key, value in settings.items()} | dict(top)
        return load_merge_recipe(Path(files[0]), [f"{key}={value}" for key, value in changes.items()])
    if base is None:
        raise RecipeError("--base is missing: the model that the others were trained from")
    if not models:
        raise RecipeError("no models to merge: give model folders or PEFT adapters, or a recipe file")
    if weights and len(weights) != len(models):
        raise RecipeError(f"--weights has {len(weights)} values for {len(models)} models")
    names = expert_names(list(models))
    experts: dict[str, dict[str, object]] = {name: {"path": path} for name, path in zip(names, models, strict=True)}
    for name, weight in zip(names, weights, strict=False):
        experts[name]["weight"] = weight
    for name, path in validation.items():
        if name not in experts:
            raise RecipeError(f"--validation {name}=…: no model of that name; there are: {', '.join(names)}")
        experts[name]["validation"] = path
    chosen: dict[str, object] = {"name": operator or "task_arithmetic"}
    chosen |= settings
    return merge_recipe_from_mapping({"base": base, "experts": experts, "operator": chosen} | dict(top))


def operator_settings(named: Mapping[str, object | None], assignments: Sequence[str]) -> dict[str, object]:
    """Settings of the operator: those of the flags that were given, and `key=value` of --set."""
    import yaml

    found = {key: value for key, value in named.items() if value is not None}
    if isinstance(temperature := found.get("temperature"), str):  # a number, or auto
        try:
            found["temperature"] = read_yaml(temperature)
        except yaml.YAMLError:
            raise RecipeError(f"--temperature {temperature}: a number, or auto") from None
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {assignment}: not of the form key=value")
        try:
            found[key] = read_yaml(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {assignment}: the value is not valid YAML") from None
    return found


def parse_weights(text: str | None) -> list[float]:
    """`0.5,0.3,0.2` -> numbers."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise RecipeError(f"--weights {text}: not numbers with commas between them") from None


def parse_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`name=value` texts -> a mapping."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise RecipeError(f"{flag} {text}: not of the form name=value")
        pairs[name] = value
    return pairs


def merge(
    recipe: MergeRecipe,
    output: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    allow_copy: bool = False,
    allow_nonfinite: bool = False,
    force: bool = False,
    tick: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> MergeResult:
    """Merge what exists already, once, into the model folder `output`: complete, or not there at all.

    Raises ManyshotError for every input that cannot be used, before anything is written.
    """
    _open_many_files()
    base = find_base_folder(recipe.base)
    experts = {name: find_base_folder(expert.path, need_config=False).path for name, expert in recipe.experts.items()}
    check_output(output, [base.path, *experts.values()], force=force)
    settings = MergeSettings(
        dtype=recipe.dtype,
        shard_bytes=recipe.shard_size,
        device=_device(device),
        threads=threads,
        seed=recipe.seed,
        allow_copy=allow_copy,
        allow_nonfinite=allow_nonfinite,
        force=force,
    )
    with disk_errors(output, resumable=False):
        if recipe.needs_gaps:  # what does not fit, the base or the disk, is found before anything is measured
            open_experts(Checkpoint(base.path), experts, allow_copy=allow_copy)
            check_space(Checkpoint(base.path), output, recipe.dtype)
        weights, gaps = _weights(recipe, base, device, say)
        record = {"recipe": recipe.model_dump(mode="json"), "base": base.name, **gaps}
        report = merge_models(
            *(base.path, experts, recipe.plan, weights, output, settings),
            record=record,
            tick=tick,
            finish=lambda folder: _write_card(folder, recipe, base, weights),
        )
    return MergeResult(output, dict(zip(recipe.experts, weights, strict=True)), report, recipe.notes)


def _weights(
    recipe: MergeRecipe, base: BaseModel, device: str, say: Callable[[str], None]
) -> tuple[list[float], dict[str, Any]]:
    if not recipe.needs_gaps:
        return recipe.given_weights(), {}
    say("measuring loss gaps: loading torch and transformers, then the base and every expert …")
    from manyshot.merge_gaps import weigh_experts
    from manyshot.progress import Progress

    return weigh_experts(recipe, base, Progress(None, None), device=device)


def _device(device: str) -> str:
    """`auto` is a GPU where there is one. Raises RecipeError for a device that is not there."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":", maxsplit=1)[0] == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {device}: this machine has no CUDA device that torch can use")
    if device.split(":", maxsplit=1)[0] not in ("cpu", "cuda"):
        raise RecipeError(f"--device {device}: there are auto, cpu, cuda, cuda:<number>")
    return device


def _open_many_files() -> None:
    """Models of many shards are open at once: take as many files as the system lets us."""
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _write_card(folder: Path, recipe: MergeRecipe, base: BaseModel, weights: Sequence[float]) -> None:
    """README.md of a merged model: Hub metadata, weights, the recipe."""
    from manyshot.card_text import PROJECT, fenced, front_matter, metadata, origin_of, public_recipe, table
    from manyshot.compare_render import escape_markdown

    origin = origin_of(recipe.base, base)
    rows = [(name, f"{weight:.4g}") for name, weight in zip(recipe.experts, weights, strict=True)]
    text = f"""{front_matter(metadata(origin, recipe.method.name))}
# {escape_markdown(origin.name.rsplit("/", 1)[-1])}, merged from {len(weights)} models

Experts made from {origin.link}, merged once with [manyshot]({PROJECT}): operator `{recipe.method.name}`, in float32,
cast once. Nothing was measured on the merged model.

{table(["model", "weight"], rows)}

## Recipe

{fenced(public_recipe(recipe.model_dump(mode="json")), "yaml")}
"""
    (folder / "README.md").write_text(text, "utf-8")


__all__ = ["MergeResult", "merge", "operator_settings", "parse_pairs", "parse_weights", "recipe_from_flags"]
