"""How items are put to a model in both arms of the interventions, and what a reply says, as fields of a
record.

A prompt of a kind ("own", "blank", "counterfactual", "other_image", "other_question", "masked";
`utils.intervene.latent_conditions`) is read once a batch and kept.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image

from utils.answers import extract_choice
from utils.decode import State, prefill
from utils.images import MASK_GREY
from utils.intervene.latent_case import sampler
from utils.items import group_of, prompt_of
from utils.latent_families import Intervention
from utils.qwen import Qwen, encode

BOX = "\\boxed{"


@dataclass(frozen=True)
class Asking:
    """How items are put to the model, the same in all arms: system prompt, what follows the question, length
    of a reply, the stem that options are scored behind and what stands in its box ("letter" or "text"), seed,
    rows decoded at once, temperature (0 is greedy)."""

    system: str | None
    suffix: str
    max_new_tokens: int
    stem: str
    options: str
    seed: int
    rows: int
    temperature: float = 0.0

    def pick(self, item: dict) -> Callable[[torch.Tensor, int], int]:
        return sampler(self.temperature, self.seed, item["id"])

    def arm(self, item: dict, arm: Intervention = Intervention()) -> Intervention:
        """Return the arm, its ids sampled where it does not choose them itself."""
        return replace(arm, choose=self.pick(item)) if self.temperature and arm.choose is None else arm

    def pieces(self, todo: list) -> list[list]:
        """Return what is to be done in pieces of at most `rows`, each decoded side by side."""
        return [todo[first:first + self.rows] for first in range(0, len(todo), self.rows)]


def other_prompt(kind: str, place: int, items: list[dict], images: list[list[Image.Image]],
                 edits: list[tuple[dict, list[Image.Image]] | None]) -> tuple[dict, list[Image.Image]] | None:
    """Return (item, images) of the prompt `kind` for the item at `place` of a batch; None if there is no such
    prompt."""
    item, mine = items[place], images[place]
    if kind == "own":
        return item, mine
    if kind == "blank":
        return item, [Image.new("RGB", image.size, MASK_GREY) for image in mine]
    if kind == "counterfactual":
        return edits[place]
    if kind == "masked":
        if not item.get("region"):
            return None
        first = mine[0].copy()
        first.paste(MASK_GREY, tuple(item["region"]))
        return item, [first, *mine[1:]]
    n = len(items)
    others = [(place + k) % n for k in range(1, n)]
    if kind == "other_image":
        found = next((j for j in others if len(images[j]) == len(mine)
                      and items[j]["images"] != item["images"]), None)
        return None if found is None else (item, images[found])
    found = next((j for j in others if items[j]["question"] != item["question"]), None)
    return None if found is None else ({**item, "question": items[found]["question"],
                                        "options": items[found]["options"]}, mine)


def pick_donor(kind: str, place: int, items: list[dict], able: list[int]) -> int | None:
    """Return the place of a donor in the batch among those `able`, never the item itself; None if there is
    none.

    "random" is of another group and, where there is one, with another gold; "question" and "image" share just
    that.
    """
    item, n = items[place], len(items)
    order = [j for j in ((place + k) % n for k in range(1, n)) if j in able]

    def same(j: int, field: str) -> bool:
        return items[j][field] == item[field]

    if kind == "random":
        order = [j for j in order if group_of(items[j]) != group_of(item)]
        return next((j for j in order if not same(j, "answer")), order[0] if order else None)
    share, differ = ("question", "images") if kind == "question" else ("images", "question")
    return next((j for j in order if same(j, share) and not same(j, differ)), None)


class Prompts:
    """The prompts of a batch of items, by kind; `edits` are (item, images) of the items' counterfactuals,
    None without."""

    def __init__(self, qwen: Qwen, asking: Asking, items: list[dict], images: list[list[Image.Image]],
                 edits: list[tuple[dict, list[Image.Image]] | None]):
        self.qwen, self.asking, self.items, self.images, self.edits = qwen, asking, items, images, edits
        self.read: dict[str, tuple[State | None, list[int]]] = {}

    def __getitem__(self, kind: str) -> tuple[State | None, list[int]]:
        """Return the state of every prompt of a kind, read once, and the places of the items that have one.
        """
        if kind not in self.read:
            found = {i: other for i in range(len(self.items))
                     if (other := other_prompt(kind, i, self.items, self.images, self.edits)) is not None}
            texts = [prompt_of(self.qwen.tokenizer, item, len(images), self.asking.system,
                               self.asking.suffix) for item,
                     images in found.values()]
            state = prefill(self.qwen,
                            encode(self.qwen, texts,
                                   [images for _, images in found.values()])) if found else None
            self.read[kind] = state, list(found)
        return self.read[kind]


# ------------------------------------------------------------------------------------ what a reply says
def answer_fields(item: dict, text: str, last_words: str, ids: list[int], finish: str) -> dict:
    """Return the fields that come from a reply's words; the answer is looked for in `last_words`, after all
    imagination."""
    found = extract_choice(last_words.strip(), dict(item["options"]), finish)
    return {"text": text, "finish": finish, "n_new": len(ids), "pred": found.letter, "rule": found.rule,
            "correct": found.letter == item["answer"]["value"], "degenerate": is_degenerate(ids, finish)}


def is_degenerate(ids: list[int], finish: str) -> bool:
    """Return whether a reply ends in a loop: a tail of period up to 64, or cut off with half its 4-grams
    repeated."""
    for period in range(1, 65):
        tail = ids[-max(3 * period, 48):]
        if len(tail) == max(3 * period, 48) and tail[period:] == tail[:-period]:
            return True
    grams = list(zip(*(ids[i:] for i in range(4))))
    return finish == "length" and bool(grams) and len(set(grams)) < len(grams) / 2


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first index at which two lists differ, None if they are equal."""
    both = min(len(one), len(other))
    return next((j for j in range(both) if one[j] != other[j]), None if len(one) == len(other) else both)


def stem_of(words: str) -> str | None:
    """Return a reply's last words up to and including the opening of its last box; None without one."""
    place = words.rfind(BOX)
    return None if place < 0 else " " + words[:place].lstrip() + BOX
