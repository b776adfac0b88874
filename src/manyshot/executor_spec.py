"""The section `executor` of a recipe: where the tasks of a round train and are measured. It decides no results."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from manyshot.task_spec import Count, Section

Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class LocalExecution(Section):
    """On this machine: one task after the other, or several at once, each in a process of its own."""

    name: Literal["local"] = Field("local", description="on this machine")
    workers: Count = Field(1, description="tasks at once; more than 1: in processes, pinned to cores and GPUs")
    threads: Count | None = Field(
        None, description="threads of a task, which decide last bits; its part of torch's own number when not given"
    )
    devices: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="numbers of the GPUs that workers take turns at; all there are when empty"
    )
    max_retries: int = Field(3, ge=0, description="how often a task is done again whose process was killed")


class RayExecution(Section):
    """On a Ray cluster: every local update and every evaluation is a Ray task (manyshot[ray])."""

    name: Literal["ray"] = Field(description="on a Ray cluster, whose nodes share the run folder")
    address: str | None = Field(
        None, min_length=1, description="host:port of a cluster, or auto; one is started for the run when not given"
    )
    num_cpus: Amount = Field(1, description="cores of a task")
    num_gpus: Amount = Field(0, description="GPUs of a task; with 0 it sees none")
    memory: Positive | None = Field(None, description="bytes of memory of a task, such as 8.0e9")
    resources: dict[str, Positive] = Field(default_factory=dict, description="a task's share of resources of your own")
    threads: Count | None = Field(
        None, description="threads of a task, which decide last bits; as many as num_cpus when not given"
    )
    max_retries: int = Field(3, ge=0, description="how often a task is done again whose process or node was lost")


EXECUTORS: dict[str, type[Section]] = {"local": LocalExecution, "ray": RayExecution}


def _from_name(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "local"} | value if isinstance(value, dict) else value


# by its name alone, or with settings
ExecutorChoice: TypeAlias = Annotated[
    LocalExecution | RayExecution, Field(discriminator="name"), BeforeValidator(_from_name)
]
