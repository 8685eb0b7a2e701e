"""The families of latent imagination: their tokens, and how a segment of latents begins and ends.

Unlike in the families' own code, a segment records pads, not junk samples; an end of text sampled inside a
segment does not stop the row, nor does a start re-open it; every row has its own state.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from utils.jsonl import DataError, find_checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentSpec:
    """How a family decodes latents. `tokens`: in the order of the training code, which fixes their ids;
    `size`: the number K of latents per segment; `overwrite_start`: the first latent replaces the start
    token's embedding; `force_end`: the end token follows K latents, whatever was sampled; `early_end`: a
    sampled end token closes the segment before K; `repeats`: so does an id that is sampled so often in a row
    (0: never), as if K were reached; `after_limit`: its first token follows such an end, whatever was
    sampled; `force_start`: the reply begins with the start token, whatever was sampled."""

    name: str
    tokens: tuple[str, ...]
    start: str
    pad: str
    end: str
    size: int
    overwrite_start: bool
    force_end: bool
    early_end: bool
    repeats: int = 0
    after_limit: str = ""
    force_start: bool = False


# Orders: NOVAglow646/Monet and UMass-Embodied-AGI/Mirage src/main.py; VincentLeebang/lvr, TungChintao/SkiLa,
# ybb6/laser src/train/train_*.py; Accio-Lab/SwimBird src/train/train.py
MONET_TOKENS = ("<abs_vis_token_pad>", "<abs_vis_token>", "</abs_vis_token>", "<observation>",
                "</observation>")
MIRAGE_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
SKILA_TOKENS = ("<|skila|>", "<|sketch_start|>", "<|sketch_end|>")
SWIMBIRD_TOKENS = ("<|latent|>", "<|latent_start|>", "<|latent_end|>")
LASER_TOKENS = ("<|laser_start|>", "<|laser|>", "<|laser_end|>")
LVR_HEAD = "lvr_head."  # prefix of its weights; each layer has a weight and a bias
SIMPLE_HEAD = ("ln_q", "mlp.0", "mlp.2")  # lvr_head_type "simple"
GATED_HEAD = ("down_proj", "gate_proj", "up_proj")  # lvr_head_type "glu"
_MONET = LatentSpec("monet_vllm", MONET_TOKENS, "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>",
                    size=10, overwrite_start=True, force_end=True, early_end=True)
_MIRAGE = LatentSpec("mirage", MIRAGE_TOKENS, "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>",
                     size=4, overwrite_start=False, force_end=True, early_end=True)
PRESETS = {spec.name: spec for spec in (
    _MONET,  # Monet's vLLM runner, K = LATENT_SIZE
    replace(_MONET, name="monet_capimagine", overwrite_start=False),  # its README's loop, MAX_LATENT_LEN
    _MIRAGE,  # latent_size of its training
    LatentSpec("lvr", LVR_TOKENS, "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>",  # by steps, as in the paper
               size=8, overwrite_start=False, force_end=False, early_end=False),
    # 2 x sketch_token_num in src/model/skila.py, 27 in its training script; SwimBird's loop is the same
    replace(_MIRAGE, name="skila", tokens=SKILA_TOKENS, start="<|sketch_start|>", pad="<|skila|>",
            end="<|sketch_end|>", size=54),
    replace(_MIRAGE, name="swimbird", tokens=SWIMBIRD_TOKENS, pad="<|latent|>", size=64),
    replace(_MIRAGE, name="ilvr", size=8, early_end=False),  # XD111ds/ILVR's LatentTemplateLogitsProcessor
    replace(_MIRAGE, name="laser", tokens=LASER_TOKENS, start="<|laser_start|>", pad="<|laser|>",
            end="<|laser_end|>", size=16, repeats=3, after_limit="<answer>", force_start=True))}


def spec_of(name: str, size: int | None, force_start: bool = False) -> LatentSpec | None:
    """Return the family that --latent names ("off": None), with `size` latents if given; DataError for a
    start that is forced without a family."""
    family = PRESETS.get(name)
    if force_start and family is None:
        raise DataError("--force_start: no start of latents with --latent off; expected a family")
    return family and replace(family, size=size or family.size, force_start=force_start or family.force_start)


@dataclass
class Segment:
    """Consecutive latents: index of the first in `Generation.ids`, their number, and what closed them."""

    start: int
    size: int = 0
    # "limit" (K reached), "repetition", "end" (end token sampled), "max_tokens" (never closed)
    closed_by: str = "max_tokens"


@dataclass
class Generation:
    """One decoded row. Latent positions hold the pad id in `ids`; a row that stopped ends with its end id.

    `states` [len(ids), hidden]: the post-norm states that led to each id; at a latent, the latent before any
    edit. `fed` [n_latents, hidden]: the vectors fed, after the edit. `logits` [len(ids), vocab]. `slots`: for
    each latent that was read, the inputs of the decoder's layers [layers, hidden]. `n_forbidden`: ids that
    would have come next but for `Intervention.forbid`. `sampled`: `ids`, but what was sampled at latents.
    """

    ids: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop"
    segments: list[Segment] = field(default_factory=list)
    states: torch.Tensor | None = None
    fed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    slots: list[torch.Tensor] | None = None
    n_forbidden: int = 0
    sampled: list[int] = field(default_factory=list)


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

    def next_id(self, logits: torch.Tensor, likeliest: int, row: Generation, forced: int | None) -> int:
        """Return the next id of a row: the forced one, or the chosen or likeliest of those that are not
        forbidden."""
        choose = self.choose or (lambda logits, n: int(logits.argmax()))
        found = self.choose(logits, len(row.ids)) if self.choose else likeliest
        found = found if forced is None else forced
        if self.forbid and self.forbid(row, found):
            row.n_forbidden, logits = row.n_forbidden + 1, logits.clone()
            while self.forbid(row, found):
                logits[found] = float("-inf")
                found = choose(logits, len(row.ids))
        return found


class RowState:
    """The state machine of one row: which id is recorded, and whether a latent is fed."""

    def __init__(self, spec: LatentSpec | None, ids: tuple[int, int, int] | None, eos_ids: list[int],
                 after_id: int | None = None):
        self.spec, self.eos_ids, self.after_id = spec, eos_ids, after_id
        self.start_id, self.pad_id, self.end_id = ids if ids else (None, None, None)
        self.inside = self.done = False
        self.forced = self.start_id if spec and spec.force_start else None  # the id to come, if it is fixed
        self.just_closed: Segment | None = None  # by the last id
        self.out = Generation()

    @property
    def place(self) -> tuple[int, int]:
        """Index of the last segment, and of the last latent in it."""
        return len(self.out.segments) - 1, self.out.segments[-1].size - 1

    def closing(self, sampled: int) -> str | None:
        """Return what closes the open segment now (`Segment.closed_by`), if anything does."""
        spec, recent = self.spec, [*self.out.sampled, sampled][-self.spec.repeats:]
        if self.out.segments[-1].size >= spec.size:
            return "limit"
        if spec.repeats and recent == [sampled] * spec.repeats:
            return "repetition"
        return "end" if spec.early_end and sampled == self.end_id else None

    def advance(self, sampled: int) -> bool:
        """Record the id for a sampled one; return whether a latent is fed in place of its embedding."""
        recorded, feeds_latent, self.just_closed, self.forced = sampled, False, None, None
        if self.inside:
            segment = self.out.segments[-1]
            if closed_by := self.closing(sampled):
                segment.closed_by, self.inside, self.just_closed = closed_by, False, segment
                self.forced = None if closed_by == "end" else self.after_id
                if self.spec.force_end:
                    recorded = self.end_id
            else:
                recorded, feeds_latent = self.pad_id, True
                segment.size += 1
        if not self.inside and not feeds_latent and recorded == self.start_id:
            self.inside = True
            feeds_latent = self.spec.overwrite_start
            self.out.segments.append(Segment(len(self.out.ids) + (not feeds_latent), int(feeds_latent)))
        self.out.ids.append(recorded)
        self.out.sampled.append(sampled if feeds_latent else recorded)
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


def find_file(path: str, name: str) -> str | None:
    """Return where a checkpoint's file is, if it has one."""
    from transformers.utils import cached_file
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


def load_head(path: str, device: torch.device,
              dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return LVR's head [.., hidden] -> [.., hidden] (src/model/lvr_heads.py) if the checkpoint has one.

    It maps the output of a latent step before that is fed (so not the first latent of a segment); the logits
    come from the same state. The weights' names tell its form.
    """
    import torch.nn.functional as F
    from safetensors import safe_open

    head = {}
    for file in sorted(find_checkpoint(path).glob("*.safetensors")):
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
