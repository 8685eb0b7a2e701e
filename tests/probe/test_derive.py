"""Probe questions written by a model: rules one by one, whole runs against a server, a local model."""
import json
import re
from collections import Counter

import numpy as np
import pytest
from fault_server import DEFECTS, calls_of, serving
from PIL import Image
from samples import table

import probe
from utils.items import region_in
from utils.jsonl import DataError, read_rows, write_rows
from utils.probe.candidates import REASONS, RULES, Candidate, broken_rule
from utils.probe.derive import View, export_questions, view_items


def item(n: int, **changes) -> dict:
    return {"id": f"s/{n}", "question": f"What number is on boat {n}?", "options": [["A", "41"], ["B", "42"]],
            "answer": {"type": "letter", "value": "B"}, "images": [{"path": "a.png"}],
            "metric": "mcq"} | changes


def flags(folder, output, *more):
    return ["derive", "--items", str(folder / "items.jsonl"), "--image_root", str(folder), "--output",
            str(folder / output), *more]


def run(folder, url, *more, output="out.jsonl"):
    return probe.main(flags(folder, output, "--backend", "openai", "--model", "m", "--base_url", url, *more))


def read(folder, name="out.jsonl"):
    return [read_rows(folder / path, {"id": str}) for path in (name, f"{name}.run/verdicts.jsonl")]


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def world(tmp_path, picture):
    """Ten sources: a good one, one with every fault of writing, errors, unusable pictures, a region."""
    picture("a.png", (120, 90)), picture("b.png", (120, 90), "blue")
    write_rows(tmp_path / "items.jsonl", [
        item(0), item(1, question="What number is on the lid? fault:rules"),
        item(2, question="What number? fault:prose"),
        item(3, images=[{"path": "none.png"}]), item(4, region=[30, 30, 60, 50]),
        item(5, region=[300, 0, 310, 9]), item(6, question="What number is here? fault:few"),
        item(0, id="s/7"), item(8, images=[{"path": "b.png"}]),
        item(9, metric="wtq", options=[], answer={"type": "values", "value": ["42"]},
             question="Which number is it?")])
    return tmp_path


# ---- rules
VALID = {"question": "What colour is the hull?", "gold": "white", "wrong": ("red", "green", "dark blue")}


@pytest.mark.parametrize("case", table("candidates"))
def test_every_rule_finds_its_fault_and_no_other(case):
    fault = broken_rule(Candidate("c", item(0), "colour", **(VALID | case["changes"])))
    assert (fault and fault[0]) == case["reason"] and case["reason"] in (None, *RULES)


def test_a_yes_no_source_does_not_forbid_the_word():
    source = item(0, question="Is there a dog?", options=[], metric="yesno_pair",
                  answer={"type": "yesno", "value": "no"})
    for question, reason in (("What does the sign say?", None), ("Is there no smoking?", "gold_in_stem")):
        fault = broken_rule(Candidate("c", source, "text", question, "no", ("go", "so", "ho")))
        assert (fault and fault[0]) == reason


def test_each_candidate_has_its_own_order_of_options_with_the_right_one_at_a_given_letter():
    candidate = Candidate("c", item(0), "colour", **VALID)
    assert candidate.options(3) == candidate.options(3)
    assert sorted(candidate.options(3).values()) == ["dark blue", "green", "red", "white"]
    assert all(candidate.options(0, letter)[letter] == "white" for letter in "ABCD")
    orders = [Candidate(str(n), item(0), **VALID).options(0) for n in range(800)]
    places = Counter(letter for order in orders for letter, text in order.items() if text == "white")
    assert all(150 < places[letter] < 250 for letter in "ABCD")


def test_a_region_that_cannot_be_written_ends_the_run_and_is_not_a_bad_region(world):
    assert region_in({"id": "x", "region": [-5, 10, 40, 99]}, (30, 50)) == [0, 10, 30, 50]
    with pytest.raises(DataError, match="'x': region .* in an image of 30 x 50"):
        region_in({"id": "x", "region": [30, 0, 40, 9]}, (30, 50))
    folder, items = world / "o.jsonl.run" / "regions", [item(4, region=[30, 30, 60, 50])]
    folder.parent.mkdir()
    folder.write_text("a file where the folder belongs")
    args = probe.parse_args(flags(world, "o.jsonl"))
    with pytest.raises(DataError, match="regions.*make room"):
        view_items(items, None, args)
    folder.unlink()
    good, bad = view_items([*items, item(5, region=[300, 0, 310, 9])], None, args)
    assert isinstance(good, View) and bad[0] == "region" and "in an image of 120 x 90" in bad[1]
    assert Image.open(good.paths[1]).format == "PNG" and not list(folder.glob("*.tmp"))


def test_right_options_are_dealt_evenly(tmp_path):
    candidates = [Candidate(f"c/{n}", item(n), "colour", **VALID) for n in range(203)]
    counts = export_questions(candidates, probe.parse_args(flags(tmp_path, "o.jsonl")))
    assert sorted(counts["gold_letters"].values()) == [50, 51, 51, 51]
    rows = read_rows(tmp_path / "o.jsonl", {"id": str})
    assert all(dict(row["options"])[row["answer"]["value"]] == "white" for row in rows)
    letters = "".join(row["answer"]["value"] for row in rows)
    assert max(map(len, re.findall(r"A+|B+|C+|D+", letters))) < 12 and letters[:8] != "ABCDABCD"


# ---- whole runs
def test_every_candidate_has_a_verdict_and_the_counts_add_up(world, capsys):
    n = len(DEFECTS)
    with serving(world, latency=0) as (_, url):
        asked = [world, url, "--questions", str(n), "--drop_blind"]
        assert run(*asked) == 3
        calls, metrics = calls_of(world), printed(capsys)
        rows, verdicts = read(world)
        outputs = [world / "out.jsonl", world / "out.jsonl.run" / "verdicts.jsonl"]
        before = [path.read_bytes() for path in outputs]
        for more in ((), ("--export_only",)):  # again: no call, the same bytes
            assert run(*asked, *more) == 3
        assert len(calls_of(world)) == len(calls)
        assert before == [path.read_bytes() for path in outputs]
        with pytest.raises(DataError, match="begun with other settings"):
            run(world, url, "--questions", str(n), "--seed", "1")
    assert len(verdicts) == metrics["asked"] == 10 * n and metrics["errors"] == n
    assert metrics["kept"] + metrics["rejected"] + metrics["errors"] == metrics["asked"]
    reasons = [[v["reason"] for v in verdicts if v["source"] == f"s/{source}"] for source in range(10)]
    assert reasons[1] == [reason for _, reason in DEFECTS]
    assert {v["stage"] for v in verdicts if v["source"] == "s/2"} == {"error"}
    for source, reason in ((2, "bad_json"), (3, "image_missing"), (5, "region"), (7, "duplicate")):
        assert set(reasons[source]) == {reason}
    assert Counter(reasons[6]) == {None: 10, "not_written": n - 10}
    assert {v["reason"] for v in verdicts} <= {None, *REASONS}
    assert {row["id"] for row in rows} == {v["id"] for v in verdicts if v["keep"]}
    assert len(rows) == metrics["kept"] and np.ptp([*metrics["gold_letters"].values()]) <= 1
    with_region = next(call for call in calls if "other multiple-choice" in call["text"]
                       and call["text"].splitlines()[3] == "What number is on boat 4?")
    assert len(with_region["images"]) == 2 and "enlarged region" in with_region["text"]
    shown = Image.open(next((world / "out.jsonl.run" / "regions").iterdir()))
    assert shown.width * shown.height >= 224 * 224 and shown.width > shown.height
    blind = [call for call in calls if "cannot see" in call["text"]]
    assert blind and not any(call["images"] for call in blind)
    # probe.py reads what was written
    args = probe.parse_args(["--model", "m", "--items", str(world / "items.jsonl"), "--probe_items",
                             str(world / "out.jsonl"), "--output", "o"])
    assert len(probe.read_inputs(args).probes) == len(rows)


def test_parts_of_a_run_and_shards_write_what_one_run_writes(world):
    with serving(world, latency=0) as (_, url):
        assert run(world, url, output="one.jsonl") == 3
        n_calls = len(calls_of(world))
        run(world, url, "--limit", "4", output="parts.jsonl")
        assert run(world, url, output="parts.jsonl") == 3
        assert len(calls_of(world)) == 2 * n_calls
        assert [run(world, url, "--shard", f"{i}/3", output="shards.jsonl") for i in range(3)] == [0, 0, 3]
    for name in ("parts.jsonl", "shards.jsonl"):
        assert read(world, name) == read(world, "one.jsonl")


def test_another_model_on_its_own_server_answers(world, capsys):
    write_rows(world / "items.jsonl", [item(n, answer={"type": "letter", "value": "A"}) for n in range(40)])
    with serving(world, latency=0) as (_, url), serving(world, "answers.jsonl", latency=0) as (_, other):
        asked = [world, url, "--answer_model", "judge", "--answer_base_url", other]
        assert run(*asked) == 0
        metrics = printed(capsys)
        assert Counter(call["model"] for call in calls_of(world)) == {"m": 40}
        assert Counter(call["model"] for call in calls_of(world, "answers.jsonl")) == {"judge": 120}
        assert metrics["n_calls"] == 160 and metrics["n_orphaned"] == 0
        assert metrics["kept"] == 120 and set(metrics["gold_letters"].values()) == {30}
        assert run(*asked, "--export_only") == 0
        with pytest.raises(DataError, match="begun with other settings"):
            run(world, url)


def test_a_local_model_that_cannot_write_makes_errors_and_no_crash(tiny_checkpoint, world, capsys):
    asked = flags(world, "l.jsonl", "--model", str(tiny_checkpoint), "--max_new_tokens", "8")
    assert probe.main([*asked, "--dry_run"]) == 0 and not (world / "l.jsonl.run").exists()
    assert printed(capsys)["calls"]["write"]["calls"] == 8
    assert probe.main(asked) == 3
    metrics = printed(capsys)
    assert metrics["errors"] == 7 * 3 and metrics["rejected"] == 3 * 3 and metrics["kept"] == 0
    assert (world / "l.jsonl").read_text() == ""


def test_flags_of_an_answerer_need_its_model(tmp_path, capsys):
    for wrong in (["--answer_backend", "local"], ["--answer_base_url", "http://127.0.0.1/v1"]):
        with pytest.raises(SystemExit):
            probe.parse_args(flags(tmp_path, "o.jsonl", *wrong))
        assert "need --answer_model" in capsys.readouterr().err
