"""The section `keep` of a recipe: what a run leaves of its rounds on disk. It decides nothing of the results."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from manyshot.task_spec import Section


class Keep(Section):
    """What a later step needs is never removed before that step is done; removed.json says what was."""

    adapters: Literal["all", "last", "none"] = Field(
        "all", description="experts of rounds, with optimizers' states; none: nor those in experts/, once measured"
    )
    merged: Literal["all", "last"] = Field(
        "all", description="merged/ of rounds; last: of the last one, and export makes the others again"
    )
