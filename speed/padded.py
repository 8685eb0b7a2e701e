"""Rows with latents as one padded batch, run by the library's own cache and masks: what packs replaced.

Text blocks and latent steps take turns, so that a latent step needs common columns over the batch.
"""
import torch
from torch import nn

from utils.latent_families import latent_ids
from utils.qwen import collate, multiplied_patches, process_images
from utils.train.examples import load_images
from utils.train.model import Objective, align


def lay_out(lengths, n_latents, n_blocks):
    """Place the tokens of every row so that latent segments share columns over the batch.

    Text pieces are padded on the left. Three rows of text t and latents z, with lengths [[3, 2], [1, 4],
    [2]], n_latents 2 and n_blocks 2; `.` is padding:

        column   0 1 2  3 4  5 6 7 8
        row 0    t t t  z z  . . t t
        row 1    . . t  z z  t t t t
        row 2    . t t  . .  . . . .

    Returns the column of each token of each row, and the column ranges (first, last + 1) of the text blocks,
    here [(0, 3), (5, 9)].
    """
    blocks, offset = [], 0
    for block in range(n_blocks):
        width = max(pieces[block] for pieces in lengths if len(pieces) > block)
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


def piece_lengths(ids, pad_id, n_latents):
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


def make_batch(qwen, examples, target):
    """Collate examples: the tensors of `utils.qwen.collate` in the columns of `lay_out`, and the labels,
    whose `logit_positions` [n] are flat indices into [B, L]; `segments`: (row, segment) of images."""
    spec = target.spec
    pixels = [process_images(qwen.image_processor, load_images(e.images, target, qwen.factor))
              for e in examples]
    batch = collate(qwen, [e.ids for e in examples], pixels)
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    pieces = [piece_lengths(row, latent_ids(qwen.tokenizer, spec).pad, spec.size) for row in ids]
    columns, blocks = lay_out(pieces, spec.size, max(map(len, pieces)))
    shape = len(ids), blocks[-1][1]
    laid = {"input_ids": torch.full(shape, qwen.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(3, *shape, dtype=torch.long)}
    logit_positions, labels = [], []
    for i, (example, row, places) in enumerate(zip(examples, ids, columns)):
        laid["input_ids"][i, places] = torch.tensor(row)
        laid["attention_mask"][i, places] = 1
        laid["position_ids"][:, i, places] = batch["position_ids"][:, i, batch["attention_mask"][i].bool()]
        first = len(row) - len(example.trained)  # images were expanded, all before the first trained token
        trained = [first + j for j, is_trained in enumerate(example.trained) if is_trained]
        logit_positions += [i * shape[1] + places[j - 1] for j in trained]
        labels += [row[j] for j in trained]
    imagined = [image for e in examples for image in load_images(e.steps, target, qwen.factor)]
    steps = process_images(qwen.image_processor, imagined)
    return {**batch, **laid, "blocks": blocks, "logit_positions": torch.tensor(logit_positions),
            "labels": torch.tensor(labels), "weight": 1.0,
            "segments": [(i, s) for i, e in enumerate(examples) for s in range(len(e.steps))],
            **{f"step_{name}": tensor for name, tensor in (steps or {}).items()}}


def run_padded(model, batch, n_latents):
    """Run text blocks and latent steps in turn; return the states [B, L, hidden] and, for each segment, its
    latents [B, K, hidden]."""
    states, latents, past = [], [], None

    def step(start, end, **inputs):
        nonlocal past
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
            fed = []
            for k in range(n_latents):
                fed.append(last)
                last = step(end + k, end + k + 1, inputs_embeds=last[:, None])
            latents.append(torch.stack(fed, dim=1))
    return torch.cat(states, dim=1), latents


class PaddedObjective(nn.Module):
    """What an Objective returns, of a padded batch."""

    def __init__(self, qwen, n_latents, align_loss="cosine"):
        super().__init__()
        self.objective, self.n_latents = Objective(qwen, align_loss), n_latents

    def forward(self, batch):
        objective = self.objective
        aligned = torch.zeros(())
        with multiplied_patches(objective.model, objective.model.device.type):
            states, latents = run_padded(objective.model, batch, self.n_latents)
            if batch["segments"]:
                fed = torch.stack([latents[segment][row] for row, segment in batch["segments"]])
                aligned = align(objective.qwen, batch, fed, objective.align_loss)
        return *objective.predict(states.flatten(0, 1)[batch["logit_positions"]], batch["labels"]), aligned
