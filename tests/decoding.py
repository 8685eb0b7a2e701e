"""A batch of prompts, and a random model that likes to imagine."""
import torch
from PIL import Image

from utils import qwen as Q
from utils.decode import generate
from utils.items import chat
from utils.latent_families import PRESETS

MIRAGE = PRESETS["mirage"]


def load_with(tiny_checkpoint, spec):
    """A random model that likes to emit the start token: its output row points along the states it sees."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    start_id = Q.add_tokens(qwen, spec.tokens)[spec.tokens.index(spec.start)]
    states = torch.cat([g.states for g in generate(qwen, batch_of(qwen), 6, capture=True)])
    with torch.no_grad():
        qwen.model.lm_head.weight[start_id] = states.mean(0) * 3 / states.mean(0).norm()
    return qwen


def batch_of(qwen, rows=slice(None)):
    images = [[Image.new("RGB", (56, 84), "red")], [], [Image.new("RGB", (112, 56), "blue"),
                                                        Image.new("RGB", (56, 56))]]
    texts = ["What digit is on the red circle?", "I look closer.", "It is blue. The answer?"]
    prompts = [chat(qwen.tokenizer, text, len(row)) for text, row in zip(texts, images)]
    return Q.encode(qwen, prompts[rows], images[rows])
