"""Answer benchmark items with a model and score the answers, by rules that never guess.

Stage 4 of 6:  train_sft.py -> [evaluate.py] -> intervene.py, probe.py    (one reply an item)

    python evaluate.py --model checkpoint --items bench.jsonl --output results.jsonl
    python evaluate.py --model checkpoint --benchmark vsp --source vsp/test.jsonl --output vsp.jsonl
    python evaluate.py --benchmark vsp --source vsp/test.jsonl --prepare --output vsp.jsonl
    python evaluate.py --compare base.jsonl text.jsonl --output base_text.json

Reads   --items: JSONL items {"id", "question", "options": [[letter, text]], "answer": {"type", "value"}, "images":
        [{"path"}], "metric": mcq | vsp_path} and, if there, "category", "group_id", "hint"; or --source, which
        --benchmark turns into such items at <output>.items.jsonl, pictures in <output>.images (--prepare stops there)
Writes  --output: a JSON line an item, in input order: {"id", "category", "group_id", "prompt_sha", "image_grids",
        "raw_output", "clean_output", "finish_reason", "n_tokens", "n_latent", "extraction": {"value", "rule"}, "verdict":
        correct | incorrect | unresolved | error, "gold", "n_options"} and, after an error, its reason as "error";
        <output>.metrics.json, <output>.meta.json, <output>.run/ (what was said; scoring is done anew on every run)
Prints  a table by category on stderr; on stdout one JSON object: counts, accuracy with its interval, protocol

Unresolved answers count as wrong. An item whose image cannot be used is an error: it is not scored, the result says
"incomplete", and the exit code is 3. Killed, the same command goes on. Other exit codes: 0 complete, 2 usage, settings or
damage, 130 interrupted.
"""
import argparse
import hashlib
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from utils.answers import extract_choice, vsp_moves, walk_vsp
from utils.backends import find_checkpoint, model_identity
from utils.decode import PRESETS, Generation, LatentSpec, clean_text, generate
from utils.images import ImageError, read_bytes, resolve_image
from utils.items import board_fault, open_images, question_text, read_items
from utils.journal import Journal
from utils.qwen import Qwen, chat, encode, load, load_processors
from utils.rows import (DataError, call_key, check_fields, cli, located_rows, log, rank_world, read_rows,
                        sha256_file, write_json, write_meta, write_rows)
from utils.stats import cluster_bootstrap, mcnemar_exact, tango_ci, wilson

VERDICTS = ("correct", "incorrect", "unresolved", "error")
VSP_SIZE = (400, 100)  # problems in all, and in each of the levels 3 to 6 (UMass-Embodied-AGI/Mirage, test set)


# ------------------------------------------------------------------------------------------------ benchmarks -> items
def prepare_vsp(source: str, limit: int | None) -> list[dict]:
    """VSP spatial planning as Mirage evaluates it: the text verbatim, its <image> marker says where the map stands.

    The gold is the map itself: 1 start, 2 goal, -1 hole, 0 safe; a reply is right if its path walks to the goal.
    """
    items = []
    for where, row in located_rows(source, limit):
        check_fields(where, row, {"text_input": str, "image_input": str, "map_id": str, "map_desc": list})
        if fault := board_fault(row["map_desc"]):
            raise DataError(f"{where}: map_desc {fault}")
        level = len(row["map_desc"])
        name = f"vsp/level_{level}/{row['map_id']}"
        items.append({"id": name, "benchmark": "vsp", "category": f"level_{level}", "group_id": name,
                      "question": row["text_input"], "options": [], "answer": {"type": "path_map", "value": row["map_desc"]},
                      "images": [{"path": row["image_input"]}], "metric": "vsp_path"})
    levels = Counter(item["category"] for item in items)
    if limit is None and (len(items) != VSP_SIZE[0] or set(levels.values()) != {VSP_SIZE[1]}):
        raise DataError(f"{source}: {len(items)} problems, {dict(levels)}; expected {VSP_SIZE[0]}, {VSP_SIZE[1]} a level")
    return items


PREPARE = {"vsp": prepare_vsp}


def collect_images(items: list[dict], root: str, folder: Path) -> None:
    """Copy the items' pictures, bytes untouched, into `folder` under their hash, and let the items point there."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        for image in item["images"]:
            path = resolve_image(root, image["path"])
            data = read_bytes(path)
            image["sha256"] = hashlib.sha256(data).hexdigest()
            image["path"] = f"{folder.name}/{image['sha256'][:16]}{path.suffix}"
            (folder.parent / image["path"]).write_bytes(data)


# ------------------------------------------------------------------------------------------------ scoring
def score_mcq(item: dict, text: str, finish: str) -> tuple[str, dict]:
    """Return (verdict, extraction) of a multiple-choice reply."""
    found = extract_choice(text, dict(map(tuple, item["options"])), finish)
    verdict = "unresolved" if found.letter is None else \
        "correct" if found.letter == item["answer"]["value"] else "incorrect"
    return verdict, {"value": found.letter, "rule": found.rule}


def score_vsp(item: dict, text: str, finish: str) -> tuple[str, dict]:
    """Return (verdict, extraction) of a path: walked on the map as Mirage's simulate_vsp does; no box is unresolved."""
    moves = vsp_moves(text)
    if moves is None:
        return "unresolved", {"value": None, "rule": "no_box"}
    return "correct" if walk_vsp(item["answer"]["value"], text) else "incorrect", {"value": moves, "rule": "boxed_path"}


SCORE = {"mcq": score_mcq, "vsp_path": score_vsp}


# ------------------------------------------------------------------------------------------------ answering
def make_prompts(tokenizer, items: list[dict], args: argparse.Namespace) -> list[str]:
    """Return every item's prompt as the checkpoint's chat template writes it."""
    prompts = []
    for item in items:
        try:
            prompts.append(chat(tokenizer, question_text(item, args.suffix), len(item["images"]), args.system))
        except DataError as error:
            raise DataError(f"item {item['id']!r}: {error}") from error
    return prompts


def make_keys(items: list[dict], prompts: list[str], root: str) -> list[str]:
    """Return what each reply is known by: its prompt and its pictures' bytes. One that is mended is asked again."""
    hashes = {}
    for image in (image["path"] for item in items for image in item["images"]):
        if image not in hashes:
            try:
                hashes[image] = hashlib.sha256(read_bytes(resolve_image(root, image))).hexdigest()
            except ImageError as error:
                hashes[image] = error.reason
    return [call_key(id=item["id"], prompt=prompt, images=[hashes[image["path"]] for image in item["images"]])
            for item, prompt in zip(items, prompts)]


def answer_batch(qwen: Qwen, spec: LatentSpec | None, batch: list[tuple[dict, str, str]], args: argparse.Namespace,
                 journal: Journal) -> None:
    """Answer a batch of (item, prompt, key) and journal each reply; an unusable image is an error of its item alone."""
    opened, records = [], []
    for item, prompt, key in batch:
        try:
            opened.append((key, prompt, open_images(item, args.image_root)))
        except ImageError as error:
            log(f"{item['id']}: {error}")
            records.append({"key": key, "error": error.reason})
    if opened:
        inputs = encode(qwen, [prompt for _, prompt, _ in opened], [images for *_, images in opened])
        grids = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [])
        for (key, _, images), row in zip(opened, generate(qwen, inputs, args.max_new_tokens, spec)):
            records.append({"key": key, **describe(qwen, spec, row), "image_grids": [next(grids) for _ in images]})
    for record in records:
        if record["key"] not in journal:  # a batch that a kill left half done is computed again whole
            journal.append(record)


def describe(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> dict:
    """Return what one reply was; its clean text holds no latent positions and no control tokens."""
    return {"raw_output": qwen.tokenizer.decode(row.ids), "clean_output": clean_text(qwen.tokenizer, row.ids, spec),
            "finish_reason": row.finish, "n_tokens": len(row.ids),
            "n_latent": sum(segment.size for segment in row.segments)}


NO_REPLY = {"raw_output": None, "clean_output": None, "finish_reason": None, "n_tokens": 0, "n_latent": 0,
            "image_grids": []}


def score(item: dict, prompt: str, record: dict) -> dict:
    """Return an item's result. The journal keeps what the model said; what it is worth is decided here, on every run."""
    if "error" in record:
        verdict, extraction = "error", {"value": None, "rule": record["error"]}
    else:
        verdict, extraction = SCORE[item["metric"]](item, record["clean_output"], record["finish_reason"])
    return {"id": item["id"], "category": item.get("category"), "group_id": item.get("group_id") or item["id"],
            "gold": item["answer"]["value"], "n_options": len(item["options"]),
            "prompt_sha": call_key(prompt=prompt)[:16],
            **NO_REPLY, **{name: value for name, value in record.items() if name != "key"},
            "extraction": extraction, "verdict": verdict}


# ------------------------------------------------------------------------------------------------ results
def summarize(records: list[dict], with_latents: bool) -> dict:
    """Return counts, accuracy and intervals of some records; errors are left out of the accuracy and make it incomplete.

    The 95 % interval is Wilson's; where several records share a group, the cluster bootstrap's stands beside it.
    """
    counts = Counter(record["verdict"] for record in records)
    scored = [record for record in records if record["verdict"] != "error"]
    n, groups = len(scored), [record["group_id"] for record in scored]
    result = {"n": n, **{verdict: counts[verdict] for verdict in VERDICTS}, "accuracy": counts["correct"] / n if n else None,
              "ci95": wilson(counts["correct"], n) if n else None, "incomplete": counts["error"] > 0}
    if 1 < len(set(groups)) < n:
        result["ci95_clustered"] = cluster_bootstrap([r["verdict"] == "correct" for r in scored], groups, level=0.95)
    if n:
        result |= {"truncated": sum(record["finish_reason"] == "length" for record in scored),
                   "mean_tokens": sum(record["n_tokens"] for record in scored) / n,
                   "rules": dict(Counter(record["extraction"]["rule"] for record in scored).most_common())}
        options = [record["n_options"] for record in scored]
        result["chance"] = sum(1 / k for k in options) / n if all(options) else None
    if with_latents and n:
        k = sum(record["n_latent"] > 0 for record in scored)
        result["emission"] = {"k": k, "n": n, "share": k / n, "ci95": wilson(k, n)}
    return result


def show(metrics: dict) -> None:
    """Log a line a category."""
    log(f"{'category':<22}{'n':>7}{'correct':>9}{'accuracy':>10}   95 % interval{'unresolved':>13}{'errors':>8}{'tokens':>8}")
    for name, part in {**metrics["categories"], "all": metrics}.items():
        if part["n"]:
            low, high = part["ci95"]
            log(f"{name:<22}{part['n']:>7}{part['correct']:>9}{part['accuracy']:>10.1%}   {low:.1%} to {high:.1%}"
                f"{part['unresolved']:>11}{part['error']:>8}{part['mean_tokens']:>8.0f}")


def compare(paths: list[str]) -> dict:
    """Return the difference between two result files on the same items: Tango interval, exact McNemar, flipped ids.

    Items that are an error in either file are left out and counted. Tango and McNemar take items as independent; where
    several share a group, the cluster bootstrap's interval stands beside them.
    """
    where, sides = f"--compare {' '.join(paths)}", []
    for path in paths:
        sides.append({row["id"]: row for row in read_rows(path, {"id": str, "verdict": str})})
    if set(sides[0]) != set(sides[1]):
        odd = sorted(set(sides[0]) ^ set(sides[1]))
        raise DataError(f"{where}: {len(odd)} items stand in one file only ({odd[0]}, ...); expected the same items")
    pairs = [(row, sides[1][name]) for name, row in sides[0].items()]
    if other := [one["id"] for one, two in pairs if one.get("gold") != two.get("gold")]:
        raise DataError(f"{where}: {len(other)} items have another gold ({other[0]}, ...); expected the same items")
    pairs = [pair for pair in pairs if "error" not in (pair[0]["verdict"], pair[1]["verdict"])]
    if not pairs:
        raise DataError(f"{where}: no item is answered in both; expected at least one")
    n, groups = len(pairs), [one.get("group_id", one["id"]) for one, _ in pairs]
    right = [[row["verdict"] == "correct" for row in side] for side in zip(*pairs)]
    lost, won = ([one["id"] for (one, _), before, after in zip(pairs, *right) if (before, after) == change]
                 for change in ((True, False), (False, True)))
    result = {"n": n, "errors": len(sides[0]) - n, "incomplete": len(sides[0]) > n,
              "accuracy": [sum(side) / n for side in right], "difference": (len(won) - len(lost)) / n,
              "ci95": tango_ci(len(lost), len(won), n, level=0.95),
              "mcnemar_p": mcnemar_exact(len(lost), len(won)), "right_to_wrong": lost, "wrong_to_right": won}
    if 1 < len(set(groups)) < n:
        changes = [after - before for before, after in zip(*right)]
        result["ci95_clustered"] = cluster_bootstrap(changes, groups, level=0.95)
    return result


# ------------------------------------------------------------------------------------------------ the stage
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder or hub name")
    parser.add_argument("--items", default=None, help="items JSONL")
    parser.add_argument("--benchmark", choices=sorted(PREPARE), default=None, help="make the items from --source")
    parser.add_argument("--source", default=None, help="the benchmark's own file")
    parser.add_argument("--prepare", action="store_true", help="write the items and stop")
    parser.add_argument("--compare", nargs=2, metavar="RESULTS", default=None, help="two result files on the same items")
    parser.add_argument("--output", required=True, help="results JSONL (--compare: a JSON file)")
    parser.add_argument("--image_root", default=None, help="folder of the images (default: that of the items or source)")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off", help="family of the latent tokens")
    parser.add_argument("--latent_size", type=int, default=None, help="latents a segment (default: the family's)")
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="of a reply, latent steps included (VLMEvalKit's)")
    parser.add_argument("--batch_size", type=int, default=8, help="items a batch")
    parser.add_argument("--min_pixels", type=int, default=None, help="area to which an image is enlarged")
    parser.add_argument("--max_pixels", type=int, default=None, help="area to which an image is shrunk")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--limit", type=int, default=None, help="only the first N items")
    parser.add_argument("--dry_run", action="store_true", help="show a prompt and count the items; no model")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "latent_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    if not args.compare and (args.items is None) == (args.benchmark is None):
        parser.error("expected either --items, or --benchmark with --source, or --compare")
    if args.benchmark and not args.source:
        parser.error(f"--benchmark {args.benchmark} needs --source, the benchmark's own file")
    if not (args.compare or args.prepare) and not args.model:
        parser.error("expected --model")
    return args


def find_items(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Return the items and the file that holds them; --benchmark writes it and its pictures. Settles --image_root."""
    path = args.items
    if args.benchmark:
        path = f"{args.output}.items.jsonl"
        made = PREPARE[args.benchmark](args.source, args.limit)
        collect_images(made, args.image_root or str(Path(args.source).parent), Path(f"{args.output}.images"))
        write_rows(path, made)
        args.image_root = str(Path(path).parent)
    args.image_root = args.image_root or str(Path(path).parent)
    items = read_items(path, args.limit)
    if not items:
        raise DataError(f"{path}: no items; expected at least one")
    return items, path


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    if args.compare:
        result = compare(args.compare)
        write_json(args.output, result)
        print(json.dumps(result))
        return 0
    items, path = find_items(args)
    if args.prepare:
        print(json.dumps({"items": len(items), "categories": Counter(item.get("category") for item in items)}))
        return 0
    tokenizer, _ = load_processors(args.model)
    prompts = make_prompts(tokenizer, items, args)
    if args.dry_run:
        log(prompts[0])
        print(json.dumps({"items": len(items), "longest_prompt_characters": max(map(len, prompts))}))
        return 0
    rank, world, local_rank = rank_world()
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    qwen = load(args.model, args.dtype, device, args.min_pixels, args.max_pixels)
    spec = None if args.latent == "off" else replace(PRESETS[args.latent],
                                                     size=args.latent_size or PRESETS[args.latent].size)
    free = ("output", "source", "image_root", "prepare", "compare", "dry_run", "limit", "items", "batch_size")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["weights"] = model_identity(find_checkpoint(args.model))  # a name may come to hold another training
    keys = make_keys(items, prompts, args.image_root)
    # Items of like length together, in an order that does not depend on what is done already.
    asked = sorted(zip(items, prompts, keys), key=lambda parts: (-len(parts[1]), parts[0]["id"]))
    batches = [asked[i:i + args.batch_size] for i in range(0, len(asked), args.batch_size)]
    with Journal(f"{args.output}.run", settings) as journal:
        for batch in tqdm(batches[rank::world], desc="evaluate", unit="batch", disable=rank > 0):
            if not all(key in journal for *_, key in batch):
                answer_batch(qwen, spec, batch, args, journal)
        if world > 1:  # the rank that finds every record in the journals is the last one, and writes
            journal.reload()
        found = [journal.get(key) for key in keys]
    if not all(found):
        return 0
    records = [score(*parts) for parts in zip(items, prompts, found)]
    write_rows(args.output, records)
    protocol = {"model": args.model, "items": path, "items_sha256": sha256_file(path), "latent": args.latent,
                "latent_size": spec.size if spec else None, "system": args.system, "suffix": args.suffix, "judge": "none",
                "pixels": [qwen.image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")]}
    names = sorted({record["category"] for record in records if record["category"] is not None})
    parts = {name: summarize([r for r in records if r["category"] == name], spec is not None) for name in names}
    metrics = {**summarize(records, spec is not None), "categories": parts, "protocol": protocol,
               "seconds": round(time.monotonic() - began, 1)}
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [path], metrics["seconds"])
    show(metrics)
    print(json.dumps(metrics))
    return 3 if metrics["error"] else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
