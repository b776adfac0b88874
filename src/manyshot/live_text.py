"""What is said of a run that goes on, in a terminal and on its page."""

from __future__ import annotations

import time

from manyshot.live_metrics import Doing
from manyshot.live_state import LiveState
from manyshot.status import resume_command

TITLES = {
    "local_update": "training",
    "validation": "validation loss",
    "score": "test score",
    "merge": "merging",
    "save": "saving",
    "load": "loading",
    "check": "checking",
}


def totals(state: LiveState) -> str:
    """`23 of 45 steps, 2 min 10 s so far; about 3 min left`."""
    since = 0.0 if state.finished or state.died else time.time() - state.moment
    text = f"{state.steps_done} of {state.steps} steps, {duration(state.seconds + since)} so far"
    if state.finished:
        return f"{text}; finished"
    when = " once it goes on" if state.died else ""
    left = f"about {duration(state.left - since)} left{when}" if state.left is not None else "time left not known yet"
    return f"{text}; {left}; next: {state.next.name}" if state.next else f"{text}; last checks"


def troubles(state: LiveState) -> list[str]:
    """What a run has failed with, or since when nothing has happened where it may have died; and how to go on."""
    if not (state.died or state.at_risk) or state.last_activity is None:
        return []
    if state.failure is not None:
        return [f"it ended with: {state.failure}", "go on with:", f"  {resume_command(state.folder)}"]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.last_activity))
    ended = "its process has ended" if state.died else "if its process has ended"
    return [
        f"nothing has happened since {since} ({duration(state.silent)} ago); {ended}, go on with:",
        f"  {resume_command(state.folder)}",
    ]


def doing_text(now: Doing, model: str) -> str:
    """`round 2, math: training`."""
    return f"{shown(model)}{', ' + now.task if now.task else ''}: {TITLES.get(now.phase, now.phase)}"


def shown(model: str) -> str:
    """A row's name as people read it."""
    return model.replace("_", "-")


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
