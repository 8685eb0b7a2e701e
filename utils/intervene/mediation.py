"""Effects along X -> Z -> Y from four worlds that were all run, and how many items a claim needs.

Y(x, z) is an item's outcome with the prompt x and the imagination forced to z; Z(x) is the imagination that x
brings about, x' the contrast prompt (a blank image). Definitions: Pearl 2001; Vig et al. 2020 apply them to
parts of a language model.

The sample sizes use normal approximations with a true effect of 0. Discordance is the share of items whose
answer changes either way, (b + c) / n. Items count as independent: groups of m items correlated by rho need 1
+ (m - 1) rho times as many (Kish 1965).
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from utils.items import group_of
from utils.means import mean_and_error, t_quantile
from utils.stats import Interval

# by site, the conditions that are Y(x, Z(x')) and Y(x', Z(x))
WORLDS = {"fed": ("swap_blank", "blank_x"), "slot": ("slot_swap_blank", "slot_blank_x"),
          "text": ("swap_blank", "blank_x")}
ALPHA, POWER = 0.05, 0.8
Z = NormalDist().inv_cdf
Z_EQUIVALENCE = Z(1 - ALPHA) + Z((1 + POWER) / 2)  # both of two one-sided tests have to reject
Z_DIFFERENCE = Z(1 - ALPHA / 2) + Z(POWER)


# ---- four worlds
def mediate(y_xz: Sequence[float], y_xz0: Sequence[float], y_x0z: Sequence[float], y_x0z0: Sequence[float],
            groups: Sequence[Hashable], binary: bool = False) -> dict:
    """Return {"mean", "ci90", "ci95"} of each effect, from one outcome per item in four worlds: y_xz = Y(x,
    Z(x)) (clean), y_xz0 = Y(x, Z(x')), y_x0z = Y(x', Z(x)), y_x0z0 = Y(x', Z(x')). TE = NIE + NDE = NIE0 +
    NDE1. Redundant paths show as NIE (necessity) near 0 and NIE0 (sufficiency) above it, paths that need each
    other as the reverse."""
    xz, xz0, x0z, x0z0 = (np.asarray(world, dtype=float) for world in (y_xz, y_xz0, y_x0z, y_x0z0))
    contrasts = {  # each a sum of differences plus - minus
        "TE": [(xz, x0z0)], "NIE": [(xz, xz0)], "NIE0": [(x0z, x0z0)], "NDE": [(xz0, x0z0)],
        "NDE1": [(xz, x0z)], "interaction": [(xz, xz0), (x0z0, x0z)]}
    effects = {name: contrast_effect(pairs, groups, binary) for name, pairs in contrasts.items()}
    mediated = ((xz - xz0) + (x0z - x0z0)) / 2
    share = proportion_mediated(mediated, xz - x0z0, groups, effects["TE"]["ci95"])
    return {"n": len(groups), "n_groups": len(set(groups)), "binary": binary, **effects,
            "proportion_mediated": share}


def mediation_at(site: str, emitters: list[dict], records: dict[str, dict[str, dict]],
                 readout: str) -> dict | None:
    """Return the effects of `mediate` at a site against a blank image, over the items that have all four
    worlds; None below two groups. The outcome is the log-probability of the right option ("r0") or whether
    the answer is right ("r2")."""
    worlds = ("clean", *WORLDS[site], "blank")
    complete = [item for item in emitters
                if all(has_readout(records[item["id"]].get(name), readout) for name in worlds)]
    groups = list(map(group_of, complete))
    if len(set(groups)) < 2:
        return None

    def outcome(record: dict) -> float:
        return float(record["correct"]) if readout == "r2" else -record[readout]["nll"]

    outcomes = [[outcome(records[item["id"]][name]) for item in complete] for name in worlds]
    return mediate(*outcomes, groups, binary=readout == "r2")


def has_readout(record: dict | None, readout: str) -> bool:
    return bool(record) and not record.get("reason") and (readout == "r2" or bool(record.get(readout)))


def contrast_effect(pairs: list[tuple[np.ndarray, np.ndarray]], groups: Sequence[Hashable],
                    binary: bool) -> dict:
    """Return the effect of a sum of differences plus - minus. For 0/1 outcomes the k differences of an item
    become k items of its group: the interval keeps its width when nothing changes."""
    mean = float(sum((plus - minus).mean() for plus, minus in pairs))
    if not binary:
        interval = Interval.of_mean(sum(plus - minus for plus, minus in pairs), groups)
        return {"mean": mean, "ci90": interval.ci90, "ci95": interval.ci95}
    k = len(pairs)
    plus, minus = (np.concatenate(side) for side in zip(*pairs))
    interval = Interval.paired(minus, plus, list(groups) * k)
    return {"mean": mean, "ci90": [k * end for end in interval.ci90],
            "ci95": [k * end for end in interval.ci95]}


def proportion_mediated(mediated: np.ndarray, total: np.ndarray, groups: Sequence[Hashable],
                        total_ci95: Sequence[float]) -> dict:
    """Return {"value", "ci95", "reason"} of mean mediated / mean total, with Fieller's interval (1954). The
    value is None where the interval of the total effect includes 0: a ratio to nothing has none.
    """
    low, high = total_ci95
    above, error_above, df = mean_and_error(mediated, groups)
    below, error_below, _ = mean_and_error(total, groups)
    plus, minus = (mean_and_error(mediated + sign * total, groups)[1] for sign in (1, -1))
    covariance, q = (plus**2 - minus**2) / 4, t_quantile(0.95, df) ** 2
    a = below**2 - q * error_below**2
    if low <= 0 <= high or a <= 0:
        return {"value": None, "ci95": None,
                "reason": f"the 95 % interval of TE, [{low:.4g}, {high:.4g}], includes 0"}
    b, c = above * below - q * covariance, above**2 - q * error_above**2
    root = math.sqrt(max(0.0, b * b - a * c))
    return {"value": above / below, "ci95": [(b - root) / a, (b + root) / a], "reason": None}


# ---- sample sizes
def items_for_margin(discordance: float, margin: float) -> int:
    """Return how many items show equivalence within the margin with 80 % power if the mean change is 0: both
    one-sided tests have to reject. The exact power of Tango's test is 76 to 80 % where the margin is at most
    half the discordance, 67 % where they are equal: plan with more items there."""
    return math.ceil(discordance * (Z_EQUIVALENCE / margin) ** 2)


def margin_for_items(discordance: float, n: float) -> float:
    """Return the smallest margin that n items can show: the inverse of `items_for_margin`."""
    return Z_EQUIVALENCE * math.sqrt(discordance / n)


def items_with_no_change(margin: float) -> int:
    """Return how many items Tango's score test needs even if no answer changes."""
    return math.floor(Z(1 - ALPHA) ** 2 * (1 - margin) / margin) + 1


def detectable_difference(discordance: float, n: float) -> float:
    """Return the change that McNemar's test detects with 80 % power, slightly overstated. A result above the
    discordance means that n items cannot show any change."""
    return Z_DIFFERENCE * math.sqrt(discordance / n)
