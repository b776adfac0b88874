"""One task of a recipe: where its examples are, which of them are taken, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

# beyond 2⁵³ a float, and many a reader of JSON, has no whole numbers of its own any more
Count = Annotated[int, Field(ge=1, le=2**53)]
# (key, message) of settings that are fine alone but not together
Problems: TypeAlias = list[tuple[str, str]]
# the `data` of a task whose examples stay where they are (rounds by hand)
ELSEWHERE = "elsewhere"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Value: TypeAlias = str | int | float | bool | None


def _value_or_values(value: object) -> object:
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or not all(isinstance(one, str | int | float | None) for one in listed):
        raise PydanticCustomError("where", "give the value that rows must have, or a list of such values")
    return value


# column name: the value, or one of the values, that its rows have
Where: TypeAlias = dict[str, Annotated[Value | tuple[Value, ...], BeforeValidator(_value_or_values)]]


class SourceSpec(Section):
    """Where some of a split's examples are, and which of them are taken."""

    data: str = Field(min_length=1, description="Hub id, folder, or json/jsonl/csv/tsv/parquet file")
    subset: str | None = Field(None, description="configuration name of a Hub data set")
    split: str | None = Field(None, description="split of a Hub data set or folder; the one it is for when not given")
    where: Where | None = Field(None, description="column: value, or a list of values; meta.label reaches into objects")
    examples: Count | None = Field(None, description="at most so many rows, drawn by the seed")
    columns: dict[str, str] | None = Field(None, description="as the task's `columns`, for this source")
    shuffle_completions: bool = Field(
        False, description="completions change places by the seed: noise that looks like the task"
    )

    @property
    def label(self) -> str:
        """What splits.json and errors call this source."""
        more = [part for part in (self.subset, self.split) if part is not None]
        return f"{self.data} ({', '.join(more)})" if more else self.data


def _form_of_sources(value: object) -> str:
    if isinstance(value, dict | SourceSpec):
        return "one"
    return "several" if isinstance(value, list | tuple) else "path"


# a path or Hub id, a source, or several, of which the rows follow each other
Sources: TypeAlias = Annotated[
    Annotated[str, Tag("path")]
    | Annotated[SourceSpec, Tag("one")]
    | Annotated[tuple[SourceSpec, ...], Field(min_length=1), Tag("several")],
    Discriminator(_form_of_sources),
]


class TaskSpec(Section):
    """One task: where its examples are, how they are read, and what is measured on them."""

    data: str | None = Field(
        None, description="Hub id, folder, json/jsonl/csv/tsv/parquet file, demo:<family>, elsewhere (any_trainer.md)"
    )
    train: Sources | None = Field(None, description="training examples: a path or Hub id, a source, or several")
    validation: Sources | None = Field(None, description="as `train`; cut from the training data when not given")
    test: Sources | None = Field(None, description="as `train`; cut from the training data when not given")
    subset: str | None = Field(None, description="configuration name of a Hub data set")
    where: Where = Field(default_factory=dict, description="which rows are taken, of sources that do not say it")
    overlong: Literal["truncate", "drop"] = Field(
        "truncate", description="what becomes of examples over max_length tokens"
    )
    metric: str = Field("exact_match", description="see `manyshot validate` for the list")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: the name in the file; messages.1.content reaches in"
    )
    template: str | None = Field(
        None,
        pattern=r"\{[A-Za-z_][\w.-]*\}",
        description="the prompt's text, with {column} for a column: 'Question: {prompt}\\nAnswer: '",
    )
    format: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: strings become user and assistant turns of the chat template; plain: as they are"
    )
    expert: str | None = Field(
        None, description="a model folder or PEFT adapter that exists already: it is this task's expert of round 1"
    )
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="overrides local_update.max_length for this task"
    )
    system_prompt: str | None = Field(None, description="system turn of every example that has none")
    max_new_tokens: Count | None = Field(None, description="overrides evaluation.max_new_tokens for this task")
    rank: Count | None = Field(None, description="overrides local_update.rank for this task")
    alpha: float | None = Field(None, gt=0, description="overrides local_update.alpha for this task")
    steps_share: float = Field(
        1.0, gt=0, le=1, description="part of protocol.local_steps that this task takes, at least one a round"
    )
    loss_scale: float = Field(1.0, gt=0, description="multiplies the task's losses, in training and on validation")

    @model_validator(mode="after")
    def _has_data(self) -> TaskSpec:
        if (self.data is None) == (self.train is None):
            raise PydanticCustomError("task_data", "give either 'data' or 'train' (with 'validation' and 'test')")
        return self

    @property
    def notes(self) -> list[str]:
        """What reports say of a task that is not trained or counted as the others are."""
        notes = [f"takes {self.steps_share:g} of the local steps"] if self.steps_share != 1 else []
        return notes + ([f"its losses are multiplied by {self.loss_scale:g}"] if self.loss_scale != 1 else [])

    def sources(self, split: str) -> tuple[SourceSpec, ...]:
        """The sources of a split that has its own; what they do not say, the task says."""
        given: str | SourceSpec | tuple[SourceSpec, ...] | None = getattr(self, split)
        if isinstance(given, str):
            given = SourceSpec(data=given, subset=self.subset)
        listed = given if isinstance(given, tuple) else (given,) if given else ()
        return tuple(
            source.model_copy(
                update={
                    "where": self.where if source.where is None else source.where,
                    "columns": self.columns if source.columns is None else source.columns,
                }
            )
            for source in listed
        )
