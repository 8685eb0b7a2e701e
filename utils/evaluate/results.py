"""Scores of a set of results: strict, with a judge and by other harnesses' rules, side by side, with
intervals and chance.

A result (a line of evaluate.py's output) with the verdict error is never scored: it makes a set incomplete,
and then there is no headline number. Shares are fractions from 0 to 1; the 95 % interval is Wilson's, and
where several results share a group the cluster bootstrap's stands beside it.

The paper's main table, in Markdown, of result files: our numbers with the paper's beside them, and "not run"
where none is.

    --table CapImagine=vstar.jsonl CapImagine=hrbench.jsonl Monet=monet_vstar.jsonl other.jsonl

A name of the paper's puts a file into that row; a file without a name stands in a row called by its
checkpoint and method.
"""
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from utils.cli import log
from utils.evaluate.comparison import read_results
from utils.evaluate.scoring import VERDICTS, compat_right, macro, micro, rotations
from utils.jsonl import DataError, check_fields, load_object
from utils.report import interval, percent, table_lines
from utils.stats import chance, cluster_bootstrap, wilson

# Subtasks of MME, from VLMEvalKit vlmeval/dataset/utils/yorn.py, MME_rating
MME_PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position",
                  "posters", "scene")
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def is_right(record: dict) -> bool:
    return record["verdict"] == "correct"


def judged_right(record: dict) -> bool:
    return (record.get("judged") or record["verdict"]) == "correct"


def share(records: list[dict], right: Callable[[dict], bool]) -> dict:
    """Return {"correct", "accuracy", "ci95"} and, with groups, "ci95_clustered"; None for no records."""
    hits, groups = [right(record) for record in records], [record["group_id"] for record in records]
    if not hits:
        return {"correct": 0, "accuracy": None, "ci95": None}
    found = {"correct": sum(hits), "accuracy": sum(hits) / len(hits), "ci95": wilson(sum(hits), len(hits))}
    if 1 < len(set(groups)) < len(hits):
        found["ci95_clustered"] = cluster_bootstrap(hits, groups, level=0.95)
    return found


def widest(part: dict) -> tuple[float, float]:
    """Return the 95 % interval to print of a `share`: end by end the wider of Wilson's and the cluster
    bootstrap's, which collapses where all groups score alike."""
    low, high = zip(part["ci95"], part.get("ci95_clustered", part["ci95"]))
    return min(low), max(high)


def summarize(records: list[dict], imagines: Callable[[dict], bool] | None = None) -> dict:
    """Return counts, scores and intervals of some results.

    `imagines` says whether a result holds an imagination (latents, or text between its marks): how many do is
    "emission".
    """
    counts = Counter(record["verdict"] for record in records)
    scored = [record for record in records if record["verdict"] != "error"]
    n = len(scored)
    result = {"n": n, **{verdict: counts[verdict] for verdict in VERDICTS}, **share(scored, is_right),
              "incomplete": counts["error"] > 0}
    if not n:
        return result
    options = [record["n_options"] for record in scored]
    result |= {"chance": chance(options) if all(options) else None,
               "truncated": sum(record["finish_reason"] == "length" for record in scored),
               "mean_tokens": sum(record["n_tokens"] for record in scored) / n,
               "rules": dict(Counter(record["extraction"]["rule"] for record in scored).most_common()),
               "compat": compat_shares(scored)}
    if any("numeric" in record for record in scored):
        result["numeric"] = share(scored, lambda record: record.get("numeric", False))
    if any(record.get("judge") for record in scored):
        result["with_judge"] = judge_shares(scored)
    if imagines:
        k = sum(map(imagines, scored))
        result["emission"] = {"k": k, "n": n, "share": k / n, "ci95": wilson(k, n)}
    return result


def compat_shares(records: list[dict]) -> dict:
    """Return {matcher: share} over the results that it applies to; "no_verdict" of them it could not read.

    With a judge that maps, VLMEvalKit's rules and its judge together are a column of their own.
    """
    found = {}
    for name in dict.fromkeys(name for record in records for name in record["compat"]):
        mine = [record for record in records if name in record["compat"]]
        found[name] = {"n": len(mine), "no_verdict": sum(record["compat"][name] is None for record in mine),
                       **share(mine, lambda record: compat_right(record, name))}
        asked = [r for r in mine if r["compat"][name] is None and (r.get("judge") or {}).get("kind") == "map"]
        if asked and not any(record["judge"]["error"] for record in asked):
            found[f"{name}+judge"] = {"n": len(mine), **share(mine, lambda r: compat_right(r, name)
                                                              if r["compat"][name]
                                                               else (r.get("judge") or {}).get("parsed")
                                                               == r["gold"])}
    return found


def judge_shares(records: list[dict]) -> dict:
    """Return the score with a judge, how many results it decided, its failures, and where it disagrees with
    the rules."""
    asked = [record for record in records if record.get("judge")]
    agrees = [(record["verdict"], record["judge"]["right"]) for record in asked
              if not record["judge"]["error"]]
    return {**share(records, judged_right), "judged": sum(record["judged"] != record["verdict"]
                                                          for record in asked),
            "asked": len(asked), "judge_errors": sum(record["judge"]["error"] is not None
                                                     for record in asked),
            "rules_right_judge_wrong": agrees.count(("correct", False)),
            "rules_wrong_judge_right": agrees.count(("incorrect", True))}


# ----------------------------------------------------------------------------------- a benchmark's own scores
def own_scores(records: list[dict]) -> dict:
    """Return the scores that a benchmark has beside the plain share, by name of the benchmark."""
    by_name, found = {}, {}
    for record in records:
        if record["verdict"] != "error":
            by_name.setdefault(record.get("benchmark") or "", []).append(record)
    for name, its in by_name.items():
        if all("rotation" in record for record in its):
            found[name] = {"all": rotation_scores(its)} | {
                category: rotation_scores(part) for category, part in parts_of(its).items()}
        elif name == "mme":
            found[name] = mme_scores(its)
        elif name == "mme_realworld_lite":
            found[name] = {kind: share([r for r in its if (r["category"] or "").startswith(f"{kind}/")],
                                       is_right)
                           for kind in ("Perception", "Reasoning")}
    tables = {name: [is_right(record) for record in its] for name, its in by_name.items()
              if name.startswith("tablevqa/")}
    if tables:
        found["tablevqa"] = {"macro": macro(tables), "micro": micro(tables), "splits": len(tables)}
    return found


def rotation_scores(records: list[dict]) -> dict:
    """HR-Bench: the mean over the rotations of the options, and the share of questions right in all four."""
    return rotations([(record["group_id"], record["rotation"], is_right(record)) for record in records])


def mme_scores(records: list[dict]) -> dict:
    """MME: accuracy and accuracy+ (both questions about a picture right), in percent and added, a subtask;
    their sums.

    A sum is None unless all its subtasks are there (VLMEvalKit vlmeval/dataset/utils/yorn.py, MME_rating).
    """
    tasks = {}
    for name, part in parts_of(records).items():
        pictures = {}
        for record in part:
            pictures.setdefault(record["group_id"], []).append(is_right(record))
        accuracy, plus = sum(map(is_right, part)) / len(part), sum(map(all, pictures.values())) / len(
            pictures)
        tasks[name] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus}
    sums = {kind: sum(tasks[name]["score"] for name in names) if set(names) <= set(tasks) else None
            for kind, names in (("perception", MME_PERCEPTION), ("reasoning", MME_REASONING))}
    return {**sums, "tasks": tasks}


def parts_of(records: list[dict]) -> dict[str, list[dict]]:
    """Return the results of each category, in alphabetical order."""
    names = sorted({record["category"] for record in records if record["category"] is not None})
    return {name: [record for record in records if record["category"] == name] for name in names}


# -------------------------------------------------------------------------------------------- what is printed
def headline(metrics: dict, allow_incomplete: bool) -> float | None:
    """Return the number to quote: with the judge if there is one, else strict; None if anything is missing in
    it.

    With `allow_incomplete` it is given all the same: the counts of what is missing stand beside it.
    """
    with_judge = metrics.get("with_judge")
    missing = metrics["error"] + (with_judge["judge_errors"] if with_judge else 0)
    return (with_judge or metrics)["accuracy"] if allow_incomplete or not missing else None


def protocol_line(protocol: dict) -> str:
    """Return the line that says by which protocol a score was made."""
    low, high = protocol["pixels"]
    return (f"protocol={protocol['protocol']} method={protocol['method']} prompt={protocol['prompt_sha']} "
            f"pixels={'server' if low is None else low}..{high} judge={protocol['judge']}")


def show(metrics: dict) -> None:
    """Log a line a category, the scores by other rules beneath, and the protocol."""
    log(f"{'category':<24}{'n':>6}{'correct':>9}{'accuracy':>10}   95 % interval{'unresolved':>13}{'errors':>8}{'tokens':>8}"
        f"{'cut off':>9}")
    for name, part in {**metrics["categories"], "all": metrics}.items():
        if part["n"]:
            low, high = widest(part)
            log(f"{name[-24:]:<24}{part['n']:>6}{part['correct']:>9}{part['accuracy']:>10.1%}   {low:.1%} to {high:.1%}"
                f"{part['unresolved']:>11}{part['error']:>8}{part['mean_tokens']:>8.0f}{part['truncated']:>9}")
    judged = {"with judge": metrics["with_judge"]["accuracy"]} if "with_judge" in metrics else {}
    compat = {name: part["accuracy"] for name, part in metrics.get("compat", {}).items()}
    columns = {"strict": metrics["accuracy"], **judged, **compat, "chance": metrics.get("chance")}
    log(" | ".join(f"{name} {value:.1%}" for name, value in columns.items() if value is not None))
    if metrics.get("with_judge", {}).get("judge_errors"):
        log(f"the judge failed on {metrics['with_judge']['judge_errors']} of {metrics['with_judge']['asked']} results")
    log(protocol_line(metrics["protocol"]))


# ------------------------------------------------------------ main_table


# benchmark -> heading, in the order of the paper's tables
COLUMNS = {"vstar": "V*", "hrbench_4k": "HR-4K", "hrbench_8k": "HR-8K", "mme_realworld_lite": "MME-RW-Lite",
           "blink/Jigsaw": "BLINK Jigsaw", "blink/Multi-view_Reasoning": "BLINK Multi-view",
           "tablevqa/vwtq": "VWTQ",
           "tablevqa/vwtq_syn": "VWTQ-Syn", "tablevqa/vtabfact": "VTabFact"}
TABLES = tuple(name for name in COLUMNS if name.startswith("tablevqa/"))
OVERALL = "TableVQA"  # the paper's overall is the macro mean of the three
DETAILS = ["row", "benchmark", "n", "95 % interval", "chance", "seconds an item", "tokens an item",
           "protocol"]
SAME = {"vstar_inline": "vstar"}  # the same questions from another file
# CapImagine (arXiv 2602.22766), accuracy in %, its main table and that of TableVQABench; None where it has no
# number
_NONE = (None, None, None, None)
PAPER = {"GPT-4o": (67.5, 59.0, 55.5, 52.0, 55.3, 59.4, *_NONE),
         "Qwen2.5-VL-7B": (76.4, 68.0, 63.8, 45.8, 62.7, 42.9, *_NONE),
         "PixelReasoner": (80.6, 72.9, 66.9, 49.7, None, None, *_NONE),
         "DeepEyes": (90.0, 75.1, 72.6, 53.2, None, None, *_NONE),
         "LVR": (81.7, 70.8, 63.0, 50.6, 52.0, 46.6, *_NONE),
         "Monet": (83.3, 71.0, 68.0, 46.9, 50.0, 47.4, 55.3, 60.4, 78.8, 64.8),
         "CapImagine": (85.9, 74.1, 70.7, 54.8, 64.7, 49.6, 60.9, 68.0, 83.2, 70.7)}


def read_result(text: str) -> dict:
    """Return {"row", "scores" by benchmark, "metrics", "path"} of NAME=FILE or FILE, a result file of
    evaluate.py."""
    name, _, path = text.rpartition("=")
    beside = Path(f"{path}.metrics.json")
    if not beside.is_file():
        raise DataError(f"--table {text}: no {beside}; expected a result file with its metrics beside it")
    metrics = read_metrics(beside)
    protocol, parts = metrics["protocol"], {}
    for row in read_results(path):
        parts.setdefault(SAME.get(row.get("benchmark"), row.get("benchmark")), []).append(row)
    judged = "with_judge" in metrics
    if judged and (odd := [row["id"] for its in parts.values() for row in its
                           if not isinstance(row.get("judged"), str)]):
        raise DataError(
            f"{path}: id {odd[0]!r} has no verdict \"judged\", but its metrics tell of a judge; expected "
                        "both of one run")
    scores = {}
    for benchmark, rows in parts.items():
        faulty = sum(row["verdict"] == "error" or row.get("judged") == "judge_error" for row in rows)
        hits = [(row["judged"] if judged else row["verdict"]) == "correct" for row in rows]
        scores[benchmark] = {"n": len(rows), "faulty": faulty, "hits": hits}
    return {"row": name or f"{Path(protocol['model']).name} ({protocol['method']})", "scores": scores,
            "metrics": metrics,
            "path": path}


def read_metrics(path: Path) -> dict:
    """Return the metrics beside a result file; DataError for a file that evaluate.py did not write."""
    metrics = load_object(path, "run evaluate.py again, its replies are kept")
    check_fields(str(path), metrics, {"n": int, "protocol": dict, "efficiency": dict})
    check_fields(f"{path}: protocol", metrics["protocol"], {"model": str, "method": str, "line": str})
    number = (int, float, type(None))
    check_fields(f"{path}: efficiency", metrics["efficiency"],
                 {"seconds_per_item": number, "tokens_per_item": number})
    for scored in (metrics, metrics.get("with_judge", metrics)):
        check_fields(str(path), {"ci95": None, "chance": None} | (scored if isinstance(scored, dict)
                                                                  else {"ci95": scored}),
                     {"ci95": (list, type(None)), "chance": number})
        for name in ("ci95", "ci95_clustered"):
            ends = scored.get(name) or (0, 1)
            if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
                raise DataError(f"{path}: {name} {str(ends)[:40]}, expected two numbers")
    return metrics


def cell(ours: dict | None, paper: float | None) -> str:
    """Return a cell: our score, or why there is none, and the paper's in brackets."""
    if ours is None:
        said = "not run" if paper is not None else "-"
    elif ours["faulty"]:
        said = f"incomplete ({ours['faulty']} of {ours['n']} failed)"
    else:
        said = f"{100 * ours['score']:.1f}"
    return said + (f" ({paper:.1f})" if paper is not None else "")


def make_table(texts: list[str]) -> str:
    """Return the table, what each row was made of, and speed, as Markdown; DataError for a benchmark twice in
    a row."""
    results, rows = [read_result(text) for text in texts], {name: {} for name in PAPER}
    for result in results:
        for benchmark, found in result["scores"].items():
            row = rows.setdefault(result["row"], {})
            if benchmark in row:
                raise DataError(
                    f"--table {result['path']}: {benchmark} stands already in row {result['row']!r}; expected it "
                                "once, or another NAME=")
            row[benchmark] = found | {"score": micro({benchmark: found["hits"]})}
    head = [*COLUMNS.values(), OVERALL]
    scores = []
    for name, found in rows.items():
        paper = PAPER.get(name, (None,) * len(head))
        cells = [cell(found.get(benchmark), number) for benchmark, number in zip(COLUMNS, paper)]
        scores.append([name, *cells, cell(overall(found), paper[-1])])
    return "\n".join(["Accuracy in %, strict or with the judge named below; in brackets the paper's.", "",
                      *table_lines(["model", *head], scores), "",
                      *table_lines(DETAILS, list(map(details, results)))]) + "\n"


def overall(found: dict[str, dict]) -> dict | None:
    """Return TableVQABench's macro mean of its three splits, as the paper has it; None unless all three are
    there."""
    if not all(name in found for name in TABLES):
        return None
    return {"n": sum(found[name]["n"] for name in TABLES),
            "faulty": sum(found[name]["faulty"] for name in TABLES),
            "score": macro({name: found[name]["hits"] for name in TABLES})}


def details(result: dict) -> list[str]:
    """Return what a row of the table was made of, the cells of DETAILS."""
    metrics, spent = result["metrics"], result["metrics"]["efficiency"]
    scored = metrics.get("with_judge") or metrics
    return [result["row"], ", ".join(map(str, result["scores"])), str(metrics["n"]),
            interval(widest(scored) if scored["ci95"] else None), percent(metrics.get("chance")),
            str(spent["seconds_per_item"]), str(spent["tokens_per_item"]), metrics["protocol"]["line"]]
