"""Sweeps: conditions over positions, layers, ranks and doses, and their figures."""
import csv

import numpy as np
import pytest
import torch
from decoding import MIRAGE, batch_of, load_with
from scipy import stats

from utils.decode import decode, prefill
from utils.display import swept
from utils.intervene.latent_case import Calibration, Case, NotPossible
from utils.intervene.latent_conditions import CONDITIONS, PRESET_CONDITIONS, find_condition
from utils.intervene.sweeps import SWEEPS, dose_trend, dose_trends, draw_sweeps, sweep_conditions
from utils.jsonl import DataError
from utils.means import robust_mean

pytestmark = pytest.mark.numeric



@pytest.fixture(scope="module")
def runs(tiny_checkpoint):
    """(model, state of two prompts, their clean runs with slots)"""
    qwen = load_with(tiny_checkpoint, MIRAGE)
    state = prefill(qwen, batch_of(qwen)).select([0, 2])
    return qwen, state, decode(qwen, state.select([0, 1]), 9, MIRAGE, capture=True, with_slots=True)[0]


def case(runs, name="a", **more):
    clean = runs[2]
    return Case({"id": name}, clean[0], MIRAGE, torch.zeros(32), 1, seed=0, donors={"random": clean[1]},
                calibration=Calibration.from_runs(clean), **more)


def decoded(runs, *names):
    """Decode the first prompt under some conditions, side by side."""
    qwen, state, _ = runs
    interventions = [condition.make(case(runs), number)
                     for condition, number in map(find_condition, names)]
    return decode(qwen, state.select([0] * len(names)), 9, MIRAGE, interventions, capture=True,
                  with_slots=True)[0]


def near(a, b):
    """Rows of one batch may differ in last bits, as threads split it unevenly. 1e-5 is some 40 roundings of
    float32 at the size of these states (2 to 4); an intervention changes them by more than 1e-3."""
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def test_all_layers_are_the_slot_condition_and_the_first_one_alone_the_fed_vector(runs):
    whole, everywhere = decoded(runs, "slot_swap_random", "slot_swap_at:0-3/0-1")
    assert near(everywhere.states, whole.states) and everywhere.ids == whole.ids
    assert not torch.allclose(whole.states, runs[2][0].states[:len(whole.states)], atol=1e-3)
    fed, slot = decoded(runs, "swap_random", "slot_swap_at:0-3/0")
    assert slot.ids == fed.ids and torch.allclose(torch.stack(slot.slots), torch.stack(fed.slots), atol=1e-5)


def test_a_place_takes_effect_there_and_above_and_nowhere_before(runs):
    clean, swapped = (torch.stack(row.slots) for row in decoded(runs, "identity", "slot_swap_at:2/1"))
    assert near(swapped[:2], clean[:2]) and near(swapped[2, 0], clean[2, 0])
    assert near(swapped[2, 1], runs[2][1].slots[2][1])
    assert not torch.allclose(swapped[2, 1], clean[2, 1], atol=1e-3)


@pytest.mark.parametrize("name, kept", [("keep_one:2", {2}), ("drop_one:2", {0, 1, 3})])
def test_kept_positions_feed_the_latent_and_others_the_mean(runs, name, kept):
    row, calibration = decoded(runs, name)[0], Calibration.from_runs(runs[2])
    for step in range(4):
        wanted = row.states[row.segments[0].start + step] if step in kept else calibration.mu_t[step]
        assert torch.equal(row.fed[step], wanted), step


def test_the_first_latents_alone_are_decoded(runs):
    rows = decoded(runs, "keep_first:1", "keep_first:3", "identity")
    assert [row.segments[0].size for row in rows] == [1, 3, 4]
    assert near(rows[1].fed[:3], rows[2].fed[:3])


@pytest.mark.parametrize("name, error, match", [
    ("drop_one:4", NotPossible, "no_such_position"), ("slot_swap_at:4/0", NotPossible, "no_such_position"),
    ("slot_swap_at:0/1-2", DataError, "layer 2, expected one of the model's 2 layers"),
    ("slot_swap_at:1", ValueError, "expected"), ("slot_swap_at:1/x", ValueError, "expected"),
    ("slot_swap_at:1-2-3/0", ValueError, "expected"), ("slot_swap_at:2-1/0", ValueError, "expected")])
def test_points_that_are_malformed_or_change_nothing_are_refused(runs, name, error, match):
    with pytest.raises(error, match=match):
        condition, number = find_condition(name)
        condition.make(case(runs), number)


@pytest.mark.parametrize("size, n_layers, n_cells", [(4, 2, 8), (10, 28, 70), (1, 9, 5)])
def test_a_map_covers_every_layer_once(size, n_layers, n_cells):
    names = sweep_conditions(size, n_layers)
    places = [find_condition(name)[1] for name in names if name.startswith("slot_swap_at")]
    assert len(names) == len(set(names)) and len(places) == n_cells
    for step in range(size):
        assert [n for steps, layers in places if steps[0] == step for n in layers] == list(range(n_layers))
    assert not set(PRESET_CONDITIONS["full"]) & set(SWEEPS) and set(SWEEPS) < set(CONDITIONS)
    # a sweep is a condition with several numbers
    assert swept(["mix", "mix:0.5", "tau", "keep_one:0", "keep_one:1"]) == {"keep_one:0", "keep_one:1"}


def test_figures_show_the_effects_that_they_are_given(tmp_path):
    entries = {name: {"site": "fed", "effect": None,
                      "r0": {"n": 30, "delta_nll": 0.01 * n, "ci95": [0.01 * n - 0.1, 0.01 * n + 0.1],
                             "holm_p": 1.0, "verdict": "inconclusive"}}
               for n, name in enumerate(sweep_conditions(4, 8))}
    metrics = {"model": "m", "arm": "latent", "latent_size": 4, "margin_nll": 0.05, "conditions": entries,
               "emission": {"k": 30, "n": 30}}
    draw_sweeps(metrics, str(tmp_path / "r"))
    rows = {}
    for name in ("map", "positions", "doses"):
        assert (tmp_path / f"r.{name}.png").stat().st_size > 10_000
        rows[name] = list(csv.DictReader(open(tmp_path / f"r.{name}.csv", newline="")))
    cells = {(row["position"], row["layers"]): float(row["change"]) for row in rows["map"]}
    changes = {name: entry["r0"]["delta_nll"] for name, entry in entries.items()}
    assert len(cells) == 32 and cells["3", "5"] == pytest.approx(changes["slot_swap_at:2/4-4"])
    assert [(row["curve"], float(row["x"])) for row in rows["positions"]] == [
        (name, place) for name in ("keep_one", "drop_one") for place in (1, 2, 3, 4)]
    assert [float(row["x"]) for row in rows["doses"]] == [0, 0.25, 0.5, 0.75, 1, 0.1, 0.3, 1, 3]
    draw_sweeps({**metrics, "conditions": {}}, str(tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


# ---- trends
def test_a_trend_is_kendall_s_tau_of_each_item_and_their_mean():
    rng = np.random.default_rng(0)
    doses, outcomes = [1, 0.1, 3, 0.3], rng.normal(size=(6, 4))
    found = dose_trend(doses, outcomes, range(6))
    taus = [stats.kendalltau(doses, row).statistic for row in outcomes]  # no ties: tau-a is tau-b
    assert found["trend"] == pytest.approx(np.mean(taus)) and found["n"] == 6
    assert found["ci95"] == pytest.approx(robust_mean(taus, range(6), 0.95)[1:])
    # by hand: three rises, none, two rises and a fall, and a change too small to count
    rows = [[0, 1, 2], [5, 5, 5], [0, 2, 1], [0, 5e-4, 1]]
    found = dose_trend([0, 1, 2], rows, "abcd")
    assert found["trend"] == pytest.approx((1 + 0 + 1 / 3 + 2 / 3) / 4) and found["p"] == 2 / 8
    falling = dose_trend([0, 1, 2], [[2, 1, 0]] * 6, "abcdef")
    assert (falling["trend"], falling["p"]) == (-1, 2 / 64)
    # six items of three groups are three: all alike, p is 2 of 8 flips
    assert dose_trend([0, 1, 2], [[0, 1, 2]] * 6, "aabbcc")["p"] == 0.25
    for wrong in (([1], [[1], [2]], "ab"), ([1, 1], [[1, 2]] * 2, "ab"), ([0, 1], [[0, 1, 2]] * 2, "ab"),
                  ([0, 1], [[0, 1]] * 2, "aa")):
        with pytest.raises(ValueError, match="expected"):
            dose_trend(*wrong)


@pytest.mark.parametrize("spread", [(1, 1, 1, 1), (0, 1, 2, 5)], ids=["even", "growing"])
@pytest.mark.parametrize("size", [1, 4])
def test_no_trend_is_found_in_at_most_one_of_twenty(spread, size):
    """24 items, alone or in groups of 4 with the same outcomes; 400 data sets, of which 5 % +- 3 standard
    errors are 8.3 %. Dose 0 has no spread: a clean run changes nothing."""
    rng, found = np.random.default_rng(1), []
    for _ in range(400):
        outcomes = rng.normal(size=(24 // size, 4)).repeat(size, axis=0) * spread
        found.append(dose_trend([0, 1, 2, 3], outcomes, np.arange(24) // size))
    assert np.mean([trend["p"] <= 0.05 for trend in found]) < 0.083
    assert np.mean([not low <= 0 <= high for low, high in (trend["ci95"] for trend in found)]) < 0.083
    steady = rng.normal(size=(24 // size, 4)).repeat(size, axis=0) + np.arange(4)
    trend = dose_trend([0, 1, 2, 3], steady, np.arange(24) // size)
    assert trend["trend"] > 0.3 and trend["p"] < 0.05


def test_trends_of_a_run_take_the_items_with_all_doses():
    def by(clean, *nats):
        names = ("clean", "mix:0.5", "mix:1", "add_noise:3")
        return {name: {"r0": None if nll is None else {"nll": nll}}
                for name, nll in zip(names, (clean, *nats))}

    records = {"a": by(0, 1, 2, 9), "b": by(0, 3, 2, 9), "c": by(0, None, 2, 9),
               "d": {"clean": {"error": "x"}}}
    found = dose_trends([{"id": name} for name in records], records, 2)
    assert set(found) == {"mix"}  # one dose of noise is no sweep
    assert found["mix"]["n"] == 2 and found["mix"]["trend"] == pytest.approx((1 + 1 / 3) / 2)
