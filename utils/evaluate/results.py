"""Scores of a set of results: strict, with a judge and by other harnesses' rules, with intervals and chance.

A result is a line of evaluate.py's output; one with the verdict "error" is not scored. Shares are from 0 to
1. The 95 % interval is Wilson's; where results share a group, it lets them vary together.
"""
from collections import Counter, defaultdict
from collections.abc import Callable

from utils.cli import log
from utils.evaluate.scoring import ROTATIONS, VERDICTS, compat_right
from utils.stats import chance, share_interval
from utils.tables import interval

# Subtasks of MME, from VLMEvalKit vlmeval/dataset/utils/yorn.py, MME_rating
MME_PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position",
                  "posters", "scene")
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def is_right(record: dict) -> bool:
    return record["verdict"] == "correct"


def judged_right(record: dict) -> bool:
    return (record.get("judged") or record["verdict"]) == "correct"


def share(records: list[dict], right: Callable[[dict], bool]) -> dict:
    """Return {"correct", "accuracy", "ci95"}; the interval lets the results of one group vary together."""
    hits, groups = [int(right(record)) for record in records], [record["group_id"] for record in records]
    if not hits:
        return {"correct": 0, "accuracy": None, "ci95": None}
    return {"correct": sum(hits), "accuracy": sum(hits) / len(hits), "ci95": share_interval(hits, groups)}


def summarize(records: list[dict], imagines: Callable[[dict], bool] | None = None) -> dict:
    """Return counts, scores and intervals; "emission" counts results that `imagines` accepts."""
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
        emitted = share(scored, imagines)
        result["emission"] = {"k": emitted["correct"], "n": n, "share": emitted["accuracy"],
                              "ci95": emitted["ci95"]}
    return result


def compat_shares(records: list[dict]) -> dict:
    """Return {rules of another harness: share} over the results they apply to, and of both together with a
    judge that matches options; "no_verdict" counts what the rules cannot read."""
    shares = {}
    for name in dict.fromkeys(name for record in records for name in record["compat"]):
        covered = [record for record in records if name in record["compat"]]
        unread = [record for record in covered if record["compat"][name] is None]
        shares[name] = {"n": len(covered), "no_verdict": len(unread),
                        **share(covered, lambda record: compat_right(record, name))}
        matched = [judge for record in unread if (judge := record.get("judge")) and judge["kind"] == "map"]
        if matched and not any(judge["error"] for judge in matched):
            shares[f"{name}+judge"] = {"n": len(covered), **share(
                covered, lambda record: right_with_judge(record, name))}
    return shares


def right_with_judge(record: dict, name: str) -> bool:
    if record["compat"][name]:
        return compat_right(record, name)
    return (record.get("judge") or {}).get("parsed") == record["gold"]


def judge_shares(records: list[dict]) -> dict:
    asked = [record for record in records if record.get("judge")]
    agreement = [(record["verdict"], record["judge"]["right"]) for record in asked
                 if not record["judge"]["error"]]
    return {**share(records, judged_right),
            "judged": sum(record["judged"] != record["verdict"] for record in asked), "asked": len(asked),
            "judge_errors": sum(record["judge"]["error"] is not None for record in asked),
            "rules_right_judge_wrong": agreement.count(("correct", False)),
            "rules_wrong_judge_right": agreement.count(("incorrect", True))}


# ---- a benchmark's own scores
def own_scores(records: list[dict]) -> dict:
    by_name, scores = defaultdict(list), {}
    for record in records:
        if record["verdict"] != "error":
            by_name[record.get("benchmark") or ""].append(record)
    for name, rows in by_name.items():
        if all("rotation" in record for record in rows):
            scores[name] = {"all": rotation_scores(rows)} | {
                category: rotation_scores(part) for category, part in parts_of(rows).items()}
        elif name == "mme":
            scores[name] = mme_scores(rows)
        elif name == "mme_realworld_lite":
            scores[name] = {
                kind: share([row for row in rows if (row["category"] or "").startswith(f"{kind}/")], is_right)
                for kind in ("Perception", "Reasoning")}
    if tables := {name: list(map(is_right, rows)) for name, rows in by_name.items()
                  if name.startswith("tablevqa/")}:
        scores["tablevqa"] = {"macro": macro(tables), "micro": micro(tables), "splits": len(tables)}
    return scores


def parts_of(records: list[dict]) -> dict[str, list[dict]]:
    names = sorted({record["category"] for record in records} - {None})
    return {name: [record for record in records if record["category"] == name] for name in names}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def micro(parts: dict[str, list[bool]]) -> float:
    return mean([hit for part in parts.values() for hit in part])


def macro(parts: dict[str, list[bool]]) -> float:
    """Return the mean of the parts' shares: the paper's overall of TableVQABench, whose own script weights by
    items (naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py)."""
    return mean([mean(part) for part in parts.values()])


def rotation_scores(records: list[dict]) -> dict:
    """Return HR-Bench's scores. "average" is the mean of the rotations' shares (open-compass/VLMEvalKit,
    vlmeval/dataset/utils/hrbench.py, report_acc_hrbench; lmms-eval has the same formula), "all_right" the
    share right in all four rotations."""
    questions, rotations = defaultdict(list), defaultdict(list)
    for record in records:
        questions[record["group_id"]].append(is_right(record))
        rotations[record["rotation"]].append(is_right(record))
    shares = {rotation: mean(hits) for rotation, hits in sorted(rotations.items())}
    complete = [all(hits) for hits in questions.values() if len(hits) == ROTATIONS]
    return {"average": mean(list(shares.values())), "by_rotation": shares,
            "all_right": mean(complete) if complete else None, "complete": len(complete)}


def mme_scores(records: list[dict]) -> dict:
    """MME: accuracy plus accuracy+ (both questions about a picture right) per subtask, in percent, and sums
    over complete sets (VLMEvalKit vlmeval/dataset/utils/yorn.py, MME_rating)."""
    tasks = {}
    for name, part in parts_of(records).items():
        pictures = defaultdict(list)
        for record in part:
            pictures[record["group_id"]].append(is_right(record))
        accuracy = sum(map(is_right, part)) / len(part)
        plus = sum(map(all, pictures.values())) / len(pictures)
        tasks[name] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus}
    sums = {kind: sum(tasks[name]["score"] for name in names) if set(names) <= set(tasks) else None
            for kind, names in (("perception", MME_PERCEPTION), ("reasoning", MME_REASONING))}
    return {**sums, "tasks": tasks}


# ---- what is printed
def headline(metrics: dict) -> float | None:
    """Return the number to quote, with any judge; None if results or judge failed."""
    judged = metrics.get("with_judge", {})
    failed = metrics["error"] or judged.get("judge_errors")
    return None if failed else (judged or metrics)["accuracy"]


def protocol_line(protocol: dict) -> str:
    low, high = protocol["pixels"]
    return (f"protocol={protocol['protocol']} method={protocol['method']} prompt={protocol['prompt_sha']} "
            f"pixels={'server' if low is None else low}..{high} judge={protocol['judge']}")


def show(metrics: dict) -> None:
    """Log a table by category, other scores, and the protocol."""
    log(f"{'category':<24}{'n':>6}{'correct':>9}{'accuracy':>10}   95 % interval{'unresolved':>13}"
        f"{'errors':>8}{'tokens':>8}{'cut off':>9}")
    for name, part in {**metrics["categories"], "all": metrics}.items():
        if part["n"]:
            log(f"{name[-24:]:<24}{part['n']:>6}{part['correct']:>9}{part['accuracy']:>10.1%}   "
                f"{interval(part['ci95']):<13}{part['unresolved']:>13}{part['error']:>8}"
                f"{part['mean_tokens']:>8.0f}{part['truncated']:>9}")
    judge, shares = metrics.get("with_judge"), {"strict": metrics["accuracy"]}
    if judge:
        shares["with judge"] = judge["accuracy"]
    shares |= {name: part["accuracy"] for name, part in metrics.get("compat", {}).items()}
    shares["chance"] = metrics.get("chance")
    log(" | ".join(f"{name} {value:.1%}" for name, value in shares.items() if value is not None))
    if judge and judge["judge_errors"]:
        log(f"the judge failed on {judge['judge_errors']} of {judge['asked']} results")
    log(protocol_line(metrics["protocol"]))
