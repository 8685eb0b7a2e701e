"""Look into imaginations: how alike they are between items and from step to step, and what they tell without the image.

Stage 6 of 6:  train_sft.py -> [probe.py] -> figures; items from evaluate.py    (one decoding an item, four a probe item)

    python probe.py --model checkpoint --items vstar.jsonl --probe_items vstar_probe.jsonl --output probe_text
    python probe.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm --output probe_monet

Reads   --items: multiple-choice items {"id", "question", "options": [[letter, text]], "answer", "images": [{"path"}]}
        and, if there, "group_id" (items of one image: one instance is taken of each), "hint"
        --probe_items: {"id", "source": id of an item, "question", "options", "answer": {"type": "letter", "value"}},
        questions about the source's image, to be answered from what was imagined for the source
Writes  --output, a folder: similarity.json (a curve for each kind of state and measure: mean, low, high, n a position),
        heatmap.png, curves.png; with --probe_items answers.jsonl ({"id", "source", "donor", "condition", "gold", "pred",
        "rule", "correct", "text"}) and probing.png; metrics.json. <output>.meta.json
Prints  a table on stderr; on stdout one JSON object: emission, mean similarities, accuracy by condition

Kinds of states, at the same K positions of the same generations: "imagination" (latents; with --latent off the states of
the first text imagination), "text" (the K ordinary steps after it), "image" (K evenly spaced visual tokens as they enter
the language model). Measures: inter (pairs of instances at one position), adjacent (one step to the next) and first (the
first step to a later one), each raw and centred. The centre of a position is the mean of the half of the instances to
which an instance does not belong, and inter-instance pairs are then taken within halves: an own mean would bias the
cosine to -1 / (n - 1). Intervals draw instances, not pairs.

Probe questions are asked in four ways: image; text_only; own and other, without image, after the reply's beginning was
set to the imagination of the source or of another source. Latents are put back as vectors between their markers, a text
imagination as text: in the assistant's turn, where the model was trained to have them.
"""
import argparse
import json
import random
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.answers import extract_choice
from utils.decode import PRESETS, Generation, LatentSpec, clean_text, generate
from utils.edits import CLOSE, OPEN, conclusion, find_spans
from utils.items import item_fault, open_images, question_text, read_items
from utils.qwen import Qwen, chat, encode, image_features, load, load_processors
from utils.rows import DataError, cli, log, read_rows, write_json, write_meta, write_rows
from utils.stats import cluster_bootstrap, mcnemar_exact, tango_ci, wilson

PROBE_FIELDS = {"id": str, "source": str, "question": str, "options": list, "answer": dict}
KINDS = ("imagination", "text", "image")
COLORS = {"imagination": "#2f6db5", "text": "#d9822b", "image": "#3a9a5b"}
TEXT_STEPS = 10  # states of a text imagination that are looked at: as many as Monet has latents
N_BOOT = 2000
CONDITIONS = ("image", "text_only", "own", "other")


@dataclass
class Trace:
    """What one item's generation left: states [k, hidden] by kind, and the imagination to put back."""

    states: dict[str, np.ndarray]
    latents: torch.Tensor | None  # [k, hidden], of the first segment
    imagination: str | None  # text of the first imagination


# ------------------------------------------------------------------------------------ similarity
def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosines [n, m] of rows [n, hidden] with rows [m, hidden]; a zero row has cosine 0 with all."""
    one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (one, other))
    return one @ other.T


def centre(instances: list[np.ndarray], halves: np.ndarray) -> list[np.ndarray]:
    """Subtract from every instance [k, hidden], position by position, the mean of the half it does not belong to.

    A position that nobody in the other half has ends the instance there.
    """
    centred = []
    for own, half in zip(instances, halves):
        rows = []
        for t, row in enumerate(own):
            others = [x[t] for x, h in zip(instances, halves) if h != half and len(x) > t]
            if not others:
                break
            rows.append(row - np.mean(others, axis=0))
        centred.append(np.array(rows).reshape(len(rows), own.shape[1]))
    return centred


def pair_mean(matrix: np.ndarray, pairs: np.ndarray, level: float, seed: int) -> dict:
    """Return the mean of matrix [n, n] over `pairs` (bool [n, n]) of distinct instances, with a bootstrap interval.

    A resample draws n instances; a pair counts as often as both its instances were drawn together. Resampling pairs
    instead would treat the n - 1 pairs of one instance as independent.
    """
    pairs = pairs & ~np.eye(len(matrix), dtype=bool)
    if not pairs.any():
        return {"mean": None, "low": None, "high": None, "n": len(matrix)}
    n = len(matrix)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_BOOT).astype(float)  # [N_BOOT, n]
    sums, counts = (((drawn @ np.where(pairs, x, 0.0)) * drawn).sum(1) for x in (matrix, np.ones_like(matrix)))
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(matrix[pairs].mean()), "low": float(low), "high": float(high), "n": n}


def step_mean(values: list[float], level: float, seed: int) -> dict:
    """Return the mean over instances with a bootstrap interval over instances."""
    if len(values) < 2:
        return {"mean": None, "low": None, "high": None, "n": len(values)}
    low, high = cluster_bootstrap(values, range(len(values)), level, N_BOOT, seed)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def inter_matrices(instances: list[np.ndarray], n_steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each position the cosines [n, n] of the instances that have it, and which instances those are."""
    present = [np.array([i for i, x in enumerate(instances) if len(x) > t], dtype=int) for t in range(n_steps)]
    stacks = [np.array([instances[i][t] for i in who]) for t, who in enumerate(present)]
    return [(cosines(x, x) if len(x) else np.zeros((0, 0)), who) for x, who in zip(stacks, present)]


def draw_halves(n: int, seed: int) -> np.ndarray:
    """Return 0 or 1 for each of n instances, as many of each; drawn, since a file's order may have a period of its own."""
    return np.random.default_rng(seed).permutation(n) % 2


def measure(instances: list[np.ndarray], n_steps: int, level: float, seed: int) -> dict[str, list[dict]]:
    """Return all curves of one kind of states: {"inter_raw": [a dict a position], "adjacent_raw": ..., ...}."""
    halves = draw_halves(len(instances), seed)
    curves = {}
    for name, states in (("raw", instances), ("centred", centre(instances, halves))):
        together = (lambda who: halves[who][:, None] == halves[who]) if name == "centred" else \
            (lambda who: np.ones((len(who), len(who)), dtype=bool))
        curves[f"inter_{name}"] = [pair_mean(matrix, together(who), level, seed)
                                   for matrix, who in inter_matrices(states, n_steps)]
        own = [cosines(x, x) for x in states]
        for kind, place in (("adjacent", lambda t: (t, t + 1)), ("first", lambda t: (0, t + 1))):
            curves[f"{kind}_{name}"] = [step_mean([float(c[place(t)]) for c in own if len(c) > t + 1], level, seed)
                                        for t in range(n_steps - 1)]
    return curves


# ------------------------------------------------------------------------------------ decoding
def collect(qwen: Qwen, spec: LatentSpec | None, items: list[dict], n_steps: int, args: argparse.Namespace) -> dict[str, Trace]:
    """Decode every item once; return what those left that imagined something, by id."""
    traces = {}
    for batch in batched(items, args.batch_size, "items"):
        images = [open_images(item, args.image_root) for item in batch]
        prompts = [chat(qwen.tokenizer, question_text(item, args.suffix), len(pictures), args.system)
                   for item, pictures in zip(batch, images)]
        inputs = encode(qwen, prompts, images)
        with torch.no_grad():
            features = iter(image_features(qwen, inputs))
        rows = generate(qwen, inputs, args.max_new_tokens, spec, capture=True)
        for item, row, pictures in zip(batch, rows, images):
            visual = [next(features) for _ in pictures][0]
            found = find_steps(qwen, spec, row)
            if found:
                steps, after, imagination = found
                places = (np.arange(n_steps) + 0.5) / n_steps * len(visual)
                states = {"imagination": row.states[steps[:n_steps]], "text": row.states[after[:n_steps]],
                          "image": visual[places.astype(int)]}
                traces[item["id"]] = Trace({kind: x.double().cpu().numpy() for kind, x in states.items()},
                                           row.states[steps] if spec else None, imagination)
    return traces


def batched(rows: list[dict], size: int, what: str) -> tqdm:
    return tqdm([rows[i:i + size] for i in range(0, len(rows), size)], desc=what)


def find_steps(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> tuple[list[int], list[int], str | None] | None:
    """Return the steps of the first imagination, the ordinary steps after it, and its text; None if there is none."""
    end_of_text = len(row.ids) - (row.finish == "stop")
    if spec is not None:
        first = next((s for s in row.segments if s.size), None)  # an end token right after the start leaves none
        if first is None:
            return None
        latents = {j for s in row.segments for j in range(s.start, s.start + s.size)}
        last = first.start + first.size
        after = [j for j in range(last + spec.force_end, end_of_text) if j not in latents]
        return list(range(first.start, last)), after, None
    text = qwen.tokenizer.decode(row.ids, skip_special_tokens=True)
    spans = find_spans(text)
    if not spans:
        return None

    def n_tokens(n_characters: int) -> int:
        return bisect_left(range(len(row.ids)), n_characters,
                           key=lambda n: len(qwen.tokenizer.decode(row.ids[:n], skip_special_tokens=True)))

    start, end = spans[0]
    return (list(range(n_tokens(start), n_tokens(end))), list(range(n_tokens(end + len(CLOSE)), end_of_text)),
            text[start:end])


def conclude(qwen: Qwen, spec: LatentSpec | None, row: Generation) -> str:
    """Return the words after the last imagination of a reply: what is parsed for an answer."""
    if spec is None:
        return conclusion(qwen.tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
    last = row.segments[-1].start + row.segments[-1].size if row.segments else 0
    return clean_text(qwen.tokenizer, row.ids[last:], spec)


# ------------------------------------------------------------------------------------ questions without the image
def derange(probes: list[dict], groups: dict[str, str], seed: int) -> dict[str, str]:
    """Return for every probe id a donor: the source of a probe of another group. DataError if one group is over half."""
    order = list(probes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda probe: groups[probe["source"]])
    shift = max(Counter(groups[probe["source"]] for probe in probes).values())
    if 2 * shift > len(order):
        raise DataError(f"--probe_items: {shift} of {len(order)} usable probe items have one image; expected at most half, "
                        "so that each can be given another image's imagination")
    return {probe["id"]: donor["source"] for probe, donor in zip(order, order[shift:] + order[:shift])}


def beginning(spec: LatentSpec | None, trace: Trace) -> str:
    """Return the words of a reply that begins with an imagination; pads stand where latents go."""
    if spec is None:
        return f"{OPEN}{trace.imagination}{CLOSE}"
    start = "" if spec.overwrite_start else spec.start  # there the first latent is fed in place of the start token
    return start + spec.pad * len(trace.latents) + (spec.end if spec.force_end else "")


def ask(qwen: Qwen, spec: LatentSpec | None, probes: list[dict], items: dict[str, dict], traces: dict[str, Trace],
        args: argparse.Namespace) -> list[dict]:
    """Ask every probe question under every condition; return the rows of answers.jsonl."""
    groups = {name: item.get("group_id", name) for name, item in items.items()}
    donors, rows = derange(probes, groups, args.seed), []
    for condition in CONDITIONS:
        for batch in batched(probes, args.batch_size, condition):
            images = [open_images(items[p["source"]], args.image_root) if condition == "image" else [] for p in batch]
            texts = [question_text(p, args.suffix) for p in batch]
            if condition != "image":
                texts = [text.replace("<image>", "") for text in texts]
            prompts = [chat(qwen.tokenizer, text, len(pictures), args.system) for text, pictures in zip(texts, images)]
            given, latents = [None] * len(batch), None
            if condition in ("own", "other"):
                given = [p["source"] if condition == "own" else donors[p["id"]] for p in batch]
                prompts = [prompt + beginning(spec, traces[name]) for prompt, name in zip(prompts, given)]
                latents = [traces[name].latents for name in given] if spec else None
            replies = generate(qwen, encode(qwen, prompts, images), args.max_new_tokens, spec, prompt_latents=latents)
            for probe, donor, reply in zip(batch, given, replies):
                found = extract_choice(conclude(qwen, spec, reply), dict(map(tuple, probe["options"])), reply.finish)
                rows.append({"id": probe["id"], "source": probe["source"], "donor": donor, "condition": condition,
                             "gold": probe["answer"]["value"], "pred": found.letter, "rule": found.rule,
                             "correct": found.letter == probe["answer"]["value"],
                             "text": clean_text(qwen.tokenizer, reply.ids, spec)})
    return rows


def score(rows: list[dict], probes: list[dict], level: float) -> dict:
    """Return accuracy and parse rate by condition, chance, and what the own imagination gives over another's."""
    result = {"n": len(probes), "chance": sum(1 / len(p["options"]) for p in probes) / len(probes), "conditions": {}}
    right = {name: [row["correct"] for row in rows if row["condition"] == name] for name in CONDITIONS}
    for name in CONDITIONS:
        parsed = sum(row["pred"] is not None for row in rows if row["condition"] == name)
        letters = Counter(row["pred"] for row in rows if row["condition"] == name and row["pred"])
        result["conditions"][name] = {
            "correct": sum(right[name]), "accuracy": sum(right[name]) / len(probes),
            "ci": wilson(sum(right[name]), len(probes), level), "parsed": parsed / len(probes), "letters": letters}
    changes = [own - other for own, other in zip(right["own"], right["other"])]
    b, c = changes.count(-1), changes.count(1)
    return result | {"own_minus_other": {"delta": (c - b) / len(probes), "ci": tango_ci(b, c, len(probes), level), "b": b,
                                         "c": c, "mcnemar_p": mcnemar_exact(b, c)}}


# ------------------------------------------------------------------------------------ figures
def draw_heatmaps(states: dict[str, list[np.ndarray]], n_steps: int, seed: int, path: Path) -> None:
    """Draw the cosine of every pair of instances: a column a position, a row a kind of states."""
    from matplotlib import pyplot
    centred = centre(states["imagination"], draw_halves(len(states["imagination"]), seed))
    rows = {"imagination, raw": states["imagination"], "imagination, centred": centred, "text, raw": states["text"],
            "image, raw": states["image"]}
    figure, axes = pyplot.subplots(len(rows), n_steps, figsize=(1.3 * n_steps + 2, 1.35 * len(rows) + 1), squeeze=False,
                                   layout="constrained")
    for row, (name, instances) in zip(axes, rows.items()):
        for t, (matrix, who) in enumerate(inter_matrices(instances, n_steps)):
            if len(who):
                shown = row[t].imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
            row[t].set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(", ", "\n"), fontsize=9)
    for t in range(n_steps):
        axes[0, t].set_title(f"step {t + 1}", fontsize=9)
    figure.suptitle(f"Cosine between every two of {len(states['imagination'])} instances", fontsize=11)
    figure.colorbar(shown, ax=axes, label="cosine", shrink=0.7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_curves(similarity: dict[str, dict], level: float, path: Path) -> None:
    """Draw every measure by position: solid raw, dashed centred, with intervals over instances."""
    from matplotlib import pyplot
    titles = {"inter": "between instances, same step", "adjacent": "one instance, step t to t + 1",
              "first": "one instance, step 1 to t + 1"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), sharey=True, layout="constrained")
    for ax, (name, title) in zip(axes, titles.items()):
        for kind in KINDS:
            for style, form in (("-", "raw"), ("--", "centred")):
                points = [(t + 1, p) for t, p in enumerate(similarity[kind][f"{name}_{form}"]) if p["mean"] is not None]
                x = [t for t, _ in points]
                ax.plot(x, [p["mean"] for _, p in points], style, marker="o", markersize=3, color=COLORS[kind],
                        label=f"{kind}, {form}")
                ax.fill_between(x, [p["low"] for _, p in points], [p["high"] for _, p in points], alpha=0.15,
                                color=COLORS[kind], linewidth=0)
        ax.set(title=title, xlabel="step t", ylim=(-1.05, 1.05))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"mean cosine ({100 * level:.3g} % interval)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_probing(probing: dict, level: float, path: Path) -> None:
    """Draw accuracy by condition with Wilson intervals and the chance line."""
    from matplotlib import pyplot
    names = {"image": "image", "text_only": "question only", "own": "own\nimagination", "other": "another's\nimagination"}
    figure, ax = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    for x, name in enumerate(CONDITIONS):
        entry = probing["conditions"][name]
        whiskers = [[100 * abs(end - entry["accuracy"])] for end in entry["ci"]]
        ax.bar(x, 100 * entry["accuracy"], 0.6, yerr=whiskers, capsize=4, color="#a9b4c0" if x < 2 else "#2f6db5")
    ax.axhline(100 * probing["chance"], color="#c0392b", linestyle="--", linewidth=1,
               label=f"chance, {100 * probing['chance']:.1f} %")
    ax.set_xticks(range(len(CONDITIONS)), [f"{names[name]}\n(parsed {100 * probing['conditions'][name]['parsed']:.0f} %)"
                                           for name in CONDITIONS])
    ax.set(ylim=(0, 105), ylabel=f"accuracy, % ({100 * level:.3g} % interval)",
           title=f"{probing['n']} questions about the region that was imagined")
    ax.legend(frameon=False, loc="upper right")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------ the run
def choose(items: list[dict], n_items: int) -> list[dict]:
    """Return up to n items evenly spread over the file, one an image group."""
    firsts = list({item.get("group_id", item["id"]): item for item in reversed(items)}.values())[::-1]
    n = min(n_items, len(firsts))
    return [firsts[i * len(firsts) // n] for i in range(n)]


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, dict], list[dict]]:
    """Return items by id and probe items, checked."""
    items = {item["id"]: item for item in read_items(args.items, args.limit, ("mcq",))}
    probes = read_rows(args.probe_items, PROBE_FIELDS, args.limit) if args.probe_items else []
    for item in items.values():
        if not item["images"]:
            raise DataError(f"{args.items}: {item['id']}: no image; expected at least one to compare the imagination with")
    for probe in probes:
        if fault := item_fault({**probe, "images": [], "metric": "mcq"}, ("mcq",)):
            raise DataError(f"{args.probe_items}: probe item {probe['id']!r}: {fault}")
        if probe["source"] not in items and args.limit is None:
            raise DataError(f"{args.probe_items}: {probe['id']}: source {probe['source']!r} is no item of {args.items}")
    return items, [probe for probe in probes if probe["source"] in items]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--items", required=True, help="items JSONL, as evaluate.py --prepare writes it")
    parser.add_argument("--probe_items", default=None, help="JSONL of questions to be answered without the image")
    parser.add_argument("--image_root", default=None, help="folder of the images (default: the items file's)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off", help="family of the latent tokens")
    parser.add_argument("--latent_size", type=int, default=None,
                        help=f"latents a segment (default: the family's); with --latent off, steps looked at ({TEXT_STEPS})")
    parser.add_argument("--n_items", type=int, default=100, help="instances compared, evenly spread over the file")
    parser.add_argument("--level", type=float, default=0.95, help="of all intervals")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of a decoding, latent steps included")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_pixels", type=int, default=None, help="area to which an image is shrunk")
    parser.add_argument("--min_pixels", type=int, default=None, help="area to which an image is enlarged")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples and of who is given whose imagination")
    parser.add_argument("--limit", type=int, default=None, help="read only the first N items and probe items")
    parser.add_argument("--dry_run", action="store_true", help="show a prompt and count decodings; writes nothing")
    args = parser.parse_args(argv)
    args.image_root = args.image_root or str(Path(args.items).parent)
    for name in ("batch_size", "max_new_tokens", "n_items"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    items, probes = read_inputs(args)
    chosen = choose(list(items.values()), args.n_items)
    wanted = {item["id"]: item for item in chosen} | {p["source"]: items[p["source"]] for p in probes}
    if args.dry_run:
        tokenizer, _ = load_processors(args.model)
        log(chat(tokenizer, question_text(chosen[0], args.suffix), len(chosen[0]["images"]), args.system))
        print(json.dumps({"instances": len(chosen), "probe_items": len(probes),
                          "decodings_at_most": len(wanted) + len(CONDITIONS) * len(probes)}))
        return 0
    qwen = load(args.model, args.dtype, None, args.min_pixels, args.max_pixels)
    spec, n_steps = None, args.latent_size or TEXT_STEPS
    if args.latent != "off":
        n_steps = args.latent_size or PRESETS[args.latent].size
        spec = replace(PRESETS[args.latent], size=n_steps)
    traces = collect(qwen, spec, list(wanted.values()), n_steps, args)
    instances = [traces[item["id"]] for item in chosen if item["id"] in traces]
    usable = [probe for probe in probes if probe["source"] in traces]
    output = Path(args.output)
    metrics = {"stage": "probe", "model": args.model, "items": args.items, "latent": args.latent, "steps": n_steps,
               "level": args.level, "emission": {"k": len(instances), "n": len(chosen),
                                                 "ci": wilson(len(instances), len(chosen), args.level)},
               "similarity": None, "probing": None, "probe_items_without_imagination": len(probes) - len(usable)}
    import matplotlib  # here: importing a script must stay free of side effects
    matplotlib.use("Agg")
    output.mkdir(parents=True, exist_ok=True)
    if len(instances) >= 4:  # two in each half
        states = {kind: [trace.states[kind] for trace in instances] for kind in KINDS}
        similarity = {kind: measure(states[kind], n_steps, args.level, args.seed) for kind in KINDS}
        write_json(output / "similarity.json", similarity)
        draw_heatmaps(states, n_steps, args.seed, output / "heatmap.png")
        draw_curves(similarity, args.level, output / "curves.png")
        metrics["similarity"] = {kind: {name: average(curve) for name, curve in curves.items()}
                                 for kind, curves in similarity.items()}
    if usable:
        rows = ask(qwen, spec, usable, items, traces, args)
        write_rows(output / "answers.jsonl", rows)
        metrics["probing"] = score(rows, usable, args.level)
        draw_probing(metrics["probing"], args.level, output / "probing.png")
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_json(output / "metrics.json", metrics)
    write_meta(args.output, args, [path for path in (args.items, args.probe_items) if path], metrics["seconds"])
    show(metrics)
    print(json.dumps(metrics))
    return 0


def average(curve: list[dict]) -> float | None:
    """Return the mean of a curve over its positions (null if it has none)."""
    means = [point["mean"] for point in curve if point["mean"] is not None]
    return float(np.mean(means)) if means else None


def show(metrics: dict) -> None:
    """Log emission, mean similarities and accuracies."""
    log("imagined something: {k} of {n} items".format(**metrics["emission"]))
    for kind, means in (metrics["similarity"] or {}).items():
        log(f"{kind:<12}" + "  ".join(f"{name} {'-' if mean is None else f'{mean:+.3f}'}" for name, mean in means.items()))
    for name, entry in (metrics["probing"] or {"conditions": {}})["conditions"].items():
        log(f"{name:<12}{100 * entry['accuracy']:.1f} % [{100 * entry['ci'][0]:.1f}, {100 * entry['ci'][1]:.1f}]  "
            f"parsed {100 * entry['parsed']:.1f} %")


if __name__ == "__main__":
    raise SystemExit(cli(main))
