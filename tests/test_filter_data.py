"""Rules and decisions one by one, planted faults, whole runs with a scripted judge."""
import itertools
import json
import random
from pathlib import Path

import pytest
from fault_server import calls_of, raw, serving
from samples import StandIn, flags, row, table

from filter_data import (JUDGE_REASONS, PROMPTS, RULE_REASONS, Verdict, calibrate, chain_fault, compare,
                         correct, decide, judge_call, main, share_of)
from utils.jsonl import DataError, read_rows, write_rows

JUDGED = {"reason": "fine", "asked": "boat", "found": "boat", "seen": "42", "stated": "42", "problems": []}


def test_chain_fault():
    for case in table("chains"):
        assert chain_fault(row(**case["changes"])) == case["reason"], case
        assert case["reason"] is None or case["reason"] in RULE_REASONS


@pytest.mark.parametrize("value, wanted", [case.values() for case in table("incomparable")])
def test_a_value_that_cannot_be_compared_is_neither_same_nor_a_conflict(value, wanted):
    assert compare(value, wanted, {}) is None
    assert compare(value, "B", {"A": "seven", "B": "teal"}) is None  # names no option


@pytest.mark.parametrize("changes, strict, lenient", [case.values() for case in table("decisions")])
def test_code_decides_from_the_values(changes, strict, lenient):
    assert decide(JUDGED | changes, row(), False) == strict and set(strict) <= set(JUDGE_REASONS)
    assert decide(JUDGED | changes, row(), True) == lenient


@pytest.mark.parametrize("case", table("spellings"), ids=lambda case: case["values"][0][0])
def test_every_planted_conflict_is_found_and_no_spelling_of_the_answer_is_one(case):
    """The judge reports what it sees and reads; the stated answer is another value, or spelled otherwise."""
    lines = [f"{letter}. {text}" for letter, text in case["options"].items()]
    for truth, seen, stated in itertools.product(case["values"], repeat=3):
        planted = ["unsupported"] * (seen != truth) + ["inconsistent"] * (stated != truth)
        for n, (answer, one) in enumerate(itertools.product(truth, seen)):
            asked = row(question="\n".join(["Which one?", *lines]), answer=answer)
            value = JUDGED | {"seen": one, "stated": stated[n % len(stated)]}
            assert decide(value, asked, False) == planted, (value, answer)


def test_the_judge_sees_the_chain_without_its_conclusion():
    chain = "A. <think_image>White 42.</think_image> So it is. The answer is \\boxed{XLII}."
    call = judge_call(row("z", answer="XLII", chain=chain), Verdict(hashes=["h", "i"]), "root", PROMPTS)
    assert "What number is on boat z?" in call.text and "White 42.</think_image> So it is.\n" in call.text
    assert "XLII" not in call.text and "{question}" not in call.text
    assert (call.images, call.hashes) == (("root/a.png",), ("h",))


class Judge(StandIn):
    """Judges by words in the caption."""

    def reply(self, text: str) -> str:
        if "garbage" in text:
            return "no json"
        verdicts = {"conflict": {"seen": "24", "problems": ["wrong_observation"]},
                    "doubt": {"found": "big boat"}, "maybe": {"seen": 42}}
        return json.dumps(JUDGED | next((change for word, change in verdicts.items() if word in text), {}))


@pytest.fixture
def judge(monkeypatch):
    return Judge.replace_backend(monkeypatch)


def result(path: Path) -> tuple[list[str], dict]:
    verdicts = read_rows(path.parent / "out.jsonl.run" / "verdicts.jsonl", {"id": str})
    return ([line["id"] for line in read_rows(path.parent / "out.jsonl", {"id": str})],
            {line["id"]: line for line in verdicts})


ROWS = [row("z"), row("conflict", "A conflict of 42."), row("doubt", "A doubt of 42."),
        row("error", "Some garbage 42."), row("schema", "A maybe 42."), row("rule", "The answer is 42."),
        row("again", question="What number is on boat z?"), row("lost", images=["no.png"]),
        row("a", subset="t", answer="forty-two",
            steps=[{"image": "b.png", "operation": "zoom", "caption": "A red hull."},
                   {"text": "\\boxed{42}"}], chain="<think_image>A red hull.</think_image> \\boxed{42}")]


def test_every_row_has_a_verdict_and_an_error_does_not_drop_it(rows_file, judge, capsys):
    path = rows_file(ROWS)
    assert main(flags(path)) == 3
    kept, verdicts = result(path)
    assert kept == ["z", "a"] and list(verdicts) == [line["id"] for line in ROWS]
    lines = path.read_text(encoding="utf-8").splitlines()
    output = (path.parent / "out.jsonl").read_text(encoding="utf-8")
    assert output.splitlines() == [lines[0], lines[-1]]  # unchanged
    assert {name: (verdict["stage"], verdict["reasons"]) for name, verdict in verdicts.items()} == {
        "z": (None, []), "conflict": ("judge", ["unsupported", "wrong_observation"]),
        "doubt": ("judge", ["unanswerable_unclear"]), "error": ("error", ["bad_json"]),
        "schema": ("error", ["bad_schema"]), "rule": ("rule", ["caption_leak"]),
        "again": ("rule", ["duplicate"]), "lost": ("rule", ["image_missing"]), "a": (None, [])}
    assert "no.png: no such image; is --image_root" in verdicts["lost"]["detail"]
    assert verdicts["z"]["judge"] == JUDGED and verdicts["rule"]["judge"] is None
    assert verdicts["z"]["keep"] is True and verdicts["z"]["detail"] == ""
    captured = capsys.readouterr()
    out = json.loads(captured.out.splitlines()[-1])
    assert out == json.loads((path.parent / "out.jsonl.metrics.json").read_text())
    counts = [out[name] for name in ("read", "kept", "rule_rejected", "judge_dropped", "errors")]
    assert counts == [9, 2, 3, 2, 2]
    assert out["subsets"]["s"]["reasons"] == {
        "judge:unsupported": 1, "judge:unanswerable_unclear": 1, "error:bad_json": 1, "error:bad_schema": 1,
        "rule:caption_leak": 1, "rule:duplicate": 1, "rule:image_missing": 1}
    assert "s                                   8        3        2        2        1" in captured.err
    assert out["n_calls"] == 5 + 1 + 2  # none about rows that the rules rejected; faulty replies twice


def test_another_choice_changes_the_decision_without_new_calls(rows_file, judge):
    path = rows_file(ROWS)
    assert main(flags(path, "--limit", "2")) == 0
    assert list(result(path)[1]) == ["z", "conflict"] and len(judge.asked) == 2
    assert main(flags(path, "--batch_size", "3")) == 3 and len(judge.asked) == 2 + 4 + 2
    judge.asked.clear()
    for more in ([], ["--export_only"]):
        assert main(flags(path, "--keep_unclear", *more)) == 3 and not judge.asked
        assert result(path)[0] == ["z", "doubt", "a"]
    assert main(flags(path, "--retry_errors")) == 3 and judge.asked
    assert all("garbage" in request.text or "maybe" in request.text for request in judge.asked)


def test_dry_run_and_rules_alone_need_no_model(rows_file, judge, capsys, tmp_path):
    path = rows_file(ROWS)
    files = sorted(tmp_path.iterdir())
    assert main(flags(path, "--dry_run")) == 0 and sorted(tmp_path.iterdir()) == files
    captured = capsys.readouterr()
    assert json.loads(captured.out)["calls"]["judge"]["calls"] == 6 and "--- judge, sample z" in captured.err
    assert main([*flags(path, "--rules_only"), "--model", "/no/such"]) == 0
    assert result(path)[0] == ["z", "conflict", "doubt", "error", "schema", "a"] and judge.asked == []
    assert json.loads(capsys.readouterr().out)["rule_rejected"] == 3


def test_a_damaged_or_missing_input_is_reported_and_an_empty_one_is_valid(rows_file, judge):
    for rows, match in (([row(steps=["text"])], "in.jsonl: id 's/1': step 1 should be"),
                        ([{"id": "a"}], "in.jsonl:1: no field 'subset'")):
        with pytest.raises(DataError, match=match):
            main(flags(rows_file(rows)))
    path = rows_file([])
    assert main(flags(path)) == 0 and result(path) == ([], {})
    path.unlink()
    with pytest.raises(DataError, match="in.jsonl: No such file or directory; rewrite_captions.py writes it"):
        main(flags(path))


# ---- planted faults
PLANTED = {  # of a row's question: the judge's values that differ from JUDGED, and the planted fault
    "sound 1": ({}, None), "sound 2": ({"seen": "forty-two"}, None), "sound 3": ({"stated": "42."}, None),
    "sound 4": ({"seen": "unclear"}, None), "sound 5": ({}, None), "sound 6": ({}, None),
    "conflict 1": ({"seen": "24"}, "conflict"), "conflict 2": ({"seen": "43", "stated": "43"}, "conflict"),
    "conflict 3": ({}, "conflict"), "conflict 4": ({"stated": "24"}, "conflict"),
    "absent 1": ({"found": "not shown"}, "unanswerable"),
    "absent 2": ({"found": "house", "seen": "unclear"}, "unanswerable")}


@pytest.fixture
def planted(rows_file):
    """Return (input, truth): rows whose question spells out the judge's reply, an error, one of no truth."""
    def asked(name: str, value: dict, content: str | None = None) -> dict:
        message = {"content": json.dumps(JUDGED | value) if content is None else content}
        return row(name, question=f"Which one, {name}? {raw(message=message, finish_reason='stop')}")

    path = rows_file([*(asked(name, value) for name, (value, _) in PLANTED.items()), asked("other", {}),
                      asked("error", {}, "no json")])
    truth = [{"id": name, "bad": fault} for name, (_, fault) in PLANTED.items()]
    others = {"error": "conflict", "gone": "no file", "lost": None}
    truth += [{"id": name, "bad": fault} for name, fault in others.items()]
    write_rows(path.with_name("truth.jsonl"), truth)
    return path, str(path.with_name("truth.jsonl"))


def test_a_complete_run_is_calibrated_on_planted_faults(planted, tmp_path, capsys):
    """The shares by hand; Wilson's interval of 3 in 4 and of 0 in 0 from their formula."""
    path, truth = planted
    with serving(tmp_path, latency=0) as (_, url):
        server = flags(path, "--backend", "openai", "--base_url", url, "--no_guard")
        assert main(server) == 3
        kept, n_calls = result(path)[0], len(calls_of(tmp_path))
        assert "calibration" not in json.loads(capsys.readouterr().out)
        assert main([*server, "--calibrate", truth]) == 3 and len(calls_of(tmp_path)) == n_calls
        captured = capsys.readouterr()
        assert kept == result(path)[0] == [*(f"sound {n}" for n in (1, 2, 3, 5, 6)), "conflict 3", "other"]
        assert main([*server, "--calibrate", truth, "--keep_unclear"]) == 3
        lenient = json.loads(capsys.readouterr().out)["calibration"]["shares"]
    metrics = json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    assert metrics["calibration"]["shares"] == lenient
    found = json.loads(captured.out)["calibration"]
    shares = found.pop("shares")
    assert found == {"known": 12, "errors": 1, "absent": {"no file": 1, "sound": 1}}
    corrected = [shares.pop(name) for name in ("sound_corrected", "sound_kept_corrected")]
    assert {name: (share["k"], share["n"]) for name, share in shares.items()} == {
        "recall": (5, 6), "recall:conflict": (3, 4), "recall:no file": (0, 0), "recall:unanswerable": (2, 2),
        "false_drops": (1, 6), "precision": (5, 6), "precision:judge:inconsistent": (2, 2),
        "precision:judge:unanswerable": (2, 2), "precision:judge:unsupported": (2, 2),
        "precision:judge:unsupported_unclear": (1, 2), "sound_kept": (5, 6)}
    assert shares["recall:conflict"]["ci95"] == pytest.approx([0.30064, 0.95441], abs=1e-5)
    assert shares["recall:no file"] == {"k": 0, "n": 0, "share": None, "ci95": None}
    # 6 of 13 dropped: (5/6 - 6/13) / (5/6 - 1/6) sound, of which 5/6 are among the 7 kept
    assert corrected[0]["share"] == pytest.approx(29 / 52) and corrected[0]["n"] == 13
    assert corrected[1] == {"n": 7, "share": pytest.approx(29 / 52 * 5 / 6 * 13 / 7), "ci95": None}
    assert "| recall:conflict | 75.0 of 4 (30.1 to 95.4) |" in captured.err
    assert (lenient["recall"]["k"], lenient["false_drops"]["k"]) == (5, 0)


def test_truth_of_other_rows_and_of_another_form_is_refused(planted, judge, tmp_path):
    path, _ = planted
    wrong = tmp_path / "wrong.jsonl"
    for lines, match in (([{"id": "x", "bad": None}], "none of its 1 ids has a verdict; expected ids of"),
                         ([{"id": "other", "bad": True}], "jsonl:1: field 'bad' should be str or NoneType"),
                         ([{"id": "other"}], "wrong.jsonl:1: no field 'bad'"),
                         ([{"id": "other", "bad": "x"}] * 2, "wrong.jsonl:2: duplicate id 'other'")):
        write_rows(wrong, lines)
        with pytest.raises(DataError, match=match):
            main(flags(path, "--rules_only", "--calibrate", str(wrong)))
    assert len(result(path)[0]) == 14  # written before the ids were compared
    with pytest.raises(DataError, match="is read too, as .*wrong.jsonl"):
        main([*flags(path, "--calibrate", str(wrong)), "--output", str(wrong)])


def test_the_corrected_share_is_the_true_one_where_every_row_is_known():
    """With every row known, the correction must give what counting gives."""
    rng = random.Random(0)
    for _ in range(200):
        rows, faults, verdicts = [{"id": str(n)} for n in range(30)], {}, []
        for line in rows:
            faults[line["id"]] = rng.choice([None, "a", "b"])
            verdicts.append(Verdict())
            if rng.random() < (0.8 if faults[line["id"]] else 0.2):
                verdicts[-1].drop("judge", ["unsupported"])
        shares = calibrate(rows, verdicts, faults)["shares"]
        if shares["recall"]["share"] > shares["false_drops"]["share"]:
            sound = list(faults.values()).count(None) / 30
            assert shares["sound_corrected"]["share"] == pytest.approx(sound)
            assert shares["sound_kept_corrected"]["share"] == pytest.approx(shares["sound_kept"]["share"])


def drawn(rng: random.Random, n: int, p: float) -> dict:
    return share_of(rng.random() < p for _ in range(n))


@pytest.mark.parametrize("bad, recall, false, n_bad, n_sound", [
    (0.2, 0.8, 0.05, 60, 60), (0.8, 0.6, 0.1, 40, 40), (0.05, 0.95, 0.02, 30, 100)])
def test_the_corrected_share_and_its_interval_hit_the_truth(bad, recall, false, n_bad, n_sound):
    rng, shares, covered = random.Random(1), [], 0
    for _ in range(300):
        dropped = drawn(rng, 400, bad * recall + (1 - bad) * false)
        part = correct(dropped, drawn(rng, n_bad, recall), drawn(rng, n_sound, false))["sound_corrected"]
        shares.append(part["share"])
        covered += part["ci95"][0] <= 1 - bad <= part["ci95"][1]
    assert sum(shares) / len(shares) == pytest.approx(1 - bad, abs=0.03) and covered >= 0.95 * len(shares)


def test_the_corrected_share_stays_in_0_to_1_and_needs_a_filter_that_finds_faults():
    few, many = share_of([True] + [False] * 99), share_of([True] * 99 + [False])
    good, poor, none = share_of([True] * 9 + [False]), share_of([True] + [False] * 9), share_of([])
    assert correct(few, good, poor)["sound_corrected"]["share"] == 1.0  # fewer than false drops alone
    assert correct(many, good, poor)["sound_corrected"]["share"] == 0.0  # more than recall allows
    for dropped in (few, many):
        low, high = correct(dropped, good, poor)["sound_corrected"]["ci95"]
        assert 0.0 <= low <= high <= 1.0
    for recall, false in ((poor, good), (poor, poor), (none, poor), (good, none)):
        assert correct(few, recall, false) == {"sound_corrected": None, "sound_kept_corrected": None}
    everything = correct(share_of([True]), good, poor)["sound_kept_corrected"]
    assert everything == {"n": 0, "share": None, "ci95": None}
