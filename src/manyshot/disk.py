"""What the disk does wrong, as an error that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from manyshot.errors import RunFolderError

# what reading and writing raise; safetensors has an error of its own
DISK_ERRORS = (OSError, SafetensorError)


@contextmanager
def disk_errors(output: Path, *, resumable: bool = True) -> Iterator[None]:
    """A read or write that fails (disk full, no permission, folder gone) as an error that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever listens went away; that is no matter of the disk
    except DISK_ERRORS as error:
        file = getattr(error, "filename", None) or output
        reason = getattr(error, "strerror", None) or error
        if not resumable:
            raise RunFolderError(f"{file}: {reason}; nothing was left under {output}") from error
        raise RunFolderError(
            f"{file}: {reason}. Every step that was finished stays in {output}; once this is put right, --resume goes "
            "on from there"
        ) from error
