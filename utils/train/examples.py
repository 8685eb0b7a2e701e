"""Rows as tokens: the four training targets (see train_sft.py), their loss masks, packs and batches."""
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from utils.images import image_size, open_image, resolve_image, smart_size
from utils.items import END_OF_TURN, chat, plain
from utils.jsonl import DataError
from utils.latent_families import LatentSpec, latent_ids, special_id
from utils.qwen import THREADS, Qwen, collate, process_images

PLACEHOLDER = "<think_image>"
SILENT = re.compile(r"</?think_image>|\\boxed\{\s*\}")  # what a reply may hold and still say nothing
SHOWN = 20  # bad rows that one error names


def add_tokens(qwen: Qwen, names: tuple[str, ...]) -> list[int]:
    """Add missing special tokens, in the given order, and return the ids of all. The embedding grows only
    when the ids exceed the rows that the release left free."""
    qwen.tokenizer.add_tokens(list(names), special_tokens=True)
    if qwen.model is not None and len(qwen.tokenizer) > qwen.model.lm_head.out_features:
        qwen.model.resize_token_embeddings(len(qwen.tokenizer))
    return [special_id(qwen.tokenizer, name) for name in names]


@dataclass(frozen=True)
class Target:
    """How rows become targets. `spec`: the family of latents; `total_tokens`, `image_tokens`: of
    `budget_sizes`; `system`: None is the chat template's."""

    imagination: str = "text"
    image_root: str = "."
    spec: LatentSpec | None = None
    total_tokens: int = 2000
    image_tokens: int = 1280
    system: str | None = None


@dataclass
class Example:
    """A row as tokens, each image still one token. `trained`: the loss mask; `steps`: the imagined images;
    `grids` and `step_grids`: (rows, columns) of patches per image."""

    id: str
    ids: list[int]
    trained: list[bool]
    images: list[Path]
    steps: list[Path]
    grids: list[tuple[int, int]]
    step_grids: list[tuple[int, int]]

    @property
    def n_tokens(self) -> int:
        """The tokens with every image expanded (one per 2 x 2 patches)."""
        return len(self.ids) - len(self.grids) + sum(rows * columns // 4 for rows, columns in self.grids)

    @property
    def n_trained(self) -> int:
        return sum(self.trained)


def target_text(row: dict, target: Target) -> str:
    """Return the reply, without the end of turn."""
    if target.imagination == "text":
        return plain(row["chain"])
    if target.imagination == "direct":
        return f"\\boxed{{{plain(row['answer'])}}}"
    spec = target.spec
    mark = PLACEHOLDER if spec is None else spec.start + spec.pad * spec.size + spec.end
    pieces = [mark if "image" in step else plain(step["text"].strip()) for step in row["steps"]]
    return " ".join(piece for piece in pieces if piece)


def says_something(row: dict, target: Target) -> bool:
    """Return whether a reply has a visible character besides marks, images and an empty box."""
    texts = {"text": [row["chain"]], "direct": [row["answer"]]}.get(
        target.imagination, [step["text"] for step in row["steps"] if "text" in step])
    words = SILENT.sub("", " ".join(texts))
    return any(char.isprintable() and not char.isspace() for char in words)


def budget_sizes(sizes: list[tuple[int, int]], total_tokens: int = 2000, image_tokens: int = 1280,
                 factor: int = 28) -> list[tuple[int, int]]:
    """Return the (width, height) of each image of a sample under a budget of visual tokens.

    Monet's `resize_by_token_budget` (NOVAglow646/Monet src/utils.py): above the total every image shrinks by
    one ratio, and only then each is bounded by `image_tokens`.
    """
    area, total = factor * factor, sum(width * height for width, height in sizes)
    if total <= total_tokens * area:
        return list(sizes)

    def shrink(width: int, height: int, ratio: float) -> tuple[int, int]:
        return tuple(max(factor, int(side * ratio) // factor * factor) for side in (width, height))

    budgeted = []
    for width, height in sizes:
        width, height = shrink(width, height, math.sqrt(total_tokens * area / total))
        if width * height > image_tokens * area:
            width, height = shrink(width, height, math.sqrt(image_tokens * area / (width * height)))
        budgeted.append((width, height))
    return budgeted


def load_images(paths: list[Path], target: Target, factor: int) -> list:
    """Open images, scaled down to the row's budget of visual tokens."""
    images = [open_image(path) for path in paths]
    sizes = budget_sizes([image.size for image in images], target.total_tokens, target.image_tokens, factor)
    return [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image, size in zip(images, sizes)]


def image_grids(qwen: Qwen, paths: list[Path], target: Target) -> list[tuple[int, int]]:
    """Return, from file headers, the (rows, columns) of patches that images will have, swapped where EXIF
    rotates the image; only their product is used."""
    limits = qwen.image_processor.size["shortest_edge"], qwen.image_processor.size["longest_edge"]
    sizes = budget_sizes([image_size(path) for path in paths], target.total_tokens, target.image_tokens,
                         qwen.factor)
    sizes = [smart_size(*size, qwen.factor, *limits) for size in sizes]
    side = qwen.image_processor.patch_size
    return [(height // side, width // side) for width, height in sizes]


def make_example(qwen: Qwen, row: dict, target: Target) -> Example:
    """Tokenize a row. Trained: the reply and the end of turn, but neither latent pads nor an end marker that
    decoding forces."""
    root, spec = Path(target.image_root), target.spec
    images = [resolve_image(root, name) for name in row["images"]]
    prompt = chat(qwen.tokenizer, row["question"], len(images), target.system)
    reply = target_text(row, target) + END_OF_TURN
    if not says_something(row, target):
        raise DataError(f"the reply is {reply[:60]!r}, expected words: its text is empty (--imagination "
                        f"{target.imagination})")
    prompt_ids, reply_ids = (qwen.tokenizer(text, add_special_tokens=False).input_ids
                             for text in (prompt, reply))
    steps, untrained = [], set()
    if spec is not None:
        _, pad_id, end_id = latent_ids(qwen.tokenizer, spec)
        untrained = {pad_id, end_id} if spec.force_end else {pad_id}
        steps = [resolve_image(root, step["image"]) for step in row["steps"] if "image" in step]
    trained = [False] * len(prompt_ids) + [i not in untrained for i in reply_ids]
    example = Example(row["id"], prompt_ids + reply_ids, trained, images, steps,
                      image_grids(qwen, images, target), image_grids(qwen, steps, target))
    for path, (rows, columns) in zip(steps, example.step_grids):
        n_visual = rows * columns // 4
        if n_visual < spec.size:
            raise DataError(f"{path}: {n_visual} visual tokens, expected at least {spec.size}, the latents")
    return example


def make_examples(qwen: Qwen, rows: list[dict], target: Target,
                  max_tokens: int | None = None) -> list[Example]:
    """Tokenize all rows; one DataError counts and names the bad ones."""
    examples, faults = [], []
    for row in rows:
        try:
            example = make_example(qwen, row, target)
            if max_tokens is not None and example.n_tokens > max_tokens:
                raise DataError(f"{example.n_tokens} tokens, visual ones included, expected at most "
                                f"--max_tokens {max_tokens}")
            examples.append(example)
        except DataError as error:
            faults.append(f"{row['id']}: {error}")
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(f"{len(faults)} of {len(rows)} rows cannot be trained on; fix or remove them:\n  "
                        + "\n  ".join(faults[:SHOWN]) + more)
    return examples


def marked(qwen: Qwen, example: Example) -> str:
    """Return the text of a row with the trained tokens between >> and <<."""
    text, before = "", False
    for token, is_trained in zip(example.ids, example.trained):
        text += ">>" if is_trained and not before else "<<" if before and not is_trained else ""
        text, before = text + qwen.tokenizer.decode([token]), is_trained
    return text + ("<<" if before else "")


# ---- packs and batches
def make_pack(qwen: Qwen, examples: list[Example], target: Target, weight: float = 1.0) -> dict:
    """Concatenate rows into one sequence of L tokens.

    Returns input_ids [1, L], position_ids [3, 1, L] (from 0 in every row), pixel_values and image_grid_thw,
    cu_seqlens int32 [rows + 1], max_length, logit_positions [n] (where trained tokens are predicted), labels
    [n], row [n] (of each label), row_ids, and `weight` (0: does not count).
    """
    with ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(lambda example: load_images(example.images, target, qwen.factor), examples))
    # one call: calling the image processor costs more than processing one image
    pixels = process_images(qwen.image_processor, [image for row in images for image in row]) or {}
    grids = pixels["image_grid_thw"].split([len(row) for row in images]) if pixels else [()] * len(images)
    rows = []
    for example, grid in zip(examples, grids):
        rows.append(collate(qwen, [example.ids], [{"image_grid_thw": grid} if len(grid) else None]))
        n_tokens = rows[-1]["input_ids"].shape[1]
        if n_tokens != example.n_tokens:
            raise DataError(f"{example.id}: {n_tokens} tokens, expected {example.n_tokens} from its images' "
                            "headers; was one changed during the run?")
    pack = {name: torch.cat([row[name] for row in rows], dim=-1) for name in ("input_ids", "position_ids")}
    pack |= {name: pixels[name] for name in ("pixel_values", "image_grid_thw") if name in pixels}
    ends = torch.tensor([example.n_tokens for example in examples]).cumsum(0)
    # counted from the end of a row, as images before the trained tokens are expanded
    places = [end + torch.tensor(example.trained).nonzero().flatten() - len(example.trained)
              for example, end in zip(examples, ends)]
    counts, places = torch.tensor([len(of_row) for of_row in places]), torch.cat(places)
    return pack | {"cu_seqlens": torch.cat([torch.zeros(1), ends]).int(),
                   "max_length": max(example.n_tokens for example in examples),
                   "logit_positions": places - 1, "labels": pack["input_ids"][0, places],
                   "row": torch.arange(len(examples)).repeat_interleave(counts),
                   "row_ids": [example.id for example in examples], "weight": weight}


def lay_out(lengths: list[list[int]], n_latents: int,
            n_blocks: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Place the tokens of every row so that latent segments share columns over the batch.

    Text pieces are padded on the left. Three rows of text t and latents z, with lengths [[3, 2], [1, 4],
    [2]], n_latents 2 and n_blocks 2; `.` is padding:

        column   0 1 2  3 4  5 6 7 8
        row 0    t t t  z z  . . t t
        row 1    . . t  z z  t t t t
        row 2    . t t  . .  . . . .

    Returns the column of each token of each row, and the column ranges (first, last + 1) of the text blocks,
    here [(0, 3), (5, 9)]. A block that no row has is one column wide.
    """
    blocks, offset = [], 0
    for block in range(n_blocks):
        width = max((pieces[block] for pieces in lengths if len(pieces) > block), default=1)
        blocks.append((offset, offset + width))
        offset += width + n_latents
    columns = []
    for pieces in lengths:
        places = []
        for block, length in enumerate(pieces):
            end = blocks[block][1]
            places += range(end - length, end)
            places += range(end, end + n_latents) if block + 1 < len(pieces) else []
        columns.append(places)
    return columns, blocks


def piece_lengths(ids: list[int], pad_id: int, n_latents: int) -> list[int]:
    """Return the lengths of the text pieces between runs of `n_latents` latent pads."""
    lengths, run = [0], 0
    for token in ids:
        if token == pad_id:
            run += 1
            if run == n_latents:
                lengths.append(0)
                run = 0
        else:
            lengths[-1] += 1
    return lengths


def make_batch(qwen: Qwen, examples: list[Example], target: Target, weight: float = 1.0,
               n_blocks: int | None = None) -> dict:
    """Collate examples: the tensors of `utils.qwen.collate` in the columns of `lay_out`, and the labels.

    `logit_positions` [n] are flat indices into [B, L]; `labels` [n], `row` [n], `row_ids` and `weight` are as
    in a pack. `latents` are (row, segment) of every imagined image, whose pixels are `step_pixel_values`.
    `n_blocks`: text blocks to run, the same on all ranks.
    """
    spec = target.spec
    pixels = [process_images(qwen.image_processor, load_images(e.images, target, qwen.factor))
              for e in examples]
    batch = collate(qwen, [e.ids for e in examples], pixels)
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    pieces = [piece_lengths(row, latent_ids(qwen.tokenizer, spec)[1], spec.size) for row in ids]
    columns, blocks = lay_out(pieces, spec.size, n_blocks or max(map(len, pieces)))
    shape = len(ids), blocks[-1][1]
    laid = {"input_ids": torch.full(shape, qwen.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(3, *shape, dtype=torch.long)}
    logit_positions, labels, rows = [], [], []
    for i, (example, row, places) in enumerate(zip(examples, ids, columns)):
        laid["input_ids"][i, places] = torch.tensor(row)
        laid["attention_mask"][i, places] = 1
        laid["position_ids"][:, i, places] = batch["position_ids"][:, i, batch["attention_mask"][i].bool()]
        first = len(row) - len(example.trained)  # images were expanded, all before the first trained token
        trained = [first + j for j, is_trained in enumerate(example.trained) if is_trained]
        logit_positions += [i * shape[1] + places[j - 1] for j in trained]
        labels += [row[j] for j in trained]
        rows += [i] * len(trained)
    imagined = [image for e in examples for image in load_images(e.steps, target, qwen.factor)]
    steps = process_images(qwen.image_processor, imagined)
    return {**batch, **laid, "blocks": blocks, "logit_positions": torch.tensor(logit_positions),
            "labels": torch.tensor(labels), "row": torch.tensor(rows), "row_ids": [e.id for e in examples],
            "weight": weight,
            "latents": [(i, s) for i, e in enumerate(examples) for s in range(len(e.steps))],
            **{f"step_{name}": tensor for name, tensor in (steps or {}).items()}}
