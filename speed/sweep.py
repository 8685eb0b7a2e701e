"""A sweep of eight conditions in one run of intervene.py against eight runs of one condition each.

    python speed/sweep.py --model toy/work/latent --items toy/work/world/bench.jsonl --folder work/sweep

Long prompts and short answers: images are enlarged to at least 1,024 visual tokens, replies end after 16.
Both sides are the same script with the same flags in processes of their own, in turns; the last run on either
side is followed by a comparison of the records, which must say the same. Loading the model and calibration
count for both, as they do for a user.

Writes  --result (results/sweep.json; with --growth results/sweep_growth.json)
Prints  the same JSON object: seconds of either side, ratio of each round
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.jsonl import write_json  # noqa: E402

CONDITIONS = ("identity", "tau", "add_noise", "norm_noise", "near_zero", "swap_random", "slot_swap_random",
              "cut_latent")
VISUAL_TOKENS, PIXELS_A_TOKEN = 1024, 28 * 28
GROWTH = [(4, 256), (16, 256), (64, 256), (4, 1024), (4, 4096)]  # items, visual tokens


def run(args: argparse.Namespace, output: Path, conditions: tuple[str, ...]) -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "intervene.py"), "--model", args.model, "--items", args.items,
                    "--latent", args.latent,
                    "--output", str(output), "--fresh", "--conditions", *conditions, "--limit",
                    str(args.limit), "--calibration", "8",
                    "--min_emitters", "4", "--max_new_tokens", "16", "--batch_size", "4", "--dtype",
                    "float32", "--options", "text",
                    "--min_pixels", str(args.visual_tokens * PIXELS_A_TOKEN)], check=True,
                    stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.monotonic() - begun


def answers(path: Path) -> dict[tuple[str, str], str]:
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {(row["id"], row["condition"]): row["text"] for row in rows}


def compare(args: argparse.Namespace) -> dict:
    """Run the conditions together and apart, in turns; the words of every reply must be the same."""
    folder, sides = Path(args.folder), {"together": [], "apart": []}
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        sides["together"].append(run(args, folder / "together.jsonl", CONDITIONS))
        sides["apart"].append(sum(run(args, folder / f"{name}.jsonl", (name,)) for name in CONDITIONS))
    together = answers(folder / "together.jsonl")
    for name in CONDITIONS:
        apart = answers(folder / f"{name}.jsonl")
        assert all(together[key] == text for key, text in apart.items()), name
    ratios = [apart / one for one, apart in zip(sides["together"], sides["apart"])]
    return {"items": args.limit, "visual_tokens": args.visual_tokens, "conditions": CONDITIONS,
            "cpus": os.cpu_count(),
            **{f"{name}_s": [round(seconds, 1) for seconds in its] for name, its in sides.items()},
            "ratio": round(statistics.median(ratios), 2),
            "over_rounds": [round(ratio, 2) for ratio in ratios]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint that imagines in latents")
    parser.add_argument("--items", required=True)
    parser.add_argument("--latent", default="mirage", help="its family")
    parser.add_argument("--folder", required=True, help="a folder to work in")
    parser.add_argument("--limit", type=int, default=24, help="items")
    parser.add_argument("--visual_tokens", type=int, default=VISUAL_TOKENS,
                        help="of an item's picture, which is enlarged to it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true",
                        help="more items and larger pictures instead, a round each")
    parser.add_argument("--result", help="where the numbers go")
    args = parser.parse_args()
    if args.growth:
        args.rounds, result = 1, {"points": []}
        for args.limit, args.visual_tokens in GROWTH:
            result["points"].append(compare(args))
            print(json.dumps(result["points"][-1]), file=sys.stderr)
    else:
        result = compare(args)
    write_json(args.result or ROOT / "results" / ("sweep_growth.json" if args.growth else "sweep.json"),
               result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
