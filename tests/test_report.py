"""Reports of run folders as they come: whole, half, damaged, tiny, huge; of several runs; of comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compare_table_helpers import make_results
from manyshot import fault_points
from manyshot.errors import RunFolderError
from manyshot.report_build import Report, build_report, distinct_names
from manyshot.report_command import write_report
from manyshot.report_page import Figure, Section
from manyshot.run_lock import one_writer
from manyshot.rundir import PARTIAL, atomic_file
from report_helpers import LONG, FakeRun, task_names, write


def section(report: Report, name: str) -> Section:
    return next(one for one in report.page.sections if one.id == name)


def figure(report: Report, name: str) -> Figure:
    return section(report, name).figures[0]


def problems(report: Report) -> dict[str, str]:
    return {problem.file: problem.message for problem in report.page.problems}


def test_two_writers_of_a_report_share_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`manyshot report` while the run itself writes its report."""
    folder = FakeRun(tmp_path / "run").write()
    opened: list[Path] = []

    def other(point: str, path: Path) -> None:
        opened.extend([path] if point == "open" else [])
        if point == "fsync" and len(opened) == 1:
            write_report([folder])

    monkeypatch.setattr(fault_points, "LISTENERS", [other])
    result = write_report([folder])
    assert result.html.stat().st_size > 1000 and not list(folder.rglob(f"*{PARTIAL}"))
    assert len(opened) == len(set(opened)) > 3 and all(path.name.endswith(PARTIAL) for path in opened)


def test_a_report_that_was_killed_is_cleared_away_by_the_next_writer(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run").write()
    with pytest.raises(KeyboardInterrupt), atomic_file(folder / "report.html", "killed") as stream:
        (folder / "report.html.another.partial").write_text("half")  # whose writer is gone
        stream.write(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in folder.glob(f"*{PARTIAL}")] == ["report.html.another.partial"]
    with one_writer(folder):
        assert not list(folder.glob(f"*{PARTIAL}"))


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build_report([FakeRun(tmp_path_factory.mktemp("run") / "first", rounds=3).write()])


def test_a_whole_run_has_every_section_and_no_problem(whole: Report) -> None:
    assert not whole.page.problems
    assert [one.id for one in whole.page.sections] == [
        *("tasks", "losses", "weights", "kept", "drift", "rounds", "scores"),
    ]
    assert all(one.figures or one.sheets for one in whole.page.sections)
    assert len(figure(whole, "losses").charts) == 4
    assert [one.title for one in section(whole, "weights").figures] == ["Merging weights", "Loss gaps"]
    assert [chart.title for chart in section(whole, "drift").figures[1].charts] == ["round 1", "round 2", "round 3"]


def test_the_verdict_says_what_the_cards_say(whole: Report) -> None:
    subject = whole.blocks[0].subjects[0]
    shares = subject.model.normalized
    assert shares is not None and shares.average is not None and shares.worst is not None
    average, worst = f"{shares.average:.3f}", f"{shares.worst:.3f}"
    assert whole.page.verdict.startswith(f"The merged model reaches {average} of its experts' scores on average")
    assert f"{worst} on the worst task ({shares.worst_task}); merged once, " in whole.page.verdict
    assert [card.value for card in whole.page.cards[:2]] == [average, worst]
    assert [name for name, _ in whole.page.cards[0].beside] == ["merged once", "pretrained"]


def test_a_difference_is_told_with_its_interval(whole: Report) -> None:
    (note,) = [note for note in whole.page.notes if note.startswith("Against merging once")]
    models = {model.label: model for model in (one.model for one in whole.blocks[0].subjects)}
    rounds, once = (models[name].normalized for name in ("merged in 3 rounds", "merged once (post-hoc)"))
    assert rounds and once and rounds.average is not None and once.average is not None
    assert f"{rounds.average - once.average:+.3f} on average, 95 % interval" in note.replace("−", "-")


def test_loss_panels_hold_the_course_and_what_stands_still(whole: Report) -> None:
    data = figure(whole, "losses").charts[0].data
    assert data["x"] == ["0", "1", "2", "3"]
    assert data["level"] == ["merged once (post-hoc)", "pretrained", "experts (one per task)"]
    course = data["values"]["merged in 3 rounds"]
    assert course[0] == data["values"]["pretrained"][0]
    assert course == sorted(course, reverse=True)


def test_examples_stand_beside_each_other(whole: Report) -> None:
    first = whole.page.details[0].examples["math"][0]
    assert first.prompt == [("system", "Be brief."), ("user", "Say math.")]
    assert {answer.model: answer.text for answer in first.answers} == {
        "pretrained": "round_000 says math",
        "experts (one per task)": "expert says math",
        "merged once (post-hoc)": "post_hoc says math",
        "merged in 3 rounds": "round_003 says math",
    }
    assert {answer.score for answer in first.answers} <= {0.0, 1.0}


def test_what_guards_found_is_told(tmp_path: Path) -> None:
    folder = FakeRun(tmp_path / "run").write()
    found = {
        **{"kind": "weights_collapse", "round": 2, "tasks": ["math"], "found": "'math' has it all"},
        **{"means": "others are lost", "suggestions": ["operator.gap=relative"]},
    }
    write(folder / "round_001" / "guards.json", {"findings": []})
    write(folder / "round_002" / "guards.json", {"findings": [found, {"round": 2, "message": "plain words"}, "?"]})
    (details,) = build_report([folder]).page.details
    assert details.guarded
    assert [one.message for one in details.findings[:2]] == ["'math' has it all; others are lost", "plain words"]
    assert (details.findings[0].round, details.findings[0].suggestions) == (2, ["operator.gap=relative"])


# ---- runs that one would rather not have -----------------------------------------------------------------------------


def test_a_run_that_failed_half_way_says_where_and_shows_what_there_is(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", rounds=5, done=2)
    run.write()
    write(run.folder / "round_003" / "instruction" / "local_update.json", {})
    report = build_report([run.folder])
    assert "2 of 5 rounds are done; the next step is “round 3: math”" in report.page.verdict
    assert "So far, the merged model reaches" in report.page.verdict
    assert figure(report, "losses").charts[0].data["x"] == ["0", "1", "2"]
    assert not report.page.problems


def test_a_run_that_never_merged_says_so(tmp_path: Path) -> None:
    report = build_report([FakeRun(tmp_path / "run", done=0, post_hoc=False).write()])
    assert report.page.verdict.startswith("Not finished: 0 of 3 rounds are done; the next step is")
    assert not report.page.cards
    assert [one.id for one in report.page.sections if not one.figures and not one.sheets] == [
        *("losses", "weights", "kept", "drift", "rounds"),
    ]
    assert not report.page.problems


def test_a_run_before_its_first_step_has_nothing_but_its_recipe(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", done=0)
    run.write_heads()
    report = build_report([run.folder])
    assert "the next step is “measure pretrained”" in report.page.verdict
    assert not report.page.problems


def test_one_round_is_a_run_too(tmp_path: Path) -> None:
    report = build_report([FakeRun(tmp_path / "run", rounds=1, post_hoc=False).write()])
    assert report.blocks[0].subjects[0].name == "merged in one round"
    assert figure(report, "losses").charts[0].data["x"] == ["0", "1"]


def test_one_task_is_shown_without_radar_and_cosines(tmp_path: Path) -> None:
    report = build_report([FakeRun(tmp_path / "run", ["math"], rounds=1).write()])
    assert report.page.verdict == f"The merged model reaches {report.page.cards[0].value} of its expert's score."
    assert figure(report, "tasks").charts[0].kind == "points"
    assert [one.title for one in section(report, "drift").figures] == ["Drift"]
    assert report.page.cards[2].value == "0.000"


def test_forty_tasks_are_rows_and_heat_maps(tmp_path: Path) -> None:
    report = build_report([FakeRun(tmp_path / "run", task_names(40), rounds=2).write()])
    assert figure(report, "tasks").charts[0].kind == "points"
    assert figure(report, "weights").charts[0].kind == "heat"
    assert len(figure(report, "losses").charts) == 40


def test_experts_that_score_nothing_leave_shares_undefined(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.write()
    zero = {"metric": "exact_match", "score": 0.0, "stderr": 0.0, "num_examples": 40}
    write(run.folder / "experts" / "math" / "scores.json", {"math": zero})
    report = build_report([run.folder])
    assert any("the expert scores 0 there or was not measured: math." in note for note in report.page.notes)
    assert "math" in figure(report, "tasks").caption
    for task in run.tasks:
        write(run.folder / "experts" / task / "scores.json", {task: zero})
    report = build_report([run.folder])
    assert "has a multi-task loss of" in report.page.verdict
    assert "No expert scores above 0" in report.page.verdict


def test_a_run_without_experts_speaks_of_scores_and_losses(tmp_path: Path) -> None:
    report = build_report([FakeRun(tmp_path / "run", experts=False, post_hoc=False).write()])
    assert "has a multi-task loss of" in report.page.verdict
    assert [card.label for card in report.page.cards] == [
        *("Mean test score", "Lowest test score", "Drop", "Multi-task loss")
    ]
    assert "no experts to divide by" in figure(report, "tasks").caption


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("round_001/losses.json", None, "is missing"),
        ("round_001/merge.json", '{"kept_share": 0.', "damaged JSON"),
        ("round_001/loss_gap.json", "[1, 2]", "expected a JSON object, found list"),
        ("round_000/scores.json", "{}\x00", "damaged JSON"),
        (
            "round_002/losses.json",
            '{"math": {"loss": NaN}}',
            "no finite loss of instruction, math, multilingual, safety",
        ),
        ("experts/math/scores.json", '{"math": {"score": "high"}}', "no finite score of math"),
        ("experts/math/local_update.json", None, "is missing"),
        ("environment.json", "\udcff", "damaged"),
        ("scores.json", None, "is missing"),
    ],
)
def test_a_record_that_is_missing_or_damaged_is_named(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    folder = FakeRun(tmp_path / "run").write()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    report = build_report([folder])
    assert list(problems(report)) == [name]
    assert said in problems(report)[name]
    assert str(tmp_path) not in problems(report)[name]
    assert "1 record is missing or damaged" in " ".join(report.page.notes)
    write_report([folder])  # and all of it can be written


@pytest.mark.parametrize("value", [[], {}, "text", 7, None, [[1], {}], {"math": None}])
@pytest.mark.parametrize(
    "name",
    [
        *("round_001/losses.json", "round_001/merge.json", "round_001/loss_gap.json", "round_001/scores.json"),
        *("round_000/examples.json", "round_003/outputs.json", "experts/math/local_update.json", "environment.json"),
    ],
)
def test_a_record_of_another_form_does_not_end_the_report(tmp_path: Path, name: str, value: Any) -> None:
    folder = FakeRun(tmp_path / "run", num_test=4).write()
    write(folder / name, value)
    if isinstance(value, dict):
        whole = {
            "tasks": value,
            "weights": value,
            "loss_gaps": [value],
            "kept_by_tensor": 3,
            "drift": "far",
            "math": value,
        }
        write(folder / name, whole | {"packages": value, "base_model": 3, "task_vector_cosines": value})
    report = build_report([folder])
    assert report.page.verdict


@pytest.mark.parametrize("text", ["", "tasks: [", "just a text", "tasks: {a: {}}\nprotocol: {rounds: x}"])
def test_a_damaged_recipe_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    folder = FakeRun(tmp_path / "run").write()
    (folder / "recipe.yaml").write_text(text, "utf-8")
    with pytest.raises(RunFolderError, match=r"recipe\.yaml"):
        build_report([folder])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    for name, said in {"missing": "no such folder", "file": "is a file", ".": "holds no run"}.items():
        with pytest.raises(RunFolderError, match=said):
            build_report([tmp_path / name])


def test_many_long_texts_are_cut_to_fit_a_page(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", task_names(40), rounds=1, post_hoc=False, num_test=4)
    run.write()
    places = [run.folder / "round_000", run.folder / "round_001", *(run.folder / "experts" / t for t in run.tasks)]
    for place in places:
        outputs = json.loads((place / "outputs.json").read_text("utf-8"))
        for said in outputs.values():
            for one in said:
                one["output"] = LONG * 4
        write(place / "outputs.json", outputs)
    found = build_report([run.folder]).page.details[0].examples["math"][0]
    assert found.answers[0].text.endswith(f" … ({len(LONG * 4)} characters)")
    assert found.prompt[0] == ("system", "Be brief.")
    assert write_report([run.folder]).html.stat().st_size < 6e6


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    one = FakeRun(tmp_path / "one").write()
    two = FakeRun(tmp_path / "two", task_names(5), rounds=2, post_hoc=False, seed=1).write()
    report = build_report([one, two])
    assert report.page.kind == "runs"
    assert report.page.verdict.startswith("Best of 2 is ")
    assert [subject.name for subject in report.blocks[0].subjects] == ["one", "two"]
    assert report.blocks[0].tasks == task_names(5)
    assert figure(report, "losses").charts[4].data["values"]["one"] == [None] * 4
    assert [one.title for one in section(report, "kept").figures] == ["Coordinates kept: one", "Coordinates kept: two"]
    assert [details.name for details in report.page.details] == ["one", "two"]


def test_runs_with_the_same_experts_share_their_lines(tmp_path: Path) -> None:
    paths = [FakeRun(tmp_path / name, operator=name).write() for name in ("metis", "mean")]
    (block,) = build_report(paths).blocks
    assert [model.role for model in block.references] == ["pretrained", "experts"]
    other = FakeRun(tmp_path / "other", seed=5).write()
    (block,) = build_report([paths[0], other]).blocks
    assert [model.role for model in block.references] == []


def test_the_best_of_runs_is_told_by_what_all_of_them_have(tmp_path: Path) -> None:
    with_experts = FakeRun(tmp_path / "with").write()
    without = FakeRun(tmp_path / "without", experts=False, post_hoc=False).write()
    for task in task_names(4):
        losses = {task: {"loss": 0.01} for task in task_names(4)}
        write(without / "round_003" / "losses.json", losses)
    assert build_report([with_experts, without]).page.verdict.startswith(
        "Best of 2 is without: it has a multi-task loss"
    )


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/own")]) == ["x/run", "y/run", "y/own"]
    with pytest.raises(RunFolderError, match="given twice"):
        distinct_names([Path("/a/run"), Path("/a/b/../run")])


def test_a_problem_of_one_of_several_runs_names_the_run(tmp_path: Path) -> None:
    paths = [FakeRun(tmp_path / name).write() for name in ("one", "two")]
    (paths[1] / "round_001" / "merge.json").unlink()
    assert list(problems(build_report(paths))) == ["two/round_001/merge.json"]


# ---- comparisons -----------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "grid"
    write(folder / "results.json", make_results())
    write(folder / "environment.json", {"command": "manyshot compare grid.yaml", "packages": {"torch": "2.13.0"}})
    (folder / "compare.yaml").write_text("models: [small]\n", "utf-8")
    return folder


def test_a_comparison_shows_methods_as_runs_are_shown(comparison: Path) -> None:
    report = build_report([comparison])
    assert report.page.kind == "comparison"
    assert [block.title for block in report.blocks] == [
        *("small, task set four", "large, task set four", "small, task set seven")
    ]
    main = report.blocks[0]
    assert [model.role for model in main.references] == ["pretrained", "experts"]
    assert "METIS, many-shot" in [subject.name for subject in main.subjects]
    assert report.page.verdict.startswith("Best of 10 is METIS, many-shot: it reaches ")
    assert "±" in report.page.verdict  # three seeds
    metis = main.subject("METIS, many-shot")
    assert metis is not None and metis.detailed and metis.once == "METIS, post-hoc"
    assert [index for index, _ in metis.path] == [1, 2, 3]
    assert "Joint fine-tuning" in [subject.name for subject in main.subjects]
    assert report.page.tables


def test_cells_that_are_not_done_are_told(comparison: Path) -> None:
    report = build_report([comparison])
    said = [problem.message for problem in report.page.problems]
    assert any("TIES, many-shot, seed 1 failed (out of memory in round 2)" in line for line in said)
    assert any("seed 2 is missing for " in line and "TIES, post-hoc" in line for line in said)
    cells = make_results()["cells"]
    done = sum(cell["status"] == "done" for cell in cells)
    assert report.page.details[0].stopped == f"{done} of {len(cells)} cells are done"
    assert f"{report.page.details[0].name} is not finished: {done} of {len(cells)} cells are done." in report.page.notes


def test_a_comparison_keeps_the_report_of_its_own(comparison: Path, tmp_path: Path) -> None:
    (comparison / "report.md").write_text("tables and figures", "utf-8")
    result = write_report([comparison])
    assert result.markdown is None
    assert (comparison / "report.md").read_text("utf-8") == "tables and figures"
    elsewhere = write_report([comparison], tmp_path / "elsewhere")
    assert elsewhere.markdown is not None and "METIS, many-shot" in elsewhere.markdown.read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged JSON"),
        ("{}", "format is None"),
        (json.dumps(make_results() | {"cells": [{"model": "small"}]}), "not the results of a comparison"),
        (re.sub('"round": [0-9]+', '"round": 18446744073709551616', json.dumps(make_results())), "not the results"),
        (json.dumps(make_results() | {"references": 3}), "not the results of a comparison"),
    ],
)
def test_damaged_results_are_an_error_that_names_them(comparison: Path, content: str, said: str) -> None:
    (comparison / "results.json").write_text(content, "utf-8")
    with pytest.raises(RunFolderError, match=rf"results\.json.*{said}"):
        build_report([comparison])


def test_a_comparison_does_not_stand_beside_runs(comparison: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="give it alone"):
        build_report([comparison, FakeRun(tmp_path / "run").write()])


def test_a_comparison_of_one_model_shows_examples(comparison: Path) -> None:
    results = make_results()
    for key in ("cells", "references"):
        results[key] = [one for one in results[key] if one["model"] == "small"]
    results["models"] = ["small"]
    tasks = results["task_sets"]["four"]["tasks"]
    for cell in results["cells"]:
        cell["folder"] = f"{cell['method']}-{cell['protocol']}-{cell['seed']}"
    write(comparison / "results.json", results)

    def answer(folder: str, tasks: list[str], who: str, first: int) -> None:
        rows = [{"row": first + i, "output": f"{who} {i}", "score": 1.0} for i in range(3)]
        write(comparison / folder / "test" / "outputs.json", dict.fromkeys(tasks, rows))

    for protocol in ("many_shot", "post_hoc"):
        answer(f"trials/metis-{protocol}-0", tasks, protocol, 5)
    for task in tasks:
        answer(f"references/{task}-expert-1", [task], "expert", 5)
        for key, first in (("0", 40), ("1", 5)):  # of another seed, with another test split; of this one
            answer(f"references/{task}-{key}", [task], f"pretrained {key}", first)
            asked = [{"row": first, "prompt": f"prompt {key}", "reference": "r"}]
            kept = {task: {"kind": "generate", "examples": asked}}
            write(comparison / "references" / f"{task}-{key}" / "test" / "examples.json", kept)
    (example,) = build_report([comparison]).page.details[0].examples["math"]
    assert (example.prompt, example.reference) == ([("", "prompt 1")], "r")
    assert {answer.model: answer.text for answer in example.answers} == {
        "pretrained": "pretrained 1 0",
        "experts (one per task)": "expert 0",
        "METIS, post-hoc": "post_hoc 0",
        "METIS, many-shot": "many_shot 0",
    }
