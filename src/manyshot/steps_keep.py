"""After a round: remove what `keep` leaves out, as soon as no step that is still to come needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manyshot.optimizer_state import OPTIMIZER_NAME
from manyshot.removed import remove_places
from manyshot.start_adapters import last_update
from manyshot.steps import Run

CARRIED = "carried_adapter"
# what a local update leaves beside its record
EXPERT_PARTS = ("adapter", "model", OPTIMIZER_NAME)


def tidy(run: Run, round_index: int) -> None:
    """Remove what `keep` leaves out of everything up to a round that is done; round 0 is what comes before round 1."""
    if run.trial:
        return
    keep, places = run.recipe.keep, dict[Path, str]()
    if keep.merged == "last":
        places |= {run.folder.round(r) / "merged": "keep.merged: last" for r in range(1, round_index)}
    if keep.adapters != "all":
        kept, why = _kept(run, round_index), f"keep.adapters: {keep.adapters}"
        places |= {place: why for place in _expert_places(run, round_index) if place not in kept}
    if there := {place: why for place, why in places.items() if place.exists()}:
        remove_places(run.folder.path, there)


def _expert_places(run: Run, round_index: int) -> Iterator[Path]:
    """Where experts, optimizers' states and carried adapters are, up to a round."""
    for r in range(1, round_index + 1):
        yield from (run.folder.local_update(r, name) / part for name in run.names for part in EXPERT_PARTS)
        yield run.folder.round(r) / CARRIED
    # where there is one round only, its local updates are the experts, which are to be copied
    if run.recipe.keep.adapters == "none" and (round_index or run.recipe.protocol.rounds > 1):
        yield from (run.folder.expert(name) / part for name in run.names for part in EXPERT_PARTS)


def _kept(run: Run, round_index: int) -> set[Path]:
    """What the next round goes on from; with `last` also the round's experts, and what their adapters began from."""
    follows = round_index < run.recipe.protocol.rounds or run.goes_on
    last = run.recipe.keep.adapters == "last"
    found = _starts(run, round_index + 1) if follows or last else set()
    if last and round_index:
        own = {run.folder.local_update(round_index, name) / part for name in run.names for part in EXPERT_PARTS}
        found |= own | {place for place in _starts(run, round_index) if place.name != OPTIMIZER_NAME}
    return found


def _starts(run: Run, round_index: int) -> set[Path]:
    """What the local updates of a round begin from, beside the merged model."""
    update = run.recipe.local_update
    found = {run.folder.round(round_index - 1) / CARRIED}
    for name in run.names:
        place = last_update(run.folder, round_index, name)
        if place is not None and update.adapter_start == "own":
            found.add(place / "adapter")
        if place is not None and update.optimizer_state == "kept":
            found.add(place / OPTIMIZER_NAME)
    return found
