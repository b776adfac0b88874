"""The paper's tables from a comparison's cells: Tables 1 to 5 and the ablation of Figure 5.

Every number is a mean over seeds of what the cells hold for the test split; nothing is computed from models here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from manyshot.compare_grid import PROTOCOLS, Grid, Group, Pick, loss, normalized, score, task_normalized
from manyshot.compare_render import Cell, Column, Row, Table, format_estimate
from manyshot.compare_statistics import estimate, paired_estimate

MODEL = Column("model", "Model", "text")
METHOD = Column("method", "Method", "text")
PROTOCOL = Column("protocol", "Protocol", "text")
NORMALIZED = (
    "Normalized performance: test score divided by the score of the expert fine-tuned on that task alone, "
    "with as many steps"
)
MARKS = "Best bold, second underlined, per model"
PRETRAINED = "Pretrained model"


def about(grid: Grid, task_set: str, split: str = "test") -> str:
    """`Task set four (4 tasks), test split; mean ± standard error over 3 seeds`."""
    spec = grid.task_sets[task_set]
    seeds = len(spec["seeds"])
    over = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed, so no standard error"
    where = f"{split} split" + ("; scores: benchmarks" if split == "test" and grid.benchmarks else "")
    return f"Task set {task_set} ({_count(spec['tasks'], 'task')}), {where}; {over}"


def _count(items: Sequence[Any], what: str) -> str:
    return f"{len(items)} {what}{'s' if len(items) != 1 else ''}"


def notes_of(grid: Grid, groups: Sequence[Group], task_set: str, *, ratios: bool = True) -> tuple[str, ...]:
    """What is missing among the rows, and where normalized performance is not defined."""
    models = list(dict.fromkeys(group.model for group in groups))
    return (*grid.missing(groups), *(grid.undefined(models, task_set) if ratios else []))


def heads(grid: Grid, group: Group) -> tuple[str, str, str]:
    return group.model, grid.label(group.method), PROTOCOLS[group.protocol]


def transitions(grid: Grid, task_set: str) -> list[tuple[Group, Group]]:
    """(post-hoc, many-shot) of every method that is wanted both ways."""
    pairs = [
        (Group(group.model, task_set, group.method, "post_hoc"), group)
        for group in grid.groups(task_set, ["many_shot"])
    ]
    return [(post_hoc, many_shot) for post_hoc, many_shot in pairs if grid.has(post_hoc)]


# ---- the tables ------------------------------------------------------------------------------------------------------


def table_1(grid: Grid) -> Table | None:
    """Multi-task loss E(Θ) = (1/T) Σ L_τ(Θ) and normalized average, post-hoc → many-shot, per operator."""
    pairs = transitions(grid, grid.main)
    if not pairs:
        return None
    average = normalized("average")
    columns = (
        *(MODEL, METHOD),
        Column("loss_post_hoc", "Loss, post-hoc"),
        Column("loss_many_shot", "Loss, many-shot"),
        Column("loss_difference", "Difference", signed=True),
        Column("normalized_post_hoc", "Normalized, post-hoc"),
        Column("normalized_many_shot", "Normalized, many-shot"),
        Column("normalized_difference", "Difference", signed=True),
    )
    rows = []
    for post_hoc, many_shot in pairs:
        cells: list[Cell] = [post_hoc.model, grid.label(post_hoc.method)]
        for pick in (loss, average):
            before, after = grid.by_seed(post_hoc, pick), grid.by_seed(many_shot, pick)
            cells += [estimate(before.values()), estimate(after.values()), paired_estimate(after, before)]
        rows.append(Row(tuple(cells), post_hoc.model))
    caption = (
        f"{about(grid, grid.main)}. Multi-task loss: mean over tasks of the token cross-entropy in nats, lower is "
        f"better. {NORMALIZED}, higher is better. Differences are many-shot − post-hoc, paired by seed."
    )
    groups = [group for pair in pairs for group in pair]
    notes = (*_unmerged(grid), *notes_of(grid, groups, grid.main))
    return Table("table_1", "post-hoc and many-shot merging", caption, columns, tuple(rows), notes, "Table 1")


def _unmerged(grid: Grid) -> list[str]:
    """The losses of what merges nothing, to hold Table 1 against."""
    lines = []
    for model in grid.models:
        parts = []
        for name, key in (("pretrained model", "pretrained"), ("experts, each on its own task", "experts")):
            found = grid.estimate_references(model, grid.main, _reference_loss(key))
            parts.append(f"{name} {format_estimate(found)}")
        for group in grid.groups(grid.main, ["joint"]):
            if group.model == model:
                parts.append(f"{grid.label(group.method)} {format_estimate(grid.estimate(group, loss))}")
        lines.append(f"{model}, multi-task loss without merging: {'; '.join(parts)}.")
    return lines


def _reference_loss(key: str) -> Pick:
    return lambda reference: loss(reference[key])


def table_2(grid: Grid) -> Table | None:
    """Normalized performance per category and over all tasks, per model."""
    groups = grid.groups(grid.main)
    if not groups:
        return None
    categories = grid.columns_by_category(grid.main)
    picks = [*(task_normalized(tasks) for tasks in categories.values()), normalized("average")]
    columns = (
        *(MODEL, METHOD, PROTOCOL),
        *(Column(category, category, better="higher") for category in categories),
        Column("average", "Average", better="higher"),
    )
    members = "; ".join(f"{category}: {', '.join(tasks)}" for category, tasks in categories.items())
    caption = (
        f"{about(grid, grid.main)}. {NORMALIZED}. A category is the mean of its tasks ({members}), the average that of "
        f"all tasks. {MARKS}."
    )
    rows = tuple(
        Row((*heads(grid, group), *(grid.estimate(group, pick) for pick in picks)), group.model) for group in groups
    )
    title, notes = "normalized performance per category", notes_of(grid, groups, grid.main)
    return Table("table_2", title, caption, columns, rows, notes, "Table 2")


def table_3(grid: Grid) -> Table | None:
    """Average, worst task, and the drop between them, per model."""
    groups = grid.groups(grid.main)
    if not groups:
        return None
    columns = (
        *(MODEL, METHOD, PROTOCOL),
        Column("average", "Average", better="higher"),
        Column("worst", "Worst task", better="higher"),
        Column("drop", "Drop", better="lower"),
        Column("worst_tasks", "Which", "text"),
    )
    rows = [
        Row(
            (
                *heads(grid, group),
                *(grid.estimate(group, normalized(key)) for key in ("average", "worst", "drop")),
                worst_tasks(grid.done(group)),
            ),
            group.model,
        )
        for group in groups
    ]
    caption = (
        f"{about(grid, grid.main)}. {NORMALIZED}. Worst task: the smallest one of each seed, then the mean over seeds; "
        f"drop: average − worst task. {MARKS}."
    )
    title, notes = "average and worst task", notes_of(grid, groups, grid.main)
    return Table("table_3", title, caption, columns, tuple(rows), notes, "Table 3")


def worst_tasks(cells: Mapping[int, Mapping[str, Any]], of: str = "normalized") -> str:
    """Which task is the worst, by normalized performance or by `share`, over seeds."""
    return counted([cell[of]["worst_task"] for cell in cells.values() if cell.get(of)])


def counted(names: Sequence[str | None]) -> str:
    """`math`, or `math (2), safety (1)` where seeds differ."""
    counts = {name: names.count(name) for name in names if name is not None}
    if len(counts) < 2:
        return next(iter(counts), "")
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def table_4(grid: Grid) -> Table | None:
    """Scores on tasks that are never trained, and their difference from the pretrained model's."""
    groups = grid.groups(grid.main)
    if not groups or not grid.retention:
        return None
    columns: list[Column] = [MODEL, METHOD, PROTOCOL]
    for task in grid.retention:
        columns += [
            Column(f"{task}_score", task, better="higher"),
            Column(f"{task}_difference", f"{task}, difference", signed=True),
        ]
    columns.append(Column("mean_difference", "Mean difference", signed=True, better="higher"))
    rows = []
    for model in dict.fromkeys(group.model for group in groups):
        picks = [_pretrained_score(task) for task in grid.retention]
        scores = [grid.estimate_references(model, grid.main, pick) for pick in picks]
        cells: list[Cell] = [model, PRETRAINED, ""]
        for found in scores:
            cells += [found, ""]
        rows.append(Row((*cells, ""), model, reference=True))
        rows += [_retention_row(grid, group) for group in groups if group.model == model]
    metrics = "; ".join(f"{task}: {metric}" for task, metric in _metrics(grid).items())
    caption = (
        f"Tasks that are scored and never trained ({metrics}). {about(grid, grid.main)}. Scores in 0…1, higher is "
        f"better; differences from the pretrained model, paired by seed. {MARKS}."
    )
    title, notes = "what is kept of the pretrained model", notes_of(grid, groups, grid.main, ratios=False)
    return Table("table_4", title, caption, tuple(columns), tuple(rows), notes, "Table 4")


def _pretrained_score(task: str) -> Pick:
    return lambda ref: score(task, "retention")(ref["pretrained"])


def _retention_row(grid: Grid, group: Group) -> Row:
    """Score and difference of every retention task; the mean difference of a seed needs all of them."""
    cells: list[Cell] = [*heads(grid, group)]
    references = grid.references(group.model, group.task_set)
    by_task = []
    for task in grid.retention:
        after = grid.by_seed(group, score(task, "retention"))
        pick = _pretrained_score(task)
        before = {seed: None if ref is None else pick(ref) for seed, ref in references.items() if seed in after}
        cells += [estimate(after.values()), paired_estimate(after, before)]
        by_task.append({seed: _minus(after[seed], before.get(seed)) for seed in after})
    means = []
    for seed in grid.cells(group):
        found = [differences[seed] for differences in by_task]
        numbers = [value for value in found if value is not None]
        means.append(fmean(numbers) if len(numbers) == len(found) else None)
    return Row((*cells, estimate(means)), group.model)


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _metrics(grid: Grid) -> dict[str, str]:
    """Retention task -> its metric, as far as anything was measured."""
    found: dict[str, str] = dict.fromkeys(grid.retention, "not measured")
    for reference in grid.results["references"]:
        found |= {
            task: entry["metric"] for task, entry in reference["pretrained"]["retention"].items() if task in found
        }
    return found


def table_5(grid: Grid) -> Table | None:
    """Normalized average and worst task of the task sets, many-shot and joint; one set alone is Table 3."""
    if len(grid.task_sets) < 2:
        return None
    rows = list(
        dict.fromkeys(
            (model, method, protocol)
            for task_set in grid.task_sets
            for model, _, method, protocol in map(_parts, grid.groups(task_set, ["many_shot", "joint"]))
        )
    )
    order = {name: place for names in (grid.models, list(grid.methods)) for place, name in enumerate(names)}
    rows.sort(key=lambda row: (order[row[0]], order[row[1]]))
    if not rows:
        return None
    columns: list[Column] = [MODEL, METHOD, PROTOCOL]
    for task_set in grid.task_sets:
        columns += [
            Column(f"{task_set}_average", f"{task_set} ({_count(grid.tasks(task_set), 'task')})", better="higher"),
            Column(f"{task_set}_worst", f"{task_set}, worst", better="higher"),
        ]
    found, groups = [], []
    for model, method, protocol in rows:
        cells: list[Cell] = [model, grid.label(method), PROTOCOLS[protocol]]
        for task_set in grid.task_sets:
            group = Group(model, task_set, method, protocol)
            groups += [group] if grid.has(group) else []
            wanted = grid.has(group)
            cells += [grid.estimate(group, normalized(key)) if wanted else "" for key in ("average", "worst")]
        found.append(Row(tuple(cells), model))
    seeds = "; ".join(f"{name}: {_count(spec['seeds'], 'seed')}" for name, spec in grid.task_sets.items())
    caption = (
        f"{NORMALIZED}; average over the tasks of a set, and its worst task. Test split; mean ± standard error over "
        f"seeds ({seeds}); an empty cell is not part of the study. {MARKS}."
    )
    notes = [
        note
        for task_set in grid.task_sets
        for note in notes_of(grid, [group for group in groups if group.task_set == task_set], task_set)
    ]
    return Table("table_5", "more tasks", caption, tuple(columns), tuple(found), tuple(notes), "Table 5")


def _parts(group: Group) -> tuple[str, str, str, str]:
    return group.model, group.task_set, group.method, group.protocol


def ablation_groups(grid: Grid, model: str, full: str) -> list[tuple[str, Group]]:
    """(what was taken away, cells) of Figure 5: nothing, many-shot merging, then every other part."""
    found = [
        ("nothing (full)", Group(model, grid.main, full, "many_shot")),
        ("many-shot merging", Group(model, grid.main, full, "post_hoc")),
    ]
    for method, spec in grid.methods.items():
        if spec["ablation_of"] == full:
            found.append((spec["removes"] or spec["label"], Group(model, grid.main, method, "many_shot")))
    return [(removes, group) for removes, group in found if grid.has(group)]


def ablation(grid: Grid) -> Table | None:
    """Figure 5: a method without many-shot merging and without each of its parts; differences from the full one."""
    columns = (
        *(MODEL, METHOD, Column("without", "Without", "text")),
        Column("normalized", "Normalized average", better="higher"),
        Column("worst", "Worst task", better="higher"),
        Column("loss", "Multi-task loss", better="lower"),
        Column("difference", "Difference to full", "number", signed=True),
        *(Column("low", "95 % from", "number", signed=True), Column("high", "to", "number", signed=True)),
    )
    rows, groups = [], []
    for model in grid.models:
        for full in grid.fulls():
            parts = ablation_groups(grid, model, full)
            if len(parts) < 2:
                continue
            for removes, group in parts:
                groups.append(group)
                estimates = [grid.estimate(group, pick) for pick in (normalized("average"), normalized("worst"), loss)]
                rows.append(
                    Row((model, grid.label(full), removes, *estimates, *_against(grid, group, parts)), model + full)
                )
    if not rows:
        return None
    caption = (
        f"{about(grid, grid.main)}. {NORMALIZED}; average over tasks. Difference: without the part − with all parts, "
        "paired by seed and example, with a 95 % bootstrap interval. Best bold, second underlined."
    )
    notes = notes_of(grid, groups, grid.main)
    return Table("ablation", "ablation", caption, columns, tuple(rows), notes, "Figure 5")


def _against(grid: Grid, group: Group, parts: Sequence[tuple[str, Group]]) -> tuple[Cell, ...]:
    """Difference to the full method with its interval; the full method itself has none."""
    full = parts[0][1]
    if group == full:
        return "", "", ""
    paired, _ = grid.compare(group, full)
    return paired.difference, paired.low, paired.high
