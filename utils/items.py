"""Benchmark items: reading with checks, the prompts in which every script asks them, VSP's boards."""
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from utils.images import open_image, resolve_image
from utils.jsonl import DataError, read_rows
from utils.reply_text import closing_braces

ITEM_FIELDS = {"id": str, "question": str, "options": list, "answer": dict, "images": list, "metric": str}
# metric -> type of the gold answer; wtq, tabfact: TableVQABench; yesno_pair: MME; unscored: for their latents
ANSWER_TYPES = {"mcq": "letter", "vsp_path": "path_map", "wtq": "values", "tabfact": "bool",
                "yesno_pair": "yesno", "unscored": "values"}
TEXTS = ("benchmark", "category", "group_id", "hint")  # each a string, null or absent
FAR = 1 << 20  # pixels; beyond any picture
SCORED = ("mcq", "vsp_path")  # accepted by default
USER_TURN, END_OF_TURN = "<|im_start|>user", "<|im_end|>"
STEM = "The answer is \\boxed{"  # the options of a readout are scored behind it
# of Qwen's control tokens and all of utils.latent_families
MARKS = re.compile(r"<(?=\||/?abs_vis_token|/?observation>|lvr\d>)")


def read_items(path: str | Path, limit: int | None = None, metrics: tuple[str, ...] = SCORED) -> list[dict]:
    """Read items; DataError for a bad field, such as a gold that is not an option."""
    items = read_rows(path, ITEM_FIELDS, limit, hint="evaluate.py --prepare writes it")
    for item in items:
        if fault := item_fault(item, metrics):
            raise DataError(f"{path}: item {item['id']!r}: {fault}")
    return items


def item_fault(item: dict, metrics: tuple[str, ...]) -> str | None:
    if item["metric"] not in metrics:
        return f"metric {item['metric']!r}, expected one of {', '.join(metrics)}"
    answer = item["answer"]
    if answer.get("type") != ANSWER_TYPES[item["metric"]] or "value" not in answer:
        return f"answer {str(answer)[:60]}, expected type {ANSWER_TYPES[item['metric']]!r} and a value"
    if not all(isinstance(image, dict) and isinstance(image.get("path"), str) for image in item["images"]):
        return f"images {str(item['images'])[:60]}, expected a list of {{\"path\": ...}}"
    helper = item.get("helper")
    if helper is not None and not (isinstance(helper, dict) and isinstance(helper.get("path"), str)):
        return f"helper {str(helper)[:60]}, expected {{\"path\": ...}}"
    if odd := [name for name in TEXTS if not isinstance(item.get(name), (str, type(None)))]:
        return f"field {odd[0]!r} is {str(item[odd[0]])[:40]!r}, expected a string or null"
    raw = item.get("raw") or {}
    if not isinstance(raw, dict) or not re.fullmatch("[0-9]{1,9}", str(raw.get("cycle_category") or 0)):
        return f"field 'raw' is {str(raw)[:60]!r}, expected the published row, its cycle_category a number"
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
        if not all(re.fullmatch("[A-Z]", letter) for letter in letters):
            return f"letters {str(letters)[:60]}, expected A to Z"
    return change_fault(item, metrics)


def change_fault(item: dict, metrics: tuple[str, ...]) -> str | None:
    """Return the fault of what interventions use, or None."""
    region, edit = item.get("region"), item.get("counterfactual")
    if region is not None and not (isinstance(region, list) and len(region) == 4
                                   and all(type(n) is int and abs(n) < FAR for n in region)
                                   and region[0] < region[2] and region[1] < region[3]):
        return f"region {str(region)[:40]}, expected [left, top, right, bottom] in pixels"
    if edit is None:
        return None
    if not (isinstance(edit, dict) and {"images", "answer"} <= edit.keys() and all(
            isinstance(edit.get(name, kind()), kind) for name, kind in ITEM_FIELDS.items())):
        return f"counterfactual {str(edit)[:60]}, expected an object with images and answer, as in an item"
    fault = item_fault({**item, **edit, "counterfactual": None}, metrics)
    return fault and f"counterfactual: {fault}"


def value_fault(answer: dict) -> str | None:
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
    """Return the fault of a VSP map (1 start, 2 goal, -1 hole, 0 safe), or None."""
    if not isinstance(board, list) or not all(isinstance(line, list) and len(line) == len(board)
                                              for line in board):
        return f"{str(board)[:40]} is not a square of numbers"
    cells = [cell for line in board for cell in line]
    if cells.count(1) != 1 or cells.count(2) != 1 or any(cell not in (-1, 0, 1, 2) for cell in cells):
        return "lacks exactly one start (1) and one goal (2) among holes (-1) and safe squares (0)"
    return None


def group_of(item: dict) -> str:
    """Return an item's group, such as one image's questions; by default its id."""
    return item.get("group_id") or item["id"]


def gold_words(item: dict) -> str | None:
    """Return the right answer in words; None for a map, which has many."""
    kind, value = item["answer"]["type"], item["answer"]["value"]
    if kind == "letter":
        return dict(item["options"])[value]
    if kind == "values":
        return value[0]
    return None if kind == "path_map" else str(value).lower()


def region_in(item: dict, size: tuple[int, int]) -> list[int]:
    """Return the part of an item's region inside a (width, height); DataError if it is empty."""
    left, top, right, bottom = item["region"]
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    if left >= right or top >= bottom:
        raise DataError(f"item {item['id']!r}: region {item['region']} in an image of {size[0]} x {size[1]} "
                        "pixels; expected it inside")
    return [left, top, right, bottom]


def question_text(item: dict, suffix: str = "") -> str:
    """Return the user's words: of multiple choice VLMEvalKit's (vlmeval/dataset/image_mcq.py, build_prompt),
    of other items the question."""
    if item.get("metric", "mcq") != "mcq":  # probe items, without a metric, are multiple choice
        return item["question"] + suffix
    hint = f"Hint: {item['hint']}\n" if item.get("hint") else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in item["options"])
    return (f"{hint}Question: {item['question']}\nOptions:\n{options}"
            f"Please select the correct answer from the options above. \n{suffix}")


def open_images(item: dict, root: str | Path) -> list[Image.Image]:
    return [open_image(resolve_image(root, image["path"])) for image in item["images"]]


# ---- chats
def plain(text: str) -> str:
    """Return text with control tokens broken (`<|` becomes `< |`): data cannot end turns or begin latents."""
    return MARKS.sub("< ", text)


def user_content(text: str, n_images: int) -> list[str | None]:
    """Return the parts of a user turn, None for an image: at the `<image>` marks, else first."""
    pieces = plain(text).split("<image>")
    pieces = pieces if len(pieces) > 1 else [""] * n_images + pieces
    if len(pieces) - 1 != n_images:
        raise DataError(f"{len(pieces) - 1} <image> markers for {n_images} images in {text[:60]!r}",
                        "question")
    return [part for piece in pieces for part in (None, piece) if part != ""][1:]


def render(tokenizer, messages: Sequence[tuple]) -> str:
    """Return the prompt of a conversation: (role, text) or (role, parts), each a text or else an image."""
    turns = []
    for role, parts in messages:
        if isinstance(parts, str):
            parts = [plain(parts) if role == "assistant" else parts]
        turns.append({"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str)
                                                else {"type": "image"} for part in parts]})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def chat(tokenizer, text: str, n_images: int, system: str | None = None) -> str:
    """Return the prompt of one user turn, up to the assistant's; `system`: None is the template's own."""
    messages = [("system", system)] if system else []
    return render(tokenizer, [*messages, ("user", user_content(text, n_images))])


def prompt_of(tokenizer, item: dict, n_images: int, system: str | None, suffix: str,
              blind: bool = False) -> str:
    """Return the prompt of an item; `blind`: without its images and their marks."""
    text = question_text(item, suffix)
    return chat(tokenizer, text.replace("<image>", "") if blind else text, n_images, system)


def blind_turn(tokenizer, item: dict, system: str | None, suffix: str) -> str:
    """Return the end of a turn and one more that asks an item without its images, up to the start of the
    assistant's."""
    prompt = prompt_of(tokenizer, item, 0, system, suffix, blind=True)
    return END_OF_TURN + "\n" + prompt[prompt.rindex(USER_TURN):]


# ---- VSP's boards: square lists of numbers, 1 start, 2 goal, -1 hole, 0 safe
STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}  # row, column


def vsp_moves(text: str) -> str | None:
    """Return the letters U, D, L, R of the last \\boxed{} in a reply, if it closes."""
    start = text.rfind("\\boxed{")
    begin = start + len("\\boxed{")
    end = closing_braces(text).get(begin) if start >= 0 else None
    return None if end is None else "".join(move for move in text[begin:end].upper() if move in "UDLR")


def walk_vsp(map_desc: list[list[int]], moves: str) -> bool:
    """Return whether moves lead from start (1) to goal (2), as in Mirage's src/task.py: a move off the map is
    ignored, a hole (-1) fails at once."""
    place = find_cell(map_desc, 1)
    for move in moves:
        row, column = (n + step for n, step in zip(place, STEPS[move]))
        if 0 <= row < len(map_desc) and 0 <= column < len(map_desc[0]):
            place = row, column
        if map_desc[place[0]][place[1]] == -1:
            return False
    return map_desc[place[0]][place[1]] == 2


def find_cell(map_desc: list[list[int]], value: int) -> tuple[int, int]:
    return next((row, line.index(value)) for row, line in enumerate(map_desc) if value in line)


def shortest_path(board: list[list[int]]) -> str | None:
    """Return the shortest moves from start to goal, if there is a way (breadth first)."""
    paths, size = {find_cell(board, 1): ""}, len(board)
    queue = deque(paths)
    while queue:
        row, column = queue.popleft()
        for move, (down, right) in STEPS.items():
            cell = row + down, column + right
            inside = 0 <= min(cell) and max(cell) < size
            if inside and cell not in paths and board[cell[0]][cell[1]] != -1:
                paths[cell] = paths[row, column] + move
                queue.append(cell)
    return paths.get(find_cell(board, 2))
