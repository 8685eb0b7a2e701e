"""Comparing result files, and the paper's table with ours."""
import pytest

from utils.evaluate.comparison import compare, compare_all, describe, make_table
from utils.jsonl import DataError, write_json, write_rows
from utils.stats import holm, mcnemar_exact, paired_interval, tango_ci


@pytest.fixture
def files(tmp_path):
    """Return write(first verdicts, second verdicts, fields of the nth row) -> two paths."""
    def write(*sides, name="f", **fields):
        for side, verdicts in enumerate(sides):
            write_rows(tmp_path / f"{name}{side}", [
                {"id": str(n), "benchmark": None, "group_id": None, "verdict": verdict,
                 **{key: make(n) for key, make in fields.items()}}
                for n, verdict in enumerate(verdicts)])
        return [str(tmp_path / f"{name}{side}") for side in range(len(sides))]
    return write


def test_two_results_of_independent_items(files):
    """CapImagine's 164 against Monet's 159 of 191 on V*: even with five gained and none lost p is 0.0625."""
    result = compare(files(["correct", "unresolved", "correct", "incorrect"],
                           ["incorrect", "correct", "correct", "correct"]))
    assert (result["n"], result["difference"], result["test"]) == (4, 0.25, "mcnemar")
    assert result["mcnemar_p"] == result["p"] == 1.0
    assert (result["right_to_wrong"], result["wrong_to_right"]) == (["0"], ["1", "3"])
    assert result["ci95"] == tango_ci(1, 2, 4, 0.95) and "+25.0 points" in describe(result)
    result = compare(files(["correct"] * 159 + ["incorrect"] * 32, ["correct"] * 164 + ["incorrect"] * 27))
    assert (result["p"], round(100 * result["difference"], 1)) == (0.0625, 2.6)


def test_groups_are_flipped_whole_and_errors_counted(files):
    result = compare(files(["error"] + ["correct"] * 4, ["correct"] * 3 + ["incorrect"] * 2,
                           group_id=lambda n: str(n // 2)))
    assert (result["n"], result["errors"], result["incomplete"], result["difference"]) == (4, 1, True, -0.5)
    assert (result["test"], result["p"], result["groups"]) == ("sign_flip", 0.5, 3)  # two groups, both down
    assert result["ci95"] == paired_interval([1, 1, 1, 1], [1, 1, 0, 0], ["0", "1", "1", "2"], level=0.95)
    single = compare(files(["correct"] * 3, ["incorrect"] * 3, group_id=lambda n: "g"))
    assert (single["p"], single["ci95"]) == (None, (-1.0, 1.0)) and "p -" in describe(single)


def test_several_benchmarks_and_several_pairs_are_adjusted_by_holm(files):
    first = files(["correct"] * 10 + ["incorrect"] * 10,
                  ["correct"] * 4 + ["incorrect"] * 6 + ["correct"] * 10, benchmark=lambda n: "ab"[n // 10])
    parts, p = compare(first)["benchmarks"], [mcnemar_exact(6, 0), mcnemar_exact(0, 10)]
    assert [parts[name]["p"] for name in "ab"] == p
    assert [parts[name]["p_holm"] for name in "ab"] == holm(p)
    second = files(["correct"] * 4, ["incorrect"] * 4, name="g")
    both = compare_all([*first, *second])["comparisons"]
    assert [part["p_holm"] for part in both] == holm([part["p"] for part in both])
    assert both[1] == compare(second) | {"p_holm": both[1]["p_holm"]}
    with pytest.raises(DataError, match="3 files, expected pairs"):
        compare_all([*first, second[0]])


@pytest.mark.parametrize("sides, golds, match", [
    ((["error"], ["correct"]), "AA", "no item is answered in both"),
    ((["correct"], ["correct"]), "AB", "another gold"),
    ((["correct"], ["correct"] * 4), "AA", "3 items are in one file only"),
    ((["correct"], ["right"]), "AA", "id '0': verdict 'right', expected one of correct")])
def test_results_that_cannot_be_compared(files, sides, golds, match):
    paths = [files(verdicts, name=f"s{n}", gold=lambda _, gold=gold: gold)[0]
             for n, (verdicts, gold) in enumerate(zip(sides, golds))]
    with pytest.raises(DataError, match=match):
        compare(paths)


def test_judged_verdicts_are_compared_where_a_judge_read_both(files):
    verdicts, judge = ["correct"] + ["unresolved"] * 4, {"kind": "map", "model": "j"}
    paths = [files(verdicts, name=name, judge=lambda n: judge,
                   judged=["correct", "correct", third, "correct", "incorrect"].__getitem__)[0]
             for name, third in (("a", "incorrect"), ("b", "judge_error"))]
    found = compare(paths)
    assert found["accuracy"] == [0.2, 0.2] and found["judged"]["accuracy"] == [0.75, 0.75]
    assert (found["judged"]["judge_errors"], found["judged"]["judges"]) == (1, ["map:j"])
    assert "judged" not in compare([paths[0], files(verdicts, name="c")[0]])
    swapped = files(["correct"] * 5, name="d", judged=lambda n: "incorrect")[0]
    both = compare_all([paths[0], swapped, paths[1], swapped])["comparisons"]
    assert [part["judged"]["p_holm"] for part in both] == holm([part["judged"]["p"] for part in both])
    assert both[0]["judged"]["difference"] == -0.6 and both[0]["difference"] == 0.8


def test_other_prompts_are_counted(files):
    sides = [files(["correct"] * 2, name=name, prompt_sha=name.__getitem__)[0] for name in ("xx", "xy")]
    assert compare(sides)["other_prompts"] == 1


@pytest.fixture
def result(tmp_path):
    """Return write(name, verdicts by benchmark, fields of metrics) -> path of a result file."""
    def write(name, verdicts, **more):
        rows = [{"id": f"{benchmark}/{n}", "benchmark": benchmark, "group_id": None, "verdict": verdict}
                for benchmark, row in verdicts.items() for n, verdict in enumerate(row)]
        write_rows(tmp_path / name, rows)
        write_json(f"{tmp_path / name}.metrics.json", {
            "n": len(rows), "ci95": [0.5, 0.75], "chance": 0.36, "constant": {"accuracy": 0.372},
            "efficiency": {"seconds_per_item": 1.5, "tokens_per_item": 80.0},
            "protocol": {"model": "runs/mine", "method": "text", "line": "protocol=monet"}, **more})
        return str(tmp_path / name)
    return write


def row_of(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_our_numbers_are_next_to_the_papers_and_missing_ones_are_marked(result):
    path = result("v.jsonl", {"vstar": ["correct"] * 164 + ["incorrect"] * 27})
    table = make_table([f"CapImagine={path}", path])
    cells = row_of(table, "CapImagine")
    assert cells[:3] == ["85.9 (85.9)", "not run (74.1)", "not run (70.7)"] and cells[-1] == "not run (70.7)"
    assert row_of(table, "mine (text)") == ["85.9", *["-"] * 9]
    assert row_of(table, "DeepEyes")[0] == "not run (90.0)" and row_of(table, "DeepEyes")[4] == "-"
    assert "| CapImagine | vstar | 191 | 50.0 to 75.0 | 36.0 | 37.2 | 1.5 | 80.0 | protocol=monet |" in table


def test_tables_overall_needs_all_three_splits_and_failures_give_no_number(result):
    two = result("two.jsonl", {"tablevqa/vwtq": ["correct"] + ["incorrect"] * 3,
                               "tablevqa/vwtq_syn": ["correct", "incorrect"]})
    assert row_of(make_table([f"Monet={two}"]), "Monet")[6:] == [
        "25.0 (55.3)", "50.0 (60.4)", "not run (78.8)", "not run (64.8)"]
    third = result("third.jsonl", {"tablevqa/vtabfact": ["correct"] * 4})  # (25 + 50 + 100) / 3
    assert row_of(make_table([f"Monet={two}", f"Monet={third}"]), "Monet")[-1] == "58.3 (64.8)"
    failed = result("failed.jsonl", {"vstar": ["correct", "error"]})
    assert row_of(make_table([f"Monet={failed}"]), "Monet")[0] == "incomplete (1 of 2 failed) (83.3)"


def test_files_that_cannot_be_tabulated(result, tmp_path):
    path = result("v.jsonl", {"vstar": ["correct"]})
    with pytest.raises(DataError, match="vstar is already in row 'mine"):
        make_table([path, path])
    (tmp_path / "alone.jsonl").write_text("")
    with pytest.raises(DataError, match="alone.jsonl.metrics.json: damaged .*run evaluate.py again"):
        make_table([str(tmp_path / "alone.jsonl")])
    for field in ({"ci95": "wide"}, {"ci95": [0.5]}, {"chance": "a third"}, {"protocol": {"model": "m"}},
                  {"efficiency": None}):
        with pytest.raises(DataError, match="damaged, or not of one run with .*metrics.json"):
            make_table([result("v.jsonl", {"vstar": ["correct"]}, **field)])
    with pytest.raises(DataError, match="not of one run with .*KeyError: 'judged'"):
        make_table([result("v.jsonl", {"vstar": ["correct"]}, with_judge={"ci95": None})])
