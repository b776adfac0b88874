"""What the model cards of runs and of merges share: Hub metadata, text that stays text, recipes without paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from manyshot.base_model import DEMO_MODEL, BaseModel
from manyshot.compare_render import escape_markdown, one_line
from manyshot.yaml_text import read_yaml

PAPER = "https://arxiv.org/abs/2606.16501"
PROJECT = "https://pypi.org/project/manyshot/"
# an id of the Hub: name, or owner/name
HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.S)
PATH_KEYS = ("model", "base", "data", "train", "validation", "test", "expert", "path")
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """The base model, as a card speaks of it: its Hub id where it has one, and what its own card says."""

    name: str
    hub_id: str | None
    license: Mapping[str, str] = field(default_factory=dict)
    languages: Sequence[str] = ()

    @property
    def link(self) -> str:
        name = escape_markdown(self.name)
        return f"[{name}](https://huggingface.co/{self.hub_id})" if self.hub_id else name


def origin_of(spec: str, base: BaseModel) -> Origin:
    """The base model that a recipe names as `spec`. Of a local one only the folder's name is told."""
    if spec == DEMO_MODEL:
        return Origin(base.name, base.name, {"license": "apache-2.0"}, ["en"])
    hub_id = spec if is_hub_id(spec) else None
    said = _front_matter_of(base.path / "README.md")
    license_ = {key: one_line(said[key]) for key in LICENSE_KEYS if isinstance(said.get(key), str)}
    languages = said.get("language", [])
    listed = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    return Origin(
        hub_id or Path(spec).name, hub_id, license_, [one_line(one) for one in listed if isinstance(one, str)]
    )


def is_hub_id(name: str) -> bool:
    """Whether a recipe's resolved `name` is an id of the Hub: what is found on this machine became an absolute path."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith((".gguf", ".git")) and not os.path.exists(name)


def _front_matter_of(path: Path) -> dict[str, Any]:
    """The metadata of a card that came with the base; a damaged one says nothing."""
    if not path.is_file():
        return {}
    found = FRONT_MATTER.search(path.read_text("utf-8", errors="replace"))
    try:
        value = read_yaml(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def metadata(origin: Origin, operator: str, *, datasets: Sequence[str] = ()) -> dict[str, Any]:
    """The Hub's keys: what the model was merged from, how it is loaded, under which licence."""
    return {
        **({"base_model": [origin.hub_id]} if origin.hub_id else {}),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **origin.license,
        **({"language": list(origin.languages)} if origin.languages else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "tags": ["merge", "manyshot", f"manyshot-{operator}"],
    }


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML block at the top of a card."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose cells read as they are."""
    lines = [_row(header), _row(["---"] * len(header), escaped=False)]
    return "\n".join([*lines, *(_row(cells) for cells in rows)])


def _row(cells: Sequence[str], *, escaped: bool = True) -> str:
    return f"| {' | '.join(escape_markdown(cell) if escaped else cell for cell in cells)} |"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than every run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML that tells nothing of the machine: of a path the last part, of what decides nothing, nothing."""
    shown = {key: value for key, value in recipe.items() if key not in ("trackers", "keep", "executor")}
    return yaml.safe_dump(
        _without_paths(shown), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if key in PATH_KEYS and isinstance(value, str) and Path(value).is_absolute() else value
