"""The families of latent imagination: their tokens, and how a segment of latents begins and ends.

Unlike in the families' own code, a segment records pads, not junk samples; an end of text sampled inside a
segment does not stop the row, nor does a start re-open it; every row has its own state.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from utils.jsonl import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentSpec:
    """How a family decodes latents. `tokens`: in the order of the training code, which fixes their ids;
    `size`: the number K of latents per segment; `overwrite_start`: the first latent replaces the start
    token's embedding; `force_end`: the end token follows K latents, whatever was sampled; `early_end`: a
    sampled end token closes the segment before K; `repeats`: so does an id that is sampled so often in a row
    (0: never), as if K were reached; `after_limit`: its first token follows such an end, whatever was
    sampled; `force_start`: the reply begins with `opening` (default: the start token), whatever was sampled.

    In the kind "ids" nothing is fed back: latents are `slots`, tokens that are sampled like words and read by
    their own embedding. A segment is a run of them, after the start token if there is one; K is what training
    writes, and no limit."""

    name: str
    tokens: tuple[str, ...]
    start: str
    pad: str
    end: str
    size: int
    overwrite_start: bool = False
    force_end: bool = True
    early_end: bool = True
    repeats: int = 0
    after_limit: str = ""
    force_start: bool = False
    slots: tuple[str, ...] = ()
    opening: str = ""


def family(name: str, size: int, tokens: str, **rules) -> LatentSpec:
    """Return the family of `tokens`, in order, as "role:token" or, without a role, "token"."""
    words = [word.rpartition(":")[::2] for word in tokens.split()]
    slots = tuple(token for role, token in words if role == "slot")
    start, pad, end = (dict(words).get(role, "") for role in ("start", "pad", "end"))
    return LatentSpec(name, tuple(token for _, token in words), start, pad or slots[0], end, size,
                      **{"slots": slots, "force_end": not slots, **rules})


def anchor(name: str, n: int) -> str:
    return f"<|anchor_start|>{f'<|{name}_pad|>' * n}<|anchor_end|>"  # a segment of CoVT's


# Orders: NOVAglow646/Monet and UMass-Embodied-AGI/Mirage src/main.py; VincentLeebang/lvr, TungChintao/SkiLa,
# ybb6/laser src/train/train_*.py; Accio-Lab/SwimBird src/train/train.py; Wakals/CoVT src/training/train.py;
# Svardfox/LaViT src/train.py; arijitray1993/mull lmms_eval/models/chat/qwen2_5_vl_mmlatentdiscrete.py
MONET = "pad:<abs_vis_token_pad> start:<abs_vis_token> end:</abs_vis_token> <observation> </observation>"
MIRAGE = "pad:<|latent_pad|> start:<|latent_start|> end:<|latent_end|>"
PRESETS = {spec.name: spec for spec in (
    family("monet_vllm", 10, MONET, overwrite_start=True),  # Monet's vLLM runner, K = LATENT_SIZE
    family("monet_capimagine", 10, MONET),  # its README's loop, MAX_LATENT_LEN
    family("mirage", 4, MIRAGE),  # latent_size of its training
    family("ilvr", 8, MIRAGE, early_end=False),  # XD111ds/ILVR's LatentTemplateLogitsProcessor
    family("lvr", 8, "start:<|lvr_start|> pad:<|lvr|> <|lvr_latent_end|> end:<|lvr_end|>",
           force_end=False, early_end=False),  # by steps, as in the paper
    # 2 x sketch_token_num in src/model/skila.py, 27 in its training script; SwimBird's loop is the same
    family("skila", 54, "pad:<|skila|> start:<|sketch_start|> end:<|sketch_end|>"),
    family("swimbird", 64, "pad:<|latent|> start:<|latent_start|> end:<|latent_end|>"),
    family("laser", 16, "start:<|laser_start|> pad:<|laser|> end:<|laser_end|>", repeats=3,
           after_limit="<answer>", force_start=True),
    # the kind "ids"; openings: get_comt_data_in_response of CoVT's src/training/data.py, with the anchors of
    # CoVT-7B-seg_depth_dino_edge; the reply in LaViT's src/dataset.py; Mull-Tokens' README (stage 2)
    family("covt", 8, "start:<|anchor_start|> end:<|anchor_end|>" + "".join(
        f" slot:<|{name}_pad|>" for name in "sam dino depth sd intern pidinet siglip metaclip".split()),
           opening=f"<think> Because the segmentation of the image is {anchor('sam', 8)}, the depth map of "
           f"the image is {anchor('depth', 4)}, the perception feature of the image is {anchor('dino', 4)}, "
           f"and the edge map of the image is {anchor('pidinet', 4)}.  </think>\n"),
    family("lavit", 4, "slot:<lvr1> slot:<lvr2> slot:<lvr3> slot:<lvr4>",
           opening="<lvr1><lvr2><lvr3><lvr4>"),
    family("mull", 20, "slot:<|latent_pad|> <|latent_start|> <|latent_end|> <|latent_image|>",
           force_start=True, opening=f"<think>{'<|latent_pad|>' * 20}</think>\n"))}
FED_BACK = sorted(name for name, spec in PRESETS.items() if not spec.slots)


def spec_of(name: str, size: int | None, force_start: bool = False) -> LatentSpec | None:
    """Return the family that --latent names ("off": None), with `size` latents if given; DataError for a
    start that is forced without a family, or a size where the model samples as many as it likes."""
    spec = PRESETS.get(name)
    if force_start and spec is None:
        raise DataError("--force_start: no start of latents with --latent off; expected a family")
    if size and spec and spec.slots:
        raise DataError(f"--latent_size {size}: {name} samples any number of latents; leave the flag out")
    return spec and replace(spec, size=size or spec.size, force_start=force_start or spec.force_start)


@dataclass
class Segment:
    """Consecutive latents: index of the first in `Generation.ids`, their number, and what closed them."""

    start: int
    size: int = 0
    # "limit" (K reached), "repetition", "end" (end token sampled), "word" (another), "max_tokens" (left open)
    closed_by: str = "max_tokens"


@dataclass
class Generation:
    """One decoded row. Latent positions hold the pad id in `ids`; a row that stopped ends with its end id.

    `states` [len(ids), hidden]: the post-norm states that led to each id; at a latent that is fed back, the
    latent before any edit. `fed` [n_latents, hidden]: the vectors fed, after the edit. `slots`: for each
    latent that was read, the inputs of the decoder's layers [layers, hidden]. `n_forbidden`: ids that would
    have come next but for `Intervention.forbid`. `sampled`: `ids`, but what was sampled at latents.
    """

    ids: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop"
    segments: list[Segment] = field(default_factory=list)
    states: torch.Tensor | None = None
    fed: torch.Tensor | None = None
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

    def next_id(self, logits: torch.Tensor, likeliest: int, row: Generation, forced: list[int]) -> int:
        """Return the next id of a row: the first forced one, or the chosen or likeliest of those that are not
        forbidden."""
        choose = self.choose or (lambda logits, n: int(logits.argmax()))
        found = self.choose(logits, len(row.ids)) if self.choose else likeliest
        found = forced[0] if forced else found
        if self.forbid and self.forbid(row, found):
            row.n_forbidden, logits = row.n_forbidden + 1, logits.clone()
            while self.forbid(row, found):
                logits[found] = float("-inf")
                found = choose(logits, len(row.ids))
        return found


class LatentIds(NamedTuple):
    """The ids of a family's tokens, None for a mark that it lacks: `slots` are those of the kind "ids",
    `opening` what `force_start` writes (empty: `start`), `after` the first of `after_limit`."""

    start: int | None = None
    pad: int | None = None
    end: int | None = None
    slots: frozenset[int] = frozenset()
    opening: tuple[int, ...] = ()
    after: int | None = None


class RowState:
    """The state machine of one row: which id is recorded, and whether a latent is fed."""

    def __init__(self, spec: LatentSpec | None, ids: LatentIds, eos_ids: list[int]):
        self.spec, self.ids, self.eos_ids = spec, ids, eos_ids
        self.inside = self.done = False
        opening = (ids.opening or (ids.start,)) if spec and spec.force_start else ()
        self.forced = [i for i in opening if spec.size or i not in ids.slots]  # to come
        self.just_closed: Segment | None = None  # by the last id
        self.out = Generation()

    @property
    def place(self) -> tuple[int, int]:
        """Index of the last segment, and of the last latent in it."""
        return len(self.out.segments) - 1, self.out.segments[-1].size - 1

    def closing(self, sampled: int) -> str | None:
        """Return what closes the open segment now (`Segment.closed_by`), if anything does."""
        spec, recent = self.spec, [*self.out.sampled, sampled][-self.spec.repeats:]
        if self.out.segments[-1].size >= spec.size and (spec.force_end or not self.ids.slots):
            return "limit"
        if spec.repeats and recent == [sampled] * spec.repeats:
            return "repetition"
        if spec.early_end and sampled == self.ids.end:
            return "end"
        return "word" if self.ids.slots and sampled not in self.ids.slots else None

    def advance(self, sampled: int) -> bool:
        """Record the id for a sampled one; return whether it is a latent, fed in place of its embedding."""
        recorded, is_latent, self.just_closed = sampled, False, None
        self.forced = self.forced[1:] if self.forced[:1] == [sampled] else []
        if self.inside:
            segment = self.out.segments[-1]
            if closed_by := self.closing(sampled):
                segment.closed_by, self.inside, self.just_closed = closed_by, False, segment
                if self.ids.after is not None and closed_by != "end":
                    self.forced = [self.ids.after]
                if self.spec.force_end:
                    recorded = self.ids.end
            else:
                recorded, is_latent = sampled if self.ids.slots else self.ids.pad, True
                segment.size += 1
        if not (self.inside or is_latent) and (recorded == self.ids.start or recorded in self.ids.slots):
            self.inside, is_latent = True, recorded in self.ids.slots or self.spec.overwrite_start
            self.out.segments.append(Segment(len(self.out.ids) + (not is_latent), int(is_latent)))
        self.out.ids.append(recorded)
        self.out.sampled.append(sampled if is_latent else recorded)
        if not self.inside and recorded in self.eos_ids:
            self.done, self.out.finish = True, "stop"
        return is_latent


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


@lru_cache(64)
def latent_ids(tokenizer, spec: LatentSpec) -> LatentIds:
    """Return the ids of a family's tokens; DataError unless they are in order."""
    ids = [special_id(tokenizer, name) for name in spec.tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(f"{spec.name}: tokens {spec.tokens} have ids {ids}, expected consecutive ids in that "
                        "order; this checkpoint has another family's")
    by_name, after = dict(zip(spec.tokens, ids)), tokenizer(spec.after_limit).input_ids
    return LatentIds(*map(by_name.get, (spec.start, spec.pad, spec.end)),
                     frozenset(map(by_name.get, spec.slots)), tuple(tokenizer(spec.opening).input_ids),
                     after[0] if after else None)


def last_latent(row: Generation) -> int:
    """Return the number of ids up to the end of the last segment; 0 without a segment."""
    return max((segment.start + segment.size for segment in row.segments), default=0)


def latent_steps(row: Generation) -> list[int]:
    """Return the index in a row's ids of every latent."""
    return [step for segment in row.segments for step in range(segment.start, segment.start + segment.size)]


def clean_text(tokenizer, ids: list[int], spec: LatentSpec | None = None) -> str:
    """Decode recorded ids without latents and special tokens."""
    if spec:
        latent = latent_ids(tokenizer, spec)
        left_out = latent.slots | {latent.start, latent.pad, latent.end}
        ids = [i for i in ids if i not in left_out]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
