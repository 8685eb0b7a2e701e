"""Scores of the benchmarks as they are published: plain formulas over right and wrong answers.

Shares are fractions from 0 to 1, percentages are named so. Nothing here answers for an empty sample: that is a ValueError.
"""
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

ROTATIONS = 4  # orders in which HR-Bench shows the options of a question (its column cycle_category, 0 to 3)


def micro(parts: Mapping[str, Sequence[bool]]) -> float:
    """Return the share of right answers over all items: V*, BLINK and MME-RealWorld-Lite at every level."""
    hits = [bool(hit) for part in parts.values() for hit in part]
    return _mean(hits, "micro")


def macro(parts: Mapping[str, Sequence[bool]]) -> float:
    """Return the mean of the parts' shares, each part weighted alike.

    The paper's TableVQABench overall is this over VWTQ, VWTQ-Syn and VTabFact (64.8 and 70.7 in its table), while the
    benchmark's own script weights by items (naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py): give both.
    """
    return _mean([_mean(part, name) for name, part in parts.items()], "macro")


def chance(n_options: Sequence[int]) -> float:
    """Return the share that blind guessing gets: the mean over items of one in the number of options (36.0 % on V*)."""
    if any(n < 1 for n in n_options):
        raise ValueError(f"chance: an item with {min(n_options)} options, expected at least 1")
    return _mean([1 / n for n in n_options], "chance")


def rotations(rows: Iterable[tuple[Hashable, int, bool]]) -> dict:
    """Return HR-Bench's scores of (question, rotation 0 to 3, right): {"average", "by_rotation", "all_right", "complete"}.

    average is the mean of the rotations' shares (open-compass/VLMEvalKit, vlmeval/dataset/utils/hrbench.py,
    report_acc_hrbench: row cycle = Average; lmms-eval has the same formula). With every row there it equals the plain mean.
    all_right is the share of questions right in all four rotations, among the `complete` ones that have all four, None
    if there is none; neither harness reports it. ValueError for a rotation out of range or given twice.
    """
    questions, cycles = defaultdict(dict), defaultdict(list)
    for question, rotation, right in rows:
        if rotation not in range(ROTATIONS) or rotation in questions[question]:
            raise ValueError(f"question {question!r}: rotation {rotation!r}, expected each of 0 to {ROTATIONS - 1} once")
        questions[question][rotation] = bool(right)
        cycles[rotation].append(bool(right))
    shares = {rotation: _mean(hits, "rotations") for rotation, hits in sorted(cycles.items())}
    complete = [all(found.values()) for found in questions.values() if len(found) == ROTATIONS]
    return {"average": _mean(list(shares.values()), "rotations"), "by_rotation": shares,
            "all_right": sum(complete) / len(complete) if complete else None, "complete": len(complete)}


def _mean(values: Sequence[float], name: str) -> float:
    if not values:
        raise ValueError(f"{name}: no items, expected at least one")
    return sum(values) / len(values)
