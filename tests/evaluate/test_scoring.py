"""What a reply is worth, by our rules and by other harnesses' rules."""
import pytest
from samples import table

from utils.evaluate import reference_scorers
from utils.evaluate.reference_scorers import vwtq
from utils.evaluate.scoring import (check_scorable, compat_right, gold_text, n_options, read_truth,
                                    read_value, read_yes_no, score)
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


ITEMS = {item["metric"]: item for item in (MCQ, WTQ, FACT, YES, PATH)}


@pytest.mark.parametrize("case", table("verdicts"))
def test_strict_verdicts(case):
    assert score(ITEMS[case["metric"]], said(case["text"]))["verdict"] == case["verdict"]


def test_a_reply_that_no_rule_reads_is_unresolved_whatever_other_rules_make_of_it():
    """VLMEvalKit reads "answer is blurred" as B, and MME-RealWorld's function an empty reply as A."""
    result = score(MCQ, said("The answer is blurred"))
    assert result["verdict"] == "unresolved" and result["extraction"]["value"] is None
    assert result["compat"] == {"vlmevalkit_e8e78f0": "B"}
    result = score(MCQ | {"benchmark": "mme_realworld_lite"}, said(""))
    assert (result["verdict"], set(result["compat"].values())) == ("unresolved", {"A"})
    result = score(MCQ | {"benchmark": "mme_realworld_lite"}, said("A cat. <answer>d</answer>"))
    assert result["compat"] == {"vlmevalkit_e8e78f0": "D", "lmms_eval_75571cf": "A"}
    assert score(MCQ, said("I see that it is blue"))["verdict"] == "correct"
    cut = said("I look and then. I see it may be the blue one", "length")  # its last sentence decides nothing
    assert score(MCQ, cut)["verdict"] == "unresolved"


def test_columns_of_other_rules_may_differ_from_ours():
    result = score(WTQ | {"answer": {"type": "values", "value": ["1234"]}}, said("\\boxed{1,234}"))
    assert (result["verdict"], result["compat"]) == ("incorrect", {"tablevqabench": False})
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
    assert [n_options(item) for item in ITEMS.values()] == [3, 0, 2, 2, 0]


READERS = {"value": read_value, "truth": read_truth, "yes_no": read_yes_no}


@pytest.mark.parametrize("case", table("readings"), ids=lambda case: case["text"])
def test_what_is_read_in_a_reply(case):
    found = READERS[case["reader"]](case["text"])
    assert found == (case["value"], case.get("rule", found.rule))
    if "vlmevalkit" in case:
        assert reference_scorers.yes_or_no(case["text"]) == case["vlmevalkit"]


def test_a_word_before_the_token_limit_decides_nothing_unless_it_is_the_whole_answer():
    assert read_truth("If the first row is true, then", "length") == (None, "unresolved")
    assert read_truth("True", "length") == ("1", "whole_truth")
    assert read_truth("\\boxed{true}", "length").value == "1"
    assert read_yes_no("Yes, I see the", "length").value is None
    assert read_yes_no("So \\boxed{yes}", "length").value == "yes"


@pytest.mark.parametrize("value, gold, official", [case.values() for case in table("numbers")])
def test_numbers_with_their_marks(value, gold, official):
    assert vwtq(value, gold) == official
