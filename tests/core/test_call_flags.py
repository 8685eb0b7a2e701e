"""Stages 1 and 2 as wholes, against a server: shards, changed input, export, settings; flags."""
import json
import random
import re
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from fault_server import any_answer, calls_of, raw, serving
from processes import MAINS
from samples import flags, monet, row

from utils import openai_backend
from utils.call_flags import load_prompts, parse_object, parse_shard
from utils.cli import read_api_key
from utils.jsonl import DataError, write_rows

DERIVED = {"rewrite_captions": "rejected.jsonl", "filter_data": "verdicts.jsonl"}
FAULTS = {3: "fault:prose", 5: "fault:400", 8: "fault:fenced"}
each_stage = pytest.mark.parametrize("stage", DERIVED)


@pytest.fixture
def world(tmp_path, picture):
    """Return write(stage, numbers, **changed questions) -> path of an input; 1 and 11 are duplicates."""
    picture("a.png"), picture("b.png", color="blue")

    def write(stage: str, numbers: list[int], **changed: str) -> Path:
        questions = {n: changed.get(f"q{n}", f"Which boat {1 if n == 11 else n}? {FAULTS.get(n, '')}")
                     for n in numbers}
        path = tmp_path / "in.jsonl"
        if stage == "rewrite_captions":
            path.write_text(json.dumps([monet(n, question=question) for n, question in questions.items()]))
        else:
            write_rows(path, [row(f"s/{n}", f"The hull {n} shows 42. {FAULTS.get(n, '')}", question=question)
                              for n, question in questions.items()])
        return path
    return write


def run(stage: str, path: Path, url: str, *more: str, output: str = "out.jsonl") -> int:
    return MAINS[stage]([*flags(path, "--backend", "openai", "--base_url", url, "--no_guard"),
                         "--output", str(path.parent / output), *more])


def bytes_of(stage: str, folder: Path, output: str = "out.jsonl") -> list[bytes]:
    return [(folder / name).read_bytes() for name in (output, f"{output}.run/{DERIVED[stage]}")]


@each_stage
def test_any_number_of_shards_or_ranks_writes_the_same_bytes(world, tmp_path, stage, capsys, monkeypatch):
    path = world(stage, list(range(20)))
    with serving(tmp_path, latency=0) as (_, url):
        def run_shards(output: str, n: int, indices) -> list[int]:
            return [run(stage, path, url, "--shard", f"{i}/{n}", output=output) for i in indices]

        assert run(stage, path, url, output="one.jsonl") == 3
        n_calls, written = len(calls_of(tmp_path)), bytes_of(stage, tmp_path, "one.jsonl")
        (tmp_path / "one.jsonl").unlink()  # the backend and the model are those of the journal
        other = ("--backend", "local", "--model", "/no/such")
        assert run(stage, path, url, "--export_only", *other, output="one.jsonl") == 3
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_calls"] == 0
        assert bytes_of(stage, tmp_path, "one.jsonl") == written
        assert run_shards("three.jsonl", 3, range(3)) == [0, 0, 3]
        before = len(calls_of(tmp_path))  # two of three shards, then half of eight, then one process
        assert run_shards("mixed.jsonl", 3, (0, 2)) + run_shards("mixed.jsonl", 8, range(4)) == [0] * 6
        with pytest.raises(DataError, match=r"\d+ of \d+ calls missing; run without --export_only"):
            run(stage, path, url, "--export_only", output="mixed.jsonl")
        assert run(stage, path, url, output="mixed.jsonl") == 3
        # the duplicate is asked about where its first is in another shard
        assert len(calls_of(tmp_path)) - before <= n_calls + 2
        monkeypatch.setenv("WORLD_SIZE", "3")
        for rank, code in ((2, 0), (0, 0), (1, 3)):  # the last one writes
            monkeypatch.setenv("RANK", str(rank))
            assert run(stage, path, url, output="ranks.jsonl") == code
            assert (tmp_path / "ranks.jsonl").exists() == (rank == 1)
        with pytest.raises(DataError, match="--fresh with 3 processes"):
            run(stage, path, url, "--fresh", output="ranks.jsonl")
    for name in ("three.jsonl", "mixed.jsonl", "ranks.jsonl"):
        assert bytes_of(stage, tmp_path, name) == written
    err = capsys.readouterr().err
    assert "this shard is done" in err and "Traceback" not in err


@each_stage
def test_changed_input_repeats_only_what_changed(world, tmp_path, stage):
    per_sample = 2 if stage == "rewrite_captions" else 1
    with serving(tmp_path, latency=0) as (_, url):
        def new_calls(*args, **changed) -> list[str]:
            before = len(calls_of(tmp_path))
            assert run(stage, world(stage, *args, **changed), url) == 3
            return [call["text"] for call in calls_of(tmp_path)[before:]]

        assert new_calls(list(range(12)))
        assert new_calls(list(range(12))[::-1]) == [] or stage == "filter_data"  # the first duplicate is kept
        assert new_calls(list(range(12))) == []
        assert len(new_calls(list(range(14)))) == 2 * per_sample
        texts = new_calls(list(range(14)), q7="Which yacht?")  # a new caption, hence a new refinement
        assert len(texts) == per_sample and "yacht" in texts[0]
    ids = [json.loads(line)["id"].split("/")[1] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids == [str(n) for n in range(14) if n not in (3, 5, 11)]
    metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    assert metrics["n_orphaned"] >= metrics["n_calls"] == per_sample


def test_what_may_change_between_restarts_and_what_may_not(world, tmp_path):
    path = world("rewrite_captions", list(range(6)))
    with pytest.raises(DataError, match="no journal here; run without --export_only first"):
        run("rewrite_captions", path, "http://127.0.0.1:9/v1", "--export_only")
    with serving(tmp_path, latency=0) as (_, url):
        run("rewrite_captions", path, url)
        n_calls = len(calls_of(tmp_path))
        free = "--concurrency 2 --timeout 9 --server_wait 9 --limit 4 --max_same_caption 3"
        assert run("rewrite_captions", path, url, *free.split()) in (0, 3)
        assert len(calls_of(tmp_path)) == n_calls
    settings = ("--temperature 0.7", "--model n", "--max_pixels 9000", "--image_factor 28", "--no_refine",
                '--extra_body {"top_k":1}', "--export_only --max_new_tokens 7")
    for more, match in (*((one, "begun with other settings") for one in settings),
                        ("--export_only --retry_errors", "cannot go with --retry_errors"),
                        ("--backend local --temperature 0.7",
                         "--temperature and --extra_body are for --backend openai")):
        with pytest.raises(DataError, match=match):
            run("rewrite_captions", path, url, *more.split())


def test_an_image_that_changed_is_inspected_and_asked_about_again(world, tmp_path, picture):
    path = world("rewrite_captions", [1, 2])
    images = tmp_path / "out.jsonl.run" / "images-00000-of-00001.jsonl"
    with serving(tmp_path, latency=0) as (_, url):
        for _ in range(2):  # both samples have the same images
            assert run("rewrite_captions", path, url) == 0 and len(images.read_text().splitlines()) == 1
        n_calls = len(calls_of(tmp_path))
        picture("b.png", color="green")
        assert run("rewrite_captions", path, url) == 0 and len(images.read_text().splitlines()) == 2
    again = calls_of(tmp_path)[n_calls:]  # the stub's captions depend on the question: no new refinement
    assert len(again) == 2 and all("cut out of a larger" in call["text"] for call in again)


@each_stage
def test_whatever_a_server_sends_the_same_command_goes_on(world, tmp_path, stage, monkeypatch):
    for name in ("FIRST_WAIT_S", "SHORTEST_WAIT_S"):
        monkeypatch.setattr(openai_backend, name, 0.02)
    rng = random.Random(1)
    path = world(stage, list(range(20, 80)), **{f"q{n}": any_answer(rng) for n in range(20, 80)})
    with serving(tmp_path, latency=0) as (_, url):
        assert run(stage, path, url) == 3
        written, n_calls = bytes_of(stage, tmp_path), len(calls_of(tmp_path))
        assert run(stage, path, url) == 3
        again = {call["n"] for call in calls_of(tmp_path)[n_calls:]}
        assert bytes_of(stage, tmp_path) == written
        assert again == {*range(6, 11)}  # only what was lost, in five tries more
    with serving(tmp_path, latency=0, faults=False) as (_, url):
        assert run(stage, path, url, "--retry_errors") == 0


@each_stage
def test_what_an_earlier_version_took_for_a_reply_is_asked_again(world, tmp_path, stage):
    path, journal = world(stage, [0, 1, 2, 4]), tmp_path / "out.jsonl.run" / "calls-00000-of-00001.jsonl"
    with serving(tmp_path, latency=0) as (_, url):
        assert run(stage, path, url) == 0
        written, n_calls = bytes_of(stage, tmp_path), len(calls_of(tmp_path))
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        for record, finish in zip(records, ({"type": "stop"}, "abort", None)):
            record["finish_reason"] = finish
        write_rows(journal, records)
        assert run(stage, path, url, "--export_only") == 0 and bytes_of(stage, tmp_path) == written
        assert run(stage, path, url) == 0 and bytes_of(stage, tmp_path) == written
        assert len(calls_of(tmp_path)) == n_calls + 3
        write_rows(journal, [records[3] | {"text": 7}])
        with pytest.raises(DataError, match="jsonl:1: damaged journal line .*'text' should be str, got int"):
            run(stage, path, url)


@each_stage
def test_replies_without_text_are_told_and_asked_for_again(world, tmp_path, stage, capsys):
    """Reasoning and tool calls that a server takes out of the text; the words of the fault are sent along."""
    call = {"function": {"name": "n", "arguments": "{}"}}
    thought = {"message": {"content": None, "reasoning": "hm"}, "finish_reason": "stop"}
    called = {"message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
    path = world(stage, [0, 1, 2], q0=raw(**thought), q1=raw(**called), q2=raw(message={"content": "\n"},
                                                                            finish_reason="stop"))
    with serving(tmp_path, latency=0) as (_, url):
        assert run(stage, path, url) == 3
        texts = [call["text"] for call in calls_of(tmp_path)]
    err = capsys.readouterr().err
    assert re.search("text: 2 with reasoning only .*, 2 with tool calls only .*, 2 with nothing", err)
    faults = ["it had no text, only reasoning", "it had no text, only tool calls",
              "it was not one JSON object"]
    assert [sum(fault in text for text in texts) for fault in faults] == [1, 1, 1]
    rejected = [json.loads(line) for line in bytes_of(stage, tmp_path)[1].splitlines()]
    assert [row["detail"] for row in rejected] == faults


def test_a_shard_is_one_of_n_and_extra_body_an_object():
    assert parse_shard("2/3") == (2, 3) and parse_object('{"a": 1}') == {"a": 1}
    for text in ("1", "3/3", "a/2", "-1/2", "1/", "0/0", "[1]", "{"):
        with pytest.raises(ArgumentTypeError, match="I from 0 to N-1|expected a JSON object|not JSON"):
            parse_object(text) if text in ("[1]", "{") else parse_shard(text)


def test_prompts_of_a_file_replace_those_of_their_names(tmp_path):
    path, prompts = tmp_path / "prompts.json", {"ZOOM": "long", "SYSTEM": "s"}
    path.write_text('{"ZOOM": "short"}')
    assert load_prompts(str(path), prompts) == {"ZOOM": "short", "SYSTEM": "s"}
    assert load_prompts(None, prompts) == prompts
    for text, match in [('{"zoom": "x"}', "no prompt is called zoom; expected ZOOM, SYSTEM"),
                        ("[]", "one JSON object of strings"), ('{"ZOOM": 1}', "one JSON object of strings"),
                        ("{", "one JSON object of strings")]:
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            load_prompts(str(path), prompts)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from env")
    assert read_api_key(None) == "from env"
    (tmp_path / "key").write_text("from file\n")
    assert read_api_key(str(tmp_path / "key")) == "from file"
    (tmp_path / "key").write_text("\n")
    for name, flag in (("key", "--api_key_file"), ("none", "--judge_key_file")):
        with pytest.raises(DataError, match=flag):
            read_api_key(str(tmp_path / name), flag)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert read_api_key(None) is None
