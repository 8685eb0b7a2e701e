"""The paper's main table, in Markdown, of result files: our numbers with the paper's beside them, and "not run" where none is.

    --table CapImagine=vstar.jsonl CapImagine=hrbench.jsonl Monet=monet_vstar.jsonl other.jsonl

A name of the paper's puts a file into that row; a file without a name stands in a row called by its checkpoint and method.
"""
from pathlib import Path

from utils.comparison import read_results
from utils.rows import DataError, check_fields, load_object
from utils.run_report import interval, percent, table_lines
from utils.scores import macro, micro
from utils.summary import widest

# benchmark -> heading, in the order of the paper's tables
COLUMNS = {"vstar": "V*", "hrbench_4k": "HR-4K", "hrbench_8k": "HR-8K", "mme_realworld_lite": "MME-RW-Lite",
           "blink/Jigsaw": "BLINK Jigsaw", "blink/Multi-view_Reasoning": "BLINK Multi-view", "tablevqa/vwtq": "VWTQ",
           "tablevqa/vwtq_syn": "VWTQ-Syn", "tablevqa/vtabfact": "VTabFact"}
TABLES = tuple(name for name in COLUMNS if name.startswith("tablevqa/"))
OVERALL = "TableVQA"  # the paper's overall is the macro mean of the three
DETAILS = ["row", "benchmark", "n", "95 % interval", "chance", "seconds an item", "tokens an item", "protocol"]
SAME = {"vstar_inline": "vstar"}  # the same questions from another file
# CapImagine (arXiv 2602.22766), accuracy in %, its main table and that of TableVQABench; None where it has no number
_NONE = (None, None, None, None)
PAPER = {"GPT-4o": (67.5, 59.0, 55.5, 52.0, 55.3, 59.4, *_NONE),
         "Qwen2.5-VL-7B": (76.4, 68.0, 63.8, 45.8, 62.7, 42.9, *_NONE),
         "PixelReasoner": (80.6, 72.9, 66.9, 49.7, None, None, *_NONE),
         "DeepEyes": (90.0, 75.1, 72.6, 53.2, None, None, *_NONE),
         "LVR": (81.7, 70.8, 63.0, 50.6, 52.0, 46.6, *_NONE),
         "Monet": (83.3, 71.0, 68.0, 46.9, 50.0, 47.4, 55.3, 60.4, 78.8, 64.8),
         "CapImagine": (85.9, 74.1, 70.7, 54.8, 64.7, 49.6, 60.9, 68.0, 83.2, 70.7)}


def read_result(text: str) -> dict:
    """Return {"row", "scores" by benchmark, "metrics", "path"} of NAME=FILE or FILE, a result file of evaluate.py."""
    name, _, path = text.rpartition("=")
    beside = Path(f"{path}.metrics.json")
    if not beside.is_file():
        raise DataError(f"--table {text}: no {beside}; expected a result file with its metrics beside it")
    metrics = read_metrics(beside)
    protocol, parts = metrics["protocol"], {}
    for row in read_results(path):
        parts.setdefault(SAME.get(row.get("benchmark"), row.get("benchmark")), []).append(row)
    judged = "with_judge" in metrics
    if judged and (odd := [row["id"] for its in parts.values() for row in its if not isinstance(row.get("judged"), str)]):
        raise DataError(f"{path}: id {odd[0]!r} has no verdict \"judged\", but its metrics tell of a judge; expected "
                        "both of one run")
    scores = {}
    for benchmark, rows in parts.items():
        faulty = sum(row["verdict"] == "error" or row.get("judged") == "judge_error" for row in rows)
        hits = [(row["judged"] if judged else row["verdict"]) == "correct" for row in rows]
        scores[benchmark] = {"n": len(rows), "faulty": faulty, "hits": hits}
    return {"row": name or f"{Path(protocol['model']).name} ({protocol['method']})", "scores": scores, "metrics": metrics,
            "path": path}


def read_metrics(path: Path) -> dict:
    """Return the metrics beside a result file; DataError for a file that evaluate.py did not write."""
    metrics = load_object(path, "run evaluate.py again, its replies are kept")
    check_fields(str(path), metrics, {"n": int, "protocol": dict, "efficiency": dict})
    check_fields(f"{path}: protocol", metrics["protocol"], {"model": str, "method": str, "line": str})
    number = (int, float, type(None))
    check_fields(f"{path}: efficiency", metrics["efficiency"], {"seconds_per_item": number, "tokens_per_item": number})
    for scored in (metrics, metrics.get("with_judge", metrics)):
        check_fields(str(path), {"ci95": None, "chance": None} | (scored if isinstance(scored, dict) else {"ci95": scored}),
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
    """Return the table, what each row was made of, and speed, as Markdown; DataError for a benchmark twice in a row."""
    results, rows = [read_result(text) for text in texts], {name: {} for name in PAPER}
    for result in results:
        for benchmark, found in result["scores"].items():
            row = rows.setdefault(result["row"], {})
            if benchmark in row:
                raise DataError(f"--table {result['path']}: {benchmark} stands already in row {result['row']!r}; expected it "
                                "once, or another NAME=")
            row[benchmark] = found | {"score": micro({benchmark: found["hits"]})}
    head = [*COLUMNS.values(), OVERALL]
    scores = []
    for name, found in rows.items():
        paper = PAPER.get(name, (None,) * len(head))
        cells = [cell(found.get(benchmark), number) for benchmark, number in zip(COLUMNS, paper)]
        scores.append([name, *cells, cell(overall(found), paper[-1])])
    return "\n".join(["Accuracy in %, strict or with the judge named below; in brackets the paper's.", "",
                      *table_lines(["model", *head], scores), "", *table_lines(DETAILS, list(map(details, results)))]) + "\n"


def overall(found: dict[str, dict]) -> dict | None:
    """Return TableVQABench's macro mean of its three splits, as the paper has it; None unless all three are there."""
    if not all(name in found for name in TABLES):
        return None
    return {"n": sum(found[name]["n"] for name in TABLES), "faulty": sum(found[name]["faulty"] for name in TABLES),
            "score": macro({name: found[name]["hits"] for name in TABLES})}


def details(result: dict) -> list[str]:
    """Return what a row of the table was made of, the cells of DETAILS."""
    metrics, spent = result["metrics"], result["metrics"]["efficiency"]
    scored = metrics.get("with_judge") or metrics
    return [result["row"], ", ".join(map(str, result["scores"])), str(metrics["n"]),
            interval(widest(scored) if scored["ci95"] else None), percent(metrics.get("chance")),
            str(spent["seconds_per_item"]), str(spent["tokens_per_item"]), metrics["protocol"]["line"]]
