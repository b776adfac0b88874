"""`manyshot merge`: its flags, and what it shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from manyshot.merge_command import MergeResult

OPERATOR_HELP = "mean, task_arithmetic, dare, ties, consensus_ta, metis, iso_c, tsv_m, or an installed one."
Models = Annotated[
    list[str], typer.Argument(metavar="MODELS… | RECIPE", help="Model folders or PEFT adapters; or one YAML file.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The merged model's folder.")]
Base = Annotated[str | None, typer.Option("--base", help="The model that the others were trained from.")]
Preset = Annotated[str | None, typer.Option("--preset", help="What metis is where no flag says: default, or paper.")]
OperatorName = Annotated[str | None, typer.Option("--operator", help=OPERATOR_HELP)]
Weights = Annotated[str | None, typer.Option("--weights", help="One number per model: 0.5,0.3,0.2.")]
Scaling = Annotated[float | None, typer.Option("--scaling", help="Multiplies the merged task vector.")]
Density = Annotated[float | None, typer.Option("--density", help="Share of entries kept (dare, ties).")]
TrimScope = Annotated[str | None, typer.Option("--trim-scope", help="tensor or model (ties).")]
MaskThreshold = Annotated[float | None, typer.Option("--mask-threshold", help="δ (metis, consensus_ta).")]
MinAgreement = Annotated[int | None, typer.Option("--min-agreement", help="k (metis, consensus_ta).")]
Temperature = Annotated[str | None, typer.Option("--temperature", help="λ, or auto (metis).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the operator.")
]
Validation = Annotated[
    list[str] | None,
    typer.Option("--validation", metavar="MODEL=FILE", help="Examples for a model's loss gap (metis)."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16; else the base's.")]
ShardSize = Annotated[str | None, typer.Option("--shard-size", help="Largest file of weights: 5GB.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or auto.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="As many as processors if not given.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="For what an operator draws.")]
AllowCopy = Annotated[bool, typer.Option("--allow-copy", help="Tensors that do not fit stay the base's.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Merge NaN and Inf too.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a merged model that is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the merged folder and nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def merge(
    models: Models,
    output: Output,
    base: Base = None,
    operator: OperatorName = None,
    preset: Preset = None,
    weights: Weights = None,
    scaling: Scaling = None,
    density: Density = None,
    trim_scope: TrimScope = None,
    mask_threshold: MaskThreshold = None,
    min_agreement: MinAgreement = None,
    temperature: Temperature = None,
    settings: Settings = None,
    validation: Validation = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = None,
    allow_copy: AllowCopy = False,
    allow_nonfinite: AllowNonfinite = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge models that exist already, once: folders or PEFT adapters, or what a (mergekit) YAML file names."""
    from manyshot import merge_command as command

    named = {"scaling": scaling, "density": density, "trim_scope": trim_scope, "mask_threshold": mask_threshold}
    named |= {"min_agreement": min_agreement, "temperature": temperature}
    top = {"preset": preset, "dtype": dtype, "shard_size": shard_size, "seed": seed}
    recipe = command.recipe_from_flags(
        models,
        base=base,
        operator=operator,
        settings=command.operator_settings(named, settings or []),
        weights=command.parse_weights(weights),
        validation=command.parse_pairs(validation or [], "--validation"),
        top={key: value for key, value in top.items() if value is not None},
    )
    show = _Bar(hidden=quiet or as_json)
    try:
        result = command.merge(
            recipe,
            output,
            device=device,
            threads=threads,
            force=force,
            allow_copy=allow_copy,
            allow_nonfinite=allow_nonfinite,
            tick=show.tick,
            say=show.say,
        )
    except KeyboardInterrupt:
        show.close()
        print(f"manyshot: interrupted; nothing was left under {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    show.close()
    _show(result, quiet=quiet, as_json=as_json)


class _Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self, *, hidden: bool) -> None:
        self.shown = not hidden and sys.stderr.isatty()
        self.percent = -1

    def say(self, text: str) -> None:
        if self.shown:
            print(text, file=sys.stderr)

    def tick(self, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if self.shown and percent != self.percent:
            self.percent = percent
            print(f"\rmerging {percent:3d} %", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown and self.percent >= 0:
            print("\r" + " " * 20 + "\r", end="", file=sys.stderr, flush=True)


def _show(result: MergeResult, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.to_json()))
        return
    if not quiet:
        for name, weight in result.weights.items():
            print(f"{name}: weight {weight:.4g}, task vector norm {result.norm(name):.4g}")
        print(f"{result.report.kept_share:.1%} of the changed coordinates kept")
        for note in result.notes:
            print(f"note: {note}")
    print(result.output)
