"""Verdicts of other harnesses on the same replies, their faults included.

VLMEvalKit's are its rules alone, without a judge. There "Z" means "none of these"; None means that the
rules reach no verdict. The environment variable VERBOSE, which changes its verdicts, is taken as unset.
"""
import math
import re
import unicodedata
from typing import NamedTuple

from utils.items import STEPS, find_cell, shortest_path

# ---- VLMEvalKit
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NO_REPLY = "Failed to obtain answer via API"
# marks that separate words there; \ $ < > " ' - do not
SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_END = 4  # a lone letter counts among this many last words (since commit c3371551)
# no boundary on the right: "answer is blue" is B
ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)


def vlmevalkit_e8e78f0(output: str, options: dict[str, str]) -> str | None:
    """Return the verdict of `can_infer` (open-compass/VLMEvalKit, vlmeval/utils/matching_util.py, commit
    e8e78f05): a letter by itself near the end, else the first "answer is A" to "D", else the one option whose
    text occurs."""
    letter = lone_letter(output, options)
    if letter is None and NO_REPLY not in output:
        match = ANSWER_IS.search(output)
        if match and match[1].upper() in options:
            letter = match[1].upper()
    return letter or lone_text(output, options)


def lone_letter(output: str, options: dict[str, str]) -> str | None:
    """Return the only option letter that is a word, if near the end; Z for a refusal."""
    if NO_REPLY in output:
        return None
    if any(refusal in output for refusal in REFUSALS):
        return "Z"
    words = output.translate(SPACED).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - NEAR_END:
        return letters[0]
    return "Z" if not letters and "Z" in words else None


def lone_text(output: str, options: dict[str, str]) -> str | None:
    output = output.lower()
    if len(output) > 2 * sum(map(len, options.values())):
        return None
    letters = [letter for letter, text in options.items() if text.lower() in output]
    return letters[0] if len(letters) == 1 else None


# ---- MME-RealWorld
LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer",
            "The best option is", "The correct option is", "Best answer:", "Best option:")
LETTERS = "ABCDE"


def vlmevalkit_realworld(output: str) -> str | None:
    """Return VLMEvalKit's verdict (vlmeval/dataset/image_mcq.py, MMERealWorld.evaluate, commit e8e78f05): the
    first <answer> in capitals, if there is one, is read in place of the output."""
    match = re.search(r"<answer>(.*?)</answer>", output, re.DOTALL)
    return mme_realworld(match[1].strip().upper() if match else output)


def mme_realworld(output: str) -> str | None:
    """Return the verdict of `extract_characters_regex` (lmms-eval, lmms_eval/tasks/mme_realworld/utils.py,
    commit 75571cfe, and VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py, since commit 1445ec4f): the
    first capital A to E anywhere, else the first of "(A)" to "(E)" that holds the whole output, so that an
    empty output is A."""
    text = output.strip()
    for lead_in in LEAD_INS:
        text = text.replace(lead_in, "")
    capitals = [character for character in text if character in LETTERS]
    if capitals:
        return capitals[0]
    if len(text.split()) > 10:
        return None
    return next((letter for letter in LETTERS if text.lower() in f"({letter})".lower()), None)


# ---- TableVQABench
CLOSE = 1e-6  # between two numbers that are the same
QUOTES = str.maketrans({**dict.fromkeys("‘’´`", "'"), **dict.fromkeys("“”", '"'),
                        **dict.fromkeys("‐‑‒–—−", "-")})
# At the start, brackets are a citation only if they hold digits. The two cases exclude each other: no
# quadratic search.
CITATIONS = re.compile(r"(?:(?<!^)\[[^\]]*\]|^\[\d+\]|[•♦†‡*#+])*$")
DETAILS = re.compile(r"(?<!^)(?: \([^)]*\))*$")
QUOTED = re.compile(r'^"([^"]*)"$')


class Value(NamedTuple):
    """A value: its kind ("number", "date" or "string"), its amount or (year, month, day), its normal text."""

    kind: str
    key: object
    text: str


def vwtq(output: str, gold: str) -> bool:
    """Return whether an output has the gold's denotation, for VWTQ and VWTQ-Syn.

    `evaluate_wtq` (naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py, commit 88d0514e; also in
    VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py, after its image_vqa.py removed "Answer: "): both sides
    are sets of values joined by bars, equally many, and each of the gold's is met. An infinite number stops
    those scripts; here it is a wrong answer, in the gold a ValueError.
    """
    targets = read_values(gold)
    try:
        values = read_values(output.replace("||", "|"))
        return len(targets) == len(values) and all(any(same_value(target, value) for value in values)
                                                   for target in targets)
    except (ValueError, OverflowError):
        return False


def vtabfact(output: str, gold: str) -> bool | None:
    """Return whether an output means the gold ("1" or "0"); None (wrong) if it has both words.

    `evaluate_tabfact` (VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py, commit e8e78f05). Words count
    inside others: "untrue" is true.
    """
    has_true, has_false = "true" in output.lower(), "false" in output.lower()
    if has_true and has_false:
        return None
    return has_true if gold == "1" else has_false


def unescape(text: str) -> str:
    """Undo the escapes of a value of WikiTableQuestions."""
    return text.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\")


def read_values(text: str) -> list[Value]:
    values = {}
    for part in map(unescape, text.split("|")):
        value = Value(*parse_value(part), normal_text(part))
        values.setdefault((value.kind, value.text if value.kind == "string" else value.key), value)
    return list(values.values())


def parse_value(text: str) -> tuple[str, object]:
    amount = parse_number(text)
    if amount is not None:
        # int() truncates, so 2.9999999 is 2 and not 3: theirs
        return "number", int(amount) if abs(amount - round(amount)) < CLOSE else amount
    parts = text.lower().split("-")
    if len(parts) != 3:
        return "string", None
    try:
        year, month, day = (-1 if part in blanks else int(part)
                            for part, blanks in zip(parts, (("xx", "xxxx"), ("xx",), ("xx",))))
    except ValueError:
        return "string", None
    in_range = (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31)
    if not in_range or year == month == day == -1:
        return "string", None
    return ("number", year) if month == day == -1 else ("date", (year, month, day))


def parse_number(text: str) -> int | float | None:
    """Return the integer or float that Python reads; ValueError for infinity and "nan"."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        amount = float(text)
    except ValueError:
        return None
    if not math.isfinite(amount):
        raise ValueError(f"{text[:40]!r} is infinite or not a number")
    return amount


def same_value(target: Value, value: Value) -> bool:
    if target.text == value.text:
        return True
    if target.kind != value.kind or target.kind == "string":
        return False
    return target.key == value.key if target.kind == "date" else abs(target.key - value.key) < CLOSE


def normal_text(text: str) -> str:
    """Return text without accents, footnotes, trailing brackets, outer quotes and last period."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text)
                   if unicodedata.category(c) != "Mn").translate(QUOTES)
    previous = None
    while text != previous:
        previous = text
        text = CITATIONS.sub("", text.strip())
        text = DETAILS.sub("", text.strip())
        text = QUOTED.sub(r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


# ---- MME
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# "(?!<=" is theirs: not a look-behind, so only the digit after it counts
LONE_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


def yes_or_no(output: str) -> str | None:
    """Return "yes" or "no" if only one of the two is among an output's words, as in YOrN_Extraction
    (VLMEvalKit, vlmeval/dataset/utils/yorn.py, after process_punctuation of its vqa_eval.py).

    Only the first 32 lone periods are removed, because a flag is passed as the count.
    """
    text = output.lower()
    before, has_thousands = text, re.search(r"(\d)(,)(\d)", text) is not None
    for mark in PUNCTUATION:
        vanishes = mark + " " in before or " " + mark in before or has_thousands
        text = text.replace(mark, "" if vanishes else " ")
    words = LONE_PERIOD.sub("", text, count=int(re.UNICODE)).split()
    answers = {"yes", "no"} & set(words)
    return answers.pop() if len(answers) == 1 else None


# ---- VSP without a model
def straight_path(board: list[list[int]], vertical_first: bool, looks: bool = False) -> str:
    """Return moves that go straight to the goal, one direction first. Without `looks` they ignore holes; with
    it each is the first of the two that does not end in a hole, and they stop where both do."""
    (row, column), goal, moves = find_cell(board, 1), find_cell(board, 2), ""
    while (row, column) != goal:
        wanted = ("U" if row > goal[0] else "D" if row < goal[0] else "",
                  "L" if column > goal[1] else "R" if column < goal[1] else "")
        for move in filter(None, wanted if vertical_first else wanted[::-1]):
            down, right = STEPS[move]
            if not looks or board[row + down][column + right] != -1:
                row, column, moves = row + down, column + right, moves + move
                break
        else:
            return moves
    return moves


def needs_detour(board: list[list[int]]) -> bool:
    """Return whether no way is as short as start and goal are apart in rows and columns."""
    path = shortest_path(board)
    return path is None or len(path) > len(straight_path(board, True))
