"""train_sft.py against transformers' Trainer and TRL's SFTTrainer: tokens a second and peak memory of equal
steps.

    python speed/train.py --folder work/train_speed

128 rows drawn by a seed: 185 tokens on average and at most 467, 71 % of them visual, 13 % trained, as in
visual CoT; a random Qwen2.5-VL of 2.5 million parameters; float32, frozen tower, AdamW at a constant 1e-5,
clipping at 1. Activations are computed again: the peers' of whole layers, as their flag does, ours by
--recompute mlps. A step is all 128 rows for every contender, so their losses must agree at every step.
Contenders run in turns, each in a process of its own, `--rounds` times; the first step of each is a warm-up.

  trainer            transformers.Trainer, one row a device and 128 accumulated (Monet's layout)
  trainer_rebalance  its best setting: 8 rows on average in batches that `batch_rebalance` makes of like
  lengths
  trl                trl.SFTTrainer, 8 rows a batch (its default) and 16 accumulated
  trl_rebalance      the same with `batch_rebalance`

The peers get the same token ids and labels, made by the same code, and the same pixels: of the library's own
image processor, as their users have them, or, with --own_pixels, of utils.patches, which gives its values to
the bit in less time. They stand in an environment that this script makes of speed/requirements-train.txt at
its first start (it needs a package index or cache).

--recompute layers: ours computes whole layers again too. --recompute none: all keep their activations, for
less time and more memory. The peers gain more by it: checkpointing on the whole model runs the frozen tower
twice. --growth: 32, 128 and 512 rows a step, and 8 rows of 256 to 4,096 visual tokens, ours against
trainer_rebalance.

Writes  --result (results/train.json, train_own_pixels.json, train_layers.json, train_none.json or
train_growth.json)
Prints  the same JSON object: median tokens a second, peak GiB, and ratio to ours with its range over the
rounds
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
SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu", "dra", "ple", "stin", "gor", "bel",
             "car", "fen", "hal")


# ---------------------------------------------------------------------------------------------- the world
def words(rng: random.Random, n: int) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(n))


def make_world(folder: Path, n_rows: int, visual_tokens: int | None) -> None:
    """Write rows.jsonl, its pictures (of `visual_tokens` each, or of lengths as in visual CoT) and the
    checkpoint."""
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
        chain = f"{words(rng, max(1, round(rng.lognormvariate(2.15, 0.6))))}. The answer is \\boxed{{{answer}}}."
        rows.append({"id": f"speed/{n}", "images": [f"{n}.jpg"], "question": words(rng, rng.randint(1, 3))
                     + "?", "answer": answer,
                     "steps": [{"text": chain}], "chain": chain})
    write_rows(folder / "rows.jsonl", rows)
    # the prompt's own words, often enough to be tokens
    texts = [words(rng, 400)
             for _ in range(60)] + [
                 "system\nYou are a helpful assistant. user assistant. The answer is \\boxed{"] * 99
    print(json.dumps(make_model(texts, folder / "model", n_tokens=VOCABULARY, sizes=SIZES,
                                vision_sizes=VISION_SIZES)),
          file=sys.stderr)


# --------------------------------------------------------------------------------------------- the contenders
def count_rows(folder: Path) -> int:
    return len((folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())


def flags_of_ours(folder: Path, steps: int, output: Path, visual_tokens: int | None,
                  recompute: str = "mlps") -> list[str]:
    pack = max(PACK, (visual_tokens or 0) + 1024)
    return ["--data", str(folder / "rows.jsonl"), "--image_root", str(folder), "--model",
            str(folder / "model"), "--output",
            str(output), "--max_steps", str(steps), "--global_batch", str(count_rows(folder)), "--max_tokens",
            str(pack),
            "--image_tokens", str(BUDGET), "--tokens_per_image", str(BUDGET), "--learning_rate",
            str(LEARNING_RATE),
            "--schedule", "constant", "--warmup_steps", "1", "--recompute", recompute, "--num_workers", "0",
            "--save_every",
            "1000000"]


def run_ours(folder: Path, steps: int, output: Path, visual_tokens: int | None, recompute: str) -> dict:
    """train_sft.py as a user starts it; its own log has the figures."""
    subprocess.run([sys.executable, str(ROOT / "train_sft.py"), *flags_of_ours(folder, steps, output,
                                                                               visual_tokens, recompute)],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = [json.loads(line) for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in log], "seconds": [line["seconds"] for line in log],
            "tokens": log[0]["tokens"], "peak_gib": log[-1]["peak_gib"]}


class Rows:
    """The rows as items of token ids and labels; their pictures are opened and made into patches when a batch
    is made, as in train_sft.py."""

    def __init__(self, folder: Path, own_pixels: bool):
        from utils.jsonl import read_rows
        from utils.qwen import load_tools
        from utils.train.examples import Target, make_examples
        self.qwen, self.target = load_tools(str(folder / "model")), Target(
            "text", str(folder), total_tokens=BUDGET, image_tokens=BUDGET)
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

        from utils.patches import process_images
        from utils.train.examples import load_images
        ids = [torch.tensor(item["input_ids"]) for item in items]
        pad = self.qwen.tokenizer.pad_token_id
        batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
                 "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                 "labels": pad_sequence([torch.tensor(item["labels"]) for item in items], batch_first=True,
                                        padding_value=-100)}
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_id).int()
        pictures = [picture for item in items
                    for picture in load_images(self.examples[item["row"]].images, self.target,
                                               self.qwen.factor)]
        processor = self.qwen.image_processor
        pixels = process_images(processor, pictures) if self.own_pixels else processor(pictures,
                                                                                       return_tensors="pt")
        return batch | {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}


def run_peer(name: str, folder: Path, steps: int, output: Path, own_pixels: bool, recompute: str) -> dict:
    """A library's trainer over the same rows, in this process."""
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
                "weight_decay": 0.01,
                "gradient_checkpointing": recompute != "none",
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
                "logging_steps": 1, "save_strategy": "no", "report_to": "none",
                "remove_unused_columns": False, "use_cpu": True,
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


# --------------------------------------------------------------------------------------------- the comparison
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
    """Return each contender's median tokens a second, peak memory and ratios; the losses of all must agree at
    every step."""
    ours, result = runs["ours"], {}
    for name, its in runs.items():
        for mine, theirs in zip(ours, its):
            gaps = [abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True)]
            assert max(gaps) <= TOLERANCE and mine["tokens"] == theirs["tokens"], (name, gaps, mine["tokens"],
                                                                                   theirs["tokens"])
        speeds = [run["tokens"] / statistics.median(run["seconds"][1:]) for run in its]
        times_ours = [mine["tokens"] / statistics.median(mine["seconds"][1:]) / speed for mine,
                      speed in zip(ours, speeds)]
        result[name] = {"tokens_per_s": round(statistics.median(speeds)),
                        "peak_gib": max(run["peak_gib"] for run in its),
                        "losses": [round(loss, 5) for loss in its[0]["losses"]],
                        "ours_is_faster_by": round(statistics.median(times_ours), 2),
                        "over_rounds": [round(ratio, 2) for ratio in times_ours]}
    return result


def contend(python: Path, folder: Path, point: dict, args: argparse.Namespace) -> dict:
    """Make a world and let the contenders run in turns over it; return what `compare` says."""
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
            "cpus": os.cpu_count(),
            "contenders": compare(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="a new folder to work in; 30 MB, with --growth 200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4,
                        help="optimizer steps a round, the first not measured")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--own_pixels", action="store_true",
                        help="let the peers make patches by utils.patches too")
    parser.add_argument("--recompute", choices=("layers", "mlps", "none"), default="mlps",
                        help="what ours computes again")
    parser.add_argument("--growth", action="store_true", help="more rows and larger pictures instead")
    parser.add_argument("--result", help="where the numbers go")
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
