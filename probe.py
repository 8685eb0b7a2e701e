"""Probe imaginations: how similar they are, and what can be answered from them without the image.

Stage 6 of 6:  train_sft.py -> [probe.py] -> figures; items from evaluate.py

    python probe.py --model checkpoint --items vstar.jsonl --probe_items vstar_probe.jsonl --output probe_text
    python probe.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm --output probe_monet
    python probe.py --model checkpoint --items vstar.jsonl --output probe_text --stage analyse    (no model)
    python probe.py derive --help    (let a model write --probe_items)
    python probe.py report runs      (one page, report.html, for all outputs of stages 4 to 6 in a folder)

Reads   --items: items {"id", "question", "options": [[letter, text]], "answer", "images": [{"path"}]} of any
        metric, one file per benchmark; optional "group_id" (one instance is taken per group), "benchmark",
        "category", "hint", "region"
        --probe_items: {"id", "source": id of an item, "question", "options", "answer": {"type": "letter",
        "value"}}, questions about the image of the source
Writes  --output, a folder: states/ (`utils.probe.states`), probes.jsonl (one line per kind, layer, step,
        measure and form: value, low, high, n), similarity.json (its curves), heatmap.png, curves.png,
        layers.png, spectra.png; of latents lens.png (the words and patches nearest to each); with
        --probe_items answers.jsonl ({"id", "source", "donor", "condition", "gold", "pred", "rule", "correct",
        "text", "r0"}) and probing.png; metrics.json. Every PNG has a CSV with its numbers. <output>.meta.json
Prints  a table on stderr; on stdout one JSON object: emission, similarity, what a linear probe reads,
        variance split, accuracy by condition

Kinds of states: `utils.probe.states`; measures: `utils.probe.similarity`, `analysis` and `linear_probe`;
ways to ask the probe questions: `utils.probe.questions`. --crossed A B asks the questions of B items about
the images of A items and splits the variance of the imaginations between the two. --edits changes one thing
of every image or question and measures how far the imagination moves (`utils.probe.input_edits`).
"""
from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.call_flags import add_call_flags
from utils.cli import Help, add_model_flags, cli, log, parse_count, parse_seed
from utils.display import plain_text
from utils.items import ANSWER_TYPES, STEM, group_of, item_fault, prompt_of, read_items
from utils.journal import move_aside, read_settings
from utils.jsonl import (DataError, check_unique, disk_errors, model_identity, read_rows, write_json,
                         write_meta, write_rows)
from utils.latent_families import LatentSpec, spec_of
from utils.probe.report import collect, probe_blocks, write_report
from utils.probe.similarity import LEVEL
from utils.stats import share_interval

if TYPE_CHECKING:
    from utils.probe.states import States
    from utils.qwen import Qwen

PROBE_FIELDS = {"id": str, "source": str, "question": str, "options": list, "answer": dict}
EDITS = ("identity", "image_swap", "question_swap", "mask_relevant", "mask_irrelevant", "brightness", "crop")
TEXT_STEPS = 10  # states of a text imagination that are analysed: as many as Monet has latents
DERIVE = """Let a model write --probe_items: questions about what the items (their "region", if given) show.

    python probe.py derive --items vstar.items.jsonl --image_root . --backend openai --output v_probe.jsonl

One call per source writes --questions candidates. Each one that passes the rules is answered from the image
by --answer_model, with --drop_blind also without it; wrong ones are dropped. <output>.run/verdicts.jsonl has
every candidate with its reason.
"""
STORE_SETTINGS = ("model", "latent", "system", "suffix", "max_new_tokens", "max_pixels", "dtype")


@dataclass
class Inputs:
    """Items by id, probe items, instances to compare, crossed and edited items."""

    items: dict[str, dict]
    probes: list[dict]
    chosen: list[dict]
    grid: list[list[dict]]
    edits: dict[str, list[dict]]

    def to_decode(self) -> dict[str, dict]:
        """Return the unedited items whose states are needed, by id."""
        sources = [self.items[probe["source"]] for probe in self.probes]
        return {item["id"]: item for item in [*self.chosen, *sources, *(i for row in self.grid for i in row)]}


# ---- inputs
def read_item_files(args: Namespace) -> dict[str, dict]:
    """Return items by id, each with its "file" and the "root" of its images."""
    items, seen = {}, {}
    for path in args.items:
        for item in read_items(path, args.limit, tuple(ANSWER_TYPES)):
            if not item["images"]:
                raise DataError(f"{path}: {item['id']}: no image; expected at least one")
            check_unique(path, item["id"], seen)
            items[item["id"]] = item | {"file": path, "root": args.image_root or str(Path(path).parent)}
    if not items:
        raise DataError(f"{' '.join(args.items)}: no items; expected at least one")
    return items


def read_probes(args: Namespace, items: dict[str, dict]) -> list[dict]:
    probes = read_rows(args.probe_items, PROBE_FIELDS, args.limit) if args.probe_items else []
    for probe in probes:
        if fault := item_fault({**probe, "images": [], "metric": "mcq"}, ("mcq",)):
            raise DataError(f"{args.probe_items}: probe item {probe['id']!r}: {fault}")
        if probe["source"] not in items and args.limit is None:
            raise DataError(f"{args.probe_items}: {probe['id']}: source {probe['source']!r} is not in "
                            f"{' '.join(args.items)}; expected the items that the questions are about")
    return [probe for probe in probes if probe["source"] in items]


def choose(items: list[dict], n_items: int) -> list[dict]:
    """Return up to n items, one per image group, evenly spread over every file."""
    files: dict[str, dict[str, dict]] = {}
    for item in items:
        files.setdefault(item["file"], {}).setdefault(group_of(item), item)
    chosen = []
    for k, groups in enumerate(files.values()):
        firsts = list(groups.values())
        n = min(n_items // len(files) + (k < n_items % len(files)), len(firsts))
        chosen += [firsts[i * len(firsts) // n] for i in range(n)]
    return chosen


def read_inputs(args: Namespace) -> Inputs:
    from utils.probe.input_edits import cross_items, edit_items
    items = read_item_files(args)
    chosen = choose(list(items.values()), args.n_items)
    grid = cross_items(chosen, *args.crossed) if args.crossed else []
    edits = {name: edit_items(name, chosen, args.seed) for name in args.edits}
    return Inputs(items, read_probes(args, items), chosen, grid, edits)


# ---- capture, analyse, ask
def fill_store(folder: str | Path, inputs: Inputs, spec: LatentSpec | None, n_steps: int,
               args: Namespace) -> Qwen:
    """Capture the states that the store lacks; return the model."""
    from utils.probe.input_edits import open_edited
    from utils.probe.states import StateWriter, batched, capture
    from utils.qwen import load_with
    qwen = load_with(spec, args.model, args.dtype, None, args.max_pixels)
    settings = {name: getattr(args, name) for name in STORE_SETTINGS}
    settings |= {"steps": n_steps, "weights": model_identity(args.model)}
    settings |= {"force_start": True} if args.force_start else {}
    if args.fresh:
        move_aside(Path(folder), 1)
    with StateWriter(folder, settings) as writer:
        for name, items in {"items": list(inputs.to_decode().values()), **inputs.edits}.items():
            for batch in batched(items, args.batch_size, name):
                if any(item["id"] not in writer for item in batch):
                    capture(qwen, spec, batch, [open_edited(item) for item in batch], n_steps, args, writer,
                            whole=name == "items")
    return qwen


def open_store(folder: str | Path, inputs: Inputs) -> States:
    from utils.probe.states import States
    store = States(folder)
    keys = [*inputs.to_decode(), *(item["id"] for items in inputs.edits.values() for item in items)]
    if missing := [key for key in keys if key not in store.records]:
        raise DataError(f"{folder}: no states of {len(missing)} of {len(keys)} items, the first "
                        f"{missing[0]!r}; run --stage capture with the same flags")
    return store


def analyse(store: States, inputs: Inputs, n_steps: int, args: Namespace) -> dict:
    from utils.probe.analysis import Analysis, summarise
    from utils.probe.input_edits import measure_edits, split_crossed
    output = Path(args.output)
    emitted = [store.records[item["id"]]["emitted"] for item in inputs.chosen]
    instances = [item for item, imagined in zip(inputs.chosen, emitted) if imagined]
    interval = share_interval(emitted, list(map(group_of, inputs.chosen)), LEVEL)
    metrics = {"emission": {"k": len(instances), "n": len(emitted), "ci": interval}}
    if inputs.edits:
        metrics["edits"] = measure_edits(store, inputs.edits, args.seed)
    if len(instances) >= 4:  # two in each half
        analysis = Analysis(store, instances, n_steps, args.seed)
        analysis.run()
        write_rows(output / "probes.jsonl", analysis.rows)
        write_json(output / "similarity.json", analysis.curves())
        analysis.draw(output)
        metrics["similarity"], metrics["decoding"] = summarise(analysis.rows)
    if inputs.grid and store.find("imagination"):
        metrics["crossed"] = split_crossed(store, inputs.grid, args.seed)
    return metrics


def ask(store: States, inputs: Inputs, spec: LatentSpec | None, qwen: Qwen, args: Namespace) -> dict:
    """Ask the probe items whose source imagined something; return the metrics."""
    from utils.probe.figures import draw_probing
    from utils.probe.questions import Prober, list_conditions, rotations, score
    usable = [probe for probe in inputs.probes if store.records[probe["source"]]["emitted"]]
    metrics = {"probe_items_without_imagination": len(inputs.probes) - len(usable)}
    if usable:
        asked = [rotated for probe in usable for rotated in rotations(probe)] if args.circular else usable
        prober = Prober(qwen, spec, inputs.items, store, args)
        rows = prober.ask(asked, list_conditions(spec, args.variants))
        write_rows(Path(args.output) / "answers.jsonl", rows)
        metrics["probing"] = score(rows, asked, {item["id"]: prober.groups[item["source"]] for item in asked})
        draw_probing(metrics["probing"], Path(args.output) / "probing.png")
    return metrics


# ---- the run
def parse_args(argv: list[str] | None = None) -> Namespace:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["derive"]:
        return parse_derive_args(argv[1:])
    if argv[:1] == ["report"]:
        parser = ArgumentParser(prog="probe.py report",
                                description="Gather the outputs of stages 4 to 6 on one page.")
        parser.add_argument("folder", help="folder with the outputs; report.html is written into it")
        parser.set_defaults(task="report")
        return parser.parse_args(argv[1:])
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add_model_flags(parser)
    add("--items", nargs="+", required=True, help="items JSONL from evaluate.py --prepare")
    add("--probe_items", help="JSONL of questions to be answered without the image")
    add("--stage", choices=("all", "capture", "analyse", "lens", "ask"), default="all",
        help="capture states, analyse the store, find the words and patches nearest to its latents, ask the "
             "probe items, or all of these")
    add("--store", help="folder of the states (default: <output>/states)")
    add("--variants", nargs="+", choices=("tokens_only", "cut"), default=["tokens_only"],
        help="how the image is kept from the probe questions")
    add("--reader", help="another checkpoint that answers from what --model imagined")
    add("--stem", default=STEM, help="text that R0 scores options behind")
    add("--circular", action="store_true", help="ask once per rotation of the options")
    add("--crossed", type=parse_count, nargs=2, metavar=("A", "B"), help="images x questions to cross")
    add("--edits", nargs="+", choices=("all", *EDITS), default=[], help="changes of the instances' inputs")
    add("--output", required=True, help="folder to write")
    add("--n_items", type=parse_count, default=100, help="instances compared, evenly spread over the files")
    add("--limit", type=parse_count, help="read only the first N items and probe items")
    add("--dry_run", action="store_true", help="show a prompt and count decodings; writes nothing")
    parser.set_defaults(task="probe")
    if argv and not argv[0].startswith("-"):
        parser.error(f"{argv[0]!r}: expected derive, report, or flags")
    args = parser.parse_args(argv)
    if args.fresh and args.stage not in ("all", "capture"):
        parser.error(f"--fresh with --stage {args.stage}: states are captured anew; expected all or capture")
    args.edits = list(EDITS) if "all" in args.edits else list(dict.fromkeys(args.edits))
    if args.stage == "lens" and args.latent == "off":
        parser.error("--stage lens looks at latents; expected --latent with the family of the store")
    if args.reader and "cut" in args.variants:
        parser.error("--variants cut keeps states of the model that read the image; expected no --reader")
    return args


def parse_derive_args(argv: list[str]) -> Namespace:
    parser = ArgumentParser(prog="probe.py derive", description=DERIVE, formatter_class=Help)
    add = parser.add_argument
    add("--items", required=True, help="items JSONL from evaluate.py --prepare")
    add_call_flags(parser, max_new_tokens=1536)
    add("--questions", type=parse_count, default=3, help="candidates per source")
    add("--answer_model", help="the model that answers the candidates (default: --model)")
    add("--answer_backend", choices=("local", "openai"),
        help="the backend of --answer_model (default: --backend)")
    add("--answer_base_url", help="the server of --answer_model (default: --base_url)")
    add("--drop_blind", action="store_true", help="drop questions answered right without the image")
    add("--seed", type=parse_seed, default=0, help="of the orders of options")
    parser.set_defaults(task="derive")
    args = parser.parse_args(argv)
    if (args.answer_backend or args.answer_base_url) and not args.answer_model:
        parser.error("--answer_backend and --answer_base_url need --answer_model; expected it too")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.task == "report":
        blocks = collect(args.folder)
        summary = write_report(args.folder, f"Report of {Path(args.folder).name}", blocks)
        log(plain_text(blocks))
        print(json.dumps(summary))
        return 0
    if args.task == "derive":
        from utils.probe.derive import derive_questions
        return derive_questions(args)
    spec = spec_of(args.latent, None, args.force_start)
    n_steps = spec.size if spec else TEXT_STEPS
    inputs = read_inputs(args)
    metrics = preview(inputs, spec, args) if args.dry_run else run(inputs, spec, n_steps, args)
    print(json.dumps(metrics))
    return 0


def preview(inputs: Inputs, spec: LatentSpec | None, args: Namespace) -> dict:
    """Show a prompt; return the counts of a run (--dry_run)."""
    from utils.probe.questions import list_conditions
    from utils.qwen import load_processors
    first = inputs.chosen[0]
    tokenizer = load_processors(args.model)[0]
    log(prompt_of(tokenizer, first, len(first["images"]), args.system, args.suffix))
    n_asked = sum(len(probe["options"]) if args.circular else 1 for probe in inputs.probes)
    n_decoded = (2 if spec else 1) * len(inputs.to_decode()) + sum(map(len, inputs.edits.values()))
    return {"instances": len(inputs.chosen), "probe_items": len(inputs.probes),
            "decodings_at_most": n_decoded + n_asked * len(list_conditions(spec, args.variants))}


def run(inputs: Inputs, spec: LatentSpec | None, n_steps: int, args: Namespace) -> dict:
    from utils.qwen import load_with
    began, output, qwen = time.monotonic(), Path(args.output), None
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    folder, path = args.store or output / "states", output / "metrics.json"
    if args.stage in ("all", "capture"):
        qwen = fill_store(folder, inputs, spec, n_steps, args)
    store = open_store(folder, inputs)
    metrics = {"stage": "probe", "model": args.model, "items": args.items, "latent": args.latent,
               "force_start": bool(spec and spec.force_start), "steps": n_steps, "level": LEVEL,
               "similarity": None, "decoding": None, "crossed": None, "lens": None, "probing": None}
    if args.stage != "all" and path.is_file():  # the other stages of an earlier run
        metrics |= read_settings(output, path.name)
    if args.stage in ("all", "analyse"):
        metrics |= analyse(store, inputs, n_steps, args)
    if spec and args.stage in ("all", "lens"):
        from utils.probe.analysis import look, see
        qwen = qwen or load_with(spec, args.model, args.dtype, None, args.max_pixels)
        metrics["lens"] = look(qwen, see(qwen, store, inputs.chosen, n_steps), output, args.seed)
    if args.stage in ("all", "ask"):
        if args.reader or not qwen:
            qwen = None  # one model in memory at a time
            qwen = load_with(None if args.reader else spec, args.reader or args.model, args.dtype, None,
                             args.max_pixels)
        metrics |= {"reader": args.reader, "stem": args.stem, "scored_options": args.options}
        metrics |= ask(store, inputs, spec, qwen, args)
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_json(path, metrics)
    write_meta(args.output, args, [path for path in (*args.items, args.probe_items) if path],
               metrics["seconds"])
    log(plain_text(probe_blocks(metrics)))
    return metrics


if __name__ == "__main__":
    raise SystemExit(cli(main))
