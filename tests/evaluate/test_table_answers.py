"""Answers about tables: read strictly, compared by the official rule and by ours.    pytest
tests/test_tables.py"""
import pytest

from utils.evaluate.reference_scorers import vwtq
from utils.evaluate.scoring import read_truth, read_value, vwtq_numeric


@pytest.mark.parametrize("output, value, rule", [
    ("2004", "2004", "whole"), ("Answer: 2004", "2004", "whole"), ("answer:2004", "2004", "whole"),
    ("It was won in 2000, then \\boxed{2004}", "2004", "boxed"), ("\\boxed{1} \\boxed{\\text{Apple}||Pear}",
                                                                  "Apple||Pear", "boxed"),
    ("<think>2000?</think><answer>2004</answer>", "2004", "tag"), ("So \\boxed{2004", "2004", "boxed_open"),
    ("The year is 2004", "The year is 2004", "whole"), ("", None, "empty"), ("\\boxed{}", None, "empty"),
    ("<|latent_start|> 7 <|latent_end|>", None, "empty"), ("\\boxed{50\\%}", "50%", "boxed")])
def test_values(output, value, rule):
    assert read_value(output) == (value, rule)


@pytest.mark.parametrize("output, value, rule", [
    ("True", "1", "whole_truth"), ("False.", "0", "whole_truth"), ("Answer: false", "0", "whole_truth"),
    ("Yes", "1", "whole_truth"),
    ("\\boxed{\\text{False}}", "0", "boxed_truth"), ("At first true. \\boxed{0}", "0", "boxed_truth"),
    ("True? \\boxed{maybe}", None, "boxed_unresolved"), ("\\boxed{not true}", None, "boxed_unresolved"),
    ("\\boxed{The statement is true}", "1", "boxed_truth"), ("\\boxed{true or false}", None,
                                                             "boxed_unresolved"),
    ("<answer>true</answer> false", "1", "tag_truth"), ("\\boxed{true", "1", "boxed_open_truth"),
    ("It is not false, so True", "1", "truth_word"), ("The statement is true. The table shows 6.", "1",
                                                      "truth_word"),
    ("The statement is not true.", None, "unresolved"), ("Is it true or false?", None, "unresolved"),
    ("I cannot say whether it is true.", None, "unresolved"), ("Either true or false", None, "unresolved"),
    ("Both true and false rows", None, "unresolved"), ("Neither true nor false.", None, "unresolved"),
    ("It is untrue", None, "unresolved"), ("The answer is no, as 5 is less", None, "unresolved"),
    ("", None, "empty"),
    ("It says true, which it is not. So false!", "0", "truth_word")])
def test_truth(output, value, rule):
    assert read_truth(output) == (value, rule)


def test_a_reply_that_was_cut_off_is_not_read_by_its_last_word():
    assert read_truth("If the first row is true, then", "length") == (None, "unresolved")
    assert read_truth("True", "length") == ("1", "whole_truth") and read_truth("\\boxed{true}",
                                                                               "length").value == "1"


@pytest.mark.parametrize("value, gold, official, numeric", [
    ("1,234", "1234", False, True), ("$5", "5", False, True), ("50%", "50", False, True),
    ("-1,234.5", "-1234.5", False, True),
    ("1,234||$5", "5|1234", False, True), ("3 goals", "3", False, False), ("1,23", "123", False, False),
    ("5", "6", False, False),
    ("Smith, 1,234", "Smith 1234", False, False), ("2004", "2004", True, True), ("$", "", False, False),
    ("-$5", "-5", False, True)])
def test_numbers_with_and_without_their_marks(value, gold, official, numeric):
    assert (vwtq(value, gold), vwtq_numeric(value, gold)) == (official, numeric)
