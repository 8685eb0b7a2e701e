"""Shared by the tests of training: rows of the toy, a small run's flags, examples and log, its ranks, all
gradients."""
import json
import multiprocessing
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from toy.make_world import item
from toy.world import ask, draw_scene, make_scene, observation, opening, prompt_text, zoom_in
from utils import qwen as Q
from utils.jsonl import read_rows
from utils.latent_families import PRESETS, special_id
from utils.train.examples import Target, make_examples, make_pack
from utils.train.weights import add_tokens


def flags(data, checkpoint, output, *more):
    return ["--data", str(data), "--image_root", str(data.parent), "--model", str(checkpoint),
            "--output", str(output), "--global_batch", "6", "--max_tokens", "300",
            "--learning_rate", "1e-3", "--num_workers", "0", "--epochs", "2", *more]


def load_examples(checkpoint, data, imagination="text", dtype="auto"):
    """Return (qwen, examples, target) of the rows of `data`."""
    spec = PRESETS["mirage"] if imagination == "latent" else None
    qwen, target = Q.load(str(checkpoint), dtype, "cpu"), Target(imagination, str(data.parent), spec)
    if spec:
        add_tokens(qwen, spec.tokens)
    return qwen, make_examples(qwen, read_rows(data, {}), target), target


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]


def losses(output):
    return [record["loss"] for record in log_of(output)]


def run_ranks(function, folder, *arguments, world=2):
    """Run function(rank, *arguments) in processes that have the environment of torchrun's.

    They are forked from a server that has loaded the libraries once, which takes longer than these runs.
    """
    multiprocessing.set_forkserver_preload([
        "accelerate", "torch.distributed.fsdp", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])
    start_processes(rank_main, (world, folder, function, arguments), world, start_method="forkserver")


def rank_main(rank, world, folder, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "unused", "MASTER_PORT": "1"}  # they meet in a file
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    function(rank, *arguments)
    dist.destroy_process_group()


def summed(model, found) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Return (sums of losses and alignments, the gradient, what was right) of passes run one by one."""
    model.zero_grad()
    sums, hits = torch.zeros(2), []
    for losses, right, aligned in found:
        (losses.sum() + aligned).backward()
        sums += torch.stack([losses.sum(), aligned]).detach()
        hits += right.tolist()
    return sums, gradient(model), hits


def library_loss(qwen, examples, target, **more):
    """Return what an Objective does, from the library's loss with labels: exact on one row, the oracle. In a
    pack (with its positions in `more`) rows attend to those before them."""
    pack = make_pack(qwen, examples, target)
    image_id = special_id(qwen.tokenizer, Q.IMAGE_TOKEN)
    is_image, labels = pack["input_ids"] == image_id, torch.full_like(pack["input_ids"], -100)
    labels[~is_image] = torch.tensor([
        i if is_trained else -100 for example in examples
        for i, is_trained in zip(example.ids, example.trained) if i != image_id])
    inputs = {name: pack[name] for name in ("input_ids", "pixel_values", "image_grid_thw") if name in pack}
    out = qwen.model(**inputs, **more, mm_token_type_ids=is_image.int(), labels=labels, use_cache=False)
    right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    return out.loss * len(right), right, torch.zeros(())


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def scene_rows(folder: Path, n: int, name: str) -> tuple[list[dict], list[dict]]:
    """Draw n scenes of the toy into a folder; return training rows and items, of one question about each."""
    rows, items = [], []
    for i in range(n):
        rng = random.Random(f"{name}/{i}")
        scene = make_scene(rng)
        question, image, helper = ask(rng, scene, "zoom"), f"{name}_{i}.png", f"{name}_{i}_zoom.png"
        picture = draw_scene(scene)
        picture.save(folder / image)
        zoom_in(picture, question.thing).save(folder / helper)
        answer = f"The answer is \\boxed{{{question.answer}}}."
        steps = [{"text": opening(question)}, {"image": helper, "operation": "zoom"},
                 {"text": f"{observation(question)} {answer}"}]
        chain = f"{opening(question)} <think_image>{observation(question)}</think_image> {answer}"
        rows.append({"id": f"{name}/{i}", "images": [image], "question": prompt_text(question),
                     "answer": question.answer, "steps": steps, "chain": chain})
        items.append(item(f"{name}/{i}", f"{name}/{i}", question, image))
    return rows, items
