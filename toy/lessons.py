"""What the toy's base model is taught: to see, to find, to read, and to answer the calls of stages 1 and 2.

A lesson is a function of a `random.Random` that returns (pictures, user text, reply). The lessons stand in
for the pretraining that gives a real Qwen2.5-VL these skills. The benchmark's own task, to answer a question
from a picture, is not among them: the base reads questions, and it finds shapes, but it is never taught to do
both.
"""
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from filter_data import Verdict, judge_call
from rewrite_captions import join_chain, make_segments, refine_call
from toy.world import (COLORS, CORNERS, PLACES, Question, Thing, ask, ask_about, draw_scene, make_scene,
                       observation, opening, prompt_text, zoom_in)
from utils.chain_formats import Sample
from utils.model_calls import fill

Lesson = tuple[list[Image.Image], str, str]
PROMPTS = {name: json.loads(Path(__file__).with_name(f"prompts_{name}.json").read_text(encoding="utf-8"))
           for name in ("rewrite", "filter")}


def describe_keys(scene: list[Thing], keys: list[tuple[str, str]]) -> str:
    """Return a line for each (operation, colour or place): the thing's caption, or that it is missing."""
    found = {("zoom", thing.color): thing for thing in scene} | {("draw", thing.place): thing
                                                                 for thing in scene}
    return "\n".join(found[key].caption(key[0]) if key in found else missing(key[1]) for key in keys)


def missing(key: str) -> str:
    return f"{key} missing"


def every_place(rng: random.Random) -> Lesson:
    """All cells in one fixed order: the dense supervision that gets a vision tower started from nothing."""
    scene = make_scene(rng)
    return [draw_scene(scene)], "Describe every place.", describe_keys(scene,
                                                                       [("draw", place) for place in PLACES])


def every_color(rng: random.Random) -> Lesson:
    scene = make_scene(rng)
    return [draw_scene(scene)], "Describe every color.", describe_keys(scene,
                                                                       [("zoom", color) for color in COLORS])


def some(rng: random.Random, n_keys: int) -> Lesson:
    """Some colours and places in the order asked for: to look where the words say, not where the last line
    did."""
    scene = make_scene(rng)
    keys = rng.sample([("zoom", color) for color in COLORS] + [("draw", place) for place in PLACES], n_keys)
    return [draw_scene(scene)], f"Describe the {', '.join(key for _, key in keys)} shape.", describe_keys(
        scene, keys)


def ask_about_nothing(rng: random.Random, scene: list[Thing], operation: str) -> tuple[Question,
                                                                                       Thing | None]:
    """Return a question about a colour or corner that is not in the scene, and the thing that its picture
    shows."""
    thing = rng.choice(scene)
    if operation == "zoom":  # the crop shows a thing of another colour
        absent = replace(thing, color=rng.choice(sorted(set(COLORS) - {t.color for t in scene})))
        return ask_about(rng, scene, absent, "zoom"), thing
    # the mark is on nothing
    row, column = rng.choice(sorted(set(CORNERS.values()) - {(t.row, t.column) for t in scene}))
    return ask_about(rng, scene, replace(thing, row=row, column=column), "draw"), None


def draw_case(rng: random.Random) -> tuple[list[Thing], Question, Thing | None]:
    """Return (scene, question, thing that its picture shows); one question in six is about nothing there."""
    scene = make_scene(rng)
    question = ask(rng, scene, rng.choice(("zoom", "draw")))
    if rng.random() < 1 / 6:
        return scene, *ask_about_nothing(rng, scene, question.operation)
    return scene, question, question.thing


def caption_of(question: Question, seen: Thing | None) -> str:
    return seen.caption(question.operation) if seen else missing(question.thing.place)


def read(rng: random.Random) -> Lesson:
    """Answer from words alone: the model must learn to read what an imagination says."""
    scene = make_scene(rng)
    question = ask(rng, scene, rng.choice(("zoom", "draw")))
    seen = f"{opening(question)} <think_image>{question.thing.caption(question.operation)}</think_image>"
    return [], f"{prompt_text(question)}{seen}", f"{observation(question)} The answer is \\boxed{{{question.answer}}}."


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
    """Return the segments of a chain with its observation linked to the thoughts around it: a good
    refinement."""
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
    """The judge's call of filter_data.py: on sound chains, on questions about nothing, on answers against
    what was seen.

    The reason compares each pair on the spot: a verdict three tokens behind its pair is copied, one further
    off guessed.
    """
    scene, question, seen = draw_case(rng)
    if seen == question.thing and rng.random() < 0.3:
        question = replace(question, answer=rng.choice([v for v in question.options if v != question.answer]))
    caption = caption_of(question, seen)
    segments, final = make_segments(chain_steps(question, caption))
    if rng.random() < 0.8:
        segments = [(kind, text) for (kind, _), text in zip(segments, link(question, caption))]
    row = {"id": "", "images": [], "question": prompt_text(question), "answer": question.answer,
           "chain": join_chain(segments, final)}
    value = getattr(seen, question.attribute) if seen else "nothing"
    asked, found = ((question.thing.color, seen.color) if question.operation == "zoom" else
                    (question.thing.place, question.thing.place if seen else "nothing"))
    answerable, supported = ("yes" if same else "no" for same in (found == asked, value == question.answer))
    reply = {
        "reason": f"asked {asked}, found {found}: {answerable}; seen {value}, stated {question.answer}: {supported}",
             "answerable": answerable, "observation_supports_answer": supported,
             "chain_consistent": supported,
             "problems": []}
    return [draw_scene(scene)], judge_call(row, Verdict(), ".", PROMPTS["filter"]).text, json.dumps(reply)


several, one = partial(some, n_keys=6), partial(some, n_keys=1)
SEE = {"every_place": (11, every_place), "every_color": (9, every_color)}
FIND = {"several": (8, several), "one": (2, one)}
BASE = {"several": (10, several), "one": (10, one), "read": (18, read), "caption_call": (18, caption_call),
        "refinement_call": (26, refinement_call), "judgement_call": (18, judgement_call)}
