"""What a report says of rounds beside their weights: steps, line search, outer steps, failures, costs."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from manyshot.report_build import Report, build_report
from manyshot.report_data import Block, Details, Example, Model, Role, Shares, Subject
from manyshot.report_examples import MOST_BYTES, fitted
from manyshot.report_figures import cosines, models_of, series_of
from manyshot.report_html import render
from manyshot.report_markdown import render_markdown
from manyshot.report_page import Section
from manyshot.report_read import outer_steps, settings_of
from manyshot.rundir import append_line, read_json
from report_helpers import HOSTILE, FakeRun, task_names, write


def rounds(report: Report) -> Section:
    return next(one for one in report.page.sections if one.id == "rounds")


def change(path: Path, **values: Any) -> None:
    write(path, read_json(path) | values)


def with_recipe(folder: Path, **sections: dict[str, Any]) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")


def test_rounds_are_told_with_what_is_known_of_them(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    (sheet,) = rounds(build_report([folder])).sheets
    assert sheet.headers == ("round", "steps a task", "kept", "mean drift", "distance")
    assert sheet.rows[1][:3] == ("2", "10", "0.700")
    assert rounds(build_report([folder])).figures == ()


def test_steps_that_tasks_share_out_are_drawn(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    change(folder / "round_002" / "math" / "local_update.json", steps=16)
    change(folder / "round_002" / "safety" / "local_update.json", steps=4)
    section = rounds(build_report([folder]))
    assert [row[1] for row in section.sheets[0].rows] == ["10", "4 … 16"]
    (figure,) = section.figures
    assert figure.charts[0].kind == "stack"
    assert figure.charts[0].data["values"]["math"] == [10.0, 16.0]
    assert ("safety", "10.000", "4.000") in figure.sheet.rows


def test_a_line_search_shows_what_it_tried_and_what_it_chose(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    points = [{"scaling": 1.0, "objective": 0.5, "losses": {}}, {"scaling": 0.5, "objective": 0.25, "losses": {}}]
    change(folder / "round_001" / "merge.json", line_search={"objective": "average", "scaling": 0.5, "points": points})
    section = rounds(build_report([folder]))
    assert section.sheets[0].headers[3:4] == ("scaling",)
    assert [row[3] for row in section.sheets[0].rows] == ["0.500", ""]
    (figure,) = section.figures
    (chart,) = figure.charts
    assert chart.title == "round 1: 0.500"
    assert (chart.data["x"], list(chart.data["values"].values())) == (["0.5", "1"], [[0.25, 0.5]])
    assert "scaling 0.500 was chosen" in chart.label


def test_outer_steps_and_settings_of_a_recipe_are_shown(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    merge = {"reference": "start", "outer_optimizer": "nesterov", "outer_momentum": 0.7, "outer_step_size": [1.0, 0.5]}
    with_recipe(folder, merge=merge, local_update={"optimizer_state": "kept"}, protocol={"allocation": "gap"})
    change(folder / "round_001" / "loss_gap.json", effective_tasks=2.5)
    change(folder / "round_001" / "merge.json", update_norm=0.125)
    report = build_report([folder])
    (sheet,) = rounds(report).sheets
    assert sheet.headers == (
        *("round", "steps a task", "effective tasks", "kept", "outer step", "mean drift", "update", "distance"),
    )
    assert [row[4] for row in sheet.rows] == ["1.000", "0.500"]
    assert (sheet.rows[0][2], sheet.rows[0][6]) == ("2.50", "0.125")
    for text in (render(report.page, "0"), render_markdown(report.page).replace("\\", "")):
        assert "outer_optimizer nesterov" in text
        assert "optimizer_state kept" in text
        assert "allocation gap" in text
        assert "rounds 2, local_steps 20" in text and "metis, temperature 2.0" in text


def test_outer_steps_of_merges_from_the_pretrained_model_are_none() -> None:
    assert outer_steps({"merge": {"reference": "pretrained", "outer_step_size": 1.0}}, 2) == {}
    assert outer_steps({"merge": {"reference": "start", "outer_step_size": 0.5}}, 2) == {1: 0.5, 2: 0.5}
    assert outer_steps({"merge": [3]}, 2) == {}


def test_settings_leave_out_what_is_off() -> None:
    recipe = {
        "operator": {"name": "ties", "density": [0.2, 0.1], "mask": False, "x": None},
        "merge": "?",
        "protocol": 3,
    }
    assert settings_of(recipe) == {"operator": "ties, density 0.2 0.1, mask false", "merge": "?"}


def test_tasks_left_out_and_merges_taken_back_are_told(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    (folder / "round_001" / "math" / "local_update.json").unlink()
    write(folder / "round_001" / "math" / "failure.json", {"message": f"out of memory {HOSTILE}", "skipped": True})
    write(folder / "round_002" / "rollback.json", {"multi_task_loss": {"start": 1.5, "merged": 2.25}})
    report = build_report([folder])
    assert not report.page.problems
    (sheet,) = rounds(report).sheets
    assert f"Round 1: went on without math: out of memory {HOSTILE}." in sheet.notes
    assert any("the multi-task loss would have gone from 1.500 to 2.250" in note for note in sheet.notes)
    assert "<img" not in render_markdown(report.page)


def test_a_local_update_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=2).write()
    (folder / "round_001" / "math" / "local_update.json").unlink()
    assert [problem.file for problem in build_report([folder]).page.problems] == ["round_001/math/local_update.json"]


# ---- a run that failed -----------------------------------------------------------------------------------------------


def test_a_run_that_failed_says_with_what(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=3, done=1).write()
    failed = {"kind": "failed", "error": f"round 2, task 'math': the loss is NaN\n{HOSTILE}.", "time": 2000.0}
    append_line(folder / "metrics.jsonl", failed)
    report = build_report([folder])
    assert report.page.verdict.startswith(
        "Not finished: 1 of 3 rounds is done; the next step is “round 2: instruction”; it ended with: round 2, task "
        "'math': the loss is NaN </script>"
    )
    assert "<img" not in render_markdown(report.page)
    append_line(folder / "metrics.jsonl", {"kind": "begin", "time": 2100.0})  # it goes on
    assert "ended with" not in build_report([folder]).page.verdict


def test_a_long_error_is_cut(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run", rounds=3, done=1).write()
    append_line(folder / "metrics.jsonl", {"kind": "failed", "error": "e" * 1000, "time": 2000.0})
    assert "e" * 300 + " …" in build_report([folder]).page.verdict
    assert "e" * 301 not in build_report([folder]).page.verdict


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_every_phase_says_its_time_tokens_memory_and_disk(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", rounds=1)
    folder = run.write()
    line = run.phase("local_update", 1, "math", 1.0, tokens=10) | {"memory": 3 * 2**30, "gpu_memory": 5 * 2**30}
    append_line(folder / "metrics.jsonl", line)
    write(folder / "round_001" / "outer_state.safetensors", "x" * 999_998)
    (phases, disk) = build_report([folder]).page.costs.sheets
    assert phases.headers == (
        *("phase", "seconds", "times", "tokens", "tokens/s", "peak GiB", "GPU peak GiB", "disk MB"),
    )
    by_name = {row[0]: row for row in phases.rows}
    assert by_name["training"][5:] == ("3.00", "5.00", "")
    assert by_name["merging"][5:] == ("2.00", "", "1.0")
    assert by_name["validation losses"][5:] == ("2.00", "", "")
    assert float(by_name["test scores"][7]) >= 0 and float(by_name["saving"][7]) >= 0
    assert disk.headers == ("what", "written by", "MB")
    assert ("outer optimizer's state", "merging", "1.0") in disk.rows
    assert any(note.startswith("GPU peak") for note in phases.notes)


def test_a_file_that_is_gone_a_moment_later_does_not_end_a_report(tmp_path: Path, monkeypatch: Any) -> None:
    folder = FakeRun(tmp_path / "run", rounds=1).write()
    walk = __import__("os").walk
    monkeypatch.setattr(
        "manyshot.report_resources.os.walk",
        lambda path: ((place, folders, [*files, "gone.partial"]) for place, folders, files in walk(path)),
    )
    assert build_report([folder]).page.costs.sheets


# ---- what fits into a page -------------------------------------------------------------------------------------------


def shown_examples(num_tasks: int, text: str, num_examples: int = 4) -> list[Details]:
    """Details of one run with so many examples of one text each."""
    examples = [Example(i, [("user", text)], "", []) for i in range(num_examples)]
    found = {f"task-{i}": examples for i in range(num_tasks)}
    return [Details("run", None, 1, "mean", "base", [0], "", "", {}, {}, examples=found)]


def test_texts_are_cut_by_the_room_that_they_take_in_html() -> None:
    (one,) = fitted(shown_examples(2, '"' * 200_000))  # five bytes each, as &#34; is written
    texts = [example.prompt[0][1] for found in one.examples.values() for example in found]
    assert sum(len(escape(text).encode()) for text in texts) < MOST_BYTES * 1.01
    assert texts[0].endswith(" … (200000 characters)")
    kept = shown_examples(2, "short")
    assert fitted(kept) == kept


def test_many_tasks_show_fewer_examples_each_and_at_least_one() -> None:
    (one,) = fitted(shown_examples(300, "short"))
    assert {len(found) for found in one.examples.values()} == {2}
    (one,) = fitted(shown_examples(1000, "short"))
    assert {len(found) for found in one.examples.values()} == {1}


def test_cosines_share_the_room_of_a_page(tmp_path: Path) -> None:
    subject = build_report([FakeRun(tmp_path / "run", task_names(5), rounds=3).write()]).blocks[0].subjects[0]
    every, last = cosines(subject, task_names(5)), cosines(subject, task_names(5), 60)
    assert every is not None and last is not None
    assert [chart.title for chart in last.charts] == ["round 2", "round 3"]
    assert "Only the last 2 of 3 rounds" in last.caption and len(every.charts) == 3
    assert cosines(subject, task_names(5), 20) is None


def many_models(num_others: int) -> Block:
    """A block whose best subject is `best`, merged once as `once`, beside others and references."""

    def subject(name: str, role: Role, average: float, once: str | None = None) -> Subject:
        shares = Shares({}, average, average, None, 0.0)
        return Subject(Model(name, role, {}, {}, shares), [], [], once=once)

    others = [subject(f"other {i}", "merged", 0.1) for i in range(num_others)]
    subjects = [*others, subject("once", "post_hoc", 0.2), subject("best", "other", 0.9, "once")]
    references = [Model(name, name, {}, {}) for name in ("pretrained", "experts")]  # type: ignore[arg-type]
    return Block("b", [], [], references, subjects, {}, "")


def test_of_many_models_those_are_shown_first_that_the_verdict_speaks_of() -> None:
    few, many = (series_of(models_of(block), block) for block in map(many_models, (4, 5)))
    assert all(one.shown for one in few)
    assert {one.name: one.role for one in many if one.shown} == {
        **{"pretrained": "pretrained", "experts": "experts", "once": "post_hoc", "best": "merged"},
    }
    assert [(one.role, one.place) for one in many if not one.shown] == [("other", i) for i in range(5)]


# ---- what is not ours to say -----------------------------------------------------------------------------------------


def test_names_of_runs_are_text_in_markdown(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>`*_[a](b)"
    paths = [FakeRun(tmp_path / name, task_names(2), rounds=1).write() for name in (hostile, "two")]
    text = render_markdown(build_report(paths).page)
    assert "<img" not in text and "[a](b)" not in text
    assert text.count("No guards were recorded") == 2
