"""Write the toy's data: training chains in Monet-SFT's format, held-out items, the base model's lessons.

    python -m toy.make_world --output work/world

Writes  <subset>/train.json and <subset>/images/ for the subsets Toy_zoom and Toy_draw (Monet-SFT's layout)
        truth.jsonl: the planted fault of every training row; filter_data.py --calibrate reads it
        bench.jsonl: held-out items for evaluate.py and intervene.py; probe.jsonl: questions for probe.py
        see.jsonl, find.jsonl, base.jsonl: rows for the base model's three trainings (toy/lessons.py)
Prints  one JSON object with the counts
"""
import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from toy.lessons import BASE, FIND, SEE, ask_about_nothing
from toy.world import (ATTRIBUTES, Question, Thing, ask, ask_about, draw_scene, make_scene, observation,
                       opening, prompt_text, zoom_in)
from utils.cli import cli, log
from utils.jsonl import write_json, write_rows

BAD = ("conflict", "unanswerable", "missing_image")
BAD_SHARE = 0.18  # of the training rows, spread evenly over BAD
SUFFIX = "\nPut your final answer within \\boxed{}."  # as Monet-SFT ends its questions


def spoil(rng: random.Random, scene: list[Thing], question: Question, bad: str | None) -> Question:
    """Return the question with the fault `bad`; the chain is written for the result."""
    if bad == "conflict":  # the stated answer is not the option that the picture shows
        wrong = [value for value in question.options if value != question.answer]
        return replace(question, answer=rng.choice(wrong))
    if bad == "unanswerable":  # about a colour that is not in the picture, or a corner that is empty
        return ask_about_nothing(rng, scene, question.operation)[0]
    return question


def monet_sample(subset: str, sample_id: int, question: Question, images: list[str]) -> dict:
    """Return one sample in Monet-SFT's layout (its three turns, empty latent pair, observation tags)."""
    return {"metadata": {"dataset_name": subset, "sample_id": sample_id}, "data": [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": [{"type": "image", "image": images[0]},
                                     {"type": "text", "text": prompt_text(question) + SUFFIX}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": f"{opening(question)} <abs_vis_token></abs_vis_token>"},
            {"type": "image", "image": images[1]},
            {"type": "text", "text": f"<observation>{observation(question)}</observation> "
                                     f"The answer is \\boxed{{{question.answer}}}."}]}]}


def write_training(folder: Path, n_scenes: int, seed: int) -> dict[str, int]:
    """Write three samples per scene (two zoom, one draw), some with a fault, and truth.jsonl."""
    samples, truth = {"Toy_zoom": [], "Toy_draw": []}, []
    for subset in samples:
        (folder / subset / "images").mkdir(parents=True, exist_ok=True)
    for n in tqdm(range(n_scenes), desc="training scenes"):
        rng = random.Random(f"{seed}/train/{n}")
        scene = make_scene(rng)
        picture = draw_scene(scene)
        for operation in ("zoom", "zoom", "draw"):
            subset = f"Toy_{operation}"
            bad = rng.choice(BAD) if rng.random() < BAD_SHARE else None
            question = spoil(rng, scene, ask(rng, scene, operation), bad)
            sample_id = len(samples[subset])
            names = [f"{subset}/images/{sample_id}_{k}.png" for k in (0, 1)]
            helper = (zoom_in(picture, question.thing) if operation == "zoom"
                      else draw_scene(scene, question.thing))
            picture.save(folder / names[0])
            if bad != "missing_image":
                helper.save(folder / names[1])
            samples[subset].append(monet_sample(subset, sample_id, question, names))
            truth.append({"id": f"{subset}/{sample_id}", "bad": bad})
    for subset, rows in samples.items():
        write_json(folder / subset / "train.json", rows)
    write_rows(folder / "truth.jsonl", truth)
    return {subset: len(rows) for subset, rows in samples.items()} | {
        bad: sum(row["bad"] == bad for row in truth) for bad in BAD}


def item(name: str, scene_name: str, question: Question, image: str) -> dict:
    """Return one held-out item in the form that evaluate.py reads."""
    letter = "ABCD"[question.options.index(question.answer)]
    return {"id": name, "benchmark": "toy", "split": "test", "category": question.operation,
            "group_id": scene_name, "question": question.text,
            "options": [list(pair) for pair in zip("ABCD", question.options)],
            "answer": {"type": "letter", "value": letter}, "images": [{"path": image}], "metric": "mcq"}


def draw_counterfactual(folder: Path, image: str, scene: list[Thing], question: Question) -> dict:
    """Draw the scene with one thing changed so that a wrong option is right; return images and answer."""
    letter, value = random.Random(f"{image}/edit").choice(
        [pair for pair in zip("ABCD", question.options) if pair[1] != question.answer])
    changed = replace(question.thing, **{question.attribute: value})
    draw_scene([changed if thing == question.thing else thing for thing in scene]).save(folder / image)
    return {"images": [{"path": image}], "answer": {"type": "letter", "value": letter}}


def write_bench(folder: Path, n_scenes: int, seed: int) -> dict[str, int]:
    """Write three items per held-out scene; each has an edited picture with another answer, and a question
    about another attribute of the same thing."""
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    items, probes = [], []
    for n in range(n_scenes):
        rng = random.Random(f"{seed}/test/{n}")
        scene = make_scene(rng)
        image = f"bench/{n}.png"
        draw_scene(scene).save(folder / image)
        for k, operation in enumerate(("zoom", "zoom", "draw")):
            question = ask(rng, scene, operation)
            items.append(item(f"toy/{n}/{k}", f"toy/{n}", question, image))
            edited = f"bench/{n}_{k}_edit.png"
            items[-1]["counterfactual"] = draw_counterfactual(folder, edited, scene, question)
            rest = tuple(name for name in ATTRIBUTES[operation] if name != question.attribute)
            row = item("", "", ask_about(rng, scene, question.thing, operation, rest), "")
            probes.append({"id": f"probe/{n}/{k}", "source": f"toy/{n}/{k}",
                           **{key: row[key] for key in ("question", "options", "answer")}})
    write_rows(folder / "bench.jsonl", items)
    write_rows(folder / "probe.jsonl", probes)
    return {"items": len(items), "probe_items": len(probes)}


def write_lessons(folder: Path, name: str, lessons: dict, n_rows: int, seed: int) -> dict[str, int]:
    """Write <name>.jsonl: rows whose chain is the reply to learn, drawn by weight from `lessons`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for n in tqdm(range(n_rows), desc=f"lessons: {name}"):
        rng = random.Random(f"{seed}/{name}/{n}")
        kind = rng.choices(list(lessons), [weight for weight, _ in lessons.values()])[0]
        pictures, question, reply = lessons[kind][1](rng)
        paths = [f"{name}/{n}_{k}.png" for k in range(len(pictures))]
        for picture, path in zip(pictures, paths):
            picture.save(folder / path, compress_level=1)
        rows.append({"id": f"{name}/{n}", "subset": kind, "images": paths, "question": question, "answer": "",
                     "steps": [], "chain": reply})
    write_rows(folder / f"{name}.jsonl", rows)
    return {f"{name}/{kind}": sum(row["subset"] == kind for row in rows) for kind in lessons}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--train_scenes", type=int, default=400,
                        help="scenes of the training chains, three rows each")
    parser.add_argument("--test_scenes", type=int, default=100, help="held-out scenes, three items each")
    parser.add_argument("--lesson_rows", type=int, default=6000,
                        help="rows of each of the base model's three trainings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = Path(args.output)
    counts = write_training(folder, args.train_scenes, args.seed)
    counts |= write_bench(folder, args.test_scenes, args.seed)
    for name, lessons in (("see", SEE), ("find", FIND), ("base", BASE)):
        counts |= write_lessons(folder, name, lessons, args.lesson_rows, args.seed)
    log(", ".join(f"{key} {value}" for key, value in counts.items()))
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
