"""The figures of a search: what the objective was at every value of every setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.compare_drawing import COLOURS, FULL_COLOUR, GREY, WIDE_RANGE, finish, panels, plain, save
from manyshot.tune_space import same, shown_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "multi_task_loss": "multi-task validation loss",
    "share": "share of the experts' gain",
    "worst_share": "share of the gain, worst task",
}


def write_figures(results: Mapping[str, Any], folder: Path) -> dict[int, list[Path]]:
    """One figure per search, with a panel for each setting, as PNG and SVG; by the round that was searched."""
    names = list(results["parameters"])
    written = {}
    for search in results["searches"]:
        found = search["round"]
        title = f"Round {found}" if found and len(results["searches"]) > 1 else "Sensitivity"

        def draw(axes: Axes, name: str, search: Mapping[str, Any] = search) -> None:
            draw_setting(axes, name, results, search)

        written[found] = save(panels(title, names, 1, draw, height=3.2), folder / f"sensitivity_{found}")
    return written


def draw_setting(axes: Axes, name: str, results: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """The objective against one setting: all trials, the best one, the recipe's own, and where trials failed."""
    trials, space = search["trials"], results["parameters"][name]
    places = [place_of(trial["settings"][name], space) for trial in trials]
    done = [i for i, trial in enumerate(trials) if trial["value"] is not None]
    values = [trials[i]["value"] for i in done]
    axes.plot([places[i] for i in done], values, "o", color=COLOURS[0], alpha=0.6, markersize=5, label="trial")
    if failed := [places[i] for i, trial in enumerate(trials) if trial["value"] is None]:
        foot = axes.get_xaxis_transform()
        axes.plot(failed, [0.03] * len(failed), "x", color=GREY, markersize=5, transform=foot, label="failed")
    if (own := search["own"]) is not None and trials[own]["value"] is not None:
        ring, value = [places[own]], [trials[own]["value"]]
        axes.plot(ring, value, "o", color="none", markeredgecolor=GREY, markersize=11, label="the recipe's own")
    best = search["chosen"]
    axes.plot([places[best]], [trials[best]["value"]], "*", color=FULL_COLOUR, markersize=13, zorder=5, label="best")
    if isinstance(space, list):
        labels = [plain(shown_value(choice), 12) for choice in space]
        axes.set_xticks(range(len(space)), labels=labels)
    elif space["log"]:
        axes.set_xscale("log")
    if min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.08, y=0.12)
    finish(axes, name, y=LABELS[results["objective"]])


def place_of(value: Any, space: Sequence[Any] | Mapping[str, Any]) -> float:
    """Where a value stands: a number where it is, a choice at its place in the list."""
    if isinstance(space, Mapping):
        return float(value)
    return next(float(i) for i, choice in enumerate(space) if same(choice, value))
