"""Latent imagination in training: rows laid out so that their latents share columns, the recurrence, and the
alignment.

A latent position is fed the last hidden state of the position before it, so that a batch runs text blocks and
single latent steps in turn, with gradients throughout. What is fed here is what `utils.decode` feeds
(tests/test_latents.py).
"""
import torch
import torch.nn.functional as F

from utils.latent_families import LatentSpec, latent_ids
from utils.patches import process_images
from utils.qwen import Qwen, collate, image_features, multiplied_patches
from utils.train.examples import Example, Target, load_images


def lay_out(lengths: list[list[int]], n_latents: int, n_blocks: int) -> tuple[list[list[int]],
                                                                              list[tuple[int, int]]]:
    """Place the pieces of every row so that latent segments share columns over the batch.

    `lengths[i]` are the lengths of row i's text pieces, between which lie its latent segments of `n_latents`
    each. Every piece is padded on the left to the longest of its rank; `n_blocks` pieces are laid out, one
    column wide where no row has one. Returns the column of each token of each row, and the column ranges
    (first, last + 1) of the text blocks.
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


def make_batch(qwen: Qwen, examples: list[Example], weights: list[float], target: Target, n_blocks: int
               | None = None) -> dict:
    """Collate examples: the tensors of `utils.qwen.collate` in `lay_out`'s columns, and the targets.

    `source` [n] are flat indices into [B, L] of the positions that predict, `target` [n] the ids predicted,
    `weight` [n] and `row` [n] as in a pack; `latents` are (row, segment) of every imagined image, whose
    pixels are `step_pixel_values` and `step_image_grid_thw`, and `latent_weight` [segments] is 1, or 0 in a
    row of weight 0. `n_blocks`: text blocks to run where other ranks run more than these examples need (all
    must run as many).
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
    source, targets, weight, rows = [], [], [], []
    for i, (example, row, places) in enumerate(zip(examples, ids, columns)):
        laid["input_ids"][i, places] = torch.tensor(row)
        laid["attention_mask"][i, places] = 1
        laid["position_ids"][:, i, places] = batch["position_ids"][:, i, batch["attention_mask"][i].bool()]
        first = len(row) - len(example.trained)  # images were expanded, all before the first trained token
        trained = [first + j for j, is_trained in enumerate(example.trained) if is_trained]
        source += [i * shape[1] + places[j - 1] for j in trained]
        targets += [row[j] for j in trained]
        weight += [weights[i]] * len(trained)
        rows += [i] * len(trained)
    imagined = [image for e in examples for image in load_images(e.steps, target, qwen.factor)]
    steps = process_images(qwen.image_processor, imagined)
    return {**batch, **laid, "source": torch.tensor(source), "target": torch.tensor(targets),
            "weight": torch.tensor(weight), "row": torch.tensor(rows), "blocks": blocks,
            "row_ids": [e.id for e in examples],
            "latents": [(i, s) for i, e in enumerate(examples) for s in range(len(e.steps))],
            "latent_weight": torch.tensor([float(weights[i] > 0) for i, e in enumerate(examples)
                                           for _ in e.steps]),
            **{f"step_{name}": tensor for name, tensor in (steps or {}).items()}}


def run_latents(model: torch.nn.Module, batch: dict, spec: LatentSpec) -> tuple[torch.Tensor,
                                                                                list[list[torch.Tensor]]]:
    """Run text blocks and latent steps in turn, each latent fed the state before it, with gradients
    throughout.

    Returns the states [B, L, hidden] and, a segment, its K latents [B, hidden]: the very vectors that
    `utils.decode` would feed.
    """
    states, latents, past = [], [], None

    def step(start: int, end: int, **inputs) -> torch.Tensor:
        nonlocal past
        with multiplied_patches(model):
            out = model.model(attention_mask=batch["attention_mask"][:, :end], use_cache=True,
                              past_key_values=past, position_ids=batch["position_ids"][:, :, start:end],
                              **inputs)
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
    """Sum over segments of the mean distance of its K latents to the imagined image's features pooled to K.

    Pooling as Mirage does: K groups of consecutive merged features, the remainder dropped. `loss` "cosine"
    (Mirage) or "mse" (LVR).
    """
    with torch.no_grad():
        features = image_features(qwen, {"pixel_values": batch["step_pixel_values"],
                                         "image_grid_thw": batch["step_image_grid_thw"]})
    total = latents[0][0].new_zeros((), dtype=torch.float32)
    for (row, segment), feature, weight in zip(batch["latents"], features, batch["latent_weight"],
                                               strict=True):
        mine, size = torch.stack([step[row] for step in latents[segment]]).float(), len(latents[segment])
        pooled = feature[:len(feature) // size * size].unflatten(0, (size, -1)).mean(1).float()
        distance = 1 - F.cosine_similarity(mine, pooled) if loss == "cosine" else (mine
                                                                                   - pooled).square().mean(-1)
        total = total + distance.mean() * weight
    return total
