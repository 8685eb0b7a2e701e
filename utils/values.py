"""The forms that a value takes in a text: plurals, articles, "-ish", digits and number words, capitals. No torch here."""
import re
from collections import Counter
from functools import lru_cache

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y"
SOMETHING = "something"  # stands for a removed value; it takes no ending


def mention(name: str, value: str) -> str:
    """Return a pattern of a value's mentions: any spacing, plural, a colour with -ish, a number as digits or as a word."""
    pattern = r"[\s-]+".join(re.escape(word) for word in re.split(r"[\s-]+", value))
    twin = twin_number(value)
    ending = r"e?s" if value[-1].isalpha() and len(value) > 1 and not twin else r"(?!)"
    if re.fullmatch(COLORS, value, re.IGNORECASE):
        ending += r"|[a-z]?ish"
    return f"(?P<{name}>{pattern}{'|' + twin if twin else ''})(?P<{name}_ending>{ending})?"


def twin_number(value: str) -> str | None:
    """Return the word of digits or the digits of a word, up to twenty; None for anything else."""
    if value.isascii() and value.isdigit() and int(value) < len(NUMBERS):
        return NUMBERS[int(value)]
    return str(NUMBERS.index(value.lower())) if value.lower() in NUMBERS else None


def word_like(found: str, ending: str, old: str, new: str) -> str:
    """Return `new` in the form in which `old` was found: digits or word, ending, capitals."""
    if new == SOMETHING:
        ending = ""
    if twin_number(new) and found.isdigit() != new.isdigit():
        new = twin_number(new)
    if ending.endswith("ish"):
        new += "ish"
    elif ending:
        new += "es" if re.search(r"(?:s|x|z|ch|sh)$", new) else "s"
    if found == old:
        return new
    if found.isupper() and len(found) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if found[0].isupper() else new.lower()


def article_for(word: str) -> str:
    """Return "a" or "an", by sound as far as a few prefixes tell it."""
    if re.match(r"(?:one|once|uni|use|eu)|(?:hour|honest)", word, re.IGNORECASE):
        return "an" if word[0] in "hH" else "a"
    return "an" if re.match(r"[aeiou]|8|1[18](?!\d)", word, re.IGNORECASE) else "a"


def replace_values(text: str, table: dict[str, str]) -> tuple[str, Counter]:
    """Put each value's replacement (old -> new) for every mention, in one pass; return the text and the mentions found.

    A longer value goes before one that it contains. An article before a mention is made to agree.
    """
    if not table:
        return text, Counter()
    names, pattern = mentions(tuple(sorted(table, key=len, reverse=True)))
    found = Counter()

    def put(match: re.Match) -> str:
        name = next(name for name in names if match[name])
        found[names[name]] += 1
        word = word_like(match[name], match[f"{name}_ending"] or "", names[name], table[names[name]])
        if not match["article"]:
            return word
        article = article_for(word)
        return (article.capitalize() if match["article"][0] == "A" else article) + match["gap"] + word

    return pattern.sub(put, text), found


@lru_cache(4096)
def mentions(values: tuple[str, ...]) -> tuple[dict[str, str], re.Pattern]:
    """Return the names of the groups (name -> value) and the pattern of any mention, with an article before it."""
    names = {f"v{n}": value for n, value in enumerate(values)}
    return names, re.compile(r"(?:\b(?P<article>an?)(?P<gap>\s+))?(?<!\w)(?<!\d[.,])(?:"
                             + "|".join(mention(name, value) for name, value in names.items())
                             + r")(?!\w)(?![.,]\d)", re.IGNORECASE)


def find(text: str, value: str) -> int:
    """Return how often a text mentions a value, in any form."""
    return replace_values(text, {value: value})[1][value]


def exchange(text: str, gold: str, target: str) -> tuple[str, Counter]:
    """Put target for every mention of gold, and gold for target where that occurs; count the mentions found of each."""
    text, found = replace_values(text, {gold: target, target: gold})
    return text, Counter(gold=found[gold], target=found[target])
