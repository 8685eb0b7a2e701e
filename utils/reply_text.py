r"""The part of a model's reply that can be an answer, and one spelling for all answers.

`visible` removes what is not an answer, for every reader: latent spans and special tokens, thoughts in the
published formats (Qwen3, GLM, Magistral, Kimi-VL, Seed-OSS, LLaVA-CoT, Sky-T1, Cohere, gpt-oss), tool calls,
and the next question of a model that runs on. A thought that is not closed hides what follows, a closing mark
alone what is before it, a tool call all before it, since no answer was given yet. `fold` writes numbers,
fractions, hyphens and TeX in one way, for options and open answers alike.
"""
import json
import re
import unicodedata
from functools import lru_cache

from utils.jsonl import check_value, unique_keys

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen nineteen twenty").split()
TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))
SMALL = {**{word: number for number, word in enumerate(NUMBERS)}, **TENS}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9}
ORDINALS = dict(zip(("first second third fourth fifth sixth seventh eighth ninth tenth eleventh "
                     "twelfth").split(), "1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th".split()))

# ---- what is not an answer
# never words: Monet, Mirage, LVR, CoVT, LaViT, the chat format; ltnt: the log of a Monet fork
LATENT_SPAN = re.compile(r"<abs_vis_token>.*?</abs_vis_token>"
                         r"|<\|(latent|lvr|anchor)_start\|>.*?<\|\1_end\|>", re.DOTALL)
SPECIAL_TOKEN = re.compile(
    r"<[|｜][^<>|｜]*[|｜]>|</?abs_vis_token(?:_pad)?>|</?observation>|<ltnt:\d+>|<lvr\d>|</?s>|\[/?INST\]"
    r"|<(?:start_of_turn|end_of_turn|bos|eos|pad)>")
GLM_BOX = re.compile(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)", re.DOTALL)
TURN = re.compile(r"<\|(?:im_start|start)\|>assistant(?!\w)|\[/INST\]|<start_of_turn>model\b")
TURN_END = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|return)\|>|</s>|<(?:eos|end_of_turn)>"
                      r"|<｜end▁of▁sentence｜>")
HARMONY = re.compile(r"<\|channel\|>\s*(?:analysis|commentary).*?(?:<\|end\|>|<\|call\|>|\Z)"
                     r"|<\|channel\|>\s*final[^<]*(?=<\|message\|>)", re.DOTALL)
THOUGHT_NAMES = (r"(?:seed:)?think(?:ing)?|thoughts?|reason(?:ing)?|scratchpad|reflection|analysis|summary"
                 r"|caption|reasoning_content|inner_monologue|rationale")
CALL_NAMES = (r"tool_calls?|tool_responses?|tool_code|tool_output|tool_result|function_calls?"
              r"|function_results?|function|invoke|action|python_tag")
HIDDEN = re.compile(
    rf"(?:<\|?|\[|◁)(?P<close>/?)(?:(?P<thought>{THOUGHT_NAMES})|(?P<call>{CALL_NAMES}))(?=[\s=>\]▷|])"
    r"[^<>\[\]▷\n]*[>\]▷]|<\|(?:(?P<opened>begin_of_thought|START_THINKING|START_ACTION)|end_of_thought"
    r"|END_THINKING|END_ACTION)\|>|<unused9[45]>", re.IGNORECASE)
CALL_BODY = re.compile(r"\s*(?:[{\[<]|[\w.-]+\s*[({<\n]|\Z)")
BARE_CALL = re.compile(
    r"\{\s*\"name\"\s*:\s*\"[^\"]*\"\s*,\s*\"(?:arguments|parameters)\"\s*:.*?(?:\}\s*\}|\Z)"
    r"|```(?:python|tool_call|tool_code)\b.*?(?:```|\Z)|(?:^|(?<=\n))Action(?: Input)?:[^\n]*", re.DOTALL)
NEXT_QUESTION = re.compile(r"\n[ \t]*(?:#+ *|\*+)?(?:Question|Human|User|Q|问题|問題) ?\d*\**[ \t]*[:：]")
WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width letters, digits and marks
HTML = re.compile(  # <B> is an answer
    r"</?(?:p|b|i|u|em|strong|span|div|br|code|center|h[1-6]|li|ul|ol|response|output|assistant)\s*/?>")


@lru_cache(maxsize=1024)
def visible(output: str) -> str:
    """Return the part of a reply in which an answer is looked for."""
    text = LATENT_SPAN.sub("", output).translate(WIDE)
    text = re.sub(r"\\boxed\s+([A-Za-z0-9])(?![\w{])", r"\\boxed{\1}", text)
    if "<" in text or "[" in text or "◁" in text:
        text = GLM_BOX.sub(r"\\boxed{\1}", HARMONY.sub("", TURN.split(text)[-1]))
        text = re.sub(r"(?i)^([^<]+)</answer>", r"\1", HTML.sub("", without_hidden(text)))
        text = next((part for part in TURN_END.split(text) if part.strip()), "")
    if calls := list(BARE_CALL.finditer(text)):
        text = text[calls[-1].end():]
    return NEXT_QUESTION.split(SPECIAL_TOKEN.sub("", text).strip())[0].strip()


def without_hidden(text: str) -> str:
    pieces, start, inside = [], 0, False
    for match in HIDDEN.finditer(text):
        opens = bool(match["opened"]) or match[0] == "<unused94>" or (
            bool(match["thought"] or match["call"]) and not match["close"])
        if opens and not inside:
            pieces.append(text[start:match.start()])
        if match["call"] and (not opens or CALL_BODY.match(text, match.end())):
            pieces = []
        elif match["call"]:  # a stray mark in prose
            opens, pieces = inside, pieces if inside else [*pieces[:-1], text[start:match.start()]]
        start, inside = match.end(), opens
    return "".join(pieces if inside else [*pieces, text[start:]])


# ---- boxes and TeX
BOX = re.compile(r"(?:\\+|\x08)?(?:(?<=\\)boxed|(?<=\\)fbox|(?<=\x08)oxed|(?<![A-Za-z\\])boxed)\s*\{")
TEX = re.compile(r"\\(?:text\w*|math\w+|mbox|emph|boxed|fbox|underline|boldsymbol|bm)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
MAX_DEPTH = 50  # nested commands that are taken off an answer
EDGES = " \t\n.…,;:!\"'“”‘’«»*_`。"
PAIRS = ("()", "[]", "{}", "$$", "【】", "「」", "『』", "<>", "“”")


def closing_braces(text: str, start: int = 0) -> dict[int, int]:
    """Return {place after an opening brace: place of its closing brace} from `start` on."""
    closing, opened = {}, []
    for match in re.finditer("[{}]", text[start:]):
        if match[0] == "{":
            opened.append(start + match.end())
        elif opened:
            closing[opened.pop()] = start + match.start()
    return closing


def find_boxes(text: str) -> list[tuple[int, int, str, bool]]:
    """Return (start, end, content, closed) of the outer boxes, or of the last that is open if none closes."""
    boxes = list(BOX.finditer(text)) if "box" in text or "oxed" in text else []
    closing = closing_braces(text, boxes[0].start()) if boxes else {}
    found, end = [], 0
    for match in boxes:
        if match.start() >= end and match.end() in closing:  # not inside another box
            end = closing[match.end()]
            found.append((match.start(), end + 1, text[match.end():end], True))
    if boxes and not found:
        content = text[boxes[-1].end():].split("\n")[0]
        found = [(boxes[-1].start(), boxes[-1].end() + len(content), content, False)]
    return found


def last_boxed(text: str) -> str | None:
    boxes = find_boxes(text)
    return unwrap(boxes[-1][2]) if boxes else None


def plain_tex(text: str) -> str:
    """Return text without the escapes and spaces of TeX."""
    if not re.search(r"\\|\{,\}|[\w.]~", text):
        return text
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text.replace("{,}", ",").replace("\\!", ""))
    text = re.sub(r"(?:(?<=\d)(?:\\[,;:! ]|~)+)?\\([$%#&_])", r"\1", text)
    return re.sub(r"\\[,;:!> ]|(?<=[\w.])~(?=[A-Za-z\\])|\\(?:q?quad|rm|bf|displaystyle)\b"
                  r"|\\(?:left|right)(?=[()\[\]])|\\[()\[\]]", " ", text)


def unwrap(text: str) -> str:
    """Remove TeX text commands, and marks and brackets around all of `text`."""
    if text.isalnum():
        return text
    text = re.sub(r"^\s*\.(?=\d)", "0.", text)
    for _ in range(MAX_DEPTH):
        before = text
        text = plain_tex(TEX.sub(r"\1", text)).strip(EDGES)
        enclosed = len(text) > 1 and text[0] + text[-1] in PAIRS
        if enclosed and not set(text[1:-1]) & set("()[]{}<>"):
            text = text[1:-1]
        if text == before:
            break
    return text


# ---- one spelling
MONTHS = ("january february march april may june july august september october november december").split()
UNITS = dict(pair.split(":") for pair in (  # without the s of the plural
    "percent:% °:degree degree:degree dollar:$ euro:€ inche:inch in:inch feet:ft foot:ft mi:mile mile:mile "
    "centimeter:cm centimetre:cm millimeter:mm millimetre:mm meter:m metre:m kilometer:km kilometre:km "
    "kilogram:kg kg:kg gram:g pound:lb lb:lb second:s sec:s minute:min min:min hour:h hr:h "
    "year:year ounce:oz yard:yd yd:yd km:km liter:l litre:l").split())
WORDS = {**ORDINALS, **{month[:3]: month for month in MONTHS}, "sept": "september", "grey": "gray",
         "colour": "color", "mile per hour": "mph", "km per hour": "km/h",
         **{f"{a} {side}": f"{b} {side}" for a, b in (("top", "upper"), ("bottom", "lower"))
            for side in ("left", "right")}}
WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b")
DASHES = str.maketrans(dict.fromkeys("‐‑‒–—−﹣－", "-") | {"⁄": "/", "∕": "/", "’": "'", "×": "x"})
MATHS = re.compile(r"\$(?=\S)([^$\n]*[^$\s])\$(?!\d)")  # as Pandoc reads dollars
MIXED = re.compile(r"(?<![\w.:/])(\d{1,3}) (\d{1,2})/(\d{1,2})(?![\w/]|\.\d)")  # 1 1/2
DECIMAL = re.compile(r"(?<![\w.])0*(?=\d)(\d{1,20})\.(\d{0,20}?)0*(?![\w.]*\d)")  # 05.10 is 5.1
INITIALS = re.compile(r"\b(?:[a-z]\.)+[a-z]\b\.?")  # p.m., U.S.A.
COUNTED = re.compile(r"\b(?:there is|only|just|exactly) $")
NUMBER_WORD = re.compile(rf"\b(?:{'|'.join([*SMALL, *SCALES])})\b(?:[\s-]+(?:and[\s-]+)?"
                         rf"\b(?:{'|'.join([*SMALL, *SCALES])})\b)*")


def number_of(words: str) -> str:
    """Return the digits of a number in words; other words stay."""
    total, group, last = 0, 0, 10 ** 12
    parts = [word for word in re.split(r"[\s-]+", words) if word != "and"]
    for word in parts:
        if word in SCALES:
            scale = SCALES[word]
            if scale == 100:
                group = (group or 1) * 100
            else:
                total, group = total + (group or 1) * scale, 0
            last = scale
        elif SMALL[word] < last and (last >= 100 or (last in TENS.values() and SMALL[word] < 10)):
            group, last = group + SMALL[word], SMALL[word]
        else:
            return " ".join(str(SMALL.get(part, part)) for part in parts)
    return str(total + group)


@lru_cache(maxsize=4096)
def fold(text: str, prose: bool = False) -> str:
    """Return text in lower case and one spelling, without outer marks or leading article. In `prose` the word
    "one" is not a number."""
    text = re.sub(r"(?<=\d)(?=[½¼¾⅐-⅞]|\\[dt]?frac)", " ", plain_tex(text))
    text = FRACTION.sub(r"\1\3/\2\4", MATHS.sub(r"\1", text))
    text = unicodedata.normalize("NFKC", text).lower().translate(DASHES).replace("per cent", "percent")
    text = MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)
    text = re.sub(r"(?<!\w)([12]\d\d0)'?s(?!\w)", r"\1decade", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    text = re.sub(rf"(?<![\w.])(\d+(?:\.\d+)?) ({'|'.join(SCALES)})\b",
                  lambda m: f"{float(m[1]) * SCALES[m[2]]:.15g}", text)
    text = NUMBER_WORD.sub(lambda m: m[0] if prose and m[0] == "one" and not COUNTED.search(text[:m.start()])
                           else number_of(m[0]), text)
    text = re.sub(r"\b(\d+) (hal(?:f|ves)|thirds?|quarters?)\b",
                  lambda m: f"{m[1]}/{dict(h=2, t=3, q=4)[m[2][0]]}", text)
    text = re.sub(r"\b(?:negative|minus) (?=\d)", "-", re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text))
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = DECIMAL.sub(lambda m: f"{m[1]}.{m[2]}".rstrip("."), text)
    text = re.sub(r"(?<=\w)\s*([:/=])\s*(?=[\d-])|(?<=\d)\s*([x×])\s*(?=\d)", r"\1\2", text)
    text = re.sub(r"(?<=\d)(?=(?:cm|mm|km|kg|ft|m|g|s|h|%)(?!\w))|(?<=\d)\s*(?=°)|(?<=°)(?=\w)", " ", text)
    text = re.sub(r"(?<=\d )(?:[a-z]+|°)(?!\w)", lambda m: UNITS.get(m[0].removesuffix("s"), m[0]), text)
    text = WORD.sub(lambda m: WORDS[m[0]], INITIALS.sub(lambda m: m[0].replace(".", ""), text))
    text = re.sub(r"(?<=[2-9])0[ -](?=[1-9](?:st|nd|rd|th)\b)|(?<![\d:.])0(?=\d:\d\d)", "", text)  # 20 1st
    text = re.sub(r"(?<=[a-z]{2})\.(?= )", "", re.sub(r"\s+", " ", text)).strip(EDGES)
    return re.sub(r"^(?:the|an|a) (?=\S)", "", text)


# ---- JSON
LENIENT = json.JSONDecoder(strict=False, object_pairs_hook=unique_keys)  # line breaks in strings pass
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # control characters but for white space
JSON_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def parse_json_reply(text: str) -> dict | None:
    """Return the last JSON object in a reply, whatever surrounds it; None without one, or if it has control
    characters. Text that UTF-8 cannot hold does not count."""
    place, last = text.find("{"), None
    while place >= 0:
        try:
            value, end = LENIENT.raw_decode(text, place)
            check_value(text, value, exact=True)
            last = None if CONTROL.search(texts_of(value)) else value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return last


def texts_of(value: object) -> str:
    """Return all strings in a JSON value, keys included, one per line."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(parts, list):
        return "\n".join(map(texts_of, parts))
    return parts if isinstance(parts, str) else ""


def schema_fault(value: object, schema: dict, where: str = "the reply") -> str | None:
    """Return in words where `value` breaks a JSON schema of JSON_TYPES and enums."""
    kind, parts = schema["type"], []
    if type(value) is not JSON_TYPES[kind]:  # exact: a bool is not an integer
        return f"{where} should be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} should be one of {', '.join(schema['enum'])}, not {str(value)[:40]!r}"
    if kind == "string" and len(value) > schema.get("maxLength", len(value)):
        return f"{where} is too long: {len(value)} characters"
    if kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items, at most {schema['maxItems']} are allowed"
        parts = [(item, schema["items"], f"item {n} of {where}") for n, item in enumerate(value, 1)]
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} lacks {', '.join(missing)}"
        parts = [(value[name], part, repr(name)) for name, part in schema["properties"].items()]
    return next((fault for part in parts if (fault := schema_fault(*part))), None)
