"""Rules for rows and captions that stages 1 and 2 must apply alike: what needs no model to be seen wrong.

Every rule has a closed reason; the first that holds is the one that is given.
"""
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.answers import answers_match, last_boxed
from utils.cli import log
from utils.images import IMAGE_REASONS, ImageCheck, check_images
from utils.journal import Journal
from utils.jsonl import DataError, call_key

OWN_FIELDS = {"id": str, "subset": str, "images": list, "question": str, "answer": str, "steps": list}
ROW_REASONS = ("structure", "question", "answer")
CAPTION_REASONS = ("caption_empty", "caption_short", "caption_long", "caption_refusal", "caption_meta",
                   "caption_loop",
                   "caption_markup", "caption_leak")
IMAGE_WINDOW = 4096  # rows whose images are looked at together
MIN_WORDS, MAX_WORDS = 2, 120  # of a caption; the prompts ask for 80 at most
MAX_REPEATED = 0.3  # share of 4-grams that stood before in the same text
MARKUP = re.compile(
    r"<\|[^|<>]*\|>|</?(?:image|img|abs_vis_token|abs_vis_token_pad|observation|think|think_image"
                    r"|output_image|box|ref)\b[^<>]*>|\[(?:IMG|IMAGE|image)\b[^\]]{0,200}\]|\\boxed|```")
REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:can't|cannot|can not) (?:see|view|help|assist"
                     r"|answer|provide|describe|identify|determine)\b|\bas an AI\b|\blanguage model\b"
                     r"|\bI apologi[sz]e\b", re.I)
META = re.compile(r"\bhere(?:'s| is| are) (?:the|a|my)? ?(?:caption|description)\b|\b(?:caption|description):"
                  r"|\b(?:the|this) (?:\w+ )?(?:image|picture|photo|region|crop) (?:shows|depicts|displays|contains|features)\b"
                  # of the task, not the scene
                  r"|\b(?:to answer|about|asked in) the question\b|\bthe question asks\b", re.I)
LEAK = re.compile(r"\b(?:final |correct |right )?answer (?:is|would be|must be)\b|\banswer:"
                  r"|\bcorrect (?:option|choice)\b|\boption \(?[A-H]\)? is (?:correct|right)\b", re.I)
SUSPECT = ("answer", "option", "choice", "sorry", "able", "can", "as an ai", "language model", "apolog",
           "caption",
           "description", "image", "picture", "photo", "region", "crop", "question")
# each REFUSAL, META and LEAK has one of these, and to look for them is ten times as fast
OPTION = re.compile(r"^[^\S\n]*+(?:[-*]\s++)?\(?([A-Z])[.):]\s++(\S.*)", re.MULTILINE)
NO_OPTIONS = re.compile(r"\boptions:\s*(?:please\b.*|answer\b.*)?$", re.I | re.DOTALL)


def has_loop(text: str) -> bool:
    """Return whether over MAX_REPEATED of a text's 4-grams stood before in it, or one of its lines stands 3
    times."""
    return repeats(text, text.lower().split())


def repeats(text: str, words: list[str]) -> bool:
    """`has_loop` of a text whose words in lower case are known."""
    n_grams = len(words) - 3
    # that many different 4-grams at least
    if n_grams >= 5 and len(set(words)) - 3 < (1 - MAX_REPEATED) * n_grams:
        if 1 - len(set(zip(words, words[1:], words[2:], words[3:]))) / n_grams > MAX_REPEATED:
            return True
    if text.count("\n") < 2:
        return False
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return max(lines.values(), default=0) >= 3


def find_markup(text: str) -> set[str]:
    """Return the pieces of markup in a text."""
    # most texts have none, and this is 20 times as fast
    if "<" in text or "[" in text or "\\" in text or "`" in text:
        return {match[0] for match in MARKUP.finditer(text)}
    return set()


def caption_fault(text: str) -> str | None:
    """Return the first of CAPTION_REASONS that holds for a caption, or None."""
    lower = text.lower()
    words = lower.split()
    n_words = len(words)
    suspect = any(word in lower for word in SUSPECT)
    holds = (n_words == 0, n_words < MIN_WORDS, n_words > MAX_WORDS, suspect and REFUSAL.search(text),
             suspect and META.search(text), repeats(text, words), find_markup(text),
             suspect and LEAK.search(text))
    return next((reason for reason, hit in zip(CAPTION_REASONS, holds, strict=True) if hit), None)


def parse_options(question: str) -> dict[str, str]:
    """Return {letter: text} of the options written one a line ("A. a cat"), or {} if there are not two from A
    on."""
    options = {letter: text.rstrip() for letter, text in OPTION.findall(question)}
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]
    return options if len(options) >= 2 and "".join(options) == letters else {}


def check_own(where: str, row: dict) -> None:
    """Raise DataError unless the images and steps of a row with OWN_FIELDS are of our form (captions
    optional)."""
    if not all(isinstance(path, str) for path in row["images"]):
        raise DataError(f"{where}: field 'images' should be a list of paths, got {str(row['images'])[:60]!r}")
    for n, step in enumerate(row["steps"], 1):
        kinds = {name: type(part) for name, part in step.items()} if isinstance(step, dict) else {}
        is_text = kinds.get("text") is str and "image" not in kinds
        if not is_text and (kinds.get("image") is not str or step.get("operation") not in ("zoom", "draw")):
            raise DataError(
                f"{where}: step {n} should be {{\"text\"}} or {{\"image\", \"operation\": zoom or draw}}, "
                            f"got {str(step)[:60]!r}")


def row_fault(row: dict) -> str | None:
    """Return the first of ROW_REASONS that holds for a row in our form (chain or not), or None.

    structure: no question image, no helper image, or the last step is not a text. question: empty, options
    promised but not there, or another number of <image> markers than images. answer: none, not what the last
    step boxes, or none of the options.
    """
    steps, question, answer = row["steps"], row["question"], row["answer"]
    if not row["images"] or not any("image" in step for step in steps) or "image" in steps[-1]:
        return "structure"
    if not question.strip() or NO_OPTIONS.search(question) or question.count("<image>") not in (
        0, len(row["images"])):
        return "question"
    options = parse_options(question)
    boxed = last_boxed(steps[-1]["text"])
    if not answer.strip() or boxed is None or not answers_match(boxed, answer, options or None):
        return "answer"
    if options and not any(answers_match(answer, text, options) for text in options.values()):
        return "answer"
    return None


def check_rows(rows: list[dict], root: str | Path, fault_of: Callable[[dict], str | None] = row_fault,
               seen_images: Journal | None = None) -> list[ImageCheck]:
    """Return what is wrong with each row, by all that needs no model, and its images' hashes.

    `fault_of` first, then the images (utils.images.check_images), then "duplicate": a sound row before it has
    the same question, question images and answer. Images of which `seen_images` knows paths, sizes and times
    are not opened.
    """
    if not Path(root).is_dir():
        raise DataError(f"--image_root {root}: no such folder; image paths are relative to it")
    found, seen = [], {}
    looked = look_at_images(rows, root, fault_of, seen_images)
    for row, look in zip(rows, looked, strict=True):
        if look.reason is None:
            same = row["question"], row["answer"], *look.hashes[:len(row["images"])]
            if same in seen:
                look = look._replace(reason="duplicate",
                                     detail=f"question, images and answer of {seen[same]}")
            seen.setdefault(same, row["id"])
        found.append(look)
    if found and all(look.reason == "image_missing" for look in found):
        log(f"no row has its images under --image_root {root}; the first: {found[0].detail}")
    return found


def look_at_images(rows: list[dict], root: str | Path, fault_of: Callable[[dict], str | None],
                   seen_images: Journal | None) -> Iterator[ImageCheck]:
    """Yield what is found by `fault_of` or in its images, a row; what is new goes into `seen_images`."""
    pool = ThreadPoolExecutor()  # Pillow decodes outside the interpreter's lock
    try:
        for first in range(0, len(rows), IMAGE_WINDOW):
            found, new = {}, []
            window = rows[first:first + IMAGE_WINDOW]
            for n, row in enumerate(window):
                helpers = [step["image"] for step in row["steps"] if "image" in step]
                if reason := fault_of(row):
                    found[n] = ImageCheck(reason, "", [])
                    continue
                key = state_of(root, row["images"], helpers) if seen_images is not None else ""
                record = seen_images.get(key) if key else None
                if record and (record["reason"] or len(record["hashes"]) == len(row["images"])
                               + len(helpers)):
                    found[n] = ImageCheck(record["reason"], record.get("detail", ""), record["hashes"])
                else:
                    new.append((n, key, row["images"], helpers))
            results = pool.map(lambda work: check_images(root, work[2], work[3]), new)
            for (n, key, _, _), look in zip(new, results, strict=True):
                found[n] = look
                if key and key not in seen_images:
                    seen_images.append({"key": key, "id": window[n]["id"], **look._asdict()})
            yield from (found[n] for n in range(len(window)))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what is queued


def is_look(record: dict) -> bool:
    """Return whether a record of the images journal says what was found: a reason, or none and hashes."""
    hashes, reason = record["hashes"], record["reason"]
    return (type(hashes) is list and all(type(digest) is str for digest in hashes)
            and reason in (None, *IMAGE_REASONS)
            and type(record.get("detail", "")) is str)  # runs begun before there were details go on


def state_of(root: str | Path, images: list[str], helpers: list[str]) -> str:
    """Return a key of the files of a row (paths, sizes, times of change), or "" if one of them is not there.
    """
    try:
        stats = [os.stat(os.path.join(root, name)) for name in (*images, *helpers)]
    except (OSError, ValueError):
        return ""
    return call_key(names=[images, helpers], files=[[stat.st_size, stat.st_mtime_ns] for stat in stats])
