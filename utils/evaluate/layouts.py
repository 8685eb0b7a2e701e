"""One function per source layout: a published row -> a benchmark item.

Each takes (where, row, name of the benchmark, subset or None) and returns the item, or None for a row of
another subset. The item's "images" are as in the row: bytes, a path (str), or the `SameAs` of another row;
"raw" keeps the row without them. The columns are those of open-compass/VLMEvalKit vlmeval/dataset,
EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks, and the data cards.
"""
import ast
import base64
import binascii
import json
import math
import re
from dataclasses import dataclass

from utils.evaluate.reference_scorers import unescape
from utils.items import ANSWER_TYPES
from utils.jsonl import DataError, check_fields

LETTERS = "ABCDE"
SHORTEST_PICTURE = 65  # a shorter cell names another row (VLMEvalKit vlmeval/dataset/image_base.py)
YES_NO = {"Yes": "yes", "No": "no"}


@dataclass(frozen=True)
class SameAs:
    index: str


def make_item(name: str, where: str, row: dict, key: object, metric: str, answer: object, *, question: str,
              images: list, options: list | None = None, category: str | None = None,
              pictures: tuple[str, ...] = ("image",)) -> dict:
    """Return an item called `name`/`key`; `pictures` are the columns that stay out of "raw"."""
    raw = {column: value for column, value in row.items() if column not in pictures}
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:  # bytes or a date in a parquet file
        raise DataError(f"{where}: a column cannot be kept as JSON ({error})") from error
    item = {"id": f"{name}/{key}", "benchmark": name, "category": category, "group_id": f"{name}/{key}",
            "question": question, "options": options or [],
            "answer": {"type": ANSWER_TYPES[metric], "value": answer}, "images": images, "metric": metric,
            "source": where, "raw": raw}
    return item | ({"hint": row["hint"]} if row.get("hint") else {})


# ---- parts of a row
def from_base64(where: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the picture {text[:20]!r}... is not base64 ({error})") from error


def cell_pictures(where: str, row: dict) -> list:
    """Return the pictures of a TSV's cell: base64, a Python list of it, or another row's index."""
    check_fields(where, row, {"image": str})
    cell = row["image"]
    if cell.startswith("["):
        return [from_base64(where, text) for text in python_list(where, "image", cell)]
    if not cell:
        raise DataError(f"{where}: column 'image' is empty; expected base64, a list, or a row's index")
    return [from_base64(where, cell) if len(cell) >= SHORTEST_PICTURE else SameAs(cell)]


def stored_picture(where: str, row: dict, column: str = "image") -> bytes | str:
    """Return the bytes or path in a column of a data set on the hub."""
    value = row.get(column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)) or not value:
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected bytes or a path")
    return value


def python_list(where: str, column: str, value: object) -> list[str]:
    """Return a list of texts, possibly written as a Python literal."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: column {column!r} {value[:40]!r} is not a Python list "
                            f"({error})") from error
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: column {column!r} is {str(value)[:40]!r}, expected a list of texts")
    return value


def column_options(where: str, row: dict) -> list[list[str]]:
    """Return [[letter, text]] of the columns A to E that are not empty."""
    options = [[letter, row[letter]] for letter in LETTERS if row.get(letter) not in (None, "")]
    if wrong := [text for _, text in options if not isinstance(text, str)]:
        raise DataError(f"{where}: option {wrong[0]!r} is {type(wrong[0]).__name__}, expected text")
    return options


def bare_question(where: str, question: str, options: list[list[str]]) -> str:
    """Return a question without options that repeat the columns, as in some copies of HR-Bench."""
    for mark in ("({}) {}", "{}. {}"):
        tail = "".join("\n" + mark.format(*option) for option in options)
        if question.rstrip().endswith(tail):
            return question.rstrip().removesuffix(tail)
    if re.search(r"\n[^\S\n]*(\(A\)|A[.)]) ", question):
        raise DataError(f"{where}: the question {question[-60:]!r} has other options than {options}")
    return question


# ---- V*
def choices_tsv(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """VLMEvalKit's multiple choice: V* and BLINK."""
    check_fields(where, row, {"index": str, "question": str, "answer": str, "category": str})
    if subset not in (None, row["category"]):
        return None
    return make_item(name, where, row, row["index"], "mcq", row["answer"], question=row["question"],
                     options=column_options(where, row), category=row["category"],
                     images=cell_pictures(where, row))


def vstar_original(where: str, row: dict, name: str, subset: str | None) -> dict:
    """V* as its authors publish it, for its regions, which enclose all boxes [left, top, width, height]
    (penghao-wu/vstar, visual_search.py); not scored, as its right option is always the first."""
    check_fields(where, row, {"question": str, "options": list, "image_file": str, "test_type": str})
    key = row["image_file"].rsplit(".", 1)[0]
    item = make_item(name, where, row, key, "unscored", row["options"][:1], question=row["question"],
                     category=row["test_type"], images=[row["image_file"]])
    boxes = row.get("bbox") or []
    if not all(isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) for n in box)
               for box in boxes):
        raise DataError(f"{where}: bbox {str(boxes)[:60]}, expected a list of [left, top, width, height]")
    if boxes:
        left, top, width, height = zip(*boxes)
        right, bottom = max(map(sum, zip(left, width))), max(map(sum, zip(top, height)))
        item["region"] = [int(min(left)), int(min(top)), math.ceil(right), math.ceil(bottom)]
    return item


# ---- the others
def hrbench(where: str, row: dict, name: str, subset: str | None) -> dict:
    """HR-Bench, TSV or parquet; cycle_category is the rotation, image is base64."""
    check_fields(where, row, {"index": (str, int), "question": str, "answer": str, "category": str,
                              "cycle_category": (str, int)})
    options = column_options(where, row)
    return make_item(name, where, row, f"{row['index']}/{row['cycle_category']}", "mcq", row["answer"],
                     options=options, category=row["category"], images=cell_pictures(where, row),
                     question=bare_question(where, row["question"], options))


def mme_realworld(where: str, row: dict, name: str, subset: str | None) -> dict:
    """MME-RealWorld-Lite; an option without its bracketed letter is an error (VLMEvalKit issue 491)."""
    column = "multi-choice options"
    check_fields(where, row, {"index": (str, int), "question": str, "answer": str, "category": str,
                              column: (str, list)})
    texts = python_list(where, column, row[column])
    matches = [re.fullmatch(rf"\({letter}\) ?(.*)", text, re.DOTALL) for letter, text in zip(LETTERS, texts)]
    if len(texts) != len(LETTERS) or not all(matches):
        raise DataError(f"{where}: options {texts}, expected five, '(A) ...' to '(E) ...'")
    has_bytes = isinstance(row.get("bytes"), str)
    images = [from_base64(where, row["bytes"])] if has_bytes else cell_pictures(where, row)
    return make_item(name, where, row, row["index"], "mcq", row["answer"], question=row["question"],
                     images=images, category=row["category"], pictures=("image", "bytes"),
                     options=[[letter, match[1]] for letter, match in zip(LETTERS, matches)])


def blink_hub(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """BLINK; image_1 to image_4 are null beyond the last."""
    check_fields(where, row, {"idx": str, "question": str, "sub_task": str, "choices": list, "answer": str,
                              "prompt": str})
    if subset not in (None, row["sub_task"]):
        return None
    columns = sorted(column for column in row if re.fullmatch(r"image_\d", column))
    filled = [column for column in columns if row[column] is not None]
    if filled != columns[:len(filled)]:
        raise DataError(f"{where}: pictures in {', '.join(filled)}, "
                        "expected them from image_1 on without a gap")
    gold = re.fullmatch(r"\(([A-E])\)", row["answer"])
    if not gold:
        raise DataError(f"{where}: answer {row['answer']!r}, expected a bracketed letter such as '(A)'")
    return make_item(name, where, row, row["idx"], "mcq", gold[1], question=row["question"],
                     category=row["sub_task"], pictures=tuple(columns),
                     options=[list(pair) for pair in zip(LETTERS, row["choices"])],
                     images=[stored_picture(where, row, column) for column in filled])


def tablevqa(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """TableVQABench with qa_id and gt; or VLMEvalKit's TSV with index, answer and split. Golds are values
    joined with bars, escaped as in WikiTableQuestions."""
    if row.get("split", subset) != subset:
        return None
    key, gold = ("qa_id", "gt") if "qa_id" in row else ("index", "answer")
    check_fields(where, row, {key: (str, int), "question": str, gold: str})
    if subset == "vtabfact":
        if row[gold] not in ("0", "1"):
            raise DataError(f"{where}: gold {row[gold]!r}, expected the text '1' or '0'")
        metric, value = "tabfact", row[gold] == "1"
    else:
        metric, value = "wtq", [unescape(text) for text in row[gold].split("|")]
    images = [stored_picture(where, row)] if "qa_id" in row else cell_pictures(where, row)
    return make_item(name, where, row, row[key], metric, value, question=row["question"], category=subset,
                     images=images)


def mme(where: str, row: dict, name: str, subset: str | None) -> dict:
    """MME, where question_id names the picture; or VLMEvalKit's TSV with index."""
    check_fields(where, row, {"question": str, "answer": str, "category": str})
    if row["answer"] not in YES_NO:
        raise DataError(f"{where}: answer {row['answer']!r}, expected {' or '.join(YES_NO)}")
    gold = YES_NO[row["answer"]]
    if "question_id" in row:
        key, images = f"{row['question_id']}/{gold}", [stored_picture(where, row)]
    else:
        check_fields(where, row, {"index": str})
        key, images = row["index"], cell_pictures(where, row)
    return make_item(name, where, row, key, "yesno_pair", gold, question=row["question"],
                     category=row["category"], images=images)


def ocrbench_v2(where: str, row: dict, name: str, subset: str | None) -> dict:
    """OCRBench-v2 (hub or TSV), for its latents alone: not scored."""
    key, column = ("id" if "id" in row else "index"), ("answers" if "answers" in row else "answer")
    check_fields(where, row, {key: (str, int), "question": str, "type": str, column: (str, list)})
    values = [row[column]] if isinstance(row[column], str) else python_list(where, column, row[column])
    images = cell_pictures(where, row) if isinstance(row.get("image"), str) else [stored_picture(where, row)]
    return make_item(name, where, row, row[key], "unscored", values, question=row["question"],
                     category=row["type"], images=images)


def vsp(where: str, row: dict, name: str, subset: str | None) -> dict:
    """VSP spatial planning as Mirage evaluates it; the gold is the map."""
    check_fields(where, row, {"text_input": str, "image_input": str, "map_id": str, "map_desc": list})
    level = f"level_{len(row['map_desc'])}"
    return make_item(name, where, row, f"{level}/{row['map_id']}", "vsp_path", row["map_desc"],
                     question=row["text_input"], category=level, images=[row["image_input"]])
