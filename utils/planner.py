"""How many items a claim needs, and what a number of items can show. The standard library only.

Discordance is the share of items whose answer changes either way, (b + c) / n; for a continuous outcome put its variance (the
square of the standard deviation of the differences) in its place and the margin in its units. Items count as independent: for
groups, divide the number of items by `design_effect`. Formulas by the normal approximation; the true effect is taken as 0.
"""
import math
from statistics import NormalDist

NORMAL = NormalDist()


def items_for_margin(discordance: float, margin: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the items at which equivalence within margin is shown with this power if nothing changes on average.

    n = discordance * (z(1 - alpha) + z(1 - (1 - power) / 2))^2 / margin^2: both one-sided tests have to reject. Exact power of
    Tango's test at the n planned for 80 %: 76 to 80 % where the margin is at most half the discordance, 67 % where they are
    equal, because a change as large as the margin would need that much discordance: plan with more items there.
    """
    _check(discordance=discordance, margin=margin)
    return math.ceil(discordance * (_equivalence_z(alpha, power) / margin) ** 2)


def margin_for_items(discordance: float, n: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest margin that n items can show: the inverse of `items_for_margin`."""
    _check(discordance=discordance, n=n)
    return _equivalence_z(alpha, power) * math.sqrt(discordance / n)


def items_with_no_change(margin: float, alpha: float = 0.05, exact: bool = False) -> int:
    """Return the items needed even if not one answer changes, the most favourable data there are.

    By Tango's score test n > z^2 (1 - margin) / margin; with exact, by the binomial bound on the share of answers that change,
    (1 - margin)^n <= alpha.
    """
    _check(margin=margin, alpha=alpha)
    if margin >= 1:
        raise ValueError(f"margin {margin}: expected a share between 0 and 1")
    z = _z(1 - alpha, "1 - alpha")
    return math.ceil(math.log(alpha) / math.log1p(-margin)) if exact else math.floor(z * z * (1 - margin) / margin) + 1


def detectable_difference(discordance: float, n: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the change that McNemar's test finds with this power: (z(1 - alpha / 2) + z(power)) * sqrt(discordance / n).

    The variance is that of no change, which asks slightly too much. A change cannot exceed the discordance: a result above it
    says that n items cannot show any change at this discordance.
    """
    _check(discordance=discordance, n=n)
    return (_z(1 - alpha / 2, "1 - alpha / 2") + _z(power, "power")) * math.sqrt(discordance / n)


def design_effect(group_size: float, rho: float) -> float:
    """Return 1 + (m - 1) rho: the factor on the variance of a mean over groups of m items correlated by rho (Kish 1965)."""
    if not group_size >= 1 or not -1 <= rho <= 1 or 1 + (group_size - 1) * rho <= 0:
        raise ValueError(f"group_size {group_size}, rho {rho}: expected at least 1, and a correlation that groups can have")
    return 1 + (group_size - 1) * rho


def _equivalence_z(alpha: float, power: float) -> float:
    """Return the sum of quantiles of a pair of one-sided tests that are to reject together at a true effect of 0."""
    return _z(1 - alpha, "1 - alpha") + _z((1 + power) / 2, "(1 + power) / 2")


def _z(p: float, name: str) -> float:
    if not 0.5 <= p < 1:
        raise ValueError(f"{name} {p}: expected a share from 0.5 to 1")
    return NORMAL.inv_cdf(p)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} {number}: expected a finite number above 0")
