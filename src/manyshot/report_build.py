"""From folders to a page: reads runs or a comparison, and puts verdict, figures and tables in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from manyshot.compare_grid import Grid
from manyshot.compare_outputs import TABLES
from manyshot.compare_render import Column, Table, cell_parts
from manyshot.errors import RunFolderError
from manyshot.misshapen import misshapen
from manyshot.report_compare import read_comparison
from manyshot.report_data import Block, Details, Model, Problem, Subject
from manyshot.report_examples import fitted
from manyshot.report_figures import MOST_CELLS, cosines, drift, kept, losses, radar, scores, weights
from manyshot.report_page import Chart, Figure, Page, Section, Series, Sheet, listed, rounded, shown
from manyshot.report_read import read_run
from manyshot.report_resources import WRITTEN_BY
from manyshot.report_rounds import rounds_sheet, search, steps
from manyshot.report_verdict import cards, cautions, overview, verdict


@dataclass(frozen=True)
class Report:
    """A page, and the data behind it."""

    page: Page
    blocks: list[Block]


@misshapen(RunFolderError, "the records cannot be read")
def build_report(paths: Sequence[Path]) -> Report:
    """The report of a run, of several runs side by side, or of a comparison.

    Raises RunFolderError where a folder holds neither, or where a comparison is to stand beside others.
    """
    if not paths:
        raise RunFolderError("a report needs at least one run folder")
    for path in paths:
        if not path.is_dir():
            raise RunFolderError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    comparisons = [path for path in paths if (path / "results.json").exists()]
    if comparisons and len(paths) > 1:
        raise RunFolderError(f"{comparisons[0]}: is a comparison, which has a report of its own; give it alone")
    if comparisons:
        grid, blocks, details = read_comparison(comparisons[0])
        return Report(_page("comparison", details.name, blocks, [details], comparison_tables(grid)), blocks)
    if len(paths) == 1:
        block, details = read_run(paths[0])
        return Report(_page("run", details.name, [block], [details]), [block])
    found = [read_run(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    block = side_by_side([block for block, _ in found])
    return Report(_page("runs", block.title, [block], [details for _, details in found]), [block])


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path before them as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise RunFolderError("the same run folder is given twice")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def side_by_side(blocks: Sequence[Block]) -> Block:
    """Runs as one block: all their tasks; references where they are the same in all."""
    first = blocks[0]
    tasks = list(dict.fromkeys(task for block in blocks for task in block.tasks))
    same = [
        model
        for model in first.references
        if all(any(_equal(model, other) for other in block.references) for block in blocks)
    ]
    shared = any(model.role == "experts" for model in same)
    subjects = [subject for block in blocks for subject in block.subjects]
    if any(subject.model.role == "merged" for subject in subjects):  # merged once is told of in each run's own report
        subjects = [subject for subject in subjects if subject.model.role != "post_hoc"]
    title = f"{len(blocks)} runs: {listed([block.title for block in blocks], 4)}"
    return Block(title, tasks, tasks, same, subjects, first.expert_losses if shared else {}, first.spread)


def _equal(model: Model, other: Model) -> bool:
    return (model.role, model.losses, model.scores) == (other.role, other.losses, other.scores)


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(kind: str, title: str, blocks: list[Block], details: list[Details], tables: tuple[Sheet, ...] = ()) -> Page:
    main = blocks[0] if blocks else Block(title, [], [], [], [], {}, "")
    return Page(
        kind=kind,  # type: ignore[arg-type]
        title=title,
        verdict=verdict(main, details),
        notes=tuple(cautions(main, details)),
        cards=tuple(cards(main)),
        overview=tuple(overview(block) for block in blocks if block.subjects or block.references),
        sections=tuple(sections(blocks)),
        costs=costs(details),
        details=tuple(fitted(details)),
        problems=tuple(problems_of(details)),
        tables=tables,
    )


def sections(blocks: Sequence[Block]) -> list[Section]:
    """The charts in their order."""
    detailed = [(block, subject) for block in blocks for subject in block.subjects if subject.detailed]

    def name_of(block: Block, subject: Subject) -> str:
        return f"{block.title}: {subject.name}" if len(blocks) > 1 else subject.name

    def of_blocks(make: Callable[[Block], Figure | None]) -> tuple[Figure, ...]:
        made = [(block.title, make(block)) for block in blocks]
        return _titled([(title, figure) for title, figure in made if figure], len(blocks) > 1)

    def of_subjects(make: Callable[[Block, Subject], Sequence[Figure | None]]) -> tuple[Figure, ...]:
        made = [(name_of(block, subject), figure) for block, subject in detailed for figure in make(block, subject)]
        return _titled([(title, figure) for title, figure in made if figure], len(detailed) > 1)

    return [
        Section("tasks", "Tasks", of_blocks(radar), "nothing has been scored yet"),
        Section("losses", "Losses over the rounds", of_blocks(losses), "no round has been measured yet"),
        Section(
            *("weights", "Weights and loss gaps"),
            *(of_subjects(lambda block, subject: weights(subject, block.tasks)), "no round has weighed its tasks yet"),
        ),
        Section(
            *("kept", "Coordinates kept"),
            *(of_subjects(lambda block, subject: [kept(subject)]), "no round has recorded shares by tensor"),
        ),
        Section(
            *("drift", "Drift and cosines"),
            of_subjects(
                lambda block, subject: [
                    drift(subject, block.tasks),
                    cosines(subject, block.tasks, MOST_CELLS // len(detailed)),
                ]
            ),
            "no round has recorded them",
        ),
        Section(
            *("rounds", "Rounds"),
            of_subjects(lambda block, subject: [steps(subject, block.tasks), search(subject)]),
            "no round has been merged yet",
            tuple(
                sheet
                for block, subject in detailed
                if (sheet := rounds_sheet(subject, f": {name_of(block, subject)}" if len(detailed) > 1 else ""))
            ),
        ),
        Section("scores", "Scores", of_blocks(scores), "no model has been scored yet"),
    ]


def _titled(figures: Sequence[tuple[str, Figure]], several: bool) -> tuple[Figure, ...]:
    """Figures of the same kind say whose they are."""
    return tuple(replace(figure, title=f"{figure.title}: {of}") if several else figure for of, figure in figures)


# ---- costs -----------------------------------------------------------------------------------------------------------


def costs(details: Sequence[Details]) -> Section:
    """Seconds per phase as bars; seconds, tokens, memory and disk as tables."""
    timed = [one for one in details if one.phases]
    sheets = tuple(sheet for one in details for sheet in _cost_sheets(one, len(details) > 1))
    if not timed:
        return Section("costs", "Time, tokens, memory, disk", (), "metrics.jsonl tells of no phase", sheets)
    names = list(dict.fromkeys(phase.name for one in timed for phase in one.phases))
    seconds = {one.name: {phase.name: phase.seconds for phase in one.phases} for one in timed}
    values = {name: [rounded(found.get(phase)) for phase in names] for name, found in seconds.items()}
    told = [
        f"{name}: {', '.join(f'{phase} {shown(value, 0)}' for phase, value in found.items())}"
        for name, found in seconds.items()
    ]
    label = f"Seconds per phase. {'; '.join(told)}."
    chart = Chart("bars", "", label, {"rows": names, "values": values, "axis": "seconds"})
    rows = [(phase, *(shown(found.get(phase), 1) for found in seconds.values())) for phase in names]
    sheet = Sheet("Seconds per phase", ("phase", *seconds), tuple(rows))
    series = tuple(Series(name, "merged" if i == 0 else "other", i) for i, name in enumerate(values))
    caption = "Seconds that every kind of work took, over all rounds and tasks; pauses of a resumed run do not count."
    figure = Figure("Time per phase", caption, series, (chart,), sheet)
    return Section("costs", "Time, tokens, memory, disk", (figure,), "", sheets)


def _cost_sheets(details: Details, several: bool) -> list[Sheet]:
    of = f" of {details.name}" if several else ""
    found = []
    if details.phases:
        found.append(_phase_sheet(details, of))
    if details.disk:
        kinds = [(kind, WRITTEN_BY.get(kind, ""), f"{size / 1e6:,.1f}") for kind, size in details.disk.items()]
        kinds.append(("all", "", f"{sum(details.disk.values()) / 1e6:,.1f}"))
        found.append(Sheet(f"Disk{of}", ("what", "written by", "MB"), tuple(kinds), 2))
    return found


def _phase_sheet(details: Details, of: str) -> Sheet:
    """Seconds, tokens, memory and disk of every phase; columns that have nothing are left out."""
    disk: dict[str, int] = {}
    for kind, size in details.disk.items():
        disk[WRITTEN_BY.get(kind, "")] = disk.get(WRITTEN_BY.get(kind, ""), 0) + size
    rows = []
    for phase in details.phases:
        rate = phase.tokens / phase.seconds if phase.tokens and phase.seconds > 0 else None
        tokens = f"{phase.tokens:,}" if phase.tokens is not None else ""
        memory, on_gpu = (
            f"{size / 2**30:.2f}" if size is not None else "" for size in (phase.memory, phase.gpu_memory)
        )
        written = f"{disk[phase.name] / 1e6:,.1f}" if phase.name in disk else ""
        cells = (shown(phase.seconds, 1), str(phase.count), tokens, shown(rate, 0) if rate else "")
        rows.append((phase.name, *cells, memory, on_gpu, written))
    headers = ("phase", "seconds", "times", "tokens", "tokens/s", "peak GiB", "GPU peak GiB", "disk MB")
    shown_columns = [i for i in range(len(headers)) if i < 3 or any(row[i] for row in rows)]
    notes = [] if details.wall is None else [f"From begin to end: {shown(details.wall, 0)} s."]
    if any(phase.memory for phase in details.phases):
        notes.append("Peak: the most memory that the process held during such a phase.")
    if any(phase.gpu_memory for phase in details.phases):
        notes.append("GPU peak: the most that PyTorch had allocated there.")
    if disk:
        notes.append("Disk: what the phase wrote and is still there.")
    return Sheet(
        f"Phases{of}",
        tuple(headers[i] for i in shown_columns),
        tuple(tuple(row[i] for i in shown_columns) for row in rows),
        1,
        tuple(notes),
    )


# ---- the tables of a comparison --------------------------------------------------------------------------------------


def comparison_tables(grid: Grid) -> tuple[Sheet, ...]:
    """The tables that `manyshot compare` writes, as a report shows them."""
    made = [make(grid) for make in TABLES.values()]
    return tuple(_sheet(table) for table in made if table is not None)


def _sheet(table: Table) -> Sheet:
    kinds = [column.kind for column in table.columns]
    num_texts = next((place for place, kind in enumerate(kinds) if kind != "text"), len(kinds))
    rows = tuple(
        tuple(_cell(table, i, place, column) for place, column in enumerate(table.columns))
        for i in range(len(table.rows))
    )
    headers = tuple(column.header for column in table.columns)
    return Sheet(table.heading, headers, rows, max(1, num_texts), (table.caption, *table.all_notes()))


def _cell(table: Table, i: int, place: int, column: Column) -> str:
    cell = table.rows[i].cells[place]
    if column.kind == "text" or isinstance(cell, str):
        return str(cell or "")
    value, error, flag = cell_parts(cell, column)
    return value + (f" ± {error}" if error else "") + flag


def problems_of(details: Sequence[Details]) -> list[Problem]:
    """Problems of all runs, with the run's name before the file where there are several."""
    if len(details) == 1:
        return details[0].problems
    return [Problem(f"{one.name}/{problem.file}", problem.message) for one in details for problem in one.problems]
