"""One `generate(requests)` for every source of replies; here the local one, transformers in this process.

The other one is utils.openai_backend. torch is imported when the model is first needed: a run that only reads
its journal, or asks a server, starts without it.
"""
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

from utils.cli import log
from utils.images import ImageError, open_image, visual_tokens
from utils.jsonl import find_checkpoint, model_identity

WINDOW = 2048  # requests among which batches are formed by length


class Request(NamedTuple):
    """One model call: images before the text, at most `max_tokens` new tokens; `schema` and the seed are for
    servers.

    So is `messages`, a whole conversation in place of system, text and images: (role, text) or (role, parts),
    each part a text or a utils.images.Picture. The seed comes from the key, so that it depends neither on the
    order of the calls nor on a restart.
    """

    key: str
    system: str | None
    text: str
    images: tuple[str, ...]
    max_tokens: int
    schema: dict | None = None
    messages: tuple | None = None

    @property
    def seed(self) -> int:
        return int(self.key[:8], 16) >> 1  # 31 bits


@dataclass(frozen=True)
class Reply:
    """What a backend returns for a request; `error` says why nothing came.

    `seconds` is the wall time of the local batch or of the last try at a server, waiting left out. A
    `transient` error lay with the server, and the next run asks again. `served` is the model and fingerprint
    that a server names.
    """

    key: str
    text: str
    finish_reason: str  # "stop", "length" or "error"
    n_prompt: int  # tokens, the visual ones included
    n_new: int  # tokens
    seconds: float
    error: str | None = None
    attempts: int = 1
    transient: bool = False
    served: dict | None = None


class ErrorRateError(RuntimeError):
    """Too many calls fail, or no server answers: the run is not worth going on."""


class LocalBackend:
    """Greedy decoding with transformers in this process, in static left-padded batches of similar length.

    A batch holds at most `batch_size` requests and, prompts padded and replies at full length, `batch_tokens`
    tokens. The batches depend on the whole list of requests and never on what is done already: a batch that a
    kill left half done is computed again whole, so that its replies are those of an uninterrupted run to the
    last bit.
    """

    def __init__(self, model_path: str, max_pixels: int, batch_size: int, batch_tokens: int):
        self.folder = find_checkpoint(model_path)
        self.identity = {"model": model_identity(self.folder), "decoding": "greedy"}
        self.max_pixels, self.batch_size, self.batch_tokens = max_pixels, batch_size, batch_tokens
        self.qwen = None

    def load(self) -> None:
        """Load the checkpoint, on this rank's GPU if there is one."""
        from utils import qwen  # here: a run that only reads its journal needs no torch
        self.qwen = qwen.load(str(self.folder), max_pixels=self.max_pixels)

    def generate(self, requests: Iterable[Request], done: Container[str] = (), stop: Event | None = None
                 ) -> Iterator[Reply]:
        """Yield a reply for every request whose key is not in `done` (and for the others of its batch).

        Once `stop` is set, no further batch is begun.
        """
        requests = list(requests)
        for first in range(0, len(requests), WINDOW):
            window = requests[first:first + WINDOW]
            if all(request.key in done for request in window):
                continue  # without a look at its images
            for batch in self.batches(window):
                if stop is not None and stop.is_set():
                    return
                if not all(request.key in done for request in batch):
                    yield from self.answer(batch)

    def batches(self, window: list[Request]) -> Iterator[list[Request]]:
        """Yield the requests in batches, the longest prompts first."""
        order = sorted(((self.length(r), r) for r in window), key=lambda pair: pair[0], reverse=True)
        yield from fill_batches([(length[0] + r.max_tokens, r) for length, r in order], self)

    def length(self, request: Request) -> tuple[int, int]:
        """Return about how long a prompt is: tokens, visual ones from the headers and a quarter of the
        characters."""
        n_visual = sum(visual_tokens(path, self.max_pixels) for path in request.images)
        return n_visual + len(request.text) // 4, len(request.text)

    def answer(self, batch: list[Request]) -> list[Reply]:
        """Return the replies to one batch; out of memory, it is split in two, down to single requests."""
        import torch

        from utils import decode, qwen
        if self.qwen is None:
            self.load()
        began, replies, opened = time.monotonic(), [], []
        for request in batch:
            try:
                opened.append((request, [open_image(path) for path in request.images]))
            except ImageError as error:
                replies.append(Reply(request.key, "", "error", 0, 0, 0.0, error.reason))
        if not opened:
            return replies
        ready, images = zip(*opened)
        prompts = [qwen.chat(self.qwen.tokenizer, r.text, len(r.images), r.system) for r in ready]
        try:
            inputs = qwen.encode(self.qwen, prompts, list(images))
            rows = decode.generate(self.qwen, inputs, max(request.max_tokens for request in ready))
        except torch.OutOfMemoryError:
            rows = None
        if rows is None:  # out of the handler, whose traceback would keep the tensors alive
            torch.cuda.empty_cache()
            if len(ready) == 1:
                return [*replies, Reply(ready[0].key, "", "error", 0, 0, 0.0, "out_of_memory")]
            half = len(ready) // 2
            n_tokens = len(ready) * max(self.length(request)[0] + request.max_tokens for request in ready)
            self.batch_tokens = max(1, min(self.batch_tokens, n_tokens // 2))
            log(f"out of memory with {len(ready)} requests in a batch; splitting it, and from now on at most "
                f"{self.batch_tokens:,} tokens a batch")
            return [*replies, *self.answer(list(ready[:half])), *self.answer(list(ready[half:]))]
        seconds = round(time.monotonic() - began, 3)
        for request, row, mask in zip(ready, rows, inputs["attention_mask"]):
            finish = "length" if len(row.ids) > request.max_tokens else row.finish
            text = decode.clean_text(self.qwen.tokenizer, row.ids[:request.max_tokens])
            replies.append(Reply(request.key, text, finish, int(mask.sum()), len(row.ids), seconds))
        return replies


def fill_batches(sized: Iterable[tuple[int, object]], limits: object) -> Iterator[list]:
    """Yield things, each with its tokens, in their order: at most `limits.batch_size` and, padded to the
    longest, `limits.batch_tokens` a batch, which may have been lowered since the last one."""
    batch, longest = [], 0
    for n_tokens, one in sized:
        longest = max(longest, n_tokens)
        if len(batch) == limits.batch_size or batch and (len(batch) + 1) * longest > limits.batch_tokens:
            yield batch
            batch, longest = [], n_tokens
        batch.append(one)
    if batch:
        yield batch
