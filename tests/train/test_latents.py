"""Latents in training: packs against one row at a time, the vectors that decoding feeds, alignment."""
import random

import pytest
import torch
from decoding import generate
from training import gradient, load_examples, summed

from speed.padded import PaddedObjective, make_batch
from utils import qwen as Q
from utils.jsonl import write_rows
from utils.latent_families import PRESETS, pool_features, spec_of, special_id
from utils.train.batching import recompute_activations
from utils.train.examples import Target, load_images, make_examples, make_pack, plan_passes
from utils.train.model import Objective, align, run_packed, use_packed_attention
from utils.train.weights import add_tokens

pytestmark = pytest.mark.numeric

MIRAGE = PRESETS["mirage"]


@pytest.fixture(params=["tiny_checkpoint", "tiny_qwen3"])
def latent(request, data):
    """(qwen, examples, target) of twelve rows, eight of which imagine."""
    return load_examples(request.getfixturevalue(request.param), data, "latent")


def test_the_passes_of_three_rows_by_hand():
    """Rows t t t z z t t, t z z t t t t and t t."""
    is_latent, predicting = torch.zeros(16, dtype=torch.bool), torch.tensor([5, 10, 11, 14])
    is_latent[[3, 4, 8, 9]] = True
    passes, kept_at = plan_passes(is_latent, torch.tensor([7, 14, 16]), predicting, 2)
    tokens = [[0, 1, 2, 7, 14, 15], [3, 8], [4, 9], [5, 6, 10, 11, 12, 13]]
    assert [part["tokens"].tolist() for part in passes] == tokens
    assert [part["kept"].tolist() for part in passes] == [[2, 3, 4], [0, 1], [1], [0, 2, 3]]
    assert [part["fed"] if part["fed"] is None else part["fed"].tolist() for part in passes] == [
        None, [0, 1], [0, 1], None]
    assert [passes[n]["keys"].tolist() for n in (0, 1, 3)] == [
        [0, 1, 2, 3, 4, 5], [[0, 1, 2], [3, -1, -1]], [0, 1, 2, 6, 8, 10, 11, 3, 7, 9, 12, 13, 14, 15]]
    assert "keys" not in passes[2]
    assert [passes[n]["cu_seqlens_q"].tolist() for n in (0, 3)] == [[0, 3, 4, 6], [0, 2, 6]]
    assert [passes[n]["cu_seqlens_k"].tolist() for n in (0, 3)] == [[0, 3, 4, 6], [0, 7, 14]]
    assert [(passes[n]["max_length_q"], passes[n]["max_length_k"]) for n in (0, 3)] == [(3, 3), (4, 7)]
    assert kept_at[[2, 7, 14, 3, 8, *predicting.tolist()]].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 2]


def imagining_rows(folder, picture, seed, n_rows=5):
    """Write rows of 0 to 3 imagined images at any place, with 0 to 2 pictures, texts of any length."""
    rng, rows = random.Random(seed), []

    def words():
        return " ".join(["closer"] * rng.randint(1, rng.choice((2, 40))))

    def draw(name):
        picture(name, (28 * rng.randint(4, 7), 28 * rng.randint(4, 9)), rng.choice(("red", "blue")))
        return name

    for n in range(n_rows):
        steps = [step for k in range(rng.randint(0, 3))
                 for step in [{"text": words()}] * rng.randint(0, 1) + [
                     {"image": draw(f"{n}_step_{k}.png"), "operation": "zoom", "caption": "a thing"}]]
        rows.append({"id": f"t/{n}", "subset": "t", "question": f"What is {words()}?", "answer": str(n),
                     "images": [draw(f"{n}_{k}.png") for k in range(rng.randint(0, 2))],
                     "steps": [*steps, {"text": f"The answer is \\boxed{{{n}}}. {words()}"}], "chain": "a"})
    write_rows(folder / "rows.jsonl", rows)
    return rows


def sequential(qwen, example, target, align_loss="cosine", detach=False):
    """Return what an Objective does of a row, from forwards over the whole row without a cache: each latent
    is the last state of a forward up to it."""
    model, spec = qwen.model, target.spec
    images, steps = (Q.process_images(qwen.image_processor, load_images(paths, target, qwen.factor))
                     for paths in (example.images, example.steps))
    batch = Q.collate(qwen, [example.ids], [images])
    ids, positions = batch["input_ids"], batch["position_ids"]
    rows, latents = list(model.get_input_embeddings()(ids)[0]), []
    kinds = (ids == special_id(qwen.tokenizer, Q.IMAGE_TOKEN)).int()

    def states(n):
        out = model.model(inputs_embeds=torch.stack(rows[:n])[None], position_ids=positions[..., :n],
                          mm_token_type_ids=kinds[:, :n], use_cache=False, **(images or {}))
        return out.last_hidden_state[0]

    for place in (ids[0] == special_id(qwen.tokenizer, spec.pad)).nonzero().flatten().tolist():
        latents.append(states(place)[-1])
        rows[place] = latents[-1].detach() if detach else latents[-1]
    first = len(rows) - len(example.trained)  # images were expanded, all before the first trained token
    trained = torch.tensor([first + n for n, is_trained in enumerate(example.trained) if is_trained])
    logits, labels, aligned = model.lm_head(states(len(rows))[trained - 1]), ids[0][trained], torch.zeros(())
    if latents:
        pack = {"weight": 1.0, **{f"step_{name}": tensor for name, tensor in steps.items()}}
        aligned = align(qwen, pack, torch.stack(latents).unflatten(0, (-1, spec.size)), align_loss)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(-1) == labels, aligned


@pytest.mark.parametrize("seed, family, size, align_loss", [
    (0, "mirage", None, "cosine"), (1, "mirage", 1, "mse"), (2, "lvr", None, "mse"), (3, "lvr", 2, "cosine"),
    (4, "monet_vllm", 5, "cosine"), (5, "monet_capimagine", 3, "mse")])
def test_a_pack_has_the_loss_and_the_gradient_of_its_rows(tiny_checkpoint, tmp_path, picture, seed, family,
                                                          size, align_loss):
    """Rows at once, a few at a time and alone, with more segments than they have, and recomputed."""
    target = Target("latent", str(tmp_path), spec_of(family, size))
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    add_tokens(qwen, target.spec.tokens)
    examples = make_examples(qwen, imagining_rows(tmp_path, picture, seed), target)
    objective = Objective(qwen, align_loss)
    sums, expected, hits = summed(qwen.model, (sequential(qwen, example, target, align_loss)
                                               for example in examples))
    assert sums.min() > 0
    padded = PaddedObjective(qwen, target.spec.size, align_loss)(make_batch(qwen, examples, target))
    assert torch.allclose(torch.stack([padded[0].sum(), padded[2]]), sums, rtol=1e-6)  # what speed/ compares
    for size, n_segments, recompute in ((5, 0, "none"), (3, 4, "none"), (5, 0, "mlps"), (5, 4, "layers"),
                                        (1, 0, "layers")):
        with use_packed_attention(qwen.model), recompute_activations(qwen.model, recompute):
            packs = [make_pack(qwen, examples[k:k + size], target, n_segments=n_segments)
                     for k in range(0, 5, size)]
            its_sums, gradient, its_hits = summed(qwen.model, map(objective, packs))
        assert torch.allclose(its_sums, sums, rtol=1e-6) and its_hits == hits
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
        passes = {len(pack["passes"]) for pack in packs}
        assert not n_segments or passes == {4 * (target.spec.size + 1) + 1}


def test_training_feeds_the_latents_that_decoding_feeds(latent):
    """The vectors of the training pass equal those of utils.decode after the same words."""
    qwen, examples, target = latent
    chosen = [example for example in examples if example.steps][:4]
    pack = make_pack(qwen, chosen, target)
    with torch.no_grad(), use_packed_attention(qwen.model):
        latents = run_packed(qwen.model, pack)[pack["latents"]]
    pad_id, start_id = (special_id(qwen.tokenizer, name) for name in (MIRAGE.pad, MIRAGE.start))
    for i, example in enumerate(chosen):
        cut = example.ids.index(pad_id)  # everything up to the start marker is the prompt
        pixels = [Q.process_images(qwen.image_processor, load_images(example.images, target, qwen.factor))]
        prompt = Q.collate(qwen, [example.ids[:cut - 1]], pixels)
        with torch.no_grad():  # make the start marker the sampled token, then decode
            qwen.model.lm_head.weight.zero_()
            qwen.model.lm_head.weight[start_id] = generate(qwen, prompt, 1, capture=True)[0].states[0]
        row = generate(qwen, prompt, 6, MIRAGE, capture=True)[0]
        assert row.ids[0] == start_id and row.fed.shape == (4, 32)
        assert torch.allclose(row.fed, latents[i], atol=1e-4)


def test_pooled_features_are_means_of_consecutive_tokens():
    features = torch.tensor([[1.0, 0], [3, 0], [5, 2], [7, 4], [100, 100]])
    assert pool_features(features, 2).tolist() == [[2, 0], [6, 3]]  # the fifth is dropped
    assert torch.equal(pool_features(features, 5), features)
    with pytest.raises(ValueError, match="5 visual tokens, fewer than 6 latents"):
        pool_features(features, 6)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_alignment_by_hand(latent, loss):
    qwen, examples, target = latent
    chosen = [example for example in examples if example.steps][:1]
    pack, states = make_pack(qwen, chosen, target), torch.randn(1, 4, 32)
    features = Q.image_features(qwen, {"pixel_values": pack["step_pixel_values"],
                                       "image_grid_thw": pack["step_image_grid_thw"]})[0]
    assert len(features) == 6  # 56 x 84 pixels; four groups of one each, the remainder dropped
    expected = 0.0
    for z, feature in zip(states[0], features):
        expected += (1 - z @ feature / z.norm() / feature.norm() if loss == "cosine"
                     else (z - feature).pow(2).mean()) / 4
    with torch.no_grad():
        assert float(align(qwen, pack, states, loss)) == pytest.approx(float(expected), rel=1e-4)
        assert float(align(qwen, pack | {"weight": 0.0}, states, loss)) == 0  # a row that does not count


def test_without_alignment_latents_learn_through_the_answer_alone(latent):
    """Mirage's stage 2. Oracle: `sequential`; with its latents cut off from the gradient, another one."""
    qwen, examples, target = latent
    example = next(example for example in examples if example.steps and example.images)
    with use_packed_attention(qwen.model):
        loss, _, aligned = Objective(qwen)(make_pack(qwen, [example], target))
        (loss.sum() + 0.0 * aligned).backward()
    found = gradient(qwen.model)
    results = []
    for detach in (False, True):
        qwen.model.zero_grad()
        expected = sequential(qwen, example, target, detach=detach)[0].sum()
        expected.backward()
        assert float(expected.detach()) == pytest.approx(float(loss.detach().sum()), rel=1e-5)
        results.append(gradient(qwen.model))
    assert (found - results[0]).norm() < 1e-4 * results[0].norm()
    assert (found - results[1]).norm() > 1e-2 * results[1].norm()
