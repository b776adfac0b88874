"""The recipe: one strict, frozen YAML file. Every default is stated here, in task_spec.py or training_spec.py, once.

Unknown keys fail with a suggestion, the file and the line, and all errors come at once (see recipe_file.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from manyshot.executor_spec import ExecutorChoice, LocalExecution
from manyshot.keep_spec import Keep
from manyshot.operator_choice import OperatorChoice, WithOperator, override_problems
from manyshot.operators import MatrixOperator, Metis
from manyshot.presets import WithPreset
from manyshot.task_spec import Count, Problems, Section, SourceSpec, TaskSpec
from manyshot.tracker_spec import Trackers
from manyshot.training_spec import LocalUpdate, Protocol

# the parts of a recipe that are declared elsewhere are found here too
__all__ = [
    "Count",
    "Evaluation",
    "LocalUpdate",
    "Merge",
    "Problems",
    "Protocol",
    "Recipe",
    "Section",
    "SourceSpec",
    "TaskSpec",
]

TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
# folders of a run that a task of the same name would collide with
RESERVED_TASK_NAMES = ("merged", "carried_adapter")
RESERVED_TASK_ENDINGS = (".partial", ".json", ".safetensors")

Positive = Annotated[float, Field(gt=0)]


# settings of the momentum that sgd and nesterov have
MOMENTUM = ("outer_momentum", "outer_momentum_schedule", "outer_look_ahead")


class Merge(Section):
    """Where and against what task vectors are merged."""

    space: Literal["weights", "factors"] = Field(
        "weights", description="weights: exact ΔW of every adapter; factors: A and B themselves (the released script)"
    )
    reference: Literal["pretrained", "start"] = Field(
        "pretrained", description="pretrained: v = θ − Θ⁰ (the paper); start: v = θ − Θʳ⁻¹ (ATM)"
    )
    outer_optimizer: Literal["sgd", "nesterov", "adam"] = Field(
        "sgd", description="with reference: start, what makes a step of the merged update (outer.py)"
    )
    outer_step_size: Positive | tuple[Positive, ...] = Field(
        1.0, description="with reference: start, multiplies the merged update; one value, or one per round"
    )
    outer_momentum: float = Field(
        0.0, ge=0, lt=1, description="with reference: start, how much of the round before's step is taken again"
    )
    outer_momentum_schedule: Literal["constant", "ramp"] = Field(
        "constant", description="ramp: round r has at most (r − 1)/(r + 2) of it, as in Nesterov's own method"
    )
    outer_look_ahead: Literal["always", "between_rounds"] = Field(
        "always", description="nesterov, between_rounds: the last round, which no round follows, takes its plain step"
    )
    outer_beta1: float = Field(0.9, ge=0, lt=1, description="adam: share of the mean update that is kept")
    outer_beta2: float = Field(0.99, ge=0, lt=1, description="adam: share of the mean square that is kept")
    outer_epsilon: Positive = Field(1e-5, description="adam: entries whose updates are well below it keep their ratios")
    search_objective: Literal["average", "worst"] = Field(
        "average", description="with scaling: auto, what is minimised: the mean over tasks, or (softly) the worst task"
    )
    on_regression: Literal["warn", "stop", "rollback"] = Field(
        "warn", description="when a round's multi-task loss rises: say so, end the run, or keep the model it began with"
    )
    regression_tolerance: float = Field(
        0.02, ge=0, description="with stop or rollback, the share by which that loss may rise"
    )
    output_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the merged model's float tensors; as in the base when not given"
    )

    def momentum_of(self, round_index: int) -> float:
        """μ of a round, counted from where momentum began (1: the first).

        The ramp is that of Nesterov's method for convex functions (1983; Su, Boyd and Candès 2014, arXiv 1503.01243):
        while there is hardly a direction that rounds have agreed on, hardly anything is taken again.
        """
        ramp = (round_index - 1) / (round_index + 2)
        return self.outer_momentum if self.outer_momentum_schedule == "constant" else min(self.outer_momentum, ramp)

    def looks_ahead(self, *, last: bool) -> bool:
        """Whether a round's model lies ahead of where the run has come to, for a next round to begin with."""
        return not (last and self.outer_look_ahead == "between_rounds")

    def once(self) -> Merge:
        """The same for a merge that none comes before or after: nesterov's step ahead is for rounds that follow."""
        plain = {key: type(self).model_fields[key].default for key in ("outer_optimizer", *MOMENTUM)}
        return self.model_copy(update=plain) if self.outer_optimizer == "nesterov" else self


class Evaluation(Section):
    """What is measured, and on how much."""

    experts: bool = Field(True, description="train each task alone with the same total steps, for normalized scores")
    post_hoc: bool = Field(False, description="also merge those experts once with the same operator, and score it")
    validation_examples: Count = Field(100, description="at most so many a task, for losses, gaps and line searches")
    test_examples: Count = Field(200, description="at most so many a task, for scores")
    max_new_tokens: Count = Field(64, description="tokens of a generated answer, where the metric needs one")
    batch_size: Count = Field(32, description="examples at once; the same for every model that is compared")
    loss_on: Literal["completion", "whole_text"] = Field(
        "completion", description="which tokens validation and test losses count"
    )


class Recipe(WithOperator, WithPreset):
    """Everything a run depends on."""

    model: str = Field(description="Hub id, local folder, .gguf file, or demo:smollm2-135m-instruct")
    trust_remote_code: bool = Field(
        False, description="run Python code that came with the model; only where --trust-remote-code says so too"
    )
    tasks: dict[Annotated[str, Field(pattern=TASK_NAME, max_length=64)], TaskSpec] = Field(
        min_length=1, description="two tasks or more, each by its name"
    )
    protocol: Protocol = Protocol()
    operator: OperatorChoice = Field(
        Metis(), description="its name alone, or with settings: {name: ties, density: 0.1}"
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="other operator settings by tensor name pattern; the last that fits wins"
    )
    merge: Merge = Merge()
    local_update: LocalUpdate = LocalUpdate()
    evaluation: Evaluation = Evaluation()
    trackers: Trackers = Trackers()
    executor: ExecutorChoice = Field(
        LocalExecution(), description="where tasks train and are measured: its name alone, or with settings"
    )
    keep: Keep = Keep()
    seed: int = Field(0, ge=0, description="draws splits, orders, adapters and random masks")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        refuse_together(cross_problems(self))
        return self

    def rank_of(self, task: str) -> int:
        """The task's own rank, or everyone's, as for joint fine-tuning on several."""
        return (self.tasks[task].rank if task in self.tasks else None) or self.local_update.rank

    def max_length_of(self, task: str) -> int:
        return (self.tasks[task].max_length if task in self.tasks else None) or self.local_update.max_length

    def protocol_of(self, task: str) -> Protocol:
        """The protocol as the task takes part in it (`steps_share`)."""
        return self.protocol.share(self.tasks[task].steps_share) if task in self.tasks else self.protocol

    def on_device(self, device: str) -> Recipe:
        """The recipe, computing elsewhere."""
        return self.model_copy(update={"local_update": self.local_update.model_copy(update={"device": device})})

    def alpha_of(self, task: str) -> float:
        return (self.tasks[task].alpha if task in self.tasks else None) or self.local_update.alpha


def refuse_together(problems: Problems) -> None:
    """Raise settings that are fine alone but not together as one error, which recipe_file.py takes apart by key."""
    if problems:
        text = "; ".join(f"{key}: {message}" for key, message in problems)
        raise PydanticCustomError("cross", "{text}", {"text": text, "problems": problems})


# whose state is, for each parameter, two moments and a step count
KEPT_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")


def cross_problems(recipe: Recipe) -> Problems:
    """(key, message) for settings that are fine alone but not together."""
    num_tasks, rounds = len(recipe.tasks), recipe.protocol.rounds
    found = [(f"operator.{key}", text) for key, text in recipe.method.problems(num_tasks, rounds)]
    found += override_problems(recipe.method, recipe.overrides, num_tasks, rounds)
    found += _merge_problems(recipe)
    if num_tasks == 1:
        found.append(("tasks", "only one task; merging needs at least two"))
    for name in recipe.tasks:
        if name.lower() in RESERVED_TASK_NAMES or name.endswith(RESERVED_TASK_ENDINGS):
            found.append((f"tasks.{name}", "this name is taken by a file or folder of the run"))
    working = [("line_search", recipe.method.searches_scaling), ("proposed", recipe.merge.on_regression == "rollback")]
    for name, used in working:
        if used and name in recipe.tasks:
            found.append((f"tasks.{name}", "this name is taken by a folder that rounds of this recipe work in"))
    found += _training_problems(recipe)
    if recipe.evaluation.post_hoc and not recipe.evaluation.experts:
        found.append(("evaluation.post_hoc", "needs evaluation.experts: true, since it merges those experts"))
    return found


def _training_problems(recipe: Recipe) -> Problems:
    """Settings of the local updates, of tasks and of the protocol that exclude each other."""
    update, found = recipe.local_update, Problems()
    factors = recipe.merge.space == "factors"
    averaged = factors or update.adapter_start in ("averaged", "svd")
    carried = factors or update.adapter_start != "fresh"
    unlike = len({(recipe.rank_of(name), recipe.alpha_of(name)) for name in recipe.tasks}) > 1
    if unlike and averaged:
        text = "tasks differ in rank or alpha; that needs space: weights and adapter_start: fresh or own"
        found.append(("tasks", text))
    if update.method != "lora" and carried:
        text = f"{update.method} needs space: weights and adapter_start: fresh (it has no adapters of its own)"
        found.append(("local_update.method", text))
    if factors and update.adapter_start != "fresh":
        found.append(("local_update.adapter_start", "space: factors always goes on from the merged factors; use fresh"))
    if any(spec.expert for spec in recipe.tasks.values()) and carried:
        found.append(("tasks", "an expert that exists already needs space: weights and adapter_start: fresh"))
    found += _factor_problems(recipe, factors=factors)
    found += _optimizer_problems(recipe, goes_on=factors or update.adapter_start in ("averaged", "own"))
    return found + _allocation_problems(recipe)


def _factor_problems(recipe: Recipe, *, factors: bool) -> Problems:
    """Where one of the two factors of an adapter cannot stay as it is."""
    update, key = recipe.local_update, "local_update.train_factors"
    if update.train_factors == "both":
        return []
    if update.method == "full":
        return [(key, f"{update.train_factors} is for adapters; full trains all weights")]
    found = []
    if len({recipe.rank_of(name) for name in recipe.tasks}) > 1:
        found.append((key, f"{update.train_factors} keeps a factor that all tasks share; give them the same rank"))
    if update.train_factors == "b" and update.adapter_start == "svd":
        found.append((key, "b keeps A for the whole run, and adapter_start: svd makes another A in every round"))
    if update.train_factors == "alternate" and not (factors or update.adapter_start == "averaged"):
        found.append((key, "alternate trains A on a B that all tasks share, which needs adapter_start: averaged"))
    return found


def _optimizer_problems(recipe: Recipe, *, goes_on: bool) -> Problems:
    """Where the moments of a round's optimizer say nothing about the parameters of the next."""
    update, key = recipe.local_update, "local_update.optimizer_state"
    if update.optimizer_state == "restart":
        return []
    found = []
    same = update.method == "full" or goes_on or (update.train_factors == "b" and update.adapter_start == "fresh")
    if not same:
        text = f"kept needs parameters that mean the same in every round, and {update.adapter_start} makes another A"
        found.append((key, f"{text}; use adapter_start: own or averaged, or train_factors: b"))
    if any(spec.expert for spec in recipe.tasks.values()):
        found.append((key, "kept goes on from round 1, and an expert that exists already has no optimizer's state"))
    if (optimizer := update.trainer.get("optim", KEPT_OPTIMIZERS[0])) not in KEPT_OPTIMIZERS:
        found.append((key, f"kept is for {' and '.join(KEPT_OPTIMIZERS)}, not for trainer.optim: {optimizer}"))
    return found


def _allocation_problems(recipe: Recipe) -> Problems:
    """What steps that are known only round by round leave undecided."""
    if recipe.protocol.allocation == "even":
        return []
    found = []
    if recipe.local_update.schedule_scope == "run":
        text = "gap decides the steps round by round, and schedule_scope: run has to know them all; use round"
        found.append(("protocol.allocation", text))
    if own := [name for name, spec in recipe.tasks.items() if spec.steps_share != 1]:
        found.append((f"tasks.{own[0]}.steps_share", "protocol.allocation: gap decides the tasks' steps; leave it out"))
    return found


def _merge_problems(recipe: Recipe) -> Problems:
    """Settings of `merge` that exclude each other."""
    merge, found = recipe.merge, Problems()
    if merge.space == "factors" and merge.reference == "start":
        found.append(("merge.reference", "space: factors merges the adapters themselves; use reference: pretrained"))
    if merge.space == "factors" and isinstance(recipe.method, MatrixOperator):
        found.append(("operator.name", f"{recipe.method.name} merges whole weight matrices; use merge.space: weights"))
    found += outer_problems(merge, recipe.protocol.rounds)
    tolerance = merge.regression_tolerance
    if merge.on_regression == "warn" and tolerance != Merge.model_fields["regression_tolerance"].default:
        text = "is for on_regression: stop or rollback; the warning has thresholds of its own (docs/guards.md)"
        found.append(("merge.regression_tolerance", text))
    if recipe.method.searches_scaling and merge.space == "factors":
        found.append(("operator.scaling", "auto searches along a line of weights; it needs merge.space: weights"))
    if recipe.method.searches_scaling and merge.outer_optimizer == "adam":
        found.append(("operator.scaling", "auto has no effect on adam's step; choose merge.outer_step_size instead"))
    return found


def outer_problems(merge: Merge, rounds: int) -> Problems:
    """Settings of an outer optimizer that is not in use, that it does not have, or that do not fit the rounds."""
    found, steps = _outer_settings_problems(merge), merge.outer_step_size
    if isinstance(steps, tuple) and len(steps) != rounds:
        text = f"has {len(steps)} values for {rounds} rounds; give one, or one per round"
        found.append(("merge.outer_step_size", text))
    return found


def _outer_settings_problems(merge: Merge) -> Problems:
    adams = ("outer_beta1", "outer_beta2", "outer_epsilon")
    settings = ("outer_optimizer", "outer_step_size", *MOMENTUM, *adams)
    changed = [key for key in settings if getattr(merge, key) != Merge.model_fields[key].default]
    if merge.reference == "pretrained":
        return [(f"merge.{key}", "is part of the outer optimizer, which needs reference: start") for key in changed[:1]]
    if merge.outer_optimizer != "adam":
        found = [(f"merge.{key}", "is adam's; set merge.outer_optimizer: adam") for key in changed if key in adams]
        if merge.outer_optimizer == "nesterov" and not merge.outer_momentum:
            found.append(("merge.outer_momentum", "is 0, and nesterov is a form of momentum; give one, such as 0.7"))
        elif merge.outer_optimizer != "nesterov" and merge.outer_look_ahead != "always":
            found.append(("merge.outer_look_ahead", "is nesterov's; set merge.outer_optimizer: nesterov"))
        elif merge.outer_momentum_schedule != "constant" and not merge.outer_momentum:
            found.append(("merge.outer_momentum_schedule", "is of a momentum, and merge.outer_momentum is 0"))
        return found
    found = [(f"merge.{key}", "adam has outer_beta1 in its place") for key in changed if key in MOMENTUM]
    if "outer_step_size" not in changed:
        text = "with adam every weight moves by about this much in a round; 1 is far too large, give one such as 1e-4"
        found.append(("merge.outer_step_size", text))
    return found


def operator_warnings(recipe: Recipe) -> list[str]:
    """Operators that are allowed and still likely to disappoint with this many tasks, or in rounds.

    In rounds every task vector holds all that the rounds before changed, which a sum multiplies by β·T (METHOD).
    """
    num_tasks = len(recipe.tasks)
    operators = {"operator": recipe.method} | {f"overrides.{pattern}": made for pattern, made in recipe.plan.overrides}
    found = [f"{key}.{text}" for key, made in operators.items() for text in made.warnings(num_tasks)]
    method = recipe.method
    weighs = method.uses_loss_gaps and getattr(method, "gap", "absolute") != "none"
    if recipe.protocol.allocation == "gap" and recipe.protocol.rounds > 1 and not weighs:
        found.append(f"protocol.allocation: {method.name} takes no weights from loss gaps, so the steps stay even")
    if recipe.protocol.rounds == 1 or recipe.merge.reference == "start":
        return found
    factors = recipe.merge.space == "factors"
    for key, made in operators.items():
        growth = made.growth(num_tasks)
        if growth > 1 + 1e-9:
            product, most = ("scaling × tasks", 1 / num_tasks) if made.sums else ("scaling", 1.0)
            found.append(
                f"{key}.scaling: every task vector of a round holds all that earlier rounds changed, and {made.name} "
                f"multiplies that by {product} = {growth:.2g} > 1 in every round, so the model diverges; use a scaling "
                f"of at most {most:.3g}, or merge.reference: start"
                if not factors
                else f"{key}.scaling: the adapters of a round hold all that earlier rounds merged, in A and in B, and "
                f"{made.name} multiplies both by {product} = {growth:.2g} > 1 in every round, their product by "
                f"{growth**2:.2g}, so the model diverges; use a scaling of at most {most:.3g}, or merge.space: weights"
            )
    return found
