"""Answers read off replies, compared, and walked.    pytest tests/test_answers.py"""
import json
import time
from collections import Counter

import pytest
from harness_table import IMAGINED, OPTIONS, REPLIES
from planted import planted

from utils.answers import answers_match, extract_choice, last_boxed, normalize, strip_markers
from utils.evaluate.reference_scorers import vlmevalkit_0bac5c0, vlmevalkit_e8e78f0

# Replies that a looser rule would read as a letter that they do not choose
NO_LETTER = [
    ("COL", "B. blue", "bare_conflict"), ("COL", "B) The cup is blue.", "bare_conflict"),
    ("COL", "\\boxed{A, B}", "boxed_conflict"),
    ("COL", "\\boxed{not red}", "boxed_unresolved"), ("COL", "\\boxed{red or blue}", "boxed_unresolved"),
    ("COL", "The answer is B? No, it is clearly the blue one.", "unresolved"),
    ("COL", "Is the cup red?", "unresolved"),
    ("COL", "To determine whether the cup is red, I will look closer at the lower part of the picture.",
     "unresolved"),
    ("COL", "It couldn’t be red.", "unresolved"), ("TEN", "-3", "unresolved"),
    ("TEN", "There are 3.5 of them.", "unresolved"),
    ("COL", "Blueberry", "unresolved"),
    ("COL", "B. red? No, the answer is C.", "bare_conflict"),
    ("LR", "On the left one sees B.", "unresolved"), ("COL", "Options: A. white B. red The cup is hidden.",
                                                      "unresolved"),
    ("COL", "\\boxed{red, thus D}", "boxed_unresolved"), ("COL", "A cup, and it is not white.", "unresolved")]
# Replies that choose a letter in words that a narrower rule would miss
LETTER = [
    ("COL", "A closer look shows the cup. It is not white. The answer is C.", "C", "phrase"),
    ("COL", "Option B says red. Still I choose C.", "C", "phrase"), ("LR", "Option A says left. I choose B.",
                                                                     "B", "phrase"),
    ("COL", "The answer is $\\text{C}$.", "C", "phrase"),
    ("COL", 'White or red? The correct one is "red."  That is "red."', "B", "tail_text"),
    ("COL", "Hmm.\nThe options are \"white\" or \"red.\"  It is \"red.\"", "B", "tail_text"),
    ("COL", "Answer: A red cup.", "B", "bare_text_in"), ("COL", "\\boxed{Option B}", "B", "boxed_letter"),
    ("COL", "\\boxed{\\text{B}. red}", "B", "boxed_letter_text"), ("COL", "Option B", "B", "bare_letter"),
    ("COL", "[B]", "B", "bare_letter"), ("COL", "`B`", "B", "bare_letter"), ("COL", "The answer is 'C'.", "C",
                                                                             "phrase"),
    ("COL", "The answer is option C.", "C", "phrase"), ("COL", "The answer is: [C]", "C", "phrase"),
    ("COL", "答案为 C", "C", "phrase"), ("COL", "<observation>B</observation>", "B", "bare_letter"),
    ("RW5", "Looking at it, the image does not feature the color.", "E", "bare_text_in")]


@pytest.mark.parametrize("name, gold, reply, head, older, mme, letter, rule", REPLIES)
def test_extraction_table(name, gold, reply, head, older, mme, letter, rule):
    assert extract_choice(reply, OPTIONS[name]) == (letter, rule)


def test_the_table_holds_no_wrong_letter_but_one():
    """Of 48: 40 right, 7 unresolved. The one wrong letter is the reply that says red and nothing else; the
    gold is blue."""
    assert len(REPLIES) == 48
    wrong = [reply for _, gold, reply, *_, letter, _ in REPLIES if letter not in (gold, None)]
    assert wrong == [IMAGINED] and sum(row[1] == row[6] for row in REPLIES) == 40


@pytest.mark.parametrize("name, reply, rule", NO_LETTER)
def test_what_chooses_nothing_stays_unresolved(name, reply, rule):
    assert extract_choice(reply, OPTIONS[name]) == (None, rule)


@pytest.mark.parametrize("name, reply, letter, rule", LETTER)
def test_other_wordings(name, reply, letter, rule):
    assert extract_choice(reply, OPTIONS[name]) == (letter, rule)


def test_options_that_are_negations_or_chinese():
    assert extract_choice("No, there is no dog.", {"A": "yes", "B": "no"}).letter == "B"
    assert extract_choice("杯子是红色的。", {"A": "红色", "B": "蓝色"}).letter == "A"


def test_a_reply_that_was_cut_off_is_not_read_by_its_last_sentence():
    reply = f"{IMAGINED} Then I thought about it for quite some time. It could be the red one"
    assert extract_choice(reply, OPTIONS["COL"]).rule == "tail_text"
    assert extract_choice(reply, OPTIONS["COL"], "length").rule == "unresolved"
    # an article, though A is white
    opening = "A closer look shows that the cup is white in the lower part of"
    assert extract_choice(opening, OPTIONS["COL"], "length").rule == "unresolved"


def test_of_nested_options_the_longest_counts():
    options = {"A": "red", "B": "dark red"}
    assert extract_choice("It is dark red.", options).letter == "B"
    assert extract_choice("It is red.", options).letter == "A"


def test_a_letter_inside_an_options_text_is_no_other_answer():
    options = {"A": "vitamin C", "B": "iron", "C": "zinc"}
    assert extract_choice("It is vitamin C.", options).letter == "A"
    assert extract_choice("It is zinc, B.", options).letter is None


def test_what_stands_in_a_latent_span_is_never_parsed():
    options = OPTIONS["COL"]
    assert extract_choice("<|latent_start|> A A <|latent_end|> It is red.", options).letter == "B"
    assert extract_choice("<abs_vis_token> D </abs_vis_token>", options).rule == "empty"


@pytest.mark.parametrize("text, expected", [
    ("a \\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\text{red}}", "red"),
    ("\\boxed{1} and \\boxed{open", "1"), ("\\boxed{open", "open"), ("none", None)])
def test_last_box(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize("one, other, same", [
    ("Red", "red.", True), ("the cat", "cat", True), ("two", "2", True), ("1,234", "1234", True),
    ("50%", "50", True),
    ("B", "red", True), ("B. red", "red", True), ("blue", "red", False), ("12", "1", False),
    ("redish", "red", False)])
def test_answers_are_compared_after_normalising(one, other, same):
    assert answers_match(one, other, OPTIONS["COL"]) is same
    assert normalize(normalize(one)) == normalize(one)


@pytest.mark.parametrize("one, other, same", [
    ("", "", False), ("", " ", False), ("42.0", "42", True), ("\\boxed{42}", "42", True), ("(B)", "B", True),
    ("5 cm", "5cm", True), ("5 cm", "5 m", False), ("3 m", "3 km", False), ("50%", "50 kg", False),
    ("$50", "50%", False),
    ("$5", "5 dollars", True), ("left of the river", "left of river", True), ("twenty", "20", True),
    ("-5", "5", False),
    ("1,2", "12", False), ("Vitamin A", "Vitamin", False)])
def test_numbers_units_and_nothing(one, other, same):
    assert answers_match(one, other) is same and answers_match(other, one) is same


def test_real_replies_against_a_judge_and_against_vlmevalkit(shared_data):
    """304 replies of Monet-7B on V*, rules alone. The one contradiction (vstar/38) is the judge's fault: the
    options are A. green and B. orange, the gold is B, the reply boxes orange, and the judge's record says
    wrong."""
    rows = [json.loads(line) for line in (shared_data / "real_outputs"
                                          / "vstar_dev.jsonl").read_text().splitlines()]
    found = [extract_choice(row["output"], row["options"]) for row in rows]
    resolved = [(row, f) for row, f in zip(rows, found) if f.letter is not None]
    wrong = [row["id"] for row, f in resolved if (f.letter == row["gold"]) != row["judge_says_correct"]]
    assert (len(rows), len(resolved), wrong) == (304, 283, ["vstar/38"])  # 93.1 %, at least 92 % is asked
    assert Counter(f.rule for f in found)["boxed_letter"] > 50
    for row, f in resolved:
        for text in (row["output"], strip_markers(row["output"])):
            for matcher in (vlmevalkit_0bac5c0, vlmevalkit_e8e78f0):
                assert matcher(text, row["options"]) in (None, f.letter), row["id"]


def test_planted_answers_are_found_or_left_open_never_misread():
    """20,000 replies: no wrong letter, none where nothing is planted, and in every form but the last nothing
    left open."""
    counts, began = Counter(), time.monotonic()
    for form, options, letter, reply in planted(20000, seed=0):
        found = extract_choice(reply, options)
        assert found.letter in (None, letter), (reply, options, letter, found)
        counts[form, found.letter is not None] += 1
    assert time.monotonic() - began < 20
    assert all(counts[form, False] == 0 for form in ("boxed", "phrase", "bare")) and counts["nothing",
                                                                                            True] == 0
    # 1,247 of 4,007: letters in words of their own
    assert sum(counts.values()) == 20000 and counts["tail", False] < 1500
