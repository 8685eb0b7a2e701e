"""FSDP2 on two CPU ranks against one process: losses, weights, the tower, generation.    pytest
tests/test_sharding.py"""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from training import flags

import train_sft
from utils import qwen as Q
from utils.decode import generate
from utils.jsonl import read_rows
from utils.latent_families import PRESETS
from utils.train.batching import Batching, Steps
from utils.train.checkpoints import Saver, restore, take
from utils.train.examples import Target, make_examples
from utils.train.fsdp import average_replicated, gathered, merge_adapters, shard, whole_state
from utils.train.packing import use_packed_attention

pytestmark = pytest.mark.numeric

EPS = 1e-3  # Adam's: the learning rate of these runs
# How far weights may be apart after five steps of Adam, lr * m / (sqrt(v) + eps). Where each gradient may be
# off by d, so may m and sqrt(v), and a step's update by 2 * lr * d / eps. With Adam's own eps of 1e-8 that
# has no bound but 2 * lr where the gradient is itself rounding (a key's bias moves all scores of a row nearly
# alike): the sign of noise. With eps = lr it is 2 d a step: 2e-6 in five for d = 2e-7, three roundings of
# float32 of the gradients here, which are below 1.
NEAR = 2e-6


def batching(args) -> Batching:
    return Batching(args.seed, args.global_batch, args.max_tokens, args.batch_size,
                    train_vision=args.train_vision)


def prepare(checkpoint, data, rank, world, *more):
    """Return (steps, objective, optimizer, args) of a small run."""
    args = train_sft.parse_args(flags(data, checkpoint, "unused", "--global_batch", "5", *more))
    spec = PRESETS["mirage"] if args.imagination == "latent" else None
    torch.manual_seed(0)
    qwen, target = Q.load(str(checkpoint), device="cpu"), Target(args.imagination, str(data.parent), spec)
    if spec:
        Q.add_tokens(qwen, spec.tokens)
    qwen.model.model.visual.requires_grad_(args.train_vision)
    steps = Steps(qwen, make_examples(qwen, read_rows(data, {}), target), target, batching(args), rank, world)
    objective = train_sft.Objective(qwen, spec, "cosine").train()
    if world > 1:
        train_sft.recompute_activations(qwen.model, args.recompute or "none")
        shard(objective, qwen.model, low_precision=False)
    optimizer = train_sft.make_optimizer(qwen.model, args)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    return steps, objective, optimizer, args


def gradients(objective) -> dict[str, torch.Tensor]:
    """All gradients by name, whole; every rank must call."""
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in objective.model.named_parameters() if p.grad is not None}


def check_gradients(mine, its):
    """Two orders of the same sums: within 1e-5 of the largest of all, which is about a hundred roundings of
    float32."""
    assert mine.keys() == its.keys()
    largest = max(float(gradient.abs().max()) for gradient in its.values())
    for name, gradient in its.items():
        assert (mine[name] - gradient).abs().max() < 1e-5 * largest, name


def check_weights(mine, its):
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert (mine[name] - tensor).abs().max() < NEAR, name


def run(steps, objective, optimizer, args, first, last, found=None) -> list[float]:
    """Train steps first to last - 1 and return their losses, this rank's share; `found` takes the first
    step's gradients."""
    with nullcontext() if steps.target.spec else use_packed_attention(objective.model):
        return list(run_steps(steps, objective, optimizer, args, first, last, found))


def run_steps(steps, objective, optimizer, args, first, last, found):
    for step in range(first, last):
        work, total = steps.work(step), 0.0
        for k in range(work.micro_steps):
            batch = steps[step, k]
            losses, _, aligned = objective(batch)
            loss = (losses * batch["weight"]).sum() / work.norm + aligned / max(1, work.segments)
            (loss * steps.world).backward()
            total += float(loss.detach())
        if args.train_vision:
            average_replicated([p for p in objective.parameters() if p.requires_grad])
        if found is not None and not found:
            found.update(gradients(objective))
        optimizer.step()
        optimizer.zero_grad()
        yield total


def rank_main(rank, world, folder, checkpoint, data, more, expected):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    steps, objective, optimizer, args = prepare(checkpoint, data, rank, world, *more)
    model, seen = objective.model, []
    model.model.visual.blocks[0].register_forward_hook(lambda module, inputs,
                                                       out: seen.append(out.requires_grad))
    found = {}
    curve = torch.tensor(run(steps, objective, optimizer, args, 0, 3, found))
    check_gradients(found, expected["gradients"])
    dist.all_reduce(curve)
    assert curve.tolist() == pytest.approx(expected["curve"], rel=1e-5)
    if not more:
        mine = [steps[step, k] for step in range(3) for k in range(steps.work(step).micro_steps)]
        # once a pack with an image, no gradient
        assert seen == [False] * sum("pixel_values" in batch for batch in mine)
    saver = Saver(rank, world)
    saver.checkpoint(folder / "step-3", take(model, optimizer, rank), {"step": 3}, after=lambda: None)
    saver.close()
    dist.barrier()
    onward = run(steps, objective, optimizer, args, 3, 5)
    again = prepare(checkpoint, data, rank, world, *more)
    restore(folder / "step-3", again[1].model, again[2])
    assert run(*again, 3, 5) == onward  # to the bit
    state = whole_state(model, torch.float32, rank == 0)
    assert bool(state) == (rank == 0)
    if rank == 0:
        check_weights(state, expected["state"])
    if not steps.target.spec:
        with torch.no_grad(), gathered(objective):  # ranks that generate different numbers of tokens
            prompt = Q.collate(steps.qwen, [steps.examples[1].ids[:20]], [None])
            objective.eval()  # while it trains, checkpointed layers use no cache
            ids = generate(steps.qwen, prompt, 3 + 4 * rank)[0].ids
            objective.train()
        assert ids == expected["ids"][:len(ids)]
        assert all(map(math.isfinite, run(steps, objective, optimizer, args, 5, 6)))  # and training goes on
    dist.destroy_process_group()


@pytest.mark.parametrize("more", [(), ("--train_vision", "--recompute", "layers"),
                                  ("--imagination", "latent", "--recompute", "mlps")])
def test_two_ranks_equal_one_process_and_resume_to_the_bit(tiny_checkpoint, data, tmp_path, more):
    """Some packs have text alone (rows 0, 4 and 8 have no picture), with or without a picture on the other
    rank."""
    steps, objective, optimizer, args = prepare(tiny_checkpoint, data, 0, 1, *more)
    found = {}
    curve = run(steps, objective, optimizer, args, 0, 3, found)
    run(steps, objective, optimizer, args, 3, 5)
    expected = {"curve": curve, "gradients": found, "state": whole_state(objective.model, torch.float32,
                                                                         True)}
    prompt = Q.collate(steps.qwen, [steps.examples[1].ids[:20]], [None])
    expected["ids"] = generate(steps.qwen, prompt, 7)[0].ids
    mp.spawn(rank_main, args=(2, tmp_path, tiny_checkpoint, data, more, expected), nprocs=2)
    one = prepare(tiny_checkpoint, data, 0, 1, *more)  # what two ranks wrote is read by one
    restore(tmp_path / "step-3", one[1].model, one[2])
    run(*one, 3, 5)
    check_weights(whole_state(one[1].model, torch.float32, True), expected["state"])


def low_precision_rank(rank, folder, checkpoint, data):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    args = train_sft.parse_args(flags(data, checkpoint, "unused"))
    qwen, target = Q.load(str(checkpoint), dtype="bfloat16", device="cpu"), Target("text", str(data.parent))
    qwen.model.model.visual.requires_grad_(False)
    steps = Steps(qwen, make_examples(qwen, read_rows(data, {}), target), target, batching(args), 0, 1)
    objective = train_sft.Objective(qwen, None, "cosine").train()
    shard(objective, qwen.model, low_precision=True)
    with use_packed_attention(qwen.model):
        losses, _, _ = objective(steps[0, 0])
        losses.sum().backward()
    trained = [p for p in qwen.model.parameters() if p.requires_grad]
    assert losses.dtype == torch.float32  # accelerate's default policy would round it
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in qwen.model.model.visual.parameters()} == {torch.bfloat16}
    exact = Q.load(str(checkpoint), device="cpu")
    with use_packed_attention(exact.model):
        reference, _, _ = train_sft.Objective(exact, None, "cosine")(steps[0, 0])
    assert torch.allclose(losses, reference, rtol=0.02) and not torch.equal(losses, reference)


def test_in_low_precision_loss_gradients_and_master_weights_are_float32(tiny_checkpoint, data, tmp_path):
    mp.spawn(low_precision_rank, args=(tmp_path, tiny_checkpoint, data), nprocs=1)


def test_adapters_merge_by_their_formula():
    layer = torch.nn.Module()
    layer.q_proj = torch.nn.Module()
    layer.q_proj.scaling = {"default": 2.0}
    w, a, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    state = {"q_proj.base_layer.weight": w, "q_proj.base_layer.bias": torch.ones(4),
             "q_proj.lora_A.default.weight": a,
             "q_proj.lora_B.default.weight": b, "norm.weight": torch.ones(3)}
    merged = merge_adapters(layer, state, torch.float32)
    assert list(merged) == ["q_proj.weight", "q_proj.bias", "norm.weight"]
    assert torch.allclose(merged["q_proj.weight"], w + 2 * b @ a)
