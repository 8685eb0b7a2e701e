"""Answer benchmark items with a model and score the answers, by rules that never guess.

Stage 4 of 6:  train_sft.py -> [evaluate.py] -> intervene.py, probe.py    (one reply an item, or turns with a
tool)

    python evaluate.py --model checkpoint --items bench.jsonl --output results.jsonl
    python evaluate.py --model checkpoint --benchmark vstar --protocol monet --method text --output \
      vstar.jsonl
    python evaluate.py --model monet --benchmark hrbench_4k --source hr_bench_4k.tsv --latent monet_vllm \
      --output hr4k.jsonl
    python evaluate.py --model name --backend openai --base_url http://127.0.0.1:8000/v1 --method tool \\
        --benchmark vstar --judge map --judge_model name --judge_base_url http://127.0.0.1:8001/v1 --output
    vstar.jsonl
    python evaluate.py --benchmark vsp --source vsp/test.jsonl --prepare --output vsp.jsonl
    python evaluate.py --compare base.jsonl text.jsonl --output base_text.json
    python evaluate.py --table CapImagine=vstar.jsonl Monet=monet_vstar.jsonl --output table.md
    torchrun --standalone --nproc_per_node 8 evaluate.py --model checkpoint --items bench.jsonl --output \
      results.jsonl

Reads   --items: JSONL items {"id", "question", "options": [[letter, text]], "answer": {"type", "value"},
        "images":
        [{"path"}], "metric": mcq | likelihood | wtq | tabfact | yesno_pair | vsp_path} and, if there,
        "benchmark", "category", "group_id", "hint"; or --source (default: the hub), which --benchmark turns
        into such items at <output>.items.jsonl, pictures in <output>.images (--prepare stops there)
Writes  --output: a JSON line an item, in input order: {"id", "benchmark", "category", "group_id", "gold",
        "n_options",
        "protocol", "method", "pixels", "prompt", "prompt_sha", "image_grids", "raw_output", "clean_output",
        "finish_reason", "n_tokens", "n_latent", "extraction": {"value", "rule"}, "verdict": correct |
        incorrect | unresolved | error, "compat": {rule: its verdict}}; after an error, its reason as "error";
        with a tool "turns" and "ended_by"; with a judge "judge" and "judged"; <output>.metrics.json,
        <output>.meta.json, <output>.run/ (what was said, and in how many seconds; scoring is done anew on
        every run)
Prints  a table by category on stderr; on stdout one JSON object: counts, accuracy with its interval, protocol

Unresolved answers count as wrong, unless a judge reads them. An item whose image cannot be used, or that a
server failed on, is an error: it is not scored, the result says "incomplete" and has no "headline". Killed,
the same command goes on. Exit codes: 0 complete; 3 complete with errors of items or of the judge; 2 usage,
settings or damage; 4 no server answers; 130 interrupted. Under torchrun every process answers its share, and
the last one to finish writes: the same bytes.
"""
import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from utils.backends import ErrorRateError
from utils.call_flags import add_server_flags, open_server
from utils.cli import Help, cli, log, parse_count, rank_world, read_api_key
from utils.evaluate.answering import (METHODS, Conversation, Local, Served, answer_all, is_turn, render,
                                      show_messages)
from utils.evaluate.benchmarks import TABLE, prepare
from utils.evaluate.comparison import compare_all, describe
from utils.evaluate.judge import KINDS, Judge, add_verdicts
from utils.evaluate.prompts import MAX_TOKENS, PROTOCOLS, Protocol
from utils.evaluate.results import headline, make_table, own_scores, parts_of, protocol_line, show, summarize
from utils.evaluate.scoring import check_scorable, n_options, score
from utils.items import ANSWER_TYPES, group_of, read_items, rotation_of
from utils.journal import Journal
from utils.jsonl import (DataError, call_key, check_output, find_checkpoint, model_identity, replace_file,
                         sha256_file, write_json, write_meta, write_rows)
from utils.latent_families import PRESETS, LatentSpec, spec_of
from utils.model_calls import REPLY_FIELDS
from utils.openai_backend import HttpBackend
from utils.qwen import load_processors, load_with
from utils.spans import OPEN

MAX_NEW_TOKENS = 2048  # VLMEvalKit's for Qwen2.5-VL (vlmeval/vlm/qwen2_vl/model.py)


# ------------------------------------------------------------------------------------------------ items
def find_items(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Return the items and the file that holds them; --benchmark writes it and its pictures. Settles
    --image_root."""
    path = args.items
    if args.benchmark:
        if rank_world()[1] > 1:
            raise DataError(
                "--benchmark under torchrun: the processes would race for the files; make the items once with "
                            "--prepare, then give them as --items")
        path, made = f"{args.output}.items.jsonl", []
        for name in args.benchmark:
            made += prepare(TABLE[name], f"{args.output}.images", args.source, args.image_root, args.limit,
                            args.revision)
        write_rows(path, made)
        args.image_root = str(Path(path).parent)
    args.image_root = args.image_root or str(Path(path).parent)
    limit = args.limit if args.items else None  # of several benchmarks, the limit is each one's
    items = read_items(path, limit, tuple(ANSWER_TYPES))
    if not items:
        raise DataError(f"{path}: no items; expected at least one")
    return items, path


def find_protocol(args: argparse.Namespace) -> Protocol:
    """Return the protocol of the flags: the named one, with what other flags put in the place of its parts.
    """
    protocol = PROTOCOLS[args.protocol]
    return replace(protocol, system=protocol.system if args.system is None else args.system,
                   suffix=protocol.suffix + args.suffix, format_hints=protocol.format_hints
                   and not args.drop_format_hints,
                   min_pixels=args.min_pixels if args.min_pixels is not None else protocol.min_pixels,
                   max_pixels=args.max_pixels if args.max_pixels is not None else protocol.max_pixels)


# ------------------------------------------------------------------------------------ who answers, who judges
def open_system(args: argparse.Namespace, protocol: Protocol, spec: LatentSpec
                | None) -> tuple[Local | Served, dict]:
    """Return who answers, and what is known of it: other weights under the same name are another system."""
    if args.backend == "openai":
        if protocol.max_pixels is None:
            raise DataError(
                f"--protocol {args.protocol} leaves the resolution to a checkpoint, which a server does not show; "
                            "expected --max_pixels")
        if protocol.min_pixels is not None:
            log(f"the server decides by itself to which area a small picture is enlarged; --protocol {args.protocol} asks for "
                f"{protocol.min_pixels} pixels at least: see its own settings (vLLM: --mm-processor-kwargs)")
        backend = open_server(args, protocol.max_pixels)
        return Served(backend, args.max_new_tokens, protocol.max_pixels), backend.identity
    qwen = load_with(spec, args.model, args.dtype, protocol.min_pixels, protocol.max_pixels)
    return (Local(qwen, spec, args.max_new_tokens, args.batch_size, args.batch_tokens),
            {"weights": model_identity(find_checkpoint(args.model))})


def open_judge(args: argparse.Namespace, journal: Journal) -> Judge:
    """Return the judge of the flags; texts alone, at temperature 0."""
    backend = HttpBackend(args.judge_model, args.judge_base_url, 1, 28, args.concurrency, args.timeout,
                          args.judge_wait,
                          api_key=read_api_key(args.judge_key_file, "--judge_key_file"))
    return Judge(args.judge, backend, journal, args.judge_max_tokens)


def open_conversations(items: list[dict], protocol: Protocol, args: argparse.Namespace) -> list[Conversation]:
    hashes = {}
    return [Conversation(item, protocol, args.image_root, args.method, hashes) for item in items]


# ------------------------------------------------------------------------------------------------ results
def result_of(conversation: Conversation, system: Local | Served, args: argparse.Namespace) -> dict:
    """Return an item's result. The journal keeps what the model said; what it is worth is decided here, on
    every run."""
    item, said, rotation = conversation.item, conversation.result(), rotation_of(conversation.item)
    return {"id": item["id"], "benchmark": item.get("benchmark"), "category": item.get("category"),
            "group_id": group_of(item), "gold": item["answer"]["value"], "n_options": n_options(item),
            **({} if rotation is None else {"rotation": rotation}), "protocol": args.protocol,
            "method": args.method,
            "pixels": system.pixels, **said, **score(item, said)}


def imagines(method: str) -> object:
    """Return the test for an imagination in a result, None for a method that has none."""
    return {"latent": lambda record: record["n_latent"] > 0,
            "text": lambda record: OPEN in record["clean_output"],
            "tool": lambda record: len(record["turns"]) > 1}.get(method)


def measure(results: list[dict], conversations: list[Conversation], protocol: dict,
            args: argparse.Namespace) -> dict:
    """Return all scores of a run, by category too, and what it cost: seconds of decoding, an item's share of
    its batch's."""
    test, seconds = imagines(args.method), sum(conversation.seconds() for conversation in conversations)
    n_tokens = sum(result["n_tokens"] for result in results)
    parts = {name: summarize(part, test) for name, part in parts_of(results).items()}
    metrics = {**summarize(results, test), "categories": parts, "own_scores": own_scores(results),
               "protocol": protocol}
    metrics["headline"] = headline(metrics, args.allow_incomplete)
    # servers tell none
    prefill = sum(conversation.seconds("prefill_seconds") for conversation in conversations)
    metrics["efficiency"] = {"seconds": round(seconds, 3), "prefill_seconds": round(prefill, 3),
                             "seconds_per_item": round(seconds / len(results), 4),
                             "tokens": n_tokens, "tokens_per_item": round(n_tokens / len(results), 1),
                             "tokens_per_second": round(n_tokens / seconds, 1) if seconds else None}
    return metrics


# ------------------------------------------------------------------------------------------------ the stage
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model",
                        help="checkpoint folder or hub name; with --backend openai the server's name for it")
    parser.add_argument("--items", help="items JSONL")
    parser.add_argument("--benchmark", nargs="+", choices=TABLE, metavar="NAME",
                        help=f"make the items: {', '.join(TABLE)}")
    parser.add_argument("--source", help="the benchmark's own file or folder (default: the hub)")
    parser.add_argument("--revision",
                        help="commit on the hub, 40 hex digits (default: the one that is pinned)")
    parser.add_argument("--prepare", action="store_true", help="write the items and stop")
    parser.add_argument("--compare", nargs="+", metavar="RESULTS",
                        help="two result files on the same items, or several pairs")
    parser.add_argument("--table", nargs="+", metavar="[NAME=]RESULTS",
                        help="the paper's table, of result files")
    parser.add_argument("--output", required=True,
                        help="results JSONL (--compare: a JSON file, --table: Markdown)")
    parser.add_argument("--image_root", help="folder of the images (default: that of the items or source)")
    parser.add_argument("--method", choices=METHODS,
                        help="what comes before the answer (default: direct, or latent)")
    parser.add_argument("--protocol", choices=PROTOCOLS,
                        help="words, system prompt and pixel limits (default: vlmevalkit; "
                        "deepeyes for --method tool)")
    parser.add_argument("--system", help="system prompt in place of the protocol's")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--drop_format_hints", action="store_true",
                        help="do not ask for a bare letter or word")
    parser.add_argument("--min_pixels", type=int,
                        help="area to which an image is enlarged (default: the protocol's)")
    parser.add_argument("--max_pixels", type=int,
                        help="area to which an image is shrunk (default: the protocol's)")
    parser.add_argument("--max_new_tokens", type=parse_count,
                        help="of a turn, latent steps included (default: "
                        f"{MAX_NEW_TOKENS}; {MAX_TOKENS} for --method tool)")
    parser.add_argument("--limit", type=parse_count, help="only the first N items")
    parser.add_argument("--allow_incomplete", action="store_true",
                        help="give a headline number in spite of errors")
    parser.add_argument("--retry_errors", action="store_true", help="ask again where there was an error")
    parser.add_argument("--dry_run", action="store_true", help="show a prompt and count the items; no model")
    parser.add_argument("--backend", choices=("local", "openai"), default="local",
                        help="transformers here, or a server")
    local = parser.add_argument_group("--backend local")
    local.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off",
                       help="family of the latent tokens")
    local.add_argument("--latent_size", type=parse_count, help="latents a segment (default: the family's)")
    local.add_argument("--batch_size", type=parse_count, default=32, help="items a batch, at most")
    local.add_argument("--batch_tokens", type=parse_count, default=65536,
                       help="tokens a batch, at most, replies at full length")
    local.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="auto: bfloat16 on a GPU, else float32")
    add_server_flags(parser, "--backend openai, and the judge", 28)
    judge = parser.add_argument_group("--judge (texts alone; free to change between runs)")
    judge.add_argument("--judge", choices=("none", *KINDS), default="none",
                       help="map: which option is meant, gold not shown; "
                       "grade: is it the gold answer")
    judge.add_argument("--judge_model", help="the name that its server gives it")
    judge.add_argument("--judge_base_url", default="http://127.0.0.1:8001/v1", help="its server")
    judge.add_argument("--judge_key_file", help="file with its key; without it $OPENAI_API_KEY, if set")
    judge.add_argument("--judge_max_tokens", type=parse_count, default=1024,
                       help="of its reply, thoughts included")
    judge.add_argument("--judge_wait", type=float, default=60.0,
                       help="seconds without any reply until it counts as gone")
    judge.add_argument("--judge_all", action="store_true",
                       help="ask about resolved replies too, to count disagreement")
    return check_args(parser, parser.parse_args(argv))


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse flags that cannot go together, and settle defaults that depend on others."""
    if sum(map(bool, (args.items, args.benchmark, args.compare, args.table))) != 1:
        parser.error("expected one of --items, --benchmark, --compare and --table")
    if not (args.compare or args.table or args.prepare) and not args.model:
        parser.error("expected --model")
    args.method = args.method or ("direct" if args.latent == "off" else "latent")
    if (args.method == "latent") != (args.latent != "off"):
        parser.error(
            f"--method {args.method} and --latent {args.latent}: latents need both, other methods neither")
    if args.latent != "off" and args.backend == "openai":
        parser.error("--latent: servers of this kind do not feed latents; expected --backend local")
    args.protocol = args.protocol or ("deepeyes" if args.method == "tool" else "vlmevalkit")
    if (args.method == "tool") != (args.protocol == "deepeyes"):
        parser.error(
            f"--method {args.method} and --protocol {args.protocol}: deepeyes describes the tool, and no other does")
    args.max_new_tokens = args.max_new_tokens or (MAX_TOKENS if args.method == "tool" else MAX_NEW_TOKENS)
    if args.judge != "none" and not args.judge_model:
        parser.error(f"--judge {args.judge} needs --judge_model and --judge_base_url")
    return args


def other_work(args: argparse.Namespace) -> bool:
    """Do what needs no model: --compare or --table; return whether there was any."""
    if args.compare:
        result = compare_all(args.compare)
        write_json(args.output, result)
        for part in result.get("comparisons", [result]):
            log(f"{part['files'][0]} -> {part['files'][1]}: {describe(part)}")
        print(json.dumps(result))
    if args.table:
        text = make_table(args.table)
        replace_file(args.output, lambda file: file.write(text))
        log(text)
        print(json.dumps({"results": len(args.table), "output": args.output}))
    return bool(args.compare or args.table)


def show_prompt(items: list[dict], protocol: Protocol, args: argparse.Namespace) -> int:
    """Show the first prompt and say how long the longest is (--dry_run)."""
    tokenizer = None if args.backend == "openai" else load_processors(args.model)[0]
    prompts = [show_messages(c.messages) if tokenizer is None else render(tokenizer, c.messages)
               for c in open_conversations(items, protocol, args)]
    log(prompts[0])
    print(json.dumps({"items": len(items), "longest_prompt_characters": max(map(len, prompts))}))
    return 0


def answer_and_judge(items: list[dict], protocol: Protocol, spec: LatentSpec | None, args: argparse.Namespace
                     ) -> tuple[list[dict], list[Conversation], list] | None:
    """Return (results, conversations, pixel limits), None while other processes have not done their share."""
    conversations = open_conversations(items, protocol, args)
    system, identity = open_system(args, protocol, spec)
    rank, world, _ = rank_world()
    fixed = ("model", "backend", "method", "protocol", "system", "suffix", "drop_format_hints", "min_pixels",
             "max_pixels",
             "max_new_tokens", "latent", "latent_size", "dtype")
    settings = {name: getattr(args, name) for name in fixed} | identity
    with (Journal(f"{args.output}.run", settings, is_valid=is_turn) as journal,
          Journal(f"{args.output}.run", name="judge", is_valid=REPLY_FIELDS.issubset) as verdicts):
        for key in list(journal):
            if key in journal.transient or (args.retry_errors and "error" in journal.get(key)):
                journal.forget(key)
        judge = None if args.judge == "none" else open_judge(args, verdicts)
        if judge and rank == 0:
            judge.preflight()  # before hours of answering
        if not answer_all(system, conversations, journal, rank, world):
            return None
        results = [result_of(conversation, system, args) for conversation in conversations]
        if judge:
            add_verdicts(judge, items, results, args.judge_all)
    return results, conversations, system.pixels


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    check_output(args.output, [*([args.items] if args.items else []), *(args.compare or []),
                               *(text.rpartition("=")[2] for text in args.table or [])])
    if other_work(args):
        return 0
    items, path = find_items(args)
    if args.prepare:
        print(json.dumps({"items": len(items), "categories": Counter(item.get("category")
                                                                     for item in items)}))
        return 0
    check_scorable(items)
    n_scored = sum(item["metric"] == "likelihood" for item in items)
    if n_scored and (args.method, args.backend) != ("direct", "local"):
        raise DataError(
            f"{path}: {n_scored} items are scored by the likelihood of their options, which needs --method direct "
                        f"and --backend local; got {args.method} and {args.backend}")
    protocol, spec = find_protocol(args), spec_of(args.latent, args.latent_size)
    if args.dry_run:
        return show_prompt(items, protocol, args)
    try:
        found = answer_and_judge(items, protocol, spec, args)
    except ErrorRateError as error:
        log(f"stopped: {error}")
        return 4
    if found is None:
        print(f"process {rank_world()[0]}: its share is done; the last one to finish writes {args.output}. If one is "
              "lost before, the same command goes on from here", file=sys.stderr)
        return 0
    results, conversations, pixels = found
    write_rows(args.output, results)
    described = {"protocol": args.protocol, "method": args.method, "model": args.model,
                 "backend": args.backend, "items": path,
                 "items_sha256": sha256_file(path), "latent": args.latent, "latent_size": spec and spec.size,
                 "system": protocol.system, "suffix": args.suffix, "format_hints": protocol.format_hints,
                 "pixels": pixels,
                 "max_new_tokens": args.max_new_tokens,
                 "prompt_sha": call_key(prompts=[r["prompt_sha"] for r in results])[:16],
                 "judge": "none" if args.judge == "none" else f"{args.judge}:{args.judge_model}"}
    metrics = measure(results, conversations, described | {"line": protocol_line(described)}, args)
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [path], metrics["seconds"])
    show(metrics)
    print(json.dumps(metrics))
    return 3 if metrics["error"] or metrics.get("with_judge", {}).get("judge_errors") else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
