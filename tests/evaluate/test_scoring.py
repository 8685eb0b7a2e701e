"""What a reply is worth, by our rules and by those of others.    pytest tests/test_scoring.py"""
import pytest

from utils.evaluate import reference_scorers
from utils.evaluate.scoring import (check_scorable, compat_right, gold_text, likeliest, n_options,
                                    read_yes_no, score)
from utils.jsonl import DataError

LETTERS = [["A", "red"], ["B", "blue"], ["C", "green"]]
MCQ = {"id": "1", "metric": "mcq", "options": LETTERS, "answer": {"type": "letter", "value": "B"}}
WTQ = {"id": "2", "metric": "wtq", "options": [], "answer": {"type": "values", "value": ["1234", "a|b"]}}
FACT = {"id": "3", "metric": "tabfact", "options": [], "answer": {"type": "bool", "value": False}}
YES = {"id": "4", "metric": "yesno_pair", "options": [], "answer": {"type": "yesno", "value": "yes"}}
PATH = {"id": "5", "metric": "vsp_path", "options": [], "answer": {"type": "path_map",
                                                                   "value": [[1, 2], [0, 0]]}}


def said(text, finish="stop"):
    return {"clean_output": text, "finish_reason": finish}


@pytest.mark.parametrize("item, text, verdict", [
    (MCQ, "\\boxed{B}", "correct"), (MCQ, "\\boxed{red}", "incorrect"), (MCQ, "It is nice.", "unresolved"),
    (MCQ, "", "unresolved"),
    (PATH, "\\boxed{R}", "correct"), (PATH, "\\boxed{L}", "incorrect"), (PATH, "R", "unresolved"),
    (WTQ, "\\boxed{a\\p b||1234}", "incorrect"), (WTQ, "a\\pb||1234.0", "correct"), (WTQ, "", "unresolved"),
    (WTQ, "The years are 1234 and so on", "incorrect"),
    (FACT, "\\boxed{False}", "correct"), (FACT, "True", "incorrect"), (FACT, "Is it true or false?",
                                                                       "unresolved"),
    (YES, "Yes, a dog.", "correct"), (YES, "\\boxed{no}", "incorrect"),
    (YES, "There is no cat.", "unresolved")])
def test_strict_verdicts(item, text, verdict):
    assert score(item, said(text))["verdict"] == verdict


def test_what_no_rule_resolves_is_never_an_option_and_no_other_rule_fills_it():
    """VLMEvalKit reads "red" in "blurred", since 2026 a B, and MME-RealWorld's script an A in nothing: beside
    the verdict."""
    found = score(MCQ, said("The answer is blurred"))
    assert found["verdict"] == "unresolved" and found["extraction"]["value"] is None
    assert found["compat"] == {"vlmevalkit_0bac5c0": "A", "vlmevalkit_e8e78f0": "B"}
    found = score(MCQ | {"benchmark": "mme_realworld_lite"}, said(""))
    assert (found["verdict"], found["compat"]["mme_realworld"]) == ("unresolved", "A")


def test_a_cut_off_reply_is_not_read_by_its_last_sentence():
    assert score(MCQ, said("I see that it is blue"))["verdict"] == "correct"
    assert score(MCQ, said("I look and then. I see it may be the blue one",
                           "length"))["verdict"] == "unresolved"


def test_numbers_with_marks_are_right_by_our_column_alone():
    found = score(WTQ | {"answer": {"type": "values", "value": ["1234"]}}, said("\\boxed{1,234}"))
    assert (found["verdict"], found["numeric"], found["compat"]) == ("incorrect", True,
                                                                     {"tablevqabench": False})


def test_a_box_is_ours_and_the_benchmarks_own_script_does_not_see_it():
    found = score(FACT, said("At first it looks true. \\boxed{False}"))
    assert (found["verdict"], found["compat"]["tablevqabench"]) == ("correct", None)
    assert not compat_right({"gold": False, **found}, "tablevqabench")


def test_gold_values_survive_the_benchmarks_own_unescaping():
    for values in (["a|b", "c"], ["line\nend"], ["back\\slash"], ["x"]):
        assert sorted(value for _, _, value in reference_scorers._values(gold_text(values))) == [
            " ".join(v.split()) for v in sorted(values)]


def test_the_likeliest_option_a_token_and_in_all():
    scores = [{"logp": -4.0, "n": 2}, {"logp": -6.0, "n": 6}, {"logp": -9.0, "n": 3}]
    assert (likeliest(LETTERS, scores), likeliest(LETTERS, scores, "sum")) == ("B", "A")
    assert likeliest(LETTERS, [{"logp": -2.0, "n": 1}] * 3) == "A"  # of equal ones the first
    found = score(MCQ | {"metric": "likelihood"}, said("") | {"scores": scores})
    assert (found["verdict"], found["compat"], found["scores"]) == ("correct", {"likelihood_sum": "A"},
                                                                    scores)


def test_an_error_has_its_reason_and_no_other_verdict():
    assert score(MCQ, {"error": "image_missing"}) == {"extraction": {"value": None, "rule": "image_missing"},
                                                      "verdict": "error",
                                                      "compat": {}}


def test_items_without_a_scorer_are_refused_and_chance_is_known():
    with pytest.raises(DataError, match="'ocr/1' and 0 more: metric 'unscored' has no scorer"):
        check_scorable([MCQ, {"id": "ocr/1", "metric": "unscored"}])
    assert [n_options(item) for item in (MCQ, WTQ, FACT, YES, PATH)] == [3, 0, 2, 2, 0]


@pytest.mark.parametrize("text, value, rule, theirs", [
    ("Yes", "yes", "first_word", "yes"), ("No, the picture shows a cat.", "no", "first_word", "no"),
    ("**Yes**, it does", "yes", "first_word", None), ("\\boxed{Yes}", "yes", "boxed_yesno", "yes"),
    ("<answer>no</answer>", "no", "tag_yesno", "no"), ("\\boxed{yes or no}", None, "boxed_unresolved", None),
    ("The answer is no", "no", "phrase", "no"), ("Yes, but wait. The answer is no.", None, "unresolved",
                                                 None),
    ("No dog is there.", None, "unresolved", "no"), ("There is no dog.", None, "unresolved", "no"),
    ("", None, "empty", None),
    ("Nothing", None, "unresolved", None), ("Is the answer yes or no?", None, "unresolved", None)])
def test_yes_and_no(text, value, rule, theirs):
    assert (*read_yes_no(text), reference_scorers.yes_or_no(text)) == (value, rule, theirs)


def test_a_first_word_that_was_cut_off_decides_nothing():
    assert read_yes_no("Yes, I see the", "length").value is None and read_yes_no("So \\boxed{yes}",
                                                                                 "length").value == "yes"
