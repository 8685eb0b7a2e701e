"""The paper's table beside ours.    pytest tests/test_main_table.py"""
import re
from pathlib import Path

import pytest

from utils.evaluate.results import COLUMNS, PAPER, make_table
from utils.jsonl import DataError, write_json, write_rows

PAPER_PAGE = Path(__file__).parents[3] / "shared" / "reference" / "paper.md"


@pytest.fixture
def result(tmp_path):
    """Return write(name, verdicts by benchmark, model) -> path of a result file with its metrics."""
    def write(name, verdicts, model="runs/mine", **more):
        rows = [{"id": f"{benchmark}/{n}", "benchmark": benchmark, "verdict": verdict}
                for benchmark, its in verdicts.items() for n, verdict in enumerate(its)]
        write_rows(tmp_path / name, rows)
        write_json(f"{tmp_path / name}.metrics.json", {
            "n": len(rows), "ci95": [0.5, 0.75], "chance": 0.36, "efficiency": {"seconds_per_item": 1.5,
                                                                                "tokens_per_item": 80.0},
            "protocol": {"model": model, "method": "text", "line": "protocol=monet"}, **more})
        return str(tmp_path / name)
    return write


def row_of(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_our_numbers_stand_beside_the_papers_and_what_was_not_run_says_so(result):
    right = ["correct"] * 164 + ["incorrect"] * 27
    path = result("v.jsonl", {"vstar": right})
    table = make_table([f"CapImagine={path}", path])
    cells = row_of(table, "CapImagine")
    assert cells[:3] == ["85.9 (85.9)", "not run (74.1)", "not run (70.7)"] and cells[-1] == "not run (70.7)"
    assert row_of(table, "mine (text)") == ["85.9", *["-"] * 9]
    assert row_of(table, "DeepEyes")[0] == "not run (90.0)" and row_of(table, "DeepEyes")[4] == "-"
    assert "| CapImagine | vstar | 191 | 50.0 to 75.0 | 36.0 | 1.5 | 80.0 | protocol=monet |" in table


def test_tables_overall_needs_all_three_splits_and_failures_are_no_number(result):
    splits = {"tablevqa/vwtq": ["correct", "incorrect", "incorrect", "incorrect"],
              "tablevqa/vwtq_syn": ["correct", "incorrect"]}
    two = result("two.jsonl", splits)
    assert row_of(make_table([f"Monet={two}"]), "Monet")[6:] == ["25.0 (55.3)", "50.0 (60.4)",
                                                                 "not run (78.8)", "not run (64.8)"]
    third = result("third.jsonl", {"tablevqa/vtabfact": ["correct"] * 4})
    # (25 + 50 + 100) / 3
    assert row_of(make_table([f"Monet={two}", f"Monet={third}"]), "Monet")[-1] == "58.3 (64.8)"
    broken = result("broken.jsonl", {"vstar": ["correct", "error"]})
    assert row_of(make_table([f"Monet={broken}"]), "Monet")[0] == "incomplete (1 of 2 failed) (83.3)"


def test_a_benchmark_twice_in_a_row_and_a_file_without_metrics_are_refused(result, tmp_path):
    path = result("v.jsonl", {"vstar": ["correct"], "vstar_inline": ["correct"]})
    with pytest.raises(DataError, match="vstar stands already in row 'mine"):
        make_table([path, path])
    (tmp_path / "alone.jsonl").write_text("")
    with pytest.raises(DataError, match="expected a result file with its metrics"):
        make_table([str(tmp_path / "alone.jsonl")])


@pytest.mark.skipif(not PAPER_PAGE.is_file(), reason=f"no notes on the paper at {PAPER_PAGE}")
def test_the_papers_numbers_are_those_of_its_page():
    page = PAPER_PAGE.read_text()
    for name, numbers in PAPER.items():
        line = re.search(rf"^\| {re.escape(name)} \| (?:closed|base|tool|latent|text) \| (.*) \|$", page,
                         re.MULTILINE)[1]
        assert [None if cell == "-" else float(cell) for cell in line.split(" | ")] == list(numbers[:6])
        tables = re.search(rf"{name} ([\d.]+) / ([\d.]+) / ([\d.]+) / ([\d.]+)\b", " ".join(page.split()))
        assert [float(cell) for cell in tables.groups()] == list(numbers[6:]) if numbers[6] else numbers[
            6:] == (None,) * 4
    assert len(COLUMNS) + 1 == 10
