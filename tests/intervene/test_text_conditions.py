"""The conditions on text imaginations: hand-written cases."""
import random
import re
from collections import Counter

import pytest
from samples import before_conclusion

from utils.intervene.edits import NOT_EDITABLE, NotEditable, direct, word_distance
from utils.intervene.text_conditions import (CONSTANT, EDITS, TEXT_CONDITIONS, TEXT_PRESETS, Context,
                                             until_last_span)
from utils.intervene.word_forms import CLASSES, SYNONYMS, option_words, others, reworded, survivors
from utils.jsonl import read_rows
from utils.reply_text import NUMBERS
from utils.rows import SPAN, find_spans

ITEM = {"id": "i", "question": "What color is the cup?", "answer": {"type": "letter", "value": "A"},
        "options": [["A", "red"], ["B", "blue"], ["C", "green"]]}
TEXT = ("I look. <think_image>The image shows a red cup on a wooden table, 2 lids.</think_image> More: "
        "<think_image>a red lid</think_image> So it is \\boxed{A}.")
SPANS = ["The image shows a red cup on a wooden table, 2 lids.", "a red lid"]


def run(condition, spans=SPANS, item=ITEM, text=None, **context):
    """Apply a condition; check what every edit must keep, and return (text, edit)."""
    if text is None:
        marked = [f"word {n} <think_image>{span}</think_image>" for n, span in enumerate(spans)]
        text = " ".join(marked) + " The end."
    places = find_spans(text)
    before = until_last_span(text, places)
    after, edit = EDITS[condition](before, places, item, Context(**{"target": "B", **context}))
    assert {"editor", "target", "before", "after", "word_distance"} <= set(edit) and edit["target"] == "B"
    assert edit["before"] == [text[a:b] for a, b in places]
    assert edit["word_distance"] == sum(map(word_distance, edit["before"], edit["after"]))
    if condition not in ("no_span", "bare"):  # nothing outside the spans changed
        assert SPAN.sub("", after) == SPAN.sub("", before)
        assert [after[a:b] for a, b in find_spans(after)] == edit["after"]
    return after, edit


def refused(condition, **more):
    with pytest.raises(NotEditable) as fault:
        run(condition, **more)
    assert str(fault.value) in NOT_EDITABLE and fault.value.detail
    return str(fault.value)


# ---- one test per condition
@pytest.mark.parametrize("condition, after", [
    ("sham", SPANS), ("removal", ["", ""]), ("constant", [CONSTANT, CONSTANT]),
    ("filler", ["... ... ... ... ... ... ... ... ... ... ... ...", "... ... ..."]),
    ("directed", ["The image shows a blue cup on a wooden table, 2 lids.", "a blue lid"]),
    # 15 words: of 3.75, 7.5 and 11.25 4, 8 and 11
    ("truncate_0", ["", ""]), ("truncate_25", ["The image shows a", ""]),
    ("truncate_50", ["The image shows a red cup on a", ""]),
    ("truncate_75", [SPANS[0].removesuffix(" lids."), ""])])
def test_each_condition(condition, after):
    edit = run(condition)[1]
    assert edit["after"] == after and (edit["word_distance"] == 0) == (condition == "sham")


@pytest.mark.parametrize("condition, expected", [
    ("no_span", "I look. More:"), ("bare", "I look. <think_image> More: <think_image>")])
def test_marks_go_with_the_span_or_stay_alone(condition, expected):
    text, edit = run(condition, text=TEXT)
    assert text == expected and edit["after"] == ["", ""] and edit["word_distance"] == 15


def test_a_truncation_keeps_the_spaces_and_grows():
    spans = ["a  b\nc d", "e f g h"]
    kept = [" ".join(run(f"truncate_{p}", spans=spans)[1]["after"]).split() for p in (0, 25, 50, 75)]
    assert kept == [[], list("ab"), list("abcd"), list("abcdef")]
    assert run("truncate_25", spans=spans)[1]["after"] == ["a  b", ""]
    assert run("truncate_75", spans=["one"])[1]["after"] == ["one"]  # kept in the curve, at distance 0


def test_foreign_takes_the_donors_spans_and_an_edit_that_changes_nothing_is_refused():
    assert run("foreign", donor=["x", "y", "z"])[1]["after"] == ["x", "y"]
    assert refused("foreign") == refused("foreign", donor=["x"]) == "no_donor"
    assert refused("foreign", donor=SPANS) == "unchanged"
    assert refused("removal", spans=[""]) == refused("filler", spans=[""]) == "unchanged"
    assert refused("constant", spans=[CONSTANT]) == "unchanged"
    for name in ("directed", "irrelevant"):
        assert refused(name, spans=["a green cup"]) == "gold_not_mentioned"


# ---- paraphrase
@pytest.mark.parametrize("span, after", [
    ("The image clearly shows an image", "The picture plainly displays a picture"),
    ("SHOWS 2", "DISPLAYS 2"), ("The cup is red", "In this view, the cup is red"),
    ("Mickey Mouse", "In this view, Mickey Mouse")])
def test_paraphrases(span, after):
    assert run("paraphrase", spans=[span])[1]["after"] == [after]


def test_a_paraphrase_keeps_the_words_of_options_and_survivors_see_what_is_lost():
    item = {**ITEM, "options": [["A", "next to the area"], ["B", "beside the shows"]]}
    span = "The image shows it next to the area"
    assert run("paraphrase", spans=[span], item=item)[1]["after"] == ["The picture shows it next to the area"]
    assert survivors([span], item) == survivors([reworded(span, item)], item)
    base = survivors(["two red cups, 3.5 m"], ITEM)
    assert base == survivors(["3.5 m: red cups, 2 of them"], ITEM)
    assert base == {"red": 1, "number 2": 1, "number 3.5": 1}
    for changed in ("two cups, 3.5 m", "red cups, 3.5 m", "two red cups, 3.6 m"):
        assert base != survivors([changed], ITEM)


def test_a_paraphrase_that_loses_a_value_is_refused(monkeypatch):
    monkeypatch.setitem(SYNONYMS, "cup", "mug")
    monkeypatch.setitem(SYNONYMS, "2", "5")
    monkeypatch.setattr("utils.intervene.word_forms.option_words", lambda item: set())
    options = [["A", "cup"], ["B", "7"]]
    assert refused("paraphrase", item={**ITEM, "options": options}) == "value_changed"


# ---- the irrelevant edit
def test_the_irrelevant_edit_is_as_large_and_spares_options_and_question():
    spans = ["A red cup beside a black cup on a wooden table, 2 lids"]
    for seed in range(20):
        edit = run("irrelevant", spans=spans, seed=seed)[1]
        assert edit["directed_distance"] == edit["word_distance"] == 1
        old, new = edit["from"][0], edit["to"][0]
        assert old in ("black", "wooden", "table", "two")
        assert new not in ("red", "blue", "green", "cup", *spans[0].split())
        assert any({old, new} <= set(words) for words in CLASSES)
    assert len({run("irrelevant", spans=spans, seed=seed)[1]["from"][0] for seed in range(20)}) == 4
    assert run("irrelevant", spans=spans, seed=3) == run("irrelevant", spans=spans, seed=3)


def test_more_words_are_changed_for_a_larger_edit_and_nothing_to_change_is_a_reason():
    edit = run("irrelevant", spans=["A red cup and a red lid, a black dog, a wooden table, 27 cars"])[1]
    assert edit["directed_distance"] == edit["word_distance"] == 2 and len(edit["from"]) == 2
    few = run("irrelevant", spans=["red red red table"])[1]
    assert few["directed_distance"] == 3 and few["word_distance"] == 1  # words ran out
    assert refused("irrelevant", spans=["The cup is red"]) == "no_irrelevant_word"
    assert refused("irrelevant", spans=["The cup is red, not green"]) == "no_irrelevant_word"
    for number in ("7", "seven", "42"):
        assert others([f"a cup, {number}"], {**ITEM, "question": f"Is {number} on the cup?"},
                      random.Random(0)) == []
        (_, new), = others([f"a cup, {number}"], ITEM, random.Random(0))
        assert new.isdigit() and len(new) == 2 if number == "42" else new in NUMBERS[2:13]


def test_tables_hold_what_they_claim():
    words = [word for group in CLASSES for word in group]
    assert len(words) == len(set(words)) and all(len(group) > 1 for group in CLASSES)
    assert not set(words) & set(re.split(r"[\s-]", " ".join((*SYNONYMS, *SYNONYMS.values()))))
    assert option_words(ITEM) == {"red", "blue", "green"}
    assert all(set(names) <= set(TEXT_CONDITIONS) for names in TEXT_PRESETS.values())


# ---- real replies
def test_coverage_on_real_replies(shared_data):
    """A condition that does not apply gives a reason, most conditions lose no reply, and the way back of a
    directed edit leads to where it came from."""
    n, n_named, covered = 0, 0, Counter()
    for row in read_rows(shared_data / "real_outputs" / "vstar_dev.jsonl", {}):
        text, gold = row["output"].split("<ltnt")[0], row["gold"]  # a fork's log, behind the reply
        item = {**row, "options": list(map(list, row["options"].items())), "answer": {"value": gold}}
        if not (spans := before_conclusion(text)):
            continue
        n += 1
        n_named += row["options"][gold].lower() in text[slice(*spans[0])].lower()
        target = next(letter for letter in row["options"] if letter != gold)
        for name, condition in EDITS.items():
            context = Context(target, ["The donor looks elsewhere."])
            try:
                after, _ = condition(until_last_span(text, spans), spans, item, context)
                covered[name] += 1
            except NotEditable as fault:
                assert str(fault) in NOT_EDITABLE
                continue
            if name == "directed":
                after, _ = direct(text, spans, item, target)
                (start, end), grown = spans[0], len(after) - len(text)
                assert after[:start] == text[:start] and after[end + grown:] == text[end:]
                back = {**item, "answer": {"value": target}}
                again, _ = direct(after, [(start, end + grown)], back, gold)
                assert word_distance(again, text) == 0
    assert n > 0.8 * 304 and covered["directed"] > 0.85 * n_named
    assert {covered[name] for name in set(EDITS) - {"irrelevant", "directed"}} == {n}
    assert covered["directed"] > 0.6 * n > covered["irrelevant"] > 0.1 * n
