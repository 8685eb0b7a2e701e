"""Intervals, paired tests and equivalence tests for 0/1 and continuous outcomes, with or without groups.

Paired 0/1 data are b, c, n: of n items, b change right -> wrong and c wrong -> right, so the change is
theta = (c - b) / n. Continuous data are one value per item, such as the change of a log-probability in nats.
Items of one group (the questions on one picture) may vary together. An empty sample is a ValueError.
"""
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from utils.means import group_sums, mean_and_error, robust_mean, t_quantile, t_tail

BISECTIONS = 60  # far below float resolution


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share of k in n (Wilson 1927), inside [0, 1]."""
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"wilson({k}, {n}): expected 0 <= k <= n and n >= 1")
    return _wilson(k / n, n, t_quantile(level))


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    center, half = share * n + z * z / 2, z * math.sqrt(n * share * (1 - share) + z * z / 4)
    low = 0.0 if share == 0 else (center - half) / (n + z * z)  # exact at both ends
    return low, 1.0 if share == 1 else (center + half) / (n + z * z)


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided p of McNemar's exact test: b against c under a fair coin."""
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact({b}, {c}): expected counts")
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))  # integers: exact at any size


def tango_z(b: float, c: float, n: float, theta: float) -> float:
    """Return the score statistic for the hypothesis that the change is theta (Tango 1998, Stat. Med. 17:891).

    It decreases in theta, is 0 at (c - b) / n, and its square at 0 is McNemar's chi-square. The counts need
    not be whole.
    """
    if not (min(b, c) >= 0 and b + c <= n * (1 + 1e-12) and n > 0 and -1 <= theta <= 1):
        raise ValueError(f"b {b}, c {c}, n {n}, theta {theta}: expected counts with b + c <= n, |theta| <= 1")
    # q: the right -> wrong probability of greatest likelihood among those with a change of theta
    qa, qb, qc = 2 * n, -b - c + (2 * n - c + b) * theta, -b * theta * (1 - theta)
    q = (math.sqrt(max(qb * qb - 4 * qa * qc, 0.0)) - qb) / (2 * qa)
    difference, variance = c - b - n * theta, n * (2 * q + theta * (1 - theta))
    if variance <= 0:  # theta is certain (b = c = theta = 0) or impossible (theta = 1, say)
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


class Reading(NamedTuple):
    """Changes as counts of b and c in n, whose statistic is `spread` times Student's t of `df` degrees of
    freedom (inf: a normal)."""

    b: float
    c: float
    n: float
    spread: float = 1.0
    df: float = math.inf

    def interval(self, level: float) -> tuple[float, float]:
        """Return every change that Tango's test does not reject."""
        z, center = self.spread * t_quantile(level, self.df), (self.c - self.b) / self.n if self.n else 0.0
        return self._crossing(z, -1.0, center), self._crossing(-z, center, 1.0)

    def _crossing(self, z: float, low: float, high: float) -> float:
        """Return the theta in [low, high] at which the decreasing statistic passes z."""
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_below = tango_z(self.b, self.c, self.n, middle) > z
            low, high = (middle, high) if is_below else (low, middle)
        return (low + high) / 2

    def tost(self, margin: float) -> float:
        """Return the p of "the change is smaller than margin, both ways" (two one-sided score tests)."""
        below, above = (tango_z(self.b, self.c, self.n, end) / self.spread for end in (-margin, margin))
        return max(t_tail(below, self.df), t_tail(-above, self.df))


def tango_ci(b: float, c: float, n: float, level: float = 0.90) -> tuple[float, float]:
    """Return `Reading.interval` of ungrouped items; it has a width even when no answer changes."""
    return Reading(b, c, n).interval(level)


def tost_tango(b: float, c: float, n: float, margin: float) -> float:
    """Return `tost` of ungrouped items: below alpha exactly if `tango_ci` of level 1 - 2 alpha is inside."""
    return tost([Reading(b, c, n)], margin)


def tost(readings: Sequence[Reading], margin: float) -> float:
    """Return the p of equivalence by all readings: below .05 exactly if all 90 % intervals are inside."""
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: expected a share between 0 and 1")
    return max((reading.tost(margin) for reading in readings), default=1.0)


def effective_groups(groups: Sequence[Hashable]) -> float:
    """Return Kish's effective number of groups, (sum of sizes)^2 / sum of squared sizes: as many independent
    items say as much if the items of a group always agree (Kish 1965)."""
    sizes = list(Counter(groups).values())
    return sum(sizes) ** 2 / sum(size * size for size in sizes) if sizes else 0.0


def paired_readings(clean: Sequence[int], intervened: Sequence[int],
                    groups: Sequence[Hashable]) -> list[Reading]:
    """Return the readings of the change of a 0/1 outcome, one entry per item; [] for one group of several.

    Without groups it is Tango's (1998). With groups there are two, and a claim must hold by both:

    - all items, the statistic widened by the root of the groups' design effect (cluster-robust over
      independent variance, at least 1; after Rao and Scott 1992), with Student's t;
    - as many independent items as there are effective groups, with the same shares of changes. Where few
      answers change, nothing estimates a design effect, and the first alone called a change as large as the
      margin equivalent in up to 44 % of data sets (16 groups of 4 that move together) instead of 5 %.
    """
    clean, intervened = np.asarray(clean, dtype=float), np.asarray(intervened, dtype=float)
    if (not clean.shape == intervened.shape == (len(groups),)
            or not np.isin([clean, intervened], (0, 1)).all()):
        raise ValueError(f"clean {clean.shape}, intervened {intervened.shape}, {len(groups)} groups: "
                         "expected as many of each, all outcomes 0 or 1; for other outcomes use robust_mean")
    changes, n_groups = intervened - clean, len(set(groups))
    b, c, n = int((changes < 0).sum()), int((changes > 0).sum()), len(changes)
    if n_groups == n:
        return [Reading(b, c, n)]
    if n_groups == 1:  # says nothing about other groups
        return []
    mean, error, df = mean_and_error(changes, groups)
    independent = math.sqrt(np.square(changes - mean).sum()) / n
    part = effective_groups(groups) / n
    return [Reading(b, c, n, max(1.0, error / independent) if independent else 1.0, df),
            Reading(b * part, c * part, n * part)]


def paired_interval(clean: Sequence[int], intervened: Sequence[int], groups: Sequence[Hashable],
                    level: float = 0.90) -> tuple[float, float]:
    """Return the interval of the change of a 0/1 outcome from clean to intervened, one entry per item: each
    end is the wider of `paired_readings`. (-1, 1) for a single group of several items."""
    return widest(paired_readings(clean, intervened, groups), level)


def widest(readings: Sequence[Reading], level: float) -> tuple[float, float]:
    ends = [reading.interval(level) for reading in readings]
    return min((low for low, _ in ends), default=-1.0), max((high for _, high in ends), default=1.0)


def share_interval(outcomes: Sequence[int], groups: Sequence[Hashable],
                   level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the share of a 0/1 outcome, one entry per item; (0, 1) for one group of several.

    Without groups it is Wilson's. With groups each end is the wider of two of Wilson's, as in
    `paired_readings`: of as many items as the design effect leaves, with Student's t, and of the effective
    groups.
    """
    hits, n = np.asarray(outcomes, dtype=float), len(groups)
    if hits.shape != (n,) or not n or not np.isin(hits, (0, 1)).all():
        raise ValueError(f"outcomes {hits.shape}, {n} groups: expected as many of each, all 0 or 1")
    n_groups = len(set(groups))
    if n_groups == n:
        return wilson(int(hits.sum()), n, level)
    if n_groups == 1:
        return 0.0, 1.0
    share, error, df = mean_and_error(hits, groups)
    left = min(n, share * (1 - share) / error**2) if error else n
    lows, highs = zip(_wilson(share, left, t_quantile(level, df)),
                      _wilson(share, effective_groups(groups), t_quantile(level)))
    return min(lows), max(highs)


def verdict(ci90: Sequence[float], ci95: Sequence[float], margin: float) -> str:
    """Return the verdict at 5 % on an effect, against a margin fixed beforehand.

    "equivalent": ci90 is inside (-margin, margin), a pair of one-sided tests. "effect": ci95 excludes 0.
    "small effect inside the margin": both. "inconclusive": neither.
    """
    if not margin > 0 or not ci95[0] <= ci90[0] <= ci90[1] <= ci95[1]:
        raise ValueError(f"{ci90}, {ci95}, margin {margin}: expected ci90 within ci95 and margin > 0")
    inside, excludes_zero = -margin < ci90[0] and ci90[1] < margin, ci95[0] > 0 or ci95[1] < 0
    if inside:
        return "small effect inside the margin" if excludes_zero else "equivalent"
    return "effect" if excludes_zero else "inconclusive"


def paired_ends(readings: Sequence[Reading]) -> dict[str, list[float]]:
    """Return {"ci90", "ci95"}, which `verdict` takes."""
    return {"ci90": [*widest(readings, 0.90)], "ci95": [*widest(readings, 0.95)]}


def mean_ends(values: Sequence[float], groups: Sequence[Hashable]) -> dict[str, list[float]]:
    """Return {"ci90", "ci95"} of `robust_mean`."""
    ends = [list(robust_mean(values, groups, level)[1:]) for level in (0.90, 0.95)]
    return dict(zip(("ci90", "ci95"), ends))


def cluster_bootstrap(values: Sequence[float], groups: Sequence[Hashable], level: float = 0.90,
                      n_boot: int = 10000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean when whole groups are drawn with replacement."""
    sums, sizes = group_sums(values, groups)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, n_boot, 1000):  # in pieces: [n_boot, n_groups] need not fit in memory
        drawn = rng.integers(len(sums), size=(min(1000, n_boot - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values, in order."""
    if len(p) == 0 or not all(0 <= value <= 1 for value in p):
        raise ValueError(f"holm({p}): expected at least one p value, all between 0 and 1")
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def chance(n_options: Sequence[int]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of options (36.0 % on V*)."""
    if min(n_options, default=0) < 1:
        raise ValueError(f"chance of items with {list(n_options)[:9]} options: expected at least one each")
    return sum(1 / n for n in n_options) / len(n_options)
