"""What a report speaks of, as plain data: models, rounds, examples, costs. Everything else of a report is made of this.

T tasks by name, in order. None is a number that is not known or not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from manyshot.compare_gain import shares
from manyshot.normalize import ratio, summary

Numbers = dict[str, float | None]
# what a model is to the others of its chart: its colour, dash and marker
Role = Literal["merged", "post_hoc", "pretrained", "experts", "other"]

# of a normal distribution, 95 % lie within so many standard deviations
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Score:
    """A mean over test examples or seeds. `low` and `high` say how far off it may be; the block says in what sense."""

    metric: str
    score: float | None
    stderr: float | None
    num_examples: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Shares:
    """What a model has of the experts, per task; average, worst task, and the drop between them.

    `error` is the standard error of average and worst over seeds, where there are several.
    """

    tasks: Numbers
    average: float | None
    worst: float | None
    worst_task: str | None
    drop: float | None
    average_error: float | None = None
    worst_error: float | None = None


@dataclass(frozen=True)
class Model:
    """One measured model. `normalized` is its scores over the experts', `gain` what it keeps of their gain in loss."""

    label: str
    role: Role
    losses: Numbers
    scores: dict[str, Score]
    normalized: Shares | None = None
    gain: Shares | None = None
    # of every test example, in order
    example_scores: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    @property
    def multi_task_loss(self) -> float | None:
        """E(Θ) = (1/T) Σ_τ L_τ(Θ); None unless all are known."""
        found = [loss for loss in self.losses.values() if loss is not None]
        return math.fsum(found) / len(found) if found and len(found) == len(self.losses) else None


@dataclass(frozen=True)
class Round:
    """What one round recorded. `kept_by_layer` is the mean over the tensors of a layer.

    `steps` by task; `scaling` was chosen among the (scaling, what was minimised) of `search`; `outer_step` is the
    recipe's; `notes` say what else happened, such as a task that was left out.
    """

    index: int
    weights: Numbers
    loss_gaps: Numbers
    expert_losses: Numbers
    drift: Numbers
    cosines: dict[str, Numbers]
    kept_share: float | None
    kept_by_layer: Numbers
    distance: float | None
    steps: Numbers = field(default_factory=dict)
    effective_tasks: float | None = None
    update_norm: float | None = None
    scaling: float | None = None
    search: list[tuple[float, float]] = field(default_factory=list)
    outer_step: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A model that was merged, and how it came about: `path` is (round, model after it), from the pretrained model on.

    `detailed` subjects have their rounds shown one by one. Losses of `path` are of the validation split. `once` names
    the subject that is the same merged once; what `merges` nothing was fine-tuned jointly.
    """

    model: Model
    path: list[tuple[int, Model]]
    rounds: list[Round]
    detailed: bool = True
    once: str | None = None
    merges: bool = True

    @property
    def name(self) -> str:
        return self.model.label


@dataclass(frozen=True)
class Block:
    """Models that can be compared: the same tasks. `spread` says what the error bars of scores are.

    `scored` names what there are scores of: the tasks, or their benchmarks. `expert_losses` are of the validation
    split, as the losses after every round are. `main` names the subject to speak of; without one, it is the best.
    """

    title: str
    tasks: list[str]
    scored: list[str]
    references: list[Model]
    subjects: list[Subject]
    expert_losses: Numbers
    spread: str
    main: str | None = None
    loss_split: str = "validation"

    def reference(self, role: Role) -> Model | None:
        return next((model for model in self.references if model.role == role), None)

    def subject(self, name: str | None) -> Subject | None:
        return next((subject for subject in self.subjects if subject.name == name), None)

    @property
    def best(self) -> Subject | None:
        """What to speak of: the run's merged model; of several, that with the best average, or the lowest loss."""
        if self.main is not None:
            return self.subject(self.main)
        merged = [subject for subject in self.subjects if subject.merges]
        averages = {s.name: s.model.normalized.average for s in merged if s.model.normalized}
        known = {name: average for name, average in averages.items() if average is not None}
        if merged and len(known) == len(merged):  # else nothing but losses is there for all
            return max(merged, key=lambda subject: known[subject.name])
        losses = {s.name: loss for s in merged if (loss := s.model.multi_task_loss) is not None}
        return min(merged, key=lambda subject: losses.get(subject.name, math.inf), default=None)


@dataclass(frozen=True)
class Answer:
    model: str
    role: Role
    text: str
    score: float | None


@dataclass(frozen=True)
class Example:
    """A test example: messages as (role, text), what the data answers, what models answer."""

    row: int | None
    prompt: list[tuple[str, str]]
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Finding:
    """Something a guard found in a round (0: the post-hoc merge)."""

    round: int | None
    tasks: list[str]
    message: str
    suggestions: list[str]


@dataclass(frozen=True)
class Phase:
    """All that was done of one kind. Tokens only where something was trained; memory is the most that was held."""

    name: str
    seconds: float
    count: int
    tokens: int | None
    memory: int | None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Problem:
    """A file that should be there and is not, or that cannot be used."""

    file: str
    message: str


@dataclass(frozen=True)
class Details:
    """What is told of one run (or comparison) alone; `stopped` says where it stands if it is not finished."""

    name: str
    stopped: str | None
    rounds: int
    operator: str
    base_model: str
    seeds: list[int]
    command: str
    recipe: str
    versions: dict[str, str]
    machine: dict[str, str]
    # section of the recipe -> its settings in a line
    settings: dict[str, str] = field(default_factory=dict)
    wall: float | None = None
    phases: list[Phase] = field(default_factory=list)
    disk: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    guarded: bool = False
    examples: dict[str, list[Example]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number of a JSON file; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    found = float(value) if abs(value) < 1e300 else math.inf
    return found if math.isfinite(found) else None


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


def numbers(value: object, names: Sequence[str]) -> Numbers:
    """The numbers of a JSON object under these names."""
    found = mapping(value)
    return {name: number(found.get(name)) for name in names}


def example_score(record: object) -> Score | None:
    """A score of scores.json with its 95 % interval over test examples; None for what is none."""
    found = mapping(record)
    score, count = number(found.get("score")), number(found.get("num_examples"))
    if "score" not in found:
        return None
    stderr, size = number(found.get("stderr")), int(count or 0)
    low, high = interval(score, stderr, size)
    return Score(str(found.get("metric") or ""), score, stderr, size, low, high)


def interval(score: float | None, stderr: float | None, count: int) -> tuple[float | None, float | None]:
    """Where the mean over all possible test examples lies, with 95 % confidence, for scores in 0 … 1.

    Wilson's interval where every score is 0 or 1: a mean of 0 of 48 is then not certain, though its standard error is
    0. No scores in 0 … 1 spread more than those, with s² = n p (1 − p) / (n − 1), which is how they are recognised.
    Otherwise p ± 1.96 s / √n.
    """
    if score is None or count < 2 or stderr is None:
        return None, None
    most = score * (1 - score) / (count - 1)
    if 0 <= score <= 1 and stderr**2 >= most * (1 - 1e-6):
        z2 = NORMAL_95**2 / count
        centre = (score + z2 / 2) / (1 + z2)
        half = NORMAL_95 / (1 + z2) * math.sqrt(score * (1 - score) / count + z2 / (4 * count))
        return max(0.0, centre - half), min(1.0, centre + half)
    return max(0.0, score - NORMAL_95 * stderr), min(1.0, score + NORMAL_95 * stderr)


def beside_experts(model: Model, pretrained: Model | None, experts: Model | None) -> Model:
    """The model with what it has of the experts' scores, and of their gain in loss, where there are experts."""
    if experts is None:
        return model
    ratios: Numbers = {}
    for task, expert in experts.scores.items():
        score = model.scores[task].score if task in model.scores else None
        known = score is not None and expert.score is not None
        ratios[task] = ratio(score, expert.score) if known else None  # type: ignore[arg-type]
    gain = None
    if pretrained is not None and model.role != "pretrained":
        gain = Shares(**shares(pretrained.losses, _all(model.losses, pretrained), _all(experts.losses, pretrained)))
    return Model(
        model.label, model.role, model.losses, model.scores, Shares(**summary(ratios)), gain, model.example_scores
    )


def _all(losses: Numbers, model: Model) -> Numbers:
    return {task: losses.get(task) for task in model.losses}
