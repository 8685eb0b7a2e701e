"""The zoom tool of DeepEyes: the model asks for a region in a tool call, is shown it as a new picture, and
goes on.

All facts are those of Visual-Agent/DeepEyes, eval/eval_vstar.py (commit cc3ff4d6): the words, one tool, the
first call of a turn, a box in pixels of the stored picture (not of the resized one that the model sees), the
region resized to multiples of 28, and at most 11 turns. Different here: a call is read as JSON and never
evaluated, a box is cut to the picture, a call that cannot be followed and a turn without call or answer end
the conversation (the script stops at the one and asks the same again at the other). Nothing of this is a
guess at an answer: the last turn is scored by the rules for any reply.

Prompts and protocols by name: who is asked, in which words, at which resolution.

A protocol is a system prompt, the user's words of a harness, a suffix and pixel limits. What it does not
hold: decoding and judges. Compared are numbers of one protocol only; the same model moves by ten points on V*
between two of them.
"""
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from utils.images import MAX_ASPECT
from utils.items import question_text
from utils.jsonl import DataError

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
EXAMPLE = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200],
                                                       "label": "the apple on the desk"}}
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
ASKED = (
    "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
         "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> ")
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


class Turn(NamedTuple):
    """What follows from a reply: the box to show (left, top, right, bottom) in pixels, or None and why it
    ends there: answer, no_call or bad_call."""

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
        left, top, right, bottom = (int(min(max(number, 0), limit)) for number,
                                    limit in zip(numbers, (*size, *size)))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    width, height = right - left, bottom - top
    followed = value.get("name") == TOOL["function"]["name"] and len(
        numbers) == 4 and width > 0 and height > 0
    return (left, top, right, bottom) if followed and max(width, height) <= MAX_ASPECT * min(width,
                                                                                             height) else None


# ------------------------------------------------------------ protocols


PATCH = 28 * 28  # pixels of a visual token of Qwen2.5-VL


@dataclass(frozen=True)
class Protocol:
    """`system`: None leaves it to the chat template (Qwen2.5-VL's inserts "You are a helpful assistant.").

    words: a name of WORDS. suffix: put after them. format_hints: whether the words may ask for a bare letter
    or word, which a system prompt that asks for reasoning contradicts. min_pixels, max_pixels: area (width x
    height) to which a picture is enlarged or shrunk; None leaves the checkpoint's own.
    """

    name: str
    system: str | None
    words: str
    min_pixels: int | None
    max_pixels: int | None
    suffix: str = ""
    format_hints: bool = True


PROTOCOLS = {protocol.name: protocol for protocol in (
    # VLMEvalKit vlmeval/config.py, the registered Qwen2.5-VL-7B-Instruct: 1280 to 16384 tokens,
    # use_custom_prompt=False
    Protocol("vlmevalkit", None, "vlmevalkit", 1280 * PATCH, 16384 * PATCH),
    # NOVAglow646/Monet README.md, "Note that": VLMEvalKit with this system prompt; it names no pixel limits
    Protocol("monet",
             "You are a helpful multimodal assistant. You are required to answer the question based on the image "
             "provided. Put your final answer in \\boxed{}.", "vlmevalkit", 1280 * PATCH, 16384 * PATCH),
    # arXiv 2511.21395 v2, appendix C, as its readers quote it: at most 8192 tokens. The least, 256, is that
    # of NOVAglow646/Monet inference/vllm_inference_example.py, which has the same upper limit
    Protocol("monet_paper",
             "You are an expert multimodal large language model designed to reason with latent visual "
             "embeddings.", "vlmevalkit", 256 * PATCH, 8192 * PATCH),
    # lmms-eval lmms_eval/models/simple/qwen2_5_vl.py: defaults of its arguments (1,605,632 is 2048 tokens)
    Protocol("lmms_eval", "You are a helpful assistant.", "lmms_eval", 256 * PATCH, 1_605_632),
    # Visual-Agent/DeepEyes eval/eval_vstar.py (commit cc3ff4d6): the system prompt describes the tool
    # (utils/evaluate/prompts.py)
    Protocol("deepeyes", TOOL_SYSTEM, "deepeyes", 4 * PATCH, 16384 * PATCH),
    # no harness: VLMEvalKit's words, and all else the checkpoint's own
    Protocol("plain", None, "vlmevalkit", None, None),
)}


def user_text(item: dict, protocol: Protocol) -> str:
    """Return the user's words for an item; its pictures stand before them, in order.

    DataError for an item that the harness has no words for.
    """
    return WORDS[protocol.words](item, protocol.format_hints) + protocol.suffix


# ------------------------------------------------------------------------------------------------ VLMEvalKit
# vlmeval/dataset/utils/tablevqabench.py. The parts that ask for a form are apart, so that they can be left
# out; the bars are not: the scorer needs them.
VWTQ_START = "You are asked to answer questions asked on an image.\n"


VWTQ_HINT = "You should answer the question with a single word.\n"
VWTQ_EXAMPLE = (
    "Example: \nQuestion: what was the only year mr. wu competed in the olympic games?\nAnswer: 2004\n"
                "Question: which township in pope county, arkansas has the least amount of water area?\nAnswer: Freeman\n"
                "If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato\n\n")
VTABFACT_START = "You are asked to answer whether the statement is True or False based on given image\n"
VTABFACT_HINT = "You should only answer True or False.\n"
VTABFACT_EXAMPLE = (
    "Example: \nStatement: the milwaukee buck win 6 game in the 2010 - 11 season\nAnswer: True\n"
                    "Statement: only the top team score above the average of 8.8\nAnswer: False\n\n")
REALWORLD_START = "Select the best answer to the above multiple-choice question based on the image."
REALWORLD_HINT = " Respond with only the letter (A, B, C, D, or E) of the correct option."
YES_OR_NO = " Please answer yes or no."  # how MME's questions end (lmms-eval lmms_eval/tasks/mme/utils.py)


def vlmevalkit_words(item: dict, hints: bool) -> str:
    """VLMEvalKit's words. Those of V*, HR-Bench and BLINK, and of any item of an unknown benchmark:
    `question_text`.

    MME-RealWorld-Lite: image_mcq.py, MMERealWorld.build_prompt. TableVQABench: image_vqa.py,
    TableVQABench.build_prompt. MME, OCRBench-v2: the question as it is stored. Without hints nothing asks for
    a bare letter or word: not a protocol of VLMEvalKit's any more.
    """
    question = item["question"]
    if item.get("benchmark") == "mme_realworld_lite":
        asked = f"{REALWORLD_START}{REALWORLD_HINT} \nThe best answer is:" if hints else REALWORLD_START
        return f"{realworld_choices(item)}{asked}"
    if item.get("metric") == "wtq":
        hint, end = (VWTQ_HINT, "\nAnswer:") if hints else ("", "")
        return f"{VWTQ_START}{hint}{VWTQ_EXAMPLE}Question: {question}{end}"
    if item.get("metric") == "tabfact":
        hint, end = (VTABFACT_HINT, "\nAnswer:") if hints else ("", "")
        return f"{VTABFACT_START}{hint}{VTABFACT_EXAMPLE}Statement: {question}{end}"
    if item.get("metric") == "yesno_pair" and not hints:
        return question.removesuffix(YES_OR_NO)
    return question_text(item)


def realworld_choices(item: dict) -> str:
    """Return MME-RealWorld's question and options, each on a line as "(A) ..."."""
    options = "".join(f"({letter}) {text}\n" for letter, text in item["options"])
    return f"{item['question']} The choices are listed below:\n{options}"


# ------------------------------------------------------------------------------------------------ lmms-eval
VSTAR_HINT = "\nAnswer with the option's letter from the given choices directly."


def lmms_eval_words(item: dict, hints: bool) -> str:
    """lmms-eval's words (lmms_eval/tasks/<task>/utils.py, doc_to_text, and the prompts of its yaml).

    V*: the instruction comes twice, since its pattern takes the one that is baked into the text for a part of
    the last option. It drops an option that holds a bracket, so that later letters name other texts: such an
    item is an error.
    """
    name = (item.get("benchmark") or "").split("/")[0]
    lines = "".join(f"\n{letter}. {text}" for letter, text in item["options"])
    if name in ("vstar", "vstar_inline"):
        if odd := [text for _, text in item["options"] if "(" in text or ")" in text]:
            raise DataError(
                f"item {item['id']!r}: lmms-eval drops the option {odd[0]!r}, which holds a bracket; "
                            "expected another protocol for it")
        return f"{item['question'].strip()}{lines}{2 * VSTAR_HINT if hints else ''}"
    if name in ("hrbench_4k", "hrbench_8k"):
        return f"{item['question'].strip()}{lines}" + ("\nAnswer the option letter directly." if hints
                                                       else "")
    if name == "blink":
        return blink_words(item, hints)
    if name == "mme_realworld_lite":
        asked = f"{REALWORLD_START}{REALWORLD_HINT}\nThe best answer is: " if hints else REALWORLD_START
        return f"{realworld_choices(item)}{asked}"
    if name == "mme":
        end = "\nAnswer the question using a single word or phrase." if hints else ""
        return item["question"].strip().replace(YES_OR_NO, "") + end
    if name == "ocrbench_v2":
        return item["question"].strip()
    raise DataError(
        f"item {item['id']!r}: lmms-eval has no task for benchmark {item.get('benchmark')!r}; expected one of "
                    "vstar, vstar_inline, hrbench_4k, hrbench_8k, mme_realworld_lite, blink, mme, ocrbench_v2")


def blink_words(item: dict, hints: bool) -> str:
    """BLINK as lmms-eval asks it: a note, then the data set's own prompt, which only the hub's layout has."""
    prompt = (item.get("raw") or {}).get("prompt")
    if not isinstance(prompt, str):
        raise DataError(
            f"item {item['id']!r}: no prompt of BLINK's own; lmms-eval asks with it, expected items that were "
                        "prepared from the hub's data set")
    letters = ", ".join(letter for letter, _ in item["options"])
    return f"Note: You only need to respond with {letters} without providing any additional information.\n{prompt}" \
        if hints else prompt


# ------------------------------------------------------------------------------------------------ DeepEyes
def deepeyes_words(item: dict, hints: bool) -> str:
    """DeepEyes' words for V* and HR-Bench (eval/eval_vstar.py, eval/eval_hrbench.py). Other items are asked
    alike, without options where they have none: DeepEyes has no words for them. What asks for the form of a
    tool call stays without hints."""
    options = "".join(f"\n{letter}. {text}" for letter, text in item["options"])
    return f"Question: {item['question']}\n" + (f"Options: {options}\n\n" if options else "") + ASKED


WORDS = {"vlmevalkit": vlmevalkit_words, "lmms_eval": lmms_eval_words, "deepeyes": deepeyes_words}
