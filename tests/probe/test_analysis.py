"""Spectrum, CKA, retrieval and the linear probe on states whose content is known."""
import numpy as np
import pytest

from utils.probe.analysis import adjust, cka, grouped_folds, linear_probe, retrieval, ridge_scores, spectrum

N, D = 96, 200


def test_the_spectrum_of_equal_directions_counts_them():
    found = spectrum(np.vstack([np.eye(12)[:8], -np.eye(12)[:8]]) + 100)
    assert (found["participation_ratio"], found["effective_rank"]) == pytest.approx((8, 8))
    assert found["top1"] == pytest.approx(1 / 8)
    assert (found["rank90"], found["rank95"], found["rank99"]) == (8, 8, 8)
    assert spectrum(np.ones((5, 3)))["participation_ratio"] is None


def test_biased_cka_of_independent_sets_is_near_one_and_debiased_near_zero():
    """The published values at n = 100, d = 3584: 0.973 and -0.003."""
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, 100, 3584)).astype(np.float32)
    assert cka(x, y, debiased=False) == pytest.approx(0.973, abs=0.004)
    assert cka(x, y) == pytest.approx(0, abs=0.02)
    turn = np.linalg.qr(rng.normal(size=(50, 50)))[0]
    assert cka(x[:, :50], 3 * x[:, :50] @ turn + 1) == pytest.approx(1)  # rotation, scale, shift


def test_debiased_hsic_equals_its_definition_over_distinct_quadruples():
    rng = np.random.default_rng(9)
    x, y, n = rng.normal(size=(6, 2)), rng.normal(size=(6, 3)), 6

    def hsic(k, l):
        terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i in range(n) for j in range(n)
                 for q in range(n) for r in range(n) if len({i, j, q, r}) == 4]
        return sum(terms) / len(terms)
    k, l = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))


def test_retrieval_of_same_unrelated_and_constant_states():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(2, 50, 200))
    same, unrelated, constant = retrieval(x, x), retrieval(x, y), retrieval(x, np.ones((50, 200)))
    assert same["top1"] == same["mrr"] == 1 and unrelated["top1"] < 0.15
    assert (constant["top1"], constant["mrr"]) == pytest.approx((1 / 50, constant["mrr_chance"]))


def test_adjusting_maps_the_cosine_of_ordinary_tokens_to_zero():
    row = adjust({"value": 0.6, "low": 0.2, "high": 1.0, "form": "raw"}, 0.2)
    assert (row["value"], row["low"], row["high"], row["form"]) == (pytest.approx(0.5), 0, 1, "adjusted")
    with pytest.raises(ValueError, match="c0 is 1"):
        adjust(row, 1.0)


def test_separable_states_are_read_and_shuffled_labels_are_not():
    rng, labels = np.random.default_rng(0), np.arange(N) % 4
    states = np.eye(4)[labels] @ rng.normal(size=(4, D)) * 3 + rng.normal(size=(N, D)) + 50
    found = linear_probe(states, labels, range(N))
    assert found["accuracy"] == 1 and found["majority"] == 0.25 and found["classes"] == 4
    assert found["shuffled"] == pytest.approx(0.25, abs=0.05) and found["p"] == pytest.approx(1 / 21)
    found = linear_probe(rng.normal(size=(N, D)), labels, range(N))  # random states
    assert abs(found["above_shuffled"]) < 0.12 and found["low"] < 0.25 < found["high"] and found["p"] > 0.02


def test_states_that_only_identify_the_group_do_not_give_the_label():
    """Each group has a code and a random label: a probe is perfect with folds by instance, not by group."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 4)
    labels = rng.permutation(np.arange(24) % 2)[groups]
    states = rng.normal(size=(24, D))[groups] + 0.01 * rng.normal(size=(N, D))
    assert linear_probe(states, labels, range(N))["accuracy"] > 0.95
    by_group = linear_probe(states, labels, groups)
    assert by_group["accuracy"] < 0.75 and abs(by_group["above_shuffled"]) < 0.3


def test_folds_hold_whole_groups_and_have_one_size():
    groups = [f"g{n % 17}" for n in range(120)]
    folds = grouped_folds(groups, 5, 3)
    assert len(set(zip(groups, folds.tolist()))) == 17
    assert np.ptp(np.bincount(folds, minlength=5)) <= 8 and len(set(folds.tolist())) == 5
    with pytest.raises(ValueError, match="3 groups for 5 folds"):
        grouped_folds([1, 2, 3], 5)
    with pytest.raises(ValueError, match="1 kinds"):
        linear_probe(np.ones((6, 2)), [1] * 6, range(6))


def test_the_kernel_form_equals_ridge_regression():
    rng = np.random.default_rng(1)
    train, test, y = rng.normal(size=(30, 5)), rng.normal(size=(7, 5)), rng.normal(size=(30, 2))
    x = train - train.mean(0)
    weight = 0.1 * (x**2).sum() / 30
    w = np.linalg.solve(x.T @ x + weight * np.eye(5), x.T @ (y - y.mean(0)))
    assert np.allclose(ridge_scores(train, y, test, 0.1), (test - train.mean(0)) @ w + y.mean(0))
