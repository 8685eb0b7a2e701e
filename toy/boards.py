"""Make and draw FrozenLake boards as VSP has them, and write its 400 test problems without a download.

    SDL_AUDIODRIVER=dummy python -m toy.boards --output work/vsp
    python evaluate.py --benchmark vsp --source work/vsp/test.jsonl --prepare --output work/vsp

Reads   toy/vsp.json: the boards in letters, the prompt, their source and licence
Writes  --output: test.jsonl and img/level<size>/<id>.png, as Mirage's repository has them
Prints  one JSON object: {"boards": 400}

gymnasium 1.3.0 draws the published pictures pixel for pixel (400 of 400 compared); 1.4.0 has other art. A
board is a list of rows as in VSP's `map_desc`: 1 start, 2 goal, -1 hole, 0 ice. Without SDL_AUDIODRIVER=dummy
pygame may complain that there is no sound card.
"""
import argparse
import functools
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cli import cli
from utils.items import shortest_path
from utils.jsonl import load_object, write_rows

CELL = 64  # pixels per cell
KINDS = {"S": 1, "G": 2, "H": -1, "F": 0}  # FrozenLake-v1's letters
Board = list[list[int]]


@functools.cache
def tiles() -> dict[int, np.ndarray]:
    """Return the picture of each kind of cell, bytes [64, 64, 3], as gymnasium draws it."""
    import gymnasium
    lake = gymnasium.make("FrozenLake-v1", desc=["".join(KINDS)], render_mode="rgb_array", is_slippery=False)
    lake.reset()
    strip = lake.render()
    lake.close()
    return {kind: strip[:, CELL * n:CELL * (n + 1)].copy() for n, kind in enumerate(KINDS.values())}


def draw_board(board: Board) -> Image.Image:
    rows = [np.concatenate([tiles()[kind] for kind in row], axis=1) for row in board]
    return Image.fromarray(np.concatenate(rows))


def make_board(rng: random.Random, size: int, hole_rate: float) -> Board:
    """Return a board whose goal can be reached; start and goal anywhere, other cells holes at `hole_rate`."""
    while True:
        board = [[-1 if rng.random() < hole_rate else 0 for _ in range(size)] for _ in range(size)]
        for kind, cell in zip((1, 2), rng.sample(range(size * size), 2)):
            board[cell // size][cell % size] = kind
        if shortest_path(board) is not None:
            return board


def read_problems() -> tuple[str, dict[str, Board]]:
    """Return VSP's prompt and its test boards by "<size>/<id>", in the published order."""
    data = load_object(Path(__file__).with_name("vsp.json"))
    return data["text_input"], {name: [[KINDS[letter] for letter in row] for row in letters.split("/")]
                                for name, letters in data["boards"].items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write")
    folder, (text, boards), rows = Path(parser.parse_args(argv).output), read_problems(), []
    for name, board in tqdm(boards.items(), desc="boards"):
        size, map_id = name.split("/")
        rows.append({"text_input": text, "image_input": f"img/level{size}/{map_id}.png", "map_id": map_id,
                     "map_desc": board})
        path = folder / rows[-1]["image_input"]
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_board(board).save(path)
    write_rows(folder / "test.jsonl", rows)
    print(json.dumps({"boards": len(rows)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
