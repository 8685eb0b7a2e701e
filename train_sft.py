"""Fine-tune a Qwen2.5-VL or Qwen3-VL on chains that imagine in text, latents, a placeholder or not at all.

Stage 3 of 6:  filter_data.py -> [train_sft.py] -> evaluate.py, intervene.py, probe.py

    torchrun --standalone --nproc_per_node 8 train_sft.py --data sft.jsonl --image_root images \
      --output checkpoint
    python train_sft.py --model tiny --data sft.jsonl --output checkpoint --global_batch 64

Reads   --data, JSON or JSONL: rows {"id", "images", "question", "answer", "steps", "chain"} of
        filter_data.py, "conversations" (LLaVA, ShareGPT), "messages" (OpenAI), Monet-SFT or Mirage
Writes  --output: the best checkpoint on held-out rows, in the layout of its base, at the end
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

import json
import os
import random
import shutil
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from utils.chain_formats import read_chains
from utils.cli import Help, cli, log, parse_count, parse_number, parse_seed, stop_on_signals
from utils.items import plain
from utils.journal import read_settings
from utils.jsonl import DataError, call_key, check_output, find_checkpoint, write_json, write_meta, write_rows
from utils.latent_families import FED_BACK, PRESETS, spec_of
from utils.reply_text import last_boxed
from utils.rows import CLOSE, OPEN

if TYPE_CHECKING:  # torch is imported by main, once the flags are parsed
    import torch
    from accelerate import Accelerator

    from utils.qwen import Qwen
    from utils.train.batching import Steps
    from utils.train.checkpoints import Run
    from utils.train.examples import Example, Target

IMAGINATIONS = ("text", "latent", "placeholder", "direct")
RECOMPUTED = ("layers", "mlps", "none")  # parts whose activations the backward pass may recompute
# flags that may change when a run resumes; files count by their content, not by their names
FREE_SETTINGS = ("output", "num_workers", "save_every", "keep", "max_tokens", "recompute", "dry_run", "spike",
                 "data", "model", "image_root", "skip_bad")
BASE_SUFFIXES = (".json", ".jinja", ".txt", ".safetensors")  # of the files that make up a checkpoint


# ---- rows and plan
def parse_warmup(text: str) -> float:
    """Return a count of steps, or a share of the run below 1."""
    number = parse_number(0, kind=float)(text)
    if number > 1 and number % 1:
        raise ArgumentTypeError(f"{text}: expected a whole number of steps, or a share below 1")
    return number if number % 1 else int(number)


def parse_data(text: str) -> tuple[str, float]:
    """Return (path, weight) of "path" or "path:weight"."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, parse_number(1e-6, 1000, float)(weight)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text}: no such file, and its weight is {error}") from error


def prepare_rows(args: Namespace) -> tuple[list[dict], dict[str, int]]:
    """Return the rows of all --data files, and {id: number of its file}."""
    rows, file_of = [], {}
    for number, _, row, fault in read_chains(args.data, args.limit, "filter_data.py writes it"):
        rows.append(prepare_row(row, fault, args))
        file_of[row["id"]] = number
    if not rows:
        raise DataError(f"--data {' '.join(args.data)}: no rows; expected at least one")
    return rows, file_of


def leave_out(acc: Accelerator, tools: Qwen, rows: list[dict], target: Target,
              args: Namespace) -> tuple[list[Example], list[dict]]:
    """Return (examples, rows left out with their reasons), every picture opened once (--skip_bad)."""
    from utils.train.examples import sort_rows
    from utils.train.loop import open_pictures
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


def hold_out(examples: list[Example], args: Namespace) -> tuple[list[Example], list[Example]]:
    if args.validation_rows >= len(examples):
        raise DataError(f"{len(examples)} usable rows, of which --validation_rows {args.validation_rows} are "
                        "held out: none is left to train on")
    random.Random(args.seed).shuffle(examples)
    return examples[args.validation_rows:], examples[:args.validation_rows]


def prepare_row(row: dict, fault: tuple[str, str] | None, args: Namespace) -> dict:
    """Return a row with its earlier turns as they stand in the text, or with its "fault" (reason, detail),
    which may be that it lacks what the target is made of."""
    missing = {"text": "chain" not in row and "no chain; rewrite_captions.py makes it of the steps",
               "direct": not row["answer"].strip() and "no answer, as a key or in a \\boxed{} of the chain"
               }.get(args.imagination, not row["steps"] and "only a finished chain, no steps with the images")
    if missing and not fault:
        fault = "target", f"{missing} (--imagination {args.imagination})"
    replies = [*(said for _, said in row.get("history", []) if args.turns == "all"), row.get("chain", "")]
    closed = [[part.count(CLOSE) for part in reply.split(OPEN)] for reply in replies]  # 0, then 1 per mark
    if args.imagination == "text" and not fault and any(n[0] or set(n[1:]) - {1} for n in closed):
        fault = "marks", f"a reply in which {OPEN} and {CLOSE} do not stand by turns"
    if fault:
        return row | {"fault": fault}
    for turn in row.get("history", []):
        boxed = args.imagination == "direct" and args.turns == "all"
        turn[1] = plain(f"\\boxed{{{last_boxed(turn[1]) or ''}}}" if boxed else turn[1])
    return row | ({"system": plain(row["system"])} if "system" in row else {})


def make_target(args: Namespace) -> Target:
    from utils.train.examples import Target
    spec = spec_of(args.latent, args.latent_size) if args.imagination == "latent" else None
    return Target(args.imagination, args.image_root, spec, args.image_tokens, args.tokens_per_image,
                  args.system, args.turns)


def make_plan(train: Steps, n_held_out: int, left_out: list[dict], args: Namespace) -> dict:
    """Return the size of the run, extrapolated from its first epoch."""
    from utils.train.batching import describe_lengths
    first = [train.work(step) for step in range(train.per_epoch)]
    n_steps = args.max_steps or args.epochs * train.per_epoch
    flops = sum(work.flops for work in first) / len(first) * n_steps
    lengths = describe_lengths(train.examples)
    return {"imagination": args.imagination, "rows": len(train.examples),
            "rows_per_epoch": len(train.order(0)), "held_out_rows": n_held_out,
            "left_out": len(left_out), "reasons": dict(Counter(row["reason"] for row in left_out)),
            "steps": n_steps, "global_batch": args.global_batch, "processes": train.world, **lengths,
            "trained_tokens_per_row": round(lengths["trained_tokens"] / len(train.examples), 1),
            "micro_steps_per_step": round(sum(work.micro_steps for work in first) / len(first), 2),
            "balance": round(sum(work.balance for work in first) / len(first), 4),
            "petaflop": round(flops / 1e15, 6)}


def marked(tools: Qwen, example: Example) -> str:
    """Return the text of a row with the trained tokens between >> and <<."""
    text, before = "", False
    for token, is_trained in zip(example.ids, example.trained):
        text += ">>" if is_trained and not before else "<<" if before and not is_trained else ""
        text, before = text + tools.tokenizer.decode([token]), is_trained
    return text + ("<<" if before else "")


def show_plan(train: Steps, plan: dict, device: torch.device, recompute: str, args: Namespace) -> None:
    from utils.train.batching import device_memory, estimate_memory, memory_lines
    from utils.train.loop import warmup_length
    from utils.train.model import CHUNK
    for example in train.examples[:3 if args.dry_run else 1]:
        log(f"{example.id}:\n{marked(train.qwen, example)}")
    log(" | ".join(f"{key} {value}" for key, value in plan.items()))
    n_steps, warmup = plan["steps"], warmup_length(args.warmup_steps, plan["steps"])
    if warmup > n_steps:
        log(f"warning: --warmup_steps {warmup} are more than the {n_steps} steps of the run, which ends at "
            f"{n_steps / warmup:.0%} of --learning_rate")
    n_targets = min(CHUNK, args.max_tokens * plan["trained_tokens"] // plan["tokens"] + 1)
    parts = estimate_memory(train.qwen.config, args.max_tokens, n_targets, train.world, device.type == "cuda",
                            recompute, args.train_vision, args.lora_rank,
                            max(len(example.steps) for example in train.examples))
    smaller = f"a smaller --max_tokens than {args.max_tokens} or --recompute layers"
    log("\n".join(memory_lines(parts, device_memory(device), smaller)))


def finish_dry_run(acc: Accelerator, examples: list[Example], plan: dict) -> int:
    """Decode every image of `examples` and print the plan; return the exit code."""
    from utils.train.loop import open_pictures
    faults = open_pictures(acc, examples).values()
    log(f"images that cannot be read: {len(faults)}" + "".join(f"\n  {fault}" for fault in [*faults][:20]))
    if acc.is_main_process:
        print(json.dumps({**plan, "unreadable_images": len(faults)}))
    return 2 if faults else 0


# ---- training
def input_files(examples: list[Example], args: Namespace) -> dict[str, Path]:
    """Return the files that decide the result, by names that hold when they move: rows, base, images."""
    root, folder = Path(args.image_root).resolve(), find_checkpoint(args.model)
    images = {path for example in examples for path in (*example.images, *example.steps)}
    return ({f"--data {n}": Path(path) for n, path in enumerate(args.data, 1)}
            | {f"--model {path.name}": path for path in sorted(folder.iterdir())
               if path.suffix in BASE_SUFFIXES}
            | {f"--image_root {path.relative_to(root)}": path for path in sorted(images)})


def train_model(acc: Accelerator, train: Steps, held_out: Steps | None, left_out: list[dict], recompute: str,
                args: Namespace) -> Run:
    import torch

    from utils.train.batching import recompute_activations
    from utils.train.checkpoints import SETTINGS, Run, Saver, enter_run_folder, identify, restore
    from utils.train.loop import Trainer
    from utils.train.weights import gradients_from_embedding, make_model, make_optimizer
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
    optimizer = make_optimizer(qwen.model, args.learning_rate, args.weight_decay, args.merger_learning_rate)
    if checkpoint:
        restore(checkpoint[0], qwen.model, optimizer)
        log(f"resumed from {checkpoint[0]}")
    for steps in (train, held_out):
        if steps:
            steps.qwen = qwen
    saver = Saver(acc.process_index, acc.num_processes)
    try:
        with (stop_on_signals() as stop, recompute_activations(qwen.model, recompute),
              gradients_from_embedding(qwen.model) if args.train_vision == "merger_only" else nullcontext()):
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


def finish(acc: Accelerator, plan: dict, run: Run, seconds: float, args: Namespace) -> None:
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


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--data", nargs="+", required=True, type=parse_data, metavar="FILE[:WEIGHT]",
        help="JSONL files of rows; an epoch has WEIGHT (1) times the rows of the file")
    add("--image_root", default=".", help="folder of the images")
    add("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="checkpoint to start from")
    add("--output", required=True, help="folder of the trained checkpoint; it must not exist")
    add("--imagination", choices=IMAGINATIONS, default="text", help="the training target; see above")
    add("--turns", choices=("all", "last"), default="all",
        help="the replies of a conversation that are trained; the others are its prompt")
    add("--latent", choices=FED_BACK, default="mirage", help="family of the latents")
    add("--latent_size", type=parse_number(1, 16384), help="latents per image (default: the family's)")
    add("--token_init", nargs="+", metavar="TEXT",
        help="latents' tokens that the base lacks begin as the mean of this text's tokens, or each of its "
             "own text's (default: the mean of all tokens)")
    add("--align_weight", type=parse_number(0, 10**6, float), default=10.0,
        help="of the alignment, to 1 of the cross-entropy (Mirage: 10, then 0)")
    add("--align_loss", choices=("cosine", "mse"), default="cosine", help="cosine (Mirage) or mse (LVR)")
    add("--epochs", type=parse_count, default=4, help="passes over the rows")
    add("--max_steps", type=parse_count, help="optimizer steps in all (overrides --epochs)")
    add("--global_batch", type=parse_count, default=128,
        help="rows per optimizer step, whatever the number of GPUs")
    add("--max_tokens", type=parse_count, default=8192, help="tokens that a device runs at once")
    add("--learning_rate", type=parse_number(1e-12, 1000, float), default=1e-5, help="rate after the warm-up")
    add("--warmup_steps", type=parse_warmup, default=10,
        help="optimizer steps of linear warm-up; below 1: their share of the run; 0: none")
    add("--schedule", choices=("linear", "cosine", "constant"), default="linear",
        help="decay after the warm-up")
    add("--min_rate", type=parse_number(0, 1, float), default=0.0,
        help="share of --learning_rate that the decay ends at")
    add("--weight_decay", type=parse_number(0, 1000, float), default=0.01,
        help="AdamW's, on matrices only; 0: none")
    add("--clip", type=parse_number(0, 10**12, float), default=1.0,
        help="largest norm of the gradient; 0: any")
    add("--spike", type=parse_number(0, 1000, float), default=2.0,
        help="nats above the median of 50 steps at which a loss stops the run; 0: never")
    add("--train_vision", nargs="?", const="all", choices=("all", "merger", "merger_only"),
        help="also train the vision tower, which the paper freezes, or of it the merger; merger_only: the "
             "merger and no language model (default: none; alone: all)")
    add("--merger_learning_rate", type=parse_number(1e-12, 1000, float),
        help="the merger's rate after the warm-up (default: --learning_rate)")
    add("--lora_rank", type=parse_number(0, 4096), default=0,
        help="train LoRA of this rank, and latents' tokens, and merge it (use --learning_rate 1e-4)")
    add("--recompute", choices=RECOMPUTED,
        help="activations recomputed in the backward pass; mlps is faster and takes more memory (default: "
             "none on a CPU, else layers)")
    add("--image_tokens", type=parse_count, default=2000,
        help="visual tokens per row above which images are scaled down")
    add("--tokens_per_image", type=parse_count, default=1280,
        help="largest size of one of these images (Monet)")
    add("--system", help="system prompt (default: the row's, or the chat template's)")
    add("--validation_rows", type=parse_number(0), default=0,
        help="rows held out to choose the best checkpoint")
    add("--eval_every", type=parse_count, default=50, help="steps between held-out losses")
    add("--save_every", type=parse_count, default=250, help="steps between checkpoints")
    add("--keep", type=parse_count, default=2, help="checkpoints kept to resume from")
    add("--num_workers", type=parse_number(0, 256), default=2,
        help="processes that prepare batches; 0: the training process")
    add("--seed", type=parse_seed, default=42, help="of the order of rows and of the rows held out")
    add("--limit", type=parse_count, help="only the first N rows of each file")
    add("--skip_bad", metavar="JSONL",
        help="leave out rows that cannot be trained on, after opening every image, and write them here with "
             "their reasons; without it they stop the run")
    add("--dry_run", action="store_true", help="check rows and images; train nothing")
    args = parser.parse_args(argv)
    if args.lora_rank and args.train_vision == "merger_only":
        parser.error("--lora_rank and --train_vision merger_only exclude each other")
    if args.merger_learning_rate and not args.train_vision:
        parser.error("--merger_learning_rate needs --train_vision")
    if args.min_rate and args.schedule == "constant":
        parser.error("--min_rate needs a --schedule that decays")
    if args.token_init:
        tokens = PRESETS[args.latent].tokens
        if args.imagination != "latent" or not all(args.token_init):
            parser.error("--token_init: expected --imagination latent and texts that are not empty")
        if len(args.token_init) not in (1, len(tokens)):
            parser.error(f"--token_init: {len(args.token_init)} texts, expected 1 or those of {tokens}")
    args.data, args.data_weights = map(list, zip(*args.data))
    return args


def main(argv: list[str] | None = None) -> int:
    args, begun = parse_args(argv), time.monotonic()
    output, folder = Path(args.output), Path(f"{args.output}.run")
    if output.exists():
        raise DataError(f"--output {output} exists and is never replaced; move it or give another name")
    if args.skip_bad:
        check_output(args.skip_bad, args.data, "--skip_bad")
        if Path(args.skip_bad).resolve().is_relative_to(output.resolve()):
            raise DataError(f"--skip_bad {args.skip_bad}: in --output, which must not exist; name another")
    rows, file_of = prepare_rows(args)

    import torch
    from accelerate import Accelerator

    from utils.qwen import LVR_HEAD, checkpoint_errors, load_head, load_tools
    from utils.train.batching import Batching, Steps
    from utils.train.checkpoints import lock_run_folder
    from utils.train.examples import make_examples
    from utils.train.weights import add_tokens
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

    def make_steps(examples: list[Example], weights: list[float]) -> Steps:
        files = [file_of[example.id] for example in examples]
        return Steps(tools, examples, target, batching, acc.process_index, acc.num_processes, files, weights)

    examples, left_out = (leave_out(acc, tools, rows, target, args) if args.skip_bad else
                          (make_examples(tools, rows, target, args.max_tokens), []))
    parts = hold_out(examples, args)
    train = make_steps(parts[0], args.data_weights)
    held_out = make_steps(parts[1], [1.0] * len(args.data)) if parts[1] else None
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
