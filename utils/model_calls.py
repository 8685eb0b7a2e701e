"""Model calls with a journal: checked replies, a second try after a fault, a guard against a failing model.

`ask` returns one outcome per call: a checked JSON object, or a fault with a closed reason.
"""
import re
import statistics
import time
from collections import Counter, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from utils.backends import FINISHED, Request, lacks_text
from utils.cli import ErrorRateError, rank_world, stop_on_signals
from utils.journal import Journal
from utils.jsonl import call_key, check_fields
from utils.reply_text import parse_json_reply, schema_fault

RETRY = "Your last reply could not be used: {fault}. Reply again, with the JSON object only."
# the model failed, not a stage's own rule
ERROR_REASONS = ("cut_off", "bad_json", "bad_schema", "backend_error")
REPLY_FIELDS = {"key": str, "text": str, "finish_reason": object, "n_prompt": int, "n_new": int,
                "seconds": (int, float), "error": (str, type(None))}
GUARD_FIRST, GUARD_WINDOW, GUARD_SHARE = 20, 500, 0.2
MARKER = re.compile(r"<\|([^|<>\s]*)\|>|<(image)>")  # what a tokenizer may take for more than text


class Call(NamedTuple):
    """One question on behalf of a sample. hashes: sha256 of its images. schema: of the JSON object asked for;
    without it the value is {"text": ...}."""

    id: str
    kind: str
    step: int
    text: str
    images: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    schema: dict | None = None


class Outcome(NamedTuple):
    """A checked reply, or the closed `reason` against it and a `detail` in words. text: as it came."""

    value: dict | None
    reason: str | None = None
    detail: str = ""
    text: str | None = None
    attempts: int = 0


# of a value: (closed reason, the fault in words), or None
Check = Callable[[Call, dict], tuple[str, str] | None]


def is_reply(record: dict) -> bool:
    """Return whether a journal record is an error or a finished reply; DataError without a reply's fields."""
    check_fields("reply", record, REPLY_FIELDS)
    return record["error"] is not None or record["finish_reason"] in FINISHED


class IncompleteError(RuntimeError):
    """Calls are in no shard's journal yet, and this process makes none."""


def fill(template: str, **values: str) -> str:
    """Put values at their {names}, in one pass: braces in a value stay text. So do markers: `<image>` becomes
    (image), `<|im_end|>` (im_end), which a tokenizer would take for a picture or the end of a turn."""
    return re.sub(rf"\{{({'|'.join(values)})\}}",
                  lambda match: MARKER.sub(r"(\1\2)", values[match[1]]), template)


# ---- running calls
# what one call took; as_asked: whether a complete first reply kept the schema; lacks: `lacks_text`
CallUse = namedtuple("CallUse", "seconds n_prompt n_new as_asked lacks")


@dataclass
class Counters:
    """What this process did, and the calls behind its output, by key."""

    n_calls: int = 0
    n_reused: int = 0
    n_new_tokens: int = 0
    wall_s: float = 0.0
    used: dict[str, CallUse] = field(default_factory=dict)


@dataclass
class Caller:
    """What all calls of a run share; without a backend, the journal alone answers.

    identity: model, sampling and schemas, part of every key. images: the journal of checked images.
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
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.common = call_key(system=self.prompts["SYSTEM"], **self.identity)  # in all keys, hashed once

    def request(self, call: Call, attempt: int, before: Outcome | None = None) -> Request:
        """Return the request of a call. A second attempt names the fault of the first, and may be twice as
        long if that was cut off."""
        text, max_tokens = call.text, self.max_new_tokens
        if before is not None:
            text += "\n" + fill(self.prompts["RETRY"], fault=before.detail)
            max_tokens *= 2 if before.reason == "cut_off" else 1
        key = call_key(common=self.common, kind=call.kind, text=text, images=call.hashes, attempt=attempt,
                       max_new_tokens=max_tokens)
        return Request(key, self.prompts["SYSTEM"] or None, text, call.images, max_tokens, call.schema)

    def read(self, request: Request, call: Call, attempt: int, check: Check) -> Outcome:
        record = self.journal.get(request.key)
        outcome = read_outcome(record, call, check)
        is_complete = attempt == 0 and outcome.reason not in ("cut_off", "backend_error")
        as_asked = outcome.reason not in ("bad_json", "bad_schema") if is_complete else None
        self.counters.used[request.key] = CallUse(record["seconds"], record["n_prompt"], record["n_new"],
                                                  as_asked, lacks_text(record))
        return outcome._replace(attempts=attempt + 1)

    def read_all_shards(self) -> None:
        """Make no more calls, and read what every shard has written."""
        self.backend, self.retry_errors = None, False
        self.journal.reload()
        self.images.reload()

    def stats(self) -> dict:
        """Return the counters of the metrics file: calls, wall_s and speeds of this process, the others of
        all calls behind the output. p50_s, p95_s: of a call to a server, or of a local batch.
        json_as_asked: the share of complete first replies that keep the schema."""
        done, used = self.counters, list(self.counters.used.values())
        p50, p95 = quantiles([call.seconds for call in used]) if used else (None, None)
        first = [call.as_asked for call in used if call.as_asked is not None]
        return {"n_calls": done.n_calls, "n_reused": done.n_reused,
                "n_orphaned": sum(key not in done.used for key in self.journal),
                "n_prompt_tokens": sum(call.n_prompt for call in used),
                "n_new_tokens": sum(call.n_new for call in used), "p50_s": p50, "p95_s": p95,
                "json_as_asked": round(sum(first) / len(first), 4) if first else None,
                "no_text": dict(Counter(call.lacks for call in used if call.lacks)),
                "wall_s": round(done.wall_s, 1),
                "calls_per_s": round(done.n_calls / done.wall_s, 2) if done.wall_s else None,
                "tokens_per_s": round(done.n_new_tokens / done.wall_s, 1) if done.wall_s else None}


def quantiles(values: list[float]) -> tuple[float, float]:
    """Return the 50th and the 95th percentile, to a millisecond."""
    cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return round(cuts[9], 3), round(cuts[18], 3)


def read_outcome(record: dict, call: Call, check: Check) -> Outcome:
    """Return a record's outcome: error, length, JSON, schema and then `check` decide."""
    value, fault = None, None
    if record["error"]:
        fault = "backend_error", record["error"]
    elif call.schema is None:
        value = {"text": record["text"], "finish_reason": record["finish_reason"]}
    elif record["finish_reason"] == "length":
        fault = "cut_off", f"it was cut off after {record['n_new']} tokens; be shorter"
    elif (value := parse_json_reply(record["text"])) is None:
        fault = "bad_json", "it was not one JSON object"
    elif broken := schema_fault(value, call.schema):
        fault = "bad_schema", broken
    reason, detail = fault or check(call, value) or (None, "")
    if reason in ("bad_json", "bad_schema") and (lack := lacks_text(record)) in ("reasoning", "tool_calls"):
        detail = f"it had no text, only {lack.replace('_', ' ')}"
    return Outcome(None if reason else value, reason, detail, record["text"])


def ask(caller: Caller, calls: list[Call], check: Check, desc: str, guarded: bool = True, retries: int = 1
        ) -> list[Outcome]:
    """Return one outcome per call, in order; a faulty reply is asked for again, at most `retries` times.

    Raises ErrorRateError if the guard trips or no server answers, IncompleteError if a record is missing and
    there is no backend, KeyboardInterrupt after a signal.
    """
    if caller.retry_errors:
        forget_errors(caller, calls, check, retries)
    outcomes: dict[int, Outcome] = {}
    pending = list(range(len(calls)))
    for attempt in range(1 + retries):
        requests = {i: caller.request(calls[i], attempt, outcomes.get(i)) for i in pending}
        run_requests(caller, {request.key: (request, calls[i]) for i, request in requests.items()}, check,
                     attempt, f"{desc}, again" if attempt else desc,
                     Guard(caller.guarded and guarded and attempt == 0))
        for i, request in requests.items():
            outcomes[i] = caller.read(request, calls[i], attempt, check)
        pending = [i for i in pending if outcomes[i].value is None and outcomes[i].reason != "backend_error"]
    return [outcomes[i] for i in range(len(calls))]


def forget_errors(caller: Caller, calls: list[Call], check: Check, retries: int) -> None:
    """Forget calls that ended as an error, so that they are made again."""
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
        caller.journal.forget(*keys)


class Guard:
    def __init__(self, on: bool):
        self.on, self.n, self.last, self.fault = on, 0, deque(maxlen=GUARD_WINDOW), ""

    def count(self, fault: str | None) -> None:
        """Raise ErrorRateError if GUARD_FIRST calls all fail, or GUARD_SHARE of the last GUARD_WINDOW."""
        self.n, self.fault = self.n + 1, fault or self.fault
        self.last.append(fault is not None)
        n_failed = sum(self.last)
        all_failed = n_failed == self.n >= GUARD_FIRST
        if self.on and (all_failed or self.n >= GUARD_WINDOW and n_failed > GUARD_SHARE * GUARD_WINDOW):
            raise ErrorRateError(
                f"{n_failed} of the last {len(self.last)} calls failed, the last one by {self.fault}; repair "
                "server, model or prompts, then add --retry_errors, or use --no_guard for a weak model")


def run_requests(caller: Caller, asked: dict[str, tuple[Request, Call]], check: Check, attempt: int,
                 desc: str, guard: Guard) -> None:
    """Make the calls that the journal lacks, `asked` by key; append one record each."""
    done, n_done = caller.counters, sum(key in caller.journal for key in asked)
    done.n_reused += n_done
    if n_done == len(asked):
        return
    if caller.backend is None:
        raise IncompleteError(f"{len(asked) - n_done:,} of {len(asked):,} calls missing")
    began, n_errors, prompts = time.monotonic(), 0, call_key(**caller.prompts)[:16]
    with (stop_on_signals() as stop,
          tqdm(total=len(asked), initial=n_done, desc=desc, unit="call",
               disable=rank_world()[0] != 0) as bar):
        requests = [request for request, _ in asked.values()]
        for reply in caller.backend.generate(requests, caller.journal, stop):
            if reply.key in caller.journal:  # made again because its local batch was
                continue
            call = asked[reply.key][1]
            record = reply.record() | {"id": call.id, "kind": call.kind, "step": call.step,
                                       "attempt": attempt, "prompts": prompts, "time": round(time.time(), 3)}
            caller.journal.append(record)
            outcome = read_outcome(record, call, check)
            fault = f"{outcome.reason}: {outcome.detail}" if outcome.reason in ERROR_REASONS else None
            n_errors += fault is not None
            done.n_calls, done.n_new_tokens = done.n_calls + 1, done.n_new_tokens + reply.n_new
            speed = done.n_new_tokens / (done.wall_s + time.monotonic() - began)
            bar.set_postfix_str(f"{n_errors} errors, {n_done} reused, {speed:.0f} tok/s", refresh=False)
            bar.update()
            guard.count(fault)
    done.wall_s += time.monotonic() - began
    if not all(key in caller.journal for key in asked):
        raise KeyboardInterrupt  # only a signal ends the backend's work early
