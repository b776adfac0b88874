"""A page as Markdown: what report.html says, without pictures. Text is escaped, so that it reads as it is."""

from __future__ import annotations

from collections.abc import Sequence

from manyshot.compare_render import escape_markdown
from manyshot.report_data import Details, Example
from manyshot.report_page import Page, Section, Sheet, shown, writable

# of a prompt or an answer; the whole text is in report.html
LONGEST = 300


def render_markdown(page: Page) -> str:
    """Verdict, tables, examples, findings, costs and recipe, in the order of report.html."""
    lines = [f"# {escape_markdown(page.title)}", "", escape_markdown(page.verdict), ""]
    lines += _items(page.notes)
    for card in page.cards:
        beside = "; ".join(f"{name} {value}" for name, value in card.beside)
        text = ", ".join(part for part in (f"{card.value} {card.note}".strip(), beside) if part)
        lines.append(f"- **{escape_markdown(card.label)}**: {escape_markdown(text)}")
    if page.problems:
        lines += ["", "## Missing or damaged", ""]
        lines += _items([f"{problem.file}: {problem.message}" for problem in page.problems])
    lines += _sheets("All models", page.overview)
    for section in page.sections:
        lines += _section(section)
    lines += _examples(page)
    lines += _guards(page)
    lines += _section(page.costs)
    lines += _sheets("Tables of the comparison", page.tables)
    lines += ["", "## Recipe, versions, command"]
    for one in page.details:
        lines += _facts(one)
    return writable("\n".join(lines).rstrip()) + "\n"


def _items(texts: Sequence[str]) -> list[str]:
    return [*(f"- {escape_markdown(text)}" for text in texts), ""] if texts else []


def _section(section: Section) -> list[str]:
    lines = ["", f"## {escape_markdown(section.title)}"]
    if not section.figures and not section.sheets:
        lines += ["", f"Nothing to show: {escape_markdown(section.absent)}."]
    for figure in section.figures:
        lines += ["", escape_markdown(figure.caption), *_sheet(figure.sheet)]
    for sheet in section.sheets:
        lines += _sheet(sheet)
    return lines


def _sheets(title: str, sheets: Sequence[Sheet]) -> list[str]:
    return ["", f"## {title}", *(line for sheet in sheets for line in _sheet(sheet))] if sheets else []


def _sheet(sheet: Sheet) -> list[str]:
    """A table with its caption in bold above it, and its notes below."""
    kinds = [":--" if place < sheet.num_texts else "--:" for place in range(len(sheet.headers))]
    lines = ["", f"**{escape_markdown(sheet.caption)}**", "", _row(sheet.headers), f"| {' | '.join(kinds)} |"]
    lines += [_row(row) for row in sheet.rows]
    return [*lines, "", *_items(sheet.notes)] if sheet.notes else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"


def _examples(page: Page) -> list[str]:
    lines = ["", "## Examples"]
    shown_any = False
    for one in page.details:
        for task, examples in one.examples.items():
            shown_any = True
            of = f" ({one.name})" if len(page.details) > 1 else ""
            lines += ["", f"### {escape_markdown(task + of)}"]
            lines += [line for place, example in enumerate(examples, 1) for line in _example(example, place)]
    return lines if shown_any else [*lines, "", f"Nothing to show: {escape_markdown(page.no_examples)}."]


def _example(example: Example, place: int) -> list[str]:
    prompt = " ".join(f"[{role}] {text}" if role else text for role, text in example.prompt)
    rows = [(f"prompt {place}", prompt, ""), ("the data's answer", example.reference, "")]
    rows += [(answer.model, answer.text, shown(answer.score)) for answer in example.answers]
    return [
        *("", "| who | text | score |", "| :-- | :-- | --: |"),
        *(_row((who, text if len(text) <= LONGEST else f"{text[:LONGEST]} …", score)) for who, text, score in rows),
    ]


def _guards(page: Page) -> list[str]:
    lines = ["", "## Guards", ""]
    for one in page.details:
        of = f"{one.name}: " if len(page.details) > 1 else ""
        for finding in one.findings:
            where = f"round {finding.round}" if finding.round else "merged once"
            advice = f"; try {' or '.join(finding.suggestions)}" if finding.suggestions else ""
            lines.append(f"- {escape_markdown(f'{of}{where}: {finding.message}{advice}')}")
        if not one.findings:
            said = "The guards found nothing." if one.guarded else "No guards were recorded."
            lines.append(f"- {escape_markdown(of + said)}")
    return lines


def _facts(details: Details) -> list[str]:
    """Command, versions and the whole recipe, which is indented: no fence can be ended by what is in it."""
    facts = {
        "command": details.command,
        "base model": details.base_model,
        "operator": f"{details.operator}, {details.rounds} round{'s' if details.rounds != 1 else ''}",
        **details.settings,
        "seeds": ", ".join(map(str, details.seeds)),
        **details.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in details.versions.items()),
    }
    recipe = [f"    {line}".rstrip() for line in details.recipe.splitlines()]
    return [
        *("", f"### {escape_markdown(details.name)}", ""),
        *(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in facts.items()),
        *("", *recipe),
    ]
