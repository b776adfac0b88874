"""The merge of a round by hand: the steps of an ordinary run, with losses that teams have told.

L_τ(Θʳ) is known when the teams have measured what they are given in round r + 1, so the records of a round are closed
one merge later; those of the last one when its losses are told (`tell_losses`), if ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyshot.by_hand import (
    check_loss,
    current_round,
    leave_out,
    missing_tasks,
    open_run,
    refuse_unknown,
    start_state,
)
from manyshot.card_text import fenced, front_matter, metadata, origin_of, public_recipe, table
from manyshot.compare_render import escape_markdown
from manyshot.errors import MergeError, RunFolderError
from manyshot.local_update import RECORD, expert_state
from manyshot.manifest import MANIFEST, find_damages
from manyshot.normalize import multi_task_loss
from manyshot.progress import Listener, Progress
from manyshot.rounds import seal_round
from manyshot.run_lock import one_writer
from manyshot.rundir import link_atomically, read_json, write_json, write_text
from manyshot.steps import Expert, Run, seal_step
from manyshot.steps_guard import guard
from manyshot.steps_merge import merge as merge_experts
from manyshot.steps_merge import weigh
from manyshot.steps_train import failures, uneven_steps

Json = dict[str, Any]


def merge(path: Path, without: Sequence[str] = (), listener: Listener | None = None) -> Json:
    """Merge what was sent for the current round, and begin the next; returns weights and the model's folder.

    Raises RunFolderError naming the tasks that have sent nothing and are not left out by `without`.
    """
    with one_writer(path):
        progress = Progress(listener)
        run = open_run(path, progress)
        _refuse_damaged(run)
        round_index = current_round(run)
        if round_index > run.recipe.protocol.rounds:
            raise RunFolderError(f"{path}: all {run.recipe.protocol.rounds} rounds have been merged")
        _leave_out(run, round_index, without)
        progress.metrics = run.folder.metrics
        progress.record("begin", began=round(time.time(), 3), resumed=round_index > 1)
        try:
            return _merge(run, round_index)
        except Exception as error:
            progress.record("failed", error=str(error))
            raise


def _refuse_damaged(run: Run) -> None:
    """Raises RunFolderError naming every file that is not as it was left."""
    path = run.folder.path
    if damages := find_damages(path, run.progress.message):
        shown = [f"{(one.folder / one.name).relative_to(path)} {one.what}" for one in damages]
        raise RunFolderError(f"{path}: not as it was left: {'; '.join(shown[:10])}. Put it back from a copy")


def _leave_out(run: Run, round_index: int, without: Sequence[str]) -> None:
    missing = missing_tasks(run, round_index)
    for name in without:
        refuse_unknown(run, name)
        if name not in missing:
            raise RunFolderError(f"round {round_index}: --without {name}, and '{name}' has sent its expert")
    if waiting := [name for name in missing if name not in without]:
        raise RunFolderError(
            f"round {round_index}: nothing has been sent by {', '.join(waiting)}; --without NAME goes on without one"
        )
    num_left = len(run.names) - len(missing)
    wrong = ["a merge needs at least two tasks"] if num_left < 2 else []
    for made in (run.recipe.method, *(made for _, made in run.recipe.plan.overrides)):
        wrong += [f"{made.name}.{key}: {text}" for key, text in made.problems(num_left, run.recipe.protocol.rounds)]
    if wrong:
        raise MergeError(f"round {round_index}: {num_left} of {len(run.names)} tasks are left, and {wrong[0]}")
    for name in missing:
        leave_out(run, round_index, name)


def _merge(run: Run, round_index: int) -> Json:
    """The steps of rounds.run_round, from the experts on."""
    folder, start = run.folder.round(round_index), start_state(run, round_index)
    experts = []
    for name in run.names:
        place = run.folder.local_update(round_index, name)
        if (place / RECORD).exists():
            experts.append(Expert(name, expert_state(start, place), read_json(place / RECORD)))
    start_losses = {expert.task: expert.record["start"] for expert in experts}
    for earlier in range(round_index - 1):  # where the last merge was interrupted after its last record
        _seal(run, earlier)
    note_losses(run, round_index - 1, start_losses)
    gaps = weigh(run, folder, round_index, start_losses, pretrained_losses(run, experts), experts)
    guard(run, folder, round_index, merged=False)
    merged = merge_experts(run, folder, round_index, start, experts, gaps["weights"])
    findings = guard(run, folder, round_index, merged=True)
    write_text(folder / "merged" / "README.md", _card(run, round_index, gaps, merged.kept_share))
    done = {"round": round_index, "start_from": merged.start_from, "files": merged.digests}
    if skipped := failures(run, round_index, experts):
        done["skipped"] = skipped
    write_json(folder / "DONE.json", done | uneven_steps(run, experts))
    _seal(run, round_index - 1)
    link_atomically(run.folder.merged, folder / "merged")
    run.progress.finished_round(round_index)
    if round_index == run.recipe.protocol.rounds:
        run.progress.record("end")
    return {
        "round": round_index,
        "rounds": run.recipe.protocol.rounds,
        "weights": gaps["weights"],
        "loss_gaps": gaps["loss_gaps"],
        "kept_share": merged.kept_share,
        "findings": findings,
        "merged": str(folder / "merged"),
    }


def pretrained_losses(run: Run, experts: Sequence[Expert]) -> Json:
    """L_τ(Θ⁰): what round 1 began with, or what a team that came later has told. Only relative gaps look at it."""
    found = {}
    for expert in experts:
        places = [run.folder.local_update(r, expert.task) / RECORD for r in range(1, expert.record["round"] + 1)]
        told = [
            read_json(place)["pretrained"] for place in places if place.exists() and "pretrained" in read_json(place)
        ]
        if places[0].exists():
            told.append(read_json(places[0])["start"])
        if not told and getattr(run.recipe.method, "gap", "absolute") == "relative":
            raise MergeError(
                f"task '{expert.task}': it was not in round 1, so the pretrained model's loss on it is not known, and "
                "operator.gap: relative needs it; send it again with --loss-pretrained"
            )
        found[expert.task] = told[0] if told else expert.record["start"]
    return found


# ---- what is known a round later -------------------------------------------------------------------------------------


def note_losses(run: Run, round_index: int, losses: Mapping[str, Json]) -> None:
    """Write the losses of the model that a round ended with, and look at them."""
    folder = run.folder.round(round_index)
    if round_index == 0:
        write_json(folder / "losses.json", dict(losses))
        return
    weighed = read_json(folder / "loss_gap.json")["start_losses"]
    # of a task that was left out of the round it is not known what it began with
    comparable = {name: losses[name] for name in run.names if name in losses and name in weighed}
    write_json(folder / "losses.json", comparable)
    if comparable.keys() == weighed.keys():
        guard(run, folder, round_index, merged=True)


def _seal(run: Run, round_index: int) -> None:
    """Name in manifests what nothing changes any more, once: a round whose losses are known."""
    folder = run.folder.round(round_index)
    seal_step(run, folder, "losses", folder / "losses.json")
    if round_index == 0:
        seal_step(run, run.folder.path, "pretrained model", folder / MANIFEST)
    else:
        seal_round(run, folder, round_index)


def tell_losses(path: Path, losses: Mapping[str, float], listener: Listener | None = None) -> Json:
    """Close a run with the teams' losses of its last merged model; returns what scores.json says.

    Raises RunFolderError where rounds are to come, or a task of the last round is not among them.
    """
    with one_writer(path):
        progress = Progress(listener)
        run = open_run(path, progress)
        _refuse_damaged(run)
        rounds = run.recipe.protocol.rounds
        if current_round(run) <= rounds:
            raise RunFolderError(f"{path}: round {current_round(run)} of {rounds} has not been merged yet")
        for name, loss in losses.items():
            refuse_unknown(run, name)
            check_loss(loss, "--loss", name)
        weighed = read_json(run.folder.round(rounds) / "loss_gap.json")["start_losses"]
        if missing := [name for name in weighed if name not in losses]:
            raise RunFolderError(f"{path}: the losses of {', '.join(missing)} are missing")
        if run.folder.scores.exists():
            raise RunFolderError(f"{path}: the losses of its last model have been told already")
        note_losses(run, rounds, {name: {"loss": loss} for name, loss in losses.items()})
        _seal(run, rounds)
        summary = _summary(run)
        write_json(run.folder.scores, summary)
        seal_step(run, run.folder.path, "scores", run.folder.scores, run.folder.splits)
    return summary


def _summary(run: Run) -> Json:
    """As an ordinary run's scores.json, without the scores."""
    rounds = {}
    for r in range(1, run.recipe.protocol.rounds + 1):
        losses = read_json(run.folder.round(r) / "losses.json")
        gaps = read_json(run.folder.round(r) / "loss_gap.json")
        more = {"multi_task_loss": multi_task_loss(losses)} if losses else {}
        rounds[str(r)] = {"losses": losses, "weights": gaps["weights"], "loss_gaps": gaps["loss_gaps"]} | more
    pretrained = read_json(run.folder.round(0) / "losses.json")
    first = {"losses": pretrained, "multi_task_loss": multi_task_loss(pretrained)}
    return {"tasks": list(run.names), "operator": run.recipe.method.name, "pretrained": first, "rounds": rounds}


def _card(run: Run, round_index: int, gaps: Json, kept_share: float) -> str:
    """The model card: what was merged and how; scores are with the teams."""
    origin = origin_of(run.recipe.model, run.base)
    rows = [
        [name, f"{gaps['loss_gaps'][name]:.4f}", f"{gaps['weights'][name]:.4f}"]
        if name in gaps["weights"]
        else [name, "–", "left out"]
        for name in run.names
    ]
    name = f"{origin.name.rsplit('/', 1)[-1]}, merged from {len(run.names)} tasks"
    return f"""{front_matter(metadata(origin, run.recipe.method.name))}
# {escape_markdown(name)}

{origin.link}, fine-tuned by {len(run.names)} teams on data that stayed with them, and merged by many-shot merging. This
is round {round_index} of {run.recipe.protocol.rounds}, with the operator `{run.recipe.method.name}`.

{table(["task", "loss gap (nats)", "weight"], rows)}

Share of the changed coordinates that the merge kept: {kept_share:.3f}. Loss gaps are as the teams told them; nothing
was measured where the model was merged.

## Recipe

{fenced(public_recipe(run.recipe.model_dump(mode="json")), "yaml")}
"""
