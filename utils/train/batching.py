"""How many floating-point operations a training step of Qwen2.5-VL needs, and what a device can do at best.

Model operations: a multiplication and an addition are two; activations computed a second time do not count,
nor does a frozen tower's backward pass, nor what no prediction depends on: in the last layer, the MLP at
positions that predict nothing. MFU = model operations / (seconds x devices x peak).

The rows of an optimizer step: which they are, how they lie in micro-batches on the devices, and what work
that is.

Before a run spends eight GPUs: how much memory it takes, how long it takes, how long its rows are, are its
images whole.

Estimates, from the configuration alone; the arithmetic is that of the usual count for AdamW with float32
master weights.
"""
import argparse
import json
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from utils.cli import log
from utils.images import ImageError, open_image
from utils.jsonl import replace_file
from utils.plots import BLUE, VERMILION, new_figure
from utils.qwen import Qwen
from utils.train.examples import Example, Target, marked
from utils.train.latent_batches import make_batch
from utils.train.packing import make_pack, plan_packs

# dense bfloat16 a second, NVIDIA's data sheets
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}
WINDOW = 64  # patches that a patch of the vision tower sees in its windowed blocks: 112 / 14, squared


def training_flops(config, lengths: list[int], n_targets: int, grids: list[tuple[int, int, int]],
                   train_vision: bool = False) -> float:
    """Return the operations of forward and backward passes over rows of `lengths` tokens, with `n_targets`
    predictions.

    `config` is the model's; `grids` are (frames, rows, columns) of patches of every image. The terms are
    those of the usual count: matrices a token, attention within a row (half of it is masked), the head at
    predictions and the last layer's MLP at predictions alone, and the tower with full attention in
    `fullatt_block_indexes` and windows elsewhere.
    """
    text, vision = config.text_config, config.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    kv_width = text.num_key_value_heads * (width // text.num_attention_heads)
    matrices = layers * (2 * width * width + 2 * width * kv_width + 3 * width * text.intermediate_size)
    attention = layers * width * sum(2 * n * n for n in lengths)  # 4 n^2, half of it masked
    at_all = matrices - 3 * width * text.intermediate_size
    at_targets = width * (3 * text.intermediate_size + text.vocab_size)
    language = 2 * (at_all * sum(lengths) + at_targets * n_targets) + attention
    patches = [t * h * w for t, h, w in grids]
    n, d = sum(patches), vision.hidden_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = d * vision.spatial_merge_size**2
    n_full = sum(block < vision.depth for block in vision.fullatt_block_indexes)
    tower = (2 * n * (vision.depth * (4 * d * d + 3 * d * vision.intermediate_size) + pixels * d)
             + 4 * d * n_full * sum(p * p for p in patches)
             + 4 * d * (vision.depth - n_full) * sum(p * min(p, WINDOW) for p in patches)
             + 2 * n // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size))
    return 3.0 * language + (3.0 if train_vision else 1.0) * tower


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 operations a second of a device by its name, or None for one not in PEAKS."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


# ------------------------------------------------------------ steps


@dataclass(frozen=True)
class Batching:
    """The flags of train_sft.py that decide how rows become steps; `global_batch` rows a step, `max_tokens` a
    pack, `batch_size` rows a padded batch of latents, `loss_norm` "token" or "row"."""

    seed: int = 42
    global_batch: int = 128
    max_tokens: int = 8192
    batch_size: int = 1
    loss_norm: str = "token"
    train_vision: bool = False
    num_workers: int = 0


@dataclass
class Work:
    """What one optimizer step is, on all ranks together: known from the plan, so that nobody needs to ask.

    `norm` divides the summed loss: trained tokens, or rows with loss_norm "row". `balance` is the share of
    the devices' time that is not spent waiting for the slowest rank, by tokens.
    """

    micro_steps: int
    tokens: int
    trained_tokens: int
    norm: float
    segments: int
    images: int
    flops: float
    balance: float


class Steps(torch.utils.data.Dataset):
    """Item (s, k) is the kth micro-batch of this rank in optimizer step s; every rank has as many.

    The rows of a step are a pure function of (seed, step), whatever the number of ranks: that is what
    resuming needs. Rows are packed up to `max_tokens`; with latents, whose recurrence wants columns in
    common, they are padded, `batch_size` at a time.
    """

    def __init__(self, qwen: Qwen, examples: list[Example], target: Target, batching: Batching, rank: int,
                 world: int):
        self.qwen, self.examples, self.target, self.batching = qwen, examples, target, batching
        self.rank, self.world = rank, world
        self.per_epoch = math.ceil(len(examples) / batching.global_batch)

    # asked for at every micro-batch: to shuffle a hundred thousand rows takes longer than to read one
    @lru_cache(4)
    def order(self, epoch: int) -> list[int]:
        """Return all rows in the order of an epoch."""
        order = list(range(len(self.examples)))
        random.Random(f"{self.batching.seed}/{epoch}").shuffle(order)
        return order

    @lru_cache(16)
    def plan(self, step: int) -> list[list[list[int]]]:
        """Return plan[k][rank], the rows of a micro-batch; a rank may have none."""
        epoch, place = divmod(step, self.per_epoch)
        rows = self.order(epoch)[place * self.batching.global_batch:(place + 1) * self.batching.global_batch]
        if not self.target.spec:
            packs = plan_packs([self.examples[i].n_tokens for i in rows], self.batching.max_tokens,
                               self.world)
            return [[[rows[i] for i in pack] for pack in packs_k] for packs_k in packs]
        # like rows together: less padding
        rows.sort(key=lambda i: (len(self.examples[i].steps), self.examples[i].n_tokens))
        size = self.batching.batch_size * self.world
        return [[rows[k:k + size][rank::self.world] for rank in range(self.world)]
                for k in range(0, len(rows), size)]

    def __getitem__(self, place: tuple[int, int]) -> dict:
        ranks = self.plan(place[0])[place[1]]
        rows, examples = ranks[self.rank], self.examples
        # a rank without rows computes one that does not count, so that all ranks do as many
        mine = [examples[i] for i in rows] or [examples[next(i for its in ranks for i in its)]]
        weights = [self.weight(example) if rows else 0.0 for example in mine]
        if not self.target.spec:
            return make_pack(self.qwen, mine, weights, self.target)
        n_blocks = 1 + max(len(examples[i].steps) for its in ranks for i in its)
        return make_batch(self.qwen, mine, weights, self.target, n_blocks)

    def weight(self, example: Example) -> float:
        """The weight of each trained token of a row."""
        return 1.0 if self.batching.loss_norm == "token" else 1.0 / example.n_trained

    def work(self, step: int) -> Work:
        plan = self.plan(step)
        rows = [self.examples[i] for ranks in plan for its in ranks for i in its]
        lengths, grids = [e.n_tokens for e in rows], [(1, *grid) for e in rows for grid in (*e.grids,
                                                                                            *e.step_grids)]
        n_trained = sum(e.n_trained for e in rows)
        loads = [[sum(self.examples[i].n_tokens for i in its) for its in ranks] for ranks in plan]
        return Work(len(plan), sum(lengths), n_trained, sum(self.weight(e) * e.n_trained for e in rows),
                    sum(len(e.steps) for e in rows), len(grids),
                    training_flops(self.qwen.config, lengths, n_trained, grids, self.batching.train_vision),
                    sum(lengths) / sum(self.world * max(ranks) for ranks in loads))

    def ahead(self, first: int, last: int) -> Iterator[dict]:
        """Return an iterator over all micro-batches of steps first to last - 1, made by `num_workers`
        processes."""
        places = ((step, k) for step in range(first, last) for k in range(len(self.plan(step))))
        workers = self.batching.num_workers
        return iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=places, num_workers=workers, pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if workers else None, worker_init_fn=lambda _: torch.set_num_threads(1)))


# ------------------------------------------------------------ preview


ADAMW = 16  # bytes a trained weight: float32 weight, gradient, two moments
RECOMPUTED = ("layers", "mlps", "none")  # what of the language model may have its activations computed again
HEAD = 14  # bytes a logit: as computed, in float32, softmax, gradients
MFU = 0.4  # share of the peak that an estimate of hours supposes; the log has the run's own


def count_parameters(config) -> dict[str, int]:
    """Return the numbers of weights of the language model's layers, of embedding + norm + head, and of the
    vision tower."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts = {"layers": sum(p.numel() for p in model.model.language_model.layers.parameters()),
              "tower": sum(p.numel() for p in model.model.visual.parameters())}
    return counts | {"root": sum(p.numel() for p in model.parameters()) - sum(counts.values())}


def estimate_memory(config, max_tokens: int, n_targets: int, world: int, sharded: bool, recompute: str,
                    train_vision: bool = False, lora_rank: int = 0) -> dict[str, float]:
    """Return the bytes that training takes on one of `world` devices, by what they are for, and "total".

    `sharded`: computed in bfloat16 and sharded over the devices (a GPU run); else float32 and whole (a CPU).
    `n_targets`: predictions in a pack of `max_tokens` tokens, of which the head computes as many at a time as
    it may. `recompute`: which of RECOMPUTED has its activations computed again.
    """
    text, counts = config.text_config, count_parameters(config)
    wide = 2 if sharded else 4
    language, share = counts["layers"] + counts["root"], world if sharded else 1
    kv = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    adapters = lora_rank * text.num_hidden_layers * (9 * text.hidden_size + 2 * kv + 3
                                                     * text.intermediate_size)
    weights = 4 * language + ADAMW * adapters if lora_rank else ADAMW * language
    # numbers that a layer's backward needs, a token
    mlp, others = 4 * text.intermediate_size, 8 * text.hidden_size + 4 * kv
    kept = {"layers": text.hidden_size, "mlps": others, "none": others + mlp}[recompute]
    again = {"layers": others + mlp, "mlps": mlp, "none": 0}[recompute]  # a layer at a time
    parts = {"weights, gradients, optimizer": weights / share,
             "vision tower": counts["tower"] * (ADAMW if train_vision else wide),
             # two layers at a time, the root group for the whole pass, its gradients as computed and as
             # reduced
             "gathered weights": sharded * (2 * wide * counts["layers"] / text.num_hidden_layers
                                            + counts["root"] * (2 * wide + 4)),
             "activations": wide * max_tokens * (kept * text.num_hidden_layers + again),
             "logits": n_targets * text.vocab_size * HEAD}
    return parts | {"total": sum(parts.values())}


def memory_lines(parts: dict[str, float], available: float, smaller: str) -> list[str]:
    """Return the estimate as lines for people; if it does not fit into `available` bytes, with what to
    change: `smaller` says what helps where activations are too many."""
    lines = [f"  {name:<32}{size / 2**30:9.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'of the device':<32}{available / 2**30:9.2f} GiB")
    if parts["total"] <= 0.95 * available:
        return ["memory a device, estimated: fits", *lines]
    fixed = parts["total"] - parts["activations"]
    advice = smaller if fixed < 0.9 * available else "more devices, a smaller model, or --lora_rank 64"
    return [f"memory a device, estimated: DOES NOT FIT; take {advice}", *lines]


def device_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory (of the machine's, for a CPU)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


def estimate_hours(flops: float) -> dict[str, float]:
    """Return the hours that `flops` model operations take on eight of each known device, at MFU of its peak.
    """
    return {name: round(flops / (peak * MFU * 8) / 3600, 2) for name, peak in PEAKS.items()}


def check_files(examples: list[Example]) -> list[str]:
    """Open every image of all rows, whole; return what is wrong, a line an image."""
    paths = sorted({path for example in examples for path in (*example.images, *example.steps)})

    def fault(path: Path) -> str | None:
        try:
            open_image(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        return [found for found in tqdm(threads.map(fault, paths), total=len(paths), desc="images",
                                        unit="image") if found]


def describe_lengths(examples: list[Example]) -> dict[str, int]:
    """Return quantiles of the rows' lengths, and the sums of tokens."""
    lengths = sorted(example.n_tokens for example in examples)
    quantiles = {name: lengths[math.ceil(q * len(lengths)) - 1] for name,
                 q in (("median", 0.5), ("p95", 0.95), ("max", 1.0))}
    return quantiles | {"tokens": sum(lengths), "trained_tokens": sum(example.n_trained
                                                                      for example in examples),
                        "images": sum(len(e.images) + len(e.steps) for e in examples)}


def draw_lengths(examples: list[Example], max_tokens: int, path: str) -> None:
    """Write a histogram of the rows' lengths, all tokens and trained ones, as a PNG."""
    figure, [both] = new_figure(7, 3.2, 1, 2)
    lengths, stats = [example.n_tokens for example in examples], describe_lengths(examples)
    for axes, values, title in zip(both, (lengths, [example.n_trained for example in examples]),
                                   ("all tokens of a row", "trained tokens of a row")):
        axes.hist(values, bins=40, range=(0, 1.05 * max(values)), color=BLUE)
        axes.set(xlabel=title, ylabel="rows")
    both[0].axvline(stats["p95"], color=VERMILION, linestyle="--")
    figure.suptitle(
        f"{len(lengths)} rows: 95 % have at most {stats['p95']} tokens (dashed), the longest {stats['max']}; "
                    f"--max_tokens {max_tokens}", fontsize=10)
    replace_file(path, partial(figure.savefig, format="png", dpi=150), "wb")


def make_plan(train: Steps, n_held_out: int, args: argparse.Namespace) -> dict:
    """Return what a run will do, from its first epoch: steps, lengths, balance, operations."""
    first = [train.work(step) for step in range(train.per_epoch)]
    n_steps = args.max_steps or args.epochs * train.per_epoch
    flops = sum(work.flops for work in first) / len(first) * n_steps
    lengths = describe_lengths(train.examples)
    return {"imagination": args.imagination, "rows": len(train.examples), "held_out_rows": n_held_out,
            "steps": n_steps,
            "global_batch": args.global_batch, "processes": train.world, **lengths,
            "trained_tokens_per_row": round(lengths["trained_tokens"] / len(train.examples), 1),
            "micro_steps_per_step": round(sum(work.micro_steps for work in first) / len(first), 2),
            "balance": round(sum(work.balance for work in first) / len(first), 4),
            "petaflop": round(flops / 1e15, 6)}


def show_plan(train: Steps, plan: dict, device: torch.device, recompute: str, chunk: int,
              args: argparse.Namespace) -> None:
    """Log the first rows, the plan, and the memory that a device needs before any weight is loaded."""
    for example in train.examples[:3 if args.dry_run else 1]:
        log(f"{example.id}:\n{marked(train.qwen, example)}")
    log(" | ".join(f"{key} {value}" for key, value in plan.items()))
    longest = args.batch_size * plan["max"] if train.target.spec else args.max_tokens
    n_targets = min(chunk, longest * plan["trained_tokens"] // plan["tokens"] + 1)
    parts = estimate_memory(train.qwen.config, longest, n_targets, train.world, device.type == "cuda",
                            recompute,
                            args.train_vision, args.lora_rank)
    smaller = (f"a smaller --batch_size than {args.batch_size} or --recompute mlps" if train.target.spec
               else f"a smaller --max_tokens than {args.max_tokens} or --recompute layers")
    log("\n".join(memory_lines(parts, device_memory(device), smaller)))


def dry_run(train: Steps, held_out: Steps | None, plan: dict, args: argparse.Namespace) -> int:
    """Look at every image and draw the lengths; return 0, or 2 if an image is not whole."""
    picture = f"{args.output}.lengths.png"
    draw_lengths(train.examples, args.max_tokens, picture)
    faults = check_files(train.examples + (held_out.examples if held_out else []))
    hours = estimate_hours(plan["petaflop"] * 1e15)
    log(f"hours on 8 devices at 40 % of their peak, estimated: {hours} | lengths: {picture} | images that cannot be read: "
        f"{len(faults)}" + "".join(f"\n  {fault}" for fault in faults[:20]))
    print(json.dumps({**plan, "hours": hours, "unreadable_images": len(faults)}))
    return 2 if faults else 0
