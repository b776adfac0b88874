"""What every round did beside its weights: steps, the scaling that was searched, how far it went, what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from manyshot.report_data import Round, Subject
from manyshot.report_figures import by_round
from manyshot.report_page import Chart, Figure, Series, Sheet, listed, rounded, shown

MISSED = "share of the experts' gain that is missing"


def rounds_sheet(subject: Subject, of: str = "") -> Sheet | None:
    """One row for each round; columns of which nothing is known are left out."""
    if not subject.rounds:
        return None
    columns = {
        "steps a task": [_steps(one) for one in subject.rounds],
        "effective tasks": [_text(one.effective_tasks, 2) for one in subject.rounds],
        "kept": [_text(one.kept_share) for one in subject.rounds],
        "scaling": [_text(one.scaling) for one in subject.rounds],
        "outer step": [_text(one.outer_step) for one in subject.rounds],
        "mean drift": [_text(_mean_drift(one)) for one in subject.rounds],
        "update": [_text(one.update_norm) for one in subject.rounds],
        "distance": [_text(one.distance) for one in subject.rounds],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [(str(one.index), *(cells[i] for cells in known.values())) for i, one in enumerate(subject.rounds)]
    notes = [f"Round {one.index}: {note}." for one in subject.rounds for note in one.notes]
    notes += [text for name, text in MEANINGS.items() if name in known]
    return Sheet(f"What every round did{of}", ("round", *known), tuple(rows), 1, tuple(notes))


MEANINGS = {
    "effective tasks": "Effective tasks: exp of the entropy of the weights; all tasks when they weigh the same.",
    "scaling": "Scaling: what the line search over validation losses chose (scaling: auto).",
    "outer step": "Outer step: what the merged update is multiplied by (merge.outer_step_size).",
    "update": "Update: length of what the merge moved, ‖Θʳ − Θʳ⁻¹‖; mean drift is that of the tasks' own updates. "
    "Distance: from the pretrained model.",
}


def _text(value: float | None, digits: int = 3) -> str:
    return "" if value is None else shown(value, digits)


def _mean_drift(one: Round) -> float | None:
    found = [value for value in one.drift.values() if value is not None]
    return fmean(found) if found else None


def _steps(one: Round) -> str:
    """`30`, or `10 … 50` where tasks do not all take the same."""
    found = [round(value) for value in one.steps.values() if value is not None]
    if not found:
        return ""
    return f"{min(found)}" if min(found) == max(found) else f"{min(found)} … {max(found)}"


def steps(subject: Subject, tasks: Sequence[str]) -> Figure | None:
    """The training steps of every task, where not all take the same."""
    values = {task: [one.steps.get(task) for one in subject.rounds] for task in tasks}
    if all(len({one.steps.get(task) for task in tasks}) == 1 for one in subject.rounds):
        return None
    caption = (
        "Optimizer steps of every task: its own share of them (steps_share), or more where the round before gave it "
        "more weight (allocation: gap)."
    )
    return by_round(subject, values, "Training steps", caption, "stack")


def search(subject: Subject) -> Figure | None:
    """What the line search of every round tried, and what it chose."""
    searched = [one for one in subject.rounds if one.search]
    if not searched:
        return None
    charts, rows = [], []
    for one in searched:
        points = sorted(one.search)
        told = ", ".join(f"{shown(scaling)}: {shown(value)}" for scaling, value in points)
        label = f"Line search of round {one.index}, scaling {shown(one.scaling)} was chosen. By scaling: {told}."
        values = {MISSED: [rounded(value) for _, value in points]}
        names = [f"{scaling:g}" for scaling, _ in points]
        data = {"x": names, "axis": "scaling", "values": values, "level": [], "digits": 4}
        charts.append(Chart("lines", f"round {one.index}: {shown(one.scaling)}", label, data))
        rows += [(str(one.index), f"{scaling:g}", shown(value, 4)) for scaling, value in points]
    caption = (
        f"The scalings that the line search measured on the validation split, by the {MISSED} (lower is better); the "
        f"chosen one stands above. {listed([f'Round {one.index}: {len(one.search)} models' for one in searched], 4)}."
    )
    sheet = Sheet("Line search over the scaling", ("round", "scaling", MISSED), tuple(rows))
    return Figure("Line search", caption, (Series(MISSED, "merged"),), tuple(charts), sheet)
