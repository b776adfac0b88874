"""Tables of the share of the gain kept: of every method, beside a reference row; what a bad task costs the others."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from manyshot.compare_grid import Grid, Group, kept
from manyshot.compare_render import Cell, Column, Row, Table
from manyshot.compare_statistics import estimate, paired_estimate
from manyshot.compare_tables import MARKS, METHOD, MODEL, PROTOCOL, counted, heads, worst_tasks
from manyshot.gap_weights import SMALLEST_GAIN

TASK_SET = Column("task_set", "Task set", "text")
SHARE = (
    "Share of the gain kept: (L_pre − L) / (L_pre − L_expert) of test losses, 0 as the pretrained model, 1 as the "
    "task's own expert, which is trained as the recipe says for all, whatever a method says for itself"
)


def share_kept(grid: Grid) -> Table | None:
    """Average and worst share of every method, beside the experts and beside joint fine-tuning; paired differences."""
    columns = (
        *(MODEL, TASK_SET, METHOD, PROTOCOL),
        Column("average", "Share kept", better="higher"),
        Column("worst", "Worst task", better="higher"),
        Column("worst_tasks", "Which", "text"),
        Column("joint_average", "Of joint's gain", better="higher"),
        Column("joint_worst", "Worst task", better="higher"),
        Column("difference", "Difference", "number", signed=True),
        *(Column("low", "95 % from", "number", signed=True), Column("high", "to", "number", signed=True)),
        Column("worst_difference", "Difference, worst task", signed=True),
        Column("validation_average", "On validation", better="higher"),
        Column("validation_worst", "Worst task", better="higher"),
    )
    rows, groups = [], []
    for model, task_set in _blocks(grid):
        block = [group for group in grid.groups(task_set, ablations=True) if group.model == model]
        if not any("share" in cell for group in block for cell in grid.done(group).values()):
            continue
        for group in block:
            groups.append(group)
            own = [grid.estimate(group, kept(key)) for key in ("average", "worst")]
            joint: list[Cell] = ["", ""]
            if group.protocol != "joint" and grid.groups(task_set, ["joint"]):
                joint = [grid.estimate(group, kept(key, "share_of_joint")) for key in ("average", "worst")]
            validation: list[Cell] = ["", ""]  # which joint fine-tuning is not measured on
            if group.protocol != "joint":
                validation = [grid.estimate(group, kept(key, "validation_share")) for key in ("average", "worst")]
            which = worst_tasks(grid.done(group), "share")
            cells = (*own, which, *joint, *_against_baseline(grid, group), *validation)
            _, method, protocol = heads(grid, group)
            rows.append(Row((model, task_set, method, protocol, *cells), model + task_set))
    if not rows:
        return None
    baseline = f"{grid.label(grid.baseline)}, many-shot" if grid.baseline else "a reference row, of which there is none"
    caption = (
        f"{SHARE}. Average over tasks, and the worst task of each seed; mean ± standard error over seeds. Of joint's "
        f"gain: with the losses of joint fine-tuning in place of the experts'. Difference: the row − {baseline}; of "
        "the averages paired by seed and test example, with a 95 % bootstrap interval (seeds, then examples; gains "
        f"fixed; with one seed silent about training noise), of worst tasks by seed. On validation: the same "
        f"shares of validation losses, for whoever still chooses. {MARKS} and task set."
    )
    notes = (*grid.missing(groups), *_undefined(grid), *_unpaired(grid, groups))
    return Table("share_kept", "share of the gain kept", caption, columns, tuple(rows), notes)


def _blocks(grid: Grid) -> list[tuple[str, str]]:
    return [(model, task_set) for model in grid.models for task_set in grid.task_sets]


def _baseline(grid: Grid, group: Group) -> Group | None:
    """The reference row beside a row, where there is one and the row is another."""
    if grid.baseline is None:
        return None
    found = Group(group.model, group.task_set, grid.baseline, "many_shot")
    return found if grid.has(found) and found != group else None


def _against_baseline(grid: Grid, group: Group) -> tuple[Cell, ...]:
    """Difference of the averages with its interval, and of the worst tasks over seeds."""
    other = _baseline(grid, group)
    if other is None:
        return "", "", "", ""
    found = grid.compare_shares(group, other)
    ours, theirs = (grid.by_seed(one, kept("worst")) for one in (group, other))
    return found.difference, found.low, found.high, paired_estimate(ours, theirs)


def _undefined(grid: Grid) -> list[str]:
    """A line for every task that has no share, since its expert gained next to nothing."""
    lines = []
    for model, task_set in _blocks(grid):
        for seed, reference in grid.references(model, task_set).items():
            if reference is None:
                continue
            before, after = (reference[key]["losses"] for key in ("pretrained", "experts"))
            for task in grid.tasks(task_set):
                if before[task] is None or after[task] is None:
                    continue
                gain = before[task] - after[task]
                if gain <= SMALLEST_GAIN * before[task]:
                    lines.append(
                        f"{model}, {task_set}, seed {seed}: the expert of {task} gains {gain:.3g} on a loss of "
                        f"{before[task]:.3g}, no more than {SMALLEST_GAIN:.0%}; its share is not defined, and averages "
                        "and worst tasks leave it out."
                    )
    return lines


def _unpaired(grid: Grid, groups: list[Group]) -> list[str]:
    """Rows whose examples' losses are not known, so that there is no interval."""
    rows = [
        f"{group.model}, {group.task_set}: {grid.name(group)}"
        for group in groups
        if _baseline(grid, group) and any(lacks_losses(cell) for cell in grid.done(group).values())
    ]
    return [f"{row}: was measured before losses of examples were kept, so it has no interval." for row in rows]


def lacks_losses(cell: Mapping[str, Any]) -> bool:
    return not all((cell.get("example_losses") or {"": None}).values())


# ---- what a bad task costs -------------------------------------------------------------------------------------------


def bad_tasks(grid: Grid) -> Table | None:
    """For every task set that is held against another: what the tasks of both keep in the one and in the other."""
    columns = (
        *(MODEL, TASK_SET, METHOD, PROTOCOL),
        Column("without", "Share kept without", better="higher"),
        Column("with", "With", better="higher"),
        Column("cost", "Cost", signed=True, better="lower"),
        Column("most", "Most for one task", signed=True, better="lower"),
        Column("which", "Which", "text"),
    )
    rows, groups, kinds = [], [], []
    for model, task_set in _blocks(grid):
        against = grid.task_sets[task_set].get("against")
        if against is None:
            continue
        both = [task for task in grid.tasks(task_set) if task in grid.tasks(against)]
        kinds.append(_kind(grid, task_set, against, both))
        for group in grid.groups(task_set, ablations=True):
            clean = Group(group.model, against, group.method, group.protocol)
            if group.model != model or not grid.has(clean):
                continue
            groups += [group, clean]
            _, method, protocol = heads(grid, group)
            rows.append(Row((model, task_set, method, protocol, *_costs(grid, clean, group, both)), model + task_set))
    if not rows:
        return None
    caption = (
        f"{'; '.join(dict.fromkeys(kinds))}. {SHARE}; here averaged over the tasks of both sets that have one in both. "
        "Cost: without − with, over the same seeds; most for one task: the largest cost of each seed. Mean ± standard "
        f"error over seeds. {MARKS} and task set."
    )
    notes = (*grid.missing(list(dict.fromkeys(groups))), *_undefined(grid))
    return Table("bad_tasks", "what a bad task costs the others", caption, columns, tuple(rows), notes)


def _kind(grid: Grid, task_set: str, against: str, both: list[str]) -> str:
    """`noise: four with scrambled` or, where a task takes another's place, `large: four with math_x100 for math`."""
    more = [task for task in grid.tasks(task_set) if task not in both]
    fewer = [task for task in grid.tasks(against) if task not in both]
    return f"{task_set}: {against} with {', '.join(more) or 'no other task'}" + (
        f" in place of {', '.join(fewer)}" if fewer else ""
    )


def _costs(grid: Grid, clean: Group, group: Group, tasks: list[str]) -> tuple[Cell, ...]:
    """Without, with, cost, the largest cost of one task, and which task that is."""
    before, after = (
        {seed: cell["share"]["tasks"] for seed, cell in grid.done(one).items() if cell.get("share")}
        for one in (clean, group)
    )
    averages: dict[str, dict[int, float | None]] = {"without": {}, "with": {}}
    largest: dict[int, float | None] = {}
    which: list[str | None] = []
    for seed in grid.cells(group):
        if seed not in grid.cells(clean):
            continue
        old, new = before.get(seed, {}), after.get(seed, {})
        known = [task for task in tasks if old.get(task) is not None and new.get(task) is not None]
        costs = {task: old[task] - new[task] for task in known}
        averages["without"][seed] = fmean(old[task] for task in known) if known else None
        averages["with"][seed] = fmean(new[task] for task in known) if known else None
        largest[seed] = max(costs.values(), default=None)
        which.append(max(costs, key=lambda task: costs[task]) if known else None)
    return (
        *(estimate(found.values()) for found in averages.values()),
        paired_estimate(averages["without"], averages["with"]),
        estimate(largest.values()),
        counted(which),
    )
