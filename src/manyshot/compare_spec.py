"""What a comparison's recipe holds, and what follows from it; compare_recipe.py checks that it fits together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manyshot.benchmark_spec import Benchmark, Benchmarks, Harness
from manyshot.compare_methods import Candidate, Method, Name, choose, combinations
from manyshot.operators import Mean
from manyshot.presets import PRESET_HELP, PresetName
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, Recipe, Section, TaskSpec

Seed = Annotated[int, Field(ge=0)]
Criterion = Literal["multi_task_loss", "share", "worst_share"]


class TaskSet(Section):
    """Which tasks are merged together, and with which seeds."""

    tasks: tuple[str, ...] = Field(min_length=2, description="names of tasks, in merging order")
    seeds: tuple[Seed, ...] | None = Field(None, description="overrides the recipe's seeds for this set")
    against: str | None = Field(
        None, description="another task set: a table says what this one costs the tasks that both have"
    )


class Tuning(Section):
    """Where the grids are searched, and by what: a number of the final merged model on the validation splits."""

    seeds: tuple[Seed, ...] | None = Field(None, min_length=1, description="the first seed when not given")
    task_set: str | None = Field(None, description="the first one when not given; its choice holds for all")
    choose_by: Criterion = Field(
        "multi_task_loss",
        description="multi_task_loss, or what is kept of the experts' gain: share, over tasks; worst_share, of one",
    )
    equal_budgets: bool = Field(True, description="refuse grids of unlike sizes")


class CompareSpec(Section):
    """Everything a comparison depends on."""

    models: dict[Name, str] = Field(min_length=1, description="backbones: a name for the tables, and a model")
    preset: PresetName | None = Field(None, exclude=True, description=f"{PRESET_HELP}; of methods that name none")
    trust_remote_code: bool = Field(
        False, description="run Python code that came with the model; only where --trust-remote-code says so too"
    )
    tasks: dict[Name, TaskSpec] = Field(min_length=2, description="as in a recipe; the task sets choose among them")
    task_sets: dict[Name, TaskSet] = Field(default_factory=dict, description="the first is the main one; default: all")
    categories: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="tasks of a table's column")
    retention: dict[Name, TaskSpec] = Field(default_factory=dict, description="scored, never trained")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="every cell is run once with each")
    protocol: Protocol = Protocol()
    merge: Merge = Merge()
    local_update: LocalUpdate = LocalUpdate()
    evaluation: Evaluation = Evaluation()
    benchmarks: Benchmarks = Field(default_factory=dict, description="what tasks are scored by: a preset, or a list")
    harness: Harness = Harness()
    methods: dict[Name, Method] = Field(min_length=1, description="the rows of the tables, each by its name")
    baseline: str | None = Field(
        None, description="the method that the shares of others are paired with, in rounds; the first mean if not given"
    )
    tuning: Tuning = Tuning()

    @property
    def sets(self) -> dict[str, TaskSet]:
        """The task sets by name; without any, one of all tasks."""
        return self.task_sets or {"all": TaskSet(tasks=tuple(self.tasks))}

    @property
    def main_set(self) -> str:
        return next(iter(self.sets))

    def seeds_of(self, task_set: str) -> tuple[int, ...]:
        own = self.sets[task_set].seeds
        return self.seeds if own is None else own

    @property
    def tuning_set(self) -> str:
        return self.tuning.task_set or self.main_set

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        return self.tuning.seeds or self.seeds_of(self.tuning_set)[:1]

    def scored(self, task_set: str) -> dict[str, str]:
        """What is scored in a task set, and its task: a task's benchmarks; its own test split where it has none."""
        found: dict[str, str] = {}
        for task in self.sets[task_set].tasks:
            own = [name for name, one in self.benchmarks.items() if one.task == task]
            found |= dict.fromkeys(own or [task], task)
        return found

    def asked(self, task_set: str) -> dict[str, Benchmark]:
        """The benchmarks of a task set's tasks, and those of retention."""
        tasks = (*self.sets[task_set].tasks, None)
        return {name: one for name, one in self.benchmarks.items() if one.task in tasks}

    @property
    def kept(self) -> list[str]:
        """What is scored and never trained: tasks, then benchmarks."""
        return [*self.retention, *(name for name, one in self.benchmarks.items() if one.task is None)]

    def label(self, method: str) -> str:
        return self.methods[method].label or method

    def protocols(self, method: str) -> tuple[str, ...]:
        return ("joint",) if self.methods[method].joint else self.methods[method].protocols

    @property
    def paired_with(self) -> str | None:
        """The method whose many-shot cells the shares of all others are paired with."""
        means = (name for name, one in self.methods.items() if one.operator is not None and one.operator.name == "mean")
        return self.baseline or next((name for name in means if "many_shot" in self.protocols(name)), None)

    @property
    def shared(self) -> Candidate:
        """What the experts are trained with that every cell is divided by."""
        return Candidate(Mean(), self.merge, self.local_update, self.protocol)

    def own(self, method: str) -> Candidate:
        """A method before its grid: what it does not say itself, the one says that it is an ablation of, or the recipe.

        Joint fine-tuning, which merges nothing, has the mean's place.
        """
        spec = self.methods[method]
        base = self.own(spec.ablation_of) if spec.ablation_of else self.shared
        return Candidate(
            spec.operator or base.operator,
            spec.merge or base.merge,
            spec.local_update or base.local_update,
            spec.protocol or base.protocol,
        )

    def candidates(self, method: str) -> list[Candidate]:
        """What a method may come to by its grid, in order; the method itself where it has no grid."""
        own = self.own(method)
        return [choose(own, chosen) for chosen in combinations(self.methods[method].grid)]

    def ablated(self, method: str, full: Candidate) -> Candidate:
        """An ablation of what another method came to: with the sections that it says itself, and `set` changed."""
        spec = self.methods[method]
        own = Candidate(
            full.operator,
            spec.merge or full.merge,
            spec.local_update or full.local_update,
            spec.protocol or full.protocol,
        )
        return choose(own, spec.set)

    def possible(self, method: str) -> list[Candidate]:
        """Everything that a method, or for an ablation the method that it is one of, may come to."""
        full = self.methods[method].ablation_of
        return [self.ablated(method, one) for one in self.candidates(full)] if full else self.candidates(method)

    def run_recipe(self, model: str, tasks: tuple[str, ...], seed: int, candidate: Candidate, shot: str) -> Recipe:
        """The run of one cell; once (post_hoc), how rounds go does not matter."""
        steps = candidate.protocol.local_steps
        return Recipe(
            model=self.models[model],
            trust_remote_code=self.trust_remote_code,
            tasks={name: self.tasks[name] for name in tasks},
            protocol=Protocol(rounds=1, local_steps=steps) if shot == "post_hoc" else candidate.protocol,
            operator=candidate.operator,
            merge=candidate.merge.once() if shot == "post_hoc" else candidate.merge,
            local_update=candidate.local_update,
            evaluation=self.evaluation.model_copy(update={"experts": False, "post_hoc": False}),
            seed=seed,
        )
