"""Interventions on models whose truth is known by training."""
import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_server import calls_of, serving
from imagining import NOTHING, make_latent_checkpoint, write_items

import intervene
from utils.display import plain_text
from utils.intervene.latent_case import Case
from utils.intervene.latent_conditions import CONDITIONS, PRESET_CONDITIONS
from utils.jsonl import DataError, read_rows, write_rows
from utils.latent_families import PRESETS, Generation, Intervention
from utils.probe.report import collect, write_report

pytestmark = pytest.mark.usefixtures("plain_figures")

STEM = " It is \\boxed{"  # what these models say on the way to their box


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("items"), 40)[0]


@pytest.fixture(scope="module", params=[True, False], ids=["follows", "ignores"])
def text_model(request, imagining_model):
    return imagining_model("text", request.param), request.param


@pytest.fixture(scope="module", params=[True, False], ids=["follows", "ignores"])
def latent_model(request, imagining_model):
    return imagining_model("latent", request.param), request.param


def flags(items, model, output):
    return ["--items", str(items), "--model", str(model), "--output", str(output), "--max_new_tokens", "40",
            "--min_emitters", "8", "--calibration", "8", "--options", "text"]


def run(items, model, output, *more):
    """Return (metrics, records)."""
    stem = ["--stem", STEM] if "--latent" in more else []
    assert intervene.main([*flags(items, model, output), *stem, *more]) == 0
    metrics = json.loads(Path(f"{output}.metrics.json").read_text())
    return metrics, [json.loads(line) for line in Path(output).read_text().splitlines()]


def by_condition(records):
    """Return {item id: {condition: record}}."""
    result = {}
    for record in records:
        result.setdefault(record["id"], {})[record["condition"]] = record
    return result


def test_text_is_followed_by_the_model_that_follows_and_only_by_it(text_model, items, tmp_path):
    model, follows = text_model
    metrics, records = run(items, model, tmp_path / "r.jsonl")
    directed, sham = metrics["conditions"]["directed"], metrics["conditions"]["sham"]
    assert metrics["emission"]["share"] == 1 and metrics["acc_clean_all"]["share"] > 0.9
    assert sham["effect"]["same_answer"] == 1 and sham["effect"]["b"] == sham["effect"]["c"] == 0
    assert sham["r0"]["large"]["k"] == 0 and directed["coverage"]["share"] > 0.9
    if follows:
        assert directed["follow"]["share"] > 0.9 and directed["effect"]["acc_int"] < 0.1
        assert directed["effect"]["verdict"] == "effect"
    else:
        assert directed["follow"]["share"] < 0.1 and directed["resist"]["share"] > 0.9
    assert len(records) == 40 * 4  # clean, sham, directed, and the positive control
    assert metrics["sensitivity"]["r2"]["moves"] and directed["effect"]["n_effective"] == 20
    assert (tmp_path / "r.jsonl.effects.png").is_file()
    with open(tmp_path / "r.jsonl.effects.csv", newline="") as file:
        shown, = (row for row in csv.DictReader(file)
                  if row["condition"] == "directed" and row["readout"] == "R2")
    assert float(shown["change"]) == pytest.approx(directed["effect"]["delta"])
    for record in records:
        if record["condition"] == "directed" and record["edit"]:
            assert record["edit"]["before"] != record["edit"]["after"]
            assert record["text"].split("<think_image>")[0] == "I look. "  # nothing outside the span changed


def test_items_that_emit_nothing_are_left_out_and_the_emission_is_reported(items, tmp_path):
    model = make_latent_checkpoint(tmp_path / "m", emitting=("red", "blue"))
    asked = items, model, tmp_path / "r.jsonl", "--latent", "mirage"
    metrics, records = run(*asked)
    effects = {name: entry["effect"] for name, entry in metrics["conditions"].items()}
    effect = effects["tau"]
    assert effects["identity"]["changed"] == 0 and effects["norm_noise"]["acc_int"] < 0.7
    for record in records:
        if record.get("n_fed") and record["condition"] != "blank":
            assert record["site"] == (None if record["condition"] == "clean" else "fed")
            assert record["n_fed"] <= 4  # an edit may bring the end marker forward
            assert (record["rel_change"] > 0) == (record["condition"] not in ("clean", "identity"))
    assert metrics["emission"]["share"] == 0.5 and effect["n"] == 16
    assert effect["delta_all"] == pytest.approx(0.5 * effect["delta"])
    few = run(*asked, "--min_emitters", "17")[0]["conditions"]["tau"]
    assert few["effect"] is None and "fewer than --min_emitters 17" in few["reason"]


@pytest.mark.parametrize("follows", [True, False])
def test_slots_of_the_kind_ids_act_through_their_positions_alone(imagining_model, items, tmp_path, follows):
    """The colour is read at the slots' positions, whose own embeddings say nothing; the ids stay."""
    names = ["replay", "tau", "first_repeat", "permute", "dummy_pad", "swap_random", "mean_t", "swap_blank",
             "slot_swap_random", "slot_swap_counterfactual", "slot_swap_blank", "slot_blank_x", "cut_latent",
             "strict", "strict_fed", "oracle", "markers_only", "keep_first:2", "no_segment"]
    metrics, records = run(items, imagining_model("ids", follows), tmp_path / "r.jsonl", "--latent", "lavit",
                           "--conditions", *names)
    assert metrics["emission"]["share"] == 1 and metrics["closed_by"] == {"word": 32}
    found = metrics["conditions"]
    for name in ("swap_random", "mean_t", "swap_blank"):  # the same four embeddings in every run
        assert found[name]["reasons"] == {"same_vectors": 32}
    assert found["oracle"]["reasons"] == {"no_helper": 32}  # nothing that is fed was taught to equal one
    assert found["markers_only"]["reasons"] == found["keep_first:2"]["reasons"] == {"no_marks": 32}
    assert found["replay"]["effect"]["acc_int"] == 1 and found["no_segment"]["effect"]["acc_int"] == 0
    # by R0: in this chain of words the last embedding also says which word comes next
    right = {name: entry["r0"]["acc_int"] for name, entry in found.items() if entry["r0"]}
    assert [right[name] for name in ("replay", "tau", "first_repeat", "permute", "dummy_pad")] == [1] * 5
    moved = [right[name] for name in ("slot_swap_random", "slot_swap_counterfactual", "cut_latent")]
    assert moved == ([0, 0, 0.25] if follows else [1, 1, 1])
    assert found["slot_swap_counterfactual"]["follow"]["share"] == follows
    assert right["slot_swap_blank"] == (0.25 if follows else 1)
    assert right["slot_blank_x"] == (1 if follows else 0.25) and right["strict_fed"] == 0.25
    assert right["strict"] == 1 if follows else right["strict"] < 0.5
    for record in records:
        if record["site"] in ("fed", "slot") and record["condition"] != "strict_fed" and record.get("text"):
            assert [(s["start"], s["k"]) for s in record["segments"]] == [(0, 4)] and not record["again"]
            assert (record["rel_change"] > 0) == (record["condition"] in ("tau", "first_repeat", "permute",
                                                                          "dummy_pad"))


@pytest.mark.parametrize("family, benchmark, row", [
    ("mirage", None, "| near_zero | 20.0 | 65.0 | 35.5 | 51.50 |"),
    ("covt", "cv_bench/2D", "| norm_noise | 20.0 | 21.39 |"),
    ("mull", "blink/Counting", "| clean | 80.0 | 63.71 |")])
def test_published_rows_stand_beside_a_run_on_their_benchmark(family, benchmark, row):
    entry = {"effect": {"acc_int": 0.2}}
    metrics = {"latent": family, "acc_clean_emitters": {"share": 0.8},
               "conditions": {"norm_noise": entry, "near_zero": entry}}
    items = [{"metric": "mcq" if benchmark else "vsp_path", "benchmark": benchmark}]
    assert row in plain_text(intervene.published_blocks(items, metrics))
    for others in ([{"metric": "mcq", "benchmark": "cv_bench/3D"}], [*items, {"metric": "mcq"}]):
        assert intervene.published_blocks(others, metrics) == []
    assert intervene.published_blocks(items, metrics | {"latent": "lavit"}) == []


# ---- three sites
MANY = ["replay", "mean_t", "swap_random", "swap_counterfactual", "swap_blank", "blank", "blank_x",
        "slot_swap_random", "slot_swap_counterfactual", "slot_swap_blank", "slot_blank_x", "cut_latent",
        "cut_image_after", "cut_both", "strict", "strict_fed", "oracle", "slot_oracle", "markers_only",
        "x_counterfactual", "slot_swap_at:0-3/0-1", "slot_swap_at:0-3/0", "slot_swap_at:0/1",
        "keep_first:2"]


@pytest.fixture(scope="module")
def many(latent_model, items, tmp_path_factory):
    """(whether the model follows its latents, model, metrics, records) of many conditions in one run."""
    model, follows = latent_model
    output = tmp_path_factory.mktemp("many") / "r.jsonl"
    return follows, model, *run(items, model, output, "--latent", "mirage", "--dtype", "float32",
                                "--conditions", *MANY)


def test_sites_show_who_uses_latents(many):
    """The model that follows its latents gives the donor's answer from either site and needs no image after
    them; the model that looks again does neither."""
    follows, _, metrics, records = many
    effects = {name: entry["effect"] for name, entry in metrics["conditions"].items()}
    donors = [record for record in records
              if record["condition"] in ("swap_counterfactual", "slot_swap_counterfactual")]
    share = sum(record["pred"] == record["donor"]["option"] for record in donors) / len(donors)
    assert len(donors) == 64 and (share > 0.9 if follows else share < 0.1)
    assert (effects["cut_latent"]["acc_int"] < 0.6) == follows
    for name in ("cut_image_after", "strict", "strict_fed"):
        assert (effects[name]["acc_int"] > 0.9) == follows and (effects[name]["acc_int"] > 0.6) == follows
    assert (effects["slot_oracle"]["acc_int"] < 0.1) == follows  # the helper shows the edit's colour
    assert (effects["slot_oracle"]["acc_int"] > 0.9) != follows
    # the positive controls move the score of either
    assert metrics["conditions"]["cut_both"]["r0"]["ci95"][0] > 0
    # right for the edit, which was asked
    assert metrics["conditions"]["x_counterfactual"]["asked"]["correct_flip"]["share"] > 0.9
    for site in ("fed", "slot"):
        parts = metrics["mediation"][site]["r0"]
        value = parts["proportion_mediated"]["value"]
        assert value > 0.9 if follows else abs(value) < 0.2
        assert parts["TE"]["mean"] == pytest.approx(parts["NIE"]["mean"] + parts["NDE"]["mean"])
    for by in by_condition(records).values():
        assert by["replay"]["changed"] is False
        assert by["replay"]["r0"]["nll"] == pytest.approx(by["clean"]["r0"]["nll"], abs=1e-4)
        assert by["markers_only"]["n_fed"] == by["slot_swap_random"]["rel_change"] == 0
        assert by["slot_swap_random"]["reach"] > 0


@pytest.mark.parametrize("family", ["skila", "swimbird", "ilvr", "laser"])
def test_a_model_of_each_family_is_followed_through_its_latents(items, tmp_path, family):
    """The same truth as with Mirage's marks: the answer comes from the vectors fed, and by strict paths, too.
    A run whose start is forced is of another policy, and says so."""
    model = make_latent_checkpoint(tmp_path / "m", family=family)
    names = ["replay", "tau", "swap_counterfactual", "slot_swap_counterfactual", "strict", "strict_fed",
             "markers_only", "no_segment"]
    metrics, records = run(items, model, tmp_path / "r.jsonl", "--latent", family, "--max_new_tokens", "80",
                           "--limit", "16", "--min_emitters", "4", "--conditions", *names, "--force_start")
    by = by_condition(records)
    assert metrics["emission"]["share"] == 1 and metrics["force_start"]
    closed = {"laser": {"repetition"}, "ilvr": {"limit"}}.get(family, {"limit", "end"})
    assert set(metrics["closed_by"]) <= closed
    for conditions in by.values():
        assert not conditions["replay"]["changed"] and conditions["clean"]["correct"]
        assert conditions["strict"]["correct"] and conditions["strict_fed"]["correct"]
        assert all(conditions[name]["pred"] == conditions[name]["target"]
                   for name in ("swap_counterfactual", "slot_swap_counterfactual"))
        assert conditions["markers_only"]["n_fed"] == 0 and not conditions["no_segment"]["segments"]
    with pytest.raises(DataError, match="force_start"):  # an earlier run's settings
        run(items, model, tmp_path / "r.jsonl", "--latent", family, "--max_new_tokens", "80", "--limit", "16")


STANDARD = ["--latent", "mirage", "--limit", "32", "--margin", "0.2", "--dtype", "float32", "--conditions"]


def judged(items, model, output, *names):
    metrics, _ = run(items, model, output, *STANDARD, *names)
    return metrics, metrics["summary"]


def test_the_standard_verdict_is_right_on_models_whose_truth_is_known(latent_model, items, tmp_path):
    """One command; every sentence of the page follows from how the model was built."""
    model, follows = latent_model
    metrics, text = judged(items, model, tmp_path / "r.jsonl", "standard")
    begins = [line.split(" (")[0].split(":")[0] for line in text]
    moves, stays = "changes the answers", "changes accuracy by less than the margin"
    for name, subject in (("strict", "Answering from the imagination alone"),
                          ("cut_image_after", "Hiding the image from then on")):
        assert f"{subject} {stays if follows else moves}" in begins
    assert f"A segment of markers alone {moves if follows else stays}" in begins
    for what in ("the fed vectors", "the latent positions"):
        assert (f"Editing {what} changes the answers" in begins) == follows
        assert (f"No edit of {what} changes accuracy by 20.0 points or more." in text) != follows
    assert f"Of the accuracy that the image adds, {100 * follows:.1f} %" in begins
    assert any("The score falls with the dose of mix" in line for line in text) == follows
    found = metrics["retrieval"]  # the helper is the edit's picture: never the item's own colour
    assert found["n"] == 32 and found["r1"]["k"] == 0
    assert set(metrics["closed_by"]) and "vectors" not in (tmp_path / "r.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(PRESETS))
def test_the_standard_verdict_of_every_family(items, tmp_path, family):
    """Each condition has an effect or says why not. The models answer by what they imagined, but for those of
    CoVT and Mull-Tokens, which only emit."""
    model = make_latent_checkpoint(tmp_path / "m", family=family)
    forced = ["--force_start"] if family == "covt" else []
    metrics, records = run(items, model, tmp_path / "r.jsonl", "--latent", family, "--max_new_tokens", "300",
                           "--limit", "16", "--min_emitters", "4", "--conditions", "standard", *forced)
    assert metrics["emission"]["k"] == 16 and len(metrics["summary"]) > 3
    asked = {name.partition(":")[0] for name in PRESET_CONDITIONS["standard"]}
    assert asked <= {name.partition(":")[0] for name in metrics["conditions"]}
    for name, entry in metrics["conditions"].items():
        assert entry["effect"] or entry["reason"], name
    assert write_report(tmp_path, "T", collect(tmp_path))["figures"] > 0
    assert family in ("covt", "mull") or all(by["clean"]["correct"] for by in by_condition(records).values())


def test_the_standard_verdict_on_text_is_right_too(text_model, items, tmp_path):
    model, follows = text_model
    metrics, _ = run(items, model, tmp_path / "r.jsonl", "--margin", "0.3", "--conditions", "standard")
    text = metrics["summary"]
    assert any(line.startswith("Editing the imagined words changes the answers") for line in text) == follows
    assert ("No edit of the imagined words changes accuracy by 30.0 points or more." in text) != follows
    strict = next(line for line in text if line.startswith("Answering from the imagination alone"))
    assert ("by less than the margin" in strict) == follows


NOTHING_DONE = {"fed": Intervention(feed=lambda z, *place: z), "slot": Intervention(), "edge": Intervention(),
                "none": Intervention()}


@pytest.mark.parametrize("name", ["tau", "norm_noise", "near_zero", "oracle", "markers_only", "no_segment",
                                  "slot_swap_random", "cut_latent", "strict_fed", "swap_blank", "mix:0.5"])
def test_a_control_that_does_nothing_is_noticed(imagining_model, items, tmp_path, monkeypatch, name):
    """The run ends with its name, or the sentence about the model that follows its latents turns wrong."""
    base = name.partition(":")[0]
    condition = CONDITIONS[base]
    dead = replace(condition, build=lambda case, *number: NOTHING_DONE[condition.site], prompt="own")
    asked = items, imagining_model("latent", True), tmp_path / "r.jsonl"
    monkeypatch.setitem(CONDITIONS, base, dead)
    if condition.site == "fed":
        with pytest.raises(DataError, match=f"{name} fed the clean latents"):
            judged(*asked, name)
    else:
        _, text = judged(*asked, name)
        assert not any("changes the answers" in line for line in text)


def test_a_map_of_everything_is_the_slot_condition_and_its_first_layer_the_fed_one(many):
    follows, _, metrics, records = many
    for by in by_condition(records).values():
        for place, whole in (("slot_swap_at:0-3/0-1", "slot_swap_random"),
                             ("slot_swap_at:0-3/0", "swap_random")):
            assert by[place]["text"] == by[whole]["text"]
            assert by[place]["r0"]["nll"] == pytest.approx(by[whole]["r0"]["nll"], abs=1e-4)
        look = by["clean"]["attention"]
        assert sum(layers[1] for layers in look["mass"].values()) == pytest.approx(1, abs=1e-4)
        # it may begin another segment
        assert {segment["k"] for segment in by["keep_first:2"]["segments"]} == {2}
    everywhere, one_place = (metrics["conditions"][name]["r0"]["delta_nll"]
                             for name in ("slot_swap_at:0-3/0-1", "slot_swap_at:0/1"))
    assert (everywhere > 0.5) == follows and (not follows or one_place < everywhere)
    assert metrics["attention"]["n"] == 32
    entries = metrics["conditions"]
    assert entries["slot_swap_at:0/1"]["role"] == "point" and entries["blank"]["role"] == "positive control"
    roles = [entry["role"] for entry in entries.values() if entry["effect"]]
    assert all(entry["effect"]["family"] == roles.count(entry["role"]) for entry in entries.values()
               if entry["effect"])


def test_conditions_together_equal_each_alone(many, items, tmp_path):
    """One reading of the prompt for all conditions gives the results of separate runs: the same words, scores
    to rounding."""
    _, model, _, records = many
    together = by_condition(records)
    for name in ("swap_counterfactual", "slot_swap_blank", "cut_both"):
        _, alone = run(items, model, tmp_path / f"{name}.jsonl", "--latent", "mirage", "--dtype", "float32",
                       "--conditions", name, "--rows", "5")
        for record in alone:
            same = together[record["id"]][record["condition"]]
            assert record["text"] == same["text"] and record["segments"] == same["segments"]
            assert record["r0"]["nll"] == pytest.approx(same["r0"]["nll"], abs=1e-4)


def test_image_off_and_the_worlds_of_text(text_model, items, tmp_path):
    model, follows = text_model
    metrics, records = run(items, model, tmp_path / "r.jsonl", "--conditions", "sham", "directed",
                           "swap_blank", "blank_x", "blank", "image_off", "strict", "x_counterfactual",
                           "maps")
    assert (tmp_path / "r.jsonl.attention.png").is_file()
    assert all(0 < record["attention"]["uniform"]["imagination"] < 0.5 for record in records
               if record["condition"] == "clean")
    effects = {name: entry["effect"] for name, entry in metrics["conditions"].items()}
    assert (effects["blank_x"]["acc_int"] > 0.9) == follows
    # otherwise the question's words, read before, keep some of the image
    assert not follows or effects["image_off"]["acc_int"] > 0.9
    assert (effects["strict"]["acc_int"] > 0.9) == follows and (effects["strict"]["acc_int"] > 0.6) == follows
    assert (metrics["mediation"]["text"]["r0"]["proportion_mediated"]["value"] > 0.9) == follows
    assert all(record["r0"] == record["r1"] and record["r0"]["pi"] for record in records
               if record["condition"] in ("clean", "sham", "blank_x"))  # the reply's own words are the stem


@pytest.mark.parametrize("kind, latent", [("text", []), ("latent", ["--latent", "mirage"])])
def test_a_prior_is_what_the_question_alone_says(imagining_model, items, tmp_path, kind, latent):
    """Without image and imagination the models prefer one colour: its output row reads 0.25 more of the
    opened box, whose state has length sqrt(32) in that dimension alone."""
    rows = [{**item, "question": f"<image>\n{item['question']}"} for item in read_rows(items, {})]
    write_rows(tmp_path / "items.jsonl", rows)
    asked = (tmp_path / "items.jsonl", imagining_model(kind, True), tmp_path / f"{kind}.jsonl", *latent,
             "--limit", "16", "--image_root", str(items.parent))
    metrics, records = run(*asked, "--conditions", "blank", "--prior", "question", "--min_emitters", "4")
    options = {item["id"]: dict(item["options"]) for item in rows}
    raw = []
    for record in records:
        read, words = record["r0"], options[record["id"]]
        prior = {words[letter]: value for letter, value in read["prior"].items()}
        assert [prior[NOTHING] - prior[name] for name in words.values() if name != NOTHING] == pytest.approx(
            [0.25 * 32**0.5] * 3, abs=1e-4)
        weights = {letter: math.exp(read["logp"][letter] - value) for letter, value in read["prior"].items()}
        assert read["pi"] == pytest.approx({letter: weight / sum(weights.values())
                                            for letter, weight in weights.items()}, rel=1e-6)
        gold = record["gold"]
        assert read["nll"] == pytest.approx(-math.log(read["pi"][gold])) and record["r1"] == read
        assert read["pred"] == max(read["pi"], key=read["pi"].get)
        assert math.exp(read["margin"]) == pytest.approx(
            read["pi"][gold] / max(share for letter, share in read["pi"].items() if letter != gold))
        raw.append(read["logp"])
    assert metrics["prior"] == "question"
    _, plain = run(*asked, "--conditions", "blank", "--stem", STEM, "--fresh", "--min_emitters", "4")
    for record, logp in zip(plain, raw, strict=True):  # the same words, whether read or given
        assert record["r0"]["logp"] == pytest.approx(logp, abs=1e-4) and "prior" not in record["r0"]


def test_an_llm_writes_the_directed_edit_at_its_server(imagining_model, items, tmp_path):
    with serving(tmp_path) as (_, url):
        metrics, records = run(items, imagining_model("text", True), tmp_path / "r.jsonl", "--limit", "8",
                               "--conditions", "directed_llm", "--editor_model", "m", "--editor_url", url)
    edits = [record["edit"] for record in records if record["condition"] == "directed_llm"]
    assert metrics["conditions"]["directed_llm"]["follow"]["k"] == len(edits) == 8
    assert 0 < len(calls_of(tmp_path)) <= 8  # equal calls are made once
    assert all(edit["editor"] == "llm" and edit["before"] != edit["after"] for edit in edits)


# ---- guards and errors
@pytest.mark.parametrize("condition, change, match", [
    ("identity", {"first_diff": 3}, "identity changed id 3"),
    ("tau", {"first_diff": 1}, "before the latents"),
    ("tau", {"rel_change": 0.0}, "fed the clean latents"),
    ("tau", {"reach": 0.0}, "left every layer's input")])
def test_guards_name_the_item_and_the_fault(condition, change, match):
    clean = {"segments": [{"start": 2, "k": 4, "closed_by": "limit"}]}
    valid = {"first_diff": None, "rel_change": 0.5, "n_fed": 4, "reach": 0.1}
    intervene.check_guards("item/1", condition, clean, valid, exact=True)
    with pytest.raises(DataError, match=f"item/1.*{match}"):
        intervene.check_guards("item/1", condition, clean, valid | change, exact=True)
    with pytest.raises(DataError, match="the clean run has no latents"):
        intervene.check_guards("item/1", condition, {"segments": []}, valid | {"first_diff": 4}, exact=False)


def test_noise_depends_on_seed_item_segment_and_step_alone():
    def noise(name):
        case = Case({"id": name}, Generation(), PRESETS["mirage"], torch.zeros(8), 1, seed=0)
        return CONDITIONS["norm_noise"].make(case, None).feed

    z, feed = torch.ones(8), noise("a")
    assert torch.equal(feed(z, 0, 2), noise("a")(z, 0, 2))
    for other in (feed(z, 0, 3), feed(z, 1, 2), noise("b")(z, 0, 2)):
        assert not torch.equal(feed(z, 0, 2), other)
    assert feed(z, 0, 0).norm() == pytest.approx(float(z.norm()), rel=1e-5)


def test_the_stem_is_fixed_for_latents_and_the_words_of_the_reply_for_text():
    asked = flags("i.jsonl", "m", "r.jsonl")
    assert intervene.parse_args([*asked, "--latent", "lvr"]).stem == " The answer is \\boxed{"
    assert intervene.parse_args(asked).stem is None


def test_settings_that_differ_and_wrong_conditions_are_refused(text_model, items, tmp_path):
    model, _ = text_model
    run(items, model, tmp_path / "r.jsonl", "--limit", "8", "--conditions", "sham")
    with pytest.raises(DataError, match="max_new_tokens"):
        run(items, model, tmp_path / "r.jsonl", "--limit", "8", "--max_new_tokens", "41")
    for wrong in (["--conditions", "tau"], ["--conditions", "directed_llm"], ["--margin", "1"],
                  ["--margin_nll", "0"], ["--latent", "mirage", "--conditions", "tau:1"],
                  ["--latent", "mirage", "--conditions", "nonsense"]):
        with pytest.raises(SystemExit):
            run(items, model, tmp_path / "o.jsonl", *wrong)


def test_another_model_in_the_folder_of_the_first_does_not_continue_its_run(imagining_model, items, tmp_path):
    command = items, tmp_path / "model", tmp_path / "r.jsonl", "--limit", "8", "--conditions", "sham"
    for follows in (True, False):
        (tmp_path / "model").unlink(missing_ok=True)
        (tmp_path / "model").symlink_to(imagining_model("text", follows))
        if follows:
            run(*command)
    with pytest.raises(DataError, match="(?s)other settings.*weights"):
        run(*command)


def test_processes_do_not_race_to_move_a_run_aside(items, tmp_path, monkeypatch):
    (tmp_path / "r.jsonl.run").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="--fresh with 2 processes"):
        intervene.open_journal(intervene.parse_args([*flags(items, "m", tmp_path / "r.jsonl"), "--fresh"]))
