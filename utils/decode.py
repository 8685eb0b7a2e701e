"""One batched greedy decoding loop for text and for latent imagination, over the unpatched model.

A latent step is an ordinary one-token step whose input embedding is the previous last hidden state after the final
norm: position +1, one key-value slot. The families differ only in their markers, in how many latents a segment has, in
how it ends and in whether the start token's own embedding is fed. With `spec=None` the loop equals
`model.generate(do_sample=False)` bit for bit.

Where this loop differs from the families' own code, on purpose: pads are recorded inside a segment instead of junk
samples; a sampled end of text inside a segment does not stop the row; a start sampled inside does not re-open it; every
row of a batch has a state of its own.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from utils.qwen import IMAGE_TOKEN, Qwen, image_features, special_id
from utils.rows import DataError


@dataclass(frozen=True)
class LatentSpec:
    """How a family decodes latents.

    `tokens` are its added tokens in the order in which its training code adds them (ids follow from the order);
    `size` is the number K of latents a segment; `overwrite_start` feeds the first latent in place of the start token's
    embedding; `force_end` writes the end token after K latents, else the sampled token stands; `early_end` lets a
    sampled end token close the segment before K.
    """

    name: str
    tokens: tuple[str, ...]
    start: str
    pad: str
    end: str
    size: int
    overwrite_start: bool
    force_end: bool
    early_end: bool


# Orders: NOVAglow646/Monet src/main.py, UMass-Embodied-AGI/Mirage src/main.py, the LVR repository src/train/train_lvr.py.
MONET_TOKENS = ("<abs_vis_token_pad>", "<abs_vis_token>", "</abs_vis_token>", "<observation>", "</observation>")
MIRAGE_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
_MONET = LatentSpec("monet_vllm", MONET_TOKENS, "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>",
                    size=10, overwrite_start=True, force_end=True, early_end=True)
PRESETS = {spec.name: spec for spec in (
    _MONET,  # Monet's vLLM runner, K = LATENT_SIZE
    replace(_MONET, name="monet_capimagine", overwrite_start=False),  # CapImagine's README loop, MAX_LATENT_LEN = 10
    LatentSpec("mirage", MIRAGE_TOKENS, "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>",
               size=4, overwrite_start=False, force_end=True, early_end=True),  # latent_size 4 of its training
    LatentSpec("lvr", LVR_TOKENS, "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>",
               size=8, overwrite_start=False, force_end=False, early_end=False))}  # decoding by steps, 8 in the paper


@dataclass
class Segment:
    """A run of latents: index in `Generation.ids` of its first latent, number of latents, what closed it."""

    start: int
    size: int = 0
    closed_by: str = "max_tokens"  # "limit" (K reached), "end" (end token sampled), "max_tokens" (never closed)


@dataclass
class Generation:
    """One decoded row. Latent positions hold the pad id in `ids`; a row that stopped ends with its end-of-text id.

    `states` [len(ids), hidden] are the post-norm states that led to each recorded id: at a latent position, the raw
    latent before any edit. `fed` [n_latents, hidden] are the vectors fed, after the edit. `logits` [len(ids), vocab].
    """

    ids: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop"
    segments: list[Segment] = field(default_factory=list)
    states: torch.Tensor | None = None
    fed: torch.Tensor | None = None
    logits: torch.Tensor | None = None


Edit = Callable[[torch.Tensor, int, int, int], torch.Tensor]


class RowState:
    """The latent state machine of one row: which id is recorded for a sampled one, and whether a latent is fed."""

    def __init__(self, spec: LatentSpec | None, ids: tuple[int, int, int] | None, eos_ids: list[int]):
        self.spec, self.eos_ids = spec, eos_ids
        self.start_id, self.pad_id, self.end_id = ids if ids else (None, None, None)
        self.inside = self.done = False
        self.out = Generation()

    def advance(self, sampled: int) -> bool:
        """Record the id for a sampled one; return True if a latent is fed at this position instead of its embedding."""
        recorded, feeds_latent = sampled, False
        if self.inside:
            segment = self.out.segments[-1]
            ended_early = self.spec.early_end and sampled == self.end_id
            if segment.size < self.spec.size and not ended_early:
                recorded, feeds_latent = self.pad_id, True
                segment.size += 1
            else:
                segment.closed_by = "end" if ended_early else "limit"
                self.inside = False
                if self.spec.force_end:
                    recorded = self.end_id
        if not self.inside and not feeds_latent and recorded == self.start_id:
            self.inside = True
            feeds_latent = self.spec.overwrite_start
            self.out.segments.append(Segment(len(self.out.ids) + (not feeds_latent), int(feeds_latent)))
        self.out.ids.append(recorded)
        if not self.inside and recorded in self.eos_ids:
            self.done, self.out.finish = True, "stop"
        return feeds_latent


def latent_ids(tokenizer, spec: LatentSpec) -> tuple[int, int, int]:
    """Return the ids of (start, pad, end), after checking that all the family's tokens stand in its own order."""
    ids = [special_id(tokenizer, name) for name in spec.tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(f"{spec.name}: tokens {spec.tokens} have ids {ids}, expected consecutive ones in that order; "
                        "this checkpoint was trained with another family's tokens")
    return tuple(special_id(tokenizer, name) for name in (spec.start, spec.pad, spec.end))


def embed_prompt(qwen: Qwen, inputs: dict, prompt_latents: list[torch.Tensor] | None, pad_id: int | None) -> torch.Tensor:
    """Return the prompt's embeddings [B, L, hidden]: text, image features, and given vectors at the latent pads.

    `prompt_latents` holds per row [n, hidden] vectors for the row's n latent pads in order; DataError on another n.
    """
    embeds = qwen.model.get_input_embeddings()(inputs["input_ids"])
    if "pixel_values" in inputs:
        features = torch.cat(image_features(qwen, inputs)).to(embeds)
        is_image = inputs["input_ids"] == special_id(qwen.tokenizer, IMAGE_TOKEN)
        embeds = embeds.masked_scatter(is_image[..., None], features)
    for i, vectors in enumerate(prompt_latents or []):
        places = (inputs["input_ids"][i] == pad_id).nonzero()[:, 0]
        if len(places) != len(vectors):
            raise DataError(f"row {i}: {len(vectors)} latents for {len(places)} latent pads in the prompt")
        embeds = embeds.index_put((torch.full_like(places, i), places), vectors.to(embeds))
    return embeds


@torch.no_grad()
def generate(qwen: Qwen, inputs: dict, max_new_tokens: int, spec: LatentSpec | None = None, edit: Edit | None = None,
             capture: bool = False, with_logits: bool = False,
             prompt_latents: list[torch.Tensor] | None = None) -> list[Generation]:
    """Decode a left-padded batch from `utils.qwen.encode` greedily; `max_new_tokens` counts latent steps too.

    `edit(z [hidden], row, segment, step) -> [hidden]` replaces a vector before it is fed (site `fed`); returning z is
    the identity. `capture` keeps states and fed vectors, `with_logits` every step's logits. `prompt_latents`: see
    `embed_prompt`.
    """
    ids = latent_ids(qwen.tokenizer, spec) if spec else None
    rows = [RowState(spec, ids, qwen.eos_ids) for _ in inputs["input_ids"]]
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    if prompt_latents is None:
        images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        prompt = {"input_ids": inputs["input_ids"], **images}
    else:
        prompt = {"inputs_embeds": embed_prompt(qwen, inputs, prompt_latents, ids[1] if ids else None)}
    out = qwen.model.model(**prompt, attention_mask=mask, position_ids=positions, use_cache=True)
    embed = qwen.model.get_input_embeddings()
    kept = [([], [], []) for _ in rows]  # states, fed, logits
    for n_new in range(1, max_new_tokens + 1):
        hidden = out.last_hidden_state[:, -1]  # [B, hidden], after the final norm
        logits = qwen.model.lm_head(hidden)
        sampled = logits.argmax(-1)
        live = [not row.done for row in rows]
        vectors = {}
        for i, (row, token) in enumerate(zip(rows, sampled.tolist())):
            if row.done:
                continue
            if row.advance(token):
                segment = len(row.out.segments) - 1
                step = row.out.segments[segment].size - 1
                vectors[i] = edit(hidden[i], i, segment, step) if edit else hidden[i]
                kept[i][1].append(vectors[i])
            kept[i][0].append(hidden[i] if capture else None)
            kept[i][2].append(logits[i] if with_logits else None)
        if all(row.done for row in rows) or n_new == max_new_tokens:
            break
        fill = qwen.tokenizer.pad_token_id
        tokens = torch.tensor([row.out.ids[-1] if alive else fill for row, alive in zip(rows, live)])
        embeds = embed(tokens.to(hidden.device))
        for i, vector in vectors.items():
            embeds[i] = vector.to(embeds)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[..., -1:] + 1
        out = qwen.model.model(inputs_embeds=embeds[:, None], attention_mask=mask, position_ids=positions,
                               past_key_values=out.past_key_values, use_cache=True)
    for row, (states, fed, logits) in zip(rows, kept):
        if capture:
            row.out.states, row.out.fed = torch.stack(states), torch.stack(fed) if fed else hidden.new_zeros(0, hidden.shape[1])
        if with_logits:
            row.out.logits = torch.stack(logits)
    return [row.out for row in rows]


def clean_text(tokenizer, ids: list[int], spec: LatentSpec | None = None) -> str:
    """Decode recorded ids without latent segments and without special tokens, so that neither can be parsed as text."""
    if spec:
        latent = set(latent_ids(tokenizer, spec))
        ids = [i for i in ids if i not in latent]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
