"""Intervals, paired tests and equivalence for shares of right answers. numpy and the standard library only.

Paired data are written b, c, n: of n items, b go right -> wrong and c go wrong -> right between two conditions, so the
change is theta = (c - b) / n. Nothing here answers for an empty sample: n = 0 is a ValueError, never a number.
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()
BISECTIONS = 60  # halvings of an interval of length 2: far below float resolution of the answer


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share of k in n (Wilson 1927), inside [0, 1] by construction."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"wilson({k}, {n}): expected 0 <= k <= n and n >= 1")
    z = normal_quantile(level)
    center, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    # The ends are exact at k = 0 and k = n; rounding would leave them a hair off.
    return (0.0 if k == 0 else (center - half) / (n + z * z)), (1.0 if k == n else (center + half) / (n + z * z))


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided p of McNemar's exact test: b against c under a fair coin. 1.0 if no answer changed."""
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact({b}, {c}): expected counts")
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))  # integers: exact at any size


def tango_z(b: int, c: int, n: int, theta: float) -> float:
    """Return Tango's score statistic for the hypothesis that the change is theta (Tango 1998, Stat. Med. 17:891).

    It decreases in theta, is 0 at (c - b) / n, and its square at 0 is McNemar's chi-square.
    """
    if min(b, c) < 0 or b + c > n or n < 1 or not -1 <= theta <= 1:
        raise ValueError(f"b {b}, c {c}, n {n}, theta {theta}: expected counts with b + c <= n, n >= 1, |theta| <= 1")
    # q: the right -> wrong probability of greatest likelihood among those with a change of theta
    qa, qb, qc = 2 * n, -b - c + (2 * n - c + b) * theta, -b * theta * (1 - theta)
    q = (math.sqrt(max(qb * qb - 4 * qa * qc, 0.0)) - qb) / (2 * qa)
    difference, variance = c - b - n * theta, n * (2 * q + theta * (1 - theta))
    if variance <= 0:  # nothing can vary: theta is certain (b = c = theta = 0) or impossible (theta = 1, say)
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def tango_ci(b: int, c: int, n: int, level: float = 0.90) -> tuple[float, float]:
    """Return the score interval of theta: every change that Tango's test does not reject.

    Unlike Wald and bootstrap intervals it keeps a width when no answer changes. The default level is the interval that
    belongs to a pair of one-sided tests at 5 %.
    """
    z, center = normal_quantile(level), (c - b) / n if n else 0.0
    tango_z(b, c, n, center)  # checks the counts
    return _crossing(b, c, n, z, -1.0, center), _crossing(b, c, n, -z, center, 1.0)


def _crossing(b: int, c: int, n: int, z: float, low: float, high: float) -> float:
    """Return the theta in [low, high] at which the decreasing statistic passes z."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if tango_z(b, c, n, middle) > z else (low, middle)
    return (low + high) / 2


def tost_tango(b: int, c: int, n: int, margin: float) -> float:
    """Return the p of "the change is smaller than margin, both ways" (two one-sided score tests).

    Below alpha exactly if `tango_ci` of level 1 - 2 alpha lies inside (-margin, margin).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: expected a share between 0 and 1")
    return max(1 - NORMAL.cdf(tango_z(b, c, n, -margin)), NORMAL.cdf(tango_z(b, c, n, margin)))


def cluster_bootstrap(values: Sequence[float], groups: Sequence[Hashable], level: float = 0.90, n_boot: int = 10000,
                      seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean of values when whole groups are drawn with replacement.

    A group is what varies together, such as the four rotations of one HR-Bench question. ValueError below two groups.
    """
    values = np.asarray(values, dtype=float)
    names, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    if len(values) != len(members) or len(names) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} values in {len(names)} groups: expected finite values in at least two groups")
    sums, sizes = np.bincount(members, weights=values), np.bincount(members)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, n_boot, 1000):  # in pieces: [n_boot, n_groups] need not fit in memory
        drawn = rng.integers(len(names), size=(min(1000, n_boot - start), len(names)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values, in the order given."""
    if len(p) == 0 or not all(0 <= value <= 1 for value in p):
        raise ValueError(f"holm({p}): expected at least one p value, all between 0 and 1")
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def normal_quantile(level: float) -> float:
    """Return z such that a standard normal lies in (-z, z) with probability level."""
    if not 0 < level < 1:
        raise ValueError(f"level {level}: expected a share between 0 and 1")
    return NORMAL.inv_cdf((1 + level) / 2)
