"""Many-shot merging: the method, top to bottom.

    Θ⁰ = pretrained
    for r = 1..R:
        for each task τ:   θᵣτ = local_update(Θʳ⁻¹, data_τ, steps_r)
        G_τ = L_τ(Θʳ⁻¹) − L_τ(θᵣτ)          α = softmax(G / λ)
        Θʳ = Θ⁰ + M(vʳ₁ … vʳ_T; α)          vʳτ = θᵣτ − Θ⁰
    return Θᴿ

Each step writes its files, then its record, and does nothing when its record is there: that is all there is to resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyshot.card import write_card
from manyshot.manifest import MANIFEST
from manyshot.models import ModelState
from manyshot.normalize import normalized
from manyshot.rundir import ROLLBACK, link_atomically, read_json, write_json
from manyshot.steps import Expert, Json, Merged, Run, measure, seal_step
from manyshot.steps_extend import measure_added
from manyshot.steps_guard import guard
from manyshot.steps_keep import tidy
from manyshot.steps_merge import carry_adapter, merge, merge_post_hoc, weigh
from manyshot.steps_regression import propose, refuse_regression
from manyshot.steps_train import failures, train_experts, uneven_steps, update_locally


def run_rounds(run: Run) -> Json:
    """Run the whole recipe; returns what scores.json holds."""
    summary, _ = run_to_the_end(run)
    add_normalized(run, summary)
    write_json(run.folder.scores, summary)
    seal_step(run, run.folder.path, "scores", run.folder.scores, run.folder.splits)
    return summary


def run_to_the_end(run: Run) -> tuple[Json, ModelState]:
    """Everything that a run measures, and the model that it ends with; of an extended run its earlier part first."""
    if run.earlier is None:
        first, start, summary = 1, run.pretrained, before_rounds(run)
        tidy(run, 0)
    else:
        first = run.earlier.recipe.protocol.rounds + 1
        summary, start = run_to_the_end(run.earlier)
        measure_added(run, run.earlier, summary)

    for round_index in range(first, run.recipe.protocol.rounds + 1):
        start = run_round(run, round_index, start, summary)
        tidy(run, round_index)
    return summary, start


def before_rounds(run: Run) -> Json:
    """The pretrained model; each task's own expert, to compare with; those experts merged once."""
    start = run.pretrained
    summary: Json = {"tasks": list(run.names), "operator": run.recipe.method.name, "rounds": {}}
    summary["pretrained"] = measure(run, start, run.folder.round(0), round_index=0)
    seal_step(run, run.folder.path, "pretrained model", run.folder.round(0) / MANIFEST)
    if run.recipe.evaluation.experts:
        summary["experts"] = train_experts(run)
        seal_step(run, run.folder.path, "experts", *(run.folder.expert(name) / MANIFEST for name in run.names))
    if run.recipe.evaluation.post_hoc:
        summary["post_hoc"] = merge_post_hoc(run, summary["pretrained"]["losses"])
        seal_step(run, run.folder.path, "post-hoc merge", run.folder.post_hoc / MANIFEST)
    return summary


def run_round(run: Run, round_index: int, start: ModelState, summary: Json) -> ModelState:
    """One round; puts it into the summary, and returns the model that the next one starts from."""
    folder = run.folder.round(round_index)

    # ---- local updates: every task fine-tunes from the same merged model
    experts = update_locally(run, start, round_index)

    # ---- weigh, merge, measure
    merged, measured = merge_round(run, folder, round_index, start, experts, summary)
    summary["rounds"][str(round_index)] = measured
    start = carry_adapter(run, folder, merged.state, experts, measured["weights"])

    # ---- done: the record last
    if not run.trial:
        write_card(run, folder, round_index, summary)
    done = {"round": round_index, "start_from": merged.start_from, "files": merged.digests}
    if (folder / ROLLBACK).exists():
        done["rolled_back"] = True
    if skipped := failures(run, round_index, experts):
        done["skipped"] = skipped
    write_json(folder / "DONE.json", done | uneven_steps(run, experts))
    seal_round(run, folder, round_index)
    if not run.trial and not (run.folder.round(round_index + 1) / "DONE.json").exists():
        link_atomically(run.folder.merged, folder / "merged")  # a resume passes rounds that are long over
    run.progress.finished_round(round_index)
    return start


def seal_round(run: Run, folder: Path, round_index: int) -> None:
    """Name in manifests what a round left beside its steps' own files, and the manifests of its tasks."""
    records = [folder / name for name in ("loss_gap.json", "guards.json", "DONE.json")]
    tasks = [folder / name / MANIFEST for name in run.names]
    seal_step(run, folder, "records", *records, folder / "merged" / "README.md", *tasks)
    seal_step(run, run.folder.path, f"round {round_index}", folder / MANIFEST)


def merge_round(
    run: Run, folder: Path, round_index: int, start: ModelState, experts: Sequence[Expert], summary: Json
) -> tuple[Merged, Json]:
    """What a round makes of its experts, in files of `folder`, and what the summary says of it."""
    # what the round before measured is this round's start
    before = summary["rounds"].get(str(round_index - 1), summary["pretrained"])

    # ---- loss gaps: who was erased most, and so gets most weight
    gaps = weigh(run, folder, round_index, before["losses"], summary["pretrained"]["losses"], experts)
    guard(run, folder, round_index, merged=False)

    # ---- merge: Θʳ = Θ⁰ + M(v; α), exact in float32, then written as a normal model folder
    propose(run, folder, round_index, start, experts, gaps["weights"], before)
    merged = merge(run, folder, round_index, start, experts, gaps["weights"])

    # ---- measure, and say what has gone wrong
    measured = measure(run, merged.state, folder, round_index)
    found = guard(run, folder, round_index, merged=True)
    refuse_regression(run, folder, round_index, before, measured)
    more: Json = {"rolled_back": read_json(folder / ROLLBACK)} if (folder / ROLLBACK).exists() else {}
    return merged, measured | gaps | {"kept_share": merged.kept_share, "guards": found} | more


def add_normalized(run: Run, summary: Json) -> None:
    """Put normalized performance beside every model's scores, where there are experts to compare with."""
    if "experts" not in summary:
        return
    experts = summary["experts"]["scores"]
    models = [summary["pretrained"], summary.get("post_hoc"), *summary["rounds"].values()]
    for entry in filter(None, models):
        entry["normalized"] = normalized(entry["scores"], experts, run.names)
