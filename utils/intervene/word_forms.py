"""The forms that a value takes in a text (plurals, articles, "-ish", digits and number words, capitals), and
tables of words that can replace one another in a caption of a photograph or drawing."""
import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from utils.answers import strip_label
from utils.reply_text import NUMBERS

COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y"
SOMETHING = "something"  # replaces a removed value; it takes no ending
SYNONYMS = {  # phrase -> same meaning; neither names a thing, an attribute or a side
    "shows": "displays", "show": "display", "showing": "displaying", "shown": "displayed",
    "displays": "shows", "clearly": "plainly", "distinctly": "clearly", "is visible": "can be seen",
    "are visible": "can be seen", "located": "situated", "situated": "located", "positioned": "placed",
    "appears to be": "seems to be", "zoomed-in": "enlarged", "enlarged": "zoomed-in",
    "zooming in": "looking closer", "the image": "the picture", "an image": "a picture",
    "the picture": "the image", "the photo": "the photograph", "next to": "beside", "beside": "next to",
    "near": "close to", "depicts": "portrays", "depicted": "portrayed", "contains": "holds",
    "indicates": "suggests", "approximately": "about", "reads": "says", "labeled": "marked",
    "reveals": "shows", "region": "area", "area": "region", "identify": "recognize", "examine": "inspect",
    "locate": "find"}
TEMPLATE = "In this view, {}"  # where no synonym fits
FUNCTION_WORD = re.compile(r"(?:The|A|An|It|There|This|These|In|On|At|One|Its)\b")  # may lose its capital
CLASSES = (  # words of a class can be exchanged: the text stays well-formed with another meaning
    "red green blue yellow orange purple pink brown black white gray".split(),
    "wooden metal plastic glass leather ceramic".split(),
    "small large tiny huge".split(), "tall short".split(), "bright dark pale".split(), "old new".split(),
    "round oval triangular rectangular".split(), "circle triangle square diamond star bar pillar".split(),
    "left right".split(), "top bottom".split(), "foreground background".split(), "indoors outdoors".split(),
    "car truck bus van bicycle motorcycle boat train".split(), "dog cat horse bird cow sheep".split(),
    "man woman boy girl child".split(), "table chair bench sofa shelf desk".split(),
    "street sidewalk road path beach field river park garden".split(),
    "building house shop tower bridge wall fence".split(),
    "shirt jacket coat dress hat scarf".split(), "cup bottle box bag basket bowl plate".split(),
    "north south east west".split(), "northeast northwest southeast southwest".split(),
    NUMBERS[2:13],  # without "one", also a pronoun
    "tree bush flower grass".split(), "sitting standing walking running".split())
NUMBER = re.compile(r"(?<![\w.,])\d+(?![\w]|[.,]\d)")
TABLES = {  # for options that share no wording: if each holds one word of a table, these two are the slot
    "color": ("red orange yellow green blue purple pink brown black white gray grey silver gold golden "
              "beige").split(),
    "material": ("wood wooden metal plastic glass rubber leather cotton wool paper stone brick concrete "
                 "ceramic steel fabric kevlar").split(),
    "side": ["left", "right", "above", "below", "top", "bottom", "behind", "in front of", "inside", "outside",
             "over", "under"],
    "number": [*NUMBERS, *map(str, range(100))]}
NOT_REFERENT = set(  # words that do not name a thing
    """what which where who whose how many much kind type side sides relative position image picture photo
    color colour material shape number there does have has the and are was were can you see from with that
    this any not one left right above below top bottom behind front inside outside over under near
    next""".split())


# ---- forms of a value
def mention(name: str, value: str) -> str:
    """Return a pattern of a value's mentions in any spacing and form."""
    pattern = r"[\s-]+".join(re.escape(word) for word in re.split(r"(?<=\S)[\s-]+(?=\S)", value))
    twin = twin_number(value)
    ending = r"e?s" if value[-1].isalpha() and len(value) > 1 and not twin else r"(?!)"
    if re.fullmatch(COLORS, value, re.IGNORECASE):
        ending += r"|[a-z]?ish"
    return f"(?P<{name}>{pattern}{'|' + twin if twin else ''})(?P<{name}_ending>{ending})?"


def twin_number(value: str) -> str | None:
    """Return the word for digits or the digits for a word, up to twenty."""
    if value.isascii() and value.isdigit() and int(value) < len(NUMBERS):
        return NUMBERS[int(value)]
    return str(NUMBERS.index(value.lower())) if value.lower() in NUMBERS else None


def word_like(form: str, ending: str, old: str, new: str) -> str:
    """Return `new` in the form that `old` has in `form`."""
    if new == SOMETHING:
        ending = ""
    if twin_number(new) and form.isdigit() != new.isdigit():
        new = twin_number(new)
    if ending.endswith("ish"):
        new += "ish"
    elif ending:
        new += "es" if re.search(r"(?:s|x|z|ch|sh)$", new) else "s"
    if form == old:
        return new
    if form.isupper() and len(form) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if form[0].isupper() else new.lower()


def article_for(word: str) -> str:
    """Return "a" or "an", as far as a few prefixes determine it."""
    if re.match(r"(?:one|once|uni|use|eu)|(?:hour|honest)", word, re.IGNORECASE):
        return "an" if word[0] in "hH" else "a"
    return "an" if re.match(r"[aeiou]|8|1[18](?!\d)", word, re.IGNORECASE) else "a"


def replace_values(text: str, table: dict[str, str]) -> tuple[str, Counter]:
    """Replace every mention of a value (old -> new), longer ones first; count the mentions. The article
    before a mention is adapted."""
    if not table:
        return text, Counter()
    names, pattern = mentions(tuple(sorted(table, key=len, reverse=True)))
    counts = Counter()

    def put(match: re.Match) -> str:
        name = next(name for name in names if match[name])
        counts[names[name]] += 1
        word = word_like(match[name], match[f"{name}_ending"] or "", names[name], table[names[name]])
        if not match["article"]:
            return word
        article = article_for(word)
        return (article.capitalize() if match["article"][0] == "A" else article) + match["gap"] + word

    return pattern.sub(put, text), counts


@lru_cache(4096)
def mentions(values: tuple[str, ...]) -> tuple[dict[str, str], re.Pattern]:
    """Return {group name: value} and the pattern of a mention with the article before it."""
    names = {f"v{n}": value for n, value in enumerate(values)}
    return names, re.compile(r"(?:\b(?P<article>an?)(?P<gap>\s+))?(?<!\w)(?<!\d[.,])(?:"
                             + "|".join(mention(name, value) for name, value in names.items())
                             + r")(?!\w)(?![.,]\d)", re.IGNORECASE)


def count_forms(text: str, value: str) -> int:
    return replace_values(text, {value: value})[1][value]


def exchange(text: str, gold: str, target: str) -> tuple[str, Counter]:
    """Exchange gold and target wherever they are mentioned; count both."""
    text, counts = replace_values(text, {gold: target, target: gold})
    return text, Counter(gold=counts[gold], target=counts[target])


# ---- words of a caption
def stems(text: str) -> list[str]:
    """Return the words that can name a thing, lower-case and without a plural -s."""
    words = re.findall(r"[a-z]{3,}", re.sub(r"['’]s\b", "", text.lower()))
    singular = [re.sub(r"(?<=[^s])s$", "", word) for word in words]
    return [word for word in singular if word not in NOT_REFERENT]


def option_words(item: dict) -> set[str]:
    """Return every option's value and its words that carry meaning, lower-case."""
    texts = [strip_label(text).lower() for _, text in item["options"]]
    sides = [word for word in TABLES["side"] if any(count_forms(text, word) for text in texts)]
    return {*texts, *sides, *(word for text in texts for word in stems(text))} - {""}


def survivors(spans: Iterable[str], item: dict) -> Counter:
    """Count the mentions of each word of the options and each number."""
    text = "\n".join(spans)
    numbers = re.findall(rf"\d+(?:[.,]\d+)*|\b(?:{'|'.join(NUMBERS)})\b", text.lower())
    counts = Counter({word: count_forms(text, word) for word in option_words(item)})
    return +(counts + Counter(f"number {twin_number(number) if number.isalpha() else number}"
                              for number in numbers))


def reworded(span: str, item: dict) -> str:
    """Return a span with phrases of SYNONYMS replaced, or TEMPLATE around it without any."""
    if not span.strip():
        return span
    kept = option_words(item)
    table = {old: new for old, new in SYNONYMS.items()
             if not any(count_forms(f"{old} {new}", word) for word in kept)}
    after, counts = replace_values(span, table)
    if counts:
        return after
    body = span[0].lower() + span[1:] if FUNCTION_WORD.match(span) else span
    return TEMPLATE.format(body)


def others(spans: Iterable[str], item: dict, rng: random.Random) -> list[tuple[str, str]]:
    """Return shuffled (word, another of its class) for words in the spans but in neither options nor
    question. Numbers above twelve form classes by their number of digits."""
    text = "\n".join(spans)
    asked = "\n".join([item["question"], *(option for _, option in item["options"])])
    result = []
    for words in CLASSES:
        here, there = (replace_values(part, {word: word for word in words})[1] for part in (text, asked))
        free = [word for word in words if not here[word] and not there[word]]
        for word in (word for word in words if here[word] and not there[word]):
            if free:
                result.append((word, free.pop(rng.randrange(len(free)))))
    for number in sorted({number for number in NUMBER.findall(text)
                          if twin_number(number) not in NUMBERS[2:13]}):
        low = 10 ** (len(number) - 1) if len(number) > 1 else 0
        new = str(rng.randrange(low, 10 ** len(number)))
        if not (count_forms(asked, number) or count_forms(asked, new) or count_forms(text, new)):
            result.append((number, new))
    rng.shuffle(result)
    return result
