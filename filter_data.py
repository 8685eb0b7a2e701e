"""Keep the rewritten rows that are fit to train on, first by rules, then by a model's judgement.

Stage 2 of 6:  rewrite_captions.py -> [filter_data.py] -> train_sft.py    (one call per row left by rules)

    python filter_data.py --input rewritten.jsonl --image_root . --output sft.jsonl \\
        --model Qwen/Qwen3-VL-4B-Instruct
    python filter_data.py --input rewritten.jsonl --image_root . --output sft.jsonl --rules_only

Reads   --input: JSONL rows {"id", "subset", "images", "question", "answer", "steps", "chain"} from
        rewrite_captions.py
Writes  --output: the kept rows, unchanged and in input order
        <output>.run/: meta.json, calls-*.jsonl, images-*.jsonl and verdicts.jsonl: every row's {"id",
        "subset", "keep", "stage": rule | judge | error | null, "reasons", "detail", "judge"};
        <output>.meta.json, <output>.metrics.json
Prints  progress and a table by subset on stderr; on stdout one JSON object: counts, reasons by subset, speed

The judge fills in short values: what is asked and found, seen and stated. Code compares them at the end, so
another choice needs no new call. A row on which the model failed is an error, neither kept nor dropped.
--calibrate scores the filter on planted faults. Resuming and exit codes are as in rewrite_captions.py.
"""
import os
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from utils.answers import QUANTITY, answers_match, normalize
from utils.call_flags import Stage, add_call_flags, load_prompts, run_stage, show_calls
from utils.cli import Help, cli, log
from utils.display import share_cell, table_lines
from utils.images import IMAGE_REASONS
from utils.journal import Journal
from utils.jsonl import DataError, check_output, object_schema, read_rows, write_rows
from utils.model_calls import ERROR_REASONS, RETRY, Call, Caller, ask, fill
from utils.reply_text import last_boxed
from utils.rows import (CAPTION_REASONS, CLOSE, OWN_FIELDS, ROW_REASONS, SPAN, caption_fault, check_own,
                        check_rows, count_words, find_markup, parse_options, row_fault, split_final, units_of)
from utils.stats import wilson

PROMPTS_VERSION = 3  # raised with every change of a prompt below; the paper's own prompts are not public
PROMPTS = {
    "SYSTEM": "You check training examples strictly and reply with one JSON object and nothing else.",
    "JUDGE": """\
Question about the image above:
{question}

Line of reasoning without its conclusion; the passages between <think_image> and </think_image> say what was \
seen on looking closer:
{chain}

Look at the image yourself, then fill in this form:
"reason": your findings in 60 words at most.
"asked": the thing that the question is about, in at most three words, such as "red boat".
"found": the same words if the image shows that thing; else what is there in its place, or "not shown".
"seen": the answer to the question by the image alone.
"stated": the answer to which the line of reasoning leads, be it right or wrong.
"problems": those that apply of "ambiguous_question", "wrong_observation" (a passage is untrue of the image) \
and "garbled_text"; [] if none does.
"seen" and "stated" are quoted: a number, a few words, an option's letter, or "unclear" if you cannot tell.
Reply with JSON: {"reason": "...", "asked": "...", "found": "...", "seen": "...", "stated": "...", \
"problems": []}""",
    "RETRY": RETRY,
}
INPUT_FIELDS = OWN_FIELDS | {"chain": str}
FAULT_FIELDS = {"id": str, "bad": (str, type(None))}
PROBLEMS = ("ambiguous_question", "wrong_observation", "garbled_text")
VALUE = {"type": "string", "maxLength": 200}
SCHEMAS = {"judge": object_schema(
    reason={"type": "string", "maxLength": 1200}, asked=VALUE, found=VALUE, seen=VALUE, stated=VALUE,
    problems={"type": "array", "items": {"type": "string", "enum": list(PROBLEMS)}, "maxItems": 8})}
COMPARED = ("unanswerable", "unsupported", "inconsistent")  # of found, seen and stated
RULE_REASONS = (*ROW_REASONS, "chain", *CAPTION_REASONS, *IMAGE_REASONS, "duplicate")
JUDGE_REASONS = (*COMPARED, *(f"{reason}_unclear" for reason in COMPARED), *PROBLEMS)
NO_VALUE = {"unclear", "unknown", "not shown", "none", "n/a"}
LONGEST_COMPARED = 3  # words; longer values may differ in wording alone
THINK_TAGS = {"<think>", "</think>", "\\boxed"}  # allowed outside observations (Mirage)


@dataclass
class Verdict:
    """The outcome of a row: the stage that dropped it (None: kept) and its closed reasons."""

    stage: str | None = None
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    hashes: list[str] = field(default_factory=list)
    judge: dict | None = None

    def drop(self, stage: str, reasons: list[str], detail: str = "") -> None:
        assert set(reasons) <= {*RULE_REASONS, *JUDGE_REASONS, *ERROR_REASONS}, reasons
        self.stage, self.reasons, self.detail = stage, reasons, detail


# ---- rules
def read_input(path: str, limit: int | None) -> list[dict]:
    rows = read_rows(path, INPUT_FIELDS, limit, "rewrite_captions.py writes it")
    for row in rows:
        check_own(f"{path}: id {row['id']!r}", row)
    return rows


def split_spans(text: str) -> tuple[list[str], str]:
    """Return (the imaginations of a whole chain, the chain without them)."""
    end = text.rfind(CLOSE) + len(CLOSE) if CLOSE in text else 0  # searching further takes quadratic time
    return SPAN.findall(text[:end]), SPAN.sub(" ", text[:end]) + text[end:]


def chain_fault(row: dict) -> str | None:
    """Return the closed reason why a row's texts are unfit, or None: stage 1's, "answer" also for the chain's
    last box, "chain" without one observation per image step or with markup left over."""
    if reason := row_fault(row):
        return reason
    boxed = last_boxed(row["chain"])
    if boxed is None or not answers_match(boxed, row["answer"], parse_options(row["question"]) or None):
        return "answer"
    spans, outside = split_spans(row["chain"])
    if len(spans) != sum("image" in step for step in row["steps"]) or find_markup(outside) - THINK_TAGS:
        return "chain"
    return next(filter(None, map(caption_fault, spans)), None)


def apply_rules(rows: list[dict], root: str, image_journal: Journal | None = None) -> list[Verdict]:
    verdicts = []
    for reason, detail, hashes in check_rows(rows, root, chain_fault, image_journal):
        verdicts.append(Verdict(hashes=hashes))
        if reason:
            verdicts[-1].drop("rule", [reason], detail)
    return verdicts


# ---- the judge
def judge_call(row: dict, verdict: Verdict, root: str, prompts: dict[str, str]) -> Call:
    """Return the call that fills in the values; the stated answer is kept out of its prompt."""
    text = fill(prompts["JUDGE"], question=row["question"].strip(), chain=split_final(row["chain"])[0])
    return Call(row["id"], "judge", -1, text, tuple(os.path.join(root, path) for path in row["images"]),
                tuple(verdict.hashes[:len(row["images"])]), SCHEMAS["judge"])


def compare(value: str, wanted: str, options: dict[str, str]) -> bool | None:
    """Return whether two values are the same, in whatever spelling; None if code cannot tell: no value, no
    option, a part of the other, a number against words, another unit, or words of which one is long."""
    if answers_match(value, wanted, options or None):
        return True
    if options:
        return False if any(answers_match(value, text, options) for text in options.values()) else None
    texts = [normalize(value), normalize(wanted)]
    words, numbers = [units_of(text) for text in texts], [QUANTITY.fullmatch(text) for text in texts]
    if texts[0] in NO_VALUE or {*words[0]} <= {*words[1]} or {*words[1]} <= {*words[0]}:
        return None
    if any(numbers):
        units = {number and (number[1] or number[4]) for number in numbers} - {""}
        return None if None in units or len(units) > 1 else False
    return None if max(map(count_words, words)) > LONGEST_COMPARED else False


def decide(value: dict, row: dict, keep_unclear: bool) -> list[str]:
    """Return the JUDGE_REASONS to drop a row; [] keeps it."""
    found, options = normalize(value["found"]), parse_options(row["question"])
    shown = None if found in NO_VALUE else compare(value["found"], value["asked"], {})
    same = (shown if found != "not shown" else False,
            *(compare(value[name], row["answer"], options) for name in ("seen", "stated")))
    reasons = [reason if holds is False else f"{reason}_unclear" for reason, holds in zip(COMPARED, same)
               if holds is False or holds is None and not keep_unclear]
    return reasons + [problem for problem in PROBLEMS if problem in value["problems"]]


def judge(rows: list[dict], caller: Caller | None, args: Namespace) -> list[Verdict]:
    """Return a verdict per row; without `caller`, by rules alone."""
    if caller is None:
        return apply_rules(rows, args.image_root)
    verdicts = apply_rules(rows, args.image_root, caller.images)
    passed = [(row, verdict) for row, verdict in zip(rows, verdicts) if verdict.stage is None]
    calls = [judge_call(row, verdict, args.image_root, caller.prompts) for row, verdict in passed]
    outcomes = ask(caller, calls, lambda call, value: None, "judge")
    for (row, verdict), outcome in zip(passed, outcomes, strict=True):
        verdict.judge = outcome.value
        if outcome.value is None:
            verdict.drop("error", [outcome.reason], outcome.detail)
        elif reasons := decide(outcome.value, row, args.keep_unclear):
            verdict.drop("judge", reasons)
    return verdicts


# ---- output
def count_verdicts(rows: list[dict], verdicts: list[Verdict]) -> dict:
    outcomes = ("rule", "judge", "error", "kept")
    subsets = defaultdict(lambda: dict.fromkeys(("in", *outcomes), 0) | {"reasons": Counter()})
    for row, verdict in zip(rows, verdicts, strict=True):
        subset = subsets[row["subset"]]
        subset["in"] += 1
        subset[verdict.stage or "kept"] += 1
        subset["reasons"].update(f"{verdict.stage}:{reason}" for reason in verdict.reasons[:1])
    for subset in subsets.values():
        subset["reasons"] = dict(subset["reasons"].most_common())
    totals = {name: sum(subset[name] for subset in subsets.values()) for name in outcomes}
    return {"read": len(rows), "kept": totals["kept"],
            "kept_share": round(totals["kept"] / len(rows), 4) if rows else None,
            "rule_rejected": totals["rule"], "judge_dropped": totals["judge"], "errors": totals["error"],
            "subsets": dict(sorted(subsets.items()))}


def show_table(counts: dict) -> None:
    columns = ("in", "rule", "judge", "error", "kept")
    log(f"{'subset':<28}" + "".join(f"{column:>9}" for column in columns))
    for name, subset in counts["subsets"].items():
        log(f"{name:<28}" + "".join(f"{subset[column]:>9,}" for column in columns))
        for reason, n in subset["reasons"].items():
            log(f"    {reason:<40}{n:>6,}  {n / subset['in']:.1%}")
    if "calibration" in counts:
        header = ["planted faults", "% of rows (95 % interval)"]
        log("\n".join(table_lines(header, share_rows(counts["calibration"]["shares"]))))


# ---- planted faults
def share_of(outcomes: Iterable[object]) -> dict:
    """Return how many outcomes are true (or not empty), with Wilson's interval."""
    hits = list(map(bool, outcomes))
    k, n = sum(hits), len(hits)
    return {"k": k, "n": n, "share": k / n if n else None, "ci95": wilson(k, n) if n else None}


def calibrate(rows: list[dict], verdicts: list[Verdict], faults: dict[str, str | None]) -> dict:
    """Return how well the filter finds the faults of {id: kind, or None: sound}. Errors do not count; absent:
    ids that the input lacks, because stage 1 rejected them, say."""
    reasons = {row["id"]: [f"{verdict.stage}:{reason}" for reason in verdict.reasons]
               for row, verdict in zip(rows, verdicts) if verdict.stage != "error"}
    known = [(faults[name], found) for name, found in reasons.items() if name in faults]
    if not known:
        raise DataError(f"--calibrate: none of its {len(faults)} ids has a verdict; expected ids of --input")
    shares = {
        "recall": share_of(found for fault, found in known if fault is not None),
        **{f"recall:{kind}": share_of(found for fault, found in known if fault == kind)
           for kind in sorted({*faults.values()} - {None})},
        "false_drops": share_of(found for fault, found in known if fault is None),
        "precision": share_of(fault is not None for fault, found in known if found),
        **{f"precision:{reason}": share_of(fault is not None for fault, found in known if reason in found)
           for reason in sorted({reason for _, found in known for reason in found})},
        "sound_kept": share_of(fault is None for fault, found in known if not found)}
    ids = {row["id"] for row in rows}
    return {"known": len(known), "errors": len(ids & {*faults}) - len(known),
            "absent": Counter(fault or "sound" for name, fault in faults.items() if name not in ids),
            "shares": shares | correct(share_of(reasons.values()), shares["recall"], shares["false_drops"])}


def correct(dropped: dict, recall: dict, false_drops: dict) -> dict:
    """Return the shares of sound rows in the input and among the kept, corrected for missed faults and false
    drops (Rogan and Gladen 1978; bounded to [0, 1]); None unless recall is above false_drops. The interval is
    wide: it takes the three Wilson intervals at their ends."""
    def sound(share: float, hit: float, false: float, otherwise: float) -> float:
        return min(max((hit - share) / (hit - false), 0.0), 1.0) if hit > false else otherwise

    parts = dropped, recall, false_drops
    if not (recall["n"] and false_drops["n"] and recall["share"] > false_drops["share"]):
        return {"sound_corrected": None, "sound_kept_corrected": None}
    share = sound(*(part["share"] for part in parts), 0)
    lows, highs = zip(*(part["ci95"] for part in parts))
    n_kept = dropped["n"] - dropped["k"]
    kept = min(share * (1 - false_drops["share"]) * dropped["n"] / n_kept, 1.0) if n_kept else None
    return {"sound_corrected": {"n": dropped["n"], "share": share, "ci95": (
                sound(highs[0], lows[1], lows[2], 0.0), sound(lows[0], highs[1], highs[2], 1.0))},
            "sound_kept_corrected": {"n": n_kept, "share": kept, "ci95": None}}


def share_rows(shares: dict[str, dict | None]) -> list[list[str]]:
    return [[name.replace("_", " "), share_cell(share) if share else "-"] for name, share in shares.items()]


def export(rows: list[dict], verdicts: list[Verdict], output: str, faults: dict | None) -> dict:
    write_rows(f"{output}.run/verdicts.jsonl", (
        {"id": row["id"], "subset": row["subset"], "keep": verdict.stage is None, "stage": verdict.stage,
         "reasons": verdict.reasons, "detail": verdict.detail, "judge": verdict.judge}
        for row, verdict in zip(rows, verdicts, strict=True)))
    write_rows(output, (row for row, verdict in zip(rows, verdicts) if verdict.stage is None))
    counts = count_verdicts(rows, verdicts)
    return counts if faults is None else counts | {"calibration": calibrate(rows, verdicts, faults)}


def preview(rows: list[dict], args: Namespace, prompts: dict[str, str]) -> dict:
    """Show one prompt of each kind; return counts (--dry_run)."""
    verdicts = apply_rules(rows, args.image_root)
    calls = [judge_call(row, verdict, args.image_root, prompts)
             for row, verdict in zip(rows, verdicts) if verdict.stage is None]
    return {"calls": show_calls(calls, args, prompts["SYSTEM"])} | count_verdicts(rows, verdicts)


# ---- the stage
def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--input", required=True, help="JSONL written by rewrite_captions.py")
    add_call_flags(parser, max_new_tokens=384)
    add("--keep_unclear", action="store_true", help="keep rows whose values do not compare")
    add("--calibrate", metavar="TRUTH",
        help='JSONL {"id", "bad": null or a kind}: how well are these faults found?')
    add("--rules_only", action="store_true", help="use no model: keep what passes the rules")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    inputs = [args.input, *filter(None, [args.calibrate])]
    check_output(args.output, inputs)
    faults = args.calibrate and {row["id"]: row["bad"] for row in read_rows(args.calibrate, FAULT_FIELDS)}
    prompts = load_prompts(args.prompts, PROMPTS)
    return run_stage(args, Stage(
        inputs, prompts, PROMPTS_VERSION, SCHEMAS, {"stage": "filter_data"},
        read=lambda: read_input(args.input, args.limit),
        preview=lambda rows: preview(rows, args, prompts),
        work=lambda rows, caller: judge(rows, caller, args),
        export=lambda rows, verdicts: export(rows, verdicts, args.output, faults),
        show=show_table, needs_model=not args.rules_only))


if __name__ == "__main__":
    raise SystemExit(cli(main))
