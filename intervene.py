"""Change what a model imagines, in latents or in text, and measure what that does to its answers.

Stage 5 of 6:  train_sft.py -> [intervene.py] -> figures; items from evaluate.py    (one reading of a prompt,
all conditions)

    python intervene.py --model checkpoint --items vstar.jsonl --output text.jsonl
    python intervene.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm --output \
      monet.jsonl
    torchrun --standalone --nproc_per_node 8 intervene.py --model checkpoint --items hrbench_4k.jsonl \
      --output text.jsonl

Reads   --items: multiple-choice items {"id", "question", "options": [[letter, text]], "answer": {"type":
        "letter",
        "value"}, "images": [{"path"}], "metric": "mcq"} and, if there, "group_id", "category", "hint",
        "region" ([left, top, right, bottom] in pixels of the first image), "counterfactual" ({"images",
        "answer"} of an answer-changing edit, and "question", "options" where they differ)
Writes  --output: a JSON line for each item and condition, the first of them "clean": {"id", "group",
        "category", "gold",
        "condition", "site", "emitted_clean", "emitted", "segments" or "spans", "n_fed", "rel_change",
        "reach", "donor", "edit", "r0", "r1", "text", "finish", "n_new", "pred", "rule", "correct", "changed",
        "first_diff", "degenerate", "reason"} <output>.metrics.json, <output>.meta.json, figures with a CSV
        each: <output>.effects.png, .accuracy.png, .mediation.png, .attention.png, .early.png, and of sweeps
        .map.png, .positions.png, .doses.png; <output>.run/ is the journal to resume from
Prints  emission and one line a condition on stderr; on stdout one JSON object: emission, effects with
intervals, verdicts

Conditions: --conditions paper (the paper's arms), full (all), maps (sweeps over positions, layers, ranks,
doses and how much of it is kept), or names; latents: utils/intervene/latent_conditions.py says one by one
what each does and at which site (fed, slot, edge), text: utils/intervene/text_conditions.py. Readouts: R0
scores the options behind a fixed stem right after the imagination, R1 behind what the clean run said there,
R2 is the free reply, parsed after the last imagination. Effects are taken on the items that imagined
something in the clean run, and on no others. "No effect" is claimed only by an equivalence test within
--margin (points) or --margin_nll (nats). Killed, the same command goes on. Exit codes: 0 complete; 3
complete, but images of some items failed; 2 usage, settings, damage or a broken guard; 4 too many failed
images; 130 interrupted.
"""
import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from utils.cli import Help, cli, log, parse_count, rank_world, read_api_key
from utils.decode import decode
from utils.images import ImageError
from utils.intervene.effects import summarize
from utils.intervene.figures import draw_all
from utils.intervene.latent_batch import LatentBatch
from utils.intervene.latent_case import Known
from utils.intervene.latent_conditions import (CONDITIONS, CONTROLS, PRESET_CONDITIONS, find_condition,
                                               map_conditions)
from utils.intervene.mediation import detectable_difference, items_with_no_change, margin_for_items
from utils.intervene.prompts import Asking, Prompts
from utils.intervene.sweeps import draw_maps
from utils.intervene.text_batch import TEXT_CONDITIONS, TEXT_CONTROLS, TEXT_PRESETS, TextBatch
from utils.intervene.text_conditions import make_caller
from utils.items import STEM, group_of, open_images, prompt_of, read_items
from utils.journal import Journal, move_aside
from utils.jsonl import (DataError, call_key, check_output, replace_file, sha256_file, write_json, write_meta,
                         write_rows)
from utils.latent_families import PRESETS, LatentSpec, spec_of
from utils.model_calls import Caller
from utils.openai_backend import HttpBackend
from utils.qwen import Qwen, load_tools, load_with

MAX_ERROR_SHARE = 0.1  # of items whose images fail, before the run is refused
PSI = (0.02, 0.05, 0.10, 0.20)  # shares of answers that change, for which --dry_run plans
# may change between restarts: what only the summary uses, and conditions, which may be added
FREE_SETTINGS = ("items", "output", "image_root", "conditions", "margin", "margin_nll", "rho",
                 "min_emitters", "fresh",
                 "dry_run", "editor_url", "api_key_file")


# ----------------------------------------------------------------------------------- decoding, with a journal
@dataclass
class Run:
    """What the batches of a run share. `spec` None is the text arm; `known` None: calibration items emitted
    nothing."""

    qwen: Qwen
    spec: LatentSpec | None
    journal: Journal
    asking: Asking
    args: argparse.Namespace
    known: Known | None = None
    editor: Caller | None = None

    def get(self, item: dict, condition: str) -> dict | None:
        """Return the record of an item's decoding, if it was made; a failed clean one stands for all
        conditions."""
        clean, own = (self.journal.get(call_key(item=item["id"], condition=name)) for name in ("clean",
                                                                                               condition))
        line = clean if clean and "error" in clean["record"] else own
        return line and line["record"]

    def put(self, item: dict, condition: str, record: dict) -> None:
        self.journal.append({"key": call_key(item=item["id"], condition=condition), "record": record})


def run_batch(run: Run, batch: list[dict]) -> None:
    """Decode a batch clean and under all conditions, always in the same composition; keep the records that
    are missing."""
    names = ["clean", *run.args.conditions]
    if all(run.get(item, name) is not None for item in batch for name in names):
        return
    opened = []
    for item in batch:
        try:
            opened.append((item, open_images(item, run.args.image_root),
                           open_counterfactual(item, run.args.image_root)))
        except ImageError as error:
            log(f"{item['id']}: {error}")
            if run.get(item, "clean") is None:
                run.put(item, "clean", {"error": error.reason})
    if not opened:
        return
    items, images, edits = map(list, zip(*opened))
    if run.spec:
        arms = LatentBatch(run.qwen, run.spec, run.known, run.asking, items, images, edits)
    else:
        arms = TextBatch(run.qwen, run.asking, items, images, edits, run.editor)
    for item, records in zip(items, arms.records(run.args.conditions)):
        for name in names:
            if run.spec and name != "clean" and "reason" not in records[name]:
                check_guards(item["id"], name, records["clean"], records[name], run.qwen.model.dtype
                             == torch.float32)
            if run.get(item, name) is None:
                run.put(item, name, records[name])


def open_counterfactual(item: dict, root: str) -> tuple[dict, list] | None:
    """Return (item, images) of the item's answer-changing edit, None without one."""
    if not item.get("counterfactual"):
        return None
    edited = {**item, **item["counterfactual"], "id": f"{item['id']}#edit"}
    return edited, open_images(edited, root)


def check_guards(name: str, condition: str, clean: dict, record: dict, exact: bool) -> None:
    """Raise DataError where an intervention did what it must not, or did nothing: the harness would measure
    itself.

    `exact`: in float32, where a row does not depend on the batch beyond the last bits. In lower precision
    rounding alone may change ids; what the controls change is then the floor that the summary shows beside
    every effect.
    """
    one, _ = find_condition(condition)
    differs, first = record["first_diff"], next((s["start"] for s in clean["segments"]), None)
    if first is None:
        if differs is not None:
            raise DataError(
                f"{name}: no latents in the clean run, but {condition} changed id {differs}; expected the same ids")
        return
    if one.prompt != "own" or one.site == "none":
        return
    if exact and differs is not None and (condition in CONTROLS or differs < first):
        raise DataError(
            f"{name}: {condition} changed id {differs} (first latent at {first}), expected the clean run's ids "
                        f"{'throughout' if condition in CONTROLS else 'before the latents'}; try --batch_size 1")
    if one.site == "fed" and condition not in CONTROLS and not (record["rel_change"]
                                                                or 0) > 0 and record["n_fed"]:
        raise DataError(
            f"{name}: {condition} fed the clean latents (relative change {record['rel_change']}), expected "
                        "others; is its number 0, or are all latents of this model the same vector?")
    if one.site == "fed" and condition not in CONTROLS and record["n_fed"] and not record["reach"] > 0:
        raise DataError(
            f"{name}: {condition} left every layer's input at the latent positions as it was; expected a change")


def calibrate(run: Run, items: list[dict]) -> Known | None:
    """Return what the latents of these items tell, computed once a run; None if they emit none."""
    path, size = run.journal.folder / "calibration.safetensors", run.args.batch_size
    if not path.exists():
        rows = []
        for batch in tqdm([items[i:i + size] for i in range(0, len(items), size)], desc="calibration"):
            images = [open_images(item, run.args.image_root) for item in batch]
            state, _ = Prompts(run.qwen, run.asking, batch, images, [None] * len(batch))["own"]
            rows += decode(run.qwen, state, run.args.max_new_tokens, run.spec, capture=True,
                           with_slots=True)[0]
        found = Known.from_runs(rows)
        tensors = {} if found is None else {name: value if torch.is_tensor(value) else torch.tensor(value)
                                            for name, value in vars(found).items()}
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        replace_file(path, lambda file: file.write(data), "wb")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it, and it is computed again") from error
    return Known(**{**tensors, "n_latents": int(tensors["n_latents"])}) if tensors else None


# ------------------------------------------------------------------------------------ the run
def split_items(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Return (calibration items, analysed items), checked; DataError for anything but multiple choice."""
    n_calibration = args.calibration if args.latent != "off" else 0
    items = read_items(args.items, None if args.limit is None else n_calibration + args.limit, ("mcq",))
    if len(items) <= n_calibration:
        raise DataError(f"{args.items}: {len(items)} items, of which --calibration takes {n_calibration}; "
                        "expected more, or a smaller --calibration")
    return items[:n_calibration], items[n_calibration:]


def batches_of(items: list[dict], size: int) -> list[list[dict]]:
    """Return the batches; an item left over joins the last one, so that it finds donors."""
    batches = [items[i:i + size] for i in range(0, len(items), size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def site_of(condition: str, args: argparse.Namespace) -> str | None:
    if condition == "clean":
        return None
    return "text" if args.latent == "off" else find_condition(condition)[0].site


def export(run: Run, items: list[dict]) -> dict[str, dict[str, dict]]:
    """Write the records in order of items and conditions; return them by item id and condition."""
    records = {item["id"]: {name: record for name in ("clean", *run.args.conditions)
                            if name == "clean" or "error" not in run.get(item, "clean")
                            for record in [run.get(item, name)]} for item in items}
    write_rows(run.args.output, (
        {"id": item["id"], "group": group_of(item), "category": item.get("category"),
         "gold": item["answer"]["value"], "condition": name, "site": site_of(name, run.args),
         "emitted_clean": records[item["id"]]["clean"].get("emitted"),
         **{field: value for field, value in record.items() if field != "ids"}}
        for item in items for name, record in records[item["id"]].items()))
    return records


def show(metrics: dict) -> None:
    """Log emission and one line a condition."""
    emission = metrics["emission"]
    interval = "" if emission["ci95"] is None else " [{:.1f}, {:.1f}]".format(*(100 * end
                                                                                for end in emission["ci95"]))
    log(f"imagined something: {emission['k']} of {emission['n']} items, {100 * (emission['share'] or 0):.1f} %{interval}")
    for name, entry in metrics["conditions"].items():
        if not (effect := entry["effect"]):
            why = ", ".join(f"{n} items: {reason}" for reason, n in entry.get("reasons", {}).items())
            log(f"{name} | no effect to report: {entry['reason']}" + (f" ({why})" if why else ""))
            continue
        low, high = (100 * end for end in effect["ci90"])
        line = (f"{name} ({entry['site']}, n = {effect['n']}) | {100 * effect['acc_clean']:.1f} -> "
                f"{100 * effect['acc_int']:.1f} % | {100 * effect['delta']:+.1f} [{low:+.1f}, {high:+.1f}] {effect['verdict']}")
        if entry["r0"]:
            low, high = entry["r0"]["ci90"]
            line += f" | R0 {entry['r0']['delta_nll']:+.3f} nats [{low:+.3f}, {high:+.3f}] {entry['r0']['verdict']}"
        if entry.get("follow"):
            line += f" | follows {100 * entry['follow']['share']:.1f} %"
        log(line
            + f" | changed {100 * effect['changed']:.1f} % | unresolved {100 * effect['unresolved_clean']:.1f} -> "
                   f"{100 * effect['unresolved_int']:.1f} % | loops {100 * effect['degenerate_int']:.1f} %")
    for site, readouts in metrics["mediation"].items():
        if found := readouts["r0"]:
            parts = " | ".join("{} {:+.3f} [{:+.3f}, {:+.3f}]".format(name, found[name]["mean"],
                                                                      *found[name]["ci95"])
                               for name in ("TE", "NIE", "NIE0", "NDE"))
            share = found["proportion_mediated"]
            mediated = share["reason"] if share["value"] is None else f"{100 * share['value']:.1f} %"
            log(f"mediation at {site}, nats of the right option | {parts} | mediated {mediated}")


def plan(args: argparse.Namespace, n_items: int) -> dict:
    """Return what this many items can show: for shares of changed answers, the margin and the difference
    found with 80 %."""
    return {"items_if_nothing_changes": items_with_no_change(args.margin),
            "with_changed_answers": {psi: {"smallest_margin": round(margin_for_items(psi, n_items), 4),
                                           "difference_found": round(detectable_difference(psi, n_items), 4)}
                                           for psi in PSI}}


def open_journal(args: argparse.Namespace) -> Journal:
    """Open `<output>.run`; conditions may be added between restarts, and what only the summary uses may
    change."""
    folder = Path(f"{args.output}.run")
    if args.fresh:
        move_aside(folder, rank_world()[1])
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    return Journal(folder, {**settings, "items": sha256_file(args.items)})


def open_editor(args: argparse.Namespace, stack: ExitStack) -> Caller | None:
    """Return what directed_llm asks its edits of, with a journal of their own; None where it is not among the
    conditions."""
    if "directed_llm" not in args.conditions:
        return None
    # no image is sent: the editor reads text alone
    backend = HttpBackend(args.editor_model, args.editor_url, 1, api_key=read_api_key(args.api_key_file))
    return make_caller(backend, stack.enter_context(Journal(Path(f"{args.output}.run"), name="edits")))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--items", required=True, help="items JSONL, as evaluate.py --prepare writes it")
    parser.add_argument("--image_root", default=None, help="folder of the images (default: the items file's)")
    parser.add_argument("--output", required=True, help="records JSONL to write; <output>.run/ beside it is the journal")
    parser.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off",
                        help="family of the latent tokens")
    parser.add_argument("--latent_size", type=parse_count, default=None,
                        help="latents a segment (default: the family's)")
    parser.add_argument("--conditions", nargs="+", default=["paper"], metavar="NAME",
                        help="paper, full, maps, or names, with their number if they take one (add_noise:0.3); latents: "
                             f"{', '.join(CONDITIONS)}; text: {', '.join(TEXT_CONDITIONS)}")
    parser.add_argument("--calibration", type=int, default=32,
                        help="items, from the front of the file and not analysed, whose clean latents give tau and means")
    parser.add_argument("--stem", default=" " + STEM, help="what options are scored behind (R0)")
    parser.add_argument("--options", choices=("letter", "text"), default="letter",
                        help="what stands in the box of an answer")
    parser.add_argument("--margin", type=float, default=0.05,
                        help="equivalence margin, a share of items; fix it before a run")
    parser.add_argument("--margin_nll", type=float, default=0.05,
                        help="equivalence margin of R0 and R1, nats")
    parser.add_argument("--rho", type=float, default=0.1,
                        help="share of the total effect that Z is tested to carry at most")
    parser.add_argument("--min_emitters", type=parse_count, default=50,
                        help="fewer items with an imagination: no effect is given")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--max_new_tokens", type=parse_count, default=1024,
                        help="of a decoding, latent steps included")
    parser.add_argument("--batch_size", type=parse_count, default=8,
                        help="items a batch; donors come from it")
    parser.add_argument("--rows", type=parse_count, default=64,
                        help="rows decoded side by side: items times conditions")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="0 is greedy; else all conditions on an item meet "
                        "the same random numbers (--seed); run several seeds")
    parser.add_argument("--editor_model", default=None, help="model of directed_llm, as its server names it")
    parser.add_argument("--editor_url", default="http://127.0.0.1:8000/v1",
                        help="its OpenAI-compatible server")
    parser.add_argument("--api_key_file", default=None,
                        help="file with its key (default: the environment's OPENAI_API_KEY)")
    parser.add_argument("--max_pixels", type=int, default=None, help="area to which an image is shrunk")
    parser.add_argument("--min_pixels", type=int, default=None, help="area to which an image is enlarged")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the wrong options")
    parser.add_argument("--limit", type=parse_count, default=None,
                        help="analyse only the first N items after calibration")
    parser.add_argument("--fresh", action="store_true",
                        help="move an earlier <output>.run aside and begin anew")
    parser.add_argument("--dry_run", action="store_true",
                        help="show a prompt, count decodings and plan; writes nothing")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in presets and folders; end with a usage error for flags that do not go together."""
    presets = TEXT_PRESETS if args.latent == "off" else PRESET_CONDITIONS
    args.conditions = list(dict.fromkeys(name for word in args.conditions for name in presets.get(word,
                                                                                                  [word])))
    args.image_root = args.image_root or str(Path(args.items).parent)
    for name in args.conditions:
        if args.latent == "off" and name not in TEXT_CONDITIONS:
            parser.error(
                f"--conditions {name}: with --latent off expected some of {' '.join(TEXT_CONDITIONS)}")
        if args.latent != "off" and name != "maps":
            try:
                find_condition(name)
            except ValueError as error:
                parser.error(f"--conditions {error}")
    if "directed_llm" in args.conditions and not args.editor_model:
        parser.error("--conditions directed_llm needs --editor_model")
    if not 0 < args.margin < 1 or not args.margin_nll > 0 or not 0 < args.rho < 1:
        parser.error(
            f"--margin {args.margin}, --margin_nll {args.margin_nll}, --rho {args.rho}: expected shares and nats, "
                     "above 0")


def with_maps(conditions: list[str], spec: LatentSpec, qwen: Qwen) -> list[str]:
    """Return the conditions with the sweeps for these latents and this model's layers in the place of "maps".
    """
    sweeps = map_conditions(spec.size, qwen.config.text_config.num_hidden_layers)
    return list(dict.fromkeys(name for word in conditions for name in (sweeps if word == "maps" else [word])))


def kept_shares(names: list[str], spec: LatentSpec | None) -> dict[str, float]:
    """Return the share of the imagination that each truncating condition keeps."""
    if spec is None:
        return {name: int(name.removeprefix("truncate_")) / 100 for name in names
                if name.startswith("truncate_")}
    counts = {"markers_only": 0.0} | {name: find_condition(name)[1] for name in names
                                      if name.startswith("keep_first")}
    return {name: counts[name] / spec.size for name in names if name in counts and counts[name] < spec.size}


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    check_output(args.output, [args.items])
    spec = spec_of(args.latent, args.latent_size)
    calibration, items = split_items(args)
    qwen = (load_tools(args.model) if args.dry_run else
            load_with(spec, args.model, args.dtype, args.min_pixels, args.max_pixels))
    if spec:
        args.conditions = with_maps(args.conditions, spec, qwen)
    asking = Asking(args.system, args.suffix, args.max_new_tokens, args.stem, args.options, args.seed,
                    args.rows,
                    args.temperature)
    if args.dry_run:
        log(prompt_of(qwen.tokenizer, items[0], len(items[0]["images"]), args.system, args.suffix))
        print(json.dumps({"items": len(items), "calibration": len(calibration), "conditions": args.conditions,
                          "decodings_at_most": len(calibration) + len(items) * (1 + len(args.conditions)),
                          "plan": plan(args, len(items))}))
        return 0
    rank, world, _ = rank_world()
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(args))
        run = Run(qwen, spec, journal, asking, args, editor=open_editor(args, stack))
        if calibration:
            run.known = calibrate(run, calibration)
        batches = batches_of(items, args.batch_size)
        for batch in tqdm(batches[rank::world], desc="intervene", disable=rank > 0):
            run_batch(run, batch)
        if world > 1:  # the rank that finds every record in the journals is the last one, and writes
            journal.reload()
            if any(run.get(item, name) is None for item in items for name in ("clean", *args.conditions)):
                return 0
        n_errors = sum("error" in run.get(item, "clean") for item in items)
        if n_errors > MAX_ERROR_SHARE * len(items):
            log(f"stopped: the images of {n_errors} of {len(items)} items failed; is --image_root {args.image_root} right?")
            return 4
        records = export(run, items)
    metrics = {"stage": "intervene", "model": args.model, "items": args.items, "arm": "text" if spec is None
               else "latent",
               "latent": args.latent, "latent_size": spec.size if spec else None, "margin": args.margin,
               "margin_nll": args.margin_nll, "stem": args.stem,
               "dtype": str(qwen.model.dtype).removeprefix("torch."),
               "calibration": {"items": len(calibration), "latents": run.known.n_latents if run.known else 0},
               **summarize(items, records, args.conditions,
                           {name: site_of(name, args) for name in args.conditions},
                           set(CONTROLS if spec else TEXT_CONTROLS), args.margin, args.margin_nll,
                           args.min_emitters, args.rho,
                           kept_shares(args.conditions, spec)),
               "seconds": round(time.monotonic() - began, 1)}
    draw_all(metrics, args.output)
    draw_maps(metrics, args.output)
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [args.items], metrics["seconds"], margin=args.margin)
    show(metrics)
    print(json.dumps(metrics))
    return 3 if n_errors else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
