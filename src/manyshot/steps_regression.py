"""Merges that made the multi-task loss worse: `merge.on_regression` ends the run, or takes such a merge back.

With rollback a round merges and measures in `proposed/` first. What is kept moves up, file by file, its record last;
of what is not, rollback.json keeps the numbers, and the round's files are those of the model it began with: Θʳ = Θʳ⁻¹.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyshot.errors import MergeError
from manyshot.guard_advice import shorter_step
from manyshot.manifest import MANIFEST
from manyshot.models import ModelState
from manyshot.rundir import MEASURED, ROLLBACK, atomic_file, atomic_folder, fsync_folder, read_json, remove, write_json
from manyshot.status import resume_command
from manyshot.steps import Expert, Json, Run, measure
from manyshot.steps_merge import write_merge
from manyshot.tensor_writer import SafetensorsWriter
from manyshot.tensors import Checkpoint, TensorInfo, file_digest

PROPOSED, VERDICT = "proposed", "verdict.json"


def regressed(start: float, merged: float, tolerance: float) -> bool:
    """Whether E(Θʳ) is above E(Θʳ⁻¹) by more than the tolerance, a share of the latter."""
    return not merged - start <= tolerance * start


def refuse_regression(run: Run, folder: Path, round_index: int, before: Json, measured: Json) -> None:
    """Raise MergeError, with `on_regression: stop`, where a round's merge made the multi-task loss worse."""
    merge, (start, end) = run.recipe.merge, (before["multi_task_loss"], measured["multi_task_loss"])
    if merge.on_regression != "stop" or not regressed(start, end, merge.regression_tolerance):
        return
    advice = " or ".join(shorter_step(run.recipe, len(run.tasks), round_index))
    again = "" if run.trial else f"; {resume_command(run.folder.path)} merge.on_regression=warn goes on with it"
    raise MergeError(
        f"round {round_index}: the merged model's multi-task loss is {end:.4f}, that of the model it began with "
        f"{start:.4f}, and merge.regression_tolerance allows {merge.regression_tolerance:.2%} more "
        f"({folder / 'losses.json'}); set {advice} in a new run{again}"
    )


def propose(
    run: Run,
    folder: Path,
    round_index: int,
    start: ModelState,
    experts: Sequence[Expert],
    weights: dict[str, float],
    before: Json,
) -> None:
    """With `on_regression: rollback`, merge, measure, and put into the round's folder what the round is to end with."""
    proposed, tolerance = folder / PROPOSED, run.recipe.merge.regression_tolerance
    if run.recipe.merge.on_regression == "rollback" and not (folder / "merge.json").exists():
        if not (proposed / VERDICT).exists():
            write_merge(run, proposed, round_index, start, experts, weights)
            state = replace(run.pretrained, task_vector=proposed / "task_vector.safetensors")
            measured = measure(run, state, proposed, round_index)
            losses = {"start": before["multi_task_loss"], "merged": measured["multi_task_loss"]}
            verdict = {"multi_task_loss": losses, "tolerance": tolerance}
            remove(proposed / MANIFEST)  # the files are about to be moved
            rolled_back = regressed(losses["start"], losses["merged"], tolerance)
            write_json(proposed / VERDICT, verdict | {"rolled_back": rolled_back})
        verdict = read_json(proposed / VERDICT)
        if verdict["rolled_back"]:
            _roll_back(run, folder, round_index, start, verdict)
        else:
            _accept(folder)
    remove(proposed)


def _accept(folder: Path) -> None:
    """Move what was proposed to where a merge leaves it; the record that says that it is there comes last."""
    names = sorted(file.name for file in (folder / PROPOSED).iterdir() if file.name not in (VERDICT, "merge.json"))
    for name in (*names, "merge.json"):
        os.replace(folder / PROPOSED / name, folder / name)
        fsync_folder(folder)


def _roll_back(run: Run, folder: Path, round_index: int, start: ModelState, verdict: Json) -> None:
    """Write what a merge leaves, for a merge that changes nothing."""
    proposed, earlier = folder / PROPOSED, run.folder.round(round_index - 1)
    rejected = read_json(proposed / "merge.json")
    losses = {task: entry["loss"] for task, entry in read_json(proposed / "losses.json").items()}
    for name in MEASURED:
        if (earlier / name).exists() and (name == "losses.json" or not run.trial):
            _copy(earlier / name, folder / name)
    if start.start_adapter is not None and start.start_adapter.parent == earlier:
        with atomic_folder(folder / start.start_adapter.name) as partial:
            shutil.copytree(start.start_adapter, partial, dirs_exist_ok=True)
    output = folder / "task_vector.safetensors"
    if start.task_vector is not None:
        _copy(start.task_vector, output)
    else:
        _write_zeros(proposed / output.name, output)
    numbers = {key: rejected[key] for key in ("kept_share", "update_norm", "merged_norm") if key in rejected}
    write_json(folder / ROLLBACK, verdict | {"round": round_index, "losses": losses, "merge": numbers})
    record = {key: value for key, value in rejected.items() if key != "outer_state_digest"}
    before = read_json(earlier / "merge.json") if round_index > 1 else {}
    unmoved = {"merged_norm": 0.0, "update_norm": 0.0}
    record |= {"kept_share": 0.0} | unmoved | {"merged_norm": before.get("merged_norm", 0.0)}
    if "in_weights" in rejected:
        record["in_weights"] = before.get("in_weights", {}) | {"update_norm": 0.0} if before else unmoved
    write_json(folder / "merge.json", record | {"digest": file_digest(output), "rolled_back": {"losses": losses}})


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as stream, atomic_file(target) as out:
        shutil.copyfileobj(stream, out)


def _write_zeros(like: Path, output: Path) -> None:
    """Θ⁰ − Θ⁰, for the tensors of another task vector."""
    import torch

    vector = Checkpoint(like)
    infos = {name: TensorInfo(vector.info(name).shape, "F32") for name in vector.names}
    with atomic_file(output) as stream, SafetensorsWriter(stream, infos) as writer:
        for name, info in infos.items():
            writer.write(name, torch.zeros(info.shape))
