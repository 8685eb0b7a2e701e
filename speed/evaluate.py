"""evaluate.py against one `model.generate(do_sample=False)` an item, which is what the common harnesses do.

    python speed/evaluate.py --model toy/work/text --items toy/work/world/bench.jsonl --folder work/evaluate
    python speed/evaluate.py --model toy/work/text --items toy/work/world/bench.jsonl --folder \
      work/evaluate --growth

The same checkpoint, items, words and length of replies; float32. Either side loads the model, opens the
pictures and decodes the replies, ours also scores them and writes results. Twice: as a user starts it, each a
process of its own with its imports ("started"), and one after the other in one process ("same_process"), in
turns, `--rounds` times each. Replies are compared word for word: a batch rounds otherwise than a single row,
so that a tie may fall the other way; how many do is in the result.

--growth: 1, 4 and 16 times as many items, and pictures enlarged from 256 to 4,096 visual tokens, every point
on either side in a process of its own, with its seconds (imports apart) and peak memory.

Writes  --result (results/evaluate.json; with --growth results/growth.json)
Prints  the same JSON object: seconds of either side, ratios of the rounds (wall clock, and of processor time
        where both are in
        one process), what parts of our time are prefill and decoding, replies that differ
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.jsonl import write_json  # noqa: E402

PIXELS_A_TOKEN = 28 * 28
# of --growth; squares, so that no picture is rounded up
ITEMS, VISUAL_TOKENS, FEW = (18, 72, 288), (256, 1024, 2304, 4096), 8


# ---------------------------------------------------------------------------------------------- the two sides
def flags_of(args: argparse.Namespace, output: Path) -> list[str]:
    pixels = ["--min_pixels", str(args.visual_tokens * PIXELS_A_TOKEN)] if args.visual_tokens else []
    return ["--model", args.model, "--items", args.items, "--output", str(output), "--protocol", "plain",
            "--limit", str(args.limit), "--max_new_tokens", str(args.max_new_tokens), "--dtype", "float32",
            *pixels]


def run_ours(args: argparse.Namespace, output: Path) -> dict[str, str]:
    """evaluate.py from the start: its journal and results are removed first. Returns the replies, special
    tokens and all."""
    import evaluate
    shutil.rmtree(f"{output}.run", ignore_errors=True)
    output.unlink(missing_ok=True)
    assert evaluate.main(flags_of(args, output)) == 0
    return replies_of(output)


def replies_of(output: Path) -> dict[str, str]:
    return {row["id"]: row["raw_output"] for row in map(json.loads,
                                                        output.read_text(encoding="utf-8").splitlines())}


def run_peer(args: argparse.Namespace) -> dict[str, str]:
    """transformers, an item at a time: template, picture, `generate`, decode."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from utils.evaluate.prompts import PROTOCOLS, user_text
    from utils.items import read_items
    from utils.qwen import IMAGE_TOKEN, chat, load_processors
    tokenizer, image_processor = load_processors(args.model, args.visual_tokens and args.visual_tokens
                                                 * PIXELS_A_TOKEN)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32,
                                                        attn_implementation="sdpa").eval()
    image_id, found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), {}
    for item in read_items(args.items, args.limit):
        pictures = [Image.open(Path(args.items).parent / image["path"]).convert("RGB")
                    for image in item["images"]]
        pixels = image_processor(pictures, return_tensors="pt")
        text = chat(tokenizer, user_text(item, PROTOCOLS["plain"]), len(pictures))
        for grid in pixels["image_grid_thw"]:  # as AutoProcessor does, which needs torchvision
            text = text.replace(IMAGE_TOKEN, "<placeholder>"
                                * (int(grid.prod()) // image_processor.merge_size**2), 1)
        inputs = tokenizer([text.replace("<placeholder>", IMAGE_TOKEN)], return_tensors="pt",
                           add_special_tokens=False)
        out = model.generate(**inputs, **pixels, mm_token_type_ids=(inputs["input_ids"] == image_id).int(),
                             do_sample=False,
                             max_new_tokens=args.max_new_tokens)
        found[item["id"]] = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:])
    return found


# ---------------------------------------------------------------------------------------------- processes
def timed(run, *arguments) -> tuple[float, float, dict[str, str]]:
    began, used = time.monotonic(), time.process_time()
    replies = run(*arguments)
    return time.monotonic() - began, time.process_time() - used, replies


def part(args: argparse.Namespace, folder: Path) -> dict:
    """What --part names, in this process: a side with its seconds and peak memory, or both sides in turns."""
    import torch
    import transformers  # noqa: F401 (imports are no part of what is timed)

    import evaluate  # noqa: F401
    seconds, cpu, found = {"ours": [], "peer": []}, {"ours": [], "peer": []}, {}
    with redirect_stdout(sys.stderr):
        for _ in range(args.rounds):
            for side in ("ours", "peer") if args.part == "both" else (args.part,):
                run = (run_ours, args, folder / f"{args.part}.jsonl") if side == "ours" else (run_peer, args)
                spent, used, found[side] = timed(*run)
                seconds[side].append(spent), cpu[side].append(used)
    return {"seconds": seconds, "cpu": cpu, "replies": found, "threads": torch.get_num_threads(),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def call(args: argparse.Namespace, name: str, **changes) -> dict:
    """Run a part in a process of its own and return what it found, with the seconds of the whole process."""
    given = {"model": args.model, "items": args.items, "folder": args.folder, "limit": args.limit,
             "rounds": args.rounds,
             "max_new_tokens": args.max_new_tokens} | changes
    began = time.monotonic()
    done = subprocess.run([sys.executable, __file__, "--part", name,
                           *(f"--{key}={value}" for key, value in given.items())],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.monotonic() - began}


def start_evaluate(args: argparse.Namespace, output: Path) -> float:
    """The script as a user starts it, from an empty folder."""
    shutil.rmtree(f"{output}.run", ignore_errors=True)
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *flags_of(args, output)], check=True,
                   stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.monotonic() - began


# -------------------------------------------------------------------------------------------- the comparisons
def n_differing(ours: dict[str, str], peer: dict[str, str]) -> int:
    assert ours.keys() == peer.keys()
    return sum(ours[key] != peer[key] for key in ours)


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Both sides started as scripts, and both in one process."""
    started = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        started["ours"].append(start_evaluate(args, folder / "started.jsonl"))
        peer = call(args, "peer", rounds=1)
        started["peer"].append(peer["process_s"])
    both = call(args, "both")
    metrics = json.loads((folder / "both.jsonl.metrics.json").read_text(encoding="utf-8"))
    spent, prefill = metrics["efficiency"]["seconds"], metrics["efficiency"]["prefill_seconds"]
    whole = both["seconds"]["ours"][-1]
    result = {"model": Path(args.model).name, "items": len(both["replies"]["ours"]),
              "tokens_per_item": metrics["efficiency"]["tokens_per_item"],
              "max_new_tokens": args.max_new_tokens,
              "cpus": os.cpu_count(), "threads": both["threads"],
              "differing_replies": n_differing(both["replies"]["ours"], both["replies"]["peer"]),
              "differing_replies_started": n_differing(replies_of(folder / "started.jsonl"),
                                                       peer["replies"]["peer"])}
    for name, sides in (("started", started), ("same_process", both["seconds"]),
                        ("same_process_cpu", both["cpu"])):
        ratios = [theirs / ours for ours, theirs in zip(sides["ours"], sides["peer"], strict=True)]
        result[name] = {"ours_s": [round(s, 2) for s in sides["ours"]],
                        "peer_s": [round(s, 2) for s in sides["peer"]],
                        "ratio": round(statistics.median(ratios), 2),
                        "over_rounds": [round(ratio, 2) for ratio in ratios]}
    result["shares"] = {"prefill": round(prefill / whole, 3), "decode": round((spent - prefill) / whole, 3),
                        # loading, pictures not made ready meanwhile, scoring, files
                        "rest": round(1 - spent / whole, 3)}
    return result


def grow(args: argparse.Namespace) -> dict:
    """Seconds and peak GiB of either side at every point, and the replies that differ."""
    result = {"model": Path(args.model).name, "max_new_tokens": args.max_new_tokens, "cpus": os.cpu_count()}
    points = [("items", n, {"limit": n}) for n in ITEMS]
    points += [("visual_tokens", n, {"limit": FEW, "visual_tokens": n}) for n in VISUAL_TOKENS]
    for axis, n, changes in points:
        ours, peer = (call(args, side, rounds=1, **changes) for side in ("ours", "peer"))
        row = {axis: n, "differing_replies": n_differing(ours["replies"]["ours"], peer["replies"]["peer"])}
        for side, found in (("ours", ours), ("peer", peer)):
            row |= {f"{side}_s": round(found["seconds"][side][0], 2), f"{side}_gib": round(found["peak_gib"],
                                                                                           3)}
        result.setdefault(axis, []).append(row | {"ratio": round(row["peer_s"] / row["ours_s"], 2)})
        print(json.dumps(result[axis][-1]), file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--items", required=True, help="items with their pictures beside them")
    parser.add_argument("--folder", required=True, help="a folder to work in")
    parser.add_argument("--limit", type=int, default=200, help="items")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="more items and larger pictures instead")
    parser.add_argument("--result", help="where the numbers go")
    parser.add_argument("--visual_tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("ours", "peer", "both"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:  # in a process of its own
        print(json.dumps(part(args, folder)))
        return
    result = grow(args) if args.growth else compare(args, folder)
    write_json(args.result or ROOT / "results" / ("growth.json" if args.growth else "evaluate.json"), result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
