"""Effects of four worlds, by hand and on a model in closed form."""
import json
import math

import numpy as np
import pytest
from analytic import AnalyticModel, draw, trinomial

from utils.intervene.mediation import (detectable_difference, items_needed, items_with_no_change,
                                       margin_shown, markers_share, mediate, retrieval)
from utils.stats import paired_interval, robust_mean, tost_tango, verdict

EFFECTS = ("TE", "NIE", "NIE0", "NDE", "NDE1", "interaction")
# log-probabilities of the gold answer
HAND = {"y_xz": [-0.5, -0.2, -0.9, -0.1], "y_xz0": [-1.0, -0.4, -0.9, -0.6],
        "y_x0z": [-2.0, -1.1, -1.5, -0.8], "y_x0z0": [-2.1, -1.9, -1.7, -1.5]}


def four(model, binary=False, **draws):
    worlds, groups = draw(model, 400, binary, np.random.default_rng(0), **draws)
    return {**worlds, "groups": groups}


def test_effects_by_hand():
    result = mediate(**HAND, groups="aabc")
    means = dict(TE=1.375, NIE=0.3, NIE0=0.45, NDE=1.075, NDE1=0.925, interaction=-0.15)
    assert {name: result[name]["mean"] for name in EFFECTS} == pytest.approx(means)
    changes = [0.5, 0.2, 0.0, 0.5]
    assert result["NIE"]["ci95"] == pytest.approx(robust_mean(changes, "aabc", 0.95)[1:])
    assert result["NIE"]["ci90"] == pytest.approx(robust_mean(changes, "aabc", 0.90)[1:])
    assert result["proportion_mediated"]["value"] == pytest.approx((0.3 + 0.45) / 2 / 1.375)
    assert (result["n"], result["n_groups"]) == (4, 3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_indirect_effect_of_the_analytic_model_is_its_share_of_the_total(share):
    result = mediate(**four(AnalyticModel(share)))  # exact: one noise everywhere
    assert result["TE"]["mean"] == pytest.approx(3.0)
    for name, part in (("NIE", share), ("NIE0", share), ("NDE", 1 - share), ("NDE1", 1 - share),
                       ("interaction", 0)):
        assert [result[name]["mean"], *result[name]["ci95"]] == pytest.approx([part * 3] * 3, abs=1e-9), name
    assert result["proportion_mediated"]["value"] == pytest.approx(share)


def test_redundant_paths_and_paths_that_need_each_other():
    zero, ones = np.zeros(50), np.ones(50)
    either = mediate(ones, ones, ones, zero, range(50), binary=True)  # image or latents suffice
    assert (either["NIE"]["mean"], either["NIE0"]["mean"], either["interaction"]["mean"]) == (0, 1, -1)
    both = mediate(ones, zero, zero, zero, range(50), binary=True)  # it takes both
    assert (both["NIE"]["mean"], both["NIE0"]["mean"], both["interaction"]["mean"]) == (1, 0, 1)
    assert either["proportion_mediated"]["value"] == both["proportion_mediated"]["value"] == 0.5


def test_shares_of_right_answers_take_paired_intervals():
    data = four(AnalyticModel(0.4, redraw=0.2), binary=True, size=4, rho=0.5)
    result = mediate(**data, binary=True)
    ends = paired_interval(data["y_xz0"], data["y_xz"], data["groups"], 0.95)
    assert result["NIE"]["ci95"] == pytest.approx(ends)
    assert result["NIE"]["mean"] == pytest.approx((data["y_xz"] - data["y_xz0"]).mean())
    per_item = data["y_xz"] - data["y_xz0"] - data["y_x0z"] + data["y_x0z0"]
    low, high = result["interaction"]["ci95"]
    _, robust_low, robust_high = robust_mean(per_item, data["groups"], 0.95)
    assert result["interaction"]["mean"] == pytest.approx(per_item.mean()) and low < per_item.mean() < high
    assert 0.9 < (high - low) / (robust_high - robust_low) < 2.1  # 2: as if groups of 4 were one item


def test_answers_that_never_change_leave_every_interval_its_width():
    ones = [1] * 40
    result = mediate(ones, ones, ones, ones, range(40), binary=True)
    assert all(result[name]["ci90"][0] < 0 < result[name]["ci90"][1] for name in EFFECTS)
    assert verdict(result["NIE"]["ci90"], result["NIE"]["ci95"], 0.02) == "inconclusive"


def test_an_effect_whose_interval_includes_0_has_no_proportion():
    worlds = np.random.default_rng(0).normal(size=(4, 60))
    part = mediate(*worlds, range(60))["proportion_mediated"]
    assert part["value"] is part["ci95"] is None and "is not above 0" in part["reason"]


def test_the_ratio_of_effects_that_vary_together_is_exact():
    """Items differ in how much they depend on the image, never in the mediated share."""
    total = np.random.default_rng(0).gamma(2.0, size=300)
    worlds = dict(y_xz=total, y_xz0=0.6 * total, y_x0z=0.4 * total, y_x0z0=0 * total)
    share = mediate(**worlds, groups=np.arange(300) // 3)["proportion_mediated"]
    assert [share["value"], *share["ci95"]] == pytest.approx([0.4] * 3)


def test_the_share_that_markers_keep():
    """Of 40 items 30 are right as they are, 20 with the markers alone and 10 without imagination."""
    items = [{"id": f"i{k}", "answer": {"type": "letter", "value": "A"}} for k in range(41)]
    records = {f"i{k}": {name: {"correct": k < n} for name, n in
                         (("clean", 30), ("markers_only", 20), ("no_segment", 10))} for k in range(41)}
    records["i40"]["markers_only"] = {"reason": "no_latents"}
    share = markers_share(items, records, 20)
    assert (share["n"], share["value"]) == (40, 0.5) and 0 < share["ci95"][0] < 0.5 < share["ci95"][1] < 1
    for by in records.values():
        by["clean"] = by["no_segment"]
    assert markers_share(items, records, 20)["value"] is None
    assert markers_share(items, records, 41) is markers_share(items[:1], records, 1) is None


@pytest.mark.parametrize("change, words", [
    ({"y_x0z": [-2.0, -1.1, math.nan, -0.8]}, "finite"), ({"y_x0z": [-2.0, -1.1, -math.inf, -0.8]}, "finite"),
    ({"groups": "abc"}, "expected"), ({"groups": "aaaa"}, "1 groups: expected .* at least two"),
    ({"binary": True}, "0 or 1")])
def test_no_effect_of_outcomes_that_make_no_sense(change, words):
    with pytest.raises(ValueError, match=words):
        mediate(**{**HAND, "groups": "aabc"} | change)


# ---- sample sizes
@pytest.mark.parametrize("discordance, items", [
    (0.02, (1713, 429)), (0.05, (4283, 1071)), (0.1, (8565, 2142)), (0.2, (17129, 4283))])
def test_planned_items_are_near_the_normal_approximation_where_it_holds(discordance, items):
    """8.564 discordance / margin^2 at 1 and 2 points; the score test takes more where the margin is large."""
    for margin, table in zip((0.01, 0.02), items):
        assert table <= items_needed(discordance, margin) < table * (1 + 0.5 * margin / discordance)


def test_detectable_differences_of_the_table():
    for n, points in ((191, [4.5, 6.4, 9.1]), (72, [7.4, 10.4, 14.8])):
        assert [round(100 * detectable_difference(share, n), 1) for share in (0.05, 0.1, 0.2)] == points


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.05, 0.1])
def test_no_fewer_items_do(margin):
    """For an equivalence margin at some discordance, and where no answer changes."""
    for discordance in (0.02, 0.1):
        n = items_needed(discordance, margin)
        assert margin_shown(discordance, n) <= margin + 1e-6 < margin_shown(discordance, n - 2) + 2e-6
    n = items_with_no_change(margin)
    assert tost_tango(0, 0, n, margin) < 0.05 <= tost_tango(0, 0, n - 1, margin)
    assert items_needed(0, margin) == n and margin_shown(0.02, 1) > 0.5


@pytest.mark.parametrize("discordance, margin", [
    (0.005, 0.05), (0.02, 0.05), (0.02, 0.02), (0.05, 0.05), (0.1, 0.05), (0.1, 0.03), (0.2, 0.05)])
def test_the_planned_items_have_the_power_that_they_are_planned_for(discordance, margin):
    """Exact power of the score test at the planned number of items, summed over all data. It jumps from item
    to item where a single change decides."""
    n = items_needed(discordance, margin)
    counts = trinomial(n, discordance / 2, discordance / 2)
    power = sum(p for b, c, p in counts if tost_tango(b, c, n, margin) < 0.05)
    print(f"{100 * discordance} % change, margin {margin}: {n} items, power {power:.3f}")
    assert power > (0.68 if discordance < 0.01 else 0.8)


def test_mcnemar_finds_the_detectable_difference_as_often_as_planned():
    n, discordance = 400, 0.1
    change = detectable_difference(discordance, n)
    counts = trinomial(n, (discordance - change) / 2, (discordance + change) / 2)
    power = sum(p for b, c, p in counts if abs(c - b) > 1.959964 * math.sqrt(b + c))
    assert power == pytest.approx(0.8, abs=0.03)


# ---- retrieval
def test_a_vector_finds_its_partner_as_often_as_it_should():
    rng, n = np.random.default_rng(0), 40
    partners, groups = rng.normal(size=(n, 16)) + 9, [f"g{i}" for i in range(n)]
    same = retrieval(list(zip(3 * partners + 1, partners)), groups)
    assert (same["r1"]["share"], same["r5"]["share"], same["mrr"], same["chance"]) == (1, 1, 1, 1 / n)
    constant = retrieval([(np.ones(16), partner) for partner in partners], groups)
    assert constant["r5"]["k"] == 0 and constant["mrr"] == pytest.approx(2 / (n + 1))  # all tie
    random = [retrieval(list(zip(rng.normal(size=(n, 16)), partners)), groups) for _ in range(200)]
    assert np.mean([found["r1"]["share"] for found in random]) == pytest.approx(1 / n, abs=0.006)
    assert np.mean([found["mrr"] for found in random]) == pytest.approx(
        np.mean(1 / np.arange(1, n + 1)), abs=0.01)


def test_partners_of_the_same_group_are_no_rivals():
    """Against a loop over all pairs; copies of one picture are of one group."""
    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(8, 6))
    vectors = [(pictures[i // 2] + 0.8 * rng.normal(size=6), pictures[i // 2]) for i in range(16)]
    groups = [i // 2 for i in range(16)]
    own, gallery = (np.array(side) - np.mean(side, axis=0) for side in zip(*vectors))
    ranks = []
    for i in range(16):
        cosines = [own[i] @ x / np.linalg.norm(own[i]) / np.linalg.norm(x) for x in gallery]
        ranks.append(1 + sum(cosines[j] > cosines[i] for j in range(16) if groups[j] != groups[i]))
    found = retrieval(vectors, groups)
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert [found["r1"]["k"], found["r5"]["k"]] == [sum(rank <= k for rank in ranks) for k in (1, 5)]
    assert found["chance"] == pytest.approx(1 / 15) and retrieval(vectors[:2], groups[:2]) is None
