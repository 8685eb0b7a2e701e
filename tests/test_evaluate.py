"""Answering and scoring items.    pytest tests/test_evaluate.py"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from utils.decode import PRESETS
from utils.qwen import add_tokens, load, save
from utils.rows import DataError, write_rows
from utils.stats import wilson

ROOT = Path(__file__).parents[1]


@pytest.fixture
def items(tmp_path, picture):
    """Nine items of three pictures."""
    rows = []
    for n in range(9):
        picture(f"{n // 3}.png", color=("red", "blue", "green")[n // 3])
        rows.append({"id": f"t/{n}", "category": ("a", "b")[n % 2], "group_id": f"t/{n // 3}", "question": "What is it?" * (n % 4 + 1),
                     "options": [["A", "red"], ["B", "blue"], ["C", "green"]], "metric": "mcq",
                     "answer": {"type": "letter", "value": "ABC"[n // 3]}, "images": [{"path": f"{n // 3}.png"}]})
    write_rows(tmp_path / "items.jsonl", rows)
    return tmp_path / "items.jsonl"


def flags(items, checkpoint, *more, output="out.jsonl"):
    return ["--items", str(items), "--model", str(checkpoint), "--output", str(items.parent / output), "--max_new_tokens", "6",
            "--batch_size", "2", "--protocol", "plain", *more]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_writes_a_record_an_item_and_prints_the_metrics(tiny_checkpoint, items, capsys):
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((items.parent / "out.jsonl.metrics.json").read_text())
    results = rows(items.parent / "out.jsonl")
    assert [r["id"] for r in results] == [f"t/{n}" for n in range(9)] and printed["n"] == 9
    assert sum(printed[v] for v in ("correct", "incorrect", "unresolved")) == 9 and "ci95_clustered" in printed
    assert all(r["image_grids"] == [[1, 6, 4]] and 0 < r["n_tokens"] <= 6 for r in results)
    assert sum(part["n"] for part in printed["categories"].values()) == 9
    before = (items.parent / "out.jsonl").read_bytes()
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0  # all from the journal
    assert (items.parent / "out.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="max_new_tokens"):
        evaluate.main(flags(items, tiny_checkpoint, "--max_new_tokens", "7"))


def test_latents_are_counted(tiny_checkpoint, items, tmp_path):
    qwen = load(str(tiny_checkpoint), device="cpu")
    add_tokens(qwen, PRESETS["mirage"].tokens)
    save(qwen, str(tmp_path / "latent"))
    assert evaluate.main(flags(items, tmp_path / "latent", "--latent", "mirage")) == 0
    metrics = json.loads((items.parent / "out.jsonl.metrics.json").read_text())
    assert metrics["emission"]["n"] == 9 and metrics["protocol"]["latent_size"] == 4


def test_a_missing_and_a_truncated_image_and_one_outside_are_counted_errors(tiny_checkpoint, items):
    data = rows(items)
    (items.parent / "cut.png").write_bytes((items.parent / "0.png").read_bytes()[:60])
    for n, name in ((0, "gone.png"), (4, "cut.png"), (5, "../items.jsonl")):
        data[n]["images"] = [{"path": name}]
    write_rows(items, data)
    assert evaluate.main(flags(items, tiny_checkpoint)) == 3
    results = rows(items.parent / "out.jsonl")
    assert [r["verdict"] == "error" for r in results] == [n in (0, 4, 5) for n in range(9)]
    assert {r["error"] for r in results if "error" in r} == {"image_missing", "image_unreadable", "image_outside_root"}
    metrics = json.loads((items.parent / "out.jsonl.metrics.json").read_text())
    assert (metrics["n"], metrics["error"], metrics["incomplete"]) == (6, 3, True)


def test_killed_and_started_again_gives_the_same_file(tiny_checkpoint, items):
    arguments = flags(items, tiny_checkpoint, "--max_new_tokens", "60", output="cut.jsonl")
    journal = items.parent / "cut.jsonl.run" / "calls-00000-of-00001.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert evaluate.main(arguments) == 0
    assert evaluate.main(flags(items, tiny_checkpoint, "--max_new_tokens", "60", output="whole.jsonl")) == 0
    assert (items.parent / "cut.jsonl").read_bytes() == (items.parent / "whole.jsonl").read_bytes()


def test_a_mended_image_is_asked_again(tiny_checkpoint, items, picture):
    (items.parent / "0.png").rename(items.parent / "away.png")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 3
    (items.parent / "away.png").rename(items.parent / "0.png")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    picture("0.png", size=(112, 112), color="black")
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    assert [r["image_grids"] for r in rows(items.parent / "out.jsonl")[2:4]] == [[[1, 8, 8]], [[1, 6, 4]]]


def test_an_error_has_every_field_and_nothing_but_errors_has_no_accuracy(tiny_checkpoint, items, tmp_path):
    (tmp_path / "empty").mkdir()
    assert evaluate.main(flags(items, tiny_checkpoint, "--image_root", str(tmp_path / "empty"))) == 3
    result = rows(items.parent / "out.jsonl")[0]
    assert result["extraction"] == {"value": None, "rule": "image_missing"} and result["n_tokens"] == 0
    metrics = json.loads((items.parent / "out.jsonl.metrics.json").read_text())
    assert (metrics["n"], metrics["accuracy"], metrics["incomplete"]) == (0, None, True)


def test_a_changed_gold_is_scored_anew_without_the_model(tiny_checkpoint, items):
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    journal = next((items.parent / "out.jsonl.run").glob("calls-*"))
    write_rows(journal, [record | {"clean_output": "\\boxed{B}"} for record in rows(journal)])
    write_rows(items, [item | {"answer": {"type": "letter", "value": "B"}} for item in rows(items)])
    assert evaluate.main(flags(items, tiny_checkpoint)) == 0
    assert {r["verdict"] for r in rows(items.parent / "out.jsonl")} == {"correct"}


def test_other_weights_under_the_same_name_are_refused(tiny_checkpoint, items, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "named")
    assert evaluate.main(flags(items, tmp_path / "named")) == 0
    qwen = load(str(tmp_path / "named"), device="cpu")
    qwen.model.lm_head.weight.data.neg_()
    save(qwen, str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "named")
    (tmp_path / "other").rename(tmp_path / "named")
    with pytest.raises(DataError, match="weights"):
        evaluate.main(flags(items, tmp_path / "named"))


@pytest.mark.parametrize("change, match", [
    ({"question": "<image> or <image>?"}, "'t/3': 2 <image> markers for 1 images"),
    ({"category": 3}, "'t/3': field 'category'"),
    ({"metric": "vsp_path", "answer": {"type": "path_map", "value": [[1, 0], [0, 0]]}}, "'t/3': answer has not one start")])
def test_an_item_that_cannot_be_asked_is_named(tiny_checkpoint, items, change, match):
    write_rows(items, [item | (change if item["id"] == "t/3" else {}) for item in rows(items)])
    with pytest.raises(DataError, match=match):
        evaluate.main(flags(items, tiny_checkpoint))


def test_no_items_are_an_error(tiny_checkpoint, items):
    items.write_text("")
    with pytest.raises(DataError, match="no items"):
        evaluate.main(flags(items, tiny_checkpoint))


def test_all_real_vsp_problems_become_items(shared_data, tmp_path, capsys):
    source = shared_data / "vsp" / "test.jsonl"
    assert evaluate.main(["--benchmark", "vsp", "--source", str(source), "--prepare", "--output", str(tmp_path / "v")]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": 400, "categories": {f"level_{n}": 100 for n in (3, 4, 5, 6)}}
    assert (evaluate.find_items(evaluate.parse_args(["--items", str(tmp_path / "v.items.jsonl"), "--model", "m",
                                                     "--output", "o"]))[0][0]["question"].count("<image>")) == 1


def test_prepared_items_travel_with_their_pictures(tiny_checkpoint, shared_data, tmp_path):
    source = str(shared_data / "vsp" / "test.jsonl")
    assert evaluate.main(["--benchmark", "vsp", "--source", source, "--prepare", "--output", str(tmp_path / "v"), "--limit", "2"]) == 0
    arguments = ["--items", str(tmp_path / "v.items.jsonl"), "--model", str(tiny_checkpoint), "--max_new_tokens", "3", "--protocol", "plain"]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "o.jsonl"), "--max_pixels", "50176"]) == 0
    assert (tmp_path / rows(tmp_path / "v.items.jsonl")[0]["images"][0]["path"]).read_bytes() == \
        (shared_data / "vsp" / "img" / "level3" / "31.png").read_bytes()


def test_a_few_real_vsp_problems_run(tiny_checkpoint, shared_data, tmp_path):
    arguments = ["--benchmark", "vsp", "--source", str(shared_data / "vsp" / "test.jsonl"), "--model", str(tiny_checkpoint),
                 "--output", str(tmp_path / "v.jsonl"), "--max_new_tokens", "4", "--limit", "3", "--protocol", "plain",
                 "--max_pixels", "50176"]
    assert evaluate.main(arguments) == 0
    assert {r["verdict"] for r in rows(tmp_path / "v.jsonl")} <= {"correct", "incorrect", "unresolved"}
