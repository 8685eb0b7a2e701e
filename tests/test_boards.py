"""VSP's test problems, drawn here, against the published files."""
import json
import random
from collections import Counter

import numpy as np
import pytest
from samples import shortest_path

import evaluate
from toy import boards
from utils.images import open_image
from utils.items import walk_vsp

gymnasium = pytest.importorskip("gymnasium")


def test_the_problems_are_the_published_ones_to_the_pixel(shared_data, tmp_path, capsys):
    assert boards.main(["--output", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"boards": 400}
    written, published = (
        [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (tmp_path, shared_data / "vsp"))
    assert written == published
    for row in written:
        mine, theirs = (np.asarray(open_image(folder / row["image_input"]))
                        for folder in (tmp_path, shared_data / "vsp"))
        assert np.array_equal(mine, theirs), row["image_input"]


def test_the_written_problems_become_items(tmp_path):
    boards.main(["--output", str(tmp_path)])
    output = tmp_path / "vsp.items.jsonl"
    assert evaluate.main(["--benchmark", "vsp", "--source", str(tmp_path / "test.jsonl"), "--prepare",
                          "--output", str(tmp_path / "vsp")]) == 0
    items = [json.loads(line) for line in output.read_text().splitlines()]
    assert Counter(len(item["answer"]["value"]) for item in items) == {3: 100, 4: 100, 5: 100, 6: 100}


@pytest.mark.parametrize("size", [2, 3, 6, 8])
def test_a_board_can_be_solved_and_is_drawn_cell_by_cell(size):
    rng = random.Random(size)
    for _ in range(30):
        board = boards.make_board(rng, size, rng.uniform(0, 0.6))
        counts = Counter(kind for row in board for kind in row)
        assert counts[1] == counts[2] == 1 and len(board) == size
        assert walk_vsp(board, shortest_path(board))
    picture = np.asarray(boards.draw_board(board))
    assert picture.shape == (64 * size, 64 * size, 3)
    for r, row in enumerate(board):
        for c, kind in enumerate(row):
            assert np.array_equal(picture[64 * r:64 * r + 64, 64 * c:64 * c + 64], boards.tiles()[kind])
