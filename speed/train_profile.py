"""Where a step of train_sft.py in speed/train.py's benchmark spends its time, by torch's profiler.

    python speed/train_profile.py --folder work/profile

Seconds are each operator's own, without those it calls, summed over the third step. What is left is outside
of operators.

Writes  --result (results/train_profile.json)
Prints  the same JSON object
"""
import argparse
import json
import os
import shutil
import time
from itertools import count
from pathlib import Path

from torch.profiler import ProfilerActivity, profile
from train import N_ROWS, ROOT, flags_of_ours, make_world

import train_sft
from utils.jsonl import write_json

PARTS = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("flash_attention",),
         "first layer of the tower": ("convolution",), "pictures and packs": ("DataLoader",),
         "optimizer": ("adam",)}
REST = "other operators"
STEP = 3  # the first makes the optimizer's state, and both meet fresh memory


def part_of(operator: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in operator for word in words)), REST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a new folder to work in; 30 MB")
    parser.add_argument("--result", default=str(ROOT / "results" / "train_profile.json"),
                        help="where the numbers go")
    args = parser.parse_args()
    folder, step, numbers, found = Path(args.folder), train_sft.train_step, count(1), {}
    make_world(folder, N_ROWS, None)

    def watched(*given):
        if next(numbers) != STEP:
            return step(*given)
        with profile(activities=[ProfilerActivity.CPU]) as watch:
            began = time.perf_counter()
            result = step(*given)
            found["step_s"] = time.perf_counter() - began
        found["operators"] = {event.key: event.self_cpu_time_total / 1e6 for event in watch.key_averages()}
        return result

    train_sft.train_step = watched
    train_sft.main(flags_of_ours(folder, STEP, folder / "trained", None))
    operators = dict(sorted(found["operators"].items(), key=lambda pair: -pair[1]))
    parts = {part: 0.0 for part in (*PARTS, REST)}
    for name, seconds in operators.items():
        parts[part_of(name)] += seconds
    parts["outside of operators"] = found["step_s"] - sum(parts.values())
    result = {"step_s": round(found["step_s"], 2), "parts_s": {part: round(seconds, 2) for part,
                                                               seconds in parts.items()},
              "operators_s": {name: round(seconds, 3) for name, seconds in list(operators.items())[:15]},
              "cpus": os.cpu_count()}
    write_json(args.result, result)
    shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
