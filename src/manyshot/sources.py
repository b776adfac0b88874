"""The rows of a task's splits: from one source or several, filtered and sampled, each known by its source and row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from manyshot.data_files import MISSING, Row, lookup, read_split, read_splits
from manyshot.errors import DataError, suggestion
from manyshot.seeding import permutation
from manyshot.task_spec import SourceSpec, TaskSpec, Where

SPLITS = ("train", "validation", "test")
# values of a column that are listed where a filter lets nothing through
MOST_VALUES = 8


@dataclass(frozen=True)
class SourceRow:
    """A row, where it stands, and how its columns are called."""

    row: Row
    index: int  # row number in its source, from 0
    source: str
    columns: Mapping[str, str]
    shuffled: bool = False  # whether its completion changes places with others'


def read_rows(spec: TaskSpec, seed: int, task: str) -> dict[str, list[SourceRow]]:
    """Rows by split: those that `data` brings, then those that have sources of their own, one source after the other.

    Raises DataError naming task, source and column, or, for a damaged file, its line.
    """
    rows: dict[str, list[SourceRow]] = {}
    if spec.data is not None:
        for split, found in read_splits(spec.data, spec.subset, seed, task).items():
            kept = _filter(found, spec.where, f"task '{task}': the {split} split of {spec.data}")
            rows[split] = [SourceRow(found[i], i, spec.data, spec.columns) for i in kept]
    for split in SPLITS:
        if sources := spec.sources(split):
            rows[split] = [
                row
                for position, source in enumerate(sources)
                for row in _read_source(source, split, seed, task, position)
            ]
    return rows


def _read_source(source: SourceSpec, split: str, seed: int, task: str, position: int) -> list[SourceRow]:
    """The rows of one source that pass its filter, or as many of them as asked for, drawn by the seed."""
    found = read_split(source.data, source.subset, source.split, seed, task, default=split)
    kept = _filter(found, source.where or {}, f"task '{task}': the {split} split of {source.label}")
    if source.examples is not None:
        drawn = permutation(len(kept), seed, "source", task, split, position)[: source.examples]
        kept = [kept[i] for i in sorted(drawn)]
    return [SourceRow(found[i], i, source.label, source.columns or {}, source.shuffle_completions) for i in kept]


def _filter(rows: Sequence[Row], where: Where, place: str) -> list[int]:
    """Positions of the rows whose columns hold an allowed value. Raises DataError where there are none."""
    if not len(rows):
        raise DataError(f"{place} is empty")
    for column in where:
        if lookup(rows[0], column) is MISSING:
            raise DataError(f"{place}: where: no column '{column}'{suggestion(column, list(_columns(rows[0])))}")
    if not where:
        return list(range(len(rows)))
    kept = [i for i, row in enumerate(rows) if all(_allows(where[column], lookup(row, column)) for column in where)]
    if not kept:
        raise DataError(f"{place}: where: no row of {len(rows)} fits{_never(rows, where)}")
    return kept


def _columns(row: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _columns(value, f"{prefix}{name}.")


def _allows(allowed: object, value: object) -> bool:
    """Whether a value is (one of) the allowed: true is not 1, and text is not a number."""
    options = allowed if isinstance(allowed, tuple | list) else (allowed,)
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)


def _never(rows: Sequence[Row], where: Where) -> str:
    """For the first column of which no row has an allowed value: the values that it has."""
    for column, allowed in where.items():
        if not any(_allows(allowed, lookup(row, column)) for row in rows):
            seen = dict.fromkeys(repr(lookup(row, column)) for row in rows if lookup(row, column) is not MISSING)
            values = ", ".join(islice(seen, MOST_VALUES)) + (", …" if len(seen) > MOST_VALUES else "")
            return f": '{column}' is never {allowed!r}; it holds {values}"
    return " all of its conditions at once"
