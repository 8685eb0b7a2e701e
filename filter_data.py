"""Keep the rewritten rows that are fit to train on, first by rules, then by a model's judgement.

Stage 2 of 6:  rewrite_captions.py -> [filter_data.py] -> train_sft.py    (one call per row left by rules)

    python filter_data.py --input rewritten.jsonl --image_root . --output sft.jsonl \\
        --model Qwen/Qwen3-VL-4B-Instruct
    python filter_data.py --input rewritten.jsonl --image_root . --output sft.jsonl --rules_only
    python filter_data.py --input rewritten.jsonl --image_root . --output sft.jsonl \\
        --export_only --keep_unclear

Reads   --input: JSONL rows {"id", "subset", "images", "question", "answer", "steps", "chain"} from
        rewrite_captions.py
Writes  --output: the kept rows, unchanged and in input order
        <output>.run/: meta.json, calls-*.jsonl, images-*.jsonl and verdicts.jsonl: every row's {"id",
        "subset", "keep", "stage": rule | judge | error | null, "reasons", "detail", "flags", "judge",
        "blind"}; <output>.meta.json, <output>.metrics.json
Prints  progress and a table by subset on stderr; on stdout one JSON object: counts, reasons by subset, speed

The model fills in fields; code decides from them at the end, so other thresholds need no new call. A row on
which the model failed is an error, neither kept nor dropped. Resuming and exit codes are as in
rewrite_captions.py.
"""
import argparse
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from utils.answers import answers_match, normalize
from utils.call_flags import Stage, add_call_flags, load_prompts, run_stage, show_calls
from utils.cli import Help, cli, log
from utils.images import IMAGE_REASONS
from utils.journal import Journal
from utils.jsonl import check_output, object_schema, write_rows
from utils.model_calls import ERROR_REASONS, Call, Caller, ask, fill
from utils.reply_text import last_boxed
from utils.rows import (CAPTION_REASONS, CLOSE, OWN_FIELDS, ROW_REASONS, SPAN, caption_fault, check_rows,
                        find_markup, parse_options, read_own, row_fault, split_final)

PROMPTS_VERSION = 2  # raised with every change of a prompt below; the paper's own prompts are not public
PROMPTS = {
    "SYSTEM": "You check training examples strictly and reply with one JSON object and nothing else.",
    "JUDGE": """\
Question about the image above:
{question}

Line of reasoning, in which the passages between <think_image> and </think_image> say what was seen on \
looking closer:
{chain}

Stated answer: {answer}

Look at the image yourself, then judge this example:
"reason": your findings in 60 words at most.
"answerable": is the question clear, and has it exactly one answer that the image shows? "yes", "no" or \
"unclear".
"observation_supports_answer": is what was seen true of the image, and does it lead to the stated answer? \
"yes", "no" or "unclear".
"chain_consistent": does the reasoning hold together and end in the stated answer? "yes", "no" or "unclear".
"problems": those that apply of "ambiguous_question", "wrong_answer", "wrong_observation", "contradiction", \
"garbled_text"; [] if none does.
Reply with JSON: {"reason": "...", "answerable": "yes", "observation_supports_answer": "yes", \
"chain_consistent": "yes", "problems": []}""",
    "BLIND": """\
Someone looked at a picture to answer this question:
{question}

This is what was seen and thought, as far as it went:
{chain}

Answer the question from these notes alone, as briefly as you can; of an option, give the letter. If they do \
not tell, answer "unknown".
Reply with JSON: {"answer": "..."}""",
    "RETRY": "Your last reply could not be used: {fault}. Reply again, with the JSON object only.",
}
INPUT_FIELDS = OWN_FIELDS | {"chain": str}
VERDICT = {"type": "string", "enum": ["yes", "no", "unclear"]}
PROBLEMS = ("ambiguous_question", "wrong_answer", "wrong_observation", "contradiction", "garbled_text")
SCHEMAS = {
    "judge": object_schema(
        reason={"type": "string", "maxLength": 1200}, answerable=VERDICT, observation_supports_answer=VERDICT,
        chain_consistent=VERDICT,
        problems={"type": "array", "items": {"type": "string", "enum": list(PROBLEMS)}, "maxItems": 8}),
    "blind": object_schema(answer={"type": "string", "maxLength": 400})}
FIELDS = {"answerable": "unanswerable", "observation_supports_answer": "unsupported",
          "chain_consistent": "inconsistent"}  # a judge's field -> the reason if it is "no"
RULE_REASONS = (*ROW_REASONS, "chain", *CAPTION_REASONS, *IMAGE_REASONS, "duplicate")
JUDGE_REASONS = (*FIELDS.values(), *(f"{reason}_unclear" for reason in FIELDS.values()), *PROBLEMS,
                 "required", "blind_answer")
LONG_ANSWER = 6  # words
THINK_TAGS = {"<think>", "</think>", "\\boxed"}  # allowed outside observations (Mirage)


@dataclass
class Verdict:
    """The outcome of a row: the stage that dropped it (None: kept) and its closed reasons."""

    stage: str | None = None
    reasons: list[str] = field(default_factory=list)
    detail: str = ""
    hashes: list[str] = field(default_factory=list)
    judge: dict | None = None
    blind: str | None = None

    def drop(self, stage: str, reasons: list[str], detail: str = "") -> None:
        assert set(reasons) <= {*RULE_REASONS, *JUDGE_REASONS, *ERROR_REASONS}, reasons
        self.stage, self.reasons, self.detail = stage, reasons, detail


# ---- rules
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
    if boxed is None or not matches_answer(boxed, row):
        return "answer"
    spans, outside = split_spans(row["chain"])
    if len(spans) != sum("image" in step for step in row["steps"]) or find_markup(outside) - THINK_TAGS:
        return "chain"
    return next(filter(None, map(caption_fault, spans)), None)


def matches_answer(text: str, row: dict) -> bool:
    return answers_match(text, row["answer"], parse_options(row["question"]) or None)


def find_flags(row: dict) -> list[str]:
    """Return facts about a row that are no reason to drop it. answer_unseen: no observation holds the answer,
    unless it is yes or no, a number or a letter; answer_stated: one holds an answer of LONG_ANSWER words."""
    answer = row["answer"].strip()
    seen = any(normalize(answer) in normalize(span) for span in split_spans(row["chain"])[0])
    needs_no_words = (answer.lower() in ("yes", "no") or re.fullmatch(r"[\d.,%]+", answer)
                      or answer in parse_options(row["question"]))
    flags = {"unrefined": row.get("refined") is False, "answer_unseen": not seen and not needs_no_words,
             "answer_stated": seen and len(answer.split()) >= LONG_ANSWER}
    return [name for name, holds in flags.items() if holds]


def apply_rules(rows: list[dict], root: str, image_journal: Journal | None = None) -> list[Verdict]:
    verdicts = []
    for reason, detail, hashes in check_rows(rows, root, chain_fault, image_journal):
        verdicts.append(Verdict(hashes=hashes))
        if reason:
            verdicts[-1].drop("rule", [reason], detail)
    return verdicts


# ---- the judge
def judge_call(row: dict, verdict: Verdict, root: str, prompts: dict[str, str]) -> Call:
    text = fill(prompts["JUDGE"], question=row["question"].strip(), chain=row["chain"], answer=row["answer"])
    return Call(row["id"], "judge", -1, text, tuple(os.path.join(root, path) for path in row["images"]),
                tuple(verdict.hashes[:len(row["images"])]), SCHEMAS["judge"])


def blind_call(row: dict, prompts: dict[str, str]) -> Call:
    """Return the call that answers from the chain without image and final sentence."""
    text = fill(prompts["BLIND"], question=row["question"].strip(), chain=split_final(row["chain"])[0])
    return Call(row["id"], "blind", -1, text, schema=SCHEMAS["blind"])


def make_calls(rows: list[dict], verdicts: list[Verdict], args: argparse.Namespace,
               prompts: dict[str, str]) -> tuple[list[tuple[dict, Verdict]], list[Call]]:
    """Return the rows that passed the rules, and their calls: all of the judge, then all blind ones."""
    passed = [(row, verdict) for row, verdict in zip(rows, verdicts) if verdict.stage is None]
    calls = [judge_call(row, verdict, args.image_root, prompts) for row, verdict in passed]
    return passed, calls + [blind_call(row, prompts) for row, _ in passed if args.blind_answer]


def decide(value: dict, keep_unclear: bool, required: dict[str, str]) -> list[str]:
    """Return the JUDGE_REASONS to drop a row; [] keeps it."""
    reasons = [reason if value[name] == "no" else f"{reason}_unclear" for name, reason in FIELDS.items()
               if value[name] == "no" or value[name] == "unclear" and not keep_unclear]
    if not reasons and any(value[name] != wanted for name, wanted in required.items()):
        reasons.append("required")
    return reasons + [problem for problem in PROBLEMS if problem in value["problems"]]


def judge(rows: list[dict], caller: Caller | None, args: argparse.Namespace) -> list[Verdict]:
    """Return a verdict per row; without `caller`, by rules alone."""
    if caller is None:
        return apply_rules(rows, args.image_root)
    verdicts = apply_rules(rows, args.image_root, caller.images)
    passed, calls = make_calls(rows, verdicts, args, caller.prompts)
    outcomes = ask(caller, calls, lambda call, value: None, "judge")
    for (_, verdict), outcome in zip(passed, outcomes):
        verdict.judge = outcome.value
        if outcome.value is None:
            verdict.drop("error", [outcome.reason], outcome.detail)
        elif reasons := decide(outcome.value, args.keep_unclear, dict(args.require)):
            verdict.drop("judge", reasons)
    for (row, verdict), outcome in zip(passed, outcomes[len(passed):]):
        if outcome.value is not None:
            verdict.blind = outcome.value["answer"]
            if verdict.stage is None and not matches_answer(verdict.blind, row):
                verdict.drop("judge", ["blind_answer"],
                             f"answered {verdict.blind[:80]!r} from the chain alone")
        elif verdict.stage != "error":
            verdict.drop("error", [outcome.reason], outcome.detail)
    return verdicts


# ---- output
def count_verdicts(rows: list[dict], verdicts: list[Verdict]) -> dict:
    """Return counts over all rows and by subset, of each row's first reason."""
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


def export(rows: list[dict], verdicts: list[Verdict], output: str) -> dict:
    """Write the kept rows and every verdict; return the counts."""
    counts = count_verdicts(rows, verdicts)
    write_rows(f"{output}.run/verdicts.jsonl", (
        {"id": row["id"], "subset": row["subset"], "keep": verdict.stage is None, "stage": verdict.stage,
         "reasons": verdict.reasons, "detail": verdict.detail, "flags": find_flags(row),
         "judge": verdict.judge, "blind": verdict.blind}
        for row, verdict in zip(rows, verdicts, strict=True)))
    write_rows(output, (row for row, verdict in zip(rows, verdicts) if verdict.stage is None))
    return counts


def preview(rows: list[dict], args: argparse.Namespace, prompts: dict[str, str]) -> dict:
    """Show one prompt of each kind; return counts (--dry_run)."""
    verdicts = apply_rules(rows, args.image_root)
    _, calls = make_calls(rows, verdicts, args, prompts)
    return {"calls": show_calls(calls, args, prompts["SYSTEM"])} | count_verdicts(rows, verdicts)


# ---- the stage
def parse_require(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if name not in FIELDS or value not in VERDICT["enum"]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(FIELDS)}, =, and yes, no or "
                                         "unclear")
    return name, value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--input", required=True, help="JSONL written by rewrite_captions.py")
    add_call_flags(parser, max_new_tokens=384)
    parser.add_argument("--blind_answer", action="store_true",
                        help="drop rows whose chain without image and final sentence does not lead to the "
                        "answer (one more call per row)")
    parser.add_argument("--keep_unclear", action="store_true", help="keep rows that the judge calls unclear")
    parser.add_argument("--require", type=parse_require, action="append", default=[], metavar="FIELD=VALUE",
                        help="drop rows for which the judge gave another value; repeatable")
    parser.add_argument("--rules_only", action="store_true", help="use no model: keep what passes the rules")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output(args.output, [args.input])
    prompts = load_prompts(args.prompts, PROMPTS)
    return run_stage(args, Stage(
        [args.input], prompts, PROMPTS_VERSION, SCHEMAS,
        {"stage": "filter_data", "blind_answer": args.blind_answer},
        read=lambda: read_own(args.input, INPUT_FIELDS, args.limit, "rewrite_captions.py writes it"),
        preview=lambda rows: preview(rows, args, prompts),
        work=lambda rows, caller: judge(rows, caller, args),
        export=lambda rows, verdicts: export(rows, verdicts, args.output),
        show=show_table, needs_model=not args.rules_only))


if __name__ == "__main__":
    raise SystemExit(cli(main))
