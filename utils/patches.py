"""The image processor of a checkpoint: the pixel budget, and pictures as the patches of a vision tower.

The patches equal the library's bit for bit, in less time: the library moves floats; here bytes are moved and
then looked up in a table that the processor itself fills.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from utils.images import smart_size
from utils.jsonl import DataError

PROBE_SIZE = (1000, 700)  # pixels: a budget below 840 visual tokens binds
THREADS = 4  # Pillow and numpy work outside the interpreter's lock


def set_pixel_budget(image_processor: Qwen2VLImageProcessorPil, min_pixels: int | None,
                     max_pixels: int | None) -> None:
    """Bound the area of one image, in pixels, and check on a probe image that the bound holds.

    `from_pretrained(size=...)` is silently ignored on checkpoints that store min_pixels and max_pixels, so
    the size is assigned after loading.
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
        raise DataError(f"pixel budget {low}..{high}: the image processor made a grid {grid} of a "
                        f"{PROBE_SIZE} probe, expected {expected}; transformers ignores the budget")


def move_bytes(array: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Return a picture's bytes [H, W, 3] as [patches, 3, patch * patch], each token's patches in a row."""
    rows, columns = (side // (patch * merge) for side in array.shape[:2])
    cells = array.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return cells.reshape(rows * columns * merge * merge, 3, patch * patch)


@lru_cache(8)
def values_of_bytes(image_processor: Qwen2VLImageProcessorPil) -> np.ndarray:
    """Return the processor's value of every byte in every colour, float32 [3, 256]."""
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
