"""Load a Qwen2.5-VL or Qwen3-VL checkpoint and turn chats into tensors, without torchvision.

`AutoProcessor` needs torchvision for its video half, so the tokenizer and the PIL image processor are loaded
on their own and `<|image_pad|>` is expanded here. One code path serves training, evaluation and the
interventions: what is a token in one of them is a token in all.
"""
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig,
                          Qwen2VLImageProcessorPil)
from transformers.utils import cached_file

from utils.cli import rank_world
from utils.images import smart_size
from utils.items import question_text
from utils.jsonl import DataError, check_folder
from utils.patches import process_images

IMAGE_TOKEN = "<|image_pad|>"
MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
# of Qwen's control tokens and all of utils.latent_families
MARKS = re.compile(r"<(?=\||/?abs_vis_token|/?observation>)")
PROBE_SIZE = (1000, 700)  # pixels; large enough that a budget below 840 visual tokens binds


@dataclass
class Qwen:
    """A checkpoint ready to use.

    `factor` is the side in pixels of one visual token (28 for Qwen2.5-VL, 32 for Qwen3-VL), `eos_ids` the
    tokens that end a reply, from the generation config (the model config names only one of Qwen's two).
    `saved_dtype` is the type of the weights in the checkpoint, whatever they were loaded as. `model` is None
    without weights (`load_tools`). `latent_head` is LVR's, set by `utils.latent_families.load_with`.
    """

    model: torch.nn.Module | None
    tokenizer: object
    image_processor: Qwen2VLImageProcessorPil
    path: str
    factor: int
    eos_ids: list[int]
    config: object
    saved_dtype: torch.dtype
    latent_head: torch.nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device


@contextmanager
def whole(path: str) -> Iterator[None]:
    """Turn what the library says of a checkpoint that is half written, or none, into a DataError of one line.
    """
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{path}: no whole checkpoint here or on the hub: {' '.join(str(error).split())}; copy or train it "
                        "again") from error


def load_tools(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen:
    """Load the configuration, the tokenizer and the image processor of a checkpoint, and no weights."""
    tokenizer, image_processor = load_processors(path, min_pixels, max_pixels)
    with whole(path):
        config = AutoConfig.from_pretrained(path)
    if config.model_type not in MODEL_TYPES:
        raise DataError(f"{path}: model_type is {config.model_type!r}, expected one of {MODEL_TYPES}")
    factor = image_processor.patch_size * image_processor.merge_size
    return Qwen(None, tokenizer, image_processor, str(path), factor, eos_ids(path, tokenizer), config,
                config.dtype or torch.float32)


def load(path: str, dtype: str = "auto", device: str | None = None,
         min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen:
    """Load model, tokenizer and image processor of a released-layout checkpoint (flat or nested config).

    `device` None is this rank's GPU if there is one; `dtype` "auto" is bfloat16 on a GPU and float32 on a
    CPU. `min_pixels` and `max_pixels` bound one image's area; None keeps the checkpoint's own bound. Raises
    DataError if the folder is no such checkpoint.
    """
    device = device or (f"cuda:{rank_world()[2]}" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    qwen = load_tools(path, min_pixels, max_pixels)
    # The native class, never a subclass: keys of released checkpoints are renamed by class name.
    with whole(path):  # safetensors: a pickle may run code
        model, found = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype),
                                                                   use_safetensors=True,
                                                                   attn_implementation="sdpa",
                                                                   output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # which the library makes up at random
        raise DataError(
            f"{path}: {len(missing)} weights are missing, the first {missing[0]}; copy or train it again")
    if len(qwen.tokenizer) > model.lm_head.out_features:
        raise DataError(f"{path}: {len(qwen.tokenizer)} tokens but {model.lm_head.out_features} output rows; "
                        "the tokenizer belongs to another checkpoint")
    if torch.device(device).type == "cuda":
        multiply_patches(model)
    qwen.model, qwen.config = model.to(device).eval(), model.config
    return qwen


def multiply_patches(model: torch.nn.Module) -> None:
    """Have the vision tower's first layer, a convolution whose kernel is the whole patch, computed as a
    matrix product.

    By cuDNN's version such a convolution in bfloat16 has no engine or takes seconds instead of milliseconds
    (huggingface/transformers issue 45750, sgl-project/sglang-omni pull 539); vLLM and SGLang multiply too.
    The weight keeps its name and shape.
    """
    def multiply(conv: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)

    first = model.model.visual.patch_embed.proj
    # a method, so that a copy of the model computes with its own weight
    first.forward = MethodType(multiply, first)


def load_processors(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> tuple:
    """Return (tokenizer, image processor) of a checkpoint, the pixel budget set and proven."""
    check_folder(path)
    for file in (Path(path) / "tokenizer.json", Path(path) / "vocab.json"):
        try:
            if file.is_file():
                json.loads(file.read_bytes())  # the library raises no particular error on one that is cut off
        except ValueError as error:
            raise DataError(f"{file}: not whole ({error}); copy or train the checkpoint again") from error
    with whole(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    if tokenizer.chat_template is None:  # some releases keep the template in a file of its own
        template = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if template is None:
            raise DataError(
                f"{path}: no chat template in tokenizer_config.json, chat_template.jinja or .json")
        tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
    set_pixel_budget(image_processor, min_pixels, max_pixels)
    return tokenizer, image_processor


def set_pixel_budget(image_processor: Qwen2VLImageProcessorPil, min_pixels: int | None, max_pixels: int
                     | None) -> None:
    """Bound the area of one image, in pixels, and prove on a probe image that the bound holds.

    `from_pretrained(size=...)` is silently ignored on checkpoints that store min_pixels and max_pixels, so
    the size is assigned after loading; the probe catches a library version that would ignore that too.
    """
    low = min_pixels if min_pixels is not None else image_processor.size["shortest_edge"]
    high = max_pixels if max_pixels is not None else image_processor.size["longest_edge"]
    factor = image_processor.patch_size * image_processor.merge_size
    if not factor * factor <= low <= high:
        raise DataError(f"pixel budget {low}..{high}: expected {factor * factor} <= min_pixels <= max_pixels")
    image_processor.size = {"shortest_edge": low, "longest_edge": high}
    grid = image_processor([Image.new("RGB", PROBE_SIZE)], return_tensors="pt")["image_grid_thw"][0].tolist()
    width, height = smart_size(*PROBE_SIZE, factor, low, high)
    expected = [1, height // image_processor.patch_size, width // image_processor.patch_size]
    if grid != expected:
        raise DataError(
            f"pixel budget {low}..{high}: the image processor made a grid {grid} of a {PROBE_SIZE} probe, "
                        f"expected {expected}; this version of transformers ignores the budget")


def eos_ids(path: str, tokenizer) -> list[int]:
    """Return the ids that end a reply: the generation config's, else the tokenizer's own."""
    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        with whole(path):
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        if eos is not None:
            return list(eos) if isinstance(eos, list) else [eos]
    return [tokenizer.eos_token_id]


@lru_cache(64)  # asked for at every row of a batch
def special_id(tokenizer, name: str) -> int:
    """Return the id of an added token by its name; DataError if the tokenizer does not hold it as one token.
    """
    ids = tokenizer(name, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != name:
        raise DataError(f"{name!r} is {len(ids)} tokens in this tokenizer, expected one added token; "
                        "is this a checkpoint that was trained with that token?")
    return ids[0]


def add_tokens(qwen: Qwen, names: tuple[str, ...]) -> list[int]:
    """Add special tokens in the given order (a no-op for those already there) and return their ids.

    The embedding is never shrunk, and grown only when the new ids do not fit the rows that the release left
    free.
    """
    qwen.tokenizer.add_tokens(list(names), special_tokens=True)
    if qwen.model is not None and len(qwen.tokenizer) > qwen.model.lm_head.out_features:
        qwen.model.resize_token_embeddings(len(qwen.tokenizer))
    return [special_id(qwen.tokenizer, name) for name in names]


def plain(text: str) -> str:
    """Return text from data with control tokens broken (`<|` becomes `< |`): data cannot end a turn, hold an
    image or, where a family's markers are tokens (Monet's `<abs_vis_token>`), begin a latent."""
    return MARKS.sub("< ", text)


def user_content(text: str, n_images: int) -> list[dict]:
    """Return chat content for one user turn: images where `<image>` stands in the text, or first if it stands
    nowhere."""
    pieces = plain(text).split("<image>")
    if len(pieces) == 1:
        return [{"type": "image"}] * n_images + [{"type": "text", "text": pieces[0]}]
    if len(pieces) - 1 != n_images:
        raise DataError(f"{len(pieces) - 1} <image> markers for {n_images} images in {text[:60]!r}; "
                        "expected one each, or no marker at all")
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in content if part.get("text") != ""]


def chat(tokenizer, text: str, n_images: int, system: str | None = None) -> str:
    """Return the prompt text of one user turn, up to and including the start of the assistant's turn.

    `system` None leaves the system turn to the checkpoint's template (Qwen2.5-VL: "You are a helpful
    assistant.").
    """
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": user_content(text, n_images)})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(qwen: Qwen, prompts: list[str], images: list[list[Image.Image]]) -> dict:
    """Turn prompts, each with one `<|image_pad|>` an image, into the tensors of `collate` on the model's
    device.

    A prompt may run on past the generation prompt: what follows is the assistant's own beginning.
    """
    ids = [qwen.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    pixels = [process_images(qwen.image_processor, row) for row in images]
    batch = collate(qwen, ids, pixels)
    return {name: tensor.to(qwen.device) for name, tensor in batch.items()}


def expand_images(qwen: Qwen, ids: list[int], pixels: dict | None) -> list[int]:
    """Return ids with each `<|image_pad|>` repeated once a visual token of its image."""
    image_id = special_id(qwen.tokenizer, IMAGE_TOKEN)
    grids = pixels["image_grid_thw"].tolist() if pixels else []
    if ids.count(image_id) != len(grids):
        raise DataError(
            f"{ids.count(image_id)} {IMAGE_TOKEN} in a prompt with {len(grids)} images; expected one each")
    counts = iter(math.prod(grid) // qwen.image_processor.merge_size**2 for grid in grids)
    return [i for token in ids for i in ([token] * next(counts) if token == image_id else [token])]


def collate(qwen: Qwen, ids: list[list[int]], pixels: list[dict | None]) -> dict:
    """Pad token lists into one batch, with positions.

    Returns input_ids, attention_mask, mm_token_type_ids (1 at visual tokens) [B, L], position_ids [3, B, L]
    and, when there is an image, what `pixels` hold (image_grid_thw at least) of all images in order. Padded
    on the left. mm_token_type_ids is always built: without it the library falls back to 1-D positions in
    silence.
    """
    rows = [expand_images(qwen, row, pixel) for row, pixel in zip(ids, pixels, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), qwen.tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row):] = torch.tensor(row)
        attention_mask[i, length - len(row):] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    batch["mm_token_type_ids"] = (input_ids == special_id(qwen.tokenizer, IMAGE_TOKEN)).int()
    present = [pixel for pixel in pixels if pixel is not None]
    if present:
        batch |= {name: torch.cat([pixel[name] for pixel in present]) for name in present[0]}
    batch["position_ids"], _ = qwen.model.model.get_rope_index(
        input_ids, batch["mm_token_type_ids"], image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=attention_mask)
    return batch


def image_features(qwen: Qwen, inputs: dict) -> list[torch.Tensor]:
    """Return the merged features [n_visual_tokens, hidden] of every image in `inputs`, in order."""
    if "pixel_values" not in inputs:
        return []
    return list(qwen.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"],
                                                    return_dict=True).pooler_output)


def save(qwen: Qwen, folder: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a checkpoint in the released layout into `folder`, which is never the one it was loaded from.

    `state` are the weights by their names in the model, all of one dtype, where the model's own are in pieces
    on several devices or of other types; the library writes them under the released names.
    """
    if Path(folder).resolve() == Path(qwen.path).resolve():
        raise DataError(
            f"{folder}: the checkpoint was loaded from here; expected another folder, inputs are not edited")
    qwen.model.save_pretrained(folder, state_dict=state)
    if state is not None:  # the library wrote the dtype of the model in memory
        path, dtype = Path(folder) / "config.json", str(next(iter(state.values())).dtype).removeprefix(
            "torch.")
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = dtype
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    qwen.tokenizer.save_pretrained(folder)
    qwen.image_processor.save_pretrained(folder)


def prompt_of(tokenizer, item: dict, n_images: int, asked: object, blind: bool = False) -> str:
    """Return the prompt of an item, by `system` and `suffix` of `asked` (an Asking, or a script's flags).

    `blind`: the item's images are kept back, so that nothing may mark where they stood.
    """
    text = question_text(item, asked.suffix)
    return chat(tokenizer, text.replace("<image>", "") if blind else text, n_images, asked.system)
