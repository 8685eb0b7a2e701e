"""Families' state machines against the loops of their own code, told again over scripted ids."""
import random
import re
from dataclasses import replace

import pytest
import torch
from decoding import batch_of, generate, library_generate, load_with

from utils import qwen as Q
from utils.jsonl import DataError
from utils.latent_families import (FED_BACK, PRESETS, Intervention, LatentIds, RowState, clean_text,
                                   latent_ids, spec_of)
from utils.train.weights import add_tokens

START, PAD, END, EOS, AFTER, OTHER_SLOT = 1, 2, 3, 9, 8, 4
N_SCRIPTS = 20_000


# ---- the loops of the releases: scripted ids -> (recorded ids, steps whose id is fed as a latent)
def sketch_loop(script, size):
    """SkiLa's src/model/skila.py (98f5563), _sample; SwimBird's src/model/swimbird.py (6aa2cc3) is the same:
    the mode is entered by the last token, left by a sampled end or when no steps remain."""
    ids, fed, in_mode, remaining = [], [], False, size
    for token in script:
        either = in_mode or ids[-1:] == [START]
        if either and not in_mode:
            remaining = size
        remaining -= in_mode
        ends = token == END or in_mode and remaining <= 0
        in_mode = either and not ends
        ids.append(PAD if in_mode else END if ends else token)
        if in_mode:
            fed.append(len(ids) - 1)
        if ids[-1] == EOS:
            break
    return ids, fed


def template_loop(script, size):
    """ILVR's src/utils_deepseed.py (ddfc95c), LatentTemplateLogitsProcessor: the ids so far leave one id
    possible inside a segment; outside neither pad nor end, which the scripts leave out there."""
    ids, fed = [], []
    for token in script:
        last = {mark: max((n for n, i in enumerate(ids) if i == mark), default=-1) for mark in (START, END)}
        if last[START] > last[END]:
            n_pads = len(ids) - last[START] - 1
            token = PAD if n_pads < size else END
            fed += [len(ids)] if token == PAD else []
        elif token in (PAD, END):
            continue
        ids.append(token)
        if token == EOS:
            break
    return ids, fed


def laser_loop(script, size):
    """Laser's src/model/qwen_laser_model.py (204163e), _sample with repetition_exit and an answer_start_id:
    its ids inside are the sampled ones; the first is the start, a forced end is followed by AFTER."""
    ids, fed, in_mode, counter, pending = [], [], False, 0, False
    for n, token in enumerate(script):
        token = START if n == 0 else AFTER if pending else token
        opens, pending = ids[-1:] == [START], False
        if opens and not in_mode:
            counter = 0
        counter += in_mode
        if in_mode and (counter >= size or ids[-2:] == [token, token]):
            token, pending = END, True
        in_mode = (in_mode or opens) and token != END
        ids.append(token)
        if in_mode:
            fed.append(n)
        elif token == EOS:
            break
    return ids, fed


LOOPS = {"skila": sketch_loop, "swimbird": sketch_loop, "ilvr": template_loop, "laser": laser_loop}


def run(spec, script):
    """Return (ids, sampled ids, fed steps) by the project's state machine."""
    ids, fed = LatentIds(START, PAD, END, after=AFTER if spec.after_limit else None), []
    row = RowState(spec, ids, [EOS])
    for token in script:
        if row.done:
            break
        if row.advance(row.forced[0] if row.forced else token):
            fed.append(len(row.out.ids) - 1)
    return row.out.ids, row.out.sampled, fed


def scripts(spec, n):
    """Random scripts in which marks, loops and ends of text are frequent."""
    rng = random.Random(spec.name)
    for _ in range(n):
        k = rng.choice((1, 2, 3, spec.size))
        tokens = rng.choices((START, PAD, END, EOS, 5, 6, AFTER), (4, 1, rng.choice((0, 2)), .3, 6, 2, 1),
                             k=rng.choice((4, 12, 2 * k + 9)))
        yield replace(spec, size=k), tokens


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_the_state_machine_is_that_of_the_release(name):
    n_segments, closed = 0, 0
    for spec, script in scripts(PRESETS[name], N_SCRIPTS):
        ids, fed = LOOPS[name](script, spec.size)
        if name == "ilvr":  # the same script without what its template makes impossible
            possible, state = [], RowState(spec, LatentIds(START, PAD, END), [EOS])
            for token in script:
                if not state.done and (state.inside or token not in (PAD, END)):
                    state.advance(token)
                    possible.append(token)
            script = possible
            ids, fed = template_loop(script, spec.size)
        own, sampled, own_fed = run(spec, script)
        assert own_fed == fed, (spec.size, script)
        assert (sampled if name == "laser" else own) == ids, (spec.size, script)
        assert all(own[n] == PAD for n in fed) and [own[n] for n in range(len(own)) if n not in fed] == [
            sampled[n] for n in range(len(own)) if n not in fed]
        n_segments, closed = n_segments + own.count(START), closed + own.count(END)
    assert n_segments > N_SCRIPTS / 3 and closed > N_SCRIPTS / 4


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_a_batch_of_scripts_on_a_model_of_the_family(tiny_checkpoint, tiny_qwen3, name):
    """Left-padded prompts of unlike lengths, several segments a row: each row as alone by the release's loop,
    and each latent the state that led to it."""
    spec = replace(PRESETS[name], size=3)
    qwen = load_with(tiny_qwen3 if name == "swimbird" else tiny_checkpoint, spec)
    start, pad, end, *_ = latent_ids(qwen.tokenizer, spec)
    real = {START: start, PAD: pad, END: end, EOS: qwen.eos_ids[0], 5: 50, 6: 60,
            AFTER: (qwen.tokenizer(spec.after_limit).input_ids or [70])[0]}
    script = [[5, START, 5, 6, 5, 6, 6, START, 5, 6, 5, 5, 5, EOS],
              [START, 6, 5, 5, 5, 6, START, 6, 6, 6, 6, 6], [6, 6, 6, START, 5, 5, 6, 5, START, 5, 6, 5, 6]]
    if name != "ilvr":
        script[1][2] = END
    arms = [Intervention(choose=lambda logits, n, tokens=tokens: real[tokens[min(n, len(tokens) - 1)]])
            for tokens in script]
    rows = generate(qwen, batch_of(qwen), 12, spec, arms, capture=True)
    for tokens, row in zip(script, rows):
        ids, fed = LOOPS[name]([*tokens, *tokens[-1:] * 12][:12], 3)
        assert (row.sampled if name == "laser" else row.ids) == [real[i] for i in ids]
        assert [n for n, i in enumerate(row.ids) if i == pad] == fed and len(row.segments) >= 2
        assert torch.equal(row.fed, row.states[fed])


# ---- the kind "ids": the releases call the library's generate and feed nothing back
def plain_loop(script, opening):
    """CoVT's gradio_demo.py (80a28bf), LaViT's evaluator.py (26bf182); Mull-Tokens' README (f05a75c) writes
    `opening` behind the prompt first."""
    ids = [*opening, *script]
    return ids[:ids.index(EOS) + 1] if EOS in ids else ids


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - FED_BACK))
def test_ids_are_those_that_were_sampled_and_runs_of_slots_are_segments(name):
    """Oracle of the segments: a pattern over the reply, with s for the start, p for slots, e for the end."""
    family, rng, n_segments = PRESETS[name], random.Random(name), 0
    marks = {token: here for token, here in ((START, family.start), (END, family.end)) if here}
    start, end = (token if token in marks else None for token in (START, END))
    opening = (5, PAD, OTHER_SLOT, 6) if family.force_start else ()
    for n in range(N_SCRIPTS):
        size = rng.choice((1, 2, family.size))  # is no limit
        ids = LatentIds(start, PAD, end, frozenset((PAD, OTHER_SLOT)), opening)
        row, fed = RowState(replace(family, size=size), ids, [EOS]), []
        script = rng.choices((START, PAD, OTHER_SLOT, END, EOS, 5, 6), (2, 4, 4, 2, .3, 2, 2), k=n % 40 + 1)
        for token in [*opening, *script]:
            if not row.done and row.advance(row.forced[0] if row.forced else token):
                fed.append(len(row.out.ids) - 1)
        expected = plain_loop(script, opening)
        assert row.out.ids == row.out.sampled == expected, script
        assert fed == [n for n, i in enumerate(expected) if i in (PAD, OTHER_SLOT)]
        text = "".join("s" if i == start else "e" if i == end else "p" if i in (PAD, OTHER_SLOT) else "w"
                       for i in expected)
        found = [(m.end() - m[0].count("p"), m[0].count("p"), {"": "max_tokens", "e": "end"}.get(
            text[m.end():m.end() + 1], "word")) for m in re.finditer("sp*|p+", text)]
        assert [(s.start, s.size, s.closed_by) for s in row.out.segments] == found, text
        n_segments += len(found)
    assert n_segments > N_SCRIPTS


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - FED_BACK))
def test_a_batch_of_the_kind_ids_is_the_library_s_decoding(tiny_checkpoint, name):
    """Left-padded prompts of unlike lengths, several segments a row, driven by scripts; and the same model's
    own replies, which are those of generate."""
    spec = replace(PRESETS[name], force_start=False)
    qwen = load_with(tiny_checkpoint, spec)
    batch, ids = batch_of(qwen), latent_ids(qwen.tokenizer, spec)
    library = library_generate(qwen, batch, 12)[:, batch["input_ids"].shape[1]:]
    for row, own in zip(library.tolist(), generate(qwen, batch, 12, spec)):
        assert row[:len(own.ids)] == own.ids
    slots, begin, close = sorted(ids.slots), [ids.start or 50], [ids.end or 60]
    scripts = [[5, *begin, *slots[:1] * 3, *close, 6, *begin, *slots[-1:] * 2, *close, 7],
               [*begin, *slots[:1], 5, *slots[-1:], *close, 6, 7], [5, 6, *slots[:1] * 8, 7, 5]]
    arms = [Intervention(choose=lambda logits, n, tokens=tokens: [*tokens, *[qwen.eos_ids[0]] * 20][n])
            for tokens in scripts]
    rows = generate(qwen, batch, 20, spec, arms, capture=True)
    embedding = qwen.model.get_input_embeddings().weight
    for tokens, row in zip(scripts, rows):
        assert row.ids == [*tokens, qwen.eos_ids[0]] and row.finish == "stop"
        at = [n for n, i in enumerate(row.ids) if i in ids.slots]
        assert sum(segment.size for segment in row.segments) == len(at)
        assert torch.equal(row.fed, embedding[[row.ids[n] for n in at]])
    plain = Q.load(str(tiny_checkpoint), device="cpu").tokenizer
    plain.add_tokens(list(spec.tokens))  # not special, as in CoVT
    assert clean_text(plain, [*latent_ids(plain, spec).slots, 50], spec) == plain.decode([50]).strip()
    assert [len(row.segments) for row in rows] == [2, 2, 1]


@pytest.mark.parametrize("name, sizes", [("covt", [8, 4, 4, 4]), ("lavit", [4]), ("mull", [20])])
def test_an_opening_is_what_training_writes(tiny_checkpoint, name, sizes):
    spec = spec_of(name, None, force_start=True)
    qwen = load_with(tiny_checkpoint, spec)
    opening = latent_ids(qwen.tokenizer, spec).opening
    for row in generate(qwen, batch_of(qwen), len(opening), spec):
        assert row.ids == [*opening] and qwen.tokenizer.decode(opening) == spec.opening
        assert [segment.size for segment in row.segments] == sizes
    never = [Intervention(forbid=lambda row, token: token in opening[:1])] * 3
    for row in generate(qwen, batch_of(qwen), 6, spec, never):
        assert row.n_forbidden and opening[0] not in row.ids  # then nothing is forced
    with pytest.raises(DataError, match="any number of latents"):
        spec_of(name, 4)


@pytest.mark.parametrize("name", FED_BACK)
def test_a_start_can_be_forced_and_forbidden(tiny_checkpoint, name):
    spec = spec_of(name, 2, force_start=True)
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    add_tokens(qwen, spec.tokens)
    start = latent_ids(qwen.tokenizer, spec).start
    rows = generate(qwen, batch_of(qwen), 6, spec)
    assert all(row.ids[0] == start and row.segments and row.segments[0].start == (not spec.overwrite_start)
               for row in rows)
    never = [Intervention(forbid=lambda row, token: token == start)] * 3
    assert not any(start in row.ids or row.segments for row in generate(qwen, batch_of(qwen), 6, spec, never))


def test_a_start_without_a_family_is_refused():
    assert spec_of("off", None) is None and spec_of("mirage", None).size == 4
    with pytest.raises(DataError, match="--force_start: no start of latents"):
        spec_of("off", None, force_start=True)
