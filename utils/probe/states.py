"""A store of captured states: one safetensors file a sample, one JSONL line that says it is whole. No torch
here.

    folder/meta.json                       what all samples share (model, family, prompt settings): must not
    change
    folder/states-<shard>-of-<n>.jsonl     {"key", "file", "tensors": {name: shape}, ...facts}; append-only
    folder/<aa>/<sha256 of the key>.safetensors

Tensors are [steps, d] or, for "inner", [steps, layers, d], by kind:

    latent     raw latents: states after the final norm, as a latent step feeds them (all segments one after
    another)
    fed        what was fed in their place, after any edit          dummy_pad  states where pads' own
    embeddings were fed
    imagined   states of the tokens of the first text imagination   start      the state that chose to imagine
    [1, d]
    text       ordinary steps after the first imagination           image      visual tokens as they enter the
    language model
    inner      inputs of every decoder layer at the latent positions

A sample is written aside and renamed, then its line is appended: killed anywhere, a sample is there or is
done again.
"""
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from utils.journal import Journal, read_settings
from utils.jsonl import DataError, replace_file
from utils.probe.similarity import Cell

KINDS = ("latent", "fed", "imagined", "text", "image", "inner", "dummy_pad", "start")
STORED = {"imagination": ("latent", "imagined"), "text": ("text",), "image": ("image",), "start": ("start",),
          # kind that is analysed -> kinds in the store, whichever is there
          "dummy_pad": ("dummy_pad",), "inner": ("inner",)}
NAME = "states"
BUDGET = 1 << 30  # bytes of states held at once by `States.cells`


def text_hash(text: str) -> str:
    """Return the sha256 of a prompt, so that states of other prompts are told apart."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_name(key: str) -> str:
    digest = text_hash(key)
    return f"{digest[:2]}/{digest}.safetensors"


class StateWriter:
    """Appends samples to a store; `key in writer` tells what is there already. Use as a context manager."""

    def __init__(self, folder: str | Path, settings: dict | None = None):
        self.folder, self.journal = Path(folder), Journal(folder, settings, NAME)

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.journal.__exit__(*exception)

    def __contains__(self, key: str) -> bool:
        return key in self.journal

    def add(self, key: str, tensors: dict[str, np.ndarray], **facts) -> None:
        """Write the states of a sample, float32, and its line. ValueError for an unknown kind or a state that
        is no number."""
        for name, states in tensors.items():
            if name not in KINDS or states.ndim not in (2, 3) or not np.isfinite(states).all():
                raise ValueError(
                    f"{key}: {name} {states.shape}: expected finite [steps, d] or [steps, layers, d] of one of "
                                 f"{', '.join(KINDS)}")
        data = save({name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()})
        replace_file(self.folder / file_name(key), lambda file: file.write(data), "wb")
        self.journal.append({"key": key, "file": file_name(key), "tensors": {n: list(x.shape) for n,
                                                                             x in tensors.items()},
                             **facts})


class States:
    """Reads a store, whoever writes to it: `records` by key, in the order written; of two lines of one key
    the later."""

    def __init__(self, folder: str | Path):
        self.folder, self.records = Path(folder), {}
        self.settings = read_settings(folder)
        paths = sorted(self.folder.glob(f"{NAME}-*.jsonl"))
        if not paths:
            raise DataError(f"{folder}: no {NAME}-*.jsonl; expected a store as probe.py captures it")
        for path in paths:
            with open(path, "rb") as file:
                for n, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break  # being written, or torn by a kill
                    self.note(f"{path}:{n}", line)

    def note(self, where: str, line: bytes) -> None:
        try:
            record = json.loads(line)
            if record["file"] != file_name(record["key"]):
                raise ValueError("a file of another name")
            if not all(kind in KINDS and len(shape) in (2, 3) and all(type(n) is int and n > 0 for n in shape)
                       for kind, shape in record["tensors"].items()):
                raise ValueError("shapes that are none")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where}: damaged line {line[:40]!r}; remove it to capture its sample again") from error
        self.records[record["key"]] = record

    def find(self, kind: str) -> str | None:
        """Return the name in the store of a kind that is analysed, or None if no sample has it."""
        return next((name for name in STORED[kind]
                     if any(name in r["tensors"] for r in self.records.values())), None)

    def open(self, key: str) -> safe_open:
        path = self.folder / self.records[key]["file"]
        try:
            file = safe_open(path, framework="numpy")
            for kind, shape in self.records[key]["tensors"].items():
                if file.get_slice(kind).get_shape() != shape:
                    raise OSError(f"{kind} of another shape than {shape}")
            return file
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: states of {key!r} cannot be read ({error}); remove its line to capture them "
                            "again") from error

    def load(self, key: str, kind: str) -> np.ndarray | None:
        """Return the states of one kind, or None if the sample has none of it."""
        if kind not in self.records[key]["tensors"]:
            return None
        with self.open(key) as file:
            return file.get_tensor(kind)

    def cells(self, kind: str, keys: list[str], n_steps: int | None = None, budget: int = BUDGET,
              at_most: dict[str, int] | None = None) -> Iterator[Cell]:
        """Yield the cells of a kind, layer by layer, step by step: all of `keys` that have the step, as their
        places in it.

        `at_most`: steps of a sample that count, by key (of latents: those of its first segment).

        Samples are opened once for as many cells as fit `budget` bytes: n samples x 10 steps x 28 layers x
        3,584 need not fit in memory. The layer of kinds without layers is -1.
        """
        shapes = {i: self.records[key]["tensors"][kind] for i, key in enumerate(keys)
                  if kind in self.records[key]["tensors"]}
        if not shapes:
            return
        for i, shape in shapes.items():
            shapes[i] = [min(shape[0], (at_most or {}).get(keys[i], shape[0])), *shape[1:]]
        of_a_step = {tuple(shape[1:]) for shape in shapes.values()}
        if len(of_a_step) != 1:
            raise DataError(
                f"{self.folder}: {kind} of {len(of_a_step)} shapes {sorted(of_a_step)}, expected one; were two "
                            "models mixed?")
        *n_layers, width = of_a_step.pop()
        longest = max(shape[0] for shape in shapes.values())
        steps = range(min(longest, n_steps or longest))
        places = [(layer, step) for layer in (range(*n_layers) if n_layers else [-1]) for step in steps]
        at_once = max(1, budget // (4 * width * len(shapes)))
        for first in range(0, len(places), at_once):
            yield from self.sweep(kind, keys, shapes, places[first:first + at_once])

    def sweep(self, kind: str, keys: list[str], shapes: dict[int, list[int]],
              places: list[tuple[int, int]]) -> Iterator[Cell]:
        """Read some cells with one opening of every sample."""
        having = {step: np.array([i for i, shape in shapes.items() if shape[0] > step]) for _, step in places}
        width = next(iter(shapes.values()))[-1]
        blocks = [np.empty((len(having[step]), width), dtype=np.float32) for _, step in places]
        filled = [0] * len(places)
        for i, shape in shapes.items():
            with self.open(keys[i]) as file:
                part = file.get_slice(kind)
                for n, (layer, step) in enumerate(places):
                    if shape[0] > step:
                        read = part[step:step + 1] if layer < 0 else part[step:step + 1, layer:layer + 1]
                        blocks[n][filled[n]] = read.reshape(-1)
                        filled[n] += 1
        for n, (layer, step) in enumerate(places):
            yield Cell(layer, step, having[step], blocks[n])
            blocks[n] = None  # a cell that was used need not be kept
