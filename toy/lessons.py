"""What the toy's base model is taught: to see, to find, to read, and to answer the calls of stages 1 and 2.

A lesson is a function of a `random.Random` that returns (pictures, user text, reply). The lessons replace the
pretraining that gives a real Qwen2.5-VL these skills. The benchmark's task, to answer a question from a
picture, is not among them: the base learns to read questions and to find shapes, but never to do both.
"""
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from filter_data import Verdict, judge_call
from rewrite_captions import Sample, join_chain, make_segments, refine_call
from toy.world import (COLORS, CORNERS, PLACES, Question, Thing, ask, ask_about, draw_scene, make_scene,
                       observation, opening, prompt_text, zoom_in)
from utils.model_calls import fill
from utils.rows import mark

Lesson = tuple[list[Image.Image], str, str]
PROMPTS = {name: json.loads(Path(__file__).with_name(f"prompts_{name}.json").read_text(encoding="utf-8"))
           for name in ("rewrite", "filter")}
KEYS = {"color": [("zoom", color) for color in COLORS], "place": [("draw", place) for place in PLACES]}


def describe_keys(scene: list[Thing], keys: list[tuple[str, str]]) -> str:
    """Return one line per (operation, colour or place): the thing's caption, or that it is missing."""
    things = {("zoom", thing.color): thing for thing in scene}
    things |= {("draw", thing.place): thing for thing in scene}
    return "\n".join(things[key].caption(key[0]) if key in things else f"{key[1]} missing" for key in keys)


def every_key(rng: random.Random, kind: str) -> Lesson:
    """All places or colours in one fixed order: dense supervision for a new vision tower."""
    scene = make_scene(rng)
    return [draw_scene(scene)], f"Describe every {kind}.", describe_keys(scene, KEYS[kind])


def some_keys(rng: random.Random, n_keys: int) -> Lesson:
    """Some colours and places in the order asked for, so that the model looks where the words point."""
    scene, keys = make_scene(rng), rng.sample(KEYS["color"] + KEYS["place"], n_keys)
    text = f"Describe the {', '.join(key for _, key in keys)} shape."
    return [draw_scene(scene)], text, describe_keys(scene, keys)


def ask_about_nothing(rng: random.Random, scene: list[Thing],
                      operation: str) -> tuple[Question, Thing | None]:
    """Return a question about a colour or corner that the scene lacks, and the thing its picture shows."""
    thing = rng.choice(scene)
    if operation == "zoom":  # the crop shows a thing of another colour
        absent = replace(thing, color=rng.choice(sorted(set(COLORS) - {t.color for t in scene})))
        return ask_about(rng, scene, absent, "zoom"), thing
    # the mark is on nothing
    row, column = rng.choice(sorted(set(CORNERS.values()) - {(t.row, t.column) for t in scene}))
    return ask_about(rng, scene, replace(thing, row=row, column=column), "draw"), None


def draw_case(rng: random.Random) -> tuple[list[Thing], Question, Thing | None]:
    """Return (scene, question, thing its picture shows); one question in six is about something absent."""
    scene = make_scene(rng)
    question = ask(rng, scene, rng.choice(("zoom", "draw")))
    if rng.random() < 1 / 6:
        return scene, *ask_about_nothing(rng, scene, question.operation)
    return scene, question, question.thing


def caption_of(question: Question, seen: Thing | None) -> str:
    return seen.caption(question.operation) if seen else f"{question.thing.place} missing"


def read(rng: random.Random) -> Lesson:
    """Answer from an imagination, without a picture."""
    scene = make_scene(rng)
    question = ask(rng, scene, rng.choice(("zoom", "draw")))
    seen = f"{opening(question)} {mark(question.thing.caption(question.operation))}"
    reply = f"{observation(question)} The answer is \\boxed{{{question.answer}}}."
    return [], f"{prompt_text(question)}{seen}", reply


def caption_call(rng: random.Random) -> Lesson:
    """The zoom and difference calls of rewrite_captions.py."""
    scene, question, seen = draw_case(rng)
    picture, caption = draw_scene(scene), caption_of(question, seen)
    text = fill(PROMPTS["rewrite"][question.operation.upper()], question=prompt_text(question).strip())
    if question.operation == "zoom":
        return [zoom_in(picture, question.thing)], text, json.dumps({"caption": caption, "legible": "yes"})
    marks = [f"{seen.color} {seen.shape}"] if seen else []
    return [picture, draw_scene(scene, question.thing)], text, json.dumps(
        {"marks": marks, "description": caption, "changed": True})


def chain_steps(question: Question, caption: str) -> list[dict]:
    """Return the steps of a captioned training row for a question."""
    return [{"text": opening(question)}, {"image": "", "operation": question.operation, "caption": caption},
            {"text": f"{observation(question)} The answer is \\boxed{{{question.answer}}}."}]


def link(question: Question, caption: str) -> list[str]:
    """Return a good refinement: the segments of a chain with the observation linked to the thoughts."""
    seen = observation(question)
    return [opening(question), f"I see {caption}.", f"So {seen[0].lower()}{seen[1:]}"]


def refinement_call(rng: random.Random) -> Lesson:
    """The refinement call of rewrite_captions.py."""
    _, question, seen = draw_case(rng)
    caption = caption_of(question, seen)
    call = refine_call(Sample({"id": ""}), make_segments(chain_steps(question, caption))[0],
                       PROMPTS["rewrite"])
    segments = [{"id": n, "text": text} for n, text in enumerate(link(question, caption), 1)]
    return [], call.text, json.dumps({"segments": segments})


def judgement_call(rng: random.Random) -> Lesson:
    """The judge's call of filter_data.py, whose values code compares."""
    scene, question, seen = draw_case(rng)
    if seen == question.thing and rng.random() < 0.3:
        question = replace(question, answer=rng.choice([v for v in question.options if v != question.answer]))
    caption = caption_of(question, seen)
    segments, final = make_segments(chain_steps(question, caption))
    if rng.random() < 0.8:
        segments = [(kind, text) for (kind, _), text in zip(segments, link(question, caption))]
    row = {"id": "", "images": [], "question": prompt_text(question), "answer": question.answer,
           "chain": join_chain(segments, final)}
    value = getattr(seen, question.attribute) if seen else "unclear"
    asked, shown = ((question.thing.color, seen.color) if question.operation == "zoom" else
                    (question.thing.place, question.thing.place if seen else "not shown"))
    reply = {"reason": "", "asked": asked, "found": shown, "seen": value, "stated": question.answer,
             "problems": []}
    return [draw_scene(scene)], judge_call(row, Verdict(), ".", PROMPTS["filter"]).text, json.dumps(reply)


six_keys, one_key = partial(some_keys, n_keys=6), partial(some_keys, n_keys=1)
# weight and lesson, by the name that a row has as its subset
SEE = {"every_place": (11, partial(every_key, kind="place")),
       "every_color": (9, partial(every_key, kind="color"))}
FIND = {"several": (8, six_keys), "one": (2, one_key)}
BASE = {"several": (10, six_keys), "one": (10, one_key), "read": (18, read),
        "caption_call": (18, caption_call),
        "refinement_call": (26, refinement_call), "judgement_call": (18, judgement_call)}
