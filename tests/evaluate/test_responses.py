"""Replies made elsewhere: three forms of files, and which reply belongs to which item."""
import csv
import json
import sys
from types import SimpleNamespace

import pytest
from samples import table

from utils.evaluate.answering import is_other_gold, read_replies
from utils.jsonl import DataError, write_rows


def item(name: str, gold: str = "A", **more) -> dict:
    return {"id": name, "benchmark": "vstar", "options": [["A", "red"], ["B", "dark red."]],
            "answer": {"type": "letter", "value": gold}} | more


ITEMS = [item("vstar/7"), item("vstar/9", "B"), item("vstar/12")]


def texts(replies: list[dict]) -> list[str]:
    return [reply.get("error") or reply["clean_output"] for reply in replies]


def sheet(path, rows, delimiter):
    """Write rows as VLMEvalKit does: all cells quoted."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def jsonl(path, rows):
    write_rows(path, rows)
    return str(path)


def test_our_own_form(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [
        {"id": "vstar/9", "text": " B\n", "finish_reason": "length"}, {"id": "vstar/7", "text": "red"},
        {"id": "vstar/7", "text": "red"}, {"id": "other", "text": "A"}])
    replies, counts = read_replies(path, ITEMS)
    assert replies[1] == {"raw_output": " B\n", "clean_output": "B", "finish_reason": "length"}
    assert replies[0]["finish_reason"] is None and texts(replies) == ["red", "B", "no_response"]
    assert counts == {"file": path, "form": "ours", "rows": 4, "of_no_item": 1, "doubled": 1,
                      "no_response": 1, "different_responses": 0, "failed_call": 0}


def test_how_replies_ended_is_read_as_of_a_server(tmp_path):
    """A reply that was refused or lost is none."""
    path = jsonl(tmp_path / "r.jsonl", [
        {"id": "vstar/7", "text": "A", "finish_reason": {"type": "end_turn"}},
        {"id": "vstar/9", "text": "A", "finish_reason": "content_filter"},
        {"id": "vstar/12", "text": "", "finish_reason": "abort"}])
    replies, counts = read_replies(path, ITEMS)
    assert replies[0]["finish_reason"] == "stop" and texts(replies)[1:] == ["failed_call"] * 2
    assert counts["failed_call"] == 2


def test_two_replies_that_differ_are_no_reply(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"id": "vstar/7", "text": text} for text in "AB"])
    replies, counts = read_replies(path, ITEMS[:1])
    assert texts(replies) == ["different_responses"] == [
        name for name in ("no_response", "different_responses") if counts[name]]


PREDICTIONS = [{"index": "12", "answer": "A", "prediction": "The, \"cup\"\nis red"},
               {"index": "7", "answer": "A", "prediction": ""},
               {"index": "9", "answer": "B", "prediction": "Failed to obtain answer via API."}]


@pytest.mark.parametrize("suffix, delimiter", [("tsv", "\t"), ("csv", ",")])
def test_predictions_of_vlmevalkit_by_index(tmp_path, suffix, delimiter):
    replies, counts = read_replies(sheet(tmp_path / f"p.{suffix}", PREDICTIONS, delimiter), ITEMS)
    assert texts(replies) == ["", "failed_call", 'The, "cup"\nis red']
    assert (counts["form"], counts["failed_call"], counts["no_response"]) == ("vlmevalkit", 1, 0)


def test_rotations_are_told_apart_and_a_list_of_records_is_read(tmp_path):
    items = [item(f"hrbench_4k/3/{cycle}", benchmark="hrbench_4k") for cycle in range(2)]
    rows = [{"index": 3, "cycle_category": cycle, "answer": "A", "prediction": f"said {cycle}"}
            for cycle in (1, 0)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert texts(read_replies(str(tmp_path / "p.json"), items)[0]) == ["said 0", "said 1"]


def test_a_workbook_needs_openpyxl_or_is_asked_for_as_tsv(tmp_path, monkeypatch):
    """The library is no requirement: here one with its interface, and none."""
    lines = [("index", "answer", "prediction"), (7, "A", "red"), (9, "B", None), (12, "A", 4), (None,) * 3]
    page = SimpleNamespace(iter_rows=lambda values_only: iter(lines))
    library = SimpleNamespace(load_workbook=lambda path, read_only: SimpleNamespace(worksheets=[page]))
    monkeypatch.setitem(sys.modules, "openpyxl", library)
    assert texts(read_replies(str(tmp_path / "p.xlsx"), ITEMS)[0]) == ["red", "", "4"]
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match="p.xlsx: openpyxl is not installed; save as TSV or CSV"):
        read_replies(str(tmp_path / "p.xlsx"), ITEMS)


def test_samples_of_lmms_eval_by_place(tmp_path):
    path = jsonl(tmp_path / "20260806_samples_vstar_bench.jsonl", [
        {"doc_id": 2, "target": "(A)", "filtered_resps": "red"},
        {"doc_id": 0, "target": "A", "resps": [["It is A."]], "filtered_resps": ["A"]},
        {"doc_id": 1, "target": "dark red", "resps": ["B it is"], "filtered_resps": "B"}])
    replies, counts = read_replies(path, ITEMS)
    assert texts(replies) == ["It is A.", "B it is", "red"] and counts["form"] == "lmms-eval"
    with pytest.raises(DataError, match="2 golds are not the items' .*r.jsonl:1 has 'A', 'vstar/9' 'B'"):
        read_replies(jsonl(tmp_path / "r.jsonl", [{"doc_id": n, "target": gold, "resps": ["A"]}
                                                  for n, gold in ((1, "A"), (2, "B"), (0, "A"))]), ITEMS)


@pytest.mark.parametrize("rows, match", [case.values() for case in table("bad_responses")])
def test_files_that_cannot_be_read(tmp_path, rows, match):
    with pytest.raises(DataError, match=match):
        read_replies(jsonl(tmp_path / "r.jsonl", rows), ITEMS)


def test_a_name_in_two_benchmarks_names_no_item(tmp_path):
    items = [item("vstar/7"), item("mme/7", benchmark="mme")]
    path = jsonl(tmp_path / "r.jsonl", [{"index": 7, "prediction": "A"}])
    with pytest.raises(DataError, match="item 'mme/7': duplicate id '7'"):
        read_replies(path, items)
    with pytest.raises(DataError, match="items of 2 benchmarks; expected one"):
        read_replies(jsonl(tmp_path / "s.jsonl", [{"doc_id": 0, "target": "A", "resps": "A"}]), items)


@pytest.mark.parametrize("kind, own, gold, other", [case.values() for case in table("golds")])
def test_a_gold_that_can_be_read_must_be_the_item_s(kind, own, gold, other):
    assert is_other_gold(item("i", answer={"type": kind, "value": own}), gold) is other
    equal = item("i", options=[["A", "red"], ["B", "red"]], answer={"type": "letter", "value": "A"})
    assert not is_other_gold(equal, "red") and is_other_gold(equal, "B")
