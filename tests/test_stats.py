"""Intervals and tests against published values and second computations.    pytest tests/test_stats.py"""
import itertools
import math

import numpy as np
import pytest

from utils.stats import cluster_bootstrap, holm, mcnemar_exact, tango_ci, tost_tango, wilson


def test_golden_values():
    assert wilson(72, 191) == pytest.approx((0.3113, 0.4475), abs=5e-5)
    assert mcnemar_exact(9, 10) == 1.0
    assert tango_ci(0, 1, 191) == pytest.approx((-0.00880, 0.02312), abs=5e-6)
    assert tango_ci(0, 0, 191) == pytest.approx((-0.01397, 0.01397), abs=5e-6)
    assert tost_tango(0, 1, 191, 0.01) == pytest.approx(0.2541, abs=5e-5)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (1, 400)])
def test_wilson_ends_are_where_the_score_test_just_rejects(k, n):
    for end in wilson(k, n):
        if 0 < end < 1:
            assert abs(k / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("b, c", list(itertools.product(range(5), range(5))))
def test_mcnemar_is_the_two_sided_binomial_test(b, c):
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))


def restricted_z(b, c, n, theta):
    """Tango's statistic with the nuisance parameter found by brute force: the likelihood's maximum on a grid."""
    grid = np.linspace(1e-9, (1 - abs(theta)) / 2, 400001)  # p of the rarer kind of change, given their difference
    p_b, p_c = (grid - min(theta, 0), grid + max(theta, 0))
    rest = np.maximum(1 - p_b - p_c, 1e-300)
    likelihood = b * np.log(p_b + 1e-300) + c * np.log(p_c + 1e-300) + (n - b - c) * np.log(rest)
    best = likelihood.argmax()
    return (c - b - n * theta) / math.sqrt(n * (p_b[best] + p_c[best] - theta**2))


@pytest.mark.parametrize("b, c, n", [(3, 9, 100), (0, 4, 50), (12, 2, 191)])
def test_tango_ends_are_where_the_restricted_score_test_just_rejects(b, c, n):
    low, high = tango_ci(b, c, n, 0.90)
    assert restricted_z(b, c, n, low) == pytest.approx(1.644854, abs=2e-3)
    assert restricted_z(b, c, n, high) == pytest.approx(-1.644854, abs=2e-3)


@pytest.mark.parametrize("b, c, n, margin", [(1, 2, 400, 0.02), (5, 5, 100, 0.05), (0, 0, 268, 0.01), (0, 0, 267, 0.01)])
def test_equivalence_holds_exactly_when_the_90_percent_interval_is_inside(b, c, n, margin):
    low, high = tango_ci(b, c, n, 0.90)
    assert (tost_tango(b, c, n, margin) < 0.05) == (-margin < low and high < margin)


def test_191_items_cannot_show_equivalence_within_one_point():
    assert min(tost_tango(b, c, 191, 0.01) for b in range(4) for c in range(4)) > 0.05


def test_cluster_bootstrap_covers_the_analytic_interval_and_widens_with_clusters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = cluster_bootstrap(values, range(400))
    half = 1.6449 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)
    copies = np.repeat(values[:100], 4)
    clustered = cluster_bootstrap(copies, np.repeat(np.arange(100), 4))
    alone = cluster_bootstrap(copies, range(400))
    assert (clustered[1] - clustered[0]) > 1.7 * (alone[1] - alone[0])
    assert cluster_bootstrap(copies, np.repeat(np.arange(100), 4)) == clustered


@pytest.mark.parametrize("call", [lambda: wilson(0, 0), lambda: wilson(5, 4), lambda: tango_ci(3, 3, 5),
                                  lambda: tost_tango(0, 0, 0, 0.05), lambda: cluster_bootstrap([], []),
                                  lambda: holm([])])
def test_no_data_is_an_error_and_never_a_number(call):
    with pytest.raises(ValueError):
        call()
