"""Score formulas against the published tables and against counts by hand.    pytest tests/test_scores.py"""
import random

import pytest

from utils.evaluate.scoring import macro, micro, rotations
from utils.stats import chance

# Every percentage of the paper's tables with the count that it implies: (n, {percent: count})
V_STAR = {67.5: 129, 76.4: 146, 80.6: 154, 90.0: 172, 81.7: 156, 83.3: 159, 85.9: 164, 82.7: 158, 79.6: 152,
          22.5: 43}
HR_4K = {59.0: 472, 68.0: 544, 72.9: 583, 75.1: 601, 70.8: 566, 71.0: 568, 74.1: 593, 72.5: 580, 24.0: 192,
         71.1: 569,
         70.1: 561, 70.7: 566}
HR_8K = {55.5: 444, 63.8: 510, 66.9: 535, 72.6: 581, 63.0: 504, 68.0: 544, 70.7: 566, 69.8: 558, 69.3: 554,
         67.9: 543}
MME_LITE = {52.0: 998, 45.8: 879, 53.2: 1021, 50.6: 971, 46.9: 900, 54.8: 1052, 49.7: 954, 46.2: 887}
JIGSAW = {55.3: 83, 62.7: 94, 52.0: 78, 50.0: 75, 64.7: 97}
MULTI_VIEW = {59.4: 79, 42.9: 57, 46.6: 62, 47.4: 63, 49.6: 66}
HALVES = {80.3: 321, 55.8: 223, 88.5: 354, 59.8: 239, 20.0: 80, 28.0: 112}  # FSP and FCP, 400 rows each
PUBLISHED = [(n, percent, count) for n, table in (
    (191, V_STAR), (115, {77.4: 89, 87.8: 101, 20.0: 23}), (76, {75.0: 57, 82.9: 63, 26.3: 20}), (800, HR_4K),
    (800, HR_8K),
    (400, HALVES), (1919, MME_LITE), (150, JIGSAW), (133, MULTI_VIEW), (750, {55.3: 415, 60.9: 457}),
    (250, {60.4: 151, 78.8: 197, 68.0: 170, 83.2: 208}), (400, {64.2: 257, 77.0: 308})) for percent,
    count in table.items()]


def hits(k, n):
    return [True] * k + [False] * (n - k)


@pytest.mark.parametrize("n, percent, count", PUBLISHED)
def test_published_percentages_come_from_whole_counts(n, percent, count):
    assert 100 * micro({"all": hits(count, n)}) == pytest.approx(percent, abs=0.055)


@pytest.mark.parametrize("direct, spatial, whole", [((89, 115), (57, 76), 76.4), ((101, 115), (63, 76), 85.9),
                                                    ((23, 115), (20, 76), 22.5)])
def test_v_star_overall_weights_its_categories_by_items(direct, spatial, whole):
    parts = {"direct": hits(*direct), "spatial": hits(*spatial)}
    assert round(100 * micro(parts), 1) == whole != round(100 * macro(parts), 1)


@pytest.mark.parametrize("counts, mean, by_items", [((415, 151, 197), 64.8, 61.0),
                                                    ((457, 170, 208), 70.7, 66.8)])
def test_table_vqa_overall_is_the_mean_of_three_splits(counts, mean, by_items):
    """Monet's and CapImagine's rows: the published 64.8 and 70.7 are the macro mean."""
    parts = {name: hits(k, n) for name, k, n in zip(("vwtq", "vwtq_syn", "vtabfact"), counts,
                                                    (750, 250, 250))}
    assert (round(100 * macro(parts), 1), round(100 * micro(parts), 1)) == (mean, by_items)


@pytest.mark.parametrize("single, cross, whole", [(321, 223, 68.0), (354, 239, 74.1), (80, 112, 24.0)])
def test_hr_bench_is_the_mean_over_rotations(single, cross, whole):
    """100 single and 100 cross questions in four rotations; the whole is (FSP + FCP) / 2 and the plain mean.
    """
    rng, answers = random.Random(0), hits(single, 400) + hits(cross, 400)
    rows = [(row // 4, row % 4, right) for row, right in enumerate(answers)]
    rng.shuffle(rows)
    average = rotations(rows)["average"]
    assert average == pytest.approx(sum(answers) / 800) and average == pytest.approx((single + cross) / 800)
    assert 100 * average == pytest.approx(whole, abs=0.05)


def test_missing_rows_move_the_mean_over_rotations_off_the_plain_mean():
    """Rotation 0: 1 of 4 right; rotation 1: 1 of 2 right."""
    found = rotations([(q, 0, q == 0) for q in range(4)] + [(0, 1, True), (1, 1, False)])
    assert found == {"average": 0.375, "by_rotation": {0: 0.25, 1: 0.5}, "all_right": None, "complete": 0}


def test_a_question_counts_as_all_right_only_with_all_four():
    # question 2 lacks a rotation
    rows = [(q, r, not (q == 1 and r == 3)) for q in range(3) for r in range(4)][:-1]
    found = rotations(rows)
    assert (found["all_right"], found["complete"]) == (0.5, 2)


@pytest.mark.parametrize("rows", [[(1, 4, True)], [(1, "0", True)], [(1, 0, True), (1, 0, True)], []])
def test_rotations_are_checked(rows):
    with pytest.raises(ValueError):
        rotations(rows)


def test_chance_is_one_in_the_options_of_each_item():
    assert round(100 * chance([4] * 107 + [2] * 84), 1) == 36.0  # V*
    assert chance([2] * 150) == 0.5 and chance([5] * 1919) == pytest.approx(0.2)


@pytest.mark.parametrize("score", [lambda: micro({"a": []}), lambda: macro({"a": [True], "b": []}),
                                   lambda: macro({}),
                                   lambda: chance([]), lambda: chance([4, 0])])
def test_nothing_has_no_score(score):
    with pytest.raises(ValueError):
        score()
