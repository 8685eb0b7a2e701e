"""do(X): edited inputs, how far planted states are moved by them, and the variance split."""
import numpy as np
import pytest
from PIL import ImageChops

from probe import EDITS
from utils.probe.input_edits import edit_items, measure_edits, open_edited, other_box, variance_split
from utils.probe.states import States, StateWriter


def test_the_box_elsewhere_is_of_one_size_and_drawn_from_all_that_do_not_touch():
    rng = np.random.default_rng(0)
    for _ in range(40):
        width, height = rng.integers(3, 9, 2).tolist()
        left, top = (int(rng.integers(0, side - 1)) for side in (width, height))
        box = [left, top, int(rng.integers(left + 1, width + 1)), int(rng.integers(top + 1, height + 1))]
        w, h = box[2] - left, box[3] - top
        inside = np.zeros((height, width), dtype=bool)
        inside[top:box[3], left:box[2]] = True
        free = {(x, y) for x in range(width - w + 1) for y in range(height - h + 1)
                if not inside[y:y + h, x:x + w].any()}
        drawn = [other_box(box, (width, height), str(seed)) for seed in range(12 * len(free) + 1)]
        if not free:
            assert drawn == [None]
            continue
        assert all((b[2] - b[0], b[3] - b[1]) == (w, h) for b in drawn)
        assert {(b[0], b[1]) for b in drawn} <= free and len({(b[0], b[1]) for b in drawn}) >= 0.9 * len(free)


@pytest.fixture
def items(tmp_path, picture):
    made = [{"id": str(n), "question": f"What is {n}?", "options": [["A", "x"], ["B", "y"]], "metric": "mcq",
             "answer": {"type": "letter", "value": "A"}, "root": str(tmp_path),
             "images": [{"path": picture(f"{n}.png", (90, 60), color).name}]}
            for n, color in enumerate(("red", "blue", "green"))]
    made[0]["region"], made[1]["region"] = [10, 10, 40, 30], [5, 5, 85, 55]
    return made


def test_every_edit_changes_one_thing(items):
    shown = {name: edit_items(name, items, 0) for name in EDITS}
    plain = open_edited(items[0])[0]
    assert open_edited(shown["identity"][0])[0].tobytes() == plain.tobytes()
    assert open_edited(shown["image_swap"][0])[0].tobytes() == open_edited(items[1])[0].tobytes()
    assert shown["image_swap"][2]["images"] == items[0]["images"]
    assert shown["image_swap"][0]["question"] == "What is 0?"
    assert shown["question_swap"][0]["question"] == "What is 1?"
    assert shown["question_swap"][0]["images"] == items[0]["images"]
    boxes = {}
    for name in ("mask_relevant", "mask_irrelevant"):
        assert [item["from"] for item in shown[name]] == ["0"]  # 1's region leaves no space, 2 has none
        after = open_edited(shown[name][0])[0]
        boxes[name] = ImageChops.difference(plain, after).getbbox()
        assert after.crop(boxes[name]).getcolors() == [(600, (127, 127, 127))]
    assert boxes["mask_relevant"] == (10, 10, 40, 30)
    assert boxes["mask_irrelevant"] == tuple(shown["mask_irrelevant"][0]["edit"]["box"])
    dark = np.asarray(open_edited(shown["brightness"][0])[0], dtype=float)
    assert abs(dark - 0.8 * np.asarray(plain)).max() <= 0.5
    cropped = open_edited(shown["crop"][0])[0]
    assert cropped.size == plain.size and cropped.tobytes() != plain.tobytes()
    ids = [item["id"] for edited in shown.values() for item in edited]
    assert len(set(ids)) == len(ids)


def plant(folder, n=60, d=12, steps=3):
    """States whose imagination moves 0.5 (image) of what the text moves, 3 and 1 under the masks."""
    scale = {"identity": 0, "image_swap": 0.5, "mask_relevant": 3, "mask_irrelevant": 1}
    rng, sets = np.random.default_rng(1), {name: [] for name in scale}

    def arrow(lengths):
        x = rng.normal(size=(steps, d))
        return lengths[:, None] * x / np.linalg.norm(x, axis=1, keepdims=True)
    with StateWriter(folder) as writer:
        for i in range(n):
            z, h = 50 + rng.normal(size=(2, steps, d))
            writer.add(str(i), {"latent": z, "text": h}, emitted=True, segments=[steps], imagination=None)
            lengths = rng.uniform(1, 2, size=steps)
            for name, edited in sets.items():
                gone = i % 10 == 9 and name == "image_swap"
                moved = {"latent": z + arrow(scale[name] * lengths),
                         "text": h + arrow((name != "identity") * lengths)}
                writer.add(f"{i}#{name}", {} if gone else moved, emitted=not gone,
                           segments=[] if gone else [steps], imagination=None)
                edited.append({"id": f"{i}#{name}", "from": str(i)})
    return States(folder), sets


def test_planted_ratios_come_out_and_an_edit_of_nothing_moves_nothing(tmp_path):
    store, sets = plant(tmp_path)
    summary = measure_edits(store, sets, 0)
    swapped = summary["image_swap"]
    assert (swapped["asked"], swapped["emitted"], swapped["emitted_too"]) == (60, 60, 54)
    assert swapped["sensitivity"]["n"] == 54 and summary["identity"]["change"] == 0
    assert swapped["sensitivity"]["value"] == pytest.approx(0.5, abs=1e-4)
    assert summary["identity"]["sensitivity"] is None
    assert [summary["selectivity"][kind]["value"] for kind in ("imagination", "text")] == pytest.approx(
        [3, 1], abs=3e-4)
    # the mean change itself, computed apart
    keys = [str(i) for i in range(60) if i % 10 < 9]
    apart = np.mean([np.linalg.norm(store.load(k, "latent") - store.load(f"{k}#image_swap", "latent"), axis=1)
                     for k in keys])
    assert swapped["change"] == pytest.approx(apart, rel=1e-6)


def test_steps_that_one_of_both_lacks_are_left_out(tmp_path):
    with StateWriter(tmp_path) as writer:
        for i in range(3):
            fifth = np.arange(1, 6)[:, None] * np.ones((5, 4))  # moves by 2, 4, 6, ...; the text by 2
            writer.add(str(i), {"latent": fifth, "text": np.ones((2, 4))}, emitted=True, segments=[3, 2])
            writer.add(f"{i}#image_swap", {"latent": np.zeros((4, 4)), "text": np.zeros((4, 4))},
                       emitted=True, segments=[4])
    edited = [{"id": f"{i}#image_swap", "from": str(i)} for i in range(3)]
    found = measure_edits(States(tmp_path), {"image_swap": edited}, 0)["image_swap"]
    assert (found["change"], found["sensitivity"]["value"]) == (3, 1.5)  # of steps 1 and 2


def test_the_variance_split_recovers_planted_shares_whatever_is_common():
    rng = np.random.default_rng(11)
    images, questions, d = 30, 20, 400
    for shares in ((0.6, 0.3, 0.1), (0.1, 0.7, 0.2)):
        parts = (rng.normal(size=(images, 1, d)), rng.normal(size=(1, questions, d)),
                 rng.normal(size=(images, questions, d)))
        states = 50 + sum(np.sqrt(share) * part for share, part in zip(shares, parts))
        found = variance_split(states, 99)
        # of the last part, 1 / questions shows as images and 1 / images as questions
        assert found["image"] == pytest.approx(shares[0] + shares[2] / questions, abs=0.03)
        assert found["question"] == pytest.approx(shares[1] + shares[2] / images, abs=0.03)
        assert found["image_p"] == found["question_p"] == 0.01
        assert found["image"] + found["question"] + found["interaction"] == pytest.approx(1)


def test_without_an_effect_of_images_the_share_is_chance_and_the_p_uniform():
    rng, p, shares = np.random.default_rng(12), [], []
    for seed in range(100):
        states = rng.normal(size=(5, 4, 6)) + rng.normal(size=(1, 4, 6))
        p.append(variance_split(states, 59, seed)["image_p"])
        shares.append(variance_split(rng.normal(size=(5, 4, 6)), 1, seed)["image"])
    assert 0.02 <= np.mean(np.array(p) <= 0.1) <= 0.2 and abs(np.mean(p) - 0.5) < 0.1
    assert np.mean(shares) == pytest.approx(4 / 19, abs=0.015)
