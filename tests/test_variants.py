"""The toy's variants: the commands, and how seeds and items are combined.    pytest tests/test_variants.py"""
import json
import sys
from pathlib import Path

import pytest

import evaluate
import train_sft
from toy import variants
from utils.jsonl import DataError, sha256_file, write_json, write_rows

ROOT = Path(__file__).parents[1]
# Two pictures of two items each; 1 is right. By item, text minus direct is 1/2, 1, 1/2, 0.
RIGHT = {("text", 1): (1, 1, 1, 0), ("text", 2): (1, 1, 0, 0), ("direct", 1): (1, 0, 0, 0),
         ("direct", 2): (0, 0, 0, 0)}


def write_run(work, variant, seed, right):
    _, checkpoint, evaluation = variants.paths_of(work, variant, seed)
    write_json(f"{checkpoint}.metrics.json", {"rows": 10, "best_step": 150, "best_held_out_loss": 0.5,
                                              "seconds": 60.0})
    write_rows(evaluation, [{"id": f"{n}", "group_id": "ab"[n // 2],
                             "verdict": ("unresolved", "correct")[value]} for n, value in enumerate(right)])
    write_json(f"{evaluation}.metrics.json", {"n": len(right), "correct": sum(right), "chance": 0.25,
                                              "unresolved": len(right) - sum(right)})


@pytest.fixture
def work(tmp_path):
    for (variant, seed), right in RIGHT.items():
        write_run(tmp_path, variant, seed, right)
    return tmp_path


def test_means_intervals_and_differences_are_those_computed_by_hand(work):
    """Drawing 2 of 2 pictures gives the lower twice, both, or the upper twice, with 1/4, 1/2, 1/4."""
    result = variants.gather(work, ["text", "direct"], [1, 2])
    text, direct = result["variants"]["text"], result["variants"]["direct"]
    less = result["text_minus"]["direct"]
    assert (text["by_seed"], text["mean"], text["seed_range"]) == ([0.75, 0.5], 0.625, [0.5, 0.75])
    assert (direct["by_seed"], direct["mean"], direct["seed_range"]) == ([0.25, 0.0], 0.125, [0.0, 0.25])
    assert text["ci95_clustered"] == (0.25, 1.0) and direct["ci95_clustered"] == (0.0, 0.25)
    assert (less["mean"], less["ci95_clustered"], less["by_seed"]) == (0.5, (0.25, 0.75), [0.5, 0.5])
    run = text["runs"]["1"]
    assert (run["correct"], run["n"], run["unresolved"], run["best_step"]) == (3, 4, 1, 150)
    # (3 + z²/2 -+ z sqrt(3/4 + z²/4)) / (4 + z²)
    assert run["ci95"] == pytest.approx((0.30064, 0.95441), abs=1e-5)
    assert (result["level"], result["items"], result["groups"], result["chance"]) == (0.95, 4, 2, 0.25)
    assert result["base"] is None and list(result["text_minus"]) == ["direct"]
    # items are paired by id, not by place
    path = variants.paths_of(work, "direct", 1)[2]
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert variants.gather(work, ["text", "direct"], [1, 2]) == result
    write_run(work, "direct", 2, (0, 0, 0))
    with pytest.raises(DataError, match="scores other items"):
        variants.gather(work, ["text", "direct"], [1, 2])


def test_the_table_shows_the_object(work):
    write_json(work / "evaluate_base.jsonl.metrics.json", {"n": 4, "accuracy": 0.25, "ci95": [0.0, 0.5]})
    result = variants.gather(work, ["text", "direct"], [1, 2])
    assert variants.markdown(json.loads(json.dumps(result))).splitlines() == [
        "| 4 items, chance 25.0 % | accuracy of seeds 1, 2, % | mean, % | 95 % interval over pictures | "
        "text minus it, points |", "|---|---|---|---|---|",
        "| base | 25.0 | | 0.0 to 50.0 | |", "| text | 75.0, 50.0 | 62.5 | 25.0 to 100.0 | |",
        "| direct | 25.0, 0.0 | 12.5 | 0.0 to 25.0 | +50.0 (+25.0 to +75.0) |"]


def test_variants_differ_in_target_or_rows_alone_and_have_the_flags_of_run_sh():
    script, trained = (ROOT / "toy" / "run.sh").read_text(), {}
    before, _, after = " ".join(variants.TRAIN).partition(" --max_steps")
    assert all(part in script for part in (before, f"--max_steps{after}", " ".join(variants.ASK)))
    for name in variants.VARIANTS:
        train, ask = variants.commands(Path("w"), name, 7)
        trained[name], asked = vars(train_sft.parse_args(train[2:])), evaluate.parse_args(ask[2:])
        latent = "mirage" if name == "latent" else "off"
        assert (asked.latent, asked.model) == (latent, trained[name].pop("output"))
    differ = {name: {key: value for key, value in args.items() if value != trained["text"][key]}
              for name, args in trained.items()}
    assert differ.pop("text") == {} and differ.pop("unfiltered") == {"data": ["w/rewritten.jsonl"]}
    assert differ == {name: {"imagination": name} for name in ("latent", "placeholder", "direct")}
    assert (trained["text"]["seed"], trained["text"]["max_steps"]) == (7, 200)


def test_existing_outputs_are_skipped_and_other_rows_are_refused(work, monkeypatch):
    ran = []
    for name in ("sft.jsonl", "rewritten.jsonl"):
        write_rows(work / name, [])
    for variant, seed in RIGHT:
        rows, checkpoint, _ = variants.paths_of(work, variant, seed)
        write_json(f"{checkpoint}.meta.json", {"inputs": {"x": sha256_file(rows)}})
        if seed == 1:
            checkpoint.mkdir()
    Path(f"{variants.paths_of(work, 'direct', 1)[2]}.metrics.json").unlink()
    monkeypatch.setattr(variants, "run_command", lambda command, log_file: ran.append(log_file.name))
    variants.run_all(work, ["text", "direct"], [1, 2])
    assert ran == ["evaluate_direct-1.log", "text-2.log", "direct-2.log"]
    write_rows(work / "sft.jsonl", [{"id": "other"}])
    with pytest.raises(DataError, match="text-1 was trained on other rows"):
        variants.run_all(work, ["text", "direct"], [1, 2])


def test_a_failing_stage_stops_with_the_end_of_its_log(tmp_path):
    def run(status):
        code = f"import sys; print('the reason', file=sys.stderr); sys.exit({status})"
        variants.run_command([sys.executable, "-c", code], tmp_path / "text-1.log")
    run(0), run(3)
    with pytest.raises(DataError, match=r"text-1 failed with exit code 2(.|\n)*the reason"):
        run(2)
