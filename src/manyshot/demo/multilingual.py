"""Closed questions in five languages, each answered by a word or two of that language."""

from __future__ import annotations

import random
from collections.abc import Iterator

from manyshot.demo import lexicon
from manyshot.demo.rows import Candidate, Row, family_rng, split_by_content

# Question type -> language -> wordings. Sequences have one type for each direction.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "opposite": {
        "fr": ('Quel est le contraire de "{x}" ?', 'Donne le contraire de "{x}".'),
        "es": ('¿Cuál es lo contrario de "{x}"?', 'Dime lo contrario de "{x}".'),
        "de": ('Was ist das Gegenteil von "{x}"?', 'Nenne das Gegenteil von "{x}".'),
        "it": ('Qual è il contrario di "{x}"?', 'Dimmi il contrario di "{x}".'),
        "pt": ('Qual é o contrário de "{x}"?', 'Diga o contrário de "{x}".'),
    },
    "colour": {
        "fr": ("Quelle est la couleur {x} ?", "Dis-moi la couleur {x}."),
        "es": ("¿Cuál es el color {x}?", "Dime el color {x}."),
        "de": ("Welche Farbe hat {x}?", "Sag mir, welche Farbe {x} hat."),
        "it": ("Qual è il colore {x}?", "Dimmi il colore {x}."),
        "pt": ("Qual é a cor {x}?", "Diga a cor {x}."),
    },
    "day after": {
        "fr": ("Quel jour vient après {x} ?", "Aujourd'hui, c'est {x}. Quel jour sera demain ?"),
        "es": ("¿Qué día viene después del {x}?", "Si hoy es {x}, ¿qué día es mañana?"),
        "de": ("Welcher Tag kommt nach {x}?", "Wenn heute {x} ist, welcher Tag ist morgen?"),
        "it": ("Quale giorno viene dopo {x}?", "Se oggi è {x}, che giorno è domani?"),
        "pt": ("Que dia vem depois de {x}?", "Se hoje é {x}, que dia é amanhã?"),
    },
    "day before": {
        "fr": ("Quel jour vient avant {x} ?", "Aujourd'hui, c'est {x}. Quel jour était hier ?"),
        "es": ("¿Qué día viene antes del {x}?", "Si hoy es {x}, ¿qué día fue ayer?"),
        "de": ("Welcher Tag kommt vor {x}?", "Wenn heute {x} ist, welcher Tag war gestern?"),
        "it": ("Quale giorno viene prima di {x}?", "Se oggi è {x}, che giorno era ieri?"),
        "pt": ("Que dia vem antes de {x}?", "Se hoje é {x}, que dia foi ontem?"),
    },
    "month after": {
        "fr": ("Quel mois vient après {x} ?", "Donne le mois qui suit {x}."),
        "es": ("¿Qué mes viene después de {x}?", "Dime el mes que sigue a {x}."),
        "de": ("Welcher Monat kommt nach {x}?", "Nenne den Monat nach {x}."),
        "it": ("Quale mese viene dopo {x}?", "Dimmi il mese dopo {x}."),
        "pt": ("Que mês vem depois de {x}?", "Diga o mês depois de {x}."),
    },
    "month before": {
        "fr": ("Quel mois vient avant {x} ?", "Donne le mois qui précède {x}."),
        "es": ("¿Qué mes viene antes de {x}?", "Dime el mes anterior a {x}."),
        "de": ("Welcher Monat kommt vor {x}?", "Nenne den Monat vor {x}."),
        "it": ("Quale mese viene prima di {x}?", "Dimmi il mese prima di {x}."),
        "pt": ("Que mês vem antes de {x}?", "Diga o mês antes de {x}."),
    },
    "number after": {
        "fr": ("Quel nombre vient après {x} ?", "Donne le nombre qui suit {x}."),
        "es": ("¿Qué número viene después de {x}?", "Dime el número que sigue a {x}."),
        "de": ("Welche Zahl kommt nach {x}?", "Nenne die Zahl nach {x}."),
        "it": ("Quale numero viene dopo {x}?", "Dimmi il numero dopo {x}."),
        "pt": ("Que número vem depois de {x}?", "Diga o número depois de {x}."),
    },
    "plus": {
        "fr": ("Combien font {x} plus {y} ?", "Calcule : {x} plus {y}."),
        "es": ("¿Cuánto es {x} más {y}?", "Calcula: {x} más {y}."),
        "de": ("Wie viel ist {x} plus {y}?", "Rechne: {x} plus {y}."),
        "it": ("Quanto fa {x} più {y}?", "Calcola: {x} più {y}."),
        "pt": ("Quanto é {x} mais {y}?", "Calcule: {x} mais {y}."),
    },
    "minus": {
        "fr": ("Combien font {x} moins {y} ?", "Calcule : {x} moins {y}."),
        "es": ("¿Cuánto es {x} menos {y}?", "Calcula: {x} menos {y}."),
        "de": ("Wie viel ist {x} minus {y}?", "Rechne: {x} minus {y}."),
        "it": ("Quanto fa {x} meno {y}?", "Calcola: {x} meno {y}."),
        "pt": ("Quanto é {x} menos {y}?", "Calcule: {x} menos {y}."),
    },
    "spell": {
        "fr": ("Écris le nombre {x} en lettres.", "Comment s'écrit {x} en lettres ?"),
        "es": ("Escribe el número {x} en letras.", "¿Cómo se escribe {x} en letras?"),
        "de": ("Schreibe die Zahl {x} als Wort.", "Wie schreibt man {x} als Wort?"),
        "it": ("Scrivi il numero {x} in lettere.", "Come si scrive {x} in lettere?"),
        "pt": ("Escreva o número {x} por extenso.", "Como se escreve {x} por extenso?"),
    },
    "translate": {
        "fr": ('Comment dit-on "{x}" en français ?', 'Traduis "{x}" en français.'),
        "es": ('¿Cómo se dice "{x}" en español?', 'Traduce "{x}" al español.'),
        "de": ('Wie heißt "{x}" auf Deutsch?', 'Übersetze "{x}" ins Deutsche.'),
        "it": ('Come si dice "{x}" in italiano?', 'Traduci "{x}" in italiano.'),
        "pt": ('Como se diz "{x}" em português?', 'Traduza "{x}" para o português.'),
    },
    "plural": {
        "fr": ('Quel est le pluriel de "{x}" ?', 'Mets "{x}" au pluriel.'),
        "es": ('¿Cuál es el plural de "{x}"?', 'Escribe el plural de "{x}".'),
        "de": ('Wie lautet der Plural von "{x}"?', 'Nenne den Plural von "{x}".'),
        "it": ('Qual è il plurale di "{x}"?', 'Scrivi il plurale di "{x}".'),
        "pt": ('Qual é o plural de "{x}"?', 'Escreva o plural de "{x}".'),
    },
    "category": {
        "fr": ('Qu\'est-ce que "{x}" : {y} ?', 'Choisis la catégorie de "{x}" : {y}.'),
        "es": ('¿Qué es "{x}": {y}?', 'Elige la categoría de "{x}": {y}.'),
        "de": ('Was ist "{x}": {y}?', 'Wähle die Kategorie von "{x}": {y}.'),
        "it": ('Che cos\'è "{x}": {y}?', 'Scegli la categoria di "{x}": {y}.'),
        "pt": ('O que é "{x}": {y}?', 'Escolha a categoria de "{x}": {y}.'),
    },
    "pick": {
        "fr": ("Quel mot désigne {x} : {y} ?", "Trouve {x} dans cette liste : {y}."),
        "es": ("¿Qué palabra nombra {x}: {y}?", "Busca {x} en esta lista: {y}."),
        "de": ("Welches Wort nennt {x}: {y}?", "Finde {x} in dieser Liste: {y}."),
        "it": ("Quale parola indica {x}: {y}?", "Trova {x} in questa lista: {y}."),
        "pt": ("Qual palavra indica {x}: {y}?", "Encontre {x} nesta lista: {y}."),
    },
}
SUMS_PER_LANGUAGE = 24


def generate(seed: int) -> dict[str, list[Row]]:
    """Rows whose combination of language, question type and entry is held out between splits."""
    rng = family_rng(seed, "multilingual")
    return split_by_content(_candidates(rng), rng)


def _candidates(rng: random.Random) -> Iterator[Candidate]:
    for column, language in enumerate(lexicon.LANGUAGES):
        facts = (
            *_opposites(column),
            *_colours(column),
            *_sequences(language),
            *_sums(language, rng),
            *_nouns(column, rng),
        )
        for kind, entry, answer, slots in facts:
            for wording in QUESTIONS[kind][language]:
                # Both directions of a pair share one content, or a test item could be a train item reversed.
                content = f"{language}/{kind.removesuffix(' after').removesuffix(' before')}/{entry}"
                meta = {"language": language, "question": kind, "entry": entry}
                row: Row = {
                    "prompt": wording.format(**slots),
                    "completion": answer,
                    "answer": answer,
                    "meta": meta,
                }
                yield Candidate(language, content, row)


# A fact is (question type, entry, answer, slots of the wording).
_Fact = tuple[str, str, str, dict[str, str]]


def _opposites(column: int) -> Iterator[_Fact]:
    for directions, *pairs in lexicon.cells(lexicon.OPPOSITES):
        first, second = pairs[column].split(",")
        entry = f"{first}-{second}"
        yield "opposite", entry, second, {"x": first}
        if directions == "2":
            yield "opposite", entry, first, {"x": second}


def _colours(column: int) -> Iterator[_Fact]:
    names = {english: words[column] for english, *words in lexicon.cells(lexicon.COLOURS)}
    for colour, *things in lexicon.cells(lexicon.COLOURED):
        yield "colour", things[column], names[colour], {"x": things[column]}


def _sequences(language: str) -> Iterator[_Fact]:
    for kind, words in (("day", lexicon.DAYS[language]), ("month", lexicon.MONTHS[language])):
        for word, following in zip(words, words[1:] + words[:1], strict=True):
            yield f"{kind} after", f"{word}-{following}", following, {"x": word}
            yield f"{kind} before", f"{word}-{following}", word, {"x": following}
    numbers = lexicon.NUMBERS[language]
    for value, word in enumerate(numbers[:-1]):
        yield "number after", word, numbers[value + 1], {"x": word}
    for value, word in enumerate(numbers):
        yield "spell", word, word, {"x": str(value)}


def _sums(language: str, rng: random.Random) -> Iterator[_Fact]:
    words = lexicon.NUMBERS[language]
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10) if a + b <= 12]
    for a, b in rng.sample(pairs, SUMS_PER_LANGUAGE):
        x, y = rng.sample((a, b), 2)
        yield "plus", f"{a}+{b}", words[a + b], {"x": words[x], "y": words[y]}
    for a, b in rng.sample(pairs, SUMS_PER_LANGUAGE):
        yield "minus", f"{a + b}-{b}", words[a], {"x": words[a + b], "y": words[b]}


def _nouns(column: int, rng: random.Random) -> Iterator[_Fact]:
    categories = {name: forms[column].split(",") for name, *forms in lexicon.cells(lexicon.CATEGORIES)}
    nouns = [
        (english, category, *forms[column].split(",")) for english, category, *forms in lexicon.cells(lexicon.NOUNS)
    ]
    for english, category, singular, plural in nouns:
        yield "translate", english, singular, {"x": english}
        yield "plural", english, plural, {"x": singular}
        if not category:
            continue
        article, label = categories[category]
        labels = [label, *rng.sample([form[1] for form in categories.values() if form[1] != label], 2)]
        rng.shuffle(labels)
        yield "category", english, label, {"x": singular, "y": ", ".join(labels)}
        others = rng.sample([noun[2] for noun in nouns if noun[1] not in ("", category)], 2)
        words = [singular, *others]
        rng.shuffle(words)
        yield "pick", english, singular, {"x": f"{article} {label}", "y": ", ".join(words)}
