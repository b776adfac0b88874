"""From the experts of a round to its merged model: gaps, weights, the merge, and what the next round starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from manyshot.adapters import average_adapters, expand_adapter, truncate_to_adapter
from manyshot.errors import RunFolderError
from manyshot.export import export_model
from manyshot.gap_weights import (
    TaskLosses,
    effective_tasks,
    memory_of,
    normalized_weights,
    weigh_tasks,
)
from manyshot.manifest import files_in, linked_digests
from manyshot.match import open_experts
from manyshot.merge_report import TileSums
from manyshot.models import ModelState
from manyshot.operators import OperatorPlan
from manyshot.outer import STATE_NAME, Outer
from manyshot.outer_choice import make_outer
from manyshot.removed import refuse_removed, why_removed
from manyshot.round_merge import MergePart, merge_factors, merge_part, merge_weights, scale_update, write_update
from manyshot.rundir import ROLLBACK, read_json, remove, write_json
from manyshot.segments import first_rounds
from manyshot.steps import Expert, Json, Merged, Run, measure, seal_step
from manyshot.steps_guard import guard
from manyshot.steps_search import WORK_FOLDER, search_scaling
from manyshot.steps_train import all_steps_alone, failures
from manyshot.task_vector import AdapterUpdate, ModelUpdate, StoredTaskVector, Update
from manyshot.tensors import Checkpoint, file_digest

# ---- loss gaps and weights -------------------------------------------------------------------------------------------


def weigh(
    run: Run, folder: Path, round_index: int, start_losses: Json, pretrained_losses: Json, experts: Sequence[Expert]
) -> Json:
    """Loss gaps G_τ and weights α_τ of one merge, written to loss_gap.json; of the tasks that have an expert."""
    names = [expert.task for expert in experts]
    operator, losses, told = run.recipe.method.at_round(max(1, round_index)), None, Json()
    # a trial whose operator needs no gaps has not measured its experts
    if all("validation" in expert.record for expert in experts):
        start, pretrained = (
            tuple(losses[expert.task]["loss"] for expert in experts) for losses in (start_losses, pretrained_losses)
        )
        losses = TaskLosses(start, tuple(expert.loss for expert in experts), pretrained)
        told["expert_losses"] = {expert.task: expert.record["validation"] for expert in experts}
    before = _weights_before(run, round_index, names) if losses and memory_of(operator) else None
    record = told | weigh_tasks(operator, names, losses, len(run.tasks), before)
    if failed := failures(run, round_index, experts):
        record["skipped"] = failed
    write_json(folder / "loss_gap.json", {"start_losses": start_losses} | record)
    return record


def _weights_before(run: Run, round_index: int, names: Sequence[str]) -> list[float] | None:
    """The weights of the round before; None in the first round and in a post-hoc merge.

    A task that was left out of it has those of the last round that it was in, 1/T where it was in none (as one has that
    came with an extension).
    """
    if round_index < 2:
        return None
    found: dict[str, float] = {}
    since = first_rounds(run.folder.path, run.names)
    for earlier in range(round_index - 1, 0, -1):
        there = [name for name in run.names if since.get(name, 1) <= earlier]
        path = run.folder.round(earlier) / "loss_gap.json"
        record = read_json(path)
        weights: dict[str, float] = record.get("weights", {})
        if {*weights, *record.get("skipped", {})} != set(there):
            raise RunFolderError(
                f"{path}: holds weights of {', '.join(sorted(weights)) or 'no task'}, and operator.weight_memory needs "
                f"those of {', '.join(there)}; remove the round's folder to redo it"
            )
        found = weights | found
        if all(name in found for name in names):
            break
    return [found.get(name, 1 / len(run.names)) for name in names]


# ---- merge -----------------------------------------------------------------------------------------------------------


def merge(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> Merged:
    """Merge one round's experts into task_vector.safetensors, then write merged/ as a normal model folder."""
    report = merge_task_vectors(run, folder, round_index, start, experts, weights)
    state = replace(run.pretrained, task_vector=folder / "task_vector.safetensors")
    pretrained = Checkpoint(run.base.path)
    earlier = run.folder.round(round_index - 1) / "merged"
    if not run.trial and not (folder / "merged" / "config.json").exists() and not _is_left_out(run, folder / "merged"):
        dtype = run.recipe.merge.output_dtype
        with run.progress.timed("save", round_index):
            export_model(
                pretrained,
                StoredTaskVector(folder / "task_vector.safetensors"),
                folder / "merged",
                dtype=dtype,
                apart=True,
                earlier=earlier,
            )
    # the card tells of what is measured later
    files = [file for file in files_in(folder / "merged") if file.name != "README.md"]
    seal_step(run, folder, "merged model", *files, known=linked_digests(folder, earlier.parent, files))
    start_from = str(start.task_vector.parent.name) if start.task_vector else "pretrained"
    return Merged(state, report["kept_share"], start_from, _digests(report))


def _is_left_out(run: Run, place: Path) -> bool:
    """Whether `keep` had something removed, which is not made again then."""
    return not run.trial and why_removed(run.folder.path, place) is not None


def merge_task_vectors(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> Json:
    """Write task_vector.safetensors, then merge.json, and tell of it; returns what merge.json says."""
    record = write_merge(run, folder, round_index, start, experts, weights)
    seal_merge(run, folder, record)
    _report_merge(run, round_index, record)
    return record


def seal_merge(run: Run, folder: Path, record: Json) -> None:
    """Name in the manifest of `folder` what a merge left there; `record` is its merge.json."""
    known = _digests(record)
    carried = [folder / "carried_adapter"] if run.recipe.merge.space == "factors" else []
    places = [folder / "merge.json", folder / ROLLBACK, *(folder / name for name in known), *carried]
    seal_step(run, folder, "merge", *places, known=known)


def _digests(record: Json) -> dict[str, str]:
    """The digests that merge.json holds, by the names of the files beside it."""
    found = {"task_vector.safetensors": record["digest"]}
    return found | ({STATE_NAME: record["outer_state_digest"]} if "outer_state_digest" in record else {})


def write_merge(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> Json:
    """Write task_vector.safetensors, then merge.json; returns what merge.json says."""
    record_path = folder / "merge.json"
    plan = run.recipe.plan.at_round(max(1, round_index))
    if not record_path.exists():
        _check_experts(run, round_index, experts)
        searched: Json = {}
        if plan.searches_scaling:
            write = partial(_write_candidate, run, round_index, start, experts, weights)
            searched["line_search"] = search_scaling(run, folder, round_index, experts, write)
            plan = plan.with_scaling(searched["line_search"]["scaling"])
        with run.progress.timed("merge", round_index):
            found = _merge(run, folder, round_index, start, experts, weights, plan)
        write_json(record_path, found | searched)
    remove(folder / WORK_FOLDER)
    return read_json(record_path)


def _check_experts(run: Run, round_index: int, experts: Sequence[Expert]) -> None:
    """Raise RunFolderError where a merge that is to be made again is one of experts that `keep` had removed."""
    if run.trial:
        return
    for expert in experts:
        name = expert.task
        place = run.folder.local_update(round_index, name) if round_index else run.folder.expert(name)
        begun = expert.state.start_adapter
        for part in (place / "adapter", place / "model", *([begun] if begun is not None else [])):
            refuse_removed(run.folder.path, part, f"round {round_index}: its merge")


def _merge(
    run: Run,
    folder: Path,
    round_index: int,
    start: ModelState,
    experts: Sequence[Expert],
    weights: dict[str, float],
    plan: OperatorPlan,
) -> Json:
    """Write task_vector.safetensors, and what the outer optimizer leaves; returns what there is to say of the merge."""
    output, sources = folder / "task_vector.safetensors", _sources(run, start, experts)
    in_order, seed_parts = [weights[expert.task] for expert in experts], _seed_parts(run, round_index)
    outer = _outer(run, folder, round_index)
    if run.recipe.merge.space == "factors":
        adapters = [_adapter(expert) for expert in experts]
        report = merge_factors(sources[2], adapters, plan, in_order, folder / "carried_adapter", seed_parts=seed_parts)
        in_weights = expand_adapter(sources[0], folder / "carried_adapter", output, sources[1])
    else:
        reference = run.recipe.merge.reference
        report = merge_weights(
            *(*sources, plan, in_order, output),
            reference=reference,
            outer=outer,
            seed_parts=seed_parts,
            elsewhere=partial(_merge_parts, run) if run.executor.far else None,
        )
        in_weights = {}
    found = report.to_json() | {"digest": file_digest(output), "weights": weights}
    if in_weights:  # the report's own norms are those of A and B
        found["in_weights"] = in_weights
    if outer.leaves is not None:
        found["outer_state_digest"] = file_digest(outer.leaves)
    from_start = start.task_vector is None or run.recipe.merge.reference == "start"
    if from_start and run.recipe.merge.space == "weights":
        drift = found["task_vector_norms"]  # these are relative to the round's start already
    else:
        drift = {expert.task: update.norm() for expert, update in zip(experts, sources[-1], strict=True)}
    return found | {"drift": drift}


def _merge_parts(run: Run, parts: list[MergePart]) -> list[list[TileSums]]:
    return run.executor.map(merge_part, parts, run.progress)


def _write_candidate(
    run: Run,
    round_index: int,
    start: ModelState,
    experts: Sequence[Expert],
    weights: dict[str, float],
    scaling: float,
    output: Path,
) -> None:
    """Write the task vector that the merge has with one β; what the operator makes of the experts is kept beside it."""
    plan, sources = run.recipe.plan.at_round(max(1, round_index)), _sources(run, start, experts)
    reference, outer = run.recipe.merge.reference, replace(_outer(run, output.parent, round_index), leaves=None)
    update = output.with_name("update.safetensors")
    if not update.exists():
        in_order, seed_parts = [weights[expert.task] for expert in experts], _seed_parts(run, round_index)
        write_update(*sources, plan, in_order, update, reference=reference, seed_parts=seed_parts)
    scale_update(*sources[:2], update, plan, scaling, output, reference=reference, outer=outer)


def _sources(
    run: Run, start: ModelState, experts: Sequence[Expert]
) -> tuple[Checkpoint, StoredTaskVector | None, tuple[str, ...], list[Update]]:
    """What a merge reads: Θ⁰, Θʳ⁻¹ − Θ⁰, the tasks, and what each expert adds to Θʳ⁻¹."""
    pretrained = Checkpoint(run.base.path)
    stored = StoredTaskVector(start.task_vector) if start.task_vector else None
    tasks = tuple(expert.task for expert in experts)
    return pretrained, stored, tasks, [_update(expert, pretrained) for expert in experts]


def _seed_parts(run: Run, round_index: int) -> tuple[int, str, int]:
    """Post-hoc (0) draws what the only round of a run with one round draws."""
    return run.recipe.seed, "operator", max(1, round_index)


def _outer(run: Run, folder: Path, round_index: int) -> Outer:
    """The outer optimizer of a round. It leaves its state in `folder` where there is a next round.

    A round that was rolled back starts it anew: its memory had a part in the step that was taken back (O'Donoghue and
    Candès 2015, arXiv 1204.3982, restart momentum for the same reason).
    """
    merge, rounds = run.recipe.merge, run.recipe.protocol.rounds
    merge = merge if round_index else merge.once()
    followed = round_index > 0 and (round_index < rounds or run.goes_on)
    anew = next((r for r in range(round_index - 1, 0, -1) if (run.folder.round(r) / ROLLBACK).exists()), 0)
    return make_outer(
        merge,
        round_index,
        before=run.folder.round(round_index - 2) / "task_vector.safetensors" if round_index > 2 else None,
        state=run.folder.round(round_index - 1) / STATE_NAME if round_index > anew + 1 else None,
        leaves=folder / STATE_NAME if followed else None,
        anew=anew,
        last=round_index == rounds,
    )


def _adapter(expert: Expert) -> Path:
    assert expert.state.adapter is not None  # the recipe allows space: factors for LoRA only
    return expert.state.adapter


def _update(expert: Expert, pretrained: Checkpoint) -> Update:
    """What an expert adds to the model its round started from."""
    if "expert" in expert.record:
        return open_experts(pretrained, {expert.task: Path(expert.record["expert"])})[0]
    if expert.state.full is not None:
        if "returned" in expert.record:  # a trainer of the user's own may write tied tensors once, or twice
            return open_experts(pretrained, {expert.task: expert.state.full})[0]
        return ModelUpdate(expert.state.full)
    return AdapterUpdate(_adapter(expert), expert.state.start_adapter)


def _report_merge(run: Run, round_index: int, record: Json) -> None:
    """Say who got weight and how much was kept."""
    effective = effective_tasks(list(record["weights"].values()))
    shares = ", ".join(f"{task} {weight:.3f}" for task, weight in record["weights"].items())
    name = f"round {round_index}" if round_index else "post-hoc"
    run.progress.message(
        f"{name}: weights {shares} ({effective:.2f} effective tasks); {record['kept_share']:.1%} of coordinates kept"
    )
    if "line_search" in record:
        run.progress.message(f"{name}: {_describe_search(record['line_search'])}")


def _describe_search(search: Json) -> str:
    """Which β was found, among which."""
    tried = ", ".join(f"{point['scaling']:g} {point['objective']:.4f}" for point in search["points"])
    return f"scaling {search['scaling']:g}; lacking of the experts' gain ({search['objective']}) by scaling: {tried}"


def merge_post_hoc(run: Run, pretrained_losses: Json) -> Json:
    """The same operator, once, over the experts: what many-shot is compared with, at equal steps and examples."""
    experts = all_steps_alone(run)
    folder = run.folder.post_hoc
    gaps = weigh(run, folder, 0, pretrained_losses, pretrained_losses, experts)
    guard(run, folder, 0, merged=False)
    record = merge_task_vectors(run, folder, 0, run.pretrained, experts, gaps["weights"])
    state = replace(run.pretrained, task_vector=folder / "task_vector.safetensors")
    measured, found = measure(run, state, folder, 0), guard(run, folder, 0, merged=True)
    seal_step(run, folder, "post-hoc", folder / "loss_gap.json", folder / "guards.json")
    return measured | gaps | {"kept_share": record["kept_share"], "guards": found}


# ---- the next round's start ------------------------------------------------------------------------------------------


def carry_adapter(
    run: Run, folder: Path, merged: ModelState, experts: Sequence[Expert], weights: dict[str, float]
) -> ModelState:
    """The model the next round starts from: merged weights, and what its adapters start from (`adapter_start`)."""
    how, carried = run.recipe.local_update.adapter_start, folder / "carried_adapter"
    if (folder / ROLLBACK).exists():  # as the round itself began
        there = carried.is_dir() or _is_left_out(run, carried)
        return replace(merged, start_adapter=carried if there else None)
    if run.recipe.merge.space == "factors":
        return replace(merged, start_adapter=carried)
    if how in ("fresh", "own"):  # a task's own adapter is where its local update left it
        return merged
    if not carried.exists() and not _is_left_out(run, carried):
        with run.progress.timed("merge", 0):
            adapters = [_adapter(expert) for expert in experts]
            if how == "averaged":
                frozen = run.recipe.local_update.train_factors != "both"
                shares = normalized_weights([weights[expert.task] for expert in experts])
                average_adapters(adapters, shares, carried, frozen=frozen)
            else:
                assert merged.task_vector is not None
                truncate_to_adapter(StoredTaskVector(merged.task_vector), adapters[0], carried)
    seal_step(run, folder, "carried adapter", carried)
    return replace(merged, start_adapter=carried)
