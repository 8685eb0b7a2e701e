r"""Read an answer from a model's reply, and compare answers. An unclear reply stays unresolved.

The places in which `extract_choice` looks, in order, with the names that results carry:
  empty              nothing is left without thoughts, tool calls, special tokens and latent spans
  boxed_*            the last \boxed{}, \fbox{} or GLM box (boxed_open_*: none closes)
  tag_*              the last <answer>...</answer>, or <conclusion>, <solution>, <choice> and the like
  json_*             the last value of a key "answer", "final_answer", "choice" or the like
  bare_*             a reply of one line that is a letter, "B. red" or exactly an option's text
  phrase             the last "answer is" / "answer:" / "I choose" / "B is correct" ... (utils.phrases)
  first_letter       a first line that is, or begins with, an option's letter and a mark
  last_letter        a last line that is a letter, or a letter with its text
  bare_text_in       a short reply that names exactly one option, or begins with one ("Yes, ...")
  tail_text          the last sentence names exactly one option (not in a reply cut off at its token limit),
                     or the first of two, if the other says more about the same thing
  unresolved         none of these
A box, tag, value or bare reply is letter | letter_text | text | text_in | conflict | unresolved; conflict is
a letter with another option's text, or two places that differ. What a box leaves open, only a phrase after it
decides. A later "wait" or "but" that names another option takes a letter back ("corrected").
"""
import re
from typing import NamedTuple

from utils.phrases import (CJK, CJK_OPTION, NOUN, OPTION_NOUN, find_options, find_phrase, is_corrected,
                           lone_letters, named_option, split_sentences, without_contrast)
from utils.reply_text import EDGES, TEX, UNITS, find_boxes, fold, last_boxed, unwrap, visible

LETTER = re.compile(r"(?i:\b(?:option|choice|answer)(?: is)?:?\s*)\(?[A-H]\b|\([A-H]\)")
TAG_NAME = r"(?:final_?)?(?:answer|ans|choice|option|result)|conclusion|solution|final"
TAG = re.compile(rf"<(?:{TAG_NAME})>(.*?)(?:</(?:{TAG_NAME})\b>?|\Z)", re.DOTALL | re.IGNORECASE)
JSON_KEY = re.compile(
    r"[\"'](?:(?:final|correct|selected|chosen|predicted|best)[_ ]?)?(?:answer|choice|option|letter|result"
    r"|prediction|答案)(?:[_ ]?(?:letter|choice|option))?[\"']\s*:\s*\[?\s*(?:\"([^\"\n]*)\"|'([^'\n]*)'"
    r"|([\w.+-]+))(?!\s*,\s*[\"']?[\w .]+[\"']?[,\]])", re.IGNORECASE)
PLACEHOLDER = re.compile(
    r"[\s.…_]*|(?i:\W*(?:(?:your|the|final|correct|option|insert)\s+)*(?:answer|letter|choice)"
    r"(?:\s+(?:letter|here|choice))*\W*)|(?:[A-H]\s*[/|]\s*){2,}[A-H]")
BARE_LENGTH = 200  # characters of a one-line reply that is read as an answer
SHORT_LENGTH = 30  # characters; a reply of twice the options' summed length is short too (VLMEvalKit's bound)
PREFIX = re.compile(rf"^(?:the\s+)?(?:(?:correct|final|right|best)\s+)?(?:(?:{NOUN})(?!\w)|{CJK})"
                    r"(?:\s+(?:is|ist|es|est|é|è)(?!\w)|[是为])?\s*:?\s*(?=\S)", re.I)
OPTION_WORD = re.compile(rf"^(?:(?:final|correct)\s+)?(?:(?:{OPTION_NOUN})(?!\w)|{CJK_OPTION}|答案)\s*:?\s*"
                         r"(?=\W*[A-Z]\b)", re.I)
LETTER_TEXT = re.compile(r"\(?([A-Za-z])(\s*(?:[.):,\-–—、。/]|→|->|=>)+\s*|\s+)(\S.*)", re.DOTALL)
LONE = re.compile(r"[^\w?°%+&!≠¬~❌✗✘]*([A-Za-z])[^\w?°%+&#=/'’–—❌✗✘-]*")
LIST_ITEM = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])[.):]\s+\S")
LINE_MARK = re.compile(r"^(?:\s*(?:[-*•>#✅→]+|\d+[.)])\s+)+|^\s*[✅→]+\s*|^#+\s*")
LEAD_WORD = re.compile(
    r"^\W*(?i:(?:so|thus|hence|therefore|final|conclusion|option|probably|sure|okay|certainly|definitely"
    r"|clearly)\b|应该是)[\s,:!]*(?=\W*[A-Z]\b)")
NOT = re.compile(r"(?:\bnot|\bnever|n['’]t|rather than|instead of|\bnicht|\bpas|不是|而非)[\s*_]*(?:\\\(|\$)*$")
REASON = re.compile(r"(?:because|since|as (?:it|the|they)|due to|denn|weil|car|porque|因为)(?![A-Za-z])")
FURTHER = re.compile(r"(?:It|They|He|She|This) (?!.*(?:\b(?:not?|un\w+|only)\b|n['’]t\b|\?))")
OR = re.compile(r"[\s$.]*(?:or|and|,|/|或|oder|ou|o)[\s$.]*")
DENIED = re.compile(
    r"\b(?:is|was|are|seems|looks|would be|can be)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false|excluded|ruled out"
    r"|impossible|not (?:the )?(?:correct|right|answer|it))\b|^\W*[^.]{0,60}[:–—-]\s*(?:no|wrong|incorrect)\b"
    r"|^\W*wrong|n['’]t (?:the )?(?:correct|right|answer)", re.IGNORECASE)
YES_NO_FIRST = re.compile(
    r"\W*(yes|no|ja|nein|oui|non|sí|si|sim|não|да|нет|是|否|はい|いいえ|예|네|아니요)\b(?=[\s*_)\"']*"
    r"(?:[^\w\s?/|*_)\"']|\n|$)|\s+(?:it|there|the|this|that|they|we|he|she|i|because|as|\1"
    r"|(?:and|but)(?! yes| no))\b)", re.IGNORECASE)
STEP = re.compile(r"^\d\d?[.)] (?=.*\n)|\bstep \d+\b", re.IGNORECASE | re.MULTILINE)
HEAD_END = re.compile(rf"[.!]\s|\n|,?\s(?={REASON.pattern})")
QUANTITY = re.compile(
    r"([$€£¥]?)\s*([-+]?\d+(?:\.\d+)?(?:e[-+]?\d{1,2})?)(?:/(\d+(?:\.\d+)?))?\s*([%°$€£¥]|km/h|[a-z]*)")
BARE_UNITS = {*UNITS.values(), *"£¥", "mph", "km/h", ""}


class Extraction(NamedTuple):
    """The option's letter, if the reply settles on one, and the rule that decided."""

    letter: str | None
    rule: str


def extract_choice(output: str, options: dict[str, str], finish_reason: str | None = None) -> Extraction:
    """Return which of {letter: text} a reply chose."""
    text = without_options(visible(output), options)
    if not text:
        return Extraction(None, "empty")
    phrase, place = find_phrase(text, options)
    marked, label = find_marked(text)
    if marked:
        choice, end = read_marked(marked, label, text, options, finish_reason)
        if place >= end and choice.letter is None and phrase and not choice.rule.endswith("conflict"):
            return Extraction(phrase, "phrase")
        if choice.letter and (place >= end and phrase != choice.letter
                              or is_corrected(text[end:], choice.letter, options)):
            return Extraction(None, label + "conflict")
        return choice
    choice = read_plain(text, options, phrase)
    if choice is None:
        return read_text(text, options, finish_reason)
    start = place if choice.rule == "phrase" else 0
    if choice.letter and choice.rule != "last_letter" and is_corrected(
            text[start:], choice.letter, options, skip=choice.rule != "phrase"):
        return Extraction(None, "corrected")
    return choice


def read_plain(text: str, options: dict[str, str], phrase: str | None) -> Extraction | None:
    """Return what a letter in a reply without box, tag or key says; None if there is none."""
    if "\n" not in text and len(text) <= BARE_LENGTH:
        bare = resolve(text, options, "bare_", strict=True)
        if bare.rule not in ("bare_text_in", "bare_unresolved"):
            if phrase and bare.letter not in (phrase, None):  # "A. red? No, the answer is B."
                return Extraction(None, "bare_conflict")
            return bare
    if phrase:
        return Extraction(phrase, "phrase")
    lines = [line for line in text.split("\n") if line.strip(EDGES)]
    heads = [LETTER_TEXT.match(unwrap(line)) for line in lines]
    listed = {head[1] for head in heads if head and head[1] in options and head[2].strip(" ,")}
    first = first_letter(lines[0], options) if lines else None
    last = line_letter(lines[-1], options) if len(lines) > 1 else None
    if len(listed) > 1:  # a list of options
        first, last = (line_letter(lines[place], options, alone=True) for place in (0, -1))
        if not (first or last) and heads[-1] and heads[-1][1] in listed:
            return Extraction(None, "unresolved")
    stated = resolve(lines[-1], options, strict=True) if first and len(lines) > 1 else Extraction(None, "")
    if first and (last or stated.rule == "text" and stated.letter) not in (first, None, False):
        return Extraction(None, "bare_conflict")
    if last:
        return Extraction(last, "last_letter")
    return Extraction(first, "first_letter") if first else None


def read_text(text: str, options: dict[str, str], finish_reason: str | None) -> Extraction:
    """Return the option that a reply without any letter names in words."""
    if letter := leading_option(text, options):
        return Extraction(letter, "bare_text_in")
    sentences = [PREFIX.sub("", line.replace("**", "")) for line in split_sentences(STEP.sub("", text))]
    letter = named_option(sentences[-1], options) if sentences and finish_reason != "length" else None
    if letter is None and finish_reason != "length" and len(sentences) == 2 and FURTHER.match(
            sentences[1]) and len(find_options(sentences[1], options)) < 2:
        letter = named_option(sentences[0], options)  # "The cup is red. It stands next to the black laptop."
    stated = {other for line in sentences for other, option in options.items() if fold(line) == fold(option)}
    letter = None if stated - {letter} else letter
    short = len(sentences) == 1 and len(text) <= max(SHORT_LENGTH, 2 * sum(map(len, options.values())))
    return Extraction(letter, ("bare_text_in" if short else "tail_text") if letter else "unresolved")


def without_options(text: str, options: dict[str, str]) -> str:
    """Return text without the lines that list the options; a line that repeats one of them stays."""
    lines, echoes = text.split("\n"), {}
    for number, line in enumerate(lines):
        head = LETTER_TEXT.fullmatch(line.strip(" \t*_-"))
        new = head and head[1] in options and head[1] not in echoes.values()
        if new and head[2].strip() and fold(head[3]) == fold(options[head[1]]):
            echoes[number] = head[1]
    if len(echoes) < 2:
        return text
    return "\n".join(line for number, line in enumerate(lines) if number not in echoes).strip()


def find_marked(text: str) -> tuple[list[tuple[int, int, str, bool]], str]:
    """Return the boxes, else tags, else JSON values, as (start, end, content, closed), and a name."""
    tags = [(m.start(), m.end(), m[1], m[0].endswith(">")) for m in TAG.finditer(text)]
    keys = [(m.start(), m.end(), m[1] or m[2] or m[3] or "", True) for m in JSON_KEY.finditer(text)]
    for found, label in ((find_boxes(text), "boxed_"), (tags, "tag_"), (keys, "json_")):
        real = [place for place in found if not PLACEHOLDER.fullmatch(place[2])
                and not NOT.search(text[max(0, place[0] - 20):place[0]])]
        if real:
            return real, label
    return [], ""


def read_marked(marked: list, label: str, text: str, options: dict[str, str],
                finish_reason: str | None) -> tuple[Extraction, int]:
    """Return what the last marked place says, and where it ends."""
    start, end, content, closed = marked[-1]
    if not closed and label == "boxed_":
        if finish_reason == "length":
            return Extraction(None, "boxed_open_unresolved"), end
        return resolve(content, options, "boxed_open_"), end
    nested, _ = find_phrase(content, options)
    choice = resolve(content, options, label)
    if choice.letter is None and nested and label == "tag_" and not choice.rule.endswith("conflict"):
        choice = Extraction(nested, label + "letter")
    if not closed and finish_reason == "length" and not choice.rule.endswith("letter"):
        choice = Extraction(None, label + "unresolved")
    if len(marked) > 1 and OR.fullmatch(TEX.sub(r"\1", text[marked[-2][1]:start])):
        if resolve(marked[-2][2], options).letter != choice.letter:
            choice = Extraction(None, label + "conflict")
    return choice, end


def resolve(content: str, options: dict[str, str], label: str = "", strict: bool = False) -> Extraction:
    """Read a short text that is meant to be the answer; the rule is `label` + an outcome listed above. In a
    bare reply (`strict`) "answer: B" is a phrase and a first word "A" may be the article."""
    text = unwrap((OPTION_WORD if strict else PREFIX).sub("", unwrap(content)))
    lone = LONE.fullmatch(text)
    if lone and lone[1].upper() in options and "!" + lone[1] not in content:
        return Extraction(lone[1].upper(), label + "letter")
    exact = [letter for letter, option in options.items() if fold(text) == fold(option)]
    exact = exact or [letter for letter, option in options.items() if same_quantity(fold(text), fold(option))]
    if len(exact) == 1:
        return Extraction(exact[0], label + "text")
    if (kept := without_contrast(text, options)) != text:
        return resolve(kept, options, label, strict)
    match = LETTER_TEXT.fullmatch(text)
    if match and match[1].upper() in options:
        letter, mark, rest = match[1].upper(), match[2].strip(), match[3]
        spans = find_options(rest, options)
        agrees = unwrap(rest) == options[letter] or fold(rest) == fold(options[letter]) or any(
            start == 0 and named == letter for start, _, named in spans)
        if mark or not strict:
            agrees = agrees or named_option(rest, options) == letter
        names = {named for _, _, named in spans}
        more = {m[1] for m in LIST_ITEM.finditer(rest)} & set(options) or not mark and names - {letter}
        if agrees and (more or DENIED.search(rest)):
            return Extraction(None, label + "unresolved")
        if agrees:
            return Extraction(letter, label + "letter_text")
        if mark:  # the letter was meant as an option's
            names |= ({unwrap(rest)} & set(options) if strict else lone_letters(rest, options)) - {letter}
            if names and letter not in names:
                return Extraction(None, label + "conflict")
            if not names and not strict:
                return Extraction(letter, label + "letter_text")
    letter = leading_option(text, options) or named_option(text, options)
    return Extraction(letter, label + ("text_in" if letter else "unresolved"))


def leading_option(text: str, options: dict[str, str]) -> str | None:
    """Return the letter of the option with which a text begins: "Red, because ...", "No, it is not red"."""
    letters = {fold(option): letter for letter, option in options.items()}
    first = YES_NO_FIRST.match(text)
    head, *rest = [first[1], text[first.end():]] if first else HEAD_END.split(text, maxsplit=1)
    letter = letters.get(fold(PREFIX.sub("", head.replace("**", "")))) if rest else None
    others = {letters.get(fold(line)) for line in split_sentences("".join(rest))} - {letter, None}
    return None if others or letter and is_corrected(rest[0], letter, options) else letter


def first_letter(line: str, options: dict[str, str]) -> str | None:
    """Return the letter with which a reply begins: alone, with its text, or with an explanation."""
    if letter := line_letter(line, options):
        return letter
    head = LETTER_TEXT.match(line.lstrip(" \t*_#>-("))
    if not head or head[1] not in options or not (set(head[2]) & set(".):*。") or REASON.match(head[3])):
        return None
    names = {named for _, _, named in find_options(split_sentences(head[3])[0], options)}
    others = lone_letters(head[3], options) - {head[1]} if not REASON.match(head[3]) else set()
    asks = "?" in head[3] or DENIED.search(head[3]) or names and (head[1] not in names or " or " in head[3])
    return None if asks or others else head[1]


def line_letter(line: str, options: dict[str, str], alone: bool = False) -> str | None:
    """Return the letter that a line is, or is with its option's text."""
    if len(line) > BARE_LENGTH:
        return None
    line = LEAD_WORD.sub("", line)
    choice = resolve(LINE_MARK.sub("", line), options, strict=True)
    return choice.letter if choice.rule in (("letter",) if alone else ("letter", "letter_text")) else None


# ---- comparing answers
def normalize(text: str) -> str:
    """Return an answer in one spelling of case, articles, number words, units and marks."""
    box = last_boxed(text)
    text = re.sub(r",(?=\S)", ", ", fold(unwrap(text if box is None else box)))
    text = re.sub(r"(?<!^)\bthe |^(?:the|an|a) |(?<=\s)(?:an|a) (?=\w)", "", text)
    return " ".join(word.strip(EDGES) or word for word in text.split())


def answers_match(a: str, b: str, options: dict[str, str] | None = None) -> bool:
    """Return whether two answers are the same and not empty; with options, a letter is its text."""
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
    if None in matches:
        return False
    below = [float(match[3] or 1) for match in matches]
    if 0 in below or float(matches[0][2]) / below[0] != float(matches[1][2]) / below[1]:
        return False
    units = [match[1] or match[4] for match in matches]
    return units[0] == units[1] or ("" in units and set(units) <= BARE_UNITS)


def strip_label(option: str) -> str:
    """Return an option's text without its own "A." or "(A)"."""
    return re.sub(r"^\(?[A-H][).:]\s+", "", option)
