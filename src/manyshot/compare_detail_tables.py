"""What stands behind the paper's tables: every task, paired differences, settings, steps, and the rounds themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from manyshot.compare_gain import CRITERIA
from manyshot.compare_grid import PROTOCOLS, Grid, Group, score, score_normalized, task_kept, task_loss
from manyshot.compare_render import Cell, Column, Row, Table
from manyshot.compare_rounds import (
    at_round,
    cosine_to_others,
    mean_cosine,
    mean_drift,
    named,
    of_task,
    rounds_of,
)
from manyshot.compare_tables import (
    MARKS,
    METHOD,
    MODEL,
    NORMALIZED,
    PRETRAINED,
    PROTOCOL,
    about,
    heads,
    notes_of,
    transitions,
)

TASK_SET = Column("task_set", "Task set", "text")
EXPERTS = "Experts, each on its own task"
# tables of what is relative to the experts, who would have 1 everywhere
RELATIVE = ("per_task_normalized", "per_task_shares")


# ---- every task ------------------------------------------------------------------------------------------------------


def per_task_scores(grid: Grid) -> Table | None:
    """Score on every task, or benchmark, of every task set, beside the pretrained model's and the experts'."""
    title = "scores on every benchmark" if grid.benchmarks else "test scores of every task"
    kind = "Scores" if grid.benchmarks else "Test scores"
    caption = f"{kind} in 0…1, higher is better ({_measures(grid)})"
    return _per_task(grid, "per_task_scores", title, caption, "higher", score)


def per_task_losses(grid: Grid) -> Table | None:
    """Test loss L_τ of every task."""
    caption = "Mean token cross-entropy in nats on the test split, lower is better"
    return _per_task(grid, "per_task_losses", "test losses of every task", caption, "lower", task_loss)


def per_task_normalized(grid: Grid) -> Table | None:
    """Normalized performance on every task, or benchmark."""
    title = f"normalized performance of every {'benchmark' if grid.benchmarks else 'task'}"
    return _per_task(grid, "per_task_normalized", title, NORMALIZED, "higher", score_normalized)


def per_task_shares(grid: Grid) -> Table | None:
    """Share of the gain kept on every task; nothing where it was not computed."""
    if not any("share" in cell for cell in grid.results["cells"]):
        return None
    caption = "Share of the expert's gain on the pretrained model's test loss that a model keeps, higher is better"
    return _per_task(grid, "per_task_shares", "share of the gain kept of every task", caption, "higher", task_kept)


def _per_task(
    grid: Grid, name: str, title: str, caption: str, better: Literal["higher", "lower"], pick_of: Any
) -> Table | None:
    """Rows: model, task set, method; columns: the tasks, or benchmarks, of all sets, empty where a set lacks one."""
    of_tasks, relative = name in ("per_task_losses", "per_task_shares"), name in RELATIVE
    columns_of = grid.tasks if of_tasks else grid.scored
    tasks = list(dict.fromkeys(task for task_set in grid.task_sets for task in columns_of(task_set)))
    rows: list[Row] = []
    notes: list[str] = []
    for model in grid.models:
        for task_set in grid.task_sets:
            groups = [group for group in grid.groups(task_set, ablations=True) if group.model == model]
            if not groups:
                continue
            known = columns_of(task_set)
            kinds = {} if name == "per_task_shares" else {PRETRAINED: "pretrained"}
            kinds |= {} if relative else {EXPERTS: "experts"}
            for label, key in kinds.items():
                found = [
                    _reference(grid, model, task_set, pick_of, task, key) if task in known else "" for task in tasks
                ]
                rows.append(Row((model, task_set, label, "", *found), model + task_set, reference=True))
            for group in groups:
                cells = [grid.estimate(group, pick_of(task)) if task in known else "" for task in tasks]
                _, method, protocol = heads(grid, group)
                rows.append(Row((model, task_set, method, protocol, *cells), model + task_set))
            notes += notes_of(grid, groups, task_set, ratios=name == "per_task_normalized")
    if not rows:
        return None
    columns = (MODEL, TASK_SET, METHOD, PROTOCOL, *(Column(task, task, better=better) for task in tasks))
    caption = f"{caption}. Mean ± standard error over seeds. {MARKS} and task set."
    return Table(name, title, caption, columns, tuple(rows), tuple(notes))


def _reference(grid: Grid, model: str, task_set: str, pick_of: Any, task: str, key: str) -> Cell:
    pick = pick_of(task)
    return grid.estimate_references(model, task_set, lambda reference: pick(reference[key]))


def _measures(grid: Grid) -> str:
    """`math: exact_match, 64 examples; …`, as far as anything was measured."""
    found: dict[str, tuple[str, set[int]]] = {}
    for reference in grid.results["references"]:
        for task, entry in reference["pretrained"]["scores"].items():
            found.setdefault(task, (entry["metric"], set()))[1].add(entry["num_examples"])
    return "; ".join(
        f"{task}: {metric}, {' or '.join(map(str, sorted(counts)))} examples"
        for task, (metric, counts) in found.items()
    )


# ---- paired differences ----------------------------------------------------------------------------------------------


def paired(grid: Grid) -> Table | None:
    """Many-shot − post-hoc per operator, and the full method − every other one, with 95 % bootstrap intervals."""
    columns = (
        *(MODEL, Column("first", "First", "text"), Column("second", "− second", "text")),
        Column("difference", "Normalized average", "number", signed=True),
        *(Column("low", "95 % from", "number", signed=True), Column("high", "to", "number", signed=True)),
        *(Column("seeds", "Seeds", "number"), Column("scores", "Pairs", "number")),
        Column("loss_difference", "Multi-task loss", signed=True),
    )
    rows, groups = [], []
    for kind, first, second in _comparisons(grid):
        groups += [first, second]
        found, losses = grid.compare(first, second)
        numbers = (found.difference, found.low, found.high, found.num_seeds, found.num_scores)
        rows.append(Row((first.model, grid.name(first), grid.name(second), *numbers, losses), first.model + kind))
    if not rows:
        return None
    caption = (
        f"{about(grid, grid.main)}. Differences, first − second, over the same seeds, tasks and test examples. "
        f"{NORMALIZED}, averaged over tasks: above 0 the first is better; 95 % interval from a hierarchical bootstrap "
        "(seeds, then examples of each task; experts' scores fixed), not corrected for the number of comparisons. With "
        "one seed it is silent about training noise, with few it is too narrow. Pairs: example scores that were "
        "compared. Multi-task loss, paired by seed: below 0 the first is better."
    )
    notes = notes_of(grid, list(dict.fromkeys(groups)), grid.main)
    return Table(
        "paired", "many-shot − post-hoc, and the full method − every other", caption, columns, tuple(rows), notes
    )


def _comparisons(grid: Grid) -> Iterator[tuple[str, Group, Group]]:
    """(kind, first, second): per model, both protocols of an operator, then the full method beside every other one."""
    for model in grid.models:
        for post_hoc, many_shot in transitions(grid, grid.main):
            if many_shot.model == model:
                yield "protocol", many_shot, post_hoc
        for full in grid.fulls():
            first = Group(model, grid.main, full, "many_shot")
            for second in grid.groups(grid.main, ["many_shot", "joint"]):
                if grid.has(first) and second.model == model and second != first:
                    yield full, first, second


# ---- settings, steps -------------------------------------------------------------------------------------------------


def settings_text(settings: Mapping[str, Any]) -> str:
    """`density 0.2, scaling 1.0`; what is null is not in use."""
    parts = [
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in sorted(settings.items())
        if value is not None
    ]
    return ", ".join(parts) or "none"


def tuning(grid: Grid) -> Table | None:
    """What was tried on validation for every method, what was chosen, and the steps that a cell was given."""
    columns = (
        *(MODEL, METHOD, PROTOCOL),
        Column("settings", "Settings", "text"),
        *(Column("tried", "Tried", "number"), Column("not_finished", "Not finished", "number")),
        Column("seeds", "On seeds", "text"),
        Column("by", "By", "text"),
        *(Column("chosen_value", "Chosen", "number"), Column("worst_value", "Worst", "number")),
        Column("train_steps", "Steps", "number"),
    )
    tuned = {(entry["model"], entry["method"], entry["protocol"]): entry for entry in grid.results["tuning"]}
    rows = []
    for group in grid.groups(grid.main, ablations=True):
        done = list(grid.done(group).values())
        used = " or ".join(dict.fromkeys(settings_text(cell["settings"]) for cell in done))
        steps = max((cell["train_steps"] for cell in done), default=None)
        search = _search(tuned.get((group.model, group.method, group.protocol)))
        rows.append(Row((*heads(grid, group), used, *search, steps), group.model))
    if not rows:
        return None
    caption = (
        "Settings of every method. Where several were tried, they were compared on the validation split, of the seeds "
        "named: by multi-task loss, or by the share of the experts' gain that is kept, over tasks or on the worst; the "
        "test split had no part in it. Chosen, worst: those numbers. Steps: optimizer steps of one cell, over all "
        f"tasks and rounds of task set {grid.main}."
    )
    notes = grid.missing(grid.groups(grid.main, ablations=True))
    return Table("tuning", "settings and how they were chosen", caption, columns, tuple(rows), tuple(notes))


def _search(entry: Mapping[str, Any] | None) -> tuple[Cell, ...]:
    """Tried, not finished, seeds, by what, the chosen and the worst value; empty for a method without a grid."""
    if entry is None:
        return "", "", "", "", "", ""
    by = entry.get("choose_by", "multi_task_loss")
    values = [candidate[CRITERIA[by][0]] for candidate in entry["candidates"]]
    found = [value for value in values if value is not None]
    chosen = None if entry["chosen"] is None else values[entry["chosen"]]
    seeds = ", ".join(map(str, entry["seeds"]))
    worst = min(found, default=None) if CRITERIA[by][1] else max(found, default=None)
    return len(values), len(values) - len(found), seeds, by.replace("_", " "), chosen, worst


def tuning_candidates(grid: Grid) -> Table | None:
    """Every candidate of every grid with what it reached on validation."""
    columns = (
        *(MODEL, METHOD, PROTOCOL, Column("settings", "Settings", "text")),
        Column("validation_loss", "Multi-task validation loss", "number"),
        *(Column("validation_share", "Share kept", "number"), Column("worst_share", "Worst task", "number")),
        Column("chosen", "Chosen", "text"),
    )
    rows = [
        Row(
            (
                *(entry["model"], grid.label(entry["method"]), PROTOCOLS[entry["protocol"]]),
                settings_text(candidate["settings"]),
                *(candidate.get(name) for name, _ in CRITERIA.values()),
                "yes" if place == entry["chosen"] else "",
            ),
            f"{entry['model']} {entry['method']} {entry['protocol']}",
        )
        for entry in grid.results["tuning"]
        for place, candidate in enumerate(entry["candidates"])
    ]
    caption = (
        "Mean over the tuning seeds; share kept, worst task: of the experts' gain in validation loss. – where a "
        "candidate did not finish, or a number is not finite or not defined."
    )
    return Table("tuning_candidates", "all candidates", caption, columns, tuple(rows)) if rows else None


def steps(grid: Grid) -> Table | None:
    """Optimizer steps of the whole comparison: with everything shared that cells have in common, and one by one."""
    found = grid.results["steps"]
    rows = [Row((name.replace("_", " "), count), "parts") for name, count in found["by_part"].items()]
    rows += [
        Row(("all, shared", found["shared"]), "sums"),
        Row(("every cell on its own", found["one_by_one"]), "sums"),
        Row(("saved: times as many", found["ratio"]), "sums"),
    ]
    columns = (Column("part", "Optimizer steps", "text"), Column("steps", "Steps", "number", digits=2))
    caption = (
        "Of all models, task sets, methods and seeds. Experts and the first round's local updates start from the "
        "pretrained model, so they depend on no operator and are trained once."
    )
    return Table("steps", "optimizer steps", caption, columns, tuple(rows))


# ---- rounds ----------------------------------------------------------------------------------------------------------

ROUND = Column("round", "Round", "text")


def dynamics(grid: Grid) -> Table | None:
    """Multi-task loss, drift, distance, cosines and kept share per round, of every merging method."""
    columns = (
        *(MODEL, METHOD, PROTOCOL, ROUND),
        Column("validation_loss", "Validation loss"),
        Column("drift", "Drift ‖θᵣτ − Θʳ⁻¹‖"),
        Column("distance", "Distance ‖Θʳ − Θ⁰‖"),
        Column("cosine", "Cosine"),
        Column("kept_share", "Kept share"),
    )
    values = (named("multi_task_validation_loss"), mean_drift, named("distance"), mean_cosine, named("kept_share"))
    groups = grid.groups(grid.main, ["post_hoc", "many_shot"], ablations=True)
    rows = [
        Row(
            (*heads(grid, group), str(r), *(grid.estimate(group, at_round(r, value)) for value in values)),
            f"{group.model} {group.method} {group.protocol}",
        )
        for group in groups
        for r in rounds_of(grid, group)
    ]
    caption = (
        f"{about(grid, grid.main, 'validation')}. Validation loss: multi-task loss after the round. Drift: how far a "
        "task's local update moves from the round's start, mean over tasks. Distance: of the merged model from the "
        "pretrained one. Cosine: of two tasks' vectors, mean over pairs. Kept share: of the changed coordinates, what "
        "the merge did not set to zero. Post-hoc merging has one round of all local steps."
    )
    notes = tuple(grid.missing(groups))
    return Table("dynamics", "what happens in the rounds", caption, columns, tuple(rows), notes) if rows else None


def dynamics_tasks(grid: Grid) -> Table | None:
    """Validation loss, weight, loss gap, drift and cosine of every task in every round."""
    columns = (
        *(MODEL, METHOD, PROTOCOL, ROUND, Column("task", "Task", "text")),
        Column("validation_loss", "Validation loss"),
        *(Column("weight", "Weight"), Column("loss_gap", "Loss gap", signed=True)),
        *(Column("drift", "Drift"), Column("cosine", "Cosine")),
    )
    groups = grid.groups(grid.main, ["post_hoc", "many_shot"], ablations=True)
    rows = []
    for group in groups:
        for r in rounds_of(grid, group):
            for task in grid.tasks(grid.main):
                values = (
                    *(of_task(key, task) for key in ("validation_losses", "weights", "loss_gaps", "drift")),
                    cosine_to_others(task),
                )
                cells = (grid.estimate(group, at_round(r, value)) for value in values)
                rows.append(
                    Row((*heads(grid, group), str(r), task, *cells), f"{group.model} {group.method} {group.protocol}")
                )
    caption = (
        f"{about(grid, grid.main, 'validation')}. Validation loss: of the merged model after the round. "
        "Loss gap: of the round's start against the task's own update. Cosine: mean with the other tasks."
    )
    notes = tuple(grid.missing(groups))
    return Table("dynamics_tasks", "rounds, task by task", caption, columns, tuple(rows), notes) if rows else None
