"""Cards of exports: of an adapter, what it stands for, how much of it, and what that costs; of a model whose run has
deleted its own card, what it is.

Names of tasks, models and tensors are text, and nothing of the machine is told: of a local base only its folder's name.
"""

from __future__ import annotations

from typing import Any

from manyshot.base_model import BaseModel
from manyshot.card_text import Origin, fenced, front_matter, metadata, origin_of, public_recipe, table
from manyshot.compare_render import escape_markdown
from manyshot.export_source import ExportSource

WORST_SHOWN = 10


def origin(source: ExportSource) -> Origin:
    """The base model, as a card speaks of it."""
    return origin_of(source.recipe.model, BaseModel(source.base_name, source.base, ""))


def model_card(source: ExportSource) -> str:
    """README.md of a merged model: Hub metadata, what it is, the recipe."""
    base, recipe = origin(source), source.recipe
    return f"""{front_matter(metadata(base, recipe.method.name))}
# {_title(source, base)}

{_what(source, base)}

## Recipe

{fenced(public_recipe(recipe.model_dump(mode="json")), "yaml")}
"""


def adapter_card(source: ExportSource, found: dict[str, Any]) -> str:
    """README.md of an adapter folder: Hub metadata, error, losses, the modules with the largest errors."""
    base = origin(source)
    values = metadata(base, source.recipe.method.name)
    values |= {"base_model_relation": "adapter", "library_name": "peft", "tags": ["lora", *values["tags"]]}
    modules = sorted(found["modules"].items(), key=lambda item: -item[1]["relative_error"])
    rows = [(name, str(entry["rank"]), f"{entry['relative_error']:.4f}") for name, entry in modules[:WORST_SHOWN]]
    error = f"{found['relative_error_with_dropped']:.4f}"
    more = f"\n{len(modules) - len(rows)} more are in export.json.\n" if len(modules) > len(rows) else ""
    return f"""{front_matter(values)}
# {_title(source, base)}, as a LoRA adapter

{_what(source, base)} The merged model is the base plus a task vector; this adapter is that task vector cut off at rank
{found["rank"]}, with scaling 1. Relative error of the task vector (Frobenius): {error}.
{_dropped(found)}
## Validation losses

{_losses(found)}

## Error by module

{table(("tensor", "rank", "relative error"), rows)}
{more}"""


def _title(source: ExportSource, base: Origin) -> str:
    return escape_markdown(f"{base.name.rsplit('/', 1)[-1]}, merged from {len(source.recipe.tasks)} tasks")


def _what(source: ExportSource, base: Origin) -> str:
    rounds, operator = source.recipe.protocol.rounds, source.recipe.method.name
    return f"Round {source.round_index} of {rounds} of many-shot merging on {base.link}, operator `{operator}`."


def _dropped(found: dict[str, Any]) -> str:
    if not found["dropped"]:
        return ""
    names = ", ".join(escape_markdown(name) for name in found["dropped"])
    return f"\nChanges that LoRA cannot express were left out: {names}.\n"


def _losses(found: dict[str, Any]) -> str:
    losses = found["losses"]
    if losses is None:
        return "Not measured."
    rows = [
        (
            task,
            *(f"{entry[model]:.4f}" for model in ("pretrained", "merged", "adapter")),
            f"{losses['cost'][task]:+.4f}",
        )
        for task, entry in losses["tasks"].items()
    ]
    return table(("task", "pretrained", "merged", "with this adapter", "cost"), rows)
