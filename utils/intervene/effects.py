"""From records of clean and intervened runs to effects with intervals, equivalence tests and verdicts.

Effects are taken on the items that imagined something in their clean run ("emitters") and can be intervened
on; how many those are stands beside every number. Three readouts: R2 accuracy of the free reply (points), R0
and R1 the negative log-likelihood of the right option among the options (nats, `utils.option_scores`).

How early answers are settled, and where they look: curves over records of interventions. No torch here.
"""
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from utils.intervene.mediation import donor_lift, items_for_margin, margin_for_items, mediate
from utils.items import group_of
from utils.option_scores import kl
from utils.report import swept
from utils.stats import (holm, mcnemar_exact, paired_interval, robust_mean, sign_flip, tost_mean, tost_tango,
                         verdict, wilson)

Pair = tuple[dict, dict, dict]  # item, its clean record, its record under the condition
# by site, the conditions that are Y(x, Z(x')) and Y(x', Z(x))
WORLDS = {"fed": ("swap_blank", "blank_x"), "slot": ("slot_swap_blank", "slot_blank_x"),
          "text": ("swap_blank", "blank_x")}


def share(k: int, n: int) -> dict:
    """Return a count as a share with Wilson's 95 % interval (null for none)."""
    return {"k": k, "n": n, "share": k / n if n else None, "ci95": list(wilson(k, n)) if n else None}


def change_of_accuracy(pairs: list[Pair], n_all: int, margin: float) -> dict:
    """Return the effect on accuracy of right answers; `delta_all` is diluted to all items, emitters or not.
    """
    clean, after = ([int(pair[side]["correct"]) for pair in pairs] for side in (1, 2))
    groups, n = [group_of(item) for item, *_ in pairs], len(pairs)
    b, c = (sum(x - y == sign for x, y in zip(clean, after)) for sign in (1, -1))
    intervals = {name: list(paired_interval(clean, after, groups, level)) for name,
                 level in (("ci90", 0.90), ("ci95", 0.95))}
    grouped = len(set(groups)) < n
    changes = [y - x for x, y in zip(clean, after)]
    return {"acc_clean": sum(clean) / n, "acc_int": sum(after) / n, "b": b, "c": c, "psi": (b + c) / n,
            "delta": (c - b) / n,
            **intervals, "delta_all": (c - b) / n_all, "p": sign_flip(changes, groups) if grouped
            else mcnemar_exact(b, c),
            "test": "sign flips of groups" if grouped else "McNemar, exact",
            "tost_p": tost_tango(b, c, n, margin),
            "margin": margin, "verdict": verdict(intervals["ci90"], intervals["ci95"], margin),
            "items_needed": items_for_margin((b + c) / n, margin) if b + c else None,
            "margin_shown": margin_for_items((b + c) / n, n) if b + c else None}


def change_of_score(pairs: list[Pair], readout: str, margin: float) -> dict | None:
    """Return the effect on a scored readout, in nats of the right option's negative log-likelihood; None
    below two items."""
    pairs = [pair for pair in pairs if pair[1].get(readout) and pair[2].get(readout)]
    groups = [group_of(item) for item, *_ in pairs]
    if len(set(groups)) < 2:
        return None
    changes = [after[readout]["nll"] - clean[readout]["nll"] for _, clean, after in pairs]
    mean, *ci90 = robust_mean(changes, groups, 0.90)
    ci95 = list(robust_mean(changes, groups, 0.95)[1:])
    divergence = [kl(clean[readout]["pi"], after[readout]["pi"]) for _, clean, after in pairs]
    golds = [item["answer"]["value"] for item, *_ in pairs]
    return {"n": len(pairs), "delta_nll": mean, "ci90": ci90, "ci95": ci95, "margin": margin,
            "tost_p": tost_mean(changes, groups, margin), "verdict": verdict(ci90, ci95, margin),
            "kl": sum(divergence) / len(divergence), "kl_upper95": robust_mean(divergence, groups, 0.90)[2],
            "flips": sum(clean[readout]["pred"] != after[readout]["pred"] for _, clean, after in pairs)
            / len(pairs),
            "acc_clean": sum(pair[1][readout]["pred"] == gold for pair, gold in zip(pairs, golds))
            / len(pairs),
            "acc_int": sum(pair[2][readout]["pred"] == gold for pair, gold in zip(pairs, golds)) / len(pairs)}


def describe_pairs(pairs: list[Pair]) -> dict:
    """Return shares that no verdict rests on, to be read beside it."""
    n = len(pairs)
    shares = {"changed": [bool(after.get("changed")) for *_, after in pairs],
              "same_answer": [clean["pred"] == after["pred"] for _, clean, after in pairs],
              "unresolved_clean": [clean["pred"] is None for _, clean, _ in pairs],
              "unresolved_int": [after["pred"] is None for *_, after in pairs],
              "degenerate_clean": [clean["degenerate"] for _, clean, _ in pairs],
              "degenerate_int": [after["degenerate"] for *_, after in pairs],
              "emitted_int": [after["emitted"] for *_, after in pairs]}
    middle = {name: sorted(values)[len(values) // 2] if values else None for name in ("rel_change",
                                                                                      "norm_ratio", "reach")
              for values in [[after[name] for *_, after in pairs if after.get(name) is not None]]}
    letters = {side: dict(Counter(str(pair[k]["pred"]) for pair in pairs)) for k,
               side in ((1, "clean"), (2, "int"))}
    return {**{name: sum(values) / n for name, values in shares.items()}, **middle, "letters": letters}


def effect_of(name: str, pairs: list[Pair], n_all: int, min_emitters: int, margin: float,
              margin_nll: float) -> dict:
    """Return {"effect", "r0", "r1", "coverage", "reasons", "reason"} of one condition over all emitters'
    pairs."""
    covered = [pair for pair in pairs if not pair[2].get("reason")]
    reasons = dict(Counter(after["reason"] for *_, after in pairs if after.get("reason")))
    rest = [clean for _, clean, after in pairs if after.get("reason")]
    result = {"effect": None, "r0": None, "r1": None, "reason": None, "coverage": share(len(covered),
                                                                                        len(pairs)),
              "reasons": reasons, "acc_clean_not_covered": share(sum(clean["correct"] for clean in rest),
                                                                 len(rest))}
    if len(covered) < min_emitters:
        return result | {
            "reason": f"{len(covered)} items imagined something and could be intervened on, fewer than "
                                   f"--min_emitters {min_emitters}"}
    if len({group_of(item) for item, *_ in covered}) < 2:
        return result | {"reason": "all items are of one group, which tells nothing about others"}
    targets = [after["target"] for *_, after in covered if after.get("target")]
    if len(targets) == len(covered):
        follows = [after["pred"] == after["target"] for *_, after in covered]
        before = [clean["pred"] == after["target"] for _, clean, after in covered]
        result |= {"follow": share(sum(follows), len(follows)), "follow_clean": share(sum(before),
                                                                                      len(before)),
                   "resist": share(sum(after["correct"] for *_, after in covered), len(covered))}
    return result | {"effect": {"n": len(covered), "n_groups": len({group_of(item) for item, *_ in covered}),
                                **change_of_accuracy(covered, n_all, margin), **describe_pairs(covered)},
                     "r0": change_of_score(covered, "r0", margin_nll), "r1": change_of_score(covered, "r1",
                                                                                             margin_nll)}


def mediation(site: str, emitters: list[dict], records: dict[str, dict[str, dict]], readout: str,
              rho: float) -> dict | None:
    """Return TE, NIE, NIE0, NDE and their relatives at a site (log-probability of the right option, or right
    answers).

    The contrast x' is a blank image. None where a world was not run; items that lack one are left out of all.
    """
    if site not in WORLDS:
        return None
    names = ("clean", WORLDS[site][0], WORLDS[site][1], "blank")
    whole = [item for item in emitters if all(name in records[item["id"]] and has(records[item["id"]][name],
                                                                                  readout)
                                              for name in names)]
    if len({group_of(item) for item in whole}) < 2:
        return None
    value: Callable[[dict], float] = (lambda record: float(record["correct"])) if readout == "r2" else (
        lambda record: -record[readout]["nll"])
    worlds = [[value(records[item["id"]][name]) for item in whole] for name in names]
    return mediate(*worlds, [group_of(item) for item in whole], binary=readout == "r2", rho=rho)


def has(record: dict, readout: str) -> bool:
    return not record.get("reason") and (readout == "r2" or bool(record.get(readout)))


def lifts(emitters: list[dict], records: dict[str, dict[str, dict]], readout: str) -> dict | None:
    """Return, for each site, how much a counterfactual donor's latents draw the answer to the donor's, minus
    what an unrelated donor's do; None where the swaps were not run."""
    result = {}
    for site, names in (("fed", ("swap_counterfactual", "swap_random")),
                        ("slot", ("slot_swap_counterfactual", "slot_swap_random"))):
        whole = [item for item in emitters if all(
            name in records[item["id"]] and has(records[item["id"]][name], readout)
            and records[item["id"]][name].get("donor")
            for name in names) and has(records[item["id"]]["clean"], readout)]
        if len({group_of(item) for item in whole}) < 2:
            continue
        arms = []
        for name in names:
            golds = [records[item["id"]][name]["donor"]["gold"] for item in whole]
            arms += [[int(answer(records[item["id"]][which], readout) == gold) for item,
                      gold in zip(whole, golds)]
                     for which in (name, "clean")]
        result[site] = donor_lift(*arms, [group_of(item) for item in whole])
    return result or None


def answer(record: dict, readout: str) -> str | None:
    return record["pred"] if readout == "r2" else record[readout]["pred"]


def summarize(items: list[dict], records: dict[str, dict[str, dict]], names: list[str], sites: dict[str, str],
              controls: set[str], margin: float, margin_nll: float, min_emitters: int, rho: float = 0.1,
              kept: dict[str, float] = {}) -> dict:
    """Return emission, the effect of every condition, mediation, donors' lifts, early answering and
    attention.

    `records` by item id and condition; `kept` the share of the imagination that truncating conditions keep.
    Holm's family is the conditions that are neither controls nor points of a sweep, which is explored rather
    than tested.
    """
    whole = [item for item in items if "error" not in records[item["id"]]["clean"]]
    clean = {item["id"]: records[item["id"]]["clean"] for item in whole}
    emitters = [item for item in whole if clean[item["id"]]["emitted"]]
    right = {emitted: [r["correct"] for r in clean.values() if r["emitted"] is emitted]
             for emitted in (True, False)}
    segments = [s for record in clean.values() for s in record.get("segments", ())]
    conditions = {}
    for name in names:
        pairs = [(item, clean[item["id"]], records[item["id"]][name]) for item in emitters]
        conditions[name] = {"site": sites[name], **effect_of(name, pairs, len(whole), min_emitters, margin,
                                                             margin_nll)}
    tested = [entry["effect"] for name, entry in conditions.items() if entry["effect"]
              and name not in controls | swept(names)]
    for effect, p in zip(tested, holm([effect["p"] for effect in tested]) if tested else []):
        effect["holm_p"] = p
    enough = len(emitters) >= min_emitters
    looking = [item for item in emitters if clean[item["id"]].get("attention")]
    return {"n": len(whole), "errors": len(items) - len(whole),
            "acc_clean_all": share(sum(right[True]) + sum(right[False]), len(whole)),
            "emission": share(len(emitters), len(whole)), "acc_clean_emitters": share(sum(right[True]),
                                                                                      len(right[True])),
            "acc_clean_others": share(sum(right[False]), len(right[False])),
            "segments": len(segments), "closed_by": dict(Counter(s["closed_by"] for s in segments)),
            "conditions": conditions,
            "mediation": {site: {readout: mediation(site, emitters, records, readout, rho)
                                 for readout in ("r0", "r2")}
                          for site in (("text",) if "text" in sites.values() else ("fed", "slot"))
                          if set(WORLDS[site]) <= set(names)} if enough else {},
            "donor_lift": {readout: lifts(emitters, records, readout) for readout in ("r0", "r2")} if enough
            else {},
            "early_answering": early_curve([records[item["id"]] for item in emitters], kept,
                                           list(map(group_of, emitters)))
            if enough else None,
            "attention": attention_by_layer([clean[item["id"]]["attention"] for item in looking],
                                            list(map(group_of, looking)))
            if enough else None}


# ------------------------------------------------------------ measures


Curve = Sequence[tuple[float, float]]


def early_answering(curve: Curve) -> float:
    """Return the area over the early-answering curve (AOC), 0 to 1, by the trapezoidal rule.

    `curve` holds (share of the imagination kept, share of answers that are those of the whole reply), from a
    share of 0 to one of 1, where it is 1 by definition. 0: the answer never depends on the imagination; the
    larger, the later it is settled (early answering of Lanham et al. 2023, arXiv:2307.13702). ValueError for
    a curve that does not span 0 to 1 in rising steps, or leaves [0, 1].
    """
    kept = [x for x, _ in curve]
    if len(kept) < 2 or kept[0] != 0 or kept[-1] != 1 or any(a >= b for a, b in zip(kept, kept[1:])):
        raise ValueError(f"curve over the shares {kept}, expected rising shares from 0 to 1")
    if any(not 0 <= y <= 1 for _, y in curve):
        raise ValueError(f"curve {list(curve)}, expected shares of answers within 0 and 1")
    return 1 - sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(curve, curve[1:]))


def early_curve(records: Sequence[dict[str, dict]], kept: dict[str, float],
                groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "r2": {"aoc", "ci95", "curve": [{"kept", "same", "ci95"}]}, "r0": the same} over samples.

    `records` hold each sample's clean record and those of the truncating conditions of `kept` (the share of
    the imagination that each keeps, from 0 on); samples that lack one are left out. The mean over samples of
    their own areas is that of the mean curve, as all are over the same shares. None for fewer than two
    groups, or without a share of 0 and another.
    """
    names = sorted(kept, key=kept.get)
    whole = [(by, group) for by, group in zip(records, groups) if all(
        by[name].get("r0") and not by[name].get("reason") for name in ("clean", *names))]
    if len(names) < 2 or kept[names[0]] != 0 or len({group for _, group in whole}) < 2:
        return None
    groups, found = [group for _, group in whole], {"n": len(whole)}
    for readout, answer in (("r2", lambda record: record["pred"]),
                            ("r0", lambda record: record["r0"]["pred"])):
        same = [[float(answer(by[name]) == answer(by["clean"])) for name in names] for by, _ in whole]
        areas = [early_answering([*((kept[name], y) for name, y in zip(names, row)), (1, 1)]) for row in same]
        mean, *ends = robust_mean(areas, groups, 0.95)
        curve = [(kept[name], [int(row[j]) for row in same]) for j, name in enumerate(names)]
        found[readout] = {"aoc": mean, "ci95": ends, "curve": [
            *({"kept": x, "same": sum(ys) / len(ys),
               "ci95": [min(1.0, max(0.0, 1 + end)) for end in paired_interval(
                [1] * len(ys), ys, groups, 0.95)]} for x, ys in curve),
                {"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]}]}
    return found


def attention_by_layer(looks: Sequence[dict], groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "mass": {group of columns: [{"mean", "ci95"} a layer]}, "uniform": {group of columns:
    share}} of what `utils.intervene.latent_batch.stem_attention` found for each sample; None for fewer than
    two groups of samples."""
    if len(set(groups)) < 2:
        return None
    mass = {name: [robust_mean([look["mass"][name][layer] for look in looks], groups, 0.95)
                   for layer in range(len(looks[0]["mass"][name]))] for name in looks[0]["mass"]}
    return {"n": len(looks),
            "mass": {name: [{"mean": mean, "ci95": ends} for mean, *ends in layers] for name,
                     layers in mass.items()},
            "uniform": {name: sum(look["uniform"][name] for look in looks) / len(looks) for name in mass}}
