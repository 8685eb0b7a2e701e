"""Cells as pandas, the datasets library and people write them: every form x layout x kind of file."""
import base64
import csv
import hashlib
import json
from dataclasses import replace

import pytest
from benchmark_fixtures import picture, struct, text_of, write_parquet

from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.scoring import rotation_of
from utils.evaluate.sources import file_rows
from utils.jsonl import DataError

DATA = picture(3)
TEXT = text_of(DATA)
OPTIONS = {"A": "red", "B": "blue", "C": "green", "D": "black"}
BRACKETED = ["(A) a", "(B) b", "(C) c", "(D) d", "(E) e"]
ROWS = {  # layout -> a row without its picture
    "vstar": {"index": "7", "question": "Which?", **OPTIONS, "answer": "B", "category": "direct_attributes"},
    "mcq": {"id": "7", "question": "Which?", **OPTIONS, "answer": "b"},
    "mmstar": {"index": "7", "question": "Which?", **OPTIONS, "answer": "B", "category": "math"},
    "hrbench_4k": {"index": "7", "question": "Which?", **OPTIONS, "answer": "B", "category": "cross",
                   "cycle_category": "0"},
    "blink/Counting": {"index": "7", "question": "Which?", **OPTIONS, "answer": "B", "category": "Counting"},
    "cv_bench/2D": {"index": "7", "question": "Which?", **OPTIONS, "answer": "(B)", "source": "COCO",
                    "category": "Count", "split": "2D"},
    "mme_realworld_lite": {"index": "7", "question": "Which?", "multi-choice options": str(BRACKETED),
                           "answer": "B", "category": "Perception/Monitoring"},
    "tablevqa/vwtq": {"qa_id": "7", "question": "Which?", "gt": "12"},
    "tablevqa/vtabfact": {"index": "7", "question": "Which?", "answer": "1", "split": "vtabfact"},
    "mme": {"index": "7", "question": "Which?", "answer": "Yes", "category": "count"},
    "ocrbench_v2": {"id": "7", "question": "Which?", "answers": "12", "type": "t"}}
WITH_OPTIONS = [name for name, row in ROWS.items() if "A" in row]
INDEX = {name: next(column for column in ("index", "id", "qa_id") if column in row)
         for name, row in ROWS.items()}
NAN = float("nan")

url_safe = base64.urlsafe_b64encode(DATA).decode()
wrapped = "\n".join(TEXT[n:n + 76] for n in range(0, len(TEXT), 76))
PICTURES = {  # form -> its cells; those that are not text fit JSONL or parquet alone
    "plain": {"image": TEXT}, "data_url": {"image": f"data:image/jpeg;base64,{TEXT}"},
    "wrapped": {"image": wrapped}, "wrapped_windows": {"image": wrapped.replace("\n", "\r\n") + "\r\n"},
    "blanks": {"image": f"  {TEXT}\t"}, "unpadded": {"image": TEXT.rstrip("=")},
    "url_safe": {"image": url_safe},
    "url_safe_unpadded": {"image": url_safe.rstrip("=")}, "list_text": {"image": str([TEXT])},
    "list_of_data_urls": {"image": str([f"data:image/png;base64,{TEXT}"])}, "path": {"image": "pic 1.jpg"},
    "path_list": {"image": "['pic 1.jpg']"}, "image_path": {"image_path": "pic 1.jpg"},
    "image_path_beside_empty": {"image": "", "image_path": "['pic 1.jpg']"}, "bytes_text": {"bytes": TEXT},
    "image_path_without_suffix": {"image_path": "pic"}, "half_padded": {"image": TEXT[:-1]},
    "struct": {"image": struct(DATA)}, "struct_path": {"image": {"bytes": None, "path": "pic 1.jpg"}},
    "binary": {"image": DATA}, "binary_bytes": {"bytes": DATA}, "list": {"image": [TEXT]},
    "list_of_structs": {"image": [struct(DATA)]}, "null": {"image": None, "image_path": "pic 1.jpg"},
    "nan": {"image": NAN, "image_path": "pic 1.jpg"}}


def write(path, rows):
    """Write rows as a TSV or CSV (text alone), JSONL (no bytes) or parquet; None if they do not fit."""
    values = [value for row in rows for value in row.values()]
    if path.suffix in (".tsv", ".csv"):
        if not all(isinstance(value, str) for value in values):
            return None
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except TypeError:
        return None
    return path


def item_of(tmp_path, kind, name, row):
    """Return the item of a row in a file of this kind, or None if such a file cannot hold it."""
    for file in ("pic 1.jpg", "pic"):
        (tmp_path / file).write_bytes(DATA)
    path = write(tmp_path / f"x.{kind}", [row])
    if path is None:
        return None
    return prepare(TABLE[name], tmp_path / "images", path, limit=1)[0]


each_kind = pytest.mark.parametrize("kind", ("tsv", "csv", "jsonl", "parquet"))


@each_kind
@pytest.mark.parametrize("name", ROWS)
def test_every_form_of_a_picture_gives_the_same_bytes(tmp_path, kind, name):
    digest, read = hashlib.sha256(DATA).hexdigest(), 0
    for form, cells in PICTURES.items():
        item = item_of(tmp_path, kind, name, ROWS[name] | cells)
        if item:
            assert [image["sha256"] for image in item["images"]] == [digest], form
            assert json.loads(json.dumps(item, allow_nan=False)) == item and "image" not in item["raw"], form
            read += 1
    assert read == {"tsv": 17, "csv": 17, "jsonl": 21, "parquet": 25}[kind]


@each_kind
@pytest.mark.parametrize("name", ROWS)
def test_an_index_is_the_same_as_text_and_as_a_number(tmp_path, kind, name):
    for value in ("7", 7, 7.0, "7.0", " 7"):
        if item := item_of(tmp_path, kind, name, ROWS[name] | {INDEX[name]: value, "image": TEXT}):
            assert item["id"] in (f"{name}/7", f"{name}/7/0")


@each_kind
def test_a_rotation_is_the_same_as_text_and_as_a_number(tmp_path, kind):
    for value in ("3", 3, 3.0, "3.0", " 3"):
        if item := item_of(tmp_path, kind, "hrbench_4k",
                           ROWS["hrbench_4k"] | {"cycle_category": value, "image": TEXT}):
            assert (item["id"], rotation_of(item)) == ("hrbench_4k/7/3", 3)


@each_kind
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_missing_option_or_hint_is_left_out_and_a_number_is_text(tmp_path, kind, name):
    for value in ("", " ", "nan", "NaN", None, NAN):
        row = ROWS[name] | {"C": value, "D": value, "hint": value, "image": TEXT}
        if item := item_of(tmp_path, kind, name, row):
            assert item["options"] == [["A", "red"], ["B", "blue"]] and "hint" not in item
            assert json.dumps(item, allow_nan=False)
    for value, text in ((5, "5"), (5.0, "5"), (2.5, "2.5"), ("5.10", "5.10"), ("None", "None"), ("NA", "NA")):
        if item := item_of(tmp_path, kind, name, ROWS[name] | {"C": value, "hint": value, "image": TEXT}):
            assert item["options"][2] == ["C", text] and item["hint"] == text


@each_kind
def test_all_options_are_kept(tmp_path, kind):
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for n in (2, 5, 6, 7, 26):
        row = {"id": "1", "question": "q", "answer": letters[n - 1], "image": TEXT}
        item = item_of(tmp_path, kind, "mcq", row | {letter: f"o{letter}" for letter in letters[:n]})
        assert [letter for letter, _ in item["options"]] == list(letters[:n])
    with pytest.raises(DataError, match=r"(row 0|:1|:2): option column 'F' without 'E'"):
        item_of(tmp_path, kind, "mcq", ROWS["mcq"] | {"F": "o", "image": TEXT})


@pytest.mark.parametrize("name, cells, match", [
    ("vstar", {"index": True, "image": TEXT}, "column 'index' is bool 'True', expected text or a number"),
    ("vstar", {"index": None, "image": TEXT}, "column 'index' is empty"),
    ("vstar", {"question": NAN, "image": TEXT}, "column 'question' is empty"),
    ("vstar", {"C": [1], "image": TEXT}, r"option '\[1\]' in columns A, B, ... is list"),
    ("vstar", {"answer": "blue", "image": TEXT}, "answer 'blue', expected a letter such as 'B'"),
    ("vstar", {"answer": "C", "C": NAN, "image": TEXT}, "gold 'C' and letters"),
    ("vstar", {}, "no picture; expected it in image or image_path or bytes"),
    ("vstar", {"image": NAN}, "column 'image' is empty"),
    ("vstar", {"image": []}, "column 'image' holds list"),
    ("vstar", {"image": TEXT[:-9] + "*" + TEXT[-9:]}, "column 'image': the picture '/9j.*neither base64"),
    ("vstar", {"image": f"x,{TEXT}"}, "column 'image': the picture 'x,/9j.*neither base64"),
    ("vstar", {"image": "data:image/png;base64,iVBO"}, "row 0: 3 bytes are not a whole picture"),
    ("vstar", {"image": "none.jpg"}, "row 0: .*none.jpg: no such image"),
    ("vstar", {"image_path": "/data/pic0.jpg"}, "row 0: /data/pic0.jpg: leaves the image root"),
    ("vstar", {"image": picture(5)[:-100]}, r"row 0: \d+ bytes are not a whole picture"),
    ("vstar", {"image": text_of(picture(5, "PNG")[:-30])}, r"row 0: \d+ bytes are not a whole picture"),
    ("tablevqa/vwtq", {"gt": "", "image": TEXT}, "column 'gt' is empty"),
    ("tablevqa/vtabfact", {"answer": "2", "image": TEXT}, "gold '2'"),
    ("mcq", {"image": TEXT, "question": None}, "column 'question' is empty")])
def test_a_cell_that_cannot_be_read_is_named(tmp_path, name, cells, match):
    with pytest.raises(DataError, match=match):
        item_of(tmp_path, "parquet", name, ROWS[name] | cells)


def test_a_file_of_one_s_own_says_which_column_it_lacks(tmp_path):
    for column, match in (("id", "no column 'index' or 'id'"), ("question", "expected 'question'"),
                          ("answer", "no column 'answer'")):
        row = {key: value for key, value in ROWS["mcq"].items() if key != column} | {"image": TEXT}
        with pytest.raises(DataError, match=rf"x.csv:.*{match}"):
            item_of(tmp_path, "csv", "mcq", row)


def test_rows_of_another_subset_are_counted_and_equal_options_are_told(tmp_path, capsys):
    with pytest.raises(DataError, match=r"x.tsv: 1 rows of 'Jigsaw'; expected rows of blink/Counting"):
        item_of(tmp_path, "tsv", "blink/Counting",
                ROWS["blink/Counting"] | {"category": "Jigsaw", "image": TEXT})
    with pytest.raises(DataError, match="x.jsonl: no rows; expected rows of mcq"):
        prepare(TABLE["mcq"], tmp_path / "images", write(tmp_path / "x.jsonl", []))
    assert item_of(tmp_path, "tsv", "mcq", ROWS["mcq"] | {"C": " red", "image": TEXT})
    assert "1 of 1 items have equal options, first mcq/7" in capsys.readouterr().err


def test_pictures_of_other_rows_are_found_by_text_and_by_number(tmp_path):
    rows = [ROWS["vstar"] | {"index": 7, "image": TEXT}, ROWS["vstar"] | {"index": 8, "image": "7"}]
    items = prepare(replace(TABLE["vstar"], n=2, counts={}), tmp_path / "images",
                    write(tmp_path / "x.parquet", rows))
    assert items[0]["images"] == items[1]["images"]


def test_a_blank_line_is_no_row_and_a_row_is_named_by_its_first_line(tmp_path):
    (tmp_path / "x.csv").write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    assert [(where.rpartition(":")[2], row["b"]) for where, row in file_rows(tmp_path / "x.csv")] == [
        ("2", "two\nlines"), ("5", "4")]


# ---- the benchmarks of one layout each
def test_official_realworld_json(tmp_path):
    row = {"Question_id": "perception/ocr/0001", "Image": "pic 1.jpg", "Text": "Which?",
           "Answer choices": BRACKETED, "Ground truth": "C", "Question Type": "Multiple Choice"}
    for fields in (("Perception", "Monitoring", "Vehicle/counting"), ("Ad", "Perception", "Monitoring")):
        item = item_of(tmp_path, "jsonl", "mme_realworld_lite",
                       row | dict(zip(("Task", "Subtask", "Category"), fields)))
        assert item["id"] == "mme_realworld_lite/perception/ocr/0001"
        assert item["category"] == "Perception/Monitoring" and item["answer"]["value"] == "C"
        assert item["options"][4] == ["E", "e"] and item["raw"]["Text"] == "Which?"
    with pytest.raises(DataError, match="expected one of .'Perception', 'Reasoning'. and one of"):
        item_of(tmp_path, "jsonl", "mme_realworld_lite",
                row | {"Task": "x", "Subtask": "Monitoring", "Category": "y"})


def test_mmvp_pairs_rows_in_order(tmp_path):
    folder = tmp_path / "MMVP Images"
    folder.mkdir()
    rows = []
    for n in range(1, 5):
        (folder / f"{n}.jpg").write_bytes(picture(n))
        rows.append({"lndex": str(n), "Question": f"Open {(n + 1) // 2}?",
                     "Options": "(a) Yes (wide) (b) No, shut", "Correct Answer": "(a)" if n % 2 else "(b)"})
    bench = replace(TABLE["mmvp"], n=4)
    items = prepare(bench, tmp_path / "images", write(tmp_path / "Questions.csv", rows))
    assert [item["group_id"] for item in items] == ["mmvp/0", "mmvp/0", "mmvp/1", "mmvp/1"]
    assert items[1]["options"] == [["A", "Yes (wide)"], ["B", "No, shut"]]
    assert [item["answer"]["value"] for item in items] == list("ABAB")
    hub = [{"Index": n, "image": struct(picture(n)), **{k: v for k, v in row.items() if k != "lndex"}}
           for n, row in enumerate(rows, 1)]
    again = prepare(bench, tmp_path / "images", write(tmp_path / "x.parquet", hub))
    assert [(i["id"], i["images"], i["options"]) for i in again] == [(i["id"], i["images"], i["options"])
                                                                     for i in items]
    rows[1]["Question"] = "Another?"
    with pytest.raises(DataError, match="mmvp/1 and mmvp/2 are no pair"):
        prepare(bench, tmp_path / "images", write(tmp_path / "Questions.csv", rows))
    with pytest.raises(DataError, match="options 'Yes / No', expected"):
        item_of(tmp_path, "csv", "mmvp", rows[0] | {"Options": "Yes / No"})


def test_cv_bench_of_the_hub_and_of_its_jsonl(tmp_path):
    row = {"idx": 5, "type": "3D", "task": "Depth", "question": "Which is closer?",
           "choices": ["chair", "desk"], "answer": "(B)", "prompt": "Which is closer? Select ...",
           "source": "Omni3D", "filename": "pic 1.jpg"}
    for kind, cells in (("parquet", {"image": struct(DATA)}), ("jsonl", {})):
        item = item_of(tmp_path, kind, "cv_bench/3D", row | cells)
        assert (item["id"], item["category"]) == ("cv_bench/3D/5", "Omni3D/Depth")
        assert item["answer"]["value"] == "B"
        assert item["options"] == [["A", "chair"], ["B", "desk"]] and item["raw"]["prompt"] == row["prompt"]
    item = item_of(tmp_path, "tsv", "cv_bench/2D", ROWS["cv_bench/2D"] | {"image": TEXT})
    assert item["category"] == "COCO/Count"
    with pytest.raises(DataError, match="1 rows of '3D'; expected rows of cv_bench/2D"):
        item_of(tmp_path, "jsonl", "cv_bench/2D", row)


@pytest.mark.parametrize("ending, gold, options", [
    ("Options: A: Two, B: One, C: nan, D: Three", "D", [["A", "Two"], ["B", "One"], ["D", "Three"]]),
    ("\nOptions: A: nan, B: Two, C: One, D: Cannot be determined", "A",
     [["A", "nan"], ["B", "Two"], ["C", "One"], ["D", "Cannot be determined"]]),
    ("\nOptions: A: on the book., B: a, b: c, C: D", "B",
     [["A", "on the book."], ["B", "a, b: c"], ["C", "D"]]),
    ("\nChoices:\n(A) Yes\n(B) No\n(C) nan\n(D) nan", "A", [["A", "Yes"], ["B", "No"]]),
    (" Choices: (A) 1 (B) f(x) (C) 3", "C", [["A", "1"], ["B", "f(x)"], ["C", "3"]])])
def test_mmstar_options_are_read_out_of_the_question(tmp_path, ending, gold, options):
    """Endings of rows that readers of the benchmark quote (MMStar issue 12), and made ones."""
    row = {"index": 3, "question": f"How many options? {ending}", "answer": gold, "category": "math",
           "l2_category": "geometry", "meta_info": {"source": "MMBench"}, "image": struct(DATA)}
    item = item_of(tmp_path, "parquet", "mmstar", row)
    assert item["options"] == options and item["question"] == "How many options?"
    assert item["answer"]["value"] == gold and item["raw"]["question"] == row["question"]
    with pytest.raises(DataError, match="gold 'D' and letters"):
        item_of(tmp_path, "parquet", "mmstar", row | {"question": "How? Options: A: 1, B: 2", "answer": "D"})
    with pytest.raises(DataError, match="ends in no options"):
        item_of(tmp_path, "parquet", "mmstar", row | {"question": "How many?"})


def test_mmstar_keeps_a_right_option_that_is_missing_in_vlmevalkit_s_file(tmp_path):
    item = item_of(tmp_path, "tsv", "mmstar", ROWS["mmstar"] | {"B": "", "C": "nan", "image": TEXT})
    assert item["options"] == [["A", "red"], ["B", "nan"], ["D", "black"]]
    with pytest.raises(DataError, match="gold 'E' and letters"):
        item_of(tmp_path, "tsv", "mmstar", ROWS["mmstar"] | {"answer": "E", "image": TEXT})
