"""Words and sentence parts of the multilingual family: names, facts with their questions, colours, counts."""

from __future__ import annotations

from typing import NamedTuple

LANGUAGES: tuple[str, ...] = ("fr", "es", "de", "it", "pt")


class Fact(NamedTuple):
    """What a person does: a clause with {x}, a question about {n}, and what {x} may be."""

    clause: str
    question: str
    items: tuple[str, ...]


class Language(NamedTuple):
    """What a language needs beside its facts; German gives articles where the others give genders."""

    names: tuple[str, ...]
    conjunction: str
    who: str  # {clause}
    coloured: tuple[str, ...]  # {n}; {a} or {the_a} in the colour {p}; {b} or {the_b} in {q}
    colour_question: str  # {the_a}
    indefinite: dict[str, str]
    definite: dict[str, str]
    things: tuple[str, ...]  # noun/gender
    colours: tuple[str, ...]  # masculine/feminine, or one word for both
    counted: str  # {n} {number} {plural}
    count_question: dict[str, str]  # by gender: {plural} {n}
    plurals: tuple[str, ...]  # noun/gender
    numbers: tuple[str, ...]  # three to ten, which have no gender


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


# A name must not start with a vowel in French (qu'Emma), nor with an i in Spanish (e Inés).
GRAMMAR: dict[str, Language] = {
    "fr": Language(
        names=_list("Marie, Paul, Julie, Luc, Sophie, Marc, Claire, Louis, Sarah, Pierre, Nina, Thomas"),
        conjunction="et",
        who="Qui {clause} ?",
        coloured=("{n} a {a} {p} et {b} {q}.", "Chez {n}, {the_a} est {p} et {the_b} est {q}."),
        colour_question="De quelle couleur est {the_a} ?",
        indefinite={"m": "un", "f": "une"},
        definite={"m": "le", "f": "la"},
        things=_list("chat/m, chien/m, voiture/f, sac/m, chapeau/m, vélo/m, chaise/f, table/f, chemise/f, tasse/f"),
        colours=_list("noir/noire, blanc/blanche, vert/verte, gris/grise, bleu/bleue, brun/brune, rouge, jaune"),
        counted="{n} a {number} {plural}",
        count_question={"": "Combien de {plural} a {n} ?"},
        plurals=_list("livres, chaises, stylos, tasses, sacs, lampes, cartes, clés"),
        numbers=_list("trois, quatre, cinq, six, sept, huit, neuf, dix"),
    ),
    "es": Language(
        names=_list("Ana, Luis, Marta, Pedro, Lucía, Carlos, Elena, Jorge, Sofía, Pablo, Carmen, Diego"),
        conjunction="y",
        who="¿Quién {clause}?",
        coloured=("{n} tiene {a} {p} y {b} {q}.", "En casa de {n}, {the_a} es {p} y {the_b} es {q}."),
        colour_question="¿De qué color es {the_a}?",
        indefinite={"m": "un", "f": "una"},
        definite={"m": "el", "f": "la"},
        things=_list("gato/m, perro/m, coche/m, bolso/m, sombrero/m, bicicleta/f, silla/f, mesa/f, camisa/f, taza/f"),
        colours=_list("negro/negra, blanco/blanca, rojo/roja, amarillo/amarilla, gris, verde, azul, marrón"),
        counted="{n} tiene {number} {plural}",
        count_question={"m": "¿Cuántos {plural} tiene {n}?", "f": "¿Cuántas {plural} tiene {n}?"},
        plurals=_list("libros/m, sillas/f, lápices/m, tazas/f, bolsos/m, lámparas/f, cartas/f, llaves/f"),
        numbers=_list("tres, cuatro, cinco, seis, siete, ocho, nueve, diez"),
    ),
    "de": Language(
        names=_list("Anna, Paul, Lena, Max, Julia, Felix, Laura, Jonas, Maria, Tim, Clara, Peter"),
        conjunction="und",
        who="Wer {clause}?",
        # The colour stands alone after the verb: before a noun it would take an ending.
        coloured=("Bei {n} ist {the_a} {p} und {the_b} {q}.", "Zu Hause bei {n} ist {the_a} {p}, {the_b} {q}."),
        colour_question="Welche Farbe hat {the_a}?",
        indefinite={},
        definite={"der": "der", "die": "die", "das": "das"},
        things=_list(
            "Katze/die, Hund/der, Auto/das, Tasche/die, Hut/der, Fahrrad/das, Stuhl/der, Tisch/der, Hemd/das, Tasse/die"
        ),
        colours=_list("schwarz, weiß, rot, grün, blau, gelb, grau, braun"),
        counted="{n} hat {number} {plural}",
        count_question={"": "Wie viele {plural} hat {n}?"},
        plurals=_list("Bücher, Stühle, Stifte, Tassen, Taschen, Lampen, Karten, Schlüssel"),
        numbers=_list("drei, vier, fünf, sechs, sieben, acht, neun, zehn"),
    ),
    "it": Language(
        names=_list("Maria, Luca, Giulia, Marco, Sara, Paolo, Chiara, Pietro, Laura, Carlo, Sofia, Matteo"),
        conjunction="e",
        who="Chi {clause}?",
        coloured=("{n} ha {a} {p} e {b} {q}.", "A casa di {n} {the_a} è {p} e {the_b} è {q}."),
        colour_question="Di che colore è {the_a}?",
        indefinite={"m": "un", "f": "una"},
        definite={"m": "il", "f": "la"},
        things=_list(
            "gatto/m, cane/m, macchina/f, borsa/f, cappello/m, bicicletta/f, sedia/f, tavolo/m, camicia/f, tazza/f"
        ),
        colours=_list("nero/nera, bianco/bianca, rosso/rossa, giallo/gialla, grigio/grigia, verde, marrone"),
        counted="{n} ha {number} {plural}",
        count_question={"m": "Quanti {plural} ha {n}?", "f": "Quante {plural} ha {n}?"},
        plurals=_list("libri/m, sedie/f, penne/f, tazze/f, cappelli/m, lampade/f, fiori/m, chiavi/f"),
        numbers=_list("tre, quattro, cinque, sei, sette, otto, nove, dieci"),
    ),
    "pt": Language(
        names=_list("Ana, Pedro, Marta, João, Lúcia, Carlos, Helena, Rui, Sofia, Paulo, Carla, Diogo"),
        conjunction="e",
        who="Quem {clause}?",
        coloured=("{n} tem {a} {p} e {b} {q}.", "Na casa de {n}, {the_a} é {p} e {the_b} é {q}."),
        colour_question="De que cor é {the_a}?",
        indefinite={"m": "um", "f": "uma"},
        definite={"m": "o", "f": "a"},
        things=_list(
            "gato/m, cachorro/m, carro/m, bolsa/f, chapéu/m, bicicleta/f, cadeira/f, mesa/f, camisa/f, xícara/f"
        ),
        colours=_list("preto/preta, branco/branca, vermelho/vermelha, amarelo/amarela, cinza, verde, azul, marrom"),
        counted="{n} tem {number} {plural}",
        count_question={"m": "Quantos {plural} {n} tem?", "f": "Quantas {plural} {n} tem?"},
        plurals=_list("livros/m, cadeiras/f, lápis/m, xícaras/f, bolsas/f, chapéus/m, cartas/f, chaves/f"),
        numbers=_list("três, quatro, cinco, seis, sete, oito, nove, dez"),
    ),
}

# Language -> fact -> clause | question | items. The answer is an item's last word.
_FACTS = {
    "fr": """
eats|mange {x}|Que mange {n} ?|du pain, du riz, du fromage, du poisson, une pomme, une poire, une banane, un gâteau
drinks|boit {x}|Que boit {n} ?|du thé, du lait, du café, du jus, du cacao, de la limonade, un soda, un sirop
buys|achète {x}|Qu'achète {n} ?|un livre, une lampe, un vélo, une chaise, un chapeau, une robe, un sac, une montre
lives|habite à {x}|Où habite {n} ?|Paris, Lyon, Rome, Lille, Genève, Madrid, Berlin, Londres
works|travaille dans {x}|Où travaille {n} ?|une banque, une école, un hôtel, un musée, une ferme, un restaurant
arrives|arrive {x}|Quel jour arrive {n} ?|lundi, mardi, mercredi, jeudi, vendredi, samedi, dimanche
has|a {x}|Quel animal a {n} ?|un chat, un chien, un cheval, un lapin, une vache, un oiseau, une poule, un mouton
""",
    "es": """
eats|come {x}|¿Qué come {n}?|pan, arroz, queso, pescado, una manzana, una pera, sopa, pollo
drinks|bebe {x}|¿Qué bebe {n}?|agua, leche, té, café, zumo, limonada, chocolate, un batido
buys|compra {x}|¿Qué compra {n}?|un libro, una lámpara, un reloj, una silla, un sombrero, un vestido, un bolso
lives|vive en {x}|¿Dónde vive {n}?|Lima, Madrid, Quito, Sevilla, Bogotá, Roma, París, Londres
works|trabaja en {x}|¿Dónde trabaja {n}?|un banco, una escuela, un hotel, un hospital, un museo, una granja
arrives|llega {x}|¿Qué día llega {n}?|el lunes, el martes, el miércoles, el jueves, el viernes, el sábado, el domingo
has|tiene {x}|¿Qué animal tiene {n}?|un gato, un perro, un caballo, un conejo, una vaca, un pájaro, una oveja
""",
    "de": """
eats|isst {x}|Was isst {n}?|Brot, Reis, Käse, Fisch, Suppe, Salat, einen Apfel, eine Birne
drinks|trinkt {x}|Was trinkt {n}?|Wasser, Milch, Tee, Kaffee, Saft, Kakao, Limonade, Cola
buys|kauft {x}|Was kauft {n}?|ein Buch, eine Lampe, einen Hut, eine Tasche, ein Fahrrad, einen Stuhl, ein Kleid
lives|wohnt in {x}|Wo wohnt {n}?|Berlin, Köln, Wien, Hamburg, Bonn, Rom, Paris, London
works|arbeitet in {x}|Wo arbeitet {n}?|einer Bank, einer Schule, einem Hotel, einem Museum, einer Fabrik, einem Zoo
arrives|kommt am {x}|An welchem Tag kommt {n}?|Montag, Dienstag, Mittwoch, Donnerstag, Freitag, Samstag, Sonntag
has|hat {x}|Welches Tier hat {n}?|eine Katze, einen Hund, ein Pferd, ein Kaninchen, eine Kuh, einen Vogel, ein Huhn
""",
    "it": """
eats|mangia {x}|Che cosa mangia {n}?|pane, riso, formaggio, pesce, una mela, una pera, pollo, una banana
drinks|beve {x}|Che cosa beve {n}?|acqua, latte, tè, caffè, succo, cioccolata, limonata, un frullato
buys|compra {x}|Che cosa compra {n}?|un libro, una lampada, un cappello, una borsa, un vestito, una sedia, un orologio
lives|vive a {x}|Dove vive {n}?|Roma, Milano, Torino, Napoli, Madrid, Parigi, Londra, Berlino
works|lavora in {x}|Dove lavora {n}?|una banca, una scuola, un albergo, un ospedale, un museo, una fabbrica, un negozio
arrives|arriva {x}|Che giorno arriva {n}?|lunedì, martedì, mercoledì, giovedì, venerdì, sabato, domenica
has|ha {x}|Che animale ha {n}?|un gatto, un cane, un cavallo, un coniglio, una mucca, un uccello, una pecora
""",
    "pt": """
eats|come {x}|O que {n} come?|pão, arroz, queijo, peixe, uma maçã, uma pera, sopa, frango
drinks|bebe {x}|O que {n} bebe?|água, leite, chá, café, suco, limonada, chocolate, um refrigerante
buys|compra {x}|O que {n} compra?|um livro, uma mesa, um chapéu, uma bolsa, um vestido, uma cadeira, um relógio
lives|mora em {x}|Onde {n} mora?|Lisboa, Braga, Coimbra, Curitiba, Brasília, Roma, Paris, Londres
works|trabalha em {x}|Onde {n} trabalha?|um banco, uma escola, um hotel, um hospital, um museu, uma fazenda, uma padaria
arrives|chega {x}|Em que dia {n} chega?|na segunda, na terça, na quarta, na quinta, na sexta, no sábado, no domingo
has|tem {x}|Que animal {n} tem?|um gato, um cachorro, um cavalo, um coelho, uma vaca, um pássaro, uma ovelha
""",
}


def _facts(text: str) -> dict[str, Fact]:
    facts = {}
    for line in text.strip().splitlines():
        kind, clause, question, items = line.split("|")
        facts[kind] = Fact(clause, question, _list(items))
    return facts


FACTS: dict[str, dict[str, Fact]] = {language: _facts(text) for language, text in _FACTS.items()}
