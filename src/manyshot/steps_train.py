"""The local updates of a round, and the experts: every task from the same start model, each trained once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyshot.evaluate import MeasureJob, run_measure
from manyshot.gap_weights import needs_gaps
from manyshot.local_update import RECORD, LocalUpdateJob, expert_state, finished_update, run_local_update
from manyshot.models import ModelState
from manyshot.recipe import Recipe
from manyshot.rundir import atomic_folder, content_key
from manyshot.steps import Expert, Json, Run
from manyshot.tasks import Task
from manyshot.tensors import file_digest


def update_locally(run: Run, start: ModelState, round_index: int) -> list[Expert]:
    """The local updates of one round, in recipe order."""
    protocol = run.recipe.protocol
    folders = [run.folder.local_update(round_index, name) for name in run.names]
    steps, before = protocol.steps_in_round(round_index), protocol.steps_before_round(round_index)
    return _train(run, start, round_index, steps, before, folders)


def train_experts(run: Run) -> Json:
    """Each task alone, from the pretrained model, with all its steps: the denominators, and post-hoc's inputs."""
    experts = all_steps_alone(run)
    jobs = [
        MeasureJob(run.recipe, (task,), expert.state, folder, 0, losses=False)
        for task, expert, folder in zip(run.tasks, experts, _expert_folders(run), strict=True)
    ]
    measured = run.executor.map(run_measure, jobs, run.progress)
    scores = {name: one["scores"][name] for name, one in zip(run.names, measured, strict=True)}
    return {"losses": {expert.task: expert.record["validation"] for expert in experts}, "scores": scores}


def all_steps_alone(run: Run) -> list[Expert]:
    """The experts as local updates from the pretrained model that take all steps at once."""
    return _train(run, run.pretrained, 1, run.recipe.protocol.local_steps, 0, _expert_folders(run))


def _expert_folders(run: Run) -> list[Path]:
    return [run.folder.expert(name) for name in run.names]


def _train(
    run: Run, start: ModelState, round_index: int, num_steps: int, steps_before: int, folders: Sequence[Path]
) -> list[Expert]:
    jobs = local_update_jobs(run, start, round_index, num_steps, steps_before, folders)
    for job in jobs:
        _reuse_expert(job, run.folder.expert(job.task.name))
        if run.shared is not None:
            _reuse_expert(job, shared_update(run.shared, job))
    records = run.executor.map(run_local_update, jobs, run.progress)
    return [
        Expert(job.task.name, expert_state(start, job.folder), record)
        for job, record in zip(jobs, records, strict=True)
    ]


def shared_update(shared: Path, job: LocalUpdateJob) -> Path:
    """Where a local update that several runs need is kept: its folder is named after what it depends on."""
    return shared / f"{job.task.name}-{job.key[:16]}"


def local_update_jobs(
    run: Run, start: ModelState, round_index: int, num_steps: int, steps_before: int, folders: Sequence[Path]
) -> list[LocalUpdateJob]:
    """The local updates of all tasks from one start model, in recipe order."""
    recipe = run.recipe
    update = recipe.local_update
    inputs = [
        *(run.base.digest, _start_digest(start), update.model_dump(mode="json"), recipe.merge.space, recipe.seed),
        *(round_index, num_steps, steps_before, recipe.protocol.local_steps),
        *(recipe.evaluation.loss_on, recipe.evaluation.batch_size),
    ]
    return [
        LocalUpdateJob(
            recipe=recipe,
            task=task,
            start=start,
            base_name=run.base.name,
            folder=folder,
            round_index=round_index,
            num_steps=num_steps,
            steps_before=steps_before,
            total_steps=recipe.protocol.local_steps,
            key=content_key(inputs, task.digest(), task.settings(), _adopted_digest(task, round_index)),
            adopted=_adopted(task, round_index),
            # a trial asks for nothing that its operator does not need; what is shared, others may need
            validated=not run.trial or start == run.pretrained or _needs_losses(recipe),
        )
        for task, folder in zip(run.tasks, folders, strict=True)
    ]


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
    return [file_digest(file) if file else "" for file in files]


def _reuse_expert(job: LocalUpdateJob, expert: Path) -> None:
    """With one round the local updates are the experts: the same inputs, so the same bytes, trained once."""
    if expert == job.folder or finished_update(job) is not None or finished_update(replace(job, folder=expert)) is None:
        return
    with atomic_folder(job.folder) as folder:
        for name in ("adapter", "model"):
            if (expert / name).is_dir():
                shutil.copytree(expert / name, folder / name)
        shutil.copyfile(expert / RECORD, folder / RECORD)
