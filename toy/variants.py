"""Do the four training targets learn, from the same rows? Three seeds, and the paper's ablations.

    python -m toy.variants --work toy/work        (after bash toy/run.sh, whose base, rows and items it takes)

text, latent, placeholder (the paper's "without rewriting") and direct (the boxed answer alone) are trained on
sft.jsonl, unfiltered is text on the rows of stage 1 (the paper's "without filtering"); the same base, steps
and flags as in run.sh.

Reads   in --work: base, sft.jsonl, rewritten.jsonl, world/ and, if there, evaluate_base.jsonl.metrics.json
Writes  in --work/variants: <variant>-<seed> (checkpoint), evaluate_<variant>-<seed>.jsonl, what both said as
        .log; what
        exists is skipped, so that the same command goes on after a kill; --result
Prints  the README's table on stderr; on stdout one JSON object: a run's accuracy with Wilson's interval, a
        variant's mean
        over seeds, text minus each other variant

A seed is one replication of the fine-tuning: it orders the rows and draws those held out; the base is one for
all. ci95_clustered is about the items alone: these very runs on other pictures (cluster bootstrap; an item's
value is its mean over seeds). Three seeds are too few for an interval over seeds: seed_range is the least and
the largest of them, no more. Intervals of several differences are not adjusted for their number. Held-out
losses compare only within a variant, whose trained tokens are the same, and a seed, whose held-out rows are.
"seconds" of training count from its last start.
"""
import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from utils.cli import cli, log
from utils.jsonl import DataError, load_object, read_rows, sha256_file, write_json
from utils.report import interval, percent
from utils.stats import cluster_bootstrap, wilson

ROOT = Path(__file__).parents[1]
VARIANTS = ("text", "latent", "placeholder", "direct", "unfiltered")
LEVEL = 0.95
# the flags of toy/run.sh
TRAIN = ("--global_batch 64 --batch_size 32 --num_workers 0 --save_every 50 --keep 1 "
         "--learning_rate 1e-3 --validation_rows 60 --eval_every 50").split()
ASK = "--max_new_tokens 64 --batch_size 50 --dtype float32".split()


def paths_of(work: Path, variant: str, seed: int) -> tuple[Path, Path, Path]:
    """Return (rows to train on, checkpoint, evaluation)."""
    name = f"{variant}-{seed}"
    return (work / ("rewritten.jsonl" if variant == "unfiltered" else "sft.jsonl"), work / "variants" / name,
            work / "variants" / f"evaluate_{name}.jsonl")


def commands(work: Path, variant: str, seed: int, max_steps: int) -> tuple[list[str], list[str]]:
    """Return the command that trains and the one that evaluates."""
    data, checkpoint, evaluation = map(str, paths_of(work, variant, seed))
    world = str(work / "world")
    train = [sys.executable, str(ROOT / "train_sft.py"), "--image_root", world, *TRAIN, "--max_steps",
             str(max_steps),
             "--data", data, "--model", str(work / "base"), "--output", checkpoint,
             "--imagination", "text" if variant == "unfiltered" else variant, "--seed", str(seed)]
    ask = [sys.executable, str(ROOT / "evaluate.py"), "--model", checkpoint, "--items",
           f"{world}/bench.jsonl",
           "--image_root", world, *ASK, "--protocol", "plain", "--output", evaluation]
    return train, ask + (["--latent", "mirage"] if variant == "latent" else [])


def run_child(command: list[str], told: Path) -> None:
    """Run one stage, its output in the file `told`; DataError with the end of it unless it exits with 0 or 3.

    Exit 3 is "complete, with errors on some samples", as in run.sh.
    """
    begun, name = time.monotonic(), told.stem
    log(f"== {name} ({told})")
    with open(told, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status not in (0, 3):
        # of a bar, its last states
        tail = "\n".join(told.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise DataError(f"{name} failed with exit code {status}; {told} ends with\n{tail}")
    log(f"== {name} took {time.monotonic() - begun:.0f} s")


def run_all(work: Path, variants: list[str], seeds: list[int], max_steps: int) -> None:
    """Train and evaluate what is not there yet, a whole seed after the other."""
    for path in (work / "base", work / "sft.jsonl", work / "rewritten.jsonl", work / "world" / "bench.jsonl"):
        if not path.exists():
            raise DataError(f"{path} does not exist; run bash toy/run.sh {work} first")
    (work / "variants").mkdir(exist_ok=True)
    for seed, variant in product(seeds, variants):
        data, checkpoint, evaluation = paths_of(work, variant, seed)
        train, ask = commands(work, variant, seed, max_steps)
        if not checkpoint.exists():
            run_child(train, Path(f"{checkpoint}.log"))
        meta = load_object(f"{checkpoint}.meta.json")
        if meta["flags"]["max_steps"] != max_steps or list(meta["inputs"].values()) != [sha256_file(data)]:
            raise DataError(
                f"{checkpoint} was trained for {meta['flags']['max_steps']} steps, or on other rows than {data} "
                            f"holds now; expected {max_steps} steps on these: move {work / 'variants'} away")
        if not Path(f"{evaluation}.metrics.json").exists():  # written after the results
            run_child(ask, evaluation.with_suffix(".log"))


def read_run(work: Path, variant: str, seed: int) -> tuple[dict, dict[tuple, bool]]:
    """Return a run's numbers, and whether each scored item, named (group, id), was answered right."""
    _, checkpoint, evaluation = paths_of(work, variant, seed)
    for path in (f"{checkpoint}.metrics.json", f"{evaluation}.metrics.json", evaluation):
        if not Path(path).exists():
            raise DataError(
                f"{path} does not exist: no result of variant {variant}, seed {seed}; give the command again "
                            "to train and evaluate it, or leave it out of --variants and --seeds")
    trained, asked = (load_object(f"{path}.metrics.json") for path in (checkpoint, evaluation))
    right = {(row["group_id"], row["id"]): row["verdict"] == "correct" for row in read_rows(
        evaluation, {"id": str, "group_id": str, "verdict": str}) if row["verdict"] != "error"}
    if (sum(right.values()), len(right)) != (asked["correct"], asked["n"]):
        raise DataError(
            f"{evaluation}: {sum(right.values())} of {len(right)} right, and its metrics say {asked['correct']} "
                        f"of {asked['n']}; remove both to evaluate again")
    return {**{key: asked[key] for key in ("correct", "n", "unresolved", "chance")},
            "accuracy": asked["correct"] / asked["n"],
            "ci95": wilson(asked["correct"], asked["n"], LEVEL),
            **{key: trained[key] for key in ("rows", "best_step", "best_held_out_loss", "seconds")}}, right


def over_items(by_seed: list[dict[tuple, float]]) -> dict:
    """Return the mean over seeds and items, its interval over items, the values of the seeds and their range.
    """
    items = list(by_seed[0])
    values = [sum(part[item] for part in by_seed) / len(by_seed) for item in items]
    means = [sum(part.values()) / len(items) for part in by_seed]
    return {"mean": sum(values) / len(items),
            "ci95_clustered": cluster_bootstrap(values, [group for group, _ in items], LEVEL),
            "by_seed": means, "seed_range": [min(means), max(means)]}


def gather(work: Path, variants: list[str], seeds: list[int]) -> dict:
    """Return all runs in one object; every number stands in a file of a run."""
    runs = {variant: {seed: read_run(work, variant, seed) for seed in seeds} for variant in variants}
    first, right_of_first = runs[variants[0]][seeds[0]]
    for variant, seed in product(variants, seeds):
        if set(runs[variant][seed][1]) != set(right_of_first):
            raise DataError(f"{paths_of(work, variant, seed)[2]}: scores other items than "
                            f"{paths_of(work, variants[0], seeds[0])[2]}; expected the same in every run")
    less = {name: [{item: runs["text"][seed][1][item] - runs[name][seed][1][item] for item in right_of_first}
                   for seed in seeds]
            for name in variants if name != "text" and "text" in variants}
    path = work / "evaluate_base.jsonl.metrics.json"
    base = load_object(path) if path.exists() else None
    return {"level": LEVEL, "seeds": seeds, "items": len(right_of_first), "chance": first["chance"],
            "groups": len({group for group, _ in right_of_first}),
            "base": base and {key: base[key] for key in ("n", "accuracy", "ci95", "ci95_clustered")},
            "variants": {name: over_items([right for _, right in by_seed.values()])
                         | {"runs": {str(seed): numbers for seed, (numbers, _) in by_seed.items()}}
                         for name, by_seed in runs.items()},
            "text_minus": {name: over_items(by_seed) for name, by_seed in less.items()}}


def markdown(result: dict) -> str:
    """Return the table that stands in the README between the markers of results/variants.json."""
    seeds, base = ", ".join(map(str, result["seeds"])), result["base"]
    lines = [
        f"| {result['items']} items, chance {percent(result['chance'])} % | accuracy of seeds {seeds}, % | mean, % | "
             f"{100 * result['level']:.0f} % interval over pictures | text minus it, points |",
             "|---|---|---|---|---|"]
    lines += [
        f"| base | {percent(base['accuracy'])} | | {interval(base['ci95_clustered'])} | |"] if base else []
    for name, part in result["variants"].items():
        less = ""
        if name in result["text_minus"]:
            mean, low, high = (100 * share for share in (result["text_minus"][name]["mean"],
                                                         *result["text_minus"][name]["ci95_clustered"]))
            less = f" {mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {name} | {', '.join(map(percent, part['by_seed']))} | {percent(part['mean'])} | "
                     f"{interval(part['ci95_clustered'])} |{less} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder of toy/run.sh")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--max_steps", type=int, default=200, help="optimizer steps of every run")
    parser.add_argument("--result", default="results/variants.json",
                        help="where the JSON object is also written")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # each once
    work, variants, seeds = Path(args.work), list(dict.fromkeys(args.variants)), sorted(set(args.seeds))
    run_all(work, variants, seeds, args.max_steps)
    result = {"max_steps": args.max_steps, **gather(work, variants, seeds)}
    write_json(args.result, result)
    log(markdown(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
