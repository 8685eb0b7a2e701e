"""Latent imagination in training: batches whose latents share columns, the recurrence, and the alignment.

A latent position is fed the last hidden state of the position before it, so that a batch alternates between
text blocks and single latent steps, with gradients throughout. The vectors fed are those that `utils.decode`
feeds.
"""
import torch
import torch.nn.functional as F

from utils.latent_families import LatentSpec, latent_ids
from utils.patches import process_images
from utils.qwen import Qwen, collate, image_features, multiplied_patches
from utils.train.examples import Example, Target, load_images


def lay_out(lengths: list[list[int]], n_latents: int,
            n_blocks: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Place the tokens of every row so that latent segments share columns over the batch.

    Text pieces are padded on the left to the longest of their block. Three rows of text t and latents z, with
    lengths [[3, 2], [1, 4], [2]], n_latents 2 and n_blocks 2; `.` is padding:

        column   0 1 2  3 4  5 6 7 8
        row 0    t t t  z z  . . t t
        row 1    . . t  z z  t t t t
        row 2    . t t  . .  . . . .

    A block that no row has is one column wide. Returns the column of each token of each row, and the column
    ranges (first, last + 1) of the text blocks, here [(0, 3), (5, 9)].
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
    in a pack. `latents` are (row, segment) of every imagined image, whose pixels are `step_pixel_values` and
    `step_image_grid_thw`. `n_blocks`: text blocks to run if other ranks need more (all must run the same
    number).
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
    return {**batch, **laid, "blocks": blocks,
            "logit_positions": torch.tensor(logit_positions),
            "labels": torch.tensor(labels),
            "row": torch.tensor(rows),
            "row_ids": [e.id for e in examples],
            "weight": weight,
            "latents": [(i, s) for i, e in enumerate(examples) for s in range(len(e.steps))],
            **{f"step_{name}": tensor for name, tensor in (steps or {}).items()}}


def run_latents(model: torch.nn.Module, batch: dict,
                spec: LatentSpec) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Run text blocks and latent steps in turn, each latent fed the state before it.

    Returns the states [B, L, hidden] and the K latents [B, hidden] of each segment.
    """
    states, latents, past = [], [], None

    def step(start: int, end: int, **inputs) -> torch.Tensor:
        nonlocal past
        with multiplied_patches(model):
            out = model.model(attention_mask=batch["attention_mask"][:, :end],
                              position_ids=batch["position_ids"][:, :, start:end],
                              use_cache=True, past_key_values=past, **inputs)
        past = out.past_key_values
        states.append(out.last_hidden_state)
        return out.last_hidden_state[:, -1]

    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    for block, (start, end) in enumerate(batch["blocks"]):
        last = step(start, end, input_ids=batch["input_ids"][:, start:end], **(images if block == 0 else {}))
        if block + 1 < len(batch["blocks"]):
            latents.append([])
            for k in range(spec.size):
                latents[-1].append(last)
                last = step(end + k, end + k + 1, inputs_embeds=last[:, None])
    return torch.cat(states, dim=1), latents


def align(qwen: Qwen, batch: dict, latents: list[list[torch.Tensor]], loss: str) -> torch.Tensor:
    """Return the sum over segments of the mean distance from K latents to the image's features, pooled to K.

    Pooling is Mirage's: K groups of consecutive merged features, the remainder dropped. `loss` is "cosine"
    (Mirage) or "mse" (LVR).
    """
    with torch.no_grad():
        features = image_features(qwen, {"pixel_values": batch["step_pixel_values"],
                                         "image_grid_thw": batch["step_image_grid_thw"]})
    total = latents[0][0].new_zeros((), dtype=torch.float32)
    for (row, segment), feature in zip(batch["latents"], features, strict=True):
        states, size = torch.stack([step[row] for step in latents[segment]]).float(), len(latents[segment])
        pooled = feature[:len(feature) // size * size].unflatten(0, (size, -1)).mean(1).float()
        if loss == "cosine":
            distance = 1 - F.cosine_similarity(states, pooled)
        else:
            distance = (states - pooled).square().mean(-1)
        total = total + distance.mean()
    return total * batch["weight"]
