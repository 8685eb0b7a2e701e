"""What one reply is worth: the strict verdict by our rules, and beside it what other harnesses' rules make of
it.

    fields = score(item, record)     # {"extraction", "verdict", "compat"} and, where there are some,
    "numeric", "scores"

Unresolved is a verdict of its own; nothing here chooses an option that a reply does not name. `compat` holds
verdicts of utils.evaluate.reference_scorers alone, for comparison, and never decides one of ours.

Read the answers of TableVQABench out of replies, strictly: what is not clear stays unresolved, and no judge
is asked.

`read_value` and `read_truth` give what is compared; the denotation itself is
`utils.evaluate.reference_scorers.vwtq`, the benchmark's own rule. Report `vwtq` (official) and `vwtq_numeric`
(ours) apart: the official rule takes "1,234" and 1234 for different values.

Scores of the benchmarks as they are published: plain formulas over right and wrong answers.

Shares are fractions from 0 to 1, percentages are named so. Nothing here answers for an empty sample: that is
a ValueError.
"""
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from utils.answers import NEGATION, SENTENCE_END, TAG, extract_choice, find_box, strip_markers, unwrap
from utils.evaluate import reference_scorers
from utils.evaluate.reference_scorers import vsp_moves, vwtq, walk_vsp
from utils.items import group_of, rotation_of
from utils.jsonl import DataError
from utils.stats import _mean

VERDICTS = ("correct", "incorrect", "unresolved", "error")
# VLMEvalKit's at two commits, for its multiple choice
MATCHERS = ("vlmevalkit_0bac5c0", "vlmevalkit_e8e78f0")


def score_mcq(item: dict, record: dict) -> dict:
    """Multiple choice: the option that `extract_choice` finds. compat: VLMEvalKit's letters, or
    MME-RealWorld's."""
    options, text = dict(item["options"]), record["clean_output"]
    found = extract_choice(text, options, record["finish_reason"])
    if item.get("benchmark") == "mme_realworld_lite":
        others = {"mme_realworld": reference_scorers.mme_realworld(text, options),
                  "vlmevalkit_e8e78f0": reference_scorers.mme_realworld(text, repaired=True)}
    else:
        others = {name: getattr(reference_scorers, name)(text, options) for name in MATCHERS}
    return verdict(found.letter, found.rule, found.letter == item["answer"]["value"]) | {"compat": others}


def score_likelihood(item: dict, record: dict) -> dict:
    """The likeliest option a token, as its authors score V*; compat: the likeliest in all."""
    letter = likeliest(item["options"], record["scores"])
    return verdict(letter, "likelihood", letter == item["answer"]["value"]) | {
        "compat": {"likelihood_sum": likeliest(item["options"], record["scores"], "sum")},
        "scores": record["scores"]}


def likeliest(options: list[list[str]], scores: list[dict], by: str = "mean") -> str:
    """Return the letter of the option with the greatest log-probability, a token ("mean", the benchmark's) or
    in all ("sum").

    Of equal ones the first, as argmin takes it there.
    """
    values = [score["logp"] / (score["n"] if by == "mean" else 1) for score in scores]
    return options[values.index(max(values))][0]


def score_vsp(item: dict, record: dict) -> dict:
    """A path, walked on the map as Mirage's simulate_vsp does; no box is unresolved."""
    text = record["clean_output"]
    moves = vsp_moves(text)
    return verdict(moves, "no_box" if moves is None else "boxed_path",
                   moves is not None and walk_vsp(item["answer"]["value"], text)) | {"compat": {}}


def score_wtq(item: dict, record: dict) -> dict:
    """VWTQ: the denotation of the value read; numeric: marks off, ours. compat: of the whole output, as the
    benchmark does."""
    gold, text = gold_text(item["answer"]["value"]), record["clean_output"]
    found = read_value(text)
    known = found.value is not None
    return verdict(found.value, found.rule, known and reference_scorers.vwtq(found.value, gold)) | {
        "numeric": known and vwtq_numeric(found.value, gold),
        "compat": {"tablevqabench": reference_scorers.vwtq(reference_scorers.without_label(text), gold)}}


def score_tabfact(item: dict, record: dict) -> dict:
    """VTabFact: true or false. compat: the words anywhere, as the benchmark does."""
    gold, text = "1" if item["answer"]["value"] else "0", record["clean_output"]
    found = read_truth(text, record["finish_reason"])
    return verdict(found.value, found.rule, found.value == gold) | {
        "compat": {"tablevqabench": reference_scorers.vtabfact(reference_scorers.without_label(text), gold)}}


def score_yes_no(item: dict, record: dict) -> dict:
    """MME: yes or no. compat: VLMEvalKit's rule."""
    found = read_yes_no(record["clean_output"], record["finish_reason"])
    return verdict(found.value, found.rule, found.value == item["answer"]["value"]) | {
        "compat": {"vlmevalkit": reference_scorers.yes_or_no(record["clean_output"])}}


SCORE = {"mcq": score_mcq, "likelihood": score_likelihood, "vsp_path": score_vsp, "wtq": score_wtq,
         "tabfact": score_tabfact,
         "yesno_pair": score_yes_no}


def verdict(value: str | None, rule: str, right: bool) -> dict:
    """Return {"extraction", "verdict"} of what was read, None if nothing was."""
    return {"extraction": {"value": value, "rule": rule},
            "verdict": "unresolved" if value is None else "correct" if right else "incorrect"}


def gold_text(values: list[str]) -> str:
    """Return VWTQ's gold as its scorer takes it: values joined by bars, the bars and line ends in them
    escaped."""
    return "|".join(text.replace("\\", r"\\").replace("|", r"\p").replace("\n", r"\n") for text in values)


def score(item: dict, record: dict) -> dict:
    """Return an item's extraction, verdict and compat; a record with an error has the verdict error and no
    compat."""
    if "error" in record:
        return {"extraction": {"value": None, "rule": record["error"]}, "verdict": "error", "compat": {}}
    return SCORE[item["metric"]](item, record)


def check_scorable(items: list[dict]) -> None:
    """Raise DataError for items that have no score here."""
    if odd := [item for item in items if item["metric"] not in SCORE]:
        raise DataError(
            f"item {odd[0]['id']!r} and {len(odd) - 1} more: metric {odd[0]['metric']!r} has no scorer "
                        "(OCRBench-v2's task metrics are not here: its items are a source of latents for probe.py alone); "
                        f"expected one of {', '.join(SCORE)}")
    seen = set()
    for item in items:  # said now, and not when all is answered
        rotation = rotation_of(item)
        place = item.get("benchmark"), group_of(item), rotation
        if rotation is not None and (rotation >= ROTATIONS or place in seen):
            raise DataError(
                f"item {item['id']!r}: rotation {rotation} of question {place[1]!r}; expected each of 0 to "
                            f"{ROTATIONS - 1} once")
        seen.add(place)


def n_options(item: dict) -> int:
    """Return between how many answers blind guessing chooses; 0 where there are no options."""
    return 2 if item["metric"] in ("tabfact", "yesno_pair") else len(item["options"])


def compat_right(record: dict, name: str) -> bool:
    """Return whether another harness's verdict of a result is right; None (no verdict) is wrong there."""
    value = record["compat"].get(name)
    return value if isinstance(value, bool) else value is not None and value == record["gold"]


# ------------------------------------------------------------ tables


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
    """Return the answer to a VWTQ question: the last box, else the last <answer> tag, else all of it without
    "Answer:".

    Rules: boxed, boxed_open, tag, whole, empty. A box's TeX commands and quotes are removed, bars between
    values kept.
    """
    content, rule = _stretch(output)
    if rule == "whole":
        content = LABEL.sub("", content)
    else:
        content = unwrap(content)
    return Reading(content, rule) if content else Reading(None, "empty")


def read_truth(output: str, finish_reason: str | None = None) -> Reading:
    """Return "1" or "0" for a VTabFact reply that says true or false.

    Rules: boxed_truth, boxed_open_truth, tag_truth and whole_truth for a stretch that is the word alone (yes,
    no, 1 and 0 too: ours, the benchmark knows the two words only), truth_word for the last true or false of a
    reply without box or tag. Negated, questioned ("true or false?") or cut off by the token limit
    (`finish_reason` "length") is unresolved.
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
        return Reading(TRUTH[found.pop()] if clear else None, f"{rule}_truth" if clear
                       else f"{rule}_unresolved")
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
    """Return "yes" or "no" for a reply to MME's questions; a "no" inside a sentence ("no dog but a cat")
    decides nothing.

    Rules: boxed_yesno, boxed_open_yesno, tag_yesno for a stretch with one of the two words alone in it,
    first_word for a reply that opens with it ("No, a cat."), phrase for the last "the answer is no". First
    word and phrase at odds, or a cut-off reply (`finish_reason` "length") that has said only its first word,
    are unresolved.
    """
    content, rule = _stretch(output)
    if not content:
        return Reading(None, "empty")
    if rule != "whole":
        found = {match.lower() for match in YES_NO.findall(unwrap(content))}
        return Reading(found.pop(), f"{rule}_yesno") if len(found) == 1 else Reading(None,
                                                                                     f"{rule}_unresolved")
    first, said = YES_NO_FIRST.match(content), YES_NO_SAID.findall(content)
    if first and (not said or said[-1].lower() == first[1].lower()) and (said or finish_reason != "length"):
        return Reading(first[1].lower(), "first_word")
    return Reading(said[-1].lower(), "phrase") if said and not first else Reading(None, "unresolved")


def vwtq_numeric(value: str, gold: str) -> bool:
    """Return `vwtq` with thousands' commas, $ and % removed from what is a number on both sides (ours, not
    official)."""
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


# ------------------------------------------------------------ scores


ROTATIONS = 4  # orders in which HR-Bench shows the options of a question (its column cycle_category, 0 to 3)


def micro(parts: Mapping[str, Sequence[bool]]) -> float:
    """Return the share of right answers over all items: V*, BLINK and MME-RealWorld-Lite at every level."""
    hits = [bool(hit) for part in parts.values() for hit in part]
    return _mean(hits, "micro")


def macro(parts: Mapping[str, Sequence[bool]]) -> float:
    """Return the mean of the parts' shares, each part weighted alike.

    The paper's TableVQABench overall is this over VWTQ, VWTQ-Syn and VTabFact (64.8 and 70.7 in its table),
    while the benchmark's own script weights by items (naver-ai/tablevqabench,
    src/evaluate_tablevqa_dataset.py): give both.
    """
    return _mean([_mean(part, name) for name, part in parts.items()], "macro")


def rotations(rows: Iterable[tuple[Hashable, int, bool]]) -> dict:
    """Return HR-Bench's scores of (question, rotation 0 to 3, right): {"average", "by_rotation", "all_right",
    "complete"}.

    average is the mean of the rotations' shares (open-compass/VLMEvalKit, vlmeval/dataset/utils/hrbench.py,
    report_acc_hrbench: row cycle = Average; lmms-eval has the same formula). With every row there it equals
    the plain mean. all_right is the share of questions right in all four rotations, among the `complete` ones
    that have all four, None if there is none; neither harness reports it. ValueError for a rotation out of
    range or given twice.
    """
    questions, cycles = defaultdict(dict), defaultdict(list)
    for question, rotation, right in rows:
        if rotation not in range(ROTATIONS) or rotation in questions[question]:
            raise ValueError(
                f"question {question!r}: rotation {rotation!r}, expected each of 0 to {ROTATIONS - 1} once")
        questions[question][rotation] = bool(right)
        cycles[rotation].append(bool(right))
    shares = {rotation: _mean(hits, "rotations") for rotation, hits in sorted(cycles.items())}
    complete = [all(found.values()) for found in questions.values() if len(found) == ROTATIONS]
    return {"average": _mean(list(shares.values()), "rotations"), "by_rotation": shares,
            "all_right": sum(complete) / len(complete) if complete else None, "complete": len(complete)}
