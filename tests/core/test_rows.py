"""The rules for rows and captions: at least one accepted and one rejected case each."""
import random

import pytest
from samples import row, table

from utils.jsonl import DataError
from utils.rows import (CAPTION_REASONS, caption_fault, check_own, check_rows, count_words, find_markup,
                        has_loop, parse_options, row_fault, split_final, units_of)


@pytest.mark.parametrize("reason", [None, *CAPTION_REASONS])
def test_caption_fault(reason):
    texts = [case["caption"] for case in table("captions") if case["reason"] == reason]
    assert texts and {text: caption_fault(text) for text in texts} == dict.fromkeys(texts, reason)


# words of a script (places, colours, things, verbs), what stands between them, what ends a sentence
SCRIPTS = {case["name"]: case for case in table("scripts")}


def sentences(rng: random.Random, script: str, n: int) -> list[str]:
    words, between, end = (SCRIPTS[script][name] for name in ("words", "between", "end"))
    found = {between.join(rng.choice(part.split()) for part in words) + end for _ in range(40 * n)}
    return rng.sample(sorted(found), n)


@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_of_every_script_are_kept_and_looping_ones_rejected(script):
    rng = random.Random(script)
    for _ in range(60):
        caption = "".join(sentences(rng, script, rng.randint(2, 4))).strip()
        assert caption_fault(caption) is None, caption
        between = SCRIPTS[script]["between"]
        looping = caption + between + "".join(sentences(rng, script, 1)) * rng.randint(8, 12)
        assert has_loop(looping) and caption_fault(looping) in ("caption_loop", "caption_long"), looping
        stuck = (rng.choice(SCRIPTS[script]["words"][1].split()) + between) * 40  # one word
        assert caption_fault(stuck.strip()) == "caption_loop", stuck


@pytest.mark.parametrize("case", table("refusals"), ids=lambda case: case["script"])
def test_refusals_in_every_script(case):
    begun, alone = case["begun"], case["alone"]
    for text in [*(start + rest for start in begun for rest in case["goes_on"] + alone), *alone,
                 *(f"\n{start}42。" for start in begun)]:
        assert caption_fault(text) == "caption_refusal", text


def test_words_are_counted_in_every_script():
    for script in SCRIPTS:
        one = sentences(random.Random(script), script, 1)[0]
        assert 2 <= count_words(units_of(one)) <= 8, one  # four words
    for text in ("The hull shows a 42!", "l’été – “très” bien", "Ünï  côdé\u00a0x", "Привет, мир",
                 "مرحبا بالعالم", "नमस्ते दुनिया", "빨간 배 42"):
        assert units_of(text) == text.lower().split() and count_words(units_of(text)) == len(text.split())
    assert units_of("船身写着HELLO 42。") == ["船", "身", "写", "着", "hello", "42"]


@pytest.mark.parametrize("before, final", [
    ("船身上写着42。", "所以答案是\\boxed{42}。"), ("船が見える！", "答えは\\boxed{42}です。"),
    ("هل يظهر الرقم؟ ", "الجواب \\boxed{42}"), ("नाव पर ४२ है।", "उत्तर \\boxed{42}"),
    ("The hull shows 42.\n", "The answer is \\boxed{42}."), ("The hull shows 42.  ", "So \\boxed{42}."),
    ("", "The answer is \\boxed{42}."), ("\n\n", "So 3.5 is \\boxed{3.5}"), ("It shows.\n", "So \\fbox{1}."),
    ("First \\boxed{1}. Then\n\n", "so \\boxed{2}. Done."),
    ("<think> Go on </think>", "The answer is \\boxed{A}."), ("<think> Go on </think>\n", "So \\boxed{A}.")])
def test_the_last_sentence_is_split_off(before, final):
    assert split_final(before + final) == (before.strip(), final)


@pytest.mark.parametrize("question, options", [case.values() for case in table("options_in_questions")])
def test_parse_options(question, options):
    assert parse_options(question) == options


def test_row_fault():
    for case in table("row_faults"):
        assert row_fault(row(**case["changes"])) == case["reason"], case


@pytest.mark.parametrize("char", ["\0", "\x07", "\x08", "\x1b", "\x7f", "\x9b"])
def test_a_control_character_rejects_a_row_wherever_it_stands(char):
    text, other = f"I look{char} closer.", row()
    steps = other["steps"]
    for changes in ({"question": f"What{char}?"}, {"answer": f"42{char}"}, {"chain": other["chain"] + char},
                    {"steps": [{"text": text}, *steps[1:]]},
                    {"steps": [steps[0], steps[1] | {"caption": text}, steps[2]]}):
        assert row_fault(row(**changes)) == "control" and row_fault(other) is None
    assert caption_fault(f"a red{char} boat") == "caption_markup" and find_markup(text) == {char}


@pytest.mark.parametrize("changes, match", [
    ({"images": [1]}, "field 'images' should be a list of paths"), ({"steps": ["text"]}, "step 1 should be"),
    ({"steps": [{"text": 1}]}, "step 1 should be"),
    ({"steps": [{"image": "a", "operation": "cut"}]}, "step 1 should be"),
    ({"steps": [{"text": "a"}, {"image": "a"}]}, "step 2 should be")])
def test_check_own(changes, match):
    check_own("x:1", row())
    with pytest.raises(DataError, match=f"x:1: {match}"):
        check_own("x:1", row(**changes))


def test_check_rows_keeps_the_first_accepted_duplicate(tmp_path, picture, capsys):
    picture("a.png"), picture("b.png", color="blue"), picture("copy.png")
    rows = [row(id="bad", steps=[]), row(id="no file", images=["no.png"]), row(id="first"),
            row(id="same", images=["copy.png"]), row(id="other", question="Another?")]
    checked = check_rows(rows, tmp_path)
    assert [one.reason for one in checked] == ["structure", "image_missing", None, "duplicate", None]
    assert checked[3].detail.endswith("of first") and len(checked[2].hashes) == 2
    with pytest.raises(DataError, match="--image_root .*nowhere: no such folder"):
        check_rows(rows, tmp_path / "nowhere")
    assert "no row has its images" not in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    assert {one.reason for one in check_rows(rows[1:], tmp_path / "elsewhere")} == {"image_missing"}
    err = capsys.readouterr().err
    assert "no row has its images under --image_root" in err and "elsewhere/no.png" in err
