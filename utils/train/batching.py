"""The rows of an optimizer step, as micro-batches on every device; their operations and memory."""
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

from utils.images import ImageError
from utils.jsonl import DataError
from utils.qwen import Qwen
from utils.train.examples import Example, Target, make_pack

# dense bfloat16 operations per second, from NVIDIA's data sheets
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}
WINDOW = 64  # patches that a patch of the vision tower sees in its windowed blocks: 112 / 14, squared
ADAMW = 16  # bytes per trained weight: float32 weight, gradient, two moments
HEAD = 14  # bytes per logit: as computed, in float32, softmax, gradients


# ---- the rows of a step
@dataclass(frozen=True)
class Batching:
    """How rows become steps: `global_batch` rows per step, `max_tokens` per pack."""

    seed: int = 42
    global_batch: int = 128
    max_tokens: int = 8192
    train_vision: str | None = None
    num_workers: int = 0


@dataclass
class Work:
    """The size of an optimizer step over all ranks; `balance` is their mean load over the largest."""

    micro_steps: int
    tokens: int
    trained_tokens: int
    segments: int
    images: int
    flops: float
    balance: float


class Steps(torch.utils.data.Dataset):
    """Item (s, k) is this rank's micro-batch k in optimizer step s; every rank has the same number of them.

    The rows of a step depend on (seed, step) alone: a run can resume on another number of ranks. `files`: the
    number of each example's file, whose weight times its rows is its share of an epoch."""

    def __init__(self, qwen: Qwen, examples: list[Example], target: Target, batching: Batching,
                 rank: int, world: int, files: list[int] | None = None, weights: list[float] = (1.0,)):
        self.qwen, self.examples, self.target, self.batching = qwen, examples, target, batching
        self.rank, self.world, self.weights = rank, world, weights
        self.files = [[i for i, file in enumerate(files or [0] * len(examples)) if file == n]
                      for n in range(len(weights))]
        self.per_epoch = math.ceil(len(self.order(0)) / batching.global_batch)

    @lru_cache(4)  # called for every micro-batch, and shuffling is slow for a hundred thousand rows
    def order(self, epoch: int) -> list[int]:
        seed = self.batching.seed
        order = [i for n, (rows, weight) in enumerate(zip(self.files, self.weights, strict=True))
                 for i in draw_rows(rows, weight, epoch, f"{seed}/{n}")]
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    @lru_cache(16)
    def plan(self, step: int) -> list[list[list[int]]]:
        """Return plan[k][rank], the rows of a micro-batch."""
        epoch, place = divmod(step, self.per_epoch)
        rows = self.order(epoch)[place * self.batching.global_batch:(place + 1) * self.batching.global_batch]
        lengths = [self.examples[i].n_tokens for i in rows]
        packs = plan_packs(lengths, self.batching.max_tokens, self.world)
        return [[[rows[i] for i in pack] for pack in micro_step] for micro_step in packs]

    def __getitem__(self, place: tuple[int, int]) -> dict | DataError:
        """Return a micro-batch, or the error of its images: raised in a worker, it would be a traceback."""
        try:
            return self.make(*place)
        except ImageError as error:
            return DataError(f"step {place[0] + 1}: {error}; restore the picture and run the same command "
                             "again, or leave its rows out in a new run (--skip_bad)")
        except DataError as error:
            return DataError(str(error))

    def make(self, step: int, k: int) -> dict:
        ranks = self.plan(step)[k]
        rows = ranks[self.rank]
        of_all = [self.examples[i] for rank_rows in ranks for i in rank_rows]
        # a rank without rows runs one with weight 0, so that all ranks run the same number of passes
        examples, weight = ([self.examples[i] for i in rows], 1.0) if rows else (of_all[:1], 0.0)
        n_segments = max(len(example.steps) for example in of_all)
        return make_pack(self.qwen, examples, self.target, weight, n_segments)

    def work(self, step: int) -> Work:
        plan = self.plan(step)
        rows = [self.examples[i] for ranks in plan for rank_rows in ranks for i in rank_rows]
        lengths, n_trained = [row.n_tokens for row in rows], sum(row.n_trained for row in rows)
        grids = [(1, *grid) for row in rows for grid in (*row.grids, *row.step_grids)]
        loads = [[sum(self.examples[i].n_tokens for i in rank_rows) for rank_rows in ranks] for ranks in plan]
        return Work(
            len(plan), sum(lengths), n_trained, segments=sum(len(row.steps) for row in rows),
            images=len(grids),
            flops=training_flops(self.qwen.config, lengths, n_trained, grids, self.batching.train_vision),
            balance=sum(lengths) / sum(self.world * max(rank_loads) for rank_loads in loads))

    def ahead(self, first: int, last: int) -> Iterator[dict]:
        places = ((step, k) for step in range(first, last) for k in range(len(self.plan(step))))
        workers = self.batching.num_workers
        for micro in torch.utils.data.DataLoader(
                self, batch_size=None, sampler=places, num_workers=workers,
                pin_memory=torch.cuda.is_available(), prefetch_factor=2 if workers else None,
                worker_init_fn=lambda _: torch.set_num_threads(1)):
            if isinstance(micro, DataError):
                raise micro
            yield micro


def describe_lengths(examples: list[Example]) -> dict[str, int]:
    lengths = sorted(example.n_tokens for example in examples)
    quantiles = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {**{name: lengths[math.ceil(q * len(lengths)) - 1] for name, q in quantiles.items()},
            "tokens": sum(lengths), "trained_tokens": sum(example.n_trained for example in examples),
            "images": sum(len(example.images) + len(example.steps) for example in examples)}


def draw_rows(rows: list[int], weight: float, epoch: int, seed: str) -> list[int]:
    """Return `weight` times the rows of a file, rounded, at least one: an epoch's piece of an endless deal
    that gives out every row once before any row again."""
    n = len(rows)
    if weight == 1 or not rows:
        return rows
    count, drawn = max(1, round(weight * n)), []
    for place in range(epoch * count, (epoch + 1) * count):
        if not drawn or place % n == 0:
            deal = random.Random(f"{seed}/{place // n}").sample(rows, n)
        drawn.append(deal[place % n])
    return drawn


def plan_packs(lengths: list[int], max_tokens: int, world: int) -> list[list[list[int]]]:
    """Return packs[k][rank], the indices of the rows that a rank runs in micro-step k; it may have none.

    Longest first, each row goes into the least loaded of world * K bins, with the smallest K that keeps bins
    within `max_tokens`. Bins of similar load share a micro-step.
    """
    if max(lengths) > max_tokens:
        raise ValueError(f"a row of {max(lengths)} tokens does not fit into {max_tokens}")
    n_steps = max(1, math.ceil(sum(lengths) / (world * max_tokens)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        loads, bins = [0] * (world * n_steps), [[] for _ in range(world * n_steps)]
        for i in order:
            least = min(range(len(bins)), key=loads.__getitem__)
            loads[least] += lengths[i]
            bins[least].append(i)
        if max(loads) <= max_tokens:
            by_load = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
            return [[sorted(bins[b]) for b in by_load[k:k + world]] for k in range(0, len(bins), world)]
        n_steps += 1


# ---- operations
def attention_widths(text) -> tuple[int, int]:
    """Return the numbers per token of all queries, and of all keys; a head need not be a share of the width.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads * head, text.num_key_value_heads * head


def training_flops(config, lengths: list[int], n_targets: int, grids: list[tuple[int, int, int]],
                   train_vision: str | None = None) -> float:
    """Return the operations of both passes over rows of `lengths` tokens with `n_targets` predictions; a
    multiplication and an addition are two. `grids` are (frames, rows, columns) of patches per image.

    Terms: weight matrices per token, attention within a row, head and last MLP at predictions alone, and the
    vision tower: Qwen2.5-VL's with windowed attention outside `fullatt_block_indexes`, Qwen3-VL's with two
    matrices in an MLP and a merger for every level that it hands on. Recomputed activations do not count, nor
    does the backward pass of frozen weights, but that through a frozen language model."""
    text, vision = config.text_config, config.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    q_width, kv_width = attention_widths(text)
    mlp = 3 * width * text.intermediate_size
    at_all = layers * (2 * width * q_width + 2 * width * kv_width + mlp) - mlp
    attention = layers * q_width * sum(2 * n * n for n in lengths)  # 4 n^2, half of it masked
    language = 2 * (at_all * sum(lengths) + (mlp + width * text.vocab_size) * n_targets) + attention
    patches = [t * h * w for t, h, w in grids]
    n, d = sum(patches), vision.hidden_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = d * vision.spatial_merge_size**2
    full = getattr(vision, "fullatt_block_indexes", None)  # Qwen2.5-VL's alone
    n_full = vision.depth if full is None else sum(block < vision.depth for block in full)
    block = 4 * d * d + (2 if full is None else 3) * d * vision.intermediate_size
    tower = (2 * n * (vision.depth * block + pixels * d)
             + 4 * d * n_full * sum(p * p for p in patches)
             + 4 * d * (vision.depth - n_full) * sum(p * min(p, WINDOW) for p in patches))
    merger = (2 * n // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size)
              * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))))
    return ((2.0 if train_vision == "merger_only" else 3.0) * language
            + (3.0 if train_vision == "all" else 1.0) * tower + (3.0 if train_vision else 1.0) * merger)


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


# ---- memory
def count_parameters(config) -> dict[str, int]:
    """Return the numbers of weights of the decoder's layers, the tower, its mergers and the rest (root)."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    visual, layers = model.model.visual, model.model.language_model.layers
    counts = {"layers": sum(p.numel() for p in layers.parameters()),
              "merger": sum(p.numel() for name, p in visual.named_parameters() if "merger" in name)}
    counts["tower"] = sum(p.numel() for p in visual.parameters()) - counts["merger"]
    return counts | {"root": sum(p.numel() for p in model.parameters()) - sum(counts.values())}


def estimate_memory(config, max_tokens: int, n_targets: int, world: int, sharded: bool, recompute: str,
                    train_vision: str | None = None, lora_rank: int = 0,
                    n_segments: int = 0) -> dict[str, float]:
    """Return the bytes that training takes on one of `world` devices, by purpose, and their "total".

    `sharded`: in bfloat16 (GPUs), else whole in float32 (a CPU). `n_targets`: predictions whose logits are
    held at once; `n_segments`: of latents in a row, which keep its keys and values twice more each.
    """
    text, counts = config.text_config, count_parameters(config)
    n_bytes = 2 if sharded else 4
    language = counts["layers"] + counts["root"]
    q, kv = attention_widths(text)
    adapted = 7 * text.hidden_size + 2 * q + 2 * kv + 3 * text.intermediate_size
    adapters = lora_rank * text.num_hidden_layers * adapted
    is_frozen = lora_rank or train_vision == "merger_only"
    weights = 4 * language + ADAMW * adapters if is_frozen else ADAMW * language
    # numbers that a layer's backward pass needs per token
    mlp, others = 4 * text.intermediate_size, 4 * text.hidden_size + 4 * q + 4 * kv
    kept = {"layers": text.hidden_size, "mlps": others, "none": others + mlp}[recompute] + 4 * kv * n_segments
    again = {"layers": others + mlp, "mlps": mlp, "none": 0}[recompute]  # one layer at a time
    # two layers at a time; the root group for the whole pass, with its gradients as computed and as reduced
    gathered = 2 * n_bytes * counts["layers"] / text.num_hidden_layers + counts["root"] * (2 * n_bytes + 4)
    parts = {"weights, gradients, optimizer": weights / (world if sharded else 1),
             "vision tower": counts["tower"] * (ADAMW if train_vision == "all" else n_bytes)
             + counts["merger"] * (ADAMW if train_vision else n_bytes),
             "gathered weights": sharded * gathered,
             "activations": n_bytes * max_tokens * (kept * text.num_hidden_layers + again),
             "logits": n_targets * text.vocab_size * HEAD}
    return parts | {"total": sum(parts.values())}


@contextmanager
def recompute_activations(model: torch.nn.Module, which: str) -> Iterator[None]:
    """Inside the block, have the backward pass recompute activations of "layers", "mlps" or "none".

    The MLPs hold 7 tenths in the 7B model. The last layer is kept: the backward pass begins with it.
    """
    def forward(module: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        return checkpoint(type(module).forward, module, *args, use_reentrant=False, **kwargs)

    layers = list(model.model.language_model.layers)
    modules = {"layers": layers[:-1], "mlps": [layer.mlp for layer in layers], "none": []}[which]
    for module in modules:
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def memory_lines(parts: dict[str, float], available: float, smaller: str) -> list[str]:
    """Return the estimate as text, with advice (`smaller`: on activations) if it does not fit."""
    lines = [f"  {name:<32}{size / 2**30:9.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'of the device':<32}{available / 2**30:9.2f} GiB")
    if parts["total"] <= 0.95 * available:
        return ["memory per device, estimated: fits", *lines]
    fixed = parts["total"] - parts["activations"]
    advice = smaller if fixed < 0.9 * available else "more devices, a smaller model, or --lora_rank 64"
    return [f"memory per device, estimated: DOES NOT FIT; use {advice}", *lines]


def device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
