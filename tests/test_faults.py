"""Real faults: full and read-only disks, wrong clocks, dead ranks, truncated files, kills."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import kills
import pytest
from hostile import PICKLE
from kills import final_files
from processes import MAINS, command, rank_of, run_here
from transformers import AutoModelForImageTextToText

from utils.jsonl import write_json

pytestmark = pytest.mark.usefixtures("plain_figures")

LOCAL = list(MAINS)  # the six scripts, each with a model in its process
each_script = pytest.mark.parametrize("script", LOCAL)
DISK = "No space left on device|File too large|I/O error"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return the cases of tests/kills.py, and whole(script) -> output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("world")
    kills.make_world(folder, 0)
    cases = kills.cases(folder, 0)

    @cache
    def whole(script: str) -> Path:
        output = folder / f"whole_{script}" / "out"
        assert run(cases[script], output) == cases[script].code
        return output
    return cases, whole


def run(case, output: Path) -> int:
    return run_here(case.script, [*case.flags, "--output", str(output)])


def refused(capsys, case, output: Path, match: str, otherwise: int = 2) -> bool:
    """Return whether a run ends with exit code 2 and one line with the reason; assert that it ends so or with
    the code `otherwise`."""
    capsys.readouterr()
    code, err = run(case, output), capsys.readouterr().err
    if code != otherwise or otherwise == 2:
        assert code == 2 and re.match(f"error: .*({match})", err.strip().splitlines()[-1]), err[-3000:]
        assert "Traceback" not in err
    return code == 2


@contextmanager
def disk(folder: Path, options: str):
    """Mount a small disk at `folder`, if this user may; yield whether it is there."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                             capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, size: int):
    """Yield a function that enlarges the disk at `folder`, which holds `size` bytes until then."""
    with disk(folder, f"size={size}") as mounted:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        def make_room() -> None:
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        try:
            yield make_room
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def size_of(folder: Path) -> int:
    """Return the bytes that a folder takes, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def check_full_disk(world, capsys, monkeypatch, folder: Path, script: str, share: float) -> bool:
    """Run on a disk that holds `share` of the output, then on a larger one; return whether it was full.

    In the second run all files have dates in the future or the past, and the clock goes back at every call.
    """
    cases, whole = world
    case, expected = cases[script], final_files(cases[script], whole(script))
    with small_disk(folder, int(share * size_of(whole(script).parent)) // 4096 * 4096 or 4096) as make_room:
        was_full = refused(capsys, case, folder / "out", DISK, otherwise=case.code)
        assert not list(folder.rglob("*.tmp"))  # what could not be written takes no room
        make_room()
        if not was_full:
            return False
        for n, path in enumerate(sorted(folder.rglob("*"))):
            os.utime(path, (4e9, 4e9) if n % 2 else (6e8, 6e8))
        now = [time.time()]
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now.append(now[-1] - 3600) or now[-1])
            assert run(case, folder / "out") == case.code
        assert final_files(case, folder / "out") == expected
        written, records = case.records_of(folder / "out"), case.records_of(whole(script))
        assert sorted(map(str, written)) == sorted(map(str, records))  # none lost, none doubled
    return True


@each_script
def test_a_full_disk_and_then_a_clock_that_goes_back(world, capsys, monkeypatch, tmp_path, script):
    assert check_full_disk(world, capsys, monkeypatch, tmp_path / "disk", script, 0.6)


@pytest.mark.slow
@each_script
def test_a_disk_that_is_full_at_many_places(world, capsys, monkeypatch, tmp_path, script):
    shares = [0.001, *(n / 12 for n in range(1, 12)), 0.97]
    full = [check_full_disk(world, capsys, monkeypatch, tmp_path / f"disk{n}", script, share)
            for n, share in enumerate(shares)]
    assert sum(full) >= 8


@each_script
def test_an_output_that_cannot_be_written(world, capsys, tmp_path, script):
    (tmp_path / "file").write_text("")
    refused(capsys, world[0][script], tmp_path / "file" / "out", "Not a directory|File exists")
    with disk(tmp_path / "disk", "ro") as mounted:
        if mounted:
            refused(capsys, world[0][script], tmp_path / "disk" / "out", "Read-only file system")
    assert (tmp_path / "file").read_text() == ""


@each_script
def test_an_output_at_which_another_process_is_at_work(world, capsys, tmp_path, script):
    """The other process only holds the lock; its files stay as they were."""
    case, output = world[0][script], tmp_path / "out"
    path = Path(f"{output}{case.lock}")
    part = path.parent / "step-4.part"
    part.mkdir(parents=True)  # as if the other process were saving
    module, lock = ("journal", f"Journal(path.parent, name={path.name.partition('-')[0]!r})")
    if script == "train_sft":
        module, lock = "train.checkpoints", "lock_run_folder(path.parent)"
    code = (f"import pathlib, time; from utils.{module} import *; path = pathlib.Path({str(path)!r})\n"
            f"with {lock}: print(flush=True), time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=kills.ROOT)
    try:
        holder.stdout.readline()
        refused(capsys, case, output, "another process")
        assert sorted(path.parent.iterdir()) == sorted([path, part]) and path.read_bytes() == b""
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def start(case, output: Path, processes: int = 1) -> subprocess.Popen:
    """Start a run as a process, or under torchrun, its messages in a file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_name("log.txt"), "a") as log:
        return subprocess.Popen(command(case.script, [*case.flags, "--output", str(output)], processes),
                                stdout=log, stderr=log)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("script", [name for name in LOCAL if name != "probe"])  # probe.py is one process
def test_a_dead_rank_stops_the_others_and_the_run_resumes(world, tmp_path, script, rank):
    case = world[0][script]
    together, output, code = tmp_path / "whole" / "out", tmp_path / "cut" / "out", int(case.code > 0)
    assert start(case, together, 2).wait(timeout=300) == code
    launcher = start(case, output, 2)
    journal = Path(f"{output}.run/calls-0000{rank}-of-00002.jsonl")
    if script == "train_sft":
        wait_for(lambda: case.progress(output) >= 2, launcher)
    else:
        wait_for(lambda: journal.exists() and journal.stat().st_size > 0, launcher)
    pid = rank_of(launcher.pid, rank)
    others = [rank_of(launcher.pid, n) for n in (0, 1) if n != rank]
    os.kill(pid, signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not any(pid and Path(f"/proc/{pid}").exists() for pid in others)
    processes = 3 if script == "evaluate" else 2  # which finish what two began
    assert start(case, output, processes).wait(timeout=300) == code
    assert final_files(case, output) == final_files(case, together)


def truncate(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])


def leave_pickle(name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(PICKLE)


def split_shards(lost: str, folder: Path) -> None:
    """Split the weights into files with an index; lose the second file or the entries of it."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    second, index = sorted(folder.glob("model-*"))[1], folder / "model.safetensors.index.json"
    if lost == "file":
        second.unlink()
    else:
        files = json.loads(index.read_text())["weight_map"]
        left = {weight: file for weight, file in files.items() if file != second.name}
        write_json(index, {"metadata": {}, "weight_map": left})


CUT = ("model.safetensors", "config.json", "vocab.json", "preprocessor_config.json", "tokenizer_config.json",
       "generation_config.json")
DAMAGES = {name: partial(truncate, name) for name in CUT} | {
    "tokenizer.json": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "added_to'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a pickle": partial(leave_pickle, "model.safetensors"),
    "another pickle": partial(leave_pickle, "pytorch_model.bin"),
    "no shard": partial(split_shards, "file"), "no entries": partial(split_shards, "entries")}


@pytest.mark.parametrize("script, damage", [
    *((name, "model.safetensors") for name in LOCAL if name != "evaluate"),
    *(("evaluate", name) for name in DAMAGES)])
def test_a_model_half_written_is_refused(world, capsys, tmp_path, script, damage):
    case, copy = world[0][script], tmp_path / "copy"
    place = case.flags.index("--model") + 1
    shutil.copytree(case.flags[place], copy)
    DAMAGES[damage](copy)
    changed = replace(case, flags=[*case.flags[:place], str(copy), *case.flags[place + 1:]])
    refused(capsys, changed, tmp_path / "out", re.escape(str(copy)))
    assert not (tmp_path / "out").is_file()


@pytest.mark.parametrize("script", [name for name in LOCAL if name != "train_sft"])
def test_a_truncated_journal_line_is_named_and_its_work_repeated_without_it(world, capsys, tmp_path, script):
    cases, whole = world
    case, output = cases[script], tmp_path / "out"
    for path in whole(script).parent.glob("out*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    journal = Path(f"{output}{case.lock}")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], lines[2][:len(lines[2]) // 2] + b"\n", *lines[3:]]))
    refused(capsys, case, output, re.escape(f"{journal}:3: damaged"))
    journal.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert run(case, output) == case.code
    assert final_files(case, output) == final_files(case, whole(script))


def test_truncated_settings_of_a_training_are_refused(world, capsys, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "settings.json").write_text('{"data": ')
    refused(capsys, world[0]["train_sft"], tmp_path / "out", "settings.json: damaged")


# ---- SIGKILL at random moments: a kill of some scripts, or 25 of each
# four ways to resume: calls to a server, checkpoints, answers, decodings
SOME = ["rewrite_captions openai", "train_sft", "evaluate", "intervene"]
SLOW = [pytest.param(25, seed, [], marks=pytest.mark.slow) for seed in (1, 2)]


@pytest.mark.parametrize("n, seed, cases", [(1, 0, ["--cases", *SOME]), *SLOW])
def test_kills(n, seed, cases):
    done = subprocess.run([sys.executable, kills.__file__, "--kills", str(n), "--seed",
                           str(seed), *cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == (len(SOME) if cases else 8)
    for name, its in results.items():
        assert its["kills"] >= 0.8 * n and its["records"] > 0 and its["files"] > 1, name
        assert (its["lost"], its["doubled"], its["identical"]) == (0, 0, True), name
        assert 0 <= its.get("calls_made_again", 0) <= 8 * its["kills"], name  # 8 are under way
