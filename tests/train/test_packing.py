"""Packing: plans by their properties, gradients of a pack against those of its rows, a leak avoided."""
import random

import pytest
import torch
from training import library_loss, load_examples, summed

import utils.train.model
from train_sft import RECOMPUTED
from utils import qwen as Q
from utils.jsonl import DataError, read_rows, write_rows
from utils.train.batching import plan_packs, recompute_activations
from utils.train.examples import Target, image_grids, load_images, make_pack
from utils.train.model import NAME, Objective, run_packed, use_packed_attention

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("cap", [4096, 8192])
def test_a_plan_holds_every_row_once_under_the_cap_and_in_balance(world, cap):
    """Lengths as in the paper's data: mean about 1,550 tokens, 95 % under 2,500."""
    rng = random.Random(world + cap)
    lengths = [min(3260, max(300, int(rng.gauss(1550, 550)))) for _ in range(128)]
    packs = plan_packs(lengths, cap, world)
    assert sorted(i for step in packs for rank in step for i in rank) == list(range(128))
    assert all(len(step) == world for step in packs)
    loads = [[sum(lengths[i] for i in rank) for rank in step] for step in packs]
    assert max(map(max, loads)) <= cap
    assert sum(lengths) / sum(world * max(step) for step in loads) > (0.97 if cap == 8192 else 0.93)
    assert packs == plan_packs(lengths, cap, world)


def test_small_plans():
    assert plan_packs([5], 5, 1) == [[[0]]]
    assert plan_packs([5], 5, 2) == [[[0], []]]  # a rank without a row
    assert plan_packs([3, 3, 3], 6, 1) == [[[0, 2]], [[1]]]
    assert plan_packs([4, 4, 4], 6, 1) == [[[0]], [[1]], [[2]]]  # two bins would hold the tokens
    with pytest.raises(ValueError, match="a row of 7 tokens does not fit into 6"):
        plan_packs([3, 7], 6, 1)


@pytest.fixture(params=["tiny_checkpoint", "tiny_qwen3"])
def rows(request, data):
    """(qwen, examples, target): five rows of unequal length with 1, 2, 0, 1 and 3 images."""
    write_rows(data, [row | {"images": [f"{n}_{k}.png" if k < 2 else "9_0.png" for k in range(n_images)]}
                      for n, (row, n_images) in enumerate(zip(read_rows(data, {}), (1, 2, 0, 1, 3)))])
    return load_examples(request.getfixturevalue(request.param), data)


REPLACED = {"none": set(), "layers": {"layers.0"}, "mlps": {"layers.0.mlp", "layers.1.mlp"}}


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_a_pack_has_the_loss_and_the_gradients_of_its_rows(rows, recompute, monkeypatch):
    """Oracle: the library's loss with labels and its own positions, row by row. Logits are made in chunks."""
    qwen, examples, target = rows
    with torch.no_grad():  # often right: the commonest of the trained tokens
        qwen.model.lm_head.weight[make_pack(qwen, examples, target)["labels"].mode().values] *= 4
    loss, expected, hits = summed(qwen.model, (library_loss(qwen, [example], target) for example in examples))
    positions = {"position_ids": make_pack(qwen, examples, target)["position_ids"]}
    leaked_loss, leaked, _ = summed(qwen.model, [library_loss(qwen, examples, target, **positions)])
    objective, widths = Objective(qwen).train(), []

    def replaced():
        return {name.partition("language_model.")[2] for name, module in qwen.model.named_modules()
                if "forward" in vars(module)}

    qwen.model.lm_head.register_forward_hook(lambda module, inputs, out: widths.append(len(out)))
    for bounds, chunk in (((0, 5), 10_000), ((0, 5), 7), ((0, 2, 3, 5), 30), (range(6), 10_000)):
        monkeypatch.setattr(utils.train.model, "CHUNK", chunk)
        widths.clear()
        packs = [make_pack(qwen, examples[a:b], target) for a, b in zip(bounds, bounds[1:])]
        with use_packed_attention(qwen.model), recompute_activations(qwen.model, recompute):
            assert replaced() == REPLACED[recompute]
            its_loss, its_gradient, its_hits = summed(qwen.model, map(objective, packs))
        assert torch.allclose(its_loss, loss, rtol=1e-6) and its_hits == hits and max(widths) <= chunk
        assert (its_gradient - expected).norm() < 1e-5 * expected.norm() and not replaced()
    assert 0.05 < sum(hits) / len(hits) < 0.9
    # why gradients are compared: the loss hardly shows a leak
    assert torch.allclose(leaked_loss, loss, rtol=0.05)
    assert (leaked - expected).norm() > 0.05 * expected.norm()


def test_a_frozen_tower_runs_once_and_the_last_mlp_where_something_is_predicted(rows):
    qwen, examples, target = rows
    qwen.model.train()
    tower, layers = qwen.model.model.visual.requires_grad_(False), qwen.model.model.language_model.layers
    pack, runs, widths = make_pack(qwen, examples, target), [], []
    tower.blocks[0].register_forward_hook(lambda module, inputs, out: runs.append(out.requires_grad))
    layers[1].mlp.register_forward_hook(lambda module, inputs, out: widths.append(out.shape[1]))
    with use_packed_attention(qwen.model), recompute_activations(qwen.model, "layers"):
        run_packed(qwen.model, pack).sum().backward()
    assert runs == [False] and widths == [len(pack["labels"])]
    assert pack["row"].bincount().tolist() == [example.n_trained for example in examples]
    assert pack["row_ids"] == [example.id for example in examples] and pack["weight"] == 1.0
    [part] = pack["passes"]
    assert part["max_length_q"] == max(example.n_tokens for example in examples)


def test_an_image_that_changed_since_the_plan_is_an_error(rows, picture):
    qwen, examples, target = rows
    picture("0_0.png", (280, 280))
    with pytest.raises(DataError, match=r"t/0: \d+ tokens, expected \d+ from its images' headers"):
        make_pack(qwen, examples, target)


def test_outside_of_its_block_packing_is_refused(rows):
    qwen, examples, target = rows
    pack = make_pack(qwen, examples, target)
    before = qwen.model.config.text_config._attn_implementation
    with pytest.raises(RuntimeError, match="its rows would attend to each other"):
        run_packed(qwen.model, pack)
    with pytest.raises(ValueError, match="takes one sequence with"), use_packed_attention(qwen.model):
        qwen.model(input_ids=pack["input_ids"])
    configs = qwen.model.config, qwen.model.config.text_config, qwen.model.config.vision_config
    assert all(config._attn_implementation == before != NAME for config in configs)


def test_token_counts_come_from_the_headers(tiny_checkpoint, picture):
    qwen, rng = Q.load_tools(str(tiny_checkpoint)), random.Random(0)
    target = Target(image_tokens=60, tokens_per_image=40)
    for n in range(40):
        paths = [picture(f"{n}_{k}.png", (rng.randint(28, 400), rng.randint(28, 400)))
                 for k in range(rng.randint(1, 3))]
        pixels = Q.process_images(qwen.image_processor, load_images(paths, target, 28))
        assert [[1, *grid] for grid in image_grids(qwen, paths, target)] == pixels["image_grid_thw"].tolist()
