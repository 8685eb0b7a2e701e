"""Candidates for probe questions, and the rules that need no model to see one wrong. No torch here."""
import random
import re
from dataclasses import dataclass

from utils.answers import answers_match, normalize
from utils.calls import ERROR_REASONS
from utils.checks import find_markup
from utils.edits import LETTER
from utils.images import IMAGE_REASONS
from utils.items import gold_words
from utils.slots import strip_label

N_WRONG = 3
RULES = ("not_written", "empty", "markup", "options", "catch_all", "letter", "gold_in_stem", "source_question",
         "source_answer", "repeated")
REASONS = (*RULES, *IMAGE_REASONS, "duplicate", "region",  # these hold for a whole source
           "image_none", "image_wrong", "blind_right", *ERROR_REASONS)
CATCH_ALL = re.compile(r"\b(?:all|none|both|neither|any|either) of\b|\b(?:cannot|can't|can not|could not|not) (?:be )?"
                       r"(?:tell|told|determined?|seen?|say|said|clear|visible|shown|sure)\b|\bunknown\b"
                       r"|^(?:none|all|both|neither)$", re.IGNORECASE)
SAME_WORDS = 0.8  # share of the words of two questions that makes them one; "material of" for "colour of" leaves 0.67
PLAIN_GOLDS = ("yes", "no", "true", "false")  # words of other questions too


@dataclass
class Candidate:
    """A question that was asked for: kept if `stage` is None, else the stage that took it out and its closed reason."""

    id: str
    source: dict
    attribute: str | None = None
    question: str = ""
    gold: str = ""
    wrong: tuple[str, ...] = ()
    stage: str | None = None
    reason: str | None = None
    detail: str = ""
    image_answer: str | None = None
    blind_answer: str | None = None

    def out(self, stage: str, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        self.stage, self.reason, self.detail = stage, reason, detail

    def options(self, seed: int, letter: str | None = None) -> dict[str, str]:
        """Return {letter: text} in an order of the candidate's own, the right option at `letter` if one is given."""
        rng, texts = random.Random(f"{seed}/{self.id}/{letter}"), list(self.wrong)
        rng.shuffle(texts)
        texts.insert(rng.randrange(4) if letter is None else "ABCD".index(letter), self.gold)
        return dict(zip("ABCD", texts))


def plain(text: str) -> str:
    """Return a text in one spelling, without the marks between words."""
    return normalize(re.sub(r"[?!,;:\"()]|[.](?!\d)", " ", text))


def says(text: str, value: str) -> bool:
    """Return whether a text has a value in it, word for word."""
    return bool(plain(value)) and f" {plain(value)} " in f" {plain(text)} "


def same_question(one: str, other: str) -> bool:
    one, other = (set(plain(text).split()) for text in (one, other))
    return len(one & other) >= SAME_WORDS * len(one | other)


def fault_of(one: Candidate) -> tuple[str, str] | None:
    """Return the first of RULES that a candidate breaks by itself, and a detail, or None."""
    texts = (one.gold, *one.wrong)
    source_gold = gold_words(one.source)
    doubled = [f"{a!r} and {b!r}" for n, a in enumerate(texts) for b in texts[:n] if answers_match(a, b)]
    holds = {
        "empty": not all(text.strip() for text in (one.question, *texts)) and "a question or an option is empty",
        "markup": next(iter(find_markup("\n".join((one.question, *texts)))), None),
        "options": f"{len(texts)} options" if len(texts) != 1 + N_WRONG else doubled and doubled[0],
        "catch_all": next((text for text in texts if CATCH_ALL.search(text.strip())), None),
        "letter": next((text for text in (one.question, *texts) if LETTER.search(text) or strip_label(text) != text), None),
        "gold_in_stem": says(one.question, one.gold) and not all(says(one.question, text) for text in one.wrong) and one.gold,
        "source_question": same_question(one.question, one.source["question"]) and one.source["question"],
        "source_answer": source_gold and normalize(source_gold) not in PLAIN_GOLDS and source_gold
        and (says(one.question, source_gold) or answers_match(one.gold, source_gold)) and source_gold}
    return next(((reason, str(detail)[:160]) for reason, detail in holds.items() if detail), None)


def apply_rules(candidates: list[Candidate], pictures: dict[str, str]) -> None:
    """Take out what breaks a rule; `pictures`: source id -> hash, as a question may stand once a picture."""
    seen: dict[tuple[str, str], str] = {}
    for one in candidates:
        if one.stage is None and (fault := fault_of(one)):
            one.out("rule", *fault)
        if one.stage is None:
            key = pictures[one.source["id"]], plain(one.question)
            if key in seen:
                one.out("rule", "repeated", seen[key])
            seen.setdefault(key, one.id)
