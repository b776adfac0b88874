"""How a round's adapters start: share of the experts' validation-loss improvement that the merged model keeps.

    python benchmarks/adapter_starts.py [KEY=VALUE …]

Runs the demo's recipe with `adapter_start` fresh, averaged and svd, the experts trained once, and prints for every
round the kept share (L_pretrained − L_merged) / (L_pretrained − L_expert), averaged over tasks and for the worst one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from manyshot.demo import RECIPE_FILE
from manyshot.recipe_file import load_recipe
from manyshot.runner import RunResult
from manyshot.runner import run as run_recipe

STARTS = ("fresh", "averaged", "svd")


def kept_shares(measured: dict, pretrained: dict, experts: dict) -> dict[str, float]:
    """Kept share per task."""
    return {
        task: (pretrained["losses"][task]["loss"] - measured["losses"][task]["loss"])
        / (pretrained["losses"][task]["loss"] - experts["losses"][task]["loss"])
        for task in experts["losses"]
    }


def show(name: str, measured: dict, first: RunResult) -> None:
    shares = kept_shares(measured, first.scores["pretrained"], first.scores["experts"])
    worst = min(shares, key=lambda task: shares[task])
    print(
        f"{name}: average {fmean(shares.values()):.3f}, worst {shares[worst]:.3f} ({worst}), "
        f"multi-task loss {measured['multi_task_loss']:.3f}",
        flush=True,
    )


def main() -> None:
    first: RunResult | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for start in STARTS:
            overrides = [f"local_update.adapter_start={start}", "evaluation.test_examples=4", *sys.argv[1:]]
            if first is not None:
                overrides += ["evaluation.experts=false", "evaluation.post_hoc=false"]
            result = run_recipe(load_recipe(RECIPE_FILE, overrides), Path(scratch) / start)
            if first is None:
                first = result
                show("post-hoc", result.scores["post_hoc"], first)
            for r, measured in result.scores["rounds"].items():
                show(f"{start}, round {r}", measured, first)


if __name__ == "__main__":
    main()
