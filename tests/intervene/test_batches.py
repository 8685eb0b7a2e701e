"""Prompts and donors of a batch, and the parts of a reply that text conditions cut."""
from decoding import MIRAGE, load_with
from PIL import Image

from utils.images import MASK_GREY
from utils.intervene.prompts import Settings, other_prompt, pick_donor
from utils.intervene.text_batch import Prefix, TextBatch


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
    alone = [{**member, "group_id": None} for member in ITEMS]  # an item without a group is its own
    assert pick_donor("random", 0, alone, [0, 1, 2, 3]) == 3 and pick_donor("random", 0, alone, [0, 1]) == 1


def test_other_prompts_keep_what_they_should():
    edits = [None] * 5 + [({**ITEMS[5], "id": "5#edit"}, PICTURES[0])]
    own, images = other_prompt("blank", 0, ITEMS, PICTURES, edits)
    assert own is ITEMS[0] and images[0].size == PICTURES[0][0].size
    assert images[0].getcolors() == [(28 * 56, MASK_GREY)]
    assert other_prompt("counterfactual", 0, ITEMS, PICTURES, edits) is None
    assert other_prompt("counterfactual", 5, ITEMS, PICTURES, edits)[0]["id"] == "5#edit"
    assert other_prompt("other_image", 0, ITEMS, PICTURES, edits) == (ITEMS[0], PICTURES[3])
    asked, images = other_prompt("other_question", 0, ITEMS, PICTURES, edits)
    assert asked["question"] == "other" and asked["id"] == "0" and images is PICTURES[0]
    assert other_prompt("masked", 0, ITEMS, PICTURES, edits) is None
    regions = [{**ITEMS[0], "region": [0, 0, 10, 10]}, *ITEMS[1:]]
    masked = other_prompt("masked", 0, regions, PICTURES, edits)[1][0]
    assert masked.getpixel((9, 9)) == MASK_GREY
    assert masked.getpixel((10, 10)) == (0, 0, 0) == PICTURES[0][0].getpixel((0, 0))


def test_a_reply_is_cut_before_its_first_imagination_and_its_columns_are_those_of_the_words(tiny_checkpoint):
    qwen, settings = load_with(tiny_checkpoint, MIRAGE), Settings(None, "", 4, " \\boxed{", "letter", 0, 8)
    batch = TextBatch(qwen, settings, ITEMS[:1], PICTURES[:1], [None])
    reply = "I look closer. <think_image>a blue square</think_image> It is blue."
    ids = qwen.tokenizer(reply, add_special_tokens=False).input_ids
    batch.clean[0].ids, batch.texts[0] = ids, reply
    batch.spans[0] = [(reply.index("a blue"), reply.index("</think_image>"))]
    head = batch.head(0)  # a token may reach over the mark
    assert head == ids[:len(head)] and "<think_image" in batch.text_of(head)
    assert len(batch.text_of(head)) <= batch.spans[0][0][0] < len(batch.text_of(ids[:len(head) + 1]))
    words = batch.text_of([ids[column - 10] for column in batch.columns(10, Prefix("sham", 0, reply))])
    assert "a blue square" in words and words.strip("<>") == "a blue square"
