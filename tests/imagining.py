"""Tiny trained checkpoints whose imagination is known to be followed or ignored, and items: for the tests of
stages 5 and 6.

How well a short training went must not decide a test. So each thing that a test does to a model (a question
put otherwise, a picture changed, noise or a pad fed, latents or picture hidden) is a kind of row in its
training, with an answer that is told, and a model is handed out only if it does on new rows what `faults`
states; otherwise another seed is tried.
"""
import json
import random
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image

from utils import qwen as Q
from utils.decode import embed_prompt
from utils.items import chat, question_text
from utils.latent_families import PRESETS, latent_ids

COLORS = {"red": (230, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 230), "gray": (128, 128, 128)}
NAMES = sorted(COLORS)
QUESTION = "What color is the square?"
NOTHING = NAMES[0]  # the answer where that which tells the colour is hidden
SEEDS, BATCH = 3, 16


def make_picture(color, tall):
    return Image.new("RGB", (56, 84 if tall else 56), COLORS[color])


def write_items(folder, n):
    """Items about flat squares, the gold option being the colour shown; two items a group, of one colour if n
    is a multiple of 8. Returns (path, items)."""
    rng, items = random.Random(0), []
    for i in range(n):
        color, options = NAMES[i % 4], rng.sample(NAMES, 4)
        make_picture(color, i % 2).save(folder / f"{i}.png")
        other = NAMES[(i + 1) % 4]
        make_picture(other, i % 2).save(folder / f"{i}_edit.png")
        items.append({"id": f"item/{i}", "group_id": f"group/{i % (n // 2)}", "category": "color",
                      "question": QUESTION,
                      "options": [list(pair) for pair in zip("ABCD", options)], "metric": "mcq",
                      "answer": {"type": "letter", "value": "ABCD"[options.index(color)]},
                      "images": [{"path": f"{i}.png"}],
                      "counterfactual": {"images": [{"path": f"{i}_edit.png"}],
                                         "answer": {"type": "letter",
                                                    "value": "ABCD"[options.index(other)]}}})
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path, items


def ask_colour(rng):
    return {"question": QUESTION + rng.choice(("", " Now?")),
            "options": list(zip("ABCD", rng.sample(NAMES, 4)))}


# ------------------------------------------------------------------------------------------- rows
@dataclass
class Row:
    """A reply, of which the first `given` characters are not trained, to a picture of a colour (None: to no
    picture).

    fed and wanted [n, hidden]: what is fed at the latents' pads, and the states one step before. hide: what
    the tokens after them may not see ("picture", "latents").
    """
    kind: str
    seen: str
    reply: str
    shown: bool = True
    given: int = 0
    fed: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    wanted: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    hide: tuple = ()


@cache
def processed(processor, color, tall, edit):
    """A square as a prompt's picture: whole, darker, or with a grey box over less than half of it."""
    image = make_picture(color, tall)
    if edit == "darker":
        image = image.point(lambda value: round(0.8 * value))
    elif edit in ("left", "bottom"):
        image.paste((127, 127, 127), (0, 0, 20, 56) if edit == "left" else (30, image.height - 56, 50,
                                                                            image.height))
    return Q.process_images(processor, [image])


def forward(qwen, rng, rows, pad_id, ask):
    """Return (hidden states [B, L, hidden], ids of the batch, what each state should say or -100, is before a
    latent)."""
    ids = [qwen.tokenizer(chat(qwen.tokenizer, question_text(ask(rng)), int(row.shown)) + row.reply,
                          add_special_tokens=False).input_ids for row in rows]
    edits = ("",) * 5 + ("darker", "left", "bottom")
    pixels = [processed(qwen.image_processor, row.seen, rng.random() < 0.5, rng.choice(edits)) if row.shown
              else None for row in rows]
    batch = Q.collate(qwen, ids, pixels)
    ids = batch["input_ids"]
    length = ids.shape[1]
    see = torch.ones(length, length, dtype=torch.bool).tril() & batch["attention_mask"][:, None].bool()
    targets, is_latent = torch.full_like(ids, -100), ids == pad_id if pad_id else torch.zeros_like(
        ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(qwen.tokenizer(row.reply[row.given:], add_special_tokens=False).input_ids)
        targets[i, -n:] = ids[i, -n:]
        # the decoder closes a segment after its number of latents: trained to go on, none can end before
        targets[i, 1:][is_latent[i, :-1]] = pad_id or 0
        hidden_from = int(is_latent[i].nonzero()[-1]) + 1 if is_latent[i].any() else length - n
        if "picture" in row.hide:
            see[i, hidden_from:, batch["mm_token_type_ids"][i].bool()] = False
        if "latents" in row.hide:
            see[i, hidden_from:, is_latent[i]] = False
    see |= torch.eye(length, dtype=torch.bool)  # padding sees itself
    mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]
    embeds = embed_prompt(qwen, batch, [row.fed for row in rows] if pad_id else None, pad_id)
    hidden = qwen.model.model(inputs_embeds=embeds, attention_mask=mask,
                              position_ids=batch["position_ids"]).last_hidden_state
    is_latent[[not row.shown for row in rows]] = False  # nothing is wanted of them
    return hidden[:, :-1], targets[:, 1:], is_latent[:, 1:]


def train(qwen, rng, make_row, steps, pad_id=None, ask=ask_colour):
    """Fit replies and states; `make_row(rng)` returns a Row, `ask(rng)` an item without its picture."""
    optimizer = torch.optim.AdamW(qwen.model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        rows = [make_row(rng) for _ in range(BATCH)]
        hidden, targets, is_latent = forward(qwen, rng, rows, pad_id, ask)
        loss = F.cross_entropy(qwen.model.lm_head(hidden).flatten(0, 1), targets.flatten())
        if is_latent.any():
            loss = loss + F.mse_loss(hidden[is_latent], torch.cat([row.wanted for row in rows if row.shown]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def faults(qwen, rng, make_row, pad_id, ask):
    """Say what a model does not do on 160 new rows: every trained token is the likeliest in all plain replies
    and, but for one, in 19 of 20 of each other kind; states before latents are within 0.05 (mean square, of
    1) of what is wanted."""
    right, apart = {}, []
    for _ in range(10):
        rows = [make_row(rng) for _ in range(BATCH)]
        hidden, targets, is_latent = forward(qwen, rng, rows, pad_id, ask)
        good = ((qwen.model.lm_head(hidden).argmax(-1) == targets) | (targets == -100)).all(1)
        for row, its in zip(rows, good.tolist()):
            right.setdefault(row.kind, []).append(its)
        if is_latent.any():
            apart.append(float(F.mse_loss(hidden[is_latent],
                                          torch.cat([row.wanted for row in rows if row.shown]))))
    right.pop("noise", None)  # may lie between two codes
    least = {kind: len(its) if kind == "plain" else 0.95 * len(its) - 1 for kind, its in right.items()}
    wrong = [f"{kind}: {sum(its)} of {len(its)} right" for kind, its in right.items()
             if sum(its) < least[kind]]
    mean = sum(apart) / max(len(apart), 1)
    return wrong + [f"states before latents are {mean:.3f} from what is wanted"] * (mean > 0.05)


def make(source, folder, prepare, steps, ask=ask_colour):
    """Save the first model, over seeds, without `faults`; `prepare(qwen)` returns (make_row, pad's id)."""
    tried = []
    for seed in range(SEEDS):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        qwen = Q.load(str(source), device="cpu", dtype="float32")
        make_row, pad_id = prepare(qwen)
        train(qwen, rng, make_row, steps, pad_id, ask)
        tried.append(faults(qwen, rng, make_row, pad_id, ask))
        if not tried[-1]:
            Q.save(qwen, str(folder))
            return folder
    raise AssertionError(f"no model of {SEEDS} seeds has learnt what it should in {steps} steps: {tried}")


def make_text_checkpoint(source, folder, follows):
    """A model that imagines the colour it sees, in text, and then answers what the imagination says
    (`follows`) or what it sees; and NOTHING where it does not see the picture and should answer that."""
    def make_row(rng):
        seen, said = rng.choice(NAMES), rng.choice(NAMES)
        kind = rng.choice(("plain", "plain", "plain", "told", "told", "blind"))
        said = seen if kind == "plain" else said
        told = said if follows else NOTHING if kind == "blind" else seen
        given = f"{'I look. ' * (kind != 'blind')}<think_image>a {said} square</think_image>"
        return Row(kind, seen, f"{given} It is \\boxed{{{told}}}.<|im_end|>", kind != "blind",
                   0 if kind == "plain" else len(given))

    return make(source, folder, lambda qwen: (make_row, None), 300)


def make_latent_checkpoint(source, folder, follows=True, emitting=tuple(NAMES), ask=ask_colour):
    """A model that imagines in Mirage's latents where the image is of an `emitting` colour: each colour has a
    code vector, and the latents are trained to be the code of the colour seen, whatever is fed.

    The answer is the colour whose code is nearest to what is fed (`follows`), or the colour seen; NOTHING
    where that is hidden.
    """
    spec = PRESETS["mirage"]

    def prepare(qwen):
        Q.add_tokens(qwen, spec.tokens)
        width = qwen.model.config.text_config.hidden_size
        codes = torch.linalg.qr(torch.randn(width, len(NAMES)))[0].T * width**0.5  # rms 1, as states have
        pad_id = latent_ids(qwen.tokenizer, spec)[1]

        def make_row(rng):
            seen = rng.choice(NAMES)
            if seen not in emitting:
                none = torch.zeros(0, width)
                return Row("plain", seen, f"It is \\boxed{{{seen}}}.<|im_end|>", fed=none, wanted=none)
            kind = rng.choice(("plain",) * 6 + ("other",) * 4 + ("noise", "pad", "blind", "no picture",
                                                                 "no latents",
                                                                 "neither"))
            color = NAMES.index(seen if kind == "plain" else rng.choice(NAMES))
            fed = codes[color].repeat(spec.size, 1)
            if kind == "noise":
                fed = torch.randn(fed.shape)
            elif kind == "pad":
                fed = qwen.model.get_input_embeddings().weight[pad_id].detach().repeat(spec.size, 1)
            if kind == "noise" or kind == "pad":
                color = int((codes @ fed.mean(0)).argmax())
            lost = ("no latents", "neither") if follows else ("blind", "no picture", "neither")
            told = NOTHING if kind in lost else NAMES[color] if follows else seen
            given = f"{spec.start}{spec.pad * spec.size}{spec.end}"
            reply = f"{given} It is \\boxed{{{told}}}.<|im_end|>"
            hide = {"no picture": ("picture",), "no latents": ("latents",),
                    "neither": ("picture", "latents")}.get(kind, ())
            return Row("other" if kind == "noise" and not follows else kind, seen, reply, kind != "blind",
                       len(given) * (kind == "blind"), fed, codes[NAMES.index(seen)].repeat(spec.size, 1),
                       hide)

        return make_row, pad_id

    return make(source, folder, prepare, 400, ask)
