"""Fine-tune a Qwen2.5-VL on chains whose imagination is text, latents, a placeholder, or left out.

Stage 3 of 6:  filter_data.py -> [train_sft.py] -> evaluate.py, intervene.py, probe.py    (one 8-GPU node; a toy on a CPU)

    torchrun --standalone --nproc_per_node 8 train_sft.py --data sft.jsonl --image_root images --output checkpoint
    python train_sft.py --model tiny --data sft.jsonl --output checkpoint --batch_size 16 --global_batch 64

Reads   --data: JSONL rows {"id", "images", "question", "answer", "steps", "chain"} as filter_data.py writes them
Writes  --output: a checkpoint in the released layout, the best by held-out loss; it appears when training is complete.
        <output>.run/: log.jsonl (one line a step), step-N/ (whole checkpoints to resume from), best/
Prints  progress and one line a logged step on stderr; on stdout one JSON object, also <output>.metrics.json

The target is decided by --imagination, from the same rows and with the same loss otherwise:
  text         the chain, each imagination written between <think_image> and </think_image> (CapImagine)
  placeholder  the original steps, each image replaced by one <think_image> (the paper's "without rewriting")
  latent       the original steps, each image replaced by K latents fed recurrently and aligned to that image (Mirage)
  direct       the boxed answer alone
"""
import argparse
import json
import math
import os
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from tqdm import tqdm

from utils.decode import PRESETS, LatentSpec, latent_ids
from utils.flops import peak_flops, training_flops
from utils.images import budget_sizes, image_size, open_image, resolve_image, smart_size
from utils.packing import plan_packs, run_packed, use_packed_attention
from utils.qwen import Qwen, add_tokens, chat, collate, image_features, load, plain, process_images, save
from utils.rows import DataError, cli, log, read_rows, stop_on_signals, write_json, write_meta

INPUT_FIELDS = {"id": str, "images": list, "question": str, "answer": str, "steps": list, "chain": str}
PLACEHOLDER = "<think_image>"  # DESIGN.md, Rows: one bare marker an image
END_OF_TURN = "<|im_end|>"


# ---------------------------------------------------------------------------------------------- rows -> tensors
def target_text(row: dict, imagination: str, spec: LatentSpec | None = None) -> str:
    """Return what the assistant is trained to say for a row (without the end-of-turn token)."""
    if imagination == "text":
        return plain(row["chain"])
    if imagination == "direct":
        return f"\\boxed{{{plain(row['answer'])}}}"
    mark = PLACEHOLDER if spec is None else spec.start + spec.pad * spec.size + spec.end
    pieces = [mark if "image" in step else plain(step["text"].strip()) for step in row["steps"]]
    return " ".join(piece for piece in pieces if piece)


def load_images(paths: list[Path], total_tokens: int, image_tokens: int, factor: int) -> list:
    """Open images and bring them under the sample's budget of visual tokens (Monet's resize_by_token_budget)."""
    images = [open_image(path) for path in paths]
    sizes = budget_sizes([image.size for image in images], total_tokens, image_tokens, factor)
    return [image if image.size == size else image.resize(size, 3) for image, size in zip(images, sizes)]  # 3: bicubic


def count_visual_tokens(qwen: Qwen, paths: list[Path], args: argparse.Namespace) -> int:
    """Return how many visual tokens `load_images` and the image processor will make of images, from their headers."""
    limits = qwen.image_processor.size["shortest_edge"], qwen.image_processor.size["longest_edge"]
    sizes = budget_sizes([image_size(path) for path in paths], args.image_tokens, args.tokens_per_image, qwen.factor)
    areas = (math.prod(smart_size(*size, qwen.factor, *limits)) for size in sizes)
    return sum(area // qwen.factor**2 for area in areas)


@dataclass
class Example:
    """One row as tokens, an image still being one of them: `trained[j]` says that token j is a target.

    `steps` are the paths of the imagined images; `n_tokens` counts the visual tokens too.
    """

    id: str
    ids: list[int]
    trained: list[bool]
    images: list[Path]
    steps: list[Path]
    n_tokens: int


def make_example(qwen: Qwen, row: dict, args: argparse.Namespace, spec: LatentSpec | None) -> Example:
    """Tokenise one row. Trained: the assistant's words and the end of its turn; not the prompt, the latent pads, nor an
    end marker that decoding forces."""
    root = Path(args.image_root)
    images = [resolve_image(root, name) for name in row["images"]]
    prompt = chat(qwen.tokenizer, row["question"], len(images), args.system)
    reply = target_text(row, args.imagination, spec) + END_OF_TURN
    prompt_ids, reply_ids = (qwen.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, reply))
    steps, untrained = [], set()
    if spec is not None:
        _, pad_id, end_id = latent_ids(qwen.tokenizer, spec)
        untrained = {pad_id, end_id} if spec.force_end else {pad_id}
        steps = [resolve_image(root, step["image"]) for step in row["steps"] if "image" in step]
    trained = [False] * len(prompt_ids) + [i not in untrained for i in reply_ids]
    n_tokens = len(trained) - len(images) + count_visual_tokens(qwen, images, args)
    if spec is None and n_tokens > args.max_tokens:
        raise DataError(f"{row['id']}: {n_tokens} tokens, visual ones included; --max_tokens {args.max_tokens} is less: raise "
                        "it, or take the row out")
    return Example(row["id"], prompt_ids + reply_ids, trained, images, steps, n_tokens)


def make_pack(qwen: Qwen, examples: list[Example], weights: list[float], args: argparse.Namespace) -> dict:
    """Put rows one behind the other into one sequence of L tokens, without padding.

    Returns input_ids [1, L], position_ids [3, 1, L] (from 0 in every row), pixel_values and image_grid_thw if there is an
    image, cu_seqlens int32 [rows + 1], max_length, keep [1, L] (the positions that predict), target [n], weight [n].
    """
    budget, rows = (args.image_tokens, args.tokens_per_image, qwen.factor), []
    for example in examples:
        pixels = process_images(qwen.image_processor, load_images(example.images, *budget))
        rows.append(collate(qwen, [example.ids], [pixels], "left"))
        if rows[-1]["input_ids"].shape[1] != example.n_tokens:
            raise DataError(f"{example.id}: {rows[-1]['input_ids'].shape[1]} tokens, where the headers of its images said "
                            f"{example.n_tokens}; was an image changed during the run?")
    pack = {name: torch.cat([row[name] for row in rows], dim=-1) for name in ("input_ids", "position_ids")}
    for name in ("pixel_values", "image_grid_thw"):
        if present := [row[name] for row in rows if name in row]:
            pack[name] = torch.cat(present)
    lengths = torch.tensor([0] + [example.n_tokens for example in examples])
    keep, target, weight = torch.zeros_like(pack["input_ids"], dtype=torch.bool), [], []
    for example, row, end, its in zip(examples, rows, lengths.cumsum(0)[1:].tolist(), weights):
        places = torch.tensor(example.trained).nonzero().flatten() - len(example.trained)  # from the end of the row
        keep[0, end + places - 1] = True
        target.append(row["input_ids"][0, places])
        weight += [its] * len(places)
    return pack | {"cu_seqlens": lengths.cumsum(0).int(), "max_length": int(lengths.max()), "keep": keep,
                   "target": torch.cat(target), "weight": torch.tensor(weight), "latent_weight": torch.zeros(0),
                   "row_ids": [example.id for example in examples]}


def lay_out(lengths: list[list[int]], n_latents: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Place the pieces of every row so that latent segments share columns over the batch.

    `lengths[i]` are the lengths of row i's text pieces, between which lie its latent segments of `n_latents` each.
    Every piece is padded on the left to the longest of its rank. Returns the column of each token of each row, and the
    column ranges (first, last + 1) of the text blocks.
    """
    n_blocks = max(map(len, lengths))
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


def make_batch(qwen: Qwen, examples: list[Example], weights: list[float], args: argparse.Namespace,
               spec: LatentSpec | None) -> dict:
    """Collate examples: the tensors of `utils.qwen.collate` in `lay_out`'s columns, and the targets.

    `source` [n] are flat indices into [B, L] of the positions that predict, `target` [n] the ids predicted, `weight` [n].
    """
    budget = args.image_tokens, args.tokens_per_image, qwen.factor
    pixels = [process_images(qwen.image_processor, load_images(e.images, *budget)) for e in examples]
    batch = collate(qwen, [e.ids for e in examples], pixels, "left")
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    pad_id, size = (latent_ids(qwen.tokenizer, spec)[1], spec.size) if spec else (None, 0)
    columns, blocks = lay_out([piece_lengths(row, pad_id, size) for row in ids], size)
    shape = len(ids), blocks[-1][1]
    laid = {"input_ids": torch.full(shape, qwen.tokenizer.pad_token_id), "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(3, *shape, dtype=torch.long)}
    source, target, weight = [], [], []
    for i, (example, row, places) in enumerate(zip(examples, ids, columns)):
        laid["input_ids"][i, places] = torch.tensor(row)
        laid["attention_mask"][i, places] = 1
        laid["position_ids"][:, i, places] = batch["position_ids"][:, i, batch["attention_mask"][i].bool()]
        first = len(row) - len(example.trained)  # images were expanded, all before the first trained token
        for j, is_trained in enumerate(example.trained):
            if is_trained:
                source.append(i * shape[1] + places[first + j - 1])
                target.append(row[first + j])
                weight.append(weights[i])
    helpers = [image for e in examples for image in load_images(e.steps, *budget)]
    helper = process_images(qwen.image_processor, helpers) or {}
    return {**batch, **laid, "source": torch.tensor(source), "target": torch.tensor(target),
            "weight": torch.tensor(weight), "blocks": blocks, "row_ids": [e.id for e in examples],
            "latents": [(i, s) for i, e in enumerate(examples) for s in range(len(e.steps))],
            "latent_weight": torch.tensor([weights[i] for i, e in enumerate(examples) for _ in e.steps]),
            **{f"helper_{name}": tensor for name, tensor in helper.items()}}


def piece_lengths(ids: list[int], pad_id: int | None, n_latents: int) -> list[int]:
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


class Steps(torch.utils.data.Dataset):
    """Item s is this rank's part of optimizer step s: a list of micro-batches, the same number on every rank.

    The rows of a step are a pure function of (seed, step), whatever the number of ranks: that is what resuming needs. Rows
    are packed up to --max_tokens; with latents, whose recurrence wants columns in common, they are padded, --batch_size at
    a time.
    """

    def __init__(self, qwen: Qwen, examples: list[Example], args: argparse.Namespace, spec: LatentSpec | None,
                 rank: int, world: int):
        self.qwen, self.examples, self.args, self.spec = qwen, examples, args, spec
        self.rank, self.world = rank, world
        self.per_epoch = math.ceil(len(examples) / args.global_batch)

    def rows_of(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        order = list(range(len(self.examples)))
        random.Random(f"{self.args.seed}/{epoch}").shuffle(order)
        return order[place * self.args.global_batch:(place + 1) * self.args.global_batch]

    def __getitem__(self, step: int) -> list[dict]:
        return self.padded(self.rows_of(step)) if self.spec else self.packed(self.rows_of(step))

    def packed(self, rows: list[int]) -> list[dict]:
        plan = plan_packs([self.examples[i].n_tokens for i in rows], self.args.max_tokens, self.world)
        packs = []
        for pack in plan:
            mine = [self.examples[rows[k]] for k in pack[self.rank]]
            # a rank whose bin is empty computes a row that does not count, so that all ranks do as many
            packs.append(make_pack(self.qwen, mine, [1.0] * len(mine), self.args) if mine else
                         make_pack(self.qwen, [self.examples[rows[0]]], [0.0], self.args))
        return packs

    def balance(self, step: int) -> float:
        """Return the share of the devices' time that is not spent waiting for the slowest rank, by tokens."""
        lengths = [self.examples[i].n_tokens for i in self.rows_of(step)]
        if self.spec:
            return 1.0 if self.world == 1 else sum(lengths) / (self.world * max(
                sum(lengths[rank::self.world]) for rank in range(self.world)))
        plan = plan_packs(lengths, self.args.max_tokens, self.world)
        return sum(lengths) / sum(self.world * max(sum(lengths[i] for i in rank) for rank in packs) for packs in plan)

    def padded(self, rows: list[int]) -> list[dict]:
        n_each = math.ceil(len(rows) / self.world)
        mine = [(i, 1.0) for i in rows[self.rank::self.world]]
        mine += [(rows[0], 0.0)] * (n_each - len(mine))  # a rank with fewer rows computes one that does not count
        mine.sort(key=lambda pair: len(self.examples[pair[0]].ids))  # rows of like length together: less padding
        size = self.args.batch_size
        return [make_batch(self.qwen, [self.examples[i] for i, _ in part], [w for _, w in part], self.args, self.spec)
                for part in (mine[k:k + size] for k in range(0, n_each, size))]


# ---------------------------------------------------------------------------------------------- the objective
class Objective(torch.nn.Module):
    """Sums of losses over a micro-batch, so that the caller divides once by the whole step's count.

    Returns (cross-entropy summed over trained tokens, alignment summed over latents, number of right tokens).
    """

    def __init__(self, qwen: Qwen, spec: LatentSpec | None, align_loss: str):
        super().__init__()
        self.model, self.qwen, self.spec, self.align_loss = qwen.model, qwen, spec, align_loss

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        align = torch.zeros((), device=batch["input_ids"].device)
        if "cu_seqlens" in batch:
            logits = run_packed(self.model, batch, images)
        else:
            if batch["latents"]:
                hidden, latents = self.run_latents(batch, images)
                align = self.align(batch, latents)
            else:
                hidden = self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                          position_ids=batch["position_ids"], use_cache=False, **images).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[batch["source"]])
        logits = logits.view(-1, logits.shape[-1]).float()
        losses = F.cross_entropy(logits, batch["target"], reduction="none") * batch["weight"]
        right = ((logits.argmax(-1) == batch["target"]) * batch["weight"]).sum()
        return losses.sum(), align, right.detach()

    def run_latents(self, batch: dict, images: dict) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Run text blocks and latent steps in turn, each latent fed the state before it, with gradients throughout.

        Returns the states [B, L, hidden] and, a segment, its K latents [B, hidden]: the very vectors that
        `utils.decode` would feed.
        """
        states, latents, out = [], [], None
        for block, (start, end) in enumerate(batch["blocks"]):
            prompt = images if block == 0 else {}
            out = self.step(batch, start, end, out, input_ids=batch["input_ids"][:, start:end], **prompt)
            states.append(out.last_hidden_state)
            if block + 1 == len(batch["blocks"]):
                break
            latents.append([])
            for k in range(self.spec.size):
                latents[-1].append(out.last_hidden_state[:, -1])
                out = self.step(batch, end + k, end + k + 1, out, inputs_embeds=latents[-1][-1][:, None])
                states.append(out.last_hidden_state)
        return torch.cat(states, dim=1), latents

    def step(self, batch: dict, start: int, end: int, past, **inputs):
        return self.model.model(attention_mask=batch["attention_mask"][:, :end], use_cache=True,
                                position_ids=batch["position_ids"][:, :, start:end],
                                past_key_values=past.past_key_values if past else None, **inputs)

    def align(self, batch: dict, latents: list[list[torch.Tensor]]) -> torch.Tensor:
        """Sum over segments of the mean distance of its K latents to the imagined image's features pooled to K.

        Pooling as Mirage does: K groups of consecutive merged features, the remainder dropped.
        """
        with torch.no_grad():
            features = image_features(self.qwen, {"pixel_values": batch["helper_pixel_values"],
                                                  "image_grid_thw": batch["helper_image_grid_thw"]})
        total = latents[0][0].new_zeros(())
        for (row, segment), feature, weight in zip(batch["latents"], features, batch["latent_weight"], strict=True):
            size = self.spec.size
            if len(feature) < size:
                raise DataError(f"{batch['row_ids'][row]}: an imagined image has {len(feature)} visual tokens, "
                                f"expected at least --latent_size {size}")
            pooled = feature[:len(feature) // size * size].unflatten(0, (size, -1)).mean(1)
            mine = torch.stack([step[row] for step in latents[segment]])
            distance = (1 - F.cosine_similarity(mine, pooled) if self.align_loss == "cosine"
                        else (mine - pooled).square().mean(-1))
            total = total + distance.mean() * weight
        return total


# ---------------------------------------------------------------------------------------------- training
def learning_rate_at(step: int, n_steps: int, peak: float, warmup: int, schedule: str = "linear") -> float:
    """Linear warm-up over `warmup` steps, then linear decay to 0 at `n_steps` (the Trainer's "linear", Monet's choice)
    or no decay ("constant")."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (n_steps - step) / max(1, n_steps - warmup)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only, as the Trainer does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def count_work(qwen: Qwen, batches: list[dict], train_vision: bool) -> list[float]:
    """Return [trained tokens, aligned segments, tokens, images, operations] of this rank's micro-batches of a step."""
    total = [0.0] * 5
    for batch in batches:
        lengths = (batch["cu_seqlens"].diff() if "cu_seqlens" in batch else batch["attention_mask"].sum(1)).tolist()
        grids = [grid for name in ("image_grid_thw", "helper_image_grid_thw") if name in batch for grid in batch[name].tolist()]
        flops = training_flops(qwen.model.config, lengths, len(batch["target"]), grids, train_vision)
        mine = [float(batch["weight"].sum()), float(batch["latent_weight"].sum()), sum(lengths), len(grids), flops]
        total = [a + b for a, b in zip(total, mine)]
    return total


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def train_step(acc: Accelerator, qwen: Qwen, objective, optimizer, batches: list[dict], args: argparse.Namespace) -> dict:
    """One optimizer step: the loss is the mean over the trained tokens of the whole step, on all ranks together."""
    work = torch.tensor(count_work(qwen, batches, args.train_vision), dtype=torch.float64, device=acc.device)
    n_tokens, n_segments, n_seen, n_images, flops = acc.reduce(work, "sum").tolist()
    sums = torch.zeros(3, device=acc.device)
    for k, batch in enumerate(batches):
        with acc.no_sync(objective) if k + 1 < len(batches) else nullcontext():
            nll, align, right = objective(to_device(batch, acc.device))
            loss = nll / n_tokens + (args.align_weight * align / n_segments if n_segments else 0.0)
            acc.backward(loss * acc.num_processes)  # gradients are averaged over ranks, and counts are of all ranks
        sums += torch.stack([nll.detach(), align.detach(), right])
    norm = acc.clip_grad_norm_(objective.parameters(), args.clip)
    nll, align, right = acc.reduce(sums, "sum").tolist()
    if not math.isfinite(nll):
        raise DataError(f"loss is {nll} on rows {[i for b in batches for i in b['row_ids']]}; lower --learning_rate, or "
                        "look at these rows")
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": nll / n_tokens, "accuracy": right / n_tokens, "align": align / n_segments if n_segments else None,
            "grad_norm": float(norm), "trained_tokens": int(n_tokens), "tokens": int(n_seen), "images": int(n_images),
            "flops": flops}


@torch.no_grad()
def held_out_loss(acc: Accelerator, objective, steps: Steps) -> float:
    """Mean negative log-likelihood a trained token over the held-out rows."""
    objective.eval()
    sums = torch.zeros(2, device=acc.device)
    for step in range(steps.per_epoch):
        for batch in steps[step]:
            nll, _, _ = objective(to_device(batch, acc.device))
            sums += torch.tensor([float(nll), float(batch["weight"].sum())], device=acc.device)
    objective.train()
    nll, n_tokens = acc.reduce(sums, "sum").tolist()
    return nll / n_tokens


def publish(acc: Accelerator, folder: Path, write) -> None:
    """Let `write(temporary folder)` fill a folder beside, then move it into place: a folder that exists is whole."""
    temporary = folder.with_name(folder.name + ".part")
    if acc.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    acc.wait_for_everyone()
    write(temporary)
    acc.wait_for_everyone()
    if acc.is_main_process:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    acc.wait_for_everyone()


def newest_checkpoint(run: Path) -> Path | None:
    found = sorted((p for p in run.glob("step-*") if not p.name.endswith(".part")), key=lambda p: int(p.name[5:]))
    return found[-1] if found else None


class Run:
    """The state of a run that a checkpoint holds beside the model and the optimizer."""

    def __init__(self, step: int = 0, best_loss: float | None = None, best_step: int = 0):
        self.step, self.best_loss, self.best_step = step, best_loss, best_step

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def prepare_rows(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Read the rows of all --data files; return (training rows, held-out rows), the latter drawn by --seed."""
    rows = [row for path in args.data for row in read_rows(path, INPUT_FIELDS, limit=args.limit, hint="filter_data.py")]
    if len({row["id"] for row in rows}) != len(rows):
        raise DataError(f"--data {' '.join(args.data)}: some ids stand in two files; expected unique ids")
    if args.validation_rows >= len(rows):
        raise DataError(f"--validation_rows {args.validation_rows} of {len(rows)} rows leaves none to train on")
    random.Random(args.seed).shuffle(rows)
    return rows[args.validation_rows:], rows[:args.validation_rows]


def show_example(qwen: Qwen, example: Example) -> None:
    """Log one row as the model sees it, what is trained on between >> and <<."""
    text = ""
    for k, (token, is_trained) in enumerate(zip(example.ids, example.trained)):
        before = k > 0 and example.trained[k - 1]
        text += (">>" if is_trained and not before else "<<" if before and not is_trained else "")
        text += qwen.tokenizer.decode([token])
    log(f"first row, {example.id}:\n{text}<<")


def fit(acc: Accelerator, qwen: Qwen, objective, optimizer, train: Steps, held_out: Steps | None, run: Run,
        stop: Event, args: argparse.Namespace) -> None:
    """The training loop: from run.step to the end, with log, checkpoints and the best export.

    Once `stop` is set on any rank, all save after the step they are in and raise KeyboardInterrupt.
    """
    folder = Path(f"{args.output}.run")
    n_steps = args.max_steps or args.epochs * train.per_epoch
    keep_log(acc, folder / "log.jsonl", run.step)
    loader = torch.utils.data.DataLoader(train, batch_size=None, sampler=range(run.step, n_steps),
                                         num_workers=args.num_workers, collate_fn=lambda item: item)
    bar = tqdm(total=n_steps, initial=run.step, desc=f"train {args.imagination}", unit="step",
               disable=not acc.is_main_process)
    peak = peak_flops(torch.cuda.get_device_name()) if acc.device.type == "cuda" else None
    begun = time.perf_counter()
    for batches in loader:
        waited = time.perf_counter() - begun
        rate = learning_rate_at(run.step, n_steps, args.learning_rate, args.warmup_steps, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        record = {"balance": train.balance(run.step), **train_step(acc, qwen, objective, optimizer, batches, args)}
        run.step += 1
        seconds = time.perf_counter() - begun
        record |= {"step": run.step, "lr": rate, "seconds": round(seconds, 4), "data_wait": round(waited / seconds, 3),
                   "tokens_per_s": round(record["tokens"] / seconds), "images_per_s": round(record["images"] / seconds, 1),
                   "mfu": peak and round(record["flops"] / (seconds * acc.num_processes * peak), 4)}
        due = run.step == n_steps
        if held_out and (due or run.step % args.eval_every == 0):
            record["held_out_loss"] = held_out_loss(acc, objective, held_out)
            if run.best_loss is None or record["held_out_loss"] < run.best_loss:
                run.best_loss, run.best_step = record["held_out_loss"], run.step
                publish(acc, folder / "best", lambda to: acc.is_main_process and save(qwen, str(to)))
        if acc.is_main_process:
            with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        bar.update()
        bar.set_postfix_str(f"loss {record['loss']:.4f} acc {record['accuracy']:.3f} lr {rate:.1e} "
                            f"{record['tokens_per_s']} tok/s, wait {record['data_wait']:.0%}, balance {record['balance']:.2f}"
                            + (f", MFU {record['mfu']:.1%}" if peak else ""))
        # whether a signal came is asked of all ranks: they must leave at the same step
        told = float(acc.reduce(torch.tensor(float(stop.is_set()), device=acc.device), "sum")) > 0
        if due or told or run.step % args.save_every == 0:
            publish(acc, folder / f"step-{run.step}", lambda to: acc.save_state(str(to)))
            drop_old(acc, folder, args.keep)
        if told and not due:
            raise KeyboardInterrupt
        begun = time.perf_counter()
    bar.close()


def keep_log(acc: Accelerator, path: Path, n_lines: int) -> None:
    """Cut the log back to the step resumed from, so that no step stands in it twice."""
    if acc.is_main_process:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:n_lines] if path.exists() else []
        path.write_text("".join(lines), encoding="utf-8")


def drop_old(acc: Accelerator, folder: Path, keep: int) -> None:
    while acc.is_main_process and len(list(folder.glob("step-*"))) > keep:
        shutil.rmtree(min(folder.glob("step-*"), key=lambda path: int(path.name[5:])))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of rows")
    parser.add_argument("--image_root", default=".", help="folder that image paths are relative to")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="checkpoint to start from")
    parser.add_argument("--output", required=True, help="folder of the trained checkpoint; an existing one is an error")
    parser.add_argument("--imagination", choices=("text", "latent", "placeholder", "direct"), default="text")
    parser.add_argument("--latent", choices=sorted(PRESETS), default="mirage", help="family of the latent tokens")
    parser.add_argument("--latent_size", type=int, default=None, help="latents an image (default: the family's)")
    parser.add_argument("--align_weight", type=float, default=10.0,
                        help="weight of the alignment beside a cross-entropy of weight 1 (Mirage stage 1: 1 beside 0.1; "
                             "its stage 2: 0)")
    parser.add_argument("--align_loss", choices=("cosine", "mse"), default="cosine", help="Mirage: cosine; LVR: mse")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max_steps", type=int, default=None, help="optimizer steps in all (overrides --epochs)")
    parser.add_argument("--global_batch", type=int, default=128, help="rows an optimizer step, whatever the number of GPUs")
    parser.add_argument("--max_tokens", type=int, default=8192, help="tokens a forward pass on one device, visual ones "
                        "included: rows are packed up to it")
    parser.add_argument("--batch_size", type=int, default=1, help="--imagination latent: rows a forward pass, padded")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear", help="after the warm-up")
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--train_vision", action="store_true", help="train the vision tower too (the paper freezes it)")
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto", help="compute the language "
                        "model's activations again in the backward pass; auto: on a GPU, and never with latents")
    parser.add_argument("--image_tokens", type=int, default=2000, help="visual tokens a row before images are scaled down")
    parser.add_argument("--tokens_per_image", type=int, default=1280, help="then the most of one image (Monet)")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--validation_rows", type=int, default=0, help="rows held out to choose the best checkpoint")
    parser.add_argument("--eval_every", type=int, default=50, help="steps between looks at the held-out rows")
    parser.add_argument("--save_every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints kept to resume from")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that prepare batches; 0 for none")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, default=None, help="read only the first N rows of each file")
    parser.add_argument("--dry_run", action="store_true", help="show the first row and the plan; train nothing")
    args = parser.parse_args(argv)
    for name in ("epochs", "global_batch", "batch_size", "max_tokens", "eval_every", "save_every", "keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args, begun = parse_args(argv), time.time()
    output, folder = Path(args.output), Path(f"{args.output}.run")
    if output.exists():
        raise DataError(f"--output {output} exists; an existing checkpoint is never replaced, move it or name another")
    on_gpu = torch.cuda.is_available()
    ddp = DistributedDataParallelKwargs(find_unused_parameters=args.train_vision)  # a rank may get no image
    acc = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no", kwargs_handlers=[ddp])
    set_seed(args.seed)
    train_rows, held_out_rows = prepare_rows(args)
    # Master weights are float32; autocast makes the computation bfloat16 on a GPU.
    qwen = load(args.model, dtype="float32", device=str(acc.device))
    spec = None
    if args.imagination == "latent":
        preset = PRESETS[args.latent]
        spec = LatentSpec(**{**vars(preset), "size": args.latent_size or preset.size})
        add_tokens(qwen, spec.tokens)
    qwen.model.model.visual.requires_grad_(args.train_vision)
    if args.checkpointing == "on" or args.checkpointing == "auto" and on_gpu and not spec:
        if spec:
            raise DataError("--checkpointing on does not go with --imagination latent, whose recurrence needs the cache")
        # on the language model alone: on the whole model a frozen tower would run twice, and backwards once
        language_model = qwen.model.model.language_model
        (getattr(language_model, "activation_checkpointing_enable", None)
         or language_model.gradient_checkpointing_enable)()  # its older name
    parts = [[make_example(qwen, row, args, spec) for row in rows] for rows in (train_rows, held_out_rows)]
    train, held_out = (Steps(qwen, part, args, spec, acc.process_index, acc.num_processes) if part else None for part in parts)
    n_steps = args.max_steps or args.epochs * train.per_epoch
    plan = {"imagination": args.imagination, "rows": len(train_rows), "held_out_rows": len(held_out_rows), "steps": n_steps,
            "global_batch": args.global_batch, "processes": acc.num_processes,
            "trained_tokens_per_row": round(sum(sum(e.trained) for e in parts[0]) / len(parts[0]), 1)}
    if acc.is_main_process:
        show_example(qwen, parts[0][0])
        log(" | ".join(f"{key} {value}" for key, value in plan.items()))
    if args.dry_run:
        print(json.dumps(plan))
        return 0
    run = Run()
    objective, optimizer = acc.prepare(Objective(qwen, spec, args.align_loss).train(), make_optimizer(qwen.model, args))
    acc.register_for_checkpointing(run)
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(acc, folder / "settings.json", args)
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        acc.load_state(str(checkpoint))
        log(f"resumed from {checkpoint}")
    with nullcontext() if spec else use_packed_attention(qwen.model), stop_on_signals() as stop:
        fit(acc, qwen, objective, optimizer, train, held_out, run, stop, args)
    if not held_out:
        publish(acc, folder / "best", lambda to: acc.is_main_process and save(qwen, str(to)))
    seconds = time.time() - begun
    if acc.is_main_process:
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        metrics = {**plan, "loss": last["loss"], "align": last["align"], "best_held_out_loss": run.best_loss,
                   "best_step": run.best_step or n_steps, "seconds": round(seconds, 1)}
        write_json(f"{output}.metrics.json", metrics)
        write_meta(output, args, args.data, seconds)
        shutil.rmtree(output, ignore_errors=True)
        os.replace(folder / "best", output)
        for path in folder.glob("step-*"):
            shutil.rmtree(path)
        print(json.dumps(metrics))
    acc.wait_for_everyone()
    acc.end_training()
    return 0


def check_settings(acc: Accelerator, path: Path, args: argparse.Namespace) -> None:
    """Refuse to resume under other settings than those the run began with (workers and log intervals may change)."""
    free = ("num_workers", "save_every", "keep", "batch_size", "max_tokens", "checkpointing", "dry_run")
    mine = {name: value for name, value in vars(args).items() if name not in free}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"--{name}: {theirs.get(name)} then, {mine.get(name)} now" for name in sorted({*mine, *theirs})
                     if mine.get(name) != theirs.get(name)]
        if differing:
            raise DataError(f"{path}: the run to resume had other settings: {'; '.join(differing)}; "
                            "give the old ones, or move the .run folder away to start afresh")
    elif acc.is_main_process:
        write_json(path, mine)
    acc.wait_for_everyone()


if __name__ == "__main__":
    raise SystemExit(cli(main))
