"""The local updates of a round, and the experts: every task from the same start model, each trained once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from manyshot.allocation import Steps, allocate
from manyshot.content import keyed
from manyshot.errors import TrainingError
from manyshot.evaluate import MeasureJob, is_measured, run_measure
from manyshot.executors import map_unfinished
from manyshot.gap_weights import needs_gaps
from manyshot.local_failure import Attempt, failure_of, try_local_update
from manyshot.local_update import RECORD, LocalUpdateJob, expert_state, finished_update
from manyshot.manifest import known_digest
from manyshot.models import ModelState
from manyshot.optimizer_state import OPTIMIZER_NAME
from manyshot.recipe import Recipe
from manyshot.removed import made_again, refuse_removed
from manyshot.rundir import atomic_folder, content_key, link_or_copy, read_json
from manyshot.start_adapters import last_update, own_adapter
from manyshot.status import resume_command
from manyshot.steps import Expert, Json, Run
from manyshot.tasks import Task
from manyshot.tensors import file_digest
from manyshot.training_spec import Protocol


def update_locally(run: Run, start: ModelState, round_index: int) -> list[Expert]:
    """The local updates of one round, in recipe order."""
    starts = []
    for name in run.names:
        own = own_adapter(run.recipe, run.folder, round_index, name)
        starts.append(replace(start, start_adapter=own) if own is not None else start)
    folders = [run.folder.local_update(round_index, name) for name in run.names]
    skips = run.recipe.protocol.on_failure == "skip_task_this_round"
    experts = _train(run, starts, round_index, steps_of_round(run, round_index), folders, skips=skips)
    _check_left(run, round_index, experts)
    return experts


def _check_left(run: Run, round_index: int, experts: Sequence[Expert]) -> None:
    """Refuse a merge for which too many tasks failed."""
    failed = failures(run, round_index, experts)
    num_left, rounds = len(experts), run.recipe.protocol.rounds
    if not failed:
        return
    wrong = ["a merge needs at least two"] if num_left < 2 else []
    for made in (run.recipe.method, *(made for _, made in run.recipe.plan.overrides)):
        wrong += [f"{made.name}.{key}: {text}" for key, text in made.problems(num_left, rounds)]
    if wrong:
        raise TrainingError(
            f"round {round_index}: {num_left} of {len(run.tasks)} tasks are left, and {wrong[0]}; "
            f"{'; '.join(failed.values())}. Remove {run.folder.round(round_index)} to try them again"
            + ("" if run.trial else f", then {resume_command(run.folder.path)}")
        )


def failures(run: Run, round_index: int, experts: Sequence[Expert]) -> dict[str, str]:
    """Why the tasks of a round that have no expert have none, in recipe order."""
    left = {expert.task for expert in experts}
    return {name: failure_of(run.folder.local_update(round_index, name)) for name in run.names if name not in left}


def steps_of_round(run: Run, round_index: int) -> list[Steps]:
    """The steps of every task in a round, in recipe order; with `allocation: gap` the rounds before decide them."""
    first, own = _added_rounds(run)
    place = round_index - first
    if own.allocation == "even" or round_index == 1:
        shared = {name: own.share(run.recipe.tasks[name].steps_share) for name in run.names}
        return [
            Steps(one.steps_in_round(place), one.steps_before_round(place) + _steps_earlier(run, name))
            for name, one in shared.items()
        ]
    weights = read_json(run.folder.round(round_index - 1) / "loss_gap.json")["weights"]
    even = fmean(weights.values())  # for a task that was left out of the round
    taken = allocate(own.steps_in_round(place), [weights.get(name, even) for name in run.names])
    shown = ", ".join(f"{name} {steps}" for name, steps in zip(run.names, taken, strict=True))
    run.progress.message(f"round {round_index}: steps by the weights of the round before: {shown}")
    return [Steps(steps, _steps_done(run, round_index, name)) for name, steps in zip(run.names, taken, strict=True)]


def _added_rounds(run: Run) -> tuple[int, Protocol]:
    """After which round this recipe's own rounds begin, and their protocol: all of them, but for an extended run."""
    now = run.recipe.protocol
    if run.earlier is None:
        return 0, now
    before = run.earlier.recipe.protocol
    own = {"rounds": now.rounds - before.rounds, "local_steps": now.local_steps - before.local_steps}
    return before.rounds, now.model_copy(update=own)


def _steps_earlier(run: Run, task: str) -> int:
    """The steps that a task took in the rounds that this recipe adds to."""
    earlier = run.earlier
    if earlier is None or task not in earlier.names:
        return 0
    own = _added_rounds(earlier)[1].share(earlier.recipe.tasks[task].steps_share)
    return own.local_steps + _steps_earlier(earlier, task)


def _steps_done(run: Run, round_index: int, task: str) -> int:
    """The steps that a task has really done in the rounds before."""
    records = [run.folder.local_update(earlier, task) / RECORD for earlier in range(1, round_index)]
    return sum(read_json(record)["steps"] for record in records if record.exists())


def uneven_steps(run: Run, experts: Sequence[Expert]) -> Json:
    """{"steps": steps by task} where the tasks of a round do not all take the protocol's."""
    shares = any(spec.steps_share != 1 for spec in run.recipe.tasks.values())
    if run.recipe.protocol.allocation == "even" and not shares:
        return {}
    return {"steps": {expert.task: expert.record["steps"] for expert in experts}}


def train_experts(run: Run) -> Json:
    """Each task alone, from the pretrained model, with all its steps: the denominators, and post-hoc's inputs."""
    experts = all_steps_alone(run)
    jobs = [
        MeasureJob(run.recipe, (task,), expert.state, folder, 0, losses=False)
        for task, expert, folder in zip(run.tasks, experts, _expert_folders(run), strict=True)
    ]
    measured = map_unfinished(run.executor, run_measure, jobs, run.progress, is_measured)
    scores = {name: one["scores"][name] for name, one in zip(run.names, measured, strict=True)}
    return {"losses": {expert.task: expert.record["validation"] for expert in experts}, "scores": scores}


def all_steps_alone(run: Run) -> list[Expert]:
    """The experts as local updates from the pretrained model that take all steps at once."""
    steps = [Steps(run.recipe.protocol_of(name).local_steps, 0) for name in run.names]
    return _train(run, [run.pretrained for _ in run.names], 1, steps, _expert_folders(run))


def _expert_folders(run: Run) -> list[Path]:
    return [run.folder.expert(name) for name in run.names]


def _train(
    run: Run,
    starts: Sequence[ModelState],
    round_index: int,
    steps: Sequence[Steps],
    folders: Sequence[Path],
    *,
    skips: bool = False,
) -> list[Expert]:
    """Train what is not trained yet; with `skips`, tasks whose local update failed are left out."""
    jobs = local_update_jobs(run, starts, round_index, steps, folders)
    for job in jobs:
        _reuse_expert(job, run.folder.expert(job.task.name))
        if run.shared is not None:
            _reuse_expert(job, shared_update(run.shared, job))
        if not run.trial and finished_update(job) is None:
            _check_start(run, job)
    attempts = [Attempt(job, skips) for job in jobs]
    try:
        records = map_unfinished(run.executor, try_local_update, attempts, run.progress, _is_finished)
    except TrainingError as error:
        may_skip = list(folders) != _expert_folders(run)
        raise TrainingError(f"{error}{_what_next(run, may_skip=may_skip)}") from error
    return [
        Expert(job.task.name, expert_state(job.start, job.folder), record)
        for job, record in zip(jobs, records, strict=True)
        if "failed" not in record
    ]


def _check_start(run: Run, job: LocalUpdateJob) -> None:
    """Raise RunFolderError where a local update that is to be made (again) begins from what `keep` had removed."""
    made_again(run.folder.path, job.folder)
    for place in (job.start.start_adapter, job.optimizer_state):
        if place is not None:
            wanted = f"round {job.round_index}, task '{job.task.name}': its local update"
            refuse_removed(run.folder.path, place, wanted)


def _is_finished(attempt: Attempt) -> bool:
    return finished_update(attempt.job) is not None


def _what_next(run: Run, *, may_skip: bool) -> str:
    """How to go on after a task that failed; a trial is gone on with by what it is a trial of."""
    if run.trial:
        return ""
    again = f". Every step that was finished stays; {resume_command(run.folder.path)} tries it again"
    skip = "protocol.on_failure=skip_task_this_round"
    return f"{again}, and with {skip} the round goes on without the task" if may_skip else again


def shared_update(shared: Path, job: LocalUpdateJob) -> Path:
    """Where a local update that several runs need is kept: its folder is named after what it depends on."""
    return shared / f"{job.task.name}-{job.key[:16]}"


def first_updates(run: Run, folders: Sequence[Path]) -> list[LocalUpdateJob]:
    """The local updates of round 1, which depend on no operator; with one round they are the experts."""
    return local_update_jobs(run, [run.pretrained for _ in run.tasks], 1, steps_of_round(run, 1), folders)


def local_update_jobs(
    run: Run, starts: Sequence[ModelState], round_index: int, steps: Sequence[Steps], folders: Sequence[Path]
) -> list[LocalUpdateJob]:
    """The local updates of all tasks, each from its start and with its steps, in recipe order."""
    return [
        _job(run, task, start, round_index, taken, folder)
        for task, start, taken, folder in zip(run.tasks, starts, steps, folders, strict=True)
    ]


def _job(run: Run, task: Task, start: ModelState, round_index: int, steps: Steps, folder: Path) -> LocalUpdateJob:
    recipe, named, total_steps = run.recipe, run.begun or run.recipe, run.recipe.protocol_of(task.name).local_steps
    kept = _kept_optimizer(run, round_index, task)
    inputs = [
        *(run.base.digest, _start_digest(start), keyed("local_update", named.local_update.model_dump(mode="json"))),
        *(recipe.merge.space, recipe.seed),
        *(round_index, steps.num_steps, steps.steps_before, total_steps),
        *(recipe.evaluation.loss_on, recipe.evaluation.batch_size),
        *([known_digest(kept)] if kept is not None else []),
    ]
    return LocalUpdateJob(
        recipe=recipe,
        task=task,
        start=start,
        base_name=run.base.name,
        folder=folder,
        round_index=round_index,
        num_steps=steps.num_steps,
        steps_before=steps.steps_before,
        total_steps=total_steps,
        key=content_key(inputs, task.digest(), task.settings(), _adopted_digest(task, round_index)),
        adopted=_adopted(task, round_index),
        # a trial asks for nothing that its operator does not need; what is shared, others may need
        validated=not run.trial or start == run.pretrained or _needs_losses(recipe),
        optimizer_state=kept,
        tracked=run.tracking.part(folder) if run.tracking is not None else None,
    )


def _kept_optimizer(run: Run, round_index: int, task: Task) -> Path | None:
    """What the task's optimizer ended the round before with, where it goes on from that."""
    # a run that was extended did not keep them in what was its last round
    if run.recipe.local_update.optimizer_state == "restart" or round_index == _added_rounds(run)[0] + 1:
        return None
    place = last_update(run.folder, round_index, task.name)
    return place / OPTIMIZER_NAME if place is not None else None


def _needs_losses(recipe: Recipe) -> bool:
    """Whether a merge asks for the experts' validation losses: for its weights, or for its scaling."""
    return needs_gaps(recipe.method) or recipe.method.searches_scaling


def _adopted(task: Task, round_index: int) -> Path | None:
    """The task's expert of round 1, where the recipe names one that exists already."""
    return Path(task.spec.expert) if task.spec.expert and round_index == 1 else None


def _adopted_digest(task: Task, round_index: int) -> list[str]:
    expert = _adopted(task, round_index)
    files = sorted(file for file in expert.iterdir() if file.suffix in (".safetensors", ".json")) if expert else []
    return [file_digest(file) for file in files]


def _start_digest(start: ModelState) -> list[str]:
    """The content of the files that a round starts from."""
    files = [start.task_vector, start.start_adapter / "adapter_model.safetensors" if start.start_adapter else None]
    return [known_digest(file) if file else "" for file in files]


def _reuse_expert(job: LocalUpdateJob, expert: Path) -> None:
    """With one round the local updates are the experts: the same inputs, so the same bytes, trained once."""
    if expert == job.folder or finished_update(job) is not None or finished_update(replace(job, folder=expert)) is None:
        return
    with atomic_folder(job.folder) as folder:
        for name in ("adapter", "model"):
            if (expert / name).is_dir():
                shutil.copytree(expert / name, folder / name, copy_function=link_or_copy)
        if (expert / OPTIMIZER_NAME).exists():
            link_or_copy(expert / OPTIMIZER_NAME, folder / OPTIMIZER_NAME)
        shutil.copyfile(expert / RECORD, folder / RECORD)
