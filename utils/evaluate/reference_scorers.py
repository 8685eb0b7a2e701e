"""Verdicts of other harnesses on the same replies, their faults included, to set beside ours. Never used to
score for us.

    vlmevalkit_0bac5c0, vlmevalkit_e8e78f0   multiple choice: V*, HR-Bench, BLINK (rules only, before any
    judge)
    mme_realworld                            MME-RealWorld: the benchmark's own script, VLMEvalKit and
    lmms-eval
    vwtq, vtabfact                           TableVQABench: denotation accuracy; true or false
    yes_or_no                                MME: VLMEvalKit's rules, before any judge

A letter is an option's, "Z" is VLMEvalKit's name for "none of these", None is no verdict. VLMEvalKit's
environment variable VERBOSE, which changes its verdicts, is taken as unset.
"""
import math
import re
import unicodedata

from utils.answers import closing_braces

# ------------------------------------------------------------------------------------------------ VLMEvalKit
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NO_REPLY = "Failed to obtain answer via API"
# marks that separate words there; \ $ < > " ' - do not
SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_END = 4  # words from the end among which a lone letter counts, since commit c3371551
# no boundary on the right: "answer is blue" is B
ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)


def vlmevalkit_0bac5c0(output: str, options: dict[str, str]) -> str | None:
    """Return the verdict of `can_infer` (open-compass/VLMEvalKit, vlmeval/utils/matching_util.py, commit
    0bac5c0 of 2026-02-25, the day CapImagine's weights were released): letter by itself near the end, else a
    lone option's text."""
    return _lone_letter(output, options) or _lone_text(output, options)


def vlmevalkit_e8e78f0(output: str, options: dict[str, str]) -> str | None:
    """Return the verdict of `can_infer` (open-compass/VLMEvalKit, vlmeval/utils/matching_util.py, commit
    e8e78f05 of 2026-08-18): as at 0bac5c0, with the first "answer is A" to "answer is D" tried between letter
    and text (a67ace50)."""
    letter = _lone_letter(output, options)
    if letter is None and NO_REPLY not in output and (match := ANSWER_IS.search(output)) and match[1].upper(
        ) in options:
        letter = match[1].upper()
    return letter or _lone_text(output, options)


def _lone_letter(output: str, options: dict[str, str]) -> str | None:
    """Return the one option letter that stands as a word of its own, if first met near the end; Z for a
    refusal."""
    if NO_REPLY in output:
        return None
    if any(refusal in output for refusal in REFUSALS):
        return "Z"
    words = output.translate(SPACED).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - NEAR_END:
        return found[0]
    return "Z" if not found and "Z" in words else None


def _lone_text(output: str, options: dict[str, str]) -> str | None:
    """Return the one option whose text is anywhere in a short output, inside words too."""
    output = output.lower()
    if len(output) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in output]
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------------------------------------- MME-RealWorld
LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer")
# Commas are missing between these in the script, so only the joined strings are removed there.
JOINED = ("The best option isThe correct option is", "Best answer:Best option:")
REPAIRED = ("The best option is", "The correct option is", "Best answer:", "Best option:")
LETTERS = "ABCDE"


def mme_realworld(output: str, options: dict[str, str] | None = None, repaired: bool = False) -> str | None:
    """Return the verdict of `extract_characters_regex`: the first capital A to E anywhere, inside words too.

    Without a capital, the first option that holds the whole output, so an empty output is A. Three states are
      in use: options given, not repaired: the benchmark's own script (yfzhang114/MME-RealWorld,
      evaluation/eval_your_results.py,
                                   commit 11af66f2), which looks in "(A) text"
      no options, not repaired:    VLMEvalKit up to commit 1445ec4f
                                   (vlmeval/dataset/utils/multiple_choice.py), which
                                   looks in the bare "(A)" to "(E)"
      no options, repaired:        lmms-eval 0.7.2 (commit 75571cfe, lmms_eval/tasks/mme_realworld/utils.py),
                                   and
                                   VLMEvalKit's list of lead-ins since 1445ec4f
    """
    text = output.strip()
    for lead_in in LEAD_INS + (REPAIRED if repaired else JOINED):
        text = text.replace(lead_in, "")
    capitals = [character for character in text if character in LETTERS]
    if capitals:
        return capitals[0]
    if len(text.split()) > 10:
        return None
    places = [f"({letter}) {option}" for letter, option in options.items()] if options else [f"({c})"
                                                                                             for c in LETTERS]
    return next((place[1] for place in places if text.lower() in place.lower()), None)


# ---------------------------------------------------------------------------------------------- TableVQABench
CLOSE = 1e-6  # between two numbers that are the same
QUOTES = str.maketrans({**dict.fromkeys("‘’´`", "'"), **dict.fromkeys("“”", '"'),
                        **dict.fromkeys("‐‑‒–—−", "-")})
# At the start, brackets are a citation only if they hold digits. The two cases exclude each other, which
# keeps the search from trying every split of a long row of brackets; what it matches is the same.
CITATIONS = re.compile(r"(?:(?<!^)\[[^\]]*\]|^\[\d+\]|[•♦†‡*#+])*$")
DETAILS = re.compile(r"(?<!^)(?: \([^)]*\))*$")
QUOTED = re.compile(r'^"([^"]*)"$')


def vwtq(output: str, gold: str) -> bool:
    """Return whether an output has the gold's denotation, for VWTQ and VWTQ-Syn.

    `evaluate_wtq` (naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py, commit 88d0514e; the same in
    open-compass/VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py, commit e8e78f05, after `without_label`).
    The rules are WikiTableQuestions': both sides are sets of values joined by bars, equally many, and each of
    the gold's is met. A number beyond all floats ("inf", 400 digits) in the output stops those scripts; here
    it is a wrong answer. Infinity in the gold is a ValueError.
    """
    targets = _values(gold)
    try:
        found = _values(output.replace("||", "|"))
        return len(targets) == len(found) and all(any(_same(target, value) for value in found)
                                                  for target in targets)
    except (ValueError, OverflowError):
        return False


def without_label(output: str) -> str:
    """Return an output without a leading "Answer: ", which VLMEvalKit removes (vlmeval/dataset/image_vqa.py,
    TableVQABench.evaluate, commit e8e78f05) and the benchmark's own script does not."""
    return output.removeprefix("Answer: ")


def vtabfact(output: str, gold: str) -> bool | None:
    """Return whether an output says what the gold ("1" or "0") says; None, which counts as wrong, if it says
    both words.

    `evaluate_tabfact` (open-compass/VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py, commit e8e78f05;
    naver-ai's own script differs in the gold's type alone). The words count inside others, so "untrue" is
    true.
    """
    if gold not in ("0", "1"):
        raise ValueError(
            f'gold {gold!r}, expected the string "0" or "1"; another type would make every answer wrong')
    says_true, says_false = ("true" in output.lower()), ("false" in output.lower())
    if says_true and says_false:
        return None
    return says_true if gold == "1" else says_false


def unescape(text: str) -> str:
    """Undo the escapes of a value of WikiTableQuestions, in the order of these scorers."""
    return text.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\")


def _values(text: str) -> list[tuple]:
    """Return the distinct values (kind, what it equals by, normalised text), the first of equal ones."""
    values = {}
    for part in map(unescape, text.split("|")):
        kind, key = _kind(part)
        normal = _normal(part)
        values.setdefault((kind, normal if kind == "string" else key), (kind, key, normal))
    return list(values.values())


def _kind(text: str) -> tuple[str, object]:
    """Return ("number", amount), ("date", (year, month, day)) or ("string", None); ValueError for a number
    without end."""
    amount = _number(text)
    if amount is not None:
        # int() cuts off, so 2.9999999 is 2 and not 3: theirs
        return "number", int(amount) if abs(amount - round(amount)) < CLOSE else amount
    parts = text.lower().split("-")
    if len(parts) != 3:
        return "string", None
    try:
        year, month, day = (-1 if part in blanks else int(part)
                            for part, blanks in zip(parts, (("xx", "xxxx"), ("xx",), ("xx",))))
    except ValueError:
        return "string", None
    if not (month == -1 or 1 <= month <= 12) or not (day == -1 or 1 <= day
                                                     <= 31) or year == month == day == -1:
        return "string", None
    return ("number", year) if month == day == -1 else ("date", (year, month, day))


def _number(text: str) -> int | float | None:
    """Return what Python reads as an integer or a float; ValueError for infinity and for "nan"."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        amount = float(text)
    except ValueError:
        return None
    if not math.isfinite(amount):
        raise ValueError(f"{text[:40]!r} is a number without end, which cannot be compared")
    return amount


def _same(target: tuple, value: tuple) -> bool:
    """Return whether two values are one: by text, or two numbers or two dates by what they stand for."""
    if target[2] == value[2]:
        return True
    if target[0] != value[0] or target[0] == "string":
        return False
    return target[1] == value[1] if target[0] == "date" else abs(target[1] - value[1]) < CLOSE


def _normal(text: str) -> str:
    """Return text as WikiTableQuestions compares it: no accents, footnotes, trailing brackets, outer quotes,
    last period."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text)
                   if unicodedata.category(c) != "Mn").translate(QUOTES)
    previous = None
    while text != previous:
        previous = text
        text = CITATIONS.sub("", text.strip())
        text = DETAILS.sub("", text.strip())
        text = QUOTED.sub(r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


# ------------------------------------------------------------------------------------------------ MME
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",",
               "?", "!")
# "(?!<=" is theirs: no look-behind, so only the digit after it counts
LONE_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


def yes_or_no(output: str) -> str | None:
    """Return "yes" or "no" if it is the only one of the two among an output's words, as YOrN_Extraction has
    it (open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py, and the clean-up of its vqa_eval.py,
    process_punctuation).

    A mark that touches a space anywhere, or a number with a comma anywhere, lets marks vanish instead of
    becoming spaces; of the lone periods only the first 32 are removed, because a flag stands there in the
    place of the count.
    """
    text = output.lower()
    before, has_thousands = text, re.search(r"(\d)(,)(\d)", text) is not None
    for mark in PUNCTUATION:
        vanishes = mark + " " in before or " " + mark in before or has_thousands
        text = text.replace(mark, "" if vanishes else " ")
    words = LONE_PERIOD.sub("", text, count=int(re.UNICODE)).split()
    found = {"yes", "no"} & set(words)
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------ Mirage
def vsp_moves(text: str) -> str | None:
    """Return the letters U, D, L, R of the last \\boxed{} in a reply, upper-cased; None if no box closes."""
    start = text.rfind("\\boxed{")
    begin = start + len("\\boxed{")
    end = closing_braces(text).get(begin) if start >= 0 else None
    return None if end is None else "".join(move for move in text[begin:end].upper() if move in "UDLR")


def walk_vsp(map_desc: list[list[int]], text: str) -> bool:
    """Return whether the moves of a reply lead from start (1) to goal (2), as Mirage scores it (src/task.py).

    A move off the map is ignored, a hole (-1) fails at once, and the walk must end on the goal.
    """
    row, column = next((i, line.index(1)) for i, line in enumerate(map_desc) if 1 in line)
    for move in vsp_moves(text) or "":
        step_down, step_right = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[move]
        if 0 <= row + step_down < len(map_desc) and 0 <= column + step_right < len(map_desc[0]):
            row, column = row + step_down, column + step_right
        if map_desc[row][column] == -1:
            return False
    return map_desc[row][column] == 2
