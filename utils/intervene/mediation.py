"""Effects along X -> Z -> Y from four worlds that were all run: total, through the latents, and past them.
numpy only.

Y(x, z) is an item's outcome with the prompt x and the latents forced to z at a declared site; Z(x) are the
latents that x itself brings about; x' is the contrast prompt (a blank image, say). Outcomes are continuous,
such as the log-probability of the gold answer in nats, or 0/1 (`binary`): shares of right answers. Every
function returns a plain dict ready for JSON; an effect is {"mean", "ci90", "ci95"}, the two intervals that
`utils.stats.verdict` takes. Definitions: Pearl 2001 (direct and indirect effects); Vig et al. 2020 apply them
to the parts of a language model.

How many items a claim needs, and what a number of items can show. The standard library only.

Discordance is the share of items whose answer changes either way, (b + c) / n; for a continuous outcome put
its variance (the square of the standard deviation of the differences) in its place and the margin in its
units. Items count as independent: groups of m items correlated by rho need 1 + (m - 1) rho times as many
(Kish 1965). Formulas by the normal approximation; the true effect is taken as 0.
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from utils.stats import group_sums, paired_interval, robust_mean, sign_flip

LEVELS = {"ci90": 0.90, "ci95": 0.95}
ROUNDING = 1e-9  # of the largest outcome of an item: sums of three doubles differ by far less


def mediate(y_xz: Sequence[float], y_xz0: Sequence[float], y_x0z: Sequence[float], y_x0z0: Sequence[float],
            groups: Sequence[Hashable], binary: bool = False, rho: float = 0.1, n_boot: int = 10000,
            seed: int = 0) -> dict:
    """Return the effects of one condition from its four worlds, one outcome an item in each.

    y_xz = Y(x, Z(x)) (clean), y_xz0 = Y(x, Z(x')), y_x0z = Y(x', Z(x)), y_x0z0 = Y(x', Z(x')).
    TE = y_xz - y_x0z0; NIE = y_xz - y_xz0 (necessity), NDE = y_xz0 - y_x0z0; NIE0 = y_x0z - y_x0z0
    (sufficiency), NDE1 = y_xz - y_x0z; interaction = NIE - NIE0. TE = NIE + NDE = NIE0 + NDE1 holds item by
    item, or ValueError says where it does not. Redundant paths show as NIE near 0 with NIE0 above it, paths
    that need each other the reverse: read both. ValueError too for outcomes that are not finite and for fewer
    than two groups.
    """
    worlds = _checked(groups, binary, y_xz=y_xz, y_xz0=y_xz0, y_x0z=y_x0z, y_x0z0=y_x0z0)
    xz, xz0, x0z, x0z0 = worlds.values()
    contrasts = {  # each a sum of differences plus - minus
        "TE": [(xz, x0z0)], "NIE": [(xz, xz0)], "NIE0": [(x0z, x0z0)], "NDE": [(xz0, x0z0)],
        "NDE1": [(xz, x0z)],
        "interaction": [(xz, xz0), (x0z0, x0z)]}
    per_item = {name: sum(plus - minus for plus, minus in pairs) for name, pairs in contrasts.items()}
    _assert_identities(per_item, np.max(np.abs(list(worlds.values())), axis=0), groups)
    effects = {name: _effect(pairs, groups, binary, n_boot, seed) for name, pairs in contrasts.items()}
    mediated = (per_item["NIE"] + per_item["NIE0"]) / 2
    return {"n": len(groups), "n_groups": len(set(groups)), "binary": binary, **effects,
            "proportion_mediated": proportion_mediated(mediated, per_item["TE"], groups, effects["TE"],
                                                       n_boot, seed),
            "at_most_share": {name: at_most_share(per_item[name], per_item["TE"], groups, effects[name],
                                                  effects["TE"], binary,
                                                  rho) for name in ("NIE", "NIE0")}}


def proportion_mediated(mediated: np.ndarray, total: np.ndarray, groups: Sequence[Hashable],
                        total_effect: dict,
                        n_boot: int = 10000, seed: int = 0) -> dict:
    """Return {"value", "ci95", "reason"}: mean mediated / mean total, whole groups drawn with replacement for
    both at once.

    None and a reason where the interval of the total effect includes 0: a ratio to nothing has no finite
    interval.
    """
    low, high = total_effect["ci95"]
    if low <= 0 <= high:
        return {"value": None, "ci95": None,
                "reason": f"the 95 % interval of TE, [{low:.4g}, {high:.4g}], includes 0"}
    (above, _), (below, _) = group_sums(mediated, groups), group_sums(total, groups)
    rng, shares = np.random.default_rng(seed), []
    for start in range(0, n_boot, 1000):  # in pieces: [n_boot, n_groups] need not fit in memory
        drawn = rng.integers(len(above), size=(min(1000, n_boot - start), len(above)))
        denominator = below[drawn].sum(axis=1)
        if not denominator.all():
            return {"value": None, "ci95": None,
                    "reason": "TE is 0 in a draw of the groups: too few groups for a ratio"}
        shares.append(above[drawn].sum(axis=1) / denominator)
    ends = np.quantile(np.concatenate(shares), [0.025, 0.975])
    return {"value": float(above.sum() / below.sum()), "ci95": ends.tolist(), "reason": None}


def at_most_share(indirect: np.ndarray, total: np.ndarray, groups: Sequence[Hashable], indirect_effect: dict,
                  total_effect: dict, binary: bool, rho: float = 0.1) -> dict:
    """Return whether Z carries at most a share rho of the effect, by L = indirect - rho * total and its upper
    95 % bound.

    {"rho", "mean", "upper95", "claimed", "reason"}. Claimed if upper95 < 0 and TE is above 0 by its interval;
    with TE at or below 0, L < 0 would say something else. 0/1 outcomes take the bound from the intervals of
    both effects, 2.5 % each, since the standard error of L is 0 when no answer changes. A negative indirect
    effect meets the claim too: see its interval.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho {rho}: expected a share between 0 and 1")
    mean, _, upper = robust_mean(indirect - rho * total, groups, 0.90)
    if binary:
        upper = indirect_effect["ci95"][1] - rho * total_effect["ci95"][0]
    low, high = total_effect["ci95"]
    reason = None if low > 0 else f"the 95 % interval of TE, [{low:.4g}, {high:.4g}], is not above 0"
    return {"rho": rho, "mean": mean, "upper95": upper, "claimed": upper < 0 and reason is None,
            "reason": reason}


def donor_lift(swapped: Sequence[int], own: Sequence[int], unrelated_swapped: Sequence[int],
               unrelated_own: Sequence[int],
               groups: Sequence[Hashable], n_perm: int = 10000, n_boot: int = 10000, seed: int = 0) -> dict:
    """Return {"lift", "unrelated", "difference"}: how much a donor's latents draw the answer to the donor's,
    each an effect.

    0/1 an item: `swapped`, the answer is the donor's with the donor's latents; `own`, it is so with the
    item's own latents; `unrelated_*`, the same for a donor that has nothing to do with the item. lift =
    swapped - own. The claim is "difference", lift minus the unrelated donor's, with the p of the sign-flip
    test.
    """
    worlds = _checked(groups, True, swapped=swapped, own=own, unrelated_swapped=unrelated_swapped,
                      unrelated_own=unrelated_own)
    swapped, own, unrelated_swapped, unrelated_own = worlds.values()
    pairs = [(swapped, own), (unrelated_own, unrelated_swapped)]
    difference = sum(plus - minus for plus, minus in pairs)
    return {"n": len(groups), "n_groups": len(set(groups)), "lift": _effect(pairs[:1], groups, True, n_boot,
                                                                            seed),
            "unrelated": _effect([(unrelated_swapped, unrelated_own)], groups, True, n_boot, seed),
            "difference": _effect(pairs, groups, True, n_boot, seed)
            | {"p": sign_flip(difference, groups, n_perm, seed)}}


def _effect(pairs: list[tuple[np.ndarray, np.ndarray]], groups: Sequence[Hashable], binary: bool, n_boot: int,
            seed: int) -> dict:
    """Return the effect of a sum of differences plus - minus.

    For 0/1 outcomes k differences of an item become k items of its group: their mean is 1 / k of the sum's,
    and the interval keeps a width when nothing changes.
    """
    k, result = len(pairs), {"mean": float(sum((plus - minus).mean() for plus, minus in pairs))}
    for name, level in LEVELS.items():
        if binary:
            plus, minus = (np.concatenate(side) for side in zip(*pairs))
            ends = [k * end for end in paired_interval(minus, plus, list(groups) * k, level, n_boot, seed)]
        else:
            ends = list(robust_mean(sum(plus - minus for plus, minus in pairs), groups, level)[1:])
        result[name] = ends
    return result


def _checked(groups: Sequence[Hashable], binary: bool, **worlds: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the worlds as arrays [n]; ValueError naming world and item for a missing, infinite or (if
    binary) odd outcome."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in worlds.items()}
    for name, values in arrays.items():
        if values.shape != (len(groups),) or not len(groups):
            raise ValueError(
                f"{name} has the shape {values.shape}: expected ({len(groups)},), one outcome for each item")
        fit = np.isin(values, (0, 1)) if binary else np.isfinite(values)
        if not fit.all():
            i = int(fit.argmin())
            raise ValueError(f"{name} of item {i} (group {groups[i]!r}) is {values[i]}: expected "
                             f"{'0 or 1' if binary else 'a finite number'}; leave the item out of all four worlds")
    return arrays


def _assert_identities(per_item: dict[str, np.ndarray], scale: np.ndarray,
                       groups: Sequence[Hashable]) -> None:
    """Raise ValueError naming the item at which TE = NIE + NDE = NIE0 + NDE1 does not hold (outcomes near
    overflow)."""
    for parts in (("NIE", "NDE"), ("NIE0", "NDE1")):
        gap = np.abs(per_item["TE"] - per_item[parts[0]] - per_item[parts[1]])
        broken = ~(gap <= ROUNDING * scale)  # a gap that is no number is broken too
        if broken.any():
            i = int(broken.argmax())
            found = " + ".join(f"{name} {per_item[name][i]}" for name in parts)
            raise ValueError(
                f"item {i} (group {groups[i]!r}): TE {per_item['TE'][i]} is not {found}; expected outcomes "
                             "far from the largest float")


# ------------------------------------------------------------ planner


ALPHA, POWER = 0.05, 0.8
Z = NormalDist().inv_cdf
Z_EQUIVALENCE = Z(1 - ALPHA) + Z((1 + POWER) / 2)  # of a pair of one-sided tests that are to reject together
Z_DIFFERENCE = Z(1 - ALPHA / 2) + Z(POWER)


def items_for_margin(discordance: float, margin: float) -> int:
    """Return the items at which equivalence within margin is shown with 80 % power if nothing changes on
    average.

    n = discordance * (z(1 - alpha) + z(1 - (1 - power) / 2))^2 / margin^2: both one-sided tests have to
    reject. Exact power of Tango's test at the planned n: 76 to 80 % where the margin is at most half the
    discordance, 67 % where they are equal, because a change as large as the margin would need that much
    discordance: plan with more items there.
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
    """Return the change that McNemar's test finds with 80 % power: (z(1 - alpha / 2) + z(power)) *
    sqrt(discordance / n).

    The variance is that of no change, which asks slightly too much. A change cannot exceed the discordance: a
    result above it says that n items cannot show any change at this discordance.
    """
    _check(discordance=discordance, n=n)
    return Z_DIFFERENCE * math.sqrt(discordance / n)


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} {number}: expected a finite number above 0")
