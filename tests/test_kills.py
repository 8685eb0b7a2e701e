"""SIGKILL at random moments changes nothing: stages 1 and 2, with a model in the process and with a server.

    python -m pytest tests/test_kills.py            # a few kills of each
    python -m pytest tests/test_kills.py -m slow    # 25 kills, three trials of each
"""
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_server import calls_of, serving
from test_filter_data import row
from test_rewrite_captions import monet

from utils.rows import write_rows

ROOT = Path(__file__).parents[1]
CONCURRENCY = 8
PROMPTS = {"rewrite_captions": {"SYSTEM": "", "ZOOM": "{question}", "RETRY": "{fault}"},
           "filter_data": {"SYSTEM": "", "JUDGE": "{chain}", "RETRY": "{fault}"}}
DERIVED = {"rewrite_captions": "rejected.jsonl", "filter_data": "verdicts.jsonl"}


def write_input(script: str, folder: Path, n: int) -> None:
    if script == "filter_data":
        write_rows(folder / "in.jsonl", [row(f"s/{i}", f"The hull shows {i} of 42.") for i in range(n)])
    else:
        samples = [monet(i, question="which one " * (i % 5) + f"{i}?") for i in range(n)]
        (folder / "in.jsonl").write_text(json.dumps(samples))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS[script]))


def command(script: str, folder: Path, output: str, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), "--input", str(folder / "in.jsonl"), "--image_root", str(folder),
            "--output", str(folder / output), "--no_guard", *more]


def kill_until_done(make, journal: Path, takes_s: float, n_kills: int, rng: random.Random) -> int:
    """Start and kill a run `n_kills` times; return how often the kill came before its end."""
    n_killed = 0
    for _ in range(n_kills):
        process = subprocess.Popen(make, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # by time, or as soon as the journal grows: loading takes most of the time, and a kill there proves little
        size = journal.stat().st_size if journal.exists() else 0
        until = time.monotonic() + rng.uniform(0.3, 1.2) * takes_s
        while process.poll() is None and time.monotonic() < until:
            if journal.exists() and journal.stat().st_size > size and rng.random() < 0.1:
                break
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
    return n_killed


def kill_and_compare(script: str, folder: Path, flags: list[str], code: int, n_kills: int, seed: int) -> tuple[int, int]:
    """Compare an uninterrupted run with a killed one, both ending in `code`; return (kills, records of the first)."""
    began = time.monotonic()
    whole = subprocess.run(command(script, folder, "whole.jsonl", *flags), capture_output=True, text=True)
    assert whole.returncode == code, whole.stderr
    killed = command(script, folder, "killed.jsonl", *flags)
    journal = folder / "killed.jsonl.run" / "calls-00000-of-00001.jsonl"
    n_killed = kill_until_done(killed, journal, time.monotonic() - began, n_kills, random.Random(seed))
    last = subprocess.run(killed, capture_output=True, text=True)
    assert last.returncode == code, last.stderr
    for name in ("{}.jsonl", "{}.jsonl.run/" + DERIVED[script]):
        assert (folder / name.format("killed")).read_bytes() == (folder / name.format("whole")).read_bytes()
    replies = [sorted((r["key"], r["text"]) for r in map(json.loads, (folder / f"{name}.jsonl.run" / journal.name).open()))
               for name in ("whole", "killed")]
    assert replies[0] == replies[1]  # word for word, and none twice
    return n_killed, len(replies[0])


def local(script: str, folder: Path, checkpoint: Path, n_kills: int, seed: int) -> None:
    """A random model never writes JSON: each sample is asked twice and ends as an error, always alike."""
    n_samples = 12 + 4 * n_kills  # so many that the last kill still finds work
    write_input(script, folder, n_samples)
    flags = ["--model", str(checkpoint), "--prompts", str(folder / "prompts.json"), "--batch_size", "3",
             "--max_new_tokens", "24", "--max_pixels", str(9 * 28 * 28)]
    n_killed, n_records = kill_and_compare(script, folder, flags, 3, n_kills, seed)
    assert n_killed >= 0.8 * n_kills and n_records == 2 * n_samples


def server(script: str, folder: Path, n_kills: int, seed: int, latency: float) -> None:
    write_input(script, folder, 150 + 8 * n_kills)
    with serving(folder, latency=latency) as (_, url):
        flags = ["--backend", "openai", "--model", "m", "--base_url", url, "--concurrency", str(CONCURRENCY)]
        n_killed, n_records = kill_and_compare(script, folder, flags, 0, n_kills, seed)
    n_calls = len(calls_of(folder)) - n_records  # of the killed run
    assert n_killed >= 0.8 * n_kills and n_records <= n_calls <= n_records + n_killed * CONCURRENCY


@pytest.fixture
def world(picture):
    picture("a.png"), picture("b.png", color="blue")


@pytest.mark.parametrize("script", list(PROMPTS))
def test_a_few_kills(tmp_path, tiny_checkpoint, world, script):
    local(script, tmp_path, tiny_checkpoint, n_kills=2, seed=0)
    for path in tmp_path.glob("*.jsonl*"):
        path.rename(tmp_path / f"local-{path.name}")
    server(script, tmp_path, n_kills=4, seed=0, latency=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("backend", ["local", "openai"])
@pytest.mark.parametrize("script", list(PROMPTS))
def test_25_kills(tmp_path, tiny_checkpoint, world, script, backend, seed):
    if backend == "local":
        local(script, tmp_path, tiny_checkpoint, n_kills=25, seed=seed)
    else:
        server(script, tmp_path, n_kills=25, seed=seed, latency=0.15)
