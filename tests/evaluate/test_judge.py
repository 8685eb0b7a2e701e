"""Judges behind a real server process: good, garbled, slow, down, and repaired between runs."""
from dataclasses import asdict

import pytest
from fault_server import calls_of, serving
from samples import table

from utils.backends import Reply
from utils.evaluate.judge import TRIES, Judge, add_verdicts, parse, question_for
from utils.journal import Journal
from utils.jsonl import DataError, call_key
from utils.openai_backend import HttpBackend

ITEM = {"id": "1", "metric": "mcq", "question": "What colour?", "options": [["A", "red"], ["B", "blue"]],
        "answer": {"type": "letter", "value": "B"}}


@pytest.fixture
def open_judge(tmp_path):
    """Return open(kind, url, ...) -> judge; all journals lie in one folder."""
    journals = []

    def opened(kind, url, model="judge", wait=2.0):
        while journals:
            journals.pop().__exit__()
        journals.append(Journal(tmp_path / "run", name="judge"))
        return Judge(kind, HttpBackend(model, url, 1, 28, 8, 20.0, wait), journals[-1], 64)
    yield opened
    journals and journals[-1].__exit__()


@pytest.mark.parametrize("case", table("judge_replies"))
def test_which_replies_of_a_judge_count(case):
    """VLMEvalKit's own parser reads "The answer is blue." as B, Monet's reads "I do not know" as no."""
    assert parse(case["kind"], ITEM, case["reply"], case.get("finish")) == case["parsed"]


def test_map_never_sees_the_gold_answer_and_grade_does():
    other = ITEM | {"answer": {"type": "letter", "value": "A"}}
    assert question_for("map", ITEM, "it") == question_for("map", other, "it")
    assert "Right answer: B. blue" in question_for("grade", ITEM, "it")
    assert "Reply: {gold} \\boxed{q}" in question_for("grade", ITEM, "{gold} \\boxed{q}")  # braces are text
    table = {"metric": "wtq", "question": "who?", "options": [], "answer": {"value": ["Apple", "Pear"]}}
    assert question_for("map", table, "it") is None
    assert "Right answer: Apple, Pear" in question_for("grade", table, "it")
    assert question_for("grade", table | {"metric": "vsp_path"}, "it") is None


def test_a_good_judge_is_asked_once_per_question_and_never_again(open_judge, tmp_path):
    asked = [(ITEM, "It could be blue"), (ITEM, "no idea"), (ITEM | {"id": "2"}, "It could be blue")]
    with serving(tmp_path) as (_, url):
        first = open_judge("map", url).decide(asked)
        assert [(verdict["parsed"], verdict["right"], verdict["attempts"]) for verdict in first] == [
            ("B", True, 1), ("Z", False, 1), ("B", True, 1)]
        assert [call["temperature"] for call in calls_of(tmp_path)] == [0.0, 0.0]
        # from the journal
        assert open_judge("map", url).decide(asked) == first and len(calls_of(tmp_path)) == 2
        open_judge("map", url, model="other").decide(asked[:1])
        assert len(calls_of(tmp_path)) == 3  # another judge is asked for itself


def test_a_journal_of_an_earlier_version_is_read(open_judge):
    judge = open_judge("map", "http://127.0.0.1:9/v1", wait=0.1)
    for attempt, reply in ((1, "A"), (0, "Well.")):
        key = call_key(judge=judge.caller.identity, prompt=question_for("map", ITEM, "blue"), attempt=attempt,
                       max_tokens=64)
        judge.caller.journal.append(asdict(Reply(key, reply, "stop", 9, 1, 0.1)))
    verdict = judge.decide([(ITEM, "blue")])[0]
    assert (verdict["reply"], verdict["parsed"], verdict["attempts"]) == ("A", "A", 2)


def test_a_garbled_judge_fails_without_a_guess_and_is_asked_again_once_repaired(open_judge, tmp_path):
    asked = [(ITEM, "fault:prose It could be blue"), (ITEM, "fault:late it is red"),
             (ITEM, "fault:null blue")]
    with serving(tmp_path) as (_, url):
        verdicts = open_judge("map", url).decide(asked)
        assert [(verdict["parsed"], verdict["right"], verdict["attempts"]) for verdict in verdicts] == [
            (None, None, TRIES), ("A", False, 2), (None, None, TRIES)]
        assert verdicts[0]["error"] == "no usable reply"
        assert sum("fault:prose" in call["text"] for call in calls_of(tmp_path)) == TRIES
    with serving(tmp_path, name="repaired.jsonl", faults=False) as (_, url):
        assert [verdict["parsed"] for verdict in open_judge("map", url).decide(asked)] == ["B", "A", "B"]
        assert len(calls_of(tmp_path, "repaired.jsonl")) == 2  # a usable reply is not asked for again


def test_a_judge_that_goes_away_leaves_failures(open_judge, tmp_path):
    with serving(tmp_path) as (_, url):
        [found] = open_judge("map", url, wait=1.0).decide([(ITEM, "fault:kill blue")])
    assert "no server has answered for 1 of" in found["error"] and found["parsed"] is None


def test_preflight_stops_where_a_plain_case_is_wrong(open_judge, tmp_path, monkeypatch):
    with serving(tmp_path) as (_, url):
        for kind in ("map", "grade"):
            open_judge(kind, url).preflight()
        monkeypatch.setattr("utils.evaluate.judge.TEST_REPLY", "fault:prose It is blue.")
        with pytest.raises(DataError, match="--judge map judge: asked .* it said 'I would rather talk"):
            open_judge("map", url).preflight()


def test_a_verdict_of_ours_is_never_overruled_and_empty_replies_are_not_asked_about(open_judge, tmp_path):
    def results():
        return [{"clean_output": text, "verdict": verdict, "compat": {"vk": letter}}
                for text, verdict, letter in (
                    ("It could be blue", "unresolved", None), ("red!", "correct", "A"),
                    ("blue?", "incorrect", None), ("", "unresolved", None), (None, "error", None),
                    ("fault:prose", "unresolved", None))]

    with serving(tmp_path) as (_, url):
        some, fewer = results(), results()
        add_verdicts(open_judge("map", url), [ITEM] * 6, some)
        assert [r["judged"] for r in some] == ["correct", "correct", "incorrect", "unresolved", "error",
                                               "judge_error"]
        assert [bool(r["judge"]) for r in some] == [True, False, True, False, False, True]  # third: compat
        add_verdicts(open_judge("grade", url), [ITEM] * 6, fewer)
        assert [r["judge"] is not None for r in fewer] == [True, False, False, False, False, True]
        assert [r["judged"] for r in fewer] == [r["judged"] for r in some]
