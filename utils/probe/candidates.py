"""Candidates for probe questions: the rules that need no model, and what replies decide about them."""
import random
import re
from dataclasses import dataclass
from itertools import combinations

from utils.answers import LETTER, answers_match, normalize, strip_label
from utils.images import IMAGE_REASONS
from utils.items import gold_words
from utils.model_calls import ERROR_REASONS, Outcome
from utils.rows import find_markup

N_WRONG = 3
RULES = ("not_written", "empty", "markup", "options", "catch_all", "letter", "gold_in_stem",
         "source_question", "source_answer", "repeated")
REASONS = (*RULES, *IMAGE_REASONS, "duplicate", "region",  # these are about the whole source
           "image_none", "image_wrong", "blind_right", *ERROR_REASONS)
CATCH_ALL = re.compile(
    r"\b(?:all|none|both|neither|any|either) of\b|\b(?:cannot|can't|can not|could not|not) (?:be )?"
    r"(?:tell|told|determined?|seen?|say|said|clear|visible|shown|sure)\b|\bunknown\b"
    r"|^(?:none|all|both|neither)$", re.IGNORECASE)
SAME_WORDS = 0.8  # shared words of two equal questions; "material of" for "colour of" leaves 0.67
PLAIN_GOLDS = ("yes", "no", "true", "false")  # words of other questions too


@dataclass
class Candidate:
    """A question that was asked for: kept if `stage` is None, else rejected by it."""

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

    def reject(self, stage: str, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        self.stage, self.reason, self.detail = stage, reason, detail

    def options(self, seed: int, letter: str | None = None) -> dict[str, str]:
        """Return {letter: text} in an order of its own, the right one at `letter` if given."""
        rng, texts = random.Random(f"{seed}/{self.id}/{letter}"), list(self.wrong)
        rng.shuffle(texts)
        texts.insert(rng.randrange(4) if letter is None else "ABCD".index(letter), self.gold)
        return dict(zip("ABCD", texts))


def plain_words(text: str) -> str:
    return normalize(re.sub(r"[?!,;:\"()]|[.](?!\d)", " ", text))


def mentions(text: str, value: str) -> bool:
    """Return whether a text contains a value, word for word."""
    return bool(plain_words(value)) and f" {plain_words(value)} " in f" {plain_words(text)} "


def same_question(a: str, b: str) -> bool:
    a, b = (set(plain_words(text).split()) for text in (a, b))
    return len(a & b) >= SAME_WORDS * len(a | b)


def broken_rule(candidate: Candidate) -> tuple[str, str] | None:
    """Return the first of RULES that a candidate breaks by itself, and a detail."""
    question, gold, options = candidate.question, candidate.gold, (candidate.gold, *candidate.wrong)
    if not all(text.strip() for text in (question, *options)):
        return "empty", "a question or an option is empty"
    if markup := find_markup("\n".join((question, *options))):
        return "markup", min(markup)
    if len(options) != 1 + N_WRONG:
        return "options", f"{len(options)} options"
    for earlier, option in combinations(options, 2):
        if answers_match(option, earlier):
            return "options", f"{option!r} and {earlier!r}"
    for option in options:
        if CATCH_ALL.search(option.strip()):
            return "catch_all", option
    for text in (question, *options):
        if LETTER.search(text) or strip_label(text) != text:
            return "letter", text
    if mentions(question, gold) and not all(mentions(question, text) for text in candidate.wrong):
        return "gold_in_stem", gold
    if same_question(question, candidate.source["question"]):
        return "source_question", candidate.source["question"]
    source_gold = gold_words(candidate.source)
    if source_gold and normalize(source_gold) not in PLAIN_GOLDS:
        if mentions(question, source_gold) or answers_match(gold, source_gold):
            return "source_answer", source_gold
    return None


def apply_rules(candidates: list[Candidate], pictures: dict[str, str]) -> None:
    """Reject candidates that break a rule or repeat a question about a picture (source id -> hash)."""
    seen: dict[tuple[str, str], str] = {}
    for candidate in candidates:
        if candidate.stage is None and (fault := broken_rule(candidate)):
            candidate.reject("rule", fault[0], fault[1][:160])
        if candidate.stage is None:
            key = pictures[candidate.source["id"]], plain_words(candidate.question)
            if key in seen:
                candidate.reject("rule", "repeated", seen[key])
            seen.setdefault(key, candidate.id)


def read_questions(candidates: list[Candidate], outcome: Outcome) -> None:
    if outcome.value is None:
        for candidate in candidates:
            candidate.reject("error", outcome.reason, outcome.detail)
        return
    questions = outcome.value["questions"]
    for candidate, row in zip(candidates, questions):
        candidate.attribute, candidate.question = row["attribute"], row["question"]
        candidate.gold, candidate.wrong = row["answer"], tuple(row["wrong"])
    for candidate in candidates[len(questions):]:
        candidate.reject("rule", "not_written",
                         f"{len(questions)} questions came, {len(candidates)} were asked for")


def read_answer(candidate: Candidate, kind: str, outcome: Outcome, seed: int) -> None:
    """Decide on a candidate from the reply that answers it."""
    if outcome.value is None:
        candidate.reject("error", outcome.reason, outcome.detail)
        return
    answer = candidate.options(seed).get(outcome.value["letter"])
    if kind == "blind":
        candidate.blind_answer = answer
        if answer == candidate.gold:
            candidate.reject("blind", "blind_right", "answered right from its words alone")
        return
    candidate.image_answer = answer
    if answer is None:
        candidate.reject("image", "image_none", "no option, or more than one, was found right")
    elif answer != candidate.gold:
        candidate.reject("image", "image_wrong", f"answered {answer[:80]!r} from the image")
