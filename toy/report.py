"""Gather what the toy's stages measured into report.html and one JSON object.

    python -m toy.report --work toy/work --seconds 600

Reads   in --work: the *.metrics.json of every stage, the filter's verdicts, the rewriter's rejections,
world/truth.jsonl
Writes  in --work: report.html (`utils.report`, and the data), report.json
Prints  one JSON object: accuracies with intervals, changes under do(Z), emission and follow rates, filter
recall, seconds
"""
import argparse
import json
from collections import Counter
from pathlib import Path

from toy.make_world import BAD
from utils.cli import cli, log
from utils.jsonl import load_object, read_rows, write_json
from utils.report import (EFFECTS, Block, Table, Text, collect, effect_row, interval, mediation_table, percent,
                          table_lines, write_report)

VARIANTS = ("base", "text", "latent")
STAGES = ("see", "find", "base", "rewritten.jsonl", "sft.jsonl", "text", "latent", "evaluate_text.jsonl",
          "intervene_text.jsonl", "intervene_latent.jsonl")  # whose <name>.metrics.json holds their seconds


def filter_quality(work: Path) -> dict:
    """Return precision and recall of stages 1 and 2 against the planted faults, over all and by reason.

    A row counts under the first of its reasons. Precision of a reason: the share of its rows with a planted
    fault; recall: of each fault, the share of its rows that this reason took out.
    """
    planted = {row["id"]: row["bad"] or "sound" for row in read_rows(work / "world" / "truth.jsonl",
                                                                     {"id": str})}
    reason_of = {row["id"]: f"rewrite:{row['reason']}" for row in read_rows(work / "rewritten.jsonl.run"
                                                                            / "rejected.jsonl",
                                                                          {"id": str, "reason": str})}
    reason_of |= {row["id"]: f"{row['stage']}:{row['reasons'][0]}" for row in read_rows(
        work / "sft.jsonl.run" / "verdicts.jsonl", {"id": str, "reasons": list}) if not row["keep"]}
    n_rows, n_out = Counter(planted.values()), Counter(planted[name] for name in reason_of)
    by_fault = {fault: {"rows": n_rows[fault], "taken_out": n_out[fault]} for fault in ("sound", *BAD)}
    by_reason = {}
    for reason in sorted(set(reason_of.values())):
        counts = Counter(planted[name] for name, its in reason_of.items() if its == reason)
        by_reason[reason] = {"taken_out": counts.total(), "precision": 1 - counts["sound"] / counts.total(),
                             "recall": {fault: counts[fault] / n_rows[fault] for fault in BAD
                                        if counts[fault]}}
    n_caught = sum(n_out[fault] for fault in BAD)
    return {"precision": n_caught / len(reason_of) if reason_of else None,
            "recall": n_caught / sum(n_rows[fault] for fault in BAD), "by_fault": by_fault,
            "by_reason": by_reason}


def quality_table(quality: dict) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the filter by reason."""
    rows = [[reason, str(part["taken_out"]), percent(part["precision"]),
             ", ".join(f"{fault} {percent(share)}" for fault, share in part["recall"].items()) or "-"]
            for reason, part in quality["by_reason"].items()]
    return ["reason", "rows taken out", "precision, %", "recall of a planted fault, %"], rows


def gather(work: Path) -> dict:
    """Return the run in one object; every number stands in a stage's metrics file."""
    accuracy, emission = {}, None
    for name in VARIANTS:
        metrics = load_object(work / f"evaluate_{name}.jsonl.metrics.json")
        accuracy[name] = {key: metrics[key] for key in ("n", "accuracy", "ci95", "ci95_clustered",
                                                        "unresolved")}
        emission = metrics.get("emission", emission)
    text, latent = (load_object(work / f"intervene_{name}.jsonl.metrics.json") for name in ("text", "latent"))
    directed = text["conditions"]["directed"]
    do_z = {arm: {name: brief(entry) for name, entry in metrics["conditions"].items()}
            for arm, metrics in (("latent", latent), ("text", text))}
    rewrite, kept = load_object(work / "rewritten.jsonl.metrics.json"), load_object(
        work / "sft.jsonl.metrics.json")
    return {"accuracy": accuracy, "chance": load_object(work / "evaluate_base.jsonl.metrics.json")["chance"],
            "emission": emission, "do_z": do_z, "text_directed": {
                "coverage": directed["coverage"], "follow_rate": directed["follow"]["share"],
                "follow": directed["follow"]},
            "mediation": {site: parts["r0"] for metrics in (latent, text) for site,
                          parts in metrics["mediation"].items()},
            "donor_lift": latent["donor_lift"],
            "rewrite": {key: rewrite[key] for key in ("read", "kept", "errors", "refined_share")},
            "filter": {key: kept[key] for key in ("read", "kept", "errors")} | filter_quality(work),
            "stage_seconds": {name: load_object(work / f"{name}.metrics.json")["seconds"] for name in STAGES},
            "probing": {name: load_object(work / f"probe_{name}" / "metrics.json")
                        for name in ("text", "latent")}}


def brief(entry: dict) -> dict:
    """Return what the report shows of a condition; "effect" and "r0" None where there is none, and then a
    reason."""
    keys = ("n", "acc_clean", "acc_int", "delta", "ci90", "ci95", "b", "c", "verdict", "changed",
            "degenerate_int")
    return {"site": entry["site"], "reason": entry["reason"], "follow": entry.get("follow"),
            "effect": entry["effect"] and {key: entry["effect"][key] for key in keys},
            "r0": entry["r0"] and {key: entry["r0"][key] for key in ("delta_nll", "ci90", "ci95", "kl",
                                                                     "verdict")}}


def do_z_lines(do_z: dict, mediation: dict) -> list[str]:
    """Return the Markdown tables of all conditions and of the mediation."""
    rows = [[arm, *effect_row(name, part)] for arm, its in do_z.items() for name, part in its.items()]
    return [*table_lines(["imagination", *EFFECTS], rows), "",
            "Against a blank image, log-probability of the right option (R0), nats with 95 % intervals:", "",
            *table_lines(*mediation_table(mediation))]


def data_blocks(result: dict) -> list[Block]:
    """Return what the report says of stages 1 and 2 (`utils.report`)."""
    quality = result["filter"]
    faults = [[name, str(part["rows"]), str(part["taken_out"])] for name, part in quality["by_fault"].items()]
    return [Text("Data", "h2"), Table(["planted fault", "rows", "taken out by stages 1 and 2"], faults),
            Table(*quality_table(quality)),
            Text(f"Precision {percent(quality['precision'])} %, recall {percent(quality['recall'])} %; "
                 f"{percent(result['rewrite']['refined_share'])} % of the chains were refined.")]


SHOWN = {"latent": ("identity", "tau", "add_noise", "norm_noise", "near_zero", "swap_counterfactual",
                    "slot_swap_counterfactual", "cut_latent", "cut_image_after", "cut_both"),
         # of all conditions, in the README
         "text": ("sham", "irrelevant", "removal", "foreign", "directed", "image_off")}


ASKED = {"image": "the image", "text_only": "the question alone", "own": "the imagination alone",
         "other": "another image's imagination"}


def probing_lines(probing: dict) -> list[str]:
    """Return the table of what imaginations tell without the image, and of how alike they are."""
    rows = []
    for name, words in ASKED.items():
        cells = []
        for arm in ("text", "latent"):
            found = probing[arm]["probing"]["conditions"][name]
            cells += [f"{percent(part['accuracy'])} ({interval(part['ci'])})"
                      for part in (found, found["r0"])]
        rows.append([words, *cells])
    header = ["questions about the same region, answered from", "text: reply, %", "R0, %", "latent: reply, %",
              "R0, %"]
    cosines = {arm: part["similarity"]["imagination"] for arm, part in probing.items()}
    alike = [f"{form} " + ", ".join(f"{arm}: {its['inter_' + form]:.2f}" for arm, its in cosines.items())
             for form in ("raw", "centred")]
    return [*table_lines(header, rows), "",
            f"Mean cosine between the imaginations of two items: {'; '.join(alike)}."]


def readme(result: dict) -> str:
    """Return what the README shows of a run, between its markers."""
    lines = [f"| held-out items, chance {100 * result['chance']:.0f} % | accuracy, % | 95 % interval |",
             "|---|---|---|"]
    lines += [f"| {name} | {percent(part['accuracy'])} | {interval(part['ci95'])} |"
              for name, part in result["accuracy"].items()]
    emission, follow = result["emission"], result["text_directed"]["follow"]
    shown = {arm: {name: result["do_z"][arm][name] for name in names} for arm, names in SHOWN.items()}
    return "\n".join([
        *lines, "",
        f"The text model's imagination was edited so that it states another option: it answered that option on "
        f"{follow['k']} of {follow['n']} items. The latent model emitted latents on {emission['k']} of {emission['n']} items.",
        "",
        *do_z_lines(shown, result["mediation"]), "", *probing_lines(result["probing"])])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder of toy/run.sh")
    parser.add_argument("--seconds", type=int, default=None, help="how long the run took")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    work = Path(args.work)
    result = gather(work) | {"seconds": args.seconds}
    write_report(work, "The toy's report", [*data_blocks(result), *collect(work)])
    write_json(work / "report.json", result)
    log("\n".join(table_lines(*quality_table(result["filter"]))))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
