"""Similarity measures against explicit loops, planted truths and known expectations."""
import numpy as np
import pytest

from utils.probe.analysis import retrieval
from utils.probe.similarity import (FORMS, Bootstrap, Cell, CellSimilarity, apply_form, calibrate, correct,
                                    cosine_matrix, draw_halves)


def measure_cells(cells, halves, n_boot=50):
    similarity = CellSimilarity(halves, n_boot=n_boot)
    return [row for cell in cells for row in similarity.measure(cell)]


def measure(states):
    """Rows of [n, steps, d] by (step, measure, form)."""
    n = len(states)
    cells = [Cell(-1, t, np.arange(n), states[:, t]) for t in range(states.shape[1])]
    return {(row["step"], row["measure"], row["form"]): row
            for row in measure_cells(cells, draw_halves(n, 0), 200)}


def test_means_over_pairs_and_steps_equal_explicit_loops():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(9, 3, 5)) + 1
    rows, halves = measure(states), draw_halves(9, 0)

    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    for t in range(3):
        # raw over all pairs; corrected states only where both are corrected by the same other half
        centred = correct(states[:, t], halves, ["centred"])["centred"]
        for form, own, same in (("raw", states[:, t], np.zeros(9)), ("centred", centred, halves)):
            wanted = np.mean([cos(own[i], own[j]) for i in range(9) for j in range(i) if same[i] == same[j]])
            row = rows[t, "inter", form]
            assert row["value"] == pytest.approx(wanted, abs=1e-6) and row["low"] < wanted < row["high"]
        mean = states[:, t].mean(0)
        assert rows[t, "spread", "raw"]["value"] == pytest.approx(
            ((states[:, t] - mean) ** 2).sum() / 8 / (mean @ mean), rel=1e-5)
    for t in (1, 2):
        before, now = states[:, t - 1], states[:, t]
        for name, wanted in (("adjacent", list(map(cos, before, now))),
                             ("first", list(map(cos, states[:, 0], now)))):
            assert rows[t, name, "raw"]["value"] == pytest.approx(np.mean(wanted), rel=1e-5)


def test_a_common_direction_hides_identity_from_raw_cosine_and_from_nothing_else():
    """Two sets of raw cosine above 0.97: one identifies every instance, the other is one vector and noise."""
    rng = np.random.default_rng(1)
    n, d = 60, 256
    common, codes = 7 * rng.normal(size=d), rng.normal(size=(n, d))
    told = [(common + codes + 0.1 * rng.normal(size=(n, d))).astype(np.float32) for _ in range(2)]
    mute = [(common + rng.normal(size=(n, d))).astype(np.float32) for _ in range(2)]
    halves, found = draw_halves(n, 0), {}
    for name, (one, two) in (("told", told), ("mute", mute)):
        rows = measure(np.stack([one, two], axis=1))
        assert all(rows[t, "inter", "raw"]["value"] > 0.97 for t in (0, 1))
        assert rows[1, "adjacent", "raw"]["value"] > 0.97  # raw: the two sets look the same
        found[name] = {form: rows[1, "adjacent", form]["value"] for form in FORMS[1:]}
        # held-out cosines of different instances: only the error of the mean of 30 is common, 1 / (30 + 1)
        assert all(abs(rows[t, "inter", "centred"]["value"] - 1 / 31) < 0.02 for t in (0, 1))
        centred = (correct(x, halves, ["centred"])["centred"] for x in (one, two))
        found[name]["top1"] = retrieval(*centred)["top1"]
    assert found["told"]["top1"] == 1 and found["mute"]["top1"] < 0.1
    for form in FORMS[1:]:
        assert found["told"][form] > 0.9 and found["mute"][form] < 0.15, form


def test_one_outlier_coordinate_is_taken_out_by_standardising_and_whitening():
    rng = np.random.default_rng(3)
    states = rng.normal(size=(200, 64))
    states[:, 5] += 60 * rng.choice([-1, 1], size=200)  # varies, so that centring keeps it
    halves = draw_halves(200, 0)
    spread = {form: abs(cosine_matrix(x)).mean() for form, x in correct(states, halves).items()}
    assert spread["raw"] > 0.95 and spread["centred"] > 0.95
    assert spread["standardised"] < 0.15 and spread["whitened"] < 0.15


def test_whitening_equals_the_inverse_root_of_the_shrunk_covariance():
    rng = np.random.default_rng(4)
    fit, states = rng.normal(size=(6, 9)) @ np.diag(np.arange(1, 10)), rng.normal(size=(3, 9))
    cov = np.cov(fit.T)
    values, vectors = np.linalg.eigh(0.7 * cov + 0.3 * np.trace(cov) / 9 * np.eye(9))
    wanted = (states - fit.mean(0)) @ (vectors / np.sqrt(values)) @ vectors.T
    assert np.allclose(apply_form(calibrate(fit, 0.3), states, "whitened"), wanted)


def test_instances_that_lack_a_step_are_matched_and_few_give_no_number():
    codes, some = np.random.default_rng(5).normal(size=(8, 30)), np.array([7, 1, 3, 5, 6])
    cells = [Cell(-1, t, kept, codes[kept]) for t, kept in enumerate((np.arange(8), some, some[:3]))]
    rows = measure_cells(cells, np.arange(8) % 2)
    [adjacent] = [row for row in rows if row["measure"] == "adjacent" and row["form"] == "raw"]
    assert adjacent["value"] == pytest.approx(1) and adjacent["n"] == 5
    assert {row["step"] for row in rows} == {0, 1}


def test_intervals_cover_as_often_as_they_say():
    """cos(i, j) = a_i a_j with a_i drawn: the mean over pairs has expectation E[a]^2. Pairs as if independent
    cover far less."""
    rng, covered, naive = np.random.default_rng(6), np.zeros(4), 0
    for seed in range(200):
        a, states = rng.beta(2, 2, size=40), rng.normal(size=(60, 10)) + 2  # E|z - mu|^2 / |mu|^2 = 10 / 40
        x, y, matrix = rng.normal(3, 1, 60), rng.normal(6, 1, 60), np.outer(a, a)
        over_pairs = Bootstrap(40, 0.9, 400, seed).pairs(matrix, np.ones((40, 40), dtype=bool))
        boot = Bootstrap(60, 0.9, 400, seed)
        for k, (entry, truth) in enumerate((
                (over_pairs, 0.25), (boot.spread(states), 0.25), (boot.mean(x), 3), (boot.ratio(x, y), 0.5))):
            covered[k] += entry["low"] < truth < entry["high"]
        pairs = matrix[np.triu_indices(40, 1)]
        naive += abs(pairs.mean() - 0.25) < 1.645 * pairs.std() / np.sqrt(len(pairs))
    # 180 expected of a 90 % interval
    assert (covered >= 166).all() and (covered <= 194).all() and 170 <= covered[0] <= 192 and naive < 100


def test_a_ratio_of_means_is_computed_in_double_precision():
    above, below = np.random.default_rng(0).random((2, 50)).astype(np.float32)
    assert Bootstrap(50).ratio(above, below) == Bootstrap(50).ratio(above.astype(float), below.astype(float))
    found = Bootstrap(3).ratio(np.array([1.0, 3.0, 2.0]), np.array([4.0, 4.0, 4.0]))
    assert found["value"] == pytest.approx(0.5) and found["low"] >= 0.25 and found["high"] <= 0.75
