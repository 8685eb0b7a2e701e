"""Rows as tokens: the four training targets (see train_sft.py), their loss masks and packs."""
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from utils.images import MAX_ASPECT, image_size, open_image, resolve_image, smart_size
from utils.items import END_OF_TURN, plain, render, user_content
from utils.jsonl import DataError
from utils.latent_families import LatentIds, LatentSpec, latent_ids, special_id
from utils.qwen import IMAGE_TOKEN, THREADS, Qwen, collate, process_images
from utils.reply_text import CONTROL
from utils.rows import OPEN

# what a reply may hold and still say nothing: marks, latents, boxes
SILENT = re.compile(r"</?think_image>|<\|[^|]*\|>|</?abs_vis_token(?:_pad)?>|\\boxed\{|\}")
SHOWN = 20  # bad rows that one error names


@dataclass(frozen=True)
class Target:
    """How rows become targets. `spec`: the family of latents; `image_tokens`, `tokens_per_image`: of
    `budget_sizes`; `system`: None is the row's or the template's; `turns`: "all" or the "last" is trained."""

    imagination: str = "text"
    image_root: str = "."
    spec: LatentSpec | None = None
    image_tokens: int = 2000
    tokens_per_image: int = 1280
    system: str | None = None
    turns: str = "all"


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

    def places(self, image_id: int) -> list[int]:
        """Return where the trained tokens are once every image (`image_id`) is expanded."""
        sizes = iter([rows * columns // 4 for rows, columns in self.grids])
        ends = accumulate(next(sizes) if token == image_id else 1 for token in self.ids)
        return [end - 1 for end, is_trained in zip(ends, self.trained) if is_trained]


def target_text(row: dict, target: Target) -> str:
    """Return the reply, without the end of turn."""
    if target.imagination == "text":
        return plain(row["chain"])
    if target.imagination == "direct":
        return f"\\boxed{{{plain(row['answer'])}}}"
    spec = target.spec
    mark = OPEN if spec is None else spec.start + spec.pad * spec.size + spec.end
    pieces = [mark if "image" in step else plain(step["text"].strip()) for step in row["steps"]]
    return " ".join(piece for piece in pieces if piece)


def pieces_of(tokenizer, row: dict, target: Target) -> list[tuple[str, bool]]:
    """Return a row as (text, whether it is trained), by the chat template: replies and ends of their turns.
    "history" in a row: earlier [question with a mark per image, reply]."""
    turns = [*row.get("history", []), [row["question"], target_text(row, target)]]
    system, pieces, text = target.system or row.get("system"), [], ""
    messages = [("system", system)] if system else []
    for n, (question, reply) in enumerate(turns, 1):
        n_images = question.count("<image>") if len(turns) > 1 else len(row["images"])
        messages.append(("user", user_content(question, n_images)))
        if target.turns == "all" or n == len(turns):
            if not any(char.isprintable() and not char.isspace() for char in SILENT.sub("", reply)):
                raise DataError(f"the reply is {reply[:60]!r}, expected words: its text is empty "
                                f"(--imagination {target.imagination})", "empty")
            prompt = render(tokenizer, messages)
            if not prompt.startswith(text):
                raise DataError("the chat template changes earlier turns; use --turns last", "turns")
            pieces += [(prompt[len(text):], False), (reply + END_OF_TURN, True)]
            text = prompt + reply + END_OF_TURN
        messages.append(("assistant", reply))
    return pieces


def budget_sizes(sizes: list[tuple[int, int]], image_tokens: int, tokens_per_image: int,
                 factor: int = 28) -> list[tuple[int, int]]:
    """Return the (width, height) of each image of a sample under a budget of visual tokens.

    Monet's `resize_by_token_budget` (NOVAglow646/Monet src/utils.py): above the total every image shrinks by
    one ratio, and only then each is bounded by `tokens_per_image`. Here the aspect stays within MAX_ASPECT.
    """
    area, total = factor * factor, sum(width * height for width, height in sizes)
    if total <= image_tokens * area:
        return list(sizes)

    def shrink(size: tuple[int, int], ratio: float) -> tuple[int, int]:
        sides = [max(factor, int(side * ratio) // factor * factor) for side in size]
        return tuple(min(side, MAX_ASPECT * min(sides)) for side in sides)

    budgeted = [shrink(size, math.sqrt(image_tokens * area / total)) for size in sizes]
    return [size if math.prod(size) <= tokens_per_image * area else
            shrink(size, math.sqrt(tokens_per_image * area / math.prod(size))) for size in budgeted]


def load_images(paths: list[Path], target: Target, factor: int) -> list:
    """Open images, scaled down to the row's budget of visual tokens."""
    images = [open_image(path) for path in paths]
    sizes = budget_sizes([i.size for i in images], target.image_tokens, target.tokens_per_image, factor)
    return [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image, size in zip(images, sizes)]


def image_grids(qwen: Qwen, paths: list[Path], target: Target) -> list[tuple[int, int]]:
    """Return, from file headers, the (rows, columns) of patches that images will have, swapped where EXIF
    rotates the image; only their product is used."""
    limits, side = qwen.image_processor.size, qwen.image_processor.patch_size
    sizes = budget_sizes(list(map(image_size, paths)), target.image_tokens, target.tokens_per_image,
                         qwen.factor)
    sizes = [smart_size(*size, qwen.factor, limits["shortest_edge"], limits["longest_edge"])
             for size in sizes]
    return [(height // side, width // side) for width, height in sizes]


def make_example(qwen: Qwen, row: dict, target: Target) -> Example:
    """Tokenize a row. Trained: as in `pieces_of`, but neither latent pads nor an end marker that decoding
    forces."""
    if "fault" in row:
        reason, detail = row["fault"]
        raise DataError(detail, reason)
    root, spec = Path(target.image_root), target.spec
    images = [resolve_image(root, name) for name in row["images"]]
    pieces = pieces_of(qwen.tokenizer, row, target)
    if found := CONTROL.search("".join(text for text, _ in pieces)):
        raise DataError(f"the control character {found[0]!a} in question or reply, expected text", "control")
    steps, untrained = [], set()
    if spec is not None:
        latent = latent_ids(qwen.tokenizer, spec)
        untrained = {latent.pad, latent.end} if spec.force_end else {latent.pad}
        steps = [resolve_image(root, step["image"]) for step in row["steps"] if "image" in step]
    ids = [(i, is_trained and i not in untrained) for text, is_trained in pieces
           for i in qwen.tokenizer(text, add_special_tokens=False).input_ids]
    example = Example(row["id"], *map(list, zip(*ids)), images, steps, image_grids(qwen, images, target),
                      image_grids(qwen, steps, target))
    for path, (rows, columns) in zip(steps, example.step_grids):
        n_visual = rows * columns // 4
        if n_visual < spec.size:
            raise DataError(f"{path}: {n_visual} visual tokens, expected at least {spec.size}, the latents",
                            "latents")
    return example


def sort_rows(qwen: Qwen, rows: list[dict], target: Target,
              max_tokens: int | None = None) -> tuple[list[Example], dict[str, DataError]]:
    """Return (rows as examples, the faults of the others by id). Of pictures only the header is read."""
    examples, faults = [], {}
    for row in rows:
        try:
            example = make_example(qwen, row, target)
            if max_tokens is not None and example.n_tokens > max_tokens:
                raise DataError(f"{example.n_tokens} tokens, visual ones included, expected at most "
                                f"--max_tokens {max_tokens}", "length")
            examples.append(example)
        except DataError as error:
            if error.reason is None:  # not the row's
                raise
            faults[row["id"]] = error
    return examples, faults


def make_examples(qwen: Qwen, rows: list[dict], target: Target, max_tokens: int | None = None
                  ) -> list[Example]:
    """Tokenize all rows; one DataError counts and names the bad ones."""
    examples, faults = sort_rows(qwen, rows, target, max_tokens)
    if faults:
        lines = [f"{name}: {error}" for name, error in faults.items()]
        lines[SHOWN:] = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        head = f"{len(faults)} of {len(rows)} rows cannot be trained on; fix them or use --skip_bad:"
        raise DataError(("\n  " if len(lines) > 1 else " ").join([head, *lines]))
    return examples


# ---- packs
def make_pack(qwen: Qwen, examples: list[Example], target: Target, weight: float = 1.0,
              n_segments: int = 0) -> dict:
    """Concatenate rows into one sequence of L tokens, which the model runs in the passes of `plan_passes`.

    Returns input_ids [1, L], position_ids [3, 1, L] (from 0 in every row), pixel_values and image_grid_thw,
    passes, predicting [n] (the kept states that predict trained tokens), labels [n], row [n] (of each label),
    row_ids, and `weight` (0: does not count). With latents also latents [images, K] (the kept states that are
    fed), step_pixel_values and step_image_grid_thw of the imagined images.

    All ranks must run the same number of passes: if no row has `n_segments` segments of latents, the last row
    gets more of them after its end, where nothing attends to them.
    """
    n_imagined, spec = sum(len(example.steps) for example in examples), target.spec
    latent = latent_ids(qwen.tokenizer, spec) if spec else LatentIds()
    if n_segments > max(len(example.steps) for example in examples):
        last = examples[-1]
        more = ([latent.pad] * spec.size + [latent.end]) * (n_segments - len(last.steps))
        longer = replace(last, ids=last.ids + more, trained=last.trained + [False] * len(more))
        examples = [*examples[:-1], longer]
    with ThreadPoolExecutor(THREADS) as pool:
        images, steps = (list(pool.map(lambda paths: load_images(paths, target, qwen.factor), rows))
                         for rows in ([e.images for e in examples], [e.steps for e in examples]))
    # one call: calling the image processor costs more than processing one image
    pixels, imagined = (process_images(qwen.image_processor, [image for row in rows for image in row]) or {}
                        for rows in (images, steps))
    grids = pixels["image_grid_thw"].split([len(row) for row in images]) if pixels else [()] * len(images)
    rows = []
    for example, grid in zip(examples, grids):
        rows.append(collate(qwen, [example.ids], [{"image_grid_thw": grid} if len(grid) else None]))
        n_tokens = rows[-1]["input_ids"].shape[1]
        if n_tokens != example.n_tokens:
            raise DataError(f"{example.id}: {n_tokens} tokens, expected {example.n_tokens} from its images' "
                            "headers; was one changed during the run?")
    pack = {name: torch.cat([row[name] for row in rows], dim=-1) for name in ("input_ids", "position_ids")}
    ends = torch.tensor([example.n_tokens for example in examples]).cumsum(0)
    image_id = special_id(qwen.tokenizer, IMAGE_TOKEN)
    places = [end - example.n_tokens + torch.tensor(example.places(image_id))
              for example, end in zip(examples, ends)]
    counts, places = torch.tensor([len(of_row) for of_row in places]), torch.cat(places)
    ids, n_latents = pack["input_ids"][0], spec.size if spec else 1
    is_latent = ids == latent.pad if spec else torch.zeros_like(ids, dtype=torch.bool)
    passes, kept_at = plan_passes(is_latent, ends, places - 1, n_latents)
    fed = kept_at[is_latent.nonzero().flatten() - 1].view(-1, n_latents)
    return pack | pixels | {f"step_{name}": tensor for name, tensor in imagined.items()} | {
        "passes": passes, "predicting": kept_at[places - 1], "labels": ids[places],
        "row": torch.arange(len(examples)).repeat_interleave(counts), "latents": fed[:n_imagined],
        "row_ids": [example.id for example in examples], "weight": weight}


def plan_passes(is_latent: torch.Tensor, ends: torch.Tensor, predicting: torch.Tensor,
                n_latents: int) -> tuple[list[dict], torch.Tensor]:
    """Plan the forward passes over packed rows whose latents come in segments of `n_latents`.

    A latent needs the state before it, so a pass holds either a stretch of text or one latent of every row
    that has it. Three rows of text t and latents z, two in a segment, and the pass of each token:

        row 0    t t t z z t t    0 0 0 1 2 3 3
        row 1    t z z t t t t    0 1 2 3 3 3 3
        row 2    t t              0 0

    `is_latent` [L]; `ends` [rows] of the rows; `predicting` [n]: tokens whose last states are needed, as are
    those of the tokens before latents.

    Returns the passes, each a dictionary of tokens (places in the pack, row by row); kept (of its tokens,
    those whose states are kept); fed (of the last pass's kept states, those that it runs; None: text); and
    keys, which of all keys so far, in the order of the passes, its rows attend to. Of text they are [keys],
    row by row, with cu_seqlens_q and cu_seqlens_k int32 [rows + 1], max_length_q and max_length_k; of the
    first latents of a segment [rows, P], -1 where a row has fewer; later ones attend to those, too. And, for
    the tokens [L] whose states are kept, their places among all kept states.
    """
    starts = F.pad(ends, (1, 0))[:-1]
    row = torch.arange(len(ends)).repeat_interleave(ends - starts)
    so_far = is_latent.cumsum(0)
    so_far -= so_far[starts][row]  # latents of its row up to here
    order = (so_far + (so_far - is_latent.long()) // n_latents).sort(stable=True)
    place = order.indices.argsort()
    is_needed = torch.zeros_like(is_latent).index_fill(0, predicting, True) | is_latent.roll(-1)
    passes, kept = [], []
    for tokens in order.indices.split(order.values.bincount().tolist()):
        rows, counts = row[tokens].unique_consecutive(return_counts=True)
        last = tokens[counts.cumsum(0) - 1]
        keys = [place[start:end + 1] for start, end in zip(starts[rows].tolist(), last.tolist())]
        needed = is_needed[tokens].nonzero().flatten()
        if len(needed) == 0:  # every pass must have a gradient
            needed = torch.tensor([len(tokens) - 1])
        passes.append({"tokens": tokens, "kept": needed, "fed": None})
        if is_latent[tokens[0]]:
            passes[-1]["fed"] = torch.searchsorted(kept[-1], tokens - 1)
            if passes[-2]["fed"] is None:
                passes[-1]["keys"] = pad_sequence([of_row[:-1] for of_row in keys], True, -1)
        else:
            lengths = torch.tensor([len(of_row) for of_row in keys])
            passes[-1] |= {"keys": torch.cat(keys),
                           "cu_seqlens_q": F.pad(counts.cumsum(0), (1, 0)).int(),
                           "cu_seqlens_k": F.pad(lengths.cumsum(0), (1, 0)).int(),
                           "max_length_q": int(counts.max()), "max_length_k": int(lengths.max())}
        kept.append(tokens[needed])
    kept = torch.cat(kept)
    return passes, torch.zeros_like(row).index_copy(0, kept, torch.arange(len(kept)))
