"""Local updates by a program of the user's own: what it is given, what it is taken back as, what may go wrong."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyshot import trainer_command
from manyshot.command_update import TrainerCall, update_by_command
from manyshot.errors import ManyshotError, ModelError, RecipeError, TrainingError
from manyshot.models import ModelState
from manyshot.process_mark import is_alive
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.trainer_command import command_problem, fill
from run_helpers import Runs, distance, load_tensors, round_folder, weights

ROOT = Path(__file__).parent.parent
FAKE = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests' / 'fake_trainer.py'))}"
EXAMPLE = FAKE.replace("tests/fake_trainer.py", "examples/any_trainer/train.py") + " {config}"
ROWS = [{"prompt": "a b c", "completion": "a"}]

MakeCall = Callable[..., TrainerCall]


def by_command(command: str) -> tuple[str, str]:
    """Overrides for a recipe that trains with it."""
    return "local_update.method=command", f"local_update.command={json.dumps(command)}"


def fake(mishap: str) -> str:
    return f"{FAKE} {shlex.quote(mishap)} {{config}}"


@pytest.fixture(autouse=True)
def consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trainer_command.CONSENT, "1")
    monkeypatch.setattr(trainer_command, "GRACE", 0.1)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("commands"), tasks=("letters", "words"))


@pytest.fixture
def make_call(runs: Runs, base_folder: Path, tmp_path: Path) -> MakeCall:
    """make_call("python train.py {config}", …): the call of a trainer for the first round of a task."""

    def make(command: str, *overrides: str, task: str = "words") -> TrainerCall:
        recipe = runs.recipe(*by_command(command), *overrides)
        steps = {"round_index": 1, "steps": 2, "steps_before": 0, "total_steps": 4}
        start = ModelState(base_folder)
        return TrainerCall(recipe, task, start, "tiny", tmp_path / task, **steps, rows=ROWS)

    return make


def call_trainer(call: TrainerCall) -> str:
    return update_by_command(call, lambda: None)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_command_trains_every_round_from_the_merged_model(runs: Runs) -> None:
    result = runs.get(*by_command(fake("none")))
    for round_index in (1, 2):
        record = read_json(round_folder(result, round_index) / "words" / "local_update.json")
        assert (record["returned"], record["steps"]) == ("adapter", 2)
        log = (round_folder(result, round_index) / "words" / "trainer.log").read_text()
        assert '{"rows": 8, "steps": 2}' in log  # two batches of four
    assert not list(result.folder.rglob("*.partial"))
    # what was merged is what the trainer wrote: Θ¹ − Θ⁰ is the weighted sum of the scaled products
    adapters = {task: round_folder(result, 1) / task / "adapter" for task in ("letters", "words")}
    assert weights(result, 1).keys() == adapters.keys()


def test_command_that_fails_leaves_its_log_and_is_skipped_where_asked(runs: Runs) -> None:
    skip = "protocol.on_failure=skip_task_this_round"
    with pytest.raises(TrainingError, match=r"1 of 2 tasks are left.*no GPU was found"):
        run(runs.recipe(*by_command(fake("fails:words")), skip), runs.new_folder())
