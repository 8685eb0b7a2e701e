"""Rewrite interleaved image-text chains as text: every intermediate image becomes a caption of its content.

Stage 1 of 6:  [rewrite_captions.py] -> filter_data.py -> train_sft.py    (one call per image, one per chain)

    python rewrite_captions.py --input Visual_CoT/train.json --image_root . --output rewritten.jsonl \\
        --model Qwen/Qwen3-VL-4B-Instruct
    torchrun --standalone --nproc_per_node 8 rewrite_captions.py --input ... --image_root . --output ...
    python rewrite_captions.py --input ... --image_root . --output ... --backend openai --concurrency 256

Reads   --input, JSON or JSONL: Monet-SFT ("metadata", "data"), Mirage ("text_input", "image_input",
        "text_output", "image_output"), "conversations" or "messages" with images in the reply, or our own
        form: {"id", "subset", "images", "question", "answer", "steps"}, each step {"text"} or {"image",
        "operation": zoom or draw}, the last one a text with \\boxed{the answer}
Writes  --output: JSONL rows of our own form with "chain" and "refined", in input order
        <output>.run/: meta.json, calls-*.jsonl (one line per model call), images-*.jsonl (checked images),
        rejected.jsonl (all other samples and their reasons)
        <output>.meta.json, <output>.metrics.json
Prints  progress on stderr; on stdout one JSON object: counts, reasons by subset, speed

After a kill the same command resumes and writes the same bytes. Under torchrun, or with --shard, every
process makes its share of the calls, and the last one writes the output. Exit codes: 0 complete, 2 usage,
settings or damage, 3 complete but the model failed on samples, 4 too many failed calls, or no server answers,
130 interrupted.
"""
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from utils.call_flags import Stage, add_call_flags, load_prompts, run_stage, show_calls
from utils.chain_formats import SOURCE_REASONS, Fault, read_chains
from utils.cli import Help, cli, log, parse_count
from utils.images import IMAGE_REASONS
from utils.journal import Journal
from utils.jsonl import DataError, check_output, object_schema, write_rows
from utils.model_calls import ERROR_REASONS, RETRY, Call, Caller, ask, fill
from utils.rows import (CAPTION_REASONS, HAN_KANA, ROW_REASONS, THAI_KHMER, caption_fault, check_rows,
                        count_words, find_markup, has_loop, mark, split_final)

PROMPTS_VERSION = 2  # raised with every change of a prompt below; the paper's own prompts are not public
PROMPTS = {
    "SYSTEM": "You describe images exactly and reply with one JSON object and nothing else.",
    "ZOOM": """\
The image is a region that was cut out of a larger image and enlarged, in order to answer this question:
{question}

Describe what the region shows, in one to three plain sentences of 80 words at most. Put first what matters \
for the question. Copy text and numbers exactly. Name what cannot be made out instead of guessing. Describe \
only what is visible: do not answer the question, and do not mention the image, the region or the question.
"legible" says whether the region is clear enough to be described: "yes", "partly" or "no".
Reply with JSON: {"caption": "...", "legible": "yes"}""",
    "DRAW": """\
The first image is the original. The second image is the same one after something was drawn on it or changed \
in it, in order to answer this question:
{question}

Say what was changed, and state the information that the change brings out: which values, words, rows or \
objects are marked, highlighted, connected or hidden, and where. Copy text and numbers exactly. Do not \
answer the question, and do not mention the images or the question.
"marks" lists the marked things, at most 8 short entries; "description" says it in one to three plain \
sentences of 80 words at most; "changed" is false if both images look the same.
Reply with JSON: {"marks": ["..."], "description": "...", "changed": true}""",
    "REFINE": """\
Below are the numbered segments of a line of reasoning. Segments of kind "text" are thoughts; segments of \
kind "observation" say what was seen at that moment. Rewrite them so that, read in order, they are one \
fluent text.
Rules: keep every segment and its number. Keep each fact, number and quotation of an observation in that \
same segment. Add no new fact, number or conclusion. Do not mention images, crops, captions or segments. \
Keep about the same length.

{segments}

Reply with JSON: {"segments": [{"id": 1, "text": "..."}, ...]} with ids 1 to {count}.""",
    "RETRY": RETRY,
}
TEXT = {"type": "string", "maxLength": 1200}
MARKS = {"type": "array", "items": {"type": "string", "maxLength": 200}, "maxItems": 16}
SEGMENT = object_schema(id={"type": "integer"}, text={"type": "string", "maxLength": 8000})
SCHEMAS = {
    "zoom": object_schema(caption=TEXT, legible={"type": "string", "enum": ["yes", "partly", "no"]}),
    "draw": object_schema(marks=MARKS, description=TEXT, changed={"type": "boolean"}),
    "refine": object_schema(segments={"type": "array", "items": SEGMENT}),
}
REASONS = (*dict.fromkeys((*SOURCE_REASONS, "nothing_to_rewrite", *ROW_REASONS, *IMAGE_REASONS)), "duplicate",
           *CAPTION_REASONS, "caption_illegible", "caption_unchanged", "caption_repeated", *ERROR_REASONS)
# the paper's split
OPERATIONS = {"Visual_CoT": "zoom", "ReFocus": "draw", "CogCoM": "draw", "Mirage": "draw"}
NUMBER = re.compile(r"\d\d*(?:\.\d+)?")  # a third faster than \d+
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|「([^」]+)」|『([^』]+)』")
MIN_RECALL = 0.6  # of a caption's content words, in its refined segment
SHORT_CAPTION = 5  # content words, of which none may be lost
FILLER = set("and are but for from has have its the their there this that was were which with".split())
# a word of three letters; without spaces, a character but for Japanese inflections, or four of Thai
CONTENT = re.compile(rf"[^\W{HAN_KANA}{THAI_KHMER}]{{3,}}|(?![\u3041-\u309fー的了])[{HAN_KANA}]"
                     rf"|(?=([{THAI_KHMER}]{{4}}))")
POINTING = re.compile(  # at images that a reader of the chain does not have
    r"\b(?:at|in|see|on|from) (?:the|this) (?:image|picture|figure|crop) (?:above|below)\b"
    r"|\b(?:above|below|attached) (?:image|picture|figure|crop)\b|[上下][图圖図]|如[图圖]", re.I)
LENGTH_RATIO = (0.5, 2.0)  # characters of the refined chain against those before


class Segment(NamedTuple):
    kind: str  # "text", or "observation" for a caption
    text: str


@dataclass
class Sample:
    """An input sample; rejected with a `reason`. `hashes`: of the images of the question, then of the steps.
    """

    row: dict
    reason: str | None = None
    detail: str = ""
    hashes: list[str] = field(default_factory=list)

    def reject(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


# ---- samples
def read_samples(args: Namespace) -> list[Sample]:
    operations = OPERATIONS | dict(args.operation)
    chains = islice(read_chains(args.input), args.limit)
    samples = [make_sample(where, row, fault, operations) for _, where, row, fault in chains]
    for subset, operation in args.operation:
        if all(sample.row["subset"] != subset for sample in samples):
            log(f"--operation {subset}={operation}: no sample read is of that subset")
    if n := sum(sample.reason == "nothing_to_rewrite" for sample in samples):
        log(f"{n:,} of {len(samples):,} samples have no image in the reply: nothing to rewrite; train_sft.py "
            "trains on them as they are")
    return samples


def make_sample(where: str, row: dict, fault: Fault | None, operations: dict[str, str]) -> Sample:
    """Return a sample whose images have their operations, or that is rejected."""
    images = [step for step in row["steps"] if "image" in step]
    for step in images:
        step["operation"] = step.get("operation") or operation_of(where, row["subset"], operations)
    sample = Sample(row)
    if fault:
        sample.reject(*fault)
    elif not images:
        sample.reject("nothing_to_rewrite", "no image in the reply; train_sft.py trains on its text as it is")
    elif "history" in row:
        sample.reject("structure", "several questions; chains are made for one")
    return sample


def operation_of(where: str, subset: str, operations: dict[str, str]) -> str:
    """Return "zoom" or "draw" for a subset, by `operations` or its name."""
    if subset in operations:
        return operations[subset]
    if subset.startswith("Zebra_CoT_"):
        return "zoom"
    if subset.endswith(("_zoom", "_draw")):
        return subset[-4:]
    raise DataError(f"{where}: no operation is known for subset {subset!r}; give it with "
                    f"--operation {subset}=zoom or --operation {subset}=draw")


def accepted(samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.reason is None]


def apply_rules(samples: list[Sample], root: str, image_journal: Journal | None) -> None:
    """Reject samples in place by the rules that need no model; note the hashes of images."""
    checked = accepted(samples)
    inspections = check_rows([sample.row for sample in checked], root, image_journal=image_journal)
    for sample, inspection in zip(checked, inspections, strict=True):
        sample.hashes = inspection.hashes
        if inspection.reason:
            sample.reject(inspection.reason, inspection.detail)


# ---- captions
def caption_calls(sample: Sample, args: Namespace, prompts: dict[str, str]) -> list[Call]:
    """Return one call per image step. It shows the region of a zoom, or what a draw made of the first image.
    """
    row, calls = sample.row, []
    hashes = iter(sample.hashes[len(row["images"]):])
    for n, step in enumerate(row["steps"]):
        if "image" not in step:
            continue
        kind, images, digests = step["operation"], [step["image"]], [next(hashes)]
        if kind == "draw":
            images, digests = [row["images"][0], *images], [sample.hashes[0], *digests]
        calls.append(Call(row["id"], kind, n, fill(prompts[kind.upper()], question=row["question"].strip()),
                          tuple(os.path.join(args.image_root, path) for path in images), tuple(digests),
                          SCHEMAS[kind]))
    return calls


def check_caption(call: Call, value: dict) -> tuple[str, str] | None:
    if call.kind == "zoom" and value["legible"] == "no":
        return "caption_illegible", "the region was called illegible; describe what can be made out"
    if call.kind == "draw" and not value["changed"]:
        return "caption_unchanged", "no change was reported; look again at the second image"
    reason = caption_fault(caption_of(call, value))
    return (reason, f"the description was rejected: {reason.removeprefix('caption_')}") if reason else None


def caption_of(call: Call, value: dict) -> str:
    return " ".join(value["caption" if call.kind == "zoom" else "description"].split())


def add_captions(samples: list[Sample], caller: Caller, args: Namespace) -> None:
    """Give every image step its caption, or reject the sample."""
    calls = [(sample, call) for sample in accepted(samples)
             for call in caption_calls(sample, args, caller.prompts)]
    outcomes = ask(caller, [call for _, call in calls], check_caption, "captions")
    for (sample, call), outcome in zip(calls, outcomes, strict=True):
        if outcome.value is not None:
            sample.row["steps"][call.step]["caption"] = caption_of(call, outcome.value)
        elif sample.reason is None:
            sample.reject(outcome.reason, outcome.detail)


def reject_repeated(samples: list[Sample], at_most: int) -> None:
    """Reject in place samples with a caption that more than `at_most` different images have."""
    uses = defaultdict(list)  # caption -> (sample, caption as written, hash of the image)
    for sample in accepted(samples):
        steps = [step for step in sample.row["steps"] if "image" in step]
        for step, digest in zip(steps, sample.hashes[len(sample.row["images"]):], strict=True):
            uses[step["caption"].lower()].append((sample, step["caption"], digest))
    for same in uses.values():
        n_images = len({digest for _, _, digest in same})
        for sample, caption, _ in same if n_images > at_most else ():
            if sample.reason is None:
                sample.reject("caption_repeated",
                              f"the same caption for {n_images} different images: {caption[:80]!r}")


# ---- refinement
def make_segments(steps: list[dict]) -> tuple[list[Segment], str]:
    before, final = split_final(steps[-1]["text"])
    segments = [Segment("observation", step["caption"]) if "image" in step
                else Segment("text", step["text"].strip()) for step in steps[:-1]]
    return [segment for segment in [*segments, Segment("text", before)] if segment.text], final


def join_chain(segments: list[Segment], final: str) -> str:
    pieces = [mark(text) if kind == "observation" else text for kind, text in segments]
    return " ".join([*pieces, final])


def refine_call(sample: Sample, segments: list[Segment], prompts: dict[str, str]) -> Call:
    """Return the call that rewrites a chain; it shows neither images nor the final sentence."""
    lines = "\n".join(f"[{n}] {kind}: {text}" for n, (kind, text) in enumerate(segments, 1))
    text = fill(prompts["REFINE"], segments=lines, count=str(len(segments)))
    return Call(sample.row["id"], "refine", -1, text, schema=SCHEMAS["refine"])


def check_refined(segments: list[Segment], value: dict) -> tuple[str, str] | None:
    if [part["id"] for part in value["segments"]] != list(range(1, len(segments) + 1)):
        return "refine", f"the ids were not 1 to {len(segments)}, each once and in order"
    for n, (segment, part) in enumerate(zip(segments, value["segments"]), 1):
        if fault := segment_fault(segment, part["text"].strip(), segments):
            return "refine", f"segment {n} {fault}"
    n_before = sum(len(segment.text) for segment in segments)
    n_after = sum(len(part["text"]) for part in value["segments"])
    if not LENGTH_RATIO[0] * n_before <= n_after <= LENGTH_RATIO[1] * n_before:
        return "refine", (f"it has {n_after} characters where the segments had {n_before}; "
                          "keep about the same length")
    return None


def segment_fault(segment: Segment, after: str, segments: list[Segment]) -> str | None:
    """Return in words the fault of a refined segment, or None.

    New may be neither markup, loop nor pointing at images, nor a number that is in none of the `segments`.
    """
    if not after:
        return "is empty"
    if segment.kind == "observation":
        if reason := caption_fault(after):
            return f"was rejected: {reason.removeprefix('caption_')}"
        if lost := lost_facts(segment.text, after):
            return lost
    else:
        if markup := find_markup(after) - find_markup(segment.text):
            return f"has markup: {', '.join(sorted(markup))}"
        if has_loop(after) and not has_loop(segment.text):
            return "repeats itself"
    lower = after.lower()
    if any(word in lower for word in ("above", "below", "attached", "图", "圖", "図")):  # in every POINTING
        if (match := POINTING.search(after)) and not POINTING.search(segment.text):
            return f"points at an image that the reader does not have: {match[0]!r}"
    new = set(NUMBER.findall(after))
    for known in (segment, *segments):  # the segment first: mostly enough
        if not new:
            return None
        new.difference_update(NUMBER.findall(known.text))
    return f"has new numbers: {', '.join(sorted(new))}" if new else None


def lost_facts(caption: str, refined: str) -> str | None:
    """Return in words what a refined observation lost: a number, a quotation, or too many other words."""
    if caption in refined:
        return None
    numbers = sorted(set(NUMBER.findall(caption)) - set(NUMBER.findall(refined)))
    quotes = [quote for quote in map("".join, QUOTED.findall(caption)) if quote not in refined]
    if numbers or quotes:
        return f"lost {', '.join([*numbers, *quotes])}"
    words, kept = ({match[1] or match[0] for match in CONTENT.finditer(text.lower())} - FILLER
                   for text in (caption, refined))
    n_words = count_words([word[0] if "\u0e00" <= word < "\u1800" else word for word in words])
    needed = len(words) if n_words <= SHORT_CAPTION else MIN_RECALL * len(words)
    if len(words & kept) < needed:
        return f"lost too much of what was seen: {', '.join(sorted(words - kept)[:6])}"
    return None


def add_chains(samples: list[Sample], caller: Caller, args: Namespace) -> None:
    """Give every captioned sample its chain, refined if the refinement passes the checks."""
    alive = accepted(samples)
    parts = {sample.row["id"]: make_segments(sample.row["steps"]) for sample in alive}
    replies = [None] * len(alive)
    if not args.no_refine:
        calls = [refine_call(sample, parts[sample.row["id"]][0], caller.prompts) for sample in alive]
        replies = [outcome.value for outcome in ask(
            caller, calls, lambda call, value: check_refined(parts[call.id][0], value), "refinement",
            guarded=False)]
    for sample, value in zip(alive, replies, strict=True):
        segments, final = parts[sample.row["id"]]
        if value:
            segments = [Segment(segment.kind, part["text"].strip())
                        for segment, part in zip(segments, value["segments"], strict=True)]
        sample.row |= {"chain": join_chain(segments, final), "refined": bool(value)}


# ---- the stage
def rewrite(samples: list[Sample], caller: Caller, args: Namespace) -> None:
    apply_rules(samples, args.image_root, caller.images)
    add_captions(samples, caller, args)
    add_chains(samples, caller, args)


def export(samples: list[Sample], args: Namespace) -> dict:
    reject_repeated(samples, args.max_same_caption)
    kept = [sample.row for sample in accepted(samples)]
    rejected = [{"id": sample.row["id"], "subset": sample.row["subset"], "reason": sample.reason,
                 "detail": sample.detail} for sample in samples if sample.reason is not None]
    assert {row["reason"] for row in rejected} <= set(REASONS)
    reasons = defaultdict(Counter)
    for row in rejected:
        reasons[row["subset"]][row["reason"]] += 1
    write_rows(f"{args.output}.run/rejected.jsonl", rejected)
    write_rows(args.output, kept)
    n_refined = sum(row["refined"] for row in kept)
    return {"read": len(samples), "kept": len(kept), "rejected": len(rejected),
            "errors": sum(row["reason"] in ERROR_REASONS for row in rejected), "refined": n_refined,
            "refined_share": round(n_refined / len(kept), 4) if kept else None,
            "reasons": {subset: dict(sorted(counts.items())) for subset, counts in sorted(reasons.items())}}


def preview(samples: list[Sample], args: Namespace, prompts: dict[str, str]) -> dict:
    """Show one prompt of each kind; return counts (--dry_run)."""
    apply_rules(samples, args.image_root, None)
    calls = []
    for sample in accepted(samples):
        calls += (captions := caption_calls(sample, args, prompts))
        for call in captions:
            sample.row["steps"][call.step]["caption"] = "(the caption)"
    if not args.no_refine:
        calls += [refine_call(sample, make_segments(sample.row["steps"])[0], prompts)
                  for sample in accepted(samples)]
    reasons = Counter(sample.reason for sample in samples if sample.reason)
    return {"read": len(samples), "calls": show_calls(calls, args, prompts["SYSTEM"]),
            "rejected": dict(sorted(reasons.items()))}


def parse_operation(text: str) -> tuple[str, str]:
    subset, _, operation = text.rpartition("=")
    if not subset or operation not in ("zoom", "draw"):
        raise ArgumentTypeError(f"{text!r}: expected SUBSET=zoom or SUBSET=draw")
    return subset, operation


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--input", required=True, nargs="+", help="one or more files, read in this order")
    add_call_flags(parser, max_new_tokens=512)
    add("--operation", type=parse_operation, action="append", default=[], metavar="SUBSET=zoom|draw",
        help="the operation of another data set; repeatable")
    add("--no_refine", action="store_true", help="join captions and texts without refinement")
    add("--max_same_caption", type=parse_count, default=20,
        help="reject a caption that more different images have")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output(args.output, args.input)
    prompts = load_prompts(args.prompts, PROMPTS)

    def show(metrics: dict) -> None:
        log(f"kept {metrics['kept']:,} of {metrics['read']:,} samples ({metrics['errors']:,} errors) "
            f"-> {args.output}")

    return run_stage(args, Stage(
        args.input, prompts, PROMPTS_VERSION, SCHEMAS,
        {"stage": "rewrite_captions", "refine": not args.no_refine},
        read=lambda: read_samples(args), preview=lambda samples: preview(samples, args, prompts),
        work=lambda samples, caller: rewrite(samples, caller, args),
        export=lambda samples, _: export(samples, args), show=show))


if __name__ == "__main__":
    raise SystemExit(cli(main))
