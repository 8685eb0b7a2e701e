"""Tiny trained checkpoints whose imagination is known to be followed or ignored, and items: for the tests of stages 5 and 6."""
import json
import random

import torch
import torch.nn.functional as F
from PIL import Image

from utils import qwen as Q
from utils.decode import PRESETS, embed_prompt, latent_ids
from utils.items import question_text

COLORS = {"red": (230, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 230), "gray": (128, 128, 128)}
NAMES = sorted(COLORS)
QUESTION = "What color is the square?"


def make_picture(color, tall):
    return Image.new("RGB", (56, 84 if tall else 56), COLORS[color])


def write_items(folder, n):
    """Items about flat squares, the gold option being the colour shown; two items a group, of one colour if n is a
    multiple of 8. Returns (path, items)."""
    rng, items = random.Random(0), []
    for i in range(n):
        color, options = NAMES[i % 4], rng.sample(NAMES, 4)
        make_picture(color, i % 2).save(folder / f"{i}.png")
        other = NAMES[(i + 1) % 4]
        make_picture(other, i % 2).save(folder / f"{i}_edit.png")
        items.append({"id": f"item/{i}", "group_id": f"group/{i % (n // 2)}", "category": "color", "question": QUESTION,
                      "options": [list(pair) for pair in zip("ABCD", options)], "metric": "mcq",
                      "answer": {"type": "letter", "value": "ABCD"[options.index(color)]}, "images": [{"path": f"{i}.png"}],
                      "counterfactual": {"images": [{"path": f"{i}_edit.png"}],
                                         "answer": {"type": "letter", "value": "ABCD"[options.index(other)]}}})
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path, items


def ask_colour(rng):
    return {"question": QUESTION, "options": list(zip("ABCD", rng.sample(NAMES, 4)))}


def train(qwen, rng, make_reply, steps, pad_id=None, ask=ask_colour):
    """Fit replies; `make_reply(seen)` returns (text, vectors fed at its pads [n, hidden], states wanted one step before),
    `ask(rng)` an item without its picture."""
    optimizer = torch.optim.AdamW(qwen.model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        seen = [rng.choice(NAMES) for _ in range(16)]
        replies, fed, wanted = zip(*map(make_reply, seen))
        items = [ask(rng) for _ in seen]
        images = [[make_picture(color, rng.random() < 0.5)] for color in seen]
        batch = Q.encode(qwen, [Q.chat(qwen.tokenizer, question_text(i), 1) + r for i, r in zip(items, replies)], images)
        ids = batch["input_ids"]
        embeds = embed_prompt(qwen, batch, fed if pad_id else None, pad_id)
        hidden = qwen.model.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"],
                                  position_ids=batch["position_ids"]).last_hidden_state
        targets = torch.full_like(ids, -100)
        for i, reply in enumerate(replies):
            n = len(qwen.tokenizer(reply, add_special_tokens=False).input_ids)
            targets[i, -n:] = ids[i, -n:]  # pads too: an untrained step might sample the end token and close the segment
        loss = F.cross_entropy(qwen.model.lm_head(hidden[:, :-1]).flatten(0, 1), targets[:, 1:].flatten())
        if pad_id:
            loss = loss + F.mse_loss(hidden[:, :-1][ids[:, 1:] == pad_id], torch.cat(wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def make_text_checkpoint(source, folder, follows):
    """A model that imagines the colour it sees, in text, and then answers what the imagination says (`follows`) or what
    it sees. In a third of the training rows the imagination names any colour."""
    rng = random.Random(0)
    torch.manual_seed(0)
    qwen = Q.load(str(source), device="cpu", dtype="float32")

    def make_reply(seen):
        said = seen if rng.random() < 2 / 3 else rng.choice(NAMES)
        told = said if follows else seen
        return f"I look. <think_image>a {said} square</think_image> It is \\boxed{{{told}}}.<|im_end|>", None, None

    train(qwen, rng, make_reply, 300)
    Q.save(qwen, str(folder))
    return folder


def make_latent_checkpoint(source, folder, follows=True, emitting=tuple(NAMES), ask=ask_colour):
    """A model that imagines in Mirage's latents where the image is of an `emitting` colour: each colour has a code vector, the
    latents are trained to be the code of the colour seen. The answer is the colour whose code is fed (`follows`; a third
    of the rows feed any code), or the colour seen (noise is fed in training)."""
    rng = random.Random(0)
    torch.manual_seed(0)
    qwen = Q.load(str(source), device="cpu", dtype="float32")
    spec = PRESETS["mirage"]
    Q.add_tokens(qwen, spec.tokens)
    hidden = qwen.model.config.text_config.hidden_size
    codes = dict(zip(NAMES, torch.linalg.qr(torch.randn(hidden, len(NAMES)))[0].T * hidden**0.5))  # rms 1, as states have

    def make_reply(seen):
        if seen not in emitting:
            return f"It is \\boxed{{{seen}}}.<|im_end|>", torch.zeros(0, hidden), torch.zeros(0, hidden)
        fed = seen if rng.random() < 2 / 3 or not follows else rng.choice(NAMES)
        vectors = codes[fed].repeat(spec.size, 1) if follows else torch.randn(spec.size, hidden)
        return (f"{spec.start}{spec.pad * spec.size}{spec.end} It is \\boxed{{{fed}}}.<|im_end|>", vectors,
                codes[seen].repeat(spec.size, 1))

    train(qwen, rng, make_reply, 200, latent_ids(qwen.tokenizer, spec)[1], ask)
    Q.save(qwen, str(folder))
    return folder
