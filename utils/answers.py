"""Read an answer from a model's reply, and compare answers. An unclear reply stays unresolved.

The rules of `extract_choice`, in order, with the names that results carry:
  empty              nothing is left without special tokens and latent spans
  boxed_*            the last \boxed{} or \fbox{} decides, no rule below is tried (boxed_open_*: none closes)
  tag_*              the last <answer>...</answer>, read like a box
  bare_*             a reply of one line that is a letter, "B. red" or exactly an option's text
  phrase             the last "answer is" / "answer:" / "choose" ... followed by a capital option letter
  bare_text_in       a short reply of one line that names exactly one option
  tail_text          the last sentence names exactly one option (not in a reply cut off at its token limit)
  unresolved         none of these
A box, tag or bare reply is letter | letter_text | text | text_in | conflict | unresolved; conflict is a
letter with another option's text, or with a phrase that chooses another letter.
"""
import re
import unicodedata
from typing import NamedTuple

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen nineteen twenty").split()
LETTER = re.compile(r"(?i:\b(?:option|choice|answer)(?: is)?:?\s*)\(?[A-H]\b|\([A-H]\)")
# never words: Monet, Mirage, LVR, the chat format; ltnt: the log of a Monet fork
LATENT_SPAN = re.compile(r"<abs_vis_token>.*?</abs_vis_token>|<\|latent_start\|>.*?<\|latent_end\|>"
                         r"|<\|lvr_start\|>.*?<\|lvr_end\|>", re.DOTALL)
SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>|</?abs_vis_token(?:_pad)?>|</?observation>|<ltnt:\d+>")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
TEX = re.compile(r"\\(?:text\w*|math\w+|mbox|emph|boxed|fbox)\s*\{([^{}]*)\}")
MAX_DEPTH = 50  # nested commands that are taken off an answer
BARE_LENGTH = 200  # characters of a one-line reply that is read as an answer
SHORT_LENGTH = 30  # characters; a reply of twice the options' summed length is short too (VLMEvalKit's bound)
PREFIX = re.compile(
    r"^(?:the\s+)?(?:(?:correct|final|right|best)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s+", re.I)
OPTION_WORD = re.compile(r"^(?:option|choice)\s+", re.I)
LETTER_TEXT = re.compile(r"\(?([A-Za-z])(\s*[.):,\-–]+\s*|\s+)(\S.*)", re.DOTALL)
PHRASE = re.compile(
    r"(?:(?i:answer\s+is|answer\s*[:：]|(?:option|choice)\s+is|choose|答案)\s*[是为:：]*)"
    r"\s*(?i:(?:the\s+)?(?:option|choice)\s+)?[\s*\"'“‘(\[{$（:]*([A-Z])(?![A-Za-z0-9]|['’]s|\W?\?)")
ARTICLE = re.compile(r"A\s+(?!because|since|as\b|for\b|which|based|given|is\b)[a-z]")  # "A red cup"
NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|except|unlike|rather than|instead of|whether)\b"
    r"|n['’]t\b|\?")
CAPITAL = re.compile(r"(?<![A-Za-z0-9'’])[A-Z](?![A-Za-z0-9'’])")
SENTENCE_END = re.compile(  # the period of "A. red B. blue" ends no sentence
    r"(?<=[.!?])(?<!\b[A-Z]\.)[\"'”’)]*\s+|(?<=[。！？])|\n+")
EDGES = " \t\n.,;:!\"'“”‘’*_`。"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)}
UNITS = {"percent": "%", "°": "degree", "degrees": "degree", "dollars": "$", "dollar": "$",
         "centimeters": "cm", "centimeter": "cm", "meters": "m", "meter": "m", "kilometers": "km",
         "kilometer": "km", "inches": "inch", "seconds": "s", "second": "s", "minutes": "min",
         "minute": "min", "hours": "h", "hour": "h", "years": "year"}
QUANTITY = re.compile(r"(\$?)\s*([-+]?\d+(?:\.\d+)?)\s*(%|°|\$|[a-z]*)")
BARE_UNITS = {*UNITS, *UNITS.values(), ""}


class Extraction(NamedTuple):
    """The option's letter, if the reply settles on one, and the rule that decided."""

    letter: str | None
    rule: str


def extract_choice(output: str, options: dict[str, str], finish_reason: str | None = None) -> Extraction:
    """Return which of {letter: text} a reply chose."""
    text = strip_markers(output)
    if not text:
        return Extraction(None, "empty")
    content, closed = find_box(text)
    if content is not None:
        return resolve(content, options, "boxed_" if closed else "boxed_open_")
    if tags := TAG.findall(text):
        return resolve(tags[-1], options, "tag_")
    one_line = "\n" not in text and len(text) <= BARE_LENGTH
    letter = find_phrase(text, options)
    if one_line:
        bare = resolve(text, options, "bare_", strict=True)
        if bare.rule not in ("bare_text_in", "bare_unresolved"):
            if letter and bare.letter not in (letter, None):  # "A. red? No, the answer is B."
                return Extraction(None, "bare_conflict")
            return bare
    if letter:
        return Extraction(letter, "phrase")
    if one_line and len(text) <= max(SHORT_LENGTH, 2 * sum(map(len, options.values()))):
        if letter := named_option(text, options):
            return Extraction(letter, "bare_text_in")
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence.strip(EDGES)]
    letter = named_option(sentences[-1], options) if sentences and finish_reason != "length" else None
    return Extraction(letter, "tail_text" if letter else "unresolved")


def strip_markers(output: str) -> str:
    return SPECIAL_TOKEN.sub("", LATENT_SPAN.sub("", output)).strip()


def closing_braces(text: str, start: int = 0) -> dict[int, int]:
    """Return {place after an opening brace: place of its closing brace} from `start` on."""
    closing, opened = {}, []
    for match in re.finditer("[{}]", text[start:]):
        if match[0] == "{":
            opened.append(start + match.end())
        elif opened:
            closing[opened.pop()] = start + match.start()
    return closing


def find_box(text: str) -> tuple[str | None, bool]:
    """Return (content of the last box that closes, True), else (rest of an open box's line, False)."""
    boxes = list(BOX.finditer(text))
    closing = closing_braces(text, boxes[0].start()) if boxes else {}
    content, end = None, 0
    for match in boxes:
        if match.start() >= end and match.end() in closing:  # not inside another box
            end = closing[match.end()]
            content = text[match.end():end]
    if content is None and boxes:
        return text[boxes[-1].end():].split("\n")[0], False
    return content, content is not None


def last_boxed(text: str) -> str | None:
    content = find_box(text)[0]
    return None if content is None else unwrap(content)


def unwrap(text: str) -> str:
    """Remove TeX text commands, and marks and brackets around all of `text`."""
    if text.isalnum():
        return text
    for _ in range(MAX_DEPTH):
        before = text
        text = TEX.sub(r"\1", text).replace("\\%", "%").strip(EDGES)
        enclosed = len(text) > 1 and text[0] + text[-1] in ("()", "[]", "{}", "（）", "$$")
        if enclosed and not set(text[1:-1]) & set("()[]{}"):
            text = text[1:-1]
        if text == before:
            break
    return text


def resolve(content: str, options: dict[str, str], label: str = "", strict: bool = False) -> Extraction:
    """Read a short text that is meant to be the answer; the rule is `label` + an outcome listed above. In a
    bare reply (`strict`) "answer: B" is a phrase and a first word "A" may be the article."""
    text = unwrap((OPTION_WORD if strict else PREFIX).sub("", unwrap(content)))
    if text.upper() in options:
        return Extraction(text.upper(), label + "letter")
    exact = [letter for letter, option in options.items() if fold(text) == fold(option)]
    if len(exact) == 1:
        return Extraction(exact[0], label + "text")
    match = LETTER_TEXT.fullmatch(text)
    if match and match[1].upper() in options:
        letter, mark, rest = match[1].upper(), match[2].strip(), match[3]
        spans = find_options(rest, options)
        agrees = unwrap(rest) == options[letter] or any(
            start == 0 and named == letter for start, _, named in spans)
        if mark or not strict:
            agrees = agrees or named_option(rest, options) == letter
        if agrees:
            return Extraction(letter, label + "letter_text")
        if mark:  # the letter was meant as an option's
            names = {named for _, _, named in spans}
            names |= {unwrap(rest)} & set(options) - {letter}
            if names and letter not in names:
                return Extraction(None, label + "conflict")
            if not names and not strict:
                return Extraction(letter, label + "letter_text")
    letter = named_option(text, options)
    return Extraction(letter, label + ("text_in" if letter else "unresolved"))


def find_phrase(text: str, options: dict[str, str]) -> str | None:
    text = TEX.sub(r"\1", text)
    letters = [match[1] for match in PHRASE.finditer(text)
               if match[1] in options and not ARTICLE.match(text, match.start(1))]
    return letters[-1] if letters else None


def fold(text: str) -> str:
    """Return text in lower case and single spaces, without outer marks or leading article."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).lower()).strip(EDGES)
    return re.sub(r"^(?:the|an|a) (?=\S)", "", text)


def find_options(text: str, options: dict[str, str]) -> list[tuple[int, int, str]]:
    """Return (start, end, letter) of each option in `fold(text)`: whole words, the longest if nested."""
    text, spans = fold(text), []
    for letter, option in options.items():
        word = re.escape(fold(option))
        if word and word[-1].isascii():  # Chinese has no spaces between words
            sign = r"(?<!-)" if word[0].isdigit() else ""
            word = rf"(?<![a-z0-9à-ÿ])(?<!\d[.,]){sign}{word}(?![a-z0-9à-ÿ])(?![.,]\d)"
        spans += [(m.start(), m.end(), letter) for m in re.finditer(word, text) if m[0]]
    return [(start, end, letter) for start, end, letter in spans
            if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)]


def named_option(text: str, options: dict[str, str]) -> str | None:
    """Return the letter of the only option that `text` names, without a negation, a question or another
    option's letter: "The right one is B" does not name A. right."""
    spans = find_options(text, options)
    if len({letter for _, _, letter in spans}) != 1 or lone_letters(text, options) - {spans[0][2]}:
        return None
    covered = {i for start, end, _ in spans for i in range(start, end)}
    around = "".join(" " if i in covered else character for i, character in enumerate(fold(text)))
    return None if NEGATION.search(around) or text.rstrip().endswith("?") else spans[0][2]


def lone_letters(text: str, options: dict[str, str]) -> set[str]:
    """Return the option letters among the words of `text`, without the article "A"."""
    letters = {match[0] for match in CAPITAL.finditer(text)
               if match[0] in options and not ARTICLE.match(text, match.start())}
    return letters - set(CAPITAL.findall(" ".join(options.values())))


def normalize(text: str) -> str:
    """Return an answer in one spelling of case, articles, number words, units and marks."""
    box = last_boxed(text)
    text = unwrap(unicodedata.normalize("NFKC", text if box is None else box)).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!^)\bthe |^(?:the|an|a) |(?<=\s)(?:an|a) (?=\w)", "", text)
    words = [word.strip(EDGES) or word for word in text.split()]
    return " ".join(UNITS.get(word, word) for word in (NUMBER_WORDS.get(word, word) for word in words))


def answers_match(a: str, b: str, options: dict[str, str] | None = None) -> bool:
    """Return whether two answers are the same and not empty; with options, a letter is its text."""
    if a == b and a.isalnum():
        return True
    if options:
        read = [resolve(text if (box := last_boxed(text)) is None else box, options) for text in (a, b)]
        letters = [choice.letter for choice in read if choice.rule in ("letter", "letter_text", "text")]
        if len(letters) == 2:
            return letters[0] == letters[1]
    a, b = normalize(a), normalize(b)
    return bool(a and b) and (a == b or same_quantity(a, b))


def same_quantity(a: str, b: str) -> bool:
    """Return whether two normalized answers are one number, with one unit or a unit on only one."""
    matches = [QUANTITY.fullmatch(text) for text in (a, b)]
    if None in matches or float(matches[0][2]) != float(matches[1][2]):
        return False
    units = [UNITS.get(unit, unit) for unit in (match[1] or match[3] for match in matches)]
    return units[0] == units[1] or ("" in units and set(units) <= BARE_UNITS)


def strip_label(option: str) -> str:
    """Return an option's text without its own "A." or "(A)"."""
    return re.sub(r"^\(?[A-H][).:]\s+", "", option)
