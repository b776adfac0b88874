"""The parts that a report's page is made of, before they are HTML or Markdown: all text, no markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from manyshot.compare_render import MISSING, format_number
from manyshot.report_data import Details, Numbers, Problem, Role

ChartKind = Literal["radar", "lines", "stack", "heat", "points", "bars"]
# digits that are kept of the numbers in the page's data; tables show fewer
SIGNIFICANT = 6


@dataclass(frozen=True)
class Series:
    """One line, bar or marker of a figure's charts. A task's colour and pattern follow from its `place`.

    What is not `shown` at first can be chosen in the legend.
    """

    name: str
    role: Role | Literal["task"]
    place: int = 0
    shown: bool = True


@dataclass(frozen=True)
class Chart:
    """`data` is what the chart's script draws; `label` says in a sentence what is to be seen."""

    kind: ChartKind
    title: str
    label: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """A table: the first `num_texts` columns are text, the others numbers that have been written out."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_texts: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """Charts with one legend and one caption, and the table behind them."""

    title: str
    caption: str
    series: tuple[Series, ...]
    charts: tuple[Chart, ...]
    sheet: Sheet


@dataclass(frozen=True)
class Card:
    """One number to see first; `beside` are others to hold it against."""

    label: str
    value: str
    note: str = ""
    beside: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """`absent` says why there is nothing to show where there are no figures."""

    id: str
    title: str
    figures: tuple[Figure, ...]
    absent: str
    sheets: tuple[Sheet, ...] = ()


@dataclass(frozen=True)
class Page:
    """Everything that is shown, but for the examples, guards and recipes of `details`."""

    kind: Literal["run", "runs", "comparison"]
    title: str
    verdict: str
    notes: tuple[str, ...]
    cards: tuple[Card, ...]
    overview: tuple[Sheet, ...]
    sections: tuple[Section, ...]
    costs: Section
    details: tuple[Details, ...]
    problems: tuple[Problem, ...] = ()
    tables: tuple[Sheet, ...] = ()

    @property
    def no_examples(self) -> str:
        """Why there are no examples, where there are none."""
        if self.kind == "comparison":
            return "no prompts were kept (references/…/test/examples.json), or there are several models"
        return "no prompts were kept beside the pretrained model's scores (examples.json)"


# ---- numbers in words ------------------------------------------------------------------------------------------------


def shown(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A number as people read it; a dash for what is not known."""
    return MISSING if value is None else format_number(value, digits, signed=signed)


def within(value: float | None, error: float | None, digits: int = 3) -> str:
    """`0.914 ± 0.012`."""
    return shown(value, digits) + (f" ± {shown(error, digits)}" if value is not None and error is not None else "")


def rounded(value: float | None) -> float | None:
    """With as many digits as a picture can use: the page stays small."""
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")


def listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; the rest as a number."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def has_any(values: Numbers) -> bool:
    return any(value is not None for value in values.values())


def writable(text: str) -> str:
    """Half a surrogate pair, which damaged JSON may hold, cannot be encoded; a replacement character can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
