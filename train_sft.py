"""Fine-tune a Qwen2.5-VL on chains whose imagination is text, latents, a placeholder, or left out.

Stage 3 of 6:  filter_data.py -> [train_sft.py] -> evaluate.py, intervene.py, probe.py

    torchrun --standalone --nproc_per_node 8 train_sft.py --data sft.jsonl --image_root images \
      --output checkpoint
    python train_sft.py --model tiny --data sft.jsonl --output checkpoint --global_batch 64

Reads   --data: JSONL rows {"id", "images", "question", "answer", "steps", "chain"} of filter_data.py
Writes  --output: the best checkpoint on held-out rows, in the released layout, at the end
        <output>.run/: log.jsonl (one line per step), step-N/ (to resume from), best-N/ (export)
        --skip_bad: {"id", "subset", "reason", "detail"} of every row left out
Prints  progress on stderr; on stdout one JSON object, also in <output>.metrics.json

--imagination is the training target, made from the same rows:
  text         the chain, each imagination between <think_image> and </think_image> (CapImagine)
  placeholder  the original steps, each image as one <think_image> (the paper's "without rewriting")
  latent       the original steps, each image as K latents, fed recurrently and aligned to it (Mirage)
  direct       the boxed answer alone
The paper's "without filtering" is --data with the rows of rewrite_captions.py.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.cli import Help, cli, log, parse_count, parse_number, parse_seed, stop_on_signals
from utils.images import ImageError, open_image
from utils.journal import read_settings
from utils.jsonl import (DataError, call_key, check_output, check_unique, find_checkpoint, read_rows,
                         sha256_file, write_json, write_meta, write_rows)
from utils.latent_families import LVR_HEAD, PRESETS, load_head, spec_of
from utils.rows import check_own

if TYPE_CHECKING:  # torch is imported by main, once the flags are parsed
    import torch
    from accelerate import Accelerator

    from utils.qwen import Qwen
    from utils.train.batching import Steps
    from utils.train.checkpoints import Run
    from utils.train.examples import Example, Target

INPUT_FIELDS = {"id": str, "images": list, "question": str, "answer": str, "steps": list, "chain": str}
IMAGINATIONS = ("text", "latent", "placeholder", "direct")
RECOMPUTED = ("layers", "mlps", "none")  # parts whose activations the backward pass may recompute
# flags that may change when a run resumes; files count by their content, not by their names
FREE_SETTINGS = ("output", "num_workers", "save_every", "keep", "max_tokens", "recompute", "dry_run", "spike",
                 "data", "model", "image_root", "skip_bad")
BASE_SUFFIXES = (".json", ".jinja", ".txt", ".safetensors")  # of the files that make up a checkpoint


# ---- rows and plan
def prepare_rows(args: argparse.Namespace) -> list[dict]:
    """Return the rows of all --data files."""
    rows, seen = [], {}
    for path in args.data:
        for row in read_rows(path, INPUT_FIELDS, args.limit, "filter_data.py writes it"):
            check_own(f"{path}: id {row['id']!r}", row)
            check_unique(path, row["id"], seen)
            rows.append(row)
    if not rows:
        raise DataError(f"--data {' '.join(args.data)}: no rows; expected at least one")
    return rows


def leave_out(acc: Accelerator, tools: Qwen, rows: list[dict], target: Target,
              args: argparse.Namespace) -> tuple[list[Example], list[dict]]:
    """Return (examples, rows left out with their reasons), every picture opened once (--skip_bad)."""
    from utils.train.examples import sort_rows
    examples, faults = sort_rows(tools, rows, target, args.max_tokens)
    unreadable = open_pictures(acc, examples)
    for example in examples:
        if broken := [unreadable[path] for path in (*example.images, *example.steps) if path in unreadable]:
            faults[example.id] = broken[0]
    left_out = [{"id": row["id"], "subset": row.get("subset"), "reason": faults[row["id"]].reason,
                 "detail": str(faults[row["id"]])} for row in rows if row["id"] in faults]
    if acc.is_main_process:
        write_rows(args.skip_bad, left_out)
    log(f"{len(left_out)} of {len(rows)} rows are left out: see {args.skip_bad}")
    return [example for example in examples if example.id not in faults], left_out


def open_pictures(acc: Accelerator, examples: list[Example]) -> dict[Path, ImageError]:
    """Decode every picture, each on one rank; return the faults, the same on all."""
    from accelerate.utils import gather_object
    paths = sorted({path for example in examples for path in (*example.images, *example.steps)})
    own = paths[acc.process_index::acc.num_processes]

    def fault(path: Path) -> tuple[str, str] | None:
        try:
            open_image(path)
        except ImageError as error:
            return error.reason, str(error)

    with ThreadPoolExecutor() as threads:
        found = [*zip(own, tqdm(threads.map(fault, own), "images", len(own), unit="image",
                                disable=not acc.is_main_process))]
    return {path: ImageError(*parts) for path, parts in gather_object(found) if parts}


def hold_out(examples: list[Example], args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Return (training rows, held-out rows), drawn by --seed."""
    if args.validation_rows >= len(examples):
        raise DataError(f"--validation_rows {args.validation_rows} of {len(examples)} usable rows; expected "
                        "fewer")
    random.Random(args.seed).shuffle(examples)
    return examples[args.validation_rows:], examples[:args.validation_rows]


def make_target(args: argparse.Namespace) -> Target:
    from utils.train.examples import Target
    spec = spec_of(args.latent, args.latent_size) if args.imagination == "latent" else None
    return Target(args.imagination, args.image_root, spec, args.image_tokens, args.tokens_per_image,
                  args.system)


def make_plan(train: Steps, n_held_out: int, left_out: list[dict], args: argparse.Namespace) -> dict:
    """Return the size of the run, extrapolated from its first epoch."""
    first = [train.work(step) for step in range(train.per_epoch)]
    n_steps = args.max_steps or args.epochs * train.per_epoch
    flops = sum(work.flops for work in first) / len(first) * n_steps
    lengths = describe_lengths(train.examples)
    return {"imagination": args.imagination, "rows": len(train.examples), "held_out_rows": n_held_out,
            "left_out": len(left_out), "reasons": dict(Counter(row["reason"] for row in left_out)),
            "steps": n_steps, "global_batch": args.global_batch, "processes": train.world, **lengths,
            "trained_tokens_per_row": round(lengths["trained_tokens"] / len(train.examples), 1),
            "micro_steps_per_step": round(sum(work.micro_steps for work in first) / len(first), 2),
            "balance": round(sum(work.balance for work in first) / len(first), 4),
            "petaflop": round(flops / 1e15, 6)}


def describe_lengths(examples: list[Example]) -> dict[str, int]:
    lengths = sorted(example.n_tokens for example in examples)
    quantiles = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {**{name: lengths[math.ceil(q * len(lengths)) - 1] for name, q in quantiles.items()},
            "tokens": sum(lengths), "trained_tokens": sum(example.n_trained for example in examples),
            "images": sum(len(example.images) + len(example.steps) for example in examples)}


def marked(tools: Qwen, example: Example) -> str:
    """Return the text of a row with the trained tokens between >> and <<."""
    text, before = "", False
    for token, is_trained in zip(example.ids, example.trained):
        text += ">>" if is_trained and not before else "<<" if before and not is_trained else ""
        text, before = text + tools.tokenizer.decode([token]), is_trained
    return text + ("<<" if before else "")


def show_plan(train: Steps, plan: dict, device: torch.device, recompute: str,
              args: argparse.Namespace) -> None:
    """Log the first rows, the plan and the memory per device."""
    from utils.train.batching import device_memory, estimate_memory, memory_lines
    from utils.train.model import CHUNK
    for example in train.examples[:3 if args.dry_run else 1]:
        log(f"{example.id}:\n{marked(train.qwen, example)}")
    log(" | ".join(f"{key} {value}" for key, value in plan.items()))
    n_targets = min(CHUNK, args.max_tokens * plan["trained_tokens"] // plan["tokens"] + 1)
    parts = estimate_memory(train.qwen.config, args.max_tokens, n_targets, train.world, device.type == "cuda",
                            recompute, args.train_vision, args.lora_rank,
                            max(len(example.steps) for example in train.examples))
    smaller = f"a smaller --max_tokens than {args.max_tokens} or --recompute layers"
    log("\n".join(memory_lines(parts, device_memory(device), smaller)))


def finish_dry_run(acc: Accelerator, examples: list[Example], plan: dict) -> int:
    """Decode every image of `examples` and print the plan; return the exit code."""
    faults = open_pictures(acc, examples).values()
    log(f"images that cannot be read: {len(faults)}" + "".join(f"\n  {fault}" for fault in [*faults][:20]))
    if acc.is_main_process:
        print(json.dumps({**plan, "unreadable_images": len(faults)}))
    return 2 if faults else 0


# ---- training
def input_files(examples: list[Example], args: argparse.Namespace) -> dict[str, Path]:
    """Return the files that decide the result, by names that hold when they move: rows, base, images."""
    root, folder = Path(args.image_root).resolve(), find_checkpoint(args.model)
    images = {path for example in examples for path in (*example.images, *example.steps)}
    return ({f"--data {n}": Path(path) for n, path in enumerate(args.data, 1)}
            | {f"--model {path.name}": path for path in sorted(folder.iterdir())
               if path.suffix in BASE_SUFFIXES}
            | {f"--image_root {path.relative_to(root)}": path for path in sorted(images)})


def identify(files: dict[str, Path], before: dict) -> dict[str, str]:
    """Return "name SHA-256 size times" of each file, or its entry in `before` if the content is the same.

    All bytes are hashed once. Later a file with the same size and times is not read again; the second time is
    the inode's, which copying and `touch` renew.
    """
    def entry(name: str) -> str:
        path, old = files[name], str(before.get(name)).rsplit(" ", 4)
        stat = path.stat()
        now = [str(number) for number in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)]
        if old[2:] == now or (digest := sha256_file(path)) == "".join(old[1:2]):
            return before[name]
        return " ".join([path.name[-20:], digest, *now])

    with ThreadPoolExecutor() as threads:
        return dict(zip(files, [*tqdm(threads.map(entry, files), "inputs", len(files), unit="file")]))


def train_model(acc: Accelerator, train: Steps, held_out: Steps | None, left_out: list[dict], recompute: str,
                args: argparse.Namespace) -> Run:
    import torch

    from utils.train.batching import recompute_activations
    from utils.train.checkpoints import SETTINGS, Run, Saver, enter_run_folder, restore
    from utils.train.loop import Trainer
    from utils.train.model import make_model, make_optimizer
    with acc.main_process_first():
        settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
        folder = Path(f"{args.output}.run")
        if left_out:  # the set belongs to the identity of a run
            settings["rows left out"] = f"{len(left_out)} {call_key(ids=[row['id'] for row in left_out])}"
        if acc.is_main_process:
            files = input_files(train.examples + (held_out.examples if held_out else []), args)
            settings |= identify(files, read_settings(folder, SETTINGS) or {})
        checkpoint = enter_run_folder(folder, settings, acc.is_main_process)
    run = Run.from_state(checkpoint[1], checkpoint[0]) if checkpoint else Run()
    qwen, objective = make_model(acc.device, acc.num_processes, train.target, args)
    optimizer = make_optimizer(qwen.model, args.learning_rate, args.weight_decay)
    if checkpoint:
        restore(checkpoint[0], qwen.model, optimizer)
        log(f"resumed from {checkpoint[0]}")
    for steps in (train, held_out):
        if steps:
            steps.qwen = qwen
    saver = Saver(acc.process_index, acc.num_processes)
    try:
        with stop_on_signals() as stop, recompute_activations(qwen.model, recompute):
            Trainer(acc, qwen, objective, optimizer, run, saver, stop, args).fit(train, held_out)
        saver.close()
    except torch.OutOfMemoryError as error:
        raise DataError(f"step {run.step + 1}: out of memory; use a smaller --max_tokens or --lora_rank: "
                        f"{error}") from error
    except KeyboardInterrupt:
        saver.close()  # writes the checkpoint of this step
        raise
    finally:
        saver.abandon()
    return run


def finish(acc: Accelerator, plan: dict, run: Run, seconds: float, args: argparse.Namespace) -> None:
    """Move the best export to --output, write the metrics, and remove the checkpoints."""
    from utils.train.checkpoints import SETTINGS, Best, numbered_folders
    acc.wait_for_everyone()
    if acc.is_main_process:
        output, folder = Path(args.output), Path(f"{args.output}.run")
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        best = run.best or Best(None, run.step)
        metrics = {**plan, "loss": last["loss"], "align": last["align"], "best_held_out_loss": best.loss,
                   "best_step": best.step, "seconds": round(seconds, 1)}
        write_json(f"{output}.metrics.json", metrics)
        begun = read_settings(folder, SETTINGS)
        hashes = {path: begun[f"--data {n}"].rsplit(" ", 4)[1] for n, path in enumerate(args.data, 1)}
        write_meta(output, args, [], seconds, inputs=hashes,
                   **{name: plan[name] for name in ("left_out", "reasons")})
        os.replace(folder / f"best-{best.step}", output)
        for path in numbered_folders(folder, "step").values():
            shutil.rmtree(path)
        print(json.dumps(metrics))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of rows")
    parser.add_argument("--image_root", default=".", help="folder of the images")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="checkpoint to start from")
    parser.add_argument("--output", required=True, help="folder of the trained checkpoint; it must not exist")
    parser.add_argument("--imagination", choices=IMAGINATIONS, default="text",
                        help="the training target; see above")
    parser.add_argument("--latent", choices=sorted(PRESETS), default="mirage", help="family of the latents")
    parser.add_argument("--latent_size", type=parse_number(1, 16384),
                        help="latents per image (default: the family's)")
    parser.add_argument("--align_weight", type=parse_number(0, 10**6, float), default=10.0,
                        help="of the alignment, to 1 of the cross-entropy (Mirage: 10, then 0)")
    parser.add_argument("--align_loss", choices=("cosine", "mse"), default="cosine",
                        help="cosine (Mirage) or mse (LVR)")
    parser.add_argument("--epochs", type=parse_count, default=4, help="passes over the rows")
    parser.add_argument("--max_steps", type=parse_count, help="optimizer steps in all (overrides --epochs)")
    parser.add_argument("--global_batch", type=parse_count, default=128,
                        help="rows per optimizer step, whatever the number of GPUs")
    parser.add_argument("--max_tokens", type=parse_count, default=8192,
                        help="tokens that a device runs at once")
    parser.add_argument("--learning_rate", type=parse_number(1e-12, 1000, float), default=1e-5,
                        help="rate after the warm-up")
    parser.add_argument("--warmup_steps", type=parse_number(0), default=10,
                        help="optimizer steps of linear warm-up; 0: none")
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear",
                        help="decay after the warm-up")
    parser.add_argument("--weight_decay", type=parse_number(0, 1000, float), default=0.01,
                        help="AdamW's, on matrices only; 0: none")
    parser.add_argument("--clip", type=parse_number(0, 10**12, float), default=1.0,
                        help="largest norm of the gradient; 0: any")
    parser.add_argument("--spike", type=parse_number(0, 1000, float), default=2.0,
                        help="nats above the median of 50 steps at which a loss stops the run; 0: never")
    parser.add_argument("--train_vision", action="store_true",
                        help="also train the vision tower (the paper freezes it)")
    parser.add_argument("--lora_rank", type=parse_number(0, 4096), default=0,
                        help="train LoRA of this rank and merge it (needs peft; use --learning_rate 1e-4)")
    parser.add_argument("--recompute", choices=RECOMPUTED,
                        help="activations recomputed in the backward pass; mlps is faster and takes more "
                             "memory (default: none on a CPU, else layers)")
    parser.add_argument("--image_tokens", type=parse_count, default=2000,
                        help="visual tokens per row above which images are scaled down")
    parser.add_argument("--tokens_per_image", type=parse_count, default=1280,
                        help="largest size of one of these images (Monet)")
    parser.add_argument("--system", help="system prompt (default: the chat template's)")
    parser.add_argument("--validation_rows", type=parse_number(0), default=0,
                        help="rows held out to choose the best checkpoint")
    parser.add_argument("--eval_every", type=parse_count, default=50, help="steps between held-out losses")
    parser.add_argument("--save_every", type=parse_count, default=250, help="steps between checkpoints")
    parser.add_argument("--keep", type=parse_count, default=2, help="checkpoints kept to resume from")
    parser.add_argument("--num_workers", type=parse_number(0, 256), default=2,
                        help="processes that prepare batches; 0: the training process")
    parser.add_argument("--seed", type=parse_seed, default=42,
                        help="of the order of rows and of the rows held out")
    parser.add_argument("--limit", type=parse_count, help="only the first N rows of each file")
    parser.add_argument("--skip_bad", metavar="JSONL",
                        help="leave out rows that cannot be trained on, after opening every image, and write "
                             "them here with their reasons; without it they stop the run")
    parser.add_argument("--dry_run", action="store_true", help="check rows and images; train nothing")
    args = parser.parse_args(argv)
    if args.lora_rank and args.train_vision:
        parser.error("--lora_rank and --train_vision exclude each other")
    return args


def main(argv: list[str] | None = None) -> int:
    args, begun = parse_args(argv), time.monotonic()
    output, folder = Path(args.output), Path(f"{args.output}.run")
    if output.exists():
        raise DataError(f"--output {output} exists and is never replaced; move it or give another name")
    if args.skip_bad:
        check_output(args.skip_bad, args.data, "--skip_bad")
    rows = prepare_rows(args)

    import torch
    from accelerate import Accelerator

    from utils.qwen import checkpoint_errors, load_tools
    from utils.train.batching import Batching, Steps
    from utils.train.checkpoints import lock_run_folder
    from utils.train.examples import add_tokens, make_examples
    acc = Accelerator(cpu=not torch.cuda.is_available())
    target, tools = make_target(args), load_tools(args.model)
    if target.spec:
        add_tokens(tools, target.spec.tokens)
        with checkpoint_errors(args.model):
            head = load_head(args.model, torch.device("cpu"), torch.float32)
        if head:
            raise DataError(f"--model {args.model}: latents of this base pass through a head ({LVR_HEAD}*), "
                            "which training neither applies nor keeps; expected a base without one, or "
                            "another --imagination")
    batching = Batching(args.seed, args.global_batch, args.max_tokens, args.train_vision, args.num_workers)

    def make_steps(examples: list[Example]) -> Steps:
        return Steps(tools, examples, target, batching, acc.process_index, acc.num_processes)

    examples, left_out = (leave_out(acc, tools, rows, target, args) if args.skip_bad else
                          (make_examples(tools, rows, target, args.max_tokens), []))
    parts = hold_out(examples, args)
    train, held_out = make_steps(parts[0]), make_steps(parts[1]) if parts[1] else None
    default = "layers" if acc.device.type == "cuda" else "none"
    recompute, plan = args.recompute or default, make_plan(train, len(parts[1]), left_out, args)
    show_plan(train, plan, acc.device, recompute, args)
    if args.dry_run:
        return finish_dry_run(acc, [] if args.skip_bad else examples, plan)
    with lock_run_folder(folder) if acc.is_main_process else nullcontext():
        run = train_model(acc, train, held_out, left_out, recompute, args)
        finish(acc, plan, run, time.monotonic() - begun, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
