"""What a reply is worth, by our rules and by other harnesses' rules."""
import pytest

from utils.evaluate import reference_scorers
from utils.evaluate.reference_scorers import vwtq
from utils.evaluate.scoring import (check_scorable, compat_right, gold_text, n_options, read_truth,
                                    read_value, read_yes_no, score, vwtq_numeric)
from utils.jsonl import DataError

LETTERS = [["A", "red"], ["B", "blue"], ["C", "green"]]
MCQ = {"id": "1", "metric": "mcq", "options": LETTERS, "answer": {"type": "letter", "value": "B"}}
WTQ = {"id": "2", "metric": "wtq", "options": [], "answer": {"type": "values", "value": ["1234", "a|b"]}}
FACT = {"id": "3", "metric": "tabfact", "options": [], "answer": {"type": "bool", "value": False}}
YES = {"id": "4", "metric": "yesno_pair", "options": [], "answer": {"type": "yesno", "value": "yes"}}
PATH = {"id": "5", "metric": "vsp_path", "options": [],
        "answer": {"type": "path_map", "value": [[1, 2], [0, 0]]}}


def said(text, finish="stop"):
    return {"clean_output": text, "finish_reason": finish}


@pytest.mark.parametrize("item, text, verdict", [
    (MCQ, "\\boxed{B}", "correct"), (MCQ, "\\boxed{red}", "incorrect"), (MCQ, "It is nice.", "unresolved"),
    (MCQ, "", "unresolved"), (PATH, "\\boxed{R}", "correct"), (PATH, "\\boxed{L}", "incorrect"),
    (PATH, "R", "unresolved"), (WTQ, "\\boxed{a\\p b||1234}", "incorrect"), (WTQ, "a\\pb||1234.0", "correct"),
    (WTQ, "", "unresolved"), (FACT, "\\boxed{False}", "correct"), (FACT, "True", "incorrect"),
    (FACT, "Is it true or false?", "unresolved"), (YES, "Yes, a dog.", "correct"),
    (YES, "\\boxed{no}", "incorrect"), (YES, "There is no cat.", "unresolved")])
def test_strict_verdicts(item, text, verdict):
    assert score(item, said(text))["verdict"] == verdict


def test_a_reply_that_no_rule_reads_is_unresolved_whatever_other_rules_make_of_it():
    """VLMEvalKit reads "answer is blurred" as B, and MME-RealWorld's function an empty reply as A."""
    result = score(MCQ, said("The answer is blurred"))
    assert result["verdict"] == "unresolved" and result["extraction"]["value"] is None
    assert result["compat"] == {"vlmevalkit_e8e78f0": "B"}
    result = score(MCQ | {"benchmark": "mme_realworld_lite"}, said(""))
    assert (result["verdict"], result["compat"]) == ("unresolved", {"vlmevalkit_e8e78f0": "A"})
    assert score(MCQ, said("I see that it is blue"))["verdict"] == "correct"
    cut = said("I look and then. I see it may be the blue one", "length")  # its last sentence decides nothing
    assert score(MCQ, cut)["verdict"] == "unresolved"


def test_columns_of_other_rules_may_differ_from_ours():
    result = score(WTQ | {"answer": {"type": "values", "value": ["1234"]}}, said("\\boxed{1,234}"))
    assert (result["verdict"], result["numeric"]) == ("incorrect", True)
    assert result["compat"] == {"tablevqabench": False}
    result = score(FACT, said("At first it looks true. \\boxed{False}"))
    assert (result["verdict"], result["compat"]["tablevqabench"]) == ("correct", None)
    assert not compat_right({"gold": False, **result}, "tablevqabench")  # it reads no box


def test_gold_values_survive_the_benchmarks_own_unescaping():
    for values in (["a|b", "c"], ["line\nend"], ["back\\slash"]):
        read = reference_scorers.read_values(gold_text(values))
        assert sorted(value.text for value in read) == [" ".join(text.split()) for text in sorted(values)]


def test_errors_and_items_without_a_scorer():
    assert score(MCQ, {"error": "image_missing"}) == {
        "extraction": {"value": None, "rule": "image_missing"}, "verdict": "error", "compat": {}}
    with pytest.raises(DataError, match="'ocr/1' and 0 more: metric 'unscored' has no scorer"):
        check_scorable([MCQ, {"id": "ocr/1", "metric": "unscored"}])
    assert [n_options(item) for item in (MCQ, WTQ, FACT, YES, PATH)] == [3, 0, 2, 2, 0]


@pytest.mark.parametrize("output, value, rule", [
    ("2004", "2004", "whole"), ("Answer: 2004", "2004", "whole"), ("answer:2004", "2004", "whole"),
    ("It was won in 2000, then \\boxed{2004}", "2004", "boxed"),
    ("\\boxed{1} \\boxed{\\text{Apple}||Pear}", "Apple||Pear", "boxed"),
    ("<think>2000?</think><answer>2004</answer>", "2004", "tag"), ("So \\boxed{2004", "2004", "boxed_open"),
    ("The year is 2004", "The year is 2004", "whole"), ("", None, "empty"), ("\\boxed{}", None, "empty"),
    ("<|latent_start|> 7 <|latent_end|>", None, "empty"), ("\\boxed{50\\%}", "50%", "boxed")])
def test_values(output, value, rule):
    assert read_value(output) == (value, rule)


@pytest.mark.parametrize("output, value, rule", [
    ("False.", "0", "whole_truth"), ("Answer: false", "0", "whole_truth"), ("Yes", "1", "whole_truth"),
    ("\\boxed{\\text{False}}", "0", "boxed_truth"), ("At first true. \\boxed{0}", "0", "boxed_truth"),
    ("\\boxed{The statement is true}", "1", "boxed_truth"), ("<answer>true</answer> false", "1", "tag_truth"),
    ("\\boxed{true", "1", "boxed_open_truth"), ("True? \\boxed{maybe}", None, "boxed_unresolved"),
    ("\\boxed{not true}", None, "boxed_unresolved"), ("\\boxed{true or false}", None, "boxed_unresolved"),
    ("It is not false, so True", "1", "truth_word"), ("It is true. The table shows 6.", "1", "truth_word"),
    ("It says true, which it is not. So false!", "0", "truth_word"), ("", None, "empty"),
    *((text, None, "unresolved") for text in (
        "The statement is not true.", "Is it true or false?", "I cannot say whether it is true.",
        "Both true and false rows", "Neither true nor false.", "It is untrue", "The answer is no, as 5"))])
def test_truth(output, value, rule):
    assert read_truth(output) == (value, rule)


@pytest.mark.parametrize("text, value, rule, theirs", [
    ("Yes", "yes", "first_word", "yes"), ("No, the picture shows a cat.", "no", "first_word", "no"),
    ("**Yes**, it does", "yes", "first_word", None), ("\\boxed{Yes}", "yes", "boxed_yesno", "yes"),
    ("<answer>no</answer>", "no", "tag_yesno", "no"), ("\\boxed{yes or no}", None, "boxed_unresolved", None),
    ("The answer is no", "no", "phrase", "no"), ("No dog is there.", None, "unresolved", "no"),
    ("Yes, but wait. The answer is no.", None, "unresolved", None),
    ("There is no dog.", None, "unresolved", "no"), ("", None, "empty", None),
    ("Nothing", None, "unresolved", None), ("Is the answer yes or no?", None, "unresolved", None)])
def test_yes_and_no(text, value, rule, theirs):
    assert (*read_yes_no(text), reference_scorers.yes_or_no(text)) == (value, rule, theirs)


def test_a_word_before_the_token_limit_decides_nothing_unless_it_is_the_whole_answer():
    assert read_truth("If the first row is true, then", "length") == (None, "unresolved")
    assert read_truth("True", "length") == ("1", "whole_truth")
    assert read_truth("\\boxed{true}", "length").value == "1"
    assert read_yes_no("Yes, I see the", "length").value is None
    assert read_yes_no("So \\boxed{yes}", "length").value == "yes"


@pytest.mark.parametrize("value, gold, official, numeric", [
    ("1,234", "1234", False, True), ("$5", "5", False, True), ("50%", "50", False, True),
    ("-1,234.5", "-1234.5", False, True), ("1,234||$5", "5|1234", False, True),
    ("3 goals", "3", False, False), ("1,23", "123", False, False), ("5", "6", False, False),
    ("Smith, 1,234", "Smith 1234", False, False), ("2004", "2004", True, True), ("$", "", False, False),
    ("-$5", "-5", False, True)])
def test_numbers_with_and_without_their_marks(value, gold, official, numeric):
    assert (vwtq(value, gold), vwtq_numeric(value, gold)) == (official, numeric)
