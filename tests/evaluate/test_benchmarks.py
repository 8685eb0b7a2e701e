"""Published benchmark files become items, without loss or with an error.    pytest tests/test_benchmarks.py
"""
import csv
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import benchmark_fixtures as made
import pytest

from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.layouts import inline_text
from utils.evaluate.sources import Hub, dataset_rows, file_rows, pinned, tsv_rows
from utils.items import ANSWER_TYPES, read_items
from utils.jsonl import DataError, write_rows

LAYOUTS = [("vstar", made.write_vstar), ("vstar_inline", made.write_vstar_inline),
           ("vstar_inline", made.write_vstar_questions),
           ("vstar_likelihood", made.write_vstar_original), ("hrbench_4k", made.write_hrbench),
           ("hrbench_4k", made.write_hrbench_repeated), ("hrbench_4k", made.write_hrbench_parquet),
           ("hrbench_4k", made.write_hrbench_hub), ("mme_realworld_lite", made.write_realworld),
           ("mme_realworld_lite", made.write_realworld_parquet), ("blink/Jigsaw", made.write_blink),
           ("blink/Jigsaw", made.write_blink_tsv), ("tablevqa/vwtq", made.write_tablevqa),
           ("tablevqa/vtabfact", lambda folder: made.write_tablevqa(folder, "vtabfact")),
           ("tablevqa/vtabfact", made.write_tablevqa_tsv),
           ("tablevqa/vwtq", lambda folder: made.write_tablevqa_tsv(folder, "vwtq")), ("mme", made.write_mme),
           ("mme", made.write_mme_tsv), ("ocrbench_v2", made.write_ocrbench),
           ("ocrbench_v2", made.write_ocrbench_tsv)]
each_layout = pytest.mark.parametrize("name, write", LAYOUTS, ids=lambda part: getattr(part, "__name__",
                                                                                       part))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what the `datasets` library makes of the folders apart, a test from the next."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sized(name, expected):
    """The benchmark, with the size of a fixture."""
    counts = Counter(item["category"] for item in expected.values())
    return replace(TABLE[name], n=len(expected), counts=dict(counts))


@each_layout
def test_every_layout_comes_through_without_loss(tmp_path, name, write):
    source, expected = write(tmp_path)
    items = prepare(sized(name, expected), tmp_path / "out.images", source)
    assert [item["id"] for item in items] == list(expected)
    for item, parts in zip(items, expected.values()):
        texts = {field: value for field, value in parts.items() if field != "bytes"}
        assert {field: item[field] for field in texts} == texts
        assert item["benchmark"] == name
        assert [(tmp_path / image["path"]).read_bytes() for image in item["images"]] == parts["bytes"]
        assert [image["sha256"] for image in item["images"]] == [hashlib.sha256(data).hexdigest()
                                                                 for data in parts["bytes"]]
        assert all(re.fullmatch(r"out\.images/[0-9a-f]{16}\.(jpg|png)", image["path"])
                   for image in item["images"])
    write_rows(tmp_path / "out.jsonl", items)
    assert read_items(tmp_path / "out.jsonl", metrics=tuple(ANSWER_TYPES)) == items


@pytest.mark.parametrize("write, name, pictures", [
    (made.write_vstar, "vstar", {"image"}), (made.write_hrbench_repeated, "hrbench_4k", {"image"}),
    (made.write_realworld, "mme_realworld_lite", {"image"}), (made.write_tablevqa_tsv, "tablevqa/vtabfact",
                                                              {"image"})])
def test_raw_is_the_row_without_its_pictures(tmp_path, write, name, pictures):
    source, expected = write(tmp_path)
    with open(source, newline="") as file:
        rows = [{column: cell for column, cell in row.items() if column not in pictures}
                for row in csv.DictReader(file, delimiter="\t")]
    items = prepare(sized(name, expected), tmp_path / "images", source)
    assert all(item["raw"] in rows for item in items) and len(items) == len(expected)


def test_parts_can_be_joined_again_as_the_source_has_them(tmp_path):
    source, expected = made.write_vstar_questions(tmp_path)
    for item in prepare(sized("vstar_inline", expected), tmp_path / "images", source):
        assert inline_text(item["question"], item["options"]) == item["raw"]["text"]
    source, expected = made.write_realworld_parquet(tmp_path)
    for item in prepare(sized("mme_realworld_lite", expected), tmp_path / "images", source):
        assert [f"({letter}) {text}" for letter,
                text in item["options"]] == item["raw"]["multi-choice options"]


def test_a_picture_cell_of_ten_megabytes_is_read(tmp_path):
    made.write_tsv(tmp_path / "big.tsv", [{"index": 1, "image": "A" * 10_000_000}])
    before = csv.field_size_limit()
    assert [len(row["image"]) for _,
            row in tsv_rows(tmp_path / "big.tsv")] == [10_000_000] and csv.field_size_limit() == before


# ------------------------------------------------------------------------------------------------ clusters
def test_rotations_share_a_group_and_different_questions_do_not(tmp_path):
    source, expected = made.write_hrbench(tmp_path)
    items = prepare(sized("hrbench_4k", expected), tmp_path / "images", source)
    groups = {}
    for item in items:
        groups.setdefault(item["group_id"], []).append(item["question"])
    assert sorted(map(len, groups.values())) == [4, 4] and all(len(set(questions)) == 1
                                                               for questions in groups.values())
    for group in groups:  # the right text is one and the same in all four
        assert len({dict(item["options"])[item["answer"]["value"]] for item in items if item["group_id"]
                    == group}) == 1


def test_questions_about_one_picture_share_a_group(tmp_path):
    for write in (made.write_mme, made.write_mme_tsv):
        source, expected = write(tmp_path)
        items = prepare(sized("mme", expected), tmp_path / "images", source)
        assert [item["group_id"] for item in items[:2]] == [items[0]["group_id"]] * 2
        assert len({item["group_id"] for item in items}) == 2


def test_elsewhere_an_item_is_its_own_group(tmp_path):
    source, expected = made.write_vstar(tmp_path)
    assert all(item["group_id"] == item["id"] for item in prepare(sized("vstar", expected),
                                                                  tmp_path / "images", source))


# ------------------------------------------------------------------------------------------------ asserts
def broken(tmp_path, rows, change):
    """A TSV whose second row is changed, or left out (None)."""
    rows = [dict(row) for row in rows]
    if change is None:
        del rows[1]
    else:
        rows[1] |= change
    return made.write_tsv(tmp_path / "broken.tsv", rows)


@pytest.mark.parametrize("change, match", [
    (None, r"broken.tsv: 3 items, .*expected 4, .*direct_attributes"),
    ({"category": "relative_position"},
     r"4 items, \{'direct_attributes': 1, 'relative_position': 3\}; expected 4"),
    ({"category": "OCR"}, r"4 items, .*'OCR': 1"),
    ({"answer": "E"}, r"broken.tsv:3: item 'vstar/1': gold 'E' and letters \['A', 'B', 'C', 'D'\]"),
    ({"B": ""}, r"broken.tsv:3: item 'vstar/1': gold 'B' and letters \['A', 'C', 'D'\]"),
    ({"index": 0}, r"broken.tsv:3: id 'vstar/0' stands already at .*broken.tsv:2"),
    ({"image": ""}, "broken.tsv:3: column 'image' is empty"),
    ({"image": "!" * 80}, "broken.tsv:3: the picture '!!!!.*not base64"),
    ({"image": made.text_of(b"no picture at all" * 8)}, "broken.tsv:3: 136 bytes that are no picture"),
    ({"image": "77"}, "broken.tsv:3: the picture is that of row '77', which has none"),
    ({"image": repr([made.text_of(made.picture(n)) for n in (1, 2)])},
     "broken.tsv:3: item 'vstar/1': 2 pictures, expected 1")])
def test_a_broken_v_star_is_named(tmp_path, change, match):
    _, expected = made.write_vstar(tmp_path)
    source = broken(tmp_path, made.vstar_rows(), change)
    with pytest.raises(DataError, match=match):
        prepare(sized("vstar", expected), tmp_path / "images", source)


@pytest.mark.parametrize("change, match", [
    ({"question": "Another?"},
     r"2 of 3 questions do not stand there in four rotations.*expected the rotations 0, 1, 2, 3"),
    ({"cycle_category": "1"}, r"1 of 2 questions do not .* with \['1', '1', '2', '3'\]"),
    ({"image": made.text_of(made.picture(9))}, "2 of 3 questions do not"),
    ({"answer": "A"}, "2 of 3 questions do not"),  # a rotation whose gold is another text
    ({"question": "Which?\n(A) this\n(B) that"}, "options that differ from the columns")])
def test_a_broken_hr_bench_is_named(tmp_path, change, match):
    _, expected = made.write_hrbench(tmp_path)
    with pytest.raises(DataError, match=match):
        prepare(sized("hrbench_4k", expected), tmp_path / "images", broken(tmp_path, made.hrbench_rows(),
                                                                           change))


@pytest.mark.parametrize("name, rows, change, match", [
    ("mme_realworld_lite", made.realworld_rows(),
     {"multi-choice options": "['(A) a', '(B b', '(C) c', '(D) d', '(E) e']"},
     r"options .*expected five, '\(A\) ...'"),
    ("mme_realworld_lite", made.realworld_rows(),
     {"multi-choice options": "['(A) a', '(B) b', '(C) c', '(D) d']"},
     "expected five"),
    ("mme_realworld_lite", made.realworld_rows(), {"multi-choice options": "__import__('os').getcwd()"},
     "is no Python list"),
    ("vstar", [{"index": 1, "picture": 2, "question": 3}] * 2, {}, "no field 'answer'"),
    ("vstar_inline", [{"index": 1, "question": 3}] * 2, {},
     "columns index, question are no layout of vstar_inline.*'label'"),
    ("tablevqa/vtabfact", [{"index": n, "question": "q", "answer": "1", "split": "vtabfact",
                             "image": made.text_of(made.picture(n))} for n in (0, 1)],
     {"answer": "yes"}, "broken.tsv:3: gold 'yes', expected the text '1' or '0'"),
    ("mme", [{"index": 1, "question": "q", "category": "c", "answer": "Maybe", "image": ""}] * 2, {},
     "answer 'Maybe'")])
def test_broken_rows_of_the_others_are_named(tmp_path, name, rows, change, match):
    with pytest.raises(DataError, match=match):
        prepare(TABLE[name], tmp_path / "images", broken(tmp_path, rows, change))


@pytest.mark.parametrize("name, write", [("mme_realworld_lite", made.write_realworld),
                                         ("mme", made.write_mme)])
def test_a_size_without_categories_is_checked_too(tmp_path, name, write):
    source, _ = write(tmp_path)
    with pytest.raises(DataError, match=rf"{source.name}: \d items, .*; expected {TABLE[name].n} of {name}"):
        prepare(TABLE[name], tmp_path / "images", source)


def test_an_integer_gold_of_vtabfact_and_an_unpaired_picture_are_named(tmp_path):
    row = {"qa_id": "1", "image": made.struct(made.picture(1)), "question": "q", "text_markdown_table": "",
           "gt": 1}
    with pytest.raises(DataError, match="field 'gt' should be str, got int '1'"):
        prepare(TABLE["tablevqa/vtabfact"], tmp_path / "images", made.write_parquet(tmp_path / "t.parquet",
                                                                                    [row]))
    rows = [{"question_id": "a.jpg", "image": made.struct(made.picture(1)), "question": "q", "answer": "Yes",
             "category": "c"}]
    with pytest.raises(DataError, match=r"1 of 1 pictures have no pair.*\['yes'\]; expected as many"):
        prepare(replace(TABLE["mme"], n=1), tmp_path / "images", made.write_parquet(tmp_path / "m.parquet",
                                                                                    rows))


@pytest.mark.parametrize("change, match", [
    ({"image_3": None}, r"row 1: item 'blink/Jigsaw/val_Jigsaw_1': 2 pictures, expected 3"),
    ({"image_2": None}, "pictures in image_1, image_3, expected them from image_1 on without a gap"),
    ({"answer": "B"}, r"answer 'B', expected a bracketed letter"),
    ({"answer": "(C)"}, "gold 'C' and letters")])
def test_a_broken_blink_is_named(tmp_path, change, match):
    rows = made.blink_rows()
    path = made.write_parquet(tmp_path / "b.parquet", [rows[0], rows[1] | change],
                              tuple(f"image_{k}" for k in range(1, 5)))
    with pytest.raises(DataError, match=match):
        prepare(replace(TABLE["blink/Jigsaw"], n=2), tmp_path / "images", path)


def test_text_of_v_star_that_is_not_stem_options_instruction_is_named(tmp_path):
    row = made.inline_rows()[0] | {"image": "x.jpg"}
    for text in ("No options at all?", row["text"].removesuffix(made.BAKED)):
        path = made.write_jsonl(tmp_path / "questions.jsonl", [row | {"text": text}])
        with pytest.raises(DataError, match="questions.jsonl:1: text .*expected a stem"):
            prepare(TABLE["vstar_inline"], tmp_path / "images", path)


# ------------------------------------------------------------------------------------------ files and the hub
def test_a_file_of_the_published_name_must_have_the_published_digest(tmp_path):
    source, expected = made.write_vstar(tmp_path)
    bench, found = sized("vstar", expected), hashlib.sha256(source.read_bytes()).hexdigest()
    same = source.rename(tmp_path / "VStarBench.tsv")
    with pytest.raises(DataError, match=f"sha256 {found}, expected 9826a55e"):
        prepare(bench, tmp_path / "images", same)
    for digest in (found, hashlib.md5(same.read_bytes()).hexdigest()):
        assert prepare(replace(bench, digests={"VStarBench.tsv": ("0" * len(digest), digest)}),
                       tmp_path / "images", same)


@pytest.mark.parametrize("name, text, match", [
    ("a.tsv", "index\timage\n1\t2\t3\n", "a.tsv:2: 3 cells, expected 2"),
    ("a.tsv", "index,image\n", "a.tsv:1: columns"),
    ("a.tsv", 'index\timage\n1\t"open\n', "not a TSV"), ("a.tsv", "", "a.tsv:1: columns"),
    ("a.parquet", "PAR1", "not a parquet file"), ("a.csv", "a,b", "kind '.csv'")])
def test_a_damaged_file_is_named(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        list(file_rows(tmp_path / name))


def test_a_limit_takes_the_first_items_and_counts_nothing(tmp_path):
    source, expected = made.write_vstar(tmp_path)
    assert [item["id"] for item in prepare(TABLE["vstar"], tmp_path / "images", source, limit=2)] == list(
        expected)[:2]
    with pytest.raises(DataError, match="4 items, .*; expected 191"):
        prepare(TABLE["vstar"], tmp_path / "images", source)


def test_the_hub_is_read_at_a_pinned_commit_and_nothing_else(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    source, expected = made.write_hrbench_hub(tmp_path)
    calls, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda place, **flags: calls.append((place, flags)) or load(
        str(source), name=flags["name"], split=flags["split"]))
    assert len(prepare(sized("hrbench_4k", expected), tmp_path / "images")) == 8
    assert calls == [("DreamMr/HR-Bench", {"name": "hrbench_version_split", "split": "hrbench_4k",
                                           "revision": "83b9013d6293b85dc507e87199ca52517536939c",
                                           "cache_dir": None})]
    tsv, expected = made.write_vstar(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names,
                        **flags: calls.append((names, flags)) or str(tsv))
    assert len(prepare(sized("vstar", expected), tmp_path / "images")) == 4
    assert calls[1] == (("xjtupanda/VStar_Bench", "VStarBench.tsv"), {
        "repo_type": "dataset", "revision": "b1312e6fbf89ace5a50cc5b0214010aeb0f69bdc"})
    root, expected = made.write_vstar_original(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names,
                        **flags: calls.append((names, flags)) or str(root))
    assert len(prepare(sized("vstar_likelihood", expected), tmp_path / "images", revision="a" * 40)) == 2
    assert calls[2] == (("craigwu/vstar_bench",), {
        "repo_type": "dataset", "revision": "a" * 40, "allow_patterns": ["direct_attributes/*",
                                                                         "relative_position/*"],
        # no links
        "local_dir": Path(huggingface_hub.constants.HF_HUB_CACHE, f"craigwu--vstar_bench-{'a' * 40}")})


def test_a_branch_and_a_missing_revision_are_refused(tmp_path):
    with pytest.raises(DataError, match="revision 'main', expected a commit of 40 hex digits"):
        pinned(Hub("a/b", "c" * 40), "main")
    with pytest.raises(DataError, match="BLINK-Benchmark/BLINK: no revision is pinned"):
        prepare(TABLE["blink/Jigsaw"], tmp_path / "images")
    with pytest.raises(DataError, match="vsp: lies on no hub"):
        prepare(TABLE["vsp"], tmp_path / "images")
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(TABLE["vstar"], tmp_path / "images", tmp_path / "none.tsv")
    with pytest.raises(DataError, match="a folder; expected VStarBench.tsv"):
        prepare(TABLE["vstar"], tmp_path / "images", tmp_path)


def test_a_split_that_is_not_there_is_named(tmp_path):
    source, _ = made.write_hrbench_hub(tmp_path)
    with pytest.raises(DataError, match="split 'hrbench_8k'"):
        list(dataset_rows(source, "hrbench_version_split", "hrbench_8k"))


# ------------------------------------------------------------------------------------------------ the table
def test_the_table_holds_the_published_sizes():
    sizes = {name: bench.n for name, bench in TABLE.items() if bench.n}
    assert sizes == {"vstar": 191, "vstar_inline": 191, "vstar_likelihood": 191, "hrbench_4k": 800,
                     "hrbench_8k": 800,
                     "mme_realworld_lite": 1919, "blink/Jigsaw": 150, "blink/Multi-view_Reasoning": 133,
                     "tablevqa/vwtq": 750,
                     "tablevqa/vwtq_syn": 250, "tablevqa/vtabfact": 250, "mme": 2374, "ocrbench_v2": 10000,
                     "vsp": 400}
    assert all(bench.n == sum(bench.counts.values()) for bench in TABLE.values() if bench.counts)
    assert all(TABLE[name].counts == {"direct_attributes": 115, "relative_position": 76}
               for name in ("vstar", "vstar_inline"))
    assert all(TABLE[name].counts == {"single": 400, "cross": 400} for name in ("hrbench_4k", "hrbench_8k"))
    assert (TABLE["blink/Jigsaw"].n_images, TABLE["blink/Multi-view_Reasoning"].n_images) == (3, 2) and len(
        TABLE) == 26
    assert all(len(digest) in (32, 64) for bench in TABLE.values() for names in bench.digests.values()
               for digest in names)


def test_real_vsp_problems_come_out_word_for_word_with_their_pictures(shared_data, tmp_path):
    source = shared_data / "vsp" / "test.jsonl"
    published = [json.loads(line) for line in source.read_text().splitlines()]
    items = prepare(TABLE["vsp"], tmp_path / "v.images", source)
    assert len(items) == len(published) == 400 and json.dumps(items)
    for item, row in zip(items, published):
        assert (item["question"], item["answer"]["value"]) == (row["text_input"], row["map_desc"])
        assert (tmp_path / item["images"][0]["path"]).read_bytes() == (source.parent
                                                                       / row["image_input"]).read_bytes()


def test_a_folder_is_read_as_it_is_now(tmp_path, monkeypatch):
    """Not as another of its name was, which the library keeps in its cache."""
    for place, n in (("old", 3), ("new", 9)):
        monkeypatch.setitem(made.TABLES, "vwtq", (made.TABLES["vwtq"] * 3)[:n])
        source, _ = made.write_tablevqa(tmp_path / place)
        assert len(prepare(TABLE["tablevqa/vwtq"], tmp_path / "images", source, limit=20)) == n
