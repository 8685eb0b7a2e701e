"""Decode items once and keep what their imaginations were: states by kind in a store (`utils.probe.states`).

One latent family or text; every item gets a line, whether it imagined anything or not, so that emission can
be counted and a killed run goes on.
"""
import argparse
from bisect import bisect_left

import numpy as np
import torch

from utils.decode import decode, prefill
from utils.items import prompt_of
from utils.latent_families import Generation, Intervention, LatentSpec, latent_ids
from utils.probe.input_edits import open_shown
from utils.probe.states import StateWriter, text_hash
from utils.qwen import Qwen, encode, image_features
from utils.spans import CLOSE, find_spans


def capture(qwen: Qwen, spec: LatentSpec | None, batch: list[dict], n_steps: int, args: argparse.Namespace,
            writer: StateWriter, whole: bool = True) -> None:
    """Decode a batch of items, unless the store has them, and add their states; `args` are probe.py's.
    `whole`: inner states and those of pads too.

    A batch that a kill left half done is decoded again whole: a state's last bits depend on its batch.
    """
    if all(item["id"] in writer for item in batch):
        return
    images = [open_shown(item) for item in batch]
    prompts = [prompt_of(qwen.tokenizer, item, len(pictures), args.system, args.suffix)
               for item, pictures in zip(batch, images)]
    inputs = encode(qwen, prompts, images)
    with torch.no_grad():
        features = iter(image_features(qwen, inputs))
    begun, everyone = prefill(qwen, inputs), list(range(len(batch)))
    rows, _ = decode(qwen, begun.select(everyone), args.max_new_tokens, spec, capture=True,
                     with_slots=whole and spec is not None)
    dummies = feed_pads(qwen, spec, begun, rows) if whole and spec else [None] * len(batch)
    for item, row, pictures, prompt, dummy in zip(batch, rows, images, prompts, dummies):
        visual = [next(features) for _ in pictures][0]
        if item["id"] not in writer:
            tensors, facts = collect(qwen, spec, row, visual, n_steps, dummy)
            writer.add(item["id"], {kind: x.float().cpu().numpy() for kind, x in tensors.items()},
                       prompt_sha=text_hash(prompt), n_ids=len(row.ids), finish=row.finish, **facts)


def collect(qwen: Qwen, spec: LatentSpec | None, row: Generation, visual: torch.Tensor, n_steps: int,
            dummy: Generation | None) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the states of one run by kind, and the facts of its line."""
    found = find_steps(qwen, spec, row)
    segments = [segment.size for segment in row.segments if segment.size]
    if not found:
        return {}, {"emitted": False, "segments": segments, "imagination": None}
    steps, after, imagination = found
    # a small image has fewer: none is taken twice, which would look like a state that stays
    n = min(n_steps, len(visual))
    places = ((np.arange(n) + 0.5) / n * len(visual)).astype(int)
    tensors = {"image": visual[places], "text": row.states[after[:n_steps]],
               "start": row.states[[max(steps[0] - 1, 0)]]}
    if spec is None:
        tensors["imagined"] = row.states[steps[:n_steps]]
    else:
        latents = [j for s in row.segments for j in range(s.start, s.start + s.size)]
        tensors |= {"latent": row.states[latents], "fed": row.fed}
        if row.slots:
            tensors["inner"] = torch.stack(row.slots)
        if dummy is not None:
            first = next(s for s in dummy.segments if s.size)
            tensors["dummy_pad"] = dummy.states[first.start:first.start + first.size]
    tensors = {kind: x for kind, x in tensors.items() if len(x)}
    return tensors, {"emitted": True, "segments": segments, "imagination": imagination}


def feed_pads(qwen: Qwen, spec: LatentSpec, begun, rows: list[Generation]) -> list[Generation | None]:
    """Decode again up to the end of the first segment with the pad's own embedding fed at every latent step:
    what as many steps make of themselves without feedback. None for rows without latents."""
    ends = [next((s.start + s.size for s in row.segments if s.size), 0) for row in rows]
    if not any(ends):
        return [None] * len(rows)
    pad = qwen.model.get_input_embeddings().weight[latent_ids(qwen.tokenizer, spec)[1]].detach()
    arm = Intervention(feed=lambda z, segment, step: pad)
    again, _ = decode(qwen, begun, max(ends), spec, [arm] * len(rows), capture=True)
    return [row if end and any(s.size for s in row.segments) else None for end, row in zip(ends, again)]


def find_steps(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> tuple[list[int], list[int],
                                                                              str | None] | None:
    """Return the steps of the first imagination, the ordinary steps after it, and its text; None if there is
    none."""
    end_of_text = len(row.ids) - (row.finish == "stop")
    if spec is not None:
        # an end token right after the start leaves none
        first = next((s for s in row.segments if s.size), None)
        if first is None:
            return None
        latents = {j for s in row.segments for j in range(s.start, s.start + s.size)}
        last = first.start + first.size
        after = [j for j in range(last + spec.force_end, end_of_text) if j not in latents]
        return list(range(first.start, last)), after, None
    text = qwen.tokenizer.decode(row.ids, skip_special_tokens=True)
    spans = find_spans(text)
    if not spans:
        return None

    def n_tokens(n_characters: int) -> int:
        return bisect_left(range(len(row.ids)), n_characters,
                           key=lambda n: len(qwen.tokenizer.decode(row.ids[:n], skip_special_tokens=True)))

    start, end = spans[0]
    return (list(range(n_tokens(start), n_tokens(end))), list(range(n_tokens(end + len(CLOSE)), end_of_text)),
            text[start:end])
