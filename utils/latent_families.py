"""The families of latent imagination: their tokens, and how a segment of latents begins and ends.

Unlike in the families' own code, a segment records pads, not junk samples; an end of text sampled inside a
segment does not stop the row, nor does a start re-open it; every row has its own state.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.jsonl import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentSpec:
    """How a family decodes latents. `tokens`: in the order of the training code, which fixes their ids;
    `size`: the number K of latents per segment; `overwrite_start`: the first latent replaces the start
    token's embedding; `force_end`: the end token follows K latents, whatever was sampled; `early_end`: a
    sampled end token closes the segment before K."""

    name: str
    tokens: tuple[str, ...]
    start: str
    pad: str
    end: str
    size: int
    overwrite_start: bool
    force_end: bool
    early_end: bool


# Orders: NOVAglow646/Monet src/main.py, UMass-Embodied-AGI/Mirage src/main.py, LVR src/train/train_lvr.py
MONET_TOKENS = ("<abs_vis_token_pad>", "<abs_vis_token>", "</abs_vis_token>", "<observation>",
                "</observation>")
MIRAGE_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
LVR_HEAD = "lvr_head."  # prefix of its weights; each layer has a weight and a bias
SIMPLE_HEAD = ("ln_q", "mlp.0", "mlp.2")  # lvr_head_type "simple"
GATED_HEAD = ("down_proj", "gate_proj", "up_proj")  # lvr_head_type "glu"
_MONET = LatentSpec("monet_vllm", MONET_TOKENS, "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>",
                    size=10, overwrite_start=True, force_end=True, early_end=True)
PRESETS = {spec.name: spec for spec in (
    _MONET,  # Monet's vLLM runner, K = LATENT_SIZE
    # CapImagine's README loop, MAX_LATENT_LEN = 10
    replace(_MONET, name="monet_capimagine", overwrite_start=False),
    # latent_size 4 of its training
    LatentSpec("mirage", MIRAGE_TOKENS, "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>",
               size=4, overwrite_start=False, force_end=True, early_end=True),
    # decoding by steps, 8 in the paper
    LatentSpec("lvr", LVR_TOKENS, "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>",
               size=8, overwrite_start=False, force_end=False, early_end=False))}


def spec_of(name: str, size: int | None) -> LatentSpec | None:
    """Return the family that --latent names ("off": None), with `size` latents if given."""
    return None if name == "off" else replace(PRESETS[name], size=size or PRESETS[name].size)


@dataclass
class Segment:
    """Consecutive latents: index of the first in `Generation.ids`, their number, and what closed them."""

    start: int
    size: int = 0
    # "limit" (K reached), "end" (end token sampled), "max_tokens" (never closed)
    closed_by: str = "max_tokens"


@dataclass
class Generation:
    """One decoded row. Latent positions hold the pad id in `ids`; a row that stopped ends with its end id.

    `states` [len(ids), hidden]: the post-norm states that led to each id; at a latent, the latent before any
    edit. `fed` [n_latents, hidden]: the vectors fed, after the edit. `logits` [len(ids), vocab]. `slots`: for
    each latent that was read, the inputs of the decoder's layers [layers, hidden]. `n_forbidden`: ids that
    would have come next but for `Intervention.forbid`.
    """

    ids: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop"
    segments: list[Segment] = field(default_factory=list)
    states: torch.Tensor | None = None
    fed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    slots: list[torch.Tensor] | None = None
    n_forbidden: int = 0


@dataclass(frozen=True)
class Intervention:
    """What is done to one row while it decodes; by default nothing.

    choose(logits [vocab], n) -> id                    the nth new id (from 0)
    forbid(row, id) -> bool                            whether this id may not come next
    feed(z [hidden], segment, step) -> [hidden]        site `fed`: the vector fed in place of the latent z
    slot(segment, step) -> [layers, hidden] or None    site `slot`: every layer's input at that latent
                                                       (of a list, those that are not None)
    hide: "latents", "images" or both                  site `edge`: what tokens after a segment cannot see
    spec: another form of the family for this row (other K, say)
    covers(segment, step) -> bool                      the latents that it reaches (None: all)
    """

    choose: Callable[[torch.Tensor, int], int] | None = None
    feed: Callable[[torch.Tensor, int, int], torch.Tensor] | None = None
    slot: Callable[[int, int], Sequence[torch.Tensor | None] | None] | None = None
    hide: tuple[str, ...] = ()
    spec: LatentSpec | None = None
    forbid: Callable[[Generation, int], bool] | None = None
    covers: Callable[[int, int], bool] | None = None

    def next_id(self, logits: torch.Tensor, likeliest: int, row: Generation) -> int:
        """Return the next id of a row: the chosen or the likeliest, of those that are not forbidden."""
        choose = self.choose or (lambda logits, n: int(logits.argmax()))
        found = self.choose(logits, len(row.ids)) if self.choose else likeliest
        if self.forbid and self.forbid(row, found):
            row.n_forbidden, logits = row.n_forbidden + 1, logits.clone()
            while self.forbid(row, found):
                logits[found] = float("-inf")
                found = choose(logits, len(row.ids))
        return found


class RowState:
    """The state machine of one row: which id is recorded, and whether a latent is fed."""

    def __init__(self, spec: LatentSpec | None, ids: tuple[int, int, int] | None, eos_ids: list[int]):
        self.spec, self.eos_ids = spec, eos_ids
        self.start_id, self.pad_id, self.end_id = ids if ids else (None, None, None)
        self.inside = self.done = False
        self.just_closed: Segment | None = None  # by the last id
        self.out = Generation()

    @property
    def place(self) -> tuple[int, int]:
        """Index of the last segment, and of the last latent in it."""
        return len(self.out.segments) - 1, self.out.segments[-1].size - 1

    def advance(self, sampled: int) -> bool:
        """Record the id for a sampled one; return whether a latent is fed in place of its embedding."""
        recorded, feeds_latent, self.just_closed = sampled, False, None
        if self.inside:
            segment = self.out.segments[-1]
            ended_early = self.spec.early_end and sampled == self.end_id
            if segment.size < self.spec.size and not ended_early:
                recorded, feeds_latent = self.pad_id, True
                segment.size += 1
            else:
                segment.closed_by = "end" if ended_early else "limit"
                self.inside, self.just_closed = False, segment
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


def pool_features(features: torch.Tensor, size: int) -> torch.Tensor:
    """Return what `size` latents are taught to equal: an image's merged features [n, hidden] in groups of
    consecutive ones, [size, hidden] of their means, the remainder dropped (Mirage's modeling file)."""
    if len(features) < size:
        raise ValueError(f"{len(features)} visual tokens, fewer than {size} latents")
    return features[:len(features) // size * size].unflatten(0, (size, -1)).mean(1)


@lru_cache(64)  # asked for at every row of a batch
def special_id(tokenizer, name: str) -> int:
    ids = tokenizer(name, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != name:
        raise DataError(f"{name!r} is {len(ids)} tokens in this tokenizer, expected one added token; was "
                        "this checkpoint trained with it?")
    return ids[0]


def latent_ids(tokenizer, spec: LatentSpec) -> tuple[int, int, int]:
    """Return the ids of (start, pad, end); DataError unless the family's tokens are in order."""
    ids = [special_id(tokenizer, name) for name in spec.tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(f"{spec.name}: tokens {spec.tokens} have ids {ids}, expected consecutive ids in that "
                        "order; this checkpoint has another family's")
    return tuple(special_id(tokenizer, name) for name in (spec.start, spec.pad, spec.end))


def last_latent(row: Generation) -> int:
    """Return the number of ids up to the end of the last segment; 0 without a segment."""
    return max((segment.start + segment.size for segment in row.segments), default=0)


def latent_steps(row: Generation) -> list[int]:
    """Return the index in a row's ids of every latent."""
    return [step for segment in row.segments for step in range(segment.start, segment.start + segment.size)]


def clean_text(tokenizer, ids: list[int], spec: LatentSpec | None = None) -> str:
    """Decode recorded ids without latents and special tokens."""
    if spec:
        latent = set(latent_ids(tokenizer, spec))
        ids = [i for i in ids if i not in latent]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_head(path: str, device: torch.device,
              dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return LVR's head [.., hidden] -> [.., hidden] (src/model/lvr_heads.py) if the checkpoint has one.

    It maps the output of a latent step before that is fed (so not the first latent of a segment); the logits
    come from the same state. The weights' names tell its form.
    """
    import torch.nn.functional as F
    from safetensors import safe_open
    from transformers.utils import cached_file

    find_file = partial(cached_file, path, _raise_exceptions_for_missing_entries=False)
    files = ["model.safetensors"]
    if index := find_file("model.safetensors.index.json"):
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in places.items() if name.startswith(LVR_HEAD)})
    head = {}
    for name in files:
        if file := find_file(name):
            with safe_open(file, "pt") as weights:
                head |= {key.removeprefix(LVR_HEAD): weights.get_tensor(key).to(device, dtype, copy=True)
                         for key in weights.keys() if key.startswith(LVR_HEAD)}
    if not head:
        return None

    def linear(layer: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, head[f"{layer}.weight"], head[f"{layer}.bias"])

    def simple(x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[-1:], head["ln_q.weight"], head["ln_q.bias"], eps=1e-6)
        return linear("mlp.2", F.gelu(linear("mlp.0", x)))

    def gated(x: torch.Tensor) -> torch.Tensor:
        return linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))

    for layers, form in ((SIMPLE_HEAD, simple), (GATED_HEAD, gated)):
        if sorted(head) == [f"{layer}.{part}" for layer in layers for part in ("bias", "weight")]:
            return form
    raise DataError(f"{path}: weights {LVR_HEAD}* named {sorted(head)}, expected a weight and a bias each of "
                    f"{', '.join(SIMPLE_HEAD)} or {', '.join(GATED_HEAD)}")
