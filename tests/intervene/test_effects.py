"""Effects from records made by hand, and their figures.    pytest tests/test_effects.py"""
import csv

import pytest
from PIL import Image

from utils.intervene.effects import change_of_accuracy, change_of_score, lifts, summarize
from utils.intervene.figures import draw_all
from utils.intervene.prompts import first_difference, is_degenerate, stem_of
from utils.plots import legend, new_figure, write_figure
from utils.stats import tango_ci


def record(right, pred="A", nll=0.5, emitted=True, **more):
    pi = {"A": 0.7, "B": 0.3}
    return {"emitted": emitted, "segments": [{"start": 1, "k": 4, "closed_by": "limit"}] if emitted else [],
            "correct": right,
            "pred": pred, "degenerate": False, "changed": False, "r0": {"nll": nll, "pi": pi, "pred": pred},
            "r1": None, **more}


def item(n, group=None):
    return {"id": f"i{n}", "group_id": group or f"g{n}", "answer": {"type": "letter", "value": "A"}}


def test_accuracy_counts_and_interval_are_tangos():
    """Of 40 items 6 go right -> wrong and 2 wrong -> right; all single, so the interval is Tango's."""
    pairs = [(item(n), record(n < 30), record(n < 24 or n in (38, 39))) for n in range(40)]
    found = change_of_accuracy(pairs, 80, 0.05)
    assert (found["b"], found["c"], found["delta"], found["delta_all"]) == (6, 2, -0.1, -0.05)
    assert found["ci90"] == pytest.approx(list(tango_ci(6, 2, 40, 0.90))) and found[
        "test"] == "McNemar, exact"
    assert found["verdict"] == "inconclusive" and found["psi"] == 0.2
    grouped = [(item(n, f"g{n // 4}"), before, after) for n, (_, before, after) in enumerate(pairs)]
    wider = change_of_accuracy(grouped, 80, 0.05)
    assert wider["test"] == "sign flips of groups" and wider["ci90"][0] <= found["ci90"][0]


def test_scores_are_paired_and_unscored_items_left_out():
    pairs = [(item(n), record(True, nll=0.1 * n), record(True, nll=0.1 * n + 0.2, pred="B" if n < 3 else "A"))
             for n in range(10)]
    found = change_of_score([*pairs, (item(99), record(True), record(True) | {"r0": None})], "r0", 0.05)
    assert found["n"] == 10 and found["delta_nll"] == pytest.approx(0.2) and found["verdict"] == "effect"
    assert found["flips"] == pytest.approx(0.3) and found["acc_clean"] == 1 and found[
        "acc_int"] == pytest.approx(0.7)
    assert found["kl"] == 0 and change_of_score(pairs[:1], "r0", 0.05) is None


def run(names=("tau", "swap_blank", "blank_x", "blank"), n=60):
    items = [item(k) for k in range(n)]
    records = {one["id"]: {"clean": record(True, emitted=k < 50),
                           **{name: record(k % 2 == 0, nll=0.5 + 0.1 * j + 0.01 * (k % 3)) for j,
                              name in enumerate(names)}}
               for k, one in enumerate(items)}
    sites = {"tau": "fed", "swap_blank": "fed", "blank_x": "fed", "blank": "none"}
    return items, records, summarize(items, records, list(names), sites, set(), 0.05, 0.05, min_emitters=20)


def test_only_emitters_of_the_clean_run_count_and_worlds_add_up():
    items, records, found = run()
    assert found["emission"]["k"] == 50 and found["conditions"]["tau"]["effect"]["n"] == 50
    assert found["conditions"]["tau"]["effect"]["delta_all"] == pytest.approx(-25 / 60)
    parts = found["mediation"]["fed"]["r0"]
    assert parts["TE"]["mean"] == pytest.approx(parts["NIE"]["mean"] + parts["NDE"]["mean"])
    assert parts["TE"]["mean"] == pytest.approx(0.3 + 0.01 * sum(k % 3 for k in range(50)) / 50)
    for k in range(50):  # an item that cannot be intervened on has a reason, and is no drop
        if k < 40:
            records[f"i{k}"]["tau"] = {"emitted": True, "pred": None, "correct": False, "reason": "no_donor"}
    few = summarize(items, records, ["tau"], {"tau": "fed"}, set(), 0.05, 0.05,
                    min_emitters=20)["conditions"]["tau"]
    assert few["effect"] is None and few["reasons"] == {"no_donor": 40} and few["coverage"]["k"] == 10
    assert "fewer than --min_emitters 20" in few["reason"]


def test_a_donors_lift_is_told_apart_from_any_donors():
    """The counterfactual donor's answer B is given under its latents; an unrelated donor's changes nothing.
    """
    items, donor = [item(n) for n in range(30)], {"donor": {"item": "d", "gold": "B"}}
    records = {one["id"]: {"clean": record(True), "swap_counterfactual": record(False, pred="B", **donor),
                           "swap_random": record(True, **donor)} for one in items}
    found = lifts(items, records, "r2")["fed"]
    assert found["lift"]["mean"] == 1 and found["unrelated"]["mean"] == 0 and found["difference"]["mean"] == 1
    assert found["difference"]["p"] < 0.01


def test_figures_come_with_the_numbers_behind_them(tmp_path):
    _, _, found = run()
    draw_all({**found, "model": "m/checkpoint", "arm": "latent", "margin": 0.05, "margin_nll": 0.05},
             str(tmp_path / "r"))
    for name in ("accuracy", "effects", "mediation"):
        assert (tmp_path / f"r.{name}.png").stat().st_size > 10_000
        with open(tmp_path / f"r.{name}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) >= 5


def test_a_figure_is_drawn_without_a_display_and_its_numbers_lie_beside_it(tmp_path):
    figure, [[axes, other]] = new_figure(4, 2, 1, 2)
    axes.plot([1, 2], [3, 4], label="a")
    other.plot([1, 2], [4, 3], label="a")
    legend(figure, (axes, other))
    write_figure(figure, [{"x": 1, "y": 3}, {"x": 2, "y": 4, "more": 5}], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (600, 300) and len(figure.legends[0].get_texts()) == 1
    assert (tmp_path / "a.csv").read_bytes() == b"x,y\n1,3\n2,4\n" and len(list(tmp_path.iterdir())) == 2
    write_figure(figure, [], tmp_path / "b.png")
    assert (tmp_path / "b.csv").read_text() == "empty\n"


def test_bars_of_many_conditions_are_drawn_as_large_as_those_of_few(tmp_path):
    """A page shows a figure at the page's width: only its height may grow with the conditions."""
    _, _, found = run()
    sizes = []
    for n in (4, 36):
        conditions = {f"tau_{k}": found["conditions"]["tau"] for k in range(n)}
        draw_all({**found, "conditions": conditions, "model": "m", "arm": "latent", "margin": 0.05,
                  "margin_nll": 0.05},
                 str(tmp_path / f"{n}"))
        sizes.append(Image.open(tmp_path / f"{n}.accuracy.png").size)
    assert sizes[0][0] == sizes[1][0] <= 1300 and sizes[1][1] > 3 * sizes[0][1]


def test_fields_of_a_reply():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None and first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert is_degenerate([7, 8] * 40, "stop") and not is_degenerate(list(range(80)), "length")
    assert is_degenerate(list(range(10)) + [1, 2, 3, 4, 9] * 12 + [5], "length")
    assert stem_of(" So it is \\boxed{B}.") == " So it is \\boxed{" and stem_of("no box") is None
