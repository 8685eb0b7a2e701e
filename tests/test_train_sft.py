"""Fine-tuning: whole runs, several processes, stopping and resuming, flags, what is refused.

    python -m pytest tests/test_train_sft.py

Targets, packs, latents, steps, sharding and checkpoints have tests of their own in tests/train.
"""
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import flags, load_examples, log_of, losses, run_ranks
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

import train_sft
from utils import qwen as Q
from utils.jsonl import DataError, load_object, read_rows, sha256_file, write_rows
from utils.train.loop import Trainer, learning_rate_at, warmup_length
from utils.train.weights import save

TARGETS = ("text", "latent", "placeholder", "direct")


@pytest.fixture
def train(tiny_checkpoint, data, tmp_path):
    """Return run(name, flags...) -> the log of a training run written to tmp_path / name."""
    def run(name, *more):
        assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / name, *more)) == 0
        return log_of(tmp_path / name)
    return run


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's files under the names they are saved by."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    return tensors


def train_rank(rank, arguments):
    assert train_sft.main(arguments) == 0


@pytest.mark.parametrize("warmup, floor", [(0, 0.0), (2, 0.0), (3, 0.1)])
def test_learning_rate(warmup, floor):
    """Oracle: the library's schedules, whose warm-up begins at 0 where ours ends at the peak."""
    def library(make, **more):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
        return make(optimizer, warmup, 10, **more).lr_lambdas[0]

    oracles = {"cosine": library(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=floor),
               "constant": lambda step: 1.0}
    straight = library(get_linear_schedule_with_warmup)
    oracles["linear"] = lambda step: floor + (1 - floor) * straight(step)
    for schedule, oracle in oracles.items():
        rates = [learning_rate_at(step, 10, 0.5, warmup, schedule, floor) for step in range(10)]
        assert rates[:warmup] == pytest.approx([0.5 * (step + 1) / warmup for step in range(warmup)])
        assert rates[warmup:] == pytest.approx([0.5 * oracle(step) for step in range(warmup, 10)])
    assert [warmup_length(given, 40) for given in (0, 0.03, 0.1, 0.99, 1, 10)] == [0, 2, 4, 40, 1, 10]


# ---- whole runs
@pytest.mark.parametrize("imagination", TARGETS)
def test_each_variant_trains_and_reloads(train, tiny_checkpoint, tmp_path, capsys, imagination):
    output = tmp_path / "out"
    more = ["--imagination", imagination, "--validation_rows", "2", "--eval_every", "2", "--epochs", "8"]
    log = train("out", *more)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == load_object(f"{output}.metrics.json")
    assert len(log) == printed["steps"] == 8 * 2 and log[-1]["loss"] < log[0]["loss"]
    line = log[-1]
    assert line["trained_tokens"] < line["tokens"] and line["images"] > 0 and line["flops"] > 1e6
    assert line["mfu"] is None and 0 <= line["data_wait"] < 1
    assert line["balance"] == 1.0  # one process does not wait for another
    scores = {record["step"]: record["held_out_loss"] for record in log if "held_out_loss" in record}
    best = min(scores, key=scores.get)
    assert list(scores) == [*range(2, 17, 2)] and not list((tmp_path / "out.run").glob("best-*"))
    assert (printed["best_step"], printed["best_held_out_loss"]) == (best, scores[best])
    again, before = Q.load(str(output), device="cpu"), Q.load(str(tiny_checkpoint), device="cpu")
    for (name, a), (_, b) in zip(again.model.model.visual.named_parameters(),
                                 before.model.model.visual.named_parameters()):
        assert torch.equal(a, b), f"{name} of the frozen tower changed"
    assert not torch.equal(again.model.lm_head.weight, before.model.lm_head.weight)
    assert again.model.lm_head.out_features == before.model.lm_head.out_features
    with pytest.raises(DataError, match="never replaced"):
        train("out")


def test_the_result_has_the_names_and_the_type_of_its_base(tiny_checkpoint, data, tmp_path):
    save(Q.load(str(tiny_checkpoint), dtype="bfloat16", device="cpu"), str(tmp_path / "base"))
    assert train_sft.main(flags(data, tmp_path / "base", tmp_path / "out", "--max_steps", "2")) == 0
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    config = load_object(tmp_path / "out" / "config.json")
    assert config["torch_dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).is_file()


ADAPTED = {f"model.layers.{part}_proj.weight" for part in (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
ROWS, MERGER = {"model.embed_tokens.weight", "lm_head.weight"}, "visual.merger."


@pytest.mark.parametrize("more, changed", [
    (["--lora_rank", "4"], ADAPTED), (["--lora_rank", "4", "--imagination", "latent"], ADAPTED | ROWS),
    (["--lora_rank", "4", "--train_vision", "merger"], ADAPTED | {MERGER}),
    (["--train_vision", "merger_only"], {MERGER}),
    (["--train_vision", "merger_only", "--imagination", "latent"], ROWS | {MERGER})])
def test_only_what_is_to_be_trained_changes(train, tiny_checkpoint, data, tmp_path, more, changed):
    """Adapters are merged; of embedding and head only the rows of added tokens change. Some rows have no
    picture: a step of the merger alone may have nothing to learn on a rank."""
    more = [*more, "--max_steps", "4", "--save_every", "2"]
    train("one", *more)
    run_ranks(train_rank, tmp_path, flags(data, tiny_checkpoint, tmp_path / "two", *more))
    # each rank draws its own dropout
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=0.02)
    n_known = len(Q.load_tools(str(tiny_checkpoint)).tokenizer)
    for name in ("one", "two"):
        before, after = tensors_of(tiny_checkpoint), tensors_of(tmp_path / name)
        assert before.keys() == after.keys()
        found = {name for name in before if not torch.equal(before[name], after[name])}
        assert {MERGER if MERGER in name else re.sub(r"\.\d+\.", ".", name) for name in found} == changed
        for name in ROWS & found:
            rows = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
            assert rows == [n_known, n_known + 1, n_known + 2]
            if "--lora_rank" in more:  # trained: not what they began as
                assert not torch.allclose(after[name][rows], before[name][:n_known].mean(0), atol=1e-4)


def test_mirage_s_second_stage_uses_no_helper_picture(train, tmp_path, picture):
    """The same steps with other helper pictures: at --align_weight 0 the weights are the same to the bit."""
    more = ["--imagination", "latent", "--max_steps", "3", "--warmup_steps", "0"]
    train("first", *more)
    second = ["--model", str(tmp_path / "first"), *more]
    for color in ("green", "red"):
        for n in range(12):
            picture(f"{n}_1.png", (56, 84), color)
        for weight in ("0", "10"):
            train(f"{color}-{weight}", *second, "--align_weight", weight)
    tensors = {path.name: tensors_of(path) for path in tmp_path.iterdir() if path.name[-2:] in ("-0", "10")}
    for weight, is_same in (("0", True), ("10", False)):
        pair = tensors[f"green-{weight}"], tensors[f"red-{weight}"]
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0]) == is_same
    # the first stage's tokens go on from where they were
    rows = [tensors_of(tmp_path / name)["lm_head.weight"] for name in ("first", "green-0")]
    assert rows[0].shape == rows[1].shape and 0 < (rows[0] - rows[1]).abs().max() < 0.01
    assert log_of(tmp_path / "green-0")[0]["align"] is not None


def test_files_are_mixed_by_weight_also_after_a_stop_and_by_two_processes(
        train, tiny_checkpoint, data, tmp_path, monkeypatch, capsys):
    rows = read_rows(data, {})
    write_rows(tmp_path / "a.jsonl", rows[:8])
    write_rows(tmp_path / "b.jsonl", rows[8:])
    mixed = ["--data", str(tmp_path / "a.jsonl:0.5"), f"{tmp_path / 'b.jsonl'}:1.5"]
    more = [*mixed, "--global_batch", "5", "--epochs", "3", "--save_every", "1"]
    train("whole", *more)
    assert load_object(tmp_path / "whole.metrics.json")["rows_per_epoch"] == 4 + 6
    assert load_object(tmp_path / "whole.metrics.json")["steps"] == 3 * 2
    interrupt(monkeypatch, flags(data, tiny_checkpoint, tmp_path / "cut", *more))
    other = [word.replace(":1.5", ":2") for word in more]
    assert run_here("train_sft", flags(data, tiny_checkpoint, tmp_path / "cut", *other)) == 2
    assert "data_weights" in capsys.readouterr().err
    train("cut", *more)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    run_ranks(train_rank, tmp_path, flags(data, tiny_checkpoint, tmp_path / "two", *more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert load_object(tmp_path / "two.metrics.json")["processes"] == 2
    names = load_object(tmp_path / "whole.meta.json")["inputs"]
    assert set(names) == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}


def test_flags_have_their_effects(train, tmp_path, picture, capsys):
    picture("1_0.png", (280, 280))  # 100 visual tokens

    def run(*more):
        return train(f"run-{len(list(tmp_path.glob('run-*.run')))}", "--max_steps", "2", *more)

    def n_tokens(log):
        return sum(record["tokens"] for record in log)

    text, latent = run(), run("--imagination", "latent")
    assert run("--seed", "7")[0]["loss"] != text[0]["loss"]
    assert n_tokens(run("--limit", "3")) < n_tokens(run("--system", "Hi")) < n_tokens(text)
    small, smaller = run("--image_tokens", "60"), run("--image_tokens", "60", "--tokens_per_image", "20")
    assert n_tokens(text) - n_tokens(small) == 100 - 49 and n_tokens(small) - n_tokens(smaller) == 49 - 16
    assert n_tokens(run("--imagination", "latent", "--latent_size", "2")) < n_tokens(latent)  # not Mirage's 4
    mse, weightless = (run("--imagination", "latent", *more)[0]
                       for more in (("--align_loss", "mse"), ("--align_weight", "0")))
    assert mse["align"] != latent[0]["align"] == weightless["align"]
    assert weightless["loss"] == latent[0]["loss"] and weightless["grad_norm"] < latent[0]["grad_norm"]
    tight, off, loose = (run("--clip", norm)[1] for norm in ("0.01", "0", "1e6"))
    assert tight["loss"] != off["loss"] == loose["loss"]  # 0 does not clip
    for more in (("--weight_decay", "100"), ("--clip", "1e-9"), ("--warmup_steps", "0")):
        changed = run(*more)  # by the first update
        assert changed[0]["loss"] == text[0]["loss"] and changed[1]["loss"] != text[1]["loss"]
    for more in (("--max_tokens", "10000"), ("--max_tokens", "260", "--recompute", "layers"),
                 ("--recompute", "mlps")):  # the same rows, however they are packed
        curves = ([line["loss"] for line in log] for log in (run(*more), text))
        assert next(curves) == pytest.approx(next(curves), rel=1e-4)
    assert [line["lr"] for line in run("--warmup_steps", "0", "--schedule", "constant")] == [1e-3, 1e-3]
    cosine = run("--warmup_steps", "0.5", "--schedule", "cosine", "--min_rate", "0.1", "--max_steps", "4")
    assert [line["lr"] for line in cosine] == pytest.approx([5e-4, 1e-3, 1e-3, 5.5e-4])
    begun = run("--imagination", "latent", "--token_init", "a red circle")
    assert begun[0]["loss"] != latent[0]["loss"]
    vision = run("--train_vision", "merger")
    slow = run("--train_vision", "merger", "--merger_learning_rate", "1e-9")
    assert vision[0]["loss"] == slow[0]["loss"] == text[0]["loss"]
    assert vision[1]["loss"] != slow[1]["loss"] and abs(slow[1]["loss"] - text[1]["loss"]) < 1e-4
    capsys.readouterr()
    run("--warmup_steps", "8")
    assert "warmup_steps 8 are more than the 2 steps of the run, which ends at 25%" in capsys.readouterr().err
    run("--warmup_steps", "2")
    assert "warning" not in capsys.readouterr().err


# ---- interruptions
def interrupt(monkeypatch, arguments, step=3):
    """Run until SIGTERM after a step; the run folder keeps a checkpoint of the next one."""
    write = Trainer.write_record

    def stop(trainer, record):
        write(trainer, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "write_record", stop)
        assert run_here("train_sft", arguments) == 130


@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_stopped_and_resumed_gives_the_same_curve_to_the_bit(train, tiny_checkpoint, data, tmp_path,
                                                             monkeypatch, capsys, imagination):
    more = ["--imagination", imagination, "--epochs", "6", "--save_every", "3",
            "--validation_rows", "2", "--eval_every", "4"]
    train("whole", *more)
    interrupt(monkeypatch, flags(data, tiny_checkpoint, tmp_path / "cut", *more), step=4)
    err = capsys.readouterr().err
    assert not (tmp_path / "cut").exists() and "Traceback" not in err and "run the same command again" in err
    # the checkpoint is that of the last step: nothing is computed twice
    assert len(losses(tmp_path / "cut")) == 5 and (tmp_path / "cut.run" / "step-5").is_dir()
    train("cut", *more)
    assert "resumed from" in capsys.readouterr().err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    cut, whole = tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "whole")
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in cut)


def edit_rows(change):
    return lambda folder: write_rows(folder / "rows.jsonl", change(read_rows(folder / "rows.jsonl", {})))


def flip_byte(name, keep_times=False):
    """Change the last bit of a file; its size stays, and on request its time of change."""
    def change(folder):
        path = folder / name
        before = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        if keep_times:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return change


@pytest.mark.parametrize("name, change", [
    ("--data 1", edit_rows(lambda rows: [rows[0] | {"chain": "I gaze. \\boxed{0}"}, *rows[1:]])),
    ("--data 1", edit_rows(lambda rows: rows[:-2])),
    ("--data 1", edit_rows(lambda rows: [*rows, rows[0] | {"id": "t/new"}])),
    ("--data 1", edit_rows(lambda rows: rows[::-1])),
    ("--model model.safetensors", flip_byte("base/model.safetensors")),
    ("--model model.safetensors", flip_byte("base/model.safetensors", keep_times=True)),
    ("--model generation_config.json", lambda folder: (folder / "base/generation_config.json").unlink()),
    ("--image_root 1_0.png", lambda folder: shutil.copyfile(folder / "2_0.png", folder / "1_0.png"))])
def test_a_run_does_not_resume_on_changed_inputs(tiny_checkpoint, data, tmp_path, monkeypatch, capsys, name,
                                                 change):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    arguments = flags(data, tmp_path / "base", tmp_path / "o", "--max_steps", "6", "--validation_rows", "2")
    interrupt(monkeypatch, arguments)
    before = load_object(tmp_path / "o.run" / "settings.json")
    for path in (tmp_path / "base").iterdir():  # a copy is the same
        shutil.copy2(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    change(tmp_path)
    capsys.readouterr()
    assert run_here("train_sft", arguments) == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "begun with other settings" in error and not (tmp_path / "o").exists()
    path = tmp_path / {"--data": "rows.jsonl", "--model": f"base/{name[8:]}"}.get(name.split()[0], name[13:])
    now = sha256_file(path) if path.exists() else "None"
    row = next(line for line in error.splitlines() if line.startswith(f"  {name} "))
    assert before[name].split()[1][:8] in row and now[:8] in row
    assert ("  --model" in error) == ("--model" in name)


def test_a_run_resumes_on_moved_and_copied_inputs(train, tiny_checkpoint, data, tmp_path, monkeypatch):
    more = ["--max_steps", "6", "--validation_rows", "2"]
    train("whole", *more)
    interrupt(monkeypatch, flags(data, tiny_checkpoint, tmp_path / "o", *more))
    hashes = load_object(tmp_path / "whole.meta.json")["inputs"]
    assert hashes == {str(data): sha256_file(data)}
    shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere" / "base")
    for path in data.parent.glob("*.png"):
        shutil.copy(path, tmp_path / "elsewhere")
    moved = data.rename(tmp_path / "elsewhere" / "moved.jsonl")
    assert train_sft.main(flags(moved, tmp_path / "elsewhere" / "base", tmp_path / "o", *more)) == 0
    assert losses(tmp_path / "o") == losses(tmp_path / "whole")
    assert load_object(tmp_path / "o.meta.json")["inputs"] == {str(moved): sha256_file(moved)}


@pytest.mark.parametrize("rate, spike, message", [
    ("1000", "2", "loss (nan|inf)|gradient norm (nan|inf)|had a median"), ("0.3", "0.01", "had a median of")])
def test_a_loss_that_is_not_finite_or_jumps_stops_with_the_rows(train, tmp_path, rate, spike, message):
    more = ["--learning_rate", rate, "--warmup_steps", "0", "--schedule", "constant", "--epochs", "10",
            "--save_every", "1", "--keep", "3", "--spike", spike]
    with pytest.raises(DataError, match=message) as caught:
        train("o", *more)
    step = int(re.match(r"step (\d+): ", str(caught.value))[1])
    assert "nothing was updated. Rows of the highest loss: t/" in str(caught.value)
    assert len(losses(tmp_path / "o")) == step - 1 and (tmp_path / "o.run" / f"step-{step - 1}").is_dir()
    assert len(list((tmp_path / "o.run").glob("step-*"))) == min(3, step - 1)
    if rate == "0.3":  # the user may resume anyway
        assert len(train("o", *more, "--spike", "0")) == 20


# ---- refused
@pytest.mark.parametrize("more, message", [
    (("--lora_rank", "4", "--train_vision", "merger_only"), "exclude each other"),
    (("--merger_learning_rate", "1e-4"), "needs --train_vision"),
    (("--min_rate", "0.1", "--schedule", "constant"), "needs a --schedule that decays"),
    (("--token_init", "a"), "expected --imagination latent and texts"),
    (("--imagination", "latent", "--token_init", "a", "b"), "2 texts, expected 1 or those of"),
    (("--warmup_steps", "1.5"), "a whole number of steps, or a share below 1"),
    (("--data", "none.jsonl:0"), "no such file, and its weight"),
    (("--data", "none.jsonl:x"), "no such file, and its weight")])
def test_flags_that_exclude_each_other(capsys, more, message):
    with pytest.raises(SystemExit):
        train_sft.parse_args(["--data", "d", "--output", "o", *more])
    assert message in capsys.readouterr().err


def test_damaged_rows_are_named_with_their_place(train, data, tmp_path):
    rows = read_rows(data, {})
    write_rows(tmp_path / "more.jsonl", [rows[0] | {"id": "new"}, rows[5]])
    with pytest.raises(DataError, match=r"more\.jsonl:2: duplicate id 't/5', first seen at .*rows\.jsonl"):
        train("o", "--data", str(data), str(tmp_path / "more.jsonl"))
    without = {name: value for name, value in rows[1].items() if name != "chain"}
    for row, match in ((rows[1] | {"answer": 7}, r"rows.jsonl:2.*'answer'.*str"),
                       (without, "1 of 2 rows .*t/1: no chain; rewr")):
        write_rows(data, [rows[0], row])
        with pytest.raises(DataError, match=match):
            train("o")


@pytest.mark.parametrize("family", ["lvr", "mirage", "monet_vllm"])
def test_no_latents_are_trained_on_a_base_with_a_latent_head(tiny_checkpoint, data, tmp_path, capsys, family):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    head = {f"lvr_head.{layer}.{part}": torch.zeros(32, 32) if part == "weight" and "mlp" in layer else
            torch.zeros(32) for layer in ("ln_q", "mlp.0", "mlp.2") for part in ("weight", "bias")}
    save_file(load_file(base / "model.safetensors") | head, base / "model.safetensors", {"format": "pt"})
    more = ["--imagination", "latent", "--latent", family, "--latent_size", "2"]
    assert run_here("train_sft", flags(data, base, tmp_path / "o", *more)) == 2
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "latents of this base pass through a head (lvr_head.*)" in error and error.count("\n") == 1
    assert not (tmp_path / "o.run").exists()
    assert run_here("train_sft", flags(data, base, tmp_path / "o", "--imagination", "placeholder",
                                       "--dry_run")) == 0
    assert run_here("train_sft", flags(data, tiny_checkpoint, tmp_path / "o", *more, "--dry_run")) == 0
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    assert run_here("train_sft", flags(data, base, tmp_path / "o", *more)) == 2
    assert "no whole checkpoint here or on the hub: " in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_ends_the_run_in_one_line(workers, tiny_checkpoint, data, tmp_path):
    """Its header is whole, so that it is found only when its step is prepared."""
    path = data.parent / "1_0.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError) as fault:
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", "--num_workers", str(workers)))
    assert re.fullmatch(r"step [12]: .*1_0\.png: not a whole picture .*; restore the picture and run the "
                        r"same command again, or leave its rows out in a new run \(--skip_bad\)",
                        str(fault.value))


# ---- rows left out
@pytest.fixture
def spoiled(data, picture):
    """Return (file of good rows and a bad one of every kind among them, reasons of the bad ones by id)."""
    folder, rows = data.parent, read_rows(data, {})
    picture("thin.png", (1, 201)), picture("half.png"), picture("grey.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:-30])  # its header is whole
    Image.effect_noise((56, 84), 90).convert("F").save(folder / "grey.tif")
    changes = {"image_aspect": {"images": ["thin.png"]}, "image_unreadable": {"images": ["half.png"]},
               "image_depth": {"images": ["grey.tif"]}, "image_missing": {"images": ["gone.png"]},
               "question": {"question": "<image> and <image>?"}, "empty": {"chain": " \n"},
               "control": {"chain": "I look\x1b[1m. \\boxed{1}"}, "length": {"chain": "far " * 400}}
    bad = [rows[1] | change | {"id": f"bad/{reason}"} for reason, change in changes.items()]
    write_rows(folder / "spoiled.jsonl", [*bad[:3], *rows[:5], *bad[3:6], *rows[5:], *bad[6:]])
    return folder / "spoiled.jsonl", {f"bad/{reason}": reason for reason in changes}


def test_rows_left_out_are_as_if_they_had_not_been_there(train, tiny_checkpoint, spoiled, tmp_path, capsys):
    path, reasons = spoiled
    more = ["--validation_rows", "2", "--max_steps", "3"]
    clean = train("clean", *more)
    bad = tmp_path / "bad.jsonl"
    assert train("left", *more, "--data", str(path), "--skip_bad", str(bad))[-1]["loss"] == clean[-1]["loss"]
    assert losses(tmp_path / "left") == losses(tmp_path / "clean")
    found = read_rows(bad, {"id": str, "subset": str, "reason": str, "detail": str})
    assert [(row["id"], row["reason"]) for row in found] == [*reasons.items()]
    details = {row["reason"]: row["detail"] for row in found}
    assert "half.png: not a whole picture" in details["image_unreadable"]
    assert "thin.png: 1x201 pixels" in details["image_aspect"] and "--max_tokens 300" in details["length"]
    metrics, plain = (load_object(tmp_path / f"{name}.metrics.json") for name in ("left", "clean"))
    assert metrics["left_out"] == 8 and metrics["reasons"] == dict.fromkeys(reasons.values(), 1)
    assert (plain["left_out"], plain["reasons"]) == (0, {})
    changed = {"left_out", "reasons", "seconds"}
    assert {k: v for k, v in metrics.items() if k not in changed} == {
        k: v for k, v in plain.items() if k not in changed}
    meta = load_object(tmp_path / "left.meta.json")
    assert (meta["left_out"], meta["reasons"]) == (8, metrics["reasons"])
    capsys.readouterr()
    arguments = flags(path, tiny_checkpoint, tmp_path / "o", *more)
    assert run_here("train_sft", arguments) == 2  # without the flag
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.startswith("7 of 20 rows cannot be trained on") and not (tmp_path / "o.run").exists()
    assert all(f"{name}: " in error for name in reasons if name != "bad/image_unreadable")
    before = bad.read_bytes()
    assert run_here("train_sft", [*arguments, "--skip_bad", str(bad), "--dry_run"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["left_out"], printed["unreadable_images"], bad.read_bytes()) == (8, 0, before)


def test_two_processes_leave_out_the_same_rows(train, tiny_checkpoint, spoiled, tmp_path):
    path, reasons = spoiled
    picture = Image.open(tmp_path / "2_0.png")
    for n in range(5):  # broken pictures on either rank
        picture.save(tmp_path / f"cut{n}.png")
        (tmp_path / f"cut{n}.png").write_bytes((tmp_path / f"cut{n}.png").read_bytes()[:-20 - n])
    rows = read_rows(path, {})
    write_rows(path, rows + [rows[-1] | {"id": f"cut/{n}", "chain": "\\boxed{1}", "images": [f"cut{n}.png"]}
                             for n in range(5)])
    more = ["--max_steps", "2", "--data", str(path), "--skip_bad"]
    train("one", *more, str(tmp_path / "one.bad"))
    run_ranks(train_rank, tmp_path, flags(path, tiny_checkpoint, tmp_path / "two", *more,
                                          str(tmp_path / "two.bad")))
    assert (tmp_path / "one.bad").read_bytes() == (tmp_path / "two.bad").read_bytes()
    one, two = (load_object(tmp_path / f"{name}.metrics.json") for name in ("one", "two"))
    assert one["left_out"] == two["left_out"] == 13 and one["reasons"] == two["reasons"]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


@pytest.mark.parametrize("change", [None, "mended", "broken", "longer"])
def test_the_rows_left_out_belong_to_a_run(train, tiny_checkpoint, spoiled, tmp_path, monkeypatch, capsys,
                                           change):
    path, _ = spoiled
    more = ["--max_steps", "5", "--data", str(path), "--skip_bad", str(tmp_path / "bad.jsonl")]
    interrupt(monkeypatch, flags(path, tiny_checkpoint, tmp_path / "o", *more))
    if change == "mended":
        shutil.copyfile(tmp_path / "1_1.png", tmp_path / "half.png")
    elif change == "broken":
        (tmp_path / "3_0.png").write_bytes((tmp_path / "3_0.png").read_bytes()[:-30])
    elif change == "longer":
        more += ["--max_tokens", "3000"]
    elif change is None:
        train("whole", *more)
        more[-1] = str(tmp_path / "elsewhere.jsonl")  # the file's name does not count
    capsys.readouterr()
    code = run_here("train_sft", flags(path, tiny_checkpoint, tmp_path / "o", *more))
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert code == (2 if change else 0), error
    if change:
        assert "begun with other settings" in error and "\n  rows left out " in error
    else:
        assert losses(tmp_path / "o") == losses(tmp_path / "whole")


def test_what_skip_bad_refuses(tiny_checkpoint, data, tmp_path, capsys):
    arguments = flags(data, tiny_checkpoint, tmp_path / "o")
    assert run_here("train_sft", [*arguments, "--skip_bad", str(data)]) == 2
    assert "--skip_bad" in capsys.readouterr().err and len(read_rows(data, {})) == 12
    write_rows(data, [row | {"chain": ""} for row in read_rows(data, {})])
    assert run_here("train_sft", [*arguments, "--skip_bad", str(tmp_path / "bad.jsonl")]) == 2
    assert "0 usable rows" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "bad.jsonl", {})) == 12
    for name in ("o", "o/bad.jsonl", "o/../o/deep/bad.jsonl"):  # the checkpoint is moved there at the end
        assert run_here("train_sft", [*arguments, "--skip_bad", str(tmp_path / name), "--dry_run"]) == 2
        assert "in --output" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_dry_run_shows_rows_plan_and_memory_and_checks_images(tiny_checkpoint, data, tmp_path, capsys):
    arguments = flags(data, tiny_checkpoint, tmp_path / "o", "--dry_run")
    assert train_sft.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count(">>I look") == 3 and "<|im_end|><<" in captured.err
    assert "memory per device, estimated: fits" in captured.err
    printed = json.loads(captured.out)
    assert printed["steps"] == 4 and printed["unreadable_images"] == 0 and not list(tmp_path.glob("o*"))
    lengths = sorted(example.n_tokens for example in load_examples(tiny_checkpoint, data)[1])
    assert printed["median"] == lengths[5] and printed["max"] == printed["p95"] == lengths[-1]
    assert printed["tokens"] == sum(lengths) and printed["images"] == 9
    path = data.parent / "1_0.png"
    path.write_bytes(path.read_bytes()[:-40])  # its header is complete
    assert train_sft.main(arguments) == 2
    assert "1_0.png: not a whole picture" in capsys.readouterr().err
