"""One batched decoding loop for text and for latent imagination, over the unpatched model.

A latent step is a one-token step whose input embedding is the previous last hidden state after the final
norm (in the kind "ids" its token's embedding): position +1, one key-value slot. `utils.latent_families` has
the rest. With `spec=None` the loop equals `model.generate(do_sample=False)` bit for bit, for up to
PREFILL_TOKENS.

A prompt is read once (`prefill`) and its rows are repeated (`State.select`): one batch holds the clean run
and every `Intervention`.
"""
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from utils.latent_families import (Generation, Intervention, LatentIds, LatentSpec, RowState, latent_ids,
                                   special_id)
from utils.qwen import IMAGE_TOKEN, Qwen, multiplied_patches

PREFILL_TOKENS = 4096  # read at once, padding included; more gains nothing


@dataclass
class State:
    """Rows that have been read up to some token: hidden [B, hidden] after the final norm and positions [3, B,
    1], both of each row's last token; mask [B, C] over the cache's columns; is_image [B, C of the prompt]."""

    cache: object
    hidden: torch.Tensor | None
    mask: torch.Tensor
    positions: torch.Tensor
    is_image: torch.Tensor

    def select(self, rows: list[int]) -> "State":
        """Return these rows in this order, repeated as often as named, with their own cache."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        state = replace(self, cache=cache)
        state.keep(rows)
        return state

    def keep(self, rows: list[int], trim: bool = False) -> None:
        """Keep these rows in this order, with `trim` without the first columns that none of them sees."""
        index = torch.tensor(rows, device=self.mask.device)
        first = int(self.mask[index].any(0).int().argmax()) if trim else 0
        self.hidden = None if self.hidden is None else self.hidden[index]
        self.mask, self.positions = self.mask[index, first:], self.positions[:, index]
        self.is_image = self.is_image[index, first:]
        for layer in self.cache.layers:  # one by one: memory for one more layer is enough
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]

    def hide_images(self, rows: list[int]) -> None:
        """Hide the image tokens from all that these rows read later."""
        for row in rows:
            self.mask[row, :self.is_image.shape[1]][self.is_image[row]] = 0

    def hide_all_but(self, kept: dict[int, list[int]]) -> None:
        """Hide from all that these rows read later what they have read, except the prompt before the first
        image, which has seen none, and the columns that are kept."""
        for row, columns in kept.items():
            visible = torch.zeros_like(self.mask[row])
            visible[:self.is_image.shape[1]] = self.is_image[row].cumsum(0) == 0
            visible[columns] = 1
            self.mask[row] *= visible


@torch.no_grad()
def prefill(qwen: Qwen, inputs: dict) -> State:
    """Read a left-padded batch from `utils.qwen.encode`, or its "inputs_embeds" [B, L, hidden] if given."""
    n_rows, length = inputs["input_ids"].shape
    size = max(1, PREFILL_TOKENS // length)
    if size >= n_rows:
        cache, hidden = read_prompts(qwen, inputs)
    else:
        parts = [read_prompts(qwen, part) for part in split_rows(qwen, inputs, size)]
        cache = join_caches([part for part, _ in parts], length)
        hidden = torch.cat([last for _, last in parts])
    return State(cache, hidden, inputs["attention_mask"], inputs["position_ids"][..., -1:],
                 inputs["input_ids"] == special_id(qwen.tokenizer, IMAGE_TOKEN))


def read_prompts(qwen: Qwen, inputs: dict) -> tuple[DynamicCache, torch.Tensor]:
    """Return the cache and the last states [B, hidden] of one forward pass."""
    keys = ["inputs_embeds"] if "inputs_embeds" in inputs else ["input_ids", "pixel_values", "image_grid_thw"]
    prompt = {name: inputs[name] for name in (*keys, "attention_mask", "position_ids") if name in inputs}
    with multiplied_patches(qwen.model):
        out = qwen.model.model(**prompt, use_cache=True)
    return out.past_key_values, out.last_hidden_state[:, -1]


def split_rows(qwen: Qwen, inputs: dict, size: int) -> Iterator[dict]:
    """Yield every `size` rows of a batch, without columns of only padding."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")
    n_visual = (inputs["input_ids"] == special_id(qwen.tokenizer, IMAGE_TOKEN)).sum(1).cumsum(0).tolist()
    grids = inputs.get("image_grid_thw", inputs["input_ids"].new_zeros(0, 3))
    ends = [0, *grids.prod(1).cumsum(0).tolist()]  # of each image's patches
    images = [ends.index(n * qwen.image_processor.merge_size**2) for n in [0, *n_visual]]  # before each row
    for first in range(0, len(n_visual), size):
        last = min(first + size, len(n_visual))
        longest = int(inputs["attention_mask"][first:last].sum(1).max())
        part = {name: inputs[name][..., first:last, -longest:] for name in names}
        if "inputs_embeds" in inputs:
            part["inputs_embeds"] = inputs["inputs_embeds"][first:last, -longest:]
        if images[first] < images[last]:
            part["image_grid_thw"] = grids[images[first]:images[last]]
            part["pixel_values"] = inputs["pixel_values"][ends[images[first]]:ends[images[last]]]
        yield part


def join_caches(parts: list[DynamicCache], length: int) -> DynamicCache:
    """Return one cache of `length` columns with all rows, aligned on the right."""
    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([F.pad(tensor, (0, 0, length - tensor.shape[2], 0)) for tensor in tensors])

    cache = DynamicCache()
    for n, layers in enumerate(zip(*(part.layers for part in parts), strict=True)):
        cache.update(joined([layer.keys for layer in layers]), joined([layer.values for layer in layers]), n)
    return cache


@torch.no_grad()
def prefill_blocks(qwen: Qwen, state: State, blocks: list[list[int]]) -> tuple[torch.Tensor, State]:
    """Read one block of ids per row, of any lengths of at least one; `state` is used up. Returns the states
    [B, longest, hidden] at the ids, padded on the right, and the state after them."""
    lengths = torch.tensor([len(block) for block in blocks], device=state.mask.device)
    if len(blocks) != len(state.mask) or not lengths.all():
        raise ValueError(f"{len(blocks)} blocks of {lengths.tolist()} ids for {len(state.mask)} rows, "
                         "expected one block of at least one id per row")
    width, fill = int(lengths.max()), qwen.tokenizer.pad_token_id
    ids = torch.tensor([block + [fill] * (width - len(block)) for block in blocks], device=lengths.device)
    steps = torch.arange(width, device=lengths.device)
    mask = torch.cat([state.mask, (steps < lengths[:, None]).to(state.mask)], dim=1)
    out = qwen.model.model(input_ids=ids, attention_mask=mask, position_ids=state.positions + 1 + steps,
                           past_key_values=state.cache, use_cache=True)
    hidden = out.last_hidden_state
    last = hidden[torch.arange(len(blocks)), lengths - 1]
    return hidden, State(out.past_key_values, last, mask, state.positions + lengths[:, None], state.is_image)


def truncate_cache(after: State, before: State, kept: list[int]) -> State:
    """Return `after`, which decoding from `before` led to, as it was when row i had read `kept[i]` new ids:
    later columns are hidden, which equals removing them up to rounding. The result has no `hidden`."""
    mask, first = after.mask.clone(), before.mask.shape[1]
    for row, n in enumerate(kept):
        if not 0 <= n <= mask.shape[1] - first:
            raise ValueError(f"row {row}: {n} ids to keep of {mask.shape[1] - first} that were read")
        mask[row, first + n:] = 0
    return State(after.cache, None, mask, before.positions + torch.tensor(kept, device=mask.device)[:, None],
                 after.is_image)


# a row in `decode`'s batch: `trace` keeps what is captured, `limit` is the most ids it may have
Lane = NamedTuple("Lane", [("row", RowState), ("arm", Intervention), ("trace", dict), ("limit", int)])


def choose_ids(qwen: Qwen, state: State, batch: list[Lane], ids: LatentIds,
               capture: bool) -> dict[int, torch.Tensor]:
    """Add the next id to each unfinished row of `decode`'s batch; return what is fed in place of its
    embedding, by row."""
    logits, vectors = qwen.model.lm_head(state.hidden), {}
    sampled = logits.argmax(-1).tolist()
    for i, (row, arm, trace, limit) in enumerate(batch):
        if row.done:
            continue
        if row.advance(arm.next_id(logits[i], sampled[i], row.out, row.forced)):
            own = qwen.model.get_input_embeddings().weight[row.out.ids[-1]] if ids.slots else state.hidden[i]
            vectors[i] = arm.feed(own, *row.place) if arm.feed else own
            trace["fed"].append(vectors[i])
        if row.just_closed and "images" in arm.hide:
            state.hide_images([i])
        if row.just_closed and "latents" in arm.hide:
            begin = state.mask.shape[1] + 1 - len(row.out.ids) + row.just_closed.start
            state.mask[i, begin:begin + row.just_closed.size] = 0
        if capture:
            trace["states"].append(state.hidden[i])
        row.done |= len(row.out.ids) == limit
    return vectors


@torch.no_grad()
def decode(qwen: Qwen, state: State, max_new_tokens: int, spec: LatentSpec | None = None,
           arms: list[Intervention] | None = None, capture: bool = False, with_slots: bool = False,
           limits: list[int] | None = None) -> tuple[list[Generation], State]:
    """Decode rows that were read, greedily except for their interventions (`arms`); `state` is used up.

    `max_new_tokens` counts latent steps too. `capture` keeps states and fed vectors, `with_slots` the inputs
    of every layer at latents. Returns the rows, and the state after all ids but the last of the longest row.
    With `limits`, row i has at most limits[i] ids, and a row that has ended leaves the batch, so that others
    do not wait for it; the state is then that of the last rows alone.
    """
    arms = arms or [Intervention()] * len(state.mask)
    ids = latent_ids(qwen.tokenizer, spec) if spec else LatentIds()
    rows = [RowState(arm.spec or spec, ids, qwen.eos_ids) for arm in arms]
    traces = [defaultdict(list) for _ in rows]
    limits_of = limits or [max_new_tokens] * len(rows)
    batch = [Lane(*parts) for parts in zip(rows, arms, traces, limits_of, strict=True)]
    state = replace(state, mask=state.mask.clone())
    for _ in range(max_new_tokens):
        vectors = choose_ids(qwen, state, batch, ids, capture)
        going = [i for i, lane in enumerate(batch) if not lane.row.done]
        if not going:
            break
        if limits and len(going) < len(batch):
            state.keep(going, trim=True)
            vectors = {k: vectors[i] for k, i in enumerate(going) if i in vectors}
            batch = [batch[i] for i in going]
        last = torch.tensor([lane.row.out.ids[-1] for lane in batch], device=state.hidden.device)
        embeds = qwen.model.get_input_embeddings()(last)
        for i, vector in vectors.items():
            embeds[i] = vector.to(embeds)
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(batch), 1)], dim=1)
        state.positions = state.positions + 1
        put = {i: slots for i in vectors if batch[i].arm.slot
               and (slots := batch[i].arm.slot(*batch[i].row.place)) is not None}
        seen = [] if with_slots and vectors else None
        with layer_inputs(qwen.model, put, seen):
            out = qwen.model.model(inputs_embeds=embeds[:, None], attention_mask=state.mask,
                                   position_ids=state.positions, past_key_values=state.cache, use_cache=True)
        state.hidden, state.cache = out.last_hidden_state[:, -1], out.past_key_values
        if qwen.latent_head is not None and vectors:  # LVR's: for the output of latent steps
            index = torch.tensor(list(vectors), device=state.hidden.device)
            heads = qwen.latent_head(state.hidden[index]).to(state.hidden)
            state.hidden = state.hidden.index_put((index,), heads)
        for i in vectors if seen else ():
            batch[i].trace["slots"].append(torch.stack([layer[i] for layer in seen]))
    for row, trace in zip(rows, traces):
        if trace["states"]:
            row.out.states = torch.stack(trace["states"])
            row.out.fed = torch.stack(trace["fed"]) if trace["fed"] else row.out.states[:0]
        row.out.slots = trace["slots"] if with_slots else None
    return [row.out for row in rows], state


@contextmanager
def layer_inputs(model: torch.nn.Module, put: dict[int, Sequence[torch.Tensor | None]] | None = None,
                 seen: list[torch.Tensor] | None = None) -> Iterator[None]:
    """Site `slot`: replace and record the inputs of the decoder's layers in one-token steps. `put[row][n]`
    [hidden] goes into layer n at `row` (None: no change); `seen` receives [B, hidden] per layer. A donor's
    cached keys would be wrong: they are rotated by their own position."""
    layers = model.model.language_model.layers
    for row, states in (put or {}).items():
        if len(states) != len(layers):
            raise ValueError(f"row {row}: states for {len(states)} layers, expected {len(layers)}")

    def read(n: int):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if put:
                hidden = hidden.clone()
                for row, states in put.items():
                    if states[n] is not None:
                        hidden[row, -1] = states[n].to(hidden)
            if seen is not None:
                seen.append(hidden[:, -1])
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        return hook

    needed = layers if put or seen is not None else []
    handles = [layer.register_forward_pre_hook(read(n), with_kwargs=True) for n, layer in enumerate(needed)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
