"""The toy's variants: what is run, and how seeds and items are put together.    pytest tests/test_variants.py
"""
import json
import sys
from pathlib import Path

import pytest

import evaluate
import train_sft
from toy import variants
from utils.jsonl import DataError, write_json, write_rows

ROOT = Path(__file__).parents[1]
# Two pictures of two items each; 1 is right. By item, text minus direct is 1/2, 1, 1/2, 0.
RIGHT = {("text", 1): (1, 1, 1, 0), ("text", 2): (1, 1, 0, 0), ("direct", 1): (1, 0, 0, 0),
         ("direct", 2): (0, 0, 0, 0)}


def write_run(work, variant, seed, right):
    _, checkpoint, evaluation = variants.paths_of(work, variant, seed)
    write_json(f"{checkpoint}.metrics.json", {"rows": 10, "best_step": 150, "best_held_out_loss": 0.5,
                                              "seconds": 60.0})
    write_rows(evaluation,
               [{"id": f"{n}", "group_id": "ab"[n // 2], "verdict": ("unresolved", "correct")[value]}
                            for n, value in enumerate(right)])
    write_json(f"{evaluation}.metrics.json", {"n": len(right), "correct": sum(right), "unresolved": len(right)
                                              - sum(right),
                                              "chance": 0.25})


@pytest.fixture
def work(tmp_path):
    for (variant, seed), right in RIGHT.items():
        write_run(tmp_path, variant, seed, right)
    return tmp_path


def test_means_intervals_and_differences_are_those_computed_by_hand(work):
    """Drawing 2 of 2 pictures gives the lower twice, one of each or the upper twice with 1/4, 1/2, 1/4: so
    the ends."""
    result = variants.gather(work, ["text", "direct"], [1, 2])
    text, direct, less = result["variants"]["text"], result["variants"]["direct"], result["text_minus"][
        "direct"]
    assert (text["by_seed"], text["mean"], text["seed_range"]) == ([0.75, 0.5], 0.625, [0.5, 0.75])
    assert (direct["by_seed"], direct["mean"], direct["seed_range"]) == ([0.25, 0.0], 0.125, [0.0, 0.25])
    assert text["ci95_clustered"] == (0.25, 1.0) and direct["ci95_clustered"] == (0.0, 0.25)
    assert (less["mean"], less["ci95_clustered"], less["by_seed"]) == (0.5, (0.25, 0.75), [0.5, 0.5])
    run = text["runs"]["1"]
    assert (run["correct"], run["n"], run["unresolved"], run["best_step"], run["seconds"]) == (3, 4, 1, 150,
                                                                                               60.0)
    # (3 + z²/2 -+ z sqrt(3/4 + z²/4)) / (4 + z²)
    assert run["ci95"] == pytest.approx((0.30064, 0.95441), abs=1e-5)
    assert (result["level"], result["items"], result["groups"], result["chance"],
            result["base"]) == (0.95, 4, 2, 0.25, None)
    assert list(result["text_minus"]) == ["direct"] and variants.gather(work, ["direct"],
                                                                        [1, 2])["text_minus"] == {}


def test_items_are_paired_by_id_not_by_place(work):
    before = variants.gather(work, ["text", "direct"], [1, 2])
    path = variants.paths_of(work, "direct", 1)[2]
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert variants.gather(work, ["text", "direct"], [1, 2]) == before


@pytest.mark.parametrize("end", [".metrics.json", ""])
def test_a_missing_seed_is_named(work, end):
    Path(f"{variants.paths_of(work, 'direct', 2)[2]}{end}").unlink()
    with pytest.raises(DataError, match=r"evaluate_direct-2\.jsonl.*no result of variant direct, seed 2"):
        variants.gather(work, ["text", "direct"], [1, 2])


def test_other_items_and_other_counts_are_refused(work):
    write_run(work, "direct", 2, (0, 0, 0))
    with pytest.raises(DataError, match="scores other items"):
        variants.gather(work, ["text", "direct"], [1, 2])
    write_json(f"{variants.paths_of(work, 'direct', 2)[2]}.metrics.json", {"n": 3, "correct": 1})
    with pytest.raises(DataError, match="0 of 3 right, and its metrics say 1 of 3"):
        variants.gather(work, ["text", "direct"], [1, 2])


def test_the_table_says_what_the_object_says(work):
    write_json(work / "evaluate_base.jsonl.metrics.json", {"n": 4, "accuracy": 0.25, "ci95": [0.1, 0.6],
                                                           "ci95_clustered": [0.0, 0.5]})
    result = variants.gather(work, ["text", "direct"], [1, 2])
    lines = variants.markdown(json.loads(json.dumps(result))).splitlines()
    assert lines[0] == (
        "| 4 items, chance 25.0 % | accuracy of seeds 1, 2, % | mean, % | 95 % interval over pictures | "
                        "text minus it, points |")
    assert lines[2:] == ["| base | 25.0 | | 0.0 to 50.0 | |",
                         "| text | 75.0, 50.0 | 62.5 | 25.0 to 100.0 | |",
                         "| direct | 25.0, 0.0 | 12.5 | 0.0 to 25.0 | +50.0 (+25.0 to +75.0) |"]
    assert {line.count("|") for line in lines} == {6}


def test_every_variant_differs_in_its_target_or_its_rows_alone_and_has_the_flags_of_run_sh():
    script, trained = (ROOT / "toy" / "run.sh").read_text(), {}
    flags = " ".join(variants.TRAIN)
    assert all(part in script for part in (flags.split(" --learning_rate")[0],
                                           flags[flags.index("--learning_rate"):],
                                           " ".join(variants.ASK)))
    for name in variants.VARIANTS:
        train, ask = variants.commands(Path("w"), name, 7, 200)
        trained[name], asked = vars(train_sft.parse_args(train[2:])), evaluate.parse_args(ask[2:])
        assert (asked.latent, asked.model) == ("mirage" if name == "latent" else "off",
                                               trained[name]["output"])
    differ = {name: {key: value for key, value in args.items() if value != trained["text"][key]
                     and key != "output"}
              for name, args in trained.items()}
    assert differ == {"text": {}, **{name: {"imagination": name} for name in ("latent", "placeholder",
                                                                              "direct")},
                      "unfiltered": {"data": ["w/rewritten.jsonl"]}}
    assert (trained["text"]["seed"], trained["text"]["max_steps"],
            trained["text"]["learning_rate"]) == (7, 200, 1e-3)


def test_what_exists_is_not_run_again_and_other_rows_or_steps_are_refused(work, monkeypatch):
    ran, args = [], (work, ["text", "direct"], [1, 2], 200)
    (work / "base").mkdir()
    for name in ("sft.jsonl", "rewritten.jsonl", "world/bench.jsonl"):
        write_rows(work / name, [])
    for variant, seed in RIGHT:
        data, checkpoint, _ = variants.paths_of(work, variant, seed)
        write_json(f"{checkpoint}.meta.json",
                   {"flags": {"max_steps": 200}, "inputs": {"x": variants.sha256_file(data)}})
        if seed == 1:
            checkpoint.mkdir()
    Path(f"{variants.paths_of(work, 'direct', 1)[2]}.metrics.json").unlink()
    monkeypatch.setattr(variants, "run_child", lambda command, told: ran.append(told.name))
    variants.run_all(*args)
    assert ran == ["evaluate_direct-1.log", "text-2.log", "direct-2.log"]
    write_rows(work / "sft.jsonl", [{"id": "other"}])
    with pytest.raises(DataError, match="text-1 was trained for 200 steps, or on other rows"):
        variants.run_all(*args)
    (work / "sft.jsonl").unlink()
    with pytest.raises(DataError, match="run bash toy/run.sh"):
        variants.run_all(*args)


def test_a_failing_stage_stops_with_what_it_said_last(tmp_path):
    def run(status):
        code = f"import sys; print('the reason', file=sys.stderr); sys.exit({status})"
        variants.run_child([sys.executable, "-c", code], tmp_path / "text-1.log")
    run(0), run(3)
    with pytest.raises(DataError, match=r"text-1 failed with exit code 2(.|\n)*the reason"):
        run(2)
