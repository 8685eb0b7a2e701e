"""The slot site: what the layers read at latent positions, noted and replaced."""
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
    """With a donor's layer inputs, keys and values at latent positions are the donor's, whatever was fed."""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    state = prefill(qwen, batch_of(qwen))
    clean, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, capture=True, with_slots=True)
    flipped = Intervention(feed=lambda z, *place: z.flip(0))
    donor, donor_end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [flipped] * 2, with_slots=True)
    same, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(clean[0])] * 2, with_logits=True,
                     capture=True)
    assert same[0].ids == clean[0].ids and torch.allclose(same[0].states, clean[0].states, atol=1e-5)
    _, end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(donor[0]), Intervention()], capture=True)
    segment = clean[0].segments[0]
    columns = slice(state.mask.shape[1] + segment.start, state.mask.shape[1] + segment.start + segment.size)
    for layer, given in zip(end.cache.layers, donor_end.cache.layers):
        assert torch.allclose(layer.keys[0, :, columns], given.keys[0, :, columns], atol=1e-5)
        assert torch.allclose(layer.values[0, :, columns], given.values[0, :, columns], atol=1e-5)
        assert not torch.allclose(layer.values[1, :, columns], given.values[1, :, columns], atol=1e-3)


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
    """A map's cell: no layer replaced changes nothing; one replaced changes its keys and no earlier ones."""
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
    edited, clean = ([layer.keys[0, :, column] for layer in run.cache.layers] for run in (end, clean_end))
    assert torch.equal(edited[0], clean[0]) and not torch.allclose(edited[1], clean[1], atol=1e-3)
