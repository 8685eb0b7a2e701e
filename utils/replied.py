"""What a reply says, as fields of a record: its answer by rule, whether it loops, where it leaves another."""
from utils.answers import extract_choice

BOX = "\\boxed{"


def answer_fields(item: dict, text: str, last_words: str, ids: list[int], finish: str) -> dict:
    """Return the fields that come from a reply's words; the answer is looked for in `last_words`, after all imagination."""
    found = extract_choice(last_words.strip(), dict(map(tuple, item["options"])), finish)
    return {"text": text, "finish": finish, "n_new": len(ids), "pred": found.letter, "rule": found.rule,
            "correct": found.letter == item["answer"]["value"], "degenerate": is_degenerate(ids, finish)}


def is_degenerate(ids: list[int], finish: str) -> bool:
    """Return whether a reply ends in a loop: a tail of period up to 64, or cut off with half its 4-grams repeated."""
    for period in range(1, 65):
        tail = ids[-max(3 * period, 48):]
        if len(tail) == max(3 * period, 48) and tail[period:] == tail[:-period]:
            return True
    grams = list(zip(*(ids[i:] for i in range(4))))
    return finish == "length" and bool(grams) and len(set(grams)) < len(grams) / 2


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first index at which two lists differ, None if they are equal."""
    both = min(len(one), len(other))
    return next((j for j in range(both) if one[j] != other[j]), None if len(one) == len(other) else both)


def stem_of(words: str) -> str | None:
    """Return a reply's last words up to and including the opening of its last box; None without one."""
    place = words.rfind(BOX)
    return None if place < 0 else " " + words[:place].lstrip() + BOX
