"""Published benchmark files become items, without loss or with an error."""
import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_fixtures import EXPECTED, FILES, prepared, sized, write_tsv

from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.sources import dataset_rows, file_rows, table_rows
from utils.jsonl import DataError


def test_a_picture_cell_of_ten_megabytes_is_read(tmp_path):
    before = csv.field_size_limit()
    path = write_tsv(tmp_path / "big.tsv", [{"index": 1, "image": "A" * 10_000_000}])
    assert [len(row["image"]) for _, row in table_rows(path)] == [10_000_000]
    assert csv.field_size_limit() == before


def test_rotations_and_questions_about_one_picture_share_a_group_and_other_items_have_their_own(tmp_path):
    groups = {}
    for item in prepared(tmp_path, "hrbench_4k", "hrbench.tsv"):
        groups.setdefault(item["group_id"], []).append(item)
    assert sorted(map(len, groups.values())) == [4, 4]
    for items in groups.values():
        assert len({item["question"] for item in items}) == 1
        assert len({dict(item["options"])[item["answer"]["value"]] for item in items}) == 1
    for source in ("mme.parquet", "mme.tsv"):
        groups = [item["group_id"] for item in prepared(tmp_path, "mme", source)]
        assert groups[0] == groups[1] and len(set(groups)) == 2
    assert all(item["group_id"] == item["id"] for item in prepared(tmp_path, "vstar", "vstar.tsv"))


@pytest.mark.parametrize("name, source", [("mme_realworld_lite", "realworld.tsv"), ("mme", "mme.parquet"),
                                          ("vstar", "vstar.tsv")])
def test_the_size_of_a_benchmark_is_checked_unless_limited(tmp_path, name, source):
    with pytest.raises(DataError, match=rf"{source}: \d items, .*; expected {TABLE[name].n}.* of {name}"):
        prepare(TABLE[name], tmp_path / "images", FILES / source)
    items = prepare(TABLE[name], tmp_path / "images", FILES / source, limit=2)
    assert [item["id"] for item in items] == list(EXPECTED[name, source])[:2]


def test_a_file_of_the_published_name_must_have_the_published_digest(tmp_path):
    path = shutil.copy(FILES / "vstar.tsv", tmp_path / "VStarBench.tsv")
    bench, data = sized("vstar", "vstar.tsv"), path.read_bytes()
    with pytest.raises(DataError, match=f"md5 {hashlib.md5(data).hexdigest()}, expected b18854d7"):
        prepare(bench, tmp_path / "images", path)
    accepted = {"VStarBench.tsv": ("0" * 32, hashlib.md5(data).hexdigest())}
    assert prepare(replace(bench, digests=accepted), tmp_path / "images", path)


@pytest.mark.parametrize("name, text, match", [
    ("a.tsv", "index\timage\n1\t2\t3\n", "a.tsv:2: 3 cells, expected 2"),
    ("a.tsv", "index,image\n", "a.tsv:1: columns"),
    ("a.tsv", 'index\timage\n1\t2\n3\t"open\n5\t6\n', "a.tsv:3: not a row of a TSV or CSV"),
    ("a.csv", 'index,image\n1,"Stop" sign\n', "a.csv:2: not a row"), ("a.tsv", "", "a.tsv:1: columns"),
    ("a.parquet", "PAR1", "not a parquet file"), ("a.xlsx", "a,b", "kind '.xlsx'")])
def test_a_damaged_file_is_named(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        list(file_rows(tmp_path / name))


def test_the_hub_is_read_at_a_pinned_commit_and_nothing_else(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    calls, load = [], datasets.load_dataset
    images, commit = tmp_path / "images", "a" * 40
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

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
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE, f"craigwu--vstar_bench-{commit}")  # holds no links
    assert calls[-1] == (("craigwu/vstar_bench",), {
        "repo_type": "dataset", "revision": commit, "local_dir": folder,
        "allow_patterns": ["direct_attributes/*", "relative_position/*"]})


def test_sources_that_cannot_be_read_are_named(tmp_path):
    for name, source, match in (
            ("blink/Jigsaw", None, "BLINK-Benchmark/BLINK: no revision is pinned"),
            ("vsp", None, "vsp: not on the hub"), ("vstar", tmp_path / "none.tsv", "no such file or folder"),
            ("vstar", tmp_path, "a folder; expected VStarBench.tsv")):
        with pytest.raises(DataError, match=match):
            prepare(TABLE[name], tmp_path / "images", source)
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


def test_the_table_holds_the_published_sizes():
    assert {name: bench.n for name, bench in TABLE.items() if bench.n} == {
        "vstar": 191, "vstar_regions": 191, "hrbench_4k": 800, "hrbench_8k": 800, "mme_realworld_lite": 1919,
        "blink/Jigsaw": 150, "blink/Multi-view_Reasoning": 133, "tablevqa/vwtq": 750,
        "tablevqa/vwtq_syn": 250, "tablevqa/vtabfact": 250, "mmvp": 300, "cv_bench/2D": 1438,
        "cv_bench/3D": 1200, "mmstar": 1500, "mme": 2374, "ocrbench_v2": 10000, "vsp": 400}
    vstar, hrbench = {"direct_attributes": 115, "relative_position": 76}, {"single": 400, "cross": 400}
    assert set(TABLE["mmstar"].counts.values()) == {250} and len(TABLE["mmstar"].counts) == 6
    assert {name: bench.counts for name, bench in TABLE.items() if bench.counts and name != "mmstar"} == {
        "vstar": vstar, "vstar_regions": vstar, "hrbench_4k": hrbench, "hrbench_8k": hrbench,
        "vsp": {f"level_{n}": 100 for n in (3, 4, 5, 6)}}
    assert (TABLE["blink/Jigsaw"].n_images, TABLE["blink/Multi-view_Reasoning"].n_images) == (3, 2)


def test_real_vsp_problems_come_out_word_for_word_with_their_pictures(shared_data, tmp_path):
    source = shared_data / "vsp" / "test.jsonl"
    published = [json.loads(line) for line in source.read_text().splitlines()]
    items = prepare(TABLE["vsp"], tmp_path / "v.images", source)
    assert len(items) == len(published) == 400 and json.dumps(items)
    for item, row in zip(items, published):
        assert (item["question"], item["answer"]["value"]) == (row["text_input"], row["map_desc"])
        stored = (tmp_path / item["images"][0]["path"]).read_bytes()
        assert stored == (source.parent / row["image_input"]).read_bytes()
