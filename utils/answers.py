"""Read an answer out of a model's reply, and compare answers. No judge, no guess: what is not clear stays
unresolved.

The rules of `extract_choice`, in order, each with the name that results carry:
  empty              nothing is left once special tokens and latent spans are gone
  boxed_*            the last \boxed{} or \fbox{} decides, nothing below is tried (boxed_open_* if none
  closes)
  tag_*              the last <answer>...</answer>, read like a box
  bare_*             a reply of one line that is a letter, "B. red" or exactly an option's text
  phrase             the last "answer is" / "answer:" / "choose" ... followed by a capital option letter
  bare_text_in       a short reply of one line that names exactly one option
  tail_text          the last sentence names exactly one option (not for a reply cut off at its token limit)
  unresolved         none of these
A box, tag or bare reply is letter | letter_text | text | text_in | conflict | unresolved; conflict is a
letter with another option's text, or with a phrase that chooses another. Texts match as whole words, the
longest where they nest; a negated or questioned text is no answer, nor one beside another option's letter.
"""
import re
import unicodedata
from typing import NamedTuple

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
LETTER = re.compile(r"(?i:\b(?:option|choice|answer)(?: is)?:?\s*)\(?[A-H]\b|\([A-H]\)")
# Spans that are latents or markers, never words: Monet, Mirage, LVR and the chat format.
LATENT_SPAN = re.compile(r"<abs_vis_token>.*?</abs_vis_token>|<\|latent_start\|>.*?<\|latent_end\|>"
                         r"|<\|lvr_start\|>.*?<\|lvr_end\|>", re.DOTALL)
# ltnt: a Monet fork's log
MARKER = re.compile(r"<\|[^<>|]*\|>|</?abs_vis_token(?:_pad)?>|</?observation>|<ltnt:\d+>")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"[{}]")
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
TEX = re.compile(r"\\(?:text\w*|math\w+|mbox|emph|boxed|fbox)\s*\{([^{}]*)\}")
MAX_DEPTH = 50  # commands within commands that are taken off an answer
BARE_LENGTH = 200  # characters of a one-line reply that is read as an answer
SHORT_LENGTH = 30  # characters; a reply of twice the options' summed length is short too (VLMEvalKit's bound)
PREFIX = re.compile(
    r"^(?:the\s+)?(?:(?:correct|final|right|best)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s+", re.I)
OPTION_WORD = re.compile(r"^(?:option|choice)\s+", re.I)
LETTER_TEXT = re.compile(r"\(?([A-Za-z])(\s*[.):,\-–]+\s*|\s+)(\S.*)", re.DOTALL)
PHRASE = re.compile(
    r"(?:(?i:answer\s+is|answer\s*[:：]|(?:option|choice)\s+is|choose|答案)\s*[是为:：]*)"
    r"\s*(?i:(?:the\s+)?(?:option|choice)\s+)?[\s*\"'“‘(\[{$（:]*([A-Z])(?![A-Za-z0-9]|['’]s|\W?\?)")
# "a red cup" with a capital
ARTICLE = re.compile(r"A\s+(?!because|since|as\b|for\b|which|based|given|is\b)[a-z]")
NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|except|unlike|rather than|instead of|whether)\b"
                      r"|n['’]t\b|\?")
CAPITAL = re.compile(r"(?<![A-Za-z0-9'’])[A-Z](?![A-Za-z0-9'’])")
# The period of "A. red B. blue" ends no sentence.
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)[\"'”’)]*\s+|(?<=[。！？])|\n+")
EDGES = " \t\n.,;:!\"'“”‘’*_`。"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)}
UNITS = {"percent": "%", "°": "degree", "degrees": "degree", "dollars": "$", "dollar": "$",
         "centimeters": "cm",
         "centimeter": "cm", "meters": "m", "meter": "m", "kilometers": "km", "kilometer": "km",
         "inches": "inch",
         "seconds": "s", "second": "s", "minutes": "min", "minute": "min", "hours": "h", "hour": "h",
         "years": "year"}
QUANTITY = re.compile(r"(\$?)\s*([-+]?\d+(?:\.\d+)?)\s*(%|°|\$|[a-z]*)")
BARE_UNITS = {*UNITS, *UNITS.values(), ""}


class Extraction(NamedTuple):
    """The option's letter, None if the reply does not settle on one, and the rule that decided."""

    letter: str | None
    rule: str


def extract_choice(output: str, options: dict[str, str], finish_reason: str | None = None) -> Extraction:
    """Return which option (letter -> text) a reply chose. `finish_reason` "length" marks a reply that was cut
    off."""
    text = strip_markers(output)
    if not text:
        return Extraction(None, "empty")
    content, closed = find_box(text)
    if content is not None:
        return resolve(content, options, "boxed_" if closed else "boxed_open_")
    tags = TAG.findall(text)
    if tags:
        return resolve(tags[-1], options, "tag_")
    one_line = "\n" not in text and len(text) <= BARE_LENGTH
    if one_line:
        bare = resolve(text, options, "bare_")
        if bare.rule not in ("bare_text_in", "bare_unresolved"):
            # "A. red? No, the answer is B." chooses nothing that can be relied on
            said = find_phrase(text, options)
            return Extraction(None, "bare_conflict") if said and bare.letter not in (said, None) else bare
    letter = find_phrase(text, options)
    if letter:
        return Extraction(letter, "phrase")
    if one_line and len(text) <= max(SHORT_LENGTH, 2 * sum(map(len, options.values()))):
        letter = named_option(text, options)
        if letter:
            return Extraction(letter, "bare_text_in")
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence.strip(EDGES)]
    letter = named_option(sentences[-1], options) if sentences and finish_reason != "length" else None
    return Extraction(letter, "tail_text" if letter else "unresolved")


def strip_markers(output: str) -> str:
    """Return a reply without special tokens, latent spans and whitespace around it."""
    return MARKER.sub("", LATENT_SPAN.sub("", output)).strip()


def closing_braces(text: str, start: int = 0) -> dict[int, int]:
    """Return {place after an opening brace: place of the brace that closes it} from `start` on, in one pass.
    """
    found, opened = {}, []
    for match in BRACE.finditer(text, start):
        if match[0] == "{":
            opened.append(match.end())
        elif opened:
            found[opened.pop()] = match.start()
    return found


def find_box(text: str) -> tuple[str | None, bool]:
    """Return (content, True) of the last box that closes, else (the rest of its line, False) of one that does
    not."""
    content, end, left_open = None, 0, None
    boxes = list(BOX.finditer(text))
    closing = closing_braces(text, boxes[0].start()) if boxes else {}
    for match in boxes:
        if match.start() < end:
            continue  # a box inside a box: the outer one holds it
        if match.end() in closing:
            end = closing[match.end()]
            content = text[match.end():end]
        else:
            left_open = match.end()
    if content is None and left_open is not None:
        return text[left_open:].split("\n")[0], False
    return content, content is not None


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{} or \\fbox{} holds (one left open if none closes), unwrapped, or None."""
    content = find_box(text)[0]
    return None if content is None else unwrap(content)


def unwrap(text: str) -> str:
    """Remove TeX text commands, quotes, emphasis and brackets that enclose all of `text`."""
    if text.isalnum():
        return text
    previous = None
    for _ in range(MAX_DEPTH):
        if text == previous:
            break
        previous = text
        text = TEX.sub(r"\1", text).replace("\\%", "%").strip(EDGES)
        enclosed = len(text) > 1 and text[0] + text[-1] in ("()", "[]", "{}", "（）", "$$")
        if enclosed and not set(text[1:-1]) & set("()[]{}"):
            text = text[1:-1]
    return text


def resolve(content: str, options: dict[str, str], prefix: str) -> Extraction:
    """Read a short stretch of text that is meant to be the answer; see the module's docstring for the
    outcomes."""
    label = OPTION_WORD if prefix == "bare_" else PREFIX  # "answer: B" outside of a box is a phrase
    text = unwrap(label.sub("", unwrap(content)))
    if text.upper() in options:
        return Extraction(text.upper(), prefix + "letter")
    exact = [letter for letter, option in options.items() if fold(text) == fold(option)]
    if len(exact) == 1:
        return Extraction(exact[0], prefix + "text")
    match = LETTER_TEXT.fullmatch(text)
    if match and match[1].upper() in options:
        letter, rest = match[1].upper(), match[3]
        spans = find_options(rest, options)
        named = {found for _, _, found in spans} | {other for other in options if other
                                                    == unwrap(rest) != letter}
        agrees = letter in {found for start, _, found in spans if start
                            == 0} or unwrap(rest) == options[letter]
        # a sentence's first word can be "A", or "B" after "Option" was removed
        if match[2].strip() or prefix != "bare_":
            agrees = agrees or named_option(rest, options) == letter
        if agrees:
            return Extraction(letter, prefix + "letter_text")
        if match[2].strip():  # with a mark between, the letter was meant as one
            if named and letter not in named:
                return Extraction(None, prefix + "conflict")
            if not named and prefix != "bare_":
                return Extraction(letter, prefix + "letter_text")
    letter = named_option(text, options)
    return Extraction(letter, prefix + ("text_in" if letter else "unresolved"))


def find_phrase(text: str, options: dict[str, str]) -> str | None:
    """Return the letter of the last "answer is B" or its like."""
    text = TEX.sub(r"\1", text)
    found = [match[1] for match in PHRASE.finditer(text)
             if match[1] in options and not ARTICLE.match(text, match.start(1))]
    return found[-1] if found else None


def fold(text: str) -> str:
    """Return text for whole-word comparison: lower case, single spaces, no marks around, no leading article.
    """
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip(EDGES)
    return re.sub(r"^(?:the|an|a) (?=\S)", "", text)


def find_options(text: str, options: dict[str, str]) -> list[tuple[int, int, str]]:
    """Return (start, end, letter) of every option's text in `fold(text)` as whole words, of nested ones the
    longest."""
    text, spans = fold(text), []
    for letter, option in options.items():
        word = re.escape(fold(option))
        edges = r"(?<![a-z0-9à-ÿ])(?<!\d[.,])" + r"(?<!-)" * word[:1].isdigit(), r"(?![a-z0-9à-ÿ])(?![.,]\d)"
        if not word or not word[-1].isascii():  # no spaces between words: Chinese
            edges = "", ""
        spans += [(m.start(), m.end(), letter) for m in re.finditer(edges[0] + word + edges[1], text) if m[0]]
    return [(start, end, letter) for start, end, letter in spans
            if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)]


def named_option(text: str, options: dict[str, str]) -> str | None:
    """Return the letter of the one option that `text` names without negating or asking; None for none or
    several, and where another option's letter stands beside it: "The right one is B", of A. right and B.
    left, does not name A."""
    spans = find_options(text, options)
    if len({letter for _, _, letter in spans}) != 1 or lone_letters(text, options) - {spans[0][2]}:
        return None
    rest, covered = fold(text), {i for start, end, _ in spans for i in range(start, end)}
    around = "".join(" " if i in covered else character for i, character in enumerate(rest))
    return None if NEGATION.search(around) or text.rstrip().endswith("?") else spans[0][2]


def lone_letters(text: str, options: dict[str, str]) -> set[str]:
    """Return the option letters that stand by themselves in `text`, but for the article "A" and those in
    options' texts."""
    found = {match[0] for match in CAPITAL.finditer(text) if match[0] in options
             and not ARTICLE.match(text, match.start())}
    return found - set(CAPITAL.findall(" ".join(options.values())))


def normalize(text: str) -> str:
    """Return an answer in one spelling: case, articles, number words, units and marks evened out."""
    box = last_boxed(text)
    text = unwrap(unicodedata.normalize("NFKC", text if box is None else box)).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!^)\bthe |^(?:the|an|a) |(?<=\s)(?:an|a) (?=\w)", "", text)
    words = [word.strip(EDGES) or word for word in text.split()]
    return " ".join(UNITS.get(word, word) for word in (NUMBER_WORDS.get(word, word) for word in words))


def answers_match(a: str, b: str, options: dict[str, str] | None = None) -> bool:
    """Return whether two answers say the same; with options, a letter says its option's text. Nothing is no
    answer."""
    if a == b and a.isalnum():
        return True
    if options:
        letters = [resolve(text if (box := last_boxed(text)) is None else box, options, "")
                   for text in (a, b)]
        chosen = [found.letter for found in letters if found.rule in ("letter", "letter_text", "text")]
        if len(chosen) == 2:
            return chosen[0] == chosen[1]
    a, b = normalize(a), normalize(b)
    if not a or not b:
        return False
    return a == b or same_quantity(a, b)


def same_quantity(a: str, b: str) -> bool:
    """Return whether two normalised answers are one number, in one unit or with the unit left out of one of
    them."""
    found = [QUANTITY.fullmatch(text) for text in (a, b)]
    if None in found or float(found[0][2]) != float(found[1][2]):
        return False
    units = [UNITS.get(unit, unit) for unit in (match[1] or match[3] for match in found)]
    return units[0] == units[1] or ("" in units and set(units) <= BARE_UNITS)


def vsp_moves(text: str) -> str | None:
    """Return the letters U, D, L, R of the last \\boxed{} in a reply, upper-cased; None if no box closes
    (Mirage)."""
    start = text.rfind("\\boxed{")
    begin = start + len("\\boxed{")
    end = closing_braces(text).get(begin) if start >= 0 else None
    content = None if end is None else text[begin:end]
    return None if content is None else "".join(move for move in content.upper() if move in "UDLR")


def walk_vsp(map_desc: list[list[int]], text: str) -> bool:
    """Return whether the moves in a reply lead from start (1) to goal (2) of a map, as Mirage scores it
    (src/task.py).

    A move off the board is ignored, a hole (-1) fails at once, and the walk must end on the goal, not just
    touch it.
    """
    row, column = next((i, line.index(1)) for i, line in enumerate(map_desc) if 1 in line)
    for move in vsp_moves(text) or "":
        step_down, step_right = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}[move]
        if 0 <= row + step_down < len(map_desc) and 0 <= column + step_right < len(map_desc[0]):
            row, column = row + step_down, column + step_right
        if map_desc[row][column] == -1:
            return False
    return map_desc[row][column] == 2


def strip_label(option: str) -> str:
    return re.sub(r"^\(?[A-H][).:]\s+", "", option)
