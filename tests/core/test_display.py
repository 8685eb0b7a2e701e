"""Numbers as text, what a terminal shows of a run of interventions, and figures with their files."""
import csv
import random

import pytest

from utils.display import (EDITED, EFFECTS, SAID, SUBJECTS, LineStyle, draw_bars, draw_grid, draw_line,
                           effect_row, interval, intervene_blocks, legend, nats, new_figure, percent,
                           plain_text, points, summary, write_figure)
from utils.intervene.figures import draw_estimate


def test_numbers_are_written_in_one_form():
    assert (percent(0.1234), percent(None)) == ("12.3", "-")
    assert (interval([0.1, 0.25]), interval(None)) == ("10.0 to 25.0", "-")
    assert points(-0.05, [-0.1, 0.25]) == "-5.0 (-10.0 to 25.0)"
    assert nats(0.5, [-0.25, 1]) == "+0.500 (-0.250 to +1.000)"


def entry(verdict, r0_verdict, **more):
    effect = {"n": 60, "n_effective": 20.0, "acc_clean": 0.8, "acc_int": 0.7, "delta": -0.1, "psi": 0.2,
              "ci90": [-0.2, 0.0], "holm_p": 0.042, "verdict": verdict, "items_needed": 699,
              "margin_shown": 0.3}
    r0 = {"n": 58, "acc_clean": 0.55, "delta_nll": 0.2, "ci90": [0.1, 0.3], "holm_p": 0.003,
          "verdict": r0_verdict}
    return {"site": "fed", "role": "do(Z)", "reason": None, "effect": effect, "r0": r0, "asked": None,
            "again": {"k": 0, "n": 60}, "coverage": {"k": 60, "n": 75}} | more


def metrics(r0_moves=True, **conditions):
    speaks = {"moves": True, "reason": None}
    silent = {"moves": False, "reason": "the positive control (blank) does not make it worse (+0.1 nats)"}
    return {"model": "m", "arm": "latent", "margin": 0.05, "margin_nll": 0.05, "specific": None,
            "declared_anew": {},
            "markers_share": None, "emission": {"k": 60, "n": 80, "ci95": [0.6, 0.9]}, "mediation": {},
            "conditions": conditions,
            "sensitivity": {"r2": speaks, "r0": speaks if r0_moves else silent, "r1": silent}}


def test_the_corrected_p_and_the_accuracy_of_r0_stand_in_the_row():
    row = dict(zip(EFFECTS[:10], effect_row("tau", entry("effect", "effect"))))
    assert (row["items"], row["Holm p"], row["verdict"]) == ("60 of 75", "0.042", "effect")
    assert (row["R0 items"], row["R0 clean, %"]) == ("58", "55.0")
    assert effect_row("tau", entry("effect", "effect"))[11:13] == ["0.003", "effect"]
    undone = effect_row("no_span", entry("undone", "undone", again={"k": 7, "n": 60}))
    assert undone[7] == undone[12] == "undone" and "7 of 60" in undone
    for row in (undone, effect_row("tau", entry("effect", "effect", r0=None))):
        assert len(row) == len(EFFECTS)


def test_a_readout_without_sensitivity_makes_no_sentence():
    text = plain_text(intervene_blocks(metrics(tau=entry("effect", "effect"))))
    assert "Editing the fed vectors changes the answers (tau)." in text and "says nothing" not in text
    text = plain_text(intervene_blocks(metrics(False, tau=entry("effect", "readout insensitive"))))
    assert "R0 says nothing: the positive control (blank) does not make it worse" in text
    changed = metrics(tau=entry("effect", "effect")) | {"declared_anew": {"margin": [0.05, 0.1]}}
    assert "first started: --margin. The verdicts are exploratory" in plain_text(intervene_blocks(changed))


@pytest.mark.parametrize("seed", range(40))
def test_a_summary_says_no_more_than_its_verdicts(seed):
    """Verdicts drawn at random: a change is said only of an effect after Holm, none only of equivalence."""
    rng, verdicts, inside = random.Random(seed), list(SAID), {"equivalent", "small effect inside the margin"}
    pool = rng.choice((verdicts, sorted(inside), ["inconclusive", *inside], ["effect", *inside]))
    drawn = {name: rng.choice(pool) for names in (*EDITED.values(), SUBJECTS) for name in names
             if rng.random() < 0.9}
    shown = {name: entry(verdict, "effect") for name, verdict in drawn.items()}
    text = summary(metrics(**shown))
    for what, names in EDITED.items():
        found = [drawn[name] for name in names if name in drawn]
        said = [line for line in text if line.startswith((f"Editing {what}", f"No edit of {what}",
                                                          f"Whether an edit of {what}"))]
        if "effect" in found:
            assert len(said) == 1 and "changes the answers (" in said[0]
            moved = [name for name in names if drawn.get(name) == "effect"]
            assert said[0].split("(")[1].rstrip(").").split(", ") == moved
        elif len(found) < len(names):
            assert not said
        else:
            assert said[0].startswith("No edit" if set(found) <= inside else "Whether")
    for name, subject in SUBJECTS.items():
        lines = [line for line in text if line.startswith(subject)]
        assert name not in drawn or any(f"{subject} {SAID[drawn[name]]}: " in line for line in lines)


def test_retrieval_and_doses_are_said_with_their_proof():
    def share(low):
        return {"k": 6, "n": 60, "share": 0.1, "ci95": [low, 0.3]}
    for low, said in ((0.05, "above chance (2.0)"), (0.01, "not shown to be above chance (2.0)")):
        found = {"retrieval": {"r1": share(low), "r5": share(low), "mrr": 0.25, "chance": 0.02}}
        line, = summary(metrics() | found)
        assert said in line and "MRR 0.25" in line
    for trend, p, n in ((0.5, 0.02, 2), (0.5, 0.03, 1), (0.5, 0.03, 2), (-0.5, 0.001, 1)):
        trends = {name: {"trend": trend, "p": p} for name in ("mix", "add_noise")[:n]}
        assert len(summary(metrics() | {"dose_trends": trends})) == n * (trend > 0 and p * n <= 0.05)


# ---- figures
STYLE = LineStyle("a curve", "#0072B2", "s", 4)


@pytest.fixture
def axes():
    figure, [[axes]] = new_figure(3, 2)
    return axes


def test_bars_have_their_length_and_whiskers_to_both_ends(axes):
    draw_bars(axes, [0, 1], [0.5, 2], [(0.2, 0.9), (2.5, 3)], 0.8, color="#0072B2", label="bars")
    assert [bar.get_height() for bar in axes.patches] == [0.5, 2]
    segments = axes.collections[0].get_segments()
    ends = [[point[1] for point in segment] for segment in segments]
    assert ends == [[pytest.approx(0.2), pytest.approx(0.9)], [2, pytest.approx(3)]]  # never inside out


def test_a_line_has_a_band_or_whiskers_or_neither(axes):
    values, ends = [1, 2], [(0, 2), (1, 4)]
    draw_line(axes, [0, 1], values, None, STYLE)
    assert not axes.collections
    draw_line(axes, [0, 1], values, ends, STYLE)
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0, 0), (0, 2), (1, 1), (1, 4)}
    draw_line(axes, [0, 1], values, ends, STYLE, whiskers=True)
    whiskers = [segment.tolist() for segment in axes.collections[1].get_segments()]
    assert whiskers == [[[0, 0], [0, 2]], [[1, 1], [1, 4]]]


def test_a_forest_line_has_two_intervals_a_point_and_a_note(axes):
    draw_estimate(axes, 3, 0.5, (0.2, 0.8), (0.1, 0.9), STYLE, "effect")
    assert [(line.get_xdata()[0], line.get_linewidth()) for line in axes.lines[:2]] == [(0.1, 1), (0.2, 3)]
    assert list(axes.lines[2].get_ydata()) == [3] and axes.texts[0].get_text() == "effect"


def test_a_grid_is_coloured_symmetrically(axes):
    assert draw_grid(axes, [[0.1, -2]], 2).get_clim() == (-2, 2)


def test_a_figure_is_a_png_and_a_csv(tmp_path):
    figure, [both] = new_figure(3, 2, 1, 2)
    draw_line(both[0], [0, 1], [1, 2], None, STYLE)
    legend(figure, both)
    write_figure(figure, [{"x": 0, "y": 1}, {"x": 1, "y": 2, "z": 3}], tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert list(csv.reader(open(tmp_path / "f.csv"))) == [["x", "y"], ["0", "1"], ["1", "2"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a curve"]
