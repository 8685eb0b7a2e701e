"""Effects from records made by hand, and their figures."""
import csv

import pytest
from PIL import Image

from utils.intervene.effects import (Limits, Pair, attention_by_layer, change_of_accuracy, change_of_score,
                                     early_answering, early_curve, summarize)
from utils.intervene.figures import draw_effects
from utils.intervene.prompts import first_difference, is_degenerate, stem_of
from utils.stats import tango_ci

LIMITS = Limits(0.05, 0.05, min_emitters=20)


def record(right, pred="A", nll=0.5, emitted=True, **more):
    pi = {"A": 0.7, "B": 0.3}
    return {"emitted": emitted, "segments": [{"start": 1, "k": 4, "closed_by": "limit"}] if emitted else [],
            "correct": right, "pred": pred, "degenerate": False, "changed": False,
            "r0": {"nll": nll, "pi": pi, "pred": pred}, "r1": None, **more}


def item(n, group=None):
    return {"id": f"i{n}", "group_id": group or f"g{n}", "answer": {"type": "letter", "value": "A"}}


def test_accuracy_counts_and_interval_are_tangos():
    """Of 40 items 6 go right -> wrong and 2 wrong -> right; all single, so the interval is Tango's."""
    pairs = [Pair(item(n), record(n < 30), record(n < 24 or n in (38, 39))) for n in range(40)]
    effect = change_of_accuracy(pairs, 80, 0.05)
    assert (effect["b"], effect["c"], effect["delta"], effect["delta_all"]) == (6, 2, -0.1, -0.05)
    assert effect["ci90"] == pytest.approx(list(tango_ci(6, 2, 40, 0.90)))
    assert (effect["test"], effect["verdict"], effect["psi"]) == ("McNemar, exact", "inconclusive", 0.2)
    grouped = [pair._replace(item=item(n, f"g{n // 4}")) for n, pair in enumerate(pairs)]
    wider = change_of_accuracy(grouped, 80, 0.05)
    assert wider["test"] == "sign flips of groups" and wider["ci90"][0] <= effect["ci90"][0]


def test_scores_are_paired_and_unscored_items_left_out():
    pairs = [Pair(item(n), record(True, nll=0.1 * n),
                  record(True, nll=0.1 * n + 0.2, pred="B" if n < 3 else "A")) for n in range(10)]
    unscored = Pair(item(99), record(True), record(True) | {"r0": None})
    effect = change_of_score([*pairs, unscored], "r0", 0.05)
    assert (effect["n"], effect["verdict"], effect["acc_clean"], effect["kl"]) == (10, "effect", 1, 0)
    assert [effect["delta_nll"], effect["flips"], effect["acc_int"]] == pytest.approx([0.2, 0.3, 0.7])
    assert change_of_score(pairs[:1], "r0", 0.05) is None


@pytest.fixture
def run():
    """(records, metrics) of 60 items, 50 of which imagined something, with the four worlds of site fed."""
    sites = {"tau": "fed", "swap_blank": "fed", "blank_x": "fed", "blank": "none"}
    items, records = [item(k) for k in range(60)], {}
    for k in range(60):
        records[f"i{k}"] = {"clean": record(True, emitted=k < 50)}
        for j, name in enumerate(sites):
            records[f"i{k}"][name] = record(k % 2 == 0, nll=0.5 + 0.1 * j + 0.01 * (k % 3))
    return records, {**summarize(items, records, sites, LIMITS), "model": "m/checkpoint", "arm": "latent",
                     "margin": 0.05, "margin_nll": 0.05}


def test_only_emitters_of_the_clean_run_count_and_worlds_add_up(run):
    records, metrics = run
    assert metrics["emission"]["k"] == 50 and metrics["conditions"]["tau"]["effect"]["n"] == 50
    assert metrics["conditions"]["tau"]["effect"]["delta_all"] == pytest.approx(-25 / 60)
    parts = metrics["mediation"]["fed"]["r0"]
    assert parts["TE"]["mean"] == pytest.approx(parts["NIE"]["mean"] + parts["NDE"]["mean"])
    assert parts["TE"]["mean"] == pytest.approx(0.3 + 0.01 * sum(k % 3 for k in range(50)) / 50)
    for k in range(40):  # an item that cannot be intervened on has a reason and does not count as a drop
        records[f"i{k}"]["tau"] = {"emitted": True, "pred": None, "correct": False, "reason": "no_donor"}
    few = summarize([item(k) for k in range(60)], records, {"tau": "fed"}, LIMITS)["conditions"]["tau"]
    assert few["effect"] is None and few["reasons"] == {"no_donor": 40} and few["coverage"]["k"] == 10
    assert "fewer than --min_emitters 20" in few["reason"]


def test_the_area_over_the_curve():
    """Triangles and rectangles counted by hand: the last is .75 * .5 + .25 * .2."""
    for curve, area in (([(0, 1), (1, 1)], 0.0), ([(0, 0), (0.5, 0), (1, 1)], 0.75),
                        ([(0, 0.4), (0.75, 0.6), (1, 1)], 0.425)):
        assert early_answering(curve) == pytest.approx(area, abs=1e-12)
    for wrong in ([], [(0, 1)], [(0, 1), (0.5, 1)], [(0.1, 1), (1, 1)], [(0, 1), (0, 0), (1, 1)],
                  [(0, 1), (1, 1.1)], [(0, -0.1), (1, 1)]):
        with pytest.raises(ValueError, match="expected"):
            early_answering(wrong)


def test_early_answering_by_hand():
    """Three items settle at 0, 50 and 100 %: the curve is 1/3, 2/3, 1 and the area over it 1/3."""
    def reply(pred):
        return {"pred": pred, "r0": {"pred": "A"}}

    records = [{"clean": reply("A"), "t0": reply("A" if n == 0 else "B"),
                "t50": reply("A" if n < 2 else None)} for n in range(3)]
    records.append({"clean": reply("A"), "t0": {"reason": "no_span"}, "t50": reply("A")})  # left out
    early = early_curve(records, {"t50": 0.5, "t0": 0.0}, "abcd")
    points = early["r2"]["curve"]
    assert early["n"] == 3 and [point["same"] for point in points] == pytest.approx([1 / 3, 2 / 3, 1])
    assert early["r2"]["aoc"] == pytest.approx(1 / 3) and early["r0"]["aoc"] == 0
    for point in points[:2]:
        assert 0 <= point["ci95"][0] < point["same"] < point["ci95"][1] <= 1
    assert early_curve(records, {"t50": 0.5}, "abcd") is None
    assert early_curve(records[:1], {"t50": 0.5, "t0": 0}, "a") is None


def test_attention_is_a_mean_over_items_with_its_interval():
    looks = [{"mass": {"image": [x, 0.5]}, "uniform": {"image": u}} for x, u in ((0.2, 0.1), (0.4, 0.3))]
    attention = attention_by_layer(looks, "ab")
    first, second = attention["mass"]["image"]
    assert first["mean"] == pytest.approx(0.3) and second == {"mean": 0.5, "ci95": [0.5, 0.5]}
    # t of one degree of freedom
    assert first["ci95"] == pytest.approx([0.3 - 12.706 * 0.1, 0.3 + 12.706 * 0.1], abs=1e-3)
    assert attention["uniform"]["image"] == pytest.approx(0.2) and attention_by_layer(looks, "aa") is None


def rows_of(folder, name):
    """The rows behind the figure r.<name>.png, which is not empty."""
    assert (folder / f"r.{name}.png").stat().st_size > 10_000
    return list(csv.DictReader(open(folder / f"r.{name}.csv", newline="")))


def test_figures_come_with_the_numbers_behind_them(run, tmp_path):
    draw_effects(run[1], str(tmp_path / "r"))
    assert all(len(rows_of(tmp_path, name)) >= 5 for name in ("accuracy", "effects", "mediation"))


def test_curves_are_drawn_as_they_are_given(tmp_path):
    part = {"mean": 0.2, "ci95": [0.1, 0.3]}
    groups = ("first", "image", "question", "imagination", "said")
    points = [{"kept": 0.0, "same": 0.6, "ci95": [0.4, 0.8]}, {"kept": 1.0, "same": 1.0, "ci95": [1.0, 1.0]}]
    early = {readout: {"aoc": 0.2, "ci95": [0.1, 0.3], "curve": points} for readout in ("r2", "r0")}
    metrics = {"model": "m", "arm": "latent", "conditions": {}, "emission": {"k": 30, "n": 30},
               "attention": {"n": 30, "uniform": dict.fromkeys(groups, 0.2),
                             "mass": dict.fromkeys(groups, [part, part])},
               "early_answering": {"n": 30, **early}}
    draw_effects(metrics, str(tmp_path / "r"))
    assert (len(rows_of(tmp_path, "attention")), len(rows_of(tmp_path, "early"))) == (10, 4)
    draw_effects({**metrics, "attention": None, "early_answering": None}, str(tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


def test_bars_of_many_conditions_are_drawn_as_large_as_those_of_few(run, tmp_path):
    """A page shows a figure at the page's width: only its height may grow with the conditions."""
    sizes = []
    for n in (4, 36):
        conditions = {f"tau_{k}": run[1]["conditions"]["tau"] for k in range(n)}
        draw_effects({**run[1], "conditions": conditions}, str(tmp_path / f"{n}"))
        sizes.append(Image.open(tmp_path / f"{n}.accuracy.png").size)
    assert sizes[0][0] == sizes[1][0] <= 1300 and sizes[1][1] > 3 * sizes[0][1]


def test_fields_of_a_reply():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None and first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert is_degenerate([7, 8] * 40, "stop") and not is_degenerate(list(range(80)), "length")
    assert is_degenerate(list(range(10)) + [1, 2, 3, 4, 9] * 12 + [5], "length")
    assert stem_of(" So it is \\boxed{B}.") == " So it is \\boxed{" and stem_of("no box") is None
