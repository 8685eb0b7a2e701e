"""Spectrum, retrieval and the summary on states whose content is known."""
import numpy as np
import pytest

from utils.probe.analysis import Analysis, retrieval, spectrum, summarise
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
