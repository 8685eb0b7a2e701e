"""Reading with checks, writing by rename, and the journal under torn tails, damage, a second writer and
SIGKILL.

    python -m pytest tests/test_rows.py
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.cli import cli, rank_world
from utils.journal import Journal
from utils.jsonl import (DataError, call_key, load_object, located_rows, read_rows, sha256_file, write_json,
                         write_meta, write_rows)

ROOT = Path(__file__).parents[2]
FIELDS = {"id": str, "n": int}
SETTINGS = {"model": "a", "n": 1}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [
    b'{"id": "a", "n": 1}\n{"id": "b", "n": 2}\n', b'{"id": "a", "n": 1}\r\n\r\n{"id": "b", "n": 2}',
    b'\xef\xbb\xbf[{"id": "a", "n": 1},\n {"id": "b", "n": 2}]\n',
    b'  \n[\n{"id": "a", "n": 1}\n,{"id": "b", "n": 2}]'])
def test_reads_lines_and_lists(tmp_path, data):
    rows = read_rows(write(tmp_path / "in.jsonl", data), FIELDS)
    assert rows == [{"id": "a", "n": 1}, {"id": "b", "n": 2}]
    assert read_rows(tmp_path / "in.jsonl", FIELDS, limit=1) == rows[:1]


def test_locates_items_of_a_list_and_keeps_line_separators_in_strings(tmp_path):
    path = write(tmp_path / "in.json", '[{"id": "a\u2028b"},\n\n {"x": [\n1]}, {"y": 2}]'.encode())
    assert [(where.rpartition(":")[2], list(row)) for where, row in located_rows(path)] == [
        ("1", ["id"]), ("3", ["x"]), ("4", ["y"])]
    path = write(tmp_path / "in.jsonl", '{"id": "a\u2028b"}\n'.encode())
    assert read_rows(path, {"id": str}) == [{"id": "a\u2028b"}]


@pytest.mark.parametrize("data, match", [
    (b'{"id": "a", "n": 1}\n{"id": "b", "n": }\n', r"in\.jsonl:2: not JSON"),
    (b'{"id": "a", "n": 1}\n[1]\n', r"in\.jsonl:2: expected a JSON object, got list"),
    (b'[{"id": "a", "n": 1},\n{"id": "b" "n": 1}]', r"in\.jsonl:2: not JSON"),
    (b'[{"id": "a", "n": 1},\n3]', r"in\.jsonl:2: expected a JSON object, got int"),
    (b'{"id": "a"}\n', r"in\.jsonl:1: no field 'n' \(expected int\)"),
    (b'{"id": "a", "n": true}\n', r"in\.jsonl:1: field 'n' should be int, got bool"),
    (b'{"id": "a", "n": "1"}\n', r"in\.jsonl:1: field 'n' should be int, got str '1'"),
    (b'{"id": "a", "n": 1}\n\n{"id": "a", "n": 2}\n', r"in\.jsonl:3: id 'a' stands already at .*in\.jsonl:1"),
    (b'{"id": "a", "n": 1}\n{"id": "\xff", "n": 1}\n', r"in\.jsonl:2: byte 0xff is not UTF-8"),
    (b'{"id": "\\ud800", "n": 1}\n', r"in\.jsonl:1: .* half a surrogate pair"),
])
def test_says_where_a_row_is_wrong(tmp_path, data, match):
    with pytest.raises(DataError, match=match):
        read_rows(write(tmp_path / "in.jsonl", data), FIELDS)


@pytest.mark.parametrize("data", [b'{"id": "a"}\n["' + b"x" * 2**20, b'[{"id": "a"},\n["' + b"x" * 2**20
                                  + b'"]]'])
def test_a_row_too_long_is_told_by_its_length_and_nothing_is_read_behind_the_limit(tmp_path, data):
    path = write(tmp_path / "in.jsonl", data)
    with pytest.raises(DataError, match=r"in\.jsonl:2: a row of 1,048,5\d\d bytes"):
        list(located_rows(path))
    assert [row for _, row in located_rows(path, 1)] == [{"id": "a"}] and not list(located_rows(path, 0))


def test_a_missing_file_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(DataError, match="no.jsonl: No such file or directory; stage 1 writes it"):
        read_rows(tmp_path / "no.jsonl", FIELDS, hint="stage 1 writes it")


def test_a_float_field_takes_an_int_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "in.jsonl", b'{"id": "a", "n": 1}\n')
    assert read_rows(path, {"n": (int, float)}) == [{"id": "a", "n": 1}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    write_rows(path, [{"id": "ä"}])
    with pytest.raises(TypeError):
        write_rows(path, [{"id": "b"}, {"id": object()}])
    assert path.read_text(encoding="utf-8") == '{"id": "ä"}\n'
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_meta_describes_the_run(tmp_path):
    source = write(tmp_path / "in.jsonl", b"x")
    write_meta(tmp_path / "out.jsonl", argparse.Namespace(limit=3, path=Path("p")), [source], 1.5,
               extra={"k": 1})
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["flags"] == {"limit": 3, "path": "p"} and meta["seconds"] == 1.5 and meta["extra"] == {"k": 1}
    assert meta["inputs"] == {str(source): sha256_file(source)} and {"python", "torch",
                                                                     "pillow"} <= set(meta["versions"])


def test_call_key_depends_on_content_not_on_order():
    assert call_key(a=1, b=["ä"]) == call_key(b=["ä"], a=1) != call_key(a=1, b=["a"])
    with pytest.raises(ValueError):
        call_key(a=float("nan"))


def test_cli_exit_codes(capsys):
    def fail(error):
        def main():
            raise error
        return main
    assert cli(lambda: 3) == 3
    assert cli(fail(DataError("x.jsonl:3: bad"))) == 2 and capsys.readouterr(
        ).err == "error: x.jsonl:3: bad\n"
    assert cli(fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        cli(fail(ZeroDivisionError()))


def test_rank_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank_world() == (0, 1, 0)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_world() == (9, 16, 1)


# ------------------------------------------------------------------------------------------------ journal
def fill_journal(folder: Path, n: int) -> Path:
    with Journal(folder, SETTINGS) as journal:
        for i in range(n):
            journal.append({"key": f"k{i}", "text": "é" * i})
        return journal.path


def test_a_torn_tail_is_cut_at_every_byte_of_the_last_line(tmp_path):
    path = fill_journal(tmp_path / "run", 3)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        path.with_suffix(".torn").unlink(missing_ok=True)
        with Journal(tmp_path / "run", SETTINGS) as journal:
            assert sorted(journal) == ["k0", "k1"]
            journal.append({"key": "k2", "text": "éé"})
        assert path.read_bytes() == whole
        assert path.with_suffix(".torn").is_file() == (cut > last)
        if cut > last:
            assert path.with_suffix(".torn").read_bytes() == whole[last:cut] + b"\n"


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b'{"no": "key"}', b"\0\0\0", b""])
def test_damage_in_the_middle_is_told_with_its_line(tmp_path, line):
    path = fill_journal(tmp_path / "run", 3)
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"calls-00000-of-00001\.jsonl:2: damaged journal line"):
        Journal(tmp_path / "run", SETTINGS)
    path.write_bytes(b"\n".join(lines[:1] + lines[2:]))
    Journal(tmp_path / "run", SETTINGS).__exit__()  # the lock was given back, and the advice helps


def test_other_settings_are_refused_with_both_columns(tmp_path):
    fill_journal(tmp_path / "run", 1)
    with pytest.raises(DataError,
                       match=r"(?s)begun with other settings.*there +now\n  model +a +b\n  new +None +2"):
        Journal(tmp_path / "run", {"model": "b", "n": 1, "new": 2})
    (tmp_path / "run" / "meta.json").write_text("{")
    with pytest.raises(DataError, match="meta.json: damaged"):
        Journal(tmp_path / "run", SETTINGS)


WRITER = """
import sys, time
from utils.journal import Journal
with Journal(sys.argv[1], {"model": "a", "n": 1}) as journal:
    print("open", flush=True)
    for n in range(10**9):
        if f"k{n}" not in journal:
            journal.append({"key": f"k{n}", "text": "x" * 20_000})
        time.sleep(0.0005)
"""


def start_writer(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    return process


def test_a_second_writer_is_refused(tmp_path):
    process = start_writer(tmp_path / "run")
    try:
        with pytest.raises(DataError, match="another process writes here"):
            Journal(tmp_path / "run", SETTINGS)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    Journal(tmp_path / "run", SETTINGS).__exit__()


def test_sigkill_loses_no_record_that_was_written(tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        process = start_writer(tmp_path / "run")
        time.sleep(rng.uniform(0.02, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with Journal(tmp_path / "run", SETTINGS) as journal:
        assert len(journal) > 5
        assert sorted(journal) == sorted(f"k{n}" for n in range(len(journal)))


def test_ranks_write_apart_and_read_together(tmp_path, monkeypatch):
    path = fill_journal(tmp_path / "run", 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Journal(tmp_path / "run", SETTINGS) as journal:
        assert "k0" in journal and journal.path.name == "calls-00001-of-00002.jsonl"
        with open(path, "ab") as file:  # another rank at work: a whole line and the beginning of one
            file.write(b'{"key": "k1"}\n{"key": "k')
        journal.reload()
        assert "k1" in journal and len(journal) == 2
        journal.append({"key": "k1", "text": "later"})
        assert journal.get("k1")["text"] == "later" and journal.get("k9") is None
        journal.forget("k1")
        assert "k1" not in journal
    assert path.read_bytes().endswith(b'{"key": "k')  # not ours to cut


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    with Journal(tmp_path / "run", SETTINGS) as journal:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, journal.fd)
        with pytest.raises(DataError, match="No space left on device; make room"):
            journal.append({"key": "k"})
        assert "k" not in journal
        null = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
        os.dup2(null, journal.fd)
        os.close(full), os.close(null)


@pytest.mark.parametrize("text, said", [("[1]", "list, expected an object"),
                                        ('{"a":' * 100_000, "nested too deeply"), ("{", "Expecting")])
def test_a_file_that_is_no_object_is_a_value_error(tmp_path, text, said):
    path = tmp_path / "settings.json"
    path.write_text('{"a": 1}')
    assert load_object(path) == {"a": 1}
    path.write_text('{"a": NaN}')  # a measure may be undefined; of settings utils.journal asks more
    assert load_object(path)["a"] != load_object(path)["a"]
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_object(path)
