"""`manyshot inspect`: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN | MODEL…", help="A run folder, or models of --base.")],
    base: Annotated[Path | None, typer.Option("--base", help="The models' base model: models are inspected.")] = None,
    round_index: Annotated[int | None, typer.Option("--round", help="Round of a run (default: last finished).")] = None,
    reference: Annotated[
        Literal["pretrained", "start"] | None,
        typer.Option("--reference", help="What a round's task vectors are relative to (default: as the run merges)."),
    ] = None,
    mask_threshold: Annotated[float, typer.Option("--mask-threshold", min=0, help="δ of the task masks.")] = 0.3,
    min_agreement: Annotated[int, typer.Option("--min-agreement", min=1, help="k of the consensus mask.")] = 2,
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Effective ranks (singular values).")] = True,
    rank_limit: Annotated[
        int, typer.Option("--rank-limit", min=1, help="Largest dense matrix with a rank, in entries.")
    ] = 1 << 20,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads (default: processors).")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw a picture (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Compare task vectors before merging: norms, cosines, sign conflicts, mask overlap, effective ranks."""
    from manyshot.cli_inspect_view import inspect_progress, require_matplotlib, show_inspection
    from manyshot.inspect_input import open_inputs
    from manyshot.inspect_models import InspectSettings
    from manyshot.inspect_models import inspect as inspect_models

    if png is not None:
        require_matplotlib()
    settings = InspectSettings(mask_threshold, min_agreement, ranks, rank_limit, threads)
    with inspect_progress(as_json=as_json) as tick:
        found = inspect_models(open_inputs(paths, base, round_index, reference), settings, tick)
    show_inspection(found, as_json=as_json, png=png)
