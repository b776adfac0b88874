"""Commands about a run that exists: how far it is, and its report as a page that follows it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def status(
    run_folder: RunPath,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Say how far a run is: what is done, what comes next, the scores so far.

    With --watch, exit code 0 says that the run finished, 1 that it died, 130 that Ctrl-C ended the watching.
    """
    from manyshot.cli_live import watch as watch_run
    from manyshot.cli_live import watch_json
    from manyshot.cli_view import make_console, show_lines, show_status
    from manyshot.live_state import LiveRun, to_json
    from manyshot.live_text import troubles
    from manyshot.status import run_status

    if watch:
        try:
            finished = watch_json(run_folder) if as_json else watch_run(run_folder, make_console())
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        raise typer.Exit(0 if finished else 1)
    state, found = LiveRun(run_folder).read(), run_status(run_folder)
    if as_json:
        print(json.dumps(found | to_json(state)))
    else:
        show_status(found)
        show_lines(troubles(state))


def serve(
    run_folder: RunPath,
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: any that is free.")] = 8765,
) -> None:
    """Show the report of a run as a page of this machine, which follows the run while it goes on. Ctrl-C ends it."""
    import manyshot
    from manyshot.live_state import LiveRun
    from manyshot.report_build import build_report
    from manyshot.report_html import render
    from manyshot.serve import LivePage, PageServer

    LiveRun(run_folder).read()  # a folder without a run is refused now
    page = LivePage(run_folder, lambda path: render(build_report([path]).page, manyshot.__version__))
    with PageServer(page, port) as server:
        print(f"{run_folder}: {server.url} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
