"""Several rows in one sequence, without a leak between them: the plan of a step's packs, and attention within rows.

Six plausible keyword combinations for packing Qwen2.5-VL let rows attend to each other while the loss moves by 0.4 %; the
gradients are then wrong by 100 % (tests/test_packing.py compares gradients). What is exact: explicit cu_seqlens, an attention
function that knows no other mask, positions made row by row, no cache.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "packed_flash"  # with "flash" in it the vision tower hands over all its windows in one call


def plan_packs(lengths: list[int], max_tokens: int, world: int) -> list[list[list[int]]]:
    """Return packs[k][rank], the indices of the rows that a rank runs in its kth micro-step; every rank has as many.

    A pure function of its arguments, so that all ranks make the same plan without a word. Longest rows first into the
    least loaded of world * K bins, K as small as `max_tokens` a bin allows; like loads meet in one micro-step. A bin may
    be empty. ValueError for a row longer than `max_tokens`.
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


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: None, scaling: float | None = None, cu_seq_lens_q: torch.Tensor | None = None,
                     max_length_q: int | None = None, is_causal: bool | None = None, **kwargs
                     ) -> tuple[torch.Tensor, None]:
    """Attend within the rows that `cu_seq_lens_q` [n + 1] bounds; [1, heads, L, d] to [1, L, heads, d].

    On CUDA one call of torch's own variable-length kernel, on the CPU a loop over the rows.
    """
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError("packed attention takes one sequence with cu_seq_lens_q and without attention_mask")
    causal = module.is_causal if is_causal is None else is_causal
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding leaves float32
    if value.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # here: there is none in a torch without CUDA
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), cu_seq_lens_q, cu_seq_lens_q, max_length_q,
                          max_length_q, scale=scaling, window_size=(-1, 0) if causal else (-1, -1), enable_gqa=True)
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = [F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=causal, enable_gqa=True)
            for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)))]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def run_packed(model: torch.nn.Module, pack: dict, images: dict) -> torch.Tensor:
    """Return the logits [n, vocabulary] at the positions of a pack that predict (`keep`); never those of all positions.

    To be called, and its gradients taken, inside `use_packed_attention`.
    """
    if model.config.text_config._attn_implementation != NAME:
        raise RuntimeError("a pack outside of use_packed_attention: its rows would attend to each other")
    bounds, longest = pack["cu_seqlens"], pack["max_length"]
    return model(input_ids=pack["input_ids"], position_ids=pack["position_ids"], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
                 max_length_q=longest, max_length_k=longest, logits_to_keep=pack["keep"], use_cache=False, **images).logits


@contextmanager
def use_packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let `model` use `packed_attention` inside the block: it is set on the configurations, nothing is patched.

    No mask is built for an attention of this name, so that every call must bring cu_seq_lens_q.
    """
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
