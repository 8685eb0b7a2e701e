"""How early answers are settled, and where they look: curves over records of interventions. No torch here."""
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from utils.stats import paired_interval, robust_mean

Curve = Sequence[tuple[float, float]]


def early_answering(curve: Curve) -> float:
    """Return the area over the early-answering curve (AOC), 0 to 1, by the trapezoidal rule.

    `curve` holds (share of the imagination kept, share of answers that are those of the whole reply), from a share of 0 to
    one of 1, where it is 1 by definition. 0: the answer never depends on the imagination; the larger, the later it is
    settled (early answering of Lanham et al. 2023, arXiv:2307.13702). ValueError for a curve that does not span 0 to 1 in
    rising steps, or leaves [0, 1].
    """
    kept = [x for x, _ in curve]
    if len(kept) < 2 or kept[0] != 0 or kept[-1] != 1 or any(a >= b for a, b in zip(kept, kept[1:])):
        raise ValueError(f"curve over the shares {kept}, expected rising shares from 0 to 1")
    if any(not 0 <= y <= 1 for _, y in curve):
        raise ValueError(f"curve {list(curve)}, expected shares of answers within 0 and 1")
    return 1 - sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(curve, curve[1:]))


def early_curve(records: Sequence[dict[str, dict]], kept: dict[str, float], groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "r2": {"aoc", "ci95", "curve": [{"kept", "same", "ci95"}]}, "r0": the same} over samples.

    `records` hold each sample's clean record and those of the truncating conditions of `kept` (the share of the imagination
    that each keeps, from 0 on); samples that lack one are left out. The mean over samples of their own areas is that of the
    mean curve, as all are over the same shares. None for fewer than two groups, or without a share of 0 and another.
    """
    names = sorted(kept, key=kept.get)
    whole = [(by, group) for by, group in zip(records, groups) if all(
        by[name].get("r0") and not by[name].get("reason") for name in ("clean", *names))]
    if len(names) < 2 or kept[names[0]] != 0 or len({group for _, group in whole}) < 2:
        return None
    groups, found = [group for _, group in whole], {"n": len(whole)}
    for readout, answer in (("r2", lambda record: record["pred"]), ("r0", lambda record: record["r0"]["pred"])):
        same = [[float(answer(by[name]) == answer(by["clean"])) for name in names] for by, _ in whole]
        areas = [early_answering([*((kept[name], y) for name, y in zip(names, row)), (1, 1)]) for row in same]
        mean, *ends = robust_mean(areas, groups, 0.95)
        curve = [(kept[name], [int(row[j]) for row in same]) for j, name in enumerate(names)]
        found[readout] = {"aoc": mean, "ci95": ends, "curve": [
            *({"kept": x, "same": sum(ys) / len(ys), "ci95": [min(1.0, max(0.0, 1 + end)) for end in paired_interval(
                [1] * len(ys), ys, groups, 0.95)]} for x, ys in curve), {"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]}]}
    return found


def attention_by_layer(looks: Sequence[dict], groups: Sequence[Hashable]) -> dict | None:
    """Return {"n", "mass": {group of columns: [{"mean", "ci95"} a layer]}, "uniform": {group of columns: share}} of what
    `utils.attention.stem_attention` found for each sample; None for fewer than two groups of samples."""
    if len(set(groups)) < 2:
        return None
    mass = {name: [robust_mean([look["mass"][name][layer] for look in looks], groups, 0.95)
                   for layer in range(len(looks[0]["mass"][name]))] for name in looks[0]["mass"]}
    return {"n": len(looks),
            "mass": {name: [{"mean": mean, "ci95": ends} for mean, *ends in layers] for name, layers in mass.items()},
            "uniform": {name: sum(look["uniform"][name] for look in looks) / len(looks) for name in mass}}


def swept(names: Iterable[str]) -> set[str]:
    """Return the conditions that stand there with several numbers (`mix:0.25 mix:0.5`): points of a curve or of a map."""
    names = list(names)
    counts = Counter(name.partition(":")[0] for name in names if ":" in name)
    return {name for name in names if ":" in name and counts[name.partition(":")[0]] > 1}
