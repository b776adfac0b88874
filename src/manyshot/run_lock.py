"""One writer for a folder: whoever writes into it holds its lock, and everyone else is told who that is.

The lock is the system's own (flock) on a file in the folder: it ends with its holder, however that ends, and the file
says who that was. Where a file system has no such locks the file alone decides, which can tell a dead holder only on
the machine that it ran on. Readers (status, serve, report, export) never ask for it.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manyshot.errors import RunFolderError
from manyshot.process_mark import is_alive, process_mark
from manyshot.rundir import LOCK, PARTIAL, remove

# what flock says where a file system has no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def one_writer(folder: Path) -> Iterator[str | None]:
    """Hold the folder's lock, making the folder where it is missing; yields who ended without giving the lock back.

    Removes what such a holder left half written. Raises RunFolderError naming the holder where there is one.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, before = _take(folder)
        try:
            for path in sorted(folder.rglob(f"*{PARTIAL}")):
                remove(path)
            yield before
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is still ours
            os.close(descriptor)
    finally:
        for path in missing:  # where nothing came of it, no empty folder stays
            with suppress(OSError):
                path.rmdir()


def clear(folder: Path) -> None:
    """Remove everything in a folder whose lock is held, but for the lock."""
    for path in sorted(folder.iterdir()):
        if path.name != LOCK:
            remove(path)


def _take(folder: Path) -> tuple[int, str | None]:
    """A locked descriptor of the lock file, and the holder that ended without giving it back."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(descriptor)
            mark, holder = _read(descriptor)
            if locked is False or (locked is None and mark and is_alive(mark) is not False):
                by_hand = f"; if it has ended, remove {path}" if locked is None else ""
                raise RunFolderError(
                    f"{folder}: {holder or 'another process'} writes into it; wait for its end, or stop it{by_hand}. "
                    "manyshot status, serve and report may be used meanwhile"
                )
            if _is_still(descriptor, path):  # else its holder gave it back, and removed it, after we had opened it
                _write(descriptor)
                return descriptor, holder
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> tuple[str, str | None]:
    """The mark of the process that the lock file names, and that process in words; nothing where it names none."""
    try:
        found = json.loads(os.pread(descriptor, 10_000, 0))
        return str(found["process"]), f"{found['user']}'s process {found['pid']} on {found['host']} ({found['since']})"
    except (ValueError, KeyError, TypeError):  # empty: the holder has not come to write it, or was killed just then
        return "", None


def _write(descriptor: int) -> None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container numbers may have no names
        user = str(os.getuid())
    since = time.strftime("since %Y-%m-%d %H:%M:%S %Z")
    who = {"process": process_mark(), "pid": os.getpid(), "host": socket.gethostname(), "user": user, "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode() + b"\n", 0)
