"""What a search shows: report.md, trials.csv and the figures, from what tune.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manyshot.compare_drawing import require_matplotlib
from manyshot.compare_render import Column, Row, Table, csv_text, escape_markdown, markdown
from manyshot.errors import MissingExtraError
from manyshot.rundir import remove, write_text
from manyshot.tune_figures import LABELS, write_figures
from manyshot.tune_space import shown_value

# more trials than a person reads are in trials.csv only
SHOWN = 20
WHAT = {
    "post_hoc": "one merge of the experts, each trained with all its steps",
    "first": "the merge of round 1",
    "each": "the merge of every round in turn, the best one fixed before the next round trains",
    "all": "whole runs of all rounds",
}
ENDED = {"trials": "all trials are done", "seconds": "the time is over", "grid": "the grid is done"}


def write_outputs(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.md, trials.csv and figures/ into `folder`. Without matplotlib there are no figures, and the report
    says so.
    """
    tables = {search["round"]: trials_table(results, search) for search in results["searches"]}
    for search in results["searches"]:
        table = trials_table(results, search, str)
        write_text(folder / "trials" / f"{table.name}.csv", csv_text(table))
    without = ""
    remove(folder / "figures")
    figures: dict[int, list[Path]] = {}
    try:
        require_matplotlib()
        figures = write_figures(results, folder / "figures")
    except MissingExtraError as error:
        without = str(error)
    write_text(folder / "report.md", report(results, tables, figures, without))
    return [folder / "report.md", *(file for files in figures.values() for file in files)]


def trials_table(
    results: Mapping[str, Any], search: Mapping[str, Any], show: Callable[[Any], str] = shown_value
) -> Table:
    """The trials of one search, the best first; failed ones last."""
    names, tasks = list(results["parameters"]), results["tasks"]
    better = results["better"]
    sign = -1 if better == "higher" else 1
    failed = [trial for trial in search["trials"] if trial["value"] is None]
    done = sorted(
        (trial for trial in search["trials"] if trial["value"] is not None),
        key=lambda trial: (sign * trial["value"], trial["number"]),
    )
    shares = results["objective"] != "multi_task_loss"
    columns = (
        Column("trial", "Trial", "number"),
        *(Column(name, name, "text") for name in names),
        Column(results["objective"], LABELS[results["objective"]], "number", digits=4),
        *(Column(task, f"{task}, {'share' if shares else 'loss'}", "number", digits=4) for task in tasks),
        Column("note", "", "text"),
    )
    rows = []
    for trial in [*done, *failed]:
        by_task = trial["shares" if shares else "losses"]
        cells = (
            trial["number"] + 1,
            *(show(trial["settings"][name]) for name in names),
            trial["value"],
            *(by_task.get(task) for task in tasks),
            _note(search, trial),
        )
        rows.append(Row(cells))
    index = search["round"]
    title = f"trials of round {index}" if index and len(results["searches"]) > 1 else "trials"
    caption = f"Validation split. {LABELS[results['objective']].capitalize()}: {better} is better; the best first."
    return Table(f"trials_{index}", title, caption, columns, tuple(rows))


def _note(search: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    if trial["error"]:
        return f"failed: {trial['error']}"
    notes = ["chosen"] if trial["number"] == search["chosen"] else []
    return ", ".join([*notes, *(["the recipe's own settings"] if trial["number"] == search["own"] else [])])


def report(
    results: Mapping[str, Any], tables: Mapping[int, Table], figures: Mapping[int, Sequence[Path]], without: str
) -> str:
    """What was searched and found, then every search with its table and figure."""
    best = results["best"]["trial"]
    lines = [
        f"# Search: {escape_markdown(results['name'])}",
        "",
        f"- Searched: {WHAT[results['rounds']]}; sampler {results['sampler']}",
        f"- Objective: {LABELS[results['objective']]} ({results['better']} is better), on the validation splits; the "
        "test splits were not looked at",
        f"- Best: {best['value']:.4f} with {_settings(results)}",
        *_gain(results),
        "",
        "`best.yaml` is the run's recipe with these settings. `manyshot run best.yaml --output run --resume`, in this "
        "folder, goes on with what the search has trained.",
    ]
    for search in results["searches"]:
        index = search["round"]
        heading = {0: "Whole runs"}.get(index, f"Round {index}" if len(results["searches"]) > 1 else "Trials")
        counts = [trial["error"] is None for trial in search["trials"]]
        failed = f", {counts.count(False)} of them failed" if False in counts else ""
        lines += ["", f"## {heading}", "", f"{len(counts)} trials{failed}; {ENDED[search['ended_by']]}.", ""]
        table = tables[index]
        lines.append(markdown(Table(table.name, table.title, table.caption, table.columns, table.rows[:SHOWN])))
        if len(table.rows) > SHOWN:
            lines.append(f"The other {len(table.rows) - SHOWN} are in `trials/{table.name}.csv`.\n")
        lines += _importances(search["importances"])
        if index in figures:
            lines += [f"![Sensitivity](figures/{figures[index][0].name})", ""]
    if without:
        lines += ["", f"There are no figures: {escape_markdown(without)}"]
    return "\n".join(lines).rstrip() + "\n"


def _gain(results: Mapping[str, Any]) -> list[str]:
    """How far the best settings are from the recipe's own, where the last search tried those."""
    search = results["searches"][-1]
    own = search["trials"][search["own"]]["value"] if search["own"] is not None else None
    if own is None:
        return ["- The recipe's own settings are not among those that were tried"]
    return [f"- The recipe's own settings: {own:.4f}"]


def _settings(results: Mapping[str, Any]) -> str:
    """The best settings, in the recipe's order."""

    def shown(value: Any) -> str:
        return f"[{', '.join(map(shown_value, value))}]" if isinstance(value, list | tuple) else shown_value(value)

    found = results["best"]["settings"]
    return escape_markdown(", ".join(f"{name} {shown(found[name])}" for name in results["parameters"]))


def _importances(found: Mapping[str, float]) -> list[str]:
    if not found:
        return []
    shown = ", ".join(
        f"{escape_markdown(name)} {value:.2f}" for name, value in sorted(found.items(), key=lambda one: -one[1])
    )
    return [f"Importance for being among the best trials (PED-ANOVA; they sum to 1): {shown}.", ""]
