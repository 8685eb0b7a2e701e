"""Similarity against explicit loops, and probing on models whose truth is known.    pytest tests/test_probe.py"""
import json

import numpy as np
import pytest

import probe
from imagining import NAMES, make_latent_checkpoint, make_text_checkpoint, write_items
from utils.decode import PRESETS
from utils.rows import DataError, write_rows

MIRAGE = PRESETS["mirage"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen items of eight pictures, and for each the same question as a probe item."""
    folder = tmp_path_factory.mktemp("items")
    path, items = write_items(folder, 16)
    write_rows(folder / "probe.jsonl", [{"id": f"probe/{i}", "source": item["id"], "question": item["question"],
                                         "options": item["options"], "answer": item["answer"]} for i, item in enumerate(items)])
    return path


def run(data, model, output, *more):
    assert probe.main(["--items", str(data), "--probe_items", str(data.parent / "probe.jsonl"), "--model", str(model),
                       "--output", str(output), "--max_new_tokens", "40", *more]) == 0
    return json.loads((output / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------- whole runs
def test_latents_that_are_codes_of_the_colour_tell_it_without_the_image(tiny_checkpoint, data, tmp_path):
    model = make_latent_checkpoint(tiny_checkpoint, tmp_path / "model", MIRAGE)
    metrics = run(data, model, tmp_path / "out", "--latent", "mirage")
    conditions = metrics["probing"]["conditions"]
    assert metrics["emission"]["k"] == metrics["emission"]["n"] == 8  # one instance a picture
    assert conditions["image"]["accuracy"] > 0.9 and conditions["own"]["accuracy"] > 0.9
    assert conditions["own"]["accuracy"] > conditions["other"]["accuracy"] + 0.3
    assert metrics["similarity"]["imagination"]["adjacent_raw"] > 0.9  # all steps of an item are the same code
    assert len(NAMES) == 4 and metrics["similarity"]["imagination"]["inter_raw"] < 0.5
    for name in ("heatmap.png", "curves.png", "probing.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    assert sum(1 for _ in open(tmp_path / "out" / "answers.jsonl")) == 16 * 4


def test_a_text_imagination_tells_the_colour_without_the_image(tiny_checkpoint, data, tmp_path):
    model = make_text_checkpoint(tiny_checkpoint, tmp_path / "model")
    metrics = run(data, model, tmp_path / "out")
    conditions = metrics["probing"]["conditions"]
    # The model was never trained without an image, so it may fail there, but another's imagination must be worse.
    assert conditions["image"]["accuracy"] > 0.9 and conditions["own"]["accuracy"] > conditions["other"]["accuracy"] + 0.2


def test_a_probe_of_no_item_is_named(tiny_checkpoint, data, tmp_path):
    write_rows(tmp_path / "probe.jsonl", [{"id": "p", "source": "nobody", "question": "?", "options": [["A", "a"], ["B", "b"]],
                                           "answer": {"type": "letter", "value": "A"}}])
    with pytest.raises(DataError, match="source 'nobody' is no item"):
        probe.main(["--items", str(data), "--probe_items", str(tmp_path / "probe.jsonl"), "--model", str(tiny_checkpoint),
                    "--output", str(tmp_path / "o")])
