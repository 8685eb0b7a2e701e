"""train_sft.py against transformers' Trainer and TRL's SFTTrainer: tokens per second and peak memory.

    python speed/train.py --folder work/train_speed

128 rows drawn by a seed, like visual CoT: 185 tokens on average and at most 467, 71 % of them visual, 13 %
trained. A random Qwen2.5-VL of 2.5 million parameters; float32, frozen tower, AdamW at a constant 1e-5,
clipping at 1. Activations are recomputed: by the peers for whole layers, as their flag does, by ours for MLPs
(--recompute mlps). A step is all 128 rows for every contender, so their losses must agree at every step.
Contenders run in turns, each in a process of its own, --rounds times; the first step of each is a warm-up.

  trainer            transformers.Trainer, one row per device and 128 accumulated (Monet's setting)
  trainer_rebalance  its best setting: 8 rows on average, in batches of like lengths by `batch_rebalance`
  trl                trl.SFTTrainer, 8 rows per batch (its default) and 16 accumulated
  trl_rebalance      the same with `batch_rebalance`

The peers get the same token ids and labels, made by the same code. Their pixels come from the library's own
image processor, as their users have them, or, with --own_pixels, from utils.qwen, which gives the same
values to the bit in less time. They run in an environment that this script makes from
speed/requirements-train.txt at its first start (it needs a package index or cache).

--recompute layers: ours recomputes whole layers too. --recompute none: all keep their activations, which
takes less time and more memory. The peers gain more by it: checkpointing on the whole model runs the frozen
tower twice. --growth: 32, 128 and 512 rows per step, and 8 rows of 256 to 4,096 visual tokens, ours against
trainer_rebalance.

Writes  --result (results/train.json, train_own_pixels.json, train_layers.json, train_none.json or
        train_growth.json)
Prints  the same JSON object: median tokens per second, peak GiB, ratio to ours with its range over rounds
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.jsonl import write_json, write_rows  # noqa: E402

ENVIRONMENT = Path(__file__).parent / ".venv-train"
CONTENDERS = ("ours", "trainer", "trainer_rebalance", "trl", "trl_rebalance")
N_ROWS = 128
GROWTH = [{"rows": n, "visual_tokens": None} for n in (32, 128, 512)] + [
    {"rows": 8, "visual_tokens": n} for n in (256, 1024, 4096)]
PACK = 2560  # --max_tokens of ours; where pictures are larger, a picture and 1,024 tokens of text
BUDGET = 8192  # visual tokens a row and an image: more than there are, so that nothing is scaled down
LEARNING_RATE = 1e-5
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}
# of 2.5 M, as small a part as of 7B
VISION_SIZES = {"depth": 4, "hidden_size": 40, "intermediate_size": 96, "num_heads": 2}
VOCABULARY = 6000
TOLERANCE = 1e-3  # of losses at the same step
SYLLABLES = "ba ke li mo nu ra se ti vo zu dra ple stin gor bel car fen hal".split()


# ---- the world
def words(rng: random.Random, n: int) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(n))


def make_world(folder: Path, n_rows: int, visual_tokens: int | None) -> None:
    """Write rows.jsonl, pictures (of `visual_tokens`, or of sizes as in visual CoT) and the checkpoint."""
    from PIL import Image

    from toy.make_model import make_model
    rng, rows = random.Random(0), []
    folder.mkdir(parents=True)
    for n in range(n_rows):
        visual = visual_tokens or min(460, max(24, round(rng.lognormvariate(4.64, 0.6))))  # mean 135
        width = max(4, round(visual ** 0.5))
        size = 28 * width, 28 * round(visual / width)
        # as smooth as photos
        picture = Image.effect_noise((width, width), 80).resize(size, Image.Resampling.BICUBIC).convert("RGB")
        picture.save(folder / f"{n}.jpg", quality=90)
        answer = words(rng, 1)
        thought = words(rng, max(1, round(rng.lognormvariate(2.15, 0.6))))
        chain = f"{thought}. The answer is \\boxed{{{answer}}}."
        question = words(rng, rng.randint(1, 3)) + "?"
        rows.append({"id": f"speed/{n}", "images": [f"{n}.jpg"], "question": question, "answer": answer,
                     "steps": [{"text": chain}], "chain": chain})
    write_rows(folder / "rows.jsonl", rows)
    prompt = "system\nYou are a helpful assistant. user assistant. The answer is \\boxed{"
    texts = [words(rng, 400) for _ in range(60)] + [prompt] * 99  # often enough to become tokens
    made = make_model(texts, folder / "model", n_tokens=VOCABULARY, sizes=SIZES, vision_sizes=VISION_SIZES)
    print(json.dumps(made), file=sys.stderr)


# ---- the contenders
def count_rows(folder: Path) -> int:
    return len((folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())


def flags_of_ours(folder: Path, steps: int, output: Path, visual_tokens: int | None,
                  recompute: str) -> list[str]:
    pack = max(PACK, (visual_tokens or 0) + 1024)
    flags = {"data": folder / "rows.jsonl", "image_root": folder, "model": folder / "model", "output": output,
             "max_steps": steps, "global_batch": count_rows(folder), "max_tokens": pack,
             "image_tokens": BUDGET, "tokens_per_image": BUDGET, "learning_rate": LEARNING_RATE,
             "schedule": "constant", "warmup_steps": 1, "recompute": recompute, "num_workers": 0,
             "save_every": 1000000}
    return [f"--{name}={value}" for name, value in flags.items()]


def run_ours(folder: Path, steps: int, output: Path, visual_tokens: int | None, recompute: str) -> dict:
    """Run train_sft.py as a user starts it; the numbers are in its log."""
    flags = flags_of_ours(folder, steps, output, visual_tokens, recompute)
    subprocess.run([sys.executable, str(ROOT / "train_sft.py"), *flags], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = [json.loads(line) for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in log], "seconds": [line["seconds"] for line in log],
            "tokens": log[0]["tokens"], "peak_gib": log[-1]["peak_gib"]}


class Rows:
    """The rows as token ids and labels; a batch opens its pictures and makes patches, as in train_sft.py."""

    def __init__(self, folder: Path, own_pixels: bool):
        from utils.jsonl import read_rows
        from utils.qwen import load_tools
        from utils.train.examples import Target, make_examples
        self.qwen = load_tools(str(folder / "model"))
        self.target = Target("text", str(folder), image_tokens=BUDGET, tokens_per_image=BUDGET)
        rows = list(read_rows(folder / "rows.jsonl", {"id": str}))
        self.examples = make_examples(self.qwen, rows, self.target)
        self.own_pixels = own_pixels
        self.image_id = self.qwen.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __getitem__(self, n: int) -> dict:
        example, ids, labels = self.examples[n], [], []
        n_visual = [rows * columns // 4 for rows, columns in example.grids]
        for token, trained in zip(example.ids, example.trained):
            times = n_visual.pop(0) if token == self.image_id else 1
            ids += [token] * times
            labels += [token if trained else -100] * times
        return {"input_ids": ids, "labels": labels, "row": n}

    def collate(self, items: list[dict]) -> dict:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from utils.qwen import process_images
        from utils.train.examples import load_images
        ids = [torch.tensor(item["input_ids"]) for item in items]
        pad = self.qwen.tokenizer.pad_token_id
        batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                 "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                 "labels": pad_sequence([torch.tensor(item["labels"]) for item in items], batch_first=True,
                                        padding_value=-100)}
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_id).int()
        pictures = []
        for item in items:
            pictures += load_images(self.examples[item["row"]].images, self.target, self.qwen.factor)
        processor = self.qwen.image_processor
        pixels = (process_images(processor, pictures) if self.own_pixels
                  else processor(pictures, return_tensors="pt"))
        return batch | {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}


def run_peer(name: str, folder: Path, steps: int, output: Path, own_pixels: bool, recompute: str) -> dict:
    """Train with a library's trainer on the same rows, in this process."""
    import datasets
    import torch
    import transformers
    rows = Rows(folder, own_pixels)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    # else both divide by the tokens of a batch, not by those of the step: a mean of means
    model.accepts_loss_kwargs = True
    size = 1 if name == "trainer" else 8
    settings = {"output_dir": str(output), "per_device_train_batch_size": size,
                "gradient_accumulation_steps": len(rows.examples) // size,
                "max_steps": steps, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
                "weight_decay": 0.01, "gradient_checkpointing": recompute != "none",
                "gradient_checkpointing_kwargs": {"use_reentrant": False}, "logging_steps": 1,
                "save_strategy": "no", "report_to": "none", "remove_unused_columns": False, "use_cpu": True,
                "bf16": False, "disable_tqdm": True, "dataloader_num_workers": 0,
                "train_sampling_strategy": "batch_rebalance" if name.endswith("rebalance") else "random"}
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append([time.perf_counter(), 0.0])

        def on_step_end(self, *_, **__):
            times[-1][1] = time.perf_counter()

    dataset = datasets.Dataset.from_list([rows[n] for n in range(len(rows.examples))])
    common = {"model": model, "train_dataset": dataset, "data_collator": rows.collate, "callbacks": [Clock()]}
    if name.startswith("trl"):
        import trl
        arguments = trl.SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(**common, args=arguments, processing_class=rows.qwen.tokenizer)
    else:
        trainer = transformers.Trainer(**common, args=transformers.TrainingArguments(**settings))
    trainer.train()
    # from the end of one step to the end of the next: that holds the making of its batches
    ends = [end for _, end in times]
    return {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "seconds": [times[0][1] - times[0][0], *(b - a for a, b in zip(ends, ends[1:]))],
            "tokens": sum(example.n_tokens for example in rows.examples),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}


# ---- the comparison
def make_environment() -> Path:
    """Return the Python of an environment that has our requirements and the peers."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r",
                        str(Path(__file__).parent / "requirements-train.txt")], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


def compare(runs: dict[str, list[dict]]) -> dict:
    """Return each contender's median speed, peak memory and ratios; all losses must agree at every step."""
    def speed(run: dict) -> float:
        return run["tokens"] / statistics.median(run["seconds"][1:])

    result = {}
    for name, rounds in runs.items():
        for ours, theirs in zip(runs["ours"], rounds):
            gaps = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
            assert max(gaps) <= TOLERANCE, (name, gaps)
            assert ours["tokens"] == theirs["tokens"], name
        ratios = [speed(ours) / speed(theirs) for ours, theirs in zip(runs["ours"], rounds)]
        result[name] = {"tokens_per_s": round(statistics.median(map(speed, rounds))),
                        "peak_gib": max(run["peak_gib"] for run in rounds),
                        "losses": [round(loss, 5) for loss in rounds[0]["losses"]],
                        "ours_is_faster_by": round(statistics.median(ratios), 2),
                        "over_rounds": [round(ratio, 2) for ratio in ratios]}
    return result


def contend(python: Path, folder: Path, point: dict, args: argparse.Namespace) -> dict:
    """Write the rows of a point, run the contenders in turns on them and return their comparison."""
    def child(contender: str, output: str) -> str:
        command = [str(python), __file__, "--folder", str(folder), "--steps", str(args.steps)]
        flags = [f"--{name}={value}" for name, value in point.items() if value]
        flags += ["--own_pixels"] * args.own_pixels + ["--recompute", args.recompute]
        done = subprocess.run([*command, *flags, "--contender", contender, "--output", str(folder / output)],
                              stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    child("world", "")
    runs = {name: [] for name in args.contenders}
    for n in range(args.rounds):
        for name in args.contenders:
            runs[name].append(json.loads(child(name, f"{name}-{n}").splitlines()[-1]))
            print(n, name, [round(seconds, 2) for seconds in runs[name][-1]["seconds"]], file=sys.stderr)
    return {**point, "tokens": runs["ours"][0]["tokens"], "steps": args.steps, "rounds": args.rounds,
            "cpus": os.cpu_count(), "contenders": compare(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a new folder to work in; 30 MB, with --growth 200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4,
                        help="optimizer steps per round; the first is not measured")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--own_pixels", action="store_true", help="the peers use utils.qwen too")
    parser.add_argument("--recompute", choices=("layers", "mlps", "none"), default="mlps",
                        help="what ours recomputes")
    parser.add_argument("--growth", action="store_true", help="more rows and larger pictures instead")
    parser.add_argument("--result", help="file to write")
    parser.add_argument("--rows", type=int, default=N_ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--visual_tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=("world", *CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder)
    if args.contender == "world":
        return make_world(folder, args.rows, args.visual_tokens)
    if args.contender:
        run = folder, args.steps, Path(args.output)
        print(json.dumps(run_ours(*run, args.visual_tokens, args.recompute) if args.contender == "ours"
                         else run_peer(args.contender, *run, args.own_pixels, args.recompute)))
        return None
    if folder.exists():
        parser.error(f"{folder} exists; expected a new folder")
    python = make_environment()
    if args.growth:
        args.contenders = ["ours", "trainer_rebalance"]
        result = {"points": [contend(python, folder / str(n), point, args) for n, point in enumerate(GROWTH)]}
    else:
        result = contend(python, folder, {"rows": N_ROWS, "visual_tokens": None}, args)
    name = ("train_growth" if args.growth else "train_own_pixels" if args.own_pixels
            else "train" if args.recompute == "mlps" else f"train_{args.recompute}")
    write_json(args.result or ROOT / "results" / f"{name}.json", result)
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
