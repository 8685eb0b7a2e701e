"""The image through the imagination alone, and a helper image in place of the imagination."""
from dataclasses import replace

import pytest
import torch
from decoding import MIRAGE, embedded, load_with, one_pass, prefill_with
from imagining import make_picture, write_items
from PIL import Image

from utils import qwen as Q
from utils.decode import State, decode, prefill
from utils.intervene.latent_batch import LatentBatch, keep_ids
from utils.intervene.latent_case import (Case, NotPossible, forced_prefix, go_on, joined, latents_alone,
                                         likeliest, put_slots)
from utils.intervene.latent_conditions import find_condition
from utils.intervene.prompts import Settings
from utils.intervene.text_batch import TextBatch
from utils.items import blind_turn, prompt_of
from utils.latent_families import (PRESETS, Generation, Intervention, LatentIds, RowState, Segment,
                                   last_latent, latent_steps)
from utils.option_scores import score_options
from utils.qwen import encode, image_features, process_images

pytestmark = pytest.mark.numeric

STEM = " The answer is \\boxed{"
SETTINGS = Settings(None, "", 24, STEM, "letter", 0, 8)
SAME = 1e-4  # of scores, in nats: two orders of the same sums
START, PAD, END, EOS, AFTER, SLOT = 1, 2, 3, 9, 4, 8  # of the scripted state machines


def item(n):
    return {"id": str(n), "question": f"What digit is on circle {n}?", "options": [["A", "x"], ["B", "y"]],
            "images": [{"path": f"{n}.png"}], "answer": {"type": "letter", "value": "A"}, "metric": "mcq"}


ITEMS = [item(0), item(1), {**item(0), "id": "0 again", "images": [{"path": "1.png"}]}]
PICTURES = [[Image.new("RGB", (84, 84), color)] for color in ("red", "blue", "blue")]
HELPER = Image.new("RGB", (84, 56), "green")  # 6 visual tokens
HELPER.paste("white", (0, 0, 40, 20))


@pytest.fixture(scope="module")
def batch(tiny_checkpoint):
    """Three items that imagine, the first and the last one question about two pictures; the first has a
    helper image."""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    others = [{"helper": (ITEMS[0], [HELPER])}, {"helper": (ITEMS[1], [HELPER])}, {}]
    batch = LatentBatch(qwen, MIRAGE, None, SETTINGS, ITEMS, PICTURES, others)
    assert batch.emitters == [0, 1, 2] and len(batch.clean[0].row.segments) > 1
    return batch


@torch.no_grad()
def scores_by_hand(batch, place):
    """The options' scores behind a strict question in one pass with the mask written out: rows behind the
    last latent see the prompt before its image, the latents and one another."""
    qwen, row = batch.qwen, batch.clean[place].row
    prompt = encode(qwen, [prompt_of(qwen.tokenizer, ITEMS[place], 1, None, "")], [PICTURES[place]])
    turn, end, *words = qwen.tokenizer([blind_turn(qwen.tokenizer, ITEMS[place], None, ""), MIRAGE.end,
                                        *(STEM + letter for letter in "AB")]).input_ids
    image = int(prompt["mm_token_type_ids"][0].argmax())
    n, first, scores = last_latent(row), prompt["input_ids"].shape[1], {}
    latents = [first + step for step in latent_steps(row)]
    for letter, ids in zip("AB", words):
        tail = embedded(qwen, row.ids[:n] + turn + end + ids)
        tail[0, latent_steps(row)] = row.fed
        allowed = torch.ones(first + tail.shape[1], first + tail.shape[1]).tril().bool()
        allowed[first + n:, image:first + n] = False
        allowed[first + n:, latents] = True
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        hidden = one_pass(qwen, prompt, tail, attention_mask={"full_attention": mask})
        assert ids[:-1] == words[0][:-1]  # the letter is one token
        scores[letter] = float(qwen.model.lm_head(hidden[-2]).log_softmax(-1)[ids[-1]])
    return scores


@pytest.mark.parametrize("place", [0, 1])
def test_strict_equals_one_pass_with_the_mask_written_out(batch, place):
    record = batch.records(["strict"])[place]
    clean, strict = record["clean"], record["strict"]
    assert strict["r0"]["logp"] == pytest.approx(scores_by_hand(batch, place), abs=SAME)
    assert max(abs(strict["r0"]["logp"][letter] - clean["r0"]["logp"][letter]) for letter in "AB") > 1e-2
    n = last_latent(batch.clean[place].row)
    assert strict["ids"][:n + 1] == clean["ids"][:n + 1] and strict["segments"][:1] == clean["segments"][:1]
    assert strict["rel_change"] == 0 and strict["reach"] < 1e-5 and strict["again"] is False


def strict_score(batch, place, source):
    """R0 under `strict`, the words and the layers' inputs at the latents being those of the item `source`."""
    row = batch.clean[source].row
    run, = batch.decode("own", [place], [forced_prefix(row, likeliest, put_slots(row))], last_latent(row) + 1,
                        strict=True)
    return torch.tensor(list(run.scores["r0"]["logp"].values()))


def test_with_the_latents_of_another_image_strict_is_that_image_s(batch):
    """The same question about red and blue: nothing but the latents' states can tell them apart."""
    own, swapped = strict_score(batch, 0, 0), strict_score(batch, 2, 0)
    assert torch.allclose(own, swapped, atol=SAME)
    assert not torch.allclose(own, strict_score(batch, 2, 2), atol=1e-3)
    r0 = [torch.tensor(list(record["clean"]["r0"]["logp"].values())) for record in batch.records([])]
    assert not torch.allclose(r0[0], r0[2], atol=1e-3)


@pytest.mark.parametrize("leak", ["image", "question", "words"])
def test_rows_that_have_read_the_image_must_be_hidden(batch, leak, monkeypatch):
    """Any of them left visible tells the images apart under equal latents."""
    hide = State.hide_all_but

    def leaky(self, kept):
        n = self.is_image.shape[1]
        for row, columns in kept.items():
            after = int(self.is_image[row].nonzero().max()) + 1
            columns += {"image": range(after - 9, after), "question": range(after, n),
                        "words": range(n, min(columns))}[leak]
        hide(self, kept)

    monkeypatch.setattr(State, "hide_all_but", leaky)
    assert not torch.allclose(strict_score(batch, 0, 0), strict_score(batch, 2, 0), atol=1e-3)


def test_the_vectors_fed_again_without_an_image_depend_on_nothing_else(batch):
    """`strict_fed` against a prompt put together by hand: the blind question, then the segments alone."""
    record, clean = batch.records(["strict_fed"])[0]["strict_fed"], batch.clean[0].row
    qwen, start = batch.qwen, batch.start_id
    assert record["n_fed"] == len(clean.fed) and [s["k"] for s in record["segments"]] == [
        segment.size for segment in clean.segments]
    ids = [i for segment in clean.segments for i in (start, *[batch.pad_id] * segment.size, batch.end_id)]
    assert record["ids"][:len(ids)] == ids and record["again"] is False
    text = prompt_of(qwen.tokenizer, ITEMS[0], 0, None, "") + qwen.tokenizer.decode(ids)
    state = prefill_with(qwen, encode(qwen, [text], [[]]), [clean.fed])
    scores = score_options(qwen, state, ITEMS[:1], [STEM], [[]])
    assert record["r0"]["logp"] == pytest.approx(scores[0], abs=SAME)
    rest, _ = decode(qwen, state, 24 - len(ids), MIRAGE)
    assert record["ids"] == ids + rest[0].ids


# ---- text
def test_words_alone_are_read_after_a_question_without_the_image(imagining_model, tmp_path):
    """Items that differ in their image alone score alike when they imagine the same words; with the image in
    view, a model that looks again tells them apart."""
    _, items = write_items(tmp_path, 8)
    qwen = Q.load(str(imagining_model("text", False)), device="cpu", dtype="float32")
    settings = Settings(None, "", 40, " It is \\boxed{", "text", 0, 64)
    images = [[make_picture(color, 0)] for color in ("red", "blue")]
    batch = TextBatch(qwen, settings, [items[0], {**items[0], "id": "other"}], images, [{}, {}])
    batch.texts[1], batch.spans[1] = batch.texts[0], batch.spans[0]
    one, other = batch.records(["strict", "sham"])
    assert one["strict"]["text"].startswith("<think_image>a square (red)</think_image>")
    assert one["strict"]["r0"]["logp"] == pytest.approx(other["strict"]["r0"]["logp"], abs=SAME)
    assert one["strict"]["ids"] == other["strict"]["ids"] and one["strict"]["again"] is False
    assert one["sham"]["r0"]["logp"] != pytest.approx(other["sham"]["r0"]["logp"], abs=0.1)


# ---- a helper image
def pooled_by_hand(qwen, image, size):
    pixels = process_images(qwen.image_processor, [image])
    with torch.no_grad():
        features = image_features(qwen, pixels)[0]
    width = len(features) // size
    return torch.stack([sum(features[k * width + j] for j in range(width)) / width for k in range(size)])


def decoded(batch, name, place):
    condition, number = find_condition(name)
    intervention = condition.make(batch.case(place, set(condition.needs)), number)
    return batch.decode("own", [place], [intervention])[0].row


def test_an_oracle_feeds_the_pooled_features_of_the_helper_image(batch, monkeypatch):
    row, clean = decoded(batch, "oracle", 0), batch.clean[0].row
    expected = pooled_by_hand(batch.qwen, HELPER, MIRAGE.size)
    wrong = pooled_by_hand(batch.qwen, PICTURES[0][0], MIRAGE.size)
    assert not torch.allclose(expected, wrong, atol=1e-3)
    for segment in row.segments[:len(clean.segments)]:
        assert torch.allclose(row.fed[:segment.size], expected[:segment.size], atol=1e-5)
    assert row.segments[0].size > 1
    records = batch.records(["oracle", "slot_oracle"])
    for name in ("oracle", "slot_oracle"):
        assert [record[name].get("reason") for record in records] == [None, None, "no_helper"]
        assert records[0][name]["donor"] is None and records[0][name]["reach"] > 0
    monkeypatch.setattr(batch, "spec", replace(MIRAGE, size=7))  # more than the helper has visual tokens
    assert batch.oracle(0) is None


def test_a_slot_oracle_puts_what_every_layer_reads_under_the_helper_image(batch):
    """Against a run of its own: the helper's prompt, the clean words forced."""
    qwen, clean, row = batch.qwen, batch.clean[0].row, decoded(batch, "slot_oracle", 0)
    state = prefill(qwen, encode(qwen, [prompt_of(qwen.tokenizer, ITEMS[0], 1, None, "")], [[HELPER]]))
    donor = decode(qwen, state, last_latent(clean) + 1, MIRAGE, [forced_prefix(clean, likeliest)],
                   with_slots=True, capture=True)[0][0]
    n = len(clean.slots)
    assert torch.allclose(torch.stack(row.slots[:n]), torch.stack(donor.slots[:n]), atol=1e-5)
    for layer in range(len(clean.slots[0])):  # each of them differs from the clean run's
        assert not torch.allclose(row.slots[0][layer], clean.slots[0][layer], atol=1e-3), layer


# ---- forced segments
def ids_of(spec):
    return LatentIds(START if spec.start else None, PAD, END if spec.end else None,
                     frozenset((PAD, SLOT) if spec.slots else ()), (5, PAD, SLOT, 6) if spec.opening else (),
                     AFTER if spec.after_limit else None)


def scripted(spec, choose, n):
    row = RowState(spec, ids_of(spec), [EOS])
    while len(row.out.ids) < n and not row.done:
        row.advance(row.forced[0] if row.forced else choose(len(row.out.ids)))
    return row.out


@pytest.mark.parametrize("name, script", [
    ("mirage", [5, START, 7, 7, 7, 6, START, 7, END, 6, EOS]),  # at the limit, then a sampled end
    ("monet_vllm", [5, START, 7, 7, 6, START, 7, 7, 7, EOS]), ("monet_capimagine", [START, END, 6, EOS]),
    ("lvr", [5, START, 7, 7, 6, START, 7, 7, 8, EOS]),
    # a sampled end, the limit, and an id three times in a row; the last two are followed by a forced id
    ("laser", [7, 6, END, 6, START, 6, 7, 7, 5, 7, START, 7, 7, 7, 7, EOS]),
    ("covt", [5, START, PAD, SLOT, END, 6, START, PAD, 7, EOS]), ("lavit", [PAD, SLOT, PAD, 6, EOS])])
def test_segments_are_forced_without_the_words_around_them(name, script):
    """Oracle: the ids of the clean run without what is outside of its segments and their marks."""
    spec = replace(PRESETS[name], size=4 if name == "laser" else 2)
    clean = scripted(spec, script.__getitem__, len(script))
    clean.fed = torch.ones(sum(segment.size for segment in clean.segments), 8)
    case = Case({}, clean, spec, torch.zeros(8), START, 0, pick=lambda logits, n: EOS)
    marks = {START, PAD} | ({END, AFTER} if spec.force_end else {END, SLOT} if spec.slots else set())
    expected = [i for i in clean.ids if i in marks]
    again = scripted(spec, lambda n: latents_alone(case).choose(None, n), 20)
    assert again.ids == [*expected, EOS] and again.finish == "stop"
    assert [(s.size, s.closed_by) for s in again.segments] == [(s.size, s.closed_by) for s in clean.segments]
    # what follows the last latent begins with the end marker where one was written, and what that forces
    n, after = last_latent(clean), go_on(clean, spec, lambda logits, n: -n)
    written = [i for i in clean.ids[n:n + 2] if i in (END, AFTER)]
    assert [after.choose(None, k) for k in range(3)] == [*written, *(-n - k for k in range(len(written), 3))]


@pytest.mark.parametrize("force_start", [False, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_segments_are_cut_emptied_and_left_out_whatever_is_sampled(name, force_start):
    """Models of random logits, in which slots and marks are likely, driven as `decode` drives a row."""
    spec = replace(PRESETS[name], size=3, force_start=force_start)
    ids, likely = ids_of(spec), torch.zeros(10)
    likely[[START, PAD, END, SLOT]] = 0.7

    def driven(intervention, seed):
        row, noise = RowState(intervention.spec or spec, ids, [EOS]), torch.Generator().manual_seed(seed)
        while len(row.out.ids) < 30 and not row.done:
            logits = torch.randn(10, generator=noise) + likely
            row.advance(intervention.next_id(logits, int(logits.argmax()), row.out, row.forced))
        return row.out

    n_latents = 0
    for seed in range(60):
        clean = driven(Intervention(), seed)
        case = Case({}, clean, spec, torch.zeros(8), ids.start, 0, slots=ids.slots)
        n_latents += len(latent_steps(clean))
        made = {}
        for condition in ("no_segment", "markers_only", "keep_first:2"):
            entry, number = find_condition(condition)
            try:
                made[condition] = driven(entry.make(case, number), seed)
            except NotPossible as fault:
                assert str(fault) == "no_marks" and spec.slots and not spec.end
        without = made["no_segment"]
        assert not {ids.start, *ids.slots} & {*without.ids} and not without.segments
        if emptied := made.get("markers_only"):
            assert not latent_steps(emptied) and not ids.slots & {*emptied.ids}
            assert len(emptied.segments) <= len(clean.segments)
            if spec.end and spec.force_end | bool(spec.slots) and emptied.segments:
                n = emptied.segments[0].start
                assert emptied.ids[n - 1:n + 1] in ([START, END], [START])
        if cut := made.get("keep_first:2"):
            assert all(segment.size <= 2 for segment in cut.segments)
        if spec.slots and latent_steps(clean):
            kept = keep_ids(case, Intervention(slot=lambda *place: None), False)
            again, n = driven(kept, seed + 1000), last_latent(clean)
            assert again.ids[:n] == clean.ids[:n] and latent_steps(again) == latent_steps(clean)
    assert n_latents > 60


def test_a_run_that_went_on_elsewhere_is_one_run():
    row = Generation([5, 1, 2, 2, 3, 6], segments=[Segment(2, 2, "limit")], states=torch.arange(6.0)[:, None],
                     fed=torch.ones(2, 1), slots=["a", "b"])
    rest = Generation([3, 1, 2, 3], "stop", [Segment(2, 1, "end")], torch.arange(4.0)[:, None] + 10,
                      torch.zeros(1, 1), slots=["c"])
    both = joined(row, rest)
    assert both.ids == [5, 1, 2, 2, 3, 1, 2, 3] and both.finish == "stop" and both.slots == ["a", "b", "c"]
    assert [(s.start, s.size) for s in both.segments] == [(2, 2), (6, 1)] == [
        (s.start, s.size) for s in both.segments if both.ids[s.start] == 2]
    assert both.states[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] and both.fed[:, 0].tolist() == [1, 1, 0]
