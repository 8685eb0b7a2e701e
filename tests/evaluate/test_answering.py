"""Who answers: batches, turns with a tool, servers, processes.    pytest tests/test_systems.py"""
import json
import threading

import pytest
import torch
from fault_server import calls_of, serving
from PIL import Image

import evaluate
from utils.evaluate.answering import Conversation, Local, Served, answer_all, render, replay
from utils.evaluate.prompts import ASKED, MAX_TURNS, PROTOCOLS
from utils.items import chat
from utils.journal import Journal
from utils.jsonl import DataError, write_rows
from utils.openai_backend import HttpBackend
from utils.qwen import load

CALL = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 40, 30]}}</tool_call>'


@pytest.fixture
def items(tmp_path):
    """Nine items whose pictures and questions have unlike lengths."""
    for n in range(9):
        image = Image.new("RGB", (56 + 28 * (n % 3), 84), (20 * n, 90, 40))
        image.paste("white", (0, 0, 20 + n, 30))
        image.save(tmp_path / f"{n}.png")
    return [{"id": f"t/{n}", "question": "What is it? " * (1 + 3 * n % 7),
             "options": [["A", "red"], ["B", "blue"]],
             "metric": "mcq", "answer": {"type": "letter", "value": "A"}, "images": [{"path": f"{n}.png"}]}
             for n in range(9)]


def talk(items, root, method="direct", protocol="plain"):
    return [Conversation(item, PROTOCOLS[protocol], str(root), method, {}) for item in items]


def test_a_prompt_is_the_one_turn_that_other_scripts_write(tiny_checkpoint, items, tmp_path):
    tokenizer = load(str(tiny_checkpoint), device="cpu").tokenizer
    item = items[0] | {"question": "Here <image> and <|im_end|> there?"}
    for name in ("plain", "monet"):
        conversation = talk([item], tmp_path, protocol=name)[0]
        words = conversation.messages[-1][1]
        assert [type(part).__name__ for part in words] == ["str", "Picture",
                                                           "str"] and "<|im_end|>" not in words[2]
        text = words[0] + "<image>" + words[2]
        assert render(tokenizer, conversation.messages) == chat(tokenizer, text, 1, PROTOCOLS[name].system)


def test_batches_are_bounded_sorted_and_the_same_for_any_number_of_processes(tiny_checkpoint, items,
                                                                             tmp_path):
    qwen = load(str(tiny_checkpoint), device="cpu")
    local, everyone = Local(qwen, None, 10, 4, 10**6), talk(items, tmp_path)
    whole = local.batches(everyone, 0, 1)
    assert sorted(c.item["id"] for batch in whole for c in batch) == sorted(item["id"] for item in items)
    assert all(len(batch) <= 4 for batch in whole)
    lengths = [local.length(c) for batch in whole for c in batch]
    assert lengths == sorted(lengths, reverse=True)
    for world in (2, 3):
        shares = [local.batches(everyone, rank, world) for rank in range(world)]
        assert [batch for k in range(len(whole)) for batch in shares[k % world][k // world:k // world
                                                                                + 1]] == whole
    budget = 3 * (max(lengths) + 10)
    bounded = Local(qwen, None, 10, 100, budget).batches(talk(items, tmp_path), 0, 1)
    assert all(len(batch) * (max(map(local.length, batch)) + 10) <= budget
               for batch in bounded) and len(bounded) > 2


class Scripted:
    """Stands in for a system: says the next of `replies` to every conversation; `asked` are the prompts
    shown."""

    pixels, prepare = [None, None], None

    def __init__(self, *replies):
        self.replies, self.asked = replies, []

    def batches(self, conversations, rank, world):
        return [conversations]

    def render(self, messages):
        return json.dumps([[role, str(parts)] for role, parts in messages])

    def answer(self, batch, journal, prepared=None):
        for c in batch:
            self.asked.append(c.messages)
            yield {"key": c.key, "raw_output": "",
                   "clean_output": self.replies[min(len(c.turns), len(self.replies) - 1)],
                   "finish_reason": "stop", "n_tokens": 5, "n_latent": 0, "image_grids": [], "seconds": 0.5}


@pytest.mark.parametrize("replies, ended_by, n_turns", [
    ((CALL, "<answer>A</answer>"), "answer", 2), (("It is red.",), "no_call", 1),
    (("<tool_call>x</tool_call>",), "bad_call", 1),
    ((CALL,), "turns", MAX_TURNS)])
def test_a_conversation_with_the_tool_goes_on_until_it_ends(items, tmp_path, replies, ended_by, n_turns):
    system, conversation = Scripted(*replies), talk(items[:1], tmp_path, "tool", "deepeyes")[0]
    with Journal(tmp_path / "run") as journal:
        assert answer_all(system, [conversation], journal, 0, 1)
        assert len(journal) == n_turns == len(system.asked)  # every turn has a key of its own
        again = talk(items[:1], tmp_path, "tool", "deepeyes")
        assert replay(system, again, journal) and again[0].result() == conversation.result()
    result = conversation.result()
    assert (conversation.ended_by, result["ended_by"], len(result["turns"]), result["n_tokens"]) == (
        ended_by, ended_by, n_turns, 5 * n_turns)
    assert conversation.seconds() == 0.5 * n_turns
    if n_turns > 1:
        user = system.asked[1][-1]
        assert (user[0], user[1][0], user[1][2:]) == ("user", "<tool_response>", (ASKED, "</tool_response>"))
        assert (user[1][1].box, result["turns"][0]["box"],
                result["turns"][-1]["box"]) == ((0, 0, 40, 30), [0, 0, 40, 30], None)
        assert system.asked[1][-2] == ("assistant", CALL)


def test_a_missing_record_leaves_conversations_as_they_were(items, tmp_path):
    system, both = Scripted("hello"), talk(items[:2], tmp_path)
    with Journal(tmp_path / "run") as journal:
        assert answer_all(system, both[:1], journal, 0, 1)
        fresh = talk(items[:2], tmp_path)
        assert not replay(system, fresh, journal) and [c.ended_by
                                                       for c in fresh] == [None, None] and not fresh[0].turns


def test_a_checkpoint_takes_turns_with_the_tool_and_is_shown_the_region(tiny_checkpoint, items, tmp_path,
                                                                        monkeypatch):
    """The random checkpoint calls no tool, so its words are put into its mouth; the region comes as a picture
    of its own."""
    local = Local(load(str(tiny_checkpoint), device="cpu"), None, 4, 4, 10**6)
    said = iter([CALL, CALL, "<answer>A</answer>", "<answer>B</answer>"])
    describe = local.describe
    monkeypatch.setattr(local, "describe", lambda row: describe(row) | {"clean_output": next(said)})
    conversations = talk(items[:2], tmp_path, "tool", "deepeyes")
    with Journal(tmp_path / "run") as journal:
        assert answer_all(local, conversations, journal, 0, 1)
    for conversation in conversations:
        result = conversation.result()
        assert (result["ended_by"], len(result["turns"]), len(result["image_grids"])) == ("answer", 2, 2)
        assert result["image_grids"][1] == [1, 4, 6]  # 40 x 30 pixels, enlarged to 2 x 3 tokens


def test_a_server_is_asked_all_at_once_with_pictures_where_they_stand(items, tmp_path):
    with serving(tmp_path) as (_, url):
        system = Served(HttpBackend("m", url, 10**6, 28, 8, 20.0, 5.0), 64, 10**6)
        conversations = talk(items, tmp_path, "tool", "deepeyes")
        with Journal(tmp_path / "run") as journal:
            assert answer_all(system, conversations, journal, 0, 1)
            assert answer_all(system, talk(items, tmp_path, "tool", "deepeyes"), journal, 0, 1)
        calls = calls_of(tmp_path)
    assert len(calls) == 2 * len(items) and [len(call["images"]) for call in calls] == [1] * len(calls)
    results = [conversation.result() for conversation in conversations]
    assert {(r["ended_by"], r["clean_output"])
            for r in results} == {("answer", "<think>I see.</think> <answer>A</answer>")}
    assert all(r["turns"][0]["box"] == [0, 0, 40, 30] and r["n_tokens"] == 18 and r["image_grids"] == []
               for r in results)


def test_a_picture_that_is_gone_or_cut_off_is_an_error_of_its_item_alone(items, tmp_path):
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    with serving(tmp_path) as (_, url), Journal(tmp_path / "run") as journal:
        conversations = talk(items[:4], tmp_path)
        assert answer_all(Served(HttpBackend("m", url, 10**6, 28, 8, 20.0, 5.0), 64, 10**6), conversations,
                          journal, 0, 1)
    assert [c.result().get("error") for c in conversations] == [None, "image_missing", "image_unreadable",
                                                                None]


def test_one_two_and_three_processes_write_the_same_bytes(tiny_checkpoint, items, tmp_path, monkeypatch):
    """Under the environment that torchrun sets, one rank after the other: the last one to finish writes."""
    write_rows(tmp_path / "items.jsonl", items)
    for world in (1, 2, 3):
        for rank in range(world):
            assert not (tmp_path / f"{world}.jsonl").exists()
            for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
                monkeypatch.setenv(name, str(value))
            assert evaluate.main(["--items", str(tmp_path / "items.jsonl"), "--model", str(tiny_checkpoint),
                                  "--output",
                                  str(tmp_path / f"{world}.jsonl"), "--protocol", "plain", "--max_new_tokens",
                                  "12",
                                  "--batch_size", "2", "--dtype", "float32"]) == 0
    files = [(tmp_path / f"{world}.jsonl").read_bytes() for world in (1, 2, 3)]
    assert len(files[0].splitlines()) == 9 and files[0] == files[1] == files[2]


def test_out_of_memory_splits_a_batch_and_one_that_does_not_fit_alone_is_named(tiny_checkpoint, items,
                                                                               tmp_path, monkeypatch):
    local, fits = Local(load(str(tiny_checkpoint), device="cpu"), None, 4, 4, 10**6), 1
    compute = local.compute

    def short_of_memory(ready, inputs):
        if len(ready) > fits:
            raise torch.OutOfMemoryError("no room")
        return compute(ready, inputs)

    monkeypatch.setattr(local, "compute", short_of_memory)
    conversations = talk(items[:4], tmp_path)
    with Journal(tmp_path / "run") as journal:
        assert answer_all(local, conversations, journal, 0, 1)
        assert [c.ended_by for c in conversations] == ["reply"] * 4 and len(journal) == 4
        fits = 0
        with pytest.raises(DataError, match="'t/4': out of memory with it alone"):
            answer_all(local, talk(items[4:5], tmp_path), journal, 0, 1)


def test_the_next_batch_is_made_ready_while_one_is_computed(tiny_checkpoint, items, tmp_path, monkeypatch):
    """A batch's computation waits here until the pictures of the one after it have been opened, by another
    thread."""
    local, opened, began = Local(load(str(tiny_checkpoint), device="cpu"), None, 2, 2,
                                 10**6), [], threading.Condition()
    prepare, compute, computed = local.prepare, local.compute, []

    def note(batch):
        found = prepare(batch)
        with began:
            opened.append(threading.current_thread())
            began.notify_all()
        return found

    def wait(ready, inputs):
        computed.append(ready)
        with began:
            assert began.wait_for(lambda: len(opened) > min(len(computed), 4), timeout=30)
        return compute(ready, inputs)

    monkeypatch.setattr(local, "prepare", note), monkeypatch.setattr(local, "compute", wait)
    with Journal(tmp_path / "run") as journal:
        assert answer_all(local, talk(items, tmp_path), journal, 0, 1)
    assert len(opened) == len(computed) == 5 and threading.main_thread() not in opened
