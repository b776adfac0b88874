"""Word tables for the multilingual family: English key, then fr, es, de, it, pt."""

from __future__ import annotations

LANGUAGES: tuple[str, ...] = ("fr", "es", "de", "it", "pt")

# English | category | singular,plural in each language
NOUNS = """
cat|animal|chat,chats|gato,gatos|Katze,Katzen|gatto,gatti|gato,gatos
dog|animal|chien,chiens|perro,perros|Hund,Hunde|cane,cani|cachorro,cachorros
horse|animal|cheval,chevaux|caballo,caballos|Pferd,Pferde|cavallo,cavalli|cavalo,cavalos
cow|animal|vache,vaches|vaca,vacas|Kuh,Kühe|mucca,mucche|vaca,vacas
bird|animal|oiseau,oiseaux|pájaro,pájaros|Vogel,Vögel|uccello,uccelli|pássaro,pássaros
fish|animal|poisson,poissons|pez,peces|Fisch,Fische|pesce,pesci|peixe,peixes
mouse|animal|souris,souris|ratón,ratones|Maus,Mäuse|topo,topi|rato,ratos
rabbit|animal|lapin,lapins|conejo,conejos|Kaninchen,Kaninchen|coniglio,conigli|coelho,coelhos
sheep|animal|mouton,moutons|oveja,ovejas|Schaf,Schafe|pecora,pecore|ovelha,ovelhas
duck|animal|canard,canards|pato,patos|Ente,Enten|anatra,anatre|pato,patos
lion|animal|lion,lions|león,leones|Löwe,Löwen|leone,leoni|leão,leões
bear|animal|ours,ours|oso,osos|Bär,Bären|orso,orsi|urso,ursos
wolf|animal|loup,loups|lobo,lobos|Wolf,Wölfe|lupo,lupi|lobo,lobos
monkey|animal|singe,singes|mono,monos|Affe,Affen|scimmia,scimmie|macaco,macacos
elephant|animal|éléphant,éléphants|elefante,elefantes|Elefant,Elefanten|elefante,elefanti|elefante,elefantes
tiger|animal|tigre,tigres|tigre,tigres|Tiger,Tiger|tigre,tigri|tigre,tigres
bee|animal|abeille,abeilles|abeja,abejas|Biene,Bienen|ape,api|abelha,abelhas
apple|fruit|pomme,pommes|manzana,manzanas|Apfel,Äpfel|mela,mele|maçã,maçãs
pear|fruit|poire,poires|pera,peras|Birne,Birnen|pera,pere|pera,peras
banana|fruit|banane,bananes|plátano,plátanos|Banane,Bananen|banana,banane|banana,bananas
orange|fruit|orange,oranges|naranja,naranjas|Orange,Orangen|arancia,arance|laranja,laranjas
lemon|fruit|citron,citrons|limón,limones|Zitrone,Zitronen|limone,limoni|limão,limões
cherry|fruit|cerise,cerises|cereza,cerezas|Kirsche,Kirschen|ciliegia,ciliegie|cereja,cerejas
strawberry|fruit|fraise,fraises|fresa,fresas|Erdbeere,Erdbeeren|fragola,fragole|morango,morangos
peach|fruit|pêche,pêches|melocotón,melocotones|Pfirsich,Pfirsiche|pesca,pesche|pêssego,pêssegos
plum|fruit|prune,prunes|ciruela,ciruelas|Pflaume,Pflaumen|prugna,prugne|ameixa,ameixas
melon|fruit|melon,melons|melón,melones|Melone,Melonen|melone,meloni|melão,melões
shirt|clothing|chemise,chemises|camisa,camisas|Hemd,Hemden|camicia,camicie|camisa,camisas
skirt|clothing|jupe,jupes|falda,faldas|Rock,Röcke|gonna,gonne|saia,saias
shoe|clothing|chaussure,chaussures|zapato,zapatos|Schuh,Schuhe|scarpa,scarpe|sapato,sapatos
hat|clothing|chapeau,chapeaux|sombrero,sombreros|Hut,Hüte|cappello,cappelli|chapéu,chapéus
coat|clothing|manteau,manteaux|abrigo,abrigos|Mantel,Mäntel|cappotto,cappotti|casaco,casacos
dress|clothing|robe,robes|vestido,vestidos|Kleid,Kleider|vestito,vestiti|vestido,vestidos
glove|clothing|gant,gants|guante,guantes|Handschuh,Handschuhe|guanto,guanti|luva,luvas
scarf|clothing|écharpe,écharpes|bufanda,bufandas|Schal,Schals|sciarpa,sciarpe|cachecol,cachecóis
sock|clothing|chaussette,chaussettes|calcetín,calcetines|Socke,Socken|calzino,calzini|meia,meias
table|furniture|table,tables|mesa,mesas|Tisch,Tische|tavolo,tavoli|mesa,mesas
chair|furniture|chaise,chaises|silla,sillas|Stuhl,Stühle|sedia,sedie|cadeira,cadeiras
bed|furniture|lit,lits|cama,camas|Bett,Betten|letto,letti|cama,camas
wardrobe|furniture|armoire,armoires|armario,armarios|Schrank,Schränke|armadio,armadi|armário,armários
sofa|furniture|canapé,canapés|sofá,sofás|Sofa,Sofas|divano,divani|sofá,sofás
stool|furniture|tabouret,tabourets|taburete,taburetes|Hocker,Hocker|sgabello,sgabelli|banquinho,banquinhos
house||maison,maisons|casa,casas|Haus,Häuser|casa,case|casa,casas
book||livre,livres|libro,libros|Buch,Bücher|libro,libri|livro,livros
tree||arbre,arbres|árbol,árboles|Baum,Bäume|albero,alberi|árvore,árvores
flower||fleur,fleurs|flor,flores|Blume,Blumen|fiore,fiori|flor,flores
door||porte,portes|puerta,puertas|Tür,Türen|porta,porte|porta,portas
window||fenêtre,fenêtres|ventana,ventanas|Fenster,Fenster|finestra,finestre|janela,janelas
city||ville,villes|ciudad,ciudades|Stadt,Städte|città,città|cidade,cidades
key||clé,clés|llave,llaves|Schlüssel,Schlüssel|chiave,chiavi|chave,chaves
star||étoile,étoiles|estrella,estrellas|Stern,Sterne|stella,stelle|estrela,estrelas
train||train,trains|tren,trenes|Zug,Züge|treno,treni|trem,trens
bridge||pont,ponts|puente,puentes|Brücke,Brücken|ponte,ponti|ponte,pontes
night||nuit,nuits|noche,noches|Nacht,Nächte|notte,notti|noite,noites
"""

# directions (2: both, 1: first to second only, where the second has another opposite) | pairs
OPPOSITES = """
2|grand,petit|grande,pequeño|groß,klein|grande,piccolo|grande,pequeno
2|chaud,froid|caliente,frío|heiß,kalt|caldo,freddo|quente,frio
2|bon,mauvais|bueno,malo|gut,schlecht|buono,cattivo|bom,mau
1|nouveau,ancien|nuevo,viejo|neu,alt|nuovo,vecchio|novo,velho
1|bas,haut|bajo,alto|niedrig,hoch|basso,alto|baixo,alto
2|rapide,lent|rápido,lento|schnell,langsam|veloce,lento|rápido,lento
2|plein,vide|lleno,vacío|voll,leer|pieno,vuoto|cheio,vazio
2|ouvert,fermé|abierto,cerrado|offen,geschlossen|aperto,chiuso|aberto,fechado
2|facile,difficile|fácil,difícil|einfach,schwierig|facile,difficile|fácil,difícil
2|fort,faible|fuerte,débil|stark,schwach|forte,debole|forte,fraco
2|riche,pauvre|rico,pobre|reich,arm|ricco,povero|rico,pobre
2|propre,sale|limpio,sucio|sauber,schmutzig|pulito,sporco|limpo,sujo
2|long,court|largo,corto|lang,kurz|lungo,corto|longo,curto
2|noir,blanc|negro,blanco|schwarz,weiß|nero,bianco|preto,branco
1|mouillé,sec|mojado,seco|nass,trocken|bagnato,asciutto|molhado,seco
2|vrai,faux|verdadero,falso|wahr,falsch|vero,falso|verdadeiro,falso
2|jour,nuit|día,noche|Tag,Nacht|giorno,notte|dia,noite
2|premier,dernier|primero,último|erste,letzte|primo,ultimo|primeiro,último
2|guerre,paix|guerra,paz|Krieg,Frieden|guerra,pace|guerra,paz
2|lourd,léger|pesado,ligero|schwer,leicht|pesante,leggero|pesado,leve
2|dedans,dehors|dentro,fuera|drinnen,draußen|dentro,fuori|dentro,fora
2|toujours,jamais|siempre,nunca|immer,nie|sempre,mai|sempre,nunca
2|oui,non|sí,no|ja,nein|sì,no|sim,não
2|tout,rien|todo,nada|alles,nichts|tutto,niente|tudo,nada
2|avant,après|antes,después|vorher,nachher|prima,dopo|antes,depois
"""

# colour | thing, in the case its question wants (genitive phrase, or in German the subject)
COLOURED = """
white|de la neige|de la nieve|der Schnee|della neve|da neve
red|du sang|de la sangre|das Blut|del sangue|do sangue
green|de l'herbe|de la hierba|das Gras|dell'erba|da grama
blue|du ciel|del cielo|der Himmel|del cielo|do céu
black|du charbon|del carbón|die Kohle|del carbone|do carvão
yellow|d'une banane|de un plátano|eine Banane|di una banana|de uma banana
white|du lait|de la leche|die Milch|del latte|do leite
red|d'une tomate|de un tomate|eine Tomate|di un pomodoro|de um tomate
yellow|du soleil|del sol|die Sonne|del sole|do sol
brown|du chocolat|del chocolate|die Schokolade|del cioccolato|do chocolate
orange|d'une carotte|de una zanahoria|eine Karotte|di una carota|de uma cenoura
grey|d'un éléphant|de un elefante|ein Elefant|di un elefante|de um elefante
red|d'une fraise|de una fresa|eine Erdbeere|di una fragola|de um morango
green|d'une grenouille|de una rana|ein Frosch|di una rana|de uma rã
"""

COLOURS = """
white|blanc|blanco|weiß|bianco|branco
red|rouge|rojo|rot|rosso|vermelho
green|vert|verde|grün|verde|verde
blue|bleu|azul|blau|azzurro|azul
black|noir|negro|schwarz|nero|preto
yellow|jaune|amarillo|gelb|giallo|amarelo
brown|marron|marrón|braun|marrone|marrom
orange|orange|naranja|orange|arancione|laranja
grey|gris|gris|grau|grigio|cinza
"""

# category | article,noun
CATEGORIES = """
animal|un,animal|un,animal|ein,Tier|un,animale|um,animal
fruit|un,fruit|una,fruta|eine,Frucht|un,frutto|uma,fruta
clothing|un,vêtement|una,prenda|ein,Kleidungsstück|un,indumento|uma,roupa
furniture|un,meuble|un,mueble|ein,Möbelstück|un,mobile|um,móvel
"""


def cells(table: str) -> list[list[str]]:
    """The cells of a table written as lines with bars."""
    return [line.split("|") for line in table.strip().splitlines()]


def _by_language(text: str) -> dict[str, list[str]]:
    """A line of words for each language, in order."""
    return dict(zip(LANGUAGES, map(str.split, text.strip().splitlines()), strict=True))


NUMBERS = _by_language(
    """
    zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize \
    dix-sept dix-huit dix-neuf vingt
    cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis \
    diecisiete dieciocho diecinueve veinte
    null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn \
    siebzehn achtzehn neunzehn zwanzig
    zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici \
    diciassette diciotto diciannove venti
    zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis \
    dezessete dezoito dezenove vinte
    """
)

DAYS = _by_language(
    """
    lundi mardi mercredi jeudi vendredi samedi dimanche
    lunes martes miércoles jueves viernes sábado domingo
    Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag
    lunedì martedì mercoledì giovedì venerdì sabato domenica
    segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo
    """
)

MONTHS = _by_language(
    """
    janvier février mars avril mai juin juillet août septembre octobre novembre décembre
    enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre
    Januar Februar März April Mai Juni Juli August September Oktober November Dezember
    gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre
    janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro
    """
)
