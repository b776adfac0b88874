"""`manyshot export`: its flags, and what it shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyshot.export_command import ExportResult

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Format = Annotated[str, typer.Option("--format", "-f", help="model, adapter or mergekit.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The new folder (default: in exports/).")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="Which round (default: the last).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 (default: as the run writes).")]
ShardSize = Annotated[str | None, typer.Option("--max-shard-size", help="model: largest file of weights, 5GB.")]
Rank = Annotated[int | None, typer.Option("--rank", help="adapter: its rank; with --energy, the most it may be.")]
Energy = Annotated[
    float | None, typer.Option("--energy", help="adapter: share of Σσ² that every module keeps (default: 0.99).")
]
DropRest = Annotated[bool, typer.Option("--drop-rest", help="adapter: leave out what LoRA cannot express.")]
NoMeasure = Annotated[bool, typer.Option("--no-measure", help="adapter: do not measure what it costs in loss.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the folder and nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def export(
    run_folder: RunPath,
    format_: Format = "model",
    output: Output = None,
    round_index: Round = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = None,
    rank: Rank = None,
    energy: Energy = None,
    drop_rest: DropRest = False,
    no_measure: NoMeasure = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Hand a run's merged model on: as a model folder, as one LoRA adapter, or as a mergekit file with its experts."""
    from manyshot.export_command import ExportOptions
    from manyshot.export_command import export as run_export

    options = ExportOptions(format_, round_index, dtype, max_shard_size, rank, energy, drop_rest, no_measure)
    folder = output or Path("exports") / f"{run_folder.resolve().name}-{format_}"
    shown = not quiet and not as_json and sys.stderr.isatty()
    try:
        result = run_export(run_folder, folder, options, say=_say if shown else lambda text: None)
    except KeyboardInterrupt:
        print(f"manyshot: interrupted; nothing was left under {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    show(result, quiet=quiet, as_json=as_json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(result: ExportResult, *, quiet: bool, as_json: bool) -> None:
    """What was written, how exact it is, what to do with it; the folder, last."""
    if as_json:
        print(json.dumps(result.to_json()))
        return
    if not quiet:
        record = result.record
        for line in (*_said_of(record["format"], record[record["format"]]), *_chat_lines(record), *_commands(record)):
            print(line)
        print("export:")
    print(result.output)


def _said_of(format_: str, found: dict[str, Any]) -> list[str]:
    if format_ == "model":
        return [f"{found['tensors']} tensors: {found['weights']}"]
    if format_ == "mergekit":
        why = found["why_not_from_experts"]
        made = f"the merged model's own task vector ({why})" if why else "the experts"
        return [f"{found['method']} over {made}", *(f"note: {one}" for one in found["differences"])]
    modules = found["modules"]
    worst = max(modules, key=lambda name: modules[name]["relative_error"])
    lines = [
        f"rank {found['rank']}, {len(modules)} modules; relative error {found['relative_error']:.4g}, "
        f"at most {modules[worst]['relative_error']:.4g} ({worst})"
    ]
    if found["dropped"]:
        lines.append(
            f"left out: {', '.join(found['dropped'])}; with them the relative error is "
            f"{found['relative_error_with_dropped']:.4g}"
        )
    if found["losses"] is None:
        return [*lines, "losses were not measured"]
    for task, entry in found["losses"]["tasks"].items():
        cost = found["losses"]["cost"][task]
        lines.append(
            f"{task}: validation loss {entry['adapter']:.4f} with the adapter, {entry['merged']:.4f} merged "
            f"({cost:+.4f}), {entry['pretrained']:.4f} pretrained"
        )
    return lines


def _chat_lines(record: dict[str, Any]) -> list[str]:
    chat = record["chat_template"]
    if chat is None:
        return []
    if chat["text"] is None:
        return [f"Modelfile without a chat template: {chat['reason']}"]
    return [
        f"Modelfile with the model's chat template ({chat['family']})",
        *(f"note: {note}" for note in chat["notes"]),
    ]


def _commands(record: dict[str, Any]) -> list[str]:
    lines = []
    for hint in record["commands"]:
        lines += ["", f"{hint['tool']}{': ' + hint['note'] if hint['note'] else ''}"]
        lines += [f"    {line}" for line in hint["lines"]]
    return [*lines, ""]
