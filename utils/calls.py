"""Model calls of stages 1 and 2: prompts, a journal, replies that are checked.

`ask` runs calls through a journal and a backend and returns one outcome a call: a checked JSON object, or a fault with a
closed reason. Nothing here decides what a reply means.
"""
import argparse
import json
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from utils.backends import LocalBackend, Request
from utils.rows import DataError, Journal, call_key, log, rank_world

ERROR_REASONS = ("cut_off", "bad_json", "bad_schema", "backend_error")  # the model failed; never a rule's rejection
GUARD_FIRST, GUARD_WINDOW, GUARD_SHARE = 20, 500, 0.2  # stop: the first 20 calls all failed, or 20 % of the last 500


@dataclass(frozen=True)
class Call:
    """One question to the model on behalf of a sample; `hashes` are the sha256 of its images' bytes."""

    id: str
    kind: str
    step: int
    text: str
    images: tuple[Path, ...]
    hashes: tuple[str, ...]
    schema: dict


@dataclass(frozen=True)
class Outcome:
    """A checked reply, or the closed `reason` why there is none and a `detail` in words."""

    value: dict | None
    reason: str | None = None
    detail: str = ""


class ErrorRateError(RuntimeError):
    """Too many calls failed for the run to be worth going on."""


class IncompleteError(RuntimeError):
    """A call is in no rank's journal yet."""


# ------------------------------------------------------------------------------------------------ prompts and replies
def load_prompts(path: str | None, prompts: dict[str, str]) -> dict[str, str]:
    """Return `prompts` with those named in the JSON object at `path` replaced; DataError for an unknown name."""
    if path is None:
        return dict(prompts)
    try:
        changes = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no JSON object of prompts ({error})") from error
    if not isinstance(changes, dict) or not all(isinstance(text, str) for text in changes.values()):
        raise DataError(f"{path}: expected one JSON object of strings")
    if unknown := sorted(set(changes) - set(prompts)):
        raise DataError(f"{path}: no prompt is called {', '.join(unknown)}; expected {', '.join(prompts)}")
    return prompts | changes


def fill(template: str, **values: str) -> str:
    """Put values at their {names}, in one pass: braces in a value are text; `<image>` in a value becomes (image)."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]].replace("<image>", "(image)"), template)


def parse_json_reply(text: str) -> dict | None:
    """Return the last JSON object in a reply, whatever stands around it; None if there is none that UTF-8 can hold."""
    decoder, place, found = json.JSONDecoder(strict=False), text.find("{"), None
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
            found = value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def schema_fault(value: object, schema: dict, where: str = "the reply") -> str | None:
    """Return in words where `value` breaks a JSON schema (object, array, string, enum, integer, boolean), or None."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema["type"]
    if not isinstance(value, kinds[kind]) or isinstance(value, bool) and kind != "boolean":
        return f"{where} should be of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} should be one of {', '.join(schema['enum'])}, not {str(value)[:40]!r}"
    if kind == "string" and len(value) > schema.get("maxLength", len(value)):
        return f"{where} is too long: {len(value)} characters"
    if kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items, at most {schema['maxItems']} are allowed"
        faults = (schema_fault(item, schema["items"], f"item {n} of {where}") for n, item in enumerate(value, 1))
        return next(filter(None, faults), None)
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} lacks {', '.join(missing)}"
        faults = (schema_fault(value[name], part, repr(name)) for name, part in schema["properties"].items())
        return next(filter(None, faults), None)
    return None


def object_schema(**properties: dict) -> dict:
    """Return the schema of an object whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


# ------------------------------------------------------------------------------------------------ running calls
@dataclass
class Caller:
    """What every call of a run shares; counts what was done. `backend` None asks the journal alone.

    `identity` goes into every key: a journal answers only for the model, prompts and sampling that wrote it.
    """

    journal: Journal
    backend: "LocalBackend | None"
    identity: dict
    system: str
    retry_prompt: str
    max_new_tokens: int
    guarded: bool = True
    retry_errors: bool = False
    n_calls: int = 0
    n_reused: int = 0
    n_new_tokens: int = 0
    wall_s: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def request(self, call: Call, attempt: int, detail: str = "") -> Request:
        """Return the request of a call; a second attempt ends with the fault of the first in words."""
        text = call.text if attempt == 0 else call.text + "\n" + fill(self.retry_prompt, fault=detail)
        key = call_key(kind=call.kind, system=self.system, text=text, images=call.hashes, schema=call.schema,
                       attempt=attempt, max_new_tokens=self.max_new_tokens, decoding="greedy", **self.identity)
        return Request(key, self.system or None, text, call.images, self.max_new_tokens, call.schema)

    def stats(self) -> dict:
        """Return the counters under the names of the metrics file; seconds are those of the batch a call was in."""
        p50, p95 = (round(q, 3) for q in quantiles(self.seconds)) if self.seconds else (None, None)
        speed = round(self.n_new_tokens / self.wall_s, 1) if self.wall_s else None
        return {"n_calls": self.n_calls, "n_reused": self.n_reused, "p50_batch_s": p50, "p95_batch_s": p95,
                "tokens_per_s": speed}


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile."""
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return cuts[9], cuts[18]


def read_outcome(record: dict, schema: dict, check: Callable[[dict], tuple[str, str] | None]) -> Outcome:
    """Judge a journal record: error, length, JSON, schema, then `check(value)` -> (reason, detail) or None."""
    if record["error"]:
        return Outcome(None, "backend_error", record["error"])
    if record["finish_reason"] == "length":
        return Outcome(None, "cut_off", f"it was cut off after {record['n_new']} tokens; be shorter")
    value = parse_json_reply(record["text"])
    if value is None:
        return Outcome(None, "bad_json", "it was not one JSON object")
    if fault := schema_fault(value, schema):
        return Outcome(None, "bad_schema", fault)
    fault = check(value)
    return Outcome(None, *fault) if fault else Outcome(value)


def ask(caller: Caller, calls: list[Call], check: Callable[[Call, dict], tuple[str, str] | None], desc: str,
        guarded: bool = True) -> list[Outcome]:
    """Return one outcome a call, in order: journal first, then the model; a faulty reply is asked again once.

    `check(call, value)` returns (closed reason, the fault in words) for a reply that is valid JSON but not acceptable.
    Raises ErrorRateError if the guard trips, IncompleteError without a backend if a record is missing.
    """
    if caller.retry_errors:
        forget_errors(caller, calls, check)
    outcomes: dict[int, Outcome] = {}
    pending = list(range(len(calls)))
    for attempt in (0, 1):
        requests = {i: caller.request(calls[i], attempt, outcomes[i].detail if attempt else "") for i in pending}
        guard = Guard(caller.guarded and guarded and attempt == 0)
        owners = {request.key: calls[i] for i, request in requests.items()}

        def failed(record: dict) -> bool:
            call = owners[record["key"]]
            return read_outcome(record, call.schema, lambda value: check(call, value)).reason in ERROR_REASONS

        again = f"{desc}, again" if attempt else desc
        run_requests(caller, list(requests.values()), owners, attempt, again, guard, failed)
        for i, request in requests.items():
            record = caller.journal.get(request.key)
            outcomes[i] = read_outcome(record, calls[i].schema, lambda value: check(calls[i], value))
        pending = [i for i in pending if outcomes[i].value is None and outcomes[i].reason != "backend_error"]
    return [outcomes[i] for i in range(len(calls))]


def forget_errors(caller: Caller, calls: list[Call], check: Callable) -> None:
    """Drop from memory the records of calls that ended as an error, so that they are made again."""
    for call in calls:
        detail, keys = "", []
        for attempt in (0, 1):
            record = caller.journal.get(caller.request(call, attempt, detail).key)
            if record is None:
                break
            keys.append(record["key"])
            outcome = read_outcome(record, call.schema, lambda value: check(call, value))
            detail = outcome.detail
            if outcome.reason not in ERROR_REASONS:
                keys = []
                break
        for key in keys:
            caller.journal.forget(key)


class Guard:
    """Stops a run whose calls fail: counted over the new calls of one phase."""

    def __init__(self, on: bool):
        self.on, self.n, self.n_failed, self.last = on, 0, 0, deque(maxlen=GUARD_WINDOW)

    def count(self, failed: bool) -> None:
        """Count a call; raise ErrorRateError if GUARD_FIRST all failed, or GUARD_SHARE of the last GUARD_WINDOW."""
        self.n, self.n_failed = self.n + 1, self.n_failed + failed
        self.last.append(failed)
        all_failed = self.n_failed == self.n >= GUARD_FIRST
        if self.on and (all_failed or self.n >= GUARD_WINDOW and sum(self.last) > GUARD_SHARE * GUARD_WINDOW):
            raise ErrorRateError(f"{sum(self.last)} of the last {len(self.last)} calls failed; look at the replies in "
                                 "the journal, mend model or prompts, or use --no_guard for a model known to be weak")


def run_requests(caller: Caller, requests: list[Request], owners: dict[str, Call], attempt: int, desc: str,
                 guard: Guard, failed: Callable[[dict], bool]) -> None:
    """Make the calls that the journal lacks and append one record each; equal calls are made once."""
    unique = list({request.key: request for request in requests}.values())
    n_done = sum(request.key in caller.journal for request in unique)
    caller.n_reused += n_done
    if n_done == len(unique):
        return
    if caller.backend is None:
        raise IncompleteError(f"{len(unique) - n_done} calls are missing")
    began, n_errors = time.monotonic(), 0
    with tqdm(total=len(unique), initial=n_done, desc=desc, unit="call", disable=rank_world()[0] != 0) as bar:
        for reply in caller.backend.generate(unique, caller.journal):
            if reply.key in caller.journal:  # made again only to keep its batch as it was
                continue
            call = owners[reply.key]
            record = {"id": call.id, "kind": call.kind, "step": call.step, "attempt": attempt, **asdict(reply),
                      "time": round(time.time(), 3)}
            caller.journal.append(record)
            bad = failed(record)
            n_errors += bad
            caller.n_calls, caller.n_new_tokens = caller.n_calls + 1, caller.n_new_tokens + reply.n_new
            caller.seconds.append(reply.seconds)
            speed = caller.n_new_tokens / (caller.wall_s + time.monotonic() - began)
            bar.set_postfix_str(f"{n_errors} errors, {n_done} reused, {speed:.0f} tok/s", refresh=False)
            bar.update()
            guard.count(bad)
    caller.wall_s += time.monotonic() - began


# ------------------------------------------------------------------------------------------------ a stage's run
def add_call_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the flags that every stage with model calls has."""
    parser.add_argument("--output", required=True, help="JSONL to write; <output>.run/ beside it holds the journal")
    parser.add_argument("--image_root", required=True, help="folder that image paths are relative to and may not leave")
    parser.add_argument("--backend", choices=("local",), default="local", help="local: transformers, in this process")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-4B-Instruct", help="folder or hub name (the paper's)")
    parser.add_argument("--batch_size", type=int, default=16, help="calls a batch; free to change between restarts")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="a reply; more is cut_off")
    parser.add_argument("--max_pixels", type=int, default=1280 * 28 * 28, help="area to which an image is shrunk")
    parser.add_argument("--prompts", help="JSON object of prompts by name, in place of those of this script")
    parser.add_argument("--limit", type=int, help="only the first N samples; their calls are reused by a longer run")
    parser.add_argument("--dry_run", action="store_true", help="show prompts and count calls; writes nothing")
    parser.add_argument("--retry_errors", action="store_true", help="ask again where the model failed before")
    parser.add_argument("--fresh", action="store_true", help="move an earlier <output>.run aside and begin anew")
    parser.add_argument("--no_guard", action="store_true", help="go on however many calls fail (a weak model)")


@contextmanager
def open_run(args: argparse.Namespace, prompts: dict[str, str], **settings) -> Iterator[Caller]:
    """Open the journal in `<output>.run` and yield the caller; `settings` are those that change the result."""
    folder, (_, world, _) = Path(f"{args.output}.run"), rank_world()
    if args.fresh and folder.exists():
        if world > 1:
            raise DataError(f"--fresh with {world} processes: move {folder} aside by hand, they would race for it")
        n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old-{n}"))
    backend = {"local": LocalBackend}[args.backend](args.model, args.max_pixels, args.batch_size)
    identity = {"backend": args.backend, "model": backend.identity, "max_pixels": args.max_pixels}
    settings |= {**identity, "prompts": call_key(**prompts), "max_new_tokens": args.max_new_tokens,
                 "decoding": "greedy"}
    with Journal(folder, settings) as journal:
        yield Caller(journal, backend, identity, prompts["SYSTEM"], prompts["RETRY"], args.max_new_tokens,
                     guarded=not args.no_guard, retry_errors=args.retry_errors)


def show_calls(calls: list[Call], system: str) -> dict[str, int]:
    """Show one whole prompt of each kind on stderr and return the number of calls by kind (--dry_run)."""
    for kind in dict.fromkeys(call.kind for call in calls):
        call = next(call for call in calls if call.kind == kind)
        pictures = "".join(f"[image {path}]\n" for path in call.images)
        log(f"--- {kind}, sample {call.id}\nsystem: {system}\nuser: {pictures}{call.text}\n---")
    return dict(Counter(call.kind for call in calls))
