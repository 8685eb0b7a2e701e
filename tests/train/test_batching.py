"""The rows of a step on any number of devices; operations and memory against counters and by hand."""
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import make_qwen3
from torch.utils.flop_counter import FlopCounterMode
from training import gradient, load_examples
from transformers import AutoConfig

from toy.make_model import make_model
from utils import qwen as Q
from utils.items import END_OF_TURN
from utils.latent_families import special_id
from utils.train.batching import (Batching, Steps, count_parameters, device_memory, estimate_memory,
                                  memory_lines, peak_flops, training_flops)
from utils.train.examples import Target, plan_passes
from utils.train.model import Objective, run_packed, use_packed_attention
from utils.train.weights import choose_trained, gradients_from_embedding

pytestmark = pytest.mark.numeric

SMALLER = "a smaller --max_tokens than 8192 or --recompute layers"


@pytest.fixture
def steps(tiny_checkpoint, data):
    """Return make(rank, world, imagination, settings...) -> Steps over twelve rows of unequal length."""
    def make(rank=0, world=1, imagination="text", **more):
        settings = Batching(**{"global_batch": 6, "max_tokens": 300} | more)
        return Steps(*load_examples(tiny_checkpoint, data, imagination), settings, rank, world)
    return make


def rows_of(plan):
    return sorted(i for ranks in plan for rows in ranks for i in rows)


@pytest.mark.parametrize("imagination", ["text", "latent"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_step_has_the_same_rows_on_any_number_of_devices(steps, world, imagination):
    one, many = steps(0, 1, imagination), steps(0, world, imagination)
    for step in range(4):
        assert rows_of(one.plan(step)) == rows_of(many.plan(step))
        assert all(len(ranks) == world for ranks in many.plan(step))
        first, second = one.work(step), many.work(step)
        assert (first.tokens, first.trained_tokens) == (second.tokens, second.trained_tokens)
    assert sorted(rows_of(one.plan(0)) + rows_of(one.plan(1))) == list(range(12))  # an epoch
    assert one.plan(0) != one.plan(2)  # the next epoch is in another order


def test_accumulation_and_devices_change_no_gradient(steps):
    """One pack, a pack per row, two and three devices. Oracle for the loss: the mean over trained tokens."""
    results = []
    for world, max_tokens in ((1, 10_000), (1, 170), (2, 300), (3, 170)):
        ranks = [steps(rank, world, max_tokens=max_tokens) for rank in range(world)]
        objective, work = Objective(ranks[0].qwen), ranks[0].work(0)
        assert work.micro_steps == len(ranks[0].plan(0)) and 0 < work.balance <= 1
        total, by_row = 0.0, {}
        with use_packed_attention(objective.model):
            for batch in (rank[0, k] for rank in ranks for k in range(work.micro_steps)):
                losses, _, _ = objective(batch)
                loss = losses.sum() * batch["weight"] / work.trained_tokens
                loss.backward()
                total += loss.item()
                for n, name in enumerate(batch["row_ids"] if batch["weight"] else []):
                    by_row[name] = losses[batch["row"] == n].tolist()
        expected = sum(map(sum, by_row.values())) / sum(map(len, by_row.values()))
        assert total == pytest.approx(expected, rel=1e-5) and len(by_row) == 6
        results.append(gradient(objective.model))
    for result in results[1:]:
        assert (result - results[0]).norm() < 1e-5 * results[0].norm()


@pytest.mark.parametrize("imagination", ["text", "latent"])
def test_work_is_what_the_batches_hold(steps, imagination):
    """The counts of the plan, made without loading an image, equal those of the batches."""
    ranks = [steps(rank, 2, imagination) for rank in range(2)]
    end_id = special_id(ranks[0].qwen.tokenizer, END_OF_TURN)
    for step in range(2):
        work = ranks[0].work(step)
        batches = [rank[step, k] for rank in ranks for k in range(work.micro_steps)]
        real = [batch for batch in batches if batch["weight"]]
        # a rank whose rows imagine less than the other's continues after the end of its last row
        n_tokens = sum(int((batch["input_ids"][0] == end_id).nonzero()[-1]) + 1 for batch in real)
        assert n_tokens == work.tokens and sum(len(batch["labels"]) for batch in real) == work.trained_tokens
        assert sum(len(batch.get(name, ())) for batch in real
                   for name in ("image_grid_thw", "step_image_grid_thw")) == work.images
        if imagination == "latent":
            assert sum(len(batch["latents"]) for batch in real) == work.segments > 0
            for k in range(work.micro_steps):  # sharded devices must run the same number of passes
                assert len({len(rank[step, k]["passes"]) for rank in ranks}) == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.5), (0.01, 3.0), (1.5, 1.0)])
def test_files_are_mixed_by_weight(weights):
    """Every epoch holds a weight's share of each file, whose rows are drawn equally often, or once more."""
    files = [0] * 10 + [1] * 7
    examples = [SimpleNamespace(n_tokens=1) for _ in files]
    steps = Steps(None, examples, Target(), Batching(global_batch=4), 0, 1, files, weights)
    again = Steps(None, examples, Target(), Batching(global_batch=4), 1, 2, files, weights)
    shares, counts = [max(1, round(10 * weights[0])), max(1, round(7 * weights[1]))], Counter()
    assert steps.per_epoch == math.ceil(sum(shares) / 4)
    for epoch in range(9):
        order = steps.order(epoch)
        assert order == again.order(epoch)
        assert [sum(i < 10 for i in order), sum(i >= 10 for i in order)] == shares
        counts.update(order)
        for rows in (range(10), range(10, 17)):
            assert max(counts[i] for i in rows) - min(counts[i] for i in rows) <= 1
    drawn = [i for step in range(steps.per_epoch) for k in steps.plan(step) for rank in k for i in rank]
    assert sorted(drawn) == sorted(steps.order(0)) and steps.order(0) != steps.order(1)


def test_batches_come_in_order_from_workers_too(steps):
    in_process = [batch["row_ids"] for batch in steps().ahead(1, 4)]
    assert in_process == [batch["row_ids"] for batch in steps(num_workers=2).ahead(1, 4)]
    assert len(in_process) == sum(len(steps().plan(step)) for step in (1, 2, 3))


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("train_vision", [None, "all", "merger", "merger_only"])
def test_operations_are_within_a_tenth_of_torch_s_counter(tmp_path, family, train_vision):
    """The counter counts masked attention too, which is a small share here."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2}
    vision_sizes = {"depth": 3, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4}
    make_model(["a red circle"] * 4, tmp_path / "qwen2_5", 300, 0, sizes, vision_sizes)
    if family == "qwen3":
        make_qwen3(tmp_path / "qwen2_5", tmp_path / family, sizes, vision_sizes)
    qwen = Q.load(str(tmp_path / family), device="cpu")
    choose_trained(qwen.model, train_vision)
    config, image_id = qwen.model.config, special_id(qwen.tokenizer, Q.IMAGE_TOKEN)
    grids, lengths = [(1, 8, 8), (1, 8, 16)], [70, 90]
    ids = torch.full((1, 160), 5)
    ids[0, :16] = ids[0, 70:102] = image_id
    predicting = torch.cat([torch.arange(40, 70), torch.arange(120, 150)])
    ends = torch.tensor(lengths).cumsum(0)
    passes, _ = plan_passes(torch.zeros(160, dtype=torch.bool), ends, predicting, 1)
    pack = {"input_ids": ids, "position_ids": torch.arange(160).expand(3, 1, 160), "passes": passes,
            "pixel_values": torch.randn(64 + 128, 6 * qwen.image_processor.patch_size**2),
            "image_grid_thw": torch.tensor(grids)}
    with (use_packed_attention(qwen.model), gradients_from_embedding(qwen.model),
          FlopCounterMode(display=False) as counter):
        qwen.model.lm_head(run_packed(qwen.model, pack)).sum().backward()
    counted = training_flops(config, lengths, 60, grids, train_vision)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_operations_of_the_released_sizes(shared_data):
    """7B by hand from its config: 6.525 billion weights per token in the layers, of which one MLP has 0.204,
    and 0.545 billion in the head. The last MLP and the head count where something is predicted."""
    config = AutoConfig.from_pretrained(shared_data / "qwen2_5_vl")
    one = training_flops(config, [1], 0, [])
    assert one / 6 == pytest.approx(6.525e9 - 0.204e9, rel=1e-3)
    assert (training_flops(config, [1], 1, []) - one) / 6 == pytest.approx(0.204e9 + 0.545e9, rel=1e-3)
    patches = training_flops(config, [1], 0, [(1, 2, 2)]) - one  # a patch, and its quarter of the merger
    assert patches / 4 / 2 == pytest.approx(631.5e6 + 44.6e6 / 4, rel=0.01)


def test_parameters_are_counted_without_loading_any(tiny_checkpoint):
    counts = count_parameters(Q.load_tools(str(tiny_checkpoint)).config)
    model = Q.load(str(tiny_checkpoint), device="cpu").model
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["tower"] + counts["merger"] == sum(p.numel() for p in model.model.visual.parameters())


def test_memory_of_the_paper_s_run_by_hand(shared_data):
    """7B on 8 GPUs of 80 GB, 8,192 tokens: activations are 1.6 GB of checkpoints and 1.8 GB of one layer."""
    config = AutoConfig.from_pretrained(shared_data / "qwen2_5_vl")
    counts = count_parameters(config)
    assert counts["layers"] + counts["root"] == pytest.approx(7.616e9, rel=1e-3)
    assert counts["tower"] + counts["merger"] == pytest.approx(0.677e9, rel=2e-3)

    def estimate(world=8, recompute="layers", **more):
        parts = estimate_memory(config, 8192, 1800, world, True, recompute, **more)
        return parts, memory_lines(parts, 80e9, SMALLER)[0]

    parts, line = estimate()
    assert parts["weights, gradients, optimizer"] == pytest.approx(15.2e9, rel=0.01)
    assert parts["vision tower"] == pytest.approx(1.35e9, rel=0.01)
    assert parts["activations"] == pytest.approx(3.4e9, rel=0.05)
    assert parts["total"] == pytest.approx(sum(size for name, size in parts.items() if name != "total"))
    assert 28e9 < parts["total"] < 40e9 and line.endswith(": fits")
    assert estimate(world=1)[1].endswith("use more devices, a smaller model, or --lora_rank 64")
    assert estimate(recompute="none")[1].endswith(f"DOES NOT FIT; use {SMALLER}")
    # 28 layers of 8 x 3584 + 4 x 512 numbers per token, and the 4 x 18944 of one MLP
    halfway, line = estimate(recompute="mlps")
    assert halfway["activations"] == 8192 * 2 * (28 * 30720 + 75776) == pytest.approx(15.3e9, rel=0.01)
    assert line.endswith(": fits")
    # latents: two more copies of keys and values, 4 x 512 numbers, for each of two segments
    imagining, _ = estimate(recompute="mlps", n_segments=2)
    assert imagining["activations"] - halfway["activations"] == 8192 * 2 * 28 * 4 * 512 * 2
    adapted, _ = estimate(lora_rank=64)
    assert adapted["weights, gradients, optimizer"] < 0.4 * parts["weights, gradients, optimizer"]


def test_what_is_known_of_devices():
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("NVIDIA A800-SXM4-80GB") == 312e12
    assert peak_flops("Some other device") is None and device_memory(torch.device("cpu")) > 2**30
