"""Spectrum, retrieval, the summary and the lens on states whose content is known."""
import csv

import numpy as np
import pytest
from PIL import Image

from utils import qwen as Q
from utils.probe.analysis import Analysis, look, retrieval, see, spectrum, summarise
from utils.probe.input_edits import variance_split
from utils.probe.similarity import FORMS
from utils.probe.states import States, StateWriter


def test_the_spectrum_of_equal_directions_counts_them():
    found = spectrum(np.vstack([np.eye(12)[:8], -np.eye(12)[:8]]) + 100)
    assert (found["participation_ratio"], found["effective_rank"]) == pytest.approx((8, 8))
    assert found["top1"] == pytest.approx(1 / 8)
    assert spectrum(np.ones((5, 3)))["participation_ratio"] is None


def test_retrieval_of_same_unrelated_and_constant_states():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(2, 50, 200))
    same, unrelated, constant = retrieval(x, x), retrieval(x, y), retrieval(x, np.ones((50, 200)))
    assert same["top1"] == 1 and unrelated["top1"] < 0.15
    assert constant["top1"] == pytest.approx(1 / 50) == constant["top1_chance"]


def analysed(folder, latents, golds=None):
    """The analysis of planted latents [n, steps, d]."""
    n, steps, _ = latents.shape
    items = [{"id": str(i), "question": "Where?", "options": [],
              "answer": {"type": "values", "value": [str(golds[i] if golds is not None else i)]}}
             for i in range(n)]
    with StateWriter(folder) as writer:
        for item, own in zip(items, latents):
            writer.add(item["id"], {"latent": own}, emitted=True, segments=[steps], imagination=None)
    analysis = Analysis(States(folder), items, steps, 0)
    analysis.run()
    return analysis


def test_the_summary_tells_constant_latents_from_independent_ones_and_no_corrected_cosine_does(tmp_path):
    rng, (n, steps, d) = np.random.default_rng(0), (60, 3, 64)
    noise, codes = rng.normal(size=(n, steps, d)), rng.normal(size=(n, 1, d))
    states = {"constant": rng.normal(size=(1, steps, d)) + 1e-4 * noise, "own": codes + 0.1 * noise}
    found, split = {}, {}
    for name, latents in states.items():
        analysis = analysed(tmp_path / name, latents)
        similarity, decoding = summarise(analysis.rows)
        found[name] = similarity["imagination"]
        assert decoding == {}  # every item has an answer of its own
        curves = analysis.curves()["imagination"]
        assert all(abs(point["mean"]) < 0.1 for form in FORMS[1:] for point in curves[f"inter_{form}"])
        assert not {f"inter_{form}" for form in FORMS[1:]} & set(found[name])
        image = latents[:12, :1] if name == "own" else latents[:1, :1]  # the same image asked five questions
        split[name] = variance_split(image + 1e-4 * rng.normal(size=(12, 5, d)), 199)
    assert found["constant"]["spread"] < 1e-6 and found["own"]["spread"] > 10
    assert found["constant"]["retrieval"] < 0.1 and found["own"]["retrieval"] == 1
    assert found["constant"]["retrieval_chance"] == found["own"]["retrieval_chance"] == 1 / n
    assert split["own"]["image"] > 0.9 and split["own"]["image_p"] == 0.005
    assert abs(split["constant"]["image"] - 11 / 59) < 0.03 and split["constant"]["image_p"] > 0.05


def test_the_summary_of_the_linear_probe_is_corrected_for_the_number_of_steps(tmp_path):
    """Of three steps the second holds the answer: found, but at three times its own p."""
    rng, golds = np.random.default_rng(12), np.arange(60) % 3
    latents = rng.normal(size=(60, 3, 32))
    latents[:, 1] += 3 * rng.normal(size=(3, 32))[golds]
    analysis = analysed(tmp_path, latents, golds)
    rows = [row for row in analysis.rows if row["measure"] == "decode"]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["accuracy"] > 0.95
    assert rows[1]["value"] == rows[1]["accuracy"] - rows[1]["shuffled"] and rows[1]["p"] == 0.001
    assert min(rows[0]["p"], rows[2]["p"]) > 0.01
    found = summarise(analysis.rows)[1]["imagination"]
    assert found["p"] == pytest.approx(0.003) and found["n"] == 60
    assert found["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in rows]))


@pytest.fixture(scope="module")
def pictured(tiny_checkpoint, tmp_path_factory):
    """A random model, twelve pictures of unlike sizes whose every patch has its own colour, and items."""
    qwen, folder = Q.load(str(tiny_checkpoint), device="cpu"), tmp_path_factory.mktemp("pictures")
    rng, items = np.random.default_rng(0), []
    for n in range(12):
        cells = rng.integers(256, size=(3 + n % 3, 4 + n % 2, 3)).astype(np.uint8)
        size = cells.shape[1] * 28, cells.shape[0] * 28
        Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(folder / f"{n}.png")
        items.append({"id": f"i/{n}", "group_id": f"g/{n // 2}", "images": [{"path": f"{n}.png"}],
                      "root": str(folder), "cells": cells.shape[:2]})
    return qwen, items


@pytest.mark.parametrize("kind", ["patches", "words", "constant"])
def test_the_lens_finds_the_patch_and_the_word_that_latents_are_copies_of(pictured, tmp_path, kind):
    qwen, items = pictured
    rng, truth, common = np.random.default_rng(1), {}, np.random.default_rng(2).normal(size=(3, 32))
    with StateWriter(tmp_path / "states") as writer:
        for item in items:
            writer.add(item["id"], {"latent": np.ones((3, 32))}, emitted=True, segments=[3], imagination=None)
        visual = {one.item["id"]: one.visual for one in see(qwen, States(tmp_path / "states"), items, 3)}
        head = qwen.model.lm_head.weight.detach().numpy()
        for item in items:
            lines, columns = item["cells"]
            if kind == "patches":
                places = rng.choice(lines * columns, 3, replace=False)
                latents = visual[item["id"]][places] * rng.uniform(0.5, 2, (3, 1))  # of any length
                truth[item["id"]] = [divmod(int(place), columns) for place in places]
            elif kind == "words":
                truth[item["id"]] = rng.choice(len(qwen.tokenizer), 3, replace=False).tolist()
                own = head[truth[item["id"]]]
                latents = 9 * own / np.square(own).sum(1, keepdims=True) + 5  # 5: all share it
            else:
                latents = common
            writer.add(item["id"], {"latent": latents}, emitted=True, segments=[3], imagination=None)
    seen = see(qwen, States(tmp_path / "states"), items, 3)
    assert [(len(one.visual) // one.n_columns, one.n_columns) for one in seen] == [i["cells"] for i in items]
    found = look(qwen, seen, tmp_path, 0)
    with open(tmp_path / "lens.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["latents"] == 36 and (tmp_path / "lens.png").stat().st_size > 10_000
    stays, chance = found["stays"], found["patch_chance"]
    for n, row in enumerate(rows):
        place = int(row["row"]), int(row["column"])
        if kind == "patches":
            assert place == truth[row["id"]][n % 3] and float(row["cosine"]) == pytest.approx(1, abs=1e-3)
        if kind == "words":
            assert row["word"] == repr(qwen.tokenizer.decode(truth[row["id"]][n % 3]))
    if kind == "patches":
        assert stays["patch"]["ci"][0] <= chance < 0.1 and stays["patch"]["share"] < 0.25
    if kind == "words":
        assert stays["word"]["share"] < 0.1 and stays["word"]["ci"][1] < 0.5
    if kind == "constant":  # the same for every item, whatever it shows
        assert stays["patch"]["share"] == stays["word"]["share"] == 1 and stays["word"]["ci"][0] > 0.5
    assert look(qwen, seen[:2], tmp_path, 0) is None  # one group


def test_the_lens_takes_its_own_control_from_other_groups(pictured, tmp_path):
    """Two groups of items that share their latents: from the same group all would stay."""
    qwen, items = pictured
    with StateWriter(tmp_path / "states") as writer:
        for n, item in enumerate(items):
            own = qwen.model.lm_head.weight[[50 + n // 2] * 2].detach().numpy()
            writer.add(item["id"], {"latent": own}, emitted=True, segments=[2], imagination=None)
    found = look(qwen, see(qwen, States(tmp_path / "states"), items, 2), tmp_path, 0)
    assert found["stays"]["word"]["share"] == 0 and found["n"] == 12
