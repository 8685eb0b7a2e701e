"""Benchmark items: checked on reading, asked in fixed words."""
import pytest
from samples import table

from utils.items import ANSWER_TYPES, question_text, read_items
from utils.jsonl import DataError, write_rows

ITEM = {"id": "a/1", "question": "What color is it?", "options": [["A", "red"], ["B", "blue"]],
        "answer": {"type": "letter", "value": "B"}, "images": [{"path": "a.png"}], "metric": "mcq"}


def test_multiple_choice_is_asked_in_vlmevalkit_s_words():
    words = ("Question: What color is it?\nOptions:\nA. red\nB. blue\n"
             "Please select the correct answer from the options above. \n")
    assert question_text(ITEM) == words
    assert question_text(ITEM | {"hint": "Look."}, "\nBox it.") == f"Hint: Look.\n{words}\nBox it."
    path = ITEM | {"metric": "vsp_path", "question": "Find <image> a path"}
    assert question_text(path) == path["question"]


@pytest.mark.parametrize("case", table("bad_items"), ids=lambda case: case["match"])
def test_a_bad_item_is_named(tmp_path, case):
    write_rows(tmp_path / "items.jsonl", [ITEM, {**ITEM, "id": "a/2", **case["change"]}])
    with pytest.raises(DataError, match=case["match"]):
        read_items(tmp_path / "items.jsonl")


@pytest.mark.parametrize("metric, kind, good, bad", [
    ("wtq", "values", ["a", "b"], [[], "a", [1], None]), ("tabfact", "bool", False, [1, "1", None]),
    ("yesno_pair", "yesno", "no", ["No", True, None]), ("unscored", "values", ["a"], [[], "a"])])
def test_golds_that_are_no_letter_are_checked_too(tmp_path, metric, kind, good, bad):
    item = ITEM | {"metric": metric, "options": [], "answer": {"type": kind, "value": good}}
    known = tuple(ANSWER_TYPES)
    write_rows(tmp_path / "items.jsonl", [item])
    assert read_items(tmp_path / "items.jsonl", metrics=known) == [item]
    with pytest.raises(DataError, match="expected one of mcq, vsp_path"):  # a script scores what it names
        read_items(tmp_path / "items.jsonl")
    for value in bad:
        write_rows(tmp_path / "items.jsonl", [item | {"answer": {"type": kind, "value": value}}])
        with pytest.raises(DataError, match="'a/1': gold .*expected"):
            read_items(tmp_path / "items.jsonl", metrics=known)


def test_good_items_come_back_as_they_are(tmp_path):
    items = [ITEM, {**ITEM, "id": "a/2", "category": "x", "raw": {"kept": 1}}]
    write_rows(tmp_path / "items.jsonl", items)
    assert read_items(tmp_path / "items.jsonl") == items
    assert read_items(tmp_path / "items.jsonl", 1) == items[:1]


