"""A run as people watch it: read from its folder alone, while it goes on, when it has ended, and when it has died."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyshot import cli_live
from manyshot.cli_live import LiveView, cell_text, fitting, follow, live_screen, visible
from manyshot.errors import RunFolderError
from manyshot.live_estimate import Speed, seconds_left
from manyshot.live_metrics import Doing, MetricsTail, doing
from manyshot.live_state import Cell, LiveRun, LiveState, Row, to_json
from manyshot.live_text import duration, totals, troubles
from manyshot.process_mark import is_alive, process_mark
from manyshot.progress import Event, Progress, wall_seconds
from manyshot.rundir import RunFolder, append_line, read_json, read_lines, write_json
from manyshot.runner import run
from manyshot.status import Step, planned_steps, read_outline, run_status
from run_helpers import Runs

PAIR = ("letters", "numbers")
SMALL = ("evaluation.experts=true", "evaluation.post_hoc=true", "protocol.local_steps=4")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("live"), tasks=PAIR)


@pytest.fixture(scope="module")
def seen(runs: Runs) -> tuple[Path, list[tuple[Event, LiveState]], str]:
    """A run with everything in it: what the live state was at each of its events, and what a terminal got to see."""
    folder, found, written = runs.new_folder(), [], io.StringIO()
    view = LiveView(Console(file=written, force_terminal=True, width=140, height=40), folder)

    def listen(event: Event) -> None:
        view.listen(event)
        if event.kind != "message":
            found.append((event, LiveRun(folder).read()))
        view.live.refresh()

    run(runs.recipe(*SMALL), folder, listener=listen)
    view.close()
    return folder, found, written.getvalue()


def test_live_state_of_a_finished_run_has_what_its_files_say(seen: Any) -> None:
    folder = seen[0]
    state = LiveRun(folder).read()
    rows = {row.name: row for row in state.rows}
    assert list(rows) == ["pretrained", "experts", "post_hoc", "round 1", "round 2"]
    for r in (1, 2):
        place = folder / f"round_00{r}"
        losses, gaps = read_json(place / "losses.json"), read_json(place / "loss_gap.json")
        for task in PAIR:
            cell = rows[f"round {r}"].cells[task]
            assert (cell.loss, cell.gap) == (losses[task]["loss"], gaps["loss_gaps"][task])
            assert (cell.weight, cell.expert_loss) == (gaps["weights"][task], gaps["expert_losses"][task]["loss"])
    assert rows["round 2"].mean_loss == pytest.approx(sum(losses[task]["loss"] for task in PAIR) / 2)
    assert (state.finished, state.next, state.left, state.doing) == (True, None, 0.0, None)
    assert state.steps_done == state.steps == len(planned_steps(RunFolder(folder), read_outline(RunFolder(folder))))


def test_live_state_grows_with_the_run(seen: Any) -> None:
    _, found, _ = seen
    done = [state.steps_done for _, state in found]
    assert done == sorted(done) and done[0] == 0 and done[-1] == found[-1][1].steps
    trainings = [(event, state) for event, state in found if (event.kind, event.phase) == ("start", "local_update")]
    # experts first, then the rounds: the step that is next is the one that an event is about
    assert [state.next.model for _, state in trainings] == ["experts"] * 2 + ["round 1"] * 2 + ["round 2"] * 2
    assert all(event.task == state.next.task == state.doing.task for event, state in trainings)
    assert all(state.alive for _, state in found)


def test_live_state_estimates_the_time_left_as_soon_as_everything_was_seen_once(seen: Any) -> None:
    _, found, _ = seen
    left = [(event, state.left) for event, state in found]
    first = next(i for i, (event, _) in enumerate(left) if (event.kind, event.phase) == ("end", "local_update"))
    assert left[0][1] is None
    assert all(one is not None and one >= 0 for _, one in left[first:])
    assert left[-1][1] == 0.0
    assert left[first][1] > left[-2][1]


def test_speeds_are_told_apart_by_who_was_trained(seen: Any) -> None:
    folder = seen[0]
    rows = {row.name: row for row in LiveRun(folder).read().rows}
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line.get("phase") == "local_update"]
    ended = [line for line in lines if line["kind"] == "phase"]
    expected = [line["tokens"] / line["seconds"] for line in ended]
    found = [rows[name].cells[task].tokens_per_second for name in ("experts", "round 1", "round 2") for task in PAIR]
    assert found == expected


def test_live_view_shows_the_table_and_what_goes_on(seen: Any) -> None:
    folder, _, written = seen
    final = written[written.rindex("metis, 2 rounds") :]
    for name in ("pretrained", "experts", "post-hoc", "round 1", "round 2", "letters", "numbers", "tok/s"):
        assert name in final
    weight = read_json(folder / "round_002" / "loss_gap.json")["weights"]["letters"]
    assert f" {weight:.2f}" in final
    assert "experts, letters: training" in written and "round 2, numbers: training" in written
    assert "about" in written and "left" in written
    assert "weights letters" in written  # what the run says stands above the table


def test_live_view_shows_names_from_a_run_as_they_are(runs: Runs, seen: Any) -> None:
    state = LiveRun(seen[0]).read()
    strange = "[red]x[/red]"
    outline = replace(state.outline, tasks=[strange])
    rows = [Row("pretrained", {strange: Cell(1.0)})]
    written = io.StringIO()
    console = Console(file=written, width=120)
    console.print(live_screen(replace(state, outline=outline, rows=rows), None, console))
    assert strange in written.getvalue()


def test_live_view_shows_steps_and_loss_of_what_goes_on_and_messages_as_they_are(seen: Any) -> None:
    written = io.StringIO()
    view = LiveView(Console(file=written, force_terminal=True, width=120, height=40), seen[0])
    view.listen(Event("message", "message", text="weights [bold]math[/bold] 0.5"))
    view.listen(Event("start", "local_update", 2, "letters", total=10))
    view.listen(Event("advance", "local_update", 2, "letters", 7, 10, loss=1.25))
    assert view.state is not None
    unfinished = replace(view.state, next=step("train", "round 2", "letters"), finished=False, left=90.0)
    view.state = unfinished
    view.live.refresh()
    view.close()
    shown = written.getvalue()
    assert "weights [bold]math[/bold] 0.5" in shown
    assert "round 2, letters: training" in shown and "7/10" in shown and "loss 1.250" in shown
    assert "about 1 min 30 s left" in shown


def test_wide_tables_show_less_of_a_cell_then_fewer_tasks() -> None:
    tasks = [f"task_{i}" for i in range(11)]
    assert fitting(tasks[:4], 140) == (tasks[:4], 16)
    assert fitting(tasks[:4], 80) == (tasks[:4], 11)
    assert fitting(tasks[:4], 79) == (tasks[:4], 7)
    shown, width = fitting(tasks, 80)
    assert (len(shown), width) == (5, 7)
    assert cell_text(Cell(1.0, 0.5, 0.25, 0.125), 3) == "1.000 +0.25 0.12"
    assert cell_text(Cell(1.0, 0.5, 0.25, 0.125), 1) == "1.000"
    assert (cell_text(Cell(None, 0.5), 3), cell_text(Cell(), 3)) == ("→ 0.500", "·")


@pytest.mark.parametrize("height", [4, 7, 12, 40])
@pytest.mark.parametrize("going_on", ["pretrained", "round 1", "round 9", "round 30", None])
def test_tall_tables_keep_the_first_row_and_the_one_that_goes_on(height: int, going_on: str | None) -> None:
    rows = [Row(name, {}) for name in ("pretrained", *(f"round {r}" for r in range(1, 31)))]
    shown = visible(rows, going_on, height)
    names = [row.name for row in shown if row is not None]
    assert names[0] == "pretrained" and (going_on or "round 30") in names
    assert names == sorted(names, key=[row.name for row in rows].index)
    assert len(names) <= height and len(shown) <= height + 2


# ---- metrics while they grow -----------------------------------------------------------------------------------------


def test_tail_waits_for_the_end_of_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text('{"kind": "begin", "time": 1}\n{"kind": "sta', "utf-8")
    assert [line["kind"] for line in tail.read()] == ["begin"]
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('rt", "time": 2}\n')
    assert [line["kind"] for line in tail.read()] == ["begin", "start"]
    # a line that a crash cut off, closed by the run that went on
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"kind": "pha')
    append_line(path, {"kind": "end", "time": 3})
    assert [line["kind"] for line in tail.read()] == ["begin", "start", "end"]
    path.unlink()
    append_line(path, {"kind": "begin", "time": 9})
    assert [line["time"] for line in tail.read()] == [9]


def test_doing_is_the_phase_that_has_not_ended() -> None:
    start = {"kind": "start", "phase": "local_update", "round": 2, "task": "math", "total": 10, "time": 5.0}
    beat = {"kind": "advance"} | {key: start[key] for key in ("phase", "round", "task", "total")}
    beats = [beat | {"done": done, "loss": 1.5, "time": 5.0 + done} for done in (3, 7)]
    end = {"kind": "phase", "phase": "local_update", "time": 20.0}
    assert doing([start]) == Doing("local_update", 2, "math", 0, 10, None, 5.0)
    assert doing([start, *beats]) == Doing("local_update", 2, "math", 7, 10, 1.5, 5.0)
    assert doing([start, *beats, end]) is doing([]) is None


def test_long_phases_say_now_and_then_that_they_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr("manyshot.progress.time.monotonic", lambda: next(clock))
    path = tmp_path / "metrics.jsonl"
    with Progress(metrics=path).timed("local_update", 1, "math", total=20) as timed:
        for _ in range(20):
            timed.tick(1, 0.5)
    lines = read_lines(path)
    beats = [line["done"] for line in lines if line["kind"] == "advance"]
    assert 2 <= len(beats) <= 5 and beats == sorted(beats)
    assert [line["kind"] for line in lines if line["kind"] != "advance"] == ["start", "phase"]


def test_wall_seconds_leave_out_the_pause_before_a_resume() -> None:
    lines = [
        {"kind": "begin", "began": 10.0, "time": 12.0},
        {"kind": "phase", "time": 20.0},
        {"kind": "begin", "began": 100.0, "time": 101.0},
        {"kind": "end", "time": 130.0},
    ]
    assert wall_seconds(lines) == 10.0 + 30.0
    assert wall_seconds([]) == 0.0


# ---- the time left ---------------------------------------------------------------------------------------------------

PLAN = {
    "steps": {"a": [4, 2], "b": [4, 4]},
    "expert_steps": {"a": 6, "b": 8},
    "tokens_per_step": {"a": 100.0, "b": 50.0},
    "validation": {"a": 10, "b": 30},
    "test": {"a": 5, "b": 5},
}


def phase(name: str, task: str, seconds: float, **values: Any) -> dict[str, Any]:
    return {"kind": "phase", "phase": name, "round": 1, "task": task, "seconds": seconds, "time": 0.0} | values


def step(kind: Any, model: str = "round 1", task: str = "") -> Step:
    return Step("step", model, kind, Path("nowhere"), task)


def test_estimate_is_tokens_and_examples_over_the_speed_so_far() -> None:
    lines = [
        phase("load", "", 1.0),
        phase("load", "a", 3.0),
        phase("local_update", "a", 8.0, tokens=400),
        phase("validation", "a", 2.0),
        phase("score", "a", 1.5),
        phase("save", "a", 0.5),
    ]
    speed = Speed(lines, PLAN, None, 0.0)
    # load 2 on average; 4 steps × 100 tokens at 0.02 s; save; validation as before
    assert speed.step(step("train", task="a"), "ab") == pytest.approx(2 + 8 + 0.5 + 2)
    # b: 4 × 50 tokens at a's speed, 30 examples at a's 0.2 s
    assert speed.step(step("train", task="b"), "ab") == pytest.approx(2 + 4 + 0.5 + 6)
    assert speed.step(step("train", "round 2", "a"), "ab") == pytest.approx(2 + 4 + 0.5 + 2)
    assert speed.step(step("train", "experts", "b"), "ab") == pytest.approx(2 + 8 + 0.5 + 6)
    assert speed.step(step("measure"), "ab") == pytest.approx(2 + (2 + 6) + (1.5 + 1.5))
    assert speed.step(step("measure", "experts", "b"), "ab") == pytest.approx(2 + 1.5)
    left = seconds_left([step("train", task="b"), step("measure")], "ab", speed, reused=False, spent=4.0)
    assert left == pytest.approx(12.5 - 4 + 13)
    # an expert that is the round's own is not trained again, and a step cannot be more than over
    assert seconds_left([step("train", task="b")], "ab", speed, reused=True, spent=4.0) == 0.0
    assert seconds_left([], "ab", speed, reused=False, spent=0.0) == 0.0


def test_estimate_is_unknown_until_something_was_trained_and_then_takes_the_running_phase() -> None:
    lines = [phase("validation", "a", 2.0), phase("score", "a", 1.0)]
    assert Speed(lines, PLAN, None, 0.0).step(step("train", task="b"), "ab") is None
    now = Doing("local_update", 1, "a", 2, 4, 1.0, since=100.0)
    running = Speed(lines, PLAN, now, 110.0)
    # 2 steps × 100 tokens in 10 s; b has 4 × 50
    assert running.step(step("train", task="b"), "ab") == pytest.approx(10 + 6)
    assert Speed([], PLAN, now, 110.0).step(step("train", task="b"), "ab") is None


# ---- watching from elsewhere -----------------------------------------------------------------------------------------


@pytest.fixture
def halfway(seen: Any, tmp_path: Path) -> Path:
    """A folder as a run leaves it that goes on in this process: in the middle of training round 1's second task."""
    folder = tmp_path / "run"
    (folder / "round_001").mkdir(parents=True)
    (folder / "round_000").mkdir()
    for name in ("recipe.yaml", "round_000/losses.json", "round_000/scores.json"):
        (folder / name).write_bytes((seen[0] / name).read_bytes())
    for line in read_lines(seen[0] / "metrics.jsonl"):
        if line["kind"] in ("begin", "plan"):
            append_line(folder / "metrics.jsonl", line | {"time": time.time(), "process": process_mark()})
    start = {"kind": "start", "phase": "local_update", "round": 1, "task": "letters", "total": 2}
    append_line(folder / "metrics.jsonl", start | {"time": time.time()})
    return folder


def test_follow_ends_when_the_run_does(halfway: Path) -> None:
    shown: list[LiveState] = []

    def sleep(seconds: float) -> None:
        if len(shown) == 3:
            append_line(halfway / "metrics.jsonl", {"kind": "end", "time": time.time()})

    last = follow(halfway, shown.append, sleep=sleep)
    assert len(shown) == 3 and last.finished and shown[-1].alive
    assert shown[0].doing is not None and shown[0].doing.task == "letters"


def dead_mark() -> str:
    """The mark of a process that has ended."""
    code = "from manyshot.process_mark import process_mark; print(process_mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_is_known_by_its_number_and_when_it_started() -> None:
    host, number, started = process_mark().rsplit("/", 2)
    assert int(number) == os.getpid() and is_alive(process_mark()) is True
    assert is_alive(f"{host}/{number}/{int(started) - 1}") is False  # an older process that had this number
    assert is_alive(dead_mark()) is False
    assert is_alive(f"elsewhere/{number}/{started}") is is_alive("damaged") is is_alive(f"{host}/x/1") is None


def test_a_run_that_died_is_said_to_have_and_how_to_go_on(halfway: Path) -> None:
    lines = [line | {"time": line["time"] - 600} for line in read_lines(halfway / "metrics.jsonl")]
    (halfway / "metrics.jsonl").unlink()
    for line in lines:
        append_line(halfway / "metrics.jsonl", line | ({"process": dead_mark()} if line["kind"] == "begin" else {}))
    with open(halfway / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"kind": "advan')  # cut off in the middle of a line
    state = follow(halfway, lambda state: pytest.fail("there is nothing to wait for"))
    assert state.died and not state.finished and state.doing is None
    first, second = troubles(state)
    assert "10 min" in first and "process has ended" in first
    assert second.strip() == f"manyshot run {halfway}/recipe.yaml --resume --output {halfway}"
    assert to_json(state)["process"] == "ended"


def test_a_run_that_failed_says_with_what_though_its_process_lives(halfway: Path) -> None:
    append_line(halfway / "metrics.jsonl", {"kind": "failed", "error": "the loss is NaN", "time": time.time()})
    state = follow(halfway, lambda state: pytest.fail("there is nothing to wait for"))
    assert state.died and state.doing is None and to_json(state)["failure"] == "the loss is NaN"
    assert troubles(state) == [
        *("it ended with: the loss is NaN", "go on with:"),
        f"  manyshot run {halfway}/recipe.yaml --resume --output {halfway}",
    ]
    append_line(halfway / "metrics.jsonl", {"kind": "begin", "process": process_mark(), "time": time.time()})
    again = LiveRun(halfway).read()
    assert not again.died and again.failure is None and troubles(again) == []


def test_a_run_of_another_machine_that_is_silent_may_have_died(halfway: Path) -> None:
    state = LiveRun(halfway).read()
    assert not state.at_risk and troubles(state) == []
    far = replace(state, alive=None, last_activity=state.moment - 1000)
    assert far.at_risk and not far.died and "if its process has ended" in troubles(far)[0]
    assert not replace(far, last_activity=state.moment - 10).at_risk


def test_the_command_to_resume_goes_on_with_the_run(runs: Runs, tmp_path: Path) -> None:
    from manyshot.recipe_file import load_recipe

    folder = tmp_path / "a run"

    def stop(event: Event) -> None:
        if event.kind == "start" and event.phase == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe("protocol.rounds=1", "protocol.local_steps=1"), folder, listener=stop)
    command = to_json(LiveRun(folder).read())["resume"]
    assert command == f"manyshot run '{folder}/recipe.yaml' --resume --output '{folder}'"
    run(load_recipe(folder / "recipe.yaml"), folder, resume=True)
    assert LiveRun(folder).read().finished


def test_status_of_a_folder_without_a_run_or_with_a_damaged_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        LiveRun(tmp_path).read()
    (tmp_path / "recipe.yaml").write_text("tasks: [", "utf-8")
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: is not the recipe of a run"):
        run_status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_watch_prints_a_line_a_step_where_there_is_no_terminal(
    halfway: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        write_json(halfway / "round_001" / "letters" / "local_update.json", {"validation": {"loss": 0.5}})
        append_line(halfway / "metrics.jsonl", {"kind": "end", "time": time.time()})

    original = cli_live.follow
    monkeypatch.setattr(cli_live, "follow", lambda path, show: original(path, show, sleep=sleep))
    (halfway / "round_001" / "letters").mkdir()
    assert cli_live.watch_json(halfway)
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["finished"], last["finished"]) == (False, True)
    assert last["steps_done"] == first["steps_done"] + 1 and first["process"] == "running"
    assert totals(LiveRun(halfway).read()).endswith("finished")
