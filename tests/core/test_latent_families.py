"""Families' state machines against the loops of their own code, told again over scripted ids."""
import random
from dataclasses import replace

import pytest
import torch
from decoding import batch_of, generate, load_with

from utils import qwen as Q
from utils.jsonl import DataError
from utils.latent_families import PRESETS, Intervention, RowState, latent_ids, spec_of
from utils.train.weights import add_tokens

START, PAD, END, EOS, AFTER = 1, 2, 3, 9, 8
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
    row, fed = RowState(spec, (START, PAD, END), [EOS], AFTER if spec.after_limit else None), []
    for token in script:
        if row.done:
            break
        if row.advance(token if row.forced is None else row.forced):
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
            possible, state = [], RowState(spec, (START, PAD, END), [EOS])
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
    start, pad, end = latent_ids(qwen.tokenizer, spec)
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


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_start_can_be_forced_and_forbidden(tiny_checkpoint, name):
    spec = spec_of(name, 2, force_start=True)
    qwen = Q.load(str(tiny_checkpoint), device="cpu")
    add_tokens(qwen, spec.tokens)
    start, _, _ = latent_ids(qwen.tokenizer, spec)
    rows = generate(qwen, batch_of(qwen), 6, spec)
    assert all(row.ids[0] == start and row.segments and row.segments[0].start == (not spec.overwrite_start)
               for row in rows)
    never = [Intervention(forbid=lambda row, token: token == start)] * 3
    assert not any(start in row.ids or row.segments for row in generate(qwen, batch_of(qwen), 6, spec, never))


def test_a_start_without_a_family_is_refused():
    assert spec_of("off", None) is None and spec_of("mirage", None).size == 4
    with pytest.raises(DataError, match="--force_start: no start of latents"):
        spec_of("off", None, force_start=True)
