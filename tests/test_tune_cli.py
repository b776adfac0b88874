"""`manyshot tune` as its users call it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyshot import tune_outputs
from manyshot.__main__ import main
from manyshot.errors import MissingExtraError
from manyshot.rundir import read_json

Json = dict[str, Any]
TEMPERATURE = {"operator.temperature": {"low": 0.1, "high": 5.0, "log": True}}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Call]:
    """Call `manyshot …` in tmp_path, in this process."""
    monkeypatch.chdir(tmp_path)
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


@pytest.fixture
def write(recipe_mapping: Json, tmp_path: Path) -> Callable[..., str]:
    """write({parameters}, trials=2, …): a search of the small recipe as a file; returns its name."""

    def written(parameters: Json, **search: Any) -> str:
        recipe = recipe_mapping | {"search": {"parameters": parameters} | search}
        (tmp_path / "search.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
        return "search.yaml"

    return written


def test_plan_says_what_is_tried_and_what_it_costs(call: Call, write: Callable[..., str], tmp_path: Path) -> None:
    found = call("tune", write(TEMPERATURE, rounds="each", trials=3), "--plan")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == [
        "the merge of round 1: 3 trials",
        "the merge of round 2: 3 trials",
        "settings: operator.temperature; objective: multi_task_loss",
        # three tasks, four steps of four examples
        "training: 12 steps (experts 0, first round 6, later rounds 6), 48 examples",
        "merges: 8",
        # the pretrained model, two rounds of experts, eight merged models; six examples a task
        f"evaluation: {(1 + 2 + 8) * 3 * 6} validation examples, no test examples",
    ]
    assert not (tmp_path / "tune").exists()
    endless = call("tune", write(TEMPERATURE, rounds="all", seconds=30), "--plan")
    assert endless.stdout.startswith("whole runs: as many trials as the time allows, at most 30 s\n")
    as_json = call("tune", write(TEMPERATURE), "search.trials=4", "--plan", "--json")
    assert json.loads(as_json.stdout)["searches"] == [{"round": 1, "trials": 4}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search.trials=0",), "command line: search.trials: Input should be greater than or equal to 1, found 0"),
        (("search.sampler=tpa",), "command line: search.sampler: Input should be 'tpe', 'random' or 'grid'"),
        (("operator.name=mean",), "search.parameters.operator.temperature: operator mean has no 'temperature'"),
    ],
)
def test_bad_input_is_an_error_with_exit_code_2(
    call: Call, write: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    for flags in ((), ("--plan",)):
        found = call("tune", write(TEMPERATURE), *arguments, *flags)
        assert (found.returncode, found.stdout) == (2, "")
        assert message in found.stderr
        assert "Traceback" not in found.stderr


def test_a_search_prints_its_trials_and_then_the_recipe(
    call: Call, write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("figures are not drawn here")

    monkeypatch.setattr(tune_outputs, "require_matplotlib", missing)
    found = call("tune", write({"operator.temperature": [2.0, 0.1]}, sampler="grid"))
    assert (found.returncode, found.stdout) == (0, "tune/search/best.yaml\n")
    assert "trial 2 of 2: " in found.stderr
    assert "report: tune/search/report.md" in found.stderr
    refused = call("tune", "search.yaml")
    assert refused.returncode == 2
    assert "--resume goes on with the search in it" in refused.stderr
    again = call("tune", "search.yaml", "--resume", "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "tune/search/best.yaml\n", "")
    as_json = json.loads(call("tune", "search.yaml", "--resume", "--json").stdout)
    assert as_json["best"] == read_json(tmp_path / "tune" / "search" / "tune.json")["best"]
    assert as_json["recipe"] == "tune/search/best.yaml"
