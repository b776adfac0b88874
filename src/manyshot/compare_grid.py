"""The cells of a comparison's results.json by (model, task set, method, protocol), and what is missing among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from manyshot.compare_statistics import Estimate, Paired, SeedPair, estimate, paired_estimate, paired_normalized
from manyshot.errors import RunFolderError

FORMAT = 1
KEYS = (
    *("format", "name", "models", "task_sets", "categories", "retention", "rounds", "local_steps"),
    *("methods", "references", "cells", "tuning", "steps"),
)
PROTOCOLS = {"post_hoc": "post-hoc", "many_shot": "many-shot", "joint": "joint"}
LONGEST_ERROR = 120

Pick = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True, order=True)
class Group:
    """The cells of all seeds of one row."""

    model: str
    task_set: str
    method: str
    protocol: str


class Grid:
    """Look-ups in results.json; its `order`, where given, lists methods, task sets and categories.

    Raises RunFolderError for another format or a missing key.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        if results.get("format") != FORMAT:
            raise RunFolderError(f"results.json: format is {results.get('format')!r}; this version reads {FORMAT}")
        missing = [key for key in KEYS if key not in results]
        if missing or not results["task_sets"]:
            raise RunFolderError(f"results.json: nothing under {', '.join(missing) or 'task_sets'}")
        self.results = results
        self.models: list[str] = list(results["models"])
        self.methods, self.task_sets, self.categories = (
            _ordered(results[key], results.get("order", {}).get(key)) for key in ("methods", "task_sets", "categories")
        )
        self.main = next(iter(self.task_sets))
        self.baseline: str | None = results.get("baseline")
        self.retention: list[str] = list(results["retention"])
        self.benchmarks: dict[str, Mapping[str, Any]] = dict(results.get("benchmarks", {}))
        self._cells: dict[Group, dict[int, Mapping[str, Any]]] = {}
        for cell in results["cells"]:
            group = Group(cell["model"], cell["task_set"], cell["method"], cell["protocol"])
            self._cells.setdefault(group, {})[cell["seed"]] = cell
        self._references = {(ref["model"], ref["task_set"], ref["seed"]): ref for ref in results["references"]}

    # ---- what there is -----------------------------------------------------------------------------------------------

    def tasks(self, task_set: str) -> list[str]:
        return list(self.task_sets[task_set]["tasks"])

    def scored(self, task_set: str) -> list[str]:
        """What scores there are: the benchmarks of the tasks; a task without one is scored on its own test split."""
        spec = self.task_sets[task_set]
        return list(spec.get("scored", spec["tasks"]))

    def task_of(self, name: str) -> str:
        """The task whose expert a score is divided by."""
        return str(self.benchmarks[name]["task"]) if name in self.benchmarks else name

    def groups(
        self, task_set: str, protocols: Iterable[str] = tuple(PROTOCOLS), *, ablations: bool = False
    ) -> list[Group]:
        """Rows that are wanted: models, methods and protocols in their order."""
        wanted = set(protocols)
        found = [
            Group(model, task_set, method, protocol)
            for model in self.models
            for method, spec in self.methods.items()
            for protocol in PROTOCOLS
            if protocol in wanted and (ablations or spec["ablation_of"] is None)
        ]
        return [group for group in found if group in self._cells]

    def fulls(self) -> list[str]:
        """The methods that others are ablations of; without ablations, METIS."""
        named = [spec["ablation_of"] for spec in self.methods.values() if spec["ablation_of"] is not None]
        ours = named or [method for method, spec in self.methods.items() if spec["operator"] == "metis"]
        return [method for method in self.methods if method in ours]

    def has(self, group: Group) -> bool:
        return group in self._cells

    def cells(self, group: Group) -> dict[int, Mapping[str, Any]]:
        """Seed -> cell, whatever its status, in the order of the task set's seeds."""
        cells = self._cells.get(group, {})
        order = list(self.task_sets[group.task_set]["seeds"])
        return dict(sorted(cells.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))

    def done(self, group: Group) -> dict[int, Mapping[str, Any]]:
        return {seed: cell for seed, cell in self.cells(group).items() if cell["status"] == "done"}

    def reference(self, model: str, task_set: str, seed: int) -> Mapping[str, Any] | None:
        return self._references.get((model, task_set, seed))

    def references(self, model: str, task_set: str) -> dict[int, Mapping[str, Any] | None]:
        """Seed -> what the pretrained model and the experts did; None where they are not measured."""
        return {seed: self.reference(model, task_set, seed) for seed in self.task_sets[task_set]["seeds"]}

    # ---- names -------------------------------------------------------------------------------------------------------

    def label(self, method: str) -> str:
        return str(self.methods[method]["label"])

    def name(self, group: Group) -> str:
        """`TIES, many-shot`; `Joint fine-tuning`, which merges nothing, has no protocol to tell."""
        label = self.label(group.method)
        return label if group.protocol == "joint" else f"{label}, {PROTOCOLS[group.protocol]}"

    def columns_by_category(self, task_set: str) -> dict[str, list[str]]:
        """Category -> its tasks of this set, in order; a task in no category is its own."""
        tasks = self.tasks(task_set)
        found = {category: [task for task in members if task in tasks] for category, members in self.categories.items()}
        found = {category: members for category, members in found.items() if members}
        placed = {task for members in found.values() for task in members}
        return found | {task: [task] for task in tasks if task not in placed}

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def by_seed(self, group: Group, pick: Pick) -> dict[int, float | None]:
        """Seed -> value; None where the cell is not done or has none."""
        return {seed: pick(cell) if cell["status"] == "done" else None for seed, cell in self.cells(group).items()}

    def estimate(self, group: Group, pick: Pick) -> Estimate:
        return estimate(self.by_seed(group, pick).values())

    def estimate_references(self, model: str, task_set: str, pick: Pick) -> Estimate:
        """Mean over the seeds of a number of the references; `pick` gets a reference."""
        return estimate(None if ref is None else pick(ref) for ref in self.references(model, task_set).values())

    def compare(self, first: Group, second: Group) -> tuple[Paired, Estimate]:
        """First − second: the normalized averages with an interval, and the multi-task losses over seeds."""
        ours, theirs = self.done(first), self.done(second)
        pairs = []
        for seed in ours:
            reference = self.reference(first.model, first.task_set, seed)
            if seed not in theirs or reference is None:
                continue
            scores = reference["experts"]["scores"]
            names = self.scored(first.task_set)
            experts = {name: float(scores[name]["score"]) for name in names}
            tasks = {name: self.task_of(name) for name in names}
            pairs.append(SeedPair(seed, ours[seed]["example_scores"], theirs[seed]["example_scores"], experts, tasks))
        name = (first.model, first.task_set, first.method, first.protocol, second.method, second.protocol)
        try:
            paired = paired_normalized(pairs, *name)
        except RunFolderError as error:
            where = f"{first.model}, {self.name(first)} and {self.name(second)}"
            raise RunFolderError(f"results.json: {where}: {error}") from None
        return paired, paired_estimate(self.by_seed(first, loss), self.by_seed(second, loss))

    def compare_shares(self, first: Group, second: Group) -> Paired:
        """First − second: the average shares of the gain kept, with an interval where losses of examples are known."""
        ours, theirs = self.done(first), self.done(second)
        pairs = []
        for seed in ours:
            reference = self.reference(first.model, first.task_set, seed)
            if seed in theirs and reference is not None and (pair := _loss_pair(ours[seed], theirs[seed], reference)):
                pairs.append(SeedPair(seed, *pair))
        if len(pairs) == len(ours.keys() & theirs.keys()):
            name = (first.model, first.task_set, first.method, first.protocol, second.method, second.protocol)
            return paired_normalized(pairs, "share", *name)
        found = paired_estimate(self.by_seed(first, kept("average")), self.by_seed(second, kept("average")))
        return Paired(found.mean, None, None, found.count, 0)

    # ---- what is missing ---------------------------------------------------------------------------------------------

    def missing(self, groups: Sequence[Group]) -> list[str]:
        """A line for every cell that failed or whose loss is not a number, and one for all that a seed lacks."""
        lines, lacking = [], dict[str, list[str]]()
        for group in groups:
            for seed, cell in self.cells(group).items():
                where = f"{group.model}, {group.task_set}: {self.name(group)}, seed {seed}"
                if cell["status"] == "failed":
                    lines.append(f"{where} failed ({_short(str(cell.get('error') or 'no reason given'))}).")
                elif cell["status"] != "done":
                    lacking.setdefault(f"{group.model}, {group.task_set}, seed {seed}", []).append(self.name(group))
                elif cell["multi_task_loss"] is None:
                    lines.append(f"{where}: its loss is not a finite number.")
        return lines + [f"{where} is missing for {'; '.join(names)}." for where, names in lacking.items()]

    def undefined(self, models: Iterable[str], task_set: str) -> list[str]:
        """A line for every seed in which normalized performance is not defined for some task, or for all."""
        lines = []
        for model in models:
            for seed, reference in self.references(model, task_set).items():
                where = f"{model}, {task_set}, seed {seed}"
                if reference is None:
                    lines.append(f"{where}: experts are not measured, so nothing is normalized.")
                    continue
                scores = reference["experts"]["scores"]
                zero = [name for name in self.scored(task_set) if scores[name]["score"] <= 0]
                if zero:
                    lines.append(
                        f"{where}: the expert scores 0 on {', '.join(zero)}; normalized performance is not defined "
                        "there, and means leave it out."
                    )
        return lines


def _ordered(values: Mapping[str, Any], order: Sequence[str] | None) -> dict[str, Any]:
    """As in the recipe: a JSON file with sorted keys says their order in a list of its own."""
    return {name: values[name] for name in (values if order is None else order)}


def _short(text: str) -> str:
    """The first words of an error, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ERROR else line[: LONGEST_ERROR - 1] + "…"


# ---- numbers of a cell, for `estimate` and `by_seed` -----------------------------------------------------------------


def loss(cell: Mapping[str, Any]) -> float | None:
    value: float | None = cell["multi_task_loss"]
    return value


def normalized(key: str) -> Pick:
    """`average`, `worst` or `drop`."""
    return lambda cell: cell["normalized"][key] if cell.get("normalized") else None


def task_normalized(tasks: Sequence[str]) -> Pick:
    """Mean of the tasks' normalized performance, those without one left out."""

    def pick(cell: Mapping[str, Any]) -> float | None:
        ratios = cell["normalized"]["tasks"] if cell.get("normalized") else {}
        found = [ratios[task] for task in tasks if ratios.get(task) is not None]
        return fmean(found) if found else None

    return pick


def kept(key: str, of: str = "share") -> Pick:
    """`average` or `worst` of the shares of the experts' gain that are kept, or of joint's (`share_of_joint`)."""
    return lambda cell: cell[of][key] if cell.get(of) else None


def task_kept(task: str) -> Pick:
    return lambda cell: cell["share"]["tasks"].get(task) if cell.get("share") else None


def _loss_pair(
    first: Mapping[str, Any], second: Mapping[str, Any], reference: Mapping[str, Any]
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]] | None:
    """Losses of both models' examples, less being better, and the gains that they are divided by; 0: no share."""
    before, after = (reference[key]["losses"] for key in ("pretrained", "experts"))
    shares = first.get("share", {}).get("tasks", {})
    gains = {task: 0.0 if share is None else before[task] - after[task] for task, share in shares.items()}
    sides = []
    for cell in (first, second):
        losses = cell.get("example_losses") or {}
        if not all(losses.get(task) for task in gains):
            return None
        sides.append({task: [-loss for loss in losses[task]] for task in gains})
    return sides[0], sides[1], gains


def score_normalized(name: str) -> Pick:
    """A benchmark's normalized performance, or that of a task without benchmarks."""

    def pick(cell: Mapping[str, Any]) -> float | None:
        found = cell.get("normalized") or {}
        value: float | None = found.get("scored", found.get("tasks", {})).get(name)
        return value

    return pick


def score(task: str, key: str = "scores") -> Pick:
    """A task's score; key `retention` for a task that is never trained."""
    return lambda cell: cell[key][task]["score"] if task in cell[key] else None


def task_loss(task: str) -> Pick:
    return lambda cell: cell["losses"].get(task)
