"""How items are asked: prompts and pixel limits by protocol, the zoom tool of DeepEyes, and conversations.

Compare numbers of one protocol only: the same model moves by ten points on V* between two of them.

The zoom tool follows Visual-Agent/DeepEyes, eval/eval_vstar.py (commit cc3ff4d6): its prompts, the first
call of a turn, a box in pixels of the stored picture, the region resized to multiples of 28. Differences: a
call is parsed as JSON and never evaluated, a box is clipped to the picture, and a call that cannot be
followed or a turn without call or answer ends the conversation.
"""
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from utils.backends import TEXTLESS, Request, pictures_of
from utils.images import MAX_ASPECT, Box, ImageError, Picture, open_picture, read_bytes, resolve_image
from utils.items import question_text, user_content
from utils.jsonl import DataError, call_key

PATCH = 28 * 28  # pixels of a visual token of Qwen2.5-VL
NO_REPLY = {"raw_output": None, "clean_output": None, "finish_reason": None, "n_tokens": 0, "n_latent": 0,
            "image_grids": []}


# ---- VLMEvalKit
# vlmeval/dataset/utils/tablevqabench.py
VWTQ = ("You are asked to answer questions asked on an image.\n"
        "You should answer the question with a single word.\nExample: \n"
        "Question: what was the only year mr. wu competed in the olympic games?\nAnswer: 2004\n"
        "Question: which township in pope county, arkansas has the least amount of water area?\n"
        "Answer: Freeman\n"
        "If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato\n"
        "\n")
VTABFACT = ("You are asked to answer whether the statement is True or False based on given image\n"
            "You should only answer True or False.\nExample: \n"
            "Statement: the milwaukee buck win 6 game in the 2010 - 11 season\nAnswer: True\n"
            "Statement: only the top team score above the average of 8.8\nAnswer: False\n\n")
# vlmeval/dataset/image_mcq.py, MMERealWorld.build_prompt
REALWORLD = ("Select the best answer to the above multiple-choice question based on the image. Respond with "
             "only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:")


def vlmevalkit_words(item: dict) -> str:
    """Return VLMEvalKit's words, also with the options None, NA or N/A, which it loses by reading files with
    pandas. CV-Bench has prompts of its own."""
    question = item["question"]
    if (item.get("benchmark") or "").startswith("cv_bench/") and (item.get("raw") or {}).get("prompt"):
        return item["raw"]["prompt"]
    if item.get("benchmark") == "mme_realworld_lite":
        options = "".join(f"({letter}) {text}\n" for letter, text in item["options"])
        return f"{question} The choices are listed below:\n{options}{REALWORLD}"
    if item.get("metric") == "wtq":
        return f"{VWTQ}Question: {question}\nAnswer:"
    if item.get("metric") == "tabfact":
        return f"{VTABFACT}Statement: {question}\nAnswer:"
    return question_text(item)


# ---- DeepEyes
MAX_TURNS = 11  # while try_count <= 10
MAX_TOKENS = 10240  # per turn
TOOL = {"type": "function", "function": {
    "name": "image_zoom_in_tool",
    "description": "Zoom in on a specific region of an image by cropping it based on a bounding box (bbox) "
                   "and an optional object label.",
    "parameters": {"type": "object", "properties": {
        "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                    "description": "The bounding box of the region to zoom in, as [x1, y1, x2, y2], where "
                                   "(x1, y1) is the top-left corner and (x2, y2) is the bottom-right "
                                   "corner."},
        "label": {"type": "string",
                  "description": "The name or label of the object in the specified bounding box "
                                 "(optional)."}},
        "required": ["bbox"]}}}  # "bbox", not "bbox_2d", in the script too
EXAMPLE = {"name": "image_zoom_in_tool",
           "arguments": {"bbox_2d": [10, 20, 100, 200], "label": "the apple on the desk"}}
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
ASKED = ("\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  "
         "<think>...</think>  <tool_call>...</tool_call> (if tools needed)  <answer>...</answer> ")
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def deepeyes_words(item: dict) -> str:
    """Return DeepEyes' words (eval/eval_vstar.py, eval/eval_hrbench.py)."""
    options = "".join(f"\n{letter}. {text}" for letter, text in item["options"])
    return f"Question: {item['question']}\n" + (f"Options: {options}\n\n" if options else "") + ASKED


# ---- SwimBird: VLMEvalKit/vlmeval/config.py and vlmeval/vlm/swimbird/prompt.py (6aa2cc3)
SWIMBIRD_SYSTEM = """You are a multimodal reasoning assistant capable of thinking in textual and visual modes.


Use the following tags to switch your thinking mode:

1.  **Textual Mode**: `<reason>Your textual reasoning process</reason>`
    *   For logical analysis, planning, and verbal thought.

2.  **Visual Mode**: `<|latent_start|>Your visual reasoning process<|latent_end|>`
    *   For mental visualization, imagination and simulation.


**Output Rules**:
*   Depending on the problem, you can use: textual reasoning only, visual reasoning only, or a mix of both \
(alternating multiple times as needed).
*   After all thinking is complete, place the final answer inside `<answer>Your Final Answer</answer>`.
"""
SELECT = "Please select the correct answer from the options above. \n"  # which it leaves out


def swimbird_ask(item: dict) -> str:
    """Return what SwimBird adds to a question in English."""
    name = item.get("benchmark") or ""
    if item.get("metric", "mcq") != "mcq":
        return "\nPlease try to answer the question with short words or phrases if possible."
    if name.startswith("blink/"):
        return "Answer with the option's letter from the given choices."
    kind, may = ("textual", "") if name == "vstar" else ("verbal", " (if needed)")
    return (f"{'Enclose' if name == 'mmstar' else 'Think step by step, enclose'} your {kind} thought in "
            f"<reason>...</reason>{may} and sketch your visual thought inside "
            f"<|latent_start|>...<|latent_end|>{may}. Then answer with the option's letter from the given "
            "choices, enclosed in <answer>...</answer> directly.")


def read_turn(reply: str, size: tuple[int, int]) -> tuple[Box | None, str | None]:
    """Return the box that a reply about a picture of this (width, height) asks for, or why the conversation
    ends."""
    if "</answer>" in reply:
        return None, "answer"
    if (match := CALL.search(reply)) is None:
        return None, "no_call"
    box = read_box(match[1], size)
    return box, None if box else "bad_call"


def read_box(call: str, size: tuple[int, int]) -> Box | None:
    """Return the box of a call, clipped to the picture, if it can be followed."""
    try:
        value = json.loads(call)
        numbers = [float(number) for number in value["arguments"]["bbox_2d"]]
        left, top, right, bottom = (int(min(max(number, 0), limit))
                                    for number, limit in zip(numbers, (*size, *size)))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    if value.get("name") != TOOL["function"]["name"] or len(numbers) != 4:
        return None
    shorter, longer = sorted((right - left, bottom - top))
    return (left, top, right, bottom) if shorter > 0 and longer <= MAX_ASPECT * shorter else None


# ---- protocols
@dataclass(frozen=True)
class Protocol:
    """`system`: None is the chat template's. `min_pixels`, `max_pixels`: the area to which a picture is
    enlarged or shrunk; None is the checkpoint's. Pictures are the stored bytes: VLMEvalKit stores those of
    files above 1 GB as JPEG of quality 75 again (vlmeval/smp/file.py, localize_df), lmms-eval all as JPEG of
    quality 85 (lmms_eval/models/simple/qwen2_5_vl.py)."""

    system: str | None
    words: Callable[[dict], str]
    min_pixels: int | None
    max_pixels: int | None
    suffix: str = ""
    marked: Callable[[dict], str] = lambda item: ""  # words after these, whose control tokens stay


PROTOCOLS = {
    # VLMEvalKit vlmeval/config.py, Qwen2.5-VL-7B-Instruct: 1280 to 16384 tokens, use_custom_prompt=False
    "vlmevalkit": Protocol(None, vlmevalkit_words, 1280 * PATCH, 16384 * PATCH),
    # NOVAglow646/Monet README.md, "Note that": VLMEvalKit with this system prompt; no pixel limits are named
    "monet": Protocol("You are a helpful multimodal assistant. You are required to answer the question based "
                      "on the image provided. Put your final answer in \\boxed{}.",
                      vlmevalkit_words, 1280 * PATCH, 16384 * PATCH),
    "deepeyes": Protocol(TOOL_SYSTEM, deepeyes_words, 4 * PATCH, 16384 * PATCH),
    "swimbird": Protocol(SWIMBIRD_SYSTEM, lambda item: question_text(item).removesuffix(SELECT), 1280 * PATCH,
                         16384 * PATCH, marked=swimbird_ask),
    "plain": Protocol(None, vlmevalkit_words, None, None)}  # everything else the checkpoint's own


def user_text(item: dict, protocol: Protocol) -> str:
    return protocol.words(item) + protocol.suffix


# ---- a conversation
class Conversation:
    """An item and its `messages`: (role, text) or (role, parts), each part a text or a Picture.

    `sample` and `seed` tell conversations about one item apart. `ended_by` is None while a turn is due, else
    reply, error, or how the tool's conversation ended. `prompt` and `key` (a hash of words, pictures and
    regions) are the next turn's.
    """

    def __init__(self, item: dict, protocol: Protocol, root: str, method: str, hashes: dict[str, str],
                 sample: int = 0, seed: int = 0):
        self.item, self.method, self.sample = item, method, sample
        self.draw = {"sample": sample, "seed": seed} if sample or seed else {}
        self.hashes = [image_hash(root, image["path"], hashes) for image in item["images"]]
        self.fault = next((digest.removeprefix("error: ") for digest in self.hashes
                           if digest.startswith("error: ")), None)
        pictures = iter([] if self.fault else [Picture(str(resolve_image(root, image["path"])))
                                               for image in item["images"]])
        try:
            content = user_content(user_text(item, protocol), len(item["images"]))
            content += [text] if (text := protocol.marked(item)) else []
        except DataError as error:
            raise DataError(f"item {item['id']!r}: {error}") from error
        parts = tuple(next(pictures, None) if part is None else part for part in content)
        self.opening = ((("system", protocol.system),) if protocol.system else ()) + (("user", parts),)
        self.prompt = self.key = self.first_prompt = None
        self.reset()

    def reset(self) -> None:
        self.messages, self.turns, self.boxes, self.ended_by = self.opening, [], [], None

    def ask(self, system: object) -> str:
        """Settle and return the next turn's key."""
        self.prompt = system.render(self.messages)
        self.first_prompt = self.first_prompt or self.prompt
        shown = {"images": self.hashes} | ({"boxes": self.boxes} if self.boxes else {})
        self.key = call_key(id=self.item["id"], prompt=self.prompt, **shown, **self.draw)
        return self.key

    def request(self, max_new_tokens: int) -> Request:
        return Request(self.key, None, "", (), max_new_tokens, messages=self.messages)

    def advance(self, record: dict) -> None:
        """Take a turn's record; open the next turn if it asks for one."""
        self.turns.append(record)
        if "error" in record:
            self.ended_by = "error"
        elif self.method != "tool":
            self.ended_by = "reply"
        else:
            shown = pictures_of(self.messages)[0]
            box, ended_by = read_turn(record["clean_output"], open_picture(shown).size)
            self.ended_by = ended_by or ("turns" if len(self.turns) == MAX_TURNS else None)
            if self.ended_by is None:
                self.boxes.append(list(box))
                self.messages += (("assistant", record["clean_output"]), ("user", (
                    "<tool_response>", Picture(shown.path, box), ASKED, "</tool_response>")))

    def result(self) -> dict:
        """Return the last turn's fields of a result, with the tokens of all turns."""
        shown = (*NO_REPLY, *TEXTLESS, "error")
        last = {name: value for name, value in self.turns[-1].items() if name in shown}
        sums = {name: sum(turn.get(name, 0) for turn in self.turns) for name in ("n_tokens", "n_latent")}
        result = {"prompt": self.first_prompt, "prompt_sha": call_key(prompt=self.first_prompt)[:16],
                  **NO_REPLY, **last, **sums}
        if self.method == "tool":
            result |= {"ended_by": self.ended_by, "turns": [
                {"raw_output": turn.get("raw_output"), "box": box, "n_tokens": turn.get("n_tokens", 0)}
                for turn, box in zip(self.turns, [*self.boxes, None])]}
        return result

    def seconds(self, name: str) -> float:
        """Return the sum over the turns; servers report no "prefill_seconds"."""
        return sum(turn.get(name, 0.0) for turn in self.turns)


def image_hash(root: str, path: str, known: dict[str, str]) -> str:
    """Return a file's sha256, or "error: <reason>"."""
    if path not in known:
        try:
            known[path] = hashlib.sha256(read_bytes(resolve_image(root, path))).hexdigest()
        except ImageError as error:
            known[path] = f"error: {error.reason}"
    return known[path]


def show_messages(messages: tuple) -> str:
    """Return messages as JSON, "<image>" for a picture."""
    shown = [[role, parts if type(parts) is str else [p if type(p) is str else "<image>" for p in parts]]
             for role, parts in messages]
    return json.dumps(shown, ensure_ascii=False)
