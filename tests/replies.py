"""Replies whose right reading is known: 48 that harnesses were given, and any number that are made here."""
import json
import random
from collections.abc import Iterator
from pathlib import Path

from samples import table

OPTIONS = {name: dict(zip("ABCDE", texts)) for name, texts in {
    "MAT": ("rubber", "cotton", "kevlar", "leather"), "COL": ("white", "red", "blue", "black"),
    "LR": ("left", "right"), "NUM": ("48", "49", "4", "9"), "TEN": ("1", "2", "3", "10"),
    "BIN": ("To the right of the recycle bin", "In front of the recycle bin", "Behind the recycle bin",
            "To the left of the recycle bin"),
    "SNOW": ("red", "white", "blue", "green"), "JIG": ("the second image", "the third image"),
    "RW5": ("Red", "Green", "Yellow", "White", "The image does not feature the color")}.items()}
# a line: a name of OPTIONS, gold, reply, the letters of VLMEvalKit at e8e78f0, of MME-RealWorld's function on
# bare letters and of our rules, our rule
REPLIES = [tuple(case.values()) for case in table("harness_replies")]

# {L} the letter, {l} in lower case, {T} its text; {X}, {Y} two options' texts, {O} any letter, {N} a thing.
# A claim names an option: never among sentences that choose nothing.
TEMPLATES = json.loads((Path(__file__).parent / "files" / "planted.json").read_text(encoding="utf-8"))
FORMS = ("bare", "boxed", "nothing", "phrase", "tail")


def planted(count: int, seed: int) -> Iterator[tuple[str, dict[str, str], str | None, str]]:
    """Yield (form, options in a random order, the planted letter or None, reply): a known answer, planted
    once, in one of many forms, among sentences that choose nothing."""
    rng = random.Random(seed)
    for _ in range(count):
        texts = list(OPTIONS[rng.choice(sorted(OPTIONS))].values())
        rng.shuffle(texts)
        options, form = dict(zip("ABCDE", texts)), rng.choice(FORMS)
        letter = rng.choice(list(options))

        def fill(*names):
            x, y = rng.sample(texts, 2)
            template = rng.choice([template for name in names for template in TEMPLATES[name]])
            return template.format(L=letter, l=letter.lower(), T=options[letter], X=x, Y=y,
                                   N=rng.choice(TEMPLATES["nouns"]), O=rng.choice(list(options)))
        prose = ["prose"] if form == "nothing" else ["prose", "claim"]
        before = [fill(*prose) for _ in range(0 if form == "bare" else rng.randint(0, 4))]
        after = [fill("prose") for _ in range(rng.randint(0, 2) if form == "boxed" else 0)]
        text = rng.choice((" ", "\n", "\n\n")).join([*before, fill(form), *after])
        reply = fill("latent") + text + rng.choice(TEMPLATES["end"])
        yield form, options, None if form == "nothing" else letter, reply
