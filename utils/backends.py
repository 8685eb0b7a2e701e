"""Requests to a model, replies, and the backend that runs a checkpoint in this process.

Every backend has an `identity` and `generate(requests, done, stop)`. torch is imported with the model: a run
that only reads its journal needs none.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from utils.cli import log
from utils.images import ImageError, Picture, open_picture, visual_tokens
from utils.items import chat, plain
from utils.jsonl import find_checkpoint, model_identity

if TYPE_CHECKING:
    from utils.latent_families import LatentSpec

WINDOW = 2048  # requests among which batches are formed by length
OUT_OF_MEMORY = "out_of_memory"  # the error of a request that does not fit alone
DECODER = json.JSONDecoder(strict=False)  # servers let control characters pass inside strings
JSON_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


class Request(NamedTuple):
    """One model call: images before the text, at most `max_tokens` new tokens.

    messages: a conversation in place of system, text and images: (role, text) or (role, parts), each part a
    text or a Picture. schema, seed: for servers.
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

    @property
    def pictures(self) -> list[Picture]:
        return pictures_of(self.messages) if self.messages else [Picture(str(path)) for path in self.images]


def pictures_of(messages: tuple) -> list[Picture]:
    return [part for _, parts in messages if not isinstance(parts, str) for part in parts
            if isinstance(part, Picture)]


@dataclass(frozen=True)
class Reply:
    """What a backend returns for a request; `error` is why nothing came.

    seconds: of the local batch, or of the last try at a server. transient: the next run asks again. served:
    the model and fingerprint that a server names.
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

    def record(self) -> dict:
        return {name: getattr(self, name) for name in Reply.__dataclass_fields__}


@dataclass(frozen=True)
class LocalReply(Reply):
    """A reply of the local backend. raw_text: with latent positions and control tokens. image_grids: patches
    of each picture (frames, rows, columns). n_rows: of the batch."""

    raw_text: str = ""
    n_latent: int = 0
    image_grids: tuple[list[int], ...] = ()
    prefill_seconds: float = 0.0
    n_rows: int = 1


class Prepared(NamedTuple):
    """A batch: usable requests, their tensors, and replies to the others."""

    requests: list[Request]
    inputs: dict | None
    failed: list[Reply]


class ErrorRateError(RuntimeError):
    """Too many calls fail, or no server answers."""


class LocalBackend:
    """Decoding in this process, greedy or by `choose`(request) (see `Intervention.choose`), in left-padded
    batches of similar length, of at most `batch_size` requests and `batch_tokens` tokens, replies at full
    length. Batches depend on the list of requests alone: one that a kill left half done is computed again
    whole, so that its replies equal those of an uninterrupted run.
    """

    def __init__(self, model_path: str, max_pixels: int | None, batch_size: int, batch_tokens: int,
                 spec: LatentSpec | None = None, min_pixels: int | None = None, dtype: str = "auto",
                 choose: Callable[[Request], Callable] | None = None):
        self.folder, self.choose = find_checkpoint(model_path), choose
        self.identity = {"model": model_identity(self.folder), "decoding": "sampled" if choose else "greedy"}
        self.batch_size, self.batch_tokens, self.spec = batch_size, batch_tokens, spec
        self.load_options = dtype, min_pixels, max_pixels
        self.image_limits = max_pixels, 28 * 28, 28  # largest and least area, side of a visual token
        self.qwen = None

    def load(self) -> None:
        from utils.qwen import load_with
        self.qwen = load_with(self.spec, str(self.folder), *self.load_options)

    def generate(self, requests: Iterable[Request], done: Container[str] = (), stop: Event | None = None
                 ) -> Iterator[Reply]:
        """Yield replies to all requests whose key is not in `done` (and to others of their batches). Once
        `stop` is set, no further batch is begun."""
        requests = list(requests)
        for first in range(0, len(requests), WINDOW):
            window = requests[first:first + WINDOW]
            if all(request.key in done for request in window):
                continue  # without reading its images
            for batch in self.batches(window):
                if stop is not None and stop.is_set():
                    return
                if not all(request.key in done for request in batch):
                    yield from self.answer(batch)

    def batches(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Yield batches, the longest prompts first; out of memory shrinks those still to come."""
        sized = sorted(((self.length(request), request) for request in requests),
                       key=lambda pair: (pair[0], len(pair[1].text)), reverse=True)
        batch, longest = [], 0
        for length, request in sized:
            longest = max(longest, length + request.max_tokens)
            if len(batch) == self.batch_size or batch and (len(batch) + 1) * longest > self.batch_tokens:
                yield batch
                batch, longest = [], length + request.max_tokens
            batch.append(request)
        if batch:
            yield batch

    def length(self, request: Request) -> int:
        """Estimate a prompt's tokens: visual ones by image headers, and one per four characters."""
        turns = request.messages or [("user", request.text)]
        texts = [text for _, parts in turns for text in ([parts] if isinstance(parts, str) else parts)
                 if isinstance(text, str)]
        return sum(visual_tokens(picture.path, *self.image_limits)
                   for picture in request.pictures) + sum(map(len, texts)) // 4

    def prepare(self, batch: list[Request]) -> Prepared:
        from utils import qwen
        if self.qwen is None:
            self.load()
        ready, images, failed = [], [], []
        for request in batch:
            try:
                images.append([open_picture(picture) for picture in request.pictures])
                ready.append(request)
            except ImageError as error:
                failed.append(failure(request, error.reason))
        tokenizer = self.qwen.tokenizer
        prompts = [render(tokenizer, request.messages) if request.messages else
                   chat(tokenizer, request.text, len(request.images), request.system)
                   for request in ready]
        return Prepared(ready, qwen.encode(self.qwen, prompts, images) if ready else None, failed)

    def answer(self, batch: list[Request], prepared: Prepared | None = None) -> list[Reply]:
        """Return the replies to one batch; out of memory, split it, down to single requests."""
        import torch
        try:
            return self.compute(prepared or self.prepare(batch))
        except torch.OutOfMemoryError:
            pass  # the traceback here would keep the tensors alive
        del prepared
        torch.cuda.empty_cache()
        if len(batch) == 1:
            return [failure(batch[0], OUT_OF_MEMORY)]
        half = len(batch) // 2
        n_tokens = len(batch) * max(self.length(request) + request.max_tokens for request in batch)
        self.batch_tokens = max(1, min(self.batch_tokens, n_tokens // 2))
        log(f"out of memory with {len(batch)} requests in a batch, which is split; use --batch_tokens "
            f"{self.batch_tokens} or lower")
        return [*self.answer(batch[:half]), *self.answer(batch[half:])]

    def compute(self, prepared: Prepared) -> list[Reply]:
        import torch

        from utils.decode import decode, prefill
        from utils.latent_families import Intervention, clean_text
        requests, inputs, replies = prepared
        if not requests:
            return replies
        began, tokenizer = time.monotonic(), self.qwen.tokenizer
        state = prefill(self.qwen, inputs, self.spec)
        if state.hidden.is_cuda:
            torch.cuda.synchronize(state.hidden.device)
        prefill_seconds = round(time.monotonic() - began, 6)
        arms = [Intervention(choose=self.choose(request)) for request in requests] if self.choose else None
        rows = decode(self.qwen, state, max(request.max_tokens for request in requests), self.spec, arms)[0]
        seconds = round(time.monotonic() - began, 6)
        grids = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [])
        n_prompt = inputs["attention_mask"].sum(1).tolist()
        for request, row, n in zip(requests, rows, n_prompt, strict=True):
            ids = row.ids[:request.max_tokens]
            finish = "length" if len(row.ids) > request.max_tokens else row.finish
            replies.append(LocalReply(
                request.key, clean_text(tokenizer, ids, self.spec), finish, n, len(row.ids), seconds,
                raw_text=tokenizer.decode(ids), n_latent=sum(segment.size for segment in row.segments),
                image_grids=tuple(next(grids) for _ in request.pictures), prefill_seconds=prefill_seconds,
                n_rows=len(rows)))
        return replies


def failure(request: Request, error: str) -> Reply:
    return Reply(request.key, "", "error", 0, 0, 0.0, error)


def render(tokenizer, messages: tuple) -> str:
    turns = []
    for role, parts in messages:
        if isinstance(parts, str):
            parts = [plain(parts) if role == "assistant" else parts]
        turns.append({"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str)
                                                else {"type": "image"} for part in parts]})
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


# ---- JSON replies
def parse_json_reply(text: str) -> dict | None:
    """Return the last JSON object in a reply that UTF-8 can hold, whatever surrounds it."""
    place, last, escapes = text.find("{"), None, "\\u" in text
    while place >= 0:
        try:
            value, end = DECODER.raw_decode(text, place)
            if escapes:  # of half a surrogate pair, say
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            last = value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return last


def schema_fault(value: object, schema: dict, where: str = "the reply") -> str | None:
    """Return in words where `value` breaks a JSON schema of JSON_TYPES and enums."""
    kind, parts = schema["type"], []
    if type(value) is not JSON_TYPES[kind]:  # exact: a bool is not an integer
        return f"{where} should be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} should be one of {', '.join(schema['enum'])}, not {str(value)[:40]!r}"
    if kind == "string" and len(value) > schema.get("maxLength", len(value)):
        return f"{where} is too long: {len(value)} characters"
    if kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items, at most {schema['maxItems']} are allowed"
        parts = [(item, schema["items"], f"item {n} of {where}") for n, item in enumerate(value, 1)]
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} lacks {', '.join(missing)}"
        parts = [(value[name], part, repr(name)) for name, part in schema["properties"].items()]
    return next((fault for part in parts if (fault := schema_fault(*part))), None)
