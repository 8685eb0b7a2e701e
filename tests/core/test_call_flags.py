"""Stages 1 and 2 as wholes, against a server: shards, resharding, changed input, export without calls, other
settings.

    python -m pytest tests/test_stage.py
"""
import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from fault_server import calls_of, serving
from samples import monet, row

import filter_data
import rewrite_captions
from utils.call_flags import parse_object, parse_shard
from utils.jsonl import DataError, write_rows

MAINS = {"rewrite": rewrite_captions.main, "filter": filter_data.main}
DERIVED = {"rewrite": "rejected.jsonl", "filter": "verdicts.jsonl"}
FAULTS = {3: "fault:prose", 5: "fault:400", 8: "fault:fenced"}


@pytest.fixture
def world(tmp_path, picture):
    """Return write(stage, numbers, **changed questions) -> path of an input; samples 1 and 11 are duplicates.
    """
    picture("a.png"), picture("b.png", color="blue")

    def write(stage: str, numbers: list[int], **changed: str) -> Path:
        questions = {n: changed.get(f"q{n}", f"Which boat {1 if n == 11 else n}? {FAULTS.get(n, '')}")
                     for n in numbers}
        path = tmp_path / "in.jsonl"
        if stage == "rewrite":
            path.write_text(json.dumps([monet(n, question=question) for n, question in questions.items()]))
        else:
            write_rows(path, [row(f"s/{n}", f"The hull {n} shows 42. {FAULTS.get(n, '')}", question=question)
                              for n, question in questions.items()])
        return path
    return write


def run(stage: str, path: Path, url: str, *more: str, output: str = "out.jsonl") -> int:
    return MAINS[stage](["--input", str(path), "--image_root", str(path.parent), "--output",
                         str(path.parent / output),
                         "--backend", "openai", "--model", "m", "--base_url", url, "--no_guard", *more])


def bytes_of(stage: str, folder: Path, output: str = "out.jsonl") -> list[bytes]:
    return [(folder / name).read_bytes() for name in (output, f"{output}.run/{DERIVED[stage]}")]


@pytest.mark.parametrize("stage", list(MAINS))
def test_any_number_of_shards_writes_the_same_bytes(world, tmp_path, stage, capsys):
    path = world(stage, list(range(20)))
    with serving(tmp_path, latency=0) as (_, url):
        assert run(stage, path, url, output="one.jsonl") == 3
        n_calls = len(calls_of(tmp_path))
        for name, n in (("three.jsonl", 3), ("eight.jsonl", 8)):
            codes = [run(stage, path, url, "--shard", f"{i}/{n}", output=name) for i in range(n)]
            assert codes == [0] * (n - 1) + [3]
            assert bytes_of(stage, tmp_path, name) == bytes_of(stage, tmp_path, "one.jsonl")
        # two of three shards, then seven of eight (2 of which the first three have done), then one process
        before = len(calls_of(tmp_path))
        assert [run(stage, path, url, "--shard", f"{i}/3", output="mixed.jsonl") for i in (0, 2)] == [0, 0]
        assert [run(stage, path, url, "--shard", f"{i}/8", output="mixed.jsonl") for i in range(4)] == [0] * 4
        with pytest.raises(DataError, match=r"\d+ calls are missing; run without --export_only"):
            run(stage, path, url, "--export_only", output="mixed.jsonl")
        assert run(stage, path, url, output="mixed.jsonl") == 3
        assert bytes_of(stage, tmp_path, "mixed.jsonl") == bytes_of(stage, tmp_path, "one.jsonl")
        # the duplicate, where its first is in another shard
        assert len(calls_of(tmp_path)) - before <= n_calls + 2
    err = capsys.readouterr().err
    assert "this shard is done" in err and "Traceback" not in err


@pytest.mark.parametrize("stage", list(MAINS))
def test_changed_input_repeats_only_what_changed(world, tmp_path, stage):
    with serving(tmp_path, latency=0) as (_, url):
        run(stage, world(stage, list(range(12))), url)
        calls = [len(calls_of(tmp_path))]

        def again(*args, **changed) -> list[str]:
            assert run(stage, world(stage, *args, **changed), url) == 3
            calls.append(len(calls_of(tmp_path)))
            return [call["text"] for call in calls_of(tmp_path)[calls[-2]:]]

        per_sample = 2 if stage == "rewrite" else 1
        assert again(list(range(12))[::-1]) == [] or stage == "filter"  # of two duplicates the first is kept
        assert again(list(range(12))) == []
        assert len(again(list(range(14)))) == 2 * per_sample  # two appended
        texts = again(list(range(14)), q7="Which yacht?")
        # the stub's caption, and so the refinement, is new too
        assert len(texts) == per_sample and "yacht" in texts[0]
        ids = [json.loads(line)["id"].split("/")[1]
               for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert ids == [str(n) for n in range(14) if n not in (3, 5, 11)]
        metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
        assert metrics["n_orphaned"] >= metrics["n_calls"] == per_sample


@pytest.mark.parametrize("stage", list(MAINS))
def test_export_only_makes_no_call_and_needs_no_model(world, tmp_path, stage, capsys):
    path = world(stage, list(range(12)))
    with pytest.raises(DataError, match="no journal here; run without --export_only first"):
        run(stage, path, "http://127.0.0.1:9/v1", "--export_only")
    with serving(tmp_path, latency=0) as (_, url):
        run(stage, path, url)
    before = bytes_of(stage, tmp_path)
    (tmp_path / "out.jsonl").unlink()
    assert MAINS[stage](["--input", str(path), "--image_root", str(tmp_path), "--output",
                         str(tmp_path / "out.jsonl"),
                         # the backend too is the one of the journal
                         "--export_only", "--model", "/no/such"]) == 3
    assert bytes_of(stage, tmp_path) == before and json.loads(capsys.readouterr().out.splitlines()[-1])[
        "n_calls"] == 0
    with pytest.raises(DataError, match="cannot go with --retry_errors"):
        run(stage, path, url, "--export_only", "--retry_errors")
    with pytest.raises(DataError, match=r"(?s)other settings.*max_new_tokens +\d+ +7"):
        run(stage, path, url, "--export_only", "--max_new_tokens", "7")


def test_what_may_change_between_restarts_and_what_may_not(world, tmp_path):
    path = world("rewrite", list(range(6)))
    with serving(tmp_path, latency=0) as (_, url):
        run("rewrite", path, url)
        n_calls = len(calls_of(tmp_path))
        free = ["--concurrency", "2", "--timeout", "9", "--server_wait", "9", "--limit", "4",
                "--max_same_caption", "3"]
        assert run("rewrite", path, url, *free) in (0, 3) and len(calls_of(tmp_path)) == n_calls
        for flags in (["--temperature", "0.7"], ["--model", "n"], ["--max_pixels", "9000"],
                      ["--image_factor", "28"],
                      ["--extra_body", '{"top_k": 1}'], ["--no_refine"], ["--with_original"]):
            with pytest.raises(DataError, match="begun with other settings"):
                run("rewrite", path, url, *flags)
    with pytest.raises(DataError, match="--temperature and --extra_body are for --backend openai"):
        run("rewrite", path, url, "--backend", "local", "--temperature", "0.7")


def test_an_image_that_changed_is_looked_at_and_asked_about_again(world, tmp_path, picture):
    path = world("rewrite", [1, 2])
    with serving(tmp_path, latency=0) as (_, url):
        assert run("rewrite", path, url) == 0
        index = tmp_path / "out.jsonl.run" / "images-00000-of-00001.jsonl"
        n_calls, n_looked = len(calls_of(tmp_path)), len(index.read_text().splitlines())
        # both have the same
        assert run("rewrite", path, url) == 0 and len(index.read_text().splitlines()) == n_looked == 1
        picture("b.png", color="green")
        assert run("rewrite", path, url) == 0
    again = calls_of(tmp_path)[n_calls:]
    assert len(index.read_text().splitlines()) == 2 and all("cut out of a larger" in call["text"]
                                                            for call in again)
    # the caption of the stub depends on the question alone: refinements are the old ones
    assert len(again) == 2


@pytest.mark.parametrize("text", ["1", "3/3", "a/2", "-1/2", "1/", "0/0"])
def test_a_shard_is_one_of_n(text):
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(ArgumentTypeError, match="expected I/N with I from 0 to N-1"):
        parse_shard(text)


def test_extra_body_is_an_object():
    assert parse_object('{"a": 1}') == {"a": 1}
    for text in ("[1]", "{"):
        with pytest.raises(ArgumentTypeError):
            parse_object(text)
