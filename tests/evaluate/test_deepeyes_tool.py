"""The zoom tool: what a reply asks for, and the region that is shown.    pytest tests/test_zoom.py"""
import base64
import hashlib
import io
import json

import pytest
from PIL import Image

from utils.evaluate.prompts import EXAMPLE, TOOL_SYSTEM, read_turn
from utils.images import ImageError, Picture, open_picture, picture_url


def call(box, name="image_zoom_in_tool"):
    return f'<think>Closer.</think><tool_call>{json.dumps({"name": name, "arguments": {"bbox_2d": box}})}</tool_call>'


@pytest.mark.parametrize("reply, box, ended_by", [
    (call([10, 20, 60, 70]), (10, 20, 60, 70), None), (call([10.9, 20, 60, 70.2]), (10, 20, 60, 70), None),
    (call([-5, 20, 600, 70]), (0, 20, 100, 70), None),  # cut to the picture
    (call([10, 20, 60, 70]).replace("</tool_call>", ""), (10, 20, 60, 70), None),
    (call([0, 0, 9, 9]) + call([50, 50, 60, 60]), (0, 0, 9, 9), None),  # the first call
    (call([60, 20, 10, 70]), None, "bad_call"), (call([10, 20, 10, 70]), None, "bad_call"),
    (call([10, 20, 60]), None, "bad_call"),
    (call([10, 20, 60, 70, 80]), None, "bad_call"), (call([200, 20, 300, 70]), None, "bad_call"),
    (call(["a", 20, 60, 70]), None, "bad_call"), (call([float("nan"), 20, 60, 70]), None, "bad_call"),
    (call([10, 20, 60, 70], "rotate"), None, "bad_call"), ("<tool_call>__import__('os')</tool_call>", None,
                                                           "bad_call"),
    ("<tool_call>[1]</tool_call>", None, "bad_call"), ("I see a boat.", None, "no_call"),
    ("<answer>A</answer>", None, "answer"),
    (call([10, 20, 60, 70]) + "<answer>A</answer>", None, "answer")])
def test_what_a_reply_asks_for(reply, box, ended_by):
    assert read_turn(reply, (100, 80)) == (box, ended_by)


def test_a_region_thinner_than_any_picture_is_refused():
    assert read_turn(call([0, 0, 1000, 4]), (1000, 80)).ended_by == "bad_call"
    assert read_turn(call([0, 0, 1000, 5]), (1000, 80)).box == (0, 0, 1000, 5)


def test_the_system_prompt_is_that_of_the_script():
    """The digest of the text of eval/eval_vstar.py, commit cc3ff4d6, of 1,166 characters."""
    assert TOOL_SYSTEM.count("\n") == 18 and json.dumps(EXAMPLE) in TOOL_SYSTEM
    assert hashlib.sha256(TOOL_SYSTEM.encode()).hexdigest(
        ) == "1fc5b8b5ebdc9b24d6a9281071222872c8542dd65a4a4be1e70d9760c3a7f99f"


def test_a_region_is_cut_out_and_enlarged_to_whole_tokens(tmp_path):
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    shown = open_picture(Picture(str(tmp_path / "a.png"), (110, 10, 190, 70)))
    # 80 x 60, in multiples of 28
    assert shown.size == (84, 56) and shown.getextrema() == ((0, 0), (0, 0), (255, 255))
    # four tokens at least
    assert open_picture(Picture(str(tmp_path / "a.png"), (0, 0, 8, 8))).size == (56, 56)
    assert open_picture(Picture(str(tmp_path / "a.png"))).size == (200, 100)
    Image.new("RGB", (999, 30)).save(tmp_path / "wide.png")
    with pytest.raises(ImageError, match="aspect"):
        open_picture(Picture(str(tmp_path / "wide.png"), (0, 0, 999, 1)))


def test_a_region_is_sent_without_loss_and_a_file_as_it_is(tmp_path):
    Image.effect_noise((90, 60), 80).convert("RGB").save(tmp_path / "a.png")
    region = Picture(str(tmp_path / "a.png"), (5, 5, 61, 61))
    sent = Image.open(io.BytesIO(base64.b64decode(picture_url(region, 28 * 28, 28).partition(",")[2])))
    assert sent.tobytes() == open_picture(region).tobytes() == Image.open(tmp_path / "a.png").crop(
        (5, 5, 61, 61)).tobytes()
    whole = picture_url(Picture(str(tmp_path / "a.png")), 12_845_056, 28)
    assert base64.b64decode(whole.partition(",")[2]) == (tmp_path / "a.png").read_bytes()
