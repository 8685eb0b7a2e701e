"""Sample sizes against published values, exact sums and simulated groups.    pytest tests/test_planner.py"""
import itertools
import math

import pytest
from analytic import trinomial

from utils.intervene.mediation import (detectable_difference, items_for_margin, items_with_no_change,
                                       margin_for_items)
from utils.stats import tost_tango


def test_golden_values():
    assert items_for_margin(0.1, 0.01) == 8564
    assert [items_for_margin(sd * sd, margin) for sd, margin in ((0.2, 0.05), (0.3, 0.05), (0.5, 0.1))] == [
        138, 309, 215]
    assert items_with_no_change(0.01) == 268


@pytest.mark.parametrize("discordance, items", [(0.02, (1713, 429, 191, 69)), (0.05, (4283, 1071, 476, 172)),
                                                (0.1, (8565, 2142, 952, 343)),
                                                (0.2, (17129, 4283, 1904, 686))])
def test_items_of_the_table(discordance, items):
    """The table was computed with quantiles of four digits: one item more in places."""
    found = [items_for_margin(discordance, margin) for margin in (0.01, 0.02, 0.03, 0.05)]
    assert all(table - 1 <= n <= table for n, table in zip(found, items))


@pytest.mark.parametrize("discordance, points", [(0.02, (3.0, 1.5, 0.9)), (0.05, (4.7, 2.3, 1.5)),
                                                 (0.1, (6.7, 3.3, 2.1)),
                                                 (0.2, (9.5, 4.6, 3.0))])
def test_margins_of_the_table(discordance, points):
    assert [round(100 * margin_for_items(discordance, n), 1) for n in (191, 800, 1919)] == list(points)


@pytest.mark.parametrize("n, points", [(191, (4.5, 6.4, 9.1)), (72, (7.4, 10.4, 14.8))])
def test_detectable_differences_of_the_table(n, points):
    assert [round(100 * detectable_difference(discordance, n), 1) for discordance in (0.05, 0.1,
                                                                                      0.2)] == list(points)


@pytest.mark.parametrize("discordance, margin", list(itertools.product((0.02, 0.1), (0.01, 0.05))))
def test_items_and_margins_are_inverse(discordance, margin):
    n = items_for_margin(discordance, margin)
    assert margin_for_items(discordance, n) <= margin < margin_for_items(discordance, n - 1)


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.03, 0.1])
def test_fewer_items_cannot_show_equivalence_even_if_nothing_changes(margin):
    n = items_with_no_change(margin)
    assert tost_tango(0, 0, n, margin) < 0.05 <= tost_tango(0, 0, n - 1, margin)


@pytest.mark.parametrize("discordance, margin, expected", [(0.02, 0.02, 0.67), (0.05, 0.05, 0.67),
                                                           (0.02, 0.01, 0.76),
                                                           (0.1, 0.05, 0.76), (0.1, 0.03, 0.79),
                                                           (0.2, 0.05, 0.80)])
def test_the_planned_items_have_the_power_that_the_docstring_states(discordance, margin, expected):
    """Exact power of the score test at the planned number of items, by summing over all data; the plan is
    approximate."""
    n = items_for_margin(discordance, margin)
    counts = trinomial(n, discordance / 2, discordance / 2)
    power = sum(p for b, c, p in counts if tost_tango(b, c, n, margin) < 0.05)
    print(f"discordance {discordance}, margin {margin}: {n} items, power {100 * power:.1f} %")
    assert power == pytest.approx(expected, abs=0.006)


def test_mcnemar_finds_the_detectable_difference_as_often_as_planned():
    n, discordance = 400, 0.1
    change = detectable_difference(discordance, n)
    counts = trinomial(n, (discordance - change) / 2, (discordance + change) / 2)
    power = sum(p for b, c, p in counts if abs(c - b) > 1.959964 * math.sqrt(b + c))
    assert power == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("call", [lambda: items_for_margin(0, 0.01), lambda: items_for_margin(0.1, 0),
                                  lambda: margin_for_items(0.1, 0), lambda: margin_for_items(math.nan, 10),
                                  lambda: items_with_no_change(1), lambda: detectable_difference(0.1, -1)])
def test_no_plan_without_sense(call):
    with pytest.raises(ValueError):
        call()
