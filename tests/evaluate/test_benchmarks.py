"""Published benchmark files become items, without loss or with an error."""
import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_fixtures import EXPECTED, FILES, picture, read_rows, struct, text_of, write_parquet, write_tsv

from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.sources import Hub, dataset_rows, file_rows, pinned, tsv_rows
from utils.items import ANSWER_TYPES, read_items
from utils.jsonl import DataError, write_rows

HUB_BLINK = "BLINK/Jigsaw/val-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Give each test its own cache of the `datasets` library."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sized(name, source):
    """The benchmark with the size of its file in tests/evaluate/files."""
    counts = Counter(item["category"] for item in EXPECTED[name, source].values())
    return replace(TABLE[name], n=counts.total(), counts=dict(counts))


def prepared(tmp_path, name, source):
    return prepare(sized(name, source), tmp_path / "out.images", FILES / source)


@pytest.mark.parametrize("name, source", EXPECTED)
def test_every_layout_comes_through_without_loss(tmp_path, name, source):
    items = prepared(tmp_path, name, source)
    assert [item["id"] for item in items] == list(EXPECTED[name, source])
    for item, fields in zip(items, EXPECTED[name, source].values()):
        digests = [image["sha256"] for image in item["images"]]
        assert item["benchmark"] == name and item | fields == item | {"sha256": digests}
        assert [hashlib.sha256((tmp_path / image["path"]).read_bytes()).hexdigest()
                for image in item["images"]] == digests
        assert all(re.fullmatch(r"out\.images/[0-9a-f]{16}\.(jpg|png)", image["path"])
                   for image in item["images"])
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


def test_a_picture_cell_of_ten_megabytes_is_read(tmp_path):
    before = csv.field_size_limit()
    path = write_tsv(tmp_path / "big.tsv", [{"index": 1, "image": "A" * 10_000_000}])
    assert [len(row["image"]) for _, row in tsv_rows(path)] == [10_000_000]
    assert csv.field_size_limit() == before


# ------------------------------------------------------------------------------------------------ clusters
def test_rotations_share_a_group_and_different_questions_do_not(tmp_path):
    groups = {}
    for item in prepared(tmp_path, "hrbench_4k", "hrbench.tsv"):
        groups.setdefault(item["group_id"], []).append(item)
    assert sorted(map(len, groups.values())) == [4, 4]
    for items in groups.values():
        assert len({item["question"] for item in items}) == 1
        assert len({dict(item["options"])[item["answer"]["value"]] for item in items}) == 1


@pytest.mark.parametrize("source", ["mme.parquet", "mme.tsv"])
def test_questions_about_one_picture_share_a_group(tmp_path, source):
    groups = [item["group_id"] for item in prepared(tmp_path, "mme", source)]
    assert groups[0] == groups[1] and len(set(groups)) == 2


def test_elsewhere_an_item_is_its_own_group(tmp_path):
    assert all(item["group_id"] == item["id"] for item in prepared(tmp_path, "vstar", "vstar.tsv"))


# ------------------------------------------------------------------------------------------------ faults
def broken(tmp_path, rows, change):
    """Write a TSV whose second row is changed, or left out (None)."""
    first, second, *rest = rows
    second = [] if change is None else [second | change]
    return write_tsv(tmp_path / "broken.tsv", [first, *second, *rest])


VSTAR_FAULTS = [
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
     "broken.tsv:3: item 'vstar/1': 2 pictures, expected 1")]
HRBENCH_FAULTS = [
    ({"question": "Another?"},
     r"2 of 3 questions do not occur in four rotations.*expected the rotations 0, 1, 2, 3"),
    ({"cycle_category": "1"}, r"1 of 2 questions do not .* with \['1', '1', '2', '3'\]"),
    ({"image": text_of(picture(9))}, "2 of 3 questions do not"),
    ({"answer": "A"}, "2 of 3 questions do not"),  # a rotation whose gold is another text
    ({"question": "Which?\n(A) this\n(B) that"}, "options that differ from the columns")]
REALWORLD_FAULTS = [
    ({"multi-choice options": "['(A) a', '(B b', '(C) c', '(D) d', '(E) e']"},
     r"options .*expected five, '\(A\) ...'"),
    ({"multi-choice options": "['(A) a', '(B) b', '(C) c', '(D) d']"}, "expected five"),
    ({"multi-choice options": "__import__('os').getcwd()"}, "is not a Python list")]


@pytest.mark.parametrize("name, source, change, match", [
    (name, source, *fault) for name, source, faults in (
        ("vstar", "vstar.tsv", VSTAR_FAULTS), ("hrbench_4k", "hrbench.tsv", HRBENCH_FAULTS),
        ("mme_realworld_lite", "realworld.tsv", REALWORLD_FAULTS)) for fault in faults])
def test_a_broken_file_is_named(tmp_path, name, source, change, match):
    path = broken(tmp_path, read_rows(source), change)
    with pytest.raises(DataError, match=match):
        prepare(sized(name, source), tmp_path / "images", path)


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


@pytest.mark.parametrize("name, source", [("mme_realworld_lite", "realworld.tsv"), ("mme", "mme.parquet"),
                                          ("vstar", "vstar.tsv")])
def test_the_size_of_a_benchmark_is_checked_unless_limited(tmp_path, name, source):
    with pytest.raises(DataError, match=rf"{source}: \d items, .*; expected {TABLE[name].n}.* of {name}"):
        prepare(TABLE[name], tmp_path / "images", FILES / source)
    items = prepare(TABLE[name], tmp_path / "images", FILES / source, limit=2)
    assert [item["id"] for item in items] == list(EXPECTED[name, source])[:2]


def test_an_integer_gold_of_vtabfact_and_an_unpaired_picture_are_named(tmp_path):
    image = {"image": struct(picture(1)), "question": "q"}
    path = write_parquet(tmp_path / "t.parquet", [image | {"qa_id": "1", "text_markdown_table": "", "gt": 1}])
    with pytest.raises(DataError, match="field 'gt' should be str, got int '1'"):
        prepare(TABLE["tablevqa/vtabfact"], tmp_path / "images", path)
    path = write_parquet(tmp_path / "m.parquet",
                         [image | {"question_id": "a.jpg", "answer": "Yes", "category": "c"}])
    with pytest.raises(DataError, match=r"1 of 1 pictures have no pair.*\['yes'\]; expected as many"):
        prepare(replace(TABLE["mme"], n=1), tmp_path / "images", path)


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


# ------------------------------------------------------------------------------------------ files and the hub
def test_a_file_of_the_published_name_must_have_the_published_digest(tmp_path):
    path = shutil.copy(FILES / "vstar.tsv", tmp_path / "VStarBench.tsv")
    bench, data = sized("vstar", "vstar.tsv"), path.read_bytes()
    with pytest.raises(DataError, match=f"sha256 {hashlib.sha256(data).hexdigest()}, expected 9826a55e"):
        prepare(bench, tmp_path / "images", path)
    for digest in (hashlib.sha256(data).hexdigest(), hashlib.md5(data).hexdigest()):
        accepted = {"VStarBench.tsv": ("0" * len(digest), digest)}
        assert prepare(replace(bench, digests=accepted), tmp_path / "images", path)


@pytest.mark.parametrize("name, text, match", [
    ("a.tsv", "index\timage\n1\t2\t3\n", "a.tsv:2: 3 cells, expected 2"),
    ("a.tsv", "index,image\n", "a.tsv:1: columns"),
    ("a.tsv", 'index\timage\n1\t"open\n', "not a TSV"), ("a.tsv", "", "a.tsv:1: columns"),
    ("a.parquet", "PAR1", "not a parquet file"), ("a.csv", "a,b", "kind '.csv'")])
def test_a_damaged_file_is_named(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        list(file_rows(tmp_path / name))


def test_the_hub_is_read_at_a_pinned_commit_and_nothing_else(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    calls, load = [], datasets.load_dataset
    images, commit = tmp_path / "images", "a" * 40

    def load_files(place, **flags):
        calls.append((place, flags))
        return load(str(FILES / "HR-Bench"), name=flags["name"], split=flags["split"])

    def answer_with(path):
        return lambda *names, **flags: calls.append((names, flags)) or str(path)

    monkeypatch.setattr(datasets, "load_dataset", load_files)
    assert len(prepare(sized("hrbench_4k", "HR-Bench"), images)) == 8
    assert calls[-1] == ("DreamMr/HR-Bench", {"name": "hrbench_version_split", "split": "hrbench_4k",
                                              "revision": "83b9013d6293b85dc507e87199ca52517536939c",
                                              "cache_dir": None})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer_with(FILES / "vstar.tsv"))
    assert len(prepare(sized("vstar", "vstar.tsv"), images)) == 4
    assert calls[-1] == (("xjtupanda/VStar_Bench", "VStarBench.tsv"), {
        "repo_type": "dataset", "revision": "b1312e6fbf89ace5a50cc5b0214010aeb0f69bdc"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer_with(FILES / "vstar_bench"))
    assert len(prepare(sized("vstar_regions", "vstar_bench"), images, revision=commit)) == 2
    assert calls[-1] == (("craigwu/vstar_bench",), {
        "repo_type": "dataset", "revision": commit,
        "allow_patterns": ["direct_attributes/*", "relative_position/*"],
        # not the cache, which holds links
        "local_dir": Path(huggingface_hub.constants.HF_HUB_CACHE, f"craigwu--vstar_bench-{commit}")})


def test_a_branch_and_a_missing_revision_are_refused(tmp_path):
    with pytest.raises(DataError, match="revision 'main', expected a commit of 40 hex digits"):
        pinned(Hub("a/b", "c" * 40), "main")
    for name, source, match in (
            ("blink/Jigsaw", None, "BLINK-Benchmark/BLINK: no revision is pinned"),
            ("vsp", None, "vsp: not on the hub"), ("vstar", tmp_path / "none.tsv", "no such file or folder"),
            ("vstar", tmp_path, "a folder; expected VStarBench.tsv")):
        with pytest.raises(DataError, match=match):
            prepare(TABLE[name], tmp_path / "images", source)


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(DataError, match="split 'hrbench_8k'"):
        list(dataset_rows(FILES / "HR-Bench", "hrbench_version_split", "hrbench_8k"))


def test_a_folder_is_read_as_it_is_now(tmp_path):
    """The library's cache would return the rows of an earlier folder of the same name."""
    from pyarrow import parquet
    for place, n in (("old", 2), ("new", 3)):
        folder = shutil.copytree(FILES / "tables", tmp_path / place / "tables")
        path = next(folder.glob("data/vwtq-*"))
        parquet.write_table(parquet.read_table(path).slice(0, n), path)
        assert len(prepare(TABLE["tablevqa/vwtq"], tmp_path / "images", folder, limit=20)) == n


# ------------------------------------------------------------------------------------------------ the table
def test_the_table_holds_the_published_sizes():
    assert {name: bench.n for name, bench in TABLE.items() if bench.n} == {
        "vstar": 191, "vstar_regions": 191, "hrbench_4k": 800, "hrbench_8k": 800, "mme_realworld_lite": 1919,
        "blink/Jigsaw": 150, "blink/Multi-view_Reasoning": 133, "tablevqa/vwtq": 750,
        "tablevqa/vwtq_syn": 250, "tablevqa/vtabfact": 250, "mme": 2374, "ocrbench_v2": 10000, "vsp": 400}
    counts = {name: bench.counts for name, bench in TABLE.items() if bench.counts}
    assert counts.pop("vsp") == dict.fromkeys(("level_3", "level_4", "level_5", "level_6"), 100)
    vstar, hrbench = {"direct_attributes": 115, "relative_position": 76}, {"single": 400, "cross": 400}
    assert counts == {"vstar": vstar, "vstar_regions": vstar, "hrbench_4k": hrbench, "hrbench_8k": hrbench}
    assert len(TABLE) == 25
    assert (TABLE["blink/Jigsaw"].n_images, TABLE["blink/Multi-view_Reasoning"].n_images) == (3, 2)
    assert all(len(digest) in (32, 64) for bench in TABLE.values() for names in bench.digests.values()
               for digest in names)


def test_real_vsp_problems_come_out_word_for_word_with_their_pictures(shared_data, tmp_path):
    source = shared_data / "vsp" / "test.jsonl"
    published = [json.loads(line) for line in source.read_text().splitlines()]
    items = prepare(TABLE["vsp"], tmp_path / "v.images", source)
    assert len(items) == len(published) == 400 and json.dumps(items)
    for item, row in zip(items, published):
        assert (item["question"], item["answer"]["value"]) == (row["text_input"], row["map_desc"])
        stored = (tmp_path / item["images"][0]["path"]).read_bytes()
        assert stored == (source.parent / row["image_input"]).read_bytes()
