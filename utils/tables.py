"""Read the answers of TableVQABench out of replies, strictly: what is not clear stays unresolved, and no judge is asked.

`read_value` and `read_truth` give what is compared; the denotation itself is `utils.compat.vwtq`, the benchmark's own rule.
Report `vwtq` (official) and `vwtq_numeric` (ours) apart: the official rule takes "1,234" and 1234 for different values.
"""
import re
from typing import NamedTuple

from utils.answers import NEGATION, SENTENCE_END, TAG, find_box, strip_markers, unwrap
from utils.compat import vwtq

LABEL = re.compile(r"^answer\s*[:：]\s*", re.IGNORECASE)
TRUTH_WORD = re.compile(r"\b(true|false)\b", re.IGNORECASE)
TRUTH = {"true": "1", "false": "0", "yes": "1", "no": "0", "1": "1", "0": "0"}
YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
YES_NO_FIRST = re.compile(r"\W*(yes|no)\b(?=[\s*_)]*(?:[,.;:!]|$))", re.IGNORECASE)
YES_NO_SAID = re.compile(r"\banswer\s*(?:is|:)\s*[\W_]*(yes|no)\b(?!\s*\?|\s+or\b)", re.IGNORECASE)
COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # between thousands
AMOUNT = re.compile(r"\$?\s*([-+]?\$?\d[\d,]*(?:\.\d+)?)\s*%?")


class Reading(NamedTuple):
    """What a reply answers, None if it does not settle on it, and the rule that decided."""

    value: str | None
    rule: str


def read_value(output: str) -> Reading:
    """Return the answer to a VWTQ question: the last box, else the last <answer> tag, else all of it without "Answer:".

    Rules: boxed, boxed_open, tag, whole, empty. A box's TeX commands and quotes are removed, bars between values kept.
    """
    content, rule = _stretch(output)
    if rule == "whole":
        content = LABEL.sub("", content)
    else:
        content = unwrap(content)
    return Reading(content, rule) if content else Reading(None, "empty")


def read_truth(output: str, finish_reason: str | None = None) -> Reading:
    """Return "1" or "0" for a VTabFact reply that says true or false.

    Rules: boxed_truth, boxed_open_truth, tag_truth and whole_truth for a stretch that is the word alone (yes, no, 1 and 0
    too: ours, the benchmark knows the two words only), truth_word for the last true or false of a reply without box or
    tag. Negated, questioned ("true or false?") or cut off by the token limit (`finish_reason` "length") is unresolved.
    """
    content, rule = _stretch(output)
    if not content:
        return Reading(None, "empty")
    word = unwrap(LABEL.sub("", unwrap(content))).lower()
    if word in TRUTH:
        return Reading(TRUTH[word], f"{rule}_truth")
    if rule != "whole":
        found = {match.lower() for match in TRUTH_WORD.findall(content)}
        clear = len(found) == 1 and not NEGATION.search(content.lower())
        return Reading(TRUTH[found.pop()] if clear else None, f"{rule}_truth" if clear else f"{rule}_unresolved")
    sentences = [sentence for sentence in SENTENCE_END.split(content) if TRUTH_WORD.search(sentence)]
    if not sentences or finish_reason == "length":
        return Reading(None, "unresolved")
    last = list(TRUTH_WORD.finditer(sentences[-1]))
    between = sentences[-1][last[-2].end() if len(last) > 1 else 0:last[-1].start()].lower()
    asked = "?" in sentences[-1][last[-1].end():] or re.fullmatch(r"\W*(?:or|nor|and)\W*", between)
    if asked or NEGATION.search(between):
        return Reading(None, "unresolved")
    return Reading(TRUTH[last[-1][1].lower()], "truth_word")


def read_yes_no(output: str, finish_reason: str | None = None) -> Reading:
    """Return "yes" or "no" for a reply to MME's questions; a "no" inside a sentence ("no dog but a cat") decides nothing.

    Rules: boxed_yesno, boxed_open_yesno, tag_yesno for a stretch with one of the two words alone in it, first_word for a reply
    that opens with it ("No, a cat."), phrase for the last "the answer is no". First word and phrase at odds, or a cut-off
    reply (`finish_reason` "length") that has said only its first word, are unresolved.
    """
    content, rule = _stretch(output)
    if not content:
        return Reading(None, "empty")
    if rule != "whole":
        found = {match.lower() for match in YES_NO.findall(unwrap(content))}
        return Reading(found.pop(), f"{rule}_yesno") if len(found) == 1 else Reading(None, f"{rule}_unresolved")
    first, said = YES_NO_FIRST.match(content), YES_NO_SAID.findall(content)
    if first and (not said or said[-1].lower() == first[1].lower()) and (said or finish_reason != "length"):
        return Reading(first[1].lower(), "first_word")
    return Reading(said[-1].lower(), "phrase") if said and not first else Reading(None, "unresolved")


def vwtq_numeric(value: str, gold: str) -> bool:
    """Return `vwtq` with thousands' commas, $ and % removed from what is a number on both sides (ours, not official)."""
    return vwtq(_plain(value), _plain(gold))


def _stretch(output: str) -> tuple[str, str]:
    """Return (text, rule) of what is meant to be the answer: box, tag or the whole reply."""
    text = strip_markers(output)
    content, closed = find_box(text)
    if content is not None:
        return content.strip(), "boxed" if closed else "boxed_open"
    tags = TAG.findall(text)
    return (tags[-1].strip(), "tag") if tags else (text, "whole")


def _plain(text: str) -> str:
    parts = [part.strip() for part in text.replace("||", "|").split("|")]
    amounts = [AMOUNT.fullmatch(COMMA.sub("", part)) for part in parts]
    return "|".join(amount[1].replace("$", "") if amount else part for part, amount in zip(parts, amounts))
