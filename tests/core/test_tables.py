"""Numbers as text, and what a terminal shows of a run of interventions."""
from utils.tables import EFFECTS, effect_row, interval, intervene_blocks, nats, percent, plain_text, points


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
    assert "Verdicts by R2, after Holm's correction: effect: tau." in text and "Verdicts by R0" in text
    text = plain_text(intervene_blocks(metrics(False, tau=entry("effect", "readout insensitive"))))
    assert "R0 says nothing: the positive control (blank) does not make it worse" in text
    assert "Verdicts by R0" not in text
    changed = metrics(tau=entry("effect", "effect")) | {"declared_anew": {"margin": [0.05, 0.1]}}
    assert "first started: --margin. The verdicts are exploratory" in plain_text(intervene_blocks(changed))
