"""The model card of a run's merged model, in its folder's README.md: what was merged, how, its scores, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyshot.card_text import (
    PAPER,
    PROJECT,
    Origin,
    fenced,
    front_matter,
    is_hub_id,
    metadata,
    origin_of,
    public_recipe,
    table,
)
from manyshot.compare_render import escape_markdown
from manyshot.normalize import normalized
from manyshot.rundir import write_text
from manyshot.steps import Run
from manyshot.task_spec import TaskSpec

Json = dict[str, Any]
# what the Hub calls our metrics, where it has a name for them
HUB_METRICS = {"choice_accuracy": "accuracy", "token_accuracy": "accuracy"}
# below this share of its expert's score a task is named among the limits
FAR_BELOW = 0.9


def write_card(run: Run, folder: Path, round_index: int, summary: Json) -> None:
    """Write merged/README.md of a round: Hub metadata with results, what was merged and how, scores, limits, recipe.

    One of a round that is done stays as it is, and of an earlier round it may have been removed (`keep`).
    """
    card = folder / "merged" / "README.md"
    if card.parent.is_dir() and not (card.exists() and (folder / "DONE.json").exists()):
        write_text(card, card_text(run, round_index, summary))


def card_text(run: Run, round_index: int, summary: Json) -> str:
    """The card as Markdown with YAML at its top."""
    recipe, merged = run.recipe, summary["rounds"][str(round_index)]
    origin = origin_of(recipe.model, run.base)
    name = f"{origin.name.rsplit('/', 1)[-1]}, merged from {len(run.names)} tasks"
    values = metadata(origin, recipe.method.name, datasets=_hub_data(recipe.tasks))
    values["model-index"] = [{"name": name, "results": [_result(task, merged) for task in run.names]}]
    return f"""{front_matter(values)}
# {escape_markdown(name)}

{_introduction(run, origin, round_index)}

## What was merged

{_task_table(run)}

## Scores on the test splits

{_score_table(run, merged, summary)}

{_verdict(run, merged, summary)}

## Weights of this round

{_weight_table(run, merged)}

Share of the changed coordinates that the merge kept: {merged["kept_share"]:.3f}.

## Limits

{_limits(run, origin, merged, summary)}

## Use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="path/or/name/of/this/model")
print(generate([{{"role": "user", "content": "…"}}], max_new_tokens=64)[0]["generated_text"])
```

## Recipe

{fenced(public_recipe(recipe.model_dump(mode="json")), "yaml")}
"""


# ---- metadata --------------------------------------------------------------------------------------------------------


def _result(task: str, merged: Json) -> Json:
    """One entry of the model index: the test score of one task, and who says so."""
    score = merged["scores"][task]
    arguments = {"num_examples": score["num_examples"]}
    if score["stderr"] is not None:
        arguments["stderr"] = round(score["stderr"], 4)
    metric = HUB_METRICS.get(score["metric"], score["metric"])
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": task, "type": task, "split": "test"},
        "metrics": [{"type": metric, "value": round(score["score"], 4), "name": score["metric"], "args": arguments}],
        "source": {"url": PROJECT, "name": "manyshot run"},
    }


def _hub_data(tasks: Mapping[str, TaskSpec]) -> list[str]:
    """Ids of the data sets of the Hub that tasks are made of."""
    return [name for spec in tasks.values() for name in _data_of(spec) if is_hub_id(name)]


def _data_of(spec: TaskSpec) -> list[str]:
    """Where a task's training examples are."""
    return [spec.data] if spec.data is not None else [source.data for source in spec.sources("train")]


# ---- text ------------------------------------------------------------------------------------------------------------


def _introduction(run: Run, origin: Origin, round_index: int) -> str:
    protocol, update = run.recipe.protocol, run.recipe.local_update
    how = {"full": "all weights", "command": "a trainer of its own"}.get(update.method, f"LoRA of rank {update.rank}")
    steps = f"{protocol.local_steps} local steps per task over all rounds{_peculiarities(run)}"
    return f"""{origin.link}, fine-tuned on {len(run.names)} tasks and merged into one model with
[manyshot]({PROJECT}) by many-shot merging ({PAPER}): in every round each task fine-tunes ({how}) from the last merged
model, and what the tasks learned is merged again, in float32. This is round {round_index} of {protocol.rounds}, with
the operator `{run.recipe.method.name}` and {steps}."""


def _peculiarities(run: Run) -> str:
    """Where tasks did not all train alike, and where their losses are not in nats."""
    found = ["shared out by the weights of the round before"] if run.recipe.protocol.allocation == "gap" else []
    found += [f"{escape_markdown(name)}: {note}" for name, spec in run.recipe.tasks.items() for note in spec.notes]
    return f" ({'; '.join(found)})" if found else ""


def _task_table(run: Run) -> str:
    rows = []
    for task in run.tasks:
        data = ", ".join(dict.fromkeys(_shown_data(one) for one in _data_of(task.spec)))
        examples = "an expert that existed" if task.spec.expert else str(len(task.train))
        rows.append([task.name, data, examples, task.spec.metric])
    return table(["task", "data", "training examples", "metric"], rows)


def _shown_data(name: str) -> str:
    """An id of the Hub or a generated family as it is; of a file its name."""
    return name if is_hub_id(name) or name.startswith("demo:") else Path(name).name


def _models(run: Run, merged: Json, summary: Json) -> list[tuple[str, Json]]:
    """The measured models that the table puts beside each other."""
    found = [("pretrained", summary["pretrained"])]
    if "experts" in summary:
        found.append(("expert", summary["experts"]))
    if "post_hoc" in summary:
        found.append(("merged once", summary["post_hoc"]))
    return [*found, ("this model", merged)]


def _score_table(run: Run, merged: Json, summary: Json) -> str:
    models = _models(run, merged, summary)
    shares = _shares(run, merged, summary)
    header = ["task", "metric", *(name for name, _ in models), "of the expert", "test examples"]
    rows = []
    for task in run.names:
        scores = [_score(entry["scores"][task]) for _, entry in models]
        own = merged["scores"][task]
        share = "–" if shares.get(task) is None else f"{shares[task]:.2f}"
        rows.append([task, own["metric"], *scores, share, str(own["num_examples"])])
    return table(header, rows)


def _score(score: Json) -> str:
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['score']:.3f}{spread}"


def _shares(run: Run, merged: Json, summary: Json) -> dict[str, float | None]:
    """Score over the expert's score, by task; empty where no experts were trained."""
    if "experts" not in summary:
        return {}
    shares: dict[str, float | None] = normalized(merged["scores"], summary["experts"]["scores"], run.names)["tasks"]
    return shares


def _verdict(run: Run, merged: Json, summary: Json) -> str:
    lines = []
    if "experts" in summary:
        lines.append("The expert of a task is the base model fine-tuned on that task alone with the same total steps.")
        found = normalized(merged["scores"], summary["experts"]["scores"], run.names)
        if found["average"] is not None:
            worst = escape_markdown(found["worst_task"])
            lines.append(f"Of its experts' scores this model has {found['average']:.3f} on average, and")
            lines.append(f"{found['worst']:.3f} on its worst task ({worst}).")
    before, after = summary["pretrained"]["multi_task_loss"], merged["multi_task_loss"]
    lines.append(f"Mean validation loss over the tasks: {after:.3f}; of the base model: {before:.3f}.")
    return "\n".join(lines)


def _weight_table(run: Run, merged: Json) -> str:
    gaps, weights = merged["loss_gaps"], merged["weights"]
    rows = [
        [name, f"{gaps[name]:.4f}", f"{weights[name]:.4f}"] if name in weights else [name, "–", "left out"]
        for name in run.names
    ]
    return table(["task", "loss gap (nats)", "weight"], rows)


def _limits(run: Run, origin: Origin, merged: Json, summary: Json) -> str:
    sizes = [merged["scores"][name]["num_examples"] for name in run.names]
    counts = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    lines = [
        f"Scores are of one run (seed {run.recipe.seed}), on {counts} test examples a task, with greedy decoding: "
        "differences within two standard errors (±) say little.",
        "Nothing beyond these tasks was measured: neither other knowledge and languages nor safety.",
    ]
    shares = _shares(run, merged, summary)
    far = {task: share for task, share in shares.items() if share is not None and share < FAR_BELOW}
    if far:
        listed = ", ".join(f"{escape_markdown(task)} ({share:.2f})" for task, share in far.items())
        lines.append(f"Well below the task's own expert: {listed}. That expert alone serves the task better.")
    if origin.license:
        lines.append("The licence is the base model's; those of the data that the tasks were trained on hold besides.")
    else:
        lines.append("The base model's licence is not known here: say it above before you share this model.")
    lines += [escape_markdown(line) for line in _lost(summary)]
    if not origin.hub_id:
        lines.append("The base model was a local folder: if it is on the Hub, name it under `base_model` above.")
    return _listed(lines)


def _lost(summary: Json) -> list[str]:
    """What went wrong on the way to this model: tasks left out of rounds, and merges that were taken back."""
    lines = []
    for index, entry in summary["rounds"].items():
        if skipped := entry.get("skipped"):
            lines.append(f"Round {index} went on without {', '.join(skipped)}, whose training failed in it.")
        if "rolled_back" in entry:
            lines.append(f"The merge of round {index} made the losses worse and was taken back.")
    return lines


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
