"""What chooses an option and what does not, over kinds of replies and over generated ones."""
import json
import random
import re
import time
from pathlib import Path

import pytest
from replies import OPTIONS, planted
from samples import table

from utils.answers import answers_match, extract_choice
from utils.evaluate.reference_scorers import vwtq
from utils.evaluate.scoring import read_truth, read_value, read_yes_no
from utils.phrases import find_phrase, named_option
from utils.reply_text import fold, visible

COLOURS = OPTIONS["COL"]
# thoughts in front of a reply; sentences that choose the letter {}; those that choose no letter and no text
PHRASES = json.loads((Path(__file__).parents[1] / "files" / "phrases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", table("reply_kinds"), ids=lambda case: case["reply"][:30])
def test_replies_by_kind(case):
    """"-" stands for no letter; some replies may be read or left open."""
    options = dict(zip("ABCDE", case["options"].split(" | ")))
    assert (extract_choice(case["reply"], options).letter or "-") in case["letters"]


def test_replies_in_published_shapes(shared_data):
    """A wrong letter is never read; nearly all are read as a careful reader reads them."""
    def rows(name):
        lines = (shared_data / "replies" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    read = [(extract_choice(row["output"], row["options"], row["finish_reason"]).letter, row["expected"])
            for row in rows("choice")]
    assert not [row for row in read if row[0] and row[0] not in row[1]]
    assert sum((letter or "-") in expected for letter, expected in read) >= 0.98 * len(read)
    found = [(answers_match(row["a"], row["b"]), row["same"]) for row in rows("match")]
    assert sum(one == same for one, same in found) >= 0.97 * len(found)
    values = [(read_value(row["output"]).value, row) for row in rows("table_value")]
    right = [(value is not None and vwtq(value, row["gold"])) == row["right"] for value, row in values]
    assert sum(right) >= 0.97 * len(right)
    for name, reader in (("table_truth", read_truth), ("yes_no", read_yes_no)):
        read = [(reader(row["output"]).value or "-") in row["expected"] for row in rows(name)]
        assert sum(read) >= 0.97 * len(read), name


@pytest.mark.parametrize("thought", PHRASES["thoughts"])
def test_a_thought_in_front_changes_nothing(thought):
    for _, options, _, reply in planted(300, seed=1):
        assert extract_choice(thought + reply, options) == extract_choice(reply, options), reply
    assert read_truth(thought + "True").value == "1" and read_yes_no(thought + "No").value == "no"
    assert read_value(thought + "2004").value == "2004" and visible(thought) == ""


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_renaming_the_letters_permutes_the_result(shift):
    """No letter is treated differently from another; rows whose lone A may be the article are left out."""
    for case in table("reply_kinds"):
        texts = case["options"].split(" | ")
        letters = "ABCDE"[:len(texts)]
        renamed = {letter: letters[(place + shift) % len(texts)] for place, letter in enumerate(letters)}
        if re.search(r"\b[Aa] [a-z]|\b[a-e]\b|['\"][A-E]['\"]", case["reply"]) or re.search(
                r"\b[A-E]\b", case["options"]):
            continue
        options = dict(zip(letters, texts))
        reply = re.sub(r"(?<![A-Za-z0-9À-ÿ])[A-E](?![A-Za-z0-9'’À-ÿ])",
                       lambda match: renamed.get(match[0], match[0]), case["reply"])
        before = extract_choice(case["reply"], options).letter
        after = extract_choice(reply, {renamed[letter]: text for letter, text in options.items()}).letter
        assert after == renamed.get(before), (case["reply"], reply)


def test_numbers_in_any_spelling_are_one_answer():
    """Fractions, mixed numbers and decimals of one value match each other and no other value."""
    spellings = [["1 1/2", "1½", "1.5", "3/2", "1\\frac{1}{2}", "\\dfrac{3}{2}", "1.50"],
                 ["1/2", "½", "0.5", ".5", "\\frac12", "5/10", "one half"], ["-1 1/2", "−1½", "-1.5"],
                 ["11/2", "5 1/2", "5.5"], ["11", "eleven", "11.0"], ["1", "one", "1.0"], ["12", "twelve"]]
    for one in spellings:
        for other in spellings:
            for a in one:
                assert all(answers_match(a, b) is (one is other) for b in other), (a, other)
    options = dict(zip("ABCDEF", (group[0] for group in spellings)))
    for letter, group in zip("ABCDEF", spellings):
        for text in group:
            assert extract_choice(f"\\boxed{{{text}}}", options).letter == letter, text


@pytest.mark.parametrize("reply", PHRASES["choosing"])
def test_all_letters_are_read_alike(reply):
    options = dict(zip("ABCDEFGH", "sun moon rain snow wind hail mist dust".split()))
    assert [extract_choice(reply.format(letter), options).letter for letter in options] == list(options)


def test_a_place_next_to_an_option_and_two_things_name_no_option():
    """"Behind the cup" says where something is; "on the table" and an option that is a place are answers."""
    things = dict(zip("ABCD", "cup lamp table fridge".split()))
    for letter, thing in things.items():
        for place in ("behind", "next to", "to the left of", "in front of", "under", "above", "inside",
                      "near"):
            assert named_option(f"It is {place} the {thing}.", things) is None, place
            other = things["ABCD"["BCDA".index(letter)]]
            assert named_option(f"The {thing} is {place} the {other}.", things) is None, place
            assert named_option(f"It is {place} the {thing}.", {"A": f"{place} the {thing}"}) == "A"
        assert named_option(f"It is on the {thing}.", things) == letter
        for form in ("The cup is small. A {} laptop is next to it.", "Next to it is the {} laptop."):
            assert extract_choice(form.format(COLOURS[letter]), COLOURS).letter is None, form
        for form in ("The {0} cup is next to the {1} plate.", "A {0} cup stands beside a {1} plate."):
            assert named_option(form.format(COLOURS[letter], COLOURS["ABCD"["BCDA".index(letter)]]),
                                COLOURS) is None, form


@pytest.mark.parametrize("reply", PHRASES["open"])
def test_what_only_looks_like_a_choice_is_left_open(reply):
    for letter, other in zip("ABCD", "BCDA"):
        said = reply.format(letter, COLOURS[letter], other, COLOURS[other])
        assert extract_choice(said, COLOURS).letter is None, said


def test_a_denied_option_never_counts_and_reading_twice_changes_nothing():
    rng = random.Random(0)
    for letter, text in COLOURS.items():
        assert named_option(f"It is {text}, not brown.", COLOURS) == letter
        for form in ("It is not {}.", "It is brown, not {}.", "It is brown rather than {}.",
                     "是棕色，而不是{}。", "不是{}", "Es ist nicht {}.", "It isn't {}.", "No es {}.", "{}?",
                     "It is never {}.", "Something other than {}.",
                     "Ce n'est pas {}.", "It stands next to the {} laptop."):
            assert named_option(form.format(text), COLOURS) is None, form
        assert find_phrase(f"The answer is not {letter}.", COLOURS) == (None, -1)
        assert extract_choice(f"The answer is {letter}. Wait, it may be {rng.choice(['E', 'none'])}.",
                              COLOURS).letter == letter
    for _, _, _, reply in planted(300, seed=2):
        assert visible(visible(reply)) == visible(reply) and fold(fold(reply)) == fold(reply)


def test_replies_are_read_in_little_time():
    """2,000 replies of 1,000 characters; 60 s for 100,000 are 1.2 s."""
    filler = "A closer look shows the cup on the table, next to the laptop and a plate. " * 13
    replies = [f"{filler}{number} {reply}" for number, (*_, reply) in enumerate(planted(2000, seed=3))]
    began = time.process_time()
    for reply in replies:
        extract_choice(reply, COLOURS)
    assert time.process_time() - began < 2.4  # twice that, for slow machines
    began = time.process_time()
    for unit in (" ", "\n", "0", "1.", "a.", "$", "(", "\\boxed{", "the answer is ", "not ", "A ", "red ",
                 "- ", "<think>", "red, not blue ", "one ", "because ", "}", "*"):  # a model repeats itself
        for read in (lambda text: extract_choice(text, COLOURS), read_truth, read_yes_no, read_value):
            read("x " + unit * (10000 // len(unit)) + " y")
    assert time.process_time() - began < 4
