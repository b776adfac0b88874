"""What people see: progress while a run goes, tables when something is done. The only place that prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from manyshot.live_text import TITLES

if TYPE_CHECKING:
    from manyshot.progress import Event
    from manyshot.push import Upload
    from manyshot.runner import RunResult

LOG_WIDTH = 150


class View(Protocol):
    """Shows a run's events."""

    def listen(self, event: Event) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def where(event: Event) -> str:
    """`round 2, math: training`."""
    place = f"round {event.round_index}" if event.round_index else "start"
    return f"{place}{', ' + event.task if event.task else ''}: {TITLES.get(event.phase, event.phase)}"


class PlainView:
    """One line per finished long step, for logs and pipes."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def listen(self, event: Event) -> None:
        if event.kind == "message":
            self.say(event.text)
        elif event.kind == "end" and event.phase == "local_update":
            self.say(finished_training(event))
        elif event.kind == "end" and event.phase in ("validation", "score"):
            self.say(f"{where(event)}: {event.values['seconds']:.1f} s")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def close(self) -> None:
        pass


class JsonView:
    """One JSON object per event."""

    def listen(self, event: Event) -> None:
        print(json.dumps(event.to_json()), flush=True)

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class QuietView:
    """Nothing."""

    def listen(self, event: Event) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def finished_training(event: Event) -> str:
    """`round 2, math: training: 10 steps in 12.3 s, 190 tokens/s`."""
    seconds, values = event.values["seconds"], event.values
    return f"{where(event)}: {values['steps']} steps in {seconds:.1f} s, {values['tokens'] / seconds:.0f} tokens/s"


@contextmanager
def open_view(*, quiet: bool, as_json: bool, on_terminal: Callable[[Console], View]) -> Iterator[View]:
    """The view for where output goes: the given one on a terminal, plain lines elsewhere."""
    view: View
    if as_json:
        view = JsonView()
    elif quiet:
        view = QuietView()
    elif sys.stdout.isatty():
        view = on_terminal(make_console())
    else:
        view = PlainView()
    try:
        yield view
    finally:
        view.close()


def make_console() -> Console:
    """A console as wide as the terminal; wide enough for the tables where there is none, as in a log."""
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)


# ---- results ---------------------------------------------------------------------------------------------------------


def show_result(result: RunResult, *, quiet: bool, as_json: bool) -> None:
    """The score table, where the time went, and the merged model's path, last."""
    if as_json:
        print(json.dumps({"merged": str(result.merged), "scores": result.scores, "seconds": result.seconds}))
        return
    if not quiet:
        console = make_console()
        console.print(score_table(result.scores))
        for line in summary_lines(result.scores):
            console.print(escape(line), highlight=False)
        seconds = result.seconds
        console.print(
            f"time: {seconds['wall']:.0f} s; training {seconds.get('local_update', 0):.0f} s, "
            f"evaluation {seconds.get('validation', 0) + seconds.get('score', 0):.0f} s, "
            f"all else {seconds['overhead']:.0f} s ({seconds['overhead_share']:.1%})",
            highlight=False,
        )
        print("merged model:")
    print(result.merged)


def models_of(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every measured model by the name people read, in the order of the run."""
    last = len(scores["rounds"])
    found = {"pretrained": scores["pretrained"]}
    if "post_hoc" in scores:
        found["post-hoc merge"] = scores["post_hoc"]
    for r, entry in scores["rounds"].items():
        found[f"round {r}" + (" (merged)" if int(r) == last else "")] = entry
    return found


def score_table(scores: dict[str, Any]) -> Table:
    """Test score ± standard error per task, with average and worst normalized performance."""
    table = Table(title=f"Test scores; in brackets: share of the expert's score ({scores['operator']})")
    table.add_column("model", no_wrap=True)
    for task in scores["tasks"]:
        table.add_column(task, justify="right")
    for name in ("average", "worst", "drop", "loss"):
        table.add_column(name, justify="right")
    if "experts" in scores:
        cells = [score_cell(scores["experts"]["scores"][task], None) for task in scores["tasks"]]
        table.add_row("experts (one per task)", *cells, "1.000", "1.000", "0.000", "")
    for name, entry in models_of(scores).items():
        normalized = entry.get("normalized")
        cells = [
            score_cell(entry["scores"][task], normalized["tasks"][task] if normalized else None)
            for task in scores["tasks"]
        ]
        sums = [number((normalized or {}).get(key)) for key in ("average", "worst", "drop")]
        table.add_row(name, *cells, *sums, number(entry["multi_task_loss"]))
    return table


def score_cell(score: dict[str, Any], ratio: float | None) -> str:
    spread = f" ±{score['stderr']:.3f}" if score["stderr"] is not None else ""
    share = f" \\[{ratio:.2f}]" if ratio is not None else ""
    return f"{score['score']:.3f}{spread}{share}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def summary_lines(scores: dict[str, Any]) -> list[str]:
    """The verdict in words."""
    last = scores["rounds"][str(len(scores["rounds"]))]
    if "normalized" not in last or last["normalized"]["average"] is None:
        return []
    lines = [verdict("merged in rounds", last)]
    if "post_hoc" in scores and scores["post_hoc"]["normalized"]["average"] is not None:
        lines.append(verdict("merged once (post-hoc)", scores["post_hoc"]))
    undefined = [task for task, ratio in last["normalized"]["tasks"].items() if ratio is None]
    if undefined:
        lines.append(f"not in the average, since the expert scores 0: {', '.join(undefined)}")
    return lines


def verdict(name: str, entry: dict[str, Any]) -> str:
    normalized = entry["normalized"]
    return (
        f"{name}: {normalized['average']:.3f} of the experts on average, "
        f"{normalized['worst']:.3f} on the worst task ({normalized['worst_task']}), drop {normalized['drop']:.3f}"
    )


def show_validation(found: dict[str, Any], *, as_json: bool) -> None:
    """Sizes and one example per task, counted tokens in brackets ⟦ ⟧."""
    if as_json:
        print(json.dumps(found))
        return
    console = make_console()
    console.print(f"model {found['model']['name']} at {found['model']['path']}", highlight=False, markup=False)
    console.print(f"computing in {found['placement']}", highlight=False)
    for name, task in found["tasks"].items():
        table = Table(title=f"task {name}: {task['metric']}", title_justify="left")
        for column in ("split", "examples", "tokens", "counted", "truncated"):
            table.add_column(column, justify="left" if column == "split" else "right")
        for split, sizes in task["splits"].items():
            means = [f"{sizes['mean_tokens']:.1f}", f"{sizes['mean_counted_tokens']:.1f}"]
            table.add_row(split, str(sizes["examples"]), *means, f"{sizes['truncated_share']:.1%}")
        console.print(table)
        example = task["example"]
        console.print(f"{example['context']}⟦{example['counted']}⟧", markup=False, highlight=False)
    show_warnings(console, found["warnings"])


def show_plan(found: dict[str, Any], *, as_json: bool) -> None:
    """Steps, tokens, disk and memory."""
    if as_json:
        print(json.dumps(found))
        return
    console = make_console()
    for line in found["starts"]:
        console.print(line, highlight=False)
    steps = ", ".join(f"round {entry['round']}: {entry['steps_per_task']}" for entry in found["rounds"])
    if own := found["rounds"][0].get("own_steps"):
        in_all = {name: sum(entry["own_steps"][name] for entry in found["rounds"]) for name in own}
        steps += f"; in all {', '.join(f'{name} {number}' for name, number in in_all.items())}"
    if found["allocation"] == "gap":
        steps += "; from round 2 on this is the mean, and tasks with more weight take more"
    rows = {
        "steps per task": steps,
        "optimizer steps in all": f"{found['optimizer_steps']:,}",
        "training examples": f"{found['training_examples']:,}",
        "training tokens": f"{found['training_tokens']:,}",
        "validation passes": str(found["validation_passes"]),
        "test passes": str(found["test_passes"]),
        "disk": sizes(found["disk_bytes"]),
        "memory (estimate)": sizes(found["memory_bytes"]),
        "computing in": found["placement"],
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    show_warnings(console, found["warnings"])


def sizes(parts: dict[str, int]) -> str:
    kinds = {name: size for name, size in parts.items() if name not in ("total", "peak")}
    own = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in kinds.items())
    most = f"; on the way up to {parts['peak'] / 1e9:.2f} GB" if "peak" in parts else ""
    return f"{parts['total'] / 1e9:.2f} GB ({own}){most}"


def show_warnings(console: Console, warnings: list[str]) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def show_lines(lines: Iterable[str]) -> None:
    """Something a person should read now."""
    console = make_console()
    for line in lines:
        console.print(line, style="yellow", markup=False, highlight=False)


def show_status(found: dict[str, Any]) -> None:
    """How far a run is, every model measured so far, and what its guards have found."""
    from manyshot.guards import describe

    console = make_console()
    console.print(
        f"{found['folder']}: {found['steps_done']} of {found['steps']} steps, "
        f"{found['rounds_done']} of {found['rounds']} rounds; next: {found['next'] or 'nothing, it is finished'}",
        highlight=False,
        markup=False,
    )
    table = Table()
    for column in ("model", *(f"{task}: score / loss" for task in found["tasks"])):
        table.add_column(column)
    for name, entry in found["measured"].items():
        cells = [
            f"{entry['scores'][task]['score']:.3f} / {entry['losses'][task]['loss']:.3f}" for task in found["tasks"]
        ]
        table.add_row(name, *cells)
    console.print(table)
    show_lines(describe(finding) for finding in found["findings"])
    if found["merged"]:
        console.print(f"merged model: {found['merged']}", highlight=False, markup=False)


def show_upload(upload: Upload, target: str) -> None:
    """Every file that would be uploaded, where to, and who may read it."""
    console = make_console()
    table = Table(title=Text(f"to {target}, {'private' if upload.private else 'PUBLIC'}"))
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in upload.files.items():
        table.add_row(Text(name), f"{size / 1e6:,.2f} MB")
    table.add_row("all", f"{upload.num_bytes / 1e6:,.2f} MB", style="bold")
    console.print(table)
    told = {key: upload.metadata.get(key, "not given") for key in ("base_model", "license", "datasets")}
    console.print("; ".join(f"{key}: {value}" for key, value in told.items()), markup=False, highlight=False)
    if upload.unfinished:
        show_lines([f"the run has not ended (next: {upload.unfinished}): this is the last finished round's model"])
