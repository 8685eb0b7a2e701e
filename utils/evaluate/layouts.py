"""One function per source layout, a published row -> a benchmark item; and which items belong together.

A layout takes (where, row, name of the benchmark) and returns the item. Its "images" are as in the row:
bytes, a path (str), or the `SameAs` of another row; "raw" keeps the row without them. Columns are those of
open-compass/VLMEvalKit vlmeval/dataset (commit e8e78f05), EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks (commit
75571cfe), and the data cards.
"""
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable

from utils.evaluate.reference_scorers import unescape
from utils.evaluate.sources import (PICTURES, cell, column_options, is_missing, is_nan, key_of, letter_of,
                                    lettered, option_text, pictures_in, text_list)
from utils.items import ANSWER_TYPES
from utils.jsonl import DataError, call_key, check_fields

REALWORLD_KINDS = ("Perception", "Reasoning")
REALWORLD_DOMAINS = ("Monitoring", "Autonomous_Driving", "OCR with Complex Context", "Diagram and Table",
                     "Remote Sensing")  # VLMEvalKit vlmeval/dataset/utils/multiple_choice.py
MMSTAR_FORMS = tuple(re.compile(form, re.DOTALL) for form in (
    r"(.*?)\s*\bOptions:\s*A: ?(.*?),\s*B: ?(.*?)(?:,\s*C: ?(.*?))?(?:,\s*D: ?(.*?))?",
    r"(.*?)\s*\bChoices:\s*\(A\) ?(.*?)\s*\(B\) ?(.*?)(?:\s*\(C\) ?(.*?))?(?:\s*\(D\) ?(.*?))?"))
YES_NO = {"Yes": "yes", "No": "no"}


def make_item(name: str, where: str, row: dict, key: str, metric: str, answer: object, *,
              question: str | None = None, images: list | None = None, options: list | None = None,
              category: str | None = None, pictures: tuple[str, ...] = PICTURES) -> dict:
    """Return an item called `name`/`key`. Question, category and images are by default those of the columns
    of that name; `pictures` are the columns that stay out of "raw"."""
    raw = {column: None if is_nan(value) else value for column, value in row.items()
           if column not in pictures}
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:  # bytes or a date in a parquet file
        raise DataError(f"{where}: a column cannot be kept as JSON ({error})") from error
    item = {"id": f"{name}/{key}", "benchmark": name, "group_id": f"{name}/{key}",
            "category": category or option_text(row.get("category")),
            "question": question or cell(where, row, "question"),
            "options": options or [], "answer": {"type": ANSWER_TYPES[metric], "value": answer},
            "images": pictures_in(where, row) if images is None else images, "metric": metric,
            "source": where, "raw": raw}
    return item | ({"hint": hint} if (hint := option_text(row.get("hint"))) else {})


# ---- multiple choice
def choices(where: str, row: dict, name: str) -> dict:
    """VLMEvalKit's multiple choice (V*, BLINK, MMVP, MMStar), and a file of one's own: index or id, question,
    A, B, ..., answer, image or image_path, optionally category and hint."""
    return make_item(name, where, row, key_of(where, row, "index", "id"), "mcq",
                     letter_of(where, row, "answer"), options=column_options(where, row))


def vstar_original(where: str, row: dict, name: str) -> dict:
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


def hrbench(where: str, row: dict, name: str) -> dict:
    """HR-Bench, TSV or parquet; cycle_category is the rotation."""
    row = row | {"cycle_category": key_of(where, row, "cycle_category")}
    item = choices(where, row, name)
    return item | {"id": f"{item['id']}/{row['cycle_category']}",
                   "question": bare_question(where, item["question"], item["options"])}


def bare_question(where: str, question: str, options: list[list[str]]) -> str:
    """Return a question without options that repeat the columns, as in some copies of HR-Bench."""
    for mark in ("({}) {}", "{}. {}"):
        tail = "".join("\n" + mark.format(*option) for option in options)
        if question.rstrip().endswith(tail):
            return question.rstrip().removesuffix(tail)
    if re.search(r"\n[^\S\n]*(\(A\)|A[.)]) ", question):
        raise DataError(f"{where}: the question {question[-60:]!r} has other options than {options}")
    return question


def mme_realworld(where: str, row: dict, name: str) -> dict:
    """MME-RealWorld-Lite for VLMEvalKit and lmms-eval; an option without its bracketed letter is an error
    (VLMEvalKit issue 491)."""
    return make_item(name, where, row, key_of(where, row, "index"), "mcq", letter_of(where, row, "answer"),
                     options=bracketed(where, "multi-choice options", row))


def mme_realworld_official(where: str, row: dict, name: str) -> dict:
    """MME-RealWorld-Lite's own JSON (yfzhang114/MME-RealWorld, evaluation/output_test_template.json, commit
    1cd8d116). Copies differ in which field is called Task, Subtask or Category."""
    fields = [cell(where, row, column) for column in ("Task", "Subtask", "Category")]
    kinds = [field for field in fields if field in REALWORLD_KINDS]
    domains = [field for field in fields if field in REALWORLD_DOMAINS]
    if len(kinds) != 1 or len(domains) != 1:
        raise DataError(f"{where}: Task, Subtask, Category {fields}, expected one of {REALWORLD_KINDS} and "
                        f"one of {REALWORLD_DOMAINS}")
    return make_item(name, where, row, key_of(where, row, "Question_id"), "mcq",
                     letter_of(where, row, "Ground truth"), question=cell(where, row, "Text"),
                     options=bracketed(where, "Answer choices", row), category=f"{kinds[0]}/{domains[0]}",
                     images=pictures_in(where, row, ("Image",)), pictures=("Image",))


def bracketed(where: str, column: str, row: dict) -> list[list[str]]:
    """Return [[letter, text]] of MME-RealWorld's five options, "(A) ..." to "(E) ..."."""
    texts = text_list(where, column, row.get(column))
    matches = [re.fullmatch(rf"\({letter}\) ?(.*)", str(text), re.DOTALL)
               for letter, text in zip("ABCDE", texts)]
    if len(texts) != 5 or not all(matches):
        raise DataError(f"{where}: options {texts}, expected five, '(A) ...' to '(E) ...'")
    return [[letter, match[1]] for letter, match in zip("ABCDE", matches)]


def blink_hub(where: str, row: dict, name: str) -> dict:
    """BLINK; image_1 to image_4 are null beyond the last."""
    columns = sorted(column for column in row if re.fullmatch(r"image_\d", column))
    filled = [column for column in columns if not is_missing(row[column])]
    if filled != columns[:len(filled)]:
        raise DataError(f"{where}: pictures in {', '.join(filled)}, "
                        "expected them from image_1 on without a gap")
    return make_item(name, where, row, key_of(where, row, "idx"), "mcq", letter_of(where, row, "answer"),
                     category=cell(where, row, "sub_task"),
                     options=lettered(where, "'choices'", text_list(where, "choices", row.get("choices"))),
                     images=[picture for column in filled for picture in pictures_in(where, row, (column,))],
                     pictures=tuple(columns))


def cv_bench(where: str, row: dict, name: str) -> dict:
    """CV-Bench: its card's parquet, JSONL with `filename`, or VLMEvalKit's TSV (vlmeval/dataset/image_mcq.py,
    CVBench). The category is source/task, as the score is of sources."""
    options = (lettered(where, "'choices'", text_list(where, "choices", row["choices"])) if "choices" in row
               else column_options(where, row))
    parts = filter(None, (cell(where, row, "source"), option_text(row.get("task", row.get("category")))))
    return make_item(name, where, row, key_of(where, row, "idx", "index"), "mcq",
                     letter_of(where, row, "answer"), options=options,
                     category="/".join(parts), images=pictures_in(where, row, (*PICTURES, "filename")))


def mmvp(where: str, row: dict, name: str) -> dict:
    """MMVP as published (Questions.csv, in some copies with "lndex", and "MMVP Images" next to it; after
    tsb0601/MMVP, evaluate_mllm) and on the hub (lmms-lab-eval/MMVP, with `image`)."""
    key = key_of(where, row, "Index", "lndex")
    texts = re.split(r"\s*\([a-z]\)\s*", cell(where, row, "Options").strip())
    if texts[0] or len(texts) < 3:
        raise DataError(f"{where}: options {row['Options']!r}, expected '(a) ... (b) ...'")
    images = None if "image" in row else [f"MMVP Images/{key}.jpg"]
    return make_item(name, where, row, key, "mcq", letter_of(where, row, "Correct Answer"), images=images,
                     question=cell(where, row, "Question"), options=lettered(where, "'Options'", texts[1:]))


def mmstar(where: str, row: dict, name: str) -> dict:
    """MMStar: Lin-Chen/MMStar, whose questions end in "Options: A: ..., B: ..." or "Choices: (A) ... (B)
    ...", or VLMEvalKit's TSV. A right option that is "nan" (MMStar issue 12) keeps that text: without it the
    question would have no answer."""
    gold, question = letter_of(where, row, "answer"), cell(where, row, "question")
    if "A" in row:
        published, options = {letter for letter in row if len(letter) == 1}, column_options(where, row)
    else:
        match = next(filter(None, (form.fullmatch(question.strip()) for form in MMSTAR_FORMS)), None)
        if match is None:
            raise DataError(f"{where}: the question {question[-80:]!r} ends in no options; expected "
                            "'Options: A: ..., B: ...' or 'Choices: (A) ... (B) ...'")
        question, *texts = match.groups()
        published = "ABCD"[:4 - texts.count(None)]
        options = lettered(where, "'question'", texts)
    if gold in published and gold not in dict(options):
        options = sorted([*options, [gold, "nan"]])
    return make_item(name, where, row, key_of(where, row, "index"), "mcq", gold, question=question,
                     options=options)


# ---- the others
def tablevqa(where: str, row: dict, name: str) -> dict:
    """TableVQABench with qa_id and gt; or VLMEvalKit's TSV with index, answer and split. Golds are values
    joined with bars, escaped as in WikiTableQuestions."""
    split = name.rpartition("/")[2]
    gold = cell(where, row, "gt", "answer")
    if split == "vtabfact":
        if gold.strip() not in ("0", "1"):
            raise DataError(f"{where}: gold {gold!r}, expected the text '1' or '0'")
        metric, value = "tabfact", gold.strip() == "1"
    else:
        metric, value = "wtq", [unescape(text) for text in gold.split("|")]
    return make_item(name, where, row, key_of(where, row, "qa_id", "index"), metric, value, category=split)


def mme(where: str, row: dict, name: str) -> dict:
    """MME, where question_id names the picture; or VLMEvalKit's TSV with index."""
    answer = cell(where, row, "answer").strip()
    if answer not in YES_NO:
        raise DataError(f"{where}: answer {answer!r}, expected {' or '.join(YES_NO)}")
    key = f"{row['question_id']}/{YES_NO[answer]}" if "question_id" in row else key_of(where, row, "index")
    return make_item(name, where, row, key, "yesno_pair", YES_NO[answer])


def ocrbench_v2(where: str, row: dict, name: str) -> dict:
    """OCRBench-v2 (hub or TSV), for its latents alone: not scored."""
    golds = row.get("answers", row.get("answer"))
    values = list(map(str, golds)) if isinstance(golds, list) else [cell(where, row, "answers", "answer")]
    return make_item(name, where, row, key_of(where, row, "id", "index"), "unscored", values,
                     category=cell(where, row, "type"))


def vsp(where: str, row: dict, name: str) -> dict:
    """VSP spatial planning as Mirage evaluates it; the gold is the map."""
    check_fields(where, row, {"text_input": str, "image_input": str, "map_id": str, "map_desc": list})
    level = f"level_{len(row['map_desc'])}"
    return make_item(name, where, row, f"{level}/{row['map_id']}", "vsp_path", row["map_desc"],
                     question=row["text_input"], category=level, images=[row["image_input"]])


# ---- clusters
def by_question(item: dict, place: int) -> str:
    """One group for all rotations of a question."""
    key = call_key(images=[image["sha256"] for image in item["images"]], question=item["question"].strip(),
                   gold=dict(item["options"]).get(item["answer"]["value"]),
                   texts=sorted(text for _, text in item["options"]))
    return f"{item['benchmark']}/{key[:16]}"


def by_image(item: dict, place: int) -> str:
    return f"{item['benchmark']}/{item['category']}/{item['images'][0]['sha256'][:16]}"


def by_two(item: dict, place: int) -> str:
    """MMVP: rows 1 and 2 are a pair, 3 and 4 (tsb0601/MMVP, gpt_grader)."""
    return f"{item['benchmark']}/{place // 2}"


def values_by_group(items: list[dict], value: Callable[[dict], str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for item in items:
        groups[item["group_id"]].append(value(item))
    return groups


def rotations_fault(items: list[dict]) -> str | None:
    cycles = values_by_group(items, lambda item: str(item["raw"]["cycle_category"]))
    wrong = [group for group, cycle in cycles.items() if sorted(cycle) != ["0", "1", "2", "3"]]
    if not wrong:
        return None
    first = next(item["id"] for item in items if item["group_id"] == wrong[0])
    return (f"{len(wrong)} of {len(cycles)} questions do not occur in four rotations, first {first} with "
            f"{sorted(cycles[wrong[0]])}; expected 0, 1, 2, 3 of one picture, text and options")


def halves_fault(items: list[dict]) -> str | None:
    """Return the fault of MMVP's pairs, which ask one question about two pictures."""
    for first, second in zip(items[::2], items[1::2]):
        if first["question"].strip().lower() != second["question"].strip().lower():
            return f"{first['id']} and {second['id']} are no pair; expected one question about two pictures"
    return None


def pairs_fault(items: list[dict]) -> str | None:
    golds = values_by_group(items, lambda item: item["answer"]["value"])
    wrong = [group for group, answers in golds.items() if answers.count("yes") != answers.count("no")]
    if not wrong:
        return None
    return (f"{len(wrong)} of {len(golds)} pictures have no pair, first {wrong[0]} with {golds[wrong[0]]}; "
            "expected as many golds 'yes' as 'no'")
