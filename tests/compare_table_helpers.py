"""A small comparison as in results.json: two backbones, three seeds, four tasks, an expert that scores 0, and holes."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from manyshot.compare_gain import example_losses, shares
from manyshot.compare_render import Table
from manyshot.compare_statistics import Estimate

TASKS = ("instruction", "math", "m_arc", "safety")
MODELS = ("small", "large")
SEEDS = (0, 1, 2)
METHODS = {
    "task_arithmetic": ("Task Arithmetic", ("post_hoc", "many_shot")),
    "ties": ("TIES", ("post_hoc", "many_shot")),
    "mean": ("Mean", ("post_hoc", "many_shot")),
    "metis": ("METIS", ("post_hoc", "many_shot")),
    "metis_no_mask": ("METIS without mask", ("many_shot",)),
    "metis_mean_weights": ("METIS with equal weights", ("many_shot",)),
    "joint": ("Joint fine-tuning", ("joint",)),
}
REMOVES = {"metis_no_mask": "consensus mask", "metis_mean_weights": "loss-gap weights"}
# how many of ten test examples are answered, by method and protocol; the experts answer EXPERTS
ANSWERED = {
    ("task_arithmetic", "post_hoc"): (2, 1, 4, 3),
    ("task_arithmetic", "many_shot"): (4, 2, 5, 3),
    ("ties", "post_hoc"): (3, 2, 4, 4),
    ("ties", "many_shot"): (4, 3, 5, 4),
    ("mean", "post_hoc"): (3, 1, 5, 4),
    ("mean", "many_shot"): (4, 3, 4, 4),
    ("metis", "post_hoc"): (3, 2, 5, 4),
    ("metis", "many_shot"): (5, 4, 5, 6),
    ("metis_no_mask", "many_shot"): (5, 3, 5, 5),
    ("metis_mean_weights", "many_shot"): (4, 3, 5, 5),
    ("joint", "joint"): (5, 4, 6, 6),
}
EXPERTS = (5, 4, 5, 5)
LOSSES = {"post_hoc": 2.0, "many_shot": 1.5, "joint": 1.25}


def make_score(answered: float, count: int = 10, metric: str = "exact_match") -> dict[str, Any]:
    return {"metric": metric, "score": answered / count, "stderr": 0.1, "num_examples": count}


def make_normalized(scores: dict[str, Any], experts: dict[str, Any]) -> dict[str, Any]:
    ratios = {
        task: scores[task]["score"] / experts[task]["score"] if experts[task]["score"] > 0 else None for task in scores
    }
    found = {task: ratio for task, ratio in ratios.items() if ratio is not None}
    if not found:
        return {"tasks": ratios, "average": None, "worst": None, "worst_task": None, "drop": None}
    worst = min(found, key=lambda task: found[task])
    average = fmean(found.values())
    return {
        "tasks": ratios,
        "average": average,
        "worst": found[worst],
        "worst_task": worst,
        "drop": average - found[worst],
    }


def make_reference(model: str, seed: int, tasks: tuple[str, ...] = TASKS, task_set: str = "four") -> dict[str, Any]:
    answered = dict(zip(tasks, (EXPERTS * 2)[: len(tasks)], strict=True))
    if model == "small" and seed == 1:
        answered["math"] = 0  # an expert that learned nothing
    experts = {task: make_score(count) for task, count in answered.items()}
    pretrained = {task: make_score(1) for task in tasks}
    return {
        "model": model,
        "task_set": task_set,
        "seed": seed,
        "pretrained": {
            "losses": dict.fromkeys(tasks, 3.0),
            "multi_task_loss": 3.0,
            "scores": pretrained,
            "retention": {"coqa": make_score(6), "pubmedqa": make_score(5, metric="choice")},
            "normalized": make_normalized(pretrained, experts),
        },
        "experts": {"losses": dict.fromkeys(tasks, 1.0), "multi_task_loss": 1.0, "scores": experts},
    }


def make_round(r: int, tasks: tuple[str, ...], method: str, seed: int) -> dict[str, Any]:
    return {
        "round": r,
        "validation_losses": {task: 3.0 / r + 0.1 * t for t, task in enumerate(tasks)},
        "multi_task_validation_loss": 3.0 / r + 0.01 * seed + 0.02 * len(method),
        "weights": {
            task: (1 + t * (r - 1)) / sum(1 + u * (r - 1) for u in range(len(tasks))) for t, task in enumerate(tasks)
        },
        "loss_gaps": {task: 1.0 / r - 0.1 * t for t, task in enumerate(tasks)},
        "kept_share": 0.5 + 0.05 * r if method.startswith("metis") else 1.0,
        "drift": {task: 1.0 / r + 0.05 * t for t, task in enumerate(tasks)},
        "distance": 0.4 * r + 0.01 * len(method),
        "cosines": {task: {other: 1.0 if task == other else 0.1 * r for other in tasks} for task in tasks},
    }


def make_cell(
    model: str, method: str, protocol: str, seed: int, tasks: tuple[str, ...] = TASKS, task_set: str = "four"
) -> dict[str, Any]:
    """The larger model and later seeds answer no more; the loss grows by 0.1 per seed."""
    answered = dict(zip(tasks, (ANSWERED[method, protocol] * 2)[: len(tasks)], strict=True))
    scores = {task: make_score(count) for task, count in answered.items()}
    experts = make_reference(model, seed, tasks, task_set)["experts"]["scores"]
    multi_task_loss = LOSSES[protocol] + 0.1 * seed
    num_rounds = {"post_hoc": 1, "many_shot": 3, "joint": 0}[protocol]
    return {
        "model": model,
        "task_set": task_set,
        "method": method,
        "protocol": protocol,
        "seed": seed,
        "status": "done",
        "settings": {"density": 0.2},
        "losses": dict.fromkeys(tasks, multi_task_loss),
        "multi_task_loss": multi_task_loss,
        "scores": scores,
        "retention": {"coqa": make_score(5), "pubmedqa": make_score(5, metric="choice")},
        "normalized": make_normalized(scores, experts),
        "example_scores": {task: [1.0] * count + [0.0] * (10 - count) for task, count in answered.items()},
        "rounds": [make_round(r + 1, tasks, method, seed) for r in range(num_rounds)],
        "train_steps": 60,
    }


def unmade(cell: dict[str, Any], status: str, error: str = "") -> dict[str, Any]:
    kept = {key: cell[key] for key in ("model", "task_set", "method", "protocol", "seed")}
    return kept | {"status": status} | ({"error": error} if error else {})


def make_results() -> dict[str, Any]:
    """On `small`, TIES post-hoc lacks seed 2 and its many-shot seed 1 failed; on `large`, all is there."""
    seven = ("instruction", "math", "m_arc", "safety", "code", "science", "reading")
    cells = [
        make_cell(model, method, protocol, seed)
        for model in MODELS
        for method, (_, protocols) in METHODS.items()
        for protocol in protocols
        for seed in SEEDS
    ]
    for i, cell in enumerate(cells):
        if (cell["model"], cell["method"]) == ("small", "ties"):
            if (cell["protocol"], cell["seed"]) == ("post_hoc", 2):
                cells[i] = unmade(cell, "missing")
            if (cell["protocol"], cell["seed"]) == ("many_shot", 1):
                cells[i] = unmade(cell, "failed", "out of memory\nin round 2")
    cells += [make_cell("small", method, "many_shot", 0, seven, "seven") for method in ("ties", "metis")]
    return {
        "format": 1,
        "name": "by_hand",
        "models": list(MODELS),
        "task_sets": {
            "four": {"tasks": list(TASKS), "seeds": list(SEEDS)},
            "seven": {"tasks": list(seven), "seeds": [0]},
        },
        "categories": {"multilingual": ["m_arc"], "following": ["instruction", "safety"]},
        "retention": ["coqa", "pubmedqa"],
        "rounds": 3,
        "local_steps": 5,
        "methods": {
            method: {
                "label": label,
                "operator": None if method == "joint" else method.split("_")[0],
                "protocols": list(protocols),
                "ablation_of": "metis" if method in REMOVES else None,
                "removes": REMOVES.get(method),
            }
            for method, (label, protocols) in METHODS.items()
        },
        "references": [
            *(make_reference(model, seed) for model in MODELS for seed in SEEDS),
            make_reference("small", 0, seven, "seven"),
        ],
        "cells": cells,
        "tuning": [
            {
                "model": "small",
                "task_set": "four",
                "method": "ties",
                "protocol": "many_shot",
                "seeds": [0],
                "candidates": [
                    {"settings": {"density": 0.1, "scaling": 1.0}, "multi_task_validation_loss": 1.75},
                    {"settings": {"density": 0.2, "scaling": 1.0}, "multi_task_validation_loss": 1.5},
                    {"settings": {"density": 0.4, "scaling": 1.0}, "multi_task_validation_loss": None},
                ],
                "chosen": 1,
            }
        ],
        "steps": {
            "shared": 7400,
            "one_by_one": 19000,
            "ratio": 19000 / 7400,
            "by_part": {"experts": 2400, "many_shot": 4000, "joint": 1000},
        },
    }


# ---- shares of the gain kept -------------------------------------------------------------------------------------

# what every task's test loss comes to, of 3 before and 1 with its expert, by method; seed 1 adds 0.2 to the first task
SHARED_LOSSES = {"metis": (1.0, 1.2, 1.4, 1.2), "mean": (1.4, 1.4, 1.8, 1.4), "joint": (1.0, 1.0, 1.0, 1.2)}


def told(nats: float, tokens: int) -> dict[str, Any]:
    return {"nats": nats, "num_tokens": tokens}


def add_shares(results: dict[str, Any], *, examples: bool = True) -> dict[str, Any]:
    """The results, with shares and (two) examples' losses as compare_results gives them."""
    results["baseline"] = "mean"
    for cell in results["cells"]:
        if cell["status"] != "done" or (cell["method"] not in SHARED_LOSSES):
            continue
        tasks = results["task_sets"][cell["task_set"]]["tasks"]
        values = (SHARED_LOSSES[cell["method"]] * 2)[: len(tasks)]
        cell["losses"] = dict(zip(tasks, values, strict=True))
        cell["losses"][tasks[0]] += 0.2 if cell["seed"] == 1 else 0.0
        before, best, joint = (dict.fromkeys(tasks, value) for value in (3.0, 1.0, 1.1))
        cell["share"] = shares(before, cell["losses"], best)
        cell["share_of_joint"] = shares(before, cell["losses"], joint)
        if examples:
            both = {task: [told(5 * loss, 5), told(15 * loss, 15)] for task, loss in cell["losses"].items()}
            cell["example_losses"] = {task: example_losses(said) for task, said in both.items()}
    return results


# ---- what is asked of a table -------------------------------------------------------------------------------------


def need(table: Table | None) -> Table:
    assert table is not None
    return table


def pick(table: Table | None, *heads: str) -> dict[str, Any]:
    """The one row that begins with `heads`, by column name."""
    table = need(table)
    names = [column.name for column in table.columns]
    rows = [row for row in table.rows if row.cells[: len(heads)] == heads]
    assert len(rows) == 1
    return dict(zip(names, rows[0].cells, strict=True))


def close(found: Any, mean: float, error: float | None, count: int) -> None:
    assert isinstance(found, Estimate)
    assert found.mean == pytest.approx(mean)
    assert found.error == (None if error is None else pytest.approx(error, abs=1e-12))
    assert found.count == count
