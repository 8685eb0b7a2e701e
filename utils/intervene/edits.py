"""Edits after which another answer is right: of an imagination in text, by rules, and of a planning board.

`slots` finds the words by which two options differ. `swap` exchanges them: a value anywhere, a side only in
clauses about the question, yes and no by negating the statement that the question asks about.
`verify_directed` holds rules and LLM to the same conditions.
"""
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from utils.answers import LETTER, strip_label
from utils.images import crop_region
from utils.intervene.word_forms import SOMETHING, TABLES, article_for, exchange, replace_values, stems
from utils.items import find_cell, open_images, region_in, shortest_path, walk_vsp
from utils.jsonl import DataError
from utils.rows import CLOSE, OPEN

NOT_EDITABLE = (
    "no_span", "no_slot_value", "letter_in_span", "gold_not_mentioned", "residual_gold",
    "marks_in_span", "span_count", "unchanged",  # of an edit that came from a model
    "no_irrelevant_word", "value_changed", "no_donor",  # of one text condition
    "cut_off", "bad_json", "bad_schema", "backend_error")  # of an LLM that did not answer
# words of options that mean nothing in another text
NO_SLOT = set("an the yes no true false is are not it in on at of to and or with".split())
YES, NO = ("yes", "true"), ("no", "false")
STRUCTURE = (OPEN, CLOSE, "\\boxed")  # would end a span, or answer
VERB = re.compile(r"\b(is|are|was|were|does|do|did|has|have|had)(\s+not?\b|n['’]t\b)?", re.IGNORECASE)
JOIN = r"\s+(?:and|but|while|whereas|which|where|because|so)\b"
CLAUSE = re.compile(rf"[.!?;:,\n]+(?:{JOIN})?|{JOIN}", re.IGNORECASE)
PRONOUN = re.compile(r"\W*(?:(?:and|but|while|whereas|where|because|so)\s+)?"
                     r"(?:it|its|he|she|his|her|they|their|which)\b", re.IGNORECASE)

Board = list[list[int]]
HELPER_PIXELS = 224 * 224  # at least, of a region: 64 visual tokens, as many as SwimBird has latents


class NotEditable(ValueError):
    """An imagination that cannot be edited; the message is one of NOT_EDITABLE."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class Slot(NamedTuple):
    """The words that an edit exchanges. `kind` is "value" (anywhere), "side" (in clauses that name one of
    `referents`, words of the question) or "polarity" (in clauses that name all of them)."""

    kind: str
    old: str
    new: str
    referents: frozenset[str] = frozenset()


# ---- slots of two options
def slots(item: dict, target: str) -> list[Slot]:
    """Return the exchanges that turn the right option into option `target`, best first: the words that the
    two do not share, then words of one table. Yes against no negates the statement that the question
    identifies."""
    options, gold = dict(item["options"]), item["answer"]["value"]
    if item.get("metric") == "vsp_path":
        raise NotEditable("no_slot_value", "paths do not differ by words")
    referents = frozenset(stems(item.get("question", "")))
    answers = [re.sub(r"\W", "", strip_label(options[letter])).lower() for letter in (gold, target)]
    if referents and (answers[0] in YES and answers[1] in NO or answers[0] in NO and answers[1] in YES):
        return [Slot("polarity", *("yes" if answer in YES else "no" for answer in answers), referents)]
    result = []
    for find_pair in (slot_values, table_values):
        try:
            pair = find_pair(options[gold], options[target])
        except NotEditable:
            continue
        side = any(value.lower() in TABLES["side"] for value in pair)
        new = Slot("side", *pair, referents.difference(*map(stems, pair))) if side else Slot("value", *pair)
        if new not in result:
            result.append(new)
    if not result:
        raise NotEditable("no_slot_value", f"options {options[gold]!r} and {options[target]!r}")
    return result


def slot_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words by which two options differ."""
    pair = [strip_label(text).split() for text in (gold, target)]
    same = [[word.strip(".,;:!?\"'").lower() for word in words] for words in pair]
    n = min(map(len, pair))
    first = next((i for i in range(n) if same[0][i] != same[1][i]), n)
    last = next((i for i in range(n - first) if same[0][-1 - i] != same[1][-1 - i]), n - first)
    values = [" ".join(words[first:len(words) - last]).strip(".,;:!?\"'") for words in pair]
    values = [re.sub(r"^(?:an?|the)\s+", "", value, flags=re.IGNORECASE) for value in values]
    lower = {value.lower() for value in values}
    if not all(values) or len(lower) == 1 or NO_SLOT & lower:
        raise NotEditable("no_slot_value")
    return values[0], values[1]


def table_values(gold: str, target: str) -> tuple[str, str]:
    """Return the words of the first of TABLES that has exactly one, another, in each option."""
    for words in TABLES.values():
        pair = [set(replace_values(text, {word: word for word in words})[1]) for text in (gold, target)]
        if len(pair[0]) == len(pair[1]) == 1 and pair[0] != pair[1]:
            return pair[0].pop(), pair[1].pop()
    raise NotEditable("no_slot_value")


# ---- a slot in a text
def clauses(text: str) -> list[tuple[str, set[str]]]:
    """Return the clauses of a text, which join to it, each with the things that it names; one that begins
    with a pronoun also names those of the clause before."""
    cuts = [0, *(match.start() for match in CLAUSE.finditer(text)), len(text)]
    parts, named = [], set()
    for start, end in zip(cuts, cuts[1:]):
        part = text[start:end]
        named = set(stems(part)) | (named if PRONOUN.match(part) else set())
        parts.append((part, named))
    return parts


def swap(text: str, slot: Slot) -> tuple[str, Counter]:
    """Exchange the words of a slot; count "gold" and "target"."""
    def put(part: str) -> tuple[str, Counter]:
        return negate(part, slot.old) if slot.kind == "polarity" else exchange(part, slot.old, slot.new)

    if slot.kind == "value" or not slot.referents:
        return put(text)
    parts, total = [], Counter()
    for part, named in clauses(text):
        if slot.referents <= named or slot.kind == "side" and slot.referents & named:
            part, mentions = put(part)
            total += mentions
        parts.append(part)
    return "".join(parts), total


def negate(clause: str, gold: str) -> tuple[str, Counter]:
    """Negate the first verb of a clause, or remove its negation."""
    match = VERB.search(clause)
    if not match:
        return clause, Counter()
    says, new, rest = ("no", "", clause[match.end():]) if match[2] else ("yes", " not", clause[match.end():])
    if (match[2] or "").strip().lower() == "no" and match[1].lower() in ("is", "was", "has"):
        new = f" {article_for(rest.strip())}"  # "there is no dog" -> "there is a dog"
    return clause[:match.end(1)] + new + rest, Counter(["gold" if says == gold else "target"])


# ---- the directed edit
def passages(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def put_spans(text: str, spans: list[tuple[int, int]], after: Sequence[str]) -> str:
    """Return `text` with its spans replaced by `after`."""
    for (start, end), span in zip(reversed(spans), reversed(after), strict=True):  # so that offsets hold
        text = text[:start] + span + text[end:]
    return text


def direct(text: str, spans: list[tuple[int, int]], item: dict, target: str) -> tuple[str, dict]:
    """Rewrite the imaginations in `text` to support option `target`; return (text, edit)."""
    before = passages(text, spans)
    slot = pick_slot(before, item, target)
    after = [swap(span, slot)[0] for span in before]
    edit = verify_directed(before, after, item, target)
    return put_spans(text, spans, after), {"editor": "rule", **edit}


def pick_slot(spans: list[str], item: dict, target: str) -> Slot:
    """Return the first slot whose gold value the spans mention, or raise NotEditable."""
    candidates = slots(item, target)
    check_no_letter(spans)
    if slot := next((slot for slot in candidates if count_mentions(spans, slot)["gold"]), None):
        return slot
    raise NotEditable("gold_not_mentioned", f"no mention of {candidates[0].old!r}")


def check_no_letter(spans: list[str]) -> None:
    if any(LETTER.search(span) for span in spans):
        raise NotEditable("letter_in_span", "it names the letter of an option")


def count_mentions(spans: list[str], slot: Slot) -> Counter:
    """Return how often the spans mention the words of a slot, as "gold" and "target"."""
    return sum((swap(span, slot)[1] for span in spans), Counter())


def verify_directed(before: list[str], after: list[str], item: dict, target: str) -> dict:
    """Return the fields of a directed edit's record, or raise NotEditable. Required: a mention of gold; every
    one turned into the target, and gold left only where the target was; no letter of an option, mark or box
    in a span. `n_other` counts words changed besides the values: 0 from the rules."""
    slot = pick_slot(before, item, target)
    if len(after) != len(before):
        raise NotEditable("span_count", f"{len(after)} passages came back, expected {len(before)}")
    if odd := next((mark for span in after for mark in STRUCTURE if mark in span), None):
        raise NotEditable("marks_in_span", f"{odd} in a passage; expected plain words")
    check_no_letter(after)
    if after == before:
        raise NotEditable("unchanged", "nothing was changed")
    was, now = count_mentions(before, slot), count_mentions(after, slot)
    if now["gold"] > was["target"] or now["target"] < was["gold"]:
        raise NotEditable("residual_gold",
                          f"{slot.old!r} is mentioned {now['gold']} times where at most {was['target']} were "
                          f"expected, {slot.new!r} {now['target']} times where {was['gold']} were expected")
    masked = [[mask_slot(span, slot) for span in side] for side in (before, after)]
    return {"kind": slot.kind, "from": slot.old, "to": slot.new, "target": target, "n_replaced": was["gold"],
            "n_exchanged": was["target"], "residual_gold": 0, "word_distance": total_distance(before, after),
            "n_other": total_distance(*masked), "before": before, "after": after}


def mask_slot(span: str, slot: Slot) -> str:
    """Return a span in which the two words of a slot read the same."""
    if slot.kind == "polarity":
        return VERB.sub(r"\1", span.lower())
    return replace_values(span.lower(), {slot.old: SOMETHING, slot.new: SOMETHING})[0]


def total_distance(before: Sequence[str], after: Sequence[str]) -> int:
    return sum(word_distance(old, new) for old, new in zip(before, after, strict=True))


def word_distance(before: str, after: str) -> int:
    """Return the Levenshtein distance over words."""
    words = after.split()
    row = list(range(len(words) + 1))
    for i, word in enumerate(before.split(), 1):
        above, row = row, [i]
        for j, new in enumerate(words, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != new)))
    return row[-1]


# ---- planning items, and other images of an item
def edited_boards(board: Board) -> list[tuple[Board, list[list[int]]]]:
    """Return (board, [cell, cell] that change places) of every edit that makes the shortest path fail and
    leaves another: the goal and a safe cell, or a hole and a cell of that path."""
    size, path, found = range(len(board)), shortest_path(board), []
    kinds = {(row, column): board[row][column] for row in size for column in size}
    moved = [find_cell(board, 2), *(cell for cell, kind in kinds.items() if kind == -1)]
    safe = [cell for cell, kind in kinds.items() if kind == 0]
    for (r, c), (row, column) in ((one, other) for one in moved for other in safe):
        edited = [list(line) for line in board]
        edited[r][c], edited[row][column] = edited[row][column], edited[r][c]
        if path is not None and not walk_vsp(edited, path) and shortest_path(edited) is not None:
            found.append((edited, [[r, c], [row, column]]))
    return found


def planning_item(item: dict, seed: int) -> dict:
    """Return a VSP item as one with options: "A" is a shortest path of its board, "B" one of the board after
    an edit, drawn by seed and item, or of the item's own counterfactual; DataError if a board has neither."""
    board, edit = item["answer"]["value"], item.get("counterfactual")
    if edit:
        other, changed = edit["answer"]["value"], {"images": edit["images"]}
    else:
        choices = edited_boards(board)
        if not choices:
            raise DataError(f"item {item['id']!r}: no two cells of {board} can change places so that another "
                            "path solves it; expected such a board, or a counterfactual")
        rng = random.Random(f"{seed}/edit/{item['id']}")
        goal = [choice for choice in choices if list(find_cell(board, 2)) in choice[1]]
        holes = [choice for choice in choices if choice not in goal]
        other, swap = rng.choice(rng.choice([part for part in (goal, holes) if part]))
        changed = {"swap": swap}
    paths = {letter: ",".join(shortest_path(one) or "") for letter, one in (("A", board), ("B", other))}
    return item | {"boards": {"A": board, "B": other}, "options": list(map(list, paths.items())),
                   "answer": {"type": "letter", "value": "A"},
                   "counterfactual": {**(edit or {}), **changed, "answer": {"type": "letter", "value": "B"}}}


def swap_cells(images: list[Image.Image], edited: dict) -> list[Image.Image]:
    """Return the pictures with the two cells of an edited item's "swap" exchanged in the first."""
    image, result = images[0], images[0].copy()
    side = image.width / len(edited["boards"]["B"])  # of a cell, in pixels
    boxes = [[round(side * n) for n in (c, r, c + 1, r + 1)] for r, c in edited["swap"]]
    for box, other in zip(boxes, boxes[::-1]):
        result.paste(image.crop(other).resize((box[2] - box[0], box[3] - box[1])), box)
    return [result, *images[1:]]


def open_others(item: dict, images: list[Image.Image], root: str) -> dict[str, tuple[dict, list]]:
    """Return (item, images) of the item's answer-changing edit ("counterfactual") and of the item with the
    image that helps with it ("helper": its own, else its region, enlarged), as far as it has them."""
    others, shown = {}, None
    if item.get("counterfactual"):
        edited = {**item, **item["counterfactual"], "id": f"{item['id']}#edit"}
        changed = swap_cells(images, edited) if "swap" in edited else open_images(edited, root)
        others["counterfactual"] = edited, changed
    if item.get("helper"):
        shown = open_images({"images": [item["helper"]]}, root)[0]
    elif item.get("region"):
        shown = crop_region(images[0], tuple(region_in(item, images[0].size)), HELPER_PIXELS)
    return others | ({"helper": (item, [shown] * max(1, len(images)))} if shown else {})
