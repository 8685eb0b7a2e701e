"""Find the imaginations in a reply, and rewrite them by rules so that they speak for another option.

The editor that stands in for an LLM's: every mention of the right option's value becomes a wrong option's. It
refuses what it cannot do cleanly, with a reason of NOT_EDITABLE. `verify_directed` holds this editor and an
LLM (utils.intervene.text_conditions) to the same rules. No torch here.
"""
import re
from collections.abc import Sequence

OPEN, CLOSE = "<think_image>", "</think_image>"
SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
# Cues for replies without marks, written after reading V* replies of Monet-7B. Perception: words for looking,
# or for what is seen. Conclusion: words that lead to the answer, with what belongs before them.
PERCEPTION = re.compile(
    r"\b(?:zoom|appear|observ|focus|locat|examin|inspect|identif|imagin)\w*|\b(?:look|show|see)(?:s|n|ed|ing)?\b|\bvisible\b"
    r"|\bclos(?:e|er|est) (?:inspection|view)\b|\bin (?:the|this) (?:image|picture|photo|view|scene)\b",
    re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence)\b|\bso,? (?:the|my) (?:(?:correct|final|right|best) )?answer\b"
    r"|\b(?:the |my )?(?:correct|final|right|best|closest) (?:answer|option|choice)\b|\b(?:the|my) answer is\b|\banswer:"
    r"|\\boxed|<answer>",
    re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


# ------------------------------------------------------------------------------------ spans
def find_spans(text: str, by: str = "marks") -> list[tuple[int, int]]:
    """Return (start, end) in characters of every imagination in a reply.

    by="marks": what stands between the marks of every imagination before the first box. by="cues", for
    replies without marks: one span at most, the sentences from the first cue of PERCEPTION to the first of
    CONCLUSION.
    """
    if by == "cues":
        return cue_spans(text)
    if by != "marks":
        raise ValueError(f"find_spans by {by!r}, expected 'marks' or 'cues'")
    boxed = text.find("\\boxed")
    return [match.span(1) for match in SPAN.finditer(text, 0, len(text) if boxed < 0 else boxed)]


def cue_spans(text: str) -> list[tuple[int, int]]:
    """Return the span from the sentence with the first perceptual cue up to the first conclusion cue, or
    none."""
    last = CONCLUSION.search(text)
    end = len(text[:last.start() if last else None].rstrip())
    first = PERCEPTION.search(text, 0, end)
    if not first:
        return []
    starts = [match.end() for match in SENTENCE_END.finditer(text, 0, first.start())]
    return [(starts[-1] if starts else 0, end)]


def after_marks(text: str, end: int) -> int:
    """Return where a span with its closing mark ends, if it has one."""
    return end + len(CLOSE) if text.startswith(CLOSE, end) else end


def conclusion(text: str, by: str = "marks") -> str:
    """Return what follows the last imagination: the whole text if there is none."""
    spans = find_spans(text, by)
    return text[after_marks(text, spans[-1][1]):] if spans else text


def passages(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return what the spans hold."""
    return [text[start:end] for start, end in spans]


def put_spans(text: str, spans: list[tuple[int, int]], after: Sequence[str]) -> str:
    """Return `text` with the spans replaced, last first so that offsets hold; nothing outside them changes.
    """
    for (start, end), span in zip(reversed(spans), reversed(after), strict=True):
        text = text[:start] + span + text[end:]
    return text
