"""Several rows in one sequence that do not see each other: a step's packs, and attention within rows.

Six plausible keyword combinations for packing Qwen2.5-VL let rows attend to each other: the loss moves by
0.4 %, the gradients are wrong by 100 %. Exact are: explicit cu_seqlens, an attention function without any
other mask, positions made row by row, no cache.
"""
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from utils.jsonl import DataError
from utils.patches import THREADS, process_images
from utils.qwen import Qwen, collate, multiplied_patches
from utils.train.examples import Example, Target, load_images

NAME = "packed_flash"  # with "flash" in the name the vision tower passes all windows in one call


def plan_packs(lengths: list[int], max_tokens: int, world: int) -> list[list[list[int]]]:
    """Return packs[k][rank], the indices of the rows that a rank runs in micro-step k.

    Longest first, each row goes into the least loaded of world * K bins, with the smallest K that keeps bins
    within `max_tokens`. Bins of similar load share a micro-step; a bin may be empty.
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


def make_pack(qwen: Qwen, examples: list[Example], target: Target, weight: float = 1.0) -> dict:
    """Concatenate rows into one sequence of L tokens.

    Returns input_ids [1, L], position_ids [3, 1, L] (from 0 in every row), pixel_values and image_grid_thw,
    cu_seqlens int32 [rows + 1], max_length, logit_positions [n] (where trained tokens are predicted), labels
    [n], row [n] (of each label), row_ids, and `weight` (0: does not count).
    """
    with ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(lambda example: load_images(example.images, target, qwen.factor), examples))
    # one call: calling the image processor costs more than processing one image
    pixels = process_images(qwen.image_processor, [image for row in images for image in row]) or {}
    grids = pixels["image_grid_thw"].split([len(row) for row in images]) if pixels else [()] * len(images)
    rows = []
    for example, grid in zip(examples, grids):
        rows.append(collate(qwen, [example.ids], [{"image_grid_thw": grid} if len(grid) else None]))
        n_tokens = rows[-1]["input_ids"].shape[1]
        if n_tokens != example.n_tokens:
            raise DataError(f"{example.id}: {n_tokens} tokens, expected {example.n_tokens} from its images' "
                            "headers; was an image changed during the run?")
    pack = {name: torch.cat([row[name] for row in rows], dim=-1) for name in ("input_ids", "position_ids")}
    pack |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw") if name in pixels}
    ends = torch.tensor([example.n_tokens for example in examples]).cumsum(0)
    # counted from the end of a row, as images before the trained tokens are expanded
    places = [end + torch.tensor(example.trained).nonzero().flatten() - len(example.trained)
              for example, end in zip(examples, ends)]
    counts, places = torch.tensor([len(of_row) for of_row in places]), torch.cat(places)
    return pack | {"cu_seqlens": torch.cat([torch.zeros(1), ends]).int(),
                   "max_length": max(example.n_tokens for example in examples),
                   "logit_positions": places - 1, "labels": pack["input_ids"][0, places],
                   "row": torch.arange(len(examples)).repeat_interleave(counts),
                   "row_ids": [example.id for example in examples], "weight": weight}


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: None, scaling: float | None = None,
                     cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None,
                     is_causal: bool | None = None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attend within the rows bounded by `cu_seq_lens_q` [n + 1]; [1, heads, L, d] to [1, L, heads, d].

    On the CPU a loop over runs of rows of equal length.
    """
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError("packed attention takes one sequence with cu_seq_lens_q and without attention_mask")
    causal = module.is_causal if is_causal is None else is_causal
    # under autocast the rotary embedding leaves float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if value.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # a torch without CUDA does not have it
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), cu_seq_lens_q, cu_seq_lens_q,
                          max_length_q, max_length_q, scale=scaling,
                          window_size=(-1, 0) if causal else (-1, -1), enable_gqa=True)
        return out[None], None
    # [heads, L, d]; x[0] would cost a copy of its gradient
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    lengths, back = cu_seq_lens_q.diff(), None
    if len(lengths) > 2 * len(lengths.unique()):  # the vision tower's windows: group those of equal length
        order, back = by_length(cu_seq_lens_q)
        query, key, value = (x.index_select(1, order) for x in (query, key, value))
        lengths = lengths.sort().values
    runs = [(length, len(list(group))) for length, group in groupby(lengths.tolist())]
    pieces = [x.split([length * n for length, n in runs], dim=1) for x in (query, key, value)]
    rows = []
    for (length, n), *parts in zip(runs, *pieces):
        # [n, heads, length, d]: one call for n rows
        parts = [x.unflatten(1, (n, length)).transpose(0, 1) for x in parts]
        out = F.scaled_dot_product_attention(*parts, scale=scaling, is_causal=causal, enable_gqa=True)
        rows.append(out.transpose(1, 2).flatten(0, 1))  # [n * length, heads, d]
    out = torch.cat(rows)
    return (out if back is None else out[back])[None], None


def by_length(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order [L] that sorts the rows in `bounds` [n + 1] by length, and its inverse."""
    lengths, rows = bounds.diff().sort(stable=True)
    shifts = bounds[:-1][rows] - (lengths.cumsum(0) - lengths)
    order = torch.arange(int(bounds[-1])) + shifts.repeat_interleave(lengths)
    return order, order.argsort()


def run_packed(model: torch.nn.Module, pack: dict) -> torch.Tensor:
    """Return the last hidden states [n, hidden] of a pack at its logit positions.

    To be called, and its gradients taken, inside `use_packed_attention`.
    """
    if model.config.text_config._attn_implementation != NAME:
        raise RuntimeError("a pack outside use_packed_attention: its rows would attend to each other")
    images = {name: pack[name] for name in ("pixel_values", "image_grid_thw") if name in pack}
    bounds, longest = pack["cu_seqlens"], pack["max_length"]
    with last_layer_at(model, pack["logit_positions"]), multiplied_patches(model):
        out = model.model(input_ids=pack["input_ids"], position_ids=pack["position_ids"],
                          cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest,
                          max_length_k=longest, use_cache=False, **images)
    return out.last_hidden_state[0]


@contextmanager
def last_layer_at(model: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inside the block, have the last decoder layer compute only `positions` [n] after its attention: in
    visual CoT a seventh of all.
    """
    layer = model.model.language_model.layers[-1]

    def forward(hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
        hidden = (hidden + attended).index_select(1, positions)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def use_packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, have `model` use `packed_attention`, for which the library builds no mask."""
    AttentionInterface.register(NAME, packed_attention)
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
