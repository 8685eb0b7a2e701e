"""Patches equal those of the library's image processor, to the bit."""
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from utils.qwen import move_bytes, process_images, values_of_bytes

RANDOM = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("patch", [14, 16])  # Qwen2.5-VL, Qwen3-VL
@pytest.mark.parametrize("low, high", [(3136, 12845056), (50000, 60000), (784 * 200, 784 * 400)])
def test_every_value_is_the_librarys(patch, low, high):
    processor = Qwen2VLImageProcessorPil(patch_size=patch, image_mean=[0.48, 0.46, 0.41],
                                         image_std=[0.27, 0.26, 0.28])
    processor.size = {"shortest_edge": low, "longest_edge": high}
    pictures = [noise(*size) for size in ((28, 28), (64, 320), (333, 517), (1000, 90), (448, 448), (30, 31))]
    expected, computed = processor(pictures, return_tensors="pt"), process_images(processor, pictures)
    assert torch.equal(computed["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(computed["pixel_values"], expected["pixel_values"])
    assert computed["pixel_values"].dtype == torch.float32 and process_images(processor, []) is None


def test_other_settings_have_another_table():
    tables = [values_of_bytes(Qwen2VLImageProcessorPil(image_mean=[mean] * 3, image_std=[0.5] * 3))
              for mean in (0.5, 0.25)]
    assert np.allclose(tables[0], (np.arange(256) / 255 - 0.5) / 0.5, atol=1e-6)
    assert np.allclose(tables[1] - tables[0], 0.5, atol=1e-6)


def test_the_patches_of_a_merged_token_are_neighbours():
    """The bytes are their place: patch 1 is right of patch 0, patch 2 below it, patch 4 in the next token."""
    rows, columns = np.indices((56, 84)) // 14
    moved = move_bytes(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8), 14, 2)
    assert [tuple(patch[:2, 0]) for patch in moved[:6]] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]
    assert (moved == moved[:, :, :1]).all()
