"""The ladder of text interventions: from a reply left as it is to one whose imaginations speak for another option.

    condition      each imagination becomes                                       what it isolates
    sham           itself                                                         tokens made anew, a forced beginning
    paraphrase     other words; all values of options and numbers kept            the surface
    irrelevant     another word of its class for what is no option, about as      any disturbance of that size
                   many words as the directed edit changes
    removal        nothing between its marks                                      whether its content is needed
    something      "something" for the right option's value
    filler         as many "..." as it has words
    no_span        nothing, the marks gone too
    bare           one <think_image>, the placeholder of training
    constant       one fixed passage, the same for all samples                    the paper's latent arm, in text
    foreign        those of another sample of the batch                           a mismatch of the usual kind
    directed       the right option's value exchanged for a wrong one's           whether the answer follows the content
    truncate_N     the first N % of its words                                     when the answer is settled

One function a condition, f(text, spans, item, context) -> (new text, edit). `text` is the reply up to its last imagination
(`until_last_span`), `spans` what utils.edits.find_spans found there, `item` a multiple-choice item. The edit is a dict with
"editor", "target", "before" and "after" (lists of spans), "word_distance" (Levenshtein, over words) and, where one thing
stands for another, "from" and "to". NotEditable, with a reason of NOT_EDITABLE, says why a sample has no such edit.
A truncation may leave a short imagination whole, so that a curve over N keeps all its samples. No torch here.
"""
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from utils.edits import OPEN, after_marks, count, direct, distance, passages, pick_slot, put_spans
from utils.lexicon import others, reworded, survivors
from utils.slots import NotEditable, swap
from utils.values import SOMETHING, replace_values

CONSTANT = "A closer view of the part of the image that matters."  # names no attribute and no place
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Context:
    """What a condition needs beside the sample: the letter of a wrong option, the imaginations of the donor or
    None, and the seed of what is drawn."""

    target: str
    donor: Sequence[str] | None = None
    seed: int = 0


def until_last_span(text: str, spans: Spans) -> str:
    """Return a reply up to and including its last imagination and its mark: what is edited, and then continued."""
    return text[:after_marks(text, spans[-1][1])]


def done(text: str, spans: Spans, after: list[str], context: Context, **more) -> tuple[str, dict]:
    """Return the text with its spans replaced, and the edit; NotEditable("unchanged") if it is no edit."""
    before = passages(text, spans)
    if after == before:
        raise NotEditable("unchanged", "the edit changes nothing")
    return put_spans(text, spans, after), describe(before, after, context, **more)


def describe(before: list[str], after: list[str], context: Context, **more) -> dict:
    return {"editor": "rule", "target": context.target, **more, "word_distance": distance(before, after),
            "before": before, "after": after}


# ------------------------------------------------------------------------------------ one function a condition
def sham(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    before = passages(text, spans)
    return text, describe(before, before, context)


def paraphrase(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Say the same in other words; NotEditable("value_changed") if a value of an option or a number did not survive."""
    before = passages(text, spans)
    after = [reworded(span, item) for span in before]
    if survivors(before, item) != survivors(after, item):
        raise NotEditable("value_changed", "an option's value or a number did not survive")
    return done(text, spans, after, context)


def irrelevant(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Replace words that are no option's and not the question's, until as many words differ as after `direct`.

    Where `direct` finds nothing to edit there is no size to match: its reason stands here too. Words may run out before the
    size is reached, and an article may exceed it by one: "directed_distance" tells the size aimed at.
    """
    aim = direct(text, spans, item, context.target)[1]["word_distance"]
    before = passages(text, spans)
    table, after = {}, before
    for old, new in others(before, item, random.Random(f"{context.seed}/irrelevant/{item['id']}")):
        table[old] = new
        after = [replace_values(span, table)[0] for span in before]
        if distance(before, after) >= aim:
            break
    if not table:
        raise NotEditable("no_irrelevant_word", "no word of utils.lexicon.CLASSES that options and question leave free")
    kept = survivors(before, item), survivors(after, item)
    if any(kept[0][word] != kept[1][word] for word in (kept[0] | kept[1]) if not word.startswith("number ")):
        raise NotEditable("value_changed", "an option's value did not survive")
    return done(text, spans, after, context, **{"from": list(table), "to": list(table.values()), "directed_distance": aim})


def removal(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return done(text, spans, [""] * len(spans), context)


def something(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Put "something" for the right option's value; a yes or no has no value to remove."""
    before = passages(text, spans)
    slot = pick_slot(before, item, context.target)
    if slot.kind == "polarity":
        raise NotEditable("no_slot_value", "yes and no have no value that could be removed")
    after = [swap(span, slot, SOMETHING)[0] for span in before]
    if count(after, slot)["gold"]:
        raise NotEditable("residual_gold", f"{slot.old!r} is still mentioned")
    return done(text, spans, after, context, **{"from": slot.old, "to": SOMETHING,
                                                "n_replaced": count(before, slot)["gold"]})


def filler(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return done(text, spans, [" ".join(["..."] * len(span.split())) for span in passages(text, spans)], context)


def no_span(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Delete the imaginations with their marks and the space before them."""
    return around(text, spans, ""), describe(passages(text, spans), [""] * len(spans), context)


def bare(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Put the mark alone for each imagination with its marks, as in training with --imagination placeholder."""
    return around(text, spans, OPEN), describe(passages(text, spans), [""] * len(spans), context)


def around(text: str, spans: Spans, new: str) -> str:
    """Return the text with `new` for each span and its marks; nothing new takes the space before it away as well."""
    for start, end in reversed(spans):
        head = text[:start].removesuffix(OPEN)
        text = (head if new else head.rstrip()) + new + text[after_marks(text, end):]
    return text


def constant(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return done(text, spans, [CONSTANT] * len(spans), context)


def foreign(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Put the donor's imaginations, first for first; a donor with fewer is no donor."""
    if context.donor is None or len(context.donor) < len(spans):
        raise NotEditable("no_donor", f"{len(context.donor or ())} imaginations to take, expected {len(spans)}")
    return done(text, spans, list(context.donor[:len(spans)]), context)


def directed(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return direct(text, spans, item, context.target)


def truncate(text: str, spans: Spans, item: dict, context: Context, percent: int) -> tuple[str, dict]:
    """Keep the first `percent` of the words of all imaginations together, rounded half up; later ones are emptied."""
    before = passages(text, spans)
    left, after = (percent * sum(len(span.split()) for span in before) + 50) // 100, []
    for span in before:
        ends = [0, *(match.end() for match in re.finditer(r"\S+", span))]
        keep = min(left, len(ends) - 1)
        after.append(span if keep == len(ends) - 1 else span[:ends[keep]])
        left -= keep
    return put_spans(text, spans, after), describe(before, after, context, percent=percent)


LADDER: dict[str, Callable] = {
    "sham": sham, "paraphrase": paraphrase, "irrelevant": irrelevant, "removal": removal, "something": something,
    "filler": filler, "no_span": no_span, "bare": bare, "constant": constant, "foreign": foreign, "directed": directed,
    **{f"truncate_{percent}": partial(truncate, percent=percent) for percent in (0, 25, 50, 75)}}
