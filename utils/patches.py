"""Pictures as the patches that a vision tower reads: to the bit what the library's image processor makes, in
less time.

The library turns a picture into floats and then moves these about; here its bytes are moved, and looked up at
the end. What a byte becomes is asked of the processor itself, whose settings stay the only ones.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from utils.images import smart_size

THREADS = 4  # to decode and move bytes, which Pillow and numpy do outside of the interpreter's lock


def move_bytes(array: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """Return the bytes [H, W, 3] of a picture as [patches, 3, patch * patch], the patches of a merged token
    side by side."""
    rows, columns = (side // (patch * merge) for side in array.shape[:2])
    cells = array.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return cells.reshape(rows * columns * merge * merge, 3, patch * patch)


@lru_cache(8)
def values_of_bytes(image_processor: Qwen2VLImageProcessorPil) -> np.ndarray:
    """Return what the processor makes of every byte in every colour, float32 [3, 256]."""
    patch, merge = image_processor.patch_size, image_processor.merge_size
    ramp = np.arange((patch * merge) ** 2).astype(np.uint8).reshape(patch * merge, patch * merge,
                                                                    1).repeat(3, axis=2)
    values = image_processor([Image.fromarray(ramp)], do_resize=False, return_tensors="np")["pixel_values"]
    moved, table = move_bytes(ramp, patch, merge), np.empty((3, 256), dtype=np.float32)
    for color, its in enumerate(values.reshape(len(moved), 3, -1, patch * patch)[:, :, 0].swapaxes(0, 1)):
        table[color, moved[:, color]] = its
    return table


def process_images(image_processor: Qwen2VLImageProcessorPil, images: list[Image.Image]) -> dict | None:
    """Return {"pixel_values" [n_patches, 1176 or 1536], "image_grid_thw" [n_images, 3]} on the CPU; None for
    no image."""
    if not images:
        return None
    patch, merge, frames = (getattr(image_processor, f"{name}_size") for name in ("patch", "merge",
                                                                                  "temporal_patch"))
    limits, table = image_processor.size, values_of_bytes(image_processor)
    sizes = [smart_size(*image.size, patch * merge, limits["shortest_edge"], limits["longest_edge"])
             for image in images]
    grids = torch.tensor([[1, height // patch, width // patch] for width, height in sizes])
    counts = grids.prod(1).tolist()
    pixels = torch.empty(sum(counts), 3, frames, patch * patch)

    def fill(image: Image.Image, size: tuple[int, int], part: torch.Tensor) -> None:
        if image.size != size:
            image = image.resize(size, image_processor.resample)
        moved, part = move_bytes(np.asarray(image), patch, merge), part.numpy()
        for color in range(3):
            # a picture is the same in every frame
            part[:, color] = table[color].take(moved[:, color])[:, None]

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, images, sizes, pixels.split(counts)))
    return {"pixel_values": pixels.flatten(1), "image_grid_thw": grids}
