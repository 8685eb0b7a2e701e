"""Score one reply: our strict verdict and, next to it, those of other harnesses' rules.

A reply that no rule can read is "unresolved"; no option is ever guessed. `compat` holds the verdicts of
utils.evaluate.reference_scorers; they never decide ours.
"""
import re
from statistics import fmean
from typing import NamedTuple

from utils.answers import YES_NO_FIRST, extract_choice, find_marked
from utils.evaluate.reference_scorers import (mme_realworld, needs_detour, straight_path, vlmevalkit_e8e78f0,
                                              vlmevalkit_realworld, vtabfact, vwtq, yes_or_no)
from utils.items import ANSWER_TYPES, group_of, shortest_path, vsp_moves, walk_vsp
from utils.jsonl import DataError
from utils.phrases import CJK, CONTRAST, NEGATION, NOUN, SENTENCE_END, TURNED
from utils.reply_text import FRACTION, find_boxes, unwrap, visible

VERDICTS = ("correct", "incorrect", "unresolved", "error")
VLMEVALKIT, LMMS_EVAL = "vlmevalkit_e8e78f0", "lmms_eval_75571cf"  # harnesses and their commits
ROTATIONS = 4  # orders in which HR-Bench shows the options of a question (column cycle_category, 0 to 3)


# ---- reading a reply
LABEL = re.compile(
    r"^>\s*|^[\s*_#>]*(?:(?:so|thus|hence|therefore)\b[\s,]*)?(?:(?:(?:the|my)\s+)?(?:(?:final|correct)\s+)?"
    rf"(?:{NOUN}|a(?=:))(?: to (?:the|your) question)?(?:[\s*_]*[:=]|\s+[–-]\s|[\s*_]+is\b[\s:]*|[*_ ]*\n)"
    rf"|(?:正确|最终)?(?:{CJK})\s*[是为は은는:][\s*:]*)[\s*_]*", re.I)
TRUTH_WORD = re.compile(
    r"\b(true(?!\s+(?:value|number|total|count|amount|answers|rows))|false)\b", re.IGNORECASE)
ASKED = re.compile(r"^\W*true\s*(?:or|/)\s*false\W+(?=\w)|^[^?\n.]*\?\s*(?=\S)"
                   r"|^\W*(?:so|thus|hence|therefore|a(?=:))\b\W*(?=(?:yes|no)\b)", re.IGNORECASE)
TRUTH_FIRST = re.compile(r"\W*(true|false)\b(?=[\s*_)]*(?:[,.;:!–—]|\n|$))", re.IGNORECASE)
TRUTH_SAID = re.compile(
    r"\b(?:answer|statement|claim)\s*(?:is|:)[\s*_:\"]*(true|false)\b(?!\s*\?|\s+or\b)", re.IGNORECASE)
HEDGE = re.compile(r"\b(?:partially|partly|half|mostly|would be|could be|might be|may be|if)\W+$")
TURN_OF_TRUTH = re.compile(r"\b(?:so|thus|therefore|hence|but|which|not)\b|,")
DENIED = re.compile(r"\s+only\b|\W*(?:is|was|would be)\s+(?:wrong|incorrect|not)\b", re.IGNORECASE)
TRUTH = {"true": "1", "false": "0", "yes": "1", "no": "0", "1": "1", "0": "0"}
YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
YES_NO_LAST = re.compile(
    r"(?:[,.;:!?\n]|\b(?:so|is|say|think|therefore|thus|hence))[\s*_\"]*(yes|no)[\s*_.!\"]*$", re.IGNORECASE)
YES_NO_SAID = re.compile(
    r"\banswer[\s*_]*(?:is|(?:w|sh)ould be|[:–-])[\W_]*(yes|no)\b(?!\s*\?|\s+or\b)", re.IGNORECASE)


class Reading(NamedTuple):
    """The answer in a reply, None for none or several, and the rule that decided."""

    value: str | None
    rule: str


def read_value(output: str) -> Reading:
    """Return the answer to a VWTQ question. Rules: boxed, boxed_open, tag, json, whole, empty."""
    content, rule = answer_part(output)
    if rule == "whole":
        content = LABEL.sub("", content)
        inner = unwrap(content)
        content = inner if len(inner) < len(content.rstrip(".")) and "\n" not in inner else content
    else:
        content = FRACTION.sub(r"\1\3/\2\4", unwrap(content))
    return Reading(content, rule) if content else Reading(None, "empty")


def read_truth(output: str, finish_reason: str | None = None) -> Reading:
    """Return "1" or "0" for a VTabFact reply that means true or false.

    Rules: boxed_truth, boxed_open_truth, tag_truth, whole_truth for the word alone (or yes, no, 1, 0),
    first_word ("True. The table ..."), truth_word for the last true or false of a reply without box or tag,
    phrase ("the statement is false") where that word decides nothing. A word that is negated, questioned
    ("true or false?") or cut off (`finish_reason` "length") is unresolved.
    """
    content, rule = answer_part(output)
    if not content:
        return Reading(None, "empty")
    content = CONTRAST.sub("", ASKED.sub("", content))
    word = unwrap(LABEL.sub("", unwrap(content))).lower()
    if word in TRUTH:
        return Reading(TRUTH[word], f"{rule}_truth")
    if rule != "whole":
        words = {match.lower() for match in TRUTH_WORD.findall(content)}
        if len(words) == 1 and not NEGATION.search(content.lower()):
            return Reading(TRUTH[words.pop()], f"{rule}_truth")
        return Reading(None, f"{rule}_unresolved")
    first, said = TRUTH_FIRST.match(LABEL.sub("", content)), TRUTH_SAID.findall(content)
    if first and finish_reason != "length":
        later = [match.lower() for match in TRUTH_WORD.findall(content[first.end():])]
        if TURNED.search(content.lower()) or TRUTH_FIRST.fullmatch(content[first.end():].rstrip(".! \n")):
            said += later  # "True. Wait, it is false."
        agrees = not said or said[-1].lower() == first[1].lower()
        return Reading(TRUTH[first[1].lower()], "first_word") if agrees else Reading(None, "unresolved")
    sentences = [sentence for sentence in SENTENCE_END.split(content) if TRUTH_WORD.search(sentence)]
    if not sentences or finish_reason == "length":
        return Reading(None, "unresolved")
    last = sentences[-1]
    words = list(TRUTH_WORD.finditer(last))
    before = last[words[-2].end() if len(words) > 1 else 0:words[-1].start()].lower()
    after = last[words[-1].end():]
    questioned = "?" in after or len(words) > 1 and re.fullmatch(r"\W*(?:or|nor|and)?\W*", before)
    both = len({word[1].lower() for word in words[-2:]}) > 1 and not TURN_OF_TRUTH.search(before)
    before = re.sub(r"^\W*no,|.*[,;] (?:so|thus|therefore|hence)\b", "", before, flags=re.DOTALL)
    if questioned or both or NEGATION.search(before) or HEDGE.search(before) or DENIED.match(after):
        words = {word.lower() for word in said}
        plain = len(words) == 1 and not questioned and len(sentences) > 1
        return Reading(TRUTH[words.pop()], "phrase") if plain else Reading(None, "unresolved")
    return Reading(TRUTH[words[-1][1].lower()], "truth_word")


def read_yes_no(output: str, finish_reason: str | None = None) -> Reading:
    """Return "yes" or "no" for a reply to a question of MME.

    Rules: boxed_yesno, boxed_open_yesno, tag_yesno, first_word ("No, a cat."), phrase ("answer is no"),
    last_word ("..., so yes."). If two of these disagree, or a reply was cut off after its first word, it is
    unresolved.
    """
    content, rule = answer_part(output)
    if not content:
        return Reading(None, "empty")
    if rule != "whole":
        words = {match.lower() for match in YES_NO.findall(unwrap(content))}
        if len(words) == 1:
            return Reading(words.pop(), f"{rule}_yesno")
        return Reading(None, f"{rule}_unresolved")
    content = ASKED.sub("", content)
    content = inner if (inner := unwrap(content)).isalpha() else content
    first, last = YES_NO_FIRST.match(content), YES_NO_LAST.search(content[-80:])
    phrases = YES_NO_SAID.findall(content)
    word = first[1].lower() if first and first[1].lower() in ("yes", "no") else None
    phrase = phrases[-1].lower() if phrases else None
    if last and finish_reason != "length":
        if {word, phrase} <= {None, last[1].lower()}:
            return Reading(last[1].lower(), "first_word" if word else "phrase" if phrase else "last_word")
        return Reading(None, "unresolved")
    if word and phrase in (None, word) and (phrase or finish_reason != "length"):
        return Reading(word, "first_word")
    return Reading(phrase, "phrase") if phrase and not word else Reading(None, "unresolved")


def answer_part(output: str) -> tuple[str, str]:
    """Return (text, rule) of the last box, else tag, else the whole reply."""
    text = visible(output)
    marked, label = find_marked(text)
    if not marked and not find_boxes(text):
        return text, "whole"
    if not marked:  # \boxed{}
        return "", "boxed"
    _, _, content, closed = marked[-1]
    return content.strip(), label[:-1] + ("" if closed or label != "boxed_" else "_open")


# ---- scoring a reply
METRICS = [name for name in ANSWER_TYPES if name != "unscored"]  # those with a scorer


def score(item: dict, record: dict) -> dict:
    """Return an item's "extraction", "verdict" and "compat"."""
    if "error" in record:
        return {"extraction": {"value": None, "rule": record["error"]}, "verdict": "error", "compat": {}}
    text, finish, gold = record["clean_output"], record["finish_reason"], item["answer"]["value"]
    if item["metric"] == "mcq":
        options = dict(item["options"])
        value, rule = extract_choice(text, options, finish)
        compat = ({VLMEVALKIT: vlmevalkit_realworld(text), LMMS_EVAL: mme_realworld(text)}
                  if item.get("benchmark") == "mme_realworld_lite" else
                  {VLMEVALKIT: vlmevalkit_e8e78f0(text, options)})
        right = value == gold
    elif item["metric"] == "vsp_path":
        value, compat = vsp_moves(visible(text)), {}
        rule, right = "no_box" if value is None else "boxed_path", value is not None and walk_vsp(gold, value)
    elif item["metric"] == "wtq":
        (value, rule), gold = read_value(text), gold_text(gold)
        right = value is not None and vwtq(value, gold)
        compat = {"tablevqabench": vwtq(text.removeprefix("Answer: "), gold)}  # as VLMEvalKit does
    elif item["metric"] == "tabfact":
        (value, rule), gold = read_truth(text, finish), "1" if gold else "0"
        right, compat = value == gold, {"tablevqabench": vtabfact(text.removeprefix("Answer: "), gold)}
    else:
        value, rule = read_yes_no(text, finish)
        right, compat = value == gold, {"vlmevalkit": yes_or_no(text)}
    verdict = "unresolved" if value is None else "correct" if right else "incorrect"
    return {"extraction": {"value": value, "rule": rule}, "verdict": verdict, "compat": compat}


def as_published(item: dict, result: dict) -> dict:
    """Return a result with the published letters; "shown" has the order, the gold and the answer as shown."""
    if "letters" not in item:
        return result
    letters, judge, found = item["letters"], result.get("judge"), result["extraction"]
    shown = {"order": "".join(letters.values()), "gold": result["gold"], "value": found["value"]}
    result = result | {
        "gold": letters[result["gold"]], "shown": shown,
        "extraction": found | {"value": letters.get(found["value"])},
        "compat": {name: letters.get(value, value) for name, value in result["compat"].items()}}
    if judge:
        result["judge"] = judge | {"parsed": letters.get(judge["parsed"], judge["parsed"])}
    return result


def gold_text(values: list[str]) -> str:
    """Return VWTQ's gold as its scorer takes it: values escaped and joined by bars."""
    return "|".join(text.replace("\\", r"\\").replace("|", r"\p").replace("\n", r"\n") for text in values)


def rotation_of(item: dict) -> int | None:
    """Return which rotation of its options an item shows (HR-Bench), if any."""
    cycle = (item.get("raw") or {}).get("cycle_category")
    return None if cycle is None else int(cycle)


def n_options(item: dict) -> int:
    """Return the number of answers a guess chooses from; 0 without options."""
    return 2 if item["metric"] in ("tabfact", "yesno_pair") else len(item["options"])


def compat_right(record: dict, name: str) -> bool:
    """Return whether another harness's verdict of a result is right."""
    value = record["compat"].get(name)
    return value if isinstance(value, bool) else value is not None and value == record["gold"]


def check_scorable(items: list[dict]) -> None:
    """Raise DataError for items without a scorer and for wrong rotations."""
    if unscored := [item for item in items if item["metric"] not in METRICS]:
        raise DataError(f"item {unscored[0]['id']!r} and {len(unscored) - 1} more: metric "
                        f"{unscored[0]['metric']!r} has no scorer; expected one of {', '.join(METRICS)}")
    seen = set()
    for item in items:
        rotation = rotation_of(item)
        place = item.get("benchmark"), group_of(item), rotation
        if rotation is not None and (rotation >= ROTATIONS or place in seen):
            raise DataError(f"item {item['id']!r}: rotation {rotation} of question {place[1]!r}; expected "
                            f"each of 0 to {ROTATIONS - 1} once")
        seen.add(place)


# ---- VSP without a model
def is_board(gold: object) -> bool:
    return isinstance(gold, list) and isinstance(gold[0], list)


def vsp_floors(records: list[dict]) -> dict[str, dict]:
    """Return {size: {policy: share of its boards solved}}, and the means over boards as "all": the path that
    solves most boards of a size; a straight path that ignores holes, one direction first; one that looks a
    square ahead; any path that needs no detour."""
    boards = [record["gold"] for record in records
              if record["verdict"] != "error" and is_board(record["gold"])]
    paths = sorted({shortest_path(board) or "" for board in boards})
    floors = {}
    for size in sorted({len(board) for board in boards}):
        own = [board for board in boards if len(board) == size]
        straight = {f"{name}_{order}": fmean(
            walk_vsp(board, straight_path(board, order == "vertical", looks)) for board in own)
            for name, looks in (("hole_blind", False), ("greedy", True))
            for order in ("horizontal", "vertical")}
        floors[str(size)] = {
            "n": len(own), "constant": max(fmean(walk_vsp(board, path) for board in own) for path in paths),
            **straight, "no_detour": fmean(not needs_detour(board) for board in own)}
    if boards:
        floors["all"] = {"n": len(boards)} | {
            name: sum(part["n"] * part[name] for part in floors.values()) / len(boards)
            for name in floors[str(len(boards[0]))] if name != "n"}
    return floors
