"""The card of an exported adapter: what it stands for, how much of it, and what that costs."""

from __future__ import annotations

from typing import Any

import yaml

from manyshot.export_source import ExportSource

WORST_SHOWN = 10


def adapter_card(source: ExportSource, found: dict[str, Any]) -> str:
    """README.md of an adapter folder: Hub metadata, error, losses, the modules with the largest errors."""
    metadata = {
        "base_model": [source.base_name],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "merge", "manyshot", f"manyshot-{source.recipe.method.name}"],
    }
    name = source.base_name.rsplit("/", 1)[-1]
    rounds = source.recipe.protocol.rounds
    modules = sorted(found["modules"].items(), key=lambda item: -item[1]["relative_error"])
    rows = [f"| `{module}` | {entry['rank']} | {entry['relative_error']:.4f} |" for module, entry in modules]
    more = f"\n{len(rows) - WORST_SHOWN} more are in export.json.\n" if len(rows) > WORST_SHOWN else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {name}, merged from {len(source.recipe.tasks)} tasks, as a LoRA adapter

Round {source.round_index} of {rounds} of many-shot merging, operator `{source.recipe.method.name}`. The merged model
is the base plus a task vector; this adapter is that task vector cut off at rank {found["rank"]}, with scaling 1.
Relative error of the task vector (Frobenius): {found["relative_error_with_dropped"]:.4f}.
{_dropped(found)}
## Validation losses

{_losses(found)}

## Error by module

| tensor | rank | relative error |
|---|---|---|
{chr(10).join(rows[:WORST_SHOWN])}
{more}"""


def _dropped(found: dict[str, Any]) -> str:
    if not found["dropped"]:
        return ""
    names = ", ".join(f"`{name}`" for name in found["dropped"])
    return f"\nChanges that LoRA cannot express were left out: {names}.\n"


def _losses(found: dict[str, Any]) -> str:
    losses = found["losses"]
    if losses is None:
        return "Not measured."
    lines = ["| task | pretrained | merged | with this adapter | cost |", "|---|---|---|---|---|"]
    for task, entry in losses["tasks"].items():
        values = " | ".join(f"{entry[model]:.4f}" for model in ("pretrained", "merged", "adapter"))
        lines.append(f"| {task} | {values} | {losses['cost'][task]:+.4f} |")
    return "\n".join(lines)
