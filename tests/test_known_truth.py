"""Models whose truth is known by their masks: identities, the mutations that break them, verdicts."""
import json
from dataclasses import replace

import pytest
import torch
from imagining import make_picture, write_items
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from toy import known_truth
from toy.known_truth import (COLORS, GRID, LATENTS, LAYOUT, MASKS, NON_ZERO, PATCH, QUICK, TOYS, VOCABULARY,
                             ZEROS, additive, agrees, allowed, check_masks, check_verdicts, compare,
                             draw_items, fed_of, layout, main, make_interventions, make_toy, positions,
                             reproducible, run, run_interventions)
from utils import qwen as Q
from utils.decode import decode, prefill
from utils.intervene import effects
from utils.intervene.effects import Declared, Limits, summarize
from utils.intervene.latent_batch import LatentBatch
from utils.intervene.latent_case import Calibration
from utils.intervene.prompts import Settings
from utils.items import prompt_of
from utils.latent_families import PRESETS, Intervention

pytestmark = pytest.mark.numeric

MIRAGE = PRESETS["mirage"]
END, DECLARED = len(LAYOUT) - 1, {"tau": Declared("fed", "do(Z)")}
EXACT = 1e-5  # two orders of the same sums in float32, of logits of about 1


@pytest.fixture(scope="module")
def worlds():
    """Return {mask: (toy with random weights, pictures, other pictures, run of each)}."""
    found = {}
    with reproducible(3), torch.no_grad():
        for mask in MASKS:
            toy, pixels = make_toy(mask), draw_items(8, torch.Generator().manual_seed(3))
            other = pixels.roll(1, 0)
            found[mask] = toy, pixels, other, run(toy, pixels), run(toy, other)
    return found


def largest(one, two):
    return float((one.logits - two.logits).abs().max())


# ---- random weights
@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_mask_forbids_makes_no_difference_and_what_it_allows_makes_one(seed):
    """The columns of three passes of eight pictures: 0 to the last bit, or a change that is seen."""
    found = check_masks(seed)
    assert found["ok"], found["wrong"]
    for mask, cells in found["columns"].items():
        for name, value in cells.items():
            assert (value == 0.0) if name in ZEROS[mask] else value > NON_ZERO, (mask, name, value)


def test_another_mask_is_not_taken_for_the_one_that_is_named():
    """Each mask's zeros fail under every other mask but where they are a part of the others'."""
    for mask, other in (("in", "slot"), ("slot", "open"), ("bypass", "open"), ("question", "slot"),
                        ("consume", "in"), ("again", "bypass"), ("dead", "open")):
        with reproducible(0):
            pixels = draw_items(8, torch.Generator().manual_seed(0))
            cells = compare(replace(make_toy(mask), mask=other), pixels, pixels.roll(1, 0))
        assert any(cells[name] > NON_ZERO for name in ZEROS[mask]), (mask, other)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "again"])
@pytest.mark.parametrize("way, hide", [("", ()), ("", ("latents",)), ("", ("latents", "images")),
                                       ("stem", ("images",)), ("strict", ())])
@torch.no_grad()
def test_steps_over_the_cache_equal_one_pass_with_the_whole_mask(worlds, mask, way, hide):
    """The second way: everything in one pass without a cache, the captured latents as inputs, positions by
    the library."""
    toy, pixels, _, clean, _ = worlds[mask]
    mine, names = run(toy, pixels, fed_of(clean), way=way, hide=hide), layout(mask, way)
    expected = whole(toy, pixels, clean.fed, names, allowed(mask, way, hide))
    assert torch.allclose(mine.logits, expected, atol=EXACT)


def embed(toy, pixels, fed, names=LAYOUT):
    """The embeddings of the whole prompt with these latents, the ids, and the grids of the pictures."""
    ids = torch.tensor([[VOCABULARY[name] for name in names]] * len(pixels))
    embeds, grid = toy.model.get_input_embeddings()(ids), torch.tensor([[1, GRID, GRID]] * len(pixels))
    embeds[ids == VOCABULARY["I"]] = torch.cat(list(toy.model.model.get_image_features(
        pixels.flatten(0, 1), grid, return_dict=True).pooler_output))
    embeds[:, LATENTS] = fed
    return embeds, ids, grid


@torch.no_grad()
def whole(toy, pixels, fed, names, see):
    embeds, ids, grid = embed(toy, pixels, fed, names)
    places = toy.model.model.get_rope_index(ids, mm_token_type_ids=(ids == VOCABULARY["I"]).int(),
                                            image_grid_thw=grid)[0]
    assert torch.equal(places, positions(len(pixels), names))
    hidden = toy.model.model(inputs_embeds=embeds, attention_mask=additive(see), position_ids=places,
                             use_cache=False).last_hidden_state
    return toy.model.lm_head(hidden[:, -1])[:, :len(COLORS)]


# the answer alone, of each mask: what a row after the latents may see
SEEN = {("open", "strict"): "bos vs z z Q cell end", ("open", "blind"): "bos Q cell start z z end",
        ("question", ""): "bos vs Q cell start z z end", ("dead", "stem"): "cell", ("again", ""): "z z end",
        ("consume", "strict"): "bos vs z z Q cell end", ("bypass", "strict"): "bos vs Q cell end"}


@pytest.mark.parametrize("mask, way", SEEN)
def test_the_last_row_sees_what_its_mask_says(mask, way):
    row = allowed(mask, way)[-1].tolist()
    assert " ".join(name for name, seen in zip(layout(mask, way), row) if seen) == SEEN[mask, way]


@pytest.mark.parametrize("leak", ["I", "Q"])
@torch.no_grad()
def test_an_image_or_a_question_row_left_visible_is_no_strict(worlds, leak, monkeypatch):
    """Equal latents, unlike images: only a leak tells them apart."""
    toy, pixels, other, clean, _ = worlds["open"]

    def leaky(mask, way="", hide=()):
        see, names = allowed(mask, way, hide), layout(mask, way)
        see[names.index("start") + 3:, names.index(leak)] |= way == "strict"
        return see

    def change():
        return largest(run(toy, pixels, way="strict"), run(toy, other, slots=clean.slots, way="strict"))

    assert change() == 0
    monkeypatch.setattr(known_truth, "allowed", leaky)
    assert change() > NON_ZERO


def test_pictures_are_flat_and_laid_out_as_the_image_processor_does(tiny_checkpoint):
    picture = make_picture("red", False)  # 56 x 56: as the toys' pictures
    processed = Q.process_images(Q.load_processors(str(tiny_checkpoint))[1], [picture])
    assert processed["image_grid_thw"].tolist() == [[1, GRID, GRID]]
    assert processed["pixel_values"].shape == draw_items(1, torch.Generator())[0].shape == (GRID**2,
                                                                                            3 * 2 * PATCH**2)
    patches = processed["pixel_values"].view(GRID**2, 3, -1)
    assert float((patches - patches[:1, :, :1]).abs().max()) < 1e-6  # a value a channel, channel by channel


def test_the_class_is_the_librarys_own_and_the_surroundings_are_left_as_they_were():
    torch.manual_seed(11)
    before, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found = check_masks(0)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(dtype)
    assert found["ok"] and torch.equal(before, torch.random.get_rng_state())
    with reproducible(0):
        toy = make_toy("open")
    assert type(toy.model.model) is Qwen2_5_VLModel and next(toy.model.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="expected one of open bypass in slot question consume again dead"):
        make_toy("closed")
    with pytest.raises(ValueError, match="nor hide the"):
        run_interventions(toy, draw_items(2, torch.Generator()),
                          [Intervention(), Intervention(hide=("latents",))])


# ---- mutations
@pytest.mark.parametrize("mask", ["open", "in"])
@torch.no_grad()
def test_a_latent_fed_one_step_late_is_no_replay(worlds, mask):
    toy, pixels, _, clean, _ = worlds[mask]
    start = toy.model.get_input_embeddings().weight[VOCABULARY["start"]].expand(len(pixels), -1)
    late = run(toy, pixels, lambda z, step: clean.fed[:, step - 1] if step else start)
    assert largest(run(toy, pixels, fed_of(clean)), clean) == 0 and largest(late, clean) > NON_ZERO


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_slots_without_one_layer_are_not_the_donors(worlds, layer):
    toy, pixels, _, clean, donor = worlds["slot"]
    broken = donor.slots.clone()
    broken[:, :, layer] = clean.slots[:, :, layer]
    assert largest(run(toy, pixels, slots=donor.slots), donor) == 0
    assert largest(run(toy, pixels, slots=broken), donor) > NON_ZERO


@torch.no_grad()
def test_keys_of_a_donor_at_other_positions_are_not_its_slots(worlds):
    """A donor five positions further on: its layer inputs do at home what they did there, its cached keys do
    not."""
    toy, pixels, other, clean, donor = worlds["slot"]
    moved = run(toy, other, shift=5)
    assert largest(moved, donor) < EXACT and torch.allclose(moved.slots, donor.slots, atol=EXACT)
    assert largest(run(toy, pixels, slots=moved.slots), donor) < EXACT
    # the way itself is right
    assert torch.allclose(at_end(toy, pixels, clean, other, donor, 0), donor.logits, atol=EXACT)
    assert float((at_end(toy, pixels, clean, other, moved, 5) - donor.logits).abs().max()) > NON_ZERO


@torch.no_grad()
def at_end(toy, pixels, clean, other, donor, shift):
    """The logits at `end` over the cache of a run that holds a donor's keys and values at the latent
    positions."""
    see = allowed(toy.mask)

    def read(pictures, vectors, moved):
        embeds = embed(toy, pictures, vectors)[0]
        return embeds, toy.model.model(inputs_embeds=embeds[:, :END],
                                       attention_mask=additive(see[:END, :END]),
                                       position_ids=positions(len(pictures), shift=moved)[..., :END],
                                       use_cache=True).past_key_values

    embeds, cache = read(pixels, clean.fed, 0)
    for layer, donors in zip(cache.layers, read(other, donor.fed, shift)[1].layers):
        layer.keys[:, :, LATENTS] = donors.keys[:, :, LATENTS]
        layer.values[:, :, LATENTS] = donors.values[:, :, LATENTS]
    out = toy.model.model(inputs_embeds=embeds[:, END:], attention_mask=additive(see[END:]),
                          past_key_values=cache,
                          position_ids=positions(len(pixels))[..., END:], use_cache=True)
    return toy.model.lm_head(out.last_hidden_state[:, -1])[:, :len(COLORS)]


@torch.no_grad()
def test_the_positive_control_fails_where_a_hook_does_not_reach(worlds):
    """A harness whose hook never fires reports no effect everywhere: on `in` an unchanged answer is the sign
    of it."""
    toy, pixels, _, clean, donor = worlds["in"]
    arms = make_interventions("swap_random", clean, donor, None)
    assert largest(run_interventions(toy, pixels, arms), donor) == 0
    broken = [replace(arm, feed=None) for arm in arms]
    assert largest(run_interventions(toy, pixels, broken), donor) > NON_ZERO


def test_effects_are_of_items_that_emit_in_their_clean_run():
    """Items 0-7 emit clean and are broken by the condition, of which 0-3 then emit nothing; 8-11 emit only
    under it.

    Taken from the intervened run the emitters would be 4-11, and the drop 4 of 8 in place of 8 of 8.
    """
    items = [{"id": str(i), "answer": {"type": "letter", "value": "A"}} for i in range(12)]
    records = {}
    for i, item in enumerate(items):
        emits, then = i < 8, 4 <= i
        clean = {"emitted": emits, "pred": "A", "correct": True, "degenerate": False}
        after = {"emitted": then, "pred": "B" if emits else "A", "correct": not emits, "degenerate": False,
                 "changed": emits}
        records[item["id"]] = {"clean": clean, "tau": after}
    found = summarize(items, records, DECLARED, Limits(0.05, 0.05, 2))
    effect = found["conditions"]["tau"]["effect"]
    assert found["emission"]["k"] == 8 and (effect["n"], effect["b"], effect["c"]) == (8, 8, 0)
    assert effect["delta"] == -1 and effect["delta_all"] == pytest.approx(-8 / 12) and effect[
        "emitted_int"] == 0.5
    swapped = {name: {"clean": {**its["clean"], "emitted": its["tau"]["emitted"]}, "tau": its["tau"]}
               for name, its in records.items()}
    wrong = summarize(items, swapped, DECLARED, Limits(0.05, 0.05, 2))["conditions"]["tau"]["effect"]
    assert (wrong["n"], wrong["delta"]) == (8, -0.5)


def test_an_undone_swap_and_a_blind_readout_would_be_called_equivalent(monkeypatch):
    """Without the record of a new imagination, and without the positive control, both are false nulls."""
    assert check_verdicts() == {"found": known_truth.VERDICTS, "ok": True}

    def forgetful(items, records, *rest):
        return summarize(items, {name: {condition: record | {"again": False}
                                        for condition, record in by.items()}
                                 for name, by in records.items()}, *rest)

    monkeypatch.setattr(known_truth, "summarize", forgetful)
    monkeypatch.setattr(effects, "sensitivity_of", lambda control: dict.fromkeys(effects.READOUTS, {
        "moves": True, "reason": None}))
    found = check_verdicts()
    assert not found["ok"]
    assert found["found"] == {"dead": {"r2": "effect", "r0": "equivalent"},
                              "again": {"r2": "equivalent", "r0": "equivalent"}}


# ---- trained toys
def check(found, names):
    assert json.loads(json.dumps(found, allow_nan=False))["ok"] is found["ok"]
    assert list(found["toys"]) == list(names)
    for name, toy in found["toys"].items():
        assert toy["ok"], (name, toy["wrong"], toy["found"])
    assert found["masks"]["ok"] and found["verdicts"]["ok"] and found["ok"]


def test_the_quick_toys_are_judged_as_they_were_built(capsys):
    """Necessary, irrelevant, and needed in their positions alone: the last is the false null of an arm at one
    site."""
    before = torch.random.get_rng_state()
    assert main([]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    check(found, QUICK)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "slot_random: as expected" in printed.err
    columns = {name: toy["columns"] for name, toy in found["toys"].items()}
    fed = ("tau", "tau_mean", "moment_noise", "norm_noise", "near_zero")
    for name, its in columns.items():
        assert its["clean"] > 0.98, name
        assert abs(its["centred_cosine"]) < 0.02
    necessary, irrelevant, slot = (columns[name] for name in QUICK)
    assert all(necessary[name] < 0.3 for name in fed) and necessary["cut_latent"] < 0.3
    # the donor's, as exact as the mask
    assert necessary["swap_random_donor"] == pytest.approx(necessary["clean"], abs=0.02)
    assert necessary["other_image_keeps"] == necessary["clean"]  # Y(x', Z(x)) = Y(x, Z(x)) to the last bit
    assert len({irrelevant[name] for name in ("clean", *fed, "swap_random", "slot_swap_random",
                                              "cut_latent")}) == 1
    assert all(slot[name] > 0.97 for name in (*fed, "swap_random")) and slot["cut_latent"] < 0.3
    assert slot["slot_swap_random_donor"] > 0.97 and slot["other_image_keeps"] < 0.03


@pytest.mark.slow
def test_all_toys_are_judged_as_they_were_built(capsys):
    assert main(["--full"]) == 0
    found = json.loads(capsys.readouterr().out)
    check(found, TOYS)
    columns = found["toys"]["in_shared"]["columns"]
    # alike in the raw, and necessary all the same
    assert columns["raw_cosine"] > 0.95 and abs(columns["centred_cosine"]) < 0.01
    assert columns["tau_mean"] < 0.3 and columns["swap_random_donor"] > 0.98


@pytest.mark.parametrize("found, expected, fits", [
    ("effect", "effect", True), ("mixed", "equivalent", False), (0.99, 1, True), (0.97, 1, False),
    (None, 0, False),
    ("small effect inside the margin", ("equivalent", "small effect inside the margin"), True),
    ("effect", ("equivalent",), False)])
def test_a_finding_against_what_is_expected(found, expected, fits):
    assert agrees(found, expected) is fits


# ---- the product's own path
@pytest.fixture(scope="module")
def follower(imagining_model, tmp_path_factory):
    """A checkpoint whose answer is the colour whose code is fed, and eight items with their images."""
    _, items = write_items(tmp_path_factory.mktemp("items"), 8)
    images = [[make_picture(dict(item["options"])[item["answer"]["value"]], i % 2)] for i,
              item in enumerate(items)]
    return Q.load(str(imagining_model("latent", True)), device="cpu", dtype="float32"), items, images


def test_every_site_through_the_batch_of_the_product(follower):
    qwen, items, images = follower
    settings = Settings(None, "", 24, "The answer is \\boxed{", "text", 0, 16)
    prompts = Q.encode(qwen, [prompt_of(qwen.tokenizer, item, 1, None, "") for item in items], images)
    known = Calibration.from_runs(decode(qwen, prefill(qwen, prompts), 24, MIRAGE, capture=True,
                                   with_slots=True)[0])
    names = ["identity", "replay", "tau", "swap_random", "swap_blank", "blank_x", "slot_mean_t",
             "slot_swap_random", "slot_swap_blank",
             "slot_blank_x", "cut_latent", "cut_both"]
    batch = LatentBatch(qwen, MIRAGE, known, settings, items, images, [{}] * len(items))
    records = batch.records(names)
    assert len(batch.emitters) == len(items)
    for item, record in zip(items, records):
        clean = record["clean"]
        for name in names:
            its = record[name]
            assert "reason" not in its and its["r0"] and sum(its["r0"]["pi"].values()) == pytest.approx(1), (
                name, its)
            fed_is_edited = name in ("tau", "swap_random", "swap_blank", "blank_x")
            assert (its["rel_change"] > 1e-5) == fed_is_edited, (name, its["rel_change"])
            if name in ("tau", "swap_random", "swap_blank", "slot_mean_t", "slot_swap_random",
                        "slot_swap_blank"):
                assert its["reach"] > 1e-5, name  # the layers behind the first have read something else
        # its own slots, its own latents alone
        assert record["slot_blank_x"]["reach"] == 0 and record["blank_x"]["reach"] > 1e-5
        for name in ("identity", "replay"):
            assert not record[name]["changed"] and record[name]["reach"] < 1e-5 and record[name][
                "pred"] == clean["pred"]
        assert record["cut_latent"]["reach"] == pytest.approx(0, abs=1e-5)  # an edge acts behind the latents
        assert record["cut_latent"]["r0"]["nll"] != clean["r0"]["nll"]
        for name in ("swap_random", "slot_swap_random"):
            donor = next(one for one in items if one["id"] == record[name]["donor"]["item"])
            assert donor["group_id"] != item["group_id"] and donor["answer"]["value"] == record[name][
                "donor"]["gold"]
