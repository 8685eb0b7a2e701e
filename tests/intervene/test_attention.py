"""Attention of the stems' rows against the library's own full maps."""
import pytest
import torch
from decoding import MIRAGE, batch_of, load_with, prefill_more

from utils.decode import decode, prefill, truncate_cache
from utils.intervene.attention import GROUPS, WATCHED, attention_weights, stem_attention, watched
from utils.probe.states import embed_prompt

pytestmark = pytest.mark.numeric

STEM = " The answer is \\boxed{"


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return load_with(tiny_checkpoint, MIRAGE)


def full_maps(qwen, batch, block):
    """Attention [layers, B, heads, R, C] of a block's rows, by one eager forward over everything."""
    ids = torch.cat([batch["input_ids"], torch.tensor([block] * len(batch["input_ids"]))], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), len(block), dtype=torch.long)], dim=1)
    places = batch["position_ids"][..., -1:] + 1 + torch.arange(len(block))
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
    qwen.model.set_attn_implementation("eager")
    try:
        out = qwen.model.model(inputs_embeds=embed_prompt(qwen, {"input_ids": ids, **images}),
                               position_ids=torch.cat([batch["position_ids"], places], dim=2),
                               attention_mask=mask, output_attentions=True)
    finally:
        qwen.model.set_attn_implementation("sdpa")
    return torch.stack(out.attentions)[..., -len(block):, :], ids, mask


@torch.no_grad()
def test_rows_equal_the_librarys_own_maps(qwen):
    batch, seen = batch_of(qwen), []
    block = qwen.tokenizer(STEM).input_ids
    expected, ids, mask = full_maps(qwen, batch, block)
    state = prefill(qwen, batch)
    columns, steps = torch.arange(ids.shape[1]), torch.arange(len(block))[:, None]
    allowed = mask[:, None].bool() & (columns <= batch["input_ids"].shape[1] + steps)
    with watched(qwen.model, lambda *parts: seen.append(attention_weights(*parts[:2], allowed, parts[2]))):
        prefill_more(qwen, state, [block] * 3)
    assert torch.allclose(torch.stack(seen), expected, atol=1e-5) and len(seen) == 2
    lengths = [len(block), len(block), len(block) - 2]  # rows may have stems of their own
    stems = [qwen.tokenizer.decode(block[2:n]) for n in lengths]
    looks = stem_attention(qwen, state, block[:2], stems, [[], [], []])
    for i, look in enumerate(looks):  # the same in groups, counted column by column
        kinds = ["said" if c >= state.is_image.shape[1] else "image" if state.is_image[i, c] else "question"
                 for c in columns]
        kinds[int(mask[i].argmax())] = "first"
        for layer in range(2):
            rows = expected[layer, i, :, 2:lengths[i]].mean((0, 1))
            for name in GROUPS:
                wanted = sum(float(rows[c]) for c, kind in enumerate(kinds) if kind == name)
                assert look["mass"][name][layer] == pytest.approx(wanted, abs=2e-5), (i, layer, name)
        uniform = look["uniform"]
        assert sum(uniform.values()) == pytest.approx(1, abs=1e-5) and uniform["imagination"] == 0
        assert (uniform["image"] > 0) == bool(state.is_image[i].any())


@torch.no_grad()
def test_latents_are_a_group_and_each_has_its_mass(qwen):
    begun = prefill(qwen, batch_of(qwen))
    rows, end = decode(qwen, begun.select([0, 2]), 9, MIRAGE)
    segments = [row.segments[0] for row in rows]
    back = truncate_cache(end, begun.select([0, 2]), [s.start + s.size for s in segments])
    places = [[begun.mask.shape[1] + s.start + j for j in range(s.size)] for s in segments]
    for look, columns in zip(stem_attention(qwen, back, [], [STEM] * 2, places), places):
        assert len(columns) == 4 and min(look["mass"]["imagination"]) > 0
        assert all(sum(look["mass"][name][layer] for name in GROUPS) == pytest.approx(1, abs=1e-5)
                   for layer in range(2))


@torch.no_grad()
def test_watching_changes_nothing_and_is_taken_away(qwen):
    state, blocks = prefill(qwen, batch_of(qwen)), [[5, 6, 7]] * 3
    alone = prefill_more(qwen, state, blocks).hidden
    with watched(qwen.model, lambda *parts: None):
        assert torch.equal(prefill_more(qwen, state, blocks).hidden, alone)
    with pytest.raises(RuntimeError), watched(qwen.model, lambda *parts: None):
        assert qwen.model.config.text_config._attn_implementation == WATCHED
        raise RuntimeError
    assert qwen.model.config.text_config._attn_implementation == "sdpa"
