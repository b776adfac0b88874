"""The run folder is the state: names, atomic writes, and what has been finished.

A file appears under its final name only when it is complete (temporary name, fsync, rename), and a step's record is
written after the files it speaks of. So a run killed at any moment resumes from the last finished step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from manyshot.errors import RunFolderError
from manyshot.fault_points import passing

PARTIAL = ".partial"
# what a local update that failed leaves
FAILURE = "failure.json"
# what measuring a model leaves
MEASURED = ("losses.json", "scores.json", "outputs.json")
# what a round whose merge was taken back says of it
ROLLBACK = "rollback.json"
# who writes into the folder (run_lock.py)
LOCK = ".lock"
# of a name in a record, and of each of its parts, in bytes; systems end at 4096 for a whole path and at 255
LONGEST_PLACE, LONGEST_PART = 2048, 255


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in `runs/<name>/`."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def splits(self) -> Path:
        return self.path / "splits.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def post_hoc(self) -> Path:
        return self.path / "post_hoc"

    def round(self, round_index: int) -> Path:
        return self.path / f"round_{round_index:03d}"

    def local_update(self, round_index: int, task: str) -> Path:
        return self.round(round_index) / task

    def expert(self, task: str) -> Path:
        return self.path / "experts" / task

    def pretrained(self, environment: Mapping[str, Any] | None = None) -> Path:
        """The folder of the run's pretrained model, as environment.json names it. Raises RunFolderError without one."""
        described = (read_json(self.environment) if environment is None else environment).get("base_model")
        if not isinstance(described, dict) or not isinstance(described.get("path"), str):
            raise RunFolderError(f"{self.environment}: does not say base_model.path")
        if not os.path.isdir(described["path"]):  # pathlib raises where a name is too long to be one
            raise RunFolderError(f"{self.path}: its pretrained model is gone ({described['path']})")
        return Path(described["path"])


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, writer: str = "") -> Iterator[IO[bytes]]:
    """Open `<path>.partial` for writing; on success fsync and rename to `path`, on failure remove it.

    Who writes without the folder's lock says who it is: `<path>.<writer>.partial` is nobody else's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{writer}{PARTIAL}" if writer else path.name + PARTIAL)
    try:
        with open(partial, "wb") as stream:
            passing("open", partial)
            yield stream
            stream.flush()
            passing("write", partial)
            passing("fsync", partial)
            os.fsync(stream.fileno())
        _rename(partial, path)
    except BaseException as error:
        name_file(error, path)
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty `<path>.partial`; on success fsync what is in it and rename, on failure remove it.

    An existing `path` is replaced: callers ask for that only for a step that has no record yet.
    """
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    try:
        partial.mkdir(parents=True)
        passing("open", partial)
        yield partial
        passing("write", partial)
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        passing("fsync", partial)
        fsync_folder(partial)
        remove(path)
        _rename(partial, path)
    except BaseException as error:
        name_file(error, path)
        remove(partial)
        raise


def _rename(partial: Path, path: Path) -> None:
    passing("rename", partial)
    os.replace(partial, path)
    passing("named", path)
    fsync_folder(path.parent)


def is_passing(path: Path) -> bool:
    """Whether a file is there only while something is written: what a kill in the very first writes leaves."""
    return path.name.endswith(PARTIAL) or path.name == LOCK


def is_below(name: str) -> bool:
    """Whether a place that a record names can be there, and below the record's folder."""
    path = PurePosixPath(name)
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:
        return False
    possible = all(len(part) <= LONGEST_PART and b"\0" not in part for part in parts)
    return possible and 0 < len(name) <= LONGEST_PLACE and not path.is_absolute() and ".." not in path.parts


def name_file(error: BaseException, path: Path) -> None:
    """A failed write (disk full) does not say which file it was; note it in the error."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing there is fine."""
    if path.exists() or path.is_symlink():
        passing("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path | str, target: Path | str) -> bool:
    """Put a file under a second name; True where that is a hard link, False for a copy: the file system makes none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically, with sorted keys and a final newline: the same value gives the same bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def content_key(*values: Any) -> str:
    """SHA-256 of JSON values: equal content, equal key."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_regular(path: Path) -> None:
    """Refuse what is there and is no file: a folder, a link to itself, a pipe, which would be waited for for ever."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) != errno.ELOOP:
            return  # reading says it
        regular = False
    if not regular:
        raise RunFolderError(f"{path}: is no regular file; remove it to redo the step that writes it")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a damaged file is an error that names it."""
    require_regular(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: damaged JSON ({error}); remove it to redo the step that wrote it") from None
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_text(path: Path, text: str, writer: str = "") -> None:
    """Write a text file atomically; one that says so already is left alone. `writer`: see atomic_file."""
    blob = text.encode()
    if path.is_file() and path.read_bytes() == blob:
        return
    with atomic_file(path, writer) as stream:
        stream.write(blob)


def link_atomically(link: Path, target: Path) -> None:
    """Point the symbolic link `link` at `target` (relative), replacing an older link in one step."""
    wanted, temporary = os.path.relpath(target, link.parent), link.with_name(link.name + PARTIAL)
    if link.is_symlink() and os.readlink(link) == wanted:
        return
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(wanted)
        _rename(temporary, link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line; after a crash in the middle of a line, the broken line is closed first."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        passing("append", path)
        with open(path, "a+b") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode())
        passing("appended", path)
    except OSError as error:
        name_file(error, path)
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, leaving out a line that a crash cut off."""
    require_regular(path)
    if not path.exists():
        return []
    values = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):  # cut off; or numbers of thousands of digits, thousands of brackets
            continue
    return [value for value in values if isinstance(value, dict)]


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse before the start what the disk cannot hold."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise RunFolderError(
            f"{folder}: {what} needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another --output"
        )
