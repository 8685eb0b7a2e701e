"""The other images of an item, and planning items (VSP): two boards that differ, and moves that solve them.

Moves are read by walking them, in the free reply (R2); R0 and R1 score the shortest paths of the two boards.
"""
import random

from PIL import Image

from utils.images import crop_region
from utils.items import find_cell, open_images, region_in, shortest_path, vsp_moves, walk_vsp
from utils.jsonl import DataError
from utils.reply_text import visible

Board = list[list[int]]
HELPER_PIXELS = 224 * 224  # at least, of a region: 64 visual tokens, more than any segment has latents


def edited_boards(board: Board) -> list[tuple[Board, list[list[int]]]]:
    """Return (board, [cell, cell] that change places) of every edit that makes the shortest path fail and
    leaves another: the goal and a safe cell, or a hole and a cell of that path."""
    size, path, found = range(len(board)), shortest_path(board), []
    kinds = {(row, column): board[row][column] for row in size for column in size}
    moved = [find_cell(board, 2), *(cell for cell, kind in kinds.items() if kind == -1)]
    safe = [cell for cell, kind in kinds.items() if kind == 0]
    for (r, c), (row, column) in ((one, other) for one in moved for other in safe):
        edited = [list(line) for line in board]
        edited[r][c], edited[row][column] = edited[row][column], edited[r][c]
        if path is not None and not walk_vsp(edited, path) and shortest_path(edited) is not None:
            found.append((edited, [[r, c], [row, column]]))
    return found


def planning_item(item: dict, seed: int) -> dict:
    """Return a VSP item as one with options: "A" is a shortest path of its board, "B" one of the board after
    an edit, drawn by seed and item, or of the item's own counterfactual; DataError if a board has neither."""
    board, edit = item["answer"]["value"], item.get("counterfactual")
    if edit:
        other, changed = edit["answer"]["value"], {"images": edit["images"]}
    else:
        choices = edited_boards(board)
        if not choices:
            raise DataError(f"item {item['id']!r}: no two cells of {board} can change places so that another "
                            "path solves it; expected such a board, or a counterfactual")
        rng = random.Random(f"{seed}/edit/{item['id']}")
        goal = [choice for choice in choices if list(find_cell(board, 2)) in choice[1]]
        holes = [choice for choice in choices if choice not in goal]
        other, swap = rng.choice(rng.choice([part for part in (goal, holes) if part]))
        changed = {"swap": swap}
    paths = {letter: ",".join(shortest_path(one) or "") for letter, one in (("A", board), ("B", other))}
    return item | {"boards": {"A": board, "B": other}, "options": list(map(list, paths.items())),
                   "answer": {"type": "letter", "value": "A"},
                   "counterfactual": {**(edit or {}), **changed, "answer": {"type": "letter", "value": "B"}}}


def swap_cells(images: list[Image.Image], edited: dict) -> list[Image.Image]:
    """Return the pictures with the two cells of an edited item's "swap" exchanged in the first."""
    image, result = images[0], images[0].copy()
    side = image.width / len(edited["boards"]["B"])  # of a cell, in pixels
    boxes = [[round(side * n) for n in (c, r, c + 1, r + 1)] for r, c in edited["swap"]]
    for box, other in zip(boxes, boxes[::-1]):
        result.paste(image.crop(other).resize((box[2] - box[0], box[3] - box[1])), box)
    return [result, *images[1:]]


def read_path(item: dict, words: str) -> tuple[str | None, str, bool]:
    """Return the letter of the board that the boxed moves solve, the edited one first ("neither"; None
    without a box), the rule, and whether they solve the asked board."""
    moves = vsp_moves(visible(words))
    if moves is None:
        return None, "no_box", False
    solved = [letter for letter, board in item["boards"].items() if walk_vsp(board, moves)]
    return (solved[-1] if solved else "neither"), "boxed_path", item["answer"]["value"] in solved


def open_others(item: dict, images: list[Image.Image], root: str) -> dict[str, tuple[dict, list]]:
    """Return (item, images) of the item's answer-changing edit ("counterfactual") and of the item with the
    image that helps with it ("helper": its own, else its region, enlarged), as far as it has them."""
    others, shown = {}, None
    if item.get("counterfactual"):
        edited = {**item, **item["counterfactual"], "id": f"{item['id']}#edit"}
        changed = swap_cells(images, edited) if "swap" in edited else open_images(edited, root)
        others["counterfactual"] = edited, changed
    if item.get("helper"):
        shown = open_images({"images": [item["helper"]]}, root)[0]
    elif item.get("region"):
        shown = crop_region(images[0], tuple(region_in(item, images[0].size)), HELPER_PIXELS)
    return others | ({"helper": (item, [shown] * max(1, len(images)))} if shown else {})
