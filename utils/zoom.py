"""The zoom tool of DeepEyes: the model asks for a region in a tool call, is shown it as a new picture, and goes on.

All facts are those of Visual-Agent/DeepEyes, eval/eval_vstar.py (commit cc3ff4d6): the words, one tool, the first call of a
turn, a box in pixels of the stored picture (not of the resized one that the model sees), the region resized to multiples
of 28, and at most 11 turns. Different here: a call is read as JSON and never evaluated, a box is cut to the picture, a call
that cannot be followed and a turn without call or answer end the conversation (the script stops at the one and asks the
same again at the other). Nothing of this is a guess at an answer: the last turn is scored by the rules for any reply.
"""
import json
import re
from typing import NamedTuple

from utils.images import MAX_ASPECT

MAX_TURNS = 11  # while try_count <= 10
MAX_TOKENS = 10240  # a turn
TOOL = {"type": "function", "function": {
    "name": "image_zoom_in_tool",
    "description": "Zoom in on a specific region of an image by cropping it based on a bounding box (bbox) and an optional "
                   "object label.",
    "parameters": {"type": "object", "properties": {
        "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                    "description": "The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the "
                                   "top-left corner and (x2, y2) is the bottom-right corner."},
        "label": {"type": "string",
                  "description": "The name or label of the object in the specified bounding box (optional)."}},
        "required": ["bbox"]}}}  # not "bbox_2d": as it stands there
EXAMPLE = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}
TOOL_SYSTEM = f"""You are a helpful assistant.

# Tools
You may call one or more functions to assist with the user query.
You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps(TOOL, separators=(",", ":"))}
</tools>

# How to call a tool
Return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>

**Example**:{"  "}
<tool_call>{"  "}
{json.dumps(EXAMPLE)}{"  "}
</tool_call>"""
ASKED = ("\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
         "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> ")
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


class Turn(NamedTuple):
    """What follows from a reply: the box to show (left, top, right, bottom) in pixels, or None and why it ends there:
    answer, no_call or bad_call."""

    box: tuple[int, int, int, int] | None
    ended_by: str | None


def read_turn(reply: str, size: tuple[int, int]) -> Turn:
    """Return what a reply asks for, of a picture of this size (width, height) in pixels."""
    if "</answer>" in reply:
        return Turn(None, "answer")
    match = CALL.search(reply)
    if match is None:
        return Turn(None, "no_call")
    box = read_box(match[1], size)
    return Turn(box, None if box else "bad_call")


def read_box(call: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return the box of a call, cut to the picture, or None for a call that cannot be followed."""
    try:
        value = json.loads(call)
        numbers = [float(number) for number in value["arguments"]["bbox_2d"]]
        left, top, right, bottom = (int(min(max(number, 0), limit)) for number, limit in zip(numbers, (*size, *size)))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    width, height = right - left, bottom - top
    followed = value.get("name") == TOOL["function"]["name"] and len(numbers) == 4 and width > 0 and height > 0
    return (left, top, right, bottom) if followed and max(width, height) <= MAX_ASPECT * min(width, height) else None
