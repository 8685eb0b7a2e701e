"""train_sft.py on one GPU with random weights at the released sizes: tokens per second, MFU, peak memory.

    python speed/train_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu               (25 minutes)
    python speed/train_gpu.py --config Qwen2.5-VL-7B-Instruct --folder work/gpu --size tiny   (a test, no GPU)

--config is a folder with the released configuration, tokenizer and processor settings of Qwen2.5-VL-7B; 3B is
the same with the published sizes of 3B. No weights are needed. The rate of bfloat16 matrix products is
measured first, in the same call: `mfu` is model operations over that rate, not over a data sheet's rate.

Every configuration is a run of train_sft.py, packed (--max_tokens 16384) or with one row per pass, on rows of
2,000, 4,000 and 8,000 tokens, half of them visual; the first two steps do not count. A configuration that
fails is recorded with its last line and the next one runs.

Writes  --result (results/train_gpu.json), again after every configuration
Prints  one line per configuration, then the same JSON object
"""
import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.jsonl import write_json, write_rows  # noqa: E402
from utils.qwen import load_tools  # noqa: E402

# config.json of the releases; the tower differs in out_hidden_size alone, which is the model's width
SIZES = {"7b": {},
         "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
                "num_key_value_heads": 2, "num_hidden_layers": 36, "tie_word_embeddings": True},
         "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "num_hidden_layers": 2}}
TINY_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
               "fullatt_block_indexes": [1]}
PACK = 16384
N_ROWS = 16  # per step
WORDS = "red circle left of the small house where two people stand".split()


def matrix_rate(device: str, n: int) -> float:
    """Return operations per second of an n x n x n product in bfloat16, the best of 5 times 20."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(20):
            c = a @ b
        float(c[0, 0])  # waits for the device
        best = max(best, 20 * 2 * n**3 / (time.perf_counter() - begun))
    return best


def make_checkpoint(config_folder: Path, size: str, folder: Path) -> None:
    """Write a checkpoint of random weights in bfloat16."""
    folder.mkdir(parents=True)
    for path in config_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((config_folder / "config.json").read_text()) | SIZES[size]
    config["vision_config"] = config["vision_config"] | {"out_hidden_size": config["hidden_size"]} | (
        TINY_VISION if size == "tiny" else {})
    if size == "tiny":
        config["rope_scaling"] = config["rope_scaling"] | {"mrope_section": [4, 6, 6]}  # half of a head's 32
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder),
                                                        dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # save_pretrained wrote another form


def noise(side: int) -> Image.Image:
    """Return a square picture, `side` visual tokens wide."""
    return Image.effect_noise((28 * side, 28 * side), 60).convert("RGB")


def make_rows(folder: Path, tokens: int, model: Path) -> Path:
    """Write N_ROWS rows of about `tokens` tokens: half image, half words, of which 4/5 are trained."""
    tokenizer, rng, rows = load_tools(str(model)).tokenizer, random.Random(0), []
    side = round((tokens / 2) ** 0.5)
    n_words = tokens - side * side - 60
    for n in range(N_ROWS):
        name = f"{tokens}-{n}.png"
        noise(side).save(folder / name)
        question, chain = (" ".join(rng.choices(WORDS, k=k)) for k in (n_words // 5, n_words * 4 // 5))
        assert len(tokenizer(chain).input_ids) < tokens
        rows.append({"id": f"{tokens}/{n}", "images": [name], "question": question, "answer": "two",
                     "steps": [{"text": chain}], "chain": chain + " \\boxed{two}"})
    write_rows(folder / f"{tokens}.jsonl", rows)
    return folder / f"{tokens}.jsonl"


def run(folder: Path, model: Path, tokens: int, max_tokens: int, steps: int, rate: float) -> dict:
    """Run train_sft.py once and return its speed and memory; a later run replaces its checkpoint."""
    output = folder / "trained"
    for path in (output, Path(f"{output}.run")):
        shutil.rmtree(path, ignore_errors=True)
    flags = {"data": folder / f"{tokens}.jsonl", "image_root": folder, "model": model, "output": output,
             "max_steps": steps, "global_batch": N_ROWS, "max_tokens": max_tokens, "image_tokens": tokens,
             "tokens_per_image": tokens, "recompute": "layers", "spike": 0, "save_every": 1000000}
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run([sys.executable, str(ROOT / "train_sft.py"), *words],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = Path(f"{output}.run/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    result = {"row_tokens": tokens, "max_tokens": max_tokens, "steps": len(lines),
              "exit_code": done.returncode}
    if len(lines) > 2:
        counted = lines[2:]
        seconds = statistics.median(line["seconds"] for line in counted)
        result |= {"tokens_a_step": lines[0]["tokens"], "tokens_per_s": round(lines[0]["tokens"] / seconds),
                   "mfu": round(lines[0]["flops"] / seconds / rate, 4), "peak_gib": lines[-1]["peak_gib"],
                   "data_wait": lines[-1]["data_wait"]}
    if done.returncode:
        result["error"] = done.stderr.strip().splitlines()[-1][:300]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True,
                        help="folder of the released configuration and tokenizer files")
    parser.add_argument("--folder", required=True,
                        help="a folder to work in; 35 GB for 3b and 7b, one after the other")
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), default=["3b", "7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2000, 4000, 8000], help="per row")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per configuration")
    parser.add_argument("--result", default=str(ROOT / "results" / "train_gpu.json"),
                        help="file to write")
    args = parser.parse_args()
    on_gpu, folder = torch.cuda.is_available(), Path(args.folder)
    rate = matrix_rate("cuda", 8192) if on_gpu else matrix_rate("cpu", 512)
    result = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
              "matrix_tflops": round(rate / 1e12, 3), "runs": []}
    for size in args.size:
        model = folder / size
        make_checkpoint(Path(args.config), size, model)
        for tokens in args.tokens:
            make_rows(folder, tokens, model)
            for max_tokens in (PACK, tokens + 100):
                measured = run(folder, model, tokens, max_tokens, args.steps, rate)
                result["runs"].append({"size": size, **measured})
                print(json.dumps(result["runs"][-1]), file=sys.stderr)
                write_json(args.result, result)
        shutil.rmtree(model)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
