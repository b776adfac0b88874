"""What a run tells its trackers: one group, in it a parent run with what every merge gave, and a run per local update.

Each part has an id made of the run's id and its name, so that a resumed run goes on where it was. The run's id and how
far each tracker has been told are in trackers.json; where to, and with which account, is known to the trackers alone.
A tracker that cannot be started stops the run before its first step. One that fails later is said to, and left alone.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from manyshot.errors import MissingExtraError, TrackerError
from manyshot.progress import Event, Progress
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder, content_key, read_json, write_json
from manyshot.tracker_backends import BACKENDS, PARENT, Backend, Part, guarded
from manyshot.tracker_spec import Trackers

Say = Callable[[str], None]


def check_trackers(settings: Trackers) -> None:
    """Raises MissingExtraError naming every package that is asked for and not installed."""
    if missing := [name for name in settings.names if find_spec(name) is None]:
        raise MissingExtraError(
            f"trackers.names: {', '.join(missing)} not installed; run: pip install {' '.join(missing)}"
        )


@dataclass
class Tracking:
    """The trackers of one run."""

    parent: Part
    path: Path  # trackers.json
    rounds: RunFolder
    say: Say
    backends: dict[str, Backend]
    told: dict[str, int]  # rounds that a tracker has been told, by its name; 0 is the pretrained model

    def part(self, folder: Path) -> Part:
        """The part of a local update, named after its folder in the run."""
        name = folder.relative_to(self.rounds.path).as_posix()
        return replace(self.parent, name=name, id=part_id(self.run_id, name), config={})

    @property
    def run_id(self) -> str:
        value: str = read_json(self.path)["run_id"]
        return value

    def tell_round(self, round_index: int) -> None:
        """Give every tracker what it has not been told of the rounds so far."""
        for name, backend in list(self.backends.items()):
            try:
                with backend.open(self.parent) as log:
                    for r in range(self.told.get(name, -1) + 1, round_index + 1):
                        log(round_values(self.rounds.round(r)), r)
            except Exception as error:  # noqa: BLE001 - whatever a tracker or its server comes up with
                del self.backends[name]
                self.say(_gone(name, error))
                continue
            self.told[name] = round_index
            write_json(self.path, {"run_id": self.run_id, "told": self.told})


def open_tracking(recipe: Recipe, folder: RunFolder, progress: Progress) -> Tracking | None:
    """Start the trackers that a recipe names, and let them listen for the end of every round; None where it names none.

    Raises TrackerError naming the tracker that cannot be started.
    """
    settings = recipe.trackers
    if not settings.names:
        return None
    path = folder.path / "trackers.json"
    if not path.exists():
        write_json(path, {"run_id": secrets.token_hex(8), "told": {}})
    state = read_json(path)
    run_id = state["run_id"]
    parent_id = part_id(run_id, PARENT)
    parent = Part(
        settings=settings,
        name=PARENT,
        id=parent_id,
        group=settings.group or f"{folder.path.resolve().name}-{run_id[:6]}",
        folder=folder.path / "trackers",
        parent_id=parent_id,
        config=_config(recipe),
    )
    backends: dict[str, Backend] = {name: BACKENDS[name]() for name in settings.names}
    for name, backend in backends.items():
        try:
            backend.callback()
            with backend.open(parent):
                pass
        except Exception as error:
            raise TrackerError(
                f"trackers.names: {name} cannot be started ({type(error).__name__}: {error}); see docs/trackers.md for "
                "how it works without a network, or leave it out"
            ) from error
    tracking = Tracking(parent, path, folder, progress.message, backends, dict(state["told"]))
    listener = progress.listener

    def listen(event: Event) -> None:
        listener(event)
        if event.kind == "round":
            tracking.tell_round(event.round_index)

    progress.listener = listen
    return tracking


def part_id(run_id: str, name: str) -> str:
    """A stable id of one part of one run."""
    return content_key(run_id, name)[:16]


@contextmanager
def tracker_callbacks(part: Part | None, say: Say) -> Iterator[Sequence[Any]]:
    """The trainer's callbacks for one local update, within that part's runs of all trackers."""
    with ExitStack() as stack:
        callbacks = []
        for name in part.settings.names if part is not None else ():
            assert part is not None
            backend, failed = BACKENDS[name](), _sayer(say, name)
            try:
                opened = backend.open(part)
                opened.__enter__()
                stack.callback(_leave, opened, failed)
                callbacks.append(guarded(backend.callback(), failed))
            except Exception as error:  # noqa: BLE001 - a training does not end because nobody draws it
                failed(error)
        yield callbacks


def _leave(opened: AbstractContextManager[Any], failed: Callable[[Exception], None]) -> None:
    try:
        opened.__exit__(None, None, None)
    except Exception as error:  # noqa: BLE001 - the same
        failed(error)


def _sayer(say: Say, name: str) -> Callable[[Exception], None]:
    return lambda error: say(_gone(name, error))


def _gone(name: str, error: Exception) -> str:
    return f"warning: {name} fails and is not told of this any more ({type(error).__name__}: {error})"


def round_values(folder: Path) -> dict[str, float]:
    """Losses, gaps, weights, scores, kept share and drift of a round, from its records; only what is a number."""
    records = {name: _read(folder / f"{name}.json") for name in ("losses", "scores", "loss_gap", "merge")}
    gap, merge = records["loss_gap"], records["merge"]
    losses = {task: one["loss"] for task, one in records["losses"].items()}
    tables: dict[str, Mapping[str, Any]] = {
        "validation_loss": losses,
        "expert_loss": {task: one["loss"] for task, one in gap.get("expert_losses", {}).items()},
        "loss_gap": gap.get("loss_gaps", {}),
        "weight": gap.get("weights", {}),
        "test_score": {task: one["score"] for task, one in records["scores"].items()},
        "drift": merge.get("drift", {}),
    }
    values = {f"{table}/{task}": value for table, found in tables.items() for task, value in found.items()}
    if losses:
        values["multi_task_loss"] = math.fsum(losses.values()) / len(losses)
    values |= {
        "effective_tasks": gap.get("effective_tasks"),
        "kept_share": merge.get("kept_share"),
        "distance": merge.get("merged_norm"),
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _config(recipe: Recipe) -> dict[str, Any]:
    """What a tracker shows beside the curves: the recipe's settings, without paths."""
    settings = recipe.model_dump(mode="json", include={"protocol", "operator", "merge", "local_update", "evaluation"})
    return settings | {"tasks": list(recipe.tasks), "seed": recipe.seed}
