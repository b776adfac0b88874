"""The executor that a recipe asks for, begun for a run and ended with it; what does not fit is refused first."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from manyshot.engine import default_threads
from manyshot.errors import RecipeError, WorkerError
from manyshot.executor_spec import LocalExecution, RayExecution
from manyshot.executors import Executor, LocalExecutor
from manyshot.inputs import Inputs
from manyshot.inspect_recipe import estimate_memory
from manyshot.memory import available
from manyshot.models import choose_placement
from manyshot.progress import Progress
from manyshot.recipe import Recipe
from manyshot.workers import Pin, WorkerExecutor

# what a process holds that has loaded torch, transformers and trl, and no model
PROCESS_BYTES = 500_000_000


@contextmanager
def computing_threads(recipe: Recipe) -> Iterator[None]:
    """This process computes with as many threads as every task of the recipe, so that last bits are the same."""
    before, wanted = torch.get_num_threads(), threads_of(recipe)
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of(recipe: Recipe) -> int:
    """The threads of one task: as the recipe says, or each its part of what torch has here."""
    spec = recipe.executor
    if spec.threads is not None:
        return spec.threads
    if isinstance(spec, RayExecution):
        return max(1, math.floor(spec.num_cpus))
    return max(1, torch.get_num_threads() // spec.workers)


@contextmanager
def open_executor(recipe: Recipe, folder: Path, inputs: Inputs, progress: Progress) -> Iterator[Executor]:
    """The executor of a run in `folder`. Raises RecipeError or WorkerError for what this machine does not have."""
    spec = recipe.executor
    if isinstance(spec, RayExecution):
        if spec.num_gpus == 0 and recipe.local_update.device.startswith("cuda"):
            device = recipe.local_update.device
            raise RecipeError(f"executor.num_gpus: 0 hides GPUs from tasks, and local_update.device is {device}; use 1")
        from manyshot.ray_executor import open_ray

        with open_ray(spec, folder, paths_of(recipe, inputs), threads_of(recipe), progress) as ray:
            yield ray
        return
    if spec.workers == 1:
        yield LocalExecutor()
        return
    pins = make_pins(recipe, spec)
    check_memory(recipe, inputs, pins)
    progress.message(f"{spec.workers} tasks at once, each with {_counted(threads_of(recipe), 'thread')}")
    with WorkerExecutor(folder, pins, threads_of(recipe), spec.max_retries) as workers:
        yield workers


@contextmanager
def open_cells(folder: Path, workers: int, device: str, runs: Iterable[tuple[Recipe, Inputs]]) -> Iterator[Executor]:
    """For the cells of a comparison in `folder`: so many at once, with a share of torch's threads each, and of GPUs.

    Any of its `runs` may be in memory as often as there are workers. Raises WorkerError where they do not fit.
    """
    if workers == 1:
        yield LocalExecutor()
        return
    pins = [Pin(device=number) for number in devices_of(device, (), workers)]
    for recipe, inputs in runs:
        check_memory(recipe, inputs, pins, "--workers")
    threads = min(torch.get_num_threads(), max(1, default_threads() // workers))
    with WorkerExecutor(folder, pins, threads, LocalExecution().max_retries) as executor:
        yield executor


def paths_of(recipe: Recipe, inputs: Inputs) -> list[Path]:
    """What tasks read outside the run folder."""
    return [inputs.base.path, *(Path(spec.expert) for spec in recipe.tasks.values() if spec.expert)]


# ---- workers of this machine -----------------------------------------------------------------------------------------


def make_pins(recipe: Recipe, spec: LocalExecution) -> list[Pin]:
    """Cores and GPU of every worker, in turn. Raises RecipeError for more than there are."""
    threads = threads_of(recipe)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if threads > (there := len(cores) if cores else default_threads()):
        raise RecipeError(f"executor.threads: {threads} for each task, and this process may use {there} cores")
    pins = []
    for i, device in enumerate(devices_of(recipe.local_update.device, spec.devices, spec.workers)):
        own = tuple(cores[(i * threads + j) % len(cores)] for j in range(threads)) if cores else None
        pins.append(Pin(own, device))
    return pins


def devices_of(device: str, asked: Sequence[int], workers: int) -> list[int | None]:
    """The number of every worker's GPU, in turns at those asked for, or at all there are; None: not told apart.

    Raises RecipeError for a GPU that is not there, or where the recipe computes elsewhere (`local_update.device`).
    """
    there = torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        if asked:
            text = f"tasks compute on local_update.device: {device}; set it to auto, or leave executor.devices out"
            raise RecipeError(f"executor.devices: {text}")
        return [None] * workers
    if wrong := [number for number in asked if number >= there]:
        gpus = f"GPUs 0 to {there - 1}" if there > 1 else "GPU 0" if there else "no GPU that torch can use"
        raise RecipeError(f"executor.devices: {wrong[0]}, and this machine has {gpus}")
    turns = asked or range(there)
    return [turns[i % len(turns)] if turns else None for i in range(workers)]


def check_memory(recipe: Recipe, inputs: Inputs, pins: list[Pin], asked: str = "executor.workers") -> None:
    """Refuse more workers than memory holds, by what `manyshot plan` says.

    Raises WorkerError with both numbers, and what `asked` for so many.
    """
    need = estimate_memory(recipe, inputs, max(inputs.mean_tokens.values()))
    on_gpu = choose_placement(recipe.local_update).device.startswith("cuda")
    # a model on its way to a GPU is in memory first
    each = PROCESS_BYTES + (need["weights"] if on_gpu else need["total"])
    _refuse(asked, len(pins), each, available(), "of memory", "this machine has")
    for number in sorted({pin.device for pin in pins if pin.device is not None}):
        sharing = sum(pin.device == number for pin in pins)
        free = torch.cuda.mem_get_info(number)[0]
        _refuse(asked, sharing, need["total"], free, "of GPU memory", f"GPU {number} has")


def _refuse(asked: str, count: int, each: int, there: int | None, what: str, has: str) -> None:
    if there is not None and count * each > there:
        fits = there // each
        advice = f"use {asked}={fits}" if fits > 1 else f"run one after the other ({asked}=1)"
        raise WorkerError(
            f"{asked}: {_counted(count, 'worker')} of about {each / 1e9:.1f} GB need {count * each / 1e9:.1f} "
            f"GB {what}, and {has} {there / 1e9:.1f} GB free; {advice}, or a smaller local_update.micro_batch_size"
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
