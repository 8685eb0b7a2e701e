"""Give thousands of hostile rows and pictures to everything that reads them, and count what goes wrong.

    python tests/hostile.py --result results/hostile.json      (a minute on one core)

Inputs are valid ones, mutated. Counts go to --result and to stdout; exit code 1 if a failure is counted.

Scripts run in this process, through `cli` as commands do. A failure is an exception other than SystemExit, an
exit code other than 0, 2, 3, 4, more than 10 s, 2 GiB more memory, a file opened outside the case's folder
(an audit hook), a control token in a prompt or training row that the template does not bring, or a class
looked up by a pickle.
"""
import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from conftest import ROOT, TEXTS, TINY, TINY_VISION  # it puts the scripts within reach

# isort: split
from benchmark_fixtures import FILES, read_rows
from PIL import Image
from processes import MAINS, words
from samples import EPS, METRICS, StandIn, mirage, monet, png, result, row

import filter_data
import rewrite_captions
import train_sft
from toy.make_model import make_model
from utils import qwen as Q
from utils.cli import cli
from utils.evaluate.prompts import PROTOCOLS, user_text
from utils.images import ImageError, Picture, image_size, open_image, picture_url
from utils.items import chat, question_text, read_items
from utils.jsonl import write_rows
from utils.latent_families import PRESETS
from utils.probe.states import States, StateWriter
from utils.train.examples import END_OF_TURN, make_examples
from utils.train.weights import add_tokens

LIMIT_S, LIMIT_GIB = 10.0, 2.0
COUNTED = ("rows", "images")
FAILURES = ("tracebacks", "hangs", "escapes", "tokens", "pickles", "memory")
LIBRARIES = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT)]
LIBRARIES += ["/usr", "/dev", "/proc", "/sys", "/lib", "/etc/ld.so.cache", "/etc/localtime",
              str(Path.home() / ".cache"), str(Path.home() / ".config"), f"{tempfile.gettempdir()}/datasets-"]
FORBIDDEN = ("/dev/zero", "/proc/self/mem", "/etc/passwd")
watched = {"case": None, "allowed": LIBRARIES, "opened": [], "pickles": 0}
# tokens of every family and marks; paths; strings that are repeated up to 10 MB; values of all types
STRINGS = json.loads((ROOT / "tests" / "files" / "hostile.json").read_text())
SPECIAL, PATHS, REPEATED, VALUES = STRINGS.values()
RAW = {"@DEEP@": "[" * 10_000 + "]" * 10_000, "@DEEPER@": '{"a":' * 10_000 + "1" + "}" * 10_000,
       "@HUGE@": "9" * 5000, "@EXPONENT@": "1e999999", "@HALF@": '"\\ud800"', "@NAN@": "NaN"}

PICKLE = pickle.dumps({"weights": [1, 2, 3], "trap": print})  # the audit hook sees that print is looked up
GOLDS = {"mcq": ("letter", "B"), "wtq": ("values", ["7"]), "tabfact": ("bool", True),
         "vsp_path": ("path_map", [[1, 0], [-1, 2]])}


# a row or two of each benchmark, as published
SOURCES = {name: read_rows(f"{file}.tsv")[:2] for name, file in (
    ("vstar", "vstar"), ("tablevqa/vwtq", "tables"), ("mme", "mme"), ("ocrbench_v2", "ocr"),
    ("hrbench_4k", "hrbench"), ("mme_realworld_lite", "realworld"))}
SOURCES["vsp"] = [json.loads(line) for line in (FILES / "vsp.jsonl").read_text().splitlines()]


def item(name: str = "i/1", metric: str = "mcq") -> dict:
    answer = dict(zip(("type", "value"), GOLDS[metric]))
    return {"id": name, "benchmark": "toy", "category": "zoom", "group_id": f"g/{name}", "answer": answer,
            "question": "What digit?", "options": [["A", "4"], ["B", "7"]] if metric == "mcq" else [],
            "images": [{"path": "a.png", "sha256": "0"}], "metric": metric, "hint": "look",
            "raw": {"cycle_category": "0"}, "region": [1, 2, 30, 40],
            "counterfactual": {"images": [{"path": "b.png"}], "answer": answer}}


def picture(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (8, 9), random.Random(seed).randbytes(216)).resize((64, 90))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_case(folder: Path) -> Path:
    """Make the image root with links out of it, a pipe and a circular link; return it."""
    root = folder / "root"
    (folder / "outside").mkdir()
    root.mkdir()
    for n, name in enumerate(("a.png", "b.png", "ä.png", "../outside/secret.png")):
        picture(n).save(root / name)
    (root / "link.png").symlink_to(folder / "outside" / "secret.png")
    (root / "linked").symlink_to(folder / "outside")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a JSON value."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def hostile_value(rng: random.Random, old: object) -> object:
    kind = rng.randrange(7 if isinstance(old, str) else 3)
    if kind < 3:
        return rng.choice((VALUES, [*RAW], PATHS)[kind])
    if kind == 3:  # slow where a reader looks ahead from every place
        unit, size = rng.choice(REPEATED), rng.choice((10_000, 100_000, 700_000, 700_000, 10_000_000))
        return unit * (size // len(unit)) + rng.choice(("", " The answer is \\boxed{42}."))
    cut = rng.randint(0, len(old))
    return old[:cut] + rng.choice(SPECIAL) * rng.choice((1, 1, 3)) + old[cut:]


def mutate(rng: random.Random, value: dict) -> dict:
    """Return a copy of a row with one to three values dropped, doubled, retyped or replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, key = rng.choice([*places(value)] or [("x",)])
        holder, act = functools.reduce(lambda part, name: part[name], path, value), rng.randrange(5)
        if act == 0:
            del holder[key]
        elif act == 1 and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = hostile_value(rng, holder[key])
        if not value:
            break
    return value


def as_line(value: object) -> str:
    line = json.dumps(value, ensure_ascii=len(str(value)) % 2 == 0)
    for name, raw in RAW.items():
        line = line.replace(f'"{name}"', raw)
    return line


def as_file(rng: random.Random, rows: list[dict]) -> bytes:
    """Return rows as the bytes of a JSONL file, sometimes damaged as a whole."""
    lines = [as_line(value) for value in rows]
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    damaged = [b"\xef\xbb\xbf" + data, data[:rng.randint(0, len(data))], data + data, PICKLE, b"",
               b"[" * 10_000, data.replace(b"a", b"\xff", 1), data.replace(b" ", b"\0", 1), b"null\n" + data,
               f"[{','.join(lines)}]".encode("utf-8", "surrogatepass"), data.replace(b"\n", b"\r\n"),
               data.decode("utf-8", "replace").encode("utf-16")]
    return rng.choice(damaged) if rng.random() < 0.5 else data


def damage(rng: random.Random, path: Path) -> None:
    """Mutate the first row of a JSON file; flip, cut or replace the bytes of another file."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        text = data.decode()
        rows = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        data = as_file(rng, [mutate(rng, rows[0]), *rows[1:]])
    elif rng.random() < 0.2:
        data = PICKLE
    else:
        data = flip(rng, data[:rng.randint(1, len(data))] if rng.random() < 0.2 else data)
    path.write_bytes(data)


def flip(rng: random.Random, data: bytes) -> bytes:
    """Return bytes of which a few are replaced, removed or put in, mostly near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 5, 30))):
        at = rng.randrange(min(len(data), rng.choice((40, 200, len(data)))))
        data[at:at + rng.randint(0, 4)] = rng.choice((b"\xff" * 4, bytes(4), rng.randbytes(1), b""))
    return bytes(data)


def pictures(n: int, seed: int, bombs: bool) -> Iterator[tuple[str, bytes]]:
    """Yield n (name, bytes): traps, then valid pictures cut, flipped and overwritten. Bombs take GBs."""
    exif, text_bomb = Image.Exif(), zlib.compress(bytes(1 << 26))
    exif[0x0112] = 6
    rgb, frames = picture(0), {"save_all": True, "append_images": [picture(1), picture(2)]}
    valid = {f"rgb.{kind}": encoded(rgb, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    valid |= {f"moving.{kind}": encoded(rgb, kind, **frames) for kind in ("GIF", "WEBP", "PNG", "TIFF")}
    valid |= {f"{mode}.PNG": encoded(rgb.convert(mode), "PNG") for mode in ("L", "RGBA", "P", "1")}
    valid |= {"cmyk.JPEG": encoded(rgb.convert("CMYK"), "JPEG"),
              "turned.JPEG": encoded(rgb, "JPEG", exif=exif),
              "deep.PNG": encoded(Image.new("I;16", (64, 90), 20_000), "PNG"),
              "lzw.TIFF": encoded(rgb, "TIFF", compression="tiff_lzw")}
    loop = bytearray(valid["rgb.TIFF"])
    loop[4:8] = struct.pack("<I", 8)
    odd_exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3\xff\xff\xff\xff" * 900
    traps = {"svg": b'<svg><image href="file:///etc/passwd"/></svg>', "html": b"<html>404</html>", "eps": EPS,
             "pickle": PICKLE, "empty": b"", "nul": bytes(1000), "loop": bytes(loop),
             "ppm": b"P6 64 64 255\n" + bytes(12288), "zero": png(0, 40, 8, 2, 0),
             "header": png(60_000, 60_000, 8, 2, 1), "thin": png(100_000, 1, 8, 0, 100_001),
             "short": png(300, 300, 8, 2, 64), "negative": png(2**31 + 40, 40, 8, 2, 0),
             "text_bomb": png(40, 40, 8, 2, 4840, (b"zTXt", b"k\0\0" + text_bomb)),
             "icc_bomb": png(40, 40, 8, 2, 4840, (b"iCCP", b"k\0\0" + text_bomb)),
             "exif": encoded(rgb, "JPEG", exif=odd_exif),
             "icc": encoded(rgb, "JPEG", icc_profile=bytes(5_000_000))}
    if bombs:
        side = 13_300  # 176.9 million pixels, below the limit
        traps |= {f"bomb_{colour}": png(side, side, 8, colour, side * (size * side + 1), *extra)
                  for colour, size, extra in ((2, 3, ()), (6, 4, ()), (3, 1, [(b"PLTE", bytes(6))]))}
    rng = random.Random(seed)
    made = [*traps.items(), *((f"cut_{tenth}_{name}", data[:len(data) * tenth // 10])
                              for name, data in valid.items() for tenth in range(10))]
    rng.shuffle(made)
    yield from made[:n // 2]
    for k in range(n - len(made[:n // 2])):
        name, data = rng.choice([*valid.items()])
        yield f"flip_{k}_{name}", flip(rng, data)


def audit(event: str, args: tuple) -> None:
    """Note each file opened outside the case, and each class that a pickle looks up."""
    if event == "pickle.find_class" and watched["case"]:
        watched["pickles"] += 1
    if event == "open" and watched["case"] and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        inside = path.startswith(watched["case"]) and not path.startswith(f"{watched['case']}/outside")
        if path in FORBIDDEN or not (inside or path.startswith(tuple(watched["allowed"]))):
            watched["opened"].append(path)


class Tally:
    """Runs inputs as commands would and counts; `case` is the folder that they may read."""
    def __init__(self, case: Path):
        if not watched.get("hooked"):  # an audit hook cannot be removed
            sys.addaudithook(audit)
        watched["hooked"] = True
        self.case, self.counts, self.codes, self.by_reader = case, Counter(), Counter(), Counter()
        self.failures, self.slowest, self.seed = [], (0.0, ""), None
        self.base = self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def fail(self, kind: str, reader: str, message: object) -> None:
        self.counts[kind] += 1
        self.failures.append({"kind": kind, "reader": reader, "seed": self.seed,
                              "said": str(message)[-1500:]})

    def run(self, reader: str, kind: str, act: Callable[[], object]) -> int | None:
        """Run one input; return its exit code, None after an exception."""
        self.counts[kind] += 1
        self.by_reader[reader] += 1
        err, code, began, busy = io.StringIO(), None, time.monotonic(), time.process_time()
        watched.update(case=str(self.case), opened=[], pickles=0)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                code = cli(act) or 0
        except SystemExit as error:
            code = error.code
        except BaseException:  # any exception is a failure to report
            self.fail("tracebacks", reader, traceback.format_exc())
        finally:
            watched["case"] = None
        seconds, message = time.monotonic() - began, err.getvalue()
        if seconds < 6 * LIMIT_S:  # other work on the machine does not count
            seconds = min(seconds, time.process_time() - busy)
        self.slowest = max(self.slowest, (round(seconds, 2), f"{reader} {self.seed}"))
        self.codes[str(code)] += code is not None
        if code not in (None, 0, 2, 3, 4) or "Traceback" in message or code == 2 and "error: " not in message:
            self.fail("tracebacks", reader, f"exit code {code}: {message}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        grown = peak - self.base > LIMIT_GIB * 2**20 and peak > self.peak
        self.peak = max(self.peak, peak)
        for failure, found in (("hangs", seconds > LIMIT_S and seconds), ("escapes", watched["opened"][:3]),
                               ("pickles", watched["pickles"]), ("memory", grown and peak - self.base)):
            if found:
                self.fail(failure, reader, found)
        return code

    def check_tokens(self, reader: str, tokenizer: object, text: str | list[int], template: str) -> None:
        """Count it as a failure if a text has other control tokens than the template's."""
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        counts = []
        for part in (text, template):
            ids = part if isinstance(part, list) else tokenizer(part, add_special_tokens=False).input_ids
            counts.append(Counter(i for i in ids if i in special))
        if counts[0] != counts[1]:
            names = tokenizer.convert_ids_to_tokens([*(counts[0] - counts[1])])
            self.fail("tokens", reader, names or "tokens of the template are missing")

    def result(self) -> dict:
        return {"inputs": sum(self.counts[name] for name in COUNTED),
                **{name: self.counts[name] for name in (*COUNTED, *FAILURES)},
                "exit_codes": dict(sorted(self.codes.items())),
                "by_reader": dict(sorted(self.by_reader.items())), "slowest_s": self.slowest,
                "more_memory_gib": round((self.peak - self.base) / 2**20, 2), "failures": self.failures[:50]}


PROMPTS = {"rewrite_captions": rewrite_captions.PROMPTS, "filter_data": filter_data.PROMPTS}


class StandInModel(StandIn):
    """Gives captions, refinements and verdicts that stages 1 and 2 accept."""
    def reply(self, text: str) -> str:
        if "[1]" in text:
            return json.dumps({"segments": []})
        if "fill in this form" in text:
            return json.dumps({"reason": "x", "asked": "boat", "found": "boat", "seen": "42", "stated": "42",
                               "problems": []})
        return json.dumps({"caption": "a white 42 on a hull", "legible": "yes"})


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Let scripts load a checkpoint once, and ask a stand-in for the local model."""
    new = {name: functools.cache(getattr(Q, name)) for name in ("load_tools", "load_with", "load_processors")}
    new["LocalBackend"] = StandInModel
    with contextlib.ExitStack() as stack:
        for module in [*sys.modules.values()]:
            if (getattr(module, "__file__", None) or "").startswith(str(ROOT)):
                for name in new.keys() & vars(module):
                    stack.enter_context(mock.patch.object(module, name, new[name]))
        yield


class Readers:
    """One method per kind of input: it writes a mutated input and runs the script that reads it."""
    def __init__(self, tally: Tally, root: Path, checkpoint: Path):
        self.tally, self.root, self.case, self.checkpoint = tally, root, root.parent, checkpoint
        self.input, self.output = self.case / "in.jsonl", self.case / "out.jsonl"
        self.qwen = Q.load_tools(str(checkpoint))
        for preset in PRESETS.values():  # every family's markers are tokens; none may come from data
            add_tokens(self.qwen, preset.tokens)

    def write(self, rng: random.Random, *rows: dict) -> Path:
        self.input.write_bytes(as_file(rng, [mutate(rng, rows[0]), *rows[1:]]))
        return self.input

    def run(self, reader: str, script: str, kind: str = "rows", **flags: object) -> int | None:
        return self.tally.run(reader, kind, lambda: MAINS[script](words(**flags)))

    def stages(self, rng):
        make, script = rng.choice([(monet, "rewrite_captions"), (mirage, "rewrite_captions"),
                                   (row, "rewrite_captions"), (row, "filter_data"), (row, "filter_data")])
        shutil.rmtree(f"{self.output}.run", ignore_errors=True)
        StandInModel.asked = []
        flags = {rng.choice(("no_guard", "no_guard", "dry_run")): True}
        self.run(f"{script} {make.__name__}", script, input=self.write(rng, make(), row("x/2")),
                 image_root=self.root, output=self.output, model=self.checkpoint, **flags)
        for request in StandInModel.asked:  # a server's tokenizer takes markers in a text for tokens
            if "<|" in request.text:
                self.tally.check_tokens(f"{script} call", self.qwen.tokenizer, request.text, "<think_image>")

    def training(self, rng):
        kind = rng.choice(("text", "latent", "placeholder", "direct"))
        args = train_sft.parse_args(["--data", str(self.write(rng, row(), row("x/2"))), "--image_root",
                                     str(self.root), "--output", str(self.output), "--imagination", kind])
        target, tokenizer = train_sft.make_target(args), self.qwen.tokenizer

        def act() -> None:
            rows, _ = train_sft.prepare_rows(args)
            for value, example in zip(rows, make_examples(self.qwen, rows, target, args.max_tokens)):
                n_steps, spec = sum("image" in step for step in value["steps"]), target.spec
                latents = (spec.start + spec.pad * spec.size + spec.end) * n_steps if spec else ""
                neutral = chat(tokenizer, "x", len(value["images"])) + latents + END_OF_TURN
                self.tally.check_tokens(f"train_sft {kind}", tokenizer, example.ids, neutral)
        self.tally.run(f"train_sft {kind}", "rows", act)

    def items(self, rng):
        script = rng.choice(("evaluate", "intervene", "probe"))
        self.write(rng, item(metric=rng.choice([*GOLDS])), item("i/2"))
        if self.run(f"{script} items", script, items=self.input, image_root=self.root, model=self.checkpoint,
                    dry_run=True, output=self.case / f"of_{script}") == 0:
            tokenizer = self.qwen.tokenizer
            for value in read_items(self.input, None, tuple(GOLDS)):
                for text in (question_text(value), user_text(value, PROTOCOLS["vlmevalkit"])):
                    n = len(value["images"])
                    self.tally.check_tokens(f"{script} prompt", tokenizer, chat(tokenizer, text, n),
                                            chat(tokenizer, "x", n))

    def probe_items(self, rng):
        write_rows(self.case / "items.jsonl", [item(), item("i/2")])
        questions = [{"id": f"p/{n}", "source": f"i/{n}", "question": "What colour?", "options": [
            ["A", "red"], ["B", "blue"]], "answer": {"type": "letter", "value": "A"}} for n in (1, 2)]
        self.run("probe questions", "probe", items=self.case / "items.jsonl", image_root=self.root,
                 probe_items=self.write(rng, *questions), dry_run=True, model=self.checkpoint,
                 output=self.case / "of_probe")

    def results(self, rng):
        self.write(rng, result(), result("i/2") | {"verdict": "incorrect"})
        metrics = as_line(mutate(rng, METRICS) if rng.random() < 0.5 else METRICS)
        metrics = PICKLE if rng.random() < 0.03 else metrics.encode("utf-8", "surrogatepass")
        Path(f"{self.input}.metrics.json").write_bytes(metrics)
        self.run("evaluate --table", "evaluate", table=f"Monet={self.input}", output=self.case / "table.md")

    def prompts(self, rng):
        write_rows(self.case / "own.jsonl", [row()])
        script = rng.choice(("rewrite_captions", "filter_data"))
        self.run("prompts", script, input=self.case / "own.jsonl", image_root=self.root, output=self.output,
                 prompts=self.write(rng, PROMPTS[script]), dry_run=True)

    def source(self, rng):
        name, kind = rng.choice([*SOURCES]), rng.choice(("tsv", "jsonl"))
        first, second = SOURCES[name]
        rows, path = [first, mutate(rng, second)], self.case / f"source.{kind}"
        if kind == "jsonl":
            path.write_bytes(as_file(rng, rows))
        else:
            cells = [[as_line(value).strip('"') for value in source.values()] for source in rows]
            text = "\n".join("\t".join(line) for line in (list(first), *cells))
            path.write_bytes(text.encode("utf-8", "replace"))
            if rng.random() < 0.15:
                damage(rng, path)
        self.run(f"evaluate --benchmark {kind}", "evaluate", benchmark=name, source=path, prepare=True,
                 image_root=self.root, output=self.case / "bench", limit=2)

    def journal(self, rng):
        script = rng.choice(("rewrite_captions", "filter_data"))
        made, again = self.case / f"journal_{script}", self.case / "again"
        write_rows(self.case / "own.jsonl", [row(), row("x/2")])
        flags = {"input": self.case / "own.jsonl", "image_root": self.root, "model": self.checkpoint,
                 "no_guard": True}
        if not made.exists():
            made.mkdir()
            self.run(f"journal of {script}", script, output=made / "out.jsonl", **flags)
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(made, again)
        damage(rng, rng.choice([path for path in sorted((again / "out.jsonl.run").iterdir())
                                if path.suffix in (".json", ".jsonl") and path.stat().st_size]))
        self.run(f"journal of {script}", script, output=again / "out.jsonl", **flags)

    def states(self, rng):
        import numpy as np
        folder = self.case / "states"
        shutil.rmtree(folder, ignore_errors=True)
        with StateWriter(folder, {"model": "m"}) as writer:
            for n in range(3):
                writer.add(f"i/{n}", {"latent": np.ones((4, 8)), "text": np.ones((2, 8))}, emitted=True)
        damage(rng, rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()]))

        def act() -> None:
            store = States(folder)
            for kind in ("latent", "text"):
                for key in store.records:
                    store.load(key, kind)
        self.tally.run("states", "rows", act)

    def pictures(self, n: int, seed: int, bombs: bool) -> None:
        """Give each picture to everything that opens one: stage 1, training, what is sent to a server."""
        path, value = self.root / "hostile.png", row(images=["hostile.png"])
        write_rows(self.input, [value])
        args = train_sft.parse_args(["--data", "x", "--image_root", str(self.root), "--output", "x"])
        acts = {"opened": lambda: open_image(path), "measured": lambda: image_size(path),
                "sent": lambda: picture_url(Picture(str(path)), 10**6, 28),
                "trained on": lambda: make_examples(self.qwen, [value], train_sft.make_target(args), 8192)}

        def try_out(act: Callable) -> None:
            with contextlib.suppress(ImageError):
                act()

        for name, data in pictures(n, seed, bombs):
            path.write_bytes(data)
            self.tally.seed = name
            self.run("picture in stage 1", "rewrite_captions", "images", input=self.input,
                     image_root=self.root, output=self.output, dry_run=True)
            for reader, act in acts.items():
                self.tally.run(f"picture {reader}", "reads_of_images", functools.partial(try_out, act))


SHARES = {"stages": 40, "training": 18, "items": 16, "probe_items": 5, "results": 8, "prompts": 4,
          "source": 14, "journal": 6, "states": 4}  # how often each reader's turn comes


def run(checkpoint: Path, n_rows: int, n_images: int, seed: int, bombs: bool) -> dict:
    """Run it all; return the counts."""
    watched["allowed"] = [*LIBRARIES, os.path.realpath(checkpoint)]
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder, quick():
        case = Path(folder).resolve() / "case"
        case.mkdir()
        os.environ["HF_DATASETS_CACHE"] = str(case / "cache")
        readers = Readers(Tally(case), make_case(case), checkpoint)
        for n in range(n_rows):
            rng = random.Random(f"{seed} row {n}")
            name = rng.choices([*SHARES], [*SHARES.values()])[0]
            readers.tally.seed = f"{seed} row {n} {name}"
            getattr(readers, name)(rng)
            if n == 100:
                readers.tally.base = readers.tally.peak  # libraries are loaded by now
        readers.pictures(n_images, seed, bombs)
    return readers.tally.result()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--result", required=True, help="JSON file to write")
    for name, default in (("rows", 2000), ("images", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tiny, bombs = Path(folder) / "tiny", args.images >= 100
        make_model(TEXTS, tiny, n_tokens=320, seed=0, sizes=TINY, vision_sizes=TINY_VISION)
        counts = run(tiny, args.rows, args.images, args.seed, bombs)
    counts |= {"seed": args.seed, "seconds": round(time.monotonic() - began, 1)}
    Path(args.result).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(counts))
    return int(any(counts[name] for name in FAILURES))


if __name__ == "__main__":
    raise SystemExit(main())
