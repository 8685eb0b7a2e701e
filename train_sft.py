"""Fine-tune a Qwen2.5-VL on chains whose imagination is text, latents, a placeholder, or left out.

Stage 3 of 6:  filter_data.py -> [train_sft.py] -> evaluate.py, intervene.py, probe.py    (one 8-GPU node; a
toy on a CPU)

    torchrun --standalone --nproc_per_node 8 train_sft.py --data sft.jsonl --image_root images --output \
      checkpoint
    python train_sft.py --model tiny --data sft.jsonl --output checkpoint --global_batch 64

Reads   --data: JSONL rows {"id", "images", "question", "answer", "steps", "chain"} as filter_data.py writes
them
Writes  --output: a checkpoint in the released layout, the best on held-out rows; it appears when training is
        complete.
        <output>.run/: log.jsonl (one line a step), step-N/ (whole checkpoints to resume from), best-N/
(exports)
Prints  progress and one line a step on stderr; on stdout one JSON object, also <output>.metrics.json
        --dry_run: the first rows, the plan, memory and hours; writes <output>.lengths.png and trains nothing

The target is decided by --imagination, from the same rows and with the same loss otherwise:
  text         the chain, each imagination written between <think_image> and </think_image> (CapImagine)
  placeholder  the original steps, each image replaced by one <think_image> (the paper's "without rewriting")
  latent       the original steps, each image replaced by K latents fed recurrently and aligned to that image
  (Mirage)
  direct       the boxed answer alone
(The paper's "without filtering" is --data with the rows of rewrite_captions.py.)
"""
import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from threading import Event
from types import MethodType

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from utils.answers import answers_match, last_boxed
from utils.cli import Help, cli, log, parse_count, stop_on_signals
from utils.decode import generate
from utils.jsonl import DataError, disk_errors, read_rows, write_json, write_meta
from utils.latent_families import PRESETS, LatentSpec, clean_text, spec_of
from utils.patches import process_images
from utils.qwen import Qwen, add_tokens, collate, load, load_tools, save
from utils.row_rules import check_own
from utils.train.batching import RECOMPUTED, Batching, Steps, Work, dry_run, make_plan, peak_flops, show_plan
from utils.train.checkpoints import (Run, Saver, alone, keep_lines, open_run, prune, publish, restore,
                                     steps_of, take)
from utils.train.examples import IMAGINATIONS, Example, Target, load_images, make_examples
from utils.train.fsdp import average_replicated, gathered, shard, whole_state
from utils.train.latent_batches import align, run_latents
from utils.train.packing import run_packed, use_packed_attention

INPUT_FIELDS = {"id": str, "images": list, "question": str, "answer": str, "steps": list, "chain": str}
CHUNK = 2048  # predictions whose logits are held at once: 2048 x 152,064 x 14 bytes are 4.4 GB
RECENT = 50  # steps whose median loss a spike is measured from
# not the tower's
ADAPTED = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
FREE_SETTINGS = ("output", "num_workers", "save_every", "keep", "keep_best", "max_tokens", "recompute",
                 "dry_run",
                 "resume", "spike", "report_to")  # may change when a run is resumed


# ---------------------------------------------------------------------------------------------- the objective
class Objective(torch.nn.Module):
    """Losses of a micro-batch, token by token, so that the caller divides once by the whole step's count.

    Returns (negative log-likelihood [n] of each trained token, whether it was the likeliest [n], alignment
    summed over latent segments).
    """

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, align_loss: str, autocast: bool = False):
        super().__init__()
        self.model, self.qwen, self.spec, self.align_loss, self.autocast = qwen.model, qwen, spec, align_loss, autocast

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            if self.spec is None:
                hidden, aligned = run_packed(self.model, batch), torch.zeros((),
                                                                             device=batch["target"].device)
            else:
                states, latents = run_latents(self.model, batch, self.spec)
                hidden = states.flatten(0, 1)[batch["source"]]
                aligned = align(self.qwen, batch, latents, self.align_loss) if batch["latents"] else 0.0
                # every pass takes part in the gradient on every rank: else sharded layers would wait for each
                # other
                aligned = aligned + 0.0 * states.float().sum()
            return *self.predict(hidden, batch["target"]), aligned

    def predict(self, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Never more than CHUNK rows of logits: beyond, they are computed again in the backward pass."""
        def losses(hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.model.lm_head(hidden).float()
            return F.cross_entropy(logits, target, reduction="none"), logits.detach().argmax(-1) == target

        if len(target) <= CHUNK:
            return losses(hidden, target)
        parts = [checkpoint(losses, *part, use_reentrant=False) for part in zip(hidden.split(CHUNK),
                                                                                target.split(CHUNK))]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])


# ---------------------------------------------------------------------------------------------- training
def learning_rate_at(step: int, n_steps: int, peak: float, warmup: int, schedule: str = "linear") -> float:
    """Linear warm-up over `warmup` steps, then linear decay to 0 at `n_steps` (the Trainer's "linear",
    Monet's choice) or no decay ("constant")."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (n_steps - step) / max(1, n_steps - warmup)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only, as the Trainer does; a trained tower, which is not sharded, in
    groups of its own."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim >= 2, ".visual." in name), []).append(parameter)
    return torch.optim.AdamW([{"params": its, "weight_decay": args.weight_decay if decays else 0.0}
                              for (decays, _), its in groups.items()], lr=args.learning_rate, fused=True)


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()}


def train_step(acc: Accelerator, objective, optimizer, batches: Iterable[dict], work: Work, run: Run,
               args: argparse.Namespace,
               stop: Event) -> tuple[dict, bool]:
    """One optimizer step: the loss is the mean over the trained tokens of the whole step, on all ranks
    together.

    Returns its record, and whether a signal to stop came to any rank. DataError, before anything is updated,
    for a loss that is not finite or jumps.
    """
    # the dropout of adapters: a function of seed and step, as the rows
    torch.manual_seed(args.seed * 1_000_003 + run.step)
    sums, by_row = torch.zeros(4, device=acc.device), []
    for batch in batches:
        batch = to_device(batch, acc.device)
        losses, right, aligned = objective(batch)
        nll = (losses * batch["weight"]).sum()
        loss = nll / work.norm + (args.align_weight * aligned / work.segments if work.segments else 0.0
                                  * aligned)
        # gradients are averaged over ranks, and counts are of all ranks
        (loss * acc.num_processes).backward()
        counts = batch["weight"] > 0
        sums += torch.stack([nll.detach(), aligned.detach(), (right & counts).sum(), torch.zeros_like(nll)])
        by_row.append((batch["row_ids"], batch["row"], losses.detach()))
    if args.train_vision:
        average_replicated([p for p in objective.parameters() if p.requires_grad])
    norm = float(acc.clip_grad_norm_(objective.parameters(), args.clip))
    sums[3] = float(stop.is_set())  # asked of all ranks: they must leave at the same step
    nll, aligned, right, told = acc.reduce(sums, "sum").tolist()
    loss = nll / work.norm
    check_loss(loss, norm, by_row, run, args)
    optimizer.step()
    optimizer.zero_grad()
    run.recent = [*run.recent, loss][-RECENT:]
    return {"loss": loss, "accuracy": right / work.trained_tokens, "align": aligned / work.segments
            if work.segments else None,
            "grad_norm": norm, **{name: value for name, value in asdict(work).items()
                                  if name not in ("norm", "segments")}
            }, told > 0


def check_loss(loss: float, norm: float, by_row: list[tuple], run: Run, args: argparse.Namespace) -> None:
    """Raise DataError with the rows of the highest loss if the loss or the gradient is not finite, or the
    loss jumps."""
    median = statistics.median(run.recent) if run.recent else math.inf
    if math.isfinite(loss) and math.isfinite(norm) and not (args.spike and loss > median + args.spike):
        return
    means = []
    for ids, rows, losses in by_row:
        for n, name in enumerate(ids):
            its = losses[rows == n]
            means.append((float(its.mean()) if len(its) else 0.0, name))
    worst = sorted(gather_object(means), key=lambda pair: -pair[0] if math.isfinite(pair[0]) else
                   -math.inf)[:8]
    shown = ", ".join(f"{name} ({mean:.2f})" for mean, name in worst)
    raise DataError(
        f"step {run.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, where the last {len(run.recent)} losses "
                    f"had a median of {median:.4g}; nothing was updated. Rows of the highest loss: {shown}. Look at them, take "
                    "them out or lower --learning_rate in a new run; --spike 0 with the same command goes on from the last "
                    "checkpoint")


@torch.no_grad()
def held_out_score(acc: Accelerator, qwen: Qwen, objective, held_out: Steps, answers: list[str],
                   args: argparse.Namespace) -> dict:
    """Return the mean negative log-likelihood a trained token over the held-out rows and, with --select
    answers, the share of them whose generated answer is right."""
    objective.eval()
    sums = torch.zeros(4, device=acc.device)
    with nullcontext() if held_out.target.spec else use_packed_attention(qwen.model):
        for batch in held_out.ahead(0, held_out.per_epoch):
            batch = to_device(batch, acc.device)
            losses, _, _ = objective(batch)
            counts = batch["weight"] > 0
            sums[:2] += torch.stack([losses[counts].sum(), counts.sum()])
    if args.select == "answers":
        with gathered(objective):
            mine = list(zip(held_out.examples, answers))[acc.process_index::acc.num_processes]
            for k in range(0, len(mine), 8):
                examples, expected = zip(*mine[k:k + 8])
                for answer, reply in zip(expected, replies(qwen, examples, held_out.target,
                                                           args.answer_tokens)):
                    boxed = last_boxed(reply)
                    sums[2:] += torch.tensor([boxed is not None and answers_match(boxed, answer), 1.0],
                                             device=acc.device)
    objective.train()
    nll, n_tokens, right, n_rows = acc.reduce(sums, "sum").tolist()
    return {"held_out_loss": nll / n_tokens, **({"held_out_accuracy": right / n_rows} if args.select
                                                == "answers" else {})}


def replies(qwen: Qwen, examples: list[Example], target: Target, max_new_tokens: int) -> Iterator[str]:
    """Answer the questions of rows greedily."""
    prompts = [example.ids[:example.trained.index(True)] for example in examples]
    pixels = [process_images(qwen.image_processor, load_images(example.images, target, qwen.factor))
              for example in examples]
    batch = to_device(collate(qwen, prompts, pixels), qwen.device)
    for row in generate(qwen, batch, max_new_tokens, target.spec):
        yield clean_text(qwen.tokenizer, row.ids, target.spec)


def export(acc: Accelerator, qwen: Qwen, saver: Saver, folder: Path) -> None:
    """Gather the weights and let them be written as a released-layout checkpoint, in the type they came in.
    """
    state = whole_state(qwen.model, qwen.saved_dtype, acc.is_main_process)
    if acc.is_main_process:
        saver.submit(lambda: publish(folder, lambda to: save(qwen, to, state)))


def fit(acc: Accelerator, qwen: Qwen, objective, optimizer, train: Steps, held_out: Steps | None,
        answers: list[str], run: Run,
        saver: Saver, stop: Event, args: argparse.Namespace) -> None:
    """The training loop: from run.step to the end, with log, checkpoints and the best exports.

    Once `stop` is set on any rank, all save after the step they are in and raise KeyboardInterrupt.
    """
    folder, n_steps = Path(f"{args.output}.run"), args.max_steps or args.epochs * train.per_epoch
    if acc.is_main_process:
        keep_lines(folder / "log.jsonl", run.step)
    peak = peak_flops(torch.cuda.get_device_name()) if acc.device.type == "cuda" else None
    batches = Waiting(train.ahead(run.step, n_steps))
    with tqdm(total=n_steps, initial=run.step, desc=f"train {args.imagination}", unit="step",
              disable=not acc.is_main_process) as bar:
        while run.step < n_steps:
            begun, batches.seconds, work = time.perf_counter(), 0.0, train.work(run.step)
            rate = learning_rate_at(run.step, n_steps, args.learning_rate, args.warmup_steps, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with nullcontext() if train.target.spec else use_packed_attention(qwen.model):
                record, told = train_step(acc, objective, optimizer, islice(batches, work.micro_steps), work,
                                          run, args, stop)
            run.step += 1
            seconds = time.perf_counter() - begun
            record = {"step": run.step, "lr": rate, **record, "seconds": round(seconds, 4),
                      "data_wait": round(batches.seconds / seconds, 3),
                      "tokens_per_s": round(work.tokens / seconds),
                      "images_per_s": round(work.images / seconds, 1), "peak_gib": peak_memory(acc.device),
                      "mfu": peak and round(work.flops / (seconds * acc.num_processes * peak), 4)}
            due = run.step == n_steps
            if held_out and (due or run.step % args.eval_every == 0):
                score = held_out_score(acc, qwen, objective, held_out, answers, args)
                record |= score
                if run.is_among_best([-score.get("held_out_accuracy", 0.0), score["held_out_loss"]],
                                     args.keep_best):
                    export(acc, qwen, saver, folder / f"best-{run.step}")
            elif due:
                export(acc, qwen, saver, folder / f"best-{run.step}")
            write_record(acc, folder, record)
            bar.update()
            bar.set_postfix_str(status(record))
            if due or told or run.step % args.save_every == 0:
                best = set(run.best_steps) or {n_steps}
                saver.checkpoint(folder / f"step-{run.step}", take(qwen.model, optimizer, acc.process_index),
                                 asdict(run),
                                 after=lambda: prune(folder, args.keep, best))
            saver.check()
            if told and not due:
                raise KeyboardInterrupt


class Waiting:
    """An iterator that counts the seconds spent waiting for it."""

    def __init__(self, source: Iterator):
        self.source, self.seconds = source, 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> object:
        begun = time.perf_counter()
        item = next(self.source)
        self.seconds += time.perf_counter() - begun
        return item


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # Linux counts in KiB


def status(record: dict) -> str:
    text = (f"loss {record['loss']:.4f} acc {record['accuracy']:.3f} lr {record['lr']:.1e} {record['tokens_per_s']} tok/s "
            f"{record['images_per_s']} img/s, wait {record['data_wait']:.0%}, balance {record['balance']:.2f}, "
            f"{record['peak_gib']:.1f} GiB")
    return text + (f", MFU {record['mfu']:.1%}" if record["mfu"] else "")


def write_record(acc: Accelerator, folder: Path, record: dict) -> None:
    if acc.is_main_process:
        with disk_errors(folder / "log.jsonl"), open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    acc.log({name: value for name, value in record.items() if value is not None}, step=record["step"])


# ---------------------------------------------------------------------------------------------- the whole run
def prepare_rows(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Read the rows of all --data files; return (training rows, held-out rows), the latter drawn by --seed.
    """
    rows = []
    for path in args.data:
        its = read_rows(path, INPUT_FIELDS, limit=args.limit, hint="filter_data.py writes it")
        for row in its:
            check_own(f"{path}: id {row['id']!r}", row)
        rows += its
    if len({row["id"] for row in rows}) != len(rows):
        raise DataError(f"--data {' '.join(args.data)}: some ids stand in two files; expected unique ids")
    if not rows:
        raise DataError(f"--data {' '.join(args.data)}: no rows; expected at least one")
    if args.validation_rows >= len(rows):
        raise DataError(
            f"--validation_rows {args.validation_rows} of {len(rows)} rows leaves none to train on")
    random.Random(args.seed).shuffle(rows)
    return rows[args.validation_rows:], rows[:args.validation_rows]


def make_target(args: argparse.Namespace) -> Target:
    spec = spec_of(args.latent, args.latent_size) if args.imagination == "latent" else None
    return Target(args.imagination, args.image_root, spec, args.image_tokens, args.tokens_per_image,
                  args.system)


def make_model(acc: Accelerator, target: Target, recompute: str,
               args: argparse.Namespace) -> tuple[Qwen, Objective]:
    """Load, freeze, adapt and shard the model: on GPUs computed in bfloat16, on CPUs in float32, sharded over
    several."""
    on_gpu = acc.device.type == "cuda"
    # new rows of the embedding, adapters: the same on every rank, which keeps a piece of them
    torch.manual_seed(args.seed)
    qwen = load(args.model, dtype="bfloat16" if on_gpu else "float32", device=str(acc.device))
    if target.spec:
        add_tokens(qwen, target.spec.tokens)
    if args.lora_rank:
        add_adapters(qwen.model, args.lora_rank)
    visual = qwen.model.model.visual
    visual.requires_grad_(args.train_vision)
    if args.train_vision:
        visual.float()
    recompute_activations(qwen.model, recompute)
    objective = Objective(qwen, target.spec, args.align_loss, autocast=on_gpu and args.train_vision)
    if on_gpu or acc.num_processes > 1:
        shard(objective, qwen.model, low_precision=on_gpu)
    return qwen, objective.train()


def recompute_activations(model: torch.nn.Module, which: str) -> None:
    """Let the backward pass compute the activations of the "layers", or of the "mlps" or "none" of them,
    again.

    The MLPs hold most of them (in the 7B model 7 tenths) and, unlike whole layers, touch no cache. Of the
    language model alone: with checkpoints on the whole model a frozen tower would run twice, and backwards
    once.
    """
    def again(mlp: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return type(mlp).forward(mlp, hidden)
        return checkpoint(type(mlp).forward, mlp, hidden, use_reentrant=False)

    if which == "layers":
        model.model.language_model.activation_checkpointing_enable()
    if which == "mlps":
        for layer in model.model.language_model.layers:
            layer.mlp.forward = MethodType(again, layer.mlp)


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Freeze all weights and put LoRA beside the language model's linear layers; alpha is twice the rank,
    dropout 0.05."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # optional: only --lora_rank needs it
    except ImportError as error:
        raise DataError("--lora_rank needs the package peft (pip install peft)") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05,
                                       target_modules=ADAPTED), model)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of rows")
    parser.add_argument("--image_root", default=".", help="folder that image paths are relative to")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="checkpoint to start from")
    parser.add_argument("--output", required=True,
                        help="folder of the trained checkpoint; an existing one is an error")
    parser.add_argument("--imagination", choices=IMAGINATIONS, default="text", help="the target; see above")
    parser.add_argument("--latent", choices=sorted(PRESETS), default="mirage",
                        help="family of the latent tokens")
    parser.add_argument("--latent_size", type=parse_count, default=None,
                        help="latents an image (default: the family's)")
    parser.add_argument("--align_weight", type=float, default=10.0,
                        help="weight of the alignment beside a cross-entropy of weight 1 (Mirage stage 1: 1 beside 0.1; "
                             "its stage 2: 0)")
    parser.add_argument("--align_loss", choices=("cosine", "mse"), default="cosine",
                        help="Mirage: cosine; LVR: mse")
    parser.add_argument("--epochs", type=parse_count, default=4, help="passes over the rows")
    parser.add_argument("--max_steps", type=int, default=None,
                        help="optimizer steps in all (overrides --epochs)")
    parser.add_argument("--global_batch", type=parse_count, default=128,
                        help="rows an optimizer step, whatever the number of GPUs")
    parser.add_argument("--max_tokens", type=parse_count, default=8192,
                        help="tokens a forward pass on one device, visual ones "
                        "included: rows are packed up to it")
    parser.add_argument("--batch_size", type=parse_count, default=1,
                        help="--imagination latent: rows a forward pass, padded")
    parser.add_argument("--loss_norm", choices=("token", "row"), default="token",
                        help="the loss of a step is the mean over "
                        "its trained tokens, or over its rows (as one row a device and no packing has it)")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="after the warm-up")
    parser.add_argument("--warmup_steps", type=int, default=10, help="optimizer steps until it is reached")
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear",
                        help="after the warm-up")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--spike", type=float, default=2.0,
                        help="stop if the loss is this many nats above the median of the "
                        "last 50 steps; 0: never")
    parser.add_argument("--train_vision", action="store_true",
                        help="train the vision tower too (the paper freezes it)")
    parser.add_argument("--lora_rank", type=int, default=0,
                        help="train adapters of this rank instead of all weights (needs "
                        "peft; take --learning_rate 1e-4); they are merged into what is written")
    parser.add_argument("--recompute", choices=RECOMPUTED, default=None,
                        help="what of the language model computes its "
                        "activations again in the backward pass: mlps takes less time and more memory than layers (default: on "
                        "a GPU layers, with latents mlps; on a CPU none)")
    parser.add_argument("--image_tokens", type=int, default=2000,
                        help="visual tokens a row before images are scaled down")
    parser.add_argument("--tokens_per_image", type=int, default=1280,
                        help="then the most of one image (Monet)")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--validation_rows", type=int, default=0,
                        help="rows held out to choose the best checkpoint")
    parser.add_argument("--select", choices=("loss", "answers"), default="loss",
                        help="the best is that of the least held-out "
                        "loss, or of the most held-out answers that are generated right")
    parser.add_argument("--answer_tokens", type=int, default=512,
                        help="--select answers: tokens a reply at most")
    parser.add_argument("--eval_every", type=parse_count, default=50,
                        help="steps between looks at the held-out rows")
    parser.add_argument("--save_every", type=parse_count, default=250, help="steps between checkpoints")
    parser.add_argument("--keep", type=parse_count, default=2, help="checkpoints kept to resume from")
    parser.add_argument("--keep_best", type=parse_count, default=1,
                        help="exports kept of the best looks, in <output>.run/best-N")
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto",
                        help="go on from the last whole "
                        "checkpoint if there is one; must: an error if there is none; never: an error if there is one")
    parser.add_argument("--report_to", default="none",
                        help="also log to a tracker that accelerate knows: tensorboard, wandb")
    parser.add_argument("--num_workers", type=int, default=2,
                        help="processes that prepare batches; 0 for none")
    parser.add_argument("--seed", type=int, default=42, help="of the order of rows and of the rows held out")
    parser.add_argument("--limit", type=parse_count, default=None,
                        help="read only the first N rows of each file")
    parser.add_argument("--dry_run", action="store_true",
                        help="look at the rows, every image and the plan; train nothing")
    args = parser.parse_args(argv)
    if args.recompute == "layers" and args.imagination == "latent":
        parser.error(
            "--recompute layers does not go with --imagination latent, whose recurrence needs the cache; take mlps")
    if args.lora_rank and args.train_vision:
        parser.error("--lora_rank and --train_vision exclude each other")
    return args


def start_trackers(acc: Accelerator, args: argparse.Namespace) -> None:
    if args.report_to != "none":
        acc.init_trackers("train_sft", config={name: str(value) for name, value in vars(args).items()})
        if not acc.trackers:
            raise DataError(
                f"--report_to {args.report_to}: not installed, or no tracker that accelerate knows")


def finish(acc: Accelerator, plan: dict, run: Run, seconds: float, args: argparse.Namespace) -> None:
    """Move the best export to --output, and write what was measured beside it."""
    acc.wait_for_everyone()
    acc.end_training()
    if acc.is_main_process:
        output, folder = Path(args.output), Path(f"{args.output}.run")
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        best = run.best[0] if run.best else [None, None, run.step]
        metrics = {**plan, "loss": last["loss"], "align": last["align"], "best_held_out_loss": best[1],
                   "best_step": best[2],
                   "seconds": round(seconds, 1)}
        write_json(f"{output}.metrics.json", metrics)
        write_meta(output, args, args.data, seconds)
        os.replace(folder / f"best-{best[2]}", output)
        for path in steps_of(folder, "step").values():
            shutil.rmtree(path)
        print(json.dumps(metrics))


def main(argv: list[str] | None = None) -> int:
    args, begun = parse_args(argv), time.monotonic()
    output, folder = Path(args.output), Path(f"{args.output}.run")
    if output.exists():
        raise DataError(
            f"--output {output} exists; an existing checkpoint is never replaced, move it or name another")
    acc = Accelerator(cpu=not torch.cuda.is_available(), log_with=None if args.report_to == "none"
                      else args.report_to,
                      project_dir=str(folder))
    target, (train_rows, held_out_rows) = make_target(args), prepare_rows(args)
    tools = load_tools(args.model)
    if target.spec:
        add_tokens(tools, target.spec.tokens)
    limit = None if target.spec else args.max_tokens
    parts = [make_examples(tools, rows, target, limit) for rows in (train_rows, held_out_rows)]
    batching = Batching(args.seed, args.global_batch, args.max_tokens, args.batch_size, args.loss_norm,
                        args.train_vision,
                        args.num_workers)
    train, held_out = (Steps(tools, part, target, batching, acc.process_index, acc.num_processes) if part
                       else None
                       for part in parts)
    recompute = args.recompute or ("none" if acc.device.type != "cuda" else "mlps" if target.spec
                                   else "layers")
    plan = make_plan(train, len(held_out_rows), args)
    show_plan(train, plan, acc.device, recompute, CHUNK, args)
    if args.dry_run:
        return dry_run(train, held_out, plan, args)
    with alone(folder) if acc.is_main_process else nullcontext():
        with acc.main_process_first():
            settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
            found, run = open_run(folder, settings, args.resume, acc.is_main_process), Run()
        qwen, objective = make_model(acc, target, recompute, args)
        optimizer = make_optimizer(qwen.model, args)
        if found:
            restore(found[0], qwen.model, optimizer)
            run = Run(**found[1])
            log(f"resumed from {found[0]}")
        start_trackers(acc, args)
        for steps in (train, held_out):
            if steps:
                steps.qwen = qwen
        answers, saver = [row["answer"] for row in held_out_rows], Saver(acc.process_index, acc.num_processes)
        try:
            with stop_on_signals() as stop:
                fit(acc, qwen, objective, optimizer, train, held_out, answers, run, saver, stop, args)
            saver.close()
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"step {run.step + 1}: out of memory; a smaller --max_tokens or --batch_size, more devices, or "
                            f"--lora_rank: {error}") from error
        except KeyboardInterrupt:
            saver.close()  # the checkpoint of this step
            raise
        finally:
            saver.abandon()
        finish(acc, plan, run, time.monotonic() - begun, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
