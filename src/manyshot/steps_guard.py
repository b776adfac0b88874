"""The guards of a round: from its files to guards.json, and to whoever watches the run."""

from __future__ import annotations

from pathlib import Path

from manyshot.guards import BEFORE_MERGE, describe, examine
from manyshot.round_record import RoundRecord, measures
from manyshot.rundir import read_json, write_json
from manyshot.steps import Json, Run


def guard(run: Run, folder: Path, round_index: int, *, merged: bool) -> list[Json]:
    """Write guards.json from what the rounds have recorded so far, tell what is new, and return all findings.

    Called before the merge, so that a run whose weights collapse says so before that ends it, and when the `merged`
    model has been measured. What is written depends on the records alone: a resumed run ends with the same bytes.
    """
    history = [_read(run, run.folder.round(earlier), earlier) for earlier in range(1, round_index)]
    history.append(_read(run, folder, round_index))
    found = [finding.to_json() for finding in examine(history, run.recipe)]
    write_json(folder / "guards.json", {"measures": measures(history, run.recipe.merge.reference), "findings": found})
    for finding in found:
        if merged != (finding["kind"] in BEFORE_MERGE):
            run.progress.message(describe(finding), **finding)
    return found


def _read(run: Run, folder: Path, round_index: int) -> RoundRecord:
    gaps = read_json(folder / "loss_gap.json")
    merge, losses = (
        read_json(path) if path.exists() else None for path in (folder / "merge.json", folder / "losses.json")
    )
    return RoundRecord.from_json(round_index, gaps, merge, losses, space=run.recipe.merge.space)
