"""One function a source layout: a published row -> a benchmark item.

Each takes (where, row, name of the benchmark, subset or None) and returns the item, or None for a row of
another subset. Its "images" are still what the row holds: bytes, a path (str), or the `SameAs` of another
row; utils/evaluate/benchmarks.py stores them. Texts and letters stay verbatim; "raw" keeps the whole row
without its pictures, so it can be rebuilt. The columns: open-compass/VLMEvalKit vlmeval/dataset,
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
from utils.items import ANSWER_TYPES, board_fault
from utils.jsonl import DataError, check_fields

LETTERS = "ABCDE"
# characters; a shorter cell names another row (VLMEvalKit vlmeval/dataset/image_base.py)
SHORTEST_PICTURE = 65
# what ends V*'s text, see vstar_inline
BAKED = "\nAnswer with the option's letter from the given choices directly."
YES_NO = {"Yes": "yes", "No": "no"}


@dataclass(frozen=True)
class SameAs:
    """The pictures of the row with this index."""

    index: str


def make_item(name: str, where: str, row: dict, key: object, metric: str, answer: object, *, question: str,
              images: list, options: list | None = None, category: str | None = None,
              pictures: tuple[str, ...] = ("image",)) -> dict:
    """Return an item called `name`/`key`; `pictures` are the columns that stay out of "raw"."""
    raw = {column: value for column, value in row.items() if column not in pictures}
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:  # bytes or a date, of a parquet file
        raise DataError(
            f"{where}: a column cannot be kept as JSON ({error}); expected texts and numbers beside the "
                        "pictures") from error
    item = {"id": f"{name}/{key}", "benchmark": name, "category": category, "group_id": f"{name}/{key}",
            "question": question, "options": options or [], "answer": {"type": ANSWER_TYPES[metric],
                                                                       "value": answer},
            "images": images, "metric": metric, "source": where, "raw": raw}
    return item | ({"hint": row["hint"]} if row.get("hint") else {})


# --------------------------------------------------------------------------------------------- parts of a row
def from_base64(where: str, text: str) -> bytes:
    """Return the picture that a cell holds, byte for byte; DataError for a cell that is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: the picture {text[:20]!r}... is not base64 ({error}); expected the encoded file") from error


def cell_pictures(where: str, row: dict) -> list:
    """Return the pictures of a TSV's `image` cell: base64, a Python list of it, or the index of the row that
    has them."""
    check_fields(where, row, {"image": str})
    cell = row["image"]
    if cell.startswith("["):
        return [from_base64(where, text) for text in python_list(where, "image", cell)]
    if not cell:
        raise DataError(
            f"{where}: column 'image' is empty; expected base64, a list of it, or another row's index")
    return [from_base64(where, cell) if len(cell) >= SHORTEST_PICTURE else SameAs(cell)]


def stored_picture(where: str, row: dict, column: str = "image") -> bytes | str:
    """Return the picture of a hub data set's column: its bytes, or the path of the file that holds it."""
    value = row.get(column)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)) or not value:
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}, expected a picture's bytes or path")
    return value


def python_list(where: str, column: str, value: object) -> list[str]:
    """Return a list of texts that may be written as a Python literal (never evaluated); DataError for
    anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(
                f"{where}: column {column!r} {str(value)[:40]!r} is no Python list ({error})") from error
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: column {column!r} is {str(value)[:40]!r}, expected a list of texts")
    return value


def column_options(where: str, row: dict) -> list[list[str]]:
    """Return [[letter, text]] of the columns A to E that are not empty."""
    options = [[letter, row[letter]] for letter in LETTERS if row.get(letter) not in (None, "")]
    if odd := [text for _, text in options if not isinstance(text, str)]:
        raise DataError(f"{where}: option {odd[0]!r} is {type(odd[0]).__name__}, expected text")
    return options


def bare_question(where: str, question: str, options: list[list[str]]) -> str:
    """Return the question without options that repeat the columns; DataError for options in it that do not.

    Some published copies of HR-Bench carry "\\n(A) ..." in the question beside the columns; asked as it
    stands, the options would appear twice.
    """
    for mark in ("({}) {}", "{}. {}"):
        tail = "".join("\n" + mark.format(*option) for option in options)
        if question.rstrip().endswith(tail):
            return question.rstrip().removesuffix(tail)
    if re.search(r"\n[^\S\n]*(\(A\)|A[.)]) ", question):
        raise DataError(
            f"{where}: the question {question[-60:]!r} has options that differ from the columns {options}")
    return question


# ------------------------------------------------------------------------------------------------ V*
def choices_tsv(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """VLMEvalKit's multiple choice: index, image, question (bare), A to D (empty where there are two),
    answer, category.

    V* and, with `subset` as its category, BLINK.
    """
    check_fields(where, row, {"index": str, "question": str, "answer": str, "category": str})
    if subset not in (None, row["category"]):
        return None
    return make_item(name, where, row, row["index"], "mcq", row["answer"], question=row["question"],
                     options=column_options(where, row), category=row["category"],
                     images=cell_pictures(where, row))


def vstar_inline(where: str, row: dict, name: str, subset: str | None) -> dict:
    """V* of lmms-lab, and of its authors' test_questions.jsonl: image, text, category, label, question_id.

    The text has the options and an instruction in it:
    "Stem\\n(A) rubber\\n(B) cotton\\nAnswer with the option's letter from the given choices directly."
    """
    check_fields(where, row, {"text": str, "label": str, "category": str, "question_id": (str, int)})
    stem, *parts = re.split(r"\n\(([A-E])\) ", row["text"].removesuffix(BAKED))
    options = [list(pair) for pair in zip(parts[::2], parts[1::2])]
    if inline_text(stem, options) != row["text"] or len(options) < 2:
        raise DataError(
            f"{where}: text {row['text'][:80]!r}, expected a stem, a line an option ('(A) ...') and {BAKED!r}")
    return make_item(name, where, row, row["question_id"], "mcq", row["label"], question=stem,
                     options=options,
                     category=row["category"], images=[stored_picture(where, row)])


def inline_text(stem: str, options: list[list[str]]) -> str:
    """Return V*'s text as lmms-lab stores it: the other way round of `vstar_inline`."""
    return stem + "".join(f"\n({letter}) {text}" for letter, text in options) + BAKED


def vstar_original(where: str, row: dict, name: str, subset: str | None) -> dict:
    """V* of its authors: question, options (whole sentences, the first one is right), target boxes.

    They score each option by its likelihood as the reply to the bare question (vstar_bench_eval.py,
    multiple_choices_inference). The metric says so: asked by letters, a model that says "A" would always be
    right. The boxes are [left, top, width, height] (visual_search.py); the region is the box around all of
    them.
    """
    check_fields(where, row, {"question": str, "options": list, "image_file": str, "test_type": str})
    key = row["image_file"].rsplit(".", 1)[0]
    item = make_item(name, where, row, key, "likelihood", "A", question=row["question"],
                     category=row["test_type"],
                     options=[list(pair) for pair in zip(LETTERS, row["options"])],
                     images=[row["image_file"]])
    boxes = row.get("bbox") or []
    if not all(isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) for n in box)
               for box in boxes):
        raise DataError(f"{where}: bbox {str(boxes)[:60]}, expected a list of [left, top, width, height]")
    if boxes:
        x, y, w, h = zip(*boxes)
        ends = max(map(sum, zip(x, w))), max(map(sum, zip(y, h)))
        item["region"] = [int(min(x)), int(min(y)), math.ceil(ends[0]), math.ceil(ends[1])]
    return item


# ------------------------------------------------------------------------------------------------ the others
def hrbench(where: str, row: dict, name: str, subset: str | None) -> dict:
    """HR-Bench, TSV or parquet: index, question, answer, category, A to D, cycle_category (the rotation),
    image (base64)."""
    check_fields(where, row, {"index": (str, int), "question": str, "answer": str, "category": str,
                              "cycle_category": (str, int)})
    options = column_options(where, row)
    return make_item(name, where, row, f"{row['index']}/{row['cycle_category']}", "mcq", row["answer"],
                     options=options,
                     category=row["category"], question=bare_question(where, row["question"], options),
                     images=cell_pictures(where, row))


def mme_realworld(where: str, row: dict, name: str, subset: str | None) -> dict:
    """MME-RealWorld-Lite: index, image or bytes (base64), question, multi-choice options ("(A) ..." to "(E)
    ..."), answer, category ("Perception/OCR with Complex Context"), l2-category.

    The options are a list or a Python list as text. VLMEvalKit cuts four characters from each; here one
    without its bracketed letter is an error, because the cut would take a letter of its text (VLMEvalKit
    issue 491).
    """
    column = "multi-choice options"
    check_fields(where, row, {"index": (str, int), "question": str, "answer": str, "category": str,
                              column: (str, list)})
    texts = python_list(where, column, row[column])
    found = [re.fullmatch(rf"\({letter}\) ?(.*)", text, re.DOTALL) for letter, text in zip(LETTERS, texts)]
    if len(texts) != len(LETTERS) or not all(found):
        raise DataError(f"{where}: options {texts}, expected five, '(A) ...' to '(E) ...'")
    images = [from_base64(where, row["bytes"])] if isinstance(row.get("bytes"), str) else cell_pictures(where,
                                                                                                        row)
    return make_item(name, where, row, row["index"], "mcq", row["answer"], question=row["question"],
                     images=images,
                     options=[[letter, match[1]] for letter, match in zip(LETTERS, found)],
                     category=row["category"],
                     pictures=("image", "bytes"))


def blink_hub(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """BLINK: idx, question, sub_task, image_1 to image_4 (null beyond the last), choices, answer ("(A)"),
    prompt."""
    check_fields(where, row, {"idx": str, "question": str, "sub_task": str, "choices": list, "answer": str,
                              "prompt": str})
    if subset not in (None, row["sub_task"]):
        return None
    # their order carries the meaning
    columns = sorted(column for column in row if re.fullmatch(r"image_\d", column))
    held = [column for column in columns if row[column] is not None]
    if held != columns[:len(held)]:
        raise DataError(
            f"{where}: pictures in {', '.join(held)}, expected them from image_1 on without a gap")
    gold = re.fullmatch(r"\(([A-E])\)", row["answer"])
    if not gold:
        raise DataError(f"{where}: answer {row['answer']!r}, expected a bracketed letter such as '(A)'")
    return make_item(name, where, row, row["idx"], "mcq", gold[1], question=row["question"],
                     category=row["sub_task"],
                     options=[list(pair) for pair in zip(LETTERS, row["choices"])], pictures=tuple(columns),
                     images=[stored_picture(where, row, column) for column in held])


def tablevqa(where: str, row: dict, name: str, subset: str | None) -> dict | None:
    """TableVQABench: qa_id, image, question, text_markdown_table, text_html_table, gt; or VLMEvalKit's TSV:
    index, image, question, answer, split.

    vwtq, vwtq_syn: values joined with bars, escaped as in WikiTableQuestions. vtabfact: the text "1" or "0".
    """
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
    """MME: question_id (names the picture), image, question, answer (Yes or No), category; or VLMEvalKit's
    TSV with index."""
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
                     category=row["category"],
                     images=images)


def ocrbench_v2(where: str, row: dict, name: str, subset: str | None) -> dict:
    """OCRBench-v2: id (TSV: index), image, question, type (the task), answers (a list; in a TSV its text,
    kept as one).

    A source of latents alone: the scorers of its tasks are not here, so the metric is "unscored".
    """
    key, column = ("id" if "id" in row else "index"), ("answers" if "answers" in row else "answer")
    check_fields(where, row, {key: (str, int), "question": str, "type": str, column: (str, list)})
    values = [row[column]] if isinstance(row[column], str) else python_list(where, column, row[column])
    images = cell_pictures(where, row) if isinstance(row.get("image"), str) else [stored_picture(where, row)]
    return make_item(name, where, row, row[key], "unscored", values,
                     question=row["question"], category=row["type"], images=images)


def vsp(where: str, row: dict, name: str, subset: str | None) -> dict:
    """VSP spatial planning as Mirage evaluates it: the text verbatim, its <image> marker says where the map
    stands.

    The gold is the map itself: 1 start, 2 goal, -1 hole, 0 safe; a reply is right if its path walks to the
    goal.
    """
    check_fields(where, row, {"text_input": str, "image_input": str, "map_id": str, "map_desc": list})
    if fault := board_fault(row["map_desc"]):
        raise DataError(f"{where}: map_desc {fault}")
    level = f"level_{len(row['map_desc'])}"
    return make_item(name, where, row, f"{level}/{row['map_id']}", "vsp_path", row["map_desc"],
                     question=row["text_input"],
                     category=level, images=[row["image_input"]])
