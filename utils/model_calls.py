"""Model calls of stages 1 and 2: through a journal and a backend to checked replies, with a guard and clean
stops.

`ask` runs calls through a journal and a backend and returns one outcome a call: a checked JSON object, or a
fault with a closed reason. Nothing here decides what a reply means.

Prompts and replies as text: fill a template, find the JSON object in a reply, hold it against a schema.
"""
import json
import re
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.backends import ErrorRateError, Request
from utils.cli import rank_world, stop_on_signals
from utils.journal import Journal
from utils.jsonl import DataError, call_key

# the model failed; never a rule's rejection
ERROR_REASONS = ("cut_off", "bad_json", "bad_schema", "backend_error")
# stop: the first 20 calls all failed, or 20 % of the last 500
GUARD_FIRST, GUARD_WINDOW, GUARD_SHARE = 20, 500, 0.2


class Call(NamedTuple):
    """One question to the model on behalf of a sample; `hashes` are the sha256 of its images' bytes."""

    id: str
    kind: str
    step: int
    text: str
    images: tuple[str, ...]
    hashes: tuple[str, ...]
    schema: dict


class Outcome(NamedTuple):
    """A checked reply, or the closed `reason` why there is none and a `detail` in words."""

    value: dict | None
    reason: str | None = None
    detail: str = ""


def is_reply(record: dict) -> bool:
    """Return whether a record of the journal has the fields of a Reply that are read here, of their types."""
    return (type(record["key"]) is type(record["text"]) is type(record["finish_reason"]) is str
            and type(record["n_prompt"]) is type(record["n_new"]) is int
            and type(record["seconds"]) in (int, float)
            and type(record["error"]) in (str, type(None)))


class IncompleteError(RuntimeError):
    """Calls are in no shard's journal yet, and this process makes none."""


# ---------------------------------------------------------------------------------------------- running calls
@dataclass
class Caller:
    """What every call of a run shares; counts what was done. `backend` None asks the journal alone.

    `identity` (model, sampling, schemas) goes into every key: a journal answers only for what wrote it.
    `images` is the journal of the images that were looked at (utils.row_rules.check_rows).
    """

    journal: Journal
    images: Journal | None
    backend: object
    identity: dict
    prompts: dict[str, str]
    max_new_tokens: int
    shard: tuple[int, int] = (0, 1)
    guarded: bool = True
    retry_errors: bool = False
    n_calls: int = 0
    n_reused: int = 0
    n_new_tokens: int = 0
    wall_s: float = 0.0
    # key -> seconds, tokens in, tokens out, JSON as asked or None
    used: dict[str, tuple] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.common = call_key(system=self.prompts["SYSTEM"], **self.identity)  # of all keys: hashed once

    def request(self, call: Call, attempt: int, before: Outcome | None = None) -> Request:
        """Return the request of a call; a second attempt ends with the fault of the first, and has room if
        cut off."""
        text, room = call.text, self.max_new_tokens
        if before is not None:
            text += "\n" + fill(self.prompts["RETRY"], fault=before.detail)
            room *= 2 if before.reason == "cut_off" else 1
        key = call_key(common=self.common, kind=call.kind, text=text, images=call.hashes, attempt=attempt,
                       max_new_tokens=room)
        return Request(key, self.prompts["SYSTEM"] or None, text, call.images, room, call.schema)

    def outcome(self, request: Request, call: Call, attempt: int, check: Callable) -> Outcome:
        """Return what the journal holds for a request, and count it among what this run is made of."""
        record = self.journal.get(request.key)
        outcome = read_outcome(record, call, check)
        whole = outcome.reason not in ("cut_off", "backend_error")
        as_asked = outcome.reason not in ("bad_json", "bad_schema") if whole and attempt == 0 else None
        self.used[request.key] = record["seconds"], record["n_prompt"], record["n_new"], as_asked
        return outcome

    def read_all_shards(self) -> None:
        """Go on without calls of its own, with what every shard has written."""
        self.backend, self.retry_errors = None, False
        self.journal.reload()
        self.images.reload()

    def stats(self) -> dict:
        """Return the counters under the names of the metrics file.

        n_calls, wall_s and the speeds are of this process and run, the rest of all calls that the output is
        made of. `p50_s`, `p95_s`: seconds of a call at a server, or of its batch. `json_as_asked`: the share
        of whole first replies that keep the schema, 1 from a server that enforces it.
        """
        seconds, n_prompt, n_new, as_asked = zip(*self.used.values()) if self.used else ((),) * 4
        first = [kept for kept in as_asked if kept is not None]
        p50, p95 = (round(q, 3) for q in quantiles(list(seconds))) if seconds else (None, None)
        return {"n_calls": self.n_calls, "n_reused": self.n_reused,
                "n_orphaned": sum(key not in self.used for key in self.journal),
                "n_prompt_tokens": sum(n_prompt), "n_new_tokens": sum(n_new), "p50_s": p50, "p95_s": p95,
                "json_as_asked": round(sum(first) / len(first), 4) if first else None,
                "wall_s": round(self.wall_s, 1),
                "calls_per_s": round(self.n_calls / self.wall_s, 2) if self.wall_s else None,
                "tokens_per_s": round(self.n_new_tokens / self.wall_s, 1) if self.wall_s else None}


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile."""
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return cuts[9], cuts[18]


def read_outcome(record: dict, call: Call, check: Callable[[Call, dict], tuple[str, str] | None]) -> Outcome:
    """Judge a journal record: error, length, JSON, schema, then `check(call, value)` -> (reason, detail) or
    None."""
    if record["error"]:
        return Outcome(None, "backend_error", record["error"])
    if record["finish_reason"] == "length":
        return Outcome(None, "cut_off", f"it was cut off after {record['n_new']} tokens; be shorter")
    value = parse_json_reply(record["text"])
    if value is None:
        return Outcome(None, "bad_json", "it was not one JSON object")
    if fault := schema_fault(value, call.schema):
        return Outcome(None, "bad_schema", fault)
    fault = check(call, value)
    return Outcome(None, *fault) if fault else Outcome(value)


def ask(caller: Caller, calls: list[Call], check: Callable[[Call, dict], tuple[str, str] | None], desc: str,
        guarded: bool = True, retries: int = 1) -> list[Outcome]:
    """Return one outcome a call, in order: journal first, then the model; a faulty reply is asked again
    `retries` times.

    `check(call, value)` returns (closed reason, the fault in words) for a reply that is valid JSON but not
    acceptable. Raises ErrorRateError if the guard trips or no server answers, IncompleteError without a
    backend if a record is missing, KeyboardInterrupt after a signal; all that came until then is in the
    journal.
    """
    if caller.retry_errors:
        forget_errors(caller, calls, check, retries)
    outcomes: dict[int, Outcome] = {}
    pending = list(range(len(calls)))
    for attempt in range(1 + retries):
        requests = {i: caller.request(calls[i], attempt, outcomes.get(i)) for i in pending}
        owners = {request.key: calls[i] for i, request in requests.items()}
        guard = Guard(caller.guarded and guarded and attempt == 0)

        def failed(record: dict) -> bool:
            return read_outcome(record, owners[record["key"]], check).reason in ERROR_REASONS

        run_requests(caller, list(requests.values()), owners, attempt, f"{desc}, again" if attempt else desc,
                     guard, failed)
        for i, request in requests.items():
            outcomes[i] = caller.outcome(request, calls[i], attempt, check)
        pending = [i for i in pending if outcomes[i].value is None and outcomes[i].reason != "backend_error"]
    return [outcomes[i] for i in range(len(calls))]


def forget_errors(caller: Caller, calls: list[Call], check: Callable, retries: int) -> None:
    """Drop from memory the records of calls that ended as an error, so that they are made again."""
    for call in calls:
        outcome, keys = None, []
        for attempt in range(1 + retries):
            record = caller.journal.get(caller.request(call, attempt, outcome).key)
            if record is None:
                break
            keys.append(record["key"])
            outcome = read_outcome(record, call, check)
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
        """Count a call; raise ErrorRateError if GUARD_FIRST all failed, or GUARD_SHARE of the last
        GUARD_WINDOW."""
        self.n, self.n_failed = self.n + 1, self.n_failed + failed
        self.last.append(failed)
        all_failed = self.n_failed == self.n >= GUARD_FIRST
        if self.on and (all_failed or self.n >= GUARD_WINDOW and sum(self.last) > GUARD_SHARE * GUARD_WINDOW):
            raise ErrorRateError(
                f"{sum(self.last)} of the last {len(self.last)} calls failed; look at the replies in "
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
        raise IncompleteError(f"{len(unique) - n_done:,} calls are missing")
    began, n_errors, prompts = time.monotonic(), 0, call_key(**caller.prompts)[:16]
    with (stop_on_signals() as stop,
          tqdm(total=len(unique), initial=n_done, desc=desc, unit="call",
               disable=rank_world()[0] != 0) as bar):
        for reply in caller.backend.generate(unique, caller.journal, stop):
            if reply.key in caller.journal:  # made again only to keep its batch as it was
                continue
            call = owners[reply.key]
            record = asdict(reply) | {"id": call.id, "kind": call.kind, "step": call.step, "attempt": attempt,
                                      "prompts": prompts, "time": round(time.time(), 3)}
            caller.journal.append(record)
            bad = failed(record)
            n_errors += bad
            caller.n_calls, caller.n_new_tokens = caller.n_calls + 1, caller.n_new_tokens + reply.n_new
            speed = caller.n_new_tokens / (caller.wall_s + time.monotonic() - began)
            bar.set_postfix_str(f"{n_errors} errors, {n_done} reused, {speed:.0f} tok/s", refresh=False)
            bar.update()
            guard.count(bad)
    caller.wall_s += time.monotonic() - began
    # only a signal ends the backend's work early
    if not all(request.key in caller.journal for request in unique):
        raise KeyboardInterrupt


# ------------------------------------------------------------ replies


DECODER = json.JSONDecoder(strict=False)  # servers let control characters pass inside strings
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
MARKER = re.compile(r"<\|([^|<>\s]*)\|>|<(image)>")


def load_prompts(path: str | None, prompts: dict[str, str]) -> dict[str, str]:
    """Return `prompts` with those named in the JSON object at `path` replaced; DataError for an unknown name.
    """
    if path is None:
        return dict(prompts)
    try:
        changes = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        json.dumps(changes, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON object of prompts ({error})") from error
    if not isinstance(changes, dict) or not all(isinstance(text, str) for text in changes.values()):
        raise DataError(f"{path}: expected one JSON object of strings")
    if unknown := sorted(set(changes) - set(prompts)):
        raise DataError(f"{path}: no prompt is called {', '.join(unknown)}; expected {', '.join(prompts)}")
    return prompts | changes


def fill(template: str, **values: str) -> str:
    """Put values at their {names}, in one pass: braces in a value are text.

    So are markers: `<image>` becomes (image) and `<|im_end|>` (im_end), which a server's tokenizer would else
    take for a picture or the end of a turn.
    """
    return names_in_braces(tuple(values)).sub(lambda match: MARKER.sub(r"(\1\2)", values[match[1]]), template)


@cache
def names_in_braces(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\{{({'|'.join(map(re.escape, names))})\}}")


def parse_json_reply(text: str) -> dict | None:
    """Return the last JSON object in a reply, whatever stands around it; None if there is none that UTF-8 can
    hold."""
    place, found, escapes = text.find("{"), None, "\\u" in text
    while place >= 0:
        try:
            value, end = DECODER.raw_decode(text, place)
            if escapes:  # they may stand for half a character
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            found = value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def schema_fault(value: object, schema: dict, where: str = "the reply") -> str | None:
    """Return in words where `value` breaks a JSON schema (object, array, string, enum, integer, boolean), or
    None."""
    kind = schema["type"]
    if type(value) is not KINDS[kind]:  # exact: JSON knows no subclasses, and a bool is no integer
        return f"{where} should be of type {kind}"
    if kind == "string" and "enum" not in schema and len(value) <= schema.get("maxLength", len(value)):
        return None
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} should be one of {', '.join(schema['enum'])}, not {str(value)[:40]!r}"
    if kind == "string" and len(value) > schema.get("maxLength", len(value)):
        return f"{where} is too long: {len(value)} characters"
    if kind == "array":
        if len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items, at most {schema['maxItems']} are allowed"
        for n, item in enumerate(value, 1):
            if fault := schema_fault(item, schema["items"], f"item {n} of {where}"):
                return fault
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{where} lacks {', '.join(missing)}"
        for name, part in schema["properties"].items():
            if fault := schema_fault(value[name], part, repr(name)):
                return fault
    return None


def object_schema(**properties: dict) -> dict:
    """Return the schema of an object whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}
