"""The training model: two sharded CPU ranks against one process, precision, recomputation, adapters.

    python -m pytest tests/train/test_model.py
"""
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from training import flags, load_examples

import train_sft
from utils.train.batching import Batching, Steps
from utils.train.checkpoints import Saver, merge_adapters, restore, snapshot, whole_state
from utils.train.model import (Objective, average_replicated, make_optimizer, recompute_activations, shard,
                               use_packed_attention)

pytestmark = pytest.mark.numeric

EPS = 1e-3  # Adam's: the learning rate of these runs
# How far weights may be apart after five steps of Adam, lr * m / (sqrt(v) + eps). Where each gradient may be
# off by d, so may m and sqrt(v), and the update of a step by 2 * lr * d / eps. With Adam's usual eps of 1e-8
# the only bound is 2 * lr where the gradient is rounding noise (a key's bias moves all scores of a row nearly
# alike): its sign is random. With eps = lr it is 2 d per step: 2e-6 in five for d = 2e-7, three roundings of
# float32 of the gradients here, which are below 1.
NEAR = 2e-6


def prepare(checkpoint, data, rank, world, *more):
    """Return (steps, objective, optimizer, args) of a small run."""
    args = train_sft.parse_args(flags(data, checkpoint, "unused", "--global_batch", "5", *more))
    torch.manual_seed(0)
    qwen, examples, target = load_examples(checkpoint, data, args.imagination)
    qwen.model.model.visual.requires_grad_(args.train_vision)
    batching = Batching(args.seed, args.global_batch, args.max_tokens, args.batch_size, args.train_vision)
    objective = Objective(qwen, target.spec).train()
    if world > 1:
        shard(objective, qwen.model, low_precision=False)
    optimizer = make_optimizer(qwen.model, args.learning_rate, args.weight_decay)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    return Steps(qwen, examples, target, batching, rank, world), objective, optimizer, args


def gradients(objective) -> dict[str, torch.Tensor]:
    """Return all gradients by name, whole; every rank must call."""
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in objective.model.named_parameters() if p.grad is not None}


def check_near(tensors, expected, bound):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensors[name] - tensor).abs().max() < bound, name


def run(steps, objective, optimizer, args, first, last) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train steps first to last - 1; return their losses, this rank's share, and the first gradients."""
    curve, first_gradients = [], None
    packed = nullcontext() if steps.target.spec else use_packed_attention(objective.model)
    recompute = args.recompute if steps.world > 1 and args.recompute else "none"
    with packed, recompute_activations(objective.model, recompute):
        for step in range(first, last):
            work, total = steps.work(step), 0.0
            for k in range(work.micro_steps):
                batch = steps[step, k]
                losses, _, aligned = objective(batch)
                nll = losses.sum() * batch["weight"]
                loss = nll / work.trained_tokens + aligned / max(1, work.segments)
                (loss * steps.world).backward()
                total += float(loss.detach())
            if args.train_vision:
                average_replicated([p for p in objective.parameters() if p.requires_grad])
            first_gradients = first_gradients or gradients(objective)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(total)
    return curve, first_gradients


def rank_main(rank, world, folder, checkpoint, data, more, expected):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    steps, objective, optimizer, args = prepare(checkpoint, data, rank, world, *more)
    model, tower_runs = objective.model, []
    model.model.visual.blocks[0].register_forward_hook(
        lambda module, inputs, out: tower_runs.append(out.requires_grad))
    curve, first_gradients = run(steps, objective, optimizer, args, 0, 3)
    # two orders of the same sums: 1e-5 of the largest gradient is about a hundred roundings of float32
    largest = max(float(tensor.abs().max()) for tensor in expected["gradients"].values())
    check_near(first_gradients, expected["gradients"], 1e-5 * largest)
    curve = torch.tensor(curve)
    dist.all_reduce(curve)
    assert curve.tolist() == pytest.approx(expected["curve"], rel=1e-5)
    if not more:
        batches = [steps[step, k] for step in range(3) for k in range(steps.work(step).micro_steps)]
        # once per pack with an image, without gradients
        assert tower_runs == [False] * sum("pixel_values" in batch for batch in batches)
    saver = Saver(rank, world)
    saver.submit(saver.checkpoint, folder / "step-3", snapshot(model, optimizer, rank), {"step": 3},
                 lambda: None)
    saver.close()
    dist.barrier()
    onward, _ = run(steps, objective, optimizer, args, 3, 5)
    again = prepare(checkpoint, data, rank, world, *more)
    restore(folder / "step-3", again[1].model, again[2])
    assert run(*again, 3, 5)[0] == onward  # to the bit
    state = whole_state(model, torch.float32, rank == 0)
    assert bool(state) == (rank == 0)
    if rank == 0:
        check_near(state, expected["state"], NEAR)
    dist.destroy_process_group()


@pytest.mark.parametrize("more", [(), ("--train_vision", "--recompute", "layers"),
                                  ("--imagination", "latent", "--recompute", "mlps")])
def test_two_ranks_equal_one_process_and_resume_to_the_bit(tiny_checkpoint, data, tmp_path, more):
    """Some packs have text alone (rows 0, 4 and 8 have no picture), with or without a picture on the other
    rank."""
    one = prepare(tiny_checkpoint, data, 0, 1, *more)
    curve, first_gradients = run(*one, 0, 3)
    run(*one, 3, 5)
    expected = {"curve": curve, "gradients": first_gradients,
                "state": whole_state(one[1].model, torch.float32, True)}
    mp.spawn(rank_main, args=(2, tmp_path, tiny_checkpoint, data, more, expected), nprocs=2)
    again = prepare(tiny_checkpoint, data, 0, 1, *more)  # one process reads what two ranks wrote
    restore(tmp_path / "step-3", again[1].model, again[2])
    run(*again, 3, 5)
    check_near(whole_state(again[1].model, torch.float32, True), expected["state"], NEAR)


def low_precision_rank(rank, folder, checkpoint, data):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    qwen, examples, target = load_examples(checkpoint, data, dtype="bfloat16")
    qwen.model.model.visual.requires_grad_(False)
    batch = Steps(qwen, examples, target, Batching(global_batch=6, max_tokens=300), 0, 1)[0, 0]
    objective = Objective(qwen, None).train()
    shard(objective, qwen.model, low_precision=True)
    with use_packed_attention(qwen.model):
        losses, _, _ = objective(batch)
        losses.sum().backward()
    trained = [p for p in qwen.model.parameters() if p.requires_grad]
    assert losses.dtype == torch.float32  # accelerate's default policy would round it
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in qwen.model.model.visual.parameters()} == {torch.bfloat16}
    exact, _, _ = load_examples(checkpoint, data)
    with use_packed_attention(exact.model):
        reference, _, _ = Objective(exact, None)(batch)
    assert torch.allclose(losses, reference, rtol=0.02) and not torch.equal(losses, reference)


def test_in_low_precision_loss_gradients_and_master_weights_are_float32(tiny_checkpoint, data, tmp_path):
    mp.spawn(low_precision_rank, args=(tmp_path, tiny_checkpoint, data), nprocs=1)


@pytest.mark.parametrize("which", train_sft.RECOMPUTED)
def test_recomputation_is_undone(tiny_checkpoint, data, which):
    model = load_examples(tiny_checkpoint, data)[0].model
    layers = model.model.language_model.layers
    with recompute_activations(model, which):
        assert ["forward" in vars(layer) for layer in layers] == [which == "layers", False]
        assert ["forward" in vars(layer.mlp) for layer in layers] == [which == "mlps"] * 2
    assert not any("forward" in vars(module) for module in model.modules())


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
