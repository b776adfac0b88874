"""From the experts of a round to its merged model: gaps, weights, the merge, and what the next round starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyshot.adapters import average_adapters, expand_adapter, truncate_to_adapter
from manyshot.errors import RunFolderError
from manyshot.export import export_model
from manyshot.gap_weights import TaskLosses, choose_weights, effective_tasks, memory_of, weights_without_gaps
from manyshot.match import open_experts
from manyshot.models import ModelState
from manyshot.round_merge import Outer, merge_factors, merge_weights
from manyshot.rundir import read_json, write_json
from manyshot.steps import Expert, Json, Merged, Run, measure
from manyshot.steps_train import all_steps_alone
from manyshot.task_vector import AdapterUpdate, ModelUpdate, StoredTaskVector, Update
from manyshot.tensors import Checkpoint, file_digest

# below this share a mask has thrown away nearly everything the tasks learned
LOW_KEPT_SHARE = 0.01


# ---- loss gaps and weights -------------------------------------------------------------------------------------------


def weigh(
    run: Run, folder: Path, round_index: int, start_losses: Json, pretrained_losses: Json, experts: Sequence[Expert]
) -> Json:
    """Loss gaps G_τ and weights α_τ of one merge, written to loss_gap.json."""
    if not all("validation" in expert.record for expert in experts):
        return _weigh_without_gaps(run, folder, round_index, start_losses)
    start, pretrained = (
        tuple(losses[expert.task]["loss"] for expert in experts) for losses in (start_losses, pretrained_losses)
    )
    losses = TaskLosses(start, tuple(expert.loss for expert in experts), pretrained)
    operator = run.recipe.method.at_round(max(1, round_index))
    before = _weights_before(run, round_index) if memory_of(operator) else None
    weights, details = choose_weights(operator, losses, before)
    record = {
        "expert_losses": {expert.task: expert.record["validation"] for expert in experts},
        "loss_gaps": dict(zip(run.names, losses.gaps, strict=True)),
        "weights": dict(zip(run.names, weights, strict=True)),
        "effective_tasks": effective_tasks(weights),
        **details,
    }
    write_json(folder / "loss_gap.json", {"start_losses": start_losses} | record)
    return record


def _weights_before(run: Run, round_index: int) -> list[float] | None:
    """The weights of the round before, in recipe order; None in the first round and in a post-hoc merge."""
    if round_index < 2:
        return None
    path = run.folder.round(round_index - 1) / "loss_gap.json"
    weights: dict[str, float] = read_json(path).get("weights", {})
    if set(weights) != set(run.names):
        raise RunFolderError(
            f"{path}: holds weights of {', '.join(sorted(weights)) or 'no task'}, and operator.weight_memory needs "
            f"those of {', '.join(run.names)}; remove the round's folder to redo it"
        )
    return [weights[name] for name in run.names]


def _weigh_without_gaps(run: Run, folder: Path, round_index: int, start_losses: Json) -> Json:
    """The weights of a trial's operator that needs no gaps, so that its experts were not measured."""
    weights = weights_without_gaps(run.recipe.method.at_round(max(1, round_index)), len(run.names))
    by_task = dict(zip(run.names, weights, strict=True))
    record = {"loss_gaps": {}, "weights": by_task, "effective_tasks": effective_tasks(weights)}
    write_json(folder / "loss_gap.json", {"start_losses": start_losses} | record)
    return record


# ---- merge -----------------------------------------------------------------------------------------------------------


def merge(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> Merged:
    """Merge one round's experts into task_vector.safetensors, then write merged/ as a normal model folder."""
    report = merge_task_vectors(run, folder, round_index, start, experts, weights)
    state = replace(run.pretrained, task_vector=folder / "task_vector.safetensors")
    pretrained = Checkpoint(run.base.path)
    if not run.trial and not (folder / "merged" / "config.json").exists():
        dtype = run.recipe.merge.output_dtype
        with run.progress.timed("save", round_index):
            export_model(
                pretrained,
                StoredTaskVector(folder / "task_vector.safetensors"),
                folder / "merged",
                dtype=dtype,
            )
    start_from = str(start.task_vector.parent.name) if start.task_vector else "pretrained"
    return Merged(state, report["kept_share"], start_from, {"task_vector.safetensors": report["digest"]})


def merge_task_vectors(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> Json:
    """Write task_vector.safetensors, then merge.json; returns what merge.json says."""
    record_path, output = folder / "merge.json", folder / "task_vector.safetensors"
    operator = run.recipe.plan.at_round(max(1, round_index))
    in_order = [weights[expert.task] for expert in experts]
    # post-hoc (0) draws what the only round of a run with one round draws
    seed_parts = (run.recipe.seed, "operator", max(1, round_index))
    pretrained = Checkpoint(run.base.path)
    if not record_path.exists():
        with run.progress.timed("merge", round_index):
            if run.recipe.merge.space == "factors":
                adapters = [_adapter(expert) for expert in experts]
                report = merge_factors(
                    run.names, adapters, operator, in_order, folder / "carried_adapter", seed_parts=seed_parts
                )
                expand_adapter(pretrained, folder / "carried_adapter", output)
            else:
                stored = StoredTaskVector(start.task_vector) if start.task_vector else None
                report = merge_weights(
                    pretrained,
                    stored,
                    run.names,
                    [_update(expert, pretrained) for expert in experts],
                    operator,
                    in_order,
                    output,
                    reference=run.recipe.merge.reference,
                    outer=_outer(run, round_index),
                    seed_parts=seed_parts,
                )
            found = report.to_json() | {"digest": file_digest(output), "weights": weights}
            from_start = start.task_vector is None or run.recipe.merge.reference == "start"
            if from_start and run.recipe.merge.space == "weights":
                drift = found["task_vector_norms"]  # these are relative to the round's start already
            else:
                drift = {expert.task: _update(expert, pretrained).norm() for expert in experts}
            write_json(record_path, found | {"drift": drift})
    record = read_json(record_path)
    _report_merge(run, round_index, record)
    return record


def _outer(run: Run, round_index: int) -> Outer:
    """The outer optimizer of a round; its momentum needs the task vector of two rounds ago, Θʳ⁻² − Θ⁰."""
    step_size = run.recipe.merge.outer_step_size
    if isinstance(step_size, tuple):
        step_size = step_size[max(1, round_index) - 1]
    before = run.folder.round(round_index - 2) / "task_vector.safetensors" if round_index > 2 else None
    momentum = run.recipe.merge.outer_momentum
    return Outer(step_size, momentum, StoredTaskVector(before) if before and momentum else None)


def _adapter(expert: Expert) -> Path:
    assert expert.state.adapter is not None  # the recipe allows space: factors for LoRA only
    return expert.state.adapter


def _update(expert: Expert, pretrained: Checkpoint) -> Update:
    """What an expert adds to the model its round started from."""
    if "expert" in expert.record:
        return open_experts(pretrained, {expert.task: Path(expert.record["expert"])})[0]
    if expert.state.full is not None:
        return ModelUpdate(expert.state.full)
    return AdapterUpdate(_adapter(expert), expert.state.start_adapter)


def _report_merge(run: Run, round_index: int, record: Json) -> None:
    """Say who got weight and how much was kept, and warn when that is nearly nothing."""
    effective = effective_tasks(list(record["weights"].values()))
    shares = ", ".join(f"{task} {weight:.3f}" for task, weight in record["weights"].items())
    name = f"round {round_index}" if round_index else "post-hoc"
    run.progress.message(
        f"{name}: weights {shares} ({effective:.2f} effective tasks); {record['kept_share']:.1%} of coordinates kept"
    )
    if record["kept_share"] < LOW_KEPT_SHARE:
        run.progress.message(
            f"{name}: warning: the mask kept almost nothing; lower operator.mask_threshold or operator.min_agreement, "
            "or raise operator.temperature"
        )


def merge_post_hoc(run: Run, pretrained_losses: Json) -> Json:
    """The same operator, once, over the experts: what many-shot is compared with, at equal steps and examples."""
    experts = all_steps_alone(run)
    folder = run.folder.post_hoc
    gaps = weigh(run, folder, 0, pretrained_losses, pretrained_losses, experts)
    record = merge_task_vectors(run, folder, 0, run.pretrained, experts, gaps["weights"])
    state = replace(run.pretrained, task_vector=folder / "task_vector.safetensors")
    return measure(run, state, folder, 0) | gaps | {"kept_share": record["kept_share"]}


# ---- the next round's start ------------------------------------------------------------------------------------------


def carry_adapter(
    run: Run, folder: Path, merged: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> ModelState:
    """The model the next round starts from: merged weights, and what its adapters start from (`adapter_start`)."""
    how, carried = run.recipe.local_update.adapter_start, folder / "carried_adapter"
    if run.recipe.merge.space == "factors":
        return replace(merged, start_adapter=carried)
    if how == "fresh":
        return merged
    if not carried.exists():
        with run.progress.timed("merge", 0):
            adapters = [_adapter(expert) for expert in experts]
            if how == "averaged":
                average_adapters(adapters, [weights[expert.task] for expert in experts], carried)
            else:
                assert merged.task_vector is not None
                truncate_to_adapter(StoredTaskVector(merged.task_vector), adapters[0], carried)
    return replace(merged, start_adapter=carried)
