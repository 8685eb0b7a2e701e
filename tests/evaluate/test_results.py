"""Scores of sets of results, by hand and by published numbers.    pytest tests/test_summary.py"""
import random

import pytest

from utils.evaluate.results import headline, is_right, mme_scores, own_scores, share, summarize, widest
from utils.stats import wilson

BASE = {"group_id": "g", "category": "c", "finish_reason": "stop", "n_tokens": 3, "n_latent": 4,
        "extraction": {"rule": "phrase"},
        "n_options": 4, "compat": {}}


def results(*verdicts, **more):
    return [BASE | {"id": str(n), "verdict": verdict} | more for n, verdict in enumerate(verdicts)]


def test_unresolved_counts_as_wrong_and_errors_are_left_out():
    records = results("correct", "incorrect", "unresolved") + [{"verdict": "error", "group_id": "g"}]
    found = summarize(records, lambda record: record["n_latent"] > 0)
    assert (found["n"], found["accuracy"], found["incomplete"], found["ci95"]) == (3, 1 / 3, True,
                                                                                   wilson(1, 3))
    assert found["chance"] == 0.25 and found["emission"]["share"] == 1
    assert headline(found, False) is None and headline(found, True) == 1 / 3


def test_the_papers_numbers_come_out_of_the_counts_that_they_imply():
    """V* 85.9 of CapImagine: 101 of 115 and 63 of 76; one decimal of each of the three (arXiv 2602.22766)."""
    counts = {"direct_attributes": (101, 115), "relative_position": (63, 76)}
    records = [BASE | {"verdict": "correct" if k < right else "incorrect", "category": name,
                       "group_id": f"{name}{k}"}
               for name, (right, n) in counts.items() for k in range(n)]
    assert round(100 * summarize(records)["accuracy"], 1) == 85.9
    parts = {name: summarize([r for r in records if r["category"] == name])["accuracy"] for name in counts}
    assert {name: round(100 * part, 1) for name, part in parts.items()} == {"direct_attributes": 87.8,
                                                                            "relative_position": 82.9}
    assert 1 < 100 * (summarize(records)["ci95"][1] - 0.859) < 5  # half the width is about 4.9 points


def test_groups_widen_the_interval():
    records = [BASE | {"verdict": "correct" if n < 20 else "incorrect", "group_id": str(n // 4)}
               for n in range(40)]
    found = share(records, is_right)
    (low, high), (clustered_low, clustered_high) = found["ci95"], found["ci95_clustered"]
    assert clustered_high - clustered_low > 1.5 * (high - low)
    alike = share([BASE | {"verdict": ("correct", "incorrect")[n % 2], "group_id": str(n // 2)}
                   for n in range(20)], is_right)
    # never printed of no width
    assert alike["ci95_clustered"] == (0.5, 0.5) and widest(alike) == tuple(alike["ci95"])
    assert "ci95_clustered" not in share([r | {"group_id": str(n)} for n, r in enumerate(records)], is_right)


def test_other_rules_stand_beside_ours_each_over_the_results_it_applies_to():
    records = [BASE | {"verdict": verdict, "gold": "A", "compat": compat} for verdict, compat in (
        ("correct", {"one": "A", "two": None}), ("unresolved", {"one": "A", "two": "B"}),
        ("incorrect", {"one": "Z"}))]
    found = summarize(records)["compat"]
    assert (found["one"]["n"], found["one"]["correct"], found["one"]["no_verdict"]) == (3, 2, 0)
    assert (found["two"]["n"], found["two"]["correct"], found["two"]["no_verdict"]) == (2, 0, 1)


def judged(verdict, after, parsed, error=None):
    return BASE | {"verdict": verdict, "judged": after, "gold": "A", "compat": {"vk": None}, "judge": {
        "kind": "map", "parsed": parsed, "error": error, "right": None if error else parsed == "A"}}


def test_a_judge_decides_what_is_unresolved_and_its_failures_block_the_headline():
    records = [judged("unresolved", "correct", "A"), judged("correct", "correct", "B"),
               judged("incorrect", "incorrect", "A"),
               BASE | {"verdict": "correct", "judged": "correct", "judge": None, "gold": "A",
                       "compat": {"vk": "A"}}]
    found = summarize(records)
    assert (found["accuracy"], found["with_judge"]["accuracy"], headline(found, False)) == (0.5, 0.75, 0.75)
    part = found["with_judge"]
    assert (part["asked"], part["judged"], part["rules_right_judge_wrong"],
            part["rules_wrong_judge_right"]) == (3, 1, 1, 1)
    assert (found["compat"]["vk"]["correct"], found["compat"]["vk+judge"]["correct"]) == (1, 3)
    found = summarize([*records, judged("unresolved", "judge_error", None, "no usable reply")])
    assert found["with_judge"]["judge_errors"] == 1 and headline(found, False) is None and headline(
        found, True) == 0.6
    assert "vk+judge" not in found["compat"]


def test_hrbench_is_the_mean_over_rotations_and_counts_what_is_right_in_all_four():
    rng = random.Random(0)
    records = [BASE | {"verdict": rng.choice(("correct", "incorrect")), "benchmark": "hrbench_4k",
                       "group_id": f"q{n}",
                       "rotation": cycle, "category": ("single", "cross")[n % 2]} for n in range(40)
                       for cycle in range(4)]
    found = own_scores(records)["hrbench_4k"]
    for name, its in (("all", records), ("single", [r for r in records if r["category"] == "single"])):
        cycles = [[is_right(r) for r in its if r["rotation"] == cycle] for cycle in range(4)]
        assert found[name]["average"] == pytest.approx(sum(sum(hits) / len(hits) for hits in cycles) / 4)
        assert found[name]["all_right"] == sum(map(all, zip(*cycles))) / len(cycles[0])


def test_mme_adds_accuracy_and_accuracy_plus():
    """VLMEvalKit's formula: a subtask of four pictures, three of them right on both questions, is 87.5 + 75.
    """
    records = [BASE | {"verdict": "correct" if (picture, k) != (0, 1) else "unresolved", "category": "count",
                       "benchmark": "mme",
                       "group_id": f"p{picture}"} for picture in range(4) for k in range(2)]
    found = mme_scores(records)
    assert found["tasks"]["count"] == {"accuracy": 0.875, "accuracy_plus": 0.75, "score": 162.5}
    assert (found["perception"], found["reasoning"], own_scores(records)["mme"]) == (None, None, found)


def test_tables_are_averaged_both_ways_and_realworld_by_kind():
    """Monet's TableVQABench in the paper: 415 of 750, 151 of 250, 197 of 250 are 64.8 by splits and 61.0 by
    items."""
    records = [BASE | {"verdict": "correct" if k < right else "incorrect", "benchmark": f"tablevqa/{name}",
                       "group_id": str(k)}
               for name, right, n in (("vwtq", 415, 750), ("vwtq_syn", 151, 250), ("vtabfact", 197, 250))
               for k in range(n)]
    found = own_scores(records)["tablevqa"]
    assert (round(100 * found["macro"], 1), round(100 * found["micro"], 1), found["splits"]) == (64.8, 61.0,
                                                                                                 3)
    records = [BASE | {"verdict": "correct", "benchmark": "mme_realworld_lite", "category": f"{kind}/x"}
               for kind in ("Perception", "Perception", "Reasoning")]
    found = own_scores(records)["mme_realworld_lite"]
    assert (found["Perception"]["correct"], found["Reasoning"]["correct"]) == (2, 1)
