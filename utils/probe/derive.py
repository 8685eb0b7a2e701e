"""Probe questions written by a model: candidates are checked by rules, then answered from the image.

Reads   --items; a "region" of the first image is also shown enlarged
Writes  --output: {"id", "source", "attribute", "question", "options", "answer"}, for probe.py --probe_items;
        <output>.run/: the journals, regions/ (enlarged), verdicts.jsonl: every candidate's {"id", "source",
        "attribute", "question", "gold", "wrong", "keep", "stage": rule | image | blind | error | null,
        "reason", "detail", "image_answer", "blind_answer"}; <output>.meta.json, <output>.metrics.json
Prints  one JSON object: sources, asked, kept, rejected, errors, reasons, speed

A model's failure is an error, not a rejection: kept + rejected + errors = asked = sources x questions.
"""
import os
import random
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.call_flags import Stage, load_prompts, open_backend, run_stage, show_calls
from utils.cli import log
from utils.images import ImageError, Picture, open_image, open_picture
from utils.items import ANSWER_TYPES, gold_words, read_items, region_in
from utils.journal import read_settings
from utils.jsonl import DataError, call_key, check_output, object_schema, replace_file, write_rows
from utils.model_calls import RETRY, Call, Caller, ask, fill
from utils.probe.candidates import N_WRONG, Candidate, apply_rules, read_answer, read_questions
from utils.rows import check_rows

LEAST_SHOWN = 224 * 224  # pixels of an enlarged region
MARGIN = 0.25  # of the sides of a region, shown around it
ATTRIBUTES = ("colour", "material", "shape", "size", "count", "text", "position", "pattern", "part", "state",
              "other")
PROMPTS_VERSION = 1  # raised with every change of a prompt below; the paper's own are not public
PROMPTS = {
    "SYSTEM": "You write and answer questions about pictures and reply with one JSON object and nothing "
              "else.",
    "WRITE": """{shown}

Someone was asked this about it:
{question}
The answer is: {answer}

Write {n} other multiple-choice questions about {subject}, each about another of these: {attributes}.
- Each has one right answer, which the picture shows plainly, and three wrong ones that are as likely to \
someone who has not seen the picture: of the same kind and length, and none of them "all of these" or \
"cannot be told".
- Each names the thing that it is about, can be understood by itself, and does not give its own answer away.
- None asks the question above in other words or names its answer, and no option carries a letter.
Reply with JSON: {"questions": [{"attribute": "colour", "question": "...", "answer": "...", \
"wrong": ["...", "...", "..."]}]}""",
    "ANSWER": """Look at the picture and answer this question about it:
{question}
{options}
Reply with the letter of the option that the picture shows to be right, or "none" if it shows none or more \
than one to be so.
Reply with JSON: {"letter": "A"}""",
    "BLIND": """This is a question about a picture that you cannot see:
{question}
{options}
Reply with the letter of the option that is the likeliest from these words alone.
Reply with JSON: {"letter": "A"}""",
    "RETRY": RETRY,
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


# ---- calls
class View(NamedTuple):
    """The pictures that an item's calls show, and their hashes."""

    paths: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()


def view_of(item: dict, hashes: tuple[str, ...], args: Namespace) -> View | tuple[str, str]:
    """Return the view of an item, or (reason, detail) against it; its enlarged region is written once."""
    paths = [os.path.join(args.image_root, image["path"]) for image in item["images"]]
    if not item.get("region"):
        return View(tuple(paths), tuple(hashes))
    name = call_key(image=hashes[0], region=item["region"])
    path = Path(f"{args.output}.run", "regions", f"{name[:24]}.png")
    if not path.is_file() and not args.dry_run:
        width, height = open_image(paths[0]).size
        try:
            left, top, right, bottom = region_in(item, (width, height))
        except DataError as error:
            return "region", str(error)
        x, y = round(MARGIN * (right - left)), round(MARGIN * (bottom - top))
        box = max(left - x, 0), max(top - y, 0), min(right + x, width), min(bottom + y, height)
        picture = open_picture(Picture(paths[0], box, min_pixels=LEAST_SHOWN))
        replace_file(path, partial(picture.save, format="PNG"), "wb")
    return View((*paths, str(path)), (*hashes, name))


def view_items(items: list[dict], caller: Caller | None, args: Namespace) -> list[View | tuple[str, str]]:
    rows = [{"id": item["id"], "question": item["question"], "answer": str(item["answer"]["value"]),
             "steps": [], "images": [image["path"] for image in item["images"]]} for item in items]
    checked = check_rows(rows, args.image_root, lambda row: None, caller and caller.images)
    views = []
    for item, (reason, detail, hashes) in zip(items, checked):
        try:
            views.append((reason, detail) if reason else view_of(item, hashes, args))
        except ImageError as error:
            views.append((error.reason, str(error)))
    return views


def write_call(item: dict, view: View, args: Namespace, prompts: dict[str, str]) -> Call:
    shown, subject = ZOOMED if item.get("region") else WHOLE
    text = fill(prompts["WRITE"], shown=shown, subject=subject, n=str(args.questions),
                attributes=", ".join(ATTRIBUTES), answer=gold_words(item) or "not told",
                question=item["question"].replace("<image>", "").strip())
    return Call(item["id"], "write", -1, text, *view, SCHEMAS["write"])


def answer_call(candidate: Candidate, kind: str, view: View, args: Namespace,
                prompts: dict[str, str]) -> Call:
    options = "\n".join(f"{letter}. {text}" for letter, text in candidate.options(args.seed).items())
    text = fill(prompts[kind.upper()], question=candidate.question.strip(), options=options)
    return Call(candidate.id, kind, -1, text, *view, SCHEMAS[kind])


def derive(items: list[dict], caller: Caller, answerer: Caller, args: Namespace,
           prompts: dict[str, str]) -> list[Candidate]:
    """Return --questions candidates per source: a pure function of items and journals."""
    by_source = {item["id"]: [Candidate(f"{item['id']}/probe/{n}", item) for n in range(args.questions)]
                 for item in items}
    views = dict(zip(by_source, view_items(items, caller, args)))
    for name, view in views.items():
        for candidate in () if isinstance(view, View) else by_source[name]:
            candidate.reject("rule", *view)
    views = {name: view for name, view in views.items() if isinstance(view, View)}
    sources = [item for item in items if item["id"] in views]
    calls = [write_call(item, views[item["id"]], args, prompts) for item in sources]
    for item, outcome in zip(sources, ask(caller, calls, lambda call, value: None, "write")):
        read_questions(by_source[item["id"]], outcome)
    candidates = [candidate for group in by_source.values() for candidate in group]
    apply_rules(candidates, {name: view.hashes[0] for name, view in views.items()})
    for kind in ("answer", "blind") if args.drop_blind else ("answer",):
        kept = [candidate for candidate in candidates if candidate.stage is None]
        calls = [answer_call(candidate, kind, views[candidate.source["id"]] if kind == "answer" else View(),
                             args, prompts) for candidate in kept]
        for candidate, outcome in zip(kept, ask(answerer, calls, lambda call, value: None, kind)):
            read_answer(candidate, kind, outcome, args.seed)
    return candidates


# ---- the run
def find_answerer(args: Namespace) -> tuple[object, dict | None]:
    """Return the backend and the identity of --answer_model, if given."""
    if not args.answer_model:
        return None, None
    if args.export_only:
        return None, (read_settings(f"{args.output}.run") or {}).get("answerer")
    kind = args.answer_backend or args.backend
    backend = open_backend(args, kind, args.answer_model, args.answer_base_url or args.base_url,
                           args.max_pixels)
    return backend, {"backend": kind, "max_pixels": args.max_pixels, **backend.identity}


def preview(items: list[dict], args: Namespace, prompts: dict[str, str]) -> dict:
    """Show a prompt; return the counts of calls (--dry_run)."""
    calls = [write_call(item, view, args, prompts) for item, view in zip(items, view_items(items, None, args))
             if isinstance(view, View)]
    return {"calls": show_calls(calls, args, prompts["SYSTEM"]), "sources": len(items), "sound": len(calls),
            "answers_at_most": len(calls) * args.questions * (1 + args.drop_blind)}


def export_questions(candidates: list[Candidate], args: Namespace) -> dict:
    """Write the kept questions and every verdict; return the counts."""
    kept = [candidate for candidate in candidates if candidate.stage is None]
    letters = list("ABCD" * (len(kept) // 4 + 1))[:len(kept)]
    random.Random(args.seed).shuffle(letters)
    write_rows(args.output, (
        {"id": c.id, "source": c.source["id"], "attribute": c.attribute, "question": c.question.strip(),
         "options": [list(pair) for pair in c.options(args.seed, letter).items()],
         "answer": {"type": "letter", "value": letter}} for c, letter in zip(kept, letters)))
    write_rows(f"{args.output}.run/verdicts.jsonl", (
        {"id": c.id, "source": c.source["id"], "attribute": c.attribute, "question": c.question,
         "gold": c.gold, "wrong": list(c.wrong), "keep": c.stage is None, "stage": c.stage,
         "reason": c.reason, "detail": c.detail, "image_answer": c.image_answer,
         "blind_answer": c.blind_answer} for c in candidates))
    stages = Counter(c.stage for c in candidates)
    reasons = Counter(f"{c.stage}:{c.reason}" for c in candidates if c.stage)
    rejected = stages["rule"] + stages["image"] + stages["blind"]
    assert len(kept) + rejected + stages["error"] == len(candidates)
    return {"sources": len({c.source["id"] for c in candidates}), "asked": len(candidates), "kept": len(kept),
            "rejected": rejected, "errors": stages["error"], "reasons": dict(reasons.most_common()),
            "attributes": dict(Counter(c.attribute for c in kept).most_common()),
            "gold_letters": dict(sorted(Counter(letters).items()))}


def show(metrics: dict) -> None:
    log(f"kept {metrics['kept']} of {metrics['asked']} questions about {metrics['sources']} sources")
    for reason, n in metrics["reasons"].items():
        log(f"    {reason:<40}{n:>6,}")


def derive_questions(args: Namespace) -> int:
    """Run `probe.py derive`; return the exit code."""
    prompts = load_prompts(args.prompts, PROMPTS)
    check_output(args.output, [args.items])
    backend, identity = (None, None) if args.dry_run else find_answerer(args)

    def work(items: list[dict], caller: Caller) -> list[Candidate]:
        answerer = caller
        if identity is not None:
            answerer = replace(caller, backend=caller.backend and backend,
                               identity=identity | {"schemas": caller.identity["schemas"]})
        return derive(items, caller, answerer, args, prompts)

    return run_stage(args, Stage(
        inputs=[args.items], prompts=prompts, prompts_version=PROMPTS_VERSION, schemas=SCHEMAS,
        settings={"stage": "derive", "questions": args.questions, "seed": args.seed, "answerer": identity},
        read=lambda: read_items(args.items, args.limit, tuple(ANSWER_TYPES)),
        preview=lambda items: preview(items, args, prompts), work=work,
        export=lambda items, candidates: export_questions(candidates, args), show=show))
