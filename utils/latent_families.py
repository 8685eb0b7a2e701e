"""The families of latent imagination: their tokens, and how a segment of latents begins and ends.

Where this differs from the families' own code, on purpose: pads are recorded inside a segment instead of junk
samples; a sampled end of text inside a segment does not stop the row; a start sampled inside does not re-open
it; every row of a batch has a state of its own.

The optional head of LVR checkpoints, through which latents pass before they are fed (its
src/model/lvr_heads.py).

It is applied to what a latent step puts out, so that the first latent of a segment has not passed through it;
the logits after a latent step are taken from the same state, as in that repository's decoding by steps.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from utils.jsonl import DataError
from utils.qwen import Qwen, load, special_id


@dataclass(frozen=True)
class LatentSpec:
    """How a family decodes latents.

    `tokens` are its added tokens in the order in which its training code adds them (ids follow from the
    order); `size` is the number K of latents a segment; `overwrite_start` feeds the first latent in place of
    the start token's embedding; `force_end` writes the end token after K latents, else the sampled token
    stands; `early_end` lets a sampled end token close the segment before K.
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


# Orders: NOVAglow646/Monet src/main.py, UMass-Embodied-AGI/Mirage src/main.py, the LVR repository
# src/train/train_lvr.py.
MONET_TOKENS = ("<abs_vis_token_pad>", "<abs_vis_token>", "</abs_vis_token>", "<observation>",
                "</observation>")
MIRAGE_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
_MONET = LatentSpec("monet_vllm", MONET_TOKENS, "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>",
                    size=10, overwrite_start=True, force_end=True, early_end=True)
PRESETS = {spec.name: spec for spec in (
    _MONET,  # Monet's vLLM runner, K = LATENT_SIZE
    # CapImagine's README loop, MAX_LATENT_LEN = 10
    replace(_MONET, name="monet_capimagine", overwrite_start=False),
    LatentSpec("mirage", MIRAGE_TOKENS, "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>",
               # latent_size 4 of its training
               size=4, overwrite_start=False, force_end=True, early_end=True),
    LatentSpec("lvr", LVR_TOKENS, "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>",
               # decoding by steps, 8 in the paper
               size=8, overwrite_start=False, force_end=False, early_end=False))}


def spec_of(name: str, size: int | None) -> LatentSpec | None:
    """Return what --latent and --latent_size name: a family, with `size` latents a segment if given; None for
    "off"."""
    return None if name == "off" else replace(PRESETS[name], size=size or PRESETS[name].size)


@dataclass
class Segment:
    """A run of latents: index in `Generation.ids` of its first latent, number of latents, what closed it."""

    start: int
    size: int = 0
    # "limit" (K reached), "end" (end token sampled), "max_tokens" (never closed)
    closed_by: str = "max_tokens"


@dataclass
class Generation:
    """One decoded row. Latent positions hold the pad id in `ids`; a row that stopped ends with its
    end-of-text id.

    `states` [len(ids), hidden] are the post-norm states that led to each recorded id: at a latent position,
    the raw latent before any edit. `fed` [n_latents, hidden] are the vectors fed, after the edit. `logits`
    [len(ids), vocab]. `slots`: [layers, hidden] a latent position that was read, in order, the inputs of the
    decoder's layers there.
    """

    ids: list[int] = field(default_factory=list)
    finish: str = "length"  # or "stop"
    segments: list[Segment] = field(default_factory=list)
    states: torch.Tensor | None = None
    fed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    slots: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Intervention:
    """What is done to one row while it decodes; by default nothing.

    choose(logits [vocab], n) -> id      the nth new id (from 0) in place of the likeliest
    feed(z [hidden], segment, step) -> [hidden]           site `fed`: the vector fed in place of the latent z
    slot(segment, step) -> [layers, hidden] or None       site `slot`: every layer's input at that latent
                                                          position (of a list, those that are not None)
    hide: "latents", "images" or both    site `edge`: what tokens after a segment of latents cannot see
    spec: another form of the family for this row (other K, say)
    """

    choose: Callable[[torch.Tensor, int], int] | None = None
    feed: Callable[[torch.Tensor, int, int], torch.Tensor] | None = None
    slot: Callable[[int, int], Sequence[torch.Tensor | None] | None] | None = None
    hide: tuple[str, ...] = ()
    spec: LatentSpec | None = None


class RowState:
    """The latent state machine of one row: which id is recorded for a sampled one, and whether a latent is
    fed."""

    def __init__(self, spec: LatentSpec | None, ids: tuple[int, int, int] | None, eos_ids: list[int]):
        self.spec, self.eos_ids = spec, eos_ids
        self.start_id, self.pad_id, self.end_id = ids if ids else (None, None, None)
        self.inside = self.done = False
        self.just_closed: Segment | None = None  # by the last id
        self.out = Generation()

    def advance(self, sampled: int) -> bool:
        """Record the id for a sampled one; return True if a latent is fed at this position instead of its
        embedding."""
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


def latent_ids(tokenizer, spec: LatentSpec) -> tuple[int, int, int]:
    """Return the ids of (start, pad, end), after checking that all the family's tokens stand in its own
    order."""
    ids = [special_id(tokenizer, name) for name in spec.tokens]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(
            f"{spec.name}: tokens {spec.tokens} have ids {ids}, expected consecutive ones in that order; "
                        "this checkpoint was trained with another family's tokens")
    return tuple(special_id(tokenizer, name) for name in (spec.start, spec.pad, spec.end))


def load_with(spec: LatentSpec | None, path: str, dtype: str = "auto", min_pixels: int | None = None,
              max_pixels: int | None = None) -> Qwen:
    """Load a checkpoint that is to be decoded with these latents, and LVR's head if it has one; DataError for
    the tokens of another family."""
    qwen, head = load(path, dtype, None, min_pixels, max_pixels), load_head(path)
    qwen.latent_head = head and head.to(qwen.model.device, qwen.model.dtype)
    if spec:
        latent_ids(qwen.tokenizer, spec)  # now, before there is a run that remembers wrong flags
    return qwen


# ------------------------------------------------------------ heads


HEAD = "lvr_head."  # prefix of its weights in a checkpoint


class SimpleHead(torch.nn.Module):
    """LayerNorm and two linear layers around a GELU, [.., hidden] -> [.., hidden] (lvr_head_type "simple").
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.ln_q = torch.nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.GELU(),
                                       torch.nn.Linear(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x))


class GatedHead(torch.nn.Module):
    """A gated linear unit with biases, [.., hidden] -> [.., hidden] (lvr_head_type "glu"; its activation is
    Qwen's, SiLU)."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(hidden, intermediate) for _ in range(2))
        self.down_proj = torch.nn.Linear(intermediate, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def load_head(path: str) -> torch.nn.Module | None:
    """Return the head that a checkpoint holds under `lvr_head.`, in float32 on the CPU; None without one
    (LVR-7B's default).

    Told by its weights, not by the config. DataError for weights that are neither form.
    """
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in places.items() if name.startswith(HEAD)})
    else:
        files = ["model.safetensors"]
    state = {}
    for name in files:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with safe_open(file, "pt") as weights:
            state |= {key.removeprefix(HEAD): weights.get_tensor(key).float() for key in weights.keys()
                      if key.startswith(HEAD)}
    if not state:
        return None
    if "ln_q.weight" in state:
        head = SimpleHead(len(state["ln_q.weight"]))
    elif "gate_proj.weight" in state:
        head = GatedHead(*reversed(state["gate_proj.weight"].shape))
    else:
        raise DataError(
            f"{path}: weights {HEAD}* named {sorted(state)}, expected ln_q, mlp.0, mlp.2 or gate_proj, up_proj, "
                        "down_proj")
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)


def last_latent(row: Generation) -> int:
    """Return how many ids of a run come before what follows its last segment of latents (of none, with
    `markers_only`); 0 without a segment."""
    return max((segment.start + segment.size for segment in row.segments), default=0)
