"""Effects along X -> Z -> Y from four worlds that were all run, retrieval, tests of scores, sizes of samples.

Y(x, z) is an item's outcome with the prompt x and the imagination forced to z; Z(x) is the imagination that x
brings about, x' the contrast prompt (a blank image). Definitions: Pearl 2001; Vig et al. 2020 apply them to
parts of a language model.
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from scipy import special

from utils.items import group_of
from utils.means import mean_and_error, robust_mean, t_quantile, t_tail
from utils.stats import (effective_groups, mean_ends, paired_ends, paired_interval, paired_readings,
                         share_interval)

# by site, the conditions that are Y(x, Z(x')) and Y(x', Z(x))
WORLDS = {"fed": ("swap_blank", "blank_x"), "slot": ("slot_swap_blank", "slot_blank_x"),
          "text": ("swap_blank", "blank_x")}
ALPHA, POWER = 0.05, 0.8
Z = NormalDist().inv_cdf
HALVINGS = 30  # far below the digits that are shown


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


def complete_items(names: Sequence[str], emitters: list[dict], records: dict[str, dict[str, dict]],
                   readout: str, min_groups: float) -> list[dict]:
    """Return the items on which all conditions could be run, none of them undone, and scored; [] below
    `min_groups` effective groups, or two."""
    complete = [item for item in emitters
                if all(has_readout(records[item["id"]].get(name), readout) for name in names)]
    enough = effective_groups(list(map(group_of, complete))) >= max(2, min_groups)
    return complete if enough else []


def mediation_at(site: str, emitters: list[dict], records: dict[str, dict[str, dict]], readout: str,
                 min_groups: float) -> dict | None:
    """Return the effects of `mediate` at a site against a blank image, over the `complete_items` of all four
    worlds, if any. The outcome is the log-probability of the right option ("r0") or whether the answer is
    right ("r2")."""
    worlds = ("clean", *WORLDS[site], "blank")
    complete = complete_items(worlds, emitters, records, readout, min_groups)

    def outcome(record: dict) -> float:
        return float(record["correct"]) if readout == "r2" else -record[readout]["nll"]

    outcomes = [[outcome(records[item["id"]][name]) for item in complete] for name in worlds]
    return mediate(*outcomes, list(map(group_of, complete)), binary=readout == "r2") if complete else None


def has_readout(record: dict | None, readout: str) -> bool:
    return (bool(record) and not record.get("reason") and not record.get("again")
            and (readout == "r2" or bool(record.get(readout))))


def contrast_effect(pairs: list[tuple[np.ndarray, np.ndarray]], groups: Sequence[Hashable],
                    binary: bool) -> dict:
    """Return the effect of a sum of differences plus - minus. For 0/1 outcomes the k differences of an item
    become k items of its group: the interval keeps its width when nothing changes."""
    mean = float(sum((plus - minus).mean() for plus, minus in pairs))
    if not binary:
        return {"mean": mean, **mean_ends(sum(plus - minus for plus, minus in pairs), groups)}
    k = len(pairs)
    plus, minus = (np.concatenate(side) for side in zip(*pairs))
    ends = paired_ends(paired_readings(minus, plus, list(groups) * k))
    return {"mean": mean, **{name: [k * end for end in pair] for name, pair in ends.items()}}


def proportion_mediated(mediated: np.ndarray, total: np.ndarray, groups: Sequence[Hashable],
                        total_ci95: Sequence[float]) -> dict:
    """Return {"value", "ci95", "reason"} of mean mediated / mean total, with Fieller's interval (1954). The
    value is None where the interval of the total effect is not above 0: nothing was gained that could be
    mediated.
    """
    low, high = total_ci95
    above, error_above, df = mean_and_error(mediated, groups)
    below, error_below, _ = mean_and_error(total, groups)
    plus, minus = (mean_and_error(mediated + sign * total, groups)[1] for sign in (1, -1))
    covariance, q = (plus**2 - minus**2) / 4, t_quantile(0.95, df) ** 2
    a = below**2 - q * error_below**2
    if low <= 0 or a <= 0:
        return {"value": None, "ci95": None,
                "reason": f"the 95 % interval of the total, [{low:.4g}, {high:.4g}], is not above 0"}
    b, c = above * below - q * covariance, above**2 - q * error_above**2
    root = math.sqrt(max(0.0, b * b - a * c))
    return {"value": above / below, "ci95": [(b - root) / a, (b + root) / a], "reason": None}


# ---- contrasts of two conditions
def markers_share(emitters: list[dict], records: dict[str, dict[str, dict]],
                  min_groups: float) -> dict | None:
    """Return the share of the accuracy gained by imagining that the markers alone keep, (markers_only -
    no_segment) / (clean - no_segment), as `proportion_mediated` with "n" (arXiv 2606.01287), over the
    `complete_items`, if any."""
    worlds = ("markers_only", "no_segment", "clean")
    complete = complete_items(worlds, emitters, records, "r2", min_groups)
    if not complete:
        return None
    groups = list(map(group_of, complete))
    markers, without, clean = (np.array([int(records[item["id"]][name]["correct"]) for item in complete])
                               for name in worlds)
    total = paired_interval(without, clean, groups, 0.95)
    return {"n": len(complete), **proportion_mediated(markers - without, clean - without, groups, total)}


def specific_effect(emitters: list[dict], records: dict[str, dict[str, dict]],
                    min_groups: float) -> dict | None:
    """Return how much more often answers follow a directed edit than an irrelevant one of that size, over
    the `complete_items` of both, if any."""
    complete = complete_items(("irrelevant", "directed"), emitters, records, "r2", min_groups)
    if not complete:
        return None
    n, of = len(complete), [records[item["id"]] for item in complete]
    before, after = ([int(by[name]["pred"] == by["directed"]["target"]) for by in of]
                     for name in ("irrelevant", "directed"))
    return {"n": n, "coverage": n / len(emitters), "directed": sum(after) / n, "irrelevant": sum(before) / n,
            "difference": (sum(after) - sum(before)) / n,
            "ci95": list(paired_interval(before, after, list(map(group_of, complete)), 0.95))}


def share_of(hits: Sequence[bool], groups: Sequence[Hashable]) -> dict:
    """Return how many hits there are, as a share with a 95 % interval that lets groups vary together."""
    k, n = sum(map(bool, hits)), len(hits)
    return {"k": k, "n": n, "share": k / n if n else None,
            "ci95": list(share_interval([int(hit) for hit in hits], groups)) if n else None}


# ---- retrieval
def retrieval(vectors: Sequence[Sequence[Sequence[float]]], groups: Sequence[Hashable]) -> dict | None:
    """Return how often an item's vector finds its own partner by cosine among those of the items of other
    groups, both sets centred (`vectors`: one pair per item): {"n", "r1", "r5" (the partner is the nearest, or
    one of five), "mrr" (mean of 1 / rank), "chance" (of r1)}; ties count half. None below two groups."""
    if len(set(groups)) < 2:
        return None
    own, partners = (np.asarray(side, dtype=float) for side in zip(*vectors))
    own, partners = (side - side.mean(0) for side in (own, partners))
    lengths = np.outer(np.linalg.norm(own, axis=1), np.linalg.norm(partners, axis=1))
    similar = own @ partners.T / np.where(lengths > 0, lengths, np.inf)
    others = np.array([[a != b for b in groups] for a in groups])
    above, ties = (others & (compared(similar, similar.diagonal()[:, None]))
                   for compared in (np.greater, np.equal))
    ranks = 1 + above.sum(1) + ties.sum(1) / 2
    shares = {f"r{k}": share_of(ranks <= k, groups) for k in (1, 5)}
    return {"n": len(ranks), **shares, "mrr": float((1 / ranks).mean()),
            "chance": float((1 / (1 + others.sum(1))).mean())}


# ---- tests of scores
def tost_mean(values: Sequence[float], groups: Sequence[Hashable], margin: float) -> float:
    """Return the p of "the mean is smaller than margin, both ways" (two one-sided t tests, cluster-robust).

    Below alpha exactly if `robust_mean` of level 1 - 2 alpha is inside (-margin, margin).
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"margin {margin}: expected a finite number above 0, in the units of the values")
    mean, error, df = mean_and_error(values, groups)
    slack = margin - abs(mean)  # the nearer of the two ends decides
    if error == 0:
        return 0.0 if slack > 0 else 1.0
    return t_tail(slack / error, df)


def t_test(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return the two-sided p of "the mean is 0", cluster-robust: below .05 exactly if the 95 % interval of
    `robust_mean` excludes 0."""
    mean, error, df = mean_and_error(values, groups)
    if error == 0:
        return 0.0 if mean else 1.0
    return 2 * t_tail(abs(mean) / error, df)


def upper_share(k: int, n: int, n_effective: float) -> float:
    """Return the upper 95 % bound (one-sided) of a share of k in n, exact for independent items (Clopper and
    Pearson 1934), with as many items as there are effective groups."""
    hits = k * n_effective / n
    return 1.0 if k == n else float(special.betaincinv(hits + 1, n_effective - hits, 0.95))


def share_test(k: int, n: int, n_effective: float, bound: float) -> float:
    """Return the p of "the share is below bound", one-sided: below .05 exactly if `upper_share` is."""
    hits = k * n_effective / n
    return 1.0 if k == n else float(special.betainc(n_effective - hits, hits + 1, 1 - bound))


def kl(clean: dict[str, float], other: dict[str, float]) -> float:
    """Return the Kullback-Leibler divergence in nats from `clean` to `other`, {letter: share}; at least 0."""
    return max(0.0, float(sum(special.rel_entr(p, max(other[name], 1e-300)) for name, p in clean.items())))


# ---- attention
def attention_by_layer(looks: Sequence[dict], groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "mass": {columns: [{"mean", "ci95"} per layer]}, "uniform": {columns: share}} of the
    items' `stem_attention`; None below two groups of items."""
    if len(set(groups)) < 2:
        return None
    mass = {}
    for name, layers in looks[0]["mass"].items():
        means = [robust_mean([look["mass"][name][n] for look in looks], groups, 0.95)
                 for n in range(len(layers))]
        mass[name] = [{"mean": mean, "ci95": ends} for mean, *ends in means]
    return {"n": len(looks), "mass": mass,
            "uniform": {name: sum(look["uniform"][name] for look in looks) / len(looks) for name in mass}}


# ---- sample sizes: normal approximations with a true effect of 0 and independent items. Discordance is the
# share of items whose answer changes either way, (b + c) / n
def items_needed(discordance: float, margin: float) -> int:
    """Return how many items show equivalence within the margin with 80 % power if the mean change is 0: both
    one-sided score tests have to reject. At least `items_with_no_change`."""
    z, b = margin, discordance / 2
    qb, qc = 2 * z - discordance, -b * z * (1 - z)  # as in `tango_z`, per item
    null = (math.sqrt(qb * qb - 8 * qc) - qb) / 2 + z * (1 - z)  # the variance where the change is the margin
    root = Z(1 - ALPHA) * math.sqrt(null) + Z((1 + POWER) / 2) * math.sqrt(discordance)
    return max(math.ceil((root / margin) ** 2), items_with_no_change(margin))


def margin_shown(discordance: float, n: float) -> float:
    """Return the smallest margin that n items can show: the inverse of `items_needed`."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if items_needed(discordance, middle) <= n else (middle, high)
    return high


def items_with_no_change(margin: float) -> int:
    """Return how many items Tango's score test needs even if no answer changes."""
    return math.floor(Z(1 - ALPHA) ** 2 * (1 - margin) / margin) + 1


def detectable_difference(discordance: float, n: float) -> float:
    """Return the change that McNemar's test detects with 80 % power, slightly overstated. A result above the
    discordance means that n items cannot show any change."""
    return (Z(1 - ALPHA / 2) + Z(POWER)) * math.sqrt(discordance / n)
