"""Answer benchmark items with a model and score the answers by strict rules that never guess.

Stage 4 of 6:  train_sft.py -> [evaluate.py] -> intervene.py, probe.py

    python evaluate.py --model checkpoint --items bench.jsonl --output results.jsonl
    python evaluate.py --model monet --benchmark hrbench_4k --latent monet_vllm --output hr4k.jsonl
    python evaluate.py --benchmark vsp --source vsp/test.jsonl --prepare --output vsp
    python evaluate.py --responses replies.jsonl --items bench.jsonl --output results.jsonl
    python evaluate.py --compare base.jsonl text.jsonl --output base_text.json
    python evaluate.py --table CapImagine=vstar.jsonl Monet=monet_vstar.jsonl --output table.md

Reads   --items: JSONL items {"id", "question", "options": [[letter, text]], "answer": {"type", "value"},
        "images": [{"path"}], "metric": mcq | wtq | tabfact | yesno_pair | vsp_path}, optionally "benchmark",
        "category", "group_id", "hint"; or --source (default: the hub), which --benchmark turns into
        <output>.items.jsonl and <output>.images; --responses: replies made elsewhere, JSONL {"id", "text"
        [, "finish_reason"]}, VLMEvalKit's predictions or lmms-eval's samples
Writes  --output: one JSON line per item, in input order: {"id", "benchmark", "category", "group_id", "gold",
        "n_options", "protocol", "method", "pixels", "prompt", "prompt_sha", "image_grids", "raw_output",
        "clean_output", "finish_reason", "n_tokens", "n_latent", "extraction": {"value", "rule"}, "verdict":
        correct | incorrect | unresolved | error, "compat": {rule: its verdict}}; after an error "error"; of
        HR-Bench "rotation"; with a tool "turns" and "ended_by"; with a judge "judge" and "judged"; with
        --samples a line per reply with "item" and "sample"; with --shuffle_options "shown": the order, gold
        and answer as shown; "reasoning" and "tool_calls" that a server took out of the text;
        <output>.metrics.json, <output>.meta.json, <output>.run/ (replies and seconds; every run scores again)
Prints  a table by category on stderr; on stdout one JSON object: counts, accuracy with interval, protocol

Unresolved answers count as wrong unless a judge reads them. An item whose image cannot be used, or that a
server failed on, is an error: it is not scored, and "headline" is null. Re-run the same command to
resume. Under torchrun the last process to finish writes the results of all. Exit codes: 0 complete, 2 usage,
settings or damage, 3 complete with errors, 4 no server answers or too many calls fail, 130 interrupted.
"""
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils.backends import LocalBackend
from utils.call_flags import add_journal_flags, add_server_flags, open_backend
from utils.cli import (Help, add_decoding_flags, cli, log, parse_count, parse_number, parse_seconds,
                       parse_seed, rank_world, read_api_key)
from utils.evaluate.answering import Local, Served, answer_all, is_turn, read_replies, sampler
from utils.evaluate.benchmarks import TABLE, prepare, shuffle_options
from utils.evaluate.comparison import compare_all, describe, make_table, protocol_line, show
from utils.evaluate.judge import KINDS, Judge, add_verdicts
from utils.evaluate.prompts import MAX_TOKENS, NO_REPLY, PROTOCOLS, Conversation, Protocol, show_messages
from utils.evaluate.results import headline, judged_right, own_scores, parts_of, sample_scores, summarize
from utils.evaluate.scoring import as_published, check_scorable, n_options, rotation_of, score, vsp_floors
from utils.items import ANSWER_TYPES, group_of, read_items, render
from utils.journal import Journal, move_aside
from utils.jsonl import (DataError, call_key, check_output, replace_file, sha256_file, write_json, write_meta,
                         write_rows)
from utils.latent_families import LatentSpec, spec_of
from utils.model_calls import is_reply
from utils.openai_backend import HttpBackend
from utils.rows import OPEN

METHODS = ("direct", "text", "latent", "tool")  # before the answer: nothing, words, latents, crops
MAX_NEW_TOKENS = 2048  # VLMEvalKit's for Qwen2.5-VL (vlmeval/vlm/qwen2_vl/model.py)
JUDGE_MAX_TOKENS = 1024  # of a judge's reply, its thoughts included


# ---- items
def find_items(args: Namespace) -> tuple[list[dict], str]:
    """Return the items and their file; set --image_root."""
    path = args.items
    if args.benchmark:
        if rank_world()[1] > 1:
            raise DataError("--benchmark under torchrun: make the items with --prepare, then give --items")
        path, items = f"{args.output}.items.jsonl", []
        for name in args.benchmark:
            items += prepare(TABLE[name], f"{args.output}.images", args.source, args.image_root, args.limit,
                             args.revision)
        write_rows(path, items)
        args.image_root = str(Path(path).parent)
    args.image_root = args.image_root or str(Path(path).parent)
    items = read_items(path, args.limit if args.items else None, tuple(ANSWER_TYPES))
    if not items:
        raise DataError(f"{path}: no items; expected at least one")
    return items, path


def find_protocol(args: Namespace) -> Protocol:
    given = {name: getattr(args, name) for name in ("system", "min_pixels", "max_pixels", "suffix")}
    return replace(PROTOCOLS[args.protocol], **{k: value for k, value in given.items() if value is not None})


# ---- who answers, who judges
def open_system(args: Namespace, protocol: Protocol, spec: LatentSpec | None) -> tuple[Local | Served, dict]:
    """Return the model that answers and its identity (its weights, not its name alone)."""
    if args.backend == "openai":
        if protocol.max_pixels is None:
            raise DataError(f"--protocol {args.protocol} has no resolution of its own, and servers report "
                            "none; expected --max_pixels")
        if protocol.min_pixels is not None:
            log(f"--protocol {args.protocol} asks for at least {protocol.min_pixels} pixels, but the server "
                "enlarges small pictures: check its --mm-processor-kwargs (vLLM)")
        backend = open_backend(args, args.backend, args.model, args.base_url, protocol.max_pixels)
        return Served(backend, args.max_new_tokens, protocol.max_pixels), backend.identity
    backend = LocalBackend(args.model, protocol.max_pixels, args.batch_size, args.batch_tokens, spec,
                           protocol.min_pixels, args.dtype,
                           sampler(args.temperature) if args.temperature else None)
    drawn = {"temperature": args.temperature} if args.temperature else {}
    return Local(backend, args.max_new_tokens), {"weights": backend.identity["model"]} | drawn


@contextmanager
def open_judge(args: Namespace) -> Iterator[Judge | None]:
    """Yield the judge, which has answered a test question before hours of answering; None without one."""
    if args.judge == "none":
        yield None
        return
    backend = HttpBackend(args.judge_model, args.judge_base_url, 1, 28, args.concurrency, args.timeout,
                          args.judge_wait, api_key=read_api_key(args.judge_key_file, "--judge_key_file"))
    with Journal(f"{args.output}.run", name="judge", is_valid=is_reply) as journal:
        journal.forget(*journal.transient)
        judge = Judge(args.judge, backend, journal, JUDGE_MAX_TOKENS)
        if rank_world()[0] == 0:
            judge.preflight()
        yield judge


def open_conversations(items: list[dict], protocol: Protocol, args: Namespace) -> list[Conversation]:
    hashes, seed = {}, args.seed if args.temperature else 0
    return [Conversation(item, protocol, args.image_root, args.method, hashes, sample, seed)
            for item in items for sample in range(args.samples)]


@dataclass
class Answers:
    """The results of all items; their conversations, none if the replies were made elsewhere; the pixel
    limits of their pictures."""

    items: list[dict]
    results: list[dict]
    conversations: list[Conversation]
    pixels: list[int | None]
    responses: dict | None = None


def answer(items: list[dict], protocol: Protocol, spec: LatentSpec | None, args: Namespace) -> Answers | None:
    """Return the answers of all processes; None if others are not done."""
    conversations = open_conversations(items, protocol, args)
    system, identity = open_system(args, protocol, spec)
    rank, world, _ = rank_world()
    fixed = ("model", "backend", "method", "protocol", "system", "suffix", "min_pixels", "max_pixels",
             "max_new_tokens", "latent", "latent_size", "dtype")
    # drop_format_hints: a former flag, kept so that older journals stay valid
    settings = {name: getattr(args, name) for name in fixed} | identity | {"drop_format_hints": False}
    settings |= {"force_start": True} if args.force_start else {}
    with Journal(f"{args.output}.run", settings, is_valid=is_turn) as journal:
        journal.forget(*journal.transient, *(key for key in journal
                                             if args.retry_errors and "error" in journal.get(key)))
        if not answer_all(system, conversations, journal, rank, world, not args.no_guard):
            return None
    results = [result_of(c.item, c.result(), system.pixels, args) for c in conversations]
    if args.samples > 1:
        results = [result | {"id": f"{result['id']}#{c.sample}", "item": result["id"], "sample": c.sample}
                   for result, c in zip(results, conversations)]
    return Answers([c.item for c in conversations], results, conversations, system.pixels)


def adopt(items: list[dict], args: Namespace) -> Answers:
    """Return the results of replies made elsewhere; an item without one is an error."""
    replies, counts = read_replies(args.responses, items)
    log(", ".join(f"{name} {value}" for name, value in counts.items()))
    unknown = {"prompt": None, "prompt_sha": None, **NO_REPLY, "n_tokens": None}
    results = [result_of(item, unknown | reply, [None, None], args) for item, reply in zip(items, replies)]
    return Answers(items, results, [], [None, None], counts)


# ---- results
def result_of(item: dict, reply: dict, pixels: list[int | None], args: Namespace) -> dict:
    rotation = rotation_of(item)
    return {"id": item["id"], "benchmark": item.get("benchmark"), "category": item.get("category"),
            "group_id": group_of(item), "gold": item["answer"]["value"], "n_options": n_options(item),
            **({} if rotation is None else {"rotation": rotation}), "protocol": args.protocol,
            "method": args.method, "pixels": pixels, **reply, **score(item, reply)}


def imagination_test(method: str) -> Callable[[dict], bool] | None:
    """Return the test for an imagination in a result, if the method has one."""
    return {"latent": lambda record: record["n_latent"] > 0,
            "text": lambda record: OPEN in record["clean_output"],
            "tool": lambda record: len(record["turns"]) > 1}.get(method)


def measure(answers: Answers, protocol: dict, args: Namespace) -> dict:
    results, test = answers.results, imagination_test(args.method)
    metrics = {**summarize(results, test),
               "categories": {name: summarize(part, test) for name, part in parts_of(results).items()},
               "own_scores": by_sample(own_scores, results), "protocol": protocol,
               "vsp_floors": vsp_floors([result for result in results if not result.get("sample")])}
    if "with_judge" in metrics:
        metrics["with_judge"]["own_scores"] = by_sample(partial(own_scores, right=judged_right), results)
    if args.samples > 1:
        metrics["samples"] = sample_scores(results)
    metrics["headline"] = headline(metrics)
    metrics["efficiency"] = efficiency(answers)
    if answers.responses:
        metrics["responses"] = answers.responses
    return metrics


def by_sample(score: Callable[[list[dict]], dict], results: list[dict]) -> dict:
    """Return the scores of results, of several replies per item those of the first, second, ... of each."""
    samples = {result["sample"] for result in results if "sample" in result}
    return {f"sample {n}": score([result for result in results if result["sample"] == n])
            for n in sorted(samples)} or score(results)


def efficiency(answers: Answers) -> dict:
    n, names = len(answers.results), ("seconds", "prefill_seconds", "tokens")
    if not answers.conversations:
        return dict.fromkeys((*names, "seconds_per_item", "tokens_per_item"))
    seconds, prefill = (sum(c.seconds(name) for c in answers.conversations) for name in names[:2])
    n_tokens = sum(result["n_tokens"] for result in answers.results)
    return {"seconds": round(seconds, 3), "prefill_seconds": round(prefill, 3),
            "seconds_per_item": round(seconds / n, 4), "tokens": n_tokens,
            "tokens_per_item": round(n_tokens / n, 1)}


def describe_protocol(answers: Answers, protocol: Protocol | None, spec: LatentSpec | None, path: str,
                      args: Namespace) -> dict:
    """Return the settings of a run and a line about them; None for what another program chose."""
    settings = {"protocol": args.protocol, "method": args.method, "model": args.model or args.responses,
                "backend": None if args.responses else args.backend,
                "items": path, "items_sha256": sha256_file(path),
                "latent": args.latent, "latent_size": spec and spec.size,
                "force_start": bool(spec and spec.force_start),
                "system": protocol and protocol.system, "suffix": args.suffix, "pixels": answers.pixels,
                "max_new_tokens": protocol and args.max_new_tokens,
                "temperature": args.temperature, "samples": args.samples, "seed": args.seed,
                "shuffle_options": args.seed if args.shuffle_options else None,
                "prompt_sha": protocol and call_key(prompts=[r["prompt_sha"] for r in answers.results])[:16],
                "judge": "none" if args.judge == "none" else f"{args.judge}:{args.judge_model}"}
    return settings | {"line": protocol_line(settings)}


# ---- the stage
def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="checkpoint folder, hub name, or the server's name for it")
    add("--items", help="items JSONL")
    add("--benchmark", nargs="+", choices=TABLE, metavar="NAME", help=f"make the items: {', '.join(TABLE)}")
    add("--responses", metavar="FILE", help="score replies made elsewhere; no model is asked")
    add("--source", help="the benchmark's file or folder, or your own for mcq (default: the hub)")
    add("--revision", help="commit on the hub (default: the pinned one)")
    add("--prepare", action="store_true", help="write the items and stop")
    add("--compare", nargs="+", metavar="RESULTS",
        help="two result files on the same items, or several pairs")
    add("--table", nargs="+", metavar="[NAME=]RESULTS", help="the paper's table from results")
    add("--output", required=True, help="JSONL (--compare: JSON, --table: Markdown)")
    add("--image_root", help="folder of images (default: that of the items or source)")
    add("--method", choices=METHODS, help="what comes before the answer (default: direct, or latent)")
    add("--protocol", choices=PROTOCOLS,
        help="words, system prompt and pixel limits (default: vlmevalkit; deepeyes for --method tool)")
    add("--system", help="system prompt that replaces the protocol's")
    add("--suffix", default="", help="text added to the question")
    add("--min_pixels", type=parse_count, help="smallest area of a picture (default: the protocol's)")
    add("--max_pixels", type=parse_count, help="largest area of a picture (default: the protocol's)")
    add("--max_new_tokens", type=parse_count, help="per turn, latent steps included "
        f"(default: {MAX_NEW_TOKENS}; {MAX_TOKENS} for --method tool)")
    add("--shuffle_options", action="store_true", help="show each item's options in an order drawn by --seed")
    add("--samples", type=parse_count, default=1, help="replies per item, with --temperature")
    add("--seed", type=parse_seed, default=0, help="of --samples and --shuffle_options")
    add("--limit", type=parse_count, help="only the first N items")
    add_journal_flags(parser)
    add("--dry_run", action="store_true", help="show a prompt and count the items")
    local = parser.add_argument_group("--backend local")
    add_decoding_flags(local)
    add = local.add_argument
    add("--latent_size", type=parse_number(1, 16384), help="latents per segment (default: the family's)")
    add("--batch_size", type=parse_count, default=32, help="items per batch, at most")
    add("--batch_tokens", type=parse_count, default=65536, help="tokens per batch, at most")
    add_server_flags(parser, "--backend openai, and the judge", 28)
    add = parser.add_argument_group("--judge (reads text alone; free to change between runs)").add_argument
    add("--judge", choices=("none", *KINDS), default="none",
        help="map: which option a reply means; grade: is it the gold answer")
    add("--judge_model", help="the server's name for the judge")
    add("--judge_base_url", default="http://127.0.0.1:8001/v1", help="the judge's server")
    add("--judge_key_file", help="file with its key (default: $OPENAI_API_KEY, if set)")
    add("--judge_wait", type=parse_seconds, default=60.0,
        help="seconds without reply until it counts as gone")
    return check_args(parser, parser.parse_args(argv))


def check_args(parser: ArgumentParser, args: Namespace) -> Namespace:
    """Refuse contradictions, and set defaults that depend on other flags."""
    if sum(map(bool, (args.items, args.benchmark, args.compare, args.table))) != 1:
        parser.error("expected one of --items, --benchmark, --compare and --table")
    if not (args.compare or args.table or args.prepare or args.responses) and not args.model:
        parser.error("expected --model, or --responses")
    args.method = args.method or ("direct" if args.latent == "off" else "latent")
    if (args.method == "latent") != (args.latent != "off"):
        parser.error(f"--method {args.method}, --latent {args.latent}: latents need both, others neither")
    if args.latent != "off" and args.backend == "openai":
        parser.error("--latent: servers do not feed latents; expected --backend local")
    if args.samples > 1 and (args.temperature == 0 or args.responses):
        parser.error(f"--samples {args.samples}: expected --temperature above 0, and no --responses")
    if args.responses:
        if args.compare or args.table or args.prepare or args.dry_run or args.protocol or (
                args.shuffle_options or args.method not in ("direct", "text")):
            parser.error("--responses: nothing is asked; expected --items or --benchmark, --method direct or "
                         "text, and no --protocol or --shuffle_options")
        args.protocol = "elsewhere"
    args.protocol = args.protocol or ("deepeyes" if args.method == "tool" else "vlmevalkit")
    if (args.method == "tool") != (args.protocol == "deepeyes"):
        parser.error(f"--method {args.method}, --protocol {args.protocol}: only deepeyes has the tool")
    args.max_new_tokens = args.max_new_tokens or (MAX_TOKENS if args.method == "tool" else MAX_NEW_TOKENS)
    if args.judge != "none" and not args.judge_model:
        parser.error(f"--judge {args.judge} needs --judge_model and --judge_base_url")
    return args


def compare_files(args: Namespace) -> dict:
    result = compare_all(args.compare)
    write_json(args.output, result)
    for part in result.get("comparisons", [result]):
        log(f"{part['files'][0]} -> {part['files'][1]}: {describe(part)}")
        if "judged" in part:
            log(f"with the judge {', '.join(part['judged']['judges'])}: {describe(part['judged'])}")
    return result


def tabulate_files(args: Namespace) -> dict:
    text = make_table(args.table)
    replace_file(args.output, lambda file: file.write(text))
    log(text)
    return {"results": len(args.table), "output": args.output}


def show_prompt(items: list[dict], protocol: Protocol, args: Namespace) -> dict:
    from utils.qwen import load_processors

    tokenizer = None if args.backend == "openai" else load_processors(args.model)[0]
    prompts = [show_messages(c.messages) if tokenizer is None else render(tokenizer, c.messages)
               for c in open_conversations(items, protocol, args)]
    log(prompts[0])
    return {"items": len(items), "longest_prompt_characters": max(map(len, prompts))}


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    tables = [text.rpartition("=")[2] for text in args.table or []]
    check_output(args.output, filter(None, [args.items, args.responses, *(args.compare or tables)]))
    if args.compare or args.table:
        print(json.dumps(compare_files(args) if args.compare else tabulate_files(args)))
        return 0
    items, path = find_items(args)
    if args.prepare:
        print(json.dumps({"items": len(items), "categories": Counter(i.get("category") for i in items)}))
        return 0
    check_scorable(items)
    if args.shuffle_options:
        items = shuffle_options(items, args.seed)
    protocol = None if args.responses else find_protocol(args)
    spec = spec_of(args.latent, args.latent_size, args.force_start)
    if args.dry_run:
        print(json.dumps(show_prompt(items, protocol, args)))
        return 0
    if args.fresh:
        move_aside(Path(f"{args.output}.run"), rank_world()[1])
    with open_judge(args) as judge:
        answers = adopt(items, args) if args.responses else answer(items, protocol, spec, args)
        if answers and judge:
            add_verdicts(judge, answers.items, answers.results)
    if answers and args.shuffle_options:
        answers.results = list(map(as_published, answers.items, answers.results))
    if answers is None:  # other processes are not done
        print(f"process {rank_world()[0]}: its share is done; the last to finish writes {args.output}",
              file=sys.stderr)
        return 0
    write_rows(args.output, answers.results)
    metrics = measure(answers, describe_protocol(answers, protocol, spec, path, args), args)
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [path, *filter(None, [args.responses])], metrics["seconds"])
    show(metrics)
    print(json.dumps(metrics))
    return 3 if metrics["error"] or metrics.get("with_judge", {}).get("judge_errors") else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
