"""How much memory and time the similarity of a large store takes: states on disk, analysed cell by cell.

    python speed/probe.py --folder work/probe                      (1,000 instances x 10 steps x 28 layers \
      x 3,584: 4 GB)

Makes a store of random states around a common direction (`utils.probe.states`), then measures in a fresh
process every inter- and intra-instance measure in all forms with bootstrap intervals, and the spectrum of
every cell. The peer in the same run is the least that any analysis must do: reading every state once.

Writes  --result (results/probe_memory.json)
Prints  the same JSON object: seconds, peak memory in GB, the size of the states, ratio to the peer
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from utils.jsonl import write_json  # noqa: E402
from utils.probe.geometry import spectrum  # noqa: E402
from utils.probe.similarity import Measure, draw_halves  # noqa: E402
from utils.probe.states import States, StateWriter  # noqa: E402

LIMIT_GB = 4.0


def fill(args: argparse.Namespace) -> None:
    """Write the samples that are not there yet."""
    common = np.random.default_rng(0).normal(size=args.hidden).astype(np.float32)
    with StateWriter(args.folder,
                     {name: getattr(args, name) for name in ("steps", "layers", "hidden")}) as writer:
        for i in range(args.instances):
            if str(i) not in writer:
                noise = np.random.default_rng(i + 1).standard_normal((args.steps, args.layers, args.hidden),
                                                                     dtype=np.float32)
                writer.add(str(i), {"inner": common + 0.2 * noise})


def read(args: argparse.Namespace) -> dict:
    began, store, total = time.monotonic(), States(args.folder), 0.0
    for key in list(store.records)[:args.instances]:
        total += float(store.load(key, "inner").sum(dtype=np.float64))
    return {"seconds": time.monotonic() - began, "sum": total}


def analyse(args: argparse.Namespace) -> dict:
    began, store, n = time.monotonic(), States(args.folder), args.instances
    measure = Measure(draw_halves(n, 0), np.arange(n) % 5, n_boot=args.n_boot)

    def beside(cells):
        for cell in cells:
            spectrum(cell.states)
            yield cell

    rows = list(measure.run(beside(store.cells("inner", list(store.records)[:n]))))
    raw = [row["value"] for row in rows if (row["measure"], row["form"], row["pairs"])
           == ("inter", "raw", "all")]
    centred = [row["value"] for row in rows if (row["measure"], row["form"], row["pairs"])
               == ("inter", "centred", "all")]
    return {"seconds": time.monotonic() - began, "rows": len(rows), "raw": float(np.mean(raw)),
            "centred": float(np.mean(centred))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder of the store; filled where it is not")
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10, help="latents of Monet")
    parser.add_argument("--layers", type=int, default=28, help="of Qwen2.5-VL-7B")
    parser.add_argument("--hidden", type=int, default=3584, help="of Qwen2.5-VL-7B")
    parser.add_argument("--n_boot", type=int, default=2000, help="resamples, as in probe.py")
    parser.add_argument("--result", default=str(ROOT / "results" / "probe_memory.json"),
                        help="where the numbers go")
    parser.add_argument("--part", choices=("fill", "read", "analyse"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:  # in a process of its own, whose peak memory is its alone
        found = {"fill": fill, "read": read, "analyse": analyse}[args.part](args) or {}
        print(json.dumps(found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return
    parts = {}
    for part in ("fill", "read", "analyse"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], cwd=ROOT,
                              stdout=subprocess.PIPE,
                              text=True, check=True)
        parts[part] = json.loads(done.stdout)
    size = 4 * args.instances * args.steps * args.layers * args.hidden / 2**30
    result = {"instances": args.instances, "steps": args.steps, "layers": args.layers, "hidden": args.hidden,
              "n_boot": args.n_boot, "states_gb": round(size, 3), "read_s": round(parts["read"]["seconds"],
                                                                                  1),
              "analyse_s": round(parts["analyse"]["seconds"], 1),
              "analyse_gb": round(parts["analyse"]["peak_gb"], 2),
              "limit_gb": LIMIT_GB, "analyse_to_read": round(parts["analyse"]["seconds"]
                                                             / parts["read"]["seconds"], 1),
              "mean_raw_cosine": round(parts["analyse"]["raw"], 4),
              "mean_centred_cosine": round(parts["analyse"]["centred"], 4),
              "rows": parts["analyse"]["rows"], "cpus": os.cpu_count()}
    write_json(args.result, result)
    print(json.dumps(result))
    if result["analyse_gb"] > LIMIT_GB:
        raise SystemExit(f"peak memory {result['analyse_gb']} GB, expected at most {LIMIT_GB}")


if __name__ == "__main__":
    main()
