"""Versions of packages: one of each, with the hashes of its files, and none here that was not chosen."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# what installs packages is not among them
INSTALLERS = ("pip", "setuptools", "wheel")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """constraints.txt: the version of each package."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {plain(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}


def asked() -> list[Requirement]:
    """What pyproject.toml asks for, with every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(one) for one in (*project["dependencies"], *(one for extra in extras for one in extra))]


def test_every_package_that_comes_along_has_the_tested_version() -> None:
    """All that is installed of what the project asks for, and of what that asks for."""
    tested, due, seen = pins(), asked(), set[tuple[str, frozenset[str]]]()
    while due:
        one = due.pop()
        name, extras = plain(one.name), frozenset(one.extras)
        if name in INSTALLERS or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = distribution(one.name)
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        assert tested.get(name) == found.version.partition("+")[0], (
            f"{one.name} {found.version}"
        )  # 2.13.0+cpu is 2.13.0
        asks = [Requirement(text) for text in found.requires or ()]
        due += [
            one
            for one in asks
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        ]
    assert len(seen) > 50


def test_the_lock_has_the_hashes_of_every_tested_version() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    found = re.findall(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert {plain(name): version for name, version, _ in found} == pins(), "make lock"
    # pip wants every line to have hashes: nothing but these and comments may be there
    rest = [line for line in text.splitlines() if not re.match(r"#|    --hash=sha256:[0-9a-f]{64}", line)]
    assert len(rest) == len(found)
