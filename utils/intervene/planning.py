"""Planning items (VSP) as interventions take them: two boards that differ, and the moves that solve each.

Moves are read by walking them, in the free reply (R2); R0 and R1 score the shortest paths of the two boards.
"""
import random

from PIL import Image

from utils.items import find_cell, shortest_path, vsp_moves, walk_vsp
from utils.reply_text import visible

Board = list[list[int]]


def edited_boards(board: Board) -> list[tuple[Board, list[list[int]]]]:
    """Return (board, [cell, cell] that change places) of every edit that makes the shortest path fail and
    leaves another: the goal and a safe cell, or a hole and a cell of that path."""
    size, path, found = range(len(board)), shortest_path(board), []
    cells = [(row, column) for row in size for column in size]
    moved = [find_cell(board, 2), *(cell for cell in cells if board[cell[0]][cell[1]] == -1)]
    safe = [cell for cell in cells if board[cell[0]][cell[1]] == 0]
    for (r, c), (row, column) in ((one, other) for one in moved for other in safe):
        edited = [list(line) for line in board]
        edited[r][c], edited[row][column] = edited[row][column], edited[r][c]
        if path is not None and not walk_vsp(edited, path) and shortest_path(edited) is not None:
            found.append((edited, [[r, c], [row, column]]))
    return found


def planning_item(item: dict, seed: int) -> dict:
    """Return a VSP item as one with options: "A" is a shortest path of its board, "B" one of the board after
    an edit, drawn by seed and item, or of the item's own counterfactual. `boards` are both by letter."""
    board, edit = item["answer"]["value"], item.get("counterfactual")
    if edit:
        other, changed = edit["answer"]["value"], {"images": edit["images"]}
    else:
        choices = edited_boards(board)
        if not choices:
            return item | {"boards": {"A": board}, "options": [["A", ",".join(shortest_path(board) or "")]],
                           "answer": {"type": "letter", "value": "A"}}
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
    image, size = images[0], len(edited["boards"]["B"])
    boxes = [tuple(round(place * side / size) for place, side in (
        (c, image.width), (r, image.height), (c + 1, image.width), (r + 1, image.height)))
        for r, c in edited["swap"]]
    result, pieces = image.copy(), [image.crop(box) for box in boxes]
    for piece, box in zip(pieces[::-1], boxes):
        result.paste(piece.resize((box[2] - box[0], box[3] - box[1])), box)
    return [result, *images[1:]]


def read_path(item: dict, words: str) -> tuple[str | None, str, bool]:
    """Return the letter of the board that the boxed moves solve, the edited one first ("neither"; None
    without a box), the rule, and whether they solve the asked board."""
    moves = vsp_moves(visible(words))
    if moves is None:
        return None, "no_box", False
    solved = [letter for letter, board in item["boards"].items() if walk_vsp(board, moves)]
    return (solved[-1] if solved else "neither"), "boxed_path", item["answer"]["value"] in solved
