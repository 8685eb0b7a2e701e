"""Items answered by a server that sends whatever servers send: what is kept, counted, told, asked again."""
import json
import random
import re

import pytest
from fault_server import ZOOM, any_answer, calls_of, raw, serving
from processes import run_here, words

from utils import openai_backend
from utils.evaluate.prompts import ASKED
from utils.jsonl import load_object, write_rows

BOX = json.loads(ZOOM["function"]["arguments"])["bbox_2d"]


@pytest.fixture
def ask(tmp_path, picture, monkeypatch, capsys):
    """Return ask(questions, *flags) -> (exit code, results, metrics, stderr, calls of this run)."""
    for name in ("FIRST_WAIT_S", "SHORTEST_WAIT_S"):
        monkeypatch.setattr(openai_backend, name, 0.02)
    picture("a.png", (84, 84))

    def run(questions: list[str], *flags: str, faults: bool = True) -> tuple:
        write_rows(tmp_path / "items.jsonl", [
            {"id": f"t/{n}", "question": f"{n}? {text}", "metric": "mcq", "images": [{"path": "a.png"}],
             "options": [["A", "red"], ["B", "blue"]], "answer": {"type": "letter", "value": "A"}}
            for n, text in enumerate(questions)])
        before, output = len(calls_of(tmp_path)), tmp_path / "out.jsonl"
        with serving(tmp_path, latency=0, faults=faults) as (_, url):
            code = run_here("evaluate", [*flags, *words(items=tmp_path / "items.jsonl", output=output,
                                                        model="m", backend="openai", base_url=url)])
        calls = calls_of(tmp_path)[before:]
        if code in (2, 4):
            return code, None, None, capsys.readouterr().err, calls
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return code, rows, load_object(f"{output}.metrics.json"), capsys.readouterr().err, calls
    return run


def test_whatever_a_server_sends_the_same_command_goes_on(ask, tmp_path):
    """100 answers: each is a finished reply or an error, a second run reads what the first has written, and
    asks again only for lost calls."""
    rng = random.Random(0)
    questions = [any_answer(rng) for _ in range(100)]
    code, results, metrics, _, _ = ask(questions, "--no_guard")
    errors = {result["id"] for result in results if result["verdict"] == "error"}
    assert code == 3 and 20 < len(errors) == metrics["error"] < 90
    for result in results:
        assert ("error" in result) == (result["id"] in errors) and result.get("error") != ""
        assert "error" in result or result["finish_reason"] in ("stop", "length", "tool_calls")
    lost = {result["id"] for result in results if result.get("error", "").startswith("finish_reason")}
    written = (tmp_path / "out.jsonl").read_bytes()
    code, _, _, _, calls = ask(questions, "--no_guard")
    assert code == 3 and (tmp_path / "out.jsonl").read_bytes() == written
    assert 5 * len(lost) == len(calls) > 0
    code, results, metrics, _, calls = ask(questions, "--retry_errors", faults=False)
    assert code == 0 and metrics["error"] == 0 and len(calls) == len(errors)


def test_what_an_earlier_version_took_for_a_reply_is_asked_again(ask, tmp_path):
    journal = tmp_path / "out.jsonl.run" / "calls-00000-of-00001.jsonl"
    _, before, _, _, _ = ask(["", "", "", ""])
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    for record, finish in zip(records, ({"type": "stop"}, "abort", None)):
        record["finish_reason"] = finish
    write_rows(journal, records)
    code, results, _, _, calls = ask(["", "", "", ""])
    assert (code, len(calls), results) == (0, 3, before)
    assert not ask(["", "", "", ""])[-1]
    write_rows(journal, [records[3] | {"raw_output": 7}])
    code, _, _, err, _ = ask(["", "", "", ""])
    assert code == 2 and re.search("00001.jsonl:1: damaged journal line .*raw_output.*--fresh", err)


def test_a_reply_without_text_is_counted_and_told(ask):
    thought = raw(message={"content": None, "reasoning_content": "It is red."}, finish_reason="length")
    called = raw(message={"content": None, "tool_calls": [ZOOM]}, finish_reason="tool_calls")
    code, results, metrics, err, _ = ask(["", "", thought, thought, called, raw(message={"content": ""},
                                                                                finish_reason="stop")])
    assert (code, metrics["no_text"]) == (0, {"reasoning": 2, "tool_calls": 1, "nothing": 1})
    assert metrics["unresolved"] == 4 and "reasoning" not in results[0]
    assert [result.get("reasoning") for result in results[2:5]] == ["It is red.", "It is red.", None]
    assert results[4]["tool_calls"].startswith("<tool_call>")
    assert re.search("text: 2 with reasoning only .*, 1 with tool calls only .*, 1 with nothing", err)


def test_tool_calls_of_the_api_are_followed_like_written_ones_until_a_conversation_ends(ask, monkeypatch):
    called = raw(message={"content": "<think>Closer.</think>", "tool_calls": [ZOOM]},
                 finish_reason="tool_calls")
    alone = raw(message={"content": None, "tool_calls": [ZOOM]}, finish_reason="stop")
    broken = {"type": "function", "function": {"name": "image_zoom_in_tool", "arguments": "{"}}
    wrong = raw(message={"content": None, "tool_calls": [broken]}, finish_reason="tool_calls")
    written, none = (raw(message={"content": text}, finish_reason="stop")
                     for text in ("<tool_call>x</tool_call>", "It is red."))
    questions = ["", called, alone, wrong, written, none]
    code, results, metrics, _, calls = ask(questions, "--method", "tool")
    assert code == 0 and metrics["no_text"] == {}
    assert [result["ended_by"] for result in results] == ["answer"] * 3 + ["bad_call"] * 2 + ["no_call"]
    boxes = [[turn["box"] for turn in result["turns"]] for result in results]
    assert boxes == [[BOX, None]] * 3 + [[None]] * 3
    assert [result["n_tokens"] for result in results] == [18] * 3 + [9] * 3  # of all turns
    assert results[1]["turns"][0]["raw_output"].split() == results[0]["turns"][0]["raw_output"].split()
    shown = [call for call in calls if call["text"] == f"<tool_response>{ASKED}</tool_response>"]
    assert len(calls) == 9 and [len(call["images"]) for call in shown] == [1] * 3  # the region
    assert ask(questions, "--method", "tool")[1::3] == (results, [])  # from the journal
    monkeypatch.setattr("utils.evaluate.prompts.MAX_TURNS", 1)
    assert [result["ended_by"] for result in ask(["now"], "--method", "tool")[1]] == ["turns"]


def test_the_guard_stops_a_run_whose_calls_fail(ask):
    questions = ["fault:400"] * 30
    code, _, _, err, calls = ask(questions, "--concurrency", "2")
    assert code == 4 and 20 <= len(calls) <= 23
    assert "stopped: 20 of the last 20 calls failed, the last one by status 400: " in err
    assert "fault 400 for" in err
    code, _, metrics, _, _ = ask(questions, "--no_guard")
    assert (code, metrics["error"]) == (3, 30)
    code, _, metrics, _, calls = ask(questions, "--retry_errors", faults=False)
    assert (code, metrics["error"], len(calls)) == (0, 0, 30)


def test_fresh_moves_the_journal_aside(ask, tmp_path):
    ask(["", ""])
    code, _, _, err, _ = ask(["", ""], "--max_new_tokens", "9")
    assert code == 2 and "begun with other settings" in err
    for n in (1, 2):
        code, _, _, _, calls = ask(["", ""], "--max_new_tokens", "9", "--fresh")
        assert (code, len(calls)) == (0, 2) and (tmp_path / f"out.jsonl.run.old-{n}").is_dir()
