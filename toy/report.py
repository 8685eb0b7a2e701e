"""Gather what the toy's stages measured into report.html and one JSON object.

    python -m toy.report --work toy/work --seconds 600

Reads   in --work: *.metrics.json of every stage
Writes  in --work: report.html (`utils.probe.report`, and the data), report.json
Prints  one JSON object: accuracies with intervals, changes under do(Z), emission and follow rates, recall of
        the filter, seconds
"""
import argparse
import json
from pathlib import Path
from textwrap import fill

from filter_data import share_rows
from utils.cli import cli
from utils.display import (EFFECTS, Block, Table, Text, effect_row, interval, mediation_table, percent,
                           table_lines)
from utils.jsonl import load_object, write_json
from utils.probe.report import collect, write_report

MODELS = ("base", "text", "latent")
TIMED = ("see", "find", "base", "rewritten.jsonl", "sft.jsonl", "text", "latent", "evaluate_text.jsonl",
         "intervene_text.jsonl", "intervene_latent.jsonl")  # outputs whose metrics hold their seconds
SHOWN = {"latent": ("identity", "tau", "add_noise", "norm_noise", "near_zero", "swap_counterfactual",
                    "slot_swap_counterfactual", "cut_latent", "cut_image_after", "cut_both",
                    "strict", "markers_only", "blank"),
         "text": ("sham", "paraphrase", "irrelevant", "removal", "no_span", "foreign", "directed",
                  "image_off", "strict", "blank")}
SOURCES = {"image": "the image", "text_only": "the question alone", "own": "the imagination alone",
           "other": "another image's imagination"}  # what questions of probe.py are answered from
ALIKE = {"inter_raw": "mean raw cosine of two items", "spread": "variance over items / squared mean",
         "retrieval": "share of items found again one step later", "retrieval_chance": "the same by chance"}


def brief(entry: dict) -> dict:
    """Return what the tables show of a condition; "effect" and "r0" are None if it was not measured."""
    keys = {"effect": "n n_effective acc_clean acc_int delta ci90 ci95 b c p holm_p verdict changed "
                      "degenerate_int",
            "r0": "n delta_nll ci90 ci95 acc_clean kl p holm_p large verdict"}
    return {**{key: entry[key] for key in ("site", "role", "reason", "asked", "again", "coverage")},
            "follow": entry.get("follow"),
            **{part: entry[part] and {key: entry[part][key] for key in names.split()}
               for part, names in keys.items()}}


def gather(work: Path) -> dict:
    """Return the run as one object; every number comes from a stage's metrics file."""
    def metrics_of(output: str) -> dict:
        return load_object(work / f"{output}.metrics.json")

    scores = {name: metrics_of(f"evaluate_{name}.jsonl") for name in MODELS}
    text, latent = metrics_of("intervene_text.jsonl"), metrics_of("intervene_latent.jsonl")
    directed = text["conditions"]["directed"]
    rewritten, kept = metrics_of("rewritten.jsonl"), metrics_of("sft.jsonl")
    shown = ("n", "accuracy", "ci95", "unresolved")
    return {"accuracy": {name: {key: score[key] for key in shown} for name, score in scores.items()},
            "chance": scores["base"]["chance"], "emission": scores["latent"].get("emission"),
            "do_z": {kind: {name: brief(entry) for name, entry in metrics["conditions"].items()}
                     for kind, metrics in (("latent", latent), ("text", text))},
            "text_directed": {"coverage": directed["coverage"], "follow_rate": directed["follow"]["share"],
                              "follow": directed["follow"]},
            "sensitivity": {"latent": latent["sensitivity"], "text": text["sensitivity"]},
            "specific": text["specific"],
            "mediation": {site: parts for metrics in (latent, text)
                          for site, parts in metrics["mediation"].items()},
            "rewrite": {key: rewritten[key] for key in ("read", "kept", "errors", "refined_share")},
            "filter": {key: kept[key] for key in ("read", "kept", "errors", "calibration")},
            "stage_seconds": {name: metrics_of(name)["seconds"] for name in TIMED},
            "probing": {name: load_object(work / f"probe_{name}" / "metrics.json")
                        for name in ("text", "latent")}}


def data_blocks(result: dict) -> list[Block]:
    found = result["filter"]["calibration"]
    lost = ", ".join(f"{n} {kind}" for kind, n in found["absent"].items()) or "none"
    return [Text("Data", "h2"), Table(["planted faults, stage 2", "% of rows (95 % interval)"],
                                      share_rows(found["shares"])),
            Text(f"Rejected by stage 1: {lost}. "
                 f"{percent(result['rewrite']['refined_share'])} % of the chains were refined.")]


def probing_lines(probing: dict) -> list[str]:
    """Return the tables of what imaginations reveal without the image, and of what tells them apart."""
    rows = []
    for name, words in SOURCES.items():
        cells = []
        for kind in ("text", "latent"):
            reply = probing[kind]["probing"]["conditions"][name]
            for part in (reply, reply["r0"]):
                cells.append(f"{percent(part['accuracy'])} ({interval(part['ci'])})")
        rows.append([words, *cells])
    header = ["questions about the same region, answered from", "text: reply, %", "R0, %", "latent: reply, %",
              "R0, %"]
    return [*table_lines(header, rows), "",
            *table_lines(["imaginations", "text", "latent"], alike_rows(probing))]


def alike_rows(probing: dict) -> list[list[str]]:
    """Return what tells the imaginations of items apart, text and latent; what a run lacks is left out."""
    both = [probing["text"], probing["latent"]]
    found = [part["similarity"]["imagination"] for part in both]
    rows = [[words, *(f"{means[name]:.3g}" for means in found)] for name, words in ALIKE.items()
            if all(means.get(name) is not None for means in found)]
    splits = [(part.get("crossed") or {}).get("all_steps") for part in both]
    if all(split and split["image"] is not None for split in splits):
        rows += [[f"variance due to the {name}, % (by chance)",
                  *(f"{percent(split[name])} ({percent(split[f'{name}_chance'])})" for split in splits)]
                 for name in ("image", "question")]
    read = [(part.get("decoding") or {}).get("imagination") for part in both]
    if all(read):
        rows += [[f"{words}, %", *(percent(entry[name]) for entry in read)]
                 for name, words in (("accuracy", "right answer by a linear probe"),
                                     ("shuffled", "the same on shuffled answers"),
                                     ("question_only", "right answer from the question alone"))]
        rows.append(["p of the linear probe", *(f"{entry['p']:.3f}" for entry in read)])
    return rows


def full_tables(result: dict) -> str:
    """Return what docs/toy.md shows of a run, between the markers of results/toy.json."""
    rows = [[name, percent(part["accuracy"]), interval(part["ci95"]), f"{part['unresolved']} of {part['n']}"]
            for name, part in result["accuracy"].items()]
    emission, follow, specific = result["emission"], result["text_directed"]["follow"], result["specific"]
    text = (f"The text model's imagination could be edited on {follow['n']} items so that it states another "
            f"option, nearly all of which it had answered rightly: {follow['k']} answers became that "
            f"option. On the {specific['n']} items that also allow an irrelevant edit of the same size, "
            f"{percent(specific['directed'])} % follow the directed edit and "
            f"{percent(specific['irrelevant'])} % give that option after the irrelevant one. The latent "
            f"model emitted latents on {emission['k']} of {emission['n']} items.")
    silent = [f"{readout.upper()} of the {kind} model" for kind, found in result["sensitivity"].items()
              for readout in ("r2", "r0") if not found[readout]["moves"]]
    text += f" The positive control does not worsen {' and '.join(silent)}." if silent else ""
    header = [f"held-out items, chance {100 * result['chance']:.0f} %", "accuracy, %", "95 % interval",
              "replies that no rule can parse"]
    effects = [[kind, *effect_row(name, result["do_z"][kind][name])]
               for kind, names in SHOWN.items() for name in names]
    return "\n".join([
        *table_lines(header, rows), "", fill(text, 110), "",
        *table_lines(["imagination", *EFFECTS], effects), "",
        "Against a blank image, 95 % intervals: accuracy (R2) and log-probability of the right option (R0).",
        "",
        *table_lines(*mediation_table(result["mediation"])), "", *probing_lines(result["probing"])])


def short_table(runs: list[dict]) -> str:
    """Return README.md's table of runs on several machines, between the markers of their results files."""
    rows = []
    for name, words in (("base", "of the base model"), ("text", "with text imagination"),
                        ("latent", "with latent imagination")):
        scores = [run["accuracy"][name] for run in runs]
        rows.append([f"accuracy {words}", *(f"{percent(score['accuracy'])} % ({interval(score['ci95'])})"
                                            for score in scores)])
    follows = [run["text_directed"]["follow"] for run in runs]
    rows.append(["text edited to state another option: the answer follows",
                 *(f"{follow['k']} of {follow['n']}" for follow in follows)])
    effects = [run["do_z"]["latent"]["tau"]["effect"] for run in runs]
    rows.append(["one shared latent in place of all (tau), change in accuracy",
                 *(f"{percent(effect['delta'])} ({interval(effect['ci90'])})" for effect in effects)])
    n, chance = runs[0]["accuracy"]["base"]["n"], f"{100 * runs[0]['chance']:.0f} %"
    header = [f"{n} held-out questions, chance {chance}",
              *(f"machine {k}" for k in range(1, len(runs) + 1))]
    return "\n".join(table_lines(header, rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder of toy/run.sh")
    parser.add_argument("--seconds", type=int, default=None, help="how long the run took")
    args = parser.parse_args(argv)
    work = Path(args.work)
    result = gather(work) | {"seconds": args.seconds}
    write_report(work, "The toy's report", [*data_blocks(result), *collect(work)])
    write_json(work / "report.json", result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
