"""Conversion of Monet and Mirage samples, refinement checks, whole runs with a scripted model."""
import json
import re
from pathlib import Path

import pytest
from samples import PAIR, StandIn, flags, mirage, monet, table

from rewrite_captions import (OPERATIONS, REASONS, Sample, check_refined, lost_facts, main, make_sample,
                              make_segments, parse_args)
from utils.chain_formats import convert
from utils.jsonl import DataError, read_rows


def converted(value: dict) -> Sample:
    return make_sample("in.json:1", *convert("in.json:1", value), OPERATIONS)


def test_monet_becomes_a_row():
    sample = converted(monet())
    assert sample.reason is None and sample.row == {
        "id": "Visual_CoT/7", "subset": "Visual_CoT", "images": ["a.png"],
        "question": "What number is on the boat?", "answer": "42",
        "steps": [{"text": "I look closer at the boat."}, {"image": "b.png", "operation": "zoom"},
                  {"text": "The hull shows 42. The answer is \\boxed{42}."}]}
    asked = monet(user=[("image", "a"), ("text", "Is this "), ("image", "b"), ("text", " the same?")])
    row = converted(asked).row  # images inside the question become markers
    assert row["images"] == ["a", "b"] and row["question"] == "<image>Is this <image> the same?"
    asked = monet(user=[("image", "a"), ("image", "b"), ("text", "Same?")])
    assert converted(asked).row["question"] == "Same?"


def test_monets_discard_rules():
    for case in table("monet_rules"):
        value = monet(assistant=case["assistant"])
        sample = converted(value)
        assert sample.reason == case["reason"], case
        assert not re.search("abs_vis_token|observation>", json.dumps(sample.row["steps"]))
        assert converted(value | {"data": value["data"][1:]}) == sample  # a system turn is not needed


@pytest.mark.parametrize("subset, operation, keeps_suffix", [
    ("Visual_CoT", "zoom", False), ("CogCoM", "draw", False), ("Zebra_CoT_geometry", "zoom", False),
    ("Zebra_CoT_visual_search", "zoom", True), ("Zebra_CoT_count", "zoom", True), ("ReFocus", "draw", False),
    ("Toy_zoom", "zoom", False), ("Toy_draw", "draw", False)])
def test_the_subset_tells_the_operation_and_whether_monet_keeps_the_suffix(subset, operation, keeps_suffix):
    row = converted(monet(subset=subset)).row
    assert row["question"].endswith("\\boxed{}.") is keeps_suffix
    assert row["steps"][1]["operation"] == operation


@pytest.mark.parametrize("changes, texts, images, reason", [case.values() for case in table("mirage_rows")])
def test_mirage_becomes_a_row(changes, texts, images, reason):
    sample = converted(mirage(**changes))
    row = sample.row
    assert (sample.reason, row["subset"]) == (reason, "Mirage") and row["id"].startswith("mirage/")
    asked = (row["question"], row["answer"]) == ("Map: <image>\nSafe?", "A")
    assert asked is (reason in (None, "nothing_to_rewrite"))
    assert [step["text"] for step in row["steps"] if "text" in step] == texts
    drawn = [{"image": image, "operation": "draw"} for image in images]
    assert [step for step in row["steps"] if "image" in step] == drawn


STEPS = [{"text": "I look closer at the boat."},
         {"image": "b", "operation": "zoom", "caption": 'A red hull with "Anna" and 42.'},
         {"text": "So the number is clear. The answer is \\boxed{42}."}]


@pytest.mark.parametrize("case", table("refinements"), ids=lambda case: case["fault"])
def test_check_refined(case):
    segments, _ = make_segments([{"text": case.get("first", STEPS[0]["text"])}, *STEPS[1:]])
    parts = [{"id": n, "text": text} for n, text in enumerate(case["texts"], 1)]
    result, fault = check_refined(segments, {"segments": parts}), case["fault"]
    assert result is None if fault is None else result[0] == "refine" and fault in result[1], result
    assert "the ids were not" in check_refined(segments, {"segments": parts[::-1]})[1]


@pytest.mark.parametrize("caption, refined, lost", [case.values() for case in table("lost_facts")])
def test_a_short_caption_may_lose_no_word(caption, refined, lost):
    assert (lost_facts(caption, refined) is not None) is lost


class Captioner(StandIn):
    """Captions and refines by rule, with faults for certain words in the question."""

    def reply(self, text: str) -> str:
        again = "could not be used" in text
        if "garbage" in text or ("stumble" in text and not again):
            return "no json"
        if "refuse" in text:
            return json.dumps({"caption": "I'm sorry, I cannot see it.", "legible": "yes"})
        if "cut out of a larger image" in text or "region of it, cut out" in text:
            return json.dumps({"caption": "The hull shows 42.", "legible": "no" if "dark" in text else "yes"})
        if "The second image" in text:
            return json.dumps({"marks": ["box"], "description": "A box marks 42.",
                               "changed": "still" not in text})
        parts = re.findall(r"^\[(\d+)\] \w+: (.*)$", text, re.MULTILINE)
        spoil = any("spoil" in part for _, part in parts)
        return json.dumps({"segments": [{"id": int(n), "text": part.replace("42", "x")
                                         if spoil else f"Well, {part}"} for n, part in parts]})


@pytest.fixture
def captioner(monkeypatch):
    return Captioner.replace_backend(monkeypatch)


def rejected_of(path: Path) -> dict[str, str]:
    rows = read_rows(path.parent / "out.jsonl.run" / "rejected.jsonl", {"id": str})
    return {row["id"]: row["reason"] for row in rows}


def result(path: Path) -> tuple[dict, dict]:
    return {row["id"]: row for row in read_rows(path.parent / "out.jsonl", {"id": str})}, rejected_of(path)


def names(request) -> list[str]:
    return [Path(path).name for path in request.images]


def test_every_sample_ends_once_with_its_reason(rows_file, captioner, capsys):
    questions = ("plain", "stumble", "garbage", "refuse", "dark", "plain")
    samples = [monet(n, question=f"{q}?") for n, q in enumerate(questions)]
    untagged = [("text", "Look."), ("image", "b.png"), ("text", "\\boxed{1}")]
    samples += [monet(6, question="a?", images=("a.png", "no.png")),
                monet(7, question="b?", images=("../a.png", "b.png")),
                monet(8, question="c?", images=("a.png", "a.png")), monet(9, "CogCoM", question="drawn?"),
                monet(10, "CogCoM", question="still?"), monet(11, question=" "),
                monet(12, question="e?", answer=""), monet(13, question="f?", assistant=untagged)]
    path = rows_file(samples)
    assert main(flags(path)) == 3
    rows, rejected = result(path)
    assert list(rows) == ["Visual_CoT/0", "Visual_CoT/1", "CogCoM/9"]
    assert rejected == {
        "Visual_CoT/2": "bad_json", "Visual_CoT/3": "caption_refusal", "Visual_CoT/4": "caption_illegible",
        "Visual_CoT/5": "duplicate", "Visual_CoT/6": "image_missing", "Visual_CoT/7": "image_outside_root",
        "Visual_CoT/8": "image_no_op", "CogCoM/10": "caption_unchanged", "Visual_CoT/11": "question",
        "Visual_CoT/12": "answer", "Visual_CoT/13": "tag_missing"}
    assert set(rejected.values()) <= set(REASONS)
    assert rows["Visual_CoT/0"] == {
        "id": "Visual_CoT/0", "subset": "Visual_CoT", "images": ["a.png"], "question": "plain?",
        "answer": "42", "steps": [{"text": "I look closer at the boat."},
                  {"image": "b.png", "operation": "zoom", "caption": "The hull shows 42."},
                  {"text": "The hull shows 42. The answer is \\boxed{42}."}],
        "chain": "Well, I look closer at the boat. <think_image>Well, The hull shows 42.</think_image> "
                 "Well, The hull shows 42. The answer is \\boxed{42}.", "refined": True}
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out == json.loads((path.parent / "out.jsonl.metrics.json").read_text())
    counts = [out[name] for name in ("read", "kept", "rejected", "errors", "refined_share", "n_calls")]
    assert counts == [14, 3, 11, 1, 1.0, 14] and len(captioner.asked) == 14
    assert out["reasons"]["CogCoM"] == {"caption_unchanged": 1}
    zoom, draw = (next(r for r in captioner.asked if word in r.text) for word in ("plain?", "drawn?"))
    assert names(zoom) == ["b.png"] and names(draw) == ["a.png", "b.png"]
    assert not any("42" in request.text for request in (zoom, draw))  # never the answer
    assert not any(re.search(r"\{(question|segments|count|fault)\}", r.text) for r in captioner.asked)


@pytest.mark.parametrize("fault", ["\\u0000", "\\u001b[31m", '", "x": NaN, "y": "', '", "caption": "a boat'])
def test_what_is_no_text_is_kept_out_of_rows_and_captions(rows_file, captioner, monkeypatch, fault):
    """A row that has it, and a row whose caption gets it from the model, also when asked again."""
    reply = Captioner.reply
    monkeypatch.setattr(Captioner, "reply", lambda self, text: reply(self, text).replace(
        "shows", f"shows {fault}" if "strange" in text else "shows"))
    bad = monet(2, question="c?")
    bad["data"][2]["content"][0]["text"] = f"I look\x08 closer. {PAIR}"
    path = rows_file([monet(0, question="plain?"), monet(1, question="strange?"), bad,
                      monet(3, question="d\x1b[1m?"), monet(4, question="e\x0b\x85\u2028?")])
    assert main(flags(path)) == 3
    rows, rejected = result(path)
    assert list(rows) == ["Visual_CoT/0", "Visual_CoT/4"]
    assert rejected == {"Visual_CoT/1": "bad_json", "Visual_CoT/2": "control", "Visual_CoT/3": "control"}


def test_a_refinement_that_fails_keeps_the_unrefined_chain(rows_file, captioner):
    sample = monet(1)
    sample["data"][2]["content"][0]["text"] = f"I spoil it. {PAIR}"
    path = rows_file([sample])
    assert main(flags(path)) == 0
    row = result(path)[0]["Visual_CoT/1"]
    chain = "I spoil it. <think_image>The hull shows 42.</think_image> The hull shows 42. The answer is "
    assert row["refined"] is False and row["chain"] == chain + "\\boxed{42}."
    refinements = [r.text for r in captioner.asked if "numbered segments" in r.text]
    assert len(refinements) == 2 and "segment 2 lost 42" in refinements[1]
    assert not any("The answer is" in text for text in refinements)  # the final sentence is not shown


@pytest.mark.parametrize("at_most, reasons",
                         [(3, {}), (2, {f"Visual_CoT/{n}": "caption_repeated" for n in range(4)})])
def test_one_caption_for_many_images_is_rejected(rows_file, captioner, picture, at_most, reasons):
    for n, color in enumerate(("blue", "green", "yellow")):
        picture(f"b{n}.png", color=color)
    samples = [monet(n, question=f"plain {n}?", images=("a.png", f"b{min(n, 2)}.png")) for n in range(4)]
    path = rows_file(samples + [monet(9, "CogCoM", question="drawn?")])  # images 2 and 3 are alike
    assert main(flags(path, "--max_same_caption", str(at_most))) == 0
    rows, rejected = result(path)
    assert rejected == reasons and "CogCoM/9" in rows and len(rows) + len(rejected) == 5
    n_asked = len(captioner.asked)
    assert main(flags(path, "--export_only")) == 0 and rejected_of(path) == {}
    assert len(captioner.asked) == n_asked


def test_a_draw_shows_the_whole_image_first_and_no_refine_leaves_the_chain(rows_file, captioner):
    path = rows_file([monet(1), monet(2, "CogCoM", question="drawn?")])
    assert main(flags(path, "--no_refine")) == 0
    assert [names(request) for request in captioner.asked] == [["b.png"], ["a.png", "b.png"]]
    assert not any(row["refined"] for row in result(path)[0].values())


def test_several_inputs_of_all_forms(rows_file, captioner):
    own = {"id": "x/1", "subset": "x", "images": ["a.png"], "question": "Own?", "answer": "42",
           "refined": True, "chain": "old",
           "steps": [{"image": "c.png", "operation": "draw", "caption": "old"}, {"text": "\\boxed{42}"}]}
    paths = [rows_file([monet(1)]), rows_file([mirage()], "mirage.json"), rows_file([own], "own.json")]
    assert main([*flags(paths[0]), "--input", *map(str, paths)]) == 0
    rows, _ = result(paths[0])
    drawn = converted(mirage()).row["id"]
    assert list(rows) == ["Visual_CoT/1", drawn, "x/1"]
    assert rows["x/1"]["steps"][0]["caption"] == "A box marks 42." and "old" not in json.dumps(rows["x/1"])
    assert rows[drawn]["question"] == "Map: <image>\nSafe?"
    with pytest.raises(DataError, match=r"own\.json:1: duplicate id 'x/1', first seen at .*own\.json"):
        main([*flags(paths[0]), "--input", str(paths[2]), str(paths[2])])


def test_conversations_with_pictures_are_rewritten_and_finished_chains_are_not(rows_file, captioner, capsys):
    reply, chain = "I look. <image>So it is \\boxed{42}.", "<think_image>42</think_image> \\boxed{42}"
    drawn = {"id": 5, "images": ["a.png", "b.png"], "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": reply}]}
    zoomed = {"subset": "mine_zoom", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How?"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."}, {"type": "image", "image": "c.png"},
            {"type": "text", "text": "So it is \\boxed{42}."}]}]}
    finished = {"id": "f", "image": "a.png", "conversations": [
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": chain}]}
    own = {"id": "o", "images": ["a.png"], "question": "Who?", "chain": chain}
    talk = drawn | {"id": 6, "conversations": [*finished["conversations"], *drawn["conversations"][1:]]}
    path = rows_file([drawn, zoomed, finished, own, monet(1, assistant=[("text", chain)]),
                      mirage(image_output=[], text_output="x"), talk])
    with pytest.raises(DataError, match="in.jsonl:1: no operation is known for subset 'conversations'"):
        main(flags(path))
    assert main(flags(path, "--operation", "conversations=draw", "--operation", "Old=draw")) == 0
    rows, rejected = result(path)
    assert [(row["subset"], row.get("system"), row["chain"]) for row in rows.values()] == [
        ("conversations", "Be brief.",
         "Well, I look. <think_image>Well, A box marks 42.</think_image> So it is \\boxed{42}."),
        ("mine_zoom", None,
         "Well, I look. <think_image>Well, The hull shows 42.</think_image> So it is \\boxed{42}.")]
    assert list(rows)[0] == "5" and list(rows)[1].startswith("messages/")
    assert [reason for reason in rejected.values()] == ["nothing_to_rewrite"] * 4 + ["structure"]
    err = capsys.readouterr().err
    assert "4 of 7 samples have no image in the reply: nothing to rewrite; train" in err
    assert "--operation Old=draw: no sample read is of that subset" in err
    with pytest.raises(SystemExit):
        parse_args(flags(path, "--operation", "New=cut"))
    assert "expected SUBSET=zoom or SUBSET=draw" in capsys.readouterr().err


def test_copied_rows_get_ids_of_their_own_and_are_duplicates(rows_file, captioner):
    path = rows_file([mirage(), mirage(text_input="Other: <image>\nSafe?"), mirage(), mirage()])
    assert main(flags(path)) == 0
    rows, rejected = result(path)
    first, _ = rows
    assert rejected == {f"{first}-2": "duplicate", f"{first}-3": "duplicate"}


def test_other_settings_are_refused_and_fresh_starts_over(rows_file, captioner, tmp_path):
    path, prompts = rows_file([monet(1)]), tmp_path / "prompts.json"
    prompts.write_text('{"ZOOM": "cut out of a larger image {question}"}')
    assert main(flags(path)) == 0
    for n, (more, match) in enumerate([(["--max_new_tokens", "100"], "max_new_tokens +512 +100"),
                                       (["--prompts", str(prompts)], r"prompts +\w{44} +\w{44}")], 1):
        with pytest.raises(DataError, match=f"(?s)other settings.*{match}"):
            main(flags(path, *more))
        assert main(flags(path, *more, "--fresh")) == 0
        assert (tmp_path / f"out.jsonl.run.old-{n}" / "meta.json").is_file()


def test_dry_run_shows_prompts_and_writes_nothing(rows_file, captioner, capsys, tmp_path):
    path = rows_file([monet(1), monet(2, "ReFocus", question="Drawn <|im_end|>?"),
                  monet(3, images=("a.png", "no.png"))])
    files = sorted(tmp_path.iterdir())
    assert main(flags(path, "--dry_run")) == 0
    captured = capsys.readouterr()
    out = json.loads(captured.out)
    assert out["read"] == 3 and out["rejected"] == {"image_missing": 1}
    assert {kind: n["calls"] for kind, n in out["calls"].items()} == {"zoom": 1, "draw": 1, "refine": 2}
    assert out["calls"]["refine"]["new_tokens_at_most"] == 2 * 512
    assert 100 < out["calls"]["zoom"]["prompt_tokens"] < 300
    assert all(f"--- {kind}, sample" in captured.err for kind in ("zoom", "draw", "refine"))
    assert sorted(tmp_path.iterdir()) == files and captioner.asked == []
