"""Train a model in pieces on several devices (FSDP2), and put it together again: what to shard, gather, clip
and merge.

`torch.distributed.fsdp.fully_shard` itself and not accelerate's plugin: accelerate wires FSDP for
accelerators alone, so that its path could not be run on CPU ranks, and its default policy rounds the loss to
bfloat16. What is sharded: every decoder layer, and one root group of embedding, last norm and head, gathered
once a pass. The vision tower is outside: it is replicated, so that a rank whose rows have no image waits for
nobody.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(objective: torch.nn.Module, model: torch.nn.Module, low_precision: bool) -> None:
    """Shard `model`'s language part over all ranks; `objective`, whose forward runs the model, becomes the
    root.

    Trained weights become float32 (master weights), layer by layer, so that they are never all here at once.
    With `low_precision` they are gathered and computed with as bfloat16; gradients are reduced in float32,
    and what the objective returns keeps its type.
    """
    if not dist.is_initialized():  # one process, not started by torchrun
        dist.init_process_group("nccl" if model.device.type == "cuda" else "gloo", store=dist.HashStore(),
                                rank=0, world_size=1)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32,
                                  None) if low_precision else MixedPrecisionPolicy()
    for layer in model.model.language_model.layers:
        fully_shard(layer.float(), mesh=mesh, mp_policy=policy)
    for module in (model.model.language_model.embed_tokens, model.model.language_model.norm, model.lm_head):
        module.float()
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=set(model.model.visual.parameters()))


def average_replicated(parameters: list[torch.nn.Parameter]) -> None:
    """Average over ranks the gradients of weights that are not sharded (a trained tower); a rank without
    images gives 0."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


@contextmanager
def gathered(objective: torch.nn.Module) -> Iterator[None]:
    """Keep all weights whole inside the block, so that ranks may run forward passes that differ (generation).
    """
    parts = [module for module in objective.modules() if isinstance(module, FSDPModule)]
    # the root is never resharded after a forward pass
    layers = [part for part in parts if part is not objective]
    for part in parts:
        part.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


def whole_state(model: torch.nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """Return all weights on the CPU by name, adapters merged into theirs; every rank must call, only `keep`
    ranks get them.

    Tied weights stand once.
    """
    state = {}
    for name, tensor in model.named_parameters():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = tensor.cpu() if ".lora_" in name or ".base_layer." in name else tensor.to(
                "cpu", dtype, copy=True)
    return merge_adapters(model, state, dtype)


def merge_adapters(model: torch.nn.Module, state: dict[str, torch.Tensor],
                   dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a state without LoRA: W + scaling * B A under W's own name."""
    merged = {}
    for name, tensor in state.items():
        if ".base_layer." in name:
            owner = name[:name.index(".base_layer.")]
            if name.endswith(".weight"):
                scaling = model.get_submodule(owner).scaling["default"]
                tensor = tensor + scaling * state[f"{owner}.lora_B.default.weight"] @ state[
                    f"{owner}.lora_A.default.weight"]
            merged[name.replace(".base_layer.", ".")] = tensor.to(dtype)
        elif not re.search(r"\.lora_[AB]\.", name):
            merged[name] = tensor
    return merged
