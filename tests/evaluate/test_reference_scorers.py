"""Other harnesses' verdicts, against what their own code answered."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from replies import OPTIONS, REPLIES
from samples import shortest_path, table

from utils.evaluate.reference_scorers import (mme_realworld, unescape, vlmevalkit_e8e78f0,
                                              vlmevalkit_realworld, vtabfact, vwtq)
from utils.items import vsp_moves, walk_vsp
from utils.jsonl import write_rows

ROOT = Path(__file__).parents[2]


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


def test_readers_of_other_harnesses_are_counted_by_their_own_code(tmp_path):
    """A checkout with the functions that speed/readers.py calls; some read the first letter, one nothing."""
    functions = {"theirs/vlmeval/utils/matching_util.py": "from vlmeval.smp.log import get_logger\n"
                 "def can_infer(answer, choices): return answer[0]",
                 "theirs/lmms_eval/api/reasoning.py":
                     "def strip_reasoning_tags(text, tags): return text.removeprefix('<i>')",
                 "theirs/lmms_eval/tasks/_task_utils/mcq_extract.py":
                     "def extract_mcq_answer(response, choices): return response[0]",
                 "theirs/lmms_eval/tasks/vstar_bench/utils.py":
                     "from loguru import logger\ndef extract_answer_letter(response): return None"}
    for name, code in functions.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    git = ("git", "-C", tmp_path / "theirs", "-c", "user.name=a", "-c", "user.email=a@b.example")
    subprocess.run([*git[:3], "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "none"], check=True)
    replies = [("<i>B", ["B"]), ("A. No, it is B", ["B", "-"]), ("?", ["-"])]
    write_rows(tmp_path / "replies.jsonl", [{"output": text, "options": {"A": "white", "B": "red"},
                                             "expected": expected} for text, expected in replies])
    theirs = tmp_path / "theirs"
    command = [sys.executable, ROOT / "speed" / "readers.py", "--replies", tmp_path / "replies.jsonl",
               "--vlmevalkit", theirs, "--lmms_eval", theirs, "--output", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) and found["n"] == 3
    counts = [[reader[key] for key in ("right", "wrong_letter", "unresolved")]
              for reader in found["readers"].values()]
    assert counts == [[3, 0, 0], [1, 1, 1], [2, 1, 0], [2, 0, 1]]
