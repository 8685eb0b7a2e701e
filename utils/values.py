"""The words by which two options differ, and the forms that they take in a text. No torch here.

`slot` says what an edit has to exchange; it is found in the options themselves, or else in the tables below. `find`,
`exchange` and `mention` know plurals, articles, "-ish", digits and number words, and capitals.
"""
import re
from collections import Counter
from typing import NamedTuple

NOT_EDITABLE = ("no_span", "unresolved", "no_slot_value", "letter_in_span", "gold_not_mentioned", "residual_gold",  # any
                "marks_in_span", "span_count", "unchanged",  # of an edit that came from a model
                "no_irrelevant_word", "value_changed", "no_donor",  # of a rung of utils.ladder
                "cut_off", "bad_json", "bad_schema", "backend_error")  # of an LLM that did not answer (utils.calls)
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y"
NO_SLOT = set("yes no true false is are not it in on at of to and or with".split())  # say nothing where they are replaced

# Tables for options that share no wording: where each option holds just one word of a table, these two are the slot.
TABLES = {
    "color": "red orange yellow green blue purple pink brown black white gray grey silver gold golden beige".split(),
    "material": ("wood wooden metal plastic glass rubber leather cotton wool paper stone brick concrete ceramic steel fabric "
                 "kevlar").split(),
    "side": ["left", "right", "above", "below", "top", "bottom", "behind", "in front of", "inside", "outside", "over", "under"],
    "number": [*NUMBERS, *map(str, range(100))]}
SOMETHING = "something"  # stands for a removed value; it takes no ending
YES, NO = ("yes", "true"), ("no", "false")
VERB = re.compile(r"\b(is|are|was|were|does|do|did|has|have|had|can|will)(\s+not\b|n't\b)?", re.IGNORECASE)
CLAUSE = re.compile(r"[.!?;:,\n]+|\s(?:and|but|while|whereas|which|where|because|so)\b", re.IGNORECASE)
PRONOUN = re.compile(r"\W*(?:it|its|he|she|his|her|they|their)\b", re.IGNORECASE)
NOT_REFERENT = set("""what which where who whose how many much kind type side sides relative position image picture photo
    color colour material shape number there does have has the and are was were can you see from with that this any not
    one left right above below top bottom behind front inside outside over under near next""".split())


class NotEditable(ValueError):
    """An imagination that cannot be edited; the message is one of NOT_EDITABLE, `detail` says it in words."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class Slot(NamedTuple):
    """What an edit exchanges: `old` for `new`. `kind` is "value" (anywhere in the text), "side" (only in clauses that
    name one of `referents`, lower-case words of the question) or "polarity" (only in clauses that name them all)."""

    kind: str
    old: str
    new: str
    referents: frozenset[str] = frozenset()


# ------------------------------------------------------------------------------------ from the options to a slot
def slots(item: dict, target: str) -> list[Slot]:
    """Return what could make option `target` of the right one, best first; NotEditable("no_slot_value") for nothing.

    First what the two options do not share, then the words of one table that they hold. Yes against no turns a statement
    round, and needs a question that says which.
    """
    options, gold = dict(map(tuple, item["options"])), item["answer"]["value"]
    referents = frozenset(stems(item.get("question", "")))
    answers = [re.sub(r"\W", "", strip_label(options[letter])).lower() for letter in (gold, target)]
    if referents and (answers[0] in YES and answers[1] in NO or answers[0] in NO and answers[1] in YES):
        return [Slot("polarity", *("yes" if answer in YES else "no" for answer in answers), referents)]
    found = []
    for find_pair in (slot_values, table_values):
        try:
            pair = find_pair(options[gold], options[target])
        except NotEditable:
            continue
        side = any(value.lower() in TABLES["side"] for value in pair)
        new = Slot("side", *pair, referents.difference(*map(stems, pair))) if side else Slot("value", *pair)
        if new not in found:
            found.append(new)
    if not found:
        raise NotEditable("no_slot_value", f"options {options[gold]!r} and {options[target]!r}")
    return found


def strip_label(option: str) -> str:
    return re.sub(r"^\(?[A-H][).:]\s+", "", option)


def stems(text: str) -> list[str]:
    """Return the words of a text that can name a thing, lower-case and without a plural -s."""
    words = [re.sub(r"(?<=[^s])s$", "", word) for word in re.findall(r"[a-z]{3,}", re.sub(r"['’]s\b", "", text.lower()))]
    return [word for word in words if word not in NOT_REFERENT]


def slot_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words by which two options differ: what is left without label, common beginning and common end."""
    pair = [strip_label(text).split() for text in (gold, target)]
    same = [[word.strip(".,;:!?\"'").lower() for word in words] for words in pair]
    n = min(map(len, pair))
    first = next((i for i in range(n) if same[0][i] != same[1][i]), n)
    last = next((i for i in range(n - first) if same[0][-1 - i] != same[1][-1 - i]), n - first)
    values = [" ".join(words[first:len(words) - last]).strip(".,;:!?\"'") for words in pair]
    values = [re.sub(r"^(?:an?|the)\s+", "", value, flags=re.IGNORECASE) for value in values]
    if not all(values) or values[0].lower() == values[1].lower() or NO_SLOT & {value.lower() for value in values}:
        raise NotEditable("no_slot_value")
    return values[0], values[1]


def table_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words of the first of TABLES that has just one word in each option, and not the same in both."""
    for words in TABLES.values():
        pair = [set(replace_values(text, {word: word for word in words})[1]) for text in (gold, target)]
        if len(pair[0]) == len(pair[1]) == 1 and pair[0] != pair[1]:
            return pair[0].pop(), pair[1].pop()
    raise NotEditable("no_slot_value")


# ------------------------------------------------------------------------------------ forms of a value in a text
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
    names = {f"v{n}": old for n, old in enumerate(sorted(table, key=len, reverse=True))}
    if not names:
        return text, Counter()
    pattern = (r"(?:\b(?P<article>[Aa]n?)(?P<gap>\s+))?(?<!\w)(?<!\d[.,])(?:"
               + "|".join(mention(name, old) for name, old in names.items()) + r")(?!\w)(?![.,]\d)")
    found = Counter()

    def put(match: re.Match) -> str:
        name = next(name for name in names if match[name])
        found[names[name]] += 1
        word = word_like(match[name], match[f"{name}_ending"] or "", names[name], table[names[name]])
        if not match["article"]:
            return word
        article = article_for(word)
        return (article.capitalize() if match["article"][0] == "A" else article) + match["gap"] + word

    return re.sub(pattern, put, text, flags=re.IGNORECASE), found


def find(text: str, value: str) -> int:
    """Return how often a text mentions a value, in any form."""
    return replace_values(text, {value: value})[1][value]


def exchange(text: str, gold: str, target: str) -> tuple[str, Counter]:
    """Put target for every mention of gold, and gold for target where that occurs; count the mentions found of each."""
    text, found = replace_values(text, {gold: target, target: gold})
    return text, Counter(gold=found[gold], target=found[target])


# ------------------------------------------------------------------------------------ a slot in a text
def clauses(text: str) -> list[tuple[str, set[str]]]:
    """Return the clauses of a text, which join to it again, each with the things it names (utils.values.stems).

    A clause that begins with a pronoun also names what the clause before it names.
    """
    cuts = [0, *(match.start() for match in CLAUSE.finditer(text)), len(text)]
    parts, named = [], set()
    for start, end in zip(cuts, cuts[1:]):
        part = text[start:end]
        named = set(stems(part)) | (named if PRONOUN.match(part) else set())
        parts.append((part, named))
    return parts


def swap(text: str, slot: Slot, filler: str | None = None) -> tuple[str, Counter]:
    """Exchange the sides of a slot where its kind allows, or put `filler` for the old one; count "gold" and "target"."""
    def put(part: str) -> tuple[str, Counter]:
        if slot.kind == "polarity":
            return turn_round(part, slot.old)
        if filler is None:
            return exchange(part, slot.old, slot.new)
        part, found = replace_values(part, {slot.old: filler})
        return part, Counter(gold=found[slot.old])

    if slot.kind == "value" or not slot.referents:
        return put(text)
    parts, total = [], Counter()
    for part, named in clauses(text):
        if slot.referents <= named or slot.kind == "side" and slot.referents & named:
            part, found = put(part)
            total += found
        parts.append(part)
    return "".join(parts), total


def turn_round(clause: str, gold: str) -> tuple[str, Counter]:
    """Negate the first verb of a clause, or take its negation away; it counts as gold if it said what `gold` says."""
    match = VERB.search(clause)
    if not match:
        return clause, Counter()
    says = "no" if match[2] else "yes"
    return (clause[:match.end(1)] + ("" if match[2] else " not") + clause[match.end():],
            Counter(["gold" if says == gold else "target"]))
