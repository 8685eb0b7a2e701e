"""How many items a claim needs, and what a number of items can show. The standard library only.

Discordance is the share of items whose answer changes either way, (b + c) / n; for a continuous outcome put its variance (the
square of the standard deviation of the differences) in its place and the margin in its units. Items count as independent:
groups of m items correlated by rho need 1 + (m - 1) rho times as many (Kish 1965). Formulas by the normal approximation; the
true effect is taken as 0.
"""
import math
from statistics import NormalDist

ALPHA, POWER = 0.05, 0.8
Z = NormalDist().inv_cdf
Z_EQUIVALENCE = Z(1 - ALPHA) + Z((1 + POWER) / 2)  # of a pair of one-sided tests that are to reject together
Z_DIFFERENCE = Z(1 - ALPHA / 2) + Z(POWER)


def items_for_margin(discordance: float, margin: float) -> int:
    """Return the items at which equivalence within margin is shown with 80 % power if nothing changes on average.

    n = discordance * (z(1 - alpha) + z(1 - (1 - power) / 2))^2 / margin^2: both one-sided tests have to reject. Exact power of
    Tango's test at the planned n: 76 to 80 % where the margin is at most half the discordance, 67 % where they are
    equal, because a change as large as the margin would need that much discordance: plan with more items there.
    """
    _check(discordance=discordance, margin=margin)
    return math.ceil(discordance * (Z_EQUIVALENCE / margin) ** 2)


def margin_for_items(discordance: float, n: float) -> float:
    """Return the smallest margin that n items can show: the inverse of `items_for_margin`."""
    _check(discordance=discordance, n=n)
    return Z_EQUIVALENCE * math.sqrt(discordance / n)


def items_with_no_change(margin: float) -> int:
    """Return the items needed even if not one answer changes, the most favourable data there are.

    By Tango's score test, n > z^2 (1 - margin) / margin.
    """
    _check(margin=margin)
    if margin >= 1:
        raise ValueError(f"margin {margin}: expected a share between 0 and 1")
    return math.floor(Z(1 - ALPHA) ** 2 * (1 - margin) / margin) + 1


def detectable_difference(discordance: float, n: float) -> float:
    """Return the change that McNemar's test finds with 80 % power: (z(1 - alpha / 2) + z(power)) * sqrt(discordance / n).

    The variance is that of no change, which asks slightly too much. A change cannot exceed the discordance: a result above it
    says that n items cannot show any change at this discordance.
    """
    _check(discordance=discordance, n=n)
    return Z_DIFFERENCE * math.sqrt(discordance / n)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} {number}: expected a finite number above 0")
