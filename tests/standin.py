"""A stand-in for LocalBackend that answers at once, by a rule from the text of a request."""
from pathlib import Path

from utils.backends import Reply


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
