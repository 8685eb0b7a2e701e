"""What a server's answer is: a reply, a refusal or a lost call, each spelled out for a real server."""
import re
import time

import pytest
from fault_server import calls_of, raw, serving
from samples import table

from utils import openai_backend
from utils.backends import Reply, Request
from utils.cli import ErrorRateError
from utils.openai_backend import HttpBackend

ENDS = {"stop": ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", {"type": "stop", "by": 7}),
        "length": ("length", "max_tokens", "MAX_TOKENS", "model_length", {"type": "length", "length": 8}),
        "tool_calls": ("tool_calls", "function_call", "tool_use", {"type": "tool_calls"})}
REFUSED = ("content_filter", "refusal", {"type": "content_filter"})
LOST = ("abort", "error", None, "null", "load", "insufficient_system_resource", "network_error", "repetition",
        "", "stopped", 7, True, [], ["stop"], {}, {"type": "abort", "message": "Aborted"}, {"type": None},
        {"kind": "stop"})


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return ask(*texts) -> replies of a real server, with waits of a twentieth of the usual ones."""
    for name in ("FIRST_WAIT_S", "SHORTEST_WAIT_S"):
        monkeypatch.setattr(openai_backend, name, 0.05)

    def ask_all(*texts: str, **changes) -> list[Reply]:
        with serving(tmp_path, latency=0) as (_, url):
            backend = HttpBackend("m", url, 10**6, **changes)
            requests = [Request(f"{n:064x}", None, f"{n} {text}", (), 8) for n, text in enumerate(texts)]
            return sorted(backend.generate(requests), key=lambda reply: reply.key)
    return ask_all


def said(content: object, finish: object = "stop", **message: object) -> str:
    return raw(message={"role": "assistant", "content": content, **message}, finish_reason=finish)


def test_the_reasons_to_finish_are_a_closed_list(ask, tmp_path):
    """A reply that no model ended is asked for again, and after five tries by the next run."""
    words = [(end, word) for end, names in ENDS.items() for word in names]
    texts = [said("half a sen", word) for word in (*(word for _, word in words), *REFUSED, *LOST)]
    message = {"content": "half", "role": "assistant"}
    replies = ask(*texts, raw(message=message), raw(times=2, message=message, finish_reason="abort"))
    ended, rest = replies[:len(words)], replies[len(words):]
    for reply, (end, word) in zip(ended, words, strict=True):
        assert (reply.finish_reason, reply.text, reply.error) == (end, "half a sen", None), word
    refused, lost = rest[:len(REFUSED)], rest[len(REFUSED):-1]
    for reply in refused:
        assert "the server refused: " in reply.error and "half a sen" in reply.error
        assert (reply.transient, reply.attempts) == (False, 1)
    for reply, word in zip(lost, (*LOST, None), strict=True):
        assert reply.error.startswith(f"finish_reason {word!r}, expected stop or length or tool_calls: ")
        assert "half" in reply.error and (reply.transient, reply.attempts, reply.text) == (True, 5, ""), word
    assert (replies[-1].error, replies[-1].attempts) == (None, 3) and "<answer>" in replies[-1].text


@pytest.mark.parametrize("content, message, text, reasoning, calls", [
    case.values() for case in table("served_texts")])
def test_text_reasoning_and_tool_calls_are_told_apart(ask, content, message, text, reasoning, calls):
    reply, = ask(said(content, **message))
    assert (reply.text, reply.reasoning, reply.tool_calls, reply.error) == (text, reasoning, calls, None)
    assert (reply.n_prompt, reply.n_new, reply.served["model"]) == (20, 9, "served")


@pytest.mark.parametrize("answer, words, tries", [case.values() for case in table("served_errors")])
def test_what_is_no_reply_is_an_error_in_the_server_s_own_words(ask, answer, words, tries):
    reply, = ask(raw(**answer))
    assert (reply.attempts, reply.transient) == (tries, False) and re.search(words, reply.error, re.DOTALL)


@pytest.mark.parametrize("charset", ["iso-8859-1", "cp1252", "gb18030", "shift_jis", "utf-8", "utf-8-sig",
                                     "utf-16", "utf-16-le", "utf-32"])
def test_a_body_is_decoded_by_its_charset(ask, charset):
    text = {"gb18030": "杯子是红色的。", "shift_jis": "答えはＡです。"}.get(charset, "Café: 5 ° à gauche")
    reply, = ask(raw(charset=charset, message={"content": text}, finish_reason="stop"))
    assert (reply.text, reply.error) == (text, None)


def test_a_busy_server_is_quoted_and_a_wait_beyond_the_patience_is_not_begun(ask, tmp_path):
    body = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    began = time.monotonic()
    match = ("the server is up, but gave no reply for 0 of --server_wait 1800 s, 1 call left; the last one: "
             "status 429: .*insufficient_quota.*3600")
    with pytest.raises(ErrorRateError, match=match):
        ask(raw(status=429, retry_after="3600", **body))
    assert time.monotonic() - began < 10
    match = "up, but gave no reply for [01] of --server_wait 1 s, 2 calls left; .*503: .*warming up"
    with pytest.raises(ErrorRateError, match=match):
        ask(*(raw(status=503, error=f"warming up {n}") for n in range(2)), server_wait_s=1.0)


def test_null_in_extra_body_leaves_a_field_out(ask, tmp_path):
    changes = {"max_tokens": None, "max_completion_tokens": 64, "seed": None, "temperature": None}
    reply, = ask("plain?", extra_body=changes)
    assert reply.error is None
    call, = calls_of(tmp_path)
    assert call["max_completion_tokens"] == 64 and not {"max_tokens", "seed", "temperature"} & set(call)
