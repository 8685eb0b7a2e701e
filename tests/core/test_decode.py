"""The decoding loop against generate, replay and scripted tokens."""
import random
import shutil
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from decoding import (MIRAGE, batch_of, decode_seen, embedded, generate, library_generate, load_with,
                      needs_bfloat16, one_pass, prefill_more, prefill_with)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from utils import qwen as Q
from utils.decode import decode, layer_inputs, prefill, truncate_cache
from utils.items import chat
from utils.jsonl import DataError
from utils.latent_families import (PRESETS, Intervention, LatentIds, RowState, clean_text, latent_ids,
                                   latent_steps)
from utils.train.weights import add_tokens

pytestmark = pytest.mark.numeric

START, PAD, END, EOS = 1, 2, 3, 9  # of the scripted state machines


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return load_with(tiny_checkpoint, MIRAGE)


@pytest.fixture
def batch(qwen):
    return batch_of(qwen)


@pytest.mark.parametrize("dtype", ["float32", "float64", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_without_latents_equals_generate_bit_for_bit(tiny_checkpoint, dtype):
    qwen = Q.load(str(tiny_checkpoint), device="cpu", dtype=dtype)
    batch = batch_of(qwen)
    # An end of text that this random model really emits, so that rows stop at different steps.
    qwen.eos_ids = [generate(qwen, batch, 9)[1].ids[5]]
    rows = decode_seen(qwen, prefill(qwen, batch), 24)
    library = library_generate(qwen, batch, 24, output_logits=True, return_dict_in_generate=True)
    assert rows[1].finish == "stop" and len(rows[1].ids) <= 6
    for i, row in enumerate(rows):
        assert library.sequences[i, batch["input_ids"].shape[1]:][:len(row.ids)].tolist() == row.ids
        for step, logits in enumerate(row.logits):  # generate returns its logits in float32
            assert torch.equal(logits.float(), library.logits[step][i]), (i, step)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_forward_over_the_captured_latents_gives_the_same_logits(tiny_checkpoint, name):
    """Teacher forcing is the second way to compute a run; shifting the latents by one must break it."""
    spec = PRESETS[name]
    qwen = load_with(tiny_checkpoint, spec)
    batch = batch_of(qwen)
    rows = decode_seen(qwen, prefill(qwen, batch), 20, spec)
    assert any(row.segments for row in rows)
    for i, row in enumerate(rows):
        single = batch_of(qwen, slice(i, i + 1))
        assert difference(qwen, single, row, row.fed) < 1e-4
        if spec.slots:  # embeddings of the recorded ids, which may all be one
            latents = [row.ids[n] for n in latent_steps(row)]
            assert torch.equal(row.fed, embedded(qwen, latents)[0])
        if len(row.fed) > 1:
            moved = row.fed.flip(1) if spec.slots else row.fed.roll(1, 0)
            assert difference(qwen, single, row, moved) > 1e-3


@torch.no_grad()
def difference(qwen, single, row, fed):
    tail = embedded(qwen, row.ids)
    latent = [j for segment in row.segments for j in range(segment.start, segment.start + segment.size)]
    tail[0, latent] = fed
    hidden = one_pass(qwen, single, tail)[-len(row.ids) - 1:-1]
    return float((qwen.model.lm_head(hidden) - row.logits).abs().max())


def run(spec, script, n=None):
    row = RowState(spec, LatentIds(START, PAD, END), [EOS])
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
    ("lvr", 2, [1, 7, 7, 6, 9], [1, 2, 2, 6, 9], [1, 2]),  # no end is written; the sampled token stays
    ("lvr", 2, [1, 3, 7, 9], [1, 2, 2, 9], [1, 2]),  # a sampled end does not close; then the end of text
    ("lvr", 2, [1, 7, 7, 1, 7, 7, 6], [1, 2, 2, 1, 2, 2, 6], [1, 2, 4, 5])])
def test_state_machine_on_scripted_tokens(name, size, script, ids, fed):
    out, places, row = run(replace(PRESETS[name], size=size), script)
    assert (out, places) == (ids, fed)
    assert row.out.finish == ("stop" if script[-1] == EOS else "length")


@pytest.mark.parametrize("name, distance", [("monet_vllm", 10), ("monet_capimagine", 11), ("mirage", 5)])
def test_a_segment_ends_at_the_family_s_size_or_with_the_reply(name, distance):
    ids, _, row = run(PRESETS[name], [START] + [7] * 20)
    assert ids.index(END) - ids.index(START) == distance and row.out.segments[0].closed_by == "limit"
    ids, _, row = run(PRESETS[name], [START] + [7] * 20, n=3)
    assert (ids, row.out.segments[0].closed_by) == ([START, PAD, PAD], "max_tokens")


def replay_of(row):
    starts = [sum(s.size for s in row.segments[:n]) for n in range(len(row.segments))]
    return Intervention(feed=lambda z, segment, step: row.fed[starts[segment] + step])


def test_edits_at_the_fed_vector(qwen, batch):
    clean = generate(qwen, batch, 16, MIRAGE, capture=True)
    same = generate(qwen, batch, 16, MIRAGE, capture=True, arms=[Intervention(feed=lambda z, *place: z)] * 3)
    assert [g.ids for g in same] == [g.ids for g in clean]
    fixed = torch.arange(32.0)
    to_fixed = Intervention(feed=lambda z, *place: fixed)
    tau = generate(qwen, batch, 16, MIRAGE, capture=True, arms=[to_fixed] * 3)
    for g, c in zip(tau, clean):
        assert (g.fed == fixed).all() and len(g.fed) == sum(s.size for s in g.segments)
        first = min([s.start for s in c.segments], default=len(c.ids))
        assert g.ids[:first] == c.ids[:first]
    replay = generate(qwen, batch, 16, MIRAGE, arms=[replay_of(row) for row in clean])
    assert [g.ids for g in replay] == [g.ids for g in clean]


def test_latents_put_into_the_prompt_replay_the_run(qwen):
    """The recorded ids as prompt, the captured vectors at the pads: decoding goes on as it did."""
    batch = batch_of(qwen, slice(1, 2))
    clean = generate(qwen, batch, 16, MIRAGE, capture=True)[0]
    segment = clean.segments[0]
    cut = segment.start + segment.size + 1
    prompt = chat(qwen.tokenizer, "I look closer.", 0) + qwen.tokenizer.decode(clean.ids[:cut])
    again = Q.encode(qwen, [prompt], [[]])
    assert again["input_ids"][0, -cut:].tolist() == clean.ids[:cut]
    state = prefill_with(qwen, again, [clean.fed[:segment.size]])
    assert decode(qwen, state, 16 - cut, MIRAGE)[0][0].ids == clean.ids[cut:]
    with pytest.raises(DataError, match="1 latents for 4 latent pads"):
        prefill_with(qwen, again, [clean.fed[:1]])


def test_text_of_a_row_has_no_latents_and_no_control_tokens(qwen):
    start, pad, end, *_ = latent_ids(qwen.tokenizer, MIRAGE)
    ids = [start, pad, pad, end, *qwen.tokenizer("It is blue.").input_ids, qwen.eos_ids[0]]
    assert clean_text(qwen.tokenizer, ids, MIRAGE) == "It is blue."


def test_tokens_of_another_family_are_refused(tiny_checkpoint):
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    with pytest.raises(DataError, match="expected one added token"):
        latent_ids(qwen.tokenizer, MIRAGE)
    add_tokens(qwen, (MIRAGE.tokens[1], MIRAGE.tokens[0], MIRAGE.tokens[2]))  # another order than Mirage's
    with pytest.raises(DataError, match="expected consecutive ids in that order"):
        latent_ids(qwen.tokenizer, MIRAGE)


@pytest.mark.parametrize("rows_at_once", [1, 2])
def test_a_batch_beyond_the_budget_is_read_in_parts(qwen, batch, monkeypatch, rows_at_once):
    """One row at a time, as alone, to the bit; and latents that are given reach their own rows."""
    padded = batch | {"input_ids": batch["input_ids"].clone()}
    padded["input_ids"][:, -3:-1] = latent_ids(qwen.tokenizer, MIRAGE).pad
    latents = [torch.full((2, 32), value) for value in (0.0, 0.5, 1.0)]
    whole, given = prefill(qwen, batch), prefill_with(qwen, padded, latents)
    monkeypatch.setattr("utils.decode.PREFILL_TOKENS", rows_at_once * batch["input_ids"].shape[1])
    parts = prefill(qwen, batch)
    assert torch.allclose(parts.hidden, whole.hidden, atol=1e-5)
    for layer, same in zip(parts.cache.layers, whole.cache.layers, strict=True):
        seen = batch["attention_mask"].bool()
        assert layer.keys.shape == same.keys.shape
        for part, expected in ((layer.keys, same.keys), (layer.values, same.values)):
            assert torch.allclose(part.transpose(1, 2)[seen], expected.transpose(1, 2)[seen], atol=1e-5)
    if rows_at_once == 1:
        for i in range(3):
            assert torch.equal(parts.hidden[i], prefill(qwen, batch_of(qwen, slice(i, i + 1))).hidden[0])
    together, apart = (decode(qwen, state, 16, MIRAGE)[0] for state in (whole, parts))
    assert [row.ids for row in together] == [row.ids for row in apart]
    assert torch.allclose(prefill_with(qwen, padded, latents).hidden, given.hidden, atol=1e-5)
    assert not torch.allclose(prefill_with(qwen, padded, latents[::-1]).hidden, given.hidden, atol=1e-3)


def test_rows_taken_from_one_prefill_decode_as_they_do_alone(qwen, batch):
    """Clean, edited and hidden rows in one batch equal a batch of each; the prefill is not used up."""
    fixed = torch.arange(32.0)
    arms = [Intervention(), Intervention(feed=lambda z, *place: fixed),
            Intervention(hide=("latents", "images"))]
    state = prefill(qwen, batch)
    rows = decode_seen(qwen, state.select([0, 0, 0, 1, 1, 1, 2, 2, 2]), 16, MIRAGE, arms * 3)
    for k, arm in enumerate(arms):
        alone = decode_seen(qwen, state.select([0, 1, 2]), 16, MIRAGE, [arm] * 3)
        for together, single in zip(rows[k::3], alone):
            assert together.ids == single.ids
            assert torch.allclose(together.logits, single.logits, atol=1e-4)
    assert any(not torch.equal(rows[k].logits, rows[0].logits) for k in (1, 2))


def test_reading_on_and_going_back_equal_reading_the_whole(tiny_checkpoint):
    """Blocks of unlike lengths after unlike prompts; then again from where each row had read fewer ids."""
    qwen = Q.load(str(tiny_checkpoint), device="cpu")

    def whole(i, ids):
        return one_pass(qwen, batch_of(qwen, slice(i, i + 1)), embedded(qwen, ids))[-1]

    tail = [qwen.tokenizer(text).input_ids for text in ("It is blue.", "a red circle with the digit 7", "It")]
    state = prefill(qwen, batch_of(qwen))
    after = prefill_more(qwen, state, tail)
    for i, ids in enumerate(tail):
        assert torch.allclose(after.hidden[i], whole(i, ids), atol=1e-5)
    decoded, end = decode(qwen, state.select([0, 1, 2]), 9)
    kept = [3, 0, 7]
    again = prefill_more(qwen, truncate_cache(end, state, kept), tail)
    for i, ids in enumerate(tail):
        assert torch.allclose(again.hidden[i], whole(i, decoded[i].ids[:kept[i]] + ids), atol=1e-5)
    with pytest.raises(ValueError, match="row 0: 9 ids to keep of 8"):
        truncate_cache(end, state, [9, 0, 0])
    with pytest.raises(ValueError, match="expected one block of at least one id per row"):
        prefill_more(qwen, state, [[1], [], [1]])


def masked_pass(qwen, batch, tail, allowed):
    """Return the last states where position i sees the columns of `allowed[i]` alone."""
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return one_pass(qwen, batch, tail, attention_mask={"full_attention": additive[None, None]})


@torch.no_grad()
def test_hidden_columns_equal_a_mask_in_four_dimensions(qwen):
    """Site `edge`: closing columns from the end marker on equals one pass with the matrix written out."""
    batch = batch_of(qwen, slice(0, 1))
    row = decode_seen(qwen, prefill(qwen, batch), 7, MIRAGE, [Intervention(hide=("latents", "images"))])[0]
    segment, n = row.segments[0], batch["input_ids"].shape[1]
    assert segment.closed_by != "max_tokens" and len(row.fed) == segment.size
    total = n + len(row.ids)
    allowed = torch.ones(total, total).tril().bool()
    after, first = n + segment.start + segment.size, n + segment.start
    allowed[after:, first:after] = False
    allowed[after:, :n] &= batch["input_ids"][0] != Q.special_id(qwen.tokenizer, Q.IMAGE_TOKEN)
    tail = embedded(qwen, row.ids)
    tail[0, segment.start:segment.start + segment.size] = row.fed
    hidden = masked_pass(qwen, batch, tail, allowed)
    assert (qwen.model.lm_head(hidden[n - 1:-1]) - row.logits).abs().max() < 1e-4
    clean = decode_seen(qwen, prefill(qwen, batch), 7, MIRAGE)[0]
    upto = segment.start + segment.size + 1  # the end marker's own logits are still the clean ones
    assert torch.equal(clean.logits[:upto], row.logits[:upto])
    assert (clean.logits[upto] - row.logits[upto]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("i", [0, 1, 2])
def test_all_but_some_columns_hidden_equal_a_mask_in_four_dimensions(qwen, i):
    """A block read over the prompt before the first image and three of the words after it, in one pass with
    the matrix written out; a prompt without an image stays whole."""
    batch, block = batch_of(qwen, slice(i, i + 1)), qwen.tokenizer("It is blue.").input_ids
    words = qwen.tokenizer("a red circle with the digit 7").input_ids
    n, length = len(words), batch["input_ids"].shape[1]
    images = (batch["input_ids"][0] == Q.special_id(qwen.tokenizer, Q.IMAGE_TOKEN)).nonzero()
    before = int(images[0]) if len(images) else length
    state = prefill_more(qwen, prefill(qwen, batch), [words])
    kept = [length + 1, length + 2, length + n - 1]
    state.hide_all_but({0: kept})
    total = length + n + len(block)
    allowed = torch.ones(total, total).tril().bool()
    allowed[length + n:, before:length + n] = False
    allowed[length + n:, kept] = True
    hidden = masked_pass(qwen, batch, embedded(qwen, words + block), allowed)
    assert torch.allclose(prefill_more(qwen, state, [block]).hidden[0], hidden[-1], atol=1e-5)


def simple_head():
    """lvr_head_type "simple" by the library's modules."""
    mlp = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    return torch.nn.Sequential(OrderedDict(ln_q=torch.nn.LayerNorm(32, eps=1e-6), mlp=mlp))


def gated_head():
    """lvr_head_type "glu" (LVR's src/model/lvr_heads.py), which is the library's gated layer with biases."""
    return Qwen2_5_VLMLP(SimpleNamespace(hidden_size=32, intermediate_size=48, hidden_act="silu"), bias=True)


def add_head(source, folder, weights):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors") | {f"lvr_head.{name}": t for name, t in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("make", [simple_head, gated_head])
def test_lvr_head_is_loaded_by_its_names_and_skips_the_first_latent(tiny_checkpoint, tmp_path, make):
    """The output of latent steps passes through the head; checked by teacher forcing without the head."""
    spec, head, folder = PRESETS["lvr"], make(), tmp_path / "checkpoint"
    add_head(tiny_checkpoint, folder, head.state_dict())
    qwen = load_with(folder, spec)
    qwen.latent_head = Q.load_with(None, str(folder)).latent_head
    some = torch.arange(32.0)[None]
    assert torch.allclose(qwen.latent_head(some), head(some), atol=1e-6)
    batch = batch_of(qwen, slice(1, 2))
    row = generate(qwen, batch, 16, spec, capture=True)[0]
    segment = row.segments[0]
    qwen.latent_head = None
    plain = generate(qwen, batch, segment.start + segment.size, spec, [replay_of(row)], capture=True)[0]
    before = plain.states[segment.start:segment.start + segment.size]
    assert torch.allclose(row.fed[0], before[0], atol=1e-5)
    assert torch.allclose(row.fed[1:segment.size], head(before[1:]), atol=1e-5)


def test_a_checkpoint_without_a_head_or_with_half_of_one(tiny_checkpoint, tmp_path):
    assert Q.load_with(None, str(tiny_checkpoint)).latent_head is None
    half = {name: tensor for name, tensor in simple_head().state_dict().items() if name != "mlp.2.bias"}
    add_head(tiny_checkpoint, tmp_path / "half", half)
    with pytest.raises(DataError, match="expected a weight and a bias each of ln_q, mlp.0, mlp.2 or"):
        Q.load_with(None, str(tmp_path / "half"))


def test_choices_are_the_arms_own(qwen, batch):
    """Forced ids drive the same state machine; a banned start token is never recorded."""
    start, pad, end, *_ = latent_ids(qwen.tokenizer, MIRAGE)
    clean = generate(qwen, batch, 16, MIRAGE, capture=True)
    arms = [Intervention(choose=lambda logits, n, ids=row.ids: ids[n]) for row in clean]
    forced = generate(qwen, batch, 16, MIRAGE, arms, capture=True)
    assert [row.ids for row in forced] == [row.ids for row in clean]
    assert all(torch.equal(a.fed, b.fed) for a, b in zip(forced, clean))

    def without_start(logits, n):
        return int(logits.index_fill(0, torch.tensor([start]), -torch.inf).argmax())

    banned = generate(qwen, batch, 16, MIRAGE, [Intervention(choose=without_start)] * 3)
    assert not any(start in row.ids for row in banned)
    noise = torch.randn(16, qwen.model.lm_head.out_features, generator=torch.Generator().manual_seed(0)) * 9

    def sampled(logits, n):
        return int((logits + noise[n]).argmax())

    # a forbidden id never comes: the next best does, of the same random numbers
    masked = generate(qwen, batch, 16, MIRAGE, [Intervention(choose=lambda logits, n: sampled(
        logits.index_fill(0, torch.tensor([start]), -torch.inf), n))] * 3)
    for choose, wanted in ((None, banned), (sampled, masked)):
        arm = Intervention(choose=choose, forbid=lambda row, token: token == start)
        rows = generate(qwen, batch, 16, MIRAGE, [arm] * 3)
        assert [row.ids for row in rows] == [row.ids for row in wanted]
        assert all(0 < row.n_forbidden <= 16 for row in rows) and not wanted[0].n_forbidden
    empty = generate(qwen, batch, 16, MIRAGE, [Intervention(spec=replace(MIRAGE, size=0))] * 3)
    assert any(row.segments for row in empty) and not any(pad in row.ids for row in empty)


def drawn_prompts(rng, qwen, n):
    """Return the tensors of n prompts of random lengths, with up to two pictures of random sizes."""
    images = [[Image.new("RGB", (28 * rng.randint(2, 6), 28 * rng.randint(2, 4)), rng.randrange(1 << 24))
               for _ in range(rng.randrange(3))] for _ in range(n)]
    return Q.encode(qwen, [chat(qwen.tokenizer, "What is it? " * rng.randint(1, 9), len(row))
                           for row in images], images)


def drawn_arms(rng, n):
    """Return interventions of every site, and ids that are drawn, at random."""
    def pick(logits, at, seed):
        generator = torch.Generator().manual_seed(1000 * seed + at)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    kinds = [{}, {"feed": lambda z, *place: z.flip(0)}, {"hide": ("latents",)}, {"hide": ("images",)},
             {"hide": ("latents", "images")}, {"choose": partial(pick, seed=rng.randrange(99))},
             {"slot": lambda segment, step: [torch.full((32,), 0.1 * step), None] if step % 2 else None}]
    return [Intervention(**rng.choice(kinds)) for _ in range(n)]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_rows_that_leave_the_batch_change_no_other(tiny_checkpoint, name, forced):
    """Against the batch in which all rows stay; none is computed after its end, nor columns of padding."""
    rng, spec = random.Random(f"{name} {forced}"), replace(PRESETS[name], force_start=forced)
    qwen = load_with(tiny_checkpoint, spec)
    qwen.latent_head = (lambda hidden: hidden.flip(-1)) if name == "lvr" else None
    n_rows, widths = [], []
    for _ in range(3):
        limits = [rng.randint(1, 30) for _ in range(rng.randint(2, 9))]
        arms, batch = drawn_arms(rng, len(limits)), drawn_prompts(rng, qwen, len(limits))
        qwen.eos_ids = [generate(qwen, batch, 9, spec)[-1].ids[-1]]  # so that some end before their limit
        state = prefill(qwen, batch)
        stay, _ = decode(qwen, state.select(range(len(limits))), max(limits), spec, arms, True, True)
        hooks = [qwen.model.lm_head.register_forward_pre_hook(lambda _, args: n_rows.append(len(args[0]))),
                 qwen.model.model.register_forward_pre_hook(
                     lambda _, args, given: widths.append(bool(given["attention_mask"][:, 0].any())),
                     with_kwargs=True)]
        leave, _ = decode(qwen, state, max(limits), spec, arms, True, True, limits=limits)
        for hook in hooks:
            hook.remove()
        for row, other, limit in zip(leave, stay, limits):
            n = min(limit, len(other.ids))
            assert (row.ids, row.sampled) == (other.ids[:n], other.sampled[:n])
            assert row.finish == ("length" if len(other.ids) > limit else other.finish)
            assert torch.allclose(row.states, other.states[:n], atol=1e-4)
            assert torch.allclose(row.fed, other.fed[:len(row.fed)], atol=1e-4)
            assert len(row.fed) == sum(segment.size for segment in row.segments)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(row.slots, other.slots))
        assert sum(n_rows) == sum(len(row.ids) for row in leave) and all(widths)
        n_rows.clear()


# ---- the slot site: what the layers read at latent positions, noted and replaced
def slots_of(row):
    """An arm that puts a captured run's layer inputs at the same latent positions."""
    sizes = [segment.size for segment in row.segments]
    return Intervention(slot=lambda segment, step: row.slots[sum(sizes[:segment]) + step])


def test_own_slots_change_nothing_and_a_donors_make_its_keys(qwen, batch):
    """With a donor's layer inputs, keys and values at latent positions are the donor's, whatever was fed."""
    state = prefill(qwen, batch)
    clean, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, capture=True, with_slots=True)
    flipped = Intervention(feed=lambda z, *place: z.flip(0))
    donor, donor_end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [flipped] * 2, with_slots=True)
    same, _ = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(clean[0])] * 2, capture=True)
    assert same[0].ids == clean[0].ids and torch.allclose(same[0].states, clean[0].states, atol=1e-5)
    _, end = decode(qwen, state.select([0, 0]), 9, MIRAGE, [slots_of(donor[0]), Intervention()], capture=True)
    segment = clean[0].segments[0]
    columns = slice(state.mask.shape[1] + segment.start, state.mask.shape[1] + segment.start + segment.size)
    for layer, given in zip(end.cache.layers, donor_end.cache.layers):
        assert torch.allclose(layer.keys[0, :, columns], given.keys[0, :, columns], atol=1e-5)
        assert torch.allclose(layer.values[0, :, columns], given.values[0, :, columns], atol=1e-5)
        assert not torch.allclose(layer.values[1, :, columns], given.values[1, :, columns], atol=1e-3)


def test_hooks_are_taken_away_even_after_an_error(qwen):
    layers = qwen.model.model.language_model.layers
    with pytest.raises(RuntimeError), layer_inputs(qwen.model, {0: torch.zeros(len(layers), 32)}):
        assert all(layer._forward_pre_hooks for layer in layers)
        raise RuntimeError
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(ValueError, match="states for 1 layers, expected 2"), layer_inputs(
        qwen.model, {0: torch.zeros(1, 32)}):
        pass


def test_what_is_none_is_left_to_the_bit(qwen, batch):
    """A map's cell: no layer replaced changes nothing; one replaced changes its keys and no earlier ones."""
    state = prefill(qwen, batch)
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
