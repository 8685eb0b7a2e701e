"""Capture states and store them: per sample one safetensors file, and one JSONL line that marks it complete.

    folder/meta.json                       what all samples share and may not change: model, family, prompts
    folder/states-<shard>-of-<n>.jsonl     {"key", "file", "tensors": {name: shape}, ...facts}; append-only
    folder/<aa>/<sha256 of the key>.safetensors

Tensors are [steps, d] or, for "inner", [steps, layers, d], by kind:

    latent     raw latents: states after the final norm, as a latent step feeds them, of all segments (kind
               "ids": the states that chose the slots)
    fed        what was fed at the latents, after any edit
    dummy_pad  states where the pad's own embedding was fed instead
    imagined   states of the tokens of the first text imagination
    start      the state that chose to imagine [1, d]
    text       ordinary steps after the first imagination
    image      visual tokens as they enter the language model
    inner      inputs of every decoder layer at the latent positions

A sample's file is written before its line: after a kill it is either complete or captured again.
"""
import argparse
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from tqdm import tqdm

from utils.decode import State, decode, prefill
from utils.items import prompt_of
from utils.journal import Journal, read_settings
from utils.jsonl import DataError, replace_file
from utils.latent_families import Generation, Intervention, LatentSpec, latent_ids, latent_steps, special_id
from utils.probe.similarity import Cell
from utils.qwen import IMAGE_TOKEN, Qwen, encode, image_features
from utils.rows import CLOSE, find_spans

KINDS = ("latent", "fed", "imagined", "text", "image", "inner", "dummy_pad", "start")
# analysed kind -> kinds in the store, of which a store has one
STORED = {"imagination": ("latent", "imagined"), "text": ("text",), "image": ("image",), "start": ("start",),
          "dummy_pad": ("dummy_pad",), "inner": ("inner",)}
NAME = "states"
BUDGET = 1 << 30  # bytes of states held at once by `States.cells`


def batched(rows: list[dict], size: int, desc: str) -> tqdm:
    return tqdm([rows[i:i + size] for i in range(0, len(rows), size)], desc=desc)


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(key: str) -> str:
    return f"{text_hash(key)[:2]}/{text_hash(key)}.safetensors"


# ---- the store
class StateWriter(Journal):
    """Appends samples to a store; `key in writer` is whether it has one."""

    def __init__(self, folder: str | Path, settings: dict | None = None):
        super().__init__(folder, settings, NAME)

    def add(self, key: str, tensors: dict[str, np.ndarray], **facts) -> None:
        """Write the states of a sample as float32, then its line."""
        for name, states in tensors.items():
            if name not in KINDS or states.ndim not in (2, 3) or not np.isfinite(states).all():
                raise ValueError(f"{key}: {name} {states.shape}: expected finite [steps, (layers,) d] of one "
                                 f"of {', '.join(KINDS)}")
        data = to_bytes({name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()})
        replace_file(self.folder / file_name(key), lambda file: file.write(data), "wb")
        shapes = {name: list(x.shape) for name, x in tensors.items()}
        self.append({"key": key, "file": file_name(key), "tensors": shapes, **facts})


class States:
    """Reads a store: `records` by key; the last line of a key counts."""

    def __init__(self, folder: str | Path):
        self.folder, self.records = Path(folder), {}
        self.settings = read_settings(folder)
        paths = sorted(self.folder.glob(f"{NAME}-*.jsonl"))
        if not paths:
            raise DataError(f"{folder}: no {NAME}-*.jsonl; expected a store written by probe.py")
        for path in paths:
            with open(path, "rb") as file:
                for n, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break  # being written, or torn by a kill
                    record = read_record(f"{path}:{n}", line)
                    self.records[record["key"]] = record

    def find(self, kind: str) -> str | None:
        """Return the name in the store of an analysed kind, if a sample has it."""
        return next((name for name in STORED[kind]
                     if any(name in r["tensors"] for r in self.records.values())), None)

    def open_sample(self, key: str) -> safe_open:
        path = self.folder / self.records[key]["file"]
        try:
            file = safe_open(path, framework="numpy")
            for kind, shape in self.records[key]["tensors"].items():
                if file.get_slice(kind).get_shape() != shape:
                    raise OSError(f"{kind} of another shape than {shape}")
            return file
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: states of {key!r} cannot be read ({error}); remove its line to capture "
                            "them again") from error

    def load(self, key: str, kind: str) -> np.ndarray | None:
        if kind not in self.records[key]["tensors"]:
            return None
        with self.open_sample(key) as file:
            return file.get_tensor(kind)

    def first_latents(self, key: str) -> np.ndarray | None:
        """Return the latents [k, hidden] of a sample's first segment, if it has any."""
        latents = self.load(key, "latent")
        return latents if latents is None else latents[:self.records[key]["segments"][0]]

    def cells(self, kind: str, keys: list[str], n_steps: int | None = None, budget: int = BUDGET,
              at_most: dict[str, int] | None = None) -> Iterator[Cell]:
        """Yield the cells of a kind, layer by layer, step by step, over those of `keys` that have the step.
        `at_most`: how many steps of a sample count, by key. Samples are opened once for as many cells as fit
        `budget` bytes: n samples x 10 steps x 28 layers x 3,584 need not fit in memory."""
        shapes = {i: self.records[key]["tensors"][kind] for i, key in enumerate(keys)
                  if kind in self.records[key]["tensors"]}
        if not shapes:
            return
        n_of_sample = {i: min(n, (at_most or {}).get(keys[i], n)) for i, (n, *_) in shapes.items()}
        step_shapes = {tuple(shape[1:]) for shape in shapes.values()}
        if len(step_shapes) != 1:
            raise DataError(f"{self.folder}: {kind} of {len(step_shapes)} shapes {sorted(step_shapes)}, "
                            "expected one; were two models mixed?")
        *n_layers, width = step_shapes.pop()
        longest = max(n_of_sample.values())
        steps = range(min(longest, n_steps or longest))
        places = [(layer, step) for layer in (range(*n_layers) if n_layers else [-1]) for step in steps]
        at_once = max(1, budget // (4 * width * len(shapes)))
        for first in range(0, len(places), at_once):
            yield from self.read_cells(kind, keys, n_of_sample, width, places[first:first + at_once])

    def read_cells(self, kind: str, keys: list[str], n_steps: dict[int, int], width: int,
                   places: list[tuple[int, int]]) -> Iterator[Cell]:
        """Yield the cells at some (layer, step), opening every sample once; `n_steps` by index."""
        instances = {step: np.array([i for i, n in n_steps.items() if n > step]) for _, step in places}
        blocks = [np.empty((len(instances[step]), width), dtype=np.float32) for _, step in places]
        filled = [0] * len(places)
        for i, n in n_steps.items():
            with self.open_sample(keys[i]) as file:
                tensor = file.get_slice(kind)
                for k, (layer, step) in enumerate(places):
                    if n > step:
                        part = tensor[step:step + 1] if layer < 0 else tensor[step:step + 1, layer:layer + 1]
                        blocks[k][filled[k]] = part.reshape(-1)
                        filled[k] += 1
        for k, (layer, step) in enumerate(places):
            yield Cell(layer, step, instances[step], blocks[k])
            blocks[k] = None  # a used cell need not stay in memory


def read_record(where: str, line: bytes) -> dict:
    try:
        record = json.loads(line)
        if record["file"] != file_name(record["key"]):
            raise ValueError("file and key differ")
        for kind, shape in record["tensors"].items():
            sizes_fit = len(shape) in (2, 3) and all(type(n) is int and n > 0 for n in shape)
            if kind not in KINDS or not sizes_fit:
                raise ValueError(f"tensor {kind!r} of shape {shape}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: damaged line {line[:40]!r} ({error}); remove it to capture its sample "
                        "again") from error
    return record


# ---- latents in a prompt
@torch.no_grad()
def embed_prompt(qwen: Qwen, inputs: dict, spec: LatentSpec | None = None,
                 latents: Iterable[torch.Tensor] = ()) -> torch.Tensor:
    """Return the embeddings [B, L, hidden] of `encode`'s prompts, with each row's `latents` [n, hidden] at
    its n latent pads."""
    embeds = qwen.model.get_input_embeddings()(inputs["input_ids"])
    if "pixel_values" in inputs:
        is_image = inputs["input_ids"] == special_id(qwen.tokenizer, IMAGE_TOKEN)
        features = torch.cat(image_features(qwen, inputs)).to(embeds)
        embeds = embeds.masked_scatter(is_image[..., None], features)
    for i, vectors in enumerate(latents):
        is_pad = inputs["input_ids"][i] == latent_ids(qwen.tokenizer, spec).pad
        if is_pad.sum() != len(vectors):
            raise DataError(f"row {i}: {len(vectors)} latents for {is_pad.sum()} latent pads in the prompt")
        embeds[i, is_pad] = vectors.to(embeds)
    return embeds


# ---- capture
def capture(qwen: Qwen, spec: LatentSpec | None, batch: list[dict], images: list[list[Image.Image]],
            n_steps: int, args: argparse.Namespace, writer: StateWriter, whole: bool = True) -> None:
    """Decode a batch of items and add their states; `whole`: also inner states and those with pads fed. A
    half done batch is decoded again as a whole: the last bits of a state depend on it."""
    prompts = [prompt_of(qwen.tokenizer, item, len(pictures), args.system, args.suffix)
               for item, pictures in zip(batch, images)]
    inputs = encode(qwen, prompts, images)
    with torch.no_grad():
        features = iter(image_features(qwen, inputs))
    begun = prefill(qwen, inputs)
    rows, _ = decode(qwen, begun.select(list(range(len(batch)))), args.max_new_tokens, spec, capture=True,
                     with_slots=whole and spec is not None)
    fed_back = spec is not None and not spec.slots  # else a slot is fed its own embedding anyway
    pad_runs = feed_pads(qwen, spec, begun, rows) if whole and fed_back else [None] * len(batch)
    for item, row, pictures, prompt, pad_run in zip(batch, rows, images, prompts, pad_runs):
        visual = [next(features) for _ in pictures][0]
        if item["id"] not in writer:
            tensors, facts = collect_states(qwen, spec, row, visual, n_steps, pad_run)
            writer.add(item["id"], {kind: x.float().cpu().numpy() for kind, x in tensors.items()},
                       prompt_sha=text_hash(prompt), n_ids=len(row.ids), finish=row.finish, **facts)


def collect_states(qwen: Qwen, spec: LatentSpec | None, row: Generation, visual: torch.Tensor, n_steps: int,
                   pad_run: Generation | None) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the states of one run by kind, and the facts of its line."""
    imagined = find_steps(qwen, spec, row)
    segments = [segment.size for segment in row.segments if segment.size]
    if imagined is None:
        return {}, {"emitted": False, "segments": segments, "imagination": None}
    # a small image has fewer tokens: none is taken twice, which would look like a constant state
    n = min(n_steps, len(visual))
    places = ((np.arange(n) + 0.5) / n * len(visual)).astype(int)
    tensors = {"image": visual[places], "text": row.states[imagined.after[:n_steps]],
               "start": row.states[[max(imagined.steps[0] - 1, 0)]]}
    if spec is None:
        tensors["imagined"] = row.states[imagined.steps[:n_steps]]
    else:
        tensors |= {"latent": row.states[latent_steps(row)], "fed": row.fed}
        if row.slots:
            tensors["inner"] = torch.stack(row.slots)
        if pad_run is not None:
            first = next(s for s in pad_run.segments if s.size)
            tensors["dummy_pad"] = pad_run.states[first.start:first.start + first.size]
    tensors = {kind: x for kind, x in tensors.items() if len(x)}
    return tensors, {"emitted": True, "segments": segments, "imagination": imagined.text}


def feed_pads(qwen: Qwen, spec: LatentSpec, begun: State, rows: list[Generation]) -> list[Generation | None]:
    """Decode again up to the end of the first segment with the pad's own embedding fed at every latent step:
    the control without feedback."""
    ends = [next((s.start + s.size for s in row.segments if s.size), 0) for row in rows]
    if not any(ends):
        return [None] * len(rows)
    pad = qwen.model.get_input_embeddings().weight[latent_ids(qwen.tokenizer, spec).pad].detach()
    feed_pad = Intervention(feed=lambda z, segment, step: pad)
    again, _ = decode(qwen, begun, max(ends), spec, [feed_pad] * len(rows), capture=True)
    return [row if end and any(s.size for s in row.segments) else None for end, row in zip(ends, again)]


class Imagined(NamedTuple):
    """The steps of the first imagination of a reply, the ordinary steps after it, and its text."""

    steps: list[int]
    after: list[int]
    text: str | None


def find_steps(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> Imagined | None:
    """Return where a reply imagines, if it does."""
    end_of_text = len(row.ids) - (row.finish == "stop")
    if spec is not None:
        first = next((s for s in row.segments if s.size), None)  # an end right after the start: no latents
        if first is None:
            return None
        latents = set(latent_steps(row))
        last = first.start + first.size
        return Imagined(list(range(first.start, last)),
                        [j for j in range(last + (spec.force_end or first.closed_by == "end"), end_of_text)
                         if j not in latents], None)
    text = qwen.tokenizer.decode(row.ids, skip_special_tokens=True)
    spans = find_spans(text)
    if not spans:
        return None

    def n_tokens(n_characters: int) -> int:
        return bisect_left(range(len(row.ids)), n_characters,
                           key=lambda n: len(qwen.tokenizer.decode(row.ids[:n], skip_special_tokens=True)))

    start, end = spans[0]
    return Imagined(list(range(n_tokens(start), n_tokens(end))),
                    list(range(n_tokens(end + len(CLOSE)), end_of_text)), text[start:end])
