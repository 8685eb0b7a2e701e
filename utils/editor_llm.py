"""The directed edit by an LLM: what `utils.edits.direct` does by rules, asked of a model and held to the same verifier.

Any backend of utils.backends or utils.server serves; decode at temperature 0 (LocalBackend is greedy, HttpBackend's default
is 0). The replies are in a journal, so that a second run makes no call. A failure is a NotEditable with a reason of
NOT_EDITABLE, and never an edit by rules in its place: compare the two editors on what both could edit. No torch here.
"""
import json

from utils.calls import Call, Caller, ask
from utils.edits import passages, pick_slot, put_spans, verify_directed
from utils.journal import Journal
from utils.replies import fill, object_schema
from utils.rows import call_key
from utils.slots import NotEditable

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
    """Return what `direct_all` asks through: prompts and model are in every key, so that a journal answers only for them."""
    return Caller(journal, None, backend, {"editor": VERSION, **backend.identity}, PROMPTS, MAX_NEW_TOKENS, guarded=False)


def direct_all(caller: Caller, samples: list[Sample]) -> list[tuple[str, dict] | NotEditable]:
    """Return for each sample what utils.edits.direct returns, the edit made by the model, or the NotEditable in its place.

    What the rules cannot verify (no slot, gold not mentioned, a letter in a span) is not asked. The edit has "editor": "llm",
    "prompt" (VERSION), "model" and "changed_phrases" beside the fields of `verify_directed`. Raises as utils.calls.ask does.
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
