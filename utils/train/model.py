"""The model in training: objective, attention within packed rows, latent recurrence, adapters, sharding.

Sharding is torch's `fully_shard` (FSDP2): accelerate's plugin does not run on CPU ranks and rounds the loss
to bfloat16. Every decoder layer is sharded; embedding, last norm and head are one root group, gathered once
per pass. The vision tower is replicated, so that a rank without images does not wait.
"""
import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from utils.jsonl import DataError
from utils.latent_families import LatentSpec, pool_features
from utils.qwen import Qwen, image_features, load, multiplied_patches
from utils.train.examples import Target, add_tokens

NAME = "packed_flash"  # with "flash" in the name the vision tower passes all windows in one call
CHUNK = 2048  # predictions whose logits are held at once: 2048 x 152,064 x 14 bytes are 4.4 GB
# the linear layers of the language model, not those of the vision tower
ADAPTED = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Objective(torch.nn.Module):
    """Sums for the caller to divide by the counts of a step: the negative log-likelihood [n] of each trained
    token, whether it was the likeliest [n], and the alignment's sum."""

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, align_loss: str = "cosine",
                 autocast: bool = False):
        super().__init__()
        self.model, self.qwen, self.spec = qwen.model, qwen, spec
        self.align_loss, self.autocast = align_loss, autocast

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            if self.spec is None:
                hidden = run_packed(self.model, batch)
                aligned = torch.zeros((), device=batch["labels"].device)
            else:
                states, latents = run_latents(self.model, batch, self.spec)
                hidden = states.flatten(0, 1)[batch["logit_positions"]]
                aligned = align(self.qwen, batch, latents, self.align_loss) if batch["latents"] else 0.0
                # every pass needs a gradient on every rank: else sharded layers would wait for each other
                aligned = aligned + 0.0 * states.float().sum()
            return *self.predict(hidden, batch["labels"]), aligned

    def predict(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and hits, CHUNK rows of logits at a time, recomputed in the backward pass."""
        def losses(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.model.lm_head(hidden).float()
            return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels

        if len(labels) <= CHUNK:
            return losses(hidden, labels)
        parts = [checkpoint(losses, *part, use_reentrant=False)
                 for part in zip(hidden.split(CHUNK), labels.split(CHUNK))]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])


# ---- packed rows
def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: None, scaling: float | None = None,
                     cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None,
                     is_causal: bool | None = None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attend within the rows bounded by `cu_seq_lens_q` [n + 1]; [1, heads, L, d] to [1, L, heads, d]."""
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

    To be called, and its gradients taken, inside `use_packed_attention`. Exact are explicit cu_seqlens with
    an attention function that has no other mask, positions from 0 in every row, and no cache. Six other
    plausible combinations let rows attend to each other: the loss moves by 0.4 %, the gradients are wrong.
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
    """Inside the block, have the last decoder layer compute only `positions` [n] after its attention."""
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


# ---- rows with latents
def run_latents(model: torch.nn.Module, batch: dict,
                spec: LatentSpec) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Run text blocks and latent steps in turn; return the states [B, L, hidden] and the K latents
    [B, hidden] of each segment."""
    states, latents, past = [], [], None

    def step(start: int, end: int, **inputs) -> torch.Tensor:
        nonlocal past
        with multiplied_patches(model):
            out = model.model(attention_mask=batch["attention_mask"][:, :end],
                              position_ids=batch["position_ids"][:, :, start:end],
                              use_cache=True, past_key_values=past, **inputs)
        past = out.past_key_values
        states.append(out.last_hidden_state)
        return out.last_hidden_state[:, -1]

    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    for block, (start, end) in enumerate(batch["blocks"]):
        last = step(start, end, input_ids=batch["input_ids"][:, start:end], **(images if block == 0 else {}))
        if block + 1 < len(batch["blocks"]):
            latents.append([])
            for k in range(spec.size):
                latents[-1].append(last)
                last = step(end + k, end + k + 1, inputs_embeds=last[:, None])
    return torch.cat(states, dim=1), latents


def align(qwen: Qwen, batch: dict, latents: list[list[torch.Tensor]], loss: str) -> torch.Tensor:
    """Return the sum over segments of the mean distance ("cosine" or "mse") from K latents to the image's
    pooled features."""
    with torch.no_grad():
        features = image_features(qwen, {"pixel_values": batch["step_pixel_values"],
                                         "image_grid_thw": batch["step_image_grid_thw"]})
    total = 0.0
    for (row, segment), feature in zip(batch["latents"], features, strict=True):
        states = torch.stack([step[row] for step in latents[segment]]).float()
        pooled = pool_features(feature, len(states)).float()
        distance = (1 - F.cosine_similarity(states, pooled) if loss == "cosine"
                    else (states - pooled).square().mean(-1))
        total = total + distance.mean()
    return total * batch["weight"]


# ---- weights
def make_model(device: torch.device, world: int, target: Target,
               args: argparse.Namespace) -> tuple[Qwen, Objective]:
    """Load, freeze, adapt and shard the model: bfloat16 on GPUs, float32 on CPUs."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(args.seed)  # every rank makes the same new embedding rows and adapters
    qwen = load(args.model, dtype="bfloat16" if on_gpu else "float32", device=str(device))
    if target.spec:
        add_tokens(qwen, target.spec.tokens)
    if args.lora_rank:
        add_adapters(qwen.model, args.lora_rank)
    visual = qwen.model.model.visual
    visual.requires_grad_(args.train_vision)
    if args.train_vision:
        visual.float()
    objective = Objective(qwen, target.spec, args.align_loss, autocast=on_gpu and args.train_vision)
    if on_gpu or world > 1:
        shard(objective, qwen.model, low_precision=on_gpu)
    return qwen, objective.train()


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Freeze all weights and add LoRA to the language model: alpha twice the rank, dropout 0.05."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # optional: only --lora_rank needs it
    except ImportError as error:
        raise DataError("--lora_rank needs the package peft (pip install peft)") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=ADAPTED)
    inject_adapter_in_model(config, model)


def make_optimizer(model: torch.nn.Module, learning_rate: float,
                   weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW with decay on matrices only; a trained tower, which is not sharded, has its own groups."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim >= 2, ".visual." in name), []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "weight_decay": weight_decay if decays else 0.0}
                              for (decays, _), parameters in groups.items()], lr=learning_rate, fused=True)


@contextmanager
def recompute_activations(model: torch.nn.Module, which: str) -> Iterator[None]:
    """Inside the block, have the backward pass recompute activations of "layers", "mlps" or "none".

    The MLPs hold 7 tenths in the 7B model and, unlike layers, use no cache. The last layer is kept: the
    backward pass begins with it.
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


# ---- sharding
def shard(objective: torch.nn.Module, model: torch.nn.Module, low_precision: bool) -> None:
    """Shard the language model over all ranks, with `objective`, whose forward runs it, as the root.

    Weights become float32 layer by layer, never all at once. With `low_precision` they are gathered and used
    as bfloat16; gradients are reduced in float32.
    """
    if not dist.is_initialized():  # one process, not started by torchrun
        dist.init_process_group("nccl" if model.device.type == "cuda" else "gloo", store=dist.HashStore(),
                                rank=0, world_size=1)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low_precision else MixedPrecisionPolicy()
    for layer in model.model.language_model.layers:
        fully_shard(layer.float(), mesh=mesh, mp_policy=policy)
    for module in (model.model.language_model.embed_tokens, model.model.language_model.norm, model.lm_head):
        module.float()
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=set(model.model.visual.parameters()))


def average_replicated(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of weights that are not sharded over ranks, missing ones as 0."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
