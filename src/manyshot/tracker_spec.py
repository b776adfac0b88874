"""The section `trackers` of a recipe: where a run's curves are sent. It decides nothing of the results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manyshot.task_spec import Section

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Label = Annotated[str, Field(min_length=1, max_length=100)]


class Trackers(Section):
    """Off unless named. Accounts, servers and folders are the trackers' own settings, in the environment."""

    names: tuple[TrackerName, ...] = Field((), description="tensorboard, wandb, trackio, mlflow; off when empty")
    project: Label = Field("manyshot", description="project, or experiment, that the run is shown in")
    group: Label | None = Field(
        None, description="what all parts of the run are shown under; the run's own when not given"
    )
    tags: tuple[Label, ...] = Field((), description="words that the run can be found by")
