"""The four trackers: how each opens one part of a run, takes numbers, and what it brings along for the trainer.

Between two parts nothing is open: wandb, trackio and mlflow have one current run, which transformers' callbacks write
to. A part that was cut off and is trained again writes the same numbers again, at the same steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from manyshot.tracker_spec import Trackers

PARENT = "rounds"
ROUND = "round"
Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Part:
    """One part of a run as its trackers know it: plain values, so that a job can carry it to where it runs."""

    settings: Trackers
    name: str  # rounds, experts/math, round_001/math
    id: str
    group: str
    folder: Path  # for trackers that write files
    parent_id: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_parent(self) -> bool:
        return self.name == PARENT

    @property
    def unique_name(self) -> str:
        """A name that no other part of any run has, for trackers that know runs by their names."""
        return f"{self.name.replace('/', '-')}-{self.id[:8]}"


class Backend(Protocol):
    """One tracker: `open` makes a part its current run, `callback` is the trainer's callback that writes to that."""

    def open(self, part: Part) -> AbstractContextManager[Log]: ...

    def callback(self) -> Any: ...


class TensorBoard:
    """Event files under trackers/tensorboard of the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    @contextmanager
    def open(self, part: Part) -> Iterator[Log]:
        from torch.utils.tensorboard import SummaryWriter

        # what an update that was cut off had written is not shown beside what it writes now
        purge = None if part.is_parent else 0
        folder = part.folder / "tensorboard" / part.name
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge)
        try:
            yield self._log
        finally:
            self._writer.close()

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def callback(self) -> Any:
        from transformers.integrations import TensorBoardCallback

        return TensorBoardCallback(self._writer)


class Wandb:
    """Weights & Biases: runs of one group, by id."""

    @contextmanager
    def open(self, part: Part) -> Iterator[Log]:
        import wandb

        run = wandb.init(
            project=part.settings.project,
            group=part.group,
            id=part.id,
            name=part.name,
            job_type="rounds" if part.is_parent else "local update",
            tags=list(part.settings.tags),
            config=dict(part.config),
            resume="allow",
            # what this process prints is not theirs to record, nor ours to mix with what they print
            settings=wandb.Settings(silent=True, console="off"),
        )
        if part.is_parent:
            run.define_metric(ROUND)
            run.define_metric("*", step_metric=ROUND)
        try:
            yield lambda values, step: run.log({**values, ROUND: step})
        finally:
            run.finish()

    def callback(self) -> Any:
        from transformers.integrations import WandbCallback

        return WandbCallback()


class Trackio:
    """Trackio: runs of one group, by name."""

    @contextmanager
    def open(self, part: Part) -> Iterator[Log]:
        import trackio

        with redirect_stdout(io.StringIO()):  # it greets every run
            run = trackio.init(
                project=part.settings.project,
                name=part.unique_name,
                group=part.group,
                config={**part.config, **({"tags": list(part.settings.tags)} if part.settings.tags else {})},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        try:
            yield lambda values, step: run.log(dict(values), step=step)
        finally:
            with redirect_stdout(io.StringIO()):
                trackio.finish()

    def callback(self) -> Any:
        from transformers.integrations import TrackioCallback

        class Attached(TrackioCallback):  # type: ignore[misc]
            """Logs to the run that is open, where its base would open one of its own, without a group."""

            def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
                self._initialized = True

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Who opened the run closes it."""

        return Attached()


class Mlflow:
    """MLflow: runs of one experiment, nested under the parent; ids of its own, ours are in the tag manyshot.id."""

    @contextmanager
    def open(self, part: Part) -> Iterator[Log]:
        import mlflow

        experiment = mlflow.set_experiment(part.settings.project)
        there = self._find(experiment.experiment_id, part.id)
        if there is not None and not part.is_parent:
            # an update that was cut off: its parameters (a scratch folder's name) cannot be written twice
            mlflow.MlflowClient().delete_run(there)
            there = None
        with redirect_stdout(io.StringIO()):
            if there is not None:
                mlflow.start_run(run_id=there)
            else:
                mlflow.start_run(run_name=part.name, tags=self._tags(part, experiment.experiment_id))
        try:
            yield lambda values, step: mlflow.log_metrics(dict(values), step=step)
        finally:
            with redirect_stdout(io.StringIO()):
                mlflow.end_run()

    def _find(self, experiment: str, part_id: str) -> str | None:
        """MLflow's id of the run with our id."""
        import mlflow

        found = mlflow.MlflowClient().search_runs([experiment], f"tags.`manyshot.id` = '{part_id}'", max_results=1)
        return found[0].info.run_id if found else None

    def _tags(self, part: Part, experiment: str) -> dict[str, str]:
        own = dict.fromkeys(part.settings.tags, "")
        parent = None if part.is_parent else self._find(experiment, part.parent_id)
        nested = {"mlflow.parentRunId": parent} if parent is not None else {}
        return own | nested | {"manyshot.id": part.id, "manyshot.group": part.group}

    def callback(self) -> Any:
        from transformers.integrations import MLflowCallback

        return MLflowCallback()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def guarded(callback: Any, failed: Callable[[Exception], None]) -> Any:
    """A tracker's callback that cannot end a training: its first failure is said, and it is not called again."""
    from transformers import TrainerCallback

    class Guarded(TrainerCallback):  # type: ignore[misc]
        lives = True

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._call("on_train_begin", *args, **kwargs)

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            self._call("on_log", *args, **kwargs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self._call("on_train_end", *args, **kwargs)

        def _call(self, event: str, *args: Any, **kwargs: Any) -> None:
            if not self.lives:
                return
            try:
                getattr(callback, event)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever a tracker or its server comes up with
                self.lives = False
                failed(error)

    return Guarded()
