"""Prompts and donors of a batch; the parts of a reply that text conditions cut; what an intervention leaves
the model free to undo."""
import math
import random
import re
from collections import Counter

import pytest
import torch
from decoding import MIRAGE, load_with
from imagining import COLORS, make_picture, make_text_checkpoint, write_items
from PIL import Image

from utils import qwen as Q
from utils.images import MASK_GREY
from utils.intervene.latent_batch import LatentBatch
from utils.intervene.latent_case import Calibration, Case, imagines_again
from utils.intervene.latent_conditions import CONDITIONS, DO_X, find_condition
from utils.intervene.prompts import Settings, donor_fields, other_prompt, pick_donor
from utils.intervene.text_batch import TextBatch
from utils.intervene.text_conditions import ABSENT, TEXT_CONDITIONS
from utils.latent_families import Generation, Segment
from utils.rows import CLOSE, OPEN, find_spans


def item(n, question="q", image="a", gold="A", group=None):
    return {"id": str(n), "group_id": group or str(n), "question": question,
            "options": [["A", "x"], ["B", "y"]], "images": [{"path": image}],
            "answer": {"type": "letter", "value": gold}}


ITEMS = [item(0), item(1, gold="A", group="0"), item(2), item(3, image="b", gold="B"),
         item(4, question="other"), item(5, question="other", image="c", gold="B")]
PICTURES = [[Image.new("RGB", (28 + n, 56), (n, 0, 0))] for n in range(6)]


def test_donors_are_of_another_group_and_another_gold_where_there_is_one():
    assert pick_donor("random", 0, ITEMS, [0, 1, 2, 3]) == 3  # 1 is of its group, 2 has its gold
    assert pick_donor("random", 0, ITEMS, [0, 1, 2]) == 2 and pick_donor("random", 0, ITEMS, [0, 1]) is None
    everyone = list(range(6))
    assert pick_donor("question", 0, ITEMS, everyone) == 3 and pick_donor("image", 0, ITEMS, everyone) == 4
    assert all(pick_donor(kind, n, ITEMS, everyone) != n for kind in ("random", "question", "image")
               for n in everyone)
    # in words, not letters
    turned = [{**member, "options": [["A", "y"], ["B", "x"]]} for member in ITEMS[2:4]]
    assert pick_donor("random", 0, [ITEMS[0], *turned], [1, 2]) == 1
    assert donor_fields(turned[0], ITEMS[0]) == {"item": "2", "gold": "A", "option": "B"}
    other = {**ITEMS[0], "options": [["A", "v"], ["B", "w"]]}
    assert donor_fields(ITEMS[0], other)["option"] is None and donor_fields(None, other) is None
    alone = [{**member, "group_id": None} for member in ITEMS]  # an item without a group is its own
    assert pick_donor("random", 0, alone, [0, 1, 2, 3]) == 3 and pick_donor("random", 0, alone, [0, 1]) == 1


def test_other_prompts_keep_what_they_should():
    edits = [{}] * 5 + [{"counterfactual": ({**ITEMS[5], "id": "5#edit"}, PICTURES[0])}]
    own, images, holds = other_prompt("blank", 0, ITEMS, PICTURES, edits)
    assert own is ITEMS[0] and images[0].size == PICTURES[0][0].size
    assert images[0].getcolors() == [(28 * 56, MASK_GREY)]
    assert other_prompt("counterfactual", 0, ITEMS, PICTURES, edits) is None
    assert other_prompt("counterfactual", 5, ITEMS, PICTURES, edits)[0]["id"] == "5#edit"
    assert other_prompt("other_image", 0, ITEMS, PICTURES, edits) == (ITEMS[0], PICTURES[3], False)
    asked, images, holds = other_prompt("other_question", 0, ITEMS, PICTURES, edits)
    assert asked["id"] == "4" and images is PICTURES[0] and holds  # about the same image
    asked, images, holds = other_prompt("other_question", 3, ITEMS, PICTURES, edits)
    assert asked == {**ITEMS[4], "images": ITEMS[3]["images"]} and images is PICTURES[3] and not holds
    more = [PICTURES[0] * 2, *PICTURES[1:]]  # a question may refer to as many images as it has
    assert other_prompt("other_question", 0, ITEMS, more, edits) is None


def test_a_reply_is_cut_before_its_first_imagination_and_its_columns_are_those_of_the_words(tiny_checkpoint):
    qwen, settings = load_with(tiny_checkpoint, MIRAGE), Settings(None, "", 4, " \\boxed{", "letter", 0, 8)
    batch = TextBatch(qwen, settings, ITEMS[:1], PICTURES[:1], [{}])
    reply = "I look closer. <think_image>a blue square</think_image> It is blue."
    ids = qwen.tokenizer(reply, add_special_tokens=False).input_ids
    batch.clean[0].ids, batch.texts[0] = ids, reply
    batch.spans[0] = [(reply.index("a blue"), reply.index("</think_image>"))]
    head = batch.head(0)  # a token may reach over the mark
    assert head == ids[:len(head)] and "<think_image" in batch.text_of(head)
    assert len(batch.text_of(head)) <= batch.spans[0][0][0] < len(batch.text_of(ids[:len(head) + 1]))
    words = batch.text_of([ids[column - 10] for column in batch.columns(10, 0, reply)])
    assert "a blue square" in words and words.strip("<>") == "a blue square"


# ---- imagining again
BY_DONOR = {*(f"swap_{kind}" for kind in ("random", "question", "image", "counterfactual", "blank")),
            *(f"slot_swap_{kind}" for kind in ("random", "counterfactual", "blank")), "slot_swap_at:0-3/0",
            "oracle", "slot_oracle"}
BY_CLEAN = {"replay", "first_repeat", "permute", "blank_x", "slot_blank_x", "keep_first:2"}
OWN = {*DO_X, "blank", "strict"}  # the record of `strict` says never: what is imagined again has no image
FORBIDDEN = {"markers_only", "no_segment", "keep_first:0"}
NEVER = {"identity", "tau", "tau_mean", "tau_first", "mean_t", "near_zero", "add_noise", "norm_noise",
         "moment_noise", "mix", "dummy_pad", "slot_mean_t", "cut_latent", "cut_image_after", "cut_both",
         "keep_one", "drop_one", "strict_fed"}


def run_of(*sizes):
    """A run with segments of these sizes."""
    n = sum(sizes)
    return Generation(segments=[Segment(10 * k, size, "limit") for k, size in enumerate(sizes)],
                      fed=torch.ones(n, 8), slots=[torch.ones(2, 8)] * n, ids=[0] * 20)


def test_latents_that_an_intervention_does_not_reach_undo_it():
    """Every condition of the catalogue, on a clean run of one segment and donors of two."""
    everything = BY_DONOR | BY_CLEAN | OWN | FORBIDDEN | NEVER
    assert {name.partition(":")[0] for name in everything} == set(CONDITIONS)
    donor, known = run_of(4, 2), Calibration.from_runs([run_of(4)])
    case = Case(ITEMS[0], run_of(4), MIRAGE, torch.ones(8), 1, 0, known, donors={
        kind: donor for kind in ("random", "question", "image", "counterfactual", "blank", "helper",
                                 "features")})

    def undone(name):
        condition, number = find_condition(name)
        made = condition.make(case, number)
        return [imagines_again(run_of(*sizes), made) for sizes in ((4, ), (4, 2), (4, 3), (4, 2, 1))]

    for names, expected in ((BY_DONOR, [False, False, True, True]), (BY_CLEAN, [False, True, True, True]),
                            (OWN, [None] * 4), (FORBIDDEN | NEVER, [False] * 4)):
        for name in names:
            assert undone(name) == expected, name
    assert undone("slot_swap_at:0/0") == [False, False, False, True]  # other positions are left as they are


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_model_that_likes_latents_is_kept_from_them_where_they_must_be_absent(tiny_checkpoint, temperature):
    qwen = load_with(tiny_checkpoint, MIRAGE)
    settings = Settings(None, "", 30, " \\boxed{", "letter", 0, 64, temperature)
    batch = LatentBatch(qwen, MIRAGE, None, settings, ITEMS[:3], PICTURES[:3], [{}] * 3)
    for records in batch.records(["identity", *FORBIDDEN, "keep_first:1"]):
        clean = records["clean"]
        assert clean["again"] is clean["n_forbidden"] is records["identity"]["n_forbidden"] is None
        assert records["keep_first:1"]["again"] and not records["identity"]["again"]  # twice as many fit in
        for name in FORBIDDEN:
            record = records[name]
            assert record["n_fed"] == 0 and record["n_forbidden"] > 0 and record["again"] is False, name
            assert len(record["segments"]) == (0 if name == "no_segment" else len(clean["segments"]))
        assert records["keep_first:0"]["ids"] == records["markers_only"]["ids"]


def test_an_opening_mark_is_not_spelled_whatever_its_tokens(tiny_checkpoint):
    """The id that completes "<think" on the way to the mark is forbidden, in pieces of all lengths, and no
    other."""
    qwen, settings = load_with(tiny_checkpoint, MIRAGE), Settings(None, "", 4, " \\boxed{", "letter", 0, 8)
    batch, rng = TextBatch(qwen, settings, ITEMS[:1], PICTURES[:1], [{}]), random.Random(0)
    words = ("a", " <", "<", "<t", "think", "hink_im", "<think", "<think>", "_image>", "age>", OPEN, CLOSE,
             "<|im_end|>")  # the last is no word
    pieces = [qwen.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    said, n_forbidden = [], 0
    for before in ("", "I look. " + OPEN, "x <th", "x <think", OPEN + CLOSE) * 50:
        forbid, row = batch.no_more_spans(before), Generation()
        for token in (token for _ in range(12) for token in rng.choice(pieces)):
            known, text = (before + batch.text_of(ids) for ids in (row.ids, [*row.ids, token]))
            found = re.finditer("<think_image>|<think(_(i(m(a(ge?)?)?)?)?)?$", text)
            assert forbid(row, token) == any(match.end() > len(known) for match in found), text
            if forbid(row, token):
                n_forbidden += 1
            else:
                row.ids.append(token)
        said.append(batch.text_of(row.ids))
    assert n_forbidden > 100 and not any(OPEN in text for text in said)
    assert all(any(piece in text for text in said) for piece in ("<th", "<t", " <", CLOSE))


@pytest.fixture(scope="module")
def reopening(tmp_path_factory):
    """A text model that imagines again where no colour was imagined, and eight items with their images."""
    qwen = Q.load(str(make_text_checkpoint(tmp_path_factory.mktemp("again") / "model", True, again=True)),
                  device="cpu", dtype="float32")
    return qwen, *pictured(tmp_path_factory.mktemp("items"))


def pictured(folder):
    _, items = write_items(folder, 8)
    return items, [[make_picture(gold_of(item), i % 2)] for i, item in enumerate(items)]


def gold_of(item):
    return dict(item["options"])[item["answer"]["value"]]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_text_model_is_kept_from_imagining_where_nothing_may_be_imagined(reopening, temperature):
    """Under every condition the record tells a mark behind the beginning that was fed back."""
    qwen, items, images = reopening
    settings = Settings(None, "", 40, None, "text", 0, 64, temperature)
    batch = TextBatch(qwen, settings, items, images, [{}] * 8)
    names, seen = [name for name in TEXT_CONDITIONS if name != "directed_llm"], Counter()
    for records in batch.records(names):
        assert records["clean"]["again"] is records["clean"]["n_forbidden"] is None
        for name in names:
            record, condition = records[name], TEXT_CONDITIONS[name]
            if "reason" in record:
                continue
            said = batch.text_of(record["ids"])
            marked = any(mark in said.split("\\boxed")[0] for mark in (OPEN, CLOSE))
            never = {"own": None, "cannot": False}
            assert record["again"] == never.get(condition.again, marked), name
            assert (record["n_forbidden"] is not None) == (name in ABSENT)
            if name in ABSENT:
                assert OPEN not in said, name
                seen[f"forbidden {name}"] += record["n_forbidden"] > 0
            seen[f"again {name}"] += bool(record["again"])
    if not temperature:
        assert {name for name in seen if seen[name] == 8} == {
            *(f"forbidden {name}" for name in ABSENT if name != "bare"), "again bare",  # filled in
            *(f"again truncate_{percent}" for percent in (25, 50, 75)), "again constant"}
    assert all(seen[f"forbidden {name}"] for name in ABSENT if name != "bare")


def test_a_reply_that_begins_with_its_imagination_is_continued_from_nothing(reopening):
    qwen, items, images = reopening
    settings = Settings(None, "", 40, " It is \\boxed{", "text", 0, 64)
    batch = TextBatch(qwen, settings, items[:2], images[:2], [{}] * 2)
    for place, text in enumerate(batch.texts):
        batch.texts[place] = text.removeprefix("I look. ")
        batch.spans[place] = find_spans(batch.texts[place])
    for record in (records["no_span"] for records in batch.records(["no_span"])):
        assert record["edit"]["after"] == [""] and record["n_forbidden"] == 1 and not record["emitted"]
        assert record["r0"]["pred"] and OPEN not in record["text"] and record["text"].startswith("I look.")


# ---- do(X)
@pytest.mark.parametrize("kind", ["text", "latent"])
def test_an_outcome_belongs_to_the_item_that_was_asked(imagining_model, tmp_path, kind):
    """The models say the colour shown, whatever is asked: it counts as what the options asked make of it."""
    (first, second, third, fourth, *_), images = pictured(tmp_path)

    def asking(item, name, question, texts, gold):
        options = [list(pair) for pair in zip("ABCD", texts)]
        return {**item, "id": name, "question": question, "options": options,
                "answer": {"type": "letter", "value": "ABCD"[texts.index(gold)]}}

    turned = [text for _, text in first["options"]][::-1]
    twin = asking(first, "twin", "Which is it?", turned, gold_of(first))
    odd = asking(fourth, "odd", "How large?", ["tiny", "small", "large", "huge"], "large")
    items = [first, second, twin, third, odd, fourth]
    images = [images[n] for n in (0, 1, 0, 2, 3, 3)]
    edits = [(asking(first, "#0", "Which is it?", turned, "red"), [make_picture("red", 0)]),
             (asking(second, "#1", second["question"], turned, "green"), [make_picture("green", 1)])]
    edits = [{"counterfactual": edit} for edit in edits] + [{}] * 4
    settings = Settings(None, "", 40, " It is \\boxed{" if kind == "latent" else None, "text", 0, 64)
    qwen = Q.load(str(imagining_model(kind, True)), device="cpu", dtype="float32")
    batch = (TextBatch(qwen, settings, items, images, edits) if kind == "text"
             else LatentBatch(qwen, MIRAGE, None, settings, items, images, edits))
    shown_colors = {tuple(value): name for name, value in COLORS.items()} | {(127, 127, 127): "gray"}
    found = Counter()
    for place, records in enumerate(batch.records([*DO_X, "blank"])):
        assert "asked" not in records["clean"] and "asked" not in records["blank"]
        before = dict(items[place]["options"]).get(records["clean"]["pred"])
        for name in DO_X:
            record = records[name]
            if "reason" in record:
                found[name, record["reason"]] += 1
                continue
            asked, shown, holds = other_prompt(DO_X[name], place, items, images, edits)
            words, gold, own = dict(asked["options"]), asked["answer"]["value"], items[place]
            color = shown_colors[shown[0].getpixel((0, 0))]
            pred = next((letter for letter, text in words.items() if text == color), None)
            assert record["pred"] == pred and record["correct"] == (pred == gold), (name, place)
            assert record["asked"] == {"item": asked["id"], "gold": gold, "gold_holds": holds}
            assert record["same_answer"] == (before == color if before and pred else None)
            if kind == "latent":
                assert set(record["r0"]["pi"]) == set(words) and record["r0"]["pred"] == (pred or "A")
                assert record["r0"]["nll"] == pytest.approx(-math.log(record["r0"]["pi"][gold]))
                assert (record["r1"] is None) == (words != dict(own["options"]))
            else:
                assert record["target"] is record["r0"] is record["r1"] is None
            found[name, holds, record["same_answer"], record["correct"]] += 1
    assert {key[1:]: n for key, n in found.items() if key[0] == "x_question"} == {
        (True, True, True): 2, (True, None, True): 1, (True, None, False): 1,  # of the same images
        (False, True, False): 1, (False, None, False): 1}
    assert found["x_counterfactual", True, False, True] == 2
    assert not any(holds for name, holds, *_ in found if name == "x_image")
