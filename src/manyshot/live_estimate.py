"""The time that a run has left: what it has still to train and to measure, at the speed it has shown so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from manyshot.live_metrics import Doing
from manyshot.status import Step

Lines = Sequence[Mapping[str, Any]]
# what every step of a kind does beside its tokens and examples
AROUND = {"train": ("load", "save"), "merge": ("merge", "save"), "measure": ("load",)}


class Speed:
    """What finished phases took: seconds a token, by task, and seconds a pass over a task's held-out examples."""

    def __init__(self, lines: Lines, plan: Mapping[str, Any], now: Doing | None, time: float) -> None:
        self.plan = plan
        trained: dict[str, list[tuple[float, float]]] = {}
        self.passes: dict[tuple[str, str], float] = {}
        around: dict[str, list[float]] = {}
        for line in lines:
            if line.get("kind") != "phase":
                continue
            phase, task, seconds = line["phase"], line["task"], line["seconds"]
            if phase == "local_update" and line.get("tokens"):
                trained.setdefault(task, []).append((seconds, line["tokens"]))
            elif phase in ("validation", "score"):
                self.passes[phase, task] = seconds  # the last: models that end their answers early are scored faster
            else:
                around.setdefault(phase, []).append(seconds)
        if not trained and now is not None and now.phase == "local_update" and now.done:
            trained[now.task] = [(time - now.since, now.done * plan["tokens_per_step"][now.task])]
        self.around = {phase: fmean(found) for phase, found in around.items()}
        self.per_token = {task: _ratio(found) for task, found in trained.items()}
        self.mean_per_token = _ratio([one for found in trained.values() for one in found]) if trained else None

    def train(self, task: str, steps: int) -> float | None:
        """Seconds of `steps` training steps; None while nothing has been trained."""
        rate = self.per_token.get(task, self.mean_per_token)
        return None if rate is None else rate * steps * float(self.plan["tokens_per_step"][task])

    def held_out(self, phase: str, task: str) -> float | None:
        """Seconds of a pass over a task's validation or test examples; as for other tasks where it had none yet."""
        if (phase, task) in self.passes:
            return self.passes[phase, task]
        sizes = self.plan["validation" if phase == "validation" else "test"]
        others = [(seconds, sizes[name]) for (kind, name), seconds in self.passes.items() if kind == phase]
        return _ratio(others) * float(sizes[task]) if others else None

    def step(self, step: Step, tasks: Sequence[str]) -> float | None:
        """Seconds of a whole step; None where something it consists of has not been seen yet."""
        parts: list[float | None] = [self.around.get(phase, 0.0) for phase in AROUND[step.kind]]
        if step.kind == "train":
            alone = step.model == "experts"
            steps = self.plan["expert_steps"][step.task] if alone else self.plan["steps"][step.task][_round(step) - 1]
            parts += [self.train(step.task, steps), self.held_out("validation", step.task)]
        elif step.kind == "measure":
            parts += [self.held_out("score", task) for task in ([step.task] if step.task else tasks)]
            parts += [self.held_out("validation", task) for task in ([] if step.task else tasks)]
        return None if None in parts else sum(part for part in parts if part is not None)


def _round(step: Step) -> int:
    return int(step.model.removeprefix("round "))


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(seconds for seconds, _ in pairs) / max(sum(count for _, count in pairs), 1)


def seconds_left(
    pending: Sequence[Step], tasks: Sequence[str], speed: Speed, *, reused: bool, spent: float
) -> float | None:
    """Seconds for all pending steps, of the first of which `spent` are over; None while a part's speed is unknown.

    `reused`: there is one round, and what trained the experts is the round, so that training it takes no time.
    """
    left: list[float] = []
    at_once = {"merge": 1} | dict.fromkeys(("train", "measure"), min(speed.plan.get("at_once", 1), len(tasks)))
    for step in pending:
        found = 0.0 if reused and step.kind == "train" and step.model == "round 1" else speed.step(step, tasks)
        if found is None:
            return None
        left.append(found / at_once[step.kind])
    return max(left[0] - spent, 0.0) + sum(left[1:]) if left else 0.0
