"""A run as a table that fills up: in the terminal of the run itself, and of whoever watches it from elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from manyshot.live_metrics import Doing
from manyshot.live_state import Cell, LiveRun, LiveState, Row, to_json
from manyshot.live_text import doing_text, duration, shown, totals, troubles
from manyshot.status import run_status

if TYPE_CHECKING:
    from manyshot.progress import Event

# lines around the rounds: title, header, rules, what is going on, totals
FRAME_LINES = 8
# columns beside the tasks: name, mean, tokens/s
FRAME_COLUMNS = 28
# between two looks at a run elsewhere, in seconds
EVERY = 2.0
# how much of a cell is shown, from all of it to its loss alone
WIDTHS = (16, 11, 7)


class LiveView:
    """The table in the run's own terminal; what the run says appears above it."""

    def __init__(self, console: Console, output: Path) -> None:
        self.console = console
        self.run = LiveRun(output)
        self.state: LiveState | None = None
        self.now: Doing | None = None
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)
        self.live.start()

    def listen(self, event: Event) -> None:
        if event.kind == "message":
            self.say(event.text)
        elif event.kind == "advance":
            place = (event.phase, event.round_index, event.task)
            # with several tasks at once, another one may have told of its start or end meanwhile
            goes_on = self.now is not None and (self.now.phase, self.now.round_index, self.now.task) == place
            since = self.now.since if self.now is not None and goes_on else time.time()
            self.now = Doing(*place, event.done, event.total, event.loss, since)
        else:
            started = event.kind == "start" and event.total is not None
            place = (event.phase, event.round_index, event.task)
            self.now = Doing(*place, 0, event.total, None, time.time()) if started else None
            self.state = self.run.read()

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False)

    def close(self) -> None:
        """Take the table away and leave its last state."""
        if self.live.is_started:
            self.live.stop()
            if self.state is not None:
                self.console.print(live_table(self.state, self.console))

    def _render(self) -> RenderableType:
        if self.state is None:
            return Text("starting …")
        return live_screen(self.state, self.now, self.console)


def follow(
    path: Path, show: Callable[[LiveState], None], *, every: float = EVERY, sleep: Callable[[float], None] = time.sleep
) -> LiveState:
    """Look at a run until it has finished or died; returns its last state.

    Raises RunFolderError where the folder holds no run.
    """
    run = LiveRun(path)
    state = run.read()
    while not state.finished and not state.died:
        show(state)
        sleep(every)
        state = run.read()
    return state


def watch(path: Path, console: Console) -> bool:
    """Show a run until it has finished (true) or died: a table on a terminal, a line for every step elsewhere."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            state = follow(path, lambda state: live.update(live_screen(state, state.doing, console), refresh=True))
    else:
        said: set[int] = set()

        def say(state: LiveState) -> None:
            if state.steps_done not in said:
                said.add(state.steps_done)
                print(f"{state.folder}: {totals(state)}", flush=True)

        state = follow(path, say)
    console.print(live_screen(state, None, console))
    return state.finished


def watch_json(path: Path) -> bool:
    """The same as JSON lines, one whenever a step is done."""
    said: set[tuple[int, bool]] = set()

    def say(state: LiveState) -> None:
        if (state.steps_done, state.finished) not in said:
            said.add((state.steps_done, state.finished))
            print(json.dumps(run_status(path) | to_json(state)), flush=True)

    state = follow(path, say)
    say(state)
    return state.finished


# ---- what it looks like ----------------------------------------------------------------------------------------------


def live_screen(state: LiveState, now: Doing | None, console: Console) -> RenderableType:
    """The table, what is going on, and how long it may still take."""
    lines: list[RenderableType] = [live_table(state, console)]
    if now is not None and state.next is not None:
        lines.append(_bar(now, state.next.model))
    lines.append(Text(totals(state)))
    lines += [Text(line, style="yellow") for line in troubles(state)]
    return Group(*lines)


def _bar(now: Doing, model: str) -> RenderableType:
    grid = Table.grid(*(Column(no_wrap=True) for _ in range(5)), padding=(0, 1))
    parts: list[RenderableType] = [Text(doing_text(now, model))]
    if now.total:
        parts += [ProgressBar(total=now.total, completed=now.done, width=20), Text(f"{now.done}/{now.total}")]
    if now.loss is not None:
        parts.append(Text(f"loss {now.loss:.3f}"))
    parts.append(Text(duration(time.time() - now.since)))
    grid.add_row(*parts)
    return grid


def live_table(state: LiveState, console: Console) -> Table:
    """Models × tasks: validation loss, loss gap and weight, as much of that as the terminal has room for."""
    tasks, width = fitting(state.outline.tasks, console.width)
    parts = ("loss", "gap", "weight")[: 3 - WIDTHS.index(width)]
    caption = f"validation {', '.join(parts)}"
    if hidden := len(state.outline.tasks) - len(tasks):
        caption += f"; {hidden} more task{'s need' if hidden > 1 else ' needs'} a wider terminal"
    if any(row.findings for row in state.rows):
        caption += "; !: see guards.json of the round"
    title = f"{state.folder}: {state.outline.operator}, {state.outline.rounds} rounds"
    table = Table(title=Text(title), caption=Text(caption), box=None, header_style="bold underline")
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for task in tasks:
        table.add_column(Text(task, overflow="ellipsis"), justify="right", no_wrap=True, max_width=width)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("tok/s", justify="right", no_wrap=True)
    going_on = state.next.model if state.next and not state.finished else None
    for row in visible(state.rows, going_on, console.height - FRAME_LINES):
        if row is None:
            table.add_row("…")
            continue
        cells = [Text(cell_text(row.cells[task], len(parts))) for task in tasks]
        sums = [number(row.mean_loss), "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"]
        name = shown(row.name) + (" !" if row.findings else "")
        table.add_row(Text(name), *cells, *sums, style="bold" if row.name == going_on else None)
    return table


def fitting(tasks: Sequence[str], width: int) -> tuple[Sequence[str], int]:
    """The tasks that fit beside the row's name and its sums, and how wide their cells may be."""
    room = width - FRAME_COLUMNS
    for cell in WIDTHS:
        if len(tasks) * (cell + 2) <= room:
            return tasks, cell
    return tasks[: max(1, room // (WIDTHS[-1] + 2))], WIDTHS[-1]


def visible(rows: Sequence[Row], going_on: str | None, height: int) -> list[Row | None]:
    """The rows that fit, None for those left out: the first stays, and what goes on is near the end."""
    height = max(height, 4)
    if len(rows) <= height:
        return list(rows)
    names = [row.name for row in rows]
    end = min(len(rows), (names.index(going_on) + 2) if going_on in names else len(rows))
    begin = max(1, end - (height - 2))
    window: list[Row | None] = [rows[0], *([None] if begin > 1 else []), *rows[begin : begin + height - 2]]
    return window + ([None] if begin + height - 2 < len(rows) else [])


def cell_text(cell: Cell, parts: int) -> str:
    """`1.355 +0.640 0.28`; while the round goes on, what is known: `→ 1.102`, the loss of the task's expert."""
    if cell.loss is None and cell.expert_loss is None:
        return "·"
    texts = [number(cell.loss) if cell.loss is not None else f"→ {number(cell.expert_loss)}"]
    if parts > 1 and cell.gap is not None:
        texts.append(f"{cell.gap:+.2f}")
    if parts > 2 and cell.weight is not None:
        texts.append(f"{cell.weight:.2f}")
    return " ".join(texts)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
