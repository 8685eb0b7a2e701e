"""do(X): the same item asked with one thing changed, and how far that moves the imagination and the text
after it.

    identity         nothing: the floor, 0 but for rounding where batches differ
    image_swap       the images of another item               question_swap    the question and options of
    another item
    mask_relevant    the item's region greyed                 mask_irrelevant  a box of its size elsewhere
    greyed
    brightness       all images darker by a fifth             crop             5 % cut off each side, then
    resized back

Masks need a "region" ([left, top, right, bottom] in pixels of the first image) that leaves room for its like.
The other way to ask about X is to cross images with questions. E|Z(x) - Z(x')| / E|h(x) - h(x')| is the
sensitivity, h being the states of the text after the imagination at the same offset; that of the relevant
over that of the irrelevant mask is the selectivity, given for Z and for h.
"""
import argparse
import random

import numpy as np
from PIL import Image

from utils.images import MASK_GREY
from utils.items import open_images, region_in
from utils.probe.geometry import variance_split
from utils.probe.similarity import N_BOOT, Bootstrap
from utils.probe.states import States

EDITS = ("identity", "image_swap", "question_swap", "mask_relevant", "mask_irrelevant", "brightness", "crop")
DARKER = 0.8  # of every value
CUT_OFF = 0.05  # of each side


# ------------------------------------------------------------------------------------ edited items
def edited(name: str, items: list[dict], seed: int) -> list[dict]:
    """Return the items that can be edited so, as items of their own: id "<id>#<name>", "from" the id of the
    unedited."""
    made = []
    for place, item in enumerate(items):
        changes = edit_of(name, place, items, seed)
        if changes is not None:
            made.append({**item, **changes, "id": f"{item['id']}#{name}", "from": item["id"]})
    return made


def edit_of(name: str, place: int, items: list[dict], seed: int) -> dict | None:
    """Return the fields that an edit changes of the item at `place`, or None if it cannot be made."""
    item, others = items[place], items[place + 1:] + items[:place]
    if name == "image_swap":
        other = next((o for o in others if len(o["images"]) == len(item["images"])
                      and (o["root"], o["images"]) != (item["root"], item["images"])), None)
        return other and {"images": other["images"], "root": other["root"]}
    if name == "question_swap":
        other = next((o for o in others if o["question"] != item["question"]), None)
        return other and {field: other.get(field) for field in ("question", "options", "metric", "hint",
                                                                "answer")}
    if not name.startswith("mask"):
        return {"edit": {"name": name}}
    if not item.get("region"):
        return None
    size = open_images(item, item["root"])[0].size
    box = region_in(item, size)
    # None: then neither mask is made, so that they are of one set
    elsewhere = other_box(box, size, f"{seed}/{item['id']}")
    return elsewhere and {"edit": {"name": name, "box": box if name == "mask_relevant" else elsewhere}}


def other_box(box: list[int], size: tuple[int, int], seed: str) -> list[int] | None:
    """Return a box of the same sides that does not touch `box`, drawn evenly from all places; None if there
    is none."""
    (left, top, right, bottom), (width, height) = box, size
    w, h = right - left, bottom - top
    clear_x = [*range(left - w + 1), *range(right, width - w + 1)]  # beside it at every height
    clear_y = [*range(top - h + 1), *range(bottom, height - h + 1)]
    n_beside = len(clear_x) * (height - h + 1)
    over_x = range(max(left - w + 1, 0), min(right, width - w + 1))  # above or below it
    if not n_beside + len(over_x) * len(clear_y):
        return None
    n = random.Random(seed).randrange(n_beside + len(over_x) * len(clear_y))
    if n < n_beside:
        x, y = clear_x[n % len(clear_x)], n // len(clear_x)
    else:
        x, y = over_x[(n - n_beside) % len(over_x)], clear_y[(n - n_beside) // len(over_x)]
    return [x, y, x + w, y + h]


def open_shown(item: dict) -> list[Image.Image]:
    """Open the images of an item with a "root", as its edit shows them."""
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


# ------------------------------------------------------------------------------------ what an edit moves
def moves(store: States, kind: str, key: str, other: str) -> np.ndarray:
    """Return |a - b| of the states of two samples, step by step as far as both go (of latents: in the first
    segment)."""
    name = store.find(kind)
    pair = [store.load(each, name) for each in (key, other)]
    if pair[0] is None or pair[1] is None:
        return np.zeros(0)
    ends = [store.records[each]["segments"][0] if name == "latent" else len(x) for each,
            x in zip((key, other), pair)]
    n = min(ends)
    return np.linalg.norm(pair[0][:n].astype(np.float64) - pair[1][:n], axis=1)


def measure_edits(store: States, sets: dict[str, list[dict]], args: argparse.Namespace) -> tuple[list[dict],
                                                                                                 dict]:
    """Return rows for probes.jsonl, a step each, and a summary of the edited items in `sets` (name -> items).

    "change" is E|Z(x) - Z(x')|, "sensitivity" its ratio to that of the text at the same offset (null where
    the text does not move at all), "selectivity" the ratio of the two masks. In the summary a sample counts
    by its mean over the steps.
    """
    rows, summary, moved = [], {}, {}
    for name, items in sets.items():
        both = [item for item in items if all(store.records[key]["emitted"] for key in (item["from"],
                                                                                        item["id"]))]
        moved[name] = {item["from"]: (moves(store, "imagination", item["from"], item["id"]),
                                      moves(store, "text", item["from"], item["id"])) for item in both}
        base = sum(store.records[item["from"]]["emitted"] for item in items)
        summary[name] = {"asked": len(items), "emitted": base, "emitted_too": len(both), "sensitivity": None}
        z, h = ([x[k] for x in moved[name].values() if min(map(len, x))] for k in (0, 1))
        if len(z) >= 2:
            n_steps = [min(len(a), len(b)) for a, b in zip(z, h)]
            means = [np.array([x[:n].mean() for x, n in zip(side, n_steps)]) for side in (z, h)]
            summary[name] |= {"change": float(means[0].mean()), "sensitivity": ratio(*means, args)}
        for step in range(max(map(len, z), default=0)):
            place = {"layer": -1, "step": step, "form": "raw", "pairs": "all", "edit": name}
            at = np.array([(a[step], b[step]) for a, b in zip(z, h) if min(len(a), len(b)) > step])
            if len(at) >= 2:
                boot = Bootstrap(len(at), args.level, N_BOOT, args.seed)
                rows += [{"kind": kind, **place, "measure": "change", **boot.mean(x)}
                         for kind, x in zip(("imagination", "text"), at.T)]
                rows.append({"kind": "imagination", **place, "measure": "sensitivity", **(
                    ratio(*at.T, args) or {"value": None, "low": None, "high": None, "n": len(at)})})
    if {"mask_relevant", "mask_irrelevant"} <= set(moved):
        more, summary["selectivity"] = selectivity(moved["mask_relevant"], moved["mask_irrelevant"], args)
        rows += more
    return rows, summary


def selectivity(relevant: dict, irrelevant: dict, args: argparse.Namespace) -> tuple[list[dict], dict]:
    """Return rows a step and {kind: ratio over all steps} of what two masks move of the same samples."""
    rows, summary = [], {}
    names = [name for name in relevant if name in irrelevant]
    for k, kind in enumerate(("imagination", "text")):
        pairs = [(relevant[name][k], irrelevant[name][k]) for name in names]
        n_steps = [min(map(len, pair)) for pair in pairs]
        means = np.array([[x[:n].mean() for x in pair] for pair, n in zip(pairs, n_steps) if n])
        summary[kind] = ratio(*means.T, args) if len(means) >= 2 else None
        for step in range(max(n_steps, default=0)):
            at = np.array([(a[step], b[step]) for (a, b), n in zip(pairs, n_steps) if n > step])
            found = ratio(*at.T, args) if len(at) >= 2 else None
            if found:
                rows.append({"kind": kind, "layer": -1, "step": step, "form": "raw", "pairs": "all",
                             "edit": "mask",
                             "measure": "selectivity", **found})
    return rows, summary


def ratio(above: np.ndarray, below: np.ndarray, args: argparse.Namespace) -> dict | None:
    """Return the ratio of two means with its interval over samples, or None if the lower is 0."""
    return Bootstrap(len(above), args.level, N_BOOT, args.seed).ratio(above,
                                                                      below) if below.sum() > 0 else None


# ------------------------------------------------------------------------------ images crossed with questions
def crossed_items(items: list[dict], n_images: int, n_questions: int) -> list[list[dict]]:
    """Return the first images x questions as items, all with as many images as the first has."""
    able = [item for item in items if len(item["images"]) == len(items[0]["images"])]
    return [[{**asked, "id": f"{shown['id']}@{asked['id']}", "group_id": shown["id"],
              "images": shown["images"], "root": shown["root"]}
             for asked in able[:n_questions]] for shown in able[:n_images]]


def split_crossed(store: States, grid: list[list[dict]], args: argparse.Namespace) -> dict:
    """Return for each step the variance split over the images that imagined something at every question, and
    how much an exchange of images and of questions moves the imagination beside the first text state."""
    name = store.find("imagination")
    whole = [row for row in grid if all(name in store.records[item["id"]]["tensors"] and "text" in
                                        store.records[item["id"]]["tensors"] for item in row)]
    result = {"asked": [len(grid), len(grid[0])], "images_that_always_imagined": len(whole), "steps": []}
    if len(whole) < 2 or len(grid[0]) < 2:
        return result
    states = [[store.load(item["id"], name) for item in row] for row in whole]
    text = np.array([[store.load(item["id"], "text")[0] for item in row] for row in whole])
    for step in range(min(len(x) for row in states for x in row)):
        at = np.array([[x[step] for x in row] for row in states])
        entry = {"step": step + 1, **variance_split(at, seed=args.seed)}
        for kind, axis in (("image", 0), ("question", 1)):
            moved, reference = (np.linalg.norm(x - np.roll(x, 1, axis), axis=2).mean(1) for x in (at, text))
            entry[f"{kind}_swap"] = ratio(moved, reference, args)
        result["steps"].append(entry)
    return result
