"""SIGKILL at random moments changes nothing: every script, killed and started again, against a run that
nobody killed.

    python tests/kills.py --result results/kills.json              # 25 kills of each
    python tests/kills.py --kills 2 --cases evaluate probe

Prints one JSON object: {case: {"kills": how many came before the end, "records": of the run that nobody
killed, "lost", "doubled": of the killed one's, "identical": whether all final files are the same to the byte
(seconds and speeds in metrics apart), ...}}.

A run is a fork of this process, which has imported the scripts: imports take ten times as long as the work,
and kills would hardly ever fall into that. Of eight kills one is of a process of its own, imports and all,
two at any moment until the work begins or, where none is left, while results are written; the others come
while work is being done.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401: what scripts import late, imported once for all forks
import matplotlib.figure  # noqa: F401
import torch
from conftest import ROOT, TEXTS, TINY, TINY_VISION  # first: it puts the scripts within reach
from fault_server import calls_of, serving
from imagining import write_items
from PIL import Image
from samples import monet, row
from training import flags as training_flags
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration  # noqa: F401

import evaluate
import filter_data
import intervene
import probe
import rewrite_captions
import train_sft
import utils.openai_backend  # noqa: F401
from toy.make_model import make_model
from utils import qwen as Q
from utils.cli import cli
from utils.items import chat, question_text
from utils.jsonl import write_json, write_rows
from utils.latent_families import PRESETS, latent_ids

N_KILLS, CONCURRENCY = 25, 8
# a kill comes at most this share of the work, divided by the number of kills, after the work has gone on
PACE = 1.2
PROMPTS = {"rewrite_captions": {"SYSTEM": "", "ZOOM": "{question}", "RETRY": "{fault}"},
           "filter_data": {"SYSTEM": "", "JUDGE": "{chain}", "RETRY": "{fault}"}}
MAINS = {module.__name__: module.main for module in (rewrite_captions, filter_data, train_sft, evaluate,
                                                     intervene, probe)}
# in metrics
VARY = {"seconds", "efficiency", "n_calls", "n_reused", "wall_s", "calls_per_s", "tokens_per_s", "p50_s",
        "p95_s"}


@dataclass
class Case:
    """A script's run: its flags but for --output, its exit code, how far it is, its records, its final files.

    `progress` and `records` are given the path of the output.
    """

    script: str
    flags: list[str]
    progress: Callable[[Path], int]
    records: Callable[[Path], list]
    files: tuple[str, ...]
    code: int = 0
    server: Path | None = None  # whose calls are counted


# ---------------------------------------------------------------------------------------- what there is to do
def plant_start(qwen, spec, items: list[dict], root: Path) -> None:
    """Let a random model begin every reply with latents: its output row of the start token is a state it has
    there."""
    images = [[Image.open(root / items[0]["images"][0]["path"])]]
    inputs = Q.encode(qwen, [chat(qwen.tokenizer, question_text(items[0]), 1)], images)
    with torch.no_grad():
        state = qwen.model.model(**inputs).last_hidden_state[0, -1]
        qwen.model.lm_head.weight[latent_ids(qwen.tokenizer, spec)[0]] = 4 * state / state.norm()


def make_world(folder: Path, n: int) -> None:
    """Write pictures, the two checkpoints and all inputs, so much of them that the last of n kills still
    finds work."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        image = Image.new("RGB", (56, 84), color)
        image.paste("white", (0, 0, 28, 28))
        image.save(folder / name)
    for name, prompts in PROMPTS.items():
        write_json(folder / f"{name}.prompts.json", prompts)
    for name, size in (("", 6 + 6 * n), (".many", 20 + 20 * n)):
        write_json(folder / f"rewrite_captions{name}.jsonl", [
            monet(i, question="which one " * (i % 5) + f"{i}?") for i in range(size)])
        write_rows(folder / f"filter_data{name}.jsonl", [row(f"s/{i}", f"The hull shows {i} of 42.")
                                                         for i in range(size)])
    write_rows(folder / "train_sft.jsonl", [row(f"t/{i}", "closer " * (i % 5 + 1) + "still", answer=str(i))
                                            for i in range(12)])
    _, items = write_items(folder, 16 + 4 * n - 4 * n % 8)
    write_rows(folder / "probe.jsonl", [
        {"id": f"probe/{i}", "source": item["id"],
         **{name: item[name] for name in ("question", "options", "answer")}}
        for i, item in enumerate(items[:8])])
    make_model(TEXTS, folder / "tiny", n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
    latent, spec = Q.load(str(folder / "tiny"), dtype="float32", device="cpu"), PRESETS["mirage"]
    Q.add_tokens(latent, spec.tokens)
    plant_start(latent, spec, items, folder)
    Q.save(latent, str(folder / "latent"))


def cases(folder: Path, n: int) -> dict[str, Case]:
    """Return the runs in a world; those that end in "openai" need --base_url yet."""
    def journal(name: str) -> tuple[Callable, Callable]:
        def place(output: Path) -> Path:
            return Path(f"{output}.run" if name == "calls" else output
                        / "states") / f"{name}-00000-of-00001.jsonl"
        return (lambda output: place(output).stat().st_size if place(output).exists() else 0,
                lambda output: [json.loads(line)["key"] for line in place(output).read_text().splitlines()])

    def lines(output: Path, *fields: str) -> list:
        return [tuple(line[name] for name in fields) for line in map(json.loads,
                                                                     output.read_text().splitlines())]

    size, keys = journal("calls")
    found = {}
    for name, derived in (("rewrite_captions", "rejected.jsonl"), ("filter_data", "verdicts.jsonl")):
        own = ["--image_root", str(folder), "--no_guard", "--input"]
        files = ("", f".run/{derived}", ".metrics.json")
        found[name] = Case(name, [*own, str(folder / f"{name}.jsonl"), "--model", str(folder / "tiny"),
                                  "--batch_size", "3",
                                  "--max_new_tokens", "24", "--max_pixels", str(9 * 28 * 28), "--prompts",
                                  str(folder / f"{name}.prompts.json")],
                           # a random model never writes JSON: all are errors, always alike
                           size, keys, files, code=3)
        found[f"{name} openai"] = Case(name, [*own, str(folder / f"{name}.many.jsonl"), "--backend", "openai",
                                              "--model", "m",
                                              "--concurrency", str(CONCURRENCY)], size, keys, files,
                                              server=folder)
    train = training_flags(folder / "train_sft.jsonl", folder / "tiny", "", "--max_tokens", "2000",
                           "--max_steps",
                           str(6 + 6 * n), "--save_every", "2", "--validation_rows", "2", "--eval_every",
                           "10")
    del train[train.index("--output"):train.index("--output") + 2]
    found["train_sft"] = Case(
        "train_sft", train,
        lambda output: max((int(path.name[5:]) for path in Path(f"{output}.run").glob("step-*[0-9]")),
                           default=0),
        lambda output: lines(Path(f"{output}.run/log.jsonl"), "step"),
        ("/*", ".metrics.json", ".run/log.jsonl"))
    items = ["--items", str(folder / "items.jsonl")]
    found["evaluate"] = Case("evaluate", [*items, "--model", str(folder / "tiny"), "--max_new_tokens", "24",
                                          "--batch_size",
                                          "3", "--protocol", "plain"],
                             size, lambda output: keys(output) + lines(output, "id"), ("", ".metrics.json"))
    items += ["--model", str(folder / "latent"), "--latent", "mirage", "--max_new_tokens", "12",
              "--batch_size", "4"]
    found["intervene"] = Case("intervene", [*items, "--calibration", "8", "--min_emitters", "4"], size,
                              lambda output: keys(output) + lines(output, "id", "condition"),
                              ("", ".metrics.json", ".*.png", ".*.csv"))
    captured, names = journal("states")
    found["probe"] = Case("probe", [*items, "--probe_items", str(folder / "probe.jsonl"), "--n_items",
                                    "1000"], captured,
                          lambda output: names(output) + lines(output / "answers.jsonl", "id", "condition"),
                          ("/*.*", "/states/*/*.safetensors"))
    return found


# ------------------------------------------------------------------------------------------------ runs
def fork(work: Callable[[], int], log: Path) -> int:
    """Run `work` in a fork, its exit code that of the process, its output in a file; return the process id.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(to, 1), os.dup2(to, 2)
        code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def start(case: Case, output: Path, alone: bool = False) -> int:
    """Start a run, `alone` as a process with imports of its own; return its id."""
    flags, log = [*case.flags, "--output", str(output)], output.with_name("log.txt")
    if not alone:
        return fork(lambda: cli(lambda: MAINS[case.script](flags)), log)
    script = [sys.executable, str(ROOT / f"{case.script}.py"), *flags]
    return fork(lambda: os.execv(script[0], script), log)


def ended(pid: int, wait: bool = False) -> int | None:
    """Return a process's exit code, negative after a signal; None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def run_whole(case: Case, output: Path) -> tuple[float, float, float, int]:
    """Run undisturbed; return the seconds until work was seen, while it went on, from then to the end, and
    its progress."""
    began = first = last = time.monotonic()
    pid, before = start(case, output), 0
    while (code := ended(pid)) is None:
        if (now := case.progress(output)) > before:
            first, last, before = first if before else time.monotonic(), time.monotonic(), now
        time.sleep(0.003)
    if code != case.code:
        raise SystemExit(
            f"{case.script}: exit {code}, expected {case.code}; see {output.with_name('log.txt')}:\n"
                         + output.with_name("log.txt").read_text()[-3000:])
    return first - began, last - first, time.monotonic() - last, before


def is_trained(case: Case, output: Path) -> bool:
    """Return whether a training is done: started again, it would refuse its own checkpoint."""
    return case.script == "train_sft" and output.exists()


def kill_once(case: Case, output: Path, whole: tuple[float, float, float, int], pause: float, place: int,
              rng: random.Random) -> bool:
    """Start a run and kill it; return whether it was still running.

    `place` 0: a process with imports of its own; 1, 2: at any moment up to the work; else up to `pause`
    seconds after the work has gone on, or, where none is left, at any moment.
    """
    (before, _, after, full), done = whole, case.progress(output)
    began = time.monotonic()
    pid = start(case, output, alone=place == 0)
    until = None
    if place == 0 and rng.random() < 0.5:
        until = began + rng.uniform(0.1, 3.0)
    elif place in (1, 2) or done > 0.98 * full:
        until = began + rng.uniform(0, before + after)
    while (code := ended(pid)) is None:
        now = time.monotonic()
        if until is None and case.progress(output) > done:
            until = now + rng.uniform(0, pause)
        if until is not None and now >= until:
            os.kill(pid, signal.SIGKILL)
            code = ended(pid, wait=True)
            break
        time.sleep(0.002)
    if code not in (case.code, -signal.SIGKILL) and not is_trained(case, output):
        raise SystemExit(f"{case.script}: exit {code} after a kill:\n"
                         + output.with_name("log.txt").read_text()[-3000:])
    return code == -signal.SIGKILL


def final_files(case: Case, output: Path) -> dict[str, object]:
    """Return what must not differ: the bytes of final files, metrics and log without what is measured by the
    clock."""
    found = {}
    for pattern in case.files:
        for path in sorted(output.parent.glob(f"{output.name}{pattern}")):
            if path.name.startswith("."):
                continue  # beside a file that a kill kept from being renamed
            name, content = str(path.relative_to(output.parent)), path.read_bytes()
            if path.name.endswith("metrics.json"):
                content = {key: value for key, value in json.loads(content).items() if key not in VARY}
            elif path.name == "log.jsonl":
                content = [(line["step"], line["loss"], line["grad_norm"])
                           for line in map(json.loads, content.splitlines())]
            found[name] = content
    return found


def try_case(case: Case, folder: Path, n: int, rng: random.Random) -> dict:
    """Kill a run n times, let it end, and compare it with one that nobody killed."""
    began = time.monotonic()
    whole, killed = (folder / name / "out" for name in ("whole", "killed"))
    whole.parent.mkdir(parents=True), killed.parent.mkdir()
    undisturbed, hits, tries = run_whole(case, whole), 0, 0
    pause = undisturbed[1] * min(PACE / n, 0.4)
    n_calls = len(calls_of(case.server)) if case.server else 0
    while hits < n and tries < 3 * n:
        if is_trained(case, killed):  # before the last kill: all over, and quicker
            shutil.rmtree(killed.parent)
            killed.parent.mkdir()
            hits = 0
        hit = kill_once(case, killed, undisturbed, pause, (tries + 4) % 8 if n > 7 else 3, rng)
        # the machine may be quicker by now
        hits, tries, pause = hits + hit, tries + 1, pause if hit else pause / 2
    if not is_trained(case, killed):
        code = ended(start(case, killed), wait=True)
        if code != case.code:
            raise SystemExit(f"{case.script}: exit {code} in the end:\n"
                             + killed.with_name("log.txt").read_text()[-3000:])
    expected, found = case.records(whole), case.records(killed)
    files, its = final_files(case, whole), final_files(case, killed)
    result = {"kills": hits, "records": len(expected), "lost": len(set(expected) - set(found)),
              "doubled": len(found) - len(set(found)),
              "identical": files == its and sorted(map(str, expected)) == sorted(map(str, found)),
              "files": len(files), "seconds": round(time.monotonic() - began, 1)}
    if not result["identical"]:
        result["differ"] = sorted(name for name in {*files, *its} if files.get(name) != its.get(name))
    if case.server:  # calls that were under way are made again, no others
        result["calls_made_again"] = len(calls_of(case.server)) - n_calls - len(found)
    return result


def main(argv: list[str] | None = None) -> int:
    names = [*MAINS, "rewrite_captions openai", "filter_data openai"]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=N_KILLS, help="of each case")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME",
                        help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="where to work (default: a temporary one)")
    parser.add_argument("--result", help="JSON file to write")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # the last bits depend on their number
    results = {}
    with ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        if ended(fork(lambda: make_world(folder, args.kills) or 0, folder / "world.txt"), wait=True):
            raise SystemExit((folder / "world.txt").read_text()[-3000:])
        all_cases = cases(folder, args.kills)
        for name in args.cases:
            case = all_cases[name]
            with ExitStack() as its:
                if case.server:
                    case.server = folder / f"{name.replace(' ', '_')}_calls"
                    case.server.mkdir()
                    case.flags += ["--base_url", its.enter_context(serving(case.server, latency=0.1))[1]]
                results[name] = try_case(case, folder / name.replace(" ", "_"), args.kills,
                                         random.Random(f"{args.seed}/{name}"))
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    if args.result:
        write_json(args.result, results)
    print(json.dumps(results))
    sound = all(its["identical"] and not its["lost"] and not its["doubled"] for its in results.values())
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
