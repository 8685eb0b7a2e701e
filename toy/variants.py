"""Train every target on the same rows, three seeds each, with the paper's ablations, and compare them.

    python -m toy.variants --work toy/work        (after bash toy/run.sh, whose base, rows and items it uses)

text, latent, placeholder (the paper's "without rewriting") and direct (the boxed answer alone) are trained on
sft.jsonl; unfiltered is text on the rows of stage 1 (the paper's "without filtering"). A seed orders the rows
and draws the held-out ones. ci95_clustered is about the items alone (cluster bootstrap over pictures; the
value of an item is its mean over seeds). Three seeds are too few for an interval over seeds: seed_range is
their minimum and maximum. Intervals of several differences are not adjusted for their number.

Reads   in --work: base, sft.jsonl, rewritten.jsonl, world/ and, if there, evaluate_base.jsonl.metrics.json
Writes  in --work/variants: checkpoints, evaluations and a .log of each command; existing outputs are skipped,
        so run the same command again after a kill; --result
Prints  the table of docs/toy.md on stderr; one JSON object with every run, mean and difference on stdout
"""
import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from utils.cli import cli, log
from utils.display import interval, percent, table_lines
from utils.jsonl import DataError, load_object, read_rows, sha256_file, write_json
from utils.stats import cluster_bootstrap, wilson

ROOT = Path(__file__).parents[1]
VARIANTS = ("text", "latent", "placeholder", "direct", "unfiltered")
LEVEL = 0.95
# the flags of toy/run.sh
TRAIN = ("--global_batch 64 --num_workers 0 --save_every 50 --keep 1 --max_steps 200 "
         "--learning_rate 1e-3 --validation_rows 60 --eval_every 50").split()
ASK = "--max_new_tokens 64 --batch_size 50 --dtype float32".split()


def paths_of(work: Path, variant: str, seed: int) -> tuple[Path, Path, Path]:
    """Return (rows to train on, checkpoint, evaluation)."""
    rows, name = "rewritten.jsonl" if variant == "unfiltered" else "sft.jsonl", f"{variant}-{seed}"
    return work / rows, work / "variants" / name, work / "variants" / f"evaluate_{name}.jsonl"


def commands(work: Path, variant: str, seed: int) -> tuple[list[str], list[str]]:
    """Return the command that trains and the command that evaluates."""
    rows, checkpoint, evaluation = map(str, paths_of(work, variant, seed))
    world = str(work / "world")
    train = [sys.executable, str(ROOT / "train_sft.py"), "--image_root", world, *TRAIN, "--data", rows,
             "--model", str(work / "base"), "--output", checkpoint, "--seed", str(seed),
             "--imagination", "text" if variant == "unfiltered" else variant]
    ask = [sys.executable, str(ROOT / "evaluate.py"), "--model", checkpoint, "--image_root", world, *ASK,
           "--items", f"{world}/bench.jsonl", "--protocol", "plain", "--output", evaluation]
    return train, ask + (["--latent", "mirage"] if variant == "latent" else [])


def run_command(command: list[str], log_file: Path) -> None:
    """Run one stage; DataError with the end of its log unless it exits with 0 or 3 (sample errors)."""
    name = log_file.stem
    log(f"== {name} ({log_file})")
    with open(log_file, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status not in (0, 3):
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        raise DataError("\n".join([f"{name} failed with exit code {status}; {log_file} ends with", *tail]))


def run_all(work: Path, variants: list[str], seeds: list[int]) -> None:
    """Train and evaluate what is missing, one seed after the other."""
    (work / "variants").mkdir(exist_ok=True)
    for seed, variant in product(seeds, variants):
        rows, checkpoint, evaluation = paths_of(work, variant, seed)
        train, ask = commands(work, variant, seed)
        if not checkpoint.exists():
            run_command(train, Path(f"{checkpoint}.log"))
        if list(load_object(f"{checkpoint}.meta.json")["inputs"].values()) != [sha256_file(rows)]:
            raise DataError(f"{checkpoint} was trained on other rows than {rows} has now; expected the same: "
                            f"move {work / 'variants'} away")
        if not Path(f"{evaluation}.metrics.json").exists():  # written after the results
            run_command(ask, evaluation.with_suffix(".log"))


def read_run(work: Path, variant: str, seed: int) -> tuple[dict, dict[tuple, bool]]:
    """Return a run's numbers, and {(group, id): whether the item was answered right}."""
    _, checkpoint, evaluation = paths_of(work, variant, seed)
    trained, scored = (load_object(f"{path}.metrics.json") for path in (checkpoint, evaluation))
    right = {(row["group_id"], row["id"]): row["verdict"] == "correct" for row in read_rows(
        evaluation, {"id": str, "group_id": str, "verdict": str}) if row["verdict"] != "error"}
    return {**{key: scored[key] for key in ("correct", "n", "unresolved", "chance")},
            "accuracy": scored["correct"] / scored["n"],
            "ci95": wilson(scored["correct"], scored["n"], LEVEL),
            **{key: trained[key] for key in ("rows", "best_step", "best_held_out_loss", "seconds")}}, right


def over_items(by_seed: list[dict[tuple, float]]) -> dict:
    """Return the mean over seeds and items with its interval over items, and the seeds' means and range."""
    items = list(by_seed[0])
    values = [sum(part[item] for part in by_seed) / len(by_seed) for item in items]
    means = [sum(part.values()) / len(items) for part in by_seed]
    return {"mean": sum(values) / len(items),
            "ci95_clustered": cluster_bootstrap(values, [group for group, _ in items], LEVEL),
            "by_seed": means, "seed_range": [min(means), max(means)]}


def gather(work: Path, variants: list[str], seeds: list[int]) -> dict:
    """Return all runs as one object; every number comes from a file of a run."""
    runs = {variant: {seed: read_run(work, variant, seed) for seed in seeds} for variant in variants}
    first, first_right = runs[variants[0]][seeds[0]]
    for variant, seed in product(variants, seeds):
        if set(runs[variant][seed][1]) != set(first_right):
            raise DataError(f"{paths_of(work, variant, seed)[2]}: scores other items than "
                            f"{paths_of(work, variants[0], seeds[0])[2]}; expected the same in every run")
    differences = {variant: over_items([{item: runs["text"][seed][1][item] - runs[variant][seed][1][item]
                                         for item in first_right} for seed in seeds])
                   for variant in variants if variant != "text" and "text" in variants}
    path = work / "evaluate_base.jsonl.metrics.json"
    base = load_object(path) if path.exists() else None
    return {"level": LEVEL, "seeds": seeds, "items": len(first_right), "chance": first["chance"],
            "groups": len({group for group, _ in first_right}),
            "base": base and {"n": base["n"], "accuracy": base["accuracy"], "ci95_clustered": base["ci95"]},
            "variants": {name: over_items([right for _, right in by_seed.values()])
                         | {"runs": {str(seed): numbers for seed, (numbers, _) in by_seed.items()}}
                         for name, by_seed in runs.items()},
            "text_minus": differences}


def markdown(result: dict) -> str:
    """Return the table of docs/toy.md, between the markers of results/variants.json."""
    header = [f"{result['items']} items, chance {percent(result['chance'])} %",
              f"accuracy of seeds {', '.join(map(str, result['seeds']))}, %", "mean, %",
              f"{100 * result['level']:.0f} % interval over pictures", "text minus it, points"]
    base = result["base"]
    rows = [["base", percent(base["accuracy"]), "", interval(base["ci95_clustered"]), ""]] if base else []
    for name, part in result["variants"].items():
        difference = ""
        if name in result["text_minus"]:
            less = result["text_minus"][name]
            mean, low, high = (100 * share for share in (less["mean"], *less["ci95_clustered"]))
            difference = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        rows.append([name, ", ".join(map(percent, part["by_seed"])), percent(part["mean"]),
                     interval(part["ci95_clustered"]), difference])
    return "\n".join(table_lines(header, rows)).replace("|  |", "| |").replace("|  |", "| |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder of toy/run.sh")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--result", default="results/variants.json", help="file to write")
    args = parser.parse_args(argv)
    work, variants, seeds = Path(args.work), list(dict.fromkeys(args.variants)), sorted(set(args.seeds))
    run_all(work, variants, seeds)
    result = {"max_steps": int(TRAIN[TRAIN.index("--max_steps") + 1]), **gather(work, variants, seeds)}
    write_json(args.result, result)
    log(markdown(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
