"""evaluate.py against one `model.generate(do_sample=False)` per item, which is what common harnesses do.

    python speed/evaluate.py --model toy/work/text --items toy/work/world/bench.jsonl --folder work/evaluate
    python speed/evaluate.py ... --limit 64 --lengths      (rows that leave the batch, about two minutes)

Both sides use the same checkpoint, items, prompts and limit of reply tokens, in float32. Each loads the
model, opens the pictures and decodes the replies; ours also scores them and writes results. Two comparisons,
--rounds times each: as a user starts it, in a process of its own with its imports ("started"), and in turns
in one process ("same_process"). Replies are compared word for word. A batch rounds differently from a single
row, so a tie may be broken differently; the result counts the replies that differ.

--lengths compares the local backend with itself without rows that leave the batch, in turns in one process:
then all rows decode to the longest reply of the batch and are cut. No reply ends by itself; their lengths are
drawn from LENGTHS.

Writes  --result (results/evaluate.json, with --lengths results/evaluate_lengths.json)
Prints  the same JSON object: seconds of each side, ratios per round (wall clock, and processor time where
        both share a process), shares of prefill and decoding in our time, replies that differ
"""
import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.jsonl import write_json  # noqa: E402

LENGTHS = {"log-uniform, 20 to 400": lambda rng: round(math.exp(rng.uniform(math.log(20), math.log(400)))),
           "uniform, 20 to 400": lambda rng: rng.randint(20, 400), "all 100": lambda rng: 100}


# ---- the two sides
def flags_of(args: argparse.Namespace, output: Path) -> list[str]:
    return ["--model", args.model, "--items", args.items, "--output", str(output), "--protocol", "plain",
            "--limit", str(args.limit), "--max_new_tokens", str(args.max_new_tokens), "--dtype", "float32"]


def run_ours(args: argparse.Namespace, output: Path) -> dict[str, str]:
    """Run evaluate.py without its earlier journal and results; return the raw replies."""
    import evaluate
    shutil.rmtree(f"{output}.run", ignore_errors=True)
    output.unlink(missing_ok=True)
    assert evaluate.main(flags_of(args, output)) == 0
    return read_replies(output)


def read_replies(output: Path) -> dict[str, str]:
    rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["raw_output"] for row in rows}


def run_peer(args: argparse.Namespace) -> dict[str, str]:
    """Answer one item at a time with transformers: template, picture, `generate`, decode."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from utils.evaluate.prompts import PROTOCOLS, user_text
    from utils.items import chat, read_items
    from utils.qwen import IMAGE_TOKEN, load_processors
    tokenizer, image_processor = load_processors(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32,
                                                        attn_implementation="sdpa").eval()
    image_id, replies = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), {}
    for item in read_items(args.items, args.limit):
        paths = [Path(args.items).parent / image["path"] for image in item["images"]]
        pixels = image_processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
        text = chat(tokenizer, user_text(item, PROTOCOLS["plain"]), len(paths))
        for grid in pixels["image_grid_thw"]:  # as AutoProcessor does, which needs torchvision
            n_tokens = int(grid.prod()) // image_processor.merge_size**2
            text = text.replace(IMAGE_TOKEN, "<placeholder>" * n_tokens, 1)
        inputs = tokenizer([text.replace("<placeholder>", IMAGE_TOKEN)], return_tensors="pt",
                           add_special_tokens=False)
        out = model.generate(**inputs, **pixels, do_sample=False, max_new_tokens=args.max_new_tokens,
                             mm_token_type_ids=(inputs["input_ids"] == image_id).int())
        replies[item["id"]] = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:])
    return replies


# ---- the comparisons
def run_part(args: argparse.Namespace, folder: Path) -> dict:
    """Time the sides that --part names in this process, in turns."""
    import torch
    import transformers  # noqa: F401: imports are not timed

    import evaluate  # noqa: F401
    seconds, cpu, replies = {"ours": [], "peer": []}, {"ours": [], "peer": []}, {}
    with redirect_stdout(sys.stderr):
        for _ in range(args.rounds):
            for side in ("ours", "peer") if args.part == "both" else (args.part,):
                began, used = time.monotonic(), time.process_time()
                replies[side] = run_ours(args, folder / "both.jsonl") if side == "ours" else run_peer(args)
                seconds[side].append(time.monotonic() - began)
                cpu[side].append(time.process_time() - used)
    return {"seconds": seconds, "cpu": cpu, "replies": replies, "threads": torch.get_num_threads()}


def start_part(args: argparse.Namespace, part: str, rounds: int) -> dict:
    """Run a part in a new process; return its result with the seconds of the whole process."""
    began = time.monotonic()
    flags = {"model": args.model, "items": args.items, "folder": args.folder, "limit": args.limit,
             "rounds": rounds, "max_new_tokens": args.max_new_tokens, "part": part}
    done = subprocess.run([sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.monotonic() - began}


def start_evaluate(args: argparse.Namespace, output: Path) -> float:
    """Run the script as a user starts it, without an earlier journal; return its seconds."""
    shutil.rmtree(f"{output}.run", ignore_errors=True)
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *flags_of(args, output)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def n_differing(ours: dict[str, str], peer: dict[str, str]) -> int:
    assert ours.keys() == peer.keys()
    return sum(ours[key] != peer[key] for key in ours)


def compare(args: argparse.Namespace, folder: Path) -> dict:
    started = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        started["ours"].append(start_evaluate(args, folder / "started.jsonl"))
        peer = start_part(args, "peer", rounds=1)
        started["peer"].append(peer["process_s"])
    both = start_part(args, "both", args.rounds)
    spent = json.loads((folder / "both.jsonl.metrics.json").read_text(encoding="utf-8"))["efficiency"]
    seconds, prefill, whole = spent["seconds"], spent["prefill_seconds"], both["seconds"]["ours"][-1]
    result = {"model": Path(args.model).name, "items": len(both["replies"]["ours"]),
              "tokens_per_item": spent["tokens_per_item"], "max_new_tokens": args.max_new_tokens,
              "cpus": os.cpu_count(), "threads": both["threads"],
              "differing_replies": n_differing(both["replies"]["ours"], both["replies"]["peer"]),
              "differing_replies_started": n_differing(read_replies(folder / "started.jsonl"),
                                                       peer["replies"]["peer"])}
    for name, sides in (("started", started), ("same_process", both["seconds"]),
                        ("same_process_cpu", both["cpu"])):
        ratios = [theirs / ours for ours, theirs in zip(sides["ours"], sides["peer"], strict=True)]
        result[name] = {"ours_s": [round(s, 2) for s in sides["ours"]],
                        "peer_s": [round(s, 2) for s in sides["peer"]],
                        "ratio": round(statistics.median(ratios), 2),
                        "over_rounds": [round(ratio, 2) for ratio in ratios]}
    # the rest: loading, pictures that are not prepared meanwhile, scoring, files
    return result | {"shares": {"prefill": round(prefill / whole, 3), "rest": round(1 - seconds / whole, 3),
                                "decode": round((seconds - prefill) / whole, 3)}}


def compare_lengths(args: argparse.Namespace) -> dict:
    """Time batches that rows leave against batches in which all stay to the end, per kind of lengths."""
    from utils.backends import LocalBackend, Request
    from utils.decode import decode
    from utils.items import question_text, read_items

    def stay(*given, limits: list[int], **more) -> tuple:
        rows, state = decode(*given, **more)
        for row, limit in zip(rows, limits):
            del row.ids[limit:]
        return rows, state

    items, folder = read_items(args.items, args.limit), Path(args.items).parent
    backend = LocalBackend(args.model, 1280 * 28 * 28, 32, 65536, dtype="float32")
    backend.load()
    backend.qwen.eos_ids, kinds = [], {}
    for kind, draw in LENGTHS.items():
        rng, ratios, differing = random.Random(0), {"seconds": [], "cpu": []}, 0
        requests = [Request(f"{n:08x}", None, question_text(item), tuple(
            str(folder / image["path"]) for image in item["images"]), draw(rng))
            for n, item in enumerate(items)]
        for _ in range(args.rounds):
            spent, said = {}, {}
            for side, loop in (("stay", stay), ("leave", decode)):
                with mock.patch("utils.decode.decode", loop):
                    began, used = time.monotonic(), time.process_time()
                    said[side] = {reply.key: reply.raw_text for reply in backend.generate(requests)}
                    spent[side] = {"seconds": time.monotonic() - began, "cpu": time.process_time() - used}
            differing = max(differing, n_differing(said["leave"], said["stay"]))
            for name, values in ratios.items():
                values.append(round(spent["stay"][name] / spent["leave"][name], 2))
        kinds[kind] = {"tokens_per_item": round(statistics.mean(r.max_tokens for r in requests), 1),
                       "differing_replies": differing, "ratio": statistics.median(ratios["seconds"]),
                       "over_rounds": ratios["seconds"], "cpu_ratio": statistics.median(ratios["cpu"]),
                       "cpu_over_rounds": ratios["cpu"]}
    return {"model": Path(args.model).name, "items": len(items), "batch_size": 32, "lengths": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--items", required=True, help="items, with their pictures in the same folder")
    parser.add_argument("--folder", required=True, help="a folder to work in")
    parser.add_argument("--limit", type=int, default=200, help="items")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", action="store_true", help="unequal replies in the local backend alone")
    parser.add_argument("--result", help="file to write (default: in results/)")
    parser.add_argument("--part", choices=("peer", "both"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:  # in a process of its own
        return print(json.dumps(run_part(args, folder)))
    result = compare_lengths(args) if args.lengths else compare(args, folder)
    name = "evaluate_lengths.json" if args.lengths else "evaluate.json"
    write_json(args.result or ROOT / "results" / name, result)
    return print(json.dumps(result))


if __name__ == "__main__":
    main()
