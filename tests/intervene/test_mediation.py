"""Effects of four worlds by hand, on a model in closed form, and what is refused.    pytest
tests/test_mediation.py"""
import json
import math

import numpy as np
import pytest
from analytic import AnalyticModel, draw, outcomes

from utils.intervene.mediation import donor_lift, mediate
from utils.stats import paired_interval, robust_mean, sign_flip, verdict

EFFECTS = ("TE", "NIE", "NIE0", "NDE", "NDE1", "interaction")
HAND = {"y_xz": [-0.5, -0.2, -0.9, -0.1], "y_xz0": [-1.0, -0.4, -0.9, -0.6],
        "y_x0z": [-2.0, -1.1, -1.5, -0.8],
        "y_x0z0": [-2.1, -1.9, -1.7, -1.5]}  # log-probabilities of the gold answer


def four(model, binary=False, **draws):
    found, groups = draw(model, 400, binary, np.random.default_rng(0), **draws)
    return {**found, "groups": groups}


# ------------------------------------------------------------------------------------------- effects
def test_effects_by_hand():
    result = mediate(**HAND, groups="aabc", n_boot=500)
    means = dict(TE=1.375, NIE=0.3, NIE0=0.45, NDE=1.075, NDE1=0.925, interaction=-0.15)
    assert {name: result[name]["mean"] for name in EFFECTS} == pytest.approx(means)
    changes = [0.5, 0.2, 0.0, 0.5]
    assert result["NIE"]["ci95"] == pytest.approx(robust_mean(changes, "aabc", 0.95)[1:])
    assert result["NIE"]["ci90"] == pytest.approx(robust_mean(changes, "aabc", 0.90)[1:])
    assert result["proportion_mediated"]["value"] == pytest.approx((0.3 + 0.45) / 2 / 1.375)
    share = result["at_most_share"]["NIE"]
    assert share["mean"] == pytest.approx(0.3 - 0.1 * 1.375)
    assert share["upper95"] == pytest.approx(robust_mean([0.34, 0.03, -0.08, 0.36], "aabc", 0.90)[2])
    assert (result["n"], result["n_groups"]) == (4, 3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_indirect_effect_of_the_analytic_model_is_its_share_of_the_total(share):
    # the same noise in every world: exact
    result = mediate(**four(AnalyticModel(share, offset=20.0)), n_boot=200)
    assert result["TE"]["mean"] == pytest.approx(3.0)
    for name, part in (("NIE", share), ("NIE0", share), ("NDE", 1 - share), ("NDE1", 1 - share),
                       ("interaction", 0)):
        assert result[name]["mean"] == pytest.approx(part * 3.0, abs=1e-9), name
        assert result[name]["ci95"] == pytest.approx([part * 3.0] * 2, abs=1e-9), name
    assert result["proportion_mediated"]["value"] == pytest.approx(share)
    assert result["at_most_share"]["NIE"]["claimed"] == (share == 0.0)


def test_latents_that_hold_no_image_and_latents_that_all_look_alike():
    attributes, rng = np.arange(400) % 4, np.random.default_rng(0)
    blind = outcomes(AnalyticModel(0.5, kappa=0.0).worlds(attributes, rng), attributes, False)
    assert mediate(**blind, groups=range(400), n_boot=200)["NIE"]["mean"] == 0
    model = AnalyticModel(1.0, offset=7.0)
    latents = model.latents(attributes, 400)
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    # a raw cosine near 1 and an effect that runs through the latents alone
    assert (unit @ unit.T).mean() > 0.98
    found = outcomes(model.worlds(attributes, rng), attributes, False)
    assert mediate(**found, groups=range(400), n_boot=200)["proportion_mediated"]["value"] == pytest.approx(1)


def test_redundant_paths_and_paths_that_need_each_other():
    zero, one = np.zeros(50), np.ones(50)
    either = mediate(one, one, one, zero, range(50), binary=True, n_boot=200)  # image or latents suffice
    assert (either["NIE"]["mean"], either["NIE0"]["mean"], either["interaction"]["mean"]) == (0, 1, -1)
    both = mediate(one, zero, zero, zero, range(50), binary=True, n_boot=200)  # it takes both
    assert (both["NIE"]["mean"], both["NIE0"]["mean"], both["interaction"]["mean"]) == (1, 0, 1)
    assert either["proportion_mediated"]["value"] == both["proportion_mediated"]["value"] == 0.5


def test_accuracy_of_the_analytic_model_in_closed_form():
    model = AnalyticModel(0.4, redraw=1.0)
    attributes, rng = np.arange(40000) % 4, np.random.default_rng(0)
    found = outcomes(model.worlds(attributes, rng), attributes, True)
    for name, parts in (("y_xz", (1, 1)), ("y_xz0", (1, 0)), ("y_x0z", (0, 1)), ("y_x0z0", (0, 0))):
        assert found[name].mean() == pytest.approx(model.accuracy(*parts), abs=0.01), name
    tau = np.tile(model.latents(np.array([2]), 1), (40000, 1))
    right = model.logits(attributes, tau, rng.gumbel(size=(40000, 4))).argmax(axis=1) == attributes
    assert right.mean() == pytest.approx(model.accuracy_under_tau(), abs=0.01)


# ------------------------------------------------------------------------------------------- 0/1 outcomes
def test_shares_of_right_answers_take_paired_intervals():
    data = four(AnalyticModel(0.4, redraw=0.2), binary=True, size=4, rho=0.5)
    result = mediate(**data, binary=True, n_boot=300)
    ends = paired_interval(data["y_xz0"], data["y_xz"], data["groups"], 0.95, n_boot=300)
    assert result["NIE"]["ci95"] == pytest.approx(ends)
    assert result["NIE"]["mean"] == pytest.approx((data["y_xz"] - data["y_xz0"]).mean())
    per_item = data["y_xz"] - data["y_xz0"] - data["y_x0z"] + data["y_x0z0"]
    low, high = result["interaction"]["ci95"]
    _, robust_low, robust_high = robust_mean(per_item, data["groups"], 0.95)
    assert result["interaction"]["mean"] == pytest.approx(per_item.mean()) and low < per_item.mean() < high
    assert 0.9 < (high - low) / (robust_high - robust_low) < 1.4


def test_answers_that_never_change_leave_every_interval_its_width():
    one = [1] * 40
    result = mediate(one, one, one, one, range(40), binary=True, n_boot=200)
    for name in EFFECTS:
        low, high = result[name]["ci90"]
        assert low < 0 < high, name
    assert verdict(result["NIE"]["ci90"], result["NIE"]["ci95"], 0.02) == "inconclusive"
    zero = [0] * 10
    few = mediate([1] * 10, [1] * 10, zero, zero, range(10), binary=True, n_boot=200)["at_most_share"]["NIE"]
    assert few["mean"] == pytest.approx(-0.1) and not few["claimed"]  # ten items show no share of 10 %
    many = mediate([1] * 99, [1] * 99, [0] * 99, [0] * 99, range(99), binary=True,
                   n_boot=200)["at_most_share"]["NIE"]
    assert many["claimed"]


# --------------------------------------------------------------------------------------- shares of the effect
def test_no_share_of_an_effect_that_is_not_there():
    rng = np.random.default_rng(0)
    result = mediate(*rng.normal(size=(4, 60)), range(60), n_boot=200)
    assert result["proportion_mediated"]["value"] is None and result["proportion_mediated"]["ci95"] is None
    assert "includes 0" in result["proportion_mediated"]["reason"]
    assert "not above 0" in result["at_most_share"]["NIE"]["reason"] and not result["at_most_share"]["NIE"][
        "claimed"]


def test_a_total_effect_below_0_gives_no_claim_of_a_small_share():
    worlds = four(AnalyticModel(1.0, redraw=0.2))
    turned = {name: values if name == "groups" else -values for name, values in worlds.items()}
    share = mediate(**turned, n_boot=200)["at_most_share"]["NIE"]
    assert share["upper95"] < 0 and not share["claimed"]  # Z carries all of an effect that lowers the outcome


def test_the_bootstrap_of_the_ratio_draws_numerator_and_denominator_together():
    rng = np.random.default_rng(0)
    # items differ in how much they depend on the image, never in the mediated share
    total = rng.gamma(2.0, size=300)
    worlds = dict(y_xz=total, y_xz0=0.6 * total, y_x0z=0.4 * total, y_x0z0=0 * total)
    share = mediate(**worlds, groups=np.arange(300) // 3, n_boot=500)["proportion_mediated"]
    assert [share["value"], *share["ci95"]] == pytest.approx([0.4] * 3)


# ------------------------------------------------------------------------------------------- donors
def test_donor_lift_is_measured_against_an_unrelated_donor():
    own, unrelated_own = [0] * 100, [1] * 5 + [0] * 95
    swapped, unrelated_swapped = [1] * 42 + [0] * 58, [1] * 44 + [0] * 56
    result = donor_lift(swapped, own, unrelated_swapped, unrelated_own, range(100), n_boot=500)
    assert result["lift"]["mean"] == pytest.approx(0.42) and result["unrelated"]["mean"] == pytest.approx(
        0.39)
    assert result["difference"]["mean"] == pytest.approx(0.03)
    low, high = result["difference"]["ci95"]
    assert low < 0.03 < high
    difference = np.subtract(swapped, own) - np.subtract(unrelated_swapped, unrelated_own)
    assert result["difference"]["p"] == sign_flip(difference, range(100))
    assert json.loads(json.dumps(result)) == result


def test_donors_that_are_followed_and_donors_that_are_not():
    rng = np.random.default_rng(0)
    own, other = np.zeros(200, int), rng.integers(0, 2, 200)
    followed = donor_lift(rng.random(200) < 0.5, own, own, own, np.arange(200) // 4, n_boot=500)
    assert followed["difference"]["p"] < 0.001 and followed["difference"]["ci95"][0] > 0.3
    same = donor_lift(other, own, other, own, np.arange(200) // 4, n_boot=500)
    assert same["difference"]["mean"] == 0 and same["difference"]["p"] == 1
    assert same["difference"]["ci90"][0] < 0 < same["difference"]["ci90"][1]


# ------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_outcome_that_is_no_number_is_named(value):
    worlds = {**HAND, "y_x0z": [-2.0, -1.1, value, -0.8]}
    with pytest.raises(ValueError, match=r"y_x0z of item 2 \(group 'b'\) is -?(nan|inf)"):
        mediate(**worlds, groups="aabc")


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
# TE alone passes the largest float, or NIE too and the gap is no number
@pytest.mark.parametrize("y_xz0", [0.0, -1e308])
def test_an_item_whose_identities_break_is_named(y_xz0):
    worlds = {**HAND, "y_xz": [0.0, 1e308, 0.0, 0.0], "y_x0z0": [0.0, -1e308, 0.0, 0.0],
              "y_xz0": [0.0, y_xz0, 0.0, 0.0]}
    with pytest.raises(ValueError, match=r"item 1 \(group 'a'\): TE inf is not NIE \S+ \+ NDE \S+;"):
        mediate(**worlds, groups="aabc")


@pytest.mark.parametrize("call, words", [
    (lambda: mediate(**HAND, groups="abc"), r"y_xz has the shape \(4,\): expected \(3,\)"),
    (lambda: mediate([], [], [], [], []), "expected"), (lambda: mediate(**HAND, groups="aaaa"),
                                                        "at least two groups"),
    (lambda: mediate(**HAND, groups="aabc", binary=True), "y_xz of item 0 .* expected 0 or 1"),
    (lambda: mediate(**HAND, groups="aabc", rho=1.5), "rho 1.5"),
    (lambda: donor_lift([1, 0.5], [1, 0], [1, 0], [1, 0], "ab"), "swapped of item 1")])
def test_no_effect_of_what_makes_no_sense(call, words):
    with pytest.raises(ValueError, match=words):
        call()
