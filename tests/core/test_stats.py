"""Intervals and tests against published values and second computations."""
import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from analytic import trinomial

from utils.intervene.mediation import t_test, tost_mean, upper_share
from utils.means import mean_and_error, robust_mean, sign_flip, t_quantile, t_tail
from utils.stats import (cluster_bootstrap, effective_groups, holm, mcnemar_exact, paired_interval,
                         paired_readings, share_interval, tango_ci, tango_z, tost, tost_tango, verdict,
                         wilson)


def test_golden_values():
    assert tango_ci(0, 1, 191) == pytest.approx((-0.00880, 0.02312), abs=5e-6)
    assert tango_ci(0, 0, 191) == pytest.approx((-0.01397, 0.01397), abs=5e-6)
    assert tost_tango(0, 1, 191, 0.01) == pytest.approx(0.2541, abs=5e-5)
    # 191 items cannot show equivalence within one point
    assert min(tost_tango(b, c, 191, 0.01) for b in range(4) for c in range(4)) > 0.05
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def restricted_z(b, c, n, theta):
    """Tango's statistic, its nuisance parameter found on a grid of p of the rarer change."""
    grid = np.linspace(1e-9, (1 - abs(theta)) / 2, 400001)
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


@pytest.mark.parametrize("level", [0.001, 0.3, 0.95, 0.9999])
def test_t_quantiles_in_closed_form(level):
    p = (1 + level) / 2
    assert t_quantile(level, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-11)
    assert t_quantile(level, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-11)
    assert t_quantile(level, 1e7) == pytest.approx(NormalDist().inv_cdf(p), abs=1e-5)
    for df in (2.5, 40, math.inf):
        assert t_tail(t_quantile(level, df), df) == pytest.approx(1 - p)


GROUPED = [(0.3, "a"), (0.1, "a"), (-0.2, "b"), (0.4, "c"), (0.0, "c"), (0.2, "c"), (-0.1, "d")]
VALUES, GROUPS = zip(*GROUPED)


def test_the_error_of_a_mean_is_cr2_with_satterthwaites_degrees_of_freedom():
    """By the matrices of Bell and McCaffrey 2002: A_g = (I - H_gg)^-1/2, p_g = (I - H)_g' A_g X_g / n."""
    values, n = np.asarray(VALUES), len(VALUES)
    hat, columns, variance = np.full((n, n), 1 / n), [], 0.0
    for name in sorted(set(GROUPS)):
        own = np.flatnonzero(np.asarray(GROUPS) == name)
        eigenvalues, vectors = np.linalg.eigh((np.eye(n) - hat)[np.ix_(own, own)])
        adjusted = vectors @ np.diag(eigenvalues**-0.5) @ vectors.T @ np.ones(len(own)) / n
        variance += (adjusted @ (values - values.mean())[own]) ** 2
        columns.append((np.eye(n) - hat)[own].T @ adjusted)
    inner = np.array(columns) @ np.array(columns).T
    df = np.trace(inner) ** 2 / np.square(inner).sum()
    assert mean_and_error(VALUES, GROUPS) == pytest.approx((values.mean(), math.sqrt(variance), df))
    half = t_quantile(0.95, df) * math.sqrt(variance)
    assert robust_mean(VALUES, GROUPS, 0.95) == pytest.approx((0.1, 0.1 - half, 0.1 + half))


def test_robust_mean_does_not_count_copies():
    values = np.random.default_rng(0).normal(size=50)
    copies, groups = np.repeat(values, 4), np.repeat(np.arange(50), 4)
    assert robust_mean(copies, groups, 0.95) == pytest.approx(robust_mean(values, range(50), 0.95))


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.235, 0.34, 0.36, 1.0])
def test_a_mean_is_equivalent_exactly_when_its_90_percent_interval_is_inside(margin):
    _, low, high = robust_mean(VALUES, GROUPS, 0.90)
    assert (tost_mean(VALUES, GROUPS, margin) < 0.05) == (-margin < low and high < margin)


def test_sign_flips_move_whole_groups():
    sums = [0.4, -0.2, 0.6, -0.1]
    flipped = [abs(sum(s * x for s, x in zip(signs, sums))) for signs in itertools.product((1, -1), repeat=4)]
    by_hand = sum(value >= 0.7 - 1e-9 for value in flipped) / 16
    assert sign_flip(VALUES, GROUPS) == pytest.approx(by_hand)
    assert sign_flip([-value for value in VALUES], GROUPS) == pytest.approx(by_hand)
    assert sign_flip(np.repeat(VALUES, 3), np.repeat(GROUPS, 3)) == pytest.approx(by_hand)  # copies


def test_random_sign_flips_agree_with_all_of_them_and_are_never_0():
    first, again = (sign_flip([-1] * 12 + [1] * 3, range(15), n_perm=2000, seed=1) for _ in range(2))
    assert first == again == pytest.approx(mcnemar_exact(12, 3), abs=0.013)
    assert sign_flip([1] * 60, range(60), n_perm=999) == 1 / 1000


def test_without_groups_the_paired_interval_is_tangos():
    clean, after = [1] * 9 + [0] * 10 + [1] * 172, [0] * 9 + [1] * 10 + [1] * 172
    assert paired_interval(clean, after, range(191), 0.90) == tango_ci(9, 10, 191, 0.90)
    assert paired_interval([1, 1, 0], [1, 0, 0], "aaa") == (-1, 1)  # one group shows nothing of others


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (4, 0), (0, 12), (20, 8), (200, 0)])
def test_with_groups_the_paired_interval_is_as_wide_as_tangos_of_items_and_of_groups(lost, won):
    clean = np.r_[np.ones(lost), np.zeros(won), np.ones(200 - lost - won)]
    after = np.r_[np.zeros(lost), np.ones(won), np.ones(200 - lost - won)]
    low, high = paired_interval(clean, after, np.arange(200) // 4, 0.90)
    for ends in (tango_ci(lost, won, 200, 0.90), tango_ci(lost / 4, won / 4, 50, 0.90)):
        assert low <= ends[0] and ends[1] <= high
    assert -1 <= low < high <= 1


def test_groups_without_a_changed_answer_count_as_groups():
    low, high = paired_interval([1] * 100, [1] * 100, [n // 20 for n in range(100)], 0.90)
    assert (low, high) == pytest.approx(tango_ci(0, 0, 5, 0.90)) and high > 0.3
    assert effective_groups("aaaabbbb") == 2 and effective_groups([0] * 30 + list(range(1, 31))) == \
        pytest.approx(60**2 / (30**2 + 30))


@pytest.mark.parametrize("lost, won", [(0, 0), (3, 1), (0, 9), (20, 15), (40, 8)])
@pytest.mark.parametrize("size", [1, 4, 10])
def test_the_p_of_equivalence_agrees_with_the_interval(lost, won, size):
    """Of single items it is Tango's."""
    clean = np.r_[np.ones(lost), np.zeros(won), np.ones(200 - lost - won)]
    after, groups = np.r_[np.zeros(lost), np.ones(won), np.ones(200 - lost - won)], np.arange(200) // size
    readings, ends = paired_readings(clean, after, groups), paired_interval(clean, after, groups, 0.90)
    widest = max(map(abs, ends))
    for margin, is_inside in ((widest + 1e-6, True), (widest - 1e-6, False)):
        assert (tost(readings, margin) < 0.05) == is_inside
    assert size > 1 or tost_tango(lost, won, 200, 0.05) == tost(readings, 0.05)
    assert tost(paired_readings([1, 1, 0], [1, 1, 0], "aaa"), 0.5) == 1


def test_shares_of_grouped_outcomes():
    hits = [1] * 30 + [0] * 10
    assert share_interval(hits, range(40)) == wilson(30, 40)
    low, high = share_interval(np.repeat(hits, 4), np.repeat(range(40), 4))
    assert (low, high) == pytest.approx(wilson(30, 40), abs=0.02) and low <= wilson(30, 40)[0]
    assert share_interval([1] * 160, np.repeat(range(40), 4)) == pytest.approx(wilson(40, 40))
    assert share_interval([1, 0], "aa") == (0, 1)
    assert upper_share(0, 50, 50) == pytest.approx(1 - 0.05 ** (1 / 50)) and upper_share(3, 3, 3) == 1
    assert upper_share(8, 80, 20) == pytest.approx(upper_share(2, 20, 20))


def test_a_t_test_agrees_with_the_interval():
    for shift in (-0.3, 0.0, 0.02, 0.4):
        values = [value + shift for value in VALUES]
        _, low, high = robust_mean(values, GROUPS, 0.95)
        assert (t_test(values, GROUPS) < 0.05) == (low > 0 or high < 0)
    assert (t_test([1, 1], "ab"), t_test([0, 0], "ab")) == (0, 1)


@pytest.mark.parametrize("ci90, ci95, said", [
    ((-0.02, 0.03), (-0.03, 0.04), "equivalent"),
    ((0.01, 0.03), (0.005, 0.04), "small effect inside the margin"),
    ((-0.3, -0.1), (-0.32, -0.08), "effect"), ((-0.1, 0.02), (-0.12, 0.04), "inconclusive"),
    ((0.01, 0.04), (-0.01, 0.06), "equivalent"), ((0.01, 0.06), (0.005, 0.07), "effect"),
    ((0.0, 0.04), (0.0, 0.06), "equivalent"), ((-0.05, 0.01), (-0.06, 0.02), "inconclusive")])  # on a limit
def test_verdicts(ci90, ci95, said):
    assert verdict(ci90, ci95, 0.05) == said


@pytest.mark.parametrize("n, discordance, margin", [(72, 0.2, 0.1), (191, 0.1, 0.05),
                                                    (191, 0.2, 0.1), (800, 0.05, 0.02), (800, 0.1, 0.03)])
def test_a_change_as_large_as_the_margin_is_called_equivalent_in_at_most_5_percent(n, discordance, margin):
    """Exact sums over all data; counts are discrete and both tests must reject: the rate is below 5 %."""
    counts = list(trinomial(n, (discordance + margin) / 2, (discordance - margin) / 2))
    assert sum(p for *_, p in counts) == pytest.approx(1, abs=1e-6)
    size = sum(p for b, c, p in counts if tost_tango(b, c, n, margin) < 0.05)
    print(f"n {n}, discordance {discordance}, change = margin = {margin}: equivalent in {100 * size:.2f} %")
    assert 0.01 < size <= 0.05


@pytest.mark.parametrize("n, discordance", [(191, 0.05), (191, 0.1), (800, 0.05)])
def test_no_change_is_called_an_effect_in_about_5_percent(n, discordance):
    counts = trinomial(n, discordance / 2, discordance / 2)
    rate = sum(p for b, c, p in counts if abs(tango_z(b, c, n, 0)) > 1.959964)
    print(f"n {n}, discordance {discordance}, no change: called an effect in {100 * rate:.2f} %")
    assert rate <= 0.06  # a score test, not an exact one: a little above 5 % with 10 changed answers


def test_scipy_agrees():
    from scipy import stats
    for b, c in itertools.product((0, 1, 3, 4, 12), (0, 1, 4, 30)):
        assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1)
    for k, n in ((72, 191), (0, 10), (3, 10), (10, 10), (1, 400)):
        assert wilson(k, n) == pytest.approx(stats.binomtest(k, n).proportion_ci(method="wilson"))
    values = np.random.default_rng(0).normal(0.5, size=12)
    permuted = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=math.inf)
    assert sign_flip(values, range(12)) == pytest.approx(permuted.pvalue)
    ends = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert robust_mean(values, range(12), 0.90)[1:] == pytest.approx(tuple(ends))
    p = [stats.ttest_1samp(values, end, alternative=side).pvalue
         for end, side in ((-0.9, "greater"), (0.9, "less"))]
    assert tost_mean(values, range(12), 0.9) == pytest.approx(max(p))
    assert tost_mean(-values, range(12), 0.9) == pytest.approx(max(p))
    assert (tost_mean([0.1, 0.1], "ab", 0.2), tost_mean([0.5, 0.5], "ab", 0.2)) == (0.0, 1.0)  # no variance
    for b, c in ((0, 0), (0, 5), (3, 1), (6, 6)):
        changes = [-1] * b + [1] * c + [0] * 9
        assert sign_flip(changes, range(len(changes))) == pytest.approx(mcnemar_exact(b, c))


@pytest.mark.parametrize("call", [
    (wilson, 0, 0), (wilson, 5, 4), (tango_ci, 3, 3, 5), (tango_ci, 0, 0, 0),
    (tost_tango, 0, 0, 0, 0.05), (holm, []), (share_interval, [0.5], "a"), (share_interval, [], ""),
    (cluster_bootstrap, [], []), (robust_mean, [], []), (robust_mean, [1, 2], "aa", 0.9),
    (robust_mean, [1, math.nan], "ab"), (robust_mean, [1, 2, 3], "ab"), (robust_mean, [1, 2], "ab", 1.0),
    (tost_mean, [1, 2], "ab", 0), (sign_flip, [1], "a"), (sign_flip, [1, 2], "ab", 0),
    (paired_interval, [], [], []), (paired_interval, [1, 0.5], [1, 1], "ab"), (t_quantile, 1, 5),
    (paired_interval, [1, 0], [1, 1], "a"), (paired_interval, [1], [1, 1], "ab"), (t_quantile, 0.5, 0),
    (verdict, (0, 1), (0.1, 0.9), 0.5), (verdict, (0, 1), (0, 1), 0), (verdict, (math.nan, 1), (0, 1), 0.5)])
def test_no_data_or_no_sense_is_an_error_and_never_a_number(call):
    function, *args = call
    with pytest.raises(ValueError):
        function(*args)
