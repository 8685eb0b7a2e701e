"""Benchmark items: read with checks, and asked in the same words by every script that asks them."""
import re
from pathlib import Path

from PIL import Image

from utils.images import open_image, resolve_image
from utils.jsonl import DataError, read_rows

ITEM_FIELDS = {"id": str, "question": str, "options": list, "answer": dict, "images": list, "metric": str}
# metric -> type of the gold answer. likelihood: the option that the model finds likeliest as a reply, no
# letters; wtq, tabfact: TableVQABench; yesno_pair: MME, two questions a picture; unscored: asked for its
# latents alone
ANSWER_TYPES = {"mcq": "letter", "vsp_path": "path_map", "likelihood": "letter", "wtq": "values",
                "tabfact": "bool",
                "yesno_pair": "yesno", "unscored": "values"}
TEXTS = ("benchmark", "category", "group_id", "hint")  # fields that are a string, null or not there
FAR = 1 << 20  # pixels; beyond any picture
SCORED = ("mcq", "vsp_path")  # what a script takes that names no metrics of its own


def read_items(path: str | Path, limit: int | None = None, metrics: tuple[str, ...] = SCORED) -> list[dict]:
    """Read items and check their parts; DataError with path and id for an unknown metric or a gold that is no
    option."""
    items = read_rows(path, ITEM_FIELDS, limit, hint="evaluate.py --prepare writes it")
    for item in items:
        fault = item_fault(item, metrics)
        if fault:
            raise DataError(f"{path}: item {item['id']!r}: {fault}")
    return items


def item_fault(item: dict, metrics: tuple[str, ...]) -> str | None:
    """Return in words what is wrong with an item, or None."""
    if item["metric"] not in metrics:
        return f"metric {item['metric']!r}, expected one of {', '.join(metrics)}"
    answer = item["answer"]
    if answer.get("type") != ANSWER_TYPES[item["metric"]] or "value" not in answer:
        return f"answer {str(answer)[:60]}, expected type {ANSWER_TYPES[item['metric']]!r} and a value"
    if not all(isinstance(image, dict) and isinstance(image.get("path"), str) for image in item["images"]):
        return f"images {str(item['images'])[:60]}, expected a list of {{\"path\": ...}}"
    if odd := [name for name in TEXTS if not isinstance(item.get(name), (str, type(None)))]:
        return f"field {odd[0]!r} is {str(item[odd[0]])[:40]!r}, expected a string or null"
    raw = item.get("raw") or {}
    if not isinstance(raw, dict) or not re.fullmatch("[0-9]{1,9}", str(raw.get("cycle_category") or 0)):
        return f"field 'raw' is {str(raw)[:60]!r}, expected the published row, its cycle_category a number if there is one"
    if item["metric"] == "vsp_path" and (fault := board_fault(answer["value"])):
        return f"answer {fault}"
    if fault := value_fault(answer):
        return fault
    if answer["type"] == "letter":
        pairs = item["options"]
        if len(pairs) < 2 or not all(isinstance(p, list) and len(p) == 2
                                     and all(isinstance(s, str) for s in p) for p in pairs):
            return f"options {str(pairs)[:60]}, expected at least two of [letter, text]"
        letters = [letter for letter, _ in pairs]
        if answer["value"] not in letters or len(set(letters)) < len(letters):
            return f"gold {answer['value']!r} and letters {letters}, expected the gold among unlike letters"
        # what is scored in the box, as it stands
        if not all(re.fullmatch("[A-Z]", letter) for letter in letters):
            return f"letters {str(letters)[:60]}, expected A to Z"
    return change_fault(item, metrics)


def change_fault(item: dict, metrics: tuple[str, ...]) -> str | None:
    """Return in words what is wrong with what an intervention would change of an item, its region or its
    edit, or None."""
    region, edit = item.get("region"), item.get("counterfactual")
    if region is not None and not (isinstance(region, list) and len(region) == 4
                                   and all(type(n) is int and abs(n) < FAR for n in region)
                                   and region[0] < region[2] and region[1] < region[3]):
        return f"region {str(region)[:40]}, expected [left, top, right, bottom] in pixels"
    if edit is None:
        return None
    if not isinstance(edit, dict) or not isinstance(edit.get("images"),
                                                    list) or not isinstance(edit.get("answer"), dict):
        return f"counterfactual {str(edit)[:60]}, expected an object with images and answer"
    fault = item_fault({**item, **edit, "counterfactual": None}, metrics)
    return fault and f"counterfactual: {fault}"


def value_fault(answer: dict) -> str | None:
    """Return in words why a gold of type values, bool or yesno is none, or None."""
    kind, value = answer["type"], answer["value"]
    if kind == "values" and not (isinstance(value, list) and value
                                 and all(isinstance(text, str) for text in value)):
        return f"gold {str(value)[:40]!r}, expected a list of at least one text"
    if kind == "bool" and not isinstance(value, bool):
        return f"gold {value!r}, expected true or false"
    if kind == "yesno" and value not in ("yes", "no"):
        return f"gold {value!r}, expected 'yes' or 'no'"
    return None


def board_fault(board: object) -> str | None:
    """Return in words why a VSP map (1 start, 2 goal, -1 hole, 0 safe) cannot be walked, or None."""
    if not isinstance(board, list) or not all(isinstance(line, list) and len(line) == len(board)
                                              for line in board):
        return f"{str(board)[:40]} is no square of numbers"
    cells = [cell for line in board for cell in line]
    if cells.count(1) != 1 or cells.count(2) != 1 or any(cell not in (-1, 0, 1, 2) for cell in cells):
        return "has not one start (1) and one goal (2) among holes (-1) and safe squares (0)"
    return None


def group_of(item: dict) -> str:
    """Return what varies together with other items, one image's questions, say; an item without a group is
    its own."""
    return item.get("group_id") or item["id"]


def rotation_of(item: dict) -> int | None:
    """Return which rotation of its options an item shows (HR-Bench); None for an item that stands there once.
    """
    cycle = (item.get("raw") or {}).get("cycle_category")
    return None if cycle is None else int(cycle)


def gold_words(item: dict) -> str | None:
    """Return the right answer in words; None for a map, which has many."""
    kind, value = item["answer"]["type"], item["answer"]["value"]
    if kind == "letter":
        return dict(item["options"])[value]
    if kind == "values":
        return value[0]
    return None if kind == "path_map" else str(value).lower()


def region_in(item: dict, size: tuple[int, int]) -> list[int]:
    """Return what of an item's region lies in its image of this (width, height); DataError if nothing does.
    """
    left, top, right, bottom = item["region"]
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    if left >= right or top >= bottom:
        raise DataError(
            f"item {item['id']!r}: region {item['region']} in an image of {size[0]} x {size[1]} pixels; expected "
                        "[left, top, right, bottom] inside")
    return [left, top, right, bottom]


def question_text(item: dict, suffix: str = "") -> str:
    """Return the user's words. Multiple choice is asked in VLMEvalKit's words (vlmeval/dataset/image_mcq.py,
    build_prompt), with its trailing space and newline; other items bring their whole text as the question."""
    if item.get("metric", "mcq") != "mcq":  # probe items, which are always multiple choice, name none
        return item["question"] + suffix
    hint = f"Hint: {item['hint']}\n" if item.get("hint") else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in item["options"])
    return (f"{hint}Question: {item['question']}\nOptions:\n{options}"
            f"Please select the correct answer from the options above. \n{suffix}")


def open_images(item: dict, root: str | Path) -> list[Image.Image]:
    """Open an item's images below `root`; ImageError names what cannot be used."""
    return [open_image(resolve_image(root, image["path"])) for image in item["images"]]
