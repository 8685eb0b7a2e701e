"""Means of continuous outcomes whose items vary in groups: standard errors, intervals and tests.

Values are one per item, such as the change of a log-probability in nats. Fewer than two groups are a
ValueError: one group says nothing about others.
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from scipy import special

RESOLUTION = 1e-3  # nats: a score may differ by 1e-4 between batches in float32


def group_sums(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum of values [G], number of values [G]) of every group."""
    values = np.asarray(values, dtype=float)
    names, members = np.unique(np.asarray([repr(group) for group in groups]), return_inverse=True)
    if values.shape != members.shape or len(names) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} values in {len(names)} groups: expected finite ones in at least two")
    return np.bincount(members, weights=values), np.bincount(members)


def robust_mean(values: Sequence[float], groups: Sequence[Hashable],
                level: float = 0.90) -> tuple[float, float, float]:
    """Return (mean, low, high) of a continuous outcome by `mean_and_error` and Student's t.

    The width is 0 if no group deviates: for 0/1 outcomes use `paired_interval` or `share_interval`.
    """
    mean, error, df = mean_and_error(values, groups)
    half = t_quantile(level, df) * error
    return mean, mean - half, mean + half


def mean_and_error(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float, float]:
    """Return (mean, its cluster-robust standard error, degrees of freedom).

    The bias-reduced estimator CR2 with Satterthwaite's degrees of freedom (Bell and McCaffrey 2002;
    Pustejovsky and Tipton 2018), for a mean: SE^2 = sum over groups of (sum of the group's deviations)^2 /
    (1 - m / n) / n^2, m of n items being in the group. Groups of equal size give G - 1 degrees of freedom,
    a large one among small ones far fewer. With one group of 30 and 30 of 1, the 95 % interval with G - 1
    missed in 10 to 30 % of data sets, this one in 2 to 5 %.
    """
    sums, sizes = group_sums(values, groups)
    n = sizes.sum()
    mean = sums.sum() / n
    rest = 1 - sizes / n
    error = math.sqrt((np.square(sums - mean * sizes) / rest).sum()) / n
    # M = diag(w m) - u u' with w = 1 / rest, u = sqrt(w) m / sqrt(n): its trace squared over that of M M
    diagonal, outer = sizes / rest, sizes**2 / rest / n
    squares = np.square(diagonal).sum() - 2 * (diagonal * outer).sum() + outer.sum() ** 2
    return float(mean), float(error), float((diagonal - outer).sum() ** 2 / squares)


def sign_flip(values: Sequence[float], groups: Sequence[Hashable], n_perm: int = 10000,
              seed: int = 0) -> float:
    """Return the two-sided p of "values are symmetric about 0" by flipping the signs of the group sums.

    If the 2^G flips are at most n_perm (G: groups whose sum is not 0), all are counted; else n_perm random
    ones and the data's own. On ungrouped 0/1 outcomes it is McNemar's exact test.
    """
    sums, _ = group_sums(values, groups)
    sums = sums[sums != 0]
    reach = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # sums of equal size may differ by rounding
    if n_perm < 1:
        raise ValueError(f"n_perm {n_perm}: expected at least 1")
    if 2 ** len(sums) <= n_perm:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)  # [2^G, G]
        return float((np.abs(signs @ sums) >= reach).mean())
    rng, k = np.random.default_rng(seed), 0
    for start in range(0, n_perm, 1000):
        signs = 2 * rng.integers(2, size=(min(1000, n_perm - start), len(sums))) - 1
        k += int((np.abs(signs @ sums) >= reach).sum())
    return (1 + k) / (1 + n_perm)


def t_quantile(level: float, df: float = math.inf) -> float:
    """Return t such that Student's t of df degrees of freedom (inf: a normal) lies in (-t, t) with
    probability level."""
    if not 0 < level < 1 or not df > 0:
        raise ValueError(f"level {level}, {df} degrees of freedom: expected a share between 0 and 1, df > 0")
    p = (1 + level) / 2
    return NormalDist().inv_cdf(p) if df == math.inf else float(special.stdtrit(df, p))


def t_tail(t: float, df: float = math.inf) -> float:
    """Return the probability that Student's t exceeds t, precise in the tail."""
    return float(special.ndtr(-t) if df == math.inf else special.stdtr(df, -t))
