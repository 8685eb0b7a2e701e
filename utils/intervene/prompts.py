"""Prompts of both kinds of intervention, and the fields that a record takes from a reply.

The kinds of prompts are those of `utils.intervene.latent_conditions`.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from PIL import Image

from utils.answers import answers_match, extract_choice, strip_label
from utils.decode import State, prefill
from utils.images import MASK_GREY
from utils.intervene.latent_case import sampler
from utils.items import gold_words, group_of, prompt_of, vsp_moves, walk_vsp
from utils.latent_families import Intervention
from utils.option_scores import describe_scores, score_options
from utils.qwen import Qwen, encode
from utils.reply_text import visible

BOX = "\\boxed{"


class Prompt(NamedTuple):
    """The item that is asked, the images shown, and whether its gold answer is that of the images."""

    item: dict
    images: list[Image.Image]
    gold_holds: bool = True


@dataclass(frozen=True)
class Settings:
    """How all items are prompted and decoded; `suffix`: text after the question, `stem`: text that the
    options ("letter" or "text") are scored behind for R0 (None: the clean run's own words), `rows` decoded at
    once, `prior` of the options that is taken off their scores ("none" or "question")."""

    system: str | None
    suffix: str
    max_new_tokens: int
    stem: str | None
    options: str
    seed: int
    rows: int
    temperature: float = 0.0
    prior: str = "none"

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
                 others: list[dict[str, Prompt]]) -> Prompt | None:
    """Return the prompt of a kind for the item at `place`; None if the batch has none. Another question is
    one about the same images, if the batch has one: its gold answer holds. `others`: see `Prompts`."""
    item, own = items[place], images[place]
    if kind == "own":
        return Prompt(item, own)
    if kind == "blank":
        return Prompt(item, [Image.new("RGB", image.size, MASK_GREY) for image in own])
    if kind == "blind":
        return Prompt(item, [])
    if kind in ("counterfactual", "helper"):
        return Prompt(*others[place][kind]) if kind in others[place] else None
    n = len(items)
    fitting = [j for k in range(1, n) if len(images[j := (place + k) % n]) == len(own)]
    shared = {j: items[j]["images"] == item["images"] for j in fitting}
    if kind == "other_image":
        j = next((j for j in fitting if not shared[j]), None)
        return None if j is None else Prompt(item, images[j], gold_holds=False)
    asking = [j for j in fitting if items[j]["question"] != item["question"]]
    j = next((j for j in asking if shared[j]), asking[0] if asking else None)
    return None if j is None else Prompt({**items[j], "images": item["images"]}, own, gold_holds=shared[j])


def pick_donor(kind: str, place: int, items: list[dict], able: list[int]) -> int | None:
    """Return the place of a donor for the item at `place`, among those `able`. A "random" donor is of another
    group, with another right answer if possible; a "question" or "image" donor shares only that."""
    item, n = items[place], len(items)
    order = [j for j in ((place + k) % n for k in range(1, n)) if j in able]

    def same(j: int, field: str) -> bool:
        return items[j][field] == item[field]

    if kind == "random":
        order = [j for j in order if group_of(items[j]) != group_of(item)]
        return next((j for j in order if not same_words(gold_words(items[j]), gold_words(item))),
                    order[0] if order else None)
    share, differ = ("question", "images") if kind == "question" else ("images", "question")
    return next((j for j in order if same(j, share) and not same(j, differ)), None)


class Prompts:
    """The prompts of a batch of items, by kind, each read once; `others` are the items' prompts with images
    from other files, by kind: "counterfactual", "helper"."""

    def __init__(self, qwen: Qwen, settings: Settings, items: list[dict], images: list[list[Image.Image]],
                 others: list[dict[str, Prompt]]):
        self.qwen, self.settings, self.items, self.images, self.others = qwen, settings, items, images, others
        # by kind: the state after the prompts, and the prompts by the places of their items
        self.read: dict[str, tuple[State | None, dict[int, Prompt]]] = {}
        self.known_priors: dict[tuple[str, str], dict[str, float]] = {}  # by id of the item asked, and stem

    def places(self, kind: str) -> list[int]:
        """Return the places of the items that have a prompt of this kind."""
        if kind not in self.read:
            prompts = {i: prompt for i in range(len(self.items))
                       if (prompt := other_prompt(kind, i, self.items, self.images, self.others)) is not None}
            system, suffix = self.settings.system, self.settings.suffix
            texts = [prompt_of(self.qwen.tokenizer, item, len(images), system, suffix, blind=kind == "blind")
                     for item, images, _ in prompts.values()]
            images = [prompt.images for prompt in prompts.values()]
            state = prefill(self.qwen, encode(self.qwen, texts, images)) if prompts else None
            self.read[kind] = state, prompts
        return list(self.read[kind][1])

    def asked(self, kind: str, place: int) -> Prompt:
        return self.read[kind][1][place]

    def select(self, kind: str, places: list[int]) -> State:
        """Return the state after the prompts of the items at `places`."""
        read = self.places(kind)
        return self.read[kind][0].select([read.index(place) for place in places])

    # ---- scores of options
    def read_out(self, state: State, kind: str, places: list[int], words: list[str | None],
                 before: list[int]) -> list[dict]:
        """Return {"r0", "r1"} of each row of `state` after the ids `before`, for the item that was asked.

        R1 scores behind `words`, the clean run's own; None without them, or where another question or other
        options were asked. R0 scores behind the stem of the settings; without one it is R1."""
        asked = [self.asked(kind, place).item for place in places]
        own = [said if item["question"] == mine["question"] and item["options"] == mine["options"] else None
               for item, mine, said in zip(asked, map(self.items.__getitem__, places), words, strict=True)]
        r1 = self.scored(state, asked, own, before)
        r0 = r1 if self.settings.stem is None else self.scored(state, asked, [self.settings.stem] * len(own),
                                                               before)
        return [{"r0": first, "r1": second} for first, second in zip(r0, r1)]

    def scored(self, state: State, asked: list[dict], stems: list[str | None],
               before: list[int]) -> list[dict | None]:
        """Return how the options of each row's item score behind its stem, if it has one."""
        rows = [n for n, stem in enumerate(stems) if stem]
        if not rows:
            return [None] * len(stems)
        items, stems_of_rows = [asked[n] for n in rows], [stems[n] for n in rows]
        scores = score_options(self.qwen, state.select(rows), items, stems_of_rows, [before] * len(rows),
                               self.settings.options)
        priors = self.priors(items, stems_of_rows)
        by_row = {n: describe_scores(found, item["answer"]["value"], prior)
                  for n, found, item, prior in zip(rows, scores, items, priors)}
        return [by_row.get(n) for n in range(len(stems))]

    def priors(self, items: list[dict], stems: list[str]) -> list[dict[str, float] | None]:
        """Return the log-probabilities of each item's options behind its stem, after the question alone:
        without images and imagination. None where the settings ask for no prior."""
        if self.settings.prior == "none":
            return [None] * len(items)
        wanted = {(item["id"], stem): item for item, stem in zip(items, stems, strict=True)}
        for piece in self.settings.pieces([key for key in wanted if key not in self.known_priors]):
            asked = [wanted[key] for key in piece]
            texts = [prompt_of(self.qwen.tokenizer, item, 0, self.settings.system, self.settings.suffix,
                               blind=True) for item in asked]
            state = prefill(self.qwen, encode(self.qwen, texts, [[]] * len(texts)))
            found = score_options(self.qwen, state, asked, [stem for _, stem in piece], [[]] * len(piece),
                                  self.settings.options)
            self.known_priors |= dict(zip(piece, found))
        return [self.known_priors[item["id"], stem] for item, stem in zip(items, stems)]


# ---- fields of a record
def answer_fields(item: dict, text: str, last_words: str, ids: list[int], finish: str) -> dict:
    """Return the fields that depend on a reply; `last_words` follow all imagination."""
    if "boards" in item:
        letter, rule, correct = read_path(item, last_words)
    else:
        letter, rule = extract_choice(last_words.strip(), dict(item["options"]), finish)
        correct = letter == item["answer"]["value"]
    return {"text": text, "finish": finish, "n_new": len(ids), "pred": letter, "rule": rule,
            "correct": correct, "degenerate": is_degenerate(ids, finish)}


def read_path(item: dict, words: str) -> tuple[str | None, str, bool]:
    """Return the letter of the board that the boxed moves solve, the edited one first ("neither"; None
    without a box), the rule, and whether they solve the asked board.

    They are read by walking them, in the free reply (R2); R0 and R1 score the shortest paths of both boards.
    """
    moves = vsp_moves(visible(words))
    if moves is None:
        return None, "no_box", False
    solved = [letter for letter, board in item["boards"].items() if walk_vsp(board, moves)]
    return (solved[-1] if solved else "neither"), "boxed_path", item["answer"]["value"] in solved


def same_words(a: str, b: str) -> bool:
    """Return whether two options, of any items, say the same."""
    return answers_match(strip_label(a), strip_label(b))


def asked_fields(prompt: Prompt, item: dict, clean: dict, record: dict) -> dict:
    """Return the fields of do(X): which item was asked, and whether the answer says what the clean one of
    `item` said, in words (None where one of them is unresolved)."""
    asked, letters = prompt.item, (clean["pred"], record["pred"])
    words = [dict(each["options"])[letter] for each, letter in zip((item, asked), letters)
             if letter in dict(each["options"])]
    return {"asked": {"item": asked["id"], "gold": asked["answer"]["value"], "gold_holds": prompt.gold_holds},
            "same_answer": same_words(*words) if len(words) == 2 else None}


def donor_fields(donor: dict | None, item: dict) -> dict | None:
    """Return the donor's id and right option, and the option of `item` that says the same, if any."""
    if donor is None:
        return None
    says = next((letter for letter, text in item["options"] if same_words(text, gold_words(donor))), None)
    return {"item": donor["id"], "gold": donor["answer"]["value"], "option": says}


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
