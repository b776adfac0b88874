"""Links in a folder that came from elsewhere may not lead out of it: what they lead to would be read, and copied on.

A folder of the Hub's cache consists of links into the blobs beside it; those are that folder's own.
"""

from __future__ import annotations

from pathlib import Path

from manyshot.errors import ModelError


def refuse_links_out(folder: Path) -> None:
    """Raises ModelError naming the first link below `folder`, or of its files, that leads out of it."""
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    for file in sorted(root.rglob("*")):
        if file.is_symlink():
            target = file.resolve()
            if not any(target == home or target.is_relative_to(home) for home in homes):
                raise ModelError(
                    f"{folder}: {file.relative_to(root)} is a link out of the folder, to {target}; links of a model "
                    "folder may lead to files of that folder only. Put the file itself there, or give the folder that "
                    "it is in"
                )
