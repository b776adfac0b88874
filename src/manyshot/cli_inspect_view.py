"""What `manyshot inspect` shows: tables, one JSON object, a picture. The only importer of matplotlib."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from manyshot.cli_view import make_console
from manyshot.errors import MissingExtraError
from manyshot.rundir import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from manyshot.inspect_models import Inspection, Matrix, Part

# Okabe and Ito's colours, which colour-blind people can tell apart; beyond seven tasks, other line styles
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", ":", "-.")
LONGEST_LABEL = 22
# matrices of more tasks than this show colours alone; more layers than this share labels
MOST_NUMBERS = 10
MOST_LAYER_LABELS = 12
# norms that differ more than this between layers are drawn on a logarithmic axis
WIDE_RANGE = 50


@contextmanager
def inspect_progress(*, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's error stream, for `inspect(…, tick)`; nothing in logs and with --json."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("reading task vectors"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("")
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def show_inspection(found: Inspection, *, as_json: bool, png: Path | None = None) -> None:
    """Tables and what they say in words, or one JSON object; the picture where one is wanted."""
    if png is not None:
        draw_inspection(found, png)
    if as_json:
        print(json.dumps(found.to_json(), allow_nan=False))
        return
    console = make_console()
    console.print(task_table(found))
    total = found.total
    for title, matrix, spec in (
        ("Cosines", total.cosines, "+.3f"),
        ("Sign conflicts: share of the coordinates that both changed", total.pair_sign_conflicts, ".1%"),
        ("Mask overlap: voted for by both, of those voted for by either", total.mask_overlaps, ".1%"),
    ):
        if len(found.tasks) > 1:
            console.print(matrix_table(title, found.tasks, matrix, spec))
    console.print(layer_table(found))
    for line in summary_lines(found):
        console.print(line, markup=False, highlight=False)
    if png is not None:
        console.print(f"picture: {png}", markup=False, highlight=False)


# ---- tables ----------------------------------------------------------------------------------------------------------


def title_of(found: Inspection) -> str:
    """`Task vectors of runs/first, round 2 (against the pretrained model)`."""
    if found.run is None:
        return f"Task vectors against {found.base}"
    against = "the pretrained model" if found.reference == "pretrained" else "the round's start"
    return f"Task vectors of {found.run}, round {found.round_index} (against {against})"


def shown(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def new_table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(escape(column), justify="right", overflow="fold")
    return table


def task_table(found: Inspection) -> Table:
    """One row per task: how large, how wide, how much of the mask is its own."""
    part = found.total
    columns = ("norm", "coordinates changed", "votes for", "votes for, of those kept", "effective rank")
    table = new_table(title_of(found), "task", columns)
    for t, task in enumerate(found.tasks):
        shares = (part.changed_shares[t], part.vote_shares[t], part.kept_vote_shares[t])
        cells = [shown(share, ".1%") for share in shares]
        table.add_row(escape(task), f"{part.norms[t]:.4g}", *cells, shown(part.effective_ranks[t], ".2f"))
    return table


def matrix_table(title: str, tasks: Sequence[str], matrix: Matrix, spec: str) -> Table:
    table = new_table(title, "", tasks)
    for i, task in enumerate(tasks):
        table.add_row(escape(task), *("" if i == j else shown(value, spec) for j, value in enumerate(matrix[i])))
    return table


def layer_table(found: Inspection) -> Table:
    """One row per layer; the effective rank is the mean over the tasks."""
    norms = [f"norm: {task}" for task in found.tasks]
    table = new_table("Layers", "layer", [*norms, "sign conflicts", "kept by the mask", "effective rank"])
    for label, part in zip(layer_labels(found.layers), found.layers, strict=True):
        ranks = [rank for rank in part.effective_ranks if rank is not None]
        table.add_row(
            escape(label),
            *(f"{norm:.4g}" for norm in part.norms),
            *(shown(part.sign_conflict, ".1%"), shown(part.kept_share, ".1%")),
            shown(sum(ranks) / len(ranks) if ranks else None, ".2f"),
        )
    return table


def layer_labels(layers: Sequence[Part]) -> list[str]:
    """`layer 3` where all layers with a number are of one stack, else their full names."""
    stacks = {part.name.rpartition(".")[0] for part in layers if is_numbered(part)}
    return [
        f"layer {part.name.rpartition('.')[2]}" if is_numbered(part) and len(stacks) == 1 else part.name
        for part in layers
    ]


def is_numbered(part: Part) -> bool:
    return part.name.rpartition(".")[2].isdecimal()


def summary_lines(found: Inspection) -> list[str]:
    """The sums over the whole model, and which ranks were left out."""
    total, settings = found.total, found.settings
    lines = [f"{total.num_changed:,} of {total.num_coordinates:,} coordinates are changed by some task"]
    if total.sign_conflict is not None:
        lines.append(
            f"signs conflict in {total.sign_conflict:.1%} of the {total.num_shared:,} coordinates that two or more "
            "tasks change"
        )
    if total.kept_share is not None:
        lines.append(
            f"a consensus mask with equal weights, threshold {settings.mask_threshold:g}, agreement of "
            f"{settings.min_agreement} or more, keeps {total.kept_share:.1%} of the changed coordinates"
        )
    if found.skipped_ranks:
        name, shape = next(iter(found.skipped_ranks.items()))
        example = f"{name} {'×'.join(map(str, shape))}"
        lines.append(
            f"effective ranks leave out {len(found.skipped_ranks)} dense matrices of more than "
            f"{settings.rank_limit:,} entries, such as {example}; --rank-limit raises the limit"
        )
    return lines


# ---- picture ---------------------------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Say how to install it before anything long begins. Raises MissingExtraError."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("--png needs the package matplotlib; run: pip install 'manyshot[report]'")


def draw_inspection(found: Inspection, png: Path) -> None:
    """Norms and sign conflicts by layer, cosines and sign conflicts by pair, as one PNG, complete or absent."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(found.tasks) > 1
    side = max(4.6, 0.42 * len(found.tasks) + 2) if several else 0.0
    figure = Figure(
        figsize=(max(13 if several else 8, 2.6 * side), 4.6 + side), layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(plain(shorten(title_of(found), 90)), fontsize=14, fontweight="bold")
    grid = figure.add_gridspec(2, 1, height_ratios=(4.4, side)) if several else figure.add_gridspec(1, 1)
    top, total = figure.add_subfigure(grid[0]), found.total
    draw_norms(top.add_subplot(1, 1 + several, 1), found)
    if several:
        draw_conflicts(top.add_subplot(1, 2, 2), found)
        bottom = figure.add_subfigure(grid[1])
        draw_matrix(bottom.add_subplot(1, 2, 1), "Cosine of task vectors", found.tasks, total.cosines, signed=True)
        title = "Opposite signs, share of the coordinates that both change"
        draw_matrix(bottom.add_subplot(1, 2, 2), title, found.tasks, total.pair_sign_conflicts, signed=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        with atomic_file(png) as stream:
            figure.savefig(stream, format="png", dpi=140)


def draw_norms(axes: Axes, found: Inspection) -> None:
    """‖v_τ‖ by layer; parts without a number stand to the right, not joined by lines."""
    numbered = sum(map(is_numbered, found.layers))
    for t, task in enumerate(found.tasks):
        norms = [part.norms[t] for part in found.layers]
        turn = t // len(COLOURS)
        colour, marker = COLOURS[t % len(COLOURS)], MARKERS[(t + turn) % len(MARKERS)]
        style = STYLES[turn % len(STYLES)]
        draw_layers(axes, norms, numbered, plain(shorten(task)), colour, marker, style)
    positive = [norm for part in found.layers for norm in part.norms if norm > 0]
    if positive and max(positive) > WIDE_RANGE * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title("Norm of the task vectors by layer")
    axes.set_ylabel("‖v‖")
    label_layers(axes, found.layers)
    columns = 1 + (len(found.tasks) - 1) // 6
    axes.legend(fontsize=8, ncols=columns, loc="best", framealpha=0.85)


def draw_layers(
    axes: Axes, heights: Sequence[float], numbered: int, label: str, colour: str, marker: str, style: str = "-"
) -> None:
    """Numbered layers as a line, the other parts as points of the same look."""
    places = layer_places(numbered, len(heights))
    axes.plot(places[:numbered], heights[:numbered], style, label=label, color=colour, marker=marker, markersize=4.5)
    axes.plot(places[numbered:], heights[numbered:], linestyle="none", color=colour, marker=marker, markersize=4.5)


def layer_places(numbered: int, count: int) -> list[float]:
    """Numbered layers one apart; the other parts further apart, so that their names have room."""
    apart = max(1.0, numbered / 14)
    return [float(i) for i in range(numbered)] + [numbered - 1 + apart * (i + 1) for i in range(count - numbered)]


def draw_conflicts(axes: Axes, found: Inspection) -> None:
    """Share of the coordinates that two or more tasks change with opposite signs, and what a consensus mask keeps."""
    settings, numbered = found.settings, sum(map(is_numbered, found.layers))
    mask = f"kept by the mask (threshold {settings.mask_threshold:g}, agreement {settings.min_agreement})"
    lines = (
        ("opposite signs, of those two or more change", COLOURS[1], "s", [one.sign_conflict for one in found.layers]),
        (mask, COLOURS[0], "o", [one.kept_share for one in found.layers]),
    )
    for label, colour, marker, values in lines:
        heights = [float("nan") if value is None else value for value in values]
        draw_layers(axes, heights, numbered, label, colour, marker)
    axes.set_ylim(0, 1.28)  # room for the legend
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1), labels=("0%", "25%", "50%", "75%", "100%"))
    axes.set_title("Sign conflicts and consensus by layer")
    axes.set_ylabel("share of coordinates")
    label_layers(axes, found.layers)
    axes.legend(fontsize=8, loc="upper center", ncols=1, framealpha=0.85)


def label_layers(axes: Axes, layers: Sequence[Part]) -> None:
    """Numbers of layers, not more than fit, and the names of the parts without one."""
    numbered = sum(map(is_numbered, layers))
    step = -(-numbered // MOST_LAYER_LABELS) or 1
    at = layer_places(numbered, len(layers))
    chosen = [i for i in range(len(layers)) if i >= numbered or i % step == 0]
    labels = [label.removeprefix("layer ").removeprefix("model.") for label in layer_labels(layers)]
    texts = [plain(shorten(labels[i])) for i in chosen]
    axes.set_xticks([at[i] for i in chosen], labels=texts, fontsize=8)
    for tick, text in zip(axes.get_xticklabels(), texts, strict=True):
        if len(text) > 3:
            tick.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, max(at, default=0.0) + 0.5)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_matrix(axes: Axes, title: str, tasks: Sequence[str], matrix: Matrix, *, signed: bool) -> None:
    """A matrix as colours and, for few tasks, numbers; the diagonal says nothing and is left grey."""
    size = len(tasks)
    cells = [[None if i == j else matrix[i][j] for j in range(size)] for i in range(size)]
    largest = max((abs(value) for row in cells for value in row if value is not None), default=0.0)
    top = 1.0 if signed or largest > 0.5 else 0.5
    heights = [[float("nan") if value is None else value for value in row] for row in cells]
    image = axes.imshow(heights, cmap="RdBu_r" if signed else "Oranges", vmin=-top if signed else 0, vmax=top)
    axes.set_facecolor("#e8e8e8")
    axes.set_title(title)
    names = [plain(shorten(task)) for task in tasks]
    axes.set_xticks(range(size), labels=names, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(size), labels=names, fontsize=9)
    axes.tick_params(length=0)
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if value is not None and size <= MOST_NUMBERS:
                text = f"{value:+.2f}" if signed else f"{value:.0%}"
                axes.text(j, i, text, ha="center", va="center", color="white" if abs(value) > 0.65 * top else "black")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, format=None if signed else lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    """Keep both ends, which tell names apart."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def plain(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")
