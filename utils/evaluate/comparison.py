"""Show the scores of a run, compare result files with tests (--compare), make the paper's table (--table).

Two files on the same items give a difference with its interval, a test and the ids whose answer changed, also
of a judge that read both ("judged"); several pairs are adjusted by Holm. Items that are an error in either
file are left out and counted.

    --table CapImagine=vstar.jsonl CapImagine=hrbench.jsonl Monet=monet_vstar.jsonl mine.jsonl

shows our numbers with the paper's in brackets. A file without a name gets a row of its own.
"""
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.backends import log_textless
from utils.cli import log
from utils.display import interval, percent, table_lines
from utils.evaluate.results import macro
from utils.evaluate.scoring import VERDICTS
from utils.items import group_of
from utils.jsonl import DataError, load_object, read_rows
from utils.means import sign_flip
from utils.stats import holm, mcnemar_exact, paired_interval


def read_results(path: str) -> list[dict]:
    fields = {"id": str, "verdict": str, "benchmark": (str, type(None)), "group_id": (str, type(None))}
    rows = read_rows(path, fields, hint="evaluate.py writes it")
    for row in rows:
        if row["verdict"] not in VERDICTS:
            raise DataError(f"{path}: id {row['id']!r}: verdict {row['verdict'][:40]!r}, expected one of "
                            f"{', '.join(VERDICTS)}")
    return rows


# ---- the scores of a run
def protocol_line(protocol: dict) -> str:
    low, high = protocol["pixels"]
    pixels = "unknown" if high is None else f"{'server' if low is None else low}..{high}"
    return (f"protocol={protocol['protocol']} method={protocol['method']} "
            f"prompt={protocol['prompt_sha'] or 'unknown'} pixels={pixels} judge={protocol['judge']}"
            + ("" if protocol.get("shuffle_options") is None else f" shuffled={protocol['shuffle_options']}")
            + (f" temperature={protocol['temperature']} samples={protocol['samples']} seed={protocol['seed']}"
               if protocol.get("temperature") else ""))


def show(metrics: dict) -> None:
    """Log a table by category with its floors, other scores, how replies ended, and the protocol."""
    log(f"{'category':<24}{'n':>6}{'correct':>9}{'accuracy':>10}   95 % interval{'chance':>8}{'constant':>10}"
        f"{'unresolved':>12}{'errors':>8}{'tokens':>8}")
    for name, part in {**metrics["categories"], "all": metrics}.items():
        if part["n"]:
            constant, tokens = part["constant"], part["mean_tokens"]
            log(f"{name[-24:]:<24}{part['n']:>6}{part['correct']:>9}{part['accuracy']:>10.1%}   "
                f"{interval(part['ci95']):<13}{percent(part['chance']):>8}"
                f"{percent(constant and constant['accuracy']):>10}{part['unresolved']:>12}{part['error']:>8}"
                f"{'-' if tokens is None else round(tokens):>8}")
    for size, floors in metrics["vsp_floors"].items():
        log(f"without a model, size {size}: " + " | ".join(
            f"{name} {100 * value:.4g} %" for name, value in floors.items() if name != "n"))
    for name, scores in metrics["own_scores"].items():
        if numbers := dict(flat(scores)):
            log(f"{name}: " + " | ".join(f"{part} {value:.4g}" for part, value in numbers.items()))
    judge, shares = metrics.get("with_judge"), {"strict": metrics["accuracy"]}
    if judge:
        shares["with judge"] = judge["accuracy"]
    shares |= {name: part["accuracy"] for name, part in metrics.get("compat", {}).items()}
    log(" | ".join(f"{name} {value:.1%}" for name, value in shares.items() if value is not None))
    if n := metrics["n"]:
        ended, unresolved = (", ".join(f"{name} {count} ({count / n:.1%})" for name, count in counts.items())
                             for counts in (metrics["finish_reasons"], metrics["unresolved_rules"]))
        log(f"ended: {ended} | unresolved: {unresolved or 'none'}")
    if metrics.get("samples", {}).get("items"):
        log(describe_samples(metrics["samples"]))
    log_textless(metrics.get("no_text"))
    if judge and judge["judge_errors"]:
        log(f"the judge failed on {judge['judge_errors']} of {judge['asked']} results")
    log(protocol_line(metrics["protocol"]))


def flat(scores: dict) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a benchmark's own scores that are shown."""
    for name, value in scores.items():
        if isinstance(value, dict):
            value = value.get("accuracy", value.get("average"))
        if isinstance(value, float):
            yield name, value


def describe_samples(samples: dict) -> str:
    parts = {name: samples[name] for name in ("mean", "majority")}
    parts |= {f"pass@{m}": part for m, part in samples["pass"].items()}
    return f"{samples['items']} items, {samples['k']} replies each: " + " | ".join(
        f"{name} {part['accuracy']:.1%} ({interval(part['ci95'])})" for name, part in parts.items())


# ---- --compare
def read_pair(paths: list[str]) -> tuple[list[tuple[dict, dict]], int]:
    """Return the pairs without an error, and the number of the others."""
    where = f"--compare {' '.join(paths)}"
    before, after = ({row["id"]: row for row in read_results(path)} for path in paths)
    if set(before) != set(after):
        unpaired = sorted(set(before) ^ set(after))
        raise DataError(f"{where}: {len(unpaired)} items are in one file only ({unpaired[0]}, ...); "
                        "expected the same items")
    pairs = [(row, after[name]) for name, row in before.items()]
    if changed := [a["id"] for a, b in pairs if a.get("gold") != b.get("gold")]:
        raise DataError(f"{where}: {len(changed)} items have another gold ({changed[0]}, ...); expected "
                        "the same items")
    pairs = [pair for pair in pairs if "error" not in (pair[0]["verdict"], pair[1]["verdict"])]
    if not pairs:
        raise DataError(f"{where}: no item is answered in both; expected at least one")
    return pairs, len(before) - len(pairs)


def difference(pairs: list[tuple[dict, dict]], verdict: str = "verdict") -> dict:
    """Return what changes from the first to the second of each pair, by this field. "p" is exact McNemar's
    where every item is its own group, else of a test that flips the signs of groups."""
    n, groups = len(pairs), [group_of(row) for row, _ in pairs]
    n_groups = len(set(groups))
    right = [[int(row[verdict] == "correct") for row in side] for side in zip(*pairs)]
    changes = [after - before for before, after in zip(*right)]
    lost, won = ([row["id"] for (row, _), change in zip(pairs, changes) if change == sign]
                 for sign in (-1, 1))
    result = {"n": n, "groups": n_groups, "accuracy": [sum(side) / n for side in right],
              "difference": (len(won) - len(lost)) / n, "ci95": paired_interval(*right, groups, level=0.95),
              "test": "sign_flip" if n_groups < n else "mcnemar",
              "mcnemar_p": mcnemar_exact(len(lost), len(won)), "right_to_wrong": lost, "wrong_to_right": won}
    result["p"] = result["mcnemar_p"]
    if n_groups < n:
        result["p"] = sign_flip(changes, groups) if n_groups > 1 else None
    return result


def compare(paths: list[str]) -> dict:
    """Return `difference` of two files, for several benchmarks also of each, adjusted by Holm."""
    pairs, n_errors = read_pair(paths)
    result = {"files": list(paths), **difference(pairs), "errors": n_errors, "incomplete": n_errors > 0,
              "other_prompts": sum(a.get("prompt_sha") != b.get("prompt_sha") for a, b in pairs)}
    judged = [pair for pair in pairs
              if not {pair[0].get("judged"), pair[1].get("judged")} & {None, "judge_error"}]
    if judged and all(row.get("judged") for pair in pairs for row in pair):
        judges = sorted({f"{judge.get('kind')}:{judge.get('model')}" for pair in pairs for row in pair
                         if isinstance(judge := row.get("judge"), dict)})
        result["judged"] = {**difference(judged, "judged"), "judge_errors": len(pairs) - len(judged),
                            "judges": judges}
    names = list(dict.fromkeys(row["benchmark"] for row, _ in pairs))
    if len(names) > 1:
        result["benchmarks"] = {name: difference([pair for pair in pairs if pair[0]["benchmark"] == name])
                                for name in names}
        adjust(list(result["benchmarks"].values()))
    return result


def compare_all(paths: list[str]) -> dict:
    """Return `compare` of two files, or {"comparisons": [...]} of several pairs, adjusted by Holm."""
    if len(paths) == 2:
        return compare(paths)
    if len(paths) % 2:
        raise DataError(f"--compare: {len(paths)} files, expected pairs of them (A B, or A1 B1 A2 B2 ...)")
    comparisons = [compare(paths[i:i + 2]) for i in range(0, len(paths), 2)]
    adjust(comparisons)
    adjust([part["judged"] for part in comparisons if "judged" in part])
    return {"comparisons": comparisons}


def adjust(parts: list[dict]) -> None:
    tested = [part for part in parts if part["p"] is not None]
    for part, p in zip(tested, holm([part["p"] for part in tested]) if tested else (), strict=True):
        part["p_holm"] = p


def describe(result: dict) -> str:
    before, after = map(percent, result["accuracy"])
    p = "-" if result["p"] is None else f"{result['p']:.4g}"
    return (f"n {result['n']} | {before} -> {after} % | {100 * result['difference']:+.1f} points "
            f"({interval(result['ci95'])}) | {result['test']} p {p} | {len(result['right_to_wrong'])} lost, "
            f"{len(result['wrong_to_right'])} won")


# ---- --table
# benchmark -> heading, in the order of the paper's tables
COLUMNS = {"vstar": "V*", "hrbench_4k": "HR-4K", "hrbench_8k": "HR-8K", "mme_realworld_lite": "MME-RW-Lite",
           "blink/Jigsaw": "BLINK Jigsaw", "blink/Multi-view_Reasoning": "BLINK Multi-view",
           "tablevqa/vwtq": "VWTQ", "tablevqa/vwtq_syn": "VWTQ-Syn", "tablevqa/vtabfact": "VTabFact"}
TABLES = tuple(name for name in COLUMNS if name.startswith("tablevqa/"))
OVERALL = "TableVQA"  # the paper's overall is the macro mean of the three
AGAIN = "run evaluate.py again, its replies are kept"
DETAILS = ["row", "benchmark", "n", "95 % interval", "chance", "constant", "seconds per item",
           "tokens per item", "protocol"]
# CapImagine (arXiv 2602.22766), accuracy in %, its main table and that of TableVQABench; None: not reported
_NONE = (None, None, None, None)
PAPER = {"GPT-4o": (67.5, 59.0, 55.5, 52.0, 55.3, 59.4, *_NONE),
         "Qwen2.5-VL-7B": (76.4, 68.0, 63.8, 45.8, 62.7, 42.9, *_NONE),
         "PixelReasoner": (80.6, 72.9, 66.9, 49.7, None, None, *_NONE),
         "DeepEyes": (90.0, 75.1, 72.6, 53.2, None, None, *_NONE),
         "LVR": (81.7, 70.8, 63.0, 50.6, 52.0, 46.6, *_NONE),
         "Monet": (83.3, 71.0, 68.0, 46.9, 50.0, 47.4, 55.3, 60.4, 78.8, 64.8),
         "CapImagine": (85.9, 74.1, 70.7, 54.8, 64.7, 49.6, 60.9, 68.0, 83.2, 70.7)}


@dataclass
class Result:
    """A result file: its row, right or not (None: failed) by benchmark, its cells of DETAILS."""

    path: str
    row: str
    scores: dict[str, list[bool | None]]
    details: list[str]


def read_result(text: str) -> Result:
    name, _, path = text.rpartition("=")
    metrics_path = f"{path}.metrics.json"
    metrics, rows, scores = load_object(metrics_path, AGAIN), read_results(path), defaultdict(list)
    judged = "judged" if "with_judge" in metrics else "verdict"
    try:
        for row in rows:
            failed = row["verdict"] == "error" or row.get("judged") == "judge_error"
            scores[row["benchmark"]].append(None if failed else row[judged] == "correct")
        protocol, cost = metrics["protocol"], metrics["efficiency"]
        row_name = name or f"{Path(protocol['model']).name} ({protocol['method']})"
        scored = metrics.get("with_judge") or metrics
        if not isinstance(protocol["line"], str):
            raise TypeError("protocol.line is not text")
        details = [row_name, ", ".join(map(str, scores)), str(metrics["n"]),
                   interval(scored["ci95"]), percent(metrics.get("chance")),
                   percent(metrics.get("constant") and metrics["constant"]["accuracy"]),
                   *("-" if cost[name] is None else str(cost[name])
                     for name in ("seconds_per_item", "tokens_per_item")), protocol["line"]]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: damaged, or not of one run with {metrics_path} ({type(error).__name__}: "
                        f"{error}); {AGAIN}") from error
    return Result(path, row_name, scores, details)


def make_table(texts: list[str]) -> str:
    results, rows = list(map(read_result, texts)), {name: {} for name in PAPER}
    for result in results:
        row = rows.setdefault(result.row, {})
        if twice := [benchmark for benchmark in result.scores if benchmark in row]:
            raise DataError(f"--table {result.path}: {twice[0]} is already in row {result.row!r}; expected "
                            "it once, or another NAME=")
        row |= result.scores
    head = [*COLUMNS.values(), OVERALL]
    lines = []
    for name, scores in rows.items():
        paper = PAPER.get(name, (None,) * len(head))
        parts = {name: [scores[name]] for name in COLUMNS if name in scores}
        if all(name in scores for name in TABLES):
            parts[OVERALL] = [scores[name] for name in TABLES]
        ours = map(parts.get, (*COLUMNS, OVERALL))
        lines.append([name, *map(cell, ours, paper)])
    return "\n".join(["Accuracy in %, strict or with the judge named below; in brackets the paper's.", "",
                      *table_lines(["model", *head], lines), "",
                      *table_lines(DETAILS, [result.details for result in results])]) + "\n"


def cell(parts: list[list[bool | None]] | None, paper: float | None) -> str:
    """Return our score, the macro mean of its parts, and the paper's in brackets."""
    if parts is None:
        text = "not run" if paper is not None else "-"
    elif failed := sum(part.count(None) for part in parts):
        text = f"incomplete ({failed} of {sum(map(len, parts))} failed)"
    else:
        text = percent(macro(parts))
    return text + (f" ({paper:.1f})" if paper is not None else "")
