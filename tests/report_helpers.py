"""A run folder written out of nothing but JSON: as many tasks and rounds as wanted, numbers that follow from names."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

NAMES = (
    *("instruction", "math", "multilingual", "safety", "code", "science", "reading", "dialogue", "logic", "history"),
    *("law", "medicine", "poetry", "finance", "chemistry", "geography"),
)
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!-- <script>alert(1)</script> {{ 7 * 7 }}"
RIGHT_TO_LEFT = "ما هي عاصمة فرنسا؟ أجب بكلمة واحدة."
LONG = "an answer that goes on " * 120


def task_names(count: int) -> list[str]:
    return [*NAMES, *(f"task-{i}" for i in range(count))][:count]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


class FakeRun:
    """Writes the records of a run into `folder`, step by step as a run does; `done` rounds of `rounds`."""

    def __init__(
        self,
        folder: Path,
        tasks: list[str] | None = None,
        *,
        rounds: int = 3,
        done: int | None = None,
        layers: int = 4,
        num_test: int = 40,
        experts: bool = True,
        post_hoc: bool = True,
        operator: str = "metis",
        seed: int = 0,
    ) -> None:
        self.folder, self.rounds, self.layers, self.num_test = folder, rounds, layers, num_test
        self.tasks = task_names(4) if tasks is None else tasks
        self.done = rounds if done is None else done
        self.experts, self.post_hoc, self.operator, self.seed = experts, post_hoc, operator, seed

    def write(self) -> Path:
        self.write_heads()
        self.write_model(self.folder / "round_000", 0.0)
        write(self.folder / "round_000" / "examples.json", {task: self.examples(task) for task in self.tasks})
        if self.experts:
            for task in self.tasks:
                self.write_expert(task)
        if self.post_hoc:
            self.write_model(self.folder / "post_hoc", 0.5)
            self.write_merge(self.folder / "post_hoc", 1)
        for r in range(1, self.done + 1):
            self.write_round(r)
        if self.done == self.rounds:
            write(self.folder / "scores.json", {"tasks": self.tasks, "operator": self.operator, "rounds": {}})
        return self.folder

    def write_heads(self) -> None:
        recipe = {
            "model": "demo:smollm2-135m-instruct",
            "tasks": {task: {"data": f"{task}.jsonl", "metric": "exact_match"} for task in self.tasks},
            "protocol": {"rounds": self.rounds, "local_steps": 10 * self.rounds},
            "operator": {"name": self.operator, "temperature": 2.0},
            "evaluation": {"experts": self.experts, "post_hoc": self.post_hoc},
            "seed": self.seed,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
        write(
            self.folder / "environment.json",
            {
                "command": "manyshot run recipe.yaml --output runs/first",
                "base_model": {"name": "SmolLM2-135M-Instruct", "path": "base"},
                "placement": "float32 on cpu",
                "python": "3.11.7",
                "platform": "Linux",
                "threads": 2,
                "packages": {"manyshot": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
            },
        )
        write(self.folder / "splits.json", {})
        lines: list[dict[str, Any]] = [{"kind": "begin", "began": 1000.0, "time": 1000.5, "resumed": False}]
        for r in range(self.done + 1):
            for task in self.tasks:
                if r:
                    lines.append(self.phase("local_update", r, task, 12.5, tokens=4000, steps=10))
                lines += [self.phase("validation", r, task, 2.0), self.phase("score", r, task, 4.5)]
            if r:
                lines += [self.phase("merge", r, "", 1.5), self.phase("save", r, "", 0.5)]
        if self.done == self.rounds:
            lines.append({"kind": "end", "time": 1900.0})
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    def phase(self, phase: str, r: int, task: str, seconds: float, **more: int) -> dict[str, Any]:
        return {
            **{"kind": "phase", "phase": phase, "round": r, "task": task, "seconds": seconds, "time": 1500.0},
            **{"memory": 2 * 2**30},
            **more,
        }

    # ---- models ------------------------------------------------------------------------------------------------------

    def level(self, task: str) -> float:
        """How much an expert gains on a task, 0.4 … 0.9 of its loss."""
        return 0.4 + 0.5 * random.Random(f"{task}/{self.seed}").random()

    def loss(self, task: str, skill: float) -> float:
        start = 2.0 + 4.0 * random.Random(task).random()
        return start * (1 - self.level(task) * skill)

    def values(self, task: str, skill: float, what: str) -> list[float]:
        chance = 0.05 + 0.8 * self.level(task) * skill
        rng = random.Random(f"{task}/{what}/{self.seed}")
        return [float(rng.random() < chance) for _ in range(self.num_test)]

    def score(self, values: list[float]) -> dict[str, Any]:
        stderr = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return {"metric": "exact_match", "score": fmean(values), "stderr": stderr, "num_examples": len(values)}

    def write_model(self, place: Path, skill: float) -> None:
        """losses.json, outputs.json, scores.json of a model with this share of the experts' skill."""
        own = {task: min(1.0, skill * (0.6 + 0.8 * random.Random(f"{task}!").random())) for task in self.tasks}
        values = {task: self.values(task, own[task], place.name) for task in self.tasks}
        write(place / "losses.json", {task: {"loss": self.loss(task, own[task])} for task in self.tasks})
        write(place / "outputs.json", {task: self.outputs(task, found, place.name) for task, found in values.items()})
        write(place / "scores.json", {task: self.score(found) for task, found in values.items()})

    def write_expert(self, task: str) -> None:
        place = self.folder / "experts" / task
        values = self.values(task, 1.0, "expert")
        write(place / "local_update.json", {"task": task, "validation": {"loss": self.loss(task, 1.0)}})
        write(place / "outputs.json", {task: self.outputs(task, values, "expert")})
        write(place / "scores.json", {task: self.score(values)})
        (place / "adapter").mkdir(exist_ok=True)
        (place / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 1000)

    def outputs(self, task: str, values: list[float], who: str) -> list[dict[str, Any]]:
        said = [f"{who} says {task}", HOSTILE, RIGHT_TO_LEFT, LONG]
        return [{"row": i + 10, "output": said[i % 4], "score": value} for i, value in enumerate(values)]

    def examples(self, task: str) -> dict[str, Any]:
        asked = [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {task}."}],
            HOSTILE,
            RIGHT_TO_LEFT,
            "What is long?\n\n" + LONG,
        ]
        rows = [
            {"row": i + 10, "prompt": prompt, "reference": f"{task}", "choices": []} for i, prompt in enumerate(asked)
        ]
        return {"kind": "generate", "examples": rows[: self.num_test]}

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def write_round(self, r: int) -> None:
        place = self.folder / f"round_{r:03d}"
        for task in self.tasks:
            update = {"task": task, "steps": 10, "validation": {"loss": self.loss(task, 0.9)}}
            write(place / task / "local_update.json", update)
        self.write_merge(place, r)
        self.write_model(place, 0.35 + 0.6 * r / self.rounds)
        write(place / "DONE.json", {"round": r, "files": {}})
        (place / "merged").mkdir(exist_ok=True)
        (place / "merged" / "model.safetensors").write_bytes(b"\0" * 4000)

    def write_merge(self, place: Path, r: int) -> None:
        """loss_gap.json and merge.json."""
        gaps = {task: 2.0 * self.level(task) / r for task in self.tasks}
        total = sum(gaps.values())
        weights = {task: gap / total for task, gap in gaps.items()}
        rng = random.Random(f"{place.name}/{self.seed}")
        tensors = [
            f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(self.layers) for kind in "qkvo"
        ]
        cosines = [
            [1.0 if a == b else 0.1 * r + 0.05 * random.Random("/".join(sorted((a, b)))).random() for b in self.tasks]
            for a in self.tasks
        ]
        write(
            place / "loss_gap.json",
            {
                "loss_gaps": gaps,
                "weights": weights,
                "expert_losses": {task: {"loss": self.loss(task, 0.95)} for task in self.tasks},
            },
        )
        write(
            place / "merge.json",
            {
                "tasks": self.tasks,
                "kept_share": 0.7,
                "kept_by_tensor": {name: 0.6 + 0.05 * r + 0.1 * rng.random() for name in tensors},
                "merged_norm": 0.3 * r,
                "task_vector_cosines": cosines,
                "drift": {task: 0.5 * self.level(task) for task in self.tasks},
                "weights": weights,
            },
        )
