"""The last check of a run: the merged folder, loaded with plain transformers, is the model that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from manyshot.errors import ModelError
from manyshot.evaluate import MeasureJob
from manyshot.local_update import task_loss
from manyshot.measure_parts import measure_model
from manyshot.models import (
    ModelState,
    Placement,
    choose_placement,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from manyshot.rundir import PARTIAL, remove
from manyshot.steps import Run
from manyshot.tensors import Checkpoint

# largest relative difference of a validation loss between the float32 master and the folder's own type
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_merged(run: Run, summary: dict[str, Any]) -> None:
    """Reload merged/ and compare: finite, same tensors and shapes as the base, validation losses as recorded.

    Raises ModelError naming the tensor or the task.
    """
    folder = run.folder.merged.resolve()
    compare_tensors(run, Checkpoint(folder))
    recorded = summary["rounds"][str(run.recipe.protocol.rounds)]["losses"]
    placement = choose_placement(run.recipe.local_update)
    stored = {Checkpoint(folder).info(name).dtype for name in Checkpoint(folder).names}
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in (*stored, placement.dtype))
    for name, found in _reloaded_losses(run, folder, placement):
        expected = recorded[name]["loss"]
        if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance):
            raise ModelError(f"{folder}: validation loss of task '{name}' is {found:.6f}, recorded {expected:.6f}")


def _reloaded_losses(run: Run, folder: Path, placement: Placement) -> Iterator[tuple[str, float]]:
    """Name and validation loss of every task, measured where the run's other models are."""
    last, state = run.recipe.protocol.rounds, ModelState(folder, trust_remote_code=run.recipe.trust_remote_code)
    if run.executor.splits:
        scratch = run.folder.path / f"checked{PARTIAL}"
        job = MeasureJob(run.recipe, run.tasks, state, scratch, last, scores=False)
        losses = measure_model(run.executor, job, run.progress)["losses"]
        remove(scratch)
        yield from ((name, loss["loss"]) for name, loss in losses.items())
        return
    with quiet_transformers():
        tokenizer = load_tokenizer(folder, trust_remote_code=run.recipe.trust_remote_code)
        model = load_model(state, placement)
        for task in run.tasks:
            which = f"reloaded {folder}"
            loss = task_loss(model, tokenizer, task, run.recipe, run.progress, round_index=last, which=which)
            yield task.name, loss.loss


def compare_tensors(run: Run, merged: Checkpoint) -> None:
    """Same names and shapes as the pretrained model; every float tensor finite."""
    pretrained = Checkpoint(run.base.path)
    if merged.names != pretrained.names:
        differing = sorted(set(merged.names) ^ set(pretrained.names))[0]
        raise ModelError(f"{merged.path}: tensor '{differing}' is in only one of the merged and the pretrained model")
    with run.progress.timed("check"):
        for name in merged.names:
            if merged.info(name).shape != pretrained.info(name).shape:
                raise ModelError(f"{merged.path}: tensor '{name}' changed its shape to {merged.info(name).shape}")
            tensor = merged.read(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ModelError(f"{merged.path}: tensor '{name}' holds NaN or Inf")
