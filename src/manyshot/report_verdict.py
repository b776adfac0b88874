"""The verdict: what came out, in a sentence, four numbers, and a table of all models; and what to be careful with."""

from __future__ import annotations

from collections.abc import Sequence

from manyshot.compare_statistics import Paired, SeedPair, paired_normalized
from manyshot.errors import RunFolderError
from manyshot.report_data import Block, Details, Model, Shares, Subject
from manyshot.report_page import Card, Sheet, listed, shown, within

# ---- one sentence ----------------------------------------------------------------------------------------------------


def verdict(block: Block, details: Sequence[Details]) -> str:
    """What came out, or how far it has come."""
    best, stopped = block.best, details[0].stopped if len(details) == 1 else None
    if best is None:
        return f"Not finished: {stopped}." if stopped else "Nothing has been merged yet."
    others = [subject for subject in block.subjects if subject.merges]
    if block.main is None and len(others) > 1:
        return f"Best of {len(others)} is {best.name}: it {outcome(block, best)}"
    if stopped:
        return f"Not finished: {stopped}. So far, the merged model {outcome(block, best)}"
    return f"The merged model {outcome(block, best)}"


def outcome(block: Block, best: Subject) -> str:
    """What the model reaches, and what the same merged once reaches."""
    model, once = best.model, block.subject(best.once)
    shares, other = model.normalized, once.model.normalized if once else None
    if shares and shares.average is not None:
        if len(block.tasks) == 1:
            return f"reaches {within(shares.average, shares.average_error)} of its expert's score."
        worst = f" ({shares.worst_task})" if shares.worst_task else ""
        found = (
            f"reaches {within(shares.average, shares.average_error)} of its experts' scores on average and "
            f"{within(shares.worst, shares.worst_error)} on the worst task{worst}"
        )
        if other and other.average is not None:
            found += f"; merged once, {shown(other.average)} and {shown(other.worst)}"
        return f"{found}."
    start = block.reference("pretrained")
    found = f"has a multi-task loss of {shown(model.multi_task_loss)} nats"
    if start and start.multi_task_loss is not None:
        found += f"; the pretrained model has {shown(start.multi_task_loss)}"
    if once and once.model.multi_task_loss is not None:
        found += f", merged once it is {shown(once.model.multi_task_loss)}"
    if shares:
        found += ". No expert scores above 0, so no share of their scores is defined"
    return f"{found}."


# ---- what to be careful with -----------------------------------------------------------------------------------------


def cautions(block: Block, details: Sequence[Details]) -> list[str]:
    """Sentences that belong beside the verdict: is it chance, what is not defined, what guards and files say."""
    found = []
    best = block.best
    once = block.subject(best.once) if best else None
    if best and once:
        found += difference(block, best.model, once.model)
    shares = best.model.normalized if best else None
    undefined = [task for task, share in shares.tasks.items() if share is None] if shares else []
    if undefined:
        found.append(f"Not in the averages, since the expert scores 0 there or was not measured: {listed(undefined)}.")
    if num := sum(len(one.findings) for one in details):
        found.append(f"The guards found {num} thing{'s' if num > 1 else ''} to look at, listed below.")
    if num := sum(len(one.problems) for one in details):
        found.append(
            f"{num} record{'s are' if num > 1 else ' is'} missing or damaged, listed below; the rest is shown."
        )
    for one in details:
        if one.stopped and one.stopped not in verdict(block, details):
            found.append(f"{one.name} is not finished: {one.stopped}.")
    return found


def difference(block: Block, model: Model, once: Model) -> list[str]:
    """Merged in rounds against merged once on the same test examples: the difference, and whether it may be chance."""
    experts = block.reference("experts")
    names = [name for name in block.scored if name in model.example_scores and name in once.example_scores]
    if experts is None or not names:
        return []
    scores = {name: experts.scores[name].score or 0.0 for name in names if name in experts.scores}
    pair = SeedPair(
        0,
        {name: model.example_scores[name] for name in scores},
        {name: once.example_scores[name] for name in scores},
        scores,
    )
    try:
        paired = paired_normalized([pair], "report", block.title)
    except RunFolderError:
        return ["The two merges were not scored on the same test examples, so their difference has no interval."]
    return [_told(paired)] if paired.difference is not None else []


def _told(paired: Paired) -> str:
    certain = paired.low is not None and paired.high is not None and (paired.low > 0 or paired.high < 0)
    chance = "more than chance" if certain else "which may be chance"
    return (
        f"Against merging once, on the same test examples: {shown(paired.difference, signed=True)} on average, "
        f"95 % interval {shown(paired.low, signed=True)} to {shown(paired.high, signed=True)}, {chance}."
    )


# ---- four numbers ----------------------------------------------------------------------------------------------------


def cards(block: Block) -> list[Card]:
    """Average, worst task, drop, and what is kept of the experts' gain in loss; without experts, scores and losses."""
    best = block.best
    if best is None:
        return []
    once, start = block.subject(best.once), block.reference("pretrained")
    found = (("merged once", once.model if once else None), ("pretrained", start))
    others = [(name, model) for name, model in found if model]
    shares = best.model.normalized
    if shares is None:
        return _cards_without_experts(best.model, others, block.loss_split)
    average, worst = (within(shares.average, shares.average_error), within(shares.worst, shares.worst_error))
    return [
        Card("Average", average, "of the experts' scores", _beside(others, "average")),
        Card("Worst task", worst, shares.worst_task or "", _beside(others, "worst")),
        Card("Drop", shown(shares.drop), "from average to worst; lower is better", _beside(others, "drop")),
        _gain_card(best.model, others, block.loss_split),
    ]


def _gain_card(model: Model, others: Sequence[tuple[str, Model]], split: str) -> Card:
    gain = model.gain
    value = within(gain.average, gain.average_error) if gain else shown(None)
    note = f"of the experts', {split} split"
    if gain and gain.worst is not None:
        note += f"; worst task {shown(gain.worst)}" + (f" ({gain.worst_task})" if gain.worst_task else "")
    return Card("Gain in loss kept", value, note, tuple((name, shown(m.gain.average)) for name, m in others if m.gain))


def _cards_without_experts(model: Model, others: Sequence[tuple[str, Model]], split: str) -> list[Card]:
    known = {name: score.score for name, score in model.scores.items() if score.score is not None}
    lowest = min(known, key=lambda name: known[name], default=None)
    mean = sum(known.values()) / len(known) if known else None
    low = None if lowest is None else known[lowest]
    drop = None if mean is None or low is None else mean - low
    losses = tuple((name, shown(other.multi_task_loss)) for name, other in others)
    return [
        Card("Mean test score", shown(mean), "there are no experts to divide by"),
        Card("Lowest test score", shown(low), lowest or ""),
        Card("Drop", shown(drop), "from the mean to the lowest"),
        Card("Multi-task loss", shown(model.multi_task_loss), f"nats, {split} split; lower is better", losses),
    ]


def _beside(others: Sequence[tuple[str, Model]], key: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, shown(getattr(one.normalized, key))) for name, one in others if one.normalized)


# ---- all models ------------------------------------------------------------------------------------------------------


def overview(block: Block) -> Sheet:
    """Every model with its average, worst task, drop, kept gain and loss; the rounds in between too."""
    models = [model for model in block.references if model.role == "pretrained"]
    for subject in block.subjects:
        between = [model for index, model in subject.path[:-1] if index > 0 and model.scores]
        models += [*(between if block.main else []), subject.model]
    rows = [_row(model) for model in models]
    experts = block.reference("experts")
    if experts:
        rows.append((experts.label, "1.000", "1.000", "0.000", "1.000", shown(experts.multi_task_loss)))
    headers = ("model", "average", "worst task", "drop", "gain kept", "loss")
    notes = (
        "Average, worst task, drop: test score over that of the task's own expert.",
        f"Gain kept: share of the experts' gain in loss, mean over tasks. Loss: mean over tasks, in nats. Both on the "
        f"{block.loss_split} split.",
    )
    caption = "Shares of the experts' scores, and losses" if block.main else block.title
    return Sheet(caption, headers, tuple(rows), 1, notes)


def _row(model: Model) -> tuple[str, ...]:
    shares = model.normalized or Shares({}, None, None, None, None)
    gain = model.gain or Shares({}, None, None, None, None)
    return (
        model.label,
        within(shares.average, shares.average_error),
        within(shares.worst, shares.worst_error) + (f" {shares.worst_task}" if shares.worst_task else ""),
        shown(shares.drop),
        within(gain.average, gain.average_error),
        shown(model.multi_task_loss),
    )
