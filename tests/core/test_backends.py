"""Replies, calls through the journal, local backend.

    python -m pytest tests/core/test_backends.py
"""
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from utils.backends import (ErrorRateError, LocalBackend, Reply, Request, object_schema, parse_json_reply,
                            schema_fault)
from utils.call_flags import load_prompts
from utils.journal import Journal
from utils.jsonl import DataError, model_identity
from utils.model_calls import Call, Caller, Guard, IncompleteError, Outcome, ask, fill, quantiles

SCHEMA = object_schema(caption={"type": "string", "maxLength": 20},
                       legible={"type": "string", "enum": ["yes", "no"]},
                       marks={"type": "array", "items": {"type": "string"}, "maxItems": 2},
                       changed={"type": "boolean"},
                       n={"type": "integer"})
GOOD = {"caption": "a cat", "legible": "yes", "marks": ["x"], "changed": True, "n": 1}


# ---------------------------------------------------------------------------------------- prompts and replies
@pytest.mark.parametrize("text, value", [
    ('{"a": 1}', {"a": 1}), ('```json\n{"a": {"b": 2}}\n```', {"a": {"b": 2}}),
    ('{"a": 1} or rather {"a": 2}.', {"a": 2}),
    ('Sure {not json} {"a": "x\ny"}', {"a": "x\ny"}), ("", None), ("[1, 2]", None), ('{"a": ', None),
    ("{" * 5000, None),
    ('{"a": ' * 5000, None), ('{"a": "\\ud800"}', None), ('{"a": "}{"}', {"a": "}{"}),
    ('[{"a": 1}]', {"a": 1})])
def test_parse_json_reply(text, value):
    assert parse_json_reply(text) == value


@pytest.mark.parametrize("change, fault", [
    ({}, None), ({"extra": 1}, None), ({"caption": 3}, "'caption' should be of type string"),
    ({"caption": "x" * 21}, "'caption' is too long: 21 characters"), ({"legible": "maybe"},
                                                                      "'legible' should be one of yes, no"),
    ({"marks": ["a"] * 3}, "'marks' has 3 items, at most 2"), ({"marks": ["a", 2]},
                                                               "item 2 of 'marks' should be of type string"),
    ({"marks": "a"}, "'marks' should be of type array"),
    ({"changed": "true"}, "'changed' should be of type boolean"),
    ({"n": True}, "'n' should be of type integer"), ({"n": 1.5}, "'n' should be of type integer")])
def test_schema_fault(change, fault):
    found = schema_fault(GOOD | change, SCHEMA)
    assert found is None if fault is None else fault in found


def test_schema_fault_names_missing_fields():
    assert schema_fault({"caption": "a"}, SCHEMA) == "the reply lacks legible, marks, changed, n"
    assert schema_fault([], SCHEMA) == "the reply should be of type object"


def test_fill_reads_braces_in_values_as_text():
    assert fill('{q} {"a": {b}} {c}', q="{b} <image>", b="1") == '{b} (image) {"a": 1} {c}'


def test_load_prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"ZOOM": "short"}')
    assert load_prompts(str(path), {"ZOOM": "long", "SYSTEM": "s"}) == {"ZOOM": "short", "SYSTEM": "s"}
    assert load_prompts(None, {"ZOOM": "long"}) == {"ZOOM": "long"}
    for text, match in [('{"zoom": "x"}', "no prompt is called zoom; expected ZOOM, SYSTEM"),
                        ("[]", "one JSON object of strings"),
                        ('{"ZOOM": 1}', "one JSON object of strings"), ("{", "no JSON object of prompts")]:
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            load_prompts(str(path), {"ZOOM": "long", "SYSTEM": "s"})


# ------------------------------------------------------------------------------------------------ calls
class Scripted:
    """A backend that answers from a function of (text) and remembers what it was asked."""

    identity = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def generate(self, requests, done=(), stop=None):
        for request in requests:
            if request.key not in done:
                self.asked.append(request.text)
                text = self.reply(request.text)
                finish = "length" if text.endswith("...") else "stop"
                yield Reply(request.key, text, "error" if text == "!" else finish, 1, 2, 0.5,
                            "broken" if text == "!" else None)


def make_caller(folder: Path, backend, **changes) -> Caller:
    prompts = {"SYSTEM": "system", "RETRY": "Not usable: {fault}."}
    return replace(Caller(Journal(folder, {}), None, backend, {"model": "m"}, prompts, 16), **changes)


def make_calls(*texts: str) -> list[Call]:
    return [Call(f"s/{n}", "zoom", 0, text, (), (), object_schema(a={"type": "integer"})) for n,
            text in enumerate(texts)]


def accept(call: Call, value: dict) -> tuple[str, str] | None:
    return ("too_big", "a is above 9") if value["a"] > 9 else None


def run(folder: Path, backend, calls: list[Call], **changes):
    caller = make_caller(folder, backend, **changes)
    with caller.journal:
        return ask(caller, calls, accept, "test"), caller


def test_a_faulty_reply_is_asked_again_once_with_its_fault(tmp_path):
    replies = {"good": '{"a": 1}', "mended": "hm",
               "mended\nNot usable: it was not one JSON object.": '{"a": 2}',
               "long": "x...", "wrong": '{"a": "x"}', "big": '{"a": 10}', "dead": "!"}
    backend = Scripted(lambda text: replies.get(text, replies[text.split("\n")[0]]))
    calls = make_calls("good", "mended", "long", "wrong", "big", "dead", "good")
    outcomes, caller = run(tmp_path, backend, calls)
    assert [outcome.value for outcome in outcomes] == [{"a": 1}, {"a": 2}, None, None, None, None, {"a": 1}]
    assert [outcome.reason for outcome in outcomes] == [None, None, "cut_off", "bad_schema", "too_big",
                                                        "backend_error",
                                                        None]
    # equal calls are made once
    assert backend.asked[:6] == ["good", "mended", "long", "wrong", "big", "dead"]
    assert backend.asked[6:] == ["mended\nNot usable: it was not one JSON object.",
                                 "long\nNot usable: it was cut off after 2 tokens; be shorter.",
                                 "wrong\nNot usable: 'a' should be of type integer.",
                                 "big\nNot usable: a is above 9."]
    stats = caller.stats()
    assert {name: stats[name] for name in list(stats)[:8]} == {
        "n_calls": 10, "n_reused": 0, "n_orphaned": 0, "n_prompt_tokens": 10, "n_new_tokens": 20,
        "p50_s": 0.5, "p95_s": 0.5,
        "json_as_asked": 0.5}  # of good, mended, wrong and big
    record = json.loads((tmp_path / "calls-00000-of-00001.jsonl").read_text().splitlines()[0])
    assert {"key", "id", "kind", "step", "attempt", "text", "finish_reason", "n_prompt", "n_new", "seconds",
            "error",
            "attempts", "transient", "served", "prompts", "time"} == set(record)


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path):
    backend = Scripted(lambda text: "hm" if text.startswith("bad") else '{"a": 1}')
    first, _ = run(tmp_path, backend, make_calls("good", "bad"))
    n_asked = len(backend.asked)
    again, caller = run(tmp_path, None, make_calls("good", "bad"))
    assert again == first and len(
        backend.asked) == n_asked == 3 and caller.counters.n_reused == 3 and caller.counters.n_calls == 0
    more, caller = run(tmp_path, backend, make_calls("new", "good"))
    assert backend.asked[3:] == ["new"] and caller.counters.n_reused == 1
    with pytest.raises(IncompleteError, match="1 calls are missing"):
        run(tmp_path, None, make_calls("other"))


def test_retry_errors_asks_again_only_where_the_model_failed(tmp_path):
    state = {"works": False}
    backend = Scripted(lambda text: '{"a": 10}' if text.startswith("big") else '{"a": 1}' if state["works"] or
                       text.startswith("good") else "!" if text.startswith("dead") else "hm")
    run(tmp_path, backend, make_calls("good", "bad", "dead", "big"))
    state["works"], backend.asked = True, []
    outcomes, _ = run(tmp_path, backend, make_calls("good", "bad", "dead", "big"))
    assert backend.asked == [] and [outcome.reason for outcome in outcomes] == [None, "bad_json",
                                                                                "backend_error",
                                                                                "too_big"]
    outcomes, _ = run(tmp_path, backend, make_calls("good", "bad", "dead", "big"), retry_errors=True)
    assert backend.asked == ["bad", "dead"] and [outcome.reason for outcome in outcomes] == [None, None, None,
                                                                                             "too_big"]
    assert run(tmp_path, None, make_calls("good", "bad", "dead", "big"))[0] == outcomes


def test_keys_hold_all_that_changes_a_reply(tmp_path):
    caller = make_caller(tmp_path, None)
    call = make_calls("text")[0]
    variants = [caller.request(call, 0), caller.request(call, 1, Outcome(None, "bad_json", "fault")),
                caller.request(call._replace(text="x"), 0),
                caller.request(call._replace(hashes=("1",)), 0), caller.request(call._replace(kind="draw"),
                                                                                0),
                replace(caller, prompts=caller.prompts | {"SYSTEM": "x"}).request(call, 0),
                replace(caller, identity={"model": "n"}).request(call, 0),
                replace(caller, max_new_tokens=9).request(call, 0)]
    assert len({request.key for request in variants}) == len(variants)
    same = caller.request(call._replace(id="other", step=7, images=("moved.png",)), 0)
    assert same.key == variants[0].key
    caller.journal.__exit__()


def test_the_guard_stops_a_run_whose_calls_fail(tmp_path):
    backend = Scripted(lambda text: "hm")
    calls = make_calls(*map(str, range(30)))
    with pytest.raises(ErrorRateError, match="20 of the last 20 calls failed.*--no_guard"):
        run(tmp_path, backend, calls)
    outcomes, _ = run(tmp_path, backend, calls, guarded=False)
    assert len(outcomes) == 30 and len(backend.asked) == 20 + 10 + 30


@pytest.mark.parametrize("failed, trips", [
    ([True] * 19 + [False] + [True] * 79 + [False] * 399, False), ([False] + [True] * 19, False),
    ([True] * 20, True),
    (([True] + [False] * 4) * 100, False), ([False] * 399 + [True] * 101, True)])
def test_guard_thresholds(failed, trips):
    guard = Guard(True)
    if trips:
        with pytest.raises(ErrorRateError):
            [guard.count(one) for one in failed]
    else:
        [guard.count(one) for one in failed]
    [Guard(False).count(one) for one in failed]


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0) and quantiles([float(n) for n in range(101)]) == (50.0, 95.0)


# ------------------------------------------------------------------------------------------ the local backend
def requests_for(picture, n: int) -> list[Request]:
    paths = [picture(f"{i}.png", size=(40 + 17 * i, 84)) for i in range(n)]
    return [Request(f"k{i}", "Reply.", "What digit is on the red circle? " * (i + 1), (path,) * (i % 3), 6)
            for i, path in enumerate(paths)]


@pytest.fixture(scope="module")
def backend(tiny_checkpoint):
    return LocalBackend(str(tiny_checkpoint), 100 * 28 * 28, batch_size=3, batch_tokens=10**6)


def essence(replies) -> dict[str, tuple]:
    return {r.key: (r.text, r.finish_reason, r.n_prompt, r.n_new, r.error) for r in replies}


def test_a_batch_answers_as_single_requests_do(backend, picture, tiny_checkpoint):
    requests = requests_for(picture, 5)
    batched = essence(backend.generate(requests))
    single = essence(LocalBackend(str(tiny_checkpoint), 100 * 28 * 28, batch_size=1,
                                  batch_tokens=10**6).generate(requests))
    assert batched == single and set(batched) == {"k0", "k1", "k2", "k3", "k4"}
    assert all(reply[1] in ("stop", "length") and 1 <= reply[3] <= 6 and reply[4] is None
               for reply in batched.values())


def test_done_batches_are_skipped_and_half_done_ones_repeated_whole(backend, picture):
    requests = requests_for(picture, 6)
    order = [reply.key for reply in backend.generate(requests)]
    assert sorted(order) == [f"k{i}" for i in range(6)]
    assert [r.key for r in backend.generate(requests, done=set(order[:3]))] == order[3:]
    assert [r.key for r in backend.generate(requests, done=set(order[:4]))] == order[3:]
    assert list(backend.generate(requests, done=set(order))) == []


def test_a_lost_image_fails_alone(backend, picture, tmp_path):
    requests = requests_for(picture, 3)
    (tmp_path / "1.png").unlink()
    replies = essence(backend.generate(requests))
    assert replies["k1"] == ("", "error", 0, 0, "image_missing") and replies["k2"][4] is replies["k0"][
        4] is None


@pytest.mark.parametrize("limit", [2, 1, 0])
def test_out_of_memory_splits_the_batch(tiny_checkpoint, picture, monkeypatch, limit):
    from utils import decode
    backend = LocalBackend(str(tiny_checkpoint), 100 * 28 * 28, batch_size=3, batch_tokens=10**6)
    prefill, requests = decode.prefill, requests_for(picture, 3)
    expected = essence(backend.generate(requests))

    def small_memory(qwen, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("no memory")
        return prefill(qwen, inputs, *args, **kwargs)

    monkeypatch.setattr(decode, "prefill", small_memory)
    replies = essence(backend.generate(requests))
    assert replies == expected if limit else {reply[4] for reply in replies.values()} == {"out_of_memory"}


def test_a_batch_keeps_to_its_rows_and_tokens(tiny_checkpoint, picture):
    requests = requests_for(picture, 9)
    for size, tokens in ((4, 10**6), (9, 120), (9, 1), (2, 120)):
        backend = LocalBackend(str(tiny_checkpoint), 100 * 28 * 28, size, tokens)
        batches = list(backend.batches(requests))
        need = [len(batch) * max(backend.length(r) + r.max_tokens for r in batch) for batch in batches]
        assert sorted(r.key for batch in batches for r in batch) == sorted(r.key for r in requests)
        assert all(len(batch) <= size and (n <= tokens or len(batch) == 1) for batch, n in zip(batches, need))
        lengths = [backend.length(r) for batch in batches for r in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert tokens == 1 or max(map(len, batches)) > 1


def test_out_of_memory_is_remembered(tiny_checkpoint, picture, monkeypatch):
    from utils import decode
    prefill, sizes = decode.prefill, []

    def small_memory(qwen, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return prefill(qwen, inputs, *args, **kwargs)

    monkeypatch.setattr(decode, "prefill", small_memory)
    backend = LocalBackend(str(tiny_checkpoint), 100 * 28 * 28, batch_size=4, batch_tokens=10**6)
    path = picture("a.png")
    replies = list(backend.generate(Request(f"k{i}", None, "What is it?", (str(path),), 6)
                                    for i in range(12)))
    assert len(replies) == 12 and all(reply.error is None for reply in replies)
    assert sizes == [4, 2, 2, 2, 2, 2, 2]  # the first batch was split, the others were planned smaller


def test_a_stop_ends_the_work_between_batches(backend, picture):
    stop, keys = threading.Event(), []
    for reply in backend.generate(requests_for(picture, 7), stop=stop):
        keys.append(reply.key)
        stop.set()
    assert len(keys) == 3  # the batch that was under way


def test_identity_is_of_the_content_not_of_the_path(tiny_checkpoint, tmp_path):
    import shutil
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert model_identity(copy) == model_identity(tiny_checkpoint)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    changed = model_identity(copy)
    assert changed != model_identity(tiny_checkpoint)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_identity(copy) not in (changed, model_identity(tiny_checkpoint))


def test_an_unknown_model_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError,
                       match="--model /no/such/folder: neither a folder here nor available on the hub"):
        LocalBackend("/no/such/folder", 10**6, 1, 1)
