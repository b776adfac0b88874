"""A run as people watch it: what every model so far is like, what is going on, and how long it may still take.

All of it is read from the run folder, so the same view serves the run's own terminal, another terminal, and a page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from manyshot.errors import RunFolderError
from manyshot.live_estimate import Speed, seconds_left
from manyshot.live_metrics import Doing, Line, MetricsTail, doing, last_of
from manyshot.misshapen import misshapen
from manyshot.process_mark import is_alive
from manyshot.progress import wall_seconds
from manyshot.rundir import RunFolder, read_json
from manyshot.status import Outline, Step, model_folders, planned_steps, read_outline, resume_command

# a run that says nothing for so long may have died, where nobody can ask its process
SILENCE = 300.0


@dataclass(frozen=True)
class Cell:
    """One task in one model: its validation loss; of a round also its expert's, its loss gap, its weight."""

    loss: float | None = None
    expert_loss: float | None = None
    gap: float | None = None
    weight: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Row:
    """One model (pretrained, experts, post-hoc, a round) with every task; `findings` of the round's guards."""

    name: str
    cells: Mapping[str, Cell]
    findings: int = 0

    @property
    def mean_loss(self) -> float | None:
        """E(Θ) = (1/T) Σ_τ L_τ(Θ)."""
        losses = [cell.loss for cell in self.cells.values() if cell.loss is not None]
        return fmean(losses) if len(losses) == len(self.cells) else None

    @property
    def tokens_per_second(self) -> float | None:
        speeds = [cell.tokens_per_second for cell in self.cells.values() if cell.tokens_per_second is not None]
        return fmean(speeds) if speeds else None


@dataclass(frozen=True)
class LiveState:
    """A run at one moment. `left` is None while it cannot be estimated, `alive` where nobody can tell; `failure` is
    what it has ended with, where it said so.
    """

    folder: Path
    outline: Outline
    rows: Sequence[Row]
    steps: int
    next: Step | None
    doing: Doing | None
    steps_done: int
    seconds: float
    left: float | None
    finished: bool
    alive: bool | None
    last_activity: float | None
    moment: float
    failure: str | None = None

    @property
    def silent(self) -> float:
        """Seconds since the run's last sign of life."""
        return self.moment - self.last_activity if self.last_activity is not None else 0.0

    @property
    def died(self) -> bool:
        """It has failed, or its process has ended, and it has not finished."""
        return not self.finished and (self.alive is False or self.failure is not None)

    @property
    def at_risk(self) -> bool:
        """Nobody can tell whether it still runs, and it has been silent for long."""
        return not self.finished and self.alive is None and self.silent > SILENCE


def to_json(state: LiveState) -> dict[str, Any]:
    """What `manyshot status --json` says beside the steps and scores."""
    return {
        "process": {True: "running", False: "ended", None: "unknown"}[state.alive],
        "failure": state.failure,
        "seconds": round(state.seconds, 1),
        "seconds_left": None if state.left is None else round(state.left, 1),
        "resume": None if state.finished else resume_command(state.folder),
    }


@dataclass
class LiveRun:
    """Reads a run folder again and again."""

    path: Path
    _tail: MetricsTail = field(init=False)

    def __post_init__(self) -> None:
        self._tail = MetricsTail(RunFolder(self.path).metrics)

    @misshapen(RunFolderError, "its records cannot be read")
    def read(self) -> LiveState:
        """The run as it is now. Raises RunFolderError where the folder holds no run."""
        folder, moment = RunFolder(self.path), time.time()
        outline = read_outline(folder)
        lines = self._tail.read()
        steps = planned_steps(folder, outline)
        pending = [step for step in steps if not step.record.exists()]
        begin, finished = last_of(lines, "begin"), bool(lines) and lines[-1].get("kind") == "end"
        alive = is_alive(begin["process"]) if begin and isinstance(begin.get("process"), str) else None
        failure = str(lines[-1].get("error")) if lines and lines[-1].get("kind") == "failed" else None
        runs = not finished and alive is not False and failure is None
        return LiveState(
            folder=self.path,
            outline=outline,
            rows=read_rows(folder, outline, lines),
            steps=len(steps),
            next=pending[0] if pending else None,
            doing=doing(lines) if runs else None,
            steps_done=len(steps) - len(pending),
            seconds=wall_seconds(lines) + (moment - lines[-1]["time"] if runs and lines else 0.0),
            left=_time_left(outline, steps, pending, lines, moment if runs else None),
            finished=finished,
            alive=alive,
            last_activity=lines[-1]["time"] if lines else None,
            moment=moment,
            failure=failure,
        )


def _time_left(
    outline: Outline, steps: Sequence[Step], pending: Sequence[Step], lines: Sequence[Line], moment: float | None
) -> float | None:
    """Seconds that the pending steps will take, the first one from its start where the run does not go on at any
    `moment`; None where the run has not written what there is to do.
    """
    plan = last_of(lines, "plan")
    if plan is None:
        return None
    speed = Speed(lines, plan, doing(lines) if moment is not None else None, moment or 0.0)
    reused = outline.rounds == 1 and outline.evaluation["experts"]
    spent = 0.0
    if moment is not None:
        done = [step.record.stat().st_mtime for step in steps if step not in pending]
        began = max([line["time"] for line in lines if line.get("kind") == "begin"][-1:] + done, default=moment)
        starts = (line["time"] for line in lines if line.get("kind") == "start" and line["time"] >= began)
        spent = moment - next(starts, moment)
    return seconds_left(pending, outline.tasks, speed, reused=reused, spent=spent)


# ---- the table -------------------------------------------------------------------------------------------------------


def read_rows(folder: RunFolder, outline: Outline, lines: Sequence[Line]) -> list[Row]:
    """One row for each model of the run, in the order in which they come about, finished or not."""
    speeds = _speeds(outline, lines)
    rows = []
    for name, place in model_folders(folder, outline.rounds).items():
        if name == "post_hoc" and not outline.evaluation["post_hoc"]:
            continue
        rows.append(_read_row(name, place, outline.tasks, speeds.get(name, {})))
        if name == "pretrained" and outline.evaluation["experts"]:
            cells = {
                task: Cell(loss=_expert_loss(folder.expert(task)), tokens_per_second=speeds["experts"].get(task))
                for task in outline.tasks
            }
            rows.append(Row("experts", cells))
    return rows


def _read_row(name: str, place: Path, tasks: Sequence[str], speeds: Mapping[str, float]) -> Row:
    losses, gaps, guards = (_read_if_there(place / file) for file in ("losses.json", "loss_gap.json", "guards.json"))
    cells = {
        task: Cell(
            loss=losses[task]["loss"] if task in losses else None,
            expert_loss=_expert_loss(place / task),
            gap=gaps.get("loss_gaps", {}).get(task),
            weight=gaps.get("weights", {}).get(task),
            tokens_per_second=speeds.get(task),
        )
        for task in tasks
    }
    return Row(name, cells, len(guards.get("findings", [])))


def _expert_loss(place: Path) -> float | None:
    found: float | None = _read_if_there(place / "local_update.json").get("validation", {}).get("loss")
    return found


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _speeds(outline: Outline, lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Tokens a second of every local update, by row and task.

    A local update that takes all steps of its task at once made that task's expert.
    """
    plan = last_of(lines, "plan") or {"expert_steps": {}}
    found: dict[str, dict[str, float]] = {"experts": {}}
    for line in lines:
        if line.get("kind") == "phase" and line.get("phase") == "local_update" and line["seconds"]:
            alone = outline.evaluation["experts"] and line["steps"] == plan["expert_steps"].get(line["task"])
            row = "experts" if alone else f"round {line['round']}"
            found.setdefault(row, {})[line["task"]] = line["tokens"] / line["seconds"]
    return found
