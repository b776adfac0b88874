"""What a run has removed on purpose (`keep`), so that nobody takes it for damage.

removed.json: {"removed": {"round_001/math/adapter": "keep.adapters: last", …}}: places below the run folder, and the
setting that said so. It is written before anything is removed: a kill in between leaves what the next start removes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from manyshot.errors import RunFolderError
from manyshot.rundir import is_below, read_json, remove, write_json

REMOVED = "removed.json"


def read_removed(run: Path) -> dict[str, str]:
    """The places that were removed, and why. Raises RunFolderError for a damaged record."""
    path = run / REMOVED
    if not path.exists():
        return {}
    found = read_json(path).get("removed")
    if not isinstance(found, dict) or not all(map(_is_place, found, found.values())):
        raise RunFolderError(f"{path}: is damaged; remove it, and --resume --repair makes again what it spoke of")
    return found


def _is_place(name: str, why: object) -> bool:
    """Whether it is a place inside a round or among the experts: nothing else is ever removed."""
    parts = PurePosixPath(name).parts
    inside = len(parts) > 1 and (parts[0] == "experts" or parts[0].startswith("round_"))
    return inside and is_below(name) and isinstance(why, str)


def remove_places(run: Path, places: Mapping[Path, str]) -> None:
    """Note the places, then remove them."""
    known = read_removed(run)
    found = known | {place.relative_to(run).as_posix(): why for place, why in places.items()}
    if found != known:
        write_json(run / REMOVED, {"removed": found})
    for place in sorted(places):
        remove(place)


def finish_removing(run: Path) -> list[str]:
    """Remove what a kill left of noted places; returns their names."""
    left = [name for name in sorted(read_removed(run)) if (run / name).exists()]
    for name in left:
        remove(run / name)
    return left


def made_again(run: Path, folder: Path) -> None:
    """Take the places below `folder` off the record, as a step is about to make them again."""
    known = read_removed(run)
    kept = {name: why for name, why in known.items() if folder not in (run / name, *(run / name).parents)}
    if kept != known:
        write_json(run / REMOVED, {"removed": kept})


def why_removed(run: Path, place: Path) -> str | None:
    """The setting that had a place, or one around it, removed; None where it was not."""
    name = PurePosixPath(place.relative_to(run).as_posix())
    known = read_removed(run)
    return next((known[str(one)] for one in (name, *name.parents) if str(one) in known), None)


def refuse_removed(run: Path, place: Path, wanted: str) -> None:
    """Raise RunFolderError where something is `wanted` that the run removed."""
    if not place.exists() and (why := why_removed(run, place)) is not None:
        raise RunFolderError(
            f"{run}: {wanted} needs {place.relative_to(run).as_posix()}, which the run removed as it went on ({why}); "
            "put it back from a copy, or run again with another keep"
        )
