"""Commands about a run that exists: how far it is."""

from __future__ import annotations

import json
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
    from manyshot.cli_live import troubles, watch_json
    from manyshot.cli_live import watch as watch_run
    from manyshot.cli_view import make_console, show_lines, show_status
    from manyshot.live_state import LiveRun, to_json
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
