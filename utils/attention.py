"""How much the rows of an answer's stem attend to what, layer by layer, without a matrix of all tokens by all tokens.

The model is given an attention function that calls the library's own and looks at the queries and keys it is handed, after
their rotary embedding; only the rows just read are weighed, [rows, columns] a head. Mass is not use: a model may attend to
latents that no intervention on them can move (causal.md, 2.4).
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.decode import State, extend_all
from utils.qwen import Qwen

NAME = "sdpa_watched"
GROUPS = ("first", "image", "question", "imagination", "said")  # columns by what stands there; "said" is the rest of the reply


def weigh(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return attention weights [B, heads, R, C] in float32 of queries [B, heads, R, d] over keys [B, groups of heads, C, d];
    `allowed` is bool [B, R, C]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # the heads that share a key: keys are not repeated
    scores = torch.einsum("bkgrd,bkcd->bkgrc", grouped, key.float()).flatten(1, 2) * scaling
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)


@contextmanager
def watched(model: torch.nn.Module, note: Callable[[torch.Tensor, torch.Tensor, float], None]) -> Iterator[None]:
    """Call note(query, key, scaling) for every decoder layer inside the block; what the model computes stays as it is.

    The function is set on the language model's configuration (sdpa) and taken off again; nothing is patched.
    """
    config = model.config.text_config
    before = config._attn_implementation
    if before != "sdpa":
        raise ValueError(f"attention {before!r}, expected sdpa, which utils.qwen.load asks for")

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        note(query, key, scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def stem_attention(qwen: Qwen, state: State, before: list[int], stem: str, imagined: list[list[int]]) -> list[dict]:
    """Return where the tokens of `stem`, read after the ids `before`, look in each row of `state`, which is not used up.

    `imagined[row]` are the cache's columns of the imagination. For each row {"mass": {group: [share a layer]}, "uniform":
    {group: its share of the columns that may be seen}, "imagined": [mass of each of its columns, mean over the layers]};
    means over the heads and the stem's tokens, the groups' shares add up to 1.
    """
    block = before + qwen.tokenizer(stem, add_special_tokens=False).input_ids
    (n, n_before), rows = state.mask.shape, slice(len(before), len(block))
    mask = torch.cat([state.mask, state.mask.new_ones(n, len(block))], dim=1).bool()
    steps = torch.arange(len(block), device=mask.device)
    allowed = (mask[:, None] & (torch.arange(mask.shape[1], device=mask.device) <= n_before + steps[:, None]))[:, rows]
    layers: list[torch.Tensor] = []  # [B, C] each
    with watched(qwen.model, lambda query, key, scaling: layers.append(
            weigh(query[:, :, rows], key, allowed, scaling).mean((1, 2)))):
        extend_all(qwen, state.take(list(range(n))), [block] * n)
    member = columns_of(state, mask, imagined)
    mass = torch.einsum("lbc,bgc->bgl", torch.stack(layers), member)
    uniform = torch.einsum("brc,bgc->bg", allowed / allowed.sum(-1, keepdim=True), member) / allowed.shape[1]
    each = torch.stack(layers).mean(0)
    return [{"mass": {name: rounded(mass[i, g]) for g, name in enumerate(GROUPS)},
             "uniform": dict(zip(GROUPS, rounded(uniform[i]))), "imagined": rounded(each[i, imagined[i]])} for i in range(n)]


def columns_of(state: State, mask: torch.Tensor, imagined: list[list[int]]) -> torch.Tensor:
    """Return [B, groups, C] of 0 and 1: which group each column belongs to; the first token that is seen is one by itself."""
    group = torch.full(mask.shape, GROUPS.index("said"), device=mask.device)
    n_prompt = state.is_image.shape[1]
    group[:, :n_prompt] = torch.where(state.is_image, GROUPS.index("image"), GROUPS.index("question"))
    for row, columns in enumerate(imagined):
        group[row, columns] = GROUPS.index("imagination")
    group[torch.arange(len(mask)), mask.int().argmax(1)] = GROUPS.index("first")
    return torch.stack([group == g for g in range(len(GROUPS))], dim=1).float()


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
