"""Change what a model imagines, in latents or in text, and measure how its answers change.

Stage 5 of 6:  train_sft.py -> [intervene.py] -> figures; items from evaluate.py

    python intervene.py --model checkpoint --items vstar.jsonl --output text.jsonl
    python intervene.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm \
      --output monet.jsonl
    torchrun --standalone --nproc_per_node 8 intervene.py --model checkpoint --items hrbench_4k.jsonl \
      --output text.jsonl

Reads   --items: VSP's planning items, or {"id", "question", "options": [[letter, text]], "answer": {"type":
        "letter", "value"}, "images": [{"path"}], "metric": "mcq"}; optionally "group_id", "category", "hint",
        "region" ([left, top, right, bottom] in pixels of the first image), "counterfactual"
        ({"images", "answer"} of an answer-changing edit, and "question", "options" where they differ),
        "helper" ({"path"} of the image that an imagination should show; by default the region, cropped)
Writes  --output: one JSON line per item and condition, "clean" first: {"id", "group", "category", "gold",
        "condition", "site", "emitted_clean", "emitted", "segments" or "spans", "again", "n_forbidden",
        "n_fed", "rel_change", "reach", "donor", "edit", "r0", "r1", "text", "finish", "n_new", "pred",
        "rule", "correct", "changed", "first_diff", "degenerate", "reason"; of do(X) also "asked",
        "same_answer"}; <output>.metrics.json; <output>.meta.json; figures with CSV files:
        <output>.effects.png, .mediation.png, .attention.png, and of sweeps .map.png,
        .positions.png, .doses.png; <output>.run/, the journal to resume from
Prints  emission and a table of the conditions on stderr; on stdout one JSON object: emission, effects with
        intervals, verdicts

Readouts: R0 scores the options behind a stem right after the imagination, R1 behind the clean run's own words
there, R2 is the free reply, parsed after the last imagination. Effects are taken only on items that
imagined something in the clean run. "No effect" is claimed only by an equivalence test within --margin
(points) or --margin_nll (nats), and nothing by a readout that the positive control does not move: "blank",
the image greyed and all after it generated again, which is always run. Exit codes: 0 complete; 3 complete,
but images of some items failed; 2 usage, settings, damage or a broken guard; 4 too many failed images; 130
interrupted.
"""
from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.cli import (Help, add_model_flags, cli, log, parse_count, parse_number, parse_temperature,
                       rank_world, read_api_key)
from utils.display import Block, Table, Text, intervene_blocks, percent, plain_text, summary, swept
from utils.images import ImageError
from utils.intervene.edits import open_others, planning_item
from utils.intervene.effects import POSITIVE_CONTROL, Declared, Limits, summarize
from utils.intervene.latent_conditions import (CONDITIONS, CONTROLS, DO_X, PRESET_CONDITIONS, canonical,
                                               find_condition)
from utils.intervene.mediation import detectable_difference, items_with_no_change, margin_shown
from utils.intervene.sweeps import dose_trends, draw_sweeps, sweep_conditions
from utils.intervene.text_conditions import TEXT_CONDITIONS, TEXT_CONTROLS, TEXT_PRESETS, make_caller
from utils.items import STEM, group_of, open_images, prompt_of, read_items
from utils.journal import Journal, move_aside
from utils.jsonl import (DataError, call_key, check_output, load_object, model_identity, sha256_file,
                         write_json, write_meta, write_rows)
from utils.latent_families import LatentSpec, spec_of
from utils.model_calls import Caller, is_reply
from utils.openai_backend import HttpBackend
from utils.stats import effective_groups

if TYPE_CHECKING:
    from utils.intervene.prompts import Settings
    from utils.qwen import Qwen

MAX_ERROR_SHARE = 0.1  # of items whose images fail, before the run is refused
PSI = (0.02, 0.05, 0.10, 0.20)  # shares of answers that change, for which --dry_run plans
# may change between restarts: settings of the summary, and conditions, which may be added
FREE_SETTINGS = ("items", "output", "image_root", "conditions", "margin", "margin_nll", "min_emitters",
                 "fresh", "dry_run", "editor_url", "api_key_file")
# family -> benchmark, model, columns and rows, accuracy in %; TRT (arXiv 2605.21642): identity, random, zero
PUBLISHED = {
    "mirage": ("vsp", "Mirage-7B on VSP's 400 problems", ["CapImagine, stage 1", "stage 2", "TRT"],
               {"clean": "64.2 77.0 76.25", "tau": "64.0 77.2 -", "add_noise": "64.0 76.7 -",
                "norm_noise": "64.5 76.2 74.75", "near_zero": "65.0 35.5 51.50"}),
    "covt": ("cv_bench/2D", "CoVT of LLaVA-13B (not of Qwen2.5-VL) on CV-Bench 2D", ["TRT"],
             {"clean": "76.26", "norm_noise": "21.39", "near_zero": "58.97"}),
    "mull": ("blink/", "Mull-Tokens of Qwen2.5-VL-7B on BLINK, mean", ["TRT"],
             {"clean": "63.71", "norm_noise": "63.86", "near_zero": "63.43"})}
DECLARED = ("conditions", "margin", "margin_nll", "min_emitters")


# ---- decoding
@dataclass
class Run:
    """What a run works with. `decode(items, images, counterfactuals)` returns {condition: record} for each
    item; `exact`: float32, where a row does not depend on the batch beyond the last bits."""

    args: Namespace
    journal: Journal
    decode: Callable[[list[dict], list[list], list], list[dict[str, dict]]]
    latent: bool
    exact: bool

    @property
    def names(self) -> list[str]:
        return ["clean", *self.args.conditions]

    def get(self, item: dict, condition: str) -> dict | None:
        """Return the record of a decoding, if it was made; a failed clean one counts for all conditions."""
        clean = self.journal.get(call_key(item=item["id"], condition="clean"))
        if clean and "error" in clean["record"]:
            return clean["record"]
        line = self.journal.get(call_key(item=item["id"], condition=condition))
        return line and line["record"]

    def put(self, item: dict, condition: str, record: dict) -> None:
        self.journal.append({"key": call_key(item=item["id"], condition=condition), "record": record})

    def is_done(self, items: list[dict]) -> bool:
        return all(self.get(item, name) is not None for item in items for name in self.names)


def run_batch(run: Run, batch: list[dict]) -> None:
    """Decode a batch, always in the same composition; keep the records that are missing."""
    if run.is_done(batch):
        return
    root, opened = run.args.image_root, []
    for item in batch:
        try:
            images = open_images(item, root)
            opened.append((item, images, open_others(item, images, root)))
        except ImageError as error:
            log(f"{item['id']}: {error}")
            if run.get(item, "clean") is None:
                run.put(item, "clean", {"error": error.reason})
    if not opened:
        return
    items, images, others = map(list, zip(*opened))
    for item, records in zip(items, run.decode(items, images, others)):
        for name in run.names:
            record = records[name]
            if run.latent and name != "clean" and "reason" not in record:
                check_guards(item["id"], name, records["clean"], record, run.exact)
            if run.get(item, name) is None:
                run.put(item, name, record)


def check_guards(name: str, condition: str, clean: dict, record: dict, exact: bool) -> None:
    """Raise DataError where an intervention did what it must not do, or did nothing. Below float32 (`exact`
    false) rounding alone may change ids."""
    entry, is_control, differs = find_condition(condition)[0], condition in CONTROLS, record["first_diff"]
    if not clean["segments"]:
        if differs is not None:
            raise DataError(f"{name}: {condition} changed id {differs}, but the clean run has no latents; "
                            "expected the same ids")
        return
    if entry.prompt != "own" or entry.site == "none":
        return
    first = clean["segments"][0]["start"]
    if exact and differs is not None and (is_control or differs < first):
        where = "throughout" if is_control else "before the latents"
        raise DataError(f"{name}: {condition} changed id {differs} (first latent at {first}), expected the "
                        f"clean run's ids {where}; try --batch_size 1")
    if entry.site != "fed" or is_control or not record["n_fed"]:
        return
    if not (record["rel_change"] or 0) > 0:
        raise DataError(f"{name}: {condition} fed the clean latents (relative change "
                        f"{record['rel_change']}), expected others; is its number 0, or are all latents of "
                        "this model the same vector?")
    if not record["reach"] > 0:
        raise DataError(f"{name}: {condition} left every layer's input at the latent positions as it was; "
                        "expected a change")


def make_decoder(args: Namespace, qwen: Qwen, spec: LatentSpec | None, settings: Settings,
                 calibration: object, editor: Caller | None) -> Callable:
    """Return what decodes a batch: on latents, or on text where `spec` is None."""
    from utils.intervene.latent_batch import LatentBatch
    from utils.intervene.text_batch import TextBatch

    def decode(*batch) -> list[dict[str, dict]]:
        runs = (LatentBatch(qwen, spec, calibration, settings, *batch) if spec
                else TextBatch(qwen, settings, *batch, editor))
        return runs.records(args.conditions)

    return decode


# ---- the run
def split_items(args: Namespace) -> tuple[list[dict], list[dict]]:
    """Return (calibration items, analysed items)."""
    n_calibration = args.calibration if args.latent != "off" else 0
    items = read_items(args.items, None if args.limit is None else n_calibration + args.limit)
    if len(items) <= n_calibration:
        raise DataError(f"{args.items}: {len(items)} items, of which --calibration takes {n_calibration}; "
                        "expected more, or a smaller --calibration")
    items = [planning_item(item, args.seed) if item["metric"] == "vsp_path" else item for item in items]
    return items[:n_calibration], items[n_calibration:]


def batches_of(items: list[dict], size: int) -> list[list[dict]]:
    """Return the batches; a single item left over joins the batch before: it needs donors."""
    batches = [items[i:i + size] for i in range(0, len(items), size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def declare(args: Namespace) -> dict[str, Declared]:
    """Return the site and the role of every condition, before any is run."""
    is_text, points = args.latent == "off", swept(args.conditions)
    controls, declared = TEXT_CONTROLS if is_text else CONTROLS, {}
    for name in args.conditions:
        entry = TEXT_CONDITIONS[name] if is_text else find_condition(name)[0]
        role = ("positive control" if name == POSITIVE_CONTROL else "control" if name in controls
                else "point" if name in points else "do(X)" if name in DO_X
                else "do(Z)" if entry.prompt in ("own", "blind") else "world")
        declared[name] = Declared("text" if is_text else entry.site, role)
    return declared


def export(run: Run, items: list[dict]) -> dict[str, dict[str, dict]]:
    """Write the records in order of items and conditions; return them by id and condition."""
    sites, records, rows = {"clean": None}, {}, []
    sites |= {name: condition.site for name, condition in declare(run.args).items()}
    for item in items:
        clean = run.get(item, "clean")
        names = ["clean"] if "error" in clean else run.names
        records[item["id"]] = {name: run.get(item, name) for name in names}
        for name, record in records[item["id"]].items():
            rows.append({"id": item["id"], "group": group_of(item), "category": item.get("category"),
                         "gold": item["answer"]["value"], "condition": name, "site": sites[name],
                         "emitted_clean": clean.get("emitted"),
                         **{key: value for key, value in record.items() if key not in ("ids", "vectors")}})
    write_rows(run.args.output, rows)
    return records


def plan(args: Namespace, items: list[dict]) -> dict:
    """Return what these items can show at 80 % power, for shares of changed answers. Groups count, not
    items: the data may not show that the items of a group vary on their own."""
    n = effective_groups(list(map(group_of, items)))
    changed = {psi: {"smallest_margin": margin_shown(psi, n),
                     "difference_found": round(detectable_difference(psi, n), 4)} for psi in PSI}
    return {"effective_groups": round(n, 1), "groups_if_nothing_changes": items_with_no_change(args.margin),
            "with_changed_answers": changed}


def published_blocks(items: list[dict], metrics: dict) -> list[Block]:
    """Return what is published of a family on this benchmark next to this run of a model of its kind."""
    if metrics["latent"] not in PUBLISHED:
        return []
    benchmark, model, columns, published = PUBLISHED[metrics["latent"]]
    names = {"vsp" if item["metric"] == "vsp_path" else item.get("benchmark") or "" for item in items}
    if not all(name.startswith(benchmark) for name in names):
        return []
    shown = {name: (entry["effect"] or {}).get("acc_int") for name, entry in metrics["conditions"].items()}
    shown["clean"] = metrics["acc_clean_emitters"]["share"]
    rows = [[name, percent(shown.get(name)), *row.split()] for name, row in published.items()]
    return [Text(f"Published runs of {model}, accuracy in %."),
            Table(["condition", "this run", *columns], rows)]


def open_journal(args: Namespace) -> Journal:
    folder = Path(f"{args.output}.run")
    if args.fresh:
        move_aside(folder, rank_world()[1])
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    return Journal(folder, {**settings, "items": sha256_file(args.items),
                            "weights": model_identity(args.model)})


def declared_anew(args: Namespace, folder: Path) -> dict[str, list]:
    """Return {flag: [value of the first start, value now]} of what verdicts have to be declared by."""
    path, now = folder / "declared.json", {name: getattr(args, name) for name in DECLARED}
    if not path.is_file():
        write_json(path, now)
    first = load_object(path, "move the folder away, or use --fresh")
    return {name: [first.get(name), value] for name, value in now.items() if first.get(name) != value}


def open_editor(args: Namespace, stack: ExitStack) -> Caller | None:
    """Return the caller of directed_llm, if that is among the conditions."""
    if "directed_llm" not in args.conditions:
        return None
    # no image is sent: the editor reads text alone
    backend = HttpBackend(args.editor_model, args.editor_url, 1, api_key=read_api_key(args.api_key_file))
    journal = stack.enter_context(Journal(Path(f"{args.output}.run"), name="edits", is_valid=is_reply))
    journal.forget(*journal.transient)
    return make_caller(backend, journal)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add_model_flags(parser)
    add("--items", required=True, help="items JSONL from evaluate.py --prepare")
    add("--output", required=True, help="records JSONL to write")
    add("--conditions", nargs="+", default=["paper"], metavar="NAME",
        help="paper, standard (what critiques ask), full, maps (sweeps), or names, with a "
             f"number where they take one; latents: {', '.join(CONDITIONS)}; text: "
             f"{', '.join(TEXT_CONDITIONS)}")
    add("--calibration", type=parse_count, default=32,
        help="first items, not analysed, whose clean latents give tau and means")
    add("--stem", help="text that options are scored behind (R0); by default the clean "
        f"reply's own words on the way to its box, for latents \" {STEM}\"")
    add("--prior", choices=("none", "question"), default="none",
        help="question: from an option's log-probability take the one after the same stem without image and "
             "imagination (PMI)")
    add("--margin", type=parse_number(1e-6, 0.999, float), default=0.05,
        help="equivalence margin, a share of items; choose it before the run")
    add("--margin_nll", type=parse_number(1e-6, 100, float), default=0.05, help="the same of R0 and R1, nats")
    add("--min_emitters", type=parse_count, default=50,
        help="fewest effective groups of items with an imagination for an effect (items without groups count "
             "one each)")
    add("--rows", type=parse_count, default=64, help="rows decoded side by side")
    add("--temperature", type=parse_temperature, default=0.0,
        help="0 is greedy; all conditions on an item use the same random numbers (--seed)")
    add("--editor_model", help="model of directed_llm, as its server names it")
    add("--editor_url", default="http://127.0.0.1:8000/v1", help="its OpenAI-compatible server")
    add("--api_key_file", help="file with its key (default: OPENAI_API_KEY)")
    add("--limit", type=parse_count, help="analyse only N items after calibration")
    add("--dry_run", action="store_true", help="show a prompt, count decodings and plan; writes nothing")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: ArgumentParser, args: Namespace) -> None:
    """Fill in presets and folders; end with a usage error for flags that conflict."""
    presets = TEXT_PRESETS if args.latent == "off" else PRESET_CONDITIONS
    names = [name for word in args.conditions for name in presets.get(word, [word])]
    args.conditions = list(dict.fromkeys([*names, POSITIVE_CONTROL]))
    args.image_root = args.image_root or str(Path(args.items).parent)
    if args.latent != "off":
        args.stem = f" {STEM}" if args.stem is None else args.stem
        try:
            names = [name if name == "maps" else canonical(name) for name in args.conditions]
        except ValueError as error:
            parser.error(f"--conditions {error}")
        args.conditions = list(dict.fromkeys(names))
    elif odd := [name for name in args.conditions if name not in TEXT_CONDITIONS]:
        parser.error(f"--conditions {odd[0]}: with --latent off expected some of {' '.join(TEXT_CONDITIONS)}")
    if "directed_llm" in args.conditions and not args.editor_model:
        parser.error("--conditions directed_llm needs --editor_model")


def with_sweeps(conditions: list[str], spec: LatentSpec, qwen: Qwen) -> list[str]:
    """Replace "maps" by the sweeps for these latents and this model's layers."""
    sweeps = sweep_conditions(spec.size, qwen.config.text_config.num_hidden_layers)
    return list(dict.fromkeys(name for word in conditions for name in (sweeps if word == "maps" else [word])))


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    from utils.intervene.figures import draw_effects
    from utils.intervene.latent_batch import calibrate
    from utils.intervene.prompts import Settings
    from utils.qwen import load_tools, load_with
    check_output(args.output, [args.items])
    spec = spec_of(args.latent, None, args.force_start)
    calibration_items, items = split_items(args)
    qwen = (load_tools(args.model) if args.dry_run
            else load_with(spec, args.model, args.dtype, None, args.max_pixels))
    if spec:
        args.conditions = with_sweeps(args.conditions, spec, qwen)
    settings = Settings(args.system, args.suffix, args.max_new_tokens, args.stem, args.options, args.seed,
                        args.rows, args.temperature, args.prior)
    if args.dry_run:
        log(prompt_of(qwen.tokenizer, items[0], len(items[0]["images"]), args.system, args.suffix))
        n_decodings = len(calibration_items) + len(items) * (1 + len(args.conditions))
        print(json.dumps({"items": len(items), "calibration": len(calibration_items),
                          "conditions": args.conditions, "decodings_at_most": n_decodings,
                          "plan": plan(args, items)}))
        return 0
    rank, world, _ = rank_world()
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(args))
        editor, calibration = open_editor(args, stack), None
        anew = declared_anew(args, journal.folder)
        if calibration_items:
            calibration = calibrate(journal.folder / "calibration.safetensors", qwen, spec, settings,
                                    calibration_items, args.image_root, args.batch_size)
        dtype = str(qwen.model.dtype).removeprefix("torch.")
        decode = make_decoder(args, qwen, spec, settings, calibration, editor)
        run = Run(args, journal, decode, spec is not None, dtype == "float32")
        batches = batches_of(items, args.batch_size)[rank::world]
        for batch in tqdm(batches, desc="intervene", disable=rank > 0):
            run_batch(run, batch)
        if world > 1:  # the rank that finds every record in the journals is the last one, and writes
            journal.reload()
            if not run.is_done(items):
                return 0
        n_errors = sum("error" in run.get(item, "clean") for item in items)
        if n_errors > MAX_ERROR_SHARE * len(items):
            log(f"stopped: the images of {n_errors} of {len(items)} items failed; is --image_root "
                f"{args.image_root} right?")
            return 4
        records = export(run, items)
    limits = Limits(args.margin, args.margin_nll, args.min_emitters)
    metrics = {"stage": "intervene", "model": args.model, "items": args.items,
               "arm": "latent" if spec else "text", "latent": args.latent,
               "latent_size": spec and spec.size, "force_start": bool(spec and spec.force_start),
               "margin": args.margin, "margin_nll": args.margin_nll, "declared_anew": anew,
               "stem": args.stem, "prior": args.prior, "dtype": dtype,
               "calibration": {"items": len(calibration_items),
                               "latents": calibration.n_latents if calibration else 0},
               **summarize(items, records, declare(args), limits),
               "dose_trends": dose_trends(items, records, args.min_emitters),
               "seconds": round(time.monotonic() - began, 1)}
    metrics["summary"] = summary(metrics)
    draw_effects(metrics, args.output)
    draw_sweeps(metrics, args.output)
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [args.items], metrics["seconds"], margin=args.margin)
    log(plain_text(intervene_blocks(metrics) + published_blocks(items, metrics)))
    print(json.dumps(metrics))
    return 3 if n_errors else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
