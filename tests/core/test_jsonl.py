"""Reading with checks, writing by rename, and the journal: torn tails, damage, ranks."""
import argparse
import json
import os
from pathlib import Path

import pytest

from utils.cli import LONGEST_ERROR, ErrorRateError, cli, rank_world, shorten
from utils.journal import Journal
from utils.jsonl import (DataError, call_key, check_fields, load_object, located_rows, read_rows, sha256_file,
                         write_json, write_meta, write_rows)

FIELDS = {"id": str, "n": int}
SETTINGS = {"model": "a", "n": 1}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [
    b'{"id": "a", "n": 1}\n{"id": "b", "n": 2}\n', b'{"id": "a", "n": 1}\r\n\r\n{"id": "b", "n": 2}',
    b'\xef\xbb\xbf[{"id": "a", "n": 1},\n {"id": "b", "n": 2}]\n',
    b'  \n[\n{"id": "a", "n": 1}\n,{"id": "b", "n": 2} ] \n'])
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
    assert read_rows(write(path, b"[ ]"), {}) == read_rows(write(path, b""), {}) == []
    assert read_rows(write(path, b'{"n": 1}\n'), {"n": (int, float)}) == [{"n": 1}]


ROW = b'{"id": "a", "n": 1}'


@pytest.mark.parametrize("row, match", [
    (b'{"id": "b", "n": }', r"not JSON \(Expecting value"), (b'{"id": "b" "n": 1}', "not JSON"),
    (b"[1]", "expected a JSON object, got list"), (b"3", "expected a JSON object, got int"),
    (b'{"id": "b"}', r"no field 'n' \(expected int\)"),
    (b'{"id": "b", "n": true}', "field 'n' should be int, got bool"),
    (b'{"id": "b", "n": "1"}', "field 'n' should be int, got str '1'"),
    (b'{"id": "a", "n": 2}', r"duplicate id 'a', first seen at .*in\.jsonl:1"),
    (b'{"id": "\xff", "n": 1}', "byte 0xff is not UTF-8"), (b'{"id": "\\ud800"}', ".* half a surrogate pair"),
    (b"[" * 10_000 + b"]" * 10_000, ".*nested too deeply"), (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"id": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", ".*nested too deeply"),
    *((b'{"id": "b", "n": 1, "x": ' + number + b"}", r"not JSON \(Out of range float values")
      for number in (b"NaN", b"[-Infinity]", b'{"y": 1e999}', b"9" * 400 + b".0")),
    (b'{"id": "b", "n": 1, "n": 1}', r"not JSON \(key 'n' 2 times in one object\)"),
    (b'{"id": "b", "n": 1, "x": [{"y": 1, "\\u0079": 2, "y": 3}]}', r"not JSON \(key 'y' 3 times"),
    (b'["' + b"x" * 2**20 + b'"]', "a row of 1,048,58[01] bytes")])
def test_a_damaged_row_is_reported_with_its_line(tmp_path, row, match):
    for form, line in ((b"%b\n%b\n", 2), (b"%b\n\n%b", 3), (b"[%b,\n%b]", 2)):
        data = form % (ROW, row)
        with pytest.raises(DataError, match=rf"in\.jsonl:{line}: {match}"):
            read_rows(write(tmp_path / "in.jsonl", data), FIELDS)


@pytest.mark.parametrize("data, match", [
    (b"[%b\n%b]" % (ROW, ROW), r":2: not JSON \(Expecting ','"), (b"[%b,\n]" % ROW, ":2: not JSON"),
    (b"[%b,\n" % ROW, ":2: not JSON"), (b"[%b]\n," % ROW, r":2: not JSON \(Extra data"),
    (b'{"id": "a"}\n["' + b"x" * 2**20, ":1: no field 'n'")])  # before the next line is read
def test_a_damaged_list_is_reported_with_its_line(tmp_path, data, match):
    with pytest.raises(DataError, match=r"in\.jsonl" + match):
        read_rows(write(tmp_path / "in.jsonl", data), FIELDS)


@pytest.mark.parametrize("data", [b'{"id": "a"}\n["' + b"x" * 2**20, b'[{"id": "a"},\n["' + b"x" * 2**20])
def test_rows_after_the_limit_are_not_read(tmp_path, data):
    path = write(tmp_path / "in.jsonl", data)
    assert [row for _, row in located_rows(path, 1)] == [{"id": "a"}] and not list(located_rows(path, 0))


@pytest.mark.parametrize("text, match", [
    ("[1]", "list, expected an object"), ('{"a":' * 100_000, "nested too deeply"), ("{", "Expecting"),
    ("{}", "no field 'a' .expected int.*; run the stage that writes it again")])
def test_a_damaged_object_is_a_data_error(tmp_path, text, match):
    path = write(tmp_path / "settings.json", b'{"a": 1}')
    assert load_object(path, fields={"a": int}) == {"a": 1}
    path.write_text('{"a": 1, "a": 1}')
    with pytest.raises(DataError, match="key 'a' 2 times in one object"):
        load_object(path)
    path.write_text('{"a": NaN}')  # a measure may be undefined; a setting may not
    assert load_object(path)["a"] != load_object(path)["a"]
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        load_object(path, fields={"a": int})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    write_rows(path, [{"id": "ä"}])
    with pytest.raises(TypeError):
        write_rows(path, [{"id": "b"}, {"id": object()}])
    assert path.read_text(encoding="utf-8") == '{"id": "ä"}\n' and len(list(path.parent.iterdir())) == 1
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_meta_describes_the_run(tmp_path):
    source = write(tmp_path / "in.jsonl", b"x")
    args = argparse.Namespace(limit=3, path=Path("p"))
    write_meta(tmp_path / "out.jsonl", args, [source], 1.5, extra={"k": 1})
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["flags"] == {"limit": 3, "path": "p"} and meta["seconds"] == 1.5 and meta["extra"] == {"k": 1}
    assert meta["inputs"] == {str(source): sha256_file(source)}
    assert {"python", "torch", "pillow"} <= set(meta["versions"])


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
    assert cli(fail(DataError("x.jsonl:3: bad"))) == 2
    assert capsys.readouterr().err == "error: x.jsonl:3: bad\n"
    assert cli(fail(ErrorRateError("20 failed"))) == 4
    assert capsys.readouterr().err == "stopped: 20 failed\n"
    assert cli(fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        cli(fail(ZeroDivisionError()))
    capsys.readouterr()
    assert cli(fail(DataError("a\0b\x1b[2J" + "x" * 10**6))) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: a\\x00b\\x1b[2Jx") and len(message) < 2 * LONGEST_ERROR
    assert shorten("ä\nb") == "ä\nb"


def test_rank_world(monkeypatch):
    assert rank_world() == (0, 1, 0)
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert rank_world() == (9, 16, 1)


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
        assert cut == last or path.with_suffix(".torn").read_bytes() == whole[last:cut] + b"\n"


def is_text(record: dict) -> bool:
    check_fields("record", record, {"text": str})
    return record["text"] != "lost"


def test_one_check_is_for_what_is_written_and_what_is_read(tmp_path):
    """What the reader would call damage is not written; what counts no more is worth another try."""
    path = fill_journal(tmp_path / "run", 2)
    with Journal(tmp_path / "run", SETTINGS, is_valid=is_text) as journal:
        for record in ({"key": "a", "text": 1}, {"key": "a"}, {"key": "a", "text": "lost"}):
            with pytest.raises(ValueError, match="text|refuses"):
                journal.append(record)
        assert "a" not in journal and not journal.transient
    path.write_bytes(path.read_bytes() + b'{"key": "k1", "text": "lost"}\n')
    with Journal(tmp_path / "run", SETTINGS, is_valid=is_text) as journal:
        assert journal.transient == {"k1"}
        journal.append({"key": "k1", "text": "again"})
        assert not journal.transient


@pytest.mark.parametrize("line", [
    b"{broken", b"[1]", b'{"no": "key"}', b"\0\0\0", b"", b'\xef\xbb\xbf{"key": "a", "text": ""}',
    b'{"key": "\\ud800", "text": ""}', b"[" * 10_000, b'{"key": "a", "text": 1}'])
def test_damage_in_the_middle_is_reported_with_its_line(tmp_path, line):
    path = fill_journal(tmp_path / "run", 3)
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"calls-00000-of-00001\.jsonl:2: damaged journal line"):
        Journal(tmp_path / "run", SETTINGS, is_valid=is_text)
    path.write_bytes(b"\n".join(lines[:1] + lines[2:]))
    Journal(tmp_path / "run", SETTINGS).__exit__()  # the lock was released, and the advice helps


def test_other_settings_are_refused_with_both_columns(tmp_path):
    fill_journal(tmp_path / "run", 1)
    both = r"(?s)begun with other settings.*there +now\n  model +a +b\n  new +None +2"
    with pytest.raises(DataError, match=both):
        Journal(tmp_path / "run", {"model": "b", "n": 1, "new": 2})
    for text in ("{", '{"model": NaN}'):
        (tmp_path / "run" / "meta.json").write_text(text)
        with pytest.raises(DataError, match="meta.json: damaged"):
            Journal(tmp_path / "run", SETTINGS)


def test_ranks_write_to_their_own_files_and_read_all(tmp_path, monkeypatch):
    path = fill_journal(tmp_path / "run", 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Journal(tmp_path / "run", SETTINGS) as journal:
        assert "k0" in journal and journal.path.name == "calls-00001-of-00002.jsonl"
        with open(path, "ab") as file:  # another rank at work: a whole line and the beginning of the next
            file.write(b'{"key": "k1"}\n{"key": "k')
        journal.reload()
        assert "k1" in journal and len(list(journal)) == 2
        journal.append({"key": "k1", "text": "later"})
        assert journal.get("k1")["text"] == "later" and journal.get("k9") is None
        journal.forget("k1")
        assert "k1" not in journal
    assert path.read_bytes().endswith(b'{"key": "k')  # only the owner cuts a torn tail


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
