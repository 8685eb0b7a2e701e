"""Comparing result files.    pytest tests/test_comparison.py"""
import pytest

from utils.evaluate.comparison import compare, compare_all, describe
from utils.jsonl import DataError, write_rows
from utils.stats import holm, mcnemar_exact, paired_interval, tango_ci


@pytest.fixture
def files(tmp_path):
    """Return write(first verdicts, second verdicts, fields of the nth row) -> two paths."""
    def write(*sides, name="f", **fields):
        for side, verdicts in enumerate(sides):
            write_rows(tmp_path / f"{name}{side}",
                       [{"id": str(n), "verdict": v, **{key: make(n) for key, make in fields.items()}}
                                                    for n, v in enumerate(verdicts)])
        return [str(tmp_path / f"{name}{side}") for side in range(len(sides))]
    return write


def test_two_results_of_independent_items(files):
    result = compare(files(["correct", "unresolved", "correct", "incorrect"],
                           ["incorrect", "correct", "correct", "correct"]))
    assert (result["n"], result["difference"], result["mcnemar_p"], result["p"],
            result["test"]) == (4, 0.25, 1.0, 1.0, "mcnemar")
    assert (result["right_to_wrong"], result["wrong_to_right"]) == (["0"], ["1", "3"])
    assert result["ci95"] == tango_ci(1, 2, 4, 0.95) and "+25.0 points" in describe(result)


def test_the_papers_gain_over_monet_cannot_be_shown_by_its_size(files):
    """164 against 159 of 191 on V*: even five questions gained and none lost is p 0.0625."""
    before, after = ["correct"] * 159 + ["incorrect"] * 32, ["correct"] * 164 + ["incorrect"] * 27
    result = compare(files(before, after))
    assert (result["p"], round(100 * result["difference"], 1)) == (0.0625, 2.6)


def test_groups_are_flipped_whole_and_errors_counted(files):
    paths = files(["error"] + ["correct"] * 4, ["correct"] * 3 + ["incorrect"] * 2,
                  group_id=lambda n: str(n // 2))
    result = compare(paths)
    assert (result["n"], result["errors"], result["incomplete"], result["difference"]) == (4, 1, True, -0.5)
    # two groups change, both down: 2 of 4 flips
    assert (result["test"], result["p"], result["groups"]) == ("sign_flip", 0.5, 3)
    assert result["ci95"] == paired_interval([1, 1, 1, 1], [1, 1, 0, 0], ["0", "1", "1", "2"], level=0.95)
    low, high = result["ci95_clustered"]
    assert low <= -0.5 <= high


def test_one_group_tells_nothing_of_others(files):
    result = compare(files(["correct"] * 3, ["incorrect"] * 3, group_id=lambda n: "g"))
    assert (result["p"], result["ci95"]) == (None, (-1.0, 1.0)) and "p -" in describe(result)


def test_several_benchmarks_and_several_pairs_are_adjusted_by_holm(files):
    one = files(["correct"] * 10 + ["incorrect"] * 10, ["correct"] * 4 + ["incorrect"] * 6 + ["correct"] * 10,
                benchmark=lambda n: ("a", "b")[n // 10])
    parts = compare(one)["benchmarks"]
    p = [mcnemar_exact(6, 0), mcnemar_exact(0, 10)]
    assert [parts[name]["p"] for name in "ab"] == p and [parts[name]["p_holm"] for name in "ab"] == holm(p)
    two = files(["correct"] * 4, ["incorrect"] * 4, name="g")
    both = compare_all([*one, *two])["comparisons"]
    assert [part["p_holm"] for part in both] == holm([part["p"] for part in both]) and both[1] == compare(
        two) | {
        "p_holm": both[1]["p_holm"]}
    with pytest.raises(DataError, match="3 files, expected pairs"):
        compare_all([*one, two[0]])


@pytest.mark.parametrize("sides, gold, match", [
    ((["error"], ["correct"]), "AA", "no item is answered in both"), ((["correct"], ["correct"]), "AB",
                                                                      "another gold"),
    ((["correct"], ["correct"] * 4), "AA", "3 items stand in one file only")])
def test_results_that_cannot_be_compared(files, tmp_path, sides, gold, match):
    paths = files(*sides)
    for side, (verdicts, letter) in enumerate(zip(sides, gold)):
        write_rows(paths[side], [{"id": str(n), "verdict": v, "gold": letter} for n,
                                 v in enumerate(verdicts)])
    with pytest.raises(DataError, match=match):
        compare(paths)


def test_other_prompts_are_counted(files):
    paths = files(["correct"] * 2, ["correct"] * 2, prompt_sha=lambda n: "x")
    write_rows(paths[1], [{"id": "0", "verdict": "correct", "prompt_sha": "x"},
                          {"id": "1", "verdict": "correct", "prompt_sha": "y"}])
    assert compare(paths)["other_prompts"] == 1
