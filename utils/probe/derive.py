"""Candidates for probe questions, and the rules that need no model to see one wrong. No torch here.

Questions about what a benchmark item looks at, for probing: written by a model, held to rules, answered from
the image.

    python probe.py derive --items vstar.items.jsonl --image_root . --backend openai --base_url \
      http://127.0.0.1:8000/v1 \
        --model Qwen/Qwen3-VL-4B-Instruct --output vstar_probe.jsonl

Reads   --items: items as evaluate.py --prepare writes them, of any metric; "region" [left, top, right,
        bottom] in pixels of the
        first image, if there: it is shown enlarged beside the whole
Writes  --output: {"id", "source", "attribute", "question", "options" [[letter, text]], "answer": {"type":
        "letter", "value"}},
        as probe.py --probe_items reads them; right options are dealt evenly over the letters
        <output>.run/: meta.json, calls-*.jsonl, images-*.jsonl, regions/ (what was shown enlarged),
        verdicts.jsonl: every candidate's {"id", "source", "attribute", "question", "gold", "wrong", "keep",
        "stage": rule | image | blind | error | null, "reason", "detail", "image_answer", "blind_answer"}
        <output>.meta.json, <output>.metrics.json
Prints  progress and reasons on stderr; on stdout one JSON object: sources, asked, kept, rejected, errors,
reasons, speed

One call a source writes --questions candidates; one call a candidate that passes the rules answers it from
the image (by the same model or --answer_model), in an order of options of its own; with --drop_blind one more
answers it from the words alone. kept + rejected + errors = asked = sources x questions: what a model failed
on is an error, no rejection, and the exit code is 3. Killed, the same command goes on. Exit codes as of
stages 1 and 2.
"""
import argparse
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.answers import LETTER, answers_match, normalize, strip_label
from utils.backends import object_schema
from utils.call_flags import Stage, add_call_flags, load_prompts, open_backend, run_stage, show_calls
from utils.cli import Help, log
from utils.images import IMAGE_REASONS, ImageError, Picture, open_image, open_picture
from utils.items import ANSWER_TYPES, gold_words, read_items, region_in
from utils.journal import read_settings
from utils.jsonl import DataError, call_key, check_output, replace_file, write_rows
from utils.model_calls import ERROR_REASONS, Call, Caller, ask, fill
from utils.row_rules import check_rows, find_markup

N_WRONG = 3
RULES = ("not_written", "empty", "markup", "options", "catch_all", "letter", "gold_in_stem",
         "source_question",
         "source_answer", "repeated")
REASONS = (*RULES, *IMAGE_REASONS, "duplicate", "region",  # these hold for a whole source
           "image_none", "image_wrong", "blind_right", *ERROR_REASONS)
CATCH_ALL = re.compile(
    r"\b(?:all|none|both|neither|any|either) of\b|\b(?:cannot|can't|can not|could not|not) (?:be )?"
                       r"(?:tell|told|determined?|seen?|say|said|clear|visible|shown|sure)\b|\bunknown\b"
                       r"|^(?:none|all|both|neither)$", re.IGNORECASE)
# share of the words of two questions that makes them one; "material of" for "colour of" leaves 0.67
SAME_WORDS = 0.8
PLAIN_GOLDS = ("yes", "no", "true", "false")  # words of other questions too


@dataclass
class Candidate:
    """A question that was asked for: kept if `stage` is None, else the stage that took it out and its closed
    reason."""

    id: str
    source: dict
    attribute: str | None = None
    question: str = ""
    gold: str = ""
    wrong: tuple[str, ...] = ()
    stage: str | None = None
    reason: str | None = None
    detail: str = ""
    image_answer: str | None = None
    blind_answer: str | None = None

    def out(self, stage: str, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        self.stage, self.reason, self.detail = stage, reason, detail

    def options(self, seed: int, letter: str | None = None) -> dict[str, str]:
        """Return {letter: text} in an order of the candidate's own, the right option at `letter` if one is
        given."""
        rng, texts = random.Random(f"{seed}/{self.id}/{letter}"), list(self.wrong)
        rng.shuffle(texts)
        texts.insert(rng.randrange(4) if letter is None else "ABCD".index(letter), self.gold)
        return dict(zip("ABCD", texts))


def plain(text: str) -> str:
    """Return a text in one spelling, without the marks between words."""
    return normalize(re.sub(r"[?!,;:\"()]|[.](?!\d)", " ", text))


def says(text: str, value: str) -> bool:
    """Return whether a text has a value in it, word for word."""
    return bool(plain(value)) and f" {plain(value)} " in f" {plain(text)} "


def same_question(one: str, other: str) -> bool:
    one, other = (set(plain(text).split()) for text in (one, other))
    return len(one & other) >= SAME_WORDS * len(one | other)


def fault_of(one: Candidate) -> tuple[str, str] | None:
    """Return the first of RULES that a candidate breaks by itself, and a detail, or None."""
    texts = (one.gold, *one.wrong)
    source_gold = gold_words(one.source)
    doubled = [f"{a!r} and {b!r}" for n, a in enumerate(texts) for b in texts[:n] if answers_match(a, b)]
    holds = {
        "empty": not all(text.strip() for text in (one.question, *texts))
        and "a question or an option is empty",
        "markup": next(iter(find_markup("\n".join((one.question, *texts)))), None),
        "options": f"{len(texts)} options" if len(texts) != 1 + N_WRONG else doubled and doubled[0],
        "catch_all": next((text for text in texts if CATCH_ALL.search(text.strip())), None),
        "letter": next((text for text in (one.question, *texts) if LETTER.search(text)
                        or strip_label(text) != text), None),
        "gold_in_stem": says(one.question, one.gold) and not all(says(one.question, text)
                                                                 for text in one.wrong) and one.gold,
        "source_question": same_question(one.question, one.source["question"]) and one.source["question"],
        "source_answer": source_gold and normalize(source_gold) not in PLAIN_GOLDS and source_gold
        and (says(one.question, source_gold) or answers_match(one.gold, source_gold)) and source_gold}
    return next(((reason, str(detail)[:160]) for reason, detail in holds.items() if detail), None)


def apply_rules(candidates: list[Candidate], pictures: dict[str, str]) -> None:
    """Take out what breaks a rule; `pictures`: source id -> hash, as a question may stand once a picture."""
    seen: dict[tuple[str, str], str] = {}
    for one in candidates:
        if one.stage is None and (fault := fault_of(one)):
            one.out("rule", *fault)
        if one.stage is None:
            key = pictures[one.source["id"]], plain(one.question)
            if key in seen:
                one.out("rule", "repeated", seen[key])
            seen.setdefault(key, one.id)


# ------------------------------------------------------------ derive


ATTRIBUTES = ("colour", "material", "shape", "size", "count", "text", "position", "pattern", "part", "state",
              "other")
PROMPTS_VERSION = 1  # raised with every change of a prompt below; the paper's own are not public
PROMPTS = {
    "SYSTEM": "You write and answer questions about pictures and reply with one JSON object and nothing else.",
    "WRITE": """{shown}

Someone was asked this about it:
{question}
The answer is: {answer}

Write {n} other multiple-choice questions about {subject}, each about another of these: {attributes}.
- Each has one right answer, which the picture shows plainly, and three wrong ones that are as likely to someone who has not \
seen the picture: of the same kind and length, and none of them "all of these" or "cannot be told".
- Each names the thing that it is about, can be understood by itself, and does not give its own answer away.
- None asks the question above in other words or names its answer, and no option carries a letter.
Reply with JSON: {"questions": [{"attribute": "colour", "question": "...", "answer": "...", "wrong": ["...", "...", \
"..."]}]}""",
    "ANSWER": """Look at the picture and answer this question about it:
{question}
{options}
Reply with the letter of the option that the picture shows to be right, or "none" if it shows none or more than one to be so.
Reply with JSON: {"letter": "A"}""",
    "BLIND": """This is a question about a picture that you cannot see:
{question}
{options}
Reply with the letter of the option that is the likeliest from these words alone.
Reply with JSON: {"letter": "A"}""",
    "RETRY": "Your last reply could not be used: {fault}. Reply again, with the JSON object only.",
}
WHOLE = "Look at the picture above.", "what that question looks at"
ZOOMED = ("The last picture above is a region cut out of the first one and enlarged.",
          "what the enlarged region shows")
TEXT = {"type": "string", "maxLength": 400}
WRITE_SCHEMA = object_schema(questions={"type": "array", "maxItems": 64, "items": object_schema(
    attribute={"type": "string", "enum": list(ATTRIBUTES)}, question=TEXT, answer=TEXT,
    wrong={"type": "array", "maxItems": N_WRONG, "items": TEXT})})
SCHEMAS = {"write": WRITE_SCHEMA,
           "answer": object_schema(letter={"type": "string", "enum": [*"ABCD", "none"]}),
           "blind": object_schema(letter={"type": "string", "enum": [*"ABCD"]})}
LEAST_SHOWN = 224 * 224  # pixels, of an enlarged region
MARGIN = 0.25  # of the region's sides, shown around it


# ------------------------------------------------------------------------------------ calls
class View(NamedTuple):
    """What an item's calls show: paths of its images and, enlarged, of its region; and what they stand for in
    keys."""

    paths: tuple[str, ...]
    hashes: tuple[str, ...]


NOTHING = View((), ())


class Fault(NamedTuple):
    """Why an item cannot be shown: a closed reason, and what it is in words."""

    reason: str
    detail: str


def view_of(item: dict, hashes: list[str], args: argparse.Namespace) -> View | Fault:
    """Return what an item's calls show; its region, if it lies in the image, is written into the run's folder
    once."""
    paths = [os.path.join(args.image_root, image["path"]) for image in item["images"]]
    if not item.get("region"):
        return View(tuple(paths), tuple(hashes))
    name = call_key(image=hashes[0], region=item["region"])
    path = Path(f"{args.output}.run", "regions", f"{name[:24]}.png")
    if not path.is_file() and not args.dry_run:
        size = open_image(paths[0]).size
        try:
            region = region_in(item, size)
        except DataError as error:
            return Fault("region", str(error))
        picture = open_picture(Picture(paths[0], with_margin(region, size), min_pixels=LEAST_SHOWN))
        replace_file(path, partial(picture.save, format="PNG"), "wb")
    return View((*paths, str(path)), (*hashes, name))


def with_margin(region: list[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a region with MARGIN around it, as far as the image of this (width, height) goes."""
    left, top, right, bottom = region
    x, y = (round(MARGIN * side) for side in (right - left, bottom - top))
    return max(left - x, 0), max(top - y, 0), min(right + x, size[0]), min(bottom + y, size[1])


def look(items: list[dict], caller: Caller | None, args: argparse.Namespace) -> list[View | Fault]:
    """Return what is shown of every item, or why it cannot be."""
    rows = [{"id": item["id"], "question": item["question"], "answer": str(item["answer"]["value"]),
             "steps": [],
             "images": [image["path"] for image in item["images"]]} for item in items]
    found: list[View | Fault] = []
    for item, (reason, detail, hashes) in zip(items, check_rows(rows, args.image_root, lambda row: None,
                                                                caller and caller.images)):
        try:
            found.append(Fault(reason, detail) if reason else view_of(item, hashes, args))
        except ImageError as error:
            found.append(Fault(error.reason, str(error)))
    return found


def write_call(item: dict, view: View, args: argparse.Namespace, prompts: dict[str, str]) -> Call:
    """Return the call that writes the candidates of a source."""
    words, subject = ZOOMED if item.get("region") else WHOLE
    text = fill(prompts["WRITE"], shown=words, subject=subject, n=str(args.questions),
                attributes=", ".join(ATTRIBUTES),
                question=item["question"].replace("<image>", "").strip(), answer=gold_words(item)
                or "not told")
    return Call(item["id"], "write", -1, text, *view, SCHEMAS["write"])


def answer_call(one: Candidate, kind: str, view: View, args: argparse.Namespace,
                prompts: dict[str, str]) -> Call:
    """Return the call that answers a candidate, "answer" from the image and "blind" without."""
    options = "\n".join(f"{letter}. {text}" for letter, text in one.options(args.seed).items())
    text = fill(prompts[kind.upper()], question=one.question.strip(), options=options)
    return Call(one.id, kind, -1, text, *view, SCHEMAS[kind])


def derive(items: list[dict], caller: Caller, answerer: Caller, args,
           prompts: dict[str, str]) -> list[Candidate]:
    """Return --questions candidates a source: a pure function of the items and of the replies in the journal.
    """
    views: dict[str, View] = {}
    by_source = {item["id"]: [Candidate(f"{item['id']}/probe/{n}", item) for n in range(args.questions)]
                 for item in items}
    for item, found in zip(items, look(items, caller, args)):
        if isinstance(found, View):
            views[item["id"]] = found
        else:
            for one in by_source[item["id"]]:
                one.out("rule", *found)
    sound = [item for item in items if item["id"] in views]
    calls = [write_call(item, views[item["id"]], args, prompts) for item in sound]
    for item, outcome in zip(sound, ask(caller, calls, lambda call, value: None, "write")):
        take(by_source[item["id"]], outcome)
    candidates = [one for mine in by_source.values() for one in mine]
    apply_rules(candidates, {name: view.hashes[0] for name, view in views.items()})
    for kind in ("answer", "blind") if args.drop_blind else ("answer",):
        alive = [one for one in candidates if one.stage is None]
        calls = [answer_call(one, kind, views[one.source["id"]] if kind == "answer" else NOTHING, args,
                             prompts)
                 for one in alive]
        for one, outcome in zip(alive, ask(answerer, calls, lambda call, value: None, kind)):
            judge(one, kind, outcome, args.seed)
    return candidates


def take(mine: list[Candidate], outcome) -> None:
    """Fill in the candidates of a source from what was written for it."""
    if outcome.value is None:
        for one in mine:
            one.out("error", outcome.reason, outcome.detail)
        return
    for one, row in zip(mine, outcome.value["questions"]):
        one.attribute, one.question, one.gold, one.wrong = (row["attribute"], row["question"], row["answer"],
                                                            tuple(row["wrong"]))
    for one in mine[len(outcome.value["questions"]):]:
        one.out("rule", "not_written",
                f"{len(outcome.value['questions'])} questions came, {len(mine)} were asked for")


def judge(one: Candidate, kind: str, outcome, seed: int) -> None:
    """Decide on a candidate from the answer to it."""
    if outcome.value is None:
        one.out("error", outcome.reason, outcome.detail)
        return
    said = one.options(seed).get(outcome.value["letter"])
    if kind == "blind":
        one.blind_answer = said
        if said == one.gold:
            one.out("blind", "blind_right", "answered right from its words alone")
        return
    one.image_answer = said
    if said is None:
        one.out("image", "image_none", "no option, or more than one, was found right")
    elif said != one.gold:
        one.out("image", "image_wrong", f"answered {said[:80]!r} from the image")


# ------------------------------------------------------------------------------------ the run
def find_answerer(args: argparse.Namespace) -> tuple[object, dict | None]:
    """Return the backend and the identity of --answer_model, without one (None, None): --model answers."""
    if not args.answer_model:
        return None, None
    if args.export_only:
        return None, (read_settings(f"{args.output}.run") or {}).get("answerer")
    flags = vars(args) | {"model": args.answer_model, "base_url": args.answer_base_url or args.base_url,
                          "backend": args.answer_backend or args.backend}
    backend = open_backend(argparse.Namespace(**flags))
    return backend, {"backend": flags["backend"], "max_pixels": args.max_pixels, **backend.identity}


def export(candidates: list[Candidate], args: argparse.Namespace) -> dict:
    """Write the kept questions, right options dealt evenly over the letters, and every verdict; return the
    counts."""
    kept = [one for one in candidates if one.stage is None]
    letters = list("ABCD" * (len(kept) // 4 + 1))[:len(kept)]
    random.Random(args.seed).shuffle(letters)
    write_rows(args.output, (
        {"id": one.id, "source": one.source["id"], "attribute": one.attribute,
         "question": one.question.strip(),
         "options": [list(pair) for pair in one.options(args.seed, letter).items()],
         "answer": {"type": "letter", "value": letter}} for one, letter in zip(kept, letters)))
    write_rows(f"{args.output}.run/verdicts.jsonl", (
        {"id": one.id, "source": one.source["id"], "attribute": one.attribute, "question": one.question,
         "gold": one.gold,
         "wrong": list(one.wrong), "keep": one.stage is None, "stage": one.stage, "reason": one.reason,
         "detail": one.detail,
         "image_answer": one.image_answer, "blind_answer": one.blind_answer} for one in candidates))
    stages = Counter(one.stage for one in candidates)
    return {"sources": len({one.source["id"] for one in candidates}), "asked": len(candidates),
            "kept": len(kept),
            "rejected": stages["rule"] + stages["image"] + stages["blind"], "errors": stages["error"],
            "reasons": dict(Counter(f"{one.stage}:{one.reason}" for one in candidates
                                    if one.stage).most_common()),
            "attributes": dict(Counter(one.attribute for one in kept).most_common()),
            "gold_letters": dict(sorted(Counter(letters).items()))}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="probe.py derive", description=__doc__,
                                     formatter_class=Help)
    parser.add_argument("--items", required=True, help="items JSONL, as evaluate.py --prepare writes it")
    add_call_flags(parser, max_new_tokens=1536)
    parser.add_argument("--questions", type=int, default=3, help="candidates asked for a source")
    parser.add_argument("--answer_model", default=None,
                        help="the model that answers the candidates (default: --model)")
    parser.add_argument("--answer_backend", choices=("local", "openai"), default=None,
                        help="its backend (default: --backend)")
    parser.add_argument("--answer_base_url", help="its server (default: --base_url)")
    parser.add_argument("--drop_blind", action="store_true",
                        help="drop what is answered right without the image; of four "
                        "options a guess does so once in four")
    parser.add_argument("--seed", type=int, default=0, help="of the orders of options")
    parser.set_defaults(task="derive")
    args = parser.parse_args(argv)
    if args.questions < 1:
        parser.error(f"--questions is {args.questions}, expected at least 1")
    if (args.answer_backend or args.answer_base_url) and not args.answer_model:
        parser.error("--answer_backend and --answer_base_url are of --answer_model; expected it")
    return args


def preview(items: list[dict], args: argparse.Namespace, prompts: dict[str, str]) -> dict:
    """Show a prompt; return the counts of calls (--dry_run)."""
    calls = [write_call(item, view, args, prompts) for item, view in zip(items, look(items, None, args))
             if isinstance(view, View)]
    return {"calls": show_calls(calls, args, prompts["SYSTEM"]), "sources": len(items), "sound": len(calls),
            "answers_at_most": len(calls) * args.questions * (1 + args.drop_blind)}


def show(metrics: dict) -> None:
    log(f"kept {metrics['kept']} of {metrics['asked']} questions about {metrics['sources']} sources")
    for reason, n in metrics["reasons"].items():
        log(f"    {reason:<40}{n:>6,}")


def run(args: argparse.Namespace) -> int:
    """Do what the flags of `parse_args` say; return the exit code."""
    prompts = load_prompts(args.prompts, PROMPTS)
    check_output(args.output, [args.items])
    backend, identity = (None, None) if args.dry_run else find_answerer(args)

    def work(items: list[dict], caller: Caller) -> list[Candidate]:
        answerer = caller if identity is None else replace(
            caller, backend=caller.backend and backend,
            identity=identity | {"schemas": caller.identity["schemas"]})
        return derive(items, caller, answerer, args, prompts)

    def export_all(items: list[dict], candidates: list[Candidate]) -> dict:
        counts = export(candidates, args)
        assert counts["kept"] + counts["rejected"] + counts["errors"] == counts["asked"] == len(
            items) * args.questions
        return counts

    return run_stage(args, Stage(
        [args.items], prompts, PROMPTS_VERSION, SCHEMAS,
        {"stage": "derive", "questions": args.questions, "seed": args.seed, "answerer": identity},
        read=lambda: read_items(args.items, args.limit, tuple(ANSWER_TYPES)),
        preview=lambda items: preview(items, args, prompts), work=work, export=export_all, show=show))
