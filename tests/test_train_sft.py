"""Fine-tuning: the loss, whole runs, several processes, stopping and resuming, what is refused.    pytest
tests/test_train_sft.py

Targets, packs, latents, steps, shards and checkpoints have test files of their own.
"""
import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from training import flags, gradient, launch, losses

import train_sft
from utils import qwen as Q
from utils.jsonl import DataError, read_rows, write_rows
from utils.train.examples import Target, make_example
from utils.train.packing import make_pack, use_packed_attention


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's files under the names they are saved by."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


def test_learning_rate():
    rates = [train_sft.learning_rate_at(s, 10, 1.0, 2) for s in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


# --------------------------------------------------------------------------------------------------- the loss
def test_the_loss_is_the_library_s_own(tiny_checkpoint, data):
    """Oracle: transformers' loss with labels and its own positions, a mean over the trained tokens."""
    qwen, target = Q.load(str(tiny_checkpoint), device="cpu"), Target("text", str(data.parent))
    objective = train_sft.Objective(qwen, None, "cosine")
    for row in read_rows(data, {})[1:4]:
        example = make_example(qwen, row, target)
        pack = make_pack(qwen, [example], [1.0], target)
        with use_packed_attention(qwen.model):
            ours, right, _ = objective(pack)
        labels = torch.full_like(pack["input_ids"], -100)
        labels[0, -example.n_trained:] = pack["input_ids"][0, -example.n_trained:]
        inputs = {name: pack[name] for name in ("input_ids", "pixel_values", "image_grid_thw")
                  if name in pack}
        kinds = (pack["input_ids"] == Q.special_id(qwen.tokenizer, Q.IMAGE_TOKEN)).int()
        theirs = qwen.model(**inputs, mm_token_type_ids=kinds, labels=labels)
        assert ours.mean().item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        assert right.tolist() == (theirs.logits.argmax(-1)[0, pack["source"]] == pack["target"]).tolist()


def test_logits_in_chunks_change_neither_loss_nor_gradient(tiny_checkpoint, data, monkeypatch):
    qwen, target = Q.load(str(tiny_checkpoint), device="cpu"), Target("text", str(data.parent))
    objective = train_sft.Objective(qwen, None, "cosine").train()
    examples = [make_example(qwen, row, target) for row in read_rows(data, {})]
    pack, results, widths = make_pack(qwen, examples, [1.0] * 12, target), [], []
    qwen.model.lm_head.register_forward_hook(lambda module, inputs, out: widths.append(len(out)))
    for chunk in (10_000, 100, 7):
        monkeypatch.setattr(train_sft, "CHUNK", chunk)
        qwen.model.zero_grad(), widths.clear()
        with use_packed_attention(qwen.model):
            its, right, _ = objective(pack)
            its.sum().backward()
        results.append((its.detach(), right, gradient(qwen.model)))
        assert max(widths) <= chunk
    for its, right, its_gradient in results[1:]:
        assert torch.allclose(its, results[0][0], rtol=1e-6) and torch.equal(right, results[0][1])
        assert (its_gradient - results[0][2]).norm() < 1e-5 * results[0][2].norm()


# ------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("imagination", ["text", "latent", "placeholder", "direct"])
def test_each_variant_trains_and_reloads(tiny_checkpoint, data, tmp_path, capsys, imagination):
    output = tmp_path / "out"
    more = ["--imagination", imagination, "--validation_rows", "2", "--eval_every", "2", "--epochs", "8"]
    assert train_sft.main(flags(data, tiny_checkpoint, output, *more)) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(Path(f"{output}.metrics.json").read_text())
    curve = losses(output)
    assert len(curve) == printed["steps"] == 8 * 2 and curve[-1] < curve[0]
    line = json.loads(Path(f"{output}.run/log.jsonl").read_text().splitlines()[-1])
    assert line["trained_tokens"] < line["tokens"] and line["images"] > 0 and line["flops"] > 1e6 and line[
        "mfu"] is None
    assert 0 <= line["data_wait"] < 1 and line["balance"] == 1.0  # one process: nobody to wait for
    again = Q.load(str(output), device="cpu")
    before = Q.load(str(tiny_checkpoint), device="cpu")
    for (name, a), (_, b) in zip(again.model.model.visual.named_parameters(),
                                 before.model.model.visual.named_parameters()):
        assert torch.equal(a, b), f"{name} of the frozen tower moved"
    assert not torch.equal(again.model.lm_head.weight, before.model.lm_head.weight)
    assert again.model.lm_head.out_features == before.model.lm_head.out_features
    with pytest.raises(DataError, match="never replaced"):
        train_sft.main(flags(data, tiny_checkpoint, output))


def test_the_result_has_the_names_and_the_type_of_its_base(tiny_checkpoint, data, tmp_path):
    base = Q.load(str(tiny_checkpoint), dtype="bfloat16", device="cpu")
    Q.save(base, str(tmp_path / "base"))
    assert train_sft.main(flags(data, tmp_path / "base", tmp_path / "out", "--max_steps", "2")) == 0
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert Q.load_tools(str(tmp_path / "out")).saved_dtype == torch.bfloat16
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).is_file()


def test_the_best_by_generated_answers_and_the_best_k(tiny_checkpoint, data, tmp_path, monkeypatch):
    """A model that answers is known by construction: after step 4 every reply is made to end in its row's
    answer."""
    real, looks = train_sft.replies, []

    def replies(qwen, examples, target, n):
        assert n == 5 and all(isinstance(reply, str) for reply in real(qwen, examples, target, n))
        looks.append(len(examples))
        right = len(looks) == 2
        return [f"\\boxed{{{example.id.removeprefix('t/')}}}" if right else "none" for example in examples]

    monkeypatch.setattr(train_sft, "replies", replies)
    more = ["--validation_rows", "3", "--eval_every", "2", "--max_steps", "6", "--select", "answers",
            "--answer_tokens", "5",
            "--keep_best", "2"]
    assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", *more)) == 0
    log = [json.loads(line) for line in (tmp_path / "o.run" / "log.jsonl").read_text().splitlines()]
    assert [record.get("held_out_accuracy") for record in log] == [None, 0.0, None, 1.0, None,
                                                                   0.0] and looks == [3, 3, 3]
    assert json.loads((tmp_path / "o.metrics.json").read_text())["best_step"] == 4
    # of the other two looks, equal in answers, that of the lower loss is kept
    second = min((2, 6), key=lambda step: log[step - 1]["held_out_loss"])
    assert [path.name for path in (tmp_path / "o.run").glob("best-*")] == [f"best-{second}"]


def test_adapters_are_merged_into_what_is_written(tiny_checkpoint, data, tmp_path):
    pytest.importorskip("peft")
    more = ["--lora_rank", "4", "--max_steps", "4", "--save_every", "2"]
    assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "one", *more)) == 0
    process = launch(flags(data, tiny_checkpoint, tmp_path / "two", *more), 2)
    assert process.wait(timeout=240) == 0
    # each rank draws its own dropout
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=0.02)
    before, after = tensors_of(tiny_checkpoint), tensors_of(tmp_path / "one")
    assert before.keys() == after.keys()
    changed = {re.sub(r"\.\d+\.", ".", name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{part}_proj.weight" for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}


def test_a_tracker_gets_what_the_log_has(tiny_checkpoint, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", "--report_to", "tensorboard")) == 0
    events = EventAccumulator(str(tmp_path / "o.run" / "train_sft")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "o"))


def test_an_unknown_tracker_is_refused(tiny_checkpoint, data, tmp_path):
    with pytest.raises(DataError, match="--report_to aim: not installed"):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", "--report_to", "aim"))


@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_two_processes_give_the_losses_of_one(tiny_checkpoint, data, tmp_path, imagination):
    for processes in (1, 2):
        # Five rows a step: the two ranks hold unequal shares, and one of them gets rows without a picture.
        more = ["--imagination", imagination, "--train_vision", "--global_batch", "5"]
        process = launch(flags(data, tiny_checkpoint, tmp_path / f"p{processes}", *more), processes)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-2000:]
        assert json.loads(out.splitlines()[-1])["processes"] == processes
    assert losses(tmp_path / "p1") == pytest.approx(losses(tmp_path / "p2"), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_resumed_gives_the_same_curve_to_the_bit(tiny_checkpoint, data, tmp_path, number):
    more = ["--epochs", "10", "--save_every", "3", "--validation_rows", "2", "--eval_every", "4"]
    assert launch(flags(data, tiny_checkpoint, tmp_path / "whole", *more)).wait(timeout=240) == 0
    arguments = flags(data, tiny_checkpoint, tmp_path / "cut", *more)
    process, log = launch(arguments), tmp_path / "cut.run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 8):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "cut").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 130 and "Traceback" not in err
        # nothing is done twice
        assert (tmp_path / "cut.run" / f"step-{len(losses(tmp_path / 'cut'))}").is_dir()
    resumed = launch(arguments)
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0 and "resumed from" in err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for (name, a), (_, b) in zip(Q.load(str(tmp_path / "cut"), device="cpu").model.state_dict().items(),
                                 Q.load(str(tmp_path / "whole"), device="cpu").model.state_dict().items()):
        assert torch.equal(a, b), name


def test_a_step_is_the_same_rows_however_they_are_packed(tiny_checkpoint, data, tmp_path):
    """One pack a step, several, and a row a pack: the same losses, as the optimizer sees the same rows."""
    curves = []
    for name, max_tokens in (("one", "10000"), ("few", "300"), ("each", "170")):
        assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / name, "--max_tokens", max_tokens)) == 0
        curves.append(losses(tmp_path / name))
    for which in ("layers", "mlps"):
        assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / which, "--recompute", which)) == 0
        curves.append(losses(tmp_path / which))
    assert all(curve == pytest.approx(curves[0], rel=1e-4) for curve in curves[1:])
    with pytest.raises(DataError, match=r"t/\d+: \d+ tokens, visual ones included; --max_tokens 20 is less"):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "none", "--max_tokens", "20"))


def test_latents_cannot_have_whole_layers_recomputed(capsys):
    with pytest.raises(SystemExit):
        train_sft.parse_args(["--data", "d", "--output", "o", "--imagination", "latent", "--recompute",
                              "layers"])
    assert "whose recurrence needs the cache; take mlps" in capsys.readouterr().err


@pytest.mark.parametrize("rate, spike, said", [
    ("1e30", "2", "loss (nan|inf)|gradient norm (nan|inf)|had a median"), ("0.3", "0.01", "had a median of")])
def test_a_loss_that_is_not_finite_or_jumps_stops_with_the_rows(tiny_checkpoint, data, tmp_path, rate, spike,
                                                                said):
    more = ["--learning_rate", rate, "--warmup_steps", "0", "--schedule", "constant", "--epochs", "10",
            "--save_every", "1",
            "--spike", spike]
    with pytest.raises(DataError, match=said) as caught:
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", *more))
    step = int(re.match(r"step (\d+): ", str(caught.value))[1])
    assert "nothing was updated. Rows of the highest loss: t/" in str(caught.value)
    assert len(losses(tmp_path / "o")) == step - 1 and (tmp_path / "o.run" / f"step-{step - 1}").is_dir()
    if rate == "0.3":  # and who wants to go on may
        assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", *more, "--spike", "0", "--resume",
                                    "must")) == 0
        assert len(losses(tmp_path / "o")) == 20


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_checkpoint_before(tiny_checkpoint, data, tmp_path):
    """Kills whenever a part is seen being written, five times; the curve and the weights are those of one
    run."""
    more = ["--epochs", "12", "--save_every", "1", "--keep", "1"]
    assert launch(flags(data, tiny_checkpoint, tmp_path / "whole", *more)).wait(timeout=240) == 0
    rng, seen, arguments, run = random.Random(0), 0, flags(data, tiny_checkpoint, tmp_path / "cut",
                                                           *more), tmp_path / "cut.run"
    for _ in range(5):
        process, steps = launch(arguments), set(run.glob("step-*"))
        while process.poll() is None and set(run.glob("step-[0-9]*")) <= steps:
            time.sleep(0.002)  # until this process has saved once
        deadline = time.time() + rng.uniform(0.02, 0.1)
        while process.poll() is None and not (time.time() > deadline and list(run.glob("*.part"))):
            time.sleep(0.0002)
        process.kill()
        process.communicate(timeout=60)
        if (tmp_path / "cut").exists():
            break
        seen += bool(list(run.glob("step-*.part")))
        assert [path for path in run.glob("step-*") if (path / "state.json").is_file()]
    assert seen >= 1, "no kill fell into a save"
    if not (tmp_path / "cut").exists():
        _, err = launch(arguments).communicate(timeout=240)
        assert "damaged" not in err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    before, after = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change, match", [
    (lambda row: row | {"images": ["gone.png"]}, "gone.png"),
    (lambda row: row | {"images": ["../rows.jsonl"]}, "leaves|outside"),
    (lambda row: {k: v for k, v in row.items() if k != "chain"}, r"rows.jsonl:2.*'chain'"),
    (lambda row: row | {"answer": 7}, r"rows.jsonl:2.*'answer'.*str")])
def test_bad_rows_are_named(tiny_checkpoint, data, tmp_path, change, match):
    rows = read_rows(data, {})
    rows[1] = change(rows[1])
    write_rows(data, rows)
    with pytest.raises(DataError, match=match):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o"))


def test_dry_run_shows_rows_plan_memory_and_lengths_and_checks_images(tiny_checkpoint, data, tmp_path,
                                                                      capsys):
    arguments = flags(data, tiny_checkpoint, tmp_path / "o", "--dry_run")
    assert train_sft.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count(">>I look") == 3 and "<|im_end|><<" in captured.err
    assert "memory a device, estimated: fits" in captured.err and "hours on 8 devices" in captured.err
    printed = json.loads(captured.out)
    assert printed["steps"] == 4 and printed["unreadable_images"] == 0 and printed["hours"].keys() >= {"A800",
                                                                                                       "H200"}
    assert [path.name for path in tmp_path.glob("o*")] == ["o.lengths.png"]
    assert Image.open(tmp_path / "o.lengths.png").size[0] > 500
    (data.parent / "1_0.png").write_bytes((data.parent / "1_0.png").read_bytes()[:-40])
    assert train_sft.main(arguments) == 2
    assert "1_0.png: not a whole picture" in capsys.readouterr().err
