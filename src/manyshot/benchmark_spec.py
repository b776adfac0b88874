"""The benchmarks of a comparison: what every cell is asked through the harness, and whose expert that is divided by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from manyshot.errors import suggestion
from manyshot.harness_presets import PRESETS, RETENTION, PresetTask
from manyshot.recipe import TASK_NAME, Count, Problems, Section


class Benchmark(Section):
    """A task of lm-evaluation-harness, or a data file asked as one."""

    harness: str | None = Field(None, min_length=1, description="the harness' name for it; its own when not given")
    data: str | None = Field(None, min_length=1, description="or a file of yours: rows as in docs/eval.md")
    metric: str | None = Field(
        None, min_length=1, description="name,filter of the harness; ',none' may be left out; a file has a default"
    )
    few_shot: int | None = Field(None, ge=0, description="examples shown; as the task says when not given")
    task: str | None = Field(None, description="whose expert its score is divided by; without one it is retention")

    @model_validator(mode="after")
    def _says_what_is_asked(self) -> Benchmark:
        if self.harness is not None and self.data is not None:
            raise PydanticCustomError("benchmark", "give 'harness' or 'data', not both")
        if self.data is None and self.metric is None:
            raise PydanticCustomError("benchmark", "needs 'metric', such as 'acc' or 'exact_match,strict-match'")
        return self


class Harness(Section):
    """How all benchmarks are asked; what `manyshot eval` has flags for."""

    chat_template: bool = Field(False, description="prompts, and examples shown, as turns of the tokenizer's template")
    limit: Count | None = Field(None, description="the first so many examples of each: to try out, not to report")
    batch_size: Count = Field(8, description="examples at once; the same for every model that is compared")
    max_new_tokens: Count | None = Field(None, description="for tasks that generate; the task's own when not given")


def _expanded(value: object, info: ValidationInfo) -> object:
    """`preset: metis` is the benchmarks that it stands for; those beside it are added, or take a place of its own."""
    if not isinstance(value, dict) or "preset" not in value:
        return value
    name = value["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        text = f"unknown preset '{name}'{suggestion(str(name), PRESETS)}"
        raise PydanticCustomError("preset", "{text}", {"text": text})
    tasks = info.data.get("tasks")
    if tasks is not None:
        _need_categories(name, PRESETS[name], tasks)
    own = {key: one for key, one in value.items() if key != "preset"}
    return {one.name: _of_preset(one) for one in PRESETS[name]} | own


def _need_categories(name: str, preset: tuple[PresetTask, ...], tasks: Collection[str]) -> None:
    """Raises PydanticCustomError for a category that no task is called by."""
    for category in dict.fromkeys(one.category for one in preset):
        if category not in tasks and category != RETENTION:
            members = ", ".join(one.name for one in preset if one.category == category)
            text = (
                f"preset '{name}' divides {members} by the expert of the task '{category}', and there is no task of "
                f"that name; there are: {', '.join(tasks)}; name that task so, or list the benchmarks one by one"
            )
            raise PydanticCustomError("preset", "{text}", {"text": text})


def _of_preset(one: PresetTask) -> dict[str, Any]:
    task = None if one.category == RETENTION else one.category
    return {"harness": one.task, "metric": one.metric.removesuffix(",none"), "few_shot": one.num_fewshot, "task": task}


Benchmarks = Annotated[
    dict[Annotated[str, Field(pattern=TASK_NAME, max_length=64)], Benchmark], BeforeValidator(_expanded)
]


def benchmark_problems(
    benchmarks: Mapping[str, Benchmark], tasks: Mapping[str, object], retention: Mapping[str, object]
) -> Problems:
    """Benchmarks of a task that is not there, or with a name that would stand for two things."""
    found: Problems = []
    for name, one in benchmarks.items():
        if one.task is not None and one.task not in tasks:
            found.append((f"benchmarks.{name}.task", f"there is no '{one.task}'; there are: {', '.join(tasks)}"))
        elif name in retention or (name in tasks and one.task != name):
            found.append((f"benchmarks.{name}", "is the name of a task, which is another thing; rename the benchmark"))
    return found
