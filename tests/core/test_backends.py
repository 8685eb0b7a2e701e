"""The local backend: batches, memory, stops; the JSON of requests and replies; what a model is known by."""
import random
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from samples import table

from utils import decode
from utils.backends import LocalBackend, Request
from utils.jsonl import DataError, model_identity, object_schema
from utils.reply_text import parse_json_reply, schema_fault

SCHEMA = object_schema(caption={"type": "string", "maxLength": 20},
                       legible={"type": "string", "enum": ["yes", "no"]},
                       marks={"type": "array", "items": {"type": "string"}, "maxItems": 2},
                       changed={"type": "boolean"}, n={"type": "integer"})
GOOD = {"caption": "a cat", "legible": "yes", "marks": ["x"], "changed": True, "n": 1}


@pytest.mark.parametrize("text, value", [case.values() for case in table("json_replies")])
def test_parse_json_reply(text, value):
    assert parse_json_reply(text) == value


def wrapped(value: str) -> list[str]:
    """Return replies that hold a JSON value: alone, deeper, in prose, in a fence, after a good one."""
    return [f'{{"a": "red", "b": {value}}}', f'{{"a": [{{"b": {value}}}]}}', f'Sure: {{"a": {value}}} Done.',
            f'```json\n{{"a": {{"b": [1, {value}]}}}}\n```', f'{{"a": 1}} {{"a": {value}}}']


@pytest.mark.parametrize("value", [
    "NaN", "-Infinity", "1e999", '{"c": 1, "c": 2}', '{"c": 1, "\\u0063": 1}', '"\\u0000"', '"a\0b"',
    '"\\boxed{4}"', '"\\u001b[31m"', '"\x1b[0m"', '"\x7f"', '"\\u009b"', '{"\\u0007": 1}', '"\\ud83d"'])
def test_a_reply_with_what_is_no_json_or_no_text_is_none(value):
    *replies, after = wrapped(value)
    assert [parse_json_reply(reply) for reply in replies] == [None] * 4
    assert parse_json_reply(after) in (None, {"a": 1})


@pytest.mark.parametrize("value, said", [
    ('"a\nb\tc"', "a\nb\tc"), ('"\\u2028\\u0085"', "\u2028\x85"), ('"\\\\boxed{4}"', "\\boxed{4}"),
    ("1e300", 1e300), ('"\\ud83d\\ude00"', "\U0001f600")])
def test_white_space_and_escapes_of_a_reply_are_text(value, said):
    assert [parse_json_reply(reply) for reply in wrapped(value)] == [
        {"a": "red", "b": said}, {"a": [{"b": said}]}, {"a": said}, {"a": {"b": [1, said]}}, {"a": said}]


@pytest.mark.parametrize("change, fault", [case.values() for case in table("schema_faults")])
def test_schema_fault(change, fault):
    shown = schema_fault(GOOD | change, SCHEMA)
    assert shown is None if fault is None else fault in shown
    assert schema_fault({"caption": "a"}, SCHEMA) == "the reply lacks legible, marks, changed, n"
    assert schema_fault([], SCHEMA) == "the reply should be of type object"


@pytest.fixture
def make_requests(picture):
    """Return make(n) -> requests with zero, one and two images and ever longer texts."""
    def make(n: int) -> list[Request]:
        paths = [str(picture(f"{i}.png", size=(40 + 17 * i, 84))) for i in range(n)]
        text = "What digit is on the red circle? "
        return [Request(f"k{i}", "Reply.", text * (i + 1), (path,) * (i % 3), 6)
                for i, path in enumerate(paths)]
    return make


def open_local(checkpoint, batch_size=3, batch_tokens=10**6) -> LocalBackend:
    return LocalBackend(str(checkpoint), 100 * 28 * 28, batch_size, batch_tokens)


@pytest.fixture(scope="module")
def backend(tiny_checkpoint):
    return open_local(tiny_checkpoint)


@pytest.fixture
def memory(monkeypatch):
    """Let batches of more than `memory.limit` rows run out of memory; `memory.sizes` are the rows tried."""
    prefill, memory = decode.prefill, SimpleNamespace(limit=10**6, sizes=[])

    def limited(qwen, inputs, *args):
        memory.sizes.append(len(inputs["input_ids"]))
        if memory.sizes[-1] > memory.limit:
            raise torch.OutOfMemoryError("no memory")
        return prefill(qwen, inputs, *args)

    monkeypatch.setattr(decode, "prefill", limited)
    return memory


def essence(replies) -> dict[str, tuple]:
    return {r.key: (r.text, r.finish_reason, r.n_prompt, r.n_new, r.error) for r in replies}


@pytest.mark.parametrize("size, tokens", [(3, 10**6), (9, 10**6), (9, 150)])
def test_a_batch_answers_as_single_requests_do(make_requests, tiny_checkpoint, size, tokens):
    """Each reply is at most as long as its own request allows."""
    rng = random.Random(size + tokens)
    requests = [request._replace(max_tokens=rng.randint(1, 30)) for request in make_requests(9)]
    batched = essence(open_local(tiny_checkpoint, size, tokens).generate(requests))
    assert batched == essence(open_local(tiny_checkpoint, batch_size=1).generate(requests))
    assert set(batched) == {request.key for request in requests}
    for request in requests:
        _, finish_reason, _, n_new, error = batched[request.key]
        assert error is None and (finish_reason == "stop" or n_new == request.max_tokens)


def test_done_batches_are_skipped_and_half_done_ones_repeated_whole(backend, make_requests):
    requests = make_requests(6)
    order = [reply.key for reply in backend.generate(requests)]
    assert sorted(order) == [f"k{i}" for i in range(6)]
    for n_done in (3, 4):
        assert [reply.key for reply in backend.generate(requests, done=set(order[:n_done]))] == order[3:]
    assert list(backend.generate(requests, done=set(order))) == []


def test_a_lost_image_fails_alone(backend, make_requests, tmp_path):
    requests = make_requests(3)
    (tmp_path / "1.png").unlink()
    replies = essence(backend.generate(requests))
    assert replies["k1"] == ("", "error", 0, 0, "image_missing")
    assert replies["k2"][4] is replies["k0"][4] is None


@pytest.mark.parametrize("limit", [2, 1, 0])
def test_out_of_memory_splits_the_batch(tiny_checkpoint, make_requests, memory, limit):
    backend, requests = open_local(tiny_checkpoint), make_requests(3)
    expected = essence(backend.generate(requests))
    memory.limit = limit
    replies = essence(backend.generate(requests))
    assert replies == expected if limit else {reply[-1] for reply in replies.values()} == {"out_of_memory"}


def test_out_of_memory_is_remembered(tiny_checkpoint, picture, memory):
    path, memory.limit = str(picture("a.png")), 2
    replies = list(open_local(tiny_checkpoint, batch_size=4).generate(
        Request(f"k{i}", None, "What is it?", (path,), 6) for i in range(12)))
    assert len(replies) == 12 and all(reply.error is None for reply in replies)
    assert memory.sizes == [4, 2, 2, 2, 2, 2, 2]  # the first batch was split, the others were planned smaller


@pytest.mark.parametrize("size, tokens", [(4, 10**6), (9, 120), (9, 1), (2, 120)])
def test_a_batch_keeps_to_its_rows_and_tokens(tiny_checkpoint, make_requests, size, tokens):
    requests, backend = make_requests(9), open_local(tiny_checkpoint, size, tokens)
    batches = list(backend.batches(requests))
    assert sorted(r.key for batch in batches for r in batch) == sorted(r.key for r in requests)
    for batch in batches:
        n_tokens = len(batch) * max(backend.length(r) + r.max_tokens for r in batch)
        assert len(batch) <= size and (n_tokens <= tokens or len(batch) == 1)
    lengths = [backend.length(r) for batch in batches for r in batch]
    assert lengths == sorted(lengths, reverse=True)
    longer = backend.length(requests[0]._replace(system="Reply." + 400 * "x"))
    assert longer == backend.length(requests[0]) + 100
    assert tokens == 1 or max(map(len, batches)) > 1


def test_a_stop_ends_the_work_between_batches(backend, make_requests):
    stop, keys = threading.Event(), []
    for reply in backend.generate(make_requests(7), stop=stop):
        keys.append(reply.key)
        stop.set()
    assert len(keys) == 3  # the batch that was running


def test_the_identity_of_a_model_is_of_its_content_not_of_its_path(tiny_checkpoint, tmp_path):
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
    with pytest.raises(DataError, match="--model /no/such/folder: neither a folder nor on the hub"):
        LocalBackend("/no/such/folder", 10**6, 1, 1)
