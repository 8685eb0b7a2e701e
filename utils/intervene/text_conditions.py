"""The ladder of text interventions: from a reply left as it is to one whose imaginations speak for another
option.

    condition      each imagination becomes                                       what it isolates
    sham           itself                                                         tokens made anew, a forced
    beginning
    paraphrase     other words; all values of options and numbers kept            the surface
    irrelevant     another word of its class for what is no option, about as      any disturbance of that size
                   many words as the directed edit changes
    removal        nothing between its marks                                      whether its content is
    needed
    something      "something" for the right option's value
    filler         as many "..." as it has words
    no_span        nothing, the marks gone too
    bare           one <think_image>, the placeholder of training
    constant       one fixed passage, the same for all samples                    the paper's latent arm, in
    text
    foreign        those of another sample of the batch                           a mismatch of the usual kind
    directed       the right option's value exchanged for a wrong one's           whether the answer follows
    the content
    truncate_N     the first N % of its words                                     when the answer is settled

One function a condition, f(text, spans, item, context) -> (new text, edit). `text` is the reply up to its
last imagination (`until_last_span`), `spans` what utils.spans.find_spans found there, `item` a
multiple-choice item. The edit is a dict with "editor", "target", "before" and "after" (lists of spans),
"word_distance" (Levenshtein, over words) and, where one thing stands for another, "from" and "to".
NotEditable, with a reason of NOT_EDITABLE, says why a sample has no such edit. A truncation may leave a short
imagination whole, so that a curve over N keeps all its samples. No torch here.

The directed edit by an LLM: what `utils.intervene.text_edits.direct` does by rules, asked of a model and held
to the same verifier.

Any backend of utils.backends or utils.openai_backend serves; decode at temperature 0 (LocalBackend is greedy,
HttpBackend's default is 0). The replies are in a journal, so that a second run makes no call. A failure is a
NotEditable with a reason of NOT_EDITABLE, and never an edit by rules in its place: compare the two editors on
what both could edit. No torch here.
"""
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from utils.backends import object_schema
from utils.intervene.text_edits import NotEditable, count, direct, distance, pick_slot, swap, verify_directed
from utils.intervene.word_forms import SOMETHING, others, replace_values, reworded, survivors
from utils.journal import Journal
from utils.jsonl import call_key
from utils.model_calls import Call, Caller, ask, fill
from utils.spans import OPEN, after_marks, passages, put_spans

CONSTANT = "A closer view of the part of the image that matters."  # names no attribute and no place
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Context:
    """What a condition needs beside the sample: the letter of a wrong option, the imaginations of the donor
    or None, and the seed of what is drawn."""

    target: str
    donor: Sequence[str] | None = None
    seed: int = 0


def until_last_span(text: str, spans: Spans) -> str:
    """Return a reply up to and including its last imagination and its mark: what is edited, and then
    continued."""
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


# ----------------------------------------------------------------------------------- one function a condition
def sham(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    before = passages(text, spans)
    return text, describe(before, before, context)


def paraphrase(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Say the same in other words; NotEditable("value_changed") if a value of an option or a number did not
    survive."""
    before = passages(text, spans)
    after = [reworded(span, item) for span in before]
    if survivors(before, item) != survivors(after, item):
        raise NotEditable("value_changed", "an option's value or a number did not survive")
    return done(text, spans, after, context)


def irrelevant(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Replace words that are no option's and not the question's, until as many words differ as after
    `direct`.

    Where `direct` finds nothing to edit there is no size to match: its reason stands here too. Words may run
    out before the size is reached, and an article may exceed it by one: "directed_distance" tells the size
    aimed at.
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
        raise NotEditable("no_irrelevant_word",
                          "no word of utils.intervene.word_forms.CLASSES that options and question leave free")
    kept = survivors(before, item), survivors(after, item)
    if any(kept[0][word] != kept[1][word] for word in (kept[0] | kept[1]) if not word.startswith("number ")):
        raise NotEditable("value_changed", "an option's value did not survive")
    return done(text, spans, after, context, **{"from": list(table), "to": list(table.values()),
                                                "directed_distance": aim})


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
    return done(text, spans, [" ".join(["..."] * len(span.split())) for span in passages(text, spans)],
                context)


def no_span(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Delete the imaginations with their marks and the space before them."""
    return around(text, spans, ""), describe(passages(text, spans), [""] * len(spans), context)


def bare(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Put the mark alone for each imagination with its marks, as in training with --imagination placeholder.
    """
    return around(text, spans, OPEN), describe(passages(text, spans), [""] * len(spans), context)


def around(text: str, spans: Spans, new: str) -> str:
    """Return the text with `new` for each span and its marks; nothing new takes the space before it away as
    well."""
    for start, end in reversed(spans):
        head = text[:start].removesuffix(OPEN)
        text = (head if new else head.rstrip()) + new + text[after_marks(text, end):]
    return text


def constant(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return done(text, spans, [CONSTANT] * len(spans), context)


def foreign(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    """Put the donor's imaginations, first for first; a donor with fewer is no donor."""
    if context.donor is None or len(context.donor) < len(spans):
        raise NotEditable("no_donor",
                          f"{len(context.donor or ())} imaginations to take, expected {len(spans)}")
    return done(text, spans, list(context.donor[:len(spans)]), context)


def directed(text: str, spans: Spans, item: dict, context: Context) -> tuple[str, dict]:
    return direct(text, spans, item, context.target)


def truncate(text: str, spans: Spans, item: dict, context: Context, percent: int) -> tuple[str, dict]:
    """Keep the first `percent` of the words of all imaginations together, rounded half up; later ones are
    emptied."""
    before = passages(text, spans)
    left, after = (percent * sum(len(span.split()) for span in before) + 50) // 100, []
    for span in before:
        ends = [0, *(match.end() for match in re.finditer(r"\S+", span))]
        keep = min(left, len(ends) - 1)
        after.append(span if keep == len(ends) - 1 else span[:ends[keep]])
        left -= keep
    return put_spans(text, spans, after), describe(before, after, context, percent=percent)


LADDER: dict[str, Callable] = {
    "sham": sham, "paraphrase": paraphrase, "irrelevant": irrelevant, "removal": removal,
    "something": something,
    "filler": filler, "no_span": no_span, "bare": bare, "constant": constant, "foreign": foreign,
    "directed": directed,
    **{f"truncate_{percent}": partial(truncate, percent=percent) for percent in (0, 25, 50, 75)}}


# ------------------------------------------------------------ editor_llm


PROMPTS = {
    "SYSTEM": "You make small, exact edits to descriptions of images. You reply with one JSON object and nothing else.",
    "EDIT": """Someone was asked a question about an image and described what they saw in the passages below. Edit the \
passages so that they describe an image for which another answer is right.

Question: {question}
From: {old}
To: {new}
Passages: {passages}

Rules:
- Turn every statement that supports "{old}" into one that supports "{new}", in all its forms (plural, digits or words).
- Where "{new}" stands already, put "{old}" there: the two change places.
- Change nothing else but what grammar asks for. Keep the length, the style and the order.
- Name no letter of an option, give no final answer, and add no remark about the edit.
- Return as many passages as you were given, in their order, an untouched one as it is.

Reply with {"edited": [passages], "changed_phrases": [each phrase as it reads now]}.""",
    "RETRY": "An earlier reply could not be used: {fault}. Reply again with the whole JSON object."}
VERSION = call_key(**PROMPTS)[:16]  # what the records name the prompts by
MAX_NEW_TOKENS = 1024
RETRIES = 3  # after the first reply, each told what was wrong with the one before
SCHEMA = object_schema(edited={"type": "array", "items": {"type": "string"}},
                       changed_phrases={"type": "array", "items": {"type": "string"}})
Sample = tuple[str, list[tuple[int, int]], dict, str]  # text, spans, item, letter of a wrong option


def make_caller(backend: object, journal: Journal) -> Caller:
    """Return what `direct_all` asks through: prompts and model are in every key, so that a journal answers
    only for them."""
    return Caller(journal, None, backend, {"editor": VERSION, **backend.identity}, PROMPTS, MAX_NEW_TOKENS,
                  guarded=False)


def direct_all(caller: Caller, samples: list[Sample]) -> list[tuple[str, dict] | NotEditable]:
    """Return for each sample what utils.intervene.text_edits.direct returns, the edit made by the model, or
    the NotEditable in its place.

    What the rules cannot verify (no slot, gold not mentioned, a letter in a span) is not asked. The edit has
    "editor": "llm", "prompt" (VERSION), "model" and "changed_phrases" beside the fields of `verify_directed`.
    Raises as utils.model_calls.ask does.
    """
    found: list = [None] * len(samples)
    calls: dict[int, Call] = {}
    for i, (text, spans, item, target) in enumerate(samples):
        try:
            calls[i] = make_call(str(i), passages(text, spans), item, target)
        except NotEditable as fault:
            found[i] = fault

    def check(call: Call, value: dict) -> tuple[str, str] | None:
        text, spans, item, target = samples[int(call.id)]
        try:
            verify_directed(passages(text, spans), value["edited"], item, target)
        except NotEditable as fault:
            return str(fault), fault.detail
        return None

    outcomes = ask(caller, list(calls.values()), check, "edit", retries=RETRIES)
    for i, outcome in zip(calls, outcomes):
        text, spans, item, target = samples[i]
        if outcome.value is None:
            found[i] = NotEditable(outcome.reason, outcome.detail)
            continue
        after = outcome.value["edited"]
        edit = verify_directed(passages(text, spans), after, item, target)
        found[i] = put_spans(text, spans, after), {
            "editor": "llm", "prompt": VERSION, "model": caller.identity.get("model"), **edit,
            "changed_phrases": outcome.value["changed_phrases"]}
    return found


def make_call(name: str, before: list[str], item: dict, target: str) -> Call:
    """Return the call that asks for an edit of these passages; NotEditable for what could not be verified."""
    slot = pick_slot(before, item, target)
    text = fill(PROMPTS["EDIT"], question=item.get("question", ""), old=slot.old, new=slot.new,
                passages=json.dumps(before, ensure_ascii=False))
    return Call(name, "edit", 0, text, (), (), SCHEMA)
