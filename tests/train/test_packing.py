"""Packing: plans by their properties, gradients of a pack against those of its rows, a leak avoided."""
import random

import pytest
import torch
from torch import nn
from training import gradient

from train_sft import RECOMPUTED
from utils import qwen as Q
from utils.jsonl import DataError
from utils.train.batching import plan_packs
from utils.train.examples import Target, image_grids, load_images, make_example, make_pack
from utils.train.model import (NAME, packed_attention, recompute_activations, run_packed,
                               use_packed_attention)

pytestmark = pytest.mark.numeric

WORDS = ("what digit is on the red circle closer look I the answer is blue square seven").split()


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


@pytest.fixture
def rows(tiny_checkpoint, picture, tmp_path):
    """(qwen, examples, target): five rows of unequal length with 1, 2, 0, 1 and 3 images."""
    rng, made = random.Random(0), []
    for n, n_images in enumerate((1, 2, 0, 1, 3)):
        names = [f"{n}_{k}.png" for k in range(n_images)]
        for name in names:
            picture(name, (56 + 28 * rng.randint(0, 3), 56 + 28 * rng.randint(0, 3)),
                    rng.choice(("red", "blue")))
        words = " ".join(rng.choices(WORDS, k=rng.randint(4, 20)))
        made.append({"id": f"t/{n}", "images": names, "question": words, "answer": "7", "steps": [],
                     "chain": f"{words[::-1]} <think_image>a {words}</think_image> \\boxed{{{n}}}."})
    target = Target(image_root=str(tmp_path))
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    return qwen, [make_example(qwen, row, target) for row in made], target


def sums(qwen, run, batches):
    """Return (sum of the losses, all gradients in one vector) of batches run one after the other."""
    qwen.model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = nn.functional.cross_entropy(run(qwen.model, batch), batch["labels"], reduction="sum")
        loss.backward()
        total += loss.detach()
    return float(total), gradient(qwen.model)


def packed(model, batch):
    return model.lm_head(run_packed(model, batch))


def stock(model, batch):
    """The library's model: exact on one row, the oracle; in a pack, rows attend to those before them."""
    names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
    inputs = {name: batch[name] for name in names if name in batch}
    if len(batch["cu_seqlens"]) == 2:
        inputs["attention_mask"] = torch.ones_like(batch["input_ids"])
    return model(**inputs, use_cache=False).logits[0, batch["logit_positions"]]


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_a_pack_has_the_loss_and_the_gradients_of_its_rows(rows, recompute):
    qwen, examples, target = rows

    def packs(*cuts):
        return [make_pack(qwen, examples[a:b], target) for a, b in zip((0, *cuts), (*cuts, 5))]

    alone, together = packs(1, 2, 3, 4), packs()
    loss, expected = sums(qwen, stock, alone)
    leaked_loss, leaked = sums(qwen, stock, together)
    qwen.model.train()
    with use_packed_attention(qwen.model), recompute_activations(qwen.model, recompute):
        for batches in (together, packs(2, 3), alone):
            its_loss, its_gradient = sums(qwen, packed, batches)
            assert its_loss == pytest.approx(loss, rel=1e-6)
            assert (its_gradient - expected).norm() < 1e-5 * expected.norm()
    # why gradients are compared: the loss hardly shows a leak
    assert leaked_loss == pytest.approx(loss, rel=0.05)
    assert (leaked - expected).norm() > 0.05 * expected.norm()


def test_the_last_mlp_computes_what_predicts_alone(rows):
    qwen, examples, target = rows
    pack, layers, widths = make_pack(qwen, examples, target), qwen.model.model.language_model.layers, []
    for layer in layers[-2:]:
        layer.mlp.register_forward_hook(lambda module, inputs, out: widths.append(out.shape[1]))
    with use_packed_attention(qwen.model):
        assert len(run_packed(qwen.model, pack)) == len(pack["labels"])
    assert widths == [pack["input_ids"].shape[1], len(pack["labels"])]
    assert "forward" not in vars(layers[-1])  # undone


def test_the_frozen_tower_runs_once_and_without_gradients(rows):
    qwen, examples, target = rows
    qwen.model.train()
    tower, runs = qwen.model.model.visual.requires_grad_(False), []
    tower.blocks[0].register_forward_hook(lambda module, inputs, out: runs.append(out.requires_grad))
    with use_packed_attention(qwen.model), recompute_activations(qwen.model, "layers"):
        sums(qwen, packed, [make_pack(qwen, examples, target)])
    assert runs == [False]


def test_the_pack_s_own_numbers(rows):
    qwen, examples, target = rows
    pack = make_pack(qwen, examples, target)
    lengths = pack["cu_seqlens"].diff().tolist()
    assert lengths == [example.n_tokens for example in examples] and pack["max_length"] == max(lengths)
    assert pack["position_ids"].shape == (3, 1, sum(lengths))
    assert all((pack["position_ids"][:, 0, start] == 0).all() for start in pack["cu_seqlens"][:-1])
    assert pack["input_ids"][0, pack["logit_positions"] + 1].tolist() == pack["labels"].tolist()
    trained = [token for e in examples for token, is_trained in zip(e.ids, e.trained) if is_trained]
    assert pack["labels"].tolist() == trained and pack["weight"] == 1.0
    assert pack["row"].bincount().tolist() == [e.n_trained for e in examples]
    assert pack["row_ids"] == [e.id for e in examples]


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
        packed(qwen.model, pack)
    with pytest.raises(ValueError, match="one sequence with cu_seq_lens_q"), use_packed_attention(qwen.model):
        stock(qwen.model, pack)
    configs = qwen.model.config, qwen.model.config.text_config, qwen.model.config.vision_config
    assert all(config._attn_implementation == before != NAME for config in configs)


def test_attention_equals_the_formula():
    """Oracle: softmax(q k / sqrt(d)) v, row by row, by hand."""
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    bounds = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    for causal in (None, False):
        out, _ = packed_attention(module, query, key, value, None, scaling=0.3, cu_seq_lens_q=bounds,
                                  is_causal=causal)
        assert out.shape == (1, 9, 4, 8)
        for start, end in ((0, 2), (2, 3), (3, 9)):
            for head in range(4):
                q, (k, v) = query[0, head, start:end], (x[0, head // 2, start:end] for x in (key, value))
                scores = 0.3 * q @ k.T
                if causal is None:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
                assert torch.allclose(out[0, start:end, head], scores.softmax(-1) @ v, atol=1e-6)


def test_token_counts_come_from_the_headers(tiny_checkpoint, picture):
    qwen, rng = Q.load_tools(str(tiny_checkpoint)), random.Random(0)
    target = Target(total_tokens=60, image_tokens=40)
    for n in range(40):
        paths = [picture(f"{n}_{k}.png", (rng.randint(28, 400), rng.randint(28, 400)))
                 for k in range(rng.randint(1, 3))]
        pixels = Q.process_images(qwen.image_processor, load_images(paths, target, 28))
        assert [[1, *grid] for grid in image_grids(qwen, paths, target)] == pixels["image_grid_thw"].tolist()
