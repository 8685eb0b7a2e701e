"""What the stages with model calls share: flags, opening the journals, running, showing a preview."""
import json
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from utils.backends import LocalBackend, log_textless
from utils.cli import (add_fresh_flag, log, parse_count, parse_seconds, parse_temperature, rank_world,
                       read_api_key)
from utils.images import visual_tokens
from utils.journal import Journal, move_aside, read_settings
from utils.jsonl import DataError, call_key, load_object, load_text, write_json, write_meta
from utils.model_calls import Call, Caller, IncompleteError, is_reply
from utils.rows import is_inspection


def parse_shard(text: str) -> tuple[int, int]:
    index, _, n = text.partition("/")
    if not (index.isdecimal() and n.isdecimal() and int(index) < int(n)):
        raise ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N-1")
    return int(index), int(n)


def parse_object(text: str) -> dict:
    with suppress(ValueError, RecursionError):
        if isinstance(value := load_text(text, exact=True), dict):
            return value
    raise ArgumentTypeError(f"{text[:40]!r}: expected a JSON object")


def add_call_flags(parser: ArgumentParser, max_new_tokens: int) -> None:
    add = parser.add_argument
    add("--output", required=True, help="JSONL to write; <output>.run/ holds the journal")
    add("--image_root", required=True, help="folder of the images, which paths may not leave")
    add("--model", default="Qwen/Qwen3-VL-4B-Instruct", help="folder, hub or server's name")
    add("--max_new_tokens", type=parse_count, default=max_new_tokens,
        help="length of a reply; a longer one is asked for again with twice as many")
    add("--max_pixels", type=parse_count, default=1280 * 28 * 28, help="area of an image")
    add("--prompts", help="JSON object of prompts that replace those of the script")
    add("--limit", type=parse_count, help="only the first N samples")
    add("--dry_run", action="store_true", help="show prompts and count calls; writes nothing")
    add("--export_only", action="store_true", help="write the output without calls")
    add_journal_flags(parser)
    add("--shard", type=parse_shard, metavar="I/N", help="every Nth sample from the Ith on")
    add = parser.add_argument_group("--backend local (free to change between restarts)").add_argument
    add("--batch_size", type=parse_count, default=16, help="calls per batch, at most")
    add("--batch_tokens", type=parse_count, default=32768, help="tokens per batch, at most")
    add_server_flags(parser, "--backend openai (the first five are free to change between restarts)", 32)


def add_journal_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--retry_errors", action="store_true", help="ask again where a call failed before")
    add("--no_guard", action="store_true", help="continue however many calls fail")
    add_fresh_flag(parser)


def add_server_flags(parser: ArgumentParser, title: str, image_factor: int) -> None:
    add = parser.add_argument
    add("--backend", choices=("local", "openai"), default="local", help="openai: a server")
    add = parser.add_argument_group(title).add_argument
    add("--base_url", default="http://127.0.0.1:8000/v1", help="is waited for while down")
    add("--concurrency", type=parse_count, default=64, help="calls at a time")
    add("--timeout", type=parse_seconds, default=300.0, help="seconds until a call is lost")
    add("--server_wait", type=parse_seconds, default=1800, help="seconds without any reply")
    add("--api_key_file", help="file with the key (default: $OPENAI_API_KEY, if set)")
    add("--temperature", type=parse_temperature, default=0.0, help="0: greedy")
    add("--image_factor", type=parse_count, default=image_factor,
        help="side of a visual token in pixels: 28 for Qwen2.5-VL, 32 for Qwen3-VL")
    add("--extra_body", type=parse_object, default={}, metavar="JSON",
        help="more fields of every request; null leaves a field out")


def load_prompts(path: str | None, prompts: dict[str, str]) -> dict[str, str]:
    """Return `prompts` with those in the JSON object at `path` replaced (--prompts)."""
    if path is None:
        return dict(prompts)
    changes = load_object(path, "expected one JSON object of strings")
    if not all(isinstance(text, str) for text in changes.values()):
        raise DataError(f"{path}: expected one JSON object of strings")
    if unknown := sorted(set(changes) - set(prompts)):
        raise DataError(f"{path}: no prompt is called {', '.join(unknown)}; expected {', '.join(prompts)}")
    return prompts | changes


def open_backend(args: Namespace, backend: str, model: str, base_url: str, max_pixels: int):
    """Return the backend that the other flags describe, not loaded yet."""
    if backend == "local":
        if args.temperature or args.extra_body:
            raise DataError("--temperature and --extra_body are for --backend openai; local is greedy")
        return LocalBackend(model, max_pixels, args.batch_size, args.batch_tokens)
    from utils.openai_backend import HttpBackend  # here: the local backend needs no HTTP client
    return HttpBackend(model, base_url, max_pixels, args.image_factor, args.concurrency, args.timeout,
                       args.server_wait, args.temperature, args.extra_body, read_api_key(args.api_key_file))


@contextmanager
def open_calls(args: Namespace, prompts: dict[str, str], schemas: dict[str, dict],
               settings: dict) -> Iterator[Caller]:
    """Open the journals in `<output>.run` and yield the caller; `settings` are those that change the result.
    With --export_only the journal names the model."""
    folder, shard = Path(f"{args.output}.run"), args.shard or rank_world()[:2]
    if args.export_only and (args.retry_errors or args.fresh):
        raise DataError("--export_only makes no calls; it cannot go with --retry_errors or --fresh")
    if args.fresh:
        move_aside(folder, shard[1])
    schemas_key = {"schemas": call_key(**schemas)}
    settings = {**settings, **schemas_key, "prompts": call_key(**prompts),
                "max_new_tokens": args.max_new_tokens}
    if args.export_only:
        written = read_settings(folder)
        if written is None:
            raise DataError(f"{folder}: no journal here; run without --export_only first")
        backend, identity = None, {name: written[name] for name in written if name not in settings}
    else:
        backend = open_backend(args, args.backend, args.model, args.base_url, args.max_pixels)
        identity = {"backend": args.backend, "max_pixels": args.max_pixels, **backend.identity}
    with (Journal(folder, settings | identity, shard=shard, is_valid=is_reply) as journal,
          Journal(folder, name="images", shard=shard, is_valid=is_inspection) as images):
        journal.forget(*(journal.transient if backend else ()))
        yield Caller(journal, images, backend, identity | schemas_key, prompts, args.max_new_tokens, shard,
                     not args.no_guard, args.retry_errors)


@dataclass(frozen=True)
class Stage:
    """The parts of a stage with model calls; `run_stage` does the rest.

    settings: what changes the result besides model, prompts and schemas. preview: return what --dry_run
    prints. work: make the calls, return the results; no caller without `needs_model`. export: write samples
    and results, return counts, "errors" among them. show: log the metrics.
    """

    inputs: list[str]
    prompts: dict[str, str]
    prompts_version: str
    schemas: dict[str, dict]
    settings: dict
    read: Callable[[], list]
    preview: Callable[[list], dict]
    work: Callable[[list, Caller | None], object]
    export: Callable[[list, object], dict]
    show: Callable[[dict], None]
    needs_model: bool = True


def run_stage(args: Namespace, stage: Stage) -> int:
    """Run a stage, first this shard's calls, then all samples from the journal; return its exit code."""
    began = time.monotonic()
    samples = stage.read()
    if args.dry_run:
        print(json.dumps(stage.preview(samples)))
        return 0
    try:
        samples, results, stats = work_on(args, stage, samples)
    except IncompleteError as error:
        if args.export_only:
            raise DataError(f"{args.output}.run: {error}; run without --export_only first") from error
        log(f"this shard is done, {error} from others: the last one, or --export_only, writes {args.output}")
        return 0
    metrics = stage.export(samples, results) | stats | {"seconds": round(time.monotonic() - began, 1)}
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, stage.inputs, metrics["seconds"], prompts=stage.prompts,
               prompts_version=stage.prompts_version)
    stage.show(metrics)
    log_textless(metrics.get("no_text"))
    print(json.dumps(metrics))
    return 3 if metrics["errors"] else 0


def work_on(args: Namespace, stage: Stage, samples: list) -> tuple[list, object, dict]:
    if not stage.needs_model:
        return samples, stage.work(samples, None), {}
    with open_calls(args, stage.prompts, stage.schemas, stage.settings) as caller:
        index, n_shards = caller.shard
        if n_shards > 1 and caller.backend:
            stage.work(samples[index::n_shards], caller)
            caller.read_all_shards()
            samples = stage.read()  # the shard's samples were checked against each other alone
        return samples, stage.work(samples, caller), caller.stats()


def show_calls(calls: list[Call], args: Namespace, system: str) -> dict[str, dict]:
    """Log one prompt of each kind; return the calls and their tokens, of 4 characters or 28 x 28 pixels."""
    counts = {}
    for kind in dict.fromkeys(call.kind for call in calls):
        of_kind = [call for call in calls if call.kind == kind]
        first = of_kind[0]
        pictures = "".join(f"[image {path}]\n" for path in first.images)
        log(f"--- {kind}, sample {first.id}\nsystem: {system}\nuser: {pictures}{first.text}\n---")
        n_text = sum((len(system) + len(call.text)) // 4 for call in of_kind)
        n_visual = sum(visual_tokens(path, args.max_pixels) for call in of_kind for path in call.images)
        counts[kind] = {"calls": len(of_kind), "prompt_tokens": n_text + n_visual,
                        "new_tokens_at_most": len(of_kind) * args.max_new_tokens}
    return counts
