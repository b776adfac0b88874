"""A run folder as a report's data: finished, failed half-way or damaged, whatever is there. Imports no torch.

A record that is missing though later ones are there, or that cannot be read, becomes a Problem that names it; the rest
is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from manyshot.errors import RunFolderError
from manyshot.report_data import (
    Block,
    Details,
    Finding,
    Model,
    Numbers,
    Problem,
    Role,
    Round,
    Score,
    Subject,
    beside_experts,
    example_score,
    mapping,
    number,
    numbers,
)
from manyshot.report_examples import Answering, read_examples
from manyshot.report_resources import disk_use, read_failure, read_phases, seconds_in_all
from manyshot.rundir import RunFolder, read_json
from manyshot.status import planned_steps, read_outline
from manyshot.yaml_text import read_yaml

SPREAD = "95 % intervals over test examples"
ONCE = "merged once (post-hoc)"
_LAYER = re.compile(r"^(.*?)\.?\b(\d+)\.")


class Records:
    """Reads the JSON files of a folder, and notes which of those that should be there cannot be used."""

    def __init__(self, folder: Path, *, scored: bool = True) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self.scored = scored  # whether there are test scores, and answers, to be found
        self._read: dict[Path, dict[str, Any]] = {}

    def note(self, path: Path, message: str) -> None:
        problem = Problem(str(path.relative_to(self.folder)), message)
        if problem not in self.problems:
            self.problems.append(problem)

    def read(self, path: Path, *, expected: bool) -> dict[str, Any]:
        """What the file holds; an empty mapping where it is missing or damaged, which is noted."""
        if not path.exists():
            if expected:
                self.note(path, "is missing")
            return {}
        if path not in self._read:
            try:
                self._read[path] = read_json(path)
            except (RunFolderError, OSError) as error:
                self.note(path, str(error).removeprefix(f"{path}: "))
                self._read[path] = {}
        return self._read[path]

    def losses(self, path: Path, tasks: Sequence[str], *, expected: bool) -> Numbers:
        """Loss by task of losses.json."""
        found = self.read(path, expected=expected)
        losses = {task: number(mapping(found.get(task)).get("loss")) for task in tasks}
        self._note_undefined(path, "loss", losses, found)
        return losses

    def scores(self, path: Path, tasks: Sequence[str], *, expected: bool) -> dict[str, Score]:
        """Score by task of scores.json."""
        found = self.read(path, expected=expected and self.scored)
        scores = {task: score for task in tasks if (score := example_score(found.get(task))) is not None}
        values = {task: scores[task].score if task in scores else None for task in tasks}
        self._note_undefined(path, "score", values, found)
        return scores

    def _note_undefined(self, path: Path, what: str, values: Numbers, found: Mapping[str, Any]) -> None:
        undefined = [task for task, value in values.items() if value is None]
        if found and undefined:
            self.note(path, f"holds no finite {what} of {', '.join(undefined)}")


def read_run(path: Path, name: str | None = None) -> tuple[Block, Details]:
    """Everything that a report says of one run; beside others it goes by its `name`.

    Raises RunFolderError where the folder holds no run.
    """
    outline = read_outline(RunFolder(path))
    folder, records = RunFolder(path), Records(path, scored=not outline.by_hand)
    tasks, rounds, evaluation = outline.tasks, outline.rounds, outline.evaluation
    text = folder.recipe.read_text("utf-8")
    recipe = mapping(read_yaml(text))
    done = [r for r in range(1, rounds + 1) if (folder.round(r) / "DONE.json").exists()]
    finished = folder.scores.exists()
    records.read(folder.scores, expected=len(done) == rounds)
    pending = [step.name for step in planned_steps(folder, outline) if not step.record.exists()]

    started = folder.round(1).exists() or finished
    pretrained = _model(records, folder.round(0), "pretrained", "pretrained", tasks, expected=started)
    experts = _experts(records, folder, tasks, expected=started) if evaluation["experts"] else None
    steps = outer_steps(recipe, rounds)
    found = [
        _read_round(records, folder, r, tasks, steps.get(r), later=r in done or finished) for r in _seen(folder, rounds)
    ]
    merged = [
        (r.index, beside_experts(model, pretrained, experts))
        for r, model in found
        if any(loss is not None for loss in model.losses.values())
    ]
    subjects = []
    if merged:
        last, model = merged[-1]
        model = replace(model, label=name or ("merged in one round" if last == 1 else f"merged in {last} rounds"))
        once = ONCE if folder.post_hoc.exists() else None
        subjects.append(Subject(model, [(0, pretrained), *merged], [r for r, _ in found], once=once))
    if evaluation["post_hoc"] and folder.post_hoc.exists():
        alone = _model(records, folder.post_hoc, ONCE, "post_hoc", tasks, expected=started)
        subjects.append(Subject(beside_experts(alone, pretrained, experts), [], [], detailed=False))
    references = [beside_experts(pretrained, pretrained, experts), *([experts] if experts else [])]
    title = name or path.resolve().name
    asked = records.read(folder.round(0) / "examples.json", expected=False)
    models = [*references, *(subject.model for subject in reversed(subjects))]
    answering = _answering(folder, models, tasks, merged[-1][0] if merged else 0)
    details = Details(
        name=title,
        stopped=None if finished else _standing(len(done), rounds, pending, read_failure(folder.metrics)),
        rounds=rounds,
        operator=str(outline.operator),
        seeds=[int(recipe.get("seed") or 0)],
        recipe=text,
        findings=_findings(records, folder, rounds),
        guarded=any(path.glob("round_*/guards.json")),
        wall=seconds_in_all(folder.metrics),
        phases=read_phases([folder.metrics]),
        disk=disk_use(path),
        examples=read_examples(asked, records.read, tasks, answering),
        **_environment(records, folder, recipe),
        problems=records.problems,
    )
    expert_losses = experts.losses if experts else {}
    main = subjects[0].name if subjects else None
    return Block(title, tasks, tasks, references, subjects, expert_losses, SPREAD, main), details


def _standing(done: int, rounds: int, pending: Sequence[str], failure: str | None) -> str:
    """Where an unfinished run stands, and what it failed with."""
    which = f"the next step is “{pending[0]}”" if pending else "only the final records are not written"
    why = f"; it ended with: {failure}" if failure else ""
    return f"{done} of {rounds} rounds {'is' if done == 1 else 'are'} done; {which}{why}"


def _seen(folder: RunFolder, rounds: int) -> list[int]:
    """The rounds that have merged, so that there is something to tell of them."""
    return [r for r in range(1, rounds + 1) if any(folder.round(r).glob("*.json"))]


def _model(records: Records, place: Path, label: str, role: Role, tasks: list[str], *, expected: bool) -> Model:
    losses = records.losses(place / "losses.json", tasks, expected=expected)
    scores = records.scores(place / "scores.json", tasks, expected=expected)
    outputs = records.read(place / "outputs.json", expected=expected and records.scored)
    return Model(label, role, losses, scores, example_scores=_example_scores(outputs, tasks))


def _example_scores(outputs: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, list[float]]:
    """Scores of all test examples by task; a task where one is not a number is left out."""
    found = {}
    for task in tasks:
        said = outputs.get(task) if isinstance(outputs.get(task), list) else []
        values = [number(mapping(entry).get("score")) for entry in said or []]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            found[task] = known
    return found


def _experts(records: Records, folder: RunFolder, tasks: list[str], *, expected: bool) -> Model | None:
    """Every task's own expert on its own task, as one model of as many parts; None where none is trained yet."""
    losses: Numbers = {}
    scores: dict[str, Score] = {}
    examples: dict[str, list[float]] = {}
    for task in tasks:
        place = folder.expert(task)
        update = records.read(place / "local_update.json", expected=expected)
        losses[task] = number(mapping(update.get("validation")).get("loss"))
        scores |= records.scores(place / "scores.json", [task], expected=expected)
        examples |= _example_scores(records.read(place / "outputs.json", expected=expected), [task])
    if not scores and all(loss is None for loss in losses.values()):
        return None
    return Model("experts (one per task)", "experts", losses, scores, example_scores=examples)


def _read_round(
    records: Records, folder: RunFolder, index: int, tasks: list[str], outer_step: float | None, *, later: bool
) -> tuple[Round, Model]:
    """What a round recorded, and the model it ended with."""
    place = folder.round(index)
    gaps = records.read(place / "loss_gap.json", expected=later)
    merge = records.read(place / "merge.json", expected=later)
    experts, searched = mapping(gaps.get("expert_losses")), mapping(merge.get("line_search"))
    steps, notes = _read_updates(records, place, tasks, later=later)
    found = Round(
        index=index,
        weights=numbers(gaps.get("weights"), tasks),
        loss_gaps=numbers(gaps.get("loss_gaps"), tasks),
        expert_losses={task: number(mapping(experts.get(task)).get("loss")) for task in tasks},
        drift=numbers(merge.get("drift"), tasks),
        cosines=read_cosines(merge),
        kept_share=number(merge.get("kept_share")),
        kept_by_layer=kept_by_layer(mapping(merge.get("kept_by_tensor"))),
        distance=number(merge.get("merged_norm")),
        steps=steps,
        effective_tasks=number(gaps.get("effective_tasks")),
        update_norm=number(merge.get("update_norm")),
        scaling=number(searched.get("scaling")),
        search=_search_points(searched),
        outer_step=outer_step,
        notes=notes + _taken_back(records, place) + _removed(records, place),
    )
    return found, _model(records, place, f"after round {index}", "merged", tasks, expected=later)


def _read_updates(records: Records, place: Path, tasks: Sequence[str], *, later: bool) -> tuple[Numbers, list[str]]:
    """The steps of every task in a round, and which tasks it went on without."""
    steps: Numbers = {}
    notes = []
    for task in tasks:
        failed = records.read(place / task / "failure.json", expected=False)
        if failed and not (place / task / "local_update.json").exists():
            notes.append(f"went on without {task}: {failed.get('message')}".rstrip("."))
            steps[task] = None
        else:
            update = records.read(place / task / "local_update.json", expected=later)
            steps[task] = number(update.get("steps"))
    return steps, notes


def _search_points(searched: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(scaling, what was minimised) of every model that a line search measured."""
    points = searched.get("points")
    pairs = [
        (number(mapping(one).get("scaling")), number(mapping(one).get("objective")))
        for one in (points if isinstance(points, list) else [])
    ]
    return [(scaling, value) for scaling, value in pairs if scaling is not None and value is not None]


def _removed(records: Records, place: Path) -> list[str]:
    """What `keep` had removed of a round, and which key said so."""
    found: dict[str, list[str]] = {}
    for name, why in mapping(records.read(records.folder / "removed.json", expected=False).get("removed")).items():
        if name.startswith(f"{place.name}/"):
            found.setdefault(str(why), []).append(name.removeprefix(f"{place.name}/"))
    return [f"removed, as {why}: {', '.join(names)}" for why, names in found.items()]


def _taken_back(records: Records, place: Path) -> list[str]:
    """What is to be said of a round whose merge was taken back."""
    losses = mapping(records.read(place / "rollback.json", expected=False).get("multi_task_loss"))
    start, merged = number(losses.get("start")), number(losses.get("merged"))
    if start is None or merged is None:
        return []
    return [f"the merge was taken back, since the multi-task loss would have gone from {start:.3f} to {merged:.3f}"]


def outer_steps(recipe: Mapping[str, Any], rounds: int) -> dict[int, float]:
    """The outer step size of every round, where merges are relative to what a round started from."""
    merge = mapping(recipe.get("merge"))
    given = merge.get("outer_step_size")
    if merge.get("reference") != "start" or given is None:
        return {}
    sizes = given if isinstance(given, list) else [given] * rounds
    return {r: size for r, one in enumerate(sizes, start=1) if (size := number(one)) is not None}


def settings_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The settings that decide how a run trains and merges, a line for each section; what is off is left out."""
    found = {}
    for section in ("protocol", "operator", "merge", "local_update"):
        value = recipe.get(section)
        pairs = [
            f"{key} {_setting(one)}"
            for key, one in mapping(value).items()
            if one not in (None, "", [], {}) and key != "name" and not isinstance(one, dict)
        ]
        name = value if isinstance(value, str) else mapping(value).get("name")
        if text := ", ".join([*([str(name)] if name else []), *pairs]):
            found[section.replace("_", " ")] = text
    return found


def _setting(value: object) -> str:
    """A setting as it stands in a recipe; of several values, one after the other."""
    if isinstance(value, list):
        return " ".join(map(_setting, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_cosines(merge: Mapping[str, Any]) -> dict[str, Numbers]:
    """Cosines of the tasks' vectors out of merge.json, by name; nothing where none were computed."""
    names, rows = merge.get("tasks"), merge.get("task_vector_cosines")
    if not isinstance(names, list) or not isinstance(rows, list) or len(rows) != len(names):
        return {}
    return {
        str(task): {str(other): number(value) for other, value in zip(names, row, strict=False)}
        for task, row in zip(names, rows, strict=True)
        if isinstance(row, list)
    }


def kept_by_layer(kept_by_tensor: Mapping[str, Any]) -> Numbers:
    """Mean share over the tensors of every layer, in the order of layers; tensors outside of layers by module name.

    The layer of a tensor is the first number in its name: `model.layers.3.mlp.experts.0.up_proj.weight` is of layer 3.
    """
    layers: dict[tuple[str, int], list[float]] = {}
    for tensor, share in kept_by_tensor.items():
        value, match = number(share), _LAYER.match(tensor)
        module = tensor.removesuffix(".weight").rpartition(".")[2]
        key = (match[1], int(match[2])) if match else (module, -1)
        if value is not None:
            layers.setdefault(key, []).append(value)
    stacks = {prefix for prefix, layer in layers if layer >= 0}
    found: Numbers = {}
    for (prefix, layer), values in sorted(layers.items()):
        named = f"{prefix}.{layer}" if len(stacks) > 1 else str(layer)
        found[named if layer >= 0 else prefix] = fmean(values)
    return found


def _findings(records: Records, folder: RunFolder, rounds: int) -> list[Finding]:
    """What the guards of every round found, as guards.json holds it."""
    found = []
    for r in range(rounds + 1):
        place = folder.round(r) if r else folder.post_hoc
        written = records.read(place / "guards.json", expected=False).get("findings")
        for entry in written if isinstance(written, list) else []:
            one = mapping(entry)
            told = [one.get("message"), one.get("found"), one.get("means")]
            found.append(
                Finding(
                    round=r,
                    tasks=[str(task) for task in one.get("tasks") or []],
                    message="; ".join(str(part) for part in told if part),
                    suggestions=[str(text) for text in one.get("suggestions") or []],
                )
            )
    return found


def _answering(folder: RunFolder, models: Sequence[Model], tasks: Sequence[str], last: int) -> Answering:
    """Where the answers of these models lie, task by task; a merged model is that of the last round."""
    places = {"pretrained": folder.round(0), "post_hoc": folder.post_hoc, "merged": folder.round(last)}
    return {
        model.label: (
            model.role,
            {task: folder.expert(task) if model.role == "experts" else places[model.role] for task in tasks},
        )
        for model in models
    }


def _environment(records: Records, folder: RunFolder, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Command, settings, versions and machine, for Details."""
    found = records.read(folder.environment, expected=True)
    machine = {key: str(found[key]) for key in ("placement", "threads", "python", "platform") if found.get(key)}
    return {
        "command": str(found.get("command") or "not recorded"),
        "settings": settings_of(recipe),
        "base_model": str(mapping(found.get("base_model")).get("name") or recipe.get("model")),
        "versions": {str(name): str(version) for name, version in mapping(found.get("packages")).items() if version},
        "machine": machine,
    }
