"""Reports as they come about: by the command, from Python, and at the end of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manyshot
from manyshot import runner
from manyshot.cli import app
from manyshot.errors import RunFolderError
from manyshot.progress import Event
from manyshot.report_command import write_report
from manyshot.rundir import read_json, read_lines
from report_helpers import FakeRun
from run_helpers import Runs


def test_command_writes_three_files_and_prints_the_verdict(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run").write()
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0
    verdict, path = done.stdout.splitlines()
    assert verdict.startswith("The merged model reaches ")
    assert path == str(folder / "report.html")
    assert all((folder / f"report.{ending}").stat().st_size > 1000 for ending in ("html", "md", "json"))


def test_command_prints_json_and_writes_where_it_is_told(tmp_path: Path) -> None:
    paths = [FakeRun(tmp_path / name).write() for name in ("one", "two")]
    output = tmp_path / "new" / "folder"
    done = CliRunner().invoke(app, ["report", *map(str, paths), "--output", str(output), "--json"])
    found = json.loads(done.stdout)
    assert {name: Path(found[name]) for name in ("html", "markdown", "data")} == {
        **{"html": output / "report.html", "markdown": output / "report.md", "data": output / "report.json"},
    }
    assert found["verdict"].startswith("Best of 2 is ")
    assert not (paths[0] / "report.html").exists()


def test_several_runs_need_a_folder_for_their_report(tmp_path: Path) -> None:
    paths = [FakeRun(tmp_path / name).write() for name in ("one", "two")]
    with pytest.raises(RunFolderError, match="--output FOLDER"):
        write_report(paths)


def test_a_report_that_cannot_be_written_says_which_file(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run").write()
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(RunFolderError, match="file: is a file"):
        write_report([folder], tmp_path / "file")
    with pytest.raises(RunFolderError, match="the report was not written"):
        write_report([folder], tmp_path / "file" / "below")


def test_python_has_the_same(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run").write()
    result = manyshot.report(folder)
    assert result == manyshot.report([str(folder)])
    assert result.html == folder / "report.html" and result.markdown == folder / "report.md"


def test_reports_are_made_without_torch() -> None:
    probe = "import sys, manyshot.report_command; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("runs"))


def test_a_run_ends_with_its_report(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []
    folder = runs.new_folder()
    result = runner.run(
        runs.recipe("evaluation.experts=true", "evaluation.post_hoc=true"), folder, listener=said.append
    )
    assert f"report: {folder / 'report.html'}" in [event.text for event in said]
    found = read_json(folder / "report.json")
    assert found["kind"] == "run" and found["details"][0]["problems"] == [] and found["details"][0]["stopped"] is None
    # the same numbers as in scores.json, though they are put together from the records of every step
    merged, once = (subject["model"] for subject in found["blocks"][0]["subjects"])
    for model, entry in ((merged, result.scores["rounds"]["2"]), (once, result.scores["post_hoc"])):
        for key in ("average", "worst", "worst_task", "drop"):
            assert model["normalized"][key] == entry["normalized"][key]
        assert model["losses"] == {task: one["loss"] for task, one in entry["losses"].items()}
    rounds = found["blocks"][0]["subjects"][0]["rounds"]
    assert [one["weights"] for one in rounds] == [entry["weights"] for entry in result.scores["rounds"].values()]
    assert [one["kept_share"] for one in rounds] == [entry["kept_share"] for entry in result.scores["rounds"].values()]
    examples = found["details"][0]["examples"]["letters"]
    assert len(examples) == 4 and {len(one["answers"]) for one in examples} == {4}
    assert all(answer["text"] in {*"abcdefghijz"} for one in examples for answer in one["answers"])  # choices in words
    assert found["details"][0]["phases"][0]["tokens"] > 0
    assert all(line["memory"] > 2**20 for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "phase")

    # the run is whole without its report
    def refuse(paths: list[Path]) -> None:
        raise RunFolderError("the disk is full")

    monkeypatch.setattr(runner, "write_report", refuse)
    said.clear()
    again = runner.run(
        runs.recipe("evaluation.experts=true", "evaluation.post_hoc=true"), folder, resume=True, listener=said.append
    )
    assert again.scores == result.scores
    assert any(event.text.startswith("warning: no report: the disk is full; manyshot report ") for event in said)


def test_a_run_that_fails_reports_what_there_is_and_why(runs: Runs) -> None:
    folder = runs.new_folder()

    def fail(event: Event) -> None:
        if event.kind == "start" and (event.phase, event.round_index) == ("merge", 2):
            raise RuntimeError("the disk has melted")

    with pytest.raises(RuntimeError, match="the disk has melted"):
        runner.run(runs.recipe(), folder, listener=fail)
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert (last["kind"], last["error"]) == ("failed", "RuntimeError: the disk has melted")
    found = read_json(folder / "report.json")
    assert found["verdict"].startswith(
        "Not finished: 1 of 2 rounds is done; the next step is “round 2: merge”; it ended"
    )
    assert "RuntimeError: the disk has melted" in found["verdict"] and found["details"][0]["problems"] == []
    first, second = found["blocks"][0]["subjects"][0]["rounds"]
    assert first["kept_share"] is not None and second["kept_share"] is None  # weighed, and not merged
    assert sum(second["weights"].values()) == pytest.approx(1)
    runner.run(runs.recipe(), folder, resume=True)
    assert read_json(folder / "report.json")["details"][0]["stopped"] is None
