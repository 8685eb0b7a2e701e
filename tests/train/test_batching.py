"""The rows of a step: the same whatever the devices, and a loss that is one mean over all.    pytest
tests/test_steps.py"""
import pytest
import torch
from training import gradient

import train_sft
from utils import qwen as Q
from utils.jsonl import read_rows
from utils.latent_families import PRESETS
from utils.train.batching import Batching, Steps
from utils.train.examples import Target, make_examples
from utils.train.packing import use_packed_attention

pytestmark = pytest.mark.numeric


@pytest.fixture
def steps(tiny_checkpoint, data):
    """Return make(rank, world, latent, settings...) -> Steps over twelve rows of unequal length."""
    def make(rank=0, world=1, latent=False, **more):
        settings = {"seed": 42, "global_batch": 6, "max_tokens": 300, "batch_size": 2} | more
        spec = PRESETS["mirage"] if latent else None
        qwen, target = Q.load(str(tiny_checkpoint), device="cpu"), Target("latent" if latent else "text",
                                                                          str(data.parent), spec)
        if spec:
            Q.add_tokens(qwen, spec.tokens)
        return Steps(qwen, make_examples(qwen, read_rows(data, {}), target), target, Batching(**settings),
                     rank, world)
    return make


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_step_has_the_same_rows_on_any_number_of_devices(steps, world, latent):
    one, many = steps(0, 1, latent), steps(0, world, latent)
    for step in range(4):
        alone, plan = one.plan(step), many.plan(step)
        assert sorted(i for ranks in plan for its in ranks
                      for i in its) == sorted(i for ranks in alone for its in ranks for i in its)
        assert all(len(ranks) == world for ranks in plan)
        assert one.work(step).norm == many.work(step).norm and one.work(step).tokens == many.work(step).tokens
    # an epoch
    assert sorted(i for step in (0, 1) for ranks in one.plan(step) for its in ranks
                  for i in its) == list(range(12))
    assert one.plan(0) != one.plan(2)  # the next epoch is shuffled anew


@pytest.mark.parametrize("norm", ["token", "row"])
def test_accumulation_and_devices_change_no_gradient(steps, norm):
    """One pack, a row a pack, two and three devices: the sum of what every device computes is the same
    gradient. Oracle for "token": the mean over the step's trained tokens, row by row; for "row": the mean of
    the rows' means."""
    results = []
    for world, max_tokens in ((1, 10_000), (1, 170), (2, 300), (3, 170)):
        ranks = [steps(rank, world, max_tokens=max_tokens, loss_norm=norm) for rank in range(world)]
        objective, work = train_sft.Objective(ranks[0].qwen, None, "cosine"), ranks[0].work(0)
        assert work.micro_steps == len(ranks[0].plan(0)) and 0 < work.balance <= 1
        total, by_row = 0.0, {}
        with use_packed_attention(objective.model):
            for rank in ranks:
                for batch in (rank[0, k] for k in range(work.micro_steps)):
                    losses, _, _ = objective(batch)
                    loss = (losses * batch["weight"]).sum() / work.norm
                    loss.backward()
                    total += loss.item()
                    for n, name in enumerate(batch["row_ids"]):
                        if (its := losses[(batch["row"] == n) & (batch["weight"] > 0)].tolist()):
                            by_row[name] = its
        means = [sum(its) / len(its) for its in by_row.values()]
        expected = sum(means) / len(means) if norm == "row" else sum(map(sum, by_row.values())) / sum(
            map(len, by_row.values()))
        assert total == pytest.approx(expected, rel=1e-5) and len(by_row) == 6
        results.append(gradient(objective.model))
    for its in results[1:]:
        assert (its - results[0]).norm() < 1e-5 * results[0].norm()


@pytest.mark.parametrize("latent", [False, True])
def test_work_is_what_the_batches_hold(steps, latent):
    """The counts that the plan gives without loading an image equal those of the batches themselves."""
    ranks = [steps(rank, 2, latent) for rank in range(2)]
    for step in range(2):
        work = ranks[0].work(step)
        batches = [rank[step, k] for rank in ranks for k in range(work.micro_steps)]
        real = [batch for batch in batches if float(batch["weight"].sum())]
        n_tokens = sum(int(batch["attention_mask"].sum()) if latent else batch["input_ids"].numel()
                       for batch in real)
        assert n_tokens == work.tokens and sum(float(batch["weight"].sum()) for batch in batches) == work.norm
        assert sum(len(batch.get(name, ())) for batch in real
                   for name in ("image_grid_thw", "step_image_grid_thw")) == work.images
        if latent:
            assert sum(float(batch["latent_weight"].sum()) for batch in batches) == work.segments > 0
            for k in range(work.micro_steps):  # sharded devices must run as many passes
                assert len({len(rank[step, k]["blocks"]) for rank in ranks}) == 1


def test_batches_come_in_order_from_workers_too(steps):
    plain = [batch["row_ids"] for batch in steps().ahead(1, 4)]
    assert plain == [batch["row_ids"] for batch in steps(num_workers=2).ahead(1, 4)]
    assert torch.get_num_threads() >= 1 and len(plain) == sum(len(steps().plan(step)) for step in (1, 2, 3))
