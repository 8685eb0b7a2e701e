"""A stand-in for LocalBackend: it answers at once, by a rule from the text of a request."""
from pathlib import Path

from utils.backends import Reply


class StandIn:
    """`reply(text)` is the subclass's; `asked` are the requests made so far, those of all instances."""

    identity, asked = {"model": "scripted"}, []

    def __init__(self, model_path, max_pixels, batch_size, batch_tokens):
        pass

    def generate(self, requests, done=(), stop=None):
        for request in requests:
            if request.key not in done:
                self.asked.append(request)
                yield Reply(request.key, self.reply(request.text), "stop", 10, 5, 0.1)


def flags(path: Path, *more: str) -> list[str]:
    """Return the flags of a run over `path`, beside which images and output lie."""
    return ["--input", str(path), "--image_root", str(path.parent), "--output",
            str(path.parent / "out.jsonl"),
            "--model", "m", *more]
