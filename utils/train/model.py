"""The passes of training: objective, attention within packed rows, latents."""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from utils.latent_families import pool_features
from utils.qwen import Qwen, image_features, multiplied_patches

NAME = "packed_flash"  # with "flash" in the name the vision tower passes all windows in one call
CHUNK = 2048  # predictions whose logits are held at once: 2048 x 152,064 x 14 bytes are 4.4 GB


class Objective(torch.nn.Module):
    """Sums for the caller to divide by the counts of a step: the negative log-likelihood [n] of each trained
    token, whether it was the likeliest [n], and the alignment's sum."""

    def __init__(self, qwen: Qwen, align_loss: str = "cosine", autocast: bool = False):
        super().__init__()
        self.model, self.qwen, self.align_loss, self.autocast = qwen.model, qwen, align_loss, autocast

    def forward(self, pack: dict) -> tuple[Tensor, Tensor, Tensor]:
        autocast = torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext()
        with autocast, multiplied_patches(self.model, self.model.device.type):
            states = run_packed(self.model, pack)
            # every pass needs a gradient on every rank: else sharded layers would wait for each other
            aligned = 0.0 * states.float().sum()
            if len(pack["latents"]):
                aligned = aligned + align(self.qwen, pack, states[pack["latents"]], self.align_loss)
            return *self.predict(states[pack["predicting"]], pack["labels"]), aligned

    def predict(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and hits, CHUNK rows of logits at a time, recomputed in the backward pass."""
        def losses(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model.lm_head(hidden).float()
            return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels

        if len(labels) <= CHUNK:
            return losses(hidden, labels)
        parts = [checkpoint(losses, *part, use_reentrant=False)
                 for part in zip(hidden.split(CHUNK), labels.split(CHUNK))]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])


# ---- packed rows
class PassCache:
    """The keys and values of the passes so far, and which of them the tokens of pass `n` attend to.

    The library hands it on to every attention; the vision tower's has bounds of its own. `layers`: keys and
    values [1, heads, tokens, d] of every pass but the last one, by layer; a layer that the backward pass
    computes again finds what it found before. `previous`: that of the pass before. What precedes a
    segment of latents is selected once.
    """

    def __init__(self, passes: list[dict], n: int, layers: list[list[tuple[Tensor, Tensor]]],
                 previous: "PassCache | None"):
        self.part, self.n, self.layers, self.segment = passes[n], n, layers, None
        self.is_last = n + 1 == len(passes)
        if "keys" not in self.part:
            self.segment = previous.segment
        elif self.part["fed"] is not None:
            keys = self.part["keys"]  # [rows, P]
            self.segment = n, (keys < 0)[:, None], [
                [x.squeeze(0).unflatten(1, keys.shape) for x in select(of_layer, keys.flatten().clamp(min=0))]
                for of_layer in layers]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the output [1, tokens, heads, d] of a layer's attention; keep the keys and values."""
        part, kept = self.part, self.layers[layer]
        if len(kept) == self.n and not self.is_last:
            kept.append((key, value))
        passes = [*kept[:self.n], (key, value)]
        if self.segment:
            first, is_hidden, before = self.segment
            return attend_to_latents(query, *before[layer], is_hidden, passes[first:], scaling)
        if self.n:
            key, value = select(passes, part["keys"])
        return attend_in_rows(query, key, value, part["cu_seqlens_q"], part["cu_seqlens_k"],
                              part["max_length_q"], part["max_length_k"], scaling)


def select(passes: list[tuple[Tensor, Tensor]], index: Tensor) -> list[Tensor]:
    """Return the keys and the values [1, heads, n, d] at `index` [n] of those of all passes."""
    return [torch.cat(parts, dim=2).index_select(2, index) for parts in zip(*passes)]


def packed_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: None, scaling: float | None = None,
                     cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None,
                     pass_cache: PassCache | None = None, **kwargs) -> tuple[Tensor, None]:
    """Attend as a PassCache says or, in the vision tower, within the images or windows that `cu_seq_lens_q`
    [n + 1] bounds; [1, heads, L, d] to [1, L, heads, d]."""
    # under autocast the rotary embedding leaves float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if cu_seq_lens_q is None and pass_cache is not None:
        return pass_cache.attend(module.layer_idx, query, key, value, scaling), None
    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError("packed attention takes one sequence with a PassCache or with cu_seq_lens_q")
    return attend_in_rows(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
                          scaling, causal=False), None


def attend_in_rows(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor,
                   longest: int, longest_key: int, scaling: float | None, causal: bool = True) -> Tensor:
    """Attend within rows; the queries of a row, between `bounds` [n + 1], are the last of its keys."""
    if value.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # a torch without CUDA does not have it
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), bounds, key_bounds, longest,
                          longest_key, scale=scaling, window_size=(-1, 0) if causal else (-1, -1),
                          enable_gqa=True)
        return out[None]
    # [heads, L, d]; x[0] would cost a copy of its gradient
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    lengths, key_lengths, back = bounds.diff(), key_bounds.diff(), None
    # the vision tower's windows: group those of equal length
    if torch.equal(lengths, key_lengths) and len(lengths) > 2 * len(lengths.unique()):
        order = lengths.repeat_interleave(lengths).argsort(stable=True)
        back = order.argsort()
        query, key, value = (x.index_select(1, order) for x in (query, key, value))
        lengths = key_lengths = lengths.sort().values
    runs = [(*of_row, len(list(group)))
            for of_row, group in groupby(zip(lengths.tolist(), key_lengths.tolist()))]
    pieces = (query.split([q * n for q, _, n in runs], dim=1),
              *(x.split([k * n for _, k, n in runs], dim=1) for x in (key, value)))
    rows = []
    for (q, k, n), *parts in zip(runs, *pieces):
        # [n, heads, length, d]: one call for n rows
        parts = [x.unflatten(1, (n, -1)).transpose(0, 1) for x in parts]
        mask = torch.ones(q, k, dtype=torch.bool).tril(k - q) if q < k else None
        out = F.scaled_dot_product_attention(*parts, mask, scale=scaling, is_causal=causal and q == k,
                                             enable_gqa=True)
        rows.append(out.transpose(1, 2).flatten(0, 1))  # [n * q, heads, d]
    out = torch.cat(rows)
    return (out if back is None else out[back])[None]


def attend_to_latents(query: Tensor, keys: Tensor, values: Tensor, is_hidden: Tensor,
                      latents: list[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """Attend from a latent of every row, query [1, heads, rows, d], to what is before its segment, keys and
    values [heads, rows, P, d] except where `is_hidden` [rows, 1, P], and to the segment up to itself.

    Joining the keys would copy them for every latent.
    """
    near_keys, near_values = (torch.stack(parts, dim=3).squeeze(0) for parts in zip(*latents))
    query = query.squeeze(0).unflatten(0, (len(keys), -1)).transpose(1, 2) * scaling  # [.., group, d]
    far = (query @ keys.mT).masked_fill(is_hidden, float("-inf"))
    weights = torch.cat([far, query @ near_keys.mT], dim=-1).softmax(-1, torch.float32).to(values.dtype)
    far, near = weights.split([keys.shape[2], len(latents)], dim=-1)
    return (far @ values + near @ near_values).transpose(0, 1).flatten(1, 2)[None]


def run_packed(model: torch.nn.Module, pack: dict) -> Tensor:
    """Return the last hidden states [n, hidden] that the passes of a pack keep.

    To be called, and its gradients taken, inside `use_packed_attention`. Exact are explicit bounds of rows in
    an attention function that has no other mask, positions from 0 in every row, and no cache. Six other
    plausible combinations let rows attend to each other: the loss moves by 0.4 %, the gradients are wrong.
    """
    if model.config.text_config._attn_implementation != NAME:
        raise RuntimeError("a pack outside use_packed_attention: its rows would attend to each other")
    inputs = {name: pack[name] for name in ("pixel_values", "image_grid_thw") if name in pack}
    layers, states, cache = [[] for _ in model.model.language_model.layers], [], None
    for n, part in enumerate(pack["passes"]):
        cache = PassCache(pack["passes"], n, layers, cache)
        if part["fed"] is None:
            inputs["input_ids"] = pack["input_ids"][:, part["tokens"]]
        else:
            inputs["inputs_embeds"] = states[-1][None, part["fed"]]
        with last_layer_at(model, part["kept"]):
            out = model.model(position_ids=pack["position_ids"][:, :, part["tokens"]], use_cache=False,
                              pass_cache=cache, **inputs)
        states.append(out.last_hidden_state[0])
        inputs = {}  # all images are in the first pass
    return torch.cat(states)


@contextmanager
def last_layer_at(model: torch.nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the block, have the last decoder layer compute only `positions` [n] after its attention."""
    layer = model.model.language_model.layers[-1]

    def forward(hidden: Tensor, **kwargs) -> Tensor:
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


def align(qwen: Qwen, pack: dict, latents: Tensor, loss: str) -> Tensor:
    """Return the sum over segments of the mean distance ("cosine" or "mse") from their latents [segments, K,
    hidden] to the image's pooled features."""
    with torch.no_grad():
        features = image_features(qwen, {"pixel_values": pack["step_pixel_values"],
                                         "image_grid_thw": pack["step_image_grid_thw"]})
    pooled = torch.stack([pool_features(feature, latents.shape[1]) for feature in features]).float()
    states = latents.float()
    distance = (1 - F.cosine_similarity(states, pooled, dim=-1) if loss == "cosine"
                else (states - pooled).square().mean(-1))
    return distance.mean(1).sum() * pack["weight"]
