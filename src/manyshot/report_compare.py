"""The folder of a comparison as a report's data: means over seeds of every method, in every model and task set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from manyshot.compare_gain import shares
from manyshot.compare_grid import Grid, Group
from manyshot.compare_rounds import rounds_of
from manyshot.compare_statistics import Estimate, estimate
from manyshot.errors import RunFolderError
from manyshot.report_data import (
    Block,
    Details,
    Example,
    Model,
    Numbers,
    Role,
    Round,
    Score,
    Shares,
    Subject,
    example_score,
    mapping,
    number,
    numbers,
)
from manyshot.report_examples import read_examples
from manyshot.report_read import SPREAD, Records, kept_by_layer
from manyshot.report_resources import disk_use, read_phases, seconds_in_all
from manyshot.status import MAX_STEPS

SEED_SPREAD = "± one standard error over seeds"
Entries = Sequence[Mapping[str, Any]]


def read_comparison(path: Path) -> tuple[Grid, list[Block], Details]:
    """Everything that a report says of a comparison. Raises RunFolderError where results.json cannot be used."""
    records, results_path = Records(path), path / "results.json"
    results = records.read(results_path, expected=True)
    if records.problems:
        raise RunFolderError(f"{results_path}: {records.problems[0].message}")
    try:
        grid = Grid(results)
        blocks = [
            block
            for task_set in grid.task_sets
            for model in grid.models
            if (block := _block(grid, model, task_set, path)).subjects
        ]
        groups = [group for task_set in grid.task_sets for group in grid.groups(task_set, ablations=True)]
        missing = grid.missing(groups)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{results_path}: not the results of a comparison ({error!r})") from None
    for line in missing:
        records.note(results_path, line)
    details = _details(records, grid, path)
    return grid, blocks, replace(details, examples=_examples(records, grid, blocks)) if blocks else details


def _details(records: Records, grid: Grid, path: Path) -> Details:
    environment = records.read(path / "environment.json", expected=True)
    recipe_path, recipe = path / "compare.yaml", ""
    try:
        recipe = recipe_path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        records.note(recipe_path, f"cannot be read ({type(error).__name__})")
    seeds = dict.fromkeys(seed for spec in grid.task_sets.values() for seed in spec["seeds"])
    cells, done = len(grid.results["cells"]), sum(cell["status"] == "done" for cell in grid.results["cells"])
    return Details(
        name=str(grid.results["name"]),
        stopped=f"{done} of {cells} cells are done" if done < cells else None,
        rounds=int(grid.results["rounds"]),
        operator=", ".join(grid.label(method) for method in grid.methods),
        base_model=", ".join(grid.models),
        seeds=list(seeds),
        command=str(environment.get("command") or "not recorded"),
        recipe=recipe,
        versions={str(k): str(v) for k, v in mapping(environment.get("packages")).items() if v},
        machine={key: str(environment[key]) for key in ("placement", "python", "platform") if environment.get(key)},
        wall=seconds_in_all(path / "metrics.jsonl"),
        phases=read_phases(sorted(path.rglob("metrics.jsonl"))),
        disk=disk_use(path),
        problems=records.problems,
    )


def _examples(records: Records, grid: Grid, blocks: Sequence[Block]) -> dict[str, list[Example]]:
    """What the pretrained model, the experts and the detailed methods of the first block answered, with the first seed.

    The folders of `references/` name no model: nothing is shown where there are several.
    """
    if len(grid.models) > 1:
        return {}
    block, trials = blocks[0], records.folder / "trials"
    named = {grid.name(group): group for group in grid.groups(grid.main, ablations=True)}
    wanted = [subject for subject in block.subjects if subject.detailed]
    once = [subject for subject in block.subjects if subject.name in {one.once for one in wanted}]
    answering: dict[str, tuple[Role, dict[str, Path]]] = {}
    for subject in (*once, *wanted):
        cell = next(iter(grid.done(named[subject.name]).values()))
        place = trials / str(cell.get("folder")) / "test"
        answering[subject.name] = subject.model.role, dict.fromkeys(block.tasks, place)
    if not answering:
        return {}
    said = records.read(next(reversed(answering.values()))[1][block.tasks[0]] / "outputs.json", expected=False)
    asked: dict[str, Any] = {}
    places: dict[Role, dict[str, Path]] = {"pretrained": {}, "experts": {}}
    for place in sorted((records.folder / "references").glob("*/test")):
        prompts, outputs = (records.read(place / name, expected=False) for name in ("examples.json", "outputs.json"))
        for task in block.tasks:
            if task in outputs and _rows(outputs[task]) == _rows(said.get(task)):  # the test split of this seed
                places["pretrained" if prompts else "experts"].setdefault(task, place)
                asked |= {task: prompts[task]} if task in prompts else {}
    references = {model.label: (model.role, places[model.role]) for model in block.references}
    return read_examples(asked, records.read, block.tasks, references | answering)


def _rows(said: object) -> list[Any]:
    return [mapping(one).get("row") for one in said] if isinstance(said, list) else []


# ---- one model and task set ------------------------------------------------------------------------------------------


def _block(grid: Grid, model: str, task_set: str, path: Path) -> Block:
    """The methods of one model and task set that have a finished cell."""
    tasks, scored = grid.tasks(task_set), grid.scored(task_set)
    several = len(grid.task_sets[task_set]["seeds"]) > 1
    known = [reference for reference in grid.references(model, task_set).values() if reference]
    references = []
    if known:
        pretrained = [reference["pretrained"] for reference in known]
        experts = [reference["experts"] for reference in known]
        start = _model("pretrained", "pretrained", pretrained, tasks, scored)
        references = [
            replace(start, normalized=_normalized(pretrained, tasks)),
            _model("experts (one per task)", "experts", experts, tasks, scored),
        ]
    groups = [g for g in grid.groups(task_set, ablations=True) if g.model == model and grid.done(g)]
    subjects = [_subject(grid, group, path) for group in groups]
    if subjects and not any(subject.detailed for subject in subjects):
        first = next((i for i, subject in enumerate(subjects) if subject.rounds), 0)
        subjects[first] = replace(subjects[first], detailed=bool(subjects[first].rounds))
    return Block(
        title=f"{model}, task set {task_set}",
        tasks=tasks,
        scored=scored,
        references=references,
        subjects=subjects,
        expert_losses=_expert_losses(grid, model, task_set),
        spread=SEED_SPREAD if several else SPREAD,
        loss_split="test",
    )


def _subject(grid: Grid, group: Group, path: Path) -> Subject:
    """One method under one protocol, means over its finished seeds."""
    tasks, scored = grid.tasks(group.task_set), grid.scored(group.task_set)
    cells = list(grid.done(group).values())
    full = group.method in grid.fulls()
    role: Role = "other"
    if full and group.protocol != "joint":
        role = "merged" if group.protocol == "many_shot" else "post_hoc"
    model = _model(grid.name(group), role, cells, tasks, scored)
    gains = []
    for cell in cells:
        reference = grid.reference(group.model, group.task_set, cell["seed"])
        if reference:
            losses = [numbers(one["losses"], tasks) for one in (reference["pretrained"], cell, reference["experts"])]
            gains.append(shares(*losses))
    model = replace(model, normalized=_normalized(cells, tasks), gain=_mean_shares(gains, tasks))
    rounds = [_round(cells, index, tasks, path) for index in rounds_of(grid, group)]
    once = replace(group, protocol="post_hoc")
    return Subject(
        model,
        _path(grid, group, cells, tasks),
        rounds,
        detailed=role == "merged" and bool(rounds),
        once=grid.name(once) if group.protocol == "many_shot" and grid.done(once) else None,
        merges=group.protocol != "joint",
    )


def _path(grid: Grid, group: Group, cells: Entries, tasks: list[str]) -> list[tuple[int, Model]]:
    """Validation losses of the pretrained model and after every round."""
    known = [r for r in grid.references(group.model, group.task_set).values() if r]
    start = [mapping(reference["pretrained"]).get("validation_losses") for reference in known]
    found = [(0, Model("pretrained", "pretrained", _means(start, tasks), {}))] if any(start) else []
    for index in rounds_of(grid, group):
        if not 0 < index <= MAX_STEPS:  # figures have a place for every round up to the last
            raise ValueError(f"round {index}")
        entries = [entry["validation_losses"] for cell in cells for entry in cell["rounds"] if entry["round"] == index]
        found.append((index, Model(f"after round {index}", "other", _means(entries, tasks), {})))
    return found


def _expert_losses(grid: Grid, model: str, task_set: str) -> Numbers:
    """Validation losses of the experts: what a post-hoc merge starts from, less its loss gaps."""
    tasks = grid.tasks(task_set)
    for group in grid.groups(task_set, ["post_hoc"], ablations=True):
        if group.model != model:
            continue
        found = []
        for seed, cell in grid.done(group).items():
            reference = grid.reference(model, task_set, seed)
            gaps = mapping(cell["rounds"][0]["loss_gaps"]) if cell["rounds"] else {}
            start = mapping(mapping(reference).get("pretrained")).get("validation_losses")
            if gaps and start:
                found.append({task: start[task] - gaps[task] for task in tasks if task in gaps})
        if found:
            return _means(found, tasks)
    return {}


def _round(cells: Entries, index: int, tasks: list[str], path: Path) -> Round:
    entries = [entry for cell in cells for entry in cell["rounds"] if entry["round"] == index]
    cosines = [entry["cosines"] for entry in entries if entry.get("cosines")]
    return Round(
        index=index,
        weights=_means([entry["weights"] for entry in entries], tasks),
        loss_gaps=_means([entry["loss_gaps"] for entry in entries], tasks),
        expert_losses={},
        drift=_means([entry["drift"] for entry in entries], tasks),
        cosines={task: _means([one[task] for one in cosines], tasks) for task in tasks} if cosines else {},
        kept_share=_mean(number(entry.get("kept_share")) for entry in entries),
        kept_by_layer=_kept(cells, index, path),
        distance=_mean(number(entry.get("distance")) for entry in entries),
        steps=_means([entry.get("steps") for entry in entries], tasks),
        scaling=_mean(number(entry.get("scaling")) for entry in entries),
    )


def _kept(cells: Entries, index: int, path: Path) -> Numbers:
    """Share of coordinates kept by layer, from merge.json of the cells' own folders where they are still there."""
    records, found = Records(path), []
    for cell in cells:
        merge = path / "trials" / str(cell.get("folder")) / f"round_{index:03d}" / "merge.json"
        found.append(kept_by_layer(mapping(records.read(merge, expected=False).get("kept_by_tensor"))))
    return _means(found, list(found[0])) if found else {}


# ---- means over seeds ------------------------------------------------------------------------------------------------


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _means(records: Sequence[Any], names: Sequence[str]) -> Numbers:
    """Mean of every name over the records that have it."""
    return {name: _mean(number(mapping(record).get(name)) for record in records) for name in names}


def _model(label: str, role: Role, entries: Entries, tasks: list[str], scored: list[str]) -> Model:
    losses = _means([entry["losses"] for entry in entries], tasks)
    scores = {name: score for name in scored if (score := _score([entry["scores"].get(name) for entry in entries]))}
    return Model(label, role, losses, scores)


def _score(found: Sequence[Any]) -> Score | None:
    """The score of one seed with its interval over test examples; of several, their mean with its standard error."""
    known = [score for one in found if (score := example_score(one)) is not None]
    if len(known) < 2:
        return known[0] if known else None
    over = estimate(score.score for score in known)
    within = over.mean is not None and over.error is not None
    low, high = (over.mean - over.error, over.mean + over.error) if within else (None, None)  # type: ignore[operator]
    return Score(known[0].metric, over.mean, over.error, known[0].num_examples, low, high)


def _normalized(entries: Entries, tasks: list[str]) -> Shares | None:
    return _mean_shares([entry["normalized"] for entry in entries if entry.get("normalized")], tasks)


def _mean_shares(found: Sequence[Mapping[str, Any]], tasks: list[str]) -> Shares | None:
    """Means over seeds; the worst task by name where it is the same in all."""
    if not found:
        return None
    over: dict[str, Estimate] = {
        key: estimate(number(one.get(key)) for one in found) for key in ("average", "worst", "drop")
    }
    worst = {one.get("worst_task") for one in found}
    return Shares(
        tasks=_means([one["tasks"] for one in found], tasks),
        average=over["average"].mean,
        worst=over["worst"].mean,
        worst_task=worst.pop() if len(worst) == 1 else None,
        drop=over["drop"].mean,
        average_error=over["average"].error,
        worst_error=over["worst"].error,
    )
