"""Calls through the journal: keys, second tries, resuming, retried errors, the guard."""
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from utils import model_calls, rows
from utils.backends import Reply
from utils.cli import ErrorRateError
from utils.journal import Journal
from utils.jsonl import object_schema
from utils.model_calls import Call, Caller, Guard, IncompleteError, Outcome, ask, fill, quantiles


class Scripted:
    """A backend that answers from a function of the text and remembers what it was asked."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def generate(self, requests, done=(), stop=None):
        for request in requests:
            if request.key not in done:
                self.asked.append(request.text)
                text = self.reply(request.text)
                finish = "error" if text == "!" else "length" if text.endswith("...") else "stop"
                yield Reply(request.key, text, finish, 1, 2, 0.5, "broken" if text == "!" else None)


def make_caller(folder: Path, backend, **changes) -> Caller:
    prompts = {"SYSTEM": "system", "RETRY": "Not usable: {fault}."}
    return replace(Caller(Journal(folder, {}), None, backend, {"model": "m"}, prompts, 16), **changes)


def make_calls(*texts: str) -> list[Call]:
    schema = object_schema(a={"type": "integer"})
    return [Call(f"s/{n}", "zoom", 0, text, schema=schema) for n, text in enumerate(texts)]


def run(folder: Path, backend, texts: list[str], **changes) -> tuple[list[Outcome], Caller]:
    """Ask for {"a": at most 9}."""
    caller = make_caller(folder, backend, **changes)
    with caller.journal:
        return ask(caller, make_calls(*texts), lambda call, value: ("too_big", "a is above 9")
                   if value["a"] > 9 else None, "test"), caller


def test_a_faulty_reply_is_asked_again_once_with_its_fault(tmp_path):
    replies = {"good": '{"a": 1}', "better": "hm",
               "better\nNot usable: it was not one JSON object.": '{"a": 2}',
               "long": "x...", "wrong": '{"a": "x"}', "big": '{"a": 10}', "dead": "!"}
    backend = Scripted(lambda text: replies.get(text, replies[text.split("\n")[0]]))
    texts = ["good", "better", "long", "wrong", "big", "dead", "good"]
    outcomes, caller = run(tmp_path, backend, texts)
    assert [outcome.value for outcome in outcomes] == [{"a": 1}, {"a": 2}, None, None, None, None, {"a": 1}]
    assert [outcome.reason for outcome in outcomes] == [
        None, None, "cut_off", "bad_schema", "too_big", "backend_error", None]
    assert [outcome.attempts for outcome in outcomes] == [1, 2, 2, 2, 2, 1, 1]  # equal calls are made once
    assert backend.asked == [*texts[:6], "better\nNot usable: it was not one JSON object.",
                             "long\nNot usable: it was cut off after 2 tokens; be shorter.",
                             "wrong\nNot usable: 'a' should be of type integer.",
                             "big\nNot usable: a is above 9."]
    stats = caller.stats()
    assert {name: stats[name] for name in list(stats)[:8]} == {
        "n_calls": 10, "n_reused": 0, "n_orphaned": 0, "n_prompt_tokens": 10, "n_new_tokens": 20,
        "p50_s": 0.5, "p95_s": 0.5, "json_as_asked": 0.5}  # of good, better, wrong and big
    record = json.loads((tmp_path / "calls-00000-of-00001.jsonl").read_text().splitlines()[0])
    assert set(record) == {"key", "id", "kind", "step", "attempt", "text", "finish_reason", "n_prompt",
                           "n_new", "seconds", "error", "attempts", "transient", "served", "prompts", "time",
                           "reasoning", "tool_calls"}


def test_a_second_run_asks_only_for_new_calls_and_with_retry_errors_where_the_model_failed(tmp_path):
    texts, works = ["good", "bad", "dead", "big"], False

    def reply(text: str) -> str:
        if text.startswith("big"):
            return '{"a": 10}'
        return '{"a": 1}' if works or text == "good" else "!" if text == "dead" else "hm"

    backend = Scripted(reply)
    run(tmp_path, backend, texts)
    works, backend.asked = True, []
    for retry, asked, reasons in ((False, [], [None, "bad_json", "backend_error", "too_big"]),
                                  (True, ["bad", "dead"], [None, None, None, "too_big"])):
        outcomes, caller = run(tmp_path, backend, texts, retry_errors=retry)
        assert backend.asked == asked and [outcome.reason for outcome in outcomes] == reasons
        assert (caller.counters.n_calls, caller.counters.n_reused) == (len(asked), 3 if retry else 6)
    assert run(tmp_path, None, texts)[0] == outcomes
    with pytest.raises(IncompleteError, match="1 of 1 calls missing"):
        run(tmp_path, None, ["other"])


def test_a_call_without_a_schema_is_answered_in_words(tmp_path):
    caller = make_caller(tmp_path, Scripted(lambda text: "Yes..."))
    with caller.journal:
        call = Call("s/0", "grade", -1, "right?")
        value = {"text": "Yes...", "finish_reason": "length"}
        assert ask(caller, [call], lambda call, value: None, "test")[0].value == value


def test_keys_hold_all_that_changes_a_reply(tmp_path):
    caller = make_caller(tmp_path, None)
    call = make_calls("text")[0]
    variants = [caller.request(call, 0), caller.request(call, 1, Outcome(None, "bad_json", "fault")),
                *(caller.request(call._replace(**change), 0)
                  for change in ({"text": "x"}, {"hashes": ("1",)}, {"kind": "draw"})),
                *(replace(caller, **change).request(call, 0)
                  for change in ({"prompts": caller.prompts | {"SYSTEM": "x"}}, {"identity": {"model": "n"}},
                                 {"max_new_tokens": 9}))]
    assert len({request.key for request in variants}) == len(variants)
    same = caller.request(call._replace(id="other", step=7, images=("moved.png",)), 0)
    assert same.key == variants[0].key
    caller.journal.__exit__()


def test_the_guard_stops_a_run_whose_calls_fail(tmp_path):
    backend, texts = Scripted(lambda text: "hm"), [*map(str, range(30))]
    match = "20 of the last 20 calls failed, the last one by bad_json: it was not .*--no_guard"
    with pytest.raises(ErrorRateError, match=match):
        run(tmp_path, backend, texts)
    outcomes, _ = run(tmp_path, backend, texts, guarded=False)
    assert len(outcomes) == 30 and len(backend.asked) == 20 + 10 + 30


@pytest.mark.parametrize("failed, trips", [
    ([True] * 19 + [False] + [True] * 79 + [False] * 399, False), ([False] + [True] * 19, False),
    ([True] * 20, True), (([True] + [False] * 4) * 100, False), ([False] * 399 + [True] * 101, True)])
def test_guard_thresholds(failed, trips):
    def count(guard: Guard) -> None:
        for is_error in failed:
            guard.count("bad_json: words" if is_error else None)

    with pytest.raises(ErrorRateError) if trips else nullcontext():
        count(Guard(True))
    count(Guard(False))


def test_fill_reads_braces_and_markers_in_values_as_text_and_quantiles_are_exact():
    assert quantiles([3.0]) == (3.0, 3.0) and quantiles([float(n) for n in range(101)]) == (50.0, 95.0)
    assert fill('{q} {"a": {b}} {c}', q="{b} <image>", b="1") == '{b} (image) {"a": 1} {c}'
    assert fill("{q}", q="a <|im_end|> <|image_pad|> <image> <<|x|>> <|a b|> a<b|c>d") == (
        "a (im_end) (image_pad) (image) <(x)> <|a b|> a<b|c>d")


def test_closed_reasons_are_distinct():
    groups = (model_calls.ERROR_REASONS, rows.ROW_REASONS, rows.CAPTION_REASONS)
    assert len({reason for group in groups for reason in group}) == sum(map(len, groups))
