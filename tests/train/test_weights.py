"""The weights in training: two sharded CPU ranks against one process, precision, adapters.

    python -m pytest tests/train/test_weights.py
"""
from contextlib import nullcontext
from threading import Event

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from decoding import needs_bfloat16
from torch.distributed.tensor import DTensor
from training import flags, load_examples, run_ranks

import train_sft
from utils import qwen as Q
from utils.latent_families import PRESETS, special_id
from utils.train.batching import Batching, Steps, count_parameters, recompute_activations
from utils.train.checkpoints import Run, Saver, restore, snapshot
from utils.train.loop import Trainer
from utils.train.model import Objective, use_packed_attention
from utils.train.weights import (add_adapters, add_tokens, choose_trained, gradients_from_embedding,
                                 init_tokens, make_model, make_optimizer, shard, whole_state)

pytestmark = pytest.mark.numeric

EPS = 1e-3  # Adam's: the learning rate of these runs
# How far weights may be apart after five steps of Adam, lr * m / (sqrt(v) + eps). Where each gradient may be
# off by d, so may m and sqrt(v), and the update of a step by 2 * lr * d / eps. With Adam's usual eps of 1e-8
# the only bound is 2 * lr where the gradient is rounding noise (a key's bias moves all scores of a row nearly
# alike): its sign is random. With eps = lr it is 2 d per step: 2e-6 in five for d = 2e-7, three roundings of
# float32 of the gradients here, which are below 1.
NEAR = 2e-6


def prepare(checkpoint, data, more):
    """Return (trainer, steps) of a small run on this rank."""
    args = train_sft.parse_args(flags(data, checkpoint, "unused", "--global_batch", "5", "--clip", "1e9",
                                      "--warmup_steps", "0", "--schedule", "constant", *more))
    acc = Accelerator(cpu=True)
    tools, examples, target = load_examples(checkpoint, data, args.imagination)
    qwen, objective = make_model(acc.device, acc.num_processes, target, args)
    optimizer = make_optimizer(qwen.model, args.learning_rate, args.weight_decay, args.merger_learning_rate)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    batching = Batching(args.seed, args.global_batch, args.max_tokens, args.train_vision)
    steps = Steps(tools, examples, target, batching, acc.process_index, acc.num_processes)
    return Trainer(acc, qwen, objective, optimizer, Run(), None, Event(), args), steps


def run(trainer, steps, first, last) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train steps first to last - 1; return their losses and alignments, and the first gradients by name."""
    gradients, batches, model = {}, steps.ahead(first, last), trainer.qwen.model

    def keep(*_):
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        hook.remove()

    hook, trainer.run.step = trainer.optimizer.register_step_pre_hook(keep), first
    recompute = trainer.args.recompute if steps.world > 1 and trainer.args.recompute else "none"
    alone = trainer.args.train_vision == "merger_only"
    with (use_packed_attention(model), recompute_activations(model, recompute),
          gradients_from_embedding(model) if alone else nullcontext()):
        records = [trainer.timed_step(steps, batches, 9)[0] for _ in range(first, last)]
    return [record[name] for record in records for name in ("loss", "align") if record[name]], gradients


def check_near(tensors, expected, bound):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensors[name] - tensor).abs().max() < bound, name


def check_rank(rank, folder, checkpoint, data, more, expected):
    trainer, steps = prepare(checkpoint, data, more)
    model = trainer.qwen.model
    curve, gradients = run(trainer, steps, 0, 3)
    # two orders of the same sums: 1e-5 of the largest gradient is about a hundred roundings of float32
    largest = max(float(tensor.abs().max()) for tensor in expected["gradients"].values())
    check_near(gradients, expected["gradients"], 1e-5 * largest)
    assert curve == pytest.approx(expected["curve"], rel=1e-5)
    saver = Saver(rank, steps.world)
    saver.submit(saver.checkpoint, folder / "step-3", snapshot(model, trainer.optimizer, rank), {"step": 3},
                 lambda: None)
    saver.close()
    dist.barrier()
    onward, _ = run(trainer, steps, 3, 5)
    again, steps = prepare(checkpoint, data, more)
    restore(folder / "step-3", again.qwen.model, again.optimizer)
    assert run(again, steps, 3, 5)[0] == onward  # to the bit
    state = whole_state(model, torch.float32, rank == 0)
    assert bool(state) == (rank == 0)
    if rank == 0:
        check_near(state, expected["state"], NEAR)


@pytest.mark.parametrize("more", [
    (), ("--train_vision", "--recompute", "layers"), ("--imagination", "latent", "--recompute", "mlps"),
    ("--imagination", "latent", "--recompute", "layers"), ("--train_vision", "merger_only"),
    ("--train_vision", "merger", "--merger_learning_rate", "1e-4", "--imagination", "latent"),
    ("tiny_qwen3", "--train_vision"), ("tiny_qwen3", "--imagination", "latent")])
def test_two_ranks_equal_one_process_and_resume_to_the_bit(request, data, tmp_path, more):
    """Some packs have text alone (rows 0, 4 and 8 have no picture), with or without a picture on the other
    rank."""
    base, *more = more if more and more[0] == "tiny_qwen3" else ("tiny_checkpoint", *more)
    tiny_checkpoint = request.getfixturevalue(base)
    one = prepare(tiny_checkpoint, data, more)
    curve, gradients = run(*one, 0, 3)
    run(*one, 3, 5)
    expected = {"curve": curve, "gradients": gradients,
                "state": whole_state(one[0].qwen.model, torch.float32, True)}
    run_ranks(check_rank, tmp_path, tmp_path, tiny_checkpoint, data, more, expected)
    again = prepare(tiny_checkpoint, data, more)  # one process reads what two ranks wrote
    restore(tmp_path / "step-3", again[0].qwen.model, again[0].optimizer)
    run(*again, 3, 5)
    check_near(whole_state(again[0].qwen.model, torch.float32, True), expected["state"], NEAR)


@needs_bfloat16
def test_in_low_precision_loss_gradients_and_master_weights_are_float32(tiny_checkpoint, data):
    qwen, examples, target = load_examples(tiny_checkpoint, data, dtype="bfloat16")
    qwen.model.model.visual.requires_grad_(False)
    batch = Steps(qwen, examples, target, Batching(global_batch=6, max_tokens=300), 0, 1)[0, 0]
    objective = Objective(qwen).train()
    try:
        shard(objective, qwen.model, low_precision=True)
        with use_packed_attention(qwen.model):
            losses, _, _ = objective(batch)
            losses.sum().backward()
    finally:
        dist.destroy_process_group()
    trained = [p for p in qwen.model.parameters() if p.requires_grad]
    assert losses.dtype == torch.float32  # accelerate's default policy would round it
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in qwen.model.model.visual.parameters()} == {torch.bfloat16}
    exact, _, _ = load_examples(tiny_checkpoint, data)
    with use_packed_attention(exact.model):
        reference, _, _ = Objective(exact)(batch)
    assert torch.allclose(losses, reference, rtol=0.02) and not torch.equal(losses, reference)


def test_weights_decay_where_they_are_matrices(tiny_checkpoint, data):
    optimizer = make_optimizer(load_examples(tiny_checkpoint, data)[0].model, 1e-3, 0.5)
    decays = {(group["weight_decay"], p.ndim >= 2)
              for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(0.5, True), (0.0, False)}


@pytest.mark.parametrize("is_tied", [False, True])
def test_adapters_and_rows_export_what_they_compute(tiny_checkpoint, data, is_tied):
    """Oracle: the same ids, through the model as it is trained and through one with the exported weights."""
    qwen, _, _ = load_examples(tiny_checkpoint, data, "latent")
    plain = load_examples(tiny_checkpoint, data, "latent")[0].model
    ids = [special_id(qwen.tokenizer, name) for name in PRESETS["mirage"].tokens]
    if is_tied:
        qwen.model.lm_head.weight = qwen.model.get_input_embeddings().weight
    add_adapters(qwen.model, 3, ids)
    trained = [p for p in qwen.model.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    state = whole_state(qwen.model, torch.float32, True)
    assert state.keys() == {name for name, _ in plain.named_parameters()} - (
        {"lm_head.weight"} if is_tied else set())
    plain.load_state_dict(state, strict=not is_tied)
    if is_tied:
        plain.lm_head.weight = plain.get_input_embeddings().weight
    inputs = torch.tensor([[5, *ids, 7, 40, 80, ids[1]]])
    assert torch.allclose(qwen.model.eval()(inputs).logits, plain.eval()(inputs).logits, atol=1e-5)
    # 2 layers of 7 adapted matrices, and rows of embedding and head
    assert len(trained) == 2 * 2 * 7 + (1 if is_tied else 2)


def test_new_tokens_begin_as_a_mean_and_known_ones_stay(tiny_checkpoint):
    """The tiny base has spare rows, which nothing trained."""
    names = PRESETS["mirage"].tokens
    for texts in (None, ["a red circle"], ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]):
        qwen = Q.load(str(tiny_checkpoint), device="cpu")
        matrices = [qwen.model.get_input_embeddings().weight, qwen.model.lm_head.weight]
        before, n_known = [matrix.clone() for matrix in matrices], len(qwen.tokenizer)
        ids = add_tokens(qwen, names)
        qwen.model.lm_head.weight.data[n_known + 3] = 9.0  # another spare row
        init_tokens(qwen, ids, n_known, texts)
        for matrix, old in zip(matrices, before):
            for n, token in enumerate(ids):
                like = (list(range(n_known)) if texts is None else
                        qwen.tokenizer(texts[n % len(texts)]).input_ids)
                assert torch.allclose(matrix[token], old[like].mean(0), atol=1e-6)
            assert torch.equal(matrix[:n_known], old[:n_known])
        after = [matrix.clone() for matrix in matrices]
        init_tokens(qwen, add_tokens(qwen, names), len(qwen.tokenizer), ["7"])  # a second stage
        assert all(torch.equal(*pair) for pair in zip(matrices, after))


def test_a_part_is_trained_and_has_its_rate(tiny_checkpoint, data):
    for vision, parts in ((None, {"language"}), ("merger", {"language", "merger"}),
                          ("merger_only", {"merger"}), ("all", {"language", "merger", "tower"})):
        model = load_examples(tiny_checkpoint, data)[0].model
        choose_trained(model, vision)
        part_of = {p: "language" if ".visual." not in name else "merger" if ".merger." in name else "tower"
                   for name, p in model.named_parameters()}
        groups = make_optimizer(model, 1e-3, 0.5, 2e-4).param_groups
        rates = {part_of[p]: group["rate"] for group in groups for p in group["params"]}
        assert {part_of[p] for p in part_of if p.requires_grad} == rates.keys() == parts
        assert rates == {part: 0.2 if part == "merger" else 1.0 for part in parts}
        sizes = count_parameters(model.config)
        assert sizes["merger"] == sum(p.numel() for p in part_of if part_of[p] == "merger")
