"""Scores of a set of results: strict, with a judge and by other harnesses' rules, with intervals and chance.

A result is a line of evaluate.py's output; one with the verdict "error" is not scored. Shares are from 0 to
1. The 95 % interval is Wilson's; where results share a group, it lets them vary together.
"""
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from utils.backends import lacks_text
from utils.evaluate.reference_scorers import needs_detour
from utils.evaluate.scoring import ROTATIONS, VERDICTS, compat_right, gold_text, is_board
from utils.stats import chance, effective_groups, share_interval, wilson

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
    """Return counts, scores and intervals; "emission" counts what `imagines` accepts."""
    counts = Counter(record["verdict"] for record in records)
    scored = without_errors(records)
    n = len(scored)
    result = {"n": n, **{verdict: counts[verdict] for verdict in VERDICTS}, **share(scored, is_right),
              "incomplete": counts["error"] > 0}
    if not n:
        return result
    options, tokens = ([record[name] for record in scored] for name in ("n_options", "n_tokens"))
    result |= {"chance": chance(options) if all(options) else None, "constant": constant_answer(scored),
               "finish_reasons": counted(record["finish_reason"] or "unknown" for record in scored),
               "no_text": counted(filter(None, map(lacks_text, scored))),
               "mean_tokens": None if None in tokens else mean(tokens),
               "rules": counted(record["extraction"]["rule"] for record in scored),
               "unresolved_rules": counted(record["extraction"]["rule"] for record in scored
                                           if record["verdict"] == "unresolved"),
               "compat": compat_shares(scored)}
    if any(record.get("judge") for record in scored):
        result["with_judge"] = judge_shares(scored)
    if imagines:
        emitted = share(scored, imagines)
        result["emission"] = {"k": emitted["correct"], "n": n, "share": emitted["accuracy"],
                              "ci95": emitted["ci95"]}
    return result


def counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def constant_answer(records: list[dict]) -> dict | None:
    """Return {"answers", "accuracy"} of the best fixed answer to each benchmark, as the options were shown;
    None if a gold is a map: see utils.evaluate.scoring.vsp_floors."""
    golds = defaultdict(Counter)
    for record in records:
        gold = record.get("shown", record)["gold"]
        if is_board(gold):
            return None
        golds[record.get("benchmark") or ""][gold_text(gold) if isinstance(gold, list) else str(gold)] += 1
    best = {name: counts.most_common(1)[0] for name, counts in golds.items()}
    return {"answers": {name: answer for name, (answer, _) in best.items()},
            "accuracy": sum(n for _, n in best.values()) / len(records)}


def compat_shares(records: list[dict]) -> dict:
    """Return {rules of another harness: share} over the results they apply to, also with a judge that matches
    options; "no_verdict" counts what the rules cannot read."""
    shares = {}
    for name in dict.fromkeys(name for record in records for name in record["compat"]):
        covered = [record for record in records if name in record["compat"]]
        unread = [record for record in covered if record["compat"][name] is None]
        shares[name] = {"n": len(covered), "no_verdict": len(unread),
                        **share(covered, lambda record: compat_right(record, name))}
        matched = [judge for record in unread if (judge := record.get("judge")) and judge["kind"] == "map"]
        if matched and not any(judge["error"] for judge in matched):
            shares[f"{name}+judge"] = {"n": len(covered), **share(
                covered, lambda record: compat_right(record, name) if record["compat"][name] else
                (record.get("judge") or {}).get("parsed") == record["gold"])}
    return shares


def judge_shares(records: list[dict]) -> dict:
    asked = [record for record in records if record.get("judge")]
    return {**share(records, judged_right),
            "judged": sum(record["judged"] != record["verdict"] for record in asked), "asked": len(asked),
            "judge_errors": sum(record["judge"]["error"] is not None for record in asked)}


# ---- a benchmark's own scores
def own_scores(records: list[dict], right: Callable[[dict], bool] = is_right) -> dict:
    by_name, scores, tables, halves = defaultdict(list), {}, [], []
    for record in records:
        by_name[record.get("benchmark") or ""].append(record)
    for name, everything in by_name.items():
        if not (rows := without_errors(everything)):
            continue
        if all("rotation" in record for record in rows):
            scores[name] = {"all": rotation_scores(rows, right)} | {
                category: rotation_scores(part, right) for category, part in parts_of(rows).items()}
        elif name == "mme":
            scores[name] = mme_scores(everything, right)
        elif name == "mme_realworld_lite":
            scores[name] = {
                kind: share([row for row in rows if (row["category"] or "").startswith(f"{kind}/")], right)
                for kind in ("Perception", "Reasoning")}
        elif name == "mmvp":
            scores[name] = with_floors(pair_score, everything, right)
        elif name == "mmstar":
            scores[name] = with_floors(ability_score, rows, right)
        elif name.startswith("cv_bench/"):
            halves += rows
        elif name.startswith("tablevqa/"):
            tables.append(list(map(right, rows)))
        elif all(is_board(record["gold"]) for record in rows):
            detour = [needs_detour(record["gold"]) for record in rows]
            scores[name or "vsp"] = {
                kind: share([row for row, far in zip(rows, detour) if far is wanted], right)
                | {"n": detour.count(wanted)} for kind, wanted in (("detour", True), ("no_detour", False))}
    if halves:
        scores["cv_bench"] = with_floors(source_score, halves, right)
    if tables:
        scores["tablevqa"] = {"macro": macro(tables), "splits": len(tables)}
    return scores


def without_errors(records: list[dict]) -> list[dict]:
    return [record for record in records if record["verdict"] != "error"]


def parts_of(records: list[dict]) -> dict[str, list[dict]]:
    names = sorted({record["category"] for record in records} - {None})
    return {name: [record for record in records if record["category"] == name] for name in names}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def macro(parts: Iterable[list[bool]]) -> float:
    """Return the mean of the parts' shares: the paper's overall of TableVQABench, whose own script weights by
    items (naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py)."""
    return mean(list(map(mean, parts)))


def hits_by(field: str, records: list[dict], hit: Callable) -> dict[str, list]:
    """Return what `hit` says of the records, by the value of a field."""
    hits = defaultdict(list)
    for record in records:
        hits[record[field]].append(hit(record))
    return hits


def rotation_scores(records: list[dict], right: Callable[[dict], bool]) -> dict:
    """Return HR-Bench's scores. "average" is the mean of the rotations' shares (open-compass/VLMEvalKit,
    vlmeval/dataset/utils/hrbench.py, report_acc_hrbench; lmms-eval has the same formula), "all_right" the
    share right in all four rotations."""
    rotations, questions = (hits_by(field, records, right) for field in ("rotation", "group_id"))
    shares = {rotation: mean(hits) for rotation, hits in sorted(rotations.items())}
    complete = [all(hits) for hits in questions.values() if len(hits) == ROTATIONS]
    return {"average": mean(list(shares.values())), "by_rotation": shares,
            "all_right": mean(complete) if complete else None, "complete": len(complete)}


def mme_scores(records: list[dict], right: Callable[[dict], bool]) -> dict:
    """MME: accuracy plus accuracy+ (both questions about a picture right) per subtask, in percent, and sums
    over complete sets (VLMEvalKit vlmeval/dataset/utils/yorn.py, MME_rating). A picture with an error or
    without one of its questions does not count in accuracy+."""
    tasks = {}
    for name, part in parts_of(records).items():
        failed = {record["group_id"] for record in part if record["verdict"] == "error"}
        pictures = hits_by("group_id", part, right)
        whole = [all(hits) for picture, hits in pictures.items()
                 if picture not in failed and len(hits) % 2 == 0]
        if whole:
            accuracy, plus = mean(list(map(right, without_errors(part)))), mean(whole)
            tasks[name] = {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus}
    sums = {kind: sum(tasks[name]["score"] for name in names) if set(names) <= set(tasks) else None
            for kind, names in (("perception", MME_PERCEPTION), ("reasoning", MME_REASONING))}
    return {**sums, "tasks": tasks}


# ---- scores with floors; `hit` says how right a record is, 0 to 1
def with_floors(score: Callable, records: list[dict], right: Callable[[dict], bool]) -> dict:
    """Return a benchmark's published score, and the same score of a guess and of the best constant answer, as
    the options were shown."""
    golds = {record.get("shown", record)["gold"] for record in records}
    constant = [score(records, lambda record: record.get("shown", record)["gold"] == gold) for gold in golds]
    return {"score": score(records, right), "chance": score(records, lambda record: 1 / record["n_options"]),
            "constant": None if None in constant else max(constant)}


def pair_score(records: list[dict], hit: Callable[[dict], float]) -> float | None:
    """MMVP's accuracy: both questions of a pair right (tsb0601/MMVP, gpt_grader; VLMEvalKit
    vlmeval/dataset/utils/multiple_choice.py, report_acc_MMVP). A pair with an error or one row does not
    count."""
    pairs = hits_by("group_id", without_errors(records), hit)
    whole = [first * second for first, second in (pair for pair in pairs.values() if len(pair) == 2)]
    return mean(whole) if whole else None


def ability_score(records: list[dict], hit: Callable[[dict], float]) -> float:
    """MMStar's mean of its six abilities (MMStar-Benchmark/MMStar, eval/vlmeval/evaluate)."""
    return macro(list(map(hit, part)) for part in parts_of(records).values())


def source_score(records: list[dict], hit: Callable[[dict], float]) -> float | None:
    """CV-Bench's accuracy: of 2D, the mean of ADE20K and COCO, and of 3D, Omni3D, the mean (its data card);
    None unless all three were asked."""
    hits = defaultdict(list)
    for record in records:
        hits[record["category"].partition("/")[0]].append(hit(record))
    if set(hits) != {"ADE20K", "COCO", "Omni3D"}:
        return None
    return mean([mean([mean(hits["ADE20K"]), mean(hits["COCO"])]), mean(hits["Omni3D"])])


# ---- several replies to an item
def sample_scores(records: list[dict]) -> dict:
    """Return scores of items with k replies each, without items of which one is an error:

    "mean"      share of right replies
    "majority"  share of items whose most frequent answer is right; neither is a tie, nor an item of which no
                reply could be read: "tied" and "unread" count them
    "pass"      {m: share of items with a right one among m replies}, the unbiased estimator of Chen et al.
                (2021, arXiv 2107.03374), 1 - C(k - right, m) / C(k, m)

    Intervals are of 95 %; those of "pass" are Wilson's with as many items as effective groups, since no value
    between 0 and 1 varies more than a 0/1 one of the same mean.
    """
    by_item = hits_by("item", records, lambda record: record)
    whole = [rows for rows in by_item.values() if len(without_errors(rows)) == len(rows)]
    k = max(map(len, by_item.values()))
    if not whole:
        return {"k": k, "items": 0}
    groups, votes = [rows[0]["group_id"] for rows in whole], [vote(rows) for rows in whole]
    right, n = [sum(map(is_right, rows)) for rows in whole], effective_groups(groups)
    passed = {m: mean([1 - math.comb(k - hits, m) / math.comb(k, m) for hits in right])
              for m in sorted({2**e for e in range(k.bit_length())} | {k})}
    hits = [int(found == "right") for found in votes]
    return {"k": k, "items": len(whole), "mean": share([row for rows in whole for row in rows], is_right),
            "majority": {"correct": sum(hits), "accuracy": mean(hits), "ci95": share_interval(hits, groups),
                         "tied": votes.count("tied"), "unread": votes.count("unread")},
            "pass": {m: {"accuracy": value, "ci95": wilson(value * n, n)} for m, value in passed.items()}}


def vote(rows: list[dict]) -> str:
    answers = defaultdict(list)  # -> whether it is right
    for row in rows:
        if row["extraction"]["value"] is not None:
            answers[str(row["extraction"]["value"]).strip().lower()].append(is_right(row))
    if not answers:
        return "unread"
    first, *others = sorted(answers.values(), key=len, reverse=True)
    if others and len(others[0]) == len(first):
        return "tied"
    return "right" if first[0] else "wrong"


# ---- in one number
def headline(metrics: dict) -> float | None:
    """Return the number to quote, with any judge; None if results or judge failed."""
    judged = metrics.get("with_judge", {})
    failed = metrics["error"] or judged.get("judge_errors")
    return None if failed else (judged or metrics)["accuracy"]
