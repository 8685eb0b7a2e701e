"""Shared by the tests of training: a small run's flags, examples, log and process; gradients in one
vector."""
import json
import subprocess
from pathlib import Path

import torch
from processes import command

from utils import qwen as Q
from utils.jsonl import read_rows
from utils.latent_families import PRESETS
from utils.train.examples import Target, make_examples


def flags(data, checkpoint, output, *more):
    return ["--data", str(data), "--image_root", str(data.parent), "--model", str(checkpoint),
            "--output", str(output), "--global_batch", "6", "--batch_size", "2", "--max_tokens", "300",
            "--learning_rate", "1e-3", "--num_workers", "0", "--epochs", "2", *more]


def load_examples(checkpoint, data, imagination="text", dtype="auto"):
    """Return (qwen, examples, target) of the rows of `data`."""
    spec = PRESETS["mirage"] if imagination == "latent" else None
    qwen, target = Q.load(str(checkpoint), dtype, "cpu"), Target(imagination, str(data.parent), spec)
    if spec:
        Q.add_tokens(qwen, spec.tokens)
    return qwen, make_examples(qwen, read_rows(data, {}), target), target


def log_of(output) -> list[dict]:
    return [json.loads(line) for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]


def losses(output):
    return [record["loss"] for record in log_of(output)]


def launch(arguments, processes=1):
    return subprocess.Popen(command("train_sft", arguments, processes), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
