"""The words by which two options differ, and where in a text an edit may exchange them. No torch here.

`slots` finds them in the options themselves, or else in TABLES; `swap` exchanges them: a value anywhere, a
side only in clauses about the question, yes and no by turning round the statement that the question asks
about.

Find the imaginations in a reply, and rewrite them by rules so that they speak for another option.

The editor that stands in for an LLM's: every mention of the right option's value becomes a wrong option's. It
refuses what it cannot do cleanly, with a reason of NOT_EDITABLE. `verify_directed` holds this editor and an
LLM (utils.intervene.text_conditions) to the same rules. No torch here.
"""
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from utils.answers import LETTER, strip_label
from utils.intervene.word_forms import SOMETHING, TABLES, article_for, exchange, replace_values, stems
from utils.spans import CLOSE, OPEN, passages, put_spans

# any
NOT_EDITABLE = ("no_span", "unresolved", "no_slot_value", "letter_in_span", "gold_not_mentioned",
                "residual_gold",
                "marks_in_span", "span_count", "unchanged",  # of an edit that came from a model
                # of a rung of utils.intervene.text_conditions
                "no_irrelevant_word", "value_changed", "no_donor",
                # of an LLM that did not answer (utils.model_calls)
                "cut_off", "bad_json", "bad_schema", "backend_error")
# say nothing in another text
NO_SLOT = set("an the yes no true false is are not it in on at of to and or with".split())
YES, NO = ("yes", "true"), ("no", "false")
VERB = re.compile(r"\b(is|are|was|were|does|do|did|has|have|had)(\s+not?\b|n['’]t\b)?", re.IGNORECASE)
JOIN = r"\s+(?:and|but|while|whereas|which|where|because|so)\b"
CLAUSE = re.compile(rf"[.!?;:,\n]+(?:{JOIN})?|{JOIN}", re.IGNORECASE)
PRONOUN = re.compile(
    r"\W*(?:(?:and|but|while|whereas|where|because|so)\s+)?(?:it|its|he|she|his|her|they|their|which)\b",
                     re.IGNORECASE)


class NotEditable(ValueError):
    """An imagination that cannot be edited; the message is one of NOT_EDITABLE, `detail` says it in words."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class Slot(NamedTuple):
    """What an edit exchanges: `old` for `new`. `kind` is "value" (anywhere in the text), "side" (only in
    clauses that name one of `referents`, lower-case words of the question) or "polarity" (only in clauses
    that name them all)."""

    kind: str
    old: str
    new: str
    referents: frozenset[str] = frozenset()


# --------------------------------------------------------------------------------- from the options to a slot
def slots(item: dict, target: str) -> list[Slot]:
    """Return what could make option `target` of the right one, best first; NotEditable("no_slot_value") for
    nothing.

    First what the two options do not share, then the words of one table that they hold. Yes against no turns
    a statement round, and needs a question that says which.
    """
    options, gold = dict(item["options"]), item["answer"]["value"]
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


def slot_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words by which two options differ: what is left without label, common beginning and common
    end."""
    pair = [strip_label(text).split() for text in (gold, target)]
    same = [[word.strip(".,;:!?\"'").lower() for word in words] for words in pair]
    n = min(map(len, pair))
    first = next((i for i in range(n) if same[0][i] != same[1][i]), n)
    last = next((i for i in range(n - first) if same[0][-1 - i] != same[1][-1 - i]), n - first)
    values = [" ".join(words[first:len(words) - last]).strip(".,;:!?\"'") for words in pair]
    values = [re.sub(r"^(?:an?|the)\s+", "", value, flags=re.IGNORECASE) for value in values]
    if not all(values) or values[0].lower() == values[1].lower() or NO_SLOT & {value.lower()
                                                                               for value in values}:
        raise NotEditable("no_slot_value")
    return values[0], values[1]


def table_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words of the first of TABLES that has just one word in each option, and not the same in
    both."""
    for words in TABLES.values():
        pair = [set(replace_values(text, {word: word for word in words})[1]) for text in (gold, target)]
        if len(pair[0]) == len(pair[1]) == 1 and pair[0] != pair[1]:
            return pair[0].pop(), pair[1].pop()
    raise NotEditable("no_slot_value")


# ------------------------------------------------------------------------------------ a slot in a text
def clauses(text: str) -> list[tuple[str, set[str]]]:
    """Return the clauses of a text, which join to it again, each with the things it names (`stems`).

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
    """Exchange the sides of a slot where its kind allows, or put `filler` for the old one; count "gold" and
    "target"."""
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
    """Negate the first verb of a clause, or take its negation away; it counts as gold if it said what `gold`
    says."""
    match = VERB.search(clause)
    if not match:
        return clause, Counter()
    says, new, rest = ("no", "", clause[match.end():]) if match[2] else ("yes", " not", clause[match.end():])
    if (match[2] or "").strip().lower() == "no" and match[1].lower() in ("is", "was", "has"):
        new = f" {article_for(rest.strip())}"  # "there is no dog" -> "there is a dog"
    return clause[:match.end(1)] + new + rest, Counter(["gold" if says == gold else "target"])


# ------------------------------------------------------------ edits


STRUCTURE = (OPEN, CLOSE, "\\boxed")  # in a span they would end it, or answer


# ------------------------------------------------------------------------------------ the directed edit
def direct(text: str, spans: list[tuple[int, int]], item: dict, target: str) -> tuple[str, dict]:
    """Rewrite the imaginations in `text` so that they speak for option `target`; return the text and what was
    done."""
    before = passages(text, spans)
    slot = pick_slot(before, item, target)
    after = [swap(span, slot)[0] for span in before]
    edit = verify_directed(before, after, item, target)
    return put_spans(text, spans, after), {"editor": "rule", **edit}


def pick_slot(spans: list[str], item: dict, target: str) -> Slot:
    """Return the slot whose gold value the spans mention; NotEditable if none is, or if a span names an
    option's letter."""
    found = slots(item, target)
    if any(LETTER.search(span) for span in spans):
        raise NotEditable("letter_in_span", "a letter of an option stands in it")
    for slot in found:
        if count(spans, slot)["gold"]:
            return slot
    raise NotEditable("gold_not_mentioned", f"no mention of {found[0].old!r}")


def count(spans: list[str], slot: Slot) -> Counter:
    """Return how often the spans mention the sides of a slot, as "gold" and "target"."""
    return sum((swap(span, slot)[1] for span in spans), Counter())


def verify_directed(before: list[str], after: list[str], item: dict, target: str) -> dict:
    """Hold a directed edit, by rule or by an LLM, to its rules; return what it did as the fields of a record.

    `before` and `after` are the spans alone: put back with `put_spans`, nothing outside them can change.
    Required are a mention of gold; every mention of gold turned into one of the target, and no gold left but
    where target stood; no letter of an option, no mark and no box in a span. NotEditable otherwise. `n_other`
    counts words changed beside the values and their articles: 0 from the rules, more from an LLM that
    rewrote.
    """
    slot = pick_slot(before, item, target)
    if len(after) != len(before):
        raise NotEditable("span_count", f"{len(after)} passages came back, expected {len(before)}")
    if odd := next((mark for span in after for mark in STRUCTURE if mark in span), None):
        raise NotEditable("marks_in_span", f"{odd} stands in a passage; expected plain words")
    if any(LETTER.search(span) for span in after):
        raise NotEditable("letter_in_span", "a letter of an option stands in it")
    if after == before:
        raise NotEditable("unchanged", "nothing was changed")
    there, left = count(before, slot), count(after, slot)
    if left["gold"] > there["target"] or left["target"] < there["gold"]:
        raise NotEditable("residual_gold",
                          f"{slot.old!r} is mentioned {left['gold']} times where at most {there['target']} "
                          f"were expected, {slot.new!r} {left['target']} times where {there['gold']} were expected")
    return {"kind": slot.kind, "from": slot.old, "to": slot.new, "target": target,
            "n_replaced": there["gold"],
            "n_exchanged": there["target"], "residual_gold": 0, "word_distance": distance(before, after),
            "n_other": distance([mask(span, slot) for span in before], [mask(span, slot) for span in after]),
            "before": before, "after": after}


def mask(span: str, slot: Slot) -> str:
    """Return a span in which both sides of a slot read the same."""
    if slot.kind == "polarity":
        return VERB.sub(r"\1", span.lower())
    return replace_values(span.lower(), {slot.old: SOMETHING, slot.new: SOMETHING})[0]


def distance(before: Sequence[str], after: Sequence[str]) -> int:
    """Return the summed word distance of spans in pairs."""
    return sum(word_distance(one, other) for one, other in zip(before, after, strict=True))


def word_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance over words: the fewest insertions, deletions and replacements of words.
    """
    words = other.split()
    row = list(range(len(words) + 1))
    for i, word in enumerate(one.split(), 1):
        above, row = row, [i]
        for j, new in enumerate(words, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != new)))
    return row[-1]
