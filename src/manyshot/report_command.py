"""`manyshot report`, and the end of every run: report.html, report.md and report.json in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from manyshot.errors import RunFolderError
from manyshot.report_build import Report, build_report
from manyshot.report_html import render
from manyshot.report_markdown import render_markdown
from manyshot.report_page import writable
from manyshot.rundir import write_text

FORMAT = 1


@dataclass(frozen=True)
class ReportResult:
    """Where a report was written. `markdown` is None beside a comparison, whose own report.md stays."""

    html: Path
    markdown: Path | None
    data: Path
    verdict: str


def write_report(paths: Sequence[Path], output: Path | None = None) -> ReportResult:
    """Write the report of a run, of several runs side by side, or of a comparison.

    It goes into the run's (or the comparison's) own folder, or into `output`; several runs need one. What cannot be
    read is named in the report. Raises RunFolderError where a folder holds neither a run nor a comparison.
    """
    if output is None:
        if len(paths) != 1:
            raise RunFolderError("a report of several runs needs a folder of its own: --output FOLDER")
        output = paths[0]
    if output.exists() and not output.is_dir():
        raise RunFolderError(f"{output}: is a file, not a folder")
    report = build_report(paths)
    html, markdown, data = (output / f"report.{ending}" for ending in ("html", "md", "json"))
    texts = {data: to_json(report), html: render(report.page, _version())}
    own = report.page.kind == "comparison" and (output / "results.json").exists()
    if not own:  # `manyshot compare` writes a report.md with its figures there
        texts[markdown] = render_markdown(report.page)
    # a run that is going on writes its report too: no lock is held here, so nobody's temporary file is shared
    writer = uuid4().hex[:12]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_text(path, text, writer)
    except OSError as error:
        what = f"{error.filename or output}: {error.strerror or error}"
        raise RunFolderError(f"{what}; the report was not written") from error
    return ReportResult(html, None if own else markdown, data, report.page.verdict)


def to_json(report: Report) -> str:
    """The report's data for programs: models, rounds, examples, costs by name, null for what is not known."""
    page = report.page
    value = {
        "format": FORMAT,
        "kind": page.kind,
        "title": page.title,
        "verdict": page.verdict,
        "notes": page.notes,
        "cards": [asdict(card) for card in page.cards],
        "blocks": [_without_example_scores(asdict(block)) for block in report.blocks],
        "details": [asdict(details) for details in page.details],
    }
    return writable(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def _without_example_scores(value: Any) -> Any:
    """They are in outputs.json, and many."""
    if isinstance(value, dict):
        return {key: _without_example_scores(one) for key, one in value.items() if key != "example_scores"}
    return [_without_example_scores(one) for one in value] if isinstance(value, list | tuple) else value


def _version() -> str:
    try:
        return version("manyshot")
    except PackageNotFoundError:  # a source tree that is not installed
        return ""
