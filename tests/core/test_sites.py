"""The slot site: what the layers read at latent positions, noted and replaced.    pytest tests/core/test_sites.py
"""
import pytest
import torch
from decoding import MIRAGE, batch_of, load_with

from utils.decode import decode, layer_inputs, prefill
from utils.latent_families import Intervention

pytestmark = pytest.mark.numeric


def slots_of(row):
    """An arm that puts a captured run's layer inputs at the same latent positions."""
    sizes = [segment.size for segment in row.segments]
    return Intervention(slot=lambda segment, step: row.slots[sum(sizes[:segment]) + step])


def test_own_slots_change_nothing_and_a_donors_make_its_keys(tiny_checkpoint):
    """With a donor's layer inputs the keys and values at the latent positions are the donor's, whatever was
    fed there."""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    state = prefill(qwen, batch_of(qwen))
    clean, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, capture=True, with_slots=True)
    flipped = Intervention(feed=lambda z, *place: z.flip(0))
    other, its_end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [flipped] * 2, with_slots=True)
    same, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(clean[0])] * 2, with_logits=True,
                     capture=True)
    assert same[0].ids == clean[0].ids and torch.allclose(same[0].states, clean[0].states, atol=1e-5)
    _, end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(other[0]), Intervention()], capture=True)
    segment = clean[0].segments[0]
    columns = slice(state.mask.shape[1] + segment.start, state.mask.shape[1] + segment.start + segment.size)
    for mine, its in zip(end.cache.layers, its_end.cache.layers):
        assert torch.allclose(mine.keys[0, :, columns], its.keys[0, :, columns], atol=1e-5)
        assert torch.allclose(mine.values[0, :, columns], its.values[0, :, columns], atol=1e-5)
        assert not torch.allclose(mine.values[1, :, columns], its.values[1, :, columns], atol=1e-3)


def test_hooks_are_taken_away_even_after_an_error(tiny_checkpoint):
    qwen = load_with(tiny_checkpoint, MIRAGE)
    layers = qwen.model.model.language_model.layers
    with pytest.raises(RuntimeError), layer_inputs(qwen.model, {0: torch.zeros(len(layers), 32)}):
        assert all(layer._forward_pre_hooks for layer in layers)
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(ValueError, match="states for 1 layers, expected 2"), layer_inputs(
        qwen.model, {0: torch.zeros(1, 32)}):
        pass


def test_what_is_none_is_left_to_the_bit(tiny_checkpoint):
    """A map's cell: no layer put anywhere changes nothing at all; one layer put changes that layer's keys and
    no earlier one's."""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    state = prefill(qwen, batch_of(qwen))
    rows = [0, 0]
    clean, clean_end = decode(qwen, state.select(rows), 9, MIRAGE, capture=True)
    nothing = Intervention(slot=lambda *place: [None, None])
    none, _ = decode(qwen, state.select(rows), 9, MIRAGE, [nothing] * 2, capture=True)
    assert torch.equal(none[0].states, clean[0].states)
    one = Intervention(slot=lambda *place: [None, torch.ones(32)])
    _, end = decode(qwen, state.select(rows), 9, MIRAGE, [one, Intervention()], capture=True)
    column = state.mask.shape[1] + clean[0].segments[0].start
    mine, its = ([layer.keys[0, :, column] for layer in them.cache.layers] for them in (end, clean_end))
    assert torch.equal(mine[0], its[0]) and not torch.allclose(mine[1], its[1], atol=1e-3)
