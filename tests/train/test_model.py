"""The training model: two sharded CPU ranks against one process, precision, adapters.

    python -m pytest tests/train/test_model.py
"""
from threading import Event

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from decoding import needs_bfloat16
from torch.distributed.tensor import DTensor
from training import flags, load_examples, run_ranks

import train_sft
from utils.train.batching import Batching, Steps, recompute_activations
from utils.train.checkpoints import Run, Saver, merge_adapters, restore, snapshot, whole_state
from utils.train.loop import Trainer
from utils.train.model import Objective, make_model, make_optimizer, shard, use_packed_attention

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
    optimizer = make_optimizer(qwen.model, args.learning_rate, args.weight_decay)
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
    with use_packed_attention(model), recompute_activations(model, recompute):
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


@pytest.mark.parametrize("more", [(), ("--train_vision", "--recompute", "layers"),
                                  ("--imagination", "latent", "--recompute", "mlps"),
                                  ("--imagination", "latent", "--recompute", "layers")])
def test_two_ranks_equal_one_process_and_resume_to_the_bit(tiny_checkpoint, data, tmp_path, more):
    """Some packs have text alone (rows 0, 4 and 8 have no picture), with or without a picture on the other
    rank."""
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


def test_adapters_merge_by_their_formula():
    layer = torch.nn.Module()
    layer.q_proj = torch.nn.Module()
    layer.q_proj.scaling = {"default": 2.0}
    w, a, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    state = {"q_proj.base_layer.weight": w, "q_proj.base_layer.bias": torch.ones(4),
             "q_proj.lora_A.default.weight": a, "q_proj.lora_B.default.weight": b,
             "norm.weight": torch.ones(3)}
    merged = merge_adapters(layer, state, torch.float32)
    assert list(merged) == ["q_proj.weight", "q_proj.bias", "norm.weight"]
    assert torch.allclose(merged["q_proj.weight"], w + 2 * b @ a)
