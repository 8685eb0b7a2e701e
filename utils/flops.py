"""How many floating-point operations a training step of Qwen2.5-VL needs, and what a device can do at best.

Model operations: a multiplication and an addition are two; activations computed a second time do not count, nor does a
frozen tower's backward pass, nor what no prediction depends on: in the last layer, the MLP at positions that predict nothing.
MFU = model operations / (seconds x devices x peak).
"""
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16 a second, NVIDIA's data sheets
WINDOW = 64  # patches that a patch of the vision tower sees in its windowed blocks: 112 / 14, squared


def training_flops(config, lengths: list[int], n_targets: int, grids: list[tuple[int, int, int]],
                   train_vision: bool = False) -> float:
    """Return the operations of forward and backward passes over rows of `lengths` tokens, with `n_targets` predictions.

    `config` is the model's; `grids` are (frames, rows, columns) of patches of every image. The terms are those of
    the usual count: matrices a token, attention within a row (half of it is masked), the head at predictions
    and the last layer's MLP at predictions
    alone, and the tower with full attention in `fullatt_block_indexes` and windows elsewhere.
    """
    text, vision = config.text_config, config.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    kv_width = text.num_key_value_heads * (width // text.num_attention_heads)
    matrices = layers * (2 * width * width + 2 * width * kv_width + 3 * width * text.intermediate_size)
    attention = layers * width * sum(2 * n * n for n in lengths)  # 4 n^2, half of it masked
    at_all = matrices - 3 * width * text.intermediate_size
    at_targets = width * (3 * text.intermediate_size + text.vocab_size)
    language = 2 * (at_all * sum(lengths) + at_targets * n_targets) + attention
    patches = [t * h * w for t, h, w in grids]
    n, d = sum(patches), vision.hidden_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = d * vision.spatial_merge_size**2
    n_full = sum(block < vision.depth for block in vision.fullatt_block_indexes)
    tower = (2 * n * (vision.depth * (4 * d * d + 3 * d * vision.intermediate_size) + pixels * d)
             + 4 * d * n_full * sum(p * p for p in patches)
             + 4 * d * (vision.depth - n_full) * sum(p * min(p, WINDOW) for p in patches)
             + 2 * n // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size))
    return 3.0 * language + (3.0 if train_vision else 1.0) * tower


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 operations a second of a device by its name, or None for one not in PEAKS."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
