"""Effects along X -> Z -> Y from four worlds that were all run, curves of a run, and sizes of samples.

Y(x, z) is an item's outcome with the prompt x and the imagination forced to z; Z(x) is the imagination that x
brings about, x' the contrast prompt (a blank image). Definitions: Pearl 2001; Vig et al. 2020 apply them to
parts of a language model.
"""
import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from utils.items import group_of
from utils.means import mean_and_error, t_quantile
from utils.stats import (Interval, effective_groups, paired_interval, paired_readings, robust_mean,
                         share_interval)

# by site, the conditions that are Y(x, Z(x')) and Y(x', Z(x))
WORLDS = {"fed": ("swap_blank", "blank_x"), "slot": ("slot_swap_blank", "slot_blank_x"),
          "text": ("swap_blank", "blank_x")}
Curve = Sequence[tuple[float, float]]
ALPHA, POWER = 0.05, 0.8
Z = NormalDist().inv_cdf
Z_DIFFERENCE = Z(1 - ALPHA / 2) + Z(POWER)
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
        interval = Interval.of_mean(sum(plus - minus for plus, minus in pairs), groups)
        return {"mean": mean, "ci90": interval.ci90, "ci95": interval.ci95}
    k = len(pairs)
    plus, minus = (np.concatenate(side) for side in zip(*pairs))
    interval = Interval.paired(paired_readings(minus, plus, list(groups) * k))
    return {"mean": mean, "ci90": [k * end for end in interval.ci90],
            "ci95": [k * end for end in interval.ci95]}


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


# ---- curves
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


def early_answering(curve: Curve) -> float:
    """Return the area over the early-answering curve (AOC), 0 to 1, by the trapezoidal rule (Lanham et al.
    2023, arXiv:2307.13702). `curve` holds (share of the imagination kept, share of answers equal to the whole
    reply's) from share 0 to 1. At an area of 0 the answer never depends on the imagination; ValueError for a
    curve that does not rise from 0 to 1 or leaves [0, 1]."""
    kept = [x for x, _ in curve]
    if len(kept) < 2 or kept[0] != 0 or kept[-1] != 1 or any(a >= b for a, b in zip(kept, kept[1:])):
        raise ValueError(f"curve over the shares {kept}, expected rising shares from 0 to 1")
    if any(not 0 <= y <= 1 for _, y in curve):
        raise ValueError(f"curve {list(curve)}, expected shares of answers within 0 and 1")
    return 1 - sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(curve, curve[1:]))


def early_curve(records: Sequence[dict[str, dict]], kept: dict[str, float],
                groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "r2": {"aoc", "ci95", "curve": [{"kept", "same", "ci95"}]}, "r0": the same} over the items
    whose `records` hold the clean run and all truncations of `kept`, none of which the model filled in again,
    and a clean answer. The mean of the items' areas is the area over the mean curve. None below two groups,
    or without a share of 0 and another."""
    names = sorted(kept, key=kept.get)
    complete = [(by, group) for by, group in zip(records, groups)
                if all(has_readout(by[name], "r0") for name in ("clean", *names))
                and by["clean"]["pred"] is not None]
    groups = [group for _, group in complete]
    if len(names) < 2 or kept[names[0]] != 0 or len(set(groups)) < 2:
        return None
    result = {"n": len(complete)}
    for readout, answer in (("r2", lambda record: record["pred"]),
                            ("r0", lambda record: record["r0"]["pred"])):
        same = [[int(answer(by[name]) == answer(by["clean"])) for name in names] for by, _ in complete]
        areas = [early_answering([*((kept[name], y) for name, y in zip(names, row)), (1, 1)]) for row in same]
        mean, low, high = robust_mean(areas, groups, 0.95)
        points = []
        for name, column in zip(names, zip(*same)):
            change = paired_interval([1] * len(column), column, groups, 0.95)
            points.append({"kept": kept[name], "same": sum(column) / len(column),
                           "ci95": [min(1.0, max(0.0, 1 + end)) for end in change]})
        points.append({"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]})
        # a mean of equal areas has no width of its own: at least that of the points
        far = [early_answering([(point["kept"], point["ci95"][end]) for point in points]) for end in (1, 0)]
        result[readout] = {"aoc": mean, "ci95": [min(low, far[0]), max(high, far[1])], "curve": points}
    return result


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
    return Z_DIFFERENCE * math.sqrt(discordance / n)
