"""The rules for rows and captions: at least one accepted and one rejected case each."""
import pytest
from samples import row, table

from utils.jsonl import DataError
from utils.rows import (CAPTION_REASONS, caption_fault, check_own, check_rows, find_markup, has_loop,
                        parse_options, row_fault)


@pytest.mark.parametrize("text, loops", [
    ("the cat sat on the mat and looked at the dog that ran past the house", False),
    ("the cat is red the cat is red the cat is red the cat is red", True), ("a\nb\na\nc\na", True),
    ("a\nb\na\nc", False), ("no no no no", False), ("", False)])
def test_has_loop(text, loops):
    assert has_loop(text) is loops


@pytest.mark.parametrize("reason", [None, *CAPTION_REASONS])
def test_caption_fault(reason):
    texts = [case["caption"] for case in table("captions") if case["reason"] == reason]
    assert texts and {text: caption_fault(text) for text in texts} == dict.fromkeys(texts, reason)


@pytest.mark.parametrize("question, options", [
    ("What?\nOptions:\nA. a cat\nB. a dog\nPlease select", {"A": "a cat", "B": "a dog"}),
    ("(A) x\n(B) y", {"A": "x", "B": "y"}), ("A. only one", {}), ("B. x\nC. y", {}), ("What is it?", {}),
    ("    - A. Success.\n    - B. Fail.", {"A": "Success.", "B": "Fail."}),
    ("I saw A. Smith and B. Jones", {})])
def test_parse_options(question, options):
    assert parse_options(question) == options


def test_row_fault():
    for case in table("row_faults"):
        assert row_fault(row(**case["changes"])) == case["reason"], case


@pytest.mark.parametrize("char", ["\0", "\x07", "\x08", "\x1b", "\x7f", "\x9b"])
def test_a_control_character_rejects_a_row_wherever_it_stands(char):
    text, other = f"I look{char} closer.", row()
    steps = other["steps"]
    for changes in ({"question": f"What{char}?"}, {"answer": f"42{char}"}, {"chain": other["chain"] + char},
                    {"steps": [{"text": text}, *steps[1:]]},
                    {"steps": [steps[0], steps[1] | {"caption": text}, steps[2]]}):
        assert row_fault(row(**changes)) == "control" and row_fault(other) is None
    assert caption_fault(f"a red{char} boat") == "caption_markup" and find_markup(text) == {char}


@pytest.mark.parametrize("changes, match", [
    ({"images": [1]}, "field 'images' should be a list of paths"), ({"steps": ["text"]}, "step 1 should be"),
    ({"steps": [{"text": 1}]}, "step 1 should be"),
    ({"steps": [{"image": "a", "operation": "cut"}]}, "step 1 should be"),
    ({"steps": [{"text": "a"}, {"image": "a"}]}, "step 2 should be")])
def test_check_own(changes, match):
    check_own("x:1", row())
    with pytest.raises(DataError, match=f"x:1: {match}"):
        check_own("x:1", row(**changes))


def test_check_rows_keeps_the_first_accepted_duplicate(tmp_path, picture, capsys):
    picture("a.png"), picture("b.png", color="blue"), picture("copy.png")
    rows = [row(id="bad", steps=[]), row(id="no file", images=["no.png"]), row(id="first"),
            row(id="same", images=["copy.png"]), row(id="other", question="Another?")]
    checked = check_rows(rows, tmp_path)
    assert [one.reason for one in checked] == ["structure", "image_missing", None, "duplicate", None]
    assert checked[3].detail.endswith("of first") and len(checked[2].hashes) == 2
    with pytest.raises(DataError, match="--image_root .*nowhere: no such folder"):
        check_rows(rows, tmp_path / "nowhere")
    assert "no row has its images" not in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    assert {one.reason for one in check_rows(rows[1:], tmp_path / "elsewhere")} == {"image_missing"}
    err = capsys.readouterr().err
    assert "no row has its images under --image_root" in err and "elsewhere/no.png" in err
