"""Answers read from replies, and compared."""
import time
from collections import Counter

import pytest
from replies import OPTIONS, REPLIES, planted
from samples import table

from utils.answers import answers_match, extract_choice, normalize
from utils.evaluate.reference_scorers import vlmevalkit_e8e78f0
from utils.jsonl import read_rows
from utils.reply_text import SPECIAL_TOKEN, last_boxed

# in some wordings a looser rule would read a letter that is not chosen, in some a narrower one would miss the
# letter; negations, Chinese, options within options, latents
CASES = [(reply, OPTIONS[name], letter, rule) for name, _, reply, _, _, letter, rule in REPLIES] + [
    (case["reply"], case["options"], case["letter"], case["rule"]) for case in table("wordings")]


@pytest.mark.parametrize("reply, options, letter, rule", CASES, ids=[reply[:30] for reply, *_ in CASES])
def test_the_letter_of_a_reply_and_the_rule_that_reads_it(reply, options, letter, rule):
    assert extract_choice(reply, options) == (letter, rule)


def test_the_table_holds_one_wrong_letter():
    """Of 48 replies 42 are right and 5 unresolved; one says red and nothing else, but the gold is blue."""
    assert len(REPLIES) == 48 and sum(row[1] == row[5] for row in REPLIES) == 42
    [wrong] = [reply for _, gold, reply, *_, letter, _ in REPLIES if letter not in (gold, None)]
    assert wrong.endswith("a matte surface whose colour is clearly red.")


def test_a_reply_that_was_cut_off_is_not_read_by_its_last_sentence():
    reply = "Suppose the cup had been enlarged. I thought for quite some time. It could be the red one"
    assert extract_choice(reply, OPTIONS["COL"]).rule == "tail_text"
    assert extract_choice(reply, OPTIONS["COL"], "length").rule == "unresolved"
    assert extract_choice("So the count is \\boxed{1", OPTIONS["TEN"], "length").letter is None
    assert extract_choice("<answer>red", OPTIONS["COL"], "length").letter is None
    assert extract_choice("The cup is red. It stands next to", OPTIONS["COL"], "length").letter is None
    assert extract_choice("<answer>B", OPTIONS["COL"], "length").letter == "B"
    opening = "A closer look shows that the cup is white in the lower part of"  # "A" is an article
    assert extract_choice(opening, OPTIONS["COL"], "length").rule == "unresolved"


@pytest.mark.parametrize("text, expected", [
    ("a \\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\text{red}}", "red"), ("\\boxed{1} and \\boxed{open", "1"), ("\\boxed{open", "open"),
    ("none", None)])
def test_last_box(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize("case", table("answer_pairs"), ids=lambda case: case["a"])
def test_answers_are_compared_after_normalizing(case):
    """Without options a letter is not read as a text."""
    a, b, options = case["a"], case["b"], OPTIONS.get(case["options"])
    assert answers_match(a, b, options) is case["same"] is answers_match(b, a, options)
    assert normalize(normalize(a)) == normalize(a)


def test_real_replies_against_a_judge_and_against_vlmevalkit(shared_data):
    """304 replies of Monet-7B on V*, read by rules. They contradict the judge once, and the judge is wrong:
    vstar/38 has options A. green and B. orange and gold B, the reply boxes orange."""
    rows = read_rows(shared_data / "real_outputs" / "vstar_dev.jsonl", {"output": str})
    read = [extract_choice(row["output"], row["options"]) for row in rows]
    resolved = [(row, choice) for row, choice in zip(rows, read) if choice.letter is not None]
    wrong = [row["id"] for row, choice in resolved
             if (choice.letter == row["gold"]) != row["judge_says_correct"]]
    assert (len(rows), len(resolved), wrong) == (304, 286, ["vstar/38"])  # 94.1 %; at least 92 % is required
    assert Counter(choice.rule for choice in read)["boxed_letter"] > 50
    for row, choice in resolved:
        for text in (row["output"], SPECIAL_TOKEN.sub("", row["output"]).strip()):
            assert vlmevalkit_e8e78f0(text, row["options"]) in (None, choice.letter), row["id"]


def test_planted_answers_are_read_or_left_open_never_misread():
    """20,000 replies: no wrong letter, no letter where none is planted, and open replies of one form only."""
    counts, began = Counter(), time.process_time()
    for form, options, letter, reply in planted(20000, seed=0):
        choice = extract_choice(reply, options)
        assert choice.letter in (None, letter), (reply, options, letter, choice)
        counts[form, choice.letter is not None] += 1
    assert time.process_time() - began < 20
    assert all(counts[form, False] == 0 for form in ("boxed", "phrase", "bare"))
    assert counts["nothing", True] == 0 and sum(counts.values()) == 20000
    assert counts["tail", False] < 1500  # 1,247 of 4,007: letters in words of their own
