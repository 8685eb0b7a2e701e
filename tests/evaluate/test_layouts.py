"""Rows of each published layout become items, without loss or with an error."""
import hashlib
import re
from dataclasses import replace

import pytest
from benchmark_fixtures import EXPECTED, picture, prepared, read_rows, sized, struct, write_parquet, write_tsv
from samples import table

from utils.evaluate.benchmarks import TABLE, prepare
from utils.items import ANSWER_TYPES, read_items
from utils.jsonl import DataError, write_rows


@pytest.mark.parametrize("name, source", EXPECTED)
def test_every_layout_comes_through_without_loss(tmp_path, name, source):
    items = prepared(tmp_path, name, source)
    assert [item["id"] for item in items] == list(EXPECTED[name, source])
    for item, fields in zip(items, EXPECTED[name, source].values()):
        digests = [image["sha256"] for image in item["images"]]
        assert item["benchmark"] == name and item | fields == item | {"sha256": digests}
        for image, digest in zip(item["images"], digests):
            assert hashlib.sha256((tmp_path / image["path"]).read_bytes()).hexdigest() == digest
            assert re.fullmatch(r"out\.images/[0-9a-f]{16}\.(jpg|png)", image["path"])
    write_rows(tmp_path / "out.jsonl", items)
    assert read_items(tmp_path / "out.jsonl", metrics=tuple(ANSWER_TYPES)) == items


@pytest.mark.parametrize("name, source", [
    ("vstar", "vstar.tsv"), ("hrbench_4k", "hrbench_repeated.tsv"), ("mme_realworld_lite", "realworld.tsv"),
    ("tablevqa/vtabfact", "tables.tsv")])
def test_raw_is_the_row_without_its_pictures(tmp_path, name, source):
    rows = [{column: cell for column, cell in row.items() if column != "image"} for row in read_rows(source)]
    items = prepared(tmp_path, name, source)
    assert all(item["raw"] in rows for item in items) and len(items) == len(EXPECTED[name, source])


def test_options_can_be_joined_again_as_the_source_has_them(tmp_path):
    for item in prepared(tmp_path, "mme_realworld_lite", "realworld.parquet"):
        joined = [f"({letter}) {text}" for letter, text in item["options"]]
        assert joined == item["raw"]["multi-choice options"]


@pytest.mark.parametrize("case", table("broken_benchmarks"), ids=lambda case: case["match"])
def test_a_broken_file_is_named(tmp_path, case):
    """The second row of a file is changed or (null) left out, or the rows are the case's own."""
    if name := case.get("source"):
        first, second, *rest = read_rows(name)
        rows = [first, *([] if case["change"] is None else [second | case["change"]]), *rest]
        bench = sized(case["benchmark"], name)
    else:
        rows, bench = case["rows"], TABLE[case["benchmark"]]
    path = write_tsv(tmp_path / "broken.tsv", rows)
    with pytest.raises(DataError, match=case["match"]):
        prepare(bench, tmp_path / "images", path)


QUESTION = {"image": struct(picture(1)), "question": "q"}
FIRST, SECOND = read_rows("BLINK/Jigsaw/val-00000-of-00001.parquet")


@pytest.mark.parametrize("name, rows, match", [
    ("tablevqa/vtabfact", [QUESTION | {"qa_id": "1", "gt": 2}], "gold '2', expected the text '1' or '0'"),
    ("tablevqa/vwtq", [QUESTION | {"qa_id": "1", "gt": " "}], "row 0: column 'gt' is empty"),
    ("mme", [QUESTION | {"question_id": "a.jpg", "answer": "Yes", "category": "c"}],
     r"1 of 1 pictures have no pair.*\['yes'\]; expected as many"),
    ("blink/Jigsaw", [FIRST, SECOND | {"image_3": None}],
     "row 1: item 'blink/Jigsaw/val_Jigsaw_1': 2 pictures, expected 3"),
    ("blink/Jigsaw", [FIRST, SECOND | {"image_2": None}],
     "pictures in image_1, image_3, expected them from image_1 on without a gap"),
    ("blink/Jigsaw", [FIRST, SECOND | {"answer": "hidden"}], "answer 'hidden', expected a letter"),
    ("blink/Jigsaw", [FIRST, SECOND | {"answer": "(C)"}], "gold 'C' and letters")])
def test_a_broken_row_of_parquet_is_named(tmp_path, name, rows, match):
    path = write_parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError, match=match):
        prepare(replace(TABLE[name], n=len(rows)), tmp_path / "images", path)
