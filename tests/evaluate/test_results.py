"""Scores of sets of results, by hand, against counts behind the published numbers."""
import itertools
import json
import random

import numpy as np
import pytest
from samples import shortest_path as other_shortest_path

from utils.evaluate.comparison import describe_samples, show
from utils.evaluate.reference_scorers import needs_detour
from utils.evaluate.results import (constant_answer, headline, is_right, judged_right, macro, mme_scores,
                                    own_scores, rotation_scores, sample_scores, share, summarize)
from utils.evaluate.scoring import vsp_floors
from utils.items import shortest_path
from utils.stats import chance, share_interval, wilson

BASE = {"group_id": "g", "category": "c", "finish_reason": "stop", "n_tokens": 3, "n_latent": 4,
        "extraction": {"rule": "phrase"}, "n_options": 4, "compat": {}, "gold": "A", "clean_output": "A"}


def counted(k, n, **more):
    """n results, the first k of them right."""
    verdicts = ["correct"] * k + ["incorrect"] * (n - k)
    return [BASE | {"verdict": verdict, "group_id": str(i)} | more for i, verdict in enumerate(verdicts)]


def test_unresolved_counts_as_wrong_and_errors_are_left_out():
    records = [BASE | {"verdict": verdict, "group_id": verdict}
               for verdict in ("correct", "incorrect", "unresolved")]
    error = {"verdict": "error", "group_id": "g"}
    scores = summarize([*records, error], lambda record: record["n_latent"] > 0)
    assert (scores["n"], scores["accuracy"], scores["incomplete"]) == (3, 1 / 3, True)
    assert scores["ci95"] == wilson(1, 3)
    assert scores["chance"] == 0.25 and scores["emission"]["share"] == 1
    assert headline(scores) is None


def test_v_star_85_9_comes_out_of_the_counts_of_its_categories():
    """CapImagine: 101 of 115 and 63 of 76 give the three published decimals (arXiv 2602.22766)."""
    parts = {name: [record | {"group_id": f"{name}{record['group_id']}"} for record in counted(k, n)]
             for name, k, n in (("direct", 101, 115), ("relative", 63, 76))}
    records = sum(parts.values(), [])
    scores = summarize(records)
    shown = [round(100 * summarize(part)["accuracy"], 1) for part in (*parts.values(), records)]
    assert shown == [87.8, 82.9, 85.9]
    hits = {name: [is_right(record) for record in part] for name, part in parts.items()}
    assert round(100 * macro(hits.values()), 1) != 85.9
    assert 1 < 100 * (scores["ci95"][1] - 0.859) < 5  # half the width is about 4.9 points
    assert scores["ci95"] == wilson(164, 191)
    groups = [n // 4 for n in range(191)]
    grouped = [record | {"group_id": group} for record, group in zip(records, groups)]
    assert share(grouped, is_right)["ci95"] == share_interval([*map(is_right, records)], groups)


def test_other_rules_are_scored_over_the_results_they_apply_to():
    scores = summarize([BASE | {"verdict": "correct", "gold": "A", "compat": compat} for compat in (
        {"one": "A", "two": None}, {"one": "A", "two": "B"}, {"one": "Z"})])["compat"]
    counts = {name: (part["n"], part["correct"], part["no_verdict"]) for name, part in scores.items()}
    assert counts == {"one": (3, 2, 0), "two": (2, 0, 1)}


def judged(verdict, after, parsed, error=None):
    return BASE | {"verdict": verdict, "judged": after, "gold": "A", "compat": {"vk": None}, "judge": {
        "kind": "map", "parsed": parsed, "error": error, "right": None if error else parsed == "A"}}


def test_a_judge_decides_what_is_unresolved_and_its_failures_block_the_headline():
    records = [judged("unresolved", "correct", "A"), judged("correct", "correct", "B"),
               judged("incorrect", "incorrect", "A"),
               judged("correct", "correct", "A") | {"judge": None, "compat": {"vk": "A"}}]
    scores = summarize(records)
    part = scores["with_judge"]
    assert (scores["accuracy"], part["accuracy"], headline(scores)) == (0.5, 0.75, 0.75)
    assert (part["asked"], part["judged"]) == (3, 1)
    assert (scores["compat"]["vk"]["correct"], scores["compat"]["vk+judge"]["correct"]) == (1, 3)
    scores = summarize([*records, judged("unresolved", "judge_error", None, "no usable reply")])
    assert scores["with_judge"]["judge_errors"] == 1 and "vk+judge" not in scores["compat"]
    assert headline(scores) is None


def test_hrbench_is_averaged_over_rotations_in_total_and_by_category():
    rng = random.Random(0)
    records = [BASE | {"verdict": rng.choice(("correct", "incorrect")), "benchmark": "hrbench_4k",
                       "group_id": f"q{n}", "rotation": cycle, "category": ("single", "cross")[n % 2]}
               for n in range(40) for cycle in range(4)]
    scores = own_scores(records)["hrbench_4k"]
    for name, part in (("all", records), ("single", [r for r in records if r["category"] == "single"])):
        cycles = [[is_right(r) for r in part if r["rotation"] == cycle] for cycle in range(4)]
        assert scores[name]["average"] == pytest.approx(sum(sum(hits) / len(hits) for hits in cycles) / 4)
        assert scores[name]["all_right"] == sum(map(all, zip(*cycles))) / len(cycles[0])


def test_mme_adds_accuracy_and_accuracy_plus():
    """VLMEvalKit's formula: a subtask of four pictures, three of them right on both questions: 87.5 + 75."""
    records = [BASE | {"verdict": "correct" if (picture, k) != (0, 1) else "unresolved", "category": "count",
                       "benchmark": "mme", "group_id": f"p{picture}"}
               for picture in range(4) for k in range(2)]
    scores = mme_scores(records, is_right)
    assert scores["tasks"]["count"] == {"accuracy": 0.875, "accuracy_plus": 0.75, "score": 162.5}
    assert (scores["perception"], scores["reasoning"]) == (None, None)
    assert own_scores(records)["mme"] == scores
    # a picture with an error or one question does not count in accuracy plus
    records = [BASE | {"verdict": verdict, "category": "count", "group_id": group, "benchmark": "mme"}
               for group, verdict in zip("aabb", ("correct", "error", "correct", "incorrect"))]
    assert own_scores(records)["mme"]["tasks"]["count"] == {
        "accuracy": 2 / 3, "accuracy_plus": 0, "score": pytest.approx(200 / 3)}
    assert own_scores(records[:2])["mme"]["tasks"] == own_scores(records[:1])["mme"]["tasks"] == {}


@pytest.mark.parametrize("name, fields, score", [
    ("hrbench_4k", {"rotation": 0}, lambda part: part["all"]["average"]),
    ("mme", {"category": "count"}, lambda part: part["tasks"]["count"]["score"] / 200),
    ("mme_realworld_lite", {"category": "Perception/x"}, lambda part: part["Perception"]["accuracy"]),
    ("mmvp", {"gold": "A"}, lambda part: part["score"]),
    ("mmstar", {"gold": "A", "category": "math"}, lambda part: part["score"]),
    ("tablevqa/vwtq", {}, lambda part: part["macro"])])
def test_every_score_of_a_benchmark_has_a_judged_version(name, fields, score):
    pairs = (("correct", "correct"), ("unresolved", "correct"), ("unresolved", "incorrect"),
             ("incorrect", "incorrect"))
    records = [BASE | fields | {"benchmark": name, "group_id": str(n), "verdict": verdict, "judged": judged}
               for n, (verdict, judged) in enumerate(pairs) for _ in range(2)]
    key = name.partition("/")[0]
    assert [score(own_scores(records, right)[key]) for right in (is_right, judged_right)] == [
        0.25, 0.5]


# ---- several replies to an item
def replies(item: str, values: str, gold: str = "A", **more) -> list[dict]:
    """One reply per letter; "-" is unread, "!" an error."""
    verdicts = {"-": "unresolved", "!": "error", gold: "correct"}
    return [BASE | {"item": item, "group_id": item, "verdict": verdicts.get(value, "incorrect"),
                    "extraction": {"value": None if value in "-!" else value, "rule": "phrase"}} | more
            for value in values]


def test_scores_of_several_replies_by_hand():
    """Right of four: 2 with the majority, 2 in a tie, 1 alone with a majority (nothing else twice), 0, 0."""
    records = [row for n, values in enumerate(("AABC", "AABB", "AB--", "A---", "BBBA", "----", "AA!A"))
               for row in replies(str(n), values)]
    scores = sample_scores(records)
    assert (scores["k"], scores["items"], scores["mean"]["accuracy"]) == (4, 6, 7 / 24)
    majority = scores["majority"]
    assert (majority["correct"], majority["tied"], majority["unread"]) == (2, 2, 1)
    assert majority["ci95"] == wilson(2, 6) and scores["mean"]["ci95"] == share_interval(
        [int(row["verdict"] == "correct") for row in records[:24]], [row["item"] for row in records[:24]])
    assert {m: part["accuracy"] for m, part in scores["pass"].items()} == {
        1: pytest.approx(7 / 24), 2: pytest.approx((5 / 6 * 2 + 1 / 2 * 3) / 6), 4: pytest.approx(5 / 6)}
    shown = describe_samples(scores)
    assert shown.startswith("6 items, 4 replies each: mean 29.2% (") and "| pass@4 83.3% (" in shown
    assert sample_scores(replies("x", "A!")) == {"k": 2, "items": 0}


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_pass_at_m_is_the_mean_over_all_choices_of_m_replies(k):
    rng = random.Random(k)
    items = [[rng.random() < 0.3 for _ in range(k)] for _ in range(20)]
    scores = sample_scores([row for n, hits in enumerate(items)
                            for row in replies(str(n), "".join("BA"[hit] for hit in hits))])
    assert sorted(scores["pass"]) == sorted({m for m in (1, 2, 4, 8) if m <= k} | {k})
    for m, part in scores["pass"].items():
        chosen = [any(some) for hits in items for some in itertools.combinations(hits, m)]
        assert part["accuracy"] == pytest.approx(sum(chosen) / len(chosen))


def test_intervals_of_pass_at_m_hold_with_groups():
    """Two items to a group that are equally hard, four replies each: the truth is missed in at most 5 %."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        hard = rng.beta(0.5, 0.5, size=15)
        records = [row for n in range(30) for row in replies(
            str(n), "".join("BA"[hit] for hit in (rng.random(4) < hard[n // 2]).astype(int)),
            group_id=str(n // 2))]
        low, high = sample_scores(records)["pass"][2]["ci95"]
        missed += not low <= 1 - (0.25 + 0.125) <= high  # E (1 - p)^2 of Beta(1/2, 1/2) is 3/8
    assert missed <= 0.05 * 200


# ---- floors
def test_vsp_s_trivial_policies_solve_the_published_shares_of_its_boards(shared_data):
    """In percent, by size and in all. The best path is one for each size; one for all sizes solves 7.0."""
    lines = (shared_data / "vsp" / "test.jsonl").read_text().splitlines()
    boards = [json.loads(line)["map_desc"] for line in lines]
    floors = vsp_floors([{"gold": board, "verdict": "incorrect"} for board in boards])
    assert {policy: [round(100 * part[policy], 2) for part in floors.values()] for policy in floors["all"]
            if policy != "n"} == {
        "constant": [13, 11, 9, 5, 9.5], "hole_blind_horizontal": [79, 75, 75, 48, 69.25],
        "hole_blind_vertical": [78, 78, 77, 58, 72.75], "greedy_horizontal": [96, 86, 86, 71, 84.75],
        "greedy_vertical": [95, 88, 89, 69, 85.25], "no_detour": [98, 90, 93, 79, 90]}
    records = [BASE | {"gold": board, "verdict": "incorrect" if needs_detour(board) else "correct",
                       "group_id": str(n), "benchmark": "vsp"} for n, board in enumerate(boards)]
    scores = own_scores(records)["vsp"]
    assert [(part["n"], part["accuracy"]) for part in scores.values()] == [(40, 0.0), (360, 1.0)]
    assert all(shortest_path(board) == other_shortest_path(board) for board in boards)


def test_a_board_without_a_way_needs_a_detour():
    closed = [[1, -1], [-1, 2]]
    assert shortest_path(closed) is None and needs_detour(closed)
    assert vsp_floors([{"gold": closed, "verdict": "correct"}])["all"] == {
        "n": 1, "constant": 0, "no_detour": 0, **{f"{name}_{order}": 0 for name in ("hole_blind", "greedy")
                                                  for order in ("horizontal", "vertical")}}
    assert vsp_floors([BASE | {"verdict": "error", "gold": closed}, BASE | {"verdict": "correct"}]) == {}


@pytest.mark.parametrize("golds, answers, accuracy", [
    ("AABC", {"": "A"}, 0.5), ([True, False, True], {"": "True"}, 2 / 3), (["yes"], {"": "yes"}, 1),
    ([["a", "b"], ["b"], ["a", "b"]], {"": "a|b"}, 2 / 3)])
def test_the_best_constant_answer(golds, answers, accuracy):
    found = constant_answer([BASE | {"gold": gold} for gold in golds])
    assert found == {"answers": answers, "accuracy": accuracy}
    shown = constant_answer([BASE | {"gold": "A", "shown": {"gold": gold}, "benchmark": name}
                             for name in "ab" for gold in golds])  # of each benchmark, as shown
    assert shown == {"answers": dict.fromkeys("ab", answers[""]), "accuracy": accuracy}


def test_how_replies_ended_is_counted_and_shown(capsys):
    ends = [("correct", "stop", "A", "phrase"), ("unresolved", "length", "so", "unresolved"),
            ("unresolved", "stop", "", "empty"), ("unresolved", None, "?", "unresolved")]
    scores = summarize([BASE | {"verdict": verdict, "group_id": text, "finish_reason": finish,
                                "clean_output": text, "extraction": {"rule": rule}}
                        for verdict, finish, text, rule in ends])
    assert scores["finish_reasons"] == {"stop": 2, "length": 1, "unknown": 1}
    assert (scores["no_text"], scores["unresolved_rules"]) == ({"nothing": 1}, {"unresolved": 2, "empty": 1})
    own = {"vsp": {"detour": {"accuracy": 0.25, "n": 4}, "no_detour": {"accuracy": None}},
           "mme": {"perception": 1234.5, "reasoning": None, "tasks": {}}, "x": {"sample 0": {}},
           "mmvp": {"score": 0.4, "chance": 0.25, "constant": None}}
    show(scores | {"categories": {}, "vsp_floors": {}, "own_scores": own, "protocol": {
        "pixels": [1, 2], "protocol": "plain", "method": "text", "prompt_sha": "0", "judge": "none"}})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].split()[:10] == "all 4 1 25.0% 4.6 to 69.9 25.0 100.0 3".split()
    assert lines[2:5] == ["vsp: detour 0.25", "mme: perception 1234", "mmvp: score 0.4 | chance 0.25"]
    assert lines[6] == ("ended: stop 2 (50.0%), length 1 (25.0%), unknown 1 (25.0%) | unresolved: unresolved "
                        "2 (50.0%), empty 1 (25.0%)")
    assert lines[7] == "replies without text: 1 with nothing else"


# ---- tables
def test_tables_are_averaged_over_splits_and_realworld_by_kind():
    """The rows of Monet and CapImagine in TableVQABench: the published 64.8 and 70.7 are means of splits."""
    for counts, shown in (((415, 151, 197), 64.8), ((457, 170, 208), 70.7)):
        records = [record for name, k, n in zip(("vwtq", "vwtq_syn", "vtabfact"), counts, (750, 250, 250))
                   for record in counted(k, n, benchmark=f"tablevqa/{name}")]
        scores = own_scores(records)["tablevqa"]
        assert (round(100 * scores["macro"], 1), scores["splits"]) == (shown, 3)
    records = [BASE | {"verdict": "correct", "benchmark": "mme_realworld_lite", "category": f"{kind}/x"}
               for kind in ("Perception", "Perception", "Reasoning")]
    scores = own_scores(records)["mme_realworld_lite"]
    assert (scores["Perception"]["correct"], scores["Reasoning"]["correct"]) == (2, 1)


def test_mmvp_counts_pairs_and_mmstar_and_cv_bench_average_their_parts():
    """Expected: what VLMEvalKit's report_acc_MMVP and lmms-eval's cv_bench_default_aggregate_results give."""
    pairs = [(1, 1), (1, 0), (0, 1), (0, 0), (1, 1)]
    records = [BASE | {"verdict": "correct" if hit else "incorrect", "benchmark": "mmvp", "n_options": 2,
                       "group_id": f"p{n}", "gold": gold}
               for n, pair in enumerate(pairs) for hit, gold in zip(pair, "AB")]
    assert own_scores(records)["mmvp"] == {"score": 0.4, "chance": 0.25, "constant": 0}
    failed = [records[0] | {"verdict": "error"}, *records[1:-1]]  # a pair with an error, a pair with one row
    assert own_scores(failed)["mmvp"]["score"] == 0
    assert own_scores(records[:1])["mmvp"] == {"score": None, "chance": None, "constant": None}
    parts = {"cv_bench/2D": {"ADE20K/Count": (3, 4), "ADE20K/Relation": (0, 2), "COCO/Count": (1, 4)},
             "cv_bench/3D": {"Omni3D/Depth": (2, 2), "Omni3D/Distance": (1, 3)}}
    records = [record | {"gold": "A", "category": category, "n_options": 4 if name == "cv_bench/2D" else 2}
               for name, tasks in parts.items() for category, (k, n) in tasks.items()
               for record in counted(k, n, benchmark=name)]
    scores = own_scores(records)["cv_bench"]
    assert scores == {"score": pytest.approx(((3 / 6 + 1 / 4) / 2 + 3 / 5) / 2), "chance": 0.375,
                      "constant": 1}
    assert own_scores(records[:10])["cv_bench"]["score"] is None
    records = [record | {"gold": gold, "category": category, "n_options": options}
               for category, k, n, gold, options in (("math", 1, 4, "A", 4), ("instances", 1, 1, "B", 2),
                                                     ("perception", 0, 3, "A", 4))
               for record in counted(k, n, benchmark="mmstar")]
    assert own_scores(records)["mmstar"] == pytest.approx(
        {"score": 1.25 / 3, "chance": 1 / 3, "constant": 2 / 3})


def rotated(question: int, rotation: int, right: bool) -> dict:
    return {"group_id": question, "rotation": rotation, "verdict": "correct" if right else "incorrect"}


def test_rotations_with_missing_rows():
    """Rotation 0: 1 of 4 right; rotation 1: 1 of 2 right. All right needs all four rotations."""
    rows = [rotated(question, 0, question == 0) for question in range(4)]
    assert rotation_scores([*rows, rotated(0, 1, True), rotated(1, 1, False)], is_right) == {
        "average": 0.375, "by_rotation": {0: 0.25, 1: 0.5}, "all_right": None, "complete": 0}
    rows = [rotated(question, rotation, (question, rotation) != (1, 3)) for question in range(3)
            for rotation in range(4)]
    scores = rotation_scores(rows[:-1], is_right)  # question 2 lacks a rotation
    assert (scores["all_right"], scores["complete"]) == (0.5, 2)


def test_chance_is_one_in_the_options_of_each_item():
    assert round(100 * chance([4] * 107 + [2] * 84), 1) == 36.0  # V*
    for options in ([], [4, 0]):
        with pytest.raises(ValueError):
            chance(options)
    assert chance([2] * 150) == 0.5 and chance([5] * 1919) == pytest.approx(0.2)
