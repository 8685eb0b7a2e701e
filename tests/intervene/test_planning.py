"""Planning items: the edits of a board and its picture, and models whose moves are known."""
import json
import random
from pathlib import Path

import pytest
from PIL import Image
from samples import shortest_path

import intervene
from utils.images import ImageError, open_image
from utils.intervene.edits import edited_boards, open_others, planning_item, swap_cells
from utils.intervene.prompts import read_path
from utils.items import walk_vsp
from utils.jsonl import DataError, write_rows

pytestmark = pytest.mark.usefixtures("plain_figures")
KINDS = {0: "white", 1: "red", 2: "green", -1: "blue"}


def random_board(rng, size):
    kinds = [1, 2] + [rng.choice((0, 0, 0, -1)) for _ in range(size * size - 2)]
    rng.shuffle(kinds)
    return [kinds[n:n + size] for n in range(0, size * size, size)]


def item_of(board, **more):
    return {"id": "v/1", "question": "Where to?", "options": [], "metric": "vsp_path",
            "images": [{"path": "a.png"}], "answer": {"type": "path_map", "value": board}, **more}


def paint(board, side):
    """Return a picture of a board in flat colours, `side` pixels a cell."""
    image = Image.new("RGB", (side * len(board),) * 2)
    for r, line in enumerate(board):
        for c, kind in enumerate(line):
            image.paste(KINDS[kind], (c * side, r * side, (c + 1) * side, (r + 1) * side))
    return image


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_makes_the_shortest_path_fail_and_leaves_another(seed):
    rng = random.Random(seed)
    board = random_board(rng, rng.randint(2, 6))
    for edited, swap in edited_boards(board):
        changed = [[r, c] for r, line in enumerate(board) for c, kind in enumerate(line)
                   if edited[r][c] != kind]
        assert sorted(changed) == sorted(swap)
        assert not walk_vsp(edited, shortest_path(board)) and walk_vsp(edited, shortest_path(edited))


def test_a_board_without_an_edit_is_refused():
    """A board that cannot be solved, and one whose only safe cells are start and goal."""
    for board in ([[1, -1], [-1, 2]], [[1, 2], [-1, -1]]):
        with pytest.raises(DataError, match="expected such a board, or a counterfactual"):
            planning_item(item_of(board), 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_edited_picture_shows_the_edited_board(seed):
    rng = random.Random(seed)
    board = random_board(rng, rng.randint(3, 6))
    if not edited_boards(board):
        with pytest.raises(DataError, match="item 'v/1': no two cells"):
            planning_item(item_of(board), 0)
        return
    item = planning_item(item_of(board), 0)
    edit = {**item, **item["counterfactual"]}
    (picture,) = swap_cells([paint(board, 7)], edit)
    assert picture.tobytes() == paint(edit["boards"]["B"], 7).tobytes()
    assert [letter for letter, _ in item["options"]] == ["A", "B"]
    assert all(walk_vsp(item["boards"][letter], path.replace(",", "")) for letter, path in item["options"])


def test_every_real_problem_has_an_edit_whose_picture_keeps_the_tiles(shared_data):
    rows = [json.loads(line) for line in (shared_data / "vsp" / "test.jsonl").read_text().splitlines()]
    kinds = set()
    for n, row in enumerate(rows):
        item = planning_item(item_of(row["map_desc"]), n)
        (r, c), (row_, column) = item["counterfactual"]["swap"]
        kinds.add(row["map_desc"][r][c])
        if n % 20:
            continue
        image = open_image(shared_data / "vsp" / row["image_input"])
        (picture,) = swap_cells([image], {**item, **item["counterfactual"]})
        for place, other in (((r, c), (row_, column)), ((row_, column), (r, c))):
            boxes = [(64 * y, 64 * x, 64 * y + 64, 64 * x + 64) for x, y in (place, other)]
            assert picture.crop(boxes[0]).tobytes() == image.crop(boxes[1]).tobytes()
    assert kinds == {2, -1}  # goals that moved, holes on the path


def test_moves_are_read_by_walking_both_boards():
    item = planning_item(item_of([[1, 0, 2], [0, 0, 0]] + [[0, 0, 0]],
                                 counterfactual={"images": [{"path": "b.png"}], "answer": {
                                     "type": "path_map", "value": [[1, 0, 0], [0, 0, 0], [2, 0, 0]]}}), 0)
    for words, expected in (("\\boxed{R,R}", ("A", True)), ("\\boxed{D,D}", ("B", False)),
                            ("\\boxed{D,U,R,R}", ("A", True)), ("\\boxed{U}", ("neither", False)),
                            ("<think>\\boxed{R,R}</think> no", (None, False)), ("R,R", (None, False))):
        letter, rule, right = read_path(item, words)
        assert (letter, right) == expected and rule == ("no_box" if letter is None else "boxed_path")


@pytest.fixture
def items(tmp_path):
    """Squares of one colour; the model's words "red" and "blue" hold the moves RD and LU."""
    boards = {"red": [[1, 0], [-1, 2]], "blue": [[2, -1], [0, 1]]}  # solved by R, D and by L, U
    colors = {"red": (230, 30, 30), "blue": (30, 60, 230)}
    for name, color in colors.items():
        Image.new("RGB", (56, 56), color).save(tmp_path / f"{name}.png")
    rows = [{**item_of(boards[name], images=[{"path": f"{name}.png"}]), "id": f"v/{n}",
             "question": "What color is the square?",
             "counterfactual": {"images": [{"path": f"{other}.png"}], "imaginations": [f"a square ({other})"],
                                "answer": {"type": "path_map", "value": boards[other]}}}
            for n, (name, other) in enumerate([("red", "blue"), ("blue", "red")] * 20)]
    write_rows(tmp_path / "items.jsonl", rows)
    return tmp_path / "items.jsonl"


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("kind", ["text", "latent"])
def test_moves_follow_the_imagination_of_a_model_that_follows(kind, follows, items, imagining_model, tmp_path,
                                                              capsys):
    model, output = imagining_model(kind, follows), tmp_path / "out.jsonl"
    more = ["--latent", "mirage"] if kind == "latent" else []
    names = ["swap_counterfactual", "x_counterfactual", "identity" if kind == "latent" else "directed"]
    assert intervene.main(["--items", str(items), "--model", str(model), "--output", str(output),
                           "--max_new_tokens", "40", "--min_emitters", "8", "--calibration", "8", *more,
                           "--conditions", *names]) == 0
    published = "| near_zero | - | 65.0 | 35.5 | 51.50 |"
    assert (published in capsys.readouterr().err) == (kind == "latent")
    entry = json.loads(Path(f"{output}.metrics.json").read_text())["conditions"]["swap_counterfactual"]
    assert (entry["follow"]["share"], entry["follow_clean"]["share"]) == (follows, 0)
    found = {}
    for record in map(json.loads, output.read_text().splitlines()):
        found.setdefault(record["id"], {})[record["condition"]] = record
    assert len(found) == (32 if kind == "latent" else 40)
    for records in found.values():
        assert records["clean"]["correct"] and records["clean"]["pred"] == "A"
        assert records["x_counterfactual"]["pred"] == "B"
        assert records["swap_counterfactual"]["pred"] == ("B" if follows else "A")
        assert records["swap_counterfactual"]["correct"] is not follows
        assert records["swap_counterfactual"]["target"] == "B"
        if kind == "text":
            assert records["directed"]["pred"] == ("B" if follows else "A")


def test_the_helper_is_its_own_image_or_the_region_enlarged(tmp_path, picture):
    picture("helper.png", (56, 56), "blue")
    plain, board = item_of([[1, 2], [0, 0]]), Image.new("RGB", (300, 200), "white")
    board.paste((255, 0, 0), (100, 50, 120, 90))
    assert open_others(plain, [board], tmp_path) == {}
    regional = plain | {"region": [100, 50, 120, 90]}
    (asked, (crop, second)), = open_others(regional, [board] * 2, tmp_path).values()
    assert asked is regional and second is crop
    assert crop.getcolors() == [(crop.width * crop.height, (255, 0, 0))]
    assert crop.width * crop.height >= 224 * 224 and crop.height / crop.width == pytest.approx(2, rel=0.1)
    named = open_others(regional | {"helper": {"path": "helper.png"}}, [board], tmp_path)
    assert [image.size for image in named["helper"][1]] == [(56, 56)]
    with pytest.raises(ImageError, match="no such image"):
        open_others(plain | {"helper": {"path": "none.png"}}, [board], tmp_path)
