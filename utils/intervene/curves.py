"""Curves of a summary: early answering, and the attention of the answer's stem by layer."""
from collections.abc import Hashable, Sequence

from utils.stats import paired_interval, robust_mean

Curve = Sequence[tuple[float, float]]


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
    whose `records` hold the clean run and all truncations of `kept`, none of which the model filled in again.
    The mean of the items' areas is the area over the mean curve. None below two groups, or without a share of
    0 and another."""
    names = sorted(kept, key=kept.get)
    complete = [(by, group) for by, group in zip(records, groups)
                if all(by[name].get("r0") and not by[name].get("reason") and not by[name].get("again")
                       for name in ("clean", *names))]
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
