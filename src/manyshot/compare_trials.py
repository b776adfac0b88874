"""The trials of a comparison: the run behind every cell, and the choice among the candidates of a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from manyshot.compare_gain import CRITERIA, shares
from manyshot.compare_inputs import with_tasks
from manyshot.compare_jobs import TRIAL, TrialJob, run_trial
from manyshot.compare_place import (
    Comparison,
    Json,
    as_run,
    expert_losses,
    prepare,
    pretrained_losses,
    shared_experts,
    train_shared,
    why_not,
)
from manyshot.compare_plan import Cell, cells_at, is_tuned_at, places
from manyshot.compare_recipe import Candidate
from manyshot.content import keyed_recipe
from manyshot.rundir import content_key, read_json


def trial_job(run: Comparison, cell: Cell, candidate: Candidate, *, scored: bool) -> TrialJob:
    """The run behind a cell. Its folder is named after its content, so equal trials are one."""
    place, joint = cell.place, cell.protocol == "joint"
    current = as_run(run, place, candidate, "many_shot" if joint else cell.protocol, Path())
    recipe = current.recipe
    settings = keyed_recipe(recipe.model_dump(mode="json", exclude={"model", "tasks"}))
    # experts that exist already are inputs too: what they hold is in the key of their update
    tasks = [
        [job.task.name, job.task.digest(), job.task.settings(), *([job.key] if job.adopted else [])]
        for job in shared_experts(run, place)
    ]
    update, summed = recipe.local_update, recipe.method.weighting == "multiplier"
    # trials of older versions that have both carried the sum of the factors on, where their average was meant
    carries = ["averaged factors"] if update.adapter_start == "averaged" and summed else []
    key = content_key(current.base.digest, settings, tasks, joint, *carries)
    kind = "joint" if joint else candidate.operator.name
    name = f"{kind}-{cell.protocol}-{len(current.tasks)}tasks-seed{place.seed}-{key[:12]}"
    return TrialJob(
        label=cell.name,
        recipe=with_tasks(recipe, run.recipe, (*run.set_tasks(place), *run.recipe.retention)) if scored else recipe,
        base=current.base,
        tasks=current.tasks,
        retention=run.tasks(place, tuple(run.recipe.retention)),
        folder=run.folder.trials / name,
        shared=run.folder.updates,
        pretrained_losses=pretrained_losses(run, place),
        scored=scored,
        joint=joint,
        benchmarks=run.recipe.asked(place.task_set) if scored else {},
        harness=run.recipe.harness,
    )


def settings_of(run: Comparison, cell: Cell, candidate: Candidate) -> Json:
    """What a cell runs with: the operator's settings, and as section.key what it chose or has otherwise than all."""
    operator = {} if cell.protocol == "joint" else dataclasses.asdict(candidate.operator)
    method = run.recipe.methods[cell.method]
    grid = run.recipe.methods[method.ablation_of].grid if method.ablation_of else method.grid
    chosen = {key: value for key, value in candidate.settings().items() if key in grid}
    named = {key: value for key, value in operator.items() if key != "name"}
    return named | candidate.differences(run.recipe.shared) | chosen


def candidate_of(run: Comparison, cell: Cell) -> Candidate | None:
    """What a cell runs, as it was chosen; for an ablation that of the full method, changed. None if none could be."""
    method = run.recipe.methods[cell.method]
    if method.ablation_of is not None:
        full = candidate_of(run, dataclasses.replace(cell, method=method.ablation_of))
        return None if full is None else run.recipe.ablated(cell.method, full)
    if method.grid:
        return run.chosen.get((cell.place.model, cell.method, cell.protocol))
    return run.recipe.own(cell.method)


# ---- the choice among candidates -------------------------------------------------------------------------------------


def tune(run: Comparison, model: str) -> None:
    """Try every candidate of every grid on the tuning seeds, and choose by `tuning.choose_by` on validation."""
    recipe = run.recipe
    sites = [place for place in places(recipe) if place.model == model]
    tuned = [(place, cell) for place in sites for cell in cells_at(recipe, place) if is_tuned_at(recipe, cell)]
    for place in dict.fromkeys(place for place, _ in tuned):
        prepare(run, place)
        if place in run.broken:
            continue
        wanted = [
            (candidate, cell) for where, cell in tuned if where == place for candidate in recipe.candidates(cell.method)
        ]
        train_shared(run, place, [(candidate, cell.protocol) for candidate, cell in wanted])
        jobs = {
            job.folder: job
            for candidate, cell in wanted
            if why_not(run, place, candidate, cell.protocol) is None
            for job in [trial_job(run, cell, candidate, scored=False)]
        }
        run.executor.map(run_trial, list(jobs.values()), run.progress)
    for method, protocol in dict.fromkeys((cell.method, cell.protocol) for _, cell in tuned):
        cells = [cell for _, cell in tuned if (cell.method, cell.protocol) == (method, protocol)]
        # a seed without experts is no candidate's fault; where no seed has any, all candidates failed
        record = choose(run, [cell for cell in cells if cell.place not in run.broken] or cells)
        run.tuning.append(record)
        if record["chosen"] is not None:
            run.chosen[model, method, protocol] = recipe.candidates(method)[record["chosen"]]


def choose(run: Comparison, cells: list[Cell]) -> Json:
    """The best candidate by its mean over the tuning seeds; the first of equals, null where none finished."""
    cell, choose_by = cells[0], run.recipe.tuning.choose_by
    tried: list[Json] = []
    for candidate in run.recipe.candidates(cell.method):
        found = [judged(run, one, candidate) for one in cells]
        means = {name: _mean([one.get(name) for one in found]) for name, _ in CRITERIA.values()}
        tried.append({"settings": settings_of(run, cell, candidate)} | means)
    criterion, more = CRITERIA[choose_by]
    finite = [(i, value if more else -value) for i, one in enumerate(tried) if (value := one[criterion]) is not None]
    best = max(finite, key=lambda found: found[1])[0] if finite else None
    place = cell.place
    seeds = [one.place.seed for one in cells]
    where = {"model": place.model, "task_set": place.task_set, "seeds": seeds, "choose_by": choose_by}
    return where | {"method": cell.method, "protocol": cell.protocol, "candidates": tried, "chosen": best}


def _mean(values: list[float | None]) -> float | None:
    """None where one is missing: a candidate that did not finish on some seed is not better for it."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def judged(run: Comparison, cell: Cell, candidate: Candidate) -> Mapping[str, float | None]:
    """What a candidate reached on the validation splits, by criterion; nothing where it did not finish."""
    if cell.place in run.broken:
        return {}
    record = trial_job(run, cell, candidate, scored=False).folder / TRIAL
    if not record.exists():
        return {}
    trial = read_json(record)
    before, best = (
        {task: found["loss"] for task, found in losses.items()}
        for losses in (pretrained_losses(run, cell.place), expert_losses(run, cell.place))
    )
    kept = shares(before, trial["rounds"][-1]["validation_losses"], best)
    loss = trial["multi_task_validation_loss"]
    return dict(zip((name for name, _ in CRITERIA.values()), (loss, kept["average"], kept["worst"]), strict=True))
