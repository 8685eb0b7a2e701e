"""Prompts of both kinds of intervention, and the fields that a record takes from a reply.

The kinds of prompts are those of `utils.intervene.latent_conditions`.
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
Prompt = tuple[dict, list[Image.Image]]  # an item and its images


@dataclass(frozen=True)
class Settings:
    """How all items are prompted and decoded; `suffix`: text after the question, `stem`: text that the
    options ("letter" or "text") are scored behind, `rows` decoded at once."""

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

    def sampled(self, item: dict, intervention: Intervention = Intervention()) -> Intervention:
        """Return the intervention, with ids sampled where it does not choose them."""
        if not self.temperature or intervention.choose is not None:
            return intervention
        return replace(intervention, choose=self.pick(item))

    def pieces(self, todo: list) -> list[list]:
        """Return `todo` in pieces of at most `rows`."""
        return [todo[first:first + self.rows] for first in range(0, len(todo), self.rows)]


def other_prompt(kind: str, place: int, items: list[dict], images: list[list[Image.Image]],
                 edits: list[Prompt | None]) -> Prompt | None:
    """Return the prompt of a kind for the item at `place`; None if the batch has none."""
    item, own = items[place], images[place]
    if kind == "own":
        return item, own
    if kind == "blank":
        return item, [Image.new("RGB", image.size, MASK_GREY) for image in own]
    if kind == "counterfactual":
        return edits[place]
    if kind == "masked":
        if not item.get("region"):
            return None
        first = own[0].copy()
        first.paste(MASK_GREY, tuple(item["region"]))
        return item, [first, *own[1:]]
    n = len(items)
    for j in ((place + k) % n for k in range(1, n)):
        other = items[j]
        if kind == "other_image" and len(images[j]) == len(own) and other["images"] != item["images"]:
            return item, images[j]
        if kind == "other_question" and other["question"] != item["question"]:
            return {**item, "question": other["question"], "options": other["options"]}, own
    return None


def pick_donor(kind: str, place: int, items: list[dict], able: list[int]) -> int | None:
    """Return the place of a donor for the item at `place`, among those `able`. A "random" donor is of another
    group, with another right answer if possible; a "question" or "image" donor shares only that."""
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
    """The prompts of a batch of items, by kind, each read once; `edits` are the items' counterfactuals."""

    def __init__(self, qwen: Qwen, settings: Settings, items: list[dict], images: list[list[Image.Image]],
                 edits: list[Prompt | None]):
        self.qwen, self.settings, self.items, self.images, self.edits = qwen, settings, items, images, edits
        self.read: dict[str, tuple[State | None, list[int]]] = {}  # state and places of the items, by kind

    def places(self, kind: str) -> list[int]:
        """Return the places of the items that have a prompt of this kind."""
        if kind not in self.read:
            prompts = {i: prompt for i in range(len(self.items))
                       if (prompt := other_prompt(kind, i, self.items, self.images, self.edits)) is not None}
            system, suffix = self.settings.system, self.settings.suffix
            texts = [prompt_of(self.qwen.tokenizer, item, len(images), system, suffix)
                     for item, images in prompts.values()]
            images = [images for _, images in prompts.values()]
            state = prefill(self.qwen, encode(self.qwen, texts, images)) if prompts else None
            self.read[kind] = state, list(prompts)
        return self.read[kind][1]

    def select(self, kind: str, places: list[int]) -> State:
        """Return the state after the prompts of the items at `places`."""
        read = self.places(kind)
        return self.read[kind][0].select([read.index(place) for place in places])


# ---- fields of a record
def answer_fields(item: dict, text: str, last_words: str, ids: list[int], finish: str) -> dict:
    """Return the fields that depend on a reply; `last_words` follow all imagination."""
    answer = extract_choice(last_words.strip(), dict(item["options"]), finish)
    return {"text": text, "finish": finish, "n_new": len(ids), "pred": answer.letter, "rule": answer.rule,
            "correct": answer.letter == item["answer"]["value"], "degenerate": is_degenerate(ids, finish)}


def is_degenerate(ids: list[int], finish: str) -> bool:
    """Return whether a reply ends in a loop: a tail of period up to 64, or cut off with half its 4-grams
    repeated."""
    for period in range(1, 65):
        tail = ids[-max(3 * period, 48):]
        if len(tail) == max(3 * period, 48) and tail[period:] == tail[:-period]:
            return True
    grams = list(zip(*(ids[i:] for i in range(4))))
    return finish == "length" and bool(grams) and len(set(grams)) < len(grams) / 2


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Return the first index at which two lists differ."""
    both = min(len(a), len(b))
    return next((j for j in range(both) if a[j] != b[j]), None if len(a) == len(b) else both)


def stem_of(words: str) -> str | None:
    """Return a reply's words up to and including the opening of its last box, if any."""
    place = words.rfind(BOX)
    return None if place < 0 else " " + words[:place].lstrip() + BOX
