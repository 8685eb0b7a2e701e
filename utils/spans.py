"""Find, read and replace text imaginations: the spans of a reply or chain between OPEN and CLOSE.

    I look closer. <think_image>The hull shows a white 42.</think_image> The answer is \\boxed{42}.
"""
import re
from collections.abc import Sequence

from utils.answers import BOX

OPEN, CLOSE = "<think_image>", "</think_image>"
SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
# Each alternative starts with a literal character: four times as fast as a character class.
SENTENCE_BREAK = re.compile(r"\.\s+|!\s+|\?\s+|\n\n*|</think>|</think_image>\s*")


def mark(text: str) -> str:
    """Return a text as an imagination."""
    return f"{OPEN}{text}{CLOSE}"


def find_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of every imagination before the first box, without the marks."""
    boxed = text.find("\\boxed")
    return [match.span(1) for match in SPAN.finditer(text, 0, len(text) if boxed < 0 else boxed)]


def passages(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return the text of each span."""
    return [text[start:end] for start, end in spans]


def put_spans(text: str, spans: list[tuple[int, int]], after: Sequence[str]) -> str:
    """Return `text` with its spans replaced by `after`."""
    for (start, end), span in zip(reversed(spans), reversed(after), strict=True):  # so that offsets hold
        text = text[:start] + span + text[end:]
    return text


def after_marks(text: str, end: int) -> int:
    """Return the place after the closing mark of a span that ends at `end`."""
    return end + len(CLOSE) if text.startswith(CLOSE, end) else end


def conclusion(text: str) -> str:
    """Return the text after the last imagination, or all of it."""
    spans = find_spans(text)
    return text[after_marks(text, spans[-1][1]):] if spans else text


def split_spans(text: str) -> tuple[list[str], str]:
    """Return (the imaginations of a whole chain, the chain without them)."""
    end = text.rfind(CLOSE) + len(CLOSE) if CLOSE in text else 0  # searching further takes quadratic time
    return SPAN.findall(text[:end]), SPAN.sub(" ", text[:end]) + text[end:]


def split_final(text: str) -> tuple[str, str]:
    """Split off the sentence with the last boxed answer and all text after it: (before, final)."""
    boxed = [match.start() for match in BOX.finditer(text)][-1]
    start = max((match.end() for match in SENTENCE_BREAK.finditer(text, 0, boxed)), default=0)
    return text[:start].strip(), text[start:].strip()
