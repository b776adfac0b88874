"""`manyshot export`: a finished round as what other tools take, with export.json beside it, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from manyshot.disk import disk_errors
from manyshot.errors import ModelError, RecipeError
from manyshot.export_adapter import Truncation, write_adapter_folder
from manyshot.export_card import adapter_card
from manyshot.export_chat import ChatTemplate, find_template, modelfile
from manyshot.export_folder import write_model_folder
from manyshot.export_hints import Hint, adapter_hints, from_lines, mergekit_hints, model_hints
from manyshot.export_losses import load_tasks, measure_losses
from manyshot.export_mergekit import FILE_NAME, stored_dtype, write_mergekit_folder
from manyshot.export_source import ExportSource, check_output, open_source
from manyshot.merge_recipe import parse_size
from manyshot.models import load_tokenizer, quiet_transformers
from manyshot.peft_adapter import read_adapter
from manyshot.rundir import atomic_folder, read_json, write_json, write_text
from manyshot.tensor_writer import DEFAULT_SHARD_BYTES
from manyshot.tensors import Checkpoint, file_digest

Json = dict[str, Any]
Format = Literal["model", "adapter", "mergekit"]
FORMATS: tuple[str, ...] = get_args(Format)
DTYPES = ("float32", "bfloat16", "float16")
RECORD_NAME = "export.json"
# option -> the formats that it is for
BELONGS = {
    "max_shard_size": ("model",),
    "rank": ("adapter",),
    "energy": ("adapter",),
    "drop_rest": ("adapter",),
    "no_measure": ("adapter",),
}


@dataclass(frozen=True)
class ExportOptions:
    """What to write; what is not given is None (or False), so that an option of another format can be refused."""

    format: str = "model"
    round_index: int | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    rank: int | None = None
    energy: float | None = None
    drop_rest: bool = False
    no_measure: bool = False


@dataclass(frozen=True)
class ExportResult:
    """A finished export: its folder, and what its export.json says."""

    output: Path
    record: Json

    def to_json(self) -> Json:
        return {"export": str(self.output), **self.record}


def export(
    run: Path, output: Path, options: ExportOptions, *, say: Callable[[str], None] = lambda text: None
) -> ExportResult:
    """Write a finished round of a run into the folder `output`.

    Raises ManyshotError for what cannot be exported; then nothing is left under `output`.
    """
    check_options(options)
    check_output(output, run)
    with disk_errors(output, resumable=False), quiet_transformers():
        say("checking the run, its base model and the round's task vector …")
        source = open_source(run, options.round_index)
        write = {"model": _export_model, "adapter": _export_adapter, "mergekit": _export_mergekit}[options.format]
        write(source, output, options, say)
    return ExportResult(output, read_json(output / RECORD_NAME))


def export_run(
    run: str | Path,
    output: str | Path,
    format: Format = "model",
    *,
    round_index: int | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    drop_rest: bool = False,
    measure: bool = True,
) -> ExportResult:
    """Write a finished round of a run into the folder `output`, as `manyshot export` does; see docs/export.md.

    Raises manyshot.ManyshotError for what cannot be exported; then nothing is left under `output`.
    """
    shown = (format, round_index, dtype, max_shard_size, rank, energy, drop_rest, not measure)
    return export(Path(run), Path(output), ExportOptions(*shown))


def check_options(options: ExportOptions) -> None:
    """Refuse values out of range, and options of another format."""
    if options.format not in FORMATS:
        raise RecipeError(f"--format {options.format}: there are {', '.join(FORMATS)}")
    for option, formats in BELONGS.items():
        if getattr(options, option) not in (None, False) and options.format not in formats:
            flag = f"--{option.replace('_', '-')}"
            raise RecipeError(f"{flag} is for --format {' and '.join(formats)}, not for {options.format}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise RecipeError(f"--dtype {options.dtype}: there are {', '.join(DTYPES)}")
    if options.rank is not None and options.rank < 1:
        raise RecipeError(f"--rank {options.rank}: give 1 or more")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise RecipeError(f"--energy {options.energy:g}: a share, above 0 and at most 1")


def _shard_bytes(text: str | None) -> int:
    if text is None:
        return DEFAULT_SHARD_BYTES
    size = parse_size(text)
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"--max-shard-size {text}: not a size such as 5GB or 500MB")
    return size


# ---- the formats -----------------------------------------------------------------------------------------------------


def _export_model(source: ExportSource, output: Path, options: ExportOptions, say: Callable[[str], None]) -> None:
    say("writing the model …")
    shard_bytes = _shard_bytes(options.max_shard_size)

    def finish(folder: Path, found: Json) -> None:
        template = _write_modelfile(source, output, folder, adapter=False)
        hints = model_hints(output, stored_dtype(folder), chat=_chats(source))
        _write_record(source, folder, options, found, template, hints)

    write_model_folder(source, output, options.dtype, shard_bytes, finish)


def _export_adapter(source: ExportSource, output: Path, options: ExportOptions, say: Callable[[str], None]) -> None:
    tasks = () if options.no_measure else load_tasks(source)
    truncation = Truncation(options.rank, options.energy, options.drop_rest)
    with atomic_folder(output) as folder:
        found = write_adapter_folder(source, folder, truncation, options.dtype, say)
        _check_adapter(source, folder, found)
        if tasks:
            say("measuring validation losses of the base with the adapter …")
        found["losses"] = measure_losses(source, tasks, folder) if tasks else None
        write_text(folder / "README.md", adapter_card(source, found))
        template = _write_modelfile(source, output, folder, adapter=True)
        hints = adapter_hints(output, source.base, stored_dtype(source.base), found["rank"], chat=_chats(source))
        _write_record(source, folder, options, found, template, hints)


def _check_adapter(source: ExportSource, folder: Path, found: Json) -> None:
    """Read the adapter again: it changes the tensors that it should, and with scaling 1."""
    update = read_adapter(folder, Checkpoint(source.base), "export")
    scalings = {factor.scaling for factor in update.end.factors.values()}
    if set(update.names) != set(found["modules"]) or scalings != {1.0}:
        raise ModelError(f"{folder}: what was written is not the adapter that was made (scaling {scalings})")


def _export_mergekit(source: ExportSource, output: Path, options: ExportOptions, say: Callable[[str], None]) -> None:
    with atomic_folder(output) as folder:
        found = write_mergekit_folder(source, folder, options.dtype, say)
        adapters = any("+" in model["model"] for model in found["config"]["models"])
        _write_record(source, folder, options, found, None, mergekit_hints(output, FILE_NAME, adapters=adapters))


# ---- what every export has -------------------------------------------------------------------------------------------


def _tokenizer(source: ExportSource) -> Any:
    return load_tokenizer(source.base, trust_remote_code=source.recipe.trust_remote_code)


def _chats(source: ExportSource) -> bool:
    return bool(_tokenizer(source).chat_template)


def _write_modelfile(source: ExportSource, output: Path, folder: Path, *, adapter: bool) -> ChatTemplate:
    """Write Ollama's Modelfile; returns the template that was found for it."""
    tokenizer = _tokenizer(source)
    template = find_template(tokenizer)
    generation = source.base / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    ids = settings.get("eos_token_id", read_json(source.base / "config.json").get("eos_token_id"))
    ends = [
        tokenizer.convert_ids_to_tokens(one) for one in (ids if isinstance(ids, list) else [ids]) if one is not None
    ]
    stops = [stop for stop in dict.fromkeys([*ends, tokenizer.eos_token, template.stop]) if stop]
    write_text(folder / "Modelfile", modelfile(from_lines(output, adapter=adapter), template, settings, stops))
    return template


def _write_record(
    source: ExportSource,
    folder: Path,
    options: ExportOptions,
    found: Json,
    template: ChatTemplate | None,
    hints: list[Hint],
) -> None:
    """Write export.json: what this is, of what, every file with its size and SHA-256, and what to do with it."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    record = {"format": options.format} | source.to_json() | {options.format: found}
    record |= {
        "chat_template": template.to_json() if template is not None else None,
        "commands": [hint.to_json() for hint in hints],
        "files": {
            file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
            for file in files
        },
        "versions": {name: version(name) for name in ("manyshot", "torch", "transformers", "peft")},
    }
    write_json(folder / RECORD_NAME, record)
