"""SIGKILL at random moments changes nothing: each script, killed and restarted, against an undisturbed run.

    python tests/kills.py --result results/kills.json              # 25 kills of each
    python tests/kills.py --kills 2 --cases evaluate probe

Prints one JSON object: {case: {"kills": those that came before the end, "records": of the undisturbed run,
"lost" and "doubled": of the killed run, "identical": whether all final files are equal to the byte (seconds
and speeds in metrics excepted), ...}}.

A run is a fork of this process, which has imported the scripts: imports take ten times as long as the work,
and few kills would hit the work. Of eight kills, three come at any moment before the work begins or, where no
work is left, while results are written; five come during work.
"""
import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path

import accelerate  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
from conftest import ROOT, TEXTS, TINY, TINY_VISION  # first: it puts the scripts within reach
from decoding import MIRAGE, load_with
from fault_server import calls_of, serving
from imagining import write_items
from processes import MAINS
from samples import framed, monet, row
from training import flags as training_flags
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration  # noqa: F401

from toy.make_model import make_model
from utils.cli import cli
from utils.jsonl import write_json, write_rows
from utils.train.weights import save

for path in ROOT.glob("utils/*/*.py"):  # scripts import these late; all forks share one import
    importlib.import_module(f"utils.{path.parent.name}.{path.stem}")
importlib.import_module("utils.openai_backend")

N_KILLS, CONCURRENCY = 25, 8
FORKS = ForkContext()
PACE = 1.2  # a kill comes at most this share of the work, divided by the number of kills, after progress
PROMPTS = {"rewrite_captions": {"SYSTEM": "", "ZOOM": "{question}", "RETRY": "{fault}"},
           "filter_data": {"SYSTEM": "", "JUDGE": "{chain}", "RETRY": "{fault}"}}
TIMED = {"seconds", "efficiency", "n_calls", "n_reused", "wall_s", "calls_per_s", "tokens_per_s", "p50_s",
         "p95_s"}  # fields of metrics that may differ


@dataclass
class Case:
    """A script's run: flags without --output, and the endings of files after its output.

    lock: the file that it locks, mostly its journal. records: {ending: fields that tell a record}. files:
    patterns of final files.
    """

    script: str
    flags: list[str]
    lock: str
    records: dict[str, tuple[str, ...]]
    files: tuple[str, ...]
    code: int = 0
    server: Path | None = None  # folder of a server's log, whose calls are counted

    def progress(self, output: Path) -> int:
        """Return the step of the last checkpoint of a training, or the size of a journal."""
        steps = [int(path.name[5:]) for path in Path(f"{output}.run").glob("step-*[0-9]")]
        lock = Path(f"{output}{self.lock}")
        return max([*steps, lock.stat().st_size if lock.exists() else 0])

    def records_of(self, output: Path) -> list[tuple]:
        return [tuple(json.loads(line)[name] for name in names) for ending, names in self.records.items()
                for line in Path(f"{output}{ending}").read_text().splitlines()]


# ---- inputs and runs
def make_world(folder: Path, n: int) -> None:
    """Write pictures, two checkpoints and enough inputs that work is left for the last of n kills."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        framed(folder / name, color=color)
    for name, prompts in PROMPTS.items():
        write_json(folder / f"{name}.prompts.json", prompts)
    for name, size in (("", 6 + 6 * n), (".many", 20 + 20 * n)):
        write_json(folder / f"rewrite_captions{name}.jsonl",
                   [monet(i, question="which one " * (i % 5) + f"{i}?") for i in range(size)])
        write_rows(folder / f"filter_data{name}.jsonl",
                   [row(f"s/{i}", f"The hull shows {i} of 42.") for i in range(size)])
    write_rows(folder / "train_sft.jsonl", [row(f"t/{i}", "closer " * (i % 5 + 1) + "still", answer=str(i))
                                            for i in range(12)])
    _, items = write_items(folder, 16 + 4 * n - 4 * n % 8)
    write_rows(folder / "probe.jsonl", [
        {"id": f"probe/{i}", "source": item["id"], "question": item["question"], "options": item["options"],
         "answer": item["answer"]} for i, item in enumerate(items[:8])])
    make_model(TEXTS, folder / "tiny", n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
    save(load_with(folder / "tiny", MIRAGE), str(folder / "latent"))


def cases(folder: Path, n: int) -> dict[str, Case]:
    """Return the runs in a world; the ones named "openai" still need --base_url."""
    calls, made = ".run/calls-00000-of-00001.jsonl", {}
    for name, derived in (("rewrite_captions", "rejected.jsonl"), ("filter_data", "verdicts.jsonl")):
        flags = f"--image_root {folder} --no_guard --input {folder / name}"
        files = ("", f".run/{derived}", ".metrics.json")
        # a random model never writes JSON: all calls are errors, always the same
        local = (f"{flags}.jsonl --model {folder / 'tiny'} --batch_size 3 --max_new_tokens 24 "
                 f"--max_pixels {9 * 28 * 28} --prompts {folder / name}.prompts.json")
        made[name] = Case(name, local.split(), calls, {calls: ("key",)}, files, 3)
        many = f"{flags}.many.jsonl --backend openai --model m --concurrency {CONCURRENCY}"
        made[f"{name} openai"] = Case(name, many.split(), calls, {calls: ("key",)}, files, server=folder)
    train = training_flags(folder / "train_sft.jsonl", folder / "tiny", "", "--max_tokens", "2000",
                           "--max_steps", str(6 + 6 * n), "--save_every", "2", "--keep", "1",
                           "--validation_rows", "2", "--eval_every", "10")
    place = train.index("--output")
    made["train_sft"] = Case("train_sft", train[:place] + train[place + 2:], ".run/lock",
                             {".run/log.jsonl": ("step",)}, ("/*", ".metrics.json", ".run/log.jsonl"))
    items = f"--items {folder / 'items.jsonl'} --model {folder}"
    made["evaluate"] = Case(
        "evaluate", f"{items}/tiny --max_new_tokens 24 --batch_size 3 --protocol plain".split(), calls,
        {calls: ("key",), "": ("id",)}, ("", ".metrics.json"))
    items += "/latent --latent mirage --max_new_tokens 12 --batch_size 4"
    made["intervene"] = Case(
        "intervene", f"{items} --calibration 8 --min_emitters 4".split(), calls,
        {calls: ("key",), "": ("id", "condition")}, ("", ".metrics.json", ".*.png", ".*.csv"))
    states = "/states/states-00000-of-00001.jsonl"
    made["probe"] = Case(
        "probe", f"{items} --probe_items {folder / 'probe.jsonl'} --n_items 1000".split(), states,
        {states: ("key",), "/answers.jsonl": ("id", "condition")}, ("/*.*", "/states/*/*.safetensors"))
    return made


# ---- kills
def start(case: Case, output: Path) -> ForkProcess:
    """Start a run as a fork whose messages go to log.txt."""
    def work() -> None:
        log = os.open(output.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.exit(cli(lambda: MAINS[case.script]([*case.flags, "--output", str(output)])))

    process = FORKS.Process(target=work)
    process.start()
    return process


def check_code(case: Case, output: Path, process: ForkProcess, *accepted: int) -> None:
    process.join()
    log = output.with_name("log.txt")
    if process.exitcode not in accepted:
        raise SystemExit(f"{case.script}: exit {process.exitcode}, expected {accepted}; {log} ends with\n"
                         + log.read_text()[-3000:])


def run_whole(case: Case, output: Path) -> tuple[float, float, float, int]:
    """Run undisturbed; return the seconds before, during and after visible progress, and the progress."""
    began = first = last = time.monotonic()
    process, before = start(case, output), 0
    while process.is_alive():
        if (now := case.progress(output)) > before:
            first, last, before = first if before else time.monotonic(), time.monotonic(), now
        time.sleep(0.003)
    check_code(case, output, process, case.code)
    return first - began, last - first, time.monotonic() - last, before


def is_trained(case: Case, output: Path) -> bool:
    """Return whether a training is complete: restarted, it would refuse its own checkpoint."""
    return case.script == "train_sft" and output.exists()


def kill_once(case: Case, output: Path, whole: tuple[float, float, float, int], pause: float, anywhere: bool,
              rng: random.Random) -> bool:
    """Start a run and kill it; return whether it was still running.

    The kill comes `anywhere` before the work, or up to `pause` seconds after progress or, where no work is
    left, at any moment.
    """
    (before, _, after, full), done = whole, case.progress(output)
    process, until = start(case, output), None
    if anywhere or done > 0.98 * full:
        until = time.monotonic() + rng.uniform(0, before + after)
    while process.is_alive():
        now = time.monotonic()
        if until is None and case.progress(output) > done:
            until = now + rng.uniform(0, pause)
        if until is not None and now >= until:
            process.kill()
            process.join()
        time.sleep(0.002)
    if not is_trained(case, output):
        check_code(case, output, process, case.code, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def final_files(case: Case, output: Path) -> dict[str, object]:
    """Return what must not differ: the bytes of final files, and metrics and log without times."""
    files = {}
    for pattern in case.files:
        for path in sorted(output.parent.glob(f"{output.name}{pattern}")):
            if path.name.startswith("."):
                continue  # a temporary file that a kill kept from being renamed
            name, content = str(path.relative_to(output.parent)), path.read_bytes()
            if path.name.endswith("metrics.json"):
                content = {key: value for key, value in json.loads(content).items() if key not in TIMED}
            elif path.name == "log.jsonl":
                content = [(line["step"], line["loss"], line["grad_norm"])
                           for line in map(json.loads, content.splitlines())]
            files[name] = content
    return files


def try_case(case: Case, folder: Path, n: int, rng: random.Random) -> dict:
    """Kill a run n times, let it end, and compare it with an undisturbed run."""
    began = time.monotonic()
    whole, killed = (folder / name / "out" for name in ("whole", "killed"))
    whole.parent.mkdir(parents=True), killed.parent.mkdir()
    undisturbed, hits, tries = run_whole(case, whole), 0, 0
    pause = undisturbed[1] * min(PACE / n, 0.4)
    n_calls = len(calls_of(case.server)) if case.server else 0
    while hits < n and tries < 3 * n:
        if is_trained(case, killed):  # complete before the last kill: start over
            shutil.rmtree(killed.parent)
            killed.parent.mkdir()
            hits = 0
        hit = kill_once(case, killed, undisturbed, pause, n > 7 and tries % 8 > 4, rng)
        # the machine may be quicker by now
        hits, tries, pause = hits + hit, tries + 1, pause if hit else pause / 2
    if not is_trained(case, killed):
        check_code(case, killed, start(case, killed), case.code)
    expected, records = case.records_of(whole), case.records_of(killed)
    files, files_after = final_files(case, whole), final_files(case, killed)
    same = files == files_after and sorted(map(str, expected)) == sorted(map(str, records))
    result = {"kills": hits, "records": len(expected), "lost": len(set(expected) - set(records)),
              "doubled": len(records) - len(set(records)), "identical": same, "files": len(files),
              "seconds": round(time.monotonic() - began, 1)}
    if not same:
        names = {*files, *files_after}
        result["differ"] = sorted(name for name in names if files.get(name) != files_after.get(name))
    if case.server:  # only calls that were running are made again
        result["calls_made_again"] = len(calls_of(case.server)) - n_calls - len(records)
    return result


def main(argv: list[str] | None = None) -> int:
    names = [*MAINS, "rewrite_captions openai", "filter_data openai"]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=N_KILLS, help="of each case")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME",
                        help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--result", help="JSON file to write")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # the last bits depend on their number
    results = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world = FORKS.Process(target=make_world, args=(folder, args.kills))  # threads would not be forked
        world.start()
        world.join()
        all_cases = cases(folder, args.kills)
        for name in args.cases:
            case, place = all_cases[name], folder / name.replace(" ", "_")
            if case.server:
                case.server = Path(f"{place}_calls")
                case.server.mkdir()
                case.flags += ["--base_url", stack.enter_context(serving(case.server, latency=0.1))[1]]
            results[name] = try_case(case, place, args.kills, random.Random(f"{args.seed}/{name}"))
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    if args.result:
        write_json(args.result, results)
    print(json.dumps(results))
    return int(any(not case["identical"] or case["lost"] or case["doubled"] for case in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
