"""Other harnesses' verdicts, against what their own code answered."""
import json
import time

import pytest
from harness_table import OPTIONS, REPLIES
from samples import shortest_path, table

from utils.evaluate.reference_scorers import (mme_realworld, unescape, vlmevalkit_e8e78f0,
                                              vlmevalkit_realworld, vtabfact, vwtq, without_label)
from utils.items import vsp_moves, walk_vsp


@pytest.mark.parametrize("name, gold, reply, letter, mme, ours, rule", REPLIES)
def test_frozen_columns(name, gold, reply, letter, mme, ours, rule):
    options = OPTIONS[name]
    before = dict(options)
    assert (vlmevalkit_e8e78f0(reply, options), mme_realworld(reply)) == (letter, mme)
    assert options == before  # theirs lower-cases the texts in place


SCORERS = {  # the four texts of COL sum to 17 characters, so a text counts in up to 34 for VLMEvalKit
    "vlmevalkit": lambda case: vlmevalkit_e8e78f0(case["reply"], OPTIONS["COL"]),
    "mme_realworld": lambda case: mme_realworld(case["reply"]),
    "vlmevalkit_realworld": lambda case: vlmevalkit_realworld(case["reply"]),
    "vwtq": lambda case: vwtq(case["reply"], case["gold"]),
    "vtabfact": lambda case: vtabfact(case["reply"], case["gold"]),
    "vsp": lambda case: walk_vsp([[1, -1], [0, 0], [0, 2]], vsp_moves(case["reply"]) or "")}


@pytest.mark.parametrize("case", table("reference_verdicts"))
def test_verdicts(case):
    assert SCORERS[case["scorer"]](case) == case["verdict"]


def test_only_letters_that_are_options_are_inferred():
    for word, letter in (("certainly", None), ("below,", "B")):
        reply = f"The answer is {word} on this side of the river, as I said"
        assert vlmevalkit_e8e78f0(reply, {"A": "left", "B": "right"}) == letter


def test_escapes_are_undone_in_order_and_an_infinite_gold_is_refused():
    assert unescape(r"a\nb\pc\\d") == "a\nb|c\\d"
    with pytest.raises(ValueError, match="infinite"):
        vwtq("5", "inf")
    assert not vwtq("9" * 400, "1.5") and not vwtq("9" * 5000, "5")  # nor are these numbers of theirs


def test_only_a_label_in_front_is_removed():
    assert without_label("Answer: 2004") == "2004"
    assert all(without_label(text) == text for text in ("answer: 2", "The Answer: 2", "Answer:2"))


def test_a_long_row_of_brackets_takes_no_time():
    """Two readings of each bracket would be 2 to the 200 ways to fail."""
    began = time.monotonic()
    assert not vwtq("[1]" * 200 + " x", "y") and time.monotonic() - began < 5


def test_the_shortest_path_solves_every_real_map(shared_data):
    lines = (shared_data / "vsp" / "test.jsonl").read_text().splitlines()
    assert len(lines) == 400
    for board in (json.loads(line)["map_desc"] for line in lines):
        path = shortest_path(board)
        assert path and walk_vsp(board, path)
        assert not walk_vsp(board, path[:-1])
