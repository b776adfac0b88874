"""Manifests: every step names the files that it wrote, with sizes and hashes, in the manifest of its folder.

    {"files": {"adapter/adapter_model.safetensors": {"step": "local update", "bytes": 1234, "sha256": "…"}, …}}

A folder's manifest is among the files that the folder around it names, so that a folder that was removed is missed.
While a step is redone (`--repair`) what it must come to again stands under "expected". A step that an older version
left without a manifest is taken as it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.errors import RunFolderError
from manyshot.removed import read_removed
from manyshot.rundir import PARTIAL, is_below, read_json, remove, write_json
from manyshot.tensors import file_digest

Json = dict[str, Any]
MANIFEST = "manifest.json"
# files hashed at once, and from how many bytes on a person is told that it takes a while
THREADS, LONG = 4, 10**9
# what no file's size reaches on any system
LARGEST = 2**63
# what may be removed as a whole, to save space: a resume makes it anew
REMADE = "merged"
# what a step looks at to know whether it has been done
RECORDS = {
    "local update": ("local_update.json",),
    "losses": ("losses.json",),
    "measurement": ("scores.json", "losses.json"),
    "merge": ("merge.json",),
    "merged model": ("merged",),
    "carried adapter": ("carried_adapter",),
    "trial": (".",),  # of a comparison, which keeps little of it
}


@dataclass(frozen=True)
class Damage:
    """A file that is not what a step left."""

    folder: Path
    step: str
    name: str
    what: str


# ---- writing ---------------------------------------------------------------------------------------------------------


def seal(folder: Path, step: str, files: Iterable[Path], known: Mapping[str, str] | None = None) -> None:
    """Add a finished step's files to its folder's manifest, once; `known`: hashes that are there already, by name.

    Where another step names the same files, just as they are, its entries stay. Raises RunFolderError where a step was
    redone and came to something else.
    """
    manifest = read_manifest(folder)
    if any(entry["step"] == step for entry in manifest["files"].values()):
        return
    found = {}
    for file in sorted(files):
        name = file.relative_to(folder).as_posix()
        digest = (known or {}).get(name) or file_digest(file)
        found[name] = {"step": step, "bytes": file.stat().st_size, "sha256": digest}
    if found and all(_same(manifest["files"].get(name), entry) for name, entry in found.items()):
        return
    expected, rest = _of_step(manifest.pop("expected", {}), step)
    expected |= {name: rest.pop(name) for name in found if name in rest}
    if unlike := sorted(name for name, entry in expected.items() if not _same(found.get(name), entry)):
        raise RunFolderError(
            f"{folder / unlike[0]}: was redone ({step}) and is not what it was: this machine or its libraries compute "
            "other bits. Put it back from a copy; or remove the manifest.json of its folder and of those around it, to "
            "go on with what it is now beside all that came of what it was"
        )
    if rest:
        manifest["expected"] = rest
    write_json(folder / MANIFEST, manifest | {"files": manifest["files"] | found})


def _same(one: Json | None, other: Json) -> bool:
    """Whether two entries speak of the same bytes, whatever steps they name."""
    return one is not None and (one["bytes"], one["sha256"]) == (other["bytes"], other["sha256"])


def linked_digests(folder: Path, other: Path, files: Iterable[Path]) -> dict[str, str]:
    """The hashes in the manifest of `other`, for those files of `folder` that are hard links to the same ones there."""
    named, found = read_manifest(other)["files"], {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        if name in named and (other / name).is_file() and (other / name).samefile(file):
            found[name] = named[name]["sha256"]
    return found


def unseal(folder: Path, step: str) -> None:
    """Forget what a step left, as it will leave something else now."""
    manifest = read_manifest(folder)
    left, kept = _of_step(manifest["files"], step)
    if left:
        write_json(folder / MANIFEST, manifest | {"files": kept})


def _of_step(entries: Json, step: str) -> tuple[Json, Json]:
    """A manifest's entries of one step, and all others."""
    own = {name: entry for name, entry in entries.items() if entry["step"] == step}
    return own, {name: entry for name, entry in entries.items() if name not in own}


def files_in(*places: Path) -> list[Path]:
    """The files that there are among some files and below some folders."""
    found = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [file for file in found if file.is_file()]


def read_manifest(folder: Path) -> Json:
    """A folder's manifest, empty where there is none. Raises RunFolderError for one that is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return {"files": {}}
    manifest = read_json(path)
    parts = [manifest.get("files"), manifest.get("expected", {})]
    if not all(isinstance(part, dict) and all(map(_is_entry, part, part.values())) for part in parts):
        raise RunFolderError(f"{path}: is damaged; remove it to take the folder's files as they are")
    return manifest


def _is_entry(name: str, entry: object) -> bool:
    """Whether it names a file below the folder, and says what a manifest says of one."""
    types = {"step": str, "bytes": int, "sha256": str}
    if not is_below(name) or not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != types:
        return False
    return 0 <= int(entry["bytes"]) < LARGEST


def known_digest(file: Path) -> str:
    """The hash of a file; of one that was removed since (`keep`), what the manifest around it says.

    Raises RunFolderError where nothing says it.
    """
    if file.is_file():
        return file_digest(file)
    for folder in file.parents[:3]:
        if (entry := read_manifest(folder)["files"].get(file.relative_to(folder).as_posix())) is not None:
            digest: str = entry["sha256"]
            return digest
    raise RunFolderError(f"{file}: is gone")


# ---- checking --------------------------------------------------------------------------------------------------------


def check_files(root: Path, say: Callable[[str], None], *, repair: bool, how: str) -> None:
    """Compare everything below `root` with its manifests; `repair` makes damaged steps ones that are to be done.

    Raises RunFolderError naming every damaged file and its step; `how` is the flag that redoes them.
    """
    damages = find_damages(root, say)
    if not damages:
        return
    shown = [f"{(one.folder / one.name).relative_to(root)} {one.what}" for one in damages]
    steps = ", ".join(dict.fromkeys(f"{_place(root, one.folder)}{one.step}" for one in damages))
    if not repair:
        raise RunFolderError(
            f"{root}: not as it was left: {'; '.join(shown[:10])}{' …' if len(shown) > 10 else ''}. Put it back from a "
            f"copy, or use {how}, which redoes just: {steps}"
        )
    for text in shown:
        say(f"repair: {text}")
    say(f"repair: to be redone: {steps}")
    undo(damages)


def _place(root: Path, folder: Path) -> str:
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}: "


def find_damages(root: Path, say: Callable[[str], None]) -> list[Damage]:
    """Every file that a manifest below `root` names and that is gone, cut short or changed."""
    named = []
    for path in sorted(root.rglob(MANIFEST)):
        if not any(part.endswith(PARTIAL) for part in path.relative_to(root).parts):
            named += [(path.parent, name, entry) for name, entry in read_manifest(path.parent)["files"].items()]
    gone = {root / name for name in read_removed(root)}
    named = [one for one in named if gone.isdisjoint((one[0] / one[1]).parents) and one[0] / one[1] not in gone]
    size = sum(entry["bytes"] for _, _, entry in named)
    if size >= LONG:
        say(f"checking {len(named)} files against their manifests, {size / 1e9:.1f} GB")
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda one: _compare(*one), named)
    return [
        Damage(folder, entry["step"], name, what)
        for (folder, name, entry), what in zip(named, found, strict=True)
        if what is not None
    ]


def _compare(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file; None where it is as its manifest says, or where a repair is on its way."""
    file = folder / name
    if name.startswith(f"{REMADE}/") and not (folder / REMADE).exists():
        return None
    if not file.is_file():
        return "is gone"
    if file.name == MANIFEST and "expected" in read_manifest(file.parent):
        return None
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"has {size} bytes, and had {entry['bytes']}"
    return None if file_digest(file) == entry["sha256"] else "was changed"


def undo(damages: Sequence[Damage]) -> None:
    """Remove damaged files and the records of their steps, and note what the steps must come to again."""
    for folder, step in dict.fromkeys((one.folder, one.step) for one in damages):
        if folder.exists():
            manifest = read_manifest(folder)
            again, kept = _of_step(manifest["files"], step)
            write_json(folder / MANIFEST, {"files": kept, "expected": manifest.get("expected", {}) | again})
        for record in RECORDS.get(step, ()):
            remove(folder / record)
    for one in damages:
        remove(one.folder / one.name)
