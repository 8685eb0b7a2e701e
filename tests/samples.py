"""Inputs that several test files share: a row of our form, a Monet-SFT sample, a shortest path, a span."""
import json
import re
import struct
import zlib
from collections import deque
from pathlib import Path

from PIL import Image

from utils.backends import Reply

PAIR = "<abs_vis_token></abs_vis_token>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"


def table(name: str) -> list[dict]:
    """Return the cases in a file of tests/files."""
    text = (Path(__file__).parent / "files" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def framed(path: Path, size: tuple[int, int] = (56, 84), color: str = "red") -> Path:
    """Save a picture with a white corner, so that it is not one flat colour."""
    image = Image.new("RGB", size, color)
    image.paste("white", (0, 0, size[0] // 2, size[1] // 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def row(name: str = "s/1", caption: str = "The hull shows a white 42.", **changes) -> dict:
    steps = [{"text": "I look closer."}, {"image": "b.png", "operation": "zoom", "caption": caption},
             {"text": "The answer is \\boxed{42}."}]
    chain = f"I look closer. <think_image>{caption}</think_image> The answer is \\boxed{{42}}."
    return {"id": name, "subset": "s", "images": ["a.png"], "question": f"What number is on boat {name}?",
            "answer": "42", "steps": steps, "chain": chain, "refined": True} | changes


def monet(sample_id: object = 7, subset: str = "Visual_CoT", question: str = "What number is on the boat?",
          answer: str = "42", images: tuple[str, str] = ("a.png", "b.png"), assistant: list | None = None,
          user: list | None = None) -> dict:
    final = f"<observation>The hull shows {answer}.</observation> The answer is \\boxed{{{answer}}}."
    chain = [("text", f"I look closer at the boat. {PAIR}"), ("image", images[1]), ("text", final)]
    asked = [("image", images[0]), ("text", question + "\nPut your final answer within \\boxed{}.")]
    turns = [("system", [("text", "You are a helpful assistant.")]), ("user", user or asked),
             ("assistant", assistant or chain)]
    return {"metadata": {"dataset_name": subset, "sample_id": sample_id},
            "data": [{"role": role, "content": [{"type": kind, kind: value} for kind, value in content]}
                     for role, content in turns]}


def mirage(**changes) -> dict:
    return {"text_input": "Map: <image>\nSafe?", "image_input": "a.png", "image_output": "b.png",
            "text_output": "<think> Go on. </think><output_image>The answer is \\boxed{A}."} | changes


def result(name: str = "i/1", **changes) -> dict:
    """Return a line that evaluate.py writes about an item."""
    return {"id": name, "benchmark": "vstar", "category": "a", "group_id": "g", "gold": "B", "n_options": 4,
            "prompt_sha": "0", "verdict": "correct", "clean_output": "B", "judged": "correct", "n_tokens": 3,
            "n_latent": 0} | changes


METRICS = {"n": 2, "correct": 2, "ci95": [0.1, 0.9], "chance": 0.25, "protocol": {
    "model": "m", "method": "text", "line": "l"}, "with_judge": {"ci95": [0.1, 0.9], "chance": 0.3},
    "efficiency": {"seconds_per_item": 1.0, "tokens_per_item": 8.0}}


def shortest_path(board):
    """Breadth-first search, an independent way to the goal; None if there is no way."""
    cells = {(r, c): value for r, row in enumerate(board) for c, value in enumerate(row)}
    start = next(cell for cell, value in cells.items() if value == 1)
    queue, seen = deque([(start, "")]), {start}
    while queue:
        (r, c), path = queue.popleft()
        if cells[r, c] == 2:
            return path
        for move, (down, right) in {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}.items():
            step = r + down, c + right
            if cells.get(step, -1) != -1 and step not in seen:
                seen.add(step)
                queue.append((step, path + move))
    return None


def before_conclusion(text: str) -> list[tuple[int, int]]:
    """Return the span of a real reply, which has no marks: everything before its first concluding words."""
    conclusion = re.search(r"(?i)therefore|thus|hence|answer|option|choice|\\boxed", text)
    end = len(text[:conclusion and conclusion.start()].rstrip())
    return [(0, end)] if end else []


def png(width: int, height: int, depth: int, colour: int, pixels: int | bytes, *extra: tuple[bytes, bytes]
        ) -> bytes:
    """Return a PNG of these pixel data (a number: of zeros), with further chunks before them."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*pair) for pair in extra)
            + chunk(b"IDAT", zlib.compress(bytes(pixels), 1)) + chunk(b"IEND", b""))


def grey_tiff(values: list[int], bits: int, kind: int = 1, photometric: int = 1) -> bytes:
    """Return a TIFF of one line of greys of 8, 12, 16 or 32 bits; `kind`: 1 unsigned, 2 signed, 3 floats."""
    if bits == 12:
        digits = "".join(f"{value:03x}" for value in values)
        data = bytes.fromhex(digits + "0" * (len(digits) % 2))
    else:
        code = {(8, 1): "B", (16, 1): "H", (16, 2): "h", (32, 1): "I", (32, 2): "i", (32, 3): "f"}[bits, kind]
        data = struct.pack(f"<{len(values)}{code}", *values)
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, 1), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries
            + bytes(4))


# ---- a model that answers at once
class StandIn:
    """A subclass defines `reply(text)`; `asked` lists the requests of all instances since the last test."""

    identity, asked = {"model": "scripted"}, []

    def __init__(self, model_path, max_pixels, batch_size, batch_tokens):
        pass

    @classmethod
    def replace_backend(cls, monkeypatch):
        monkeypatch.setattr("utils.call_flags.LocalBackend", cls)
        cls.asked = []
        return cls

    def generate(self, requests, done=(), stop=None):
        for request in requests:
            if request.key not in done:
                self.asked.append(request)
                yield Reply(request.key, self.reply(request.text), "stop", 10, 5, 0.1)


def flags(path: Path, *more: str) -> list[str]:
    """Return the flags of a run over `path`, with images and output in the same folder."""
    return ["--input", str(path), "--image_root", str(path.parent), "--model", "m",
            "--output", str(path.parent / "out.jsonl"), *more]
