"""The model card of a merged model, in its folder's README.md: what it was made of, how, and how it scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from manyshot.recipe_file import to_yaml
from manyshot.rundir import write_text
from manyshot.steps import Run

PAPER = "https://arxiv.org/abs/2606.16501"


def write_card(run: Run, folder: Path, round_index: int, summary: dict[str, Any]) -> None:
    """Write merged/README.md of a round: Hub metadata, the scores, the weights, the recipe."""
    metadata = {
        "base_model": [run.base.name],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "manyshot", f"manyshot-{run.recipe.method.name}"],
    }
    round_summary = summary["rounds"][str(round_index)]
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {run.base.name.rsplit("/", 1)[-1]}, merged from {len(run.names)} tasks

Made with [manyshot](https://pypi.org/project/manyshot/) by many-shot merging ({PAPER}): round {round_index} of
{run.recipe.protocol.rounds}, operator `{run.recipe.method.name}`,
{run.recipe.protocol.local_steps} local steps per task in all{_peculiarities(run)}.

## Scores on the test splits

{_score_table(run, round_summary, summary)}

The expert of a task is the pretrained model fine-tuned on that task alone with the same total steps.

## Weights of this round

{_weight_table(run, round_summary)}

Share of the changed coordinates that the merge kept: {round_summary["kept_share"]:.3f}.

## Recipe

```yaml
{to_yaml(run.recipe).strip()}
```
"""
    write_text(folder / "merged" / "README.md", text)


def _peculiarities(run: Run) -> str:
    """Where tasks did not all train alike, and where their losses are not in nats."""
    found = ["shared out by the weights of the round before"] if run.recipe.protocol.allocation == "gap" else []
    found += [f"{name}: {note}" for name, spec in run.recipe.tasks.items() for note in spec.notes]
    return f" ({'; '.join(found)})" if found else ""


def _score_table(run: Run, merged: dict[str, Any], summary: dict[str, Any]) -> str:
    lines = ["| task | metric | pretrained | expert | merged | test examples |", "|---|---|---|---|---|---|"]
    for name in run.names:
        score = merged["scores"][name]
        expert = summary["experts"]["scores"][name]["score"] if "experts" in summary else None
        cells = [
            name,
            score["metric"],
            f"{summary['pretrained']['scores'][name]['score']:.3f}",
            "–" if expert is None else f"{expert:.3f}",
            f"{score['score']:.3f}",
            str(score["num_examples"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _weight_table(run: Run, merged: dict[str, Any]) -> str:
    lines = ["| task | loss gap (nats) | weight |", "|---|---|---|"]
    for name in run.names:
        lines.append(f"| {name} | {merged['loss_gaps'][name]:.4f} | {merged['weights'][name]:.4f} |")
    return "\n".join(lines)
