"""The rules for rows and captions: at least one accepted and one rejected case each.

    python -m pytest tests/core/test_row_rules.py
"""
import pytest

from utils import model_calls, row_rules
from utils.jsonl import DataError
from utils.row_rules import caption_fault, check_own, check_rows, has_loop, parse_options, row_fault


@pytest.mark.parametrize("text, loops", [
    ("the cat sat on the mat and looked at the dog that ran past the house", False),
    ("the cat is red the cat is red the cat is red the cat is red", True), ("a\nb\na\nc\na", True),
    ("a\nb\na\nc", False),
    ("no no no no", False), ("", False)])
def test_has_loop(text, loops):
    assert has_loop(text) is loops


@pytest.mark.parametrize("text, reason", [
    ("The hull shows a white 42.", None), ("a red circle with the digit 7", None), ("", "caption_empty"),
    (" \n", "caption_empty"),
    ("Boat", "caption_short"), ("STOP sign", None), ("word " + " ".join(map(str, range(120))),
                                                     "caption_long"),
    (" ".join(map(str, range(120))), None), ("I'm sorry, I can't help with that.", "caption_refusal"),
    ("I cannot see any number here.", "caption_refusal"), ("As an AI, it is dark.", "caption_refusal"),
    ("The small print cannot be made out.", None), ("The image shows a red boat.", "caption_meta"),
    ("This cropped region depicts a boat.", "caption_meta"), ("Here is the caption: a red boat.",
                                                              "caption_meta"),
    ("Description: a red boat.", "caption_meta"), ("A boat, to answer the question.", "caption_meta"),
    ("A poster with a picture of a boat above the entrance.", None),
    ("A sign with a question mark in the image.", None), ("red red red red red red red red red red",
                                                          "caption_loop"),
    ("A boat <|im_end|> with 42.", "caption_markup"), ("A boat </think_image> with 42.", "caption_markup"),
    ("A <box>1,2</box> boat", "caption_markup"), ("The number is \\boxed{42}", "caption_markup"),
    ("See [IMG 1] here", "caption_markup"),
    ("```json a boat```", "caption_markup"), ("x <image> y", "caption_markup"),
    ("Values with a < b and c > d", None),
    ("The boat shows 42, so the answer is 42.", "caption_leak"), ("Answer: B", "caption_leak"),
    ("Option B is correct here.", "caption_leak"), ("A sign reads 'answer the phone'.", None)])
def test_caption_fault(text, reason):
    assert caption_fault(text) == reason


@pytest.mark.parametrize("question, options", [
    ("What?\nOptions:\nA. a cat\nB. a dog\nPlease select", {"A": "a cat", "B": "a dog"}),
    ("(A) x\n(B) y", {"A": "x", "B": "y"}),
    ("    - A. Success.\n    - B. Fail.", {"A": "Success.", "B": "Fail."}), ("A. only one", {}),
    ("B. x\nC. y", {}),
    ("I saw A. Smith and B. Jones", {}), ("What is it?", {})])
def test_parse_options(question, options):
    assert parse_options(question) == options


def own_row(**changes) -> dict:
    steps = [{"text": "I look closer."}, {"image": "b.png", "operation": "zoom"},
             {"text": "The answer is \\boxed{42}."}]
    return {"id": "s/1", "subset": "s", "images": ["a.png"], "question": "What number is on the boat?",
            "answer": "42",
            "steps": steps} | changes


FINAL = {"text": "So \\boxed{B}."}
OPTIONS = "Which?\nOptions:\nA. a cat\nB. a dog\nPlease select the correct answer from the options above. \n"


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"images": []}, "structure"), ({"steps": []}, "structure"),
    ({"steps": [{"text": "\\boxed{42}"}]}, "structure"),
    ({"steps": own_row()["steps"][:2]}, "structure"), ({"question": " \n"}, "question"),
    ({"question": "Which one?\nOptions:\n"}, "question"),
    ({"question": "Which one?\nOptions:\nPlease select."},
                                                           "question"),
    ({"question": "<image> or <image>?"}, "question"), ({"question": "What is in <image>?"}, None),
    ({"answer": ""}, "answer"),
    ({"answer": "43"}, "answer"), ({"steps": own_row()["steps"][:2] + [{"text": "It is 42."}]}, "answer"),
    ({"question": OPTIONS, "answer": "B", "steps": own_row()["steps"][:2] + [FINAL]}, None),
    ({"question": OPTIONS, "answer": "a dog", "steps": own_row()["steps"][:2] + [FINAL]}, None),
    ({"question": OPTIONS, "answer": "(B)", "steps": own_row()["steps"][:2] + [FINAL]}, None),
    ({"question": OPTIONS, "answer": "C", "steps": own_row()["steps"][:2] + [{"text": "\\boxed{C}"}]},
     "answer")])
def test_row_fault(changes, reason):
    assert row_fault(own_row(**changes)) == reason


@pytest.mark.parametrize("changes, match", [
    ({"images": [1]}, "x:1: field 'images' should be a list of paths"),
    ({"steps": ["text"]}, "x:1: step 1 should be"),
    ({"steps": [{"text": 1}]}, "x:1: step 1 should be"), ({"steps": [{"image": "a", "operation": "cut"}]},
                                                          "step 1 should be"),
    ({"steps": [{"text": "a"}, {"image": "a"}]}, "step 2 should be")])
def test_check_own(changes, match):
    check_own("x:1", own_row())
    with pytest.raises(DataError, match=match):
        check_own("x:1", own_row(**changes))


def test_check_rows_keeps_the_first_sound_duplicate(tmp_path, picture, capsys):
    picture("a.png"), picture("b.png", color="blue"), picture("copy.png")
    rows = [own_row(id="bad", steps=[]), own_row(id="no file", images=["no.png"]), own_row(id="first"),
            own_row(id="same", images=["copy.png"]), own_row(id="other", question="Another?")]
    found = check_rows(rows, tmp_path)
    assert [reason for reason, _, _ in found] == ["structure", "image_missing", None, "duplicate", None]
    assert found[3][1].endswith("of first") and len(found[2][2]) == 2
    with pytest.raises(DataError, match="--image_root .*nowhere: no such folder"):
        check_rows(rows, tmp_path / "nowhere")
    assert "no row has its images" not in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    assert {look.reason for look in check_rows(rows[1:], tmp_path / "elsewhere")} == {"image_missing"}
    assert "no row has its images under --image_root" in (
        err := capsys.readouterr().err) and "elsewhere/no.png" in err


def test_closed_reasons_are_distinct():
    groups = (model_calls.ERROR_REASONS, row_rules.ROW_REASONS, row_rules.CAPTION_REASONS)
    assert len({reason for group in groups for reason in group}) == sum(map(len, groups))
