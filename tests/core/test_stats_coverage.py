"""How often intervals cover and tests of equivalence err on data sets of known truth; `-s` prints the rates.

Misses are accepted if as many or more have a probability above 1 in 1000 (exact binomial): at 5 % at most 41.
"""
import math

import numpy as np
import pytest
from analytic import AnalyticModel, draw, most_misses

from utils.intervene.mediation import items_needed, items_with_no_change, mediate
from utils.stats import paired_interval, paired_readings, robust_mean, share_interval, tost

N_SETS = 500
DESIGNS = {"20 groups of 3": [3] * 20, "16 of 4": [4] * 16, "50 of 4": [4] * 50, "200 of 4": [4] * 200,
           "one of 30 and 30 of 1": [30] + [1] * 30}


def draw_shared(rng, sizes, rho, draw_one):
    """Return (outcomes, groups): each item takes its group's outcome with probability sqrt(rho)."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared, own = draw_one(len(sizes))[groups], draw_one(len(groups))
    return np.where(rng.random(len(groups)) < math.sqrt(rho), shared, own), groups.tolist()


@pytest.mark.numeric
@pytest.mark.parametrize("rho", [0, 0.5, 1])
@pytest.mark.parametrize("design", DESIGNS)
def test_groups_that_move_together_are_not_called_equivalent(design, rho):
    """The true change is the margin; either all changes go one way, or some go back."""
    for margin in (0.05, 0.10):
        for lost, won in ((margin, 0.0), (margin + 0.03, 0.03)):
            rng, n_equivalent, covered = np.random.default_rng(0), 0, 0
            for k in range(300):
                changes, groups = draw_shared(rng, DESIGNS[design], rho, lambda n: rng.choice(
                    (-1, 0, 1), size=n, p=(lost, 1 - lost - won, won)))
                pair = (changes < 0).astype(int), (changes > 0).astype(int)
                n_equivalent += tost(paired_readings(*pair, groups), margin) < 0.05
                if k < 100:
                    low, high = paired_interval(*pair, groups, 0.90)
                    covered += low <= -margin <= high
            print(f"{design}, rho {rho}, change -{margin:.2f} ({lost:.2f} lost): equivalent in "
                  f"{n_equivalent / 3:.1f} %, the 90 % interval covers in {covered} %")
            assert n_equivalent <= most_misses(0.05, 300) and 100 - covered <= most_misses(0.10, 100)


@pytest.mark.numeric
@pytest.mark.parametrize("rho", [0, 0.5, 1])
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_of_shares_and_means_cover_in_groups(design, rho):
    rng, missed = np.random.default_rng(0), {"share": 0, "mean": 0}
    for _ in range(400):
        hits, groups = draw_shared(rng, DESIGNS[design], rho, lambda n: (rng.random(n) < 0.1).astype(int))
        low, high = share_interval(hits, groups)
        missed["share"] += not low <= 0.1 <= high
        shared, own = rng.standard_normal(len(DESIGNS[design]))[groups], rng.standard_normal(len(groups))
        _, low, high = robust_mean(math.sqrt(rho) * shared + math.sqrt(1 - rho) * own, groups, 0.95)
        missed["mean"] += not low <= 0 <= high
    print(f"{design}, rho {rho}: missed", missed)
    assert max(missed.values()) <= most_misses(0.05, 400)


@pytest.mark.numeric
@pytest.mark.parametrize("rho", [0, 1])
def test_as_many_groups_as_planned_show_the_margin(rho):
    """docs/interventions.md: 374 groups of 4 for 5 points if 10 % of the answers change and cancel out."""
    rng, shown = np.random.default_rng(0), 0
    assert items_needed(0.1, 0.05) == 374 and items_with_no_change(0.05) == 52
    for _ in range(200):
        changes, groups = draw_shared(rng, [4] * 374, rho, lambda n: rng.choice(
            (-1, 0, 1), size=n, p=(0.05, 0.9, 0.05)))
        readings = paired_readings((changes < 0).astype(int), (changes > 0).astype(int), groups)
        shown += tost(readings, 0.05) < 0.05
    print(f"374 groups of 4, rho {rho}: the margin is shown in {shown / 2:.1f} %")
    assert shown >= 200 * 0.8 - 3 * math.sqrt(200 * 0.8 * 0.2)


@pytest.mark.parametrize("size, rho", [(1, 0.0), (4, 0.5)])
@pytest.mark.parametrize("binary, n_sets", [(False, N_SETS), (True, 100)], ids=["gold logit", "accuracy"])
def test_mediation_covers_the_shares_of_the_model(binary, n_sets, size, rho):
    """The latents carry a share of 0.3 of a total of 3 nats."""
    rng, model = np.random.default_rng(0), AnalyticModel(0.3, redraw=0.5)
    truth = {"TE": 3.0, "NIE": 0.9, "NIE0": 0.9, "NDE": 2.1, "NDE1": 2.1, "interaction": 0.0}
    if binary:
        both, direct, latent, none = (model.accuracy(*parts) for parts in ((1, 1), (1, 0), (0, 1), (0, 0)))
        truth = {"TE": both - none, "NIE": both - direct, "NIE0": latent - none, "NDE": direct - none,
                 "NDE1": both - latent, "interaction": both - direct - latent + none}
    misses = dict.fromkeys(truth if binary else [*truth, "proportion_mediated"], 0)
    for _ in range(n_sets):
        sample, groups = draw(model, 200, binary, rng, size, rho)
        result = mediate(**sample, groups=groups, binary=binary)
        for name in misses:
            low, high = result[name]["ci95"]
            misses[name] += not low <= truth.get(name, 0.3) <= high
    print(f"\ngroups of {size}: coverage", {name: round(1 - k / n_sets, 3) for name, k in misses.items()})
    assert max(misses.values()) <= most_misses(0.05, n_sets) and most_misses(0.05, 500) == 41
