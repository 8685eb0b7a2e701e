"""Look into imaginations: how alike they are between items and from step to step, and what they tell without
the image.

Stage 6 of 6:  train_sft.py -> [probe.py] -> figures; items from evaluate.py    (one or two decodings an item,
one a question)

    python probe.py --model checkpoint --items vstar.jsonl --probe_items vstar_probe.jsonl --output probe_text
    python probe.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm --output probe_monet
    python probe.py --model checkpoint --items vstar.jsonl --output probe_text --stage analyse      (no \
      model is loaded)
    python probe.py derive --items vstar.jsonl --image_root . --output vstar_probe.jsonl    (a model writes \
      --probe_items;
                                                                                             see python
    probe.py derive --help)
    python probe.py report runs     (report.html of all outputs of stages 4 to 6 in a folder)

Reads   --items: items {"id", "question", "options": [[letter, text]], "answer", "images": [{"path"}]} of any
        metric, in one
        file a benchmark, and, if there, "group_id" (items of one image: one instance is taken of each),
        "benchmark", "category", "hint", "region" --probe_items: {"id", "source": id of an item, "question",
        "options", "answer": {"type": "letter", "value"}}, questions about the source's image, to be answered
        from what was imagined for the source
Writes  --output, a folder: states/ (what was captured: `utils.probe.states`; the same command goes on from
        there),
        probes.jsonl (a line a kind, layer, step, measure and form: value, low, high, n), similarity.json (the
        curves of it), heatmap.png, curves.png, layers.png, spectra.png; with --probe_items answers.jsonl
        ({"id", "source", "donor", "condition", "gold", "pred", "rule", "correct", "text", "r0"}) and
        probing.png; metrics.json. Beside every PNG the CSV of its numbers. <output>.meta.json
Prints  a table on stderr; on stdout one JSON object: emission, mean similarities, accuracy by condition

Kinds of states, at the same K steps of the same generations: "imagination" (latents; with --latent off the
states of the first text imagination), "text" (the K ordinary steps after it), "image" (K evenly spaced visual
tokens, if there are as many, as they enter the language model), "inner" (inputs of every layer at the
latents), "dummy_pad" (the pad's embedding fed in place of latents), "start" (the state that chose to
imagine). Measures and corrections: `utils.probe.similarity`, `utils.probe.geometry`, `utils.probe.geometry`.
Corrected values come from the half of the instances to which an instance does not belong, and intervals draw
instances, not pairs.

Ways to ask the probe questions: `utils.probe.questions`. --crossed A B asks B items' questions of A items'
images and splits the variance of the imaginations between the two: the size of X -> Z. --edits changes one
thing of every instance's image or question (`utils.probe.input_edits`): how far the imagination moves beside
the text, and beside an edit of what is irrelevant.
"""
import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from utils.cli import Help, cli, log, parse_count
from utils.items import ANSWER_TYPES, STEM, gold_words, group_of, item_fault, prompt_of, read_items
from utils.journal import read_settings
from utils.jsonl import DataError, disk_errors, read_rows, write_json, write_meta, write_rows
from utils.latent_families import PRESETS, LatentSpec, spec_of
from utils.probe import derive
from utils.probe.capture import capture
from utils.probe.figures import draw_curves, draw_heatmaps, draw_layers, draw_probing, draw_spectra
from utils.probe.geometry import cka, probe, retrieval, spectrum
from utils.probe.input_edits import EDITS, crossed_items, edited, measure_edits, split_crossed
from utils.probe.questions import Prober, batched, conditions, rotations, score
from utils.probe.similarity import FORMS, N_BOOT, Cell, Measure, adjust, correct, draw_halves, unit
from utils.probe.states import STORED, States, StateWriter
from utils.qwen import Qwen, load_processors, load_with
from utils.report import collect, plain_text, write_report
from utils.stats import wilson

PROBE_FIELDS = {"id": str, "source": str, "question": str, "options": list, "answer": dict}
TEXT_STEPS = 10  # states of a text imagination that are looked at: as many as Monet has latents
FOLDS = 5
MOST_ALIKE = 0.99  # ordinary tokens above leave nothing to adjust a cosine to
SHOWN = 100  # instances in a heat map, as in the paper


# ------------------------------------------------------------------------- analysis: one cell after the other
def task_of(items: list[dict]) -> np.ndarray:
    """Return a task name an item: its benchmark where there are several, else its category."""
    field = "benchmark" if len({item.get("benchmark") for item in items}) > 1 else "category"
    return np.array([str(item.get(field) or "all") for item in items])


def enough(labels: list[str]) -> np.ndarray:
    """Return the places of instances whose label occurs at least FOLDS times."""
    counts = Counter(labels)
    return np.array([i for i, label in enumerate(labels) if counts[label] >= FOLDS], dtype=int)


class Analysis:
    """All measures of the states of `items` in a store; `rows` are the lines of probes.jsonl, `matrices` what
    F1 draws."""

    def __init__(self, store: States, items: list[dict], n_steps: int, args: argparse.Namespace):
        self.store, self.items, self.n_steps, self.args = store, items, n_steps, args
        self.keys, self.tasks = [item["id"] for item in items], task_of(items)
        self.halves = draw_halves(len(items), args.seed)
        self.labels = {"decode": [gold_words(item) or item["id"] for item in items],
                       "decode_task": self.tasks.tolist()}
        self.groups = list(map(group_of, items))
        self.rows: list[dict] = []
        self.matrices: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        image = {key: self.store.load(key, "image") for key in self.keys}
        self.image = {i: image[key].mean(0) for i, key in enumerate(self.keys) if image[key] is not None}
        sizes = {key: self.store.records[key]["segments"][0] for key in self.keys
                 if self.store.records[key]["segments"]}
        for kind in STORED:
            name = self.store.find(kind)
            if name is None:
                continue
            cells = self.store.cells(name, self.keys, self.n_steps, at_most=sizes
                                     if name in ("latent", "inner") else None)
            measure = Measure(self.halves, self.tasks, self.args.level, N_BOOT, self.args.seed, FORMS,
                              seen=lambda cell, form, matrix: self.keep(kind, cell, form, matrix))
            self.rows += ({"kind": kind, **row} for row in measure.run(self.beside(kind, cells)))
        c0 = self.ordinary()
        if c0 is not None:
            raw = [row for row in self.rows if row["form"] == "raw" and row["layer"] == -1
                   and row["measure"] in (
                "inter", "adjacent", "first") and row["kind"] != "text" and row["pairs"] == "all"]
            self.rows += [adjust(row, c0) for row in raw]

    def ordinary(self) -> float | None:
        """Return c0: the mean cosine of two text states of different instances, at any steps; None if it says
        nothing."""
        states = [self.store.load(key, "text") for key in self.keys]
        means = np.array([unit(x).mean(0) for x in states if x is not None])
        if len(means) < 2:
            return None
        products = means @ means.T
        c0 = float(products[~np.eye(len(means), dtype=bool)].mean())
        return c0 if c0 < MOST_ALIKE else None

    def keep(self, kind: str, cell: Cell, form: str, matrix: np.ndarray) -> None:
        """Keep what the heat maps show: raw and centred, of inner states the middle layer."""
        if form in ("raw", "centred") and cell.layer in (-1, self.middle()) and kind != "start":
            few = cell.rows < SHOWN
            self.matrices[kind, form, cell.step] = cell.rows[few], matrix[np.ix_(few, few)]

    def middle(self) -> int:
        layers = [r["tensors"]["inner"][1] for r in self.store.records.values() if "inner" in r["tensors"]]
        return layers[0] // 2 if layers else -1

    def beside(self, kind: str, cells: Iterable[Cell]) -> Iterator[Cell]:
        """Pass cells on, measuring on the way what is no cosine."""
        before = None
        for cell in cells:
            place = {"kind": kind, "layer": cell.layer, "step": cell.step, "form": "raw", "pairs": "all"}
            if len(cell.rows) >= 4:
                self.rows.append({**place, "measure": "spectrum", **spectrum(cell.states)})
                self.rows += ({**place, **row} for row in self.decodable(cell))
                having = [n for n, i in enumerate(cell.rows) if i in self.image]
                if kind != "image" and len(having) >= 4:
                    self.compare(place, "cka_image", cell.states[having],
                                 np.stack([self.image[cell.rows[n]] for n in having]))
            if before is not None and (before.layer, before.step + 1) == (cell.layer, cell.step):
                both, mine, its = np.intersect1d(cell.rows, before.rows, return_indices=True)
                if len(both) >= 4:
                    self.compare(place, "cka_adjacent", cell.states[mine], before.states[its])
                    pair = [correct(x, self.halves[both], ["centred"]) for x in (cell.states[mine],
                                                                                 before.states[its])]
                    if None not in pair:
                        found = retrieval(*(x["centred"] for x in pair))
                        self.rows.append({**place, "form": "centred", "measure": "retrieval_adjacent",
                                          "value": found["top1"],
                                          **found})
            yield cell
            before = cell

    def compare(self, place: dict, measure: str, one: np.ndarray, other: np.ndarray) -> None:
        """Add the debiased and the biased CKA of two sets of states, where both vary."""
        if min(np.ptp(x, axis=0).max() for x in (one, other)) > 0:
            self.rows.append({**place, "measure": measure, "value": cka(one, other),
                              "biased": cka(one, other, False),
                              "n": len(one)})

    def decodable(self, cell: Cell) -> Iterator[dict]:
        """Yield what a linear probe reads: the gold option's words and the task, where enough instances share
        them."""
        for measure, labels in self.labels.items():
            own = [labels[i] for i in cell.rows]
            places = enough(own)
            groups = [self.groups[cell.rows[n]] for n in places]
            if len({own[n] for n in places}) >= 2 and len(set(groups)) >= 2 * FOLDS:
                found = probe(cell.states[places], [own[n] for n in places], groups, FOLDS, self.args.seed,
                              level=self.args.level)
                yield {"measure": measure, "value": found["above_shuffled"], **found}

    def curves(self) -> dict:
        """Return {kind: {measure_form: [{"mean", "low", "high", "n"} a step]}} of final states."""
        result = {}
        for row in self.rows:
            if row["layer"] == -1 and row["pairs"] == "all" and row["measure"] in ("inter", "adjacent",
                                                                                   "first"):
                result.setdefault(row["kind"], {}).setdefault(f"{row['measure']}_{row['form']}", []).append(
                    {"step": row["step"] + 1, "mean": row["value"],
                     **{end: row[end] for end in ("low", "high", "n")}})
        return result

    def draw(self, output: Path) -> None:
        if self.matrices:
            draw_heatmaps(self.matrices, self.tasks, output / "heatmap.png")
            draw_curves(self.rows, self.args.level, output / "curves.png")
            draw_spectra(self.rows, output / "spectra.png")
        if any(row["kind"] == "inner" for row in self.rows):
            draw_layers(self.rows, output / "layers.png")


# ------------------------------------------------------------------------------------ the run
def choose(items: list[dict], n_items: int) -> list[dict]:
    """Return up to n items, as many of every file, evenly spread over it, one an image group."""
    files: dict[str, dict[str, dict]] = {}
    for item in items:
        files.setdefault(item["file"], {}).setdefault(group_of(item), item)
    chosen = []
    for k, firsts in enumerate(map(list, (groups.values() for groups in files.values()))):
        n = min(n_items // len(files) + (k < n_items % len(files)), len(firsts))
        chosen += [firsts[i * len(firsts) // n] for i in range(n)]
    return chosen


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, dict], list[dict]]:
    """Return items by id, each with its "file" and the "root" of its images, and probe items, checked."""
    items: dict[str, dict] = {}
    for path in args.items:
        for item in read_items(path, args.limit, tuple(ANSWER_TYPES)):
            if not item["images"]:
                raise DataError(
                    f"{path}: {item['id']}: no image; expected at least one to compare the imagination with")
            if item["id"] in items:
                raise DataError(
                    f"{path}: id {item['id']!r} stands already in {items[item['id']]['file']}; expected it once")
            items[item["id"]] = item | {"file": path, "root": args.image_root or str(Path(path).parent)}
    if not items:
        raise DataError(f"{' '.join(args.items)}: no items; expected at least one")
    probes = read_rows(args.probe_items, PROBE_FIELDS, args.limit) if args.probe_items else []
    for probe_item in probes:
        if fault := item_fault({**probe_item, "images": [], "metric": "mcq"}, ("mcq",)):
            raise DataError(f"{args.probe_items}: probe item {probe_item['id']!r}: {fault}")
        if probe_item["source"] not in items and args.limit is None:
            raise DataError(
                f"{args.probe_items}: {probe_item['id']}: source {probe_item['source']!r} is no item of "
                            f"{' '.join(args.items)}")
    return items, [one for one in probes if one["source"] in items]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["derive"]:
        return derive.parse_args(argv[1:])
    if argv[:1] == ["report"]:
        parser = argparse.ArgumentParser(prog="probe.py report",
                                         description="Gather what evaluate, intervene and probe wrote into one page.")
        parser.add_argument("folder", help="folder with the outputs; report.html is written into it")
        parser.set_defaults(task="report")
        return parser.parse_args(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--items", nargs="+", required=True,
                        help="items JSONL, as evaluate.py --prepare writes it; of "
                        "several the instances are taken evenly")
    parser.add_argument("--probe_items", default=None,
                        help="JSONL of questions to be answered without the image")
    parser.add_argument("--stage", choices=("all", "capture", "analyse", "ask"), default="all",
                        help="capture states, analyse the store, ask the probe items, or one after the other")
    parser.add_argument("--store", default=None, help="folder of the states (default: <output>/states)")
    parser.add_argument("--variants", nargs="+", choices=("tokens_only", "cut"), default=["tokens_only"],
                        help="ways to keep the image from the probe questions")
    parser.add_argument("--reader", default=None,
                        help="another checkpoint that answers from what --model imagined")
    parser.add_argument("--options", choices=("letter", "text"), default="letter",
                        help="what R0 scores in the box")
    parser.add_argument("--stem", default=STEM,
                        help="beginning of an answer that R0 scores the options behind")
    parser.add_argument("--circular", action="store_true",
                        help="ask every probe item at every turn of its options")
    parser.add_argument("--crossed", type=int, nargs=2, default=None, metavar=("A", "B"),
                        help="images x questions to cross")
    parser.add_argument("--edits", nargs="+", choices=("all", *EDITS), default=[],
                        help="changes of the instances' inputs")
    parser.add_argument("--image_root", default=None,
                        help="folder of the images (default: that of each items file)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off",
                        help="family of the latent tokens")
    parser.add_argument("--latent_size", type=parse_count, default=None,
                        help=f"latents a segment (default: the family's); with --latent off, steps looked at ({TEXT_STEPS})")
    parser.add_argument("--n_items", type=parse_count, default=100,
                        help="instances compared, evenly spread over the files")
    parser.add_argument("--level", type=float, default=0.95, help="of all intervals")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--max_new_tokens", type=parse_count, default=1024,
                        help="of a decoding, latent steps included")
    parser.add_argument("--batch_size", type=parse_count, default=8, help="items a batch, at most")
    parser.add_argument("--max_pixels", type=int, default=None, help="area to which an image is shrunk")
    parser.add_argument("--min_pixels", type=int, default=None, help="area to which an image is enlarged")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the resamples and of who is given whose imagination")
    parser.add_argument("--limit", type=parse_count, default=None,
                        help="read only the first N items and probe items")
    parser.add_argument("--dry_run", action="store_true",
                        help="show a prompt and count decodings; writes nothing")
    parser.set_defaults(task="probe")
    if argv and not argv[0].startswith("-"):
        parser.error(f"{argv[0]!r}: expected derive, report, or flags")
    args = parser.parse_args(argv)
    args.edits = list(EDITS) if "all" in args.edits else list(dict.fromkeys(args.edits))
    if args.reader and "cut" in args.variants:
        parser.error(
            "--variants cut: what is kept are states of the model that read the image; expected no --reader")
    return args


def settings_of(args: argparse.Namespace, n_steps: int) -> dict:
    """Return what must not change between runs that add to one store."""
    names = ("model", "latent", "system", "suffix", "max_new_tokens", "max_pixels", "min_pixels", "dtype")
    return {name: getattr(args, name) for name in names} | {"steps": n_steps}


def fill_store(folder: str | Path, wanted: list[dict], edits: dict[str, list[dict]], spec: LatentSpec | None,
               n_steps: int,
               args: argparse.Namespace) -> Qwen:
    """Capture the states that the store lacks; return the model, which may be asked the probe items too."""
    qwen = load_with(spec, args.model, args.dtype, args.min_pixels, args.max_pixels)
    with StateWriter(folder, settings_of(args, n_steps)) as writer:
        for items in (wanted, *edits.values()):
            for batch in batched(items, args.batch_size, "items"):
                capture(qwen, spec, batch, n_steps, args, writer, whole=items is wanted)
    return qwen


def open_store(folder: str | Path, keys: list[str]) -> States:
    """Return the store; DataError if it lacks the states of any of `keys`."""
    store = States(folder)
    if missing := [key for key in keys if key not in store.records]:
        raise DataError(
            f"{folder}: no states of {len(missing)} of {len(keys)} items, the first {missing[0]!r}; run --stage "
                        "capture with the same flags")
    return store


def analyse(store: States, chosen: list[dict], grid: list[list[dict]], edits: dict[str, list[dict]],
            n_steps: int,
            args: argparse.Namespace) -> dict:
    """Measure and draw; return what metrics.json says of it."""
    output = Path(args.output)
    instances = [item for item in chosen if store.records[item["id"]]["emitted"]]
    metrics = {"emission": {"k": len(instances), "n": len(chosen), "ci": wilson(len(instances), len(chosen),
                                                                                args.level)}}
    moved, summary = measure_edits(store, edits, args)
    if edits:
        metrics["edits"] = summary
    if len(instances) >= 4:  # two in each half
        analysis = Analysis(store, instances, n_steps, args)
        analysis.run()
        write_rows(output / "probes.jsonl", analysis.rows + moved)
        curves = analysis.curves()
        write_json(output / "similarity.json", curves)
        analysis.draw(output)
        metrics["similarity"] = {kind: {name: average(curve) for name, curve in its.items()} for kind,
                                 its in curves.items()}
    if grid and store.find("imagination"):
        metrics["crossed"] = split_crossed(store, grid, args)
    return metrics


def ask(store: States, items: dict[str, dict], probes: list[dict], spec: LatentSpec | None, qwen: Qwen,
        args: argparse.Namespace) -> dict:
    """Ask the probe items whose source imagined something; return what metrics.json says of it."""
    usable = [probe for probe in probes if store.records[probe["source"]]["emitted"]]
    metrics = {"probe_items_without_imagination": len(probes) - len(usable)}
    if usable:
        asked = [turned for item in usable for turned in rotations(item)] if args.circular else usable
        prober = Prober(qwen, spec, items, store, args)
        rows = prober.ask(asked, conditions(spec, args.variants))
        write_rows(Path(args.output) / "answers.jsonl", rows)
        metrics["probing"] = score(rows, asked, {item["id"]: prober.groups[item["source"]] for item in asked},
                                   args.level)
        draw_probing(metrics["probing"], args.level, Path(args.output) / "probing.png")
    return metrics


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    if args.task == "report":
        blocks = collect(args.folder)
        summary = write_report(args.folder, f"Report of {Path(args.folder).name}", blocks)
        log(plain_text(blocks))
        print(json.dumps(summary))
        return 0
    if args.task == "derive":
        return derive.run(args)
    items, probes = read_inputs(args)
    chosen = choose(list(items.values()), args.n_items)
    grid = crossed_items(chosen, *args.crossed) if args.crossed else []
    wanted = {item["id"]: item for item in chosen} | {p["source"]: items[p["source"]] for p in probes}
    wanted |= {item["id"]: item for row in grid for item in row}
    edits = {name: edited(name, chosen, args.seed) for name in args.edits}
    spec = spec_of(args.latent, args.latent_size)
    n_steps = spec.size if spec else args.latent_size or TEXT_STEPS
    if args.dry_run:
        tokenizer = load_processors(args.model)[0]
        log(prompt_of(tokenizer, chosen[0], len(chosen[0]["images"]), args.system, args.suffix))
        asked = sum(len(p["options"]) if args.circular else 1
                    for p in probes) * len(conditions(spec, args.variants))
        print(json.dumps({"instances": len(chosen), "probe_items": len(probes),
                          "decodings_at_most": (2 if spec else 1) * len(wanted) + asked
                          + sum(map(len, edits.values()))}))
        return 0
    output = Path(args.output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    folder = args.store or output / "states"
    qwen = None
    if args.stage in ("all", "capture"):
        qwen = fill_store(folder, list(wanted.values()), edits, spec, n_steps, args)
    store = open_store(folder, [*wanted, *(item["id"] for changed in edits.values() for item in changed)])
    path = output / "metrics.json"
    kept = read_settings(output, path.name) if args.stage != "all" and path.is_file() else {}
    metrics = {"stage": "probe", "model": args.model, "items": args.items, "latent": args.latent,
               "steps": n_steps,
               "level": args.level, "similarity": None, "probing": None} | kept
    if args.stage in ("all", "analyse"):
        metrics |= analyse(store, chosen, grid, edits, n_steps, args)
    if args.stage in ("all", "ask"):
        qwen = None if args.reader else qwen  # one model at a time
        qwen = qwen or load_with(None if args.reader else spec, args.reader or args.model, args.dtype,
                                 args.min_pixels,
                                 args.max_pixels)
        metrics |= {"reader": args.reader, "stem": args.stem, "scored_options": args.options}
        metrics |= ask(store, items, probes, spec, qwen, args)
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_json(path, metrics)
    write_meta(args.output, args, [path for path in (*args.items, args.probe_items) if path],
               metrics["seconds"])
    show(metrics)
    print(json.dumps(metrics))
    return 0


def average(curve: list[dict]) -> float | None:
    """Return the mean of a curve over its positions (null if it has none)."""
    means = [point["mean"] for point in curve if point["mean"] is not None]
    return float(np.mean(means)) if means else None


def ratio_words(found: dict | None) -> str:
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found) if found else "-"


def show(metrics: dict) -> None:
    """Log emission, mean similarities, what edits move, and accuracies."""
    if "emission" in metrics:
        log("imagined something: {k} of {n} items".format(**metrics["emission"]))
    for kind, means in (metrics["similarity"] or {}).items():
        log(f"{kind:<12}" + "  ".join(f"{name} {'-' if mean is None else f'{mean:+.3f}'}" for name,
                                      mean in means.items()))
    for name, entry in metrics.get("edits", {}).items():
        if name == "selectivity":
            log("selectivity of masks: " + ", ".join(f"{kind} {ratio_words(found)}" for kind,
                                                     found in entry.items()))
        else:
            log(f"{name:<16}{entry['emitted_too']} of {entry['emitted']} imagined again, moved beside the text "
                f"{ratio_words(entry['sensitivity'])}")
    for name, entry in (metrics["probing"] or {"conditions": {}})["conditions"].items():
        r0 = "-" if entry["r0"] is None else f"{100 * entry['r0']['accuracy']:.1f} %"
        log(f"{name:<12}{100 * entry['accuracy']:.1f} % [{100 * entry['ci'][0]:.1f}, {100 * entry['ci'][1]:.1f}]  "
            f"parsed {100 * entry['parsed']:.1f} %  R0 {r0}")


if __name__ == "__main__":
    raise SystemExit(cli(main))
