"""Rules and decisions one by one, whole runs with a scripted judge."""
import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from samples import StandIn, flags, row, table

from filter_data import JUDGE_REASONS, RULE_REASONS, chain_fault, decide, find_flags, main, parse_require
from utils.jsonl import DataError, read_rows

JUDGED = {"reason": "fine", "answerable": "yes", "observation_supports_answer": "yes",
          "chain_consistent": "yes", "problems": []}


def test_chain_fault():
    for case in table("chains"):
        assert chain_fault(row(**case["changes"])) == case["reason"], case
        assert case["reason"] is None or case["reason"] in RULE_REASONS


def test_find_flags():
    for case in table("row_flags"):
        assert find_flags(row(**case["changes"])) == case["flags"], case


@pytest.mark.parametrize("changes, strict, lenient, required", [
    ({}, [], [], []), ({"answerable": "no"}, ["unanswerable"], ["unanswerable"], ["unanswerable"]),
    ({"answerable": "unclear"}, ["unanswerable_unclear"], [], ["required"]),
    ({"observation_supports_answer": "no", "chain_consistent": "unclear"},
     ["unsupported", "inconsistent_unclear"], ["unsupported"], ["unsupported"]),
    ({"chain_consistent": "unclear"}, ["inconsistent_unclear"], [], []),
    ({"problems": ["garbled_text", "wrong_answer", "wrong_answer"]}, ["wrong_answer", "garbled_text"],
     ["wrong_answer", "garbled_text"], ["wrong_answer", "garbled_text"]),
    ({"reason": "I would drop this"}, [], [], [])])
def test_code_decides_from_the_fields(changes, strict, lenient, required):
    assert decide(JUDGED | changes, False, {}) == strict and set(strict + required) <= set(JUDGE_REASONS)
    assert decide(JUDGED | changes, True, {}) == lenient
    assert decide(JUDGED | changes, True, {"answerable": "yes"}) == required
    assert decide(JUDGED | {"chain_consistent": "unclear"}, True, {"chain_consistent": "yes"}) == ["required"]


@pytest.mark.parametrize("text", ["answerable", "answerable=maybe", "problems=yes", "=yes"])
def test_a_requirement_names_a_field_and_a_value(text):
    assert parse_require("answerable=yes") == ("answerable", "yes")
    with pytest.raises(ArgumentTypeError, match="expected one of answerable, observation_supports_answer"):
        parse_require(text)


class Judge(StandIn):
    """Judges by words in the caption."""

    def reply(self, text: str) -> str:
        if "garbage" in text:
            return "no json"
        if "from these notes alone" in text:
            return json.dumps({"answer": "unknown" if "conflict" in text or "vague" in text else "42."})
        verdicts = {"conflict": {"observation_supports_answer": "no", "problems": ["wrong_observation"]},
                    "doubt": {"answerable": "unclear"}, "maybe": {"answerable": "maybe"}}
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
        row("a", subset="t", refined=False, answer="Anna",
            steps=[{"image": "b.png", "operation": "zoom", "caption": "A red hull."},
                   {"text": "\\boxed{Anna}"}], chain="<think_image>A red hull.</think_image> \\boxed{Anna}")]


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
    assert verdicts["z"]["keep"] is True and verdicts["z"]["flags"] == []
    assert verdicts["a"]["flags"] == ["unrefined", "answer_unseen"]
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


def test_other_thresholds_change_the_decision_without_new_calls(rows_file, judge):
    path = rows_file(ROWS)
    assert main(flags(path, "--limit", "2")) == 0
    assert list(result(path)[1]) == ["z", "conflict"] and len(judge.asked) == 2
    assert main(flags(path, "--batch_size", "3")) == 3 and len(judge.asked) == 2 + 4 + 2
    judge.asked.clear()
    for more, kept in [(["--keep_unclear"], ["z", "doubt", "a"]),
                       (["--keep_unclear", "--require", "answerable=yes"], ["z", "a"])]:
        for export_only in ([], ["--export_only"]):
            assert main(flags(path, *more, *export_only)) == 3 and result(path)[0] == kept and not judge.asked
    assert result(path)[1]["doubt"]["reasons"] == ["required"]
    assert main(flags(path, "--retry_errors")) == 3 and judge.asked
    assert all("garbage" in request.text or "maybe" in request.text for request in judge.asked)


def test_blind_answer_drops_rows_whose_chain_does_not_lead_to_the_answer(rows_file, judge):
    path = rows_file([row("z"), row("vague", "A vague thing of 42."), row("conflict", "A conflict of 42.")])
    assert main(flags(path, "--blind_answer")) == 0
    kept, verdicts = result(path)
    assert kept == ["z"] and verdicts["z"]["blind"] == "42."
    assert (verdicts["vague"]["reasons"], verdicts["vague"]["blind"]) == (["blind_answer"], "unknown")
    assert verdicts["conflict"]["reasons"] == ["unsupported", "wrong_observation"]
    blind = [request for request in judge.asked if "from these notes alone" in request.text]
    assert len(blind) == 3 and not any(request.images for request in blind)
    assert "hull shows a white 42.</think_image>" in blind[0].text and "The answer is" not in blind[0].text
    seen = next(request for request in judge.asked if request not in blind)  # what the judge is shown
    assert [Path(path).name for path in seen.images] == ["a.png"] and "{question}" not in seen.text
    for part in ("What number is on boat z?", row("z")["chain"], "Stated answer: 42"):
        assert part in seen.text
    with pytest.raises(DataError, match="other settings"):
        main(flags(path))


def test_dry_run_and_rules_alone_need_no_model(rows_file, judge, capsys, tmp_path):
    path = rows_file(ROWS)
    files = sorted(tmp_path.iterdir())
    assert main(flags(path, "--dry_run", "--blind_answer")) == 0 and sorted(tmp_path.iterdir()) == files
    captured = capsys.readouterr()
    assert [counts["calls"] for counts in json.loads(captured.out)["calls"].values()] == [6, 6]
    assert "--- judge, sample z" in captured.err and "--- blind, sample z" in captured.err
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
