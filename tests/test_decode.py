"""The decoding loop against generate, replay and scripted tokens.    pytest tests/test_decode.py"""
from dataclasses import replace

import pytest
import torch
from PIL import Image

from utils import qwen as Q
from utils.decode import PRESETS, RowState, clean_text, embed_prompt, generate, latent_ids
from utils.rows import DataError

MIRAGE = PRESETS["mirage"]
START, PAD, END, EOS = 1, 2, 3, 9  # of the scripted state machines


def load_with(tiny_checkpoint, spec, dtype="float32"):
    """A random model that likes to emit the start token: its output row points along the states it sees."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu", dtype=dtype)
    start_id = Q.add_tokens(qwen, spec.tokens)[spec.tokens.index(spec.start)]
    states = torch.cat([g.states for g in generate(qwen, batch_of(qwen), 6, capture=True)])
    with torch.no_grad():
        qwen.model.lm_head.weight[start_id] = states.mean(0) * 3 / states.mean(0).norm()
    return qwen


def batch_of(qwen, rows=slice(None)):
    images = [[Image.new("RGB", (56, 84), "red")], [], [Image.new("RGB", (112, 56), "blue"), Image.new("RGB", (56, 56))]]
    texts = ["What digit is on the red circle?", "I look closer.", "It is blue. The answer?"]
    prompts = [Q.chat(qwen.tokenizer, text, len(row)) for text, row in zip(texts, images)]
    return Q.encode(qwen, prompts[rows], images[rows])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_without_latents_equals_generate_bit_for_bit(tiny_checkpoint, dtype):
    qwen = Q.load(str(tiny_checkpoint), device="cpu", dtype=dtype)
    batch = batch_of(qwen)
    # An end of text that this random model really emits, so that rows stop at different steps.
    qwen.eos_ids = [generate(qwen, batch, 9)[1].ids[5]]
    ours = generate(qwen, batch, 24, with_logits=True)
    theirs = qwen.model.generate(**{k: v for k, v in batch.items() if k != "position_ids"}, max_new_tokens=24, do_sample=False,
                                 eos_token_id=qwen.eos_ids, pad_token_id=qwen.tokenizer.pad_token_id,
                                 output_logits=True, return_dict_in_generate=True)
    assert ours[1].finish == "stop" and len(ours[1].ids) <= 6
    for i, row in enumerate(ours):
        assert theirs.sequences[i, batch["input_ids"].shape[1]:][:len(row.ids)].tolist() == row.ids
        for step, logits in enumerate(row.logits):  # generate returns its logits in float32
            assert torch.equal(logits.float(), theirs.logits[step][i]), (i, step)


def test_a_row_alone_equals_the_row_in_a_batch(tiny_checkpoint):
    qwen = load_with(tiny_checkpoint, MIRAGE)
    together = generate(qwen, batch_of(qwen), 16, MIRAGE, capture=True)
    for i in range(3):
        alone = generate(qwen, batch_of(qwen, slice(i, i + 1)), 16, MIRAGE, capture=True)[0]
        assert alone.ids == together[i].ids and alone.segments == together[i].segments
        assert torch.allclose(alone.states, together[i].states, atol=1e-3)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_forward_over_the_captured_latents_gives_the_same_logits(tiny_checkpoint, name):
    """Teacher forcing is the second way to compute a run; shifting the latents by one must break it."""
    spec = PRESETS[name]
    qwen = load_with(tiny_checkpoint, spec)
    batch = batch_of(qwen)
    rows = generate(qwen, batch, 20, spec, capture=True, with_logits=True)
    assert any(row.segments for row in rows)
    for i, row in enumerate(rows):
        single = batch_of(qwen, slice(i, i + 1))
        assert difference(qwen, single, row, row.fed) < 1e-4
        if len(row.fed) > 1:
            assert difference(qwen, single, row, row.fed.roll(1, 0)) > 1e-3


@torch.no_grad()
def difference(qwen, single, row, fed):
    n = single["input_ids"].shape[1]
    embeds = embed_prompt(qwen, single, None, None)
    tail = qwen.model.get_input_embeddings()(torch.tensor([row.ids]))
    latent = [j for segment in row.segments for j in range(segment.start, segment.start + segment.size)]
    tail[0, latent] = fed
    positions = single["position_ids"][..., -1:] + 1 + torch.arange(len(row.ids))
    hidden = qwen.model.model(inputs_embeds=torch.cat([embeds, tail], 1), use_cache=False,
                              position_ids=torch.cat([single["position_ids"], positions], -1)).last_hidden_state[0]
    return float((qwen.model.lm_head(hidden[n - 1:-1]) - row.logits).abs().max())


def run(spec, script, n=None):
    row = RowState(spec, (START, PAD, END), [EOS])
    fed = []
    for token in script:
        if row.done or (n and len(row.out.ids) == n):
            break
        fed.append(row.advance(token))
    return row.out.ids, [i for i, f in enumerate(fed) if f], row


@pytest.mark.parametrize("name, size, script, ids, fed", [
    # Monet's runner overwrites the start token: K positions from it on, then the end.
    ("monet_vllm", 2, [5, 1, 7, 7, 6, 9], [5, 1, 2, 3, 6, 9], [1, 2]),
    ("monet_vllm", 1, [1, 7, 6, 9], [1, 3, 6, 9], [0]),
    ("monet_capimagine", 2, [5, 1, 7, 7, 7, 6, 9], [5, 1, 2, 2, 3, 6, 9], [2, 3]),
    ("mirage", 4, [1, 7, 3, 6, 9], [1, 2, 3, 6, 9], [1]),  # a sampled end closes early
    ("mirage", 2, [1, 9, 1, 7, 6, 9], [1, 2, 2, 3, 6, 9], [1, 2]),  # end of text and start inside are ignored
    ("mirage", 1, [1, 7, 7, 1, 7, 7, 9], [1, 2, 3, 1, 2, 3, 9], [1, 4]),  # two segments
    ("lvr", 2, [1, 7, 7, 6, 9], [1, 2, 2, 6, 9], [1, 2]),  # no end is written: the sampled token stands
    ("lvr", 2, [1, 3, 7, 9], [1, 2, 2, 9], [1, 2]),  # a sampled end does not close; end of text right after the latents
    ("lvr", 2, [1, 7, 7, 1, 7, 7, 6], [1, 2, 2, 1, 2, 2, 6], [1, 2, 4, 5])])
def test_state_machine_on_scripted_tokens(name, size, script, ids, fed):
    out, places, row = run(replace(PRESETS[name], size=size), script)
    assert (out, places) == (ids, fed)
    assert row.out.finish == ("stop" if script[-1] == EOS else "length")


@pytest.mark.parametrize("name, distance", [("monet_vllm", 10), ("monet_capimagine", 11), ("mirage", 5)])
def test_distance_from_start_to_end_marker(name, distance):
    ids, _, row = run(PRESETS[name], [START] + [7] * 20)
    assert ids.index(END) - ids.index(START) == distance and row.out.segments[0].closed_by == "limit"


def test_a_segment_cut_by_max_new_tokens_says_so():
    ids, fed, row = run(PRESETS["mirage"], [5, START] + [7] * 9, n=4)
    assert (ids, fed, row.out.segments[0].closed_by) == ([5, START, PAD, PAD], [2, 3], "max_tokens")


def test_edits_at_the_fed_vector(tiny_checkpoint):
    qwen = load_with(tiny_checkpoint, MIRAGE)
    batch = batch_of(qwen)
    clean = generate(qwen, batch, 16, MIRAGE, capture=True)
    same = generate(qwen, batch, 16, MIRAGE, capture=True, edit=lambda z, *place: z)
    assert [g.ids for g in same] == [g.ids for g in clean]
    fixed = torch.arange(32.0)
    tau = generate(qwen, batch, 16, MIRAGE, capture=True, edit=lambda z, *place: fixed)
    for g, c in zip(tau, clean):
        assert (g.fed == fixed).all() and len(g.fed) == sum(s.size for s in g.segments)
        first = min([s.start for s in c.segments], default=len(c.ids))
        assert g.ids[:first] == c.ids[:first]
    one = generate(qwen, batch, 16, MIRAGE, edit=lambda z, row, *place: fixed if row == 0 else z)
    assert [g.ids for g in one[1:]] == [g.ids for g in clean[1:]]
    replay = generate(qwen, batch, 16, MIRAGE, edit=lambda z, row, segment, step: clean[row].fed[
        sum(s.size for s in clean[row].segments[:segment]) + step])
    assert [g.ids for g in replay] == [g.ids for g in clean]


def test_latents_put_into_the_prompt_replay_the_run(tiny_checkpoint):
    """The recorded ids as prompt, the captured vectors at the pads: decoding goes on as it did."""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    batch = batch_of(qwen, slice(1, 2))
    clean = generate(qwen, batch, 16, MIRAGE, capture=True)[0]
    segment = clean.segments[0]
    cut = segment.start + segment.size + 1
    prompt = Q.chat(qwen.tokenizer, "I look closer.", 0) + qwen.tokenizer.decode(clean.ids[:cut])
    again = Q.encode(qwen, [prompt], [[]])
    assert again["input_ids"][0, -cut:].tolist() == clean.ids[:cut]
    rest = generate(qwen, again, 16 - cut, MIRAGE, prompt_latents=[clean.fed[:segment.size]])[0]
    assert rest.ids == clean.ids[cut:]
    with pytest.raises(DataError, match="1 latents for 4 latent pads"):
        generate(qwen, again, 2, MIRAGE, prompt_latents=[clean.fed[:1]])


def test_text_of_a_row_has_no_latents_and_no_control_tokens(tiny_checkpoint):
    qwen = load_with(tiny_checkpoint, MIRAGE)
    start, pad, end = latent_ids(qwen.tokenizer, MIRAGE)
    words = qwen.tokenizer("It is blue.").input_ids
    assert clean_text(qwen.tokenizer, [start, pad, pad, end, *words, qwen.eos_ids[0]], MIRAGE) == "It is blue."


def test_tokens_of_another_family_are_refused(tiny_checkpoint):
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    with pytest.raises(DataError, match="expected one added token"):
        latent_ids(qwen.tokenizer, MIRAGE)
    Q.add_tokens(qwen, (MIRAGE.tokens[1], MIRAGE.tokens[0], MIRAGE.tokens[2]))  # another order than Mirage's
    with pytest.raises(DataError, match="expected consecutive ones in that order"):
        latent_ids(qwen.tokenizer, MIRAGE)
