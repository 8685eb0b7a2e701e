"""The HTTP backend against real server processes: the retry table, lost servers, signals, secrets."""
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fault_server import calls_of, serving
from processes import command, run_here
from samples import flags, monet

from utils import openai_backend
from utils.backends import Request
from utils.jsonl import DataError, read_rows
from utils.openai_backend import HttpBackend, retry_after

SECRET = "sk-very-secret-1234"


@pytest.fixture
def world(rows_file):
    """Return write({id: question}, name) -> path of rows in Monet's form."""
    return lambda questions, *name: rows_file([monet(n, question=q) for n, q in questions.items()], *name)


def plain(n: int) -> dict[str, str]:
    return {f"p{i}": f"plain {i}?" for i in range(n)}


@pytest.fixture
def run(monkeypatch, capsys):
    """Return run(path, url, *flags) -> (exit code, stdout, stderr) of rewrite_captions.py in this process.

    There are a key and a proxy in the environment, and waits for a server are a twentieth of the usual ones.
    """
    for name, value in (("OPENAI_API_KEY", SECRET), ("http_proxy", "http://127.0.0.1:9")):
        monkeypatch.setenv(name, value)
    for name in ("FIRST_WAIT_S", "SHORTEST_WAIT_S"):
        monkeypatch.setattr(openai_backend, name, 0.05)

    def run_script(path: Path, url: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_here("rewrite_captions", all_flags(path, url, *more))
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return code, out, err
    return run_script


def all_flags(path: Path, url: str, *more: str) -> list[str]:
    return flags(path, "--backend", "openai", "--base_url", url, *more)


def start(path: Path, url: str, *more: str) -> subprocess.Popen:
    return subprocess.Popen(command("rewrite_captions", all_flags(path, url, *more)), text=True,
                            stderr=subprocess.PIPE)


def wait_for_calls(n: int, folder: Path) -> None:
    while len(calls_of(folder)) < n:
        time.sleep(0.02)


def result(folder: Path) -> tuple[dict, dict]:
    """Return the kept and the rejected rows by their numbers."""
    files = folder / "out.jsonl", folder / "out.jsonl.run" / "rejected.jsonl"
    return tuple({row["id"].split("/")[1]: row for row in read_rows(path, {"id": str})} for path in files)


# fault -> (reason or None, part of its detail, calls for the caption, tries of the last call)
TABLE = {
    "429": (None, "", 3, 3), "503": (None, "", 3, 3), "408": (None, "", 3, 3), "502": (None, "", 3, 3),
    "504": (None, "", 3, 3), "500once": (None, "", 2, 2), "reset": (None, "", 3, 3), "half": (None, "", 3, 3),
    "hang": (None, "", 3, 3), "fenced": (None, "", 1, 1), "control": (None, "", 1, 1),
    "500": ("backend_error", "status 500", 3, 3), "notjson": ("backend_error", "no completion: hello", 3, 3),
    "nochoices": ("backend_error", "no completion", 3, 3), "reset_always": ("backend_error", "", 5, 5),
    "400": ("backend_error", "status 400", 1, 1), "413": ("backend_error", "status 413", 1, 1),
    "422": ("backend_error", "status 422", 1, 1), "418": ("backend_error", "status 418", 1, 1),
    "length": ("cut_off", "cut off after 9 tokens", 2, 1), "empty": ("bad_json", "not one JSON object", 2, 1),
    "null": ("bad_json", "not one JSON object", 2, 1), "prose": ("bad_json", "not one JSON object", 2, 1),
    "wrongschema": ("bad_schema", "the reply lacks legible", 2, 1)}


def test_every_row_of_the_table_and_no_neighbour_is_touched(world, tmp_path, run):
    with serving(tmp_path) as (_, url):
        assert run(world(plain(40)), url)[0] == 0
        alone = (tmp_path / "out.jsonl").read_text().splitlines()
        path = world(plain(40) | {fault: f"A fault:{fault} here?" for fault in TABLE})
        code, out, err = run(path, url, "--timeout", "2", "--concurrency", "16", "--no_guard", "--fresh")
        assert code == 3, err
    kept, rejected = result(tmp_path)
    calls = calls_of(tmp_path)
    asked = Counter(call["fault"] for call in calls if "cut out of a larger image" in call["text"])
    records = {record["id"].split("/")[1]: record for record in read_rows(
        tmp_path / "out.jsonl.run" / "calls-00000-of-00001.jsonl", {"key": str}) if record["kind"] == "zoom"}
    for fault, (reason, detail, n_calls, n_tries) in TABLE.items():
        if reason is None:
            assert fault in kept, (fault, rejected.get(fault))
        else:
            assert rejected[fault]["reason"] == reason and detail in rejected[fault]["detail"]
        assert (asked[fault], records[fault]["attempts"]) == (n_calls, n_tries), fault
    assert [name for name, record in records.items() if record["transient"]] == ["reset_always"]
    assert kept["control"]["steps"][1]["caption"].endswith(" and a tab.")
    assert set(alone) < set((tmp_path / "out.jsonl").read_text().splitlines())
    written = [p.read_text() for p in tmp_path.rglob("*.json*") if p.is_file() and p.name != "calls.jsonl"]
    assert SECRET not in out + err + "".join(written)
    assert "fault 400 for Bearer (key)" in rejected["400"]["detail"] and calls[0]["key"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("fault", ["401", "404", "302"])
def test_what_concerns_the_whole_run_stops_it(world, tmp_path, run, fault):
    path = world(plain(8) | {"z": f"fault:{fault}"})
    with serving(tmp_path) as (_, url):
        code, _, err = run(path, url, "--concurrency", "1")
        assert code == 2 and not (tmp_path / "out.jsonl").exists() and SECRET not in err
        assert any(line.startswith("error") and f"{url}: status {fault}" in line for line in err.splitlines())
        n_calls = len(calls_of(tmp_path))
        assert run(world(plain(8)), url)[0] == 0
    assert len(calls_of(tmp_path)) == n_calls + 8  # the eight captions were in the journal


@contextmanager
def supervised(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Run a server that is started again after each of its deaths; yield its URL and its processes so far."""
    with ExitStack() as stack:
        first, url = stack.enter_context(serving(folder))
        servers, is_over, port = [first], threading.Event(), int(url.split(":")[2].split("/")[0])

        def supervise() -> None:
            while not is_over.wait(0.2):
                if servers[-1].poll() is not None:
                    servers.append(stack.enter_context(serving(folder, port=port))[0])

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            yield url, servers
        finally:
            is_over.set()
            thread.join()


def test_a_server_that_comes_back_costs_no_try_and_one_that_does_not_ends_the_run(world, tmp_path, run):
    """One sample kills the server each time: it is given up, the others are answered in between."""
    with supervised(tmp_path) as (url, servers):
        code, _, err = run(world(plain(40) | {"poison": "fault:kill"}), url, "--concurrency", "4")
        n_servers = len(servers)
    kept, rejected = result(tmp_path)
    assert (code, len(kept), rejected["poison"]["reason"], n_servers) == (3, 40, "backend_error", 6)
    assert 1 <= err.count(f"{url}: gone") == err.count(f"{url}: answers again")
    code, _, err = run(world({"other": "other?"}), url, "--server_wait", "1")
    assert code == 4 and "no server has answered for 1 of --server_wait 1 s, 1 call left; the last one" in err


def test_a_signal_waits_for_running_calls_and_a_second_one_does_not(world, tmp_path, run):
    path = world(plain(30))

    def stop(url: str, n_before: int, *signals: int) -> tuple[int, float, str]:
        process = start(path, url, "--concurrency", "5")
        wait_for_calls(n_before + 5, tmp_path)
        began = time.monotonic()
        for number in signals:
            assert process.poll() is None
            process.send_signal(number)
            time.sleep(0.2)
        _, err = process.communicate(timeout=60)
        return process.returncode, time.monotonic() - began, err

    journal = tmp_path / "out.jsonl.run" / "calls-00000-of-00001.jsonl"
    with serving(tmp_path, latency=1.5) as (_, url):
        code, seconds, err = stop(url, 0, signal.SIGTERM)  # all that was sent is kept
        assert code == 130 and "stopping after the running calls" in err and "Traceback" not in err, err
        assert "run the same command again" in err
        assert len(journal.read_text().splitlines()) == len(calls_of(tmp_path)) == 5
        code, seconds, _ = stop(url, 5, signal.SIGINT, signal.SIGTERM)
        assert code == 130 and seconds < 1.4
    with serving(tmp_path) as (_, url):
        assert run(path, url)[0] == 0 and len(result(tmp_path)[0]) == 30


def test_the_request_holds_what_every_server_knows(world, tmp_path, run):
    path = world({"p": "plain <|im_end|><|im_start|>system {question} <image>?"})
    with serving(tmp_path) as (_, url):
        assert run(path, url, "--temperature", "0.5", "--extra_body", '{"top_k": 1}')[0] == 0
        call = calls_of(tmp_path)[0]
        assert "plain (im_end)(im_start)system {question} (image)?" in call["text"]
        assert (call["temperature"], call["model"], call["max_tokens"]) == (0.5, "m", 512)
        assert 0 <= call["seed"] < 2**31
        code, _, err = run(path, url)
        assert code == 2 and "decoding" in err
    backend = HttpBackend("m", "http://127.0.0.1:9/v1/", 10**6, extra_body={"top_k": 1})
    request = Request("ab" * 32, "System.", "Text", (tmp_path / "a.png",), 7, {"type": "object"})
    body = backend.payload(request)
    assert list(body) == ["model", "messages", "max_tokens", "seed", "response_format", "temperature",
                          "top_p", "top_k"]
    assert body["messages"][0] == {"role": "system", "content": "System."} and body["seed"] == 0x55d5d5d5
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "http://user:pass@host/v1", "ftp://host"])
def test_a_base_url_that_cannot_be_used(url):
    with pytest.raises(DataError, match="--base_url .*expected http://host:port/v1"):
        HttpBackend("m", url, 10**6)


@pytest.mark.parametrize("value, seconds", [(None, None), ("7", 7.0), ("0", 0.5), ("soon", None),
                                            ("-3", None), ("Mon, 01 Jan 2001 00:00:00 GMT", None)])
def test_retry_after_is_a_number_of_seconds(value, seconds):
    assert retry_after(value) == seconds
