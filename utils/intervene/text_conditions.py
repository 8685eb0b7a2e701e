"""The conditions on text imaginations, from a reply left as it is to one that supports another option.

    condition           each imagination becomes                            what it isolates
    sham                itself                                              new tokens, a forced beginning
    paraphrase          other words; values of options and numbers kept     the surface
    irrelevant          other words of their class, unrelated to the        a disturbance of that size
                        options, about as many as the directed edit changes
    removal             nothing between its marks                           whether its content is needed
    filler              as many "..." as it has words
    no_span             nothing, the marks removed too
    bare                one <think_image>, the placeholder of training
    constant            one fixed passage, the same for all items           the paper's condition, as text
    foreign             those of another item of the batch                  a mismatch of the usual kind
    directed            a wrong option's value for the right one's          whether the answer follows
    directed_llm        the same edit, made by an LLM
    truncate_N          the first N % of its words                          when the answer is settled
    image_off, image_off_directed       as sham and directed, with the image hidden from what follows
    swap_counterfactual                 what the model imagines under the item's edited image
    swap_blank, blank_x, blank          worlds of the mediation; blank is the positive control

The model may imagine again behind an edit and so undo it (`again`, docs/interventions.md), except where the
condition is that nothing is imagined: there it cannot write the opening mark, and `n_forbidden` counts.

An edit is a function f(text, spans, item, context) -> (new text, edit), or raises NotEditable. `text` is the
reply up to its last imagination, `spans` its imaginations. The edit is a dict with "editor", "target",
"before" and "after" (lists of spans), "word_distance" and, where one value replaces another, "from" and "to".
The LLM's edit is held to the rules of `verify_directed`; where it fails, no edit by rules replaces it.
"""
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from utils.intervene.edits import (NotEditable, direct, passages, pick_slot, put_spans, total_distance,
                                   verify_directed)
from utils.intervene.latent_conditions import DO_X
from utils.intervene.word_forms import others, replace_values, reworded, survivors
from utils.journal import Journal
from utils.jsonl import call_key, object_schema
from utils.model_calls import Call, Caller, ask, fill
from utils.rows import CLOSE, OPEN, mark

CONSTANT = "A closer view of the part of the image that matters."
Spans = list[tuple[int, int]]
Edited = tuple[str, dict]


@dataclass(frozen=True)
class Context:
    """The letter of a wrong option, a donor's imaginations, a seed."""

    target: str
    donor: Sequence[str] | None = None
    seed: int = 0


def until_last_span(text: str, spans: Spans) -> str:
    """Return a reply up to and including its last imagination and its mark."""
    return text[:spans[-1][1] + len(CLOSE)]


def replaced(text: str, spans: Spans, after: list[str], context: Context, **more) -> Edited:
    """Return the text with its spans replaced, and the edit; NotEditable if nothing changes."""
    before = passages(text, spans)
    if after == before:
        raise NotEditable("unchanged", "the edit changes nothing")
    return put_spans(text, spans, after), edit_fields(before, after, context, **more)


def edit_fields(before: list[str], after: list[str], context: Context, **more) -> dict:
    return {"editor": "rule", "target": context.target, **more,
            "word_distance": total_distance(before, after), "before": before, "after": after}


# ---- edits by rules
def paraphrase(text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Say the same in other words."""
    before = passages(text, spans)
    after = [reworded(span, item) for span in before]
    if survivors(before, item) != survivors(after, item):
        raise NotEditable("value_changed", "an option's value or a number did not survive")
    return replaced(text, spans, after, context)


def irrelevant(text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Replace words that neither options nor question hold, until as many words differ as after `direct`
    ("directed_distance"). Words may run out before; an article may exceed it by one."""
    aim = direct(text, spans, item, context.target)[1]["word_distance"]
    before = passages(text, spans)
    table, after = {}, before
    for old, new in others(before, item, random.Random(f"{context.seed}/irrelevant/{item['id']}")):
        table[old] = new
        after = [replace_values(span, table)[0] for span in before]
        if total_distance(before, after) >= aim:
            break
    if not table:
        raise NotEditable("no_irrelevant_word", "options and question hold all words of the classes")
    was, now = survivors(before, item), survivors(after, item)
    if any(was[word] != now[word] for word in was | now if not word.startswith("number ")):
        raise NotEditable("value_changed", "an option's value did not survive")
    return replaced(text, spans, after, context, **{"from": list(table), "to": list(table.values())},
                    directed_distance=aim)


def directed(text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Put a wrong option's value for the right one's. On a planning item put the "imaginations" that its
    counterfactual has, one per span: the edited board, told by whoever made the item."""
    told = (item.get("counterfactual") or {}).get("imaginations")
    if item.get("metric") != "vsp_path" or told is None:
        return direct(text, spans, item, context.target)
    if len(told) != len(spans):
        raise NotEditable("span_count", f"{len(spans)} imaginations, expected {len(told)}")
    return replaced(text, spans, told, context)


def each(new: Callable[[str], str], text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Put new(span) for every span."""
    return replaced(text, spans, [new(span) for span in passages(text, spans)], context)


def around(new: str, text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Put `new` for each span and its marks; an empty one also removes the space before them."""
    fields = edit_fields(passages(text, spans), [""] * len(spans), context)
    for start, end in reversed(spans):
        head = text[:start].removesuffix(OPEN)
        text = (head if new else head.rstrip()) + new + text[end + len(CLOSE):]
    return text, fields


def foreign(text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Put the donor's imaginations, in their order."""
    if context.donor is None or len(context.donor) < len(spans):
        raise NotEditable("no_donor",
                          f"{len(context.donor or ())} imaginations to take, expected {len(spans)}")
    return replaced(text, spans, list(context.donor[:len(spans)]), context)


def alone(text: str, spans: Spans, item: dict, context: Context) -> Edited:
    """Keep the imaginations in their marks, without the words around them."""
    before = passages(text, spans)
    return " ".join(map(mark, before)), edit_fields(before, before, context)


def truncate(text: str, spans: Spans, item: dict, context: Context, percent: int) -> Edited:
    """Keep the first `percent` of the words of all imaginations together, rounded half up. A short one may
    stay whole, so that a curve keeps all items."""
    before = passages(text, spans)
    left, after = (percent * sum(len(span.split()) for span in before) + 50) // 100, []
    for span in before:
        ends = [0, *(match.end() for match in re.finditer(r"\S+", span))]
        keep = min(left, len(ends) - 1)
        after.append(span if keep == len(ends) - 1 else span[:ends[keep]])
        left -= keep
    return put_spans(text, spans, after), edit_fields(before, after, context, percent=percent)


EDITS: dict[str, Callable[..., Edited]] = {
    "sham": lambda text, spans, item, context: (text, edit_fields(*[passages(text, spans)] * 2, context)),
    "paraphrase": paraphrase, "irrelevant": irrelevant, "removal": partial(each, lambda span: ""),
    "filler": partial(each, lambda span: " ".join("..." for _ in span.split())),
    "no_span": partial(around, ""), "bare": partial(around, OPEN),  # as --imagination placeholder trains
    "constant": partial(each, lambda span: CONSTANT), "foreign": foreign, "strict": alone,
    "directed": directed,
    **{f"truncate_{percent}": partial(truncate, percent=percent) for percent in (0, 25, 50, 75)}}


# ---- conditions
@dataclass(frozen=True)
class TextCondition:
    """The edit of a reply's beginning (None: generated again from `prompt`), whether what follows sees the
    image, and whether the model may undo the edit: it "may", is "forbidden" to, "cannot", or the imagination
    is its "own"."""

    edit: str | None
    prompt: str = "own"
    sees_image: bool = True
    again: str = "may"


ABSENT = ("removal", "filler", "no_span", "bare", "truncate_0")
TEXT_CONDITIONS = {
    **{name: TextCondition(name, again="forbidden" if name in ABSENT else "may")
       for name in (*EDITS, "directed_llm")},
    "strict": TextCondition("strict", "blind", again="cannot"),
    "image_off": TextCondition("sham", sees_image=False, again="cannot"),
    "image_off_directed": TextCondition("directed", sees_image=False),
    "swap_counterfactual": TextCondition("swap_counterfactual"),
    "swap_blank": TextCondition("swap_blank"), "blank_x": TextCondition("sham", "blank"),
    "blank": TextCondition("swap_blank", "blank", again="own"),
    **{name: TextCondition(None, kind, again="own") for name, kind in DO_X.items()}}
TEXT_PRESETS = {"paper": ["sham", "directed"],
                "maps": ["sham", *(name for name in EDITS if name.startswith("truncate"))],
                "standard": ["sham", "paraphrase", "removal", "constant", "foreign", "no_span", "irrelevant",
                             "directed", "image_off", "strict", "swap_blank", "blank_x"],
                "full": [name for name in TEXT_CONDITIONS if name != "directed_llm"]}
TEXT_CONTROLS = ("sham",)  # change nothing but the tokens


# ---- the LLM's edit
PROMPTS = {
    "SYSTEM": "You make small, exact edits to descriptions of images. You reply with one JSON object and "
              "nothing else.",
    "EDIT": """Someone was asked a question about an image and described what they saw in the passages \
below. Edit the passages so that they describe an image for which another answer is right.

Question: {question}
From: {old}
To: {new}
Passages: {passages}

Rules:
- Turn every statement that supports "{old}" into one that supports "{new}", in all its forms (plural, \
digits or words).
- Where "{new}" stands already, put "{old}" there: the two change places.
- Change nothing else but what grammar asks for. Keep the length, the style and the order.
- Name no letter of an option, give no final answer, and add no remark about the edit.
- Return as many passages as you were given, in their order, an untouched one as it is.

Reply with {"edited": [passages], "changed_phrases": [each phrase as it reads now]}.""",
    "RETRY": "An earlier reply could not be used: {fault}. Reply again with the whole JSON object."}
VERSION = call_key(**PROMPTS)[:16]  # of the prompts, in the records
MAX_NEW_TOKENS = 1024
RETRIES = 3  # after the first reply, each with the fault of the reply before
SCHEMA = object_schema(edited={"type": "array", "items": {"type": "string"}},
                       changed_phrases={"type": "array", "items": {"type": "string"}})
Sample = tuple[str, Spans, dict, str]  # text, spans, item, letter of a wrong option


def make_caller(backend: object, journal: Journal) -> Caller:
    """Return the caller of `direct_all`; prompts and model are in every key."""
    return Caller(journal, None, backend, {"editor": VERSION, **backend.identity}, PROMPTS, MAX_NEW_TOKENS,
                  guarded=False)


def direct_all(caller: Caller, samples: list[Sample]) -> list[Edited | NotEditable]:
    """Return the model's directed edit of each sample, or a NotEditable. Samples whose edit could not be
    verified are not sent."""
    results: list = [None] * len(samples)
    calls: dict[int, Call] = {}
    for i, (text, spans, item, target) in enumerate(samples):
        try:
            calls[i] = make_call(str(i), passages(text, spans), item, target)
        except NotEditable as fault:
            results[i] = fault

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
            results[i] = NotEditable(outcome.reason, outcome.detail)
            continue
        after = outcome.value["edited"]
        edit = verify_directed(passages(text, spans), after, item, target)
        results[i] = put_spans(text, spans, after), {
            "editor": "llm", "prompt": VERSION, "model": caller.identity.get("model"), **edit,
            "changed_phrases": outcome.value["changed_phrases"]}
    return results


def make_call(name: str, before: list[str], item: dict, target: str) -> Call:
    slot = pick_slot(before, item, target)
    text = fill(PROMPTS["EDIT"], question=item.get("question", ""), old=slot.old, new=slot.new,
                passages=json.dumps(before, ensure_ascii=False))
    return Call(name, "edit", 0, text, (), (), SCHEMA)
