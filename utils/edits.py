"""Find the imaginations in a reply, and rewrite them by rules so that they speak for another option.

The editor that stands in for an LLM's: every mention of the right option's value becomes a wrong option's. It refuses what
it cannot do cleanly, with a reason of NOT_EDITABLE. `verify_directed` holds this editor and an LLM (utils.editor_llm) to the
same rules. No torch here.
"""
import re
from collections import Counter
from collections.abc import Sequence

from utils.slots import VERB, NotEditable, Slot, slots, swap
from utils.values import SOMETHING, replace_values

OPEN, CLOSE = "<think_image>", "</think_image>"
SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
LETTER = re.compile(r"(?i:\b(?:option|choice|answer)(?: is)?:?\s*)\(?[A-H]\b|\([A-H]\)")
STRUCTURE = (OPEN, CLOSE, "\\boxed")  # in a span they would end it, or answer

# Cues for replies without marks, written after reading V* replies of Monet-7B. Perception: words for looking, or for what
# is seen. Conclusion: words that lead to the answer, with what belongs before them.
PERCEPTION = re.compile(
    r"\b(?:zoom|appear|observ|focus|locat|examin|inspect|identif|imagin)\w*|\b(?:look|show|see)(?:s|n|ed|ing)?\b|\bvisible\b"
    r"|\bclos(?:e|er|est) (?:inspection|view)\b|\bin (?:the|this) (?:image|picture|photo|view|scene)\b", re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence)\b|\bso,? (?:the|my) (?:(?:correct|final|right|best) )?answer\b"
    r"|\b(?:the |my )?(?:correct|final|right|best|closest) (?:answer|option|choice)\b|\b(?:the|my) answer is\b|\banswer:"
    r"|\\boxed|<answer>",
    re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


# ------------------------------------------------------------------------------------ spans
def find_spans(text: str, by: str = "marks") -> list[tuple[int, int]]:
    """Return (start, end) in characters of every imagination in a reply.

    by="marks": what stands between the marks of every imagination before the first box. by="cues", for replies without
    marks: one span at most, the sentences from the first cue of PERCEPTION to the first of CONCLUSION.
    """
    if by == "cues":
        return cue_spans(text)
    if by != "marks":
        raise ValueError(f"find_spans by {by!r}, expected 'marks' or 'cues'")
    boxed = text.find("\\boxed")
    return [match.span(1) for match in SPAN.finditer(text, 0, len(text) if boxed < 0 else boxed)]


def cue_spans(text: str) -> list[tuple[int, int]]:
    """Return the span from the sentence with the first perceptual cue up to the first conclusion cue, or none."""
    last = CONCLUSION.search(text)
    end = len(text[:last.start() if last else None].rstrip())
    first = PERCEPTION.search(text, 0, end)
    if not first:
        return []
    starts = [match.end() for match in SENTENCE_END.finditer(text, 0, first.start())]
    return [(starts[-1] if starts else 0, end)]


def after_marks(text: str, end: int) -> int:
    """Return where a span with its closing mark ends, if it has one."""
    return end + len(CLOSE) if text.startswith(CLOSE, end) else end


def conclusion(text: str, by: str = "marks") -> str:
    """Return what follows the last imagination: the whole text if there is none."""
    spans = find_spans(text, by)
    return text[after_marks(text, spans[-1][1]):] if spans else text


def passages(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return what the spans hold."""
    return [text[start:end] for start, end in spans]


def put_spans(text: str, spans: list[tuple[int, int]], after: Sequence[str]) -> str:
    """Return `text` with the spans replaced, last first so that offsets hold; nothing outside them changes."""
    for (start, end), span in zip(reversed(spans), reversed(after), strict=True):
        text = text[:start] + span + text[end:]
    return text


# ------------------------------------------------------------------------------------ the directed edit
def direct(text: str, spans: list[tuple[int, int]], item: dict, target: str) -> tuple[str, dict]:
    """Rewrite the imaginations in `text` so that they speak for option `target`; return the text and what was done."""
    before = passages(text, spans)
    slot = pick_slot(before, item, target)
    after = [swap(span, slot)[0] for span in before]
    edit = verify_directed(before, after, item, target)
    return put_spans(text, spans, after), {"editor": "rule", **edit}


def pick_slot(spans: list[str], item: dict, target: str) -> Slot:
    """Return the slot whose gold value the spans mention; NotEditable if none is, or if a span names an option's letter."""
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

    `before` and `after` are the spans alone: put back with `put_spans`, nothing outside them can change. Required are a
    mention of gold; every mention of gold turned into one of the target, and no gold left but where target stood; no letter
    of an option, no mark and no box in a span. NotEditable otherwise. `n_other` counts words changed beside the values and
    their articles: 0 from the rules, more from an LLM that rewrote.
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
        raise NotEditable("residual_gold", f"{slot.old!r} is mentioned {left['gold']} times where at most {there['target']} "
                          f"were expected, {slot.new!r} {left['target']} times where {there['gold']} were expected")
    return {"kind": slot.kind, "from": slot.old, "to": slot.new, "target": target, "n_replaced": there["gold"],
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
    """Return the Levenshtein distance over words: the fewest insertions, deletions and replacements of words."""
    words = other.split()
    row = list(range(len(words) + 1))
    for i, word in enumerate(one.split(), 1):
        above, row = row, [i]
        for j, new in enumerate(words, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != new)))
    return row[-1]
