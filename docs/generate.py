"""Writes what the documentation says of the code from the code: `python docs/generate.py`, or --check to only compare.

docs/reference/ is made as a whole; in docs/operators/<name>.md and docs/metis_default.md the table between two comments
is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from generate_api import api_page, cli_page, source_page
from generate_keys import key_pages, parameter_table, preset_table
from manyshot.operators import BUILT_IN

DOCS = Path(__file__).parent
TABLE = re.compile(r"(?<=<!-- parameters, made by docs/generate.py -->\n).*?(?=<!-- end -->)", re.S)


def pages() -> dict[Path, str]:
    """Every file that is made from the code, and what it should say."""
    reference = {"python.md": api_page(), "commands.md": cli_page(), "source.md": source_page()} | key_pages()
    made = {DOCS / "reference" / name: text for name, text in reference.items()}
    tables = {DOCS / "operators" / f"{name}.md": parameter_table(kind) for name, kind in BUILT_IN.items()}
    for path, table in (tables | {DOCS / "metis_default.md": preset_table()}).items():
        text, count = TABLE.subn(lambda _, table=table: f"\n{table}\n", path.read_text("utf-8"))
        if count != 1:
            raise ValueError(f"{path}: needs one table of parameters between the two comments, found {count}")
        made[path] = text
    return made


def outdated() -> list[Path]:
    """Files that say something else than the code."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]


def main() -> None:
    """Write what is outdated; with --check say it, and end with 1."""
    made = pages()
    for path in outdated():
        print(path.relative_to(DOCS.parent))
        if "--check" not in sys.argv:
            path.write_text(made[path], "utf-8")
    if "--check" in sys.argv and outdated():
        sys.exit(1)


if __name__ == "__main__":
    main()
