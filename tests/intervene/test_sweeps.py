"""Sweeps: conditions over positions, layers, ranks and doses, their measures and their figures.    pytest
tests/test_maps.py"""
import csv

import pytest
import torch
from decoding import MIRAGE, batch_of, load_with

from utils.decode import decode, prefill
from utils.intervene.effects import attention_by_layer, early_curve
from utils.intervene.latent_case import Case, Known, NotPossible
from utils.intervene.latent_conditions import CONDITIONS, PRESET_CONDITIONS, find_condition, map_conditions
from utils.intervene.sweeps import draw_maps
from utils.jsonl import DataError
from utils.report import swept

pytestmark = pytest.mark.numeric

HAND = [0.1, 0.4, 0.2, 0.3]  # attention to the four latents of a segment


@pytest.fixture(scope="module")
def runs(tiny_checkpoint):
    """(model, state of two prompts twice, their clean runs with slots)"""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    state = prefill(qwen, batch_of(qwen)).select([0, 2])
    return qwen, state, decode(qwen, state.select([0, 1]), 9, MIRAGE, capture=True, with_slots=True)[0]


def case(runs, **more):
    _, _, clean = runs
    return Case({"id": "a"}, clean[0], MIRAGE, torch.zeros(32), 1, seed=0, donors={"random": clean[1]},
                known=Known.from_runs(clean), **more)


def decoded(runs, *names):
    """Decode the first prompt under some conditions, side by side."""
    qwen, state, _ = runs
    arms = [one.make(case(runs, attention=HAND * 3), number) for one, number in map(find_condition, names)]
    return decode(qwen, state.select([0] * len(arms)), 9, MIRAGE, arms, capture=True, with_slots=True)[0]


def test_all_positions_and_layers_are_the_slot_condition_to_the_bit(runs):
    whole, everywhere = decoded(runs, "slot_swap_random", "slot_swap_at:0-3/0-1")
    assert torch.equal(everywhere.states, whole.states) and everywhere.ids == whole.ids
    assert not torch.allclose(whole.states, runs[2][0].states[:len(whole.states)], atol=1e-3)


def test_the_first_layer_alone_is_the_fed_vector(runs):
    """What the first layer reads at a latent position is what is fed there: the two sites meet."""
    fed, slot = decoded(runs, "swap_random", "slot_swap_at:0-3/0")
    assert slot.ids == fed.ids and torch.allclose(torch.stack(slot.slots), torch.stack(fed.slots), atol=1e-5)


def test_a_place_takes_effect_there_and_above_and_nowhere_before(runs):
    clean, at = decoded(runs, "identity", "slot_swap_at:2/1")
    mine, its = torch.stack(at.slots), torch.stack(clean.slots)  # [latents, layers, hidden]
    assert torch.equal(mine[:2], its[:2]) and torch.equal(mine[2, 0], its[2, 0])
    assert torch.allclose(mine[2, 1], runs[2][1].slots[2][1], atol=1e-6) and not torch.allclose(mine[2, 1],
                                                                                                its[2, 1])


@pytest.mark.parametrize("name, kept", [
    ("keep_one:2", {2}), ("drop_one:2", {0, 1, 3}), ("top_k:1", {1}), ("top_k:2", {1, 3}),
    ("top_k:3", {1, 2, 3})])
def test_kept_positions_feed_the_latent_and_others_the_mean(runs, name, kept):
    row, known = decoded(runs, name)[0], Known.from_runs(runs[2])
    for step in range(4):
        wanted = row.states[row.segments[0].start + step] if step in kept else known.mu_t[step]
        assert torch.equal(row.fed[step], wanted), step


def test_a_random_ranking_is_nested_and_its_own_for_each_item(runs):
    def kept(k, item):
        one = case(runs)
        one.item = {"id": item}
        arm = CONDITIONS["top_random"].make(one, k)
        return {step for step in range(4) if torch.equal(arm.feed(torch.zeros(32), 0, step), torch.zeros(32))}
    orders = {item: [kept(k, item) for k in (1, 2, 3)] for item in "abcdefgh"}
    assert all([len(its) for its in order] == [1, 2, 3] and order[0] < order[1] < order[2]
               for order in orders.values())
    assert len({frozenset(order[0]) for order in orders.values()}) > 1


def test_the_first_latents_alone_are_decoded(runs):
    rows = decoded(runs, "keep_first:1", "keep_first:3", "identity")
    assert [row.segments[0].size for row in rows] == [1, 3, 4]
    assert torch.equal(rows[1].fed[:3], rows[2].fed[:3])


@pytest.mark.parametrize("name, reason", [("drop_one:4", "no_such_position"),
                                          ("top_random:4", "no_such_position"),
                                          ("slot_swap_at:4/0", "no_such_position"),
                                          ("top_k:1", "no_attention")])
def test_what_would_change_nothing_is_not_possible(runs, name, reason):
    one, number = find_condition(name)
    with pytest.raises(NotPossible, match=reason):
        one.make(case(runs), number)


@pytest.mark.parametrize("name", ["slot_swap_at:1", "slot_swap_at:1/x", "slot_swap_at:1-2-3/0",
                                  "slot_swap_at:2-1/0"])
def test_places_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="expected"):
        find_condition(name)


def test_a_layer_that_the_model_lacks_is_named(runs):
    one, number = find_condition("slot_swap_at:0/1-2")
    with pytest.raises(DataError, match="layer 2 of a model with 2 layers"):
        one.make(case(runs), number)


@pytest.mark.parametrize("size, n_layers, n_cells", [(4, 2, 8), (10, 28, 70), (1, 9, 5)])
def test_a_map_covers_every_layer_once(size, n_layers, n_cells):
    names = map_conditions(size, n_layers)
    places = [find_condition(name)[1] for name in names if name.startswith("slot_swap_at")]
    assert len(names) == len(set(names)) and len(places) == n_cells
    for step in range(size):
        assert [n for steps, layers in places if steps[0] == step for n in layers] == list(range(n_layers))
    assert not set(PRESET_CONDITIONS["full"]) & {"slot_swap_at", "keep_one", "drop_one", "top_k",
                                                 "top_random", "keep_first"}


# ------------------------------------------------------------------------------------------- measures
def test_a_sweep_is_a_condition_with_several_numbers():
    assert swept(["mix", "mix:0.5", "tau", "keep_one:0", "keep_one:1"]) == {"keep_one:0", "keep_one:1"}


def said(pred):
    return {"pred": pred, "r0": {"pred": "A"}}


def test_early_answering_by_hand():
    """Three samples settle at 0, 50 and 100 %: curve 1/3, 2/3, 1; area over it 1 - (.5 * .5 + .5 * 5/6) =
    1/3."""
    records = [{"clean": said("A"), "t0": said("A" if n == 0 else "B"), "t50": said("A" if n < 2 else None)}
               for n in range(3)]
    records.append({"clean": said("A"), "t0": {"reason": "no_span"}, "t50": said("A")})  # left out
    found = early_curve(records, {"t50": 0.5, "t0": 0.0}, "abcd")
    assert found["n"] == 3 and [point["same"] for point in found["r2"]["curve"]] == pytest.approx([1 / 3,
                                                                                                   2 / 3, 1])
    assert found["r2"]["aoc"] == pytest.approx(1 / 3) and found["r0"]["aoc"] == 0
    for point in found["r2"]["curve"][:2]:
        assert 0 <= point["ci95"][0] < point["same"] < point["ci95"][1] <= 1
    assert early_curve(records, {"t50": 0.5},
                       "abcd") is None and early_curve(records[:1], {"t50": 0.5, "t0": 0}, "a") is None


def test_attention_is_a_mean_over_samples_with_its_interval():
    looks = [{"mass": {"image": [x, 0.5]}, "uniform": {"image": u}} for x, u in ((0.2, 0.1), (0.4, 0.3))]
    found = attention_by_layer(looks, "ab")
    first, second = found["mass"]["image"]
    assert first["mean"] == pytest.approx(0.3) and second == {"mean": 0.5, "ci95": [0.5, 0.5]}
    # t of one degree of freedom
    assert first["ci95"] == pytest.approx([0.3 - 12.706 * 0.1, 0.3 + 12.706 * 0.1], abs=1e-3)
    assert found["uniform"]["image"] == pytest.approx(0.2) and attention_by_layer(looks, "aa") is None


# ------------------------------------------------------------------------------------------- figures
def effect(change):
    return {"n": 30, "delta_nll": change, "ci95": [change - 0.1, change + 0.1]}


def test_figures_show_the_effects_that_they_are_given(tmp_path):
    names = map_conditions(4, 8)
    entries = {name: {"site": "fed", "effect": None, "r0": effect(0.01 * n)} for n, name in enumerate(names)}
    part = {"mean": 0.2, "ci95": [0.1, 0.3]}
    metrics = {"model": "m", "arm": "latent", "latent_size": 4, "margin_nll": 0.05, "conditions": entries,
               "emission": {"k": 30, "n": 30},
               "attention": {"n": 30, "uniform": dict.fromkeys(("first", "image", "question", "imagination",
                                                                "said"), 0.2),
                             "mass": dict.fromkeys(("first", "image", "question", "imagination", "said"),
                                                   [part, part])},
               "early_answering": {"n": 30, **{readout: {"aoc": 0.2, "ci95": [0.1, 0.3], "curve": [
                   {"kept": 0.0, "same": 0.6, "ci95": [0.4, 0.8]},
                   {"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]}]}
                   for readout in ("r2", "r0")}}}
    draw_maps(metrics, str(tmp_path / "r"))
    rows = {}
    for name in ("map", "positions", "doses", "attention", "early"):
        assert (tmp_path / f"r.{name}.png").stat().st_size > 10_000
        with open(tmp_path / f"r.{name}.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    cells = {(row["position"], row["layers"]): float(row["change"]) for row in rows["map"]}
    assert len(cells) == 32 and cells["3",
                                      "5"] == pytest.approx(entries["slot_swap_at:2/4-4"]["r0"]["delta_nll"])
    ranked = [(float(row["x"]), float(row["change"])) for row in rows["positions"] if row["curve"] == "top_k"]
    assert [x for x, _ in ranked] == [0, 1, 2, 3, 4]  # from all replaced to all kept
    assert ranked[0][1] == entries["mean_t"]["r0"]["delta_nll"] and ranked[-1][1] == entries["identity"][
        "r0"]["delta_nll"]
    assert [float(row["x"]) for row in rows["doses"]] == [0, 0.25, 0.5, 0.75, 1, 0.1, 0.3, 1, 3]
    draw_maps({**metrics, "conditions": {}, "attention": None, "early_answering": None},
              str(tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))
