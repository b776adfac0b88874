"""Commands about a run that exists: how far it is, and its report as a page that follows it, its model on the Hub."""

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


def push(
    run_folder: RunPath,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository on the Hugging Face Hub: name or owner/name.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Everyone may read it; private otherwise.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before uploading.")] = False,
) -> None:
    """Upload a run's merged model and its card, and nothing else, to the Hugging Face Hub. Shows first what it uploads.

    The token is the environment's (HF_TOKEN) or that of `hf auth login`.
    """
    import sys

    from huggingface_hub import HfApi

    from manyshot.cli_view import show_lines, show_upload
    from manyshot.errors import PushError
    from manyshot.push import find_target, plan_upload
    from manyshot.push import push as upload_model

    upload = plan_upload(run_folder, repo, private=not public)
    if not yes and not sys.stdin.isatty():
        raise PushError("nobody can be asked here; --yes uploads without asking")
    api = HfApi()
    target = find_target(upload, api)
    show_upload(upload, target)
    if not yes and not typer.confirm(f"Upload to {target}?", default=False):
        show_lines(["nothing was uploaded"])
        raise typer.Exit(1)
    print(upload_model(upload, target, api))
