"""The weights of a training: loaded, frozen, adapted, sharded, and written in the layout of their base.

Sharding is torch's `fully_shard` (FSDP2): accelerate's plugin does not run on CPU ranks and rounds the loss
to bfloat16. Every decoder layer is sharded; embedding, last norm and head are one root group, gathered once
per pass. The vision tower is replicated, so that a rank without images does not wait.
"""
import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from utils.jsonl import DataError, find_checkpoint, load_object, write_json
from utils.latent_families import special_id
from utils.qwen import Qwen, load, load_processors
from utils.train.examples import Target
from utils.train.model import Objective

# the linear layers of the language model's decoder that LoRA adapts
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, DROPOUT = 2, 0.05  # LoRA's alpha over its rank, and the dropout of what it reads
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
CONFIG, TOKENIZER_CONFIG, TOKENIZER, ADDED = ("config.json", "tokenizer_config.json", "tokenizer.json",
                                              "added_tokens.json")
# what a checkpoint is besides its weights, as transformers 4 and 5 write it
TOOL_FILES = (CONFIG, TOKENIZER_CONFIG, TOKENIZER, ADDED, "generation_config.json", "vocab.json",
              "merges.txt", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
              "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


# ---- loading
def add_tokens(qwen: Qwen, names: tuple[str, ...]) -> list[int]:
    """Add missing special tokens, in the given order, and return the ids of all. The embedding grows only
    when the ids exceed the rows that the release left free."""
    qwen.tokenizer.add_tokens(list(names), special_tokens=True)
    if qwen.model is not None and len(qwen.tokenizer) > qwen.model.lm_head.out_features:
        qwen.model.resize_token_embeddings(len(qwen.tokenizer))
    return [special_id(qwen.tokenizer, name) for name in names]


def make_model(device: torch.device, world: int, target: Target,
               args: argparse.Namespace) -> tuple[Qwen, Objective]:
    """Load, freeze, adapt and shard the model: bfloat16 on GPUs, float32 on CPUs."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(args.seed)  # every rank makes the same adapters
    base = find_checkpoint(args.model)  # what the hub names may be another one by the end
    qwen = load(str(base), dtype="bfloat16" if on_gpu else "float32", device=str(device))
    ids, n_known = [], len(qwen.tokenizer)
    if target.spec:
        ids = add_tokens(qwen, target.spec.tokens)
        init_tokens(qwen, ids, n_known, args.token_init)
    if args.lora_rank:
        add_adapters(qwen.model, args.lora_rank, ids)
    choose_trained(qwen.model, args.train_vision)
    objective = Objective(qwen, args.align_loss, autocast=on_gpu and bool(args.train_vision))
    if on_gpu or world > 1:
        shard(objective, qwen.model, low_precision=on_gpu)
    return qwen, objective.train()


@torch.no_grad()
def init_tokens(qwen: Qwen, ids: list[int], n_known: int, texts: list[str] | None) -> None:
    """Set the rows of the tokens `ids` that the base does not know, in embedding and head: to the mean over
    the tokens of a text, one for all or one per token, or over all `n_known` tokens. The base may hold such
    rows, which nothing trained; those of tokens that it knows stay."""
    texts = texts or [None]
    for token, text in zip(ids, texts * (len(ids) // len(texts))):
        if token >= n_known:
            like = qwen.tokenizer(text).input_ids if text else slice(n_known)
            for module in (qwen.model.get_input_embeddings(), qwen.model.lm_head):
                module.weight[token] = module.weight[like].mean(0, dtype=torch.float32)


def choose_trained(model: torch.nn.Module, vision: str | None) -> None:
    """Freeze the vision tower, but what `vision` names: "all", its "merger", or "merger_only", which freezes
    the language model too. What is trained and not sharded is float32."""
    model.model.visual.requires_grad_(False)
    if vision == "merger_only":
        model.requires_grad_(False)
    for name, module in model.model.visual.named_children():
        if vision == "all" or vision and "merger" in name:
            module.requires_grad_().float()


def make_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float,
                   merger_rate: float | None = None) -> torch.optim.Optimizer:
    """Return AdamW with decay on matrices only; a trained tower, which is not sharded, has its own groups.

    "rate" of a group is the factor of the schedule's rate: `merger_rate` / `learning_rate` for the merger.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = ("merger" if "merger" in name else "tower") if ".visual." in name else "language"
            groups.setdefault((parameter.ndim >= 2, part), []).append(parameter)
    rates = {"merger": merger_rate / learning_rate} if merger_rate else {}
    return torch.optim.AdamW([{"params": parameters, "weight_decay": weight_decay if decays else 0.0,
                               "rate": rates.get(part, 1.0)}
                              for (decays, part), parameters in groups.items()], lr=learning_rate, fused=True)


@contextmanager
def gradients_from_embedding(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, the embedding's output requires a gradient. A frozen language model then has a
    backward pass on every rank: without one, a rank without images would leave the others waiting."""
    def require(module: torch.nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    hook = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        hook.remove()


# ---- adapters
class LowRank(torch.nn.Module):
    """LoRA: a frozen linear layer plus ALPHA * B A x, with A random and B zero at first."""

    def __init__(self, base_layer: torch.nn.Linear, rank: int):
        super().__init__()
        self.base_layer, device = base_layer, base_layer.weight.device
        self.a = torch.nn.Parameter(torch.empty(rank, base_layer.in_features, device=device))
        self.b = torch.nn.Parameter(torch.zeros(base_layer.out_features, rank, device=device))
        torch.nn.init.kaiming_uniform_(self.a, a=5**0.5)  # as Linear does

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, DROPOUT, self.training), self.a)
        return self.base_layer(x) + ALPHA * F.linear(low, self.b)

    def merged(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return weight + ALPHA * parts["b"] @ parts["a"]


class AddedRows(torch.nn.Module):
    """A frozen embedding, or head without bias, whose rows from `first` on are trained: those of added
    tokens."""

    def __init__(self, base_layer: torch.nn.Module, first: int, rows: torch.nn.Parameter):
        super().__init__()
        self.base_layer, self.first, self.rows = base_layer, first, rows

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.first, self.first + len(self.rows)
        out = self.base_layer(x)
        if isinstance(self.base_layer, torch.nn.Embedding):
            own = F.embedding((x - first).clamp(0, len(self.rows) - 1), self.rows)
            return torch.where(((x >= first) & (x < last))[..., None], own, out)
        return torch.cat([out[..., :first], F.linear(x, self.rows), out[..., last:]], dim=-1)

    def merged(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([weight[:self.first], parts["rows"], weight[self.first + len(parts["rows"]):]])


def add_adapters(model: torch.nn.Module, rank: int, ids: list[int]) -> None:
    """Freeze all weights; add LoRA to the language model, and rows for the consecutive tokens `ids`."""
    model.requires_grad_(False)
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if name in ADAPTED:
                    setattr(part, name, LowRank(module, rank))
    if ids:
        embedding, head = model.model.language_model.embed_tokens, model.lm_head
        rows = torch.nn.Parameter(embedding.weight[ids].float())
        own = rows if head.weight is embedding.weight else torch.nn.Parameter(head.weight[ids].float())
        model.model.language_model.embed_tokens = AddedRows(embedding, ids[0], rows)
        model.lm_head = AddedRows(head, ids[0], own)


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


# ---- export
def whole_state(model: torch.nn.Module, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """Return all weights on the CPU, adapters merged, to ranks with `keep`; every rank must call it."""
    adapters = {f"{name}.": module for name, module in model.named_modules()
                if isinstance(module, (LowRank, AddedRows))}
    state, parts = {}, {owner: {} for owner in adapters}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            owner = next((owner for owner in adapters if name.startswith(owner)), None)
            if owner:
                parts[owner][name.removeprefix(owner)] = tensor.cpu()
            else:
                state[name] = tensor.to("cpu", dtype, copy=True)
    for owner, tensors in parts.items():
        for name in [name for name in tensors if name.startswith("base_layer.")]:
            tensor, leaf = tensors[name], name.removeprefix("base_layer.")
            whole = adapters[owner].merged(tensor, tensors) if leaf == "weight" else tensor
            state[owner + leaf] = whole.to(dtype)
    return state


def file_dtype(folder: Path) -> torch.dtype:
    """Return the data type of most numbers in a checkpoint's files. Its config.json may say another."""
    counts = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    found = counts.most_common(1)[0][0] if counts else "no weights"
    if found not in DTYPES:
        raise DataError(f"{folder}: *.safetensors hold {found}, expected one of {', '.join(DTYPES)}")
    return DTYPES[found]


def save(qwen: Qwen, folder: str, state: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint: weights under the names of its base, and the base's own files. Only what training
    changed is changed in them: the size of the vocabulary, added tokens, and a wrong data type.

    `state`: the weights by their names in the model, of one dtype, if the model's own are sharded or of other
    types.
    """
    qwen.model.save_pretrained(folder, state_dict=state)
    base, to = find_checkpoint(qwen.path), Path(folder)
    for name in TOOL_FILES:
        (to / name).unlink(missing_ok=True)  # as this version of the library writes it
        if (base / name).is_file():
            shutil.copyfile(base / name, to / name)
    dtype = qwen.model.dtype if state is None else next(iter(state.values())).dtype
    adapt_config(to / CONFIG, dtype, qwen.model.config.text_config.vocab_size)
    known = load_processors(qwen.path)[0].added_tokens_decoder
    new = {i: token for i, token in qwen.tokenizer.added_tokens_decoder.items() if i not in known}
    if new:
        write_added(to, new)


def adapt_config(path: Path, dtype: torch.dtype, n_rows: int) -> None:
    """Have a flat or nested config.json say the type and the rows of the weights, wherever it says any."""
    config, name = load_object(path), str(dtype).removeprefix("torch.")
    right, is_right = {"vocab_size": n_rows, "dtype": name, "torch_dtype": name}, True
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        wrong = [key for key, value in right.items() if part.get(key, value) != value]
        part |= {key: right[key] for key in wrong}
        is_right = is_right and not wrong
    if not is_right:
        write_json(path, config)


def write_added(folder: Path, new: dict[int, object]) -> None:
    """Enter added tokens {id: AddedToken} where a checkpoint's files list such tokens."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    entries = {i: {name: getattr(token, name) for name in flags} for i, token in sorted(new.items())}
    has = {name: (folder / name).is_file() for name in (TOKENIZER, ADDED)}
    settings = load_object(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in settings or not has[TOKENIZER]:
        settings.setdefault("added_tokens_decoder", {}).update({str(i): e for i, e in entries.items()})
        write_json(folder / TOKENIZER_CONFIG, settings)
    if has[TOKENIZER]:
        tokenizer = load_object(folder / TOKENIZER)
        tokenizer["added_tokens"] += [{"id": i, **entry} for i, entry in entries.items()]
        write_json(folder / TOKENIZER, tokenizer)
    if has[ADDED]:
        write_json(folder / ADDED, load_object(folder / ADDED)
                   | {entry["content"]: i for i, entry in entries.items()})
