"""A page as one HTML file that asks nothing of any network: the only importer of jinja2.

Text reaches the page in two ways: through the template engine, which escapes it, and as JSON in a script element that
is data, with the characters escaped that could end it. A content security policy names the hashes of the three pieces
of code and style, so nothing else runs even if something slips through.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from manyshot.report_page import Figure, Page, Section, shown, writable

LIBRARY = "echarts/echarts.min.js"
SCRIPTS = ("theme.js", "charts.js", "page.js")
STYLE = "style.css"
# characters that could end a script element, or a line of JavaScript, inside JSON
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True)
class Placed:
    """A figure with its name in the page; a switched one shows one of its charts at a time."""

    id: str
    figure: Figure

    @property
    def switched(self) -> bool:
        return len(self.figure.charts) > 1 and self.figure.charts[0].kind == "heat"


@cache
def asset(name: str) -> str:
    """A file of the page: code, style, or template."""
    return files("manyshot").joinpath("report_assets", name).read_text("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["number"] = shown
    return environment


def render(page: Page, version: str) -> str:
    """The page as HTML."""
    sections = [(section, _placed(section)) for section in (*page.sections, page.costs)]
    drawn = embedded({"figures": [_drawn(one) for _, figures in sections for one in figures]})
    library, script, style = asset(LIBRARY), "\n".join(asset(name) for name in SCRIPTS), asset(STYLE)
    values = {
        "page": page,
        "contents": _contents(page),
        "sections": sections[:-1],
        "costs": sections[-1],
        "version": version,
        "policy": policy([library, script], style),
        # our own files, and what `embedded` has escaped: the only text that the engine does not escape
        "style": Markup(style),
        "library": Markup(library),
        "script": Markup(script),
        "data": Markup(drawn),
    }
    return writable(_environment().get_template("page.html.j2").render(values))


def _placed(section: Section) -> list[Placed]:
    return [Placed(f"{section.id}-{place}", figure) for place, figure in enumerate(section.figures)]


def _drawn(one: Placed) -> dict[str, Any]:
    """What the page's script needs of a figure."""
    return {
        "id": one.id,
        "series": [asdict(series) for series in one.figure.series],
        "charts": [
            {"id": f"{one.id}-chart-{place}", "kind": chart.kind, "data": chart.data}
            for place, chart in enumerate(one.figure.charts)
        ],
    }


def _contents(page: Page) -> list[tuple[str, str]]:
    """(id, title) of the sections that there are."""
    return [
        *([("problems", "Missing or damaged")] if page.problems else []),
        *([("models", "All models")] if page.overview else []),
        *((section.id, section.title) for section in page.sections),
        ("examples", "Examples"),
        ("guards", "Guards"),
        ("costs", page.costs.title),
        *([("tables", "Tables")] if page.tables else []),
        ("recipe", "Recipe, versions, command"),
    ]


def embedded(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(ESCAPED.get(char, char) for char in text) if ESCAPED.keys() & set(text) else text


def policy(scripts: list[str], style: str) -> str:
    """Nothing is loaded, sent or framed; what runs is named by its hash."""
    run = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {run}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
