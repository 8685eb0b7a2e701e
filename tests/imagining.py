"""Tiny checkpoints that imagine a colour and then follow or ignore it, and items for them.

Every weight is written here, so that these models do the same on every machine.
- A reply is a chain of words, each of which determines the next one: the output row of a token reads which
  token came before, in a dimension of the hidden state that belongs to this token.
- The vision tower writes the colour of a square into its tokens (IMAGE and COLOR dimensions).
- In the first layer one head reads the colour of image tokens into COLOR at every position; the other reads
  that of imagined words or latents, which have COLOR but not IMAGE, into FOLLOWED. The second layer is idle,
  but for slots of the kind "ids" (LaViT's), whose embeddings have no colour: it reads their positions.
- The answer's word is chosen by FOLLOWED or by COLOR; without either it is NOTHING.
- The state after a latent start has COLOR: fed as a latent, it is a code of the colour seen.
"""
import random

import torch
from PIL import Image

from toy.make_model import IMAGE_MEAN, IMAGE_STD, make_model
from utils import qwen as Q
from utils.jsonl import write_rows
from utils.latent_families import PRESETS, latent_ids
from utils.rows import CLOSE, OPEN
from utils.train.weights import add_tokens, save

COLORS = {"red": (230, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 230), "gray": (128, 128, 128)}
NAMES = sorted(COLORS)
QUESTION = "What color is the square?"
NOTHING = NAMES[0]  # the answer where no colour is seen
END = (CLOSE, " It", " is", " \\", "boxed", "{word", "}.", "<|im_end|>")
WORDS = ("\n", "I", " look", ".", " ", OPEN, "a", " square", " (", ")", *END[:5], "}.")
SIZES = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}
VISION_SIZES = {"depth": 1, "hidden_size": 32, "intermediate_size": 8, "num_heads": 2}
# dimensions of the hidden state
AT = {word: n for n, word in enumerate((*WORDS, "word", "{word", "other"))}
IMAGE = len(AT)
COLOR, FOLLOWED = slice(IMAGE + 1, IMAGE + 5), slice(IMAGE + 5, IMAGE + 9)
SHADE = slice(IMAGE + 9, IMAGE + 12)
SINK = IMAGE + 12
SLOT_WORDS = ("I", " look", ".", " ")
SIZE = 4.0  # of a token's own dimension, and of a colour
HEAD = 16  # numbers per attention head; the last pair of them, 7 and 15, hardly turns with the position


def make_picture(color, tall):
    return Image.new("RGB", (56, 84 if tall else 56), COLORS[color])


def write_items(folder, n):
    """Write items about flat squares and return (path, items). The gold option is the colour shown; two items
    per group, of one colour if n is a multiple of 8. The edit's picture is also the helper."""
    rng, items = random.Random(0), []
    for i in range(n):
        options, shown = rng.sample(NAMES, 4), []
        for color, path in ((NAMES[i % 4], f"{i}.png"), (NAMES[(i + 1) % 4], f"{i}_edit.png")):
            make_picture(color, i % 2).save(folder / path)
            shown.append({"images": [{"path": path}],
                          "answer": {"type": "letter", "value": "ABCD"[options.index(color)]}})
        items.append({"id": f"item/{i}", "group_id": f"group/{i % (n // 2)}", "category": "color",
                      "question": QUESTION, "options": [list(pair) for pair in zip("ABCD", options)],
                      "metric": "mcq", **shown[0], "counterfactual": shown[1],
                      "helper": shown[1]["images"][0]})
    write_rows(folder / "items.jsonl", items)
    return folder / "items.jsonl", items


# ---- weights
def write_vision(visual):
    """An image token has IMAGE, the COLOR nearest to its mean (none beyond 45 degrees), and SHADE."""
    mean, deviation = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    directions = torch.nn.functional.normalize(
        (torch.tensor([COLORS[name] for name in NAMES]) / 255 - mean) / deviation, dim=1)
    conv, (first, _, last) = visual.patch_embed.proj, visual.merger.mlp
    for channel in range(3):  # the mean of a patch, per channel
        conv.weight[channel, channel] = 1 / conv.weight[0, 0].numel()
    width = conv.out_channels
    for patch in range(4):  # of a merged token: normalised to length sqrt(width), and averaged
        columns = slice(patch * width, patch * width + 3)
        first.weight[:4, columns] = 20 * directions / (4 * width**0.5)
        first.weight[4:7, columns] = torch.eye(3) / (4 * width**0.5)
    first.bias[:4] = -20 * 0.7
    first.bias[4:7] = 10  # far to the right, GELU changes nothing
    last.weight[COLOR, :4] = SIZE / 6 * torch.eye(4)  # 20 * (1 - 0.7)
    last.weight[SHADE, 4:7] = torch.eye(3)
    last.bias[IMAGE] = SIZE
    last.bias[SHADE] = -10


def write_attention(attention):
    """One key for tokens with IMAGE, one for tokens with COLOR alone; scores of about 10."""
    query, key, value, output = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    query.bias[7] = query.bias[HEAD + 15] = HEAD**0.5
    key.weight[7, IMAGE] = key.weight[15, COLOR] = 2.5
    key.weight[15, IMAGE] = -2 * 2.5
    value.weight[:4, COLOR] = torch.eye(4)
    value.weight[4:7, SHADE] = torch.eye(3)
    output.weight[COLOR, :4] = output.weight[FOLLOWED, HEAD:HEAD + 4] = 2 * torch.eye(4)
    output.weight[SHADE, 4:7] = torch.eye(3)


def write_second_attention(attention):
    """One head reads the COLOR that positions of slots have after the first layer into FOLLOWED; where none
    are in view, it looks at the token before the image."""
    attention.q_proj.bias[7] = HEAD**0.5
    attention.k_proj.weight[7, [AT[word] for word in SLOT_WORDS]] = 5
    attention.k_proj.weight[7, SINK] = 1.8
    attention.v_proj.weight[:4, COLOR] = torch.eye(4)
    attention.o_proj.weight[FOLLOWED, :4] = 2 * torch.eye(4)


def build(folder, chain, follows, spec=None, emitting=tuple(NAMES), again=False):
    """Write a checkpoint that replies by `chain` {word: next word}; "word" and "{word" are the colours."""
    texts = [f"{QUESTION} A. {name} I look. a square ({name}) It is \\boxed{{{name}}}." for name in NAMES] * 4
    make_model(texts, folder, n_tokens=500, sizes=SIZES, vision_sizes=VISION_SIZES)
    qwen = Q.load(str(folder), device="cpu", dtype="float32")
    qwen.tokenizer.add_tokens([OPEN, CLOSE])
    if spec:
        add_tokens(qwen, spec.tokens)

    def token(word):
        ids = qwen.tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1, (word, ids)
        return ids[0]

    assert all(token(" " + name) for name in NAMES)  # the options' words, which are not the imagined ones
    tokens = {word: [token(word)] for word in WORDS} | {"<|im_end|>": [token("<|im_end|>")]}
    tokens |= {"word": [token(name) for name in NAMES], "{word": [token("{" + name) for name in NAMES]}
    if spec:
        start, pad, end, *_ = latent_ids(qwen.tokenizer, spec)
        after = qwen.tokenizer(spec.after_limit).input_ids[:1]
        tokens |= {"start": [start], CLOSE: [*tokens[CLOSE], end, *after]}
    if spec and spec.slots:  # in the place of words that no chain of latents has; of CoVT's eight four
        tokens = {word: [i for i in ids if i is not None] for word, ids in tokens.items()} | {
            word: [token(slot)] for word, slot in zip(SLOT_WORDS, spec.slots)}
    with torch.no_grad():
        for name, weight in qwen.model.named_parameters():
            weight.fill_("norm" in name or "ln_q" in name)
        embedding, head = qwen.model.get_input_embeddings().weight, qwen.model.lm_head.weight
        write_vision(qwen.model.model.visual)
        write_attention(qwen.model.model.language_model.layers[0].self_attn)
        embedding[:, AT["other"]] = SIZE
        for word, ids in tokens.items():
            if word in AT:
                embedding[ids, AT["other"]] = 0
                embedding[ids, AT[word]] = SIZE
        if spec and spec.slots:
            embedding[token("<|vision_start|>"), SINK] = SIZE
            write_second_attention(qwen.model.model.language_model.layers[1].self_attn)
        embedding[tokens["word"], COLOR] = SIZE * torch.eye(4)
        for word, following in chain.items():
            head[tokens[following], AT[word]] = 6
        head[tokens["word"], COLOR] = 1.2 * torch.eye(4)
        head[tokens["{word"], FOLLOWED if follows else COLOR] = 1.2 * torch.eye(4)
        head[tokens["{word"][NAMES.index(NOTHING)], AT["boxed"]] += 0.25
        if again:  # an imagination without a colour leads to another; where none can begin, to the answer
            head[tokens[OPEN], AT[CLOSE]], head[tokens[OPEN], FOLLOWED] = 8, -3
            head[tokens[" It"], AT[" "]] = 3
        for name in set(NAMES) - set(emitting):  # the answer at once
            head[tokens[" It"], AT["\n"]] = 4
            head[tokens[" It"], COLOR.start + NAMES.index(name)] = 2
    save(qwen, str(folder / "built"))
    return folder / "built"


def chain_of(*words):
    return dict(zip(words, words[1:]))


def make_text_checkpoint(folder, follows, again=False):
    """A model that imagines a colour in text and answers with it (`follows`) or with the picture's; `again`:
    it imagines once more after an imagination that names no colour."""
    chain = chain_of("\n", "I", " look", ".", " ", OPEN, "a", " square", " (", "word", ")", *END)
    return build(folder, chain, follows, again=again)


def make_latent_checkpoint(folder, follows=True, emitting=tuple(NAMES), family="mirage"):
    """A model that imagines pictures of the `emitting` colours in a family's latents, and then answers with
    the colour of the vectors that were fed (`follows`) or of the picture."""
    spec = PRESETS[family]
    if not spec.slots:
        begin = ["\n", "start"]
    else:  # CoVT's and Mull's slots are written at the beginning of the reply, LaViT's are sampled
        begin = ["\n", " It"] if family in ("covt", "mull") else ["\n", *SLOT_WORDS, " It"]
    return build(folder, chain_of(*begin) | chain_of(*END), follows, spec, emitting)
