"""Attention of the words that the options are scored behind: to image, question, imagination and the rest.

It is read in an attention function that calls the library's own, without a matrix of all tokens by all
tokens. Mass is not use: a model may attend to latents that no intervention on them can move.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from utils.decode import State, prefill_blocks
from utils.qwen import Qwen

WATCHED = "sdpa_watched"
GROUPS = ("first", "image", "question", "imagination", "said")  # of columns; "said": the rest of the reply


def attention_weights(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor,
                      scaling: float) -> torch.Tensor:
    """Return weights [B, heads, R, C] in float32 of queries [B, heads, R, d] over keys [B, groups of heads,
    C, d]; `allowed` is bool [B, R, C]."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # heads that share a key: keys are not repeated
    scores = torch.einsum("bkgrd,bkcd->bkgrc", grouped, key.float()).flatten(1, 2) * scaling
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)


@contextmanager
def watched(model: torch.nn.Module,
            note: Callable[[torch.Tensor, torch.Tensor, float], None]) -> Iterator[None]:
    """Call note(query, key, scaling) for every decoder layer inside the block."""
    config = model.config.text_config
    before = config._attn_implementation  # sdpa, which utils.qwen.load asks for

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        note(query, key, scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling,
                                               **kwargs)

    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    config._attn_implementation = WATCHED
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def stem_attention(qwen: Qwen, state: State, before: list[int], stems: list[str],
                   imagined: list[list[int]]) -> list[dict]:
    """Return where the tokens of each row's stem, read after the ids `before`, attend in that row of `state`
    (kept): {"mass": {group: [share per layer]}, "uniform": {group: share of the visible columns}}. Means over
    heads and the stem's tokens. `imagined`: the columns of each row's imaginations."""
    blocks = [before + qwen.tokenizer(stem, add_special_tokens=False).input_ids for stem in stems]
    lengths = torch.tensor([len(block) for block in blocks], device=state.mask.device)[:, None]
    steps = torch.arange(int(lengths.max()), device=lengths.device)
    mask = torch.cat([state.mask, (steps < lengths).to(state.mask)], dim=1).bool()  # padded on the right
    columns, own = torch.arange(mask.shape[1], device=mask.device), slice(len(before), None)
    allowed = (mask[:, None] & (columns <= state.mask.shape[1] + steps[:, None]))[:, own]
    share = (steps < lengths)[:, own] / (lengths - len(before))  # [B, R] of each of the stem's tokens
    layers: list[torch.Tensor] = []  # [B, C] each
    with watched(qwen.model, lambda query, key, scaling: layers.append(torch.einsum(
            "bhrc,br->bc", attention_weights(query[:, :, own], key, allowed, scaling), share)
            / query.shape[1])):
        prefill_blocks(qwen, state.select(list(range(len(blocks)))), blocks)
    member = column_groups(state, mask, imagined)
    mass = torch.einsum("lbc,bgc->bgl", torch.stack(layers), member)
    uniform = torch.einsum("brc,br,bgc->bg", allowed / allowed.sum(-1, keepdim=True), share, member)
    rows = zip(*(shares.double().round(decimals=6).tolist() for shares in (mass, uniform)))
    return [{"mass": dict(zip(GROUPS, own)), "uniform": dict(zip(GROUPS, even))} for own, even in rows]


def column_groups(state: State, mask: torch.Tensor, imagined: list[list[int]]) -> torch.Tensor:
    """Return [B, groups, C] of 0 and 1; the first visible token has a group of its own."""
    group = torch.full(mask.shape, GROUPS.index("said"), device=mask.device)
    n_prompt = state.is_image.shape[1]
    group[:, :n_prompt] = torch.where(state.is_image, GROUPS.index("image"), GROUPS.index("question"))
    for row, columns in enumerate(imagined):
        group[row, columns] = GROUPS.index("imagination")
    group[torch.arange(len(mask)), mask.int().argmax(1)] = GROUPS.index("first")
    return torch.stack([group == g for g in range(len(GROUPS))], dim=1).float()
