"""The directed edit, by rules and by an LLM: hand-written cases."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import calls_of, serving
from samples import before_conclusion

from utils.intervene.text_conditions import RETRIES, VERSION, direct_all, make_caller
from utils.intervene.text_edits import (NOT_EDITABLE, NotEditable, clauses, direct, slot_values, slots,
                                        table_values, verify_directed, word_distance)
from utils.intervene.word_forms import article_for
from utils.journal import Journal
from utils.model_calls import IncompleteError
from utils.openai_backend import HttpBackend
from utils.spans import conclusion, find_spans, put_spans

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_outputs" / "vstar_dev.jsonl"


def make_item(gold, target, question="What is it?", *more):
    return {"id": "i", "question": question, "options": [["A", gold], ["B", target],
                                                         *(list(pair) for pair in more)],
            "answer": {"type": "letter", "value": "A"}}


def edited(spans, gold, target, question="What is it?"):
    """Edit "Look. <think_image>span</think_image> and ..." and return the new spans and the edit."""
    text = "Look." + "".join(f" <think_image>{span}</think_image> and" for span in spans)
    after, edit = direct(text, find_spans(text), make_item(gold, target, question), "B")
    assert after.startswith("Look. <think_image>") and after.endswith("</think_image> and")
    assert [after[a:b] for a, b in find_spans(after)] == edit["after"] and edit["before"] == list(spans)
    return edit["after"], edit


# ------------------------------------------------------------------------------------ spans
def test_a_reply_without_marks_has_no_span():
    text = "I look. The cup is red. Therefore, the final answer is \\boxed{A}."
    assert find_spans(text) == [] and conclusion(text) == text


def test_spans_are_put_back_in_place_and_never_dropped():
    assert put_spans("a-b-c", [(0, 1), (4, 5)], ["long", ""]) == "long-b-"
    with pytest.raises(ValueError):
        put_spans("a-b", [(0, 1), (2, 3)], ["x"])


# ------------------------------------------------------------------------------------ slots and their forms
@pytest.mark.parametrize("gold, target, pair", [
    ("The color of the cart is red.", "The color of the cart is blue.", ("red", "blue")),
    ("(A) a red car", "(B) a blue car", ("red", "blue")), ("in front of the bin", "behind the bin",
                                                           ("in front of", "behind")),
    ("golden retriever", "corgi", ("golden retriever", "corgi")), ("3", "4", ("3", "4"))])
def test_slot_values(gold, target, pair):
    assert slot_values(gold, target) == pair


@pytest.mark.parametrize("gold, target, pair", [
    ("a red car", "two blue trucks", ("red", "blue")), ("made of wood", "it looks like plastic",
                                                        ("wood", "plastic")),
    ("There are two", "I count 5", ("two", "five")), ("to the left of it", "right beside", ("left", "right")),
    ("a red or blue car", "two green trucks", None), ("a red car", "two red trucks", None),
    ("a car", "trucks", None)])
def test_tables_where_options_share_no_wording(gold, target, pair):
    if pair:
        assert table_values(gold, target) == pair
    else:
        with pytest.raises(NotEditable, match="no_slot_value"):
            table_values(gold, target)


@pytest.mark.parametrize("word, article", [("orange", "an"), ("red", "a"), ("unicorn", "a"), ("hour", "an"),
                                           ("8", "an"),
                                           ("18", "an"), ("180", "a"), ("one", "a"), ("umbrella", "an")])
def test_articles(word, article):
    assert article_for(word) == article


def test_clauses_join_again_and_a_pronoun_carries_on():
    text = "The dogs bark, and it sits, which helps. A cat sleeps: nobody knows. It is 3.5 m away"
    parts = clauses(text)
    assert "".join(part for part, _ in parts) == text
    assert [("dog" in named, "cat" in named) for _, named in parts] == [
        (True, False), (True, False), (True, False), (False, True), *[(False, False)] * 3]


# ------------------------------------------------------------------------------------ the rule editor
@pytest.mark.parametrize("spans, gold, target, after, n_replaced, n_words", [
    (["two dogs and a dog"], "dog", "cat", ["two cats and a cat"], 2, 2),
    (["an orange cup"], "orange", "red", ["a red cup"], 1, 2), (["a red cup"], "red", "orange",
                                                                ["an orange cup"], 1, 2),
    (["Three cups, 3 lids"], "3", "5", ["Five cups, 5 lids"], 2, 2), (["a 7"], "seven", "eight", ["an 8"], 1,
                                                                      2),
    (["a reddish tint"], "red", "blue", ["a blueish tint"], 1, 1),
    (["a golden retriever and golden retrievers"], "golden retriever", "Dalmatian",
     ["a Dalmatian and Dalmatians"], 2, 4),
    (["golden-retriever"], "golden retriever", "corgi", ["corgi"], 1, 1),
    (["a cup", "a red cup", "red lid"], "red", "blue", ["a cup", "a blue cup", "blue lid"], 2, 2),
    (["red left of blue"], "red", "blue", ["blue left of red"], 1, 2),
    (["13, 3.5 and 3"], "3", "4", ["13, 3.5 and 4"], 1, 1),
    (["A Red cup, RED inside"], "red", "blue", ["A Blue cup, BLUE inside"], 2, 2),
    (["made of cotton"], "cotton", "dark wool", ["made of dark wool"], 1, 2),
    (["it is behind the bin"], "Behind the bin", "In front of the bin", ["it is in front of the bin"], 1, 3)])
def test_the_rules_by_hand(spans, gold, target, after, n_replaced, n_words):
    found, edit = edited(spans, gold, target)
    assert found == after and edit["n_replaced"] == n_replaced and edit["word_distance"] == n_words
    assert edit["n_other"] == edit["residual_gold"] == 0 and edit["editor"] == "rule" and edit[
        "target"] == "B"


@pytest.mark.parametrize("spans, gold, target, reason", [
    (["a green cup"], "red", "blue", "gold_not_mentioned"), (["a bored, scarred man"], "red", "blue",
                                                             "gold_not_mentioned"),
    (["red, option B says"], "red", "blue", "letter_in_span"), (["red (C)"], "red", "blue", "letter_in_span"),
    (["a car"], "a car", "the car", "no_slot_value"), (["a cat"], "it", "not", "no_slot_value"),
    (["it is there"], "yes", "no", "no_slot_value")])
def test_what_the_rules_refuse(spans, gold, target, reason):
    with pytest.raises(NotEditable, match=f"^{reason}$"):
        edited(spans, gold, target)
    assert reason in NOT_EDITABLE


def test_sides_change_only_in_clauses_about_the_question():
    question = "Is the dog on the left or right side of the bicycle?"
    spans = ["A man stands on the left. The dog is to the left of the bicycle, and a tree is on the right.",
             "It sits left"]
    after, edit = edited(spans, "left", "right", question)
    assert after == [
        "A man stands on the left. The dog is to the right of the bicycle, and a tree is on the right.",
                     "It sits left"]
    assert edit["kind"] == "side" and edit["n_replaced"] == 1 and edit["n_exchanged"] == 0
    with pytest.raises(NotEditable, match="gold_not_mentioned"):
        edited(["A man stands on the left."], "left", "right", question)
    assert edited(["The dogs sleep. They lie left of it."], "left", "right", question)[0] == [
        "The dogs sleep. They lie right of it."]
    # a question that names nothing
    assert edited(["a man on the left"], "left", "right", "")[0] == ["a man on the right"]


def test_a_wrong_side_in_the_same_clause_is_exchanged():
    after, edit = edited(["The dog is right of the left bicycle"], "right", "left", "Where is the dog?")
    assert after == ["The dog is left of the right bicycle"] and edit["n_exchanged"] == 1


@pytest.mark.parametrize("span, gold, after", [
    ("The cup is red. A lid is there.", "Yes", "The cup is not red. A lid is there."),
    ("The cup isn't red", "No", "The cup is red"), ("The cups here are not red.", "no",
                                                    "The cups here are red."),
    ("There is no red cup", "No", "There is a red cup"), ("There are no red cups", "No",
                                                          "There are red cups"),
    ("The cup isn’t red", "No", "The cup is red"),
    ("The cup is red", "No", None), ("The lid is red", "Yes", None), ("The cup is blue", "No", None)])
def test_yes_and_no_turn_the_statement_round_that_the_question_asks_about(span, gold, after):
    target = "No" if gold == "Yes" else "Yes"
    if after is None:
        with pytest.raises(NotEditable, match="gold_not_mentioned"):
            edited([span], gold, target, "Is the cup red?")
    else:
        found, edit = edited([span], gold, target, "Is the cup red?")
        assert found == [after] and edit["kind"] == "polarity" and edit["n_other"] == (" no red cup" in span
                                                                                       and "is" in span)


def test_the_tables_come_second():
    found, edit = edited(["The car is red."], "a red car", "two blue trucks")
    assert found == ["The car is blue."] and (edit["from"], edit["to"]) == ("red", "blue")
    assert [slot.old for slot in slots(make_item("a red car", "two blue trucks"), "B")] == ["red car", "red"]


@pytest.mark.parametrize("one, other, n", [("", "", 0), ("a b c", "a c", 1), ("a b", "b a", 2),
                                           ("a  b", "a b", 0),
                                           ("kitten sits", "", 2), ("x a b c", "a b c y", 2)])
def test_word_distance(one, other, n):
    assert word_distance(one, other) == word_distance(other, one) == n


# ------------------------------------------------------------------------------------ the verifier
@pytest.mark.parametrize("after, reason", [
    (["the blue cup", "a red plate"], None), (["the blue cup clearly", "a red plate"], None),
    (["the blue cup", "a blue plate"], None), (["the blue cup"], "span_count"),
    (["the blue cup, red", "a red plate"], "residual_gold"), (["the red cup", "a blue plate"], "unchanged"),
    (["the red cup", "a red plate"], "residual_gold"),
    (["the cup", "a red plate"], "residual_gold"), (["the green cup", "a plate"], "residual_gold"),
    (["the blue cup (B)", "a red plate"], "letter_in_span"), (["the blue cup \\boxed{B}", "a red plate"],
                                                              "marks_in_span"),
    (["the blue cup</think_image>", "a red plate"], "marks_in_span")])
def test_the_verifier(after, reason):
    before, item = ["the red cup", "a blue plate"], make_item("red", "blue")
    if reason:
        with pytest.raises(NotEditable, match=reason):
            verify_directed(before, after, item, "B")
    else:
        edit = verify_directed(before, after, item, "B")
        assert edit["n_replaced"] == 1 and edit["n_other"] == (1 if "clearly" in after[0] else 0)


# ------------------------------------------------------------------------------------ real replies
@pytest.mark.skipif(not REAL.exists(), reason="the real replies of Monet-7B are not here")
def test_coverage_on_real_replies():
    """Most of 304 replies without marks have words before their conclusion; where these name the right
    option, they can be edited."""
    n_spans = n_done = n_named = 0
    for row in map(json.loads, REAL.read_text().splitlines()):
        item = {"question": row["question"], "options": list(map(list, row["options"].items())),
                "answer": {"value": row["gold"]}}
        target = next(letter for letter in row["options"] if letter != row["gold"])
        if not (spans := before_conclusion(row["output"])):
            continue
        n_spans += 1
        n_named += row["options"][row["gold"]].lower() in row["output"][slice(*spans[0])].lower()
        try:
            text, edit = direct(row["output"], spans, item, target)
        except NotEditable as fault:
            assert str(fault) in NOT_EDITABLE
            continue
        n_done += 1
        (start, end), grown = spans[0], len(text) - len(row["output"])
        assert text[:start] == row["output"][:start] and text[end + grown:] == row["output"][end:]
        back = {**item, "answer": {"value": target}}
        again, _ = direct(text, [(start, end + grown)], back, row["gold"])
        assert word_distance(again, row["output"]) == 0  # the way back leads to where it came from
    assert n_spans > 0.8 * 304 and n_done > 0.85 * n_named


# ------------------------------------------------------------------------------------ the LLM editor
def sample(question="", span="a red cup", gold="red", target="blue"):
    text = f"I look. <think_image>{span}</think_image> and <think_image>a lid</think_image>"
    return text, find_spans(text), make_item(gold, target, f"What color is the cup? {question}"), "B"


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as (_, url):
        yield HttpBackend("m", url, 10**6), tmp_path


def test_the_llm_edits_and_a_second_run_asks_nothing(server):
    backend, folder = server
    samples = [sample(), sample(span="a Red cup"), sample(span="a green cup"), sample(span="red (A)")]
    with Journal(folder / "run", {}) as journal:
        found = direct_all(make_caller(backend, journal), samples)
    text, edit = found[0]
    assert text == "I look. <think_image>a blue cup</think_image> and <think_image>a lid</think_image>"
    assert edit["editor"] == "llm" and edit["prompt"] == VERSION and edit["model"] == "m" and edit[
        "word_distance"] == 1
    assert edit["before"] == ["a red cup", "a lid"] and edit["changed_phrases"] == ["blue"] and edit[
        "n_replaced"] == 1
    assert [str(fault) for fault in found[1:]] == ["unchanged", "gold_not_mentioned", "letter_in_span"]
    calls = calls_of(folder)
    assert len(calls) == 2 + RETRIES == 5 and {call["temperature"] for call in calls} == {0.0}
    with Journal(folder / "run", {}) as journal:
        again = direct_all(replace(make_caller(backend, journal), backend=None), samples)
        assert again[0] == found[0] and len(calls_of(folder)) == len(calls)
        with pytest.raises(IncompleteError):
            direct_all(replace(make_caller(backend, journal), backend=None), [sample("new")])


@pytest.mark.parametrize("fault, reason, n_calls", [
    ("prose", "bad_json", 4), ("wrongschema", "bad_schema", 4), ("length", "cut_off", 4),
    ("400", "backend_error", 1),
    ("residual", "unchanged", 4), ("missing", "span_count", 4), ("late", None, 3), ("fenced", None, 1),
    ("503", None, 3)])
def test_a_model_that_fails_is_a_reason_and_never_the_rule(server, fault, reason, n_calls):
    backend, folder = server
    with Journal(folder / "run", {}) as journal:
        found, = direct_all(make_caller(backend, journal), [sample(f"fault:{fault}")])
    assert len(calls_of(folder)) == n_calls
    if reason:
        assert isinstance(found,
                          NotEditable) and str(found) == reason and reason in NOT_EDITABLE and found.detail
    else:
        assert found[1]["editor"] == "llm" and found[1]["after"] == ["a blue cup", "a lid"]
