"""`manyshot report`: its flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="A run folder, several of them, or the folder of a comparison.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write it (default: the run's own folder).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Write report.html, report.md and report.json: what came out, with charts that need no network."""
    from manyshot.report_command import write_report

    result = write_report(paths, output)
    if as_json:
        files = {name: str(path) for name, path in vars(result).items() if isinstance(path, Path)}
        print(json.dumps(files | {"verdict": result.verdict}, ensure_ascii=False))
        return
    print(result.verdict)
    print(result.html)
