"""Local updates by a program of the user's own: what it is given, what it is taken back as, what may go wrong."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manyshot import command_update, trainer_command
from manyshot.base_model import find_base_model
from manyshot.by_hand import Coordinated
from manyshot.command_update import TrainerCall, update_by_command
from manyshot.content import keyed
from manyshot.errors import ModelError, RecipeError, TrainingError
from manyshot.models import ModelState
from manyshot.run_identity import environment
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.seeding import preserved_random_state
from manyshot.trainer_command import command_problem, fill
from run_helpers import Runs, load_tensors, round_folder, weights

ROOT = Path(__file__).parent.parent
FAKE = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests' / 'fake_trainer.py'))}"
EXAMPLE = FAKE.replace("tests/fake_trainer.py", "examples/any_trainer/train.py") + " {config}"
ROWS = [{"prompt": "a b c", "completion": "a"}] * 8

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


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and that nobody has asked after."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_command_trains_every_round_from_the_merged_model(runs: Runs) -> None:
    result = runs.get(*by_command(fake("none")))
    for round_index in (1, 2):
        record = read_json(round_folder(result, round_index) / "words" / "local_update.json")
        assert (record["returned"], record["steps"]) == ("adapter", 2)
        log = (round_folder(result, round_index) / "words" / "trainer.log").read_text()
        assert '{"rows": 8, "steps": 2}' in log  # two batches of four
    assert not list(result.folder.rglob("*.partial"))
    # what is merged is what the trainer wrote: Θ¹ − Θ⁰ = Σ α_τ (α/r)·B·A
    shares, merged = weights(result, 1), load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    factors = {
        task: load_tensors(round_folder(result, 1) / task / "adapter" / "adapter_model.safetensors") for task in shares
    }
    part = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    wanted = sum(shares[task] * 2.0 * one[part.format("B")] @ one[part.format("A")] for task, one in factors.items())
    kept = merged["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(kept, torch.where(kept == 0, kept, wanted), rtol=1e-4, atol=1e-6)
    assert (kept != 0).any()


# ---- what may go wrong -----------------------------------------------------------------------------------------------


def test_command_that_fails_is_named_with_its_log_and_left_out_where_asked(runs: Runs) -> None:
    skip = "protocol.on_failure=skip_task_this_round"
    folder = runs.new_folder()
    with pytest.raises(
        TrainingError, match=r"1 of 2 tasks are left.*exit code 3; .*trainer\.log has its output.*no GPU"
    ):
        run(runs.recipe(*by_command(fake("fails:words")), skip), folder)
    assert "no GPU was found" in (folder / "round_001" / "words" / "trainer.log").read_text()


WRONG = [
    ("fails", TrainingError, "the trainer ended with exit code 3; .*which ends with: no GPU was found"),
    ("killed", TrainingError, "the trainer was ended by signal SIGKILL; most often there was too little memory"),
    ("nothing", ModelError, "expected a PEFT adapter .* or a model folder .*, found nothing"),
    ("only a checkpoint", ModelError, "found checkpoint-10"),
    ("two results", ModelError, "several results are there: one, two"),
    ("wrong shapes", ModelError, r"the adapter's update has shape \(64, 64\), the base's tensor \(32, 32\)"),
    ("other base", ModelError, r"it changes 'model\.layers\.2\.self_attn.*trained on another model"),
    ("from elsewhere", ModelError, "says that it was trained on 'meta-llama/Llama-3.2-3B', and the round's model is"),
    ("nan", ModelError, r"q_proj\.weight' holds NaN or Inf; the training diverged"),
    ("infinite model", ModelError, r"up_proj\.weight' holds NaN or Inf"),
    ("pickle", ModelError, r"adapter_model\.bin, a pickle"),
]


@pytest.mark.parametrize(("mishap", "kind", "message"), WRONG)
def test_command_mishap_names_round_task_and_log(
    make_call: MakeCall, mishap: str, kind: type[Exception], message: str
) -> None:
    call = make_call(fake(mishap))
    with pytest.raises(kind, match=rf"round 1, task 'words': .*{message}") as error:
        call_trainer(call)
    assert str(call.folder / "trainer.log") in str(error.value)
    assert sorted(path.name for path in call.folder.iterdir()) == ["trainer.log"]


def test_command_that_hangs_is_ended_with_all_that_it_started(make_call: MakeCall) -> None:
    call = make_call(fake("hangs"), "local_update.time_limit=3")
    with pytest.raises(
        TrainingError, match=r"still running after 3 seconds \(local_update\.time_limit\) and was ended"
    ):
        call_trainer(call)
    child = int((call.folder / "trainer.log").read_text().split()[-1])
    end = time.monotonic() + 30
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


@pytest.mark.parametrize(("mishap", "kept"), [("one folder deeper", "adapter"), ("whole model", "model")])
def test_command_may_leave_a_folder_or_a_whole_model(make_call: MakeCall, mishap: str, kept: str) -> None:
    call = make_call(fake(mishap))
    assert call_trainer(call) == kept
    assert (call.folder / kept / "config.json").exists() == (kept == "model")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a property by its old name
def test_example_trainer_learns_its_task(
    make_call: MakeCall, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has loaded torch; in one of its own below."""

    def run_here(command: str, values: trainer_command.Values, log: Path, **more: object) -> None:
        monkeypatch.setattr(sys, "argv", fill(command, values)[1:])
        with preserved_random_state():
            runpy.run_path(sys.argv[0], run_name="__main__")

    monkeypatch.setattr(command_update, "run_command", run_here)
    assert call_trainer(make_call(EXAMPLE)) == "adapter"
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 2
    assert losses[1] < losses[0]  # the same rows twice


@pytest.mark.slow  # four programs load torch, transformers and peft
def test_example_trainer_runs_as_a_program_in_every_round(runs: Runs) -> None:
    result = runs.get(*by_command(EXAMPLE), "protocol.local_steps=12")
    first, last = (read_json(round_folder(result, r) / "losses.json") for r in (0, 2))
    assert all(last[task]["loss"] < first[task]["loss"] for task in first)


# ---- the command itself ----------------------------------------------------------------------------------------------


def test_fill_replaces_placeholders_inside_arguments_and_splits_none_of_their_values() -> None:
    values = {name: f"<{name} of mine>" for name in trainer_command.PLACEHOLDERS}
    found = fill("train --model={start} '{output}/x y' {\"rank\": {rank}}", values)
    assert found == ["train", "--model=<start of mine>", "<output of mine>/x y", "{rank:", "<rank of mine>}"]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("", "is empty"),
        ("train 'x", "cannot be taken apart"),
        ("train {start} {ouput}", r"{ouput} is no placeholder; did you mean 'output'"),
        ("train {start}", "says nowhere {output}"),
        ("train --out x", "says nowhere {start} and {output}"),
    ],
)
def test_command_problem_says_what_is_wrong(command: str, problem: str) -> None:
    assert problem in str(command_problem(command))


def test_recipe_refuses_settings_that_a_command_does_not_hear_of(runs: Runs) -> None:
    with pytest.raises(RecipeError, match="proximal is for training here"):
        runs.recipe(*by_command(fake("none")), "local_update.proximal=0.1")
    with pytest.raises(RecipeError, match="command is for method: command"):
        runs.recipe("local_update.command='train {config}'")


def test_command_runs_only_where_somebody_consented(make_call: MakeCall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trainer_command.CONSENT)
    with pytest.raises(RecipeError, match=r"A recipe alone cannot ask for that.*--allow-command"):
        call_trainer(make_call(fake("none")))


def test_command_without_its_program_is_refused_before_anything_runs(runs: Runs) -> None:
    with pytest.raises(RecipeError, match="no program 'no-such-trainer'"):
        run(runs.recipe(*by_command("no-such-trainer {config}")), runs.new_folder())


def test_environment_knows_the_files_that_a_command_names(runs: Runs, base_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print()")
    recipe, read = (
        runs.recipe(*by_command(f"python {script} {{config}}")),
        Coordinated(find_base_model(str(base_folder)), ()),
    )
    before = environment(recipe, read, {}, None)["trainer"]
    script.write_text("print(1)")
    after = environment(recipe, read, {}, None)["trainer"]
    assert before.keys() == after.keys() == {str(script)}
    assert before != after
    assert "trainer" not in environment(runs.recipe(), read, {}, None)


def test_time_limit_is_no_part_of_what_finished_work_is_called(runs: Runs) -> None:
    recipes = [runs.recipe(*by_command(fake("none")), f"local_update.time_limit={limit}") for limit in (5, 50)]
    one, other = (keyed("local_update", recipe.local_update.model_dump(mode="json")) for recipe in recipes)
    assert one == other
    assert one["command"] == fake("none")
