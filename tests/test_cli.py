"""The command line as its users call it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from manyshot.__main__ import main
from manyshot.cli import app
from manyshot.progress import Event
from manyshot.recipe_file import load_recipe
from manyshot.starter import starter_recipe

COMMANDS = (
    "run",
    "demo",
    "extend",
    "compare",
    "tune",
    "eval",
    "merge",
    "inspect",
    "init",
    "validate",
    "plan",
    "status",
    "serve",
    "report",
    "push",
    "export",
)


@pytest.fixture
def recipe_path(recipe_mapping: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping), "utf-8")
    return path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Call]:
    """Call `manyshot …` in tmp_path, in this process: importing torch anew for every call would take long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    handler = signal.getsignal(signal.SIGTERM)

    def run_main(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["manyshot", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        return Done(code if isinstance(code, int) else 0, *capfd.readouterr())

    yield run_main
    signal.signal(signal.SIGTERM, handler)


def test_help_names_every_command_and_imports_no_torch() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(command in shown for command in COMMANDS)
    probe = "import sys, manyshot.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_lists_its_options(command: str) -> None:
    expected = {
        "run": {"--output", "--resume", "--force", "--repair", "--verify-determinism", "--quiet", "--json"},
        "demo": {"--output", "--resume", "--force", "--repair", "--quiet", "--json"},
        "extend": {"--rounds", "--steps", "--quiet", "--json"},
        "compare": {
            *{"--output", "--plan", "--workers", "--resume", "--extend", "--force", "--repair", "--quiet", "--json"},
        },
        "tune": {"--output", "--plan", "--resume", "--repair", "--force", "--quiet", "--json"},
        "eval": {
            *{"--adapter", "--base", "--batch-size", "--chat-template", "--check", "--data", "--device", "--dtype"},
            *{"--few-shot", "--json", "--judge", "--limit", "--max-new-tokens", "--output", "--preset", "--recipe"},
            *{"--no-chat-template", "--round", "--tasks", "--temperature", "--top-p"},
        },
        "merge": {
            *{"--output", "--base", "--operator", "--weights", "--scaling", "--density", "--trim-scope", "--seed"},
            *{"--mask-threshold", "--min-agreement", "--temperature", "--set", "--validation", "--dtype", "--json"},
            *{"--shard-size", "--device", "--threads", "--allow-copy", "--allow-nonfinite", "--force", "--quiet"},
            "--preset",
        },
        "inspect": {
            *{"--base", "--round", "--reference", "--mask-threshold", "--min-agreement", "--ranks", "--no-ranks"},
            *{"--rank-limit", "--threads", "--png", "--json"},
        },
        "init": {"--preset", "--force"},
        "validate": {"--json"},
        "plan": {"--json"},
        "status": {"--json", "--watch"},
        "serve": {"--port"},
        "report": {"--output", "--json"},
        "push": {"--public", "--yes"},
        "export": {
            *{"--format", "--output", "--round", "--dtype", "--max-shard-size", "--rank", "--energy", "--drop-rest"},
            *{"--no-measure", "--quiet", "--json"},
        },
    }[command]
    callback = next(
        c.callback for c in app.registered_commands if c.callback and command in (c.name, c.callback.__name__)
    )
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert callback is not None
    assert shown.exit_code == 0
    found = {word.strip(",.;") for word in shown.output.split() if word.startswith("--")} - {"--help"}
    assert expected <= found
    assert found - expected <= {"--output", "--resume", "--force"}


def test_run_prints_the_merged_path_last(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    done = call("run", str(recipe_path), "protocol.rounds=1", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "out/merged"
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    assert "worst task" in done.stdout
    again = call("run", str(recipe_path), "protocol.rounds=1", "--output", "out")
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr
    status = call("status", "out", "--json")
    found = json.loads(status.stdout)
    assert (found["rounds_done"], found["next"], found["finished"]) == (1, None, True)
    assert found["steps_done"] == found["steps"]


def test_run_quiet_and_json_print_only_what_they_promise(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    overrides = ["protocol.rounds=1", "evaluation.experts=false"]
    quiet = call("run", str(recipe_path), *overrides, "--output", "a", "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("a/merged\n", "")
    as_json = call("run", str(recipe_path), *overrides, "--output", "b", "--json")
    lines = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert lines[-1]["merged"] == "b/merged"
    assert set(lines[-1]["scores"]["rounds"]) == {"1"}
    assert {line["phase"] for line in lines[:-1]} >= {"local_update", "validation", "score", "merge"}


def test_run_terminated_says_how_to_resume(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "manyshot", "run", str(recipe_path), "--output", "out", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["phase"] == "local_update":
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert call("run", str(recipe_path), "--output", "out", "--resume", "--quiet").stdout == "out/merged\n"


def test_watching_and_serving_end_with_the_codes_that_their_help_promises(
    call: Call, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["protocol.rounds=1", "evaluation.experts=false"]
    assert call("run", str(recipe_path), *overrides, "--output", "out", "--quiet").returncode == 0
    watched = call("status", "out", "--watch")
    assert (watched.returncode, watched.stderr) == (0, "")
    assert "finished" in watched.stdout and "round 1" in watched.stdout
    lines = (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "out" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n", "utf-8")  # it did not say its end

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manyshot.cli_live.follow.__kwdefaults__", {"every": 0.0, "sleep": interrupt})
    assert call("status", "out", "--watch").returncode == 130
    assert call("serve", "nowhere").returncode == 2
    monkeypatch.setattr("manyshot.serve.PageServer.serve_forever", lambda server: interrupt(0))
    served = call("serve", "out", "--port", "0")
    assert served.returncode == 0 and "http://127.0.0.1:" in served.stdout


def test_error_is_one_message_with_exit_code_2(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    done = call("run", str(recipe_path), "operator.temperatur=1", "sed=3")
    assert done.returncode == 2
    assert "did you mean 'temperature'" in done.stderr
    assert "did you mean 'seed'" in done.stderr
    assert "Traceback" not in done.stderr
    missing = call("status", "nowhere")
    assert (missing.returncode, "nowhere" in missing.stderr) == (2, True)


def test_validate_marks_the_counted_tokens(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    found = json.loads(call("validate", str(recipe_path), "--json").stdout)
    letters = found["tasks"]["letters"]
    assert letters["splits"]["train"]["examples"] == 24
    # three letters; `<user> … <end> <assistant>` around them; the answer and the end token are counted
    assert letters["splits"]["train"]["mean_tokens"] == 8
    assert letters["splits"]["train"]["mean_counted_tokens"] == 2
    assert letters["example"]["context"].endswith("<assistant>")
    assert letters["example"]["counted"].endswith("<end>")
    shown = call("validate", str(recipe_path)).stdout
    assert f"⟦{letters['example']['counted']}⟧" in shown


def test_plan_counts_steps_and_warns_of_starved_rounds(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    plan = json.loads(call("plan", str(recipe_path), "--json").stdout)
    # 3 tasks x 4 steps, and once more for the experts; 4 examples of 8 tokens a step
    assert plan["optimizer_steps"] == 24
    assert plan["training_examples"] == 96
    assert plan["training_tokens"] == 768
    assert [entry["steps_per_task"] for entry in plan["rounds"]] == [2, 2]
    assert "starved" in plan["warnings"][0]
    fed = json.loads(call("plan", str(recipe_path), "protocol.local_steps=20", "--json").stdout)
    assert fed["warnings"] == []


def test_plan_disk_is_what_a_run_leaves(call: Call, recipe_path: Path, tmp_path: Path) -> None:
    planned = json.loads(call("plan", str(recipe_path), "--json").stdout)["disk_bytes"]
    assert call("run", str(recipe_path), "--output", "out", "--quiet").returncode == 0
    merged = [file for file in (tmp_path / "out").glob("round_*/merged/*") if file.name != "README.md"]
    others = [file for file in (tmp_path / "out").rglob("*.safetensors") if "merged" not in file.parts]
    assert planned["total"] == pytest.approx(sum(file.stat().st_size for file in (*merged, *others)), rel=0.01)
    assert planned["peak"] == planned["total"]  # nothing is removed, nor written for a while


def test_init_writes_a_recipe_that_loads_with_every_default(call: Call, tmp_path: Path) -> None:
    done = call("init")
    assert done.returncode == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.protocol.rounds, recipe.method.name) == (5, "metis")
    assert recipe == load_recipe(tmp_path / "recipe.yaml", ["local_update.rank=16"])
    assert call("init").returncode == 2
    assert starter_recipe() == (tmp_path / "recipe.yaml").read_text("utf-8")


def test_events_name_round_task_and_phase() -> None:
    from manyshot.cli_view import finished_training, where

    event = Event("end", "local_update", 2, "math", values={"seconds": 2.0, "tokens": 300, "steps": 10})
    assert where(event) == "round 2, math: training"
    assert finished_training(event) == "round 2, math: training: 10 steps in 2.0 s, 150 tokens/s"


def test_public_functions_are_no_modules_however_often_they_are_asked_for() -> None:
    """A submodule of the same name would take a function's place once something has imported it."""
    import manyshot

    for name in manyshot.__all__:
        first, again = getattr(manyshot, name), getattr(manyshot, name)
        assert first == again and not isinstance(first, ModuleType), name
    assert not {module.stem for module in Path(manyshot.__file__).parent.glob("*.py")} & set(manyshot.__all__)
