"""How often intervals cover and verdicts err on data whose truth is known.    pytest -s
tests/test_coverage.py

500 data sets of the analytic model in each case. A rate counts as met if so many or more extreme misses would
come up by chance in more than one of 1000 such runs (exact binomial): at 500 data sets and 5 % that is at
most 41 misses, 8.2 %. The rates themselves are printed with -s.
"""
import math

import numpy as np
import pytest
from analytic import AnalyticModel, draw

from utils.intervene.mediation import mediate
from utils.stats import paired_interval, robust_mean, sign_flip, verdict

N_SETS, N_BOOT = 500, 1000
INSIDE = ("equivalent", "small effect inside the margin")
CASES = [(binary, size, rho) for binary in (True, False) for size, rho in ((1, 0.0), (4, 0.5))]
each_case = pytest.mark.parametrize("binary, size, rho", CASES, ids=[
    f"{'accuracy' if binary else 'gold logit'}, groups of {size}" for binary, size, _ in CASES])


def most_misses(rate, n=N_SETS, chance=0.001):
    """Return the largest count that comes up, or is passed, with more than this chance if misses have the
    rate."""
    tail, k = 1.0, 0
    while tail > chance:
        tail -= math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        k += 1
    return k - 1


def simulate(model, truth, margin, binary, size, rho):
    """Return misses of the 95 % interval, claims of an effect and claims of equivalence among the data sets.
    """
    rng, misses, effects, equivalent = np.random.default_rng(0), 0, 0, 0
    for _ in range(N_SETS):
        found, groups = draw(model, 400, binary, rng, size, rho)
        clean, after = found["y_xz"], found["y_xz0"]
        ci90, ci95 = (paired_interval(clean, after, groups, level, N_BOOT) if binary else
                      robust_mean(after - clean, groups, level)[1:] for level in (0.90, 0.95))
        said = verdict(ci90, ci95, margin)
        misses, effects = misses + (not ci95[0] <= truth <= ci95[1]), effects + ("effect" in said)
        equivalent += said in INSIDE
    print(f"\n{'accuracy' if binary else 'gold logit'}, groups of {size}, rho {rho}, change {truth:+.4f}, margin {margin:.4f}: "
          f"coverage {1 - misses / N_SETS:.3f}, an effect {effects / N_SETS:.3f}, equivalent {equivalent / N_SETS:.3f}")
    return misses, effects, equivalent


def test_the_bound_is_the_binomials():
    assert most_misses(0.05) == 41 and most_misses(0.5, 10, 0.002) == 9


@each_case
def test_without_an_effect_none_is_found_and_intervals_cover(binary, size, rho):
    misses, effects, _ = simulate(AnalyticModel(0.0, redraw=0.3), 0.0, 0.05 if binary else 0.3, binary, size,
                                  rho)
    assert misses <= most_misses(0.05)
    assert effects <= most_misses(0.05)


@each_case
def test_an_effect_as_large_as_the_margin_is_not_called_equivalent(binary, size, rho):
    model = AnalyticModel(0.12, redraw=0.3)
    truth = model.accuracy(True, False) - model.accuracy(True, True) if binary else -model.share * model.scale
    misses, effects, equivalent = simulate(model, truth, abs(truth), binary, size, rho)
    assert misses <= most_misses(0.05)
    assert equivalent <= most_misses(0.05)
    assert effects > N_SETS // 3 and equivalent > 0  # neither rule is met by never saying anything


def test_intervals_that_ignore_groups_cover_too_little():
    """The check of the checks: on grouped data the interval for independent items has to fail where ours
    pass."""
    rng, model, misses = np.random.default_rng(0), AnalyticModel(0.12, redraw=0.3), 0
    for _ in range(N_SETS):
        found, groups = draw(model, 400, False, rng, 4, 0.5)
        _, low, high = robust_mean(found["y_xz0"] - found["y_xz"], range(400), 0.95)
        misses += not low <= -model.share * model.scale <= high
    print(f"\nsingle items, groups of 4: coverage {1 - misses / N_SETS:.3f}")
    assert misses > 2 * most_misses(0.05)


def test_sign_flips_reject_no_effect_in_5_percent():
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(N_SETS):
        found, groups = draw(AnalyticModel(0.0, redraw=0.3), 80, False, rng, 4, 0.5)
        rejected += sign_flip(found["y_xz0"] - found["y_xz"], groups, n_perm=400) <= 0.05
    print(f"\nsign flips, groups of 4: rejected {rejected / N_SETS:.3f}")
    assert N_SETS * 0.05 - (most_misses(0.05) - N_SETS * 0.05) <= rejected <= most_misses(0.05)


@pytest.mark.parametrize("size, rho", [(1, 0.0), (4, 0.5)])
def test_mediation_covers_the_shares_of_the_model(size, rho):
    """A share of 0.3 of a total of 3: TE, NIE and the proportion mediated."""
    rng, model = np.random.default_rng(0), AnalyticModel(0.3, redraw=0.5)
    truth = {"TE": 3.0, "NIE": 0.9, "NIE0": 0.9, "NDE": 2.1, "NDE1": 2.1, "interaction": 0.0}
    misses = dict.fromkeys([*truth, "proportion"], 0)
    for _ in range(N_SETS):
        found, groups = draw(model, 200, False, rng, size, rho)
        result = mediate(**found, groups=groups, n_boot=500)
        for name, value in truth.items():
            misses[name] += not result[name]["ci95"][0] <= value <= result[name]["ci95"][1]
        low, high = result["proportion_mediated"]["ci95"]
        misses["proportion"] += not low <= 0.3 <= high
    print(f"\ngroups of {size}: coverage "
          + ", ".join(f"{name} {1 - k / N_SETS:.3f}" for name, k in misses.items()))
    assert max(misses.values()) <= most_misses(0.05)


@pytest.mark.parametrize("size, rho", [(1, 0.0), (4, 0.5)])
def test_mediation_of_shares_of_right_answers_covers(size, rho):
    rng, model, n_sets = np.random.default_rng(0), AnalyticModel(0.3, redraw=0.5), 100
    both, direct, latent, none = (model.accuracy(*parts) for parts in ((1, 1), (1, 0), (0, 1), (0, 0)))
    truth = {"TE": both - none, "NIE": both - direct, "NIE0": latent - none, "NDE": direct - none,
             "NDE1": both - latent,
             "interaction": both - direct - latent + none}
    misses = dict.fromkeys(truth, 0)
    for _ in range(n_sets):
        found, groups = draw(model, 200, True, rng, size, rho)
        result = mediate(**found, groups=groups, binary=True, n_boot=200)
        for name, value in truth.items():
            misses[name] += not result[name]["ci95"][0] <= value <= result[name]["ci95"][1]
    print(f"\naccuracy, groups of {size}: coverage " + ", ".join(f"{name} {1 - k / n_sets:.2f}" for name,
                                                                 k in misses.items()))
    assert max(misses.values()) <= most_misses(0.05, n_sets)
