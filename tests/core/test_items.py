"""Benchmark items: checked on reading, asked in fixed words."""
import pytest
from PIL import Image
from samples import table

from utils.images import ImageError
from utils.intervene.prompts import open_helper
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


def test_the_helper_is_its_own_image_or_the_region_enlarged(tmp_path, picture):
    picture("helper.png", (56, 56), "blue")
    board = Image.new("RGB", (300, 200), "white")
    board.paste((255, 0, 0), (100, 50, 120, 90))
    regional = ITEM | {"region": [100, 50, 120, 90]}
    assert open_helper(ITEM, [board], tmp_path) is None
    crop = open_helper(regional, [board], tmp_path)
    assert crop.getcolors() == [(crop.width * crop.height, (255, 0, 0))]
    assert crop.width * crop.height >= 224 * 224 and crop.height / crop.width == pytest.approx(2, rel=0.1)
    assert open_helper(regional | {"helper": {"path": "helper.png"}}, [board], tmp_path).size == (56, 56)
    with pytest.raises(ImageError, match="no such image"):
        open_helper(ITEM | {"helper": {"path": "none.png"}}, [board], tmp_path)
