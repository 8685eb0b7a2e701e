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


@pytest.mark.parametrize("column, totals", [(3, (19, 20, 9)), (4, (19, 16, 13))])
def test_columns_add_up(column, totals):
    """Letters right, missing and wrong as counted when the harnesses ran."""
    right = sum(row[column] == row[1] for row in REPLIES)
    missing = sum(row[column] is None for row in REPLIES)
    assert (right, missing, 48 - right - missing) == totals


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
    options = {"A": "left", "B": "right"}
    assert vlmevalkit_e8e78f0("The answer is certainly on this side of the river, as told", options) is None
    assert vlmevalkit_e8e78f0("The answer is below, on this side of the river, as I told", options) == "B"


@pytest.mark.parametrize("reply, letter", [
    ("", "A"), ("c", "C"), ("blue", None), ("The best", None), ("Best answer: C", "C"),
    ("Best answer:Best option: C", "C"), ("The best option is C", "C"), ("Based on it, D", "B"),
    ("one two three four five six seven eight nine ten blue", None)])
def test_mme_realworlds_rules(reply, letter):
    assert mme_realworld(reply) == letter


@pytest.mark.parametrize("output, gold, same", [
    ("2004.", "2004", True), ("2004.0", "2004", True), ("Freeman", "freeman", True), ("Café", "cafe", True),
    ("United States (USA)", "United States", True), ("The year is 2004", "2004", False),
    ("\\boxed{2004}", "2004", False),
    ("1,234", "1234", False), ("$5", "5", False), ("50%", "50", False), ("3 goals", "3", False),
    ("Apple, Banana", "Apple|Banana", False), ("Apple||Banana", "Banana|Apple", True),
    ("Apple|Banana|apple", "Apple|Banana", True),
    ("Apple", "Apple|Banana", False), ("Apple||Banana", "Apple", False), ("“Apple”", "apple", True),
    ("a–b", "a-b", True),
    ("Apple[1]", "Apple", True), ("Apple†", "Apple", True), ("[1]", "", True), ("[a]", "", False),
    ("a  b\tc", "A B C", True),
    ("2004-05-01", "2004-5-1", True), ("xx-05-01", "xxxx-5-1", True), ("2004-xx-xx", "2004", True),
    ("2004-13-01", "2004-13-1", False), ("1e3", "1000", True), ("2.9999999", "2", True),
    ("2.9999999", "3", False),
    ("1.5000001", "1.5", True), ("1.51", "1.5", False),
    ("a\\pb", "a\\pb", True), ("a|b", "a\\pb", False), ("a\\nb", "a b", True),
    ("Answer: 2004", "2004", False), ("", "", True),
    ("inf", "5", False), ("nan", "nan value", False), ("9" * 400, "1.5", False), ("9" * 5000, "5", False)])
def test_denotations(output, gold, same):
    assert vwtq(output, gold) is same


def test_escapes_are_undone_in_order():
    assert unescape(r"a\nb\pc\\d") == "a\nb|c\\d"


def test_an_infinite_gold_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        vwtq("5", "inf")


def test_only_a_label_in_front_is_removed():
    assert without_label("Answer: 2004") == "2004" and vwtq(without_label("Answer: 2004"), "2004")
    assert all(without_label(text) == text for text in ("answer: 2", "The Answer: 2", "Answer:2"))


def test_a_long_row_of_brackets_takes_no_time():
    """Two readings of each bracket would be 2 to the 200 ways to fail."""
    began = time.monotonic()
    assert not vwtq("[1]" * 200 + " x", "y")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("output, verdicts", [
    ("True", (True, False)), ("FALSE.", (False, True)), ("It is not false, so True", (None, None)),
    ("untrue", (True, False)),
    ("Yes", (False, False)), ("", (False, False)), ("The answer is true", (True, False)),
    ("0", (False, False))])
def test_true_or_false(output, verdicts):
    assert (vtabfact(output, "1"), vtabfact(output, "0")) == verdicts


@pytest.mark.parametrize("gold", [1, True, "true", ""])
def test_a_gold_of_another_type_is_refused(gold):
    with pytest.raises(ValueError, match="gold"):
        vtabfact("true", gold)


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
