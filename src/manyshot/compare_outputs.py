"""Everything a comparison shows: tables as Markdown, CSV and LaTeX, figures, and report.md that puts them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manyshot.compare_detail_tables import (
    dynamics,
    dynamics_tasks,
    paired,
    per_task_losses,
    per_task_normalized,
    per_task_scores,
    per_task_shares,
    steps,
    tuning,
    tuning_candidates,
)
from manyshot.compare_figures import FIGURES, write_figures
from manyshot.compare_gain_tables import bad_tasks, share_kept
from manyshot.compare_grid import Grid
from manyshot.compare_render import Table, csv_text, escape_markdown, latex, markdown
from manyshot.compare_tables import ablation, table_1, table_2, table_3, table_4, table_5
from manyshot.errors import MissingExtraError
from manyshot.rundir import remove, write_text

TABLES: dict[str, Callable[[Grid], Table | None]] = {
    "table_1": table_1,
    "table_2": table_2,
    "table_3": table_3,
    "table_4": table_4,
    "table_5": table_5,
    "share_kept": share_kept,
    "bad_tasks": bad_tasks,
    "ablation": ablation,
    "paired": paired,
    "per_task_normalized": per_task_normalized,
    "per_task_shares": per_task_shares,
    "per_task_scores": per_task_scores,
    "per_task_losses": per_task_losses,
    "dynamics": dynamics,
    "dynamics_tasks": dynamics_tasks,
    "tuning": tuning,
    "tuning_candidates": tuning_candidates,
    "steps": steps,
}
# why a table is not there
ABSENT = {
    "table_1": "no method is compared both post-hoc and many-shot",
    "table_4": "there are no retention tasks",
    "table_5": "there is one task set",
    "share_kept": "no cell is measured that has one",
    "bad_tasks": "no task set is held against another",
    "per_task_shares": "no cell is measured that has one",
    "ablation": "no method is an ablation",
    "paired": "there is nothing to pair",
    "dynamics": "no rounds are finished",
    "dynamics_tasks": "no rounds are finished",
    "tuning_candidates": "nothing was tuned",
}
# heading -> what stands below it: names of tables, or figures/<name>
SECTIONS = {
    "Post-hoc and many-shot": ("table_1", "figures/transition"),
    "Categories and tasks": ("table_2", "figures/radar", "per_task_normalized"),
    "Worst task": ("table_3", "figures/worst_task"),
    "Share of the gain kept": ("share_kept", "per_task_shares"),
    "What a bad task costs": ("bad_tasks",),
    "Knowledge of the pretrained model": ("table_4",),
    "More tasks": ("table_5", "figures/scaling"),
    "Ablation": ("ablation", "figures/ablation"),
    "Paired differences": ("paired",),
    "Rounds": (
        *("figures/loss", "figures/drift", "figures/cosines", "figures/weights", "figures/kept_share"),
        "dynamics",
    ),
    "Scores and losses": ("per_task_scores", "per_task_losses"),
    "Settings and steps": ("tuning", "steps"),
}


def write_outputs(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write tables/, figures/ and report.md into `folder` from the mapping of results.json; return what was written.

    A table or figure that these results do not have is removed where an earlier call left it. Without matplotlib there
    are no figures, and the report says so. Raises RunFolderError for results of another format.
    """
    grid = Grid(results)
    tables = {name: make(grid) for name, make in TABLES.items()}
    written = []
    for name, table in tables.items():
        for ending, render in (("md", markdown), ("csv", csv_text), ("tex", latex)):
            path = folder / "tables" / f"{name}.{ending}"
            if table is None:
                remove(path)
            else:
                write_text(path, render(table))
                written.append(path)
    absent = {
        f"tables/{name}": ABSENT.get(name, "no cell is wanted") for name, table in tables.items() if table is None
    }
    try:
        pictures, without = write_figures(grid, folder / "figures")
        written += pictures
    except MissingExtraError as error:
        without = dict.fromkeys(FIGURES, str(error))
    absent |= {f"figures/{name}": reason for name, reason in without.items()}
    write_text(folder / "report.md", report(grid, tables, absent))
    return [*written, folder / "report.md"]


def report(grid: Grid, tables: Mapping[str, Table | None], absent: Mapping[str, str]) -> str:
    """What was compared, then tables and figures with their captions, then what is not there and why."""
    lines = [f"# Comparison: {escape_markdown(str(grid.results['name']))}", "", *_summary(grid)]
    for heading, names in SECTIONS.items():
        shown = [_shown(name, tables, absent) for name in names]
        body = [text for text in shown if text]
        if body:
            lines += ["", f"## {heading}", "", "\n".join(body).rstrip()]
    lines += ["", "## Files", ""]
    lines.append("Every table as `tables/<name>.md`, `.csv` (all digits) and `.tex`; every figure as PNG and SVG.")
    lines += _list("Too long for this page", [f"`tables/{name}.md`" for name in _unshown(tables)])
    lines += _list("Not there", [f"`{name}`: {escape_markdown(reason)}" for name, reason in absent.items()])
    return "\n".join(lines) + "\n"


def _shown(name: str, tables: Mapping[str, Table | None], absent: Mapping[str, str]) -> str:
    """A table, or a figure with its caption; nothing where it is absent."""
    if name.startswith("figures/"):
        picture = FIGURES[name.removeprefix("figures/")]
        caption = escape_markdown(picture.caption)
        return "" if name in absent else f"![{escape_markdown(picture.title)}]({name}.png)\n\n{caption}\n"
    table = tables[name]
    return "" if table is None else markdown(table)


def _unshown(tables: Mapping[str, Table | None]) -> list[str]:
    named = {name for names in SECTIONS.values() for name in names}
    return [name for name, table in tables.items() if table is not None and name not in named]


def _list(title: str, items: list[str]) -> list[str]:
    return ["", f"{title}:", "", *(f"- {item}" for item in items)] if items else []


def _summary(grid: Grid) -> list[str]:
    """Models, task sets, protocol, and how many cells there are."""
    results = grid.results
    cells = [cell["status"] for cell in results["cells"]]
    counts = ", ".join(f"{cells.count(status)} {status}" for status in ("done", "failed", "missing") if status in cells)
    rounds, per_task = results["rounds"], results["local_steps"]
    return [
        f"- Models: {escape_markdown(', '.join(grid.models))}",
        *(
            f"- Task set {escape_markdown(name)}: {escape_markdown(', '.join(spec['tasks']))}; "
            f"seeds {', '.join(map(str, spec['seeds']))}"
            for name, spec in grid.task_sets.items()
        ),
        f"- Protocols: many-shot merges {rounds} times, post-hoc once; each task has {per_task} local steps either way",
        *(
            f"- Task {escape_markdown(name)} {escape_markdown('; '.join(notes))}"
            for name, notes in results.get("task_notes", {}).items()
        ),
        f"- Methods: {escape_markdown(', '.join(grid.label(method) for method in grid.methods))}",
        f"- Cells (one per model, task set, method, protocol and seed): {counts or 'none'}",
        *_asked(grid),
        "- Settings that were searched were chosen on the validation split; scores and losses are of the test split, "
        "unless a caption says otherwise",
    ]


def _asked(grid: Grid) -> list[str]:
    """The benchmarks by task, and how they are asked."""
    if not grid.benchmarks:
        return []
    by_task: dict[str, list[str]] = {}
    scored = [name for task_set in grid.task_sets for name in grid.scored(task_set)]
    for name in dict.fromkeys([*scored, *grid.retention]):
        if (one := grid.benchmarks.get(name)) is None:
            by_task.setdefault(name, []).append("its own test split")
            continue
        shown = "" if one["few_shot"] is None else f", {one['few_shot']}-shot"
        by_task.setdefault(one["task"] or "retention", []).append(f"{name} ({one['metric'] or 'by its rows'}{shown})")
    how = grid.results["harness"]
    limit = f"; only the first {how['limit']} examples of each" if how["limit"] else ""
    template = "with" if how["chat_template"] else "without"
    parts = "; ".join(f"{task}: {', '.join(names)}" for task, names in by_task.items())
    return [
        f"- Benchmarks, asked through lm-evaluation-harness {template} chat template{limit}. {escape_markdown(parts)}. "
        "A task's normalized performance is the mean over its benchmarks; losses are of the test split"
    ]
