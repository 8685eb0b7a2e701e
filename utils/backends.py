"""Model calls of stages 1 and 2: requests, journal, replies that are checked, and the local backend.

`ask` runs calls through a journal and a backend and returns one outcome a call: a checked JSON object, or a fault with
a closed reason. What a reply means is for the stage to decide. The checks of rows and captions that both stages must
make alike stand here too. torch is imported when a local model is first needed.
"""
import argparse
import hashlib
import json
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from utils.answers import answers_match, last_boxed
from utils.images import ImageError, check_images, image_size, open_image, smart_size
from utils.rows import DataError, Journal, call_key, log, rank_world

ERROR_REASONS = ("cut_off", "bad_json", "bad_schema", "backend_error")  # the model failed; never a rule's rejection
OWN_FIELDS = {"id": str, "subset": str, "images": list, "question": str, "answer": str, "steps": list}
ROW_REASONS = ("structure", "question", "answer")
CAPTION_REASONS = ("caption_empty", "caption_short", "caption_long", "caption_refusal", "caption_loop",
                   "caption_markup", "caption_leak")
MIN_WORDS, MAX_WORDS = 2, 120  # of a caption; the prompts ask for 80 at most
MAX_REPEATED = 0.3  # share of 4-grams that stood before in the same text
WINDOW = 2048  # requests among which batches are formed by length
GUARD_FIRST, GUARD_WINDOW, GUARD_SHARE = 20, 500, 0.2  # stop: the first 20 calls all failed, or 20 % of the last 500
SPAN = re.compile(r"<think_image>(.*?)</think_image>", re.DOTALL)
MARKUP = re.compile(r"<\|[^|<>]*\|>|</?(?:image|img|abs_vis_token|abs_vis_token_pad|observation|think|think_image"
                    r"|output_image|box|ref)\b[^<>]*>|\[(?:IMG|IMAGE|image)\b[^\]]*\]|\\boxed|```")
REFUSAL = re.compile(r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:can't|cannot|can not) (?:see|view|help|assist"
                     r"|answer|provide|describe|identify|determine)\b|\bas an AI\b|\blanguage model\b"
                     r"|\bI apologi[sz]e\b", re.I)
LEAK = re.compile(r"\b(?:final |correct |right )?answer (?:is|would be|must be)\b|\banswer:"
                  r"|\bcorrect (?:option|choice)\b|\boption \(?[A-H]\)? is (?:correct|right)\b", re.I)
OPTION = re.compile(r"^\s*(?:[-*]\s+)?\(?([A-Z])[.):]\s+(\S.*?)\s*$", re.MULTILINE)
NO_OPTIONS = re.compile(r"\boptions:\s*(?:please\b.*|answer\b.*)?$", re.I | re.DOTALL)


@dataclass(frozen=True)
class Request:
    """One model call: images before the text, greedy, at most `max_tokens` new tokens; `schema` is for servers."""

    key: str
    system: str | None
    text: str
    images: tuple[Path, ...]
    max_tokens: int
    schema: dict | None = None


@dataclass(frozen=True)
class Reply:
    """What a backend returns for a request. `seconds` is the wall time of the batch; `error` is set if nothing came."""

    key: str
    text: str
    finish_reason: str  # "stop", "length" or "error"
    n_prompt: int  # tokens, the visual ones included
    n_new: int  # tokens
    seconds: float
    error: str | None = None


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


# ------------------------------------------------------------------------------------------------ text checks
def has_loop(text: str) -> bool:
    """Return whether over MAX_REPEATED of a text's 4-grams stood before in it, or one of its lines stands 3 times."""
    words = text.lower().split()
    grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return len(grams) >= 5 and 1 - len(set(grams)) / len(grams) > MAX_REPEATED or max(lines.values(), default=0) >= 3


def caption_fault(text: str) -> str | None:
    """Return the first of CAPTION_REASONS that holds for a caption, or None."""
    n_words = len(text.split())
    holds = (n_words == 0, n_words < MIN_WORDS, n_words > MAX_WORDS, REFUSAL.search(text), has_loop(text),
             MARKUP.search(text), LEAK.search(text))
    return next((reason for reason, hit in zip(CAPTION_REASONS, holds, strict=True) if hit), None)


def parse_options(question: str) -> dict[str, str]:
    """Return {letter: text} of the options written one a line ("A. a cat"), or {} if there are not two from A on."""
    options = dict(OPTION.findall(question))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]
    return options if len(options) >= 2 and "".join(options) == letters else {}


def check_own(where: str, row: dict) -> None:
    """Raise DataError unless the images and steps of a row with OWN_FIELDS are of our form (captions optional)."""
    if not all(isinstance(path, str) for path in row["images"]):
        raise DataError(f"{where}: field 'images' should be a list of paths, got {str(row['images'])[:60]!r}")
    for n, step in enumerate(row["steps"], 1):
        kinds = {name: type(part) for name, part in step.items()} if isinstance(step, dict) else {}
        is_text = kinds.get("text") is str and "image" not in kinds
        if not is_text and (kinds.get("image") is not str or step.get("operation") not in ("zoom", "draw")):
            raise DataError(f"{where}: step {n} should be {{\"text\"}} or {{\"image\", \"operation\": zoom or draw}}, "
                            f"got {str(step)[:60]!r}")


def row_fault(row: dict) -> str | None:
    """Return the first of ROW_REASONS that holds for a row in our form (chain or not), or None.

    structure: no question image, no helper image, or the last step is not a text. question: empty, options promised but
    not there, or another number of <image> markers than images. answer: none, not what the last step boxes, or none of
    the options.
    """
    steps, question, answer = row["steps"], row["question"], row["answer"]
    if not row["images"] or not any("image" in step for step in steps) or "image" in steps[-1]:
        return "structure"
    if not question.strip() or NO_OPTIONS.search(question) or question.count("<image>") not in (0, len(row["images"])):
        return "question"
    options = parse_options(question)
    boxed = last_boxed(steps[-1]["text"])
    if not answer.strip() or boxed is None or not answers_match(boxed, answer, options or None):
        return "answer"
    if options and not any(answers_match(answer, text, options) for text in options.values()):
        return "answer"
    return None


def check_rows(rows: list[dict], root: str | Path, fault_of: Callable[[dict], str | None] = row_fault) -> list[tuple]:
    """Return (reason or None, detail, image hashes) a row, by all that needs no model.

    `fault_of` first, then the images (utils.images.check_images), then "duplicate": a sound row before it has the same
    question, question images and answer.
    """
    def look(row: dict) -> tuple[str | None, list[str]]:
        if reason := fault_of(row):
            return reason, []
        return check_images(root, row["images"], [step["image"] for step in row["steps"] if "image" in step])

    if not Path(root).is_dir():
        raise DataError(f"--image_root {root}: no such folder; image paths are relative to it")
    found, seen = [], {}
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        for row, (reason, hashes) in zip(rows, pool.map(look, rows)):
            detail = ""
            if reason is None:
                same = call_key(question=row["question"], answer=row["answer"], images=hashes[:len(row["images"])])
                if same in seen:
                    reason, detail = "duplicate", f"question, images and answer of {seen[same]}"
                seen.setdefault(same, row["id"])
            found.append((reason, detail, hashes))
    return found


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


# ------------------------------------------------------------------------------------------------ the local backend
def model_identity(folder: Path) -> str:
    """Return a hash of what a checkpoint computes: configuration, tokenizer, template, names and sizes of the weights.

    Of each weight file the first and last megabyte count too: two trainings of one model differ in nothing else.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") and path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(size - (1 << 20), 0))
                digest.update(file.read())
    return digest.hexdigest()


class LocalBackend:
    """Greedy decoding with transformers in this process, in static left-padded batches of similar length.

    The batches depend on the whole list of requests and never on what is done already: a batch that a kill left half
    done is computed again whole, so that its replies are those of an uninterrupted run to the last bit.
    """

    def __init__(self, model_path: str, max_pixels: int, batch_size: int):
        self.folder = find_checkpoint(model_path)
        self.identity = model_identity(self.folder)
        self.max_pixels, self.batch_size = max_pixels, batch_size
        self.qwen = None

    def load(self) -> None:
        """Load the checkpoint, on this rank's GPU if there is one."""
        import torch  # here: a run that only reads its journal needs no torch
        from utils import qwen
        device = f"cuda:{rank_world()[2]}" if torch.cuda.is_available() else "cpu"
        self.qwen = qwen.load(str(self.folder), device=device, max_pixels=self.max_pixels)

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[Reply]:
        """Yield a reply for every request whose key is not in `done` (and for the others of its batch)."""
        requests = list(requests)
        for first in range(0, len(requests), WINDOW):
            window = sorted(requests[first:first + WINDOW], key=self.length, reverse=True)
            for i in range(0, len(window), self.batch_size):
                batch = window[i:i + self.batch_size]
                if not all(request.key in done for request in batch):
                    yield from self.answer(batch)

    def length(self, request: Request) -> tuple[int, int]:
        """Return a stand-in for the prompt's length: visual tokens from the headers, then characters."""
        area = 0
        for path in request.images:
            try:
                width, height = smart_size(*image_size(path), 28, 28 * 28, self.max_pixels)
            except ImageError:
                continue  # answered with its reason when the batch opens it
            area += width * height
        return area // 28**2 + len(request.text) // 4, len(request.text)

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
            log(f"out of memory with {len(ready)} requests in a batch; splitting it")
            half = len(ready) // 2
            return [*replies, *self.answer(list(ready[:half])), *self.answer(list(ready[half:]))]
        seconds = round(time.monotonic() - began, 3)
        for request, row, mask in zip(ready, rows, inputs["attention_mask"]):
            finish = "length" if len(row.ids) > request.max_tokens else row.finish
            text = decode.clean_text(self.qwen.tokenizer, row.ids[:request.max_tokens])
            replies.append(Reply(request.key, text, finish, int(mask.sum()), len(row.ids), seconds))
        return replies


def find_checkpoint(model_path: str) -> Path:
    """Return the folder of a checkpoint: the path itself, or the hub's snapshot, downloaded if need be."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model_path))
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model_path}: neither a folder here nor to be had from the hub ({error})") from error


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
