"""From records of clean and intervened runs to effects with intervals, equivalence tests and verdicts.

Effects are taken on the "emitters", the items that imagined something in their clean run, as far as the
condition applies to them. Readouts: R2 is the accuracy of the free reply (points); R0 and R1 are the negative
log-likelihood of the right option among the options (nats, `utils.option_scores`).
"""
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from utils.intervene.mediation import items_for_margin, margin_for_items, mediate
from utils.items import group_of
from utils.means import sign_flip, tost_mean
from utils.option_scores import kl
from utils.report import swept
from utils.stats import (Interval, holm, mcnemar_exact, paired_interval, robust_mean, tost_tango, wilson)

# by site, the conditions that are Y(x, Z(x')) and Y(x', Z(x))
WORLDS = {"fed": ("swap_blank", "blank_x"), "slot": ("slot_swap_blank", "slot_blank_x"),
          "text": ("swap_blank", "blank_x")}
Curve = Sequence[tuple[float, float]]


class Pair(NamedTuple):

    item: dict
    clean: dict
    after: dict


@dataclass(frozen=True)
class Limits:
    """Equivalence margins (a share of items, nats) and the fewest emitters of an effect."""

    margin: float
    margin_nll: float
    min_emitters: int


def wilson_share(k: int, n: int) -> dict:
    """Return a count as a share with Wilson's 95 % interval."""
    return {"k": k, "n": n, "share": k / n if n else None, "ci95": list(wilson(k, n)) if n else None}


# ---- one condition
def records_of(pairs: list[Pair]) -> tuple[list[dict], list[dict]]:
    return [pair.clean for pair in pairs], [pair.after for pair in pairs]


def change_of_accuracy(pairs: list[Pair], n_all: int, margin: float) -> dict:
    """Return the effect on accuracy; `delta_all` is diluted to all items."""
    clean, after = ([int(record["correct"]) for record in side] for side in records_of(pairs))
    groups, n = [group_of(pair.item) for pair in pairs], len(pairs)
    changes = [y - x for x, y in zip(clean, after)]
    b, c = changes.count(-1), changes.count(1)
    if len(set(groups)) < n:
        p, test = sign_flip(changes, groups), "sign flips of groups"
    else:
        p, test = mcnemar_exact(b, c), "McNemar, exact"
    interval, psi = Interval.paired(clean, after, groups), (b + c) / n
    return {"acc_clean": sum(clean) / n, "acc_int": sum(after) / n, "b": b, "c": c, "psi": psi,
            "delta": (c - b) / n, "ci90": interval.ci90, "ci95": interval.ci95, "delta_all": (c - b) / n_all,
            "p": p, "test": test, "tost_p": tost_tango(b, c, n, margin), "margin": margin,
            "verdict": interval.verdict(margin),
            "items_needed": items_for_margin(psi, margin) if psi else None,
            "margin_shown": margin_for_items(psi, n) if psi else None}


def change_of_score(pairs: list[Pair], readout: str, margin: float) -> dict | None:
    """Return the effect on the right option's negative log-likelihood, in nats; None below two groups."""
    pairs = [pair for pair in pairs if pair.clean.get(readout) and pair.after.get(readout)]
    groups, n = [group_of(pair.item) for pair in pairs], len(pairs)
    if len(set(groups)) < 2:
        return None
    clean, after = ([record[readout] for record in side] for side in records_of(pairs))
    golds = [pair.item["answer"]["value"] for pair in pairs]
    changes = [y["nll"] - x["nll"] for x, y in zip(clean, after)]
    divergence = [kl(x["pi"], y["pi"]) for x, y in zip(clean, after)]
    interval = Interval.of_mean(changes, groups)
    return {"n": n, "delta_nll": robust_mean(changes, groups, 0.90)[0], "ci90": interval.ci90,
            "ci95": interval.ci95, "margin": margin, "tost_p": tost_mean(changes, groups, margin),
            "verdict": interval.verdict(margin),
            "kl": sum(divergence) / n, "kl_upper95": robust_mean(divergence, groups, 0.90)[2],
            "flips": sum(x["pred"] != y["pred"] for x, y in zip(clean, after)) / n,
            "acc_clean": sum(x["pred"] == gold for x, gold in zip(clean, golds)) / n,
            "acc_int": sum(y["pred"] == gold for y, gold in zip(after, golds)) / n}


def describe_pairs(pairs: list[Pair]) -> dict:
    """Return descriptive shares and medians."""
    clean, after = records_of(pairs)
    shares = {"changed": [bool(record.get("changed")) for record in after],
              "same_answer": [x["pred"] == y["pred"] for x, y in zip(clean, after)],
              "unresolved_clean": [record["pred"] is None for record in clean],
              "unresolved_int": [record["pred"] is None for record in after],
              "degenerate_clean": [record["degenerate"] for record in clean],
              "degenerate_int": [record["degenerate"] for record in after],
              "emitted_int": [record["emitted"] for record in after]}
    medians = {}
    for name in ("rel_change", "norm_ratio", "reach"):
        values = [record[name] for record in after if record.get(name) is not None]
        medians[name] = median(values) if values else None
    letters = {name: dict(Counter(str(record["pred"]) for record in side))
               for name, side in (("clean", clean), ("int", after))}
    return {**{name: sum(values) / len(pairs) for name, values in shares.items()}, **medians,
            "letters": letters}


def effect_of(pairs: list[Pair], n_all: int, limits: Limits) -> dict:
    """Return {"effect", "r0", "r1", "coverage", "reasons", "reason"} of one condition over all emitters."""
    covered = [pair for pair in pairs if not pair.after.get("reason")]
    rest = [pair for pair in pairs if pair.after.get("reason")]
    result = {"effect": None, "r0": None, "r1": None, "reason": None,
              "coverage": wilson_share(len(covered), len(pairs)),
              "reasons": dict(Counter(pair.after["reason"] for pair in rest)),
              "acc_clean_not_covered": wilson_share(sum(pair.clean["correct"] for pair in rest), len(rest))}
    if len(covered) < limits.min_emitters:
        return result | {"reason": f"{len(covered)} items imagined something and could be intervened on, "
                                   f"fewer than --min_emitters {limits.min_emitters}"}
    n_groups = len({group_of(pair.item) for pair in covered})
    if n_groups < 2:
        return result | {"reason": "all items are of one group, which says nothing about others"}
    if all(pair.after.get("target") for pair in covered):
        counts = {"follow": sum(pair.after["pred"] == pair.after["target"] for pair in covered),
                  "follow_clean": sum(pair.clean["pred"] == pair.after["target"] for pair in covered),
                  "resist": sum(pair.after["correct"] for pair in covered)}
        result |= {name: wilson_share(k, len(covered)) for name, k in counts.items()}
    result["effect"] = {"n": len(covered), "n_groups": n_groups,
                        **change_of_accuracy(covered, n_all, limits.margin), **describe_pairs(covered)}
    return result | {name: change_of_score(covered, name, limits.margin_nll) for name in ("r0", "r1")}


# ---- all conditions
def summarize(items: list[dict], records: dict[str, dict[str, dict]], sites: dict[str, str], limits: Limits,
              controls: Sequence[str] = (), kept: dict[str, float] | None = None) -> dict:
    """Return emission, effects, mediation, early answering and attention. `records` by item id and condition;
    `sites` by condition; `kept`: the share of the imagination that truncating conditions keep. Holm's family
    leaves out controls and points of sweeps."""
    read = [item for item in items if "error" not in records[item["id"]]["clean"]]
    clean = {item["id"]: records[item["id"]]["clean"] for item in read}
    emitters = [item for item in read if clean[item["id"]]["emitted"]]
    right = [record["correct"] for record in clean.values() if record["emitted"]]
    right_others = [record["correct"] for record in clean.values() if not record["emitted"]]
    segments = [segment for record in clean.values() for segment in record.get("segments", ())]
    conditions = {}
    for name, site in sites.items():
        pairs = [Pair(item, clean[item["id"]], records[item["id"]][name]) for item in emitters]
        conditions[name] = {"site": site, **effect_of(pairs, len(read), limits)}
    explored = {*controls, *swept(sites)}
    tested = [entry["effect"] for name, entry in conditions.items()
              if entry["effect"] and name not in explored]
    for effect, p in zip(tested, holm([effect["p"] for effect in tested]) if tested else []):
        effect["holm_p"] = p
    result = {"n": len(read), "errors": len(items) - len(read),
              "acc_clean_all": wilson_share(sum(right) + sum(right_others), len(read)),
              "emission": wilson_share(len(emitters), len(read)),
              "acc_clean_emitters": wilson_share(sum(right), len(right)),
              "acc_clean_others": wilson_share(sum(right_others), len(right_others)),
              "segments": len(segments),
              "closed_by": dict(Counter(segment["closed_by"] for segment in segments)),
              "conditions": conditions, "mediation": {}, "early_answering": None, "attention": None}
    if len(emitters) < limits.min_emitters:
        return result
    for site in ("text",) if "text" in sites.values() else ("fed", "slot"):
        if set(WORLDS[site]) <= set(sites):
            result["mediation"][site] = {readout: mediation_at(site, emitters, records, readout)
                                         for readout in ("r0", "r2")}
    result["early_answering"] = early_curve([records[item["id"]] for item in emitters], kept or {},
                                            list(map(group_of, emitters)))
    looking = [item for item in emitters if clean[item["id"]].get("attention")]
    result["attention"] = attention_by_layer([clean[item["id"]]["attention"] for item in looking],
                                             list(map(group_of, looking)))
    return result


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


# ---- curves
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
    whose `records` hold the clean run and all truncations of `kept`. The mean of the items' areas is the area
    over the mean curve. None below two groups, or without a share of 0 and another."""
    names = sorted(kept, key=kept.get)
    complete = [(by, group) for by, group in zip(records, groups)
                if all(by[name].get("r0") and not by[name].get("reason") for name in ("clean", *names))]
    groups = [group for _, group in complete]
    if len(names) < 2 or kept[names[0]] != 0 or len(set(groups)) < 2:
        return None
    result = {"n": len(complete)}
    for readout, answer in (("r2", lambda record: record["pred"]),
                            ("r0", lambda record: record["r0"]["pred"])):
        same = [[int(answer(by[name]) == answer(by["clean"])) for name in names] for by, _ in complete]
        areas = [early_answering([*((kept[name], y) for name, y in zip(names, row)), (1, 1)]) for row in same]
        mean, *ends = robust_mean(areas, groups, 0.95)
        points = []
        for name, column in zip(names, zip(*same)):
            change = paired_interval([1] * len(column), column, groups, 0.95)
            points.append({"kept": kept[name], "same": sum(column) / len(column),
                           "ci95": [min(1.0, max(0.0, 1 + end)) for end in change]})
        points.append({"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]})
        result[readout] = {"aoc": mean, "ci95": ends, "curve": points}
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
