"""The linear probe on states whose content is known.    pytest tests/test_linear_probe.py"""
import numpy as np
import pytest

from utils.probe.geometry import grouped_folds, predict, probe

N, D = 96, 200


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    labels = np.arange(N) % 4
    return rng, labels, np.eye(4)[labels] @ rng.normal(size=(4, D)) * 3 + rng.normal(size=(N, D)) + 50


def test_separable_states_are_read_and_shuffled_labels_are_not(world):
    _, labels, states = world
    found = probe(states, labels, range(N))
    assert found["accuracy"] == 1 and found["majority"] == 0.25 and found["classes"] == 4
    assert found["shuffled"] == pytest.approx(0.25, abs=0.05) and found["p"] == pytest.approx(1 / 21)


def test_random_states_tell_nothing(world):
    rng, labels, _ = world
    found = probe(rng.normal(size=(N, D)), labels, range(N))
    assert abs(found["above_shuffled"]) < 0.12 and found["low"] < 0.25 < found["high"] and found["p"] > 0.02


def test_what_only_identifies_the_group_is_not_read_as_the_label(world):
    """Each group has a code and a label at random: with folds by instance a probe is perfect, by group it is
    at chance."""
    rng, _, _ = world
    groups = np.repeat(np.arange(24), 4)
    labels = rng.permutation(np.arange(24) % 2)[groups]
    states = rng.normal(size=(24, D))[groups] + 0.01 * rng.normal(size=(N, D))
    assert probe(states, labels, range(N))["accuracy"] > 0.95
    honest = probe(states, labels, groups)
    assert honest["accuracy"] < 0.75 and abs(honest["above_shuffled"]) < 0.3


def test_folds_hold_whole_groups_and_are_of_one_size():
    groups = [f"g{n % 17}" for n in range(120)]
    folds = grouped_folds(groups, 5, 3)
    assert all(len({int(fold) for fold, group in zip(folds, groups) if group == name}) == 1
               for name in groups)
    assert np.ptp(np.bincount(folds, minlength=5)) <= 8 and len(set(folds.tolist())) == 5
    with pytest.raises(ValueError, match="3 groups for 5 folds"):
        grouped_folds([1, 2, 3], 5)


def test_the_kernel_form_equals_ridge_regression():
    rng = np.random.default_rng(1)
    train, test, y = rng.normal(size=(30, 5)), rng.normal(size=(7, 5)), rng.normal(size=(30, 2))
    x = train - train.mean(0)
    weight = 0.1 * (x**2).sum() / 30
    w = np.linalg.solve(x.T @ x + weight * np.eye(5), x.T @ (y - y.mean(0)))
    assert np.allclose(predict(train, y, test, 0.1), (test - train.mean(0)) @ w + y.mean(0))


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="1 kinds"):
        probe(np.ones((6, 2)), [1] * 6, range(6))
