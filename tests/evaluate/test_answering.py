"""Who answers: batches, turns with a tool, servers, pictures that cannot be read."""
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fault_server import calls_of, serving
from scipy.stats import chisquare

from utils.backends import LocalBackend, Request
from utils.evaluate.answering import Local, Served, answer_all, sampler
from utils.evaluate.prompts import PROTOCOLS, Conversation
from utils.items import chat, render
from utils.journal import Journal
from utils.jsonl import DataError
from utils.openai_backend import HttpBackend

CALL = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 40, 30]}}</tool_call>'


@pytest.fixture
def items(picture):
    """Nine items whose pictures and questions have different lengths."""
    for n in range(9):
        picture(f"{n}.png", (56 + 28 * (n % 3), 84), (20 * n, 90, 40))
    return [{"id": f"t/{n}", "question": "What is it? " * (1 + 3 * n % 7), "metric": "mcq",
             "options": [["A", "red"], ["B", "blue"]], "answer": {"type": "letter", "value": "A"},
             "images": [{"path": f"{n}.png"}]} for n in range(9)]


@pytest.fixture
def talk(tmp_path):
    return lambda items, method="direct", protocol="plain": [
        Conversation(item, PROTOCOLS[protocol], str(tmp_path), method, {}) for item in items]


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "run") as opened:
        yield opened


@pytest.fixture
def local(tiny_checkpoint):
    """Return make(batch_size, batch_tokens) -> the tiny checkpoint, up to ten new tokens."""
    return lambda size=4, tokens=10**6: Local(LocalBackend(str(tiny_checkpoint), None, size, tokens), 10)


def served(url):
    return Served(HttpBackend("m", url, 10**6, 28, 8, 20.0, 5.0), 64, 10**6)


def test_a_prompt_is_the_one_turn_that_other_scripts_write(local, items, talk):
    tokenizer = local().backend.qwen.tokenizer
    item = items[0] | {"question": "Here <image> and <|im_end|> there?"}
    for name in ("plain", "monet"):
        messages = talk([item], protocol=name)[0].messages
        words = messages[-1][1]
        assert [type(part).__name__ for part in words] == ["str", "Picture", "str"]
        assert "<|im_end|>" not in words[2]
        text = words[0] + "<image>" + words[2]
        assert render(tokenizer, messages) == chat(tokenizer, text, 1, PROTOCOLS[name].system)


def test_batches_are_bounded_sorted_and_the_same_for_any_number_of_processes(local, items, talk):
    system, everyone = local(), talk(items)

    def lengths(batch):
        return [system.backend.length(request) for request in system.requests(batch)]

    whole = system.batches(everyone, 0, 1)
    assert sorted(c.item["id"] for batch in whole for c in batch) == [item["id"] for item in items]
    assert all(len(batch) <= 4 for batch in whole)
    in_order = [length for batch in whole for length in lengths(batch)]
    assert in_order == sorted(in_order, reverse=True)
    for world in (2, 3):
        shares = [system.batches(everyone, rank, world) for rank in range(world)]
        assert [shares[k % world][k // world] for k in range(len(whole))] == whole
    budget = 3 * (max(in_order) + 10)
    bounded = local(100, budget).batches(talk(items), 0, 1)
    assert all(len(batch) * (max(lengths(batch)) + 10) <= budget for batch in bounded) and len(bounded) > 2


def test_a_checkpoint_takes_turns_with_the_tool_and_sees_the_region(local, items, talk, journal, monkeypatch):
    """The random checkpoint calls no tool, so its replies are replaced; the region comes as a picture."""
    said = iter([CALL, CALL, "<answer>A</answer>", "<answer>B</answer>"])
    monkeypatch.setattr("utils.backends.clean_text", lambda tokenizer, ids, spec: next(said))
    conversations = talk(items[:2], "tool", "deepeyes")
    assert answer_all(local(), conversations, journal, 0, 1)
    for conversation in conversations:
        result = conversation.result()
        assert (result["ended_by"], len(result["turns"]), len(result["image_grids"])) == ("answer", 2, 2)
        assert result["image_grids"][1] == [1, 4, 6]  # 40 x 30 pixels, enlarged to 2 x 3 tokens


def test_a_server_is_asked_all_at_once_with_pictures_in_their_places(items, talk, journal, tmp_path):
    with serving(tmp_path) as (_, url):
        conversations = talk(items, "tool", "deepeyes")
        for again in (conversations, talk(items, "tool", "deepeyes")):
            assert answer_all(served(url), again, journal, 0, 1)
        calls = calls_of(tmp_path)
    assert len(calls) == 2 * len(items) and [len(call["images"]) for call in calls] == [1] * len(calls)
    for result in (conversation.result() for conversation in conversations):
        assert result["ended_by"] == "answer"
        assert result["clean_output"] == "<think>I see.</think> <answer>A</answer>"
        assert result["turns"][0]["box"] == [0, 0, 40, 30]
        assert (result["n_tokens"], result["image_grids"]) == (18, [])


def test_a_picture_that_is_gone_or_cut_off_fails_alone_at_a_server(items, talk, journal, tmp_path):
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    with serving(tmp_path) as (_, url):
        conversations = talk(items[:4])
        assert answer_all(served(url), conversations, journal, 0, 1)
    errors = [c.result().get("error") for c in conversations]
    assert errors == [None, "image_missing", "image_unreadable", None]


def test_an_item_that_does_not_fit_alone_is_named(local, items, talk, journal, monkeypatch):
    system, error = local(), torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(system.backend, "compute", Mock(side_effect=error))
    with pytest.raises(DataError, match="'t/4': out of memory with it alone"):
        answer_all(system, talk(items[4:5]), journal, 0, 1)


def test_the_next_batch_is_made_ready_while_one_is_computed(local, items, talk, journal, monkeypatch):
    """A batch's computation waits here until another thread has opened the pictures of the next one."""
    system, opened, began, computed = local(2), [], threading.Condition(), []
    prepare, compute = system.backend.prepare, system.backend.compute

    def note(batch):
        prepared = prepare(batch)
        with began:
            opened.append(threading.current_thread())
            began.notify_all()
        return prepared

    def wait(prepared):
        computed.append(prepared)
        with began:
            assert began.wait_for(lambda: len(opened) > min(len(computed), 4), timeout=30)
        return compute(prepared)

    monkeypatch.setattr(system.backend, "prepare", note)
    monkeypatch.setattr(system.backend, "compute", wait)
    assert answer_all(system, talk(items), journal, 0, 1)
    assert len(opened) == len(computed) == 5 and threading.main_thread() not in opened


# ---- sampling
def test_ids_are_drawn_by_the_softmax_and_the_request_s_seed():
    logits = torch.tensor([1.0, 2.0, -1.0, 0.0])
    choose = sampler(0.5)
    drawn = [choose(Request(f"{n:08x}", None, "", (), 1))(logits, 0) for n in range(0, 8000, 2)]
    expected = 4000 * (logits.double() / 0.5).softmax(0).numpy()
    assert chisquare(np.bincount(drawn, minlength=4), expected).pvalue > 0.01
    one, again, other = (choose(Request(key, None, "", (), 1)) for key in ("0" * 8, "0" * 8, "f" * 8))
    row = [[pick(logits, n) for n in range(40)] for pick in (one, again, other)]
    assert row[0] == row[1] != row[2]
    assert {sampler(1e-3)(Request("0" * 8, None, "", (), 1))(logits, n) for n in range(20)} == {1}
