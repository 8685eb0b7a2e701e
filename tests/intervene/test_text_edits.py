"""The directed edit, by rules and by an LLM: hand-written cases."""
from dataclasses import replace

import pytest
from fault_server import calls_of, serving

from utils.intervene.edits import (NOT_EDITABLE, NotEditable, clauses, direct, put_spans, slot_values, slots,
                                   table_values, verify_directed, word_distance)
from utils.intervene.text_conditions import RETRIES, VERSION, direct_all, make_caller
from utils.intervene.word_forms import article_for, exchange
from utils.journal import Journal
from utils.model_calls import IncompleteError
from utils.openai_backend import HttpBackend
from utils.rows import conclusion, find_spans


def make_item(gold, target, question="What is it?"):
    return {"id": "i", "question": question, "options": [["A", gold], ["B", target]],
            "answer": {"type": "letter", "value": "A"}}


def edited(spans, gold, target, question="What is it?"):
    """Edit "Look. <think_image>span</think_image> and ..." and return the new spans and the edit."""
    text = "Look." + "".join(f" <think_image>{span}</think_image> and" for span in spans)
    after, edit = direct(text, find_spans(text), make_item(gold, target, question), "B")
    assert after.startswith("Look. <think_image>") and after.endswith("</think_image> and")
    assert [after[a:b] for a, b in find_spans(after)] == edit["after"] and edit["before"] == list(spans)
    return edit["after"], edit


def test_a_reply_without_marks_has_no_span_and_spans_are_put_back_in_place():
    text = "I look. The cup is red. Therefore, the final answer is \\boxed{A}."
    assert find_spans(text) == [] and conclusion(text) == text
    assert put_spans("a-b-c", [(0, 1), (4, 5)], ["long", ""]) == "long-b-"
    with pytest.raises(ValueError):
        put_spans("a-b", [(0, 1), (2, 3)], ["x"])


# ---- slots and their forms
@pytest.mark.parametrize("gold, target, pair", [
    ("The color of the cart is red.", "The color of the cart is blue.", ("red", "blue")),
    ("(A) a red car", "(B) a blue car", ("red", "blue")), ("3", "4", ("3", "4")),
    ("in front of the bin", "behind the bin", ("in front of", "behind"))])
def test_slot_values(gold, target, pair):
    assert slot_values(gold, target) == pair


@pytest.mark.parametrize("gold, target, pair", [
    ("a red car", "two blue trucks", ("red", "blue")),
    ("made of wood", "it looks like plastic", ("wood", "plastic")),
    ("There are two", "I count 5", ("two", "five")),
    ("to the left of it", "right beside", ("left", "right"))])
def test_tables_where_options_share_no_wording(gold, target, pair):
    assert table_values(gold, target) == pair
    for wrong in (("a red or blue car", "two green trucks"), ("a red car", "two red trucks"),
                  ("a car", "trucks")):
        with pytest.raises(NotEditable, match="no_slot_value"):
            table_values(*wrong)


def test_articles():
    assert {article_for(word) for word in ("orange", "hour", "8", "18", "umbrella")} == {"an"}
    assert {article_for(word) for word in ("red", "unicorn", "180", "one")} == {"a"}


@pytest.mark.parametrize("n", (1, 5, 12, 37))
@pytest.mark.parametrize("text", ("The value: {}", "It is {}.", "({}) at noon", "from {}, then on"))
def test_a_sign_belongs_to_its_number(text, n):
    for said, counts in ((f"-{n}", {"gold": 1, "target": 0}), (str(n), {"gold": 0, "target": 1})):
        assert exchange(text.format(said), f"-{n}", str(n))[1] == counts


def test_clauses_join_again_and_a_pronoun_carries_on():
    text = "The dogs bark, and it sits, which helps. A cat sleeps: nobody knows. It is 3.5 m away"
    parts = clauses(text)
    assert "".join(part for part, _ in parts) == text
    assert [("dog" in named, "cat" in named) for _, named in parts] == [
        (True, False), (True, False), (True, False), (False, True), *[(False, False)] * 3]


# ---- the rule editor
@pytest.mark.parametrize("spans, gold, target, after, n_replaced, n_words", [
    (["two dogs and a dog"], "dog", "cat", ["two cats and a cat"], 2, 2),
    (["an orange cup"], "orange", "red", ["a red cup"], 1, 2), (["a 7"], "seven", "eight", ["an 8"], 1, 2),
    (["Three cups, 3 lids"], "3", "5", ["Five cups, 5 lids"], 2, 2),
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
    assert (found, edit["n_replaced"], edit["word_distance"]) == (after, n_replaced, n_words)
    assert edit["n_other"] == edit["residual_gold"] == 0
    assert (edit["editor"], edit["target"]) == ("rule", "B")


@pytest.mark.parametrize("spans, gold, target, reason", [
    (["a bored, scarred man"], "red", "blue", "gold_not_mentioned"),
    (["red, option B says"], "red", "blue", "letter_in_span"), (["red (C)"], "red", "blue", "letter_in_span"),
    (["a car"], "a car", "the car", "no_slot_value"), (["a cat"], "it", "not", "no_slot_value"),
    (["it is there"], "yes", "no", "no_slot_value")])
def test_what_the_rules_refuse(spans, gold, target, reason):
    with pytest.raises(NotEditable, match=f"^{reason}$"):
        edited(spans, gold, target)
    assert reason in NOT_EDITABLE


def test_sides_change_only_in_clauses_about_the_question():
    question = "Is the dog on the left or right side of the bicycle?"
    stays, tree = "A man stands on the left.", "and a tree is on the right."
    spans = [f"{stays} The dog is to the left of the bicycle, {tree}", "It sits left"]
    after, edit = edited(spans, "left", "right", question)
    assert after == [f"{stays} The dog is to the right of the bicycle, {tree}", "It sits left"]
    assert (edit["kind"], edit["n_replaced"], edit["n_exchanged"]) == ("side", 1, 0)
    with pytest.raises(NotEditable, match="gold_not_mentioned"):
        edited([stays], "left", "right", question)
    for span, asked, wanted in (("The dogs sleep. They lie left of it.", question,
                                 "The dogs sleep. They lie right of it."),
                                ("a man on the left", "", "a man on the right")):  # a question naming nothing
        assert edited([span], "left", "right", asked)[0] == [wanted]
    # a wrong side in the same clause is exchanged
    after, edit = edited(["The dog is right of the left bicycle"], "right", "left", "Where is the dog?")
    assert after == ["The dog is left of the right bicycle"] and edit["n_exchanged"] == 1


@pytest.mark.parametrize("span, gold, after", [
    ("The cup is red. A lid is there.", "Yes", "The cup is not red. A lid is there."),
    ("The cup isn't red", "No", "The cup is red"), ("The cup isn’t red", "No", "The cup is red"),
    ("The cups here are not red.", "no", "The cups here are red."),
    ("There is no red cup", "No", "There is a red cup"),
    ("There are no red cups", "No", "There are red cups"),
    ("The cup is red", "No", None), ("The lid is red", "Yes", None), ("The cup is blue", "No", None)])
def test_yes_and_no_turn_the_statement_round_that_the_question_asks_about(span, gold, after):
    target = "No" if gold == "Yes" else "Yes"
    if after is None:
        with pytest.raises(NotEditable, match="gold_not_mentioned"):
            edited([span], gold, target, "Is the cup red?")
    else:
        found, edit = edited([span], gold, target, "Is the cup red?")
        assert found == [after] and edit["kind"] == "polarity"
        assert edit["n_other"] == (span == "There is no red cup")


def test_the_tables_come_second():
    found, edit = edited(["The car is red."], "a red car", "two blue trucks")
    assert found == ["The car is blue."] and (edit["from"], edit["to"]) == ("red", "blue")
    assert [slot.old for slot in slots(make_item("a red car", "two blue trucks"), "B")] == ["red car", "red"]


def test_word_distance():
    for a, b, n in (("", "", 0), ("a b c", "a c", 1), ("a b", "b a", 2), ("a  b", "a b", 0),
                    ("kitten sits", "", 2), ("x a b c", "a b c y", 2)):
        assert word_distance(a, b) == word_distance(b, a) == n


# ---- the verifier
@pytest.mark.parametrize("after, reason", [
    (["the blue cup", "a red plate"], None), (["the blue cup clearly", "a red plate"], None),
    (["the blue cup", "a blue plate"], None), (["the blue cup"], "span_count"),
    (["the blue cup, red", "a red plate"], "residual_gold"), (["the red cup", "a blue plate"], "unchanged"),
    (["the red cup", "a red plate"], "residual_gold"), (["the cup", "a red plate"], "residual_gold"),
    (["the green cup", "a plate"], "residual_gold"), (["the blue cup (B)", "a red plate"], "letter_in_span"),
    (["the blue cup \\boxed{B}", "a red plate"], "marks_in_span"),
    (["the blue cup</think_image>", "a red plate"], "marks_in_span")])
def test_the_verifier(after, reason):
    before, item = ["the red cup", "a blue plate"], make_item("red", "blue")
    if reason:
        with pytest.raises(NotEditable, match=reason):
            verify_directed(before, after, item, "B")
    else:
        edit = verify_directed(before, after, item, "B")
        assert edit["n_replaced"] == 1 and edit["n_other"] == (1 if "clearly" in after[0] else 0)


# ---- the LLM editor
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
    wanted = {"editor": "llm", "prompt": VERSION, "model": "m", "word_distance": 1, "n_replaced": 1,
              "before": ["a red cup", "a lid"], "changed_phrases": ["blue"]}
    assert edit | wanted == edit
    assert [str(fault) for fault in found[1:]] == ["unchanged", "gold_not_mentioned", "letter_in_span"]
    calls = calls_of(folder)
    assert len(calls) == 2 + RETRIES == 5 and {call["temperature"] for call in calls} == {0.0}
    with Journal(folder / "run", {}) as journal:
        again = direct_all(replace(make_caller(backend, journal), backend=None), samples)
        assert again[0] == found[0] and len(calls_of(folder)) == len(calls)
        with pytest.raises(IncompleteError):
            direct_all(replace(make_caller(backend, journal), backend=None), [sample("new")])


@pytest.mark.parametrize("fault, reason, n_calls", [
    ("prose", "bad_json", 4), ("wrongschema", "bad_schema", 4), ("length", "cut_off", 4), ("late", None, 3),
    ("400", "backend_error", 1), ("residual", "unchanged", 4), ("missing", "span_count", 4),
    ("fenced", None, 1), ("503", None, 3)])
def test_a_model_that_fails_is_a_reason_and_never_the_rule(server, fault, reason, n_calls):
    backend, folder = server
    with Journal(folder / "run", {}) as journal:
        found, = direct_all(make_caller(backend, journal), [sample(f"fault:{fault}")])
    assert len(calls_of(folder)) == n_calls
    if reason:
        assert type(found) is NotEditable and str(found) == reason and found.detail
        assert reason in NOT_EDITABLE
    else:
        assert found[1]["editor"] == "llm" and found[1]["after"] == ["a blue cup", "a lid"]
