"""`python -m manyshot` and the `manyshot` command: errors become one message and an exit code, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    # libraries look at these when they are imported: no progress bars or telemetry that nobody asked for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from manyshot.cli import app
    from manyshot.errors import ManyshotError
    from manyshot.memory import bound_caches

    bound_caches()

    try:
        app(standalone_mode=True)
    except ManyshotError as error:
        from manyshot.secret_text import redacted  # logs of terminals are kept, and shown to others

        print(f"manyshot: error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # whoever read our output has gone: nothing left to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"manyshot: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
