"""Presets: what `operator: metis` means where a recipe says no more. What tells them apart is here, and nowhere else.

`paper` fills in nothing: METIS, `merge` and `local_update` are declared with the paper's settings. `default` fills in
what docs/metis_default.md explains; its table is made from here.

A preset fills in what a recipe leaves open, before it is checked. A resolved recipe leaves nothing open: a run goes on
with what it was begun with, whatever presets are by then, and no name of finished work depends on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from manyshot.task_spec import Section

Settings = dict[str, Any]
PresetName = Literal["default", "paper"]
PRESET_HELP = "default, or paper: with operator: metis, what settings are that are not given (docs/metis_default.md)"
# whose presets they are
OPERATOR = "metis"
UNASKED: PresetName = "default"
# what is filled in beside the operator's own settings, and the sections that say whether that fits
SECTIONS = ("merge", "local_update")
ABOUT = ("protocol", *SECTIONS)


@dataclass(frozen=True)
class Fill:
    """Settings of one section that go together, and why.

    They stay as they are declared where the recipe says one of `unless`, by which it asks for another form, and where
    the section's other settings do not come to `beside`.
    """

    section: Literal["operator", "merge", "local_update"]
    values: Settings
    why: str
    unless: tuple[str, ...] = ()
    beside: Settings = field(default_factory=dict)


PRESETS: dict[str, tuple[Fill, ...]] = {
    "default": (
        Fill(
            "operator",
            {"gap": "relative"},
            "absolute gaps are nats per token, so a task of short answers or of an unusual format takes all weight, "
            "whatever it needs; a share of what the expert gained counts alike in all tasks",
        ),
        Fill(
            "operator",
            {"temperature": 0.5},
            "in the gaps' unit: a task that lacks half of its expert's gain has e times the weight of one that lacks "
            "nothing",
            beside={"gap": "relative"},
        ),
        Fill(
            "operator",
            {"weight_memory": 0.5},
            "a gap that stays counts twice in the end; where tasks contradict each other, weights that follow every "
            "round's gaps swing between them from round to round",
            beside={"gap": "relative"},
        ),
        Fill(
            "operator",
            {"mask": False},
            "what a mask drops is part of the update, in every round; and with δ above 1/(T − 1) it drops what earlier "
            "rounds have merged",
            unless=("mask_threshold", "min_agreement", "vote", "rescale"),
        ),
        Fill(
            "merge",
            {
                **{"reference": "start", "outer_optimizer": "nesterov"},
                **{"outer_momentum": 0.7, "outer_look_ahead": "between_rounds"},
            },
            "the mean of T unlike updates is 1/T of their sum, and short; with momentum a round goes on where those "
            "before it went, as far as they agree; the last round does not look ahead, as none comes after it that "
            "would turn back",
            unless=("reference", "outer_optimizer"),
        ),
    ),
    "paper": (),
}


class WithPreset(Section):
    """A recipe that may have METIS for its operator. Once it is filled in it has no preset any more."""

    preset: PresetName | None = Field(None, exclude=True, description=PRESET_HELP)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        unasked = cls.model_fields["operator"].default.name
        return _without_preset(filled({"operator": unasked} | raw, sections=cls.model_fields))


def filled_methods(raw: Settings) -> Settings:
    """The recipe of a comparison: its methods, each as its own preset, or else the comparison's, fills it in."""
    methods = {name: one for name, one in raw["methods"].items() if isinstance(one, dict)}
    whole = {name: _without_preset(filled(one, raw)) for name, one in methods.items()}
    return _without_preset(raw | {"methods": raw["methods"] | whole})


def _without_preset(raw: Settings) -> Settings:
    """What is filled in; a preset that there is not stays, to be refused."""
    named = raw.get("preset")
    done = named is None or (isinstance(named, str) and named in PRESETS)
    return {key: value for key, value in raw.items() if key != "preset" or not done}


def filled(raw: Settings, around: Settings | None = None, sections: Collection[str] = SECTIONS) -> Settings:
    """A recipe, or a method of the comparison `around`, with what its preset fills in: of the operator, and `sections`.

    What is no mapping is left alone: it is wrong, as the check will say, or, in Python, it says everything already.
    """
    around = around or {}
    operator = {"name": raw.get("operator")} if isinstance(raw.get("operator"), str) else raw.get("operator")
    if not isinstance(operator, Mapping) or operator.get("name") != OPERATOR:
        return raw
    found, named = raw | {"operator": operator}, _named(raw)
    preset = raw.get("preset") or around.get("preset") or UNASKED
    for fill in PRESETS.get(preset, ()) if isinstance(preset, str) else ():
        own, inherited = found.get(fill.section, {}), around.get(fill.section, {})
        own = {} if own is None and around else own  # a resolved comparison says null for what a method does not have
        if not (isinstance(own, Mapping) and isinstance(inherited, Mapping)):
            continue
        if fill.section != "operator" and not (fill.section in sections and _takes(fill.section, raw, around)):
            continue
        said = {**inherited, **own}
        asks_otherwise = any(key in said or f"{fill.section}.{key}" in named for key in fill.unless)
        left_open = {key: value for key, value in fill.values.items() if key not in said}
        if left_open and not asks_otherwise and fill.beside.items() <= said.items():
            found[fill.section] = {**own, **left_open}
    return found


def _named(raw: Settings) -> set[str]:
    """section.key of what a grid, a search or an override sets."""
    found = {name if "." in name else f"operator.{name}" for name in map(str, _mapping(raw, "grid"))}
    found |= set(map(str, _mapping(_mapping(raw, "search"), "parameters")))
    own = [one for one in _mapping(raw, "overrides").values() if isinstance(one, Mapping)]
    return found | {f"operator.{key}" for one in own if one.get("name", OPERATOR) == OPERATOR for key in one}


def _takes(section: str, raw: Settings, around: Settings) -> bool:
    """Whether there is what a section's settings are about: rounds that merge weights; adapters that are all alike."""
    protocol, merge, update = ({**_mapping(around, name), **_mapping(raw, name)} for name in ABOUT)
    shots = raw.get("protocols")
    once = protocol.get("rounds") == 1 or (isinstance(shots, list | tuple) and "many_shot" not in shots)
    once = once or ("search" in raw and _mapping(raw, "search").get("rounds", "post_hoc") == "post_hoc")
    if once or merge.get("space") == "factors":
        return False
    tasks = [one for one in _mapping(around or raw, "tasks").values() if isinstance(one, Mapping)]
    own = any(one.get(key) for one in tasks for key in ("rank", "alpha", "expert"))
    return section == "merge" or (update.get("method", "lora") == "lora" and not own)


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section as it stands there; an empty one where it is missing or wrong."""
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}
