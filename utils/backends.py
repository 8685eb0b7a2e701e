"""Requests to a model, replies, and the backend that runs a checkpoint in this process.

Every backend has an `identity` and `generate(requests, done, stop)`. torch is imported with the model: a run
that only reads its journal needs none.
"""
import json
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

from utils.cli import log
from utils.images import ImageError, Picture, open_picture, visual_tokens
from utils.items import chat, render
from utils.jsonl import find_checkpoint, model_identity
from utils.latent_families import Intervention, LatentSpec, clean_text

WINDOW = 2048  # requests among which batches are formed by length
OUT_OF_MEMORY = "out_of_memory"  # the error of a request that does not fit alone
FINISHED, FILTERED = ("stop", "length", "tool_calls"), "content_filter"  # how a reply ends, or is refused
TEXTLESS = {  # what a server may leave of a reply in place of text
    "reasoning": "reasoning only (raise --max_new_tokens, or serve without --reasoning-parser)",
    "tool_calls": "tool calls only (serve without --tool-call-parser)", "nothing": "nothing else"}
# a server's finish_reason -> one of these; any other is a lost call. OpenAI's; those of Anthropic, Together
# and TGI by BerriAI/litellm, litellm.litellm_core_utils.core_helpers._FINISH_REASON_MAP; Mistral's last
FINISH_REASONS = {
    **{name: name for name in (*FINISHED, FILTERED)}, "function_call": "tool_calls", "tool_use": "tool_calls",
    **dict.fromkeys(("end_turn", "stop_sequence", "eos", "eos_token"), "stop"), "max_tokens": "length",
    "refusal": FILTERED, "model_length": "length"}


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
    the model and fingerprint that a server names. reasoning, tool_calls: what it took out of the text.
    """

    key: str
    text: str
    finish_reason: str  # one of FINISHED, or "error"
    n_prompt: int  # tokens, the visual ones included
    n_new: int  # tokens
    seconds: float
    error: str | None = None
    attempts: int = 1
    transient: bool = False
    served: dict | None = None
    reasoning: str = ""
    tool_calls: str = ""

    def record(self) -> dict:
        return {name: getattr(self, name) for name in Reply.__dataclass_fields__}


@dataclass(frozen=True)
class LocalReply(Reply):
    """A reply of the local backend. raw_text: with latent positions and control tokens. image_grids: patches
    of each picture (frames, rows, columns). n_rows: of the batch at its start, so that seconds / n_rows add
    up to the time of all batches."""

    raw_text: str = ""
    n_latent: int = 0
    image_grids: tuple[list[int], ...] = ()
    prefill_seconds: float = 0.0
    n_rows: int = 1


def read_finish(reason: object) -> str | None:
    """Return one of FINISHED or FILTERED for a finish_reason, also {"type": it}; None for any other."""
    return FINISH_REASONS.get(str(reason.get("type") if isinstance(reason, dict) else reason).lower())


def lacks_text(record: dict) -> str | None:
    """Return what a reply without text has instead, a key of TEXTLESS; None with text or an error."""
    if record.get("error") or (record["text"] if "text" in record else record["clean_output"]).strip():
        return None
    return next((name for name in TEXTLESS if record.get(name)), "nothing")


def log_textless(counts: dict[str, int] | None) -> None:
    if counts:
        log("replies without text: " + ", ".join(f"{n} with {TEXTLESS[name]}" for name, n in counts.items()))


def write_calls(message: dict) -> str:
    """Return the tool calls that a server took out of a message, as the model wrote them."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    functions += [message["function_call"]] if message.get("function_call") else []
    calls = [(json.dumps(one["name"]), one["arguments"]) for one in functions]
    return "\n".join(f'<tool_call>\n{{"name": {name}, "arguments": '
                     f"{text if isinstance(text, str) else json.dumps(text)}}}\n</tool_call>"
                     for name, text in calls)


class Prepared(NamedTuple):
    """A batch: usable requests, their tensors, and replies to the others."""

    requests: list[Request]
    inputs: dict | None
    failed: list[Reply]


class LocalBackend:
    """Decoding in this process, greedy or by `choose`(request) (see `Intervention.choose`), in left-padded
    batches of similar length, of at most `batch_size` requests and `batch_tokens` tokens, replies at full
    length. A row that has ended leaves its batch. Batches depend on the list of requests alone: one that a
    kill left half done is computed again whole, so that its replies equal those of an uninterrupted run.
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
        turns = request.messages or [("system", request.system or ""), ("user", request.text)]
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
                failed.append(Reply(request.key, "", "error", 0, 0, 0.0, error.reason))
        tokenizer = self.qwen.tokenizer
        prompts = [render(tokenizer, request.messages) if request.messages else
                   chat(tokenizer, request.text, len(request.images), request.system) for request in ready]
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
            return [Reply(batch[0].key, "", "error", 0, 0, 0.0, OUT_OF_MEMORY)]
        half = len(batch) // 2
        n_tokens = len(batch) * max(self.length(request) + request.max_tokens for request in batch)
        self.batch_tokens = max(1, min(self.batch_tokens, n_tokens // 2))
        log(f"out of memory with {len(batch)} requests in a batch, which is split; use --batch_tokens "
            f"{self.batch_tokens} or lower")
        return [*self.answer(batch[:half]), *self.answer(batch[half:])]

    def compute(self, prepared: Prepared) -> list[Reply]:
        import torch

        from utils.decode import decode, prefill
        requests, inputs, replies = prepared
        if not requests:
            return replies
        began, tokenizer = time.monotonic(), self.qwen.tokenizer
        state = prefill(self.qwen, inputs)
        if state.hidden.is_cuda:
            torch.cuda.synchronize(state.hidden.device)
        prefill_seconds = round(time.monotonic() - began, 6)
        arms = [Intervention(choose=self.choose(request)) for request in requests] if self.choose else None
        limits = [request.max_tokens for request in requests]
        rows = decode(self.qwen, state, max(limits), self.spec, arms, limits=limits)[0]
        seconds = round(time.monotonic() - began, 6)
        grids = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [])
        n_prompt = inputs["attention_mask"].sum(1).tolist()
        for request, row, n in zip(requests, rows, n_prompt, strict=True):
            replies.append(LocalReply(
                request.key, clean_text(tokenizer, row.ids, self.spec), row.finish, n, len(row.ids), seconds,
                raw_text=tokenizer.decode(row.ids), n_latent=sum(segment.size for segment in row.segments),
                image_grids=tuple(next(grids) for _ in request.pictures), prefill_seconds=prefill_seconds,
                n_rows=len(rows)))
        return replies


