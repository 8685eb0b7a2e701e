"""The optional head of LVR checkpoints, through which latents pass before they are fed (its src/model/lvr_heads.py).

It is applied to what a latent step puts out, so that the first latent of a segment has not passed through it; the logits
after a latent step are taken from the same state, as in that repository's decoding by steps.
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from utils.rows import DataError

HEAD = "lvr_head."  # prefix of its weights in a checkpoint


class SimpleHead(torch.nn.Module):
    """LayerNorm and two linear layers around a GELU, [.., hidden] -> [.., hidden] (lvr_head_type "simple")."""

    def __init__(self, hidden: int):
        super().__init__()
        self.ln_q = torch.nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x))


class GatedHead(torch.nn.Module):
    """A gated linear unit with biases, [.., hidden] -> [.., hidden] (lvr_head_type "glu"; its activation is Qwen's, SiLU)."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(hidden, intermediate) for _ in range(2))
        self.down_proj = torch.nn.Linear(intermediate, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def load_head(path: str) -> torch.nn.Module | None:
    """Return the head that a checkpoint holds under `lvr_head.`, in float32 on the CPU; None without one (LVR-7B's default).

    Told by its weights, not by the config. DataError for weights that are neither form.
    """
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in places.items() if name.startswith(HEAD)})
    else:
        files = ["model.safetensors"]
    state = {}
    for name in files:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with safe_open(file, "pt") as weights:
            state |= {key.removeprefix(HEAD): weights.get_tensor(key).float() for key in weights.keys() if key.startswith(HEAD)}
    if not state:
        return None
    if "ln_q.weight" in state:
        head = SimpleHead(len(state["ln_q.weight"]))
    elif "gate_proj.weight" in state:
        head = GatedHead(*reversed(state["gate_proj.weight"].shape))
    else:
        raise DataError(f"{path}: weights {HEAD}* named {sorted(state)}, expected ln_q, mlp.0, mlp.2 or gate_proj, up_proj, "
                        "down_proj")
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)
