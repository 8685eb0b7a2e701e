"""do(X): ask an item with one thing changed; measure how far that moves the imagination and the text after.

    identity         nothing: 0 except for rounding where batches differ
    image_swap       the images of another item
    question_swap    the question and options of another item
    mask_relevant    the region of the item in grey
    mask_irrelevant  a box of the same size elsewhere in grey
    brightness       all images darker by a fifth
    crop             5 % cut off each side, then resized back

Masks need a "region" that leaves space for a second box. The sensitivity is E|Z(x) - Z(x')| / E|h(x) -
h(x')|, where h are the states of the text after the imagination at the same offset; the selectivity is the
ratio of what the two masks move. `cross_items` crosses images with questions instead.
"""
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.images import MASK_GREY
from utils.items import open_images, region_in
from utils.probe.similarity import Bootstrap
from utils.probe.states import States

ASKED = ("question", "options", "metric", "hint", "answer")
DARKER = 0.8  # factor of every value
CUT_OFF = 0.05  # of each side


# ---- edited items
def edit_items(name: str, items: list[dict], seed: int) -> list[dict]:
    """Return edited copies of the items that allow the edit: id "<id>#<name>", "from" the original id."""
    return [{**item, **changes, "id": f"{item['id']}#{name}", "from": item["id"]}
            for place, item in enumerate(items) if (changes := edit_of(name, place, items, seed)) is not None]


def edit_of(name: str, place: int, items: list[dict], seed: int) -> dict | None:
    """Return the fields that an edit changes in the item at `place`; None if it is impossible."""
    item, others = items[place], items[place + 1:] + items[:place]
    if name == "image_swap":
        return next(({"images": other["images"], "root": other["root"]} for other in others
                     if (other["root"], other["images"]) != (item["root"], item["images"])
                     and len(other["images"]) == len(item["images"])), None)
    if name == "question_swap":
        return next(({field: other.get(field) for field in ASKED} for other in others
                     if other["question"] != item["question"]), None)
    if not name.startswith("mask"):
        return {"edit": {"name": name}}
    if not item.get("region"):
        return None
    size = open_images(item, item["root"])[0].size
    box = region_in(item, size)
    elsewhere = other_box(box, size, f"{seed}/{item['id']}")
    # without a second box neither mask is made: both are compared on the same items
    return elsewhere and {"edit": {"name": name, "box": box if name == "mask_relevant" else elsewhere}}


def other_box(box: list[int], size: tuple[int, int], seed: str) -> list[int] | None:
    """Return a box of the same sides that does not touch `box`, drawn uniformly, if one fits."""
    (left, top, right, bottom), (width, height) = box, size
    w, h = right - left, bottom - top
    clear_x = [*range(left - w + 1), *range(right, width - w + 1)]  # to its left or right, at any height
    clear_y = [*range(top - h + 1), *range(bottom, height - h + 1)]
    n_sideways = len(clear_x) * (height - h + 1)
    over_x = range(max(left - w + 1, 0), min(right, width - w + 1))  # above or below it
    n_places = n_sideways + len(over_x) * len(clear_y)
    if not n_places:
        return None
    n = random.Random(seed).randrange(n_places)
    if n < n_sideways:
        x, y = clear_x[n % len(clear_x)], n // len(clear_x)
    else:
        x, y = over_x[(n - n_sideways) % len(over_x)], clear_y[(n - n_sideways) // len(over_x)]
    return [x, y, x + w, y + h]


def open_edited(item: dict) -> list[Image.Image]:
    """Open the images of an item, with its edit applied."""
    images, edit = open_images(item, item["root"]), item.get("edit") or {"name": "identity"}
    if edit["name"].startswith("mask"):
        images[0].paste(MASK_GREY, tuple(edit["box"]))
    elif edit["name"] == "brightness":
        images = [image.point(lambda value: round(DARKER * value)) for image in images]
    elif edit["name"] == "crop":
        boxes = [(CUT_OFF * i.width, CUT_OFF * i.height, (1 - CUT_OFF) * i.width, (1 - CUT_OFF) * i.height)
                 for i in images]
        images = [i.resize(i.size, Image.Resampling.BICUBIC, box) for i, box in zip(images, boxes)]
    return images


# ---- how far an edit moves
class Moved(NamedTuple):
    """Distances between the states of an item and of its edited copy, by step."""

    imagination: np.ndarray
    text: np.ndarray


Pairs = list[tuple[np.ndarray, np.ndarray]]  # two series by step per sample


def distances(store: States, kind: str, key: str, other: str) -> np.ndarray:
    """Return |a - b| of two samples' states over the steps of both (latents: of the first segment)."""
    name = store.find(kind)
    states = [store.first_latents(sample) if name == "latent" else store.load(sample, name)
              for sample in (key, other)]
    if any(x is None for x in states):
        return np.zeros(0)
    n = min(map(len, states))
    return np.linalg.norm(states[0][:n].astype(np.float64) - states[1][:n], axis=1)


def mean_over_steps(pairs: Pairs) -> np.ndarray:
    """Return the means [m, 2] over the steps that both series have."""
    n_steps = [min(map(len, pair)) for pair in pairs]
    return np.array([[series[:n].mean() for series in pair] for pair, n in zip(pairs, n_steps) if n])


def ratio(above: np.ndarray, below: np.ndarray, seed: int) -> dict | None:
    """Return the ratio of two means with its interval, or None if the lower is 0."""
    return Bootstrap(len(above), seed=seed).ratio(above, below) if below.sum() > 0 else None


def measure_edits(store: States, sets: dict[str, list[dict]], seed: int) -> dict:
    """Return {edit: how many imagined again, how far that moved, its ratio to the text}, and the selectivity
    of the masks. Each sample counts with its mean over the steps."""
    summary, moved = {}, {}
    for name, items in sets.items():
        emitted = [item for item in items if store.records[item["from"]]["emitted"]]
        both = [item for item in emitted if store.records[item["id"]]["emitted"]]
        moved[name] = {item["from"]: Moved(*(distances(store, kind, item["from"], item["id"])
                                             for kind in Moved._fields)) for item in both}
        summary[name] = {"asked": len(items), "emitted": len(emitted), "emitted_too": len(both),
                         "sensitivity": None}
        means = mean_over_steps(list(moved[name].values()))
        if len(means) >= 2:
            summary[name] |= {"change": float(means[:, 0].mean()), "sensitivity": ratio(*means.T, seed)}
    if {"mask_relevant", "mask_irrelevant"} <= set(moved):
        relevant, irrelevant = moved["mask_relevant"], moved["mask_irrelevant"]
        summary["selectivity"] = {}
        for k, kind in enumerate(Moved._fields):
            means = mean_over_steps([(relevant[name][k], irrelevant[name][k])
                                     for name in relevant if name in irrelevant])
            summary["selectivity"][kind] = ratio(*means.T, seed) if len(means) >= 2 else None
    return summary


# ---- images x questions
def cross_items(items: list[dict], n_images: int, n_questions: int) -> list[list[dict]]:
    """Return images x questions as items, all with as many images as the first one."""
    able = [item for item in items if len(item["images"]) == len(items[0]["images"])]
    return [[{**asked, "id": f"{shown['id']}@{asked['id']}", "group_id": shown["id"],
              "images": shown["images"], "root": shown["root"]}
             for asked in able[:n_questions]] for shown in able[:n_images]]


def split_crossed(store: States, grid: list[list[dict]], seed: int) -> dict:
    """Return the variance split over the images that always imagined something, of each step and of all steps
    together."""
    name = store.find("imagination")
    whole = [row for row in grid if all(name in store.records[item["id"]]["tensors"] for item in row)]
    result = {"asked": [len(grid), len(grid[0])], "images_that_always_imagined": len(whole), "steps": [],
              "all_steps": None}
    if len(whole) < 2 or len(grid[0]) < 2:
        return result
    states = [[store.load(item["id"], name) for item in row] for row in whole]
    n_steps = min(len(x) for row in states for x in row)
    every = np.array([[x[:n_steps] for x in row] for row in states])
    result["all_steps"] = variance_split(every.reshape(*every.shape[:2], -1), seed=seed)
    result["steps"] = [{"step": step + 1, **variance_split(every[:, :, step], seed=seed)}
                       for step in range(n_steps)]
    return result


def variance_split(states: np.ndarray, n_perm: int = 1000, seed: int = 0) -> dict:
    """Split the variance of states [images, questions, d] into images, questions and their interaction; the
    shares sum to 1. "image_chance" is (A - 1) / (AB - 1); "image_p" permutes images within every question,
    "question_p" questions within every image. Shares and p are None where nothing varies."""
    n_images, n_questions, d = states.shape
    flat = states.reshape(-1, d) - states.reshape(-1, d).mean(0, dtype=np.float64)
    gram, places = flat @ flat.T, np.arange(len(flat)).reshape(n_images, n_questions)
    total, size = float(np.trace(gram)), len(flat)

    def between_rows(index: np.ndarray) -> float:
        return float(gram[index[:, :, None], index[:, None, :]].sum() / index.shape[1])

    rng, result = np.random.default_rng(seed), {"images": n_images, "questions": n_questions}
    if total <= 1e-24 * float((states.astype(np.float64) ** 2).sum()):
        return result | dict.fromkeys(("image", "image_p", "question", "question_p", "interaction"))
    for name, index in (("image", places), ("question", places.T)):
        own = between_rows(index)
        k = sum(between_rows(rng.permuted(index, axis=0)) >= own * (1 - 1e-12) for _ in range(n_perm))
        result |= {name: own / total, f"{name}_chance": (len(index) - 1) / (size - 1),
                   f"{name}_p": (1 + k) / (1 + n_perm)}
    return result | {"interaction": 1 - result["image"] - result["question"]}
