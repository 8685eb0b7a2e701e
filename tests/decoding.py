"""A batch of prompts, and a random model that likes to imagine."""
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils import qwen as Q
from utils.decode import decode, prefill, prefill_blocks
from utils.items import chat
from utils.latent_families import PRESETS, Intervention
from utils.probe.states import embed_prompt
from utils.train.weights import add_tokens

MIRAGE = PRESETS["mirage"]
LOWERED = (os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2")
           and "avx512" in Path("/proc/cpuinfo").read_text())
# RuntimeError: pack_vnni2 is only supported when avx512 is supported (torch 2.13)
needs_bfloat16 = pytest.mark.skipif(LOWERED, reason="torch has no bfloat16 attention on an AVX-512 processor "
                                                    "whose instructions ATEN_CPU_CAPABILITY lowers")


def generate(qwen, inputs, max_new_tokens, spec=None, arms=None, capture=False):
    return decode(qwen, prefill(qwen, inputs), max_new_tokens, spec, arms, capture)[0]


def decode_seen(qwen, state, max_new_tokens, spec=None, arms=None):
    """Decode with states captured; each row also has the logits that its ids were chosen from."""
    arms, seen = arms or [Intervention()] * len(state.mask), [[] for _ in state.mask]

    def choose(logits, n, row):
        seen[row].append(logits)
        return int(logits.argmax())

    arms = [replace(arm, choose=partial(choose, row=n)) for n, arm in enumerate(arms)]
    rows, _ = decode(qwen, state, max_new_tokens, spec, arms, capture=True)
    for row, logits in zip(rows, seen):
        row.logits = torch.stack(logits)
    return rows


def prefill_with(qwen, inputs, latents):
    """`prefill` of prompts that hold latents of Mirage's."""
    return prefill(qwen, inputs | {"inputs_embeds": embed_prompt(qwen, inputs, MIRAGE, latents)})


def prefill_more(qwen, state, blocks):
    """`prefill_blocks` that keeps `state`; return the new one."""
    return prefill_blocks(qwen, state.select(list(range(len(state.mask)))), blocks)[1]


def load_with(tiny_checkpoint, spec):
    """A random model that likes to emit the start token: its output row points along the states it sees."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    start_id = add_tokens(qwen, spec.tokens)[spec.tokens.index(spec.pad if spec.slots else spec.start)]
    states = torch.cat([g.states for g in generate(qwen, batch_of(qwen), 6, capture=True)])
    with torch.no_grad():
        qwen.model.lm_head.weight[start_id] = states.mean(0) * 3 / states.mean(0).norm()
    return qwen


def batch_of(qwen, rows=slice(None)):
    images = [[Image.new("RGB", (56, 84), "red")], [],
              [Image.new("RGB", (112, 56), "blue"), Image.new("RGB", (56, 56))]]
    texts = ["What digit is on the red circle?", "I look closer.", "It is blue. The answer?"]
    prompts = [chat(qwen.tokenizer, text, len(row)) for text, row in zip(texts, images)]
    return Q.encode(qwen, prompts[rows], images[rows])


def embedded(qwen, ids):
    return qwen.model.get_input_embeddings()(torch.tensor([ids]))


@torch.no_grad()
def one_pass(qwen, single, tail, **options):
    """Return the last states of a prompt of one row and the embeddings after it, computed without a cache."""
    steps = single["position_ids"][..., -1:] + 1 + torch.arange(tail.shape[1])
    return qwen.model.model(inputs_embeds=torch.cat([embed_prompt(qwen, single), tail], 1),
                            use_cache=False, position_ids=torch.cat([single["position_ids"], steps], -1),
                            **options).last_hidden_state[0]


def library_generate(qwen, batch, n, **options):
    """Return what the library's greedy decoding makes of a batch."""
    return qwen.model.generate(**{k: v for k, v in batch.items() if k != "position_ids"}, max_new_tokens=n,
                               do_sample=False, eos_token_id=qwen.eos_ids,
                               pad_token_id=qwen.tokenizer.pad_token_id, **options)
