"""Trackers: off unless named, one group per run, stable ids, nothing of the results changed, no credentials kept.

TensorBoard is the real one; wandb, trackio and mlflow are stand-ins with the calls that we make of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from manyshot.errors import MissingExtraError, RecipeError, TrackerError
from manyshot.progress import Event
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.trackers import check_trackers, part_id, round_values
from run_helpers import Runs, unlike

PAIR = ("letters", "numbers")
ANOTHER = f"round_001/{PAIR[1]}"
SMALL = ("protocol.local_steps=2", "evaluation.validation_examples=2", "evaluation.test_examples=2")
ON = ("trackers.names=[tensorboard]", "trackers.project=tests", "trackers.tags=[one,two]")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("trackers"), tasks=PAIR)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a folder of event files, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_a_part_for_every_local_update_and_one_for_the_rounds(runs: Runs) -> None:
    result = runs.get(*SMALL, *ON, "evaluation.experts=true")
    board = result.folder / "trackers" / "tensorboard"
    parts = {file.parent.relative_to(board).as_posix() for file in board.rglob("events.out*")}
    updates = [f"{place}/{task}" for place in ("experts", "round_001", "round_002") for task in PAIR]
    assert parts == {*updates, "rounds"}
    for place, name in (("round_001", "letters"), ("round_002", "numbers"), ("experts", "numbers")):
        record = read_json(result.folder / place / name / "local_update.json")
        losses = scalars(board / place / name)["train/loss"]
        assert [value for _, value in losses] == pytest.approx(record["train_losses"], abs=1e-5)
    curves = scalars(board / "rounds")
    gaps = read_json(result.folder / "round_002" / "loss_gap.json")
    assert curves["weight/letters"][1][1] == pytest.approx(gaps["weights"]["letters"])
    assert curves["loss_gap/numbers"][1] == (2, pytest.approx(gaps["loss_gaps"]["numbers"]))
    # the pretrained model is step 0
    assert [step for step, _ in curves["validation_loss/letters"]] == [0, 1, 2]
    assert [step for step, _ in curves["kept_share"]] == [1, 2]
    assert {"multi_task_loss", "drift/letters", "expert_loss/letters", "test_score/numbers"} <= set(curves)


def test_trackers_change_nothing_of_the_results(runs: Runs) -> None:
    plain, tracked = runs.get(*SMALL), runs.get(*SMALL, *ON)
    different = unlike(plain.folder, tracked.folder)
    assert {name for name in different if not name.startswith("trackers")} == {"recipe.yaml"}
    assert not (plain.folder / "trackers").exists() and not (plain.folder / "trackers.json").exists()


def test_a_run_that_was_stopped_goes_on_in_the_same_parts(runs: Runs) -> None:
    folder = runs.new_folder()

    def stop(event: Event) -> None:
        if event.kind == "advance" and event.phase == "local_update" and (event.round_index, event.done) == (2, 2):
            raise KeyboardInterrupt

    recipe = runs.recipe(*SMALL, *ON, "protocol.local_steps=4")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, listener=stop)
    first = read_json(folder / "trackers.json")
    assert first["told"] == {"tensorboard": 1}
    run(recipe, folder, resume=True)
    assert read_json(folder / "trackers.json") == {"run_id": first["run_id"], "told": {"tensorboard": 2}}
    curves = scalars(folder / "trackers" / "tensorboard" / "rounds")
    assert [step for step, _ in curves["kept_share"]] == [1, 2]  # what had been told is not told again
    update = scalars(folder / "trackers" / "tensorboard" / "round_002" / "letters")
    assert [step for step, _ in update["train/loss"]] == [1, 2]  # what was cut off is not shown twice


def test_trackers_may_be_others_when_a_run_goes_on(runs: Runs) -> None:
    folder = runs.new_folder()

    def stop(event: Event) -> None:
        if event.kind == "start" and event.phase == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*SMALL), folder, listener=stop)
    run(runs.recipe(*SMALL, *ON), folder, resume=True)
    assert read_json(folder / "trackers.json")["told"] == {"tensorboard": 2}


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_packages_that_are_not_there_are_named_before_anything_starts(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.recipe(*SMALL, "trackers.names=[tensorboard,wandb,mlflow]")
    missing = MissingExtraError, r"trackers\.names: wandb, mlflow not installed; run: pip install wandb mlflow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyshot.trackers.find_spec", lambda name: name == "tensorboard" or None)
        with pytest.raises(missing[0], match=missing[1]):
            check_trackers(recipe.trackers)
        with pytest.raises(missing[0], match=missing[1]):
            run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_section_in_the_docs_loads(runs: Runs) -> None:
    page = (Path(__file__).parents[1] / "docs" / "trackers.md").read_text("utf-8")
    section = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["trackers"]
    trackers = recipe_from_mapping(copy.deepcopy(runs.mapping) | {"trackers": section}).trackers
    assert (trackers.names, trackers.group, trackers.tags) == (("tensorboard",), "first-try", ("laptop",))
    assert runs.recipe().trackers.names == ()


def test_unknown_trackers_and_the_trainers_own_reporting_are_refused(runs: Runs) -> None:
    with pytest.raises(RecipeError, match=r"trackers\.names"):
        runs.recipe("trackers.names=[comet]")
    recipe = runs.recipe(*SMALL, "local_update.trainer={report_to: wandb}")
    with pytest.raises(RecipeError, match=r"local_update\.trainer\.report_to: this is decided by trackers"):
        run(recipe, runs.new_folder())


# ---- stand-ins -------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What was asked of a tracker: the runs it opened, in order, and what was logged to each."""

    opened: list[dict[str, Any]] = field(default_factory=list)
    logged: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    current: str | None = None

    def open(self, key: str, **asked: Any) -> None:
        assert self.current is None, "one run at a time"
        self.current = key
        self.opened.append({"key": key} | asked)

    def log(self, values: Mapping[str, Any]) -> None:
        assert self.current is not None
        self.logged.setdefault(self.current, []).append(values)

    def close(self) -> None:
        self.current = None


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


class Callback:
    """Stands for transformers' callback of a tracker, which writes to the tracker's current run."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_log(self, *args: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        self.ledger.log(logs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    ledger = Ledger()

    def init(**asked: Any) -> Any:
        ledger.open(asked["id"], **asked)
        return SimpleNamespace(log=ledger.log, finish=ledger.close, define_metric=lambda *a, **k: None)

    install(monkeypatch, "wandb", init=init, Settings=lambda **settings: settings)
    monkeypatch.setattr("manyshot.tracker_backends.Wandb.callback", lambda self: Callback(ledger))
    return ledger


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    ledger = Ledger()

    def init(**asked: Any) -> Any:
        sys.stdout.write("* Trackio greets\n")
        ledger.open(asked["name"], **asked)
        return SimpleNamespace(log=lambda values, step: ledger.log({**values, "step": step}))

    install(monkeypatch, "trackio", init=init, finish=ledger.close)
    monkeypatch.setattr("manyshot.tracker_backends.Trackio.callback", lambda self: Callback(ledger))
    return ledger


class FakeMlflow:
    """Runs with tags, found by the tag manyshot.id."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.tags: dict[str, dict[str, str]] = {}
        self.deleted: list[str] = []

    def set_experiment(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=f"experiment {name}")

    def start_run(self, run_id: str | None = None, **asked: Any) -> None:
        key = run_id or f"run {len(self.tags)}"
        self.tags.setdefault(key, asked.get("tags", {}))
        self.ledger.open(key, **asked)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.ledger.log({**values, "step": step})

    def end_run(self) -> None:
        sys.stdout.write("view run at https://…\n")
        self.ledger.close()

    def search_runs(self, experiments: list[str], text: str, max_results: int) -> list[Any]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=key))
            for key, tags in self.tags.items()
            if f"'{tags['manyshot.id']}'" in text and key not in self.deleted
        ][:max_results]

    def delete_run(self, key: str) -> None:
        self.deleted.append(key)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    members = {name: getattr(fake, name) for name in ("set_experiment", "start_run", "log_metrics", "end_run")}
    install(monkeypatch, "mlflow", MlflowClient=lambda: fake, **members)
    monkeypatch.setattr("manyshot.tracker_backends.Mlflow.callback", lambda self: Callback(fake.ledger))
    return fake


def test_wandb_gets_one_group_with_stable_ids(runs: Runs, wandb: Ledger) -> None:
    folder = runs.new_folder()
    run(runs.recipe(*SMALL, "trackers.names=[wandb]", *ON[1:]), folder)
    run_id = read_json(folder / "trackers.json")["run_id"]
    updates = [f"{place}/{task}" for place in ("round_001", "round_002") for task in PAIR]
    assert {one["id"]: one["name"] for one in wandb.opened} == {
        part_id(run_id, name): name for name in ["rounds", *updates]
    }
    assert {one["group"] for one in wandb.opened} == {f"{folder.name}-{run_id[:6]}"}
    assert all(
        (one["project"], one["tags"], one["resume"]) == ("tests", ["one", "two"], "allow") for one in wandb.opened
    )
    rounds = wandb.logged[part_id(run_id, "rounds")]
    assert [one["round"] for one in rounds] == [0, 1, 2]
    assert rounds[2]["weight/letters"] == read_json(folder / "round_002" / "loss_gap.json")["weights"]["letters"]
    assert "loss" in wandb.logged[part_id(run_id, "round_001/letters")][0]
    assert wandb.current is None


def test_a_run_that_was_stopped_goes_on_in_the_same_runs_of_wandb(runs: Runs, wandb: Ledger) -> None:
    folder = runs.new_folder()

    def stop(event: Event) -> None:
        if event.kind == "advance" and event.phase == "local_update" and event.round_index == 2:
            raise KeyboardInterrupt

    recipe = runs.recipe(*SMALL, "trackers.names=[wandb]")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, listener=stop)
    before = {one["name"]: one["id"] for one in wandb.opened}
    assert wandb.current is None and set(before) == {"rounds", *(f"round_00{r}/{PAIR[0]}" for r in (1, 2)), ANOTHER}
    run(recipe, folder, resume=True)
    after = {one["name"]: one["id"] for one in wandb.opened}
    assert after.items() > before.items() and len({one["group"] for one in wandb.opened}) == 1
    # every round is told once, however often the run was stopped
    assert [one["round"] for one in wandb.logged[after["rounds"]]] == [0, 1, 2]


def test_trackio_knows_parts_by_names_that_no_other_run_has(
    runs: Runs, trackio: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [runs.new_folder(), runs.folder / "run_other"]
    for folder in folders:
        run(runs.recipe(*SMALL, "protocol.rounds=1", "trackers.names=[trackio]", "trackers.group=mine"), folder)
    names = [one["name"] for one in trackio.opened]
    parts = {"rounds", "round_001-letters", "round_001-numbers"}
    assert len(set(names)) == 2 * len(parts) and {name.rsplit("-", 1)[0] for name in names} == parts
    assert {one["group"] for one in trackio.opened} == {"mine"}
    assert "greets" not in capsys.readouterr().out


def test_mlflow_nests_updates_under_their_run_and_starts_a_cut_off_one_anew(
    runs: Runs, mlflow: FakeMlflow, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.new_folder()

    def stop(event: Event) -> None:
        if event.kind == "advance" and event.phase == "local_update" and event.task == "numbers":
            raise KeyboardInterrupt

    recipe = runs.recipe(*SMALL, "protocol.rounds=1", "trackers.names=[mlflow]", *ON[1:])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, listener=stop)
    assert mlflow.ledger.current is None
    run(recipe, folder, resume=True)
    run_id = read_json(folder / "trackers.json")["run_id"]
    by_id = {tags["manyshot.id"]: key for key, tags in mlflow.tags.items() if key not in mlflow.deleted}
    assert set(by_id) == {part_id(run_id, name) for name in ("rounds", "round_001/letters", "round_001/numbers")}
    parent = by_id[part_id(run_id, "rounds")]
    assert mlflow.tags[by_id[part_id(run_id, "round_001/numbers")]]["mlflow.parentRunId"] == parent
    assert "mlflow.parentRunId" not in mlflow.tags[parent] and mlflow.tags[parent]["one"] == ""
    assert len(mlflow.deleted) == 1
    assert [one["step"] for one in mlflow.ledger.logged[parent]] == [0, 1]
    assert "view run" not in capsys.readouterr().out


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(
    runs: Runs, wandb: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**asked: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    folder = runs.new_folder()
    with pytest.raises(TrackerError, match=r"wandb cannot be started \(ConnectionError: no network\)"):
        run(runs.recipe(*SMALL, "trackers.names=[wandb]"), folder)
    assert not (folder / "round_000").exists()


def failing(after: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails after so many calls."""
    calls = iter(range(10_000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise ConnectionError("the server has gone")
        return call(*args, **kwargs)

    return called


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_tracker_that_fails_later_is_said_to_and_does_not_end_the_run(
    runs: Runs, wandb: Ledger, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(sys.modules["wandb"], "init", failing(after, sys.modules["wandb"].init))
    folder, said = runs.new_folder(), []
    recipe = runs.recipe(*SMALL, "trackers.names=[wandb,tensorboard]")
    run(recipe, folder, listener=lambda event: said.append(event.text) if event.kind == "message" else None)
    assert any("warning: wandb fails" in text and "the server has gone" in text for text in said)
    assert read_json(folder / "trackers.json")["told"]["tensorboard"] == 2
    assert unlike(runs.get(*SMALL).folder, folder) != [] and (folder / "merged" / "model.safetensors").exists()


def test_a_callback_that_fails_does_not_end_a_training(
    runs: Runs, wandb: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Callback, "on_log", failing(1, Callback.on_log))
    folder, said = runs.new_folder(), []
    recipe = runs.recipe(*SMALL, "protocol.rounds=1", "trackers.names=[wandb]")
    run(recipe, folder, listener=lambda event: said.append(event.text) if event.kind == "message" else None)
    assert sum("wandb fails" in text for text in said) == 2  # once for each of the two updates
    assert (folder / "merged" / "model.safetensors").exists()


def test_credentials_stay_out_of_the_run_folder(runs: Runs, wandb: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"secret-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = runs.new_folder()
    run(runs.recipe(*SMALL, "protocol.rounds=1", "trackers.names=[wandb,tensorboard]"), folder)
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"secret-" not in file.read_bytes(), file


def test_round_values_leave_out_what_is_no_number(runs: Runs, tmp_path: Path) -> None:
    result = runs.get(*SMALL)
    values = round_values(result.folder / "round_001")
    assert values["kept_share"] == read_json(result.folder / "round_001" / "merge.json")["kept_share"]
    assert all(isinstance(value, float) for value in values.values())
    (tmp_path / "merge.json").write_text('{"kept_share": null, "merged_norm": 2, "drift": {"a": null}}', "utf-8")
    assert round_values(tmp_path) == {"distance": 2.0}


def test_ids_are_stable_and_differ_between_runs_and_parts() -> None:
    assert part_id("run", "round_001/math") == part_id("run", "round_001/math")
    ids = {part_id(run, name) for run in ("one", "two") for name in ("rounds", "round_001/math", "experts/math")}
    assert len(ids) == 6 and all(len(one) == 16 for one in ids)
