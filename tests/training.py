"""What the tests of training share: flags of a small run, its curve, a run as a process, all gradients in one
vector."""
import json
import subprocess
from pathlib import Path

import torch
from processes import command


def flags(data, checkpoint, output, *more):
    return ["--data", str(data), "--image_root", str(data.parent), "--model", str(checkpoint), "--output",
            str(output),
            "--global_batch", "6", "--batch_size", "2", "--max_tokens", "300", "--learning_rate", "1e-3",
            "--num_workers", "0",
            "--epochs", "2", *more]


def losses(output):
    return [json.loads(line)["loss"] for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]


def launch(arguments, processes=1):
    return subprocess.Popen(command("train_sft", arguments, processes), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
