"""Read answers off replies, by rules that name themselves and never guess; compare answers; walk VSP maps.

The order of the rules: a box decides, else an answer tag, else a bare answer, else a phrase, else the only option that is
mentioned. What no rule resolves is unresolved: it is never a random letter, the first capital, or a part of a word.
"""
import re
from dataclasses import dataclass

BARE_CHARACTERS = 200  # a longer reply is reasoning, not a bare answer
BRIEF_CHARACTERS = 30  # or twice the length of all options (VLMEvalKit's bound): a sentence that only names its option
CONTROL = re.compile(r"<\|[^|<>]*\|>|<ltnt:\d+>")
LATENT_SPANS = re.compile(r"<abs_vis_token>.*?</abs_vis_token>|<\|latent_start\|>.*?<\|latent_end\|>"
                          r"|<\|lvr_start\|>.*?<\|lvr_end\|>", re.DOTALL)
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
WRAPPER = re.compile(r"^\\(?:text|textbf|textit|mathrm|mathbf|mathsf)\s*\{(.*)\}$", re.DOTALL)
LETTER_TEXT = re.compile(r"^\(?([A-Z])[.):,]\)?\s*(.+)$", re.DOTALL)
PHRASE = re.compile(r"(?:(?i:answer is|answer|correct (?:option|choice) is|option is|choose)|答案是?)"
                    r"\s*[:：]?\s*(?:\*\*)?\(?([A-Z])(?![A-Za-z0-9'’])")
NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|cannot|can't|isn't|aren't|wasn't|doesn't|don't|without)\b", re.I)
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
START, GOAL, HOLE = 1, 2, -1  # of a VSP map; 0 is safe
NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
UNITS = re.compile(r"(?<=\d)\s*(?:%|percent|degrees?|°|dollars?|cm|mm|km|m|kg|g|mph|meters?|metres?|feet|ft|inches)$")


@dataclass(frozen=True)
class Extraction:
    """The option letter read off a reply, None if unresolved, and the name of the rule that decided."""

    letter: str | None
    rule: str


def find_box(text: str) -> tuple[str, bool] | None:
    """Return (content, closed) of the last box that closes, else of a box left open at the end; None without a box."""
    found = None
    for match in BOX.finditer(text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                found = (text[match.end():end], True)
                break
        else:
            found = found or (text[match.end():], False)
    return found


def last_boxed(text: str) -> str | None:
    """Return what the last box holds, without the wrappers of LaTeX; None if there is no box."""
    box = find_box(text)
    return unwrap(box[0]) if box else None


def unwrap(text: str) -> str:
    """Take off LaTeX's wrappers and marks around an answer: \\text{}, $, **, brackets around one letter."""
    before = None
    while before != text:
        before, text = text, text.strip().strip("$*").strip()
        if match := WRAPPER.match(text):
            text = match[1]
    return text


def normalize(text: str) -> str:
    """Return an answer in the form that comparisons use: case, articles, number words, separators, light units."""
    text = unwrap(text).lower().strip(" .,:;!?\"'")
    text = re.sub(r"^(?:an?|the)\s+", "", re.sub(r"\s+", " ", text))
    text = " ".join(NUMBER_WORDS.get(word, word) for word in text.split(" "))
    return UNITS.sub("", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)).removeprefix("$").strip()


def answers_match(one: str, other: str, options: dict[str, str] | None = None) -> bool:
    """Return whether two answers are the same after normalising; with options, a letter stands for its text."""
    def text_of(answer: str) -> str:
        letter = unwrap(answer).strip("() .").upper()
        if options and letter in options:
            return normalize(options[letter])
        labelled = LETTER_TEXT.match(unwrap(answer))
        if options and labelled and labelled[1] in options and normalize(labelled[2]) == normalize(options[labelled[1]]):
            return normalize(labelled[2])
        return normalize(answer)

    return text_of(one) == text_of(other)


def mentioned(text: str, options: dict[str, str]) -> list[str]:
    """Return the letters whose text stands in `text` as whole words; of nested options only the longest counts."""
    spans = []
    for letter, option in options.items():
        words = r"\s+".join(map(re.escape, option.strip(" .").split()))
        if words:
            spans += [(m.start(), m.end(), letter) for m in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.I)]
    return sorted({letter for start, end, letter in spans
                   if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)})


def resolve(content: str, options: dict[str, str]) -> tuple[str | None, str]:
    """Resolve what a box or tag holds: (letter, letter | letter_text | text | text_in | conflict | unresolved)."""
    text = unwrap(content)
    bare = text.strip("() .:").upper()
    if bare in options:
        return bare, "letter"
    if (match := LETTER_TEXT.match(text)) and match[1] in options:
        named = [k for k, option in options.items() if normalize(option) == normalize(match[2])] or mentioned(match[2], options)
        if not named or match[1] in named:
            return match[1], "letter_text"
        return None, "conflict"
    same = [letter for letter, option in options.items() if normalize(option) == normalize(text)]
    if len(same) == 1:
        return same[0], "text"
    inside = mentioned(text, options)
    return (inside[0], "text_in") if len(inside) == 1 else (None, "unresolved")


def extract_choice(output: str, options: dict[str, str], finish_reason: str | None = None) -> Extraction:
    """Return the option that a reply chooses, and the rule that says so (reference order: see the module).

    `finish_reason` "length" (cut off) switches the rule off that reads the last sentence.
    """
    text = CONTROL.sub("", LATENT_SPANS.sub("", output)).strip()
    if not text:
        return Extraction(None, "empty")
    if box := find_box(text):
        letter, how = resolve(box[0], options)
        return Extraction(letter, ("boxed_" if box[1] else "boxed_open_") + how)
    if tags := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.I):
        letter, how = resolve(tags[-1], options)
        return Extraction(letter, f"tag_{how}")
    short = "\n" not in text and len(text) <= BARE_CHARACTERS
    if short:
        letter, how = resolve_bare(text, options)
        if letter:
            return Extraction(letter, f"bare_{how}")
    if phrases := [match[1] for match in PHRASE.finditer(text) if match[1] in options]:
        return Extraction(phrases[-1], "phrase")
    found = mentioned(text, options)
    brief = len(text) <= max(BRIEF_CHARACTERS, 2 * sum(map(len, options.values())))
    if short and brief and len(found) == 1 and not NEGATION.search(text):
        return Extraction(found[0], "bare_text_in")
    last = [sentence for sentence in SENTENCE.split(text) if sentence.strip()][-1]
    found = mentioned(last, options)
    if finish_reason != "length" and len(found) == 1 and not NEGATION.search(last):
        return Extraction(found[0], "tail_text")
    return Extraction(None, "unresolved")


def resolve_bare(text: str, options: dict[str, str]) -> tuple[str | None, str]:
    """Resolve a reply of one line that is an answer and nothing else: letter, letter_text or text."""
    plain = unwrap(text)
    bare = plain.strip("() .:").upper()
    if bare in options:
        return bare, "letter"
    if (match := LETTER_TEXT.match(plain)) and match[1] in options and \
            normalize(match[2]).startswith(normalize(options[match[1]])):
        return match[1], "letter_text"
    same = [letter for letter, option in options.items() if normalize(option) == normalize(plain)]
    return (same[0], "text") if len(same) == 1 else (None, "unresolved")


def walk_vsp(map_desc: list[list[int]], text: str) -> bool:
    """Return whether the boxed moves lead from start to goal, as Mirage scores them (src/task.py, simulate_vsp).

    Only the letters U, D, L, R of the upper-cased box count; a step off the board is ignored, a hole fails at once, and
    the last cell must be the goal. No box is a failure.
    """
    box = find_box(text)
    if box is None:
        return False
    cells = {(r, c): value for r, row in enumerate(map_desc) for c, value in enumerate(row)}
    place = next(cell for cell, value in cells.items() if value == START)
    for move in re.findall("[UDLR]", box[0].upper()):
        step = place[0] + MOVES[move][0], place[1] + MOVES[move][1]
        place = step if step in cells else place
        if cells[place] == HOLE:
            return False
    return cells[place] == GOAL
