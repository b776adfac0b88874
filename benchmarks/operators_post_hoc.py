"""Every operator and every knob of METIS on the experts of one run, merged once: validation losses of the result.

    python benchmarks/operators_post_hoc.py RUN

RUN is a finished run with LoRA experts (such as the demo). Losses are those of the validation splits of that run,
measured as the run measured them. Prints a Markdown table; nothing is trained.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from manyshot.base_model import find_base_model
from manyshot.gap_weights import TaskLosses, choose_weights, effective_tasks
from manyshot.local_update import task_loss
from manyshot.merge_models import MergeSettings, merge_models
from manyshot.models import ModelState, choose_placement, load_model, load_tokenizer, quiet_transformers
from manyshot.operators import BUILT_IN, OperatorPlan
from manyshot.progress import Progress
from manyshot.recipe_file import load_recipe
from manyshot.rundir import read_json
from manyshot.tasks import load_task

SETTINGS: list[dict[str, Any]] = [
    {"name": "mean"},
    {"name": "task_arithmetic"},
    {"name": "task_arithmetic", "scaling": 0.25},
    {"name": "dare"},
    {"name": "dare", "then": "ties"},
    {"name": "ties"},
    {"name": "ties", "trim_scope": "model"},
    {"name": "consensus_ta"},
    {"name": "iso_c"},
    {"name": "tsv_m"},
    {"name": "metis"},
    {"name": "metis", "temperature": 5.0},
    {"name": "metis", "mask": False},
    {"name": "metis", "gap": "relative"},
    {"name": "metis", "temperature": "auto"},
    {"name": "metis", "temperature": "auto", "mask": False},
    {"name": "metis", "gap": "relative", "temperature": "auto"},
]


def main() -> None:
    run = Path(sys.argv[1])
    recipe = load_recipe(run / "recipe.yaml")
    base = find_base_model(recipe.model)
    tasks = [load_task(recipe, name) for name in recipe.tasks]
    experts = {name: run / "experts" / name / "adapter" for name in recipe.tasks}
    recorded = read_json(run / "scores.json")
    before = [recorded["pretrained"]["losses"][name]["loss"] for name in recipe.tasks]
    after = [recorded["experts"]["losses"][name]["loss"] for name in recipe.tasks]
    print("| operator | " + " | ".join(recipe.tasks) + " | multi-task loss | worst excess | kept | effective tasks |")
    print("|---" * (len(tasks) + 5) + "|")
    for name, losses in (("pretrained", before), ("each task's expert", after)):
        print(row(name, losses, after, "", ""), flush=True)
    placement = choose_placement(recipe.local_update)
    with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(base.path)
        for settings in SETTINGS:
            operator = BUILT_IN[settings["name"]](**{key: value for key, value in settings.items() if key != "name"})
            weights, _ = choose_weights(operator, TaskLosses(tuple(before), tuple(after), tuple(before)))
            output = Path(scratch) / "merged"
            report = merge_models(
                *(base.path, experts, OperatorPlan(operator), weights, output, MergeSettings(force=True))
            )
            model = load_model(ModelState(output), placement)
            losses = [
                task_loss(model, tokenizer, task, recipe, Progress(None, None), round_index=0, which="merged").loss
                for task in tasks
            ]
            label = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
            shown = f"`{settings['name']}`" + (f" {label}" if label else "")
            print(row(shown, losses, after, f"{report.kept_share:.1%}", f"{effective_tasks(weights):.2f}"), flush=True)


def row(name: str, losses: list[float], experts: list[float], kept: str, effective: str) -> str:
    """One line: a loss per task, their mean, and the largest excess over a task's own expert."""
    excess = max(loss - expert for loss, expert in zip(losses, experts, strict=True))
    cells = [f"{loss:.3f}" for loss in losses]
    return f"| {name} | {' | '.join(cells)} | {sum(losses) / len(losses):.3f} | {excess:.3f} | {kept} | {effective} |"


if __name__ == "__main__":
    main()
