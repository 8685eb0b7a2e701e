"""Change what a model imagines, in latents or in text, and measure what that does to its answers.

Stage 5 of 6:  train_sft.py -> [intervene.py] -> figures; items from evaluate.py    (one decoding an item and condition)

    python intervene.py --model checkpoint --items vstar.jsonl --output text.jsonl
    python intervene.py --model NOVAglow646/Monet-7B --items vstar.jsonl --latent monet_vllm --output monet.jsonl
    torchrun --standalone --nproc_per_node 8 intervene.py --model checkpoint --items hrbench_4k.jsonl --output text.jsonl

Reads   --items: multiple-choice items {"id", "question", "options": [[letter, text]], "answer": {"type": "letter",
        "value"}, "images": [{"path"}], "metric": "mcq"} and, if there, "group_id", "category", "hint"
Writes  --output: a JSON line for each item and condition, the first of them "clean": {"id", "group", "category", "gold",
        "condition", "site", "emitted_clean", "emitted", "segments" or "spans", "n_fed", "rel_change", "text", "finish",
        "n_new", "pred", "rule", "correct", "changed", "first_diff", "degenerate", "edit", "reason"}
        <output>.metrics.json, <output>.meta.json, <output>.png; <output>.run/ is the journal to resume from
Prints  emission and one line a condition on stderr; on stdout one JSON object: emission, effects with intervals, verdicts

Latents (--latent FAMILY, site "fed": the vector that a latent step feeds; the position still attends to the image):
  identity   the latent itself; must reproduce the clean ids      tau        one calibration latent everywhere (Monet test)
  add_noise  z + noise_scale * rms(z) * N(0, I)                   noise      N(0, I) scaled to the norm of z
  near_zero  0.001 * mean calibration latent
Text (--latent off, site "text": the reply is cut after its last imagination, edited, and continued):
  sham       nothing changed but the tokens made anew             directed   the right option's value -> a wrong option's
  removal    imaginations emptied
Effects are taken on the items that imagined something in the clean run, and on no others; what is parsed is what comes
after the last imagination. "No effect" is claimed only by an equivalence test within --margin. Killed, the same command
goes on. Exit codes: 0 complete; 3 complete, but images of some items failed; 2 usage, settings, damage or a broken
guard; 4 too many failed images; 130 interrupted.
"""
import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from utils.answers import extract_choice
from utils.decode import PRESETS, Arm, Generation, LatentSpec, clean_text, generate
from utils.edits import CLOSE, NotEditable, conclusion, direct, find_spans, put_spans
from utils.images import ImageError
from utils.items import open_images, question_text, read_items
from utils.journal import Journal
from utils.qwen import Qwen, chat, encode, load, load_processors
from utils.rows import (DataError, call_key, cli, log, rank_world, sha256_file, write_json,
                        write_meta, write_rows)
from utils.stats import cluster_bootstrap, holm, mcnemar_exact, tango_ci, tost_tango, wilson

CONTROLS = ("identity", "sham")  # change nothing: outside the family that Holm's correction spans
NEAR_ZERO = 1e-3  # of the mean latent: the "constant near 0" of the paper's Mirage arm
MAX_ERROR_SHARE = 0.1  # of items whose images fail, before the run is refused


# ------------------------------------------------------------------------------------ latents: one line a condition
@dataclass(frozen=True)
class Known:
    """What calibration items tell: their mean latent `mu` and the latent nearest to it, `tau` (both [hidden], float32)."""

    mu: torch.Tensor
    tau: torch.Tensor
    n_latents: int


# name -> f(z [hidden], eps ~ N(0, I) [hidden], known, noise_scale) -> the vector fed, all float32
LATENT_CONDITIONS: dict[str, Callable] = {
    "identity": lambda z, eps, known, scale: z,
    "tau": lambda z, eps, known, scale: known.tau,
    "add_noise": lambda z, eps, known, scale: z + scale * z.norm() / len(z)**0.5 * eps,
    "noise": lambda z, eps, known, scale: z.norm() * eps / eps.norm(),
    "near_zero": lambda z, eps, known, scale: NEAR_ZERO * known.mu}
NEED_CALIBRATION = ("tau", "near_zero")


def gaussian(n: int, *where) -> torch.Tensor:
    """Return n standard normal numbers that depend on `where` alone: not on batch, device or order."""
    return torch.randn(n, generator=torch.Generator().manual_seed(int(call_key(where=where)[:15], 16)))


def make_arm(condition: str, name: str, known: Known | None, noise_scale: float, seed: int) -> Arm:
    """Return what is done to the row of the item with this id."""
    def feed(z, segment, step):
        eps = gaussian(len(z), seed, name, segment, step).to(z.device)
        return LATENT_CONDITIONS[condition](z.float(), eps, known, noise_scale).to(z.device, z.dtype)
    return Arm(feed=feed)


# ------------------------------------------------------------------------------------ text: one line a condition
# name -> f(text up to the last </think_image>, spans, item, letter of a wrong option) -> (text, edit or None)
TEXT_CONDITIONS: dict[str, Callable] = {
    "sham": lambda text, spans, item, target: (text, None),
    "directed": direct,
    "removal": lambda text, spans, item, target: (put_spans(text, spans, [""] * len(spans)), None)}


# ------------------------------------------------------------------------------------ decoding, with a journal
@dataclass
class Run:
    """What the batches of a run share. `spec` None is the text arm; `known` None: calibration items emitted nothing."""

    qwen: Qwen
    spec: LatentSpec | None
    journal: Journal
    args: argparse.Namespace
    conditions: list[str]
    known: Known | None = None

    def get(self, item: dict, condition: str) -> dict | None:
        """Return the record of an item's decoding, if it was made; a failed clean one stands for all conditions."""
        clean, own = (self.journal.get(call_key(item=item["id"], condition=name)) for name in ("clean", condition))
        line = clean if clean and "error" in clean["record"] else own
        return line and line["record"]

    def put(self, item: dict, condition: str, record: dict) -> None:
        self.journal.append({"key": call_key(item=item["id"], condition=condition), "record": record})

    def encode(self, batch: list[dict], images: list[list], replies: list[str]) -> dict:
        """Return the tensors of a batch; `replies` are the assistant's beginnings, to be continued."""
        prompts = [chat(self.qwen.tokenizer, question_text(item, self.args.suffix), len(pictures), self.args.system) + reply
                   for item, pictures, reply in zip(batch, images, replies)]
        return encode(self.qwen, prompts, images)


def run_batch(run: Run, batch: list[dict]) -> None:
    """Decode a batch clean and under each condition, always in the same composition; write a record of each decoding."""
    missing = [name for name in ("clean", *run.conditions) if any(run.get(item, name) is None for item in batch)]
    if not missing:
        return
    opened = []
    for item in batch:
        try:
            opened.append((item, open_images(item, run.args.image_root)))
        except ImageError as error:
            log(f"{item['id']}: {error}")
            run.put(item, "clean", {"error": error.reason})
    if not opened:
        return
    batch, images = map(list, zip(*opened))
    inputs = run.encode(batch, images, [""] * len(batch))
    for condition in missing:
        clean = None if condition == "clean" else [run.get(item, "clean") for item in batch]
        if run.spec is None and clean:
            records = continue_text(run, batch, images, condition, clean)
        else:
            records = decode(run, batch, inputs, condition, clean)
        for item, record in zip(batch, records):
            run.put(item, condition, record)


def decode(run: Run, batch: list[dict], inputs: dict, condition: str, clean: list[dict] | None) -> list[dict]:
    """Return the records of one decoding, clean or with latents edited, after its guards.

    Where nothing in the batch emits, an edit is never called: the clean records stand without a second decoding.
    """
    if clean and not any(record["emitted"] for record in clean):
        return [{**record, "first_diff": None, "changed": False} for record in clean]
    arms = [make_arm(condition, item["id"], run.known, run.args.noise_scale, run.args.seed) for item in batch] if clean else None
    rows = generate(run.qwen, inputs, run.args.max_new_tokens, run.spec, arms, capture=run.spec is not None)
    records = [describe(run, item, row) for item, row in zip(batch, rows)]
    for item, record, before in zip(batch, records, clean or []):
        record["first_diff"] = first_difference(before["ids"], record["ids"])
        record["changed"] = record["first_diff"] is not None
        check_guards(item["id"], condition, before, record)
    return records


def describe(run: Run, item: dict, row: Generation) -> dict:
    """Return what one decoded reply did: its imaginations, the vectors fed, and the answer after the last of them."""
    tokenizer, spec = run.qwen.tokenizer, run.spec
    if spec is None:
        text = tokenizer.decode(row.ids, skip_special_tokens=True)  # not stripped: it may be continued
        last_words = conclusion(text)
        imagined = {"spans": find_spans(text)}
    else:
        text = clean_text(tokenizer, row.ids, spec)
        places = [j for s in row.segments for j in range(s.start, s.start + s.size)]
        last_words = clean_text(tokenizer, row.ids[places[-1] + 1:] if places else row.ids, spec)
        raw, fed = row.states[places].float(), row.fed.float()
        imagined = {"segments": [{"start": s.start, "k": s.size, "closed_by": s.closed_by} for s in row.segments],
                    "n_fed": len(fed), "rel_change": float((fed - raw).norm() / raw.norm()) if places else None}
        if len(fed) != len(places):
            raise DataError(f"{item['id']}: {len(fed)} vectors fed at {len(places)} latent positions; expected one each")
    return {"emitted": bool(places if spec else imagined["spans"]), **imagined,
            **answer(item, text, last_words, row.ids, row.finish), "ids": row.ids}


def answer(item: dict, text: str, last_words: str, ids: list[int], finish: str) -> dict:
    """Return the fields of a record that come from the reply's words."""
    found = extract_choice(last_words.strip(), dict(map(tuple, item["options"])), finish)
    return {"text": text, "finish": finish, "n_new": len(ids), "pred": found.letter, "rule": found.rule,
            "correct": found.letter == item["answer"]["value"], "degenerate": is_degenerate(ids, finish)}


def is_degenerate(ids: list[int], finish: str) -> bool:
    """Return whether a reply ends in a loop: a tail of period up to 64, or cut off with half its 4-grams repeated."""
    for period in range(1, 65):
        tail = ids[-max(3 * period, 48):]
        if len(tail) == max(3 * period, 48) and tail[period:] == tail[:-period]:
            return True
    grams = list(zip(*(ids[i:] for i in range(4))))
    return finish == "length" and bool(grams) and len(set(grams)) < len(grams) / 2


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first index at which two lists differ, None if they are equal."""
    both = min(len(one), len(other))
    return next((j for j in range(both) if one[j] != other[j]), None if len(one) == len(other) else both)


def check_guards(name: str, condition: str, clean: dict, record: dict) -> None:
    """Raise DataError where an intervention did what it must not, or did nothing: the harness would measure itself."""
    differs, first = record["first_diff"], \
        next((s["start"] for s in clean["segments"] if s["k"]), None)
    advice = "rounding moves with the batch: use --batch_size 1 or --dtype float32"
    if differs is not None and (condition == "identity" or first is None):
        why = "condition identity" if first is not None else f"no latents in the clean run, condition {condition}"
        raise DataError(f"{name}: ids differ from the clean run's at {differs} ({why}), expected the same; {advice}")
    if differs is not None and differs < first:
        raise DataError(f"{name}: {condition} changed id {differs}, before the first latent at {first}; {advice}")
    if first is not None and condition != "identity" and not record["rel_change"] > 0:
        raise DataError(f"{name}: {condition} fed the clean latents (relative change {record['rel_change']}), expected "
                        "others; is the noise scale 0, or are all latents of this model the same vector?")


def continue_text(run: Run, batch: list[dict], images: list[list], condition: str, clean: list[dict]) -> list[dict]:
    """Cut each clean reply after its last imagination, edit, and continue; return the records."""
    records, todo = [], []
    for i, (item, before) in enumerate(zip(batch, clean)):
        record = {"emitted": before["emitted"], "spans": before["spans"], "pred": None, "rule": None, "correct": False}
        records.append(record)
        wrong = [letter for letter, _ in item["options"] if letter != item["answer"]["value"]]
        target = random.Random(f"{run.args.seed}/{item['id']}").choice(wrong)
        try:
            if not before["spans"]:
                raise NotEditable("no_span")
            if condition == "directed" and before["pred"] is None:
                raise NotEditable("unresolved")
            text = before["text"][:before["spans"][-1][1]] + CLOSE
            prefix, record["edit"] = TEXT_CONDITIONS[condition](text, before["spans"], item, target)
            todo.append((i, prefix))
        except NotEditable as fault:
            record["reason"] = str(fault)
    if not todo:
        return records
    inputs = run.encode([batch[i] for i, _ in todo], [images[i] for i, _ in todo], [prefix for _, prefix in todo])
    for (i, prefix), row in zip(todo, generate(run.qwen, inputs, run.args.max_new_tokens)):
        text = run.qwen.tokenizer.decode(row.ids, skip_special_tokens=True)
        records[i] |= answer(batch[i], prefix + text, text, row.ids, row.finish)
        records[i]["changed"] = text.strip() != conclusion(clean[i]["text"]).strip()
    return records


def calibrate(run: Run, items: list[dict]) -> Known | None:
    """Return what the latents of these items tell, computed once a run; None if they emit none."""
    key, size = call_key(calibration=[item["id"] for item in items]), run.args.batch_size
    if key not in run.journal:
        latents = []
        for batch in tqdm([items[i:i + size] for i in range(0, len(items), size)], desc="calibration"):
            inputs = run.encode(batch, [open_images(item, run.args.image_root) for item in batch], [""] * len(batch))
            rows = generate(run.qwen, inputs, run.args.max_new_tokens, run.spec, capture=True)
            latents += [row.fed.float().cpu() for row in rows]
        found = torch.cat(latents)
        mu = found.double().mean(0).float()
        nearest = [found[(found - mu).norm(dim=1).argmin()].tolist(), mu.tolist()] if len(found) else [None, None]
        run.journal.append({"key": key, "tau": nearest[0], "mu": nearest[1], "n_latents": len(found)})
    record = run.journal.get(key)
    return Known(torch.tensor(record["mu"]), torch.tensor(record["tau"]), record["n_latents"]) if record["mu"] else None


# ------------------------------------------------------------------------------------ effects
def give_verdict(tost_ci: tuple[float, float], effect_ci: tuple[float, float], margin: float) -> str:
    """Return what two intervals of a change allow to be said: the first is of level 1 - 2 alpha, the second 1 - alpha."""
    inside = -margin < tost_ci[0] and tost_ci[1] < margin
    excludes_zero = effect_ci[0] > 0 or effect_ci[1] < 0
    return {(True, True): "small effect inside the margin", (True, False): "equivalent",
            (False, True): "effect", (False, False): "inconclusive"}[inside, excludes_zero]


def change_interval(changes: list[int], groups: list[str], level: float) -> tuple[float, float]:
    """Return Tango's interval of the mean of changes in {-1, 0, 1}; with groups, the wider of it and the bootstrap's."""
    low, high = tango_ci(changes.count(-1), changes.count(1), len(changes), level)
    if 1 < len(set(groups)) < len(groups):
        clustered = cluster_bootstrap(changes, groups, level)
        low, high = min(low, clustered[0]), max(high, clustered[1])
    return (low, high) if len(set(groups)) > 1 else (-1.0, 1.0)  # one group tells nothing about others


def measure(pairs: list[tuple[dict, dict]], groups: list[str], n_all: int, margin: float, level: float) -> dict:
    """Return the effect of a condition on accuracy from (clean, changed) records of the same items."""
    n = len(pairs)
    changes = [after["correct"] - before["correct"] for before, after in pairs]
    b, c = changes.count(-1), changes.count(1)
    tost_level = 2 * level - 1
    tost_ci, effect_ci = change_interval(changes, groups, tost_level), change_interval(changes, groups, level)
    shares = {"acc_clean": [x["correct"] for x, _ in pairs], "acc_int": [y["correct"] for _, y in pairs],
              "changed": [y["changed"] for _, y in pairs], "same_answer": [x["pred"] == y["pred"] for x, y in pairs],
              "unresolved_clean": [x["pred"] is None for x, _ in pairs],
              "unresolved_int": [y["pred"] is None for _, y in pairs], "degenerate": [y["degenerate"] for _, y in pairs]}
    return {"n": n, "n_groups": len(set(groups)), **{name: sum(values) / n for name, values in shares.items()},
            "b": b, "c": c, "delta": (c - b) / n, f"ci{100 * tost_level:.3g}": tost_ci, f"ci{100 * level:.3g}": effect_ci,
            "delta_all": (c - b) / n_all, "mcnemar_p": mcnemar_exact(b, c), "tost_p": tost_tango(b, c, n, margin),
            "verdict": give_verdict(tost_ci, effect_ci, margin)}


def share_of(k: int, n: int, level: float) -> dict:
    """Return a count as a share with Wilson's interval (null for none)."""
    return {"k": k, "n": n, "share": k / n if n else None, "ci": wilson(k, n, level) if n else None}


def summarize(items: list[dict], records: dict[str, dict[str, dict]], args: argparse.Namespace) -> dict:
    """Return emission and the effect of every condition; `records` are by item id and condition."""
    whole = [item for item in items if "error" not in records[item["id"]]["clean"]]
    clean = [records[item["id"]]["clean"] for item in whole]
    emitters = [item for item, record in zip(whole, clean) if record["emitted"]]
    segments = [s for record in clean for s in record.get("segments", record.get("spans"))]
    n_right = [sum(r["correct"] for r in clean if r["emitted"] is emitted) for emitted in (True, False)]
    result = {
        "n": len(whole), "errors": len(items) - len(whole), "acc_clean_all": share_of(sum(n_right), len(whole), args.level),
        "emission": share_of(len(emitters), len(whole), args.level),
        "acc_clean_emitters": share_of(n_right[0], len(emitters), args.level),
        "acc_clean_others": share_of(n_right[1], len(whole) - len(emitters), args.level),
        "segments": len(segments), "closed_by": Counter(s["closed_by"] for s in segments) if args.latent != "off" else None,
        "conditions": {name: summarize_condition(name, emitters, records, len(whole), args) for name in args.conditions}}
    tested = [e["effect"] for name, e in result["conditions"].items() if e["effect"] and name not in CONTROLS]
    for effect, p in zip(tested, holm([e["mcnemar_p"] for e in tested]) if tested else []):
        effect["holm_p"] = p
    return result


def summarize_condition(name: str, emitters: list[dict], records: dict, n_all: int, args: argparse.Namespace) -> dict:
    """Return {"effect": ... or None, "reason": why there is none} of one condition and, for directed edits, coverage."""
    pairs = [(item, records[item["id"]]["clean"], records[item["id"]].get(name)) for item in emitters]
    if len(emitters) < args.min_emitters:
        return {"effect": None, "reason": f"{len(emitters)} items imagined something, fewer than --min_emitters "
                                          f"{args.min_emitters}"}
    if any(after is None for *_, after in pairs):
        return {"effect": None, "reason": f"no latents in the {args.calibration} items of --calibration"}
    covered = [pair for pair in pairs if not pair[2].get("reason")]
    result = {"effect": None, "reason": None}
    if name == "directed":
        rest = [before for _, before, after in pairs if after.get("reason")]
        follow = [after["pred"] == after["edit"]["target"] for _, _, after in covered]
        result |= {"coverage": share_of(len(covered), len(pairs), args.level),
                   "not_editable": Counter(after["reason"] for *_, after in pairs if after.get("reason")),
                   "acc_clean_not_covered": share_of(sum(r["correct"] for r in rest), len(rest), args.level),
                   "follow": share_of(sum(follow), len(follow), args.level),
                   "resist": share_of(sum(after["correct"] for *_, after in covered), len(covered), args.level)}
    if len(covered) < args.min_emitters:
        return result | {"reason": f"{len(covered)} items could be edited, fewer than --min_emitters {args.min_emitters}"}
    groups = [item.get("group_id", item["id"]) for item, *_ in covered]
    return result | {"effect": measure([pair[1:] for pair in covered], groups, n_all, args.margin, args.level)}


def draw(metrics: dict, path: str) -> None:
    """Draw accuracy clean and under each condition, on the same items, with Wilson intervals; nothing without effects."""
    import matplotlib  # here: importing a script must stay free of side effects
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shown = {name: entry for name, entry in metrics["conditions"].items() if entry["effect"]}
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(max(7, 1.8 * len(shown) + 1.5), 5), layout="constrained")
    for x, entry in enumerate(shown.values()):
        effect = entry["effect"]
        bars = [("clean", effect["acc_clean"], "#a9b4c0"), ("intervened", effect["acc_int"], "#2f6db5")]
        if "follow" in entry:
            bars.append(("follows the edit", entry["follow"]["share"], "#d9822b"))
        for j, (label, share, color) in enumerate(bars):
            low, high = (abs(end - share) for end in wilson(round(share * effect["n"]), effect["n"], metrics["level"]))
            axes.bar(x + 0.27 * (j - (len(bars) - 1) / 2), 100 * share, 0.25, yerr=[[100 * low], [100 * high]], capsize=3,
                     error_kw={"linewidth": 1}, color=color, label=label)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=len(handles), frameon=False)
    axes.set_xticks(range(len(shown)), [tick_label(name, entry["effect"]) for name, entry in shown.items()], fontsize=9)
    axes.set(ylim=(0, 105), ylabel="share of items, %")
    emission = metrics["emission"]
    axes.set_title(f"{Path(metrics['model']).name}: {metrics['arm']} imagination, site {metrics['site']}\n"
                   f"{emission['k']} of {emission['n']} items imagined something; bars with {100 * metrics['level']:.3g} % "
                   f"intervals, margin ±{100 * metrics['margin']:.3g} points", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def tick_label(name: str, effect: dict) -> str:
    """Return a condition's name with its change in points, the interval of the equivalence test, and the verdict."""
    low, high = next(value for key, value in effect.items() if key.startswith("ci"))
    verdict = effect["verdict"].replace(" inside", "\ninside")
    return f"{name} (n = {effect['n']})\n{100 * effect['delta']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]\n{verdict}"


# ------------------------------------------------------------------------------------ the run
def split_items(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Return (calibration items, analysed items), checked; DataError for anything but multiple choice."""
    n_calibration = args.calibration if args.latent != "off" else 0
    items = read_items(args.items, None if args.limit is None else n_calibration + args.limit, ("mcq",))
    if len(items) <= n_calibration:
        raise DataError(f"{args.items}: {len(items)} items, of which --calibration takes {n_calibration}; expected more")
    return items[:n_calibration], items[n_calibration:]


def export(run: Run, items: list[dict]) -> dict[str, dict[str, dict]]:
    """Write the records in order of items and conditions; return them by item id and condition."""
    records = {item["id"]: {name: record for name in ("clean", *run.conditions)
                            if name == "clean" or "error" not in run.get(item, "clean")
                            for record in [run.get(item, name)]} for item in items}
    write_rows(run.args.output, (
        {"id": item["id"], "group": item.get("group_id", item["id"]), "category": item.get("category"),
         "gold": item["answer"]["value"], "condition": name, "site": site(run.args),
         "emitted_clean": records[item["id"]]["clean"].get("emitted"),
         **{field: value for field, value in record.items() if field != "ids"}}
        for item in items for name, record in records[item["id"]].items()))
    return records


def site(args: argparse.Namespace) -> str:
    return "text" if args.latent == "off" else "fed"


def show(metrics: dict) -> None:
    """Log emission and one line a condition."""
    emission = metrics["emission"]
    interval = "" if emission["ci"] is None else " [{:.1f}, {:.1f}]".format(*(100 * end for end in emission["ci"]))
    log(f"imagined something: {emission['k']} of {emission['n']} items, {100 * (emission['share'] or 0):.1f} %{interval}")
    for name, entry in metrics["conditions"].items():
        if effect := entry["effect"]:
            log(f"{tick_label(name, effect)} | ".replace("\n", " | ")
                + f"{100 * effect['acc_clean']:.1f} -> {100 * effect['acc_int']:.1f} % | right -> wrong {effect['b']}, "
                  f"wrong -> right {effect['c']} | replies changed {100 * effect['changed']:.1f} % | unresolved "
                  f"{100 * effect['unresolved_clean']:.1f} -> {100 * effect['unresolved_int']:.1f} %")
        else:
            log(f"{name} | no effect to report: {entry['reason']}")


def open_journal(args: argparse.Namespace) -> Journal:
    """Open `<output>.run`; conditions may be added between restarts, and what only the summary uses may change."""
    folder = Path(f"{args.output}.run")
    if args.fresh and folder.exists():
        n = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old-{n}"))
    free = ("items", "output", "image_root", "conditions", "margin", "level", "min_emitters", "fresh", "dry_run")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    return Journal(folder, {**settings, "items": sha256_file(args.items)})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--items", required=True, help="items JSONL, as evaluate.py --prepare writes it")
    parser.add_argument("--image_root", default=None, help="folder of the images (default: the items file's)")
    parser.add_argument("--output", required=True, help="records JSONL to write; <output>.run/ beside it is the journal")
    parser.add_argument("--latent", choices=("off", *sorted(PRESETS)), default="off", help="family of the latent tokens")
    parser.add_argument("--latent_size", type=int, default=None, help="latents a segment (default: the family's)")
    parser.add_argument("--conditions", nargs="+", default=None, metavar="NAME",
                        help=f"latents: {', '.join(LATENT_CONDITIONS)} (default: all); text: {', '.join(TEXT_CONDITIONS)} "
                             "(default: sham directed)")
    parser.add_argument("--noise_scale", type=float, default=1.0, help="lambda of add_noise, in units of the latent's rms")
    parser.add_argument("--calibration", type=int, default=32,
                        help="items, from the front of the file and not analysed, whose clean latents give tau and mu")
    parser.add_argument("--margin", type=float, default=0.05,
                        help="equivalence margin, a share of items; fix it before the run")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals; equivalence is tested at 1 - level")
    parser.add_argument("--min_emitters", type=int, default=50, help="fewer items with an imagination: no effect is given")
    parser.add_argument("--system", default=None, help="system prompt (default: the chat template's own)")
    parser.add_argument("--suffix", default="", help="what is put after the question")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of a decoding, latent steps included")
    parser.add_argument("--batch_size", type=int, default=8, help="items a batch, the same for clean and intervened")
    parser.add_argument("--max_pixels", type=int, default=None, help="area to which an image is shrunk")
    parser.add_argument("--min_pixels", type=int, default=None, help="area to which an image is enlarged")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the wrong options")
    parser.add_argument("--limit", type=int, default=None, help="analyse only the first N items after calibration")
    parser.add_argument("--fresh", action="store_true", help="move an earlier <output>.run aside and begin anew")
    parser.add_argument("--dry_run", action="store_true", help="show a prompt and count decodings; writes nothing")
    args = parser.parse_args(argv)
    known = TEXT_CONDITIONS if args.latent == "off" else LATENT_CONDITIONS
    args.conditions = args.conditions or [name for name in known if name != "removal"]
    args.image_root = args.image_root or str(Path(args.items).parent)
    if unknown := [name for name in args.conditions if name not in known]:
        parser.error(f"--conditions {' '.join(unknown)}: with --latent {args.latent} expected some of {' '.join(known)}")
    if not 0 < args.margin < 1 or not 0.5 < args.level < 1:
        parser.error(f"--margin {args.margin}, --level {args.level}: expected shares, the level above a half")
    for name in ("batch_size", "max_new_tokens", "min_emitters"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse_args(argv), time.monotonic()
    calibration, items = split_items(args)
    if args.dry_run:
        tokenizer, _ = load_processors(args.model)
        log(chat(tokenizer, question_text(items[0], args.suffix), len(items[0]["images"]), args.system))
        print(json.dumps({"items": len(items), "calibration": len(calibration), "conditions": args.conditions,
                          "decodings_at_most": len(calibration) + len(items) * (1 + len(args.conditions))}))
        return 0
    rank, world, local_rank = rank_world()
    qwen = load(args.model, args.dtype, f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu",
                args.min_pixels, args.max_pixels)
    spec = None
    if args.latent != "off":
        spec = replace(PRESETS[args.latent], size=args.latent_size or PRESETS[args.latent].size)
    with open_journal(args) as journal:
        run = Run(qwen, spec, journal, args, args.conditions)
        if calibration:
            run.known = calibrate(run, calibration)
            if run.known is None:
                run.conditions = [name for name in args.conditions if name not in NEED_CALIBRATION]
        batches = [items[i:i + args.batch_size] for i in range(0, len(items), args.batch_size)]
        for batch in tqdm(batches[rank::world], desc="intervene", disable=rank > 0):
            run_batch(run, batch)
        if world > 1:  # the rank that finds every record in the journals is the last one, and writes
            journal.reload()
            if any(run.get(item, name) is None for item in items for name in ("clean", *run.conditions)):
                return 0
        n_errors = sum("error" in run.get(item, "clean") for item in items)
        if n_errors > MAX_ERROR_SHARE * len(items):
            log(f"stopped: the images of {n_errors} of {len(items)} items failed; is --image_root {args.image_root} right?")
            return 4
        records = export(run, items)
    metrics = {"stage": "intervene", "model": args.model, "items": args.items, "arm": "text" if spec is None else "latent",
               "latent": args.latent, "latent_size": spec.size if spec else None, "site": site(args), "margin": args.margin,
               "level": args.level,
               "calibration": {"items": len(calibration), "latents": run.known.n_latents if run.known else 0},
               **summarize(items, records, args), "seconds": round(time.monotonic() - began, 1)}
    draw(metrics, f"{args.output}.png")
    write_json(f"{args.output}.metrics.json", metrics)
    write_meta(args.output, args, [args.items], metrics["seconds"], margin=args.margin)
    show(metrics)
    print(json.dumps(metrics))
    return 3 if n_errors else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
