"""Load a Qwen2.5-VL or Qwen3-VL checkpoint and turn prompts into tensors, without torchvision.

`AutoProcessor` needs torchvision, so the tokenizer and the PIL image processor are loaded separately and
`<|image_pad|>` is expanded here. All stages use this path, so that they see the same tokens.
"""
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig,
                          Qwen2VLImageProcessorPil)
from transformers.utils import cached_file

from utils.cli import rank_world
from utils.images import smart_size
from utils.jsonl import DataError, check_folder, find_checkpoint
from utils.latent_families import LatentSpec, latent_ids, special_id

IMAGE_TOKEN = "<|image_pad|>"
MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
LVR_HEAD = "lvr_head."  # prefix of its weights; each layer has a weight and a bias
find_file = partial(cached_file, _raise_exceptions_for_missing_entries=False)  # (checkpoint, name) -> path
THREADS = 4  # Pillow and numpy work outside the interpreter's lock


@dataclass
class Qwen:
    """A checkpoint ready to use.

    `model`: None after `load_tools`. `factor`: pixels per side of a visual token (28 for Qwen2.5-VL, 32 for
    Qwen3-VL). `eos_ids`: tokens that end a reply (the model config has only one of Qwen's two).
    `latent_head`: LVR's, set by `load_with`.
    """

    model: torch.nn.Module | None
    tokenizer: object
    image_processor: Qwen2VLImageProcessorPil
    path: str
    factor: int
    eos_ids: list[int]
    config: object
    latent_head: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device


# ---- loading
@contextmanager
def checkpoint_errors(path: str) -> Iterator[None]:
    """Turn the library's errors on a missing or broken checkpoint into a DataError of one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: no whole checkpoint here or on the hub: {' '.join(str(error).split())}; "
                        "copy or train it again") from error


def load_tools(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen:
    """Load a checkpoint without its weights."""
    tokenizer, image_processor = load_processors(path, min_pixels, max_pixels)
    with checkpoint_errors(path):
        config = AutoConfig.from_pretrained(path)
        has_own = find_file(path, "generation_config.json")
        eos = GenerationConfig.from_pretrained(path).eos_token_id if has_own else None
    if config.model_type not in MODEL_TYPES:
        raise DataError(f"{path}: model_type is {config.model_type!r}, expected one of {MODEL_TYPES}")
    eos = tokenizer.eos_token_id if eos is None else eos
    return Qwen(None, tokenizer, image_processor, str(path),
                image_processor.patch_size * image_processor.merge_size,
                eos if isinstance(eos, list) else [eos], config)


def load(path: str, dtype: str = "auto", device: str | None = None,
         min_pixels: int | None = None, max_pixels: int | None = None) -> Qwen:
    """Load a checkpoint in the released layout.

    `device` None: this rank's GPU, if any. `dtype` "auto": bfloat16 on a GPU, float32 on a CPU.
    """
    device = device or (f"cuda:{rank_world()[2]}" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    qwen = load_tools(path, min_pixels, max_pixels)
    # The native class, never a subclass: keys of released checkpoints are renamed by class name.
    with checkpoint_errors(path):  # a pickle may run code
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, attn_implementation="sdpa",
            output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # the library makes them up at random
        raise DataError(f"{path}: {len(missing)} weights are missing, the first {missing[0]}; copy it again")
    if len(qwen.tokenizer) > model.lm_head.out_features:
        raise DataError(f"{path}: {len(qwen.tokenizer)} tokens but {model.lm_head.out_features} output rows; "
                        "the tokenizer belongs to another checkpoint")
    qwen.model, qwen.config = model.to(device).eval(), model.config
    return qwen


def load_with(spec: LatentSpec | None, path: str, dtype: str = "auto", min_pixels: int | None = None,
              max_pixels: int | None = None) -> Qwen:
    """Load a checkpoint to decode with these latents; DataError for the tokens of another family."""
    qwen = load(path, dtype, None, min_pixels, max_pixels)
    qwen.latent_head = load_head(path, qwen.device, qwen.model.dtype)
    if spec:
        latent_ids(qwen.tokenizer, spec)  # fails before a run is opened with wrong flags
    return qwen


def load_head(path: str, device: torch.device,
              dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return LVR's head [.., hidden] -> [.., hidden] (src/model/lvr_heads.py) if the checkpoint has one.

    It maps the output of a latent step before that is fed (so not the first latent of a segment); the logits
    come from the same state. The names of the weights show which form it has.
    """
    head = {}
    for file in sorted(find_checkpoint(path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            head |= {key.removeprefix(LVR_HEAD): weights.get_tensor(key).to(device, dtype, copy=True)
                     for key in weights.keys() if key.startswith(LVR_HEAD)}
    if not head:
        return None

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = head[f"{name}.weight"], head[f"{name}.bias"]
        return (F.linear(x, weight, bias) if weight.dim() > 1 else
                F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6))

    forms = {  # lvr_head_type "simple" and "glu", by their layers
        ("ln_q", "mlp.0", "mlp.2"): lambda x: layer("mlp.2", F.gelu(layer("mlp.0", layer("ln_q", x)))),
        ("down_proj", "gate_proj", "up_proj"):
            lambda x: layer("down_proj", F.silu(layer("gate_proj", x)) * layer("up_proj", x))}
    for layers, form in forms.items():
        if sorted(head) == [f"{name}.{part}" for name in layers for part in ("bias", "weight")]:
            return form
    raise DataError(f"{path}: weights {LVR_HEAD}* named {sorted(head)}, expected a weight and a bias each of "
                    f"{' or '.join(map(', '.join, forms))}")


def load_processors(path: str, min_pixels: int | None = None, max_pixels: int | None = None) -> tuple:
    """Return a checkpoint's (tokenizer, image processor); pixels bound an image's area (None: its own)."""
    check_folder(path)
    for file in (Path(path) / "tokenizer.json", Path(path) / "vocab.json"):
        try:
            if file.is_file():
                json.loads(file.read_bytes())  # the library raises no particular error on a truncated file
        except ValueError as error:
            raise DataError(f"{file}: not whole ({error}); copy or train the checkpoint again") from error
    with checkpoint_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    if tokenizer.chat_template is None:  # some releases keep the template in a separate file
        template = find_file(path, "chat_template.json")
        if template is None:
            raise DataError(f"{path}: no chat template in tokenizer_config.json or chat_template.*")
        tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
    low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    low, high = low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels
    token = (image_processor.patch_size * image_processor.merge_size)**2
    if not token <= low <= high:
        raise DataError(f"pixel budget {low}..{high}: expected {token} <= min_pixels <= max_pixels")
    # from_pretrained(size=...) is ignored for checkpoints that store min_pixels and max_pixels
    image_processor.size = {"shortest_edge": low, "longest_edge": high}
    return tokenizer, image_processor


# ---- pictures
def move_bytes(array: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Return a picture's bytes [H, W, 3] as [patches, 3, patch * patch], each token's patches in a row."""
    rows, columns = (side // (patch * merge) for side in array.shape[:2])
    cells = array.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return cells.reshape(rows * columns * merge * merge, 3, patch * patch)


@lru_cache(8)
def values_of_bytes(image_processor: Qwen2VLImageProcessorPil) -> np.ndarray:
    """Return the processor's value of every byte in every colour, float32 [3, 256].

    The library moves floats; moving bytes and looking them up in this table takes less time.
    """
    patch, merge = image_processor.patch_size, image_processor.merge_size
    side = patch * merge
    ramp = np.arange(side**2).astype(np.uint8).reshape(side, side, 1).repeat(3, axis=2)
    values = image_processor([Image.fromarray(ramp)], do_resize=False, return_tensors="np")["pixel_values"]
    moved, table = move_bytes(ramp, patch, merge), np.empty((3, 256), dtype=np.float32)
    for color, pixels in enumerate(values.reshape(len(moved), 3, -1, patch * patch)[:, :, 0].swapaxes(0, 1)):
        table[color, moved[:, color]] = pixels
    return table


def process_images(image_processor: Qwen2VLImageProcessorPil, images: list[Image.Image]) -> dict | None:
    """Return {"pixel_values" [n_patches, 1176 or 1536], "image_grid_thw" [n_images, 3]} (CPU), if any."""
    if not images:
        return None
    patch, merge = image_processor.patch_size, image_processor.merge_size
    limits, table = image_processor.size, values_of_bytes(image_processor)
    sizes = [smart_size(*image.size, patch * merge, limits["shortest_edge"], limits["longest_edge"])
             for image in images]
    grids = torch.tensor([[1, height // patch, width // patch] for width, height in sizes])
    counts = grids.prod(1).tolist()
    pixels = torch.empty(sum(counts), 3, image_processor.temporal_patch_size, patch * patch)

    def fill(image: Image.Image, size: tuple[int, int], part: torch.Tensor) -> None:
        if image.size != size:
            image = image.resize(size, image_processor.resample)
        moved, part = move_bytes(np.asarray(image), patch, merge), part.numpy()
        for color in range(3):
            part[:, color] = table[color].take(moved[:, color])[:, None]  # the same in every frame

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, images, sizes, pixels.split(counts)))
    return {"pixel_values": pixels.flatten(1), "image_grid_thw": grids}


# ---- tensors
def encode(qwen: Qwen, prompts: list[str], images: list[list[Image.Image]]) -> dict:
    """Return `collate`'s tensors of prompts with one `<|image_pad|>` per image, on the model's device.

    Text after the generation prompt begins the assistant's reply.
    """
    ids = [qwen.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    pixels = [process_images(qwen.image_processor, row) for row in images]
    return {name: tensor.to(qwen.device) for name, tensor in collate(qwen, ids, pixels).items()}


def expand_images(qwen: Qwen, ids: list[int], pixels: dict | None) -> list[int]:
    """Return ids with each `<|image_pad|>` repeated for all visual tokens of its image."""
    image_id = special_id(qwen.tokenizer, IMAGE_TOKEN)
    grids = pixels["image_grid_thw"].tolist() if pixels else []
    if ids.count(image_id) != len(grids):
        raise DataError(f"{ids.count(image_id)} {IMAGE_TOKEN} in a prompt with {len(grids)} images; "
                        "expected one each")
    counts = iter(math.prod(grid) // qwen.image_processor.merge_size**2 for grid in grids)
    return [i for token in ids for i in ([token] * next(counts) if token == image_id else [token])]


def collate(qwen: Qwen, ids: list[list[int]], pixels: list[dict | None]) -> dict:
    """Pad token lists on the left into one batch.

    Returns input_ids, attention_mask, mm_token_type_ids (1 at visual tokens) [B, L], position_ids [3, B, L]
    and, with images, the tensors of `pixels` (image_grid_thw at least), concatenated. Without
    mm_token_type_ids the library silently falls back to 1-D positions.
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
    """Return the merged features [n_visual_tokens, hidden] of every image."""
    if "pixel_values" not in inputs:
        return []
    with multiplied_patches(qwen.model):
        out = qwen.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"],
                                                  return_dict=True)
    return list(out.pooler_output)


@contextmanager
def multiplied_patches(model: torch.nn.Module, device: str = "cuda") -> Iterator[None]:
    """Compute the vision tower's first layer, a convolution over the whole patch, as a matrix product on this
    kind of device: cuDNN may lack it in bfloat16, or take seconds (huggingface/transformers issue 45750,
    sgl-project/sglang-omni pull 539)."""
    conv = model.model.visual.patch_embed.proj
    if conv.weight.device.type != device or "forward" in vars(conv):  # already replaced by an outer block
        yield
        return
    conv.forward = lambda patches: F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    try:
        yield
    finally:
        del conv.forward
