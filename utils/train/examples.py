"""Rows as tokens: the four training targets, and which of their tokens are trained.

All four come from the same rows: `text` is the chain, `placeholder` the steps with each image as one bare
<think_image> (the paper's "without rewriting"), `latent` the steps with each image as start + K latents +
end, `direct` the boxed answer alone.
"""
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from utils.images import budget_sizes, image_size, open_image, resolve_image, smart_size
from utils.items import chat, plain
from utils.jsonl import DataError
from utils.latent_families import LatentSpec, latent_ids
from utils.qwen import Qwen

PLACEHOLDER = "<think_image>"  # one bare marker per image
END_OF_TURN = "<|im_end|>"
SHOWN = 20  # bad rows that one error names


@dataclass(frozen=True)
class Target:
    """How rows become training targets: the imagination, the family of latents, and the visual token budget.

    `total_tokens` and `image_tokens` are Monet's (`utils.images.budget_sizes`). `system` None is the system
    prompt of the chat template.
    """

    imagination: str = "text"
    image_root: str = "."
    spec: LatentSpec | None = None
    total_tokens: int = 2000
    image_tokens: int = 1280
    system: str | None = None


@dataclass
class Example:
    """One row as tokens, where each image is still one token; `trained` is the loss mask.

    `steps` are the paths of the imagined images; `grids` and `step_grids` are (rows, columns) of patches per
    image.
    """

    id: str
    ids: list[int]
    trained: list[bool]
    images: list[Path]
    steps: list[Path]
    grids: list[tuple[int, int]]
    step_grids: list[tuple[int, int]]

    @property
    def n_tokens(self) -> int:
        """The tokens of the row with every image expanded (one token per 2 x 2 patches)."""
        return len(self.ids) - len(self.grids) + sum(rows * columns // 4 for rows, columns in self.grids)

    @property
    def n_trained(self) -> int:
        return sum(self.trained)


def target_text(row: dict, target: Target) -> str:
    """Return the reply that the assistant is trained on, without the end-of-turn token."""
    if target.imagination == "text":
        return plain(row["chain"])
    if target.imagination == "direct":
        return f"\\boxed{{{plain(row['answer'])}}}"
    spec = target.spec
    mark = PLACEHOLDER if spec is None else spec.start + spec.pad * spec.size + spec.end
    pieces = [mark if "image" in step else plain(step["text"].strip()) for step in row["steps"]]
    return " ".join(piece for piece in pieces if piece)


def load_images(paths: list[Path], target: Target, factor: int) -> list:
    """Open images and scale them down to the row's visual token budget (Monet's resize_by_token_budget)."""
    images = [open_image(path) for path in paths]
    sizes = budget_sizes([image.size for image in images], target.total_tokens, target.image_tokens, factor)
    return [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image, size in zip(images, sizes)]


def image_grids(qwen: Qwen, paths: list[Path], target: Target) -> list[tuple[int, int]]:
    """Return, from file headers, the (rows, columns) of patches that `load_images` and the image processor
    make.

    For an image that EXIF rotates the two are swapped; only their product is used.
    """
    limits = qwen.image_processor.size["shortest_edge"], qwen.image_processor.size["longest_edge"]
    sizes = budget_sizes([image_size(path) for path in paths], target.total_tokens, target.image_tokens,
                         qwen.factor)
    sizes = [smart_size(*size, qwen.factor, *limits) for size in sizes]
    side = qwen.image_processor.patch_size
    return [(height // side, width // side) for width, height in sizes]


def make_example(qwen: Qwen, row: dict, target: Target) -> Example:
    """Tokenize one row; `qwen` may come without weights, from `utils.qwen.load_tools`.

    Trained: the reply and the end of turn. Not trained: the prompt, latent pads, and an end marker that
    decoding forces.
    """
    root, spec = Path(target.image_root), target.spec
    images = [resolve_image(root, name) for name in row["images"]]
    prompt = chat(qwen.tokenizer, row["question"], len(images), target.system)
    reply = target_text(row, target) + END_OF_TURN
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
            raise DataError(
                f"{path}: {n_visual} visual tokens, fewer than the {spec.size} latents to align to it")
    return example


def make_examples(qwen: Qwen, rows: list[dict], target: Target,
                  max_tokens: int | None = None) -> list[Example]:
    """Tokenize all rows, each of at most `max_tokens`; one DataError counts and names the bad ones."""
    examples, faults = [], []
    for row in rows:
        try:
            example = make_example(qwen, row, target)
            if max_tokens is not None and example.n_tokens > max_tokens:
                raise DataError(f"{example.n_tokens} tokens, visual ones included; --max_tokens {max_tokens} "
                                "is less: raise it, or remove the row")
            examples.append(example)
        except DataError as error:
            faults.append(f"{row['id']}: {error}")
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(f"{len(faults)} of {len(rows)} rows cannot be trained on; fix or remove them:\n  "
                        + "\n  ".join(faults[:SHOWN]) + more)
    return examples


def marked(qwen: Qwen, example: Example) -> str:
    """Return the text of a row with the trained tokens between >> and <<, each image as one token."""
    text, before = "", False
    for token, is_trained in zip(example.ids, example.trained):
        text += ">>" if is_trained and not before else "<<" if before and not is_trained else ""
        text, before = text + qwen.tokenizer.decode([token]), is_trained
    return text + ("<<" if before else "")
