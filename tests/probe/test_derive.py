"""Probe questions written by a model: rules one by one, whole runs against a server, a local model that
cannot write.

    python -m pytest tests/test_derive.py
"""
import json
from collections import Counter

import pytest
from fault_server import DEFECTS, calls_of, serving
from PIL import Image

import probe
from utils.items import region_in
from utils.jsonl import DataError, read_rows, write_rows
from utils.probe.derive import REASONS, RULES, Candidate, View, export, fault_of, look, parse_args


def item(n: int, **changes) -> dict:
    return {"id": f"s/{n}", "question": f"What number is on boat {n}?", "options": [["A", "41"], ["B", "42"]],
            "answer": {"type": "letter", "value": "B"}, "images": [{"path": "a.png"}],
            "metric": "mcq"} | changes


def run(folder, url, *more, output="out.jsonl"):
    return probe.main(["derive", "--items", str(folder / "items.jsonl"), "--image_root", str(folder),
                       "--output",
                       str(folder / output), "--backend", "openai", "--model", "m", "--base_url", url, *more])


def read(folder, name="out.jsonl"):
    return read_rows(folder / name, {"id": str}), read_rows(folder / f"{name}.run" / "verdicts.jsonl",
                                                            {"id": str})


@pytest.fixture
def world(tmp_path, picture):
    """Ten sources: a sound one, one that is written badly in every way, errors, pictures that cannot be used,
    a region."""
    picture("a.png", (120, 90)), picture("b.png", (120, 90), "blue")
    write_rows(tmp_path / "items.jsonl", [
        item(0), item(1, question="What number is on the lid? fault:rules"),
        item(2, question="What number? fault:prose"),
        item(3, images=[{"path": "none.png"}]), item(4, region=[30, 30, 60, 50]),
        item(5, region=[300, 0, 310, 9]),
        item(6, question="What number is here? fault:few"), item(0, id="s/7"),
        item(8, images=[{"path": "b.png"}]),
        item(9, metric="wtq", options=[], answer={"type": "values", "value": ["42"]},
             question="Which number is it?")])
    return tmp_path


# ------------------------------------------------------------------------------------------------ rules
SOUND = {"question": "What colour is the hull?", "gold": "white", "wrong": ("red", "green", "dark blue")}


@pytest.mark.parametrize("changes, reason", [
    ({}, None), ({"question": ""}, "empty"), ({"wrong": ("red", "", "blue")}, "empty"),
    ({"question": "What is in <image>?"}, "markup"), ({"wrong": ("red", "green")}, "options"),
    ({"wrong": ("red", "the red", "blue")}, "options"), ({"gold": "2", "wrong": ("two", "3", "4")},
                                                         "options"),
    ({"wrong": ("red", "All of these", "blue")}, "catch_all"), ({"wrong": ("red", "blue", "cannot be told")},
                                                                "catch_all"),
    ({"gold": "none"}, "catch_all"), ({"wrong": ("red", "(C) green", "blue")}, "letter"),
    ({"question": "Is option B the colour of the hull?"}, "letter"), ({"question": "What is painted white?"},
                                                                      "gold_in_stem"),
    ({"question": "Is the hull white, red, green or dark blue?"}, None),
    ({"question": "Who painted the whitened hull?"}, None),
    ({"question": "What number is on the boat 0?"}, "source_question"),
    ({"question": "What colour is the 42 on the boat?"}, "source_answer"),
    ({"gold": "forty-two", "wrong": ("one", "two", "three")}, None),
    ({"gold": "42", "wrong": ("1", "2", "3")}, "source_answer")])
def test_every_rule_finds_its_fault_and_no_other(changes, reason):
    fault = fault_of(Candidate("c", item(0), "colour", **(SOUND | changes)))
    assert (fault and fault[0]) == reason and (reason is None or reason in RULES)


def test_a_yes_no_source_does_not_forbid_the_word():
    source = item(0, question="Is there a dog?", options=[], metric="yesno_pair",
                  answer={"type": "yesno", "value": "no"})
    assert fault_of(Candidate("c", source, "text", "Is there no smoking on the sign?", "no",
                              ("go", "so", "ho"))) is None or \
        fault_of(Candidate("c", source, "text", "Is there no smoking on the sign?", "no",
                           ("go", "so", "ho")))[0] == "gold_in_stem"
    assert fault_of(Candidate("c", source, "text", "What does the sign say?", "no",
                              ("go", "so", "ho"))) is None


def test_an_order_of_options_is_the_candidates_own_and_has_the_right_one_where_it_is_wanted():
    one = Candidate("c", item(0), "colour", **SOUND)
    assert one.options(3) == one.options(3) and sorted(one.options(3).values()) == sorted((one.gold,
                                                                                           *one.wrong))
    assert all(one.options(0, letter)[letter] == "white" for letter in "ABCD")
    places = Counter(next(k for k, text in Candidate(str(n), item(0), **SOUND).options(0).items() if text
                          == "white")
                     for n in range(800))
    assert all(150 < places[letter] < 250 for letter in "ABCD")


def test_regions_are_cut_to_the_image():
    assert region_in({"id": "x", "region": [-5, 10, 40, 99]}, (30, 50)) == [0, 10, 30, 50]
    with pytest.raises(DataError, match="'x': region .* in an image of 30 x 50"):
        region_in({"id": "x", "region": [30, 0, 40, 9]}, (30, 50))


def test_a_region_that_cannot_be_written_ends_the_run_and_is_no_bad_region(world):
    args = parse_args(["--items", "i", "--image_root", str(world), "--output", str(world / "o.jsonl")])
    (world / "o.jsonl.run").mkdir()
    (world / "o.jsonl.run" / "regions").write_text("a file where the folder belongs")
    with pytest.raises(DataError, match="regions.*make room"):
        look([item(4, region=[30, 30, 60, 50])], None, args)
    (world / "o.jsonl.run" / "regions").unlink()
    good, bad = look([item(4, region=[30, 30, 60, 50]), item(5, region=[300, 0, 310, 9])], None, args)
    assert isinstance(good, View) and bad.reason == "region" and "in an image of 120 x 90" in bad.detail
    assert Image.open(good.paths[1]).format == "PNG" and not list((world / "o.jsonl.run"
                                                                   / "regions").glob("*.tmp"))


def test_right_options_are_dealt_evenly(tmp_path):
    args = parse_args(["--items", "i", "--image_root", ".", "--output", str(tmp_path / "o.jsonl")])
    counts = export([Candidate(f"c/{n}", item(n), "colour", **SOUND) for n in range(203)], args)
    assert sorted(counts["gold_letters"].values()) == [50, 51, 51, 51]
    rows = read_rows(tmp_path / "o.jsonl", {"id": str})
    assert all(dict(row["options"])[row["answer"]["value"]] == "white" for row in rows)
    letters = "".join(row["answer"]["value"] for row in rows)
    assert max(map(len, __import__("re").findall(r"A+|B+|C+|D+", letters))) < 12 and letters[:8] != "ABCDABCD"


# ------------------------------------------------------------------------------------------------ whole runs
def test_every_candidate_has_a_verdict_and_the_counts_add_up(world, capsys):
    n = len(DEFECTS)
    with serving(world, latency=0) as (_, url):
        assert run(world, url, "--questions", str(n), "--drop_blind") == 3
        calls = calls_of(world)
        metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows, verdicts = read(world)
        assert len(verdicts) == metrics["asked"] == 10 * n
        assert metrics["kept"] + metrics["rejected"] + metrics["errors"] == metrics["asked"] and metrics[
            "errors"] == n
        found = {source: [v for v in verdicts if v["source"] == f"s/{source}"] for source in range(10)}
        assert [v["reason"] for v in found[1]] == [reason for _, reason in DEFECTS]
        assert {v["reason"] for v in found[2]} == {"bad_json"} and {v["stage"] for v in found[2]} == {"error"}
        assert {v["reason"] for v in found[3]} == {"image_missing"} and {v["reason"]
                                                                         for v in found[5]} == {"region"}
        assert {v["reason"] for v in found[7]} == {"duplicate"}
        assert Counter(v["reason"] for v in found[6]) == {None: 10, "not_written": n - 10}
        assert {v["reason"] for v in verdicts} <= {None, *REASONS}
        assert {row["id"] for row in rows} == {v["id"] for v in verdicts
                                               if v["keep"]} and len(rows) == metrics["kept"]
        assert max(metrics["gold_letters"].values()) - min(metrics["gold_letters"].values()) <= 1
        written = {call["text"].splitlines()[3]: call for call in calls
                   if "other multiple-choice" in call["text"]}
        assert len(written["What number is on boat 4?"]["images"]) == 2  # the region beside the whole
        assert "enlarged region" in written["What number is on boat 4?"]["text"]
        shown = Image.open(next((world / "out.jsonl.run" / "regions").iterdir()))
        assert shown.width * shown.height >= 224 * 224 and shown.width > shown.height
        blind = [call for call in calls if "cannot see" in call["text"]]
        assert blind and not any(call["images"] for call in blind)
        # what was written is what probe.py asks
        args = probe.parse_args(["--model", "m", "--items", str(world / "items.jsonl"), "--probe_items",
                                 str(world / "out.jsonl"), "--output", "o"])
        assert len(probe.read_inputs(args)[1]) == len(rows)
        # again: no call, the same bytes
        before = [(world / name).read_bytes() for name in ("out.jsonl", "out.jsonl.run/verdicts.jsonl")]
        for more in ((), ("--export_only",)):
            assert run(world, url, "--questions", str(n), "--drop_blind", *more) == 3
        assert len(calls_of(world)) == len(calls)
        assert before == [(world / name).read_bytes() for name in ("out.jsonl",
                                                                   "out.jsonl.run/verdicts.jsonl")]
        with pytest.raises(DataError, match="begun with other settings"):
            run(world, url, "--questions", str(n), "--seed", "1")


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


def test_another_model_answers_and_two_hundred_sources_give_three_hundred_questions(world, capsys):
    write_rows(world / "items.jsonl", [item(n, answer={"type": "letter", "value": "A"}) for n in range(200)])
    with serving(world, latency=0) as (_, url):
        assert run(world, url, "--answer_model", "judge", "--concurrency", "32") == 0
        metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
        models = Counter(call["model"] for call in calls_of(world))
        assert models == {"m": 200, "judge": 600} and metrics["n_calls"] == 800 and metrics["n_orphaned"] == 0
        assert metrics["kept"] == 600 and set(metrics["gold_letters"].values()) == {150}
        assert run(world, url, "--answer_model", "judge", "--export_only") == 0
        with pytest.raises(DataError, match="begun with other settings"):
            run(world, url)


def test_a_local_model_that_cannot_write_makes_errors_and_no_crash(tiny_checkpoint, world, capsys):
    flags = ["derive", "--items", str(world / "items.jsonl"), "--image_root", str(world), "--output",
             str(world / "l.jsonl"),
             "--model", str(tiny_checkpoint), "--max_new_tokens", "8"]
    assert probe.main([*flags, "--dry_run"]) == 0 and not (world / "l.jsonl.run").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["calls"]["write"]["calls"] == 8
    assert probe.main(flags) == 3
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["errors"] == 7 * 3 and metrics["rejected"] == 3 * 3 and metrics["kept"] == 0
    assert (world / "l.jsonl").read_text() == ""


def test_flags_of_an_answerer_need_its_model(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--items", "i", "--image_root", ".", "--output", "o", "--answer_backend", "local"])
    assert "expected it" in capsys.readouterr().err
