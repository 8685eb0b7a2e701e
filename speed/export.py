"""How long stage 1 takes when every call is already journalled: scan of the journals, export, peak memory.

    python speed/export.py --samples 125000 --folder work/export

Makes samples in Monet's form (one question image and one or two helper images each, hard links of a few
pictures), has a backend without a model fill the journal through rewrite_captions.py, and then measures in
fresh processes. The peer in the same run is the least that any reader must do: json.loads of every line of
the same journals.

Writes  --result (results/export.json)
Prints  the same JSON object: seconds, peak memory in GB, ratios to the peer
"""
import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

import rewrite_captions  # noqa: E402
from utils.backends import Reply  # noqa: E402
from utils.jsonl import sha256_file, write_json, write_rows  # noqa: E402

PAIR = "<abs_vis_token></abs_vis_token>"
PARTS = ("har", "bel", "tor", "min", "sal", "ken", "lu", "pra"), ("bo", "fry", "ga", "do", "te",
                                                                  "ma"), ("", "r", "n", "st", "ly", "ing")
WORDS = ["".join(parts) for parts in itertools.product(*PARTS)]  # 288: about as repetitive as English
SCAN = """
import sys, time
from utils.journal import Journal
began = time.monotonic()
with Journal(sys.argv[1]) as calls, Journal(sys.argv[1], name="images") as images:
    print(time.monotonic() - began, len(calls), len(images))
"""
PEER = """
import json, sys, time
began, n = time.monotonic(), 0
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
            n += 1
print(time.monotonic() - began, n)
"""


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def make_world(folder: Path, n: int) -> None:
    """Write in.jsonl and the images it names, about as long as Monet-SFT's samples are."""
    rng = random.Random(0)
    images = folder / "images"
    images.mkdir(parents=True)
    for k in range(8):
        picture = Image.new("RGB", (84, 56), (30 * k, 90, 200 - 20 * k))
        picture.paste("white", (0, 0, 20 + 5 * k, 20))
        picture.save(folder / f"picture{k}.png")

    def image(name: str, k: int) -> str:
        os.link(folder / f"picture{k % 8}.png", images / name)
        return f"images/{name}"

    def sample(i: int) -> dict:
        assistant = []
        for step in range(1 + i % 5 // 4):
            assistant += [{"type": "text", "text": f"{words(rng, 30)}. {PAIR}"},
                          {"type": "image", "image": image(f"{i}_{step + 1}.png", i + step + 1)}]
        assistant.append({"type": "text",
                          "text": f"<observation>{words(rng, 10)}</observation> {words(rng, 30)}. "
                                                  f"The answer is \\boxed{{{i}}}."})
        user = [{"type": "image", "image": image(f"{i}_0.png", i)},
                {"type": "text", "text": f"{words(rng, 15)} {i}?\nPut your final answer within \\boxed{{}}."}]
        system = [{"type": "text", "text": "You are a helpful assistant."}]
        return {"metadata": {"dataset_name": "Visual_CoT", "sample_id": i},
                "data": [{"role": "system", "content": system}, {"role": "user", "content": user},
                         {"role": "assistant", "content": assistant}]}

    write_rows(folder / "in.jsonl", (sample(i) for i in range(n)))


class Instant:
    """A backend without a model: unique captions of 40 words, refinements that keep every word."""

    identity = {"model": "instant"}

    def __init__(self, *args):
        self.rng = random.Random(1)

    def generate(self, requests, done=(), stop=None):
        for request in requests:
            if request.key not in done:
                if request.images:
                    value = {"caption": f"{words(self.rng, 40)} {self.rng.random()}", "legible": "yes"}
                else:
                    lines = [line for line in request.text.splitlines() if line.startswith("[")]
                    value = {"segments": [{"id": n, "text": line.split(": ", 1)[1]} for n,
                                          line in enumerate(lines, 1)]}
                yield Reply(request.key, json.dumps(value), "stop", 700, 80, 1.0)


def measure(command: list[str]) -> tuple[str, float, float]:
    """Run a command; return (stdout, seconds, peak GB)."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return out, time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=125_000, help="as many as the paper rewrites")
    parser.add_argument("--folder", required=True, help="a new folder to work in; about 10 kB a sample")
    parser.add_argument("--result", default=str(ROOT / "results" / "export.json"),
                        help="where the numbers go")
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    flags = ["--input", str(folder / "in.jsonl"), "--image_root", str(folder), "--output",
             str(folder / "out.jsonl")]
    if args.fill:  # in a process of its own: the peak memory of a child counts its parent's at the fork
        make_world(folder, args.samples)
        with patch("utils.call_flags.LocalBackend", Instant):
            raise SystemExit(rewrite_captions.main(flags))
    _, journal_s, _ = measure([sys.executable, __file__, *sys.argv[1:], "--fill"])
    run, first = folder / "out.jsonl.run", sha256_file(folder / "out.jsonl")
    peer_s, n_lines = measure([sys.executable, "-c", PEER, *map(str, sorted(run.glob("calls-*.jsonl")))])[
        0].split()
    scan, _, scan_gb = measure([sys.executable, "-c", SCAN, str(run)])
    scan_s, n_calls, n_images = scan.split()
    _, export_s, export_gb = measure([sys.executable, "rewrite_captions.py", *flags, "--export_only"])
    assert sha256_file(folder / "out.jsonl") == first and n_calls == n_lines
    result = {"samples": args.samples, "journalled_calls": int(n_calls), "journalled_images": int(n_images),
              "journal_gb": round(sum(path.stat().st_size for path in run.glob("*.jsonl")) / 2**30, 3),
              "first_run_s": round(journal_s, 1), "json_loads_s": round(float(peer_s), 2),
              "scan_s": round(float(scan_s), 2),
              "scan_gb": round(scan_gb, 2), "export_s": round(export_s, 1), "export_gb": round(export_gb, 2),
              "scan_to_json_loads": round(float(scan_s) / float(peer_s), 2),
              "export_to_json_loads": round(export_s / float(peer_s), 2), "cpus": os.cpu_count()}
    write_json(args.result, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
