"""Latents in training: layout, batches of any size, the vectors that decoding feeds, alignment."""
import pytest
import torch
from decoding import generate
from training import load_examples, summed

from utils import qwen as Q
from utils.latent_families import PRESETS, pool_features, special_id
from utils.train.examples import lay_out, load_images, make_batch, piece_lengths
from utils.train.model import Objective, align, recompute_activations, run_latents

pytestmark = pytest.mark.numeric

MIRAGE = PRESETS["mirage"]


@pytest.fixture
def latent(tiny_checkpoint, data):
    """(qwen, examples, target) of twelve rows, eight of which imagine."""
    return load_examples(tiny_checkpoint, data, "latent")


def test_pieces_share_latent_columns():
    columns, blocks = lay_out([[3, 2], [1, 4], [2]], n_latents=2, n_blocks=2)
    assert blocks == [(0, 3), (5, 9)]
    assert columns == [[0, 1, 2, 3, 4, 7, 8], [2, 3, 4, 5, 6, 7, 8], [1, 2]]
    assert lay_out([[3], [1]], n_latents=2, n_blocks=3) == ([[0, 1, 2], [2]], [(0, 3), (5, 6), (8, 9)])
    assert piece_lengths([1, 1, 9, 9, 4, 9, 9], pad_id=9, n_latents=2) == [2, 1, 0]


def test_batch_size_more_blocks_and_recomputation_leave_loss_and_gradient(latent):
    """Oracle: the sums over rows one by one."""
    qwen, examples, target = latent
    objective = Objective(qwen, MIRAGE)
    results = [summed(qwen.model, [objective(make_batch(qwen, examples[k:k + size], target, n_blocks=blocks))
                                   for k in range(0, 12, size)])
               for size, blocks in ((1, None), (5, None), (12, None), (5, 4))]
    with recompute_activations(qwen.model, "mlps"):
        results.append(summed(qwen.model, [objective(make_batch(qwen, examples, target))]))
    (expected_sums, expected, hits), *others = results
    for sums, its_gradient, its_hits in others:
        assert torch.allclose(sums, expected_sums, rtol=1e-5) and sum(its_hits) == sum(hits)
        assert (its_gradient - expected).norm() < 1e-5 * expected.norm()


def test_training_feeds_the_latents_that_decoding_feeds(latent):
    """The vectors of the training pass equal those of utils.decode after the same words."""
    qwen, examples, target = latent
    chosen = [example for example in examples if example.steps][:4]
    with torch.no_grad():
        _, latents = run_latents(qwen.model, make_batch(qwen, chosen, target), MIRAGE)
    pad_id, start_id = (special_id(qwen.tokenizer, name) for name in (MIRAGE.pad, MIRAGE.start))
    for i, example in enumerate(chosen):
        cut = example.ids.index(pad_id)  # everything up to the start marker is the prompt
        pixels = [Q.process_images(qwen.image_processor, load_images(example.images, target, 28))]
        prompt = Q.collate(qwen, [example.ids[:cut - 1]], pixels)
        with torch.no_grad():  # make the start marker the sampled token, then decode
            qwen.model.lm_head.weight.zero_()
            qwen.model.lm_head.weight[start_id] = generate(qwen, prompt, 1, capture=True)[0].states[0]
        row = generate(qwen, prompt, 6, MIRAGE, capture=True)[0]
        assert row.ids[0] == start_id and row.fed.shape == (4, 32)
        assert torch.allclose(row.fed, torch.stack([step[i] for step in latents[0]]), atol=1e-4)


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
    batch, states = make_batch(qwen, chosen, target), [torch.randn(1, 32) for _ in range(4)]
    features = Q.image_features(qwen, {"pixel_values": batch["step_pixel_values"],
                                       "image_grid_thw": batch["step_image_grid_thw"]})[0]
    assert len(features) == 6  # 56 x 84 pixels; four groups of one each, the remainder dropped
    expected = 0.0
    for state, feature in zip(states, features):
        z = state[0]
        expected += (1 - z @ feature / z.norm() / feature.norm() if loss == "cosine"
                     else (z - feature).pow(2).mean()) / 4
    with torch.no_grad():
        assert float(align(qwen, batch, [states], loss)) == pytest.approx(float(expected), rel=1e-4)
        assert float(align(qwen, batch | {"weight": 0.0}, [states], loss)) == 0  # a row that does not count
