"""Rows of our own form: the imaginations that a chain marks, and the rules for captions and rows.

    I look closer. <think_image>The hull shows a white 42.</think_image> The answer is \\boxed{42}.

Stages 1 and 2 apply the same rules; none needs a model. The first broken rule gives the closed reason.
"""
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.answers import answers_match
from utils.cli import log
from utils.images import IMAGE_REASONS, Inspection, check_images
from utils.journal import Journal
from utils.jsonl import DataError, call_key, check_fields
from utils.reply_text import BOX, CONTROL, last_boxed, texts_of

OPEN, CLOSE = "<think_image>", "</think_image>"
SPAN = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
SENTENCE_BREAK = re.compile(r"\.\s+|!\s+|\?\s+|؟\s+|\n\n*|[。！？।]\s*|</think>|</think_image>\s*")
OWN_FIELDS = {"id": str, "subset": str, "images": list, "question": str, "answer": str, "steps": list}
ROW_REASONS = ("structure", "control", "question", "answer")
CAPTION_REASONS = ("caption_empty", "caption_short", "caption_long", "caption_refusal", "caption_meta",
                   "caption_loop", "caption_markup", "caption_leak")
IMAGE_WINDOW = 4096  # rows whose images are checked in parallel
# scripts without spaces: about two characters make a word of Chinese or Japanese, four of the others
HAN_KANA = r"\u3005-\u3007\u3041-\u312f\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
THAI_KHMER = r"\u0e01-\u0fff\u1000-\u109f\u1780-\u17ff"
UNIT = re.compile(rf"[{HAN_KANA}{THAI_KHMER}]|[^\s、-〠！-／：-＠{HAN_KANA}{THAI_KHMER}]+")
MIN_UNITS, MAX_WORDS = 2, 120  # of a caption; the prompts ask for at most 80 words
MAX_REPEATED = 0.3  # share of runs of four words that occurred before in the same text
MARKUP = re.compile(
    r"<\|[^|<>]*\|>|</?(?:image|img|abs_vis_token|abs_vis_token_pad|observation|think|think_image"
    rf"|output_image|box|ref)\b[^<>]*>|\[(?:IMG|IMAGE|image)\b[^\]]{{0,200}}\]|\\boxed|```|{CONTROL.pattern}")
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:can't|cannot|can not) (?:see|view|help|assist|answer"
    r"|provide|describe|identify|determine)\b|\bas an AI\b|\blanguage model\b|\bI apologi[sz]e\b"
    r"|^\s*(?:很|非常)?(?:抱歉|对不起|對不起|不好意思|申し訳|すみません|ごめんなさい|恐れ入り|죄송|미안|ขออภัย|ขอโทษ)"
    r"|我(?:无法|無法|不能|没法|看不到)|(?:无法|無法|看不到)(?:查看|看到|识别|識別)?[这這该該]?[张張]?[图圖][片像]"
    r"|作为(?:一个|一名)?(?:AI|人工智能)|(?:语言|語言)模型|言語モデル|언어 모델|お(?:答え|応え|手伝い)でき(?:ません|ない)"
    r"|(?:画像|写真)を(?:見|確認|認識|表示|開|説明).{0,6}でき(?:ません|ない)|(?:ฉัน|ผม)ไม่สามารถ|도와 ?드릴 수 없"
    r"|(?:이미지|사진)[을를] (?:볼|열|확인할|인식할|설명할) 수 없", re.I | re.A)
META = re.compile(  # of the task, not of the scene
    r"\bhere(?:'s| is| are) (?:the|a|my)? ?(?:caption|description)\b|\b(?:caption|description):"
    r"|\b(?:the|this) (?:\w+ )?(?:image|picture|photo|region|crop) "
    r"(?:shows|depicts|displays|contains|features)\b"
    r"|\b(?:to answer|about|asked in) the question\b|\bthe question asks\b"
    r"|(?:图片?|圖片?|[图圖]像|照片)[中里裡]?(?:显示|顯示|展示|描绘|描繪)|この(?:画像|写真|図)|이 (?:이미지|사진|그림)[은는이]"
    r"|(?:描述|标题|標題|説明|キャプション|설명)[:：]|[为為]了?回答(?:问题|問題)|質問に答え|(?:ภาพ|รูป)นี้", re.I | re.A)
LEAK = re.compile(r"\b(?:final |correct |right )?answer (?:is|would be|must be)\b|\banswer:"
                  r"|\bcorrect (?:option|choice)\b|\boption \(?[A-H]\)? is (?:correct|right)\b"
                  r"|答案[是为為:：]|正确(?:答案|选项)|正確(?:答案|選項)|(?:答え|正解)[は:：]|정답[은는:：]|คำตอบ(?:คือ|:)", re.I | re.A)
# Every match of REFUSAL, META and LEAK holds one of these; looking for them first is ten times as fast.
SUSPECT = ("answer", "option", "choice", "sorry", "able", "can", "as an ai", "language model", "apolog",
           "caption", "description", "image", "picture", "photo", "region", "crop", "question",
           *"歉对對申죄我模モ모作图圖照画写図描标標説キ问問質答正恐応伝미",
           *"好意 すみ ごめ 이미지 사진 그림 설명 도와 정답 ขอ ไม่สามารถ นี้ คำตอบ".split())
OPTION = re.compile(r"^[^\S\n]*+(?:[-*]\s++)?[(（]?([A-Z])(?:[.):]\s++|[．、）：]\s*+)(\S.*)", re.MULTILINE)
NO_OPTIONS = re.compile(r"\boptions:\s*(?:please\b.*|answer\b.*)?$", re.I | re.DOTALL)


# ---- imaginations
def mark(text: str) -> str:
    return f"{OPEN}{text}{CLOSE}"


def find_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of every imagination before the first box, without the marks."""
    boxed = text.find("\\boxed")
    return [match.span(1) for match in SPAN.finditer(text, 0, len(text) if boxed < 0 else boxed)]


def conclusion(text: str) -> str:
    """Return the text after the last imagination, or all of it."""
    spans = find_spans(text)
    return text[spans[-1][1] + len(CLOSE):] if spans else text


def split_final(text: str) -> tuple[str, str]:
    """Split off the sentence with the last boxed answer and all text after it: (before, final)."""
    boxed = [match.start() for match in BOX.finditer(text)][-1]
    start = max((match.end() for match in SENTENCE_BREAK.finditer(text, 0, boxed)), default=0)
    return text[:start].strip(), text[start:].strip()


# ---- captions
def units_of(text: str) -> list[str]:
    """Return lower-case words; of a script without spaces, characters without punctuation."""
    return text.lower().split() if text.isascii() else UNIT.findall(text.lower())


def count_words(units: list[str]) -> float:
    """Return how many words `units_of` a text make up."""
    return sum(1 if len(unit) > 1 else 0.25 if "\u0e00" < unit < "\u1800" else
               0.5 if "\u3000" < unit < "\ua000" or unit > "\uf900" else 1 for unit in units)


def has_loop(text: str) -> bool:
    """Return whether over MAX_REPEATED of a text's runs of four words repeat, or a line occurs thrice."""
    units = units_of(text)
    n_words = count_words(units)
    size = round(4 * len(units) / n_words) if n_words >= 8 else len(units) + 1
    runs = list(zip(*(units[first:] for first in range(size))))
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return len(set(runs)) < (1 - MAX_REPEATED) * len(runs) or max(lines.values(), default=0) >= 3


def find_markup(text: str) -> set[str]:
    # most texts have none of these characters: 20 times as fast
    if "<" in text or "[" in text or "\\" in text or "`" in text or not text.isprintable():
        return {match[0] for match in MARKUP.finditer(text)}
    return set()


def caption_fault(text: str) -> str | None:
    """Return the first of CAPTION_REASONS that holds for a caption, or None."""
    lower = text.lower()
    units = units_of(text)
    suspect = any(word in lower for word in SUSPECT)
    holds = (not units, len(units) < MIN_UNITS, count_words(units) > MAX_WORDS,
             suspect and REFUSAL.search(text), suspect and META.search(text), has_loop(text),
             find_markup(text), suspect and LEAK.search(text))
    return next((reason for reason, hit in zip(CAPTION_REASONS, holds, strict=True) if hit), None)


# ---- rows
def parse_options(question: str) -> dict[str, str]:
    """Return {letter: text} of options, one per line ("A. a cat"); {} unless they are A, B and so on."""
    options = {letter: text.rstrip() for letter, text in OPTION.findall(question)}
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]
    return options if len(options) >= 2 and "".join(options) == letters else {}


def check_own(where: str, row: dict) -> None:
    if not all(isinstance(path, str) for path in row["images"]):
        raise DataError(f"{where}: field 'images' should be a list of paths, got {str(row['images'])[:60]!r}")
    for n, step in enumerate(row["steps"], 1):
        kinds = {name: type(part) for name, part in step.items()} if isinstance(step, dict) else {}
        is_text = kinds.get("text") is str and "image" not in kinds
        if not is_text and (kinds.get("image") is not str or step.get("operation") not in ("zoom", "draw")):
            raise DataError(f'{where}: step {n} should be {{"text"}} or {{"image", "operation": zoom or '
                            f'draw}}, got {str(step)[:60]!r}')


def row_fault(row: dict) -> str | None:
    """Return the first of ROW_REASONS that holds for a row of our form, or None. Rows need an image of the
    question and of a step, a text as last step, no control character, the options that the question
    announces, an <image> marker per image or none, and the answer in the last step's box."""
    steps, question, answer = row["steps"], row["question"], row["answer"]
    if not row["images"] or not any("image" in step for step in steps) or "image" in steps[-1]:
        return "structure"
    if CONTROL.search(texts_of([question, answer, steps, row.get("chain")])):
        return "control"
    n_markers = question.count("<image>")
    if not question.strip() or NO_OPTIONS.search(question) or n_markers not in (0, len(row["images"])):
        return "question"
    options = parse_options(question)
    boxed = last_boxed(steps[-1]["text"])
    if not answer.strip() or boxed is None or not answers_match(boxed, answer, options or None):
        return "answer"
    if options and not any(answers_match(answer, text, options) for text in options.values()):
        return "answer"
    return None


def check_rows(rows: list[dict], root: str | Path, fault_of: Callable[[dict], str | None] = row_fault,
               image_journal: Journal | None = None) -> list[Inspection]:
    """Return the inspection of every row: by `fault_of`, then its images, then "duplicate", of an accepted
    row's question, images and answer. Images whose paths, sizes and times are in `image_journal` are not
    opened."""
    if not Path(root).is_dir():
        raise DataError(f"--image_root {root}: no such folder")
    inspections, seen = [], {}
    for row, inspection in zip(rows, inspect_rows(rows, root, fault_of, image_journal), strict=True):
        if inspection.reason is None:
            content = row["question"], row["answer"], *inspection.hashes[:len(row["images"])]
            if (first := seen.setdefault(content, row["id"])) != row["id"]:
                inspection = inspection._replace(reason="duplicate",
                                                 detail=f"question, images and answer of {first}")
        inspections.append(inspection)
    if inspections and all(inspection.reason == "image_missing" for inspection in inspections):
        log(f"no row has its images under --image_root {root}; the first: {inspections[0].detail}")
    return inspections


def inspect_rows(rows: list[dict], root: str | Path, fault_of: Callable[[dict], str | None],
                 image_journal: Journal | None) -> Iterator[Inspection]:
    """Yield the inspection of each row by `fault_of` and its images; note new ones in the journal."""
    pool = ThreadPoolExecutor()  # Pillow decodes outside the interpreter's lock
    try:
        for first in range(0, len(rows), IMAGE_WINDOW):
            window = [(row, *recall(row, root, fault_of, image_journal))
                      for row in rows[first:first + IMAGE_WINDOW]]
            results = pool.map(lambda row: check_images(root, row["images"], helper_images(row)),
                               [row for row, _, inspection in window if inspection is None])
            for row, key, inspection in window:
                if inspection is None:
                    inspection = next(results)
                    if key and key not in image_journal:
                        image_journal.append({"key": key, "id": row["id"], **inspection._asdict()})
                yield inspection
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what is queued


def recall(row: dict, root: str | Path, fault_of: Callable[[dict], str | None],
           image_journal: Journal | None) -> tuple[str, Inspection | None]:
    """Return (key of the row's files, the inspection if no picture need be opened)."""
    if reason := fault_of(row):
        return "", Inspection(reason, "", [])
    key = files_key(root, row["images"], helper_images(row)) if image_journal is not None else ""
    record = image_journal.get(key) if key else None
    return key, record and Inspection(record["reason"], record.get("detail", ""), record["hashes"])


def helper_images(row: dict) -> list[str]:
    return [step["image"] for step in row["steps"] if "image" in step]


def files_key(root: str | Path, images: list[str], helpers: list[str]) -> str:
    """Return a key of files (paths, sizes, times of change), or "" if one is missing."""
    try:
        stats = [os.stat(os.path.join(root, name)) for name in (*images, *helpers)]
    except (OSError, ValueError):
        return ""
    return call_key(names=[images, helpers], files=[[stat.st_size, stat.st_mtime_ns] for stat in stats])


def is_inspection(record: dict) -> bool:
    """Return True for a journal record of an Inspection (`detail`: not in old journals), else raise."""
    check_fields("inspection", {"detail": "", **record}, {"detail": str, "hashes": list})
    if record["reason"] not in (None, *IMAGE_REASONS) or set(map(type, record["hashes"])) - {str}:
        raise ValueError(f"reason {record['reason']!r}, hashes {record['hashes']}")
    return True
