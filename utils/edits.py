"""Find the imaginations in a reply, and rewrite them by rules so that they speak for another option.

The editor that stands in for an LLM's: every mention of the right option's value becomes a wrong option's. It refuses what
it cannot do cleanly, with a reason of NOT_EDITABLE. No torch here.
"""
import re
from collections import Counter

OPEN, CLOSE = "<think_image>", "</think_image>"
SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
NOT_EDITABLE = ("no_span", "unresolved", "no_slot_value", "letter_in_span", "gold_not_mentioned", "residual_gold")
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y"
NO_SLOT = set("yes no true false is are not it in on at of to and or with".split())  # say nothing where they are replaced
LETTER = re.compile(r"(?i:\b(?:option|choice|answer)(?: is)?:?\s*)\(?[A-H]\b|\([A-H]\)")


class NotEditable(ValueError):
    """An imagination that the rules cannot edit; the message is one of NOT_EDITABLE."""


def find_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) in characters of what stands between the marks of every imagination before the first box."""
    boxed = text.find("\\boxed")
    return [match.span(1) for match in SPAN.finditer(text, 0, len(text) if boxed < 0 else boxed)]


def conclusion(text: str) -> str:
    """Return what follows the last imagination: the whole text if there is none."""
    spans = find_spans(text)
    return text[spans[-1][1] + len(CLOSE):] if spans else text


def slot_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words by which two options differ: what is left without label, common beginning and common end."""
    pair = [re.sub(r"^\(?[A-H][).:]\s+", "", text).split() for text in (gold, target)]
    same = [[word.strip(".,;:!?\"'").lower() for word in words] for words in pair]
    n = min(map(len, pair))
    first = next((i for i in range(n) if same[0][i] != same[1][i]), n)
    last = next((i for i in range(n - first) if same[0][-1 - i] != same[1][-1 - i]), n - first)
    values = [" ".join(words[first:len(words) - last]).strip(".,;:!?\"'") for words in pair]
    values = [re.sub(r"^(?:an?|the)\s+", "", value, flags=re.IGNORECASE) for value in values]
    if not all(values) or values[0].lower() == values[1].lower() or NO_SLOT & {value.lower() for value in values}:
        raise NotEditable("no_slot_value")
    return values[0], values[1]


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


def exchange(text: str, gold: str, target: str) -> tuple[str, Counter]:
    """Put target for every mention of gold, and gold for target where that occurs; count the mentions found of each."""
    sides = sorted((("gold", gold), ("target", target)), key=lambda side: -len(side[1]))  # the longer value first
    pattern = (r"(?:\b(?P<article>[Aa]n?)(?P<gap>\s+))?(?<!\w)(?<!\d[.,])(?:"
               + "|".join(mention(*side) for side in sides) + r")(?!\w)(?![.,]\d)")
    found = Counter()

    def put(match: re.Match) -> str:
        side, old, new = ("gold", gold, target) if match["gold"] else ("target", target, gold)
        found[side] += 1
        word = word_like(match[side], match[f"{side}_ending"] or "", old, new)
        if not match["article"]:
            return word
        article = article_for(word)
        return (article.capitalize() if match["article"][0] == "A" else article) + match["gap"] + word

    return re.sub(pattern, put, text, flags=re.IGNORECASE), found


def direct(text: str, spans: list[tuple[int, int]], item: dict, target: str) -> tuple[str, dict]:
    """Rewrite the imaginations in `text` so that they speak for option `target`; return the text and what was done."""
    options, gold = dict(map(tuple, item["options"])), item["answer"]["value"]
    old, new = slot_values(options[gold], options[target])
    before = [text[start:end] for start, end in spans]
    if any(LETTER.search(span) for span in before):
        raise NotEditable("letter_in_span")
    after, found = zip(*(exchange(span, old, new) for span in before))
    n_gold, n_target = (sum(counts[side] for counts in found) for side in ("gold", "target"))
    if not n_gold:
        raise NotEditable("gold_not_mentioned")
    left = [exchange(span, old, new)[1] for span in after]
    if sum(counts["gold"] for counts in left) != n_target or sum(counts["target"] for counts in left) != n_gold:
        raise NotEditable("residual_gold")  # what is left of gold is not just what was exchanged
    return put_spans(text, spans, after), {
        "editor": "rule", "from": old, "to": new, "target": target, "n_replaced": n_gold, "n_exchanged": n_target,
        "before": before, "after": list(after)}


def put_spans(text: str, spans: list[tuple[int, int]], after: list[str]) -> str:
    """Return `text` with the spans replaced, last first so that offsets hold; nothing outside them changes."""
    for (start, end), span in zip(reversed(spans), reversed(after)):
        text = text[:start] + span + text[end:]
    return text
