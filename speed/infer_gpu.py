"""evaluate.py and intervene.py on one GPU with random weights at the released sizes: items per second.

    python speed/infer_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu               (minutes)
    python speed/infer_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu --size tiny   (a test, no GPU)

--config and the sizes are those of speed/train_gpu.py. Items show one picture of 1,000 or 8,000 visual
tokens. Random weights never end a reply, so each has --max_new_tokens. With latents the model has Monet's
tokens, and its output row of the start token points along the states it sees, so that it imagines
(`emitting` is the share of items that do). evaluate.py reports its seconds without loading. intervene.py
reads a prompt once for all conditions; the seconds of a run on a quarter of the items are subtracted, which
removes the loading.

Writes  --result (results/infer_gpu.json), again after every configuration
Prints  one line per configuration, then the same JSON object
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from train_gpu import ROOT, SIZES, make_checkpoint, noise

from utils.decode import decode, prefill
from utils.items import chat
from utils.jsonl import load_object, write_json, write_rows
from utils.latent_families import PRESETS
from utils.qwen import encode, load
from utils.train.weights import add_tokens
from utils.train.weights import save

CONDITIONS = ("identity", "add_noise", "tau", "swap_random", "slot_swap_random", "cut_latent")
SPEC = PRESETS["monet_vllm"]
CALIBRATION = 4  # items


def make_items(folder: Path, tokens: int, n: int) -> Path:
    """Write `n` items that show a picture of about `tokens` visual tokens."""
    items = []
    for i in range(n):
        name = f"{tokens}-{i}.png"
        noise(round(tokens ** 0.5)).save(folder / name)
        options = [["A", "a red circle"], ["B", "two people"], ["C", "a boat"], ["D", "a tree"]]
        items.append({"id": f"{tokens}/{i}", "question": "What is to the left of the river?", "metric": "mcq",
                      "options": options, "answer": {"type": "letter", "value": "ABCD"[i % 4]},
                      "images": [{"path": name}]})
    write_rows(folder / f"{tokens}.items.jsonl", items)
    return folder / f"{tokens}.items.jsonl"


def make_latent(model: Path, folder: Path) -> None:
    """Write a checkpoint with latent tokens that tends to emit the start token."""
    qwen = load(str(model), "bfloat16")
    start_id = add_tokens(qwen, SPEC.tokens)[SPEC.tokens.index(SPEC.start)]
    inputs = encode(qwen, [chat(qwen.tokenizer, "What is this?", 1)], [[noise(8)]])
    state = decode(qwen, prefill(qwen, inputs), 8, capture=True)[0][0].states.mean(0)
    with torch.no_grad():
        qwen.model.lm_head.weight[start_id] = state * 3 / state.norm()
    save(qwen, str(folder))


def call(script: str, output: Path, flags: list[str]) -> dict:
    """Run a script without an earlier journal; return its metrics, or {"failed": its last line}."""
    shutil.rmtree(f"{output}.run", ignore_errors=True)
    done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *flags, "--output", str(output)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return load_object(f"{output}.metrics.json")


def run_evaluate(model: Path, items: Path, args: argparse.Namespace, latent: list[str]) -> dict:
    metrics = call("evaluate", items.with_suffix(".evaluate"), [
        "--model", str(model), "--items", str(items), "--protocol", "plain",
        "--max_new_tokens", str(args.max_new_tokens), *latent])
    if "failed" in metrics:
        return metrics
    spent = metrics["efficiency"]
    return {"items_per_s": round(args.items / spent["seconds"], 3),
            "tokens_per_item": spent["tokens_per_item"],
            "prefill_share": round(spent["prefill_seconds"] / spent["seconds"], 3),
            **({"emitting": metrics["emission"]["share"]} if latent else {})}


def run_intervene(model: Path, items: Path, args: argparse.Namespace, latent: list[str]) -> dict:
    """Measure items per second under all CONDITIONS, the clean run included."""
    few, most = args.items // 4, args.items - CALIBRATION
    seconds = []
    for n in (few, most):
        metrics = call("intervene", items.with_suffix(".intervene"), [
            "--model", str(model), "--items", str(items), "--limit", str(n), "--calibration",
            str(CALIBRATION), "--conditions", *CONDITIONS, "--max_new_tokens", str(args.max_new_tokens),
            "--min_emitters", "2", *latent])
        if "failed" in metrics:
            return metrics
        seconds.append(metrics["seconds"])
    if seconds[1] < 1.5 * seconds[0]:
        return {"failed": f"{seconds[0]} s for a quarter of the items, {seconds[1]} s for all: mostly "
                          "loading; more --items"}
    return {"items_per_s": round((most - few) / (seconds[1] - seconds[0]), 3),
            "conditions": len(CONDITIONS), "emitting": metrics["emission"]["share"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True,
                        help="folder of the released configuration and tokenizer files")
    parser.add_argument("--folder", required=True, help="a folder to work in; 35 GB for 7b")
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), default=["3b", "7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 8000], help="visual tokens per item")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--result", default=str(ROOT / "results" / "infer_gpu.json"),
                        help="file to write")
    args = parser.parse_args()
    folder, on_gpu = Path(args.folder), torch.cuda.is_available()
    result = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
              "items": args.items, "runs": []}
    for size in args.size:
        plain, imagining = folder / size, folder / f"{size}_latent"
        make_checkpoint(Path(args.config), size, plain)
        make_latent(plain, imagining)
        latent = ["--latent", SPEC.name]
        for tokens in args.tokens:
            items = make_items(folder, tokens, args.items)
            for what, run, model, flags in (("evaluate", run_evaluate, plain, []),
                                            ("evaluate, latents", run_evaluate, imagining, latent),
                                            ("intervene, latents", run_intervene, imagining, latent)):
                measured = run(model, items, args, flags)
                result["runs"].append({"size": size, "visual_tokens": tokens, "what": what, **measured})
                print(json.dumps(result["runs"][-1]), file=sys.stderr)
                write_json(args.result, result)
        for path in (plain, imagining):
            shutil.rmtree(path)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
