"""From records of clean and intervened runs to effects with intervals, equivalence tests and verdicts.

Effects are taken on the "emitters", the items that imagined something in their clean run, as far as the
condition applies to them. Readouts: R2 is the accuracy of the free reply (points); R0 and R1 are the negative
log-likelihood of the right option among the options (nats, `utils.option_scores`).

Verdicts: `settle`; docs/interventions.md says what each means. A mean that fewer items than --margin carry is
not excluded by "equivalent". The grouped interval of accuracy is wider than its test needs and may include 0.
"""
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from statistics import median
from typing import NamedTuple

from utils.intervene.mediation import (ALPHA, WORLDS, attention_by_layer, items_needed, kl, margin_shown,
                                       markers_share, mediation_at, retrieval, share_of, share_test,
                                       specific_effect, t_test, tost_mean, upper_share)
from utils.items import group_of
from utils.jsonl import DataError
from utils.means import RESOLUTION, robust_mean, sign_flip
from utils.stats import (effective_groups, holm, mcnemar_exact, mean_ends, paired_ends, paired_readings, tost,
                         verdict)

INSIDE = ("equivalent", "small effect inside the margin")
UNBOUNDED = "the mean is inside the margin, large changes are not excluded"
POSITIVE_CONTROL = "blank"  # the image greyed and all after it generated again: a readout has to show that
READOUTS = {"r2": "effect", "r0": "r0", "r1": "r1"}  # name -> part of an entry
OTHER_QUESTION = "another question or image was shown: the answers say nothing about this item's accuracy"


class Pair(NamedTuple):
    item: dict
    clean: dict
    after: dict


class Declared(NamedTuple):
    """A condition as it was declared before the run.

    `role`: "do(Z)"; "do(X)", on another prompt; "world", of the mediation; "control", which changes nothing;
    "positive control"; or "point" of a sweep. Each role is a family of Holm's correction, one per readout.
    """

    site: str
    role: str


@dataclass(frozen=True)
class Limits:
    """Equivalence margins (a share of items, nats) and the fewest effective groups of emitters."""

    margin: float
    margin_nll: float
    min_emitters: int


def groups_of(pairs: Sequence[Pair]) -> list[Hashable]:
    return [group_of(pair.item) for pair in pairs]


# ---- one condition
def records_of(pairs: list[Pair]) -> tuple[list[dict], list[dict]]:
    return [pair.clean for pair in pairs], [pair.after for pair in pairs]


def change_of_accuracy(pairs: list[Pair], n_all: int | None, margin: float) -> dict:
    """Return the effect on accuracy; `delta_all` is diluted to all `n_all` items (None: some were left out).
    """
    clean, after = ([int(record["correct"]) for record in side] for side in records_of(pairs))
    groups, n = groups_of(pairs), len(pairs)
    changes = [y - x for x, y in zip(clean, after)]
    b, c = changes.count(-1), changes.count(1)
    p, test = ((sign_flip(changes, groups), "sign flips of groups") if len(set(groups)) < n else
               (mcnemar_exact(b, c), "McNemar, exact"))
    readings, psi, n_effective = paired_readings(clean, after, groups), (b + c) / n, effective_groups(groups)
    ends = paired_ends(readings)
    return {"acc_clean": sum(clean) / n, "acc_int": sum(after) / n,
            "b": b, "c": c, "psi": psi, "delta": (c - b) / n, **ends,
            "delta_all": n_all and (c - b) / n_all, "p": p, "test": test,
            "tost_p": tost(readings, margin), "margin": margin, "verdict": verdict(**ends, margin=margin),
            "items_needed": ceil(items_needed(psi, margin) * n / n_effective),
            "margin_shown": margin_shown(psi, n_effective)}


def change_of_score(pairs: list[Pair], readout: str, limits: Limits) -> dict | None:
    """Return the effect on the right option's negative log-likelihood, in nats; None below min_emitters.

    "large" are the changes beyond the margin: a mean says nothing of a few large ones. A mean within
    RESOLUTION is no effect. DataError for a score that is not finite.
    """
    pairs = [pair for pair in pairs if pair.clean.get(readout) and pair.after.get(readout)]
    groups, n, margin = groups_of(pairs), len(pairs), limits.margin_nll
    if effective_groups(groups) < max(2, limits.min_emitters):
        return None
    clean, after = ([record[readout] for record in side] for side in records_of(pairs))
    golds = [pair.item["answer"]["value"] for pair in pairs]
    changes = [y["nll"] - x["nll"] for x, y in zip(clean, after)]
    if odd := [pair.item["id"] for pair, change in zip(pairs, changes) if not isfinite(change)]:
        raise DataError(f"item {odd[0]!r}: {readout.upper()} is not a finite number; check the checkpoint")
    divergence = [kl(x["pi"], y["pi"]) for x, y in zip(clean, after)]
    k, n_effective = sum(abs(change) > margin for change in changes), effective_groups(groups)
    tost_p = max(tost_mean(changes, groups, margin), share_test(k, n, n_effective, limits.margin))
    ends = mean_ends(changes, groups)
    said = verdict(**ends, margin=margin)
    if tost_p >= ALPHA and said in INSIDE:
        said = UNBOUNDED
    mean = robust_mean(changes, groups, 0.90)[0]
    return {"n": n, "n_effective": n_effective, "delta_nll": mean, **ends, "margin": margin, "tost_p": tost_p,
            "p": t_test(changes, groups) if abs(mean) > RESOLUTION else 1.0,
            "large": {"k": k, "n": n, "upper95": upper_share(k, n, n_effective)}, "verdict": said,
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
    sizes = {name: [record[name] for record in after if record.get(name) is not None]
             for name in ("rel_change", "reach")}
    return {**{name: sum(values) / len(pairs) for name, values in shares.items()},
            **{name: median(values) if values else None for name, values in sizes.items()}}


def describe_asked(pairs: list[Pair]) -> dict:
    """Return what became of the answer where another item was asked: the share of "same_answer", in words,
    and, where the asked item's gold answer holds, of "correct" by it, also among items right before."""
    resolved = [pair for pair in pairs if pair.after["same_answer"] is not None]
    holds = [pair for pair in pairs if pair.after["asked"]["gold_holds"]]
    right = [pair for pair in holds if pair.clean["correct"]]
    return {name: share_of([pair.after[field] for pair in of], groups_of(of)) for name, field, of in (
        ("same_answer", "same_answer", resolved), ("correct", "correct", holds),
        ("correct_flip", "correct", right))}


def effect_of(pairs: list[Pair], n_all: int, limits: Limits) -> dict:
    """Return {"effect", "r0", "r1", "asked", "again", "coverage", "reasons", "reason"} of one condition over
    all emitters; `n_all` items were run."""
    covered = [pair for pair in pairs if not pair.after.get("reason")]
    rest = [pair for pair in pairs if pair.after.get("reason")]
    groups = groups_of(covered)
    result = {"effect": None, "r0": None, "r1": None, "asked": None, "reason": None,
              "coverage": share_of([not pair.after.get("reason") for pair in pairs], groups_of(pairs)),
              "reasons": dict(Counter(pair.after["reason"] for pair in rest)),
              "acc_clean_not_covered": share_of([pair.clean["correct"] for pair in rest], groups_of(rest)),
              "again": {"k": sum(bool(pair.after.get("again")) for pair in covered), "n": len(covered)}}
    if (n_effective := effective_groups(groups)) < limits.min_emitters:
        return result | {"reason": f"{len(covered)} items in {n_effective:.1f} effective groups imagined "
                                   "something and could be intervened on, fewer than --min_emitters "
                                   f"{limits.min_emitters}"}
    if len(set(groups)) < 2:
        return result | {"reason": "all items are of one group, which says nothing about others"}
    if any(pair.after.get("asked") for pair in covered):
        result["asked"] = describe_asked(covered)
        if any(pair.after["asked"]["item"] != pair.item["id"] or not pair.after["asked"]["gold_holds"]
               for pair in covered):
            return result | {"reason": OTHER_QUESTION}
    if all(pair.after.get("target") for pair in covered):
        hits = {"follow": [pair.after["pred"] == pair.after["target"] for pair in covered],
                "follow_clean": [pair.clean["pred"] == pair.after["target"] for pair in covered],
                "resist": [pair.after["correct"] for pair in covered]}
        result |= {name: share_of(values, groups) for name, values in hits.items()}
    result["effect"] = {"n": len(covered), "n_groups": len(set(groups)), "n_effective": n_effective,
                        **change_of_accuracy(covered, None if rest else n_all, limits.margin),
                        **describe_pairs(covered)}
    return result | {name: change_of_score(covered, name, limits) for name in ("r0", "r1")}


# ---- verdicts
def settle(said: str, p: float, holm_p: float, is_undone: bool, is_sensitive: bool) -> str:
    """Return the verdict from one that looked at the intervals alone (`said`)."""
    if not is_sensitive:
        return "readout insensitive"
    if said in INSIDE:
        return "undone" if is_undone else INSIDE[holm_p <= ALPHA]
    if said == UNBOUNDED or p > ALPHA:
        return "inconclusive"
    return "effect" if holm_p <= ALPHA else "effect, not after Holm"


def sensitivity_of(control: dict | None) -> dict[str, dict]:
    """Return {"moves", "reason"} of each readout: whether the positive control makes it worse."""
    found = {}
    for readout, part in READOUTS.items():
        effect = control and control[part]
        if not effect:
            found[readout] = {"moves": False, "reason": f"the positive control ({POSITIVE_CONTROL}) was not "
                                                        "run, or on too few items"}
            continue
        if readout == "r2":
            worse, shown = effect["delta"] < 0, f"{100 * effect['delta']:+.1f} points"
        else:
            worse, shown = effect["delta_nll"] > 0, f"{effect['delta_nll']:+.3f} nats"
        moves = worse and effect["p"] <= ALPHA and effect["verdict"] not in (*INSIDE, UNBOUNDED)
        found[readout] = {"moves": moves, "reason": None if moves else
                          f"the positive control ({POSITIVE_CONTROL}) does not make it worse beyond the "
                          f"margin ({shown}, p {effect['p']:.3f})"}
    return found


def settle_all(conditions: dict[str, dict], sensitivity: dict[str, dict]) -> None:
    """Add Holm's p and put the final verdict in every entry of `conditions`, for each readout."""
    for readout, part in READOUTS.items():
        families = defaultdict(list)
        for entry in conditions.values():
            if entry[part]:
                families[entry["role"]].append(entry)
        for entries in families.values():
            for entry, holm_p in zip(entries, holm([entry[part]["p"] for entry in entries])):
                effect, moves = entry[part], sensitivity[readout]["moves"]
                effect |= {"holm_p": holm_p, "family": len(entries)}
                effect["verdict"] = settle(effect["verdict"], effect["p"], holm_p, entry["again"]["k"] > 0,
                                           moves or entry["role"] == "positive control")


# ---- all conditions
def summarize(items: list[dict], records: dict[str, dict[str, dict]], declared: dict[str, Declared],
              limits: Limits) -> dict:
    """Return emission, effects, mediation and attention. `records` by item id and condition."""
    read = [item for item in items if "error" not in records[item["id"]]["clean"]]
    clean = {item["id"]: records[item["id"]]["clean"] for item in read}
    emitters = [item for item in read if clean[item["id"]]["emitted"]]
    others = [item for item in read if not clean[item["id"]]["emitted"]]

    def share(chosen: list[dict], field: str) -> dict:
        return share_of([clean[item["id"]][field] for item in chosen], list(map(group_of, chosen)))

    segments = [segment for record in clean.values() for segment in record.get("segments", ())]
    pairs = {name: [Pair(item, clean[item["id"]], records[item["id"]][name]) for item in emitters]
             for name in declared}
    conditions = {name: {**condition._asdict(), **effect_of(pairs[name], len(read), limits)}
                  for name, condition in declared.items()}
    sensitivity = sensitivity_of(conditions.get(POSITIVE_CONTROL))
    settle_all(conditions, sensitivity)
    result = {"n": len(read), "errors": len(items) - len(read), "acc_clean_all": share(read, "correct"),
              "emission": share(read, "emitted"), "acc_clean_emitters": share(emitters, "correct"),
              "acc_clean_others": share(others, "correct"), "segments": len(segments),
              "closed_by": dict(Counter(segment["closed_by"] for segment in segments)),
              "sensitivity": sensitivity, "conditions": conditions, "specific": None,
              "markers_share": None, "mediation": {}, "attention": None, "retrieval": None}
    if effective_groups(list(map(group_of, emitters))) < limits.min_emitters:
        return result
    result["specific"] = specific_effect(emitters, records, limits.min_emitters)
    result["markers_share"] = markers_share(emitters, records, limits.min_emitters)
    is_text = any(condition.site == "text" for condition in declared.values())
    for site in ("text",) if is_text else ("fed", "slot"):
        if {*WORLDS[site], "blank"} <= set(declared):
            result["mediation"][site] = {
                readout: mediation_at(site, emitters, records, readout, limits.min_emitters)
                for readout in ("r0", "r2")}
    paired = {item["id"]: group_of(item) for item in emitters if clean[item["id"]].get("vectors")}
    result["retrieval"] = retrieval([clean[name]["vectors"] for name in paired], list(paired.values()))
    looking = [item for item in emitters if clean[item["id"]].get("attention")]
    result["attention"] = attention_by_layer([clean[item["id"]]["attention"] for item in looking],
                                             list(map(group_of, looking)))
    return result
