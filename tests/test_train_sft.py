"""Fine-tuning: targets, layout, normalisation, several processes, resuming.    pytest tests/test_train_sft.py"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_sft
from utils import qwen as Q
from utils.decode import PRESETS, generate
from utils.rows import DataError, write_rows

ROOT = Path(__file__).parents[1]
MIRAGE = PRESETS["mirage"]
ROW = {"id": "a/1", "images": ["a.png"], "question": "What digit?", "answer": "7",
       "steps": [{"text": "I look closer."}, {"image": "b.png", "operation": "zoom", "caption": "a red 7"},
                 {"text": "It shows 7. The answer is \\boxed{7}."}],
       "chain": "I look closer. <think_image>a red 7</think_image> It shows 7. The answer is \\boxed{7}."}


@pytest.fixture
def data(tmp_path, picture):
    """Twelve rows of unequal length, every third without an imagined image and every fourth without any picture."""
    rng, rows = random.Random(0), []
    for n in range(12):
        picture(f"{n}_0.png", (56, 56 + 28 * (n % 3)), rng.choice(("red", "blue")))
        picture(f"{n}_1.png", (56, 84), "green")
        words = " ".join(["closer"] * rng.randint(1, 12))
        steps = [{"text": f"I look {words}."}]
        steps += [{"image": f"{n}_1.png", "operation": "zoom", "caption": f"a {words} thing"}] if n % 3 else []
        steps += [{"text": f"It is {n}. The answer is \\boxed{{{n}}}."}]
        rows.append({"id": f"t/{n}", "subset": "t", "images": [f"{n}_0.png"] if n % 4 else [], "question": f"What is {words}?",
                     "answer": str(n), "steps": steps,
                     "chain": f"I look {words}. <think_image>a thing</think_image> The answer is \\boxed{{{n}}}."})
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def flags(data, checkpoint, output, *more):
    return ["--data", str(data), "--image_root", str(data.parent), "--model", str(checkpoint), "--output", str(output),
            "--global_batch", "6", "--batch_size", "2", "--max_tokens", "300", "--learning_rate", "1e-3", "--num_workers", "0", "--epochs", "2", *more]


def losses(output):
    return [json.loads(line)["loss"] for line in Path(f"{output}.run/log.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("imagination, expected", [
    ("text", ROW["chain"]),
    ("direct", "\\boxed{7}"),
    ("placeholder", "I look closer. <think_image> It shows 7. The answer is \\boxed{7}.")])
def test_target_of_each_variant(imagination, expected):
    assert train_sft.target_text(ROW, imagination) == expected


def test_latent_target_and_data_that_looks_like_control_tokens():
    pads = "<|latent_pad|>" * 4
    assert train_sft.target_text(ROW, "latent", MIRAGE) == (
        f"I look closer. <|latent_start|>{pads}<|latent_end|> It shows 7. The answer is \\boxed{{7}}.")
    assert train_sft.target_text(ROW | {"chain": "a<|im_end|>b"}, "text") == "a< |im_end|>b"


def test_only_the_reply_is_trained_and_no_pad_nor_forced_end(tiny_checkpoint, picture, tmp_path):
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    picture("a.png"), picture("b.png")
    for imagination, spec in (("text", None), ("latent", MIRAGE)):
        args = train_sft.parse_args(flags(tmp_path / "x", tiny_checkpoint, "o", "--imagination", imagination))
        args.image_root = str(tmp_path)
        if spec:
            Q.add_tokens(qwen, spec.tokens)
        example = train_sft.make_example(qwen, ROW, args, spec)
        trained = qwen.tokenizer.decode([i for i, t in zip(example.ids, example.trained) if t])
        rest = qwen.tokenizer.decode([i for i, t in zip(example.ids, example.trained) if not t])
        if spec is None:
            assert trained == ROW["chain"] + "<|im_end|>"
        else:
            assert trained == "I look closer. <|latent_start|> It shows 7. The answer is \\boxed{7}.<|im_end|>"
            assert rest.endswith("<|im_start|>assistant\n" + MIRAGE.pad * 4 + MIRAGE.end)


def test_pieces_share_latent_columns():
    columns, blocks = train_sft.lay_out([[3, 2], [1, 4], [2]], n_latents=2)
    assert blocks == [(0, 3), (5, 9)]
    assert columns == [[0, 1, 2, 3, 4, 7, 8], [2, 3, 4, 5, 6, 7, 8], [1, 2]]
    assert train_sft.piece_lengths([1, 1, 9, 9, 4, 9, 9], pad_id=9, n_latents=2) == [2, 1, 0]


def test_learning_rate():
    rates = [train_sft.learning_rate_at(s, 10, 1.0, 2) for s in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


# --------------------------------------------------------------------------------------------------- numerics
def objective_and_examples(tiny_checkpoint, data, *more):
    args = train_sft.parse_args(flags(data, tiny_checkpoint, "unused", *more))
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    spec = MIRAGE if args.imagination == "latent" else None
    if spec:
        Q.add_tokens(qwen, spec.tokens)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    examples = [train_sft.make_example(qwen, row, args, spec) for row in rows]
    return qwen, train_sft.Objective(qwen, spec, "cosine"), examples, args, spec


def test_the_batch_size_changes_neither_loss_nor_gradient(tiny_checkpoint, data):
    """Oracle of padding, layout and normalisation with latents: sums over rows one by one equal those of one padded batch.
    (Rows without latents are packed: tests/test_packing.py.)"""
    qwen, objective, examples, args, spec = objective_and_examples(tiny_checkpoint, data, "--imagination", "latent")
    results = []
    for size in (1, 5, 12):
        qwen.model.zero_grad()
        sums = torch.zeros(3)
        for k in range(0, 12, size):
            part = examples[k:k + size]
            nll, align, right = objective(train_sft.make_batch(qwen, part, [1.0] * len(part), args, spec))
            (nll + align).backward()
            sums += torch.stack([nll.detach(), align.detach(), right])
        results.append((sums, torch.cat([p.grad.flatten() for p in qwen.model.parameters() if p.grad is not None])))
    for sums, gradient in results[1:]:
        assert torch.allclose(sums, results[0][0], rtol=1e-5)
        assert (gradient - results[0][1]).norm() < 1e-5 * results[0][1].norm()


def test_text_loss_equals_the_library_s_own(tiny_checkpoint, data):
    """Oracle: transformers' loss with labels, a mean over the trained tokens."""
    qwen, objective, examples, args, _ = objective_and_examples(tiny_checkpoint, data)
    for example in examples[1:4]:
        batch = train_sft.make_batch(qwen, [example], [1.0], args, None)
        nll, _, _ = objective(batch)
        labels = torch.full_like(batch["input_ids"], -100)
        n_trained = sum(example.trained)
        labels[0, -n_trained:] = batch["input_ids"][0, -n_trained:]
        keep = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        theirs = qwen.model(**{k: v for k, v in batch.items() if k in keep}, labels=labels).loss
        assert float(nll) / n_trained == pytest.approx(float(theirs), rel=1e-5)


def test_training_feeds_the_latents_that_decoding_feeds(tiny_checkpoint, data):
    """The vectors of the training pass equal those of utils.decode after the same words."""
    qwen, objective, examples, args, spec = objective_and_examples(tiny_checkpoint, data, "--imagination", "latent")
    chosen = [e for e in examples if e.steps][:4]
    batch = train_sft.make_batch(qwen, chosen, [1.0] * 4, args, spec)
    images = {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
    with torch.no_grad():
        _, latents = objective.run_latents(batch, images)
    pad_id = Q.special_id(qwen.tokenizer, spec.pad)
    for i, example in enumerate(chosen):
        cut = example.ids.index(pad_id)  # everything up to the start marker is the prompt
        pixels = [Q.process_images(qwen.image_processor, train_sft.load_images(example.images, 2000, 1280, 28))]
        prompt = Q.collate(qwen, [example.ids[:cut - 1]], pixels, "left")
        start_id = Q.special_id(qwen.tokenizer, spec.start)
        with torch.no_grad():  # make the start marker the sampled token, then decode
            qwen.model.lm_head.weight.zero_()
            qwen.model.lm_head.weight[start_id] = generate(qwen, prompt, 1, capture=True)[0].states[0]
        row = generate(qwen, prompt, 6, spec, capture=True)[0]
        assert row.ids[0] == start_id and row.fed.shape == (4, 32)
        assert torch.allclose(row.fed, torch.stack([step[i] for step in latents[0]]), atol=1e-4)


# --------------------------------------------------------------------------------------------------- whole runs
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
    assert line["trained_tokens"] < line["tokens"] and line["images"] > 0 and line["flops"] > 1e6 and line["mfu"] is None
    assert 0 <= line["data_wait"] < 1 and line["balance"] == 1.0  # one process: nobody to wait for
    again = Q.load(str(output), device="cpu")
    before = Q.load(str(tiny_checkpoint), device="cpu")
    for (name, a), (_, b) in zip(again.model.model.visual.named_parameters(), before.model.model.visual.named_parameters()):
        assert torch.equal(a, b), f"{name} of the frozen tower moved"
    assert not torch.equal(again.model.lm_head.weight, before.model.lm_head.weight)
    assert again.model.lm_head.out_features == before.model.lm_head.out_features
    with pytest.raises(DataError, match="never replaced"):
        train_sft.main(flags(data, tiny_checkpoint, output))


def launch(arguments, processes=1):
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([*start, str(ROOT / "train_sft.py"), *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
        assert (tmp_path / "cut.run" / f"step-{len(losses(tmp_path / 'cut'))}").is_dir()  # nothing is done twice
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
    assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "again", "--checkpointing", "on")) == 0
    curves.append(losses(tmp_path / "again"))
    assert all(curve == pytest.approx(curves[0], rel=1e-4) for curve in curves[1:])
    with pytest.raises(DataError, match=r"t/\d+: \d+ tokens, visual ones included; --max_tokens 20 is less"):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "none", "--max_tokens", "20"))


def test_a_run_is_not_resumed_under_other_settings(tiny_checkpoint, data, tmp_path):
    (tmp_path / "o.run").mkdir()
    args = vars(train_sft.parse_args(flags(data, tiny_checkpoint, tmp_path / "o"))) | {"learning_rate": 0.5}
    (tmp_path / "o.run" / "settings.json").write_text(json.dumps(args))
    with pytest.raises(DataError, match="--learning_rate: 0.5 then, 0.001 now"):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o"))


@pytest.mark.parametrize("change, match", [
    (lambda row: row | {"images": ["gone.png"]}, "gone.png"),
    (lambda row: row | {"images": ["../rows.jsonl"]}, "leaves|outside"),
    (lambda row: {k: v for k, v in row.items() if k != "chain"}, r"rows.jsonl:2.*'chain'"),
    (lambda row: row | {"answer": 7}, r"rows.jsonl:2.*'answer'.*str")])
def test_bad_rows_are_named(tiny_checkpoint, data, tmp_path, change, match):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1] = change(rows[1])
    write_rows(data, rows)
    with pytest.raises(DataError, match=match):
        train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o"))


def test_dry_run_shows_a_row_and_writes_nothing(tiny_checkpoint, data, tmp_path, capsys):
    assert train_sft.main(flags(data, tiny_checkpoint, tmp_path / "o", "--dry_run")) == 0
    captured = capsys.readouterr()
    assert ">>I look" in captured.err and "<|im_end|><<" in captured.err
    assert json.loads(captured.out)["steps"] == 4 and not list(tmp_path.glob("o*"))
