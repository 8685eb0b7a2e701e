"""Fine-tuning: the loss, whole runs, several processes, stopping and resuming, flags, what is refused.

    python -m pytest tests/test_train_sft.py

Targets, packs, latents, steps, sharding and checkpoints have tests of their own in tests/train.
"""
import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training import flags, gradient, launch, load_examples, log_of, losses

import train_sft
import utils.train.model
from utils import qwen as Q
from utils.jsonl import DataError, read_rows, write_rows
from utils.latent_families import special_id
from utils.train.examples import make_pack
from utils.train.loop import learning_rate_at
from utils.train.model import Objective, use_packed_attention

numeric = pytest.mark.numeric
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


def check_equal(one, other):
    """Two runs have the same curve and the same weights to the bit."""
    assert losses(one) == losses(other)
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_learning_rate():
    rates = [learning_rate_at(step, 10, 1.0, 2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


# ---- the loss
@numeric
def test_the_loss_is_the_library_s_own(tiny_checkpoint, data):
    """Oracle: transformers' loss with labels and its own positions, a mean over the trained tokens."""
    qwen, examples, target = load_examples(tiny_checkpoint, data)
    objective = Objective(qwen, None)
    for example in examples[1:4]:
        pack = make_pack(qwen, [example], target)
        with use_packed_attention(qwen.model):
            loss, right, _ = objective(pack)
        labels = torch.full_like(pack["input_ids"], -100)
        labels[0, -example.n_trained:] = pack["input_ids"][0, -example.n_trained:]
        names = ("input_ids", "pixel_values", "image_grid_thw")
        kinds = (pack["input_ids"] == special_id(qwen.tokenizer, Q.IMAGE_TOKEN)).int()
        library = qwen.model(**{name: pack[name] for name in names if name in pack}, mm_token_type_ids=kinds,
                             labels=labels)
        assert loss.mean().item() == pytest.approx(library.loss.item(), rel=1e-5)
        likeliest = library.logits.argmax(-1)[0, pack["logit_positions"]]
        assert right.tolist() == (likeliest == pack["labels"]).tolist()


@numeric
def test_logits_in_chunks_change_neither_loss_nor_gradient(tiny_checkpoint, data, monkeypatch):
    qwen, examples, target = load_examples(tiny_checkpoint, data)
    objective = Objective(qwen, None).train()
    pack, results, widths = make_pack(qwen, examples, target), [], []
    qwen.model.lm_head.register_forward_hook(lambda module, inputs, out: widths.append(len(out)))
    for chunk in (10_000, 100, 7):
        monkeypatch.setattr(utils.train.model, "CHUNK", chunk)
        qwen.model.zero_grad(), widths.clear()
        with use_packed_attention(qwen.model):
            loss, right, _ = objective(pack)
            loss.sum().backward()
        results.append((loss.detach(), right, gradient(qwen.model)))
        assert max(widths) <= chunk
    (expected_loss, expected_right, expected), *others = results
    for loss, right, its_gradient in others:
        assert torch.allclose(loss, expected_loss, rtol=1e-6) and torch.equal(right, expected_right)
        assert (its_gradient - expected).norm() < 1e-5 * expected.norm()


# ---- whole runs
@pytest.mark.parametrize("imagination", TARGETS)
def test_each_variant_trains_and_reloads(train, tiny_checkpoint, tmp_path, capsys, imagination):
    output = tmp_path / "out"
    more = ["--imagination", imagination, "--validation_rows", "2", "--eval_every", "2", "--epochs", "8"]
    log = train("out", *more)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(Path(f"{output}.metrics.json").read_text())
    assert len(log) == printed["steps"] == 8 * 2 and log[-1]["loss"] < log[0]["loss"]
    line = log[-1]
    assert line["trained_tokens"] < line["tokens"] and line["images"] > 0 and line["flops"] > 1e6
    assert line["mfu"] is None and 0 <= line["data_wait"] < 1
    assert line["balance"] == 1.0  # one process does not wait for another
    again, before = Q.load(str(output), device="cpu"), Q.load(str(tiny_checkpoint), device="cpu")
    for (name, a), (_, b) in zip(again.model.model.visual.named_parameters(),
                                 before.model.model.visual.named_parameters()):
        assert torch.equal(a, b), f"{name} of the frozen tower changed"
    assert not torch.equal(again.model.lm_head.weight, before.model.lm_head.weight)
    assert again.model.lm_head.out_features == before.model.lm_head.out_features
    with pytest.raises(DataError, match="never replaced"):
        train("out")


def test_the_result_has_the_names_and_the_type_of_its_base(tiny_checkpoint, data, tmp_path):
    Q.save(Q.load(str(tiny_checkpoint), dtype="bfloat16", device="cpu"), str(tmp_path / "base"))
    assert train_sft.main(flags(data, tmp_path / "base", tmp_path / "out", "--max_steps", "2")) == 0
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert Q.load_tools(str(tmp_path / "out")).saved_dtype == torch.bfloat16
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).is_file()


def test_the_best_by_held_out_loss(train, tmp_path):
    log = train("o", "--validation_rows", "3", "--eval_every", "2", "--max_steps", "6")
    scores = {record["step"]: record["held_out_loss"] for record in log if "held_out_loss" in record}
    assert list(scores) == [2, 4, 6]
    best = min(scores, key=scores.get)
    metrics = json.loads((tmp_path / "o.metrics.json").read_text())
    assert (metrics["best_step"], metrics["best_held_out_loss"]) == (best, scores[best])
    assert not list((tmp_path / "o.run").glob("best-*"))


def test_adapters_are_merged_into_what_is_written(train, tiny_checkpoint, data, tmp_path):
    pytest.importorskip("peft")
    more = ["--lora_rank", "4", "--max_steps", "4", "--save_every", "2"]
    train("one", *more)
    assert launch(flags(data, tiny_checkpoint, tmp_path / "two", *more), 2).wait(timeout=240) == 0
    # each rank draws its own dropout
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=0.02)
    before, after = tensors_of(tiny_checkpoint), tensors_of(tmp_path / "one")
    assert before.keys() == after.keys()
    changed = {re.sub(r"\.\d+\.", ".", name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{part}_proj.weight" for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}


def test_flags_have_their_effects(train, tmp_path, picture):
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
    for more in (("--weight_decay", "100"), ("--clip", "1e-9"), ("--warmup_steps", "0")):
        changed = run(*more)  # by the first update
        assert changed[0]["loss"] == text[0]["loss"] and changed[1]["loss"] != text[1]["loss"]
    assert [line["lr"] for line in run("--warmup_steps", "0", "--schedule", "constant")] == [1e-3, 1e-3]


@numeric
@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_two_processes_give_the_losses_of_one(tiny_checkpoint, data, tmp_path, imagination):
    for processes in (1, 2):
        # five rows per step: the two ranks hold unequal shares, and one of them gets rows without a picture
        more = ["--imagination", imagination, "--train_vision", "--global_batch", "5"]
        process = launch(flags(data, tiny_checkpoint, tmp_path / f"p{processes}", *more), processes)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-2000:]
        assert json.loads(out.splitlines()[-1])["processes"] == processes
    assert losses(tmp_path / "p1") == pytest.approx(losses(tmp_path / "p2"), rel=1e-4)


@numeric
def test_a_step_is_the_same_rows_however_they_are_packed(train):
    """One pack per step, several, a row per pack, recomputed activations: the same losses."""
    curves = [[record["loss"] for record in train(str(n), *more)] for n, more in enumerate((
        ("--max_tokens", "10000"), ("--max_tokens", "300"), ("--max_tokens", "170"),
        ("--recompute", "layers"), ("--recompute", "mlps")))]
    assert all(curve == pytest.approx(curves[0], rel=1e-4) for curve in curves[1:])


# ---- interruptions
def test_stopped_and_resumed_gives_the_same_curve_to_the_bit(tiny_checkpoint, data, tmp_path):
    more = ["--epochs", "10", "--save_every", "3", "--validation_rows", "2", "--eval_every", "4"]
    assert launch(flags(data, tiny_checkpoint, tmp_path / "whole", *more)).wait(timeout=240) == 0
    arguments = flags(data, tiny_checkpoint, tmp_path / "cut", *more)
    process, log = launch(arguments), tmp_path / "cut.run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "cut").exists()
    assert process.returncode == 130 and "Traceback" not in err
    # the checkpoint is that of the last step: nothing is computed twice
    assert (tmp_path / "cut.run" / f"step-{len(losses(tmp_path / 'cut'))}").is_dir()
    resumed = launch(arguments)
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0 and "resumed from" in err
    check_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("rate, spike, message", [
    ("1e30", "2", "loss (nan|inf)|gradient norm (nan|inf)|had a median"), ("0.3", "0.01", "had a median of")])
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
    (("--imagination", "latent", "--recompute", "layers"), "needs the cache; use mlps"),
    (("--lora_rank", "4", "--train_vision"), "exclude each other")])
def test_flags_that_exclude_each_other(capsys, more, message):
    with pytest.raises(SystemExit):
        train_sft.parse_args(["--data", "d", "--output", "o", *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change, match", [
    (lambda row: row | {"images": ["gone.png"]}, "gone.png"),
    (lambda row: row | {"images": ["../rows.jsonl"]}, "leaves|outside"),
    (lambda row: {k: v for k, v in row.items() if k != "chain"}, r"rows.jsonl:2.*'chain'"),
    (lambda row: row | {"answer": 7}, r"rows.jsonl:2.*'answer'.*str")])
def test_bad_rows_are_named(train, data, change, match):
    rows = read_rows(data, {})
    rows[1] = change(rows[1])
    write_rows(data, rows)
    with pytest.raises(DataError, match=match):
        train("o")


def test_lengths_of_rows(tiny_checkpoint, data):
    _, examples, _ = load_examples(tiny_checkpoint, data)
    lengths = sorted(example.n_tokens for example in examples)
    stats = train_sft.describe_lengths(examples)
    assert stats["median"] == lengths[5] and stats["max"] == stats["p95"] == lengths[-1]
    assert stats["tokens"] == sum(lengths) and stats["images"] == 9


def test_dry_run_shows_rows_plan_and_memory_and_checks_images(tiny_checkpoint, data, tmp_path, capsys):
    arguments = flags(data, tiny_checkpoint, tmp_path / "o", "--dry_run")
    assert train_sft.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count(">>I look") == 3 and "<|im_end|><<" in captured.err
    assert "memory per device, estimated: fits" in captured.err
    printed = json.loads(captured.out)
    assert printed["steps"] == 4 and printed["unreadable_images"] == 0 and not list(tmp_path.glob("o*"))
    path = data.parent / "1_0.png"
    path.write_bytes(path.read_bytes()[:-40])  # its header is complete
    assert train_sft.main(arguments) == 2
    assert "1_0.png: not a whole picture" in capsys.readouterr().err
