"""One function per source layout, a published row -> a benchmark item; and which items belong together.

The "images" of an item are as in the row: bytes, a path (str), or the `SameAs` of another row; "raw" keeps
the row without them. Columns are those of open-compass/VLMEvalKit vlmeval/dataset (commit e8e78f05),
EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks (commit 75571cfe), and the data cards.
"""
import json
import math
import re
from collections import defaultdict
from dataclasses import replace

from utils.evaluate.reference_scorers import unescape
from utils.evaluate.sources import PICTURES, Row, is_missing, is_nan, option_text
from utils.items import ANSWER_TYPES
from utils.jsonl import call_key, check_fields

REALWORLD_KINDS = ("Perception", "Reasoning")
REALWORLD_DOMAINS = ("Monitoring", "Autonomous_Driving", "OCR with Complex Context", "Diagram and Table",
                     "Remote Sensing")  # VLMEvalKit vlmeval/dataset/utils/multiple_choice.py
MMSTAR_FORMS = tuple(re.compile(form, re.DOTALL) for form in (
    r"(.*?)\s*\bOptions:\s*A: ?(.*?),\s*B: ?(.*?)(?:,\s*C: ?(.*?))?(?:,\s*D: ?(.*?))?",
    r"(.*?)\s*\bChoices:\s*\(A\) ?(.*?)\s*\(B\) ?(.*?)(?:\s*\(C\) ?(.*?))?(?:\s*\(D\) ?(.*?))?"))
YES_NO = {"Yes": "yes", "No": "no"}


def make_item(row: Row, key: str, metric: str, answer: object, *, question: str | None = None,
              images: list | None = None, options: list | None = None, category: str | None = None,
              pictures: tuple[str, ...] = PICTURES) -> dict:
    """Return an item called `key`. Question, category and images are by default those of the columns of that
    name; `pictures` are the columns that stay out of "raw"."""
    raw = {column: None if is_nan(value) else value for column, value in row.cells.items()
           if column not in pictures}
    try:
        json.dumps(raw)
    except (TypeError, ValueError) as error:  # bytes or a date in a parquet file
        raise row.fault(f"a column cannot be kept as JSON ({error})") from error
    item = {"id": f"{row.name}/{key}", "benchmark": row.name, "group_id": f"{row.name}/{key}",
            "category": category or option_text(row.cells.get("category")),
            "question": question or row.text("question"),
            "options": options or [], "answer": {"type": ANSWER_TYPES[metric], "value": answer},
            "images": row.pictures() if images is None else images, "metric": metric,
            "source": row.where, "raw": raw}
    return item | ({"hint": hint} if (hint := option_text(row.cells.get("hint"))) else {})


# ---- multiple choice
def choices(row: Row) -> dict:
    """VLMEvalKit's multiple choice (V*, BLINK, MMVP, MMStar), and a file of one's own: index or id, question,
    A, B, ..., answer, image or image_path, optionally category and hint."""
    return make_item(row, row.key("index", "id"), "mcq", row.letter("answer"), options=row.options())


def vstar_original(row: Row) -> dict:
    """V* as its authors publish it, for its regions, which enclose all boxes [left, top, width, height]
    (penghao-wu/vstar, visual_search.py); not scored, as its right option is always the first."""
    cells = row.cells
    check_fields(row.where, cells, {"question": str, "options": list, "image_file": str, "test_type": str})
    item = make_item(row, cells["image_file"].rsplit(".", 1)[0], "unscored", cells["options"][:1],
                     category=cells["test_type"], images=[cells["image_file"]], question=cells["question"])
    boxes = cells.get("bbox") or []
    if not all(isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) for n in box)
               for box in boxes):
        raise row.fault(f"bbox {str(boxes)[:60]}, expected a list of [left, top, width, height]")
    if boxes:
        left, top, width, height = zip(*boxes)
        right, bottom = max(map(sum, zip(left, width))), max(map(sum, zip(top, height)))
        item["region"] = [int(min(left)), int(min(top)), math.ceil(right), math.ceil(bottom)]
    return item


def hrbench(row: Row) -> dict:
    """HR-Bench; cycle_category is the rotation. The options that some copies repeat in the question are taken
    off."""
    cycle = row.key("cycle_category")
    item = choices(replace(row, cells=row.cells | {"cycle_category": cycle}))
    item["id"] += f"/{cycle}"
    question = item["question"].rstrip()
    for mark in ("({}) {}", "{}. {}"):
        tail = "".join("\n" + mark.format(*option) for option in item["options"])
        if question.endswith(tail):
            return item | {"question": question.removesuffix(tail)}
    if re.search(r"\n[^\S\n]*(\(A\)|A[.)]) ", item["question"]):
        raise row.fault(f"the question {item['question'][-60:]!r} has other options than {item['options']}")
    return item


def mme_realworld(row: Row) -> dict:
    """MME-RealWorld-Lite for VLMEvalKit and lmms-eval; an option without its bracketed letter is an error
    (VLMEvalKit issue 491)."""
    return make_item(row, row.key("index"), "mcq", row.letter("answer"),
                     options=bracketed(row, "multi-choice options"))


def mme_realworld_official(row: Row) -> dict:
    """MME-RealWorld-Lite's own JSON (yfzhang114/MME-RealWorld, evaluation/output_test_template.json, commit
    1cd8d116). Copies differ in which field is called Task, Subtask or Category."""
    fields = [row.text(column) for column in ("Task", "Subtask", "Category")]
    kinds = [field for field in fields if field in REALWORLD_KINDS]
    domains = [field for field in fields if field in REALWORLD_DOMAINS]
    if len(kinds) != 1 or len(domains) != 1:
        raise row.fault(f"Task, Subtask, Category {fields}, expected one of {REALWORLD_KINDS} and one of "
                        f"{REALWORLD_DOMAINS}")
    return make_item(row, row.key("Question_id"), "mcq", row.letter("Ground truth"),
                     question=row.text("Text"), options=bracketed(row, "Answer choices"),
                     category=f"{kinds[0]}/{domains[0]}", images=row.pictures("Image"), pictures=("Image",))


def bracketed(row: Row, column: str) -> list[list[str]]:
    """Return [[letter, text]] of MME-RealWorld's five options, "(A) ..." to "(E) ..."."""
    texts = row.as_list(column, row.cells.get(column))
    matches = [re.fullmatch(rf"\({letter}\) ?(.*)", str(text), re.DOTALL)
               for letter, text in zip("ABCDE", texts)]
    if len(texts) != 5 or not all(matches):
        raise row.fault(f"options {texts}, expected five, '(A) ...' to '(E) ...'")
    return [[letter, match[1]] for letter, match in zip("ABCDE", matches)]


def blink_hub(row: Row) -> dict:
    """BLINK; image_1 to image_4 are null beyond the last."""
    columns = sorted(column for column in row.cells if re.fullmatch(r"image_\d", column))
    filled = [column for column in columns if not is_missing(row.cells[column])]
    if filled != columns[:len(filled)]:
        raise row.fault(f"pictures in {', '.join(filled)}, expected them from image_1 on without a gap")
    return make_item(row, row.key("idx"), "mcq", row.letter("answer"), category=row.text("sub_task"),
                     options=row.choices(), pictures=tuple(columns),
                     images=[picture for column in filled for picture in row.pictures(column)])


def cv_bench(row: Row) -> dict:
    """CV-Bench: its card's parquet, JSONL with `filename`, or VLMEvalKit's TSV (vlmeval/dataset/image_mcq.py,
    CVBench). The category is source/task, as the score is of sources."""
    parts = filter(None, (row.text("source"), option_text(row.cells.get("task", row.cells.get("category")))))
    return make_item(row, row.key("idx", "index"), "mcq", row.letter("answer"), category="/".join(parts),
                     options=row.choices() if "choices" in row.cells else row.options(),
                     images=row.pictures(*PICTURES, "filename"))


def mmvp(row: Row) -> dict:
    """MMVP as published (Questions.csv, in some copies with "lndex", and "MMVP Images" next to it; after
    tsb0601/MMVP, evaluate_mllm) and on the hub (lmms-lab-eval/MMVP, with `image`)."""
    key = row.key("Index", "lndex")
    texts = re.split(r"\s*\([a-z]\)\s*", row.text("Options").strip())
    if texts[0] or len(texts) < 3:
        raise row.fault(f"options {row.cells['Options']!r}, expected '(a) ... (b) ...'")
    return make_item(row, key, "mcq", row.letter("Correct Answer"), question=row.text("Question"),
                     images=None if "image" in row.cells else [f"MMVP Images/{key}.jpg"],
                     options=row.lettered("'Options'", texts[1:]))


def mmstar(row: Row) -> dict:
    """MMStar: Lin-Chen/MMStar, whose questions end in "Options: A: ..., B: ..." or "Choices: (A) ... (B)
    ...", or VLMEvalKit's TSV. A right option that is "nan" (MMStar issue 12) keeps that text: without it the
    question would have no answer."""
    gold, question = row.letter("answer"), row.text("question")
    if "A" in row.cells:
        published, options = {letter for letter in row.cells if len(letter) == 1}, row.options()
    else:
        match = next(filter(None, (form.fullmatch(question.strip()) for form in MMSTAR_FORMS)), None)
        if match is None:
            raise row.fault(f"the question {question[-80:]!r} ends in no options; expected 'Options: A: ..., "
                            "B: ...' or 'Choices: (A) ... (B) ...'")
        question, *texts = match.groups()
        published = "ABCD"[:4 - texts.count(None)]
        options = row.lettered("'question'", texts)
    if gold in published and gold not in dict(options):
        options = sorted([*options, [gold, "nan"]])
    return make_item(row, row.key("index"), "mcq", gold, question=question, options=options)


# ---- the others
def tablevqa(row: Row) -> dict:
    """TableVQABench with qa_id and gt; or VLMEvalKit's TSV with index, answer and split. Golds are values
    joined with bars, escaped as in WikiTableQuestions."""
    split, gold = row.name.rpartition("/")[2], row.text("gt", "answer")
    if split == "vtabfact":
        if gold.strip() not in ("0", "1"):
            raise row.fault(f"gold {gold!r}, expected the text '1' or '0'")
        metric, value = "tabfact", gold.strip() == "1"
    else:
        metric, value = "wtq", [unescape(text) for text in gold.split("|")]
    return make_item(row, row.key("qa_id", "index"), metric, value, category=split)


def mme(row: Row) -> dict:
    """MME, where question_id names the picture; or VLMEvalKit's TSV with index."""
    answer = row.text("answer").strip()
    if answer not in YES_NO:
        raise row.fault(f"answer {answer!r}, expected {' or '.join(YES_NO)}")
    by_picture = "question_id" in row.cells
    key = f"{row.cells['question_id']}/{YES_NO[answer]}" if by_picture else row.key("index")
    return make_item(row, key, "yesno_pair", YES_NO[answer])


def ocrbench_v2(row: Row) -> dict:
    """OCRBench-v2 (hub or TSV), for its latents alone: not scored."""
    golds = row.cells.get("answers", row.cells.get("answer"))
    values = list(map(str, golds)) if isinstance(golds, list) else [row.text("answers", "answer")]
    return make_item(row, row.key("id", "index"), "unscored", values, category=row.text("type"))


def vsp(row: Row) -> dict:
    """VSP spatial planning as Mirage evaluates it; the gold is the map."""
    cells = row.cells
    check_fields(row.where, cells, {"text_input": str, "image_input": str, "map_id": str, "map_desc": list})
    level = f"level_{len(cells['map_desc'])}"
    return make_item(row, f"{level}/{cells['map_id']}", "vsp_path", cells["map_desc"],
                     question=cells["text_input"], category=level, images=[cells["image_input"]])


# ---- clusters
def by_question(item: dict, place: int) -> str:
    key = call_key(images=[image["sha256"] for image in item["images"]], question=item["question"].strip(),
                   gold=dict(item["options"]).get(item["answer"]["value"]),
                   texts=sorted(text for _, text in item["options"]))
    return f"{item['benchmark']}/{key[:16]}"


def by_image(item: dict, place: int) -> str:
    return f"{item['benchmark']}/{item['category']}/{item['images'][0]['sha256'][:16]}"


def by_two(item: dict, place: int) -> str:
    """MMVP: rows 1 and 2 are a pair, 3 and 4 (tsb0601/MMVP, gpt_grader)."""
    return f"{item['benchmark']}/{place // 2}"


def by_group(items: list[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for item in items:
        groups[item["group_id"]].append(item)
    return groups


def rotations_fault(items: list[dict]) -> str | None:
    cycles = {group[0]["id"]: sorted(str(item["raw"]["cycle_category"]) for item in group)
              for group in by_group(items).values()}
    wrong = [first for first, cycle in cycles.items() if cycle != ["0", "1", "2", "3"]]
    return (f"{len(wrong)} of {len(cycles)} questions do not occur in four rotations, first {wrong[0]} with "
            f"{cycles[wrong[0]]}; expected 0, 1, 2, 3 of one picture, text and options") if wrong else None


def halves_fault(items: list[dict]) -> str | None:
    for first, second in zip(items[::2], items[1::2]):
        if first["question"].strip().lower() != second["question"].strip().lower():
            return f"{first['id']} and {second['id']} are no pair; expected one question about two pictures"
    return None


def pairs_fault(items: list[dict]) -> str | None:
    golds = {name: [item["answer"]["value"] for item in group] for name, group in by_group(items).items()}
    wrong = [name for name, answers in golds.items() if answers.count("yes") != answers.count("no")]
    return (f"{len(wrong)} of {len(golds)} pictures have no pair, first {wrong[0]} with {golds[wrong[0]]}; "
            "expected as many golds 'yes' as 'no'") if wrong else None
