"""Words that can stand for one another in a caption: with the same meaning (paraphrase), or of one class (irrelevant edit).

Both tables were written for captions of photographs and drawings; a word that an option or the question holds is left alone.
No torch here.
"""
import random
import re
from collections import Counter
from collections.abc import Iterable

from utils.slots import TABLES, stems, strip_label
from utils.values import NUMBERS, find, replace_values, twin_number

SYNONYMS = {  # phrase -> one with the same meaning; neither names a thing, an attribute or a side
    "shows": "displays", "show": "display", "showing": "displaying", "shown": "displayed", "displays": "shows",
    "clearly": "plainly", "distinctly": "clearly", "is visible": "can be seen", "are visible": "can be seen",
    "located": "situated", "situated": "located", "positioned": "placed", "appears to be": "seems to be",
    "zoomed-in": "enlarged", "enlarged": "zoomed-in", "zooming in": "looking closer", "the image": "the picture",
    "an image": "a picture", "the picture": "the image", "the photo": "the photograph", "next to": "beside",
    "beside": "next to", "near": "close to", "depicts": "portrays", "depicted": "portrayed", "contains": "holds",
    "indicates": "suggests", "approximately": "about", "reads": "says", "labeled": "marked", "reveals": "shows",
    "region": "area", "area": "region", "identify": "recognize", "examine": "inspect", "locate": "find"}
TEMPLATE = "In this view, {}"  # where no synonym fits
FUNCTION_WORD = re.compile(r"(?:The|A|An|It|There|This|These|In|On|At|One|Its)\b")  # may lose its capital

CLASSES = (  # words of a class may stand for one another: the text stays well-formed and says something else
    "red green blue yellow orange purple pink brown black white gray".split(),
    "wooden metal plastic glass leather ceramic".split(),
    "small large tiny huge".split(), "tall short".split(), "bright dark pale".split(), "old new".split(),
    "round oval triangular rectangular".split(), "circle triangle square diamond star bar pillar".split(),
    "left right".split(), "top bottom".split(), "foreground background".split(), "indoors outdoors".split(),
    "car truck bus van bicycle motorcycle boat train".split(), "dog cat horse bird cow sheep".split(),
    "man woman boy girl child".split(), "table chair bench sofa shelf desk".split(),
    "street sidewalk road path beach field river park garden".split(), "building house shop tower bridge wall fence".split(),
    "shirt jacket coat dress hat scarf".split(), "cup bottle box bag basket bowl plate".split(),
    "north south east west".split(), "northeast northwest southeast southwest".split(), NUMBERS[2:13],  # "one" is a pronoun too
    "tree bush flower grass".split(), "sitting standing walking running".split())
NUMBER = re.compile(r"(?<![\w.,])\d+(?![\w]|[.,]\d)")


def option_words(item: dict) -> set[str]:
    """Return every option's value and the words in it that say something, lower-case."""
    texts = [strip_label(text).lower() for _, text in item["options"]]
    sides = [word for word in TABLES["side"] if any(find(text, word) for text in texts)]
    return {*texts, *sides, *(word for text in texts for word in stems(text))} - {""}


def survivors(spans: Iterable[str], item: dict) -> Counter:
    """Return how often the spans mention each word of the options and each number: what keeps an answer's ground."""
    text = "\n".join(spans)
    numbers = re.findall(rf"\d+(?:[.,]\d+)*|\b(?:{'|'.join(NUMBERS)})\b", text.lower())
    counts = Counter({word: find(text, word) for word in option_words(item)})
    return +(counts + Counter(f"number {twin_number(number) if number.isalpha() else number}" for number in numbers))


def reworded(span: str, item: dict) -> str:
    """Return a span in other words: each phrase of SYNONYMS once, or TEMPLATE around it where there is none."""
    if not span.strip():
        return span
    kept = option_words(item)
    table = {old: new for old, new in SYNONYMS.items() if not any(find(f"{old} {new}", word) for word in kept)}
    after, found = replace_values(span, table)
    if found:
        return after
    body = span[0].lower() + span[1:] if FUNCTION_WORD.match(span) else span
    return TEMPLATE.format(body)


def others(spans: Iterable[str], item: dict, rng: random.Random) -> list[tuple[str, str]]:
    """Return (word, another of its class) for what the spans mention and neither options nor question do, shuffled.

    A number above twelve has the numbers of as many digits for its class. What comes in stands nowhere
    in spans, options or question.
    """
    text = "\n".join(spans)
    asked = "\n".join([item["question"], *(option for _, option in item["options"])])
    found = []
    for words in CLASSES:
        here, there = (replace_values(part, {word: word for word in words})[1] for part in (text, asked))
        free = [word for word in words if not here[word] and not there[word]]
        for word in (word for word in words if here[word] and not there[word]):
            if free:
                found.append((word, free.pop(rng.randrange(len(free)))))
    for number in sorted({number for number in NUMBER.findall(text) if twin_number(number) not in NUMBERS[2:13]}):
        low = 10 ** (len(number) - 1) if len(number) > 1 else 0
        new = str(rng.randrange(low, 10 ** len(number)))
        if not find(asked, number) and not find(asked, new) and not find(text, new):
            found.append((number, new))
    rng.shuffle(found)
    return found
