"""What a comparison's recipe may not say: names that nothing has, settings that no run of a cell could use."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from manyshot.benchmark_spec import benchmark_problems
from manyshot.compare_methods import SECTIONS, Candidate, Method, Settings, choose, combinations
from manyshot.compare_spec import CompareSpec
from manyshot.recipe import Problems

# what decides how models are measured, or what a fair comparison gives all methods alike
FOR_ALL = {
    **dict.fromkeys(
        ("local_update.max_length", "local_update.dtype", "local_update.device", "local_update.attn_implementation"),
        "decides how models are measured too, so it is the same for all methods",
    ),
    "protocol.local_steps": "is the same for all methods: as many steps each is a fair comparison",
}


def names_problems(recipe: CompareSpec) -> Problems:
    """Names of tasks, task sets and methods that nothing else has."""
    found: Problems = []
    for name, one in recipe.task_sets.items():
        found += [
            (f"task_sets.{name}.tasks", _unknown(task, recipe.tasks)) for task in one.tasks if task not in recipe.tasks
        ]
        if len(set(one.tasks)) < len(one.tasks):
            found.append((f"task_sets.{name}.tasks", "names a task twice"))
        if one.seeds is not None and (not one.seeds or len(set(one.seeds)) < len(one.seeds)):
            found.append((f"task_sets.{name}.seeds", "needs at least one seed, each once"))
        if one.against is not None:
            found += [(f"task_sets.{name}.against", text) for text in _against_problems(recipe, name, one.against)]
    for name, tasks in recipe.categories.items():
        found += [(f"categories.{name}", _unknown(task, recipe.tasks)) for task in tasks if task not in recipe.tasks]
        if len(set(tasks)) < len(tasks):
            found.append((f"categories.{name}", "names a task twice"))
    both = [name for name in recipe.retention if name in recipe.tasks]
    found += [(f"retention.{name}", "is trained too; retention is measured on tasks outside the mix") for name in both]
    found += benchmark_problems(recipe.benchmarks, recipe.tasks, recipe.retention)
    if len(set(recipe.seeds)) < len(recipe.seeds):
        found.append(("seeds", "names a seed twice"))
    tuning = recipe.tuning
    if tuning.task_set is not None and tuning.task_set not in recipe.sets:
        found.append(("tuning.task_set", _unknown(tuning.task_set, recipe.sets)))
    elif strange := sorted(set(tuning.seeds or ()) - set(recipe.seeds_of(recipe.tuning_set))):
        found.append(("tuning.seeds", f"{strange[0]} is no seed of task set '{recipe.tuning_set}'"))
    if len(set(tuning.seeds or ())) < len(tuning.seeds or ()):
        found.append(("tuning.seeds", "names a seed twice"))
    rounds = {name: one for name, one in recipe.methods.items() if not one.joint and "many_shot" in one.protocols}
    if recipe.baseline is not None and recipe.baseline not in rounds:
        found.append(("baseline", f"must name a method with many_shot: {', '.join(rounds) or 'none here'}"))
    return found


def _against_problems(recipe: CompareSpec, name: str, against: str) -> list[str]:
    """A task set is held against another one that has tasks, and a seed, in common with it."""
    others = [other for other in recipe.task_sets if other != name]
    if against not in others:
        return [_unknown(against, dict.fromkeys(others))]
    both = set(recipe.task_sets[name].tasks) & set(recipe.task_sets[against].tasks)
    if not both:
        return [f"'{against}' has no task in common with it"]
    if not set(recipe.seeds_of(name)) & set(recipe.seeds_of(against)):
        return [f"'{against}' has no seed in common with it"]
    return []


def _unknown(name: str, known: Mapping[str, object]) -> str:
    return f"there is no '{name}'; there are: {', '.join(known)}"


def method_problems(recipe: CompareSpec) -> Problems:
    """Methods that say too much, too little, or nothing that can be run."""
    found: Problems = []
    for name, method in recipe.methods.items():
        key = f"methods.{name}"
        kinds = [method.operator is not None, method.joint, method.ablation_of is not None]
        if sum(kinds) != 1:
            found.append((key, "give one of 'operator', 'joint: true' and 'ablation_of'"))
        found += [
            (f"{key}.task_sets", _unknown(one, recipe.sets)) for one in method.task_sets or () if one not in recipe.sets
        ]
        full = recipe.methods.get(method.ablation_of or "")
        if method.ablation_of is not None and (full is None or full.operator is None):
            others = [other for other, spec in recipe.methods.items() if spec.operator is not None]
            found.append(
                (f"{key}.ablation_of", f"must name a method with an operator: {', '.join(others) or 'none here'}")
            )
        if bool(method.set) != (method.ablation_of is not None):
            found.append((f"{key}.set", "is what an ablation changes: give it with ablation_of, and only there"))
        if not method.protocols:
            found.append((f"{key}.protocols", "names none; there are: post_hoc, many_shot"))
        if len(set(method.protocols)) < len(method.protocols):
            found.append((f"{key}.protocols", "names one twice"))
        lacking = [one for one in method.protocols if full is not None and full.grid and one not in full.protocols]
        if lacking:
            where = f"'{method.ablation_of}' has a grid, and is not searched with {lacking[0]}"
            found.append((f"{key}.protocols", f"{where}, so that there is nothing to take the setting from"))
        if method.grid and method.operator is None:
            found.append((f"{key}.grid", "needs an operator whose settings it holds"))
        found += [(f"{key}.grid.{setting}", "has no value") for setting, values in method.grid.items() if not values]
        found += [(f"{key}.{section}", text) for section, text in _section_problems(method, full).items()]
    if not found and not any(recipe.seeds_of(name) for name in recipe.sets):
        found.append(("seeds", "the grid has no cell"))
    return found or [*_settings_problems(recipe), *_grid_problems(recipe)]


def _section_problems(method: Method, full: Method | None) -> dict[str, str]:
    """Sections of a method that have no effect, or take back what a grid chose."""
    given = [section for section in SECTIONS if getattr(method, section) is not None]
    found = {}
    for section in given:
        chosen = [key for key in (full.grid if full else ()) if key.startswith(f"{section}.")]
        if method.joint and section != "local_update":
            found[section] = "has no effect on joint fine-tuning, which merges nothing"
        elif section == "protocol" and "many_shot" not in method.protocols:
            found[section] = "has no effect on post_hoc, which has one round"
        elif chosen:
            found[section] = f"'{method.ablation_of}' chooses {chosen[0]} by its grid; change it by 'set'"
    return found


def _settings_problems(recipe: CompareSpec) -> Problems:
    """Settings that the operator or a section does not have, or not with this value."""
    found: Problems = []
    for name, method in recipe.methods.items():
        tries: list[tuple[str, Settings]] = [("grid", chosen) for chosen in combinations(method.grid) if method.grid]
        tries += [("set", method.set)] if method.set else []
        for section, settings in tries:
            try:
                choose(recipe.own(name), settings)
            except PydanticCustomError as error:
                setting = (error.context or {})["setting"]
                found.append((f"methods.{name}.{section}.{setting}".rstrip("."), error.message()))
    return list(dict.fromkeys(found))


def _grid_problems(recipe: CompareSpec) -> Problems:
    """A grid with no cell, or with more tries for one method than for another."""
    wanted = [
        (name, task_set)
        for name, method in recipe.methods.items()
        for task_set in recipe.sets
        if method.task_sets is None or task_set in method.task_sets
    ]
    if not any(recipe.seeds_of(task_set) for _, task_set in wanted):
        return [("methods", "the grid has no cell: no method is wanted in any task set with a seed")]
    sizes = {name: len(list(combinations(method.grid))) for name, method in recipe.methods.items() if method.grid}
    if recipe.tuning.equal_budgets and len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return [
            ("methods", f"grids of unlike sizes ({shown}) are no fair comparison; or set tuning.equal_budgets: false")
        ]
    for name, method in recipe.methods.items():
        if method.grid and method.task_sets is not None and recipe.tuning_set not in method.task_sets:
            return [(f"methods.{name}.grid", f"is searched in task set '{recipe.tuning_set}', where it is not wanted")]
    return []


def cell_problems(recipe: CompareSpec) -> Problems:
    """What a run of a cell would refuse: operators, how they are merged and trained, with these tasks and rounds."""
    found: dict[tuple[str, str], str] = {}
    for task_set, one in recipe.sets.items():
        # experts are those of a post-hoc run, whatever the methods are
        tries: list[tuple[str, Candidate, str]] = [("", recipe.shared, "post_hoc")]
        for name, method in recipe.methods.items():
            if method.task_sets is None or task_set in method.task_sets:
                tries += [(name, candidate, shot) for candidate in recipe.possible(name) for shot in _shots(method)]
        for name, candidate, shot in tries:
            for key, text in _run_problems(recipe, one.tasks, candidate, shot):
                found.setdefault((_key_of(recipe, name, key), text), task_set)
    problems = [(key, f"{text} (task set {task_set})") for (key, text), task_set in found.items()]
    return [*_for_all_problems(recipe), *problems]


def _shots(method: Method) -> tuple[str, ...]:
    """Joint fine-tuning trains as a run does."""
    return ("post_hoc",) if method.joint else method.protocols


def _run_problems(recipe: CompareSpec, tasks: tuple[str, ...], candidate: Candidate, shot: str) -> Problems:
    try:
        recipe.run_recipe(next(iter(recipe.models)), tasks, 0, candidate, shot)
    except ValidationError as error:
        return [problem for details in error.errors(include_url=False) for problem in details["ctx"]["problems"]]
    return []


def _for_all_problems(recipe: CompareSpec) -> Problems:
    """What a method may not have of its own."""
    found: dict[str, str] = {}
    for name in recipe.methods:
        for candidate in recipe.possible(name):
            changed = candidate.differences(recipe.shared)
            found |= {_key_of(recipe, name, key): text for key, text in FOR_ALL.items() if key in changed}
    return list(found.items())


def _key_of(recipe: CompareSpec, method: str, key: str) -> str:
    """Where a key of a run's recipe stands in the comparison's: in a grid, a section of the method, or for all."""
    section, _, setting = key.partition(".")
    if not method or section not in (*SECTIONS, "operator"):
        return key
    spec = recipe.methods[method]
    named = setting if section == "operator" else key
    for name, one in ((method, spec), (spec.ablation_of, recipe.methods.get(spec.ablation_of or ""))):
        if one is None:
            continue
        if own := next((part for part in ("set", "grid") if named in getattr(one, part)), None):
            return f"methods.{name}.{own}.{named}"
        if section == "operator" and one.operator is not None:
            return f"methods.{name}.{key}"
        if section != "operator" and getattr(one, section) is not None:
            return f"methods.{name}.{key}"
    return key
