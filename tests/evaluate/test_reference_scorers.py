"""Other harnesses' verdicts, against what their own code answered."""
import json
import time

import pytest
from harness_table import OPTIONS, REPLIES
from samples import shortest_path

from utils.evaluate.reference_scorers import (mme_realworld, unescape, vlmevalkit_e8e78f0, vtabfact, vwtq,
                                              walk_vsp, without_label)

COL = OPTIONS["COL"]


@pytest.mark.parametrize("name, gold, reply, letter, mme, ours, rule", REPLIES)
def test_frozen_columns(name, gold, reply, letter, mme, ours, rule):
    options = OPTIONS[name]
    before = dict(options)
    assert (vlmevalkit_e8e78f0(reply, options), mme_realworld(reply)) == (letter, mme)
    assert options == before  # theirs lower-cases the texts in place


@pytest.mark.parametrize("reply, letter", [
    ("B one two three", "B"), ("B one two three four", None),  # among the last four words
    ("B one two three four five B", None), ("A or B", None), ("Z", "Z"), ("A Z", "A"),
    ("The correct answer is B. Here is why: a white cup would be A.", "B"), ("the ANSWER  IS **d", "D"),
    ("The answer is E.", None), ("Failed to obtain answer via API B", None),
    ("I can't process this file. B", "Z"), ("Failed to obtain answer via API: answer is B", None),
    ("-B-", None), ("<B>", None), ("{B}", "B"), ("infrared", "B"), ("Red", "B"), ("x" * 31 + " red", None),
    ("x" * 30 + " red", "B"), ("red or blue", None)])
def test_vlmevalkits_rules(reply, letter):
    """The four texts of COL sum to 17 characters, so a text counts in up to 34."""
    assert vlmevalkit_e8e78f0(reply, COL) == letter


def test_only_letters_that_are_options_are_inferred():
    for word, letter in (("certainly", None), ("below,", "B")):
        reply = f"The answer is {word} on this side of the river, as I said"
        assert vlmevalkit_e8e78f0(reply, {"A": "left", "B": "right"}) == letter


@pytest.mark.parametrize("reply, letter", [
    ("", "A"), ("c", "C"), ("blue", None), ("The best", None), ("Best answer: C", "C"),
    ("Best answer:Best option: C", "C"), ("The best option is C", "C"), ("Based on it, D", "B"),
    ("one two three four five six seven eight nine ten blue", None)])
def test_mme_realworlds_rules(reply, letter):
    assert mme_realworld(reply) == letter


@pytest.mark.parametrize("same, cases", [
    (True, [("2004.", "2004"), ("2004.0", "2004"), ("Freeman", "freeman"), ("Café", "cafe"),
            ("United States (USA)", "United States"), ("Apple||Banana", "Banana|Apple"), ("Apple†", "Apple"),
            ("Apple|Banana|apple", "Apple|Banana"), ("“Apple”", "apple"), ("a–b", "a-b"),
            ("Apple[1]", "Apple"), ("[1]", ""), ("a b\tc", "A B C"), ("2004-05-01", "2004-5-1"),
            ("xx-05-01", "xxxx-5-1"), ("2004-xx-xx", "2004"), ("1e3", "1000"), ("2.9999999", "2"),
            ("1.5000001", "1.5"), ("a\\pb", "a\\pb"), ("a\\nb", "a b"), ("", "")]),
    (False, [("The year is 2004", "2004"), ("\\boxed{2004}", "2004"), ("1,234", "1234"), ("$5", "5"),
             ("50%", "50"), ("3 goals", "3"), ("Apple, Banana", "Apple|Banana"), ("Apple", "Apple|Banana"),
             ("Apple||Banana", "Apple"), ("[a]", ""), ("2004-13-01", "2004-13-1"), ("2.9999999", "3"),
             ("1.51", "1.5"), ("a|b", "a\\pb"), ("Answer: 2004", "2004"), ("inf", "5"), ("nan", "nan value"),
             ("9" * 400, "1.5"), ("9" * 5000, "5")])])
def test_denotations(same, cases):
    for output, gold in cases:
        assert vwtq(output, gold) is same, (output, gold)


def test_escapes_are_undone_in_order_and_an_infinite_gold_is_refused():
    assert unescape(r"a\nb\pc\\d") == "a\nb|c\\d"
    with pytest.raises(ValueError, match="infinite"):
        vwtq("5", "inf")


def test_only_a_label_in_front_is_removed():
    assert without_label("Answer: 2004") == "2004"
    assert all(without_label(text) == text for text in ("answer: 2", "The Answer: 2", "Answer:2"))


def test_a_long_row_of_brackets_takes_no_time():
    """Two readings of each bracket would be 2 to the 200 ways to fail."""
    began = time.monotonic()
    assert not vwtq("[1]" * 200 + " x", "y") and time.monotonic() - began < 5


@pytest.mark.parametrize("output, verdicts", [
    ("True", (True, False)), ("FALSE.", (False, True)), ("It is not false, so True", (None, None)),
    ("untrue", (True, False)), ("", (False, False)), ("Is true", (True, False)), ("0", (False, False))])
def test_true_or_false(output, verdicts):
    assert (vtabfact(output, "1"), vtabfact(output, "0")) == verdicts


@pytest.mark.parametrize("reply, right", [
    ("\\boxed{D,D,R}", True), ("\\boxed{ddr}", True),
    ("\\boxed{U,L,D,D,R}", True),  # moves off the map are ignored
    ("\\boxed{R,D,D}", False), ("\\boxed{D,D}", False), ("\\boxed{D,D,R,L}", False),  # hole, short, past it
    ("\\boxed{D} no, \\boxed{D,D,R}", True), ("D,D,R", False), ("", False),
    ("\\boxed{D,D,R", False), ("\\boxed{D,D,R} or \\boxed{R", False),  # the last box counts only if it closes
    ("\\fbox{D,D,R}", False), ("\\boxed{D,D,\\rightarrow}", True)])  # three moves right
def test_walking_a_map(reply, right):
    assert walk_vsp([[1, -1], [0, 0], [0, 2]], reply) is right


def test_the_shortest_path_solves_every_real_map(shared_data):
    lines = (shared_data / "vsp" / "test.jsonl").read_text().splitlines()
    assert len(lines) == 400
    for board in (json.loads(line)["map_desc"] for line in lines):
        path = shortest_path(board)
        assert path and walk_vsp(board, f"\\boxed{{{','.join(path)}}}")
        assert not walk_vsp(board, f"\\boxed{{{path[:-1]}}}")
