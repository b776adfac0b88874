"""The figures of a report: what models score and lose, and what every round did. Data and words, no drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from manyshot.report_data import Block, Model, Numbers, Role, Round, Score, Subject
from manyshot.report_page import Chart, Figure, Series, Sheet, has_any, listed, rounded, shown

# a radar with fewer axes is no shape, one with more cannot be read
FEWEST_AXES, MOST_AXES = 3, 16
# shares above this are drawn at it, so that one task does not shrink all others
LARGEST_SHARE = 2.0
# tasks that can be told apart by colour and pattern in one chart; more are shown as rows of a heat map
MOST_COLOURS = 16
# models that can be told apart in one chart; of more, only those are shown at first that the verdict speaks of
MOST_MODELS = 8
# cells of all cosine matrices of a page: later rounds come first
MOST_CELLS = 20_000

# models that there is one of, or that are all drawn as one
REFERENCES = ("pretrained", "experts")

Pick = Callable[[Round], Numbers]


def models_of(block: Block) -> list[Model]:
    """References, then what was merged."""
    return [*block.references, *(subject.model for subject in block.subjects)]


def series_of(models: Sequence[Model], block: Block) -> tuple[Series, ...]:
    """The best model, the same merged once, and references look like what they are; all others by their place."""
    best = block.best
    roles: dict[str | None, Role] = {model.label: model.role for model in models if model.role in REFERENCES}
    if best is not None:
        roles |= {best.once: "post_hoc", best.name: "merged"}
    found, place = [], 0
    for model in models:
        role = roles.get(model.label, "other")
        found.append(
            Series(model.label, role, place if role == "other" else 0, role != "other" or len(models) <= MOST_MODELS)
        )
        place += role == "other"
    return tuple(found)


def _and_hidden(caption: str, series: Sequence[Series]) -> str:
    """The caption with what is to be said of models that are not shown at first."""
    hidden = sum(not one.shown for one in series)
    return f"{caption} {hidden} of {len(series)} models are hidden; the legend shows them." if hidden else caption


# ---- scores ----------------------------------------------------------------------------------------------------------


def radar(block: Block) -> Figure | None:
    """Share of the experts' score per task, one axis each; without experts the scores themselves."""
    normalized = any(model.normalized and has_any(model.normalized.tasks) for model in models_of(block))
    names = block.tasks if normalized else block.scored
    values: dict[str, Numbers] = {}
    for model in models_of(block):
        if normalized:
            own = _own_share(model, names) if model.role == "experts" else {}
            found = model.normalized.tasks if model.normalized else own
        else:
            found = {name: score.score for name, score in model.scores.items()}
        if has_any(found):
            values[model.label] = {name: found.get(name) for name in names}
    if not values:
        return None
    models = [model for model in models_of(block) if model.label in values]
    undefined = [name for name in names if all(found[name] is None for found in values.values())]
    what = "share of the expert's score" if normalized else "test score"
    drawn = {
        name: [rounded(None if value is None else min(value, LARGEST_SHARE)) for value in found.values()]
        for name, found in values.items()
    }
    axes = FEWEST_AXES <= len(names) <= MOST_AXES
    label = f"{what.capitalize()} per task. " + " ".join(_told(name, found) for name, found in values.items())
    caption = (
        f"Test split; {what}, 1 is the task's own expert." if normalized else "Test split; no experts to divide by."
    )
    if undefined and normalized:
        caption += f" Not defined for {listed(undefined)}: the expert scores 0, or was not measured."
    if any(value is not None and value > LARGEST_SHARE for found in values.values() for value in found.values()):
        caption += f" Values over {LARGEST_SHARE:g} are drawn at it."
    if not axes:
        caption += f" {len(names)} task{'s' if len(names) > 1 else ''}: as rows, which read better than a radar."
        points = {name: [None if v is None else [v, v, v] for v in row] for name, row in drawn.items()}
        chart = Chart("points", "", label, {"rows": names, "values": points, "axis": what, "together": True})
    else:
        top = max([1.0, *(value for row in drawn.values() for value in row if value is not None)])
        chart = Chart("radar", "", label, {"axes": names, "top": top, "values": drawn})
    rows = [(name, *(shown(found[name]) for found in values.values())) for name in names]
    sheet = Sheet(f"{what.capitalize()} per task", ("task", *values), tuple(rows))
    series = series_of(models, block)
    return Figure(f"{what.capitalize()} per task", _and_hidden(caption, series), series, (chart,), sheet)


def _own_share(experts: Model, names: Sequence[str]) -> Numbers:
    """1 wherever an expert's score can be divided by."""
    nothing = {name for name, score in experts.scores.items() if not score.score or score.score < 0}
    return {name: None if name in nothing else 1.0 for name in names}


def _told(name: str, found: Numbers) -> str:
    known = {task: value for task, value in found.items() if value is not None}
    if not known:
        return f"{name}: none."
    low, high = min(known, key=lambda task: known[task]), max(known, key=lambda task: known[task])
    return f"{name}: from {shown(known[low], 2)} ({low}) to {shown(known[high], 2)} ({high})."


def scores(block: Block) -> Figure | None:
    """Test scores of every model, with how far off they may be."""
    models = [model for model in models_of(block) if any(score.score is not None for score in model.scores.values())]
    if not models:
        return None
    values = {model.label: [_point(model.scores.get(name)) for name in block.scored] for model in models}
    rows = []
    for name in block.scored:
        known = [model.scores[name] for model in models if name in model.scores]
        metric, count = (known[0].metric, str(known[0].num_examples)) if known else ("", "")
        rows.append((name, metric, count, *(_score_text(model.scores.get(name)) for model in models)))
    label = "Test scores with error bars. " + " ".join(
        _told(model.label, {name: score.score for name, score in model.scores.items()}) for model in models
    )
    sheet = Sheet(
        f"Test scores, {block.spread}",
        ("task", "metric", "examples", *(model.label for model in models)),
        tuple(rows),
        2,
    )
    chart = Chart("points", "", label, {"rows": block.scored, "values": values, "axis": "test score"})
    caption = f"Test split, greedy decoding; bars: {block.spread}. Where bars overlap, the order may be chance."
    series = series_of(models, block)
    return Figure("Test scores", _and_hidden(caption, series), series, (chart,), sheet)


def _point(score: Score | None) -> list[float | None] | None:
    """Value, and the ends of its bar."""
    if score is None or score.score is None:
        return None
    low, high = (score.score if end is None else end for end in (score.low, score.high))
    return [rounded(score.score), rounded(low), rounded(high)]


def _score_text(score: Score | None) -> str:
    if score is None or score.score is None:
        return shown(None)
    spread = "" if score.low is None or score.high is None else f" ({shown(score.low)} … {shown(score.high)})"
    return shown(score.score) + spread


# ---- losses over rounds ----------------------------------------------------------------------------------------------


def losses(block: Block) -> Figure | None:
    """Validation loss of every task over the rounds: a panel per task, with what it can be held against as lines."""
    last = max((index for subject in block.subjects for index, _ in subject.path), default=0)
    # what was merged once has no course; it is a level line
    flat = [s for s in block.subjects if s.model.role == "post_hoc" or (len(s.path) == 2 and last > 1)]
    paths = [subject for subject in block.subjects if subject.path and subject not in flat]
    if not paths or not last:
        return None
    rounds = [str(index) for index in range(last + 1)]
    curves = {subject.name: _curve(subject, last) for subject in paths}
    levels = {subject.name: _level(subject) for subject in flat}
    start = paths[0].path[0][1] if paths[0].path[0][0] == 0 else None
    if block.reference("pretrained") and start is not None and has_any(start.losses):
        levels |= {"pretrained": start.losses}
    expert = block.reference("experts")
    if expert is not None and has_any(block.expert_losses):
        levels |= {expert.label: block.expert_losses}
    charts = [
        Chart("lines", task, _loss_label(task, curves, levels), _loss_data(task, rounds, curves, levels))
        for task in block.tasks
    ]
    names = [*curves, *levels]
    known = {model.label: model for model in models_of(block)}
    models = [known.get(name) or Model(name, "pretrained", {}, {}) for name in names]
    rows = [
        (task, name, *(shown(value) for value in _line(task, name, curves, levels, last)))
        for task in block.tasks
        for name in names
    ]
    headers = ("task", "model", *(f"round {index}" if index else "start" for index in range(last + 1)))
    caption = (
        "Mean token cross-entropy in nats on the validation split, lower is better; 0 is the pretrained model. "
        "Every panel has a scale of its own."
    )
    if levels:
        caption += " Level lines: what has no course over the rounds, to hold the others against."
    sheet = Sheet("Validation loss after every round", headers, tuple(rows), 2)
    series = series_of(models, block)
    return Figure("Loss per task over the rounds", _and_hidden(caption, series), series, tuple(charts), sheet)


def _curve(subject: Subject, last: int) -> dict[int, Numbers]:
    found = {index: model.losses for index, model in subject.path}
    return {index: found.get(index, {}) for index in range(last + 1)}


def _level(subject: Subject) -> Numbers:
    """The validation loss of a model that was merged once."""
    return subject.path[-1][1].losses if subject.path else subject.model.losses


def _line(
    task: str, name: str, curves: Mapping[str, dict[int, Numbers]], levels: Mapping[str, Numbers], last: int
) -> list[float | None]:
    if name in curves:
        return [curves[name][index].get(task) for index in range(last + 1)]
    return [levels[name].get(task)] * (last + 1)


def _loss_data(
    task: str, rounds: list[str], curves: Mapping[str, dict[int, Numbers]], levels: Mapping[str, Numbers]
) -> dict[str, object]:
    lines = {
        name: [rounded(value) for value in _line(task, name, curves, levels, len(rounds) - 1)]
        for name in (*curves, *levels)
    }
    return {"x": rounds, "axis": "round", "values": lines, "level": list(levels), "digits": 3}


def _loss_label(task: str, curves: Mapping[str, dict[int, Numbers]], levels: Mapping[str, Numbers]) -> str:
    told = []
    for name, curve in curves.items():
        known = [row[task] for row in curve.values() if row.get(task) is not None]
        if known:
            told.append(f"{name}: {', '.join(shown(value) for value in known)}")
    told += [f"{name}: {shown(found.get(task))}" for name, found in levels.items()]
    return f"Validation loss of {task} over the rounds. {'; '.join(told)}."


# ---- rounds of one subject -------------------------------------------------------------------------------------------


def weights(subject: Subject, tasks: Sequence[str]) -> list[Figure]:
    """Who got weight, and who had been erased: stacked by task, round by round."""
    found = [
        _stacked(
            *(subject, tasks, "Merging weights", lambda one: one.weights),
            "Weights of the tasks in every round; gap weights give more to a task that the merged model fits badly.",
        ),
        _stacked(
            *(subject, tasks, "Loss gaps", lambda one: one.loss_gaps),
            "Loss gap of a task: loss of the model that the round started from, less that of the task's own local "
            "update, in nats on the validation split. Stacked; below zero, the update fitted its task worse.",
        ),
    ]
    return [figure for figure in found if figure]


def _stacked(subject: Subject, tasks: Sequence[str], title: str, pick: Pick, caption: str) -> Figure | None:
    values = {task: [pick(one).get(task) for one in subject.rounds] for task in tasks}
    if not any(value is not None for row in values.values() for value in row):
        return None
    return by_round(subject, values, title, caption, "stack")


def by_round(
    subject: Subject, values: dict[str, list[float | None]], title: str, caption: str, kind: Literal["stack", "lines"]
) -> Figure:
    """Bars or lines of every task over the rounds; a heat map where the tasks are too many for that."""
    rounds, tasks = [str(one.index) for one in subject.rounds], list(values)
    told = "; ".join(f"{task}: {', '.join(shown(value, 2) for value in row)}" for task, row in values.items())
    label = f"{title} by round. {told}."
    rows = [(task, *(shown(value) for value in row)) for task, row in values.items()]
    sheet = Sheet(f"{title} by round", ("task", *(f"round {index}" for index in rounds)), tuple(rows))
    if len(tasks) > MOST_COLOURS:
        cells = [[x, y, rounded(value)] for y, row in enumerate(values.values()) for x, value in enumerate(row)]
        table = {"x": rounds, "y": tasks, "axis": "round", "side": "", "cells": cells, "scale": "task"}
        caption = caption.replace(" Stacked; below", " Below")
        return Figure(title, caption, (), (Chart("heat", "", label, table),), sheet)
    drawn = {task: [rounded(value) for value in row] for task, row in values.items()}
    whole = [sum(value or 0.0 for value in column) for column in zip(*values.values(), strict=True)]
    shares = kind == "stack" and all(abs(total - 1) < 1e-6 for total in whole)
    bars = {"x": rounds, "axis": "round", "values": drawn, "digits": 3} | ({"top": 1} if shares else {})
    chart = Chart(kind, "", label, bars)
    series = tuple(Series(task, "task", place) for place, task in enumerate(tasks))
    return Figure(title, caption, series, (chart,), sheet)


def kept(subject: Subject) -> Figure | None:
    """Share of coordinates that the merge kept, by layer and round."""
    layers = list(dict.fromkeys(layer for one in subject.rounds for layer in one.kept_by_layer))
    if not layers:
        return None
    cells = [
        [x, y, rounded(one.kept_by_layer.get(layer))]
        for x, one in enumerate(subject.rounds)
        for y, layer in enumerate(layers)
    ]
    rounds = [str(one.index) for one in subject.rounds]
    whole = ", ".join(f"round {one.index} {shown(one.kept_share)}" for one in subject.rounds)
    data = {"x": rounds, "y": layers, "axis": "round", "side": "layer", "cells": cells, "scale": "share"}
    rows = [("all", *(shown(one.kept_share) for one in subject.rounds))]
    rows += [(layer, *(shown(one.kept_by_layer.get(layer)) for one in subject.rounds)) for layer in layers]
    caption = (
        "Of the coordinates that some task changed, the share that the merged task vector keeps: mean over the tensors "
        f"of a layer. Over all coordinates: {whole}."
    )
    chart = Chart("heat", "", f"Share of coordinates kept by layer and round. Over all: {whole}.", data)
    sheet = Sheet("Share of coordinates kept", ("layer", *(f"round {index}" for index in rounds)), tuple(rows))
    return Figure("Coordinates kept", caption, (), (chart,), sheet)


def drift(subject: Subject, tasks: Sequence[str]) -> Figure | None:
    """How far every local update went in a round."""
    values = {task: [one.drift.get(task) for one in subject.rounds] for task in tasks}
    if not any(value is not None for row in values.values() for value in row):
        return None
    caption = "Length of each task's local update in a round, ‖θ − Θ‖ from the model that the round started from."
    far = [(one.index, one.distance) for one in subject.rounds if one.distance is not None]
    if far:
        gone = ", ".join(f"{shown(distance)} after round {index}" for index, distance in far)
        caption += f" The merged model's distance from the pretrained one: {gone}."
    return by_round(subject, values, "Drift", caption, "lines")


def cosines(subject: Subject, tasks: Sequence[str], most_cells: int = MOST_CELLS) -> Figure | None:
    """How much the tasks' vectors point the same way, a matrix for every round that there is room for."""
    recorded = [one for one in subject.rounds if one.cosines]
    found = recorded[-(most_cells // len(tasks) ** 2) :] if len(tasks) ** 2 <= most_cells else []
    if not found or len(tasks) < 2:
        return None
    charts, rows = [], []
    for one in found:
        cells = [
            [x, y, rounded(one.cosines.get(task, {}).get(other))]
            for y, task in enumerate(tasks)
            for x, other in enumerate(tasks)
            if x != y
        ]
        pairs = {(a, b): one.cosines.get(a, {}).get(b) for a, b in combinations(tasks, 2)}
        known = {pair: value for pair, value in pairs.items() if value is not None}
        label = f"Cosines of the tasks' vectors in round {one.index}."
        if known:
            low, high = min(known, key=lambda pair: known[pair]), max(known, key=lambda pair: known[pair])
            label += f" From {shown(known[low])} ({' and '.join(low)}) to {shown(known[high])} ({' and '.join(high)})."
        data = {"x": list(tasks), "y": list(tasks), "axis": "", "side": "", "cells": cells, "scale": "cosine"}
        charts.append(Chart("heat", f"round {one.index}", label, data))
        rows += [
            (str(one.index), task, *(shown(one.cosines.get(task, {}).get(other)) for other in tasks)) for task in tasks
        ]
    caption = (
        "Cosine of every two tasks' vectors. Near 0 they have nothing in common, below 0 they work against each other. "
        "Relative to the pretrained model, later rounds share what was merged before, so cosines rise."
    )
    if len(found) < len(recorded):
        caption += f" Only the last {len(found)} of {len(recorded)} rounds: so many tasks fill a page."
    sheet = Sheet("Cosines of task vectors", ("round", "task", *tasks), tuple(rows), 2)
    return Figure("Cosines between tasks", caption, (), tuple(charts), sheet)
