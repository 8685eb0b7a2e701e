"""Rows of each published layout become items, without loss or with an error."""
import hashlib
import re
from dataclasses import replace

import pytest
from benchmark_fixtures import (EXPECTED, picture, prepared, read_rows, sized, struct, text_of, write_parquet,
                                write_tsv)

from utils.evaluate.benchmarks import TABLE, prepare
from utils.items import ANSWER_TYPES, read_items
from utils.jsonl import DataError, write_rows

HUB_BLINK = "BLINK/Jigsaw/val-00000-of-00001.parquet"


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


def broken(tmp_path, rows, change):
    """Write a TSV whose second row is changed, or left out (None)."""
    second = [] if change is None else [rows[1] | change]
    return write_tsv(tmp_path / "broken.tsv", [rows[0], *second, *rows[2:]])


FAULTS = {"vstar": [
    (None, r"broken.tsv: 3 items, .*expected 4, .*direct_attributes"),
    ({"category": "relative_position"},
     r"4 items, \{'direct_attributes': 1, 'relative_position': 3\}; expected 4"),
    ({"category": "OCR"}, r"4 items, .*'OCR': 1"),
    ({"answer": "E"}, r"broken.tsv:3: item 'vstar/1': gold 'E' and letters \['A', 'B', 'C', 'D'\]"),
    ({"B": ""}, r"broken.tsv:3: item 'vstar/1': gold 'B' and letters \['A', 'C', 'D'\]"),
    ({"index": 0}, r"broken.tsv:3: duplicate id 'vstar/0', first seen at .*broken.tsv:2"),
    ({"image": ""}, "broken.tsv:3: column 'image' is empty"),
    ({"image": "!" * 80}, "broken.tsv:3: the picture '!!!!.*not base64"),
    ({"image": text_of(b"no picture at all" * 8)}, "broken.tsv:3: 136 bytes are not a picture"),
    ({"image": "77"}, "broken.tsv:3: the picture is that of row '77', which has none"),
    ({"image": repr([text_of(picture(n)) for n in (1, 2)])},
     "broken.tsv:3: item 'vstar/1': 2 pictures, expected 1")], "hrbench": [
    ({"question": "Another?"},
     r"2 of 3 questions do not occur in four rotations.*expected 0, 1, 2, 3"),
    ({"cycle_category": "1"}, r"1 of 2 questions do not .* with \['1', '1', '2', '3'\]"),
    ({"image": text_of(picture(9))}, "2 of 3 questions do not"),
    ({"answer": "A"}, "2 of 3 questions do not"),  # a rotation whose gold is another text
    ({"question": "Which?\n(A) this\n(B) that"}, "has other options than")], "realworld": [
    ({"multi-choice options": "['(A) a', '(B b', '(C) c', '(D) d', '(E) e']"},
     r"options .*expected five, '\(A\) ...'"),
    ({"multi-choice options": "['(A) a', '(B) b', '(C) c', '(D) d']"}, "expected five"),
    ({"multi-choice options": "__import__('os').getcwd()"}, "is not a Python list")]}


@pytest.mark.parametrize("source, change, match", [(source, *fault) for source in FAULTS
                                                   for fault in FAULTS[source]])
def test_a_broken_file_is_named(tmp_path, source, change, match):
    name = {"vstar": "vstar", "hrbench": "hrbench_4k", "realworld": "mme_realworld_lite"}[source]
    path = broken(tmp_path, read_rows(f"{source}.tsv"), change)
    with pytest.raises(DataError, match=match):
        prepare(sized(name, f"{source}.tsv"), tmp_path / "images", path)


@pytest.mark.parametrize("name, row, change, match", [
    ("vstar", {"index": 1, "picture": 2, "question": 3}, {}, "no field 'answer'"),
    ("vstar_regions", {"index": 1, "question": 3}, {},
     "columns index, question are not a known layout of vstar_regions.*'test_type'"),
    ("tablevqa/vtabfact", {"index": 1, "question": "q", "answer": "1", "split": "vtabfact",
                           "image": text_of(picture(1))},
     {"index": 2, "answer": "yes"}, "broken.tsv:3: gold 'yes', expected the text '1' or '0'"),
    ("mme", {"index": 1, "question": "q", "category": "c", "answer": "Maybe", "image": ""}, {},
     "answer 'Maybe'")])
def test_broken_rows_are_named(tmp_path, name, row, change, match):
    with pytest.raises(DataError, match=match):
        prepare(TABLE[name], tmp_path / "images", broken(tmp_path, [row, row], change))


@pytest.mark.parametrize("name, fields, match", [
    ("tablevqa/vtabfact", {"qa_id": "1", "text_markdown_table": "", "gt": 1}, "'gt' should be str, got int"),
    ("mme", {"question_id": "a.jpg", "answer": "Yes", "category": "c"},
     r"1 of 1 pictures have no pair.*\['yes'\]; expected as many")])
def test_an_integer_gold_and_an_unpaired_picture_are_named(tmp_path, name, fields, match):
    path = write_parquet(tmp_path / "t.parquet", [{"image": struct(picture(1)), "question": "q"} | fields])
    with pytest.raises(DataError, match=match):
        prepare(replace(TABLE[name], n=1), tmp_path / "images", path)


@pytest.mark.parametrize("change, match", [
    ({"image_3": None}, r"row 1: item 'blink/Jigsaw/val_Jigsaw_1': 2 pictures, expected 3"),
    ({"image_2": None}, "pictures in image_1, image_3, expected them from image_1 on without a gap"),
    ({"answer": "B"}, r"answer 'B', expected a bracketed letter"),
    ({"answer": "(C)"}, "gold 'C' and letters")])
def test_a_broken_blink_is_named(tmp_path, change, match):
    first, second = read_rows(HUB_BLINK)
    path = write_parquet(tmp_path / "b.parquet", [first, second | change])
    with pytest.raises(DataError, match=match):
        prepare(replace(TABLE["blink/Jigsaw"], n=2), tmp_path / "images", path)
